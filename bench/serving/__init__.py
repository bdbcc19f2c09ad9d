"""vLLM with sealed off-loading beside its own unsealed off-loading and beside none: `python -m bench.serving`."""
