"""Packing against a naive trie: the set of all prefixes of all sequences. A packed token is known by the tokens on its
path, so each test first reads these paths back from the nodes."""

import array
import random
from itertools import pairwise

import numpy as np
import pytest
import torch
from dense import assert_close, dense_attention
from forests import empty_caches, write
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_oracle import check_tables, rows_of

import tts_kernels as tts
from tts_kernels import pack, pack_many
from tts_kernels.tree import pack as tree_pack

# Few ids and short lists, so that equal lists, prefixes of one another and empty ones are common. The ids differ in
# their low and in their high bytes.
TOKENS = st.lists(st.sampled_from([0, 1, 256, 2**31 - 1]), max_size=6)


@st.composite
def questions(draw):
    """prompts, candidates and step_ends of pack_many. Some prompts are equal or begin with another one, and a prompt
    may begin with another one and its candidate."""
    prompts, candidates, step_ends = [], [], []
    for _ in range(draw(st.integers(0, 3))):
        prompts.append(draw(TOKENS) if not prompts or draw(st.booleans()) else draw(st.sampled_from(prompts)))
        if draw(st.booleans()):
            prompts[-1] = prompts[-1] + draw(TOKENS)
        of_one = draw(st.lists(TOKENS, max_size=5))
        if of_one and draw(st.booleans()):
            of_one.append(draw(st.sampled_from(of_one)) + draw(TOKENS))
        candidates.append(of_one)
        step_ends.append([sorted(draw(st.sets(st.sampled_from(range(len(c)))))) if c else [] for c in of_one])
    return prompts, candidates, step_ends


def sequences(prompts, candidates):
    return [tuple(p + c) for p, group in zip(prompts, candidates) for c in group]


def distinct_prefixes(lists):
    return {tokens[: i + 1] for tokens in lists for i in range(len(tokens))}


def paths_of(packed):
    """The tokens from the root to each packed token, itself included."""
    ends, paths, row = [], [], 0
    for parent, length in zip(packed.parent, packed.length):
        path = ends[parent] if parent >= 0 else ()
        for token in packed.tokens[row : row + length].tolist():
            path += (token,)
            paths.append(path)
        ends.append(path)
        row += length
    assert row == len(packed.tokens)
    return paths


def steps_of(packed):
    rows = packed.step_rows.tolist()
    return [rows[begin:end] for begin, end in pairwise(packed.offsets.tolist())]


def check_packed(packed, prompts, candidates, step_ends):
    lists = sequences(prompts, candidates)
    paths = paths_of(packed)
    assert len(set(paths)) == len(paths) and set(paths) == distinct_prefixes(lists)
    assert packed.positions.tolist() == [len(path) - 1 for path in paths]

    starts = [prompt for prompt, group in zip(prompts, candidates) for _ in group]
    ends = [e for group in step_ends for e in group]
    want = [[tokens[: len(prompt) + end + 1] for end in of_one] for tokens, prompt, of_one in zip(lists, starts, ends)]
    assert [[paths[row] for row in rows] for rows in steps_of(packed)] == want
    assert len(packed.offsets) == len(lists) + 1 and packed.offsets[0] == 0
    assert packed.group_offsets.tolist() == [sum(map(len, candidates[:g])) for g in range(len(prompts) + 1)]
    for tensor in (packed.tokens, packed.positions, packed.step_rows, packed.offsets, packed.group_offsets):
        assert tensor.dtype == torch.int64 and tensor.is_contiguous()

    # As few nodes as can be: none empty, and none that one child only would continue.
    assert all(type(n) is int for n in packed.parent + packed.length) and 0 not in packed.length
    assert all(packed.parent.count(node) != 1 for node in range(len(packed.parent)))


@settings(max_examples=300, deadline=None)
@given(questions())
def test_every_distinct_token_stands_once_and_every_step_is_found(question):
    prompts, candidates, step_ends = question
    check_packed(pack_many(prompts, candidates, step_ends=step_ends), *question)
    last = [[[len(c) - 1] if c else [] for c in group] for group in candidates]
    check_packed(pack_many(prompts, candidates), prompts, candidates, last)
    for prompt, group, ends in zip(*question):
        check_packed(pack(group, prompt=prompt, step_ends=ends), [prompt], [group], [ends])


