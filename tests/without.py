"""Run python as if packages were not installed: `python tests/without.py cryptography,triton -m pytest tests`.

After the names come `-c CODE` or `-m MODULE ARGUMENT...`, as for python itself.
"""

import runpy
import sys
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any


def hide(packages: list[str]) -> None:
    """No import finds them. In the finder itself, because pytest brings a hook of its own that asks it."""
    found = PathFinder.find_spec

    def find_spec(cls: type, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return None if name.partition(".")[0] in packages else found(name, path, target)

    PathFinder.find_spec = classmethod(find_spec)


def main(packages: str, kind: str, what: str, *arguments: str) -> None:
    hide(packages.split(","))
    sys.path[0] = ""
    sys.argv = [kind, *arguments]
    if kind == "-c":
        exec(what, {"__name__": "__main__"})  # noqa: S102  # the caller's own code
    else:
        runpy.run_module(what, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
