"""aggregate: what step_scores returned, from its margins alone, bit for bit."""

import math

import pytest
import scoring_cases as cases
import torch
from scoring_cases import Case

from tts_kernels.scoring import aggregate, unsupported_reasons
from tts_kernels.scoring.api import BACKENDS

FIELDS = ("margin", "prob", *cases.STATS, "count")

# Heads whose margins come about in all ways: of two columns, of several, alone, as they are.
HEADS = (
    Case(hidden_layer=24),
    Case(columns=5, positive=2),
    Case(columns=1, activation="sigmoid", positive=0),
    Case(columns=3, activation="sigmoid", positive=1),
    Case(columns=1, activation="identity", positive=0),
    Case(columns=3, activation="identity", positive=2),
)


def same(got, wanted):
    return all(cases.same_bits(getattr(got, name), getattr(wanted, name)) for name in FIELDS)


# Steps in all lengths around a Triton block, empty candidates, and more than one thread takes.
@pytest.mark.parametrize("steps", [(3, 0, 1, 5), (), (0,), (0, 0), (63, 0, 64, 65), (1,) * 40 + (200,)], ids=str)
@pytest.mark.parametrize("head", HEADS, ids=str)
def test_margins_give_the_bits_they_came_with(path, head, steps):
    inputs = cases.make_inputs(cases.replace(head, steps=steps))
    wanted = inputs.run(path)
    offsets = inputs.offsets.to(path.device)
    for activation in {head.activation, "identity" if head.activation == "identity" else "sigmoid"}:
        assert same(aggregate(wanted.margin, offsets=offsets, activation=activation, backend=path.backend), wanted)


def test_any_margins(path):
    """Those of no finite probability too: the head whose logits they are gives the same."""
    inf, nan = math.inf, math.nan
    margin = torch.tensor([0.0, -0.0, 20.0, 90.0, -100.0, 1e30, -1e30, inf, -inf, nan, 1.0, 1e-40])
    offsets = torch.tensor([0, 2, 7, 8, 9, 12])
    for activation in ("sigmoid", "identity"):
        hidden, head = cases.head_of(margin[:, None], activation=activation, positive=0)
        wanted = cases.Inputs(Case(), hidden, torch.arange(12), offsets, head).run(path)
        got = aggregate(margin.to(path.device), offsets=offsets.to(path.device), activation=activation,
                        backend=path.backend)  # fmt: skip
        for name in FIELDS:
            torch.testing.assert_close(getattr(got, name), getattr(wanted, name), rtol=0, atol=0, equal_nan=True)


def test_literal(path):
    log3 = math.log(3)
    margin, offsets = torch.tensor([0, log3, -log3], device=path.device), torch.tensor([0, 2, 2, 3], device=path.device)
    got = aggregate(margin, offsets=offsets, backend=path.backend)
    assert got.count.tolist() == [2, 0, 1] and got.prod[1].isnan()
    torch.testing.assert_close(got.prod[[0, 2]].cpu(), torch.tensor([0.375, 0.25]))


def test_the_margin_returned_is_a_copy(path):
    margin = torch.zeros(3, device=path.device)
    for activation in ("sigmoid", "identity"):
        got = aggregate(margin, offsets=torch.tensor([0, 3], device=path.device), activation=activation,
                        backend=path.backend)  # fmt: skip
        assert len({got.margin.data_ptr(), got.prob.data_ptr(), margin.data_ptr()}) == 3


@pytest.mark.parametrize(
    "argument, error, changes, came",
    [
        ("margin", TypeError, {"margin": [0.5]}, "list"),
        ("margin", TypeError, {"margin": torch.zeros(3).double()}, "float64"),
        ("margin", ValueError, {"margin": torch.zeros(3, 1)}, r"\(3, 1\)"),
        ("margin", ValueError, {"margin": torch.zeros(6)[::2]}, r"\(2,\)"),
        ("margin", ValueError, {"margin": torch.zeros(3, requires_grad=True)}, "requires_grad"),
        ("offsets", TypeError, {"offsets": [0, 3]}, "list"),
        ("offsets", ValueError, {"offsets": torch.tensor([0, 2])}, "got 2"),
        ("offsets", ValueError, {"offsets": torch.tensor([0, 4, 3])}, "3 after 4 at 2"),
        ("offsets", ValueError, {"offsets": torch.tensor([1, 3])}, "got 1"),
        ("activation", ValueError, {"activation": "tanh"}, "'tanh'"),
        ("backend", ValueError, {"backend": "gpu"}, "'gpu'"),
    ],
)
def test_bad_input(argument, error, changes, came):
    given = {"margin": torch.zeros(3), "offsets": torch.tensor([0, 3])} | changes
    with pytest.raises(error, match=rf"^{argument}: expected .*{came}"):
        aggregate(**given)


@pytest.mark.parametrize("activation", ["sigmoid", "identity"])
def test_opcheck(path, activation):
    margin, offsets = torch.rand(5, device=path.device), torch.tensor([0, 2, 5], device=path.device)
    torch.library.opcheck(torch.ops.tts_kernels.aggregate.default, (margin, offsets, activation, path.backend, True))


def test_compiled():
    compiled = torch.compile(
        lambda margin, offsets: aggregate(margin * 2, offsets=offsets).log_prod + 1, fullgraph=True, backend="aot_eager"
    )
    margin, offsets = torch.tensor([0.5, 1.0, -1.0]), torch.tensor([0, 2, 3])
    wanted = aggregate(margin * 2, offsets=offsets).log_prod + 1
    torch.testing.assert_close(compiled(margin, offsets), wanted)


def test_a_backend_that_is_not_there(monkeypatch):
    monkeypatch.setattr(BACKENDS.load("cuda"), "native", None)
    reason = "the native module has no CUDA kernels: it was not built"
    assert unsupported_reasons("aggregate", "cuda") == [reason]
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot run aggregate"):
        aggregate(torch.zeros(3), offsets=torch.tensor([0, 3]), backend="cuda")
