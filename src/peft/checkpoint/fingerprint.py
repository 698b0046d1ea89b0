"""Is this the base model that the adapter was made for? A few numbers of each adapted tensor, in the file's header.

Of every adapted base tensor (of `MAX_TENSORS` spread over them, in large models) the fingerprint keeps the shape,
whether it is quantised, and a few elements at fixed places: one small gather per tensor, 100 bytes in the header.
Equal models agree after a cast between float32, bfloat16 and float16; other weights, a fine-tune of the same model
included, differ somewhere. A quantised model keeps no values to compare: it is known by its names and shapes.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peft.checkpoint import strict_json
from peft.errors import CorruptFileError

METADATA_KEY = "peft_base_fingerprint"
"""The key of `encode(…)` in the metadata of a safetensors header."""

VERSION = 1
MAX_TENSORS = 256
SAMPLES = 8  # of each tensor, fewer where they would be more than MAX_SAMPLES in all
MAX_SAMPLES = 1024
MAX_BYTES = 1 << 20
_RELATIVE = 2.0**-8  # twice what bfloat16 rounds by, so that casts of one tensor agree whichever way it went
_ABSOLUTE = 2.0**-24  # the step of float16 near zero
_GOLDEN = 0x9E3779B97F4A7C15

FLOAT, QUANTIZED, UNREAD = "float", "quantized", "unread"


@dataclass(frozen=True)
class Difference:
    """One tensor that is not as the fingerprint says.

    `what` is `"missing"`, `"shape"`, `"values"` or `"precision"`. The last (quantised here and not there, say) is no
    sign of another model, and `harmless`: QLoRA adapters are served on 16-bit bases every day.
    """

    name: str
    what: str
    saved: Any
    current: Any

    @property
    def harmless(self) -> bool:
        return self.what == "precision"

    def __str__(self) -> str:
        if self.what == "missing":
            return f"{self.name}: not in this model"
        if self.what == "values":
            pair = next(pair for pair in zip(self.saved, self.current, strict=False) if not _close(*pair))
            return f"{self.name}: other values ({pair[0]:.4g} when saved, {pair[1]:.4g} here)"
        return f"{self.name}: {self.what} {self.saved} when saved, {self.current} here"


def sketch(
    tensors: Mapping[str, Tensor | None],
    shapes: Mapping[str, Sequence[int]],
    *,
    only: Iterable[str] | None = None,
) -> dict[str, Any]:
    """Take the fingerprint of base tensors.

    Args:
        tensors: Names to tensors; None where the values can't be had (offloaded, sharded). Meta tensors, and subclasses
            such as DTensor, are not read either; integer and 8-bit float tensors count as quantised.
        shapes: The logical shape of each tensor, which a packed tensor does not show. Names left out have their own.
        only: Look at these names, and no others (`names(saved)`, to compare); by default at `MAX_TENSORS` of all.

    Returns:
        Plain data, to be stored by `encode` and compared by `compare`.

    Example:
        >>> base = {"q_proj.weight": torch.arange(64.0).view(8, 8)}
        >>> saved = sketch(base, {})
        >>> compare(saved, sketch({"q_proj.weight": base["q_proj.weight"].bfloat16()}, {}))
        []
        >>> print(*compare(saved, sketch({"q_proj.weight": torch.ones(8, 8)}, {})))
        q_proj.weight: other values (39 when saved, 1 here)
    """
    chosen = _spread(sorted(tensors)) if only is None else [name for name in only if name in tensors]
    kinds = {name: _kind(tensors[name]) for name in chosen}
    samples = _sample({name: tensors[name] for name in chosen if kinds[name] == FLOAT})  # type: ignore[misc]
    entries = {}
    for name in chosen:
        shape = shapes.get(name, getattr(tensors[name], "shape", ()))
        entries[name] = [[int(n) for n in shape], kinds[name], samples.get(name)]
    return {"version": VERSION, "count": len(tensors), "tensors": entries}


def names(saved: Mapping[str, Any]) -> list[str]:
    """The tensors that a fingerprint speaks of."""
    return list(saved["tensors"])


def compare(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[Difference]:
    """What differs between the base that an adapter was saved with and this one, in the order of the file.

    An empty list, or one of `harmless` differences only, says that they may be the same; a difference in values or
    shapes says that they are not. Tensors whose values one side does not know are compared by shape.
    """
    found = []
    for name, (shape, kind, values) in saved["tensors"].items():
        if name not in current["tensors"]:
            found.append(Difference(name, "missing", shape, None))
            continue
        shape_now, kind_now, values_now = current["tensors"][name]
        if shape != shape_now and shape and shape_now:
            found.append(Difference(name, "shape", tuple(shape), tuple(shape_now)))
        elif values and values_now and not all(map(_close, values, values_now)):
            found.append(Difference(name, "values", values, values_now))
        elif kind != kind_now and UNREAD not in (kind, kind_now):
            found.append(Difference(name, "precision", kind, kind_now))
    return found


def explain(differences: Sequence[Difference], limit: int = 3) -> str:
    """A few lines for an error message; empty when nothing but harmless differences is there."""
    serious = [difference for difference in differences if not difference.harmless]
    if not serious:
        return ""
    lines = [f"  {difference}" for difference in serious[:limit]]
    more = [f"  … and {len(serious) - limit} more"] if len(serious) > limit else []
    head = f"{len(serious)} of the base tensors are not those that the adapter was trained on:"
    return "\n".join([head, *lines, *more])


def encode(fingerprint: Mapping[str, Any]) -> str:
    """One string, for the metadata of a safetensors header under `METADATA_KEY`."""
    return json.dumps(fingerprint, separators=(",", ":"), allow_nan=False)


def decode(text: str | None, source: str = "the file") -> dict[str, Any] | None:
    """Read a stored fingerprint; None if there is none, or a later version wrote it.

    Raises:
        CorruptFileError: it is damaged.
    """
    if text is None:
        return None
    if len(text) > MAX_BYTES:
        raise CorruptFileError(f"The base fingerprint in {source} has {len(text)} characters; {MAX_BYTES} are allowed.")
    document = strict_json.loads(text.encode("utf-8", "replace"), f"{source} ({METADATA_KEY})")
    if document.get("version") != VERSION:
        return None
    entries = document.get("tensors")
    if not isinstance(entries, dict) or not all(map(_is_entry, entries.values())):
        raise CorruptFileError(f"The base fingerprint in {source} is damaged. Save the adapter again.")
    return document


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, list) or len(entry) != 3:
        return False
    shape, kind, values = entry
    return (
        isinstance(shape, list)
        and all(type(n) is int for n in shape)
        and kind in (FLOAT, QUANTIZED, UNREAD)
        and (values is None or isinstance(values, list))
        and all(v is None or (type(v) in (int, float) and abs(v) < 1e39) for v in values or ())
    )


def _close(saved: float | None, current: float | None) -> bool:
    if saved is None or current is None:  # not finite on one side: float16 overflows where the others do not
        return True
    return abs(saved - current) <= _ABSOLUTE + _RELATIVE * max(abs(saved), abs(current))


def _spread(ordered: list[str]) -> list[str]:
    if len(ordered) <= MAX_TENSORS:
        return ordered
    return [ordered[i * len(ordered) // MAX_TENSORS] for i in range(MAX_TENSORS)]


def _kind(tensor: Tensor | None) -> str:
    if tensor is None or tensor.is_meta:
        return UNREAD
    own_floats = type(tensor).dequantize is not Tensor.dequantize  # types of quantisers show the dtype they stand for
    if own_floats or not tensor.is_floating_point() or tensor.element_size() < 2:
        return QUANTIZED
    plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout is torch.strided and tensor.numel()
    return FLOAT if plain else UNREAD


@torch.no_grad()
def _sample(tensors: Mapping[str, Tensor]) -> dict[str, list[float | None]]:
    """The samples of all tensors, brought to the CPU in one transfer per device."""
    count = max(2, min(SAMPLES, MAX_SAMPLES // max(len(tensors), 1)))
    by_device: dict[torch.device, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        tensor = tensor if tensor.ndim else tensor.reshape(1)
        places = _places(tuple(tensor.shape), count, tensor.device)
        by_device.setdefault(tensor.device, {})[name] = tensor[places].float()
    found = {}
    for here in by_device.values():
        rows = torch.stack(list(here.values())).tolist()
        found.update({name: [_rounded(value) for value in row] for name, row in zip(here, rows, strict=True)})
    return found


@functools.lru_cache(maxsize=64)
def _places(shape: tuple[int, ...], count: int, device: torch.device) -> tuple[Tensor, ...]:
    """Indices along each dimension of `count` elements: spread over the tensor, the same for every dtype and layout.

    Fewer are a prefix of more, so that fingerprints of different lengths compare.
    """
    total = math.prod(shape)
    flat = [((i + 1) * _GOLDEN % (1 << 64)) * total >> 64 for i in range(count)]
    return tuple(index.to(device) for index in torch.unravel_index(torch.tensor(flat), shape))


def _rounded(value: float) -> float | None:
    return float(f"{value:.5g}") if math.isfinite(value) else None
