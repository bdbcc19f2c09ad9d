"""The benchmarks' case lists, and what they count: bytes, operations, memory, transfers."""

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any

import parity
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import scx_kernels
from bench import keystream, operations
from bench.attention_cases import DECOYS, exact_attention
from bench.contest import BOUND, OF_RIVALS, RIVAL, SCX, TRITON, Case, Contestant, Inputs, copied, key_of, nbytes, wide
from bench.model_cases import compiled_cases, model_cases
from bench.operation_cases import OPERATIONS, WITHOUT_REDUNDANT, cases
from bench.provenance import machine_name, warnings_of
from bench.shapes import SHAPES, Shape
from bench.timing import TransferCounter, peak_memory, rotating, spread, spread_twice
from scx_kernels.chacha import chacha_blocks

CPU = torch.device("cpu")
NOT_MEASURED = {
    "KeptKeystream", "Sealing", "WriteCounter", "accumulation_dtype", "backend", "check_permutation", "key_words",
}  # fmt: skip
"""They compute nothing on tensors of a model's size, or only within a step of a whole model, which is measured."""
NOT_ON_META = ("sdpa", "the cipher")  # no backend is available; ten seconds, and the same shapes as on a CPU
ROWS_READ = {
    "strip_restore": "z",
    "qkv_decode_encode": "z_q z_k z_v",
    "qkv_decode_encode+cache": "z_q z_k z_v",
    "qkv_decode_encode+sealed": "z_q z_k z_v",
    "qkv_decode_encode+sealed+opening": "z_q z_k z_v",
    "unlock": "cache",
    "unlock+in place": "cache",
}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Case:
    """A case of a shape that takes no time; operations are put in."""
    monkeypatch.setitem(SHAPES, "tiny", Shape("tiny", 24, 4, 2, 8, 48, 2, 50))
    return Case("", "tiny", 12, redundant=5, dtype="float32")


def case_of(tiny: Case, operation: str) -> Case:
    if "+sealed" in operation:
        tiny = dataclasses.replace(tiny, rounds=8)
    if operation.startswith("attention_step"):
        return dataclasses.replace(tiny, operation=operation, redundant=0, tokens=1, cached=19, batch=3)
    if operation == "attention+sealed":
        return dataclasses.replace(tiny, operation=operation, redundant=0, cached=19, batch=3)
    without = operation in WITHOUT_REDUNDANT or operation == "attention"
    return dataclasses.replace(tiny, operation=operation, redundant=0 if without else tiny.redundant)


@pytest.mark.parametrize("on_cuda", [False, True])
def test_ids_are_unique(on_cuda: bool) -> None:
    """Two results are compared by id."""
    found = [*cases(on_cuda), *model_cases(on_cuda, True), *compiled_cases(on_cuda, True)]
    assert len({case.id for case in found}) == len(found) > 20


def test_every_public_operation_is_measured() -> None:
    measured = {name.split("+")[0] for name in OPERATIONS}
    assert set(scx_kernels.__all__) - NOT_MEASURED <= measured, "add the operation to bench/operation_cases.py"
    for on_cuda in (False, True):
        assert {case.operation for case in cases(on_cuda)} == OPERATIONS.keys()


def test_sizes_on_cuda() -> None:
    """The sizes that are asked of a GPU: every shape, 1 to 16k tokens, none, 100 and as many redundant rows."""
    found = [case for case in cases(True) if case.operation == "permuted_linear"]
    assert {case.model for case in found} == SHAPES.keys()
    assert {1, 16384} <= {case.tokens for case in found}
    assert {(4096, 0), (4096, 100), (4096, 4096)} <= {(case.tokens, case.redundant) for case in found}
    sizes = {(case.kind, case.batch, case.context) for case in model_cases(True)}
    assert {("prefill", 1, context) for context in (8, 128, 512, 1024, 4096, 10240)} <= sizes
    assert {("token", batch, context) for batch in (1, 8, 64) for context in (128, 10240)} <= sizes


