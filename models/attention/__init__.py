"""How local the attention of an encoder is: python -m models.attention (its docstring defines the figures)."""
