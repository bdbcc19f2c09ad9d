"""The reference operations say what PROTOCOL names: each against a loop that anybody can check."""

import pytest
import torch
from torch.nn import functional as F

import scx_kernels as ops
from scx_kernels import reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def permutations(*shape: int) -> torch.Tensor:
    return torch.rand(shape).argsort(dim=-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "tokens", "redundant"), [(1, 1, 0), (1, 5, 0), (2, 5, 1), (3, 4, 9)])
def test_inject_permute_places_every_row(batch: int, tokens: int, redundant: int, dtype: torch.dtype) -> None:
    x, extra = torch.randn(batch, tokens, 7, dtype=dtype), torch.randn(batch, redundant, 7, dtype=dtype)
    row_index = permutations(batch, tokens + redundant)
    encoded = ops.inject_permute(x, row_index, extra if redundant else None)
    for b in range(batch):
        for t, source in enumerate(row_index[b].tolist()):
            expected = x[b, source] if source < tokens else extra[b, source - tokens]
            assert torch.equal(encoded[b, t], expected)


def test_strip_restore_undoes_inject_permute() -> None:
    x, extra = torch.randn(2, 6, 5), torch.randn(2, 3, 5)
    row_index = permutations(2, 9)
    position = row_index.argsort(dim=-1)[:, :6]
    encoded = ops.inject_permute(x, row_index, extra)
    assert torch.equal(ops.strip_restore(encoded, position), x)
    assert torch.equal(ops.strip_restore(encoded, position, residual=x), x + x)


def test_composed_index_equals_two_steps() -> None:
    x, first, second = torch.randn(1, 6, 4), permutations(1, 6), permutations(1, 6)
    twice = ops.inject_permute(ops.inject_permute(x, first), second)
    assert torch.equal(ops.inject_permute(x, first.gather(-1, second)), twice)


@pytest.mark.parametrize("dtype", DTYPES)
def test_noise_is_removed_to_the_precision_of_float32(dtype: torch.dtype) -> None:
    """Noise ten times the rows, in any dtype, costs less than rounding the result to that dtype does."""
    x, weight, bias = torch.randn(2, 5, 64, dtype=dtype), torch.randn(48, 64, dtype=dtype), torch.randn(48, dtype=dtype)
    noise = 10 * torch.randn(2, 5, 64, dtype=torch.float32)
    image = ops.noise_image(noise, weight)
    exact = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    noisy = ops.permuted_linear(x, weight, None, None, bias, noise=noise, image=image)
    assert noisy.dtype == dtype
    plain_error = (ops.permuted_linear(x, weight, None, None, bias) - exact).abs().max()
    allowed = 2 * plain_error + (64 * torch.finfo(torch.float32).eps * 10 * weight.double().abs().max())
    assert (noisy - exact).abs().max() <= allowed


def test_permuted_linear_is_gather_then_product() -> None:
    x, weight, extra, bias = torch.randn(2, 4, 6), torch.randn(3, 6), torch.randn(2, 2, 6), torch.randn(3)
    row_index = permutations(2, 6)
    expected = torch.nn.functional.linear(ops.inject_permute(x, row_index, extra), weight, bias)
    assert torch.equal(ops.permuted_linear(x, weight, row_index, extra, bias), expected)


@pytest.mark.parametrize("by_tokens", [False, True])
def test_permute_features_per_head_and_layout(by_tokens: bool) -> None:
    x = torch.randn(2, 5, 3, 8).transpose(1, 2) if by_tokens else torch.randn(2, 3, 5, 8)
    index = permutations(2, 3, 8)
    permuted = ops.permute_features(x, index)
    for b in range(2):
        for h in range(3):
            assert torch.equal(permuted[b, h], x[b, h][:, index[b, h]])
    assert permuted.stride() == x.stride()
    assert torch.equal(ops.permute_features(permuted, index.argsort(dim=-1)), x)


def test_rotary_permute_rotates_pairs_half_a_head_apart() -> None:
    x, angle = torch.randn(1, 2, 3, 8, dtype=torch.float64), torch.rand(1, 3, 4, dtype=torch.float64)
    cos, sin = angle.cos().repeat(1, 1, 2), angle.sin().repeat(1, 1, 2)
    index = permutations(1, 2, 8)
    pairs = torch.complex(x[..., :4], x[..., 4:]) * torch.complex(angle.cos(), angle.sin())[:, None]
    rotated = torch.cat((pairs.real, pairs.imag), dim=-1)
    torch.testing.assert_close(ops.rotary_permute(x, cos, sin, index), ops.permute_features(rotated, index))


