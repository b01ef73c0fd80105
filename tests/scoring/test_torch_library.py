"""The registered ops under opcheck and torch.compile(fullgraph=True)."""

import pytest
import scoring_cases as cases
import torch
from scoring_cases import BF16, Case

from tts_kernels.scoring import select, step_scores, token_logprobs, verify
from tts_kernels.scoring.api import check_steps

OP = torch.ops.tts_kernels
MLP = Case(hidden_layer=24, norm=True)


def step_arguments(path, case):
    """Without nan, which opcheck takes for a difference: no candidate without steps, no unread row that holds it."""
    at = cases.make_inputs(cases.replace(case, steps=(3, 1, 5))).to(path.device)
    at.hidden.nan_to_num_()
    return check_steps(at.hidden, at.positions, at.head, at.offsets, False)


@pytest.mark.parametrize("case", [MLP, Case(bias=False)], ids=str)
def test_opcheck_step_scores(path, case):
    torch.library.opcheck(OP.step_scores.default, (*step_arguments(path, case), path.backend, True))


@pytest.mark.parametrize("grouped", [False, True])
def test_opcheck_verify(path, grouped):
    groups = torch.tensor([0, 1, 3], device=path.device) if grouped else None
    answers = torch.tensor([1, 1, 2], device=path.device) if grouped else None
    method = "majority" if grouped else "best"
    arguments = step_arguments(path, MLP)
    torch.library.opcheck(OP.verify.default, (*arguments, "mean", groups, answers, method, 1, path.backend, True))


def test_opcheck_select(path):
    scores = torch.tensor([0.25, 0.5, 0.75], device=path.device)
    groups = torch.tensor([0, 2, 3], device=path.device)
    answers = torch.tensor([1, 1, 2], device=path.device)
    torch.library.opcheck(OP.select.default, (scores, groups, answers, "weighted_vote", 1, path.backend, True))
    torch.library.opcheck(OP.select.default, (scores, None, None, "top_k", 3, path.backend, False))


@pytest.mark.parametrize("bias", [False, True])
def test_opcheck_token_logprobs(path, bias):
    if path.backend == "cuda":
        pytest.skip("it has no token_logprobs")
    hidden, weight = torch.randn(3, 8, device=path.device), torch.randn(20, 8, device=path.device)
    targets = torch.tensor([0, 3, 19], device=path.device)
    more = torch.randn(20, device=path.device) if bias else None
    torch.library.opcheck(OP.token_logprobs.default, (hidden, weight, targets, more, path.backend, True))


def test_fake_results_have_the_shapes_of_real_ones():
    inputs = cases.make_inputs(MLP)
    groups = torch.tensor([0, 1, 4])
    real = verify(inputs.hidden, inputs.positions, inputs.head, offsets=inputs.offsets, group_offsets=groups, k=2,
                  method="top_k")  # fmt: skip
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        fake = verify(inputs.hidden, inputs.positions, inputs.head, offsets=inputs.offsets, group_offsets=groups, k=2,
                      method="top_k")  # fmt: skip
        logprobs = token_logprobs(
            torch.empty(3, 8, dtype=BF16), torch.empty(20, 8, dtype=BF16), torch.zeros(3, dtype=torch.int64)
        )
    for a, b in zip(real, fake):
        for name, tensor in vars(a).items():
            assert getattr(b, name).shape == tensor.shape and getattr(b, name).dtype == tensor.dtype, name
    assert logprobs.shape == (3,) and logprobs.dtype == torch.float32


# What the compiler sees ends at the registered op: one backend, the default one, stands for all.


@pytest.fixture(params=["aot_eager"])
def compiler(request):
    torch._dynamo.reset()
    return request.param


def test_compiled_verify(compiler):
    inputs = cases.make_inputs(MLP)
    answers = torch.tensor([1, 1, 2, 2])

    def function(hidden, positions, offsets, answers):
        scores, chosen = verify(
            hidden * 2, positions, inputs.head, offsets=offsets, method="weighted_vote", answers=answers, reduce="mean"
        )
        return scores.margin + 1, scores.log_prod, scores.count, chosen.indices, chosen.scores

    arguments = inputs.hidden, inputs.positions, inputs.offsets, answers
    with torch.no_grad():
        got = torch.compile(function, fullgraph=True, backend=compiler)(*arguments)
        for a, b in zip(got, function(*arguments)):
            torch.testing.assert_close(a, b, equal_nan=True)


def test_compiled_results_are_dataclasses(compiler):
    inputs = cases.make_inputs(Case())

    def function(hidden, positions, offsets):
        scores = step_scores(hidden, positions, inputs.head, offsets=offsets)
        return scores, select(scores.last)

    with torch.no_grad():
        scores, chosen = torch.compile(function, fullgraph=True, backend=compiler)(
            inputs.hidden, inputs.positions, inputs.offsets
        )
        wanted, best = function(inputs.hidden, inputs.positions, inputs.offsets)
    for name in ("margin", *cases.STATS):
        torch.testing.assert_close(getattr(scores, name), getattr(wanted, name), equal_nan=True)
    assert torch.equal(chosen.indices, best.indices)


def test_compiled_token_logprobs_with_sizes_that_change(compiler):
    """Another number of rows: compiled at most once more, for any."""
    compiled = torch.compile(token_logprobs, fullgraph=True, backend=compiler)
    gen = torch.Generator().manual_seed(0)
    weight = torch.randn(50, 8, generator=gen)
    for rows in (3, 5, 9, 12):
        hidden, targets = torch.randn(rows, 8, generator=gen), torch.randint(0, 50, (rows,), generator=gen)
        with torch.compiler.set_stance("default" if rows <= 5 else "fail_on_recompile"), torch.no_grad():
            got = compiled(hidden, weight, targets)
        wanted = (hidden @ weight.T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
        torch.testing.assert_close(got, wanted)


def test_compiled_verify_with_sizes_that_change(compiler):
    """Another number of steps, rows and candidates."""
    inputs = cases.make_inputs(Case())

    def function(hidden, positions, offsets):
        _, chosen = verify(hidden, positions, inputs.head, offsets=offsets, method="top_k", k=2)
        return chosen.indices

    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    for steps in ((3, 2), (4, 1, 2), (5, 2, 2, 3), (2, 2, 2, 2, 7)):
        now = cases.make_inputs(Case(steps=steps))
        arguments = now.hidden, now.positions, now.offsets
        with torch.compiler.set_stance("default" if len(steps) <= 3 else "fail_on_recompile"), torch.no_grad():
            assert torch.equal(compiled(*arguments), function(*arguments))


class Seen(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.ops.append(str(op))
        return op(*args, **(kwargs or {}))


def test_the_dispatcher_sees_calls_where_someone_looks():
    """Else it would do nothing but call the implementation, and is not asked."""
    inputs = cases.make_inputs(Case())
    arguments, options = (inputs.hidden, inputs.positions, inputs.head), {"offsets": inputs.offsets}
    scores = step_scores(*arguments, **options)
    with Seen() as seen:
        watched = step_scores(*arguments, **options)
        select(watched.last)
    assert {"tts_kernels.step_scores.default", "tts_kernels.select.default"} <= set(seen.ops)
    assert torch.equal(watched.margin, scores.margin)
    with torch.profiler.profile() as profile:
        step_scores(*arguments, **options)
    assert "tts_kernels::step_scores" in [event.key for event in profile.key_averages()]
    assert select(torch.empty(3, device="meta")).indices.is_meta
    assert torch.equal(select(torch._neg_view(scores.margin)).indices, select(-scores.margin).indices)
