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
from bench.__main__ import SUITES
from bench.contest import Case
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
from bench.results import failures, load_results
from bench.run import OUT_OF_MEMORY, Run, attempt
from bench.shapes import SHAPES, Shape

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


def test_a_file_after_every_case(tmp_path: Path) -> None:
    run = Run(tmp_path / "a" / "run.json", {"cuda_device": None})
    for number in range(3):
        run.measure(f"case {number}", entry)
        assert [e["id"] for e in load_results(run.path)["cases"]] == [f"case {n}" for n in range(number + 1)]
    with pytest.raises(KeyboardInterrupt):
        run.measure("case 3", raising(KeyboardInterrupt()))
    run.finish(interrupted=True)
    content = load_results(run.path)
    assert content["interrupted"]
    assert len(content["cases"]) == 3
    assert [path.name for path in run.path.parent.iterdir()] == ["run.json"]


def test_only_wanted_cases(tmp_path: Path) -> None:
    run = Run(tmp_path / "run.json", {}, ["Attention", "first"])
    for name in ("operations/attention/x", "operations/strip/x", "first call"):
        run.measure(name, entry)
    assert [e["id"] for e in run.content["cases"]] == ["operations/attention/x", "first call"]


def test_late_cases_are_named(tmp_path: Path) -> None:
    """When its time is up a run begins no further case and says which ones it did not begin."""
    run = Run(tmp_path / "run.json", {}, minutes=0.0)
    run.measure("too late", raising(AssertionError("began")))
    run.finish(interrupted=False)
    assert "too late" in load_results(run.path)["left_out"][0]


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
    monkeypatch.setattr(operations, "measure_ceilings", lambda device, *needed: {"needed": needed})
    run = Run(tmp_path / "run.json", {})
    operations.run_operations(run, CPU)
    first, other = run.content["cases"]
    assert (first["status"], first["contestants"]) == (OUT_OF_MEMORY, [])
    assert "ms" in other["contestants"][0]
    assert run.content["ceilings"] == {"needed": (["float32"], [])}


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

    def turn(device: torch.device, workload: Workload) -> float:
        if workload.contestant is NOISE:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(device, workload)

    monkeypatch.setattr(model, "turn", turn)
    case = ModelCase("tiny", "prefill", 9, 1, "float32", (PLAIN, EAGER, NOISE, SCX))
    plain, eager, noisy, scx = measure(field, case, 0.0)["contestants"]
    assert noisy["status"] == OUT_OF_MEMORY
    assert "ms" not in noisy
    assert plain["ms"]["median"] > 0 < eager["ms"]["median"]
    assert scx["ratio"]["median"] > 0


