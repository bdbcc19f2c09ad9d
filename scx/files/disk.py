"""Files on disk: only regular ones are read or replaced, and what is written appears whole or not at all."""

import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

from scx.files.refusal import FileRefusedError

__all__ = ["atomic_file", "destination", "open_regular"]


def destination(path: str | os.PathLike[str]) -> Path:
    """Where a file of this name is written: the name itself, or what it links to, be that there yet or not.

    Raises: ValueError if something lies there that is no regular file, such as a directory, a device, a pipe or a
        socket; OSError for a link that the system does not follow, such as one in a circle, or a stranger's in a
        directory that all may write to.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        mode = stat.S_IFREG
    if not stat.S_ISREG(mode):
        raise ValueError(f"path: expected a new name or that of a regular file, got {os.fspath(path)!r:.200}")
    return Path(os.path.realpath(path))


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file of mode 0600 that takes the place of `path` when all of it is on disk, and vanishes if that fails."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 0600
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(descriptor)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
    if os.name == "posix":  # else a crash may lose the new name
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


@contextmanager
def open_regular(path: str | os.PathLike[str]) -> Iterator[tuple[BufferedReader, int]]:
    """A regular file, opened for reading, and its size in bytes.

    Raises: FileRefusedError for anything else, of which nothing is read or waited for; OSError if it cannot be opened.
    """
    _check_regular(os.stat(path))  # opening a device may already do something
    with open(path, "rb", opener=_open_without_waiting) as file:
        opened = os.fstat(file.fileno())
        _check_regular(opened)  # it may be another one by now
        yield file, opened.st_size


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # for the other end of a pipe


def _check_regular(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise FileRefusedError("format", "the path is not a regular file")
