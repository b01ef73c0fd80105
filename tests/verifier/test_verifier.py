"""One-shot scoring against the scores of each candidate worked out alone: shared beginnings of every kind, memory for
one path or for all, forwards of many sizes, every kind of score."""

from __future__ import annotations

import dataclasses
import math
import random
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from verifier_cases import HEADS, TOKENIZER, Characters, make, scores_alone, texts

import tts_kernels as tts
from tts_kernels import OutOfPages, ScoreHead, seeded
from tts_kernels.verifier import RECIPES, Encoded, Verifier
from tts_kernels.verifier.layouts import Whole

CLOSE = {"abs": 2e-5, "rel": 2e-4}
TIED = "math-shepherd"
OUTCOME = dataclasses.replace(RECIPES["sequence-classifier"], layout=Whole(chat=False))


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def batch(seed: int) -> tuple[list[str], list[list[str]]]:
    """Questions that begin alike, one without candidates; candidates that share steps and parts of steps, equal ones,
    empty ones, and one whose only step is empty of letters."""
    rng = random.Random(seed)
    questions = ["what is it", "what is one", texts(rng, 1, 9), "nothing"]
    outputs = []
    for _ in questions[:-1]:
        shared = [texts(rng, 1, 12) for _ in range(3)]
        steps = [shared[: rng.randint(0, 3)] + [texts(rng, 1, 20) for _ in range(rng.randint(0, 3))] for _ in range(5)]
        candidates = ["|".join(of_one) for of_one in steps]
        outputs.append([*candidates, candidates[0], "", "|".join(shared)])
    return questions, [*outputs, []]


@pytest.mark.parametrize("max_tokens, chunk_tokens", [(4096, 4096), (4096, 17), (220, 50), (220, 1)])
@pytest.mark.parametrize("kind", HEADS)
def test_scores_of_every_candidate(kind, max_tokens, chunk_tokens):
    verifier = make(kind, page_size=4, max_tokens=max_tokens, chunk_tokens=chunk_tokens)
    questions, outputs = batch(chunk_tokens)
    if chunk_tokens == 1:  # a forward for each token: those of one question
        questions, outputs = questions[:1], outputs[:1]
    got = verifier.score(questions, outputs)
    assert [len(candidates) for candidates in got] == [8, 8, 8, 0][: len(questions)]
    for question, candidates, scores in zip(questions, outputs, got):
        for output, of_one in zip(candidates, scores):
            assert of_one == pytest.approx(scores_alone(verifier, question, verifier.recipe.split(output)), **CLOSE)
        if scores:
            assert scores[5] == scores[0] and scores[6] == []
    for model in verifier._kept_trees():
        assert model.kv.free_pages == model.kv.num_pages


def test_score_batch():
    verifier = make("softmax")
    scores = verifier.score_batch(["good", "god"], [["ab|c", ""], ["ab"]])
    flat = [
        s for of_question in verifier.score(["good", "god"], [["ab|c", ""], ["ab"]]) for c in of_question for s in c
    ]
    assert scores.prob.tolist() == flat and len(flat) == 3
    assert scores.offsets.tolist() == [0, 2, 2, 3]
    assert scores.count.tolist() == [2, 0, 1] and scores.dropped.tolist() == [0, 0, 0]
    assert scores.tokens == 1 + 2 + len("od|ab|c|".replace("|", "")) + 2 + len("d") + len("ab") + 1
    assert scores.min[0] == scores.prob[:2].min() and scores.last[2] == scores.prob[2]
    assert scores.min[1].isnan()
    assert scores.prob.tolist() == pytest.approx(torch.sigmoid(scores.margin).tolist(), abs=1e-7)


