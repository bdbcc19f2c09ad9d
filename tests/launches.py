"""Plans of launches, held against launchers as they are written. Run by `test_plans.py`, in a process of its own that
does not interpret kernels: they are compiled for a GPU that need not be here, and nothing is launched."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import triton
from torch import Tensor

import scx_kernels as ops
from bench import host
from bench.null_driver import NullDriver, no_launches
from scx_kernels import operations
from scx_kernels.kernels import attention, attention_step, plans, product, qkv, rows, sealing

HEADS, GROUPS, SIZE = 4, 2, 16
WIDTH = HEADS * SIZE


class Address(int):
    """Of a tensor that a launcher gave; a plan gives addresses as plain numbers."""


class Recording(NullDriver):
    """Keeps what would be launched: the grid, and every argument of the kernel, tensors by their address."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, ...]] = []

    def launched(self, name: str, grid: tuple[int, int, int], arguments: list[Any]) -> None:
        super().launched(name, grid, arguments)
        self.seen.append((name, grid, [Address(x.data_ptr()) if isinstance(x, Tensor) else x for x in arguments]))


@pytest.fixture(autouse=True)
def driver() -> Iterator[Recording]:
    plans.clear()
    recording = Recording()
    with torch.no_grad(), no_launches(recording), operations.accelerator("cpu"):
        yield recording
    plans.clear()


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape).to(dtype)


def index(*shape: int) -> Tensor:
    return torch.rand(*shape).argsort(-1)


def sealed(tokens: int, layer: int = 1) -> ops.Sealing:
    return ops.Sealing(ops.key_words(bytes(32)), torch.arange(tokens)[None].contiguous(), layer, 8)


def inject() -> Any:
    return rows.inject_permute, (randn(1, 5, WIDTH), index(1, 8), randn(1, 3, WIDTH)), {"norm_weight": randn(WIDTH)}


def inject_noisy_heads() -> Any:
    noise = {"noise": torch.ones(2, 8, WIDTH, dtype=torch.int32), "noise_step": 0.25}
    return rows.inject_permute, (randn(2, 8, WIDTH), None), {"feature_index": index(2, HEADS, SIZE), **noise}


def strip() -> Any:
    image = randn(8, WIDTH, dtype=torch.float32)
    return rows.strip_restore, (randn(1, 8, WIDTH), index(1, 8)[:, :5], randn(1, 5, WIDTH)), {"image": image}


def linear() -> Any:
    x = randn(1, 8, WIDTH, dtype=torch.float32)
    image = randn(8, 512, dtype=torch.float32)
    return product.permuted_linear, (x, randn(512, WIDTH), None, None, randn(512)), {"image": image}


def linears_split() -> Any:
    """Few rows and a deep inner dimension: the workspace of a split product, and a second kernel."""
    weights = [randn(width, 1024) for width in (64, 32, 32)]
    return product.permuted_linears, (randn(1, 1, 1024), weights), {"biases": [randn(len(w)) for w in weights]}


def linears_apart() -> Any:
    """Weights that are laid out differently: a launch each, into parts of one result."""
    weights = [randn(64, WIDTH), randn(WIDTH, 32).T, randn(32, WIDTH)]
    return product.permuted_linears, (randn(1, 3, WIDTH), weights), {}


def encode(tokens: int = 3, **options: Any) -> Any:
    z = [randn(1, tokens, heads * SIZE) for heads in (HEADS, GROUPS, GROUPS)]
    angles = [randn(1, tokens, SIZE) for _ in range(2)]
    keys = [index(1, heads, SIZE) for heads in (HEADS, GROUPS, GROUPS)]
    return qkv.qkv_decode_encode, (*z, None, *angles, *keys), options


def encode_into_cache() -> Any:
    return encode(keys=randn(1, GROUPS, 64, SIZE), values=randn(1, GROUPS, 64, SIZE), offset=7)


def encode_sealed() -> Any:
    caches = {"keys": randn(1, GROUPS, 64, SIZE), "values": randn(1, GROUPS, 64, SIZE)}
    return encode(**caches, sealing=sealed(64), return_unsealed=True)


def attend() -> Any:
    """Into the next encoding, whose inverse is computed, under a mask whose rows are copied to be aligned."""
    q, k, v = randn(1, HEADS, 5, SIZE), randn(1, GROUPS, 7, SIZE), randn(1, GROUPS, 7, SIZE)
    options = {"row_index": index(1, 8), "redundant": randn(1, 3, WIDTH), "mask": torch.rand(1, 1, 5, 7) > 0.2}
    return attention.attention, (q, k, v), {"softmax_scale": 0.25, **options}


def step(keys: int = 300, **options: Any) -> Any:
    q, k, v = randn(1, HEADS, 1, SIZE), randn(1, GROUPS, keys, SIZE), randn(1, GROUPS, keys, SIZE)
    options |= {"softmax_scale": 0.25, "output_index": index(1, HEADS, SIZE)}
    return attention.attention_step, (q, k, v), options


