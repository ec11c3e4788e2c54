"""WebDataset tars: on local disks, and behind URLs whose server now and then fails."""

import http.server
import io
import json
import os
import re
import tarfile
import threading
from pathlib import Path

import pytest
import torch
from clip_sample import draw, write_shard

import run_clip
from clip_pretraining.data import left_out, remote, shards
from clip_pretraining.data.images import ImageError
from clip_pretraining.data.pairs import DecodedImages
from clip_pretraining.data.picture_check import check_images
from common.errors import UsageError


def test_tars_on_several_disks_are_one_set(tmp_path):
    (tmp_path / "other").mkdir()
    for shard in range(3):
        write_shard(tmp_path / f"s-{shard:04d}.tar", range(shard * 5, shard * 5 + 5))
    write_shard(tmp_path / "other/x.tar", range(15, 17))
    pairs = shards.read_shards(f"{tmp_path}/s-{{0000..0002}}.tar::{tmp_path}/other/*.tar")
    assert list(pairs.captions) == [draw(i)[1] for i in range(17)]
    assert [ref.read() for ref in pairs.images] == [draw(i)[0] for i in range(17)]
    assert torch.equal(DecodedImages(pairs.images, 32)[6], DecodedImages([pairs.images[6]], 32)[0])


def test_bad_tars_are_named(tmp_path):
    with pytest.raises(UsageError, match="no such file"):
        shards.read_shards(f"{tmp_path}/s-{{0000..0001}}.tar")
    (tmp_path / "bad.tar").write_bytes(b"x" * 2000)
    with pytest.raises(UsageError, match="1 x tar cut short or damaged .first: .*bad.tar"):
        shards.read_shards(str(tmp_path / "bad.tar"))
    write_shard(tmp_path / "empty.tar", range(2), caption_of=lambda i: " ")
    with pytest.raises(UsageError, match="2 x caption empty or missing"):
        shards.read_shards(str(tmp_path / "empty.tar"))


@pytest.mark.parametrize("mode", ["r:", "r|"])
def test_a_tar_damaged_at_a_header_is_known_as_cut(tmp_path, mode):
    """tarfile takes it for the end of the tar: the pairs behind it were lost without a word."""
    write_shard(tmp_path / "s.tar", range(4))
    whole = (tmp_path / "s.tar").read_bytes()
    with tarfile.open(tmp_path / "s.tar") as tar:
        third = [member.offset for member in tar][6]
    for damaged in (whole[:third], whole[: third + 99], whole[:third] + b"x" * 512 + whole[third + 512 :]):
        samples, faults = shards.list_tar(io.BytesIO(damaged), mode, "txt", len(damaged))
        assert len(samples) == 2
        assert [cause for cause, _ in faults] == [left_out.CUT_TAR] and f"at byte {third:,}" in faults[0][1]
    assert [len(part) for part in shards.list_tar(io.BytesIO(whole), mode, "txt", len(whole))] == [4, 0]