@settings(max_examples=100, deadline=None)
@given(questions(), st.sampled_from([1, 2, 3, 16, 2**30]), st.booleans(), st.randoms(use_true_random=False))
def test_the_plan_shows_each_token_its_own_path(question, page_size, consecutive, rng):
    packed = pack_many(*question[:2])
    need = packed.num_pages(page_size)
    if consecutive:
        plan, slots = packed.plan(page_size, first_page=7)
        assert sorted(plan.pages.tolist()) == list(range(7, 7 + need))
    else:
        pages = rng.sample(range(1000), need + 2)
        plan, slots = packed.plan(page_size, pages=pages)
        assert plan.pages.tolist() == pages[:need]
    check_tables(plan)
    paths = paths_of(packed)
    assert slots.dtype == torch.int64 and plan.num_rows == plan.num_tokens == len(paths)
    slot = dict(zip(paths, slots.tolist()))
    assert len(set(slot.values())) == len(paths)
    want = [(len(path) - 1, [divmod(slot[path[: i + 1]], page_size) for i in range(len(path))]) for path in paths]
    assert rows_of(plan) == want


@settings(max_examples=60, deadline=None)
@given(questions(), st.integers(1, 5))
def test_a_kv_tree_takes_the_nodes_as_they_are(question, page_size):
    packed = pack_many(*question[:2])
    tree = tts.KVTree(1, 100, page_size, 1, 1, dtype=torch.float32, device="cpu")
    nodes = []
    for parent, length in zip(packed.parent, packed.length):
        nodes.append(tree.add(nodes[parent] if parent >= 0 else None, length))
    rows = dict(zip(nodes, packed.length))
    plan, slots = packed.plan(page_size)
    assert torch.equal(tree.slots(rows), slots)
    assert rows_of(tree.plan(rows)) == rows_of(plan)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_attention_over_the_pack_is_that_of_each_candidate_alone(backend):
    reasons = tts.unsupported_reasons("tree_attention", backend)
    if reasons:
        pytest.skip("; ".join(reasons))
    prompts = [[5, 1, 2, 3], [5, 1, 9]]  # share two tokens
    candidates = [[[7, 7, 7, 7, 7], [7, 7, 8, 8], [7, 7, 8, 9, 9, 9], [7, 7], [], [6]], [[7, 7, 7], [7, 7, 7]]]
    packed = pack_many(prompts, candidates)
    page_size, heads, kv_heads, head_dim = 2, 4, 2, 16
    tokens = len(packed.tokens)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(tokens, heads, head_dim, generator=generator)
    k, v = torch.randn(2, tokens, kv_heads, head_dim, generator=generator)

    num_pages = packed.num_pages(page_size) + 3
    plan, slots = packed.plan(page_size, pages=random.Random(0).sample(range(num_pages), num_pages))
    caches = empty_caches(num_pages, page_size, kv_heads, head_dim, torch.float32, "NHD")
    for cache, new in zip(caches, (k, v)):
        write(cache, slots.tolist(), new)
    out = tts.tree_attention(q, *caches, plan, backend=backend)

    row_of = {path: row for row, path in enumerate(paths_of(packed))}
    for sequence in sequences(prompts, candidates):
        rows = torch.tensor([row_of[sequence[: i + 1]] for i in range(len(sequence))])
        alone = [
            dense_attention(
                q[rows], k[rows], v[rows], torch.ones(len(rows), len(rows), dtype=torch.bool).tril(), dtype=dtype,
                scale=head_dim**-0.5, softcap=0.0, sinks=None, k_scale=None, v_scale=None,
            )[0]
            for dtype in (torch.float32, torch.float64)
        ]  # fmt: skip
        assert_close(str(sequence), out[rows], *alone, terms=head_dim + len(rows))


def test_three_levels():
    packed = pack([[1, 2, 3], [1, 2, 4, 5], [6], [1, 2, 3, 7], [1, 8], [6]], prompt=[9, 9])
    #          9 9 | 1 | 2 | 3 7 | 4 5 | 8 | 6: siblings by their first candidates that no other one continues
    assert packed.parent == [-1, 0, 1, 2, 2, 1, 0]
    assert packed.length == [2, 1, 1, 2, 2, 1, 1]
    assert packed.tokens.tolist() == [9, 9, 1, 2, 4, 5, 3, 7, 8, 6]
    assert packed.positions.tolist() == [0, 1, 2, 3, 4, 5, 4, 5, 3, 2]
    assert packed.step_rows.tolist() == [6, 5, 9, 7, 8, 9]
    assert packed.offsets.tolist() == list(range(7)) and packed.group_offsets.tolist() == [0, 6]