def step_sealed() -> Any:
    return step(sealing=sealed(300))


def seal() -> Any:
    return sealing.seal, (randn(1, GROUPS, 5, SIZE), sealed(5)), {"is_value": True}


def bits() -> Any:
    return sealing.random_bits, (ops.key_words(bytes(32)), torch.randint(9, (3, 3)), 40), {"rounds": 8}


CASES: list[Callable[[], Any]] = [
    inject, inject_noisy_heads, strip, linear, linears_split, linears_apart, encode, encode_into_cache, encode_sealed,
    attend, step, step_sealed, seal, bits,
]  # fmt: skip


def tensors_of(x: Any) -> list[Tensor]:
    if isinstance(x, Tensor):
        return [x]
    parts = x.values() if isinstance(x, dict) else x if isinstance(x, (list, tuple)) else ()
    return [tensor for part in parts for tensor in tensors_of(part)]


def told(launches: list[tuple[Any, ...]], given: Any, written: list[tuple[Any, ...]]) -> list[Any]:
    """Launches with tensors in place of their addresses: which argument it is, or which of those that were made.
    Addresses are where the launcher, in the launches that it has `written`, gave tensors: by its size alone none can be
    told from another number, since memory may lie anywhere."""
    names = {x.data_ptr(): f"argument {place}" for place, x in enumerate(tensors_of(given))}
    found = []
    for (kernel, grid, arguments), (_, _, by_launcher) in zip(launches, written, strict=True):
        of_tensors = [isinstance(value, Address) for value in by_launcher]
        values = [
            names.setdefault(int(value), f"made {len(names)}") if is_address else value
            for value, is_address in zip(arguments, of_tensors, strict=True)
        ]
        found.append((kernel, grid, values))
    return found


def layouts(results: Any) -> list[Any]:
    return [(x.shape, x.stride(), x.dtype) for x in tensors_of(results)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_a_plan_does_what_the_launcher_does(driver: Recording, case: Callable[[], Any]) -> None:
    """The same kernels, grids and arguments, on other tensors of the layout that the plan was made for; results that
    are laid out alike."""
    launcher, args, options = case()
    with plans.plans_off():
        results = launcher(*args, **options)
    written, expected = [*driver.seen], layouts(results)
    as_written = told(written, (args, options), written)
    assert any("argument 0" in arguments for _, _, arguments in as_written)
    for _ in range(3):
        driver.seen.clear()
        launcher, args, options = case()
        results = launcher(*args, **options)
        assert told(driver.seen, (args, options), written) == as_written
        assert layouts(results) == expected
    assert len(plans._plans) == 1, "made once, done twice more"


def test_results_that_are_arguments_are_the_same_objects() -> None:
    for _ in range(2):
        launcher, args, options = encode_into_cache()
        _, keys, values = launcher(*args, **options)
        assert keys is options["keys"]
        assert values is options["values"]


def test_tensors_at_one_address_make_no_plan_and_may_use_one(driver: Recording) -> None:
    """K and V may be one tensor in one call and two in the next."""
    launcher, (q, k, v), options = step()
    launcher(q, k, k, **options)
    assert not plans._plans
    for values in (v, k):
        driver.seen.clear()
        launcher(q, k, values, **options)
        _, _, arguments = driver.seen[0]
        assert arguments[:3] == [q.data_ptr(), k.data_ptr(), values.data_ptr()]


def test_another_layout_has_another_plan() -> None:
    """Shape, strides, dtype, alignment, an option's value, an absent tensor."""
    launcher, (x, row_index, redundant), options = inject()
    unaligned = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape)
    calls = [
        (x, row_index, redundant),
        (randn(1, 6, WIDTH), row_index, redundant),
        (randn(1, WIDTH, 5).transpose(1, 2), row_index, redundant),
        (unaligned, row_index, redundant),
        (x, row_index.clamp(max=4), None),
    ]
    for args in calls:
        launcher(*args, **options)
    launcher(*calls[0], **options, eps=1e-5)
    launcher(*(None if a is None else a.float() if a.is_floating_point() else a for a in calls[0]),
             norm_weight=options["norm_weight"].float())  # fmt: skip
    assert len(plans._plans) == len(calls) + 2


def test_layers_of_a_sealed_cache_share_a_plan(driver: Recording) -> None:
    launcher, args, options = step_sealed()
    place = attention_step._step_kernel.arg_names.index("layer")
    for layer in (1, 5, 300):
        driver.seen.clear()
        launcher(*args, **{**options, "sealing": options["sealing"].replace(layer=layer)})
        assert driver.seen[0][2][place] == layer
    assert len(plans._plans) == 1


