"""FlashInfer's cascade by its own names against a dense float64 softmax.

The oracle knows segments, not trees: a row sees, level by level, the segment that its row number falls into. Everything
that no row may read is poisoned: unused slots and the pages of segments without rows are NaN, page ids beyond the last
indptr entry are far out of range, and last_page_len of segments without pages is nonsense.
"""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass, replace

import pytest
import torch
from attention_cases import BF16, FP8, FP16, FP32, on_device, one_thread
from attention_paths import Path
from dense import assert_close, dense_attention
from forests import POISON_PAGE, empty_caches, write

from tts_kernels.integrations import flashinfer

LN2 = math.log(2)


def params(*paths: Path) -> list:
    """Those that can run here; a GPU's are skipped by name without one."""
    cuda = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
    return [
        pytest.param(path, marks=cuda if path.device == "cuda" else [], id=str(path))
        for path in paths
        if path.device == "cuda" or path.missing() is None
    ]


PLAIN = params(Path("reference"), Path("cpu", isa="portable"), Path("reference", "cuda"), Path("triton", "cuda"))
# Under the interpreter Triton is slow: a few small cases.
ALL = [*PLAIN, *params(Path("triton"))]


@dataclass
class Cascade:
    """Segments level by level: their borders in q's rows, their lengths, their pages."""

    borders: list[list[int]]
    lengths: list[list[int]]
    page_size: int
    pages: list[list[list[int]]]
    num_pages: int

    @property
    def num_rows(self) -> int:
        return self.borders[0][-1]

    @property
    def num_tokens(self) -> int:
        return sum(map(sum, self.lengths))

    def segments(self):
        for level, borders in enumerate(self.borders):
            for j, (begin, end) in enumerate(itertools.pairwise(borders)):
                yield level, j, begin, end

    def arguments(self, device="cpu", dtype=torch.int32) -> dict:
        def tensors(lists):
            return [torch.tensor(numbers, dtype=dtype, device=device) for numbers in lists]

        ids, indptr, last = [], [], []
        for level, lengths in enumerate(self.lengths):
            served = [end > begin for begin, end in itertools.pairwise(self.borders[level])]
            pages = [p if used else [POISON_PAGE] * len(p) for p, used in zip(self.pages[level], served)]
            ids.append([page for p in pages for page in p] + [POISON_PAGE])
            indptr.append([0, *itertools.accumulate(map(len, pages))])
            last.append([(n - 1) % self.page_size + 1 if n else 99 for n in lengths])
        return {
            "qo_indptr_arr": tensors(self.borders),
            "paged_kv_indptr_arr": tensors(indptr),
            "paged_kv_indices_arr": tensors(ids),
            "paged_kv_last_page_len": tensors(last),
        }

    def visibility(self, *, causal: bool, window: int) -> torch.Tensor:
        """bool [R, T], tokens segment by segment."""
        visible = torch.zeros(self.num_rows, self.num_tokens, dtype=torch.bool)
        above = torch.zeros(self.num_rows, dtype=torch.long)  # tokens of the levels before
        total = torch.zeros(self.num_rows, dtype=torch.long)
        for level, j, begin, end in self.segments():
            total[begin:end] += self.lengths[level][j]
        first = 0
        for level, j, begin, end in self.segments():
            length = self.lengths[level][j]
            token = torch.arange(length)
            for row in range(begin, end):
                own = row - self.last_end(row)  # negative: rows to the end of its request
                see = torch.ones(length, dtype=torch.bool)
                if causal and level == len(self.borders) - 1:
                    see = token < length + own + 1
                if window >= 0:
                    see &= above[row] + token >= total[row] + own - window
                visible[row, first : first + length] = see
            above[begin:end] += length
            first += length
        return visible

    def last_end(self, row: int) -> int:
        return next(border for border in self.borders[-1] if border > row)


