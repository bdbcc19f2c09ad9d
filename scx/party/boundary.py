"""The boundary: the only way between the parties, and who listens at it.

Every message has a name, a stage and a block. What may cross is `MESSAGES` and nothing else; the boundary refuses any
other tensor. Beside its tensors a request shows its operation, the public id of its conversation, its block, and in a
generation the number of its `step`, `past` (tokens cached before it) and `key_rows` (rows of the end blocks' encoded
keys before it).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = [
    "INTEGERS", "MESSAGES", "STAGES", "Boundary", "Crossing", "PartyLostError", "Pending", "Request", "Rule",
    "Transcript",
]  # fmt: skip

STAGES = ("calibration", "prefill", "key sharing", "generation")

_PRODUCTS = ("query_product", "key_product", "value_product")
_SCORES = ("scores", "value")
_TOP = ("top_logits", "top_tokens")
_INNER = ("gate_product", "up_product", "activation")

MESSAGES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "calibrate": (("embeddings",), ("attention_scale", "output_scale", "feed_forward_scale")),
    "open": (("first_key",), ()),
    "project_qkv": (("attention_input",), _PRODUCTS),
    "attend": (("query", "key", "value"), ("attention",)),
    "project_output": (("attention_rows",), ("output",)),
    "feed_forward": (("feed_forward_input",), ("feed_forward", *_INNER)),
    "enter": (("feed_forward_input",), (*_PRODUCTS, "hidden", *_TOP)),
    "advance": (("attention_rows",), (*_PRODUCTS, "hidden", *_TOP)),
    "head": (("head_input",), _TOP),
    "unlock": (("token_position", "positions"), ()),
    "encoded_keys": (("encoded_keys",), ()),
    "run_middle": (("hidden", "positions"), ("hidden",)),
    "score": (("hidden", "positions"), _SCORES),
    "pass_on": (("hidden", "positions"), ("hidden", *_SCORES)),
    "select": (("rows",), ()),
    "close": ((), ()),
}
"""Operation -> the names of tensors that it may send to the untrusted side, and that may come back."""

INTEGERS = frozenset({"first_key", "token_position", "positions", "rows", "top_tokens"})
"""Tensors that are int64; any other is of floating-point numbers."""


class PartyLostError(RuntimeError):
    """The untrusted party died, did not answer in time, or answered what was not asked for. The conversation's last
    completed token stands; `restore_conversation` goes on from there with another party."""


@dataclass(frozen=True)
class Request:
    """One message to the untrusted side: what to do, in which conversation and block, and the tensors for it."""

    operation: str
    conversation: str
    stage: str
    block: int
    step: int
    past: int
    key_rows: int
    tensors: Mapping[str, Tensor]


class Receiver(Protocol):
    """The far end of a boundary: an untrusted party, or what leads to one in another process.

    `begin` hands a request over, with the rule of its reply. What it returns waits for the reply and gives it.
    """

    def begin(self, request: Request, rule: "Rule") -> Callable[[], Mapping[str, Tensor]]: ...


class Rule(Protocol):
    """Who says what a reply must look like, before and after it has come: raises PartyLostError for any other. Its
    tokens are below `vocab_size`."""

    vocab_size: int

    def expected(self, request: Request) -> Mapping[str, tuple[int, ...]]: ...

    def check(self, request: Request, reply: Mapping[str, Tensor]) -> None: ...

    def check_values(self, request: Request, reply: Mapping[str, Tensor]) -> None: ...


@dataclass(frozen=True)
class Crossing:
    """One tensor that crossed. `tensor` is kept, on the CPU, of what the untrusted side received."""

    direction: str
    stage: str
    block: int
    operation: str
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int
    tensor: Tensor | None = field(default=None, repr=False, compare=False)


class Transcript:
    """Everything that crossed while it was recorded, in order. `requests` counts round trips with tensors, by
    stage."""

    def __init__(self) -> None:
        self.crossings: list[Crossing] = []
        self.requests: dict[str, int] = dict.fromkeys(STAGES, 0)

    def __repr__(self) -> str:
        return f"Transcript({len(self.crossings)} tensors, {self.nbytes()} bytes)"

    def nbytes(self, stage: str | None = None, direction: str | None = None) -> int:
        """Bytes that crossed, of one stage or direction ("to untrusted", "to secure") if given."""
        return sum(x.nbytes for x in self.select(stage=stage, direction=direction))

    def select(
        self, *, stage: str | None = None, direction: str | None = None, name: str | None = None
    ) -> list[Crossing]:
        """The crossings of a stage, a direction and a name, each if given."""
        wanted = {"stage": stage, "direction": direction, "name": name}
        chosen = {key: value for key, value in wanted.items() if value is not None}
        return [x for x in self.crossings if all(getattr(x, key) == value for key, value in chosen.items())]

    def received(self, stage: str | None = None) -> list[Crossing]:
        """What the untrusted side received."""
        return self.select(stage=stage, direction="to untrusted")


class Pending:
    """A request under way. The secure side does what it has yet to do, while the other side works, before it waits."""

    def __init__(self, finish: Callable[[], dict[str, Tensor]]) -> None:
        self._finish = finish

    def wait(self) -> dict[str, Tensor]:
        """The reply's tensors by name, on the secure side's device; called once.

        Raises: PartyLostError without a reply, or with another than was asked for.
        """
        return self._finish()


class Boundary:
    """Moves named tensors between the secure side's device and the untrusted party, and counts them.

    Args:
        receiver: the untrusted party, or what leads to it.
        rule: what replies must look like.
        secure_device, untrusted_device: where tensors go.
    """

    def __init__(
        self, receiver: Receiver, rule: Rule, secure_device: torch.device, untrusted_device: torch.device
    ) -> None:
        self._receiver = receiver
        self.rule = rule
        self.secure_device = secure_device
        self.untrusted_device = untrusted_device
        self._transcripts: list[Transcript] = []

    @contextmanager
    def record(self) -> Iterator[Transcript]:
        """Record what crosses within a `with` block."""
        transcript = Transcript()
        self._transcripts.append(transcript)
        try:
            yield transcript
        finally:
            self._transcripts.remove(transcript)

    def ask(self, operation: str, **arguments: Any) -> dict[str, Tensor]:
        """Send a request and wait for the reply: `begin`, with its arguments, and `Pending.wait`."""
        return self.begin(operation, **arguments).wait()

    def begin(
        self,
        operation: str,
        *,
        conversation: str,
        stage: str,
        block: int = -1,
        step: int = 0,
        past: int = 0,
        key_rows: int = 0,
        tensors: Mapping[str, Tensor],
    ) -> Pending:
        """Send a request. One is under way at a time.

        Args:
            operation: one of `MESSAGES`.
            conversation: its public id.
            stage: one of `STAGES`.
            block: the block meant; -1 for none.
            step, past, key_rows: lengths as above.
            tensors: by name, on the secure side's device.

        Returns: where the reply is waited for.
        Raises: ValueError for a tensor that is not in `MESSAGES`; PartyLostError if the request cannot be sent.
        """
        sent, _ = MESSAGES[operation]
        _check_names(operation, tensors, sent)
        moved, _ = _move(tensors, self.untrusted_device)
        self._note("to untrusted", stage, block, operation, moved)
        for transcript in self._transcripts:
            transcript.requests[stage] += bool(moved)
        request = Request(operation, conversation, stage, block, step, past, key_rows, moved)
        answer = self._receiver.begin(request, self.rule)
        if self.untrusted_device.type != "cuda":
            return Pending(lambda: self._end(request, self._arrive(request, answer())))
        # The reply's kernels are queued, not done. So are its copies, behind them: nobody waits for the device yet.
        arriving = self._arrive(request, answer())
        return Pending(lambda: self._end(request, arriving))

    def _arrive(self, request: Request, reply: Mapping[str, Tensor]) -> "_Moved":
        self.rule.check(request, reply)
        return _move(reply, self.secure_device)

    def _end(self, request: Request, moved: "_Moved") -> dict[str, Tensor]:
        tensors, copied = moved
        if copied is not None:
            copied.synchronize()
        self.rule.check_values(request, tensors)
        self._note("to secure", request.stage, request.block, request.operation, tensors)
        return tensors

    def _note(self, direction: str, stage: str, block: int, operation: str, tensors: Mapping[str, Tensor]) -> None:
        if not self._transcripts:
            return
        for name, x in tensors.items():
            kept = x.detach().cpu().clone() if direction == "to untrusted" else None
            crossing = Crossing(
                direction, stage, block, operation, name, tuple(x.shape), x.dtype, x.numel() * x.element_size(), kept
            )
            for transcript in self._transcripts:
                transcript.crossings.append(crossing)


def _check_names(operation: str, tensors: Mapping[str, Tensor], allowed: tuple[str, ...]) -> None:
    unknown = sorted(set(tensors) - set(allowed))
    if unknown:
        raise ValueError(f"{operation}: tensors {unknown} do not cross the boundary, expected some of {list(allowed)}")


_Moved = tuple[dict[str, Tensor], torch.cuda.Event | None]


def _move(tensors: Mapping[str, Tensor], device: torch.device) -> _Moved:
    """The tensors on `device`, each in memory of its own size (a view would take along what lies around it), and what
    to wait for before the CPU reads them."""
    moved, source = {}, None
    for name, x in tensors.items():
        x = x.detach().contiguous()
        if x.device == device:
            moved[name] = x.clone() if x.untyped_storage().nbytes() > x.numel() * x.element_size() else x
        elif device.type == "cuda" and x.device.type == "cpu":
            moved[name] = x.pin_memory().to(device, non_blocking=True)
        elif device.type == "cpu" and x.device.type == "cuda":
            moved[name] = torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
            source = x.device
        else:
            moved[name] = x.to(device)
    return moved, None if source is None else torch.cuda.current_stream(source).record_event()
