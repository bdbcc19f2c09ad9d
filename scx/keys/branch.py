"""A branch: the life of a session in one process, and its one-time keys.

Token permutations, redundant rows, noise and write numbers are used once and need never be drawn again. They are
numbered by counters that live and die with their branch. Whoever opens or loads a session, and every fork of the
process, starts a branch under a fresh random nonce. So no counter has to survive a process, and two that open one id
or load one file never draw the same one-time key.
"""

import itertools
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import scx_kernels as ops
from scx.architecture import ModelShape
from scx.calibration import Tokens, pick_tokens
from scx.devices import CPU
from scx.encoding import ENCODINGS, FeatureKey, Noise, RedundantScale, ResidualKey, TokenKeys, noise_step
from scx.keys.passes import PassKeys, draw_redundant, streams_of
from scx.keys.settings import KeySettings
from scx.keystream import KeyStream, Secret, derive
from scx_kernels.hidden import guarded

__all__ = ["Branch", "Writes"]

_NOISE_ROWS_AHEAD = 32


class Writes(NamedTuple):
    """Write numbers of the rows that one pass writes into a sealed cache, (B, S) int64, one for each token in all
    layers, and the public name of the branch that gave them out."""

    branch: str
    numbers: Tensor


class Branch:
    """The one-time keys of a session in one process.

    Noise rows that were drawn ahead and not taken end with the branch.

    Args:
        session_secret: the session's.
        nonce: 16 bytes that no other holder of the session uses; its public name is `name`, in hexadecimal.
        settings, shape: of the session.
    """

    def __init__(self, session_secret: Secret, nonce: bytes, settings: KeySettings, shape: ModelShape) -> None:
        self.name = nonce.hex()
        self._settings = settings
        self._shape = shape
        self.stream = KeyStream(derive(session_secret, "scx branch v1", nonce))
        self._steps = itertools.count()
        self._noise_draws = itertools.count()
        # By layer: for what, rows drawn, and how many of them are used.
        self._noise_ahead: dict[int, tuple[tuple[object, ...], Noise, int]] = {}
        self._noise_lock = threading.Lock()
        self._writes = ops.WriteCounter()

    def __repr__(self) -> str:
        return f"Branch({self.name})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("a branch holds one-time keys and is never pickled or copied")

    def wipe(self) -> None:
        """Wipe the branch's secrets, and the noise that was drawn ahead."""
        self.stream.wipe()
        for _, ahead, _ in self._noise_ahead.values():
            ahead.wipe()
        self._noise_ahead.clear()

    @guarded
    def draw_token_keys(
        self,
        tokens: int,
        batch: int,
        scale: RedundantScale | None,
        dtype: torch.dtype,
        device: torch.device = CPU,
        *,
        vocabulary: Tokens | None = None,
        layers: Sequence[int] | None = None,
        residual: ResidualKey | None = None,
    ) -> TokenKeys:
        """Token permutations and redundant rows of one forward pass; never the same ones twice.

        Args:
            tokens: new tokens S per sequence.
            batch: sequences B.
            scale: of real rows, on `device`; needed where the settings ask for redundant rows.
            dtype: of the redundant rows.
            vocabulary: tokens whose embeddings start as redundant rows of the residual stream; default: all of them.
            layers: for which; default: all. residual: under which the pass runs already; default: a fresh one.

        Returns: the keys, on `device`.
        """
        stream, step = self.stream, next(self._steps)
        redundant_num = self._settings.redundant_num
        places = list(range(self._shape.num_layers) if layers is None else layers)
        streams, rows = streams_of(places, batch, step), streams_of([0], batch, step)
        total = tokens + redundant_num
        drawn = stream.permutations("token permutations", streams, total, len(ENCODINGS), device)
        row_index = drawn.view(len(places), batch, len(ENCODINGS), total).permute(2, 0, 1, 3).contiguous()
        if residual is None:
            purpose = "token permutation of the residual stream"
            residual_index = stream.permutations(purpose, rows, total, device=device)[:, 0]
            decoys = stream.bits("redundant tokens", rows, redundant_num, torch.int64, device)
            decoys = pick_tokens(decoys, self._shape.vocab_size if vocabulary is None else vocabulary)
        else:
            residual_index, decoys = residual.entry, residual.decoys

        def redundant(encoding: str) -> Tensor | None:
            if not redundant_num:
                return None
            if scale is None:
                raise ValueError("scale: redundant rows need the scale of real rows")
            every = getattr(scale, encoding)
            per_row = (every if layers is None else every[places]).repeat_interleave(batch, dim=0)
            drawn = draw_redundant(stream, encoding, streams, redundant_num, per_row, dtype)
            return drawn.view(len(places), batch, redundant_num, -1)

        return TokenKeys.compose(row_index, residual_index, decoys, tuple(map(redundant, ENCODINGS)))

    @guarded
    def draw_feature_key(self, layer: int, batch: int, device: torch.device) -> FeatureKey:
        """Feature permutations of one layer to be used once."""
        heads, size = self._shape.num_kv_heads, self._shape.head_dim
        streams = streams_of([layer], batch, next(self._steps))
        drawn = self.stream.permutations("one-time feature keys", streams, size, 2 * heads)
        key, value = drawn.view(batch, 2, heads, size).unbind(1)
        return FeatureKey.compose(key, value, self._shape.num_heads // heads, device)

    def open_pass(
        self, tokens: int, batch: int, scale: RedundantScale | None, dtype: torch.dtype, device: torch.device
    ) -> PassKeys:
        """The row keys of one prefill over a boundary; arguments as in `draw_token_keys`, and where the keys go."""
        redundant_num = self._settings.redundant_num
        return PassKeys(self.stream, next(self._steps), tokens, batch, redundant_num, scale, dtype, device)

    def take_writes(self, batch: int, tokens: int, device: torch.device) -> Writes:
        """Write numbers for `tokens` further rows of `batch` sequences, never given out twice.

        Raises: OverflowError when they run out.
        """
        return Writes(self.name, self._writes.take(batch, tokens, device))

    @guarded
    def take_noise(
        self,
        batch: int,
        rows: int,
        device: torch.device,
        *,
        layer: int = 0,
        rms: float | None = None,
    ) -> Noise:
        """One-time noise for `rows` rows of `batch` sequences; no row is ever given out twice.

        Noise for lone tokens is drawn several steps ahead.

        Args:
            device: where the rows are.
            layer: the block whose input it covers. rms: the unit of the noise scale there; default: the first block's.
        """
        rms = self._shape.first_norm_rms if rms is None else rms
        wanted = (batch, device, rms)
        with self._noise_lock:
            if rows > 1:
                return self._draw_noise(layer, rows, *wanted)
            known, ahead, start = self._noise_ahead.get(layer, (None, None, 0))
            if ahead is None or known != wanted or start >= _NOISE_ROWS_AHEAD:
                ahead, start = self._draw_noise(layer, _NOISE_ROWS_AHEAD, *wanted), 0
            self._noise_ahead[layer] = (wanted, ahead, start + 1)
            return Noise(ahead.steps[:, start : start + 1], ahead.step)

    def _draw_noise(self, layer: int, rows: int, batch: int, device: torch.device, rms: float) -> Noise:
        draw = {"laplace": self.stream.laplace, "normal": self.stream.fine_normal}[self._settings.noise_distribution]
        scale = self._settings.noise_scale * rms
        step = noise_step(scale)
        streams = streams_of([layer], batch, next(self._noise_draws))
        drawn = draw("noise of the first block", streams, rows * self._shape.hidden_size, device)
        return Noise(drawn.mul_(scale / step).round_().int().view(batch, rows, -1), step)
