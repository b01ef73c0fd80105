import os
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # Before anything imports a kernel: without a GPU Triton kernels run on CPU tensors.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def restore_threads():
    """A test may change how many threads torch uses; the next one starts from the same number."""
    threads = torch.get_num_threads()
    yield
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def forget_calls():
    """A test may change which backends there are, which no process does: calls of earlier ones are checked anew."""
    dispatch = sys.modules.get("tts_kernels.dispatch")
    for family in dispatch.FAMILIES if dispatch else ():
        family.checked.clear()


@pytest.fixture(scope="session", autouse=True)
def few_mappings():
    """A process may have 65,530 of them; then whatever asks for memory or a thread next fails, wherever that is."""
    yield
    maps = Path("/proc/self/maps")
    count = len(maps.read_text().splitlines()) if maps.exists() else 0
    assert count < 20_000, f"{count} mappings are left, of the 65,530 that a process may have: who keeps them?"
