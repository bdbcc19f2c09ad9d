"""Which whole models are measured, who competes on them, and at which lengths."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Contestant:
    """A way to run a model: `keys` are the options of its key generator, None for the plain model; `crossings` those
    of the split placement's boundary, its secure side on the CPU, None for the fused placement."""

    name: str
    keys: dict[str, Any] | None = None
    crossings: str | None = None
    attention: str = "sdpa"
    backend: str = "auto"
    compiled: bool = False

    @property
    def kind(self) -> str:
        return "rival" if self.keys is None else "scx"


KEYS: dict[str, dict[str, Any]] = {
    "100 redundant rows": {"redundant_num": 100},
    "noise": {"alp": True},
    "100 redundant rows, noise": {"redundant_num": 100, "alp": True},
    "sealed": {"cache_encoding": "sealed"},
    "sealed, 100 redundant rows, noise": {"cache_encoding": "sealed", "redundant_num": 100, "alp": True},
    "sealed by 12 rounds": {"cache_encoding": "sealed", "cipher_rounds": 12},
    "sealed by 8 rounds": {"cache_encoding": "sealed", "cipher_rounds": 8},
}
"""Ways to encode, beside permutations alone: options of a key generator by what is said of them."""


def encoded(name: str, placement: str = "", **options: Any) -> Contestant:
    return Contestant(f"SCX, {placement}{name}", keys=KEYS[name], **options)


PLAIN = Contestant("plain, sdpa")
EAGER = Contestant("plain, eager", attention="eager")
COMPILED = Contestant("plain, compiled", compiled=True)
SCX = Contestant("SCX", keys={})
REDUNDANT, NOISE = encoded("100 redundant rows"), encoded("100 redundant rows, noise")
SEALED, SEALED_12, SEALED_8 = (encoded(name) for name in ("sealed", "sealed by 12 rounds", "sealed by 8 rounds"))
FEW = Contestant("SCX, split, few crossings", keys={}, crossings="few")
PAPERS = Contestant("SCX, split, the paper's crossings", keys={}, crossings="paper")
FEW_NOISE = encoded("100 redundant rows, noise", "split, few crossings, ", crossings="few")
REFERENCE = Contestant("SCX, reference operations", keys={}, backend="reference")

OF_PREFILL = (PLAIN, EAGER, SCX, REDUNDANT, NOISE, SEALED, REFERENCE)
OF_SPLIT = (PLAIN, EAGER, FEW, PAPERS, FEW_NOISE)
OF_TOKEN = (PLAIN, EAGER, SCX, NOISE, SEALED, SEALED_12, SEALED_8, REFERENCE)  # redundant rows are in a prefill only

DTYPES = {"Llama-3-8B": "bfloat16", "Llama-2-7B": "float16", "SmolLM2": "bfloat16"}
CONTEXTS = (8, 128, 512, 1024, 4096, 10240)
SIZES_OF_TOKEN = (
    *((1, context) for context in CONTEXTS),
    *((batch, context) for batch in (8, 64) for context in (128, 1024, 10240)),
)
PAPERS_CONTEXTS = (8, 512, 10240)
"""Lengths at which the paper gives a figure; 512 is the middle of its 1,000 new tokens."""

MARKED = {("Llama-3-8B", "bfloat16"): (1024, 4096), ("SmolLM2", "float32"): (128,)}
"""By model and dtype: contexts of one conversation of which something is asked; where there is no GPU, a short one."""

ON_CPU = {"prefill": ((1, 8), (1, 128), (1, 512)), "token": ((1, 8), (1, 128), (1, 512))}


@dataclass(frozen=True)
class ModelCase:
    """A prefill of `context` tokens, or one more token after as many ("token"), for `batch` sequences at once."""

    model: str
    kind: str
    context: int
    batch: int
    dtype: str
    contestants: tuple[Contestant, ...] = field(repr=False, default=())
    suffix: str = ""

    @property
    def is_marked(self) -> bool:
        """Whether something is asked of its time over the plain model's."""
        return not self.suffix and self.batch == 1 and self.context in MARKED.get((self.model, self.dtype), ())

    @property
    def seconds(self) -> float:
        """About what few rounds take: on a GPU, or of the smallest model on a CPU."""
        if self.suffix == "/compiled":
            return 60.0
        if self.dtype != "float32":
            return 2.0 + self.batch * self.context / 20_000
        return 1.6 + 0.02 * self.context * self.batch if self.kind == "prefill" else 2.7 * self.batch

    @property
    def id(self) -> str:
        return f"model/{self.model}/{self.kind}/context={self.context}/batch={self.batch}/{self.dtype}{self.suffix}"


def model_cases(on_cuda: bool, everything: bool = False) -> Iterator[ModelCase]:
    """The cases of a machine, model by model. A CPU runs the smallest model, short unless `everything` is wanted."""
    if not on_cuda:
        yield from _cases_of("SmolLM2", "float32", on_cuda, None if everything else ON_CPU)
        return
    yield from _cases_of("Llama-3-8B", DTYPES["Llama-3-8B"], on_cuda)
    papers = {kind: [(1, context) for context in PAPERS_CONTEXTS] for kind in ("prefill", "token")}
    yield from _cases_of("Llama-2-7B", DTYPES["Llama-2-7B"], on_cuda, papers)
    yield from _cases_of("SmolLM2", DTYPES["SmolLM2"], on_cuda)


def _cases_of(model: str, dtype: str, on_cuda: bool, sizes: Any = None) -> Iterator[ModelCase]:
    sizes = sizes or {"prefill": [(1, context) for context in CONTEXTS], "token": SIZES_OF_TOKEN}
    cases = []
    for kind, contestants in (("prefill", OF_PREFILL), ("token", OF_TOKEN)):
        # On a CPU the reference operations are the ones that SCX takes anyway, and fewer rounds than the library's 20
        # are plain PyTorch, to check kernels by.
        taken = tuple(c for c in contestants if on_cuda or c not in (REFERENCE, SEALED_12, SEALED_8))
        cases += [ModelCase(model, kind, context, batch, dtype, taken) for batch, context in sizes[kind]]
    # The dearest last: where time runs out, it costs the fewest cases.
    yield from sorted(cases, key=lambda case: case.batch * case.context)


def compiled_cases(on_cuda: bool, everything: bool = False) -> Iterator[ModelCase]:
    """Plain transformers under `torch.compile` beside itself and SCX: apart, because compiling takes minutes."""
    if not on_cuda and not everything:
        return
    model, dtype = ("Llama-3-8B", "bfloat16") if on_cuda else ("SmolLM2", "float32")
    base = ModelCase(model, "token", 1024, 1, dtype, (PLAIN, COMPILED, SCX), "/compiled")
    yield base
    yield replace(base, kind="prefill")


def split_cases(on_cuda: bool) -> Iterator[ModelCase]:
    """A prefill in the split placement, with both ways to cross the boundary: apart, because a GPU waits for a CPU."""
    model = "Llama-2-7B" if on_cuda else "SmolLM2"
    dtype = DTYPES[model] if on_cuda else "float32"
    yield ModelCase(model, "prefill", 512, 1, dtype, OF_SPLIT, "/split")


def left_out(on_cuda: bool, everything: bool) -> Iterator[str]:
    """What a machine's list of model cases lacks, and why."""
    if not on_cuda:
        yield "no CUDA: operations and models at Llama's sizes, Triton's kernels, and their rivals on a GPU"
    if not on_cuda and not everything:
        yield "on a CPU only with --all, for their time: contexts beyond 512, batches, torch.compile"
