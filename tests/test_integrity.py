"""What the untrusted side answers is checked: no lie above the tolerance passes, and no honest answer is refused."""

import copy
import pickle
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_split import reachable
from tiny import FAMILIES, tiny_model
from torch import Tensor, nn
from torch.nn import functional
from workers import SECONDS, SECURE, honest, running

import scx_kernels as ops
from scx import (
    SCXKeyGenerator,
    encode_llama,
    encoded_llama,
    load_secure_model,
    record_transcript,
    restore_conversation,
)
from scx.keystream import KeyStream, Secret
from scx.models.llama import model_shape
from scx.party.attention import attend, compare_attention
from scx.party.boundary import PartyLostError, Request, Rule
from scx.party.freivalds import GROUP, Sketch, draw_vectors, gamma
from scx.party.integrity import IntegrityError, Verifier, checked_attention_rows
from scx.party.plan import Plan
from scx.party.process import RemoteParty
from scx.party.secure import split_plan
from scx.party.transcript import expected_bytes
from scx.party.untrusted import UntrustedParty

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
VERIFIED = {"crossings": "paper", "verify": True}


def keys_for(model, **options) -> SCXKeyGenerator:
    return SCXKeyGenerator.for_model(model, **{"redundant_num": 3, "alp": True, **options})


def vectors(size: int, seed: int = 0) -> Tensor:
    return draw_vectors(KeyStream(Secret(bytes([seed]) * 32)).bits("test", [(0, 0, 0)], size, torch.int32)[0])


# Products: the tolerance


def in_blocks(rows: Tensor, weight: Tensor) -> Tensor:
    """Partial sums over 32 features each, as an accelerator splits them."""
    pairs = zip(rows.float().split(32, -1), weight.float().split(32, -1), strict=True)
    return torch.stack([functional.linear(x, w) for x, w in pairs]).sum(0).to(rows.dtype)


def one_by_one(rows: Tensor, weight: Tensor) -> Tensor:
    total = torch.zeros(len(rows), len(weight))
    for x, w in zip(rows.float().unbind(-1), weight.float().unbind(-1), strict=True):
        total += x[:, None] * w
    return total.to(rows.dtype)


ORDERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "PyTorch's": functional.linear,
    "backwards": lambda rows, weight: functional.linear(rows.flip(-1), weight.flip(-1)),
    "in blocks": in_blocks,
    "one by one": one_by_one,
    "exact, rounded twice": lambda rows, weight: (rows.double() @ weight.double().t()).float().to(rows.dtype),
}


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    order=st.sampled_from(sorted(ORDERS)),
    dtype=st.sampled_from(DTYPES),
    features=st.integers(1, 300),
    out=st.integers(1, 2 * GROUP),
    magnitudes=st.tuples(st.integers(-18, 4), st.integers(-18, 4)),
    is_constant=st.booleans(),
    seed=st.integers(0, 99),
)
def test_honest_products_are_believed(order, dtype, features, out, magnitudes, is_constant, seed) -> None:
    """Whatever the order of the sums and the magnitude of the numbers; with equal numbers all roundings go one way."""
    torch.manual_seed(seed)
    rows, weight = torch.randn(3, features), torch.randn(out, features)
    if is_constant:
        rows, weight = rows[:, :1].expand(3, features), weight[:1, :1].expand(out, features)
    rows, weight = (
        (x * 2.0**power).to(dtype).contiguous() for x, power in zip((rows, weight), magnitudes, strict=True)
    )
    ratio = Sketch.of([weight], [None], [vectors(out, seed)]).compare(rows, [ORDERS[order](rows, weight)]).ratio
    assert ratio <= 1


