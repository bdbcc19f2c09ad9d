"""Compile every kernel for machines that are not here, and read the result.

`python -m bench.offline [--quick] [--only NAME] [--write FILE]` runs each launcher on tensors without memory (the
"meta" device), records what it would launch, compiles that for cuda 80, 90, 100 and hip gfx942 and prints a table. It
exits with 1 when something does not compile, spills registers, wants more shared memory than the target has, or when a
half-precision product on sm_90 does without the Hopper matrix unit.
"""

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import triton

from bench.offline_cases import CASES, Launch
from bench.rehearsal.specialisation import gpu_target, variant_of
from bench.trees import tree_leaves
from scx_kernels import tiles
from scx_kernels.kernels import launch
from scx_kernels.kernels.launch import TARGETS, Target

BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
UNITS = ("HGMMA", "HMMA", "UTCMMA", "MFMA")
AMD_MATRIX = r"\bv_mfma_"
# Integer work by pipe: additions that became IMAD leave the pipe of logic and shifts free.
INTEGER = {"INT": r"\b(?:IADD3|VIADD|LOP3|SHF|PRMT|LEA|ISETP|SEL|IMAD)\b", "IMAD": r"\bIMAD\b"}
LOOP_END = r"\bBRA\b.*(\.L_x_\d+)\b|\bs_c?branch\w* (\.LBB\w+)"
AMD_INTEGER = r"\bv_(?:add|sub|xor|xad|or|and|lsh|alignb|perm|mad|mul|bfe|bfi|cmp|cndmask)\w*_[ibu]\d+"


@dataclass
class Row:
    case: str
    kernel: str
    dtype: str
    target: str
    tile: str
    registers: int
    stack: int
    shared: int
    matrix: str
    integer: str
    warps_resident: str
    problems: str


TITLES = {"registers": "regs", "integer": "int/B", "warps_resident": "warps"}


def _tool(name: str, *args: str) -> str:
    return subprocess.run([BINARIES / name, *args], check=True, capture_output=True, text=True).stdout


def _loops(assembly: str) -> list[str]:
    """The text between each backward branch and its label, the longest first."""
    lines = assembly.splitlines()
    labels = {found[1]: place for place, line in enumerate(lines) if (found := re.match(r"\s*(\.L\w+):", line))}
    found = []
    for end, line in enumerate(lines):
        target = re.search(LOOP_END, line)
        start = labels.get(target[1] or target[2], end) if target else end
        found += ["\n".join(lines[start : end + 1])] if start < end else []
    return sorted(found, key=len, reverse=True)


def _count(patterns: dict[str, str], assembly: str, loops: int) -> dict[str, int]:
    text = "\n".join(_loops(assembly)[:loops]) if loops else assembly
    return {name: len(re.findall(pattern, text)) for name, pattern in patterns.items()}


def read_nvidia(compiled: Any, target: Target, warps: int, loops: int) -> tuple[int, int, dict[str, int], int]:
    """Registers, stack bytes, counted instructions (integer ones of the longest `loops` alone, if any), resident warps
    of a multiprocessor."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        assembly = _tool("nvdisasm", "-c", file.name)
    registers = int(re.search(r"REG:(\d+)", usage)[1])
    stack = int(re.search(r"STACK:(\d+)", usage)[1])
    patterns = {"HGMMA": r"\bHGMMA\b", "HMMA": r"\bHMMA\b", "UTCMMA": r"\bUTC\w*MMA\b", "LDL": r"\bLDL\b|\bSTL\b"}
    counts = _count(patterns, assembly, 0) | _count(INTEGER, assembly, loops)
    shared_of_multiprocessor = {80: 167_936, 90: 233_472, 100: 233_472}[target.arch]
    by_registers = 65_536 // (-(-registers // 8) * 8 * 32 * warps)
    by_shared = shared_of_multiprocessor // (compiled.metadata.shared + 1024)
    return registers, stack, counts, warps * min(by_registers, by_shared, 64 // warps)


def read_amd(compiled: Any, target: Target, warps: int, loops: int) -> tuple[int, int, dict[str, int], int]:
    assembly = compiled.asm["amdgcn"]

    def field(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1])

    registers = field("vgpr_count") + field("agpr_count")
    spills = field("vgpr_spill_count") + field("private_segment_fixed_size")
    counts = _count({"MFMA": AMD_MATRIX}, assembly, 0) | _count({"INT": AMD_INTEGER}, assembly, loops)
    # Four SIMDs, 512 registers of a lane each, at most 8 waves; shared memory bounds whole workgroups.
    by_registers = 4 * min(8, 512 // (-(-registers // 8) * 8)) // warps
    by_shared = target.shared_memory // max(1, compiled.metadata.shared)
    return registers, spills, counts, warps * min(by_registers, by_shared, 32 // warps)


def targets() -> list[Target]:
    """Every kind of target with the heuristics' tiles, and every device that tiles are shipped for with those."""
    files = (json.loads(path.read_text()) for path in sorted(tiles.SHIPPED.glob("*.json")))
    return list(TARGETS.values()) + [
        replace(TARGETS[file["provenance"]["backend"], file["provenance"]["arch"]], name=file["device"])
        for file in files
    ]