@pytest.mark.parametrize("layer", [-1, 2**16])
def test_a_layer_beyond_the_counters_is_refused_also_where_there_is_a_plan(layer: int) -> None:
    launcher, args, options = step_sealed()
    launcher(*args, **options)
    with pytest.raises(ValueError, match="layer: expected"):
        launcher(*args, **{**options, "sealing": options["sealing"].replace(layer=layer)})


def test_slots_beyond_a_cache_are_refused_also_where_there_is_a_plan() -> None:
    launcher, args, options = encode_into_cache()
    launcher(*args, **options)
    with pytest.raises(ValueError, match="offset: expected"):
        launcher(*args, **{**options, "offset": 62})


def test_plans_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "_MOST_PLANS", 3)
    for keys in range(256, 261):
        launcher, args, options = step(keys)
        launcher(*args, **options)
        assert len(plans._plans) <= 3


def test_a_pointer_from_nowhere_is_said(driver: Recording) -> None:
    """A launcher that breaks the rules of plans must not be replayed with an old address."""

    @plans.planned
    def launcher(x: Tensor, row_index: Tensor) -> Tensor:
        return rows.inject_permute(x.clone(), row_index)

    with pytest.raises(RuntimeError, match="a plan knows no such tensor"):
        launcher(randn(1, 5, WIDTH), index(1, 5))
    assert not plans._plans
    assert plans._recording.plan is None


def test_a_failed_launch_leaves_no_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    launcher, args, options = inject()
    monkeypatch.setattr(rows, "launch", lambda *a, **k: (_ for _ in ()).throw(MemoryError("no memory")))
    with pytest.raises(MemoryError):
        launcher(*args, **options)
    assert not plans._plans
    monkeypatch.undo()
    launcher(*args, **options)
    assert len(plans._plans) == 1


def test_profilers_see_launches_of_plans(driver: Recording) -> None:
    launcher, args, options = inject()
    launcher(*args, **options)
    seen: list[Any] = []
    triton.knobs.runtime.launch_enter_hook.add(seen.append)
    try:
        launcher(*args, **options)
    finally:
        triton.knobs.runtime.launch_enter_hook.remove(seen.append)
    launcher(*args, **options)
    assert len(seen) == 1


def test_public_functions_launch_without_the_dispatcher(driver: Recording) -> None:
    """And with it where somebody follows the operators."""
    x, norm = randn(1, 1, WIDTH), randn(WIDTH)
    ops.inject_permute(x, None, norm_weight=norm)
    assert len(plans._plans) == 1
    followed = []

    class Followed(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            followed.append(func.name())
            return func(*args, **(kwargs or {}))

    with Followed():
        ops.inject_permute(x, None, norm_weight=norm)
    assert followed[0] == "scx_kernels::inject_permute"
    with pytest.raises(TypeError, match="tile"):
        ops.inject_permute(x, None, norm_weight=norm, tile={"BLOCK_M": 1})


def test_gradients_and_double_precision_take_the_reference(driver: Recording) -> None:
    x, norm = randn(1, 2, WIDTH, dtype=torch.float32), torch.ones(WIDTH, requires_grad=True)
    with torch.enable_grad():
        assert ops.inject_permute(x, None, norm_weight=norm).requires_grad
    ops.inject_permute(x.double(), None, norm_weight=norm.detach().double())
    assert not driver.seen


@pytest.mark.parametrize("case", list(host.STEPS))
def test_steps_whose_host_time_is_taken_launch_as_a_gpu_would_be_asked(
    driver: Recording, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """Every contestant of ours runs on the kernels, and the plain model on none."""
    monkeypatch.setattr(host, "LAYERS", 2)
    asked: list[int] = []

    def thread_milliseconds(call: Callable[[], Any], device: torch.device) -> float:
        before = len(driver.seen)
        call()
        asked.append(len(driver.seen) - before)
        return 3.0 if asked[-1] else 2.0

    monkeypatch.setattr(host, "thread_milliseconds", thread_milliseconds)
    monkeypatch.setattr(host, "stand_in", lambda device: nullcontext())
    entry = host.measure_steps(case, torch.device("cpu"))
    plain, *others = entry["contestants"]
    assert plain["name"] == host.PLAIN
    number = len(entry["contestants"])
    assert not any(asked[::number])
    assert min(count for place, count in enumerate(asked) if place % number) >= 12
    assert plain["ratio"]["median"] == 1
    assert [c["ratio"]["median"] for c in others] == [1.5] * len(others)


def test_operations_whose_host_time_is_taken(driver: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    """The public function, its launcher and the launcher without plans launch the same."""
    monkeypatch.setattr(host, "stand_in", lambda device: nullcontext())
    for public, bare in host.launchers(torch.device("cpu")).values():
        seen = []
        for call, context in ((public, nullcontext), (bare, nullcontext), (bare, plans.plans_off)):
            driver.seen.clear()
            with context():
                call()
            seen.append([(name, grid) for name, grid, _ in driver.seen])
        assert seen[0] == seen[1] == seen[2]
        assert seen[0]