@pytest.mark.parametrize(
    "candidates, prompt, parent, length, step_rows, offsets",
    [
        ([], [1, 2], [], [], [], [0]),
        ([[]], [], [], [], [], [0, 0]),
        ([[]], [1, 2], [-1], [2], [], [0, 0]),
        ([[3]], [], [-1], [1], [0], [0, 1]),
        ([[3, 4]] * 3, [1, 2], [-1], [4], [3, 3, 3], [0, 1, 2, 3]),
        ([[1, 2, 3], [1], [1, 2], []], [], [-1], [3], [2, 0, 1], [0, 1, 2, 3, 3]),
        ([[1], [2]], [], [-1, -1], [1, 1], [0, 1], [0, 1, 2]),
    ],
)
def test_the_smallest_packs(candidates, prompt, parent, length, step_rows, offsets):
    packed = pack(candidates, prompt=prompt)
    assert (packed.parent, packed.length) == (parent, length)
    assert packed.step_rows.tolist() == step_rows and packed.offsets.tolist() == offsets
    plan, slots = packed.plan(4)
    assert plan.num_nodes == len(parent) and len(slots) == sum(length)


def test_questions_share_a_template_and_one_prompt_may_go_on_as_another():
    packed = pack_many([[1, 2, 3], [1, 2, 4], [1, 2]], [[[5], [6]], [[5]], [[3, 5, 7]]])
    #         1 2 | 3 | 6 | 5 7 | 4 5
    assert packed.parent == [-1, 0, 1, 1, 0] and packed.length == [2, 1, 1, 2, 2]
    assert packed.tokens.tolist() == [1, 2, 3, 6, 5, 7, 4, 5]
    paths = paths_of(packed)
    assert [paths[row] for row in packed.step_rows] == [(1, 2, 3, 5), (1, 2, 3, 6), (1, 2, 4, 5), (1, 2, 3, 5, 7)]
    assert packed.group_offsets.tolist() == [0, 2, 3, 4]


def test_a_comb_of_thousands_of_candidates():
    """Each token of the first one is where one branches off and one ends: deeper than Python's stack."""
    n = 3000
    spine = [1] * n
    packed = pack([spine, *(spine[:i] + [2] for i in range(n)), *(spine[:i] for i in range(n))])
    assert len(packed.tokens) == 2 * n and packed.length == [1] * (2 * n)
    rows = packed.step_rows.tolist()
    tokens, positions = packed.tokens.tolist(), packed.positions.tolist()
    assert [tokens[r] for r in rows] == [1] + [2] * n + [1] * (n - 1)
    assert [positions[r] for r in rows] == [n - 1, *range(n), *range(n - 1)]


@pytest.mark.parametrize("native", [True, False])
def test_token_lists_may_be_arrays_and_tensors(monkeypatch, native):
    if not native:
        monkeypatch.setattr(tree_pack, "native", None)
    elif tree_pack.native is None:
        pytest.skip("tts_kernels._C is not built")
    ids = [3, 1, 2**31 - 1, 0]
    want = pack([ids, ids[:2]], prompt=ids, step_ends=[[0, 3], [1]])
    wide = torch.tensor([ids, ids]).T.contiguous().T  # rows with a stride
    kinds = {
        "tuple": tuple,
        "int64": torch.tensor,
        "int32": lambda x: torch.tensor(x, dtype=torch.int32),
        "strided": lambda x: wide[0, : len(x)],
        "numpy": np.array,
        "array": lambda x: array.array("q", x),
        "numpy's ints": lambda x: [np.int64(t) for t in x],
    }
    for name, kind in kinds.items():
        got = pack([kind(ids), kind(ids[:2])], prompt=kind(ids), step_ends=[np.array([0, 3]), torch.tensor([1])])
        assert torch.equal(got.tokens, want.tokens) and torch.equal(got.step_rows, want.step_rows), name
        assert got.length == want.length, name
    batch = pack(torch.tensor([ids, ids]))
    assert batch.tokens.tolist() == ids


