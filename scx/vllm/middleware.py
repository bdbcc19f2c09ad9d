"""The tenant of a request is its authenticated caller: `vllm serve --middleware scx.vllm.middleware.TenantMiddleware`.

The middleware gives every body that reaches the model the salt of its caller's tenant; what the body had of its own
separates within the tenant. vLLM's own `--api-key` is checked inside of it, and refuses as ever.
"""

import json
import logging
import os
import re
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from dataclasses import dataclass
from typing import Any

from scx.vllm.body import Body, RefusedError
from scx.vllm.routes import route_of, treatment
from scx.vllm.tenants import Keyring, Tenant
from scx_kernels.hidden import guarded

__all__ = ["Settings", "TenantMiddleware"]

_Scope = MutableMapping[str, Any]
_Message = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Message]]
_Send = Callable[[_Message], Awaitable[None]]
_App = Callable[[_Scope, _Receive, _Send], Awaitable[None]]
_Headers = list[tuple[bytes, bytes]]

_LOG = logging.getLogger(__name__)
_HEADER = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_MAX_BODY_BYTES = 64 * 2**20
_MAX_CREDENTIAL = 4096
_FRAMING = (b"content-length", b"transfer-encoding")
_TYPES = {400: "BadRequestError", 401: "AuthenticationError", 403: "PermissionDeniedError", 503: "ServiceUnavailable"}


@dataclass(frozen=True)
class Settings:
    """What the middleware takes from the environment.

    Attributes:
        tenant_header: `SCX_TENANT_HEADER`: a header in which a proxy names the tenant, in lower case. No API key is
            looked at then, so the proxy MUST take the header out of what comes from outside.
        max_body_bytes: `SCX_MAX_BODY_BYTES`, 64 MiB if not given.
        trusted_router: `SCX_TRUSTED_ROUTER=1`: requests come from a router of the operator's, which may say where
            blocks come from and go to, and which MUST take that out of what callers send.
        opened: `SCX_OPEN_PATHS`: paths, with a comma between them, that pass as they are: for anybody, without a salt.
    """

    tenant_header: str | None = None
    max_body_bytes: int = _MAX_BODY_BYTES
    trusted_router: bool = False
    opened: frozenset[str] = frozenset()

    @classmethod
    def from_environment(cls) -> "Settings":
        """Raises: ValueError for a value of another form, with the variable's name."""
        header = os.environ.get("SCX_TENANT_HEADER", "")
        if header and (not _HEADER.fullmatch(header) or header.lower() in ("authorization", "content-length", "host")):
            raise ValueError(f"SCX_TENANT_HEADER: expected the name of a header of its own, got {header!r:.100}")
        size = os.environ.get("SCX_MAX_BODY_BYTES", str(_MAX_BODY_BYTES))
        if not re.fullmatch(r"[1-9][0-9]{0,14}", size):
            raise ValueError(f"SCX_MAX_BODY_BYTES: expected a number of bytes, at least 1, got {size!r:.100}")
        trusted = os.environ.get("SCX_TRUSTED_ROUTER", "")
        if trusted not in ("", "0", "1"):
            raise ValueError(f"SCX_TRUSTED_ROUTER: expected 0 or 1, got {trusted!r:.100}")
        opened = [path for path in os.environ.get("SCX_OPEN_PATHS", "").split(",") if path]
        for path in opened:
            if not path.startswith("/"):
                raise ValueError(f"SCX_OPEN_PATHS: expected paths from / with commas between, got {path!r:.100}")
        return cls(header.lower() or None, int(size), trusted == "1", frozenset(opened))


