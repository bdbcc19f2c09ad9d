"""The tenants of a server: the master key's file, and the registry of who they are."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from scx.vllm.master import write_master
from scx.vllm.registry import REGISTRY_VARIABLE, edited, read_registry

__all__ = ["ACTIONS", "run"]

_HEAD = ("name", "id", "kind", "API keys", "versions")


def run(
    *,
    action: str,
    name: str = "",
    version: int = 0,
    kind: str = "default",
    replace: bool = False,
    path: Path | None = None,
    file: Path | None = None,
) -> Iterable[str]:
    """Do one of `ACTIONS`.

    Args:
        action: which.
        name: the tenant's, for all but "key" and "list".
        version: of its key, for "drop".
        kind: the tenant's class, for "add".
        replace: whether "credential" revokes the earlier API keys.
        path: where "key" writes.
        file: the registry; if not given, the one that `SCX_TENANTS_FILE` names.

    Returns: what is to be shown, line by line.
    Raises: ValueError, OSError, FileRefusedError, where nothing was changed then.
    """
    if action == "key":
        assert path is not None  # noqa: S101 the parser requires it
        return [f"{write_master(path)}: a new master key, mode 0600; whoever has it reads what is sealed below it"]
    place = file or os.environ.get(REGISTRY_VARIABLE)
    if not place:
        raise ValueError(f"--file: not given, and {REGISTRY_VARIABLE} is not set; name the registry by one of them")
    return ACTIONS[action](Path(place), name, version, kind, replace)


def _list(place: Path, name: str, version: int, kind: str, replace: bool) -> list[str]:
    rows = [_HEAD] + [
        (x.name, x.id, x.kind, str(len(x.credentials)), " ".join(map(str, x.versions))) for x in read_registry(place)
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _add(place: Path, name: str, version: int, kind: str, replace: bool) -> list[str]:
    with edited(place) as registry:
        credential = registry.add(name, kind)
    return [credential]


def _credential(place: Path, name: str, version: int, kind: str, replace: bool) -> list[str]:
    with edited(place) as registry:
        credential = registry.issue(name, replace)
    return [credential]


def _rotate(place: Path, name: str, version: int, kind: str, replace: bool) -> list[str]:
    with edited(place) as registry:
        fresh = registry.rotate(name)
    return [f"{name}: version {fresh} writes from now on"]


def _drop(place: Path, name: str, version: int, kind: str, replace: bool) -> list[str]:
    with edited(place) as registry:
        registry.drop(name, version)
    return [f"{name}: version {version} is gone, and what was sealed under it useless"]


def _forget(place: Path, name: str, version: int, kind: str, replace: bool) -> list[str]:
    with edited(place) as registry:
        registry.forget(name)
    return [f"{name}: forgotten, and what was sealed for it useless"]


ACTIONS: dict[str, Callable[[Path, str, int, str, bool], list[str]]] = {
    "list": _list,
    "add": _add,
    "credential": _credential,
    "rotate": _rotate,
    "drop": _drop,
    "forget": _forget,
}
"""What is done to a registry: (its file, name, version, kind, replace) to the lines that are shown."""
