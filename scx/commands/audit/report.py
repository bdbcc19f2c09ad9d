"""What attacks found, as a table, a file and a picture."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scx_kernels.provenance import write_json

__all__ = ["Finding", "draw", "print_table", "write"]


@dataclass(frozen=True)
class Finding:
    """What an attack got: `value` of `of` tokens, rows or features; or, where `of` is None, an area under the curve,
    from the lowest of several to the `highest`, or a perplexity."""

    attack: str
    placement: str
    setting: str
    measure: str
    value: float
    of: int | None
    seconds: float
    highest: float | None = None

    @property
    def figure(self) -> str:
        """The score in words."""
        if self.of is not None:
            return f"{self.value:,.0f} of {self.of:,} {self.measure}"
        if self.highest is not None:
            return f"{self.measure} {self.value:.3f} to {self.highest:.3f}"
        return f"{self.measure} {self.value:,.1f}"

    @property
    def share(self) -> float | None:
        """The score as a bar's length, from 0 to 1; None for a perplexity."""
        if self.of is not None:
            return self.value / self.of
        return None if self.highest is None else self.value


def print_table(findings: Sequence[Finding]) -> None:
    """Print one line a finding."""
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    table = Table(title="read with the weights and without a key")
    for name in ("attack", "placement", "setting"):
        table.add_column(name)
    for name in ("read", "seconds"):
        table.add_column(name, justify="right")
    for x in findings:
        table.add_row(x.attack, x.placement, x.setting, x.figure, f"{x.seconds:.1f}")
    Console().print(table)


def write(path: Path, about: dict[str, Any], settings: dict[str, Any], findings: Sequence[Finding]) -> Path:
    """Write findings to a JSON file: "provenance" (machine, versions, commit, command), "settings", "findings"."""
    return write_json(path, {"provenance": about, "settings": settings, "findings": [asdict(x) for x in findings]})


def draw(path: Path, about: dict[str, Any], settings: dict[str, Any], findings: Sequence[Finding]) -> Path:
    """Draw findings as bars, a perplexity as its figure alone, with machine, versions, commit and command below."""
    import matplotlib  # noqa: PLC0415

    matplotlib.use("Agg")
    from matplotlib import pyplot  # noqa: PLC0415

    colours = {"fused": "tab:blue", "split": "tab:orange"}
    figure, axes = pyplot.subplots(figsize=(14, 1.8 + 0.27 * len(findings)), layout="constrained")
    for place, x in enumerate(findings):
        axes.barh(place, x.share or 0.0, color=colours[x.placement])
        axes.text((x.share or 0.0) + 0.01, place, x.figure, va="center", fontsize=9)
    labels = [f"{x.attack}: {x.placement}, {x.setting}".replace("`", "") for x in findings]
    axes.set_yticks(range(len(findings)), labels, fontsize=9)
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.45)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "", "half (AUC: a guess)", "", "all"])
    figure.suptitle(
        f"Read with the weights and without a key: {settings['model']}, {settings['tokens']} tokens, "
        f"{settings['redundant']} redundant rows, noise {settings['noise']:g}",
        fontsize=12,
    )
    packages = ", ".join(f"{name} {version}" for name, version in about["packages"].items() if version)
    machine = f"{about['processor']}, {about['threads']} threads"
    figure.supxlabel(f"{machine}; {packages}; {about['commit']}\n{about['command']}", fontsize=7)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path
