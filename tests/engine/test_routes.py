"""What the middleware knows of vLLM is so in the installed one: a route that a new vLLM adds fails here until it is in
a list."""

import importlib
import os
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_COHERE_API"] = "1"

import pytest
import vllm.entrypoints
from fastapi import APIRouter
from pydantic import TypeAdapter
from starlette._utils import get_route_path
from vllm.distributed.kv_transfer.kv_connector.v1.offloading import scheduler
from vllm.entrypoints.generate.base.protocol import validate_cache_salt

from scx.keystream import Secret
from scx.vllm import body
from scx.vllm.routes import SALTED, TEXT_ALONE, route_of
from scx.vllm.tenants import Keyring

CLOSED = frozenset(
    {
        "/v2/embed", "/cohere/v2/chat", "/v1/audio/transcriptions", "/v1/audio/translations", "/v1/realtime",
        "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/adapters", "/adapters/{adapter_name}",
        "/v1/responses/{response_id}/cancel", "/inference/v1/abort_requests", "/abort_requests", "/scale_elastic_ep",
        "/is_scaling_elastic_ep", "/fault_tolerance/apply", "/start_profile", "/stop_profile", "/reset_prefix_cache",
        "/reset_mm_cache", "/reset_encoder_cache", "/collective_rpc", "/sleep", "/wake_up", "/release_kv_cache_memory",
        "/pause", "/resume", "/init_weight_transfer_engine", "/shutdown_weight_transfer_engine",
        "/start_weight_update", "/start_draft_weight_update", "/update_weights", "/finish_weight_update",
        "/update_weight_version", "/weight_checker",
    }
)  # fmt: skip
"""What the middleware refuses."""

AT_START = frozenset(
    {
        "/invocations", "/ping", "/adapters", "/adapters/{adapter_name}", "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter", "/cohere/v2/chat", "/cohere/v2/chat/render",
    }
)  # fmt: skip
"""What a server adds when it starts, or a package that need not be there; no router has it now."""


@pytest.fixture(scope="module")
def routes() -> dict[str, Any]:
    """Path to route, of all that do more than read."""
    root = Path(vllm.entrypoints.__path__[0])
    found: dict[str, Any] = {}
    for file in sorted(root.rglob("api_router.py")):
        module = importlib.import_module(".".join(("vllm.entrypoints", *file.relative_to(root).with_suffix("").parts)))
        for router in [x for x in vars(module).values() if isinstance(x, APIRouter)]:
            for route in router.routes:
                if (getattr(route, "methods", None) or {"WEBSOCKET"}) - {"GET", "HEAD"}:
                    found[route.path] = route
    return found


def test_each_is_in_a_list(routes) -> None:
    known = SALTED | TEXT_ALONE | CLOSED | {"/ping"}
    assert set(routes) - known == set()
    assert known - set(routes) <= AT_START
    assert not (SALTED | TEXT_ALONE) & CLOSED


@pytest.mark.parametrize("path", sorted(SALTED - {"/invocations"}))
def test_what_gets_a_salt_takes_one(routes, path) -> None:
    """In every form that its body may have."""
    schema = TypeAdapter(routes[path].endpoint.__annotations__["request"]).json_schema()
    forms = schema.get("anyOf") or [schema]
    bodies = [schema["$defs"][x["$ref"].rpartition("/")[2]] if "$ref" in x else x for x in forms]
    assert bodies
    for each in bodies:
        assert each["properties"]["cache_salt"]["anyOf"][0]["type"] == "string"


def test_what_is_closed_for_want_of_one_takes_none(routes) -> None:
    schema = TypeAdapter(routes["/v2/embed"].endpoint.__annotations__["request"]).json_schema()
    assert "cache_salt" not in schema["properties"]


def test_paths_are_read_as_the_router_reads_them() -> None:
    for root in ("", "/api", "/v1", "/v1/completions"):
        for path in ("/v1/completions", "/api/v1/completions", "/apiv1", "/api", "/api/", "/v1", ""):
            assert route_of(path, root) == get_route_path({"type": "http", "path": path, "root_path": root})


def test_a_salt_is_one_that_vllm_takes() -> None:
    ring = Keyring(Secret())
    validate_cache_salt(ring.salt(ring.named("a"), "told"))


def test_what_callers_may_set_is_the_off_loading_connectors() -> None:
    assert body._TIERS == scheduler.KV_LOAD_TIERS_KEY
    source = Path(scheduler.__file__).read_text()
    for name in body._COUNTS:
        assert f'params.get("{name}")' in source
