"""Host time: what a request costs the processor that launches its kernels, plain beside SCX, and each operation alone.

Where a GPU is, a call is measured while the device works behind it. Elsewhere Triton's driver launches nothing
(`bench.null_driver`) and CPU tensors are taken for the accelerator's: kernels are bound, compiled and sent off, and
PyTorch's own operators compute, on sizes at which that is next to nothing. Times are the thread's CPU time.

Without a GPU a launch lacks CUDA's own part (about 2 µs), and uploads of keys lack pinned memory.
"""

import copy
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

import scx_kernels as ops
from bench.run import Run, attempt
from bench.timing import spread, synchronize
from scx_kernels import operations

__all__ = ["OPERATIONS", "STEPS", "launchers", "measure_operation", "measure_steps", "run_host", "stand_in"]

LAYERS, HIDDEN, HEAD_DIM = 30, 64, 16
HEADS, KV_HEADS = HIDDEN // HEAD_DIM, HIDDEN // HEAD_DIM // 2
ROUNDS = 15
PLAIN = "transformers"
TOKEN, PREFILL, REDUNDANT = "one more token", "prefill of 8 tokens", "prefill of 8 tokens, 100 redundant rows"
STEPS: dict[str, tuple[int, dict[str, dict[str, Any] | None]]] = {
    TOKEN: (HIDDEN, {PLAIN: None, "SCX": {}, "SCX, sealed": {"cache_encoding": "sealed"}}),
    PREFILL: (HIDDEN, {PLAIN: None, "SCX": {}}),
    # Narrower: a processor that stands in for a GPU computes 108 rows where the plain model has 8.
    REDUNDANT: (HEAD_DIM, {PLAIN: None, "SCX": {"redundant_num": 100}}),
}
"""Case -> hidden size, and contestants with the options of their key generator."""
OPERATIONS = (
    "inject_permute",
    "permuted_linears",
    "qkv_decode_encode",
    "qkv_decode_encode, sealed",
    "attention_step",
    "attention_step, sealed",
)
LAUNCHER, WITHOUT = "launcher", "launcher without plans"
REPEATS = 200  # of an operation, so that the clock's steps are small beside them

Call = Callable[[], Any]


@contextmanager
def stand_in(device: torch.device) -> Iterator[None]:
    """Within it, where `device` is no GPU, its tensors take the kernels and nothing is launched."""
    if device.type == "cuda":
        yield
        return
    from bench.null_driver import no_launches  # it needs Triton, which others here do not

    with no_launches(), operations.accelerator(device.type):
        yield


def thread_milliseconds(call: Call, device: torch.device) -> float:
    """The thread's CPU time of one call, the device idle before it."""
    synchronize(device)
    start = time.thread_time()
    call()
    return 1e3 * (time.thread_time() - start)


