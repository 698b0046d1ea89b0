"""Regular expressions from strangers, matched in bounded time.

Configs carry regexes (`target_modules`, `rank_pattern`, …), and the `re` module backtracks: `(a+)+$` on thirty letters
takes minutes, and nothing in Python can interrupt it. So the ways in which a pattern could match a name are counted
first. Few ways, as for nearly all patterns that people write: `re` does it. Many: the set of all positions that each
part of the pattern can reach is followed instead, as bits of one integer (Navarro & Raffinot 2002; the closed form for
`[class]*` is Parabix's MatchStar). That never backtracks; it knows all of `re` but back-references, conditionals,
atomic and possessive parts, flags inside a group, and flags other than (?i), (?s), (?x). Both say the same of every
name.
"""

from __future__ import annotations

import functools
import importlib
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from peft.errors import ConfigError

T = TypeVar("T")

MAX_PATTERN = 20_000
MAX_WAYS = 20_000  # with names of MAX_FAST letters: a few milliseconds of `re` at the very worst
MAX_FAST = 128
MAX_STEPS = 20_000  # a few milliseconds too

_parser: Any = importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")
_UNLIMITED: int = _parser.MAXREPEAT
_FLAGS = re.UNICODE | re.IGNORECASE | re.DOTALL | re.VERBOSE


def check(pattern: str, *, where: str = "The pattern") -> None:
    """Raise unless `pattern` is a regex that `fullmatch` can decide.

    Args:
        pattern: A regex in the syntax of `re`.
        where: What the error names, such as `"LoraConfig.target_modules"`.

    Raises:
        ConfigError: not a regex, or one that only unbounded backtracking could match.
    """
    try:
        known = _compile(pattern)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    if known.quick is None and isinstance(known.steady, str):
        raise ConfigError(f"{where}: {_too_dear(pattern, known.steady)}")


def fullmatch(pattern: str, text: str, where: str = "The pattern") -> bool:
    r"""Whether all of `text` matches, as `re.fullmatch(pattern, text) is not None`, but always within milliseconds.

    Raises:
        ConfigError: as `check`; also when deciding takes more than `MAX_STEPS` (repeats nested five deep, say).

    Example:
        >>> fullmatch(r".*\.(q|v)_proj", "layers.0.q_proj")
        True
        >>> fullmatch(r"(a+)+b", "a" * 200)
        False
    """
    try:
        known = _compile(pattern)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    if known.quick is not None and len(text) <= MAX_FAST:
        return known.quick.fullmatch(text) is not None
    if isinstance(known.steady, str):
        raise ConfigError(f"{where}: {_too_dear(pattern, known.steady)}")
    try:
        return bool(known.steady(_Run(text), 1) >> len(text))
    except _OutOfSteps:
        raise ConfigError(f"{where}: {_too_dear(pattern, 'repeats nested so deeply')}") from None


def matching(table: Iterable[str], path: str) -> str | None:
    r"""The first key of a `rank_pattern` or `alpha_pattern` that matches a path, or all of it that follows some dot.

    Example:
        >>> matching({r"layers\.0\..*": 4, "q_proj": 8}, "model.layers.1.q_proj")
        'q_proj'
    """
    return next((key for key in table if fullmatch(rf"(?:.*\.)?(?:{key})$", path, repr(key))), None)


def lookup(table: Mapping[str, T] | None, path: str, default: T) -> T:
    """What a `rank_pattern` or `alpha_pattern` says of a module; `default` where no key of it matches."""
    key = matching(table or (), path)
    return default if table is None or key is None else table[key]


def compiled(pattern: str, where: str = "The pattern") -> re.Pattern[str]:
    """A compiled regex for `match`, `search` and `sub`, which only `re` can do.

    Raises:
        ConfigError: not a regex, or one that could backtrack too much on a name of `MAX_FAST` letters.
    """
    check(pattern, where=where)
    if (quick := _compile(pattern).quick) is None:
        raise ConfigError(f"{where}: {_too_dear(pattern, 'too many ways to match')}")
    return quick


