"""Where files may be written and from where they are read: nothing special is replaced, waited for or believed, and a
hostile file costs a header, not what it claims."""

import io
import json
import os
import socket
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from scx import (
    FileRefusedError,
    SCXKeyGenerator,
    load_keys,
    load_kvcache,
    load_shared_keys,
    save_keys,
    save_kvcache,
    save_shared_keys,
)
from scx.architecture import model_shape
from scx.files import container as containers
from scx.files import disk
from scx.files.container import read_container, write_container
from tests.golden import make
from tests.golden.wrong_files import Parts
from tests.tiny import tiny_model

KEY = bytes(range(32))
SESSION = make.open_session()
CACHE = make.encoded_cache(SESSION)
PROTECTED = pytest.mark.parametrize("encrypt", [True, False], ids=["encrypted", "authenticated"])

SAVE: dict[str, Callable[[Path], Any]] = {
    "keys": lambda path: save_keys(path, SESSION, key=KEY),
    "cache": lambda path: save_kvcache(path, CACHE, SESSION),
    "shared keys": lambda path: save_shared_keys(path, make.SHARED, key=KEY),
    "container": lambda path: write_container(path, {"a": torch.ones(3)}, {}, kind="test", key=KEY),
}
LOAD: dict[str, Callable[[Path], Any]] = {
    "keys": lambda path: load_keys(path, key=KEY),
    "cache": lambda path: load_kvcache(path, SESSION, at_least=0),
    "shared keys": lambda path: load_shared_keys(path, key=KEY),
    "container": lambda path: read_container(path, kind="test", key=KEY),
}
KINDS = pytest.mark.parametrize("kind", SAVE)


