"""A benchmark run: what is not timed, what does not stop it, and what an interruption leaves."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model

from bench import __main__ as command
from bench import first_call, model, operations, probe
from bench.contest import Case
from bench.lines import FAILED, LATE, PASSED, Lines, read
from bench.model import Field, Workload, measure
from bench.model_cases import (
    COMPILED,
    EAGER,
    NOISE,
    OF_PREFILL,
    OF_SPLIT,
    OF_TOKEN,
    PLAIN,
    REDUNDANT,
    SCX,
    ModelCase,
)
from bench.operation_cases import OPERATIONS
from bench.results import content_of, failures, load_results
from bench.rounds import Job, in_rounds
from bench.shapes import SHAPES, Shape
from bench.timing import OUT_OF_MEMORY, attempt
from bench.work import Work

CPU = torch.device("cpu")


def entry(name: str = "SCX", **more: Any) -> dict[str, Any]:
    times = {"median": 1.0, "q20": 1.0, "q80": 1.0, "again": 0.0}
    return {"suite": "model", "contestants": [{"name": name, "kind": "scx", "ms": times, **more}]}


def raising(error: BaseException) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        raise error

    return call


@pytest.fixture
def tiny_case(monkeypatch: pytest.MonkeyPatch) -> Case:
    monkeypatch.setitem(SHAPES, "tiny", Shape("tiny", 24, 4, 2, 8, 48, 2, 50))
    return Case("strip_restore", "tiny", 12, redundant=5, dtype="float32")


def with_contestant(monkeypatch: pytest.MonkeyPatch, name: str, call: Callable[..., Any]) -> None:
    """Replace SCX's contestant of an operation by one that computes `call`."""
    original = OPERATIONS[name]

    def contestants(case: Case) -> tuple[Any, ...]:
        first, *others = original.contestants(case)
        return (type(first)(first.name, first.kind, call), *others)

    replaced = type(original)(**{**vars(original), "contestants": contestants})
    monkeypatch.setitem(OPERATIONS, name, replaced)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), OUT_OF_MEMORY),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"), OUT_OF_MEMORY),
        (RuntimeError("No available kernel.\nmore"), "raised RuntimeError: No available kernel."),
    ],
)
def test_attempt(error: Exception, expected: str) -> None:
    assert attempt(raising(error)) == (None, expected)
    assert attempt(lambda: 3) == (3, None)


def test_interruptions_are_not_swallowed() -> None:
    with pytest.raises(KeyboardInterrupt):
        attempt(raising(KeyboardInterrupt()))


class Clock:
    """Seconds that pass when somebody says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def work_for(folder: Path, until: float = 1e9, clock: Callable[[], float] | None = None) -> Work:
    return Work("bench", Lines(folder / "run.jsonl"), until, clock=clock or Clock())


def job(name: str, *entries: Callable[[], dict[str, Any]], **options: Any) -> Job:
    """One whose rounds give these entries."""
    return Job(name, lambda: (call() for call in entries or (entry,)), **options)


def measured_in(folder: Path) -> list[str]:
    """The ids of the cases measured, in the order of their first line."""
    return [one["id"] for one in content_of(read(folder / "run.jsonl"))["cases"]]


def test_a_line_after_every_case(tmp_path: Path) -> None:
    """Whoever interrupts keeps what was measured before."""
    seen = []

    def looks() -> dict[str, Any]:
        seen.append(measured_in(tmp_path))
        return entry()

    jobs = [job(f"case {number}", looks) for number in range(3)]
    with pytest.raises(KeyboardInterrupt):
        in_rounds(work_for(tmp_path), [*jobs, job("case 3", raising(KeyboardInterrupt()))])
    assert seen == [[], ["case 0"], ["case 0", "case 1"]]
    assert measured_in(tmp_path) == ["case 0", "case 1", "case 2"]


def test_the_last_line_of_a_case_is_its_result(tmp_path: Path) -> None:
    """Rounds add up in one entry."""
    in_rounds(work_for(tmp_path), [job("x", *(lambda n=n: {**entry(), "rounds": n} for n in range(1, 5)), few=2)])
    lines = read(tmp_path / "run.jsonl")
    assert [line["result"]["rounds"] for line in lines] == [2, 3, 4]
    (found,) = content_of(lines)["cases"]
    assert (found["id"], found["rounds"]) == ("x", 4)


def test_a_case_that_raises_is_not_the_last(tmp_path: Path) -> None:
    work = work_for(tmp_path)
    in_rounds(work, [job("a", raising(ValueError("no"))), job("b")])
    states = {line["case"]: (line["state"], line.get("cause")) for line in read(tmp_path / "run.jsonl")}
    assert states == {"a": (FAILED, "ValueError: no"), "b": (PASSED, None)}


def test_late_cases_are_named(tmp_path: Path) -> None:
    """When its time is up a run begins no further case and says which ones it did not begin."""
    in_rounds(work_for(tmp_path, until=0.5), [job("too late", raising(AssertionError("began")))])
    (text,) = content_of(read(tmp_path / "run.jsonl"))["left_out"]
    assert "1 cases: no time: too late" in text


# The machine's time.


class Machine:
    """Jobs as long as they say they take, times a machine's slowness, on a clock of their own."""

    def __init__(self, folder: Path, seconds: float, slowness: float = 1.0) -> None:
        self.clock, self.slowness, self.folder = Clock(), slowness, folder
        self.order: list[str] = []
        self.work = work_for(folder, seconds, self.clock)

    def job(self, name: str, rounds: int, few: int = 2, seconds: float = 2.0, **options: Any) -> Job:
        def steps() -> Any:
            for _ in range(rounds):
                self.clock.now += self.slowness * seconds / few
                self.order.append(name)
                yield entry()

        return Job(name, steps, few=few, seconds=seconds, **options)

    def late(self) -> str:
        return "".join(line["cause"] for line in read(self.folder / "run.jsonl") if line["state"] == LATE)


