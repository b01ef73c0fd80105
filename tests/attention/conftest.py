import attention_paths as paths
import pytest
import torch
from attention_cases import one_thread


@pytest.fixture(params=paths.available(), ids=str)
def path(request, monkeypatch):
    """Each backend, and each CPU code path of it, that can run here. test_backends.py names those that cannot."""
    request.param.select(monkeypatch)
    if request.param.backend != "reference":
        yield request.param
        return
    with one_thread():
        yield request.param


@pytest.fixture(autouse=True)
def nan_in_fresh_memory():
    """torch.empty hands out NaN, so that what a kernel forgets to write does not pass by luck."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)
