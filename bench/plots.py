"""Pictures of a result file: operations under the machine's ceilings, and time over plain against context length."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from bench.results import PAPER, Content, Entry, measured, of_suite


def draw_roofline(content: Content, path: Path) -> bool:
    """Operations under the measured ceilings; False if there is none to draw."""
    pyplot = _pyplot()
    points: dict[str, list[tuple[float, float]]] = {}
    for entry in of_suite(content, "operations"):
        for contestant in measured(entry):
            if contestant["kind"] == "scx" and entry["flops"]:
                achieved = entry["flops"] / contestant["ms"]["median"] / 1e9
                points.setdefault(entry["operation"], []).append((entry["flops"] / entry["bytes"], achieved))
    if not points:
        return False
    figure, axis = pyplot.subplots(figsize=(9, 6), layout="constrained")
    intensities = [intensity for series in points.values() for intensity, _ in series]
    _draw_ceilings(axis, content["ceilings"], min(intensities) / 2, 2 * max(intensities))
    for name, series in points.items():
        axis.scatter(*zip(*series, strict=True), s=18, label=name)
    axis.set(xscale="log", yscale="log", xlabel="counted operations per counted byte", ylabel="TFLOP/s")
    axis.legend(fontsize=8)
    axis.set_title(f"SCX's operations under the ceilings of {_machine(content)}")
    _save(figure, path)
    return True


def _draw_ceilings(axis: Any, ceilings: dict[str, Any], low: float, high: float) -> None:
    bandwidth = ceilings["copy_gb_s"] / 1e3
    for dtype, peak in ceilings["product_tflop_s"].items():
        corner = min(max(peak / bandwidth, low), high)
        axis.plot((low, corner, high), (low * bandwidth, min(peak, corner * bandwidth), peak), color="black", lw=1)
        axis.annotate(f"product, {dtype}: {peak:.3g} TFLOP/s", (high, peak), ha="right", va="bottom", fontsize=8)
    axis.annotate(f"copy: {1e3 * bandwidth:.4g} GB/s", (low, low * bandwidth), va="bottom", fontsize=8)


def draw_context(content: Content, path: Path) -> bool:
    """Time over plain transformers against context length, one sequence at a time; False if there is none to draw."""
    entries = [e for e in of_suite(content, "model") if e.get("batch") == 1 and "/compiled" not in e["id"]]
    models = sorted({entry["model"] for entry in entries})
    if not models:
        return False
    pyplot = _pyplot()
    size = (4.5 * len(models) + 1, 7)
    figure, axes = pyplot.subplots(2, len(models), figsize=size, layout="constrained", squeeze=False, sharex=True)
    for column, model in enumerate(models):
        for row, kind in enumerate(("prefill", "token")):
            chosen = [entry for entry in entries if (entry["model"], entry["kind"]) == (model, kind)]
            axes[row][column].set_visible(bool(chosen))
            _draw_ratios(axes[row][column], chosen)
            axes[row][column].set_title(f"{model}, {'first token' if kind == 'prefill' else 'one more token'}")
    axes[0][0].legend(fontsize=7)
    for axis in axes[-1]:
        axis.set_xlabel("context, tokens")
    figure.suptitle(f"Time over plain transformers on {_machine(content)}")
    _save(figure, path)
    return True


def _draw_ratios(axis: Any, entries: Iterable[Entry]) -> None:
    series: dict[str, list[tuple[float, dict[str, float]]]] = {}
    for entry in entries:
        for contestant in measured(entry):
            if contestant["kind"] == "scx" and "ratio" in contestant:
                series.setdefault(contestant["name"], []).append((entry["context"], contestant["ratio"]))
    for name, points in series.items():
        context, ratios = zip(*sorted(points, key=lambda point: point[0]), strict=True)
        line = axis.plot(context, [r["median"] for r in ratios], marker="o", ms=3, label=name)[0]
        axis.fill_between(
            context, [r["q20"] for r in ratios], [r["q80"] for r in ratios], alpha=0.2, color=line.get_color()
        )
    paper = [(e["context"], PAPER[e["kind"], e["context"]][0]) for e in entries if (e["kind"], e["context"]) in PAPER]
    if paper:
        axis.scatter(*zip(*paper, strict=True), marker="x", color="black", label="the paper's, on its machine")
    axis.axhline(1, color="grey", lw=1)
    axis.set(xscale="log", ylabel="ratio")


def _machine(content: Content) -> str:
    return content["provenance"]["cuda_device"] or content["provenance"]["processor"]


def _pyplot() -> Any:
    import matplotlib  # noqa: PLC0415

    matplotlib.use("Agg")
    from matplotlib import pyplot  # noqa: PLC0415

    return pyplot


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=110)
    _pyplot().close(figure)


PICTURES: dict[str, Callable[[Content, Path], bool]] = {"roofline": draw_roofline, "context": draw_context}
"""By name, what draws a result into a file; False if there is nothing of that to draw."""
