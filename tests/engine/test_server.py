"""A server with sealed off-loading: two tenants and a stranger, what they find, what is stored; then it is killed while
it stores, what it stored is altered, and a second one goes on with it; a program with another key finds none of it."""

import json
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import openai
import pytest
from engine import alterations
from engine.bytes_seen import assert_noise, chi_square_excess, payloads, written_rows
from engine.callers import NAME, Answer, Caller, Store, ask_at_once
from engine.engines import BLOCK, FEW_BLOCKS, answers, changed_environment, counted, engine, fs_tier, transfer
from engine.ledgers import LONG, QUESTION, SHORT, TALKS, TWENTY, Ledger, answer_length
from engine.plain import Plain
from transformers import PreTrainedTokenizerBase

from scx.commands.vllm_server import VLLMServer, serving
from scx.vllm.registry import REGISTRY_VARIABLE, edited
from scx.vllm.tenants import Keyring

SERVER = ("--dtype", "float32", "--max-model-len", "512", "--enforce-eager", "--max-num-seqs", "8")
SERVER += ("--block-size", str(BLOCK), "--num-gpu-blocks-override", str(FEW_BLOCKS), "--served-model-name", NAME)
SERVER += ("--enable-prompt-tokens-details", "--middleware", "scx.vllm.middleware.TenantMiddleware")
TO_ALTER = SHORT[: len(alterations.ALTERATIONS)]
OF_BOTH, ON_THE_DEVICE = SHORT[-2], SHORT[-1]
REFUSED_IN_LOG = "did not authenticate"


@dataclass
class World:
    """What outlives a server: its tenants' registry and API keys, its store."""

    store: Store
    environment: dict[str, str]
    keys: dict[str, str]
    prompts: dict[Ledger, list[int]]
    model: Path

    def caller(self, server: VLLMServer, name: str) -> Caller:
        return Caller(server, self.keys[name])


@dataclass
class First:
    """The first server's life."""

    twenty: list[Answer]
    again: list[Answer]
    second: list[Answer]
    eve: list[Answer]
    forged: Answer
    device: tuple[Answer, Answer, Answer]
    unknown: str
    metrics: dict[str, float]
    rows: np.ndarray
    files: list[tuple[Path, int]]
    payloads: np.ndarray
    altered: dict[str, list[Path]] = field(default_factory=dict)
    stored_when_killed: int = 0


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase, master_key: Path, model: Path
) -> World:
    folder = tmp_path_factory.mktemp("world")
    registry = folder / "tenants.json"
    with edited(registry) as tenants:
        keys = {name: tenants.add(name) for name in ("alice", "bob", "eve")}
    environment = {"SCX_MASTER_KEY_FILE": str(master_key), REGISTRY_VARIABLE: str(registry)}
    prompts = {ledger: ledger.prompt(tokenizer) for ledger in (*TWENTY, *SHORT, *LONG)}
    return World(Store(folder / "store"), environment, keys, prompts, model)


def run_server(world: World, log: Path, *options: str) -> AbstractContextManager[VLLMServer]:
    config = transfer(tenants="callers", secondary_tiers=fs_tier(world.store.root))
    return serving(world.model, [*SERVER, *options], log=log, transfer=config, environment=world.environment)


