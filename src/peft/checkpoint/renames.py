"""Files whose names are those of another release of the base model's code: modules renamed. See `fused` for more.

What is renamed is found by structure, never from a list of releases: a path without its `model` parts, or from its
first numbered part on, together with the shape. It is done only if it is unambiguous and leaves nothing over.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping

from peft.checkpoint.keys import BASE_PREFIX

Shapes = Mapping[str, tuple[int, ...]]


def renamed(missing: Shapes, unexpected: Shapes) -> dict[str, str] | None:
    """Names of a file to names of the model, if there is just one way to pair all of both.

    >>> renamed({"model.language_model.layers.0.q.lora_A": (2, 4)}, {"language_model.model.layers.0.q.lora_A": (2, 4)})
    {'language_model.model.layers.0.q.lora_A': 'model.language_model.layers.0.q.lora_A'}
    """
    if not missing or len(missing) != len(unexpected):
        return None
    for address in (_without_model, _from_first_number):
        pairs = _pair(missing, unexpected, address)
        if pairs is not None:
            return pairs
    return None


def _pair(missing: Shapes, unexpected: Shapes, address: Callable[[str], str]) -> dict[str, str] | None:
    places: dict[tuple[str, tuple[int, ...]], list[str]] = defaultdict(list)
    for name, shape in missing.items():
        places[address(name), tuple(shape)].append(name)
    pairs = {}
    for name, shape in unexpected.items():
        found = places.get((address(name), tuple(shape)), [])
        if len(found) != 1 or not address(name):
            return None
        pairs[name] = found[0]
    return pairs if len(set(pairs.values())) == len(pairs) else None


def _without_model(name: str) -> str:
    return ".".join(part for part in name.removeprefix(BASE_PREFIX).split(".") if part != "model")


def _from_first_number(name: str) -> str:
    parts = name.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return "" if not first else ".".join(parts[first - 1 :])
