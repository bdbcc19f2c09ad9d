"""Keys: drawn from a cryptographic stream, uniform, repeatable, independent, and never shown."""

import copy
import io
import logging
import os
import pickle
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from scx.encoding import ENCODINGS, RedundantScale, TokenKeys, inverse
from scx.keys import Branch, ModelShape, SCXKeyGenerator, Session
from scx.keystream import KeyStream, Secret
from scx_kernels import check_permutation

MASTER = bytes(range(32))
SHAPE = ModelShape(3, 96, 6, 2, 16, 211, 1.0, "test")
CPU = torch.device("cpu")


def generator(**options) -> SCXKeyGenerator:
    return SCXKeyGenerator(10, 96, 16, master_key=options.pop("master_key", MASTER), **options)


def session(session_id: bytes = bytes(16), batch: int = 1, **options) -> Session:
    return generator(**options).open_session(SHAPE, batch, session_id)


def stream() -> KeyStream:
    return KeyStream(Secret(MASTER))


def scale(value: float = 1.0) -> RedundantScale:
    return RedundantScale(*(torch.full((3, 96), value) for _ in ENCODINGS))


def test_stream_is_hkdf_and_chacha20() -> None:
    """The bits are those of the two named algorithms, composed as the module says."""
    key = HKDF(hashes.SHA256(), 32, salt=None, info=b"scx keystream v2\0a purpose").derive(MASTER)
    cipher = Cipher(algorithms.ChaCha20(key, struct.pack("<4I", 0, 5, 6, 7)), mode=None).encryptor()
    expected = torch.frombuffer(bytearray(cipher.update(bytes(400))), dtype=torch.int32)
    assert torch.equal(stream().bits("a purpose", [(5, 6, 7)], 100, torch.int32)[0], expected)


def test_session_keys_are_hkdf_of_the_session_secret() -> None:
    """Master key to session secret to the keys of session and branch, by RFC 5869 as the module draws it."""

    def hkdf(secret: bytes, info: str, salt: bytes | None = None) -> bytes:
        return HKDF(hashes.SHA256(), 32, salt=salt, info=info.encode()).derive(secret)

    one = session(b"\5" * 16)
    secret = hkdf(MASTER, "scx session v1", b"\5" * 16)
    branch = hkdf(secret, "scx branch v1", bytes.fromhex(one.branch))
    permutations = "feature permutations of K and V"
    expected = KeyStream(Secret(secret)).permutations(permutations, [(0, 0, 0)], 16, 4)
    assert torch.equal(one.feature_key(0, CPU).key[0], expected[0, :2])
    expected = KeyStream(Secret(branch)).permutations("token permutations", [(0, 0, 0)], 7, 3)
    assert torch.equal(one.draw_token_keys(7, 1, None, torch.float32).entry[1, 0, 0], expected[0, 1])
    assert one.derive_key("some use").reveal() == hkdf(secret, "scx session key v1, session\0some use")
    named = one.derive_key("some use", branch="07" * 16)
    assert named.reveal() == hkdf(secret, "scx session key v1, branch\0some use", b"\7" * 16)


def test_derived_keys_differ_by_everything_that_names_them() -> None:
    one, other = session(), session(b"\1" * 16)
    keys = [one.derive_key("a"), one.derive_key("b"), other.derive_key("a")]
    keys += [one.derive_key("a", branch="00" * 16), one.derive_key("a", branch="01" * 16), one._secret]
    assert len({bytes(key.reveal()) for key in keys}) == 6
    assert one.derive_key("a").reveal() == session().derive_key("a").reveal()
    assert repr(keys[0]) == "Secret(32 bytes)"


def test_a_forked_process_draws_one_time_keys_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fork copies the counters; the child must not go on under its parent's."""
    parent, child = session(alp=True), session(alp=True)
    for one in (parent, child):
        one.take_noise(1, 1, CPU)
    monkeypatch.setattr("os.getpid", lambda: -1)
    fresh = child.draw_token_keys(40, 1, None, torch.float32), child.take_noise(1, 1, CPU)
    monkeypatch.undo()
    mine = parent.draw_token_keys(40, 1, None, torch.float32), parent.take_noise(1, 1, CPU)
    assert child.branch != parent.branch
    assert not torch.equal(fresh[0].entry, mine[0].entry)
    assert not torch.equal(fresh[1].steps, mine[1].steps)
    assert torch.equal(child.feature_key(1, CPU).key, parent.feature_key(1, CPU).key)


