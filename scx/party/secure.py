"""The secure party: keys, plain rows, and its own K and V. It leads both stages in which rows move.

Notation: B sequences, S tokens, T encoded rows, n new tokens, N cached tokens, D features, H query heads, G key/value
heads, d head size.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scx.architecture import QKV, head_norms, root_mean_square, sliding_window
from scx.devices import CPU, upload
from scx.encoding import ENCODINGS, FeatureKey, Noise, RedundantScale
from scx.keys import ModelShape, SCXKeyGenerator, Session, SharedKeys
from scx.party.boundary import Boundary, Pending
from scx.party.cache import SplitCache
from scx.party.integrity import Verifier
from scx.party.live import Mirror
from scx.party.plan import Plan
from scx.projections import projection_dtype
from scx_kernels.hidden import guarded

__all__ = ["Line", "Rope", "SecureParty", "secure_parameters", "split_plan"]


@dataclass(frozen=True)
class Rope:
    """Rotary positions of new tokens: `positions` (B or 1, n) int64, `cos` and `sin` (B or 1, n, d)."""

    positions: Tensor
    cos: Tensor
    sin: Tensor


@dataclass(frozen=True)
class Line:
    """The boundary as one conversation sees it in one stage, and who checks what comes back, if somebody does."""

    boundary: Boundary
    conversation: str
    stage: str
    step: int = 0
    past: int = 0
    key_rows: int = 0
    verifier: Verifier | None = None
    first_key: Tensor | None = None

    def ask(self, operation: str, block: int = -1, **tensors: Tensor) -> dict[str, Tensor]:
        """Send named tensors to the untrusted side; what comes back, by name."""
        return self.begin(operation, block, **tensors).wait()

    def begin(self, operation: str, block: int = -1, **tensors: Tensor) -> Pending:
        """Send named tensors to the untrusted side, and go on while it works."""
        pending = self.boundary.begin(
            operation,
            conversation=self.conversation,
            stage=self.stage,
            block=block,
            step=self.step,
            past=self.past,
            key_rows=self.key_rows,
            tensors=tensors,
        )
        verifier = self.verifier
        if verifier is None:
            return pending
        return Pending(lambda: verifier.check(operation, block, tensors, pending.wait(), self.first_key))


def split_plan(
    generator: SCXKeyGenerator,
    shape: ModelShape,
    crossings: str,
    reuse_feature_keys: bool,
    prefill_top_k: int | None = None,
    verify: bool = False,
) -> Plan:
    """The agreement of the parties. Raises ValueError for settings that it cannot keep."""
    start, end = generator.protected(shape)
    if generator.alp and not start:
        raise ValueError(
            "decode_start_layers: in the split placement alp=True needs the first layer among them; noise on a block "
            "whose keys are shared would stay in its cache"
        )
    if generator.sealed(shape):
        raise ValueError("cache_encoding: 'sealed' belongs to the fused placement; expected 'permuted'")
    plan = Plan(
        shape.num_layers, len(start), len(end), crossings, reuse_feature_keys, generator.alp, prefill_top_k, verify
    )
    if prefill_top_k is not None and prefill_top_k > shape.vocab_size:
        raise ValueError(f"prefill_top_k: expected at most {shape.vocab_size}, the vocabulary, got {prefill_top_k}")
    return plan


def secure_parameters(layers: Any, plan: Plan) -> list[str]:
    """The names of the blocks' parameters that the secure side uses: what `SecureWeights` reads."""
    names = []
    for block, layer in enumerate(layers):
        modules = ["input_layernorm", *(f"self_attn.{x}" for x in ("q_norm", "k_norm") if hasattr(layer.self_attn, x))]
        if block in plan.protected_blocks:
            modules.append("self_attn.o_proj")
        if plan.verify:
            modules.append("post_attention_layernorm")
        for module in modules:
            names += [f"{block}.{module}.{name}" for name, _ in layer.get_submodule(module).named_parameters()]
        if plan.noisy and block in plan.start_blocks:
            names += [f"{block}.self_attn.{x}.weight" for x in QKV]
    return names


class SecureWeights:
    """The few weights that the secure side multiplies with or needs the images of noise for: those of the blocks as
    they are now, on its device."""

    def __init__(self, blocks: Sequence[Any], plan: Plan, device: torch.device) -> None:
        self._blocks = blocks
        self._noisy = plan.start_blocks if plan.noisy else range(0)
        self._device = device
        self._mirror = Mirror(device)

    def renew(self) -> None:
        """Copy anew what has to be copied to the secure side's device, when it is next asked for."""
        self._mirror.renew()

    def _here(self, block: int, name: str) -> Any:
        return self._mirror.of(f"{block}.{name}", self._blocks[block].get_submodule(name))

    @property
    def dtype(self) -> torch.dtype:
        """That of the first block's products."""
        return projection_dtype(self._blocks[0].self_attn.q_proj)

    def attention_norm(self, block: int) -> Any:
        """The norm before a block's attention."""
        return self._here(block, "input_layernorm")

    def feed_forward_norm(self, block: int) -> Any:
        """The norm before a block's feed-forward."""
        return self._here(block, "post_attention_layernorm")

    def head_norms(self, block: int) -> dict[str, Any]:
        """The norms of a block's heads, if it has any, as arguments of `qkv_decode_encode`."""
        norms = head_norms(self._blocks[block].self_attn)
        return {name: x.to(self._device) if isinstance(x, Tensor) else x for name, x in norms.items()}

    def o_proj(self, block: int) -> Any:
        """A protected block's output projection."""
        return self._here(block, "self_attn.o_proj")

    def attention(self, block: int) -> Any:
        """A block's attention, for the numbers that it attends with; its weights may be elsewhere."""
        return self._blocks[block].self_attn

    def window(self, block: int) -> int | None:
        """How many keys a query of this block sees at most; None for all."""
        return sliding_window(self.attention(block))

    def qkv(self, block: int) -> list[Any] | None:
        """A block's q, k and v projections, if their input is under noise."""
        return [self._here(block, f"self_attn.{name}") for name in QKV] if block in self._noisy else None


