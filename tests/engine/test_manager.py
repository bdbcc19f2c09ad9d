"""The scheduler's side without an engine: names under tenants' keys, versions, and what was refused."""

import hashlib
import hmac
from collections.abc import Collection

import pytest
from vllm.v1.kv_offload.base import (
    LookupResult,
    OffloadingManager,
    OffloadKey,
    PrepareStoreOutput,
    ReqContext,
    RequestOffloadingContext,
    get_offload_group_idx,
    make_offload_key,
)
from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec

from scx.keystream import Secret
from scx.vllm.manager import ATTEMPTS, SealedManager
from scx.vllm.tenants import Keyring, Tenant

LAYOUT = bytes(32)
KEYS = [make_offload_key(bytes([n]) * 32, n % 2) for n in range(4)]


class Tiers(OffloadingManager):
    """Tiers that keep every block whose store completes."""

    def __init__(self) -> None:
        self.held: set[OffloadKey] = set()
        self.asked: list[OffloadKey] = []
        self.loading: list[OffloadKey] = []
        self.answer: LookupResult | None = None

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        self.asked.append(key)
        if self.answer is not None:
            return self.answer
        return LookupResult.HIT if key in self.held else LookupResult.MISS

    def prepare_load(self, keys: Collection[OffloadKey], req_context: ReqContext) -> CPULoadStoreSpec:
        self.loading += keys
        return CPULoadStoreSpec(list(range(len(keys))))

    def complete_load(self, keys: Collection[OffloadKey], req_context: ReqContext) -> None:
        for key in keys:
            self.loading.remove(key)

    def prepare_store(self, keys: Collection[OffloadKey], req_context: ReqContext) -> PrepareStoreOutput:
        fresh = [key for key in keys if key not in self.held]
        return PrepareStoreOutput(fresh, CPULoadStoreSpec([7 + n for n in range(len(fresh))]), [])

    def complete_store(self, keys: Collection[OffloadKey], req_context: ReqContext, success: bool = True) -> None:
        self.held.update(keys if success else ())

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        return RequestOffloadingContext()


def having(tenant: Tenant, *versions: int) -> Tenant:
    """The same with these versions of its key."""
    return Tenant(tenant.id, tenant.kind, versions)


class Changing(Keyring):
    """A keyring whose one tenant changes as a registry makes it change."""

    def __init__(self) -> None:
        super().__init__(Secret(bytes(range(32)), "master"), None)
        self.now: Tenant | None = super().named("alice")

    def named(self, name: str) -> Tenant | None:
        return self.now

    def find(self, id: str) -> Tenant | None:
        return self.now

    def key(self, tenant: Tenant, version: int, purpose: str) -> Secret:
        if self.now is None or version not in self.now.versions:
            raise LookupError(version)
        return super().key(having(tenant, 1), 1, f"{purpose} {version}")


@pytest.fixture
def keyring() -> Changing:
    return Changing()


@pytest.fixture
def tiers() -> Tiers:
    return Tiers()


@pytest.fixture
def manager(tiers, keyring) -> SealedManager:
    return SealedManager(tiers, keyring, LAYOUT, "alice")


def request(manager: SealedManager, salt: str | None = None) -> ReqContext:
    context = ReqContext("request")
    manager.on_new_request(context)
    manager.admit(context, salt)
    return context


def store(manager: SealedManager, context: ReqContext, keys: list[OffloadKey] = KEYS) -> list[OffloadKey]:
    """Names under which all of it was stored."""
    output = manager.prepare_store(keys, context)
    manager.complete_store(output.keys_to_store, context)
    return output.store_spec.names if output.keys_to_store else []


def hits(manager: SealedManager, context: ReqContext) -> list[bool]:
    return [manager.lookup(key, context) is LookupResult.HIT for key in KEYS]


def test_tiers_see_keyed_names_alone(manager, tiers) -> None:
    context = request(manager)
    names = store(manager, context)
    assert tiers.held == set(names)
    assert not tiers.held & set(KEYS)
    assert [get_offload_group_idx(name) for name in names] == [get_offload_group_idx(key) for key in KEYS]
    assert [len(name) for name in names] == [len(key) for key in KEYS]
    assert len({name[:-4] for name in names}) == len(KEYS)
    assert hits(manager, request(manager)) == [True] * 4


def test_names_are_those_of_the_specification(manager, keyring) -> None:
    """docs/formats.md, by an HMAC of its own."""
    (name,) = store(manager, request(manager), KEYS[1:2])
    secret = bytes(keyring.key(keyring.now, 1, "names").reveal())
    group = (1).to_bytes(4, "big")
    described = LAYOUT + bytes([1]) * 32 + group
    assert name == hmac.new(secret, described, hashlib.sha256).digest() + group
    manager.refuse([name])
    (later,) = store(manager, request(manager), KEYS[1:2])
    assert later == hmac.new(secret, described + bytes([0, 0, 0, 1]), hashlib.sha256).digest() + group


def test_where_a_block_lies_is_known_by_its_name(manager) -> None:
    context = request(manager)
    context.set_offload_key_position(KEYS[0], 96)
    (name,) = store(manager, context, KEYS[:1])
    assert context.get_offload_key_position(name) == 96


def test_what_is_loaded_is_what_was_hit(manager, tiers) -> None:
    names = store(manager, request(manager))
    context = request(manager)
    assert hits(manager, context) == [True] * 4
    slots = manager.prepare_load(KEYS, context)
    assert (slots.keys, slots.names, slots.versions) == (KEYS, names, [1] * 4)
    assert tiers.loading == names
    manager.refuse(names[:1])
    manager.complete_load(KEYS, context)
    assert not tiers.loading, "what was prepared is what completes, whatever has been refused since"