def test_every_distinct_token_goes_through_the_model_once(monkeypatch):
    verifier = make("softmax", page_size=4, max_tokens=160, chunk_tokens=30)
    questions, outputs = batch(0)
    seen = []
    forward = verifier._kept_trees()[0].decoder.forward
    monkeypatch.setattr(
        verifier._kept_trees()[0].decoder,
        "forward",
        lambda **k: (seen.append(k["input_ids"].shape[1]), forward(**k))[1],
    )
    scores = verifier.score_batch(questions, outputs)
    distinct = {
        tuple(ids[:end])
        for question, candidates in zip(questions, outputs)
        for output in candidates
        for ids in [verifier.recipe.encode(TOKENIZER, question, verifier.recipe.split(output)).ids]
        for end in range(1, len(ids) + 1)
    }
    assert sum(seen) == len(distinct) == scores.tokens
    assert max(seen) <= 30


def test_candidates_as_lists_of_steps():
    verifier = make()
    wanted = verifier.score(["good"], [["abc|d", "e"]])
    assert verifier.score(["good"], [[["abc", "d"], "e"]]) == wanted
    assert verifier.score(["good"], [[("a|b",), []]])[0][0] == pytest.approx(scores_alone(verifier, "good", ["a|b"]))


def test_no_candidates_at_all():
    verifier = make()
    assert verifier.score([], []) == []
    assert verifier.score(["a", "b"], [[], []]) == [[], []]
    assert verifier.score(["a"], [["", ""]]) == [[[], []]]


def test_five_hundred_steps():
    verifier = make("sigmoid", recipe={"context": 4000})
    steps = [chr(ord("a") + i % 26) for i in range(500)]
    verifier.models[0].config.max_position_embeddings = 4000
    (scores,) = verifier.score(["good"], [["|".join(steps)]])[0]
    assert len(scores) == 500
    assert scores == pytest.approx(scores_alone(verifier, "good", steps), **CLOSE)