def attention_by_hand(q, k, v, scale, mask):
    groups = q.shape[1] // k.shape[1]
    out = torch.empty(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            scores = q[b, h].double() @ k[b, h // groups].double().T * scale
            weights = scores.masked_fill(~mask[b, 0], -torch.inf).softmax(dim=-1)
            out[b, h] = weights @ v[b, h // groups].double()
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (4, 1)])
@pytest.mark.parametrize("kind", ["causal", "padded", "one query"])
def test_attention_on_permuted_features(kind: str, heads: int, kv_heads: int, dtype: torch.dtype) -> None:
    """The plain result comes out of encoded Q, K and V, as exactly as PyTorch's own attention gives it."""
    batch, tokens, size = 2, 7, 16
    queries = 1 if kind == "one query" else tokens
    q = torch.randn(batch, heads, queries, size, dtype=dtype)
    k, v = torch.randn(2, batch, kv_heads, tokens, size, dtype=dtype)
    key, value = permutations(batch, kv_heads, size), permutations(batch, kv_heads, size)
    query, output = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (key, value.argsort(dim=-1)))

    mask = torch.ones(queries, tokens, dtype=torch.bool).tril(tokens - queries).expand(batch, 1, -1, -1)
    if kind == "padded":
        mask = mask & torch.tensor([0, 2])[:, None, None, None].le(torch.arange(tokens)) | torch.eye(tokens).bool()
    out = ops.attention(
        ops.permute_features(q, query),
        ops.permute_features(k, key),
        ops.permute_features(v, value),
        softmax_scale=size**-0.5,
        mask=mask if kind == "padded" else None,
        is_causal=kind == "causal",
        output_index=output,
    )
    exact = attention_by_hand(q, k, v, size**-0.5, mask)
    pytorch = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    floor = torch.finfo(dtype).eps
    assert (out - exact).abs().max() <= 2 * (pytorch - exact).abs().max() + floor


