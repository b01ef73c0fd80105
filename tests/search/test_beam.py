"""What beam search and DVTS keep, drop, put aside and choose, written out by hand on scripted steps and scores."""

from __future__ import annotations

import pytest
from search_fakes import CUT, FakePolicy, FakeVerifier, nothing_is_held, texts

from tts_kernels.search import beam_search, dvts

Q = "question"


def run(search, script, scores, aggregate="last", **options):
    policy, verifier = FakePolicy(script), FakeVerifier(scores, aggregate=aggregate)
    result = search(policy, verifier, Q, **options)
    assert nothing_is_held(policy, verifier)
    (session,) = verifier.sessions
    assert len(session.encoded) == len(set(session.encoded)) and not any(session.holds.values())
    return result, policy, session


# --- beam search ------------------------------------------------------------------------------------------------------


def test_the_best_are_kept_in_their_order_and_repeated_in_turn():
    script = {
        "": ["a\n\n", "b\n\n", "c\n\n", "d\n\n"],
        "b\n\n": ["b1", "b2"],
        "d\n\n": ["d1", "d2"],
    }
    scores = {"a": 0.1, "b": 0.6, "c": 0.2, "d": 0.9, "b/b1": 0.3, "b/b2": 0.8, "d/d1": 0.7, "d/d2": 0.1}
    result, policy, session = run(beam_search, script, scores, width=2, expand=2, depth=2)
    # d scores higher than b, but b came first and stays first
    assert policy.calls == [([""] * 4, ("\n\n",)), (["b\n\n", "d\n\n", "b\n\n", "d\n\n"], None)]
    assert texts(result) == ["b\n\nb2", "d\n\nd1", "b\n\nb1", "d\n\nd2"]
    assert [c.score for c in result.candidates] == pytest.approx([0.8, 0.7, 0.3, 0.1])
    assert result.choice == 0 and result.chosen.steps == ("b", "b2")
    assert result.chosen.step_scores == pytest.approx((0.6, 0.8))
    assert session.encoded == [("a",), ("b",), ("c",), ("d",), ("b", "b1"), ("d", "d1"), ("b", "b2"), ("d", "d2")]


def test_ties_go_to_the_lower_index():
    script = {"": ["a\n\n", "b\n\n", "c\n\n", "d\n\n"], "b\n\n": ["x"], "c\n\n": ["y"]}
    scores = {"a": 0.4, "b": 0.5, "c": 0.5, "d": 0.5, "b/x": 0.3, "c/y": 0.3}
    result, policy, _ = run(beam_search, script, scores, width=2, expand=2, depth=2)
    assert policy.calls[1][0] == ["b\n\n", "c\n\n"] * 2  # not d
    assert texts(result) == ["b\n\nx", "c\n\ny", "b\n\nx", "c\n\ny"]


def test_what_ended_is_put_aside_and_takes_no_place():
    script = {
        "": ["end", "a\n\n", "b\n\n", "c" + CUT],
        "a\n\n": ["a1", "a2"],
        "b\n\n": ["b1", "b2"],
    }
    scores = {"end": 0.99, "a": 0.1, "b": 0.2, "c": 0.9, "a/a1": 0.5, "a/a2": 0.95, "b/b1": 0.3, "b/b2": 0.4}
    result, policy, _ = run(beam_search, script, scores, width=2, expand=2, depth=5)
    assert policy.calls[1] == (["a\n\n", "b\n\n"] * 2, ("\n\n",))  # both places, though end and c score higher
    assert len(policy.calls) == 2  # all ended, so three iterations are not run
    # six ended; the result has as many as an iteration, the best
    assert texts(result) == ["end", "a\n\na2", "c", "a\n\na1"]
    assert [c.reason for c in result.candidates] == ["eos", "eos", "length", "eos"]
    assert [c.ended for c in result.candidates] == [True, True, False, True]


def test_fewer_beams_than_width_share_the_copies():
    script = {"": ["end", "a\n\n", "end", "end"], "a\n\n": ["1", "2", "3", "4"]}
    scores = {"end": 0.5, "a": 0.1, "a/1": 0.1, "a/2": 0.2, "a/3": 0.9, "a/4": 0.3}
    result, policy, _ = run(beam_search, script, scores, width=2, expand=2, depth=2)
    assert policy.calls[1][0] == ["a\n\n"] * 4
    assert texts(result) == ["a\n\n3", "end", "end", "end"]  # equal scores: the one that ended first


