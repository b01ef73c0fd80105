"""Verifier: N candidates in, the scores of their steps out; every distinct token goes through the model once."""

from __future__ import annotations

import warnings
from bisect import bisect_left
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, fields
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tts_kernels.scoring import ScoreHead, StepScores, aggregate, step_scores
from tts_kernels.tree.checks import check_int, fail
from tts_kernels.tree.kv_tree import OutOfPages
from tts_kernels.tree.pack import pack
from tts_kernels.tree.plan import int_tensor

from .checks import check_list, check_texts
from .forward import gather, packed_forwards
from .implicit import ImplicitHead, pack_responses, packed_rewards
from .recipe import Encoded, Recipe
from .recipes import find_recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .session import VerifierSession

Output = str | Sequence[str]  # a candidate: a text, or its steps
TOO_LONG = ("error", "drop_oldest_steps")


@dataclass(frozen=True)
class CandidateScores(StepScores):
    """The StepScores of candidates that came as text, on the model's device.

    offsets  [N + 1] int64: candidate i has the steps offsets[i]:offsets[i + 1] of `margin` and `prob`
    dropped  [N] int32: how many of its first steps were left out because it was longer than the model's context. They
             have no scores and are in no aggregate
    tokens   distinct tokens that went through the model
    """

    offsets: Tensor
    dropped: Tensor
    tokens: int


