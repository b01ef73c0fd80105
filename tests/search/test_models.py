"""Searches on tiny seeded transformers models, policy and verifier. What is kept and chosen is tested on scripted steps
in the other files; here: that both trees hold what they say and that scores are those of one shot."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

pytest.importorskip("transformers")

import search_models as models
import transformers
from search_models import TAG

from tts_kernels import ScoreHead, pack
from tts_kernels.search import beam_search, best_of_n, dvts, majority, weighted_vote
from tts_kernels.verifier import Verifier
from tts_kernels.verifier.layouts import Tagged
from tts_kernels.verifier.recipe import HeadSpec, Recipe

QUESTION = "How many pears, " + TAG + ", are 3 pears?"
LINES = Recipe(
    "lines",
    "this test",
    Tagged(TAG, lead=" ", link=" "),
    HeadSpec("linear", ("w", "b"), 2, 1, "softmax"),
    aggregate="min",
    split_on="e",
)
SEARCHES = {
    "beam_search": (beam_search, {"width": 2, "expand": 3, "depth": 4, "stop": "e"}),
    "dvts": (dvts, {"width": 2, "expand": 3, "depth": 4, "stop": "e", "until": "Z"}),
    "best_of_n": (best_of_n, {"n": 6}),
    "weighted_vote": (weighted_vote, {"n": 6}),
    "majority": (majority, {"n": 6}),
}
SETTINGS = {"max_new_tokens": 24, "temperature": 1.2, "answer": lambda text: text[-1:] or None}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def policy():
    return models.policy(ends=True, page_size=4, tokenizer=models.short_steps())


def make_verifier(recipe=LINES, **settings) -> Verifier:
    model = models.build("qwen3", max_position_embeddings=512).model
    torch.manual_seed(1)
    head = ScoreHead.linear(torch.randn(2, 64), torch.randn(2), activation="softmax", positive=1)
    return Verifier(model, models.characters(), recipe, head=head, page_size=4, **settings)


@pytest.fixture(scope="module")
def verifier():
    return make_verifier()


def run(name, policy, verifier, **more):
    search, settings = SEARCHES[name]
    free = policy.kv.free_pages
    arguments = (policy, QUESTION) if search is majority else (policy, verifier, QUESTION)
    result = search(*arguments, **{**settings, **SETTINGS, **more})
    assert policy.kv.free_pages == free
    return result


def without_seconds(result):
    cost = {k: v for k, v in dataclasses.asdict(result.cost).items() if not k.endswith("seconds")}
    return {**result.to_dict(), "cost": cost}


@pytest.mark.parametrize("name", SEARCHES)
def test_the_same_seed_gives_the_same_result(name, policy, verifier):
    first, again, other = (run(name, policy, verifier, seed=seed) for seed in (3, 3, 4))
    assert without_seconds(first) == without_seconds(again)
    assert [c.text for c in first.candidates] != [c.text for c in other.candidates]
    assert 0 <= first.choice < len(first.candidates) == 6
    assert len({c.text for c in first.candidates}) > 2
    assert {c.reason for c in first.candidates} <= {"eos", "length", "stop"}
    assert all((c.reason == "eos") == c.ended for c in first.candidates)


@pytest.mark.parametrize("name", ["beam_search", "dvts", "best_of_n"])
@pytest.mark.parametrize("reduce", ["last", "min", "log_prod"])
def test_scores_are_those_of_one_shot(name, reduce, policy, verifier):
    result = run(name, policy, verifier, reduce=reduce)
    texts = [c.text for c in result.candidates]
    assert max(len(c.steps) for c in result.candidates) > 3 or name == "best_of_n"
    (scores,) = verifier.score([QUESTION], [texts])
    for candidate, expected in zip(result.candidates, scores):
        assert candidate.steps == tuple(LINES.split(candidate.text))
        assert candidate.step_scores == pytest.approx(expected, abs=1e-5)
    aggregates = getattr(verifier.score_batch([QUESTION], [texts]), reduce)
    torch.testing.assert_close(
        torch.tensor([c.score for c in result.candidates]), aggregates, equal_nan=True, atol=1e-4, rtol=1e-4
    )
    assert result.chosen.score == max(c.score for c in result.candidates if not math.isnan(c.score))


def test_every_distinct_token_is_encoded_once(policy, verifier, monkeypatch):
    extended = []

    def session(question, **settings):
        made = type(verifier).session(verifier, question, **settings)
        extend = made.extend

        def recording(parents, steps):
            extended.extend([*made.steps(parent), step] for parent, step in zip(parents, steps))
            return extend(parents, steps)

        made.extend = recording
        return made

    monkeypatch.setattr(verifier, "session", session)
    for name in ("beam_search", "dvts"):
        extended.clear()
        result = run(name, policy, verifier)
        paths = {tuple(path[:k]) for path in extended for k in range(len(path) + 1)}
        lengths = {path: len(LINES.encode(verifier.tokenizer, QUESTION, path).ids) for path in paths}
        assert result.cost.verifier_tokens == lengths[()] + sum(lengths[p] - lengths[p[:-1]] for p in paths if p)
        assert result.cost.verifier_tokens < sum(lengths[tuple(path)] for path in extended) / 3
    result = run("best_of_n", policy, verifier)
    encoded = [LINES.encode(verifier.tokenizer, QUESTION, c.steps).ids for c in result.candidates]
    assert result.cost.verifier_tokens == len(pack(encoded).tokens)


def test_the_prompt_is_computed_once(policy, verifier):
    for name in SEARCHES:
        result = run(name, policy, verifier)
        prompt = len(policy.tokenizer(QUESTION).input_ids)
        assert result.cost.prompt_tokens == prompt
        # the last token of a step is computed only if the step is continued
        assert prompt < result.cost.policy_tokens <= prompt + result.cost.new_tokens
    assert result.cost.new_tokens == sum(c.tokens for c in result.candidates)
    assert result.cost.policy_tokens == prompt + result.cost.new_tokens - 6


def test_little_room_for_the_verifier(policy, verifier):
    """The session encodes anew what it had to let go of; the scores stay."""
    small = make_verifier(max_tokens=256)
    few, many = (run("beam_search", policy, v, seed=8) for v in (small, verifier))
    assert [c.text for c in few.candidates] == [c.text for c in many.candidates]
    assert few.cost.verifier_tokens >= many.cost.verifier_tokens
    for a, b in zip(few.candidates, many.candidates):
        assert a.step_scores == pytest.approx(b.step_scores, abs=1e-5)


def test_a_verifier_of_whole_answers(policy):
    whole = dataclasses.replace(LINES, stepwise=False, split_on=None)
    outcome = make_verifier(whole)
    result = run("best_of_n", policy, outcome)
    assert all(len(c.steps) == len(c.step_scores) == 1 for c in result.candidates)
    for search in ("beam_search", "dvts"):
        with pytest.raises(
            ValueError, match=r"^verifier: expected one whose recipe scores step after step, got recipe"
        ):
            run(search, policy, outcome)


def test_steps_beyond_the_verifiers_context(policy):
    """Left out by the verifier where it may: then the record holds those that have scores."""
    short = make_verifier(dataclasses.replace(LINES, context=60), too_long="drop_oldest_steps")
    with pytest.warns(UserWarning, match="first steps left out"):
        result = run("best_of_n", policy, short)
    steps = [LINES.split(c.text) for c in result.candidates]
    assert all(len(c.steps) == len(c.step_scores) for c in result.candidates)
    assert [list(c.steps) for c in result.candidates] == [
        s[len(s) - len(c.steps) :] for s, c in zip(steps, result.candidates)
    ]
    assert any(len(c.steps) < len(s) for s, c in zip(steps, result.candidates))
    with pytest.warns(UserWarning, match="first steps left out of a path"):
        result = run("beam_search", policy, short, depth=8)
    assert all(len(c.steps) == len(c.step_scores) for c in result.candidates)
    with pytest.raises(ValueError, match=r"^steps\[\d+\]: expected at most 60 tokens with its question"):
        run("beam_search", policy, make_verifier(dataclasses.replace(LINES, context=60)), depth=8)


def test_a_full_policy_tree_leaves_nothing_behind(verifier):
    policy = models.policy(page_size=4, max_tokens=160)
    with pytest.raises(RuntimeError, match=r"^max_tokens: expected room for all that is sampled at once, got 160"):
        beam_search(policy, verifier, QUESTION, width=4, expand=4, stop="e", max_new_tokens=100)
    assert policy.kv.free_pages == 40


BAD = [
    ({"question": 7}, TypeError, "question: expected a string, or a list of strings, got 7"),
    ({"width": 0}, ValueError, "width: expected at least 1, got 0"),
    ({"expand": 0}, ValueError, "expand: expected at least 1, got 0"),
    ({"expand": 2.0}, TypeError, "expand: expected an int, got 2.0"),
    ({"depth": 0}, ValueError, "depth: expected at least 1, got 0"),
    ({"stop": ""}, ValueError, "stop: expected strings that are not empty, or None, got ''"),
    ({"stop": None}, TypeError, "stop: expected a string or a list of strings: they end a step, got None"),
    ({"seed": "x"}, TypeError, "seed: expected an int, got 'x'"),
    ({"temperature": -0.1}, ValueError, "temperature: expected at least 0 and finite, got -0.1"),
    ({"reduce": "sum"}, ValueError,
     "reduce: expected one of last, min, prod, mean, max, log_prod, or None, got 'sum'"),
    ({"answer": "x"}, TypeError, "answer: expected a function, got 'x'"),
    ({"canonical": None}, TypeError, "canonical: expected a function, got None"),
    ({"progress": "yes"}, TypeError, "progress: expected True, False or None, got 'yes'"),
]  # fmt: skip


@pytest.mark.parametrize("search", [beam_search, dvts])
@pytest.mark.parametrize("arguments, error, text", BAD, ids=[text for _, _, text in BAD])
def test_bad_input(search, arguments, error, text, policy, verifier):
    arguments = {"question": QUESTION, "width": 2, "expand": 2, **arguments}
    free, computed = policy.kv.free_pages, policy.tokens_computed
    with pytest.raises(error) as raised:
        search(policy, verifier, **arguments)
    assert str(raised.value) == text
    assert policy.kv.free_pages == free and policy.tokens_computed == computed


def test_bad_input_of_one_search(policy, verifier):
    with pytest.raises(ValueError, match=r"^n: expected at least 1, got 0$"):
        majority(policy, QUESTION, n=0)
    with pytest.raises(TypeError, match=r"^filter_duplicates: expected a bool, got 1$"):
        beam_search(policy, verifier, QUESTION, width=1, expand=1, filter_duplicates=1)
    for until, error in (("", ValueError), (3, TypeError)):
        with pytest.raises(error, match=r"^until: expected a string that is not empty, or None, got "):
            dvts(policy, verifier, QUESTION, width=1, expand=1, until=until)
    known = "max_new_tokens, temperature, top_p, top_k, seed, reduce, answer, canonical, progress"
    for name, call in {
        "best_of_n": lambda **more: best_of_n(policy, verifier, QUESTION, n=1, **more),
        "weighted_vote": lambda **more: weighted_vote(policy, verifier, QUESTION, n=1, **more),
        "majority": lambda **more: majority(policy, QUESTION, n=1, **more),
        "beam_search": lambda **more: beam_search(policy, verifier, QUESTION, width=1, expand=1, **more),
        "dvts": lambda **more: dvts(policy, verifier, QUESTION, width=1, expand=1, **more),
    }.items():
        with pytest.raises(TypeError, match=rf"^{name}: expected its own arguments and {known}, got seeds$"):
            call(seeds=3)


def test_a_stock_model_agrees(policy):
    """majority of one greedy sample is what stock generate says."""
    result = majority(policy, QUESTION, n=1, temperature=0, max_new_tokens=20, answer=str)
    model = models.build("qwen2")
    ids = policy.tokenizer(QUESTION, return_tensors="pt").input_ids
    ends = transformers.GenerationConfig(max_new_tokens=20, do_sample=False, eos_token_id=models.ENDS, pad_token_id=0)
    out = model.generate(ids, generation_config=ends)[0, ids.shape[1] :]
    assert result.candidates[0].text == policy.tokenizer.decode(out, skip_special_tokens=True)
    assert result.candidates[0].tokens == len(out)
