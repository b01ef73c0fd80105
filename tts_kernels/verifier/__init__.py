"""Verifiers: recipes of published reward models, one-shot scoring, and sessions that score step by step."""

from .implicit import ImplicitHead
from .recipe import Encoded, HeadSpec, Recipe
from .recipes import RECIPES, find_recipe
from .session import SessionScores, VerifierSession
from .verifier import CandidateScores, Verifier

__all__ = [
    "RECIPES",
    "CandidateScores",
    "Encoded",
    "HeadSpec",
    "ImplicitHead",
    "Recipe",
    "SessionScores",
    "Verifier",
    "VerifierSession",
    "find_recipe",
]
