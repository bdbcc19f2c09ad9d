"""Files of keys and caches: they come back as they were, for their owner alone, or not at all."""

import copy
import json
import logging
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import tiny_model
from torch import Tensor
from transformers import DynamicCache

from scx import (
    EncodedCache,
    FileRefusedError,
    SCXKeyGenerator,
    Session,
    decode_kvcache,
    encode_llama,
    encoded_llama,
    load_keys,
    load_kvcache,
    merge_kvcache_dynamic,
    save_keys,
    save_kvcache,
    split_kvcache_dynamic,
)
from scx.encoding import ENCODINGS, RedundantScale
from scx.files import container as containers
from scx.files import header as headers
from scx.files.container import read_container, write_container
from scx.keys import ModelShape

KEY = bytes(range(100, 132))
MASTER = b"\xab" * 32
SHAPE = ModelShape(3, 96, 6, 2, 16, 211, 1.25, "a model")
CPU = torch.device("cpu")
TENSORS = {"a": torch.arange(5), "b": torch.tensor([[1.5, -2.0]], dtype=torch.bfloat16)}
PROTECTIONS = pytest.mark.parametrize("protection", ["encrypted", "authenticated"])
quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def _fast_passphrases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(containers, "SCRYPT", (2**4, 8, 1))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "file.scx"


def write(path: Path, protection: str = "encrypted", **options) -> bytes:
    if "passphrase" not in options:
        options.setdefault("key", KEY)
    write_container(
        path, TENSORS, {"note": "public"}, **{"kind": "test", "encrypt": protection == "encrypted", **options}
    )
    return path.read_bytes()


def read(path: Path, protection: str = "encrypted", **options) -> containers.Container:
    if "passphrase" not in options:
        options.setdefault("key", KEY)
    return read_container(path, **{"kind": "test", "protection": protection, **options})


def refuse(reason: str, call: Callable, *args, match: str | None = None, **options) -> None:
    with pytest.raises(FileRefusedError, match=match) as raised:
        call(*args, **options)
    assert raised.value.reason == reason


def refused(call: Callable, *args, **options) -> str:
    """The reason for which a file is refused; any other exception, or none, fails the test."""
    with pytest.raises(FileRefusedError) as raised:
        call(*args, **options)
    return raised.value.reason


