"""Key material shows nowhere: not in objects and what prints, copies or pickles them, nor in errors. It is wiped."""

import copy
import dataclasses
import gc
import hashlib
import io
import logging
import multiprocessing
import os
import pickle
import pprint
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import rich
import torch
from key_search import KeySearch, errors_of, frames_below, key_material
from rich.console import Console
from rich.pretty import pretty_repr
from rich.traceback import Traceback
from tiny import tiny_model
from torch import Tensor

import scx.files.container
import scx.files.keyfile
import scx.keystream
import scx_kernels as ops
from scx import SCXKeyGenerator, Session, encode_llama, load_keys, load_kvcache, save_keys, save_kvcache
from scx.devices import CPU
from scx.keystream import KEY_BYTES, Secret
from scx.party.boundary import Boundary
from scx_kernels import sealing
from scx_kernels.hidden import Hidden, WipedBytes, guarded

PASSPHRASE = "correct horse battery staple"  # noqa: S105
FILE_KEY = hashlib.sha256(b"a file key").digest()


class Served:
    """A small model in the middle of a conversation, and what of it must not show."""

    def __init__(self, secure_device: str | None = None, **options: Any) -> None:
        self.model = tiny_model(layers=3).to("cpu")
        settings = {"redundant_num": 3, "alp": True, **options}
        if secure_device is None:
            settings.setdefault("cache_encoding", "sealed")
        self.generator = SCXKeyGenerator.for_model(self.model, **settings)
        encode_llama(self.model, self.generator, secure_device)
        self.outputs = self.step(torch.arange(1, 20)[None])
        self.cache = self.outputs.past_key_values
        self.session: Session = self.cache.session
        self.step(torch.tensor([[5]]), past_key_values=self.cache)
        self.session.derive_key("a use", branch=self.session.branch)

    @torch.no_grad()
    def step(self, ids: Tensor, **options: Any) -> Any:
        return self.model(ids, **options)

    @property
    def material(self) -> dict[str, Any]:
        given = Secret(FILE_KEY), Secret(PASSPHRASE.encode().ljust(KEY_BYTES)[:KEY_BYTES])
        return key_material(self.session, self.generator._master_key, *given)

    @property
    def search(self) -> KeySearch:
        return KeySearch(self.material)

    @property
    def objects(self) -> dict[str, Any]:
        """All that a user can hold."""
        session, layer = self.session, self.cache.layers[0]
        token_keys = session.draw_token_keys(40, 1, self.model.model._scx.scale, torch.float32)
        return {
            "generator": self.generator, "session": session, "branch": session.one_time, "cache": self.cache,
            "outputs": self.outputs, "model": self.model, "encoding": self.model.model._scx, "secret": session._secret,
            "stream": session._stream, "feature key": session.feature_key(0, CPU), "token keys": token_keys,
            "row key": token_keys.layers()[0].attention, "layer keys": token_keys.layers()[0],
            "residual key": token_keys.residual, "noise": session.take_noise(1, 2, CPU),
            "pass keys": session.one_time.open_pass(9, 1, self.model.model._scx.scale, torch.float32, CPU),
            "sealing": session.sealing(0, layer.writes, session.branch), "kept": next(iter(session._kept.values())),
        }  # fmt: skip


@pytest.fixture
def served() -> Served:
    return Served()


def inspected(x: object) -> str:
    text = io.StringIO()
    with warnings.catch_warnings(action="ignore"):  # it looks at what torch advises against
        rich.inspect(x, console=Console(file=text, width=300), private=True, dunder=True, methods=True)
    return text.getvalue()


def printed(x: object) -> str:
    """An object in every way that shows values."""
    shown = [repr(x), str(x), f"{x}", "%s" % (x,), pprint.pformat(x), pprint.pformat([x]), pretty_repr(x)]  # noqa: UP031
    shown += [inspected(x), inspected([x]), repr(dir(x))]
    if hasattr(x, "__dict__"):
        shown += [repr(vars(x)), pprint.pformat(vars(x)), pretty_repr(vars(x), max_length=None, max_string=None)]
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        shown += [repr({f.name: getattr(x, f.name) for f in dataclasses.fields(x)})]
    return "\n".join(shown)


