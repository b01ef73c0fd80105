"""Workloads: lengths, seeds, what is refused."""

from __future__ import annotations

import dataclasses
import statistics

import pytest

from tts_kernels.cost import Lognormal, ModelShape, Workload, query_cost


def test_lognormal():
    lengths = Lognormal(12_000, 0.6, seed=1).draw(20_000)
    mean = statistics.fmean(lengths)
    assert mean == pytest.approx(12_000, rel=0.02)
    assert statistics.pstdev(lengths) / mean == pytest.approx(0.6, rel=0.03)
    assert Lognormal(12_000, 0.6, seed=1).draw(5) == lengths[:5] != Lognormal(12_000, 0.6, seed=2).draw(5)
    assert max(Lognormal(12_000, 0.6, 15_000).draw(1000)) == 15_000
    assert Lognormal(7).draw(3) == [7, 7, 7] and min(Lognormal(1, 3.0).draw(500)) == 1


def test_draws_are_pinned():
    """Scenarios are versioned: their lengths may not move with a version of Python."""
    assert Lognormal(12_000, 0.6, 32_000).draw(4) == [18043, 15168, 9208, 7189]


def test_lengths():
    work = Workload(2, (5, 7), (1, 2, 3, 4, 5, 6), queries=3, trunk=1)
    assert work.prompts == (5, 7, 5) and work.suffixes == ((1, 2), (3, 4), (5, 6))
    assert work.sharing_ratio == pytest.approx(2 * (17 / 3 + 1) / 3.5)
    assert [g.suffix for g in work.groups(1)] == [(1, 3, 5), (2, 4, 6)]
    assert Workload(3, 5, Lognormal(50, 0.5), queries=2).suffixes == tuple(
        tuple(Lognormal(50, 0.5).draw(6)[i : i + 3]) for i in (0, 3)
    )
    assert [g.n for g in Workload(8, 5, 4).groups(4)] == [4]
    beam = Workload(12, 5, 20, search="beam", keep=4, steps=5)
    assert [(g.n, g.keep) for n in (6, 4, 1) for g in beam.groups(n)] == [(6, 2), (4, 1), (1, 1)]


def test_prompts_and_trunk_that_vary():
    lengths = Lognormal(500, 0.5, 900, seed=7)
    work = Workload(2, lengths, 30, queries=4)
    assert work.prompts == tuple(lengths.draw(4)) and len(set(work.prompts)) == 4
    assert work.sharing_ratio == pytest.approx(2 * statistics.fmean(lengths.draw(4)) / 30)
    assert dataclasses.replace(work, queries=1).prompts == work.prompts[:1]
    cost = query_cost(work, "qwen3-0.6b", "h200")
    assert cost.parts == query_cost(Workload(2, work.prompts, 30, queries=4), "qwen3-0.6b", "h200").parts
    assert Workload(2, 5, 30, trunk=lengths) == Workload(2, 5, 30, trunk=lengths.draw(1)[0])
    drawn = {"mean": 500, "cv": 0.5, "cap": 900, "seed": 7}
    assert Workload.from_dict({"n": 2, "prompt": drawn, "suffix": 30, "queries": 4}) == work
    assert Workload.from_dict({"n": 2, "prompt": 5, "suffix": 30, "trunk": drawn}).trunk == lengths.draw(1)[0]
    with pytest.raises(ValueError, match="trunk: expected a number with several queries"):
        Workload(2, 5, 30, trunk=lengths, queries=2)
    with pytest.raises(TypeError, match="prompt: expected mean, cv, cap and seed of a lognormal"):
        Workload.from_dict({"n": 2, "prompt": {"men": 5}, "suffix": 30})


