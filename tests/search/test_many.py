"""Several questions in one call: the results are those of each alone, in forwards that all share."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from search_fakes import FakePolicy, FakeVerifier, nothing_is_held, texts

from tts_kernels.search import SearchBatch, beam_search, best_of_n, dvts, majority, weighted_vote

# --- on scripts -------------------------------------------------------------------------------------------------------

SCRIPT = {
    "p": ["a\n\n", "b\n\n"], "pb\n\n": ["c\n\n", "d\n\n"], "pb\n\nd\n\n": ["e", "f"],
    "q": ["a\n\n", "end"], "qa\n\n": ["g", "h"],
}  # fmt: skip
SCORES = {
    "p/a": 0.1, "p/b": 0.6, "p/b/c": 0.2, "p/b/d": 0.9, "p/b/d/e": 0.3, "p/b/d/f": 0.8,
    "q/a": 0.9, "q/end": 0.2, "q/a/g": 0.7, "q/a/h": 0.5,
}  # fmt: skip


def test_searches_go_in_step_and_leave_when_they_are_done():
    policy, verifier = FakePolicy(SCRIPT), FakeVerifier(SCORES)
    batch = beam_search(policy, verifier, ["p", "q"], width=1, expand=2, depth=3)
    assert policy.calls == [
        (["p", "p", "q", "q"], ("\n\n",)),
        (["pb\n\n", "pb\n\n", "qa\n\n", "qa\n\n"], ("\n\n",)),
        (["pb\n\nd\n\n"] * 2, None),
    ]
    (session,) = verifier.sessions
    assert session.calls == 3 and not any(session.holds.values()) and nothing_is_held(policy, verifier)
    assert session.encoded == [
        ("p", "a"), ("p", "b"), ("q", "a"), ("q", "end"), ("p", "b", "c"), ("p", "b", "d"), ("q", "a", "g"),
        ("q", "a", "h"), ("p", "b", "d", "e"), ("p", "b", "d", "f"),
    ]  # fmt: skip
    first, second = batch
    assert texts(first) == ["b\n\nd\n\nf", "b\n\nd\n\ne"] and texts(second) == ["a\n\ng", "a\n\nh"]
    assert [result.question for result in batch] == ["p", "q"] and first.choice == second.choice == 0
    assert first.cost.new_tokens == 14 and second.cost.new_tokens == 8 and batch.cost.new_tokens == 22
    assert batch.cost.prompt_tokens == 2 and batch.cost.policy_tokens == 24


def test_what_a_search_holds_is_given_back_when_it_is_done():
    policy, verifier = FakePolicy(SCRIPT), FakeVerifier(SCORES)
    held = []
    sample = policy.sample_steps

    def recording(parents, **settings):
        held.append((sorted(policy.texts.values()), sum(verifier.sessions[0].holds.values()) if held else 0))
        return sample(parents, **settings)

    policy.sample_steps = recording
    beam_search(policy, verifier, ["p", "q"], width=1, expand=2, depth=3)
    assert held == [(["p", "q"], 0), (["pb\n\n", "qa\n\n"], 2), (["pb\n\nd\n\n"], 1)]


def test_an_error_gives_back_what_all_hold():
    policy, verifier = FakePolicy(SCRIPT), FakeVerifier({**SCORES, "p/b/d": "no number"})
    with pytest.raises((TypeError, ValueError)):
        beam_search(policy, verifier, ["p", "q"], width=1, expand=2, depth=3)
    assert nothing_is_held(policy, verifier)


def test_no_questions():
    policy, verifier = FakePolicy({}), FakeVerifier({})
    batch = best_of_n(policy, verifier, [], n=3)
    assert isinstance(batch, SearchBatch) and len(batch) == 0 and batch.cost.new_tokens == 0 and not policy.calls


def test_a_list_of_one_is_a_batch():
    policy, verifier = FakePolicy({"": ["a"]}), FakeVerifier({"a": 0.5})
    batch = best_of_n(policy, verifier, ["p"], n=2)
    assert isinstance(batch, SearchBatch) and texts(batch[0]) == ["a", "a"]


def test_record():
    policy, verifier = FakePolicy({"p": ["a"], "q": ["b"]}), FakeVerifier({"p/a": 0.5, "q/b": 0.25})
    batch = best_of_n(policy, verifier, ["p", "q"], n=2)
    read = json.loads(batch.to_json())
    assert [r["question"] for r in read["results"]] == ["p", "q"]
    assert read["cost"]["verifier_tokens"] == 4 and read["cost"]["seconds"] > 0
    told = {name for name, value in read["results"][1]["cost"].items() if value is not None}
    assert told == {"new_tokens"} and read["results"][1]["cost"]["new_tokens"] == 2


def test_votes_that_find_no_answer_name_the_questions():
    policy = FakePolicy({"p": ["is #42"], "q": [r"is \boxed{7}"], "r": ["is #1"]})
    with pytest.warns(UserWarning, match=r"in some of 2 candidates of question 0, 2, got boxed") as warned:
        batch = majority(policy, ["p", "q", "r"], n=2)
    assert len(warned) == 1 and warned[0].filename == __file__
    assert [result.choice for result in batch] == [-1, 0, -1]


@pytest.mark.parametrize("wrong, error", [
    (7, "question: expected a string, or a list of strings, got 7"),
    (["p", None], r"question\[1\]: expected a string, got None"),
])  # fmt: skip
def test_bad_questions(wrong, error):
    policy = FakePolicy({})
    with pytest.raises(TypeError, match=error):
        majority(policy, wrong, n=2)
    assert not policy.calls and not policy.texts


# --- on models --------------------------------------------------------------------------------------------------------

SIZES = {"vocab_size": 400, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
FEW_SHOTS = "A pump fills a tank in 3 hours. In one hour it fills a third of it.\n"
QUESTIONS = [FEW_SHOTS + text for text in ("How much in 2 hours?", "How long for two tanks?", "Why?", "In 2 hours?")]
OPTIONS = {"seed": 3, "max_new_tokens": 20, "temperature": 1.0, "progress": False, "answer": lambda text: text[-1:]}
SEARCHES = {
    "beam_search": (beam_search, {"width": 2, "expand": 3, "depth": 3}),
    "dvts": (dvts, {"width": 2, "expand": 2, "depth": 3, "until": "Z"}),
    "best_of_n": (best_of_n, {"n": 4}),
    "weighted_vote": (weighted_vote, {"n": 4}),
}


@pytest.fixture
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def models():
    pytest.importorskip("transformers")
    from tts_kernels import seeded
    from tts_kernels.verifier import Verifier

    tokenizer = seeded.tokenizer(SIZES["vocab_size"], " ".join(QUESTIONS))
    policy = seeded.causal_lm(0, step_tokens=6, **SIZES)
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "proj" in name:
                weight.mul_(6)  # or what it writes would hardly depend on the question
    return policy, tokenizer, Verifier(seeded.causal_lm(1, **SIZES), tokenizer, "math-shepherd")


def sides(models):
    from tts_kernels.search import Policy
    from tts_kernels.stock import StockPolicy, StockVerifier

    policy, tokenizer, verifier = models
    yield Policy(policy, tokenizer, max_tokens=8192, prompt=str), verifier
    yield StockPolicy(policy, tokenizer, prompt=str), StockVerifier(verifier)


@pytest.mark.parametrize("name", SEARCHES)
def test_the_results_are_those_of_each_question_alone(name, models, one_thread, monkeypatch):
    search, settings = SEARCHES[name]
    ours, stock = sides(models)
    free = ours[0].kv.free_pages
    alone = [search(*ours, question, **settings, **OPTIONS) for question in QUESTIONS]
    monkeypatch.setattr("tts_kernels.search.policy.PREFILL", 50)  # prompts in several forwards
    for policy, verifier in (ours, stock):
        batch = search(policy, verifier, QUESTIONS, **settings, **OPTIONS)
        for one, wanted in zip(batch, alone, strict=True):
            assert one.question == wanted.question and one.parameters == wanted.parameters
            assert [(c.text, c.steps, c.reason, c.tokens, c.answer) for c in one.candidates] == [
                (c.text, c.steps, c.reason, c.tokens, c.answer) for c in wanted.candidates
            ]
            for c, other in zip(one.candidates, wanted.candidates):
                assert c.step_scores == pytest.approx(other.step_scores, abs=1e-5)
            assert one.choice == wanted.choice and one.cost.new_tokens == wanted.cost.new_tokens
        if policy is ours[0]:
            assert policy.kv.free_pages == free
            shared = len(models[1](FEW_SHOTS.rstrip("\n"))["input_ids"])
            assert batch.cost.prompt_tokens <= sum(r.cost.prompt_tokens for r in alone) - 3 * shared
            # what the questions begin with goes through both models once
            assert batch.cost.verifier_tokens <= sum(r.cost.verifier_tokens for r in alone) - 3 * shared
            assert batch.cost.new_tokens == sum(r.cost.new_tokens for r in alone)
    assert len({tuple(texts(result)) for result in alone}) == len(QUESTIONS)
    assert sum(len(c.steps) for result in alone for c in result.candidates) > 20


def test_equal_questions_one_that_begins_another_and_one_by_itself(models, one_thread):
    """With a verifier that is too small for what it is asked to keep."""
    from tts_kernels.verifier import Verifier

    (policy, verifier), _ = sides(models)
    asked = [QUESTIONS[0], QUESTIONS[0] + " And in 3?", "Alone?", QUESTIONS[0], QUESTIONS[2]]
    free, (search, settings) = policy.kv.free_pages, SEARCHES["beam_search"]
    alone = {question: search(policy, verifier, question, **settings, **OPTIONS) for question in set(asked)}
    small = Verifier(verifier.models[0], models[1], "math-shepherd", max_tokens=192)
    for judge in (verifier, small):
        batch = search(policy, judge, asked, **settings, **OPTIONS)
        for one in batch:
            wanted = alone[one.question]
            assert texts(one) == texts(wanted) and one.choice == wanted.choice
            for c, other in zip(one.candidates, wanted.candidates):
                assert c.step_scores == pytest.approx(other.step_scores, abs=1e-5)
        assert policy.kv.free_pages == free and not policy._tips
        shared = len(models[1](FEW_SHOTS.rstrip("\n"))["input_ids"])
        prompts = [len(models[1](question)["input_ids"]) for question in asked]
        assert batch.cost.prompt_tokens <= sum(prompts) - 3 * shared  # though one begins otherwise
    assert batch.cost.verifier_tokens > sum(r.cost.verifier_tokens for r in alone.values())  # some of it again


@pytest.mark.parametrize("options, error", [
    ({"seed": 2**64}, (ValueError, RuntimeError, OverflowError)), ({"answer": lambda text: 1 / 0}, ZeroDivisionError),
])  # fmt: skip
def test_a_call_that_fails_leaves_nothing(options, error, models, one_thread):
    (policy, verifier), _ = sides(models)
    free = policy.kv.free_pages
    with pytest.raises(error):
        best_of_n(policy, verifier, QUESTIONS, n=2, **{**OPTIONS, "max_new_tokens": 4, **options})
    assert policy.kv.free_pages == free and not policy._tips


def test_an_interrupt_while_nodes_are_given_back(models, one_thread, monkeypatch):
    (policy, verifier), _ = sides(models)
    free, release, calls = policy.kv.free_pages, policy.release, []

    def interrupted(nodes):
        release(nodes)
        calls.append(nodes)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(policy, "release", interrupted)
    with pytest.raises(KeyboardInterrupt):
        beam_search(policy, verifier, QUESTIONS[:2], width=2, expand=2, depth=3, **OPTIONS)
    assert policy.kv.free_pages == free and not policy._tips


def test_a_decode_step_is_one_forward_for_all_questions(models, one_thread):
    (policy, verifier), _ = sides(models)
    rows = []
    compute = policy._compute

    def recording(asked, ids, plan=None):
        rows.append(len(asked))
        return compute(asked, ids, plan=plan)

    policy._compute = recording
    batch = best_of_n(policy, verifier, QUESTIONS, n=4, **{**OPTIONS, "temperature": 0.0, "max_new_tokens": 9})
    longest = max(c.tokens for result in batch for c in result.candidates)
    assert len(rows) == 1 + longest - 1 and rows[:2] == [5, 16]  # prompts and their beginning; the candidates
    alone = best_of_n(policy, verifier, QUESTIONS[1], n=4, **{**OPTIONS, "temperature": 0.0, "max_new_tokens": 9})
    assert [dataclasses.astuple(c)[0] for c in alone.candidates] == texts(batch[1])
