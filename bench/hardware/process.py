"""A stage's process: `python -m bench.hardware.process MODULE ...` imports a stage's module and calls its `run(work)`.

It ends with 0 however its cases ended; with BROKEN where the GPU answers no more and a fresh process must go on; with
anything else where a case took the process with it. The runner then says so and begins again after that case.
"""

import argparse
import faulthandler
import importlib
import importlib.util
import sys
from pathlib import Path

from bench.lines import Lines
from bench.work import LeftOut, Work, judged

EVERYTHING = "everything"
"""The case that stands for a stage whose module could not be imported, and for what happens between cases."""
NO_GPU = "needs a GPU"


def _check_needs(packages: str, anywhere: bool) -> None:
    """Raises LeftOut for what is missing here."""
    for name in packages.split(","):
        if importlib.util.find_spec(name) is None:
            raise LeftOut(f"needs {name}")
    if anywhere:
        return
    import torch

    if not torch.cuda.is_available():
        raise LeftOut(NO_GPU)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.hardware.process")
    parser.add_argument("module", help="with the stage's run(work)")
    parser.add_argument("--stage", required=True)
    parser.add_argument("--lines", type=Path, required=True)
    parser.add_argument("--until", type=float, required=True)
    parser.add_argument("--part", type=int, default=0)
    parser.add_argument("--parts", type=int, default=1)
    parser.add_argument("--since", type=int, default=0)
    parser.add_argument("--again", type=Path)
    parser.add_argument("--rehearsal", action="store_true")
    parser.add_argument("--anywhere", action="store_true", help="the stage needs no GPU")
    parser.add_argument("--packages", default="sys", help="without which nothing of it runs")
    given = vars(parser.parse_args(arguments))
    module, anywhere, packages = (given.pop(name) for name in ("module", "anywhere", "packages"))
    work = Work(given.pop("stage"), Lines(given.pop("lines")), given.pop("until"), **given)
    faulthandler.enable()
    try:
        _check_needs(packages, anywhere or work.rehearsal)
        importlib.import_module(module).run(work)
    except Exception as error:  # of the import, or between cases
        state, figures = judged(error)
        work.lines.write(stage=work.stage, case=EVERYTHING, part=work.part, state=state, **figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
