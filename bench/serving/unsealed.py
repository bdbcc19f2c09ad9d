"""vLLM's off-loading on a CPU as it is: stock specs run on accelerators alone, so this is scx's connector and worker
with blocks copied between pages and rows where the cipher was. All else is equal, names included."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from scx.vllm.blocks import Block, Transfer
from scx.vllm.blocks.transfer import Outcome
from scx.vllm.connector import SealedOffloadingConnector
from scx.vllm.spec import SealedSpec

__all__ = ["UnsealedOffloadingConnector"]


class Copying:
    """In place of a cipher: memory to memory, in the caller's thread as well."""

    def store(self, blocks: Sequence[Block]) -> Transfer:
        return _moved(blocks, is_load=False)

    def load(self, blocks: Sequence[Block]) -> Transfer:
        return _moved(blocks, is_load=True)


def _moved(blocks: Sequence[Block], *, is_load: bool) -> Transfer:
    began = time.perf_counter()
    for block in blocks:
        at = 0
        for page in block.pages:
            bytes_of_page = page.numpy().view(np.uint8)
            part = block.row[at : at + len(bytes_of_page)]
            if is_load:
                bytes_of_page[:] = part
            else:
                part[:] = bytes_of_page
            at += len(part)
    size = sum(block.row.nbytes for block in blocks)
    return Transfer.done(Outcome([], size, time.perf_counter() - began))


def _copying(self: SealedSpec, device: torch.device) -> Copying:
    return Copying()


class UnsealedOffloadingConnector(SealedOffloadingConnector):
    """`kv_connector_module_path="bench.serving.unsealed"`. For measuring only: host memory holds K and V in clear."""

    def __init__(self, *args: Any, **options: Any) -> None:
        SealedSpec.cipher = _copying  # in every process of this engine, none of which has another connector
        super().__init__(*args, **options)
