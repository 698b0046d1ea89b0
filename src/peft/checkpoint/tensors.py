"""Weights to bytes and back: safetensors, pickles of plain tensors, and folders of shards."""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import safetensors
import torch
from torch import Tensor

from peft.checkpoint import files
from peft.checkpoint import header as headers
from peft.checkpoint.header import Header, corrupt
from peft.errors import CorruptFileError, SaveError

CHECKSUM_KEY = "peft.crc32"
"""Entry of a file's metadata: the CRC-32 of names, dtypes and shapes in the order of the data, and of the data.

Whoever rewrites the same tensors and keeps the metadata, keeps it right.
"""

_NO_SUM = "0" * 8
_PLAIN = (Tensor, torch.nn.Parameter)
_DTYPES: Mapping[str, str] = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "C64": "complex64",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
}
_DTYPE_NAMES = {getattr(torch, name): key for key, name in _DTYPES.items()}


def header(path: str | os.PathLike) -> Header:
    """Names, shapes, dtypes and metadata of a `.safetensors` file; see `peft.checkpoint.header.read`."""
    return headers.read(path)


def read(
    path: str | os.PathLike, *, device: str | int | torch.device | None = None, limit_bytes: int | None = None
) -> dict[str, Tensor]:
    """Read all tensors of a weights file.

    Args:
        path: A `.safetensors` file, a `.bin` / `.pt` / `.pth` pickle of plain tensors, or the `….index.json` of a
            sharded checkpoint, whose shards lie in the same folder.
        device: Where the tensors go (default: CPU, mapped from the file and paged in as they are touched).
        limit_bytes: Refuse files whose tensors take more than this. By default the size of the file is the limit, which
            it always is: nothing in a file can make reading take more memory than the file takes on disk.

    Raises:
        AdapterNotFoundError: no such file, or a shard is missing.
        CorruptFileError: damaged, hostile, or not a file of plain tensors.

    Example:
        >>> import torch
        >>> with open("/tmp/peft-doc.safetensors", "wb") as file:
        ...     encode({"lora_A.weight": torch.ones(2, 3)}).write(file)
        >>> read("/tmp/peft-doc.safetensors")["lora_A.weight"].shape
        torch.Size([2, 3])
    """
    path = Path(path)
    target = torch.device("cpu" if device is None else device)
    if path.name.endswith(".index.json"):
        return _read_shards(path, target, limit_bytes)
    if path.suffix == ".safetensors":
        return _read_safetensors(path, target, limit_bytes)
    if path.suffix in (".bin", ".pt", ".pth"):
        return _read_pickle(path, target, limit_bytes)
    raise CorruptFileError(f"{str(path)!r} is no weights file: .safetensors, .bin, .pt or .index.json is read.")


def _read_safetensors(path: Path, device: torch.device, limit_bytes: int | None) -> dict[str, Tensor]:
    checked = headers.read(path)
    _limit(path, checked.nbytes, limit_bytes)
    if CHECKSUM_KEY in checked.metadata:
        _check_sum(path, checked)
    try:
        with safetensors.safe_open(path, framework="pt", device=str(device)) as file:
            return {name: file.get_tensor(name) for name in checked.tensors}
    except (safetensors.SafetensorError, AttributeError) as error:  # a dtype that this torch does not have
        raise corrupt(path, str(error)) from error


def _check_sum(path: Path, checked: Header) -> None:
    total = _sum_of_names((name, info.dtype, info.shape) for name, info in checked.tensors.items())
    with open(path, "rb") as file:
        file.seek(-checked.nbytes, os.SEEK_END)
        while chunk := file.read(1 << 20):
            total = zlib.crc32(chunk, total)
    if f"{total:08x}" != checked.metadata[CHECKSUM_KEY]:
        raise corrupt(
            path,
            "its tensors are not those that were written (checksum). If it was edited on purpose, write it without "
            f"the metadata entry {CHECKSUM_KEY!r}",
        )


