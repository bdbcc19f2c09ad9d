"""The sizes of the models that are measured."""

from dataclasses import dataclass
from typing import Any

import transformers  # loads a class when it is asked for, which is not here


@dataclass(frozen=True)
class Shape:
    """What one device holds of a model: D hidden size, H query and G key/value heads, d head size, F feed-forward."""

    name: str
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    feed_forward: int
    layers: int
    vocabulary: int

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def qkv_widths(self) -> tuple[int, int, int]:
        return self.query_width, self.kv_width, self.kv_width

    @property
    def qkv_width(self) -> int:
        return sum(self.qkv_widths)

    @property
    def parameters(self) -> int:
        """How many a model of this shape has, its head apart from its embedding."""
        attention = 2 * self.hidden * (self.query_width + self.kv_width)
        block = attention + 3 * self.hidden * self.feed_forward + 2 * self.hidden
        return self.layers * block + 2 * self.vocabulary * self.hidden + self.hidden

    def config(self, **options: Any) -> Any:
        """The transformers configuration of a model of this shape."""
        return transformers.LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.feed_forward,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            max_position_embeddings=32_768,
            eos_token_id=None,
            **options,
        )


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("Llama-3-8B", 4096, 32, 8, 128, 14336, 32, 128_256),
        Shape("Llama-2-7B", 4096, 32, 32, 128, 11008, 32, 32_000),
        Shape("Llama-3-70B/8", 8192, 8, 1, 128, 3584, 80, 128_256),  # one of eight tensor-parallel ranks
        Shape("SmolLM2", 576, 9, 3, 64, 1536, 30, 49_152),
    )
}

SMALL_SHAPES = {
    shape.name: shape
    for shape in (
        Shape("narrow", 1024, 8, 2, 128, 3584, 2, 4096),  # Llama-3-8B's heads, and tiles, with a quarter of the columns
        Shape("rehearsal", 64, 4, 2, 16, 96, 2, 96),
    )
}
"""Shapes that are checked and never measured."""


def shape_of(model: str) -> Shape:
    """Of a model's name, or of no model: "32x8x128" are its query heads, key/value heads and head size."""
    if named := SHAPES.get(model) or SMALL_SHAPES.get(model):
        return named
    heads, kv_heads, head_dim = map(int, model.split("x"))
    return Shape(model, heads * head_dim, heads, kv_heads, head_dim, 0, 0, 0)
