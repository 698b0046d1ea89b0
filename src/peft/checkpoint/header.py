"""What a `.safetensors` file says it holds: names, dtypes, shapes, metadata. Reads no tensor, imports no torch.

The layout (https://huggingface.co/docs/safetensors): 8 bytes, little endian, the size n of the header; n bytes of JSON
`{name: {"dtype", "shape", "data_offsets"}, "__metadata__": {str: str}}`; the data. Everything is checked against the
size of the file before anything is allocated.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peft.checkpoint import strict_json
from peft.errors import AdapterNotFoundError, CorruptFileError

MAX_HEADER_BYTES = 16 << 20  # 100,000 tensors with long names
MAX_DIMENSIONS = 16
MAX_NAME = 1024
METADATA = "__metadata__"

ITEM_BYTES: Mapping[str, int] = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2", "F8_E5M2FNUZ"), 1),
}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor in a file: `dtype` as safetensors spells it; `start`, `end` in bytes from where the data begins."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Header:
    """What a file holds, in the order of its data; `nbytes` is the size of all tensors together."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    nbytes: int

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: info.shape for name, info in self.tensors.items()}


def read(path: str | os.PathLike) -> Header:
    """Read and check the header of a `.safetensors` file.

    Raises:
        AdapterNotFoundError: no such file.
        CorruptFileError: not a regular file, cut off, damaged or hostile; names the file, the fault and the remedy.
    """
    size = regular_size(path)
    with open(path, "rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise corrupt(path, f"it ends after {len(start)} bytes, before its header")
        n = int.from_bytes(start, "little")
        if n > MAX_HEADER_BYTES or 8 + n > size:
            raise corrupt(path, _not_a_header(start + file.read(56), n, size))
        raw = file.read(n)
    if raw[:1] != b"{":
        raise corrupt(path, "its header does not begin with '{'")
    return _check(strict_json.loads(raw, path), size - 8 - n, path)


def regular_size(path: str | os.PathLike) -> int:
    """Bytes of a regular file; pipes, devices and folders are refused, for reading them may never end."""
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        raise AdapterNotFoundError(f"There is no file {os.fspath(path)!r}.") from None
    if not stat.S_ISREG(status.st_mode):
        raise corrupt(path, "it is not a regular file")
    return status.st_size


def corrupt(path: str | os.PathLike, fault: str) -> CorruptFileError:
    """The error for a damaged weights file."""
    return CorruptFileError(
        f"{os.fspath(path)!r} can't be used: {fault}. Nothing was read from it; "
        "fetch it again from where it came from, or save the adapter again."
    )


def check_name(name: str) -> str | None:
    """Why `name` can't be the name of a tensor, or None. It is dotted, and no part may be empty or climb a path."""
    if not name or len(name) > MAX_NAME:
        return f"a tensor name has {len(name)} characters (1 to {MAX_NAME} are allowed)"
    if not name.isprintable():
        return f"the tensor name {name!r} holds control characters"
    if "" in name.split(".") or name[0] in "/\\":
        return f"the tensor name {name!r} has an empty part or begins like a path"
    return None


def _not_a_header(beginning: bytes, n: int, size: int) -> str:
    if beginning.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the weights (run `git lfs pull` in its repository)"
    if beginning.startswith((b"PK\x03\x04", b"\x80")):
        return "it is a pickled PyTorch file under a .safetensors name (name it .bin)"
    if n > MAX_HEADER_BYTES:
        return f"its header claims {n} bytes, and {MAX_HEADER_BYTES} are allowed"
    return f"its header claims {n} bytes, but the file has {size}: it was cut off"


def _check(document: dict[str, Any], data_bytes: int, path: str | os.PathLike) -> Header:
    metadata = document.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise corrupt(path, "its metadata is not an object of strings")
    tensors = {name: _tensor(name, entry, data_bytes, path) for name, entry in document.items()}
    tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)))
    position = 0
    for name, info in tensors.items():
        if info.start != position:
            raise corrupt(path, f"the data of {name!r} begins at {info.start} where {position} is due (overlap or gap)")
        position = info.end
    if position != data_bytes:
        cut = "it was cut off" if position > data_bytes else "something was appended"
        raise corrupt(path, f"its header promises {position} bytes of data and {data_bytes} are there: {cut}")
    return Header(tensors, metadata, position)


def _tensor(name: str, entry: Any, data_bytes: int, path: str | os.PathLike) -> TensorInfo:
    if fault := check_name(name):
        raise corrupt(path, fault)
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise corrupt(path, f"the entry of {name!r} is not {{dtype, shape, data_offsets}}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise corrupt(path, f"{name!r} has the unknown dtype {str(dtype)[:40]!r}")
    if not _naturals(shape) or len(shape) > MAX_DIMENSIONS:
        raise corrupt(path, f"the shape of {name!r} is not a list of at most {MAX_DIMENSIONS} sizes")
    if not _naturals(offsets) or len(offsets) != 2:
        raise corrupt(path, f"the offsets of {name!r} are not two positions")
    start, end = offsets
    needed = ITEM_BYTES[dtype]
    for length in shape:
        needed *= length
    if max(*shape, end, 0) >= 1 << 63:
        raise corrupt(path, f"the sizes of {name!r} do not fit 64 bits")
    if end - start != needed:
        raise corrupt(path, f"{name!r}, {dtype} {shape}, needs {needed} bytes and is given {end - start}")
    return TensorInfo(dtype, tuple(shape), start, end)


def _naturals(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)
