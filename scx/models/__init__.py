"""How an architecture is swapped: one module per family of models."""
