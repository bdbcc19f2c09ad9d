"""Files of fixed keys, committed beside the script that made them: what docs/formats.md says is so.

They load to the right values, here and by the specification alone, and the code of today still writes them byte for
byte. What wrong ones are refused for is among the vectors.
"""

import json
import struct
from pathlib import Path

import pytest
import torch
from torch import Tensor

from scx import Session, decode_kvcache, load_keys, load_kvcache, load_shared_keys
from tests import specification, specified_files
from tests.golden import make

GOLDEN = Path(__file__).parent / "golden"
SECRET = specification.session_secret(make.MASTER, make.SESSION_ID)


def session() -> Session:
    loaded = load_keys(GOLDEN / "session.scx", key=make.KEY)
    loaded.newest_save = make.SAVES
    return loaded


def plain(tensor: tuple[str, list[int], bytes]) -> Tensor:
    """A tensor as the specification reads it."""
    dtype = {"BF16": torch.bfloat16, "I64": torch.int64, "U8": torch.uint8}[tensor[0]]
    return torch.frombuffer(bytearray(tensor[2]), dtype=dtype).view(tensor[1])


class TestRightFiles:
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
        file = specified_files.read_session(path.read_bytes(), **secret)
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
        key = specification.session_key(SECRET, "cache file")
        file = specified_files.read((GOLDEN / "cache.scx").read_bytes(), "cache", "authenticated", key=key)
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
        file = specified_files.read_shared_keys((GOLDEN / "shared-keys.scx").read_bytes(), key=make.KEY)
        assert (loaded.session, loaded.model, loaded.blocks) == (make.SHARED.session, make.SHARED.model, (1, 2))
        assert json.loads(file.metadata["blocks"]) == [1, 2]
        for name in ("token_position", "positions"):
            assert torch.equal(getattr(loaded, name), getattr(make.SHARED, name))
            assert torch.equal(plain(file.tensors[name]), getattr(make.SHARED, name))


def test_the_code_of_today_writes_the_same_bytes(tmp_path: Path) -> None:
    """Whoever changes what is written changes these files, and has to say so by a new version."""
    make.write(tmp_path)
    written, committed = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.scx")} for folder in (tmp_path, GOLDEN)
    )
    assert written.keys() == committed.keys()
    assert [name for name in written if written[name] != committed[name]] == []
