"""`python -m scx`: the command line."""

import argparse
import sys
from pathlib import Path

from scx import audit, demo
from scx.keys import CACHE_ENCODINGS


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m scx", description="SCX on a real model.")
    commands = parser.add_subparsers(dest="command", required=True)
    shown = commands.add_parser("demo", help="answer a prompt twice, plain and encoded, and compare")
    shown.add_argument("--model", help="directory or hub id (default: SmolLM2-135M-Instruct)")
    shown.add_argument("--prompt", default=demo.DEFAULT_PROMPT)
    shown.add_argument("--redundant", type=int, default=16, help="redundant rows (default: %(default)s)")
    shown.add_argument(
        "--noise", type=float, default=5.0, help="noise scale in units of the rows' RMS; 0: none (default: %(default)s)"
    )
    shown.add_argument("--device", help="default: cuda if there is one, else cpu")
    shown.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="default: by device")
    shown.add_argument("--tokens", type=int, default=64, help="new tokens at most (default: %(default)s)")
    shown.add_argument(
        "--cache", default="permuted", choices=CACHE_ENCODINGS, help="how K and V are stored (default: %(default)s)"
    )
    shown.add_argument("--picture", type=Path, default=Path("scx-demo.png"), help="default: %(default)s")

    audited = commands.add_parser("audit", help="attack an encoded cache with the weights and without a key")
    audited.add_argument("--model", help="directory or hub id (default: SmolLM2-135M-Instruct)")
    audited.add_argument("--tokens", type=int, default=256, help="prompt tokens (default: %(default)s)")
    audited.add_argument("--redundant", type=int, default=64, help="redundant rows (default: %(default)s)")
    audited.add_argument("--noise", type=float, default=10.0, help="noise scale; 0: none (default: %(default)s)")
    return parser


def main(arguments: list[str] | None = None) -> int:
    options = vars(_parser().parse_args(arguments))
    if options.pop("command") == "audit":
        for finding in audit.run(**options):
            print(finding)
        return 0
    return 0 if demo.run(**options) else 1


if __name__ == "__main__":
    sys.exit(main())
