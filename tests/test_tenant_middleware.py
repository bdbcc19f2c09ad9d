"""The middleware: whoever asks, the engine sees the salt of the authenticated caller's tenant, and what could get
around it is refused. The applications behind it here are plain ASGI ones, which tell what reached them."""

import asyncio
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scx.vllm.body import Body, RefusedError
from scx.vllm.master import write_master
from scx.vllm.middleware import Settings, TenantMiddleware
from scx.vllm.registry import edited
from scx.vllm.routes import SALTED, TEXT_ALONE, route_of, treatment
from scx.vllm.tenants import Keyring

COMPLETIONS = "/v1/completions"
JSON = (b"content-type", b"application/json")
Message = dict[str, Any]
FINITE = st.floats(allow_nan=False, allow_infinity=False)


class Answer(NamedTuple):
    status: int | None
    headers: dict[bytes, bytes]
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        return json.loads(self.body)["error"]


class Behind:
    """An application that answers 200 and keeps what came, as a server that reads bodies by their length would."""

    def __init__(self) -> None:
        self.scopes: list[dict[str, Any]] = []
        self.bodies: list[bytes] = []
        self.after: list[Message] = []

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        self.scopes.append(scope)
        if scope["type"] != "http":
            await send({"type": "it came", "of": scope["type"]})
            return
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message["body"], message["more_body"]
        self.bodies.append(body)
        self.after.append(await receive())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"generated"})

    @property
    def salt(self) -> str:
        return json.loads(self.bodies[-1])["cache_salt"]


