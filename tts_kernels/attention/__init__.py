"""Attention over trees of shared KV: one op for decode, verify and any mix of them, and its two helpers."""

from .api import append_kv, decode_attention, merge_states, tree_attention, unsupported_reasons

__all__ = ["append_kv", "decode_attention", "merge_states", "tree_attention", "unsupported_reasons"]
