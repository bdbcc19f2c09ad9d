"""A request's JSON body: what it may hold, and how it gets a tenant's salt.

The salt is set into the text. Every other member of the body stays as it was sent, to the byte: no number is rounded,
no order changed. A body that two readers could read in two ways is refused.
"""

import json
import re
from typing import Any, NamedTuple

__all__ = ["Body", "RefusedError"]

_SPACE = re.compile(r"[ \t\n\r]*")
_SALT = "cache_salt"
_MAX_TOLD = 128
_FORBIDDEN = frozenset("@/\\\0")

# Where vLLM reads an item out of its multi-modal cache by a name that the caller gives.
_MEDIA = (
    "image_url", "image_pil", "image_embeds", "audio_url", "audio_embeds", "input_audio", "video_url", "video_embeds",
    "prompt_embeds",
)  # fmt: skip
_COUNTS = ("max_load_tokens", "max_offload_tokens")
_TIERS = "kv_load_tiers"
_MAX_TIERS = 16
_TRANSFERS = ("kv_transfer_params", "ec_transfer_params")


class RefusedError(Exception):
    """A request that is answered here.

    Args:
        status: of HTTP.
        message: what is wrong, for the caller.
        parameter: of the body, if it is one.
    """

    def __init__(self, status: int, message: str, parameter: str | None = None) -> None:
        super().__init__(message)
        self.status, self.parameter = status, parameter


class _Member(NamedTuple):
    name: str
    value: Any
    text: str  # name and value, as they came


class Body:
    """The members of a JSON object.

    Args:
        data: the body's bytes.
        trusted: whether a router of the operator's wrote them, which may say what callers may not: where blocks come
            from and go to, and what is in the multi-modal cache.

    Raises: RefusedError(400) for what is no JSON object in UTF-8, names a member twice, here or further in, or has a
        number that JSON does not know; RefusedError(403) for what callers may not say.
    """

    def __init__(self, data: bytes | bytearray, trusted: bool = False) -> None:
        self._members = _read(data, _TRUSTED if trusted else _UNTRUSTED)
        if not trusted:
            self._check()

    def __getitem__(self, name: str) -> Any:
        """A member's value, None where there is none, as vLLM has it."""
        return next((member.value for member in self._members if member.name == name), None)

    @property
    def told(self) -> str:
        """The caller's own salt; empty where it has none.

        Raises: RefusedError(400) for one that vLLM would refuse.
        """
        told = self[_SALT]
        if told is None:
            return ""
        if not isinstance(told, str) or not told or len(told) > _MAX_TOLD or _FORBIDDEN & set(told):
            raise RefusedError(
                400, f"expected text of 1 to {_MAX_TOLD} characters without '@', '/', '\\' and NUL", _SALT
            )
        try:
            told.encode()
        except UnicodeEncodeError:
            raise RefusedError(400, "expected text, got a lone surrogate", _SALT) from None
        return told

    def salted(self, salt: str) -> bytes:
        """The body with a salt, in the place of the caller's own or at the end."""
        member = f"{json.dumps(_SALT)}: {json.dumps(salt)}"
        texts = [member if x.name == _SALT else x.text for x in self._members]
        if all(x.name != _SALT for x in self._members):
            texts.append(member)
        return ("{" + ", ".join(texts) + "}").encode()

    def _check(self) -> None:
        _check_transfer(self["kv_transfer_params"])
        if self["ec_transfer_params"] is not None:
            raise RefusedError(403, "where embeddings come from is not a caller's to say", "ec_transfer_params")
        # Both end up beside the members of these names, whose form nothing checks there.
        sampling = self["sampling_params"]
        inner = {"sampling_params.extra_args": sampling.get("extra_args") if isinstance(sampling, dict) else None}
        for place, values in {"vllm_xargs": self["vllm_xargs"], **inner}.items():
            for name in _TRANSFERS:
                if isinstance(values, dict) and name in values:
                    raise RefusedError(403, "where blocks come from is not a caller's to say", f"{place}.{name}")
        if self["previous_response_id"] is not None:
            raise RefusedError(403, "stored responses are not kept apart by tenant", "previous_response_id")
        if self["features"] is not None:
            raise RefusedError(403, "what the multi-modal cache holds is not a caller's to say", "features")


