"""What an encoded model is, in either placement: whose keys it uses, and how it takes a request and answers."""

import copy
import weakref
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation.utils import GenerationMixin

from scx.architecture import Decoder, ModelShape, weight_of
from scx.calibration import Tokens, ordinary_tokens
from scx.devices import outside_inference_mode
from scx.encoding import RedundantScale
from scx.keys import SCXKeyGenerator, Session
from scx.kvcache.conversation import CachePart, ConversationCache, working_on
from scx.models.request import Admitted, admit, check_keywords

__all__ = ["EncodedModel", "EncodedModule", "EncodedOuter", "ModelEncoding", "generating_models"]


class ModelEncoding(ABC):
    """What an encoded model knows beyond its weights: whose keys, and the sessions that are alive.

    `cache_kind` is the placement's kind of cache, `part_kind` what that is divided into.
    """

    cache_kind: type[ConversationCache]
    part_kind: type[CachePart]

    def __init__(self, generator: SCXKeyGenerator, shape: ModelShape, scale: RedundantScale | None) -> None:
        self.generator = generator
        self.shape = shape
        self.scale = scale
        self._sessions: weakref.WeakValueDictionary[str, Session] = weakref.WeakValueDictionary()
        # Of which embedding, in which state, and which tokens.
        self._ordinary: tuple[weakref.ref[Tensor], tuple[object, ...], Tokens] | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.generator!r})"

    def __deepcopy__(self, memo: dict) -> "ModelEncoding":
        return type(self)(self.generator, self.shape, self.scale)

    def open_session(self, batch: int) -> Session:
        """A fresh session for `batch` sequences."""
        session = self.generator.open_session(self.shape, batch)
        self._sessions[session.id] = session
        return session

    def redundant_tokens(self, embedding: nn.Module) -> Tokens:
        """The tokens from which redundant ones are drawn: those that are ordinary in the embedding as it is now.

        It is looked at again when it is another one or was changed in place.
        """
        weight = weight_of(embedding)
        state = weight.shape, weight.data_ptr(), None if weight.is_inference() else weight._version
        known = self._ordinary
        if known is None or known[0]() is not weight or known[1] != state:
            known = self._ordinary = weakref.ref(weight), state, ordinary_tokens(weight)
        return known[2]

    def living_session(self, session_id: str) -> Session | None:
        """A session of this model that is still alive, by its public id."""
        return self._sessions.get(session_id)

    @abstractmethod
    def undo(self, decoder: Decoder) -> None:
        """Undo what the placement did to the decoder's modules, other than to its own class."""

    def check_adoptable(self, cache: Cache | None) -> None:
        """An empty cache given to a prefill must be one that can become the session's."""
        if cache is not None and (type(cache) not in (DynamicCache, self.cache_kind) or cache.offloading):
            kind = "an off-loading cache" if getattr(cache, "offloading", False) else type(cache).__name__
            raise TypeError(
                f"past_key_values: an encoded model fills a DynamicCache, got {kind}; leave cache_implementation out"
            )


class EncodedModule(nn.Module):
    """A module whose class was swapped: copied as it is, and never pickled."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            f"an encoded model holds keys and is never pickled ({type(self).__name__}): save_pretrained writes the "
            "plain model, and decode_llama makes this one plain again"
        )

    def __copy__(self) -> "EncodedModule":
        twin = type(self).__new__(type(self))
        twin.__dict__.update(vars(self))
        return twin

    def __deepcopy__(self, memo: dict) -> "EncodedModule":
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(vars(self), memo))
        return twin


class EncodedOuter(EncodedModule):
    """A model that generates, around an encoded decoder: it refuses what would go past that."""


def generating_models(model: nn.Module) -> list[Any]:
    """The models inside of one, itself included, that have transformers' `generate`."""
    return [module for module in model.modules() if isinstance(module, GenerationMixin)]


class EncodedModel(EncodedModule):
    """A decoder stack under SCX: admits a request, has its placement serve it, and answers as transformers' own."""

    config: Any
    embed_tokens: nn.Embedding
    layers: Any
    gradient_checkpointing: bool
    _scx: Any

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        *,
        mode: str | None = None,
        cache_position: Tensor | None = None,
        gpu_kvcache: CachePart | None = None,
        cpu_kvcache: CachePart | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        caches = (past_key_values, gpu_kvcache, cpu_kvcache)
        with outside_inference_mode(), working_on("past_key_values", *caches):
            request = self._admit(
                input_ids, inputs_embeds, past_key_values, (gpu_kvcache, cpu_kvcache), mode, cache_position, kwargs
            )
            if use_cache is None:
                use_cache = self.config.use_cache and not (self.training and self.gradient_checkpointing)
            outputs = self._serve(
                request, attention_mask=attention_mask, position_ids=position_ids, use_cache=use_cache, **kwargs
            )
        if return_dict is None:
            return_dict = getattr(self.config, "return_dict", True)
        return outputs if return_dict else outputs.to_tuple()

    @torch.compiler.disable  # it reads what came, and must not do so once for all requests
    def _admit(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        past_key_values: Cache | None,
        parts: tuple[CachePart | None, CachePart | None],
        mode: str | None,
        cache_position: Tensor | None,
        keywords: dict[str, Any],
    ) -> Admitted:
        _check_not_recorded()
        check_keywords(keywords)
        vocab_size, part_kind = self.embed_tokens.weight.shape[0], self._scx.part_kind
        return admit(input_ids, inputs_embeds, vocab_size, past_key_values, parts, part_kind, mode, cache_position)

    def _serve(
        self, request: Admitted, *, attention_mask: Tensor | None, position_ids: Tensor | None, use_cache: bool,
        **kwargs: Any,
    ) -> Any:  # fmt: skip
        """The placement's answer to a request."""
        # Not an abstract method: a model's class is swapped, never made anew, and nothing would ask for it.
        raise NotImplementedError(f"{type(self).__name__} is in no placement")


def _check_not_recorded() -> None:
    """A recorded pass would be replayed with the keys of this one, which are for once."""
    # torch.jit has is_tracing and does not name it in __all__, which is what a type checker goes by.
    if torch.compiler.is_exporting() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        recorder = "torch.export or torch.jit"
    elif torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        recorder = "a CUDA graph"
    else:
        return
    raise RuntimeError(
        f"an encoded model cannot be recorded by {recorder}: every replay would use this pass's one-time keys again. "
        "decode_llama it first, or run it as it is"
    )
