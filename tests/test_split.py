"""The split placement: two parties compute what the plain model computes, and only what is documented crosses."""

import copy
import gc
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any

import pytest
import torch
from test_requests import GENERATIONS
from tiny import FAMILIES, VOCABULARY, tiny_model
from torch import Tensor
from transformers import DynamicCache, set_seed

from scx import (
    FileRefusedError,
    SCXKeyGenerator,
    Session,
    decode_llama,
    encode_llama,
    encoded_llama,
    load_shared_keys,
    record_transcript,
    save_shared_keys,
    split_kvcache_dynamic,
)
from scx.audit import order_rows
from scx.encoding import FeatureKey, LayerKeys, Noise, RowKey, TokenKeys
from scx.keys import ModelShape, PassKeys
from scx.keystream import KeyStream, Secret
from scx.models.llama import model_shape
from scx.models.step import Step
from scx.party import MESSAGES, PartyLostError, Plan, SecureParty, SplitCache, UntrustedParty
from scx.party.boundary import Request, Rule
from scx.party.prefill import Prefill
from scx.party.replies import ReplyRule
from scx.party.secure import split_plan
from scx.party.transcript import expected_bytes, format_table

KEYS = (
    Session, SCXKeyGenerator, Secret, KeyStream, Step, PassKeys, TokenKeys, LayerKeys, RowKey, FeatureKey, Noise,
    SecureParty, SplitCache,
)  # fmt: skip
ALL = {"redundant_num": 5, "alp": True}
by_crossings = pytest.mark.parametrize("crossings", ["few", "paper"])


def keys_for(model, **options) -> SCXKeyGenerator:
    return SCXKeyGenerator.for_model(model, **{**ALL, **options})


def untrusted_party(model) -> UntrustedParty:
    return model.model._scx.party.boundary._receiver


def padded(prompt, batch: int, length: int) -> dict[str, Tensor]:
    ids = prompt(length, batch)
    mask = torch.ones_like(ids)
    for row in range(batch):
        mask[row, : 2 * row] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


# Equality with the plain model


@pytest.mark.parametrize(
    ("kind", "crossings"), [(kind, "few") for kind in GENERATIONS] + [("greedy", "paper"), ("beams", "paper")]
)
def test_generate_gives_the_plain_models_tokens(prompt, kind: str, crossings: str) -> None:
    """Every way of generating, left-padded batches included; beam search selects rows on both sides, prompt lookup
    crops, a chunked prompt goes on as a conversation does."""
    model = tiny_model(layers=4)
    inputs = padded(prompt, 1 if kind == "prompt lookup" else 3, 10)

    def generate() -> Tensor:
        set_seed(1)
        return model.generate(**inputs, max_new_tokens=12, **GENERATIONS[kind])

    plain = generate()
    with encoded_llama(model, keys_for(model), "cpu", crossings=crossings):
        assert torch.equal(generate(), plain)


