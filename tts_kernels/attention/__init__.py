"""Attention over trees of shared KV: one op for decode, verify and any mix of them, and its two helpers."""

from tts_kernels.dispatch import unsupported_reasons

from .api import append_kv, decode_attention, merge_states, tree_attention
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
