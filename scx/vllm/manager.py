"""The scheduler's side: vLLM's tiers see blocks under keyed names alone, and what was refused once is a miss.

vLLM names a block by a hash over its tokens, those before it and the request's salt: whoever can guess a prompt can
compute it, and stock tiers make it a file's name. Here every name that leaves the scheduler is

    HMAC-SHA256(the tenant's naming key of a version, layout | vLLM's hash and group [| attempt])

so a store shows neither which prompts two tenants share nor whether a guessed one is there, and a tenant never finds
another's block.

A block that did not authenticate is not asked for again in this process. It is stored anew under the name of the next
attempt, which another process finds behind the refusal of the first; after `ATTEMPTS` of them the block is a miss.
"""

import hmac
from collections import OrderedDict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from hashlib import sha256
from typing import NamedTuple

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats
from vllm.logger import init_logger
from vllm.v1.kv_offload.base import (
    LoadStoreSpec,
    LookupResult,
    OffloadingEvent,
    OffloadingManager,
    OffloadKey,
    PrepareStoreOutput,
    ReqContext,
    RequestOffloadingContext,
    ScheduleEndContext,
    get_offload_group_idx,
    make_offload_key,
)
from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from scx.vllm.metrics import Counts
from scx.vllm.tenants import Keyring, Tenant

__all__ = ["ATTEMPTS", "Known", "Owner", "SealedManager", "SealedSlots"]

logger = init_logger("vllm.scx")

ATTEMPTS = 4
_MAX_REFUSED = 2**16


class Known(NamedTuple):
    """What the tiers know a block by: its name under a version of its tenant's key."""

    tenant: Tenant
    version: int
    name: OffloadKey


class SealedSlots(CPULoadStoreSpec):
    """Where chunks of one tenant lie in host memory, and what each is sealed under.

    Args:
        chunk_ids: of the host's rows.
        keys: vLLM's own key of each chunk: hash and group.
        known: what the tiers know each by.
    """

    def __init__(self, chunk_ids: Iterable[int], keys: list[OffloadKey], known: list[Known]) -> None:
        super().__init__(list(chunk_ids))
        if not len(self.block_ids) == len(keys) == len(known):
            raise ValueError(f"chunks: {len(self.block_ids)} slots for {len(keys)} keys and {len(known)} names")
        self.keys = keys
        self.tenant = known[0].tenant.id if known else ""
        self.versions = [each.version for each in known]
        self.names = [each.name for each in known]


@dataclass
class Owner:
    """Whose a request is, as its context carries it.

    Attributes:
        tenant: None for a request that nobody vouched for.
        found: key -> what a lookup hit.
        stored: key -> what a store under way has.
    """

    tenant: Tenant | None
    found: dict[OffloadKey, Known] = field(default_factory=dict)
    stored: dict[OffloadKey, Known] = field(default_factory=dict)