@by_crossings
@pytest.mark.parametrize("family", FAMILIES)
def test_families(prompt, family: str, crossings: str) -> None:
    """Biases, norms per head and sliding windows hold on both sides of the boundary, in every stage."""
    options: dict[str, Any] = {} if family == "llama" else {"sliding_window": 5}
    if family.startswith("qwen"):
        options |= {"use_sliding_window": True, "max_window_layers": 2}
    model = tiny_model(family, layers=5, **options)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 1.0 if parameter.mean() > 0.5 else 0.0, 0.2)
    check_logits(model, padded(prompt, 2, 12), crossings, 2e-4, protected_layers=2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@by_crossings
def test_half_precision(prompt, crossings: str, dtype: torch.dtype) -> None:
    """Rows under noise cross in float32, so that it leaves no trace in half precision: logits differ from the plain
    model's by a few of the dtype's roundings, as in the fused placement."""
    model = tiny_model(dtype=dtype, layers=4)
    largest = model(prompt(9, 2)).logits.abs().max().item()
    check_logits(model, {"input_ids": prompt(9, 2)}, crossings, 24 * torch.finfo(dtype).eps * largest)


@pytest.mark.slow
@torch.no_grad()
@by_crossings
@pytest.mark.parametrize("family", FAMILIES)
def test_head_on_the_untrusted_side(prompt, family: str, crossings: str) -> None:
    """With `prefill_top_k` the k largest logits of every token are the plain model's, all others are -inf, hidden
    states do not come back from a prefill, and generation goes on as ever."""
    model, inputs = tiny_model(family, layers=4), padded(prompt, 2, 9)
    plain = model(**inputs).logits
    values, tokens = plain.topk(6)
    ways: list[dict] = [
        {"do_sample": False},
        {"do_sample": True, "top_k": 6},
        {"do_sample": False, "prefill_chunk_size": 4},
    ]

    def generate(way: dict) -> Tensor:
        set_seed(3)
        return model.generate(**inputs, max_new_tokens=6, **way)

    made = [generate(way) for way in ways]
    generator = keys_for(model)
    with encoded_llama(model, generator, "cpu", crossings=crossings, prefill_top_k=6):
        with record_transcript(model) as seen:
            out = model(**inputs)
        own = inputs["attention_mask"].bool()
        torch.testing.assert_close(out.logits.gather(2, tokens)[own], values[own], rtol=1e-4, atol=1e-4)
        assert (out.logits.isneginf().sum(dim=2) == VOCABULARY - 6).all()
        assert torch.equal(model(**inputs, logits_to_keep=1).logits.argmax(-1), plain[:, -1:].argmax(-1))
        assert model(**inputs, return_dict=False)[0].shape == plain.shape
        assert all(torch.equal(generate(way), once) for way, once in zip(ways, made, strict=True))
        with pytest.raises(ValueError, match="labels: a loss needs all logits"):
            model(**inputs, labels=inputs["input_ids"])
    returned = seen.select(direction="to secure")
    (top,) = [x for x in returned if x.name == "top_logits"]
    assert top.shape == (2, 9 + generator.redundant_num, 6), "those of every encoded row"
    assert "hidden" not in {x.name for x in returned}
    assert torch.equal(model(**inputs).logits, plain), "decode_llama gives the model its own head back"


PROTECTED: list[dict] = [
    {"protected_layers": 0, "alp": False},
    {"protected_layers": 2},
    {"decode_end_layers": []},
    {"decode_start_layers": [0, 1, 2], "decode_end_layers": [3]},
]


@pytest.mark.parametrize("protected", PROTECTED)
@pytest.mark.parametrize("reuse", [False, True], ids=["fresh", "reused"])
@by_crossings
def test_protected_layers(prompt, crossings: str, reuse: bool, protected: dict) -> None:
    """Whichever blocks are start, middle and end blocks, or none, the logits are the plain model's."""
    check_logits(tiny_model(layers=4), padded(prompt, 2, 7), crossings, 2e-4, reuse_feature_keys=reuse, **protected)


@torch.no_grad()
def check_logits(
    model, inputs: dict, crossings: str, allowed: float, reuse_feature_keys: bool = False, **options
) -> None:
    """A prefill and three steps of one, two and one tokens, against one plain pass over all of them."""
    ids = inputs["input_ids"]
    later = torch.randint(1, VOCABULARY, (len(ids), 4))
    mask = inputs.get("attention_mask", torch.ones_like(ids))
    mask = torch.nn.functional.pad(mask, (0, 4), value=1)
    positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)
    plain = model(torch.cat((ids, later), dim=1), attention_mask=mask, position_ids=positions).logits
    generator = keys_for(model, **options)
    with encoded_llama(model, generator, "cpu", crossings=crossings, reuse_feature_keys=reuse_feature_keys):
        cache, logits, start = None, [], 0
        for stop in (ids.shape[1], *(ids.shape[1] + n for n in (1, 3, 4))):
            out = model(
                torch.cat((ids, later), dim=1)[:, start:stop],
                attention_mask=mask[:, :stop],
                position_ids=positions[:, start:stop],
                past_key_values=cache,
            )
            cache, start = out.past_key_values, stop
            logits.append(out.logits)
    assert cache.get_seq_length() == start
    difference = (torch.cat(logits, dim=1) - plain)[mask.bool()].abs().max().item()
    assert difference <= allowed


@torch.no_grad()
def test_documented_calls(llama, prompt) -> None:
    """`mode`, `split_kvcache_dynamic` and both parts in a decode call; the parts are the parties' own division."""
    ids = prompt(10)
    plain = llama.generate(ids, max_new_tokens=5, do_sample=False)[:, 10:]
    encode_llama(llama, keys_for(llama, decode_start_layers=[0], decode_end_layers=[2]), "cpu")
    output = llama(ids, mode="prefill")
    with pytest.raises(ValueError, match=r"gpu_layers: in the split placement .* holds the layers \[1\]"):
        split_kvcache_dynamic(output.past_key_values, gpu_layers=[0, 1])
    gpu_kvcache, cpu_kvcache = split_kvcache_dynamic(output.past_key_values, gpu_layers=[1])
    assert (gpu_kvcache.layer_indices, cpu_kvcache.layer_indices) == ((1,), (0, 2))
    for step in range(5):
        token = output.logits[:, -1:].argmax(dim=-1)
        assert token.item() == plain[0, step]
        output = llama(
            token, use_cache=True, mode="decode", cache_position=torch.arange(10 + step, 11 + step),
            gpu_kvcache=gpu_kvcache, cpu_kvcache=cpu_kvcache,
        )  # fmt: skip
    assert gpu_kvcache.get_seq_length() == cpu_kvcache.get_seq_length() == 15
    decode_llama(llama)
    assert type(llama(ids).past_key_values) is DynamicCache