def test_copies_that_do_not_come_out_even():
    script = {"": ["a\n\n", "b\n\n", "end", "end", "end", "end"], "a\n\n": ["1"], "b\n\n": ["2"]}
    scores = {"end": 0.5, "a": 0.1, "b": 0.1, "a/1": 0.1, "b/2": 0.2}
    _, policy, _ = run(beam_search, script, scores, width=3, expand=2, depth=2)
    assert policy.calls[1][0] == ["a\n\n", "b\n\n"] * 3
    script = {"": ["a\n\n", "b\n\n", "c\n\n", "end"], **{f"{k}\n\n": ["1"] for k in "abc"}}
    scores = {"end": 0.1, **dict.fromkeys("abc", 0.5), **{f"{k}/1": 0.1 for k in "abc"}}
    _, policy, _ = run(beam_search, script, scores, width=4, expand=1, depth=2)
    assert policy.calls[1][0] == ["a\n\n", "b\n\n", "c\n\n", "a\n\n"]


@pytest.mark.parametrize("filter_duplicates", [True, False])
def test_duplicates(filter_duplicates):
    script = {"": ["a\n\n", "a\n\n", "b\n\n", "c\n\n"], "a\n\n": ["1", "2", "3", "4"], "b\n\n": ["5", "6"]}
    scores = {"a": 0.9, "b": 0.5, "c": 0.1, **{f"a/{i}": i / 10 for i in (1, 2, 3, 4)}, "b/5": 0.5, "b/6": 0.6}
    result, policy, session = run(
        beam_search, script, scores, width=2, expand=2, depth=2, filter_duplicates=filter_duplicates
    )
    assert session.encoded[:3] == [("a",), ("b",), ("c",)]  # scored once, filtered or not
    if filter_duplicates:
        assert policy.calls[1][0] == ["a\n\n", "b\n\n"] * 2
        assert texts(result) == ["b\n\n6", "b\n\n5", "a\n\n2", "a\n\n1"]
    else:
        assert policy.calls[1][0] == ["a\n\n"] * 4
        assert texts(result) == ["a\n\n4", "a\n\n3", "a\n\n2", "a\n\n1"]


def test_duplicates_are_filtered_among_those_that_go_on_alone():
    script = {"": ["a", "a", "a\n\n", "b\n\n"], "a\n\n": ["1"], "b\n\n": ["2"]}
    scores = {"a": 0.5, "b": 0.4, "a/1": 0.1, "b/2": 0.2}
    result, policy, _ = run(beam_search, script, scores, width=2, expand=2, depth=2)
    assert policy.calls[1][0] == ["a\n\n", "b\n\n"] * 2
    assert texts(result) == ["a", "a", "b\n\n2", "b\n\n2"]


def test_the_last_iteration_samples_to_the_end_and_is_scored_step_by_step():
    script = {"": ["a\n\nb\n\nc", "a\n\nd"]}
    scores = {"a": 0.5, "a/b": 0.2, "a/b/c": 0.9, "a/d": 0.4}
    result, policy, session = run(beam_search, script, scores, aggregate="min", width=1, expand=2, depth=1)
    assert policy.calls == [(["", ""], None)]
    assert session.encoded == [("a",), ("a", "b"), ("a", "d"), ("a", "b", "c")]
    assert texts(result) == ["a\n\nd", "a\n\nb\n\nc"]
    assert result.candidates[1].steps == ("a", "b", "c")
    assert result.candidates[1].step_scores == pytest.approx((0.5, 0.2, 0.9))


@pytest.mark.parametrize("reduce, best", [("last", "b"), ("min", "a"), ("prod", "a"), ("mean", "a"), ("max", "a"),
                                          (None, "a")])  # fmt: skip
def test_reduce(reduce, best):
    script = {"": ["a\n\n", "b\n\n"], "a\n\n": ["x", "x"], "b\n\n": ["x", "x"]}
    scores = {"a": 0.9, "b": 0.1, "a/x": 0.5, "b/x": 0.6}
    result, _, _ = run(beam_search, script, scores, aggregate="min", width=2, expand=1, depth=2, reduce=reduce)
    assert result.chosen.text == best + "\n\nx"
    assert result.parameters["reduce"] == (reduce or "min")


