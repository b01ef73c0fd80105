"""What only a GPU shows: real bfloat16 and fp8 arithmetic at full head sizes, long contexts and many pages, offsets
past 2^31 elements, races, captured graphs over a growing tree, and that a call neither waits nor allocates.

The `reference` backend on the same device is the oracle; that it is right there the other tests show, which run on
every backend and device.
"""

import random

import attention_paths as paths
import pytest
import torch
from attention_cases import BF16, FP8, FP16, FP32
from forests import Forest, random_forest, star

from tts_kernels.attention import append_kv, merge_states, tree_attention
from tts_kernels.tree.plan import TreePlan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DEVICE = "cuda"
KERNELS = [path for path in paths.ALL if path.device == "cuda" and path.backend != "reference"]
if torch.cuda.is_available():
    KERNELS = [path for path in KERNELS if path.missing() is None]


@pytest.fixture(params=KERNELS, ids=str)
def backend(request):
    return request.param.backend


class Call:
    """Random q and caches for a forest on the device. Pages that no node owns hold NaN."""

    def __init__(self, forest: Forest, *, heads=(32, 8), head_dim=128, dtype=BF16, kv_dtype=None, seed=0) -> None:
        self.forest = forest
        self.plan = forest.plan(device=DEVICE)
        generator = torch.Generator(DEVICE).manual_seed(seed)
        self.generator = generator
        self.q = self.randn(forest.num_rows, heads[0], head_dim).to(dtype)
        shape = (forest.num_pages, forest.page_size, heads[1], head_dim)
        kv_dtype = kv_dtype or dtype
        owned = torch.zeros(forest.num_pages, dtype=torch.bool)
        owned[[page for pages in forest.pages for page in pages if page < forest.num_pages]] = True
        unused = (~owned).to(DEVICE)[:, None, None, None]
        self.k_cache, self.v_cache = (self.randn(*shape).masked_fill(unused, torch.nan).to(kv_dtype) for _ in "kv")

    def randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator, device=DEVICE)

    def run(self, backend: str, plan: TreePlan | None = None, **options):
        return tree_attention(
            self.q, self.k_cache, self.v_cache, plan or self.plan, return_lse=True, backend=backend, **options
        )

    def check(self, backend: str, plan: TreePlan | None = None, **options) -> None:
        assert_near(self.run(backend, plan, **options), self.run("reference", plan, **options))


def assert_near(got, expected) -> None:
    """Relative to the length of a row's head: the result is rounded once and the probabilities once, half an epsilon
    each, times two; fp32 sums over thousands of keys are good to some hundred epsilons."""
    (out, lse), (exact, exact_lse) = got, expected
    rounding = torch.finfo(out.dtype).eps if out.dtype != FP32 else 0.0
    allowed = 2 * rounding + 256 * torch.finfo(FP32).eps
    error = (out.float() - exact.float()).norm(dim=-1) / exact.float().norm(dim=-1)
    assert not error.isnan().any()
    assert error.max() <= allowed
    torch.testing.assert_close(lse, exact_lse, rtol=1e-4, atol=2e-3 if out.dtype != FP32 else 1e-4)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("dtypes", [(BF16, None), (FP16, None), (BF16, FP8), (FP16, FP8), (FP32, None)], ids=str)
def test_head_sizes(backend, head_dim, dtypes):
    forest = star(48, prefix=1500, suffix=[1, 70, 333], page_size=16)
    call = Call(forest, heads=(28, 4), head_dim=head_dim, dtype=dtypes[0], kv_dtype=dtypes[1])
    call.check(backend)


@pytest.mark.parametrize("heads", [(32, 8), (28, 4), (40, 8), (64, 8), (16, 1), (32, 32), (128, 1)])
@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_geometries(backend, heads, page_size):

    forest = random_forest(random.Random(5), kind="mixed", page_size=page_size)
    Call(forest, heads=heads).check(backend, softcap=20.0, window=50)


@pytest.mark.parametrize("rows", [1, 5])
def test_long_context_and_thousands_of_pages(backend, rows):
    forest = star(64, prefix=32768, suffix=[1000, 2048], rows=rows, page_size=16)
    call = Call(forest)
    call.check(backend)
    call.check(backend, window=2500)