def test_marked_cases_come_first_and_nothing_is_repeated_before_all_have_a_few(tmp_path: Path) -> None:
    machine = Machine(tmp_path, 100)
    jobs = [machine.job(name, 4, is_marked=name.isupper()) for name in "aBcD"]
    in_rounds(machine.work, jobs)
    assert "".join(machine.order) == "BBDD" + "aacc" + 2 * "aBcD"
    assert not machine.late()


def test_rounds_follow_the_time_that_is_left(tmp_path: Path) -> None:
    """A machine twice as slow makes fewer rounds of everything, not all rounds of fewer cases."""
    counts = {}
    for slowness in (1, 2, 3):
        machine = Machine(tmp_path / str(slowness), 26, slowness)
        machine.folder.mkdir()
        in_rounds(machine.work, [machine.job(name, 8) for name in "abcd"])
        counts[slowness] = [machine.order.count(name) for name in "abcd"]
        assert machine.clock.now <= 26
    assert counts == {1: [7, 7, 6, 6], 2: [4, 3, 3, 3], 3: [2, 2, 2, 2]}


def test_what_does_not_fit_is_named_and_what_does_is_measured(tmp_path: Path) -> None:
    """By how long the first cases took: a dear one that would exceed the time makes way for cheap ones."""
    machine = Machine(tmp_path, 60, 5)
    jobs = [machine.job("first", 2), machine.job("dear", 2, seconds=12.0), machine.job("cheap", 2)]
    in_rounds(machine.work, jobs)
    assert machine.order == ["first", "first", "cheap", "cheap"]
    assert machine.late() == "no time: dear"


@pytest.mark.skipif(torch.cuda.is_available(), reason="about the jobs of a machine without CUDA")
def test_a_slow_machine_measures_every_marked_case(tmp_path: Path) -> None:
    """The default run's own jobs within its own time, five times slower: all marked ones, then others; each of those
    with its few rounds; the rest is named. On a usual machine nothing is left out."""
    work = work_for(tmp_path)
    real = command.wanted_jobs(work, CPU, False, "")
    names = {one.id for one in real}
    for slowness, is_complete in ((1, True), (5, False)):
        folder = tmp_path / str(slowness)
        folder.mkdir()
        machine = Machine(folder, 60 * command.MINUTES["cpu"], slowness)
        # The processes of a first call are those of the first such case.
        seconds = {
            one.id: one.usual_seconds() if "first call" not in one.id or "imports" in one.id else 0.01 for one in real
        }
        jobs = [machine.job(one.id, 2 * one.few, one.few, seconds[one.id], is_marked=one.is_marked) for one in real]
        in_rounds(machine.work, jobs)
        assert machine.clock.now <= 60 * command.MINUTES["cpu"]
        begun = dict.fromkeys(machine.order)
        few = {one.id: one.few for one in real}
        assert all(machine.order.count(name) >= few[name] for name in begun)
        marked = [one.id for one in real if one.is_marked]
        assert list(begun)[: len(marked)] == marked
        assert len(marked) >= 20
        assert all(name in machine.late() for name in names - begun.keys())
        assert (begun.keys() == names) == is_complete


