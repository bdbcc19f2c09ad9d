"""What is asked of a model: every kind of request, on the encoded model and on the plain one beside it."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scx import load_keys, load_kvcache, save_keys, save_kvcache
from scx.keystream import Secret
from scx.kvcache import decode_kvcache, split_kvcache_dynamic
from scx.vllm.blocks import TRAILER_BYTES, Block, DeviceCipher
from scx.vllm.blocks.transfer import AtOnce

PROMPT = 12  # tokens of most prompts
# Of the largest logit: rounding of two orders of the same sums, some hundred roundings apart in half precision.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1.2e-1}


class WrongValuesError(AssertionError):
    """What the encoded model answers is not what the plain one does."""


class Pair:
    """An encoded model on the stand-in device, and its plain twin on the CPU; none where there are no values.

    Every answer of the one is held against the other's.
    """

    def __init__(self, model: Any, plain: Any | None) -> None:
        self.model = model
        self.plain = plain
        self.dtype = model.dtype
        self.vocabulary = model.config.vocab_size
        self.device = model.model.embed_tokens.weight.device  # of two parties', the secure side's

    def prompt(self, tokens: int, batch: int = 1, seed: int = 0) -> Tensor:
        """Random tokens (B, S) on the CPU, none of them the padding token."""
        generator = torch.Generator().manual_seed(seed + tokens)
        return torch.randint(1, self.vocabulary, (batch, tokens), generator=generator)

    def ask(self, ids: Tensor, caches: Any = (None, None), *, last: bool = False, **options: Any) -> tuple[Any, Any]:
        """Run both models on tokens (B, S), and hold the logits against each other: of the last token alone, if padding
        leaves others without meaning. Returns: both caches."""
        mask = options.pop("attention_mask", None)
        given = {} if mask is None else {"attention_mask": mask.to(self.device)}
        out = self.model(ids.to(self.device), past_key_values=caches[0], **given, **options)
        if self.plain is None:
            return out.past_key_values, None
        own = {} if mask is None else {"attention_mask": mask}
        plain = self.plain(ids, past_key_values=caches[1], **own)
        kept = slice(-1, None) if last else slice(None)
        self.compare(out.logits[:, kept].cpu(), plain.logits[:, kept])
        return out.past_key_values, plain.past_key_values

    def compare(self, logits: Tensor, plain: Tensor) -> None:
        """Raise WrongValuesError where logits differ by more than rounding does."""
        if (logits.shape, logits.dtype) != (plain.shape, plain.dtype):
            raise WrongValuesError(f"logits are {logits.shape} {logits.dtype}, the plain model's {plain.shape}")
        logits, plain = logits.float(), plain.float()
        is_given = logits != float("-inf")  # of a prefill with `prefill_top_k`, the largest alone
        largest = plain.abs().max()
        difference = torch.where(is_given, logits - plain, 0.0).abs().max() / largest
        if not is_given.any() or not difference <= TOLERANCE[self.dtype]:
            raise WrongValuesError(f"logits differ by {difference:.1e} of the largest, {largest:.2f}")

    def generate(self, ids: Tensor, mask: Tensor | None = None, **options: Any) -> None:
        """Generate with both. In half precision two tokens may be as likely as each other, so only float32's are held
        against the plain model's."""
        given = {} if mask is None else {"attention_mask": mask}
        options = {"max_new_tokens": 3, "do_sample": False, **options}
        tokens = self.model.generate(
            ids.to(self.device), **{key: x.to(self.device) for key, x in given.items()}, **options
        ).cpu()
        if self.plain is None:
            return
        plain = self.plain.generate(ids, **given, **options)
        if tokens.shape != plain.shape or (self.dtype == torch.float32 and not torch.equal(tokens, plain)):
            raise WrongValuesError(f"generated {tokens.tolist()}, the plain model {plain.tolist()}")


def prefill(pair: Pair, tokens: int) -> None:
    """A prompt, and two tokens after it."""
    caches = pair.ask(pair.prompt(tokens))
    for seed in (1, 2):
        caches = pair.ask(pair.prompt(1, seed=seed), caches)


def named_stages(pair: Pair) -> None:
    """As in README: the stages named, positions given."""
    caches = pair.ask(pair.prompt(5))
    out = pair.model(pair.prompt(5).to(pair.device), mode="prefill")
    out = pair.model(
        pair.prompt(1).to(pair.device),
        mode="decode",
        cache_position=torch.arange(5, 6),
        past_key_values=out.past_key_values,
    )
    if pair.plain is not None:
        pair.compare(out.logits.cpu(), pair.plain(pair.prompt(1), past_key_values=caches[1]).logits)


def later_turns(pair: Pair) -> None:
    """Several tokens meet earlier ones: a chunk of a prompt, a turn, and a turn after generated tokens."""
    caches = pair.ask(pair.prompt(5))
    for count in (4, 1, 33, 2):
        caches = pair.ask(pair.prompt(count), caches)


def chunked(pair: Pair) -> None:
    """A prompt that `generate` prefills in chunks."""
    pair.generate(pair.prompt(PROMPT), prefill_chunk_size=5)


def padded(pair: Pair) -> None:
    """Two sequences, the first with padding before it; a token after them; a later turn."""
    ids, mask = pair.prompt(PROMPT, 2), torch.ones(2, PROMPT, dtype=torch.int64)
    ids[0, :3], mask[0, :3] = 0, 0
    caches = pair.ask(ids, last=True, attention_mask=mask)
    for count in (1, 4):
        mask = torch.cat((mask, mask.new_ones(2, count)), dim=1)
        caches = pair.ask(pair.prompt(count, 2), caches, attention_mask=mask)
    pair.generate(ids, mask[:, :PROMPT])


