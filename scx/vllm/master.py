"""The master key's file: 32 bytes and nothing else, from which every tenant's keys follow."""

import os
from pathlib import Path

from scx.files.private import read_private, write_new_private
from scx.files.refusal import FileRefusedError
from scx.keystream import KEY_BYTES, Secret
from scx_kernels.hidden import guarded

__all__ = ["MASTER_VARIABLE", "master_of_environment", "read_master", "write_master"]

MASTER_VARIABLE = "SCX_MASTER_KEY_FILE"
_REMEDY = "`python -m scx tenants key FILE` makes one"


@guarded
def read_master(path: str | os.PathLike[str]) -> Secret:
    """The master key in a file of exactly 32 bytes, which are not all the same.

    Raises: FileRefusedError("format") for a file of another length, or of one byte over and over; and as
        `read_private` does for a file that is not private.
    """
    data = read_private(path, MASTER_VARIABLE, _REMEDY, KEY_BYTES)
    if len(data) != KEY_BYTES:
        raise FileRefusedError(
            "format", f"{MASTER_VARIABLE}: expected {KEY_BYTES} bytes, {path} has {len(data)}; {_REMEDY}"
        )
    if data.count(data[:1]) == KEY_BYTES:
        raise FileRefusedError("format", f"{MASTER_VARIABLE}: {path} repeats one byte and is no key; {_REMEDY}")
    return Secret(data)


def master_of_environment() -> Secret:
    """The master key in the file that `SCX_MASTER_KEY_FILE` names.

    Raises: ValueError if it names none; and as `read_master` does.
    """
    path = os.environ.get(MASTER_VARIABLE)
    if not path:
        raise ValueError(f"{MASTER_VARIABLE}: not set; expected the path of a file of {KEY_BYTES} bytes; {_REMEDY}")
    return read_master(path)


@guarded
def write_master(path: str | os.PathLike[str]) -> Path:
    """Draw a master key into a new file of mode 0600.

    Raises: FileExistsError for a file that is there.
    """
    return write_new_private(path, Secret().reveal())
