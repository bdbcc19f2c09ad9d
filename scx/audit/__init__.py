"""What the published encodings do not hide, as attacks that run: each needs weights and encoded tensors, no key.

`observers` says what an attacker sees in each placement, the other files what can be read of it.
"""

from scx.audit.features import find_feature_order, undo_feature_order
from scx.audit.observers import AttentionMemory, Heard, recorded_inputs, rows_heard
from scx.audit.rows import link_rows, order_rows, realness
from scx.audit.vocabulary import nearest_tokens, one_token_rows, read_first_block, read_noisy_rows

__all__ = [
    "AttentionMemory",
    "Heard",
    "find_feature_order",
    "link_rows",
    "nearest_tokens",
    "one_token_rows",
    "order_rows",
    "read_first_block",
    "read_noisy_rows",
    "realness",
    "recorded_inputs",
    "rows_heard",
    "undo_feature_order",
]
