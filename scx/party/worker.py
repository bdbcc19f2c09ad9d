"""`torchrun --nproc-per-node N -m scx.party.worker --connect HOST:PORT --credentials FILE --model PATH`: the untrusted
party's processes.

N ranks share the heads between them, by transformers' tensor parallelism; N divides the numbers of query and of
key/value heads. Rank 0 has the connection to the secure process. If one of them dies or fails, all end.
"""

import argparse
import os
import sys

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from scx.architecture import model_shape
from scx.party.credentials import Credentials
from scx.party.process import follow, serve
from scx.party.ranks import ParallelRanks, check_ranks, hold_shares, join_ranks

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m scx.party.worker", description="The untrusted party of SCX.")
    parser.add_argument("--connect", required=True, metavar="HOST:PORT", help="where the secure process listens")
    parser.add_argument("--credentials", required=True, metavar="FILE", help="the workers' half of the pair")
    parser.add_argument("--model", required=True, help="directory or hub id")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cpu", help="of several ranks each takes its own; default: %(default)s")
    options = parser.parse_args(arguments)
    size = int(os.environ.get("WORLD_SIZE", "1"))
    config = AutoConfig.from_pretrained(options.model)
    try:
        check_ranks(size, config)
        device = _own_device(options.device, size)
        credentials = Credentials.load(options.credentials)
        credentials.check("worker")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    with join_ranks(size, device) as ranks:
        placement = ranks.placement(config)
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype), **placement)
        hold_shares(model.eval())
        decoder = model.to(device).base_model
        parts = decoder.layers, decoder.rotary_emb, torch.nn.Sequential(decoder.norm, model.get_output_embeddings())
        if isinstance(ranks, ParallelRanks) and ranks.rank:
            follow(*parts, ranks)
        else:
            serve(options.connect, credentials, *parts, model_shape(model).fingerprint, ranks=ranks)
    return 0


def _own_device(name: str, size: int) -> torch.device:
    """This rank's device. Raises ValueError for one where transformers would not load several ranks."""
    if size == 1:
        return torch.device(name)
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    kind = "cpu" if accelerator is None else accelerator.type
    if name != kind:
        raise ValueError(f"--device: transformers puts {size} ranks onto {kind!r} here, expected that, got {name!r}")
    return torch.device(name, int(os.environ["LOCAL_RANK"])) if kind == "cuda" else torch.device(name)


if __name__ == "__main__":
    sys.exit(main())
