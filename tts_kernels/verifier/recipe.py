"""What a recipe is: how a family of verifiers makes tokens of a question and steps, and which head reads which of them.

A recipe holds no model and no tokenizer. `recipes.py` has those of published families, `loading.py` applies the head's
half to a checkpoint on disk.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from tts_kernels.scoring.heads import ACTIVATIONS, ACTS
from tts_kernels.scoring.results import REDUCES
from tts_kernels.tree.checks import check_int, fail

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tts_kernels.scoring import ScoreHead

    from .implicit import ImplicitHead

KINDS = {"mlp": (4,), "linear": (1, 2), "vocab_rows": (1, 2), "implicit": (1,)}  # how many tensors each takes


class Encoded(NamedTuple):
    """A question and steps as a family's own code tokenises them.

    ids         token ids, cut right behind the last token that is read: what follows cannot change a causal model's
                scores. Without steps: the prompt's
    positions   ascending, for each step the index in `ids` of the token whose hidden state is read. Implicit rewards:
                of the last token whose log-probability counts for the step
    response    index of the first token that belongs to the response; implicit rewards are summed from there
    """

    ids: list[int]
    positions: list[int]
    response: int


class Layout(Protocol):
    """How text becomes tokens; see layouts.py."""

    def encode(self, tokenizer: PreTrainedTokenizerBase, question: str, steps: Sequence[str]) -> Encoded: ...


@dataclass(frozen=True)
class HeadSpec:
    """Which tensors of a checkpoint make the head, by their published names, and what is done with them.

    kind         "mlp": two layers. "linear": one. "vocab_rows": rows of the LM head. "implicit": the whole LM heads of
                 two models
    tensors      mlp: w1, b1, w2, b2. linear: w, or w and b. vocab_rows: the LM head, or that and its bias. implicit:
                 the LM head
    columns      rows of the last matrix: what the activation sees. implicit: 0
    positive     the column that says "right"
    activation   "softmax", "sigmoid" or "identity"
    act          mlp: "relu" or "gelu"
    candidates   vocab_rows: texts, each a single token of the tokenizer, that become the columns in this order
    file         the file that holds the tensors, where it is not the checkpoint's own
    beta         implicit: what the log-ratio is multiplied by
    """

    kind: str
    tensors: tuple[str, ...]
    columns: int
    positive: int
    activation: str
    act: str = ""
    candidates: tuple[str, ...] = ()
    file: str = ""
    beta: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            fail("kind", f"one of {', '.join(KINDS)}", repr(self.kind))
        check_names("tensors", self.tensors)
        if len(self.tensors) not in KINDS[self.kind]:
            fail("tensors", f"{' or '.join(map(str, KINDS[self.kind]))} names for {self.kind}", self.tensors)
        if self.kind == "implicit":
            if not (isinstance(self.beta, (int, float)) and math.isfinite(self.beta) and self.beta > 0):
                fail("beta", "a number above 0", repr(self.beta))
            return
        if not 0 <= check_int("positive", self.positive, 0) < check_int("columns", self.columns, 1):
            fail("positive", f"a column in [0, {self.columns})", self.positive)
        if self.activation not in ACTIVATIONS:
            fail("activation", f"one of {', '.join(ACTIVATIONS)}", repr(self.activation))
        if self.act not in (ACTS if self.kind == "mlp" else ("",)):
            fail("act", f"one of {', '.join(ACTS)} for mlp, and none for others", repr(self.act))
        if self.kind == "vocab_rows":
            check_names("candidates", self.candidates)
        if len(self.candidates) != (self.columns if self.kind == "vocab_rows" else 0):
            fail("candidates", "a text for each column of vocab_rows, and none for others", self.candidates)


@dataclass(frozen=True)
class Recipe:
    """One family of verifiers. `dataclasses.replace` makes variants.

    name        what it is called in RECIPES
    source      where its scoring code was published
    layout      how text becomes tokens and positions (layouts.py)
    head        which tensors are read, and how
    aggregate   how a candidate's steps make one score by default: "last", "min", "prod", "mean", "max" or "log_prod"
    context     the most tokens that the published code passes to the model; None: the config's max_position_embeddings
    stepwise    a step's score depends on nothing behind it, and more steps only append tokens: sessions can extend
    split_on    where a candidate's text is cut into steps; None: nowhere
    """

    name: str
    source: str
    layout: Layout
    head: HeadSpec
    aggregate: str
    context: int | None = None
    stepwise: bool = True
    split_on: str | None = "\n\n"

    def __post_init__(self) -> None:
        check_names("name", (self.name,))
        check_names("source", (self.source,))
        if isinstance(self.layout, str) or not callable(getattr(self.layout, "encode", None)):
            fail("layout", "an object with encode(tokenizer, question, steps)", type(self.layout).__name__, TypeError)
        if not isinstance(self.head, HeadSpec):
            fail("head", "a HeadSpec", type(self.head).__name__, TypeError)
        if self.aggregate not in REDUCES:
            fail("aggregate", f"one of {', '.join(REDUCES)}", repr(self.aggregate))
        if self.context is not None:
            check_int("context", self.context, 1)
        if self.split_on is not None:
            check_names("split_on", (self.split_on,))

    @property
    def implicit(self) -> bool:
        """Scores are sums of log-ratios of two models, not a head's."""
        return self.head.kind == "implicit"

    def split(self, output: str | Sequence[str]) -> list[str]:
        """A candidate's text as steps: cut at `split_on`, without white space around them, none empty. A list of steps
        as it is."""
        if isinstance(output, (list, tuple)):
            return list(output)
        if not isinstance(output, str):
            fail("output", "a str or a list of steps", type(output).__name__, TypeError)
        if self.split_on is None:
            return [output]
        return [step.strip() for step in output.split(self.split_on) if step.strip()]

    def build_head(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, reference: PreTrainedModel | None = None
    ) -> ScoreHead | ImplicitHead:
        """The head from the tensors of a model in memory, by the names that `head` knows them by; implicit: from those
        of the reference too. Raises ValueError for a tensor that the model lacks."""
        from .loading import make_head

        return make_head(
            self, model.state_dict(), tokenizer, reference=None if reference is None else reference.state_dict()
        )

    def encode(self, tokenizer: PreTrainedTokenizerBase, question: str, steps: Sequence[str]) -> Encoded:
        """The tokens that the family's published code makes of the whole text, and where steps are read.

        Positions follow from how the text is made, never from a search for ids: a step tag inside of the question or of
        a step ends no step.

        Raises:
            TypeError: question or a step is no str, the tokenizer cannot tell which characters a token came from.
            ValueError: the tokenizer does not keep a step's tag apart, by the number of that step.
        """
        if not isinstance(question, str):
            fail("question", "a str", type(question).__name__, TypeError)
        if isinstance(steps, str) or not isinstance(steps, Sequence):
            fail("steps", "a list of str", type(steps).__name__, TypeError)
        for k, step in enumerate(steps):
            if not isinstance(step, str):
                fail(f"steps[{k}]", "a str", type(step).__name__, TypeError)
        if not getattr(tokenizer, "is_fast", False):
            fail("tokenizer", "a fast tokenizer of transformers", type(tokenizer).__name__, TypeError)
        return self.layout.encode(tokenizer, question, steps)


def check_names(argument: str, names: object) -> None:
    if not isinstance(names, tuple):
        fail(argument, "a tuple of str", type(names).__name__, TypeError)
    for name in names:
        if not isinstance(name, str):
            fail(argument, "str", type(name).__name__, TypeError)
        if not name:
            fail(argument, "text", repr(name))
