"""That the tests of the CUDA kernels can fail: each planted error makes the comparison with the oracle fail."""

from __future__ import annotations

import faulthandler
import os
import random

import attention_cases as cases
import attention_paths as paths
import emulated
import pytest
from attention_cases import FP16, Case
from forests import Forest

PATH = paths.Path("cuda")
pytestmark = pytest.mark.skipif(PATH.missing() is not None, reason=str(PATH.missing()))

# One size of heads is enough, and compiles in a fifth of the time.
SOURCES = ["csrc/bindings.cpp", "csrc/cuda/*.cu", "csrc/cuda/head_dim/64.cu"]
TILE, STREAM, ITEM, MERGE = (f"csrc/cuda/tree_{name}.cuh" for name in ("tile", "stream", "item", "merge"))

# (what goes wrong, the file, what stands there, what it becomes)
PLANTED = [
    ("barrier: none before a block of KV is read", STREAM, "<2>();\n    sync_block();", "<2>();"),
    ("barrier: none between the largest scores and their use", TILE, "if (kMembers > 1) sync_members();", ""),
    (
        "barrier: none between the weights and their use",
        TILE,
        "      sync_members();\n    }\n    multiply",
        "    }\n    multiply",
    ),
    ("barrier: none between the states and the fence", MERGE, "if (!sync_block_any(waits)) return;", ""),
    ("barrier: none between the counter and the merge", MERGE, "  }\n  sync_block();\n  for", "  }\n  for"),
    ("barrier: one that not all warps reach", MERGE, "if (!sync_block_any(waits))", "if (!any_in_warp(waits))"),
    ("copies: not waited for", STREAM, "copy_async_wait<2>()", "copy_async_wait<3>()"),
    ("fence: none before the counter", MERGE, "      fence();\n      last", "      last"),
    ("counter: one too few", MERGE, "rows.arrivals[place] - 1)", "max(rows.arrivals[place] - 2, 1))"),
    ("counter: one too many", MERGE, "rows.arrivals[place] - 1)", "rows.arrivals[place])"),
    ("counter: that of another head", MERGE, "row) * c.num_heads + head_of(place)", "row) * c.num_heads"),
    ("index: the slot of the next token", STREAM, "slot = at - in_pages", "slot = at + 1 - in_pages"),
    ("index: pages of the node above", STREAM, "c.pages + c.page_begin(node)", "c.pages"),
    ("index: pieces of a row in one place", ITEM, "(chunk ^ (row & 7))", "(chunk | (row & 7))"),
    ("index: fragments as they lie, not transposed", TILE, "load_matrix_x4_transposed(b", "load_matrix_x4(b"),
    ("index: a state of the node above", STREAM, "p_.path_chunks[node] + chunk;", "chunk;"),
    ("border: the diagonal one token late", STREAM, "length - own_end + 1", "length - own_end + 2"),
    ("border: the window one token early", STREAM, "0) - c.window)", "0) - c.window - 1)"),
    ("border: the last token of a block is hidden", TILE, "token >= stop", "token >= stop - 1"),
    ("softmax: what was summed before does not shrink", TILE, "sum_[0] *= rescale[0],", ""),
    ("merge: the last state is left out", MERGE, "i < min(count - begin, 32)", "i < min(count - begin, 32) - 4"),
]


def inputs(window: int) -> cases.Inputs:
    """Tiles of each size, chunks of several blocks and of a part of one, own rows with a diagonal."""
    forest = Forest([-1, 0, 0, 1], [1100, 150, 7, 130], [0, 40, 1, 40], page_size=16).place(random.Random(0))
    return cases.make_inputs(Case(heads=(4, 2), window=window, dtypes=(FP16, FP16), sinks=True), forest)


def compare(native, monkeypatch) -> None:
    """Fresh plans, so that no earlier call has left the right states."""
    PATH.select(monkeypatch)
    monkeypatch.setattr("tts_kernels.attention.cuda.native", native)
    for seed in range(1, 5):
        native.cuda_emulation_seed(seed, 2, 20_000_000)  # garbage makes loops without end
        cases.check(inputs(-1 if seed % 2 else 170), PATH)


def failure(native, monkeypatch) -> str | None:
    """What `compare` finds, in a process of its own: a kernel with an error may write anywhere."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        found = b""
        try:
            with cases.one_thread():  # those of the parent are not here
                compare(native, monkeypatch)
        except (AssertionError, RuntimeError) as error:
            found = str(error).encode()
        finally:
            os.write(writing, found[:1000])
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        found = pipe.read().decode(errors="replace")
    _, status = os.waitpid(child, 0)
    return found or (f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else None)


def test_without_an_error_all_is_well(monkeypatch):
    assert failure(emulated.native(), monkeypatch) is None


@pytest.mark.parametrize("what, file, line, planted", PLANTED, ids=[what for what, *_ in PLANTED])
def test_a_planted_error_is_found(what, file, line, planted, monkeypatch):
    native = emulated.edited({file: [(line, planted)]}, SOURCES)
    found = failure(native, monkeypatch)
    assert found
    print(found)
