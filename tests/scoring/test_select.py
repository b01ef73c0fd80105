"""select against plain sorting, and literal expectations for ties, groups and votes."""

import importlib
import math

import pytest
import scoring_cases as cases
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tts_kernels.scoring import select

NAN, INF = math.nan, math.inf
METHODS = ("best", "top_k", "weighted_vote", "majority")


def run(path, scores, bounds=None, answers=None, **options):
    """indices and scores, as lists."""
    lists = {"group_offsets": bounds, "answers": answers}
    tensors = {n: torch.tensor(x, dtype=torch.int64, device=path.device) for n, x in lists.items() if x is not None}
    scores = torch.tensor(scores, dtype=torch.float32, device=path.device)
    got = select(scores, **tensors, backend=path.backend, check=True, **options)
    assert got.indices.dtype == torch.int64 and got.scores.dtype == torch.float32
    assert got.indices.shape == got.scores.shape
    return got.indices.tolist(), got.scores.tolist()


def test_best(path):
    assert run(path, [0.25, 0.75, 0.5]) == ([[1]], [[0.75]])


def test_ties_go_to_the_lower_index(path):
    assert run(path, [0.5, 0.75, 0.75, 0.5])[0] == [[1]]
    assert run(path, [0.5, 0.75, 0.75, 0.5], method="top_k", k=4)[0] == [[1, 2, 0, 3]]
    assert run(path, [0.0, -0.0, 0.0], method="top_k", k=3)[0] == [[0, 1, 2]]


def test_all_equal_groups(path):
    indices, scores = run(path, [0.5] * 7, [0, 3, 3, 7], method="top_k", k=3)
    assert indices == [[0, 1, 2], [-1, -1, -1], [3, 4, 5]]
    assert scores[0] == scores[2] == [0.5] * 3


def test_nothing_to_select(path):
    """Empty groups, candidates whose score is nan, fewer than k, and no candidates at all."""
    indices, scores = run(path, [NAN, 0.5, NAN, -INF], [0, 0, 1, 3, 4, 4], method="top_k", k=2)
    assert indices == [[-1, -1], [-1, -1], [1, -1], [3, -1], [-1, -1]]
    assert scores[2][0] == 0.5 and scores[3][0] == -INF
    assert [math.isnan(s) for row in scores for s in row] == [True] * 4 + [False, True] * 2 + [True] * 2
    indices, scores = run(path, [])
    assert indices == [[-1]] and math.isnan(scores[0][0])
    indices, scores = run(path, [], [0, 0, 0], answers=[], method="majority", k=2)
    assert indices == [[-1, -1]] * 2
    assert run(path, [], [0]) == ([], [])


def test_infinite_scores(path):
    assert run(path, [-INF, INF, NAN, 0.0, -INF], method="top_k", k=5)[0] == [[1, 3, 0, 4, -1]]


def test_weighted_vote(path):
    """Answer 7 has 0.5 + 0.25, answer 3 has 0.625: the best-scored candidate of answer 7 stands for it."""
    scores, answers = [0.25, 0.625, 0.5], [7, 3, 7]
    assert run(path, scores, answers=answers, method="weighted_vote") == ([[2]], [[0.75]])
    assert run(path, scores, answers=answers, method="weighted_vote", k=3)[0] == [[2, 1, -1]]


def test_majority(path):
    """Two votes against one better score; the score returned is the count."""
    scores, answers = [0.25, 0.875, 0.5], [7, 3, 7]
    assert run(path, scores, answers=answers, method="majority") == ([[2]], [[2.0]])
    assert run(path, scores, answers=answers, method="majority", k=2) == ([[2, 1]], [[2.0, 1.0]])


def test_answers_that_tie_go_by_their_first_voter(path):
    """Answer 9 is met first, and its better candidate last."""
    for method, value in (("majority", 2.0), ("weighted_vote", 0.75)):
        got = run(path, [0.25, 0.5, 0.25, 0.5], answers=[9, 1, 1, 9], method=method, k=2)
        assert got == ([[3, 1]], [[value, value]])


def test_an_answer_without_a_sum(path):
    """inf - inf is no score: another answer is selected, and this one never."""
    scores, answers = [INF, -INF, -1.0], [0, 0, 1]
    indices, values = run(path, scores, answers=answers, method="weighted_vote", k=2)
    assert indices == [[2, -1]] and values[0][0] == -1.0 and math.isnan(values[0][1])


