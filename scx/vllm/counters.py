"""What is counted, and under which names. A tenant is counted by its kind, never by its name or id."""

__all__ = ["COUNTERS", "PREFIX"]

PREFIX = "scx:kv_"
_KIND = ("tenant_kind",)
COUNTERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "scx:kv_blocks_sealed": ("Device blocks sealed on their way into host memory, of each rank.", _KIND),
    "scx:kv_blocks_opened": ("Device blocks that came back from host memory and authenticated, of each rank.", _KIND),
    "scx:kv_blocks_refused": ("Device blocks that did not authenticate; they are computed anew.", _KIND),
    "scx:kv_sealed_bytes": ("Bytes of K and V sealed.", _KIND),
    "scx:kv_opened_bytes": ("Bytes of K and V opened.", _KIND),
    "scx:kv_seal_seconds": ("Seconds from a store's begin to its end, of each rank.", _KIND),
    "scx:kv_open_seconds": ("Seconds from a load's begin to its end, of each rank.", _KIND),
    "scx:kv_requests_without_tenant": ("Requests that nobody vouched for: nothing of them is kept or found.", ()),
}
"""Name -> what it counts, and its labels. Prometheus adds `_total`."""
