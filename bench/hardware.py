"""`make hardware`: what waits for a GPU, in one go: parity of every kernel there, a memory check, benchmarks.

The parity tests compile many small variants, so they run as a process for each file and dtype, side by side. The memory
check runs every operation once under compute-sanitizer, where that is installed. The benchmarks then have the machine
to themselves and write its result file. Without a GPU the kernels run in Triton's interpreter, and it says so.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
DTYPES = ("float32", "float16", "bfloat16")
BY_DTYPE = (
    "test_kernel_rows.py",
    "test_kernel_product.py",
    "test_kernel_qkv.py",
    "test_kernel_attention.py",
    "test_kernel_unlock.py",
    "test_sealed_cache.py",
    "test_operations.py",
)
WHOLE = ("test_sealing.py", "test_memory.py", "test_hardware.py", "test_tiles.py")


def run(name: str, command: list[str], seconds: float) -> bool:
    """Run a command; print how it ended, and its output where that was not well."""
    start = time.perf_counter()
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False)
        output, ended = done.stdout + done.stderr, "passed" if done.returncode == 0 else "FAILED"
    except subprocess.TimeoutExpired as late:
        output, ended = (late.stdout or b"").decode(errors="replace"), "NOT DONE IN TIME"
    last = output.strip().splitlines()[-1:] or [""]
    print(f"{name}: {ended} after {time.perf_counter() - start:.0f} s ({last[0][:100]})", flush=True)
    if ended != "passed":
        print(output[-4000:], flush=True)
    return ended == "passed"


def parity(jobs: int, seconds: float) -> bool:
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    work = [(f"{file} {dtype}", [*pytest, f"tests/{file}", "-k", dtype]) for file in BY_DTYPE for dtype in DTYPES]
    others = " and ".join(f"not {dtype}" for dtype in DTYPES)
    work += [(f"{file}, the rest", [*pytest, f"tests/{file}", "-k", others]) for file in BY_DTYPE]
    work += [(file, [*pytest, f"tests/{file}"]) for file in WHOLE]
    with ThreadPoolExecutor(jobs) as pool:
        return all(list(pool.map(lambda job: run(*job, seconds), work)))


def memory_check(seconds: float) -> bool:
    tool = shutil.which("compute-sanitizer")
    if tool is None or not torch.cuda.is_available():
        print(f"memory check: left out, {'no GPU' if tool else 'compute-sanitizer is not installed'}")
        return True
    tests = [sys.executable, "-m", "pytest", "-q", "tests/test_operations.py", "-k", "backends_agree and bfloat16"]
    return run("memory check", [tool, "--tool", "memcheck", "--error-exitcode", "1", *tests], seconds)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.hardware", description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="tests side by side (default: %(default)s)")
    parser.add_argument("--parity-seconds", type=float, default=200, help="for each group of tests")
    parser.add_argument("--minutes", type=float, default=4, help="for the benchmarks (default: %(default)s)")
    parser.add_argument("--only-parity", action="store_true")
    options, passed = parser.parse_args(), True
    print(torch.cuda.get_device_name() if torch.cuda.is_available() else "No GPU: kernels run in Triton's interpreter.")
    passed &= parity(options.jobs, options.parity_seconds)
    if options.only_parity:
        return 0 if passed else 1
    passed &= memory_check(60)
    command = [sys.executable, "-m", "bench", "--keep", "--minutes", str(options.minutes)]
    passed &= subprocess.run(command, cwd=ROOT, check=False).returncode == 0
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
