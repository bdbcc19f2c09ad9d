"""Stage: what the kernels of marked operations do, as the GPU's own counters say: bytes, occupancy, busy pipes and what
warps wait for. By Nsight Compute (`ncu`); a rehearsal runs the same operations without the tool."""

import csv
import re
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from bench.hardware.sizes import counted_cases
from bench.hardware.watched import watch
from bench.work import CaseFailed, Work

TOOL = "ncu"
SECTIONS = (
    *("SpeedOfLight", "MemoryWorkloadAnalysis", "ComputeWorkloadAnalysis"),
    *("Occupancy", "LaunchStats", "WarpStateStats"),
)
MARKER = "_idle_kernel"
OURS = r"regex:^_(idle|inject|strip|matmul|sum_splits|qkv|attention|step|combine|seal|unlock)_kernel$"
"""Kernels that are counted: not those of PyTorch, which draw the inputs."""
TO_WRITE = 6.0
"""Seconds that the tool needs after the last operation, and after the request to end."""
NAMES = {
    "gpu__time_duration.sum": "ns",
    "gpc__cycles_elapsed.avg.per_second": "clock_hz",
    "dram__bytes.sum.per_second": "dram_bytes_s",
    "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed": "dram_percent",
    "gpu__compute_memory_throughput.avg.pct_of_peak_sustained_elapsed": "memory_percent",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "sm_percent",
    "lts__t_sector_hit_rate.pct": "l2_hit_percent",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy_percent",
    "sm__maximum_warps_per_active_cycle_pct": "most_occupancy_percent",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "issue_percent",
    "sm__instruction_throughput.avg.pct_of_peak_sustained_active": "issue_percent",
    "launch__registers_per_thread": "registers",
    "launch__grid_size": "programs",
    "launch__block_size": "threads",
    "launch__waves_per_multiprocessor": "waves",
}
"""What is kept of the tool's metrics, and the names it has in lines."""
STALL = re.compile(r"smsp__average_warps_issue_stalled_(\w+?)_per_issue_active\.ratio")
PIPE = re.compile(r"sm__(?:inst_executed_)?pipe_(\w+?)(?:_cycles_active)?\.avg\.pct_of_peak_sustained_active")
MOST = 3
"""Of reasons to wait and of pipes in the table."""


def run(work: Work) -> None:
    work.case("counters", partial(count, work), limit=work.left(), least=15)


def count(work: Work) -> dict[str, Any]:
    """Raises: LeftOut where the tool is missing, CaseFailed where it counted nothing."""
    # The clocks are left alone: whoever measures is a guest on the card.
    options = ["--csv", "--page", "raw", "--print-units", "base", "--clock-control", "none", "--apply-rules", "no"]
    options += ["--kernel-name-base", "function", "--kernel-name", OURS]
    options += [x for name in SECTIONS for x in ("--section", name)]
    code, text, tool = watch("counted", work, TOOL, options, to_write=TO_WRITE)
    print(text, flush=True)
    kernels = list(counted(text, [case.id for case in counted_cases(work.rehearsal)]))
    if not work.rehearsal and not kernels:
        raise CaseFailed("nothing was counted: " + ("no end in time" if code is None else f"{TOOL} ended with {code}"))
    if code:
        raise CaseFailed(f"it ended with {code}", kernels=kernels)
    with open(work.folder / "profiles.txt", "a") as file:
        file.write(table(kernels))
    return {"kernels": kernels, "tool": tool}


def counted(text: str, operations: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Each kernel's counters, with the operation that launched it: the idle kernels around it tell its number."""
    operation = ""
    rows = [line for line in text.splitlines() if line.startswith('"')]
    for row in csv.DictReader(rows):
        programs = re.match(r"\((\d+)", row["Grid Size"])
        if programs is None:  # the row of units
            continue
        if MARKER in row["Kernel Name"]:
            before, is_end = divmod(int(programs[1]) - 1, 2)
            operation = "" if is_end else operations[before]
        elif operation:  # others made inputs
            yield {"operation": operation, "kernel": row["Kernel Name"], **figures(row)}


def figures(row: dict[str, str]) -> dict[str, Any]:
    """What is kept of a row of counters."""
    kept: dict[str, Any] = {"stalls": {}, "pipes": {}}
    for metric, text in row.items():
        try:
            value = float(text.replace(",", ""))
        except (AttributeError, ValueError):
            continue
        if name := NAMES.get(metric):
            kept[name] = value
        elif stall := STALL.fullmatch(metric):
            kept["stalls"][stall[1]] = value
        elif pipe := PIPE.fullmatch(metric):
            kept["pipes"][pipe[1]] = value
    return kept


def table(kernels: list[dict[str, Any]]) -> str:
    """A row for each kernel: time, bytes a second and in all, occupancy, the busiest pipes and what warps wait for most
    (warps waiting for each instruction issued)."""
    rows = ["counters: µs, GHz | DRAM GB/s, MB, % | SM % | occupancy %, of at most % | registers, programs x threads"]
    for kernel in kernels:
        ns, rate = kernel.get("ns", 0.0), kernel.get("dram_bytes_s", 0.0)

        def of(name: str, kernel: dict[str, Any] = kernel) -> str:
            return f"{kernel[name]:.0f}" if name in kernel else "–"

        clock = f"{kernel['clock_hz'] / 1e9:.2f}" if "clock_hz" in kernel else "–"
        text = f"{ns / 1e3:.1f}, {clock} | {rate / 1e9:.0f}, {rate * ns / 1e15:.1f}, {of('dram_percent')}"
        text += f" | {of('sm_percent')}"
        text += f" | {of('occupancy_percent')}, {of('most_occupancy_percent')} | {of('registers')}, {of('programs')}"
        text += f" x {of('threads')} | {_largest(kernel['pipes'], '%')} | waits for {_largest(kernel['stalls'])}"
        rows.append(f"{kernel['operation']}: {kernel['kernel']}: {text}")
    return "\n".join(rows) + "\n"


def _largest(values: dict[str, float], unit: str = "") -> str:
    ordered = sorted(values.items(), key=lambda pair: -pair[1])[:MOST]
    return ", ".join(f"{name} {value:.3g}{unit}" for name, value in ordered)
