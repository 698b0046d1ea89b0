"""What did not fit when an adapter was loaded, what was probably meant, and why."""

from __future__ import annotations

import difflib
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from peft.errors import LoadError

Shape = tuple[int, ...]

_HEADS = re.compile(r"(^|\.)(score|classifier|lm_head|qa_outputs|summary|v_head|modules_to_save)(\.|$)")
_LAYER = re.compile(r"(?:^|\.)(\d+)(?=\.)")
_SHOWN = 5
_SUGGESTED = 20
_COMPARED = 200
_HINT = "Pass strict=False to load what fits and get this report back."


@dataclass(frozen=True)
class Mismatch:
    """A tensor that is there, but of another shape: what the model `expected` and what the file `found` holds."""

    name: str
    expected: Shape
    found: Shape

    def __str__(self) -> str:
        return f"{self.name}: the model has {list(self.expected)}, the file {list(self.found)}"


@dataclass
class LoadReport:
    """The outcome of loading an adapter. Unpacks, and reads, like the pair that `nn.Module.load_state_dict` returns.

    Attributes:
        missing_keys: Tensors of the adapter that the file does not hold.
        unexpected_keys: Tensors of the file that the adapter has no place for.
        mismatched: Tensors of another shape than the adapter's.
        suggestions: For an unexpected name (20 of them at most), the missing name that it was probably meant for.
        cause: One sentence on what probably went wrong; empty if nothing did, or nothing is known.
        source: The file, for messages.

    Example:
        >>> report = LoadReport.between({"model.layers.0.q.lora_A": (8, 64)}, {"layers.0.q.lora_A": (8, 64)})
        >>> missing, unexpected = report
        >>> report.suggestions
        {'layers.0.q.lora_A': 'model.layers.0.q.lora_A'}
        >>> print(report.cause)
        Modules were renamed: what the model calls 'model.layers…' the file calls 'layers…'.
    """

    missing_keys: list[str] = field(default_factory=list)
    unexpected_keys: list[str] = field(default_factory=list)
    mismatched: list[Mismatch] = field(default_factory=list)
    suggestions: dict[str, str] = field(default_factory=dict)
    cause: str = ""
    source: str = ""

    @classmethod
    def between(
        cls, expected: Mapping[str, Sequence[int]], found: Mapping[str, Sequence[int]], source: str = ""
    ) -> LoadReport:
        """Compare the names and shapes that the model `expected` with those that were `found` in a file."""
        missing = [name for name in expected if name not in found]
        unexpected = [name for name in found if name not in expected]
        mismatched = [
            Mismatch(name, tuple(shape), tuple(found[name]))
            for name, shape in expected.items()
            if name in found and tuple(shape) != tuple(found[name])
        ]
        suggestions = _suggest(missing, unexpected)
        cause = _cause(missing, unexpected, mismatched, suggestions, len(expected), len(found))
        return cls(missing, unexpected, mismatched, suggestions, cause, source)

    @property
    def ok(self) -> bool:
        """Whether every tensor of the file found its place, and every place its tensor."""
        return not (self.missing_keys or self.unexpected_keys or self.mismatched)

    def raise_if_bad(self, strict: bool = True, *, ignore_mismatched_sizes: bool = False) -> None:
        """Raise if the adapter would not be what was saved.

        Args:
            strict: Missing and unexpected tensors are errors.
            ignore_mismatched_sizes: Tensors of another shape are none.

        Raises:
            LoadError: with this report as its message, and as its attribute `report`.
        """
        if (strict and (self.missing_keys or self.unexpected_keys)) or (
            self.mismatched and not ignore_mismatched_sizes
        ):
            error = LoadError(f"{self}\n{_HINT}" if strict and not self.mismatched else str(self))
            error.report = self
            raise error

    def __iter__(self) -> Iterator[list[str]]:
        return iter((self.missing_keys, self.unexpected_keys))

    def __str__(self) -> str:
        where = f" in {self.source!r}" if self.source else ""
        if self.ok:
            return f"All tensors{where} match the model."
        unexpected = [f"{n} → {self.suggestions[n]}?" if n in self.suggestions else n for n in self.unexpected_keys]
        parts = [f"The adapter{where} does not fit the model.", *([self.cause] if self.cause else [])]
        parts += _listed("missing in the file", self.missing_keys)
        parts += _listed("in the file, but not in the model", unexpected)
        parts += _listed("of another shape", [str(item) for item in self.mismatched])
        return "\n".join(parts)


def _listed(title: str, names: Sequence[str]) -> list[str]:
    if not names:
        return []
    more = [f"    … and {len(names) - _SHOWN} more"] if len(names) > _SHOWN else []
    return [f"  {len(names)} {title}:", *(f"    {name}" for name in names[:_SHOWN]), *more]


# ---------------------------------------------------------------- nearest names, by structure


def _address(name: str) -> tuple[str, ...]:
    """What survives a rename: the numbers on the way (layers, experts) and the slot at the end."""
    return (*_LAYER.findall(name), _slot(name))


def _slot(name: str) -> str:
    parts = name.split(".")
    return ".".join(parts[-2:]) if parts[-1] in ("weight", "bias") else parts[-1]


