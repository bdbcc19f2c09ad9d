"""The key generator: it holds the master key, and opens sessions with the settings that it was asked for."""

import secrets
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from scx.architecture import ModelShape, model_shape
from scx.calibration import CALIBRATION_TOKENS, Tokens, pick_tokens
from scx.keys.session import Session
from scx.keys.settings import (
    CACHE_ENCODINGS,
    CIPHER_ROUNDS,
    MOST_NOISE,
    NOISE_DISTRIBUTIONS,
    SESSION_ID_BYTES,
    KeySettings,
    check_layers,
    check_positive,
)
from scx.keystream import KeyStream, Secret, derive
from scx_kernels.hidden import guarded

__all__ = ["SCXKeyGenerator", "check_generator"]


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
        master_key: 32 bytes, which are copied; drawn from the operating system if not given. What the caller's own
            variables hold is the caller's to wipe.
        noise_scale: scale of the noise in units of the root mean square of the normalised rows it is added to
            (the paper's range is 5 to 10), at most 40. It cancels in float32 but for rounding, which grows with it: by
            about 2e-6 of the largest logit for each unit. Where a few weights of the norm are so large that they alone
            make the unit, rounding is as much larger as the unit is than their median.
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

    @guarded
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
        self.seq_len = check_positive("seq_len", seq_len)
        self.hidden_dim = check_positive("hidden_dim", hidden_dim)
        self.qk_hidden_dim = check_positive("qk_hidden_dim", qk_hidden_dim)
        self.redundant_num = check_positive("redundant_num", redundant_num, least=0)
        self.batch_size = check_positive("batch_size", batch_size)
        self.protected_layers = check_positive("protected_layers", protected_layers, least=0)
        self.alp = bool(alp)
        if not 0 < noise_scale <= MOST_NOISE:
            raise ValueError(
                f"noise_scale: expected a number above 0 and at most {MOST_NOISE:g}, beyond which noise no longer "
                f"cancels in float32 to a ten-thousandth of the logits, got {noise_scale}"
            )
        self.noise_scale = float(noise_scale)
        if noise_distribution not in NOISE_DISTRIBUTIONS:
            raise ValueError(f"noise_distribution: expected one of {NOISE_DISTRIBUTIONS}, got {noise_distribution!r}")
        self.noise_distribution = noise_distribution
        self.decode_start_layers = check_layers("decode_start_layers", decode_start_layers)
        self.decode_end_layers = check_layers("decode_end_layers", decode_end_layers)
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
    @guarded
    def for_model(cls, model: PreTrainedModel, **options: Any) -> "SCXKeyGenerator":
        """A generator with the sizes of `model`; `options` are the other arguments of the constructor."""
        shape = model_shape(model)
        options.setdefault("seq_len", 512)
        return cls(hidden_dim=shape.hidden_size, qk_hidden_dim=shape.head_dim, **options)

    @classmethod
    @guarded
    def for_config(cls, config: PreTrainedConfig, **options: Any) -> "SCXKeyGenerator":
        """A generator with the sizes that a model of this configuration will have; `options` as in `for_model`."""
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        options.setdefault("seq_len", 512)
        return cls(hidden_dim=config.hidden_size, qk_hidden_dim=head_dim, **options)

    @classmethod
    @guarded
    def for_session(cls, session: Session, **options: Any) -> "SCXKeyGenerator":
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

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("SCXKeyGenerator holds the master key and is never pickled")

    def __deepcopy__(self, memo: dict) -> "SCXKeyGenerator":
        return self

    def close(self) -> None:
        """Wipe the master key. Sessions that are open go on; to open another one raises RuntimeError."""
        self._master_key.wipe()

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

    def calibration_tokens(self, tokens: Tokens) -> Tensor:
        """Random ones of `tokens`, of nobody's prompt, (1, n) int64 on the CPU, the same for the same master key."""
        stream = KeyStream(self._master_key)
        draws = stream.bits("calibration tokens", [(0, 0, 0)], CALIBRATION_TOKENS, torch.int64)
        return pick_tokens(draws, tokens)

    def integrity_stream(self) -> KeyStream:
        """Random streams for checks of the untrusted side, below a fresh nonce: no two of them, of one generator or of
        several with one master key, have anything in common."""
        return KeyStream(derive(self._master_key, "scx integrity v1", secrets.token_bytes(SESSION_ID_BYTES)))

    def open_session(self, shape: ModelShape, batch_size: int, session_id: bytes | None = None) -> Session:
        """Open a session for `batch_size` sequences on a model of this shape.

        Args:
            session_id: 16 public bytes; drawn from the operating system if not given. The same master key and id
                give the same keys of the cache on any machine, so one generator opens an id once.

        Raises: ValueError if the id has the wrong length or was opened before; RuntimeError once the generator is
            closed.
        """
        if session_id is None:
            session_id = secrets.token_bytes(SESSION_ID_BYTES)
        if len(session_id) != SESSION_ID_BYTES:
            raise ValueError(f"session_id: expected {SESSION_ID_BYTES} bytes, got {len(session_id)}")
        if session_id in self._opened:
            raise ValueError(f"session_id: {session_id.hex()} was opened before; two sessions never share keys")
        self._opened.add(session_id)
        secret = derive(self._master_key, "scx session v1", session_id)
        session = Session(secret, self.settings(shape), shape, check_positive("batch_size", batch_size), session_id)
        session.keep_keystream = self.keep_keystream
        return session


def check_generator(generator: SCXKeyGenerator, shape: ModelShape) -> None:
    """Raises TypeError, ValueError for what is no generator of keys for a model of this shape."""
    if not isinstance(generator, SCXKeyGenerator):
        raise TypeError(f"key_generator: expected an SCXKeyGenerator, got {type(generator).__name__}")
    if generator.hidden_dim != shape.hidden_size:
        raise ValueError(f"hidden_dim: the model's is {shape.hidden_size}, the key generator's {generator.hidden_dim}")
    if generator.qk_hidden_dim != shape.head_dim:
        raise ValueError(f"qk_hidden_dim: the model's is {shape.head_dim}, the generator's {generator.qk_hidden_dim}")
    generator.settings(shape)