@pytest.mark.parametrize("alp", [False, True])
def test_a_generator_for_a_session_has_its_settings(alp: bool) -> None:
    one = session(redundant_num=5, alp=alp, noise_scale=7.5, noise_distribution="normal", decode_end_layers=[])
    keys = SCXKeyGenerator.for_session(one)
    assert keys.settings(SHAPE) == one.settings
    assert keys.settings(SHAPE).difference(one.settings) == ""
    other = keys.open_session(SHAPE, 1, bytes.fromhex(one.id))
    assert not torch.equal(other.feature_key(0, CPU).key, one.feature_key(0, CPU).key)


def test_permutations_are_uniform() -> None:
    """Chi-square of (place, value) counts and of all 24 orders of four things, at odds of 1 in 10,000."""
    drawn = stream().permutations("chi-square", [(0, i, 0) for i in range(20_000)], 4)[:, 0]
    place = torch.stack([torch.bincount(drawn[:, i], minlength=4) for i in range(4)]).double()
    assert ((place - 5000) ** 2 / 5000).sum() < 33.7  # 9 degrees of freedom
    order = torch.bincount((drawn * torch.tensor([64, 16, 4, 1])).sum(dim=1), minlength=256)
    order = order[order > 0].double()
    assert len(order) == 24
    assert ((order - 20_000 / 24) ** 2 / (20_000 / 24)).sum() < 55.8  # 23 degrees of freedom


@settings(max_examples=25, deadline=None)
@given(size=st.integers(1, 300), count=st.integers(1, 5))
def test_every_draw_is_a_permutation(size: int, count: int) -> None:
    drawn = stream().permutations("any size", [(0, 0, 0), (1, 0, 0)], size, count)
    assert drawn.shape == (2, count, size)
    check_permutation(drawn)
    assert torch.equal(inverse(drawn).gather(-1, drawn), torch.arange(size).expand(drawn.shape))


@pytest.mark.parametrize(
    ("name", "variance", "fourth"), [("normal", 1.0, 3.0), ("fine_normal", 1.0, 3.0), ("laplace", 2.0, 24.0)]
)
def test_noise_has_its_distribution(name: str, variance: float, fourth: float) -> None:
    drawn = getattr(stream(), name)("moments", [(0, 0, 0)], 1_000_000)[0].double()
    assert drawn.isfinite().all()
    assert abs(drawn.mean()) < 0.01
    assert abs(drawn.square().mean() - variance) < 0.02 * variance
    assert abs(drawn.pow(4).mean() - fourth) < 0.1 * fourth
    assert (drawn > 0).double().mean().sub(0.5).abs() < 0.005
    assert drawn.unique().numel() > 980_000  # no coarse grid by which noise could be told from data


def test_same_master_key_and_session_give_the_same_keys() -> None:
    a, b = session(redundant_num=4), session(redundant_num=4)
    assert torch.equal(a.feature_key(1, CPU).key, b.feature_key(1, CPU).key)
    assert a.derive_key("a").reveal() == b.derive_key("a").reveal()


def test_one_session_opened_twice_has_one_time_keys_of_its_own_each_time() -> None:
    """Two generators with one master key may open one id: nothing that is for once is drawn by both."""
    a, b = session(redundant_num=4, alp=True), session(redundant_num=4, alp=True)
    assert a.branch != b.branch
    first, second = (s.draw_token_keys(40, 1, scale(), torch.float32) for s in (a, b))
    for encoding in range(len(ENCODINGS)):
        assert not torch.equal(first.entry[encoding], second.entry[encoding])
        assert not torch.equal(first.redundant[encoding], second.redundant[encoding])
    noise = [s.take_noise(1, 1, CPU).steps for s in (a, b)]
    assert not torch.equal(*noise)
    writes = [s.take_writes(1, 5, CPU) for s in (a, b)]
    assert torch.equal(writes[0].numbers, writes[1].numbers)
    keys = [s.sealing(0, own.numbers, own.branch).key for s, own in zip((a, b), writes, strict=True)]
    assert not torch.equal(*keys)