@pytest.mark.parametrize("name", OPERATIONS)
def test_contestants_agree(tiny: Case, name: str) -> None:
    """Everybody who is timed as a rival computes the operation's result."""
    case = case_of(tiny, name)
    operation = OPERATIONS[name]
    contestants = [c for c in operation.contestants(case) if c.kind != TRITON]
    problems = operations.check(operation, contestants, operation.make(case, CPU))
    assert problems[contestants[0].name] is None
    assert contestants[0].kind == SCX
    for contestant in contestants:
        problem = problems[contestant.name]
        assert problem is None or problem.startswith("not available: raised RuntimeError"), problem
    assert any(c.kind == "rival" and problems[c.name] is None for c in contestants)


@pytest.mark.parametrize("name", OPERATIONS)
def test_cases_on_cuda_fit_together(name: str) -> None:
    """Every size asked of a GPU, on tensors without memory: inputs fit the kernels' rules, contestants the result."""
    operation = OPERATIONS[name]
    for case in cases(on_cuda=True):
        if case.operation != name:
            continue
        inputs = operation.make(case, torch.device("meta"))
        found = {}
        for contestant in operation.contestants(case):
            if contestant.kind in (SCX, TRITON, RIVAL) and not contestant.name.startswith(NOT_ON_META):
                with scx_kernels.backend("triton"):
                    result = contestant.call(inputs)
                found[contestant.name] = [(x.shape, x.dtype) for x in operations.tensors_of(result)]
        expected = found.pop("SCX")
        assert expected
        assert all(result == expected for result in found.values()), (case.id, expected, found)


@pytest.mark.parametrize("name", OPERATIONS)
def test_counted_bytes(tiny: Case, name: str) -> None:
    """Each input read once, of row-permuted ones the rows that are used, and each output written once."""
    case = case_of(tiny, name)
    inputs = OPERATIONS[name].make(case, CPU)
    result = OPERATIONS[name].plain(inputs)
    used = {key: x for key, x in vars(inputs).items() if key not in OF_RIVALS}
    if "keys" in used:
        del used["keys"], used["values"]  # of the caches only the new tokens' slots are touched
        result = (*result[:-2], *(cache[:, :, : case.tokens] for cache in result[-2:]))
        if "sealing" in used:
            used["sealing"] = inputs.sealing.at(inputs.sealing.writes[:, : case.tokens])
    read = nbytes(used)
    stripped = sum(used[key].nbytes for key in ROWS_READ.get(name, "").split()) * case.redundant // case.rows
    decoys = 0
    if name == "attention_step+position":
        decoys = sum(used[key].nbytes for key in "kv") * DECOYS // (case.cached + DECOYS)
    assert OPERATIONS[name].bytes(case) == read - stripped - decoys + nbytes(*operations.tensors_of(result))


@pytest.mark.parametrize(
    ("operation", "sizes", "expected"),
    [
        ("strip_restore", {}, 4096 * (3 * 4096 * 2 + 8)),
        ("permuted_linear", {}, 2 * (4224 * (4096 + 6144) + 4096 * 6144) + 8 * 4224),
        ("qkv_decode_encode", {}, 2 * 4096 * (2 * 6144 + 2 * 128) + 8 * (4096 + 6144)),
        ("unlock", {}, 4096 * (2 * 1024 * 2 + 8)),
        ("attention_step", {"tokens": 1, "cached": 8192}, 2 * 2 * 8192 * 1024 + 4096 * (2 * 2 + 8)),
        (
            "attention_step+sealed",
            {"tokens": 1, "cached": 8192, "rounds": 20},
            2 * 2 * 8192 * 1024 + 4096 * (2 * 2 + 8) + 8 * 8192 + 32,
        ),
    ],
)
def test_bytes_counted_by_hand(operation: str, sizes: dict[str, int], expected: int) -> None:
    """At Llama-3-8B's sizes in bfloat16: hidden and Q 4096, K and V 1024 wide, heads of 128; an index is 8 bytes."""
    case = Case(operation, "Llama-3-8B", **{"tokens": 4096, "redundant": 128, **sizes})
    assert OPERATIONS[operation].bytes(case) == expected


