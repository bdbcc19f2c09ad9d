"""What the dashboard asks of vLLM is there under these names."""

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import get_connector_metric_definitions
from vllm.v1.kv_offload.base import OffloadingCounterMetadata, OffloadingHistogramMetadata
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec
from vllm.v1.metrics import loggers

from tests.dashboard import VLLMS_METRICS

OTHERS = {"vllm:num_requests_running"}


def test_vllms_metrics() -> None:
    known = set()
    for name, kind in (TieringOffloadingSpec.build_metric_definitions({}) | get_connector_metric_definitions()).items():
        if isinstance(kind, OffloadingCounterMetadata):
            known.add(f"{name}_total")
        elif isinstance(kind, OffloadingHistogramMetadata):
            known.add(f"{name}_bucket")
        else:
            known.add(str(name))
    assert known >= VLLMS_METRICS - OTHERS
    with open(loggers.__file__) as file:
        source = file.read()
    assert all(f'"{name}"' in source for name in OTHERS)
