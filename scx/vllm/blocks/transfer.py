"""A transfer of blocks, under way or done."""

from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any, NamedTuple

__all__ = ["AtOnce", "Outcome", "Transfer"]


class Outcome(NamedTuple):
    """What a transfer came to: indices of blocks that did not authenticate, in order; bytes of the others; seconds."""

    refused: list[int]
    bytes: int
    seconds: float


class Transfer:
    """Blocks on their way. What went wrong beyond a block's refusal is raised by whoever asks, every time; then of no
    block of a load may the pages be read, and what was stored of them is sealed rightly or will be refused."""

    def __init__(self, work: Future[Outcome]) -> None:
        self._work = work

    @classmethod
    def done(cls, outcome: Outcome) -> "Transfer":
        """One that is over."""
        work: Future[Outcome] = Future()
        work.set_result(outcome)
        return cls(work)

    def is_done(self) -> bool:
        """Whether all is over: the pages, or the rows and trailers, are written, and the blocks' memory is free to
        use. Raises: what went wrong."""
        if not self._work.done():
            return False
        self._work.result()
        return True

    def wait(self) -> None:
        """Until it is done. Raises: what went wrong."""
        self._work.result()

    def _outcome(self) -> Outcome:
        if not self._work.done():
            raise RuntimeError("this transfer is not done: wait for it first")
        return self._work.result()

    @property
    def refused(self) -> list[int]:
        """Which of the blocks did not authenticate, in order; none of a store. Raises: RuntimeError before that is
        known."""
        return self._outcome().refused

    @property
    def bytes(self) -> int:
        """Of the blocks that were sealed or opened. Raises: RuntimeError before it is done."""
        return self._outcome().bytes

    @property
    def seconds(self) -> float:
        """From its begin to its end, the wait for transfers before it left out. Raises: RuntimeError before it is
        done."""
        return self._outcome().seconds


class AtOnce(Executor):
    """Runs what it is given before it returns."""

    def submit(self, function: Callable[..., Any], /, *args: Any, **options: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(function(*args, **options))
        except Exception as error:
            future.set_exception(error)
        return future