@torch.no_grad()
def test_environment_chooses_the_placement(llama, prompt, monkeypatch) -> None:
    monkeypatch.setenv("SCX_SECURE_DEVICE", "cpu")
    with encoded_llama(llama, keys_for(llama)):
        assert type(llama(prompt(4)).past_key_values) is SplitCache
    monkeypatch.setenv("SCX_SECURE_DEVICE", "enclave")
    with pytest.raises(ValueError, match="secure_device: expected a device such as 'cpu' or 'cuda:1', got 'enclave'"):
        encode_llama(llama, keys_for(llama))
    monkeypatch.delenv("SCX_SECURE_DEVICE")
    with encoded_llama(llama, keys_for(llama)), pytest.raises(ValueError, match="not in the split placement"):
        record_transcript(llama).__enter__()


# What the untrusted party can reach


def reachable(start: object) -> list[object]:
    """Every object that can be reached from another through attributes, containers, closures and bound methods, not
    through its class or a module."""
    seen: dict[int, object] = {}
    pending = [start]
    while pending:
        x = pending.pop()
        if id(x) in seen or isinstance(x, type) or type(x).__name__ == "module":
            continue
        seen[id(x)] = x
        if isinstance(x, FunctionType):
            pending += [cell.cell_contents for cell in x.__closure__ or ()] + list(x.__defaults__ or ())
        elif isinstance(x, MethodType):
            pending += [x.__self__, x.__func__]
        else:
            pending += gc.get_referents(x)
    return list(seen.values())


@torch.no_grad()
@pytest.mark.parametrize("reuse", [False, True])
@by_crossings
def test_untrusted_party_reaches_no_key(llama, prompt, crossings: str, reuse: bool) -> None:
    """From its object, in the middle of a conversation, no key, session or secure party is found, and no tensor that
    shares memory with the secure side's own."""
    encode_llama(llama, keys_for(llama), "cpu", crossings=crossings, reuse_feature_keys=reuse)
    cache = llama(prompt(9)).past_key_values
    llama(prompt(1), past_key_values=cache)
    party = untrusted_party(llama)
    assert party.conversations == (cache.session_id,)
    found = reachable(party)
    assert len(found) > 200
    assert any(x is llama.model.layers[0].mlp.up_proj.weight for x in found)
    assert not [x for x in found if isinstance(x, KEYS)]

    held = {x.untyped_storage().data_ptr() for x in found if isinstance(x, Tensor)}
    secret = [cache.layers[0].keys, cache.layers[0].values, *cache.values.values(), *cache.columns.values()]
    feature_key = cache.session.feature_key(1, torch.device("cpu"))
    secret += [getattr(feature_key, name) for name in FeatureKey.__slots__]
    assert not held & {x.untyped_storage().data_ptr() for x in secret}

    from_secure = reachable(cache)
    assert {type(x) for x in from_secure} >= {Session, Secret, KeyStream, SecureParty}, "the search finds keys"


@torch.no_grad()
def test_conversations_end_with_their_caches(llama, prompt) -> None:
    """The untrusted side forgets a conversation with the first request after its cache has gone."""
    encode_llama(llama, keys_for(llama), "cpu")
    first, second = llama(prompt(5)).past_key_values, llama(prompt(6)).past_key_values
    assert set(untrusted_party(llama).conversations) == {first.session_id, second.session_id}
    del first
    gc.collect()
    llama(prompt(1), past_key_values=second)
    assert untrusted_party(llama).conversations == (second.session_id,)
    llama(prompt(3), use_cache=False)
    llama(prompt(1), past_key_values=second)
    assert untrusted_party(llama).conversations == (second.session_id,)


@torch.no_grad()
def test_the_handle_is_not_copied(llama, prompt) -> None:
    encode_llama(llama, keys_for(llama), "cpu")
    cache = llama(prompt(5)).past_key_values
    for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="neither pickled nor copied"):
            attempt(cache)
    with pytest.raises(TypeError, match="one of two parties"):
        copy.deepcopy(llama)


@torch.no_grad()
def test_failed_step_leaves_the_conversation(llama, prompt, monkeypatch) -> None:
    """A step that fails behind the middle blocks is taken again, and gives the plain model's logits."""
    ids = prompt(8)
    plain = llama(ids).logits[:, -1:]
    encode_llama(llama, keys_for(llama), "cpu")
    cache = llama(ids[:, :7]).past_key_values
    failing = llama.model.layers[2].self_attn.o_proj.register_forward_hook(lambda *_: {}["nothing"])
    with pytest.raises(KeyError):
        llama(ids[:, 7:], past_key_values=cache)
    assert cache.get_seq_length() == 7
    failing.remove()
    torch.testing.assert_close(llama(ids[:, 7:], past_key_values=cache).logits, plain, rtol=1e-4, atol=1e-4)


# The transcript


