"""What shows only on a GPU: captured graphs, streams, tensors beyond 2^31 elements. Parity on hardware is every other
kernel test, which takes the GPU where there is one."""

import gc

import pytest
import torch
from parity import inverse
from test_operations import NAMES, arguments, operation, tensors

import scx_kernels as ops
from scx_kernels import reference
from scx_kernels.kernels.unlock import unlock

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="waits for a GPU")
DEVICE = torch.device("cuda")
ELEMENTS = 2**31 + 2**20


@pytest.mark.parametrize("name", [name for name in NAMES if "in place" not in name])
def test_captured_in_a_graph(name: str) -> None:
    """An operation records into a CUDA graph, and a replay computes it again from what its inputs then hold."""
    args, options = arguments(name, torch.bfloat16)
    for _ in range(2):
        operation(name)(*args, **options)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = tensors(operation(name)(*args, **options))
    first = args[0]
    first.copy_(torch.randn_like(first))
    graph.replay()
    for a, b in zip(captured, tensors(operation(name)(*args, **options)), strict=True):
        torch.testing.assert_close(a, b)


def test_current_stream_is_used() -> None:
    """Work queued behind a slow kernel on a side stream sees that kernel's result."""
    stream = torch.cuda.Stream()
    x, index = torch.zeros(1, 64, 256, device=DEVICE), torch.arange(64, device=DEVICE)[None]
    ops.inject_permute(x, index)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        x.fill_(3.0)
        out = ops.inject_permute(x, index)
    stream.synchronize()
    assert bool((out == 3.0).all())


@pytest.fixture
def roomy() -> None:
    gc.collect()
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < 24 * 2**30:
        pytest.skip(f"waits for a GPU with 24 GiB free, this one has {free / 2**30:.0f}")


@pytest.mark.usefixtures("roomy")
def test_rows_beyond_two_to_the_31() -> None:
    """Rows of a tensor whose last elements lie beyond 32-bit offsets come out where they belong."""
    features = 4096
    count = ELEMENTS // features
    x = torch.empty(1, count, features, dtype=torch.bfloat16, device=DEVICE)
    x[0] = torch.arange(count, device=DEVICE)[:, None] % 251
    row_index = torch.randperm(count, device=DEVICE)[None]
    out = ops.inject_permute(x, row_index)
    assert torch.equal(out[0, :, 0].long(), row_index[0] % 251)
    assert torch.equal(out[0, :, -1].long(), row_index[0] % 251)
    del x
    restored = ops.strip_restore(out, inverse(row_index))
    assert torch.equal(restored[0, :, -1].long(), torch.arange(count, device=DEVICE) % 251)


@pytest.mark.usefixtures("roomy")
def test_cache_beyond_two_to_the_31() -> None:
    """A step of attention on, and the unlocking of, a cache that 32-bit offsets do not reach the end of."""
    batch, groups, size = 2, 8, 128
    keys = ELEMENTS // (batch * groups * size)
    k = torch.randn(batch, groups, keys, size, device=DEVICE, dtype=torch.bfloat16)
    q = torch.randn(batch, 4 * groups, 1, size, device=DEVICE, dtype=torch.bfloat16)
    got = ops.attention_step(q, k, k, softmax_scale=0.1)
    for b, group in ((0, 0), (batch - 1, groups - 1)):
        heads = slice(4 * group, 4 * group + 4)
        part = k[b : b + 1, group : group + 1]
        expected = reference.attention_step(q[b : b + 1, heads], part, part, softmax_scale=0.1)
        torch.testing.assert_close(got[b : b + 1, heads], expected, rtol=2e-2, atol=2e-2)
    position = torch.randperm(keys, device=DEVICE)[None].expand(batch, keys).contiguous()
    unlocked = unlock(k, position)
    assert torch.equal(unlocked[-1, -1, -5:], k[-1, -1, position[-1, -5:]])
