"""Regexes from files: the same answer as `re`, in bounded time."""

from __future__ import annotations

import re
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft import patterns
from peft.errors import ConfigError

LETTERS = st.sampled_from(
    ["a", "b", ".", "_", "1", r"\.", r"\d", r"\w", r"\D", "[ab]", "[^a.]", "[a-c1]", r"[^\d_]", "é"]
)
PIECES = st.one_of(
    LETTERS, st.sampled_from(["^", "$", r"\b", r"\B", r"\A", r"\Z", ".*", ".+?", "a*", "(?!.*b)", "(?<=a)"])
)


def combine(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    nonempty = st.tuples(LETTERS, inner).map("".join)
    return st.one_of(
        st.lists(inner, min_size=1, max_size=3).map("".join),
        st.lists(inner, min_size=2, max_size=3).map(lambda options: f"({'|'.join(options)})"),
        st.tuples(nonempty, st.sampled_from(["*", "+", "?", "*?", "{2}", "{1,2}", "{0,3}"])).map(
            lambda p: f"(?:{p[0]}){p[1]}"
        ),
        inner.map(lambda body: f"(?={body})"),
        inner.map(lambda body: f"(?!{body})"),
        inner.map(lambda body: f"(?P<n>{body})" if "?P<n>" not in body else body),
    )


PATTERNS = st.recursive(PIECES, combine, max_leaves=8)
TEXTS = st.text("aAbc._1é\n", min_size=1, max_size=10)


def steadily(pattern: str, text: str) -> bool:
    steady = patterns._compile(pattern).steady
    assert callable(steady)
    return bool(steady(patterns._Run(text), 1) >> len(text))


@settings(max_examples=600, deadline=None)
@given(PATTERNS, TEXTS, st.sampled_from(["", "(?i)", "(?s)", "(?x)"]))
def test_both_ways_to_match_say_what_re_says(pattern: str, text: str, flags: str) -> None:
    pattern = flags + pattern
    try:
        expected = re.fullmatch(pattern, text) is not None
    except re.error:
        with pytest.raises(ConfigError, match="not a regular expression"):
            patterns.check(pattern)
        return
    assert patterns.fullmatch(pattern, text) == expected
    assert steadily(pattern, text) == expected


@pytest.mark.parametrize(
    "pattern",
    [
        r"(a+)+b",
        r"(a|a)*b",
        r"(a|aa)+b",
        r"(.*a){20}b",
        r".*.*.*.*.*.*.*b",
        r"(?=(a+)+b).*",
        r"((a?){50}){50}b",
        r"(\w+\s?)*b",
    ],
)
def test_catastrophic_patterns_are_decided(pattern: str) -> None:
    assert not patterns.fullmatch(pattern, "a" * 300)  # `re` would not come back


@pytest.mark.parametrize(
    ("pattern", "name", "matches"),
    [
        (r".*\.(q|v)_proj", "model.layers.0.self_attn.q_proj", True),
        (r"(.*\.)?(q_proj)$", "q_proj", True),
        (r"(?!.*vision).*\.k_proj", "vision.layers.0.k_proj", False),
        (r"model\.layers\.([0-9]|1[0-5])\.(?:\w+\.)*(up|down)_proj", "model.layers.12.mlp.experts.up_proj", True),
        (r".*layers.*mlp.*(up|down).*", "model.layers.3.mlp.down_proj", True),
        (r".*_proj", "x" * 5000 + "_proj", True),
    ],
)
def test_patterns_of_real_configs(pattern: str, name: str, matches: bool) -> None:
    patterns.check(pattern)
    assert patterns.fullmatch(pattern, name) is matches


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("(q_proj", "not a regular expression"),
        (r"(?P<x>a+)+(?P=x)", "back-reference"),
        ("(" * 5000 + ")" * 5000, "nested too deeply"),
        ("a{99999999999999999999}", "not a regular expression"),
        ("a" * (patterns.MAX_PATTERN + 1), "list the names"),
        (r"(?i:(a+)+)+", "flags inside a group"),
    ],
)
def test_what_can_not_be_decided_is_refused_with_the_reason(pattern: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        patterns.check(pattern, where="LoraConfig.target_modules")
    assert str(caught.value).startswith("LoraConfig.target_modules: ")


def test_deciding_takes_bounded_work() -> None:
    with pytest.raises(ConfigError, match="bounded time"):
        patterns.fullmatch("((((a?){99}){99}){99}){99}b", "a" * 200)


@pytest.mark.filterwarnings("ignore:Possible nested set:FutureWarning")
@given(st.text(string.printable, max_size=40))
def test_no_text_breaks_the_check(pattern: str) -> None:
    try:
        patterns.check(pattern)
    except ConfigError:
        return
    patterns.fullmatch(pattern, "model.layers.0.q_proj")


@pytest.mark.parametrize(
    ("path", "rank"),
    [
        ("model.layers.0.q_proj", 2),
        ("q_proj", 4),
        ("model.layers.0.xq_proj", 16),
        ("model.layers.1.q_proj", 4),
        ("k_proj", 16),
    ],
)
def test_the_first_key_that_matches_a_path_decides(path: str, rank: int) -> None:
    table = {r"layers\.0\.q_proj": 2, "q_proj": 4, ".*q_proj.*x": 8}
    assert patterns.lookup(table, path, 16) == rank


def test_an_empty_table_has_nothing_to_say() -> None:
    assert patterns.lookup(None, "q_proj", 16) == patterns.lookup({}, "q_proj", 16) == 16


def test_a_bad_key_is_named() -> None:
    with pytest.raises(ConfigError, match=r"'\(q': .* not a regular expression"):
        patterns.matching(["(q"], "q_proj")


def test_compiled_patterns_capture_and_stay_cheap() -> None:
    found = patterns.compiled(r"(?:^|.*?\.)layers\.(\d+)\.", "layers_pattern").match("model.layers.12.q_proj")
    assert found is not None
    assert found.group(1) == "12"
    with pytest.raises(ConfigError, match=r"^layers_pattern: .* too many ways"):
        patterns.compiled(r"(a+)+b", "layers_pattern")