def digest() -> str:
    """Of the kernels and of all that they are compiled for: the table in the repository says which it was made from."""

    def layout(x: Any) -> Any:
        return (x.dtype, x.shape, x.stride(), x.storage_offset()) if isinstance(x, torch.Tensor) else x

    found = hashlib.sha256()
    for source in sorted(Path(launch.__file__).parent.glob("*.py")):
        found.update(source.read_bytes())
    for case in CASES:
        arguments = dict(sorted(case.arguments(torch.float16).items()))
        about = case.name, case.launcher.__name__, case.dtypes, case.matrix, case.ciphered
        found.update(repr((about, [*arguments], [*map(layout, tree_leaves(arguments))])).encode())
    return found.hexdigest()[:16]


def keystream_bytes(case: Launch, meta: dict[str, Any], dtype_name: str) -> int:
    """Of the instructions that are counted; 0 where none are."""
    own = case.ciphered
    straight = own.keystreams * 64 * meta.get("BLOCK_U", 0)
    return straight + own.tiles * meta.get(own.tile_rows, 0) * meta.get("HEAD_DIM", 0) * DTYPES[dtype_name].itemsize


def integer_work(counts: dict[str, int], keystream_bytes: int, threads: int) -> str:
    """Integer instructions a byte of keystream, and those of them outside the multiply-add pipe."""
    if not keystream_bytes:
        return "-"
    thread_bytes = keystream_bytes / threads
    text = f"{counts['INT'] / thread_bytes:.1f}"
    if "IMAD" in counts:
        text += f" ({(counts['INT'] - counts['IMAD']) / thread_bytes:.1f})"
    return text


def waits(ptx: str) -> bool:
    """Whether a kernel waits for those launched before it, before it writes anything."""
    wait = ptx.find("griddepcontrol.wait")
    return 0 <= wait < ptx.find("st.global")


def compile_case(case_name: str, dtype_name: str, target: Target) -> list[Row]:
    case = next(case for case in CASES if case.name == case_name)
    launches: list[tuple[Any, ...]] = []
    with launch.recording(target, lambda *what: launches.append(what)):
        case.launcher(**case.arguments(DTYPES[dtype_name]))
    return [compile_launch(case, dtype_name, target, kernel, args, meta) for kernel, _, args, meta in launches]


def compile_launch(case: Launch, dtype_name: str, target: Target, kernel: Any, args: Any, meta: dict[str, Any]) -> Row:
    variant = variant_of(kernel, args, meta, target)
    options = dict(variant.options)
    tile = " ".join(f"{k.removeprefix('BLOCK_')}={v}" for k, v in meta.items() if k.startswith(("BLOCK", "SPLIT")))
    tile += f" w{options.get('num_warps', 4)} s{options.get('num_stages', '-')}"
    about = case.name, kernel.__name__, dtype_name, f"{target.backend}{target.arch}", tile
    try:
        compiled = triton.compile(variant.source(), target=gpu_target(target), options=options)
    except Exception as error:
        problem = str(error).splitlines()[-1][:160] if str(error) else repr(error)
        return Row(*about, 0, 0, 0, "", "", "", f"does not compile: {problem}")
    read, most_warps = (read_nvidia, 64) if target.backend == "cuda" else (read_amd, 32)
    warps, shared, adds_up = compiled.metadata.num_warps, compiled.metadata.shared, "combine" in kernel.__name__
    registers, stack, counts, resident = read(compiled, target, warps, 0 if adds_up else case.ciphered.loops)
    matrix = " ".join(f"{name} {count}" for name, count in counts.items() if count and name in UNITS) or "-"
    integer = integer_work(counts, keystream_bytes(case, meta, dtype_name), warps * target.warp_size)
    problems = []
    if stack or counts.get("LDL"):
        problems.append(f"spills ({stack} B, {counts.get('LDL', 0)} LDL/STL)")
    if shared > target.shared_memory:
        problems.append("shared memory")
    if options.get("launch_pdl") and not waits(compiled.asm["ptx"]):
        problems.append("is launched ahead and does not wait")
    if case.matrix and dtype_name != "fp32" and not adds_up and "sum" not in kernel.__name__:
        wanted = {90: case.matrix, 80: "HMMA", 100: "MMA", 942: "MFMA"}[target.arch]
        if wanted not in matrix:
            problems.append(f"no {wanted}")
    return Row(*about, registers, stack, shared, matrix, integer, f"{resident}/{most_warps}", ", ".join(problems))


def table(rows: Iterable[Row]) -> str:
    titles = tuple(TITLES.get(field.name, field.name) for field in fields(Row))
    lines = [titles] + [tuple(str(value) for value in vars(row).values()) for row in rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(titles))]
    return "\n".join("  ".join(v.ljust(w) for v, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a representative set only")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--dtype", default="", help="one dtype only")
    parser.add_argument("--arch", type=int, default=0, help="one target only")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--write", type=Path, help="a file for the table")
    options = parser.parse_args()
    work = [
        (case.name, dtype, target)
        for case in CASES
        if options.only in case.name and (case.quick or not options.quick)
        for dtype in case.dtypes
        for target in targets()
        if options.dtype in ("", dtype) and options.arch in (0, target.arch)
    ]
    with ProcessPoolExecutor(options.jobs) as pool:
        rows = [row for found in pool.map(compile_case, *zip(*work, strict=True)) for row in found]
    text = table(rows)
    failures = [row for row in rows if row.problems]
    summary = (
        f"{len(rows)} compilations of kernels {digest()} (torch {torch.__version__}, triton {triton.__version__}), "
        f"{len(failures)} failures"
    )
    print(text, summary, sep="\n")
    if options.write:
        options.write.write_text(f"{text}\n{summary}\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