def with_metadata(data: bytes, **changes: str) -> bytes:
    """A file with other words in its header, as somebody without the key can write it."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"].update(changes)
    packed = json.dumps(header).encode()
    return len(packed).to_bytes(8, "little") + packed + data[8 + size :]


class TestContainer:
    @PROTECTIONS
    def test_tensors_and_metadata_come_back(self, path, protection) -> None:
        """All dtypes, no dimension, no elements, transposed, sliced and requiring gradients."""
        given = {str(dtype): torch.ones(2, 3).to(dtype) for dtype in headers.DTYPES.values()}
        given |= {"scalar": torch.tensor(7), "empty": torch.empty(0, 4), "turned": torch.randn(3, 4).T}
        given |= {"sliced": torch.arange(10)[::3], "weight": torch.randn(3, requires_grad=True)}
        write_container(path, given, {"ключ": "значение"}, kind="test", key=KEY, encrypt=protection == "encrypted")
        got = read(path, protection)
        assert got.metadata == {"ключ": "значение"}
        assert set(got.tensors) == set(given)
        assert all(torch.equal(got.tensors[name], given[name]) for name in given)
        assert all(got.tensors[name].dtype == given[name].dtype for name in given)

    @PROTECTIONS
    @pytest.mark.parametrize("secret", [{"passphrase": "a pässphrase"}, {"passphrase": b"\xff"}, {"key": KEY}])
    def test_only_the_same_secret_opens_it(self, path, protection, secret) -> None:
        write(path, protection, **secret)
        assert torch.equal(read(path, protection, **secret).tensors["a"], TENSORS["a"])
        for wrong in ({"passphrase": "another"}, {"key": bytes(32)}):
            refuse("key", read, path, protection, **wrong)

    def test_a_passphrase_is_the_same_text_on_every_keyboard(self, path) -> None:
        write(path, passphrase="caf\u00e9")
        assert read(path, passphrase="cafe\u0301").metadata == {"note": "public"}

    def test_it_is_a_safetensors_file(self, path) -> None:
        """Other readers of the format show what is public, and nothing else is."""
        write(path, "authenticated")
        with safe_open(path, "pt") as file:
            assert file.metadata()["kind"] == "test"
            assert set(file.keys()) == {"a", "b", "tag"}
            assert torch.equal(file.get_tensor("b"), TENSORS["b"])
        write(path, "encrypted")
        with safe_open(path, "pt") as file:
            assert set(file.keys()) == {"payload"}

    def test_every_file_has_a_key_of_its_own(self, path) -> None:
        """The nonce is constant, so the same content twice must not meet the same keystream."""
        first, second = (write(path)[-200:-16] for _ in range(2))  # ciphertext alone, without its tag
        equal = sum(a == b for a, b in zip(first, second, strict=True))
        assert equal < 20  # one in 256 by chance

    @PROTECTIONS
    def test_any_altered_byte_is_refused(self, path, protection) -> None:
        """Every byte of the file, the header's length and spaces included; nothing but FileRefusedError comes out."""
        data = write(path, protection)
        reasons = set()
        for place in range(len(data)):
            for mask in (0x01, 0x80):
                path.write_bytes(data[:place] + bytes([data[place] ^ mask]) + data[place + 1 :])
                reasons.add(refused(read, path, protection))
        assert reasons == {"format", "version", "kind", "key"}

    @PROTECTIONS
    def test_any_truncation_and_anything_appended_is_refused(self, path, protection) -> None:
        data = write(path, protection)
        for length in range(len(data)):
            path.write_bytes(data[:length])
            assert refused(read, path, protection) == "format"
        for more in (b"\0", data):
            path.write_bytes(data + more)
            refuse("format", read, path, protection, match="followed by foreign data")

    @PROTECTIONS
    @quick
    @given(data=st.data())
    def test_splices_of_two_files_are_refused(self, path, protection, data) -> None:
        one, other = write(path, protection), write(path, protection)
        start = data.draw(st.integers(0, len(one) - 1))
        end = data.draw(st.integers(start + 1, len(one)))
        mixed = one[:start] + other[start:end] + one[end:]
        if mixed in (one, other):
            return
        path.write_bytes(mixed)
        refused(read, path, protection)

    @quick
    @given(
        header=st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
            lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
        ),
        entries=st.lists(
            st.fixed_dictionaries(
                {
                    "dtype": st.sampled_from(["U8", "F32", "X9", 3]),
                    "shape": st.lists(st.integers(-1, 2**70), max_size=3) | st.just([True]),
                    "data_offsets": st.lists(st.integers(0, 40), max_size=3) | st.text(max_size=2),
                }
            ),
            max_size=3,
        ),
        tail=st.binary(max_size=40),
    )
    def test_hostile_headers_are_refused(self, path, header, entries, tail) -> None:
        """Whatever JSON stands in the header: one kind of exception, and no allocation for what is not there."""
        plain = json.loads(write(path, "authenticated")[8:].split(b"}}")[0] + b"}}")
        metadata = {"__metadata__": plain["__metadata__"]}
        described = {f"t{number}": entry for number, entry in enumerate(entries)}
        for hostile in (header, {"__metadata__": header}, metadata | {"a": header}, metadata | described):
            packed = json.dumps(hostile).encode()
            path.write_bytes(len(packed).to_bytes(8, "little") + packed + tail)
            for protection in ("encrypted", "authenticated"):
                assert refused(read, path, protection) in {"format", "key"}

    @pytest.mark.parametrize(
        "packed",
        [b"[" * 100_000, b'{"a":' + b"9" * 10_000 + b"}", b'{"__metadata__":{"a":"\\ud800"}}', b"\xff\xfe{}", b"null"],
    )
    def test_json_that_breaks_parsers_is_refused(self, path, packed) -> None:
        path.write_bytes(len(packed).to_bytes(8, "little") + packed)
        refuse("format", read, path)

    @pytest.mark.parametrize(
        ("kdf", "reason"),
        [
            ("scrypt 1073741824 8 1", "format"),
            ("scrypt 131072 8000 1", "format"),
            ("scrypt 131072 8 1000", "format"),
            ("scrypt 100000 8 1", "format"),
            ("scrypt 0 8 1", "format"),
            ("scrypt -2 8 1", "format"),
            ("scrypt ٣ 8 1", "format"),
            ("scrypt 16 8", "format"),
            ("argon2id 1 1 1", "format"),
            ("hkdf-sha256", "key"),
        ],
    )
    def test_costs_that_a_file_asks_for_are_bounded(self, path, monkeypatch, kdf, reason) -> None:
        path.write_bytes(with_metadata(write(path, passphrase="a"), kdf=kdf))
        monkeypatch.setattr(containers, "Scrypt", None)  # calling it would fail otherwise than by a refusal
        refuse(reason, read, path, passphrase="a")

    def test_a_sparse_file_gets_no_more_than_asked_for(self, path) -> None:
        """Claims of size are held against the caller's limit, and against what memory there is."""
        data, claimed = write(path, "authenticated"), 2**33
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        header["a"] = {"dtype": "U8", "shape": [claimed], "data_offsets": [0, claimed]}
        del header["b"]
        header["tag"]["data_offsets"] = [claimed, claimed + 32]
        packed = json.dumps(header).encode()
        path.write_bytes(len(packed).to_bytes(8, "little") + packed)
        os.truncate(path, 8 + len(packed) + claimed + 32)
        refuse("format", read, path, "authenticated", match="expected at most 1000", max_bytes=1000)
        entry = headers.Entry("a", torch.uint8, (2**60,), 2**60)
        refuse("format", containers._allocate, entry, match="more than can be had")

    def test_identity(self, path) -> None:
        data = write(path)
        refuse("kind", read, path, match="holds 'test', expected 'cache'", kind="cache")
        refuse("format", read, path, "authenticated", match="is 'encrypted', expected authenticated")
        path.write_bytes(with_metadata(data, version="2"))
        refuse("version", read, path, match="version 2, newer than 1; update this package")
        path.write_bytes(with_metadata(data, version="one"))
        refuse("version", read, path)
        path.write_bytes(with_metadata(data, note="another"))
        refuse("key", read, path)

    def test_foreign_files(self, path, tmp_path) -> None:
        torch.save(TENSORS, path)
        refuse("format", read, path, match="no safetensors file")
        save_file(TENSORS, path)
        refuse("format", read, path, match="no file of this package")
        path.write_bytes(b"")
        refuse("format", read, path)
        refuse("format", read, tmp_path, match="not a regular file")
        os.mkfifo(tmp_path / "pipe")
        refuse("format", read, tmp_path / "pipe", match="not a regular file")
        with pytest.raises(FileNotFoundError):
            read(tmp_path / "absent")

    def test_a_check_refuses_before_anything_is_read(self, path, monkeypatch) -> None:
        write(path, "authenticated")

        def check(metadata, entries) -> None:
            assert dict(metadata) == {"note": "public"}
            raise FileRefusedError("model", "not this one")

        monkeypatch.setattr(containers, "_read_authenticated", None)
        refuse("model", read, path, "authenticated", check=check)

    def test_a_file_is_its_owners_and_appears_whole_or_not_at_all(self, path, monkeypatch) -> None:
        data = write(path)
        assert path.stat().st_mode & 0o777 == 0o600

        def fail(descriptor: int) -> None:
            raise OSError("no space left")

        monkeypatch.setattr("os.fsync", fail)
        with pytest.raises(OSError, match="no space left"):
            write(path)
        assert path.read_bytes() == data
        assert os.listdir(path.parent) == [path.name]

    def test_arguments(self, path) -> None:
        for call in (write, read):
            with pytest.raises(ValueError, match="exactly one of key and passphrase"):
                call(path, key=KEY, passphrase="both")
            with pytest.raises(ValueError, match="exactly one of key and passphrase"):
                call(path, key=None)
            with pytest.raises(ValueError, match="key: expected 32 bytes, got 5"):
                call(path, key=b"short")
            with pytest.raises(TypeError, match="passphrase: expected text or bytes, got int"):
                call(path, passphrase=3)
            with pytest.raises(ValueError, match="passphrase: expected at least one character"):
                call(path, passphrase="")
        with pytest.raises(ValueError, match=r"metadata: the names \['kind'\] are the container's own"):
            write_container(path, {}, {"kind": "x"}, kind="test", key=KEY)
        with pytest.raises(ValueError, match="the name tag is the container's own"):
            write_container(path, {"tag": torch.ones(1)}, {}, kind="test", key=KEY, encrypt=False)
        with pytest.raises(TypeError, match="a has dtype torch.complex64"):
            write_container(path, {"a": torch.ones(1) * 1j}, {}, kind="test", key=KEY, encrypt=False)
        assert not path.exists()


