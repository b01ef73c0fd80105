"""step_scores against float64, literal expectations, and what the batch may not change."""

import math

import pytest
import scoring_cases as cases
import torch
from scoring_cases import BF16, FP16, FP32, Case

from tts_kernels.scoring import ScoreHead, step_scores, unsupported_reasons
from tts_kernels.scoring.api import BACKENDS

# Heads of published verifiers first, small; then each option off its default once, dtypes that differ, sizes that fill
# no block (37), more columns than a Triton program owns (11), and a hidden size of several blocks (1100, 130).
GRID = (
    Case(hidden_layer=24),  # Qwen2.5-Math-PRM
    Case(columns=1, activation="sigmoid", positive=0),  # Skywork
    Case(columns=2, positive=0, bias=False),  # Math-Shepherd: two rows of the LM head
    Case(columns=1, activation="identity", positive=0),  # PQM
    Case(norm=True),
    Case(hidden_layer=24, act="gelu", norm=True),
    Case(hidden_layer=70, bias=False, columns=1, activation="sigmoid", positive=0),
    Case(columns=11, positive=10, norm=True),
    Case(hidden_layer=24, columns=3, positive=0),
    Case(dim=1),
    Case(dim=37, dtypes=(FP16, FP16)),
    Case(dim=37, dtypes=(BF16, BF16), norm=True),
    Case(hidden_layer=24, dtypes=(FP16, FP16)),
    Case(hidden_layer=24, dtypes=(BF16, BF16)),
    Case(hidden_layer=24, dtypes=(BF16, BF16), norm=True, act="gelu"),
    Case(hidden_layer=24, dtypes=(BF16, FP32)),
    Case(dtypes=(FP32, BF16)),
    Case(dim=1100, steps=(2,)),
    Case(dim=130, hidden_layer=130, steps=(2, 1)),
    Case(columns=2, activation="sigmoid", positive=1),
)


@pytest.mark.parametrize("case", GRID, ids=str)
def test_against_float64(path, case):
    inputs = cases.make_inputs(case)
    cases.check_scores(inputs.run(path), inputs)


@pytest.mark.parametrize(
    "steps", [(), (0,), (0, 0, 0), (1,), (500,), (1, 500, 0), (63,), (64,), (65,), (0, 130, 1, 0)], ids=str
)
def test_numbers_of_steps(path, steps):
    inputs = cases.make_inputs(Case(dim=8, steps=steps))
    cases.check_scores(inputs.run(path), inputs)


def run(path, logits, steps, **options):
    hidden, head = cases.head_of(torch.tensor(logits, dtype=FP32), **options)
    offsets = torch.tensor([0, *torch.tensor(steps).cumsum(0).tolist()])
    inputs = cases.Inputs(Case(), hidden, torch.arange(len(logits)), offsets, head)
    return inputs.run(path)


def test_literal_softmax(path):
    """Probabilities 1/2, 3/4 and 1/4, and a candidate without steps."""
    log3 = math.log(3)
    got = run(path, [[0, 0], [0, log3], [log3, 0]], [2, 0, 1])
    torch.testing.assert_close(got.margin.cpu(), torch.tensor([0, log3, -log3]))
    torch.testing.assert_close(got.prob.cpu(), torch.tensor([0.5, 0.75, 0.25]))
    assert got.count.tolist() == [2, 0, 1]
    nan = math.nan
    wanted = {
        "last": [0.75, nan, 0.25], "min": [0.5, nan, 0.25], "prod": [0.375, nan, 0.25], "mean": [0.625, nan, 0.25],
        "max": [0.75, nan, 0.25], "log_prod": [math.log(0.375), nan, math.log(0.25)],
    }  # fmt: skip
    for name, values in wanted.items():
        torch.testing.assert_close(getattr(got, name).cpu(), torch.tensor(values), equal_nan=True)


def test_margins_tell_apart_what_probabilities_do_not(path):
    """The margin of two columns is the difference of their logits, exactly; probabilities are 1 from 17 on."""
    got = run(path, [[0.0, 20.0], [0.0, 25.0], [-30.0, 60.0]], [3])
    assert got.margin.tolist() == [20.0, 25.0, 90.0]
    assert got.prob.tolist() == [1.0, 1.0, 1.0]
    assert -2.2e-9 < got.log_prod.item() < -2.0e-9  # log(prob) of 20 is -2.06e-9, which 1 - prob would lose


