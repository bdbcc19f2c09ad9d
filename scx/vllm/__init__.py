"""SCX in vLLM: every block of a key-value cache is sealed and bound as it leaves the accelerator, keyed by tenant.

vLLM finds this package by its entry point (`vllm.general_plugins`) and calls `register` in every process. What runs is
vLLM's own off-loading, with its scheduler, its tiers and its server; what is here seals a block between the device and
host memory, and names it under its tenant's key:

| file | idea |
|---|---|
| `connector.py` | vLLM's off-loading connector with a tenant for every request |
| `spec.py` | what the two sides of it are made of, and what is refused at start |
| `manager.py` | the scheduler's side: blocks under keyed names, and what was refused is a miss |
| `worker.py`, `memory.py` | the worker's side: from pages to host memory and back, through the cipher |
| `blocks/` | the cipher of a block |
| `pages/` | the paged cache itself sealed |
| `tenants.py`, `registry.py`, `master.py` | whose a block is: tenants, keys, salts, and their files |
| `middleware.py`, `routes.py`, `body.py` | whose a request is |
| `counters.py`, `metrics.py` | what is counted |
| `version.py` | which vLLM this was tested with |
"""

from typing import Any

from scx.vllm.version import check_version

__all__ = ["CONNECTOR", "SPEC", "register"]

CONNECTOR = "SCXSealedOffloading"
"""What `kv_connector` is set to."""
SPEC = "SCXSealedSpec"
_is_registered = False


def register() -> None:
    """Make the connector known to vLLM, in this process, and with `SCX_SEAL_PAGES=1` seal its paged cache.

    Called again, it does nothing.

    Whoever has this package installed, and neither names the connector nor sets that variable, is left alone.

    Raises: ValueError for another value of the variable; RuntimeError for pages of a vLLM that was not tested.
    """
    global _is_registered
    if _is_registered:
        return
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory  # noqa: PLC0415  optional
    from vllm.v1.kv_offload.factory import OffloadingSpecFactory  # noqa: PLC0415  optional

    from scx.vllm.pages import are_sealed, register_pages  # noqa: PLC0415  imports torch, which vLLM's start can wait for

    KVConnectorFactory.register_connector(CONNECTOR, __name__, "SealedOffloadingConnector")
    OffloadingSpecFactory.register_spec(SPEC, f"{__name__}.spec", "SealedSpec")
    if are_sealed():
        check_version()
        register_pages()
    _is_registered = True


def __getattr__(name: str) -> Any:
    """The connector, which needs vLLM, once its version is known to be one that this was tested with."""
    if name != "SealedOffloadingConnector":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    check_version()
    from scx.vllm.connector import SealedOffloadingConnector  # noqa: PLC0415  needs vLLM, which is optional

    return SealedOffloadingConnector
