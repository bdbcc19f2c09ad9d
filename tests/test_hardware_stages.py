"""The stages of `make hardware`: each finds what it is there to find, and all of them rehearse on any machine."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from bench.contest import Case
from bench.hardware import __main__ as command
from bench.hardware import blocks, compilation, counters, models, parity, sanitizer, selection
from bench.hardware.operations import examine
from bench.hardware.runner import Runner
from bench.hardware.sizes import checked_cases, marked_cases, sanitized_cases
from bench.hardware.stages import SECONDS, STAGES, Stage
from bench.hardware.table import MOST_LINES
from bench.lines import FAILED, LATE, PASSED, read
from bench.marks import MARKS
from bench.model_cases import ModelCase
from bench.operation_cases import OPERATIONS
from bench.shapes import SMALL_SHAPES
from bench.work import CaseFailed, Late, LeftOut, judged
from scx.warmup import PROMPTS

CPU = torch.device("cpu")
PATIENCE = 4
ROOT = Path(__file__).parents[1]
CASE = Case("strip_restore", "rehearsal", 9, redundant=3, dtype="float32")


def with_call(monkeypatch: pytest.MonkeyPatch, name: str, call: Any) -> None:
    """Replace what SCX computes in an operation."""
    original = OPERATIONS[name]

    def contestants(case: Case) -> tuple[Any, ...]:
        first, *others = original.contestants(case)
        return (type(first)(first.name, first.kind, call), *others)

    monkeypatch.setitem(OPERATIONS, name, type(original)(**{**vars(original), "contestants": contestants}))


# Operations.


@pytest.mark.parametrize("name", ["strip_restore", "unlock+in place", "attention_step"])
def test_operations_pass(name: str) -> None:
    """Also one that writes into its inputs: each repeat has its own."""
    (case,) = (case for case in checked_cases(True) if case.operation == name)
    assert examine(case, CPU, 3)["repeats"] == 3


def test_a_race_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """One bit that is other in the seventh call of fifty, within every tolerance."""
    calls = []

    def racing(i: Any) -> Tensor:
        out = OPERATIONS["strip_restore"].plain(i)
        calls.append(out)
        if len(calls) == 8:
            out.view(torch.int32)[0, 0, 0] ^= 1
        return out

    with_call(monkeypatch, "strip_restore", racing)
    with pytest.raises(CaseFailed, match="SCX: other bits in repeat 6 of 50: a race"):
        examine(CASE, CPU, 50)


def test_a_wrong_or_unwritten_result_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with_call(monkeypatch, "strip_restore", lambda i: OPERATIONS["strip_restore"].plain(i) * 1.001)
    with pytest.raises(CaseFailed, match="SCX: failed: error"):
        examine(CASE, CPU, 1)
    monkeypatch.undo()

    def half_written(i: Any) -> Tensor:
        right = OPERATIONS["strip_restore"].plain(i)
        out = torch.empty_like(right)
        out[:, :-1] = right[:, :-1]
        return out

    with_call(monkeypatch, "strip_restore", half_written)
    with pytest.raises(CaseFailed, match="not written"):
        examine(CASE, CPU, 1)


def test_sizes() -> None:
    """Every operation is checked and sanitized; every mark is measured, first those of the short table."""
    assert {case.operation for case in checked_cases(False)} == set(OPERATIONS)
    assert {case.operation for case in sanitized_cases(False)} == set(OPERATIONS)
    assert {case.rounds for case in checked_cases(False)} == {0, 20, 12, 8}
    marked = marked_cases(False)
    assert len(set(marked)) == len(marked)
    assert all(any(mark.is_for(vars(case)) for case in marked) for mark in MARKS)
    assert all(any(mark.is_for(vars(marked[0])) for mark in MARKS) for _ in MARKS)
    of_shape = {case.shape.head_dim for case in sanitized_cases(False)}
    assert of_shape == {128}, "tiles are chosen by the size of a head"


def test_every_prompt_of_the_warm_up_is_compiled_ahead() -> None:
    assert compilation.LENGTHS == PROMPTS


# Models.


def test_blocks_that_differ_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A later turn's last token that is off, and a generated token that the plain model was sure of."""
    right = blocks.plain(torch.float32, True)
    original = blocks.converse

    def off(model: Any, ids: Tensor) -> Tensor:
        logits = original(model, ids)
        logits[-1] *= 1.001
        return logits

    monkeypatch.setattr(blocks, "converse", off)
    with pytest.raises(CaseFailed, match="a token's logits differ by 0.001"):
        blocks.compare("bare", torch.float32, True)
    start = right.tokens[max(right.tokens)].shape[1]
    assert blocks.tokens_before_a_difference(right, right.generated) == right.generated.shape[1] - start
    least = right.model(right.generated[:, :-1]).logits[0, -1].argmin()
    changed = right.generated.clone()
    changed[0, -1] = least
    with pytest.raises(CaseFailed, match="of generate differs"):
        blocks.tokens_before_a_difference(right, changed)


