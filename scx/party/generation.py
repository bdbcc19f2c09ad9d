"""Stage 3: new tokens on a cached conversation, as the secure side leads it. Keys are fresh in every step."""

import torch
from torch import Tensor

import scx_kernels as ops
from scx.encoding import FeatureKey, Noise, RowKey
from scx.kvcache.layers import append
from scx.party.attention import attend
from scx.party.cache import SplitCache
from scx.party.secure import Rope, SecureParty
from scx.party.stage import Stage

__all__ = ["Generation"]

_IN_ORDER = RowKey()


class Generation(Stage):
    """One step: n new tokens of a conversation, as a rule one.

    Args:
        party: the secure side.
        cache: the conversation's; keys are shared first if they were not.
        rope: rotary positions of the new tokens.
    """

    def __init__(self, party: SecureParty, cache: SplitCache, rope: Rope) -> None:
        super().__init__(party, cache.session, rope)
        self.cache = cache

    def run(self, hidden: Tensor) -> Tensor:
        """Embeddings (B, n, D) -> hidden states behind the last block, (B, n, D). A step that fails leaves the cache as
        it was."""
        past, (batch, tokens, _) = self.cache.tokens, hidden.shape
        self.noise = [self.party.noise(self.session, block, batch, tokens) for block in self.plan.start_blocks]
        self.party.share(self.cache)
        self.line = self.party.line(self.session.id, "generation", self.cache)
        try:
            hidden = self._run(hidden)
        except BaseException:
            self.cache.truncate(past)
            raise
        self.cache.tokens = past + tokens
        self.cache.note_layers()
        return hidden

    def _run(self, hidden: Tensor) -> Tensor:
        if self.plan.verify:
            return self._run_verified(hidden)
        return self._run_few(hidden) if self.plan.few else self._run_paper(hidden)

    def _run_verified(self, hidden: Tensor) -> Tensor:
        """As the paper's, but that the secure side attends to the blocks whose keys it keeps: for a few tokens that is
        no more work than a check of who else does."""
        for block in self.plan.start_blocks:
            hidden = self._run_block(block, hidden, self.noise[block])
        if self.plan.middle_blocks:
            hidden = self.line.ask("run_middle", hidden=hidden, positions=self.rope.positions)["hidden"]
        for block in self.plan.end_blocks:
            hidden = self._run_block(block, hidden, None)
        return hidden

    def _run_block(self, block: int, hidden: Tensor, noise: Noise | None) -> Tensor:
        products = self._project_qkv(block, hidden, _IN_ORDER, noise)
        q, k, v = self._restore(block, products, self._plain_key(len(hidden)))
        k, v, _ = append(self.cache.layers[block], k, v)
        attended = attend(self.party.weights.attention(block), q, k, v, self.cache.first_key)
        hidden = hidden + self._project_output(block, attended.transpose(1, 2).flatten(2))
        return self._feed_forward(block, hidden, _IN_ORDER)

    def _plain_key(self, batch: int) -> FeatureKey:
        shape = self.party.shape
        return FeatureKey.identity(batch, shape.num_heads, shape.num_kv_heads, shape.head_dim, self.party.device)

    def _run_paper(self, hidden: Tensor) -> Tensor:
        for block in self.plan.start_blocks:
            hidden = self._feed_forward(block, hidden + self._attend(block, hidden), _IN_ORDER)
        if self.plan.middle_blocks:
            hidden = self.line.ask("run_middle", hidden=hidden, positions=self.rope.positions)["hidden"]
        for block in self.plan.end_blocks:
            reply = self.line.ask("score", block, hidden=hidden, positions=self.rope.positions)
            hidden = self._feed_forward(block, hidden + self._finish(block, reply), _IN_ORDER)
        return hidden

    def _run_few(self, hidden: Tensor) -> Tensor:
        """Nothing comes back between a block's attention and the next one that the secure side takes part in."""
        last = -1
        for last in self.plan.start_blocks:
            hidden = hidden + self._attend(last, hidden)
            if last + 1 in self.plan.start_blocks:
                hidden = self._feed_forward(last, hidden, _IN_ORDER)
        reply = self._pass_on(last, hidden)
        for block in self.plan.end_blocks:
            reply = self._pass_on(block, reply["hidden"] + self._finish(block, reply))
        return reply["hidden"]

    def _pass_on(self, block: int, hidden: Tensor) -> dict[str, Tensor]:
        return self.line.ask("pass_on", block, hidden=hidden, positions=self.rope.positions)

    def _attend(self, block: int, hidden: Tensor) -> Tensor:
        """A start block's attention on the secure side's own cache: (B, n, D), projected."""
        products = self._project_qkv(block, hidden, _IN_ORDER, self.noise[block])
        key = self._feature_key(block, len(hidden))
        q, k, v = self._restore(block, products, key)
        all_k, all_v, _ = append(self.cache.layers[block], *key.decode_cache(k, v))
        if not self.plan.reuse_feature_keys:
            k, v = ops.permute_features(all_k, key.key), ops.permute_features(all_v, key.value)
        attended = self.line.ask("attend", block, query=q, key=k, value=v)["attention"]
        return self._project_output(block, _IN_ORDER.enter_heads(attended.transpose(1, 2), key.output))

    def _feature_key(self, block: int, batch: int) -> FeatureKey:
        if self.plan.reuse_feature_keys:
            return self.party.feature_key(self.session, block, self.cache.sequences)
        return self.session.one_time.draw_feature_key(block, batch, self.party.device)

    def _project_output(self, block: int, rows: Tensor) -> Tensor:
        """A protected block's output projection of rows (B, n, H*d), which is the secure side's own."""
        projected: Tensor = self.party.weights.o_proj(block)(rows)
        return projected

    def _finish(self, block: int, reply: dict[str, Tensor]) -> Tensor:
        """An end block's attention from scores on Kᶜ: un-permute columns, drop redundant ones, softmax, own V."""
        scores, value = reply["scores"], reply["value"]
        tokens = value.shape[2]
        columns = self._extend_columns(block, scores.shape[-1], tokens)
        self.cache.values[block] = values = torch.cat((self.cache.values[block], value), dim=2)
        index = columns[:, None, None].expand(*scores.shape[:3], columns.shape[1])
        probabilities = self._mask(block, scores.gather(-1, index)).softmax(dim=-1).to(value.dtype)
        groups = values.shape[1]
        attended = probabilities.unflatten(1, (groups, -1)) @ values.unsqueeze(2)
        return self._project_output(block, attended.flatten(1, 2).transpose(1, 2).flatten(2))

    def _extend_columns(self, block: int, rows: int, tokens: int) -> Tensor:
        """Which column of the scores is which token, (B, N): new tokens' keys were appended in order."""
        known = self.cache.columns[block]
        new = torch.arange(rows - tokens, rows, device=known.device).expand(len(known), tokens)
        self.cache.columns[block] = columns = torch.cat((known, new), dim=1)
        return columns

    def _mask(self, block: int, scores: Tensor) -> Tensor:
        """Scores (B, H, n, N), -inf where a query does not see a key: later, padding, or outside the window."""
        tokens, keys = scores.shape[-2:]
        window, first = self.party.weights.window(block), self.cache.first_key
        if tokens == 1 and first is None and (window is None or keys <= window):
            return scores
        key = torch.arange(keys, device=scores.device)
        own = torch.arange(keys - tokens, keys, device=scores.device)[:, None]
        seen = key <= own
        if window is not None:
            seen = seen & (key > own - window)
        seen = seen[None] if first is None else seen & (key >= first[:, None, None])
        return scores.masked_fill(~seen[:, None], -torch.inf)