@pytest.fixture(scope="module")
def first(
    world: World, plain: Plain, tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory
) -> First:
    log = tmp_path_factory.mktemp("first") / "log"
    prompts, store = world.prompts, world.store
    with run_server(world, log, "--api-key", *world.keys.values()) as server:
        alice, bob, eve = (world.caller(server, name) for name in ("alice", "bob", "eve"))
        mixed = [((alice, bob)[n % 2], prompts[ledger], answer_length(ledger)) for n, ledger in enumerate(TWENTY)]
        turns = [ledger.second_turn(tokenizer, plain.tokens[ledger], QUESTION) for ledger in TALKS]
        with changed_environment(world.environment):
            keyring = Keyring.from_environment()
        salt = keyring.salt(keyring.named("alice"))
        lived = First(
            twenty=ask_at_once(mixed),
            again=ask_at_once(mixed),
            second=ask_at_once([((alice, bob)[n % 2], turn, answer_length(TWENTY[0])) for n, turn in enumerate(turns)]),
            eve=ask_at_once([(eve, prompts[ledger], answer_length(ledger)) for ledger in TWENTY[:4]]),
            forged=bob.ask(prompts[TWENTY[0]], 1, cache_salt=salt),
            device=tuple(one.ask(prompts[ON_THE_DEVICE], 4) for one in (alice, alice, eve)),
            unknown=_refusal(Caller(server, "sk-nobody")),
            metrics={},
            rows=np.empty(0),
            files=[],
            payloads=np.empty(0),
        )
        for kind, ledger in zip(alterations.ALTERATIONS, TO_ALTER, strict=True):
            lived.altered[kind] = _stored_by(store, alice, prompts[ledger])
        own, foreign = (_stored_by(store, one, prompts[OF_BOTH]) for one in (alice, bob))
        lived.altered["foreign"] = own
        (region,) = server.regions()
        lived.rows = written_rows(region)
        lived.files = [(file, file.stat().st_mode & 0o777) for file in sorted(store.files())]
        lived.payloads = payloads([file for file, _ in lived.files])
        lived.metrics = server.metrics()
        before = store.files()
        asking = [threading.Thread(target=_ask_in_vain, args=(alice, prompts[ledger])) for ledger in LONG]
        for thread in asking:
            thread.start()
        store.wait_for_any(6, before)
        server.kill()
        for thread in asking:
            thread.join()
        lived.stored_when_killed = len(store.files() - before)
    for kind, alter in alterations.ALTERATIONS.items():
        alter(lived.altered[kind], spare=lived.altered[alterations.OTHER[kind]])
    alterations.exchange(own, foreign)
    return lived


def _refusal(caller: Caller) -> str:
    with pytest.raises(openai.AuthenticationError) as refused:
        caller.ask([1, 2, 3], 1)
    return str(refused.value)


