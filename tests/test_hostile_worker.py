"""A worker that has the right certificate and lies: whatever it sends or does ends as `PartyLostError`, in time, with
nothing allocated that was not expected, and no token comes out that the plain model does not give."""

import json
import pickle
import random
import struct
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from tiny import tiny_model
from torch import Tensor
from workers import Bytes, acting, honest, running, split_model

from scx.party import PartyLostError
from scx.party.boundary import MESSAGES, Request
from scx.party.channel import PATIENCE, Channel, ChannelClosedError
from scx.party.exchange import Worker
from scx.party.messages import (
    MAX_HEADER_BYTES,
    MessageError,
    read_reply,
    read_request,
    write_reply,
    write_request,
)

NEW, TARGET = 4, ("attend", "pass_on", "project_qkv", "enter", "advance")
Reply = dict[str, Tensor]


def framed(head: bytes, body: bytes = b"", lengths: tuple[int, int] | None = None) -> bytes:
    return struct.pack(">IQ", *(lengths or (len(head), len(body)))) + head + body


def sent(number: int, reply: Reply) -> bytes:
    return b"".join(write_reply(number, reply))


def header_of(n: int, **fields: object) -> bytes:
    return framed(json.dumps({"number": n, "tensors": {}, **fields}).encode())


def first(reply: Reply, change: Callable[[Tensor], Tensor]) -> Reply:
    name, x = next(iter(reply.items()))
    return {**reply, name: change(x)}


def every(reply: Reply, change: Callable[[Tensor], Tensor]) -> Reply:
    return {name: change(x) for name, x in reply.items()}


def one_nan(x: Tensor) -> Tensor:
    x = x.clone()
    x.view(-1)[-1] = torch.nan
    return x


def described(number: int, name: str, kind: object, body: bytes = b"") -> bytes:
    head = json.dumps({"number": number, "tensors": {name: kind}}).encode()
    return framed(head, body)


LIES: dict[str, Callable[[int, Reply], bytes]] = {
    "another shape": lambda n, reply: sent(n, first(reply, lambda x: x[..., :-1])),
    "another dimension": lambda n, reply: sent(n, first(reply, lambda x: x[None])),
    "integers": lambda n, reply: sent(n, {"attention": torch.zeros(1)}).replace(b"float32", b"int64  "),
    "one more tensor": lambda n, reply: sent(n, {**reply, "more": torch.zeros(3)}),
    "one fewer": lambda n, reply: sent(n, dict(list(reply.items())[1:])),
    "all NaN": lambda n, reply: sent(n, every(reply, lambda x: torch.full_like(x, torch.nan))),
    "one NaN": lambda n, reply: sent(n, first(reply, one_nan)),
    "infinite": lambda n, reply: sent(n, every(reply, lambda x: torch.full_like(x, -torch.inf))),
    "the number before": lambda n, reply: sent(n - 1, reply),
    "the next number": lambda n, reply: sent(n + 1, reply),
    "a list": lambda n, _: framed(b"[1, 2]"),
    "nothing": lambda n, _: framed(b"null"),
    "a number": lambda n, _: framed(b"7"),
    "tensors in a list": lambda n, _: header_of(n, tensors=[1]),
    "a tensor that is none": lambda n, _: described(n, "attention", None),
    "a shape of words": lambda n, _: described(n, "attention", ["torch.float32", ["a"]]),
    "a shape of fractions": lambda n, _: described(n, "attention", ["torch.float32", [1.5]], b"1234"),
    "a shape of truths": lambda n, _: described(n, "attention", ["torch.float32", [True]], b"1234"),
    "a huge shape": lambda n, _: described(n, "attention", ["torch.float32", [10**23, 0]]),
    "a shape below zero": lambda n, _: described(n, "attention", ["torch.float32", [-1]]),
    "another dtype": lambda n, _: described(n, "attention", ["torch.complex64", [1]], b"12345678"),
    "deep": lambda n, _: framed(b"[" * 60000),
    "deep and whole": lambda n, _: framed(b'{"number":' + b"[" * 30000 + b"]" * 30000 + b"}"),
    "no UTF-8": lambda n, _: framed(b"\xff\xfe{}"),
    "UTF-16": lambda n, _: framed(json.dumps({"number": n, "tensors": {}}).encode("utf-16")),
    "a pickle": lambda n, _: framed(pickle.dumps(print)),
    "a name twice": lambda n, _: framed(b'{"number": %d, "number": %d, "tensors": {}}' % (n, n)),
    "a number that is none": lambda n, _: header_of(n, number=float("nan")),
    "a number as a truth": lambda n, _: header_of(n, number=True),
    "4,300 digits": lambda n, _: framed(b'{"number": 1%s, "tensors": {}}' % (b"0" * 5000)),
    "one more field": lambda n, _: header_of(n, more=1),
    "an error that is a dict": lambda n, _: header_of(n, error={"a": ["x" * 300]}),
    "no header": lambda n, _: framed(b"", lengths=(0, 0)),
    "lengths of all ones": lambda n, _: struct.pack(">IQ", 2**32 - 1, 2**64 - 1),
    "a body of 1 GiB": lambda n, _: framed(b'{"number": %d, "tensors": {}}' % n, lengths=(27 + len(str(n)), 2**30)),
    "a described body of 1 GiB": lambda n, _: framed(
        head := json.dumps({"number": n, "tensors": {"attention": ["torch.float32", [2**28]]}}).encode(),
        lengths=(len(head), 2**30),
    ),
    "a header of 64 KiB": lambda n, _: framed(b'{"number": %d, "tensors": {}' % n + b" " * 65000 + b"}"),
    "a longer header": lambda n, _: framed(b"{" + b" " * MAX_HEADER_BYTES + b"}"),
}  # fmt: skip