def place(rng: random.Random, borders, lengths, page_size) -> Cascade:
    need = [[-(-length // page_size) for length in level] for level in lengths]
    num_pages = sum(map(sum, need)) + 3
    ids = iter(rng.sample(range(num_pages), num_pages))
    pages = [[[next(ids) for _ in range(count)] for count in level] for level in need]
    return Cascade(borders, lengths, page_size, pages, num_pages)


def random_cascade(rng: random.Random, *, levels: int, page_size: int, rows: str, nested: bool) -> Cascade:
    """Six requests; some segments without pages, some without rows, some that end inside a page."""
    counts = [1] * 6 if rows == "decode" else [rng.randrange(0, 6) for _ in range(6)]
    counts[rng.randrange(6)] = 0
    borders = [[0, *itertools.accumulate(counts)]]
    num_rows = borders[0][-1]
    for level in range(1, levels):
        cuts = borders[0] if nested else range(num_rows + 1)
        inner = sorted(rng.choices(cuts, k=levels - level))
        borders.insert(0, [0, *inner, num_rows])
    sizes = [0, 1, page_size, 2 * page_size, rng.randrange(1, 40), rng.randrange(20, 60)]
    lengths = [[rng.choice(sizes) for _ in level[1:]] for level in borders]
    return place(rng, borders, lengths, page_size)


@dataclass(frozen=True)
class Case:
    levels: int = 2
    page_size: int = 16
    rows: str = "append"
    nested: bool = True
    causal: bool = True
    window: int = -1
    softcap: float | None = None
    scale: float | None = None
    heads: tuple = (4, 2)
    head_dim: int = 64
    dtype: torch.dtype = FP32
    layout: str = "NHD"
    joint: bool = False
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.seed}-{self.levels}-{self.rows}-D{self.head_dim}"


FACTORS = {
    "levels": (1, 2, 3),
    "page_size": (1, 16),
    "rows": ("decode", "append"),
    "nested": (True, False),
    "causal": (True, False),
    "window": (-1, 0, 7, 50),
    "softcap": (None, 2.5),
    "scale": (None, 0.4),
    "heads": ((3, 3), (8, 2), (7, 1)),
    "head_dim": (64, 80, 128, 256),
    "dtype": (FP32, FP16, BF16),
    "layout": ("NHD", "HND"),
    "joint": (False, True),
}
# Drawn at random: with 48 points any two values of any two factors meet with near certainty (at the least likely, 4 x 4
# values, each pair is missed once in 20 such sets), and the forest differs from point to point.
CASES = [
    Case(**{name: random.Random(f"{name} {seed}").choice(values) for name, values in FACTORS.items()}, seed=seed)
    for seed in range(48)
]
# Where a tree has to say more than "a segment is a node".
CUTS = [
    Case(levels=levels, nested=False, causal=causal, window=window, page_size=4, heads=(2, 1), seed=seed)
    for levels, causal, window, seed in itertools.product((2, 3), (True, False), (-1, 5), range(2))
]


def make_caches(cascade: Cascade, case: Case, k: torch.Tensor, v: torch.Tensor):
    """paged_kv_cache as FlashInfer takes it, all unused slots NaN."""
    shape = (cascade.num_pages, cascade.page_size, case.heads[1], case.head_dim)
    k_cache, v_cache = empty_caches(*shape, case.dtype, "NHD")
    slots, first = [], 0
    for level, j, begin, end in cascade.segments():
        pages, length = cascade.pages[level][j], cascade.lengths[level][j]
        if end > begin:
            slots += [(first + i, pages[i // shape[1]] * shape[1] + i % shape[1]) for i in range(length)]
        first += length
    tokens = [token for token, _ in slots]
    for cache, values in ((k_cache, k), (v_cache, v)):
        write(cache, [slot for _, slot in slots], values[tokens])
    if case.layout == "HND":
        k_cache, v_cache = (cache.transpose(1, 2).contiguous() for cache in (k_cache, v_cache))
    return torch.stack((k_cache, v_cache), 1) if case.joint else (k_cache, v_cache)


def options(cascade: Cascade, case: Case) -> dict:
    return {
        "num_qo_heads": case.heads[0],
        "num_kv_heads": case.heads[1],
        "head_dim": case.head_dim,
        "page_size": cascade.page_size,
        "causal": case.causal,
        "sm_scale": case.scale,
        "window_left": case.window,
        "logits_soft_cap": case.softcap,
        "q_data_type": case.dtype,
    }


def random_inputs(cascade: Cascade, case: Case):
    gen = torch.Generator().manual_seed(case.seed)
    q = torch.randn(cascade.num_rows, case.heads[0], case.head_dim, generator=gen).to(case.dtype)
    k, v = (
        torch.randn(cascade.num_tokens, case.heads[1], case.head_dim, generator=gen).to(case.dtype) for _ in range(2)
    )
    return q, k, v


def check(cascade: Cascade, case: Case, path: Path, wrapper=None) -> None:
    q, k, v = random_inputs(cascade, case)
    if wrapper is None:
        workspace = torch.empty(1, device=path.device)
        wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(case.levels, workspace, case.layout)
        wrapper.plan(**cascade.arguments(path.device), **options(cascade, case))
    caches = make_caches(cascade, case, k, v)
    caches = on_device(caches, path.device) if case.joint else tuple(on_device(c, path.device) for c in caches)
    out, lse = wrapper.run(q.to(path.device), caches, return_lse=True, backend=path.backend)
    assert out.dtype == case.dtype and lse.dtype == FP32
    visible = cascade.visibility(causal=case.causal, window=case.window)
    dense = {
        "scale": case.scale or 1 / math.sqrt(case.head_dim), "softcap": case.softcap or 0.0, "sinks": None,
        "k_scale": None, "v_scale": None,
    }  # fmt: skip
    with one_thread():
        exact = dense_attention(q, k, v, visible, dtype=torch.float64, **dense)
        plain = dense_attention(q, k, v, visible, dtype=case.dtype, **dense)
    terms = case.head_dim + cascade.num_tokens
    assert_close("out", out.cpu(), plain[0], exact[0], terms=terms)
    assert_close("lse", lse.cpu(), plain[1] / LN2, exact[1] / LN2, terms=terms)


def cascade_of(case: Case) -> Cascade:
    return random_cascade(
        random.Random(case.seed), levels=case.levels, page_size=case.page_size, rows=case.rows, nested=case.nested
    )


@pytest.mark.parametrize("path", PLAIN)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_dense(case, path, monkeypatch):
    path.select(monkeypatch)
    check(cascade_of(case), case, path)


@pytest.mark.parametrize("path", ALL)
@pytest.mark.parametrize("case", CUTS, ids=lambda c: f"{c.levels}-causal{c.causal:d}-window{c.window}-{c.seed}")
def test_segments_that_cross_borders(case, path, monkeypatch):
    path.select(monkeypatch)
    check(cascade_of(case), case, path)


@pytest.mark.parametrize("path", ALL)
@pytest.mark.parametrize("window", [-1, 2])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("borders", [[[0, 7], [0, 5, 7]], [[0, 3, 7], [0, 5, 7]]], ids=["nested", "cut"])
def test_more_rows_than_tokens(borders, causal, window, path, monkeypatch):
    """Five rows on two tokens: with causal the first three see the prefix only; two rows on none."""
    path.select(monkeypatch)
    lengths = [[6] * (len(borders[0]) - 1), [2, 0]]
    case = Case(causal=causal, window=window, page_size=4, heads=(2, 1))
    check(place(random.Random(0), borders, lengths, 4), case, path)


def test_window_does_not_know_levels():
    """The same 40 tokens as one level and cut into three give the same rows, window and all."""
    case = Case(levels=3, page_size=1, window=11, rows="decode")
    q, k, v = random_inputs(place(random.Random(0), [[0, 1]], [[40]], 1), case)
    results = []
    for lengths in ([40], [25, 10, 5], [39, 0, 1]):
        cascade = place(random.Random(1), [[0, 1]] * len(lengths), [[n] for n in lengths], 1)
        wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(len(lengths), torch.empty(0))
        wrapper.plan(**cascade.arguments(), **options(cascade, case))
        results.append(wrapper.run(q, make_caches(cascade, case, k, v)))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(results[2], results[0], rtol=1e-5, atol=1e-6)


def test_no_rows_and_no_tokens():
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(2, torch.empty(0))
    for rows, expected in ((0, (0, 2, 64)), (3, (3, 2, 64))):
        cascade = Cascade([[0, rows], [0, rows]], [[0], [0]], 16, [[[]], [[]]], 1)
        wrapper.plan(**cascade.arguments(), **options(cascade, Case(heads=(2, 1))))
        cache = torch.full((1, 2, 16, 1, 64), torch.nan)
        out, lse = wrapper.run(torch.randn(rows, 2, 64), cache, return_lse=True)
        assert torch.equal(out, torch.zeros(expected)) and torch.equal(lse, torch.full(expected[:2], -torch.inf))


def test_plan_keeps_no_reference_to_its_arguments():
    """Index tensors may be written to after plan(), in which a caller keeps buffers for the next step."""
    case = CUTS[0]
    cascade = cascade_of(case)
    arguments = cascade.arguments()
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(case.levels, torch.empty(0))
    wrapper.plan(**arguments, **options(cascade, case))
    for tensors in arguments.values():
        for tensor in tensors:
            tensor.fill_(POISON_PAGE)
    check(cascade, case, Path("reference"), wrapper)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_index_dtypes_and_aliases(dtype):
    case = CUTS[0]
    cascade = cascade_of(case)
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(case.levels, torch.empty(0))
    wrapper.begin_forward(**cascade.arguments(dtype=dtype), **options(cascade, case))
    check(cascade, case, Path("reference"), wrapper)
    q, k, v = random_inputs(cascade, case)
    cache = make_caches(cascade, case, k, v)
    assert torch.equal(wrapper.forward(q, cache), wrapper.run(q, cache))
    assert wrapper.end_forward() is None
    wrapper.reset_workspace_buffer(torch.empty(9), [torch.empty(1)] * case.levels)
    assert not wrapper.is_cuda_graph_enabled
    check(cascade, case, Path("reference"), wrapper)


def test_what_flashinfer_has_not():
    """fp8 caches with scales, sinks and a given `out`: passed on to tree_attention."""
    from tts_kernels import tree_attention

    case = Case(dtype=FP16, page_size=4)
    cascade = cascade_of(case)
    q, k, v = random_inputs(cascade, case)
    k_cache, v_cache = (cache.to(FP8) for cache in make_caches(cascade, case, k, v))
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(2, torch.empty(0))
    wrapper.plan(**cascade.arguments(), **options(cascade, case), kv_data_type="float8_e4m3fn")
    given = {"k_scale": 0.5, "v_scale": torch.tensor([2.0, 3.0]), "sinks": torch.randn(4), "backend": "reference"}
    out = torch.full_like(q, torch.nan)
    assert wrapper.run(q, (k_cache, v_cache), out=out, **given) is out
    expected = tree_attention(q, k_cache, v_cache, wrapper._planned.tree, **given)
    assert torch.equal(out, expected)
    assert not torch.equal(out, wrapper.run(q, (k_cache, v_cache), backend="reference"))


def run_shared_prefix_program(device):
    """A shared prompt, seven requests, four layers: as the documentation of FlashInfer lays its example out."""
    num_layers, num_qo_heads, num_kv_heads, head_dim, page_size, batch_size = 4, 8, 2, 64, 16, 7
    workspace_buffer = torch.empty(1024, dtype=torch.uint8, device=device)
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(2, workspace_buffer, "NHD")
    shared_pages, unique_pages = 12, 20
    total_pages = shared_pages + unique_pages
    shared_indices = torch.arange(shared_pages).int().to(device)
    shared_indptr = torch.tensor([0, shared_pages], dtype=torch.int32, device=device)
    unique_indices = torch.arange(shared_pages, total_pages).int().to(device)
    unique_indptr = torch.tensor([0, 2, 5, 6, 9, 13, 16, unique_pages], dtype=torch.int32, device=device)
    shared_last_page_len = torch.tensor([page_size], dtype=torch.int32, device=device)
    unique_last_page_len = torch.tensor([1, 7, 14, 4, 3, 1, 16], dtype=torch.int32, device=device)
    kv_cache_at_layer = [
        torch.randn(total_pages, 2, page_size, num_kv_heads, head_dim, dtype=torch.float16, device=device)
        for _ in range(num_layers)
    ]
    qo_indptr_arr = [
        torch.tensor([0, batch_size], dtype=torch.int32, device=device),
        torch.arange(batch_size + 1, dtype=torch.int32, device=device),
    ]
    wrapper.plan(
        qo_indptr_arr,
        [shared_indptr, unique_indptr],
        [shared_indices, unique_indices],
        [shared_last_page_len, unique_last_page_len],
        num_qo_heads,
        num_kv_heads,
        head_dim,
        page_size,
    )
    queries, outputs = [], []
    for layer in range(num_layers):
        queries.append(torch.randn(batch_size, num_qo_heads, head_dim).half().to(device))
        outputs.append(wrapper.run(queries[-1], kv_cache_at_layer[layer]))
    return queries, kv_cache_at_layer, unique_indptr, unique_last_page_len, outputs


@pytest.mark.parametrize("path", params(Path("reference"), Path("reference", "cuda")))
def test_flashinfer_program(path):
    """On the default backend, request by request against torch's attention over its own pages."""
    queries, caches, indptr, last, outputs = run_shared_prefix_program(path.device)
    for q, cache, out in zip(queries, caches, outputs):
        assert out.shape == (7, 8, 64) and out.dtype == FP16
        for i in range(7):
            tokens = int(indptr[i + 1] - indptr[i] - 1) * 16 + int(last[i])
            pages = torch.cat([cache[:12], cache[12 + int(indptr[i]) : 12 + int(indptr[i + 1])]])
            k, v = (pages[:, side].flatten(0, 1)[: 192 + tokens].double() for side in (0, 1))
            k, v = (x.repeat_interleave(4, 1).transpose(0, 1) for x in (k, v))  # [Hq, T, D]
            expected = torch.nn.functional.scaled_dot_product_attention(q[i][:, None].double(), k, v)[:, 0]
            torch.testing.assert_close(out[i].double(), expected, rtol=2e-3, atol=5e-4)


@pytest.mark.parametrize("path", ALL)
def test_a_window_as_large_as_int32_hides_nothing(path):
    """Rows beyond their segment's tokens have negative positions there: the two must not add up beyond int32."""
    cascade = place(random.Random(3), [[0, 6], [0, 6]], [[3], [1]], 4)
    case = replace(STEP, causal=True, window=2**31 - 1)
    check(cascade, case, path)


# CUDA graph mode. On the CPU too: later plans land in the first one's tensors, which is what a captured run reads.


def graph_wrapper(cascade: Cascade, case: Case, device="cpu", spare=8):
    arguments = cascade.arguments(device)
    spares = {"paged_kv_indices_arr": spare}
    buffers = {
        ("paged_kv_last_page_len_buf_arr" if "last" in name else name.replace("_arr", "_buf_arr")): [
            torch.full((len(t) + spares.get(name, 0),), -1, dtype=torch.int32, device=device) for t in tensors
        ]
        for name, tensors in arguments.items()
    }
    workspace = torch.empty(1, device=device)
    return flashinfer.MultiLevelCascadeAttentionWrapper(case.levels, workspace, case.layout, True, **buffers), buffers


def tables(wrapper):
    tree = wrapper._planned.tree
    return [tree.nodes, tree.pages, tree.rows, tree.grows]


STEP = Case(levels=2, page_size=4, heads=(2, 1), causal=True, window=5)
NOW = place(random.Random(0), [[0, 3, 3, 6], [0, 1, 3, 6]], [[9, 5, 7], [3, 4, 6]], 4)
# Other lengths, pages and rows of the segments; the first of level 1 has none now.
NEXT = place(random.Random(1), [[0, 2, 2, 6], [0, 0, 2, 6]], [[12, 0, 3], [9, 5, 7]], 4)


def test_graph_mode_keeps_the_tensors():
    wrapper, buffers = graph_wrapper(NOW, STEP)
    assert wrapper.is_cuda_graph_enabled
    with torch.inference_mode():
        wrapper.plan(**NOW.arguments(), **options(NOW, STEP))
    check(NOW, STEP, Path("reference"), wrapper)
    before = [(table, table.data_ptr()) for table in tables(wrapper)]
    for cascade in (NEXT, NOW, NEXT):
        wrapper.plan(**cascade.arguments(), **options(cascade, STEP))
        assert all(now is table and now.data_ptr() == at for now, (table, at) in zip(tables(wrapper), before))
        served = [cascade.pages[level][j] for level, j, begin, end in cascade.segments() if end > begin]
        assert wrapper._planned.tree.max_page == max(map(max, filter(None, served)))
        check(cascade, STEP, Path("reference"), wrapper)
        for given, kept in zip(cascade.arguments().values(), buffers.values()):
            assert all(torch.equal(g, k[: len(g)]) for g, k in zip(given, kept))


@pytest.mark.parametrize(
    "cascade, changes, message",
    [
        (place(random.Random(2), [[0, 2, 5], [0, 0, 2, 5]], [[4, 4], [1, 1, 1]], 4), {}, "qo_indptr_arr.0.: .*4 ent"),
        (place(random.Random(2), [[0, 2, 2, 5], [0, 0, 2, 5]], [[4] * 3, [1] * 3], 4), {}, "qo_indptr_arr: .*6 rows"),
        (place(random.Random(2), [[0, 2, 2, 6], [0, 0, 3, 6]], [[4] * 3, [1] * 3], 4), {}, "qo_indptr_arr: .*6 nodes"),
        (
            place(random.Random(2), [[0, 2, 2, 6], [0, 0, 2, 6]], [[40, 0, 40], [1] * 3], 4), {},
            "paged_kv_indices_arr.0.: .*page ids",
        ),
        (NEXT, {"causal": False}, "causal"),
        (NEXT, {"sm_scale": 2.0}, "sm_scale"),
        (NEXT, {"window_left": -1}, "window_left"),
        (NEXT, {"logits_soft_cap": 3.0}, "logits_soft_cap"),
        (NEXT, {"q_data_type": FP16}, "q_data_type"),
        (NEXT, {"num_qo_heads": 4}, "num_qo_heads"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_graph_mode_refuses_what_a_captured_run_cannot_follow(cascade, changes, message):
    wrapper, buffers = graph_wrapper(NOW, STEP)
    wrapper.plan(**NOW.arguments(), **options(NOW, STEP))
    kept = [[buffer.clone() for buffer in level] for level in buffers.values()]
    with pytest.raises(ValueError, match=message):
        wrapper.plan(**cascade.arguments(), **{**options(cascade, STEP), **changes})
    check(NOW, STEP, Path("reference"), wrapper)
    for now, before in zip(buffers.values(), kept):
        assert all(map(torch.equal, now, before))


def test_graph_mode_counts_the_pages_of_cut_segments_twice():
    """Segment 1 of level 1 has 5 pages and is cut: 2 + 4 + 5 + 5 + 5. Buffers: 3 + 14, and one more on each level."""
    cut = place(random.Random(2), [[0, 2, 2, 6], [0, 1, 3, 6]], [[4] * 3, [16, 20, 20]], 4)
    wrapper, _ = graph_wrapper(cut, STEP, spare=0)
    with pytest.raises(ValueError, match=r"^paged_kv_indices_buf_arr: expected room for the 21 page ids .* got 19$"):
        wrapper.plan(**cut.arguments(), **options(cut, STEP))
    wrapper, _ = graph_wrapper(cut, STEP, spare=1)
    wrapper.plan(**cut.arguments(), **options(cut, STEP))
    check(cut, STEP, Path("reference"), wrapper)


@pytest.mark.parametrize("path", [Path("triton"), Path("cuda")], ids=str)
def test_graph_mode_writes_the_work_lists_anew(path, monkeypatch):
    """Chunks and tiles come and go with lengths and rows; a captured run reads one table of one size."""
    if path.missing():
        pytest.skip(path.missing())
    path.select(monkeypatch)
    case = replace(STEP, window=-1, dtype=path.takes(FP32))
    shapes = [
        ([[0, 3, 3, 6], [0, 1, 3, 6]], [[9, 5, 7], [3, 4, 6]]),
        ([[0, 1, 1, 6], [0, 0, 1, 6]], [[140, 0, 300], [9, 135, 7]]),
    ]
    cascades = [place(random.Random(i), *shape, 4) for i, shape in enumerate(shapes)]
    wrapper, _ = graph_wrapper(cascades[0], case, spare=120)
    wrapper.plan(**cascades[0].arguments(), **options(cascades[0], case))
    check(cascades[0], case, path, wrapper)
    (work,) = wrapper._planned.tree.works.values()
    before = work.table.clone()
    for cascade in (cascades[1], cascades[0]):
        wrapper.plan(**cascade.arguments(), **options(cascade, case))
        check(cascade, case, path, wrapper)
        assert list(wrapper._planned.tree.works.values()) == [work]
    assert torch.equal(work.table, before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_captured_run_follows_later_plans():
    q, k, v = random_inputs(NOW, STEP)
    wrapper, _ = graph_wrapper(NOW, STEP, "cuda")
    wrapper.plan(**NOW.arguments("cuda"), **options(NOW, STEP))
    q_buffer = q.cuda()
    shape = (2, NOW.num_pages + NEXT.num_pages, 4, 1, STEP.head_dim)
    k_cache, v_cache = torch.full(shape, torch.nan, device="cuda").unbind(0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        wrapper.run(q_buffer, (k_cache, v_cache), backend="triton")  # compiles, and makes the work list
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out = wrapper.run(q_buffer, (k_cache, v_cache), backend="triton")
    for cascade in (NOW, NEXT, NOW):
        wrapper.plan(**cascade.arguments("cuda"), **options(cascade, STEP))
        q, k, v = random_inputs(cascade, STEP)
        for cache, new in zip((k_cache, v_cache), make_caches(cascade, STEP, k, v)):
            cache.fill_(torch.nan)[: len(new)].copy_(new)
        q_buffer.copy_(q)
        graph.replay()
        eager = wrapper.run(q_buffer, (k_cache, v_cache), backend="reference")
        torch.testing.assert_close(out, eager, rtol=1e-3, atol=1e-3)


# Bad input.


def levels(first, second):
    return [torch.tensor(first, dtype=torch.int32), torch.tensor(second, dtype=torch.int32)]


# The valid ones: rows [0, 3) share a page and a half, then have a page each.
VALID = {
    "qo_indptr_arr": levels([0, 3], [0, 1, 2, 3]),
    "paged_kv_indptr_arr": levels([0, 2], [0, 1, 2, 3]),
    "paged_kv_indices_arr": levels([4, 0], [1, 2, 3]),
    "paged_kv_last_page_len": levels([2], [1, 4, 3]),
    "num_qo_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 32,
    "page_size": 4,
    "q_data_type": FP32,
}
PLANS = [
    # argument named, exception, what it is replaced with, part of the message that says what came
    ("qo_indptr_arr", TypeError, torch.arange(2), "Tensor"),
    ("qo_indptr_arr", ValueError, VALID["qo_indptr_arr"][:1], "1"),
    ("qo_indptr_arr[1]", TypeError, [VALID["qo_indptr_arr"][0], [0, 1, 2, 3]], "list"),
    ("qo_indptr_arr[0]", TypeError, [torch.tensor([0.0, 3.0]), VALID["qo_indptr_arr"][1]], "float32"),
    ("qo_indptr_arr[0]", ValueError, [torch.tensor([[0, 3]]), VALID["qo_indptr_arr"][1]], r"\(1, 2\)"),
    ("qo_indptr_arr[0]", ValueError, levels([1, 3], [0, 1, 2, 3]), r"\[1\]"),
    ("qo_indptr_arr[0]", ValueError, levels([], [0, 1, 2, 3]), r"\[\]"),
    ("qo_indptr_arr[1][2]", ValueError, levels([0, 3], [0, 2, 1, 3]), "1"),
    ("qo_indptr_arr[1]", ValueError, levels([0, 3], [0, 1, 2, 4]), "4"),
    ("paged_kv_indptr_arr", ValueError, VALID["paged_kv_indptr_arr"] * 2, "4"),
    ("paged_kv_indptr_arr[1]", ValueError, levels([0, 2], [0, 1, 3]), "3"),
    ("paged_kv_indptr_arr[0]", ValueError, levels([1, 2], [0, 1, 2, 3]), r"\[1\]"),
    ("paged_kv_indptr_arr[1][3]", ValueError, levels([0, 2], [0, 1, 2, 1]), "1"),
    ("paged_kv_indices_arr[0]", ValueError, levels([4], [1, 2, 3]), "1"),
    ("paged_kv_indices_arr[1][2]", ValueError, levels([4, 0], [1, 2, -3]), "-3"),
    ("paged_kv_indices_arr[0][0]", ValueError, [torch.tensor([2**31, 0]), torch.tensor([1, 2, 3])], "2147483648"),
    ("paged_kv_last_page_len[1]", ValueError, levels([2], [1, 4]), "2"),
    ("paged_kv_last_page_len[0][0]", ValueError, levels([0], [1, 4, 3]), "0"),
    ("paged_kv_last_page_len[1][1]", ValueError, levels([2], [1, 5, 3]), "5"),
    ("num_qo_heads", ValueError, 3, "3"),
    ("num_qo_heads", TypeError, 4.0, "4.0"),
    ("num_kv_heads", ValueError, 0, "0"),
    ("head_dim", ValueError, 0, "0"),
    ("page_size", ValueError, 0, "0"),
    ("causal", TypeError, "yes", "yes"),
    ("pos_encoding_mode", ValueError, "ROPE_LLAMA", "'ROPE_LLAMA'"),
    ("pos_encoding_mode", ValueError, "ALIBI", "'ALIBI'"),
    ("sm_scale", TypeError, "1", "str"),
    ("sm_scale", ValueError, math.nan, "nan"),
    ("window_left", ValueError, -2, "-2"),
    ("window_left", TypeError, 1.5, "1.5"),
    ("logits_soft_cap", ValueError, math.inf, "inf"),
    ("q_data_type", ValueError, "float8_e5m2", "float8_e5m2"),
    ("q_data_type", ValueError, "half precision", "half precision"),
    ("q_data_type", TypeError, 16, "16"),
    ("kv_data_type", ValueError, FP16, "float16"),
]


def planned_wrapper():
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(2, torch.empty(0))
    wrapper.plan(**VALID)
    return wrapper


@pytest.mark.parametrize("argument, error, value, came", PLANS, ids=[f"{row[0]}-{row[3]}" for row in PLANS])
def test_bad_plan_leaves_the_one_before(argument, error, value, came):
    wrapper = planned_wrapper()
    q, caches = torch.randn(3, 4, 32), torch.randn(2, 5, 4, 2, 32).unbind(0)
    before = wrapper.run(q, caches)
    name = argument.partition("[")[0]
    with pytest.raises(error) as raised:
        wrapper.plan(**{**VALID, name: value})
    message = str(raised.value)
    assert message.startswith(f"{argument}: expected ") and came.replace("\\", "") in message.rpartition("got")[2]
    assert torch.equal(wrapper.run(q, caches), before)


GOOD = {"q": torch.zeros(3, 4, 32), "paged_kv_cache": torch.zeros(5, 2, 4, 2, 32)}
RUNS = [
    ("q", TypeError, [1.0], "list"),
    ("q", TypeError, torch.zeros(3, 4, 32, dtype=FP16), "float16"),
    ("q", ValueError, torch.zeros(2, 4, 32), "(2, 4, 32)"),
    ("q", ValueError, torch.zeros(3, 8, 32), "(3, 8, 32)"),
    ("q", ValueError, torch.zeros(3, 4, 32, device="meta"), "meta"),
    ("paged_kv_cache", TypeError, None, "None"),
    ("paged_kv_cache", TypeError, (torch.zeros(5, 4, 2, 32),), "1 of them"),
    ("paged_kv_cache", ValueError, torch.zeros(5, 4, 2, 32), "(5, 4, 2, 32)"),
    ("paged_kv_cache", ValueError, torch.zeros(2, 5, 4, 2, 32), "(2, 5, 4, 2, 32)"),
    ("k_cache of paged_kv_cache", ValueError, torch.zeros(5, 2, 2, 4, 32), "(5, 2, 4, 32)"),
    ("k_cache of paged_kv_cache", TypeError, torch.zeros(5, 2, 4, 2, 32, dtype=FP16), "float16"),
    ("v_cache of paged_kv_cache", ValueError, (torch.zeros(5, 4, 2, 32), torch.zeros(5, 4, 2, 16)), "(5, 4, 2, 16)"),
    ("v_cache of paged_kv_cache", TypeError, (torch.zeros(5, 4, 2, 32), 3), "int"),
    ("plan", ValueError, torch.zeros(4, 2, 4, 2, 32), "4 as page 0 of node 0"),  # the cache has 4 pages
]


@pytest.mark.parametrize("argument, error, value, came", RUNS, ids=[f"{row[0]}-{row[3]}" for row in RUNS])
def test_bad_run(argument, error, value, came):
    wrapper = planned_wrapper()
    assert wrapper.run(**GOOD).shape == (3, 4, 32)
    given = {**GOOD, ("q" if argument == "q" else "paged_kv_cache"): value}
    with pytest.raises(error) as raised:
        wrapper.run(**given)
    message = str(raised.value)
    assert message.startswith(f"{argument}: expected ") and came in message.rpartition("got")[2]


def test_run_before_plan():
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(2, torch.empty(0))
    with pytest.raises(RuntimeError, match="plan"):
        wrapper.run(**GOOD)
    with pytest.raises(ValueError, match="sm_scale"):
        wrapper.plan(**VALID, sm_scale=math.nan)
    with pytest.raises(RuntimeError, match="plan"):
        wrapper.run(**GOOD)


INTS = {"dtype": torch.int32}
BUFFERS = {
    "qo_indptr_buf_arr": [torch.zeros(2, **INTS), torch.zeros(4, **INTS)],
    "paged_kv_indptr_buf_arr": [torch.zeros(2, **INTS), torch.zeros(4, **INTS)],
    "paged_kv_indices_buf_arr": [torch.zeros(8, **INTS), torch.zeros(8, **INTS)],
    "paged_kv_last_page_len_buf_arr": [torch.zeros(1, **INTS), torch.zeros(3, **INTS)],
}
WRAPPERS = [
    ("num_levels", ValueError, 0, "0"),
    ("num_levels", TypeError, 2.0, "2.0"),
    ("float_workspace_buffer", TypeError, 1024, "int"),
    ("kv_layout", ValueError, "NDH", "'NDH'"),
    ("qo_indptr_buf_arr", TypeError, None, "NoneType"),
    ("qo_indptr_buf_arr", ValueError, BUFFERS["qo_indptr_buf_arr"][:1], "1"),
    ("qo_indptr_buf_arr[0]", TypeError, [None, None], "NoneType"),
    ("qo_indptr_buf_arr[0]", ValueError, [torch.zeros(0, **INTS)] * 2, "0"),
    ("paged_kv_indices_buf_arr[0]", TypeError, [torch.zeros(8)] * 2, "float32"),
    ("paged_kv_indptr_buf_arr[0]", ValueError, [torch.zeros(3, **INTS)] * 2, "3"),
    ("paged_kv_last_page_len_buf_arr[1]", ValueError, [torch.zeros(1, **INTS)] * 2, "1"),
]


@pytest.mark.parametrize("argument, error, value, came", WRAPPERS, ids=[f"{row[0]}-{row[3]}" for row in WRAPPERS])
def test_bad_wrapper(argument, error, value, came):
    given = {"num_levels": 2, "float_workspace_buffer": torch.empty(0), "use_cuda_graph": True, **BUFFERS}
    flashinfer.MultiLevelCascadeAttentionWrapper(**given)
    with pytest.raises(error) as raised:
        flashinfer.MultiLevelCascadeAttentionWrapper(**{**given, argument.partition("[")[0]: value})
    message = str(raised.value)
    assert message.startswith(f"{argument}: expected ") and came in message.rpartition("got")[2]


def test_bad_workspace_reset():
    wrapper = planned_wrapper()
    with pytest.raises(ValueError, match=r"^int_workspace_buffers: expected 2 tensors"):
        wrapper.reset_workspace_buffer(torch.empty(1), [torch.empty(1)])
    with pytest.raises(TypeError, match=r"^float_workspace_buffer: "):
        wrapper.reset_workspace_buffer(None, [torch.empty(1)] * 2)
