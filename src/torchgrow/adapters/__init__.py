"""Adapters: replacement forwards for modules whose own forward has sizes written into it."""

from .torch import MultiheadAttention, TransformerEncoder, TransformerEncoderLayer  # pickles of 0.1 name them here

__all__ = ["MultiheadAttention", "TransformerEncoder", "TransformerEncoderLayer"]