@pytest.mark.parametrize(
    "name",
    [
        "permuted_linear",
        "permuted_linears",
        "permuted_linear+noise",
        "permuted_linear+noisy rows",
        "noise_image",
        "attention_step",
        "attention_step+position",
        "attention_step+sealed",
    ],
)
def test_counted_operations(tiny: Case, name: str) -> None:
    """Products are counted as PyTorch's own counter does."""
    case = case_of(tiny, name)
    operation = OPERATIONS[name]
    inputs = operation.make(case, CPU)
    with FlopCounterMode(display=False) as counter:
        (operation.plain if name.startswith(("permuted", "noise")) else exact_attention)(inputs)
    sampled = 2 / case.batch if name.startswith("attention") else 1  # the first and last of three sequences
    assert counter.get_total_flops() == operation.flops(case) * sampled


@pytest.mark.parametrize("name", [name for name in OPERATIONS if "+sealed" in name])
def test_counted_keystream(tiny: Case, name: str) -> None:
    """A byte for each byte of K and V that is sealed or unsealed."""
    case = case_of(tiny, name)
    inputs = OPERATIONS[name].make(case, CPU)
    rows = [x[:, :, : case.tokens] for x in (inputs.keys, inputs.values)] if "keys" in vars(inputs) else inputs.opened
    assert OPERATIONS[name].keystream(case) == nbytes(*rows)


@pytest.mark.parametrize("rounds", [20, 12, 8])
def test_a_seal_that_is_not_the_keystream_is_found(tiny: Case, rounds: int) -> None:
    """Rows whose keystream belongs to other numbers do not pass for the rows that were to be stored or read."""
    for name in (name for name in OPERATIONS if "+sealed" in name):
        case = dataclasses.replace(case_of(tiny, name), rounds=rounds)
        operation = OPERATIONS[name]
        scx, *_ = operation.contestants(case)

        def elsewhere(i: Inputs, scx: Contestant = scx) -> Any:
            return scx.call(Inputs(**{**vars(i), "sealing": i.sealing.at(i.sealing.writes + 1)}))

        wrong = dataclasses.replace(scx, name="other numbers", call=elsewhere)
        problems = operations.check(operation, (scx, wrong), operation.make(case, CPU))
        assert problems[scx.name] is None
        assert problems[wrong.name].startswith("failed")


def test_causal_attention_counts_pairs_that_see_each_other(tiny: Case) -> None:
    case = case_of(tiny, "attention")
    seen = torch.ones(case.tokens, case.tokens).tril().sum().item()
    assert OPERATIONS["attention"].flops(case) == 4 * case.shape.query_width * seen


def test_exact_attention_is_the_reference(tiny: Case) -> None:
    """Sampled queries by the formula against the whole of PyTorch's."""
    sealed = (("attention+sealed", 3), ("attention_step+sealed", 3))
    for name, batch in (("attention", 3), ("attention+encoding", 1), ("attention_step", 3), *sealed):
        operation = OPERATIONS[name]
        inputs = operation.make(dataclasses.replace(case_of(tiny, name), batch=batch), CPU)
        whole = operation.plain(wide(inputs))
        torch.testing.assert_close(operation.exact(inputs), operation.select(inputs, whole))


@pytest.mark.parametrize("name", [name for name, operation in OPERATIONS.items() if operation.writes])
def test_what_is_written_is_checked(tiny: Case, name: str) -> None:
    """A contestant that writes nothing does not pass on what another one wrote into the same cache."""
    case = case_of(tiny, name)
    operation = OPERATIONS[name]
    scx, *_ = operation.contestants(case)
    reads = Contestant("reads only", RIVAL, lambda i: None, finish=unwritten(name))
    problems = operations.check(operation, (scx, reads), operation.make(case, CPU))
    assert problems[scx.name] is None
    assert problems[reads.name].startswith("failed: error")


def unwritten(name: str) -> Callable[[Inputs, Any], Any]:
    """The result's caches as the inputs hold them."""
    if name.startswith("unlock"):
        return lambda i, _: i.cache[:, :, : i.position.shape[1]]
    return lambda i, _: (*OPERATIONS[name].plain(copied(i))[:-2], i.keys, i.values)


