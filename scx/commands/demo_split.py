"""One prompt answered by two processes: the secure one here, and a worker with the weights that torchrun starts."""

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from scx.commands.demo import DEFAULT_PROMPT, tokenize
from scx.commands.smollm2 import smollm2_path
from scx.keys import SCXKeyGenerator
from scx.models.llama import encoded_llama, model_shape
from scx.models.split import record_transcript
from scx.party.boundary import STAGES
from scx.party.launch import running_worker
from scx.party.loading import load_secure_model, weight_bytes
from scx.party.process import RemoteParty
from scx.party.secure import split_plan

__all__ = ["run"]


def _generate(model: PreTrainedModel, inputs: dict, tokens: int) -> tuple[list[int], float]:
    begun = time.perf_counter()
    made = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return made[0, inputs["input_ids"].shape[1] :].tolist(), time.perf_counter() - begun


def _plain_answer(path: str, prompt: str, tokens: int) -> tuple[list[int], float]:
    llama = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return _generate(llama, tokenize(AutoTokenizer.from_pretrained(path), prompt), tokens)


def run(*, model: str | None = None, prompt: str = DEFAULT_PROMPT, tokens: int = 32, crossings: str = "few") -> bool:
    """Answer a prompt with the plain model and over two processes, and print what crossed and who holds which weights.

    The plain model lives and ends in a process of its own: the secure one never holds a block.

    Args:
        model: a directory or hub id; SmolLM2-135M-Instruct if None.
        tokens: new tokens at most. crossings: as in `encode_llama`.

    Returns: whether both gave the same tokens.
    """
    path = model or str(smollm2_path())
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as other:
        plain, plain_seconds = other.submit(_plain_answer, path, prompt, tokens).result()
    tokenizer = AutoTokenizer.from_pretrained(path)
    keys = SCXKeyGenerator.for_config(AutoConfig.from_pretrained(path), redundant_num=16, alp=True)
    llama = load_secure_model(path, keys)
    shape = model_shape(llama)
    remote = RemoteParty(split_plan(keys, shape, crossings, False), shape.fingerprint, timeout=120)
    with running_worker(remote, path):
        try:
            remote.connect()
            with (
                encoded_llama(llama, keys, "cpu", crossings=crossings, untrusted=remote),
                record_transcript(llama) as seen,
            ):
                made, seconds = _generate(llama, tokenize(tokenizer, prompt), tokens)
        finally:
            remote.close()
    print(tokenizer.decode(made, skip_special_tokens=True))
    for stage in STAGES:
        print(f"{stage}: {seen.nbytes(stage):,} bytes in {seen.requests[stage]} round trips")
    print(f"the secure process holds {weight_bytes(llama)}")
    equal = plain == made
    print(f"plain {plain_seconds:.1f} s, two processes {seconds:.1f} s; tokens equal: {'yes' if equal else 'NO'}")
    return equal
