"""What tests of sealed storage share: published vectors of the cipher, sealings as caches have them, and bad ones."""

import pytest
import torch
from parity import DEVICE
from torch import Tensor

from scx_kernels import Sealing, key_words

KEY = bytes(range(32))
ROUNDS = (8, 12, 20)

# RFC 8439, section 2.3.2 (block 1), and draft-strombergson-chacha-test-vectors-01, TC1, TC7 and TC8 with 256 bits of
# key (blocks 0 and 1): rounds, key, words 13 to 15 as bytes, first block, keystream.
VECTORS = [
    (20, KEY.hex(), "000000090000004a00000000", 1,
     "10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e"
     "d2826446079faa0914c2d705d98b02a2b5129cd1de164eb9cbd083e8a2503c4e"),
    (8, "00" * 32, "00" * 12, 0,
     "3e00ef2f895f40d67f5bb8e81f09a5a12c840ec3ce9a7f3b181be188ef711a1e"
     "984ce172b9216f419f445367456d5619314a42a3da86b001387bfdb80e0cfe42"
     "d2aefa0deaa5c151bf0adb6c01f2a5adc0fd581259f9a2aadcf20f8fd566a26b"
     "5032ec38bbc5da98ee0c6f568b872a65a08abf251deb21bb4b56e5d8821e68aa"),
    (12, "00" * 32, "00" * 12, 0,
     "9bf49a6a0755f953811fce125f2683d50429c3bb49e074147e0089a52eae155f"
     "0564f879d27ae3c02ce82834acfa8c793a629f2ca0de6919610be82f411326be"
     "0bd58841203e74fe86fc71338ce0173dc628ebb719bdcbcc151585214cc089b4"
     "42258dcda14cf111c602b8971b8cc843e91e46ca905151c02744a6b017e69316"),
    (8, "00112233445566778899aabbccddeeffffeeddccbbaa99887766554433221100", "000000000f1e2d3c4b5a6978", 0,
     "db43ad9d1e842d1272e4530e276b3f568f8859b3f7cf6d9d2c74fa53808cb515"
     "7a8ebf46ad3dcc4b6c7dadde131784b0120e0e22f6d5f9ffa7407d4a21b695d9"
     "c5dd30bf55612fab9bdd118920c19816470c7f5dcd42325dbbed8c57a56281c1"
     "44cb0f03e81b3004624e0650a1ce5afaf9a7cd8163f6dbd72602257dd96e471e"),
    (12, "00112233445566778899aabbccddeeffffeeddccbbaa99887766554433221100", "000000000f1e2d3c4b5a6978", 0,
     "7ed12a3a63912ae941ba6d4c0d5e862e568b0e5589346935505f064b8c2698db"
     "f7d850667d8e67be639f3b4f6a16f92e65ea80f6c7429445da1fc2c1b9365040"
     "e32e50c4106f3b3da1ce7ccb1e7140b153493c0f3ad9a9bcff077ec4596f1d0f"
     "29bf9cbaa502820f732af5a93c49eee33d1c4f12af3b4297af91fe41ea9e94a2"),
    (12, "c46ec1b18ce8a878725a37e780dfb7351f68ed2e194c79fbc6aebee1a667975d", "000000001ada31d5cf688221", 0,
     "1482072784bc6d06b4e73bdc118bc0103c7976786ca918e06986aa251f7e9cc1"
     "b2749a0a16ee83b4242d2e99b08d7c20092b80bc466c87283b61b1b39d0ffbab"
     "d94b116bc1ebdb329b9e4f620db695544a8e3d9b68473d0c975a46ad966ed631"
     "e42aff530ad5eac7d8047adfa1e5113c91f3e3b883f1d189ac1c8fe07ba5a42b"),
]  # fmt: skip


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int32 if x.element_size() == 4 else torch.int16)


def sealed_by(writes: Tensor, layer: int = 5, rounds: int = 8, first_head: int = 0, key: bytes = KEY) -> Sealing:
    return Sealing(key_words(key, DEVICE), writes.to(DEVICE), layer, rounds, first_head)


def scattered(batch: int, tokens: int) -> Tensor:
    """Write numbers as a cache has them after crops and reordering: in no order, high and low."""
    numbers = torch.randint(0, 2**59, (batch, tokens))
    numbers[:, ::3] = torch.arange(numbers[:, ::3].numel()).view(batch, -1) + 2**28 - 2
    return numbers


def check_refusals(seal) -> None:
    """What `seal` must not take, with errors that name it."""
    x = torch.zeros(1, 2, 3, 64, device=DEVICE)
    good = sealed_by(torch.zeros(1, 3, dtype=torch.int64))
    bad = [
        (TypeError, "sealing.key", x, good._replace(key=good.key.long())),
        (ValueError, "sealing.key", x, good._replace(key=good.key[:7])),
        (TypeError, "sealing.writes", x, good._replace(writes=good.writes.int())),
        (ValueError, "sealing.writes", x, good._replace(writes=good.writes[:, :2])),
        (ValueError, "sealing.layer", x, good._replace(layer=2**16)),
        (ValueError, "sealing.first_head", x, good._replace(first_head=2**16 - 1)),
        (ValueError, "sealing.rounds", x, good._replace(rounds=10)),
        (ValueError, "x: ", x[0], good),
        (ValueError, "x: ", x.double(), good),
        (ValueError, "x: .*1024 bytes", x.new_zeros(1, 2, 3, 257), good),
    ]
    for error, message, tensor, own in bad:
        with pytest.raises(error, match=message):
            seal(tensor, own, is_value=True)
    for out in (x.half(), x[:, :1], x[:, :, :1].expand(x.shape)):
        with pytest.raises(ValueError, match="out"):
            seal(x, good, is_value=True, out=out)


def check_refused_streams(random_bits) -> None:
    """The same of `random_bits`."""
    good = {"key": key_words(KEY, DEVICE), "streams": torch.zeros(1, 3, dtype=torch.int64, device=DEVICE), "count": 1}
    for error, name, changed in [
        (TypeError, "streams", {"streams": good["streams"].int()}),
        (ValueError, "streams", {"streams": good["streams"][:, :2]}),
        (ValueError, "count", {"count": -1}),
        (ValueError, "rounds", {"rounds": 7}),
        (ValueError, "key", {"key": good["key"][:4]}),
    ]:
        with pytest.raises(error, match=name):
            random_bits(**good | changed)
