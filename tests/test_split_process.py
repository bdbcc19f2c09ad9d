"""Two processes: the same tokens, clear errors when a worker dies or is late, and no token lost."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Barrier

import pytest
import torch
from tiny import tiny_model
from torch import Tensor
from transformers import PreTrainedModel
from workers import SECONDS, WORKER, acting, honest, running, split_model

from scx import SCXKeyGenerator, encode_llama, restore_conversation
from scx.models.llama import model_shape
from scx.party import PartyLostError
from scx.party.boundary import Request
from scx.party.channel import Channel, ChannelError
from scx.party.process import RemoteParty
from scx.party.replies import ReplyRule
from scx.party.secure import split_plan

PROMPT, NEW = 9, 12


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_model(layers=4).cpu().save_pretrained(path)
    return path


@pytest.fixture
def start(saved, tmp_path) -> Iterator[Callable[..., subprocess.Popen]]:
    """Start a worker for an address; what still runs at the end of the test is ended."""
    started: list[subprocess.Popen] = []
    WORKER.save(tmp_path / "worker.pem")

    def start_worker(address: str, *launcher: str) -> subprocess.Popen:
        module = [*launcher, "-m", "scx.party.worker"]
        told = ["--connect", address, "--credentials", str(tmp_path / "worker.pem"), "--model", str(saved)]
        started.append(subprocess.Popen([sys.executable, *module, *told], cwd=Path(__file__).parents[1]))
        return started[-1]

    yield start_worker
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.slow
@torch.no_grad()
def test_killed_worker_costs_no_token(start, prompt) -> None:
    """A worker is killed in the middle of a generation; the next one takes the conversation up from the last completed
    token, and the tokens are the plain model's. The worker has the head of prefills as well."""
    ids = prompt(PROMPT).cpu()
    plain = tiny_model(layers=4).cpu().generate(ids, max_new_tokens=NEW, do_sample=False)[0, PROMPT:].tolist()
    model, remote = split_model(120.0, prefill_top_k=4)
    first = start(remote.address)
    remote.connect()
    start(remote.address, "-m", "torch.distributed.run", "--nproc-per-node", "1")
    out, tokens, session_id = model(ids), [], None
    cache = out.past_key_values
    while len(tokens) < NEW:
        if len(tokens) == 5:
            first.kill()
            first.wait()
        token = out.logits[:, -1:].argmax(dim=-1)
        try:
            out = model(token, past_key_values=cache)
        except PartyLostError as error:
            assert "worker 1 is " in str(error)  # noqa: PT017
            assert cache.get_seq_length() == PROMPT + len(tokens)
            session_id = cache.session_id
            with pytest.raises(PartyLostError, match="worker 1.* is not connected"):
                restore_conversation(model, cache)
            assert cache.session_id == session_id
            remote.connect()
            restore_conversation(model, cache)
            continue
        tokens.append(token.item())
    assert tokens == plain
    assert session_id is not None
    assert session_id != cache.session_id, "a conversation taken up again has a session of its own"
    assert cache.get_seq_length() == PROMPT + NEW


def test_both_sides_have_one_plan() -> None:
    """Workers that are told another plan than the model is encoded with are refused before anything crosses."""
    model = tiny_model(layers=4).cpu()
    generator = SCXKeyGenerator.for_model(model)
    remote = RemoteParty(split_plan(generator, model_shape(model), "paper", False), model_shape(model).fingerprint)
    with pytest.raises(ValueError, match=r"untrusted: its workers are told Plan\(.*'paper'.*with Plan\(.*'few'"):
        encode_llama(model, generator, "cpu", untrusted=remote)


def test_nobody_joins() -> None:
    """Waiting for a worker ends in time, by name."""
    _, remote = split_model(timeout=0.5)
    begun = time.monotonic()
    with pytest.raises(PartyLostError, match=f"no worker joined {remote.address} within 0:00:00.5"):
        remote.connect()
    assert time.monotonic() - begun < 10


@torch.no_grad()
def test_late_answer(prompt) -> None:
    """A party that takes a request and does not answer is given up in time."""
    model, remote = split_model(0.5)
    with running(acting(remote.address, lambda *_: None)):
        remote.connect()
        begun = time.monotonic()
        with pytest.raises(PartyLostError, match="open, block -1: worker 1 is lost: it was late"):
            model(prompt(4).cpu())
        assert time.monotonic() - begun < 10
        remote.close()


