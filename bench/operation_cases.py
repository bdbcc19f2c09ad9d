"""Every operation beside its rivals: inputs, who computes the same or less from them, what must move and be computed.

To measure one more operation or one more way to compute it, add to `OPERATIONS`; to measure it at more sizes, add to
`cases`. Notation as in `scx_kernels.reference`: S tokens, R redundant rows, T = S + R, D, H, G, d.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from types import SimpleNamespace as Inputs
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import scx_kernels as ops
from bench.shapes import SHAPES, Shape
from scx_kernels import reference

__all__ = ["OPERATIONS", "Case", "Contestant", "Inputs", "Operation", "cases"]

SCX, TRITON, RIVAL, BOUND = "scx", "triton", "rival", "bound"
"""What a contestant is: the path that users run; Triton where that path chooses something else; what would run
otherwise; a limit, which does less than the work."""

QUERY_SAMPLE = 256
"""Queries whose attention is held against float64: all of a long prompt's would need its squared scores."""


@dataclass(frozen=True)
class Case:
    """One operation at one size. `cached`: keys in the cache of a generation step. `headline`: in the short table."""

    operation: str
    model: str
    tokens: int
    redundant: int = 0
    batch: int = 1
    cached: int = 0
    dtype: str = "bfloat16"
    headline: bool = False

    @property
    def shape(self) -> Shape:
        return SHAPES[self.model]

    @property
    def rows(self) -> int:
        """T, the encoded rows of a sequence."""
        return self.tokens + self.redundant

    @property
    def keys(self) -> int:
        """Keys that attention sees."""
        return self.cached or self.tokens

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def itemsize(self) -> int:
        return self.torch_dtype.itemsize

    @property
    def id(self) -> str:
        size = f"cached={self.cached}" if self.cached else f"tokens={self.tokens}/redundant={self.redundant}"
        return f"operations/{self.operation}/{self.model}/{size}/batch={self.batch}/{self.dtype}"


@dataclass(frozen=True)
class Contestant:
    """Someone who computes from the inputs.

    Not timed: `within` is entered around all calls; `finish` adds what a result lacks to be compared.
    """

    name: str
    kind: str
    call: Callable[[Inputs], Any]
    within: Callable[[], AbstractContextManager[Any]] = nullcontext
    finish: Callable[[Inputs, Any], Any] = lambda inputs, result: result


@dataclass(frozen=True)
class Operation:
    """One operation.

    `make` draws inputs; `contestants` compute from them; `plain` is the reference in the same dtype, `exact` the
    part of the result in float64 that `select` leaves of the others (all of it, as a rule; `plain` on widened inputs).
    `bytes` counts every input read once and every output written once, `flops` a multiplication and an addition as
    two.
    """

    make: Callable[[Case, torch.device], Inputs]
    contestants: Callable[[Case], tuple[Contestant, ...]]
    plain: Callable[[Inputs], Any]
    bytes: Callable[[Case], int]
    flops: Callable[[Case], int]
    exact: Callable[[Inputs], Any] | None = None
    select: Callable[[Any], Any] = lambda result: result


def wide(inputs: Inputs) -> Inputs:
    """The same inputs in float64; index arrays stay."""

    def widen(x: Any) -> Any:
        return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x

    return Inputs(**{name: widen(x) for name, x in vars(inputs).items()})