def _check_transfer(params: Any) -> None:
    """How much is off-loaded and which kind of tier is asked is a caller's to say; which peer is not: the engine would
    connect to any address, and hand out or take in the blocks of any request."""
    name = "kv_transfer_params"
    if params is None:
        return
    if not isinstance(params, dict):
        raise RefusedError(400, "expected an object", name)
    for key, value in params.items():
        if key in _COUNTS:
            if type(value) is not int or value < 0:
                raise RefusedError(400, "expected a number of tokens, at least 0", f"{name}.{key}")
        elif key == _TIERS:
            if not isinstance(value, list) or len(value) > _MAX_TIERS or not all(map(_is_matcher, value)):
                raise RefusedError(400, f"expected at most {_MAX_TIERS} of medium, locality", f"{name}.{key}")
        else:
            allowed = ", ".join((*_COUNTS, _TIERS))
            raise RefusedError(403, f"a caller may set {allowed}; got {key!r:.100}", name)


def _is_matcher(value: Any) -> bool:
    if not isinstance(value, dict) or not value.keys() <= {"medium", "locality"}:
        return False
    return all(each is None or isinstance(each, str) for each in value.values())


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) != len(pairs):
        raise _twice()
    return tree


def _twice() -> RefusedError:
    return RefusedError(400, "the body is no JSON that has one reading: two members of an object have one name")


def _once_without_handles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = _once(pairs)
    # Whoever knows or guesses the name of another's image has the model look at it.
    if tree.get("uuid") is not None and (tree.get("type") in _MEDIA or any(name in tree for name in _MEDIA)):
        raise RefusedError(403, "what the multi-modal cache holds is not a caller's to say", "uuid")
    return tree


def _no_constant(text: str) -> Any:
    raise RefusedError(400, f"the body is no JSON: {text} is no number")


_TRUSTED = json.JSONDecoder(object_pairs_hook=_once, parse_constant=_no_constant)
_UNTRUSTED = json.JSONDecoder(object_pairs_hook=_once_without_handles, parse_constant=_no_constant)


def _read(data: bytes | bytearray, decoder: json.JSONDecoder) -> list[_Member]:
    problem = ""
    try:
        return list(_members(data.decode("utf-8"), decoder))
    except json.JSONDecodeError as error:
        problem = f"{error.msg} at character {error.pos}"
    except UnicodeDecodeError as error:
        problem = f"not UTF-8 at byte {error.start}"
    except ValueError:
        problem = "a number is too long"
    except RecursionError:
        problem = "nested too deep"
    raise RefusedError(400, f"the body is no JSON object: {problem}")  # without the error, which has the text


def _members(text: str, decoder: json.JSONDecoder) -> list[_Member]:
    place = _expect(text, _skip(text, 0), "{")
    members: dict[str, _Member] = {}
    if text[place : place + 1] == "}":
        place += 1
    else:
        while True:
            first = _expect(text, place, '"') - 1
            name, place = decoder.raw_decode(text, first)
            value, place = decoder.raw_decode(text, _expect(text, _skip(text, place), ":"))
            if name in members:
                raise _twice()
            members[name] = _Member(name, value, text[first:place])
            place = _skip(text, place)
            if text[place : place + 1] == "}":
                place += 1
                break
            place = _expect(text, place, ",")
    if _skip(text, place) != len(text):
        raise json.JSONDecodeError("Extra data", text, place)
    return list(members.values())


def _skip(text: str, place: int) -> int:
    found = _SPACE.match(text, place)
    return found.end() if found else place


def _expect(text: str, place: int, sign: str) -> int:
    """Where what follows a sign begins."""
    if text[place : place + 1] != sign:
        raise json.JSONDecodeError(f"Expecting {sign!r}", text, place)
    return _skip(text, place + 1) if sign != '"' else place + 1