def test_the_same_branch_draws_the_same_one_time_keys() -> None:
    """A draw is a function of the secret and its name: the same on any machine."""
    wanted = generator(redundant_num=4).settings(SHAPE)
    first, second = (
        Branch(Secret(MASTER), bytes(16), wanted, SHAPE).draw_token_keys(7, 1, scale(), torch.float32) for _ in range(2)
    )
    for encoding in range(len(ENCODINGS)):
        assert torch.equal(first.entry[encoding], second.entry[encoding])
        assert torch.equal(first.redundant[encoding], second.redundant[encoding])


@pytest.mark.parametrize("layers", [[1], [0, 2]])
def test_token_keys_of_some_layers_go_with_the_residual_stream_of_a_pass(layers: list[int]) -> None:
    """They lead out of that order and back into it, under permutations that no other draw has."""
    one = session(redundant_num=4)
    whole = one.draw_token_keys(30, 1, scale(), torch.float32)
    some = one.draw_token_keys(30, 1, scale(), torch.float32, layers=layers, residual=whole.residual)
    assert some.entry.shape == (3, len(layers), 1, 34)
    assert torch.equal(some.residual.entry, whole.residual.entry)
    rows = torch.randn(1, 34, 96)
    for place, layer in enumerate(layers):
        fresh, known = some.layers()[place], whole.layers()[layer]
        assert not torch.equal(fresh.attention.entry, known.attention.entry)
        in_order = fresh.attention.leave(fresh.attention.enter(rows))
        assert torch.equal(in_order, whole.residual.leave(rows))


def test_threads_that_find_themselves_in_a_new_process_begin_one_branch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers of one branch under the key of another would meet that branch's own."""
    one = session()
    monkeypatch.setattr("os.getpid", lambda: -1)
    with ThreadPoolExecutor(16) as pool:
        branches = set(pool.map(lambda _: one.branch, range(64)))
    assert len(branches) == 1


