"""The wrong files among the golden ones: right ones with one thing done to them, and what they must be refused for."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

__all__ = ["WRONG", "Wrong"]


@dataclass(frozen=True)
class Parts:
    """A file taken apart: words and tensors of its header, and what follows."""

    header: dict[str, Any]
    data: bytes

    @classmethod
    def of(cls, file: bytes) -> "Parts":
        start = 8 + int.from_bytes(file[:8], "little")
        return cls(json.loads(file[8:start]), file[start:])

    def pack(self, header: bytes | None = None) -> bytes:
        packed = json.dumps(self.header, separators=(",", ":")).encode() if header is None else header
        packed += b" " * (-len(packed) % 8)
        return len(packed).to_bytes(8, "little") + packed + self.data


Change = Callable[[bytes], bytes]


def metadata(**changes: Any) -> Change:
    """Other words in the header; None takes one out."""

    def change(file: bytes) -> bytes:
        parts = Parts.of(file)
        words = parts.header["__metadata__"] | changes
        parts.header["__metadata__"] = {name: word for name, word in words.items() if word is not None}
        return parts.pack()

    return change


def entry(name: str, **changes: Any) -> Change:
    """Another description of a tensor."""

    def change(file: bytes) -> bytes:
        parts = Parts.of(file)
        parts.header[name] = parts.header[name] | changes
        return parts.pack()

    return change


def header(edit: Callable[[dict[str, Any]], Any]) -> Change:
    """Another header: what `edit` returns, or what it leaves of the one it is given."""

    def change(file: bytes) -> bytes:
        parts = Parts.of(file)
        edited = edit(parts.header)
        return replace(parts, header=parts.header if edited is None else edited).pack()

    return change


def packed(text: bytes) -> Change:
    """These bytes for a header."""
    return lambda file: Parts.of(file).pack(text)


def flipped(place: Callable[[bytes], int]) -> Change:
    """One bit of the byte at a place is another."""

    def change(file: bytes) -> bytes:
        altered = bytearray(file)
        altered[place(file)] ^= 1
        return bytes(altered)

    return change


def data_start(file: bytes) -> int:
    return 8 + int.from_bytes(file[:8], "little")


def moved(name: str, by: int) -> Change:
    """A tensor's offsets shifted."""
    return header(lambda h: h[name].update(data_offsets=[offset + by for offset in h[name]["data_offsets"]]))


def renamed(first: str, second: str) -> Change:
    """Two tensors' names exchanged."""
    names = {first: second, second: first}
    return header(lambda h: {names.get(name, name): described for name, described in h.items()})


def named_twice(file: bytes) -> bytes:
    """The first layer's K is described twice, in two places, under one name."""
    text = json.dumps(Parts.of(file).header, separators=(",", ":"))
    return Parts.of(file).pack(text.replace('"layers.0.values"', '"layers.0.keys"').encode())


def said_twice(member: str) -> Change:
    """A member of the header's JSON, written as it stands there, is there once more."""

    def change(file: bytes) -> bytes:
        text = json.dumps(Parts.of(file).header, separators=(",", ":"))
        return Parts.of(file).pack(text.replace(member, f"{member},{member}", 1).encode())

    return change


def with_more(name: str, size: int) -> Change:
    """One more tensor of bytes behind the others, and its data."""

    def change(file: bytes) -> bytes:
        parts = Parts.of(file)
        last = {"dtype": "U8", "shape": [size], "data_offsets": [len(parts.data), len(parts.data) + size]}
        return Parts(parts.header | {name: last}, parts.data + bytes(size)).pack()

    return change


def without_tag(file: bytes) -> bytes:
    parts = Parts.of(file)
    del parts.header["tag"]
    return replace(parts, data=parts.data[:-32]).pack()


def short_tag(file: bytes) -> bytes:
    parts = Parts.of(file)
    end = parts.header["tag"]["data_offsets"][1] - 16
    parts.header["tag"].update(shape=[16], data_offsets=[end - 16, end])
    return replace(parts, data=parts.data[:-16]).pack()


def with_payload_of_zeros(size: int) -> Change:
    def change(file: bytes) -> bytes:
        described = {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}
        return Parts(Parts.of(file).header | {"payload": described}, bytes(size)).pack()

    return change


def layers_altered(layer: int, kind: str) -> Change:
    def change(file: bytes) -> bytes:
        layers = json.loads(Parts.of(file).header["__metadata__"]["layers"])
        layers[layer] = {"kind": kind}
        return metadata(layers=json.dumps(layers))(file)

    return change


