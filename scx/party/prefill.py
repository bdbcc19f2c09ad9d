"""Stage 1: the prompt, block by block, as the secure side leads it."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from scx.encoding import CrossingKey, FeatureKey, inverse
from scx.keys import Session, SharedKeys
from scx.kvcache.layers import append
from scx.party.boundary import Pending
from scx.party.cache import SplitCache
from scx.party.secure import Rope, SecureParty
from scx.party.stage import Products, Stage

__all__ = ["Prefill", "TopLogits"]


@dataclass(frozen=True)
class TopLogits:
    """The k largest logits of every token, (B, S, k), and their tokens, (B, S, k) int64, largest first."""

    logits: Tensor
    tokens: Tensor

    @classmethod
    def read(cls, reply: dict[str, Tensor], rows: CrossingKey) -> "TopLogits":
        """Of encoded rows: in token order, redundant rows dropped."""
        places = rows.position[:, :, None].expand(-1, -1, reply["top_logits"].shape[2])
        return cls(reply["top_logits"].gather(1, places), reply["top_tokens"].gather(1, places))

    def dense(self, vocab_size: int, tokens: slice | Tensor) -> Tensor:
        """(B, S', vocab_size) logits of the given tokens, -inf where they are not among the largest."""
        logits, index = self.logits[:, tokens], self.tokens[:, tokens]
        everything = logits.new_full((*logits.shape[:2], vocab_size), -torch.inf)
        return everything.scatter(2, index, logits)


class Prefill(Stage):
    """The prefill of one session.

    Args:
        party: the secure side.
        session: fresh.
        rope: rotary positions of the S tokens.
        first_key: (B,) int64, the first token of each sequence that is no padding; None for no padding.
        cache: the conversation's, to be filled; None where it is not continued.
    """

    def __init__(
        self, party: SecureParty, session: Session, rope: Rope, first_key: Tensor | None, cache: SplitCache | None
    ) -> None:
        super().__init__(party, session, rope)
        self.first_key = first_key
        self.cache = cache
        self.token_position: list[Tensor] = []  # of the middle blocks, (B, S) each

    def run(self, hidden: Tensor) -> "Tensor | TopLogits":
        """Embeddings (B, S, D) -> hidden states behind the last block, (B, S, D), or their largest logits if the plan
        has these come from the untrusted side."""
        batch, tokens, _ = hidden.shape
        party = self.party
        party.renew()
        self.keys = self.session.one_time.open_pass(tokens, batch, party.scale, hidden.dtype, party.device)
        self.noise = party.noise(self.session, 0, batch, self.keys.rows)
        self.line = replace(party.line(self.session.id, "prefill"), first_key=self.first_key)
        padding = {} if self.first_key is None else {"first_key": self.first_key}
        self.line.ask("open", -1, **padding)
        run = self._run_few if self.plan.few else self._run_paper
        result = run(hidden)
        if self.cache is None:
            party.forget(self.session.id)
        else:
            self._finish(self.cache, tokens)
        return result

    def _run_paper(self, hidden: Tensor) -> "Tensor | TopLogits":
        """Four round trips per block: rows come back after every product."""
        for block in range(self.plan.num_layers):
            products = self._project_rows(block, hidden)
            attention = self._attend(block, products)
            hidden = hidden + self._project_output(block, attention, self.keys.draw(block, "output"))
            hidden = self._feed_forward(block, hidden, self.keys.draw(block, "feed_forward"))
        if self.plan.prefill_top_k is None:
            return hidden
        key = self.keys.draw(block, "head", like="feed_forward")
        return TopLogits.read(self.line.ask("head", block, head_input=key.enter(hidden)), key)

    def _run_few(self, hidden: Tensor) -> "Tensor | TopLogits":
        """Two round trips per block: between one attention and the next, rows stay where they are."""
        products = self._project_rows(0, hidden)
        for block in range(self.plan.num_layers):
            attention = self._attend(block, products)
            if self.plan.is_border(block):
                residual = None if block == 0 else products.rows
                key = self.keys.draw(block, "feed_forward")
                rows = self._project_output(block, attention, self._output_key(block, residual))
                hidden = hidden + rows if block == 0 else rows
                reply = self.line.ask("enter", block, feed_forward_input=key.enter(hidden))
            else:
                key = products.rows
                attended = self._encode(block, attention, self._output_key(block, key))
                reply = self.line.ask("advance", block, attention_rows=attended)
            if block + 1 < self.plan.num_layers:
                products = Products.read(reply, key)
        return key.leave(reply["hidden"]) if self.plan.prefill_top_k is None else TopLogits.read(reply, key)

    def _output_key(self, block: int, residual: CrossingKey | None) -> CrossingKey:
        """The key of rows that enter the output projection: that of residual rows which lie on the untrusted side, for
        it to add them, with fresh redundant rows; a fresh one without such."""
        return self.keys.draw(block, "output") if residual is None else self.keys.renew(residual, block, "output")

    def _project_rows(self, block: int, hidden: Tensor) -> Products[CrossingKey]:
        """q, k and v products of rows under a fresh key, under noise in the first block."""
        key = self.keys.draw(block, "attention")
        return self._project_qkv(block, hidden, key, self.noise if block == 0 else None)

    def _attend(self, block: int, products: Products[CrossingKey]) -> Pending:
        """Attention on what `_restore` gives is under way, (B, H, S, d); what generation will need is kept."""
        feature_key = self.party.feature_key(self.session, block)
        q, k, v = self._restore(block, products, feature_key)
        attention = self.line.begin("attend", block, query=q, key=k, value=v)
        if self.cache is not None:
            self._keep(block, products, feature_key.decode_cache(k, v) if block in self.plan.protected_blocks else None)
        return attention

    def _encode(self, block: int, attention: Pending, key: CrossingKey) -> Tensor:
        feature_key = self.party.feature_key(self.session, block)
        return key.enter_heads(attention.wait()["attention"].transpose(1, 2), feature_key.output)

    def _project_output(self, block: int, attention: Pending, key: CrossingKey) -> Tensor:
        """Undo π_r, encode rows; their output projection comes back, in token order: (B, S, D)."""
        reply = self.line.ask("project_output", block, attention_rows=self._encode(block, attention, key))
        return key.leave(reply["output"])

    def _keep(self, block: int, products: Products[CrossingKey], plain: tuple[Tensor, Tensor] | None) -> None:
        """What generation will need of this block."""
        cache = self.cache
        if cache is None or plain is None:
            self.token_position.append(products.rows.position)
            return
        if block in self.plan.kept_blocks:
            append(cache.layers[block], *plain)
        else:
            cache.values[block] = plain[1]
            cache.pending_keys[block], cache.columns[block] = self._encode_keys(block, products, plain[0])

    def _encode_keys(self, block: int, products: Products[CrossingKey], keys: Tensor) -> tuple[Tensor, Tensor]:
        """Kᶜ (B, G, T, d) = π_l(K ⊕ r) of rotated K, and where each token lies in it, (B, S).

        The redundant rows are keys of the pass's own redundant rows, at positions of tokens: like K in every feature.
        """
        batch, groups, tokens, size = keys.shape
        row_index, place = self.keys.permutation(block, "encoded keys")
        decoys = inverse(products.rows.entry)[:, tokens:].contiguous()
        if decoys.shape[1]:
            # Drawn apart from the rows' order: a position that followed from a row's place would mark it as redundant.
            drawn, _ = self.keys.permutation(block, "positions of redundant keys")
            at = drawn[:, : decoys.shape[1]].remainder(tokens)
            keys = torch.cat((keys, self._rotated_decoys(block, products, decoys, at, groups, size)), dim=2)
        index = row_index[:, None, :, None].expand(batch, groups, row_index.shape[1], size)
        return keys.gather(2, index), place[:, :tokens].contiguous()

    def _rotated_decoys(
        self, block: int, products: Products[CrossingKey], decoys: Tensor, at: Tensor, groups: int, size: int
    ) -> Tensor:
        """Keys (B, G, R, d) of redundant rows, which lie in `decoys`, rotated to the positions of tokens `at`."""
        batch, count = decoys.shape
        cos, sin = (
            x.expand(batch, -1, -1).gather(1, at[..., None].expand(batch, count, size))
            for x in (self.rope.cos, self.rope.sin)
        )
        plain = torch.arange(size, device=decoys.device).expand(batch, groups, size)
        noise, norms = products.noise, self.party.weights.head_norms(block)
        images = None if noise is None else [noise.images[1]] * 3
        own = FeatureKey(plain, plain, plain, plain, plain, plain)
        product, dtype = products.tensors[1], self.party.weights.dtype
        _, keys, _ = own.encode([product] * 3, cos, sin, decoys, images=images, dtype=dtype, **norms)
        return keys

    def _finish(self, cache: SplitCache, tokens: int) -> None:
        position = torch.stack(self.token_position).cpu() if self.token_position else torch.empty(0, dtype=torch.int64)
        self.session.shared_keys = SharedKeys(
            self.session.id,
            self.session.shape.fingerprint,
            tuple(self.plan.middle_blocks),
            position,
            self.rope.positions.cpu(),
        )
        cache.tokens, cache.first_key = tokens, self.first_key
        cache.prefill_rows = tokens + self.session.settings.redundant_num
        cache.note_layers()
