"""Twenty questions of different lengths, for everything that runs the real model."""

from pathlib import Path

import torch
from transformers import AutoTokenizer, BatchEncoding

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


def tokenize(path: Path, prompts: list[str], device: torch.device | str = "cpu") -> BatchEncoding:
    """Chat prompts as a left-padded batch: `input_ids` and `attention_mask`, (len(prompts), longest)."""
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    options = {"add_generation_prompt": True, "padding": True, "return_tensors": "pt", "return_dict": True}
    return tokenizer.apply_chat_template(chats, **options).to(device)
