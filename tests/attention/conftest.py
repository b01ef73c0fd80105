import attention_paths as paths
import pytest
from attention_cases import one_thread
from fresh_memory import nan_in_fresh_memory  # noqa: F401


@pytest.fixture(params=paths.available(), ids=str)
def path(request, monkeypatch):
    """Each backend, and each CPU code path of it, that can run here. test_backends.py names those that cannot."""
    request.param.select(monkeypatch)
    if request.param.backend != "reference":
        yield request.param
        return
    with one_thread():
        yield request.param