@by_dtype
def test_one_altered_element_of_a_product_is_noticed(dtype) -> None:
    """At 100 random places each: at twice an element's tolerance always, at an eighth never. Of a row that is the
    row's tolerance, twice, since no entry of a vector is below a half."""
    rows, weight, bias = torch.randn(9, 70).to(dtype), torch.randn(600, 70).to(dtype), torch.randn(600).to(dtype)
    product, sketch = functional.linear(rows, weight, bias), Sketch.of([weight], [bias], [vectors(600)])
    tolerance = 2 * sketch.compare(rows, [product]).tolerance.repeat_interleave(sketch.vectors[0].shape[1], dim=1)
    for place in torch.randperm(product.numel())[:100]:
        for times, is_noticed in ((2.1, True), (0.125, False)):
            altered = product.flatten().float().clone()
            altered[place] += times * tolerance.flatten()[place] * (-1) ** int(place)
            ratio = sketch.compare(rows, [altered.view_as(product).to(dtype)]).ratio
            assert (ratio > 1) == is_noticed


def test_several_altered_elements_are_missed_as_seldom_as_promised() -> None:
    """Two elements by the same amount, which cancel where the vector's entries happen to: of 2,000 vectors no more
    miss it than twice the tolerance over the alteration, and three standard deviations."""
    rows, weight = torch.randn(1, 40), torch.randn(8, 40)
    product = functional.linear(rows, weight)
    missed, expected, tries = 0, 0.0, 2000
    drawn = KeyStream(Secret(bytes(32))).bits("test", [(0, 0, i) for i in range(tries)], 8, torch.int32)
    for bits in drawn:
        sketch = Sketch.of([weight], [None], [draw_vectors(bits)])
        by = 20 * float(sketch.compare(rows, [product]).tolerance)
        altered = product.clone()
        altered[0, 2:4] += by
        missed += sketch.compare(rows, [altered]).ratio <= 1
        expected += 2 / 20
    assert 0 < missed <= expected + 3 * (0.1 * 0.9 * tries) ** 0.5


def test_vectors_are_secret_and_bounded() -> None:
    """Entries are in ±[½, 1), of both signs, and differ from projection to projection and from draw to draw."""
    drawn = vectors(4096).flatten()
    assert 0.5 <= drawn.abs().min() < 0.51 < 0.99 < drawn.abs().max() < 1
    assert 0.45 < (drawn < 0).double().mean() < 0.55
    assert vectors(960).shape == (3, 320)
    assert not torch.equal(drawn, vectors(4096, seed=1).flatten())


def test_sums_without_a_bound_are_refused() -> None:
    with pytest.raises(ValueError, match="verify: sums of 4194304 terms in torch.float32 have no bound"):
        gamma(2**22, torch.float32)


# Attention: the tolerance


@dataclass
class Attention:
    """What the attention of a block computes with, of a model that needs no more."""

    sliding_window: int | None = None
    scaling: float = 0.25
    config: None = None


def exactly(attention: Attention, q: Tensor, k: Tensor, v: Tensor, first_key: Tensor | None) -> Tensor:
    return attend(attention, q.double(), k.double(), v.double(), first_key).to(q.dtype)


@by_dtype
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize(("tokens", "keys"), [(40, 40), (1, 33), (5, 33)])
@pytest.mark.parametrize("compute", [attend, exactly])
def test_honest_attention_is_believed(dtype, window, is_padded, tokens, keys, compute) -> None:
    attention, first_key = Attention(window), torch.tensor([0, 9]) if is_padded else None
    for magnitude in (1e-3, 1.0, 8.0):
        q, k, v = torch.randn(2, 6, tokens, 16), torch.randn(2, 2, keys, 16), torch.randn(2, 2, keys, 16)
        q, k, v = ((magnitude * x).to(dtype) for x in (q, k, v))
        attended = compute(attention, q, k, v, first_key)
        comparison = compare_attention(attention, q, k, v, first_key, attended, torch.arange(tokens))
        assert comparison.ratio <= 1