class SecureParty:
    """Leads conversations: holds their sessions, through their caches, and the way to the untrusted party.

    Args:
        blocks: the decoder's, in the order in which they run.
        plan: the agreement with the untrusted side.
        shape, scale: of the model; `scale` of real rows, on the CPU, where there are redundant ones and it is known.
        boundary: the only way to the untrusted side.
        verifier: checks what comes back; for a plan with `verify`.
    """

    def __init__(
        self, blocks: Sequence[Any], plan: Plan, shape: ModelShape, scale: RedundantScale | None, boundary: Boundary,
        verifier: Verifier | None = None,
    ) -> None:  # fmt: skip
        self.plan = plan
        self.shape = shape
        self.scale = scale
        self.boundary = boundary
        self.verifier = verifier
        self.device, self.untrusted_device = boundary.secure_device, boundary.untrusted_device
        self.weights = SecureWeights(blocks, plan, self.device)
        self._forgotten: deque[str] = deque()

    def __repr__(self) -> str:
        return f"SecureParty({self.plan!r})"

    def renew(self) -> None:
        """Look again at the blocks, before a prefill."""
        self.weights.renew()
        if self.verifier is not None:
            self.verifier.renew()

    def calibrate(self, embeddings: Tensor) -> None:
        """Let the untrusted side measure the scale of real rows on the embeddings of random tokens, (1, n, D).

        Raises: PartyLostError without an answer, or with one that is no scale.
        """
        tensors = {"embeddings": embeddings}
        reply = self.boundary.ask("calibrate", conversation="", stage="calibration", tensors=tensors)
        scales = {name: reply[f"{name}_scale"].to(CPU, torch.float32) for name in ENCODINGS}
        self.scale = RedundantScale(**scales)

    def line(self, conversation: str, stage: str, cache: SplitCache | None = None) -> Line:
        """The boundary for one conversation and stage; with its cache, for a new step of its generation."""
        for gone in self._take_forgotten():
            self.boundary.ask("close", conversation=gone, stage=stage, tensors={})
        if cache is None:
            return Line(self.boundary, conversation, stage, verifier=self.verifier)
        cache.steps += 1
        place = cache.steps, cache.tokens, cache.key_rows
        return Line(self.boundary, conversation, stage, *place, self.verifier, cache.first_key)

    def forget(self, conversation: str) -> None:
        """Close a conversation with the next request: its cache may go while another request is under way."""
        self._forgotten.append(conversation)

    def _take_forgotten(self) -> Iterator[str]:
        while self._forgotten:
            try:
                yield self._forgotten.popleft()
            except IndexError:  # another thread took the last one
                return

    def noise(self, session: Session, block: int, batch: int, rows: int) -> Noise | None:
        """One-time noise for rows that enter a start block; None where the settings ask for none."""
        projections = self.weights.qkv(block)
        if projections is None:
            return None
        norm = self.weights.attention_norm(block)
        rms = root_mean_square(norm) if isinstance(getattr(norm, "weight", None), Tensor) else self.shape.first_norm_rms
        return session.take_noise(batch, rows, self.device, layer=block, rms=rms).project(projections, block)

    def feature_key(self, session: Session, block: int, sequences: Tensor | None = None) -> FeatureKey:
        """The session's π_r of a block, for the given sequences of it."""
        key = session.feature_key(block, self.device)
        return key if sequences is None else key.select(sequences)

    @guarded
    def share(self, cache: SplitCache, shared: SharedKeys | None = None) -> None:
        """Stage 2, if it was not done: token permutations of the middle blocks, and the end blocks' encoded keys."""
        if cache.is_shared or not cache.tokens:
            return
        shared = cache.session.share_keys() if shared is None else shared
        line = self.line(cache.session_id, "key sharing")
        if shared.blocks:
            position, rotary = (upload(x, self.device) for x in (shared.token_position, shared.positions))
            line.ask("unlock", token_position=position, positions=rotary)
        for block, keys in cache.pending_keys.items():
            line.ask("encoded_keys", block, encoded_keys=keys)
        cache.pending_keys = {}
        cache.is_shared = True

    def select(self, cache: SplitCache, rows: Tensor) -> None:
        """Let the untrusted side go on with the given rows of the batch, (B',) int64."""
        self.share(cache)
        self.line(cache.session_id, "generation", cache).ask("select", rows=rows)