def test_no_answer_and_no_score_do_not_vote(path):
    """-1 is no answer, and a nan score does not count: not for the majority, nor as the first voter."""
    scores, answers = [NAN, 0.5, 0.25, NAN, 0.125], [4, 5, -1, 4, 4]
    assert run(path, scores, answers=answers, method="majority", k=2) == ([[1, 4]], [[1.0, 1.0]])
    assert run(path, scores, answers=answers, method="weighted_vote")[0] == [[1]]
    indices, values = run(path, [0.5, NAN], answers=[-1, 0], method="majority")
    assert indices == [[-1]] and math.isnan(values[0][0])


def test_equal_answers_of_different_groups_are_apart(path):
    got = run(path, [0.5, 0.25, 0.5, 0.75], [0, 2, 4], answers=[1, 2, 2, 2], method="weighted_vote")
    assert got == ([[0], [3]], [[0.5], [1.25]])


def test_answers_may_be_any_numbers(path):
    big = 2**62
    assert run(path, [0.5, 0.25, 0.5], answers=[big, 0, big], method="majority") == ([[0]], [[2.0]])


def test_best_with_answers_does_not_read_them(path):
    assert run(path, [0.5, 0.75], answers=[-9, -9]) == ([[1]], [[0.75]])


# Scores of a few values, so that ties are common; sums of them are exact in any order.
VALUES = st.sampled_from([0.0, 0.25, 0.5, 0.5, 1.0, -1.0, NAN, INF, -INF])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    groups=st.lists(st.lists(st.tuples(VALUES, st.integers(-1, 3)), max_size=6), min_size=1, max_size=3),
    method=st.sampled_from(METHODS),
    k=st.integers(1, 3),
)
def test_against_sorting(path, groups, method, k):
    k = 1 if method == "best" else k
    scores = [score for group in groups for score, _ in group]
    answers = [answer for group in groups for _, answer in group]
    bounds = [0]
    for group in groups:
        bounds.append(bounds[-1] + len(group))
    indices, values = run(path, scores, bounds, answers, method=method, k=k)
    wanted_indices, wanted_values = cases.dense_select(scores, bounds, method, k, answers)
    assert indices == wanted_indices
    torch.testing.assert_close(
        torch.tensor(values), torch.tensor(wanted_values, dtype=torch.float32), rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.parametrize("method", METHODS)
def test_large_groups(path, method):
    """More candidates than a Triton program holds at a time (128 for votes, 1024 else), and sums that round: fp32 in
    the order of indices, so equal to the last bit."""
    sizes = (130, 3) if path.interpreted else (1500, 3, 700)
    gen = torch.Generator().manual_seed(0)
    scores = torch.rand(sum(sizes), generator=gen).tolist()
    answers = torch.randint(-1, 5, (sum(sizes),), generator=gen).tolist()
    bounds = [0, *torch.tensor(sizes).cumsum(0).tolist()]
    k = 1 if method == "best" else 4
    got = run(path, scores, bounds, answers, method=method, k=k)
    torch.testing.assert_close(
        got, cases.dense_select(scores, bounds, method, k, answers), rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.parametrize("method", ["weighted_vote", "majority"])
def test_votes_in_more_blocks_than_programs(path, method, monkeypatch):
    """Groups of 10 and 1 blocks of the Triton kernel, and 3 programs for each."""
    if path.backend != "triton":
        pytest.skip("for the triton backend alone")
    backend = importlib.import_module("tts_kernels.scoring.triton")
    monkeypatch.setattr(backend, "CANDIDATES", 4)
    monkeypatch.setattr(backend, "VOTE_BLOCKS", 3)
    gen = torch.Generator().manual_seed(0)
    scores, answers = torch.rand(41, generator=gen).tolist(), torch.randint(-1, 9, (41,), generator=gen).tolist()
    got = run(path, scores, [0, 38, 41], answers, method=method, k=8)
    wanted = cases.dense_select(scores, [0, 38, 41], method, 8, answers)
    torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("method", METHODS)
def test_other_groups_change_no_bit(path, method):
    gen = torch.Generator().manual_seed(2)
    scores, answers = torch.rand(9, generator=gen), torch.randint(0, 3, (9,), generator=gen)
    k = 1 if method == "best" else 3
    (wanted,), (values,) = run(path, scores.tolist(), answers=answers.tolist(), method=method, k=k)
    for before in (1, 2, 7):
        more = torch.rand(before, generator=gen)
        indices, got = run(
            path, [*more.tolist(), *scores.tolist()], [0, before, before + 9],
            [1] * before + answers.tolist(), method=method, k=k,
        )  # fmt: skip
        assert indices[1] == [i if i < 0 else i + before for i in wanted]
        torch.testing.assert_close(got[1], values, rtol=0, atol=0, equal_nan=True)
