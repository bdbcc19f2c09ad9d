"""The public operations: one name each, whatever device the tensors are on.

CPU tensors take the reference. CUDA and ROCm tensors take Triton; where a vendor's product or attention is the faster
kernel, the operation takes that one on the encoded tensors. Where gradients are wanted the reference serves every
device: the kernels have no backward.

A kernel's launcher is called directly, and registered with PyTorch as an operator besides: where something compiles or
traces, it sees one call with a shape rule. The dispatcher would cost more of the host's time than the launch.

`SCX_KERNELS` in the environment, or `backend(...)` in code, says otherwise for debugging: "reference" keeps to plain
PyTorch; "triton" takes the kernels for everything, also for CPU tensors, on which they run in Triton's interpreter
(`TRITON_INTERPRET=1` before triton is imported).

Names, arguments and results are those of `scx_kernels.reference`, where they are documented.
"""

import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial, wraps
from importlib import import_module
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn import functional as F

from scx_kernels import checks, reference
from scx_kernels.sealing import Sealing, check_cache

__all__ = [
    "attention",
    "attention_step",
    "backend",
    "inject_permute",
    "is_accelerator",
    "noise_image",
    "permuted_linear",
    "permuted_linears",
    "qkv_decode_encode",
    "strip_restore",
    "unlock",
]

BACKENDS = ("auto", "reference", "triton")
_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_EVERY_BACKEND = "CompositeExplicitAutograd"
# A product of more rows is bound by arithmetic, where a vendor's product gains more than the gather it would absorb.
_FEW_ROWS = 64
_Function = TypeVar("_Function", bound=Callable)


def _checked(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"backend: expected one of {BACKENDS}, got {name!r}")
    return name


# A plain global, which torch.compile guards on; the switch is for debugging, and for the whole process.
_backend = _checked(os.environ.get("SCX_KERNELS", "auto"))


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Choose, within a `with` block and for the whole process, who computes: "auto", "reference" or "triton".

    Raises: ValueError for another name.
    """
    global _backend
    before, _backend = _backend, _checked(name)
    try:
        yield
    finally:
        _backend = before


# A plain global, as the backend is.
_accelerators: tuple[str, ...] = ("cuda",)


def is_accelerator(device: torch.device) -> bool:
    """Whether tensors on this device take the kernels, unless `backend` says otherwise: CUDA's and ROCm's, which
    PyTorch calls "cuda" as well."""
    return device.type in _accelerators


@contextmanager
def accelerator(kind: str) -> Iterator[None]:
    """Take, within a `with` block and for the whole process, devices of this type for accelerators, such as "cpu": to
    measure what launching costs the host where no GPU is. Triton needs a driver that does not launch, then."""
    global _accelerators
    before, _accelerators = _accelerators, (*_accelerators, kind)
    try:
        yield
    finally:
        _accelerators = before


def _takes_triton(args: Sequence[Any], options: dict[str, Any]) -> bool:
    """Whether these arguments are for the kernels; the first tensor says on which device and in which dtype."""
    first = args[0] if args and isinstance(args[0], Tensor) else next(_tensors((*args, *options.values())))
    if first.dtype not in _KERNEL_DTYPES or _backend == "reference":
        return False
    if _backend == "auto" and not is_accelerator(first.device):
        return False
    return not (torch.is_grad_enabled() and any(x.requires_grad for x in _tensors((*args, *options.values()))))


def _tensors(given: Iterable[Any]) -> Iterator[Tensor]:
    for x in given:
        yield from (y for y in (x if isinstance(x, (list, tuple)) else (x,)) if isinstance(y, Tensor))


def _is_traced(first: Any) -> bool:
    """Whether somebody follows the operators that are called: a compiler, a tracer, a mode or a kind of tensor; or
    there are only shapes to compute with."""
    if torch.compiler.is_compiling() or (type(first) is not Tensor and type(first) is not Parameter):
        return True
    return first.is_meta or bool(torch._C._len_torch_dispatch_stack()) or torch._C._get_tracing_state() is not None


def _is_served_at_once(x: Any) -> bool:
    """Whether the kernels take a call with this first argument: all that the two functions above ask, in the usual case
    that no gradients are recorded, and in little of the host's time."""
    kind = type(x)
    return (
        not torch.compiler.is_compiling()
        and (kind is Tensor or kind is Parameter)
        # As `is_accelerator`, without making a device: a GPU's, or the CPU's where it stands in for one.
        and (x.is_cuda or (x.is_cpu and "cpu" in _accelerators))
        and _backend == "auto"
        and x.dtype in _KERNEL_DTYPES
        and not torch.is_grad_enabled()
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._get_tracing_state() is None
    )