def test_offsets_past_2_31_elements(backend):
    """The pages in use begin beyond 2^31 elements of the cache, and rows of q beyond 2^31 too."""
    page_elements = 16 * 8 * 128
    first = (1 << 31) // page_elements + 5
    num_pages = first + 40
    k_cache = torch.full((num_pages, 16, 8, 128), torch.nan, dtype=BF16, device=DEVICE)
    v_cache = torch.full_like(k_cache, torch.nan)
    generator = torch.Generator(DEVICE).manual_seed(0)
    for cache in (k_cache, v_cache):
        cache[first:] = torch.randn(40, 16, 8, 128, generator=generator, device=DEVICE).to(BF16)
    pages = list(range(first, num_pages))
    plan = TreePlan.from_nodes([-1, 0, 0], [320, 50, 9], [pages[:20], pages[20:24], pages[24:25]], [0, 1, 1],
                               page_size=16, device=DEVICE)  # fmt: skip
    row = (1 << 31) + 4096
    q = torch.empty(row + 4096, dtype=BF16, device=DEVICE).as_strided((2, 32, 128), (row, 128, 1))
    q.copy_(torch.randn(2, 32, 128, generator=generator, device=DEVICE))
    got, expected = (
        tree_attention(q, k_cache, v_cache, plan, return_lse=True, backend=b) for b in (backend, "reference")
    )
    assert_near(got, expected)
    k = torch.randn(2, 8, 128, generator=generator, device=DEVICE).to(BF16)
    slots = torch.tensor([num_pages * 16 - 1, first * 16], device=DEVICE)
    append_kv(k, -k, k_cache, v_cache, slots, backend=backend)
    assert torch.equal(k_cache.view(-1, 8, 128)[slots], k) and torch.equal(v_cache.view(-1, 8, 128)[slots], -k)


def test_strides_past_2_31_elements(backend):
    """A slot-major cache: the slots of a page lie far apart."""
    num_pages = 140_000
    caches = [torch.zeros(16, num_pages, 8, 128, dtype=BF16, device=DEVICE).transpose(0, 1) for _ in "kv"]
    generator = torch.Generator(DEVICE).manual_seed(0)
    for cache in caches:
        cache[-4:] = torch.randn(4, 16, 8, 128, generator=generator, device=DEVICE).to(BF16)
    pages = list(range(num_pages - 4, num_pages))
    plan = TreePlan.from_nodes([-1], [60], [pages], [1], page_size=16, device=DEVICE)
    q = torch.randn(1, 32, 128, generator=generator, device=DEVICE).to(BF16)
    got, expected = (tree_attention(q, *caches, plan, return_lse=True, backend=b) for b in (backend, "reference"))
    assert_near(got, expected)


def test_merge_of_many_states(backend):
    generator = torch.Generator(DEVICE).manual_seed(0)
    out = torch.randn(40, 300, 160, 128, generator=generator, device=DEVICE).to(BF16)
    lse = torch.randn(40, 300, 160, generator=generator, device=DEVICE) * 5
    lse[torch.rand(lse.shape, generator=generator, device=DEVICE) < 0.3] = -torch.inf
    got, expected = (merge_states(out, lse, backend=b) for b in (backend, "reference"))
    torch.testing.assert_close(got[0].float(), expected[0].float(), rtol=2**-7, atol=1e-3)
    torch.testing.assert_close(got[1], expected[1], rtol=1e-5, atol=1e-4)


def test_the_same_bits_every_time(backend):
    """Races and uninitialised reads show as other bits, sooner or later; scratch is full of NaN before each run."""
    call = Call(star(64, prefix=4000, suffix=[300, 70, 900], page_size=16))
    first = call.run(backend)
    for _ in range(50):
        for work in call.plan.works.values():
            heads, head_dim = call.q.shape[1:]
            work.scratch[: work.num_states * heads * (head_dim + 2)].fill_(torch.nan)  # behind them lie counters
        again = call.run(backend)
        assert torch.equal(again[0], first[0]) and torch.equal(again[1], first[1])


def test_siblings_change_no_bit_in_batch_invariant_mode(backend, monkeypatch):
    monkeypatch.setenv("TTS_KERNELS_BATCH_INVARIANT", "1")
    whole = Call(star(40, prefix=3000, suffix=[300, 70, 900], page_size=16))
    out, lse = whole.run(backend)
    forest = whole.forest
    for leaves in ([1], [3, 17], list(range(1, 30))):
        few = Forest([-1] + [0] * len(leaves), *([of[n] for n in (0, *leaves)] for of in (forest.length, forest.rows)),
                     forest.page_size, [forest.pages[n] for n in (0, *leaves)])  # fmt: skip
        rows = [leaf - 1 for leaf in leaves]
        got = tree_attention(whole.q[rows], whole.k_cache, whole.v_cache, few.plan(device=DEVICE), return_lse=True,
                             backend=backend)  # fmt: skip
        assert torch.equal(got[0], out[rows]) and torch.equal(got[1], lse[rows])


@pytest.mark.parametrize("window", [-1, 300])
def test_siblings_of_a_row_that_meets_masked_blocks_change_no_bit(backend, window, monkeypatch):
    """Whether a block is masked depends on the tile: rows of an inner node beside its leaves' rows, and leaves of
    different lengths under a window."""
    monkeypatch.setenv("TTS_KERNELS_BATCH_INVARIANT", "1")
    leaves = 40
    forest = Forest([-1, 0, *[1] * leaves], [1000, 128, *[10 if i % 2 else 200 for i in range(leaves)]],
                    [0, 2, *[1] * leaves], 16).place(random.Random(0))  # fmt: skip
    whole = Call(forest)
    out, lse = whole.run(backend, window=window)
    for leaf in (2, 3, 31):
        nodes = [0, 1, leaf]
        alone = Forest([-1, 0, 1], [forest.length[n] for n in nodes], [0, 0, 1], 16, [forest.pages[n] for n in nodes])
        row = [leaf]  # after the two of node 1
        got = tree_attention(whole.q[row], whole.k_cache, whole.v_cache, alone.plan(device=DEVICE), window=window,
                             return_lse=True, backend=backend)  # fmt: skip
        assert torch.equal(got[0], out[row]) and torch.equal(got[1], lse[row])


