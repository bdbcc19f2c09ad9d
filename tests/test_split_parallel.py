"""An untrusted party of three ranks: tokens and messages as of one, shares of heads, and ranks that are lost."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from forked import Worker
from tiny import tiny_model
from torch import Tensor
from torch.distributed import TCPStore
from transformers import PreTrainedModel

from scx import SCXKeyGenerator, encode_llama, record_transcript, restore_conversation
from scx.models.llama import model_shape
from scx.party import PartyLostError
from scx.party.boundary import MESSAGES, Crossing, Request
from scx.party.plan import CROSSINGS
from scx.party.process import RemoteParty
from scx.party.ranks import HEADS, join_heads, share_heads
from scx.party.secure import split_plan
from scx.party.untrusted import UntrustedParty
from scx.party.worker import main

RANKS, PROMPT, NEW = 3, 9, 10
ON_GPUS = torch.accelerator.current_accelerator(check_available=True) is not None
DEVICE = "cuda" if ON_GPUS else "cpu"
needs_ranks = pytest.mark.skipif(
    ON_GPUS and torch.cuda.device_count() < RANKS, reason="waits for three GPUs, or for a machine that has none"
)


def parallel_model(**options) -> PreTrainedModel:
    """As many heads as SmolLM2 has, and a feed-forward that three ranks cannot share evenly."""
    return tiny_model(**{"heads": 9, "kv_heads": 3, "layers": 4, **options}).cpu()


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    parallel_model().save_pretrained(path)
    return path


@pytest.fixture
def start(saved, tmp_path) -> Iterator[Callable[..., Worker | subprocess.Popen]]:
    """Start a worker of a party, a process of its own or torchrun's; what still runs at the end of the test is
    ended."""
    started: list[Worker | subprocess.Popen] = []

    def start_process(
        remote: RemoteParty, *launcher: str, fails: bool = False, **environment: str
    ) -> Worker | subprocess.Popen:
        credentials = tmp_path / f"worker {len(started)}.pem"
        remote.save_worker_credentials(credentials)
        told = ["--connect", remote.address, "--credentials", str(credentials)]
        arguments = [*told, "--model", str(saved), "--device", DEVICE]
        if launcher:
            command = [sys.executable, *launcher, *arguments]
            started.append(subprocess.Popen(command, cwd=Path(__file__).parents[1]))
        else:
            started.append(Worker(arguments, environment, fails=fails))
        return started[-1]

    yield start_process
    for process in started:
        process.kill()
        process.wait()


TORCHRUN = (
    "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS), "-m", "scx.party.worker",
)  # fmt: skip


def split_over_processes(crossings: str, prefill_top_k: int | None = None) -> tuple[PreTrainedModel, RemoteParty]:
    model = parallel_model()
    generator = SCXKeyGenerator.for_model(model, redundant_num=3, alp=True)
    plan, shape = split_plan(generator, model_shape(model), crossings, False, prefill_top_k), model_shape(model)
    remote = RemoteParty(plan, shape.fingerprint, timeout=120)
    encode_llama(model, generator, "cpu", untrusted=remote, crossings=crossings, prefill_top_k=prefill_top_k)
    return model, remote


def split_in_process(crossings: str, prefill_top_k: int | None = None, **options) -> PreTrainedModel:
    model = parallel_model(**options)
    generator = SCXKeyGenerator.for_model(model, redundant_num=3, alp=True)
    return encode_llama(model, generator, "cpu", crossings=crossings, prefill_top_k=prefill_top_k)


def kinds(crossings: list[Crossing]) -> list[tuple]:
    return [(x.direction, x.stage, x.block, x.operation, x.name, x.shape, x.dtype) for x in crossings]


def start_ranks(start, remote: RemoteParty, last_fails: bool = False) -> tuple[TCPStore, list[Worker]]:
    """Ranks without torchrun, which would end the others when one is lost."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    ranks = [
        start(
            remote,
            fails=last_fails and rank == RANKS - 1,
            **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), **common},
        )
        for rank in range(RANKS)
    ]
    return store, ranks


def check_parity(model: PreTrainedModel, crossings: str, ids: Tensor, prefill_top_k: int | None = None) -> None:
    """Plain tokens for a padded batch; and what crosses is what crosses to one process, tensor by tensor."""
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    asked = {"attention_mask": mask, "max_new_tokens": NEW, "do_sample": False}
    alone = split_in_process(crossings, prefill_top_k)
    with record_transcript(alone) as expected:
        alone.generate(ids, **asked)
    with record_transcript(model) as seen:
        made = model.generate(ids, **asked)
    assert torch.equal(made, parallel_model().generate(ids, **asked))
    assert kinds(seen.crossings) == kinds(expected.crossings)
    assert seen.requests == expected.requests


