"""What shows only on a GPU: captured graphs, streams, waits for the host, tensors beyond 2^31 elements. Parity on
hardware is every other kernel test, which takes the GPU where there is one.

Each of these tests also runs without a GPU, as "rehearsed": on the CPU, in Triton's interpreter, small, with a stand-in
for graphs. That shows that the test is ready, and nothing about a GPU.
"""

import gc
from collections.abc import Callable, Iterator

import parity
import pytest
import torch
from every_operation import NAMES, SEALED_NAMES, arguments, operation
from parity import DEVICE, assert_same_bits, integers, inverse, nobody_waits, permutations, randn, tensors
from torch.utils._pytree import tree_leaves

import scx_kernels as ops
from scx_kernels import reference
from scx_kernels.kernels.unlock import unlock

ON_GPU = DEVICE.type == "cuda"
ELEMENTS = 2**31 + 2**20 if ON_GPU else 2**15
waits_for_a_gpu = pytest.mark.skipif(not ON_GPU, reason="waits for a GPU")
PLACES = ["gpu"] if ON_GPU else ["rehearsed", pytest.param("gpu", marks=waits_for_a_gpu)]
in_place = pytest.mark.parametrize("place", PLACES)
by_name = pytest.mark.parametrize("name", [*NAMES, *SEALED_NAMES])


@pytest.fixture(autouse=True)
def _by_the_kernels() -> Iterator[None]:
    """On a GPU everything is as users have it."""
    with ops.backend("auto" if ON_GPU else "triton"):
        yield


@pytest.mark.slow
@in_place
@by_name
def test_captured_in_a_graph(place: str, name: str) -> None:
    """An operation records into a CUDA graph, and a replay computes it again from what its inputs then hold."""
    args, options = arguments(name, torch.bfloat16)

    def call():
        return operation(name)(*args, **options)

    captured = parity.Replay(call, (args, options))
    changing = [x for x in tree_leaves((args, options)) if isinstance(x, torch.Tensor) and x.is_floating_point()]
    before = [randn(*x.shape, dtype=x.dtype) for x in changing]
    by_graph, at_once = [], []
    for results, again in ((by_graph, captured.replay), (at_once, call)):
        for x, content in zip(changing, before, strict=True):
            x.copy_(content)
        given = again()
        results += [x.clone() for x in (captured.results if given is None else tensors(given))]
    for a, b in zip(by_graph, at_once, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)  # random bits, unsealed, are NaN now and then


