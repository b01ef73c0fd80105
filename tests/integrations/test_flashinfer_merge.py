"""FlashInfer's merges of states, base-2 log-sum-exps and all, against float64; what empty states and bad ones do."""

import math

import attention_paths as paths
import pytest
import torch
from attention_cases import BF16, FP16, FP32
from dense import assert_close

from tts_kernels.integrations import flashinfer

LN2 = math.log(2)


@pytest.fixture(params=paths.available(), ids=str)
def path(request, monkeypatch):
    request.param.select(monkeypatch)
    return request.param


def exact_merge(v, s, dtype):
    """v [n, S, H, D], s [n, S, H] in base 2, +-inf for empty ones -> (v, s) in `dtype`."""
    s = torch.where(s == torch.inf, -torch.inf, s.to(dtype)) * LN2
    lse = torch.logsumexp(s, 1)
    weight = torch.where(lse[:, None] == -torch.inf, 0.0, torch.exp(s - lse[:, None]))[..., None]
    return (torch.where(weight > 0, v.to(dtype), 0.0) * weight).sum(1), lse / LN2


def random_states(n, count, heads, head_dim, dtype=FP32, spread=8.0, seed=0):
    gen = torch.Generator().manual_seed(seed)
    v = torch.randn(n, count, heads, head_dim, generator=gen).to(dtype)
    return v, torch.randn(n, count, heads, generator=gen) * spread


def assert_merged(got, v, s, dtype=None):
    exact, plain = exact_merge(v, s, torch.float64), exact_merge(v, s, v.dtype)
    assert got[0].dtype == v.dtype and got[1].dtype == (dtype or FP32)
    assert_close("v", got[0].cpu(), plain[0], exact[0], terms=v.shape[1])
    plain_s = exact_merge(v, s, FP32)[1].to(dtype or FP32)
    assert_close("s", got[1].cpu(), plain_s, exact[1], terms=v.shape[1])


# 160 heads, where FlashInfer's kernel does not launch; one state and many; a head_dim that fills no vector; no rows.
@pytest.mark.parametrize("shape", [(3, 2, 160, 64), (1, 5, 3, 128), (2, 1, 2, 40), (4, 3, 2, 256), (0, 2, 2, 16)])
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
def test_merges_against_float64(dtype, shape, path):
    v, s = random_states(*shape, dtype)
    device = {"device": path.device}
    assert_merged(flashinfer.merge_states(v.to(**device), s.to(**device), backend=path.backend), v, s)
    if shape[1] != 2:
        return
    states = [x.to(**device) for x in (v[:, 0], s[:, 0], v[:, 1], s[:, 1])]
    assert_merged(flashinfer.merge_state(*states, backend=path.backend), v, s)
    states = [x.clone() for x in states]
    assert flashinfer.merge_state_in_place(*states, backend=path.backend) is None
    assert_merged(states[:2], v, s)
    assert torch.equal(states[2].cpu(), v[:, 1]) and torch.equal(states[3].cpu(), s[:, 1])


def test_merge_of_large_head_dim():
    v, s = random_states(2, 2, 2, 320)
    assert_merged(flashinfer.merge_states(v, s), v, s)


@pytest.mark.parametrize("empty", [-torch.inf, torch.inf])
def test_empty_states(empty, path):
    """Rows 0 and 1: one is empty, and its v is not looked at; the other comes back bit for bit. Row 2: both are."""
    v, s = random_states(4, 2, 3, 48)
    s = s * 1000
    s[0, 0] = s[1, 1] = s[2] = empty
    v[0, 0] = v[1, 1] = v[2] = torch.nan
    device = {"device": path.device}
    in_place = [x.clone().to(**device) for x in (v[:, 0], s[:, 0], v[:, 1], s[:, 1])]
    results = [
        flashinfer.merge_states(v.to(**device), s.to(**device), backend=path.backend),
        flashinfer.merge_state(*[x.clone() for x in in_place], backend=path.backend),
    ]
    flashinfer.merge_state_in_place(*in_place, backend=path.backend)
    for got_v, got_s in (*results, in_place[:2]):
        got_v, got_s = got_v.cpu(), got_s.cpu()
        assert torch.equal(got_v[0], v[0, 1]) and torch.equal(got_s[0], s[0, 1])
        assert torch.equal(got_v[1], v[1, 0]) and torch.equal(got_s[1], s[1, 0])
        assert torch.equal(got_v[2], torch.zeros(3, 48)) and torch.isneginf(got_s[2]).all()
        assert torch.isfinite(got_v[3]).all() and torch.isfinite(got_s[3]).all()