@pytest.mark.slow
@needs_ranks
@torch.no_grad()
def test_ranks_of_torchrun(start, prompt) -> None:
    """Three ranks are to the secure side as one process is, the head of prefills included, and end when that does."""
    model, remote = split_over_processes("few", prefill_top_k=5)
    torchrun = start(remote, *TORCHRUN)
    remote.connect()
    check_parity(model, "few", prompt(PROMPT, batch=2).cpu(), prefill_top_k=5)
    remote.close()
    assert torchrun.wait(timeout=60) == 0


@pytest.mark.slow
@needs_ranks
@torch.no_grad()
def test_killed_rank_costs_no_token(start, prompt) -> None:
    """A rank that is not rank 0 is killed in the middle of a generation: the secure side hears of it in time, the other
    ranks end, and the next worker takes the conversation up."""
    model, remote = split_over_processes("paper")
    _store, ranks = start_ranks(start, remote)
    remote.connect()
    start(remote)
    check_parity(model, "paper", prompt(PROMPT, batch=2).cpu())
    ids = prompt(PROMPT).cpu()
    plain = parallel_model().generate(ids, max_new_tokens=NEW, do_sample=False)[0, PROMPT:].tolist()
    out, tokens, losses = model(ids), [], 0
    cache = out.past_key_values
    while len(tokens) < NEW:
        if len(tokens) == 4:
            ranks[-1].kill()
        token = out.logits[:, -1:].argmax(dim=-1)
        begun = time.monotonic()
        try:
            out = model(token, past_key_values=cache)
        except PartyLostError as error:
            assert "worker 1" in str(error)  # noqa: PT017
            assert timedelta(seconds=time.monotonic() - begun) < remote.timeout
            assert cache.get_seq_length() == PROMPT + 4
            losses += 1
            remote.connect()
            restore_conversation(model, cache)
            continue
        tokens.append(token.item())
    assert losses == 1
    assert tokens == plain
    assert all(process.wait(timeout=60) != 0 for process in ranks)


@pytest.mark.slow
@needs_ranks
@torch.no_grad()
def test_rank_that_fails_alone(start, prompt) -> None:
    """A request that fails on one rank is answered by an error, and no rank waits for another in the next one."""
    model, remote = split_over_processes("few")
    _store, ranks = start_ranks(start, remote, last_fails=True)
    remote.connect()
    begun = time.monotonic()
    with pytest.raises(PartyLostError, match="project_qkv, block 0: worker 1"):
        model.generate(prompt(PROMPT).cpu(), max_new_tokens=NEW, do_sample=False)
    assert timedelta(seconds=time.monotonic() - begun) < remote.timeout
    assert all(process.wait(timeout=60) == 1 for process in ranks)


@pytest.mark.parametrize("size", [2, 4, 9])
def test_ranks_must_divide_heads(saved, monkeypatch, capsys, size: int) -> None:
    """Nine query and three key/value heads: other numbers than one and three are refused before anything is loaded."""
    monkeypatch.setenv("WORLD_SIZE", str(size))
    with pytest.raises(SystemExit):
        main(["--connect", "127.0.0.1:1", "--credentials", "none.pem", "--model", str(saved)])
    expected = f"{size} ranks do not divide 9 query and 3 key/value heads; expected one of 1, 3"
    assert expected in capsys.readouterr().err


def test_device_of_ranks(saved, monkeypatch, capsys) -> None:
    """transformers chooses the kind of device for several ranks: another is refused by name."""
    monkeypatch.setenv("WORLD_SIZE", str(RANKS))
    with pytest.raises(SystemExit):
        main(["--connect", "127.0.0.1:1", "--credentials", "none.pem", "--model", str(saved), "--device", "meta"])
    assert f"--device: transformers puts 3 ranks onto '{DEVICE}' here, expected that, got 'meta'" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("crossings", CROSSINGS)
