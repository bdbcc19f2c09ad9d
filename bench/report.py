"""Tables and pictures of a result file: `python -m bench.report FILE` prints the short table and writes the rest.

Beside FILE.json go FILE.md (every case, and short tables), FILE-roofline.png and FILE-context.png.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.marks import reached
from bench.plots import PICTURES
from bench.results import PAPER, Content, Entry, best_rival, failures, load_results, measured, of_suite, rate, ratio


@dataclass(frozen=True)
class Table:
    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        lines = [self.header, ("---", *["---:"] * (len(self.header) - 1)), *self.rows]
        return f"### {self.title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def time_text(milliseconds: float) -> str:
    if milliseconds >= 1000:
        return f"{milliseconds / 1e3:.3g} s"
    return f"{milliseconds:.3g} ms" if milliseconds >= 0.1 else f"{1e3 * milliseconds:.3g} µs"


def size_text(size: float | None) -> str:
    if size is None:
        return "–"
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} GiB"


def number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def host_text(contestant: Entry) -> str:
    """The host's time of a call, where it was measured: not on a CPU, nor in older files."""
    return time_text(contestant["host_us"]["median"] / 1e3) if "host_us" in contestant else "–"


def range_text(spread: dict[str, float]) -> str:
    return f"{spread['median']:.3f} ({spread['q20']:.3f}–{spread['q80']:.3f})"


def size_of(entry: Entry) -> str:
    """The sizes of an operation's case, in words."""
    sealed = f", {entry['rounds']} rounds" if entry.get("rounds") else ""  # older files have none
    if entry["cached"]:
        tokens = f"{entry['tokens']:,} on " if entry["tokens"] > 1 and sealed else ""
        return f"{tokens}{entry['cached']:,} cached, batch {entry['batch']}{sealed}"
    redundant = f" + {entry['redundant']:,} redundant" if entry["redundant"] else ""
    return f"{entry['tokens']:,}{redundant}{sealed}"


# Operations.


def headline_table(content: Content) -> Table:
    """SCX beside its best rival, where a case is of the short table."""
    rows = []
    for entry in of_suite(content, "operations"):
        own = next((c for c in measured(entry) if c["kind"] == "scx"), None) if entry.get("headline") else None
        if own is None:
            continue
        value, unit, fraction = rate(content, entry, own)
        rival = best_rival(entry)
        name, shape = f"{entry['operation']}, {size_of(entry)}", f"{entry['model']}, {entry['dtype']}"
        speed = (time_text(own["ms"]["median"]), f"{value:.3g} {unit}", f"{100 * fraction:.0f} %")
        beside = ("–", "–") if rival is None else (rival["name"], number(ratio(entry, own)))
        rows.append((name, shape, *speed, *beside, size_text(own["memory_bytes"]), host_text(own)))
    speed, beside = ("SCX", "rate", "of ceiling"), ("best rival", "SCX / rival")
    header = ("operation, tokens", "shape", *speed, *beside, "peak memory", "host")
    return Table("Operations", header, tuple(rows))


def marks_table(content: Content) -> Table:
    """What the kernels are asked to reach, and what they reach."""
    rows = [
        (
            found.mark.name,
            f"{found.entry['operation']}, {size_of(found.entry)}",
            f"{found.mark.least:g} of {found.mark.limit}",
            number(found.fraction),
            number(found.of_copy),
            "yes" if found.is_enough else "no",
        )
        for found in reached(content)
    ]
    header = ("mark", "operation, tokens", "asked", "measured", "of a copy as large", "reached")
    return Table("Marks", header, tuple(rows))


def operation_tables(content: Content) -> Iterator[Table]:
    """Every case and contestant, a table for each operation."""
    figures = ("time (20–80 %)", "rate", "of ceiling", "over best rival", "peak memory", "host")
    by_name: dict[str, list[tuple[str, ...]]] = {}
    for entry in of_suite(content, "operations"):
        rows = by_name.setdefault(entry["operation"], [])
        place = (f"{entry['model']}, {entry['dtype']}", size_of(entry))
        if "status" in entry:
            rows.append((*place, "everybody", entry["status"], *["–"] * 5))
        rows.extend((*place, *_contestant_row(content, entry, contestant)) for contestant in entry["contestants"])
    for name, rows in by_name.items():
        yield Table(name, ("shape", "tokens", "who", *figures), tuple(rows))


