"""transformers' mixins for tests of models, from the sdist of the installed version.

They are imported as a package of their own; what they take from files that are in the repository alone stands below,
empty.
"""

import importlib.util
import subprocess
import sys
import tarfile
import types
from pathlib import Path

import transformers

__all__ = ["PACKAGE", "bring", "make_importable"]

PACKAGE = "transformers_tests"


class ExportTesterMixin:
    """Stands for the tests of exporters, which are in the repository alone."""


class GenerationTesterMixin:
    """Stands for the tests of generation, which are in the repository alone."""


_LEFT_OUT = {"exporters.test_export": ExportTesterMixin, "generation.test_utils": GenerationTesterMixin}


def bring(folder: Path) -> Path:
    """The sdist's tests folder, fetched by pip into `folder` unless it is there, with what the mixins import beside it.

    Raises: subprocess.CalledProcessError where pip cannot fetch it.
    """
    name = f"transformers-{transformers.__version__}"
    tests, packages = folder / name / "tests", folder / "packages"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    if importlib.util.find_spec("parameterized") is None and not packages.exists():
        subprocess.run([*pip, "install", "--quiet", "--no-deps", "--target", packages, "parameterized"], check=True)
    if not tests.exists():
        of_sources = ["--no-deps", "--no-binary", "transformers", "--dest", folder]
        wanted = f"transformers=={transformers.__version__}"
        subprocess.run([*pip, "download", "--quiet", *of_sources, wanted], check=True)
        with tarfile.open(folder / f"{name}.tar.gz") as archive:
            inside = [member for member in archive if member.name.startswith(f"{name}/tests/")]
            archive.extractall(folder, inside, filter="data")
    return tests


def make_importable(tests: Path) -> None:
    """Put the tests folder in place as the package `transformers_tests`."""
    sys.path.append(str(tests.parent.parent / "packages"))
    package = types.ModuleType(PACKAGE)
    package.__path__ = [str(tests)]
    sys.modules[PACKAGE] = package
    for module, mixin in _LEFT_OUT.items():
        if not (tests / f"{module.replace('.', '/')}.py").exists():
            stand_in = types.ModuleType(f"{PACKAGE}.{module}")
            setattr(stand_in, mixin.__name__, mixin)
            sys.modules[stand_in.__name__] = stand_in