def plain_states(model, ids: Tensor) -> dict[int, Tensor]:
    """The plain model's rows and heads, which must not be seen in token and feature order: by features, (P, S, F)."""
    rows: list[Tensor] = [model.get_input_embeddings()(ids)[0]]
    heads: list[Tensor] = []

    def of_input(module, args, kwargs) -> None:
        rows.append((args[0] if args else kwargs["hidden_states"])[0].clone())

    def of_output(module, args, out) -> None:
        rows.append(out[0].clone())
        if isinstance(module, torch.nn.Linear):
            heads.extend(out[0].unflatten(-1, (-1, 16)).transpose(0, 1))

    handles = []
    for layer in model.model.layers:
        attention = layer.self_attn
        for module in (layer.input_layernorm, layer.post_attention_layernorm, attention.o_proj, layer):
            handles.append(module.register_forward_pre_hook(of_input, with_kwargs=True))
        for module in (layer.input_layernorm, layer.post_attention_layernorm, layer.mlp, attention.q_proj,
                       attention.k_proj, attention.v_proj, attention.o_proj):  # fmt: skip
            handles.append(module.register_forward_hook(of_output))
    cache = model(ids).past_key_values
    for handle in handles:
        handle.remove()
    heads += [head for layer in cache.layers for x in (layer.values, layer.keys) for head in x[0]]
    return {size: torch.stack([x for x in (*rows, *heads) if x.shape[1] == size]) for size in (16, 32, 96)}


def near(seen: Tensor, known: Tensor) -> Tensor:
    """(P, S, T) bool: which rows of P plain tensors (P, S, F) equal which rows of `seen` (T, F)."""
    exact = "donot_use_mm_for_euclid_dist"
    distance = torch.cdist(known.flatten(0, 1), seen, compute_mode=exact).view(*known.shape[:2], -1)
    return distance <= 1e-3 * known.norm(dim=-1, keepdim=True)


def same_place(seen: Tensor, known: Tensor) -> float:
    """The largest share of rows of any plain tensor (P, S, F) or (S, F) that lie in `seen` (T, F) one after another."""
    found = near(seen, known.reshape(-1, *known.shape[-2:])).float()
    offsets = range(max(found.shape[2] - found.shape[1] + 1, 1))
    return max(found.diagonal(offset, 1, 2).sum(dim=-1).max().item() for offset in offsets) / found.shape[1]


def in_any_place(seen: Tensor, known: Tensor) -> float:
    """The largest share of rows of any plain tensor that lie anywhere in `seen`."""
    return near(seen, known.reshape(-1, *known.shape[-2:])).any(dim=2).float().mean(dim=1).max().item()


@pytest.fixture(params=["few", "paper"])
def conversation(request, prompt) -> Iterator[tuple]:
    """A model of four blocks, a prompt of 24 tokens, three more, and the transcript of it all."""
    with torch.no_grad():
        model = tiny_model(layers=4)
        ids = prompt(27)
        plain = plain_states(model, ids[:, :24])
        encode_llama(model, keys_for(model), "cpu", crossings=request.param)
        with record_transcript(model) as transcript:
            out = model(ids[:, :24])
            for step in range(24, 27):
                out = model(ids[:, step : step + 1], past_key_values=out.past_key_values)
        yield model, ids, plain, transcript, out.past_key_values


def test_prefill_shows_nothing_in_token_and_feature_order(conversation) -> None:
    """Embeddings, hidden states, products, Q, K and V of the plain run: no tensor that the untrusted side receives
    before keys are shared has more than a few of their rows in their places."""
    _, _, plain, transcript, _ = conversation
    received = [x for x in transcript.received("prefill") if x.tensor.is_floating_point()]
    assert len(received) > 15
    for known in plain.values():
        assert all(same_place(x, known) == 1.0 for x in known), "the search finds what is there"
    for crossing in received:
        seen = crossing.tensor[0]
        for rows in seen if seen.dim() == 3 else [seen]:
            assert same_place(rows, plain[rows.shape[-1]]) < 0.4, (crossing, "is plain")


def test_prefill_rows_are_permuted_among_redundant_ones(conversation) -> None:
    """What hides rows is their order and their company: the plain rows are there, out of order, except under noise."""
    _, _, plain, transcript, _ = conversation
    rows = transcript.select(stage="prefill", direction="to untrusted", name="attention_rows")
    inputs = transcript.select(stage="prefill", direction="to untrusted", name="attention_input")
    for crossing in rows:
        assert crossing.shape[1] == 24 + ALL["redundant_num"]
        assert in_any_place(crossing.tensor[0], plain[96]) == 1.0
    first, *others = inputs
    assert in_any_place(first.tensor[0], plain[96]) == 0.0, "noise covers the first block's input"
    assert all(in_any_place(x.tensor[0], plain[96]) == 1.0 for x in others)


