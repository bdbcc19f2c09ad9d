"""Vectors for whoever writes a second implementation: they come out of the specification alone, and of this package."""

import hashlib
import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

import scx_kernels as ops
from scx import FileRefusedError, Session, load_keys, load_kvcache, load_shared_keys
from scx.files.container import read_container
from scx.keystream import KeyStream, Secret, derive
from scx_kernels.chacha import chacha_blocks
from tests import specification, specified_files
from tests.golden import make as golden
from tests.vectors import make

ROOT = Path(__file__).parents[1]
GOLDEN, VECTORS = ROOT / "tests" / "golden", ROOT / "tests" / "vectors"
DTYPES = {"BF16": torch.bfloat16, "I64": torch.int64, "U8": torch.uint8}


def cases(name: str, kind: str | None = None) -> list[Any]:
    """The tests of a file, each with what its group says of all."""
    found = []
    for group in json.loads((VECTORS / f"{name}.json").read_text())["testGroups"]:
        if kind in (None, group["type"]):
            common = {key: value for key, value in group.items() if key not in ("tests", "type")}
            found += [pytest.param({**common, **test}, id=str(test["tcId"])) for test in group["tests"]]
    return found


def of(name: str, kind: str | None = None) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("test", cases(name, kind))


class TestFiles:
    @pytest.mark.parametrize("name", make.FILES)
    def test_the_specification_gives_what_is_committed(self, name) -> None:
        assert (VECTORS / f"{name}.json").read_text() == make.text(name)

    def test_the_specification_knows_nothing_of_this_package(self) -> None:
        code = "import sys, tests.vectors.make; print(*sorted({name.split('.')[0] for name in sys.modules}))"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        loaded = set(done.stdout.split())
        assert "tests" in loaded
        assert not {"scx", "scx_kernels", "bench"} & loaded

    @pytest.mark.parametrize("name", make.FILES)
    def test_fields_are_those_that_the_readme_names(self, name) -> None:
        content = json.loads((VECTORS / f"{name}.json").read_text())
        assert content.keys() == {"algorithm", "generatorVersion", "numberOfTests", "notes", "testGroups"}
        tests = [test for group in content["testGroups"] for test in group["tests"]]
        assert [test["tcId"] for test in tests] == list(range(1, content["numberOfTests"] + 1))
        for test in tests:
            assert test.keys() >= {"tcId", "comment", "result", "flags"}
            assert test["result"] in ("valid", "invalid", "acceptable")
            assert set(test["flags"]) <= content["notes"].keys()

    def test_every_file_of_the_golden_ones_is_a_case(self) -> None:
        named = [case.values[0]["file"] for case in cases("container")]
        assert sorted(named) == sorted(str(path.relative_to(GOLDEN)) for path in GOLDEN.rglob("*.scx"))
        reasons = {case.values[0].get("reason") for case in cases("container")}
        assert reasons == {None, "format", "version", "kind", "key", "model", "session", "replay"}


class TestCipher:
    @of("chacha_block")
    def test_blocks(self, test) -> None:
        key, stream = (bytes.fromhex(test[name]) for name in ("key", "keystream"))
        first, *rest = test["words"]
        blocks = len(stream) // 64
        assert b"".join(specification.chacha_block(key, (first + i, *rest), test["rounds"]) for i in range(blocks)) == (
            stream
        )
        if test["rounds"] == 20:
            assert specification.chacha20_stream(key, tuple(test["words"]), len(stream)) == stream
        signed = struct.unpack(f"<{4 * blocks}i", struct.pack(f"<{4 * blocks}I", *(
            word for i in range(blocks) for word in (first + i, *rest))))  # fmt: skip
        words = torch.tensor(signed, dtype=torch.int32).view(blocks, 4).T
        made = chacha_blocks(ops.key_words(key), words, test["rounds"])
        assert made.contiguous().view(torch.uint8).numpy().tobytes() == stream

    @of("sealed_row")
    def test_rows(self, test) -> None:
        """Of 16-bit and of 32-bit numbers, sealed and unsealed; or refused."""
        key, is_value = bytes.fromhex(test["key"]), test["kind"] == "V"
        for dtype in (torch.bfloat16, torch.float32):
            size, numbers = test["rowBytes"] // dtype.itemsize, torch.tensor([[test["writeNumber"]]])
            own = ops.Sealing(ops.key_words(key), numbers, test["layer"], test["rounds"], test["head"])
            if test["result"] == "invalid":
                with pytest.raises(ValueError, match="expected|leave"):
                    ops.seal(torch.zeros(1, 1, 1, size, dtype=dtype), own, is_value=is_value)
                continue
            plain, sealed = (
                torch.frombuffer(bytearray.fromhex(test[name]), dtype=dtype).view(1, 1, 1, size)
                for name in ("plain", "sealed")
            )
            for got, expected in (
                (ops.seal(plain, own, is_value=is_value), sealed),
                (ops.unseal(sealed, own, is_value=is_value), plain),
            ):
                assert got.view(torch.uint8).equal(expected.view(torch.uint8))

    @of("write_number")
    def test_write_numbers(self, test) -> None:
        def take() -> list[int]:
            counter = ops.WriteCounter(test["epoch"], test["count"])
            return counter.take(test["sequence"] + 1, 1)[test["sequence"]].tolist()

        if test["result"] == "invalid":
            with pytest.raises((ValueError, OverflowError)):
                take()
        else:
            assert take() == [test["writeNumber"]]


