"""Everything that waits for a GPU, in one go: `python -m bench.hardware FOLDER`.

FOLDER, new or empty, receives at most 8 files: stages.jsonl (a line for each case and stage, as it ends), log.txt (what
everything printed), table.txt, results.json and results.md, two pictures, profiles.txt.
"""

import argparse
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import NoReturn

from bench.hardware.runner import Runner
from bench.hardware.stages import SECONDS, STAGES, Stage
from bench.hardware.table import table
from bench.lines import FAILED, LATE, PASSED, Line, read

ROOM = 64 << 20
"""Bytes that the folder's disk must have free."""
REHEARSAL = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}


class RefusedError(Exception):
    """Something is wrong with what was asked for; nothing has been measured."""


def check_folder(folder: Path) -> None:
    """Make the folder. Raises RefusedError where results could not be kept there, or would mix with others."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise RefusedError(f"{folder}: it is not empty; a run has a folder of its own")
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(bytes(1 << 16))
            file.flush()
            os.fsync(file.fileno())
    except (FileExistsError, NotADirectoryError):
        raise RefusedError(f"{folder}: it is a file, or lies below one; results need a folder") from None
    except OSError as error:
        raise RefusedError(f"{folder}: it cannot be written: {error.strerror or error}") from None
    free = shutil.disk_usage(folder).free
    if free < ROOM:
        raise RefusedError(f"{folder}: {free >> 20} MiB are free on its disk, results may need {ROOM >> 20}")


def check_again(path: Path) -> list[Line]:
    """The lines of an earlier run. Raises RefusedError if that is not what the file holds."""
    try:
        lines = read(path) if path.is_file() else []
    except OSError as error:
        raise RefusedError(f"{path}: it cannot be read: {error.strerror}") from None
    if not lines:
        raise RefusedError(f"{path}: expected the stages.jsonl of an earlier run")
    return lines


def chosen(stages: tuple[Stage, ...], only: list[str], earlier: list[Line]) -> tuple[Stage, ...]:
    """The stages asked for, or of an earlier run those that did not pass; with what they need, and what runs always.

    Raises: RefusedError for a name that no stage has, or if nothing is left to run.
    """
    names = {stage.name for stage in stages}
    if unknown := [name for name in only if name not in names]:
        raise RefusedError(f"--only {' '.join(unknown)}: the stages are {', '.join(stage.name for stage in stages)}")
    passed = {line["stage"] for line in earlier if "case" not in line and line["state"] == PASSED}
    wanted = {
        stage.name
        for stage in stages
        if (not only or stage.name in only) and (stage.is_last or stage.name not in passed)
    }
    if not any(stage.name in wanted and (not stage.is_last or stage.name in only) for stage in stages):
        raise RefusedError("every stage of the earlier run passed")
    needed = {name for stage in stages if stage.name in wanted for name in stage.needs}
    return tuple(stage for stage in stages if stage.name in wanted | needed or stage.is_last)


def run(folder: Path, stages: tuple[Stage, ...], runner: Runner) -> int:
    """Run the stages and print the table. Returns the exit status."""
    interrupted = False
    try:
        runner.run(stages)
    except KeyboardInterrupt:
        interrupted = True
    lines = runner.read()
    text = table(lines, ["A rehearsal: no figure here says anything about a GPU."] if runner.rehearsal else [])
    (folder / "table.txt").write_text(text + "\n")
    print(f"\n{text}", flush=True)
    if interrupted:
        return 130
    states = [line["state"] for line in lines if "case" not in line]
    return 1 if FAILED in states or LATE in states or PASSED not in states else 0


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def main(given: list[str] | None = None) -> int:
    """Returns 0; 1 if something failed or was late; 2 if nothing could be run; 130 after an interruption."""
    parser = argparse.ArgumentParser(prog="python -m bench.hardware", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="for the results: new, or empty")
    parser.add_argument("--only", default="", metavar="STAGES", help=", ".join(stage.name for stage in STAGES))
    parser.add_argument("--again", metavar="FILE", help="stages.jsonl of an earlier run: what passed is not run again")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for everything (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="rehearse every stage on the CPU, at small sizes")
    options = parser.parse_args(given)
    folder = options.folder.absolute()
    try:
        if str(options.folder) in ("", "."):
            raise RefusedError("name a folder for the results (make hardware OUT=folder)")
        again = Path(options.again).absolute() if options.again else None
        earlier = check_again(again) if again else []
        stages = chosen(STAGES, options.only.replace(",", " ").split(), earlier)
        check_folder(folder)
    except RefusedError as refused:
        print(refused, file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, _interrupt)
    environment = REHEARSAL if options.dry_run else {}
    runner = Runner(folder, options.seconds, options.dry_run, again, environment)
    status = run(folder, stages, runner)
    if runner.lacks_gpu():
        print("No GPU here: --dry-run rehearses every stage on the CPU.", file=sys.stderr)
        return 2
    return status


if __name__ == "__main__":
    sys.exit(main())
