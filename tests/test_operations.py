"""The public operations: who computes them, and how they compose with the rest of PyTorch."""

import inspect

import pytest
import torch
from every_operation import NAMES, arguments, operation
from parity import FLOOR, by_dtype, needs, permutations, randn, run_kernel, tensors
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

import scx_kernels as ops
from scx_kernels import operations, operators, reference

by_name = pytest.mark.parametrize("name", NAMES)
with_kernels = needs("triton")


@with_kernels
@by_name
@by_dtype
def test_backends_agree(name: str, dtype: torch.dtype) -> None:
    results = []
    for backend in ("reference", "triton"):
        torch.manual_seed(3)
        args, options = arguments(name, dtype)
        with ops.backend(backend):
            writes = ("keys", "values", "cache")
            results.append(tensors(run_kernel(operation(name), *args, writes=writes, **options)))
    for expected, got in zip(*results, strict=True):
        assert got.dtype == expected.dtype
        assert (got - expected).abs().max() <= 16 * FLOOR[dtype] * expected.abs().max()


@pytest.mark.parametrize("name", [name for name in NAMES if " " not in name])
def test_signature_and_documentation_are_the_references(name: str) -> None:
    assert inspect.signature(getattr(ops, name)) == inspect.signature(getattr(reference, name))
    assert getattr(ops, name).__doc__ == getattr(reference, name).__doc__


@pytest.mark.slow
@with_kernels
@by_name
def test_opcheck(name: str) -> None:
    """Schema, shape rule and tracing of the registered operators, the kernels inside."""
    args, options = arguments(name)
    registered = {
        "qkv into a cache": "qkv_into_cache",
        "qkv into a sealed cache": "qkv_into_sealed_cache",
        "attention into the next encoding": "attention",
    }
    operator = getattr(torch.ops.scx_kernels, registered.get(name, name.replace(" ", "_"))).default
    for of_the_public_name in ("in_place", "return_unsealed"):
        options.pop(of_the_public_name, None)
    options = operators.spelled(options)
    torch.library.opcheck(operator, args, options)


def test_a_schema_is_read_off_the_reference() -> None:
    """What must be given or is written into comes first; a sealing is spelled as tensors and numbers."""
    expected = torch._C.parse_schema(
        "scx_kernels::qkv_into_cache(Tensor z_q, Tensor z_k, Tensor z_v, Tensor? position, Tensor cos, Tensor sin, "
        "Tensor query, Tensor key, Tensor value, Tensor(a!) keys, Tensor(b!) values, Tensor[]? images=None, "
        "Tensor? q_norm=None, Tensor? k_norm=None, float eps=1e-6, ScalarType? dtype=None, "
        "SymInt offset=0, Tensor? offsets=None, Tensor? sealing_key=None, Tensor? sealing_writes=None, "
        "SymInt[]? sealing_numbers=None) -> Tensor"
    )
    assert torch.ops.scx_kernels.qkv_into_cache.default._schema == expected


@by_name
def test_fake_tensors_take_the_shape_rule(name: str) -> None:
    args, options = arguments(name)
    expected = tensors(operation(name)(*args, **options))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, ops.backend("triton"):
        given = pytree.tree_map_only(torch.Tensor, mode.from_tensor, (args, options))
        got = tensors(operation(name)(*given[0], **given[1]))
    assert [(x.shape, x.dtype) for x in got] == [(x.shape, x.dtype) for x in expected]


# In plain PyTorch, data alone says how many rows are redundant; what injects none compiles there as well.
COMPILED = [pytest.param(name, "triton", marks=with_kernels) for name in NAMES]
COMPILED += [(name, "reference") for name in ("strip_restore", "qkv_decode_encode", "attention", "unlock")]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "backend"), COMPILED)
def test_compiles_without_graph_breaks(name: str, backend: str) -> None:
    args, options = arguments(name)
    with ops.backend(backend):
        expected = operation(name)(*args, **options)
        torch._dynamo.reset()  # the limit on recompilations counts the other cases of this test
        compiled = torch.compile(lambda *a, **k: operation(name)(*a, **k), fullgraph=True, backend="aot_eager")
        for a, b in zip(tensors(compiled(*args, **options)), tensors(expected), strict=True):
            torch.testing.assert_close(a, b)


def test_gradients_take_the_reference() -> None:
    x = randn(1, 4, 8).requires_grad_()
    with ops.backend("triton"):
        ops.inject_permute(x, permutations(1, 4)).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_backend_is_named() -> None:
    with pytest.raises(ValueError, match="backend: expected one of"), ops.backend("cuda"):
        pass


def test_double_precision_takes_the_reference() -> None:
    x = randn(1, 4, 8).double()
    with ops.backend("triton"):
        assert ops.inject_permute(x, permutations(1, 4)).dtype == torch.float64


def test_few_rows_and_many(monkeypatch) -> None:
    """A product of many rows is a gather and the vendor's product; a noisy one, or one of few rows, is the kernel."""
    called = []
    monkeypatch.setattr(operators, "takes_triton", lambda args, options: True)
    monkeypatch.setattr(operations, "_permuted_linear", lambda *args, **options: called.append("kernel"))
    monkeypatch.setattr(operations, "_inject_permute", lambda x, *args: called.append("gather") or x)
    weight = randn(4, 8)
    for rows in (64, 65):
        ops.permuted_linear(randn(1, rows, 8), weight, permutations(1, rows))
    ops.permuted_linear(randn(1, 65, 8), weight, permutations(1, 65), noise=randn(65, 8))
    assert called == ["kernel", "gather", "kernel"]


@pytest.mark.parametrize(
    "name", ["permuted_linear", "permuted_linears", "attention", "attention into the next encoding"]
)
def test_what_a_vendors_kernel_computes(monkeypatch, name: str) -> None:
    """On a GPU large products and plain attention go to the vendor; the permutations around them are the kernels'."""
    monkeypatch.setattr(operators, "takes_triton", lambda args, options: True)
    monkeypatch.setattr(operations, "_FEW_ROWS", 1)
    args, options = arguments(name)
    for absent in ("noise", "image", "window", "kv_start", "kv_length"):
        options.pop(absent, None)
    got, expected = (f(*args, **options) for f in (operation(name), getattr(reference, operation(name).__name__)))
    for a, b in zip(tensors(got), tensors(expected), strict=True):
        torch.testing.assert_close(a, b)
