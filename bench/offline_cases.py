"""The launches that are compiled offline: operations as they are measured, with what else a request gives, on tensors
without memory."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.contest import META, Case, Draw
from bench.operation_cases import OPERATIONS
from scx_kernels.kernels import attention, product, qkv, rows, sealing, unlock


class Ciphered(NamedTuple):
    """Where a kernel runs the cipher, for who counts its instructions: in straight-line code `keystreams` are XORed on
    64 bytes a BLOCK_U; of code in loops the `loops` longest together run it over `tiles` tiles of `tile_rows` rows of
    a head."""

    keystreams: int = 0
    loops: int = 0
    tiles: int = 0
    tile_rows: str = ""


NOWHERE = Ciphered()
# In the loops over heads of K and of V; over whole tiles of keys and over those at the edge, in each of which K and V
# are a tile; and over keys.
IN_QKV, IN_PREFILL, OVER_KEYS = Ciphered(0, 2, 2, "BLOCK_S"), Ciphered(0, 2, 4, "BLOCK_N"), Ciphered(0, 1, 2, "BLOCK_N")


@dataclass(frozen=True)
class Launch:
    """One launch: `launcher` on a case's inputs and on `more` arguments, which replace those of the same name.
    `matrix` names the unit expected on sm_90."""

    name: str
    launcher: Callable[..., Any]
    case: Case
    more: Callable[[Draw], dict[str, Any]] = lambda draw: {}
    matrix: str = ""
    quick: bool = False
    dtypes: tuple[str, ...] = ("fp32", "fp16", "bf16")
    ciphered: Ciphered = NOWHERE

    def arguments(self, dtype: torch.dtype) -> dict[str, Any]:
        case = replace(self.case, dtype=str(dtype).removeprefix("torch."))
        return OPERATIONS[case.operation].make(case, META).given | self.more(Draw(case, META))


def floats(draw: Draw, *shape: int) -> Tensor:
    return draw(*shape, dtype=torch.float32)


def places(draw: Draw) -> Tensor:
    """A place in each sequence, such as where it ends."""
    return torch.empty(draw.case.batch, dtype=torch.int64, device=draw.device)


def inject(name: str, heads: str, asked: str = "", redundant: int = 128, **options: Any) -> Launch:
    return Launch(name, rows.inject_permute, Case(f"inject_permute{asked}", heads, 4096, redundant, 2), **options)


def norm_alone(name: str, heads: str) -> Launch:
    case = Case("inject_permute+norm", heads, 1, batch=2)
    return Launch(name, rows.inject_permute, case, lambda draw: {"row_index": None})


def strip(name: str, heads: str, noisy: bool = False, **options: Any) -> Launch:
    def more(draw: Draw) -> dict[str, Any]:
        encoded = (draw.case.rows, draw.shape.hidden)
        noise = {"z": floats(draw, 2, *encoded), "image": floats(draw, *encoded)} if noisy else {}
        return {"dtype": draw.case.torch_dtype, **noise}

    return Launch(name, rows.strip_restore, Case("strip_restore", heads, 4096, 128, 2), more, **options)


def transcode(
    name: str, heads: str, tokens: int, *, norm=False, noisy=False, offsets=False, rounds=0, opens=False, **options: Any
) -> Launch:
    """opens: the first tokens of a sealed cache, whose K and V are also returned unsealed."""

    def more(draw: Draw) -> dict[str, Any]:
        shape, encoded = draw.shape, draw.case.rows
        together = draw(2, encoded, shape.qkv_width, dtype=torch.float32 if noisy else None)
        found = dict(zip(("z_q", "z_k", "z_v"), together.split(shape.qkv_widths, dim=-1), strict=True))
        if noisy:
            found["images"] = tuple(floats(draw, encoded, width) for width in shape.qkv_widths)
        if norm:
            found |= dict.fromkeys(("q_norm", "k_norm"), draw(shape.head_dim))
        return found | ({"offset": 0, "offsets": places(draw)} if offsets else {})

    operation = "qkv_decode_encode+" + ("sealed+opening" if opens else "sealed" if rounds else "cache")
    case = Case(operation, heads, tokens, 128, 2, rounds=rounds)
    return Launch(name, qkv.qkv_decode_encode, case, more, **options, ciphered=IN_QKV if rounds else NOWHERE)


def prefill(
    name: str, heads: str, tokens: int, keys: int, *, window: int | None = None, lengths=False, masked=False,
    additive=False, encoding=False, redundant=128, rounds=0, **options: Any,
) -> Launch:  # fmt: skip
    def more(draw: Draw) -> dict[str, Any]:
        kind = draw.case.torch_dtype if additive else torch.bool
        mask = torch.empty(2, 1, tokens, keys, dtype=kind, device=draw.device)
        found = {"window": window, "is_causal": not masked, "mask": mask if masked else None}
        if lengths:
            found |= {"kv_start": places(draw), "kv_length": places(draw)}
        if encoding:
            found["row_index"] = draw.order(draw.case.rows)
            found["redundant"] = draw.rows(decoys, draw.shape.query_width) if decoys else None
        return found

    operation, decoys = "attention+sealed" if rounds else "attention", redundant if encoding else 0
    case = Case(operation, heads, tokens, decoys, 2, cached=keys - tokens, rounds=rounds)
    ciphered = (OVER_KEYS if masked else IN_PREFILL) if rounds else NOWHERE
    return Launch(name, attention.attention, case, more, "HGMMA", **options, ciphered=ciphered)


def start(name: str, heads: str, tokens: int) -> Launch:
    """What the untrusted side of two parties asks: where each sequence begins, nothing about features."""

    def both(*, output_index: Tensor, **arguments: Any) -> None:
        attention.attention(**arguments)
        del arguments["is_causal"]
        cache = arguments["k"].repeat(1, 1, 2, 1)
        attention.attention_step(**arguments | {"q": arguments["q"][:, :, :1], "k": cache, "v": cache})

    case = Case("attention", heads, tokens, batch=2)
    return Launch(name, both, case, lambda draw: {"kv_start": places(draw)}, "MMA")


def step(
    name: str, heads: str, capacity: int, *, batch=1, tokens=1, permuted=False, rounds=0, **options: Any
) -> Launch:
    def more(draw: Draw) -> dict[str, Any]:
        return {"kv_length": places(draw)} | ({"position": draw.position(capacity, capacity - 128)} if permuted else {})

    operation = "attention_step+sealed" if rounds else "attention_step"
    case = Case(operation, heads, tokens, batch=batch, cached=capacity, rounds=rounds)
    ciphered = OVER_KEYS if rounds else NOWHERE
    return Launch(name, attention.attention_step, case, more, "MMA", **options, ciphered=ciphered)


def linear(
    name: str, tokens: int, redundant: int, inner: int, columns: int, *, batch=1, noisy=False, strips=False,
    added=False, **options: Any,
) -> Launch:  # fmt: skip
    """strips: redundant rows of the result. added: noise lies on the rows already."""

    def more(draw: Draw) -> dict[str, Any]:
        encoded = draw.case.rows
        found = {"weight": draw(columns, inner), "bias": draw(columns)}
        if noisy:
            found["noise"] = floats(draw, encoded, inner)
        if noisy or added:
            found["image"] = floats(draw, encoded, columns)
        if added:
            found |= {"x": floats(draw, batch, tokens, inner), "redundant": floats(draw, batch, redundant, inner)}
        return found | ({"scatter_index": draw.order(encoded), "out_rows": tokens} if strips else {})

    case = Case("permuted_linear", f"{inner}x1x1", tokens, redundant, batch)
    return Launch(name, product.permuted_linear, case, more, "HGMMA", **options)


def shared(name: str, heads: str, tokens: int, **options: Any) -> Launch:
    return Launch(name, product.permuted_linears, Case("permuted_linears", heads, tokens), matrix="HGMMA", **options)


def locked(name: str, heads: str, asked: str = "", **options: Any) -> Launch:
    return Launch(name, unlock.unlock, Case(f"unlock{asked}", heads, 8064, 128, 2), **options)


def seal(
    name: str, heads: str, tokens: int, rounds: int, *dtypes: str, operation="seal", batch=1, **options: Any
) -> Launch:
    """Patterns of 16 bits are the same to a cipher, whatever they mean."""
    case = Case(operation, heads, tokens, batch=batch, rounds=rounds)
    options |= {"dtypes": dtypes or ("fp32", "fp16"), "ciphered": Ciphered(2 if operation == "reseal" else 1)}
    return Launch(name, getattr(sealing, operation), case, **options)


def bits(name: str, streams: int, count: int) -> Launch:
    case = Case("random_bits", f"{streams}x{streams}x1", count)
    return Launch(name, sealing.random_bits, case, dtypes=("fp32",), ciphered=Ciphered(1))


CASES = (
    inject("inject 4096", "32x8x128", quick=True),
    inject("inject 576", "9x3x64"),
    inject("inject 4096 norm", "32x8x128", "+norm", quick=True),
    inject("inject 4096 norm noise", "32x8x128", "+norm+noise"),
    inject("inject 16384 norm noise", "128x8x128", "+norm+noise"),
    inject("inject 18432 norm noise", "144x8x128", "+norm+noise"),
    norm_alone("inject 1 4096 norm", "32x8x128"),
    inject("reorder 32x128", "32x8x128", "+features", quick=True),
    inject("reorder 9x64", "9x3x64", "+features", redundant=0),
    inject("reorder 32x80", "32x32x80", "+features"),
    locked("unlock 8x128", "32x8x128", quick=True),
    locked("unlock 3x80 in place", "3x3x80", "+in place"),
    strip("strip 4096", "32x8x128", quick=True),
    strip("strip 4096 noise", "32x8x128", noisy=True),
    strip("strip 576", "9x3x64"),
    transcode("qkv 4096 32x8x128", "32x8x128", 4096, quick=True),
    transcode("qkv 4096 32x8x128 norm noise", "32x8x128", 4096, norm=True, noisy=True, quick=True),
    transcode("qkv 512 9x3x64", "9x3x64", 512),
    transcode("qkv 512 32x32x80", "32x32x80", 512),
    transcode("qkv 512 32x32x96 norm", "32x32x96", 512, norm=True),
    transcode("qkv 512 8x4x256 noise", "8x4x256", 512, noisy=True),
    transcode("qkv 1 32x8x128", "32x8x128", 1, offsets=True),
    prefill("attention 4096 128", "32x8x128", 4096, 4096, quick=True),
    prefill("attention 4096 128 encoded", "32x8x128", 4096, 4096, encoding=True),
    prefill("attention 4096 128 window lengths", "32x8x128", 4096, 4096, window=1024, lengths=True),
    prefill("attention 1024 128 mask", "32x8x128", 1024, 1024, masked=True),
    prefill("attention 1024 128 added mask", "32x8x128", 1024, 1024, masked=True, additive=True),
    prefill("sealed attention 1024 9217 128 added mask", "32x8x128", 1024, 9217, masked=True, additive=True, rounds=20),
    prefill("attention 4096 64", "9x3x64", 4096, 4096, encoding=True, quick=True),
    prefill("attention 4096 80", "32x32x80", 4096, 4096, quick=True),
    prefill("attention 4096 96", "32x32x96", 4096, 4096, encoding=True),
    prefill("attention 4096 128 encoded, no redundant rows", "32x8x128", 4096, 4096, encoding=True, redundant=0),
    start("attention 4096 128 starts", "32x8x128", 4096),
    prefill("attention 4096 192", "32x32x192", 4096, 4096),
    prefill("attention 4096 256", "16x8x256", 4096, 4096, window=1024, encoding=True),
    prefill("attention 40 128", "32x8x128", 40, 4096),
    step("step 1 8192 128", "32x8x128", 8192, quick=True),
    step("step 8 65536 128 permuted", "32x8x128", 65536, batch=8, permuted=True, quick=True),
    step("step 4 8192 80", "32x32x80", 8192, batch=4, tokens=4),
    step("step 1 8192 256", "16x8x256", 8192, tokens=16, permuted=True),
    step("step 1 8192 64", "9x3x64", 8192),
    linear("product 4224 4096 6144", 4096, 128, 4096, 6144, quick=True),
    linear("product 4224 4096 6144 noise", 4096, 128, 4096, 6144, noisy=True, quick=True),
    linear("product 4224 4096 6144 strip", 4096, 128, 4096, 6144, strips=True),
    linear("product 300 577 960", 140, 10, 577, 960, batch=2),
    linear("product 300 4096 4096 noise", 140, 10, 4096, 4096, batch=2, noisy=True),
    linear("product 1 4096 6144", 1, 0, 4096, 6144, quick=True),
    linear("product 16 4096 4096 noise", 12, 4, 4096, 4096, noisy=True),
    linear("product 33 577 1024", 30, 3, 577, 1024),
    linear("product 64 4096 1024", 16, 0, 4096, 1024, batch=4),
    shared("product 1 4096 q k v", "32x8x128", 1, quick=True),
    shared("product 64 576 q k v", "9x3x64", 64),
    linear("product 4224 4096 6144 noisy rows", 4096, 128, 4096, 6144, added=True),
    step("step 4 4096 128 many rows", "32x4x128", 4096, batch=4, tokens=8),
    step("step 4 4096 96 many rows", "32x4x96", 4096, batch=4, tokens=8, permuted=True),
    linear("product 64 4096 6144 noise", 60, 4, 4096, 6144, noisy=True),
    seal("seal 8 8192 128 rounds 20", "8x8x128", 8192, 20),
    seal("seal 8 8192 128 rounds 12", "8x8x128", 8192, 12),
    seal("seal 8 8192 128 rounds 8", "8x8x128", 8192, 8),
    seal("seal 8 1 128 rounds 20", "8x8x128", 1, 20, "fp16"),
    seal("seal 3 8192 64 rounds 20", "9x3x64", 8192, 20, "fp32", batch=8),
    seal("seal 32 4096 80 rounds 20", "32x32x80", 4096, 20, "fp16"),
    seal("seal 32 4096 96 rounds 8", "32x32x96", 4096, 8, "fp16", quick=True),
    seal("seal 8 4096 256 rounds 20", "8x8x256", 4096, 20, "fp32"),
    seal("reseal 8 8192 128 rounds 20", "8x8x128", 8192, 20, operation="reseal"),
    bits("random bits", 64, 4096),
    transcode("sealed qkv 4096 32x8x128", "32x8x128", 4096, rounds=20),
    transcode("sealed qkv 1 32x8x128", "32x8x128", 1, offsets=True, rounds=20),
    transcode("sealed qkv 512 32x32x80", "32x32x80", 512, rounds=8),
    transcode("opening qkv 4096 32x8x128", "32x8x128", 4096, rounds=20, opens=True, quick=True),
    transcode("opening qkv 4096 32x8x128 norm", "32x8x128", 4096, norm=True, rounds=8, opens=True),
    transcode("opening qkv 512 32x32x80", "32x32x80", 512, rounds=8, opens=True),
    transcode("opening qkv 512 9x3x64", "9x3x64", 512, rounds=20, opens=True),
    transcode("opening qkv 512 8x4x256", "8x4x256", 512, rounds=12, opens=True),
    prefill("sealed attention 4096 128", "32x8x128", 4096, 4096, rounds=8),
    prefill("sealed attention 1024 9217 128", "32x8x128", 1024, 9217, masked=True, rounds=20),
    prefill(
        "sealed turn 1024 9217 128, no redundant rows", "32x8x128", 1024, 9217,
        encoding=True, masked=True, rounds=20, redundant=0, quick=True,
    ),
    prefill("sealed turn 1024 9217 128", "32x8x128", 1024, 9217, encoding=True, masked=True, rounds=8),
    prefill("sealed turn 33 9217 80", "32x32x80", 33, 9217, encoding=True, masked=True, rounds=8),
    prefill(
        "sealed turn 33 9217 256, no redundant rows", "8x4x256", 33, 9217,
        encoding=True, masked=True, rounds=12, redundant=0,
    ),
    prefill("sealed padded token 9217 64", "9x3x64", 1, 9217, masked=True, rounds=20),
    step("sealed step 1 8192 128 rounds 12", "32x8x128", 8192, rounds=12),
    step("sealed step 1 8192 128 rounds 8", "32x8x128", 8192, rounds=8),
    prefill("sealed attention 4096 80", "32x32x80", 4096, 4096, rounds=20),
    step("sealed step 1 8192 128", "32x8x128", 8192, rounds=20),
    step("sealed step 8 65536 128 permuted", "32x8x128", 65536, batch=8, permuted=True, rounds=8),
    step("sealed step 4 8192 80", "32x32x80", 8192, batch=4, tokens=4, rounds=8),
    step("sealed step 4 4096 96", "32x4x96", 4096, batch=4, tokens=8, rounds=8),
    prefill("sealed attention 4096 160", "32x32x160", 4096, 4096, rounds=20),
    step("sealed step 4 8192 160", "16x8x160", 8192, batch=4, rounds=20),
    step("sealed step 4 8192 192", "16x8x192", 8192, batch=4, rounds=8),
    step("sealed step 1 8192 64", "9x3x64", 8192, rounds=20),
    step("sealed step 1 8192 256", "16x8x256", 8192, tokens=16, rounds=8),
)  # fmt: skip