@settings(max_examples=100, deadline=None)
@given(questions())
@pytest.mark.skipif(tree_pack.native is None, reason="tts_kernels._C is not built")
def test_without_the_native_module_the_pack_is_the_same(question):
    fast = pack_many(*question[:2], step_ends=question[2])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tree_pack, "native", None)
        slow = pack_many(*question[:2], step_ends=question[2])
    assert (fast.parent, fast.length) == (slow.parent, slow.length)
    for name in ("tokens", "positions", "step_rows", "offsets", "group_offsets"):
        assert torch.equal(getattr(fast, name), getattr(slow, name))


def test_tensors_made_in_inference_mode_can_be_written_outside():
    with torch.inference_mode():
        packed = pack([[1, 2], [1, 3]])
        plan, slots = packed.plan(4)
    for tensor in (packed.tokens, packed.positions, packed.step_rows, packed.offsets, plan.nodes, slots):
        tensor.add_(0)


def test_everything_is_on_the_device_that_was_asked_for():
    packed = pack([[1, 2], [1, 3]], device="meta")
    plan, slots = packed.plan(4)
    tensors = (packed.tokens, packed.positions, packed.step_rows, packed.offsets, packed.group_offsets, slots)
    assert {tensor.device.type for tensor in tensors} == {plan.device.type} == {"meta"}
    assert (len(packed.tokens), len(slots), plan.num_rows) == (3, 3, 3)


GOOD = {"candidates": [[1, 2, 3], [1, 4]], "prompt": [9], "step_ends": [[0, 2], [1]]}


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize(
    "bad, error, message",
    [
        ({"candidates": 5}, TypeError, r"candidates: expected a list of token lists, got 5"),
        ({"candidates": "ab"}, TypeError, r"candidates: expected a list of token lists, got 'ab'"),
        ({"candidates": [1, 2]}, TypeError, r"candidates\[0\]: expected a list of ints, got 1"),
        ({"candidates": [[1, 2, 3], None]}, TypeError, r"candidates\[1\]: expected a list of ints, got None"),
        ({"candidates": [[1, 2, 3], "ab"]}, TypeError, r"candidates\[1\]: expected a list of ints, got 'ab'"),
        ({"candidates": [[1, 2, 3], [1, -4]]}, ValueError, r"candidates\[1\]\[1\]: expected a token id in .* got -4"),
        ({"candidates": [[1, 2**31, 3], [1, 4]]}, ValueError, r"candidates\[0\]\[1\]: .* got 2147483648"),
        ({"candidates": [[1, 2, 3], [2**70, 4]]}, ValueError, r"candidates\[1\]\[0\]: expected a token id"),
        ({"candidates": [[1, 2.0, 3], [1, 4]]}, TypeError, r"candidates\[0\]\[1\]: expected an int, got 2.0"),
        ({"candidates": [[1, 2, 3], [True, 4]]}, TypeError, r"candidates\[1\]\[0\]: expected an int, got True"),
        ({"candidates": torch.tensor([[1, 2, -3], [1, 4, 4]])}, ValueError, r"candidates\[0\]\[2\]: .* got -3"),
        ({"candidates": torch.tensor([[1, 2, 2**31], [1, 4, 4]])}, ValueError, r"candidates\[0\]\[2\]: .* got 21"),
        ({"candidates": torch.ones(2, 3)}, TypeError, r"candidates\[0\]\[0\]: expected an int, got 1.0"),
        ({"candidates": torch.ones(2, 3, 1).long()}, TypeError, r"candidates\[0\]\[0\]: expected an int, got \[1\]"),
        ({"candidates": torch.ones(2, 3).bool()}, TypeError, r"candidates\[0\]\[0\]: expected an int, got True"),
        ({"prompt": None}, TypeError, r"prompt: expected a list of ints, got None"),
        ({"prompt": [9, -1]}, ValueError, r"prompt\[1\]: expected a token id in \[0, 2147483647\], got -1"),
        ({"step_ends": 3}, TypeError, r"step_ends: expected a list of index lists, got 3"),
        ({"step_ends": [[0]]}, ValueError, r"step_ends: expected 2 entries, as many as candidates, got 1"),
        ({"step_ends": [[0], 1]}, TypeError, r"step_ends\[1\]: expected a list of ints, got 1"),
        ({"step_ends": [[0, 1.0], [1]]}, TypeError, r"step_ends\[0\]\[1\]: expected an int, got 1.0"),
        ({"step_ends": [[0, 3], [1]]}, ValueError, r"step_ends\[0\]\[1\]: expected the index .* 3 tokens, got 3"),
        ({"step_ends": [[0, 2], [-1]]}, ValueError, r"step_ends\[1\]\[0\]: expected the index .* 2 tokens, got -1"),
        ({"step_ends": [[0, 5, 1], [1]]}, ValueError, r"step_ends\[0\]\[1\]: expected the index .* got 5"),
        ({"step_ends": [[2, 1], [1]]}, ValueError, r"step_ends\[0\]\[1\]: expected more than .* before, 2, got 1"),
        ({"step_ends": [[0, 0], [1]]}, ValueError, r"step_ends\[0\]\[1\]: expected more than .* before, 0, got 0"),
    ],
)  # fmt: skip
def test_pack_refuses(monkeypatch, native, bad, error, message):
    if not native:
        monkeypatch.setattr(tree_pack, "native", None)
    pack(**GOOD)
    with pytest.raises(error, match="^" + message):
        pack(**(GOOD | bad))


