"""`make hardware`: whatever a stage does, it ends within its limit with its line written, and the next one runs."""

import errno
import importlib.util
import json
import os
import shutil
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench.hardware import __main__ as command
from bench.hardware import runner as runner_module
from bench.hardware.report import content_of
from bench.hardware.runner import Runner, share_of_spare
from bench.hardware.stages import SECONDS, STAGES, Stage
from bench.hardware.table import MOST_LINES, table
from bench.lines import ENDED, FAILED, LATE, LEFT_OUT, PASSED, Lines, open_case, read

PLANTED = """
import os, signal, subprocess, sys, time
from bench.work import BROKEN, CaseFailed, LeftOut

def run(work):
    globals()[work.stage](work)

def fine(work):
    work.case("one", lambda: {"headlines": ["a figure"], "rate": float("inf")})
    work.case("two", lambda: None)

def wrong(work):
    work.case("raises", lambda: 1 / 0)
    work.case("fails", lambda: fail())
    work.case("waits", lambda: leave_out())
    work.case("right", lambda: None)

def fail():
    raise CaseFailed("an error of 3", error=3)

def leave_out():
    raise LeftOut("needs a tool")

def dies(work):
    work.case("before", lambda: None)
    work.case("kills", lambda: os.kill(os.getpid(), signal.SIGSEGV))
    work.case("exits", lambda: os._exit(3))
    work.case("after", lambda: None)

def dies_at_once(work):
    os._exit(4)

def breaks(work):
    for name in ("first", "second"):
        work.case(name, lambda: None)
        if name == "first" and not os.path.exists("MARKER"):
            open("MARKER", "w").close()
            sys.exit(BROKEN)

def floods(work):
    work.case("flood", lambda: [print("x" * 1000) for _ in range(20_000)] and None)
    print("the last words", flush=True)

def case_hangs(work):
    work.case("hangs", lambda: time.sleep(60), limit=0.5)
    work.case("next", lambda: None)

def hangs(work):
    work.case("hangs", lambda: time.sleep(60))

def runs_out(work):
    work.case("short", lambda: None)
    work.case("long", lambda: None, least=60)

def is_deaf(work):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    work.case("hangs", lambda: time.sleep(60))

def leaves_a_child(work):
    code = "import time; time.sleep(60)"
    for own_session in (False, True):
        child = subprocess.Popen([sys.executable, "-c", code], start_new_session=own_session)
        with open("CHILDREN", "a") as file:
            file.write(f"{child.pid}\\n")
    work.case("leaves", lambda: None)

def shares(work):
    for name in work.share("abcde"):
        work.case(name, lambda: {"parts": work.parts})

def half_right(work):
    work.case("good", lambda: None)
    work.case("bad", lambda: None if os.path.exists("MENDED") else fail())

def says_nothing(work):
    pass
"""
HANGING = ("hangs", "is_deaf")


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A folder with a module of planted stages, what their processes need to find it, and files that they make."""
    folder = tmp_path_factory.mktemp("planted")
    text = PLANTED
    for name in ("MARKER", "CHILDREN", "MENDED"):
        text = text.replace(name, str(folder / name))
    (folder / "planted.py").write_text(text)
    return SimpleNamespace(folder=folder, environment={"PYTHONPATH": str(folder)})


def stage(name: str, seconds: float = 20.0, **options: Any) -> Stage:
    return Stage(name, "planted", seconds, name, **{"anywhere": True, "packages": (), **options})


@pytest.fixture(scope="module")
def ran(planted: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A run of every planted stage, one after the other."""
    folder = tmp_path_factory.mktemp("results")
    names = (
        "fine",
        "wrong",
        "dies",
        "dies_at_once",
        "breaks",
        "floods",
        "case_hangs",
        *HANGING,
        "leaves_a_child",
        "runs_out",
    )
    stages = [stage(name, 4.5 if name in HANGING else 20.0) for name in names]
    stages += [Stage("absent", "no_such_package_here.part", 20.0, "", anywhere=True, packages=())]
    stages += [Stage("misspelt", "bench.hardware.no_such_module", 20.0, "", anywhere=True, packages=())]
    stages += [stage("unfit", packages=("no_such_package_here",)), stage("says_nothing"), stage("shares", parts=2)]
    run = Runner(folder, 300.0, environment=planted.environment)
    start = time.monotonic()
    run.run(tuple(stages))
    lines = run.read()
    return SimpleNamespace(
        folder=folder,
        stages=stages,
        lines=lines,
        seconds=time.monotonic() - start,
        of={line["stage"]: line for line in lines if "case" not in line},
        cases={(line["stage"], line["case"]): line for line in lines if "case" in line and line["state"] in ENDED},
    )