def test_no_token_key_or_logit_crosses(conversation) -> None:
    """Integers that cross are lengths and shared positions; feature permutations, protected positions and anything as
    wide as the vocabulary do not."""
    model, ids, _, transcript, cache = conversation
    integers = [x for x in transcript.received() if not x.tensor.is_floating_point()]
    assert {x.name for x in integers} == {"token_position", "positions"}
    protected = [columns[0, :24] for columns in cache.columns.values()]
    for crossing in integers:
        for row in crossing.tensor.flatten(0, -2):
            assert not torch.equal(row, ids[0, : len(row)])
            assert not any(torch.equal(row, columns) for columns in protected)
            assert row.shape[-1] != model.config.head_dim
    assert all(VOCABULARY not in x.shape for x in transcript.crossings)
    assert {x.name for x in transcript.crossings} <= {
        name for pair in MESSAGES.values() for name in (*pair[0], *pair[1])
    }


def test_generation_hides_start_blocks(conversation) -> None:
    """A new token enters its first block under noise of its own, and every step moves K and V of that block under
    features in a new order; the secure side's V of the last block never moves."""
    model, ids, _, transcript, cache = conversation
    embedded = model.get_input_embeddings()(ids[0])
    normalised = model.model.layers[0].input_layernorm(embedded)
    inputs = transcript.select(stage="generation", direction="to untrusted", name="attention_input")
    assert len(inputs) == 3
    noises = [x.tensor[0, 0] - normalised[24 + i] for i, x in enumerate(inputs)]
    assert all(noise.norm() > 3 * normalised[24 + i].norm() for i, noise in enumerate(noises))
    assert torch.corrcoef(torch.stack(noises)).fill_diagonal_(0).abs().max() < 0.5

    keys = [x.tensor[0] for x in transcript.select(stage="generation", direction="to untrusted", name="key")]
    for step, seen in enumerate(keys):
        own = cache.layers[0].keys[0, :, : 25 + step]
        torch.testing.assert_close(seen.sort(dim=-1).values, own.sort(dim=-1).values)
        assert all(same_place(a, b) < 0.2 for a, b in zip(seen, own, strict=True))
    assert all(same_place(keys[1][head], keys[2][head][:26]) < 0.2 for head in range(2))
    values = [x for x in transcript.received("generation") if x.name == "value"]
    assert {x.block for x in values} == {0}


def test_scores_lie_in_the_order_of_encoded_keys(conversation) -> None:
    """The last block's encoded keys hold the plain keys out of order, with redundant rows among them."""
    _, _, plain, transcript, _ = conversation
    (sent,) = transcript.select(stage="key sharing", name="encoded_keys")
    last_keys = plain[16][-2:]
    assert sent.block == 3
    assert sent.shape[2] == 24 + ALL["redundant_num"]
    for seen, own in zip(sent.tensor[0], last_keys, strict=True):
        assert in_any_place(seen, own) == 1.0
        assert same_place(seen, own) < 0.4
    scores = transcript.select(stage="generation", direction="to secure", name="scores")
    assert [x.shape[-1] for x in scores] == [sent.shape[2] + n for n in (1, 2, 3)]


@torch.no_grad()
def test_redundant_keys_say_nothing_of_their_places(prompt) -> None:
    """The positions to which redundant keys are rotated are drawn apart from where they lie among the others: over many
    prefills they agree with their rows' numbers as often as chance has it."""
    model, tokens, count = tiny_model(layers=2), 8, 8
    encode_llama(model, keys_for(model, redundant_num=count, alp=False), "cpu")
    rotated: list[Tensor] = []
    original = Prefill._rotated_decoys

    def spy(self, block, products, decoys, at, groups, size):
        rotated.append(at[0])
        return original(self, block, products, decoys, at, groups, size)

    agreeing = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Prefill, "_rotated_decoys", spy)
        for seed in range(40):
            cache = model(prompt(tokens, seed=seed)).past_key_values
            taken = set(cache.columns[1][0].tolist())
            places = torch.tensor([row for row in range(tokens + count) if row not in taken])
            agreeing += int((places.remainder(tokens)[None] == rotated[-1][:, None]).any(dim=1).sum())
            assert rotated[-1].max() < tokens
    # 40 x 8 redundant keys; each hits one of the places' remainders by chance about 3 times in 4.
    assert agreeing < 0.9 * 40 * count


@torch.no_grad()
@by_crossings
def test_each_block_gives_its_row_order_away(prompt, crossings: str) -> None:
    """Why rows may stay on the untrusted side: in either scheme it finds every block's token permutation, and so its
    redundant rows, in that block's own messages."""
    model, tokens = tiny_model(layers=4), 20
    ids = prompt(tokens)
    encode_llama(model, keys_for(model, alp=False), "cpu", crossings=crossings)
    products: list[Tensor] = []
    project = UntrustedParty._project
    with pytest.MonkeyPatch.context() as patch, record_transcript(model) as transcript:

        def spy(party, held, block, rows):
            reply = project(party, held, block, rows)
            products.append(reply["value_product"])
            return reply

        patch.setattr(UntrustedParty, "_project", spy)
        cache = model(ids).past_key_values
    values = transcript.select(stage="prefill", direction="to untrusted", name="value")
    found = [order_rows(product, x.tensor) for product, x in zip(products, values, strict=True)]
    shared = cache.session.share_keys()
    for block, position in zip(shared.blocks, shared.token_position, strict=True):
        assert torch.equal(found[block], position)
    assert shared.blocks == (1, 2)
    first, *others = (len(set(order[0].tolist())) for order in found)
    assert first == len(set(ids[0].tolist())), "in the first block, a token that comes twice has one V"
    assert others == [tokens] * 3


