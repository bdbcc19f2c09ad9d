"""Stage: what was measured as the result file that `python -m bench` writes as well, with its tables and pictures."""

from pathlib import Path
from typing import Any

from bench.hardware.lines import FAILED, LATE, LEFT_OUT, Line, read
from bench.hardware.work import LeftOut, Work
from bench.marks import MARKS, reached
from bench.plots import draw_context, draw_roofline
from bench.provenance import provenance, write_json
from bench.report import markdown
from bench.results import Content, measured

__all__ = ["content_of", "run"]

SUITES = ("marks", "models", "profiles")


def run(work: Work) -> None:
    content = content_of(read(work.lines.path, work.since))
    path = work.folder / "results.json"
    work.case("results", lambda: written(content, path))
    work.case("marks", lambda: {"headlines": mark_lines(content)})
    for name, draw in (("roofline", draw_roofline), ("context", draw_context)):
        work.case(name, lambda draw=draw, name=name: drawn(draw, content, path.with_name(f"results-{name}.png")))


def content_of(lines: list[Line]) -> Content:
    """A result file's content out of a run's lines."""
    results = {(line["stage"], line["case"]): line["result"] for line in lines if "result" in line}
    about = results.get(("ceilings", "versions")) or provenance()
    others = [line for line in lines if "case" in line and line["state"] in (FAILED, LATE, LEFT_OUT)]
    return {
        "provenance": about,
        "ceilings": results.get(("ceilings", "ceilings"), {}),
        "left_out": [f"{line['stage']}, {line['case']}: {line.get('cause', line['state'])}" for line in others],
        "cases": [result for (stage, _), result in results.items() if stage in SUITES],
    }


def written(content: Content, path: Path) -> dict[str, Any]:
    """The result file and, where the machine's ceilings were measured, which its tables divide by, the tables."""
    write_json(path, content)
    if not content["ceilings"]:
        return {"files": [path.name]}
    text = path.with_suffix(".md")
    text.write_text(markdown(content))
    return {"files": [path.name, text.name]}


def drawn(draw: Any, content: Content, path: Path) -> dict[str, Any]:
    if not content["ceilings"] or not draw(content, path):
        raise LeftOut("nothing was measured that it shows")
    return {"files": [path.name]}


def mark_lines(content: Content) -> list[str]:
    """The worst and the best size of each mark; and the host's time of the operations beside it."""
    if not content["ceilings"]:
        raise LeftOut("ceilings were not measured")
    lines = []
    for mark in MARKS:
        found = sorted((one for one in reached(content) if one.mark == mark), key=lambda one: one.fraction)
        if found:
            missed = sum(not one.is_enough for one in found)
            span = f"{found[0].fraction:.2f} to {found[-1].fraction:.2f}, {missed} of {len(found)} sizes below"
            lines.append(f"{mark.name}: {span} {mark.least:g} of {mark.limit}")
    own = (c for entry in content["cases"] for c in measured(entry) if c["kind"] == "scx")
    if host := [c["host_us"]["median"] for c in own if "host_us" in c]:
        lines.append(f"host's time of an operation: {min(host):.0f} to {max(host):.0f} µs")
    return lines
