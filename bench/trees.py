"""Nested arguments of operations, with the tensors that are hidden in a `Sealing` among their leaves."""

from torch.utils._pytree import register_pytree_node, tree_leaves, tree_map

from scx_kernels import Sealing

__all__ = ["tree_leaves", "tree_map"]

_PARTS = ("key", "writes", "layer", "rounds", "first_head", "kept")

register_pytree_node(
    Sealing,
    lambda sealing: ([getattr(sealing, name) for name in _PARTS], None),
    lambda parts, _: Sealing(*parts),
    serialized_type_name="scx_kernels.Sealing",
)
