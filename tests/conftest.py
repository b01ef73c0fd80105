import os
import sys

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