def open_session(**options) -> Session:
    options = {"redundant_num": 2, "alp": True, "master_key": MASTER, **options}
    return SCXKeyGenerator(10, 96, 16, **options).open_session(SHAPE, 2)


def one_time_keys(session: Session, count: int = 3) -> list[Tensor]:
    """All one-time keys that a session's next passes draw, as rows."""
    scale = RedundantScale(*(torch.ones(3, 96) for _ in ENCODINGS))
    drawn = []
    for _ in range(count):
        keys = session.draw_token_keys(40, 2, scale, torch.float32)
        drawn += [keys.entry.flatten().double(), torch.stack(keys.redundant).flatten().double()]
        drawn.append(session.take_noise(2, 1, CPU).values().flatten().double())
        drawn.append(session.take_noise(2, 3, CPU).values().flatten().double())
    return drawn


class TestKeys:
    @pytest.mark.parametrize("secret", [{"passphrase": "open sesame"}, {"key": KEY}])
    def test_keys_of_the_session_come_back(self, path, secret) -> None:
        one = open_session(noise_scale=0.1 + 0.2, noise_distribution="normal", decode_start_layers=[0, 1])
        one.newest_save = 7
        save_keys(path, one, **secret)
        loaded = load_keys(path, **secret)
        for name in ("id", "shape", "settings", "batch_size", "newest_save", "protected_layers", "shared_layers"):
            assert getattr(loaded, name) == getattr(one, name), name
        for layer in range(3):
            assert torch.equal(loaded.feature_key(layer, CPU).query, one.feature_key(layer, CPU).query)
            assert torch.equal(loaded.feature_key(layer, CPU).value, one.feature_key(layer, CPU).value)
        assert loaded.derive_key("sealed cache").reveal() == one.derive_key("sealed cache").reveal()
        named = [session.derive_key("sealed cache", branch=one.branch).reveal() for session in (one, loaded)]
        assert named[0] == named[1]

    def test_no_two_holders_of_a_session_draw_the_same_one_time_key(self, path) -> None:
        """The one that saved it and goes on, two loads of its file, and a load of a load's file; used or abandoned."""
        holders = [open_session()]
        one_time_keys(holders[0], 1)
        save_keys(path, holders[0], key=KEY)
        holders += [load_keys(path, key=KEY), load_keys(path, key=KEY)]
        save_keys(path, holders[1], key=KEY)
        holders.append(load_keys(path, key=KEY))
        drawn = [one_time_keys(holder) for holder in holders]
        for place in range(len(drawn[0])):
            same_place = [keys[place] for keys in drawn]
            assert all(not torch.equal(a, b) for i, a in enumerate(same_place) for b in same_place[:i])
        noise = torch.cat([holder.take_noise(2, 1, CPU).steps[:, 0] for holder in holders for _ in range(70)])
        assert len(noise.unique(dim=0)) == len(noise)
        assert len({holder.branch for holder in holders}) == 4

    def test_neither_secret_nor_master_key_is_in_the_file_or_in_words(self, path, caplog) -> None:
        caplog.set_level(logging.DEBUG)
        one = open_session()
        save_keys(path, one, passphrase="open sesame")
        loaded = load_keys(path, passphrase="open sesame")
        hidden = [MASTER, one._secret.reveal(), b"open sesame"]
        data = path.read_bytes()
        assert not any(secret in data or secret.hex().encode() in data for secret in hidden)
        with pytest.raises(FileRefusedError) as raised:
            load_keys(path, passphrase="close sesame")
        text = caplog.text + repr(loaded) + str(loaded) + repr(raised.value)
        text += repr(read_container(path, kind="session", passphrase="open sesame"))
        assert not any(secret.hex() in text or str(secret) in text for secret in [*hidden, b"close sesame"])
        assert "sesame" not in text
        assert "tensor(" not in text
        with pytest.raises(TypeError, match="never pickled"):
            pickle.dumps(loaded)

    def test_a_session_of_another_model_is_refused(self, path, llama) -> None:
        """The model may be plain, encoded, or only its shape."""
        keys = SCXKeyGenerator.for_model(llama)
        with encoded_llama(llama, keys), torch.no_grad():
            session = llama(torch.ones(1, 4, dtype=torch.long, device=llama.device)).past_key_values.session
            save_keys(path, session, key=KEY)
            assert load_keys(path, key=KEY, model=llama).id == session.id
        for model in (llama, llama.model, session.shape):
            assert load_keys(path, key=KEY, model=model).id == session.id
        for other in (tiny_model(layers=4), SHAPE):
            refuse("model", load_keys, path, key=KEY, model=other, match="another model")
        with pytest.raises(TypeError, match="model: expected a model or a ModelShape, got str"):
            load_keys(path, key=KEY, model="llama")

    @quick
    @given(place=st.integers(0, 10**6), mask=st.integers(1, 255))
    def test_an_altered_file_loads_nothing(self, path, place, mask) -> None:
        save_keys(path, open_session(), key=KEY)
        data = bytearray(path.read_bytes())
        data[place % len(data)] ^= mask
        path.write_bytes(data)
        assert refused(load_keys, path, key=KEY, model=SHAPE) in {"format", "version", "kind", "model", "key"}

    def test_other_kinds_are_refused(self, path) -> None:
        write(path)
        refuse("kind", load_keys, path, key=KEY, match="holds 'test', expected 'session'")
        write(path, "authenticated", kind="session")
        refuse("format", load_keys, path, key=KEY)

    @pytest.mark.parametrize(
        ("name", "value", "match"),
        [
            ("session", "00", "session"),
            ("session", "A" * 32, "session"),
            ("model", "another", "fingerprint"),
            ("batch_size", "0", "batch_size"),
            ("batch_size", "9" * 5000, "header describes no session"),
            ("newest_save", "-1", "newest_save"),
            ("shape", "[]", "shape"),
            ("shape", "[" * 100_000, "header describes no session"),
            ("shape.num_layers", 0, "num_layers"),
            ("shape.num_layers", 2**40, "num_layers"),
            ("shape.num_heads", 5, "num_heads"),
            ("shape.head_dim", "16", "head_dim"),
            ("shape.first_norm_rms", float("nan"), "expected a number, got NaN"),
            ("shape.fingerprint", 3, "fingerprint"),
            ("settings.redundant_num", -1, "redundant_num"),
            ("settings.alp", 1, "alp"),
            ("settings.noise_scale", float("inf"), "expected a number, got Infinity"),
            ("settings.noise_distribution", "uniform", "noise_distribution"),
            ("settings.noise_distribution", [], "noise_distribution"),
            ("settings.start_layers", [1], "start_layers"),
            ("settings.start_layers", [0, 1, 2], "end_layers"),
            ("settings.start_layers", "0", "start_layers"),
            ("settings.end_layers", [1], "end_layers"),
            ("settings.unknown", 1, "settings"),
        ],
    )
    def test_what_a_holder_of_the_key_wrote_wrongly_is_refused(self, path, name, value, match) -> None:
        save_keys(path, open_session(), key=KEY)
        written = read_container(path, kind="session", key=KEY)
        where, _, inner = name.partition(".")
        metadata = dict(written.metadata)
        metadata[where] = json.dumps(json.loads(metadata[where]) | {inner: value}) if inner else value
        write_container(path, written.tensors, metadata, kind="session", key=KEY)
        refuse("format", load_keys, path, key=KEY, match=match)

    @pytest.mark.parametrize("tensors", [{}, {"secret": torch.ones(32)}, {"secret": torch.ones(31, dtype=torch.uint8)}])
    def test_a_wrong_payload_is_refused(self, path, tensors) -> None:
        save_keys(path, open_session(), key=KEY)
        metadata = read_container(path, kind="session", key=KEY).metadata
        write_container(path, tensors, metadata, kind="session", key=KEY)
        refuse("format", load_keys, path, key=KEY, match="expected the tensor secret of 32 bytes")

    def test_arguments(self, path) -> None:
        with pytest.raises(TypeError, match="session: expected a Session, got bytes"):
            save_keys(path, MASTER, key=KEY)
        with pytest.raises(ValueError, match="exactly one of key and passphrase"):
            save_keys(path, open_session())