@torch.no_grad()
def test_rows_of_neighbouring_blocks_are_linked_in_the_papers_scheme(prompt) -> None:
    """What comes out of one feed-forward is what enters the next attention, to the untrusted side's own arithmetic: it
    links every token's rows across blocks, and the rows that link to nothing are the redundant ones."""
    model, tokens, count = tiny_model(layers=4), 20, 6
    encode_llama(model, keys_for(model, redundant_num=count), "cpu", crossings="paper")
    with record_transcript(model) as transcript:
        model(prompt(tokens))
    inputs = {name: transcript.select(stage="prefill", direction="to untrusted", name=name)
              for name in ("feed_forward_input", "attention_input")}  # fmt: skip
    for block in range(3):
        layer, following = model.model.layers[block : block + 2]
        rows = inputs["feed_forward_input"][block].tensor
        rows = following.input_layernorm(rows + layer.mlp(layer.post_attention_layernorm(rows)))
        linked = near(inputs["attention_input"][block + 1].tensor[0], rows).sum(dim=2)[0]
        assert linked.tolist().count(1) == tokens
        assert linked.tolist().count(0) == count


# Bytes


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("options", [ALL, {"alp": False, "protected_layers": 0}, {**ALL, "protected_layers": 2}])
@pytest.mark.parametrize("top_k", [None, 3])
@by_crossings
def test_bytes_follow_the_formula(
    prompt, crossings: str, top_k: int | None, options: dict, reuse: bool, dtype: torch.dtype
) -> None:
    model = tiny_model(layers=5, dtype=dtype)
    inputs = padded(prompt, 2, 11)
    generator = SCXKeyGenerator.for_model(model, **{"redundant_num": 3, **options})
    choices: dict = {"crossings": crossings, "reuse_feature_keys": reuse, "prefill_top_k": top_k}
    plan, shape = split_plan(generator, model_shape(model), **choices), model_shape(model)
    known = {"batch": 2, "redundant": generator.redundant_num, "itemsize": dtype.itemsize}
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 3), value=1)
    with encoded_llama(model, generator, "cpu", **choices):
        with record_transcript(model) as first:
            out = model(**inputs)
            model(prompt(1, 2), attention_mask=mask[:, :12], past_key_values=out.past_key_values)
        with record_transcript(model) as second:
            model(prompt(2, 2), attention_mask=mask, past_key_values=out.past_key_values)
    for transcript, stage, sizes in (
        (first, "prefill", {"tokens": 11, "padded": True}),
        (first, "key sharing", {"tokens": 11}),
        (first, "generation", {"tokens": 1, "past": 11}),
        (second, "generation", {"tokens": 2, "past": 12}),
    ):
        expected = expected_bytes(plan, shape, stage, **known, **sizes)
        assert transcript.nbytes(stage, "to untrusted") == expected.to_untrusted
        assert transcript.nbytes(stage, "to secure") == expected.to_secure


def test_few_crossings_move_less() -> None:
    """For grouped-query models a prefill moves at most 0.6 of the paper's bytes, with few protected layers."""
    for layers, hidden, heads, groups, size in ((30, 576, 9, 3, 64), (32, 4096, 32, 8, 128), (80, 8192, 64, 8, 128)):
        shape = ModelShape(layers, hidden, heads, groups, size, 1000, 1.0, "")
        for tokens, redundant in ((64, 0), (1024, 64)):
            few, paper = (
                expected_bytes(Plan(layers, 1, 1, crossings), shape, "prefill", batch=1, tokens=tokens,
                               redundant=redundant).total
                for crossings in ("few", "paper")
            )  # fmt: skip
            assert few <= 0.6 * paper


def test_documented_messages_are_those_that_may_cross() -> None:
    """The table of messages in docs/split.md is `MESSAGES`."""
    text = (Path(__file__).parents[1] / "docs" / "split.md").read_text()
    documented = {}
    for operation, sent, returned in re.findall(r"^\| `(\w+)` \|[^|]*\|([^|]*)\|([^|]*)\|$", text, re.MULTILINE):
        documented[operation] = tuple(tuple(re.findall(r"`(\w+)`", cell)) for cell in (sent, returned))
    assert documented == MESSAGES


@torch.no_grad()
def test_boundary_refuses_what_is_not_a_message(llama, prompt) -> None:
    encode_llama(llama, keys_for(llama), "cpu")
    boundary = llama.model._scx.party.boundary
    with pytest.raises(ValueError, match=r"attend: tensors \['hidden'\] do not cross"):
        boundary.ask("attend", conversation="", stage="prefill", tensors={"hidden": torch.zeros(1)})


