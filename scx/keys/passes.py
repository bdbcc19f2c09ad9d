"""Row keys of one pass: drawn layer by layer where rows cross a boundary, each once."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from scx.devices import upload
from scx.encoding import CrossingKey, RedundantScale, inverse
from scx.keystream import LARGEST_NORMAL, KeyStream, StreamId
from scx_kernels.hidden import guarded

__all__ = ["PassKeys", "draw_redundant", "streams_of"]


def streams_of(layers: Iterable[int], batch: int, step: int) -> list[StreamId]:
    """The streams of some layers and all sequences in one step, sequences within layers."""
    return [(layer, sequence, step) for layer in layers for sequence in range(batch)]


@guarded
def draw_redundant(
    stream: KeyStream, encoding: str, streams: list[StreamId], count: int, scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """Redundant rows (len(streams), count, F) of one encoding, at the scale (len(streams), F) of real ones, or at the
    largest at which every draw is finite in `dtype`."""
    features = scale.shape[-1]
    largest = min(torch.finfo(dtype).max, torch.finfo(scale.dtype).max)
    scale = scale.clamp(max=largest / LARGEST_NORMAL)
    normal = stream.normal(f"redundant rows, {encoding}", streams, count * features, scale.device)
    return normal.view(len(streams), count, features).mul_(scale[:, None]).to(dtype)


class PassKeys:
    """Row keys of one prefill over a boundary, drawn as its blocks need them, each once; `Branch.open_pass` makes it.

    Args:
        stream, step: the branch's stream, and the number of this pass in it.
        tokens, batch, redundant_num: rows of a sequence, and sequences.
        scale: of real rows, on the CPU; needed where there are redundant ones.
        dtype: of the redundant rows. device: where the keys go.
    """

    def __init__(
        self, stream: KeyStream, step: int, tokens: int, batch: int, redundant_num: int,
        scale: RedundantScale | None, dtype: torch.dtype, device: torch.device,
    ) -> None:  # fmt: skip
        self._stream = stream
        self._step = step
        self._tokens = tokens
        self._batch = batch
        self._redundant_num = redundant_num
        self._scale = scale
        self._dtype = dtype
        self._device = device

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("a pass's keys are never pickled or copied")

    def __repr__(self) -> str:
        return f"PassKeys(batch={self._batch}, tokens={self._tokens})"

    @property
    def rows(self) -> int:
        """Encoded rows T of a sequence."""
        return self._tokens + self._redundant_num

    @guarded
    def permutation(self, layer: int, purpose: str) -> tuple[Tensor, Tensor]:
        """A row permutation (B, T) and its inverse (B, T), int64."""
        streams = streams_of([layer], self._batch, self._step)
        index = self._stream.permutations(f"row permutation, {purpose}", streams, self.rows)[:, 0]
        return upload(index.contiguous(), self._device), upload(inverse(index), self._device)

    @guarded
    def draw(self, layer: int, encoding: str, like: str | None = None) -> CrossingKey:
        """The key of one of ENCODINGS in a layer, or of another name with redundant rows to the scale of `like`."""
        entry, place = self.permutation(layer, encoding)
        return CrossingKey(entry, place[:, : self._tokens].contiguous(), self._redundant(layer, encoding, like))

    def renew(self, key: CrossingKey, layer: int, encoding: str) -> CrossingKey:
        """The permutation of `key` with fresh redundant rows."""
        return CrossingKey(key.entry, key.position, self._redundant(layer, encoding))

    def _redundant(self, layer: int, encoding: str, like: str | None = None) -> Tensor | None:
        if not self._redundant_num:
            return None
        if self._scale is None:
            raise ValueError("scale: redundant rows need the scale of real rows")
        scale: Tensor = getattr(self._scale, like or encoding)[layer].expand(self._batch, -1)
        streams = streams_of([layer], self._batch, self._step)
        rows = draw_redundant(self._stream, encoding, streams, self._redundant_num, scale, self._dtype)
        return upload(rows, self._device)