def test_the_most_telling_models_come_first() -> None:
    """All lengths and batches that were asked for, with plain eager and sdpa; compiled ones last."""
    cases = [case for case, _ in models.cases()]
    of_prefill = {case.context for case in cases if case.kind == "prefill"}
    of_token = {(case.batch, case.context) for case in cases if case.kind == "token"}
    assert of_prefill == {8, 128, 1024, 4096, 10_240}
    assert {context for _, context in of_token} == {1024, 8192, 32_768}
    assert {case.batch for case in cases} == {1, 8, 64}
    assert [case.suffix for case in cases[-2:]] == ["/compiled"] * 2
    for case in cases[:-2]:
        assert {"plain, sdpa", "plain, eager", "SCX", "SCX, sealed"} <= {c.name for c in case.contestants}


def test_models_that_fit_no_gpu_are_left_out() -> None:
    """By weights and caches, not by a run that ends in the middle."""
    shape = SMALL_SHAPES["rehearsal"]
    assert shape.parameters == sum(x.numel() for x in LlamaForCausalLM(shape.config()).parameters())
    for kind, batch, context, _ in models.SIZES:
        models.check_memory(ModelCase(models.MODEL, kind, context, batch, "bfloat16", ()), 144 * 10**9)
    large = ModelCase(models.MODEL, "token", 8192, 64, "bfloat16", ())
    with pytest.raises(LeftOut, match="needs a GPU with 95 GiB, this one has 79"):
        models.check_memory(large, 79 * 2**30)


# Parity.


def test_one_of_every_kind_comes_first() -> None:
    """A kind is a function with its dtypes, whatever the names; within a kind the order stays."""
    half, bfloat = torch.float16, torch.bfloat16
    given = [("a", 0, half), ("a", 1, half), ("a", 2, bfloat), ("b", 0, None), ("b", 1, None), ("c", 0, None)]
    items: list[Any] = [
        SimpleNamespace(nodeid=f"f.py::{name}[{n}]", callspec=SimpleNamespace(params={"dtype": dtype} if dtype else {}))
        for name, n, dtype in given
    ]
    selection.pytest_collection_modifyitems(items)
    assert [item.nodeid[6:] for item in items] == ["a[0]", "a[2]", "b[0]", "c[0]", "a[1]", "b[1]"]


@pytest.mark.slow
def test_failed_tests_have_lines(tmp_path: Path) -> None:
    """As they fail; and all are counted at the end."""
    (tmp_path / "test_some.py").write_text(
        "import pytest, torch\n"
        "@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=['x', 'y'])\n"
        "def test_two(dtype): assert dtype is not torch.float16, 'half'\n"
        "@pytest.mark.parametrize('dtype', [torch.float16])\n"
        "def test_three(dtype): pass\n"
    )
    totals, lines = tmp_path / "totals.json", tmp_path / "stages.jsonl"
    told = ["--totals", totals, "--lines", lines, "--stage", "parity"]
    run = [sys.executable, "-m", "pytest", "-q", "-p", "bench.hardware.selection", tmp_path / "test_some.py", *told]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(list(map(str, run)), cwd=tmp_path, env=environment, check=False, stdout=subprocess.DEVNULL)
    tests = json.loads(totals.read_text())["tests"]
    assert (tests["passed"], tests["failed"], tests["late"]) == (2, 1, 0)
    (line,) = read(lines)
    assert (line["stage"], line["case"], line["state"]) == ("parity", "test_some.py::test_two[x]", FAILED)
    assert line["cause"].startswith("AssertionError: half")


@pytest.mark.parametrize(("until", "begins"), [(-1.0, False), (60.0, True)])
def test_no_test_begins_after_its_time(until: float, begins: bool) -> None:
    item: Any = SimpleNamespace(config=SimpleNamespace(getoption=lambda name: time.monotonic() + until))
    with nullcontext() if begins else pytest.raises(pytest.skip.Exception, match=selection.NO_TIME):
        selection.pytest_runtest_setup(item)