def test_a_plain_model_out_of_memory(field: Field, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without anything to agree with SCX is not timed, and nobody says that it failed."""
    original = model.inspect

    def inspect(field: Field, workload: Workload) -> dict[str, Any]:
        if workload.contestant is PLAIN:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(field, workload)

    monkeypatch.setattr(model, "inspect", inspect)
    found = {"id": "x", **measure(field, ModelCase("tiny", "prefill", 9, 1, "float32", (PLAIN, SCX)), 0.0)}
    plain, scx = found["contestants"]
    assert plain["status"] == OUT_OF_MEMORY
    assert scx["status"].startswith("not compared")
    assert not failures({"cases": [found]})
    json.dumps(found, allow_nan=False)


def test_a_model_that_does_not_fit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(model, "load", raising(torch.OutOfMemoryError("CUDA out of memory")))
    run = Run(tmp_path / "run.json", {}, ["context=8/"])
    model.run_models(run, CPU)
    assert {e["status"] for e in run.content["cases"]} == {OUT_OF_MEMORY}


@pytest.mark.parametrize("on_cuda", [False, True])
def test_first_calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, on_cuda: bool) -> None:
    """Processes that are to compile anew never find a cache that another one of SCX left; a warm-up's time is told."""
    seen: dict[Path, list[str]] = {}

    def probe(who: str, cache: Path) -> dict[str, float]:
        seen.setdefault(cache, []).append(who)
        figures = {"libraries": 4.0, "package": 1.0, "first": 10.0 * len(seen[cache]), "second": 3.0}
        return {**figures, "warm-up": 50.0} if who == "warmed" else figures

    monkeypatch.setattr(first_call, "_probe", probe)
    run = Run(tmp_path / "run.json", {})
    first_call.run_first_call(run, on_cuda)
    kept = ["scx"] if on_cuda else []
    assert list(seen.values()) == [["plain", "scx", *kept], ["plain", "scx", *kept], ["warmed"]]
    found = {
        entry["id"].removeprefix("first call/"): {c["name"]: c["ms"]["median"] for c in entry["contestants"]}
        for entry in run.content["cases"]
    }
    assert found["warm-up"] == {"SCX, warmed up": 50.0}
    cold = {"SCX, cold": 20.0, "SCX, Triton's cache kept": 30.0} if on_cuda else {"SCX": 20.0}
    assert found["first request"] == {"plain": 10.0, **cold, "SCX, warmed up": 10.0}


@pytest.mark.parametrize("who", ["plain", "scx", "warmed"])
def test_a_process_tells_its_first_calls(monkeypatch: pytest.MonkeyPatch, who: str) -> None:
    monkeypatch.setattr(probe, "_small_model", lambda model_class: tiny_model())
    found = probe.probe(who)
    warm_up = {"warm-up"} if who == "warmed" else set()
    assert found.keys() == {"libraries", "package", "first", "second"} | warm_up
    assert all(milliseconds > 0 for milliseconds in (found["first"], found["second"], *map(found.get, warm_up)))


@pytest.fixture
def command_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[int, dict[str, Any]]]:
    """Runs `python -m bench` with these arguments and stand-ins for suites: (exit status, result)."""

    def call(*words: str, **suites: Callable[..., Any]) -> tuple[int, dict[str, Any]]:
        monkeypatch.setattr(sys, "argv", ["bench", *words])
        monkeypatch.setattr(command, "LATEST", tmp_path)
        stand_ins = [
            (what, packages, suites.get(suite.__name__, lambda *args: None)) for what, packages, suite in SUITES
        ]
        monkeypatch.setattr(command, "SUITES", stand_ins)
        status = command.main()
        (path,) = tmp_path.glob("*.json")
        assert path.with_suffix(".md").exists()
        return status, load_results(path)

    return call


def test_an_interrupted_command(command_line: Callable[..., Any]) -> None:
    """What was measured before is kept, told and said to be incomplete."""

    def models(run: Run, *rest: Any) -> None:
        run.measure("model/x", lambda: {**entry(), "suite": "other"})
        raise KeyboardInterrupt

    status, content = command_line(run_models=models)
    assert status == 130
    assert [e["id"] for e in content["cases"]] == ["model/x"]
    assert "interruption" in content["left_out"][-1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without CUDA leaves out")
def test_a_command_without_cuda(command_line: Callable[..., Any]) -> None:
    status, content = command_line("--commit", "abc")
    assert status == 0
    assert any(text.startswith("no CUDA") for text in content["left_out"])
    assert content["provenance"]["commit"] == "abc"


def test_a_suite_whose_packages_are_missing_is_named(
    command_line: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the others run."""
    found = command.find_spec
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == "cryptography" else found(name))
    begun = []
    status, content = command_line(
        run_models=lambda *args: begun.append("models"), run_operations=lambda *args: begun.append("operations")
    )
    assert status == 0
    assert begun == ["operations"]
    assert "whole models: needs cryptography" in content["left_out"]


def test_a_failed_parity_fails_the_command(command_line: Callable[..., Any]) -> None:
    def models(run: Run, *rest: Any) -> None:
        run.measure(
            "x", lambda: {"suite": "other", "contestants": [{"name": "SCX", "kind": "scx", "status": "failed"}]}
        )

    assert command_line(run_models=models)[0] == 1
