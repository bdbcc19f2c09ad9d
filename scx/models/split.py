"""The split placement: the decoder leads the protocol between two parties.

The blocks stay as transformers made them and belong to the untrusted party; embedding, final norm and head go to the
secure side's device, where token ids, masks and logits are. Only the decoder's class is changed.
"""

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from scx.architecture import Decoder, ModelShape
from scx.devices import CPU, upload
from scx.encoding import RedundantScale
from scx.keys import SCXKeyGenerator
from scx.models.encoded import EncodedModel, ModelEncoding
from scx.models.request import Admitted
from scx.models.swap import encode_class
from scx.party.boundary import Boundary, Receiver, Transcript
from scx.party.cache import ConversationPart, SplitCache
from scx.party.generation import Generation
from scx.party.plan import Plan
from scx.party.prefill import Prefill, TopLogits
from scx.party.process import RemoteParty
from scx.party.replies import ReplyRule
from scx.party.secure import Rope, SecureParty
from scx.party.untrusted import UntrustedParty

__all__ = ["SplitCausalLM", "SplitModel", "divide", "record_transcript", "restore_conversation", "secure_device"]


class SplitEncoding(ModelEncoding):
    """What a split model knows beyond its weights: the secure party and the way to the untrusted one."""

    cache_kind, part_kind = SplitCache, ConversationPart

    def __init__(
        self, generator: SCXKeyGenerator, shape: ModelShape, scale: RedundantScale | None, dtype: torch.dtype,
        party: SecureParty, outer: list[tuple[nn.Module, torch.device]],
    ) -> None:  # fmt: skip
        super().__init__(generator, shape, scale, dtype)
        self.party = party
        self.outer = outer  # modules that were moved to the secure side, and where they were

    def __deepcopy__(self, memo: dict) -> "SplitEncoding":
        raise TypeError("a model in the split placement is one of two parties and is not copied; decode_llama it first")

    def undo(self, decoder: Decoder) -> None:
        for module, device in self.outer:
            module.to(device)

    def check_conversation(self, cache: Cache | None, batch: int) -> SplitCache:
        """A cache that is to be continued by `batch` sequences."""
        if not isinstance(cache, SplitCache):
            raise TypeError(
                f"past_key_values: expected a cache of the split placement, got a {type(cache).__name__} that holds "
                "tokens; prefill with the split model"
            )
        if cache.party is not self.party:
            raise ValueError(f"past_key_values: session {cache.session_id} was begun with another untrusted party")
        if cache.rows != batch:
            raise ValueError(f"past_key_values: holds {cache.rows} sequences, the input has {batch}")
        return cache


@dataclass
class SplitOutput(BaseModelOutputWithPast):
    """Of the decoder stack. `top_logits` stand in for the hidden states of a prefill whose head is the untrusted
    side's."""

    top_logits: TopLogits | None = None