def test_a_wrong_operation_is_not_timed(tiny_case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Off by one part in a thousand: failed, with no time; its rivals are measured."""
    with_contestant(monkeypatch, "strip_restore", lambda i: OPERATIONS["strip_restore"].plain(i) * 1.001)
    found = operations.measure(tiny_case, CPU, 1)
    scx, unfused, copy = found["contestants"]
    assert scx["status"].startswith("failed: error")
    assert "ms" not in scx
    assert unfused["ms"]["median"] > 0 < copy["ms"]["median"]
    assert failures({"cases": [{"id": "x", **found}]}) == [f"x, SCX: {scx['status']}"]


def test_an_unwritten_element_is_seen(tiny_case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.use_deterministic_algorithms(False)  # the benchmark itself must fill fresh memory

    def half_written(i: Any) -> torch.Tensor:
        right = OPERATIONS["strip_restore"].plain(i)
        out = torch.empty_like(right)
        out[:, :-1] = right[:, :-1]
        return out

    with_contestant(monkeypatch, "strip_restore", half_written)
    assert operations.measure(tiny_case, CPU, 1)["contestants"][0]["status"] == "failed: an element was not written"
    assert not torch.are_deterministic_algorithms_enabled()


def test_out_of_memory_in_one_contestant(tiny_case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    with_contestant(monkeypatch, "strip_restore", raising(torch.OutOfMemoryError("CUDA out of memory")))
    scx, unfused, _ = operations.measure(tiny_case, CPU, 1)["contestants"]
    assert scx["status"] == OUT_OF_MEMORY
    assert "ms" in unfused


def test_out_of_memory_in_a_whole_case(tiny_case: Case, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Inputs that do not fit mark their case; the next one is measured."""
    broken = type(OPERATIONS["strip_restore"])(
        **{**vars(OPERATIONS["strip_restore"]), "make": raising(torch.OutOfMemoryError("CUDA out of memory"))}
    )
    monkeypatch.setitem(OPERATIONS, "strip_restore", broken)
    second = Case("inject_permute", "tiny", 12, dtype="float32")
    monkeypatch.setattr(operations, "cases", lambda on_cuda: [tiny_case, second])
    in_rounds(work_for(tmp_path), operations.jobs(CPU, False))
    first, other = content_of(read(tmp_path / "run.jsonl"))["cases"]
    assert (first["status"], first["contestants"]) == (OUT_OF_MEMORY, [])
    assert "ms" in other["contestants"][0]


@pytest.fixture(scope="module")
def field() -> Field:
    return Field(tiny_model(), "random")


def test_contestants_share_weights(field: Field) -> None:
    """Five contestants hold one set of weights, and encoding one of them leaves the others plain."""
    plain, encoded = (field.model(contestant) for contestant in (PLAIN, SCX))
    assert all(a is b for a, b in zip(plain.parameters(), encoded.parameters(), strict=True))
    assert type(plain.model) is not type(encoded.model)
    assert field.model(EAGER).config._attn_implementation == "eager"
    assert plain.config._attn_implementation == "sdpa"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["prefill", "token"])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_whole_model(field: Field, kind: str, batch: int) -> None:
    """Every contestant agrees, with a cache that was lengthened by the same random K and V, and is timed."""
    contestants = OF_PREFILL if kind == "prefill" else OF_TOKEN
    found = measure(field, ModelCase("tiny", kind, 21, batch, "float32", contestants), 0.0)
    assert found["rounds"] == model.LEAST_ROUNDS
    for contestant in found["contestants"]:
        assert "status" not in contestant, contestant
        assert contestant["ms"]["median"] > 0
        assert contestant["memory_bytes"] > 0
    assert found["contestants"][0]["ratio"] == {"median": 1.0, "q20": 1.0, "q80": 1.0, "again": 0.0}
    assert json.loads(json.dumps(found)) == found


def test_a_split_model(field: Field) -> None:
    """Both ways to cross agree with the plain model and say what crossed; the secure side's modules are copies, the
    blocks' weights are not."""
    found = measure(field, ModelCase("tiny", "prefill", 21, 1, "float32", OF_SPLIT), 0.0)
    _, _, few, paper, covered = found["contestants"]
    assert not [c for c in found["contestants"] if "status" in c or "ms" not in c]
    assert few["boundary_bytes"] < paper["boundary_bytes"] < covered["boundary_bytes"]
    assert (paper["round_trips"], paper["blocks"]) == (12, 3)
    assert few["round_trips"] < 12
    split = field.model(OF_SPLIT[2])
    assert split.model.embed_tokens.weight is not field.base.model.embed_tokens.weight
    assert split.model.layers[0].mlp.up_proj.weight is field.base.model.layers[0].mlp.up_proj.weight
    assert field.base(torch.ones(1, 2, dtype=torch.int64)).logits.isfinite().all()


