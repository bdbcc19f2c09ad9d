"""Files and vectors of fixed keys, committed beside the script that made them: what docs/formats.md says is so.

Right files load to the right values, here and by the specification alone; wrong ones are refused for what the manifest
says; and the code of today still writes them byte for byte.
"""

import hmac
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from torch import Tensor

import scx_kernels as ops
from scx import FileRefusedError, Session, decode_kvcache, load_keys, load_kvcache, load_shared_keys
from tests import specification
from tests.golden import make
from tests.golden.wrong_files import WRONG

GOLDEN = Path(__file__).parent / "golden"
MANIFEST = json.loads((GOLDEN / "manifest.json").read_text())
VECTORS = json.loads((GOLDEN / "vectors.json").read_text())
SECRET = specification.session_secret(make.MASTER, make.SESSION_ID)
OTHER_ID = bytes(16)
CPU = torch.device("cpu")


def session(newest_save: int = make.SAVES) -> Session:
    loaded = load_keys(GOLDEN / "session.scx", key=make.KEY)
    loaded.newest_save = newest_save
    return loaded


OPENED: dict[str, Callable[[Path], Any]] = {
    "session": lambda path: load_keys(path, key=make.KEY, model=make.SHAPE),
    "session, another key": lambda path: load_keys(path, key=bytes(32), model=make.SHAPE),
    "session, another model": lambda path: load_keys(path, key=make.KEY, model=make.OTHER_SHAPE),
    "session-passphrase": lambda path: load_keys(path, passphrase=make.PASSPHRASE, model=make.SHAPE),
    "session-passphrase, another one": lambda path: load_keys(path, passphrase="wrong horse", model=make.SHAPE),
    "cache": lambda path: load_kvcache(path, session()),
    "cache, another session": lambda path: load_kvcache(path, make.open_session(OTHER_ID)),
    "cache, newer known": lambda path: load_kvcache(path, session(newest_save=make.SAVES + 1)),
    "shared-keys": lambda path: load_shared_keys(path, key=make.KEY, session_id=make.SESSION_ID.hex()),
    "shared-keys, another session": lambda path: load_shared_keys(path, key=make.KEY, session_id=OTHER_ID.hex()),
}
"""How a file is opened; names are those of the manifest. All but those with a comma open the right file of the name."""


def plain(tensor: tuple[str, list[int], bytes]) -> Tensor:
    """A tensor as the specification reads it."""
    dtype = {"BF16": torch.bfloat16, "I64": torch.int64, "U8": torch.uint8}[tensor[0]]
    return torch.frombuffer(bytearray(tensor[2]), dtype=dtype).view(tensor[1])


class TestRightFiles:
    @pytest.mark.parametrize("name", [name for name in OPENED if "," not in name])
    def test_each_opens_as_the_wrong_ones_are_opened(self, name) -> None:
        """So a refusal below comes from what is wrong with the file."""
        OPENED[name](GOLDEN / f"{name}.scx")

    @pytest.mark.parametrize(
        ("name", "secret"), [("session", {"key": make.KEY}), ("session-passphrase", {"passphrase": make.PASSPHRASE})]
    )
    def test_session(self, name, secret) -> None:
        """Its secret is the one that the master key gives, and what is public says what it is for."""
        path, right = GOLDEN / f"{name}.scx", make.open_session()
        loaded = load_keys(path, **secret)
        for attribute in ("id", "shape", "settings", "batch_size"):
            assert getattr(loaded, attribute) == getattr(right, attribute)
        assert loaded.newest_save == make.SAVES
        assert loaded.derive_key("any").reveal() == right.derive_key("any").reveal()
        file = specification.read(path, **secret)
        assert file.tensors == {"secret": ("U8", [32], SECRET)}
        assert (file.metadata["session"], file.metadata["batch_size"]) == (make.SESSION_ID.hex(), "2")

    def test_cache(self) -> None:
        """Every kind of layer, in an order of sequences that is not the session's, decodes to the plain rows."""
        decoded = decode_kvcache(load_kvcache(GOLDEN / "cache.scx", session()), session())
        for layer, held in enumerate(decoded.layers):
            for is_value, got in enumerate((held.keys, held.values)):
                expected = make.plain_rows(layer, bool(is_value)).flip(0)
                assert torch.equal(got, expected[:, :, -(make.WINDOW - 1) :] if layer > 1 else expected)

    def test_cache_by_the_specification(self) -> None:
        """From the master key alone: the tag, the keystream of sealed layers and the permutations of features."""
        file = specification.read(GOLDEN / "cache.scx", key=specification.session_key(SECRET, "cache file"))
        described, sequences = json.loads(file.metadata["layers"]), file.numbers("sequences")
        assert (file.metadata["number"], sequences) == (str(make.SAVES), [1, 0])
        for layer, about in enumerate(described):
            branch = bytes.fromhex(about["branch"]) if "branch" in about else None
            key = specification.session_key(SECRET, "sealed cache", branch)
            for is_value, name in enumerate(("keys", "values")):
                dtype, shape, data = file.tensors[f"layers.{layer}.{name}"]
                batch, heads, tokens, size = shape
                numbers = file.numbers(f"layers.{layer}.writes") if branch is not None else []
                rows = []
                for row in range(batch * heads * tokens):
                    sequence, head, token = row // (heads * tokens), row // tokens % heads, row % tokens
                    stored = data[2 * size * row : 2 * size * (row + 1)]
                    if branch is not None:
                        number = numbers[sequence * tokens + token]
                        pad = specification.row_keystream(key, number, layer, head, bool(is_value), 2 * size, 20)
                        stored = specification.xor(stored, pad)
                    orders = specification.feature_permutations(SECRET, layer, sequences[sequence], heads, size)
                    features = struct.unpack(f"<{size}H", stored)
                    undone = dict(zip(orders[is_value][head], features, strict=True))
                    rows.append(struct.pack(f"<{size}H", *(undone[feature] for feature in range(size))))
                expected = make.plain_rows(layer, bool(is_value)).flip(0)[:, :, -tokens:]
                assert torch.equal(plain((dtype, shape, b"".join(rows))), expected)

    def test_shared_keys(self) -> None:
        loaded = load_shared_keys(GOLDEN / "shared-keys.scx", key=make.KEY)
        file = specification.read(GOLDEN / "shared-keys.scx", key=make.KEY)
        assert (loaded.session, loaded.model, loaded.blocks) == (make.SHARED.session, make.SHARED.model, (1, 2))
        assert json.loads(file.metadata["blocks"]) == [1, 2]
        for name in ("token_position", "positions"):
            assert torch.equal(getattr(loaded, name), getattr(make.SHARED, name))
            assert torch.equal(plain(file.tensors[name]), getattr(make.SHARED, name))


