"""JSON from strangers: one meaning per document, and no more memory or stack than its size allows."""

from __future__ import annotations

import json
import math
import os
from typing import Any

from peft.errors import CorruptFileError

MAX_DEPTH = 32


def loads(raw: bytes, source: str | os.PathLike) -> dict[str, Any]:
    """Parse a JSON object of which every reader has the same opinion.

    Refused, besides broken JSON: text that is not UTF-8, a top level that is not an object, a key given twice, NaN and
    Infinity (also spelled 1e999), lone surrogates, and nesting deeper than `MAX_DEPTH`.

    Args:
        raw: The document. The caller bounds its length before reading it.
        source: Named in errors.

    Raises:
        CorruptFileError: always with `source`, what is wrong, and what to do.

    Example:
        >>> loads(b'{"r": 8}', "adapter_config.json")
        {'r': 8}
    """
    try:
        document = json.loads(
            raw.decode("utf-8-sig"),
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
            parse_float=_finite,
        )
        _walk(document)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise CorruptFileError(
            f"{os.fspath(source)!r} does not hold valid JSON: {reason}. Save the adapter or fetch the file again."
        ) from None
    if not isinstance(document, dict):
        raise CorruptFileError(
            f"{os.fspath(source)!r} holds a JSON {type(document).__name__} where an object ({{…}}) belongs. "
            "Check that it is the file you meant."
        )
    return document


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {twice!r} is given twice")
    return result


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:40]} is out of range")
    return value


def _walk(document: Any) -> None:
    level, depth = [document], 0
    while level:
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")
        below: list[Any] = []
        for item in level:
            if isinstance(item, str):
                item.encode()  # a lone surrogate is a UnicodeEncodeError, which is a ValueError
            elif isinstance(item, dict):
                below += item.keys()
                below += item.values()
            elif isinstance(item, list):
                below += item
        level, depth = below, depth + 1