@pytest.fixture
def encoded(llama):
    return encode_llama(llama, SCXKeyGenerator.for_model(llama, redundant_num=3, alp=True, master_key=MASTER))


@pytest.fixture
def cache(encoded, prompt) -> EncodedCache:
    with torch.no_grad():
        return encoded(prompt(5, 2)).past_key_values


def same(a: DynamicCache, b: DynamicCache) -> bool:
    pairs = zip(a.layers, b.layers, strict=True)
    return all(type(x) is type(y) and torch.equal(x.keys, y.keys) and torch.equal(x.values, y.values) for x, y in pairs)


class TestCache:
    @pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @torch.no_grad()
    def test_a_cache_comes_back_as_it_was_stored(self, path, prompt, family, dtype) -> None:
        """Encoded, of the same kinds of layers, and good for going on; Mistral's window is full and has moved on."""
        model = tiny_model(family, dtype, **({"sliding_window": 6} if family == "mistral" else {}))
        encode_llama(model, SCXKeyGenerator.for_model(model, redundant_num=2))
        cache = model(prompt(9, 2)).past_key_values
        stored = [layer.keys.clone() for layer in cache.layers]
        save_kvcache(path, cache, cache.session)
        with safe_open(path, "pt") as file:
            assert torch.equal(file.get_tensor("layers.1.keys"), stored[1].cpu())
        loaded = load_kvcache(path, cache.session, device=model.device)
        assert same(loaded, cache)
        assert (loaded.session, loaded.get_seq_length(), loaded.rows) == (cache.session, 9, 2)
        assert loaded.get_mask_sizes(1, 0) == cache.get_mask_sizes(1, 0)
        token = prompt(1, 2)
        assert torch.equal(model(token, past_key_values=loaded).logits, model(token, past_key_values=cache).logits)

    @torch.no_grad()
    def test_reordered_rows_keep_their_keys(self, path, encoded, cache) -> None:
        plain = decode_kvcache(cache, cache.session)
        order = torch.tensor([1, 1, 0])
        cache.batch_select_indices(order)
        plain.batch_select_indices(order)
        save_kvcache(path, cache, cache.session)
        loaded = load_kvcache(path, cache.session, device=encoded.device)
        assert loaded.rows == 3
        assert same(decode_kvcache(loaded, cache.session), plain)

    def test_parts_are_saved_together(self, path, cache) -> None:
        """Files of single parts could be mixed from different times."""
        parts = split_kvcache_dynamic(cache, gpu_layers=[1])
        for part in parts:
            with pytest.raises(ValueError, match="one part of a split cache; merge the parts first"):
                save_kvcache(path, part, cache.session)
        save_kvcache(path, merge_kvcache_dynamic(*parts), cache.session)
        assert same(load_kvcache(path, cache.session, device=cache.layers[0].keys.device), cache)

    def test_the_file_holds_no_key(self, path, cache) -> None:
        save_kvcache(path, cache, cache.session)
        data = path.read_bytes()
        for secret in (MASTER, cache.session._secret.reveal(), cache.session.derive_key("cache file").reveal()):
            assert secret not in data
            assert secret.hex().encode() not in data

    def test_a_pickled_cache_is_saved_under_its_session(self, path, cache) -> None:
        save_kvcache(path, pickle.loads(pickle.dumps(cache)), cache.session)
        assert same(load_kvcache(path, cache.session), cache)

    @quick
    @given(place=st.integers(0, 10**6), mask=st.integers(1, 255), cut=st.booleans())
    def test_an_altered_or_truncated_file_loads_nothing(self, path, cache, place, mask, cut) -> None:
        save_kvcache(path, cache, cache.session)
        data, newest = bytearray(path.read_bytes()), cache.session.newest_save
        place %= len(data)
        if cut:
            del data[place:]
        else:
            data[place] ^= mask
        path.write_bytes(data)
        refused(load_kvcache, path, cache.session, at_least=0)
        assert cache.session.newest_save == newest

    @torch.no_grad()
    def test_foreign_files_are_refused_by_name(self, path, encoded, cache, prompt) -> None:
        other = encoded(prompt(5, 2)).past_key_values.session
        save_kvcache(path, cache, cache.session)
        refuse("session", load_kvcache, path, other, match=f"belongs to session '{cache.session_id}', got {other.id}")
        session = cache.session
        same_id = bytes.fromhex(session.id)
        elsewhere = Session(session._secret, session.settings, SHAPE, 2, same_id)
        refuse("model", load_kvcache, path, elsewhere)
        impostor = SCXKeyGenerator.for_session(session).open_session(session.shape, 2, same_id)
        refuse("key", load_kvcache, path, impostor)
        save_keys(path, session, key=KEY)
        refuse("kind", load_kvcache, path, session, match="holds 'session', expected 'cache'")

    def test_old_saves_are_refused_unless_asked_for(self, tmp_path, cache) -> None:
        session, old, new = cache.session, tmp_path / "old", tmp_path / "new"
        keys_before, keys_after = tmp_path / "before", tmp_path / "after"
        save_keys(keys_before, session, key=KEY)
        assert (save_kvcache(old, cache, session), save_kvcache(new, cache, session)) == (1, 2)
        save_keys(keys_after, session, key=KEY)
        refuse("replay", load_kvcache, old, session, match="is save 1 of its session, expected 2 or a newer one")
        refuse("replay", load_kvcache, new, session, at_least=3)
        assert same(load_kvcache(old, session, at_least=0), cache)

        refuse("replay", load_kvcache, old, load_keys(keys_after, key=KEY))
        forgetful = load_keys(keys_before, key=KEY)
        load_kvcache(old, forgetful)
        load_kvcache(new, forgetful)
        refuse("replay", load_kvcache, old, forgetful)
        assert save_kvcache(old, cache, forgetful) == 3

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            (lambda t, m: t.pop("layers.0.keys"), "layers.0.keys"),
            (lambda t, m: t.update(extra=torch.ones(1)), "tensors: expected .* got .*extra"),
            (lambda t, m: t.update({"layers.1.keys": torch.ones(2, 2, 5, 8)}), "layers.1.keys: expected"),
            (lambda t, m: t.update({"layers.1.values": torch.ones(3)}), "layers.1.values: expected"),
            (lambda t, m: t.update({"layers.1.values": t["layers.1.values"].int()}), "layers.1.values: expected"),
            (
                lambda t, m: t.update({f"layers.1.{n}": torch.ones(2, 2, 4, 16) for n in ("keys", "values")}),
                "one length",
            ),
            (lambda t, m: t.update(sequences=torch.tensor([0, 2])), "sequences: expected 0..1"),
            (lambda t, m: t.update(sequences=torch.ones(2)), "sequences: expected torch.int64"),
            (lambda t, m: m.update(layers="[]"), "layers: expected 3"),
            (lambda t, m: m.update(layers="{"), "describes no cache"),
            (lambda t, m: m.update(layers='[{"kind":"round"},{"kind":"full"},{"kind":"full"}]'), "layer 0"),
            (lambda t, m: m.update(layers=SLIDING.replace("8", "1")), "layer 0"),
            (lambda t, m: m.update(layers=SLIDING.replace("9", "4")), "layer 0: 5 tokens"),
            (lambda t, m: m.update(layers=SLIDING.replace("9", "99")), "layer 0: 5 tokens"),
            (lambda t, m: m.update(number="0"), "number"),
            (lambda t, m: m.update(number="x"), "number"),
        ],
    )
    def test_what_the_session_wrote_wrongly_is_refused(self, path, cache, change, match) -> None:
        save_kvcache(path, cache, cache.session)
        file = {"kind": "cache", "key": cache.session.derive_key("cache file")}
        written = read_container(path, protection="authenticated", **file)
        tensors, metadata = dict(written.tensors), dict(written.metadata)
        change(tensors, metadata)
        write_container(path, tensors, metadata, encrypt=False, **file)
        refuse("format", load_kvcache, path, cache.session, match=match)

    def test_arguments(self, path, encoded, cache, prompt) -> None:
        session = cache.session
        with pytest.raises(TypeError, match="cache: expected an encoded cache"):
            save_kvcache(path, decode_kvcache(cache, session), session)
        with pytest.raises(TypeError, match="session: expected a Session, got NoneType"):
            load_kvcache(path, None)
        with torch.no_grad():
            other = encoded(prompt(5, 2)).past_key_values.session
        with pytest.raises(ValueError, match=f"belongs to session {session.id}"):
            save_kvcache(path, cache, other)
        for wrong in (-1, True, "1"):
            with pytest.raises(ValueError, match="at_least: expected a number from 0"):
                load_kvcache(path, session, at_least=wrong)
        empty = copy.deepcopy(cache)
        empty.reset()
        with pytest.raises(ValueError, match="cache: layer 0 holds no tokens"):
            save_kvcache(path, empty, session)
        assert (path.exists(), session.newest_save) == (False, 0)