@torch.no_grad()
def test_lengthened_caches_hold_the_context(field: Field) -> None:
    for contestant in (PLAIN, SCX):
        workload = Workload(field, ModelCase("tiny", "token", 21, 2, "float32"), contestant)
        assert workload.prepare().get_seq_length() == 21


@torch.no_grad()
def test_lengthened_caches_have_room(field: Field) -> None:
    """No timed step grows an encoded cache: in a conversation one in many does, and its copy is not a token's cost."""
    workload = Workload(field, ModelCase("tiny", "token", 100, 2, "float32"), SCX)
    cache = workload.prepare()
    before = [layer.keys.data_ptr() for layer in cache.layers]
    workload.run(cache)
    assert cache.get_seq_length() == 100 + model.STEPS
    assert [layer.keys.data_ptr() for layer in cache.layers] == before


@torch.no_grad()
def test_a_static_cache_is_lengthened(field: Field) -> None:
    """The compiled contestant's workload, without compiling it: a static cache gives the plain model's logits."""
    case = ModelCase("tiny", "token", 21, 1, "float32")
    plain, static = (Workload(field, case, contestant) for contestant in (PLAIN, COMPILED))
    static.forward = static.model.forward
    torch.testing.assert_close(static.run(static.prepare()), plain.run(plain.prepare()))


