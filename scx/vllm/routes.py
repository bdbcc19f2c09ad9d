"""Which of vLLM's routes take a tenant's salt, and what becomes of the others. Of vLLM 0.32.

A route that runs the model without a salt would share blocks between tenants, so what is not listed here is refused,
until the operator opens it. Paths are compared whole: vLLM knows no second spelling of one.
"""

from collections.abc import Collection
from typing import Literal

__all__ = ["SALTED", "TEXT_ALONE", "Treatment", "route_of", "treatment"]

Treatment = Literal["salt", "check", "pass", "refuse"]

SALTED = frozenset(
    {
        "/v1/chat/completions",
        "/v1/chat/completions/batch",
        "/v1/completions",
        "/v1/responses",
        "/v1/messages",
        "/v1/systemone",
        "/inference/v1/generate",
        "/generative_scoring",
        "/invocations",
        "/pooling",
        "/classify",
        "/score",
        "/v1/score",
        "/rerank",
        "/v1/rerank",
        "/v2/rerank",
        "/v1/embeddings",
    }
)
"""The body of a POST has `cache_salt`, and the prompt gets it. `/invocations` takes the bodies of the others."""

TEXT_ALONE = frozenset(
    {
        "/tokenize",
        "/detokenize",
        "/v1/messages/count_tokens",
        "/v1/chat/completions/render",
        "/v1/completions/render",
        "/v1/messages/render",
        "/v1/responses/render",
        "/cohere/v2/chat/render",
        "/v1/chat/completions/derender",
        "/v1/completions/derender",
    }
)
"""Tokens from text and text from tokens: no model runs, no block is read. A salt in the body stays the caller's, who
may send what a render route answers to `/inference/v1/generate`, where it is keyed."""

_READING = frozenset({"GET", "HEAD", "OPTIONS"})


def treatment(method: str, path: str, opened: Collection[str] = ()) -> Treatment:
    """What is done with a request.

    "salt": its caller has to be a tenant, whose salt the body gets. "check": its caller has to be a tenant, and the
    body passes as it is. "pass": anybody's. "refuse": nobody's.

    Args:
        method: of HTTP, or "WEBSOCKET".
        path: `route_of` the request.
        opened: paths that the operator lets pass.
    """
    if path in opened:
        return "pass"
    if method in _READING:
        # What one caller generated is there for every caller who knows its name.
        return "refuse" if path.startswith("/v1/responses/") and method != "OPTIONS" else "pass"
    if method == "POST":
        if path in SALTED:
            return "salt"
        if path in TEXT_ALONE:
            return "check"
        if path == "/ping":  # /health by another name
            return "pass"
    return "refuse"


def route_of(path: str, root_path: str) -> str:
    """The path that vLLM's router sees, below `--root-path`: as starlette's `get_route_path` has it."""
    if root_path and path.startswith(root_path):
        rest = path[len(root_path) :]
        if not rest or rest[0] == "/":
            return rest
    return path