def test_a_call_neither_waits_nor_allocates(backend):
    call = Call(star(16, prefix=1000, suffix=[100], page_size=16))
    out = torch.empty_like(call.q)
    call.run(backend, out=out)  # compiles, and makes the work list
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        tree_attention(call.q, call.k_cache, call.v_cache, call.plan, out=out, backend=backend)
        call.plan.advance_(0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def test_at_most_two_launches(backend):
    call = Call(star(16, prefix=1000, suffix=[100], page_size=16))
    call.run(backend)
    out = torch.empty_like(call.q)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        tree_attention(call.q, call.k_cache, call.v_cache, call.plan, out=out, backend=backend)
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert 1 <= len(kernels) <= 2, kernels


def test_a_captured_graph_follows_a_growing_tree(backend):
    """Captured once, replayed over a tree that grows across page and chunk borders: append, attend, advance."""
    forest = star(24, prefix=700, suffix=[250, 3, 511], page_size=16)
    forest = Forest(forest.parent, [n + 40 * (i > 0) for i, n in enumerate(forest.length)], forest.rows, 16)

    forest.place(random.Random(0))
    call = Call(forest)
    leaves = range(1, 25)
    start = [forest.length[0]] + [forest.length[i] - 40 for i in leaves]
    plan = TreePlan.from_nodes(
        forest.parent, start, forest.pages, forest.rows, page_size=16, device=DEVICE
    )  # pages for 40 more tokens
    k = torch.empty(24, 8, 128, dtype=BF16, device=DEVICE)
    slots = torch.empty(24, dtype=torch.int64, device=DEVICE)
    out = torch.empty_like(call.q)

    def step() -> None:
        append_kv(k, k, call.k_cache, call.v_cache, slots, backend=backend)
        tree_attention(call.q, call.k_cache, call.v_cache, plan, out=out, backend=backend)

    def feed(t: int) -> None:
        k.copy_(call.randn(24, 8, 128))
        slots.copy_(torch.tensor([forest.slots(i)[start[i] - 1 + t] for i in leaves]))

    feed(0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for t in range(41):
        if t:
            plan.advance_()
        feed(t)
        graph.replay()
        exact, _ = call.run("reference", plan)
        error = (out.float() - exact.float()).norm(dim=-1) / exact.float().norm(dim=-1)
        assert error.max() <= 2 * torch.finfo(BF16).eps, f"step {t}"


def test_capture_before_any_call_says_what_to_do(backend):
    call = Call(star(3, prefix=40, suffix=[9], page_size=16))
    call.run(backend)  # compiles
    compiled = torch.compile(tree_attention, fullgraph=True, backend="aot_eager")
    fresh = call.forest.plan(device=DEVICE)
    # Traced before the capture, with a plan that has no work list either.
    compiled(call.q, call.k_cache, call.v_cache, call.forest.plan(device=DEVICE), backend=backend)
    for attend in (compiled, tree_attention):
        with pytest.raises(RuntimeError, match="used once"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            attend(call.q, call.k_cache, call.v_cache, fresh, backend=backend)


def test_shipped_configs_are_the_ones_used():
    """A device or an architecture that has entries in the tables takes them."""
    from tts_kernels import configs
    from tts_kernels.attention.triton import config_of, device_kind

    name, arch = device_kind(torch.device(DEVICE, torch.cuda.current_device()))
    entries = [entry for entry in configs.shipped("tree_attention") if entry["for"] in (name, arch)]
    if not entries:
        pytest.skip(f"no config is shipped for {name}, {arch}")
    q = torch.empty(1, 8, 128, dtype=BF16, device=DEVICE)
    assert config_of(q, q.new_empty(1, 16, 2, 128)).source.startswith("tree_attention")


def test_compiled_on_a_gpu(backend):
    call = Call(star(5, prefix=100, suffix=[9], page_size=16))

    def attend(q, plan):
        return tree_attention(q * 2, call.k_cache, call.v_cache, plan, backend=backend) + 1

    compiled = torch.compile(attend, fullgraph=True)
    eager = attend(call.q, call.plan)
    for plan in (call.plan, call.forest.plan(device=DEVICE)):  # with a work list, and before there is one
        torch.testing.assert_close(compiled(call.q, plan), eager, rtol=2**-7, atol=2**-7)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device or none")
def test_the_device_of_the_tensors_is_used(backend):
    call = Call(star(3, prefix=40, suffix=[9], page_size=16))
    expected = call.run(backend)
    moved = (x.to("cuda:1") for x in (call.q, call.k_cache, call.v_cache))
    got = tree_attention(*moved, call.forest.plan(device="cuda:1"), return_lse=True, backend=backend)
    assert torch.equal(got[0].to("cuda:0"), expected[0])
