"""Run transformers' own tests on encoded models, in every setting: `python -m tests.transformers_suite`.

With `--suite FOLDER`, a checkout's `tests`, these are the families' model and generation tests as they are there; else
the mixins of the installed version's sdist, which pip fetches, on the classes in `families.py`. Other arguments are
pytest's.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from tests.transformers_suite.encoding import SETTINGS
from tests.transformers_suite.mixins import bring
from tests.transformers_suite.refusals import FAMILIES

ROOT = Path(__file__).parents[2]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.transformers_suite", description=__doc__)
    parser.add_argument("--suite", type=Path, help="the tests folder of a checkout of transformers")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--keep", type=Path, default=ROOT / ".transformers", help="where the sdist is kept")
    options, pytest_arguments = parser.parse_known_args()
    if options.suite is None:
        try:
            mixins = bring(options.keep)
        except subprocess.CalledProcessError as failed:
            print(f"skipped: transformers' mixins are in its sdist, and pip cannot fetch that here ({failed})")
            return 0
        where, tests = ROOT, [f"--mixins={mixins}", "tests/transformers_suite/families.py"]
    else:
        suite = options.suite.resolve()
        where = suite.parent
        tests = [str(suite / "models" / family / f"test_modeling_{family}.py") for family in FAMILIES]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", "-p", "transformers_suite.plugin", "-q", *tests, *pytest_arguments]

    def run(setting: str) -> int:
        of_setting = [*command, f"--encoded-as={setting}"]
        return subprocess.run(of_setting, cwd=where, env={**os.environ, "PYTHONPATH": path}).returncode

    codes = [run(setting) for setting in options.settings]
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
