"""Tenants of a server: who they are, their salts and keys, byte for byte; and that what is forgotten stays so."""

import hashlib
import hmac
import json
import logging
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from key_search import KeySearch, errors_of, frames_below, reachable
from test_readme import run_examples

from scx.__main__ import main
from scx.files.refusal import FileRefusedError
from scx.keystream import Secret
from scx.vllm import registry as registries
from scx.vllm.master import read_master, write_master
from scx.vllm.registry import Registry, edited, hash_of, read_registry
from scx.vllm.tenants import MAX_SALT_CHARACTERS, Keyring, Tenant

MASTER = bytes(range(32))
OTHER = bytes(range(1, 33))
SEED = hashlib.sha256(b"a seed").digest()
ID = "00112233445566778899aabbccddeeff"


def hkdf(secret: bytes, salt: bytes, info: bytes) -> bytes:
    """RFC 5869 for 32 bytes, from its text."""
    return hmac.digest(hmac.digest(salt or bytes(32), secret, "sha256"), info + b"\1", "sha256")


def keyring(registry: Path | None = None, master: bytes = MASTER) -> Keyring:
    return Keyring(Secret(master), registry)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "tenants.json"


def add(place: Path, name: str, **options: str) -> str:
    with edited(place) as registry:
        return registry.add(name, **options)


def described(**changes: object) -> dict[str, object]:
    record = {
        "name": "a tenant", "id": ID, "kind": "paid", "credentials": [hash_of("a key")], "versions": {"3": SEED.hex()},
    }  # fmt: skip
    return {"format": "scx tenants", "version": 1, "tenants": [{**record, **changes}]}


def written(place: Path, tree: object) -> Path:
    place.write_text(json.dumps(tree))
    place.chmod(0o600)
    return place


class TestTheFormat:
    """docs/formats.md in a few lines that know nothing of the package."""

    def test_ids(self) -> None:
        key = hkdf(MASTER, b"", b"scx vllm tenant id v1")
        by_key, by_name = keyring().of_credential("sk-1"), keyring().named("sk-1")
        assert by_key == Tenant(hmac.digest(key, b"credential\0sk-1", "sha256")[:16].hex(), "default", (1,))
        assert by_name == Tenant(hmac.digest(key, b"name\0sk-1", "sha256")[:16].hex(), "default", (1,))

    @pytest.mark.parametrize("told", ["", "a conversation", "ключ"])
    def test_salts(self, told: str) -> None:
        key = hkdf(MASTER, b"", b"scx vllm salt v1")
        own = hmac.digest(key, b"told\0" + bytes.fromhex(ID) + told.encode(), "sha256")[:16].hex()
        head = f"scx1.{ID}.{own}"
        tag = hmac.digest(key, b"tag\0" + head.encode(), "sha256")[:16].hex()
        assert keyring().salt(Tenant(ID, "default", (1,)), told) == f"{head}.{tag}"

    def test_keys_without_a_registry(self) -> None:
        own = hkdf(MASTER, b"", b"scx vllm tenant key v1\0" + ID.encode() + b"\x001")
        key = keyring().key(keyring().find(ID), 1, "a purpose")
        assert key.reveal() == hkdf(own, b"", b"a purpose")

    def test_keys_with_one(self, place) -> None:
        ring = keyring(written(place, described()))
        own = hkdf(MASTER, SEED, b"scx vllm tenant key v1\0" + ID.encode() + b"\x003")
        assert ring.key(ring.find(ID), 3, "a purpose").reveal() == hkdf(own, b"", b"a purpose")

    def test_the_registry(self, place) -> None:
        ring = keyring(written(place, described()))
        tenant = Tenant(ID, "paid", (3,))
        assert ring.of_credential("a key") == ring.named("a tenant") == ring.find(ID) == tenant
        assert hash_of("a key") == hashlib.sha256(b"a key").hexdigest()
        assert Registry.from_json(read_registry(place).to_json())["a tenant"] == read_registry(place)["a tenant"]


