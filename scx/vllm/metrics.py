"""Counters beside vLLM's own. A tenant is counted by its kind, never by its name or id."""

from collections.abc import Mapping

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats
from vllm.v1.kv_offload.base import OffloadingCounterMetadata, OffloadingMetricMetadata

from scx.vllm.counters import COUNTERS, PREFIX

__all__ = ["Counts", "definitions"]


def definitions() -> dict[str, OffloadingMetricMetadata]:
    """The counters as vLLM's off-loading declares them."""
    return {name: OffloadingCounterMetadata(text, labels) for name, (text, labels) in COUNTERS.items()}


class Counts:
    """What was counted since the last `take`."""

    def __init__(self) -> None:
        self._stats = OffloadingConnectorStats()

    def add(self, counted: Mapping[str, float], *labels: str) -> None:
        """counted: the name of a counter, without its prefix -> by how much it grows."""
        for name, count in counted.items():
            if count:
                self._stats.increase_counter(f"{PREFIX}{name}", count, labels)

    def take(self) -> OffloadingConnectorStats | None:
        """None if there is nothing."""
        if self._stats.is_empty():
            return None
        taken, self._stats = self._stats, OffloadingConnectorStats()
        return taken