def _sum_of_names(entries: Iterable[tuple[str, str, Sequence[int]]]) -> int:
    total = 0
    for name, dtype, shape in entries:
        total = zlib.crc32(f"{name} {dtype} {list(shape)}\n".encode(), total)
    return total


def _read_pickle(path: Path, device: torch.device, limit_bytes: int | None) -> dict[str, Tensor]:
    size = headers.regular_size(path)
    try:
        zipped = zipfile.is_zipfile(path)
    except zipfile.BadZipFile as error:
        raise corrupt(path, f"it is a damaged archive ({error})") from None
    if zipped:
        _refuse_compression(path)
    _limit(path, size, limit_bytes)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped or None)
    except Exception as error:  # the unpickler runs what the file says, so anything can come out of a damaged one
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise corrupt(path, f"PyTorch can't load it as plain tensors ({first[:200]})") from None
    if not isinstance(loaded, dict):
        raise corrupt(path, f"it holds a {type(loaded).__name__}, not a dict of tensors")
    storages: dict[int, int] = {}
    for name, value in loaded.items():
        if fault := (headers.check_name(name) if isinstance(name, str) else f"the key {name!r} is not a string"):
            raise corrupt(path, fault)
        if fault := _not_plain(value):
            raise corrupt(path, f"{name!r} {fault}")
        storage = value.untyped_storage()
        if value.numel() * value.element_size() > storage.nbytes():
            raise corrupt(path, f"{name!r} repeats its bytes by its strides")
        storages[storage.data_ptr()] = storage.nbytes()
    if sum(storages.values()) > size:
        raise corrupt(path, f"its tensors take {sum(storages.values())} bytes and the file has {size}")
    return {name: value.detach().to(device) for name, value in loaded.items()}