def test_tenants_and_layouts_have_names_of_their_own(tiers) -> None:
    keyring = Keyring(Secret(bytes(range(32)), "master"), None)
    alice, bob = (SealedManager(tiers, keyring, LAYOUT, name) for name in ("alice", "bob"))
    other = SealedManager(tiers, keyring, bytes(31) + b"\1", "alice")
    store(alice, request(alice))
    assert hits(alice, request(alice)) == [True] * 4
    assert hits(bob, request(bob)) == [False] * 4
    assert hits(other, request(other)) == [False] * 4


def test_callers_are_their_salts(tiers) -> None:
    keyring = Keyring(Secret(bytes(range(32)), "master"), None)
    manager = SealedManager(tiers, keyring, LAYOUT, None)
    alice, bob = (keyring.salt(keyring.of_credential(name)) for name in ("alice", "bob"))
    store(manager, request(manager, alice))
    assert hits(manager, request(manager, alice)) == [True] * 4
    assert hits(manager, request(manager, bob)) == [False] * 4
    assert manager.get_stats() is None
    for salt in (None, "", "alice", alice[:-1] + ("0" if alice[-1] != "0" else "1")):
        context = ReqContext("request")
        assert not manager.admit(context, salt)
        assert hits(manager, context) == [False] * 4
        output = manager.prepare_store(KEYS, context)
        assert not output.keys_to_store
        assert not len(output.store_spec.block_ids)
    assert manager.get_stats().reduce() == {"scx:kv_requests_without_tenant": 4}


def test_a_request_that_was_never_admitted_is_nobodys(manager) -> None:
    store(manager, request(manager))
    context = ReqContext("untracked")
    assert hits(manager, context) == [False] * 4
    assert not manager.prepare_store(KEYS, context).keys_to_store


def test_a_refused_block_is_a_miss_and_is_stored_anew(manager, tiers) -> None:
    names = store(manager, request(manager))
    manager.refuse(names[1:2])
    context = request(manager)
    assert hits(manager, context) == [True, False, True, True]
    (again,) = store(manager, context)
    assert again not in names
    assert hits(manager, request(manager)) == [True] * 4


def test_another_process_finds_what_was_stored_anew(manager, tiers, keyring) -> None:
    names = store(manager, request(manager))
    manager.refuse(names[:1])
    store(manager, request(manager))
    other = SealedManager(tiers, keyring, LAYOUT, "alice")
    context = request(other)
    assert hits(other, context) == [True] * 4
    other.refuse(other.prepare_load(KEYS[:1], context).names)
    context = request(other)
    assert hits(other, context) == [True] * 4
    assert other.prepare_load(KEYS[:1], context).names != names[:1]


def test_every_rank_may_say_so(manager) -> None:
    """The word of several ranks, or of several requests that had the block under way, is one refusal."""
    names = store(manager, request(manager))
    for _ in range(3):
        manager.refuse(names[:1])
    (again,) = store(manager, request(manager))
    assert hits(manager, request(manager)) == [True] * 4
    manager.refuse([again])
    assert hits(manager, request(manager)) == [False, True, True, True]


def test_attempts_are_bounded(manager, tiers) -> None:
    for attempt in range(ATTEMPTS):
        (name,) = store(manager, request(manager), KEYS[:1])
        assert len(tiers.held) == attempt + 1
        manager.refuse([name])
    asked = len(tiers.asked)
    context = request(manager)
    assert manager.lookup(KEYS[0], context) is LookupResult.MISS
    assert len(tiers.asked) == asked, "nobody is asked for it any more"
    assert store(manager, context, KEYS[:1]) == []


def test_the_new_version_writes_and_the_old_one_reads(manager, tiers, keyring) -> None:
    old = store(manager, request(manager))
    keyring.now = having(keyring.now, 2, 1)
    context = request(manager)
    assert hits(manager, context) == [True] * 4
    slots = manager.prepare_load(KEYS, context)
    assert (slots.versions, slots.names) == ([1] * 4, old)
    new = store(manager, context)
    assert not set(new) & set(old)
    context = request(manager)
    assert hits(manager, context) == [True] * 4
    assert manager.prepare_load(KEYS, context).versions == [2] * 4
    keyring.now = having(keyring.now, 2)
    tiers.held -= set(new)
    assert hits(manager, request(manager)) == [False] * 4, "a version that was dropped reads nothing"


def test_a_rotation_in_the_middle_of_a_store(manager, tiers, keyring) -> None:
    context = request(manager)
    output = manager.prepare_store(KEYS, context)
    keyring.now = having(keyring.now, 2, 1)
    manager.complete_store(output.keys_to_store, context)
    assert tiers.held == set(output.store_spec.names)


def test_a_forgotten_tenant_finds_and_keeps_nothing(manager, tiers, keyring) -> None:
    context = request(manager)
    store(manager, context)
    keyring.now = None
    assert hits(manager, context) == [False] * 4
    assert store(manager, context) == []
    assert hits(manager, request(manager)) == [False] * 4


def test_a_tier_that_asks_for_patience_is_given_it(manager, tiers) -> None:
    tiers.answer = LookupResult.RETRY
    assert manager.lookup(KEYS[0], request(manager)) is LookupResult.RETRY
    tiers.answer = LookupResult.HIT_PENDING
    assert manager.lookup(KEYS[0], request(manager)) is LookupResult.HIT_PENDING


def test_no_event_leaves(manager) -> None:
    """Events carry vLLM's plain hashes, and tokens."""
    assert not list(manager.take_events())
