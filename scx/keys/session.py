"""A session: one conversation's keys, carried by the cache that its prefill returns.

Its secret is derived from the generator's master key and the session's public id. Everything secret of the conversation
is drawn from it, so a session can be saved and handed on without the master key. Feature permutations and the keys that
`Session.derive_key` gives come out the same wherever the session goes on, because its cache is stored under them;
one-time keys belong to a branch of it (`scx.keys.branch`).
"""

import secrets
import weakref
from typing import Any

import torch
from torch import Tensor

import scx_kernels as ops
from scx.architecture import ModelShape
from scx.devices import upload
from scx.encoding import FeatureKey, Noise, TokenKeys, inverse
from scx.keys.branch import Branch, Writes
from scx.keys.passes import streams_of
from scx.keys.settings import BRANCH_BYTES, KeySettings, public_bytes
from scx.keys.sharing import SharedKeys
from scx.keystream import KeyStream, Secret, derive
from scx.life import Life, this_life
from scx_kernels.hidden import Hidden, HiddenTensor, guarded

__all__ = ["Session"]


class Session:
    """One conversation's keys, carried by the cache that its prefill returns.

    `id`, `branch`, `settings`, `shape` and `batch_size` are public, the rest is not. `newest_save` is the number of the
    newest saved cache that this session has written or read, 0 if none. `keep_keystream` is the wish of whoever runs
    the model, as in `SCXKeyGenerator`.

    Args:
        secret: the session's secret.
        session_id: 16 public bytes.
        branch: 16 bytes that no other holder of this session uses; default: drawn from the operating system.
    """

    def __init__(
        self,
        secret: Secret,
        settings: KeySettings,
        shape: ModelShape,
        batch_size: int,
        session_id: bytes,
        branch: bytes | None = None,
    ) -> None:
        self.settings = settings
        self.shape = shape
        self.batch_size = batch_size
        self.id = session_id.hex()
        self.start_layers, self.end_layers = settings.start_layers, settings.end_layers
        self.newest_save = 0
        self.keep_keystream = True
        self.shared_keys: SharedKeys | None = None  # of its prefill, where that crossed a boundary
        self._is_closed = False
        self._secret = secret
        self._stream = KeyStream(secret)
        self._branches: dict[Life, Branch] = {}
        self._begin_branch(secrets.token_bytes(BRANCH_BYTES) if branch is None else branch)
        self._feature_keys: dict[torch.device, list[FeatureKey]] = {}
        self._cipher_keys: dict[tuple[str, torch.device], HiddenTensor] = {}
        # Of a layer of a cache, by the layer's object: not in it, since caches are copied, pickled and handed on.
        self._kept: weakref.WeakKeyDictionary[object, ops.KeptKeystream] = weakref.WeakKeyDictionary()

    def __repr__(self) -> str:
        return f"Session(id={self.id}, batch_size={self.batch_size})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("a session holds keys and is never pickled")

    def __deepcopy__(self, memo: dict) -> "Session":
        return self

    def close(self) -> None:
        """Wipe the session's keys, in memory and on devices. Whatever needs one of them is refused from then on, with
        RuntimeError; what it gave out, such as a feature key, is wiped with them. No pass of it may be under way.

        Of a session that nobody has any more, what lies on a CPU is wiped without it, but for feature permutations.
        """
        self._is_closed = True
        held: list[Hidden] = [key for keys in self._feature_keys.values() for key in keys]
        held += [self._stream, *self._cipher_keys.values(), *self._kept.values()]
        held += [] if self.shared_keys is None else [self.shared_keys]
        for keys in held:
            keys.wipe()
        for branch in self._branches.values():
            branch.wipe()
        self._feature_keys.clear()
        self._cipher_keys.clear()
        self._kept.clear()
        self.shared_keys = None

    def _check_open(self) -> None:
        if self._is_closed:
            raise RuntimeError(f"session {self.id} was closed, and its keys are wiped")

    @property
    def protected_layers(self) -> tuple[int, ...]:
        """Layers whose keys never leave the secure side."""
        return self.start_layers + self.end_layers

    @property
    def shared_layers(self) -> tuple[int, ...]:
        """Layers whose keys may be shared with the untrusted side."""
        return tuple(range(len(self.start_layers), self.shape.num_layers - len(self.end_layers)))

    def derive_key(self, purpose: str, *, branch: str | None = None) -> Secret:
        """A key of 32 bytes below this session for a purpose of its own, such as "sealed cache".

        Args:
            purpose: what the key is for; each purpose has a key of its own.
            branch: the name of a branch. Without it, the key is the same for every holder of the session. Two holders
                that go on from the same cache would encrypt different values under the same position, so a cipher that
                must not repeat takes the writer's `session.branch`, and the reader finds it beside the data.

        Raises: ValueError for an empty purpose or a branch that is not 16 bytes in hexadecimal; RuntimeError once the
            session is closed.
        """
        self._check_open()
        if not purpose:
            raise ValueError("purpose: expected a name, got an empty one")
        salt = b"" if branch is None else public_bytes("branch", branch, BRANCH_BYTES)
        return derive(self._secret, f"scx session key v1, {'session' if branch is None else 'branch'}\0{purpose}", salt)

    def share_keys(self) -> SharedKeys:
        """What key sharing (stage 2) gives to the untrusted side: the token permutations of the middle blocks, in the
        prefill of this session, and of no other block.

        Raises: RuntimeError if no prefill of this session crossed a boundary in this process: a cache of the fused
            placement lies in token order, and no token permutation opens it.
        """
        if self.shared_keys is None:
            raise RuntimeError("share_keys: this session had no prefill in the split placement in this process")
        return self.shared_keys

    def feature_key(self, layer: int, device: torch.device) -> FeatureKey:
        """The feature permutations of one layer, for the session's sequences in order."""
        keys = self._feature_keys.get(device)
        if keys is None:
            keys = self._feature_keys[device] = self._draw_feature_keys(device)
        return keys[layer]

    @guarded
    def _draw_feature_keys(self, device: torch.device) -> list[FeatureKey]:
        self._check_open()
        shape, streams = self.shape, streams_of(range(self.shape.num_layers), self.batch_size, 0)
        heads, size = shape.num_kv_heads, shape.head_dim
        drawn = self._stream.permutations("feature permutations of K and V", streams, size, 2 * heads, device)
        key, value = drawn.view(shape.num_layers, self.batch_size, 2, heads, size).unbind(2)
        key_inverse, value_inverse = inverse(key), inverse(value)
        query, output = (x.repeat_interleave(shape.num_heads // heads, dim=2) for x in (key, value_inverse))
        stacked = [x.unbind(0) for x in (query, key, value, output, key_inverse, value_inverse)]
        return [FeatureKey(*layer) for layer in zip(*stacked, strict=True)]

    def sealing(self, layer: int, writes: Tensor, branch: str, owner: object = None) -> ops.Sealing:
        """How rows of a layer with these write numbers (B, N) are sealed by the writer in `branch`; on their device.

        Args:
            owner: the object that holds the rows. On a CPU their keystream may be kept here for as long as it lives.
        """
        held = self._cipher_keys.get((branch, writes.device))
        if held is None:
            held = self._draw_cipher_key(branch, writes.device)
        kept = None if owner is None else self._kept_keystream(owner, writes.device)
        return ops.Sealing(held.value, writes, layer, self.settings.cipher_rounds, kept=kept)

    @torch.compiler.disable
    @guarded
    def _draw_cipher_key(self, branch: str, device: torch.device) -> HiddenTensor:
        words = ops.key_words(self.derive_key("sealed cache", branch=branch).reveal())
        key = self._cipher_keys[branch, device] = HiddenTensor(upload(words, device))
        return key

    def _kept_keystream(self, owner: object, device: torch.device) -> ops.KeptKeystream | None:
        if device.type != "cpu" or not self.keep_keystream:
            self.forget_keystream(owner)
            return None
        kept = self._kept.get(owner)
        if kept is None:
            kept = self._kept[owner] = ops.KeptKeystream()
        return kept

    def forget_keystream(self, owner: object) -> None:
        """Drop what is kept of the keystream of the rows that `owner` holds."""
        if self._kept:
            self._kept.pop(owner, None)

    @property
    def one_time(self) -> Branch:
        """The one-time keys of this session in this process."""
        self._check_open()
        # A forked process has copies of its parent's counters; it goes on in a branch of its own.
        return self._branches.get(this_life()) or self._begin_branch(secrets.token_bytes(BRANCH_BYTES))

    def _begin_branch(self, nonce: bytes) -> Branch:
        life, before = this_life(), self._branches
        # Of threads that come here together one begins it, for all of them.
        branch = before.setdefault(life, Branch(self._secret, nonce, self.settings, self.shape))
        self._branches = {life: branch}
        return branch

    @property
    def branch(self) -> str:
        """The public name of the branch in which this process draws one-time keys, in hexadecimal."""
        return self.one_time.name

    def draw_token_keys(self, *args: Any, **options: Any) -> TokenKeys:
        """`Branch.draw_token_keys` of this process's branch."""
        return self.one_time.draw_token_keys(*args, **options)

    def take_noise(self, *args: Any, **options: Any) -> Noise:
        """`Branch.take_noise` of this process's branch."""
        return self.one_time.take_noise(*args, **options)

    def take_writes(self, batch: int, tokens: int, device: torch.device) -> Writes:
        """`Branch.take_writes` of this process's branch."""
        return self.one_time.take_writes(batch, tokens, device)
