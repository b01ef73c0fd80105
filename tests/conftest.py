import pytest
import torch


@pytest.fixture(autouse=True)
def restore_threads():
    """A test may change how many threads torch uses; the next one starts from the same number."""
    threads = torch.get_num_threads()
    yield
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
