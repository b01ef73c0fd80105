"""Every wrong argument: the type of the exception and the argument's name in the message."""

import math

import pytest
import scoring_cases as cases
import torch
from scoring_cases import Case

from tts_kernels.scoring import ScoreHead, select, step_scores, token_logprobs, unsupported_reasons, verify

F8 = torch.float8_e4m3fn


def strided(x):
    return torch.stack([x, x], -1)[..., 0]


def needs_grad(x):
    return x.clone().requires_grad_()


def changed(values, i, value):
    values = values.clone()
    values[i] = value
    return values


def verify_arguments(**changes):
    inputs = cases.make_inputs(Case(steps=(3, 0, 1, 5)))  # 19 rows, 9 steps, 4 candidates
    given = {
        "hidden": inputs.hidden, "positions": inputs.positions, "head": inputs.head, "offsets": inputs.offsets,
        "group_offsets": torch.tensor([0, 1, 4]), "answers": torch.tensor([0, 1, -1, 1]), "method": "majority",
    }  # fmt: skip
    given.update({n: change(given[n]) if callable(change) else change for n, change in changes.items()})
    return given


VERIFY = [
    # argument named, exception, change, part of the message that says what came
    ("hidden", TypeError, {"hidden": None}, "NoneType"),
    ("hidden", TypeError, {"hidden": lambda x: x.double()}, "float64"),
    ("hidden", TypeError, {"hidden": lambda x: x.to(F8)}, "float8"),
    ("hidden", ValueError, {"hidden": lambda x: x[None]}, r"\(1, 19, 40\)"),
    ("hidden", ValueError, {"hidden": lambda x: x[:, :39]}, r"\(19, 39\)"),
    ("hidden", ValueError, {"hidden": strided}, "strides"),
    ("hidden", ValueError, {"hidden": needs_grad}, "requires_grad"),
    ("head", TypeError, {"head": lambda h: h.w2}, "Tensor"),
    ("head", ValueError, {"head": lambda h: cases.replace(h, w2=needs_grad(h.w2))}, "w2 with requires_grad"),
    ("head", ValueError, {"head": ScoreHead.linear(torch.empty(2, 40, device="meta"))}, "w2 on meta"),
    ("positions", TypeError, {"positions": [1, 2, 3]}, "list"),
    ("positions", TypeError, {"positions": lambda p: p.float()}, "float32"),
    ("positions", ValueError, {"positions": lambda p: p[None]}, r"\(1, 9\)"),
    ("positions", ValueError, {"positions": lambda p: p.to("meta")}, "meta"),
    ("positions", ValueError, {"positions": lambda p: changed(p, 4, 19)}, "19 at 4"),
    ("positions", ValueError, {"positions": lambda p: changed(p, 8, -1)}, "-1 at 8"),
    ("positions", ValueError, {"positions": torch.tensor([5, 6, 7, 1, 2, 3, 4, 4, 8]), "ordered": True}, "4 after 4"),
    ("offsets", TypeError, {"offsets": None}, "NoneType"),
    ("offsets", TypeError, {"offsets": lambda o: o.double()}, "float64"),
    ("offsets", ValueError, {"offsets": lambda o: o[:0]}, r"\(0,\)"),
    ("offsets", ValueError, {"offsets": lambda o: changed(o, 0, 1)}, "0 first, got 1"),
    ("offsets", ValueError, {"offsets": lambda o: changed(o, 2, 2)}, "2 after 3 at 2"),
    # Whose differences, as int64, are all positive.
    ("offsets", ValueError, {"offsets": torch.tensor([0, 2**63 - 1, -(2**63), -(2**62), 9])}, "at 2"),
    ("offsets", ValueError, {"offsets": lambda o: changed(o, 4, 8)}, "9 last, the number of positions, got 8"),
    ("offsets", ValueError, {"offsets": lambda o: o.to("meta")}, "meta"),
    ("reduce", ValueError, {"reduce": "median"}, "'median'"),
    ("group_offsets", TypeError, {"group_offsets": [0, 4]}, "list"),
    ("group_offsets", ValueError, {"group_offsets": lambda g: g[:0]}, r"\(0,\)"),
    ("group_offsets", ValueError, {"group_offsets": torch.tensor([0, 3, 1, 4])}, "1 after 3 at 2"),
    ("group_offsets", ValueError, {"group_offsets": torch.tensor([1, 4])}, "got 1"),
    ("group_offsets", ValueError, {"group_offsets": torch.tensor([0, 9])}, "4 last, the number of candidates, got 9"),
    ("answers", TypeError, {"answers": None}, "None"),
    ("answers", TypeError, {"answers": lambda a: a.float()}, "float32"),
    ("answers", ValueError, {"answers": lambda a: a[1:]}, r"\(3,\)"),
    ("answers", ValueError, {"answers": lambda a: changed(a, 2, -2)}, "-2 at 2"),
    ("method", ValueError, {"method": "vote"}, "'vote'"),
    ("k", ValueError, {"k": 0}, "0"),
    ("k", TypeError, {"k": 1.0}, "float"),
    ("k", TypeError, {"k": True}, "bool"),
    ("k", ValueError, {"k": 2, "method": "best"}, "2"),
    ("backend", ValueError, {"backend": "gpu"}, "'gpu'"),
]


