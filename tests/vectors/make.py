"""Writes the vectors into a folder: `python -m tests.vectors.make tests/vectors`.

They come from the published ones, from `tests.specification` and `tests.specified_files`, which know nothing of this
package, and from what `tests.golden.wrong_files` says that its files must be refused for.
"""

import hashlib
import itertools
import json
import struct
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests import specification, specified_files
from tests.golden.given import (
    KEY,
    MASTER,
    MODEL,
    OTHER_ID,
    OTHER_MODEL,
    PASSPHRASE,
    SAVES,
    SESSION_ID,
)
from tests.golden.wrong_files import WRONG, Wrong
from tests.vectors import published

GOLDEN = Path(__file__).parents[1] / "golden"
SECRET = specification.session_secret(MASTER, SESSION_ID)
Case = dict[str, Any]


def drawn(*name: object, size: int = 32) -> bytes:
    """Bytes that look random, of a name of their own."""
    return hashlib.shake_256(repr(name).encode()).digest(size)


def case(comment: str, flags: Iterable[str] = (), result: str = "valid", **values: Any) -> Case:
    return {"comment": comment, **values, "result": result, "flags": list(flags)}


def chacha_block() -> tuple[dict[str, str], list[Case]]:
    groups = []
    for rounds in specification.ROUNDS:
        tests = []
        for source, of_rounds, key, nonce, counter, output in published.CHACHA:
            words = [counter, *struct.unpack("<3I", bytes.fromhex(nonce))]
            if of_rounds == rounds:
                tests.append(case(source, ["Published"], key=key, words=words, keystream=output))
        edges = [(0, 0, 0, 0), (2**32 - 1, 0, 0, 0), (2**31, 2**31, 2**31, 2**31), (2**32 - 1,) * 4]
        for words in edges:
            key = drawn("block", rounds, words)
            output = specification.chacha_block(key, words, rounds).hex()
            tests.append(case("words at the edge", key=key.hex(), words=list(words), keystream=output))
        groups.append({"type": "ChaChaBlock", "rounds": rounds, "tests": tests})
    return {"Published": "RFC 8439 and draft-strombergson-chacha-test-vectors-01; the source is in the comment"}, groups


ROW_NOTES = {
    "EdgeOfField": "a number at the end of its field of the counter",
    "LastBlock": "the row ends within a block, or is the most blocks that a row may have",
    "BeyondLimit": "a field would overflow into the next; nothing is written or read under such a name",
    "Rounds": "a number of rounds that no cache has",
}


def row(comment: str, flags: list[str], rounds: int, number: int, layer: int, head: int, kind: str, size: int) -> Case:
    key, is_value = drawn("row", rounds, number, layer, head, kind, size), kind == "V"
    given = {"key": key.hex(), "writeNumber": number, "layer": layer, "head": head, "kind": kind, "rowBytes": size}
    try:
        words = specification.counter_words(number, layer, head, is_value, size)
        stream = specification.row_keystream(key, number, layer, head, is_value, size, rounds)
    except ValueError:
        return case(comment, flags, "invalid", **given)
    plain = drawn("plain", key, size=size)
    sealed = specification.xor(plain, stream).hex()
    return case(comment, flags, **given, words=list(words), plain=plain.hex(), sealed=sealed)


def sealed_row() -> tuple[dict[str, str], list[Case]]:
    groups = []
    for rounds in specification.ROUNDS:
        rows = [row("layers, heads, K and V", [], rounds, 7, layer, head, kind, 16)
                for layer, head, kind in itertools.product((0, 3), (0, 5), "KV")]  # fmt: skip
        for number in (0, 1, 2**28 - 1, 2**28, 2**28 + 1, 2**32 + 5, 2**48, 2**60 - 1):
            rows.append(row("write numbers", ["EdgeOfField"], rounds, number, 1, 1, "K", 16))
        for layer, head in ((2**16 - 1, 0), (0, 2**16 - 1), (2**16 - 1, 2**16 - 1)):
            rows.append(row("layers and heads", ["EdgeOfField"], rounds, 2**60 - 1, layer, head, "V", 16))
        for size in (4, 60, 64, 68, 128, 160, 960, 1024):
            number = 2**28 - 1 if size == 1024 else 9
            rows.append(row("sizes of rows", ["LastBlock"], rounds, number, 2, 1, "V", size))
        beyond = ((2**60, 0, 0, 16), (-1, 0, 0, 16), (0, 2**16, 0, 16), (0, 0, 2**16, 16), (0, 0, 0, 1028))
        for number, layer, head, size in beyond:
            rows.append(row("beyond the limit", ["BeyondLimit"], rounds, number, layer, head, "K", size))
        groups.append({"type": "SealedRow", "rounds": rounds, "tests": rows})
    for rounds in (0, 10, 21):
        tests = [row("rounds that there are not", ["Rounds"], rounds, 0, 0, 0, "K", 16)]
        groups.append({"type": "SealedRow", "rounds": rounds, "tests": tests})
    return ROW_NOTES, groups


