"""Attack by attack: who sees what, what is read of it, and the score."""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from scx.architecture import model_shape
from scx.audit import (
    find_feature_order,
    link_rows,
    nearest_tokens,
    on_grid,
    order_rows,
    read_first_block,
    read_low_bits,
    read_noisy_rows,
    realness,
    undo_feature_order,
)
from scx.audit.continuing import attempts, perplexity, protected
from scx.commands.audit.report import Finding
from scx.commands.audit.subject import KNOWN_TOKENS, TABLE_BLOCKS, Subject, encoded_and_plain, received
from scx.encoding import noise_step

__all__ = ["CASES", "run_cases"]

SCHEMES = {"few": "few crossings", "paper": "the paper's crossings"}
NOISE_SCALES = (5.0, 10.0)
LOW_BITS_ROWS = 4
_FIRST_ROWS = "rows before block 1's feed-forward"

_Result = TypeVar("_Result")


def timed(attack: Callable[..., _Result], *arguments: Any) -> tuple[_Result, float]:
    """What an attack gives, and its seconds."""
    start = time.perf_counter()
    result = attack(*arguments)
    return result, time.perf_counter() - start


def agreeing(found: Tensor, truth: Tensor) -> int:
    return int((found == truth).sum())


def tokens_read(attack: str, placement: str, setting: str, found: Tensor, truth: Tensor, seconds: float) -> Finding:
    return Finding(attack, placement, setting, "tokens", agreeing(found, truth), truth.numel(), seconds)


def places(plain: Tensor, rows: Tensor) -> Tensor:
    """Where each plain row (S, F) lies among encoded ones (T, F) that are not under noise, (S,): for scoring."""
    return torch.cdist(plain.double(), rows.double()).argmin(dim=1)


def first_values(subject: Subject) -> Iterator[Finding]:
    """V of the first block, sorted within heads and looked up."""
    tokens, fused = subject.prompt.shape[1], subject.fused
    seen = [
        ("fused", f"stored cache, {encoding}", run.cache.layers[0].values[:, :, :tokens])
        for encoding, run in fused.items()
    ]
    seen.append(("fused", "sealed; memory while the prompt is read", fused["sealed"].value_in_memory))
    for name, messages in subject.split.items():
        seen.append(("split", f"{SCHEMES[name]}, `value`", received(messages, "prefill", "value")[0]))
    for placement, setting, values in seen:
        found, seconds = timed(read_first_block, subject.model, values)
        yield tokens_read("V of block 1", placement, setting, found, subject.prompt, seconds)


def looked_up(subject: Subject) -> Iterator[Finding]:
    """Token-permuted rows, nearest embedding and nearest one-token row. A row counts if its token is named."""
    entered, prompt = ("feed_forward_input", 0), subject.prompt[0]
    tables = {
        "nearest embedding": subject.model.get_input_embeddings().weight.detach(),
        "one-token rows": subject.tables[entered],
    }
    norm, rows = subject.layers[0].post_attention_layernorm, subject.fused["sealed"].rows
    with torch.no_grad():
        place = places(norm(subject.scored_rows[entered]), rows)
    for attack, table in tables.items():
        found, seconds = timed(nearest_tokens, rows, table, norm)
        yield tokens_read(attack, "fused", f"sealed; memory, {_FIRST_ROWS}", found[place], prompt, seconds)
    for name, heard in subject.heard.items():
        looked = [(attack, _FIRST_ROWS, entered, table) for attack, table in tables.items()]
        for block in range(1, min(TABLE_BLOCKS, len(subject.layers))):
            scored = ("attention_input", block)
            looked.append(
                ("one-token rows", f"rows before block {block + 1}'s attention", scored, subject.tables[scored])
            )
        for attack, setting, (message, block), table in looked:
            rows = getattr(heard, message)[block][0]
            place = places(subject.scored_rows[message, block], rows)
            found, seconds = timed(nearest_tokens, rows, table)
            yield tokens_read(attack, "split", f"{SCHEMES[name]}, {setting}", found[place], prompt, seconds)


def orders(subject: Subject) -> Iterator[Finding]:
    """A block's own product of V against V as it comes for attention. Under noise the first block's is left out."""
    blocks = range(1 if subject.noise else 0, len(subject.layers))
    for name, messages in subject.split.items():
        heard, right, spent = subject.heard[name], 0, 0.0
        for block in blocks:
            (value,) = received(messages, "prefill", "value", block)
            found, seconds = timed(order_rows, heard.value_product[block], value)
            truth = places(subject.scored_rows["attention_input", block], heard.attention_input[block][0])
            right, spent = right + agreeing(found[0], truth), spent + seconds
        setting, count = f"{SCHEMES[name]}, blocks {blocks[0] + 1} to {blocks[-1] + 1}", len(blocks) * len(truth)
        yield Finding("order of rows", "split", setting, "rows", right, count, spent)