@torch.no_grad()
def test_threads_share_a_worker(prompt) -> None:
    """Conversations in eight threads at once are the plain model's, each of them, and all of them go on with the next
    worker when theirs is lost: none turns the others' worker away."""
    prompts = [prompt(PROMPT + n).cpu() for n in range(8)]
    plain = tiny_model(layers=4).cpu()
    expected = [plain.generate(ids, max_new_tokens=NEW, do_sample=False)[0, ids.shape[1] :].tolist() for ids in prompts]
    model, remote = split_model()
    half = Barrier(len(prompts) + 1, timeout=SECONDS)

    def converse(ids: Tensor) -> tuple[list[int], int]:
        out, tokens, losses = model(ids), [], 0
        cache = out.past_key_values
        while len(tokens) < NEW:
            if len(tokens) == NEW // 2 and not losses:
                half.wait()  # all are here
                half.wait()  # the worker is gone
            token = out.logits[:, -1:].argmax(dim=-1)
            try:
                out = model(token, past_key_values=cache)
            except PartyLostError:
                losses += 1
                remote.connect()
                restore_conversation(model, cache)
                continue
            tokens.append(token.item())
        return tokens, losses

    with running(honest(remote.address)), running(honest(remote.address)), ThreadPoolExecutor(len(prompts)) as threads:
        remote.connect()
        made = [threads.submit(torch.no_grad()(converse), ids) for ids in prompts]
        half.wait()
        remote._worker.end()
        half.wait()
        assert [x.result(SECONDS) for x in made] == [(tokens, 1) for tokens in expected]
        assert repr(remote).endswith("worker=2)")
        remote.close()


@torch.no_grad()
def test_threads_in_one_process(prompt) -> None:
    """Conversations in threads at once are the plain model's where both parties are here, too."""
    prompts, plain = [prompt(PROMPT + n).cpu() for n in range(6)], tiny_model(layers=4).cpu()
    model = tiny_model(layers=4).cpu()
    encode_llama(model, SCXKeyGenerator.for_model(model, redundant_num=3, alp=True), "cpu")

    def answer(llama: PreTrainedModel, ids: Tensor) -> list[int]:
        return llama.generate(ids, max_new_tokens=NEW, do_sample=False)[0].tolist()

    with ThreadPoolExecutor(len(prompts)) as threads:
        assert list(threads.map(partial(answer, model), prompts)) == [answer(plain, ids) for ids in prompts]


@torch.no_grad()
def test_a_fork_leaves_the_connection_alone(prompt, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has a copy of the cipher's state: it sends nothing, and its end ends nothing of its parent's."""
    model, remote = split_model()
    ids = prompt(PROMPT).cpu()
    expected = tiny_model(layers=4).cpu().generate(ids, max_new_tokens=NEW, do_sample=False)
    with running(honest(remote.address)):
        remote.connect()
        out = model(ids[:, :-1])
        with monkeypatch.context() as forked:
            # Of the child there is this thread alone; the worker's, which is in this process too, stays the parent's.
            here, number = threading.get_ident(), os.getpid()
            forked.setattr("os.getpid", lambda: -1 if threading.get_ident() == here else number)
            for work in (lambda: model(ids), lambda: model(ids[:, -1:], past_key_values=out.past_key_values)):
                with pytest.raises(PartyLostError, match="belongs to the process that this one was forked from"):
                    work()
            with pytest.raises(PartyLostError, match="connect: the connection"):
                remote.connect()
        answer = model.generate(ids, past_key_values=out.past_key_values, max_new_tokens=NEW, do_sample=False)
        assert torch.equal(answer, expected)
        remote.close()


def test_a_channel_of_another_process_sends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = Channel(socket.create_connection(server.getsockname()), WORKER)
        far, _ = server.accept()
        monkeypatch.setattr("os.getpid", lambda: -1)
        with pytest.raises(ChannelError, match="forked"):
            near.send([memoryview(b"anything")], time.monotonic() + SECONDS)
        far.setblocking(False)
        with pytest.raises(BlockingIOError):
            far.recv(1)


def replied(**tensors: Tensor) -> dict[str, Tensor]:
    return tensors


@pytest.mark.parametrize(
    "reply",
    [
        replied(),
        replied(attention=torch.zeros(1, 6, 4, 15)),
        replied(attention=torch.zeros(1, 6, 4, 16, dtype=torch.int64)),
        replied(attention=torch.zeros(1, 6, 4, 16), output=torch.zeros(1)),
    ],
)
def test_wrong_replies_are_refused(reply: dict[str, Tensor]) -> None:
    """A reply that lacks a tensor, has another shape or other numbers, or more than was asked for."""
    model = tiny_model(layers=4)
    plan = split_plan(SCXKeyGenerator.for_model(model), model_shape(model), "few", False)
    rule = ReplyRule(plan, model_shape(model))
    sent = {"query": torch.zeros(1, 6, 4, 16), "key": torch.zeros(1, 2, 4, 16), "value": torch.zeros(1, 2, 4, 16)}
    request = Request("attend", "", "prefill", 1, 0, 0, 0, sent)
    rule.check(request, {"attention": torch.zeros(1, 6, 4, 16)})
    with pytest.raises(PartyLostError, match="attend, block 1: expected"):
        rule.check(request, reply)
