"""What is the tree kernel's own: bits do not depend on tiles and stages, a row with one partial state is written out at
once, counters wrap whatever a plan's lengths, surplus entries of a list with room do nothing, and what it refuses."""

from __future__ import annotations

import dataclasses
import functools
import random

import attention_cases as cases
import attention_paths as paths
import pytest
import torch
from attention_cases import BF16, FP8, FP16, FP32, Case
from forests import LAYOUTS, Forest, star

import tts_kernels as tts
from tts_kernels.attention import cuda
from tts_kernels.attention.work import NARROW, TALL, WIDE, Work, key_of

PATH = paths.Path("cuda")
EVERYWHERE = [param for param in paths.available() if param.values[0].backend == "cuda"]  # emulated, and on a GPU
BOTH = EVERYWHERE + paths.available(paths.WARPGROUPS)

# A size of heads with tall tiles, one of padded columns and e4m3, one whose blocks are half as long.
CASES = [
    Case(heads=(6, 2), dtypes=(FP16, FP16), head_dim=64, window=90, sinks=True, seed=1),
    Case(heads=(28, 4), dtypes=(BF16, FP8), head_dim=80, scales="head", softcap=2.5, seed=2),
    Case(heads=(4, 1), dtypes=(BF16, BF16), head_dim=192, scale=-0.2, causal=False, seed=3),
]
# More, for a GPU alone: other rows' zero weights must leave a row's sums as they are in its matrix instructions too.
GPU_CASES = [
    Case(heads=(32, 8), dtypes=(q, kv), head_dim=128, window=window, seed=7)
    for q, kv in ((BF16, BF16), (FP16, FP16), (BF16, FP8), (FP16, FP8))
    for window in (-1, 37)
]


@pytest.fixture(autouse=True)
def path(request, monkeypatch):
    """Emulated, where a test does not say otherwise."""
    path = getattr(request, "param", PATH)
    if path.missing():
        pytest.skip(path.missing())
    path.select(monkeypatch)
    return path


def forest(case: Case) -> Forest:
    """A prefix of 44 rows, the most of them its child's; leaves of one row and of several; a lone root."""
    return Forest([-1, 0, 0, 1, 1, -1], [300, 133, 5, 70, 1, 12], [0, 40, 1, 2, 1, 3], case.page_size).place(
        random.Random(case.seed)
    )


def with_tiles(work: Work, plan, rows: int) -> Work:
    """The same list with every tile cut to `rows` packed rows."""
    sizes = {16: NARROW, 64: WIDE, 128: TALL}
    old = work.table[: 4 * work.num_items].view(-1, 4)[: work.table[-1]].tolist()
    items = []
    for node, first, chunk, tile in old:
        begin, end = plan.nodes[4, node].item(), plan.nodes[6, node].item()
        stop = min(first + cuda.TILE_ROWS[tile], (end - begin) * work.group)
        items += [(node, at, chunk, sizes[rows]) for at in range(first, stop, rows)]
    head = work.table.new_tensor(items).flatten()
    rest = work.table[4 * work.num_items : -1]
    table = torch.cat([head, rest, work.table.new_tensor([len(items)])])
    return dataclasses.replace(work, table=table, num_items=len(items))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("path", BOTH, indirect=True)
def test_tiles_and_stages_change_no_bit(path, case):
    tiles_and_stages(path, case)


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_CASES, ids=lambda case: f"{case}-{case.window}")
@pytest.mark.parametrize("path", [param for param in BOTH if param.values[0].device == "cuda"], indirect=True)
def test_tiles_and_stages_change_no_bit_on_a_gpu(path, case):
    tiles_and_stages(path, case)


def tiles_and_stages(path: paths.Path, case: Case) -> None:
    case = cases.fitting(case, path)
    inputs = cases.make_inputs(case, forest(case))
    caches, plan = inputs.caches(path.device), inputs.forest.plan(causal=case.causal, device=path.device)
    key = key_of(inputs.q, caches[0], "cuda")
    out, lse = cases.check(inputs, path, plan=plan, caches=caches)
    work = plan.works[key]
    tiles = set(work.table[: 4 * work.num_items].view(-1, 4)[:, 3].tolist())
    assert len(tiles) > 1 and (TALL in tiles) == (case.head_dim <= 128)
    for rows in (16, 64, 128) if case.head_dim <= 128 else (16, 64):
        for stages in (2, 3) if path.warpgroups else stages_that_fit(case, caches[0]):
            config = dataclasses.replace(work.config, num_stages=stages)
            plan.works[key] = dataclasses.replace(with_tiles(work, plan, rows), config=config)
            got = cases.run(inputs, path, plan=plan, caches=caches)
            assert torch.equal(got[0], out) and torch.equal(got[1], lse), f"tiles of {rows} rows, {stages} stages"