def test_probabilities_that_underflow(path):
    """500 steps at margin -100: their product is 0, the sum of logarithms -50,000; nothing is nan or infinite."""
    got = run(path, [[100.0, 0.0]] * 500, [500])
    assert got.prod.item() == 0 and got.count.item() == 500
    assert got.log_prod.item() == pytest.approx(-50000)
    assert 0 <= got.min.item() <= got.last.item() <= 1e-37
    got = run(path, [[0.0, -1e30], [0.0, 1e30]], [2])
    assert got.prob.tolist() == [0.0, 1.0] and got.log_prod.item() == pytest.approx(-1e30)


def test_literal_identity(path):
    """Raw values of any sign: the logarithm of a negative one is nan, the rest is not."""
    got = run(path, [[-2.0], [3.0], [0.5], [4.0]], [3, 1], activation="identity")
    assert got.margin.tolist() == got.prob.tolist() == [-2.0, 3.0, 0.5, 4.0]
    assert got.last.tolist() == [0.5, 4.0] and got.min.tolist() == [-2.0, 4.0] and got.max.tolist() == [3.0, 4.0]
    assert got.prod.tolist() == [-3.0, 4.0] and got.mean.tolist() == [0.5, 4.0]
    assert math.isnan(got.log_prod[0]) and got.log_prod[1].item() == pytest.approx(math.log(4))


def test_a_nan_shows_where_it_enters(path):
    """In the first step: not in `last`; and not in the other candidate."""
    got = run(path, [[math.nan, 0.0], [0.0, 0.0], [0.0, 0.0]], [2, 1])
    for name in ("min", "prod", "mean", "max", "log_prod"):
        assert getattr(got, name).isnan().tolist() == [True, False], name
    assert got.last.tolist() == [0.5, 0.5] and got.min[1].item() == 0.5


@pytest.mark.parametrize("columns", [1, 2, 4])
def test_infinite_logits(path, columns):
    """The last column is +inf and the others -inf, then the other way around."""
    inf = math.inf
    head = ScoreHead.linear(torch.tensor([[-1.0]] * (columns - 1) + [[1.0]]))
    hidden = torch.tensor([[inf], [-inf], [0.0]])
    got = cases.Inputs(Case(), hidden, torch.arange(3), torch.arange(4), head).run(path)
    assert got.margin[:2].tolist() == [inf, -inf] and got.prob[:2].tolist() == [1.0, 0.0]
    assert got.log_prod[:2].tolist() == [0.0, -inf]


def test_a_nan_beside_any_logit(path):
    """In a column that is not the positive one: the margin is nan, whatever stands before or after it. The logits are
    given to the backend, since a head cannot make them."""
    inf, nan = math.inf, math.nan
    logits = torch.tensor([[nan, inf, 0], [inf, nan, 0], [nan, 1, 0], [1, nan, 0], [inf, 1, 0]], device=path.device)
    offsets = torch.arange(6, device=path.device)
    margin, _, stats, _ = BACKENDS.load(path.backend).reduce(logits, offsets, "softmax", 2)
    assert margin.isnan().tolist() == [True] * 4 + [False] and margin[4] == -inf
    assert torch.equal(stats.isnan().all(0), margin.isnan())


def test_columns_are_rows_of_the_vocabulary(path):
    gen = torch.Generator().manual_seed(0)
    weight, bias, hidden = torch.randn(50, 16, generator=gen), torch.randn(50, generator=gen), torch.randn(3, 16)
    head = ScoreHead.vocab_rows(weight, [7, 31], bias)
    inputs = cases.Inputs(Case(), hidden, torch.arange(3), torch.tensor([0, 3]), head)
    logits = (hidden.double() @ weight.double().T + bias.double())[:, [7, 31]]
    torch.testing.assert_close(inputs.run(path).prob.cpu(), logits.softmax(1)[:, 0].float())


def test_defaults_of_heads():
    w, w1 = torch.zeros(2, 8), torch.zeros(4, 8)
    assert (ScoreHead.linear(w).activation, ScoreHead.linear(w).positive) == ("softmax", 1)
    assert (ScoreHead.linear(w[:1]).activation, ScoreHead.linear(w[:1]).positive) == ("sigmoid", 0)
    assert (ScoreHead.vocab_rows(w, [1, 0]).activation, ScoreHead.vocab_rows(w, [1, 0]).positive) == ("softmax", 0)
    mlp = ScoreHead.mlp(w1, None, w[:, :4], None)
    assert (mlp.act, mlp.activation, mlp.positive, mlp.dim) == ("relu", "softmax", 1, 8)