def spelling(name: str, *, optional: bool = False) -> str:
    """How an operator's schema spells a sealing, which is one argument everywhere else."""
    mark, default = ("?", "=None") if optional else ("", "")
    parts = (("Tensor", "key"), ("Tensor", "writes"), ("SymInt[]", "numbers"))
    return ", ".join(f"{kind}{mark} {name}_{part}{default}" for kind, part in parts)


_SEALING = spelling("sealing", optional=True)


def _spelled(options: dict[str, Any]) -> dict[str, Any]:
    spelled: dict[str, Any] = {}
    for name, value in options.items():
        if isinstance(value, Sealing):
            key, writes, *numbers = value[:5]
            spelled |= {f"{name}_key": key, f"{name}_writes": writes, f"{name}_numbers": numbers}
        elif name != "sealing":
            spelled[name] = value
    return spelled


def _unspelled(arguments: dict[str, Any]) -> dict[str, Any]:
    for name in [spelled.removesuffix("_numbers") for spelled in arguments if spelled.endswith("_numbers")]:
        key, writes, numbers = (arguments.pop(f"{name}_{part}", None) for part in ("key", "writes", "numbers"))
        if key is not None:
            arguments[name] = Sealing(key, writes, *numbers)
    return arguments


_library = torch.library.Library("scx_kernels", "DEF")
OPERATORS: dict[str, "Operator"] = {}
"""Every operator by its name."""


class Operator:
    """A kernel's launcher, and the operator `scx_kernels::NAME` that compilers and tracers see in its place.

    Kernels, and triton, are imported by the first call.

    Args:
        module: the file of `scx_kernels.kernels` where the launcher of this name is.
        schema: of the operator, whose arguments have the launcher's names.
        shape_rule: takes the launcher's arguments, gives results without data (the operator's fake implementation).
    """

    def __init__(self, name: str, module: str, schema: str, shape_rule: Callable[..., Any]) -> None:
        self.name = name
        self.module = module
        self.shape_rule = shape_rule
        self._names = [argument.split("=")[0].split()[-1] for argument in schema[1 : schema.index(") ->")].split(",")]
        _library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
        # On CPU tensors, too: the interpreter runs there.
        _library.impl(name, lambda *args, **options: self.launcher(**self.arguments(args, options)), _EVERY_BACKEND)
        torch.library.register_fake(
            f"scx_kernels::{name}", lambda *args, **options: shape_rule(**self.arguments(args, options)), lib=_library
        )
        self._operator = getattr(torch.ops.scx_kernels, name).default
        OPERATORS[name] = self

    @cached_property
    def launcher(self) -> Callable[..., Any]:
        """The function that launches the kernel."""
        launcher: Callable[..., Any] = getattr(import_module(f"scx_kernels.kernels.{self.module}"), self.name)
        return launcher

    def arguments(self, args: Sequence[Any], options: dict[str, Any]) -> dict[str, Any]:
        """The launcher's arguments, from those that the dispatcher gives in the schema's order and spelling."""
        return _unspelled(dict(zip(self._names, args, strict=False)) | options)

    def __call__(self, *args: Any, **options: Any) -> Any:
        if not args or _is_traced(args[0]):
            return self._operator(*args, **_spelled(options))
        return self.launcher(*args, **options)


