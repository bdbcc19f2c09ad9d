"""`python -m scx`: the command line."""

import argparse
import sys
from pathlib import Path

from scx.commands import audit, demo, demo_split, demo_vllm, pair, tenants, transcript
from scx.keys import CACHE_ENCODINGS
from scx.party.plan import CROSSINGS


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scx", description="SCX on a real model.")
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

    audited = commands.add_parser("audit", help="attack what is stored, lies in memory and crosses, without a key")
    audited.add_argument("--model", help="directory or hub id (default: SmolLM2-135M-Instruct)")
    audited.add_argument("--tokens", type=int, default=256, help="prompt tokens (default: %(default)s)")
    audited.add_argument("--redundant", type=int, default=64, help="redundant rows (default: %(default)s)")
    audited.add_argument("--noise", type=float, default=10.0, help="noise scale; 0: none (default: %(default)s)")
    audited.add_argument(
        "--only", nargs="+", choices=audit.CASES, default=(), metavar="ATTACK", help=f"of {', '.join(audit.CASES)}"
    )
    audited.add_argument("--json", type=Path, metavar="FILE", help="write the findings there")
    audited.add_argument("--picture", type=Path, metavar="FILE", help="draw them there")

    crossed = commands.add_parser("transcript", help="show what crosses the boundary of the split placement")
    crossed.add_argument("--model", help="directory or hub id (default: SmolLM2-135M-Instruct)")
    crossed.add_argument("--tokens", type=int, default=64, help="prompt tokens (default: %(default)s)")
    crossed.add_argument("--redundant", type=int, default=16, help="redundant rows (default: %(default)s)")
    crossed.add_argument("--noise", type=float, default=5.0, help="noise scale; 0: none (default: %(default)s)")
    crossed.add_argument("--crossings", choices=CROSSINGS, default="few", help="default: %(default)s")
    crossed.add_argument("--reuse-feature-keys", action="store_true", help="one feature key over a generation")
    crossed.add_argument(
        "--prefill-top-k", type=int, metavar="K", help="the untrusted side returns each row's K largest logits"
    )

    divided = commands.add_parser("demo-split", help="answer a prompt with two processes, and show what crossed")
    divided.add_argument("--model", help="directory or hub id (default: SmolLM2-135M-Instruct)")
    divided.add_argument("--prompt", default=demo.DEFAULT_PROMPT)
    divided.add_argument("--tokens", type=int, default=32, help="new tokens at most (default: %(default)s)")
    divided.add_argument("--crossings", choices=CROSSINGS, default="few", help="default: %(default)s")

    served = commands.add_parser("demo-vllm", help="serve a conversation with vLLM, sealed, and alter a block of it")
    served.add_argument("--tokens", type=int, default=40, help="new tokens of an answer at most (default: %(default)s)")

    paired = commands.add_parser("pair", help="make the credentials by which two processes know one another")
    paired.add_argument("directory", type=Path, help="where secure.pem and worker.pem go")

    _add_tenants(commands.add_parser("tenants", help="the tenants of a vLLM server: the master key, who they are"))
    return parser


def _add_tenants(parser: argparse.ArgumentParser) -> None:
    registry = argparse.ArgumentParser(add_help=False)
    registry.add_argument("--file", type=Path, help="the registry (default: what SCX_TENANTS_FILE names)")
    named = argparse.ArgumentParser(add_help=False, parents=[registry])
    named.add_argument("name", help="the tenant's")
    actions = parser.add_subparsers(dest="action", required=True)
    keyed = actions.add_parser("key", help="draw a master key into a new file")
    keyed.add_argument("path", type=Path, metavar="FILE")
    added = actions.add_parser("add", parents=[named], help="add a tenant, and show its API key, once")
    added.add_argument("--kind", default="default", help="its class, for metrics (default: %(default)s)")
    actions.add_parser("list", parents=[registry], help="show who there is")
    issued = actions.add_parser("credential", parents=[named], help="another API key for a tenant, shown once")
    issued.add_argument("--replace", action="store_true", help="revoke the earlier ones")
    actions.add_parser("rotate", parents=[named], help="a new version of a tenant's key: it writes, older ones read")
    dropped = actions.add_parser("drop", parents=[named], help="take out an old version: its blocks are useless then")
    dropped.add_argument("version", type=int)
    actions.add_parser("forget", parents=[named], help="take out a tenant: its blocks are useless then")


def main(arguments: list[str] | None = None) -> int:
    options = vars(_parser().parse_args(arguments))
    command = options.pop("command")
    if command == "audit":
        audit.run(**options)
        return 0
    if command == "transcript":
        print(transcript.run(**options))
        return 0
    if command == "pair":
        try:
            print(*pair.run(**options), sep="\n")
        except OSError as error:
            print(error, file=sys.stderr)
            return 1
        return 0
    if command == "tenants":
        try:
            print(*tenants.run(**options), sep="\n")
        except (OSError, ValueError) as error:
            print(error, file=sys.stderr)
            return 1
        return 0
    if command == "demo-split":
        return 0 if demo_split.run(**options) else 1
    if command == "demo-vllm":
        return 0 if demo_vllm.run(**options) else 1
    return 0 if demo.run(**options) else 1


if __name__ == "__main__":
    sys.exit(main())
