"""The pytest plugin that runs transformers' tests on encoded models: `-p transformers_suite.plugin --encoded-as rows`.

Every pass is held against a plain twin, caches are compared as what they decode to, and what fails must be listed.
"""

import os
from pathlib import Path
from typing import Any

import pytest
from transformers_suite import mixins
from transformers_suite.encoding import SETTINGS, encode_at_first_use
from transformers_suite.refusals import LIST, CountedByFamily, Listed, read
from transformers_suite.twin import check_passes, decoded


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("encoded models")
    group.addoption("--encoded-as", choices=[*SETTINGS, "plain"], default="plain", help="how decoders are encoded")
    group.addoption("--mixins", type=Path, help="the folder with transformers' mixins")


def pytest_configure(config: pytest.Config) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    setting, folder = config.getoption("--encoded-as"), config.getoption("--mixins")
    if folder is not None:
        mixins.make_importable(folder)
    config.pluginmanager.register(CountedByFamily(f"transformers' tests on models encoded as: {setting}"))
    config.addinivalue_line("filterwarnings", "ignore::pytest.PytestUnknownMarkWarning")
    if setting == "plain":
        return
    config.pluginmanager.register(Listed(read(LIST), setting))
    patch = pytest.MonkeyPatch()
    config.add_cleanup(patch.undo)
    encode_at_first_use(SETTINGS[setting], patch)
    check_passes(patch)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The suite compares the caches of two generations, whose keys differ here."""
    classes = {kind for item in items if isinstance(item, pytest.Function) and item.cls for kind in item.cls.__mro__}
    for kind in classes:
        plain = vars(kind).get("_check_caches_are_equal")
        if plain is not None:
            kind._check_caches_are_equal = _on_decoded(plain)


def _on_decoded(check: Any) -> Any:
    return lambda self, *caches: check(self, *map(decoded, caches))
