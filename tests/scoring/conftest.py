import pytest
import scoring_cases as cases
import torch


@pytest.fixture(params=cases.available(), ids=str)
def path(request, monkeypatch):
    """Each backend, and each CPU code path of it, that can run here."""
    request.param.select(monkeypatch)
    return request.param


@pytest.fixture(autouse=True)
def nan_in_fresh_memory():
    """torch.empty hands out NaN, so that what a kernel forgets to write does not pass by luck."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)
