"""A whole model with every operation computed by its kernel."""

import pytest
import torch
from parity import FLOOR, by_dtype
from tiny import tiny_model

import scx_kernels as ops
from scx import SCXKeyGenerator, decode_kvcache, encoded_llama


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@by_dtype
def test_encoded_model_on_the_kernels(prompt, family: str, dtype: torch.dtype) -> None:
    """A whole model gives the reference's logits and caches with every operation computed by its kernel."""
    model = tiny_model(family, dtype=dtype, layers=2, heads=2, kv_heads=1)
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