def write_number() -> tuple[dict[str, str], list[Case]]:
    edges = ((0, 0, 0), (0, 0, 1), (0, 3, 2**28), (1, 0, 7), (4095, 65534, 2**31 - 1))
    beyond = ((4096, 0, 0), (0, 65535, 0), (0, 0, 2**31))
    tests = []
    for epoch, sequence, count in edges + beyond:
        given = {"epoch": epoch, "sequence": sequence, "count": count}
        try:
            tests.append(case("", **given, writeNumber=specification.write_number(epoch, sequence, count)))
        except ValueError:
            tests.append(case("beyond the limit", ["BeyondLimit"], "invalid", **given))
    return {"BeyondLimit": ROW_NOTES["BeyondLimit"]}, [{"type": "WriteNumber", "tests": tests}]


def hkdf() -> tuple[dict[str, str], list[Case]]:
    groups: list[Case] = [{"type": "Hkdf", "tests": []}]
    for source, ikm, salt, info, okm in published.HKDF:
        given = {"ikm": ikm, "salt": salt, "info": info, "size": len(okm) // 2, "okm": okm}
        groups[0]["tests"].append(case(source, ["Published"], **given))

    def derived(comment: str, secret: bytes, info: str, salt: bytes, **names: Any) -> Case:
        okm = specification.hkdf(secret, info, salt)
        given = {"ikm": secret.hex(), "salt": salt.hex(), "info": info.encode().hex(), "size": 32, "okm": okm.hex()}
        return case(comment, **names, **given)

    purposes, branches = ("cache file", "sealed cache", "a purpose of your own, é"), (OTHER_ID, bytes(range(16)))
    session = [derived("session secret", MASTER, "scx session v1", SESSION_ID, sessionId=SESSION_ID.hex())]
    keys = [derived("session key", SECRET, f"scx session key v1, session\0{p}", b"", purpose=p) for p in purposes]
    keys += [derived("branch key", SECRET, f"scx session key v1, branch\0{p}", b, purpose=p, branch=b.hex())
             for p, b in itertools.product(purposes, branches)]  # fmt: skip
    secrets = [derived("branch secret", SECRET, "scx branch v1", b, branch=b.hex()) for b in branches]
    streams = [derived("stream key", SECRET, f"scx keystream v2\0{p}", b"", purpose=p)
               for p in ("feature permutations of K and V", "a purpose")]  # fmt: skip
    files = [derived("file key", KEY, f"scx container v1, {protection}\0{kind}", drawn("salt"), protection=protection,
                     kind=kind) for protection, kind in
             (("encrypted", "session"), ("encrypted", "shared keys"), ("authenticated", "cache"))]  # fmt: skip
    for kind, tests in (("SessionSecret", session), ("SessionKey", keys), ("BranchSecret", secrets),
                        ("StreamKey", streams), ("FileKey", files)):  # fmt: skip
        groups.append({"type": kind, "tests": tests})
    return {"Published": "RFC 5869; the source is in the comment"}, groups


def feature_permutation() -> tuple[dict[str, str], list[Case]]:
    tests = []
    for layer, sequence in itertools.product(range(4), range(2)):
        key, value = specification.feature_permutations(SECRET, layer, sequence, heads=2, head_dim=8)
        tests.append(case("", layer=layer, sequence=sequence, key=key, value=value))
    group = {"type": "FeaturePermutation", "sessionSecret": SECRET.hex(), "heads": 2, "headDim": 8, "tests": tests}
    return {}, [group]


BLOCK_NOTES = {
    "EdgeOfField": "a write number at the end of its field of the counter",
    "LastRow": "the block ends within 16 bytes or within a row of 1,024, or is one byte",
    "Altered": "one bit is another one",
    "Foreign": "sealed under another key or context, in another format, or of another block",
    "WrittenByKeyHolder": "authentic, and still wrong",
}


def sealed_block(kind: str, comment: str, flags: list[str], size: int = 40, first: int = 0, context: int = 13) -> Case:
    key, nonce = drawn("block key", kind, comment, size, first), drawn("nonce", kind, comment, size, first, size=24)
    words, plain = drawn("context", comment, context, size=context), drawn("block", comment, size, size=size)
    row, trailer = specification.seal_block(kind, key, nonce, first, words, plain)
    return case(comment, flags, key=key.hex(), context=words.hex(), plain=plain.hex(), row=row.hex(),
                trailer=trailer.hex())  # fmt: skip


def refused_block(kind: str, right: Case, comment: str, flag: str, **changed: bytes) -> Case:
    given = {name: right[name] for name in ("key", "context", "row", "trailer")}
    return case(comment, [flag], "invalid", **given | {name: value.hex() for name, value in changed.items()})


def flipped(data: str, place: int) -> bytes:
    changed = bytearray.fromhex(data)
    changed[place] ^= 1
    return bytes(changed)


def off_loaded_block() -> tuple[dict[str, str], list[Case]]:
    groups = []
    for kind, other in (("host", "device"), ("device", "host")):
        tests = [sealed_block(kind, "sizes", ["LastRow"], size)
                 for size in (1, 15, 16, 17, 64, 1023, 1024, 1025, 2500)]  # fmt: skip
        tests += [sealed_block(kind, "contexts", [], context=size) for size in (0, 1, 16, 100)]
        numbers = (1, 2**28 - 1, 2**28, 2**60 - 2) if kind == "device" else ()
        tests += [sealed_block(kind, "write numbers", ["EdgeOfField"], 1500, first) for first in numbers]
        right, second = (sealed_block(kind, name, [], 40) for name in ("one block", "a second"))
        altered = {"row": (0, 39), "trailer": (0, 6, 7, 8, 31, 32, 39, 40, 47, 48, 63), "context": (0, 12)}
        for name, place in ((name, place) for name, given in altered.items() for place in given):
            changed = {name: flipped(right[name], place)}
            tests.append(refused_block(kind, right, f"{name}, byte {place}", "Altered", **changed))
        key = bytes.fromhex(right["key"])
        foreign = {"another key": {"key": drawn("another key")}, "no context": {"context": b""}}
        foreign |= {f"the other's {name}": {name: bytes.fromhex(second[name])} for name in ("row", "trailer")}
        foreign["no trailer"] = {"trailer": bytes(64)}
        parts = specification.seal_block(other, key, drawn("nonce", size=24), 0, bytes.fromhex(right["context"]),
                                         bytes.fromhex(right["plain"]))  # fmt: skip
        foreign["the other format"] = dict(zip(("row", "trailer"), parts, strict=True))
        tests += [refused_block(kind, right, name, "Foreign", **changed) for name, changed in foreign.items()]
        first, comment = (
            (1, "a write number where there is none") if kind == "host" else (2**60, "a write number too many")
        )
        given = [bytes.fromhex(right[name]) for name in ("context", "row")]
        wrong = {comment: (first, None), "a format that there is not": (0, 3)}
        wrong["the other format's number"] = (0, specification.BLOCK_FORMATS[other])
        for comment, (first, version) in wrong.items():
            trailer = specification.block_trailer(kind, key, drawn("nonce", size=24), first, *given, version)
            tests.append(refused_block(kind, right, comment, "WrittenByKeyHolder", trailer=trailer))
        groups.append({"type": "OffLoadedBlock", "format": kind, "tests": tests})
    return BLOCK_NOTES, groups


OPENED: dict[str, Case] = {
    "session": {"kind": "session", "key": KEY.hex(), "model": MODEL},
    "session, another key": {"kind": "session", "key": bytes(32).hex(), "model": MODEL},
    "session, another model": {"kind": "session", "key": KEY.hex(), "model": OTHER_MODEL},
    "session-passphrase": {"kind": "session", "passphrase": PASSPHRASE, "model": MODEL},
    "session-passphrase, another one": {"kind": "session", "passphrase": "wrong horse", "model": MODEL},
    "cache": {"kind": "cache", "masterKey": MASTER.hex(), "session": SESSION_ID.hex(), "newestSave": SAVES},
    "cache, another session": {"kind": "cache", "masterKey": MASTER.hex(), "session": OTHER_ID.hex(), "newestSave": 0},
    "cache, newer known": {"kind": "cache", "masterKey": MASTER.hex(), "session": SESSION_ID.hex(),
                           "newestSave": SAVES + 1},
    "shared-keys": {"kind": "shared keys", "key": KEY.hex(), "session": SESSION_ID.hex()},
    "shared-keys, another session": {"kind": "shared keys", "key": KEY.hex(), "session": OTHER_ID.hex()},
}  # fmt: skip
"""How a file is opened, by the names of the wrong files. Those without a comma open the right file of their name."""
RIGHT = {
    "session": ("session", "valid", []),
    "session-passphrase": ("session-passphrase", "valid", []),
    "session-weak-passphrase": ("session-passphrase", "acceptable", ["WeakKdf"]),
    "cache": ("cache", "valid", []),
    "shared-keys": ("shared-keys", "valid", []),
}
FILE_NOTES = {
    "WeakKdf": "written with less of Scrypt than new files should take; a reader may ask for more",
    "Malformed": "not in the format, or it asks for more than a file may",
    "Foreign": "of another version, kind, model or session, or older than known",
    "NotAuthentic": "another key or passphrase, or altered",
    "WrittenByKeyHolder": "authentic, and still wrong",
}


def open_file(opened: Case, data: bytes) -> specified_files.File:
    """By the specification. Raises `specified_files.Refused`."""
    key = bytes.fromhex(opened["key"]) if "key" in opened else None
    if opened["kind"] == "session":
        return specified_files.read_session(
            data, key=key, passphrase=opened.get("passphrase"), model=opened.get("model")
        )
    if opened["kind"] == "shared keys":
        return specified_files.read_shared_keys(data, key=key, session=opened.get("session"))
    words = specified_files.read_session((GOLDEN / "session.scx").read_bytes(), key=KEY).metadata
    shape, settings = json.loads(words["shape"]), json.loads(words["settings"])
    secret = specification.session_secret(bytes.fromhex(opened["masterKey"]), bytes.fromhex(opened["session"]))
    return specified_files.read_cache(
        data,
        key=specification.session_key(secret, "cache file"),
        session=opened["session"],
        shape=shape,
        settings=settings,
        batch_size=int(words["batch_size"]),
        newest_save=opened["newestSave"],
    )


def right_file(name: str, opened: Case, result: str, flags: list[str]) -> Case:
    data = (GOLDEN / f"{name}.scx").read_bytes()
    file = open_file(opened, data)
    tensors = {name: {"dtype": dtype, "shape": shape, "bytes": content.hex()}
               for name, (dtype, shape, content) in file.tensors.items()}  # fmt: skip
    return case("", flags, result, file=f"{name}.scx", sha256=hashlib.sha256(data).hexdigest(),
                fileKey=file.key.hex(), tensors=tensors)  # fmt: skip


def wrong_file(wrong: Wrong) -> Case:
    name = f"wrong/{wrong.name}.scx"
    digest = hashlib.sha256((GOLDEN / name).read_bytes()).hexdigest()
    flag = "Malformed" if wrong.refusal == "format" else "NotAuthentic" if wrong.refusal == "key" else "Foreign"
    flags = [flag if wrong.written is None else "WrittenByKeyHolder"]
    return case(wrong.why, flags, "invalid", file=name, sha256=digest, reason=wrong.refusal)


def container() -> tuple[dict[str, str], list[Case]]:
    groups = []
    for way, opened in OPENED.items():
        tests = [right_file(name, opened, result, flags) for name, (by, result, flags) in RIGHT.items() if by == way]
        tests += [wrong_file(wrong) for wrong in WRONG if (wrong.opened or wrong.of) == way]
        groups.append({"type": "FileOpen", "opened": way, **opened, "tests": tests})
    return FILE_NOTES, groups


FILES = {
    "chacha_block": ("ChaCha block function", chacha_block),
    "sealed_row": ("Rows of a cache sealed by ChaCha", sealed_row),
    "write_number": ("Write numbers", write_number),
    "hkdf": ("HKDF-SHA256 and the keys derived by it", hkdf),
    "feature_permutation": ("Feature permutations of K and V", feature_permutation),
    "off_loaded_block": ("Off-loaded blocks of a paged cache", off_loaded_block),
    "container": ("Files of sessions, caches and shared keys", container),
}


def vectors(name: str) -> Case:
    """What a file of vectors holds."""
    algorithm, make = FILES[name]
    notes, groups = make()
    numbers = itertools.count(1)
    for group in groups:
        group["tests"] = [{"tcId": next(numbers), **test} for test in group["tests"]]
    total = sum(len(group["tests"]) for group in groups)
    return {
        "algorithm": algorithm,
        "generatorVersion": "scx formats 1",
        "numberOfTests": total,
        "notes": notes,
        "testGroups": groups,
    }


def text(name: str) -> str:
    return json.dumps(vectors(name), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for name in FILES:
        (Path(sys.argv[1]) / f"{name}.json").write_text(text(name))