@pytest.mark.parametrize("argument, error, changes, got", VERIFY)
def test_verify(argument, error, changes, got):
    with pytest.raises(error, match=rf"^{argument}: expected .*{got}"):
        verify(**verify_arguments(**changes))


def test_the_arguments_are_otherwise_right():
    verify(**verify_arguments(), check=True)
    verify(**verify_arguments(positions=torch.tensor([5, 6, 7, 1, 2, 3, 4, 6, 8]), ordered=True))
    with torch.no_grad():
        verify(**verify_arguments(hidden=needs_grad))


@pytest.mark.parametrize(
    "argument, error, changes, got", [case for case in VERIFY if case[0] in ("positions", "offsets", "hidden", "head")]
)
def test_step_scores_checks_the_same(argument, error, changes, got):
    given = verify_arguments(**changes)
    given = {n: given[n] for n in ("hidden", "positions", "head", "offsets", "ordered") if n in given}
    with pytest.raises(error, match=rf"^{argument}: expected .*{got}"):
        step_scores(**given)


@pytest.mark.parametrize(
    "argument, error, scores, options",
    [
        ("scores", TypeError, [0.5], {}),
        ("scores", TypeError, torch.zeros(3, dtype=torch.float16), {}),
        ("scores", ValueError, torch.zeros(3, 1), {}),
        ("scores", ValueError, torch.zeros(3, requires_grad=True), {}),
        ("answers", TypeError, torch.zeros(3), {"method": "weighted_vote"}),
        ("group_offsets", ValueError, torch.zeros(3), {"group_offsets": torch.tensor([0, 2])}),
        ("k", ValueError, torch.zeros(3), {"k": 3}),
    ],
)
def test_select(argument, error, scores, options):
    with pytest.raises(error, match=f"^{argument}: expected"):
        select(scores, **options)


TOKENS = {"hidden": torch.zeros(3, 8), "weight": torch.zeros(20, 8), "targets": torch.tensor([0, 1, 2]), "bias": None}


@pytest.mark.parametrize(
    "argument, error, value, got",
    [
        ("hidden", TypeError, torch.zeros(3, 8).double(), "float64"),
        ("weight", TypeError, torch.zeros(20, 8).to(F8), "float8"),
        ("weight", ValueError, torch.zeros(20, 9), r"\(20, 9\)"),
        ("weight", ValueError, torch.zeros(0, 8), r"\(0, 8\)"),
        ("weight", ValueError, torch.zeros(8, 20).t(), "strides"),
        ("weight", ValueError, torch.zeros(20, 8, requires_grad=True), "requires_grad"),
        ("weight", ValueError, torch.zeros(20, 8, device="meta"), "meta"),
        ("bias", ValueError, torch.zeros(19), r"\(19,\)"),
        ("bias", TypeError, torch.zeros(20).double(), "float64"),
        ("targets", TypeError, [0, 1, 2], "list"),
        ("targets", TypeError, torch.zeros(3), "float32"),
        ("targets", ValueError, torch.tensor([0, 1]), r"\(2,\)"),
        ("targets", ValueError, torch.tensor([0, 1, 20]), "20 at 2"),
        ("targets", ValueError, torch.tensor([0, -100, 2]), "-100 at 1"),
    ],
)
def test_token_logprobs(argument, error, value, got):
    with pytest.raises(error, match=rf"^{argument}: expected .*{got}"):
        token_logprobs(**{**TOKENS, argument: value})