class TestWrongFiles:
    @pytest.mark.parametrize("wrong", MANIFEST, ids=lambda wrong: Path(wrong["file"]).stem)
    def test_each_is_refused_for_what_the_manifest_says(self, wrong) -> None:
        with pytest.raises(FileRefusedError) as raised:
            OPENED[wrong["opened"]](GOLDEN / wrong["file"])
        assert raised.value.reason == wrong["refusal"], raised.value

    def test_the_manifest_names_every_file_and_every_reason(self) -> None:
        named = [wrong["file"] for wrong in MANIFEST]
        assert sorted(named) == sorted(f"wrong/{path.name}" for path in (GOLDEN / "wrong").iterdir())
        assert len(set(named)) == len(named) == len(WRONG)
        reasons = {"format", "version", "kind", "key", "model", "session", "replay"}
        assert {wrong["refusal"] for wrong in MANIFEST} == reasons
        assert all(wrong["why"] for wrong in MANIFEST)


def test_the_code_of_today_writes_the_same_bytes(tmp_path: Path) -> None:
    """Whoever changes what is written changes these files, and has to say so by a new version."""
    make.write(tmp_path)
    written, committed = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.suffix in (".scx", ".json")}
        for folder in (tmp_path, GOLDEN)
    )
    assert written.keys() == committed.keys()
    assert [name for name in written if written[name] != committed[name]] == []


class TestVectors:
    def test_session_keys(self) -> None:
        keys = VECTORS["keys"]
        secret = specification.session_secret(bytes.fromhex(keys["master_key"]), bytes.fromhex(keys["session_id"]))
        for key in keys["session_keys"]:
            branch = None if key["branch"] is None else bytes.fromhex(key["branch"])
            assert specification.session_key(secret, key["purpose"], branch).hex() == key["key"]
            assert session().derive_key(key["purpose"], branch=key["branch"]).reveal().hex() == key["key"]

    def test_feature_permutations(self) -> None:
        for drawn in VECTORS["keys"]["feature_permutations"]:
            layer, sequence = drawn["layer"], drawn["sequence"]
            both = specification.feature_permutations(SECRET, layer, sequence, 2, 8)
            assert both == (drawn["key"], drawn["value"])
            key = session().feature_key(layer, CPU)
            assert (key.key[sequence].tolist(), key.value[sequence].tolist()) == both

    def test_file_keys(self) -> None:
        """Each opens its file, whatever the way to it."""
        for given in VECTORS["file_keys"]:
            data = (GOLDEN / given["file"]).read_bytes()
            metadata, tensors, start = specification.split(data)
            assert (metadata["salt"], metadata["kdf"]) == (given["salt"], given["kdf"])
            key = bytes.fromhex(given["key"])
            if metadata["protection"] == "encrypted":
                plain = AESGCM(key).decrypt(bytes(12), data[start:], data[:start])
                assert int.from_bytes(plain[:8], "little") < len(plain)
            else:
                assert tensors["tag"][2] == hmac.digest(key, data[:-32], "sha256")

    def test_write_numbers(self) -> None:
        for given in VECTORS["write_numbers"]:
            epoch, sequence, count = given["epoch"], given["sequence"], given["count"]
            assert given["number"] == epoch << 48 | sequence << 32 | count
            assert ops.WriteCounter(epoch, count).take(sequence + 1, 1)[sequence].tolist() == [given["number"]]

    @pytest.mark.parametrize("row", VECTORS["sealed_rows"], ids=lambda row: f"{row['write_number']}-{row['layer']}")
    def test_sealed_rows(self, row) -> None:
        """By a block function in plain Python, by the library where there are 20 rounds, and by this package."""
        key, sealed, data = (bytes.fromhex(row[name]) for name in ("key", "sealed", "plain"))
        place = row["write_number"], row["layer"], row["head"], row["is_value"]
        pad = specification.row_keystream(key, *place, len(data), row["rounds"])
        assert specification.xor(data, pad) == sealed
        assert list(specification.counter_words(*place, len(data))) == row["words"]
        if row["rounds"] == 20:
            assert specification.chacha20_stream(key, tuple(row["words"]), len(data)) == pad
        dtype = getattr(torch, row["dtype"])
        stored = torch.frombuffer(bytearray(sealed), dtype=dtype).view(1, 1, 1, row["head_dim"])
        numbers = torch.tensor([[row["write_number"]]])
        own = ops.Sealing(ops.key_words(key), numbers, row["layer"], row["rounds"], row["head"])
        opened = ops.unseal(stored, own, is_value=row["is_value"])
        assert opened.view(torch.uint8).numpy().tobytes() == data