def randn(case: Case, device: torch.device, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.randn(*shape, device=device, dtype=dtype or case.torch_dtype)


def weights(case: Case, device: torch.device, outputs: int, inputs: int) -> Tensor:
    """(N, D) at the scale that keeps a product's size that of its input."""
    return randn(case, device, outputs, inputs).mul_(inputs**-0.5)


def permutations(device: torch.device, *shape: int) -> Tensor:
    return torch.rand(*shape, device=device).argsort(-1)


def rows_from(x: Tensor, index: Tensor) -> Tensor:
    """Rows of (1, N, D) as users without SCX's operations take them."""
    return x[0].index_select(0, index[0])[None]


def appended(x: Tensor, redundant: Tensor | None) -> Tensor:
    return x if redundant is None else torch.cat((x, redundant), dim=1)


def copy_of(bytes_: Callable[[Case], int], case: Case) -> Contestant:
    """A plain copy that reads and writes together as many bytes as the operation."""
    held: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def call(inputs: Inputs) -> None:
        device = next(x.device for x in vars(inputs).values() if isinstance(x, Tensor))
        if device not in held:
            source = torch.randint(256, (max(1, bytes_(case) // 2),), dtype=torch.uint8, device=device)
            held[device] = source, torch.empty_like(source)
        source, target = held[device]
        target.copy_(source)

    return Contestant("copy of the same bytes", BOUND, call)


def by_triton(call: Callable[[Inputs], Any]) -> Contestant:
    """SCX with its kernel where it would take PyTorch's."""
    return Contestant("SCX, Triton", TRITON, call, within=lambda: ops.backend("triton"))


# Rows in and out of the encoded order.


def make_inject(case: Case, device: torch.device, *, norm: bool = False, noise: bool = False) -> Inputs:
    hidden = case.shape.hidden
    return Inputs(
        x=randn(case, device, 1, case.tokens, hidden),
        row_index=permutations(device, 1, case.rows),
        redundant=randn(case, device, 1, case.redundant, hidden) if case.redundant else None,
        norm_weight=randn(case, device, hidden) if norm else None,
        noise=randn(case, device, 1, case.rows, hidden, dtype=torch.float32) if noise else None,
    )


def inject(function: Callable[..., Tensor], i: Inputs) -> Tensor:
    return function(i.x, i.row_index, i.redundant, norm_weight=i.norm_weight, noise=i.noise)


def inject_unfused(i: Inputs) -> Tensor:
    x = i.x if i.norm_weight is None else F.rms_norm(i.x, i.x.shape[-1:], i.norm_weight, 1e-6)
    rows = rows_from(appended(x, i.redundant), i.row_index)
    return rows if i.noise is None else rows.float() + i.noise


def inject_bytes(case: Case, *, norm: bool = False, noise: bool = False) -> int:
    """(S + R) rows in, T out, an index for each; under noise a float32 row in and the result in float32."""
    hidden = case.shape.hidden
    read = case.rows * hidden * case.itemsize + 8 * case.rows + (hidden * case.itemsize if norm else 0)
    written = case.rows * hidden * (4 if noise else case.itemsize)
    return read + written + (4 * case.rows * hidden if noise else 0)


def inject_operation(**options: bool) -> Operation:
    def count(case: Case) -> int:
        return inject_bytes(case, **options)

    return Operation(
        make=lambda case, device: make_inject(case, device, **options),
        contestants=lambda case: (
            Contestant("SCX", SCX, lambda i: inject(ops.inject_permute, i)),
            Contestant("PyTorch, unfused", RIVAL, inject_unfused),
            copy_of(count, case),
        ),
        plain=lambda i: inject(reference.inject_permute, i),
        bytes=count,
        flops=lambda case: 4 * case.tokens * case.shape.hidden if options.get("norm") else 0,
    )


def make_strip(case: Case, device: torch.device) -> Inputs:
    hidden = case.shape.hidden
    return Inputs(
        z=randn(case, device, 1, case.rows, hidden),
        position=permutations(device, 1, case.rows)[:, : case.tokens].contiguous(),
        residual=randn(case, device, 1, case.tokens, hidden),
    )


def strip_bytes(case: Case) -> int:
    """S rows of z and S of the residual in, S out, an index for each; redundant rows are not touched."""
    return case.tokens * (3 * case.shape.hidden * case.itemsize + 8)


STRIP = Operation(
    make=make_strip,
    contestants=lambda case: (
        Contestant("SCX", SCX, lambda i: ops.strip_restore(i.z, i.position, i.residual)),
        Contestant("PyTorch, unfused", RIVAL, lambda i: rows_from(i.z, i.position) + i.residual),
        copy_of(strip_bytes, case),
    ),
    plain=lambda i: reference.strip_restore(i.z, i.position, i.residual),
    bytes=strip_bytes,
    flops=lambda case: case.tokens * case.shape.hidden,
)


# Products: the output projection, and the noisy one of the first block's queries.


def make_product(case: Case, device: torch.device, *, noise: bool = False) -> Inputs:
    shape = case.shape
    inner, outer = (shape.hidden, shape.query_width) if noise else (shape.query_width, shape.hidden)
    inputs = Inputs(
        x=randn(case, device, 1, case.tokens, inner),
        weight=weights(case, device, outer, inner),
        row_index=permutations(device, 1, case.rows),
        redundant=randn(case, device, 1, case.redundant, inner) if case.redundant else None,
        noise=None,
        image=None,
    )
    if noise:
        inputs.noise = 5 * randn(case, device, 1, case.rows, inner, dtype=torch.float32)
        # In float64: the image is an input here, exact to its last bit, and not part of what is measured.
        inputs.image = ops.noise_image(inputs.noise.double(), inputs.weight).float()
    inputs.encoded = rows_from(appended(inputs.x, inputs.redundant), inputs.row_index)
    return inputs


def product(function: Callable[..., Tensor], i: Inputs) -> Tensor:
    return function(i.x, i.weight, i.row_index, i.redundant, noise=i.noise, image=i.image)


def product_unfused(i: Inputs) -> Tensor:
    rows = rows_from(appended(i.x, i.redundant), i.row_index)
    if i.noise is None:
        return F.linear(rows, i.weight)
    return (F.linear(rows.float() + i.noise, i.weight.float()) - i.image).to(i.x.dtype)


def product_bytes(case: Case, *, noise: bool = False) -> int:
    """(S + R) rows and the weight in, T rows out, an index for each; noise and image in float32."""
    shape = case.shape
    elements = case.rows * (shape.query_width + shape.hidden)
    return (
        case.itemsize * (elements + shape.query_width * shape.hidden) + 8 * case.rows + (4 * elements if noise else 0)
    )


def product_operation(*, noise: bool = False) -> Operation:
    def count(case: Case) -> int:
        return product_bytes(case, noise=noise)

    def contestants(case: Case) -> tuple[Contestant, ...]:
        def scx(i: Inputs) -> Tensor:
            return product(ops.permuted_linear, i)

        found = [Contestant("SCX", SCX, scx)]
        if not noise:
            found.append(by_triton(scx))
        found.append(Contestant("PyTorch, unfused", RIVAL, product_unfused))
        if not noise:
            found.append(Contestant("product alone, rows encoded", RIVAL, lambda i: F.linear(i.encoded, i.weight)))
        return (*found, copy_of(count, case))

    return Operation(
        make=lambda case, device: make_product(case, device, noise=noise),
        contestants=contestants,
        plain=lambda i: product(reference.permuted_linear, i),
        bytes=count,
        flops=lambda case: 2 * case.rows * case.shape.query_width * case.shape.hidden,
    )


def make_linear(case: Case, device: torch.device) -> Inputs:
    inputs = make_product(case, device, noise=True)
    return Inputs(x=inputs.encoded, weight=inputs.weight, noise=inputs.noise, image=inputs.image)


def linear_unfused(i: Inputs) -> Tensor:
    return (F.linear(i.x.float() + i.noise, i.weight.float()) - i.image).to(i.x.dtype)


def linear_bytes(case: Case) -> int:
    return product_bytes(case, noise=True) - 8 * case.rows


LINEAR = Operation(
    make=make_linear,
    contestants=lambda case: (
        Contestant("SCX", SCX, lambda i: ops.linear(i.x, i.weight, None, i.noise, i.image)),
        Contestant("PyTorch, unfused", RIVAL, linear_unfused),
        Contestant("product alone, no noise", BOUND, lambda i: F.linear(i.x, i.weight)),
        copy_of(linear_bytes, case),
    ),
    plain=lambda i: reference.linear(i.x, i.weight, None, i.noise, i.image),
    bytes=linear_bytes,
    flops=lambda case: 2 * case.rows * case.shape.query_width * case.shape.hidden,
)


# From projected rows to encoded Q, K, V, and the pieces it is made of.


def tables(case: Case, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin (1, S, d) of rotary positions."""
    half = case.shape.head_dim // 2
    frequency = 10_000.0 ** (-torch.arange(half, device=device) / half)
    angle = (torch.arange(case.tokens, device=device)[:, None] * frequency).repeat(1, 2)[None]
    return angle.cos().to(case.torch_dtype), angle.sin().to(case.torch_dtype)


def make_qkv(case: Case, device: torch.device) -> Inputs:
    shape = case.shape
    lone = case.rows == 1  # a lone generated token has no order to hide
    cos, sin = tables(case, device)
    return Inputs(
        z_q=randn(case, device, 1, case.rows, shape.query_width),
        z_k=randn(case, device, 1, case.rows, shape.kv_width),
        z_v=randn(case, device, 1, case.rows, shape.kv_width),
        position=None if lone else permutations(device, 1, case.rows)[:, : case.tokens].contiguous(),
        cos=cos,
        sin=sin,
        query=permutations(device, 1, shape.heads, shape.head_dim),
        key=permutations(device, 1, shape.kv_heads, shape.head_dim),
        value=permutations(device, 1, shape.kv_heads, shape.head_dim),
    )


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotary step as transformers writes it."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]


def gathered(x: Tensor, feature_index: Tensor) -> Tensor:
    return x.gather(-1, feature_index[:, :, None].expand(x.shape))


def qkv_unfused(i: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    def heads(z: Tensor) -> Tensor:
        rows = z if i.position is None else rows_from(z, i.position)
        return rows.unflatten(-1, (-1, i.query.shape[-1])).transpose(1, 2)

    q = gathered(rotated(heads(i.z_q), i.cos, i.sin), i.query)
    k = gathered(rotated(heads(i.z_k), i.cos, i.sin), i.key)
    return q, k, gathered(heads(i.z_v), i.value)


def qkv_bytes(case: Case) -> int:
    """S rows of Q, K and V in and out, cos and sin, a position for each token and a place for each feature."""
    shape = case.shape
    width = shape.query_width + 2 * shape.kv_width
    positions = 8 * case.tokens if case.rows > 1 else 0
    return case.itemsize * case.tokens * (2 * width + 2 * shape.head_dim) + positions + 8 * width


QKV = Operation(
    make=make_qkv,
    contestants=lambda case: (
        Contestant("SCX", SCX, lambda i: ops.qkv_decode_encode(**vars(i))),
        Contestant("PyTorch, unfused", RIVAL, qkv_unfused),
        copy_of(qkv_bytes, case),
    ),
    plain=lambda i: reference.qkv_decode_encode(**vars(i)),
    bytes=qkv_bytes,
    flops=lambda case: 3 * case.tokens * (case.shape.query_width + case.shape.kv_width),
)


def make_heads(case: Case, device: torch.device) -> Inputs:
    shape = case.shape
    cos, sin = tables(case, device)
    x = randn(case, device, 1, shape.kv_heads, case.tokens, shape.head_dim)
    return Inputs(x=x, cos=cos, sin=sin, feature_index=permutations(device, 1, shape.kv_heads, shape.head_dim))


def heads_bytes(case: Case) -> int:
    """A layer's keys in and out, and a place for each feature."""
    return case.shape.kv_width * (2 * case.tokens * case.itemsize + 8)


def rotary_bytes(case: Case) -> int:
    return heads_bytes(case) + 2 * case.tokens * case.shape.head_dim * case.itemsize


PERMUTE_FEATURES = Operation(
    make=make_heads,
    contestants=lambda case: (
        Contestant("SCX", SCX, lambda i: ops.permute_features(i.x, i.feature_index)),
        Contestant("PyTorch, unfused", RIVAL, lambda i: torch.take_along_dim(i.x, i.feature_index[:, :, None], dim=-1)),
        copy_of(heads_bytes, case),
    ),
    plain=lambda i: reference.permute_features(i.x, i.feature_index),
    bytes=heads_bytes,
    flops=lambda case: 0,
)
ROTARY_PERMUTE = Operation(
    make=make_heads,
    contestants=lambda case: (
        Contestant("SCX", SCX, lambda i: ops.rotary_permute(i.x, i.cos, i.sin, i.feature_index)),
        Contestant("PyTorch, unfused", RIVAL, lambda i: gathered(rotated(i.x, i.cos, i.sin), i.feature_index)),
        copy_of(rotary_bytes, case),
    ),
    plain=lambda i: reference.rotary_permute(i.x, i.cos, i.sin, i.feature_index),
    bytes=rotary_bytes,
    flops=lambda case: 3 * case.tokens * case.shape.kv_width,
)


def image_bytes(case: Case) -> int:
    """Noise in and its image out in float32, and the weight."""
    shape = case.shape
    elements = case.rows * (shape.hidden + shape.query_width)
    return 4 * elements + case.itemsize * shape.hidden * shape.query_width


NOISE_IMAGE = Operation(
    make=make_linear,
    contestants=lambda case: (
        Contestant("SCX", SCX, lambda i: ops.noise_image(i.noise, i.weight)),
        Contestant("PyTorch, unfused", RIVAL, lambda i: i.noise @ i.weight.float().T),
        copy_of(image_bytes, case),
    ),
    plain=lambda i: reference.noise_image(i.noise, i.weight),
    bytes=image_bytes,
    flops=LINEAR.flops,
)


# Attention: of a whole prompt, and of one token on its cache.


def make_attention(case: Case, device: torch.device) -> Inputs:
    shape, batch = case.shape, case.batch
    return Inputs(
        q=randn(case, device, batch, shape.heads, case.tokens, shape.head_dim),
        k=randn(case, device, batch, shape.kv_heads, case.keys, shape.head_dim),
        v=randn(case, device, batch, shape.kv_heads, case.keys, shape.head_dim),
        output_index=permutations(device, batch, shape.heads, shape.head_dim),
    )


def attend(function: Callable[..., Tensor], i: Inputs) -> Tensor:
    is_causal = i.q.shape[2] > 1
    options = {"softmax_scale": i.q.shape[-1] ** -0.5, "is_causal": is_causal, "output_index": i.output_index}
    return function(i.q, i.k, i.v, **options)


def sdpa(i: Inputs) -> Tensor:
    grouped = i.q.shape[1] != i.k.shape[1]
    return F.scaled_dot_product_attention(i.q, i.k, i.v, is_causal=i.q.shape[2] > 1, enable_gqa=grouped)


def sdpa_by(name: str, backend: SDPBackend) -> Contestant:
    """One of PyTorch's backends on the encoded Q, K, V; it leaves the output in the order of V's features."""

    def finish(i: Inputs, out: Tensor) -> Tensor:
        return gathered(out, i.output_index)

    return Contestant(f"sdpa, {name}", RIVAL, sdpa, within=lambda: sdpa_kernel(backend), finish=finish)


def sample(x: Tensor) -> Tensor:
    """First and last sequence, and up to QUERY_SAMPLE queries, of (B, H, S, d)."""
    batches = sorted({0, x.shape[0] - 1})
    count = min(x.shape[2], QUERY_SAMPLE)
    return x[batches][:, :, torch.linspace(0, x.shape[2] - 1, count, device=x.device).long()]


def exact_attention(i: Inputs) -> Tensor:
    """Sampled queries in float64, by the formula."""
    batches, groups = sorted({0, len(i.q) - 1}), i.q.shape[1] // i.k.shape[1]
    q = sample(i.q).double()
    k, v = (x[batches].double().repeat_interleave(groups, dim=1) for x in (i.k, i.v))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if i.q.shape[2] > 1:
        key = torch.arange(k.shape[2], device=k.device)
        query = torch.linspace(0, i.q.shape[2] - 1, q.shape[2], device=k.device).long()
        scores.masked_fill_(key > query[:, None], float("-inf"))
    return gathered(scores.softmax(-1) @ v, i.output_index[batches])


def attention_bytes(case: Case) -> int:
    """Q in and the output out, K and V in, a place for each feature of the output."""
    shape = case.shape
    elements = 2 * case.tokens * shape.query_width + 2 * case.keys * shape.kv_width
    return case.batch * (case.itemsize * elements + 8 * shape.query_width)


def attention_flops(case: Case) -> int:
    """Two products per query and key that see each other: all with the cache, half and the diagonal in a prompt."""
    pairs = case.tokens * case.cached if case.cached else case.tokens * (case.tokens + 1) // 2
    return 4 * case.batch * case.shape.query_width * pairs


def attention_contestants(case: Case) -> tuple[Contestant, ...]:
    def scx(i: Inputs) -> Tensor:
        return attend(ops.attention, i)

    return (
        Contestant("SCX", SCX, scx),
        *(() if case.cached else (by_triton(scx),)),
        Contestant("PyTorch, unfused", RIVAL, lambda i: gathered(sdpa(i), i.output_index)),
        sdpa_by("flash", SDPBackend.FLASH_ATTENTION),
        sdpa_by("cuDNN", SDPBackend.CUDNN_ATTENTION),
        sdpa_by("memory-efficient", SDPBackend.EFFICIENT_ATTENTION),
        sdpa_by("math", SDPBackend.MATH),
        copy_of(attention_bytes, case),
    )


ATTENTION = Operation(
    make=make_attention,
    contestants=attention_contestants,
    plain=lambda i: attend(reference.attention, i),
    bytes=attention_bytes,
    flops=attention_flops,
    exact=exact_attention,
    select=sample,
)

OPERATIONS = {
    "inject_permute": inject_operation(),
    "inject_permute+norm": inject_operation(norm=True),
    "inject_permute+noise": inject_operation(noise=True),
    "strip_restore": STRIP,
    "permuted_linear": product_operation(),
    "permuted_linear+noise": product_operation(noise=True),
    "linear+noise": LINEAR,
    "noise_image": NOISE_IMAGE,
    "qkv_decode_encode": QKV,
    "rotary_permute": ROTARY_PERMUTE,
    "permute_features": PERMUTE_FEATURES,
    "attention": ATTENTION,
    "attention_step": ATTENTION,
}
BY_ROWS = ("inject_permute", "inject_permute+norm", "strip_restore", "permuted_linear", "qkv_decode_encode")
ONCE = ("inject_permute+noise", "permuted_linear+noise", "linear+noise", "noise_image", "rotary_permute")
"""Operations of the first block only, or parts of others: measured at one size a model."""


def cases(on_cuda: bool) -> Iterator[Case]:
    """Every case of a machine, the models in the order of SHAPES; on a CPU the smallest one alone."""
    for model in SHAPES if on_cuda else ("SmolLM2",):
        yield from _cases_of(Case("", model, 1, dtype="bfloat16" if on_cuda else "float32"), on_cuda)


def _cases_of(base: Case, on_cuda: bool) -> Iterator[Case]:
    usual = 4096 if on_cuda else 1024
    shown = base.model == "Llama-3-8B" or not on_cuda
    for operation in BY_ROWS:
        for tokens, redundant in _row_sizes(on_cuda):
            headline = shown and (tokens, redundant) == (usual, 100)
            yield replace(base, operation=operation, tokens=tokens, redundant=redundant, headline=headline)
    for tokens in (128, 1024, 4096, 16384) if on_cuda else (128, 1024):
        headline = shown and tokens == usual
        yield replace(base, operation="attention", tokens=tokens, headline=headline)
    for batch in (1, 8, 64) if on_cuda else (1, 8):
        for cached in (128, 1024, 10240) if on_cuda else (128, 1024):
            headline = shown and (batch, cached) == ((8, 10240) if on_cuda else (1, 1024))
            yield replace(base, operation="attention_step", batch=batch, cached=cached, headline=headline)
    for operation in ONCE:
        yield replace(base, operation=operation, tokens=usual, redundant=100 if "noise" in operation else 0)
    yield replace(base, operation="permute_features", tokens=usual)


def _row_sizes(on_cuda: bool) -> Iterator[tuple[int, int]]:
    """(tokens, redundant): none, 100, and as many redundant rows as tokens."""
    if not on_cuda:
        yield from ((1, 0), (128, 0), (128, 100), (1024, 0), (1024, 100), (1024, 1024))
        return
    yield from ((1, 0), (128, 100))
    for tokens in (1024, 4096, 16384):
        yield from ((tokens, 0), (tokens, 100), (tokens, tokens))
