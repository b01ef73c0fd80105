"""FlashInfer's append to a paged cache by its own name, against caches that are written token by token."""

from __future__ import annotations

import random

import pytest
import torch
from attention_cases import FP8, FP16
from flashinfer_batches import Batch, Case, laid_out
from flashinfer_cases import PLAIN

from tts_kernels.integrations import flashinfer


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("dtype", [FP16, FP8])
@pytest.mark.parametrize("path", PLAIN)
def test_append(path, dtype, joint, layout, monkeypatch):
    """Every token of every request that shares nothing, in a random order: the caches are those that are written token
    by token."""
    path.select(monkeypatch)
    rng = random.Random(0)
    case = Case(requests=5, page_size=3, layout=layout, joint=joint)
    ids = rng.sample(range(60), 12)
    batch = Batch([ids[:3], ids[3:4], [], ids[4:10], ids[10:]], [8, 3, 0, 16, 5], 60)
    arguments = {f"kv_{name}": tensor for name, tensor in batch.arguments(3, path.device).items()}
    arguments["kv_indices"][-1] = 0
    places = [(b, t) for b, tokens in enumerate(batch.tokens) for t in range(tokens)]
    rng.shuffle(places)
    key, value = torch.randn(2, len(places), 2, 64).to(FP16)
    wanted = torch.zeros(2, 60, 3, 2, 64, dtype=dtype)
    for row, (b, t) in enumerate(places):
        for cache, new in zip(wanted, (key, value)):
            cache[batch.pages[b][t // 3], t % 3] = new[row].to(dtype)
    caches = laid_out(tuple(torch.zeros_like(cache) for cache in wanted), case, path.device)
    batch_indices, positions = torch.tensor(places, device=path.device).int().unbind(-1)
    flashinfer.append_paged_kv_cache(
        key.to(path.device), value.to(path.device), batch_indices, positions, caches, **arguments, kv_layout=layout,
        backend=path.backend,
    )  # fmt: skip
    for got, cache in zip(caches.unbind(1) if joint else caches, wanted):
        got = got.transpose(1, 2) if layout == "HND" else got
        assert torch.equal(got.cpu().float(), cache.float())


APPEND = {
    "append_key": torch.ones(2, 2, 8),
    "append_value": torch.ones(2, 2, 8),
    "batch_indices": torch.tensor([0, 1]),
    "positions": torch.tensor([5, 0]),
    "paged_kv_cache": torch.zeros(4, 2, 3, 2, 8),
    "kv_indices": torch.tensor([3, 1, 2]),
    "kv_indptr": torch.tensor([0, 2, 3]),
    "kv_last_page_len": torch.tensor([3, 1]),
}
APPENDS = [
    ("append_key", TypeError, None, "NoneType"),
    ("append_value", ValueError, torch.ones(2, 2, 9), "(2, 2, 9)"),
    ("batch_indices", ValueError, torch.tensor([0]), "(1,)"),
    ("batch_indices[1]", ValueError, torch.tensor([0, 2]), "2"),
    ("batch_indices[0]", ValueError, torch.tensor([-1, 1]), "-1"),
    ("positions", TypeError, torch.tensor([5.0, 0.0]), "float32"),
    ("positions[0]", ValueError, torch.tensor([6, 0]), "6"),
    ("positions[1]", ValueError, torch.tensor([5, -1]), "-1"),
    ("kv_indices", ValueError, torch.tensor([3, 1]), "2"),
    ("kv_indices[1]", ValueError, torch.tensor([3, 4, 2]), "4"),
    ("kv_indptr", ValueError, torch.tensor([1, 2, 3]), "[1]"),
    ("kv_last_page_len", ValueError, torch.tensor([3]), "(1,)"),
    ("k_cache of paged_kv_cache", ValueError, torch.zeros(4, 2, 3, 1, 8), "(4, 3, 1, 8)"),
    ("k_cache of paged_kv_cache", ValueError, (torch.zeros(4), torch.zeros(4)), "(4,)"),
    ("v_cache of paged_kv_cache", ValueError, (torch.zeros(4, 3, 2, 8), torch.zeros(4, 2, 2, 8)), "(4, 2, 2, 8)"),
    ("kv_layout", ValueError, "HDN", "'HDN'"),
]


@pytest.mark.parametrize("argument, error, value, came", APPENDS, ids=[f"{row[0]}-{row[3]}" for row in APPENDS])
def test_bad_append_writes_nothing(argument, error, value, came):
    flashinfer.append_paged_kv_cache(**APPEND)
    written = APPEND["paged_kv_cache"].clone()
    with pytest.raises(error) as raised:
        flashinfer.append_paged_kv_cache(**{**APPEND, argument.rpartition(" ")[2].partition("[")[0]: value})
    message = str(raised.value)
    assert message.startswith(f"{argument}: expected ") and came in message.rpartition("got")[2]
    assert torch.equal(APPEND["paged_kv_cache"], written)
