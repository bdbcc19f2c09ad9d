"""What a result file says: reading it, and the figures that follow from the measured ones."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.lines import WRONG, Line

Content = dict[str, Any]
Entry = dict[str, Any]

PAPER = {
    ("prefill", 8): (3.6, "first token, context 8"),
    ("prefill", 10240): (10.0, "first token, context 10K"),
    ("token", 8): (1.07, "one more token, context 8"),
    ("token", 512): (6.2, "1,000 new tokens, context 100"),
    ("token", 10240): (3.4, "generation, context 10K"),
}
"""The paper's time over plain serving (Llama-2-7B, fp16, four A100), by the case of ours that comes nearest."""


def of_suite(content: Content, suite: str) -> list[Entry]:
    return [entry for entry in content["cases"] if entry["suite"] == suite]


def load_results(path: Path) -> Content:
    """A result file of `python -m bench`. Raises ValueError for a file of another kind."""
    content = json.loads(Path(path).read_text())
    if not isinstance(content, dict) or not {"provenance", "cases"} <= content.keys():
        raise ValueError(f"{path}: expected a result file of python -m bench")
    return content


def content_of(lines: list[Line]) -> Content:
    """A result file's content out of a run's lines; without `provenance` where they do not say it. Of a case that was
    measured in rounds the last line holds all of them."""
    results = {(line["stage"], line["case"]): line["result"] for line in lines if "result" in line}
    others = {(line["stage"], line["case"]): line for line in lines if "case" in line and line["state"] in WRONG}
    about = results.get(("ceilings", "versions"))
    return {
        **({"provenance": about} if about else {}),
        "ceilings": results.get(("ceilings", "ceilings"), {}),
        "left_out": [f"{stage}, {case}: {line.get('cause', line['state'])}" for (stage, case), line in others.items()],
        "cases": [result for result in results.values() if "contestants" in result],
    }


def measured(entry: Entry) -> Iterator[Entry]:
    """The contestants of a case that were timed."""
    return (contestant for contestant in entry["contestants"] if "ms" in contestant and "status" not in contestant)


def failures(content: Content) -> list[str]:
    """SCX's contestants, and whole cases, that gave a wrong result or none."""
    found = []
    for entry in content["cases"]:
        if _is_failure(entry):
            found.append(f"{entry['id']}: {entry['status']}")
        for contestant in entry["contestants"]:
            if contestant["kind"] in ("scx", "triton") and _is_failure(contestant):
                found.append(f"{entry['id']}, {contestant['name']}: {contestant['status']}")
    return found


def _is_failure(measurement: Entry) -> bool:
    return measurement.get("status", "").startswith(("failed", "raised"))


def progress(figures: Entry) -> str:
    """One line about a measured case, whose entry is the result among these figures; nothing about other results."""
    entry = figures.get("result", {})
    if "status" in entry:
        return entry["status"]
    told = []
    for contestant in entry.get("contestants", ()):
        status = contestant.get("status")
        result = f"{contestant['ms']['median']:.4g} ms" if status is None else status.split(":")[0]
        told.append(f"{contestant['name']} {result}")
    return "; ".join(told)


def best_rival(entry: Entry) -> Entry | None:
    """The fastest contestant that is what would run otherwise."""
    rivals = [contestant for contestant in measured(entry) if contestant["kind"] == "rival"]
    return min(rivals, key=lambda rival: rival["ms"]["median"], default=None)


def ratio(entry: Entry, contestant: Entry) -> float | None:
    """Time over the plain model's within a round, or over that of the best rival."""
    if "ratio" in contestant:
        return contestant["ratio"]["median"]
    rival = best_rival(entry)
    return None if rival is None else contestant["ms"]["median"] / rival["ms"]["median"]


def keystream_seconds(content: Content, entry: Entry) -> float:
    """The least time of a case's keystream on this machine; 0 where nothing is sealed."""
    if not entry.get("keystream_bytes"):
        return 0.0
    seconds: float = entry["keystream_bytes"] / (1e9 * content["ceilings"]["keystream_gb_s"][str(entry["rounds"])])
    return seconds


def rate(content: Content, entry: Entry, contestant: Entry) -> tuple[float, str, float]:
    """(rate, its unit, fraction of the ceiling) of an operation, by what bounds it on this machine.

    The least time is that of the counted bytes at the bandwidth of a copy, of the counted operations at the rate of a
    large product, or, for who works on a sealed cache, of its keystream, whichever is longest; the fraction is that
    time over the measured one.
    """
    ceilings = content["ceilings"]
    seconds = contestant["ms"]["median"] / 1e3
    moving = entry["bytes"] / (1e9 * ceilings["copy_gb_s"])
    computing = entry["flops"] / (1e12 * ceilings["product_tflop_s"][entry["dtype"]])
    ciphering = keystream_seconds(content, entry) if contestant["kind"] == "scx" else 0.0
    if computing > max(moving, ciphering):
        return entry["flops"] / seconds / 1e12, "TFLOP/s", computing / seconds
    return entry["bytes"] / seconds / 1e9, "GB/s", max(moving, ciphering) / seconds
