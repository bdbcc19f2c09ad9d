"""A plain twin of an encoded decoder, and each of the decoder's passes held against it."""

import copy
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers_suite.encoding import left_plain

from scx import EncodedCache, decode_kvcache
from scx.architecture import SUPPORTED
from scx.kvcache.conversation import ConversationCache
from scx.models.encoded import EncodedModel
from scx.party.cache import SplitCache

__all__ = ["check_passes", "decoded"]

ROUNDINGS = {torch.float32: 4096, torch.float16: 40, torch.bfloat16: 40}
"""How many roundings of the largest value an encoded pass may differ by.

Noise is made for rows of the size of the first norm's weight, and the mixins make models whose norms, with an epsilon
of 1, give rows of a hundredth of it: in float32, noise shows that much more beside the rows' own rounding.
"""
_OWN = ("mode", "gpu_kvcache", "cpu_kvcache", "return_dict", "cache_position")  # arguments of an encoded model alone


def check_passes(patch: pytest.MonkeyPatch) -> None:
    """Have every pass that runs eagerly compared with the twin's; a difference is an AssertionError out of the pass."""
    patch.setattr(EncodedModel, "forward", _checked(EncodedModel.forward))


def _checked(forward: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(forward)

    @functools.wraps(forward)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs).arguments
        request = {**bound.pop("kwargs", {}), **bound}
        del request["self"]
        if torch.compiler.is_compiling() or not _can_be_compared(self, request):
            return forward(self, *args, **kwargs)
        expected = _Expected(self, request)
        outputs = forward(self, *args, **kwargs)
        expected.check(outputs)
        return outputs

    return checked


def _can_be_compared(decoder: nn.Module, request: dict[str, Any]) -> bool:
    """A twin needs weights, which accelerate's off-loaded modules lack between passes, and the tokens of what it is to
    continue, which a split conversation that began with embeddings does not have."""
    past = request.get("past_key_values")
    has_tokens = not isinstance(past, SplitCache) or past.history is not None or not past.get_seq_length()
    return has_tokens and not any(parameter.is_meta for parameter in decoder.parameters())


class _Expected:
    """What a plain twin answers to a request, and what of it means something."""

    def __init__(self, decoder: Any, request: dict[str, Any]) -> None:
        self._random = torch.get_rng_state()
        self._twin = _twin(decoder)
        self._mask = request.get("attention_mask")
        self._request = _as_the_twin_is_asked(decoder, request)

    @torch.no_grad()
    def check(self, outputs: Any) -> None:
        with torch.random.fork_rng(devices=[]), left_plain():
            torch.set_rng_state(self._random)
            plain = self._twin(**self._request, return_dict=True)
        got = outputs if isinstance(outputs, dict) else {"last_hidden_state": outputs[0]}
        last = got["last_hidden_state"]
        _check_states("last_hidden_state", [last], [plain["last_hidden_state"][:, -last.shape[1] :]], self._mask)
        for name, tokens_dim in (("hidden_states", 1), ("attentions", 2)):
            if name in got or (name in plain and isinstance(outputs, dict)):
                given, expected = got.get(name), plain.get(name)
                assert (given is None) == (expected is None), f"{name}: {given is None} {expected is None}"
                _check_states(name, given or (), expected or (), self._mask, tokens_dim)
        if isinstance(got.get("past_key_values"), EncodedCache):
            _check_caches(decoded(got["past_key_values"]), plain["past_key_values"], self._mask)


def _twin(decoder: Any) -> Any:
    """The plain decoder over the same weights."""
    plain = next(kind for kind in SUPPORTED if isinstance(decoder, kind))
    with torch.device("meta"), left_plain():
        twin = plain(copy.deepcopy(decoder.config))
    for name, module in twin.named_modules():
        original = decoder.get_submodule(name)
        module._parameters = dict(original._parameters)
        module._buffers = {key: None if x is None else x.clone() for key, x in original._buffers.items()}
    for key, value in vars(decoder.rotary_emb).items():
        if isinstance(value, int | float | str | Tensor):
            setattr(twin.rotary_emb, key, value)
    return twin.train(decoder.training)