def _refuse_compression(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            compressed = any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise corrupt(path, f"it is a damaged archive ({error})") from None
    if compressed:
        raise corrupt(path, "it is a compressed archive, which PyTorch never writes")


def _not_plain(value: object) -> str | None:
    if type(value) not in _PLAIN or not isinstance(value, Tensor):
        return f"is a {type(value).__name__}, not a plain tensor"
    if value.layout is not torch.strided or value.is_quantized or value.is_meta:
        return "is a sparse, quantised or meta tensor, not a plain one"
    return None


def _read_shards(path: Path, device: torch.device, limit_bytes: int | None) -> dict[str, Tensor]:
    where = files.shard_map(path)
    shards = sorted(set(where.values()))
    _limit(path, sum(headers.regular_size(path.parent / shard) for shard in shards), limit_bytes)
    found: dict[str, Tensor] = {}
    for shard in shards:
        part = read(path.parent / shard, device=device)
        promised = {name for name, home in where.items() if home == shard}
        if part.keys() != promised:
            wrong = sorted(part.keys() ^ promised)[0]
            raise corrupt(path, f"it and its shard {shard!r} disagree about the tensor {wrong!r}")
        found |= part
    return {name: found[name] for name in where}


def _limit(path: Path, nbytes: int, limit_bytes: int | None) -> None:
    if limit_bytes is not None and nbytes > limit_bytes:
        raise CorruptFileError(
            f"{str(path)!r} holds {nbytes:,} bytes of tensors and {limit_bytes:,} are expected at most. "
            "Raise limit_bytes if the file is trusted."
        )


@dataclass(frozen=True)
class Payload:
    """Checked tensors on their way into a file. `write` streams one tensor at a time, from any device.

    `nbytes` is the exact size of the file (for pickles, of the tensors in it), known before anything is written.
    """

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    pickled: bool = False
    _head: bytes = field(default=b"", repr=False)

    @property
    def nbytes(self) -> int:
        return len(self._head) + sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    def write(self, file: IO[bytes]) -> None:
        if self.pickled:
            torch.save({name: _on_cpu(tensor).clone() for name, tensor in self.tensors.items()}, file)
            return
        start = file.tell() if CHECKSUM_KEY in self.metadata else 0
        file.write(self._head)
        total = _sum_of_names((name, _DTYPE_NAMES[t.dtype], t.shape) for name, t in self.tensors.items())
        for tensor in self.tensors.values():
            if tensor.numel():
                part = _on_cpu(tensor).reshape(-1).view(torch.uint8).numpy().data
                file.write(part)
                if CHECKSUM_KEY in self.metadata:
                    total = zlib.crc32(part, total)
        if CHECKSUM_KEY in self.metadata:
            file.seek(start + self._head.index(f'"{CHECKSUM_KEY}":"{_NO_SUM}"'.encode()) + len(CHECKSUM_KEY) + 4)
            file.write(f"{total:08x}".encode())
            file.seek(0, os.SEEK_END)


def encode(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    pickled: bool = False,
    allow_empty: Collection[str] = (),
    checksum: bool = False,
) -> Payload:
    """Check tensors and lay out the file that will hold them. Hand the result to `files.save`.

    Tensors that share memory or are not contiguous are written out in full, each on its own. Nothing is copied before
    `Payload.write`, so `encode(...).nbytes` announces the size of a file for free (on meta tensors too).

    Args:
        tensors: Dotted names to plain tensors of any device.
        metadata: Strings for the safetensors header; `{"format": "pt"}` is added. Pickles hold none.
        pickled: Write the older `.bin` format.
        allow_empty: Names that may have no elements (an AdaLoRA layer pruned to rank 0, say).
        checksum: Put one into the metadata, which `read` checks; the file it is written to must be seekable.

    Raises:
        SaveError: a tensor that no file can hold, with the way to get one that it can.

    Example:
        >>> import torch
        >>> encode({"lora_A.weight": torch.ones(2, 3)}).nbytes
        136
    """
    for name, tensor in tensors.items():
        if fault := headers.check_name(name) or _unsavable(name, tensor, name in allow_empty):
            raise SaveError(f"The adapter was not saved: {fault}")
    if pickled:
        return Payload(dict(tensors), {}, pickled=True)
    if not all(isinstance(text, str) for pair in (metadata or {}).items() for text in pair):
        raise SaveError("The adapter was not saved: safetensors metadata maps strings to strings.")
    ordered = dict(sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])))
    metadata = {"format": "pt", **(metadata or {})}
    metadata.pop(CHECKSUM_KEY, None)  # that of the file it was read from
    if checksum:
        metadata[CHECKSUM_KEY] = _NO_SUM
    entries: dict[str, object] = {headers.METADATA: metadata}
    position = 0
    for name, tensor in ordered.items():
        end = position + tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    head = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    head += b" " * (-len(head) % 8)
    if len(head) > headers.MAX_HEADER_BYTES:
        raise SaveError(f"The adapter was not saved: its header takes {len(head)} bytes; shorten the metadata.")
    return Payload(ordered, metadata, _head=len(head).to_bytes(8, "little") + head)


def _unsavable(name: str, tensor: Tensor, may_be_empty: bool) -> str | None:
    if type(tensor) not in _PLAIN:
        return (
            f"{name!r} is a {type(tensor).__name__}; give a plain tensor (a sharded one with `.full_tensor()`, a "
            "quantised one with `.dequantize()`)."
        )
    if fault := _not_plain(tensor) if not tensor.is_meta else None:
        return f"{name!r} {fault}."
    if tensor.numel() == 0 and not may_be_empty:
        return (
            f"{name!r} has no elements (shape {tuple(tensor.shape)}). Under FSDP or DeepSpeed ZeRO-3 this process "
            "holds only its shard: gather first (accelerator.get_state_dict(model), FSDP.state_dict_type(…, "
            "FULL_STATE_DICT), deepspeed.zero.GatheredParameters) and pass the result as `state_dict=`."
        )
    if tensor.dtype not in _DTYPE_NAMES:
        return f"{name!r} has dtype {tensor.dtype}, which safetensors can't hold; cast it first."
    return None


def _on_cpu(tensor: Tensor) -> Tensor:
    if tensor.is_meta:
        raise SaveError("The adapter was not saved: a tensor is on the meta device and has no values; load it first.")
    return tensor.detach().to("cpu").resolve_conj().resolve_neg().contiguous()
