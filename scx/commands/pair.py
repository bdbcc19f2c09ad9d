"""A pair of credentials for two processes, in two files."""

from pathlib import Path

from scx.party.credentials import Credentials

__all__ = ["run"]


def run(*, directory: Path) -> tuple[Path, Path]:
    """Write a fresh pair into a directory, which is made if it is not there.

    Returns: the secure side's file, and the workers', both of mode 0600.
    Raises: FileExistsError if one of them is there; nothing is written then.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    files = directory / "secure.pem", directory / "worker.pem"
    for file in files:
        if file.exists():
            raise FileExistsError(f"pair: {file} is there, and its pair may be in use; name another place")
    for credentials, file in zip(Credentials.generate(), files, strict=True):
        credentials.save(file)
    return files