def test_limits() -> None:
    """All limits together stay below eight minutes, and a rehearsal's are the same."""
    assert sum(stage.seconds for stage in STAGES) < SECONDS <= 480
    assert len({stage.name for stage in STAGES}) == len(STAGES)
    assert all(importlib.util.find_spec(stage.module) for stage in STAGES)
    assert [stage.name for stage in STAGES if stage.is_last] == [STAGES[-1].name]
    assert all(stage.seconds > runner_module.GRACE + runner_module.LEAST for stage in STAGES)


def test_spare_time_goes_to_who_can_use_it() -> None:
    """What stages before left over is shared by those that take it; nobody's own limit is touched for it."""
    first, taker, last = stage("first", 10), stage("taker", 10, takes_spare=True), stage("last", 5)
    assert share_of_spare(40, (first, taker, last)) == 0
    assert share_of_spare(40, (taker, last)) == 25
    assert share_of_spare(40, (taker, first, taker)) == 5
    assert share_of_spare(12, (taker, last)) == 0


def test_every_stage_has_its_line_and_keeps_its_limit(ran: SimpleNamespace) -> None:
    assert list(ran.of) == [stage.name for stage in ran.stages]
    for stage in ran.stages:
        assert ran.of[stage.name]["seconds"] <= stage.seconds


def test_a_case_that_fails_leaves_the_others(ran: SimpleNamespace) -> None:
    assert ran.of["fine"]["state"] == PASSED
    assert ran.cases["fine", "one"]["rate"] == "inf"
    assert ran.of["wrong"]["cases"] == {PASSED: 1, FAILED: 2, LATE: 0, LEFT_OUT: 1}
    assert ran.of["wrong"]["cause"] == "ZeroDivisionError: division by zero"
    assert ran.cases["wrong", "fails"]["cause"] == "an error of 3"
    assert ran.cases["wrong", "fails"]["error"] == 3
    assert ran.cases["wrong", "waits"]["cause"] == "needs a tool"


def test_a_case_that_takes_its_process_along_leaves_the_others(ran: SimpleNamespace) -> None:
    assert ran.cases["dies", "kills"]["cause"] == "its process was ended by SIGSEGV"
    assert ran.cases["dies", "exits"]["cause"] == "its process ended with 3"
    assert ran.cases["dies", "after"]["state"] == PASSED
    assert ran.of["dies_at_once"]["cause"] == "its process ended with 4 outside of a case"
    assert ran.of["breaks"]["cases"] == {PASSED: 2, FAILED: 0, LATE: 0, LEFT_OUT: 0}


def test_a_case_that_hangs_costs_its_own_limit(ran: SimpleNamespace) -> None:
    assert ran.cases["case_hangs", "hangs"]["state"] == FAILED
    assert ran.cases["case_hangs", "hangs"]["cause"].startswith("no end within")
    assert ran.cases["case_hangs", "next"]["state"] == PASSED


@pytest.mark.parametrize("name", HANGING)
def test_a_stage_that_hangs_is_ended(ran: SimpleNamespace, name: str) -> None:
    """Also one that does not listen when it is asked to end."""
    assert ran.of[name]["state"] == LATE
    assert ran.cases[name, "hangs"]["state"] == LATE
    assert ran.cases[name, "hangs"]["cause"] == "the stage's time was up"


def test_a_case_without_time_is_not_begun(ran: SimpleNamespace) -> None:
    """And the stage counts as unfinished."""
    assert ran.of["runs_out"]["state"] == LATE
    assert ran.of["runs_out"]["cases"] == {PASSED: 1, FAILED: 0, LATE: 1, LEFT_OUT: 0}
    assert ran.cases["runs_out", "long"]["cause"].startswith("no time")


def test_what_a_stage_leaves_behind_is_ended(ran: SimpleNamespace, planted: SimpleNamespace) -> None:
    """Children in its session and in one of their own, which hold the pipe of its output."""
    assert ran.of["leaves_a_child"]["state"] == PASSED
    assert ran.of["leaves_a_child"]["seconds"] < 10
    children = (planted.folder / "CHILDREN").read_text().split()
    assert len(children) == 2
    for child in children:
        assert not is_running(int(child))


def is_running(process: int) -> bool:
    status = Path(f"/proc/{process}/stat")
    return status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_a_flood_of_output_is_cut(ran: SimpleNamespace) -> None:
    log = (ran.folder / "log.txt").read_bytes()
    assert len(log) < 2 * runner_module.LOG_BYTES
    assert b"bytes of output left out" in log
    assert b"the last words" in log


def test_what_is_missing_is_named(ran: SimpleNamespace) -> None:
    for name in ("absent", "unfit"):
        assert (ran.of[name]["state"], ran.of[name]["cause"]) == (LEFT_OUT, "needs no_such_package_here")
    assert ran.of["misspelt"]["state"] == FAILED
    assert ran.of["says_nothing"]["cause"] == "it had no case to run"


