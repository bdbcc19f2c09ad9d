"""Low bits of a sum: of which tokens could a row under noise be at all, however likely?

Noise that is drawn as a float and added in floating point has gaps: of a wrong row, many features are sums that no
noise gives. On a common grid every sum is some noise's.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from scx.audit.vocabulary import first_inputs

__all__ = ["Explained", "on_floats", "on_grid", "read_low_bits"]

Explained = Callable[[Tensor, Tensor], Tensor]
"""Noisy features (F,) and the rows (C, F) they could be of, both float32 -> where noise explains them, (C, F) bool."""
_FEATURES_AT_ONCE = (16, 48, 128)  # then all others; few rows are left by then, if any are told apart


def on_floats(scale: float) -> Explained:
    """Noise as it is where it is drawn in float32, multiplied by its scale and added, each step rounded.

    Source: Mironov, On significance of the least significant bits for differential privacy (CCS 2012).
    """

    def explained(noisy: Tensor, rows: Tensor) -> Tensor:
        unit = torch.tensor(scale, dtype=torch.float32, device=rows.device)
        nearest = (noisy.double() - rows.double()).float()
        # Much smaller noise than its sum is rounded away, and too many of it give one sum to look at each.
        found = nearest.abs() < noisy.abs() / 2
        for noise in _around(nearest):
            drawn = torch.stack([x * unit == noise for x in _around(noise / unit)]).any(dim=0)
            found |= (rows + noise == noisy) & drawn
        return found

    return explained


def on_grid(scale: float, step: float, reach: float = 26.0) -> Explained:
    """Noise in multiples of `step` on rows rounded to these, the sum rounded to float32 (`scx_kernels.inject_permute`).

    Args:
        scale: of the noise. reach: how many scales noise has no gaps for; 7 for normal noise.
    """

    def explained(noisy: Tensor, rows: Tensor) -> Tensor:
        steps = noisy.double() / step
        noise = steps - (rows.double() / step).round()
        return (steps == steps.round()) & (noise.abs() <= reach * scale / step)

    return explained


@torch.no_grad()
def read_low_bits(model: PreTrainedModel, rows: Tensor, explained: Explained) -> tuple[Tensor, Tensor]:
    """Read tokens from rows that enter the first block under noise, each from itself alone, by what noise can be.

    Args:
        model: the weights, which the untrusted side has.
        rows: (B, N, D) float32, the first block's noisy attention input.
        explained: how noise is added, which is public.

    Returns: (B, N) int64 each: the tokens found, of those that are possible the nearest in L1, which is the most likely
    under Laplace noise; and how many are possible. Where none is, all are taken as they are.
    """
    table = torch.cat([part.float() for part in first_inputs(model)])
    read = [_read(row, table, explained) for row in rows.flatten(0, 1)]
    tokens, possible = torch.tensor(read, device=rows.device).unbind(1)
    return tokens.view(rows.shape[:2]), possible.view(rows.shape[:2])


def _read(row: Tensor, table: Tensor, explained: Explained) -> tuple[int, int]:
    # The smaller a sum, the finer its last bit.
    features = row.abs().argsort()
    candidates = torch.arange(len(table), device=table.device)
    for part in features.tensor_split(_FEATURES_AT_ONCE):
        if len(candidates):
            is_possible = explained(row[part], table[:, part][candidates]).all(dim=1)
            candidates = candidates[is_possible]
    among = candidates if len(candidates) else torch.arange(len(table), device=table.device)
    nearest = (table[among] - row).abs().sum(dim=1).argmin()
    return int(among[nearest]), len(candidates)


def _around(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A float and its two neighbours."""
    end = torch.tensor(torch.inf, dtype=x.dtype, device=x.device)
    return x, torch.nextafter(x, end), torch.nextafter(x, -end)