class Verifier:
    """A process or outcome reward model behind one interface.

    model         a transformers model that holds the backbone
    tokenizer     its tokenizer
    recipe        a name of `RECIPES` or a Recipe: how text becomes tokens and what is read where
    head          the ScoreHead, or the ImplicitHead of an implicit recipe. Default: built from the tensors of `model`
                  by the names that the recipe knows
    reference     the reference model of an implicit recipe, on the same device
    max_tokens    KV slots: tokens that are held at a time. One path through the tree has to fit, the rest is a matter
                  of speed. Nodes begin on pages of their own, so short ones take more slots than they have tokens
    chunk_tokens  tokens that go through the model in one forward, at most
    too_long      what is done about a candidate beyond the model's context: "error", or "drop_oldest_steps", which
                  leaves out as few of its first steps as it takes, and warns; recipes that score whole answers refuse
                  it all the same
    page_size, backend   of the KV tree and of the ops, see `tree_attention` and `step_scores`

    Raises TypeError and ValueError for wrong arguments, among them a model that cannot run over a tree and a recipe
    that does not fit the model's tensors.

    `score` and `score_batch` may be called from several threads, and each session from one; on one model they wait for
    one another.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        recipe: Recipe | str,
        *,
        head: ScoreHead | ImplicitHead | None = None,
        reference: PreTrainedModel | None = None,
        max_tokens: int = 32768,
        chunk_tokens: int = 4096,
        too_long: str = "error",
        page_size: int = 16,
        backend: str | None = None,
    ):
        self.recipe = find_recipe(recipe)
        self.tokenizer = tokenizer
        self.head = self.recipe.build_head(model, tokenizer, reference) if head is None else head
        if (reference is not None) != self.recipe.implicit:
            expected = "the reference model" if self.recipe.implicit else "None"
            fail("reference", f"{expected} for recipe {self.recipe.name}", type(reference).__name__)
        if isinstance(self.head, ImplicitHead) != self.recipe.implicit:
            fail("head", f"one that suits recipe {self.recipe.name}", type(self.head).__name__, TypeError)
        self.max_tokens = check_int("max_tokens", max_tokens, 1)
        self.chunk_tokens = check_int("chunk_tokens", chunk_tokens, 1)
        self.page_size = check_int("page_size", page_size, 1)
        if too_long not in TOO_LONG:
            fail("too_long", f"one of {', '.join(TOO_LONG)}", repr(too_long))
        self.too_long = too_long
        self.backend = backend
        self.models = [model] if reference is None else [model, reference]
        self._trees: list | None = None  # made when they are first needed
        self.device = self.tree_models(page_size)[0].device  # refuses what cannot run over a tree
        width = model.config.get_text_config().hidden_size
        if not self.recipe.implicit and self.head.dim != width:
            fail("head", f"one for hidden states of size {width}", self.head.dim)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        recipe: Recipe | str,
        *,
        reference: str | Path | None = None,
        base: str | Path | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        **settings: Any,
    ) -> Verifier:
        """The verifier of a checkpoint on disk, in the layout in which its family publishes it.

        path, reference   folders of the model and, for an implicit recipe, of its reference model
        base              folder of the model under LoRA weights; default the one that they name
        dtype             of the weights; default that of the checkpoint
        settings          as for `Verifier`

        Raises OSError for what cannot be read, ValueError where the recipe does not fit, naming the missing tensor.
        """
        from .loading import load

        recipe = find_recipe(recipe)
        loaded = load(path, recipe, dtype=dtype, device=device, reference=reference, base=base)
        return cls(loaded.model, loaded.tokenizer, recipe, head=loaded.head, reference=loaded.reference, **settings)

    # --- one shot ----------------------------------------------------------------------------------------------------

    def score(
        self, questions: Sequence[str], outputs: Sequence[Sequence[str | Sequence[str]]]
    ) -> list[list[list[float]]]:
        """The score of every step, [question][candidate][step], as search-and-learn's PRMs return them.

        questions  texts
        outputs    for each question its candidates: texts, which the recipe cuts into steps, or lists of steps

        A step that was left out because its candidate is too long has nan. Otherwise as `score_batch`.
        """
        scores = self.score_batch(questions, outputs)
        prob = scores.prob.tolist()
        steps = [
            [float("nan")] * dropped + prob[begin:end]
            for dropped, (begin, end) in zip(scores.dropped.tolist(), pairwise(scores.offsets.tolist()))
        ]
        groups = accumulate(map(len, outputs), initial=0)
        return [steps[begin:end] for begin, end in pairwise(groups)]

    def score_batch(self, questions: Sequence[str], outputs: Sequence[Sequence[Output]]) -> CandidateScores:
        """All scores and aggregates of all candidates: those of question 0, then those of question 1, and so on.

        What candidates begin with in common, the question at least, is computed once. Hidden states are kept only of
        the tokens that steps are read from, and the head runs on those alone.

        Raises TypeError and ValueError for a wrong argument, among them a candidate beyond the model's context where
        `too_long` is "error"; OutOfPages where `max_tokens` is too small for one candidate.
        """
        check_texts("questions", questions)
        if len(outputs) != len(questions):
            fail("outputs", f"{len(questions)} lists of candidates, one for each question", len(outputs))
        names, sequences, dropped = [], [], []
        for g, (question, candidates) in enumerate(zip(questions, outputs)):
            check_list(f"outputs[{g}]", candidates)
            for i, output in enumerate(candidates):
                names.append(f"outputs[{g}][{i}]")
                if not isinstance(output, str):
                    check_texts(names[-1], output)
                sequence, left_out = self.encode(names[-1], question, self.recipe.split(output))
                sequences.append(sequence)
                dropped.append(left_out)
        if any(dropped):
            which = ", ".join(f"{name}: {n}" for name, n in zip(names, dropped) if n)
            warnings.warn(f"first steps left out of candidates longer than the context: {which}", stacklevel=2)

        offsets = int_tensor(list(accumulate((len(s.positions) for s in sequences), initial=0)), torch.int64)
        offsets = offsets.to(self.device)
        try:
            scores, tokens = (self._rewards if self.recipe.implicit else self._steps)(sequences, offsets)
        except OutOfPages as error:
            longest = max(len(s.ids) for s in sequences)
            raise OutOfPages(
                f"max_tokens: expected more than {self.max_tokens}: {error}; the longest candidate has {longest} tokens"
            ) from None
        return CandidateScores(
            **{f.name: getattr(scores, f.name) for f in fields(StepScores)},
            offsets=offsets,
            dropped=int_tensor(dropped).to(self.device),
            tokens=tokens,
        )

    def session(self, question: str | Sequence[str], **settings: Any) -> VerifierSession:
        """Step-wise scoring of the candidates of a question, or of several: see `VerifierSession` for the settings."""
        from .session import VerifierSession

        return VerifierSession(self, question, **settings)

    # --- bricks of both ways -----------------------------------------------------------------------------------------

    @property
    def context(self) -> int | None:
        """Tokens that a path may have; None: any number."""
        limits = [self.recipe.context]
        limits += [getattr(m.config.get_text_config(), "max_position_embeddings", None) for m in self.models]
        return min((limit for limit in limits if limit is not None), default=None)

    def encode(self, name: str, question: str, steps: Sequence[str]) -> tuple[Encoded, int]:
        """The tokens of a candidate and how many first steps were left out for it to fit."""
        try:
            sequence, limit = self.recipe.encode(self.tokenizer, question, steps), self.context
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        if self.recipe.implicit and sequence.response < 1:
            fail(name, "a question of at least one token, from which the answer's first is predicted", "none")
        if limit is None or len(sequence.ids) <= limit:
            return sequence, 0
        what = f"{len(sequence.ids)} tokens in {len(steps)} steps"
        if self.too_long == "drop_oldest_steps" and self.recipe.stepwise and len(steps) > 1:

            def shorter(left_out: int) -> Encoded:
                return self.recipe.encode(self.tokenizer, question, steps[left_out:])

            left_out = bisect_left(range(len(steps)), True, 1, key=lambda n: len(shorter(n).ids) <= limit)
            if left_out < len(steps):
                return shorter(left_out), left_out
            what += f", and {len(shorter(len(steps) - 1).ids)} with the last step alone"
        return fail(name, f"at most {limit} tokens with its question, the context of the model", what)

    def tree_models(self, max_tokens: int) -> list:
        """A TreeModel with a KV tree of its own for the model, and one for the reference where there is one."""
        from tts_kernels.integrations.transformers_tree import TreeModel

        pages = -(-max_tokens // self.page_size)
        return [
            TreeModel(model, num_pages=pages, page_size=self.page_size, backend=self.backend) for model in self.models
        ]

    def _kept_trees(self) -> list:
        from tts_kernels.integrations.transformers_attention import lock_of

        with lock_of(self.models[0]):  # of two first calls in two threads one makes them
            if self._trees is None:
                self._trees = self.tree_models(self.max_tokens)
        return self._trees

    def _steps(self, sequences: list[Encoded], offsets: Tensor) -> tuple[StepScores, int]:
        packed = pack([s.ids for s in sequences], step_ends=[s.positions for s in sequences], device=self.device)
        rows, positions = packed.step_rows.unique(return_inverse=True)
        (model,), states = self._kept_trees(), []
        with model.switched(), closing(packed_forwards(model, packed, self.chunk_tokens)) as stream:
            for _ in gather(stream, rows, states):
                pass
        states = torch.cat(states) if states else torch.empty(0, self.head.dim, device=self.device)
        return step_scores(states, positions, self.head, offsets=offsets, backend=self.backend), len(packed.tokens)

    def _rewards(self, sequences: list[Encoded], offsets: Tensor) -> tuple[StepScores, int]:
        packed = pack_responses(sequences, self.device)
        rewards = packed_rewards(self._kept_trees(), self.head, packed, sequences, self.chunk_tokens, self.backend)
        scores = aggregate(rewards, offsets=offsets, activation="identity", backend=self.backend)
        return scores, len(packed.tokens)