@by_dtype
def test_one_altered_element_of_attention_is_noticed(dtype) -> None:
    """In a row that is looked at: at twice the tolerance always, at less than it never where the rest is exact."""
    attention, rows = Attention(), torch.arange(20)
    q, k, v = (torch.randn(1, heads, 20, 16).to(dtype) for heads in (6, 2, 2))
    attended = attend(attention, q, k, v, None)
    tolerance = compare_attention(attention, q, k, v, None, attended, rows).tolerance.view(attended.shape)
    for place in torch.randperm(attended.numel())[:100]:
        for times, is_noticed in ((2.1, True), (0.125, False)):
            altered = attended.flatten().float().clone()
            altered[place] += times * tolerance.flatten()[place]
            ratio = compare_attention(attention, q, k, v, None, altered.view_as(q).to(dtype), rows).ratio
            assert (ratio > 1) == is_noticed


# Requests


Alter = Callable[[Request, dict[str, Tensor]], Mapping[str, Tensor]]


class Liar:
    """An untrusted party of which some answers are altered.

    Args:
        operation, block: the requests that are lied to.
        alter: a request and its honest reply -> the reply.
    """

    def __init__(self, honest: Any, operation: str, block: int, alter: Alter) -> None:
        self.honest, self.operation, self.block, self.alter = honest, operation, block, alter
        self.lies = 0

    def begin(self, request: Request, rule: Rule) -> Callable[[], Mapping[str, Tensor]]:
        reply = self.honest.begin(request, rule)
        if (request.operation, request.block) != (self.operation, self.block):
            return reply
        self.lies += 1
        return lambda: self.alter(request, {name: x.clone() for name, x in reply().items()})


def lie(model, operation: str, block: int, alter: Alter) -> Liar:
    boundary = model.model._scx.party.boundary
    boundary._receiver = liar = Liar(boundary._receiver, operation, block, alter)
    return liar


def verifier_of(model) -> Verifier:
    return model.model._scx.party.verifier


@by_dtype
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_honest_models_are_believed(prompt, family: str, dtype: torch.dtype) -> None:
    """Padded batches under the strongest noise, a chunked prompt, and tokens as without a check."""
    model = tiny_model(family, dtype, layers=4)
    ids, mask = prompt(20, 2), torch.ones(2, 20, dtype=torch.int64, device=model.device)
    mask[1, :6] = 0
    tokens = []
    master_key = bytes(range(32))
    for options in ({"crossings": "paper"}, VERIFIED):
        keys = keys_for(model, noise_scale=40.0, master_key=master_key)
        with encoded_llama(model, keys, "cpu", **options):
            whole = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, num_beams=2)
            chunked = model.generate(ids[:1], max_new_tokens=3, do_sample=False, prefill_chunk_size=7)
            tokens.append((whole, chunked))
            ratios = options is VERIFIED and dict(verifier_of(model).largest_ratios)
    checked = {"q, k or v", "attention", "output", "gate or up", "feed-forward"}
    assert set(ratios) == checked | ({"activation"} if dtype != torch.float32 else set())
    assert all(0 < ratio <= 1 for ratio in ratios.values())
    if dtype == torch.float32:
        assert all(torch.equal(x, y) for x, y in zip(*tokens, strict=True))


def zero_a_row(x: Tensor) -> Tensor:
    x.select(-2, 3).zero_()
    return x


ALTERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "every row another's": lambda x: x.roll(1, dims=-2),
    "a row of zeros": zero_a_row,
    "scaled by 1.1": lambda x: 1.1 * x,
    "zeros": torch.zeros_like,
    "not finite": lambda x: x.index_fill(-1, torch.tensor([2]), torch.nan),
    "infinite": lambda x: x.index_fill(-1, torch.tensor([2]), torch.inf),
    "random": torch.randn_like,
    "of a dtype with more rounding": torch.Tensor.bfloat16,
}
RETURNED = [
    ("project_qkv", "query_product"),
    ("project_qkv", "key_product"),
    ("project_qkv", "value_product"),
    ("attend", "attention"),
    ("project_output", "output"),
    ("feed_forward", "gate_product"),
    ("feed_forward", "up_product"),
    ("feed_forward", "feed_forward"),
]


