"""`torchrun --nproc-per-node 1 -m scx.party.worker --connect HOST:PORT --model PATH`: the untrusted party's process."""

import argparse
import os
import sys

import torch
from transformers import AutoModelForCausalLM

from scx.models.llama import model_shape
from scx.party.process import serve

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m scx.party.worker", description="The untrusted party of SCX.")
    parser.add_argument("--connect", required=True, metavar="HOST:PORT", help="where the secure process listens")
    parser.add_argument("--model", required=True, help="directory or hub id")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    options = parser.parse_args(arguments)
    if int(os.environ.get("WORLD_SIZE", "1")) != 1:
        parser.error("one worker holds all weights: start torchrun with --nproc-per-node 1")
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype)).eval()
    shape = model_shape(model)
    decoder = model.to(options.device).base_model
    head = torch.nn.Sequential(decoder.norm, model.get_output_embeddings())
    serve(options.connect, decoder.layers, decoder.rotary_emb, head, shape.fingerprint)
    return 0


if __name__ == "__main__":
    sys.exit(main())
