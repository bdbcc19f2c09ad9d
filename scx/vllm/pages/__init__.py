"""vLLM's paged cache sealed in memory, under `SCX_SEAL_PAGES=1`.

Every row of K and V is sealed under a key of this process as it is written, and its write number lies in its page. On
CUDA attention takes the keystream off in registers; on a CPU the blocks of a batch are unsealed into scratch.
"""

import os

from scx.vllm.pages.registry import plain_bytes, plain_size, write_plain

__all__ = ["are_sealed", "plain_bytes", "plain_size", "register_pages", "write_plain"]

_VARIABLE = "SCX_SEAL_PAGES"


def are_sealed() -> bool:
    """Whether `SCX_SEAL_PAGES` asks for sealed pages.

    Raises: ValueError for anything but 0, 1 or nothing.
    """
    value = os.environ.get(_VARIABLE, "0")
    if value not in ("0", "1", ""):
        raise ValueError(f"{_VARIABLE}: expected 0 or 1, got {value!r}")
    return value == "1"


def register_pages() -> None:
    """Have vLLM keep sealed pages in this process if `SCX_SEAL_PAGES=1`, and refuse backends that would not. Called
    again, it does nothing.

    Raises: ValueError for another value than 0 or 1.
    """
    if not are_sealed():
        return
    # vLLM is there in its own processes alone; these two modules import it.
    from vllm.v1.attention.backends.registry import (  # noqa: PLC0415
        AttentionBackendEnum,
        MambaAttentionBackendEnum,
        register_backend,
    )

    here = __name__
    sealed = {"CPU_ATTN": f"{here}.cpu.SealedCPUBackend", "CUSTOM": f"{here}.cuda.SealedCUDABackend"}
    # What keeps no pages at all.
    stateless = ("TORCH_SDPA", "NO_ATTENTION")
    for backend in AttentionBackendEnum:
        if backend.name not in stateless:
            register_backend(backend, sealed.get(backend.name, f"{here}.refused.UnsealedBackend"))
    for state in MambaAttentionBackendEnum:
        register_backend(state, f"{here}.refused.UnsealedStateBackend", is_mamba=True)