def test_threads():
    """Scores and sessions of one model in several threads, each on its own texts."""
    verifier = make("sigmoid", page_size=4)
    rng = random.Random(0)
    jobs = [(texts(rng, 5, 20), [texts(rng, 1, 12) for _ in range(6)]) for _ in range(12)]
    wanted = [scores_alone(verifier, *job) for job in jobs]

    def by_session(question: str, steps: list[str]) -> list[float]:
        with verifier.session(question) as session:
            node = session.root
            for step in steps:
                (node,) = session.extend([node], [step]).nodes
            return session.scores([node]).prob.tolist()

    ways = [lambda question, steps: verifier.score([question], [[steps]])[0][0], by_session]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda i: ways[i % 2](*jobs[i // 2 % len(jobs)]), range(4 * len(jobs))))
    for i, scores in enumerate(got):
        assert scores == pytest.approx(wanted[i // 2 % len(jobs)], **CLOSE)


def test_first_calls_in_several_threads_make_one_tree(monkeypatch):
    verifier = make("sigmoid")
    made, tree_models = [], verifier.tree_models
    both = threading.Barrier(2)

    def slow(max_tokens):
        made.append(max_tokens)
        try:
            both.wait(0.5)  # for as long the other one may come here too
        except threading.BrokenBarrierError:
            return tree_models(max_tokens)

    monkeypatch.setattr(verifier, "tree_models", slow)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: verifier._kept_trees(), range(2))
    assert first is second and len(made) == 1


@pytest.mark.parametrize("kind, op", [("softmax", "gather"), ("implicit", "token_logprobs")])
def test_an_error_behind_the_model_leaves_no_kv(kind, op, monkeypatch):
    verifier = make(kind)
    before = verifier.score(["good"], [["abc|d"]])
    module = {"gather": "verifier.verifier", "token_logprobs": "verifier.implicit"}[op]

    def fails(states, *args, **_):
        for _ in states if op == "gather" else ():
            raise ZeroDivisionError
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(f"tts_kernels.{module}.{op}", fails)
        with pytest.raises(ZeroDivisionError) as caught:
            verifier.score(["good"], [["abc|d"]])
    assert caught.tb is not None  # and all frames are still alive
    assert all(tree.kv.free_pages == tree.kv.num_pages for tree in verifier._kept_trees())
    assert verifier.score(["good"], [["abc|d"]]) == before


# --- the context ------------------------------------------------------------------------------------------------------


def test_too_long_is_an_error_by_default():
    verifier = make(recipe={"context": 12})
    verifier.score(["good"], [["abcdef"]])
    with pytest.raises(
        ValueError, match=r"outputs\[0\]\[1\]: expected at most 12 tokens with its question, .*, got 13 tok"
    ):
        verifier.score(["good"], [["a", "abc|def"]])


def test_the_model_s_own_limit_counts_too():
    verifier = make()
    verifier.models[0].config.max_position_embeddings = 9
    assert verifier.context == 9
    with pytest.raises(ValueError, match="at most 9 tokens"):
        verifier.score(["good"], [["abcd"]])


def test_dropping_the_oldest_steps():
    verifier = make(recipe={"context": 12}, too_long="drop_oldest_steps")
    with pytest.warns(UserWarning, match=r"first steps left out .*: outputs\[0\]\[1\]: 2$"):
        scores = verifier.score(["good"], [["a|b", "abc|d|ef|gh", "abcdef"]])[0]
    assert [math.isnan(s) for s in scores[1]] == [True, True, False, False]
    assert scores[1][2:] == pytest.approx(scores_alone(verifier, "good", ["ef", "gh"]), abs=2e-6)
    assert scores[0] == pytest.approx(scores_alone(verifier, "good", ["a", "b"]), abs=2e-6)
    with pytest.warns(UserWarning, match="first steps left out"):
        batch = verifier.score_batch(["good"], [["a|b", "abc|d|ef|gh"]])
    assert batch.dropped.tolist() == [0, 2] and batch.count.tolist() == [2, 2]
    with pytest.raises(ValueError, match=r"got 16 tokens in 2 steps, and 14 with the last step alone"):
        verifier.score(["good"], [["a|abcdefgh"]])


def test_recipes_for_whole_answers_drop_nothing():
    verifier = make(recipe={"context": 12, "stepwise": False}, too_long="drop_oldest_steps")
    with pytest.raises(ValueError, match="expected at most 12 tokens"):
        verifier.score(["good"], [["abc|d|ef|gh"]])


# --- models in memory -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, recipe, labels", [("TokenClassification", "trl-trainer", 2), ("CausalLM", TIED, 0),
                                                  ("SequenceClassification", OUTCOME, 1)])  # fmt: skip
def test_models_with_heads_of_their_own(name, recipe, labels):
    """Heads by their names in the model; what is tied has one."""
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
             "num_attention_heads": 2, "num_key_value_heads": 1, "bos_token_id": None, "eos_token_id": None,
             "pad_token_id": None, "tie_word_embeddings": recipe == TIED}  # fmt: skip
    torch.manual_seed(0)
    config = transformers.Qwen2Config(**sizes, num_labels=labels or 2)
    model = getattr(transformers, f"Qwen2For{name}")(config).eval()
    tokenizer = seeded.tokenizer(300)
    verifier = Verifier(model, tokenizer, recipe)
    steps = ["aa", "bb"] if verifier.recipe.stepwise else ["aa bb"]
    got = verifier.score(["cc dd"], [[steps]])[0][0]
    encoded = verifier.recipe.encode(tokenizer, "cc dd", steps)
    with torch.no_grad():
        if recipe == OUTCOME:
            states = model.model(torch.tensor([encoded.ids])).last_hidden_state
            wanted = model.score(states)[0, encoded.positions, 0]
        else:
            logits = model(torch.tensor([encoded.ids])).logits[0, encoded.positions]
            columns = [1, 0] if labels else [tokenizer.convert_tokens_to_ids(c) for c in "+-"]
            wanted = logits[:, columns].softmax(-1)[:, 0]
    assert got == pytest.approx(wanted.tolist(), abs=1e-5)