def in_a_child(work: Callable[[], bytes]) -> bytes:
    """What `work` gives in a fork of this process."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, work())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        found = pipe.read()
    assert os.waitpid(child, 0)[1] == 0
    return found


@pytest.mark.skipif(not hasattr(os, "fork"), reason="waits for a system that forks")
def test_a_child_with_the_number_of_an_earlier_process_has_a_branch_of_its_own(monkeypatch) -> None:
    """Process numbers come round: a grandchild may have that of its grandparent."""
    one, number = session(), os.getpid()
    parent = one.branch

    def child() -> bytes:
        with monkeypatch.context() as patch:
            patch.setattr("os.getpid", lambda: number)
            patch.setattr("secrets.token_bytes", os.urandom)
            return one.branch.encode()

    children = {in_a_child(child).decode() for _ in range(3)}
    assert len(children) == 3
    assert parent not in children
    assert one.branch == parent


def test_keys_differ_by_everything_that_names_them() -> None:
    """Master key, session, layer, sequence, head, K against V, encoding and step each give keys of their own."""
    base = session(batch=2)
    key = [base.feature_key(layer, CPU) for layer in range(3)]
    assert not torch.equal(key[0].key, key[1].key)
    assert not torch.equal(key[0].key[0], key[0].key[1])
    assert not torch.equal(key[0].key[0, 0], key[0].key[0, 1])
    assert not torch.equal(key[0].key, key[0].value)
    for other in (session(b"\1" * 16, batch=2), session(batch=2, master_key=b"\1" * 32)):
        assert not torch.equal(other.feature_key(0, CPU).key, key[0].key)
    steps = [base.draw_token_keys(40, 2, None, torch.float32) for _ in range(2)]
    assert not torch.equal(steps[0].entry, steps[1].entry)
    assert not torch.equal(steps[0].residual.entry, steps[1].residual.entry)
    orders = [steps[0].residual.entry, *steps[0].entry.flatten(0, 1)]
    assert all(not torch.equal(a, b) for i, a in enumerate(orders) for b in orders[:i])
    assert all(not torch.equal(order[0], order[1]) for order in orders)


def test_query_follows_its_group_and_output_undoes_v() -> None:
    key = session().feature_key(0, CPU)
    for head in range(SHAPE.num_heads):
        assert torch.equal(key.query[0, head], key.key[0, head // 3])
        assert torch.equal(key.output[0, head], key.value_inverse[0, head // 3])
    check_permutation(key.key)


def test_token_keys_lead_from_place_to_place() -> None:
    """Rows go from the residual stream through every encoding of every layer and back to their own places; redundant
    rows stay behind."""
    keys = session(redundant_num=3).draw_token_keys(5, 1, scale(), torch.float32)
    embedding, same = nn.Embedding.from_pretrained(-torch.ones(211, 96)), nn.Identity()
    tokens = torch.arange(1.0, 6)[None, :, None].expand(1, 5, 96)
    rows = keys.residual.enter(tokens, keys.residual.embed_decoys(embedding, tokens))
    assert torch.equal(keys.residual.leave(rows), tokens)
    assert (rows == -1).sum() == 3 * 96, "the redundant rows are embeddings of the decoys"
    for layer in keys.layers():
        for key in (layer.attention, layer.feed_forward):
            entered = key.enter(rows, same)
            assert sorted((entered[0, :, 0] == value).sum().item() for value in range(1, 6)) == [1] * 5
            assert not (entered == -1).any(), "a redundant row is never carried along"
        assert torch.equal(layer.attention.enter(rows, same)[:, layer.attention.position[0]], tokens)
        for key, encoded in ((layer.feed_forward, entered), (layer.output, layer.output.enter(tokens, same))):
            assert torch.equal(keys.residual.leave(key.add_to(rows, encoded)), 2 * tokens)


def test_embeddings_never_lie_in_token_order() -> None:
    """Tokens are permuted, decoys among them, before they are embedded; the stream leaves them in order again."""
    key = session(redundant_num=4).draw_token_keys(6, 2, scale(), torch.float32).residual
    embedding, ids = nn.Embedding(211, 8), torch.randint(0, 211, (2, 6))
    rows = key.embed(embedding, ids)
    assert rows.shape == (2, 10, 8)
    assert torch.equal(key.leave(rows), embedding(ids))
    redundant = torch.cat((ids, key.decoys), dim=1).gather(1, key.entry)
    assert torch.equal(rows, embedding(redundant))


def test_redundant_rows_follow_the_scale() -> None:
    wanted = RedundantScale(*(torch.rand(3, 96) + 0.1 for _ in ENCODINGS))
    keys = session(redundant_num=2000).draw_token_keys(1, 1, wanted, torch.float32)
    for encoding, rows in zip(ENCODINGS, keys.redundant, strict=True):
        assert rows is not None
        torch.testing.assert_close(rows[:, 0].std(dim=1), getattr(wanted, encoding), rtol=0.1, atol=0)


def test_noise_is_never_given_out_twice() -> None:
    one = session(alp=True, noise_scale=7.0)
    taken = [one.take_noise(1, 1, CPU) for _ in range(80)]
    taken += [one.take_noise(1, 5, CPU) for _ in range(2)]
    rows = torch.cat([noise.values() for noise in taken], dim=1)[0]
    assert rows.unique(dim=0).shape[0] == 90
    assert abs(rows.abs().mean() - 7.0) < 0.5  # the mean magnitude of Laplace(0, b) is b


def test_noise_is_drawn_for_what_it_covers() -> None:
    """Rows drawn ahead do not pass from one batch size or unit of scale to another, nor does the grid."""
    one = session(alp=True, noise_scale=1.0)
    first = one.take_noise(2, 1, CPU)
    assert one.take_noise(3, 1, CPU).steps.shape == (3, 1, 96)
    assert not torch.equal(one.take_noise(2, 1, CPU).steps, first.steps)
    wide = one.take_noise(2, 1, CPU, rms=1e6)
    assert wide.values().abs().mean() > 1e5
    assert (first.step, wide.step) == (2.0**-24, 2.0**-5)


@pytest.mark.parametrize(
    ("name", "tail", "largest"), [("laplace", 2.0**63 * 5.1e-12, 44.3), ("fine_normal", 2.0**63 * 2.6e-12, 9.1)]
)
def test_noise_leaves_no_gaps(monkeypatch: pytest.MonkeyPatch, name: str, tail: float, largest: float) -> None:
    """Neighbouring draws are less than a step of the grid apart, in the middle and where odds are below 1e-11, and
    signs are symmetric: no row is excluded because its noise cannot be drawn."""
    near = torch.arange(4096)
    least = torch.iinfo(torch.int64).min
    for draws in (int(tail) + near, torch.iinfo(torch.int64).max - 2**10 * near, 2**62 + 2**10 * near):
        both = torch.stack((draws, draws + least))
        monkeypatch.setattr(KeyStream, "bits", lambda *given, both=both: both)
        drawn, mirrored = getattr(stream(), name)("any", [(0, 0, 0)], len(near))
        assert 0 < drawn.diff().abs().max() < 2.0**-25
        assert torch.equal(drawn, -mirrored)
    monkeypatch.setattr(KeyStream, "bits", lambda *given: torch.tensor([[0, least]]))
    ends = getattr(stream(), name)("any", [(0, 0, 0)], 2)[0] * 2**25
    assert largest * 2**25 < ends[0] == -ends[1] < torch.iinfo(torch.int32).max


def test_torch_seed_has_no_part_in_keys() -> None:
    torch.manual_seed(0)
    first = SCXKeyGenerator(10, 96, 16).open_session(SHAPE, 1)
    torch.manual_seed(0)
    second = SCXKeyGenerator(10, 96, 16).open_session(SHAPE, 1)
    assert first.id != second.id
    assert not torch.equal(first.feature_key(0, CPU).key, second.feature_key(0, CPU).key)


def test_master_keys_come_from_the_operating_system(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("secrets.token_bytes", lambda size: asked.append(size) or bytes(size))
    SCXKeyGenerator(10, 96, 16).open_session(SHAPE, 1)
    assert asked == [32, 16, 16]  # master key, id, branch


def test_secrets_do_not_show(caplog: pytest.LogCaptureFixture) -> None:
    """Neither the master key nor a permutation appears in any representation, and nothing secret can be pickled."""
    caplog.set_level(logging.DEBUG)
    keys = generator(redundant_num=2)
    one = keys.open_session(SHAPE, 1)
    token_keys = one.draw_token_keys(40, 1, scale(), torch.float32)
    feature_key, layer = one.feature_key(0, CPU), token_keys.layers()[0]
    shown = [
        keys,
        one,
        one._stream,
        keys._master_key,
        feature_key,
        token_keys,
        token_keys.residual,
        layer,
        layer.output,
    ]
    shown.append(one.take_noise(1, 2, CPU).project([torch.nn.Linear(96, 2)]))
    text = " ".join(f"{thing!r} {thing!s}" for thing in shown) + caplog.text
    assert MASTER.hex() not in text
    assert str(MASTER) not in text
    assert "tensor(" not in text
    for thing in (keys, one, one._stream, keys._master_key):
        with pytest.raises(TypeError, match="never pickled"):
            pickle.dump(thing, io.BytesIO())
        if thing is not one._stream:
            assert copy.deepcopy(thing) is thing


class TestBadInput:
    @pytest.mark.parametrize("key", [b"", bytes(31), bytes(33)])
    def test_master_key_length(self, key: bytes) -> None:
        with pytest.raises(ValueError, match=f"master_key: expected 32 bytes, got {len(key)}"):
            generator(master_key=key)

    def test_master_key_type(self) -> None:
        with pytest.raises(TypeError, match="master_key: expected 32 bytes, got str") as raised:
            generator(master_key="0" * 32)
        assert "000" not in str(raised.value)

    @pytest.mark.parametrize("name", ["seq_len", "hidden_dim", "qk_hidden_dim", "batch_size"])
    def test_sizes(self, name: str) -> None:
        sizes = {"seq_len": 10, "hidden_dim": 96, "qk_hidden_dim": 16}
        with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
            SCXKeyGenerator(**{**sizes, name: 0})
        with pytest.raises(TypeError, match=f"{name}: expected an integer"):
            SCXKeyGenerator(**{**sizes, name: 1.5})

    def test_redundant_and_noise(self) -> None:
        with pytest.raises(ValueError, match="redundant_num"):
            generator(redundant_num=-1)
        for wrong in (0.0, -1.0, 40.5, 1e4, float("inf"), float("nan")):
            with pytest.raises(ValueError, match="noise_scale: expected .* at most 40, beyond which noise no longer"):
                generator(noise_scale=wrong)
        with pytest.raises(ValueError, match="noise_distribution: expected one of"):
            generator(noise_distribution="uniform")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"decode_start_layers": [1]}, "beginning with 0"),
            ({"decode_start_layers": [0, 2]}, "neighbouring"),
            ({"decode_start_layers": [0, 0]}, "neighbouring"),
            ({"decode_start_layers": [-1]}, "layer numbers from 0"),
            ({"decode_end_layers": ["2"]}, "layer numbers from 0"),
        ],
    )
    def test_protected_lists(self, options: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            generator(**options)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"decode_start_layers": [0, 1, 2, 3]}, "the model has 3 layers"),
            ({"decode_end_layers": [1]}, "expected the last of 3 layers"),
            ({"decode_start_layers": [0, 1], "decode_end_layers": [1, 2]}, "overlap"),
        ],
    )
    def test_protected_lists_against_the_model(self, options: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            generator(**options).open_session(SHAPE, 1)

    def test_session_id_opened_twice(self) -> None:
        keys = generator()
        first = keys.open_session(SHAPE, 1)
        with pytest.raises(ValueError, match="opened before"):
            keys.open_session(SHAPE, 1, bytes.fromhex(first.id))
        with pytest.raises(ValueError, match="session_id: expected 16 bytes"):
            keys.open_session(SHAPE, 1, b"short")

    def test_derived_keys(self) -> None:
        with pytest.raises(ValueError, match="purpose: expected a name"):
            session().derive_key("")
        for wrong in ("", "00", "zz" * 16, "AA" * 16):
            with pytest.raises(ValueError, match="branch: expected 16 bytes in hexadecimal"):
                session().derive_key("a", branch=wrong)

    def test_counters_do_not_wrap(self) -> None:
        with pytest.raises(ValueError, match="outside the 32-bit counters"):
            stream().bits("wrap", [(0, 0, 2**32)], 1, torch.int32)

    def test_redundant_rows_need_a_scale(self) -> None:
        with pytest.raises(ValueError, match="scale"):
            session(redundant_num=1).draw_token_keys(3, 1, None, torch.float32)


def test_protected_and_shared_layers() -> None:
    assert (session().protected_layers, session().shared_layers) == ((0, 2), (1,))
    chosen = session(decode_start_layers=[0, 1], decode_end_layers=[])
    assert (chosen.protected_layers, chosen.shared_layers) == ((0, 1), (2,))
    none = session(protected_layers=0)
    assert (none.protected_layers, none.shared_layers) == ((), (0, 1, 2))
    assert session(protected_layers=2).shared_layers == ()


def test_token_keys_without_redundant_rows() -> None:
    keys = session().draw_token_keys(6, 1, None, torch.float32)
    assert isinstance(keys, TokenKeys)
    assert keys.redundant == (None, None, None)
    check_permutation(keys.entry[0])


def test_an_accelerator_draws_the_same_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bits drawn by the device are the library's, so that keys do not depend on where they are drawn."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    stream, streams = session().one_time.stream, [(0, 1, 2), (3, 0, 2**32 - 1)]

    class Accelerator:
        type = "cuda"

    monkeypatch.setattr("scx.keystream.upload", lambda x, _: x.to(device))
    for dtype in (torch.int32, torch.int64):
        expected = stream.bits("any", streams, 41, dtype)
        assert torch.equal(stream.bits("any", streams, 41, dtype, Accelerator()).cpu(), expected)
    order = stream.permutations("orders", streams, 33, 3)
    assert torch.equal(stream.permutations("orders", streams, 33, 3, Accelerator()).cpu(), order)
