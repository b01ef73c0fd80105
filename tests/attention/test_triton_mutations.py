"""That the tests of the Triton kernels can fail: each planted error makes the comparison with the oracle fail."""

import importlib.util
import inspect
import random

import attention_cases as cases
import attention_paths as paths
import pytest
from attention_cases import FP32, Case
from forests import Forest
from own_process import failure

PATH = next(path for path in paths.ALL if path.backend == "triton" and path.device == "cpu")
pytestmark = pytest.mark.skipif(PATH.missing() is not None, reason=str(PATH.missing()))

# (what goes wrong, the line of triton_tree.py, how often it stands there, what it becomes)
MUTATIONS = [
    (
        "tile border: blocks without a mask run to the end of the chunk",
        "border = tl.minimum(chunk_end, tl.min(tl.where(valid, stop, chunk_end)))",
        1,
        "border = chunk_end",
    ),
    (
        "tile border: the last row of a tile of several is left out",
        "    valid = row < rows_end\n",
        1,
        "    valid = (row < rows_end) & (packed % BLOCK_ROWS != BLOCK_ROWS - 1)\n",
    ),
    (
        "tile border: the causal diagonal one token late",
        "length - own_end + row + 1)",
        1,
        "length - own_end + row + 2)",
    ),
    ("window border: one token early", "position, 0) - window)", 1, "position, 0) - window - 1)"),
    (
        "split border: a chunk begins one token late",
        "    begin = chunk * tokens\n",
        1,
        "    begin = chunk * tokens + tl.where(chunk > 0, 1, 0)\n",
    ),
    (
        "split border: a chunk ends one token late",
        "    end = tl.minimum(begin + tokens, length)\n",
        1,
        "    end = tl.minimum(begin + tokens + 1, length)\n",
    ),
    ("merge: states are not rescaled", "acc = acc * rescale[:, None] + tl.sum(", 1, "acc = acc + tl.sum("),
    ("merge: the last state is left out", "(state < num_states)[None, :]", 1, "(state < num_states - 1)[None, :]"),
    (
        "merge: a node's states lie over its ancestors'",
        "tl.load(path_chunks + node) + chunk",
        1,
        "chunk",
    ),
    ("page lookup: the page of the next token", "pages + token // PAGE_SIZE", 2, "pages + (token + 1) // PAGE_SIZE"),
    ("page lookup: the slot of the next token", "slot = (token % PAGE_SIZE)", 1, "slot = ((token + 1) % PAGE_SIZE)"),
]


def inputs(window: int) -> cases.Inputs:
    """Nodes of several chunks and of several tiles, own rows with a diagonal, a leaf that shares no tile."""
    forest = Forest([-1, 0, 0, 1], [300, 150, 7, 130], [0, 3, 1, 40], page_size=16).place(random.Random(0))
    return cases.make_inputs(Case(heads=(4, 2), head_dim=32, window=window, dtypes=(FP32, FP32), sinks=True), forest)


@pytest.mark.parametrize("what, line, times, planted", MUTATIONS, ids=[m[0] for m in MUTATIONS])
def test_a_planted_error_is_found(what, line, times, planted, monkeypatch, tmp_path):
    from tts_kernels.attention import triton as backend

    source = inspect.getsource(backend.triton_tree)
    assert source.count(line) == times, f"the kernel has changed: {line!r} stands {source.count(line)} times in it"
    # The compiler reads kernels from their file.
    file = tmp_path / "mutated_tree.py"
    file.write_text(source.replace(line, planted))
    spec = importlib.util.spec_from_file_location("mutated_tree", file)
    mutated = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutated)

    window = 40 if "window" in what else -1
    cases.check(inputs(window), PATH)
    monkeypatch.setattr(backend, "triton_tree", mutated)
    assert failure(lambda: cases.check(inputs(window), PATH))