def test_a_picture_without_caption_is_told_and_a_second_picture_of_a_key_is_no_second_pair(tmp_path, capsys):
    write_shard(tmp_path / "s.tar", range(100), caption_of=lambda i: None if i in (3,) else f"of {i}")
    pairs = shards.read_shards(str(tmp_path / "s.tar"))
    assert len(pairs) == len(pairs.images) == 99 and pairs.captions[3] == "of 4"
    told = f"1 of 100 samples left out: 1 x caption empty or missing (first: {tmp_path}/s.tar: part.one/00003)"
    assert told in capsys.readouterr().out
    with tarfile.open(tmp_path / "two.tar", "w") as tar:
        for suffix, data in (("jpg", draw(0)[0]), ("txt", b"of 0"), ("png", draw(1)[0])):
            member = tarfile.TarInfo(f"a.{suffix}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    assert len(shards.read_shards(str(tmp_path / "two.tar"))) == 1
    write_shard(tmp_path / "s.tar", range(5), caption_of=lambda i: None if i == 4 else f"of {i}")
    with pytest.raises(UsageError, match="1 of 5 samples left out: 1 x caption empty or missing"):
        shards.read_shards(str(tmp_path / "s.tar"))


FAULTS = ("not UTF-8", "no caption", "unknown kind", "broken", "bad json", "no picture", "cut")


def write_web_tars(folder: Path, tars: int, samples: int) -> str:
    """Tars of `samples` each; 2 % of all have one fault of each kind in turn, and the last tar is cut in its last."""
    number = 0
    for shard in range(tars):
        with tarfile.open(folder / f"w-{shard:03d}.tar", "w") as tar:
            for i in range(samples):
                number += 1
                fault = FAULTS[number // 50 % 6] if number % 50 == 0 else None
                members = {"jpg": draw(i)[0], "json": json.dumps({"caption": draw(i)[1], "width": 64}).encode()}
                if fault == "not UTF-8":
                    members["json"] = b'{"caption": "caf\xe9"}'
                elif fault == "no caption":
                    members["json"] = b'{"width": 64}'
                elif fault == "unknown kind":
                    members = {"heic": members["jpg"], "json": members["json"]}
                elif fault == "broken":
                    members["jpg"] = members["jpg"][:200]
                elif fault == "bad json":
                    members["json"] = b"{"
                elif fault == "no picture":
                    del members["jpg"]
                for suffix, data in members.items():
                    member = tarfile.TarInfo(f"{i:06d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    last = folder / f"w-{tars - 1:03d}.tar"
    with tarfile.open(last) as tar:
        end = tar.getmembers()[-2].offset_data + 100
    last.write_bytes(last.read_bytes()[:end])
    return f"{folder}/w-{{000..{tars - 1:03d}}}.tar"


def test_a_set_from_the_web_with_every_fault_trains_to_its_end(tiny_model, tmp_path, capsys):
    """30 tars of 20 samples in img2dataset's layout; what is left out is counted by cause and listed."""
    pattern = write_web_tars(tmp_path, 30, 20)
    options = ["--do_train", "--train_shards", pattern, "--caption_key", "json:caption", "--max_steps", "2"]
    options += ["--per_device_train_batch_size", "8", "--save_every", "0", "--device", "cpu", "--skip_steps", "1"]
    options += ["--model_name_or_path", str(tiny_model), "--output_dir", str(tmp_path / "out")]
    options += ["--cache_dir", str(tmp_path / "cache")]
    with pytest.raises(SystemExit):
        run_clip.main(options)
    assert "a higher limit with --max_bad_share" in capsys.readouterr().err
    assert run_clip.main([*options, "--max_bad_share", "0.04"])["Status"] == "OK"
    printed = capsys.readouterr().out
    for cause in (
        "1 x caption not UTF-8",  # the other lies behind the cut
        "2 x caption empty or missing",
        "2 x picture of an unknown kind (.heic)",
        "2 x picture cannot be read",
        "2 x caption's JSON cannot be read",
        "2 x no picture",
        "1 x tar cut short or damaged",
    ):
        assert cause in printed, cause
    listed = [line.split("\t") for line in (tmp_path / "cache/left_out_shards.tsv").read_text().splitlines()]
    assert len(listed) == 12 and all(len(row) == 2 for row in listed)


def test_lists_braces_and_wildcards_name_tars(tmp_path):
    for name in ("a-0", "a-1", "b-0", "c"):
        write_shard(tmp_path / f"{name}.tar", range(1))
    (tmp_path / "list.txt").write_text(f"# two of them\n{tmp_path}/a-1.tar\n\n{tmp_path}/[bc]*.tar\n")

    def names(pattern: str) -> list[str]:
        return [Path(shard).stem for shard in shards.expand_shards(pattern)]

    assert names(f"{tmp_path}/{{a,b}}-0.tar") == ["a-0", "b-0"]
    assert names(f"{tmp_path}/{{a-{{0..1}},c}}.tar") == ["a-0", "c", "a-1", "c"]
    assert names(f"@{tmp_path}/list.txt::{tmp_path}/c.tar") == ["a-1", "b-0", "c", "c"]
    write_shard(tmp_path / "b-[0].tar", range(1))  # names a file before it is a wildcard
    assert names(f"{tmp_path}/b-[0].tar") == ["b-[0]"] and names(f"{tmp_path}/?.tar") == ["c"]
    with pytest.raises(UsageError, match="more than 1,000,000 tars"):
        names("x-{0..99999999999}.tar")
    with pytest.raises(UsageError, match="not a list of tars"):
        names(f"@{tmp_path}/absent.txt")


@pytest.mark.parametrize(
    "pattern, reason",
    [
        ("a.tar.gz", "decompress it first"),
        ("http://x/{0..3}.tgz?key=1", "decompress it first"),
        ("pipe:curl x", "no commands are run"),
    ],
)
def test_shards_that_cannot_be_read_by_offset_are_refused(pattern, reason):
    with pytest.raises(UsageError, match=reason):
        shards.expand_shards(pattern)


class Server(http.server.ThreadingHTTPServer):
    """Files of a folder, whole or by range. `faults`: what the next answers do instead; `answers`: what was sent."""

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.faults, self.answers, self.ranges = folder, [], [], True
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server: Server = self.server
        fault = server.faults.pop(0) if server.faults else None
        file = server.folder / self.path.lstrip("/")
        if fault == "busy" or not file.is_file():
            self.send_error(503 if fault == "busy" else 404)
            return
        data = whole = file.read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")) if server.ranges else None
        self.send_response(206 if asked else 200)
        if asked:
            first, last = int(asked[1]), int(asked[2])
            data = whole[first : last + 1]
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(whole)}")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Last-Modified", str(file.stat().st_mtime_ns))
        self.end_headers()
        server.answers.append(len(data))
        self.wfile.write(data[: len(data) // 2] if fault == "cut" else data)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server of two tars with twelve pairs each, which nothing here waits for."""
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.0)
    remote.version.cache_clear()
    (tmp_path / "far").mkdir()
    for shard in range(2):
        write_shard(tmp_path / f"far/s-{shard}.tar", range(shard * 12, shard * 12 + 12))
    with Server(tmp_path / "far") as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def test_tars_behind_urls_are_what_they_are_on_disk(server, tmp_path):
    pattern = f"{server.url}/s-{{0..1}}.tar"
    far, near = shards.read_shards(pattern, index_dir=tmp_path), shards.read_shards(f"{tmp_path}/far/s-{{0..1}}.tar")
    assert list(far.captions) == list(near.captions) and list(far.image_keys) == list(near.image_keys)
    assert [ref.read() for ref in far.images] == [ref.read() for ref in near.images]
    assert check_images(far, 1, tmp_path / "cache")[0] == {}

    del server.answers[:]
    again = shards.read_shards(pattern, index_dir=tmp_path)  # the contents were kept: no tar is fetched
    assert list(again.images) == list(far.images) and sum(server.answers) < 10
    for kept in tmp_path.glob("shard_*.json"):
        kept.write_text(kept.read_text().replace("A ", "B ", 1))  # a flipped bit
    assert list(shards.read_shards(pattern, index_dir=tmp_path).captions) == list(far.captions)
    write_shard(tmp_path / "far/s-0.tar", range(3))
    os.utime(tmp_path / "far/s-0.tar", (1, 1))
    remote.version.cache_clear()  # as in another run
    assert len(shards.read_shards(pattern, index_dir=tmp_path)) == 15


def test_what_a_network_does_is_tried_again_and_what_is_wrong_is_named(server, tmp_path):
    url = f"{server.url}/s-0.tar"
    server.faults = ["busy", None, "busy", "cut", "busy"]  # two answers about the version, then of the tar
    pairs = shards.read_shards(url, index_dir=tmp_path)
    assert len(pairs) == 12 and not server.faults
    server.faults = ["cut", "busy"]
    assert pairs.images[3].read() == draw(3)[0]
    server.faults = ["cut"] * remote.TRIES
    with pytest.raises(ImageError, match="bytes"):
        pairs.images[3].read()

    with pytest.raises(UsageError, match="s-7.tar: HTTP Error 404"):
        shards.read_shards(f"{server.url}/s-7.tar", index_dir=tmp_path)
    with pytest.raises(UsageError, match="give --cache_dir"):
        shards.read_shards(url)
    (tmp_path / "far/s-1.tar").write_bytes(b"x" * 2000)
    with pytest.raises(UsageError, match="1 x tar cut short or damaged .first: .*s-1.tar"):
        shards.read_shards(f"{server.url}/s-1.tar", index_dir=tmp_path)
    server.ranges = False
    remote.version.cache_clear()
    with pytest.raises(UsageError, match="no ranges of bytes"):
        shards.read_shards(url, index_dir=tmp_path)


def test_training_from_urls(server, tiny_model, tmp_path):
    options = ["--do_train", "--train_shards", f"{server.url}/s-{{0..1}}.tar", "--cache_dir", str(tmp_path / "cache")]
    options += ["--max_steps", "2", "--per_device_train_batch_size", "8", "--save_every", "0", "--device", "cpu"]
    options += ["--model_name_or_path", str(tiny_model), "--output_dir", str(tmp_path / "out"), "--num_workers", "1"]
    assert run_clip.main(options)["Status"] == "OK"