@torch.no_grad()
def test_the_secure_side_works_while_the_other_does(prompt, monkeypatch) -> None:
    """In a prefill, what a block's cache needs and the keys of its later rows are made between handing its attention
    over and waiting for it."""
    # Behind a boundary of one process on the CPU: a GPU's replies are queued at once.
    model, events = tiny_model(layers=4).cpu(), []
    encode_llama(model, keys_for(model), "cpu")

    def noted(kind: type, name: str) -> None:
        original = getattr(kind, name)

        def method(self, *args, **kwargs):
            events.append((name, args[1] if name == "renew" else args[0]))
            return original(self, *args, **kwargs)

        monkeypatch.setattr(kind, name, method)

    class Slow:
        """An untrusted party whose replies are waited for."""

        def __init__(self, party: UntrustedParty) -> None:
            self.party = party

        def begin(self, request: Request, rule: Rule):
            events.append((f"begin {request.operation}", request.block))

            def wait():
                events.append((f"wait {request.operation}", request.block))
                return self.party.receive(request)

            return wait

    for kind, name in ((Prefill, "_keep"), (PassKeys, "draw"), (PassKeys, "renew")):
        noted(kind, name)
    monkeypatch.setattr(model.model._scx.party.boundary, "_receiver", Slow(untrusted_party(model)))
    model(prompt(9).cpu())
    for block, later in enumerate((["draw", "draw"], ["renew"], ["draw", "renew"], ["renew"])):
        at = events.index(("begin attend", block))
        assert [name for name, _ in events[at + 1 : events.index(("wait attend", block))]] == ["_keep", *later]


@pytest.mark.parametrize("tokens", [torch.tensor([[[0, 211]]]), torch.tensor([[[-1, 0]]]), torch.zeros(1, 1, 2)])
def test_tokens_from_the_untrusted_side_are_checked(llama, tokens: Tensor) -> None:
    """A token outside the vocabulary, or one that is no number of a token, is refused before it is used."""
    plan = Plan(3, 1, 1, prefill_top_k=2)
    rule, request = ReplyRule(plan, model_shape(llama)), Request("head", "", "prefill", 2, 0, 0, 0, {
        "head_input": torch.zeros(1, 1, 96)})  # fmt: skip
    reply = {"top_logits": torch.zeros(1, 1, 2), "top_tokens": torch.tensor([[[0, 210]]])}

    def check() -> None:
        rule.check(request, reply)
        rule.check_values(request, reply)

    check()
    reply["top_tokens"] = tokens
    with pytest.raises(PartyLostError, match=r"head, block 2: expected (tokens 0\.\.210|int64 top_tokens)"):
        check()


def test_table(conversation) -> None:
    """One line for each tensor of each kind of block, with its bytes."""
    table = format_table(conversation[3].crossings)
    assert re.search(r"prefill +0(-3)? +project_qkv +to untrusted +attention_input +1 x 29 x 96 +float32 ", table)
    assert "key sharing" in table
    assert re.search(r"generation +3 .* hidden", table)


# Key sharing


