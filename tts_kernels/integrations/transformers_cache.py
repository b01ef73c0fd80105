"""The KV of one `generate` call: every prompt once, and a leaf for each sample. See transformers.py."""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ..tree.checks import check_int, fail
from ..tree.kv_tree import KVTree
from .transformers_attention import TreeCall, TreeLayer, refuse

FIRST_ROOM = 256  # tokens for which each sample has pages at first, at most; twice as many when they are used up


class TreeCache(Cache):
    """The cache that `generate` hands to the model; with return_dict_in_generate=True it comes back as
    `past_key_values`, for its figures. It belongs to the call that made it: a later one that is given it is refused,
    since without the switched attention it would see no KV but its own."""

    def __init__(
        self,
        layer_types: list[str],
        *,
        lengths: list[int],
        num_samples: int,
        width: int,
        page_size: int,
        expected_tokens: int,
        backend: str | None = None,
    ):
        """
        Args:
            layer_types: one for each layer.
            lengths: tokens of each question.
            num_samples: N, for each question.
            width: tokens of the longest question, padding included: what transformers takes to be stored.
            expected_tokens: how many tokens each sample will probably append.
        """
        self.tree = SampleTree(lengths, num_samples, width, len(layer_types), page_size, expected_tokens)
        super().__init__(layers=[TreeLayer(self.tree, index, backend) for index in range(len(layer_types))])

    def expect_prompt_tokens(self, start: int, count: int) -> None:
        """The next forward brings tokens [start, start + count) of the packed questions."""
        self.tree.begin_prompt_tokens(start, count)

    def expect_samples(self) -> None:
        """All questions are stored. Each forward now brings a token of each sample, at first the last prompt token."""
        self.tree.begin_samples()

    def expect_nothing(self) -> None:
        """The call is over."""
        self.tree.ended = True

    @property
    def kv_bytes_held(self) -> int:
        """Bytes of all pages, reserved ones included."""
        return sum(cache.nbytes for cache in (*self.tree.kv.k_cache, *self.tree.kv.v_cache))

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of one token's keys and values in all layers."""
        return self.kv_bytes_held // (self.tree.kv.num_pages * self.tree.page_size)

    def kv_bytes_per_step(self) -> dict[str, float]:
        """Mean over the decode steps so far (those that appended a token): `read`, each stored token once; `least`,
        only what some sample can see (less than `read` where layers have a window); `replicated`, what each sample can
        see, read for each sample."""
        tree, layers = self.tree, self.layers
        sees = [layer.window + 1 if layer.window >= 0 else 2**62 for layer in layers]  # tokens
        read = least = replicated = 0
        for step in range(1, tree.generated + 1):
            read += len(layers) * (sum(tree.lengths) + tree.num_rows * step)
            for most in sees:
                own = min(step, most)
                above = [min(length, max(0, most - step)) for length in tree.lengths]
                least += sum(above) + tree.num_rows * own
                replicated += tree.num_samples * sum(above) + tree.num_rows * own
        scale = self.kv_bytes_per_token / len(layers) / max(tree.generated, 1)
        return {"read": read * scale, "least": least * scale, "replicated": replicated * scale}