def session(session_id: bytes = golden.SESSION_ID, newest_save: int = golden.SAVES) -> Session:
    opened = golden.open_session(session_id)
    opened.newest_save = newest_save
    return opened


class TestKeys:
    @of("hkdf")
    def test_every_key_is_hkdf(self, test) -> None:
        ikm, salt, info = (bytes.fromhex(test[name]) for name in ("ikm", "salt", "info"))
        library = HKDF(hashes.SHA256(), test["size"], salt=salt, info=info).derive(ikm)
        assert library.hex() == test["okm"]
        if len(ikm) == test["size"]:
            assert derive(Secret(ikm), info.decode(), salt).reveal() == library

    @of("hkdf", "SessionSecret")
    def test_session_secret(self, test) -> None:
        opened = session(bytes.fromhex(test["sessionId"]))
        assert opened._secret.reveal().hex() == test["okm"]

    @of("hkdf", "SessionKey")
    def test_session_key(self, test) -> None:
        key = session().derive_key(test["purpose"], branch=test.get("branch"))
        assert key.reveal().hex() == test["okm"]

    @of("hkdf", "BranchSecret")
    def test_branch_secret_is_above_its_streams(self, test) -> None:
        branch = Session(
            session()._secret, session().settings, golden.SHAPE, 2, golden.SESSION_ID, bytes.fromhex(test["branch"])
        ).one_time
        drawn, own = (
            stream.bits("any", [(1, 2, 3)], 8, torch.int32)
            for stream in (branch.stream, KeyStream(Secret(bytes.fromhex(test["okm"]))))
        )
        assert torch.equal(drawn, own)

    @of("hkdf", "StreamKey")
    def test_stream_key_is_that_of_the_cipher(self, test) -> None:
        drawn = KeyStream(session()._secret).bits(test["purpose"], [(5, 6, 7)], 100, torch.int32)
        stream = specification.chacha20_stream(bytes.fromhex(test["okm"]), (0, 5, 6, 7), 400)
        assert drawn.numpy().tobytes() == stream

    @of("feature_permutation")
    def test_feature_permutations(self, test) -> None:
        assert session()._secret.reveal().hex() == test["sessionSecret"]
        key = session().feature_key(test["layer"], torch.device("cpu"))
        got = key.key[test["sequence"]].tolist(), key.value[test["sequence"]].tolist()
        assert got == (test["key"], test["value"])


def load(test: dict[str, Any], path: Path) -> Any:
    """A file as its group says that it is opened, by this package."""
    key = bytes.fromhex(test["key"]) if "key" in test else None
    secret: dict[str, Any] = {"key": key} if key is not None else {"passphrase": test.get("passphrase")}
    if test["kind"] == "session":
        model = {golden.MODEL: golden.SHAPE, golden.OTHER_MODEL: golden.OTHER_SHAPE}[test["model"]]
        return load_keys(path, model=model, **secret)
    if test["kind"] == "shared keys":
        return load_shared_keys(path, session_id=test["session"], **secret)
    return load_kvcache(path, session(bytes.fromhex(test["session"]), test["newestSave"]))


WRONG, RIGHT = (
    [case for case in cases("container") if (case.values[0]["result"] == "invalid") == is_wrong]
    for is_wrong in (True, False)
)


class TestContainers:
    @pytest.mark.parametrize("test", WRONG)
    def test_a_wrong_file_is_refused_for_its_reason(self, test) -> None:
        """By this package, and by the specification."""
        data = (GOLDEN / test["file"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == test["sha256"]
        readers: list[tuple[type[Any], Callable[[], Any]]] = [
            (FileRefusedError, lambda: load(test, GOLDEN / test["file"])),
            (specified_files.Refused, lambda: make.open_file(test, data)),
        ]
        for error, read in readers:
            with pytest.raises(error) as raised:
                read()
            assert raised.value.reason == test["reason"], raised.value

    @pytest.mark.parametrize("test", RIGHT)
    def test_a_right_file_opens_to_what_it_holds(self, test) -> None:
        """As wrong ones are opened: so their refusal comes from what is wrong with them."""
        path = GOLDEN / test["file"]
        load(test, path)
        options: dict[str, Any] = {name: test[name] for name in ("passphrase",) if name in test}
        if "key" in test:
            options["key"] = bytes.fromhex(test["key"])
        if test["kind"] == "cache":
            options = {"key": session().derive_key("cache file"), "protection": "authenticated"}
        tensors = read_container(path, kind=test["kind"], **options).tensors
        assert tensors.keys() == test["tensors"].keys()
        for name, tensor in test["tensors"].items():
            expected = torch.frombuffer(bytearray.fromhex(tensor["bytes"]), dtype=DTYPES[tensor["dtype"]])
            assert torch.equal(tensors[name], expected.view(tensor["shape"]))
