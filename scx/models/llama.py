"""Llama and the models that share its block: encoded in place, in the placement asked for, and decoded again."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from scx.architecture import Decoder, encoded_decoders, find_decoder, has_data, home, model_shape, weight_of
from scx.calibration import measure_scale, ordinary_tokens, untouched
from scx.encoding import RedundantScale
from scx.keys import SCXKeyGenerator, check_generator
from scx.models.encoded import EncodedOuter
from scx.models.fused import FusedEncoding, fuse
from scx.models.split import causal_lm, divide
from scx.models.split import secure_device as named_device
from scx.models.swap import check_forwards, restore_class
from scx.party.process import RemoteParty
from scx.party.secure import secure_parameters, split_plan

__all__ = ["decode_llama", "encode_llama", "encoded_llama", "model_shape"]


def _check_data(decoder: Decoder, names: Iterable[str]) -> None:
    """The named parameters of the blocks must be here, not on the meta device."""
    for name in names:
        if not has_data(decoder.layers, name):
            raise TypeError(
                f"model: layers.{name} has no data (it is on the meta device). A model of load_secure_model needs the "
                "settings that it was loaded for, secure_device, and an untrusted party in another process"
            )


def _calibrate(decoder: Decoder, generator: SCXKeyGenerator) -> RedundantScale:
    """The scale of real rows per layer and feature, from one plain pass over random tokens, which leaves no trace.

    Redundant rows made to this scale look like rows of the layer, without depending on anybody's prompt.
    """
    device = home(decoder.embed_tokens)
    tokens = generator.calibration_tokens(ordinary_tokens(weight_of(decoder.embed_tokens))).to(device)

    def run() -> None:
        decoder(input_ids=tokens, use_cache=False)

    with untouched(decoder):
        scale = RedundantScale(**measure_scale(decoder.layers, run, device, (decoder, "rotary_emb")))
    scale.check_finite()
    return scale


def encode_llama(
    model: PreTrainedModel,
    key_generator: SCXKeyGenerator,
    secure_device: torch.device | str | None = None,
    *,
    crossings: str = "few",
    reuse_feature_keys: bool = False,
    prefill_top_k: int | None = None,
    verify: bool = False,
    untrusted: RemoteParty | None = None,
) -> PreTrainedModel:
    """Change a Llama-like model in place so that it runs under SCX with the keys of `key_generator`.

    Weights, parameter names and outputs stay as they are; every prefill opens a session, whose keys the returned
    cache carries. With redundant rows, one plain pass over 64 random tokens measures the scale of real rows; hooks see
    it, and nothing of it stays in the model. Tokens whose embeddings are not finite or far from all others' magnitudes
    (`scx.calibration.ordinary_tokens`) are never redundant ones.

    Args:
        model: Llama, Mistral, Qwen2 or Qwen3 of transformers, alone or with any head, in float32, float16 or
            bfloat16.
        key_generator: its sizes must be the model's.
        secure_device: None for the fused placement, on the model's own device. A device, or SCX_SECURE_DEVICE in the
            environment, for the split placement (`scx.party`): keys, tokens, embedding, head and what the secure side
            computes go there, the blocks stay with an untrusted party, and every message crosses a boundary, also
            where both devices are the same.
        crossings: of the split placement's boundary. "few": between one attention and the next, rows stay on the
            untrusted side. "paper": rows come back after every product.
        reuse_feature_keys: in the split placement, keep one feature permutation per start block over a generation, so
            that only new keys and values cross, not the whole encoded cache of these blocks in every step. It costs
            secrecy: with every step the same order is seen on more rows.
        prefill_top_k: in the split placement, have the untrusted side compute a prefill's logits, on encoded rows, and
            return the k largest of each row; only the secure side knows which rows are tokens. The others are -inf:
            greedy generation, and sampling with a `top_k` of at most k, are the plain model's, and `generate` refuses
            what may choose or weigh others. None: the head is on the secure side, as it always is for generated tokens.
        verify: in the split placement, and with `crossings="paper"`, check what the untrusted side computes, up to
            rounding; what is found raises `scx.party.IntegrityError`. docs/split.md says what is checked how far. Every
            weight of the blocks is read once, here, and again when it has changed.
        untrusted: in the split placement, an untrusted party in another process; this one's blocks are not used then,
            and need not be here (`scx.party.loading.load_secure_model`). Where they are, they must stay as they are.
            Where they are not, that party measures the scale of real rows, before the first prefill.

    Returns: `model`.
    Raises: TypeError for a model that is not supported, has quantised or split projections, or lacks weights that
        are used here, ValueError for one that is encoded already or does not fit the generator, and for options of
        the split placement that are not known; with redundant rows also for one whose rows are not finite. The model is
        unchanged then.
    """
    decoder = find_decoder(model)
    shape = model_shape(model)
    check_generator(key_generator, shape)
    secure, plan = named_device(secure_device), None
    needed = [name for name, _ in decoder.layers.named_parameters()]
    if secure is not None:
        plan = split_plan(key_generator, shape, crossings, reuse_feature_keys, prefill_top_k, verify)
        if prefill_top_k is not None:
            causal_lm(model, decoder)
        if untrusted is not None:
            needed = secure_parameters(decoder.layers, plan)
    elif verify:
        raise ValueError("verify: in the fused placement there is no untrusted side; give a secure_device")
    _check_data(decoder, needed)
    check_forwards(decoder)
    is_whole = all(has_data(decoder.layers, name) for name, _ in decoder.layers.named_parameters())
    scale = _calibrate(decoder, key_generator) if key_generator.redundant_num and is_whole else None
    if plan is not None and secure is not None:
        divide(model, decoder, plan, key_generator, shape, scale, secure, untrusted)
    else:
        encoding = FusedEncoding(key_generator, shape, scale)
        if key_generator.redundant_num:
            encoding.redundant_tokens(decoder.embed_tokens)  # here, so that no request waits for it
        fuse(model, decoder, encoding)
    return model


def decode_llama(model: PreTrainedModel) -> PreTrainedModel:
    """Undo `encode_llama` in place. Caches that were made keep their sessions.

    Returns: `model`, as it was before. Raises: ValueError if it is not encoded.
    """
    decoders = list(encoded_decoders(model))
    if not decoders:
        raise ValueError("model: it is not encoded")
    for outer in [module for module in model.modules() if isinstance(module, EncodedOuter)]:
        restore_class(outer)
    for decoder in decoders:
        decoder._scx.undo(decoder)
        restore_class(decoder)
        del decoder._scx
    return model


@contextmanager
def encoded_llama(
    model: PreTrainedModel,
    key_generator: SCXKeyGenerator,
    secure_device: torch.device | str | None = None,
    **options: Any,
) -> Iterator[PreTrainedModel]:
    """`encode_llama`, with its arguments, for the length of a `with` block."""
    encode_llama(model, key_generator, secure_device, **options)
    try:
        yield model
    finally:
        decode_llama(model)