class TestObjects:
    def test_nothing_of_a_key_is_within_reach(self, served) -> None:
        """From all that a user holds, down to the one kind of object that hides it."""
        assert len(served.material) > 20
        assert served.search.find(served.objects.values()) == set()

    def test_in_the_split_placement(self) -> None:
        served = Served("cpu")
        held = [served.generator, served.session, served.model, served.outputs]
        assert served.search.find(held) == set()
        assert served.search.shown("\n".join(map(printed, held))) == set()

    @pytest.mark.slow
    def test_nothing_prints_one(self, served, caplog) -> None:
        caplog.set_level(1)
        served.step(torch.arange(1, 9)[None])
        search = served.search
        for name, x in served.objects.items():
            logging.getLogger("scx").warning("%s %r", x, x)
            assert (name, search.shown(printed(x))) == (name, set())
        assert search.shown(caplog.text) == set()

    @pytest.mark.parametrize(
        "leave", [pickle.dumps, lambda x: torch.save(x, io.BytesIO()), lambda x: pickle.dumps({"held": [x]})]
    )
    def test_nothing_that_holds_one_is_pickled(self, served, leave) -> None:
        free = {"cache", "outputs"}
        for name, x in served.objects.items():
            if name not in free:
                with pytest.raises(TypeError, match="key|secret"):
                    leave(x)
        assert served.search.find([pickle.dumps(served.objects[name]) for name in free]) == set()

    def test_a_refusal_to_pickle_names_what_it_is(self, served) -> None:
        for name in ("sealing", "feature key"):
            x = served.objects[name]
            for leave in (pickle.dumps, copy.copy, copy.deepcopy, lambda x: x.__getstate__()):
                with pytest.raises(TypeError, match=f"{type(x).__name__} holds key material"):
                    leave(x)

    def test_no_dictionary_is_made_of_one(self, served) -> None:
        for x in served.objects.values():
            if isinstance(x, Hidden):
                for read in (vars, dataclasses.asdict, dict, list):
                    with pytest.raises(TypeError):
                        read(x)

    def test_no_process_is_sent_one(self, served) -> None:
        process = multiprocessing.get_context("spawn").Process(target=print, args=(served.session,))
        with pytest.raises(TypeError, match="a session holds keys and is never pickled"):
            process.start()

    def test_copies_of_caches_go_on_as_before(self, served) -> None:
        twin = copy.deepcopy(served.cache)
        expected = served.step(torch.tensor([[7]]), past_key_values=twin).logits
        assert torch.allclose(
            served.step(torch.tensor([[7]]), past_key_values=served.cache).logits, expected, atol=1e-4
        )
        assert pickle.loads(pickle.dumps(served.cache)).session_id == served.session.id


def plants(material: dict[str, Any]) -> dict[str, Any]:
    """Key material where it does not belong."""
    secret, index = material["session's secret"], material["query of layer 0"]
    words = torch.frombuffer(bytearray(secret), dtype=torch.int32)

    def closure() -> bytes:
        return secret

    return {
        "bytes": secret, "in a longer text": b"-" + secret + b"-", "hexadecimal": secret.hex(),
        "a buffer": memoryview(secret),
        "numbers": list(secret), "words": words, "wider words": words.long(), "a word": words.tolist()[3],
        "a view of words": torch.cat((words, words))[4:12], "in a closure": closure,
        "in a container": {"a": [{secret}]},
        "a permutation": index, "a narrower one": index.int(), "a list of it": index.tolist(),
        "among others": torch.stack((index.flip(0), index)), "kept keystream": material["kept keystream 0"],
        "noise": material["noise of layer 0"],
    }  # fmt: skip


class TestTheSearch:
    """It finds what is planted; else all above would say nothing."""

    def test_in_an_object(self, served) -> None:
        search, unseen = served.search, []
        for name, leak in plants(served.material).items():
            served.session.leak = leak
            unseen += [name] if not search.find([served.cache]) else []
            del served.session.leak
        assert unseen == []
        assert search.find([served.cache]) == set()

    @pytest.mark.slow
    def test_in_what_is_printed(self, served) -> None:
        search = served.search
        hidden = {"a buffer", "in a closure"}
        unseen = [name for name, leak in plants(served.material).items() if not search.shown(printed([leak]))]
        assert set(unseen) == hidden

    def test_in_the_frames_of_an_error(self, served) -> None:
        search, material = served.search, served.material

        def fails(leak: object) -> None:
            raise RuntimeError("broken")

        for name, leak in plants(material).items():
            with pytest.raises(RuntimeError) as raised:
                fails(leak)
            frame = frames_below(raised.value, __file__ + "'s nobody")[-1]
            assert search.find([frame.f_locals]), name
        assert search.shown(as_text(raised.value))


