"""What is not as it has to be is refused when a server starts, with the remedy, not at the first request."""

from pathlib import Path
from typing import Any

import pytest
from engine.engines import transfer

import scx.vllm
from scx.commands.vllm_server import ServerFailed, serving
from scx.vllm import version

OPTIONS = ("--enforce-eager", "--max-model-len", "512")
MIDDLEWARE = ("--middleware", "scx.vllm.middleware.TenantMiddleware")


def refusal(model: Path, folder: Path, config: dict[str, Any], environment: dict[str, str], *options: str) -> str:
    """The log of a server that does not start."""
    log = folder / "log"
    with (
        pytest.raises(ServerFailed),
        serving(model, [*OPTIONS, *options], log=log, transfer=config, environment=environment),
    ):
        pass
    return log.read_text(errors="replace")


def test_without_a_key_file(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SCX_MASTER_KEY_FILE", raising=False)
    told = refusal(model, tmp_path, transfer(tenant="alice"), {})
    assert "SCX_MASTER_KEY_FILE: not set" in told
    assert "python -m scx tenants key FILE" in told


def test_without_a_tenant(model: Path, tmp_path: Path, master_key: Path) -> None:
    told = refusal(model, tmp_path, transfer(), {"SCX_MASTER_KEY_FILE": str(master_key)})
    assert "say in kv_connector_extra_config whose requests are" in told


def test_with_a_key_that_others_may_read(model: Path, tmp_path: Path) -> None:
    """By the middleware, before the engine is asked."""
    key = tmp_path / "key"
    key.write_bytes(bytes(range(32)))
    key.chmod(0o644)
    told = refusal(model, tmp_path, transfer(tenants="callers"), {"SCX_MASTER_KEY_FILE": str(key)}, *MIDDLEWARE)
    assert f"chmod 600 {key}" in told


def test_with_another_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(version, "_installed", lambda: "0.33.0")
    with pytest.raises(RuntimeError, match=r"expected 0\.32\.\*.*got 0\.33\.0"):
        _ = scx.vllm.SealedOffloadingConnector