def test_a_wrong_model_is_not_timed(field: Field, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Workload.run

    def wrong(self: Workload, cache: Any) -> torch.Tensor:
        return original(self, cache) * (1.01 if self.contestant is REDUNDANT else 1)

    monkeypatch.setattr(Workload, "run", wrong)
    found = measure(field, ModelCase("tiny", "prefill", 9, 1, "float32", (PLAIN, EAGER, SCX, REDUNDANT)), 0.0)
    *right, failed = found["contestants"]
    assert failed["status"].startswith("failed: logits differ by 0.01")
    assert "ms" not in failed
    assert all("ms" in contestant for contestant in right)


def test_a_model_out_of_memory_while_timed(field: Field, monkeypatch: pytest.MonkeyPatch) -> None:
    original = model.turn

    def turn(workload: Workload) -> tuple[float, torch.Tensor]:
        turns.append(workload.contestant)
        if workload.contestant is NOISE and turns.count(NOISE) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(workload)

    turns: list[Any] = []
    monkeypatch.setattr(model, "turn", turn)
    case = ModelCase("tiny", "prefill", 9, 1, "float32", (PLAIN, EAGER, NOISE, SCX))
    plain, eager, noisy, scx = measure(field, case, 0.0)["contestants"]
    assert noisy["status"] == OUT_OF_MEMORY
    assert "ms" not in noisy
    assert plain["ms"]["median"] > 0 < eager["ms"]["median"]
    assert scx["ratio"]["median"] > 0


def test_a_plain_model_out_of_memory(field: Field, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without anything to agree with SCX is not timed, and nobody says that it failed."""
    original = model.turn

    def turn(workload: Workload) -> tuple[float, torch.Tensor]:
        if workload.contestant is PLAIN:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(workload)

    monkeypatch.setattr(model, "turn", turn)
    found = {"id": "x", **measure(field, ModelCase("tiny", "prefill", 9, 1, "float32", (PLAIN, SCX)), 0.0)}
    plain, scx = found["contestants"]
    assert plain["status"] == OUT_OF_MEMORY
    assert scx["status"].startswith("not compared")
    assert not failures({"cases": [found]})
    json.dumps(found, allow_nan=False)


def test_a_model_that_does_not_fit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(model, "load", raising(torch.OutOfMemoryError("CUDA out of memory")))
    in_rounds(work_for(tmp_path), [one for one in model.jobs(CPU, False) if "context=8/" in one.id])
    cases = content_of(read(tmp_path / "run.jsonl"))["cases"]
    assert [one["status"] for one in cases] == [OUT_OF_MEMORY] * 2


@pytest.mark.parametrize("on_cuda", [False, True])
def test_first_calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, on_cuda: bool) -> None:
    """Processes that are to compile anew never find a cache that another one of SCX left; a warm-up's time is told."""
    seen: dict[Path, list[str]] = {}

    def probe(who: str, cache: Path) -> dict[str, float]:
        seen.setdefault(cache, []).append(who)
        figures = {"libraries": 4.0, "package": 1.0, "first": 10.0 * len(seen[cache]), "second": 3.0}
        return {**figures, "warm-up": 50.0} if who == "warmed" else figures

    monkeypatch.setattr(first_call, "_probe", probe)
    in_rounds(work_for(tmp_path), first_call.jobs(torch.device("cuda" if on_cuda else "cpu"), False))
    kept = ["scx"] if on_cuda else []
    assert list(seen.values()) == [["plain", "scx", *kept], ["plain", "scx", *kept], ["warmed"]]
    found = {
        entry["id"].removeprefix("first call/"): {c["name"]: c["ms"]["median"] for c in entry["contestants"]}
        for entry in content_of(read(tmp_path / "run.jsonl"))["cases"]
    }
    assert found["warm-up"] == {"SCX, warmed up": 50.0}
    cold = {"SCX, cold": 20.0, "SCX, Triton's cache kept": 30.0} if on_cuda else {"SCX": 20.0}
    assert found["first request"] == {"plain": 10.0, **cold, "SCX, warmed up": 10.0}


@pytest.mark.parametrize("who", ["plain", "scx", "warmed"])
def test_a_process_tells_its_first_calls(monkeypatch: pytest.MonkeyPatch, who: str) -> None:
    monkeypatch.setattr(probe, "_small_model", lambda torch, model_class: tiny_model())
    found = probe.probe(who)
    warm_up = {"warm-up"} if who == "warmed" else set()
    assert found.keys() == {"libraries", "package", "first", "second"} | warm_up
    assert all(milliseconds > 0 for milliseconds in (found["first"], found["second"], *map(found.get, warm_up)))


@pytest.fixture
def command_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[int, dict[str, Any]]]:
    """Runs `python -m bench` with these arguments and stand-ins for suites' jobs: (exit status, result)."""

    def call(*words: str, **suites: Callable[..., Any]) -> tuple[int, dict[str, Any]]:
        monkeypatch.setattr(sys, "argv", ["bench", *words])
        monkeypatch.setattr(command, "LATEST", tmp_path)
        monkeypatch.setattr(command, "measure_ceilings", lambda device, *needed: {"needed": needed})
        monkeypatch.setattr(command, "show", lambda content: None)
        monkeypatch.setattr(command, "write_report", lambda content, path: [])
        for module in command.SUITES.values():
            name = module.removeprefix("bench.")
            monkeypatch.setattr(f"{module}.jobs", suites.get(name, lambda *args: ()))
        status = command.main()
        (path,) = tmp_path.glob("*.json")
        return status, load_results(path)

    return call


def test_an_interrupted_command(command_line: Callable[..., Any]) -> None:
    """What was measured before is kept, told and said to be incomplete."""
    jobs = [job("model/x"), job("model/y", raising(KeyboardInterrupt()))]
    status, content = command_line(model=lambda *args: jobs)
    assert status == 130
    assert [e["id"] for e in content["cases"]] == ["model/x"]
    assert "interruption" in content["left_out"][-1]
    assert content["interrupted"]


def test_only_wanted_cases(command_line: Callable[..., Any]) -> None:
    """By words of which one is in the name; the ceilings are measured in their dtypes and rounds."""
    _, content = command_line("--only", "Strip_restore,first", first_call=lambda *args: [job("first call"), job("no")])
    assert [e["id"] for e in content["cases"]] == ["first call"]
    assert not content["ceilings"]
    names = ("operations/strip_restore/SmolLM2/tokens=1/redundant=0/batch=1/float32", "operations/attention/x")
    _, content = command_line("--only", "Strip_restore,first", operations=lambda *args: map(job, names))
    assert [e["id"] for e in content["cases"]] == [names[0]]
    assert content["ceilings"] == {"needed": [["float32"], []]}


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without CUDA leaves out")
def test_a_command_without_cuda(command_line: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    status, content = command_line("--commit", "abc")
    assert status == 0
    assert any(text.startswith("no CUDA") for text in content["left_out"])
    assert content["provenance"]["commit"] == "abc"


def test_a_suite_whose_packages_are_missing_is_named(
    command_line: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the others run."""

    def absent(*args: Any) -> Any:
        raise ModuleNotFoundError("No module named 'no_such_package'", name="no_such_package.part")

    status, content = command_line(model=absent, operations=lambda *args: [job("operations/x")])
    assert status == 0
    assert [e["id"] for e in content["cases"]] == ["operations/x"]
    assert "bench, whole models: needs no_such_package" in content["left_out"]


def test_a_failed_parity_fails_the_command(command_line: Callable[..., Any]) -> None:
    failed = {"suite": "other", "contestants": [{"name": "SCX", "kind": "scx", "status": "failed"}]}
    status, content = command_line(model=lambda *args: [job("x", lambda: failed)])
    assert status == 1
    assert content["cases"] == [{"id": "x", **failed}]