def test_operations_are_differentiable() -> None:
    """Encoded models are called outside `no_grad`, too."""
    x = torch.randn(1, 2, 4, 8, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(1, 4, 8, dtype=torch.float64, requires_grad=True)
    cos, sin = torch.rand(2, 1, 4, 8, dtype=torch.float64)
    index, row_index = permutations(1, 2, 8), permutations(1, 6)
    extra = torch.randn(1, 2, 8, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda t: ops.rotary_permute(t, cos, sin, index), (x,))
    assert torch.autograd.gradcheck(lambda t: ops.inject_permute(t, row_index, extra), (rows,))
    position = permutations(1, 4)[:, :3]
    assert torch.autograd.gradcheck(lambda t: ops.strip_restore(t, position, t[:, 1:]), (rows,))


def seen_by_hand(batch, tokens, keys, first_own, window, start, length):
    """(B, 1, S, N) bool, query by query."""
    seen = torch.zeros(batch, 1, tokens, keys, dtype=torch.bool)
    for b in range(batch):
        for s in range(tokens):
            own = first_own[b] + s
            for n in range(start[b], min(start[b] + length[b], keys)):
                seen[b, 0, s, n] = own - window < n <= own
    return seen


@pytest.mark.parametrize(("tokens", "keys", "window"), [(6, 6, 3), (4, 9, 20), (5, 7, 1)])
def test_attention_limits(tokens: int, keys: int, window: int) -> None:
    """Windows, padding and lengths hide what they say; a query that sees nothing gives zeros."""
    q, k, v = torch.randn(2, 4, tokens, 8), torch.randn(2, 2, keys, 8), torch.randn(2, 2, keys, 8)
    start, length = torch.tensor([0, 3]), torch.tensor([keys, 2])
    limits = {"window": window, "kv_start": start, "kv_length": length}
    out = ops.attention(q, k, v, softmax_scale=0.5, is_causal=True, **limits)
    seen = seen_by_hand(2, tokens, keys, [keys - tokens] * 2, window, start.tolist(), length.tolist())
    torch.testing.assert_close(out.double(), attention_by_hand(q, k, v, 0.5, seen).nan_to_num(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 3])
def test_attention_step_limits(tokens: int) -> None:
    """The queries are the last of each sequence's own keys, wherever those lie in the cache."""
    keys, start, length = 9, [0, 2], [9, 5]
    q, k, v = torch.randn(2, 4, tokens, 8), torch.randn(2, 2, keys, 8), torch.randn(2, 2, keys, 8)
    own = [start[b] + length[b] - tokens for b in range(2)]
    seen = seen_by_hand(2, tokens, keys, own, 4, start, length)
    row_index = permutations(2, keys + 3)
    place = row_index[:, None, :, None].expand(2, 2, keys + 3, 8)
    cache_k, cache_v = (torch.cat((x, torch.full((2, 2, 3, 8), torch.nan)), dim=2).gather(2, place) for x in (k, v))
    limits = {"window": 4, "kv_start": torch.tensor(start), "kv_length": torch.tensor(length)}
    position = row_index.argsort(dim=-1)[:, :keys]
    out = ops.attention_step(q, cache_k, cache_v, softmax_scale=0.5, position=position, **limits)
    torch.testing.assert_close(out.double(), attention_by_hand(q, k, v, 0.5, seen), rtol=1e-4, atol=1e-5)


def test_attention_into_the_next_encoding_is_attention_then_injection() -> None:
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    row_index, redundant, features = permutations(2, 7), torch.randn(2, 2, 32), permutations(2, 4, 8)
    options = {"softmax_scale": 0.5, "is_causal": True, "output_index": features}
    out = ops.attention(q, k, v, **options)
    expected = ops.inject_permute(out.transpose(1, 2).flatten(2), row_index, redundant)
    assert torch.equal(ops.attention(q, k, v, **options, row_index=row_index, redundant=redundant), expected)


class TestBadInput:
    x, index, features = torch.randn(2, 4, 6), permutations(2, 4), permutations(2, 3, 8)

    def test_index_dtype(self) -> None:
        with pytest.raises(TypeError, match="row_index: expected int64"):
            ops.inject_permute(self.x, self.index.int())

    def test_index_batch(self) -> None:
        with pytest.raises(ValueError, match=r"position: expected shape \(2, T\)"):
            ops.strip_restore(self.x, self.index[:1])

    def test_redundant_shape(self) -> None:
        with pytest.raises(ValueError, match=r"redundant: expected shape \(2, R, 6\)"):
            ops.inject_permute(self.x, self.index, torch.randn(2, 1, 5))

    def test_redundant_dtype(self) -> None:
        with pytest.raises(ValueError, match=r"redundant: expected torch.float32"):
            ops.inject_permute(self.x, self.index, torch.randn(2, 1, 6).half())

    def test_row_index_out_of_range(self) -> None:
        with pytest.raises(IndexError):
            ops.inject_permute(self.x, self.index + 4)

    def test_integer_rows(self) -> None:
        with pytest.raises(ValueError, match="x: expected a floating"):
            ops.inject_permute(self.x.int(), self.index)

    def test_feature_index_heads(self) -> None:
        with pytest.raises(ValueError, match=r"feature_index: expected \(2, 4, 8\)"):
            ops.permute_features(torch.randn(2, 4, 5, 8), self.features)

    def test_mismatched_heads(self) -> None:
        q, k = torch.randn(1, 5, 3, 8), torch.randn(1, 2, 3, 8)
        with pytest.raises(ValueError, match="k: its 2 heads do not divide q's 5"):
            ops.attention(q, k, k, softmax_scale=1.0)

    def test_causal_needs_a_key_for_every_query(self) -> None:
        q, k = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 4, 8)
        with pytest.raises(ValueError, match="is_causal"):
            ops.attention(q, k, k, softmax_scale=1.0, is_causal=True)

    def test_image_of_another_shape(self) -> None:
        with pytest.raises(ValueError, match="image: expected shape"):
            ops.permuted_linear(self.x, torch.randn(3, 6), image=torch.randn(2, 4, 6))

    def test_no_permutation(self) -> None:
        with pytest.raises(ValueError, match=r"row_index: a row is not a permutation of 0\.\.3"):
            ops.check_permutation(torch.tensor([[0, 1, 1, 3]]), "row_index")
        ops.check_permutation(self.index)


@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_a_query_that_sees_no_key_gives_zeros(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Whatever PyTorch's attention leaves there, which on a GPU is something else."""
    q, k, v = (torch.randn(2, 4, 3, 8), *(torch.randn(2, 2, 5, 8) for _ in range(2)))
    seen = torch.ones(2, 1, 3, 5, dtype=torch.bool)
    seen[1, :, 2] = False
    mask = seen if kind == "bool" else torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, *others, **options: torch.ones_like(q))
    out = reference.attention(q, k, v, softmax_scale=1.0, mask=mask)
    assert torch.equal(out, seen.any(-1, keepdim=True).float().expand(out.shape))
