import numpy as np
import pytest
import scoring_cases as cases
from fresh_memory import nan_in_fresh_memory  # noqa: F401


@pytest.fixture(params=cases.available(), ids=str)
def path(request, monkeypatch):
    """Each backend, and each CPU code path of it, that can run here."""
    request.param.select(monkeypatch)
    return request.param


@pytest.fixture
def products_by_row(path, monkeypatch):
    """For tests of equal bits. The interpreter's tl.dot is numpy's matmul, and on some CPUs (AVX2 for one) OpenBLAS
    rounds a row differently by its place in the tile. A GPU's instructions treat all rows alike, and what is tested is
    our kernel: under the interpreter alone a product is a sum of elementwise products, in one order for every row."""

    def matmul(a, b, dtype):  # [m, k], [k, n]
        a, b = a.astype(dtype), b.astype(dtype)
        out = np.zeros((a.shape[0], b.shape[1]), dtype)
        for k in range(a.shape[1]):
            out += a[:, k, None] * b[k]
        return out

    if path.interpreted:
        monkeypatch.setattr(np, "matmul", matmul)