def batch(pair: Pair) -> None:
    """Three sequences of one length."""
    caches = pair.ask(pair.prompt(7, 3))
    pair.ask(pair.prompt(1, 3), caches)


def beams(pair: Pair) -> None:
    """Beam search reorders the cache after every token."""
    pair.generate(pair.prompt(PROMPT), num_beams=2)


def greedy(pair: Pair) -> None:
    """`generate` as it is."""
    pair.generate(pair.prompt(PROMPT))


def cropped(pair: Pair) -> None:
    """A cache that loses its last tokens, and goes on: token by token and with a turn."""
    caches = pair.ask(pair.prompt(8))
    for count in (1, 3):
        for cache in caches:
            if cache is not None:
                cache.crop(-2)
        caches = pair.ask(pair.prompt(count), caches)


def split_cache(pair: Pair) -> None:
    """README's example: protected layers' caches go to the CPU, and both parts grow."""
    ids = pair.prompt(10)
    caches = pair.ask(ids)
    layers = range(1, pair.model.config.num_hidden_layers - 1)
    parts = split_kvcache_dynamic(caches[0], gpu_layers=layers)
    for step in range(2):
        token = pair.prompt(1, seed=step)
        out = pair.model(
            token.to(pair.device),
            use_cache=True,
            mode="decode",
            cache_position=torch.arange(10 + step, 11 + step),
            gpu_kvcache=parts[0],
            cpu_kvcache=parts[1],
        )
        if pair.plain is not None:
            plain = pair.plain(token, past_key_values=caches[1])
            pair.compare(out.logits.cpu(), plain.logits)


def taken_over(pair: Pair) -> None:
    """A conversation is put away and taken up by another holder of its keys, who seals its cache anew; and decoded."""
    caches = pair.ask(pair.prompt(6))
    with tempfile.TemporaryDirectory() as folder:
        cache, keys = Path(folder, "cache"), Path(folder, "keys")
        save_kvcache(cache, caches[0], caches[0].session)
        save_keys(keys, caches[0].session, key=bytes(32))
        session = load_keys(keys, key=bytes(32), model=pair.model)
        loaded = load_kvcache(cache, session, device="cuda")
    taken = pair.ask(pair.prompt(1), (loaded, caches[1]))
    plain = decode_kvcache(taken[0], taken[0].session)
    if pair.plain is not None:
        pair.compare(plain.layers[0].keys.cpu(), taken[1].layers[0].keys)


def off_loaded(pair: Pair) -> None:
    """Blocks of a cache's pages are sealed into host memory, and opened into other pages: some in each staging, the
    last rows of some filled in part."""
    key, cipher = Secret(), DeviceCipher(torch.device("cuda"), staging_bytes=10_000, executor=AtOnce())
    drawn = [torch.randint(0, 256, (3, 1000 + 24 * (place % 2)), dtype=torch.uint8) for place in range(7)]

    def block(place: int, pages: Tensor) -> Block:
        return Block(pages.unbind(), *arrays[place], context=f"block {place}".encode(), key=key)

    arrays = [(np.zeros(plain.numel(), np.uint8), np.zeros(TRAILER_BYTES, np.uint8)) for plain in drawn]
    cipher.store([block(place, plain.to("cuda")) for place, plain in enumerate(drawn)]).wait()
    rows = [row.copy() for row, _ in arrays]
    opened = [torch.zeros_like(plain, device="cuda") for plain in drawn]
    arrays[2][0][1234] ^= 1
    loading = cipher.load([block(place, pages) for place, pages in enumerate(opened)])
    loading.wait()
    for place, plain in enumerate(drawn):
        if np.array_equal(rows[place], plain.flatten().numpy()):
            raise WrongValuesError(f"block {place} lies in host memory as it is")
        if not opened[place].cpu().equal(plain if place != 2 else torch.zeros_like(plain)):
            raise WrongValuesError(f"block {place} was not opened to what was sealed, or was and should not have been")
    if loading.refused != [2]:
        raise WrongValuesError(f"refused {loading.refused}, expected the block that was altered, 2")


REQUESTS: dict[str, Callable[[Pair], None]] = {
    "prefill of 1": lambda pair: prefill(pair, 1),
    "prefill of 7": lambda pair: prefill(pair, 7),
    "prefill of 128": lambda pair: prefill(pair, 128),
    "named stages": named_stages,
    "later turns": later_turns,
    "chunked prefill": chunked,
    "padded batch": padded,
    "batch": batch,
    "beams": beams,
    "generate": greedy,
    "cropped cache": cropped,
}
"""Of one device, by name."""

EXTRA_REQUESTS: dict[str, Callable[[Pair], None]] = {
    "split cache": split_cache,
    "taken over": taken_over,
    "off-loaded blocks": off_loaded,
}
"""Whose launches depend on the encoding alone, or on no model."""

SHAPE_REQUESTS: dict[str, Callable[[Pair], None]] = {
    **{f"prefill of {n}": lambda pair, n=n: prefill(pair, n) for n in (1, 2, 5, 16, 17, 33, 65, 100, 150, 257, 512)},
    "later turns": later_turns,
    "batch": batch,
}
"""Of models without values, by name."""

SPLIT_REQUESTS: dict[str, Callable[[Pair], None]] = {
    name: REQUESTS[name] for name in ("prefill of 1", "prefill of 7", "padded batch", "generate", "cropped cache")
}
"""Of two parties, by name."""
