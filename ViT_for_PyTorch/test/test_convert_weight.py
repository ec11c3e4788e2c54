"""Conversion between torch and MindSpore files, against a checkpoint MindSpore wrote and the names MindFormers uses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import convert_weight
from common.checkpoint_file import CheckpointError
from vit import mindspore_checkpoint
from vit.weights import loading as weights

PROJECT = Path(__file__).resolve().parents[1]
GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def names():
    return json.loads((GOLDEN / "convert_weight.json").read_text())


def convert(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, str(PROJECT / "convert_weight.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_there_and_back_gives_the_same_bytes_as_mindspore(tmp_path):
    """Real MindSpore file -> torch -> MindSpore: the same parameters, order, types and bytes."""
    torch_file, ms_file = tmp_path / "w.pth", tmp_path / "sub dir" / "w.ckpt"
    there = convert("--to", "torch", "--ms_ckpt_path", GOLDEN / "mf_gap.ckpt", "--torch_pth_path", torch_file)
    assert there.returncode == 0, there.stderr
    back = convert("--torch_path", torch_file, "--mindspore_path", ms_file)
    assert back.returncode == 0, back.stderr
    assert ms_file.read_bytes() == (GOLDEN / "mf_gap.ckpt").read_bytes()


def test_every_tensor_gets_mindformers_name_and_shape(names):
    rows = names["finetuned_gap"]
    for row in rows:
        tensor = torch.randn(row["torch_shape"])
        params = mindspore_checkpoint.to_mindspore({row["torch"]: tensor})
        assert list(params) == row["ms"]
        if row["op"] == "transpose":
            assert torch.equal(params[row["ms"][0]], tensor.T)
        else:
            assert torch.equal(torch.cat(list(params.values())), tensor)


def test_pretrained_names_equal_mindformers(names):
    """Encoder and decoder of a pretrain file: every name and shape of the real conversion comes from its torch name."""
    shapes = names["pretrain_ckpt_ms_names"]
    state = mindspore_checkpoint.from_mindspore({name: torch.zeros(shape) for name, shape in shapes.items()})
    assert {"cls_token", "norm.weight", "mask_token", "decoder_pos_embed", "blocks.0.attn.qkv.weight"} <= set(state)
    params = mindspore_checkpoint.to_mindspore(state)
    assert {name: list(value.shape) for name, value in params.items()} == shapes


def test_training_checkpoints_lose_only_optimizer_state():
    params = mindspore_checkpoint.read(GOLDEN / "mf_gap.ckpt")
    extra = {f"adam_m.{name}": value for name, value in params.items()} | {"global_step": torch.tensor(7)}
    assert (
        mindspore_checkpoint.from_mindspore(params | extra).keys() == mindspore_checkpoint.from_mindspore(params).keys()
    )


DTYPES = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]


@settings(max_examples=30, deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), max_size=4), dtype=st.sampled_from(DTYPES), tag=st.text(min_size=1, max_size=9)
)
def test_any_parameter_survives_the_file(tmp_path_factory, shape, dtype, tag):
    path = tmp_path_factory.getbasetemp() / "any.ckpt"
    value = (torch.randn(shape) * 3).to(dtype)
    mindspore_checkpoint.write(path, {tag: value, "second": torch.arange(3)})
    params = mindspore_checkpoint.read(path)
    assert list(params) == list(dict.fromkeys([tag, "second"]))
    if tag != "second":
        assert params[tag].dtype == dtype and torch.equal(params[tag], value)


def test_large_tensors_are_written_in_slices(tmp_path, monkeypatch):
    monkeypatch.setattr(mindspore_checkpoint, "_SLICE_BYTES", 64)
    value = torch.randn(7, 11)
    mindspore_checkpoint.write(tmp_path / "w.ckpt", {"vit.w": value})
    assert (tmp_path / "w.ckpt").read_bytes().count(b"vit.w") == 5
    assert torch.equal(mindspore_checkpoint.read(tmp_path / "w.ckpt")["vit.w"], value)


@pytest.mark.parametrize("keep", [0, 1, 300, 100_000, 660_034])
def test_truncated_file_is_named(tmp_path, keep):
    (tmp_path / "cut.ckpt").write_bytes((GOLDEN / "mf_gap.ckpt").read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"cut.ckpt: not a"):
        weights.read_state_dict(tmp_path / "cut.ckpt")


def test_other_content_is_named(tmp_path):
    (tmp_path / "text.ckpt").write_text("this is no checkpoint at all")
    mindspore_checkpoint.write(tmp_path / "gpt.ckpt", {"transformer.h": torch.zeros(2)})
    for name, message in [("text.ckpt", "not a"), ("gpt.ckpt", "vit"), ("absent.ckpt", "No such file")]:
        with pytest.raises(CheckpointError, match=f"{name}.*{message}"):
            weights.read_state_dict(tmp_path / name)


def test_command_line_mistakes_end_with_one_sentence(tmp_path, capsys):
    (tmp_path / "there.ckpt").write_bytes(b"precious")
    torch.save({"model": {"cls_token": torch.zeros(1)}}, tmp_path / "w.pth")
    cases = [
        (["--torch_pth_path", tmp_path / "w.pth", "--ms_ckpt_path", tmp_path / "there.ckpt"], "exists"),
        (["--torch_pth_path", tmp_path / "no.pth", "--ms_ckpt_path", tmp_path / "new.ckpt"], "no.pth"),
        (["--torch_pth_path", tmp_path / "w.pth", "--ms_ckpt_path", tmp_path / "new.txt"], "new.txt"),
        (
            ["--torch_path", tmp_path / "w.pth", "--mindspore_path", tmp_path / "new.ckpt", "--model_name", "x"],
            "model_",
        ),
        (["--to", "timm", "--torch_path", "w", "--output", "o", "--mindspore_path", "x.ckpt"], "--mindspore_path"),
    ]
    for arguments, message in cases:
        with pytest.raises(SystemExit) as ended:
            convert_weight.main([str(word) for word in arguments])
        said = capsys.readouterr().err
        assert ended.value.code == 2 and said.startswith("error: ") and message in said
        assert said.count("\n") == 1
    assert (tmp_path / "there.ckpt").read_bytes() == b"precious"
    assert not (tmp_path / "new.ckpt").exists()


@pytest.mark.parametrize("name", ["plain", "crc", "append_str", "uint32"])
def test_files_of_mindspore_2_10_are_read(name):
    """Written by MindSpore 2.10: plain, with crc_check=True, with a text and with a uint32 counter of append_dict."""
    state = weights.read_state_dict(GOLDEN / f"ms210_{name}.ckpt")
    assert state["cls_token"].tolist() == [[[0.0, 1.0, 2.0, 3.0]]] and state["fc_norm.weight"].tolist() == [1.0] * 4
    if name == "uint32":
        assert mindspore_checkpoint.read(GOLDEN / "ms210_uint32.ckpt")["step"].tolist() == [5]


def test_a_checksum_that_disagrees_is_damage(tmp_path):
    content = bytearray((GOLDEN / "ms210_crc.ckpt").read_bytes())
    for at in (30, 60, len(content) - 1):  # in the numbers of both parameters, and in the checksum itself
        damaged = content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
        (tmp_path / "w.ckpt").write_bytes(damaged)
        with pytest.raises(CheckpointError, match="w.ckpt: .*checksum"):
            weights.read_state_dict(tmp_path / "w.ckpt")


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damaged_bytes_are_read_or_named_and_nothing_else(tmp_path_factory, data):
    """Any change of the file, a number where a text belongs included: no traceback, no memory a number asks for."""
    source = data.draw(st.sampled_from(["plain", "append_str", "uint32"]))
    content = bytearray((GOLDEN / f"ms210_{source}.ckpt").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "fuzzed.ckpt"
    path.write_bytes(content)
    try:
        assert mindspore_checkpoint.read(path)
    except CheckpointError as error:
        assert "fuzzed.ckpt" in str(error)