def _contestant_row(content: Content, entry: Entry, contestant: Entry) -> tuple[str, ...]:
    if "status" in contestant:
        return (contestant["name"], contestant["status"].replace("|", "/"), *["–"] * 5)
    value, unit, fraction = rate(content, entry, contestant)
    ms = contestant["ms"]
    spread = f"{time_text(ms['median'])} ({time_text(ms['q20'])}–{time_text(ms['q80'])})"
    if contestant.get("timed_by") == "events":  # no graph can hold it: the host's time may be in it
        spread += ", by events"
    speed = (f"{value:.3g} {unit}", f"{100 * fraction:.0f} %")
    cost = (size_text(contestant["memory_bytes"]), host_text(contestant))
    return (contestant["name"], spread, *speed, number(ratio(entry, contestant)), *cost)


# Whole models.


def case_text(entry: Entry) -> str:
    return f"{entry['model']}, {entry['kind']}, {batch_text(entry)}"


def batch_text(entry: Entry) -> str:
    return f"{entry['batch']} × {entry['context']:,}"


def model_tables(content: Content) -> Iterator[Table]:
    """Ratios to the plain model, a table for each model and kind, with the paper's beside ours."""
    groups: dict[tuple[str, ...], list[Entry]] = {}
    for entry in of_suite(content, "model"):
        if "kind" in entry:
            names = tuple(contestant["name"] for contestant in entry["contestants"])
            group = (entry["model"], entry["dtype"], entry["weights"], entry["kind"], *names)
            groups.setdefault(group, []).append(entry)
    for (model, dtype, weights, kind, _, *names), entries in groups.items():
        what = "time to first token" if kind == "prefill" else "time per token"
        title = f"{model}, {dtype}, {weights} weights: {what}, over plain (sdpa)"
        yield Table(title, ("batch × context", "plain", *names, "the paper's SCX"), tuple(map(_model_row, entries)))


def _model_row(entry: Entry) -> tuple[str, ...]:
    plain, *others = entry["contestants"]
    paper = PAPER.get((entry["kind"], entry["context"])) if entry["batch"] == 1 else None
    first = plain["status"] if "status" in plain else time_text(plain["ms"]["median"])
    shown = (c["status"] if "status" in c else range_text(c["ratio"]) if "ratio" in c else "–" for c in others)
    return (batch_text(entry), first, *shown, "–" if paper is None else f"{paper[0]:g} ({paper[1]})")


def cost_table(content: Content) -> Table:
    """Memory and transfers of the whole models' cases."""
    rows = [
        (
            case_text(entry),
            contestant["name"],
            time_text(contestant["ms"]["median"]),
            size_text(contestant.get("memory_bytes")),
            size_text(contestant.get("host_to_device_bytes")),
            size_text(contestant.get("device_to_host_bytes")),
            "–" if contestant["logit_error"] is None else f"{contestant['logit_error']:.1e}",
        )
        for entry in of_suite(content, "model")
        for contestant in measured(entry)
    ]
    header = ("case", "who", "time", "peak memory", "host to device", "device to host", "logits differ by")
    return Table("Whole models: memory, transfers, agreement", header, tuple(rows))


def boundary_table(content: Content) -> Table:
    """What crosses the boundary of the split placement in a prefill, beside the paper's way with the same rows."""
    rows = []
    for entry in of_suite(content, "model"):
        split = {c["name"]: c for c in measured(entry) if "boundary_bytes" in c}
        for name, contestant in split.items():
            paper = split.get(name.replace("few crossings", "the paper's crossings"))
            blocks, size, trips = (contestant[key] for key in ("blocks", "boundary_bytes", "round_trips"))
            of_paper = "–" if paper is None else number(size / paper["boundary_bytes"], 3)
            sizes = (size_text(size), size_text(size / blocks), of_paper)
            rows.append((case_text(entry), name, *sizes, f"{trips}", f"{trips / blocks:.2f}"))
    header = ("case", "who", "bytes", "per block", "of the paper's way", "round trips", "per block")
    return Table("Over the boundary", header, tuple(rows))


def channel_table(content: Content) -> Table:
    """A split prefill over what connects two processes."""
    rows = []
    for entry in of_suite(content, "channel"):
        case = f"{entry['model']}, {entry['tokens']} tokens, {size_text(entry['boundary_bytes'])}"
        for one in measured(entry):
            rows.append((case, one["name"], time_text(one["ms"]["median"]), range_text(one["ratio"])))
    return Table("Between two processes", ("prefill", "over", "time", "over plain TCP"), tuple(rows))


