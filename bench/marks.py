"""What the kernels are asked to reach on a GPU, at Llama-3-8B's sizes, and how far a result file says they are."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

from bench.contest import Case
from bench.results import Content, Entry, keystream_seconds, measured, of_suite

MODEL = "Llama-3-8B"


@dataclass(frozen=True)
class Mark:
    """A fraction of a limit's speed that operations must have at the sizes that `sizes` accepts.

    `rivals`: beginnings of their names; the fastest is the limit. None: the bandwidth of a large copy, for the bytes
    that the operation is held against, or the rate of a keystream where a sealed cache needs longer for that.
    """

    name: str
    limit: str
    least: float
    operations: tuple[str, ...]
    sizes: Callable[[Entry], bool]
    rivals: tuple[str, ...] | None = None

    def is_for(self, entry: Entry) -> bool:
        return entry["model"] == MODEL and entry["operation"] in self.operations and self.sizes(entry)


def _rows(entry: Entry) -> int:
    return entry["tokens"] + entry["redundant"]


def _is_long_step(entry: Entry) -> bool:
    return 8192 <= entry["cached"] <= 65536 and entry["batch"] == 1 and entry["cached"] % 8192 == 0


MARKS = (
    Mark(
        "permute-gather product, 4,224 rows, D 4,096 → 6,144",
        "cuBLAS on gathered rows",
        0.95,
        ("permuted_linear", "permuted_linears"),
        lambda entry: _rows(entry) == 4224,
        ("product alone", "three products", "one product"),
    ),
    Mark(
        "the same, 1–64 rows",
        "copy bandwidth on the weight",
        0.85,
        ("permuted_linear", "permuted_linears"),
        lambda entry: _rows(entry) <= 64,
    ),
    Mark(
        "inject pass, strip pass, QKV decode-encode",
        "copy bandwidth",
        0.85,
        ("inject_permute", "inject_permute+norm", "strip_restore", "qkv_decode_encode", "qkv_decode_encode+cache"),
        lambda entry: _rows(entry) == 4224,
    ),
    Mark(
        "attention prefill, head size 128, 2k–16k",
        "the best sdpa backend on plain tensors",
        0.9,
        ("attention",),
        lambda entry: 2048 <= entry["tokens"] <= 16384,
        ("sdpa",),
    ),
    Mark(
        "attention, one step, 8k–64k cache",
        "copy bandwidth on the cache",
        0.85,
        ("attention_step",),
        _is_long_step,
    ),
    Mark(
        "the same on a sealed cache",
        "the lower of keystream and copy bandwidth",
        0.85,
        ("attention_step+sealed",),
        _is_long_step,
    ),
)


def is_marked(case: Case) -> bool:
    """Whether a mark is about it; of the smallest model, which a CPU measures in their place, what the short table
    shows."""
    return case.headline if case.model == "SmolLM2" else any(mark.is_for(asdict(case)) for mark in MARKS)


@dataclass(frozen=True)
class Reached:
    """A mark at one size: the fraction of the limit's speed, and of a copy of as many bytes if there is one."""

    mark: Mark
    entry: Entry
    fraction: float
    of_copy: float | None

    @property
    def is_enough(self) -> bool:
        return self.fraction >= self.mark.least


def reached(content: Content) -> Iterator[Reached]:
    """Every mark at every size that was measured, in the order of MARKS."""
    for mark in MARKS:
        for entry in of_suite(content, "operations"):
            own = next((c for c in measured(entry) if c["kind"] == "scx"), None) if mark.is_for(entry) else None
            if own is None:
                continue
            milliseconds = own["ms"]["median"]
            limit = _limit(mark, content, entry)
            if limit is not None:
                copy = _fastest(entry, ("copy of",))
                yield Reached(mark, entry, limit / milliseconds, copy and copy / milliseconds)


def _limit(mark: Mark, content: Content, entry: Entry) -> float | None:
    """The limit's milliseconds; None where none of its rivals was measured."""
    if mark.rivals is None:
        copying: float = entry["copied_bytes"] / content["ceilings"]["copy_gb_s"] / 1e6
        return max(copying, 1e3 * keystream_seconds(content, entry))
    return _fastest(entry, mark.rivals)


def _fastest(entry: Entry, names: tuple[str, ...]) -> float | None:
    return min((c["ms"]["median"] for c in measured(entry) if c["name"].startswith(names)), default=None)
