"""A stage's process: `python -m bench.hardware.process GIVEN` imports a stage's module and calls its `run(work)`.

GIVEN is JSON: `module`, `packages` without which nothing of it runs, whether it runs `anywhere`, and what `Work` takes.
It ends with 0 however its cases ended; with BROKEN where the GPU answers no more and a fresh process must go on; with
anything else where a case took the process with it. The runner then says so and begins again after that case.
"""

import faulthandler
import importlib
import importlib.util
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.lines import Lines
from bench.work import LeftOut, Work, judged

EVERYTHING = "everything"
"""The case that stands for a stage whose module could not be imported, and for what happens between cases."""
NO_GPU = "needs a GPU"


def _check_needs(packages: Iterable[str], anywhere: bool) -> None:
    """Raises LeftOut for what is missing here."""
    for name in packages:
        if importlib.util.find_spec(name) is None:
            raise LeftOut(f"needs {name}")
    if not anywhere and not importlib.import_module("torch").cuda.is_available():
        raise LeftOut(NO_GPU)


def main(module: str, packages: list[str], anywhere: bool, lines: str, again: str | None, **options: Any) -> int:
    work = Work(lines=Lines(Path(lines)), again=again and Path(again), **options)
    faulthandler.enable()
    try:
        _check_needs(packages, anywhere or work.rehearsal)
        importlib.import_module(module).run(work)
    except Exception as error:  # of the import, or between cases
        state, figures = judged(error)
        work.lines.write(stage=work.stage, case=EVERYTHING, part=work.part, state=state, **figures)
    return 0


if __name__ == "__main__":
    sys.exit(main(**json.loads(sys.argv[1])))
