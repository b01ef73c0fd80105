"""The backends and CPU code paths under test."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

import pytest
import torch

import tts_kernels.attention as attention

ISAS = ("portable", "avx2", "avx512", "amx", "amx-emulated")


@dataclass(frozen=True)
class Path:
    backend: str
    device: str = "cpu"
    isa: str | None = None

    def __str__(self) -> str:
        return f"{self.backend}-{self.isa or self.device}"

    @property
    def interpreted(self) -> bool:
        """Slow: a tenth of a millisecond for each operation on a block."""
        return self.backend == "triton" and self.device == "cpu"

    def select(self, monkeypatch: pytest.MonkeyPatch) -> None:
        if self.isa is not None:
            monkeypatch.setenv("TTS_KERNELS_CPU_ISA", self.isa)

    def missing(self) -> str | None:
        """Why this path cannot run here."""
        if self.device == "cuda":
            return None if torch.cuda.is_available() else "no CUDA device"
        if self.isa is None:
            q = torch.empty(0, 1, 16)
            return "; ".join(attention.unsupported_reasons("tree_attention", self.backend, q)) or None
        reasons = attention.unsupported_reasons("tree_attention", self.backend)
        if not reasons and self.isa not in importlib.import_module("tts_kernels.attention.cpu").isas():
            reasons = [f"this machine cannot run {self.isa}"]
        return "; ".join(reasons) or None


ALL = (
    Path("reference"),
    *(Path("cpu", isa=isa) for isa in ISAS),
    Path("triton"),
    Path("reference", device="cuda"),
    Path("triton", device="cuda"),
)


def available() -> list:
    marks = {"cuda": [pytest.mark.gpu]}
    return [pytest.param(path, marks=marks.get(path.device, [])) for path in ALL if path.missing() is None]


def cpu_paths() -> list:
    """Those of the `cpu` backend alone; a test that needs one is skipped where it is not built."""
    paths = [path for path in ALL if path.backend == "cpu" and path.missing() is None]
    if paths:
        return [pytest.param(path, id=str(path)) for path in paths]
    return [pytest.param(None, id="cpu", marks=pytest.mark.skip(reason=ALL[1].missing()))]