def _as_the_twin_is_asked(decoder: Any, request: dict[str, Any]) -> dict[str, Any]:
    """The request without what is SCX's own, on a plain cache."""
    asked = {name: value for name, value in request.items() if name not in _OWN}
    past = request.get("past_key_values")
    if isinstance(past, ConversationCache) and not past.get_seq_length():
        past = DynamicCache(config=decoder.config)
    if isinstance(past, SplitCache):
        return {**asked, **_whole(past, asked)}
    return {**asked, "past_key_values": copy.deepcopy(decoded(past))}


def _whole(cache: SplitCache, asked: dict[str, Any]) -> dict[str, Any]:
    """A request that continues a conversation of the split placement, as one from its first token: no side alone could
    decode the cache."""
    (ids, positions), new = cache.history, asked["input_ids"]
    total = ids.shape[1] + new.shape[1]
    given, mask = asked.get("position_ids"), asked.get("attention_mask")
    if given is None:
        given = torch.arange(ids.shape[1], total)[None]
    if mask is None and cache.first_key is not None:
        mask = torch.arange(total) >= cache.first_key[:, None]
    return {
        "input_ids": torch.cat((ids, new), dim=1),
        "position_ids": torch.cat((positions, given.expand(new.shape)), dim=1),
        "attention_mask": mask,
        "past_key_values": None,
    }


def decoded(cache: Cache | None) -> Cache | None:
    """An encoded cache as the plain model would have it; any other as it is."""
    return decode_kvcache(cache, cache.session) if isinstance(cache, EncodedCache) else cache


def _check_states(
    name: str, got: Iterable[Tensor], expected: Iterable[Tensor], mask: Tensor | None, tokens_dim: int = 1
) -> None:
    for index, (x, plain) in enumerate(zip(got, expected, strict=True)):
        assert (x is None) == (plain is None), f"{name}[{index}]: {x is None} {plain is None}"
        if x is not None:
            rows = _real(mask, plain.shape[0], plain.shape[tokens_dim])
            _check(f"{name}[{index}]", x.transpose(1, tokens_dim), plain.transpose(1, tokens_dim), rows)


def _check_caches(got: Cache, expected: Cache, mask: Tensor | None) -> None:
    assert got.get_seq_length() == expected.get_seq_length()
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        return  # which keys are padding is not told
    for index, (layer, plain) in enumerate(zip(got.layers, expected.layers, strict=True)):
        for name in ("keys", "values"):
            x, y = getattr(layer, name), getattr(plain, name)
            _check(f"layers[{index}].{name}", x.transpose(1, 2), y.transpose(1, 2), _real(mask, y.shape[0], y.shape[2]))


def _real(mask: Any, batch: int, tokens: int) -> Tensor:
    """(B, S) bool, the last tokens that are not padding: what a padded one computes is nobody's."""
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] >= tokens:
        return mask[:, -tokens:].bool()
    if isinstance(mask, Tensor) and mask.dim() == 4:
        seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        return seen[:, 0].any(-1).expand(batch, -1)[:, -tokens:]
    return torch.ones(batch, tokens, dtype=torch.bool)


def _check(name: str, got: Tensor, expected: Tensor, rows: Tensor) -> None:
    assert got.shape == expected.shape, f"{name}: shape {tuple(got.shape)}, the plain model's {tuple(expected.shape)}"
    assert got.dtype == expected.dtype, f"{name}: {got.dtype}, the plain model's {expected.dtype}"
    x, y = got[rows].double(), expected[rows].double()
    if not y.numel():
        return
    difference = (x - y).abs()
    allowed = ROUNDINGS[expected.dtype] * torch.finfo(expected.dtype).eps * y.nan_to_num().abs().max()
    same = (difference <= allowed) | (x == y) | (x.isnan() & y.isnan())
    assert same.all(), f"{name}: differs by {difference.max():.3g} where the plain model reaches {y.abs().max():.3g}"
