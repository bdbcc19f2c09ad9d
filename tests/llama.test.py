"""The documented comprehensive test: prefill and decode phases, cache management, encoded beside plain.

Runs under pytest and as a script (`python tests/llama.test.py`), on the CPU and on CUDA.
"""

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from scx.keys import SCXKeyGenerator
from scx.kvcache import decode_kvcache, merge_kvcache_dynamic, split_kvcache_dynamic
from scx.models.llama import decode_llama, encode_llama

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROMPT, STEPS = 10, 5


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return documented_model()


def documented_model() -> LlamaForCausalLM:
    """The model of the quick start: 615 million parameters, 1.2 GB in float16."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=1000, num_hidden_layers=3, hidden_size=4096)
    return LlamaForCausalLM(config).eval().half().to(DEVICE)


def documented_generator(**options) -> SCXKeyGenerator:
    return SCXKeyGenerator(
        seq_len=10,
        hidden_dim=4096,
        qk_hidden_dim=128,
        **{"redundant_num": 0, "alp": False, **options},
        batch_size=1,
        decode_start_layers=[0],
        decode_end_layers=[2],
    )


@torch.no_grad()
def plain_run(model: LlamaForCausalLM, input_ids: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Logits and tokens of the plain model: the prompt's, then those of each step."""
    out = model(input_ids)
    logits, tokens = [out.logits], []
    for _ in range(STEPS):
        tokens.append(logits[-1][:, -1:].argmax(dim=-1))
        out = model(tokens[-1], past_key_values=out.past_key_values)
        logits.append(out.logits)
    return logits, tokens


@torch.no_grad()
def encoded_run(model: LlamaForCausalLM, input_ids: Tensor, key_generator: SCXKeyGenerator) -> tuple:
    """The same through the three documented calls."""
    encode_llama(model, key_generator)
    try:
        output = model(input_ids, mode="prefill")
        logits, tokens, kvcache = [output.logits], [], output.past_key_values
        gpu_kvcache, cpu_kvcache = split_kvcache_dynamic(kvcache, gpu_layers=[1])
        for step in range(STEPS):
            next_token_id = torch.argmax(logits[-1][:, -1, :], dim=-1, keepdim=True)
            tokens.append(next_token_id)
            past_seen_tokens = PROMPT + step
            cache_position = torch.arange(past_seen_tokens, past_seen_tokens + 1, device=DEVICE)
            output = model(
                input_ids=next_token_id,
                use_cache=True,
                mode="decode",
                cache_position=cache_position,
                gpu_kvcache=gpu_kvcache,
                cpu_kvcache=cpu_kvcache,
            )
            logits.append(output.logits)
    finally:
        decode_llama(model)
    return logits, tokens, kvcache, gpu_kvcache, cpu_kvcache


def largest_difference(a: list[Tensor], b: list[Tensor]) -> float:
    return max((x.float() - y.float()).abs().max().item() for x, y in zip(a, b, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"redundant_num": 12, "alp": True}], ids=["documented", "all encodings"])
def test_documented_calls(model: LlamaForCausalLM, options: dict) -> None:
    """Prefill, split and decode give the plain model's logits and tokens; the caches are those promised."""
    input_ids = torch.randint(0, 1000, (1, PROMPT), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    plain_logits, plain_tokens = plain_run(model, input_ids)
    logits, tokens, kvcache, gpu_kvcache, cpu_kvcache = encoded_run(model, input_ids, documented_generator(**options))

    # Random float16 logits of up to about 5 have a step of 0.004; the paper's figure for float16 is 0.0051.
    assert largest_difference(logits, plain_logits) < 2e-2
    assert all(torch.equal(a, b) for a, b in zip(tokens, plain_tokens, strict=True))

    assert kvcache.get_seq_length() == PROMPT
    assert gpu_kvcache.layer_indices == (1,)
    assert cpu_kvcache.layer_indices == (0, 2)
    assert gpu_kvcache.layers[1].keys.device.type == DEVICE
    assert all(cpu_kvcache.layers[layer].keys.device.type == "cpu" for layer in (0, 2))
    assert gpu_kvcache.get_seq_length() == cpu_kvcache.get_seq_length() == PROMPT + STEPS

    with torch.no_grad():
        whole = torch.cat((input_ids, *tokens), dim=1)
        expected = model(whole).past_key_values
    decoded = decode_kvcache(merge_kvcache_dynamic(gpu_kvcache, cpu_kvcache, device=DEVICE), kvcache.session)
    for ours, theirs in zip(decoded.layers, expected.layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys, rtol=0, atol=2e-2)
        torch.testing.assert_close(ours.values, theirs.values, rtol=0, atol=2e-2)


def main() -> None:
    model = documented_model()
    input_ids = torch.randint(0, 1000, (1, PROMPT)).to(DEVICE)
    plain_logits, plain_tokens = plain_run(model, input_ids)
    for options in ({}, {"redundant_num": 12, "alp": True}):
        logits, tokens, *_ = encoded_run(model, input_ids, documented_generator(**options))
        agreement = sum(torch.equal(a, b) for a, b in zip(tokens, plain_tokens, strict=True))
        print(f"{options or 'no redundant rows, no noise'}: {agreement} of {STEPS} tokens equal", end=", ")
        print(f"maximum difference {largest_difference(logits, plain_logits):.1e}")


if __name__ == "__main__":
    main()