class TenantMiddleware:
    """An ASGI application around another one.

    Args:
        app: the other one.

    The environment is read when it is made: keys as `Keyring.from_environment` does, the rest as `Settings` says. What
    is wrong there fails the server's start by ASGI's lifespan protocol, with the remedy in the log: a server takes an
    application that raises for one without that protocol, and would go on.
    """

    def __init__(self, app: _App) -> None:
        self._app = app
        self._refusal: str | None = None
        try:
            self._settings = Settings.from_environment()
            self._keyring = Keyring.from_environment()
        except (OSError, ValueError) as error:
            self._refusal = str(error)
            _LOG.error("%s", self._refusal)

    async def __call__(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        kind = scope["type"]
        if self._refusal is not None:
            if kind != "lifespan":
                raise RuntimeError(self._refusal)
            await receive()
            await send({"type": "lifespan.startup.failed", "message": self._refusal})
        elif kind == "http":
            await self._serve(scope, receive, send)
        elif kind == "websocket" and self._treatment(scope, "WEBSOCKET") != "pass":
            await receive()  # the wish to connect
            await send({"type": "websocket.close", "code": 1008, "reason": "takes no tenant's salt"})
        else:
            await self._app(scope, receive, send)

    def _treatment(self, scope: _Scope, method: str) -> str:
        return treatment(method, route_of(scope["path"], scope.get("root_path", "")), self._settings.opened)

    async def _serve(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        try:
            match self._treatment(scope, scope["method"]):
                case "refuse":
                    raise RefusedError(
                        403, "this route keeps no tenants apart and is closed; an operator opens it by SCX_OPEN_PATHS"
                    )
                case "salt" | "check" as how:
                    tenant = self._tenant(scope["headers"])
                    data = await self._read(scope["headers"], receive)
                    if data is None:  # nobody is there to be answered
                        return
                    body = Body(data, self._settings.trusted_router)
                    passed = body.salted(self._keyring.salt(tenant, body.told)) if how == "salt" else bytes(data)
                    scope = {**scope, "headers": _with_length(scope["headers"], len(passed))}
                    receive = _replayed(passed, receive)
        except RefusedError as refusal:
            await _answer(send, refusal)
            return
        await self._app(scope, receive, send)

    @guarded
    def _tenant(self, headers: _Headers) -> Tenant:
        """Raises: RefusedError(401) for a caller who is none, RefusedError(503) while nobody is."""
        name = self._settings.tenant_header
        if name is None:
            found = self._keyring.of_credential(_bearer(_values(headers, b"authorization")))
            wanted = "an API key as a bearer token"
        else:
            found = self._keyring.named(_one(_values(headers, name.encode())))
            wanted = "a tenant's name, set by the proxy"
        if found is None:
            if self._keyring.problem:
                raise RefusedError(503, "the tenants cannot be read now")
            raise RefusedError(401, f"expected {wanted}")
        return found

    async def _read(self, headers: _Headers, receive: _Receive) -> bytearray | None:
        """The body; None if the caller went away before its end."""
        limit = self._settings.max_body_bytes
        length = _check_head(headers, limit)
        data = bytearray()
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            data += message.get("body", b"")
            if len(data) > limit:
                raise _too_large(limit)
            more = message.get("more_body", False)
        if length is not None and length != len(data):
            raise RefusedError(400, f"the body has {len(data)} bytes, and its header says {length}")
        return data


def _check_head(headers: _Headers, limit: int) -> int | None:
    """What is said of a body before it comes. Returns its length, if that is said."""
    media = [value.split(b";", 1)[0].lower() for value in _values(headers, b"content-type")]
    if media != [b"application/json"]:
        raise RefusedError(415, "expected content-type application/json")
    if any(value.strip().lower() not in (b"", b"identity") for value in _values(headers, b"content-encoding")):
        raise RefusedError(415, "expected a body without content-encoding")
    lengths = _values(headers, b"content-length")
    if not lengths:
        return None
    if len(lengths) > 1 or not re.fullmatch(rb"[0-9]{1,18}", lengths[0]):
        raise RefusedError(400, "expected one content-length, a number of bytes")
    if int(lengths[0]) > limit:
        raise _too_large(limit)
    return int(lengths[0])


def _too_large(limit: int) -> RefusedError:
    return RefusedError(413, f"expected a body of at most {limit} bytes")


def _values(headers: _Headers, name: bytes) -> list[bytes]:
    return [value for key, value in headers if key.lower() == name]


def _one(values: Iterable[bytes]) -> str:
    """The one value of a header; empty if there is none, or more than one, or one that is no text or too long: of two,
    readers would take different ones."""
    listed = list(values)
    if len(listed) != 1 or len(listed[0]) > _MAX_CREDENTIAL:
        return ""
    try:
        return listed[0].decode("utf-8")
    except UnicodeDecodeError:
        return ""


def _bearer(values: Iterable[bytes]) -> str:
    """As vLLM's own check reads it."""
    scheme, _, credential = _one(values).partition(" ")
    return credential if scheme.lower() == "bearer" else ""


def _with_length(headers: _Headers, length: int) -> _Headers:
    kept = [(name, value) for name, value in headers if name.lower() not in _FRAMING]
    return [*kept, (b"content-length", str(length).encode())]


def _replayed(data: bytes, receive: _Receive) -> _Receive:
    """A body that was read, once more; and then whatever comes, which is the caller's leaving."""
    pending: list[_Message] = [{"type": "http.request", "body": data, "more_body": False}]

    async def replay() -> _Message:
        return pending.pop() if pending else await receive()

    return replay


async def _answer(send: _Send, refusal: RefusedError) -> None:
    """In OpenAI's form of an error, as vLLM's own are."""
    status = refusal.status
    error = {
        "message": str(refusal),
        "type": _TYPES.get(status, "BadRequestError"),
        "param": refusal.parameter,
        "code": status,
    }
    data = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": data})
