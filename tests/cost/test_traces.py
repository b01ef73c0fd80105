"""Traces: estimators against brute force, intervals, costs, and files with something wrong in them."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tts_kernels.cost import Traces, Workload, query_cost
from tts_kernels.cost.traces import AGGREGATES, METHODS, Sample, best_n, synthetic
from tts_kernels.cost.voting import majority_of_k, weighted_vote_of_k

# Up to 8 samples with up to 5 answers, some of which are right; None does not vote.
VOTES = st.lists(st.sampled_from(["a", "b", "c", "d", "e", None]), min_size=1, max_size=8)
RIGHT = st.frozensets(st.sampled_from("abcde"))


@settings(max_examples=200, deadline=None)
@given(VOTES, RIGHT, st.data())
def test_majority_is_exact(answers, right, data):
    k = data.draw(st.integers(1, len(answers)))
    total = count = 0
    for subset in itertools.combinations(answers, k):
        votes = Counter(answer for answer in subset if answer is not None)
        most = [answer for answer in votes if votes[answer] == max(votes.values())]
        total += sum(answer in right for answer in most) / len(most) if most else 0
        count += 1
    assert majority_of_k(answers, [a in right for a in answers], k) == pytest.approx(total / count)


@settings(deadline=None)
@given(VOTES, RIGHT, st.data())
def test_a_tie_goes_to_the_first_voter_in_random_order(answers, right, data):
    """Over all orders of the samples, as `tts.select` decides them one by one."""
    answers, k = answers[:5], min(3, len(answers[:5]))
    total = count = 0
    for order in itertools.permutations(answers, k):
        votes = Counter(answer for answer in order if answer is not None)
        total += bool(votes) and votes.most_common(1)[0][0] in right  # the first of equals
        count += 1
    assert majority_of_k(answers, [a in right for a in answers], k) == pytest.approx(total / count)


@settings(deadline=None)
@given(VOTES, RIGHT, st.data())
def test_weighted_vote_is_exact_for_few(answers, right, data):
    scores = data.draw(
        st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, math.nan]), min_size=len(answers), max_size=len(answers))
    )
    k = data.draw(st.integers(1, len(answers)))
    total = count = 0
    for subset in itertools.combinations(range(len(answers)), k):
        votes = [i for i in subset if answers[i] is not None and not math.isnan(scores[i])]
        weight = {answers[i]: sum(scores[j] for j in votes if answers[j] == answers[i]) for i in votes}
        best = [answers[i] for i in votes if weight[answers[i]] == max(weight.values())]
        total += bool(best) and best[0] in right
        count += 1
    value, exact = weighted_vote_of_k(scores, answers, [a in right for a in answers], k)
    assert exact and value == pytest.approx(total / count)


def test_weighted_vote_of_many_is_drawn():
    answers = ["a"] * 15 + ["b"] * 15
    scores, correct = [0.9] * 15 + [0.4] * 15, [True] * 15 + [False] * 15
    value, exact = weighted_vote_of_k(scores, answers, correct, 9, seed=1)
    assert not exact and value == weighted_vote_of_k(scores, answers, correct, 9, seed=1)[0]
    # a wins with j of 9 votes if 0.9 j >= 0.4 (9 - j); at no j do both weigh the same
    right = sum(math.comb(15, j) * math.comb(15, 9 - j) for j in range(10) if 0.9 * j > 0.4 * (9 - j))
    assert value == pytest.approx(right / math.comb(30, 9), abs=0.03)


def test_one_answer_cannot_be_right_and_wrong():
    with pytest.raises(ValueError, match=r"correct\[1\]: expected True, as for the answer 'a' before, got False"):
        majority_of_k(["a", "a"], [True, False], 1)
    with pytest.raises(ValueError, match="k: expected at most 2"):
        majority_of_k(["a", "a"], [True, True], 3)
    with pytest.raises(ValueError, match="scores: expected 2 entries"):
        weighted_vote_of_k([1.0], ["a", "a"], [True, True], 1)


# --- sets of questions ----------------------------------------------------------------------------------------------


def test_accuracy():
    traces = synthetic(40, 12)
    assert traces.samples_per_question == 12 and traces.counts() == [1, 2, 4, 8, 12]
    single = traces.accuracy(1, "pass")
    mean = sum(s.correct for q in traces.questions.values() for s in q) / 480
    for method in METHODS:
        found = [traces.accuracy(n, method) for n in traces.counts()]
        assert found[0].value == pytest.approx(mean)
        assert all(0 <= a.low <= a.value <= a.high <= 1 and a.n == n for a, n in zip(found, traces.counts()))
        assert all(a.value <= traces.accuracy(a.n, "pass").value + 1e-12 for a in found)
    assert traces.accuracy(8, "pass").value > traces.accuracy(8, "best_of_n").value > single.value
    assert traces.accuracy(4, "best_of_n") == traces.accuracy(4, "best_of_n")
    assert single.low < single.value < single.high and single.exact


def test_interval_covers_as_often_as_it_says():
    """Of many sets drawn from the same questions, about 95% have the mean of all in their interval."""
    means = [1.0] * 3 + [0.5] * 4 + [0.0] * 3  # of kinds of questions
    inside = 0
    for seed in range(200):
        traces = Traces(
            Sample(f"{q}", f"{s}", 1, (), s < 10 * means[(q * 7 + seed * 3 + q // 10) % 10])
            for q in range(30)
            for s in range(10)
        )
        found = traces.accuracy(1, "pass", resamples=200, seed=seed)
        inside += found.low <= 0.5 <= found.high
    assert inside > 180


def test_aggregates():
    scores = (0.5, 0.25, 1.0)
    assert {name: of(scores) for name, of in AGGREGATES.items()} == {
        "last": 1.0, "min": 0.25, "prod": 0.125, "mean": pytest.approx(0.5833333), "max": 1.0
    }  # fmt: skip
    traces = Traces(
        [Sample("q", "0", 5, (0.9, 0.1), True), Sample("q", "1", 5, (0.2, 0.8), False), Sample("q", "2", 5, (), True)]
    )
    assert traces.accuracy(3, "best_of_n", aggregate="last").value == 0
    assert traces.accuracy(3, "best_of_n", aggregate="max").value == 1
    # one of three: the unscored one is never chosen, even alone
    assert traces.accuracy(1, "best_of_n").value == pytest.approx(1 / 3)
    with pytest.raises(
        ValueError, match="method: expected pass or best_of_n, since the samples of question 'q' have no answer"
    ):
        traces.accuracy(2, "majority")


def test_cost_is_that_of_the_samples():
    traces = Traces(
        Sample(q, str(s), 100 * (s + 1), (0.5, 0.5), True, "x", 50 * (1 + (q == "b"))) for q in "ab" for s in range(4)
    )
    price, model, device = "3 USD", "qwen3-0.6b", "h200"

    def cost(n, prompt, lengths):
        work = Workload(n, prompt, lengths, steps=2, verifier="prm")
        return query_cost(work, model, device, sharing="tree", regime="saturated", price=price).dollars

    by_hand = [sum(cost(2, p, lengths) for lengths in ((100, 200), (300, 400))) / 2 for p in (50, 100)]
    assert traces.cost(2, model, device, price=price) == pytest.approx(sum(by_hand) / 2)
    points = traces.curve([1, 2, 4], model, device, price=price)
    assert [p.n for p in points] == [1, 2, 4] and points[0].cost < points[1].cost < points[2].cost
    assert points[2].per_solved == points[2].cost / points[2].accuracy.value
    paged = traces.curve([1, 2, 4], model, device, price=price, sharing="paged")
    assert paged[0].cost == points[0].cost and paged[2].cost > points[2].cost
    nobody = Traces([Sample("q", "0", 5, (0.5,), False, None, 5)]).curve([1], model, device, price=price)
    assert nobody[0].per_solved == math.inf


def test_the_order_of_a_file_decides_nothing():
    """Scores of a verifier that says yes or no, and a file that has the right samples first, or last."""
    made = [(correct, float(i % 4 < 2)) for i, correct in enumerate([True] * 8 + [False] * 8)]
    files = [
        Traces(Sample("q", str(i), 10 + 100 * (not right), (score,), right, f"{right}", 5)
               for i, (right, score) in enumerate(order))
        for order in (made, made[::-1])
    ]  # fmt: skip
    for n in (1, 2, 5):
        found = [traces.accuracy(n, "best_of_n").value for traces in files]
        assert found == pytest.approx([0.5, 0.5]), "half of those that it says yes to are right, and of the others too"
        votes = [traces.accuracy(n, "weighted_vote").value for traces in files]
        assert votes == pytest.approx([0.5, 0.5], abs=0.2)
    # Of 16 samples, 8 are taken for the cost of one: short and long ones.
    first, last = (traces.cost(1, "qwen3-0.6b", "h200", price="2 USD") for traces in files)
    assert first == pytest.approx(last)


def test_best_n():
    points = synthetic(20, 16).curve([1, 2, 4, 8, 16], "qwen3-8b", "h200", price="2 USD")
    assert best_n(points, 0).n == 1 and best_n(points, 1e6).n == 16
    worth = [best_n(points, value).n for value in (0, 1e-4, 1e-3, 1e-2, 1e-1)]
    assert worth == sorted(worth)


# --- files ----------------------------------------------------------------------------------------------------------

LINE = {"question": "q1", "sample": 3, "tokens": 120, "step_scores": [0.5, 0.75], "correct": True, "answer": "42"}


def test_round_trip(tmp_path):
    traces, file = synthetic(5, 3), tmp_path / "traces.jsonl"
    traces.write(file)
    assert Traces.read(file).questions == traces.questions
    file.write_text(json.dumps(LINE) + "\n\n" + json.dumps({**LINE, "sample": 4, "answer": 42, "step_scores": []}))
    samples = Traces.read(file).questions["q1"]
    assert [s.sample for s in samples] == ["3", "4"] and samples[0].answer == samples[1].answer == "42"
    assert samples[0].step_scores == (0.5, 0.75) and samples[0].prompt_tokens is None


@pytest.mark.parametrize("field", ["question", "sample", "tokens", "step_scores", "correct"])
def test_missing_field(tmp_path, field):
    file = tmp_path / "traces.jsonl"
    broken = {name: value for name, value in LINE.items() if name != field}
    file.write_text(json.dumps({**LINE, "sample": 1}) + "\n" + json.dumps(broken) + "\n")
    with pytest.raises(ValueError, match=rf"traces.jsonl line 2, {field}: expected a value, got no such field"):
        Traces.read(file)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"tokens": 0}, "line 2, tokens: expected at least 1, got 0"),
        ({"tokens": "9"}, "line 2, tokens: expected an int, got '9'"),
        ({"step_scores": 0.5}, "line 2, step_scores: expected a list of numbers, got 0.5"),
        ({"step_scores": [0.5, None]}, r"line 2, step_scores\[1\]: expected a number, got None"),
        ({"step_scores": [math.nan]}, r"line 2, step_scores\[0\]: expected a finite number"),
        ({"correct": 1}, "line 2, correct: expected true or false, got 1"),
        ({"question": None}, "line 2, question: expected a string or a whole number, got None"),
        ({"answer": [1]}, r"line 2, answer: expected a string, a number or null, got \[1\]"),
        ({"prompt_tokens": -1}, "line 2, prompt_tokens: expected at least 0, got -1"),
        ({"prompt_tokens": 7}, "line 2, prompt_tokens: expected None, as in the question's first sample, got 7"),
        ({"correct": False}, "line 2, correct: expected True, as for the answer '42' before, got False"),
        ({"sample": "3"}, "line 2, sample: expected an id that line 1 does not have, got '3'"),
    ],
)
def test_bad_line(tmp_path, change, message):
    file = tmp_path / "traces.jsonl"
    file.write_text(json.dumps(LINE) + "\n" + json.dumps({**LINE, "sample": 4, **change}) + "\n")
    with pytest.raises((ValueError, TypeError), match=message):
        Traces.read(file)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "line 1: expected JSON"),
        ("[1]", "line 1: expected an object"),
        ("", "expected at least one sample, got none"),
    ],
)
def test_bad_file(tmp_path, text, message):
    file = tmp_path / "traces.jsonl"
    file.write_text(text)
    with pytest.raises((ValueError, TypeError), match=message):
        Traces.read(file)


def test_bad_arguments():
    traces, unsized = synthetic(2, 4), Traces([Sample("q", "0", 5, (), True)])
    for call, message in (
        (lambda: traces.accuracy(5), "n: expected at most 4, the samples of question 'q0', got 5"),
        (lambda: traces.accuracy(2, "vote"), "method: expected one of pass, best_of_n, majority, weighted_vote"),
        (lambda: traces.accuracy(2, aggregate="sum"), "aggregate: expected one of last"),
        (lambda: traces.cost(2, "qwen3-8b", "h200", price=2), "price: expected an amount with its currency"),
        (lambda: Traces([]), "traces: expected at least one sample"),
        (lambda: unsized.cost(1, "qwen3-8b", "h200", price="2 USD"), "prompt: expected a length, since .* 'q'"),
    ):  # fmt: skip
        with pytest.raises((ValueError, TypeError), match=message):
            call()