def _stored_by(store: Store, caller: Caller, prompt: list[int]) -> list[Path]:
    """The files of a prompt's full blocks."""
    before = store.files()
    caller.ask(prompt, 1)
    return sorted(store.wait_for(len(prompt) // BLOCK, before))


def _ask_in_vain(caller: Caller, prompt: list[int]) -> None:
    try:
        caller.ask(prompt, 8)
    except openai.APIConnectionError:
        return  # the server was killed, as was meant


def _tokens(answers: list[Answer]) -> list[list[int]]:
    return [answer.tokens for answer in answers]


def test_tokens_are_those_of_plain_vllm(first: First, plain: Plain) -> None:
    """Of twenty prompts of two tenants, eight at once, by OpenAI's client; again, when their blocks are loaded; and of
    their conversations' second turns."""
    expected = [plain.tokens[ledger] for ledger in TWENTY]
    assert _tokens(first.twenty) == expected
    assert _tokens(first.again) == expected
    assert _tokens(first.second) == [plain.second[ledger] for ledger in TALKS]


def test_a_tenant_finds_its_blocks(first: First, world: World) -> None:
    assert [answer.cached for answer in first.twenty] == [0] * len(TWENTY)
    full = [(len(world.prompts[ledger]) - 1) // BLOCK * BLOCK for ledger in TWENTY]
    assert [answer.cached for answer in first.again] == full


def test_no_other_tenant_finds_them(first: First, plain: Plain) -> None:
    """In host memory and in the store, where all of them are."""
    assert [answer.cached for answer in first.eve] == [0] * 4
    assert _tokens(first.eve) == [plain.tokens[ledger] for ledger in TWENTY[:4]]


def test_no_other_tenant_finds_them_on_the_device(first: First) -> None:
    """Where the last request left them: a second one of the same tenant finds all."""
    own, again, others = first.device
    assert own.tokens == again.tokens == others.tokens
    assert own.cached == 0
    assert again.cached == 3 * BLOCK
    assert others.cached == 0


def test_a_stolen_salt_is_of_no_use(first: First) -> None:
    assert first.forged.cached == 0


def test_an_unknown_caller_is_refused(first: First) -> None:
    assert "401" in first.unknown


def test_counters(first: First) -> None:
    metrics = first.metrics
    assert metrics["scx:kv_blocks_sealed_total"] >= len(first.files)
    assert metrics["scx:kv_blocks_opened_total"] >= 60
    assert metrics["scx:kv_sealed_bytes_total"] > 1e8
    assert metrics["scx:kv_seal_seconds_total"] > 0
    assert metrics.get("scx:kv_blocks_refused_total", 0) == 0
    labelled = [name for name in metrics if name.startswith("scx:") and "{" in name]
    assert labelled
    assert not [name for name in labelled for tenant in ("alice", "bob", "eve") if tenant in name]


def test_host_memory_and_files_hold_noise(first: First) -> None:
    assert len(first.rows) > 60
    assert_noise(first.rows[:32].ravel())
    assert_noise(first.payloads[::6].ravel())
    assert max(abs(chi_square_excess(payload)) for payload in first.payloads) < 6


def test_files_are_private_and_their_names_tell_nothing(first: First, world: World) -> None:
    """Nobody else may read them. The same prompts of two tenants have nothing in common."""
    assert {mode for _, mode in first.files} == {0o600}
    names = [file.stem for file, _ in first.files]
    assert len(set(names)) == len(names)
    for file in world.store.root.rglob("*.json"):
        told = json.dumps(json.loads(file.read_text()))
        assert not [name for name in ("alice", "bob", "eve") if name in told]


# The second server, in which nobody asks for another API key than the middleware does.


@dataclass
class Second:
    """The second server's life."""

    killed: list[Answer]
    altered: dict[str, tuple[Answer, Answer]]
    refused: dict[str, float]
    refused_again: float
    queries: float
    log: str
    rotated: Answer
    dropped: Answer
    forgotten: str
    added_again: Answer


@pytest.fixture(scope="module")
def second(world: World, first: First, tmp_path_factory: pytest.TempPathFactory) -> Second:
    log = tmp_path_factory.mktemp("second") / "log"
    registry = world.environment[REGISTRY_VARIABLE]
    prompts = world.prompts
    with run_server(world, log) as server:
        alice, bob = (world.caller(server, name) for name in ("alice", "bob"))

        def refused() -> float:
            return server.metrics().get("scx:kv_blocks_refused_total", 0.0)

        killed = ask_at_once([(alice, prompts[ledger], answer_length(ledger)) for ledger in LONG])
        altered, counts, again = {}, {}, 0.0
        for kind, ledger in zip((*alterations.ALTERATIONS, "foreign"), (*TO_ALTER, OF_BOTH), strict=True):
            before = refused()
            once = alice.ask(prompts[ledger], answer_length(ledger))
            counts[kind] = _settled(refused) - before
            before = refused()
            altered[kind] = once, alice.ask(prompts[ledger], answer_length(ledger))
            again += _settled(refused) - before
        queries = server.metrics()["vllm:kv_offload_tiering_chunk_queries_total"]
        with edited(registry) as tenants:
            tenants.rotate("alice")
        rotated = alice.ask(prompts[TWENTY[0]], answer_length(TWENTY[0]))
        with edited(registry) as tenants:
            tenants.drop("alice", 1)
        dropped = alice.ask(prompts[TWENTY[2]], answer_length(TWENTY[2]))
        with edited(registry) as tenants:
            tenants.forget("bob")
        forgotten = _refusal(bob)
        with edited(registry) as tenants:
            key = tenants.add("bob")
        added_again = Caller(server, key).ask(prompts[TWENTY[1]], answer_length(TWENTY[1]))
        text = log.read_text(errors="replace")
    return Second(killed, altered, counts, again, queries, text, rotated, dropped, forgotten, added_again)


def _settled(read: Callable[[], float]) -> float:
    """A counter, once two readings half a second apart agree: an engine tells its counters with a later step."""
    value = read()
    while True:
        time.sleep(0.5)
        if (now := read()) == value:
            return value
        value = now


def test_a_second_process_goes_on_where_one_was_killed(first: First, second: Second, plain: Plain) -> None:
    """What was whole in the store is found; what was not is computed; no token is another."""
    assert first.stored_when_killed >= 6
    assert _tokens(second.killed) == [plain.tokens[ledger] for ledger in LONG]
    assert sum(answer.cached for answer in second.killed) > 0


@pytest.mark.parametrize("kind", [*alterations.ALTERATIONS, "foreign"])
def test_an_altered_block_is_computed_anew(kind: str, second: Second, world: World, plain: Plain) -> None:
    """It is counted, the tokens are right, and the second time nothing is refused."""
    ledger = dict(zip((*alterations.ALTERATIONS, "foreign"), (*TO_ALTER, OF_BOTH), strict=True))[kind]
    once, again = second.altered[kind]
    assert once.tokens == again.tokens == plain.tokens[ledger]
    assert again.cached == 3 * BLOCK
    assert second.refused[kind] == alterations.REFUSED.get(kind, 3)
    if kind == "truncated":  # the tier itself refuses a file that is too short, before anything looks at its bytes
        assert once.cached < 3 * BLOCK


def test_what_was_refused_is_not_asked_for_again(second: Second) -> None:
    """Nor named twice in the log, nor looked for without end: there were few requests of few blocks."""
    assert second.refused_again == 0
    lines = [line for line in second.log.splitlines() if REFUSED_IN_LOG in line]
    assert len(lines) == len(set(line.partition("block ")[2] for line in lines))
    assert 0 < len(lines) <= sum(second.refused.values())
    assert second.queries < 5000


def test_after_a_rotation_the_old_key_reads(second: Second, plain: Plain) -> None:
    assert second.rotated.tokens == plain.tokens[TWENTY[0]]
    assert second.rotated.cached > 0


def test_a_dropped_version_reads_nothing(second: Second, plain: Plain) -> None:
    assert second.dropped.tokens == plain.tokens[TWENTY[2]]
    assert second.dropped.cached == 0


def test_a_forgotten_tenant_is_refused_and_its_blocks_are_useless(second: Second, plain: Plain) -> None:
    """Also to who takes its name afterwards."""
    assert "401" in second.forgotten
    assert second.added_again.tokens == plain.tokens[TWENTY[1]]
    assert second.added_again.cached == 0


# A program on the same store and registry, with another master key.


@dataclass
class Stranger:
    """What it found and answered."""

    answers: list[list[int]]
    cached: list[int]
    again: list[int]
    of_nobody: list[int]
    new_files: int
    counts: dict[str, float]


@pytest.fixture(scope="module")
def stranger(world: World, second: Second, other_master_key: Path) -> Stranger:
    environment = {**world.environment, "SCX_MASTER_KEY_FILE": str(other_master_key)}
    with changed_environment(environment):
        keyring = Keyring.from_environment()
    salt = keyring.salt(keyring.named("alice"))
    prompts = [world.prompts[ledger] for ledger in LONG[:3]]
    config = transfer(tenants="callers", secondary_tiers=fs_tier(world.store.root))
    files = world.store.files()
    with engine(world.model, environment, kv_transfer_config=config, num_gpu_blocks_override=FEW_BLOCKS) as llm:
        before = counted()
        made, cached = answers(llm, prompts, answer_length(LONG[0]), salt)
        new_files = len(world.store.wait_for(sum(len(prompt) // BLOCK for prompt in prompts), files))
        assert llm.reset_prefix_cache()
        _, again = answers(llm, prompts, 1, salt)
        of_nobody = [answers(llm, prompts[:1], 1)[1][0] for _ in range(2)]
        counts = {name: value - before.get(name, 0.0) for name, value in counted().items()}
    return Stranger(made, cached, again, of_nobody, new_files, counts)


def test_another_master_key_finds_nothing(stranger: Stranger, plain: Plain, world: World) -> None:
    """All of it is in the store, under names that nobody else's keys give; its own blocks it finds."""
    assert stranger.cached == [0, 0, 0]
    assert stranger.answers == [plain.tokens[ledger] for ledger in LONG[:3]]
    assert stranger.again == [(len(world.prompts[ledger]) - 1) // BLOCK * BLOCK for ledger in LONG[:3]]
    assert stranger.counts.get("scx:kv_blocks_refused", 0) == 0


def test_a_request_of_nobody_finds_nothing_and_leaves_nothing(stranger: Stranger, world: World) -> None:
    """Without a salt that the middleware made: not even its own blocks, a moment later."""
    assert stranger.of_nobody == [0, 0]
    assert stranger.counts["scx:kv_requests_without_tenant"] == 2
    assert stranger.new_files == sum(len(world.prompts[ledger]) // BLOCK for ledger in LONG[:3])
