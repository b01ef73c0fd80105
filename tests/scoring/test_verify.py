"""verify is step_scores and select in one call, bit for bit."""

import math

import pytest
import scoring_cases as cases
import torch
from scoring_cases import Case

from tts_kernels.scoring import select, step_scores, verify

FIELDS = ("margin", "prob", *cases.STATS, "count")


def call(path, inputs, **options):
    at = inputs.to(path.device)
    options = {name: x.to(path.device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    return verify(at.hidden, at.positions, at.head, offsets=at.offsets, backend=path.backend, **options)


@pytest.mark.parametrize("reduce", cases.STATS)
def test_is_the_two_calls(path, reduce):
    inputs = cases.make_inputs(Case(hidden_layer=24, steps=(3, 0, 1, 2, 4)))
    groups, answers = torch.tensor([0, 2, 2, 5]), torch.tensor([1, 1, 2, 2, 0])
    scores, chosen = call(
        path, inputs, reduce=reduce, group_offsets=groups, method="weighted_vote", k=2, answers=answers, check=True
    )
    alone = inputs.run(path)
    assert all(cases.same_bits(getattr(scores, name), getattr(alone, name)) for name in FIELDS)
    wanted = select(
        getattr(alone, reduce), group_offsets=groups.to(path.device), method="weighted_vote", k=2,
        answers=answers.to(path.device), backend=path.backend,
    )  # fmt: skip
    assert torch.equal(chosen.indices, wanted.indices)
    assert cases.same_bits(chosen.scores, wanted.scores)


def test_literal(path):
    """Three candidates at margins (5, 1), none, and (2, 2): by the last step the third, by the greatest the first."""
    hidden, head = cases.head_of(torch.tensor([[0.0, 5.0], [0.0, 1.0], [0.0, 2.0], [0.0, 2.0]]))
    inputs = cases.Inputs(Case(), hidden, torch.arange(4), torch.tensor([0, 2, 2, 4]), head)
    for reduce, winner in (("last", 2), ("min", 2), ("max", 0), ("log_prod", 2)):
        _, chosen = call(path, inputs, reduce=reduce)
        assert chosen.indices.tolist() == [[winner]]
    _, chosen = call(path, inputs, method="top_k", k=3)
    assert chosen.indices.tolist() == [[2, 0, -1]]


def test_only_candidates_without_steps(path):
    inputs = cases.make_inputs(Case(steps=(0, 0, 0)))
    scores, chosen = call(path, inputs, group_offsets=torch.tensor([0, 2, 3]))
    assert scores.count.tolist() == [0, 0, 0] and scores.log_prod.isnan().all() and scores.margin.shape == (0,)
    assert chosen.indices.tolist() == [[-1], [-1]] and chosen.scores.isnan().all()


def test_500_steps_that_underflow(path):
    """`prod` is 0 for both, and the first wins the tie; `log_prod` tells them apart."""
    rows = torch.tensor([[3.0, 0.0]] * 500 + [[2.5, 0.0]] * 500)
    hidden, head = cases.head_of(rows)
    inputs = cases.Inputs(Case(), hidden, torch.arange(1000), torch.tensor([0, 500, 1000]), head)
    scores, chosen = call(path, inputs, reduce="prod")
    assert scores.prod.tolist() == [0, 0] and chosen.indices.tolist() == [[0]]
    scores, chosen = call(path, inputs, reduce="log_prod")
    assert chosen.indices.tolist() == [[1]]
    exact = [-500 * math.log1p(math.exp(margin)) for margin in (3, 2.5)]
    torch.testing.assert_close(scores.log_prod.cpu(), torch.tensor(exact), rtol=500 * 2**-24, atol=0)


def test_the_default_backend():
    inputs = cases.make_inputs(Case())
    preferred = "reference" if cases.scoring.unsupported_reasons("verify", "cpu", inputs.hidden) else "cpu"
    got, wanted = (
        step_scores(inputs.hidden, inputs.positions, inputs.head, offsets=inputs.offsets, backend=backend)
        for backend in (None, preferred)
    )
    assert cases.same_bits(got.margin, wanted.margin)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("backend", ["cuda", "triton", "reference"])
def test_nothing_synchronises(backend):
    inputs = cases.make_inputs(Case(hidden_layer=24)).to("cuda")
    answers = torch.tensor([1, 1, 2, 2], device="cuda")

    def run():
        return verify(
            inputs.hidden, inputs.positions, inputs.head, offsets=inputs.offsets, method="majority", answers=answers,
            k=2, backend=backend,
        )  # fmt: skip

    run()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