@pytest.fixture(scope="module")
def secure() -> Iterator[tuple]:
    model, remote = split_model()
    yield model, remote
    remote.close()


def lying(answer: Callable[[Channel, int, Reply], None]) -> Callable[[Channel, int, Request, Reply], None]:
    """Honest for six requests, as a test's own tokens must not be the only ones that are refused."""

    def act(channel: Channel, number: int, request: Request, reply: Reply) -> None:
        if number > 6 and request.operation in TARGET:
            answer(channel, number, reply)
        else:
            channel.send(write_reply(number, reply), PATIENCE)

    return act


def raw(channel: Channel, data: bytes) -> None:
    channel.send([memoryview(data)], PATIENCE)


def is_one_line(text: str) -> bool:
    return text.isascii() and text.isprintable() and len(text) < 1000


@torch.no_grad()
def lose(secure: tuple, prompt, answer: Callable[[Channel, int, Reply], None], seconds: float = 5.0) -> str:
    """What the secure side says of a worker with this answer, which it must not take any longer than that."""
    model, remote = secure
    with running(acting(remote.address, lying(answer))):
        remote.connect()
        begun = time.monotonic()
        with pytest.raises(PartyLostError) as lost:
            model.generate(prompt(9).cpu(), max_new_tokens=NEW, do_sample=False)
        assert time.monotonic() - begun < seconds
        remote._worker.end()
    said = str(lost.value)
    assert is_one_line(said)
    assert any(said.startswith(f"{operation}, block ") for operation in TARGET), said
    return said


@pytest.mark.parametrize("lie", LIES)
def test_lies(secure, prompt, lie: str) -> None:
    """Wrong shapes, numbers, names, headers and lengths, by name."""
    lose(secure, prompt, lambda channel, number, reply: raw(channel, LIES[lie](number, reply)))


@torch.no_grad()
def test_who_is_found_out_later_goes_too(prompt) -> None:
    """A reply of the right form, whose tokens are no tokens: the next worker takes the conversation's place."""
    model, remote = split_model(prefill_top_k=3)
    ids = prompt(9).cpu()

    def lie(channel: Channel, number: int, request: Request, reply: Reply) -> None:
        if "top_tokens" in reply:
            reply["top_tokens"] = reply["top_tokens"] + 211
        channel.send(write_reply(number, reply), PATIENCE)

    with running(acting(remote.address, lie)):
        remote.connect()
        with pytest.raises(PartyLostError, match=r"block 3: expected tokens 0\.\.210"):
            model(ids)
        with running(honest(remote.address)):
            remote.connect()
            assert repr(remote).endswith("worker=2)")
            assert model(ids).logits.argmax(-1)[0, -1] == tiny_model(layers=4).cpu()(ids).logits.argmax(-1)[0, -1]
            remote.close()


def test_its_words_are_escaped(secure, prompt) -> None:
    """What a worker says of its failure cannot write a line of a log, nor to a terminal."""
    words = "\x1b[2J\x1b]0;mine\x07\nINFO root: all is well\u202e\ud800" + "x" * 1000
    said = lose(secure, prompt, lambda channel, number, _: raw(channel, header_of(number, error=words)))
    assert "it failed: \\x1b[2J" in said
    assert len(said) < 300


def test_a_second_reply_is_nobodys(secure, prompt) -> None:
    """A reply that comes twice is not the next request's."""
    said = lose(secure, prompt, lambda channel, number, reply: raw(channel, 2 * sent(number, reply)))
    assert "expected message" in said


@pytest.mark.parametrize("kept", [0, 5, 40, -1])
def test_it_stops_in_the_middle(secure, prompt, kept: int) -> None:
    """It closes the connection before, in or behind the header, or short of the last byte."""

    def stop(channel: Channel, number: int, reply: Reply) -> None:
        raw(channel, sent(number, reply)[:kept])
        channel.end()

    assert "is lost: it closed the connection" in lose(secure, prompt, stop)


@pytest.mark.parametrize("kept", [0, 5, 40, -1])
def test_it_falls_silent(prompt, kept: int) -> None:
    """It stays, and does not say the rest."""
    secure = split_model(0.4)
    assert "it was late" in lose(secure, prompt, lambda channel, n, reply: raw(channel, sent(n, reply)[:kept]))
    secure[1].close()