def test_from_dict():
    fields = {"n": 4, "prompt": [5, 6], "suffix": {"mean": 100, "cv": 0.5, "seed": 3}, "queries": 2, "verifier": "prm"}
    work = Workload.from_dict(fields)
    assert work == Workload(4, (5, 6), Lognormal(100, 0.5, seed=3), queries=2, verifier="prm")
    assert Workload.from_dict({**fields, "verifier_model": "qwen3-8b"}).verifier_model == ModelShape.preset("qwen3-8b")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"n": 0}, "n: expected at least 1, got 0"),
        ({"n": 1.5}, "n: expected an int, got 1.5"),
        ({"n": True}, "n: expected an int, got True"),
        ({"prompt": -1}, "prompt: expected at least 0, got -1"),
        ({"prompt": (3, -1)}, r"prompt\[1\]: expected at least 0, got -1"),
        ({"prompt": ()}, "prompt: expected at least one length"),
        ({"suffix": 0}, "suffix: expected at least 1, got 0"),
        ({"suffix": -3}, "suffix: expected at least 1, got -3"),
        ({"suffix": (1, 2)}, r"suffix: expected n \* queries = 4 lengths, got 2"),
        ({"suffix": (1, 2, 0, 3)}, r"suffix\[2\]: expected at least 1, got 0"),
        ({"trunk": -1}, "trunk: expected at least 0, got -1"),
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"queries": 0}, "queries: expected at least 1, got 0"),
        ({"search": "mcts"}, "search: expected one of best_of_n, beam, dvts, got 'mcts'"),
        ({"verifier": "genrm"}, "verifier: expected one of none, orm, prm, got 'genrm'"),
        ({"verifier_head": "x"}, "verifier_head: expected one of vocab"),
        ({"verifier_model": "qwen9"}, "model: expected one of .*, got 'qwen9'"),
        ({"verifier_model": 3}, "model: expected a ModelShape or the name of a preset, got int"),
        ({"keep": 2}, "keep: expected none with search best_of_n, got 2"),
        ({"search": "beam"}, "keep: expected the number of candidates that beam keeps, got none"),
        ({"search": "beam", "keep": 3}, "keep: expected a divisor of n = 4, got 3"),
        ({"search": "dvts", "keep": 2, "steps": 3}, "suffix: expected a multiple of steps = 3 with search dvts, got 8"),
        ({"search": "dvts", "keep": 2, "suffix": Lognormal(9)}, "suffix: expected one number with search dvts"),
        ({"search": "beam", "keep": 2, "verifier": "orm"}, "verifier: expected prm or none with search beam"),
    ],
)  # fmt: skip
def test_impossible(changes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        Workload(**{"n": 4, "prompt": 5, "suffix": 8, **changes})


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Lognormal(0.5), "mean: expected at least 1, got 0.5"),
        (lambda: Lognormal(5, -1), "cv: expected at least 0, got -1"),
        (lambda: Lognormal(5, cap=0), "cap: expected at least 1, got 0"),
        (lambda: Workload.from_dict({"n": 4, "prompt": 5}), "workload: expected a field 'suffix', got n, prompt"),
        (lambda: Workload.from_dict({"n": 4, "lenght": 5}), "workload: expected the fields keep, n, .*, got 'lenght'"),
        (lambda: Workload.from_dict([1]), "workload: expected an object .* got list"),
        (lambda: Workload.from_dict({"n": 1, "prompt": 1, "suffix": {"men": 1}}), "suffix: expected mean, cv, cap"),
        (lambda: Workload(4, 5, 8).groups(5), "n: expected at most the workload's 4, got 5"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_context_beyond_the_limit_names_it():
    qwen = ModelShape.preset("qwen3-8b")
    Workload(2, 40_000, 960).check_context(qwen)
    for work in (
        Workload(2, 40_000, 961),
        Workload(2, 39_000, 961, trunk=1000),
        Workload(2, (1, 40_000), 961, queries=2),
    ):
        with pytest.raises(
            ValueError, match="model: expected a context of at most 40960 tokens, the limit of qwen3-8b, got 40961"
        ):
            work.check_context(qwen)
    math_prm = dataclasses.replace(ModelShape.preset("qwen2.5-7b"), name="qwen2.5-math-prm-7b", max_positions=4096)
    with pytest.raises(ValueError, match=r"verifier_model: .* 4096 tokens, .*qwen2.5-math-prm-7b, got 12200"):
        Workload(2, 200, 12_000, verifier="prm", verifier_model=math_prm).check_context(qwen)
