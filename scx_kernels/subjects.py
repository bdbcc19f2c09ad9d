"""What is tuned: launchers at the shapes of models, each with its inputs, its reference and what is tried beside the
heuristic's tile."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scx_kernels import reference
from scx_kernels.kernels import attention, attention_step, product, qkv, rows, sealing
from scx_kernels.kernels.launch import Target
from scx_kernels.sealing import Sealing, WriteCounter

__all__ = ["DTYPE", "MODELS", "SUBJECTS", "Arguments", "Result", "Subject", "tensors_of"]

DTYPE = torch.bfloat16
ROUNDS = 20
"""Of sealed caches that are tuned: launchers choose one tile for all rounds."""
STEPS = (1024, 8192, 32_768, 65_536)
"""Keys of the caches that steps are tuned on."""
Arguments = dict[str, Any]
Result = Tensor | tuple[Tensor, ...]


class Model(NamedTuple):
    """The sizes of a model that launchers choose tiles by."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int


# Llama-3-8B, Llama-2-7B, SmolLM2-135M
MODELS = (Model(4096, 32, 8, 128), Model(4096, 32, 32, 128), Model(576, 9, 3, 64))


def _stores_nothing(_arguments: Arguments, _result: Result) -> bool:
    """`Subject.is_stored` of launchers that write into nothing they are given."""
    return True


@dataclass(frozen=True)
class Subject:
    """One launcher at one shape.

    `make(device)` gives its arguments, `run(arguments, tile)` calls it, `expected(arguments)` is the reference;
    `heuristic(target)` the tile it would take by itself, `vary` what else is tried, by meta-parameter;
    `is_stored(arguments, result)` whether what it wrote into its arguments goes with its result.
    """

    operation: str
    sizes: dict[str, int]
    make: Callable[[torch.device], Arguments]
    run: Callable[[Arguments, Arguments | None], Result]
    expected: Callable[[Arguments], Result]
    heuristic: Callable[[Target], Arguments]
    vary: dict[str, tuple[int, ...]]
    variant: str = ""
    rounds: int = 0
    is_stored: Callable[[Arguments, Result], bool] = _stores_nothing

    @property
    def name(self) -> str:
        sizes = [f"{name}={size}" for name, size in self.sizes.items()]
        rounds = [f"rounds={self.rounds}"] if self.rounds else []
        return " ".join([self.operation, *([self.variant] if self.variant else []), *sizes, *rounds])


