"""Best-of-N and votes on scripted answers and scores."""

from __future__ import annotations

import json
import math
import warnings

import pytest
from search_fakes import FakePolicy, FakeVerifier, nothing_is_held, texts

from tts_kernels.search import best_of_n, majority, weighted_vote

ANSWERS = [r"so \boxed{2}", r"\boxed{1}", "who knows", r"\boxed{ 2.0 }", r"\boxed{3}"]


def run(search, answers, scores=None, **options):
    policy = FakePolicy({"": answers})
    verifier = None if scores is None else FakeVerifier(dict(zip(answers, scores)), stepwise=False)
    if search is majority:
        result = majority(policy, "?", n=len(answers), verifier=verifier, **options)
    else:
        result = search(policy, verifier, "?", n=len(answers), **options)
    assert not policy.texts and (verifier is None or nothing_is_held(policy, verifier))
    assert policy.calls == [([""] * len(answers), None)]
    assert texts(result) == answers
    return result


def test_the_highest_score_wins():
    result = run(best_of_n, ANSWERS, [0.2, 0.9, 0.1, 0.9, 0.3])
    assert result.choice == 1  # the lower index
    assert [c.answer for c in result.candidates] == ["2", "1", None, " 2.0 ", "3"]
    assert [c.score for c in result.candidates] == pytest.approx([0.2, 0.9, 0.1, 0.9, 0.3])


def test_weighted_vote():
    result = run(weighted_vote, ANSWERS, [0.4, 0.7, 0.99, 0.5, 0.3])
    assert result.choice == 3 and result.method == "weighted_vote"  # 0.4 + 0.5 for 2; its best candidate


def test_majority_without_a_verifier():
    result = run(majority, ANSWERS)
    assert result.choice == 0 and math.isnan(result.chosen.score) and result.chosen.steps == ()
    assert result.cost.verifier_tokens == 0
    assert run(majority, [r"\boxed{5}", r"\boxed{6}", r"\boxed{6}", r"\boxed{5}"]).choice == 0  # first voter


def test_majority_with_a_verifier():
    assert run(majority, ANSWERS, [0.1, 0.9, 0.9, 0.2, 0.9]).choice == 3


@pytest.mark.parametrize("search, scores", [(majority, None), (majority, [0.1, 0.2]), (weighted_vote, [0.1, 0.2])])
def test_a_vote_without_answers_says_so(search, scores):
    """Once, and at the line that called; what the default looks for is told."""
    with pytest.warns(UserWarning, match="boxed") as warned:
        assert run(search, ["is #42", "is #7"], scores).chosen is None
    (warning,) = warned
    assert str(warning.message) == (
        "answer: expected a function that finds an answer in some of 2 candidates, got boxed, which finds none: "
        f"{search.__name__} chooses nothing"
    )
    assert warning.filename == __file__
    with pytest.warns(UserWarning, match="got <lambda>, which finds none"):
        run(search, ["is #42", "is #7"], scores, answer=lambda text: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(search, ["is #42", r"\boxed{1}"], scores).choice == 1
        assert run(search, ["is #42", "is #7"], scores, answer=lambda text: text[-1]).chosen is not None
        assert run(best_of_n, ["is #42", "is #7"], [0.1, 0.2]).choice == 1


def test_answers_by_a_function():
    last_word = lambda text: text.split()[-1]  # noqa: E731
    answers = ["it is A", "it is B", "I say b", "it is C"]
    assert run(majority, answers, answer=last_word).choice == 0
    assert run(majority, answers, answer=last_word, canonical=str.upper).choice == 1
    with pytest.raises(TypeError, match=r"^answer: expected a function that returns a string or None, got 7"):
        run(majority, answers, answer=lambda text: 7)


def test_a_verifier_is_needed():
    for search in (best_of_n, weighted_vote):
        with pytest.raises(TypeError, match=r"^verifier: expected a Verifier: only majority needs none, got None$"):
            search(FakePolicy({"": ["a", "b"]}), None, "?", n=2)


def test_steps_of_a_stepwise_verifier():
    policy = FakePolicy({"": ["a\n\nb", "a\n\nc"]})
    verifier = FakeVerifier({"a": 0.5, "a/b": 0.1, "a/c": 0.2}, aggregate="prod")
    result = best_of_n(policy, verifier, "?", n=2)
    assert [c.steps for c in result.candidates] == [("a", "b"), ("a", "c")] and result.choice == 1
    assert [c.score for c in result.candidates] == pytest.approx([0.05, 0.1])
    assert result.cost.verifier_tokens == 4 and not verifier.sessions  # in one go


def test_json():
    result = run(best_of_n, ["a", ""], [0.5])
    record = json.loads(result.to_json())
    assert record["candidates"][0] == {
        "text": "a", "steps": ["a"], "step_scores": [0.5], "score": 0.5, "answer": None, "reason": "eos", "tokens": 1,
        "ended": True,
    }  # fmt: skip
    assert record["candidates"][1]["score"] is None and record["choice"] == 0 and record["seed"] == 0
    assert record["parameters"] == {
        "n": 2, "max_new_tokens": 2048, "temperature": 0.8, "top_p": 1.0, "top_k": 0, "reduce": "last"
    }  # fmt: skip
    assert set(record["cost"]) >= {"prompt_tokens", "new_tokens", "verifier_tokens", "decode_seconds", "seconds"}


def test_progress(capsys):
    run(best_of_n, ["a", "b"], [0.5, 0.4], progress=True)
    assert "2/2" in capsys.readouterr().err
    run(best_of_n, ["a", "b"], [0.5, 0.4], progress=False)
    run(best_of_n, ["a", "b"], [0.5, 0.4])  # stderr is no terminal
    assert capsys.readouterr().err == ""