# Two heads of each kind of product, and lengths that fill no vector. More rows than one block of the reference (64) and
# of the Triton MLP (64); fewer for the interpreter, which is slow.
INVARIANT = (
    Case(dim=48),
    Case(dim=37),
    Case(dim=50, hidden_layer=21),
    Case(dim=48, norm=True, columns=3),
    Case(dim=48, hidden_layer=40, norm=True),
    Case(dim=64, hidden_layer=72, dtypes=(FP16, FP16)),
)


@pytest.mark.usefixtures("products_by_row")
@pytest.mark.parametrize("case", INVARIANT, ids=str)
def test_the_batch_changes_no_bit(path, case):
    """A candidate of 5 steps alone, and in batches of many sizes, at any place in them."""
    steps, sizes = 5, (1, 2, 3, 6, 11, 17, 40, 64, 65, 129, 200)
    if path.interpreted:
        sizes = (1, 3, 66) if case.hidden_layer else (1, 3)
    gen = torch.Generator().manual_seed(1)
    alone = cases.make_inputs(cases.replace(case, steps=(steps,)))
    own = alone.hidden[alone.positions]
    wanted = alone.run(path)
    for size in sizes:
        place = int(torch.randint(0, size, (), generator=gen))
        hidden = torch.randn(size + steps, case.dim, generator=gen).to(own.dtype)
        hidden[place : place + steps] = own
        batch = cases.Inputs(
            case, hidden, torch.arange(size + steps), torch.tensor([0, place, place + steps, size + steps]), alone.head
        )
        got = batch.run(path)
        for name in ("margin", "prob"):
            assert cases.same_bits(getattr(got, name)[place : place + steps], getattr(wanted, name)), (name, size)
        for name in cases.STATS:
            assert cases.same_bits(getattr(got, name)[1:2], getattr(wanted, name)), (name, size)


@pytest.mark.parametrize("length", [1, 7, 64, 100, 257])
def test_where_a_candidate_lies_changes_no_bit(path, length):
    """Its sums are the same wherever its steps begin."""
    if path.interpreted and length > 64:
        pytest.skip("slow under the interpreter")
    logits = torch.randn(length, 2, generator=torch.Generator().manual_seed(length))
    wanted = run(path, logits.tolist(), [length])
    for before in (1, 2, 5, 16):
        got = run(path, [[0.5, 1.5]] * before + logits.tolist(), [before, length])
        for name in cases.STATS:
            assert cases.same_bits(getattr(got, name)[1:], getattr(wanted, name)), (name, before)
        for name in ("margin", "prob"):
            assert cases.same_bits(getattr(got, name)[before:], getattr(wanted, name)), (name, before)


def test_any_number_of_threads_gives_the_same_bits(path):
    if path.backend != "cpu":
        pytest.skip("for the cpu backend alone")
    inputs = cases.make_inputs(Case(dim=100, hidden_layer=90, steps=(40, 3, 0, 20)))
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(inputs.run(path))
    for got in results[1:]:
        assert all(cases.same_bits(getattr(got, n), getattr(results[0], n)) for n in ("margin", *cases.STATS))


def test_int32_lists_and_slices(path):
    """Index lists of int32, with strides, and from the middle of others."""
    inputs = cases.make_inputs(Case())
    wanted = inputs.run(path)
    at = inputs.to(path.device)
    positions = torch.stack([at.positions, at.positions], 1).to(torch.int32)[:, 0]
    offsets = torch.cat([at.offsets[:1], at.offsets])[1:]
    got = step_scores(at.hidden, positions, at.head, offsets=offsets, backend=path.backend, ordered=False)
    assert torch.equal(got.margin, wanted.margin)


@pytest.mark.parametrize("path", cases.PATHS, ids=str)
def test_path_is_available(path):
    """Skipped, with the reason, for what this machine cannot run: the other tests leave it out."""
    if path.missing():
        pytest.skip(path.missing())


def test_an_explicit_backend_raises_and_never_falls_back(monkeypatch):
    monkeypatch.setattr(BACKENDS.load("cuda"), "native", None)
    (reason,) = unsupported_reasons("verify", "cuda")
    assert reason == "the native module has no CUDA kernels: it was not built"
    inputs = cases.make_inputs(Case())
    with pytest.raises(RuntimeError, match=f"backend 'cuda' cannot run step_scores: {reason}"):
        step_scores(inputs.hidden, inputs.positions, inputs.head, offsets=inputs.offsets, backend="cuda")
