"""The public operations: who computes them, and how they compose with the rest of PyTorch."""

import inspect

import parity
import pytest
import torch
from parity import FLOOR, permutations, randn
from tiny import tiny_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

import scx_kernels as ops
from scx import SCXKeyGenerator, decode_kvcache, encoded_llama
from scx_kernels import operations, reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def arguments(name: str, dtype: torch.dtype = torch.float32) -> tuple[tuple, dict]:
    """Arguments of an operation, with everything optional given that goes together."""
    x, redundant = randn(2, 5, 24, dtype=dtype), randn(2, 3, 24, dtype=dtype)
    row_index = permutations(2, 8)
    weight, bias = randn(16, 24, dtype=dtype), randn(16, dtype=dtype)
    if name == "inject_permute":
        return (x, row_index, redundant), {"norm_weight": randn(24, dtype=dtype), "eps": 1e-5, "noise": randn(2, 8, 24)}
    if name == "strip_restore":
        z, position = randn(2, 8, 24, dtype=dtype), row_index[:, :5].contiguous()
        return (z, position, x), {"image": randn(2, 8, 24)}
    if name == "permuted_linear":
        noise = randn(2, 8, 24)
        image, scatter = ops.noise_image(noise, weight), {"scatter_index": row_index, "out_rows": 5}
        return (x, weight, row_index, redundant, bias), {"noise": noise, "image": image, **scatter}
    if name == "permuted_linears":
        weights = [weight, randn(9, 24, dtype=dtype)]
        return (x, weights, row_index, redundant), {"biases": [bias, None]}
    if name.startswith("qkv"):
        rows = [randn(2, 8, n * 16, dtype=dtype) for n in (4, 2, 2)]
        angle = randn(1, 5, 8).repeat(1, 1, 2)
        tables = (row_index[:, :5].contiguous(), angle.cos().to(dtype), angle.sin().to(dtype))
        options = {"images": [randn(2, 8, n * 16) for n in (4, 2, 2)], "q_norm": randn(16, dtype=dtype)}
        options |= {"k_norm": randn(16, dtype=dtype), "eps": 1e-5}
        if name.startswith("qkv into"):
            caches = {key: torch.zeros(2, 2, 9, 16, dtype=dtype, device=rows[0].device) for key in ("keys", "values")}
            options |= {**caches, "offset": 3}
        if name == "qkv into a sealed cache":
            writes = ops.WriteCounter().take(2, 9, rows[0].device)
            own = ops.Sealing(ops.key_words(bytes(range(32)), rows[0].device), writes, 1, 8)
            options |= {"sealing": own, "return_unsealed": True}
        return (*rows, *tables, *(permutations(2, n, 16) for n in (4, 2, 2))), options
    q, k, v = (randn(2, n, 5, 16, dtype=dtype) for n in (4, 2, 2))
    if name == "attention_step":
        lengths = {"kv_start": index(0, 1), "kv_length": index(4, 3), "window": 3, "position": row_index[:, :4] % 5}
        return (q[:, :, :1], k, v), {"softmax_scale": 0.25, **lengths, "output_index": permutations(2, 4, 16)}
    if name.startswith("unlock"):
        return (k, permutations(2, 5)[:, :4]), {"in_place": name == "unlock in place"}
    options = {"softmax_scale": 0.25, "is_causal": True, "output_index": permutations(2, 4, 16)}
    if name == "attention into the next encoding":
        limits = {"window": 3, "kv_start": index(0, 1), "kv_length": index(5, 3)}
        options |= {**limits, "row_index": row_index, "redundant": randn(2, 3, 64, dtype=dtype)}
    return (q, k, v), options


def index(*values: int) -> torch.Tensor:
    return torch.tensor(values, device=parity.DEVICE)


NAMES = [
    "inject_permute",
    "strip_restore",
    "permuted_linear",
    "permuted_linears",
    "qkv_decode_encode",
    "qkv into a cache",
    "qkv into a sealed cache",
    "attention",
    "attention into the next encoding",
    "attention_step",
    "unlock",
    "unlock in place",
]
by_name = pytest.mark.parametrize("name", NAMES)


