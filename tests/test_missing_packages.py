"""Where a package is missing, what can run runs, and the rest is named: at the library's door, and by file in tests."""

import subprocess
import sys
from pathlib import Path

import parity
import pytest
from parity import missing_package

ROOT = Path(__file__).parent.parent
ALL = ",".join(parity.PACKAGES)
# What knows tensors and index arrays only.
OF_THE_KERNELS = ("test_operations.py", "test_production_tiles.py", "test_sealed_cache.py", "test_hardware.py")


def without(packages: str, *command: str) -> subprocess.CompletedProcess[str]:
    """Run python as if these packages were not installed."""
    call = [sys.executable, "tests/without.py", packages, *command]
    return subprocess.run(call, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
def test_operations_need_torch_alone() -> None:
    """On CPU tensors not even triton; and nothing tries to import what it can do without."""
    code = f"""
import sys, torch, scx_kernels as ops
x, index = torch.randn(1, 4, 8), torch.tensor([[3, 1, 0, 2]])
assert torch.equal(ops.inject_permute(x, index), x[:, index[0]])
own = ops.Sealing(ops.key_words(bytes(32)), ops.WriteCounter().take(1, 4), 0)
x = x.view(1, 1, 4, 8)
assert torch.equal(ops.unseal(ops.seal(x, own, is_value=True), own, is_value=True), x)
assert not {{name.partition(".")[0] for name in sys.modules}} & set({ALL!r}.split(","))
"""
    done = without(ALL, "-c", code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", ["cryptography", "safetensors", "transformers"])
def test_scx_names_what_it_misses_at_its_door(package: str) -> None:
    """Once, before anything of it is imported, with the way to get it."""
    code = f"""
import sys
try:
    import scx
except ImportError as error:
    assert error.name == {package!r}
    assert f"python -m pip install {package}" in str(error)
    assert "scx_kernels" in str(error)
else:
    raise SystemExit("imported")
assert not [name for name in sys.modules if name.startswith("scx")]
"""
    done = without(package, "-c", code)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@parity.needs("cryptography", "safetensors", "transformers")
def test_scx_does_without_triton_on_a_cpu() -> None:
    done = without("triton", "-c", "import scx, sys; assert 'triton' not in sys.modules")
    assert done.returncode == 0, done.stderr


def run_tests(missing: str, *arguments: str) -> str:
    options = ("-q", "-p", "no:hypothesispytest", "-p", "no:cacheprovider")
    done = without(missing, "-m", "pytest", *options, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@parity.needs("triton")
def test_tests_of_kernels_need_no_other_package() -> None:
    """Every file of them is collected, some run; a file that needs what is missing says so by name."""
    files = [f"tests/{name}" for name in OF_THE_KERNELS]
    files += [str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob("test_kernel_*.py")]
    missing = "cryptography,hypothesis,safetensors,transformers"
    out = run_tests(missing, "-k", "test_empty or strip_onto", *files, "tests/test_keys.py", "tests/test_memory.py")
    assert "test_keys.py waits for the package" in out
    assert "test_memory.py waits for the package transformers" in out
    assert out.count("waits for the package") == 2
    assert " passed" in out


@pytest.mark.slow
def test_tests_of_references_do_without_triton() -> None:
    files = (
        "tests/test_reference.py",
        "tests/test_sealing.py",
        "tests/test_kernel_rows.py",
        "tests/test_operations.py",
    )
    out = run_tests("triton", "-k", "test_empty or test_published or agree", *files)
    assert "test_kernel_rows.py waits for the package triton" in out
    assert "tests/test_operations.py" in out, "of its tests those that run kernels are skipped"
    assert " passed" in out


def test_only_a_missing_package_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that an installed package no longer has is an error, as is a module of this project."""
    monkeypatch.setattr(parity, "is_missing", lambda package: package == "safetensors")
    from_the_door = ImportError("scx needs safetensors", name="safetensors")
    assert missing_package(from_the_door) == "safetensors"
    assert missing_package(ModuleNotFoundError("No module", name="safetensors.torch")) == "safetensors"
    assert missing_package(ImportError("cannot import name", name="transformers")) is None
    assert missing_package(ModuleNotFoundError("No module", name="scx.nothing")) is None
    assert missing_package(SyntaxError("invalid")) is None
    assert missing_package(None) is None
    wrapped = RuntimeError("could not import")
    wrapped.__cause__ = from_the_door
    assert missing_package(wrapped) == "safetensors"