MANY = {"prompts": [[1], [2]], "candidates": [[[3], [4, 5]], [[6]]], "step_ends": [[[0], [1]], None]}


@pytest.mark.parametrize(
    "bad, error, message",
    [
        ({"prompts": 1}, TypeError, r"prompts: expected a list of token lists, got 1"),
        ({"prompts": [1, 2]}, TypeError, r"prompts\[0\]: expected a list of ints, got 1"),
        ({"prompts": [[1], [-2]]}, ValueError, r"prompts\[1\]\[0\]: expected a token id"),
        ({"candidates": [[[3]]]}, ValueError, r"candidates: expected 2 entries, as many as prompts, got 1"),
        ({"candidates": None}, TypeError, r"candidates: expected a list, by question"),
        ({"candidates": [[[3], [4, 5]], 6]}, TypeError, r"candidates\[1\]: expected a list of token lists, got 6"),
        ({"candidates": [[[3], [4, -5]], [[6]]]}, ValueError, r"candidates\[0\]\[1\]\[1\]: expected a token id"),
        ({"step_ends": [None]}, ValueError, r"step_ends: expected 2 entries, as many as prompts, got 1"),
        ({"step_ends": [None, [[0], [0]]]}, ValueError, r"step_ends\[1\]: expected 1 entries, as many as cand"),
        ({"step_ends": [[[0], [2]], None]}, ValueError, r"step_ends\[0\]\[1\]\[0\]: expected the index"),
    ],
)  # fmt: skip
def test_pack_many_refuses(bad, error, message):
    pack_many(**MANY)
    with pytest.raises(error, match="^" + message):
        pack_many(**(MANY | bad))


@pytest.mark.parametrize(
    "bad, error, message",
    [
        ({"page_size": 0}, ValueError, r"page_size: expected at least 1, got 0"),
        ({"page_size": 2.0}, TypeError, r"page_size: expected an int"),
        ({"first_page": -1}, ValueError, r"first_page: expected at least 0, got -1"),
        ({"first_page": 1.0}, TypeError, r"first_page: expected an int"),
        ({"first_page": 2**31 - 3}, ValueError, r"first_page: expected at most 2147483644 where 4 pages are needed"),
        ({"first_page": 1, "pages": [0, 1, 2, 3]}, ValueError, r"first_page: expected 0 where pages are given, got 1"),
        ({"pages": [0, 1, 2]}, ValueError, r"pages: expected at least 4 page ids, got 3"),
        ({"pages": [0, 1, -2, 3]}, ValueError, r"pages\[2\]: expected a page id in .* got -2"),
        ({"pages": [0, 1, 2, 2**31]}, ValueError, r"pages\[3\]: expected a page id"),
        ({"pages": [0, 1, 2, 1]}, ValueError, r"pages\[3\]: expected each page id once, got 1"),
        ({"pages": 4}, TypeError, r"pages: expected a list of ints, got 4"),
    ],
)  # fmt: skip
def test_plan_refuses(bad, error, message):
    packed = pack([[1, 2, 3], [1, 4]])  # 1 | 2 3 | 4
    good = {"page_size": 1}
    plan, _ = packed.plan(**good)
    assert plan.num_tokens == 4 and packed.plan(1, first_page=2**31 - 4)[0].max_page == 2**31 - 1
    with pytest.raises(error, match="^" + message):
        packed.plan(**(good | bad))