@pytest.fixture(params=["directory", "pipe", "socket", "device", "link to a directory", "link to a pipe", "terminal"])
def special(request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Something that is no regular file, or a link to it."""
    if request.param == "device":
        return Path("/dev/zero")
    if request.param == "terminal":
        return Path("/dev/tty")
    place = tmp_path / "there"
    if "directory" in request.param:
        place.mkdir()
    elif "pipe" in request.param:
        os.mkfifo(place)
    else:
        monkeypatch.chdir(tmp_path)  # a socket's name is short
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(place.name)
    if "link" in request.param:
        (tmp_path / "link").symlink_to(place)
        return tmp_path / "link"
    return place


def listing(folder: Path) -> list[tuple[str, int, int]]:
    return sorted((x.name, x.lstat().st_mode, x.lstat().st_ino) for x in folder.iterdir())


class TestSaving:
    @KINDS
    def test_nothing_special_is_replaced(self, tmp_path, special, kind, monkeypatch) -> None:
        """It is refused before anything is written, in its place or beside it."""
        monkeypatch.setattr(containers, "atomic_file", None)
        before = listing(tmp_path)
        with pytest.raises(ValueError, match=r"path: expected a new name or that of a regular file, got '.*"):
            SAVE[kind](special)
        assert listing(tmp_path) == before

    @KINDS
    @pytest.mark.parametrize("is_there", [True, False])
    def test_a_link_stays_and_what_it_names_is_written(self, tmp_path, kind, is_there) -> None:
        """Through a link of a link, in the folder of what it names, where temporary files lie too."""
        (tmp_path / "elsewhere").mkdir()
        target, first, second = tmp_path / "elsewhere" / "target", tmp_path / "first", tmp_path / "second"
        if is_there:
            target.write_bytes(b"old")
        first.symlink_to(Path("elsewhere") / "target")
        second.symlink_to(first)
        SAVE[kind](second)
        assert second.is_symlink()
        assert first.is_symlink()
        assert not target.is_symlink()
        assert target.stat().st_mode & 0o777 == 0o600
        LOAD[kind](second)
        assert sorted(os.listdir(tmp_path)) == ["elsewhere", "first", "second"]
        assert os.listdir(tmp_path / "elsewhere") == ["target"]

    def test_folders_that_are_links_are_ordinary(self, tmp_path) -> None:
        (tmp_path / "real").mkdir()
        (tmp_path / "folder").symlink_to("real")
        SAVE["keys"](tmp_path / "folder" / "keys")
        assert os.listdir(tmp_path / "real") == ["keys"]

    def test_a_circle_of_links_is_an_error(self, tmp_path) -> None:
        (tmp_path / "a").symlink_to("b")
        (tmp_path / "b").symlink_to("a")
        before = listing(tmp_path)
        for call in (SAVE["keys"], LOAD["keys"]):
            with pytest.raises(OSError, match="symbolic links"):
                call(tmp_path / "a")
        assert listing(tmp_path) == before

    def test_other_names_of_an_old_file_keep_it(self, tmp_path) -> None:
        """A hard link is a backup as often as not: a save replaces one name, and writes over nothing."""
        path, backup = tmp_path / "keys", tmp_path / "backup"
        SAVE["keys"](path)
        old = path.read_bytes()
        os.link(path, backup)
        SAVE["keys"](path)
        assert backup.read_bytes() == old
        assert path.read_bytes() != old

    def test_a_failure_behind_a_link_leaves_what_was_there(self, tmp_path, monkeypatch) -> None:
        target, link = tmp_path / "target", tmp_path / "link"
        target.write_bytes(b"old")
        link.symlink_to(target)

        def fail(descriptor: int) -> None:
            raise OSError("no space left")

        monkeypatch.setattr("os.fsync", fail)
        before = listing(tmp_path)
        with pytest.raises(OSError, match="no space left"):
            SAVE["cache"](link)
        assert (target.read_bytes(), listing(tmp_path)) == (b"old", before)


class TestLoading:
    @KINDS
    def test_nothing_special_is_read_or_waited_for(self, special, kind, monkeypatch) -> None:
        monkeypatch.setattr(disk, "open", None, raising=False)
        with pytest.raises(FileRefusedError, match="not a regular file") as raised:
            LOAD[kind](special)
        assert raised.value.reason == "format"

    def test_a_file_that_becomes_a_pipe_is_refused(self, tmp_path, monkeypatch) -> None:
        """Between the look at its name and its opening."""
        os.mkfifo(tmp_path / "pipe")
        regular = os.stat(make.__file__)
        monkeypatch.setattr(os, "stat", lambda *_: regular)
        with pytest.raises(FileRefusedError, match="not a regular file"):
            LOAD["keys"](tmp_path / "pipe")

    @PROTECTED
    @pytest.mark.parametrize(
        ("change", "words"), [(8, "grew while it was read"), (-8, "truncated"), (-40, "truncated")]
    )
    def test_a_file_that_changes_its_size_while_it_is_read_is_refused(self, tmp_path, encrypt, change, words) -> None:
        path = tmp_path / "file"
        # More than what a reader takes at once with the header.
        write_container(path, {"a": torch.ones(2**16)}, {}, kind="test", key=KEY, encrypt=encrypt)
        protection, size = "encrypted" if encrypt else "authenticated", path.stat().st_size

        def resize(metadata, entries) -> None:
            os.truncate(path, size + change)

        with pytest.raises(FileRefusedError, match=words) as raised:
            read_container(path, kind="test", key=KEY, protection=protection, check=resize)
        assert raised.value.reason == "format"


class Counted(io.FileIO):
    """A file that counts what is read of it."""

    read_bytes = 0

    def readinto(self, buffer: Any) -> int:
        count = super().readinto(buffer) or 0
        Counted.read_bytes += count
        return count

    def readall(self) -> bytes:
        data = super().readall()
        Counted.read_bytes += len(data)
        return data


@pytest.fixture
def costs(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], tuple[int, int]]:
    """Bytes that a call reads of files, and the most memory that it takes, tensors among it."""
    monkeypatch.setattr(
        disk, "open", lambda path, mode, opener: io.BufferedReader(Counted(path, opener=opener)), raising=False
    )
    rooms: list[int] = []

    def allocate(entry: Any) -> torch.Tensor:
        rooms.append(entry.nbytes)
        return torch.empty(entry.shape, dtype=entry.dtype)

    monkeypatch.setattr(containers, "_allocate", allocate)

    def measure(call: Callable[[], Any]) -> tuple[int, int]:
        Counted.read_bytes = 0
        rooms.clear()
        tracemalloc.start()
        try:
            call()
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        return Counted.read_bytes, peak + sum(rooms)

    return measure


def refusal(call: Callable[[], Any], reason: str = "format", match: str | None = None) -> Callable[[], None]:
    def expect() -> None:
        with pytest.raises(FileRefusedError, match=match) as raised:
            call()
        assert raised.value.reason == reason

    return expect


def sparse(path: Path, right: Path, size: int, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A file of `size` bytes and almost none on disk, whose header is a right one but for `change`."""
    parts = Parts.of(right.read_bytes())
    change(parts.header)
    path.write_bytes(Parts(parts.header, b"").pack())
    with open(path, "r+b") as file:
        start = file.seek(0, os.SEEK_END)
        file.truncate(start + size)
    assert path.stat().st_blocks * 512 < 2**21
    return path


def longer_cache(tokens: int) -> Callable[[dict[str, Any]], int]:
    """A header of the golden cache with so many tokens in its layers; the bytes of its tensors are returned."""

    def change(header: dict[str, Any]) -> int:
        described = json.loads(header["__metadata__"]["layers"])
        for layer in described:
            if "length" in layer:
                layer.update(length=tokens, window=tokens)
        header["__metadata__"]["layers"] = json.dumps(described)
        start = 0
        for name, entry in header.items():
            if name.startswith("layers"):
                entry["shape"][2 if "writes" not in name else 1] = tokens
            if name != "__metadata__":
                nbytes = {"BF16": 2, "I64": 8, "U8": 1}[entry["dtype"]]
                for size in entry["shape"]:
                    nbytes *= size
                entry["data_offsets"] = [start, start + nbytes]
                start += nbytes
        return start

    return change


GOLDEN = Path(make.__file__).parent
HUGE = 3 * 2**30
PAYLOAD: dict[str, Any] = {"payload": {"dtype": "U8", "shape": [HUGE], "data_offsets": [0, HUGE]}}


class TestBounds:
    def test_three_gibibytes_of_nothing_cost_no_reading(self, tmp_path, costs) -> None:
        path = tmp_path / "sparse"
        path.touch()
        os.truncate(path, HUGE)
        for load in LOAD.values():
            read, memory = costs(refusal(lambda load=load: load(path)))
            assert read < 2**17
            assert memory < 2**20

    def test_a_header_that_claims_three_gibibytes_costs_a_header(self, tmp_path, costs) -> None:
        """A right one in everything else: of a session, shared keys and a cache of as many tokens as would be."""
        tokens = HUGE // 544 + 1  # of so many bytes in the four layers of the golden cache
        claims: dict[str, tuple[str, Callable[[dict[str, Any]], Any]]] = {
            "keys": ("session", lambda header: header.update(PAYLOAD)),
            "shared keys": ("shared-keys", lambda header: header.update(PAYLOAD)),
            "cache": ("cache", longer_cache(tokens)),
        }
        for kind, (name, change) in claims.items():
            size = change(dict(Parts.of((GOLDEN / f"{name}.scx").read_bytes()).header)) or HUGE
            path = sparse(tmp_path / kind, GOLDEN / f"{name}.scx", size, change)
            read, memory = costs(refusal(lambda kind=kind, path=path: LOAD[kind](path), match="expected at most"))
            assert read < 2**17
            assert memory < 2**20

    def test_a_cache_has_room_for_what_its_model_has_positions_for(self, tmp_path, costs) -> None:
        """The longest is read, and refused for its tag alone; three times that is not. The bound leaves room for
        float32, and golden caches are bfloat16."""
        tokens = SESSION.shape.max_tokens
        for factor, reason, match in ((1, "key", "altered"), (3, "format", "expected at most")):
            change = longer_cache(factor * tokens)
            size = change(Parts.of((GOLDEN / "cache.scx").read_bytes()).header)
            path = sparse(tmp_path / "cache", GOLDEN / "cache.scx", size, change)
            refusal(lambda path=path: load_kvcache(path, SESSION, at_least=0), reason, match)()
        refusal(lambda: load_kvcache(path, SESSION, at_least=0, max_bytes=2**40), "key")()

    def test_the_bound_is_the_models(self, tmp_path) -> None:
        """Its positions, or those to which its rotary embeddings are scaled; a loaded session has it from the model."""
        model = tiny_model()
        assert model_shape(model).max_tokens == 256
        model.config.rope_parameters |= {"factor": 4.0, "original_max_position_embeddings": 200}
        assert model_shape(model).max_tokens == 800
        shape = model_shape(model)
        save_keys(tmp_path / "keys", SCXKeyGenerator.for_model(model).open_session(shape, 2), key=KEY)
        assert load_keys(tmp_path / "keys", key=KEY).shape.max_tokens == 2**17
        assert load_keys(tmp_path / "keys", key=KEY, model=model).shape.max_tokens == 800
        assert load_keys(tmp_path / "keys", key=KEY).shape == shape

    def test_what_is_no_cache_of_the_session_is_refused_before_it_is_read(self, costs, tmp_path) -> None:
        """One dimension of one tensor is another: nothing of the data is looked at."""
        path = tmp_path / "cache"
        changes: list[Callable[[dict[str, Any]], Any]] = [
            lambda header: header["layers.0.keys"].update(shape=[2, 4, 5, 4]),
            lambda header: header["layers.0.keys"].update(dtype="I16"),
            lambda header: header["layers.1.writes"].update(shape=[5, 2]),
            lambda header: header["sequences"].update(shape=[1, 2]),
            lambda header: header.update({"layers.7.keys": header.pop("sequences")}),
        ]
        right = (GOLDEN / "cache.scx").read_bytes()
        for change in changes:
            parts = Parts.of(right)
            change(parts.header)
            order = sorted(parts.header.items(), key=lambda item: item[1].get("data_offsets", [-1])[0])
            path.write_bytes(Parts(dict(order), parts.data).pack())
            _, memory = costs(refusal(lambda: load_kvcache(path, SESSION, at_least=0), match="describes no cache"))
            assert memory < 2**20

    @pytest.mark.parametrize(
        "packed",
        [
            b'{"__metadata__":{},"__metadata__":{}}',
            b'{"__metadata__":{"kind":"a","kind":"a"}}',
            b'{"a":1,"a":1}',
            b'{"__metadata__":{},"a":{"dtype":"U8","shape":[],"shape":[],"data_offsets":[0,1]}}',
            b'{"__metadata__":{},"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,0]}}',
            b'{"__metadata__":{},"a":{"dtype":"U8","shape":[0],"data_offsets":[0,false]}}',
            b'{"__metadata__":{},"a":{"dtype":"U8","shape":[0],"data_offsets":[0.0,0]}}',
            b'{"__metadata__":{},"a":{"dtype":"I64","shape":[281474976710655,65536],"data_offsets":[0,0]}}',
            b'{"__metadata__":{},"a":{"dtype":"U8","shape":[4294967296,4294967296],"data_offsets":[0,0]}}',
            b'{"__metadata__":' + b'{"a":' * 50_000 + b"1" + b"}" * 50_001,
            b'{"__metadata__":{},' + b",".join(b'"%d":{}' % n for n in range(50_000)) + b"}",
        ],
        ids=lambda packed: repr(packed[:60]),
    )
    def test_headers_that_say_two_things_or_none_are_refused(self, tmp_path, costs, packed) -> None:
        path = tmp_path / "file"
        path.write_bytes(len(packed).to_bytes(8, "little") + packed)
        for protection in ("encrypted", "authenticated"):
            load = refusal(lambda p=protection: read_container(path, kind="test", key=KEY, protection=p))
            assert costs(load)[1] < 32 * 2**20