def test_without_a_score():
    nan = float("nan")
    # an empty answer has no step; a verifier may return nan
    script = {"": ["", "a\n\n", "b\n\n", "\n\n"], "b\n\n": ["1", "2"]}
    scores = {"a": nan, "b": 0.1, "b/1": nan, "b/2": 0.2}
    result, policy, _ = run(beam_search, script, scores, width=2, expand=2, depth=2)
    assert policy.calls[1][0] == ["b\n\n"] * 4
    assert texts(result) == ["b\n\n2", "b\n\n2", "", "b\n\n1"] and result.choice == 0
    result, policy, _ = run(beam_search, {"": ["", "a\n\n"]}, {"a": nan}, width=1, expand=2, depth=2)
    assert len(policy.calls) == 1 and texts(result) == [""] and result.choice == -1 and result.chosen is None
    result, _, _ = run(beam_search, {"": ["a\n\n"]}, {"a": nan}, width=1, expand=2, depth=2)
    assert result.candidates == () and result.choice == -1


def test_a_blank_step_keeps_the_score():
    script = {"": ["a\n\n", "b\n\n"], "a\n\n": ["\n\n"], "b\n\n": ["\n\n"], "a\n\n\n\n": ["x"], "b\n\n\n\n": ["y"]}
    result, _, session = run(
        beam_search, script, {"a": 0.5, "b": 0.4, "a/x": 0.1, "b/y": 0.2}, width=2, expand=1, depth=3
    )
    assert texts(result) == ["b\n\n\n\ny", "a\n\n\n\nx"]
    assert session.encoded == [("a",), ("b",), ("a", "x"), ("b", "y")]


def test_a_step_that_comes_again_later():
    # a blank step behind a: c comes under a in one iteration and in the next
    script = {"": ["a\n\n", "b\n\n"], "a\n\n": ["\n\n", "c\n\n"], "b\n\n": ["c\n\n"],
              "a\n\n\n\n": ["c"], "a\n\nc\n\n": ["d"], "b\n\nc\n\n": ["e"]}  # fmt: skip
    scores = {"a": 0.5, "b": 0.1, "a/c": 0.6, "a/c/d": 0.7, "b/c": 0.1, "b/c/e": 0.1}
    result, _, session = run(beam_search, script, scores, width=2, expand=2, depth=3)
    assert session.encoded.count(("a", "c")) == 1
    assert texts(result) == ["a\n\nc\n\nd"] * 2 + ["a\n\n\n\nc"] * 2


# --- DVTS -------------------------------------------------------------------------------------------------------------


def test_each_tree_keeps_its_best():
    script = {
        "": ["a\n\n", "b\n\n", "c\n\n", "d\n\n"],
        "b\n\n": ["b1", "b2"],
        "c\n\n": ["c1", "c2"],
    }
    # all of the second tree score less than what the first one drops
    scores = {"a": 0.8, "b": 0.9, "c": 0.3, "d": 0.2, "b/b1": 0.5, "b/b2": 0.4, "c/c1": 0.1, "c/c2": 0.6}
    result, policy, _ = run(dvts, script, scores, width=2, expand=2, depth=2)
    assert policy.calls == [([""] * 4, ("\n\n",)), (["b\n\n", "b\n\n", "c\n\n", "c\n\n"], None)]
    assert texts(result) == ["b\n\nb1", "b\n\nb2", "c\n\nc1", "c\n\nc2"]
    assert result.choice == 3 and result.method == "dvts"


def test_dvts_ties_go_to_the_lower_index():
    script = {"": ["a\n\n", "b\n\n", "c\n\n", "d\n\n"], "a\n\n": ["1", "2"], "c\n\n": ["3", "4"]}
    scores = dict.fromkeys(("a", "b", "c", "d", "a/1", "a/2", "c/3", "c/4"), 0.5)
    result, policy, _ = run(dvts, script, scores, width=2, expand=2, depth=2)
    assert policy.calls[1][0] == ["a\n\n", "a\n\n", "c\n\n", "c\n\n"]
    assert result.choice == 0


