"""Attention over trees of shared KV: one op for decode, verify and any mix of them, and its two helpers."""

from .api import append_kv, decode_attention, merge_states, tree_attention, unsupported_reasons
from .explain import Explanation, explain

__all__ = [
    "Explanation",
    "append_kv",
    "decode_attention",
    "explain",
    "merge_states",
    "tree_attention",
    "unsupported_reasons",
]
