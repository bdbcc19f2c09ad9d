"""SCX in vLLM: every block of a key-value cache is sealed and bound as it leaves the accelerator, keyed by tenant.

vLLM finds this package by its entry point (`vllm.general_plugins`) and calls `register` in every process.
"""

__all__ = ["register"]


def register() -> None:
    """Make this package's parts known to vLLM, in this process. Called again, it does nothing."""
