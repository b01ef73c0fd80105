"""That the tests of the CUDA kernels can fail: each planted error makes the comparison with the oracle fail."""

from __future__ import annotations

import random

import attention_cases as cases
import attention_paths as paths
import emulated
import pytest
from attention_cases import FP16, Case
from forests import Forest
from own_process import failure

PATH = paths.Path("cuda")
pytestmark = pytest.mark.skipif(PATH.missing() is not None, reason=str(PATH.missing()))

# One size of heads is enough, and compiles in a fifth of the time.
SOURCES = ["csrc/bindings.cpp", "csrc/cuda/*.cu", "csrc/cuda/head_dim/64.cu"]
TILE, STREAM, WALK, ITEM, MERGE = (f"csrc/cuda/tree_{name}.cuh" for name in ("tile", "stream", "walk", "item", "merge"))

# Of warpgroups: heads of two panels.
WARPGROUPS = paths.WARPGROUPS[0]
HOPPER_SOURCES = [*SOURCES[:2], "csrc/cuda/*/128.cu"]
COPY, HOPPER, DEVICE = (f"csrc/cuda/{name}.cuh" for name in ("tree_hopper_copy", "tree_hopper", "device_hopper"))

# (what goes wrong, the file, what stands there, what it becomes)
PLANTED = [
    ("barrier: none before a block of KV is read", STREAM, "<2>();\n    sync_block();", "<2>();"),
    ("barrier: none between the largest scores and their use", TILE, "if (kMembers > 1) sync_members();", ""),
    (
        "barrier: none between the weights and their use",
        TILE,
        "      sync_members();\n    }\n    if constexpr",
        "    }\n    if constexpr",
    ),
    ("barrier: none between the states and the fence", MERGE, "if (!Crew::sync_any(waits)) return;", ""),
    ("barrier: none between the counter and the merge", MERGE, "  }\n  Crew::sync();\n  for", "  }\n  for"),
    ("barrier: one that not all warps reach", MERGE, "if (!Crew::sync_any(waits))", "if (!any_in_warp(waits))"),
    ("copies: not waited for", STREAM, "copy_async_wait<2>()", "copy_async_wait<3>()"),
    ("fence: none before the counter", MERGE, "      fence();\n      last", "      last"),
    ("counter: one too few", MERGE, "rows.arrivals[place] - 1)", "max(rows.arrivals[place] - 2, 1))"),
    ("counter: one too many", MERGE, "rows.arrivals[place] - 1)", "rows.arrivals[place])"),
    ("counter: that of another head", MERGE, "row) * c.num_heads + head_of(place)", "row) * c.num_heads"),
    ("index: the slot of the next token", STREAM, "slot = at - in_pages", "slot = at + 1 - in_pages"),
    ("index: pages of the node above", WALK, "c.pages + c.page_begin(node)", "c.pages"),
    ("index: pieces of a row in one place", ITEM, "(chunk ^ (row & 7))", "(chunk | (row & 7))"),
    ("index: fragments as they lie, not transposed", TILE, "load_matrix_x4_transposed(b", "load_matrix_x4(b"),
    ("index: a state of the node above", WALK, "p_.path_chunks[node] + chunk;", "chunk;"),
    ("border: the diagonal one token late", WALK, "length - own_end + 1", "length - own_end + 2"),
    ("border: the window one token early", WALK, "0) - c.window)", "0) - c.window - 1)"),
    ("border: the last token of a block is hidden", TILE, "token >= stop", "token >= stop - 1"),
    ("softmax: what was summed before does not shrink", TILE, "sum_[0] *= rescale[0],", ""),
    ("merge: the last state is left out", MERGE, "i < min(count - begin, 32)", "i < min(count - begin, 32) - 4"),
]