def operation(original: _Function, operator: Operator | None = None) -> Callable[[Callable], _Function]:
    """Give a function that runs on the kernels its public face: signature and documentation of the reference, which
    takes the call where the kernels do not.

    Args:
        operator: its launcher takes the call just as it is where nobody traces it.
    """
    names = frozenset(inspect.signature(original).parameters)

    def decorate(on_kernels: Callable) -> _Function:
        @wraps(original)
        def call(*args: Any, **options: Any) -> Any:
            # Launchers take more than this; the reference raises for what nobody knows.
            if not names.issuperset(options):
                return original(*args, **options)
            if args and _is_served_at_once(args[0]):
                return on_kernels(*args, **options) if operator is None else operator.launcher(*args, **options)
            return on_kernels(*args, **options) if _takes_triton(args, options) else original(*args, **options)

        return cast(_Function, call)

    return decorate


def _inject_shape(
    x: Tensor,
    row_index: Tensor | None,
    redundant: Tensor | None = None,
    *,
    feature_index: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    noise: Tensor | None = None,
) -> Tensor:
    checks.check_rows(x, row_index, redundant)
    checks.check_inject(x, row_index, feature_index, norm_weight, noise)
    rows = x.shape[1] if row_index is None else row_index.shape[1]
    return x.new_empty(x.shape[0], rows, x.shape[2], dtype=x.dtype if noise is None else torch.float32)


_inject_permute = Operator(
    "inject_permute",
    "rows",
    "(Tensor x, Tensor? row_index, Tensor? redundant=None, Tensor? feature_index=None, Tensor? norm_weight=None, "
    "float eps=1e-6, Tensor? noise=None) -> Tensor",
    _inject_shape,
)


@operation(reference.inject_permute, _inject_permute)
def inject_permute(*args: Any, **options: Any) -> Tensor:
    return _inject_permute(*args, **options)


def _strip_shape(z: Tensor, position: Tensor, residual: Tensor | None = None, *, image: Tensor | None = None) -> Tensor:
    checks.check_strip(z, position, residual, image)
    return z.new_empty(z.shape[0], position.shape[1], z.shape[2])


_strip_restore = Operator(
    "strip_restore",
    "rows",
    "(Tensor z, Tensor position, Tensor? residual=None, Tensor? image=None) -> Tensor",
    _strip_shape,
)


@operation(reference.strip_restore, _strip_restore)
def strip_restore(*args: Any, **options: Any) -> Tensor:
    return _strip_restore(*args, **options)


def _linear_shape(
    x: Tensor,
    weight: Tensor,
    row_index: Tensor | None = None,
    redundant: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    noise: Tensor | None = None,
    image: Tensor | None = None,
    scatter_index: Tensor | None = None,
    out_rows: int | None = None,
) -> Tensor:
    checks.check_linear(x, weight, row_index, redundant, bias, noise, image, scatter_index, out_rows)
    rows = x.shape[1] if row_index is None else row_index.shape[1]
    noisy = noise is not None or x.dtype != weight.dtype
    dtype = torch.float32 if noisy and image is None else weight.dtype
    return x.new_empty(x.shape[0], rows if out_rows is None else out_rows, weight.shape[0], dtype=dtype)


_permuted_linear = Operator(
    "permuted_linear",
    "product",
    "(Tensor x, Tensor weight, Tensor? row_index=None, Tensor? redundant=None, Tensor? bias=None, "
    "Tensor? noise=None, Tensor? image=None, Tensor? scatter_index=None, SymInt? out_rows=None) -> Tensor",
    _linear_shape,
)


def _is_large(x: Tensor, row_index: Tensor | None) -> bool:
    rows = x.shape[0] * x.shape[1] if row_index is None else row_index.numel()
    return _backend == "auto" and rows > _FEW_ROWS