def _too_dear(pattern: str, reason: str) -> str:
    return (
        f"the regex {pattern[:200]!r} has {reason}, which can't be matched in bounded time. "
        "Simplify it, or list the names instead."
    )


@dataclass(frozen=True)
class _Compiled:
    quick: re.Pattern[str] | None  # None where it may backtrack too much
    steady: _Step | str  # or what the steady matcher does not know


@functools.lru_cache(maxsize=4096)
def _compile(pattern: str) -> _Compiled:
    if len(pattern) > MAX_PATTERN:
        raise ConfigError(
            f"a regex of {len(pattern)} characters is refused ({MAX_PATTERN} are allowed); list the names."
        )
    try:
        tree = _parser.parse(pattern)
        flags = tree.state.flags
        try:
            steady: _Step | str = "inline flags" if flags & ~_FLAGS else _sequence(tree, flags)
        except _UnknownError as error:
            steady = str(error)
        quick = re.compile(pattern) if _ways(tree) <= MAX_WAYS else None
    except (re.error, OverflowError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ConfigError(f"{pattern[:200]!r} is not a regular expression: {reason}.") from None
    return _Compiled(quick, steady)


# ---------------------------------------------------------------- counting the ways


def _ways(items: Sequence[tuple[Any, Any]]) -> float:
    """An upper bound of the ways to lay a pattern along MAX_FAST letters, and so of the branches of backtracking."""
    total = 1.0
    for op, value in items:
        total = min(total * _item_ways(str(op), value), 1e18)
    return total


def _item_ways(op: str, value: Any) -> float:
    if op in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
        low, high, body = value
        inner, (width, _) = _ways(body), body.getwidth()
        if width == 0 and high > 1:
            return 1e18  # what matches nothing can be repeated without end
        most = min(int(high), MAX_FAST // max(width, 1))
        low = min(low, most)
        if inner == 1:
            return float(most - low + 1)
        return min((most - low + 1) * math.exp(min(most * math.log(max(inner, 1)), 41)), 1e18)
    if op == "BRANCH":
        return sum(map(_ways, value[1]))
    if op in ("SUBPATTERN", "ASSERT", "ASSERT_NOT"):
        return _ways(value[-1])
    if op == "ATOMIC_GROUP":
        return _ways(value)
    if op == "GROUPREF_EXISTS":
        return _ways(value[1]) + _ways(value[2] or ())
    return 1.0


# ---------------------------------------------------------------- sets of positions: bit i is the gap before letter i


class _UnknownError(Exception):
    """A construct that has no meaning as a set of positions."""


class _OutOfSteps(Exception):
    pass


@dataclass
class _Run:
    text: str
    steps: int = 0
    masks: dict[int, int] = field(default_factory=dict)

    @property
    def everywhere(self) -> int:
        return (2 << len(self.text)) - 1

    def where(self, key: int, test: Callable[[str], bool]) -> int:
        """The letters that pass a test."""
        if key not in self.masks:
            self.masks[key] = sum(1 << i for i, letter in enumerate(self.text) if test(letter))
        return self.masks[key]

    def tick(self) -> None:
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise _OutOfSteps


_Step = Callable[[_Run, int], int]  # from the positions before a part of the pattern to those after it


def _sequence(items: Sequence[tuple[Any, Any]], flags: int) -> _Step:
    steps = [_step(str(op), value, flags) for op, value in items]

    def run(state: _Run, positions: int) -> int:
        for step in steps:
            state.tick()
            if not (positions := step(state, positions)):
                break
        return positions

    return run


def _step(op: str, value: Any, flags: int) -> _Step:
    if (test := _letter(op, value, flags)) is not None:
        return lambda state, positions: (positions & state.where(id(test), test)) << 1
    if op == "SUBPATTERN":
        if value[1] or value[2]:
            raise _UnknownError("flags inside a group")
        return _sequence(value[3], flags)
    if op == "BRANCH":
        options = [_sequence(option, flags) for option in value[1]]
        return lambda state, positions: functools.reduce(lambda seen, go: seen | go(state, positions), options, 0)
    if op in ("MAX_REPEAT", "MIN_REPEAT"):
        low, high, body = value
        return _repeat(low, high, body, flags)
    if op == "AT":
        return _anchor(str(value))
    if op in ("ASSERT", "ASSERT_NOT"):
        return _look(value[0], _sequence(value[1], flags), wanted=op == "ASSERT")
    raise _UnknownError(
        {"GROUPREF": "a back-reference", "GROUPREF_EXISTS": "a conditional group"}.get(
            op, "an atomic or possessive part"
        )
    )


def _repeat(low: int, high: int, body: Sequence[tuple[Any, Any]], flags: int) -> _Step:
    once = _sequence(body, flags)
    test = _letter(str(body[0][0]), body[0][1], flags) if len(body) == 1 else None

    def run(state: _Run, positions: int) -> int:
        for _ in range(low):
            if not (positions := once(state, positions)):
                return 0
        if test is not None and high is _UNLIMITED:
            run_of = state.where(id(test), test)
            return (((positions & run_of) + run_of) ^ run_of) | positions
        edge, left = positions, high - low
        while edge and left:
            edge = once(state, edge) & ~positions
            positions |= edge
            left -= 1
        return positions

    return run


def _anchor(kind: str) -> _Step:
    def allowed(state: _Run) -> int:
        text, end = state.text, len(state.text)
        if kind in ("AT_BEGINNING", "AT_BEGINNING_STRING"):
            return 1
        if kind == "AT_END_STRING":
            return 1 << end
        if kind == "AT_END":
            return 1 << end | (1 << end - 1 if text.endswith("\n") else 0)
        words = [False, *(_is_word(letter) for letter in text), False]
        edges = sum(1 << i for i in range(end + 1) if words[i] != words[i + 1])
        return edges if kind == "AT_BOUNDARY" else state.everywhere & ~edges

    return lambda state, positions: positions & allowed(state)


def _look(direction: int, body: _Step, *, wanted: bool) -> _Step:
    def run(state: _Run, positions: int) -> int:
        if direction < 0:
            true = body(state, state.everywhere)
        else:
            true = sum(1 << i for i in range(len(state.text) + 1) if positions >> i & 1 and body(state, 1 << i))
        return positions & (true if wanted else ~true)

    return run


def _letter(op: str, value: Any, flags: int) -> Callable[[str], bool] | None:
    """The test of a part that stands for exactly one letter; None for other parts."""
    if op == "ANY":
        return (lambda letter: True) if flags & re.DOTALL else (lambda letter: letter != "\n")
    if op in ("LITERAL", "NOT_LITERAL"):
        test = _member(op, value)
    elif op == "IN":
        negated = str(value[0][0]) == "NEGATE"
        members = [_member(str(kind), argument) for kind, argument in value[negated:]]
        test = lambda letter: any(member(letter) for member in members) != negated  # noqa: E731
    else:
        return None
    if flags & re.IGNORECASE:
        negative = op == "NOT_LITERAL" or (op == "IN" and str(value[0][0]) == "NEGATE")
        some = all if negative else any
        return lambda letter: some(test(form) for form in (letter, letter.lower(), letter.upper()) if len(form) == 1)
    return test


def _member(kind: str, value: Any) -> Callable[[str], bool]:
    if kind == "LITERAL":
        return lambda letter: ord(letter) == value
    if kind == "NOT_LITERAL":
        return lambda letter: ord(letter) != value
    if kind == "RANGE":
        return lambda letter: value[0] <= ord(letter) <= value[1]
    name = str(value)  # CATEGORY_DIGIT, CATEGORY_NOT_SPACE, …
    test = {"DIGIT": str.isdecimal, "SPACE": str.isspace, "WORD": _is_word}[name.rsplit("_", 1)[1]]
    return lambda letter: test(letter) != ("_NOT_" in name)


def _is_word(letter: str) -> bool:
    return letter.isalnum() or letter == "_"