def test_a_tree_whose_best_ended_is_finished():
    script = {"": ["a\n\n", "end", "c\n\n", "short" + CUT], "c\n\n": ["1\n\n", "2\n\n"], "c\n\n2\n\n": ["3", "4"]}
    scores = {"a": 0.1, "end": 0.9, "c": 0.8, "short": 0.7, "c/1": 0.1, "c/2": 0.2, "c/2/3": 0.3, "c/2/4": 0.4}
    result, policy, _ = run(dvts, script, scores, width=2, expand=2, depth=3)
    assert [call[0] for call in policy.calls] == [[""] * 4, ["c\n\n"] * 2, ["c\n\n2\n\n"] * 2]
    # of the first tree, what its only iteration sampled, the step that did not end too
    assert texts(result) == ["a\n\n", "end", "c\n\n2\n\n3", "c\n\n2\n\n4"]
    assert [c.reason for c in result.candidates] == ["stop", "eos", "eos", "eos"]
    assert result.choice == 1


def test_until():
    script = {"": [r"\boxed{1}" + "\n\n", "b\n\n"], r"\boxed{1}" + "\n\n": ["x", "y"]}
    scores = {r"\boxed{1}": 0.9, "b": 0.5, r"\boxed{1}/x": 0.1, r"\boxed{1}/y": 0.2}
    result, policy, _ = run(dvts, script, scores, width=1, expand=2, depth=3)
    assert len(policy.calls) == 1 and result.chosen.answer == "1"
    result, policy, _ = run(dvts, script, scores, width=1, expand=2, depth=3, until=None)
    assert len(policy.calls) == 2 and result.choice == 1


def test_a_tree_without_scores_is_finished():
    script = {"": ["", "", "c\n\n", "d\n\n"], "d\n\n": ["1", "2"]}
    result, policy, _ = run(dvts, script, {"c": 0.1, "d": 0.2, "d/1": 0.3, "d/2": 0.1}, width=2, expand=2, depth=3)
    assert policy.calls[1][0] == ["d\n\n"] * 2
    assert texts(result) == ["", "", "d\n\n1", "d\n\n2"] and result.choice == 2


# --- both -------------------------------------------------------------------------------------------------------------


def test_depth_one_is_best_of_n():
    script, scores = {"": ["a", "b", "c", "d"]}, {"a": 0.1, "b": 0.7, "c": 0.7, "d": 0.2}
    assert texts(run(beam_search, script, scores, width=2, expand=2, depth=1)[0]) == ["b", "c", "d", "a"]
    result = run(dvts, script, scores, width=2, expand=2, depth=1)[0]
    assert texts(result) == ["a", "b", "c", "d"] and result.choice == 1


@pytest.mark.parametrize("search", [beam_search, dvts])
def test_cost_and_parameters(search):
    script = {"": ["aa\n\n", "b\n\n"], "aa\n\n": ["c", "c"], "b\n\n": ["d", "d"]}
    scores = {"aa": 0.5, "b": 0.4, "aa/c": 0.1, "b/d": 0.2}
    result, _, _ = run(search, script, scores, width=2, expand=1, depth=2, seed=3, temperature=1, stop=["\n\n"])
    assert result.question == Q and result.seed == 3 and result.method == search.__name__
    assert result.parameters["width"] == 2 and result.parameters["stop"] == ["\n\n"]
    assert result.parameters["temperature"] == 1 and result.parameters["top_p"] == 1.0
    assert result.cost.prompt_tokens == len(Q) and result.cost.new_tokens == 4 + 3 + 1 + 1
    assert result.cost.policy_tokens == len(Q) + 9 and result.cost.verifier_tokens == 5
    parts = [getattr(result.cost, f"{p}_seconds") for p in ("prefill", "decode", "verify", "select")]
    assert min(parts) > 0 and sum(parts) <= result.cost.seconds
    assert sorted(c.tokens for c in result.candidates) == [4, 5]


@pytest.mark.parametrize("search", [beam_search, dvts])
def test_an_error_leaves_nothing_behind(search):
    policy, verifier = FakePolicy({"": ["a\n\n"], "a\n\n": ["b"]}), FakeVerifier({"a": 0.1})  # no score for a/b
    with pytest.raises(KeyError):
        search(policy, verifier, Q, width=1, expand=1, depth=2)
    assert nothing_is_held(policy, verifier)


@pytest.mark.parametrize("search", [beam_search, dvts])
def test_a_verifier_is_needed(search):
    with pytest.raises(TypeError, match=r"^verifier: expected a Verifier: only majority needs none, got None$"):
        search(FakePolicy({"": ["a"]}), None, Q, width=1, expand=1, depth=1)
