"""The split placement: the decoder leads the protocol between two parties.

The blocks stay as transformers made them and belong to the untrusted party; embedding, final norm and head go to the
secure side's device, where token ids, masks and logits are. Only the decoder's class is changed.
"""

import copy
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

from scx.architecture import Decoder, ModelShape, kept_checkpoint
from scx.devices import CPU, outside_inference_mode, upload
from scx.encoding import RedundantScale
from scx.keys import SCXKeyGenerator
from scx.kvcache.conversation import working_on
from scx.models.encoded import EncodedModel, ModelEncoding, generating_models
from scx.models.gradients import refuse_backward, wants_gradients
from scx.models.request import Admitted
from scx.models.split_door import check_attention, check_blocks, check_keywords, check_padding, check_positions, padding
from scx.models.split_outer import SplitCausalLM, SplitOuter
from scx.models.swap import encode_class
from scx.party.boundary import Boundary, Receiver, Transcript
from scx.party.cache import ConversationPart, SplitCache
from scx.party.generation import Generation
from scx.party.integrity import Verifier
from scx.party.live import Mirror, Watch
from scx.party.plan import Plan
from scx.party.prefill import Prefill, TopLogits
from scx.party.process import RemoteParty
from scx.party.replies import ReplyRule
from scx.party.secure import Rope, SecureParty
from scx.party.untrusted import UntrustedParty
from scx_kernels.hidden import guarded

__all__ = ["SplitModel", "causal_lm", "divide", "record_transcript", "restore_conversation", "secure_device"]


