"""The backends and CPU code paths under test."""

from __future__ import annotations

import importlib
import os
import zlib
from dataclasses import dataclass, replace

import emulated
import pytest
import torch

import tts_kernels.attention as attention
from tts_kernels.configs import TreeConfig

ISAS = ("portable", "avx2", "avx512", "amx", "amx-emulated")


@dataclass(frozen=True)
class Path:
    """A backend on a device, or a code path of it. "cuda" on the CPU: its kernels in emulation. warpgroups: wherever
    csrc/cuda/hopper has a kernel for the call, that one."""

    backend: str
    device: str = "cpu"
    isa: str | None = None
    warpgroups: bool = False

    def __str__(self) -> str:
        return f"{self.backend}-{self.isa or self.device}" + ("-warpgroups" if self.warpgroups else "")

    @property
    def emulated(self) -> bool:
        return self.backend == "cuda" and self.device == "cpu"

    @property
    def interpreted(self) -> bool:
        """Slow: a tenth of a millisecond for each operation on a block."""
        return self.backend == "triton" and self.device == "cpu"

    @property
    def slow(self) -> bool:
        return self.interpreted or self.emulated

    def takes(self, dtype: torch.dtype) -> torch.dtype:
        """What stands for this dtype of q and the caches: the kernels of `cuda` multiply 16-bit numbers."""
        return torch.float16 if self.backend == "cuda" and dtype == torch.float32 else dtype

    def select(self, monkeypatch: pytest.MonkeyPatch) -> None:
        if self.isa is not None:
            monkeypatch.setenv("TTS_KERNELS_CPU_ISA", self.isa)
        if self.warpgroups:
            module = importlib.import_module("tts_kernels.attention.cuda")
            present = module.config_of
            monkeypatch.setattr(module, "config_of", lambda q, k_cache: of_warpgroups(present(q, k_cache), q, k_cache))
        if self.emulated:
            native = emulated.native()
            monkeypatch.setattr(importlib.import_module("tts_kernels.attention.cuda"), "native", native)
            if "TTS_EMULATION_SEED" not in os.environ:  # each test has an order of its own, and keeps it
                native.cuda_emulation_seed(1 + zlib.crc32(os.environ.get("PYTEST_CURRENT_TEST", "").encode()))

    def missing(self) -> str | None:
        """Why this path cannot run here."""
        if self.emulated:
            return emulated.missing()
        if self.device == "cuda":
            if not torch.cuda.is_available():
                return "no CUDA device"
            q = torch.empty(0, 1, 16, dtype=torch.float16, device="cuda")
            reasons = attention.unsupported_reasons("tree_attention", self.backend, q)
            if self.warpgroups and torch.cuda.get_device_capability() != (9, 0):
                reasons = [*reasons, "warpgroups multiply on sm_90 alone"]
            elif self.warpgroups and not reasons:
                native = importlib.import_module("tts_kernels._C")
                reasons = [] if native.cuda_tree_hopper_shared_bytes(64, 2) else ["it was built without sm_90a"]
            return "; ".join(reasons) or None
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
    Path("cuda"),
    Path("reference", device="cuda"),
    Path("triton", device="cuda"),
    Path("cuda", device="cuda"),
)


# Of tree attention alone.
WARPGROUPS = (Path("cuda", warpgroups=True), Path("cuda", device="cuda", warpgroups=True))


def available(paths: tuple[Path, ...] = ALL) -> list:
    marks = {"cuda": [pytest.mark.gpu]}
    return [
        pytest.param(path, id=str(path), marks=marks.get(path.device, [])) for path in paths if path.missing() is None
    ]


def cpu_paths() -> list:
    """Those of the `cpu` backend alone; a test that needs one is skipped where it is not built."""
    paths = [path for path in ALL if path.backend == "cpu" and path.missing() is None]
    if paths:
        return [pytest.param(path, id=str(path)) for path in paths]
    return [pytest.param(None, id="cpu", marks=pytest.mark.skip(reason=ALL[1].missing()))]


def invariant() -> list:
    """Those whose bits do not depend on which other samples there are: `cpu_paths`, and `cuda`."""
    return [*cpu_paths(), *(param for param in available(ALL + WARPGROUPS) if "cuda-" in param.id)]


def of_warpgroups(config: TreeConfig, q: torch.Tensor, k_cache: torch.Tensor) -> TreeConfig:
    """The config with the kernel of csrc/cuda/hopper, where there is one; of two stages and of three."""
    if q.shape[2] not in (64, 128) or k_cache.dtype != q.dtype:
        return config
    stages = 2 if q.shape[2] == 128 else 3
    return replace(config, warpgroups=1, num_stages=stages, min_chunk=max(config.min_chunk, 128))
