"""Weights by address and by published name: fetched once, checked, and in words when they cannot be had."""

import hashlib
import http.server
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch

import beit2
from beit2 import finetuning_options, pretraining_options
from beit2.model.names import TOKENIZERS
from beit2.weights import download, published
from beit2.weights.download import local_file
from beit2.weights.files import read_checkpoint
from common.errors import UsageError


class Server(http.server.SimpleHTTPRequestHandler):
    asked: list = []

    def do_GET(self):
        self.asked.append(self.path)
        super().do_GET()

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """(folder that is served, its address, requests); the published addresses lead to release/ and container/ there."""
    folder = tmp_path / "served"
    for name in ("release", "container"):
        (folder / name).mkdir(parents=True)
    Server.asked = []
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Server, directory=str(folder)))
    threading.Thread(target=running.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{running.server_port}/"
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr(published, "RELEASE", address + "release/")
    monkeypatch.setattr(published, "CONTAINER", address + "container/")
    yield folder, address, Server.asked
    running.shutdown()
    running.server_close()


def test_a_published_name_is_fetched_once_for_all_ranks(server):
    folder, _, asked = server
    torch.save({"model": {"x": torch.ones(2)}}, folder / "release/beitv2_base_patch16_224_pt1k.pth")
    with ThreadPoolExecutor(4) as ranks:
        paths = set(ranks.map(local_file, ["beitv2_base_patch16_224_pt1k"] * 4))
    assert len(paths) == 1 and len(asked) == 1
    assert torch.equal(read_checkpoint(paths.pop())["model"]["x"], torch.ones(2))


def test_the_older_address_is_a_fallback_that_says_so(server, capsys):
    folder, address, _ = server
    torch.save({}, folder / "container/beitv2_large_patch16_224_pt1k.pth")
    local_file(address + "release/beitv2_large_patch16_224_pt1k.pth")
    assert "404" in (said := capsys.readouterr().out) and f"trying {address}container/" in said


def test_a_page_is_not_taken_for_weights(server, tmp_path):
    folder, address, _ = server
    for name in ("a.pth", "beitv2_base_patch16_224_pt1k.pth"):
        (folder / name).write_bytes(b'\xef\xbb\xbf<?xml version="1.0"?><Error>AuthenticationFailed</Error>')
    with pytest.raises(UsageError, match="answered with a page and not with weights.*wget -O a.pth"):
        local_file(address + "a.pth")
    assert not list((tmp_path / "hub").rglob("[!.]*.p*t*"))
    with pytest.raises(UsageError, match="(?i)xml|html|page"):  # one that somebody saved
        read_checkpoint(folder / "a.pth")
    with pytest.raises(UsageError, match="the shell cuts an address at &"):
        local_file(address + "nothing.pth?sv=2021-10-04")
    with pytest.raises(UsageError, match="no such weight file; published are vqkd_encoder.*beitv2_base"):
        local_file("beitv2_base")


def test_the_hash_in_a_name_is_compared(server):
    folder, address, _ = server
    good = hashlib.sha256(b"weights").hexdigest()[:8]
    for name in (f"x-{good}.pth", "x-00000000.pth"):
        (folder / name).write_bytes(b"weights")
    assert local_file(f"{address}x-{good}.pth").read_bytes() == b"weights"
    with pytest.raises(UsageError, match="its name says 00000000"):
        local_file(f"{address}x-00000000.pth")


def test_tokenizer_model_folder_of_the_ascend_page(tmp_path, monkeypatch):
    """The page's commands put the file into tokenizer_model/ and give no --tokenizer_weight."""
    name = "vqkd_encoder_tiny_decoder_1x192x3_clip"
    (tmp_path / "tokenizer_model").mkdir()
    tokenizer = beit2.create_tokenizer(name, img_size=32, n_code=16, code_dim=8)
    torch.save({"model": tokenizer.state_dict()}, tmp_path / f"tokenizer_model/{name}-d5036aa7.pth")
    monkeypatch.chdir(tmp_path)
    sizes = "--second_input_size 32 --input_size 32 --codebook_size 16 --codebook_dim 8 --tokenizer_model".split()
    options = pretraining_options.read_options([*sizes, name])
    loaded = pretraining_options.load_tokenizer(options, "fp32", (2, 2))
    assert torch.equal(loaded.quantize.embedding.weight, tokenizer.quantize.embedding.weight)
    assert download.find_tokenizer("vqkd_encoder_tiny", [tmp_path]) is None


def test_every_published_name_is_known():
    assert set(published.TOKENIZERS) <= set(TOKENIZERS) and len(published.MODELS) == 12
    for name in (*published.TOKENIZERS, *published.MODELS):
        first, second = published.addresses(name)
        assert first.startswith("https://github.com/addf400/files/releases/download/BEiT-v2/") and name in first
        assert published.addresses(first.rsplit("/", 1)[1]) == (first, second)
    assert published.addresses("resnet50.pth") == ()
    assert finetuning_options.read_options(["--finetune", "beitv2_base_patch16_224_pt1k"]).finetune
