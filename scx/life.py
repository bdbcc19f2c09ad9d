"""Which process this is. What a fork copies, such as counters and connections, belongs to the one that made it."""

import os

__all__ = ["Life", "this_life"]

Life = tuple[object, int]
"""A process between two forks."""

_since_fork = object()


def this_life() -> Life:
    """The life of this process. A child has another than its parent, and than whoever had its number before."""
    # The number tells a child even where whoever forked it ran no handlers.
    return _since_fork, os.getpid()


def _begin_life() -> None:
    global _since_fork
    _since_fork = object()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_life)