@pytest.mark.parametrize("page_size, box", [(4, 0), (16, 16), (48, 0), (256, 128)])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("path", paths.available(paths.WARPGROUPS), indirect=True)
def test_boxes_are_copied_wherever_they_can_be(path, layout, page_size, box, monkeypatch):
    """Of one KV head, of several; of caches that are halves of one buffer."""
    run, boxes = cuda.native.cuda_tree_attention, []
    monkeypatch.setattr(cuda.native, "cuda_tree_attention", lambda *call: boxes.append(run(*call)))
    for heads in ((6, 2), (3, 1)):
        case = Case(heads=heads, dtypes=(BF16, BF16), head_dim=128, page_size=page_size, layout=layout)
        inputs = cases.make_inputs(case, Forest([-1], [300], [2], page_size).place(random.Random(0)))
        cases.check(inputs, path)
    assert boxes == [box, box]


def stages_that_fit(case: Case, cache: torch.Tensor) -> list[int]:
    _, most = cuda.device_kind(cache.device)
    needed = functools.partial(cuda.native.cuda_tree_attention_shared_bytes, case.head_dim)
    return [stages for stages in (2, 3, 4) if needed(stages, case.dtypes[1] == FP8) <= most]


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
@pytest.mark.parametrize("path", EVERYWHERE, indirect=True)
def test_every_e4m3_code(path, dtype):
    """As key and as value of roots of one token, whose weight is 1: values come out as they are, and a score of a key's
    one number is the lse. Each code stands at each place of a word. Where the only score is NaN, what comes out is NaN.
    """
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    exact = codes.view(FP8).to(dtype)
    number = ~exact.isnan()
    k_cache = torch.zeros(256, 1, 1, 64, dtype=torch.uint8)
    q = torch.zeros(256, 4, 64, dtype=dtype)
    for code in range(256):
        first = 4 * (code % 16)
        k_cache[code, 0, 0, first : first + 4] = code
        for head in range(4):
            q[code, head, first + head] = 1
    v_cache = ((codes[:, None] + torch.arange(64)) % 256).to(torch.uint8)[:, None, None]
    plan = tts.TreePlan.from_nodes([-1] * 256, [1] * 256, [[i] for i in range(256)], [1] * 256, page_size=1,
                                   device=path.device)  # fmt: skip
    q, *caches = (x.to(path.device) for x in (q, k_cache.view(FP8), v_cache.view(FP8)))
    for backend in ("cuda", "reference"):
        out, lse = tts.tree_attention(q, *caches, plan, scale=1.0, return_lse=True, backend=backend)
        wanted = exact.float()[:, None].expand(256, 4)
        torch.testing.assert_close(lse.cpu()[number], wanted[number], rtol=1e-5, atol=1e-4)
        assert lse[~number].isnan().all()
        values = exact[v_cache.flatten(1).long()][:, None].expand(256, 4, 64)
        torch.testing.assert_close(out.cpu()[number], values[number], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("lengths", [[40], [300, 90]], ids=["one-state", "merged"])
def test_nan_is_not_hidden(lengths):
    """A query of NaN has no score that is a number: its row is NaN, and no other one is."""
    case = Case(heads=(4, 2), dtypes=(FP16, FP16), head_dim=64, seed=4)
    parents, rows = [[-1], [-1, 0]][len(lengths) - 1], [[2], [0, 2]][len(lengths) - 1]
    inputs = cases.make_inputs(case, Forest(parents, lengths, rows, case.page_size).place(random.Random(0)))
    inputs.q[0] = torch.nan
    out, lse = cases.run(inputs, PATH, plan=inputs.forest.plan(), caches=inputs.caches())
    assert out[0].isnan().all() and lse[0].isnan().all()
    assert out[1].isfinite().all() and lse[1].isfinite().all()


def test_one_state_is_written_at_once():
    """Roots of one chunk: neither states nor counters are touched. A prefix makes two states of each row."""
    case = Case(heads=(8, 2), dtypes=(FP16, FP16), seed=4)
    for parent, touched in (([-1, -1], 0), ([-1, 0], 2)):
        inputs = cases.make_inputs(case, Forest(parent, [30, 40], [0, 5], case.page_size).place(random.Random(0)))
        caches, plan = inputs.caches(), inputs.forest.plan()
        cases.check(inputs, PATH, plan=plan, caches=caches)
        (work,) = plan.works.values()
        states = work.num_states * 8 * 64
        work.scratch[: states + work.num_states * 8 * 2] = torch.nan
        cases.check(inputs, PATH, plan=plan, caches=caches)
        sums = work.scratch[states : states + work.num_states * 8 * 2].view(-1, 2)
        assert sums[:, 0].isnan().logical_not().sum() == touched * 5 * 8
        got = tts.explain(plan, inputs.q, caches[0], backend="cuda", bandwidth=1e9, flops=1e9)
        assert got.launches == 1 and got.state_bytes == touched * 5 * 8 * (64 + 2) * 4 * 2


def test_counters_wrap_whatever_the_lengths():
    """Leaves grow from one chunk to three, so that a row waits for more states from call to call."""
    case = Case(heads=(8, 2), dtypes=(BF16, BF16), page_size=16, seed=5)
    grown = star(3, prefix=100, suffix=[150, 131, 160], page_size=16)
    inputs = cases.make_inputs(case, grown)
    caches = inputs.caches()
    plan = tts.TreePlan.from_nodes(grown.parent, [100, 30, 11, 40], grown.pages, grown.rows, page_size=16)
    for steps in (0, 5, 40, 0, 75):
        plan.advance_(steps)
        tts.tree_attention(inputs.q, *caches, plan, backend="cuda")
        (work,) = plan.works.values()
        assert not work.scratch[-3 * 8 :].view(torch.int32).any()
    cases.check(inputs, PATH, plan=plan, caches=caches)


def test_surplus_items_and_rows_do_nothing():
    """Of a list with room: items behind the last that means something, and rows that no node owns."""
    case = Case(heads=(4, 2), dtypes=(FP16, FP16), seed=6)
    inputs = cases.make_inputs(
        case, Forest([-1, 0, -1], [100, 9, 0], [0, 3, 0], case.page_size).place(random.Random(0))
    )
    caches, plan = inputs.caches(), inputs.forest.plan()
    out, lse = cases.check(inputs, PATH, plan=plan, caches=caches)
    ((key, work),) = plan.works.items()
    # A chunk that no node has, and packed rows that there are not; the others are beyond those that mean something.
    surplus = [0, 0, work.config.max_chunks, NARROW] * 40 + [1, 640, 0, NARROW] * 20 + [1, 0, 0, TALL] * 40
    surplus = torch.tensor(surplus, dtype=torch.int32)
    cut = 4 * work.num_items
    table = torch.cat([work.table[:cut], surplus, work.table[cut:]])
    table[-1] += 60
    plan.works[key] = dataclasses.replace(work, table=table, num_items=work.num_items + 100)
    got = cases.run(inputs, PATH, plan=plan, caches=caches)
    assert torch.equal(got[0], out) and torch.equal(got[1], lse)
    plan.rows[1, 2] = 2  # the last row is the empty root's
    plan.nodes[4:7] = torch.tensor([[0, 0, 2], [0, 2, 3], [2, 2, 3]], dtype=torch.int32)
    got = cases.run(inputs, PATH, plan=plan, caches=caches)
    assert (got[0][2] == 0).all() and (got[1][2] == -torch.inf).all() and torch.isfinite(got[1][:2]).all()


@pytest.mark.parametrize(
    "q, cache, offset, reason",
    [
        ((FP32, 64), FP32, 0, "q is torch.float32"),
        ((FP16, 264), FP16, 0, "head_dim 264 is larger than 256"),
        ((FP16, 36), FP16, 0, "head_dim 36 of torch.float16 is not a multiple of 16 bytes"),
        ((BF16, 40), FP8, 0, "head_dim 40 of torch.float8_e4m3fn is not a multiple of 16 bytes"),
        ((FP16, 64), FP16, 4, "the rows of v_cache do not lie at multiples of 16 bytes"),
    ],
)
def test_what_it_refuses(q, cache, offset, reason):
    dtype, head_dim = q
    q = torch.zeros(1, 2, head_dim, dtype=dtype)
    k_cache = torch.zeros(2, 16, 2, head_dim).to(cache)
    v_cache = torch.zeros(k_cache.numel() + offset).to(cache)[offset:].view(k_cache.shape)
    reasons = tts.unsupported_reasons("tree_attention", "cuda", q, k_cache, v_cache)
    assert any(reason in r for r in reasons), reasons
    plan = tts.TreePlan.from_nodes([-1], [3], [[0]], [1], page_size=16)
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot run tree_attention: "):
        tts.tree_attention(q, k_cache, v_cache, plan, backend="cuda")