@pytest.mark.parametrize(("operation", "name"), RETURNED)
@torch.no_grad()
def test_altered_replies_are_refused(prompt, operation: str, name: str) -> None:
    """Every product that comes back in a prefill, under noise or not."""
    model = tiny_model(layers=4)
    encode_llama(model, keys_for(model), "cpu", **VERIFIED)
    boundary = model.model._scx.party.boundary
    honest = boundary._receiver
    for block in (0, 1, 3):
        for alter in ALTERATIONS.values():
            boundary._receiver = honest
            lie(model, operation, block, lambda request, reply: {**reply, name: alter(reply[name])})  # noqa: B023
            with pytest.raises(IntegrityError, match=f"^{operation}, block {block}: the untrusted side's .* nothing"):
                model(prompt(12))


@pytest.mark.parametrize("operation", ["project_qkv", "project_output", "feed_forward"])
@torch.no_grad()
def test_another_blocks_weights_are_refused(prompt, operation: str) -> None:
    model = tiny_model(layers=4)
    encode_llama(model, keys_for(model), "cpu", **VERIFIED)

    def with_other_weights(request: Request, reply: dict[str, Tensor]) -> Mapping[str, Tensor]:
        return liar.honest.receive(replace(request, block=2))

    liar = lie(model, operation, 1, with_other_weights)
    with pytest.raises(IntegrityError, match=f"{operation}, block 1"):
        model(prompt(12))


@pytest.mark.parametrize("operation", ["project_qkv", "attend", "project_output", "feed_forward"])
@torch.no_grad()
def test_replies_of_an_earlier_request_are_refused(prompt, operation: str) -> None:
    """The same prompt again: keys differ, and so does every honest reply."""
    model = tiny_model(layers=4)
    encode_llama(model, keys_for(model), "cpu", **VERIFIED)
    earlier: list[Mapping[str, Tensor]] = []

    def replay(request: Request, reply: dict[str, Tensor]) -> Mapping[str, Tensor]:
        earlier.append(reply)
        return earlier[0]

    lie(model, operation, 1, replay)
    model(prompt(12))
    with pytest.raises(IntegrityError, match=f"{operation}, block 1"):
        model(prompt(12))


@dataclass
class Case:
    """A request that was answered, and by the names of what came back how far an element may be off."""

    operation: str
    block: int
    sent: dict[str, Tensor]
    reply: dict[str, Tensor]
    tolerances: dict[str, Tensor]


def cases(model, ids: Tensor) -> Iterator[Case]:
    """Of a prefill and of a generated token."""
    verifier, seen = verifier_of(model), []
    check = verifier.check

    def note(operation, block, sent, reply, first_key) -> dict[str, Tensor]:
        seen.append((operation, block, dict(sent), dict(reply)))
        return check(operation, block, sent, reply, first_key)

    verifier.check = note
    cache = model(ids).past_key_values
    model(ids[:, :1], past_key_values=cache)
    verifier.check = check
    for operation, block, sent, reply in seen:
        found: dict[str, list[Tensor]] = {}
        for what, comparison in verifier._compare(operation, block, sent, reply, None):
            found.setdefault(what, []).append(comparison.tolerance)
        by_name = {name: x for what, parts in found.items() for name, x in expand(what, torch.cat(parts), reply)}
        if by_name:
            yield Case(operation, block, sent, reply, by_name)


NAMES = {
    "q, k or v": ("query_product", "key_product", "value_product"),
    "output": ("output",),
    "gate or up": ("gate_product", "up_product"),
    "feed-forward": ("feed_forward",),
}


INNER = ("gate_product", "up_product", "activation")