@in_place
@pytest.mark.parametrize("encoding", ["permuted", "sealed"])
def test_a_step_of_a_block_moves_on_in_a_graph(place: str, encoding: str) -> None:
    """Attention of a decoded token, from norm to output projection, captured once: where the token goes and how long
    the cache is are read on the device. Every replay gives what plain PyTorch gives for that step."""
    batch, heads, groups, size, capacity = 2, 2, 1, 64, 12
    hidden, widths = heads * size, [n * size for n in (heads, groups, groups)]
    x, norm = randn(batch, 1, hidden), randn(hidden)
    weights, output = [randn(width, hidden) / hidden**0.5 for width in widths], randn(hidden, hidden) / hidden**0.5
    angle = randn(capacity, size // 2).repeat(1, 2)
    query, key, value = (permutations(batch, n, size) for n in (heads, groups, groups))
    query = key.repeat_interleave(heads // groups, 1)
    back = inverse(value).repeat_interleave(heads // groups, 1)
    caches, own = {name: randn(batch, groups, capacity, size) for name in ("keys", "values")}, None
    if encoding == "sealed":
        writes = ops.WriteCounter().take(batch, capacity, DEVICE)
        own = ops.Sealing(ops.key_words(bytes(range(32)), DEVICE), writes, 3, 8)
        caches = {name: ops.seal(x, own, is_value=name == "values") for name, x in caches.items()}
    place_of_token, length = integers(0, 3), integers(1, 4)

    def step() -> torch.Tensor:
        rows = ops.inject_permute(x, None, norm_weight=norm)
        cos, sin = (table.index_select(0, place_of_token)[:, None] for table in (angle.cos(), angle.sin()))
        z = ops.permuted_linears(rows, weights)
        q, *stored = ops.qkv_decode_encode(
            *z, None, cos, sin, query, key, value, **caches, offsets=place_of_token, sealing=own
        )
        options = {"softmax_scale": size**-0.5, "kv_length": length, "output_index": back, "sealing": own}
        attended = ops.attention_step(q, *stored, **options)
        return ops.permuted_linear(attended.transpose(1, 2).flatten(2), output)

    captured = parity.Replay(step)
    for _ in range(3 if ON_GPU else 2):
        x.copy_(randn(*x.shape))
        captured.replay()
        with ops.backend("reference"):
            torch.testing.assert_close(captured.results[0], step())
        place_of_token += 1
        length += 1


@in_place
@by_name
def test_nobody_waits_for_the_host(place: str, name: str) -> None:
    """An operation is queued and left: it reads no value on the host and copies nothing from its memory."""
    args, options = arguments(name, torch.bfloat16)
    if ON_GPU:
        operation(name)(*args, **options)  # compiles, and starts the libraries it uses
    with nobody_waits():
        operation(name)(*args, **options)


@in_place
def test_a_kernel_waits_for_the_one_ahead(place: str) -> None:
    """Kernels begin before the one ahead of them has ended: a long chain of them, and of PyTorch's, in memory that is
    used again and again, gives the same bits as when the device is waited for after each."""
    heads, size, rows, times = (32, 128, 64, 20) if ON_GPU else (2, 16, 8, 2)
    hidden = heads * size
    start, norm, weight = randn(1, rows, hidden), randn(hidden), randn(hidden, hidden) / hidden**0.5
    index = permutations(1, rows)
    feature, back = permutations(1, heads, size), inverse(index)

    def chain(wait: Callable[[], None]) -> torch.Tensor:
        x = start
        for _ in range(times):
            encoded = ops.inject_permute(x, index, norm_weight=norm)
            wait()
            product = ops.permuted_linear(encoded, weight)
            wait()
            x = ops.strip_restore(product, back, residual=x)
            wait()
            keys = product.view(1, rows, heads, size).transpose(1, 2)
            query = x[:, -1:].view(1, 1, heads, size).transpose(1, 2)
            attended = ops.attention_step(query, keys, keys, softmax_scale=size**-0.5, output_index=feature)
            wait()
            x = x + attended.transpose(1, 2).reshape(1, 1, hidden)
            wait()
        return x

    alone = chain(torch.cuda.synchronize if ON_GPU else lambda: None)
    assert bool(alone.isfinite().all())
    for _ in range(3):
        assert_same_bits(chain(lambda: None), alone)


@waits_for_a_gpu
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
    if not ON_GPU:
        return
    gc.collect()
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    # Offsets beyond 32 bits need tensors of that size; a smaller GPU, or one that others use, has no room for them.
    if free < 24 * 2**30:
        pytest.skip(f"waits for a GPU with 24 GiB free, this one has {free / 2**30:.0f}")


@in_place
@pytest.mark.usefixtures("roomy")
def test_rows_beyond_two_to_the_31(place: str) -> None:
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


@in_place
@pytest.mark.usefixtures("roomy")
def test_cache_beyond_two_to_the_31(place: str) -> None:
    """A step of attention on, the unlocking of, and the sealing of a cache that 32-bit offsets do not reach the end
    of."""
    (batch, groups), size = (2, 8) if ON_GPU else (2, 1), 128
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
    del unlocked
    own = ops.Sealing(ops.key_words(bytes(range(32)), DEVICE), ops.WriteCounter().take(batch, keys, DEVICE), 1, 8)
    sealed = ops.seal(k, own, is_value=False)
    ends = own.replace(writes=own.writes[:, -5:])
    with ops.backend("reference"):
        assert_same_bits(sealed[:, :, -5:], ops.seal(k[:, :, -5:].contiguous(), ends, is_value=False))
