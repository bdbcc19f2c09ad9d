"""One prompt answered by two processes: the secure one here, and a worker with the weights that torchrun starts."""

import subprocess
import sys
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from scx.demo import DEFAULT_PROMPT, tokenize
from scx.keys import SCXKeyGenerator
from scx.models.llama import encoded_llama, model_shape
from scx.models.split import record_transcript, split_plan
from scx.party.boundary import STAGES
from scx.party.process import RemoteParty
from scx.smollm2 import smollm2_path

__all__ = ["run"]


def _start_worker(address: str, model: str) -> subprocess.Popen:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1"]
    return subprocess.Popen([*torchrun, "-m", "scx.party.worker", "--connect", address, "--model", model])  # noqa: S603


def _end(worker: subprocess.Popen) -> None:
    """A worker ends when its connection does; one that never had any is ended."""
    try:
        worker.wait(timeout=20)
    except subprocess.TimeoutExpired:
        worker.kill()
        worker.wait()


def _generate(model: PreTrainedModel, inputs: dict, tokens: int) -> tuple[torch.Tensor, float]:
    begun = time.perf_counter()
    made = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return made[0, inputs["input_ids"].shape[1] :], time.perf_counter() - begun


def run(*, model: str | None = None, prompt: str = DEFAULT_PROMPT, tokens: int = 32, crossings: str = "few") -> bool:
    """Answer a prompt with the plain model and over two processes, and print what crossed.

    Args:
        model: a directory or hub id; SmolLM2-135M-Instruct if None.
        tokens: new tokens at most. crossings: as in `encode_llama`.

    Returns: whether both gave the same tokens.
    """
    path = model or str(smollm2_path())
    tokenizer = AutoTokenizer.from_pretrained(path)
    llama = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    inputs = tokenize(tokenizer, prompt)
    keys, shape = SCXKeyGenerator.for_model(llama, redundant_num=16, alp=True), model_shape(llama)
    remote = RemoteParty(split_plan(keys, shape, crossings, False), shape.fingerprint, timeout=120)
    worker = _start_worker(remote.address, path)
    try:
        plain, plain_seconds = _generate(llama, inputs, tokens)
        remote.connect()
        with encoded_llama(llama, keys, "cpu", crossings=crossings, untrusted=remote), record_transcript(llama) as seen:
            made, seconds = _generate(llama, inputs, tokens)
    finally:
        remote.close()
        _end(worker)
    print(tokenizer.decode(made, skip_special_tokens=True))
    for stage in STAGES:
        print(f"{stage}: {seen.nbytes(stage):,} bytes in {seen.requests[stage]} round trips")
    equal = bool(torch.equal(plain, made))
    print(f"plain {plain_seconds:.1f} s, two processes {seconds:.1f} s; tokens equal: {'yes' if equal else 'NO'}")
    return equal