def expand(what: str, tolerance: Tensor, reply: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    if what in ("attention", "activation"):
        yield what, tolerance.view(reply[what].shape)
        return
    start = 0
    for name in NAMES[what]:
        size = reply[name].shape[-1]
        groups = len(vectors(size))
        part = 2 * tolerance[:, start : start + groups].repeat_interleave(size // groups, dim=1)
        yield name, part.view(reply[name].shape)
        start += groups


@by_dtype
@torch.no_grad()
def test_one_altered_element_is_noticed(prompt, dtype: torch.dtype) -> None:
    """Of every tensor that is checked, in a prefill and in a generation, at 100 random places in all blocks: by twice
    its tolerance always, by an eighth of it never."""
    model = tiny_model(dtype=dtype, layers=4)
    encode_llama(model, keys_for(model), "cpu", **VERIFIED)
    verifier, by_name = verifier_of(model), {}
    for case in cases(model, prompt(12)):
        for name in case.tolerances:
            by_name.setdefault(name, []).append(case)
    returned = {name for _, name in RETURNED} | ({"activation"} if dtype != torch.float32 else set())
    assert set(by_name) == returned
    for name, found in by_name.items():
        for tried in range(100):
            case = found[tried % len(found)]
            honest, tolerance = case.reply[name], case.tolerances[name]
            place = int(torch.randint(honest.numel(), ()))
            for times in (2.2, 0.125):
                # What was refused has all vectors drawn anew: the largest tolerance there may be is some percents more.
                altered = honest.flatten().to(ops.accumulation_dtype(dtype)).clone()
                altered[place] += 1.2 * times * tolerance.flatten()[place]
                reply = {**case.reply, name: altered.view_as(honest).to(honest.dtype)}
                refused = is_refused(verifier, case, reply)
                # What is inside the feed-forward enters another check, which may notice less.
                expected = True if times > 1 else refused if name in INNER else False
                assert refused == expected, (name, case.operation, case.block, times)


def is_refused(verifier: Verifier, case: Case, reply: dict[str, Tensor]) -> bool:
    try:
        verifier.check(case.operation, case.block, case.sent, reply, None)
    except IntegrityError:
        return True
    return False


@torch.no_grad()
def test_swapped_rows_are_noticed(prompt) -> None:
    """Two rows alone, which differ in all their elements by one vector: missed in less than one of fifty tries."""
    model = tiny_model(layers=4)
    encode_llama(model, keys_for(model), "cpu", **VERIFIED)
    verifier = verifier_of(model)
    for case in [*cases(model, prompt(12))][:4]:
        name, refused = next(iter(case.tolerances)), 0
        for _ in range(50):
            rows = torch.randperm(12)[:2]
            swapped = case.reply[name].clone()
            swapped[..., rows, :] = swapped[..., rows.flip(0), :]
            refused += is_refused(verifier, case, {**case.reply, name: swapped})
        assert refused >= 49, (case.operation, case.block)


def test_rows_of_attention_are_looked_at_as_often_as_promised() -> None:
    """One altered row of 256 among 16 draws: noticed in about one request of sixteen, and never foreseen."""
    assert [checked_attention_rows(n) for n in (1, 16, 17, 256, 4096)] == [1, 16, 16, 16, 256]
    model = tiny_model()
    verifier = Verifier(model.model.layers, SCXKeyGenerator.for_model(model).integrity_stream, torch.device("cpu"))
    seen = sum(int((verifier._choose(0, 256) == 77).any()) for _ in range(2000))
    share = 1 - (1 - 1 / 256) ** 16
    assert abs(seen - 2000 * share) < 4 * (2000 * share * (1 - share)) ** 0.5


@torch.no_grad()
def test_a_check_that_is_left_out_is_missed(prompt, monkeypatch) -> None:
    """Without the check, no test above would pass: the altered reply is believed."""
    model = tiny_model(layers=4)
    encode_llama(model, keys_for(model), "cpu", **VERIFIED)
    honest = model(prompt(12)).logits
    monkeypatch.setattr(Verifier, "_compare", lambda *args: iter(()))
    liar = lie(model, "feed_forward", 1, lambda request, reply: {**reply, "feed_forward": 2 * reply["feed_forward"]})
    assert (model(prompt(12)).logits - honest).abs().max() > 1e-2
    assert liar.lies == 1


# Conversations


@torch.no_grad()
def test_a_conversation_goes_on_with_another_party(prompt) -> None:
    """A lie in a generation costs no token: the cache is as it was, and the conversation is taken up again."""
    model, ids = tiny_model(layers=4), prompt(9)
    plain = model.generate(ids, max_new_tokens=4, do_sample=False)[0, 9:].tolist()
    encode_llama(model, keys_for(model), "cpu", **VERIFIED)
    out, tokens = model(ids), []
    cache = out.past_key_values
    liar = lie(model, "feed_forward", 3, lambda request, reply: {**reply, "up_product": -reply["up_product"]})
    while len(tokens) < 4:
        token = out.logits[:, -1:].argmax(dim=-1)
        try:
            out = model(token, past_key_values=cache)
        except PartyLostError:
            assert cache.get_seq_length() == 9 + len(tokens)
            model.model._scx.party.boundary._receiver = liar.honest
            restore_conversation(model, cache)
            continue
        tokens.append(token.item())
    assert liar.lies == 1
    assert tokens == plain


@torch.no_grad()
def test_vectors_are_drawn_anew_after_a_lie(prompt) -> None:
    """What was refused tells its author something about the vectors; about others it tells nothing."""
    model = tiny_model(layers=4)
    encode_llama(model, keys_for(model), "cpu", **VERIFIED)
    verifier = verifier_of(model)
    before = verifier._sketch(1, "project_output").vectors[0]
    model(prompt(6))
    assert verifier._sketch(1, "project_output").vectors[0] is before
    liar = lie(model, "attend", 2, lambda request, reply: {"attention": -reply["attention"]})
    with pytest.raises(IntegrityError):
        model(prompt(6))
    assert not torch.isclose(verifier._sketch(1, "project_output").vectors[0], before).any()
    model.model._scx.party.boundary._receiver = liar.honest
    model(prompt(6))


@torch.no_grad()
def test_vectors_stay_on_the_secure_side(prompt) -> None:
    """The untrusted party reaches no vector and no image of one, and two encodings share none."""
    model = tiny_model(layers=4)
    keys = keys_for(model)
    encode_llama(model, keys, "cpu", **VERIFIED)
    cache = model(prompt(6)).past_key_values
    model(prompt(1), past_key_values=cache)
    verifier = verifier_of(model)
    sketches = [verifier._sketch(block, "project_output") for block in range(4)]
    secret = {id(x) for sketch in sketches for x in (*sketch.vectors, sketch.images, sketch.bounds)}
    party = model.model._scx.party.boundary._receiver
    found = reachable(party)
    assert not [x for x in found if isinstance(x, (Verifier, Sketch, KeyStream, Secret)) or id(x) in secret]
    assert {type(x) for x in reachable(verifier)} >= {Sketch, KeyStream, Secret}, "the search finds them"
    other = tiny_model(layers=4)
    encode_llama(other, SCXKeyGenerator.for_model(other, redundant_num=3, alp=True), "cpu", **VERIFIED)
    assert not torch.isclose(verifier_of(other)._sketch(0, "project_output").vectors[0], sketches[0].vectors[0]).any()
    for shown in (repr(verifier), repr(sketches[0]), repr(dir(sketches[0]))):
        assert "tensor" not in shown
        assert "vectors" not in shown
    assert not hasattr(sketches[0], "__dict__")
    for copied in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError, match="never pickled"):
            copied(verifier)
        with pytest.raises(TypeError, match="never pickled"):
            copied(sketches[0])


@torch.no_grad()
def test_weights_that_change_are_followed(prompt) -> None:
    """Written, replaced, or past PyTorch's counters before a prefill: an honest side is not refused, and computes with
    what is there."""
    model, ids = tiny_model(layers=4), prompt(8)
    encode_llama(model, keys_for(model), "cpu", **VERIFIED)
    before = model(ids)
    model.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    model(ids[:, :1], past_key_values=before.past_key_values)
    model.model.layers[2].self_attn.o_proj = copy.deepcopy(model.model.layers[1].self_attn.o_proj)
    model.model.layers[3].self_attn.q_proj.weight.data.mul_(2)
    after = model(ids)
    assert not torch.allclose(before.logits, after.logits)
    assert all(ratio <= 1 for ratio in verifier_of(model).largest_ratios.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("protected", [0, 1, 2])
@torch.no_grad()
def test_bytes_follow_the_formula(prompt, dtype: torch.dtype, protected: int) -> None:
    """What replies are checked by is counted, and in a generation no cache of protected blocks crosses."""
    model, ids = tiny_model(layers=4, dtype=dtype), prompt(9, 2)
    keys = keys_for(model, protected_layers=protected, alp=protected > 0)
    shape, known = model_shape(model), {"batch": 2, "redundant": 3, "itemsize": dtype.itemsize, "inner_size": 160}
    plan = split_plan(keys, shape, "paper", False, verify=True)
    with encoded_llama(model, keys, "cpu", **VERIFIED), record_transcript(model) as transcript:
        model(ids[:, :2], past_key_values=model(ids).past_key_values)
    for stage, sizes in (("prefill", {"tokens": 9}), ("key sharing", {"tokens": 9}), ("generation", {"tokens": 2})):
        expected = expected_bytes(plan, shape, stage, **known, **sizes, past=9)
        assert transcript.nbytes(stage, "to untrusted") == expected.to_untrusted
        assert transcript.nbytes(stage, "to secure") == expected.to_secure


@torch.no_grad()
def test_weights_are_read_from_the_checkpoint_once(prompt, tmp_path) -> None:
    """A secure process without the blocks' weights checks them all the same, against those of the checkpoint."""
    model, ids = tiny_model(layers=4).cpu(), prompt(9).cpu()
    model.save_pretrained(tmp_path)
    keys = SCXKeyGenerator.for_config(model.config, redundant_num=3, alp=True)
    light = load_secure_model(tmp_path, keys, verify=True)
    plan = split_plan(keys, model_shape(light), "paper", False, verify=True)
    remote: Any = Beside(plan, UntrustedParty(model.model.layers, model.model.rotary_emb, plan))
    plain = model.generate(ids, max_new_tokens=5, do_sample=False)
    encode_llama(light, keys, "cpu", untrusted=remote, **VERIFIED)
    assert light.model.layers[1].mlp.up_proj.weight.is_meta
    assert torch.equal(light.generate(ids, max_new_tokens=5, do_sample=False), plain)
    model.model.layers[1].mlp.up_proj.weight.mul_(1.01)
    with pytest.raises(IntegrityError, match="feed_forward, block 1"):
        light(ids)
    with pytest.raises(TypeError, match=r"post_attention_layernorm\.weight has no data.*the settings"):
        encode_llama(load_secure_model(tmp_path, keys), keys, "cpu", untrusted=remote, **VERIFIED)
    model.model.layers[1].mlp.up_proj.to("meta")
    with pytest.raises(ValueError, match=r"verify: layers\.1\.mlp\.up_proj\.weight has no data here"):
        encode_llama(model, keys, "cpu", untrusted=remote, **VERIFIED)


@torch.no_grad()
def test_a_worker_is_verified(prompt) -> None:
    """Over the real channel: what is inside a feed-forward is read to the byte it must have."""
    model, ids = tiny_model(layers=4).cpu(), prompt(9).cpu()
    plain = model.generate(ids, max_new_tokens=5, do_sample=False)
    keys, shape = keys_for(model), model_shape(model)
    remote = RemoteParty(
        split_plan(keys, shape, "paper", False, verify=True), shape.fingerprint, timeout=SECONDS, credentials=SECURE
    )
    with running(honest(remote.address)):
        remote.connect()
        encode_llama(model, keys, "cpu", untrusted=remote, **VERIFIED)
        assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), plain)
        remote.close()
    assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction


@torch.no_grad()
def test_every_block_of_a_generation_may_be_checked(prompt) -> None:
    """Where all blocks are protected, a lie about a generated token is noticed in each, and nothing runs unchecked."""
    model, ids = tiny_model(layers=4), prompt(9)
    plain = model.generate(ids, max_new_tokens=5, do_sample=False)
    keys = keys_for(model, decode_start_layers=[0], decode_end_layers=[1, 2, 3])
    encode_llama(model, keys, "cpu", **VERIFIED)
    with record_transcript(model) as transcript:
        assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), plain)
    assert not transcript.select(stage="generation", name="hidden")
    boundary = model.model._scx.party.boundary
    honest = boundary._receiver
    for block in range(4):
        cache = model(ids).past_key_values
        lie(model, "project_qkv", block, lambda request, reply: {name: -x for name, x in reply.items()})
        with pytest.raises(IntegrityError, match=f"project_qkv, block {block}"):
            model(ids[:, :1], past_key_values=cache)
        boundary._receiver = honest


@dataclass
class Beside:
    """A party with weights of its own, in this process."""

    plan: Plan
    party: UntrustedParty

    def begin(self, request: Request, rule: Rule) -> Callable[[], Mapping[str, Tensor]]:
        return self.party.begin(request, rule)


