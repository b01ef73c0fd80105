"""Packing token lists that share prefixes into one forward in which every distinct token stands once."""

from __future__ import annotations

import ctypes
import operator
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice, pairwise
from typing import Any, NamedTuple

import torch

from tts_kernels.tree.checks import INT32_MAX, check_device, check_int, check_options, fail, int_list
from tts_kernels.tree.plan import TreePlan, int_tensor, preorder
from tts_kernels.tree.prefix import Run, common_pages, shared_runs

try:
    from tts_kernels import _C as native
except ImportError:  # not built: the same in Python, slower
    native = None

Ints = Sequence[int] | torch.Tensor
ITEM = 8  # bytes of a token: an int64


@dataclass(frozen=True, eq=False)
class PackedTree:
    """Candidates as a forest of nodes: a node is a longest run of tokens that the same candidates contain, and stands
    once. Build it with `pack` or `pack_many`.

    The nodes lie in depth-first preorder, the packed tokens node by node. T tokens, N candidates, M steps, G questions:

    tokens         [T] int64 token ids
    positions      [T] int64 position of each token in its prompt and candidate, from 0
    parent         [num_nodes] ints, index of each node's parent, -1 for a root; a parent stands before its children
    length         [num_nodes] ints, tokens of each node, at least 1; their sum is T
    step_rows      [M] int64 the packed token that each step is read from, candidate by candidate
    offsets        [N + 1] int64 candidate i has the steps step_rows[offsets[i]:offsets[i + 1]]
    group_offsets  [G + 1] int64 question g has the candidates group_offsets[g]:group_offsets[g + 1]

    The tensors are on one device. `step_scores(hidden, step_rows, head, offsets=offsets)` reads them as they are, where
    `hidden` [T, d] is what a forward over `tokens` at `positions` gave.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    parent: list[int]
    length: list[int]
    step_rows: torch.Tensor
    offsets: torch.Tensor
    group_offsets: torch.Tensor

    def num_pages(self, page_size: int) -> int:
        """Pages that `plan` takes: every node begins on a page of its own."""
        check_options(page_size, True)
        return sum(-(-tokens // page_size) for tokens in self.length)

    def plan(self, page_size: int, *, first_page: int = 0, pages: Ints | None = None) -> tuple[TreePlan, torch.Tensor]:
        """The plan of one causal forward over all T tokens, and their slots for `append_kv`: [T] int64. Row r of q is
        token r; it sees the tokens of its own prompt and candidate up to itself.

        page_size   tokens per page
        first_page  the pages are the num_pages(page_size) ones from this id on
        pages       or they are the first num_pages(page_size) of these ids, which differ from one another

        The plan and the slots are on the device of `tokens`. To hold the KV in a KVTree instead, `add` a node of
        length[i] tokens for each i under that of parent[i], and take plan and slots of {node: its length}.
        Raises TypeError for what is not of these types and ValueError for a wrong value.
        """
        need = self.num_pages(page_size)
        if pages is None:
            first_page = check_int("first_page", first_page, 0)
            if first_page + need > INT32_MAX + 1:
                fail("first_page", f"at most {INT32_MAX + 1 - need} where {need} pages are needed", first_page)
            ids = list(range(first_page, first_page + need))
        else:
            if first_page:
                fail("first_page", "0 where pages are given", first_page)
            ids = int_list("pages", pages)[:need]
            check_pages(ids, need)
        counts = [-(-tokens // page_size) for tokens in self.length]
        rest = iter(ids)
        plan = TreePlan.from_nodes(
            self.parent,
            self.length,
            [list(islice(rest, count)) for count in counts],
            self.length,
            page_size=page_size,
            device=self.tokens.device,
        )
        with torch.inference_mode(False):
            first_slot = int_tensor(ids, torch.int64) * page_size
            offset = torch.arange(min(page_size, max(self.length, default=0)), device="cpu")
            slots = [(p[:, None] + offset).view(-1)[:t] for p, t in zip(first_slot.split(counts), self.length)]
            return plan, joined(slots).to(self.tokens.device)


def pack(
    candidates: Sequence[Ints] | torch.Tensor,
    *,
    prompt: Ints = (),
    step_ends: Sequence[Ints] | None = None,
    device: torch.device | str = "cpu",
) -> PackedTree:
    """The candidates of one question, each behind the prompt, as a tree in which every distinct token stands once: two
    candidates share all that they begin with, at any depth.

    candidates  N lists of token ids, which may be equal, prefixes of one another, or empty. Tensors [L] of integers,
                numpy arrays and array.array serve too; int32 and int64 tensors are fastest
    prompt      token ids in front of every candidate
    step_ends   for each candidate the ascending indices, into its own tokens, of those that end a step: the hidden
                states to be read. Default: the last token of each; an empty candidate has no steps
    device      of the tensors of the result

    Raises TypeError for what is not of these types and ValueError for a wrong value.
    """
    question = read_question(Names("prompt", "candidates", "step_ends"), prompt, candidates, step_ends)
    return pack_questions([question], check_device(device))


def pack_many(
    prompts: Sequence[Ints] | torch.Tensor,
    candidates: Sequence[Sequence[Ints] | torch.Tensor],
    *,
    step_ends: Sequence[Sequence[Ints] | None] | None = None,
    device: torch.device | str = "cpu",
) -> PackedTree:
    """As `pack`, for several questions in one forward: candidates[g] and step_ends[g] belong to prompts[g]. What the
    prompts begin with, such as a template, is shared too; a prompt without candidates is left out. step_ends[g] may be
    None: the last token of each candidate."""
    prompts = as_list("prompts", prompts, "a list of token lists")
    candidates = as_list("candidates", candidates, "a list, by question, of lists of token lists")
    if len(candidates) != len(prompts):
        fail("candidates", f"{len(prompts)} entries, as many as prompts", len(candidates))
    if step_ends is None:
        step_ends = [None] * len(prompts)
    else:
        step_ends = as_list("step_ends", step_ends, "a list, by question, of lists of index lists")
        if len(step_ends) != len(prompts):
            fail("step_ends", f"{len(prompts)} entries, as many as prompts", len(step_ends))
    questions = [
        read_question(Names(f"prompts[{g}]", f"candidates[{g}]", f"step_ends[{g}]"), *of_one)
        for g, of_one in enumerate(zip(prompts, candidates, step_ends))
    ]
    return pack_questions(questions, check_device(device))


def shared_beginnings(sequences: Sequence[Sequence[int]], page_size: int) -> list[tuple[list[int], int]]:
    """Groups of sequences whose first page of tokens is the same, as indices, each with the number of tokens that all
    of it begin with and each goes on behind: a page at least, or 0 for a sequence alone."""
    groups: dict[Any, list[int]] = {}
    for i, ids in enumerate(sequences):
        groups.setdefault(tuple(ids[:page_size]) if len(ids) > page_size else i, []).append(i)
    return [(members, common_beginning([sequences[i] for i in members])) for members in groups.values()]


def common_beginning(sequences: Sequence[Sequence[int]]) -> int:
    if len(sequences) < 2:
        return 0
    low, high = min(sequences), max(sequences)  # what these two share, all share
    same = next((i for i, (a, b) in enumerate(zip(low, high)) if a != b), min(len(low), len(high)))
    return min(same, min(map(len, sequences)) - 1)


class Names(NamedTuple):
    """What the user calls the arguments of one question."""

    prompt: str
    candidates: str
    step_ends: str


class Question(NamedTuple):
    prompt: bytes  # int64 token ids
    candidates: list[bytes]
    step_ends: list[list[int]]


class Path(NamedTuple):
    """What one candidate has to be found under: the tokens of a trunk and those behind it. No trunk is a prefix of
    another one, so these sort as the joined tokens would, and a prompt is not copied for each of its candidates."""

    trunk: int
    rest: bytes


def pack_questions(questions: list[Question], device: torch.device) -> PackedTree:
    trunks, paths = cut_into_paths(questions)
    length = [(len(trunks[path.trunk]) + len(path.rest)) // ITEM for path in paths]
    order = sorted(range(len(paths)), key=paths.__getitem__)
    common = [shared_tokens(trunks, paths[a], paths[b]) for a, b in pairwise(order)] + [0] * bool(order)
    nodes = find_nodes(order, common, length)
    node_length = [node.end - node.begin for node in nodes]
    prompt_length = [len(q.prompt) // ITEM for q in questions for _ in q.candidates]
    steps = [ends for q in questions for ends in q.step_ends]
    step_rows = find_rows(nodes, order, length, [[p + end for end in ends] for p, ends in zip(prompt_length, steps)])
    groups = accumulate((len(q.candidates) for q in questions), initial=0)

    tokens = bytearray()
    for node in nodes:
        trunk, rest = trunks[paths[node.member].trunk], paths[node.member].rest
        begin, end = node.begin * ITEM, node.end * ITEM
        tokens += trunk[begin:end]
        tokens += rest[max(0, begin - len(trunk)) : max(0, end - len(trunk))]
    with torch.inference_mode(False):
        ramp = torch.arange(max(length, default=0), device="cpu")
        positions = joined([ramp[node.begin : node.end] for node in nodes])
        return PackedTree(
            tokens=(torch.frombuffer(tokens, dtype=torch.int64) if tokens else joined([])).to(device),
            positions=positions.to(device),
            parent=[node.parent for node in nodes],
            length=node_length,
            step_rows=int_tensor([row for rows in step_rows for row in rows], torch.int64).to(device),
            offsets=int_tensor(list(accumulate(map(len, steps), initial=0)), torch.int64).to(device),
            group_offsets=int_tensor(list(groups), torch.int64).to(device),
        )


def cut_into_paths(questions: list[Question]) -> tuple[list[bytes], list[Path]]:
    """The trunks, sorted: those of the prompts that begin with no other prompt. And the path of every candidate."""
    trunks: list[bytes] = []
    trunk = {}
    for prompt in sorted({q.prompt for q in questions}):
        if not trunks or not prompt.startswith(trunks[-1]):
            trunks.append(prompt)
        trunk[prompt] = len(trunks) - 1
    paths = []
    for q in questions:
        t = trunk[q.prompt]
        tail = q.prompt[len(trunks[t]) :]
        paths += [Path(t, tail + tokens) for tokens in q.candidates]
    return trunks, paths


def shared_tokens(trunks: list[bytes], a: Path, b: Path) -> int:
    if a.trunk == b.trunk:
        return len(trunks[a.trunk]) // ITEM + common_pages(a.rest, b.rest, ITEM)
    return common_pages(trunks[a.trunk], trunks[b.trunk], ITEM)


def find_nodes(order: list[int], common: list[int], length: list[int]) -> list[Run]:
    """The nodes in depth-first preorder, none empty. Siblings stand in the order of their first
    members, where a path that is a prefix of another one is no member.

    order   [N] the paths, sorted
    common  [N] tokens that order[i] and order[i + 1] share; the last is 0
    length  [N] tokens of each path
    """
    # A path that is a prefix of another one stands right before such a path, and needs no node of its own. What the
    # others share with their neighbours is not changed by leaving it out.
    own = [(i, below) for i, below in zip(order, common) if below < length[i]]
    members = sorted(i for i, _ in own)
    rank = {i: r for r, i in enumerate(members)}
    runs = shared_runs([rank[i] for i, _ in own], [below for _, below in own])
    runs = [run._replace(member=members[run.member]) for run in runs]
    runs = [run._replace(end=length[run.member]) if run.leaf else run for run in runs]
    # Parents first is not yet depth-first: members of one node may lie far apart.
    places, parent, *_ = preorder([run.parent for run in runs], [run.end - run.begin for run in runs])
    return [runs[i]._replace(parent=p) for i, p in zip(places, parent)]


def find_rows(nodes: list[Run], order: list[int], length: list[int], positions: list[list[int]]) -> list[list[int]]:
    """Where the tokens at these ascending positions of each path are packed. `order` and `length` as in find_nodes."""
    first_row = list(accumulate((node.end - node.begin for node in nodes), initial=0))
    leaf = {node.member: i for i, node in enumerate(nodes) if node.leaf}
    rows: list[list[int]] = [[] for _ in positions]
    last = -1
    for path in reversed(order):
        last = leaf.get(path, last)  # a path without a leaf ends where the one behind it does, or above
        while last >= 0 and nodes[last].begin >= length[path]:  # a chain of prefixes is climbed once, not once for each
            last = nodes[last].parent
        node = last
        for position in reversed(positions[path]):
            while nodes[node].begin > position:
                node = nodes[node].parent
            rows[path].append(first_row[node] + position - nodes[node].begin)
        rows[path].reverse()
    return rows


def joined(parts: list[torch.Tensor]) -> torch.Tensor:
    """[sum] int64. Node by node, because tensor operations on many elements wake torch's thread pool."""
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device="cpu")