def shape_word(**changes: Any) -> Callable[[dict[str, Tensor], dict[str, str]], None]:
    return lambda tensors, words: words.update(shape=json.dumps(json.loads(words["shape"]) | changes))


def settings_word(**changes: Any) -> Callable[[dict[str, Tensor], dict[str, str]], None]:
    return lambda tensors, words: words.update(settings=json.dumps(json.loads(words["settings"]) | changes))


def layers_word(layer: int, **changes: Any) -> Callable[[dict[str, Tensor], dict[str, str]], None]:
    def change(tensors: dict[str, Tensor], words: dict[str, str]) -> None:
        layers = json.loads(words["layers"])
        layers[layer] |= changes
        words["layers"] = json.dumps(layers)

    return change


def tensor(name: str, made: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor], dict[str, str]], None]:
    return lambda tensors, words: tensors.update({name: made(tensors[name])})


@dataclass(frozen=True)
class Wrong:
    """A wrong file: of which right one it is made, how it is opened, and what it must be refused for.

    `change` is done to the file's bytes, as by somebody without the key; `written` to its tensors and words before the
    key's holder writes them.
    """

    name: str
    of: str
    refusal: str
    why: str
    change: Change = bytes
    written: Callable[[dict[str, Tensor], dict[str, str]], Any] | None = None
    opened: str = ""


