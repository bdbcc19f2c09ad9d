"""What the channel between two processes costs: a split prefill over TLS beside the same over TCP that nobody protects.

Both workers are processes of this machine with a thread each, as the secure side has, and take turns.
"""

import copy
import multiprocessing
import ssl
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bench.host import one_thread
from bench.model import load
from bench.rounds import Job
from bench.timing import Turns
from scx import SCXKeyGenerator, encode_llama, record_transcript
from scx.models.llama import model_shape
from scx.party.credentials import Credentials
from scx.party.process import RemoteParty, serve
from scx.party.secure import split_plan

MODEL, TOKENS, DTYPE = "SmolLM2", 256, "float32"
CPU = torch.device("cpu")
PLAIN, ENCRYPTED = "TCP", "TLS 1.3"
MARK = 1.10
"""The most of plain TCP's time that a prefill may take."""
SETTLING, FEW_ROUNDS, MOST_ROUNDS = 1, 3, 24


class Plain:
    """In place of TLS between a channel's two buffers: nothing."""

    def __init__(self, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO) -> None:
        self._incoming = incoming
        self.write = outgoing.write
        self.pending = lambda: 0

    def do_handshake(self) -> None:
        """There is none."""

    def getpeercert(self, binary_form: bool) -> None:
        """There is none."""

    def read(self, size: int, buffer: memoryview) -> int:
        data = self._incoming.read(size)
        if not data:
            raise ssl.SSLWantReadError
        buffer[: len(data)] = data
        return len(data)


class Unprotected:
    """In place of both halves of a pair of `Credentials`."""

    open = Plain

    def check(self, role: str) -> None:
        """They are alike."""

    def expects(self, certificate: bytes | None) -> bool:
        return True


def work(address: str, credentials: Path | None) -> None:
    """Be a worker, of TCP as it is without credentials."""
    torch.set_num_threads(1)
    model, _ = load(MODEL, DTYPE, CPU)
    own = Unprotected() if credentials is None else Credentials.load(credentials)
    decoder = model.base_model
    parts = decoder.layers, decoder.rotary_emb, nn.Sequential(decoder.norm, model.get_output_embeddings())
    serve(address, own, *parts, model_shape(model).fingerprint)


@contextmanager
def connected(base: PreTrainedModel, is_encrypted: bool) -> Iterator[PreTrainedModel]:
    """The model as the secure side of a worker that lives as long as the block."""
    keys, shape = SCXKeyGenerator.for_model(base), model_shape(base)
    model = copy.deepcopy(base, {id(x): x for x in base.parameters()})
    given = {} if is_encrypted else {"credentials": Unprotected()}
    remote = RemoteParty(split_plan(keys, shape, "few", False), shape.fingerprint, **given)
    with TemporaryDirectory() as private, closing(remote):
        credentials = None
        if is_encrypted:
            credentials = Path(private, "worker.pem")
            remote.save_worker_credentials(credentials)
        worker = multiprocessing.get_context("spawn").Process(target=work, args=(remote.address, credentials))
        worker.start()
        encode_llama(model, keys, "cpu", untrusted=remote)
        remote.connect()
        yield model
        remote.close()
        worker.join()


def milliseconds(model: PreTrainedModel, ids: Tensor) -> float:
    start = time.perf_counter()
    model(ids, logits_to_keep=1)
    return 1e3 * (time.perf_counter() - start)


@torch.no_grad()
def rounds() -> Iterator[dict[str, Any]]:
    """The entry after every round."""
    base, weights = load(MODEL, DTYPE, CPU)
    ids = torch.randint(3, base.config.vocab_size, (1, TOKENS), generator=torch.Generator().manual_seed(TOKENS))
    with one_thread(), ExitStack() as stack:
        models = {name: stack.enter_context(connected(base, name == ENCRYPTED)) for name in (PLAIN, ENCRYPTED)}
        with record_transcript(models[ENCRYPTED]) as seen:
            models[ENCRYPTED](ids)
        taken = Turns({name: partial(milliseconds, model, ids) for name, model in models.items()}, PLAIN)
        taken.take(SETTLING, counts=False)
        about = {"model": MODEL, "weights": weights, "dtype": DTYPE, "tokens": TOKENS, "mark": MARK}
        about |= {"boundary_bytes": seen.nbytes(), "round_trips": sum(seen.requests.values())}
        for _ in range(MOST_ROUNDS):
            taken.take()
            contestants = [
                {"name": name, "kind": "rival" if name == PLAIN else "scx", **taken.figures(name)} for name in models
            ]
            yield {"suite": "channel", **about, "contestants": contestants}


def jobs(device: torch.device, everything: bool) -> Iterator[Job]:
    """One prefill; on a machine whose CPU computes."""
    if device.type == "cpu":
        yield Job(f"channel/{MODEL}/prefill={TOKENS}", rounds, few=FEW_ROUNDS, seconds=30.0)