def as_text(error: BaseException) -> str:
    """An error with its lines and local variables, as loggers and test runners print it."""
    lines = traceback.TracebackException.from_exception(error, capture_locals=True).format()
    return "\n".join([*lines, *(f"{each!r} {each.args}" for each in errors_of(error))])


def as_rich_text(error: BaseException) -> str:
    text = io.StringIO()
    told = {"show_locals": True, "locals_max_length": None, "locals_max_string": None, "extra_lines": 0}
    Console(file=text, width=400).print(Traceback.from_exception(type(error), error, error.__traceback__, **told))
    return text.getvalue()


def broken(*args: Any, **options: Any) -> Any:
    raise MemoryError("broken")


def breaking(served: Served, where: Any, name: str, then: Callable[[Served], Any]) -> None:
    with patch.object(where, name, broken):
        then(served)


def one_token(served: Served) -> Any:
    return served.step(torch.tensor([[3]]), past_key_values=served.cache)


def prefill(served: Served) -> Any:
    return served.step(torch.arange(1, 12)[None])


def unkept_token(served: Served) -> None:
    with patch.object(served.generator, "keep_keystream", False):
        breaking(served, sealing, "cipher_memory", one_token)


def wrong_passphrase(served: Served) -> None:
    with patch.object(scx.files.container, "SCRYPT", (2, 8, 1)):
        save_keys("session.keys", served.session, passphrase=PASSPHRASE)
    load_keys("session.keys", passphrase=PASSPHRASE + "!")


def behind_decryption(served: Served) -> None:
    save_keys("session.keys", served.session, key=FILE_KEY)
    breaking(served, scx.files.keyfile, "_read_shape", lambda served: load_keys("session.keys", key=FILE_KEY))


def while_writing(served: Served) -> None:
    with patch.object(scx.files.container, "SCRYPT", (2, 8, 1)):
        breaking(
            served,
            os,
            "fsync",
            lambda served: save_keys("x", served.session, passphrase=PASSPHRASE),
        )


def of_another_session(served: Served) -> None:
    save_kvcache("a.cache", served.cache, served.session)
    load_kvcache("a.cache", prefill(served).past_key_values.session)


def sealing_of(served: Served, **changed: Any) -> ops.Sealing:
    return served.session.sealing(0, served.cache.layers[0].writes, served.session.branch).replace(**changed)


FAILURES: dict[str, Callable[[Served], Any]] = {
    "the cipher fails in a pass": unkept_token,
    "the cipher fails as a prompt is sealed": lambda served: breaking(served, sealing, "cipher_memory", prefill),
    "the key stream fails in a prefill": lambda served: breaking(served, scx.keystream, "Cipher", prefill),
    "a draw fails behind the key stream": lambda served: breaking(served, Tensor, "argsort", prefill),
    "keys fail as they are put together": lambda served: breaking(served, Tensor, "scatter_", prefill),
    "noise fails": lambda served: breaking(served, scx.keystream.KeyStream, "laplace", prefill),
    "a block fails": lambda served: breaking(served, served.model.model.layers[1].mlp, "forward", prefill),
    "a block fails at a token": lambda served: breaking(served, served.model.model.layers[1].mlp, "forward", one_token),
    "attention fails": lambda served: breaking(served, ops, "attention_step", one_token),
    "a request is refused": lambda served: served.step(torch.ones(2, 1).long(), past_key_values=served.cache),
    "no such folder": lambda served: save_keys("no/such/folder", served.session, passphrase=PASSPHRASE),
    "no such folder, with a key": lambda served: save_keys("no/such/folder", served.session, key=FILE_KEY),
    "no such file": lambda served: load_keys("no such file", passphrase=PASSPHRASE),
    "a passphrase and a key": lambda served: load_keys("x", passphrase=PASSPHRASE, key=FILE_KEY),
    "no such argument": lambda served: load_keys("x", passphrase=PASSPHRASE, kye=FILE_KEY),
    "a wrong passphrase": wrong_passphrase,
    "a file fails behind its decryption": behind_decryption,
    "a disk fails as keys are written": while_writing,
    "a cache of another session": of_another_session,
    "no purpose": lambda served: served.session.derive_key(""),
    "no such branch": lambda served: served.session.derive_key("a use", branch="not one"),
    "a master key that is too long": lambda served: SCXKeyGenerator.for_model(
        tiny_model(layers=1), master_key=bytes(served.generator._master_key.reveal()) + b"!"
    ),
    "words of a key that is too long": lambda served: ops.key_words(bytes(served.session._secret.reveal()) + b"!"),
    "a sealing that does not fit": lambda served: ops.unseal(
        served.cache.layers[0].keys, sealing_of(served, rounds=9), is_value=False
    ),
    "a key used where it does not fit": lambda served: served.session.feature_key(0, CPU).decode_cache(
        torch.zeros(1, 2, 3, 5), torch.zeros(1, 2, 3, 5)
    ),
    "streams beyond their counters": lambda served: served.session._stream.permutations("a use", [(2**32, 0, 0)], 9),
    "no scale for redundant rows": lambda served: served.session.draw_token_keys(9, 1, None, torch.float32),
}


