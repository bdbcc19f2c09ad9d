"""Whose pages a layer of vLLM's reads."""

from typing import Any

from vllm.forward_context import get_forward_context

__all__ = ["owner_of"]


def owner_of(impl: Any, layer: Any) -> Any:
    """The sealed layer whose pages an attention implementation reads: its own, or that of the layer it shares a cache
    with.

    Raises: RuntimeError where the metadata builder has not made one.
    """
    target = impl.kv_sharing_target_layer_name
    source = impl if target is None else get_forward_context().no_compile_layers[target].impl
    if source.layer is None:
        raise RuntimeError(f"layer {layer.layer_name}: its pages are not set up; the metadata builder was replaced")
    return source.layer