SESSION, STRETCHED, CACHE, SHARE = "session", "session-passphrase", "cache", "shared-keys"
WRONG = (
    # What is no file of the format.
    Wrong("empty", SESSION, "format", "no byte", lambda f: b""),
    Wrong("foreign", SESSION, "format", "a text", lambda f: b"Dear reader, this is no container.\n"),
    Wrong("plain-safetensors", SESSION, "format", "no metadata", lambda f: save({"secret": torch.ones(32)})),
    Wrong("length-truncated", SESSION, "format", "ends within the header's length", lambda f: f[:5]),
    Wrong("header-truncated", SESSION, "format", "ends within the header", lambda f: f[:200]),
    Wrong("data-truncated", SESSION, "format", "a byte of the payload is missing", lambda f: f[:-1]),
    Wrong("cache-truncated", CACHE, "format", "a byte of the tag is missing", lambda f: f[:-1]),
    Wrong("trailing-byte", SESSION, "format", "a byte follows", lambda f: f + b"\0"),
    Wrong("trailing-file", CACHE, "format", "the same file follows", lambda f: f + f),
    Wrong("header-too-long", SESSION, "format", "claims a header of 2^20 + 8 bytes",
          lambda f: (2**20 + 8).to_bytes(8, "little") + f[8:]),
    Wrong("header-no-json", SESSION, "format", "the header is no JSON", packed(b"{")),
    Wrong("header-no-utf8", SESSION, "format", "the header is no UTF-8", packed(b'{"\xff":1}')),
    Wrong("header-no-object", SESSION, "format", "the header is a JSON array", packed(b"[]")),
    Wrong("header-deep", SESSION, "format", "the header nests 3,000 arrays", packed(b"[" * 3000)),
    Wrong("metadata-missing", SESSION, "format", "no __metadata__", header(lambda h: {"payload": h["payload"]})),
    Wrong("metadata-number", SESSION, "format", "a word of the metadata is a number", metadata(batch_size=2)),
    Wrong("metadata-twice", SESSION, "format", "a second __metadata__ behind the first",
          lambda f: Parts.of(f).pack(json.dumps(Parts.of(f).header).encode()[:-1] + b',"__metadata__":{}}')),
    Wrong("metadata-word-twice", SESSION, "format", "a word of the metadata is there twice",
          said_twice('"batch_size":"2"')),
    Wrong("header-not-a-number", SESSION, "format", "a shape of NaN",
          header(lambda h: h["payload"].update(shape=[float("nan")]))),
    Wrong("format-foreign", SESSION, "format", "another format's name", metadata(format="scx")),
    Wrong("salt-missing", SESSION, "format", "no salt", metadata(salt=None)),
    Wrong("salt-short", SESSION, "format", "a salt of 31 bytes", metadata(salt="00" * 31)),
    Wrong("salt-upper-case", SESSION, "format", "a salt in capital letters", metadata(salt="AB" * 32)),
    # What is of another version or kind, or otherwise protected.
    Wrong("version-newer", SESSION, "version", "version 2", metadata(version="2")),
    Wrong("version-zero", SESSION, "version", "version 0", metadata(version="0")),
    Wrong("version-word", SESSION, "version", "a version that is no number", metadata(version="one")),
    Wrong("kind-altered", SESSION, "kind", "the header says cache", metadata(kind="cache")),
    Wrong("kind-unknown", CACHE, "kind", "a kind that is not known", metadata(kind="diary")),
    Wrong("protection-altered", SESSION, "format", "says authenticated", metadata(protection="authenticated")),
    Wrong("protection-unknown", CACHE, "format", "says none", metadata(protection="none")),
    # How tensors lie.
    Wrong("payload-and-more", SESSION, "format", "a second tensor beside payload", with_more("more", 8)),
    Wrong("payload-dtype", SESSION, "format", "payload is I8", entry("payload", dtype="I8")),
    Wrong("payload-large", SESSION, "format", "more than the 4,096 bytes of a session", with_payload_of_zeros(4097)),
    Wrong("offsets-overlap", CACHE, "format", "layer 0's V begins within its K", moved("layers.0.values", -8)),
    Wrong("offsets-gap", CACHE, "format", "a gap before layer 0's V", moved("layers.0.values", 8)),
    Wrong("offsets-negative", CACHE, "format", "layer 0's K begins before the data", moved("layers.0.keys", -8)),
    Wrong("offsets-reversed", CACHE, "format", "K ends before it begins",
          entry("layers.0.keys", data_offsets=[320, 0])),
    Wrong("offsets-not-dense", CACHE, "format", "tensors are not described in their order",
          header(lambda h: dict(sorted(h.items(), reverse=True)))),
    Wrong("name-twice", CACHE, "format", "two tensors of one name", named_twice),
    Wrong("entry-field-twice", CACHE, "format", "a tensor's dtype is there twice", said_twice('"dtype":"BF16"')),
    Wrong("offsets-fraction", CACHE, "format", "an offset with a fraction of zero",
          entry("layers.0.keys", data_offsets=[0.0, 320])),
    Wrong("offsets-truth", CACHE, "format", "an offset that is a truth value",
          entry("layers.0.keys", data_offsets=[False, 320])),
    Wrong("shape-overflow", CACHE, "format", "sizes whose product is 2^64, of no bytes",
          entry("layers.0.keys", shape=[2**32, 2**32], data_offsets=[0, 0])),
    Wrong("shape-not-the-sessions", CACHE, "format", "K of 4 heads of 4 features",
          entry("layers.0.keys", shape=[2, 4, 5, 4])),
    Wrong("dtype-not-a-caches", CACHE, "format", "K of I16", entry("layers.0.keys", dtype="I16")),
    Wrong("layers-altered", CACHE, "format", "the header says that a sealed layer is none", layers_altered(1, "full")),
    Wrong("shape-larger", CACHE, "format", "a shape of more bytes than its place",
          entry("layers.0.keys", shape=[2, 2, 6, 8])),
    Wrong("shape-negative", CACHE, "format", "a negative size", entry("layers.0.keys", shape=[-2, -2, 5, 8])),
    Wrong("shape-truth", CACHE, "format", "a size that is a truth value", entry("tag", shape=[True, 32])),
    Wrong("shape-deep", CACHE, "format", "nine dimensions", entry("layers.0.keys", shape=[1] * 5 + [2, 2, 5, 8])),
    Wrong("dtype-unknown", CACHE, "format", "a dtype of other containers", entry("layers.0.keys", dtype="F8_E4M3")),
    Wrong("entry-more", CACHE, "format", "a tensor's description says more", entry("layers.0.keys", note="")),
    Wrong("tag-missing", CACHE, "format", "no tag", without_tag),
    Wrong("tag-short", CACHE, "format", "a tag of 16 bytes", short_tag),
    Wrong("tag-elsewhere", CACHE, "format", "a tensor behind the tag", with_more("more", 8)),
    # The cost that a file asks for.
    Wrong("kdf-unknown", STRETCHED, "format", "a function that is not known", metadata(kdf="argon2id 1 1 1")),
    Wrong("kdf-incomplete", STRETCHED, "format", "Scrypt without p", metadata(kdf="scrypt 131072 8")),
    Wrong("kdf-sign", STRETCHED, "format", "a number with a sign", metadata(kdf="scrypt +16 8 1")),
    Wrong("kdf-n-large", STRETCHED, "format", "n above 2^18", metadata(kdf="scrypt 524288 8 1")),
    Wrong("kdf-n-no-power", STRETCHED, "format", "n is no power of two", metadata(kdf="scrypt 100000 8 1")),
    Wrong("kdf-n-one", STRETCHED, "format", "n below 2", metadata(kdf="scrypt 1 8 1")),
    Wrong("kdf-r-large", STRETCHED, "format", "r is not 8", metadata(kdf="scrypt 131072 16 1")),
    Wrong("kdf-p-large", STRETCHED, "format", "p above 4", metadata(kdf="scrypt 131072 8 5")),
    Wrong("kdf-p-zero", STRETCHED, "format", "p below 1", metadata(kdf="scrypt 131072 8 0")),
    Wrong("kdf-altered", STRETCHED, "key", "fewer rounds than it was written with", metadata(kdf="scrypt 16 8 1")),
    Wrong("kdf-exchanged", STRETCHED, "key", "says that a key opens it", metadata(kdf="hkdf-sha256")),
    # Wrong secrets, altered bytes.
    Wrong("key-another", SESSION, "key", "opened with another key", opened="session, another key"),
    Wrong("key-for-passphrase", STRETCHED, "key", "opened with a key", opened="session"),
    Wrong("passphrase-for-key", SESSION, "key", "opened with a passphrase", opened="session-passphrase"),
    Wrong("passphrase-another", STRETCHED, "key", "opened with another passphrase",
          opened="session-passphrase, another one"),
    Wrong("salt-altered", SESSION, "key", "another salt", metadata(salt="00" * 32)),
    Wrong("header-altered", SESSION, "key", "another batch size", metadata(batch_size="3")),
    Wrong("header-space", SESSION, "key", "more spaces behind the header's JSON",
          lambda f: Parts.of(f).pack(f[8 : data_start(f)] + b" " * 8)),
    Wrong("payload-altered", SESSION, "key", "a bit of the payload", flipped(data_start)),
    Wrong("payload-tag-altered", SESSION, "key", "a bit of the tag of AES-GCM", flipped(lambda f: len(f) - 1)),
    Wrong("payload-zeros", SESSION, "key", "zeros for a payload",
          lambda f: f[: data_start(f)] + bytes(len(f) - data_start(f))),
    Wrong("cache-data-altered", CACHE, "key", "a bit of K", flipped(data_start)),
    Wrong("cache-tag-altered", CACHE, "key", "a bit of the tag", flipped(lambda f: len(f) - 1)),
    Wrong("cache-header-altered", CACHE, "key", "a later number", metadata(number="3")),
    Wrong("cache-names-exchanged", CACHE, "key", "K of layer 0 is called V",
          renamed("layers.0.keys", "layers.0.values")),
    Wrong("cache-sealed-names-exchanged", CACHE, "key", "K of layer 1, sealed, is called V",
          renamed("layers.1.keys", "layers.1.values")),
    # Of another model or session, or older than known.
    Wrong("session-other-model", SESSION, "model", "opened for another model", opened="session, another model"),
    Wrong("session-model-altered", SESSION, "model", "the header names another model", metadata(model="another model")),
    Wrong("cache-other-model", CACHE, "model", "the header names another model", metadata(model="another model")),
    Wrong("cache-other-session", CACHE, "session", "opened with another session", opened="cache, another session"),
    Wrong("cache-session-altered", CACHE, "session", "the header names another session", metadata(session="00" * 16)),
    Wrong("cache-session-missing", CACHE, "session", "the header names no session", metadata(session=None)),
    Wrong("shared-other-session", SHARE, "session", "opened for another session",
          opened="shared-keys, another session"),
    Wrong("cache-older", CACHE, "replay", "save 2 where save 3 is known", opened="cache, newer known"),
    Wrong("cache-number-older", CACHE, "replay", "the header says save 1", metadata(number="1")),
    Wrong("cache-number-zero", CACHE, "format", "save 0", metadata(number="0")),
    Wrong("cache-number-word", CACHE, "format", "a number that is none", metadata(number="two")),
    # Authentic, and still wrong: what a holder of the key wrote.
    Wrong("written-secret-short", SESSION, "format", "a secret of 31 bytes", written=tensor("secret", lambda x: x[1:])),
    Wrong("written-secret-missing", SESSION, "format", "no secret", written=lambda t, m: t.clear()),
    Wrong("written-session-id", SESSION, "format", "an id of 15 bytes",
          written=lambda t, m: m.update(session="00" * 15)),
    Wrong("written-model", SESSION, "format", "another fingerprint than in shape",
          written=lambda t, m: m.update(shape=m["shape"].replace("golden", "silver"))),
    Wrong("written-batch-size", SESSION, "format", "no sequence", written=lambda t, m: m.update(batch_size="0")),
    Wrong("written-shape", SESSION, "format", "5 heads for 2 of K and V", written=shape_word(num_heads=5)),
    Wrong("written-settings-more", SESSION, "format", "a setting that is not known", written=settings_word(more=1)),
    Wrong("written-start-layers", SESSION, "format", "start layers are not the first",
          written=settings_word(start_layers=[1])),
    Wrong("written-sealed-layers", SESSION, "format", "sealed layers that there are not",
          written=settings_word(sealed_layers=[4])),
    Wrong("written-cipher-rounds", SESSION, "format", "10 rounds", written=settings_word(cipher_rounds=10)),
    Wrong("written-layers-few", CACHE, "format", "no layer is described", written=lambda t, m: m.update(layers="[]")),
    Wrong("written-layer-missing", CACHE, "format", "no K of layer 2", written=lambda t, m: t.pop("layers.2.keys")),
    Wrong("written-layer-more", CACHE, "format", "a layer too many",
          written=lambda t, m: t.update({"layers.4.keys": torch.ones(1)})),
    Wrong("written-layer-kind", CACHE, "format", "a kind of layer that is not known",
          written=layers_word(0, kind="round")),
    Wrong("written-layer-encoding", CACHE, "format", "a sealed layer where the session has a permuted one",
          written=layers_word(0, kind="sealed", branch="00" * 16)),
    Wrong("written-branch", CACHE, "format", "a branch of 15 bytes", written=layers_word(1, branch="00" * 15)),
    Wrong("written-window", CACHE, "format", "a window longer than its rows, and more tokens seen",
          written=layers_word(2, window=9)),
    Wrong("written-length", CACHE, "format", "layers of two lengths", written=layers_word(2, length=6)),
    Wrong("written-rows", CACHE, "format", "K and V of one row", written=tensor("layers.0.keys", lambda x: x[:1])),
    Wrong("written-head-size", CACHE, "format", "heads of another size",
          written=tensor("layers.0.keys", lambda x: x[..., :4])),
    Wrong("written-dtype", CACHE, "format", "K and V of two dtypes", written=tensor("layers.0.keys", Tensor.float)),
    Wrong("written-writes-missing", CACHE, "format", "no write numbers", written=lambda t, m: t.pop("layers.1.writes")),
    Wrong("written-writes-negative", CACHE, "format", "a write number below 0",
          written=tensor("layers.1.writes", lambda x: -1 - x)),
    Wrong("written-sequences", CACHE, "format", "a third of two sequences",
          written=tensor("sequences", lambda x: x + 1)),
    Wrong("written-blocks", SHARE, "format", "a block below 0", written=lambda t, m: m.update(blocks="[1, -2]")),
    Wrong("written-blocks-few", SHARE, "format", "fewer blocks than positions",
          written=lambda t, m: m.update(blocks="[1]")),
    Wrong("written-positions", SHARE, "format", "positions of fewer tokens",
          written=tensor("positions", lambda x: x[:, 1:])),
    Wrong("written-position-dtype", SHARE, "format", "positions that are no int64",
          written=tensor("token_position", Tensor.int)),
    Wrong("written-secret-and-more", SESSION, "format", "a tensor beside the secret",
          written=lambda t, m: t.update(more=torch.ones(1))),
    Wrong("written-batch-size-sign", SESSION, "format", "a number with a sign",
          written=lambda t, m: m.update(batch_size="+2")),
    Wrong("written-newest-save-digits", SESSION, "format", "a number in digits of another script",
          written=lambda t, m: m.update(newest_save="٣")),
    Wrong("written-setting-twice", SESSION, "format", "a setting is there twice",
          written=lambda t, m: m.update(settings='{"alp":true,' + m["settings"][1:])),
    Wrong("written-noise-infinite", SESSION, "format", "noise of no finite scale",
          written=settings_word(noise_scale=float("inf"))),
    Wrong("written-start-layer-truth", SESSION, "format", "a layer that is a truth value",
          written=settings_word(start_layers=[False])),
    Wrong("written-length-large", CACHE, "format", "2^31 tokens seen",
          written=layers_word(2, length=2**31)),
    Wrong("written-layers-twice", CACHE, "format", "a layer's kind is there twice",
          written=lambda t, m: m.update(layers='[{"kind":"full",' + m["layers"][2:])),
    Wrong("written-blocks-text", SHARE, "format", "blocks are a text of two letters",
          written=lambda t, m: m.update(blocks='"12"')),
    Wrong("written-block-large", SHARE, "format", "block 2^16", written=lambda t, m: m.update(blocks="[1, 65536]")),
    Wrong("written-shared-and-more", SHARE, "format", "a third tensor",
          written=lambda t, m: t.update(more=torch.ones(1))),
)  # fmt: skip
