"""What lies in device memory between operations: encoded tensors only, and nobody waits for the host on the way.

The kernels compute every operation here, on the GPU where there is one, else in Triton's interpreter; each counts as
one operation, whatever happens inside it.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from parity import nobody_waits
from tiny import tiny_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import scx_kernels as ops
from scx import SCXKeyGenerator, encoded_llama

TOKENS, REDUNDANT = 12, 5
# Operators whose result holds what lay in memory before.
DRAWING = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
# Operators whose result the host reads, or whose shape depends on values.
WAITING = ("_local_scalar_dense", "item", "nonzero", "equal", "masked_select", "_unique2", "is_nonzero")


class Recorder(TorchDispatchMode):
    """Every tensor that an operation writes, and the names of all operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.devices: list[tuple[torch.device, torch.device]] = []
        self.written: list[Tensor] = []
        self.states: list[weakref.ref] = []  # k and v as a pass that opens a sealed cache gets them

    def still_alive(self) -> int:
        return sum(state() is not None for state in self.states)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.names.append(function.__name__.split(".")[0])
        results = result if isinstance(result, (tuple, list)) else (result,)
        if self.names[-1] == "qkv_into_sealed_cache":
            self.states += [weakref.ref(x) for x in results[1:]]
        for x in results:
            if isinstance(x, Tensor):
                if self.names[-1] not in DRAWING:
                    self.written.append(x.detach().clone())
                if args and isinstance(args[0], Tensor):
                    self.devices.append((args[0].device, x.device))
        return result


