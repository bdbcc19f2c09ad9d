"""What became slower between two result files, beyond the noise of measuring the same case twice.

Every case is measured twice within a run. A change counts if it exceeds twice the largest of: the difference between
the two measurements of that case in either file, and the median of these differences over all cases of either file.
"""

import argparse
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.results import Content, load_results, measured

BEYOND = 2.0
Key = tuple[str, str]


@dataclass(frozen=True)
class Change:
    """One contestant of one case: its relative change of time (of its ratio, for whole models), and what is noise."""

    case: str
    name: str
    kind: str
    change: float
    noise: float

    def __str__(self) -> str:
        return f"{self.case}, {self.name}: {100 * self.change:+.1f} % (noise {100 * self.noise:.1f} %)"


@dataclass(frozen=True)
class Comparison:
    """`changes`, the largest first; what was `lost`; what a reader must know beside them."""

    changes: list[Change]
    lost: list[str]
    remarks: list[str]

    @property
    def slower(self) -> list[Change]:
        return [change for change in self.changes if change.change > change.noise]

    @property
    def faster(self) -> list[Change]:
        return [change for change in self.changes if change.change < -change.noise]


def _figures(content: Content) -> Iterator[tuple[Key, str, dict[str, float]]]:
    """(case and contestant, kind, spread); a whole model's ratio to plain, which a slower machine does not change."""
    for entry in content["cases"]:
        for contestant in measured(entry):
            is_plain = contestant["kind"] == "rival" or "ratio" not in contestant
            yield (entry["id"], contestant["name"]), contestant["kind"], contestant["ms" if is_plain else "ratio"]


def _again(spread: dict[str, float]) -> float:
    """How far the two measurements are apart; older files do not say it of the host's times."""
    return abs(spread.get("again", 0.0))


def _lost(new: Content, wanted: set[Key]) -> list[str]:
    """What the old file has and the new one tried and failed at."""
    problems = {}
    for entry in new["cases"]:
        for contestant in entry["contestants"]:
            problems[entry["id"], contestant["name"]] = contestant.get("status")
        if "status" in entry:
            problems |= {key: entry["status"] for key in wanted if key[0] == entry["id"]}
    return [f"{case}, {name}: {problems[case, name]}" for case, name in sorted(wanted) if problems.get((case, name))]


def _remarks(old: Content, new: Content, only_old: int, only_new: int) -> list[str]:
    found = []
    for name in ("cuda_device", "processor", "threads", "packages"):
        before, after = old["provenance"].get(name), new["provenance"].get(name)
        if before != after:
            found.append(f"{name} differs: {_short(before)} before, {_short(after)} now")
    for when, content in (("before", old), ("now", new)):
        found.extend(f"{when}: {text}" for text in content["provenance"].get("warnings", ()))
    if only_old or only_new:
        found.append(f"{only_old} figures are in the old file alone, {only_new} in the new one alone")
    return found


def _short(value: Any) -> Any:
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value


def compare(old: Content, new: Content) -> Comparison:
    """Compare what both files measured."""
    before, after = ({key: (kind, spread) for key, kind, spread in _figures(content)} for content in (old, new))
    usual = max(
        statistics.median([_again(spread) for _, spread in figures.values()] or [0.0]) for figures in (before, after)
    )
    changes = []
    for key in before.keys() & after.keys():
        (_, a), (kind, b) = before[key], after[key]
        noise = BEYOND * max(usual, _again(a), _again(b))
        changes.append(Change(*key, kind, b["median"] / a["median"] - 1, noise))
    only_old, only_new = before.keys() - after.keys(), after.keys() - before.keys()
    changes.sort(key=lambda change: -change.change)
    return Comparison(changes, _lost(new, set(only_old)), _remarks(old, new, len(only_old), len(only_new)))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.compare",
        description=__doc__.splitlines()[0],
        epilog="Exits with 1 if SCX became slower anywhere, or lost a case.",
    )
    parser.add_argument("old", type=Path, help="a result file")
    parser.add_argument("new", type=Path, help="a later one")
    options = parser.parse_args()
    found = compare(load_results(options.old), load_results(options.new))
    print(*found.remarks, sep="\n", end="\n" if found.remarks else "")
    for title, changes in (("slower", found.slower), ("faster", found.faster)):
        print(f"{title}: {len(changes)} of {len(found.changes)}", *(f"  {change}" for change in changes), sep="\n")
    print("".join(f"lost: {text}\n" for text in found.lost), end="")
    sys.exit(1 if found.lost or any(change.kind in ("scx", "triton") for change in found.slower) else 0)


if __name__ == "__main__":
    main()
