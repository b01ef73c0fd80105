"""Scores of reasoning steps by a verifier's head, selection among candidates, and log-probabilities of given tokens."""

from tts_kernels.dispatch import unsupported_reasons

from .api import aggregate, select, step_scores, token_logprobs, verify
from .explain import explain
from .heads import ScoreHead
from .results import Selection, StepScores

__all__ = [
    "ScoreHead",
    "Selection",
    "StepScores",
    "aggregate",
    "explain",
    "select",
    "step_scores",
    "token_logprobs",
    "unsupported_reasons",
    "verify",
]
