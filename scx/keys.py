"""Keys: who draws them, for which session, and what they are.

`SCXKeyGenerator` holds the master key. A prefill opens a `Session`, whose secret is derived from the master key and the
session's public id. Everything secret of that conversation is drawn from the session secret, so a session can be saved
and handed on without the master key.

Two kinds of keys hang below it. Feature permutations and the keys that `Session.derive_key` gives belong to the
session: they come out the same wherever it goes on, because its cache is stored under them. Token permutations,
redundant rows and noise are used once and need never be drawn again: they belong to a *branch*, the life of the session
in one process, and are numbered by counters that live and die with it. Every load, and every fork of the process,
starts a branch under a fresh random nonce. So no counter has to survive a process, and two that load one file never
draw the same one-time key.
"""

import itertools
import os
import secrets
import threading
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

import scx_kernels as ops
from scx.devices import CPU, upload
from scx.encoding import (
    ENCODINGS,
    FeatureKey,
    LayerKeys,
    Noise,
    RedundantScale,
    ResidualKey,
    RowKey,
    TokenKeys,
    inverse,
)
from scx.keystream import KeyStream, Secret, StreamId, derive

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from scx.party.sharing import SharedKeys

__all__ = [
    "CACHE_ENCODINGS",
    "CIPHER_ROUNDS",
    "KeySettings",
    "ModelShape",
    "PassKeys",
    "SCXKeyGenerator",
    "Session",
    "Step",
    "public_bytes",
]

SESSION_ID_BYTES = 16
BRANCH_BYTES = 16
NOISE_DISTRIBUTIONS = ("laplace", "normal")
CACHE_ENCODINGS = ("permuted", "sealed")
CIPHER_ROUNDS = (8, 12, 20)
_NOISE_ROWS_AHEAD = 32