def read_question(names: Names, prompt: Any, candidates: Any, step_ends: Any) -> Question:
    candidates = as_list(names.candidates, candidates, "a list of token lists")
    tokens = [token_bytes(f"{names.candidates}[{i}]", c) for i, c in enumerate(candidates)]
    if step_ends is None:
        ends = [[len(t) // ITEM - 1] if t else [] for t in tokens]
    else:
        ends = as_list(names.step_ends, step_ends, "a list of index lists")
        if len(ends) != len(tokens):
            fail(names.step_ends, f"{len(tokens)} entries, as many as {names.candidates}", len(ends))
        ends = [read_steps(f"{names.step_ends}[{i}]", e, len(t) // ITEM) for i, (e, t) in enumerate(zip(ends, tokens))]
    return Question(token_bytes(names.prompt, prompt), tokens, ends)


def as_list(name: str, values: Iterable, expected: str) -> list:
    if isinstance(values, (str, bytes)) or not hasattr(values, "__iter__"):
        fail(name, expected, repr(values), TypeError)
    return list(values)


def token_bytes(name: str, tokens: Any) -> bytes:
    """Token ids as int64, in bytes: comparing, sorting and cutting those takes no loop over tokens."""
    if isinstance(tokens, torch.Tensor) and tokens.dim() == 1 and tokens.dtype in (torch.int32, torch.int64):
        values = tokens.to(device="cpu", dtype=torch.int64).contiguous()
        if not values.numel():
            return b""
        low, high = torch.aminmax(values)
        if low >= 0 and high <= INT32_MAX:
            return ctypes.string_at(values.data_ptr(), values.numel() * ITEM)
    ids = tokens if type(tokens) is list else int_list(name, tokens)
    made = native.token_bytes(ids) if native else None
    if made is not None:
        return made
    ids = int_list(name, ids)
    if ids and not (min(ids) >= 0 and max(ids) <= INT32_MAX):
        i = next(i for i, t in enumerate(ids) if not 0 <= t <= INT32_MAX)
        fail(f"{name}[{i}]", f"a token id in [0, {INT32_MAX}]", ids[i])
    return struct.pack(f"={len(ids)}q", *ids)


def read_steps(name: str, ends: Any, tokens: int) -> list[int]:
    ends = int_list(name, ends)
    if ends and not (ends[0] >= 0 and ends[-1] < tokens and all(map(operator.lt, ends, ends[1:]))):
        for j, end in enumerate(ends):
            if not 0 <= end < tokens:
                fail(f"{name}[{j}]", f"the index of one of the candidate's {tokens} tokens", end)
            if j and end <= ends[j - 1]:
                fail(f"{name}[{j}]", f"more than the step before, {ends[j - 1]}", end)
    return ends


def check_pages(ids: list[int], need: int) -> None:
    if len(ids) < need:
        fail("pages", f"at least {need} page ids", len(ids))
    if ids and not (min(ids) >= 0 and max(ids) <= INT32_MAX):
        i = next(i for i, page in enumerate(ids) if not 0 <= page <= INT32_MAX)
        fail(f"pages[{i}]", f"a page id in [0, {INT32_MAX}]", ids[i])
    if len(set(ids)) < len(ids):
        seen: set[int] = set()
        i = next(i for i, page in enumerate(ids) if page in seen or seen.add(page))
        fail(f"pages[{i}]", "each page id once", ids[i])
