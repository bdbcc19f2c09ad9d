"""The dashboard, and which metrics of vLLM's it may ask for."""

import json
import re
from pathlib import Path
from typing import Any

__all__ = ["DASHBOARD", "VLLMS_METRICS", "names_in"]

DASHBOARD: dict[str, Any] = json.loads((Path(__file__).parents[1] / "docs" / "grafana-vllm.json").read_text())

VLLMS_METRICS = frozenset(
    {
        "vllm:kv_offload_load_bytes_total", "vllm:kv_offload_load_time_total", "vllm:kv_offload_store_bytes_total",
        "vllm:kv_offload_store_time_total", "vllm:kv_offload_allocation_failure_total",
        "vllm:kv_offload_lookup_sync_delay_seconds_bucket", "vllm:kv_offload_lookup_async_delay_seconds_bucket",
        "vllm:kv_offload_cpu_cache_usage_perc", "vllm:kv_offload_tiering_read_bytes_total",
        "vllm:kv_offload_tiering_write_bytes_total", "vllm:kv_offload_tiering_chunk_queries_total",
        "vllm:kv_offload_tiering_chunk_hits_total", "vllm:kv_offload_tiering_promotion_job_failures_total",
        "vllm:kv_offload_tiering_cascade_job_failures_total", "vllm:num_requests_running",
    }
)  # fmt: skip
"""As Prometheus has them, which `tests/engine/test_dashboard.py` holds against vLLM."""


def names_in(text: str) -> set[str]:
    """The metrics of a query."""
    return set(re.findall(r"[a-zA-Z_]+:[a-zA-Z0-9_:]+", text))
