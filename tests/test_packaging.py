"""What is built of this tree is whole: a wheel that installs into an empty folder and works from there, and a source
archive that builds the same wheel. Nothing is fetched."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import parity
import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ("LICENSE", "README.md", "pyproject.toml", "scx", "scx_kernels")
MEASURED = "scx_kernels/tiles/a-card.json"
OPTIONAL = "accelerate,matplotlib,rich,triton"

# The command is the installed script itself; what it imports must be the installed package, not this tree's.
FROM_THERE = """
import runpy, sys
from pathlib import Path
import scx, scx_kernels
there = Path(sys.argv[1])
assert there in Path(scx.__file__).parents and there in Path(scx_kernels.__file__).parents, (scx, scx_kernels)
sys.argv = ["scx", "--help"]
runpy.run_path(str(there / "bin" / "scx"), run_name="__main__")
"""


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Standard output of a command that must succeed; nothing of this tree is on its path."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=clean | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(tree: Path, out: Path, *what: str) -> None:
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, *what, tree, cwd=tree.parent)


def contents(wheel: Path) -> dict[str, bytes]:
    with ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is packed, and beside it the tiles of a card, as `scx_kernels.tune` would leave them."""
    tree = tmp_path_factory.mktemp("packaging") / "tree"
    tree.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, tree / name)
    (tree / MEASURED).parent.mkdir(exist_ok=True)
    (tree / MEASURED).write_text("{}")
    return tree


@pytest.fixture(scope="module")
def wheel(tree: Path) -> Path:
    """Built through the source archive, as `python -m build` does."""
    build(tree, tree.parent / "dist")
    (found,) = (tree.parent / "dist").glob("*.whl")
    return found


@parity.needs("build", "setuptools")
def test_every_file_of_the_packages_is_in(tree: Path, wheel: Path) -> None:
    """Sub-packages, the marks of typed packages and measured tiles: nothing is left out, and nothing else is in."""
    ours = [path for name in ("scx", "scx_kernels") for path in (tree / name).rglob("*") if path.is_file()]
    packed = {name: data for name, data in contents(wheel).items() if ".dist-info/" not in name}
    assert packed == {path.relative_to(tree).as_posix(): path.read_bytes() for path in ours}
    assert {"scx/py.typed", "scx_kernels/py.typed", "scx_kernels/kernels/__init__.py", MEASURED} <= set(packed)


@parity.needs("build", "setuptools")
def test_the_source_archive_builds_the_same_wheel(tree: Path, wheel: Path) -> None:
    """As the tree does, metadata and record included."""
    build(tree, tree.parent / "direct", "--wheel")
    (direct,) = (tree.parent / "direct").glob("*.whl")
    assert direct.name == wheel.name
    assert contents(direct) == contents(wheel)


@parity.needs("build", "setuptools", "cryptography", "safetensors", "transformers")
def test_it_works_where_it_is_installed(wheel: Path, tmp_path: Path) -> None:
    """Without this tree, and without the packages that it can do without; the command answers, too."""
    there = tmp_path / "installed"
    options = ("--quiet", "--no-index", "--no-deps", "--no-compile", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", "install", *options, "--target", there, wheel, cwd=tmp_path)
    assert os.access(there / "bin" / "scx", os.X_OK)
    command = (sys.executable, ROOT / "tests" / "without.py", OPTIONAL, "-c", FROM_THERE, there)
    shown = run(*command, cwd=tmp_path, PYTHONPATH=str(there))
    assert all(name in shown for name in ("demo", "audit", "transcript"))
