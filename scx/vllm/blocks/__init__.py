"""One block of a key-value cache, sealed as it leaves the device and opened as it comes back.

What lies in host memory, and in every tier below it, is a *row* of ciphertext and a *trailer* beside it. Both may be
altered by others at any time: nothing is read there twice, and nothing that was not authenticated is given out. The
bytes are specified in docs/formats.md, "Off-loaded blocks".
"""

from scx.vllm.blocks.block import TRAILER_BYTES, Block
from scx.vllm.blocks.device import DeviceCipher
from scx.vllm.blocks.host import HostCipher
from scx.vllm.blocks.transfer import Transfer

__all__ = ["TRAILER_BYTES", "Block", "DeviceCipher", "HostCipher", "Transfer"]