@dataclass(frozen=True)
class ModelShape:
    """What keys need to know of a model.

    `first_norm_rms` is the root mean square of the first block's normalised rows, the unit of the noise scale;
    `fingerprint` is public and tells two models apart.
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    first_norm_rms: float
    fingerprint: str


@dataclass(frozen=True)
class KeySettings:
    """What a generator was asked for, as it applies to one model: public, and carried by every session."""

    redundant_num: int
    alp: bool
    noise_scale: float
    noise_distribution: str
    start_layers: tuple[int, ...]
    end_layers: tuple[int, ...]
    sealed_layers: tuple[int, ...] = ()
    cipher_rounds: int = 20

    def difference(self, other: "KeySettings") -> str:
        """The fields that differ, as "name a and b"; empty if none do."""
        pairs = [(f.name, getattr(self, f.name), getattr(other, f.name)) for f in fields(self)]
        return ", ".join(f"{name} {mine} and {theirs}" for name, mine, theirs in pairs if mine != theirs)


def _check_layers(name: str, layers: Iterable[int] | None) -> tuple[int, ...] | None:
    if layers is None:
        return None
    given = list(layers)
    if not all(isinstance(layer, int) and not isinstance(layer, bool) and layer >= 0 for layer in given):
        raise ValueError(f"{name}: expected layer numbers from 0, got {given}")
    ordered = tuple(sorted(given))
    if ordered and ordered != tuple(range(ordered[0], ordered[0] + len(ordered))):
        raise ValueError(f"{name}: expected neighbouring layers, each once, got {given}")
    if name == "decode_start_layers" and ordered and ordered[0] != 0:
        raise ValueError(f"{name}: expected the first layers, beginning with 0, got {given}")
    return ordered


def _positive(name: str, value: int, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")
    return value


def public_bytes(name: str, value: str, size: int) -> bytes:
    """Bytes written in hexadecimal."""
    try:
        read = bytes.fromhex(value)
    except ValueError:
        read = b""
    if len(read) != size or read.hex() != value:
        raise ValueError(f"{name}: expected {size} bytes in hexadecimal, got {value!r:.80}")
    return read


class SCXKeyGenerator:
    """Draws every key of SCX from one master key.

    Args:
        seq_len: expected number of prompt tokens. Keys are drawn for the length that a request really has.
        hidden_dim: hidden size D of the model.
        qk_hidden_dim: head size d of the model.
        redundant_num: redundant rows R among the tokens of every encoding that permutes tokens.
        alp: add removable noise to the first block's attention input, in prefill and generation.
        batch_size: expected number of sequences. Keys are drawn for the batch that a request really has.
        decode_start_layers: first layers whose keys stay on the secure side, such as [0]; default: the first
            `protected_layers`.
        decode_end_layers: last layers whose keys stay on the secure side; default: the last `protected_layers`.
        master_key: 32 bytes; drawn from the operating system if not given.
        noise_scale: scale of the noise in units of the root mean square of the normalised rows it is added to
            (the paper's range is 5 to 10).
        noise_distribution: "laplace" (scale is its b) or "normal" (scale is its standard deviation).
        protected_layers: how many first and last layers are protected where the lists above are not given.
        cache_encoding: how K and V are stored: "permuted", or "sealed" under a stream cipher as well; one for all
            layers, or a sequence with one for each.
        cipher_rounds: of the ChaCha that seals: 8, 12 or 20.
        keep_keystream: where the model runs on a CPU, keep the keystream of a sealed cache in the session for as long
            as the cache lives, once more the size of its K and V. False: make it anew for every token, in that much
            less memory. The bits are the same; it is no part of a session's settings.

    Raises: TypeError, ValueError naming the argument.
    """

    def __init__(
        self,
        seq_len: int,
        hidden_dim: int,
        qk_hidden_dim: int,
        redundant_num: int = 0,
        alp: bool = False,
        batch_size: int = 1,
        *,
        decode_start_layers: Iterable[int] | None = None,
        decode_end_layers: Iterable[int] | None = None,
        master_key: bytes | None = None,
        noise_scale: float = 5.0,
        noise_distribution: str = "laplace",
        protected_layers: int = 1,
        cache_encoding: str | Sequence[str] = "permuted",
        cipher_rounds: int = 20,
        keep_keystream: bool = True,
    ) -> None:
        self.seq_len = _positive("seq_len", seq_len)
        self.hidden_dim = _positive("hidden_dim", hidden_dim)
        self.qk_hidden_dim = _positive("qk_hidden_dim", qk_hidden_dim)
        self.redundant_num = _positive("redundant_num", redundant_num, least=0)
        self.batch_size = _positive("batch_size", batch_size)
        self.protected_layers = _positive("protected_layers", protected_layers, least=0)
        self.alp = bool(alp)
        if not 0 < noise_scale < 1e4:
            raise ValueError(f"noise_scale: expected a number between 0 and 1e4, got {noise_scale}")
        self.noise_scale = float(noise_scale)
        if noise_distribution not in NOISE_DISTRIBUTIONS:
            raise ValueError(f"noise_distribution: expected one of {NOISE_DISTRIBUTIONS}, got {noise_distribution!r}")
        self.noise_distribution = noise_distribution
        self.decode_start_layers = _check_layers("decode_start_layers", decode_start_layers)
        self.decode_end_layers = _check_layers("decode_end_layers", decode_end_layers)
        given = [cache_encoding] if isinstance(cache_encoding, str) else list(cache_encoding)
        if not given or any(encoding not in CACHE_ENCODINGS for encoding in given):
            raise ValueError(f"cache_encoding: expected {CACHE_ENCODINGS}, one or one a layer, got {cache_encoding!r}")
        self.cache_encoding = cache_encoding if isinstance(cache_encoding, str) else tuple(given)
        if cipher_rounds not in CIPHER_ROUNDS:
            raise ValueError(f"cipher_rounds: expected one of {CIPHER_ROUNDS}, got {cipher_rounds!r}")
        self.cipher_rounds = cipher_rounds
        self.keep_keystream = bool(keep_keystream)
        self._master_key = Secret(master_key)
        self._opened: set[bytes] = set()

    @classmethod
    def for_model(cls, model: "PreTrainedModel", **options: Any) -> "SCXKeyGenerator":
        """A generator with the sizes of `model`; `options` are the other arguments of the constructor."""
        from scx.models.llama import model_shape

        shape = model_shape(model)
        options.setdefault("seq_len", 512)
        return cls(hidden_dim=shape.hidden_size, qk_hidden_dim=shape.head_dim, **options)

    @classmethod
    def for_config(cls, config: "PreTrainedConfig", **options: Any) -> "SCXKeyGenerator":
        """A generator with the sizes that a model of this configuration will have; `options` as in `for_model`."""
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        options.setdefault("seq_len", 512)
        return cls(hidden_dim=config.hidden_size, qk_hidden_dim=head_dim, **options)

    @classmethod
    def for_session(cls, session: "Session", **options: Any) -> "SCXKeyGenerator":
        """A generator with the sizes and settings of a session and, unless `options` say otherwise, a fresh master key.

        A model encoded with it continues that session; its other sessions have nothing in common with it.
        """
        shape, settings = session.shape, session.settings
        given: dict[str, Any] = {
            "seq_len": 512,
            "hidden_dim": shape.hidden_size,
            "qk_hidden_dim": shape.head_dim,
            "batch_size": session.batch_size,
            "redundant_num": settings.redundant_num,
            "alp": settings.alp,
            "noise_scale": settings.noise_scale,
            "noise_distribution": settings.noise_distribution,
            "decode_start_layers": settings.start_layers,
            "decode_end_layers": settings.end_layers,
            "cache_encoding": tuple(
                "sealed" if layer in settings.sealed_layers else "permuted" for layer in range(shape.num_layers)
            ),
            "cipher_rounds": settings.cipher_rounds,
            "keep_keystream": session.keep_keystream,
        }
        return cls(**{**given, **options})

    def __repr__(self) -> str:
        return (
            f"SCXKeyGenerator(hidden_dim={self.hidden_dim}, qk_hidden_dim={self.qk_hidden_dim}, "
            f"redundant_num={self.redundant_num}, alp={self.alp})"
        )

    def __reduce__(self) -> str:
        raise TypeError("SCXKeyGenerator holds the master key and is never pickled")

    def __deepcopy__(self, memo: dict) -> "SCXKeyGenerator":
        return self

    def protected(self, shape: ModelShape) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(start layers, end layers) whose keys never leave the secure side, for a model of this shape."""
        layers, default = shape.num_layers, min(self.protected_layers, shape.num_layers)
        start = self.decode_start_layers
        if start is None:
            start = tuple(range(default))
        end = self.decode_end_layers
        if end is None:
            end = tuple(range(max(layers - default, len(start)), layers))
        if start and start[-1] >= layers:
            raise ValueError(f"decode_start_layers: the model has {layers} layers, got {list(start)}")
        if end and end[-1] != layers - 1:
            raise ValueError(f"decode_end_layers: expected the last of {layers} layers, got {list(end)}")
        if start and end and start[-1] >= end[0]:
            raise ValueError(f"decode_start_layers and decode_end_layers overlap: {list(start)} and {list(end)}")
        return start, end

    def sealed(self, shape: ModelShape) -> tuple[int, ...]:
        """The layers whose K and V are stored sealed, for a model of this shape."""
        encodings = self.cache_encoding
        if isinstance(encodings, str):
            encodings = (encodings,) * shape.num_layers
        if len(encodings) != shape.num_layers:
            raise ValueError(f"cache_encoding: the model has {shape.num_layers} layers, got {len(encodings)} encodings")
        return tuple(layer for layer, encoding in enumerate(encodings) if encoding == "sealed")

    def settings(self, shape: ModelShape) -> KeySettings:
        """What this generator's sessions on a model of this shape are drawn for."""
        start, end = self.protected(shape)
        return KeySettings(
            redundant_num=self.redundant_num,
            alp=self.alp,
            noise_scale=self.noise_scale,
            noise_distribution=self.noise_distribution,
            start_layers=start,
            end_layers=end,
            sealed_layers=self.sealed(shape),
            cipher_rounds=self.cipher_rounds,
        )

    def open_session(self, shape: ModelShape, batch_size: int, session_id: bytes | None = None) -> "Session":
        """Open a session for `batch_size` sequences on a model of this shape.

        Args:
            session_id: 16 public bytes; drawn from the operating system if not given. The same master key and id
                give the same keys on any machine, so one generator opens an id once.

        Raises: ValueError if the id has the wrong length or was opened before.
        """
        if session_id is None:
            session_id = secrets.token_bytes(SESSION_ID_BYTES)
        if len(session_id) != SESSION_ID_BYTES:
            raise ValueError(f"session_id: expected {SESSION_ID_BYTES} bytes, got {len(session_id)}")
        if session_id in self._opened:
            raise ValueError(f"session_id: {session_id.hex()} was opened before; two sessions never share keys")
        self._opened.add(session_id)
        secret = derive(self._master_key, "scx session v1", session_id)
        session = Session(secret, self.settings(shape), shape, _positive("batch_size", batch_size), session_id)
        session.keep_keystream = self.keep_keystream
        return session


class _Branch:
    """The one-time streams of a session in one process, and how far they are used up.

    Noise rows that were drawn ahead and not taken end with the branch.
    """

    def __init__(self, session_secret: Secret, nonce: bytes) -> None:
        self.name = nonce.hex()
        self.process = os.getpid()
        self.stream = KeyStream(derive(session_secret, "scx branch v1", nonce))
        self.steps = itertools.count()
        self.noise_draws = itertools.count()
        self.noise_ahead: dict[int, tuple[Noise, int]] = {}  # by layer: rows drawn, and how many of them are used
        self.noise_lock = threading.Lock()
        self.writes = ops.WriteCounter()


class Session:
    """One conversation's keys, carried by the cache that its prefill returns.

    `id`, `branch`, `settings`, `shape` and `batch_size` are public, the rest is not. `newest_save` is the number of the
    newest saved cache that this session has written or read, 0 if none. `keep_keystream` is the wish of whoever runs
    the model, as in `SCXKeyGenerator`.

    Args:
        secret: the session's secret.
        session_id: 16 public bytes.
        branch: 16 bytes that no other holder of this session uses; zeros where the generator opens it.
    """

    def __init__(
        self,
        secret: Secret,
        settings: KeySettings,
        shape: ModelShape,
        batch_size: int,
        session_id: bytes,
        branch: bytes = bytes(BRANCH_BYTES),
    ) -> None:
        self.settings = settings
        self.shape = shape
        self.batch_size = batch_size
        self.id = session_id.hex()
        self.start_layers, self.end_layers = settings.start_layers, settings.end_layers
        self.newest_save = 0
        self._secret = secret
        self._stream = KeyStream(secret)
        self._current_branch = _Branch(secret, branch)
        self._feature_keys: dict[torch.device, list[FeatureKey]] = {}
        self._shared_keys: SharedKeys | None = None  # of its prefill, where that crossed a boundary
        self._cipher_keys: dict[tuple[str, torch.device], Tensor] = {}
        self.keep_keystream = True
        # Of a layer of a cache, by the layer's object: not in it, since caches are copied, pickled and handed on.
        self._kept: weakref.WeakKeyDictionary[object, ops.KeptKeystream] = weakref.WeakKeyDictionary()

    def __repr__(self) -> str:
        return f"Session(id={self.id}, batch_size={self.batch_size})"

    def __reduce__(self) -> str:
        raise TypeError("a session holds keys and is never pickled")

    def __deepcopy__(self, memo: dict) -> "Session":
        return self

    @property
    def protected_layers(self) -> tuple[int, ...]:
        """Layers whose keys never leave the secure side."""
        return self.start_layers + self.end_layers

    @property
    def shared_layers(self) -> tuple[int, ...]:
        """Layers whose keys may be shared with the untrusted side."""
        return tuple(range(len(self.start_layers), self.shape.num_layers - len(self.end_layers)))

    @property
    def _branch(self) -> _Branch:
        # A forked process has copies of its parent's counters; it goes on in a branch of its own.
        if self._current_branch.process != os.getpid():
            self._current_branch = _Branch(self._secret, secrets.token_bytes(BRANCH_BYTES))
        return self._current_branch

    @property
    def branch(self) -> str:
        """The public name of the branch in which this process draws one-time keys, in hexadecimal."""
        return self._branch.name

    def derive_key(self, purpose: str, *, branch: str | None = None) -> Secret:
        """A key of 32 bytes below this session for a purpose of its own, such as "sealed cache".

        Args:
            purpose: what the key is for; each purpose has a key of its own.
            branch: the name of a branch. Without it, the key is the same for every holder of the session. Two holders
                that go on from the same cache would encrypt different values under the same position, so a cipher that
                must not repeat takes the writer's `session.branch`, and the reader finds it beside the data.

        Raises: ValueError for an empty purpose or a branch that is not 16 bytes in hexadecimal.
        """
        if not purpose:
            raise ValueError("purpose: expected a name, got an empty one")
        salt = b"" if branch is None else public_bytes("branch", branch, BRANCH_BYTES)
        return derive(self._secret, f"scx session key v1, {'session' if branch is None else 'branch'}\0{purpose}", salt)

    def share_keys(self) -> "SharedKeys":
        """What key sharing (stage 2) gives to the untrusted side: the token permutations of the middle blocks, in the
        prefill of this session, and of no other block.

        Raises: RuntimeError if no prefill of this session crossed a boundary in this process: a cache of the fused
            placement lies in token order, and no token permutation opens it.
        """
        if self._shared_keys is None:
            raise RuntimeError("share_keys: this session had no prefill in the split placement in this process")
        return self._shared_keys

    def take_writes(self, batch: int, tokens: int, device: torch.device) -> Tensor:
        """Write numbers (batch, tokens) for rows of a sealed cache, one for each token in all layers, never given out
        twice in a branch.

        Raises: OverflowError when they run out.
        """
        return self._branch.writes.take(batch, tokens, device)

    def sealing(self, layer: int, writes: Tensor, branch: str, owner: object = None) -> ops.Sealing:
        """How rows of a layer with these write numbers (B, N) are sealed by the writer in `branch`; on their device.

        Args:
            owner: the object that holds the rows. On a CPU their keystream may be kept here for as long as it lives.
        """
        place = (branch, writes.device)
        if place not in self._cipher_keys:
            key = ops.key_words(self.derive_key("sealed cache", branch=branch).reveal())
            self._cipher_keys[place] = upload(key, writes.device)
        kept = None if owner is None else self._kept_keystream(owner, writes.device)
        return ops.Sealing(self._cipher_keys[place], writes, layer, self.settings.cipher_rounds, kept=kept)

    def _kept_keystream(self, owner: object, device: torch.device) -> ops.KeptKeystream | None:
        if device.type != "cpu" or not self.keep_keystream:
            self.forget_keystream(owner)
            return None
        kept = self._kept.get(owner)
        if kept is None:
            kept = self._kept[owner] = ops.KeptKeystream()
        return kept

    def forget_keystream(self, owner: object) -> None:
        """Drop what is kept of the keystream of the rows that `owner` holds."""
        if self._kept:
            self._kept.pop(owner, None)

    def _streams(self, batch: int, step: int) -> list[StreamId]:
        return [(layer, sequence, step) for layer in range(self.shape.num_layers) for sequence in range(batch)]

    def feature_key(self, layer: int, device: torch.device) -> FeatureKey:
        """The feature permutations of one layer, for the session's sequences in order."""
        keys = self._feature_keys.get(device)
        if keys is None:
            keys = self._feature_keys[device] = self._draw_feature_keys(device)
        return keys[layer]

    def _draw_feature_keys(self, device: torch.device) -> list[FeatureKey]:
        shape, streams = self.shape, self._streams(self.batch_size, 0)
        heads, size = shape.num_kv_heads, shape.head_dim
        groups = shape.num_heads // heads

        drawn = self._stream.permutations("feature permutations of K and V", streams, size, 2 * heads, device)
        key, value = drawn.view(shape.num_layers, self.batch_size, 2, heads, size).unbind(2)
        key_inverse, value_inverse = inverse(key), inverse(value)
        query, output = (index.repeat_interleave(groups, dim=2) for index in (key, value_inverse))
        stacked = [x.unbind(0) for x in (query, key, value, output, key_inverse, value_inverse)]
        return [FeatureKey(*layer) for layer in zip(*stacked, strict=True)]

    def draw_token_keys(
        self,
        tokens: int,
        batch: int,
        scale: RedundantScale | None,
        dtype: torch.dtype,
        device: torch.device = CPU,
    ) -> TokenKeys:
        """Token permutations and redundant rows of one forward pass; never the same ones twice.

        Args:
            tokens: new tokens S per sequence.
            batch: sequences B.
            scale: of real rows, on `device`; needed where the generator asks for redundant rows.
            dtype: of the redundant rows.

        Returns: the keys, on `device`.
        """
        branch = self._branch
        step = next(branch.steps)
        streams = self._streams(batch, step)
        layers, redundant_num = self.shape.num_layers, self.settings.redundant_num
        total = tokens + redundant_num
        drawn = branch.stream.permutations("token permutations", streams, total, len(ENCODINGS), device)
        row_index = drawn.view(layers, batch, len(ENCODINGS), total).permute(2, 0, 1, 3).contiguous()
        rows = [(0, sequence, step) for sequence in range(batch)]
        purpose = "token permutation of the residual stream"
        residual_index = branch.stream.permutations(purpose, rows, total, device=device)[:, 0]
        decoys = branch.stream.bits("redundant tokens", rows, redundant_num, torch.int64, device)
        decoys = decoys.remainder_(self.shape.vocab_size)

        def draw_redundant(encoding: str) -> Tensor | None:
            if not redundant_num:
                return None
            if scale is None:
                raise ValueError("scale: redundant rows need the scale of real rows")
            per_feature: Tensor = getattr(scale, encoding)
            features = per_feature.shape[-1]
            normal = branch.stream.normal(f"redundant rows, {encoding}", streams, redundant_num * features, device)
            rows = normal.view(layers, batch, redundant_num, features)
            return rows.mul_(per_feature[:, None, None]).to(dtype)

        redundant = tuple(draw_redundant(encoding) for encoding in ENCODINGS)
        return TokenKeys.compose(row_index, residual_index, decoys, redundant)

    def draw_feature_key(self, layer: int, batch: int, device: torch.device) -> FeatureKey:
        """Feature permutations of one layer to be used once."""
        branch, shape = self._branch, self.shape
        step = next(branch.steps)
        streams = [(layer, sequence, step) for sequence in range(batch)]
        drawn = branch.stream.permutations("one-time feature keys", streams, shape.head_dim, 2 * shape.num_kv_heads)
        key, value = drawn.view(batch, 2, shape.num_kv_heads, shape.head_dim).unbind(1)
        return FeatureKey.compose(key, value, shape.num_heads // shape.num_kv_heads, device)

    def open_pass(
        self, tokens: int, batch: int, scale: RedundantScale | None, dtype: torch.dtype, device: torch.device
    ) -> "PassKeys":
        """The row keys of one prefill over a boundary; arguments as in `draw_token_keys`, and where the keys go."""
        branch = self._branch
        return PassKeys(self, branch.stream, next(branch.steps), tokens, batch, scale, dtype, device)

    def take_noise(
        self, batch: int, rows: int, weights: Sequence[Tensor], *, layer: int = 0, rms: float | None = None
    ) -> Noise:
        """One-time noise for `rows` rows of `batch` sequences entering `weights` (each (N, D)), with its images.

        Noise for lone tokens is drawn several steps ahead, so that a step needs no product for its image. No row is
        ever given out twice.

        Args:
            layer: the block whose input it covers. rms: the unit of the noise scale there; default: the first block's.
        """
        branch = self._branch
        rms = self.shape.first_norm_rms if rms is None else rms
        with branch.noise_lock:
            if rows > 1:
                return self._draw_noise(branch, batch, rows, weights, layer, rms)
            ahead, start = branch.noise_ahead.get(layer, (None, 0))
            fits = ahead is not None and ahead.noise.shape[0] == batch and ahead.noise.device == weights[0].device
            if ahead is None or not fits or start >= ahead.noise.shape[1]:
                ahead, start = self._draw_noise(branch, batch, _NOISE_ROWS_AHEAD, weights, layer, rms), 0
            branch.noise_ahead[layer] = (ahead, start + 1)
            return ahead[start : start + 1]

    def _draw_noise(
        self, branch: _Branch, batch: int, rows: int, weights: Sequence[Tensor], layer: int, rms: float
    ) -> Noise:
        number = next(branch.noise_draws)
        draw = getattr(branch.stream, self.settings.noise_distribution)
        streams = [(layer, sequence, number) for sequence in range(batch)]
        drawn = draw("noise of the first block", streams, rows * self.shape.hidden_size, weights[0].device)
        drawn = drawn.view(batch, rows, -1).mul_(self.settings.noise_scale * rms)
        noise = drawn.to(ops.accumulation_dtype(weights[0].dtype))
        return Noise(noise, tuple(ops.noise_image(noise, weight) for weight in weights))


class PassKeys:
    """Row keys of one prefill over a boundary, drawn as its blocks need them, each once; `Session.open_pass` makes it.

    Args:
        stream, step: the branch's stream, and the number of this pass in it.
        tokens, batch, scale, dtype, device: of the rows to be encoded.
    """

    def __init__(
        self,
        session: Session,
        stream: KeyStream,
        step: int,
        tokens: int,
        batch: int,
        scale: RedundantScale | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._redundant_num = session.settings.redundant_num
        self._stream = stream
        self._step = step
        self._tokens = tokens
        self._batch = batch
        self._scale = scale
        self._dtype = dtype
        self._device = device

    def __repr__(self) -> str:
        return f"PassKeys(batch={self._batch}, tokens={self._tokens})"

    def _streams(self, layer: int) -> list[StreamId]:
        return [(layer, sequence, self._step) for sequence in range(self._batch)]

    def permutation(self, layer: int, purpose: str) -> tuple[Tensor, Tensor]:
        """A `row_index` (B, T) and its inverse (B, T), int64."""
        total = self._tokens + self._redundant_num
        index = self._stream.permutations(f"row permutation, {purpose}", self._streams(layer), total)[:, 0]
        return upload(index.contiguous(), self._device), upload(inverse(index), self._device)

    def draw(self, layer: int, encoding: str, like: str | None = None) -> RowKey:
        """The key of one of ENCODINGS in a layer, or of another name with redundant rows to the scale of `like`."""
        row_index, place = self.permutation(layer, encoding)
        return RowKey(row_index, place[:, : self._tokens].contiguous(), self._redundant(layer, encoding, like))

    def renew(self, key: RowKey, layer: int, encoding: str) -> RowKey:
        """The permutation of `key` with fresh redundant rows."""
        return RowKey(key.row_index, key.position, self._redundant(layer, encoding))

    def _redundant(self, layer: int, encoding: str, like: str | None = None) -> Tensor | None:
        if not self._redundant_num:
            return None
        if self._scale is None:
            raise ValueError("scale: redundant rows need the scale of real rows")
        per_feature: Tensor = getattr(self._scale, like or encoding)[layer]
        count = self._redundant_num * len(per_feature)
        normal = self._stream.normal(f"redundant rows, {encoding}", self._streams(layer), count)
        rows = normal.view(self._batch, self._redundant_num, -1).mul_(per_feature)
        return upload(rows.to(self._dtype), self._device)


class FeatureKeys(Protocol):
    """Who knows under which feature permutations the rows of a batch are stored: a session, or a cache of it."""

    def feature_key(self, layer: int, device: torch.device) -> FeatureKey: ...


class Step:
    """The keys of one forward pass, handed to every block.

    Without `token_keys` the rows stay in token order: a lone generated token has no order to hide.
    """

    def __init__(self, session: Session, feature_keys: FeatureKeys, token_keys: TokenKeys | None) -> None:
        self.session = session
        self.feature_key = feature_keys.feature_key
        self._token_keys = token_keys
        self.noise: Noise | None = None  # of the first block's input, once prepared
        self.writes: Tensor | None = None  # write numbers of the pass's tokens (B, S), where layers are sealed
        self._rows: Tensor
        self._on_device: dict[torch.device, tuple[ResidualKey, list[LayerKeys]]] = {}

    def __repr__(self) -> str:
        return f"Step(session={self.session.id})"

    def _keys_on(self, device: torch.device) -> tuple[ResidualKey, list[LayerKeys]] | None:
        if self._token_keys is None:
            return None
        keys = self._on_device.get(device)
        if keys is None:
            moved = self._token_keys.to(device)
            keys = self._on_device[device] = (moved.residual, moved.layers())
        return keys

    def residual_key(self, device: torch.device) -> ResidualKey | None:
        """The encoding of the residual stream, on the device that runs it; None for rows in token order."""
        keys = self._keys_on(device)
        return None if keys is None else keys[0]

    def layer_keys(self, layer: int, device: torch.device) -> LayerKeys:
        """The token keys of one layer, on the device that runs it."""
        keys = self._keys_on(device)
        return _IDENTITY if keys is None else keys[1][layer]

    def prepare(self, batch: int, tokens: int, weights: Sequence[Tensor]) -> None:
        """Draw what the blocks will need before they run, so that nothing on their way waits for the host.

        Args:
            weights: of the first block's q, k and v, (N, D) each, on the device that runs it.
        """
        device = weights[0].device
        self.feature_key(0, device)
        key = self.layer_keys(0, device).attention
        if self.session.settings.alp:
            rows = tokens if key.entry is None else key.entry.shape[1]
            self.noise = self.session.take_noise(batch, rows, weights)
        if self.session.settings.sealed_layers:
            self.writes = self.session.take_writes(batch, tokens, device)

    def embed(self, embedding: nn.Module, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """Embed a request straight into the residual stream's encoding.

        Returns: what goes to the first block in the embeddings' place, (B, S, D): a view of the encoded rows, from
        which masks and positions are made; `start` gives the rows themselves.
        """
        key = self.residual_key(next(embedding.parameters()).device)
        if key is None:
            plain: Tensor = embedding(input_ids) if inputs_embeds is None else inputs_embeds
            return plain
        if inputs_embeds is not None:
            self._rows = key.enter(inputs_embeds, embedding)
        elif input_ids is not None:
            self._rows = key.embed(embedding, input_ids)
        return self._rows[:, : key.position.shape[1]]

    def start(self, stand_in: Tensor) -> Tensor:
        """The residual stream's first rows, (B, T, D), for what `embed` returned."""
        return stand_in if self._token_keys is None else self._rows.to(stand_in.device)

    def leave(self, rows: Tensor) -> Tensor:
        """The residual stream's rows in token order, (B, S, D)."""
        key = self.residual_key(rows.device)
        return rows if key is None else key.leave(rows)


_IDENTITY = LayerKeys()
