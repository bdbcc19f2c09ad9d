"""The public operations: who computes them, and how they compose with the rest of PyTorch."""

import pytest
import torch
from parity import FLOOR, permutations, randn
from tiny import tiny_model
from torch._subclasses.fake_tensor import FakeTensorMode

import scx_kernels as ops
from scx import SCXKeyGenerator, decode_kvcache, encoded_llama
from scx_kernels import operations, reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def arguments(name: str, dtype: torch.dtype = torch.float32) -> tuple[tuple, dict]:
    """Arguments of an operation, with everything optional given."""
    x, redundant = randn(2, 5, 24, dtype=dtype), randn(2, 3, 24, dtype=dtype)
    row_index = permutations(2, 8)
    if name == "inject_permute":
        return (x, row_index, redundant), {"norm_weight": randn(24, dtype=dtype), "eps": 1e-5, "noise": randn(2, 8, 24)}
    if name == "strip_restore":
        z, position = randn(2, 8, 24, dtype=dtype), row_index[:, :5].contiguous()
        return (z, position, x), {"image": randn(2, 8, 24)}
    if name == "permuted_linear":
        weight, noise = randn(16, 24, dtype=dtype), randn(2, 8, 24)
        image = ops.noise_image(noise, weight)
        return (x, weight, row_index, redundant, randn(16, dtype=dtype)), {"noise": noise, "image": image}
    if name == "qkv_decode_encode":
        rows = [randn(2, 8, n * 16, dtype=dtype) for n in (4, 2, 2)]
        angle = randn(1, 5, 8).repeat(1, 1, 2)
        tables = (row_index[:, :5].contiguous(), angle.cos().to(dtype), angle.sin().to(dtype))
        norms = {"q_norm": randn(16, dtype=dtype), "k_norm": randn(16, dtype=dtype), "eps": 1e-5}
        return (*rows, *tables, *(permutations(2, n, 16) for n in (4, 2, 2))), norms
    q, k, v = (randn(2, n, 5, 16, dtype=dtype) for n in (4, 2, 2))
    return (q, k, v), {"softmax_scale": 0.25, "is_causal": True, "output_index": permutations(2, 4, 16)}


NAMES = ["inject_permute", "strip_restore", "permuted_linear", "qkv_decode_encode", "attention"]
by_name = pytest.mark.parametrize("name", NAMES)


def tensors(result) -> tuple[torch.Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


@by_name
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backends_agree(name: str, dtype: torch.dtype) -> None:
    args, options = arguments(name, dtype)
    with ops.backend("reference"):
        expected = getattr(ops, name)(*args, **options)
    with ops.backend("triton"):
        got = getattr(ops, name)(*args, **options)
    for a, b in zip(tensors(got), tensors(expected), strict=True):
        assert a.dtype == b.dtype
        assert (a - b).abs().max() <= 16 * FLOOR[dtype] * b.abs().max()


@by_name
def test_signature_and_documentation_are_the_references(name: str) -> None:
    import inspect

    assert inspect.signature(getattr(ops, name)) == inspect.signature(getattr(reference, name))
    assert getattr(ops, name).__doc__ == getattr(reference, name).__doc__


def registered(name: str, args: tuple, options: dict) -> tuple:
    """Positional arguments of the registered operator."""
    if name == "attention":
        return (*args, options["softmax_scale"], None, options["is_causal"], options["output_index"])
    return (*args, *options.values())


@by_name
def test_opcheck(name: str) -> None:
    """Schema, shape rule and tracing of the registered operators, the kernels inside."""
    args, options = arguments(name)
    operator = getattr(torch.ops.scx_kernels, name).default
    torch.library.opcheck(operator, registered(name, args, options))


@by_name
def test_fake_tensors_take_the_shape_rule(name: str) -> None:
    args, options = arguments(name)
    expected = tensors(getattr(ops, name)(*args, **options))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, ops.backend("triton"):
        fake = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in args]
        given = {key: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for key, x in options.items()}
        got = tensors(getattr(ops, name)(*fake, **given))
    assert [(x.shape, x.dtype) for x in got] == [(x.shape, x.dtype) for x in expected]


@by_name
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_compiles_without_graph_breaks(name: str, backend: str) -> None:
    args, options = arguments(name)
    if name == "inject_permute" and backend == "reference":
        args = args[:2]  # how many rows are redundant is known to data alone, in plain PyTorch
        args = (args[0], args[1] % 5)
    with ops.backend(backend):
        expected = getattr(ops, name)(*args, **options)
        torch._dynamo.reset()  # the limit on recompilations counts the other cases of this test
        compiled = torch.compile(lambda *a, **k: getattr(ops, name)(*a, **k), fullgraph=True, backend="aot_eager")
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
    monkeypatch.setattr(operations, "_takes_triton", lambda *tensors: True)
    monkeypatch.setattr(operations, "_permuted_linear", lambda *args: called.append("kernel"))
    monkeypatch.setattr(operations, "_inject_permute", lambda x, *args: called.append("gather") or x)
    weight = randn(4, 8)
    for rows in (64, 65):
        ops.permuted_linear(randn(1, rows, 8), weight, permutations(1, rows))
    assert called == ["kernel", "gather"]