@operation(reference.permuted_linear)
def permuted_linear(
    x: Tensor,
    weight: Tensor,
    row_index: Tensor | None = None,
    redundant: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    noise: Tensor | None = None,
    image: Tensor | None = None,
    scatter_index: Tensor | None = None,
    out_rows: int | None = None,
) -> Tensor:
    noisy = noise is not None or image is not None or x.dtype != weight.dtype
    if noisy or not _is_large(x, row_index):
        return _permuted_linear(
            x, weight, row_index, redundant, bias, noise=noise, image=image, scatter_index=scatter_index,
            out_rows=out_rows,
        )  # fmt: skip
    checks.check_linear(x, weight, row_index, redundant, bias, noise, image, scatter_index, out_rows)
    product = F.linear(x if row_index is None else _inject_permute(x, row_index, redundant), weight, bias)
    if scatter_index is None:
        return product
    return _strip_restore(product, scatter_index.argsort(dim=1)[:, :out_rows])


def _linears_shape(
    x: Tensor,
    weights: Sequence[Tensor],
    row_index: Tensor | None = None,
    redundant: Tensor | None = None,
    biases: Sequence[Tensor | None] | None = None,
) -> Tensor:
    checks.check_linears(x, weights, row_index, redundant, biases)
    rows = x.shape[1] if row_index is None else row_index.shape[1]
    return x.new_empty(x.shape[0], rows, sum(weight.shape[0] for weight in weights))


_permuted_linears = Operator(
    "permuted_linears",
    "product",
    "(Tensor x, Tensor[] weights, Tensor? row_index=None, Tensor? redundant=None, Tensor?[]? biases=None) -> Tensor",
    _linears_shape,
)


@operation(reference.permuted_linears)
def permuted_linears(
    x: Tensor,
    weights: Sequence[Tensor],
    row_index: Tensor | None = None,
    redundant: Tensor | None = None,
    biases: Sequence[Tensor | None] | None = None,
) -> tuple[Tensor, ...]:
    if not _is_large(x, row_index):
        side_by_side = _permuted_linears(x, list(weights), row_index, redundant, biases and list(biases))
        return side_by_side.split_with_sizes([weight.shape[0] for weight in weights], dim=2)
    biases = checks.check_linears(x, weights, row_index, redundant, biases)
    rows = x if row_index is None else _inject_permute(x, row_index, redundant)
    return tuple(F.linear(rows, weight, bias) for weight, bias in zip(weights, biases, strict=True))


@wraps(reference.noise_image)
def noise_image(noise: Tensor, weight: Tensor) -> Tensor:
    return permuted_linear(noise, weight)


_QKV_ROWS = (
    "Tensor z_q, Tensor z_k, Tensor z_v, Tensor? position, Tensor cos, Tensor sin, Tensor query, Tensor key, "
    "Tensor value"
)
_QKV_OPTIONS = "Tensor[]? images=None, Tensor? q_norm=None, Tensor? k_norm=None, float eps=1e-6, ScalarType? dtype=None"


def _qkv_shape(
    z_q: Tensor,
    z_k: Tensor,
    z_v: Tensor,
    position: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    images: Sequence[Tensor] | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
    keys: Tensor | None = None,
    values: Tensor | None = None,
    offset: int = 0,
    offsets: Tensor | None = None,
    sealing: Sealing | None = None,
    return_unsealed: bool = False,
) -> Any:
    dtype = checks.check_qkv(
        z_q, z_k, z_v, position, cos, sin, query, key, value, images, q_norm, k_norm, dtype, keys, values, offset,
        offsets,
    )  # fmt: skip
    checks.check_return_unsealed(return_unsealed, keys, sealing is not None)
    tokens = z_q.shape[1] if position is None else position.shape[1]
    batch, heads, size = query.shape
    q = z_q.new_empty(batch, tokens, heads, size, dtype=dtype).transpose(1, 2)
    k, v = (z_q.new_empty(batch, key.shape[1], tokens, size, dtype=dtype) for _ in range(2))
    check_cache(k if keys is None else keys, v if values is None else values, sealing)
    return q if keys is not None and not return_unsealed else (q, k, v)


