"""SCX beside what would run otherwise, on this machine: operations, whole models, and the first call.

Every case is written to the result file as soon as it is measured; an interrupted run keeps what it has.
"""

import argparse
import sys
from collections.abc import Callable
from importlib.util import find_spec

import torch

from bench.model_cases import left_out
from bench.provenance import RESULTS, machine_name, provenance
from bench.report import show, write_report
from bench.results import failures
from bench.run import Run

LATEST = RESULTS.parent / "latest"
MINUTES = {"cuda": 7.8, "cpu": 2.8}
SHARE_OF_MODELS = 0.6
"""Of the run's time, after which no further whole model is begun: the operations follow."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="WORDS", help="cases whose name contains one of these words")
    parser.add_argument("--minutes", type=float, help="begin no further case after these (default: 7.8; 2.8 on a CPU)")
    parser.add_argument("--all", action="store_true", help="also what takes too long on this machine, however long")
    parser.add_argument("--keep", action="store_true", help="write to bench/results instead of bench/latest")
    parser.add_argument("--commit", help="what to call the code where the checkout has no history")
    return parser.parse_args()


def run_models(run: Run, device: torch.device, everything: bool) -> None:
    from bench.model import run_models, run_split

    run_models(run, device, everything, SHARE_OF_MODELS)
    run_split(run, device, SHARE_OF_MODELS)


def run_first_call(run: Run, device: torch.device, everything: bool) -> None:
    from bench.first_call import run_first_call

    run_first_call(run, device.type == "cuda")


def run_host(run: Run, device: torch.device, everything: bool) -> None:
    from bench.host import run_host

    run_host(run, device)


def run_operations(run: Run, device: torch.device, everything: bool) -> None:
    from bench.operations import run_operations

    run_operations(run, device)


def run_compiled(run: Run, device: torch.device, everything: bool) -> None:
    from bench.model import run_compiled

    run_compiled(run, device, everything)


OF_SCX = ("transformers", "cryptography", "safetensors")
SUITES: tuple[tuple[str, tuple[str, ...], Callable[[Run, torch.device, bool], None]], ...] = (
    ("whole models", OF_SCX, run_models),
    ("first calls", OF_SCX, run_first_call),
    ("host time", ("triton", *OF_SCX), run_host),
    ("operations", (), run_operations),
    ("compiled models", OF_SCX, run_compiled),
)
"""(what, the packages that it needs beside torch, how it is run)."""


def measure(run: Run, device: torch.device, everything: bool) -> bool:
    """Run every suite whose packages are here; others are named as left out. Returns whether it was interrupted."""
    for text in left_out(device.type == "cuda", everything):
        run.leave_out(text)
    try:
        for what, packages, suite in SUITES:
            missing = [package for package in packages if find_spec(package) is None]
            if missing:
                run.leave_out(f"{what}: needs {', '.join(missing)}")
            else:
                suite(run, device, everything)
    except KeyboardInterrupt:
        return True
    return False


def main() -> int:
    """Returns 0, 1 if something of SCX failed, 130 after an interruption."""
    options = arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    about = provenance(options.commit)
    minutes = None if options.all else options.minutes or MINUTES[device.type]
    path = (RESULTS if options.keep else LATEST) / f"{machine_name(about)}.json"
    run = Run(path, about, options.only.replace(",", " ").split(), minutes)
    for text in about["warnings"]:
        print(f"doubtful: {text}", flush=True)
    interrupted = measure(run, device, options.all)
    run.finish(interrupted)
    show(run.content)
    print("written:", run.path, *write_report(run.content, run.path))
    if interrupted:
        return 130
    return 1 if failures(run.content) else 0


if __name__ == "__main__":
    sys.exit(main())