class Server:
    """The middleware around an application, as a server would call it."""

    def __init__(self) -> None:
        self.behind = Behind()
        self.app = TenantMiddleware(self.behind)

    def call(self, scope: dict[str, Any], *messages: Message) -> list[Message]:
        sent: list[Message] = []
        pending = list(messages)

        async def receive() -> Message:
            return pending.pop(0) if pending else {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            sent.append(message)

        asyncio.run(self.app(scope, receive, send))
        return sent

    def post(
        self,
        body: Any = None,
        credential: str | None = "sk-alice",
        path: str = COMPLETIONS,
        headers: tuple[tuple[bytes, bytes], ...] | None = (JSON,),
        chunks: int = 1,
        method: str = "POST",
        **scope: Any,
    ) -> Answer:
        data = body if isinstance(body, bytes) else json.dumps({"prompt": "x"} if body is None else body).encode()
        listed = list(headers or ())
        if credential is not None:
            listed.append((b"authorization", b"Bearer " + credential.encode()))
        step = max(1, -(-len(data) // chunks))
        parts = [data[i : i + step] for i in range(0, len(data), step)] or [b""]
        messages = [{"type": "http.request", "body": x, "more_body": i + 1 < len(parts)} for i, x in enumerate(parts)]
        sent = self.call({"type": "http", "method": method, "path": path, "headers": listed, **scope}, *messages)
        if not sent:
            return Answer(None, {}, b"")
        return Answer(sent[0]["status"], dict(sent[0]["headers"]), b"".join(x.get("body", b"") for x in sent))


@pytest.fixture
def ring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Keyring]:
    for name in list(os.environ):
        if name.startswith("SCX_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("SCX_MASTER_KEY_FILE", str(write_master(tmp_path / "master")))
    return Keyring.from_environment()


@pytest.fixture
def server(ring: Keyring) -> Server:
    return Server()


@pytest.fixture
def registered(ring: Keyring, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Server, Keyring, str]:
    """A server with a registry, its keys, and alice's API key."""
    monkeypatch.setenv("SCX_TENANTS_FILE", str(tmp_path / "tenants.json"))
    with edited(tmp_path / "tenants.json") as registry:
        credential = registry.add("alice")
    return Server(), Keyring.from_environment(), credential


class TestWhoAsks:
    def test_the_salt_is_the_callers(self, server, ring) -> None:
        for credential in ("sk-alice", "sk-bob"):
            assert server.post(credential=credential).status == 200
            assert ring.read_salt(server.behind.salt) == ring.of_credential(credential)

    def test_a_body_cannot_name_another(self, server, ring) -> None:
        """Not even with another's whole salt, which may be seen."""
        bobs = ring.salt(ring.of_credential("sk-bob"))
        for told in (bobs, "sk-bob", bobs.split(".")[1]):
            assert server.post({"prompt": "x", "cache_salt": told}).status == 200
            assert ring.read_salt(server.behind.salt) == ring.of_credential("sk-alice")
            assert server.behind.salt == ring.salt(ring.of_credential("sk-alice"), told)

    def test_what_a_caller_told_separates_within_the_tenant(self, server) -> None:
        salts = []
        for body in ({}, {"cache_salt": None}, {"cache_salt": "1"}, {"cache_salt": "2"}):
            server.post(body)
            salts.append(server.behind.salt)
        assert salts[0] == salts[1]
        assert len(set(salts)) == 3

    @pytest.mark.parametrize("path", sorted(SALTED))
    def test_every_route_that_takes_one(self, server, ring, path) -> None:
        assert server.post(path=path).status == 200
        assert ring.read_salt(server.behind.salt) == ring.of_credential("sk-alice")

    @pytest.mark.parametrize(
        "headers",
        [
            (),
            ((b"authorization", b""),),
            ((b"authorization", b"Bearer"),),
            ((b"authorization", b"Bearer "),),
            ((b"authorization", b"Basic c2s="),),
            ((b"authorization", b"sk-alice"),),
            ((b"authorization", b"Bearer a"), (b"Authorization", b"Bearer b")),
            ((b"authorization", b"Bearer \xff"),),
            ((b"authorization", b"Bearer " + b"a" * 5000),),
            ((b"x-api-key", b"sk-alice"),),
        ],
    )
    def test_nobody(self, server, headers) -> None:
        for path in (COMPLETIONS, "/tokenize"):
            answer = server.post(credential=None, headers=(JSON, *headers), path=path)
            assert answer.status == 401
            assert answer.error == {
                "message": "expected an API key as a bearer token", "type": "AuthenticationError", "param": None,
                "code": 401,
            }  # fmt: skip
            assert answer.headers[b"www-authenticate"] == b"Bearer"
        assert not server.behind.bodies

    def test_the_scheme_is_read_as_vllm_reads_it(self, server, ring) -> None:
        server.post(credential=None, headers=(JSON, (b"AUTHORIZATION", b"bEARER sk-alice")))
        assert ring.read_salt(server.behind.salt) == ring.of_credential("sk-alice")

    def test_with_a_registry_strangers_are_nobody(self, registered) -> None:
        server, keys, credential = registered
        assert server.post(credential="sk-alice").status == 401
        assert server.post(credential="alice").status == 401
        assert server.post(credential=credential).status == 200
        assert keys.read_salt(server.behind.salt) == keys.named("alice")

    def test_who_is_forgotten_is_nobody_at_once(self, registered, tmp_path) -> None:
        server, _, credential = registered
        with edited(tmp_path / "tenants.json") as registry:
            registry.forget("alice")
        assert server.post(credential=credential).status == 401

    def test_while_the_registry_cannot_be_read(self, registered, tmp_path) -> None:
        server, _, credential = registered
        (tmp_path / "tenants.json").write_text("{")
        answer = server.post(credential=credential)
        assert (answer.status, answer.error["message"]) == (503, "the tenants cannot be read now")
        assert not server.behind.bodies


class TestAProxysHeader:
    @pytest.fixture
    def proxied(self, ring, monkeypatch) -> Server:
        monkeypatch.setenv("SCX_TENANT_HEADER", "X-Tenant")
        return Server()

    def test_it_names_the_tenant(self, proxied, ring) -> None:
        for name in (b"x-tenant", b"X-TENANT"):
            assert proxied.post(headers=(JSON, (name, b"alice"))).status == 200
            assert ring.read_salt(proxied.behind.salt) == ring.named("alice")

    def test_no_api_key_is_looked_at(self, proxied) -> None:
        assert proxied.post(credential="alice").status == 401
        assert proxied.post(credential=None, headers=(JSON, (b"x-tenant", b"alice"))).status == 200

    @pytest.mark.parametrize("values", [[b""], [b"alice", b"bob"], [b"alice", b"alice"], [b"\xff"], [b"a" * 5000]])
    def test_two_or_none(self, proxied, values) -> None:
        """A proxy that adds its header to the caller's own has not taken that out."""
        answer = proxied.post(headers=(JSON, *((b"x-tenant", value) for value in values)))
        assert (answer.status, answer.error["message"]) == (401, "expected a tenant's name, set by the proxy")

    def test_without_the_setting_it_says_nothing(self, server, ring) -> None:
        server.post(headers=(JSON, (b"x-tenant", b"bob")))
        assert ring.read_salt(server.behind.salt) == ring.of_credential("sk-alice")

    def test_with_a_registry(self, registered, monkeypatch) -> None:
        monkeypatch.setenv("SCX_TENANT_HEADER", "x-tenant")
        server, keys = Server(), registered[1]
        assert server.post(headers=(JSON, (b"x-tenant", b"alice"))).status == 200
        assert keys.read_salt(server.behind.salt) == keys.named("alice")
        assert server.post(headers=(JSON, (b"x-tenant", b"bob"))).status == 401


class TestBodies:
    def test_all_else_stays_as_it_came(self, server) -> None:
        """Numbers that no float has, their spelling, escapes, order, and the space inside of values."""
        text = (
            '\t{"seed":12345678901234567890123456789, "temperature" : 0.10000000000000000000000001,\n'
            '"top_p":1E-2,"prompt":"\\u00e9\\ud83d\\ude00\\ud800 é","cache_salt":"told",  "z":[1.0,1.00,-0],'
            '"a":{"b":  null},"":true}'
        )
        server.post(text.encode())
        sent = server.behind.bodies[-1].decode()
        salt = server.behind.salt
        assert sent == (
            '{"seed":12345678901234567890123456789, "temperature" : 0.10000000000000000000000001, "top_p":1E-2, '
            '"prompt":"\\u00e9\\ud83d\\ude00\\ud800 é", "cache_salt": "' + salt + '", "z":[1.0,1.00,-0], '
            '"a":{"b":  null}, "":true}'
        )

    @given(
        st.dictionaries(
            st.text(max_size=5) | st.just("cache_salt"),
            st.recursive(
                st.none()
                | st.booleans()
                | st.integers()
                | st.floats(allow_nan=False, allow_infinity=False)
                | st.text(),
                lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
                max_leaves=8,
            ),
            max_size=5,
        ),
        st.booleans(),
    )
    def test_any_body(self, tree, ascii_alone) -> None:
        """What the engine parses is what was sent, but for the salt."""
        sent = json.dumps(tree, ensure_ascii=ascii_alone).encode("utf-8", "replace")
        expected = json.loads(sent)
        salted = json.loads(Body(sent, trusted=True).salted("a salt"))
        assert list(salted) == list(expected) if "cache_salt" in expected else [*expected, "cache_salt"]
        assert salted == {**expected, "cache_salt": "a salt"}

    @pytest.mark.parametrize("spelled", ["cache_salt", "cache\\u005fsalt", "\\u0063ache_salt"])
    def test_however_its_name_is_spelled(self, server, spelled) -> None:
        server.post(b'{"prompt": "x", "%s": "told"}' % spelled.encode())
        assert server.behind.bodies[-1].count(b"salt") == 1
        assert b"told" not in server.behind.bodies[-1]

    @pytest.mark.parametrize(
        "body",
        [
            b'{"cache_salt": "a", "cache_salt": "b"}',
            b'{"cache_salt": "a", "cache\\u005fsalt": "b"}',
            b'{"a": 1, "b": 2, "a": 3}',
            b'{"messages": [{"role": "user", "role": "system"}]}',
        ],
    )
    def test_a_member_twice(self, server, body) -> None:
        """Of two, readers would take different ones."""
        answer = server.post(body)
        assert answer.status == 400
        assert "two members of an object have one name" in answer.error["message"]

    @pytest.mark.parametrize(
        "body",
        [
            b"", b" ", b"[]", b"null", b"1", b'"{}"', b"{", b'{"a"', b'{"a":', b'{"a":1', b'{"a":1,', b'{"a":1,}',
            b"{,}", b"{1:2}", b'{"a" 1}', b'{"a":1 "b":2}', b"{}{}", b"{}x", b"{} \x00", b"{'a':1}", b'{"a":NaN}',
            b'{"a":[Infinity]}', b'{"a":-Infinity}', b'{"a":01}', b'{"a":"\n"}', b'{"a":"\\x"}', b"\xef\xbb\xbf{}",
            b'{"a":"\xff"}', b"{}\xff", '{"a":1}'.encode("utf-16"), '{"a":1}'.encode("utf-32-le"), b'{"a":\xa01}',
            b'{"a":' + b"9" * 5000 + b"}",
            b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", b'{"a":"\xed\xa0\x80"}', b"// a comment\n{}",
        ],
    )  # fmt: skip
    def test_no_such_json(self, server, body) -> None:
        answer = server.post(body)
        assert answer.status == 400
        assert answer.error["message"].startswith("the body is no JSON")
        assert len(answer.error["message"]) < 200
        assert not server.behind.bodies

    @pytest.mark.parametrize("told", ["", 5, True, [], {}, "a" * 129, "a@b", "a/b", "a\\b", "a\0b", "\ud800"])
    def test_a_salt_that_vllm_would_refuse(self, server, told) -> None:
        answer = server.post({"cache_salt": told})
        assert (answer.status, answer.error["param"]) == (400, "cache_salt")

    @pytest.mark.parametrize("size", [1, 2, 7, 1000])
    def test_in_pieces(self, server, size) -> None:
        server.post({"prompt": "a" * 1000}, chunks=size)
        assert json.loads(server.behind.bodies[-1])["prompt"] == "a" * 1000

    def test_its_length_is_told_anew(self, server) -> None:
        for headers in ((JSON, (b"Content-Length", b"13")), (JSON, (b"Transfer-Encoding", b"chunked")), (JSON,)):
            assert server.post(b'{"prompt":""}', headers=headers).status == 200
            told = [
                x
                for x in server.behind.scopes[-1]["headers"]
                if x[0].lower() in (b"content-length", b"transfer-encoding")
            ]
            assert told == [(b"content-length", str(len(server.behind.bodies[-1])).encode())]

    @pytest.mark.parametrize(
        "lengths", [[b"12"], [b"14"], [b"-1"], [b"1e3"], [b"\xb2"], [b"13", b"13"], [b""], [b"9" * 30]]
    )
    def test_a_length_that_lies(self, server, lengths) -> None:
        answer = server.post(b'{"prompt":""}', headers=(JSON, *((b"content-length", x) for x in lengths)))
        assert answer.status == 400
        assert not server.behind.bodies

    def test_one_too_long(self, ring, monkeypatch) -> None:
        monkeypatch.setenv("SCX_MAX_BODY_BYTES", "100")
        server = Server()
        assert server.post(b'{"prompt": "%s"}' % (b"a" * 80)).status == 200
        for body, headers in ((b"a" * 101, (JSON,)), (b"", (JSON, (b"content-length", b"101")))):
            answer = server.post(body, headers=headers, chunks=11)
            assert (answer.status, answer.error["message"]) == (413, "expected a body of at most 100 bytes")

    def test_one_without_end_is_not_kept(self, ring, monkeypatch) -> None:
        monkeypatch.setenv("SCX_MAX_BODY_BYTES", "1000")
        server, taken = Server(), 0
        sent: list[Message] = []

        async def receive() -> Message:
            nonlocal taken
            taken += 100
            return {"type": "http.request", "body": b"a" * 100, "more_body": True}

        async def send(message: Message) -> None:
            sent.append(message)

        headers = [JSON, (b"authorization", b"Bearer a")]
        asyncio.run(
            server.app({"type": "http", "method": "POST", "path": COMPLETIONS, "headers": headers}, receive, send)
        )
        assert sent[0]["status"] == 413
        assert taken == 1100

    @pytest.mark.parametrize(
        "headers",
        [
            (), ((b"content-type", b"text/plain"),), ((b"content-type", b"application/json-patch+json"),),
            ((b"content-type", b"multipart/form-data; boundary=x"),), (JSON, (b"content-type", b"text/plain")),
            ((b"content-type", b"application/xml"),), ((b"content-type", b" application/json"),),
            (JSON, (b"content-encoding", b"gzip")),
            (JSON, (b"content-encoding", b"identity"), (b"Content-Encoding", b"br")),
        ],
    )  # fmt: skip
    def test_another_type_or_encoding(self, server, headers) -> None:
        assert server.post(headers=headers).status == 415
        assert not server.behind.bodies

    def test_types_that_vllm_takes(self, server) -> None:
        for kind in (b"application/json; charset=utf-8", b"Application/JSON", b"application/json;"):
            assert server.post(headers=((b"Content-Type", kind), (b"content-encoding", b"identity"))).status == 200

    @pytest.mark.parametrize("pieces", [[], [b'{"prompt"'], [b'{"prompt": "x"}']])
    def test_a_caller_who_leaves(self, server, pieces) -> None:
        """In the middle of a body: nothing is generated, and nobody answered."""
        messages = [{"type": "http.request", "body": x, "more_body": True} for x in pieces]
        headers = [JSON, (b"authorization", b"Bearer a")]
        scope = {"type": "http", "method": "POST", "path": COMPLETIONS, "headers": headers}
        assert server.call(scope, *messages, {"type": "http.disconnect"}) == []
        assert not server.behind.scopes

    def test_that_a_caller_leaves_later_is_passed_on(self, server) -> None:
        server.post()
        assert server.behind.after == [{"type": "http.disconnect"}]


class TestWhatCallersMayNotSay:
    @pytest.mark.parametrize(
        "params",
        [
            {"remote_prefiller": {"kv_request_id": "1", "remote_host": "10.0.0.1", "remote_port": 80}},
            {"remote_kv_source": {"kv_request_id": "1", "remote_host": "10.0.0.1", "remote_port": 80}},
            {"remote_decoder": {"kv_request_id": "1"}},
            {"do_remote_prefill": True},
            {"do_remote_decode": True, "max_load_tokens": 1},
            {"prompt_token_ids": [1, 2]},
            {"kv_request_id": "1"},
            {"": 1},
        ],
    )
    def test_peers(self, server, params) -> None:
        answer = server.post({"prompt": "x", "kv_transfer_params": params})
        assert (answer.status, answer.error["param"]) == (403, "kv_transfer_params")
        assert not server.behind.bodies

    @pytest.mark.parametrize(
        "params",
        [None, {}, {"max_load_tokens": 0, "max_offload_tokens": 100}, {"kv_load_tiers": []},
         {"kv_load_tiers": [{"medium": "CPU"}, {"locality": "LOCAL", "medium": None}, {}]}],
    )  # fmt: skip
    def test_how_much_is_theirs_to_say(self, server, params) -> None:
        assert server.post({"prompt": "x", "kv_transfer_params": params}).status == 200
        assert json.loads(server.behind.bodies[-1])["kv_transfer_params"] == params

    @pytest.mark.parametrize(
        "params",
        ["text", [], 1, {"max_load_tokens": -1}, {"max_load_tokens": True}, {"max_offload_tokens": 1.5},
         {"max_load_tokens": None}, {"kv_load_tiers": "CPU"}, {"kv_load_tiers": [{"medium": {}}]},
         {"kv_load_tiers": ["CPU"]}, {"kv_load_tiers": [{"host": "x"}]}, {"kv_load_tiers": [{}] * 17}],
    )  # fmt: skip
    def test_in_its_form(self, server, params) -> None:
        """vLLM's scheduler takes what comes: of a text, it would look for members and die."""
        answer = server.post({"prompt": "x", "kv_transfer_params": params})
        assert answer.status == 400
        assert answer.error["param"].startswith("kv_transfer_params")

    @pytest.mark.parametrize(
        ("body", "parameter"),
        [
            ({"vllm_xargs": {"kv_transfer_params": "a"}}, "vllm_xargs.kv_transfer_params"),
            ({"vllm_xargs": {"ec_transfer_params": 1}}, "vllm_xargs.ec_transfer_params"),
            (
                {"sampling_params": {"extra_args": {"kv_transfer_params": {"remote_decoder": {}}}}},
                "sampling_params.extra_args.kv_transfer_params",
            ),
            (
                {"sampling_params": {"extra_args": {"ec_transfer_params": None}}},
                "sampling_params.extra_args.ec_transfer_params",
            ),
            ({"ec_transfer_params": {}}, "ec_transfer_params"),
            ({"previous_response_id": "resp_1"}, "previous_response_id"),
            ({"features": {"mm_hashes": {"image": ["a"]}}}, "features"),
            (
                {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": None, "uuid": "a"}]}]},
                "uuid",
            ),
            ({"messages": [[{"role": "user", "content": [{"input_audio": None, "uuid": 0}]}]]}, "uuid"),
            ({"content_parts": [{"type": "image_url", "url": None, "uuid": "a"}]}, "uuid"),
            ({"queries": [{"content": [{"video_url": {"url": "x"}, "uuid": "a"}]}]}, "uuid"),
        ],
    )
    @pytest.mark.parametrize("path", [COMPLETIONS, "/inference/v1/generate", "/v1/chat/completions/render"])
    def test_nor_by_another_way(self, server, path, body, parameter) -> None:
        answer = server.post(body, path=path)
        assert (answer.status, answer.error["param"]) == (403, parameter)
        assert answer.error["type"] == "PermissionDeniedError"
        assert not server.behind.bodies

    def test_what_only_looks_like_it(self, server) -> None:
        bodies: list[dict[str, Any]] = [
            {"tools": [{"function": {"parameters": {"type": "object", "properties": {"uuid": {"type": "string"}}}}}]},
            {"messages": [{"content": [{"type": "tool_use", "input": {"uuid": "a"}}]}]},
            {"messages": [{"content": [{"type": "image_url", "image_url": {"url": "x"}, "uuid": None}]}]},
            {"messages": [{"content": [{"type": ["image_url"], "uuid": "a"}]}]},
            {"vllm_xargs": {"other": 1}, "sampling_params": {"extra_args": None}, "previous_response_id": None},
            {"vllm_xargs": 1, "sampling_params": []},
        ]
        for body in bodies:
            assert server.post(body).status == 200

    def test_an_operators_router_may(self, ring, monkeypatch) -> None:
        monkeypatch.setenv("SCX_TRUSTED_ROUTER", "1")
        server = Server()
        params = {"remote_decoder": {"kv_request_id": "1"}}
        assert server.post({"kv_transfer_params": params, "features": {}}).status == 200
        assert json.loads(server.behind.bodies[-1])["kv_transfer_params"] == params
        assert ring.read_salt(server.behind.salt) == ring.of_credential("sk-alice")
        assert server.post(b'{"a": 1, "a": 1}').status == 400


class TestRoutes:
    @pytest.mark.parametrize("path", sorted(TEXT_ALONE))
    def test_text_alone_passes_as_it_is(self, server, path) -> None:
        sent = b' {"prompt":"x", "cache_salt":"told"}'
        assert server.post(sent, path=path).status == 200
        assert server.behind.bodies == [sent]

    @pytest.mark.parametrize(
        "path",
        [
            "/v2/embed", "/cohere/v2/chat", "/v1/audio/transcriptions", "/v1/audio/translations",
            "/inference/v1/abort_requests", "/abort_requests", "/v1/load_lora_adapter", "/collective_rpc", "/sleep",
            "/v1/responses/resp_1/cancel", "/v1/completions/", "//v1/completions", "/V1/completions",
            "/v1/completions%20", "/v1/../v1/completions", "/v1/completions;x", "", "/", "/v1/a_new_route",
            "/start_profile",
        ],
    )  # fmt: skip
    def test_all_else_is_closed(self, server, path) -> None:
        answer = server.post(path=path)
        assert answer.status == 403
        assert "SCX_OPEN_PATHS" in answer.error["message"]
        assert not server.behind.scopes

    @pytest.mark.parametrize("method", ["PUT", "PATCH", "DELETE", "TRACE", "QUERY", "post"])
    def test_other_methods_are_closed(self, server, method) -> None:
        assert server.post(method=method).status == 403

    @pytest.mark.parametrize("path", ["/health", "/metrics", "/v1/models", "/version", COMPLETIONS])
    def test_what_reads_passes(self, server, path) -> None:
        for method in ("GET", "HEAD", "OPTIONS"):
            assert server.post(b"", None, path, headers=None, method=method).status == 200
        assert server.behind.bodies == [b""] * 3

    def test_stored_responses_are_closed(self, server) -> None:
        """Whoever knows a response's name could read what another tenant generated."""
        for method in ("GET", "HEAD", "DELETE"):
            assert server.post(b"", path="/v1/responses/resp_1", method=method).status == 403

    def test_an_operator_opens_them(self, ring, monkeypatch) -> None:
        monkeypatch.setenv("SCX_OPEN_PATHS", "/sleep,/v1/realtime,")
        server = Server()
        sent = b"not even JSON"
        assert server.post(sent, None, "/sleep", headers=None).status == 200
        assert server.behind.bodies == [sent]
        assert server.post(path="/wake_up").status == 403
        assert server.call({"type": "websocket", "path": "/v1/realtime"}) == [{"type": "it came", "of": "websocket"}]

    def test_web_sockets_are_closed(self, server) -> None:
        for path in ("/v1/realtime", COMPLETIONS, "/health"):
            sent = server.call({"type": "websocket", "path": path, "headers": []}, {"type": "websocket.connect"})
            assert [x["type"] for x in sent] == ["websocket.close"]
        assert not server.behind.scopes

    def test_below_a_root_path(self, server, ring) -> None:
        for path, root in (("/api/v1/completions", "/api"), (COMPLETIONS, "/api"), (COMPLETIONS, "")):
            assert server.post(path=path, root_path=root).status == 200
            assert ring.read_salt(server.behind.salt)
        assert server.post(path="/api/v1/completions").status == 403
        assert server.post(path="/apiv1/completions", root_path="/api").status == 403
        assert route_of("/apiv1/completions", "/api") == "/apiv1/completions"

    def test_other_protocols_pass(self, server) -> None:
        assert server.call({"type": "lifespan"}) == [{"type": "it came", "of": "lifespan"}]


class TestTheStart:
    WRONG: tuple[tuple[str, str | None], ...] = (
        ("SCX_MASTER_KEY_FILE", None), ("SCX_MASTER_KEY_FILE", "/none"), ("SCX_TENANTS_FILE", "/none"),
        ("SCX_TENANT_HEADER", "a b"), ("SCX_TENANT_HEADER", "Authorization"), ("SCX_MAX_BODY_BYTES", "0"),
        ("SCX_MAX_BODY_BYTES", "64M"), ("SCX_TRUSTED_ROUTER", "yes"), ("SCX_OPEN_PATHS", "sleep"),
    )  # fmt: skip

    @pytest.mark.parametrize(("variable", "value"), WRONG)
    def test_what_is_wrong_fails_it(self, ring, monkeypatch, caplog, variable, value) -> None:
        if value is None:
            monkeypatch.delenv(variable)
        else:
            monkeypatch.setenv(variable, value)
        with caplog.at_level(logging.ERROR):
            server = Server()
        assert variable in caplog.text
        sent = server.call({"type": "lifespan"}, {"type": "lifespan.startup"})
        assert [x["type"] for x in sent] == ["lifespan.startup.failed"]
        assert sent[0]["message"].startswith(f"{variable}: ")
        with pytest.raises(RuntimeError, match=variable):
            server.post()
        assert not server.behind.scopes

    def test_settings(self, ring, monkeypatch) -> None:
        assert Settings.from_environment() == Settings(None, 2**26, False, frozenset())
        monkeypatch.setenv("SCX_TENANT_HEADER", "X-Tenant")
        monkeypatch.setenv("SCX_MAX_BODY_BYTES", "10")
        monkeypatch.setenv("SCX_TRUSTED_ROUTER", "0")
        monkeypatch.setenv("SCX_OPEN_PATHS", "/a,/b")
        assert Settings.from_environment() == Settings("x-tenant", 10, False, frozenset({"/a", "/b"}))

    def test_it_needs_no_vllm(self) -> None:
        code = "import sys, scx.vllm.middleware; assert 'vllm' not in sys.modules"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


class TestErrorsShowNothing:
    def test_of_a_body(self) -> None:
        """Its text is the prompt."""
        prompt = "a prompt that nobody else may read"
        for text in ('{"prompt": "%s", }', '{"prompt": "%s", "a": 01}', '{"%s": 1, "a"}', '["%s"'):
            with pytest.raises(RefusedError) as raised:
                Body((text % prompt).encode())
            assert prompt not in str(raised.value)
            assert raised.value.__context__ is raised.value.__cause__ is None


def test_treatments_are_the_four() -> None:
    calls: list[Callable[[], str]] = [
        lambda: treatment("POST", COMPLETIONS),
        lambda: treatment("POST", "/tokenize"),
        lambda: treatment("POST", "/ping"),
        lambda: treatment("POST", "/score", {"/score"}),
        lambda: treatment("WEBSOCKET", COMPLETIONS),
    ]
    assert [call() for call in calls] == ["salt", "check", "pass", "pass", "refuse"]
