"""Kernels that make test-time scaling cheap: decode N samples over one shared KV tree, and know what it cost."""

from tts_kernels._version import __version__
from tts_kernels.attention import (
    Explanation,
    append_kv,
    decode_attention,
    explain,
    merge_states,
    tree_attention,
)
from tts_kernels.dispatch import unsupported_reasons
from tts_kernels.scoring import (
    ScoreHead,
    Selection,
    StepScores,
    aggregate,
    select,
    step_scores,
    token_logprobs,
    verify,
)
from tts_kernels.tree.kv_tree import KVTree, OutOfPages
from tts_kernels.tree.pack import PackedTree, pack, pack_many
from tts_kernels.tree.plan import TreePlan
from tts_kernels.tree.room import Room
from tts_kernels.verifier import Verifier, VerifierSession

__all__ = [
    "Explanation",
    "KVTree",
    "OutOfPages",
    "PackedTree",
    "Room",
    "ScoreHead",
    "Selection",
    "StepScores",
    "TreePlan",
    "Verifier",
    "VerifierSession",
    "__version__",
    "aggregate",
    "append_kv",
    "decode_attention",
    "explain",
    "merge_states",
    "pack",
    "pack_many",
    "select",
    "step_scores",
    "token_logprobs",
    "tree_attention",
    "unsupported_reasons",
    "verify",
]