SLIDING = '[{"kind":"sliding","window":8,"length":9,"records_past":false},{"kind":"full"},{"kind":"full"}]'

CONTINUE = """
import sys
import torch
from tiny import tiny_model
from scx import SCXKeyGenerator, encode_llama, load_keys, load_kvcache

model = tiny_model()
session = load_keys(sys.argv[1], passphrase="open sesame", model=model)
encode_llama(model, SCXKeyGenerator.for_session(session))
cache = load_kvcache(sys.argv[2], session, device=model.device)
ids = torch.tensor([[int(token) for token in sys.argv[3].split()]], device=model.device)
print(model.generate(ids, past_key_values=cache, max_new_tokens=8, do_sample=False)[0].tolist())
"""


@pytest.mark.slow
def test_another_process_continues_token_for_token(tmp_path, encoded, prompt) -> None:
    """One process prefills, generates and saves; one that has only the files and the passphrase goes on."""
    keys, saved, ids = tmp_path / "keys", tmp_path / "cache", prompt(9)
    first = encoded.generate(ids, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    save_kvcache(saved, first.past_key_values, first.past_key_values.session)
    save_keys(keys, first.past_key_values.session, passphrase="open sesame")

    tokens = " ".join(map(str, first.sequences[0].tolist()))
    root = Path(__file__).parents[1]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(root), str(root / "tests"), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-c", CONTINUE, str(keys), str(saved), tokens]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    continued = [int(token) for token in re.findall(r"\d+", done.stdout)]
    assert continued == tiny_model().generate(ids, max_new_tokens=12, do_sample=False)[0].tolist()


@torch.no_grad()
def test_a_loaded_session_goes_on_beside_the_one_that_never_stopped(path, encoded, cache, prompt) -> None:
    """Both continue the conversation in one process, each under its own one-time keys, with the same outcome."""
    save_keys(path, cache.session, key=KEY)
    loaded = load_keys(path, key=KEY, model=encoded)
    save_kvcache(path, cache, loaded)
    twin = load_kvcache(path, loaded, device=encoded.device)
    for step in range(3):
        token = prompt(1 + step, 2, seed=step)
        expected = encoded(token, past_key_values=cache).logits
        torch.testing.assert_close(encoded(token, past_key_values=twin).logits, expected, rtol=1e-4, atol=1e-4)
    assert twin.session is loaded
    assert cache.session is not loaded