def first_call_table(content: Content) -> Table:
    rows = [
        (entry["id"].split("/")[1], contestant["name"], time_text(contestant["ms"]["median"]))
        for entry in of_suite(content, "first call")
        for contestant in measured(entry)
    ]
    return Table("First call of a process", ("what", "who", "time"), tuple(rows))


def host_tables(content: Content) -> Iterator[Table]:
    """What the host does for a step of a model, and for an operation."""
    steps: list[tuple[str, ...]] = []
    operations: list[tuple[str, ...]] = []
    for entry in of_suite(content, "host"):
        name = entry["id"].split("/")[1]
        times = [time_text(c["ms"]["median"]) for c in measured(entry)]
        ratios = [range_text(c["ratio"]) for c in measured(entry)]
        if "status" in entry:
            operations.append((name, entry["status"], *["–"] * 3))
        elif "layers" in entry:
            step = f"{name}, {entry['layers']} layers, hidden {entry['hidden']}"
            who = [contestant["name"] for contestant in measured(entry)]
            steps += [(step, *row) for row in zip(who, times, ratios, strict=True)]
        else:
            operations.append((name, *times, ratios[0]))
    yield Table("Host time of a step", ("step", "who", "thread's CPU time", "over plain"), tuple(steps))
    header = ("operation", "public function", "launcher", "launcher without plans", "public over launcher")
    yield Table("Host time of an operation", header, tuple(operations))


def tables(content: Content, everything: bool = False) -> list[Table]:
    """The short tables, or all of them; those that have rows."""
    found = [headline_table(content), marks_table(content), *model_tables(content)]
    found += [boundary_table(content), channel_table(content), first_call_table(content), *host_tables(content)]
    if everything:
        found += [cost_table(content), *operation_tables(content)]
    return [table for table in found if table.rows]


def remarks(content: Content) -> list[str]:
    """What a reader must know beside the numbers: where they come from, and what is doubtful or missing."""
    about, ceilings = content["provenance"], content["ceilings"]
    where = about["cuda_device"] or f"{about['processor']}, {about['threads']} threads"
    versions = ", ".join(f"{name} {number}" for name, number in about["packages"].items() if number)
    found = [f"{where}; Python {about['python']}, {versions}; commit {about['commit']}, {about['date']}"]
    if ceilings:
        products = ", ".join(f"{rate:.3g} TFLOP/s in {name}" for name, rate in ceilings["product_tflop_s"].items())
        ciphers = "".join(
            f"; keystream of {rounds} rounds {rate:.3g} GB/s"
            for rounds, rate in ceilings.get("keystream_gb_s", {}).items()
        )
        found.append(f"ceilings of this run: copy {ceilings['copy_gb_s']:.4g} GB/s; large product {products}{ciphers}")
        if about["cuda_device"] is None:
            found.append("results that stay in a processor's caches are written faster than a large copy: over 100 %")
    return [
        *found,
        *(f"doubtful: {text}" for text in about["warnings"]),
        *map("left out: {}".format, content["left_out"]),
    ]


def markdown(content: Content) -> str:
    parts = [f"# Measured with `{content['provenance']['command']}`\n", *(f"- {text}" for text in remarks(content)), ""]
    return "\n".join([*parts, *(table.markdown() for table in tables(content, everything=True))])


def show(content: Content) -> None:
    """Print the short tables."""
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table as RichTable  # noqa: PLC0415

    console = Console(width=None if sys.stdout.isatty() else 160)
    for table in tables(content):
        shown = RichTable(title=table.title, title_justify="left")
        for index, name in enumerate(table.header):
            shown.add_column(name, justify="right" if index else "left")
        for row in table.rows:
            shown.add_row(*row)
        console.print(shown)
    for text in remarks(content):
        console.print(text if len(text) < 400 else f"{text[:400]} …", markup=False, highlight=False)
    for text in failures(content):
        console.print(f"FAILED {text}", markup=False, highlight=False)


def write_report(content: Content, path: Path) -> list[Path]:
    """Write Markdown and pictures beside a result file. Returns what was written."""
    text = path.with_suffix(".md")
    text.write_text(markdown(content))
    pictures = {path.with_name(f"{path.stem}-{name}.png"): draw for name, draw in PICTURES.items()}
    return [text, *(picture for picture, draw in pictures.items() if draw(content, picture))]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="a result file")
    path = parser.parse_args().file
    content = load_results(path)
    show(content)
    print("written:", *write_report(content, path))


if __name__ == "__main__":
    main()
