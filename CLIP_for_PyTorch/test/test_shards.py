"""WebDataset tars: on local disks, and behind URLs whose server now and then fails."""

import http.server
import io
import os
import re
import tarfile
import threading
from pathlib import Path

import pytest
import torch
from clip_sample import draw, write_shard

import run_clip
from clip_pretraining.data import remote, shards, tables
from clip_pretraining.data.images import ImageError
from clip_pretraining.data.pairs import DecodedImages
from common.errors import UsageError


def test_tars_on_several_disks_are_one_set(tmp_path):
    (tmp_path / "other").mkdir()
    for shard in range(3):
        write_shard(tmp_path / f"s-{shard:04d}.tar", range(shard * 5, shard * 5 + 5))
    write_shard(tmp_path / "other/x.tar", range(15, 17))
    pairs = shards.read_shards(f"{tmp_path}/s-{{0000..0002}}.tar::{tmp_path}/other/*.tar")
    assert pairs.captions == [draw(i)[1] for i in range(17)]
    assert [ref.read() for ref in pairs.images] == [draw(i)[0] for i in range(17)]
    assert torch.equal(DecodedImages(pairs.images, 32)[6], DecodedImages([pairs.images[6]], 32)[0])


def test_bad_tars_are_named(tmp_path):
    with pytest.raises(UsageError, match="no such file"):
        shards.read_shards(f"{tmp_path}/s-{{0000..0001}}.tar")
    (tmp_path / "bad.tar").write_bytes(b"x" * 2000)
    with pytest.raises(UsageError, match="bad.tar: not a readable"):
        shards.read_shards(str(tmp_path / "bad.tar"))
    write_shard(tmp_path / "empty.tar", range(2), caption_of=lambda i: " ")
    with pytest.raises(UsageError, match="are empty"):
        shards.read_shards(str(tmp_path / "empty.tar"))


def test_a_picture_without_caption_is_told_and_a_second_picture_of_a_key_is_no_second_pair(tmp_path, capsys):
    write_shard(tmp_path / "s.tar", range(100), caption_of=lambda i: None if i in (3,) else f"of {i}")
    pairs = shards.read_shards(str(tmp_path / "s.tar"))
    assert len(pairs) == len(pairs.images) == 99 and pairs.captions[3] == "of 4"
    assert "1 captions of 100 are empty or missing (first: part.one/00003)" in capsys.readouterr().out
    with tarfile.open(tmp_path / "two.tar", "w") as tar:
        for suffix, data in (("jpg", draw(0)[0]), ("txt", b"of 0"), ("png", draw(1)[0])):
            member = tarfile.TarInfo(f"a.{suffix}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    assert len(shards.read_shards(str(tmp_path / "two.tar"))) == 1
    write_shard(tmp_path / "s.tar", range(5), caption_of=lambda i: None if i == 4 else f"of {i}")
    with pytest.raises(UsageError, match="1 captions of 5 are empty or missing"):
        shards.read_shards(str(tmp_path / "s.tar"))


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
    assert far.captions == near.captions and far.image_keys == near.image_keys
    assert [ref.read() for ref in far.images] == [ref.read() for ref in near.images]
    assert tables.check_images(far, 1, tmp_path / "cache") == {}

    del server.answers[:]
    again = shards.read_shards(pattern, index_dir=tmp_path)  # the contents were kept: no tar is fetched
    assert again.images == far.images and sum(server.answers) < 10
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
    with pytest.raises(UsageError, match="s-1.tar: not a readable"):
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