def test_a_backbone_has_no_head():
    with pytest.raises(ValueError, match=r"tensor lm_head.weight, .*, got one with embed_tokens.weight, norm.weight$"):
        Verifier(make().models[0].model, seeded.tokenizer(96), "math-shepherd")


def test_an_implicit_reward_needs_a_token_to_begin_with():
    class NoPrompt(Characters):
        def encode(self, tokenizer, question, steps):
            ids, positions, response = super().encode(tokenizer, question, steps)
            return Encoded(ids[1:], [p - 1 for p in positions], response - 1)

    verifier = make("implicit", layout=NoPrompt())
    for call in (lambda: verifier.score([""], [["ab"]]), lambda: verifier.session("")):
        with pytest.raises(ValueError, match=r"expected a question of at least one token, .*, got none"):
            call()
    assert len(make(layout=NoPrompt()).session("").extend([0], ["ab"]).prob) == 1


# --- bad input --------------------------------------------------------------------------------------------------------


def test_no_room_for_one_candidate():
    verifier = make(page_size=4, max_tokens=16)
    with pytest.raises(OutOfPages, match=r"max_tokens: expected more than 16: .*; the longest candidate has 18 tokens"):
        verifier.score(["good"], [["abc", "abcdefghijkl"]])
    tree = verifier._kept_trees()[0].kv
    assert tree.free_pages == tree.num_pages
    assert len(verifier.score(["good"], [["abc"]])[0][0]) == 1


def test_bad_input():
    verifier = make()
    for call, error, message in [
        (lambda: verifier.score("good", [["a"]]), TypeError, "questions: expected a list of texts, got 'str'"),
        (lambda: verifier.score([3], [["a"]]), TypeError, r"questions\[0\]: expected a text, got int"),
        (lambda: verifier.score(["a"], []), ValueError, "outputs: expected 1 lists of candidates"),
        (lambda: verifier.score(["a"], ["b"]), TypeError, r"outputs\[0\]: expected a list of texts, got 'str'"),
        (lambda: verifier.score(["a"], [["b", None]]), TypeError, r"outputs\[0\]\[1\]: expected a list of texts, got"),
        (lambda: verifier.score(["a"], [[["b", 3]]]), TypeError, r"outputs\[0\]\[0\]\[1\]: expected a text, got int"),
        (lambda: make(max_tokens=0), ValueError, "max_tokens: expected at least 1"),
        (lambda: make(chunk_tokens=0), ValueError, "chunk_tokens: expected at least 1"),
        (lambda: make(page_size=2.0), TypeError, "page_size: expected"),
        (lambda: make(too_long="shrug"), ValueError, "too_long: expected one of error, drop_oldest_steps, got 'shrug'"),
        (lambda: Verifier(verifier.models[0], TOKENIZER, "no such recipe"), ValueError, "recipe: expected"),
        (lambda: remade(verifier, reference=verifier.models[0]), ValueError, "reference: expected None"),
        (lambda: remade(make("implicit"), reference=None), ValueError, "reference: expected the reference model"),
        (lambda: remade(verifier, head=make("implicit").head), TypeError, "head: expected one that suits recipe"),
        (lambda: remade(verifier, model=3), TypeError, "model: expected a transformers model, got int"),
        (
            lambda: remade(verifier, head=ScoreHead.linear(torch.ones(2, 63))),
            ValueError,
            "head: expected one for hidden",
        ),
    ]:
        with pytest.raises(error, match=message):
            call()


def remade(verifier: Verifier, *, model=None, **changes) -> Verifier:
    given = {"head": verifier.head, "reference": None, **changes}
    return Verifier(verifier.models[0] if model is None else model, TOKENIZER, verifier.recipe, **given)


def test_public_names_and_an_import_without_transformers():
    assert tts.Verifier is Verifier
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import tts_kernels as tts\n"
        "from tts_kernels.verifier import loading\n"
        "assert 'peft' not in sys.modules\n"
        "print(len(tts.verifier.RECIPES) > 5, tts.Verifier.__name__)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["True", "Verifier"]
