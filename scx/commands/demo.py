"""The main job: one prompt answered twice, by the plain model and by the same model under SCX."""

import gc
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache
from transformers.generation.streamers import BaseStreamer

from scx.commands.smollm2 import smollm2_path
from scx.keys import SCXKeyGenerator
from scx.kvcache import EncodedCache, decode_kvcache
from scx.models.llama import encoded_llama

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Answer", "answer", "draw_caches", "run", "tokenize"]

DEFAULT_PROMPT = "Explain in two sentences why a lighthouse flashes instead of shining steadily."


class TimedStreamer(BaseStreamer):
    """Prints text as it comes and notes when each token came."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.times = [time.perf_counter()]
        self._tokens: list[int] = []
        self._printed = 0
        self._saw_prompt = False

    def put(self, value: Tensor) -> None:
        if not self._saw_prompt:
            self._saw_prompt = True
            return
        self.times.append(time.perf_counter())
        self._tokens.extend(value.flatten().tolist())
        text = self.tokenizer.decode(self._tokens, skip_special_tokens=True)
        if not text.endswith("\ufffd"):  # the first bytes of a character whose last ones are still to come
            print(text[self._printed :], end="", flush=True)
            self._printed = len(text)

    def end(self) -> None:
        print("\n")


@dataclass
class Answer:
    """What one generation gave: tokens (N,), logits (N, vocabulary), seconds at which tokens came, and the cache."""

    tokens: Tensor
    logits: Tensor
    times: list[float] = field(repr=False)
    cache: Cache = field(repr=False)

    @property
    def first_token_ms(self) -> float:
        return 1e3 * (self.times[1] - self.times[0])

    @property
    def per_token_ms(self) -> float:
        return 1e3 * (self.times[-1] - self.times[1]) / max(len(self.times) - 2, 1)

    @property
    def cache_bytes(self) -> int:
        stored = (getattr(layer, name, None) for layer in self.cache.layers for name in ("keys", "values", "writes"))
        return sum(x.nbytes for x in stored if x is not None)


def answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, inputs: Any, new_tokens: int) -> Answer:
    """Generate greedily, streaming the text.

    A short generation and a garbage collection before it keep first-call costs and the collector out of the times.
    """
    settings = dict(do_sample=False, return_dict_in_generate=True, pad_token_id=tokenizer.pad_token_id)
    model.generate(**inputs, max_new_tokens=2, **settings)
    gc.collect()
    streamer = TimedStreamer(tokenizer)
    out = model.generate(**inputs, max_new_tokens=new_tokens, output_logits=True, streamer=streamer, **settings)
    tokens = out.sequences[0, inputs["input_ids"].shape[1] :]
    return Answer(tokens, torch.cat(out.logits), streamer.times, out.past_key_values)


def draw_caches(plain: Cache, encoded: EncodedCache, layer: int, path: Path, title: str) -> None:
    """One picture: K and V of a layer as the plain model stores them, as SCX does, and as its session decodes them."""
    import matplotlib  # noqa: PLC0415

    matplotlib.use("Agg")
    from matplotlib import pyplot  # noqa: PLC0415

    decoded = decode_kvcache(encoded, encoded.session)
    columns = (("plain model", plain), ("stored under SCX", encoded), ("decoded with the session's key", decoded))
    figure, axes = pyplot.subplots(2, 3, figsize=(15, 8), layout="constrained", sharex=True, sharey=True)
    for row, name in enumerate(("keys", "values")):
        limit = getattr(plain.layers[layer], name).float().abs().quantile(0.98).item()
        for column, (label, cache) in enumerate(columns):
            image = _draw_states(axes[row][column], getattr(cache.layers[layer], name), limit)
            axes[row][column].set_title(f"{'K' if name == 'keys' else 'V'}, {label}", fontsize=11)
        figure.colorbar(image, ax=axes[row], shrink=0.8, label="value")
    for axis in axes[1]:
        axis.set_xlabel("feature (dashed lines part the heads)")
    for axis in axes[:, 0]:
        axis.set_ylabel("token")
    figure.suptitle(title, fontsize=13)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _draw_states(axis: "Axes", states: Tensor, limit: float) -> Any:
    """(B, G, N, d) states of the first sequence as a picture of tokens by features."""
    heads, size = states.shape[1], states.shape[3]
    flat = states[0].float().nan_to_num(0.0).cpu().transpose(0, 1).flatten(1).numpy()
    image = axis.imshow(flat, aspect="auto", cmap="RdBu", vmin=-limit, vmax=limit, interpolation="nearest")
    for head in range(1, heads):
        axis.axvline(head * size - 0.5, color="black", linewidth=1, linestyle="--")
    return image


def _print_table(plain: Answer, encoded: Answer) -> None:
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    agree = bool(torch.equal(plain.tokens, encoded.tokens))
    common = min(len(plain.logits), len(encoded.logits))
    difference = (plain.logits[:common].float() - encoded.logits[:common].float()).abs().max().item()
    table = Table(title="plain beside SCX")
    table.add_column("")
    for name in ("plain", "SCX", "ratio"):
        table.add_column(name, justify="right")

    def add(name: str, unit: str, a: float, b: float) -> None:
        table.add_row(name, f"{a:,.1f} {unit}", f"{b:,.1f} {unit}", f"{b / a:.2f}")

    add("time to first token", "ms", plain.first_token_ms, encoded.first_token_ms)
    add("time per token after it", "ms", plain.per_token_ms, encoded.per_token_ms)
    add("cache", "KiB", plain.cache_bytes / 1024, encoded.cache_bytes / 1024)
    console = Console()
    console.print(table)
    console.print(f"tokens equal: [bold]{'yes' if agree else 'NO'}[/bold] ({len(plain.tokens)} tokens)")
    console.print(f"largest logit difference: {difference:.1e} (logits up to {plain.logits.abs().max().item():.0f})")


def run(
    *,
    model: str | None = None,
    prompt: str = DEFAULT_PROMPT,
    redundant: int = 16,
    noise: float = 5.0,
    device: str | None = None,
    dtype: str | None = None,
    tokens: int = 64,
    cache: str = "permuted",
    picture: Path = Path("scx-demo.png"),
) -> bool:
    """Run the demo. Returns whether both models gave the same tokens.

    Args:
        model: a directory or hub id; SmolLM2-135M-Instruct if None.
        redundant: redundant rows R.
        noise: scale of the removable noise in units of the rows' root mean square; 0 for none.
        device: where the model runs; CUDA if there is one.
        dtype: "float32", "float16" or "bfloat16"; float32 on the CPU, bfloat16 elsewhere.
        tokens: new tokens at most.
        cache: how K and V are stored: "permuted" or "sealed".
        picture: where the picture of the caches is written.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or ("float32" if device == "cpu" else "bfloat16")
    path = model or str(smollm2_path())
    tokenizer = AutoTokenizer.from_pretrained(path)
    llama = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval().to(device)
    inputs = tokenize(tokenizer, prompt).to(device)
    options: dict[str, Any] = {"noise_scale": noise} if noise else {}
    keys = SCXKeyGenerator.for_model(llama, redundant_num=redundant, alp=noise > 0, cache_encoding=cache, **options)

    print(f"\nPrompt: {prompt}\n\nPlain model on {device}, {dtype}:\n")
    plain = answer(llama, tokenizer, inputs, tokens)
    print(f"The same model under SCX, {redundant} redundant rows, noise scale {noise:g}, cache {cache}:\n")
    with encoded_llama(llama, keys):
        encoded = answer(llama, tokenizer, inputs, tokens)

    _print_table(plain, encoded)
    layer = len(plain.cache.layers) // 2
    draw_caches(plain.cache, encoded.cache, layer, picture, f"Key-value cache of block {layer + 1}")
    print(f"picture: {picture}")
    return bool(torch.equal(plain.tokens, encoded.tokens))


def tokenize(tokenizer: PreTrainedTokenizerBase, prompt: str) -> Any:
    """A prompt as the model's chat template wants it: `input_ids` and `attention_mask`, (1, tokens)."""
    if tokenizer.chat_template is None:
        return tokenizer(prompt, return_tensors="pt")
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