class SealedManager(OffloadingManager):
    """vLLM's tiers behind keyed names.

    Args:
        tiers: vLLM's own manager.
        keyring: of the tenants.
        layout: what the blocks' bytes mean (`scx.vllm.spec`); blocks of another layout have other names.
        tenant: name of the one whose all requests are; None where a request's salt says whose it is.
    """

    def __init__(self, tiers: OffloadingManager, keyring: Keyring, layout: bytes, tenant: str | None) -> None:
        self._tiers = tiers
        self._keyring = keyring
        self._layout = layout
        self._tenant = tenant
        self._counts = Counts()
        # First name of a refused block -> the attempt that is next; later name -> its first, and its attempt.
        self._attempts: OrderedDict[OffloadKey, int] = OrderedDict()
        self._later: OrderedDict[OffloadKey, tuple[OffloadKey, int]] = OrderedDict()

    def admit(self, req_context: ReqContext, salt: str | None) -> bool:
        """Find out whose a request is. False for nobody's."""
        tenant = self._keyring.read_salt(salt) if self._tenant is None else self._keyring.named(self._tenant)
        req_context.set_state(Owner(tenant))
        if tenant is None:
            self._counts.add({"requests_without_tenant": 1})
        return tenant is not None

    def refuse(self, names: Iterable[bytes]) -> None:
        """Blocks that did not authenticate, by the names they were loaded under."""
        for name in map(OffloadKey, names):
            first, attempt = self._later.get(name, (name, 0))
            if self._attempts.get(first, 0) > attempt:
                continue  # another rank's word of the same
            logger.warning("SCX: block %s did not authenticate; it is computed anew", name.hex()[:16])
            self._attempts[first] = attempt + 1
            self._attempts.move_to_end(first)
        while len(self._attempts) > _MAX_REFUSED:
            self._attempts.popitem(last=False)

    # What the scheduler asks.

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        owner = _owner(req_context)
        answer = LookupResult.MISS
        for known in self._known(owner, key, req_context):
            result = self._tiers.lookup(known.name, req_context)
            if result in (LookupResult.HIT, LookupResult.HIT_PENDING):
                owner.found[key] = known
                return result
            if result is LookupResult.RETRY:
                answer = result
        return answer

    def get_load_source(self, key: OffloadKey, req_context: ReqContext) -> CacheHitSource:
        return self._tiers.get_load_source(_owner(req_context).found[key].name, req_context)

    def prepare_load(self, keys: Collection[OffloadKey], req_context: ReqContext) -> LoadStoreSpec:
        found = [_owner(req_context).found[key] for key in keys]
        slots = self._tiers.prepare_load([known.name for known in found], req_context)
        return SealedSlots(slots.chunk_ids, [*keys], found)

    def touch(self, keys: Collection[OffloadKey], req_context: ReqContext) -> None:
        owner = _owner(req_context)
        written = (self._known(owner, key, req_context)[:1] for key in keys if key not in owner.found)
        names = [owner.found[key].name for key in keys if key in owner.found]
        self._tiers.touch(names + [known.name for first in written for known in first], req_context)

    def complete_load(self, keys: Collection[OffloadKey], req_context: ReqContext) -> None:
        owner = _owner(req_context)
        self._tiers.complete_load([owner.found[key].name for key in keys], req_context)

    def prepare_store(self, keys: Collection[OffloadKey], req_context: ReqContext) -> PrepareStoreOutput | None:
        owner = _owner(req_context)
        named = {known.name: (key, known) for key in keys for known in self._known(owner, key, req_context)[:1]}
        if not named:
            return PrepareStoreOutput([], CPULoadStoreSpec([]), [])
        output = self._tiers.prepare_store(list(named), req_context)
        if output is None:
            return None
        taken = [named[name] for name in output.keys_to_store]
        owner.stored.update(taken)
        kept = [key for key, _ in taken]
        slots = SealedSlots(output.store_spec.chunk_ids, kept, [known for _, known in taken])
        return PrepareStoreOutput([*kept], slots, [])

    def complete_store(self, keys: Collection[OffloadKey], req_context: ReqContext, success: bool = True) -> None:
        owner = _owner(req_context)
        self._tiers.complete_store([owner.stored.pop(key).name for key in keys], req_context, success)

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        return self._tiers.on_new_request(req_context)

    def on_request_finished(self, req_context: ReqContext) -> None:
        self._tiers.on_request_finished(req_context)

    def take_events(self) -> Iterable[OffloadingEvent]:
        return ()  # they are refused at start: they publish tokens and plain hashes

    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        self._tiers.on_schedule_end(context)

    def has_pending_work(self) -> bool:
        return self._tiers.has_pending_work()

    def reset_cache(self) -> None:
        self._tiers.reset_cache()

    def get_stats(self) -> OffloadingConnectorStats | None:
        own, theirs = self._counts.take(), self._tiers.get_stats()
        if own is None or theirs is None:
            return theirs if own is None else own
        return theirs.aggregate(own)

    def shutdown(self) -> None:
        self._tiers.shutdown()

    # Names.

    def _known(self, owner: Owner, key: OffloadKey, req_context: ReqContext) -> list[Known]:
        """What the tiers may know a block by, that which writes first. Nothing for nobody, of a tenant that was
        forgotten, and when a block's attempts are used up.

        The context is told where the block lies in its request, as tiers ask by name.
        """
        tenant = None if owner.tenant is None else self._keyring.find(owner.tenant.id)
        if tenant is None:
            return []
        place = req_context.get_offload_key_position(key)
        known = []
        for version in tenant.versions:
            name = self._name(tenant, version, key)
            if name is None:
                continue
            if place is not None:
                req_context.set_offload_key_position(name, place)
            known.append(Known(tenant, version, name))
        return known

    def _name(self, tenant: Tenant, version: int, key: OffloadKey) -> OffloadKey | None:
        try:
            secret = self._keyring.key(tenant, version, "names").reveal()
        except LookupError:  # forgotten in this very moment
            return None
        group = get_offload_group_idx(key)
        first = make_offload_key(hmac.digest(secret, self._layout + key, sha256), group)
        attempt = self._attempts.get(first, 0)
        if not attempt:
            return first
        if attempt >= ATTEMPTS:
            return None
        name = make_offload_key(hmac.digest(secret, self._layout + key + attempt.to_bytes(4, "big"), sha256), group)
        self._later[name] = first, attempt
        while len(self._later) > _MAX_REFUSED * ATTEMPTS:
            self._later.popitem(last=False)
        return name


def _owner(req_context: ReqContext) -> Owner:
    """Whose a request is. One that the connector has not seen, such as one that never began, is nobody's."""
    return req_context.get_state(Owner) or Owner(None)