class SplitEncoding(ModelEncoding):
    """What a split model knows beyond its weights: the secure party and the way to the untrusted one.

    Args:
        party: the secure side.
        blocks: that were divided, in the order in which they run.
        outer: modules of the secure side, by who has them under which name, and where they were.
        causal: that which has the head, if the untrusted side computes a prefill's logits.
        untrusted: the party in this process; None for one in another, with `watch` over what that computes with.
    """

    cache_kind, part_kind = SplitCache, ConversationPart

    def __init__(
        self, generator: SCXKeyGenerator, shape: ModelShape, scale: RedundantScale | None, party: SecureParty,
        blocks: Sequence[Any], outer: list[tuple[nn.Module, str, torch.device]],
        causal: Any, untrusted: UntrustedParty | None, watch: Watch | None,
    ) -> None:  # fmt: skip
        super().__init__(generator, shape, scale)
        self.party = party
        self.blocks = blocks
        self.watch = watch
        self._rotary_watch: Watch | None = None
        self._outer = outer
        self._causal = causal
        self._untrusted = untrusted
        self._mirror = Mirror(party.untrusted_device)

    def __deepcopy__(self, memo: dict) -> "SplitEncoding":
        raise TypeError("a model in the split placement is one of two parties and is not copied; decode_llama it first")

    def undo(self, decoder: Decoder) -> None:
        for holder, name, device in self._outer:
            getattr(holder, name).to(device)

    @property
    def head_size(self) -> int:
        """Logits of one row."""
        size: int = self._causal.lm_head.weight.shape[0]
        return size

    def prepare(self, decoder: Decoder, opens: bool) -> None:
        """Hold the model against what was divided, and give the untrusted side what it has now.

        Args:
            opens: whether it is for a prefill; a worker's weights are then compared number by number, some of each.
        Raises: ValueError, TypeError naming the module or setting that is another.
        """
        check_blocks(decoder, self.blocks)
        check_attention(decoder.config)
        device = decoder.embed_tokens.weight.device
        if device != self.party.device:
            raise ValueError(f"model: its embedding is on {device}, and the secure side on {self.party.device}")
        watches = (self.watch, self._rotary_watch)
        changed = next((name for watch in watches if watch and (name := watch.changed(numbers=opens))), None)
        if changed is not None:
            raise ValueError(
                f"model: {changed} has changed since the model was encoded, and the untrusted party in another process "
                "computes with its own; save the model, start a worker with it, and encode again"
            )
        if self._untrusted is not None:
            self._supply(self._untrusted, decoder)

    def expect_rotary(self, rotary: nn.Module) -> None:
        """Take a rotary embedding as it is for what the worker has as well: dynamic ones grow, on both sides alike."""
        if self.watch is not None:
            self._rotary_watch = Watch({"rotary_emb": rotary})

    def _supply(self, untrusted: UntrustedParty, decoder: Decoder) -> None:
        head, k = None, self.party.plan.prefill_top_k
        if k is not None:
            if k > self.head_size:
                raise ValueError(f"prefill_top_k: expected at most {self.head_size}, the head's logits, got {k}")
            head = nn.Sequential(self._mirror.of("norm", decoder.norm), self._mirror.of("head", self._causal.lm_head))
            self.party.boundary.rule.vocab_size = self.head_size
        untrusted.supply(self._mirror.copy_of("rotary_emb", decoder.rotary_emb), head)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """What both sides compute is inference in the dtypes of the model and its messages, whoever asks."""
        kinds = {self.party.device.type, self.party.untrusted_device.type}
        with outside_inference_mode(), torch.no_grad(), ExitStack() as stack:
            for kind in kinds:
                if torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            yield

    def check_conversation(self, cache: Cache | None, batch: int) -> SplitCache:
        """A cache that is to be continued by `batch` sequences."""
        if not isinstance(cache, SplitCache):
            raise TypeError(
                f"past_key_values: expected a cache of the split placement, got a {type(cache).__name__} that holds "
                "tokens, of which the untrusted side has no K and V; prefill with the split model"
            )
        if cache.party is not self.party:
            raise ValueError(f"past_key_values: session {cache.session_id} was begun with another untrusted party")
        if cache.rows != batch:
            raise ValueError(f"past_key_values: holds {cache.rows} sequences, the input has {batch}")
        cache.check_layers()
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

    @torch.compiler.disable  # what crosses a boundary is no part of a graph
    @guarded
    def _serve(
        self, request: Admitted, *, attention_mask: Tensor | None, position_ids: Tensor | None, use_cache: bool,
        **kwargs: Any,
    ) -> SplitOutput:  # fmt: skip
        encoding = self._scx
        if self.training:
            raise RuntimeError("the split placement serves inference only: call model.eval()")
        check_keywords(kwargs, self.config)
        check_positions(position_ids, attention_mask, use_cache or request.cache is not None, self.config)
        first_key = padding(attention_mask, request.batch, request.past + request.tokens)
        if request.opens:
            encoding.check_adoptable(request.cache)
        else:
            check_padding(first_key, encoding.check_conversation(request.cache, request.batch).first_key)
        encoding.prepare(self, request.opens)
        wants = wants_gradients(self, request.inputs_embeds) or _follows_gradients(request)
        with encoding.computing():
            output = self._lead(request, position_ids, first_key, use_cache)
        return _without_gradients(output) if wants else output

    def _lead(
        self, request: Admitted, position_ids: Tensor | None, first_key: Tensor | None, use_cache: bool
    ) -> SplitOutput:
        hidden = self._embed(request.input_ids, request.inputs_embeds)
        rope = self._rope(hidden, position_ids, request.past)
        kept: SplitCache | None
        result: Tensor | TopLogits
        if request.opens:
            result, kept = self._prefill(hidden, rope, first_key, request.cache, use_cache)
        else:
            kept = self._scx.check_conversation(request.cache, request.batch)
            result = Generation(self._scx.party, kept, rope).run(hidden)
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
        fresh = None if kept is cache else kept  # nobody could claim it before
        with working_on("past_key_values", fresh):
            return Prefill(encoding.party, session, rope, first_key, kept).run(hidden), kept

    def _calibrate(self) -> None:
        """Have the untrusted side measure the scale of real rows, once, where blocks are not here to do it with."""
        encoding = self._scx
        if encoding.generator.redundant_num and encoding.party.scale is None:
            tokens = encoding.generator.calibration_tokens(encoding.redundant_tokens(self.embed_tokens))
            encoding.party.calibrate(self._embed(tokens, None))

    @guarded
    def restore(self, cache: SplitCache) -> None:
        """Begin a conversation again with the party that is there now, from what the secure side knows."""
        if cache.history is None:
            raise ValueError("cache: the conversation began with embeddings, of which the secure side keeps none")
        if not cache.tokens:
            raise ValueError("cache: it holds no tokens; a prefill opens a session for it")
        self._scx.prepare(self, opens=True)
        before = dict(cache.__dict__)
        (ids, positions), first_key = cache.history, cache.first_key
        try:
            with self._scx.computing():
                hidden = self._embed(ids, None)
                self._prefill(hidden, self._rope(hidden, positions, 0), first_key, cache, True)
                cache.remember(ids, positions)
        except BaseException:
            cache.__dict__.update(before)
            raise

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
        self._scx.expect_rotary(self.rotary_emb)
        return Rope(position_ids, cos, sin)


def _follows_gradients(request: Admitted) -> bool:
    """Whether earlier tokens of the conversation ask for gradients, which a plain cache would lead to."""
    return torch.is_grad_enabled() and not request.opens and getattr(request.cache, "has_cut_gradients", False)


def _without_gradients(output: SplitOutput) -> SplitOutput:
    """The output, if something asks for gradients: they do not come back over the boundary."""
    if output.past_key_values is not None:
        output.past_key_values.has_cut_gradients = True
    reason = (
        "gradients do not come back over the boundary of the split placement; train in the fused placement, or the "
        "plain model"
    )
    if output.top_logits is not None:
        output.top_logits = replace(output.top_logits, logits=refuse_backward(output.top_logits.logits, reason))
    else:
        output.last_hidden_state = refuse_backward(output.last_hidden_state, reason)
    return output


