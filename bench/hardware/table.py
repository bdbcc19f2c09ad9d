"""What a run found, in at most 60 lines of text."""

from collections.abc import Iterable, Iterator

from bench.lines import ENDED, LEFT_OUT, WRONG, Line

MOST_LINES = 60
MOST_HEADLINES = 28
WIDTH = 150


def table(lines: list[Line], notes: Iterable[str] = ()) -> str:
    """A row for each stage, then the figures that matter most, then what went wrong."""
    stages = [line for line in lines if "case" not in line]
    cases = [line for line in lines if "case" in line]
    rows = [*_stage_rows(stages), "", *notes]
    rows += _at_most(MOST_HEADLINES, [text for line in cases for text in line.get("headlines", ())], "in results.md")
    wrong = [_wrong(line) for state in WRONG for line in cases if line["state"] == state]
    wrong = list(dict.fromkeys(wrong))  # parts may say the same
    rows += _at_most(MOST_LINES - 1 - len(rows), wrong, "in stages.jsonl")
    return "\n".join(row[:WIDTH] for row in rows)


def _stage_rows(stages: Iterable[Line]) -> Iterator[str]:
    counts = f"{'passed':>6} {'failed':>6} {'late':>5} {'left out':>8}"
    yield f"{'stage':<12} {'state':<9} {counts} {'seconds':>8} {'limit':>6}"
    for line in stages:
        counts = line.get("cases", {})
        numbers = [counts.get(state, 0) for state in ENDED]
        text = "{:>6} {:>6} {:>5} {:>8}".format(*numbers)
        limit = f"{line['limit']:.0f}" if "limit" in line else "–"
        cause = f"  {line['cause']}" if "cause" in line else ""
        yield f"{line['stage']:<12} {line['state']:<9} {text} {line['seconds']:>8.1f} {limit:>6}{cause}"


def _wrong(line: Line) -> str:
    state = line["state"] if line["state"] == LEFT_OUT else line["state"].upper()
    return f"{state} {line['stage']}, {line['case']}: {line.get('cause', '')}"


def _at_most(count: int, rows: list[str], where: str) -> list[str]:
    if len(rows) <= count:
        return rows
    return [*rows[: count - 1], f"… and {len(rows) - count + 1} more, {where}"]
