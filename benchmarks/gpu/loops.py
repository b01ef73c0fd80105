"""What is measured on a whole model, as steps over tensors that stay where they are, so that a CUDA graph can hold one:
decoding by ours, by ours without shared reads, by transformers with its default cache and with its static one; and the
forwards of a verifier.

`step` is what a graph holds and returns logits (of a verifier: margins); `grow` comes before each but the first, on the
host: the tree takes the next token, and its plan is advanced.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, StaticCache

from tts_kernels import scoring
from tts_kernels.integrations.transformers_tree import TreeModel
from tts_kernels.measure.timing import capturing
from tts_kernels.scoring import ScoreHead
from tts_kernels.tree.plan import LENGTH, PAGE_BEGIN, PARENT, TreePlan

from . import parts

PAGE = 16


def random_ids(model: PreTrainedModel, *shape: int) -> Tensor:
    return torch.randint(model.config.vocab_size, shape, device=model.device)


def head_dim(model: PreTrainedModel) -> int:
    return model.config.hidden_size // model.config.num_attention_heads


def tree_of(model: PreTrainedModel, trunk: int, n: int, suffix: int) -> TreeModel:
    """With pages for a trunk and n suffixes, full of random numbers."""
    pages = -(-trunk // PAGE) + n * -(-suffix // PAGE)
    tree = TreeModel(model, num_pages=pages, page_size=PAGE)
    for cache in (*tree.kv.k_cache, *tree.kv.v_cache):
        cache.normal_()
    return tree


class TreeDecode:
    """n leaves of `length` random tokens under a trunk, and room for so many `steps`. Not `shared`: every row reads its
    whole path for itself, over the same pages."""

    def __init__(self, model: PreTrainedModel, n: int, trunk: int, length: int, steps: int, shared: bool) -> None:
        self.model, self.tree = model, tree_of(model, trunk, n, length + steps + 1)
        kv = self.tree.kv
        self.leaves = kv.fork(kv.add(None, trunk), n)
        kv.append(self.leaves, length)
        kv.append(self.leaves)
        self.rows = dict.fromkeys(self.leaves, 1)
        self.plan = kv.plan(self.rows, reserve=steps)
        if not shared:
            self.plan = unshared(self.plan)
        self.ids = random_ids(model, n)

    def step(self) -> Tensor:
        logits = self.model.lm_head(self.tree.forward(self.rows, self.ids, plan=self.plan))
        self.ids.copy_(parts.sample(logits))
        return logits

    def grow(self) -> None:
        self.tree.kv.append(self.leaves)
        self.plan.advance_()

    def anew(self, ids: Tensor) -> Tensor:
        """What a step on these tokens gives, by a plan that is made for it."""
        return self.model.lm_head(self.tree.forward(self.rows, ids))

    def restart(self) -> None:
        """Nothing to do: a step that is run again writes the same KV to the same places."""


class StockDecode:
    """transformers with its default cache, which grows by concatenation."""

    def __init__(self, model: PreTrainedModel, n: int, length: int) -> None:
        self.model, self.ids = model, random_ids(model, n, 1)
        self.cache = DynamicCache()
        shape = n, model.config.num_key_value_heads, length, head_dim(model)
        for layer in range(model.config.num_hidden_layers):
            kv = (torch.randn(shape, device=model.device, dtype=model.dtype) for _ in "kv")
            self.cache.update(*kv, layer)

    def step(self) -> Tensor:
        logits = self.model(self.ids, past_key_values=self.cache, use_cache=True).logits[:, -1]
        self.ids.copy_(parts.sample(logits)[:, None])
        return logits

    def grow(self) -> None:
        """The forward has grown the cache."""


class StaticDecode(StockDecode):
    """transformers with its static cache, of which every step reads all `most` places: what a graph can hold."""

    def __init__(self, model: PreTrainedModel, n: int, length: int, most: int) -> None:
        self.model, self.ids, self.length = model, random_ids(model, n, 1), length
        self.cache = StaticCache(config=model.config, max_cache_len=most)
        self.cache.early_initialization(
            batch_size=n, num_heads=model.config.num_key_value_heads, head_dim=head_dim(model), dtype=model.dtype,
            device=model.device,
        )  # fmt: skip
        for layer in self.cache.layers:
            layer.keys.normal_()
            layer.values.normal_()
        self.restart()

    def restart(self) -> None:
        """As long as it was at first."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.length)


class Replayed:
    """A step that was captured once; each call replays it. On a CPU, where there are no graphs, it runs anew.

    The step runs once before, on another stream: what compiles, allocates for good or makes a plan's work list has done
    so then."""

    def __init__(self, step: Callable[[], Tensor], device: torch.device) -> None:
        self.step = step
        self.graph = None
        if device.type != "cuda":
            return
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with capturing(self.graph):
            self.out = step()

    def __call__(self) -> Tensor:
        if self.graph is None:
            self.out = self.step()
        else:
            self.graph.replay()
        return self.out