@contextmanager
def recorded_blocks(model) -> Iterator[Recorder]:
    """Record what happens inside the decoder's blocks; on a GPU, waiting for the host there is an error."""
    recorder, blocks = Recorder(), list(model.model.layers)

    def recording(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with nobody_waits(), recorder:
                return forward(*args, **kwargs)

        return run

    for block in blocks:
        block.forward = recording(block.forward)  # a hook would be given rows in token order
    try:
        yield recorder
    finally:
        for block in blocks:
            del block.forward


def plain_tensors(model, ids: Tensor) -> list[Tensor]:
    """What the plain model has in memory in its blocks that must never lie there plain: (tokens, features) each."""
    with recorded_blocks(model) as recorder:
        model(ids)
    size = model.config.head_dim
    found = []
    for x in recorder.written:
        if x.is_floating_point() and x.numel() > 1 and x.dim() == 4 and x.shape[-1] == size and x.shape[2] == TOKENS:
            found += list(x[0])
        elif x.is_floating_point() and x.dim() == 3 and x.shape[1] == TOKENS and x.shape[2] > size:
            found.append(x[0])
    return found


def rows_in_place(seen: Tensor, plain: Tensor) -> float:
    """Of the rows of any plain tensor (P, S, F), the largest share that lies in `seen` (n, F) in token order, one row
    after the other."""
    near = torch.cdist(plain.flatten(0, 1), seen) <= 1e-3 * plain.flatten(0, 1).norm(dim=-1, keepdim=True)
    near = near.view(*plain.shape[:2], -1).float()
    runs = [near.diagonal(offset, 1, 2).sum(dim=-1) for offset in range(near.shape[2] - near.shape[1] + 1)]
    return torch.stack(runs).max().item() / plain.shape[1]


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("encoding", ["permuted", "sealed"])
def test_prefill_leaves_nothing_plain(prompt, encoding: str) -> None:
    """No tensor written in a block holds the plain model's rows in token order, of a hidden state or of a head."""
    model = tiny_model(layers=2)
    ids = prompt(TOKENS)
    plain = plain_tensors(model, ids)
    assert len(plain) > 40
    keys = SCXKeyGenerator.for_model(model, redundant_num=REDUNDANT, alp=True, cache_encoding=encoding)
    with encoded_llama(model, keys), ops.backend("triton"), recorded_blocks(model) as recorder:
        model(ids)
    # The last thing that the last block does is to hand token order to the head.
    *inside, final = [x for x in recorder.written if x.is_floating_point()]
    for features in {x.shape[1] for x in plain}:
        known = torch.stack([x for x in plain if x.shape[1] == features])
        assert rows_in_place(known[0], known) == 1.0, "the search finds what is there"
        for seen in inside:
            if seen.shape[-1] % features == 0 and seen.numel() >= TOKENS * features:
                assert rows_in_place(seen.reshape(-1, features), known) < 0.5, f"{tuple(seen.shape)} holds plain rows"
    assert final.shape[1] == TOKENS


def unsealed_states(cache) -> list[Tensor]:
    """K and V of every layer as a permuted cache would hold them."""
    found = []
    for index, layer in enumerate(cache.layers):
        own = cache.sealing(index, layer.keys.device)
        found += [ops.unseal(layer.keys, own, is_value=False), ops.unseal(layer.values, own, is_value=True)]
    return found


def rows_shared(seen: Tensor, states: Tensor) -> int:
    """How many of the heads' rows in (B, G, N, d) states lie in `seen`, bit by bit, one beside the other."""
    size = states.shape[-1]
    if seen.dtype != states.dtype or seen.shape[-1] % size:
        return 0
    rows = {row.numpy(force=True).tobytes() for row in seen.reshape(-1, size)}
    return sum(row.numpy(force=True).tobytes() in rows for row in states.reshape(-1, size))


@pytest.mark.slow
@torch.no_grad()
def test_what_lies_unsealed_of_a_sealed_cache(prompt) -> None:
    """In the pass that opens it, K and V of a block once, each as one tensor, gone behind attention. In later
    passes, of one token or several, no row of it, old or new."""
    model = tiny_model(layers=2, heads=2, kv_heads=1)
    ids = prompt(TOKENS)
    alive = []
    options = {"redundant_num": REDUNDANT, "alp": True, "cache_encoding": "sealed", "cipher_rounds": 8}
    keys = SCXKeyGenerator.for_model(model, **options)
    with encoded_llama(model, keys), ops.backend("triton"):
        with recorded_blocks(model) as recorder:
            handles = [
                module.register_forward_pre_hook(lambda *_: alive.append(recorder.still_alive()))
                for layer in model.model.layers
                for module in (layer.self_attn.o_proj, layer.mlp)
            ]
            cache = model(ids).past_key_values
            for handle in handles:
                handle.remove()
        states = unsealed_states(cache)
        for x in states:
            holding = [rows_shared(seen, x) for seen in recorder.written]
            assert sorted(holding)[-2:] == [0, x.shape[1] * TOKENS], "one tensor holds all rows, the others none"
        for layer, x in zip(cache.layers, states[::2], strict=True):
            assert not rows_shared(layer.keys, x)
            assert not rows_shared(layer.values, x)
        assert len(recorder.states) == 4
        assert alive == [2, 0, 2, 0]
        for count in (1, 3):
            with recorded_blocks(model) as recorder:
                model(ids[:, :count], past_key_values=cache)
            states = unsealed_states(cache)
            assert all(not rows_shared(seen, x) for seen in recorder.written for x in states)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"redundant_num": REDUNDANT, "alp": True}], ids=["bare", "all encodings"])
def test_nobody_waits_for_the_host(options: dict, prompt) -> None:
    """In the blocks of a prefill and of a step nothing is copied between devices, and no value is read."""
    model = tiny_model(layers=2)
    ids = prompt(TOKENS)
    keys = SCXKeyGenerator.for_model(model, **options)
    with encoded_llama(model, keys), ops.backend("triton"), recorded_blocks(model) as recorder:
        out = model(ids)
        model(ids[:, :1], past_key_values=out.past_key_values)
    if options:
        recorder.names = [name for name in recorder.names if name != "pin_memory"]
    assert "inject_permute" in recorder.names
    assert "qkv_into_cache" in recorder.names
    assert "attention_step" in recorder.names
    assert not set(recorder.names) & set(WAITING)
    assert all(a == b for a, b in recorder.devices)


@torch.no_grad()
def test_nothing_is_copied_to_be_contiguous(prompt) -> None:
    """In a block every operation takes its tensors as they lie: no clone, no contiguous copy, no concatenation."""
    model = tiny_model(layers=2)
    ids = prompt(TOKENS)
    keys = SCXKeyGenerator.for_model(model, redundant_num=REDUNDANT)
    with encoded_llama(model, keys), ops.backend("triton"), recorded_blocks(model) as recorder:
        out = model(ids)
        model(ids[:, :1], past_key_values=out.past_key_values)
    assert not set(recorder.names) & {"clone", "contiguous", "cat", "copy_", "index_select"}