def test_what_had_no_time_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that passed are no pass where others never began; one that fails is what the line tells of."""
    work: Any = SimpleNamespace(
        left=lambda: 30.0, rehearsal=True, stage="parity", part=0, lines=SimpleNamespace(path="")
    )
    found = {"passed": 7, "failed": 0, "error": 0, "late": 2}

    def pretend(command: list[str], **options: Any) -> Any:
        Path(command[command.index("--totals") + 1]).write_text(json.dumps({"tests": found, "waiting": []}))
        return SimpleNamespace(returncode=int(found["failed"] > 0))

    monkeypatch.setattr(subprocess, "run", pretend)
    with pytest.raises(Late, match="7 tests passed, 2 had no time") as late:
        parity.pytest_run(parity.groups(True)[0], work)
    assert judged(late.value)[0] == LATE
    found["failed"] = 1
    with pytest.raises(CaseFailed, match="1 tests failed, 7 passed"):
        parity.pytest_run(parity.groups(True)[0], work)
    found |= {"failed": 0, "late": 0}
    assert parity.pytest_run(parity.groups(True)[0], work)["tests"]["passed"] == 7


def test_parity_takes_files_that_exist() -> None:
    """Kernels in small and in production tiles, with files that the suite has."""
    kernels = [group.tiles for group in parity.groups(False) if set(parity.KERNELS) <= set(group.files)]
    assert kernels == ["production", "small"]
    for group in (*parity.groups(False), *parity.groups(True)):
        assert all((ROOT / "tests" / file).exists() for file in group.files)


# The sanitizer.

SAID = """\
========= COMPUTE-SANITIZER
operation: operations/unlock/narrow
operation: operations/attention/narrow
========= Invalid __global__ read of size 2 bytes
=========     at _attention_kernel+0x3f0
=========     by thread (3,0,0) in block (1,0,0)
========= Error: Race reported between Write access at _attention_kernel+0x10
=========     and Read access at _attention_kernel+0x40 [512 hazards]
========= ERROR SUMMARY: 2 errors
"""


def test_complaints_are_of_the_operation_above_them() -> None:
    found = sanitizer.complaints(SAID)
    assert list(found) == ["operations/attention/narrow"]
    invalid, race = found["operations/attention/narrow"]
    assert invalid == "Invalid __global__ read of size 2 bytes"
    assert race.startswith("Error: Race reported")
    assert not sanitizer.complaints("operation: x\n========= ERROR SUMMARY: 0 errors\nError: not the tool's\n")


def test_races_in_vendors_kernels_are_told_and_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others are; so is what lies outside of memory, in whoever's kernel."""
    race = "Error: Race reported between Read access at {}+0xab0"
    assert sanitizer.is_of_others(race.format("nvjet_sm90_tst_64x64_64x13_4x1_v_bz_TNT"))
    assert not sanitizer.is_of_others(race.format("_matmul_kernel"))
    assert not sanitizer.is_of_others("Invalid __global__ read of size 2 bytes")
    tool = tmp_path / "compute-sanitizer"
    said = f"operation: operations/attention/narrow\n========= {race.format('cudnn_generated')}\n"
    tool.write_text(f"#!/bin/sh\ncat <<'END'\n{said}END\nexit {sanitizer.COMPLAINED}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    work: Any = SimpleNamespace(rehearsal=False, left=lambda: 30.0)
    figures = sanitizer.sanitize("racecheck", work)
    assert list(figures["complaints_of_others"]) == ["operations/attention/narrow"]
    assert not figures["complaints"]


def test_a_tool_that_complains_fails_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tool of the name on the path, which says what the real one says and ends as that does."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\ncat <<'END'\n{SAID}END\nexit 86\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    work: Any = SimpleNamespace(rehearsal=False, left=lambda: 30.0)
    with pytest.raises(CaseFailed, match="1 operations: operations/attention/narrow: Invalid") as failed:
        sanitizer.sanitize("memcheck", work)
    assert failed.value.figures["operations"] == 2
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(Exception, match="needs compute-sanitizer"):
        sanitizer.sanitize("memcheck", work)


# Counters.

COUNTED = """\
==PROF== Connected to process 7 (/usr/bin/python3.12)
"ID","Kernel Name","Block Size","Grid Size","gpc__cycles_elapsed.avg.per_second",\
"dram__bytes.sum.per_second","gpu__time_duration.sum",\
"launch__registers_per_thread","sm__warps_active.avg.pct_of_peak_sustained_active",\
"smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio",\
"smsp__average_warps_issue_stalled_wait_per_issue_active.ratio",\
"sm__inst_executed_pipe_alu.avg.pct_of_peak_sustained_active"
"","","","","hz","byte/s","ns","register/thread","%","inst","inst","%"
"0","_idle_kernel","(32, 1, 1)","(1, 1, 1)","1,750,000,000","1","1","16","1","1","1","1"
"1","_unlock_kernel","(128, 1, 1)","(9, 1, 1)","1,750,000,000","2,000,000,000,000","10,000","32","61.5","1.5","2.5","12"
"2","_idle_kernel","(32, 1, 1)","(2, 1, 1)","1,750,000,000","1","1","16","1","1","1","1"
"3","_seal_kernel","(128, 1, 1)","(2, 1, 1)","1,750,000,000","1","1","16","1","1","1","1"
"4","_idle_kernel","(32, 1, 1)","(3, 1, 1)","1,750,000,000","1","1","16","1","1","1","1"
"5","_step_kernel","(128, 1, 1)","(9, 1, 1)","1,750,000,000","1,500,000,000,000","20,000","64","25","","0.25","80"
"6","_combine_kernel","(128, 1, 1)","(9, 1, 1)","1,750,000,000","1,000","3,000","16","6","0.5","0.25","1"
"7","_idle_kernel","(32, 1, 1)","(4, 1, 1)","1,750,000,000","1","1","16","1","1","1","1"
"8","_seal_kernel","(128, 1, 1)","(2, 1, 1)","1,750,000,000","1","1","16","1","1","1","1"
"""


def test_counters_are_of_the_operation_around_them() -> None:
    """Between the idle kernels around it; what lies elsewhere made inputs."""
    operations = ["operations/unlock/some", "operations/attention_step/some"]
    unlock, step, combine = counters.counted(COUNTED, operations)
    assert (unlock["operation"], unlock["kernel"]) == ("operations/unlock/some", "_unlock_kernel")
    assert unlock["dram_bytes_s"] * unlock["ns"] / 1e9 == 20e6
    assert unlock["stalls"] == {"long_scoreboard": 1.5, "wait": 2.5}
    assert step["operation"] == combine["operation"] == "operations/attention_step/some"
    assert step["pipes"] == {"alu": 80.0}
    rows = counters.table([unlock, step, combine]).splitlines()
    assert len(rows) == 4
    assert "10.0, 1.75 | 2000, 20.0, – | – | 62, – | 32" in rows[1]
    assert rows[1].endswith("waits for wait 2.5, long_scoreboard 1.5")


def test_a_tool_that_counts_nothing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tool of the name on the path: its counters go into the line and the file, or it is said that there are none."""
    said, tool = tmp_path / "said", tmp_path / "ncu"
    tool.write_text(f"#!/bin/sh\ncat {said}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    work: Any = SimpleNamespace(rehearsal=False, left=lambda: 30.0, folder=tmp_path)
    said.write_text("==ERROR== No kernels were profiled.\n")
    with pytest.raises(CaseFailed, match="nothing was counted: ncu ended with 0"):
        counters.count(work)
    said.write_text(COUNTED)
    assert len(counters.count(work)["kernels"]) == 3
    assert "_combine_kernel" in (tmp_path / "profiles.txt").read_text()
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(LeftOut, match="needs ncu"):
        counters.count(work)


# All of them.

PLANTED = """
import os, signal, time

def run(work):
    if work.stage == "fault":
        work.case("fault", lambda: os.kill(os.getpid(), signal.SIGSEGV))
    work.case("hang" if work.stage == "hang" else "fine", (lambda: time.sleep(60)) if work.stage == "hang" else dict)
"""


@pytest.mark.slow
def test_the_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every stage on this machine's CPU, with a fault and a hang planted among them: each ends within its limit, with
    its line written, and none but the planted ones is not well. Limits are longer here, for a machine with other work.
    """
    (tmp_path / "planted.py").write_text(PLANTED)
    planted = {"anywhere": True, "packages": ()}
    fault, hang = Stage("fault", "planted", 20, "", **planted), Stage("hang", "planted", 4.5, "", **planted)
    stages = tuple(dataclasses.replace(stage, seconds=PATIENCE * stage.seconds) for stage in STAGES)
    stages = (stages[0], fault, *stages[1:4], hang, *stages[4:])
    folder = tmp_path / "results"
    command.check_folder(folder)
    environment = {**command.REHEARSAL, "PYTHONPATH": str(tmp_path)}
    run = Runner(folder, PATIENCE * SECONDS, rehearsal=True, environment=environment)
    status = command.run(folder, stages, run)
    of_stage = {line["stage"]: line for line in run.read() if "case" not in line}
    assert list(of_stage) == [stage.name for stage in stages]
    assert all(of_stage[stage.name]["seconds"] <= stage.seconds for stage in stages)
    states = {name: line["state"] for name, line in of_stage.items()}
    causes = [line for line in run.read() if line.get("cause")]
    assert states == {name: {"fault": FAILED, "hang": LATE}.get(name, PASSED) for name in states}, causes
    assert status == 1
    files = {path.name for path in folder.iterdir()}
    assert {"stages.jsonl", "log.txt", "results.json", "results.md", "profiles.txt", "table.txt"} <= files
    assert len(files) <= 8
    assert len(capsys.readouterr().out.rstrip().split("\n\n", 1)[1].splitlines()) <= MOST_LINES