class TreeScores:
    """A verifier's call: forwards over a tree, whose plans are made before, and margins at the last of each `every`
    rows that candidates own. Not `shared`: every candidate reads its whole path for itself."""

    def __init__(self, tree: TreeModel, head: ScoreHead, shared: bool) -> None:
        self.tree, self.head, self.shared = tree, head, shared
        self.calls: list[tuple[dict[int, int], Tensor, TreePlan, int]] = []

    @classmethod
    def increment(
        cls, model: PreTrainedModel, head: ScoreHead, n: int, prompt: int, history: int, ids: Tensor, shared: bool
    ) -> TreeScores:
        """A step of ids [n, tokens], behind a history of random KV."""
        tokens = ids.shape[1]
        call = cls(tree_of(model, prompt, n, history + tokens), head, shared)
        kv = call.tree.kv
        leaves = kv.fork(kv.add(None, prompt), n)
        kv.append(leaves, history + tokens)
        call.add(leaves, ids, tokens)
        return call

    @classmethod
    def one_shot(
        cls, model: PreTrainedModel, head: ScoreHead, prompt: Tensor, rest: Tensor, batch: int, every: int, shared: bool
    ) -> TreeScores:
        """The prompt [tokens], then candidates [n, tokens], `batch` at a time."""
        n, length = rest.shape
        call = cls(tree_of(model, len(prompt), n, length), head, shared)
        kv = call.tree.kv
        root = kv.add(None, len(prompt))
        call.add([root], prompt[None], 0)
        for first in range(0, n, batch):
            leaves = kv.fork(root, min(batch, n - first))
            kv.append(leaves, length)
            call.add(leaves, rest[first : first + batch], every)
        return call

    def add(self, nodes: Sequence[int], ids: Tensor, every: int) -> None:
        rows = dict.fromkeys(nodes, ids.shape[1])
        plan = self.tree.kv.plan(rows)
        self.calls.append((rows, ids.flatten(), plan if self.shared else unshared(plan), every))

    def step(self) -> Tensor:
        found = []
        for rows, ids, plan, every in self.calls:
            hidden = self.tree.forward(rows, ids, plan=plan)
            if every:
                found.append(margins(hidden, self.head, every))
        return found[0] if len(found) == 1 else torch.cat(found)


class StockScores:
    """Whole sequences [n, tokens], `batch` at a time, without a cache; margins at places that are `every` rows apart,
    behind the prompt. The head alone on them, as ours: no logits of a vocabulary."""

    def __init__(
        self, model: PreTrainedModel, head: ScoreHead, ids: Tensor, prompt: int, batch: int, every: int
    ) -> None:
        self.model, self.head, self.ids, self.prompt, self.batch, self.every = model, head, ids, prompt, batch, every

    def step(self) -> Tensor:
        found = []
        for ids in self.ids.split(self.batch):
            hidden = self.model.model(ids, use_cache=False).last_hidden_state[:, self.prompt :]
            found.append(margins(hidden.flatten(0, 1), self.head, self.every))
        return torch.cat(found)


def margins(hidden: Tensor, head: ScoreHead, every: int) -> Tensor:
    """Of the rows that end a step of `every` rows, each a candidate's."""
    positions = torch.arange(every - 1, hidden.shape[0], every, device=hidden.device)
    offsets = torch.arange(len(positions) + 1, device=hidden.device)
    return scoring.step_scores(hidden, positions, head, offsets=offsets).margin


def unshared(plan: TreePlan) -> TreePlan:
    """Every node that owns rows as a sequence of its own, with the pages of its whole path. Inner nodes fill theirs,
    and rows of q lie in depth-first order."""
    nodes, ids = plan.nodes.tolist(), plan.pages.tolist()
    if plan.rows[0].tolist() != list(range(plan.num_rows)):
        raise ValueError("rows: expected those of q in depth-first order")
    begins = sorted({*nodes[PAGE_BEGIN], len(ids)})
    end_of = dict(pairwise(begins))
    owned: dict[int, int] = {}
    for node in plan.rows[1].tolist():
        owned[node] = owned.get(node, 0) + 1
    lengths, tables = [], []
    for node in owned:
        path = [node]
        while nodes[PARENT][path[-1]] >= 0:
            path.append(nodes[PARENT][path[-1]])
        for above in path[1:]:
            if nodes[LENGTH][above] % plan.page_size:
                raise ValueError(f"inner nodes: expected whole pages, got {nodes[LENGTH][above]} tokens in one")
        path = [n for n in reversed(path) if nodes[LENGTH][n]]
        lengths.append(sum(nodes[LENGTH][n] for n in path))
        tables.append([page for n in path for page in ids[nodes[PAGE_BEGIN][n] : end_of[nodes[PAGE_BEGIN][n]]]])
    return TreePlan.from_nodes(
        [-1] * len(owned), lengths, tables, list(owned.values()), page_size=plan.page_size, device=plan.device
    )