class SampleTree(TreeCall):
    """The KVTree of one call with the plan and slots of the forward that runs: B roots that hold a question each, then
    B * N leaves that take a token each in every forward. When their pages are used up, all moves into a larger tree."""

    def __init__(
        self, lengths: list[int], num_samples: int, width: int, num_layers: int, page_size: int, expected_tokens: int
    ):
        super().__init__(num_layers)
        self.lengths, self.num_samples, self.width = lengths, num_samples, width
        self.num_rows = len(lengths) * num_samples
        self.page_size = page_size = check_int("page_size", page_size, 1)
        self.room = pages_for(min(expected_tokens, FIRST_ROOM), page_size) * page_size  # tokens that each leaf can hold
        self.roots: list[int] = []
        self.leaves: dict[int, int] = {}  # to their number of rows, which is 1
        self.forwards = -1  # of samples; -1: prompts are coming
        self.prompt_range = (0, 0)
        self.ended = False

    @property
    def generated(self) -> int:
        """Tokens that each sample has stored."""
        return max(self.forwards - 1, 0)

    def begin_prompt_tokens(self, start: int, count: int) -> None:
        self.check_all_layers_stored()
        self.prompt_range = (start, start + count)
        self.seen = start

    def begin_samples(self) -> None:
        self.check_all_layers_stored()
        if self.kv is None:
            refuse("the model did not store KV in the cache it was given")
        self.forwards, self.seen = 0, self.width - 1

    def make_tree(self, key: Tensor) -> KVTree:
        kv = self._empty_tree(*key.shape[1:], key.dtype, key.device)
        self.roots = [kv.add(None, 0) for _ in self.lengths]
        return kv

    def begin_forward(self) -> None:
        if self.ended:
            fail("past_key_values", "a cache of transformers or none", "that of a `generate` over a shared KV tree, "
                 "which is over: the tokens are to be computed anew")  # fmt: skip
        if self.forwards < 0:
            self._plan_prompts()
        elif self.forwards == 0:
            self._plan_repeat()
        else:
            self._plan_append()
        self.forwards += self.forwards >= 0

    def end_forward(self) -> None:
        self.seen += self.forwards >= 0

    def _plan_prompts(self) -> None:
        """Each question owns as rows those of its tokens that lie in `prompt_range` of the packed tokens."""
        start, stop = self.prompt_range
        begins = accumulate(self.lengths, initial=0)
        counts = [max(0, min(stop, begin + length) - max(start, begin)) for begin, length in zip(begins, self.lengths)]
        self.kv.append(self.roots, counts)
        rows = dict(zip(self.roots, counts))
        self.plan, self.slots = self.kv.plan(rows), self.kv.slots(rows)

    def _plan_repeat(self) -> None:
        """Each sample brings the last token of its question once more: stored already, equal for all samples."""
        self.plan, self.slots = self.kv.plan(dict.fromkeys(self.roots, 1)), None
        self.equal_rows = self.num_samples

    def _plan_append(self) -> None:
        """Each sample brings a token of its own."""
        length = self.forwards  # of each leaf, with this token
        if length == 1:
            self.leaves = {leaf: 1 for root in self.roots for leaf in self.kv.fork(root, self.num_samples)}
            self.equal_rows, self.plan = 1, None
        if length > self.room:
            self._move_to_larger_tree(length - 1)
        self.kv.append(list(self.leaves))
        if self.plan is None:
            self.plan = self.kv.plan(self.leaves, reserve=self.room - length)
        else:
            self.plan.advance_()
        self.slots = self.kv.slots(self.leaves)

    def _empty_tree(self, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> KVTree:
        pages = sum(pages_for(length, self.page_size) for length in self.lengths)
        pages += self.num_rows * self.room // self.page_size
        return KVTree(self.num_layers, pages, self.page_size, num_kv_heads, head_dim, dtype=dtype, device=device)

    def _move_to_larger_tree(self, length: int) -> None:
        """Make room for twice as many tokens in each leaf; they hold `length` now."""
        old, self.room = self.kv, pages_for(2 * max(length, 1), self.page_size) * self.page_size
        source = old.slots({**dict(zip(self.roots, self.lengths)), **dict.fromkeys(self.leaves, length)})
        self.kv = self._empty_tree(old.num_kv_heads, old.head_dim, old.dtype, old.device)
        self.roots = [self.kv.add(None, length) for length in self.lengths]
        self.leaves = {leaf: 1 for root in self.roots for leaf in self.kv.fork(root, self.num_samples)}
        self.kv.append(list(self.leaves), length)
        target = self.kv.slots({**dict(zip(self.roots, self.lengths)), **dict.fromkeys(self.leaves, length)})
        for new, cache in zip((*self.kv.k_cache, *self.kv.v_cache), (*old.k_cache, *old.v_cache)):
            new.flatten(0, 1)[target] = cache.flatten(0, 1)[source]
        self.plan = None


def pages_for(tokens: int, page_size: int) -> int:
    return -(-tokens // page_size)
