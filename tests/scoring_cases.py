"""Scoring in float64, written down from the definitions with loops: the oracle of the scoring tests, and the paths that
are held to it. It shares no code with the backends."""

from __future__ import annotations

import importlib
import itertools
import math
from dataclasses import dataclass, replace

import emulated
import pytest
import torch
from attention_paths import ISAS, Path
from dense import assert_close

from tts_kernels import scoring
from tts_kernels.scoring import ScoreHead, StepScores

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
STATS = ("last", "min", "prod", "mean", "max", "log_prod")


class ScoringPath(Path):
    """A backend of the scoring ops, or a CPU code path of one. "cuda" on the CPU: its kernels in emulation."""

    def select(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().select(monkeypatch)
        if self.emulated:
            backend = importlib.import_module("tts_kernels.scoring.cuda")
            monkeypatch.setattr(backend, "native", emulated.native())
            monkeypatch.setattr(backend, "product", product_by_row)
            monkeypatch.setattr(backend, "_counters", {})

    def missing(self) -> str | None:
        if self.emulated:
            return emulated.missing()
        if self.device == "cuda":
            if not torch.cuda.is_available():
                return "no CUDA device"
            tensor = torch.empty(0, 1, device="cuda")
            return "; ".join(scoring.unsupported_reasons("step_scores", self.backend, tensor)) or None
        if reasons := scoring.unsupported_reasons("step_scores", self.backend, torch.empty(0, 1)):
            return "; ".join(reasons)
        if self.isa and self.isa not in importlib.import_module("tts_kernels.attention.cpu").isas():
            return f"this machine cannot run {self.isa}"
        return None


def product_by_row(x: torch.Tensor, w: torch.Tensor, out: torch.Tensor) -> None:
    """In place of torch's product on a GPU: every row's sums in one order, which a BLAS on the CPU does not promise."""
    out.zero_()
    for d in range(x.shape[1]):
        out.addcmul_(x[:, d, None].float(), w[:, d].float())


PATHS = (
    ScoringPath("reference"),
    *(ScoringPath("cpu", isa=isa) for isa in ISAS),
    ScoringPath("triton"),
    ScoringPath("cuda"),
    ScoringPath("reference", device="cuda"),
    ScoringPath("triton", device="cuda"),
    ScoringPath("cuda", device="cuda"),
)


def available(*, without: str = "") -> list:
    marks = {"cuda": [pytest.mark.gpu]}
    paths = [path for path in PATHS if path.backend != without and path.missing() is None]
    return [pytest.param(path, marks=marks.get(path.device, [])) for path in paths]


@dataclass(frozen=True)
class Case:
    """A call of step_scores. `hidden_layer` 0: a head of one layer."""

    dtypes: tuple[torch.dtype, torch.dtype] = (FP32, FP32)  # of hidden, of the weights
    dim: int = 40
    hidden_layer: int = 0
    columns: int = 2
    act: str = "relu"
    activation: str = "softmax"
    positive: int = 1
    bias: bool = True
    norm: bool = False
    steps: tuple[int, ...] = (3, 0, 1, 5)  # of each candidate

    def __str__(self) -> str:
        dtypes = "-".join(str(d).removeprefix("torch.") for d in self.dtypes)
        head = f"mlp{self.hidden_layer}-{self.act}" if self.hidden_layer else "linear"
        return (
            f"{head}-{dtypes}-d{self.dim}-{self.activation}{self.positive}of{self.columns}"
            f"{'-bias' * self.bias}{'-norm' * self.norm}"
        )


@dataclass(frozen=True)
class Inputs:
    case: Case
    hidden: torch.Tensor
    positions: torch.Tensor
    offsets: torch.Tensor
    head: ScoreHead

    def to(self, device: str) -> Inputs:
        moved = {name: weight.to(device) for name, weight in self.head.weights.items()}
        if "norm" in moved:
            moved["norm_weight"] = moved.pop("norm")
        hidden, positions, offsets = (x.to(device) for x in (self.hidden, self.positions, self.offsets))
        return replace(self, hidden=hidden, positions=positions, offsets=offsets, head=replace(self.head, **moved))

    def run(self, path: Path, **options) -> StepScores:
        at = self.to(path.device)
        return scoring.step_scores(
            at.hidden, at.positions, at.head, offsets=at.offsets, backend=path.backend, **options
        )


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    """Rows that no step reads hold nan, and `hidden` is a view whose rows are further apart than they are long."""
    gen = torch.Generator().manual_seed(seed)

    def weight(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=gen) * scale).to(case.dtypes[1])

    num_steps = sum(case.steps)
    offsets = torch.tensor([0, *itertools.accumulate(case.steps)])
    num_rows = 2 * num_steps + 1
    positions = torch.randperm(num_rows, generator=gen)[:num_steps]
    if num_steps > 1:
        positions[-1] = positions[0]  # a row may be read twice
    hidden = torch.full((num_rows, case.dim + 8), torch.nan, dtype=case.dtypes[0])[:, : case.dim]
    hidden[positions] = torch.randn(num_steps, case.dim, generator=gen).to(case.dtypes[0])
    options = {"activation": case.activation, "positive": case.positive}
    if case.norm:
        options["norm"] = (weight(case.dim), 1e-6)
    width = case.hidden_layer or case.dim
    w2 = weight(case.columns, width, scale=2 / math.sqrt(width))
    b2 = weight(case.columns) if case.bias else None
    if not case.hidden_layer:
        return Inputs(case, hidden, positions, offsets, ScoreHead.linear(w2, b2, **options))
    w1 = weight(case.hidden_layer, case.dim, scale=2 / math.sqrt(case.dim))
    b1 = weight(case.hidden_layer) if case.bias else None
    return Inputs(case, hidden, positions, offsets, ScoreHead.mlp(w1, b1, w2, b2, act=case.act, **options))