def causal_lm(model: nn.Module, decoder: Decoder) -> Any:
    """The module with the language-modelling head on a decoder. Raises ValueError if there is none."""
    for module in model.modules():
        if getattr(module, "model", None) is decoder and isinstance(getattr(module, "lm_head", None), nn.Module):
            return module
    raise ValueError(f"prefill_top_k: expected a model with a language-modelling head, got {type(model).__name__}")


def secure_device(given: torch.device | str | None) -> torch.device | None:
    """The secure side's device: as given, else SCX_SECURE_DEVICE; None for the fused placement.

    Raises: ValueError for what names no device.
    """
    named = os.environ.get("SCX_SECURE_DEVICE") or None if given is None else given
    try:
        return None if named is None else torch.device(named)
    except RuntimeError:
        raise ValueError(f"secure_device: expected a device such as 'cpu' or 'cuda:1', got {named!r}") from None


def _one_device(blocks: Sequence[nn.Module]) -> torch.device:
    devices = {parameter.device for block in blocks for parameter in block.parameters()}
    if len(devices) != 1:
        raise ValueError(
            f"model: the split placement expects all blocks on one device, got {sorted(map(str, devices))}"
        )
    return devices.pop()


def _outer_modules(model: PreTrainedModel, decoder: Decoder) -> list[tuple[nn.Module, str]]:
    """What is not the blocks': embedding, norm, rotary embedding, and whatever head is on top; by who has it."""
    inside = {id(module) for module in decoder.modules()}
    heads = [
        (model, name) for name, child in model.named_children() if child is not decoder and id(child) not in inside
    ]
    return [(decoder, "embed_tokens"), (decoder, "norm"), (decoder, "rotary_emb"), *heads]


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
    blocks = tuple(decoder.layers[: shape.num_layers])
    check_blocks(decoder, blocks)
    check_attention(decoder.config)
    causal = None if plan.prefill_top_k is None else causal_lm(model, decoder)
    untrusted, watch = None, None
    receiver: Receiver
    verifier = Verifier(blocks, generator.integrity_stream, device, kept_checkpoint(decoder)) if plan.verify else None
    if verifier is not None:
        verifier.prepare()
    if remote is None:
        untrusted_device = _one_device(blocks)
        rotary = copy.deepcopy(decoder.rotary_emb).to(untrusted_device)
        head = None if causal is None else nn.Sequential(decoder.norm, causal.lm_head)
        receiver = untrusted = UntrustedParty(blocks, rotary, plan, head)
    else:
        if remote.plan != plan:
            raise ValueError(f"untrusted: its workers are told {remote.plan}, the model is to be encoded with {plan}")
        untrusted_device = CPU  # messages leave the process from there
        watch = _watch(decoder, blocks, causal)
        receiver = remote
    outer = [(*place, _device_of(getattr(*place), untrusted_device)) for place in _outer_modules(model, decoder)]
    for holder, name, _ in outer:
        getattr(holder, name).to(device)
    rule = ReplyRule(plan, shape, blocks[0].mlp.gate_proj.out_features if plan.verify else 0)
    boundary = Boundary(receiver, rule, device, untrusted_device)
    scale = None if scale is None else scale.to(CPU)  # where redundant rows are drawn
    party = SecureParty(blocks, plan, shape, scale, boundary, verifier)
    decoder._scx = SplitEncoding(generator, shape, scale, party, blocks, outer, causal, untrusted, watch)
    decoder._scx.expect_rotary(decoder.rotary_emb)
    encode_class(decoder, SplitModel)
    for module in generating_models(model):
        encode_class(module, SplitCausalLM if module is causal else SplitOuter)


def _watch(decoder: Decoder, blocks: Sequence[nn.Module], causal: Any) -> Watch:
    """Over what a worker computes with as well. Raises ValueError for hooks, which it has none of."""
    watched = {f"layers.{i}": block for i, block in enumerate(blocks)}
    if causal is not None:
        watched |= {"norm": decoder.norm, "lm_head": causal.lm_head}
    watch = Watch(watched)
    hooked = watch.hooked() or Watch({"rotary_emb": decoder.rotary_emb}).hooked()
    if hooked is not None:
        raise ValueError(f"model: {hooked} has hooks, and the untrusted party in another process has none of them")
    return watch


def _device_of(module: nn.Module, default: torch.device) -> torch.device:
    return next((x.device for x in (*module.parameters(), *module.buffers())), default)


def restore_conversation(model: PreTrainedModel, cache: SplitCache) -> None:
    """Take a conversation up again after its untrusted party was lost, from its last completed token.

    The secure side knows its tokens; another party has only to be there (`RemoteParty.connect`). A new session is
    opened for them, so that no one-time key is used twice, and `cache` is its handle from now on.

    Raises: ValueError if the model is not in the split placement or the conversation began with embeddings;
        PartyLostError if this party is lost as well, and `cache` is as it was.
    """
    with working_on("cache", cache):
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
