"""Host time: what a request costs the processor that launches its kernels, plain beside SCX, and each operation alone.

Where a GPU is, a call is measured while the device works behind it. Elsewhere Triton's driver launches nothing
(`bench.null_driver`) and CPU tensors are taken for the accelerator's: kernels are bound, compiled and sent off, and
PyTorch's own operators compute, on sizes at which that is next to nothing. Times are the thread's CPU time.

Without a GPU a launch lacks CUDA's own part (about 2 µs), and uploads of keys lack pinned memory.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

import scx_kernels as ops
from bench.model import Field
from bench.model_cases import KEYS, Contestant
from bench.rounds import Job
from bench.shapes import Shape
from bench.timing import Turns, synchronize
from scx_kernels import operations

LAYERS, HIDDEN, HEAD_DIM = 30, 64, 16
HEADS, KV_HEADS = HIDDEN // HEAD_DIM, HIDDEN // HEAD_DIM // 2
SETTLING, FEW_ROUNDS, SERIES = 2, 3, 5  # rounds that compile and settle, then so many, so many times
PLAIN = "transformers"
TOKEN, PREFILL, REDUNDANT = "one more token", "prefill of 8 tokens", "prefill of 8 tokens, 100 redundant rows"
# On an accelerator no keystream is kept; the processor that stands in for one keeps none either.
_PLAIN, _SCX = Contestant(PLAIN), Contestant("SCX", keys={"keep_keystream": False})
_SEALED = Contestant("SCX, sealed", keys={"keep_keystream": False, **KEYS["sealed"]})
_ROWS = Contestant("SCX", keys={"keep_keystream": False, **KEYS["100 redundant rows"]})
STEPS: dict[str, tuple[int, tuple[Contestant, ...]]] = {
    TOKEN: (HIDDEN, (_PLAIN, _SCX, _SEALED)),
    PREFILL: (HIDDEN, (_PLAIN, _SCX)),
    # Narrower: a processor that stands in for a GPU computes 108 rows where the plain model has 8.
    REDUNDANT: (HEAD_DIM, (_PLAIN, _ROWS)),
}
"""Case -> hidden size, and contestants."""
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
    from bench.null_driver import no_launches  # it needs Triton, which others here do not  # noqa: PLC0415

    with no_launches(), operations.accelerator(device.type):
        yield


@contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def thread_milliseconds(call: Call, device: torch.device, repeats: int = 1) -> float:
    """The thread's CPU time of one call of several, the device idle before them."""
    synchronize(device)
    start = time.thread_time()
    for _ in range(repeats):
        call()
    return 1e3 * (time.thread_time() - start) / repeats


@torch.no_grad()
def rounds(
    about: dict[str, Any], turns: Callable[[], dict[str, Callable[[], float]]], beside: str, device: torch.device
) -> Iterator[dict[str, Any]]:
    """The entry of a case after every FEW_ROUNDS: the host's milliseconds of each contestant, and over `beside`'s.

    Args:
        turns: makes what takes each contestant's turns.
    """
    with one_thread(), stand_in(device):
        taken = Turns(turns(), beside)
        taken.take(SETTLING, counts=False)
    for _ in range(SERIES):
        with one_thread(), stand_in(device):
            taken.take(FEW_ROUNDS)
        for problem in taken.problems.values():
            yield {"suite": "host", "status": problem, "contestants": []}
            return
        contestants = [
            {"name": name, "kind": "rival" if name == beside else "scx", **taken.figures(name)} for name in taken.turns
        ]
        yield {"suite": "host", **about, "contestants": contestants}


def step_rounds(case: str, device: torch.device) -> Iterator[dict[str, Any]]:
    """The entries of a case of STEPS."""
    hidden, contestants = STEPS[case]

    def turns() -> dict[str, Callable[[], float]]:
        ids = torch.arange(3, 11, device=device)[None]
        field = _field(device, hidden)
        calls = {contestant.name: _call_of(case, field.model(contestant), ids) for contestant in contestants}
        return {name: partial(thread_milliseconds, call, device) for name, call in calls.items()}

    return rounds({"layers": LAYERS, "hidden": hidden}, turns, PLAIN, device)


def measure_steps(case: str, device: torch.device) -> dict[str, Any]:
    """The entry of a case of STEPS after all rounds."""
    *_, entry = step_rounds(case, device)
    return entry


def _field(device: torch.device, hidden: int) -> Field:
    heads = hidden // HEAD_DIM
    shape = Shape("host", hidden, heads, max(1, heads // 2), HEAD_DIM, 2 * hidden, LAYERS, 256)
    return Field(LlamaForCausalLM(shape.config()).eval().to(device), "random")


def _call_of(case: str, model: Any, ids: Tensor) -> Call:
    if case.startswith("prefill"):
        return lambda: model(ids, logits_to_keep=1)
    cache = model(ids, logits_to_keep=1).past_key_values
    return lambda: model(ids[:, :1], past_key_values=cache, logits_to_keep=1)


def launchers(device: torch.device) -> dict[str, tuple[Call, Call]]:
    """By name, each operation of a decoded token as users call it, and its launcher, on the same arguments."""
    from scx_kernels.kernels import attention, product, qkv, rows  # needs Triton  # noqa: PLC0415

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


def operation_rounds(name: str, device: torch.device) -> Iterator[dict[str, Any]]:
    """The entries of an operation of `launchers`: milliseconds a call of the public function, of its launcher, and of
    the launcher without its plans, and each over the launcher."""
    # Where Triton is missing there is no launcher.
    from scx_kernels.kernels.plans import plans_off  # noqa: PLC0415

    def within(context: Callable[[], AbstractContextManager[None]], call: Call) -> float:
        with context():
            return thread_milliseconds(call, device, REPEATS)

    def turns() -> dict[str, Callable[[], float]]:
        public, bare = launchers(device)[name]
        return {
            "operation": partial(within, nullcontext, public),
            LAUNCHER: partial(within, nullcontext, bare),
            WITHOUT: partial(within, plans_off, bare),
        }

    return rounds({"operation": name}, turns, LAUNCHER, device)


def jobs(device: torch.device, everything: bool) -> Iterator[Job]:
    """Steps of a model, then the operations of a token."""
    for case in STEPS:
        yield Job(f"host/{case}", partial(step_rounds, case, device), is_marked=True, seconds=2.0)
    for name in OPERATIONS:
        yield Job(f"host/{name}", partial(operation_rounds, name, device), is_marked=True, seconds=0.9)