def tensors_of(result: Result) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def _randn(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(*shape, device=device, dtype=DTYPE)


def _permutations(device: torch.device, *shape: int) -> Tensor:
    return torch.rand(*shape, device=device).argsort(-1)


def _sealing(device: torch.device, batch: int, tokens: int, rounds: int) -> Sealing:
    key = torch.randint(-(2**31), 2**31, (8,), device=device).int()
    return Sealing(key, WriteCounter().take(batch, tokens, device), 0, rounds)


def _of(launcher: Callable[..., Result], expected: Callable[[Arguments], Result] | None = None) -> dict[str, Any]:
    """What a subject says of its launcher; expected of the reference of its name unless another is given."""
    name = launcher.__name__
    return {
        "operation": name,
        "run": lambda arguments, tile: launcher(**arguments, tile=tile),
        "expected": expected or (lambda arguments: getattr(reference, name)(**arguments)),
    }


def _product(model: Model, count: int) -> Subject:
    columns = (model.heads + 2 * model.kv_heads) * model.head_dim

    def make(device: torch.device) -> Arguments:
        x, weight = _randn(device, 1, count, model.hidden), _randn(device, columns, model.hidden)
        return {"x": x, "weight": weight, "row_index": _permutations(device, 1, count)}

    vary = {"BLOCK_N": (32, 64, 128, 256), "BLOCK_K": (32, 64, 128), "num_warps": (4, 8), "num_stages": (2, 3, 4, 5)}
    return Subject(
        **_of(product.permuted_linear),
        sizes={"rows": count, "columns": columns, "inner": model.hidden},
        make=make,
        heuristic=lambda target: product.matmul_tile(count, columns, model.hidden, DTYPE, False, True, target),
        vary=vary | ({"SPLIT_K": (1, 2, 4, 8)} if count <= 64 else {"BLOCK_M": (64, 128)}),
    )


def _injection(model: Model, count: int, norm: bool) -> Subject:
    def make(device: torch.device) -> Arguments:
        x = _randn(device, 1, count, model.hidden)
        weight = _randn(device, model.hidden) if norm else None
        return {"x": x, "row_index": _permutations(device, 1, count), "norm_weight": weight}

    return Subject(
        **_of(rows.inject_permute),
        variant="norm" if norm else "",
        sizes={"rows": count, "features": model.hidden},
        make=make,
        heuristic=lambda target: rows.inject_tile(model.hidden, DTYPE, norm, False, target),
        vary={"BLOCK_M": (1, 2, 4, 8), "num_warps": (1, 2, 4, 8, 16)},
    )


def _heads(model: Model, count: int) -> Subject:
    """Features of heads put in order and rows permuted, as attention's output is."""
    heads, size = model.heads, model.head_dim

    def make(device: torch.device) -> Arguments:
        return {
            "x": _randn(device, 1, count, heads * size),
            "row_index": _permutations(device, 1, count),
            "feature_index": _permutations(device, 1, heads, size),
        }

    return Subject(
        **_of(rows.inject_permute),
        variant="heads",
        sizes={"rows": count, "features": size},
        make=make,
        heuristic=lambda target: rows.inject_tile(size, DTYPE, False, False, target),
        vary={"BLOCK_M": (4, 8, 16, 32, 64), "num_warps": (1, 2, 4, 8)},
    )


def _transcoding(model: Model, count: int, rounds: int = 0) -> Subject:
    """With `rounds`, into an empty sealed cache."""
    heads, size = (model.heads, model.kv_heads, model.kv_heads), model.head_dim

    def make(device: torch.device) -> Arguments:
        angle = torch.rand(1, count, size // 2, device=device).repeat(1, 1, 2)
        products = {f"z_{role}": _randn(device, 1, count, n * size) for role, n in zip("qkv", heads, strict=True)}
        names = ("query", "key", "value")
        indices = {name: _permutations(device, 1, n, size) for name, n in zip(names, heads, strict=True)}
        tables = {"cos": angle.cos().to(DTYPE), "sin": angle.sin().to(DTYPE)}
        made: Arguments = {**products, "position": _permutations(device, 1, count), **tables, **indices}
        if rounds:
            made |= {name: _randn(device, 1, model.kv_heads, count, size) for name in ("keys", "values")}
            made |= {"sealing": _sealing(device, 1, count, rounds), "return_unsealed": True}
        return made

    def expected(arguments: Arguments) -> Result:
        into = ("keys", "values", "sealing", "return_unsealed")
        return reference.qkv_decode_encode(**{name: x for name, x in arguments.items() if name not in into})

    return Subject(
        **_of(qkv.qkv_decode_encode, expected),
        variant="sealed" if rounds else "",
        sizes={"tokens": count, "heads": sum(heads), "head_dim": size},
        make=make,
        heuristic=lambda target: qkv.qkv_tile(count, sum(heads), size, DTYPE, False, bool(rounds), target),
        # A keystream takes long to compile, and registers that a large tile would need.
        vary={"BLOCK_S": (8, 16, 32), "HEADS": (2, 4, 8), "STAGES": (1, 2), "num_warps": (2, 4, 8)}
        if rounds
        else {"BLOCK_S": (1, 4, 8, 16, 32), "HEADS": (1, 2, 4, 8), "STAGES": (1, 2, 3), "num_warps": (1, 2, 4, 8)},
        rounds=rounds,
        is_stored=_is_sealed if rounds else _stores_nothing,
    )


def _is_sealed(arguments: Arguments, result: Result) -> bool:
    """Whether the caches hold, sealed, the k and v that were returned beside q, to the bit."""
    own, caches = arguments["sealing"], (arguments["keys"], arguments["values"])
    return all(
        torch.equal(sealing.seal(cache, own, is_value=bool(i)).view(torch.int16), fresh.view(torch.int16))
        for i, (cache, fresh) in enumerate(zip(caches, tensors_of(result)[1:], strict=True))
    )


def _prefill(model: Model, tokens: int) -> Subject:
    def make(device: torch.device) -> Arguments:
        heads, size = (model.heads, model.kv_heads, model.kv_heads), model.head_dim
        q, k, v = (_randn(device, 1, n, tokens, size) for n in heads)
        return {"q": q, "k": k, "v": v, "softmax_scale": size**-0.5, "is_causal": True}

    return Subject(
        **_of(attention.attention),
        sizes={"tokens": tokens, "keys": tokens, "head_dim": model.head_dim},
        make=make,
        heuristic=lambda target: attention.attention_tile(tokens, model.head_dim, DTYPE, False, False, target),
        vary={"BLOCK_M": (64, 128), "BLOCK_N": (32, 64, 128), "num_warps": (4, 8), "num_stages": (2, 3, 4)},
    )


def _step(model: Model, batch: int, keys: int, rounds: int = 0) -> Subject:
    group, size = model.heads // model.kv_heads, model.head_dim

    def make(device: torch.device) -> Arguments:
        q = _randn(device, batch, model.heads, 1, size)
        k, v = (_randn(device, batch, model.kv_heads, keys, size) for _ in range(2))
        made: Arguments = {"q": q, "k": k, "v": v, "softmax_scale": size**-0.5}
        if rounds:
            own = _sealing(device, batch, keys, rounds)
            made |= {name: sealing.seal(made[name], own, is_value=name == "v") for name in "kv"}
            made["sealing"] = own
        return made

    def expected(arguments: Arguments) -> Result:
        given = dict(arguments)
        own = given.pop("sealing", None)
        if own is not None:
            given |= {name: sealing.seal(given[name], own, is_value=name == "v") for name in "kv"}
        return reference.attention_step(**given)

    return Subject(
        **_of(attention_step.attention_step, expected),
        variant="sealed" if rounds else "",
        sizes={"sequences": batch * model.kv_heads, "rows": group, "keys": keys, "head_dim": size},
        make=make,
        heuristic=lambda target: attention_step.step_tile(
            batch, model.kv_heads, group, keys, size, DTYPE, False, bool(rounds), target
        ),
        vary={
            "BLOCK_N": (32, 64, 128),
            "num_warps": (2, 4, 8),
            "num_stages": (1, 2, 3, 4),
            "splits": (16, 33, 49, 66, 99),
        },
        rounds=rounds,
    )


SUBJECTS: tuple[Subject, ...] = (
    *(_product(model, count) for model in MODELS for count in (1, 16, 64, 256, 1024, 4224)),
    *(_injection(model, count, norm) for model in MODELS for count in (64, 1024, 4224) for norm in (False, True)),
    *(_heads(model, count) for model in MODELS for count in (64, 1024, 4224)),
    *(_transcoding(model, count) for model in MODELS for count in (1, 64, 1024, 4096)),
    *(_transcoding(model, count, ROUNDS) for model in MODELS for count in (64, 1024, 4096)),
    *(_prefill(model, tokens) for model in MODELS for tokens in (64, 1024, 4096)),
    *(_step(model, batch, keys) for model in MODELS for batch in (1, 8) for keys in STEPS),
    *(_step(model, 1, keys, ROUNDS) for model in MODELS for keys in STEPS),
)