_qkv_decode_encode = Operator(
    "qkv_decode_encode", "qkv", f"({_QKV_ROWS}, {_QKV_OPTIONS}, {_SEALING}) -> (Tensor, Tensor, Tensor)", _qkv_shape
)
_QKV_INTO_CACHE = (
    f"({_QKV_ROWS}, Tensor(a!) keys, Tensor(b!) values, {_QKV_OPTIONS}, SymInt offset=0, Tensor? offsets=None, "
    f"{_SEALING}) -> "
)
_qkv_into_cache = Operator("qkv_into_cache", "qkv", f"{_QKV_INTO_CACHE}Tensor", _qkv_shape)
_qkv_into_sealed_cache = Operator(
    "qkv_into_sealed_cache",
    "qkv",
    f"{_QKV_INTO_CACHE}(Tensor, Tensor, Tensor)",
    partial(_qkv_shape, return_unsealed=True),
)


@operation(reference.qkv_decode_encode, _qkv_decode_encode)
def qkv_decode_encode(
    *args: Any, keys: Tensor | None = None, values: Tensor | None = None, offset: int = 0,
    offsets: Tensor | None = None, sealing: Sealing | None = None, return_unsealed: bool = False, **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if keys is None or values is None:
        checks.check_no_slots(keys, values, offset, offsets)
        checks.check_return_unsealed(return_unsealed, keys, sealing is not None)
        return _qkv_decode_encode(*args, sealing=sealing, **options)
    options |= {"keys": keys, "values": values, "offset": offset, "offsets": offsets}
    if return_unsealed:
        checks.check_return_unsealed(return_unsealed, keys, sealing is not None)
        return _qkv_into_sealed_cache(*args, sealing=sealing, **options)
    return _qkv_into_cache(*args, sealing=sealing, **options), keys, values


def _attention_shape(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float,
    mask: Tensor | None = None,
    is_causal: bool = False,
    window: int | None = None,
    kv_start: Tensor | None = None,
    kv_length: Tensor | None = None,
    output_index: Tensor | None = None,
    row_index: Tensor | None = None,
    redundant: Tensor | None = None,
    sealing: Sealing | None = None,
) -> Tensor:
    checks.check_attention(
        q, k, v, softmax_scale, mask, is_causal, window, kv_start, kv_length, output_index, row_index, redundant
    )
    check_cache(k, v, sealing)
    batch, heads, tokens, size = q.shape
    if row_index is not None:
        return q.new_empty(batch, row_index.shape[1], heads * size)
    return q.new_empty(batch, tokens, heads, size).transpose(1, 2)


_attention = Operator(
    "attention",
    "attention",
    "(Tensor q, Tensor k, Tensor v, float softmax_scale, Tensor? mask=None, bool is_causal=False, "
    "SymInt? window=None, Tensor? kv_start=None, Tensor? kv_length=None, Tensor? output_index=None, "
    f"Tensor? row_index=None, Tensor? redundant=None, {_SEALING}) -> Tensor",
    _attention_shape,
)


_refuses_unproven = True


@contextmanager
def allow_unproven() -> Iterator[None]:
    """Within it nothing is refused for having failed on a GPU: for whoever looks for the cause, or has no GPU."""
    global _refuses_unproven
    before, _refuses_unproven = _refuses_unproven, False
    try:
        yield
    finally:
        _refuses_unproven = before


def is_refused_on_sealed(q: Tensor) -> bool:
    """Whether `attention` of q, (..., d), on a sealed cache is refused: what failed on a GPU, for a reason that is not
    known (bench/results/h100/README.md)."""
    size = q.shape[-1]
    return _refuses_unproven and q.is_cuda and q.dtype.itemsize == 2 and size & (size - 1) != 0


@operation(reference.attention)
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float,
    mask: Tensor | None = None,
    is_causal: bool = False,
    window: int | None = None,
    kv_start: Tensor | None = None,
    kv_length: Tensor | None = None,
    output_index: Tensor | None = None,
    row_index: Tensor | None = None,
    redundant: Tensor | None = None,
    sealing: Sealing | None = None,
) -> Tensor:
    # Unsealing into memory instead would break the cache's promise, and a result that may be wrong would break any.
    if sealing is not None and is_refused_on_sealed(q):
        raise NotImplementedError(
            "attention: on a sealed cache, several tokens or a padded one gave wrong results on a GPU, in half "
            f"precision with heads of {q.shape[-1]} features; take a permuted cache, or float32, or read prompts whole"
        )
    # PyTorch's fused backends hold whole prompts better; what they would need a mask for is the kernel's.
    limited = window is not None or kv_start is not None or kv_length is not None
    # A sealed cache must not lie unsealed in memory, where they would need it.
    if _backend == "triton" or sealing is not None or limited or (is_causal and q.shape[2] != k.shape[2]):
        return _attention(
            q, k, v, softmax_scale=softmax_scale, mask=mask, is_causal=is_causal, window=window, kv_start=kv_start,
            kv_length=kv_length, output_index=output_index, row_index=row_index, redundant=redundant, sealing=sealing,
        )  # fmt: skip
    checks.check_attention(
        q, k, v, softmax_scale, mask, is_causal, window, kv_start, kv_length, output_index, row_index, redundant
    )
    out = reference.grouped_attention(q, k, v, softmax_scale, mask, is_causal)
    if output_index is None and row_index is None:
        return out
    # The permutations ride on the next pass over the rows.
    rows = _inject_permute(out.transpose(1, 2).flatten(2), row_index, redundant, feature_index=output_index)
    return rows if row_index is not None else rows.unflatten(2, (q.shape[1], -1)).transpose(1, 2)