def test_parts_share_the_cases(ran: SimpleNamespace) -> None:
    parts = {line["case"]: (line["part"], line["parts"]) for (name, _), line in ran.cases.items() if name == "shares"}
    assert parts == {"a": (0, 2), "b": (1, 2), "c": (0, 2), "d": (1, 2), "e": (0, 2)}


def test_the_table_is_short(ran: SimpleNamespace) -> None:
    text = table(ran.lines)
    assert "a figure" in text
    assert "FAILED dies, kills: its process was ended by SIGSEGV" in text
    many = [{"stage": "s", "case": str(n), "state": FAILED, "cause": "c" * 500, "headlines": ["h"]} for n in range(200)]
    rows = table([*ran.lines, *many]).splitlines()
    assert len(rows) <= MOST_LINES
    assert max(map(len, rows)) <= 150
    assert "more, in stages.jsonl" in rows[-1]


def test_later_stages_have_what_is_left(planted: SimpleNamespace, tmp_path: Path) -> None:
    """What there is no time for is named; the last stage has its time kept."""
    stages = (stage("hangs", 30.0), stage("fine"), stage("shares", 5.5, is_last=True))
    run = Runner(tmp_path, 11.0, environment=planted.environment)
    start = time.monotonic()
    run.run(stages)
    assert time.monotonic() - start < 11
    hung, late, last = (line for line in run.read() if "case" not in line)
    assert hung["state"] == LATE
    assert hung["seconds"] <= hung["limit"] <= 5.5
    assert late["state"] == LATE
    assert late["cause"].startswith("left out, no time")
    assert last["state"] == PASSED


def test_only_what_failed_runs_again(planted: SimpleNamespace, tmp_path: Path) -> None:
    stages = (stage("fine", is_whole=True), stage("half_right", needs=("fine",)))
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    Runner(first, 60.0, environment=planted.environment).run(stages)
    (planted.folder / "MENDED").touch()
    again = first / "stages.jsonl"
    kept = command.chosen(stages, [], read(again))
    assert [stage.name for stage in kept] == ["fine", "half_right"]
    run = Runner(second, 60.0, again=again, environment=planted.environment)
    run.run(kept)
    ended = {line["case"]: line["state"] for line in run.read() if "case" in line}
    assert ended == {"one": PASSED, "two": PASSED, "bad": PASSED}, "what others need is measured anew"


