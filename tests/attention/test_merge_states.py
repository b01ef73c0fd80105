"""merge_states against float64, and what empty states do."""

import pytest
import torch
from attention_cases import BF16, FP16, FP32
from dense import assert_close

from tts_kernels.attention import merge_states


def plain_merge(out, lse, dtype):
    weight = torch.softmax(lse.to(dtype), 0)
    return (weight[..., None] * out.to(dtype)).sum(0), torch.logsumexp(lse.to(dtype), 0)


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
# One state; sizes around a vector; heads beyond 128, where peers fail.
@pytest.mark.parametrize("shape", [(1, 3, 2, 64), (2, 5, 7, 40), (3, 1, 160, 128), (9, 4, 3, 256), (2, 2, 1, 5)])
def test_against_float64(path, dtype, shape):
    gen = torch.Generator().manual_seed(0)
    out = torch.randn(shape, generator=gen).to(dtype)
    lse = torch.randn(shape[:3], generator=gen) * 8
    exact, plain = plain_merge(out, lse, torch.float64), plain_merge(out, lse, dtype)
    before = out.clone(), lse.clone()
    got = merge_states(out.to(path.device), lse.to(path.device), backend=path.backend)
    assert got[0].dtype == dtype and got[1].dtype == FP32
    assert_close("out", got[0].cpu(), plain[0], exact[0], terms=shape[0])
    assert_close("lse", got[1].cpu(), plain[1], exact[1], terms=shape[0])
    assert torch.equal(out, before[0]) and torch.equal(lse, before[1])


def test_empty_states(path):
    """-inf counts for nothing, whatever its `out` holds; where all are empty the result is."""
    gen = torch.Generator().manual_seed(0)
    out, lse = torch.randn(3, 4, 2, 16, generator=gen), torch.randn(3, 4, 2, generator=gen)
    lse[1] = -torch.inf
    out[1] = torch.nan
    lse[:, 2] = -torch.inf
    got_out, got_lse = merge_states(out.to(path.device), lse.to(path.device), backend=path.backend)
    expected = plain_merge(out[[0, 2]], lse[[0, 2]], torch.float64)
    keep = [0, 1, 3]
    torch.testing.assert_close(got_out[keep].cpu().double(), expected[0][keep], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got_lse[keep].cpu().double(), expected[1][keep], rtol=1e-5, atol=1e-6)
    assert torch.equal(got_out[2].cpu(), torch.zeros(2, 16))
    assert torch.isneginf(got_lse[2]).all()


def test_one_state_is_itself(path):
    out, lse = torch.randn(1, 3, 2, 32).to(path.device), torch.randn(1, 3, 2).to(path.device)
    got_out, got_lse = merge_states(out, lse, backend=path.backend)
    assert torch.equal(got_out, out[0])
    torch.testing.assert_close(got_lse, lse[0], rtol=1e-6, atol=1e-7)


def test_states_far_apart(path):
    out, lse = torch.ones(2, 1, 1, 8), torch.tensor([[[500.0]], [[-500.0]]])
    out[1] = 7.0
    got_out, got_lse = merge_states(out.to(path.device), lse.to(path.device), backend=path.backend)
    assert torch.equal(got_out.cpu(), out[0])
    torch.testing.assert_close(got_lse.cpu(), lse[0], rtol=1e-6, atol=0)


def test_strided_states(path):
    """States stacked along another dimension, as FlashInfer lays them: [R, S, H, D]."""
    gen = torch.Generator().manual_seed(0)
    out, lse = (
        torch.randn(5, 3, 2, 48, generator=gen).to(path.device),
        torch.randn(5, 3, 2, generator=gen).to(path.device),
    )
    got = merge_states(out.transpose(0, 1), lse.transpose(0, 1), backend=path.backend)
    dense = merge_states(out.transpose(0, 1).contiguous(), lse.transpose(0, 1).contiguous(), backend=path.backend)
    assert torch.equal(got[0], dense[0]) and torch.equal(got[1], dense[1])