def _step_shape(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float,
    window: int | None = None,
    kv_start: Tensor | None = None,
    kv_length: Tensor | None = None,
    position: Tensor | None = None,
    output_index: Tensor | None = None,
    sealing: Sealing | None = None,
) -> Tensor:
    checks.check_attention_step(q, k, v, softmax_scale, window, kv_start, kv_length, position, output_index)
    check_cache(k, v, sealing)
    batch, heads, tokens, size = q.shape
    return q.new_empty(batch, tokens, heads, size).transpose(1, 2)


_attention_step = Operator(
    "attention_step",
    "attention",
    "(Tensor q, Tensor k, Tensor v, float softmax_scale, SymInt? window=None, Tensor? kv_start=None, "
    f"Tensor? kv_length=None, Tensor? position=None, Tensor? output_index=None, {_SEALING}) -> Tensor",
    _step_shape,
)


@operation(reference.attention_step, _attention_step)
def attention_step(*args: Any, **options: Any) -> Tensor:
    return _attention_step(*args, **options)


def _unlock_shape(cache: Tensor, position: Tensor) -> Tensor:
    checks.check_unlock(cache, position)
    return cache.new_empty(*cache.shape[:2], position.shape[1], cache.shape[3])


def _unlock_in_place_shape(cache: Tensor, position: Tensor) -> None:
    checks.check_unlock(cache, position)


_unlock = Operator("unlock", "unlock", "(Tensor cache, Tensor position) -> Tensor", _unlock_shape)
_unlock_in_place = Operator(
    "unlock_in_place", "unlock", "(Tensor(a!) cache, Tensor position) -> ()", _unlock_in_place_shape
)


@operation(reference.unlock, _unlock)
def unlock(cache: Tensor, position: Tensor, *, in_place: bool = False) -> Tensor:
    if not in_place:
        return _unlock(cache, position)
    _unlock_in_place(cache, position)
    return cache[:, :, : position.shape[1]]