def searched(error: BaseException, search: KeySearch) -> set[str]:
    frames = frames_below(error, __file__)
    assert frames, "it comes from the package"
    return search.find([error.args, *(frame.f_locals for frame in frames)]) | search.shown(as_text(error))


@pytest.fixture(scope="module")
def shared() -> Served:
    return Served()


class TestErrors:
    @pytest.mark.parametrize("failure", FAILURES)
    def test_no_frame_has_a_key(self, shared, failure, tmp_path, monkeypatch) -> None:
        """Neither where an error was raised nor on its way, nor of the errors it came from."""
        monkeypatch.chdir(tmp_path)
        with pytest.raises(Exception) as raised:  # noqa: PT011
            FAILURES[failure](shared)
        assert searched(raised.value, shared.search) == set()
        assert PASSPHRASE not in as_text(raised.value).replace(f'"{PASSPHRASE}"', "")

    @pytest.mark.parametrize(
        "failure", ["the cipher fails in a pass", "the key stream fails in a prefill", "a block fails"]
    )
    def test_of_another_holder(self, shared, failure, tmp_path, monkeypatch) -> None:
        """Who loaded the session has a branch of its own, and secrets below it."""
        monkeypatch.chdir(tmp_path)
        save_keys("session.keys", shared.session, key=FILE_KEY)
        save_kvcache("a.cache", shared.cache, shared.session)
        held = copy.copy(shared)
        held.session = load_keys("session.keys", key=FILE_KEY)
        held.cache = load_kvcache("a.cache", held.session)
        one_token(held)
        with pytest.raises(MemoryError) as raised:
            FAILURES[failure](held)
        assert searched(raised.value, held.search) == set()

    @pytest.mark.slow
    @pytest.mark.parametrize("failure", ["the key stream fails in a prefill", "no such folder"])
    def test_as_rich_prints_it(self, shared, failure) -> None:
        with pytest.raises((OSError, MemoryError)) as raised:
            FAILURES[failure](shared)
        text = as_rich_text(raised.value)
        assert "locals" in text
        assert shared.search.shown(text) == set()

    @pytest.mark.parametrize("operation", ["enter", "project_qkv", "attend", "unlock", "encoded_keys"])
    def test_in_the_split_placement(self, operation) -> None:
        """Whichever message fails, in a prefill, as keys are shared, or at a token."""
        served, begin = Served("cpu"), Boundary.begin
        served.cache = prefill(served).past_key_values
        served.session = served.cache.session

        def fails(self: Boundary, name: str, **options: Any) -> Any:
            return broken() if name == operation else begin(self, name, **options)

        raised = []
        for then in (prefill, one_token):
            with patch.object(Boundary, "begin", fails):
                try:
                    then(served)
                except MemoryError as error:
                    raised.append(error)
        assert raised
        for error in raised:
            assert searched(error, served.search) == set()


class TestGuards:
    def test_type_message_and_lines_stay(self) -> None:
        @guarded
        def outer(secret: bytes) -> None:
            try:
                inner(secret + b"!")
            except KeyError as error:
                raise ValueError("what went wrong") from error

        def inner(secret: bytes) -> None:
            raise KeyError("why")

        with pytest.raises(ValueError, match="what went wrong") as raised:
            outer(b"secret")
        text = as_text(raised.value)
        assert 'inner(secret + b"!")' in text
        assert "KeyError: 'why'" in text
        assert "b'secret" not in text

    def test_what_a_caller_was_handling_is_the_callers(self) -> None:
        def of_the_caller(value: int) -> None:
            raise KeyError("earlier")

        @guarded
        def fails() -> None:
            raise ValueError("later")

        def of_the_callers() -> None:
            try:
                of_the_caller(12345)
            except KeyError:
                fails()

        with pytest.raises(ValueError, match="later") as raised:
            of_the_callers()
        assert "value = 12345" in as_text(raised.value)

    def test_groups(self) -> None:
        def member(secret: str) -> ValueError:
            try:
                raise ValueError("one")
            except ValueError as error:
                return error

        @guarded
        def fails() -> None:
            raise ExceptionGroup("several", [member("hunter2")])

        with pytest.raises(ExceptionGroup) as raised:
            fails()
        text = as_text(raised.value)
        assert "one" in text
        assert "secret = " not in text