def test_an_interruption_is_written(planted: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = time.sleep

    def sleep(seconds: float) -> None:
        original(0.5)
        monkeypatch.setattr(runner_module.time, "sleep", original)
        raise KeyboardInterrupt

    monkeypatch.setattr(runner_module.time, "sleep", sleep)
    run = Runner(tmp_path, 60.0, environment=planted.environment)
    assert command.run(tmp_path, (stage("hangs"), stage("fine")), run) == 130
    assert [line["cause"] for line in run.read() if line["state"] in ENDED] in (["interrupted"], ["interrupted"] * 2)
    assert (tmp_path / "table.txt").exists()


ALL = [stage.name for stage in STAGES]


@pytest.mark.parametrize(
    ("names", "unfinished", "expected"),
    [
        ([], ALL, ALL),
        (["parity"], ALL, ["parity", "report"]),
        (["marks"], ALL, ["ceilings", "compilation", "marks", "report"]),
        ([], ["marks", "models"], ["ceilings", "compilation", "marks", "models", "report"]),
        (["models"], ["marks", "models"], ["compilation", "models", "report"]),
    ],
)
def test_chosen_stages(names: list[str], unfinished: list[str], expected: list[str]) -> None:
    """Those asked for that an earlier run did not finish, what they need, and the report."""
    lines = [{"stage": name, "state": PASSED} for name in ALL if name not in unfinished]
    assert [stage.name for stage in command.chosen(STAGES, names, lines)] == expected


def refused(*arguments: str) -> int:
    return command.main([*map(str, arguments), "--dry-run"])


def test_bad_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before anything is measured."""
    file = tmp_path / "file"
    file.write_text("")
    filled = tmp_path / "filled"
    filled.mkdir()
    (filled / "results.json").write_text("{}")
    for folder, said in ((file, "it is a file"), (file / "below", "it is a file"), (filled, "not empty")):
        assert refused(folder) == 2
        assert said in capsys.readouterr().err
    assert refused("/proc/no/such") == 2
    assert "cannot be written" in capsys.readouterr().err
    assert refused("") == 2
    assert "name a folder" in capsys.readouterr().err
    assert os.listdir(filled) == ["results.json"]

    new = tmp_path / "new"
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 20))
        assert refused(new) == 2
    assert "1 MiB are free" in capsys.readouterr().err

    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert refused(new) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert not list(new.iterdir())


def test_bad_requests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(tmp_path / "a", "--only", "parity,nothing") == 2
    assert "--only nothing: the stages are ceilings, operations" in capsys.readouterr().err
    for name in ("absent.jsonl", "other.jsonl"):
        (tmp_path / "other.jsonl").write_text("{}\nnot JSON\n")
        assert refused(tmp_path / "a", "--again", tmp_path / name) == 2
        assert "expected the stages.jsonl of an earlier run" in capsys.readouterr().err
    whole = tmp_path / "whole.jsonl"
    whole.write_text("".join(json.dumps({"stage": stage.name, "state": PASSED}) + "\n" for stage in STAGES))
    assert refused(tmp_path / "a", "--again", whole) == 2
    assert "every stage of the earlier run passed" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_a_torn_line_is_no_line(tmp_path: Path) -> None:
    lines = Lines(tmp_path / "stages.jsonl")
    lines.write(stage="s", case="one", part=0, state="begun")
    with open(lines.path, "a") as file:
        file.write('{"stage": "s", "ca\n')
    lines.write(stage="s", case="two", part=1, state="begun")
    found = read(lines.path)
    assert [line["case"] for line in found] == ["one", "two"]
    assert open_case(found, "s", 1)["case"] == "two"
    lines.write(stage="s", case="two", part=1, state=PASSED)
    assert open_case(read(lines.path), "s", 1) is None


SITE = """
import sys
from importlib.machinery import PathFinder

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in MISSING else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
"""


@pytest.mark.slow
def test_missing_packages_are_named_and_the_rest_runs(tmp_path: Path) -> None:
    """Without cryptography, Triton, pytest and matplotlib: models, kernels, tests and pictures are left out by name."""
    site, folder = tmp_path / "site", tmp_path / "results"
    site.mkdir()
    folder.mkdir()
    missing = ("cryptography", "triton", "pytest", "matplotlib")
    (site / "sitecustomize.py").write_text(f"MISSING = {missing}{textwrap.dedent(SITE)}")
    wanted = {"operations", "profiles", "parity", "report"}
    stages = tuple(
        Stage(**{**vars(stage), "packages": ("torch",) if stage.name in ("profiles", "parity") else stage.packages})
        for stage in STAGES
        if stage.name in wanted
    )
    run = Runner(folder, SECONDS, rehearsal=True, environment={"PYTHONPATH": str(site)})
    about = {"cuda_device": None, "processor": "A", "threads": 1, "python": "3", "packages": {}, "commit": "c"}
    about |= {"date": "d", "warnings": [], "command": "x"}
    ceilings = {"copy_gb_s": 1.0, "product_tflop_s": {}}
    run.lines.write(stage="ceilings", case="versions", part=0, state=PASSED, result=about)
    run.lines.write(stage="ceilings", case="ceilings", part=0, state=PASSED, result=ceilings)
    times = {"median": 1.0, "q20": 1.0, "q80": 1.0, "again": 0.0}
    entry = {"id": "m/1", "suite": "model", "model": "m", "dtype": "d", "weights": "random", "kind": "prefill"}
    scx = {"name": "SCX", "kind": "scx", "ms": times, "ratio": times, "memory_bytes": 1, "logit_error": 0.0}
    plain = {**scx, "name": "plain, sdpa", "kind": "rival"}
    entry |= {"batch": 1, "context": 8, "contestants": [plain, scx]}
    run.lines.write(stage="models", case="m/1", part=0, state=PASSED, result=entry)
    run.run(stages)
    lines = run.read()
    causes = {(line["stage"], line["case"]): line.get("cause") for line in lines if "case" in line}
    assert causes["operations", "everything"] == "needs triton"
    assert causes["profiles", "everything"] == "needs cryptography"
    assert causes["parity", "unlock, small tiles"] == "needs pytest"
    assert causes["report", "context"] == "needs matplotlib"
    assert {line["stage"]: line["state"] for line in lines if "case" not in line} == {
        "operations": LEFT_OUT, "profiles": LEFT_OUT, "parity": LEFT_OUT, "report": PASSED,
    }  # fmt: skip
    content = content_of(lines)
    assert content["cases"] == [entry]
    assert content["ceilings"] == ceilings
    assert "operations, everything: needs triton" in content["left_out"]
    assert json.loads((folder / "results.json").read_text())["cases"] == [entry]
    assert "| 1 × 8 |" in (folder / "results.md").read_text()


@pytest.mark.slow
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    """A stage finds none; the others are not begun, and nothing passes for measured."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert command.main([str(tmp_path / "a"), "--only", "ceilings,marks"]) == 2
    said = capsys.readouterr()
    assert "No GPU here" in said.err
    assert "marks: left out, 0 s needs a GPU" in said.out
