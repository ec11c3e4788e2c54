"""MindSpore checkpoint files (.ckpt) without MindSpore: reader, writer, and MindFormers' ViT names <-> MAE's names.

The file is a protobuf message (mindspore/ccsrc/utils/checkpoint.proto):
    Checkpoint { repeated Value value = 1 }
    Value { required string tag = 1; required TensorProto tensor = 2 }
    TensorProto { repeated int64 dims = 1; required string tensor_type = 2; required bytes tensor_content = 3 }
A tensor over 512 MB is split into several values of the same tag, one after the other; a scalar has dims [0]. With
`crc_check=True` a checksum follows.
"""

import math
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common import checkpoint_file

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # protobuf wire types
_SLICE_BYTES = 512 << 20
_CHECKSUM_MARK, _CHECKSUM_BYTES = b"crc_num", 10  # of crc_check=True: CRC-32 of all before it, big end first
_TEXT_TYPES = ("str", "String")
_DTYPES = {
    "Float16": torch.float16,
    "BFloat16": torch.bfloat16,
    "Float32": torch.float32,
    "Float64": torch.float64,
    "Int8": torch.int8,
    "Int16": torch.int16,
    "Int32": torch.int32,
    "Int64": torch.int64,
    "UInt8": torch.uint8,
    "UInt16": torch.uint16,
    "UInt32": torch.uint32,
    "UInt64": torch.uint64,
    "Complex64": torch.complex64,
    "Complex128": torch.complex128,
    "Bool": torch.bool,
}
_TYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def _read_varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError("a varint longer than 10 bytes")


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(field number, value) of one message; ValueError where the bytes do not form one."""
    at = 0
    while at < len(data):
        key, at = _read_varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == _VARINT:
            value, at = _read_varint(data, at)
        elif wire in (_FIXED64, _BYTES, _FIXED32):
            length, at = _read_varint(data, at) if wire == _BYTES else ((8 if wire == _FIXED64 else 4), at)
            if at + length > len(data):
                raise ValueError(f"field {number} is {length} bytes long, {len(data) - at} are left")
            value, at = data[at : at + length], at + length
        else:
            raise ValueError(f"wire type {wire} in field {number}")
        yield number, value


def _dims(fields: list[tuple[int, int | memoryview]]) -> list[int]:
    """The `dims` of a TensorProto, one value per field (proto2) or packed into one (proto3)."""
    dims: list[int] = []
    for number, value in fields:
        if number == 1 and isinstance(value, int):
            dims.append(value)
        elif number == 1:
            at = 0
            while at < len(value):
                dim, at = _read_varint(value, at)
                dims.append(dim)
    return [] if dims == [0] else dims


def _of_bytes(fields: dict[int, int | memoryview], number: int) -> memoryview:
    """Field `number`, which must be there and of bytes: a number there would be taken for a length."""
    value = fields[number]
    if isinstance(value, int):
        raise ValueError(f"field {number} is a number where bytes belong")
    return value


def _without_checksum(data: memoryview) -> memoryview:
    """The message without the trailer that `save_checkpoint(crc_check=True)` adds; ValueError when it disagrees."""
    start = len(data) - len(_CHECKSUM_MARK) - _CHECKSUM_BYTES
    if start < 0 or bytes(data[start : start + len(_CHECKSUM_MARK)]) != _CHECKSUM_MARK:
        return data
    if zlib.crc32(data[:start]) != int.from_bytes(data[start + len(_CHECKSUM_MARK) :], "big"):
        raise ValueError("its checksum says that the file was changed or damaged")
    return data[:start]


def _parse(data: memoryview) -> dict[str, Tensor]:
    pieces: dict[str, tuple[list[int], str, list[memoryview]]] = {}
    for number, value in _fields(_without_checksum(data)):
        if number != 1 or isinstance(value, int):
            continue  # things later versions append
        entry = dict(_fields(value))
        if 1 not in entry or 2 not in entry:
            continue  # a map parameter: never part of a ViT
        tensor = list(_fields(_of_bytes(entry, 2)))
        named = dict(tensor)
        tag, type_name = (bytes(_of_bytes(*place)).decode() for place in ((entry, 1), (named, 2)))
        if type_name not in _TEXT_TYPES:  # a text of `append_dict`, such as the network's name
            pieces.setdefault(tag, (_dims(tensor), type_name, []))[2].append(_of_bytes(named, 3))
    return {tag: _tensor(tag, *piece) for tag, piece in pieces.items()}


def _tensor(tag: str, dims: list[int], type_name: str, contents: list[memoryview]) -> Tensor:
    if type_name not in _DTYPES:
        raise ValueError(f"parameter {tag} has the unknown type {type_name}")
    content = bytearray().join(contents)  # writable, so torch.frombuffer does not warn
    dtype = _DTYPES[type_name]
    if len(content) != math.prod(dims) * dtype.itemsize:
        raise ValueError(f"parameter {tag} {dims} {type_name} has {len(content)} bytes")
    flat = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
    return flat.reshape(dims)


def read(path: str | Path) -> dict[str, Tensor]:
    """All parameters of a MindSpore checkpoint by MindSpore name, in file order; texts are left out.

    `common.checkpoint_file.CheckpointError` naming the file when it is missing, cut short or not such a file.
    """
    try:
        params = _parse(memoryview(Path(path).read_bytes()))
    except (OSError, ValueError, IndexError, KeyError, TypeError, RuntimeError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not a whole MindSpore checkpoint ({error})"
        raise checkpoint_file.CheckpointError(f"{path}: {reason}") from error
    if not params:
        raise checkpoint_file.CheckpointError(f"{path}: not a MindSpore checkpoint: it holds no parameter")
    return params


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(out) + bytes([value])


def _length_delimited(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | _BYTES) + _varint(len(content)) + content


def _values(tag: str, tensor: Tensor) -> Iterator[bytes]:
    """The Value fields of one parameter: one, or several for a very large tensor."""
    if tensor.dtype not in _TYPE_NAMES:
        raise ValueError(f"parameter {tag}: MindSpore has no name for {tensor.dtype}")
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    dims = b"".join(_varint(1 << 3 | _VARINT) + _varint(size) for size in (tensor.shape or (0,)))
    header = dims + _length_delimited(2, _TYPE_NAMES[tensor.dtype].encode())
    for start in range(0, len(raw), _SLICE_BYTES):
        proto = header + _length_delimited(3, np.ascontiguousarray(raw[start : start + _SLICE_BYTES]).tobytes())
        yield _length_delimited(1, _length_delimited(1, tag.encode()) + _length_delimited(2, proto))


def write(path: str | Path, params: dict[str, Tensor]) -> None:
    """Writes parameters by MindSpore name in the file format of MindSpore's `save_checkpoint`; whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        for tag, tensor in params.items():
            file.writelines(_values(tag, tensor))
    part.replace(path)


