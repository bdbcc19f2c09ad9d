"""What the two sides of sealed off-loading are made of, on vLLM's own tiers, and what is refused at start."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from hashlib import sha256
from typing import Any

import torch
from vllm.platforms import current_platform
from vllm.utils.math_utils import round_up
from vllm.v1.kv_offload.base import CanonicalKVCaches, OffloadingManager, OffloadingMetricMetadata, OffloadingWorker
from vllm.v1.kv_offload.config import OffloadingConfig
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

from scx.vllm.blocks import TRAILER_BYTES, DeviceCipher, HostCipher
from scx.vllm.manager import SealedManager
from scx.vllm.memory import DeviceMemory, PlainMemory, SealedMemory
from scx.vllm.metrics import definitions
from scx.vllm.pages import are_sealed
from scx.vllm.tenants import Keyring
from scx.vllm.worker import Cipher, Placement, SealingWorker

__all__ = ["SealedSpec"]


class SealedSpec(TieringOffloadingSpec):
    """vLLM's tiered off-loading, of whose host memory and tiers every block is sealed.

    Of `kv_connector_extra_config` it reads, beside what vLLM does,

    - exactly one of `tenants`: `"callers"`: a request is its caller's, whom `scx.vllm.middleware.TenantMiddleware` has
      put into its `cache_salt`; and `tenant`: name of the one whose all requests are;
    - `model_id`: another name for the model in names and associated data, for who keeps different weights under one
      name (default: vLLM's name of it).

    Raises: ValueError for what would leave the device unsealed, a region too small for one chunk, requests of nobody,
        or a tenant whom the registry does not have; what `Keyring` raises.
    """

    def __init__(self, config: OffloadingConfig) -> None:
        self._tenant = _tenant(config.extra_config)
        if config.canonical_layout:
            raise ValueError(
                "canonical_layout: every rank seals what it has, so ranks cannot share a page; remove it from "
                "kv_connector_extra_config"
            )
        if config.enable_kv_cache_events:
            raise ValueError(
                "kv_events_config: events publish token ids and plain hashes of prompts; set enable_kv_cache_events to "
                "false, or use another connector"
            )
        super().__init__(config)
        self._keyring = Keyring.from_environment()
        if self._tenant is not None and self._keyring.named(self._tenant) is None:
            raise ValueError(f"tenant: the registry has none of this name, {self._tenant!r:.80}; add it first")
        self._ranks = 1 if self.replicated_layout else config.parallel.world_size
        blocks = self._ranks * self.blocks_per_chunk
        row = round_up(self._ranks * self.cpu_page_size_per_worker + blocks * TRAILER_BYTES, self.BLOCK_SIZE_ALIGNMENT)
        size = int(self.extra_config["cpu_bytes_to_use"])
        self.num_chunks, self.kv_bytes_per_chunk = size // row, row
        if not self.num_chunks:
            raise ValueError(f"cpu_bytes_to_use: a chunk of this model takes {row} bytes of host memory, got {size}")
        self._layout = self._describe()
        self._sealed_manager: SealedManager | None = None
        self._sealing_worker: SealingWorker | None = None

    @classmethod
    def build_metric_definitions(cls, extra_config: dict[str, Any]) -> dict[str, OffloadingMetricMetadata]:
        return super().build_metric_definitions(extra_config) | definitions()

    def get_manager(self) -> OffloadingManager:
        if self._sealed_manager is None:
            os.umask(os.umask(0o077) | 0o077)  # tiers write files, in this process and under its mask
            self._sealed_manager = SealedManager(super().get_manager(), self._keyring, self._layout, self._tenant)
        return self._sealed_manager

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        if self._sealing_worker is None:
            rank = 0 if self.replicated_layout else self.config.parallel.rank
            region = SharedOffloadRegion(
                self._engine_id, self.num_chunks, rank, self.kv_bytes_per_chunk, self.cpu_page_size_per_worker
            )
            placement = Placement(
                rank, self.cpu_page_size_per_worker // self.blocks_per_chunk, self.blocks_per_chunk, self._layout
            )
            cipher = self.cipher(kv_caches.tensors[0].tensor.device)
            self._sealing_worker = SealingWorker(self._memory(kv_caches), region, placement, cipher, self._keyring)
        return self._sealing_worker

    def cipher(self, device: torch.device) -> Cipher:
        """For pages on this device."""
        return HostCipher() if device.type == "cpu" else DeviceCipher(device)

    def _memory(self, kv_caches: CanonicalKVCaches) -> DeviceMemory:
        if not are_sealed():
            return PlainMemory(kv_caches)
        return SealedMemory(kv_caches, [group.layer_names for group in self.config.groups])

    def _describe(self) -> bytes:
        """32 bytes that stand for all that a block's bytes depend on: SHA-256 of the configuration as JSON.

        A rank's number is not in it, nor what differs from start to start.
        """
        parallel = asdict(self.config.parallel)
        for changing in ("rank", "data_parallel_index", "data_parallel_size", "data_parallel_rank_local"):
            del parallel[changing]
        described = {
            "model": self.extra_config.get("model_id", self.config.model.name),
            "dtype": self.config.model.dtype,
            "groups": [asdict(group) for group in self.config.groups],
            "cache": asdict(self.config.cache),
            "parallel": parallel,
            "bytes": self.config.worker_kv_bytes_per_block,
            "replicated": self.replicated_layout,
            "layout": self.config.kv_cache_layout,
            "machine": _arithmetic(),
            "pages": "sealed" if are_sealed() else "plain",
        }
        return sha256(json.dumps(described, sort_keys=True).encode()).digest()


def _tenant(settings: Mapping[str, Any]) -> str | None:
    """Name of the one tenant; None where callers are tenants."""
    callers, name = settings.get("tenants"), settings.get("tenant")
    if callers == "callers" and name is None:
        return None
    if callers is None and isinstance(name, str) and name:
        return name
    raise ValueError(
        'tenants: say in kv_connector_extra_config whose requests are: "tenants": "callers" with `--middleware '
        'scx.vllm.middleware.TenantMiddleware`, or "tenant": a name, whose they all are; '
        f"got tenants={callers!r:.80}, tenant={name!r:.80}"
    )


def _arithmetic() -> str:
    """How this machine lays K out within a page, where that depends on it."""
    if current_platform.is_cpu():
        has_tiles = torch.cpu._is_amx_tile_supported()
        return f"cpu {torch.backends.cpu.get_cpu_capability()}{' AMX' if has_tiles else ''}"
    return str(current_platform.device_type)