class SplitModel(EncodedModel):
    """The decoder stack as the secure side: admits a request and leads its stage."""

    _scx: SplitEncoding
    rotary_emb: nn.Module
    norm: nn.Module

    @torch.no_grad()
    def _serve(
        self, request: Admitted, *, attention_mask: Tensor | None, position_ids: Tensor | None, use_cache: bool,
        **kwargs: Any,
    ) -> SplitOutput:  # fmt: skip
        encoding, past = self._scx, request.past
        _check_inference(self, kwargs)
        first_key = _padding(attention_mask, request.batch, past + request.tokens)
        if request.opens:
            encoding.check_adoptable(request.cache)
        else:
            conversation = encoding.check_conversation(request.cache, request.batch)
            _check_padding(first_key, conversation.first_key)
        hidden = self._embed(request.input_ids, request.inputs_embeds)
        rope = self._rope(hidden, position_ids, past)
        kept: SplitCache | None
        result: Tensor | TopLogits
        if request.opens:
            result, kept = self._prefill(hidden, rope, first_key, request.cache, use_cache)
        else:
            result, kept = Generation(encoding.party, conversation, rope).run(hidden), conversation
        if kept is not None:
            kept.remember(request.input_ids, rope.positions)
        if isinstance(result, TopLogits):
            return SplitOutput(past_key_values=kept, top_logits=result)
        return SplitOutput(last_hidden_state=self.norm(result), past_key_values=kept)

    def _prefill(
        self, hidden: Tensor, rope: Rope, first_key: Tensor | None, cache: Cache | None, use_cache: bool
    ) -> tuple[Tensor | TopLogits, SplitCache | None]:
        encoding = self._scx
        self._calibrate()
        session = encoding.open_session(len(hidden))
        kept = None
        if use_cache or cache is not None:
            held: Any = DynamicCache() if cache is None else cache
            kept = SplitCache.adopt(held, session, encoding.party, len(hidden))
        if first_key is not None:
            first_key = upload(first_key, encoding.party.device)
        return Prefill(encoding.party, session, rope, first_key, kept).run(hidden), kept

    def _calibrate(self) -> None:
        """Have the untrusted side measure the scale of real rows, once, where blocks are not here to do it with."""
        encoding = self._scx
        if encoding.generator.redundant_num and encoding.party.scale is None:
            tokens = encoding.generator.calibration_tokens(encoding.redundant_tokens(self.embed_tokens))
            encoding.party.calibrate(self._embed(tokens, None))

    @torch.no_grad()
    def restore(self, cache: SplitCache) -> None:
        """Begin a conversation again with the party that is there now, from what the secure side knows."""
        if cache.history is None:
            raise ValueError("cache: the conversation began with embeddings, of which the secure side keeps none")
        before = dict(cache.__dict__)
        (ids, positions), first_key = cache.history, cache.first_key
        hidden = self._embed(ids, None)
        try:
            self._prefill(hidden, self._rope(hidden, positions, 0), first_key, cache, True)
        except BaseException:
            cache.__dict__.update(before)
            raise
        cache.remember(ids, positions)

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        device = self._scx.party.device
        if inputs_embeds is not None:
            return inputs_embeds.to(device)
        assert input_ids is not None  # noqa: S101
        embedded: Tensor = self.embed_tokens(input_ids.to(device))
        return embedded

    def _rope(self, hidden: Tensor, position_ids: Tensor | None, past: int) -> Rope:
        if position_ids is None:
            position_ids = torch.arange(past, past + hidden.shape[1], device=hidden.device)[None]
        position_ids = position_ids.to(hidden.device)
        rows, tokens = (1, hidden.shape[0]), hidden.shape[1]
        if position_ids.dim() != 2 or position_ids.shape[0] not in rows or position_ids.shape[1] != tokens:
            raise ValueError(f"position_ids: expected ({rows[1]} or 1, {tokens}), got {tuple(position_ids.shape)}")
        cos, sin = self.rotary_emb(hidden, position_ids=position_ids)
        return Rope(position_ids, cos, sin)


class SplitCausalLM(nn.Module):
    """A language model whose prefills' logits come from the untrusted side: the k largest of each token, -inf else."""

    model: SplitModel
    lm_head: nn.Module
    config: Any

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        *,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        if labels is not None:
            raise ValueError("labels: a loss needs all logits; encode the model with prefill_top_k=None")
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        if outputs.top_logits is None:
            logits = self.lm_head(outputs.last_hidden_state[:, kept])
        else:
            logits = outputs.top_logits.dense(self.config.vocab_size, kept)
        result = CausalLMOutputWithPast(logits=logits, past_key_values=outputs.past_key_values)
        if return_dict is None:
            return_dict = getattr(self.config, "return_dict", True)
        return result if return_dict else result.to_tuple()


def causal_lm(model: nn.Module, decoder: Decoder) -> Any:
    """The module with the language-modelling head on a decoder. Raises ValueError if there is none."""
    for module in model.modules():
        if getattr(module, "model", None) is decoder and isinstance(getattr(module, "lm_head", None), nn.Module):
            return module
    raise ValueError(f"prefill_top_k: expected a model with a language-modelling head, got {type(model).__name__}")


def _check_inference(model: Any, kwargs: dict[str, Any]) -> None:
    """Gradients and inner states do not come back over the boundary."""
    if model.training:
        raise RuntimeError("the split placement serves inference only: call model.eval()")
    for name in ("output_attentions", "output_hidden_states"):
        wanted = kwargs.get(name)
        if getattr(model.config, name, False) if wanted is None else wanted:
            raise ValueError(f"{name}: inner states are not recorded in the split placement; use the fused one")


def _padding(attention_mask: Tensor | None, batch: int, total: int) -> Tensor | None:
    """(B,) int64, the first token of each sequence that is no padding; None where there is no padding."""
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, Tensor) or attention_mask.shape != (batch, total):
        shape = tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
        raise ValueError(f"attention_mask: the split placement expects ({batch}, {total}) with 0 and 1, got {shape}")
    mask = attention_mask.cpu().to(torch.int64)
    if ((mask != 0) & (mask != 1)).any() or (mask.diff(dim=1) < 0).any():
        raise ValueError("attention_mask: the split placement expects left padding, zeros before ones")
    first = total - mask.sum(dim=1)
    return first if first.any() else None


def _check_padding(given: Tensor | None, known: Tensor | None) -> None:
    """The padding of a conversation is that of its prompt."""
    if given is not None and (known is None or not torch.equal(given.cpu(), known.cpu())):
        raise ValueError(
            f"attention_mask: the conversation's first tokens are {None if known is None else known.tolist()}, "
            f"got {given.tolist()}"
        )


