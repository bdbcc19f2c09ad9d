"""The cache of the split placement: the secure side's part of a conversation, and the handle of the whole of it.

It holds K and V of the first blocks and V of the last ones, plain, on the secure side's device. The rest lies with the
untrusted party under the session's public id, and goes when this object does.
"""

import weakref
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from scx.devices import outside_inference_mode
from scx.keys import Session, SharedKeys
from scx.kvcache.conversation import ConversationCache, places, working_on
from scx.kvcache.layers import AbsentLayer, GrowingLayer
from scx.party.plan import Plan

__all__ = ["ConversationPart", "SplitCache"]


class Leader(Protocol):
    """What a cache needs of the secure party that leads its conversation (`scx.party.secure.SecureParty`)."""

    plan: Plan
    device: torch.device
    untrusted_device: torch.device

    def forget(self, conversation: str) -> None: ...

    def share(self, cache: "SplitCache", shared: SharedKeys | None = None) -> None: ...

    def select(self, cache: "SplitCache", rows: Tensor) -> None: ...


class SplitCache(ConversationCache):
    """A conversation whose cache is divided between the parties.

    `session` has its keys, `party` the secure side that leads it. `tokens` counts cached tokens, `steps` those of its
    generation and `rows` sequences; `prefill_rows` is T of the prefill. `first_key` (rows,) is the first token of each
    sequence that is no padding, or None. `is_shared` says whether the untrusted side has the middle blocks' token
    permutations; the first generated token shares them if nobody did before.
    """

    session: Session
    party: Leader
    tokens: int
    steps: int
    rows: int
    prefill_rows: int
    first_key: Tensor | None
    is_shared: bool
    sequences: Tensor | None
    history: tuple[Tensor, Tensor] | None
    values: dict[int, Tensor]
    columns: dict[int, Tensor]
    pending_keys: dict[int, Tensor]
    _noted: list[Any]

    @classmethod
    def adopt(cls, cache: DynamicCache, session: Session, party: Leader, rows: int) -> "SplitCache":
        """Turn an empty plain cache, in place, into that of a session; its other holders see the same object."""
        adopted: Any = cache
        adopted.__class__ = cls
        kept = party.plan.kept_blocks
        layers = [GrowingLayer() if i in kept else AbsentLayer() for i in range(party.plan.num_layers)]
        Cache.__init__(adopted, layers=layers)
        adopted.session, adopted.session_id, adopted.party = session, session.id, party
        adopted.tokens = adopted.steps = adopted.prefill_rows = 0
        adopted.rows, adopted.first_key = rows, None
        adopted.is_shared, adopted.sequences = False, None
        adopted.history = None  # token ids and rotary positions, (rows, tokens) each, unless embeddings were given
        adopted.values = {}  # end block -> V (rows, G, tokens, d)
        adopted.columns = {}  # end block -> (rows, tokens): which column of the scores is which token
        adopted.pending_keys = {}  # end block -> Kᶜ, until it is sent with the shared keys
        adopted.note_layers()
        weakref.finalize(adopted, party.forget, session.id)
        return adopted

    def __repr__(self) -> str:
        return f"SplitCache(session={self.session_id}, tokens={self.tokens})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "a cache of the split placement is the handle of a conversation that two parties hold, and its own part is "
            "plain: it is neither pickled nor copied"
        )

    def __deepcopy__(self, memo: dict) -> "SplitCache":
        return self.__reduce_ex__(4)

    @property
    def is_croppable(self) -> bool:
        return True

    @property
    def key_rows(self) -> int:
        """Rows of the end blocks' encoded keys on the untrusted side: the prefill's, and those of later tokens."""
        return max((self.prefill_rows, *(int(columns.max()) + 1 for columns in self.columns.values())))

    def note_layers(self) -> None:
        """Take the layers and what is in them as this cache's own; called by whoever writes there for it."""
        self._noted = [
            (layer, *(None if x is None else weakref.ref(x) for x in _states(layer))) for layer in self.layers
        ]

    def check_layers(self) -> None:
        """Raises ValueError if somebody else put anything into the layers."""
        for place, (layer, *noted) in enumerate(self._noted):
            held = self.layers[place] if place < len(self.layers) else None
            mine = [None if x is None else x() for x in noted]
            if held is not layer or any(x is not y for x, y in zip(_states(layer), mine, strict=True)):
                raise ValueError(
                    f"past_key_values: layer {place} was replaced or given other tensors; K and V of most layers are "
                    "the untrusted side's, and cannot follow. Use crop, batch_select_indices, reorder_cache or "
                    "batch_repeat_interleave, or prefill again"
                )

    @outside_inference_mode()
    def unlock(self, shared: SharedKeys) -> None:
        """Give shared keys to the untrusted side, which unlocks its cache of the middle blocks with them.

        Raises: ValueError for keys of another session; RuntimeError if they were given already.
        """
        with working_on("unlock", self):
            if shared.session != self.session_id:
                raise ValueError(f"shared: this cache belongs to session {self.session_id}, got {shared.session}")
            if self.is_shared:
                raise RuntimeError("unlock: the untrusted side has these keys already")
            self.party.share(self, shared)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.tokens

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.tokens + query_length, 0

    @outside_inference_mode()
    @torch.no_grad()
    def select_rows(self, indices: Tensor | Sequence[int] | Sequence[bool], name: str = "indices") -> None:
        """Go on with the given rows of the batch, here and on the untrusted side.

        Args:
            indices: (n,) integers, negative ones from the end, or (rows,) bool. name: of the argument, for errors.
        """
        with working_on(name, self):
            # Read here, also from an accelerator: what is out of range must not reach the untrusted side.
            index = places(name, torch.as_tensor(indices).cpu(), self.rows).to(self.party.device)
            self.check_layers()
            if self.tokens:
                self.party.select(self, index)
                self._select(index)
            self.rows = len(index)

    def _select(self, index: Tensor) -> None:
        for layer in self.layers:
            if isinstance(layer, GrowingLayer):
                layer.batch_select_indices(index)
        current = torch.arange(self.rows, device=index.device) if self.sequences is None else self.sequences
        self.sequences = current.index_select(0, index)
        self.values = {block: values.index_select(0, index) for block, values in self.values.items()}
        self.columns = {block: columns.index_select(0, index) for block, columns in self.columns.items()}
        self.first_key = None if self.first_key is None else self.first_key.index_select(0, index)
        if self.history is not None:
            ids, positions = self.history
            self.history = ids.index_select(0, index), positions.index_select(0, index)
        self.note_layers()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Go on with the rows `beam_idx` (n,) of the batch, as `batch_select_indices` does."""
        self.select_rows(beam_idx, "beam_idx")

    def batch_select_indices(self, indices: Tensor | Sequence[int] | Sequence[bool]) -> None:
        """Go on with some rows of the batch, which may repeat.

        Args:
            indices: (n,) integers, negative ones from the end, or (rows,) bool; a tensor or a list.
        Raises: TypeError, ValueError; IndexError for rows that are not there. Nothing is changed then.
        """
        self.select_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Go on with every row of the batch `repeats` times."""
        self.select_rows(torch.arange(self.rows).repeat_interleave(repeats))

    @outside_inference_mode()
    @torch.no_grad()
    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens: -n removes n; as older transformers call it, n keeps n. Of a cache that keeps none,
        the next request opens another session."""
        tokens_to_remove = int(tokens_to_remove)  # older transformers give a tensor
        with working_on("crop", self):
            self._crop(tokens_to_remove)

    def _crop(self, tokens_to_remove: int) -> None:
        kept = max(self.tokens + tokens_to_remove, 0) if tokens_to_remove <= 0 else min(tokens_to_remove, self.tokens)
        if kept == self.tokens:
            return
        self.check_layers()
        if kept:
            self.party.share(self)
        else:
            self.party.forget(self.session_id)
        self.truncate(kept)

    def truncate(self, tokens: int) -> None:
        """Keep the first tokens on the secure side; the untrusted side follows with the next request."""
        for layer in self.layers:
            if isinstance(layer, GrowingLayer) and layer.get_seq_length() > tokens:
                layer.crop(tokens - layer.get_seq_length())
        self.values = {block: values[:, :, :tokens] for block, values in self.values.items()}
        self.columns = {block: columns[:, :tokens] for block, columns in self.columns.items()}
        if self.history is not None:
            self.history = self.history[0][:, :tokens], self.history[1][:, :tokens]
        self.tokens = tokens
        self.note_layers()

    def remember(self, input_ids: Tensor | None, positions: Tensor) -> None:
        """Note what a request brought, (rows, n) ids and (rows or 1, n) positions, to be able to begin again."""
        if input_ids is None or (self.history is None and self.tokens > input_ids.shape[1]):
            self.history = None
            return
        new = (input_ids.to(positions.device), positions.expand(input_ids.shape))
        old = self.history
        self.history = new if old is None else (torch.cat((old[0], new[0]), 1), torch.cat((old[1], new[1]), 1))

    def reset(self) -> None:
        raise RuntimeError("reset: a conversation of the split placement is not reused; begin another one")

    def divide(
        self,
        gpu_layers: Iterable[int],
        gpu_device: torch.device | str | None = None,
        cpu_device: torch.device | str = "cpu",
    ) -> tuple["ConversationPart", "ConversationPart"]:
        """(untrusted part, secure part), as `split_kvcache_dynamic` returns them; each lies where its side is.

        Raises: ValueError if `gpu_layers` are not the middle blocks, of which alone the untrusted side holds the cache,
            and for a device that is not the side's own.
        """
        party = self.party
        for name, given, own in (("gpu", gpu_device, party.untrusted_device), ("cpu", cpu_device, party.device)):
            # "cpu" is what nobody asked for where it is the default.
            if given is not None and (name, str(given)) != ("cpu", "cpu") and not _is_same(torch.device(given), own):
                raise ValueError(f"{name}_device: in the split placement this side's part lies on {own}, got {given}")
        wanted, middle = sorted(gpu_layers), list(self.party.plan.middle_blocks)
        if wanted != middle:
            raise ValueError(
                f"gpu_layers: in the split placement the untrusted side holds the layers {middle} between "
                f"decode_start_layers and decode_end_layers, got {wanted}"
            )
        return ConversationPart(self, tuple(middle)), ConversationPart(self, self.party.plan.protected_blocks)


def _states(layer: Any) -> tuple[Tensor | None, Tensor | None]:
    return getattr(layer, "keys", None), getattr(layer, "values", None)


def _is_same(given: torch.device, own: torch.device) -> bool:
    return given.type == own.type and (given.index is None or own.index is None or given.index == own.index)


class ConversationPart:
    """One side's part of a divided conversation. It grows with the conversation."""

    def __init__(self, conversation: SplitCache, layer_indices: tuple[int, ...]) -> None:
        self.conversation = conversation
        self.layer_indices = layer_indices

    def __repr__(self) -> str:
        return f"ConversationPart(session={self.conversation.session_id}, layers={list(self.layer_indices)})"

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Cached tokens."""
        return self.conversation.get_seq_length()

    def join(self, cpu_kvcache: "ConversationPart") -> SplitCache:
        """The conversation that both are parts of. Raises ValueError if they are of different ones."""
        if cpu_kvcache.conversation is not self.conversation:
            raise ValueError("gpu_kvcache and cpu_kvcache: they are parts of different conversations")
        return self.conversation