# Refusals


class Adapted(nn.Linear):
    """A projection with something added to it."""

    def forward(self, rows: Tensor) -> Tensor:
        return super().forward(rows) + 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crossings": "few"}, "verify: with crossings='few' rows stay on the untrusted side"),
        ({"prefill_top_k": 3}, "verify: with prefill_top_k the untrusted side chooses"),
        ({"reuse_feature_keys": True}, "verify: the protected blocks' cache does not cross"),
        ({"secure_device": None}, "verify: in the fused placement there is no untrusted side"),
    ],
)
def test_settings_that_cannot_be_verified(options: dict[str, Any], message: str) -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match=message):
        encode_llama(model, keys_for(model), **{"secure_device": "cpu", **VERIFIED, **options})
    assert "_scx" not in vars(model.model)


def with_adapter(model) -> None:
    weight = model.model.layers[1].self_attn.k_proj.weight
    adapted = Adapted(weight.shape[1], weight.shape[0], bias=False, device=weight.device)
    adapted.weight = weight
    model.model.layers[1].self_attn.k_proj = adapted


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_adapter, r"verify: layers\.1\.self_attn\.k_proj \(Adapted\) is no plain linear projection"),
        (
            lambda model: model.model.layers[2].mlp.down_proj.register_forward_hook(lambda *_: None),
            r"verify: layers\.2\.mlp\.down_proj \(Linear\) is no plain linear projection, or has hooks",
        ),
        (
            lambda model: setattr(model.model.layers[0].mlp, "act_fn", nn.GELU()),
            r"verify: layers\.0\.mlp \(LlamaMLP\) has another activation than SiLU",
        ),
    ],
)
@torch.no_grad()
def test_modules_that_cannot_be_verified(prompt, change: Callable[[Any], Any], message: str) -> None:
    """Before the model is encoded, and after it."""
    model = tiny_model()
    change(model)
    with pytest.raises(ValueError, match=message):
        encode_llama(model, keys_for(model), "cpu", **VERIFIED)
    model = tiny_model()
    encode_llama(model, keys_for(model), "cpu", **VERIFIED)
    change(model)
    with pytest.raises(ValueError, match=message):
        model(prompt(5))
