"""Stage: where the time goes: PyTorch's profiler over one prefill and one token of encoded models, a table each; and
what a step costs the host, beside plain transformers."""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaForCausalLM, PreTrainedModel

from bench.hardware.sizes import device_of, two_blocks
from bench.host import STEPS, measure_steps
from bench.model_cases import KEYS
from bench.work import LeftOut, Work
from scx import SCXKeyGenerator, encode_llama

FILE = "profiles.txt"
ENCODINGS = ("100 redundant rows, noise", "permuted", "sealed")
PROMPT, REHEARSED_PROMPT = 1024, 9
ROWS = 30
WARM = 3


def run(work: Work) -> None:
    torch.manual_seed(0)
    device, shape = device_of(work.rehearsal), two_blocks(work.rehearsal)
    ids = torch.randint(3, shape.vocabulary, (1, REHEARSED_PROMPT if work.rehearsal else PROMPT), device=device)
    for name in ENCODINGS:
        with torch.device(device):
            model = LlamaForCausalLM(shape.config()).eval().to(torch.float32 if work.rehearsal else torch.bfloat16)
        encode_llama(model, SCXKeyGenerator.for_model(model, **KEYS.get(name, {})))
        for kind in ("prefill", "token"):
            work.case(f"{kind}, {name}", partial(profiled, work, kind, name, model, ids), limit=20)
    for step in STEPS:
        work.case(f"host, {step}", partial(host, work.rehearsal, step), limit=20)


def host(rehearsal: bool, step: str) -> dict[str, Any]:
    """The host's time of a step of `bench.host`."""
    if rehearsal:
        raise LeftOut("kernels are interpreted here: the host's time is that of the interpreter")
    entry = {"id": f"host/{step}", **measure_steps(step, device_of(rehearsal))}
    told = [f"{c['name']} {c['ms']['median']:.3g} ms, {c['ratio']['median']:.2f}" for c in entry["contestants"]]
    return {"result": entry, "headlines": [f"host, {step}: {'; '.join(told)}"]}


@torch.no_grad()
def profiled(work: Work, kind: str, name: str, model: PreTrainedModel, ids: Tensor) -> dict[str, Any]:
    """Append the table of a prefill, or of one token after it, once nothing of it happens for the first time."""
    cache: Any = None
    for _ in range(WARM):
        out = model(ids, logits_to_keep=1)
        for _ in range(WARM if kind == "token" else 0):
            out = model(ids[:, :1], past_key_values=out.past_key_values)
        cache = out.past_key_values
    on_cuda = ids.is_cuda
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    if on_cuda:
        torch.cuda.synchronize()
    with profile(activities=activities) as seen:
        if kind == "prefill":
            model(ids, logits_to_keep=1)
        else:
            model(ids[:, :1], past_key_values=cache)
        if on_cuda:
            torch.cuda.synchronize()
    order = "self_device_time_total" if on_cuda else "self_cpu_time_total"
    table = seen.key_averages().table(sort_by=order, row_limit=ROWS, max_name_column_width=60)
    blocks = model.config.num_hidden_layers
    with open(work.folder / FILE, "a") as file:
        file.write(f"{kind}, {ids.shape[1]} tokens, {blocks} blocks, {name}\n{table}\n")
    return {"file": FILE}
