"""The scoring cases of grids.json: step scores by a head, and log-probabilities over a vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tts_kernels import scoring
from tts_kernels.measure.inputs import DTYPES
from tts_kernels.measure.timing import Call
from tts_kernels.scoring import ScoreHead

from ..peers import SCORING_PEERS


@dataclass(frozen=True)
class ScoringCase:
    """kind: "mlp" [d, d] then [2, d]; "vocab_rows", two rows of an LM head; "logprobs" over a whole vocabulary. `steps`
    of `tokens` rows are read, in candidates of ten; "logprobs" reads all."""

    group: str
    kind: str
    tokens: int
    steps: int
    dim: int
    vocabulary: int
    dtype: str
    device: str

    op = "scoring"
    peers = SCORING_PEERS

    @property
    def name(self) -> str:
        vocabulary = f" V={self.vocabulary}" if self.vocabulary else ""
        return f"{self.kind} T={self.tokens} M={self.steps} d={self.dim}{vocabulary}"

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize

    @property
    def weight_bytes(self) -> int:
        rows = {"mlp": self.dim + 2, "vocab_rows": 2, "logprobs": self.vocabulary}[self.kind]
        return rows * self.dim * self.itemsize

    @property
    def least_bytes(self) -> int:
        """The rows that are read, the weights, a number for each."""
        return self.steps * self.dim * self.itemsize + self.weight_bytes + 4 * self.steps

    @property
    def flops(self) -> int:
        return 2 * self.steps * self.weight_bytes // self.itemsize

    set_bytes = least_bytes

    def sets(self, count: int) -> list[ScoringSet]:
        shared: dict = {}
        return [ScoringSet(self, seed, shared) for seed in range(count)]

    def ours(self, given: ScoringSet) -> Call:
        if self.kind == "logprobs":
            return lambda: scoring.token_logprobs(given.hidden, given.lm_head, given.targets)
        return lambda: scoring.step_scores(given.hidden, given.positions, given.head, offsets=given.offsets).prob

    def reference(self, given: ScoringSet) -> Tensor:
        if self.kind == "logprobs":
            return scoring.token_logprobs(given.hidden, given.lm_head, given.targets, backend="reference")
        scores = scoring.step_scores(
            given.hidden, given.positions, given.head, offsets=given.offsets, backend="reference"
        )
        return scores.prob

    def error(self, out: Tensor, reference: Tensor) -> float:
        return (out.float() - reference).abs().nan_to_num(nan=torch.inf).max().item()

    def tolerance(self, ours: bool) -> float:
        """Of a probability, or of a logarithm of one. Peers round logits and hidden layers to the model's dtype."""
        rounding = torch.finfo(DTYPES[self.dtype]).eps
        if self.kind == "logprobs":
            return 2e-3 if ours else 16 * rounding + 2e-3
        return 1e-2 if ours else 8 * rounding + 1e-2

    def told(self, given: ScoringSet, ceilings: dict) -> dict:
        op = "token_logprobs" if self.kind == "logprobs" else "step_scores"
        tensors = given.hidden, given.lm_head if self.kind == "logprobs" else given.positions
        told = scoring.explain(op, *tensors)
        return {"backend": told.backend, "why": told.why, "config": told.config, "bytes_moved": self.least_bytes,
                "issued_flops": self.flops}  # fmt: skip


class ScoringSet:
    """Weights are a part of a set, since they are most of what is read, but for an LM head of which two rows are."""

    def __init__(self, case: ScoringCase, seed: int, shared: dict) -> None:
        self.case, self.shared = case, shared
        device, dtype = torch.device(case.device), DTYPES[case.dtype]
        generator = torch.Generator(device).manual_seed(seed)

        def randn(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=generator, device=device) * scale).to(dtype)

        d, v = case.dim, case.vocabulary
        self.hidden = randn(case.tokens, d)
        self.positions = torch.randperm(case.tokens, generator=generator, device=device)[: case.steps]
        self.offsets = torch.arange(0, case.steps + 1, 10, device=device)
        if self.offsets[-1] != case.steps:
            raise ValueError(f"steps: expected a multiple of 10, got {case.steps}")
        self.lm_head = None
        if v:
            key = "lm_head" if case.kind == "vocab_rows" else f"lm_head {seed}"
            self.lm_head = self.once(key, lambda: randn(v, d, scale=2 * d**-0.5))
        self.targets = torch.randint(v, (case.tokens,), generator=generator, device=device) if v else None
        self.ids = torch.tensor([v // 3, v // 2], device=device)
        if case.kind == "mlp":
            w1, b1 = randn(d, d, scale=d**-0.5), randn(d)
            self.head = ScoreHead.mlp(w1, b1, randn(2, d, scale=2 * d**-0.5), randn(2))
        elif case.kind == "vocab_rows":
            self.head = ScoreHead.vocab_rows(self.lm_head, self.ids)
        else:
            self.head = None

    def once(self, key: str, make: Callable):
        """Made by the first set that asks, for all of them."""
        if key not in self.shared:
            self.shared[key] = make()
        return self.shared[key]


def scoring_cases(grid: dict, device: str) -> Iterator[ScoringCase]:
    for group in grid["scoring"]:
        for values in group["cases"]:
            params = dict(zip(group["fields"], values, strict=True))
            yield ScoringCase(group["group"], dtype=group["dtype"], device=device, **params)
