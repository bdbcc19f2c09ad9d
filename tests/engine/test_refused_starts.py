"""What is not as it has to be is refused when a server starts, with the remedy, not at the first request."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from engine.engines import transfer

import scx.vllm
from scx.commands.vllm_server import ServerFailed, serving
from scx.vllm import version

OPTIONS = ("--enforce-eager", "--max-model-len", "512")
MIDDLEWARE = ("--middleware", "scx.vllm.middleware.TenantMiddleware")


WITHOUT_A_KEY, WITHOUT_A_TENANT, A_KEY_THAT_OTHERS_READ = "no key", "no tenant", "a key that others read"


@pytest.fixture(scope="module")
def told(model: Path, master_key: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The logs of servers that do not start, started at once."""
    folder = tmp_path_factory.mktemp("refused")
    open_key = folder / "open.key"
    open_key.write_bytes(bytes(range(32)))
    open_key.chmod(0o644)
    given: dict[str, tuple[dict[str, Any], str, tuple[str, ...]]] = {
        WITHOUT_A_KEY: (transfer(tenant="alice"), "", ()),
        WITHOUT_A_TENANT: (transfer(), str(master_key), ()),
        A_KEY_THAT_OTHERS_READ: (transfer(tenants="callers"), str(open_key), MIDDLEWARE),
    }

    def log_of(name: str) -> str:
        config, key, options = given[name]
        log = folder / f"{name}.log"
        environment = {"SCX_MASTER_KEY_FILE": key}
        started = serving(model, [*OPTIONS, *options], log=log, transfer=config, environment=environment)
        with pytest.raises(ServerFailed, match="ended with status [1-9]"), started:
            pass
        return log.read_text(errors="replace")

    with ThreadPoolExecutor(len(given)) as pool:
        return dict(zip(given, pool.map(log_of, given), strict=True))


def test_without_a_key_file(told: dict[str, str]) -> None:
    assert "SCX_MASTER_KEY_FILE: not set" in told[WITHOUT_A_KEY]
    assert "python -m scx tenants key FILE" in told[WITHOUT_A_KEY]


def test_without_a_tenant(told: dict[str, str]) -> None:
    assert "say in kv_connector_extra_config whose requests are" in told[WITHOUT_A_TENANT]


def test_with_a_key_that_others_may_read(told: dict[str, str]) -> None:
    assert "chmod 600" in told[A_KEY_THAT_OTHERS_READ]


def test_with_another_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(version, "_installed", lambda: "0.33.0")
    with pytest.raises(RuntimeError, match=r"expected 0\.32\.\*.*got 0\.33\.0"):
        _ = scx.vllm.SealedOffloadingConnector
