"""The CUDA kernels on the host: modules built against tests/emulation, once for all processes of a test run.

TTS_EMULATION_SANITIZE=1 takes those with AddressSanitizer and UndefinedBehaviorSanitizer, whose runtimes must have been
loaded before Python (`make sanitize`). TTS_EMULATION_SEED names the order of the threads' turns (0: plain order).
"""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).resolve().parent / "emulation"))
import build

SANITIZED = os.environ.get("TTS_EMULATION_SANITIZE", "0") not in ("", "0")

missing = functools.cache(build.missing)


@functools.cache
def native() -> ModuleType:
    """In place of `tts_kernels._C` in the `cuda` backends: the same functions, on CPU tensors."""
    return build.load(build.build(sanitize=SANITIZED))


@functools.cache
def checks() -> ModuleType:
    """The kernels of tests/emulation/checks.cu, which test the emulation."""
    return build.load(build.build(sanitize=SANITIZED, **build.CHECKS))


def edited(edits: dict[str, list[tuple[str, str]]], sources: list[str]) -> ModuleType:
    """`native()` of some of its sources, with planted errors."""
    return build.load(build.build(edits, sources=sources, sanitize=SANITIZED))