# MAE name -> MindFormers name, applied in order; the attention's qkv and the transposes are handled beside it.
_RENAMES = [
    (r"^(cls|mask)_token$", r"\1_tokens"),
    (r"^(blocks\.\d+\.)norm(\d)\.", r"\1layernorm\2."),
    (r"^(decoder_blocks\.\d+\.)norm(\d)\.", r"\1layernorm\2."),
    (r"^norm\.", "layernorm."),
    (r"^decoder_norm\.", "decoder_layernorm."),
    (r"((?:layernorm\d?|fc_norm)\.)weight$", r"\1gamma"),
    (r"((?:layernorm\d?|fc_norm)\.)bias$", r"\1beta"),
    (r"\.attn\.proj\.", ".attention.projection."),
    (r"\.mlp\.fc1\.", ".output.mapping."),
    (r"\.mlp\.fc2\.", ".output.projection."),
]
_BACK_RENAMES = [
    (r"^(cls|mask)_tokens$", r"\1_token"),
    (r"((?:layernorm\d?|fc_norm)\.)gamma$", r"\1weight"),
    (r"((?:layernorm\d?|fc_norm)\.)beta$", r"\1bias"),
    (r"layernorm", "norm"),
    (r"\.attention\.projection\.", ".attn.proj."),
    (r"\.output\.mapping\.", ".mlp.fc1."),
    (r"\.output\.projection\.", ".mlp.fc2."),
]
_TRANSPOSED = re.compile(r"\.(attention\.projection|output\.mapping|output\.projection)\.weight$")


def _rename(name: str, rules: list[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def to_mindspore(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """MAE/timm ViT weights -> MindFormers': qkv split by rows into dense1/2/3, three linear weights transposed."""
    params: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if qkv := re.match(r"(.*)\.attn\.qkv\.(weight|bias)$", name):
            for index, part in enumerate(tensor.chunk(3), start=1):
                params[f"vit.{qkv[1]}.attention.dense{index}.{qkv[2]}"] = part
            continue
        target = _rename(name, _RENAMES)
        target = target if "head" in target else f"vit.{target}"
        params[target] = tensor.T if _TRANSPOSED.search(target) else tensor
    return params


def from_mindspore(params: dict[str, Tensor]) -> dict[str, Tensor]:
    """MindFormers ViT parameters -> MAE/timm names. Optimizer state and counters of a training checkpoint are left out.

    ValueError when nothing in it is called vit.* or head.*, or an attention lacks one of its three projections.
    """
    state: dict[str, Tensor] = {}
    for name, tensor in params.items():
        if not name.startswith(("vit.", "head.")):
            continue
        target = name.removeprefix("vit.")
        if dense := re.match(r"(.*)\.attention\.dense([123])\.(weight|bias)$", target):
            if dense[2] != "1":
                continue  # joined where dense1 is met
            parts = [name.replace(".dense1.", f".dense{index}.") for index in (1, 2, 3)]
            if absent := [part for part in parts if part not in params]:
                raise ValueError(f"no parameter {', '.join(absent)} beside {name}")
            state[f"{dense[1]}.attn.qkv.{dense[3]}"] = torch.cat([params[part] for part in parts])
            continue
        value = tensor.T.contiguous() if _TRANSPOSED.search(target) else tensor
        state[_rename(target, _BACK_RENAMES)] = value
    if not state:
        raise ValueError(f"no parameter is called vit.* or head.*; the first names are {', '.join(list(params)[:3])}")
    return state