def _suggest(missing: Sequence[str], unexpected: Sequence[str]) -> dict[str, str]:
    by_address: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name in missing:
        by_address[_address(name)].append(name)
    suggestions: dict[str, str] = {}
    for name in unexpected[:_SUGGESTED]:
        nearby = [other for other in by_address[_address(name)][:_COMPARED] if other not in suggestions.values()]
        if best := difflib.get_close_matches(name, nearby or missing[:_COMPARED], n=1, cutoff=0.6):
            suggestions[name] = best[0]
    return suggestions


# ---------------------------------------------------------------- causes, the most telling first


def _cause(
    missing: Sequence[str],
    unexpected: Sequence[str],
    mismatched: Sequence[Mismatch],
    suggestions: Mapping[str, str],
    expected: int,
    found: int,
) -> str:
    if not found and expected:
        return "The file holds no tensor of this adapter at all: it was saved empty, or under another adapter's name."
    return (
        _other_method(missing, unexpected, expected)
        or _other_head(missing, unexpected, mismatched)
        or _other_depth(missing, unexpected)
        or _renamed(suggestions, unexpected)
        or _other_sizes(mismatched)
        or _other_targets(missing, unexpected, mismatched)
    )


def _kinds(names: Sequence[str]) -> list[str]:
    return sorted({_slot(name).removesuffix(".weight").removesuffix(".bias") for name in names})


def _other_method(missing: Sequence[str], unexpected: Sequence[str], expected: int) -> str:
    ours, theirs = _kinds(missing), _kinds(unexpected)
    if len(missing) < expected or not (ours and theirs) or set(ours) & set(theirs):
        return ""
    return (
        f"The file was written by another method: it holds {', '.join(theirs[:4])}, and the config asks for "
        f"{', '.join(ours[:4])}. Load it with the config it was saved with."
    )


def _other_head(missing: Sequence[str], unexpected: Sequence[str], mismatched: Sequence[Mismatch]) -> str:
    names = [*missing, *unexpected, *(item.name for item in mismatched)]
    if not names or not all(map(_HEADS.search, names)):
        return ""
    if mismatched:
        return (
            "The head has another size: set the same num_labels (or vocabulary) as in training when loading the base."
        )
    return "Only the head differs: the adapter was trained on a model class with another task head."


def _other_depth(missing: Sequence[str], unexpected: Sequence[str]) -> str:
    names = missing or unexpected
    layers = {int(found.group(1)) for name in names if (found := _LAYER.search(name))}
    if (missing and unexpected) or not layers or not all(map(_LAYER.search, names)):
        return ""
    run = sorted(layers)
    if run[0] == 0 or run != list(range(run[0], run[-1] + 1)):
        return ""
    has, lacks = ("file", "model") if unexpected else ("model", "file")
    return (
        f"The {lacks} ends at layer {run[0] - 1} and the {has} goes on to layer {run[-1]}: the adapter belongs to a "
        "base model of another depth, or to another layers_to_transform."
    )


def _renamed(suggestions: Mapping[str, str], unexpected: Sequence[str]) -> str:
    changes = Counter(_change(theirs, ours) for theirs, ours in suggestions.items())
    if not changes:
        return ""
    (theirs, ours), count = changes.most_common(1)[0]
    if count * 2 < min(len(unexpected), _SUGGESTED):
        return ""
    return f"Modules were renamed: what the model calls {ours!r} the file calls {theirs!r}."


def _change(theirs: str, ours: str) -> tuple[str, str]:
    """The shortest pair of dotted parts that turns one name into the other; '…' where the names agree again."""
    left, right = theirs.split("."), ours.split(".")
    while left and right and left[0] == right[0]:
        left, right = left[1:], right[1:]
    shared = ""
    while left and right and left[-1] == right[-1]:
        shared = left[-1]
        left, right = left[:-1], right[:-1]
    if left and right:
        return ".".join(left), ".".join(right)
    return ".".join([*left, shared]) + "…", ".".join([*right, shared]) + "…"


def _other_sizes(mismatched: Sequence[Mismatch]) -> str:
    changes: Counter[tuple[int, int]] = Counter()
    for item in mismatched:
        if len(item.expected) != len(item.found):
            return "Tensors have another number of dimensions: the adapter belongs to another kind of layer."
        changes.update({pair for pair in zip(item.expected, item.found, strict=True) if pair[0] != pair[1]})
    if not changes:
        return ""
    ours, theirs = changes.most_common(1)[0][0]
    if len(changes) == 1 and all(map(_differs_in_rank, mismatched)):
        return f"The adapter was saved with rank (or size) {theirs}, and the config here asks for {ours}."
    return (
        f"The adapter was made for another base model: it expects layers of size {theirs}, and here they have {ours}."
    )


def _differs_in_rank(item: Mismatch) -> bool:
    """Whether the two differ in their smaller side only: a rank is smaller than the layer around it."""
    differing = [i for i, (ours, theirs) in enumerate(zip(item.expected, item.found, strict=True)) if ours != theirs]
    sides = (item.expected, item.found)
    return len(item.expected) > 1 and len(differing) == 1 and all(s[differing[0]] == min(s) for s in sides)


def _other_targets(missing: Sequence[str], unexpected: Sequence[str], mismatched: Sequence[Mismatch]) -> str:
    if unexpected and not missing and not mismatched:
        return "The file adapts modules that this config does not: other target_modules, or a part of the base is gone."
    if missing and not unexpected and not mismatched:
        return "The config adapts modules that the file does not hold: other target_modules, or the file is incomplete."
    return ""
