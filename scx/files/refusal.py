"""Refusals: what a reader says of a file from which it loads nothing."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

__all__ = ["FileRefusedError", "Reason", "malformed"]

Reason = Literal["format", "version", "kind", "key", "model", "session", "replay"]


class FileRefusedError(ValueError):
    """A file from which nothing was loaded. `reason` says why:

    "format" (not such a file, truncated, malformed, or larger than expected), "version" (written by a newer version),
    "kind" (holds something else), "key" (wrong key or passphrase, or altered), "model" (belongs to another model),
    "session" (belongs to another session), "replay" (older than what was asked for).
    """

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason: Reason = reason


@contextmanager
def malformed(problem: str) -> Iterator[None]:
    """What reading a file's words and tensors raises is a refusal for its "format"."""
    try:
        yield
    except FileRefusedError:
        raise
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise FileRefusedError("format", f"{problem}: {error!s:.200}") from None
