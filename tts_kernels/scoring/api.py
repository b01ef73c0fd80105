"""The public scoring ops: check the arguments, pick the backend, call it through torch.library.

Shapes: T rows of hidden states, d their size, M steps, N candidates, C columns of a head, G groups of candidates, V
tokens of a vocabulary. What belongs to whom is said by offsets: candidate i owns steps [offsets[i], offsets[i + 1]),
and group g owns candidates [group_offsets[g], group_offsets[g + 1]).

Everything after the load is fp32. What comes out for a candidate depends on its own rows alone, bit for bit, whatever
else is in the call; backends differ from one another in rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tts_kernels.dispatch import Backends, register

from . import checks, tables
from .heads import ScoreHead, check_activation
from .results import REDUCES, Selection, StepScores

BACKENDS = Backends(
    "scoring",
    __package__,
    {"reference": ".reference", "cpu": ".cpu", "triton": ".triton", "cuda": ".cuda"},
    {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")},
    {op: op for op in ("step_scores", "aggregate", "select", "token_logprobs")} | {"verify": "step_scores"},
    tables.fastest,
)


def step_scores(
    hidden: Tensor,
    positions: Tensor,
    head: ScoreHead,
    *,
    offsets: Tensor,
    ordered: bool = False,
    backend: str | None = None,
    check: bool = False,
) -> StepScores:
    """Scores of reasoning steps: the head runs on the rows where steps end, and nowhere else.

        margin, prob = activation(head(norm(hidden[positions])))

    Args:
        hidden: [T, d], float32, float16 or bfloat16: the verifier's last hidden states, all candidates' in one tensor.
        positions: int64 or int32 [M], rows of `hidden` to read, candidate after candidate, each in the order of its
            steps. A row may be read several times.
        head: a ScoreHead for hidden states of size d, its weights on the device of `hidden`.
        offsets: int64 or int32 [N + 1], from 0 to M: candidate i owns positions[offsets[i]:offsets[i + 1]].
        ordered: also require that the positions of a candidate ascend.
        backend: "reference", "cpu", "triton" or "cuda": runs there or raises, never elsewhere. Default: what was
            measured to be fastest (`tts-kernels tune`), else by device.
        check: look at the values of positions and offsets on a device too, which synchronises. On the CPU they are
            always looked at. Without it wrong values on a device are undefined behaviour.

    Returns:
        StepScores: per step the margin and the probability, per candidate all aggregates in one pass.

    Raises:
        TypeError, ValueError: a wrong argument, by its name, with what was expected and what came.
        RuntimeError: an explicit `backend` cannot run this call; lists every reason.

    There is no backward: tensors that need a gradient are refused while grad mode is on. On a device nothing
    synchronises. Under torch.compile the op is opaque and needs no graph break.
    """
    arguments = check_steps(hidden, positions, head, offsets, ordered)
    results = STEP_SCORES(*arguments, BACKENDS.check(backend), check)
    return as_scores(*results)


def aggregate(
    margin: Tensor,
    *,
    offsets: Tensor,
    activation: str = "sigmoid",
    backend: str | None = None,
    check: bool = False,
) -> StepScores:
    """What `step_scores` returns, from margins that are known already: kept from earlier calls, or a model's own.

    The same margins give the same bits as in the call of `step_scores` that they came from, in the same backend.

    Args:
        margin: [M] float32, candidate after candidate, each in the order of its steps.
        offsets: int64 or int32 [N + 1], from 0 to M: candidate i owns margin[offsets[i]:offsets[i + 1]].
        activation: that of the head: "identity", or "sigmoid", which is also what the margins of a "softmax" take.
        backend, check: as in `step_scores`, for the values of offsets.

    Returns:
        StepScores: its margin is a copy.

    Raises:
        TypeError, ValueError, RuntimeError: as in `step_scores`.
    """
    checks.check_fp32("margin", margin, "[M]")
    offsets = checks.check_integers("offsets", offsets, "[N + 1]", margin.device, least=1)
    activation = "identity" if check_activation(activation) == "identity" else "sigmoid"
    return as_scores(*AGGREGATE(margin, offsets, activation, BACKENDS.check(backend), check))


def select(
    scores: Tensor,
    *,
    group_offsets: Tensor | None = None,
    k: int = 1,
    method: str = "best",
    answers: Tensor | None = None,
    backend: str | None = None,
    check: bool = False,
) -> Selection:
    """The best candidates of each group. The higher score first, then the lower index.

    Args:
        scores: [N] float32, higher is better. A candidate whose score is nan is never selected and never votes.
        group_offsets: int64 or int32 [G + 1], from 0 to N. Default: all candidates in one group.
        k: candidates for each group; more than 1 with "top_k" and the votes only.
        method: "best": the candidate of the highest score. "top_k": the k of the highest scores.
            "weighted_vote": the answer whose candidates' scores have the greatest sum, fp32 in the order of indices.
            "majority": the answer that most candidates gave. Answers that tie: the one whose first voter has the lower
            index. A vote selects the best-scored candidate of the answer; with k > 1, those of the k best answers.
        answers: int64 or int32 [N], for the votes: equal numbers for equal answers, -1 for none, which votes for
            nothing. The other methods do not read it.
        backend, check: as in `step_scores`, for the values of group_offsets and answers.

    Returns:
        Selection: indices and scores [G, k]; -1 and nan where a group has too few.

    Raises:
        TypeError, ValueError, RuntimeError: as in `step_scores`.
    """
    checks.check_fp32("scores", scores, "[N]")
    answers = checks.check_choice(method, k, answers, scores.shape[0], scores.device)
    group_offsets = checks.check_group_offsets(group_offsets, scores.device)
    results = SELECT(scores, group_offsets, answers, method, k, BACKENDS.check(backend), check)
    return Selection(*results)


def verify(
    hidden: Tensor,
    positions: Tensor,
    head: ScoreHead,
    *,
    offsets: Tensor,
    reduce: str = "last",
    group_offsets: Tensor | None = None,
    k: int = 1,
    method: str = "best",
    answers: Tensor | None = None,
    ordered: bool = False,
    backend: str | None = None,
    check: bool = False,
) -> tuple[StepScores, Selection]:
    """`step_scores`, then `select` by the aggregate `reduce` ("last", "min", "prod", "mean", "max" or "log_prod"), as
    one call: from hidden states to the chosen candidates without a synchronisation.

    A candidate without steps has no score, so it is never selected. Arguments, results and errors are those of the two.
    """
    arguments = check_steps(hidden, positions, head, offsets, ordered)
    checks.check_reduce(reduce)
    answers = checks.check_choice(method, k, answers, offsets.shape[0] - 1, hidden.device)
    group_offsets = checks.check_group_offsets(group_offsets, hidden.device)
    *scores, indices, chosen = VERIFY(
        *arguments, reduce, group_offsets, answers, method, k, BACKENDS.check(backend), check
    )
    return as_scores(*scores), Selection(indices, chosen)


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    backend: str | None = None,
    check: bool = False,
) -> Tensor:
    """log softmax(weight hidden[t] + bias)[targets[t]] for every row t; the logits [T, V] are never stored.

    Args:
        hidden: [T, d], float32, float16 or bfloat16: the hidden states that predict the targets.
        weight, bias: [V, d] and [V] of the LM head, in the same dtypes.
        targets: int64 or int32 [T], in [0, V).
        backend, check: as in `step_scores`, for the values of targets.

    Returns:
        [T] float32, from fp32 products and sums.

    Raises:
        TypeError, ValueError, RuntimeError: as in `step_scores`.
    """
    targets = checks.check_logprobs(hidden, weight, targets, bias)
    return TOKEN_LOGPROBS(hidden, weight, targets, bias, BACKENDS.check(backend), check)


def check_steps(hidden: Tensor, positions: Tensor, head: ScoreHead, offsets: Tensor, ordered: bool) -> tuple:
    """The arguments that step_scores and verify have in common, as the registered ops take them."""
    checks.check_head(hidden, head)
    positions = checks.check_integers("positions", positions, "[M]", hidden.device)
    offsets = checks.check_integers("offsets", offsets, "[N + 1]", hidden.device, least=1)
    return (
        hidden, positions, offsets, head.w1, head.b1, head.w2, head.b2, head.norm_weight, head.norm_eps, head.act,
        head.activation, head.positive, ordered,
    )  # fmt: skip


def as_scores(margin: Tensor, prob: Tensor, stats: Tensor, count: Tensor) -> StepScores:
    return StepScores(margin, prob, *stats.unbind(0), count)


# The registered ops. What reads tensor values (checks, the choice of a backend) happens in here, where torch.compile
# does not look.


def _step_scores(
    hidden, positions, offsets, w1, b1, w2, b2, norm_weight, norm_eps, act, activation, positive, ordered,
    backend, check,
):  # fmt: skip
    checks.check_steps(hidden, positions, offsets, ordered, check)
    module = BACKENDS.pick("step_scores", backend, hidden, positions, offsets)
    head = hidden, positions, w1, b1, act, w2, b2, norm_weight, norm_eps
    return verdict_of(module, head, offsets, activation, positive)


def verdict_of(module, head: tuple, offsets: Tensor, activation: str, positive: int, choice: tuple | None = None):
    """What `reduce` returns, and behind it what `select` does where choice = (reduce, group_offsets, answers, method,
    k) is given. A backend that does it all at once has `verdict`."""
    if hasattr(module, "verdict"):
        return module.verdict(*head, offsets, activation, positive, choice)
    results = module.reduce(module.logits(*head), offsets, activation, positive)
    if choice is None:
        return results
    by, *chosen = choice
    return *results, *module.select(results[2][REDUCES.index(by)], *chosen)


def _fake_step_scores(hidden, positions, offsets, *rest):
    return _fake_aggregate(hidden.new_empty(positions.shape[0], dtype=torch.float32), offsets)


def _aggregate(margin, offsets, activation, backend, check):
    if checks.looked_at(offsets, check):
        checks.check_offsets("offsets", offsets, margin.shape[0], "margins")
    return BACKENDS.pick("aggregate", backend, margin, offsets).reduce(margin[:, None], offsets, activation, 0)


def _fake_aggregate(margin, offsets, *rest):
    stats = margin.new_empty(len(REDUCES), offsets.shape[0] - 1)
    return torch.empty_like(margin), torch.empty_like(margin), stats, stats.new_empty(stats.shape[1], dtype=torch.int32)


def _select(scores, group_offsets, answers, method, k, backend, check):
    checks.check_groups(scores.shape[0], group_offsets, answers, check)
    return BACKENDS.pick("select", backend, scores).select(scores, group_offsets, answers, method, k)


def _fake_select(scores, group_offsets, answers, method, k, backend, check):
    groups = 1 if group_offsets is None else group_offsets.shape[0] - 1
    return scores.new_empty(groups, k, dtype=torch.int64), scores.new_empty(groups, k)


def _verify(
    hidden, positions, offsets, w1, b1, w2, b2, norm_weight, norm_eps, act, activation, positive, ordered,
    reduce, group_offsets, answers, method, k, backend, check,
):  # fmt: skip
    checks.check_groups(offsets.shape[0] - 1, group_offsets, answers, check)
    checks.check_steps(hidden, positions, offsets, ordered, check)
    module = BACKENDS.pick("verify", backend, hidden, positions, offsets)
    head = hidden, positions, w1, b1, act, w2, b2, norm_weight, norm_eps
    return verdict_of(module, head, offsets, activation, positive, (reduce, group_offsets, answers, method, k))


def _fake_verify(hidden, positions, offsets, *rest):
    *_, group_offsets, answers, method, k, backend, check = rest
    results = _fake_step_scores(hidden, positions, offsets)
    return *results, *_fake_select(results[2][0], group_offsets, answers, method, k, backend, check)


def _token_logprobs(hidden, weight, targets, bias, backend, check):
    if checks.looked_at(targets, check):
        checks.check_range("targets", targets, 0, weight.shape[0])
    return BACKENDS.pick("token_logprobs", backend, hidden, weight, targets).token_logprobs(
        hidden, weight, targets, bias
    )


def _fake_token_logprobs(hidden, weight, targets, bias, backend, check):
    return hidden.new_empty(hidden.shape[0], dtype=torch.float32)


_STEPS = (
    "Tensor hidden, Tensor positions, Tensor offsets, Tensor? w1, Tensor? b1, Tensor w2, Tensor? b2, "
    "Tensor? norm_weight, float norm_eps, str act, str activation, int positive, bool ordered"
)
_CHOICE = "Tensor? group_offsets, Tensor? answers, str method, int k"
STEP_SCORES = register(
    f"step_scores({_STEPS}, str backend, bool check) -> (Tensor, Tensor, Tensor, Tensor)",
    _step_scores,
    _fake_step_scores,
)
AGGREGATE = register(
    "aggregate(Tensor margin, Tensor offsets, str activation, str backend, bool check) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _aggregate,
    _fake_aggregate,
)
SELECT = register(
    f"select(Tensor scores, {_CHOICE}, str backend, bool check) -> (Tensor, Tensor)", _select, _fake_select
)
VERIFY = register(
    f"verify({_STEPS}, str reduce, {_CHOICE}, str backend, bool check) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _verify,
    _fake_verify,
)
TOKEN_LOGPROBS = register(
    "token_logprobs(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, str backend, bool check) -> Tensor",
    _token_logprobs,
    _fake_token_logprobs,
)