class TestSalts:
    def test_it_is_as_vllm_takes_it(self) -> None:
        """vllm/entrypoints/generate/base/protocol.py: at most 128 characters, and none of these four."""
        salt = keyring().salt(keyring().named("a"), "x" * 10_000)
        assert len(salt) == 103 <= MAX_SALT_CHARACTERS == 128
        assert not set(salt) & set("@/\\\0")

    def test_it_names_its_tenant(self) -> None:
        ring = keyring()
        for tenant in (ring.of_credential("a"), ring.named("a")):
            assert ring.read_salt(ring.salt(tenant, "told")) == tenant

    def test_what_a_caller_told_parts_salts(self) -> None:
        ring = keyring()
        a, b = ring.named("a"), ring.named("b")
        told = ["", "1", "2", "\0", ring.salt(a), ring.salt(a, "1")]
        assert len({ring.salt(x, each) for x in (a, b) for each in told}) == 2 * len(told)
        assert ring.salt(a, "1") == ring.salt(a, "1")

    def test_it_stays_when_a_key_is_rotated(self, place) -> None:
        add(place, "a")
        ring = keyring(place)
        before = ring.salt(ring.named("a"), "told")
        with edited(place) as registry:
            registry.rotate("a")
        assert ring.named("a").versions == (2, 1)
        assert ring.salt(ring.named("a"), "told") == before

    def test_nothing_else_is_one(self) -> None:
        ring = keyring()
        salt = ring.salt(ring.named("a"))
        digits = [i for i in range(5, len(salt)) if salt[i] != "."]
        altered = [salt[:i] + ("0" if salt[i] != "0" else "1") + salt[i + 1 :] for i in digits]
        others = [None, "", "a salt", salt[:-1], salt + "0", salt + "\n", " " + salt, salt.upper(), "scx2" + salt[4:],
                  salt.replace(".", "-"), salt[:70] + "." + "0" * 32, salt[:-1] + "٣", keyring(master=OTHER).salt(
                      ring.named("a")), 5, salt.encode()]  # fmt: skip
        assert len(altered) == 96
        for each in (*altered, *others):
            assert ring.read_salt(each) is None

    def test_a_text_that_is_none_is_refused(self) -> None:
        with pytest.raises(ValueError, match="told: expected text, got a lone surrogate"):
            keyring().salt(keyring().named("a"), "\ud800")

    def test_of_a_forgotten_tenant(self, place) -> None:
        add(place, "a")
        ring = keyring(place)
        salt = ring.salt(ring.named("a"))
        assert ring.read_salt(salt)
        with edited(place) as registry:
            registry.forget("a")
        assert ring.read_salt(salt) is None


class TestKeys:
    def test_each_is_another(self, place) -> None:
        """By master key, tenant, version and purpose."""
        for name in "ab":
            add(place, name)
        with edited(place) as registry:
            registry.rotate("a")
        keys = []
        for ring in (keyring(place), keyring(place, OTHER), keyring()):
            for tenant in (ring.named("a"), ring.named("b")):
                keys += [ring.key(tenant, v, p).reveal() for v in tenant.versions for p in ("one", "two", "one\0two")]
        assert len({bytes(key) for key in keys}) == len(keys) == 3 * (3 + 3 + 2)

    def test_it_is_the_same_in_every_process(self, place) -> None:
        add(place, "a")
        one, two = keyring(place), keyring(place)
        assert one.key(one.named("a"), 1, "p") == two.key(two.named("a"), 1, "p")
        assert one.key(one.named("a"), 1, "p") is one.key(one.named("a"), 1, "p")

    def test_what_is_gone(self, place) -> None:
        add(place, "a")
        ring = keyring(place)
        tenant = ring.named("a")
        for version in (0, 2, -1):
            with pytest.raises(LookupError, match=f"tenant {tenant.id}: version {version} of its key is gone"):
                ring.key(tenant, version, "p")
        for other in (Tenant(ID, "default", (1,)), Tenant("", "", ())):
            with pytest.raises(LookupError):
                ring.key(other, 1, "p")
        for other, version in ((Tenant(ID, "default", (1,)), 2), (Tenant("no id", "default", (1,)), 1)):
            with pytest.raises(LookupError):
                keyring().key(other, version, "p")

    def test_strangers_do_not_fill_memory(self, monkeypatch) -> None:
        monkeypatch.setattr("scx.vllm.tenants._MAX_KEYS", 10)
        ring = keyring()
        first = bytes(ring.key(ring.named("0"), 1, "p").reveal())
        for i in range(50):
            ring.key(ring.named(str(i)), 1, "p")
        assert len(ring._keys) == 10
        assert ring.key(ring.named("0"), 1, "p").reveal() == first