class TestWiping:
    def test_a_closed_session_has_no_key(self, served) -> None:
        session, writes = served.session, served.cache.layers[0].writes
        feature_key, own = session.feature_key(1, CPU), session.sealing(0, writes, session.branch)
        held = [secret.reveal() for stream in (session._stream, session.one_time.stream)
                for secret in (stream._secret, *stream._purpose_keys.values())]  # fmt: skip
        tensors = [own.key, *(getattr(feature_key, name) for name in feature_key.__slots__)]
        tensors += [words for kept in session._kept.values() for words in kept._words]
        tensors += [ahead.steps for _, ahead, _ in session.one_time._noise_ahead.values()]
        assert len(held) > 6
        assert all(map(any, held))
        assert all(x.any() for x in tensors)
        session.close()
        assert not any(map(any, held))
        assert not any(x.any() for x in tensors)
        session.close()

    def test_a_closed_session_refuses(self, served, tmp_path) -> None:
        session, writes = served.session, served.cache.layers[0].writes
        scale = served.model.model._scx.scale
        session.close()
        refused: list[Callable[[], Any]] = [
            lambda: one_token(served),
            lambda: session.derive_key("a use"),
            lambda: session.feature_key(0, CPU),
            lambda: session.sealing(0, writes, "00" * 16),
            lambda: session.draw_token_keys(4, 1, scale, torch.float32),
            lambda: session.take_noise(1, 1, CPU),
            lambda: session.take_writes(1, 1, CPU),
            lambda: save_kvcache(tmp_path / "a.cache", served.cache, session),
        ]
        for attempt in refused:
            with pytest.raises(RuntimeError, match=f"session {session.id} was closed, and its keys are wiped"):
                attempt()
        with pytest.raises(RuntimeError, match="this secret was wiped"):
            save_keys(tmp_path / "session.keys", session, key=FILE_KEY)
        prefill(served)

    def test_a_closed_generator_opens_no_session(self, served) -> None:
        view = served.generator._master_key.reveal()
        served.generator.close()
        assert not any(view)
        with pytest.raises(RuntimeError, match="its session or key generator was closed"):
            prefill(served)
        one_token(served)

    def test_what_nobody_holds_is_wiped(self, monkeypatch) -> None:
        """Of a session that is dropped: its secrets, purpose keys, cipher keys and kept keystream."""
        served = Served()
        held = {bytes(value) for value in served.material.values() if isinstance(value, bytes)}
        kept = [words for store in served.session._kept.values() for words in store._words]
        gone: list[tuple[bytes, bytes]] = []
        wipe = WipedBytes.__del__

        def spied(self: WipedBytes) -> None:
            before = bytes(self)
            wipe(self)
            gone.append((before, bytes(self)))

        monkeypatch.setattr(WipedBytes, "__del__", spied)
        given = {FILE_KEY, PASSPHRASE.encode().ljust(KEY_BYTES)[:KEY_BYTES]}
        del served
        gc.collect()
        assert held - given <= {before for before, _ in gone}
        assert not any(any(after) for _, after in gone)
        assert not any(words.any() for words in kept)

    def test_a_view_keeps_a_secret_alive(self) -> None:
        view = Secret(FILE_KEY).reveal()
        words = ops.key_words(FILE_KEY)[2:]
        assert bytes(view) == FILE_KEY
        assert words.numpy().tobytes() == FILE_KEY[8:]
        with pytest.raises(TypeError, match="read-only"):
            view[0] = 1

    def test_secrets_compare_by_their_bytes(self) -> None:
        one, same, other = Secret(FILE_KEY), Secret(bytearray(FILE_KEY)), Secret(bytes(KEY_BYTES))
        assert one == same != other
        assert one != FILE_KEY
        one.wipe()
        assert one != same
        assert one == one
        assert repr(one) == "Secret(wiped)"
        with pytest.raises(TypeError, match="unhashable"):
            hash(same)


@pytest.fixture(autouse=True)
def _files_stay_where_they_belong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