PLANTED_HOPPER = [
    (
        "fence: none before products of what threads copied",
        COPY,
        "    fence_async();\n    barrier_arrive",
        "    barrier_arrive",
    ),
    (
        "fence: none behind the barriers' making",
        HOPPER,
        "    fence_async();\n  }\n  sync_block();",
        "  }\n  sync_block();",
    ),
    ("fence: none before products with new registers", HOPPER, "    wgmma_fence(out, weight);\n", ""),
    ("copies: not waited for", COPY, "        copy_async_wait<0>();\n        tell();", "        tell();"),
    ("products: not waited for", HOPPER, "wgmma_wait<0>(out, weight);", "wgmma_wait<1>(out, weight);"),
    (
        "places: filled before they are empty",
        COPY,
        "barrier_wait(Layout::empty(memory_, turn_.stage), turn_.parity ^ 1);",
        "",
    ),
    ("places: read before they are full", HOPPER, "stage), turn_.parity); }", "stage), turn_.parity ^ 1); }"),
    (
        "places: one that is not given back",
        HOPPER,
        "if (lane_index() == 0) barrier",
        "if (lane_index() == 0 && turn_.stage != 1) barrier",
    ),
    ("places: items overwritten", WALK, "(place_ + 1) % kMaxStages", "(place_ + 1) % 2"),
    (
        "bytes: half of those that come are expected",
        COPY,
        "full, p_.box_tokens * kPanelBytes",
        "full, p_.box_tokens * kPanelBytes / 2",
    ),
    (
        "barrier: one that not all threads reach",
        COPY,
        "Multiplying = Crew<0, kTreeThreads, 1>",
        "Multiplying = Crew<0, kHopperThreads, 1>",
    ),
    ("index: pieces where no box would put them", DEVICE, "piece ^ (row & 7)", "piece ^ (row & 3)"),
    ("index: the next eight rows", DEVICE, "8 * kPanelBytes >> 4", "4 * kPanelBytes >> 4"),
    ("index: the next panel, of keys", HOPPER, "step / 4 * Layout::kPanel", "step / 4 * Layout::kPanel / 2"),
    ("index: the next panel, of values", HOPPER, "kPanelBytes, Layout::kPanel)", "kPanelBytes, Layout::kHalf)"),
    ("index: boxes of the first KV head", COPY, "64 * panel, int(walk_.kv_head())", "64 * panel, 0"),
    ("index: boxes of tokens that nobody sees", COPY, "p_.box_tokens > 0 && walk_.all_seen()", "p_.box_tokens > 0"),
    ("sums: two lanes' of four", TILE, "      sum += shuffle_xor(sum, 2);\n", ""),
]


def inputs(window: int, page_size: int, head_dim: int) -> cases.Inputs:
    """Tiles of each size, chunks of several blocks and of a part of one, own rows with a diagonal."""
    forest = Forest([-1, 0, 0, 1], [1100, 150, 7, 130], [0, 40, 1, 40], page_size).place(random.Random(0))
    case = Case(heads=(4, 2), window=window, dtypes=(FP16, FP16), sinks=True, head_dim=head_dim, page_size=page_size)
    return cases.make_inputs(case, forest)


def compare(native, monkeypatch, path: paths.Path) -> None:
    """Fresh plans, so that no earlier call has left the right states."""
    path.select(monkeypatch)
    monkeypatch.setattr("tts_kernels.attention.cuda.native", native)
    for seed in range(1, 5):
        native.cuda_emulation_seed(seed, 2, 20_000_000)  # garbage makes loops without end
        window, page_size = -1 if seed % 2 else 170, 7 if seed in (2, 3) else 16  # that boxes fit
        cases.check(inputs(window, page_size, 128 if path.warpgroups else 64), path)


@pytest.mark.parametrize("path", [PATH, WARPGROUPS], ids=str)
def test_without_an_error_all_is_well(path, monkeypatch):
    assert failure(lambda: compare(emulated.native(), monkeypatch, path)) is None


@pytest.mark.parametrize("what, file, line, planted", PLANTED, ids=[what for what, *_ in PLANTED])
def test_a_planted_error_is_found(what, file, line, planted, monkeypatch):
    native = emulated.edited({file: [(line, planted)]}, SOURCES)
    found = failure(lambda: compare(native, monkeypatch, PATH))
    assert found
    print(found)


@pytest.mark.parametrize("what, file, line, planted", PLANTED_HOPPER, ids=[what for what, *_ in PLANTED_HOPPER])
def test_a_planted_error_of_warpgroups_is_found(what, file, line, planted, monkeypatch):
    native = emulated.edited({file: [(line, planted)]}, HOPPER_SOURCES)
    found = failure(lambda: compare(native, monkeypatch, WARPGROUPS))
    assert found
    print(found)
