"""Files that hold secrets: read where nobody else can read or write them, and made so."""

import os
from io import FileIO
from pathlib import Path
from typing import cast

from scx.files.disk import open_regular
from scx.files.refusal import FileRefusedError
from scx_kernels.hidden import WipedBytes

__all__ = ["read_private", "write_new_private"]


def read_private(path: str | os.PathLike[str], name: str, remedy: str, max_bytes: int) -> WipedBytes:
    """All bytes of a regular file of this user's or root's that nobody else may read or write. A link to one will do,
    which is how a mounted secret comes.

    Args:
        path: of the file.
        name: of the setting that the path came by, for errors.
        remedy: what makes such a file, for errors.
        max_bytes: how many are read.

    Raises: FileNotFoundError if there is none; PermissionError if others may use it, or it is somebody else's;
        FileRefusedError("format") for what is no regular file, or a larger one; OSError if it cannot be read. Each
        names the setting, the file and the remedy.
    """
    try:
        with open_regular(path) as (file, _):
            status = os.fstat(file.fileno())
            if status.st_mode & 0o077:
                raise PermissionError(
                    f"{name}: others than its owner may use {path} (mode {status.st_mode & 0o777:o}); chmod 600 {path}"
                )
            if status.st_uid not in (os.geteuid(), 0):
                raise PermissionError(
                    f"{name}: {path} belongs to user {status.st_uid}, and this process is user {os.geteuid()}; chown it"
                )
            data = _read(cast(FileIO, file.raw), max_bytes + 1)
    except OSError as error:
        if error.errno is None:  # said above
            raise
        told = "there is no such file" if isinstance(error, FileNotFoundError) else error.strerror
        raise type(error)(f"{name}: {path}: {told}; {remedy}") from None
    except FileRefusedError as error:
        raise FileRefusedError(error.reason, f"{name}: {path}: {error}; {remedy}") from None
    if len(data) > max_bytes:
        raise FileRefusedError("format", f"{name}: {path} is longer than {max_bytes} bytes; {remedy}")
    return data


def _read(file: FileIO, limit: int) -> WipedBytes:
    """Without a buffer in between, which nothing would wipe."""
    memory = WipedBytes(min(limit, os.fstat(file.fileno()).st_size + 1))
    size = 0
    while size < len(memory) and (count := file.readinto(memoryview(memory)[size:])):
        size += count
    return memory if size == len(memory) else WipedBytes(memoryview(memory)[:size])


def write_new_private(path: str | os.PathLike[str], data: bytes | memoryview) -> Path:
    """Write bytes to a new file of mode 0600.

    Raises: FileExistsError for a file that is there, which stays as it is.
    """
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb", buffering=0) as file:
        file.write(data)
        os.fsync(file.fileno())
    return Path(path)