@torch.no_grad()
@by_crossings
def test_shared_keys_unlock_middle_blocks_and_no_other(prompt, crossings: str) -> None:
    """With them the untrusted side's own products become the plain model's K and V in the middle blocks; those of the
    first and last block stay out of order, whichever of the shared permutations is tried."""
    model, ids = tiny_model(layers=5), prompt(14)
    plain = model(ids).past_key_values
    encode_llama(model, keys_for(model, alp=False), "cpu", crossings=crossings)
    products: dict[int, Tensor] = {}
    project = UntrustedParty._project

    def spy(party, held, block, rows):
        reply = project(party, held, block, rows)
        products[block] = reply["value_product"]
        return reply

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(UntrustedParty, "_project", spy)
        cache = model(ids).past_key_values
    shared = cache.session.share_keys()
    assert shared.blocks == (1, 2, 3)
    assert shared.token_position.shape == (3, 1, 14)
    cache.unlock(shared)
    held = untrusted_party(model)._held[cache.session_id]
    for block in shared.blocks:
        torch.testing.assert_close(held.unlocked[block].keys, plain.layers[block].keys, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(held.unlocked[block].values, plain.layers[block].values, rtol=1e-4, atol=1e-4)
    assert not held.products
    for block in (0, 4):
        own = plain.layers[block].values[0].transpose(0, 1).flatten(1)
        for position in shared.token_position:
            assert same_place(products[block][0, position[0]], own) < 0.5
    with pytest.raises(RuntimeError, match="has these keys already"):
        cache.unlock(shared)


@torch.no_grad()
def test_shared_keys_as_a_file(prompt, llama, tmp_path) -> None:
    """Written and read, they unlock; altered, foreign or wrongly keyed, nothing is loaded."""
    ids, path, key = prompt(9), tmp_path / "shared.keys", bytes(range(32))
    plain = llama(prompt(10)).logits
    encode_llama(llama, keys_for(llama), "cpu")
    cache, other = llama(prompt(10)[:, :9]).past_key_values, llama(ids).past_key_values
    save_shared_keys(path, cache.session.share_keys(), key=key)
    read = load_shared_keys(path, key=key, session_id=cache.session_id)
    assert torch.equal(read.token_position, cache.session.share_keys().token_position)
    for reason, arguments in (("session", {"key": key, "session_id": other.session_id}), ("key", {"key": bytes(32)})):
        with pytest.raises(FileRefusedError) as refused:
            load_shared_keys(path, **arguments)
        assert refused.value.reason == reason
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    with pytest.raises(FileRefusedError) as refused:
        load_shared_keys(path, key=key)
    assert refused.value.reason == "key"
    with pytest.raises(ValueError, match="belongs to session"):
        other.unlock(read)
    cache.unlock(read)
    logits = llama(prompt(10)[:, 9:], past_key_values=cache).logits
    torch.testing.assert_close(logits, plain[:, -1:], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_fused_sessions_have_nothing_to_share(llama, prompt) -> None:
    with encoded_llama(llama, keys_for(llama)):
        session = llama(prompt(4)).past_key_values.session
    with pytest.raises(RuntimeError, match="no prefill in the split placement"):
        session.share_keys()


# Refusals


@torch.no_grad()
def test_refusals(llama, prompt) -> None:
    """What the split placement cannot do is refused by name, and nothing is changed."""
    plain = llama(prompt(4)).past_key_values
    for message, options in (
        ("crossings: expected one of", {"crossings": "none"}),
        ("prefill_top_k: expected a number of logits from 1, or None, got 0", {"prefill_top_k": 0}),
        ("prefill_top_k: expected a number of logits from 1, or None, got True", {"prefill_top_k": True}),
        ("prefill_top_k: expected at most 211, the vocabulary, got 212", {"prefill_top_k": 212}),
    ):
        with pytest.raises(ValueError, match=message):
            encode_llama(llama, keys_for(llama), "cpu", **options)
    with pytest.raises(
        ValueError, match="prefill_top_k: expected a model with a language-modelling head, got LlamaMod"
    ):
        encode_llama(llama.model, keys_for(llama), "cpu", prefill_top_k=3)
    with pytest.raises(ValueError, match="head: the plan has a prefill's logits come from here"):
        UntrustedParty(llama.model.layers, llama.model.rotary_emb, Plan(3, 1, 1, prefill_top_k=1))
    with pytest.raises(ValueError, match="alp=True needs the first layer"):
        encode_llama(llama, keys_for(llama, protected_layers=0), "cpu")
    with pytest.raises(ValueError, match="cache_encoding: 'sealed' belongs to the fused placement"):
        encode_llama(llama, keys_for(llama, cache_encoding="sealed"), "cpu")
    assert type(llama(prompt(3)).past_key_values) is DynamicCache
    encode_llama(llama, keys_for(llama), "cpu")
    ids = prompt(6, 2)
    cache = llama(ids).past_key_values
    for kind, message, arguments in (
        (ValueError, "output_attentions: inner states", {"output_attentions": True}),
        (ValueError, "output_hidden_states: inner states", {"output_hidden_states": True}),
        (ValueError, "left padding, zeros before ones", {"attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0]] * 2)}),
        (ValueError, r"expects \(2, 6\) with 0 and 1", {"attention_mask": torch.ones(2, 1, 6, 6)}),
        (ValueError, r"position_ids: expected \(2 or 1, 6\)", {"position_ids": torch.zeros(3, 6, dtype=torch.int64)}),
        (ValueError, "needs the cache that its prefill returned", {"mode": "decode"}),
        (TypeError, "got a DynamicCache that holds tokens", {"past_key_values": plain}),
    ):
        with pytest.raises(kind, match=message):
            llama(ids, **arguments)
    with pytest.raises(ValueError, match="holds 2 sequences, the input has 3"):
        llama(prompt(1, 3), past_key_values=cache)
    with pytest.raises(ValueError, match="the conversation's first tokens are None"):
        llama(prompt(1, 2), past_key_values=cache, attention_mask=torch.tensor([[0, *[1] * 6]] * 2))
    with pytest.raises(ValueError, match="parts of different"):
        llama(prompt(1, 2), gpu_kvcache=cache.divide([1])[0], cpu_kvcache=llama(ids).past_key_values.divide([1])[1])
    with pytest.raises(TypeError, match=r"cpu_kvcache: expected a part .* \(ConversationPart\), got DynamicCache"):
        llama(prompt(1, 2), gpu_kvcache=cache.divide([1])[0], cpu_kvcache=plain)
    assert cache.get_seq_length() == 6
    decode_llama(llama)
    encode_llama(llama, keys_for(llama), "cpu")
    with pytest.raises(ValueError, match="begun with another untrusted party"):
        llama(prompt(1, 2), past_key_values=cache)
    llama.train()
    with pytest.raises(RuntimeError, match="serves inference only"):
        llama(ids)
