"""A fixture for conftest.py files and modules that import it."""

import pytest
import torch


@pytest.fixture(autouse=True)
def nan_in_fresh_memory():
    """torch.empty hands out NaN, so that what a kernel forgets to write does not pass by luck."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)