def links(subject: Subject) -> Iterator[Finding]:
    """Rows from block to block, which the paper's scheme permutes anew each time; redundant rows link to nothing."""
    heard, right, spent = subject.heard["paper"], 0, 0.0
    blocks = range(len(subject.layers) - 1)
    for block in blocks:
        rows, following = heard.feed_forward_input[block], heard.attention_input[block + 1]
        found, seconds = timed(link_rows, subject.model, block, rows, following)
        truth = torch.full_like(found[0], -1)
        entered = places(subject.scored_rows["attention_input", block + 1], following[0])
        truth[entered] = places(subject.scored_rows["feed_forward_input", block], rows[0])
        right, spent = right + agreeing(found[0], truth), spent + seconds
    count = len(blocks) * len(truth)
    yield Finding("rows linked across blocks", "split", SCHEMES["paper"], "rows", right, count, spent)


def area_under_curve(real: Tensor, redundant: Tensor) -> float:
    """The chance that a real row scores above a redundant one; 0.5 is a guess."""
    return float((real[:, None] > redundant).double().mean() + 0.5 * (real[:, None] == redundant).double().mean())


def decoys(subject: Subject) -> Iterator[Finding]:
    """Redundant rows told from real ones by a Gaussian likelihood, each from itself alone, in every kind of message
    that crosses without noise; of its blocks the first two, the middle and the last."""
    if not subject.redundant:
        return
    crossed = {}
    for name, messages in subject.split.items():
        for message in ("attention_input", "attention_rows", "feed_forward_input"):
            noisy = message == "attention_input" and subject.noise > 0
            blocks = [x.block for x in messages.received("prefill") if x.name == message and (x.block or not noisy)]
            if blocks:
                crossed[name, message] = sorted({*blocks[:2], blocks[len(blocks) // 2], blocks[-1]})
    own = subject.own_rows(sorted({block for blocks in crossed.values() for block in blocks}))
    for (name, message), blocks in crossed.items():
        areas: list[float] = []
        spent = 0.0
        for block in blocks:
            rows = getattr(subject.heard[name], message)[block][0]
            score, seconds = timed(realness, rows, own[message, block])
            real = torch.zeros(len(rows), dtype=torch.bool)
            real[places(subject.scored_rows[message, block], rows)] = True
            areas.append(area_under_curve(score[real], score[~real]))
            spent += seconds
        setting = f"{SCHEMES[name]}, `{message}` of blocks {', '.join(str(block + 1) for block in blocks)}"
        yield Finding("decoys told from real rows", "split", setting, "AUC", min(areas), None, spent, max(areas))


def under_noise(subject: Subject) -> Iterator[Finding]:
    """The first block's noisy input, each row alone. In a later turn, whose rows lie in token order."""
    later = subject.prompt[0, KNOWN_TOKENS:]
    for scale in NOISE_SCALES if subject.noise else ():
        (rows,) = received(subject.later_turn(scale), "generation", "attention_input")
        found, seconds = timed(read_noisy_rows, subject.model, rows)
        setting = f"`attention_input` of block 1, noise {scale:g}"
        yield tokens_read("likelihood under noise", "split", setting, found[0], later, seconds)


def low_bits(subject: Subject) -> Iterator[Finding]:
    """The tokens that the last bits of a row under noise exclude, whatever is likely: of its rows the one with most."""
    if not subject.noise:
        return
    (rows,) = received(subject.later_turn(), "generation", "attention_input")
    scale, vocabulary = subject.noise * model_shape(subject.model).first_norm_rms, subject.vocabulary
    explained = on_grid(scale, noise_step(scale))
    (_, possible), seconds = timed(read_low_bits, subject.model, rows[:, :LOW_BITS_ROWS], explained)
    excluded = vocabulary - int(possible.min())
    setting = f"`attention_input` of block 1, noise {subject.noise:g}, {possible.numel()} rows"
    yield Finding("low bits of noise", "split", setting, "tokens excluded", excluded, vocabulary, seconds)


def generated(subject: Subject) -> Iterator[Finding]:
    """Rows of lone generated tokens behind the first block's attention, which have no others to hide among."""
    attack, table = "lone generated rows", subject.tables["feed_forward_input", 0]
    rows, tokens = subject.generate_fused()
    found, seconds = timed(nearest_tokens, rows, table, subject.layers[0].post_attention_layernorm)
    yield tokens_read(attack, "fused", f"sealed; memory, {_FIRST_ROWS}", found, tokens, seconds)
    for name, message in (("few", "hidden"), ("paper", "feed_forward_input")):
        messages, tokens = subject.generate_split(name)
        rows = torch.cat(received(messages, "generation", message), dim=1)[0]
        found, seconds = timed(nearest_tokens, rows, table)
        yield tokens_read(attack, "split", f"{SCHEMES[name]}, {_FIRST_ROWS}", found, tokens, seconds)


def _opened(plain: Sequence[Tensor], known: Sequence[Tensor], later: Sequence[Tensor]) -> tuple[int, int, float]:
    """Features of later rows that a known beginning opens, features there are, and seconds.

    Args:
        plain: K and V (G, N, d) of all tokens; the first ones are known. known, later: the same under the encoding.
    """
    right = count = 0
    spent = 0.0
    for states, first, rest in zip(plain, known, later, strict=True):
        beginning, truth = states.split((first.shape[1], rest.shape[1]), dim=1)
        order, seconds = timed(find_feature_order, beginning, first)
        opened = undo_feature_order(rest, order)
        right += int(torch.isclose(opened, truth, rtol=1e-3, atol=1e-3).sum())
        count, spent = count + truth.numel(), spent + seconds
    return right, count, spent


def feature_keys(subject: Subject) -> Iterator[Finding]:
    """A known beginning of a conversation, and what of the rest lies under the same feature permutations."""
    attack, measure, tokens = f"first {KNOWN_TOKENS} tokens known", "features", subject.prompt.shape[1]
    plain = [x[0] for layer in subject.scored_cache.layers for x in (layer.keys, layer.values)]
    for encoding, fused in subject.fused.items():
        states = [x for layer in fused.cache.layers for x in (layer.keys, layer.values)]
        stored = [x[0, :, :tokens].nan_to_num(0.0, 0.0, 0.0) for x in states]
        known, later = [x[:, :KNOWN_TOKENS] for x in stored], [x[:, KNOWN_TOKENS:] for x in stored]
        right, count, seconds = _opened(plain, known, later)
        yield Finding(attack, "fused", f"stored cache, {encoding}, all blocks", measure, right, count, seconds)
    for reuse, setting in ((True, "reused feature keys"), (False, "fresh feature keys")):
        messages = subject.later_turn(reuse_feature_keys=reuse)
        known = [received(messages, "prefill", name)[0][0] for name in ("key", "value")]
        later = [received(messages, "generation", name)[0][0] for name in ("key", "value")]
        later = [x[:, KNOWN_TOKENS - tokens :] for x in later]  # fresh keys have the whole cache cross again
        right, count, seconds = _opened(plain[:2], known, later)
        yield Finding(attack, "split", f"{setting}, a later turn's K and V of block 1", measure, right, count, seconds)


def alone(subject: Subject) -> Iterator[Finding]:
    """The untrusted side goes on without the secure one: the next token of a text, with the right ones before it."""
    ids = subject.own_text[:2]
    context, count = ids.shape[1] * 2 // 3, len(subject.layers)
    encoded, plain = encoded_and_plain(subject.model, ids[:, :-1])
    next_token = partial(perplexity, alone=True)
    value, seconds = timed(next_token, subject.model, plain, ids, context)
    yield Finding("going on alone", "split", "the whole cache plain", "perplexity", value, None, seconds)
    for setting, locked in (
        ("first and last block locked", protected(count, 1)),
        ("all blocks locked", set(range(count))),
    ):
        tried = [
            timed(next_token, subject.model, blocks, ids, context) for _, blocks in attempts(encoded, plain, locked)
        ]
        best, spent = min(value for value, _ in tried), sum(seconds for _, seconds in tried)
        yield Finding("going on alone", "split", f"after key sharing, {setting}", "perplexity", best, None, spent)


CASES: dict[str, Callable[[Subject], Iterator[Finding]]] = {
    "values": first_values,
    "rows": looked_up,
    "order": orders,
    "links": links,
    "decoys": decoys,
    "noise": under_noise,
    "low-bits": low_bits,
    "generated": generated,
    "features": feature_keys,
    "alone": alone,
}
"""Attacks by the name that `--only` takes."""


def run_cases(subject: Subject, names: Sequence[str]) -> list[Finding]:
    """What the attacks of these names find. Raises KeyError for one that is not in `CASES`."""
    return [finding for name in names for finding in CASES[name](subject)]
