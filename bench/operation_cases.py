"""Every operation that is measured, and at which sizes.

To measure one more operation or one more way to compute it, add to the dictionary of its file; to measure it at more
than one size, add to `cases`.
"""

from collections.abc import Iterator
from dataclasses import replace

from bench.attention_cases import ATTENTION_OPERATIONS
from bench.contest import Case, Operation
from bench.row_cases import ROW_OPERATIONS
from bench.sealing_cases import SEALING_OPERATIONS
from bench.shapes import SHAPES

OPERATIONS: dict[str, Operation] = ROW_OPERATIONS | ATTENTION_OPERATIONS | SEALING_OPERATIONS

BY_ROWS = (
    "inject_permute",
    "inject_permute+norm",
    "strip_restore",
    "permuted_linear",
    "permuted_linears",
    "qkv_decode_encode",
    "qkv_decode_encode+cache",
)
PRODUCTS = ("permuted_linear", "permuted_linears")
BY_TOKENS = ("attention", "attention_step", "attention_step+position", "unlock")
ONCE = tuple(name for name in OPERATIONS if name not in (*BY_ROWS, *BY_TOKENS) and "+sealed" not in name)
"""Operations of the first block or of a session's turn only, or parts of others: measured at one size a model."""
QKV_SEALED = ("qkv_decode_encode+sealed", "qkv_decode_encode+sealed+opening")
ROUNDS = (20, 12, 8)
WITHOUT_REDUNDANT = ("rotary_permute", "permute_features", "seal", "unseal", "reseal", "random_bits")


def cases(on_cuda: bool) -> Iterator[Case]:
    """Every case of a machine, the models in the order of SHAPES; on a CPU the smallest one alone."""
    for model in SHAPES if on_cuda else ("SmolLM2",):
        base = Case("", model, 1, dtype="bfloat16" if on_cuda else "float32")
        yield from _cases_on_cuda(base) if on_cuda else _cases_on_a_cpu(base)


def _cases_on_cuda(base: Case) -> Iterator[Case]:
    shown = base.model == "Llama-3-8B"
    usual = replace(base, tokens=4096, redundant=128 if shown else 100, headline=shown)
    for operation in BY_ROWS:
        yield replace(usual, operation=operation)
        for tokens, redundant in _row_sizes(shown):
            yield replace(base, operation=operation, tokens=tokens, redundant=redundant)
    for operation in PRODUCTS:
        for rows in (4, 16, 64):
            yield replace(base, operation=operation, tokens=rows, headline=shown and rows == 16)
    for operation in ONCE:
        yield _once(usual, operation)
    for tokens in (128, 1024, 2048, 4096, 8192, 16384):
        yield replace(base, operation="attention", tokens=tokens, headline=shown and tokens == 4096)
    for batch in (1, 8, 64):
        for cached in (128, 1024, 10240):
            yield replace(base, operation="attention_step", batch=batch, cached=cached)
    for cached in (8192, 16384, 32768, 65536):
        yield replace(base, operation="attention_step", cached=cached, headline=shown)
    yield replace(base, operation="attention_step+position", cached=8192)
    for tokens in (8192, 65536):
        yield replace(base, operation="unlock", tokens=tokens, redundant=128, headline=shown and tokens == 8192)
    for rounds in ROUNDS if shown else ROUNDS[:1]:
        yield from _sealed_on_cuda(replace(base, rounds=rounds), usual.redundant, shown)


def _sealed_on_cuda(base: Case, redundant: int, shown: bool) -> Iterator[Case]:
    """Of a sealed cache: the sizes that marks and predictions are about, for the model shown; else one of each."""
    usual, headline = shown and base.rounds == 20, {"headline": shown and base.rounds == 20}
    for operation in QKV_SEALED:
        yield replace(base, operation=operation, tokens=4096, redundant=redundant, **headline)
        if usual:
            yield replace(base, operation=operation, tokens=1)
    yield replace(base, operation="attention+sealed", tokens=1024, cached=8192, **headline)
    for cached in (1024, 8192, 16384, 32768, 65536) if shown else (8192,):
        yield replace(base, operation="attention_step+sealed", cached=cached, headline=usual and cached == 8192)


def _once(usual: Case, operation: str) -> Case:
    redundant = 0 if operation in WITHOUT_REDUNDANT else usual.redundant
    headline = usual.headline and operation in ("permuted_linear+noisy rows", "attention+encoding", "seal")
    return replace(usual, operation=operation, redundant=redundant, headline=headline)


def _row_sizes(shown: bool) -> Iterator[tuple[int, int]]:
    """(tokens, redundant) beside the usual size: no redundant rows, 100, and as many as tokens."""
    yield from ((1, 0), (4096, 0), (4096, 4096), (16384, 100))
    if shown:
        yield from ((128, 100), (1024, 0), (1024, 100), (1024, 1024), (4096, 100), (16384, 0), (16384, 16384))


def _cases_on_a_cpu(base: Case) -> Iterator[Case]:
    usual = replace(base, tokens=1024, redundant=100)
    for operation in BY_ROWS:
        for tokens, redundant in ((1, 0), (128, 100), (1024, 0), (1024, 100), (1024, 1024)):
            headline = (tokens, redundant) == (1024, 100)
            yield replace(base, operation=operation, tokens=tokens, redundant=redundant, headline=headline)
    for operation in PRODUCTS:
        yield replace(base, operation=operation, tokens=16)
    for operation in ONCE:
        yield _once(usual, operation)
    for tokens in (128, 1024):
        yield replace(base, operation="attention", tokens=tokens, headline=tokens == 1024)
    for batch, cached in ((1, 128), (1, 1024), (8, 1024), (1, 8192)):
        yield replace(base, operation="attention_step", batch=batch, cached=cached, headline=cached == 8192)
    yield replace(base, operation="attention_step+position", cached=1024)
    yield replace(usual, operation="unlock", headline=True)
    sealed = replace(base, rounds=20, headline=True)
    for operation in QKV_SEALED:
        yield replace(sealed, operation=operation, tokens=1024, redundant=100)
    yield replace(sealed, operation="qkv_decode_encode+sealed", tokens=1, headline=False)
    yield replace(sealed, operation="attention+sealed", tokens=128, cached=1024)
    for rounds in ROUNDS:  # fewer than 20 are plain PyTorch on a CPU
        yield replace(sealed, operation="attention_step+sealed", cached=1024, rounds=rounds, headline=rounds == 20)
