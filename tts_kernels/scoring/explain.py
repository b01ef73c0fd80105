"""Which backend would run a scoring call, why, and with which tiles."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tts_kernels.dispatch import choice

from . import tables
from .api import BACKENDS


@dataclass(frozen=True)
class Explanation:
    """backend, why  the one that would run the call, and what made it that: a measured row by its name, or the order
    refused       the backends that come before it on this device, each with the reasons why it cannot
    config        of token_logprobs in triton: its tiles, and where they are from
    """

    backend: str
    why: str
    refused: dict[str, list[str]]
    config: str

    def __str__(self) -> str:
        lines = [f"{self.backend}: {self.why}"] + ([f"  config  {self.config}"] if self.config else [])
        return "\n".join(lines + [f"  refused {name}: {'; '.join(why)}" for name, why in self.refused.items()])


def explain(op: str, *tensors: Tensor, backend: str | None = None) -> Explanation:
    """What a call of the scoring op with these leading tensors (see `unsupported_reasons`) would do. Runs none of it.

    Raises:
        ValueError: no such op or backend.
        RuntimeError: an explicit `backend` cannot run this call; lists every reason.
    """
    if op not in BACKENDS.ops:
        raise ValueError(f"op: expected one of {', '.join(BACKENDS.ops)}, got {op!r}")
    row = tables.row_of_call(BACKENDS.ops[op], *tensors)
    name, why, refused = choice(BACKENDS, op, row, backend, *tensors)
    config = ""
    if op == "token_logprobs" and name == "triton":
        hidden, weight = tensors[:2]
        module = BACKENDS.load(name)
        dtype = 4 if module.dot_type(hidden, weight) == module.tl.float32 else hidden.element_size()
        chosen = module.config_of(hidden.device, hidden.shape[1], weight.shape[0], dtype)
        config = ", ".join(f"{name}={value}" for name, value in vars(chosen).items())
    return Explanation(name, why, refused, config)