@torch.no_grad()
def test_every_tensor_with_heads_is_shared(prompt, crossings: str) -> None:
    """Of two models that differ in their heads alone, tensors that cross differ along the dimension that `HEADS` names,
    and no other tensor does. So none goes to every rank whole that should not, or comes back from one rank alone."""
    seen = []
    for options in ({"heads": 3, "kv_heads": 1}, {"heads": 9, "kv_heads": 3}):
        model = split_in_process(crossings, hidden_size=144, **options)
        with record_transcript(model) as transcript:
            model.generate(prompt(PROMPT).cpu(), max_new_tokens=3, do_sample=False, num_beams=2)
            model.model._scx.party.calibrate(torch.randn(1, 4, 144))
        seen.append(transcript.crossings)
    few, many = seen
    assert [x.name for x in few] == [x.name for x in many]
    for x, y in zip(few, many, strict=True):
        differs = [dim for dim, (a, b) in enumerate(zip(x.shape, y.shape, strict=True)) if a != b]
        assert differs == ([HEADS[x.name]] if x.name in HEADS else []), f"{x.operation}: {x.name}"
        assert x.name not in HEADS or y.shape[HEADS[x.name]] == 3 * x.shape[HEADS[x.name]]
    assert HEADS.keys() <= {name for sent, returned in MESSAGES.values() for name in (*sent, *returned)}


def share_model(model: PreTrainedModel, rank: int) -> PreTrainedModel:
    """A model with the attention of one rank: the rows of q, k and v, and the columns of the output projection."""
    own = parallel_model(heads=3, kv_heads=1, hidden_size=model.config.hidden_size)
    weights = model.state_dict()
    for name, weight in weights.items():
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            weights[name] = weight.chunk(RANKS)[rank]
        elif name.endswith("o_proj.weight"):
            weights[name] = weight.chunk(RANKS, dim=1)[rank]
    own.load_state_dict(weights)
    return own


@torch.no_grad()
def test_shares_join_to_the_whole() -> None:
    """Products, unlocked keys, scores and attention of three parties with a third of the heads each are those of one
    with all; each holds its own heads alone, and output projections sum up."""
    model = parallel_model()
    generator = SCXKeyGenerator.for_model(model, redundant_num=3, alp=True)
    plan = split_plan(generator, model_shape(model), "few", False)
    whole = UntrustedParty(model.model.layers, model.model.rotary_emb, plan)
    shares = [share_model(model, rank).model for rank in range(RANKS)]
    parties = [UntrustedParty(share.layers, share.rotary_emb, plan) for share in shares]

    def ask(operation: str, block: int, step: int = 0, **tensors: Tensor) -> tuple[dict, list[dict]]:
        own = [
            {name: share_heads(name, x, RANKS)[rank] if name in HEADS else x for name, x in tensors.items()}
            for rank in range(RANKS)
        ]
        replies = [
            party.receive(Request(operation, "one", "prefill", block, step, PROMPT, PROMPT, sent))
            for party, sent in zip([whole, *parties], [tensors, *own], strict=True)
        ]
        return dict(replies[0]), [dict(reply) for reply in replies[1:]]

    def check(expected: dict, got: list[dict]) -> None:
        for name, x in expected.items():
            torch.testing.assert_close(join_heads(name, [reply[name] for reply in got]), x)

    hidden, size = model.config.hidden_size, model.config.head_dim
    ask("open", -1)
    for block in plan.middle_blocks:
        check(*ask("project_qkv", block, attention_input=torch.randn(1, PROMPT + 3, hidden)))
    q, k, v = (torch.randn(1, heads, PROMPT, size) for heads in (9, 3, 3))
    check(*ask("attend", 0, query=q, key=k, value=v))
    expected, got = ask("project_output", 0, attention_rows=torch.randn(1, PROMPT, 9 * size))
    torch.testing.assert_close(sum(reply["output"] for reply in got), expected["output"])
    order = torch.rand(2, 1, PROMPT + 3).argsort(-1)[:, :, :PROMPT]
    ask("unlock", -1, token_position=order, positions=torch.arange(PROMPT)[None])
    ask("encoded_keys", 3, encoded_keys=torch.randn(1, 3, PROMPT, size))
    new = torch.randn(1, 2, hidden)
    check(*ask("score", 3, step=1, hidden=new, positions=torch.arange(PROMPT, PROMPT + 2)[None]))
    for block in plan.middle_blocks:
        keys = [party._held["one"].unlocked[block].keys for party in parties]
        torch.testing.assert_close(torch.cat(keys, dim=1), whole._held["one"].unlocked[block].keys)
    assert [party._held["one"].keys[3].shape[1] for party in (whole, *parties)] == [3, 1, 1, 1]


@pytest.mark.parametrize("name", sorted(HEADS))
def test_share_and_join(name: str) -> None:
    """`join_heads` undoes `share_heads`, whose shares can be sent as they lie."""
    x = torch.randn(2, 9, 18, 5)
    shares = share_heads(name, x, RANKS)
    assert all(share.is_contiguous() for share in shares)
    assert torch.equal(join_heads(name, shares), x)
