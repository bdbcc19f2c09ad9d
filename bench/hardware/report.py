"""Stage: what was measured as the result file that `python -m bench` writes as well, with its tables and pictures."""

from functools import partial
from pathlib import Path
from typing import Any

from bench.lines import read
from bench.marks import MARKS, reached
from bench.plots import PICTURES
from bench.provenance import provenance, write_json
from bench.report import markdown
from bench.results import Content, content_of, measured
from bench.work import LeftOut, Work


def run(work: Work) -> None:
    content = content_of(read(work.lines.path, work.since))
    content.setdefault("provenance", provenance())
    path = work.folder / "results.json"
    work.case("results", partial(written, content, path))
    work.case("marks", lambda: {"headlines": mark_lines(content)})
    for name in PICTURES:
        work.case(name, partial(drawn, name, content, path))


def written(content: Content, path: Path) -> dict[str, Any]:
    """The result file and, where the machine's ceilings were measured, which its tables divide by, the tables."""
    files = [write_json(path, content)]
    if content["ceilings"]:
        files.append(path.with_suffix(".md"))
        files[-1].write_text(markdown(content))
    return {"files": [file.name for file in files]}


def drawn(name: str, content: Content, path: Path) -> dict[str, Any]:
    picture = path.with_name(f"{path.stem}-{name}.png")
    if not content["ceilings"] or not PICTURES[name](content, picture):
        raise LeftOut("nothing was measured that it shows")
    return {"files": [picture.name]}


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