@pytest.mark.parametrize("size", [1, 200])
def test_a_drip_is_late(prompt, size: int) -> None:
    """A reply that comes drop by drop has the time of one reply, not of each drop."""
    secure = split_model(0.5)

    def drip(channel: Channel, number: int, reply: Reply) -> None:
        data = sent(number, reply)
        for at in range(0, len(data), size):
            raw(channel, data[at : at + size])
            time.sleep(0.05)

    assert "it was late" in lose(secure, prompt, drip, seconds=3.0)
    secure[1].close()


@pytest.mark.parametrize("lie", [name for name in LIES if "GiB" in name or "lengths" in name or "huge" in name])
def test_nothing_is_allocated_for_a_claim(lie: str) -> None:
    """A buffer is at most a header's or an expected tensor's, whatever a message says of its size."""
    reply = {"attention": torch.zeros(1, 6, 4, 16)}
    channel = Bytes(LIES[lie](1, reply) + bytes(2**20))
    with pytest.raises(MessageError):
        read_reply(channel.fill, 1, {"attention": (1, 6, 4, 16)})
    assert channel.largest <= MAX_HEADER_BYTES


WORDS = (b"null", b"-1", b"1e400", b"NaN", b"{}", b"[[", b'"\\ud800"', b"99999999999999999999", b"true", b"1.0")


def mutated(draw: random.Random, data: bytes) -> bytes:
    """A real message with some bits, bytes, pieces or words of its header exchanged."""
    data = bytearray(data)
    head = struct.unpack_from(">I", data)[0]
    for _ in range(draw.choice((1, 1, 2, 8))):
        at = draw.randrange(len(data)) if draw.random() < 0.3 else draw.randrange(12 + head)
        kind = draw.randrange(6)
        if kind == 0:
            data[at % len(data)] ^= 1 << draw.randrange(8)
        elif kind == 1:
            data[at : at + draw.randrange(9)] = draw.randbytes(draw.randrange(9))
        elif kind == 2:
            del data[at : at + draw.randrange(1, 40)]
        elif kind == 3:
            words = (
                b"null",
                b"-1",
                b"1e400",
                b"NaN",
                b"{}",
                b"[[",
                b'"\\ud800"',
                b"99999999999999999999",
                b"true",
                b"1.0",
            )
            data[at:at] = draw.choice(words)
        elif kind == 4:
            data[at : at + 30] = data[draw.randrange(12 + head) :][:30]
        else:
            data[: draw.randrange(1, 12)] = draw.randbytes(draw.randrange(12))
        if len(data) < 14:
            break
    return bytes(data)


def repaired(data: bytes) -> bytes:
    """The same with lengths that are right for what lies behind them, so that the header's own faults are reached."""
    body = data.find(b"}}", 12) + 2
    return struct.pack(">IQ", max(body - 12, 0), max(len(data) - body, 0)) + data[12:]


def test_a_thousand_random_replies() -> None:
    """Changed at random, a reply is refused as `PartyLostError`, or is one of the right names, shapes and finite
    numbers: no other error comes up, and nothing larger is allocated."""
    draw = random.Random(14)  # noqa: S311
    scores = {"scores": torch.randn(1, 6, 2, 9), "value": torch.randn(1, 2, 2, 16).bfloat16()}
    top = {"top_logits": torch.randn(1, 3, 4), "top_tokens": torch.randint(0, 211, (1, 3, 4))}
    request = Request("score", "one", "generation", 3, 1, 4, 7, {})
    refused = taken = 0
    for count in range(1000):
        reply = (scores, top)[count % 2]
        shapes = {name: tuple(x.shape) for name, x in reply.items()}
        data = mutated(draw, sent(1, reply))
        channel = Bytes(repaired(data) if count % 3 else data)
        worker = Worker(channel, 1)
        exchange = worker.begin(request, shapes, 1.0)
        try:
            got = worker.finish(exchange, 1.0)
        except PartyLostError as error:
            refused += is_one_line(str(error))
            continue
        finally:
            assert channel.largest <= MAX_HEADER_BYTES
        assert {name: tuple(x.shape) for name, x in got.items()} == shapes
        assert all(bool(x.isfinite().all()) for x in got.values())
        taken += 1
    assert refused + taken == 1000, "no error but this one, of one line each"
    assert min(refused, taken) > 50, "some changes are of numbers alone"


def test_a_thousand_random_requests() -> None:
    """A worker refuses what is changed at random as `MessageError`, or reads a request of known names and kinds."""
    draw = random.Random(41)  # noqa: S311
    tensors = {"hidden": torch.randn(1, 2, 96), "positions": torch.arange(2)[None]}
    whole = b"".join(write_request(1, Request("pass_on", "one", "generation", 3, 1, 4, 7, tensors)))
    refused = 0
    for count in range(1000):
        data = mutated(draw, whole)
        channel = Bytes(repaired(data) if count % 3 else data)
        try:
            request = read_request(channel.fill, 1)
        except (MessageError, ChannelClosedError):
            refused += 1
            continue
        assert set(request.tensors) <= {x for sent, _ in MESSAGES.values() for x in sent}
        assert all(type(x) is int for x in (request.block, request.step, request.past, request.key_rows))
    assert 500 < refused < 1000