@pytest.mark.parametrize("wrong", ["one element off", "an element unwritten", "another shape"])
def test_disagreement_is_found(wrong: str) -> None:
    exact = torch.randn(40, 30, dtype=torch.float64)
    plain, got = exact.float(), exact.float()
    assert operations.disagreement(got, plain, exact) is None
    if wrong == "another shape":
        got = got[:-1]
    else:
        got[17, 3] += 1e-3 if wrong == "one element off" else float("nan")
    assert operations.disagreement(got, plain, exact).startswith("failed")


def test_copy_moves_the_counted_bytes(tiny: Case) -> None:
    case = case_of(tiny, "strip_restore")
    operation = OPERATIONS["strip_restore"]
    copy = next(c for c in operation.contestants(case) if c.kind == BOUND)
    moved = []
    inputs = operation.make(case, CPU)
    copy.call(inputs)
    with _Copies(moved):
        copy.call(inputs)
    assert abs(sum(moved) - operation.bytes(case)) <= 1


class _Copies(TransferCounter):
    """Notes what a copy reads and writes."""

    def __init__(self, moved: list[int]) -> None:
        super().__init__()
        self.moved = moved

    def _count(self, source: Tensor, target: Tensor | None) -> None:
        self.moved += [source.nbytes, target.nbytes]


def test_inputs_exceed_the_cache(tiny: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of(tiny, "strip_restore")
    operation = OPERATIONS["strip_restore"]
    first = operation.make(case, CPU)
    monkeypatch.setattr(operations, "CPU_CACHE", 4 * nbytes(*vars(first).values()))
    sets = operations.enough_inputs(operation, case, CPU, first)
    assert len(sets) == 8
    seen: list[int] = []
    call = rotating(lambda i: seen.append(id(i)), sets)
    for _ in range(16):
        call()
    assert seen == [id(i) for i in sets] * 2


def test_peak_memory() -> None:
    """Tensors alive at once count, freed ones and views do not."""
    x = torch.ones(1024)

    def two_at_once() -> Tensor:
        return (x + 1).mul(2).view(-1)[:5]

    def one_after_the_other() -> None:
        y = x + 1
        del y
        x.add(1)

    assert peak_memory(two_at_once, CPU) == 2 * x.nbytes
    assert peak_memory(one_after_the_other, CPU) == x.nbytes


def test_transfers_are_counted() -> None:
    """Both directions, with the dtype they have on the way; the meta device stands for an accelerator."""
    with TransferCounter() as seen:
        there = torch.ones(10).to("meta")
        there.copy_(torch.ones(10))
        torch.ones(3) + 1
    assert (seen.host_to_device, seen.device_to_host) == (80, 0)
    seen._count(there, None)
    assert seen.device_to_host == 40


def test_spread() -> None:
    assert spread([3.0, 1.0, 2.0, 5.0, 4.0, 6.0]) == pytest.approx({"median": 3.5, "q20": 2.0, "q80": 5.0})
    assert spread_twice([1.0, 2.0, 3.0], [2.0, 3.0, 4.0])["again"] == 0.5


@pytest.mark.parametrize(
    ("state", "load", "expected"),
    [
        ({"utilization.gpu": "3 %"}, 0.1, 0),
        ({"utilization.gpu": "6 %"}, 0.1, 1),
        ({"not readable": "no such file"}, 0.1, 1),
        (None, 0.1, 0),
        (None, 3.5, 1),
    ],
)
def test_a_busy_machine_is_said(state: dict[str, str] | None, load: float, expected: int) -> None:
    assert len(warnings_of(state, load, 8)) == expected


def test_machine_name() -> None:
    about = {"cuda_device": "NVIDIA H200", "processor": "Intel(R) Xeon(R) Processor", "threads": 2}
    assert machine_name(about) == "nvidia-h200"
    assert machine_name({**about, "cuda_device": None}) == "intel-xeon-2-threads"


def test_the_keystream_that_is_a_limit_is_the_cipher_s() -> None:
    """Of each block the XOR of its sixteen words."""
    device = parity.DEVICE
    key = key_of(device)
    states = torch.zeros(4, 256, dtype=torch.int32)
    states[0] = torch.arange(256)
    words = chacha_blocks(key.cpu(), states, 8)
    expected = functools.reduce(operator.xor, words.unbind(-1))
    assert torch.equal(keystream.fold(key, 256, 8).cpu(), expected)