def operation(name: str):
    public = {"qkv": "qkv_decode_encode", "attention": "attention", "unlock": "unlock"}
    return getattr(ops, name if hasattr(ops, name) else public[name.split()[0]])


def tensors(result) -> tuple[torch.Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


@by_name
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backends_agree(name: str, dtype: torch.dtype) -> None:
    results = []
    for backend in ("reference", "triton"):
        torch.manual_seed(3)
        args, options = arguments(name, dtype)
        with ops.backend(backend):
            results.append(tensors(operation(name)(*args, **options)))
    for expected, got in zip(*results, strict=True):
        assert got.dtype == expected.dtype
        assert (got - expected).abs().max() <= 16 * FLOOR[dtype] * expected.abs().max()


@pytest.mark.parametrize("name", [name for name in NAMES if " " not in name])
def test_signature_and_documentation_are_the_references(name: str) -> None:
    assert inspect.signature(getattr(ops, name)) == inspect.signature(getattr(reference, name))
    assert getattr(ops, name).__doc__ == getattr(reference, name).__doc__


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
    options = operations._spelled(options)
    torch.library.opcheck(operator, args, options)


@by_name
def test_fake_tensors_take_the_shape_rule(name: str) -> None:
    args, options = arguments(name)
    expected = tensors(operation(name)(*args, **options))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, ops.backend("triton"):
        given = pytree.tree_map_only(torch.Tensor, mode.from_tensor, (args, options))
        got = tensors(operation(name)(*given[0], **given[1]))
    assert [(x.shape, x.dtype) for x in got] == [(x.shape, x.dtype) for x in expected]


# In plain PyTorch, data alone says how many rows are redundant; what injects none compiles there as well.
COMPILED = [(name, "triton") for name in NAMES]
COMPILED += [(name, "reference") for name in ("strip_restore", "qkv_decode_encode", "attention", "unlock")]


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


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_encoded_model_on_the_kernels(prompt, family: str, dtype: torch.dtype) -> None:
    """A whole model gives the reference's logits and caches with every operation computed by its kernel."""
    model = tiny_model(family, dtype=dtype, layers=2)
    ids, keys = prompt(9), {"redundant_num": 3, "alp": True, "master_key": bytes(32)}

    def run(name: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        with encoded_llama(model, SCXKeyGenerator.for_model(model, **keys)), ops.backend(name):
            out = model(ids)
            logits = [out.logits]
            for token in ids[0, :2]:
                out = model(token.view(1, 1), past_key_values=out.past_key_values)
                logits.append(out.logits)
        cache = decode_kvcache(out.past_key_values, out.past_key_values.session)
        return logits, [x for layer in cache.layers for x in (layer.keys, layer.values)]

    plain = model(ids).logits
    by_reference, by_kernels = run("reference"), run("triton")
    for got, expected in zip(by_kernels, by_reference, strict=True):
        for a, b in zip(got, expected, strict=True):
            assert a.shape == b.shape
            assert (a - b).abs().max() <= 64 * FLOOR[dtype] * b.abs().max()
    assert (by_kernels[0][0] - plain).abs().max() <= 64 * FLOOR[dtype] * plain.abs().max()


def test_few_rows_and_many(monkeypatch) -> None:
    """A product of many rows is a gather and the vendor's product; a noisy one, or one of few rows, is the kernel."""
    called = []
    monkeypatch.setattr(operations, "_takes_triton", lambda args, options: True)
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
    monkeypatch.setattr(operations, "_takes_triton", lambda args, options: True)
    monkeypatch.setattr(operations, "_FEW_ROWS", 1)
    args, options = arguments(name)
    for absent in ("noise", "image", "window", "kv_start", "kv_length"):
        options.pop(absent, None)
    got, expected = (f(*args, **options) for f in (operation(name), getattr(reference, operation(name).__name__)))
    for a, b in zip(tensors(got), tensors(expected), strict=True):
        torch.testing.assert_close(a, b)
