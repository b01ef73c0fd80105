"""Searches over answers: best-of-N, votes, beam search and DVTS, as drivers over a policy and a verifier.

    policy = search.Policy(model, tokenizer, max_tokens=65536)
    verifier = Verifier.from_pretrained(path, recipe="qwen2.5-math-prm")
    result = search.beam_search(policy, verifier, question, width=4, expand=4)
    result.chosen.text, result.cost

Each search takes a question and returns a `SearchResult`, or several, which share every forward of the two models, and
returns a `SearchBatch`. The policy keeps one KV tree and the verifier another; what candidates share is stored and
computed once in both.
"""

from .answers import boxed, canonical
from .beam import beam_search, dvts
from .best_of_n import best_of_n, majority, weighted_vote
from .policy import Policy, Step
from .record import Candidate, Cost, SearchBatch, SearchResult
from .run import Options

__all__ = [
    "Candidate",
    "Cost",
    "Options",
    "Policy",
    "SearchBatch",
    "SearchResult",
    "Step",
    "beam_search",
    "best_of_n",
    "boxed",
    "canonical",
    "dvts",
    "majority",
    "weighted_vote",
]