W1, B1, W2, B2 = torch.zeros(6, 8), torch.zeros(6), torch.zeros(2, 6), torch.zeros(2)


@pytest.mark.parametrize(
    "argument, error, make",
    [
        ("w1", TypeError, lambda: ScoreHead.mlp(None, None, W2, B2)),
        ("w1", TypeError, lambda: ScoreHead.mlp(W1.double(), B1, W2, B2)),
        ("w1", ValueError, lambda: ScoreHead.mlp(W1.t(), B1, W2, B2)),
        ("w1", ValueError, lambda: ScoreHead.mlp(W1.to("meta"), None, W2, B2)),
        ("b1", ValueError, lambda: ScoreHead.mlp(W1, B2, W2, B2)),
        ("b1", TypeError, lambda: ScoreHead.mlp(W1, 0.5, W2, B2)),
        ("w2", ValueError, lambda: ScoreHead.mlp(W1, B1, W1, None)),
        ("w2", ValueError, lambda: ScoreHead.linear(torch.zeros(8))),
        ("w2", ValueError, lambda: ScoreHead.linear(torch.zeros(0, 8))),
        ("w2", TypeError, lambda: ScoreHead.linear(None)),
        ("b2", ValueError, lambda: ScoreHead.mlp(W1, B1, W2, B1)),
        ("b2", ValueError, lambda: ScoreHead.linear(W2, B2.to("meta"))),
        ("act", ValueError, lambda: ScoreHead.mlp(W1, B1, W2, B2, act="tanh")),
        ("activation", ValueError, lambda: ScoreHead.linear(W2, activation="tanh")),
        ("activation", ValueError, lambda: ScoreHead.linear(W2[:1], activation="softmax")),
        ("positive", ValueError, lambda: ScoreHead.linear(W2, positive=2)),
        ("positive", ValueError, lambda: ScoreHead.linear(W2, positive=-1)),
        ("positive", TypeError, lambda: ScoreHead.linear(W2, positive=True)),
        ("norm", ValueError, lambda: ScoreHead.linear(W2, norm=(torch.ones(5), 1e-6))),
        ("norm", TypeError, lambda: ScoreHead.linear(W2, norm=torch.ones(6))),
        ("norm", TypeError, lambda: ScoreHead.linear(W2, norm=(torch.ones(6), "1e-6"))),
        ("norm", ValueError, lambda: ScoreHead.linear(W2, norm=(torch.ones(6), math.nan))),
        ("norm", ValueError, lambda: ScoreHead.linear(W2, norm=(torch.ones(6), -1e-6))),
        (r"ids\[1\]", ValueError, lambda: ScoreHead.vocab_rows(W1, [0, 6])),
        (r"ids\[0\]", TypeError, lambda: ScoreHead.vocab_rows(W1, ["+", "-"])),
        ("ids", ValueError, lambda: ScoreHead.vocab_rows(W1, [])),
        ("bias", ValueError, lambda: ScoreHead.vocab_rows(W1, [0, 1], B2)),
        ("weight", TypeError, lambda: ScoreHead.vocab_rows(None, [0, 1])),
    ],
)
def test_heads(argument, error, make):
    with pytest.raises(error, match=f"^{argument}: expected"):
        make()


def test_unsupported_reasons():
    with pytest.raises(ValueError, match=r"^op: expected"):
        unsupported_reasons("score", "cpu")
    with pytest.raises(ValueError, match=r"^backend: expected"):
        unsupported_reasons("verify", "gpu")
