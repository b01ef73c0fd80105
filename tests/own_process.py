"""Comparisons with kernels that are wrong on purpose, each in a process of its own."""

from __future__ import annotations

import faulthandler
import os
from collections.abc import Callable

import torch


def failure(compare: Callable[[], None]) -> str | None:
    """What `compare` finds, or the signal that it dies of: a kernel with an error may read and write anywhere, and each
    emulated module keeps thousands of mappings, of which a process may have 65,530."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        found = b""
        try:
            torch.set_num_threads(1)  # those of the parent are not here
            compare()
        except (AssertionError, RuntimeError) as error:
            found = str(error).encode() or type(error).__name__.encode()
        finally:
            os.write(writing, found[:1000])
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        found = pipe.read().decode(errors="replace")
    _, status = os.waitpid(child, 0)
    return found or (f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else None)