@pytest.mark.parametrize("s_dtype", [FP32, FP16, BF16, torch.float64])
@pytest.mark.parametrize("v_dtype", [FP32, FP16])
def test_in_place_never_loses_an_update(v_dtype, s_dtype):
    """Whatever the dtype of s, the strides of both, and with a mask: rows without it keep their bits."""
    v, s = random_states(6, 2, 3, 40, v_dtype)
    s = s.to(s_dtype)
    for mask in (None, torch.tensor([True, False, True, True, False, True])):
        wide_v = torch.full((40, 8, 5), 7.0, dtype=v_dtype)
        wide_s = torch.full((3, 12), 7.0, dtype=s_dtype)
        mine_v, mine_s = wide_v.permute(1, 2, 0)[1:7, 1:4], wide_s.t()[::2]
        mine_v.copy_(v[:, 0])
        mine_s.copy_(s[:, 0])
        flashinfer.merge_state_in_place(mine_v, mine_s, v[:, 1], s[:, 1], mask)
        merged = torch.ones(6, dtype=torch.bool) if mask is None else mask
        assert_merged((mine_v[merged], mine_s[merged]), v[merged], s[merged], s_dtype)
        assert torch.equal(mine_v[~merged], v[~merged, 0]) and torch.equal(mine_s[~merged], s[~merged, 0])
        assert (wide_s.t()[1::2] == 7).all() and (wide_v.permute(1, 2, 0)[0] == 7).all()


def test_merges_of_strided_states():
    v, s = random_states(5, 3, 4, 32)
    expected = flashinfer.merge_states(v, s)
    strided = v.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0), s.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    for got, exact in zip(flashinfer.merge_states(*strided), expected):
        assert torch.equal(got, exact)


PAIR = {"v_a": (4, 3, 16), "s_a": (4, 3), "v_b": (4, 3, 16), "s_b": (4, 3)}
MERGES = [
    # function, argument named, exception, what it is replaced with, part of the message that says what came
    ("merge_state", "v_a", TypeError, None, "NoneType"),
    ("merge_state", "v_a", TypeError, torch.zeros(4, 3, 16, dtype=torch.float64), "float64"),
    ("merge_state", "v_a", ValueError, torch.zeros(4, 48), "48"),
    ("merge_state", "v_a", ValueError, torch.zeros(4, 3, 16, requires_grad=True), "requires_grad"),
    ("merge_state", "v_b", TypeError, torch.zeros(4, 3, 16, dtype=FP16), "float16"),
    ("merge_state", "v_b", ValueError, torch.zeros(4, 3, 15), "15"),
    ("merge_state", "v_b", ValueError, torch.zeros(4, 3, 16, device="meta"), "meta"),
    ("merge_state", "s_a", TypeError, torch.zeros(4, 3, dtype=torch.int32), "int32"),
    ("merge_state", "s_a", ValueError, torch.zeros(3, 4), r"\(3, 4\)"),
    ("merge_state", "s_b", ValueError, torch.zeros(4, 3, 1), r"\(4, 3, 1\)"),
    ("merge_state", "backend", ValueError, "cda", "'cda'"),
    ("merge_state_in_place", "v", ValueError, torch.zeros(1, 3, 16).expand(4, 3, 16), "expanded"),
    ("merge_state_in_place", "s", ValueError, torch.zeros(4, 1).expand(4, 3), "expanded"),
    ("merge_state_in_place", "v_other", ValueError, torch.zeros(3, 3, 16), r"\(3, 3, 16\)"),
    ("merge_state_in_place", "s_other", ValueError, torch.zeros(4), r"\(4,\)"),
    ("merge_state_in_place", "mask", TypeError, torch.ones(4, dtype=torch.uint8), "uint8"),
    ("merge_state_in_place", "mask", TypeError, True, "bool"),
    ("merge_state_in_place", "mask", ValueError, torch.ones(3, dtype=torch.bool), r"\(3,\)"),
    ("merge_states", "v", ValueError, torch.zeros(4, 3, 16), r"\(4, 3, 16\)"),
    ("merge_states", "v", ValueError, torch.zeros(4, 0, 3, 16), r"\(4, 0, 3, 16\)"),
    ("merge_states", "s", ValueError, torch.zeros(2, 4, 3), r"\(2, 4, 3\)"),
]


@pytest.mark.parametrize("function, argument, error, value, came", MERGES)
def test_bad_states(function, argument, error, value, came):
    given = {
        "merge_state": PAIR,
        "merge_state_in_place": dict(zip(("v", "s", "v_other", "s_other"), PAIR.values())),
        "merge_states": {"v": (4, 2, 3, 16), "s": (4, 2, 3)},
    }[function]
    given = {**{name: torch.ones(shape) for name, shape in given.items()}, argument: value}
    kept = {name: x.clone() for name, x in given.items() if isinstance(x, torch.Tensor)}
    with pytest.raises(error, match=f"^{argument}: expected .*{came}"):
        getattr(flashinfer, function)(**given)
    if argument not in kept or kept[argument].device.type == "cpu":
        assert all(torch.equal(given[name], x) for name, x in kept.items())
