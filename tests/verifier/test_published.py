"""Each recipe against its family's published code path, text in and scores out: the backbone alone, a Verifier, and a
session."""

from itertools import pairwise

import pytest
import torch

pytest.importorskip("transformers")

import verifier_published as published

from tts_kernels.scoring import step_scores, token_logprobs
from tts_kernels.verifier.recipes import RECIPES
from tts_kernels.verifier.verifier import Verifier

FAMILIES = sorted(RECIPES)
STEPWISE = [name for name in FAMILIES if RECIPES[name].stepwise]

# Candidates of several lengths, of one step and of many; some begin alike. Punctuation and digits in front of the tags,
# where byte-level tokenizers merge; letters of several bytes.
QUESTIONS = ["What is 12 + 4?", "Prove that $x^2 \\geq 0$ for every real x.", "Où est la moitié de 84 = 2·42"]
OUTPUTS = [
    ["Step 1: 12 + 4 is 16.\n\nso the solution is 16", "Step 1: 12 + 4 is 16.\n\nThe answer: 17!", "16"],
    [
        "Squares are positive.\n\nLet $x = -3$; then 9 > 0.\n\nAlso zero: 0^2 = 0\n\nDone (QED).\n\nYes.",
        "No, 不对。\n\n好",
    ],
    ["Divisons: 84 / 2 = 42.\n\n42 ✓\n\n42 ✓\n\n42 ✓\n\nC'est 42"],
]
# Lines are Skywork's steps.
LINES = [[output.replace("\n\n", "\n") for output in outputs] for outputs in OUTPUTS]
# A generative verifier's critique stands behind the solution; one ends with its verdict, one asks without an answer.
CRITIQUES = ["", "<think>It says 17: no.\nIs the solution correct? No", "<think>Let me see. 16 is right"]
JUDGED = [[o + CRITIQUES[i % 3] for i, o in enumerate(outputs)] for outputs in OUTPUTS]


def texts_for(family):
    return {"skywork-o1-prm": LINES, "thinkprm": JUDGED}.get(family, OUTPUTS)


@pytest.fixture(scope="module")
def expected(checkpoint):
    """[question][candidate][step] by the family's published code path."""
    known = {}

    def of(family):
        if family not in known:
            known[family] = published.score(family, checkpoint(family), QUESTIONS, texts_for(family))
        return known[family]

    return of


@pytest.fixture(scope="module")
def verifier(checkpoint):
    """A family's Verifier, loaded from its checkpoint when it is first asked for."""
    loaded = {}

    def of(family):
        if family not in loaded:
            path = checkpoint(family)
            reference = path.parent / "reference" if RECIPES[family].implicit else None
            loaded[family] = Verifier.from_pretrained(path, family, reference=reference)
        return loaded[family]

    return of


def assert_same(scores, expected):
    assert [[len(c) for c in of_one] for of_one in scores] == [[len(c) for c in of_one] for of_one in expected]
    flat = [[torch.tensor(c) for of_one in s for c in of_one] for s in (scores, expected)]
    torch.testing.assert_close(torch.cat(flat[0]), torch.cat(flat[1]), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_published_scores_tell_steps_apart(family, expected):
    """Otherwise the comparisons below could pass for reading another place."""
    values = sorted(p for of_one in expected(family) for c in of_one for p in c)
    assert values[-1] - values[0] > 0.02
    close = sum(b - a < 1e-4 for a, b in pairwise(values))
    assert close <= 2  # candidates that begin alike


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_encode_and_head(family, verifier, expected):
    """The backbone alone on one sequence at a time, and the head on the rows that the recipe names."""
    recipe, loaded = RECIPES[family], verifier(family)
    scores = []
    for question, outputs in zip(QUESTIONS, texts_for(family)):
        scores.append([])
        for output in outputs:
            encoded = recipe.encode(loaded.tokenizer, question, recipe.split(output))
            run = implicit_rewards if recipe.implicit else head_scores
            scores[-1].append(run(loaded, encoded))
    assert_same(scores, expected(family))


def head_scores(loaded, encoded):
    hidden = loaded.models[0](torch.tensor([encoded.ids])).last_hidden_state[0]
    offsets = torch.tensor([0, len(encoded.positions)])
    return step_scores(hidden, torch.tensor(encoded.positions), loaded.head, offsets=offsets).prob.tolist()


def implicit_rewards(loaded, encoded):
    ids, begin = torch.tensor(encoded.ids), encoded.response
    logprobs = []
    for model, weight in zip(loaded.models, loaded.head.weights):
        hidden = model(ids[None]).last_hidden_state[0]
        logprobs.append(token_logprobs(hidden[begin - 1 : -1], weight, ids[begin:]))
    return loaded.head.ratio(logprobs).cumsum(0)[torch.tensor(encoded.positions) - begin].float().tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_verifier(family, verifier, expected):
    """Everything: several questions with several candidates, packed into one tree."""
    assert_same(verifier(family).score(QUESTIONS, texts_for(family)), expected(family))


@pytest.mark.parametrize("family", STEPWISE)
def test_session(family, verifier, expected):
    output = texts_for(family)[1][0]
    session, node = verifier(family).session(QUESTIONS[1]), 0
    for step in RECIPES[family].split(output):
        (node,) = session.extend([node], [step]).nodes
    assert_same([[session.scores([node]).prob.tolist()]], [[expected(family)[1][0]]])
