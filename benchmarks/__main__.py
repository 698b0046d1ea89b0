"""`python -m benchmarks [groups]`: measure, and write the table, the pictures and the numbers."""

from __future__ import annotations

import argparse
import fnmatch
import json
from dataclasses import asdict
from pathlib import Path

from benchmarks import report
from benchmarks.cases import CASES
from benchmarks.sides import ALLOCATORS, ROOT, Result, Setting, measure, open_sides


def main() -> None:
    groups = list(dict.fromkeys(case.group for case in CASES.values()))
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure this library and the reference side by side, in turns, and report ratios of medians.",
    )
    parser.add_argument(
        "patterns", nargs="*", metavar="case", help=f"group, or pattern of group/case. Groups: {groups}"
    )
    parser.add_argument("--rounds", type=int, default=7, help="samples of each side (default: 7)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch in each process (default: 1)")
    parser.add_argument(
        "--clock",
        choices=["cpu", "wall"],
        default="cpu",
        help="time of the processor, which other programs don't disturb, or of the wall (default: cpu)",
    )
    parser.add_argument(
        "--allocator",
        choices=list(ALLOCATORS),
        default="kept",
        help="glibc's settings in both processes: keep memory once taken, or its own choice (default: kept)",
    )
    parser.add_argument("--out", type=Path, help="folder to write to; docs/ is only rewritten with --out docs")
    parser.add_argument("--list", action="store_true", help="list the cases and stop")
    args = parser.parse_args()
    wanted = [c for c in CASES.values() if not args.patterns or any(_means(p, c.group, c.key) for p in args.patterns)]
    if args.list or not wanted:
        print("\n".join(c.key for c in wanted) or f"no case matches {args.patterns}; groups: {', '.join(groups)}")
        return
    setting = Setting(args.clock, args.threads, args.allocator)
    results: list[Result] = []
    group, sides = "", {}
    for case in wanted:
        if case.group != group:
            for side in sides.values():
                side.close()
            write(args.out, args.rounds, setting, results)
            group, sides = case.group, open_sides(setting)
        results.append(measure(case, args.rounds, sides))
        print(report.line(results[-1]), flush=True)
    for side in sides.values():
        side.close()
    write(args.out, args.rounds, setting, results)


def write(out: Path | None, rounds: int, setting: Setting, results: list[Result]) -> None:
    """Write what is there so far."""
    if not results:
        return
    where = {**report.machine(), "rounds": rounds, **asdict(setting)}
    out = out or ROOT / "benchmarks" / "out"
    out.mkdir(parents=True, exist_ok=True)
    numbers = {"setting": where, "results": [r.to_dict() for r in results]}
    (out / "benchmarks.json").write_text(json.dumps(numbers, indent=1) + "\n")
    report.write(out, where, results)
    print(f"written to {out}", flush=True)


def _means(pattern: str, group: str, key: str) -> bool:
    return pattern == group or fnmatch.fnmatch(key.lower(), pattern.lower())


if __name__ == "__main__":
    main()
