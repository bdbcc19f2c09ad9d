"""vLLM's off-loading connector with a tenant for every request, and refused blocks that are computed anew."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from prometheus_client import REGISTRY
from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults, KVConnectorWorkerMetadata
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import OffloadingWorkerMetadata
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request

from scx.vllm import SPEC
from scx.vllm.counters import COUNTERS
from scx.vllm.manager import SealedManager
from scx.vllm.worker import SealingWorker

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

__all__ = ["SealedOffloadingConnector", "SealedWorkerMetadata"]


@dataclass
class SealedWorkerMetadata(OffloadingWorkerMetadata):
    """What workers tell the scheduler after a step: vLLM's own, and the names of chunks that some rank refused."""

    refused: set[bytes] = field(default_factory=set)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> "SealedWorkerMetadata":
        both = super().aggregate(other)
        refused: set[bytes] = getattr(other, "refused", set())
        return SealedWorkerMetadata(both.completed_jobs, both.transfer_stats, self.refused | refused)


class SealedOffloadingConnector(OffloadingConnector):
    """`kv_connector="SCXSealedOffloading"`: its settings are those of vLLM's own off-loading on `TieringOffloadingSpec`
    and of `scx.vllm.spec.SealedSpec`.

    A request is its tenant's. Of one that nobody vouched for nothing is kept, and nothing is found for it, on the
    device either.

    Raises: ValueError for another `spec_name`; what `SealedSpec` raises.
    """

    def __init__(self, vllm_config: "VllmConfig", role: KVConnectorRole, kv_cache_config: "KVCacheConfig") -> None:
        _choose_spec(vllm_config)
        # The scheduler reads this after it has made its connector. By default a refused block fails its request.
        vllm_config.kv_transfer_config.kv_load_failure_policy = "recompute"
        super().__init__(vllm_config, role, kv_cache_config)
        self._has_groups = len(kv_cache_config.kv_cache_groups) > 1
        self._refused_blocks: set[int] = set()
        self._refused_names: set[bytes] = set()

    # The scheduler's side.

    @property
    def manager(self) -> SealedManager:
        return self.scheduler.manager

    def on_new_request(self, request: Request) -> None:
        super().on_new_request(request)
        status = self.scheduler._req_status[request.request_id]
        if not self.manager.admit(status.req_context, request.cache_salt):
            request.skip_reading_prefix_cache = True

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        told = connector_output.kv_connector_worker_meta
        if isinstance(told, SealedWorkerMetadata):
            self.manager.refuse(told.refused)
        super().update_connector_output(connector_output)

    # The worker's side.

    @property
    def worker(self) -> SealingWorker:
        return self.connector_worker.worker

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        requests = dict(self.connector_worker._load_jobs)
        results = super().get_transfer_results(finished_req_ids)
        blocks, names, jobs = self.worker.take_refused()
        self._refused_names |= names
        if self._has_groups:  # numbers of blocks are those of a group: what failed is a request
            results.failed_recving |= {requests[job] for job in jobs}
        else:
            self._refused_blocks |= blocks
        return results

    def get_block_ids_with_load_errors(self) -> set[int]:
        taken, self._refused_blocks = self._refused_blocks, set()
        return taken

    def build_connector_worker_meta(self) -> OffloadingWorkerMetadata | None:
        told = super().build_connector_worker_meta()
        if told is None:
            return None
        refused, self._refused_names = self._refused_names, set()
        return SealedWorkerMetadata(told.completed_jobs, told.transfer_stats, refused)

    # Both.

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        return super().get_kv_connector_stats() if self.connector_worker is None else self.worker.counts.take()

    @classmethod
    def build_prom_metrics(cls, vllm_config: "VllmConfig", *args: Any, **options: Any) -> KVConnectorPromMetrics:
        _choose_spec(vllm_config)
        # As vLLM does with its own: an engine that this process had before has left its counters.
        for collector in list(REGISTRY._collector_to_names):
            if getattr(collector, "_name", "") in COUNTERS:
                REGISTRY.unregister(collector)
        return super().build_prom_metrics(vllm_config, *args, **options)


def _choose_spec(vllm_config: "VllmConfig") -> None:
    settings = vllm_config.kv_transfer_config.kv_connector_extra_config
    if settings.setdefault("spec_name", SPEC) != SPEC:
        raise ValueError(
            f"spec_name: this connector has its own, {SPEC}, got {settings['spec_name']!r:.80}; leave it out"
        )