def secure_device(given: torch.device | str | None) -> torch.device | None:
    """The secure side's device: as given, else SCX_SECURE_DEVICE; None for the fused placement.

    Raises: ValueError for what names no device.
    """
    named = os.environ.get("SCX_SECURE_DEVICE") or None if given is None else given
    try:
        return None if named is None else torch.device(named)
    except RuntimeError:
        raise ValueError(f"secure_device: expected a device such as 'cpu' or 'cuda:1', got {named!r}") from None


def _one_device(layers: Any) -> torch.device:
    devices = {parameter.device for parameter in layers.parameters()}
    if len(devices) != 1:
        raise ValueError(
            f"model: the split placement expects all blocks on one device, got {sorted(map(str, devices))}"
        )
    return devices.pop()


def _outer_modules(model: PreTrainedModel, decoder: Decoder) -> list[nn.Module]:
    """What is not the blocks': embedding, norm, rotary embedding, and whatever head is on top."""
    inside = {id(module) for module in decoder.modules()}
    heads = [child for child in model.children() if child is not decoder and id(child) not in inside]
    return [decoder.embed_tokens, decoder.norm, decoder.rotary_emb, *heads]


def divide(
    model: PreTrainedModel,
    decoder: Decoder,
    plan: Plan,
    generator: SCXKeyGenerator,
    shape: ModelShape,
    scale: RedundantScale | None,
    device: torch.device,
    remote: RemoteParty | None,
) -> None:
    """Put a model into the split placement: blocks to an untrusted party where they lie, or to one in another process,
    the rest to the secure side's device."""
    untrusted: Receiver
    if remote is None:
        untrusted_device = _one_device(decoder.layers)
        rotary = copy.deepcopy(decoder.rotary_emb).to(untrusted_device)
        head = None if plan.prefill_top_k is None else _untrusted_head(model, decoder, untrusted_device, device)
        untrusted = UntrustedParty(decoder.layers, rotary, plan, head)
    else:
        if remote.plan != plan:
            raise ValueError(f"untrusted: its workers are told {remote.plan}, the model is to be encoded with {plan}")
        untrusted, untrusted_device = remote, torch.device("cpu")  # messages leave the process from there
    outer = [(module, _device_of(module, untrusted_device)) for module in _outer_modules(model, decoder)]
    for module, _ in outer:
        module.to(device)
    boundary = Boundary(untrusted, ReplyRule(plan, shape), device, untrusted_device)
    scale = None if scale is None else scale.to(CPU)  # where redundant rows are drawn
    party = SecureParty(decoder.layers, plan, shape, scale, boundary)
    dtype = decoder.embed_tokens.weight.dtype
    decoder._scx = SplitEncoding(generator, shape, scale, dtype, party, outer)
    encode_class(decoder, SplitModel)
    if plan.prefill_top_k is not None:
        encode_class(causal_lm(model, decoder), SplitCausalLM)


def _untrusted_head(
    model: PreTrainedModel, decoder: Decoder, untrusted_device: torch.device, device: torch.device
) -> nn.Module:
    """Final norm and head for the untrusted side, copies unless both sides share a device."""
    head = nn.Sequential(decoder.norm, causal_lm(model, decoder).lm_head)
    return head if device == untrusted_device else copy.deepcopy(head).to(untrusted_device)


def _device_of(module: nn.Module, default: torch.device) -> torch.device:
    return next((x.device for x in (*module.parameters(), *module.buffers())), default)


def restore_conversation(model: PreTrainedModel, cache: SplitCache) -> None:
    """Take a conversation up again after its untrusted party was lost, from its last completed token.

    The secure side knows its tokens; another party has only to be there (`RemoteParty.connect`). A new session is
    opened for them, so that no one-time key is used twice, and `cache` is its handle from now on.

    Raises: ValueError if the model is not in the split placement or the conversation began with embeddings;
        PartyLostError if this party is lost as well, and `cache` is as it was.
    """
    _split_decoder(model).restore(cache)


def _split_decoder(model: PreTrainedModel) -> SplitModel:
    decoders = [module for module in model.modules() if isinstance(module, SplitModel)]
    if not decoders:
        raise ValueError("model: it is not in the split placement; encode_llama(..., secure_device=...) puts it there")
    return decoders[0]


@contextmanager
def record_transcript(model: PreTrainedModel) -> Iterator[Transcript]:
    """Record everything that crosses the boundary of a model in the split placement, within a `with` block.

    Raises: ValueError if the model is not in the split placement.
    """
    with _split_decoder(model)._scx.party.boundary.record() as transcript:
        yield transcript
