"""What a verifier computes from a hidden state: the heads of published process reward models, as one description."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tts_kernels.attention.checks import FLOATS, check_number, fail

ACTIVATIONS = ("softmax", "sigmoid", "identity")
ACTS = ("relu", "gelu")


@dataclass(frozen=True)
class ScoreHead:
    """logits = w2 act(w1 norm(x) + b1) + b2, or w2 norm(x) + b2 where there is no w1; score = activation(logits).

    Made by `mlp`, `linear` or `vocab_rows`. Weights are float32, float16 or bfloat16, each of its own; all are widened
    to fp32 before they are multiplied.

        w1, b1       [h, d] and [h]; None: no hidden layer; b1 may be None
        w2, b2       [C, h], or [C, d] without w1, and [C]; b2 may be None
        act          "relu", "gelu" (the exact one, with erf), or "" without w1
        activation   "softmax" over the C columns, "sigmoid" or "identity" of the column `positive`
        positive     the column that says that a step is right
        norm_weight, norm_eps   [d]: x / sqrt(mean(x^2) + eps) * weight before all else (RMSNorm); None: none
    """

    w1: Tensor | None
    b1: Tensor | None
    w2: Tensor
    b2: Tensor | None
    act: str
    activation: str
    positive: int
    norm_weight: Tensor | None
    norm_eps: float

    def __post_init__(self) -> None:
        columns, width = check_matrix("w2", self.w2)
        if self.w1 is not None:
            hidden, _ = check_matrix("w1", self.w1)
            if hidden != width:
                fail("w2", f"shape [C, {hidden}] for the {hidden} rows of w1", tuple(self.w2.shape))
            check_vector("b1", self.b1, hidden, self.w2.device)
            if self.w1.device != self.w2.device:
                fail("w1", f"a tensor on {self.w2.device} like w2", f"one on {self.w1.device}")
            if self.act not in ACTS:
                fail("act", f"one of {', '.join(ACTS)}", repr(self.act))
        elif self.b1 is not None or self.act:
            fail("w1", "a tensor [h, d] beside b1 or act", "None")
        check_vector("b2", self.b2, columns, self.w2.device)
        check_vector("norm", self.norm_weight, self.dim, self.w2.device)
        check_activation(self.activation)
        if self.activation == "softmax" and columns < 2:
            fail("activation", "sigmoid or identity for a head of one column", "'softmax'")
        if isinstance(self.positive, bool) or not isinstance(self.positive, int):
            fail("positive", "an int", type(self.positive).__name__, TypeError)
        if not 0 <= self.positive < columns:
            fail("positive", f"a column in [0, {columns})", self.positive)
        if check_number("norm", self.norm_eps) < 0:
            fail("norm", "an eps of at least 0", self.norm_eps)

    @property
    def dim(self) -> int:
        """d, the size of the hidden states that it takes."""
        return (self.w2 if self.w1 is None else self.w1).shape[1]

    @property
    def weights(self) -> dict[str, Tensor]:
        tensors = {"w1": self.w1, "b1": self.b1, "w2": self.w2, "b2": self.b2, "norm": self.norm_weight}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    @classmethod
    def mlp(
        cls,
        w1: Tensor,
        b1: Tensor | None,
        w2: Tensor,
        b2: Tensor | None,
        *,
        act: str = "relu",
        activation: str | None = None,
        positive: int | None = None,
        norm: tuple[Tensor, float] | None = None,
    ) -> ScoreHead:
        """Two layers: w1 [h, d], b1 [h], w2 [C, h], b2 [C]. Qwen2.5-Math-PRM: relu, softmax over two columns, of which
        the second is "right".

        Args:
            act: "relu" or "gelu" (exact).
            activation: default softmax; sigmoid for a single column.
            positive: default the last column.
            norm: (weight [d], eps) of an RMSNorm before the first layer, where hidden states come without it.
        """
        if w1 is None:
            fail("w1", "a tensor [h, d]", "None", TypeError)
        return cls(w1, b1, w2, b2, act, *defaults(w2, activation, positive, last=True), *norm_parts(norm))

    @classmethod
    def linear(
        cls,
        w: Tensor,
        b: Tensor | None = None,
        *,
        activation: str | None = None,
        positive: int | None = None,
        norm: tuple[Tensor, float] | None = None,
    ) -> ScoreHead:
        """One layer: w [C, d], b [C]. Value heads (one column, sigmoid) and token classifiers (two columns, softmax).
        Arguments as in `mlp`."""
        return cls(None, None, w, b, "", *defaults(w, activation, positive, last=True), *norm_parts(norm))

    @classmethod
    def vocab_rows(
        cls,
        weight: Tensor,
        ids: Sequence[int],
        bias: Tensor | None = None,
        *,
        activation: str | None = None,
        positive: int = 0,
        norm: tuple[Tensor, float] | None = None,
    ) -> ScoreHead:
        """A few rows of an LM head: the logits of some tokens alone, such as those of "+" and "-" in that order.

        Args:
            weight, bias: [V, d] and [V] of the LM head. The rows are copied: later changes of them are not seen.
            ids: token ids, C of them; they become the columns.
            activation: default softmax over these C logits; sigmoid for a single one.
            positive: the index in `ids` of the token that stands for "right".
            norm: as in `mlp`.
        """
        size, _ = check_matrix("weight", weight)
        check_vector("bias", bias, size, weight.device)
        ids = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        for i, token in enumerate(ids):
            if isinstance(token, bool) or not isinstance(token, int):
                fail(f"ids[{i}]", "an int", type(token).__name__, TypeError)
            if not 0 <= token < size:
                fail(f"ids[{i}]", f"a token id in [0, {size})", token)
        if not ids:
            fail("ids", "at least one token id", "none")
        w = torch.stack([weight[i] for i in ids])
        b = None if bias is None else torch.stack([bias[i] for i in ids])
        return cls(None, None, w, b, "", *defaults(w, activation, positive, last=False), *norm_parts(norm))


def defaults(w: Tensor, activation: str | None, positive: int | None, *, last: bool) -> tuple[str, int]:
    columns, _ = check_matrix("w2", w)
    if activation is None:
        activation = "softmax" if columns > 1 else "sigmoid"
    if positive is None:
        positive = columns - 1 if last else 0
    return activation, positive


def norm_parts(norm: tuple[Tensor, float] | None) -> tuple[Tensor | None, float]:
    if norm is None:
        return None, 0.0
    if not isinstance(norm, (tuple, list)) or len(norm) != 2 or not isinstance(norm[0], Tensor):
        fail("norm", "None or (weight [d], eps)", repr(type(norm).__name__), TypeError)
    return norm[0], check_number("norm", norm[1])


def check_activation(activation: str) -> str:
    if activation not in ACTIVATIONS:
        fail("activation", f"one of {', '.join(ACTIVATIONS)}", repr(activation))
    return activation


def check_matrix(name: str, w: Tensor) -> tuple[int, int]:
    if not isinstance(w, Tensor):
        fail(name, "a tensor of two dimensions", type(w).__name__, TypeError)
    if w.dim() != 2 or 0 in w.shape:
        fail(name, "a tensor of two dimensions with at least one row and column", f"shape {tuple(w.shape)}")
    if w.dtype not in FLOATS:
        fail(name, "dtype float32, float16 or bfloat16", w.dtype, TypeError)
    if w.stride(1) != 1 and w.shape[1] > 1:
        fail(name, "unit stride in the last dimension", f"strides {w.stride()}")
    return w.shape[0], w.shape[1]


def check_vector(name: str, b: Tensor | None, size: int, device: torch.device) -> None:
    if b is None:
        return
    if not isinstance(b, Tensor):
        fail(name, f"None or a tensor [{size}]", type(b).__name__, TypeError)
    if tuple(b.shape) != (size,):
        fail(name, f"shape [{size}]", f"shape {tuple(b.shape)}")
    if b.dtype not in FLOATS:
        fail(name, "dtype float32, float16 or bfloat16", b.dtype, TypeError)
    if b.device != device:
        fail(name, f"a tensor on {device}", f"one on {b.device}")