def head_of(logits: torch.Tensor, **options) -> tuple[torch.Tensor, ScoreHead]:
    """Hidden states and a head that give these logits [M, C] exactly."""
    return logits, ScoreHead.linear(torch.eye(logits.shape[1]), **options)


def dense_scores(inputs: Inputs, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """All fields of StepScores, computed in `dtype`."""
    head = inputs.head
    x = inputs.hidden[inputs.positions].to(dtype)
    if head.norm_weight is not None:
        x = x / torch.sqrt((x * x).mean(-1, keepdim=True) + head.norm_eps) * head.norm_weight.to(dtype)
    if head.w1 is not None:
        x = x @ head.w1.to(dtype).T
        if head.b1 is not None:
            x = x + head.b1.to(dtype)
        x = x.clamp(min=0) if head.act == "relu" else 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
    logits = x @ head.w2.to(dtype).T
    if head.b2 is not None:
        logits = logits + head.b2.to(dtype)
    margin = logits[:, head.positive]
    prob, log_prob = margin, margin.log()
    if head.activation != "identity":
        if head.activation == "softmax":
            others = [c for c in range(logits.shape[1]) if c != head.positive]
            margin = margin - logits[:, others].logsumexp(1)
        prob, log_prob = torch.sigmoid(margin), torch.nn.functional.logsigmoid(margin)
    fields = {"margin": margin, "prob": prob, "count": inputs.offsets.diff().to(torch.int32)}
    reductions = {
        "last": lambda p, _: p[-1], "min": lambda p, _: p.min(), "prod": lambda p, _: p.prod(),
        "mean": lambda p, _: p.mean(), "max": lambda p, _: p.max(), "log_prod": lambda _, logs: logs.sum(),
    }  # fmt: skip
    bounds = inputs.offsets.tolist()
    for name, reduction in reductions.items():
        fields[name] = torch.full((len(bounds) - 1,), torch.nan, dtype=dtype)
        for i, (b, e) in enumerate(itertools.pairwise(bounds)):
            if e > b:
                fields[name][i] = reduction(prob[b:e], log_prob[b:e])
    return fields


def check_scores(got: StepScores, inputs: Inputs) -> None:
    exact, plain = dense_scores(inputs, torch.float64), dense_scores(inputs, torch.float32)
    assert got.count.dtype == torch.int32
    assert got.count.tolist() == exact["count"].tolist()
    terms = inputs.case.dim + inputs.case.hidden_layer + max(inputs.case.steps, default=0)
    for name in ("margin", "prob", *STATS):
        value, truth = getattr(got, name).cpu(), exact[name]
        assert value.dtype == torch.float32 and value.shape == truth.shape, name
        assert torch.equal(value.isnan(), truth.isnan()), f"{name}: {value}, nan expected in {truth}"
        known = ~truth.isnan()
        if known.any():
            # Factors bring relative errors of their own, which add up in a product.
            assert_close(
                name, value[known], plain[name][known], truth[known], terms=terms**2 if name == "prod" else terms
            )


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype == torch.float32:
        a, b = a.view(torch.int32), b.view(torch.int32)
    return torch.equal(a, b)


def dense_select(
    scores: list[float], bounds: list[int], method: str, k: int, answers: list[int] | None
) -> tuple[list[list[int]], list[list[float]]]:
    """Candidate lists by plain sorting; nan where there is nothing."""
    chosen, values = [], []
    for begin, end in itertools.pairwise(bounds):
        members = [i for i in range(begin, end) if not math.isnan(scores[i])]
        ranked: list[tuple[float, int]] = sorted(((scores[i], i) for i in members), key=lambda s: (-s[0], s[1]))
        if method in ("weighted_vote", "majority"):
            members = [i for i in members if answers[i] >= 0]
            entries = []
            for answer in {answers[i] for i in members}:
                voters = [i for i in members if answers[i] == answer]
                total = float(len(voters))
                if method == "weighted_vote":
                    total = 0.0
                    for i in voters:
                        total = float(torch.tensor(total) + torch.tensor(scores[i]))  # fp32, in order
                if not math.isnan(total):  # inf - inf is no score
                    entries.append((-total, voters[0], min(voters, key=lambda i: (-scores[i], i))))
            ranked = [(-total, best) for total, _, best in sorted(entries)]
        ranked = ranked[:k] + [(math.nan, -1)] * (k - len(ranked))
        chosen.append([i for _, i in ranked])
        values.append([s for s, _ in ranked])
    return chosen, values