class TestForgetting:
    def test_its_key_is_gone_in_every_process_that_serves(self, place) -> None:
        add(place, "a")
        credential = add(place, "b")
        ring = keyring(place)
        a, b = ring.named("a"), ring.named("b")
        ring.key(a, 1, "p")
        kept = ring.key(b, 1, "p")
        with edited(place) as registry:
            registry.forget("a")
        assert ring.find(a.id) is ring.named("a") is None
        with pytest.raises(LookupError):
            ring.key(a, 1, "p")
        assert all(name[0] == b.id for name in ring._keys)
        assert ring.of_credential(credential) == b
        assert ring.key(b, 1, "p") == kept

    def test_nothing_of_it_is_in_the_file(self, place) -> None:
        credential = add(place, "a")
        add(place, "b")
        record = read_registry(place)["a"]
        with edited(place) as registry:
            registry.forget("a")
        left = place.read_text()
        for gone in (record.id, hash_of(credential), bytes(record.seeds[1].reveal()).hex()):
            assert gone not in left

    def test_the_same_name_is_another_tenant(self, place) -> None:
        add(place, "a")
        ring = keyring(place)
        before = ring.named("a")
        key = bytes(ring.key(before, 1, "p").reveal())
        with edited(place) as registry:
            registry.forget("a")
            registry.add("a")
        after = ring.named("a")
        assert after.id != before.id
        assert ring.key(after, 1, "p").reveal() != key

    def test_a_key_in_use_is_not_wiped_under_its_user(self, place) -> None:
        """Who still seals with it would seal with zeros."""
        add(place, "a")
        ring = keyring(place)
        view = ring.key(ring.named("a"), 1, "p").reveal()
        before = bytes(view)
        with edited(place) as registry:
            registry.forget("a")
        assert ring.named("a") is None
        assert view == before != bytes(32)

    def test_versions(self, place) -> None:
        add(place, "a")
        ring = keyring(place)
        first = bytes(ring.key(ring.named("a"), 1, "p").reveal())
        with edited(place) as registry:
            assert registry.rotate("a") == 2
        tenant = ring.named("a")
        assert tenant.versions == (2, 1)
        assert ring.key(tenant, 1, "p").reveal() == first
        with edited(place) as registry:
            registry.drop("a", 1)
        assert ring.find(tenant.id).versions == (2,)
        with pytest.raises(LookupError, match="version 1 of its key is gone"):
            ring.key(tenant, 1, "p")
        with edited(place) as registry:
            assert registry.rotate("a") == 3

    @pytest.mark.parametrize("wrong", ["no file", "empty", "readable by all", "another format", "directory"])
    def test_while_the_registry_cannot_be_read_nobody_is_a_tenant(self, place, caplog, wrong) -> None:
        """In a process that had read it as in one that starts, and it is said once."""
        add(place, "a")
        ring = keyring(place)
        tenant = ring.named("a")
        salt = ring.salt(tenant)
        right = place.read_bytes()
        place.unlink()
        if wrong == "directory":
            place.mkdir()
        elif wrong != "no file":
            text = {"empty": b"", "another format": b'{"format": "other"}'}.get(wrong, right)
            place.write_bytes(text)
            place.chmod(0o644 if wrong == "readable by all" else 0o600)
        with caplog.at_level(logging.WARNING):
            for _ in range(3):
                assert ring.named("a") is ring.find(tenant.id) is ring.read_salt(salt) is None
                with pytest.raises(LookupError):
                    ring.key(tenant, 1, "p")
        assert [x.levelname for x in caplog.records] == ["ERROR"]
        assert ring.problem in caplog.text
        assert str(place) in ring.problem
        with pytest.raises((OSError, FileRefusedError)):
            keyring(place)
        place.rmdir() if place.is_dir() else place.unlink(missing_ok=True)
        place.touch(0o600)
        place.write_bytes(right)
        assert ring.named("a") == tenant
        assert ring.problem is None

    def test_a_tightened_mode_is_seen(self, place) -> None:
        add(place, "a")
        ring = keyring(place)
        place.chmod(0o640)
        assert ring.named("a") is None
        place.chmod(0o600)
        assert ring.named("a")

    def test_two_that_edit_at_once(self, place) -> None:
        """Who wrote last did not read before the other wrote: none comes back, none is lost."""
        add(place, "a")
        entered, go = threading.Event(), threading.Event()

        def forget() -> None:
            with edited(place) as registry:
                entered.set()
                go.wait(10)
                registry.forget("a")

        other = threading.Thread(target=forget)
        adding = threading.Thread(target=add, args=(place, "b"))
        other.start()
        assert entered.wait(10)
        adding.start()
        adding.join(0.2)
        assert adding.is_alive()
        go.set()
        other.join(10)
        adding.join(10)
        assert [x.name for x in read_registry(place)] == ["b"]

    def test_an_edit_that_fails_changes_nothing(self, place) -> None:
        add(place, "a")
        before = place.read_bytes(), place.stat().st_ino

        def forget_and_fail() -> None:
            with edited(place) as registry:
                registry.forget("a")
                raise RuntimeError

        with pytest.raises(RuntimeError):
            forget_and_fail()
        assert (place.read_bytes(), place.stat().st_ino) == before

    def test_many_threads_ask_while_it_changes(self, place) -> None:
        add(place, "a")
        ring = keyring(place)
        tenant, stop, seen = ring.named("a"), threading.Event(), []

        def ask() -> None:
            while not stop.is_set():
                try:
                    seen.append(bytes(ring.key(tenant, 1, "p").reveal()))
                except LookupError:
                    seen.append(b"")

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for i in range(5):
            add(place, f"another {i}")
        with edited(place) as registry:
            registry.forget("a")
        gone = ring.named("a")
        stop.set()
        for thread in threads:
            thread.join(10)
        assert gone is None
        assert len(set(seen) - {b""}) == 1


