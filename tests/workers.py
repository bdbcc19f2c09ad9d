"""Workers in threads of the test's own process, honest and not, over the real channel."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from threading import Thread
from time import monotonic

from tiny import tiny_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from scx import SCXKeyGenerator, encode_llama
from scx.models.llama import model_shape
from scx.party.boundary import Request
from scx.party.channel import PATIENCE, Channel, ChannelClosedError, ChannelError, dial
from scx.party.credentials import Credentials
from scx.party.messages import Fill, read_agreement, read_request, write_reply
from scx.party.process import RemoteParty, serve
from scx.party.secure import split_plan
from scx.party.untrusted import UntrustedParty

SECONDS = 20.0
SECURE, WORKER = Credentials.generate()
"""A pair for all tests that need no other one."""

Answer = Callable[[Channel, int, Request, dict[str, Tensor]], None]
"""Answers the request of that number, for which an honest worker has that reply."""


def split_model(timeout: float = SECONDS, **options) -> tuple[PreTrainedModel, RemoteParty]:
    """A model whose blocks are a worker's, and the way to that."""
    model = tiny_model(layers=4).cpu()
    generator = SCXKeyGenerator.for_model(model, redundant_num=3, alp=True)
    shape = model_shape(model)
    plan = split_plan(generator, shape, "few", False, options.get("prefill_top_k"))
    remote = RemoteParty(plan, shape.fingerprint, timeout=timeout, credentials=SECURE)
    return encode_llama(model, generator, "cpu", untrusted=remote, **options), remote


def parts_of(model: PreTrainedModel) -> tuple[nn.Module, nn.Module, nn.Module]:
    """The blocks, the rotary embedding, and norm and head, as a worker has them."""
    decoder = model.eval().base_model
    return decoder.layers, decoder.rotary_emb, nn.Sequential(decoder.norm, model.get_output_embeddings())


@contextmanager
def running(work: Callable[[], None]) -> Iterator[Future[None]]:
    """Do this in a thread, which must have ended, and without an error, soon after the block has."""
    done: Future[None] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    Thread(target=run, daemon=True).start()
    yield done
    done.result(SECONDS)


def honest(address: str, credentials: Credentials = WORKER, model: PreTrainedModel | None = None) -> Callable[[], None]:
    """The work of a worker, which ends quietly when its connection breaks."""
    model = tiny_model(layers=4).cpu() if model is None else model
    fingerprint, parts = model_shape(model).fingerprint, parts_of(model)

    def work() -> None:
        with suppress(ChannelError):
            serve(address, credentials, *parts, fingerprint, SECONDS)

    return work


def acting(address: str, answer: Answer) -> Callable[[], None]:
    """The work of a worker whose replies are sent, or not, by `answer`."""
    model = tiny_model(layers=4).cpu()

    def work() -> None:
        channel = dial(address, WORKER, monotonic() + SECONDS)
        plan, _ = read_agreement(channel.source(monotonic() + SECONDS))
        party = UntrustedParty(*parts_of(model)[:2], plan, parts_of(model)[2])
        channel.send(write_reply(0, {}), monotonic() + SECONDS)
        number = 0
        with suppress(ChannelError):
            while True:
                number += 1
                request = read_request(channel.source(PATIENCE), number)
                answer(channel, number, request, dict(party.receive(request)))
        channel.end()

    return work


class Bytes:
    """A channel that brings these bytes and no more, and notes the largest buffer that was to be filled."""

    def __init__(self, data: bytes) -> None:
        self.data, self.largest = data, 0

    def source(self, deadline: float) -> Fill:
        return self.fill

    def fill(self, buffer: memoryview) -> None:
        self.largest = max(self.largest, len(buffer))
        if len(buffer) > len(self.data):
            raise ChannelClosedError("it closed the connection")
        buffer[:], self.data = self.data[: len(buffer)], self.data[len(buffer) :]

    def send(self, parts: list[memoryview], deadline: float) -> None: ...

    def end(self) -> None: ...
