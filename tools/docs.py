"""Regenerates the generated parts of the documents: `make docs`. With `--check`, only says whether they are current.

A generated part stands between `<!-- generated: NAME -->` and `<!-- end -->`. The table of methods is made by running
every method on every kind of layer and comparing its forward with its merged weights.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import registry
from peft.method import WeightMethod
from peft.testing import PLACES, check_method, samples

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("README.md", "docs/support.md")

COLUMNS = {
    "Linear": ("Linear", "Linear, square, no bias", "two Linears"),
    "Conv1D": ("Conv1D (transformers)",),
    "Conv1d, 2d, 3d": ("Conv1d", "Conv2d", "Conv2d, 1x1", "Conv2d, groups", "Conv2d, dilation", "Conv3d"),
    "Embedding": ("Embedding",),
    "Attention": ("MultiheadAttention",),
    "Parameter": ("Parameter, 2-D", "Parameter, 3-D"),
}
"""Columns of the table of weight methods, and the kinds of layers of `peft.testing` behind each."""

ALL, SOME, NONE = "●", "◐", "·"


def methods() -> str:
    """The table of weight methods and the list of prompt methods."""
    weight, prompts = [], []
    for name in registry.names():
        if registry.is_third_party(name):
            continue
        method = registry.method(name)
        row = _weight_row(name) if isinstance(method, WeightMethod) else f"| {_about(name)} |"
        (weight if isinstance(method, WeightMethod) else prompts).append(row)
    head = ["Method", "Config", *COLUMNS]
    lines = [
        f"{len(weight)} methods that change weights:",
        "",
        _line(head),
        _line(["---", "---", *[":-:"] * len(COLUMNS)]),
    ]
    lines += weight
    lines += [
        "",
        f"{ALL} all layers of that kind · {SOME} some (only square ones, say) · {NONE} refused with the reason",
    ]
    lines += [
        "",
        f"{len(prompts)} methods that learn what stands before the input:",
        "",
        "| Method | Config |",
        "| --- | --- |",
    ]
    return "\n".join(lines + prompts)


def _weight_row(name: str) -> str:
    supported: set[str] = set()
    for config in samples(name):
        supported |= set(check_method(config, checks=["law"]).supported)
    marks = []
    for places in COLUMNS.values():
        count = len(supported & set(places))
        marks.append(NONE if not count else ALL if count == len(places) else SOME)
    return f"| {_about(name)} | {' | '.join(marks)} |"


def support() -> str:
    """Every weight method on every kind of layer, and what it says where it refuses."""
    refusals: list[str] = []
    lines = [_line(["Method", *PLACES]), _line(["---", *[":-:"] * len(PLACES)])]
    for name, method in registry.all_methods().items():
        if not isinstance(method, WeightMethod) or registry.is_third_party(name):
            continue
        reports = [check_method(config, checks=["law"]) for config in samples(name)]
        marks = []
        for place in PLACES:
            cells = [cell for report in reports for cell in report.cells if cell.place == place]
            refused = {cell.refused: None for cell in cells if cell.refused}
            marks.append(NONE if all(c.refused for c in cells) else SOME if refused else ALL)
            refusals += [f"- {name} × {place}: {reason}" for reason in refused]
        lines.append(_line([name, *marks]))
    return "\n".join([*lines, "", "Refusals:", "", *(refusals or ["none."])])


def _about(name: str) -> str:
    """The name of a method, linked to its paper, and its config: from the first line of the config's docstring."""
    config = registry.config_class(name)
    first = (config.__doc__ or "").strip().split("\n")[0]
    named = re.match(r"(?P<title>.+?)(?: \((?P<source>[^)]*)\))?:", first)
    title = named["title"] if named else config.__name__.removesuffix("Config")
    paper = re.match(r"arXiv (\d{4}\.\d{4,5})", (named and named["source"]) or "")
    linked = f"[{title}](https://arxiv.org/abs/{paper[1]})" if paper else title
    return f"{linked} | `{config.__name__}`"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


GENERATORS: dict[str, Callable[[], str]] = {"methods": methods, "support": support}
BLOCK = re.compile(r"(<!-- generated: (?P<name>\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def renew(text: str) -> str:
    """A document with its generated parts made anew."""

    def fill(match: re.Match[str]) -> str:
        return f"{match[1]}\n{GENERATORS[match['name']]()}\n\n{match[3]}"

    return BLOCK.sub(fill, text)


def main(arguments: list[str]) -> Any:
    """Renew the documents, or with `--check` say which are stale."""
    parser = argparse.ArgumentParser(description=f"Regenerates the generated parts of {' and '.join(DOCUMENTS)}.")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a document is not current")
    check = parser.parse_args(arguments).check
    stale = []
    for name in DOCUMENTS:
        path = ROOT / name
        before = path.read_text(encoding="utf-8")
        after = renew(before)
        if before != after:
            stale.append(name)
            if not check:
                path.write_text(after, encoding="utf-8")
    if check and stale:
        return f"Out of date: {', '.join(stale)}. Run `make docs` and commit the result."
    print(f"renewed: {', '.join(stale)}" if stale else "all current")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