class TestTheMasterKeysFile:
    def test_what_the_command_makes_is_taken(self, tmp_path) -> None:
        path = write_master(tmp_path / "key")
        assert path.stat().st_mode & 0o777 == 0o600
        assert bytes(read_master(path).reveal()) == path.read_bytes()
        assert path.read_bytes() != write_master(tmp_path / "another").read_bytes()
        with pytest.raises(FileExistsError):
            write_master(path)

    def test_a_mounted_secret(self, tmp_path) -> None:
        """As Kubernetes mounts them: a link to a link to a file of mode 0400."""
        held = tmp_path / "..2026_01_01" / "key"
        held.parent.mkdir()
        held.write_bytes(MASTER)
        held.chmod(0o400)
        (tmp_path / "..data").symlink_to(held.parent.name)
        (tmp_path / "key").symlink_to("..data/key")
        assert read_master(tmp_path / "key").reveal() == MASTER

    @pytest.mark.parametrize("size", [0, 16, 31, 33, 64, 2**20])
    def test_another_length(self, tmp_path, size) -> None:
        path = tmp_path / "key"
        path.write_bytes(os.urandom(size))
        path.chmod(0o600)
        with pytest.raises(FileRefusedError, match="python -m scx tenants key FILE") as raised:
            read_master(path)
        assert str(path) in str(raised.value)

    @pytest.mark.parametrize("mode", [0o604, 0o602, 0o640, 0o620, 0o644, 0o777, 0o601])
    def test_others_may_use_it(self, tmp_path, mode) -> None:
        path = tmp_path / "key"
        path.write_bytes(MASTER)
        path.chmod(mode)
        with pytest.raises(PermissionError, match=f"others than its owner may use .*mode {mode:o}.*chmod 600"):
            read_master(path)

    @pytest.mark.parametrize("byte", [0, 255, 65])
    def test_one_byte_over_and_over(self, tmp_path, byte) -> None:
        path = tmp_path / "key"
        path.write_bytes(bytes([byte]) * 32)
        path.chmod(0o600)
        with pytest.raises(FileRefusedError, match="repeats one byte and is no key"):
            read_master(path)

    def test_somebody_elses(self, tmp_path, monkeypatch) -> None:
        path = tmp_path / "key"
        path.write_bytes(MASTER)
        path.chmod(0o600)
        real = os.fstat

        def of_another(descriptor: int) -> os.stat_result:
            fields = list(real(descriptor))
            fields[4] = 4711
            return os.stat_result(fields)

        monkeypatch.setattr(os, "fstat", of_another)
        with pytest.raises(PermissionError, match="belongs to user 4711"):
            read_master(path)

    def test_it_cannot_be_opened(self, tmp_path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(NotADirectoryError, match="SCX_MASTER_KEY_FILE: .*: Not a directory; .python -m scx"):
            read_master(tmp_path / "file" / "key")

    def test_no_regular_file(self, tmp_path) -> None:
        os.mkfifo(tmp_path / "pipe", 0o600)
        for path in (tmp_path, tmp_path / "pipe", Path("/dev/zero")):
            with pytest.raises(FileRefusedError, match="not a regular file"):
                read_master(path)
        with pytest.raises(FileNotFoundError, match="there is no such file; .python -m scx tenants key FILE"):
            read_master(tmp_path / "none")

    def test_the_environment(self, tmp_path, monkeypatch) -> None:
        monkeypatch.delenv("SCX_MASTER_KEY_FILE", raising=False)
        monkeypatch.delenv("SCX_TENANTS_FILE", raising=False)
        with pytest.raises(ValueError, match="SCX_MASTER_KEY_FILE: not set; .*python -m scx tenants key FILE"):
            Keyring.from_environment()
        monkeypatch.setenv("SCX_MASTER_KEY_FILE", str(write_master(tmp_path / "key")))
        assert Keyring.from_environment().named("a")
        monkeypatch.setenv("SCX_TENANTS_FILE", "")
        with pytest.raises(ValueError, match="SCX_TENANTS_FILE: set, and empty"):
            Keyring.from_environment()
        monkeypatch.setenv("SCX_TENANTS_FILE", str(tmp_path / "tenants.json"))
        with pytest.raises(FileNotFoundError, match="SCX_TENANTS_FILE: .*: there is no such file; .*tenants add NAME"):
            Keyring.from_environment()
        add(tmp_path / "tenants.json", "a")
        assert Keyring.from_environment().named("b") is None


WRONG = {
    "another format": {**described(), "format": "scx container"},
    "no version": {k: v for k, v in described().items() if k != "version"},
    "version 0": {**described(), "version": 0},
    "a true version": {**described(), "version": True},
    "another member": {**described(), "note": ""},
    "a list": [],
    "tenants that are no list": {**described(), "tenants": {}},
    "a tenant that is none": {**described(), "tenants": [1]},
    "a tenant with more": described(secret="x"),
    "an empty name": described(name=""),
    "a name with a line": described(name="a\nb"),
    "a long name": described(name="a" * 129),
    "a number as a name": described(name=1),
    "a short id": described(id=ID[1:]),
    "an id in capitals": described(id=ID.upper()),
    "a kind with quotes": described(kind='a"b'),
    "no kind": described(kind=""),
    "a key in clear": described(credentials=["sk-1"]),
    "credentials that are none": described(credentials="a"),
    "no versions": described(versions={}),
    "version zero": described(versions={"0": SEED.hex()}),
    "a version with zeros": described(versions={"01": SEED.hex()}),
    "a version in other digits": described(versions={"٣": SEED.hex()}),
    "a short seed": described(versions={"1": SEED.hex()[2:]}),
    "a seed in capitals": described(versions={"1": SEED.hex().upper()}),
    "a seed with space": described(versions={"1": SEED.hex()[:-1] + " "}),
    "one seed twice": described(versions={"1": SEED.hex(), "2": SEED.hex()}),
    "65 versions": described(versions={str(i + 1): hashlib.sha256(bytes([i])).hexdigest() for i in range(65)}),
    "two of a name": {**described(), "tenants": [*described()["tenants"], *described(id=ID[::-1])["tenants"]]},
    "two of an id": {**described(), "tenants": [*described()["tenants"], *described(name="b")["tenants"]]},
    "a key of two": {
        **described(),
        "tenants": [*described()["tenants"], *described(name="b", id=ID[::-1])["tenants"]],
    },
    "a key twice": described(credentials=[hash_of("a"), hash_of("a")]),
}


class TestHostileRegistries:
    @pytest.mark.parametrize("wrong", WRONG)
    def test_refused_by_name(self, place, wrong) -> None:
        with pytest.raises(FileRefusedError, match="not a registry of tenants") as raised:
            read_registry(written(place, WRONG[wrong]))
        assert raised.value.reason == "format"
        assert str(place) in str(raised.value)
        assert KeySearch({"seed": SEED}).shown(str(raised.value)) == set()

    def test_the_right_one_is_read(self, place) -> None:
        assert [x.name for x in read_registry(written(place, described()))] == ["a tenant"]

    def test_a_newer_one(self, place) -> None:
        with pytest.raises(FileRefusedError, match="newer version") as raised:
            read_registry(written(place, {**described(), "version": 2, "more": 1}))
        assert raised.value.reason == "version"

    @pytest.mark.parametrize(
        "text",
        [
            b"",
            b"\xff",
            b"\xef\xbb\xbf{}",
            b"[" * 100_000,
            b"1" * 5000,
            b"NaN",
            b"1.5",
            b'{"a": 1, "a": 2}',
            b"{",
            b"null",
        ],
    )
    def test_no_such_json(self, place, text) -> None:
        place.write_bytes(text)
        place.chmod(0o600)
        with pytest.raises(FileRefusedError, match="not a registry of tenants"):
            read_registry(place)

    def test_a_member_twice(self, place) -> None:
        """Readers that take one of two would not agree on who is forgotten."""
        text = json.dumps(described()).replace('"kind"', '"id": "' + ID[::-1] + '", "kind"')
        place.write_text(text)
        place.chmod(0o600)
        with pytest.raises(FileRefusedError, match="two members of an object have one name"):
            read_registry(place)

    def test_a_large_one(self, place, monkeypatch) -> None:
        monkeypatch.setattr(registries, "_MAX_BYTES", 1000)
        with pytest.raises(FileRefusedError, match="longer than 1000 bytes"):
            read_registry(written(place, described(name="a" * 1000)))
        place.unlink()

        def add_many() -> None:
            with edited(place) as registry:
                for i in range(10):
                    registry.add(f"tenant {i}")

        with pytest.raises(ValueError, match="would be longer"):
            add_many()
        assert not place.exists()


class TestEditing:
    def test_what_is_refused(self, place) -> None:
        add(place, "a")
        with edited(place) as registry:
            for name in ("", " a", "a\n", "a" * 129, "é"):
                with pytest.raises(ValueError, match="name: expected"):
                    registry.add(name)
            for kind in ("", "A", "9a", "a" * 33):
                with pytest.raises(ValueError, match="kind: expected"):
                    registry.add("b", kind)
            with pytest.raises(ValueError, match="there is a tenant 'a'"):
                registry.add("a")
            with pytest.raises(ValueError, match="version: 1 is the newest of 'a' and writes"):
                registry.drop("a", 1)
            with pytest.raises(ValueError, match=r"version: 'a' has \[1\], got 7"):
                registry.drop("a", 7)
            for act in (registry.forget, registry.rotate, registry.issue):
                with pytest.raises(ValueError, match="there is no tenant 'x'"):
                    act("x")
            for _ in range(63):
                registry.rotate("a")
            with pytest.raises(ValueError, match="64 versions"):
                registry.rotate("a")
        assert len(read_registry(place)["a"].versions) == 64

    def test_api_keys(self, place) -> None:
        first = add(place, "a")
        ring = keyring(place)
        with edited(place) as registry:
            second = registry.issue("a")
        assert ring.of_credential(first) == ring.of_credential(second) == ring.named("a")
        with edited(place) as registry:
            third = registry.issue("a", replace=True)
        assert ring.of_credential(first) is ring.of_credential(second) is None
        assert ring.of_credential(third) == ring.named("a")
        assert first not in place.read_text()
        assert len({first, second, third}) == 3
        assert ring.of_credential("") is ring.of_credential("another") is None

    def test_the_file_is_private(self, place) -> None:
        add(place, "a")
        assert place.stat().st_mode & 0o777 == 0o600
        place.chmod(0o604)
        with pytest.raises(PermissionError):
            add(place, "b")


class TestTheCommand:
    def run(self, capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
        code = main(["tenants", *map(str, words)])
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    def test_a_tenants_life(self, tmp_path, monkeypatch, capsys) -> None:
        monkeypatch.setenv("SCX_TENANTS_FILE", str(tmp_path / "tenants.json"))
        assert self.run(capsys, "key", tmp_path / "master")[0] == 0
        ring = Keyring(read_master(tmp_path / "master"))
        code, credential, _ = self.run(capsys, "add", "alice", "--kind", "paid")
        assert code == 0
        ring = Keyring(read_master(tmp_path / "master"), tmp_path / "tenants.json")
        assert ring.of_credential(credential.strip()) == ring.named("alice")
        assert ring.named("alice").kind == "paid"
        assert self.run(capsys, "rotate", "alice")[:2] == (0, "alice: version 2 writes from now on\n")
        code, listed, _ = self.run(capsys, "list")
        assert listed.splitlines()[1].split() == ["alice", ring.named("alice").id, "paid", "1", "2", "1"]
        assert self.run(capsys, "drop", "alice", 1)[0] == 0
        assert ring.named("alice").versions == (2,)
        assert self.run(capsys, "credential", "alice", "--replace")[0] == 0
        assert ring.of_credential(credential.strip()) is None
        assert self.run(capsys, "forget", "alice")[0] == 0
        assert ring.named("alice") is None

    def test_what_goes_wrong_is_said(self, tmp_path, monkeypatch, capsys) -> None:
        monkeypatch.delenv("SCX_TENANTS_FILE", raising=False)
        assert "SCX_TENANTS_FILE is not set" in self.run(capsys, "list")[2]
        code, out, error = self.run(capsys, "list", "--file", tmp_path / "none")
        assert (code, out) == (1, "")
        assert "there is no such file" in error
        (tmp_path / "key").touch()
        assert self.run(capsys, "key", tmp_path / "key")[0] == 1
        assert (tmp_path / "key").read_bytes() == b""

    def test_it_needs_no_vllm(self) -> None:
        code = "import sys, scx.commands.tenants, scx.vllm.tenants; assert 'vllm' not in sys.modules"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_the_operators_pages_example(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("SCX_MASTER_KEY_FILE", str(write_master(tmp_path / "key")))
    monkeypatch.delenv("SCX_TENANTS_FILE", raising=False)
    names: dict[str, object] = {}
    run_examples("docs/vllm.md", names)
    ring = Keyring.from_environment()
    assert ring.read_salt(names["salt"]) == ring.named("alice")


class TestNothingShows:
    CREDENTIAL = "scx-credential-that-nobody-else-has"

    def search(self, ring: Keyring, place: Path) -> KeySearch:
        secrets = {"master": MASTER, "salt key": bytes(ring._salts.reveal())}
        secrets |= {f"key {name}": bytes(key.reveal()) for name, key in ring._keys.items()}
        if place.exists():
            secrets |= {"seed": bytes(read_registry(place)["a"].seeds[1].reveal())}
        return KeySearch(secrets)

    def test_in_what_a_user_holds(self, place) -> None:
        add(place, "a")
        for ring in (keyring(place), keyring()):
            tenant = ring.named("a")
            ring.key(tenant, 1, "p")
            search = self.search(ring, place)
            held = [ring, tenant, ring.salt(tenant), repr(ring), dir(ring), repr(read_registry(place)["a"])]
            assert search.find(held) == set()
            with pytest.raises(TypeError, match="never pickled"):
                pickle.dumps(ring)

    @pytest.mark.parametrize("fails", ["keyring", "key", "salt", "credential", "registry"])
    def test_in_errors(self, place, monkeypatch, fails) -> None:
        """Neither in their texts, nor in the frames that they leave, nor in the errors that they came from."""
        add(place, "a")
        ring = keyring(place)
        tenant = ring.named("a")
        search = self.search(ring, place)

        def broken(*args: object) -> None:
            raise MemoryError("broken")

        cases: dict[str, tuple[str, Callable[[], object]]] = {
            "keyring": ("_Registered", lambda: keyring(place)),
            "key": ("derive", lambda: ring.key(tenant, 1, "p")),
            "salt": ("HMAC", lambda: ring.salt(tenant)),
            "credential": ("hash_of", lambda: ring.of_credential(self.CREDENTIAL)),
            "registry": ("hash_of", lambda: read_registry(place)),
        }
        name, attempt = cases[fails]
        monkeypatch.setattr(f"scx.vllm.tenants.{name}", broken)
        if fails == "registry":
            place.write_text(place.read_text().replace('"id"', '"id'))
        with pytest.raises((MemoryError, FileRefusedError)) as raised:
            attempt()
        errors = errors_of(raised.value)
        frames = frames_below(raised.value, __file__)
        held = [*errors, *(list(frame.f_locals.values()) for frame in frames)]
        assert search.find(held) == set()
        assert self.CREDENTIAL not in [x for x in reachable(held) if isinstance(x, str)]