def in_turns(calls: dict[str, Call], device: torch.device, rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Milliseconds of each call in each of several rounds, after two that compile and settle."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    gc.collect()
    gc.disable()
    try:
        for count in range(rounds + 2):
            for name, call in calls.items():
                taken = thread_milliseconds(call, device)
                if count > 1:
                    times[name].append(taken)
    finally:
        gc.enable()
    return times


def _models(device: torch.device, hidden: int, contestants: dict[str, dict[str, Any] | None]) -> dict[str, Any]:
    from transformers import LlamaConfig, LlamaForCausalLM

    from scx import SCXKeyGenerator, encode_llama

    heads = hidden // HEAD_DIM
    config = LlamaConfig(
        vocab_size=256, hidden_size=hidden, num_attention_heads=heads, num_key_value_heads=max(1, heads // 2),
        head_dim=HEAD_DIM, intermediate_size=2 * hidden, num_hidden_layers=LAYERS,
    )  # fmt: skip
    plain = LlamaForCausalLM(config).eval().to(device)
    models = {name: plain if options is None else copy.deepcopy(plain) for name, options in contestants.items()}
    for name, options in contestants.items():
        if options is not None:
            # On an accelerator no keystream is kept; the processor that stands in for one keeps none either.
            keys = SCXKeyGenerator.for_model(models[name], keep_keystream=False, **options)
            encode_llama(models[name], keys)
    return models


def _call_of(case: str, model: Any, ids: Tensor) -> Call:
    if case.startswith("prefill"):
        return lambda: model(ids, logits_to_keep=1)
    cache = model(ids, logits_to_keep=1).past_key_values
    return lambda: model(ids[:, :1], past_key_values=cache, logits_to_keep=1)


@torch.no_grad()
def measure_steps(case: str, device: torch.device) -> dict[str, Any]:
    """The entry of a case of STEPS: the host's milliseconds of each contestant, and over plain transformers'."""
    hidden, contestants = STEPS[case]
    models = _models(device, hidden, contestants)
    ids = torch.arange(3, 11, device=device)[None]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with stand_in(device):
            times = in_turns({name: _call_of(case, model, ids) for name, model in models.items()}, device)
    finally:
        torch.set_num_threads(threads)
    return {"suite": "host", "layers": LAYERS, "hidden": hidden, "contestants": _contestants(times, PLAIN)}


def launchers(device: torch.device) -> dict[str, tuple[Call, Call]]:
    """By name, each operation of a decoded token as users call it, and its launcher, on the same arguments."""
    from scx_kernels.kernels import attention, product, qkv, rows

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device)

    def index(heads: int) -> Tensor:
        return torch.arange(HEAD_DIM, device=device).expand(1, heads, HEAD_DIM).contiguous()

    widths = [heads * HEAD_DIM for heads in (HEADS, KV_HEADS, KV_HEADS)]
    x, norm, weights = randn(1, 1, HIDDEN), randn(HIDDEN), [randn(width, HIDDEN) for width in widths]
    z, angles = [randn(1, 1, width) for width in widths], [randn(1, 1, HEAD_DIM) for _ in range(2)]
    indices = [index(heads) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    q = randn(1, HEADS, 1, HEAD_DIM)
    keys, values = (randn(1, KV_HEADS, 64, HEAD_DIM) for _ in range(2))
    sealing = ops.Sealing(ops.key_words(bytes(32), device), torch.arange(64, device=device)[None], layer=3, rounds=20)
    into_cache = {"keys": keys, "values": values, "offset": 3}

    def both(public: Callable[..., Any], bare: Callable[..., Any], *args: Any, **options: Any) -> tuple[Call, Call]:
        return lambda: public(*args, **options), lambda: bare(*args, **options)

    def linears(*args: Any, **options: Any) -> Any:
        return product.permuted_linears(*args, **options).split_with_sizes(widths, dim=2)

    step = {"softmax_scale": 0.25, "output_index": indices[0]}
    encode = (ops.qkv_decode_encode, qkv.qkv_decode_encode, *z, None, *angles, *indices)
    attend = (ops.attention_step, attention.attention_step, q, keys, values)
    found = (
        both(ops.inject_permute, rows.inject_permute, x, None, norm_weight=norm),
        both(ops.permuted_linears, linears, x, weights, biases=[None] * 3),
        both(*encode, **into_cache),
        both(*encode, **into_cache, sealing=sealing),
        both(*attend, **step),
        both(*attend, **step, sealing=sealing),
    )
    return dict(zip(OPERATIONS, found, strict=True))


@torch.no_grad()
def measure_operation(name: str, device: torch.device) -> dict[str, Any]:
    """The entry of an operation of `launchers`: milliseconds a call of the public function, of its launcher, and of the
    launcher without its plans, and each over the launcher."""
    from scx_kernels.kernels.plans import plans_off

    def repeated(call: Call, context: Callable[[], AbstractContextManager[None]] = nullcontext) -> Call:
        def calls() -> None:
            with context():
                for _ in range(REPEATS):
                    call()

        return calls

    with stand_in(device):
        public, bare = launchers(device)[name]
        calls = {"operation": repeated(public), LAUNCHER: repeated(bare), WITHOUT: repeated(bare, plans_off)}
        times = in_turns(calls, device)
    times = {who: [taken / REPEATS for taken in series] for who, series in times.items()}
    return {"suite": "host", "operation": name, "contestants": _contestants(times, LAUNCHER)}


def _contestants(times: dict[str, list[float]], beside: str) -> list[dict[str, Any]]:
    """Each with its milliseconds, and their ratio to those of `beside` in the same round."""
    contestants = []
    for name, series in times.items():
        ratios = [taken / other for taken, other in zip(series, times[beside], strict=True)]
        kind = "rival" if name == beside else "scx"
        contestants.append({"name": name, "kind": kind, "ms": spread(series), "ratio": spread(ratios)})
    return contestants


def run_host(run: Run, device: torch.device) -> None:
    """Every wanted case: steps of a model, then the operations of a token."""

    def entry(measure: Callable[[str, torch.device], dict[str, Any]], name: str) -> dict[str, Any]:
        found, problem = attempt(lambda: measure(name, device))
        return {"suite": "host", "status": problem, "contestants": []} if problem is not None else found

    for case in STEPS:
        run.measure(f"host/{case}", partial(entry, measure_steps, case))
    for name in OPERATIONS:
        run.measure(f"host/{name}", partial(entry, measure_operation, name))
