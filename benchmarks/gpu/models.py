"""`python -m benchmarks.gpu.models`: a model of a 7B model's shapes, seeded random weights, as a whole: decoding over a
shared trunk, and scoring candidates step by step. Ours, ours over the same pages without sharing, and stock
transformers with its default cache; eager, all of them.

A decode of S steps is timed at three lengths of the suffix, in the middle of its thirds, and its seconds are S times
their mean; keys and values that would have come before are random numbers. The same for steps of candidates. Before
anything is timed, ours and stock give the same logits on a short prompt.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.cache_utils import DynamicCache

from tts_kernels.attention import api
from tts_kernels.integrations.transformers_tree import TreeModel
from tts_kernels.measure.timing import synchronize
from tts_kernels.scoring import ScoreHead, step_scores
from tts_kernels.tree.plan import LENGTH, PAGE_BEGIN, PARENT, TreePlan

from ..machine import memory_shortage
from .bench import last_line

FULL = {
    "config": {"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
               "intermediate_size": 18944, "vocab_size": 152064, "max_position_embeddings": 65536},
    "decode": [[64, 9216, 1024], [64, 32768, 512], [64, 256, 4096]],  # samples, trunk, suffix
    "score": {"candidates": 64, "prompt": 512, "steps": 20, "tokens": 48, "batch": 8},
    "calls": 5,
}  # fmt: skip
DRY = {
    "config": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
               "intermediate_size": 64, "vocab_size": 128, "max_position_embeddings": 512},
    "decode": [[3, 32, 6]],
    "score": {"candidates": 4, "prompt": 16, "steps": 3, "tokens": 5, "batch": 2},
    "calls": 1,
}  # fmt: skip
PAGE = 16


class Models:
    """One model, on the device, and what is measured on it."""

    def __init__(self, settings: dict, device: torch.device) -> None:
        self.device, self.calls = device, settings["calls"]
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        torch.manual_seed(0)
        torch.set_default_dtype(dtype)
        with device:
            self.model = Qwen2ForCausalLM(
                Qwen2Config(**settings["config"], bos_token_id=None, eos_token_id=None)
            ).eval()
            hidden = settings["config"]["hidden_size"]
            self.head = ScoreHead.mlp(
                torch.randn(hidden, hidden) * hidden**-0.5, torch.randn(hidden), torch.randn(2, hidden), torch.randn(2)
            )
        torch.set_default_dtype(torch.float32)
        self.config = self.model.config

    @property
    def token_bytes(self) -> int:
        """K and V of all layers."""
        c = self.config
        head_dim = c.hidden_size // c.num_attention_heads
        return 2 * c.num_hidden_layers * c.num_key_value_heads * head_dim * self.model.dtype.itemsize

    def ids(self, *shape: int) -> torch.Tensor:
        return torch.randint(self.config.vocab_size, shape, device=self.device)

    def seconds(self, call: Callable[[], object]) -> float:
        """The median of so many calls, after one, until the device is done."""
        call()
        times = []
        for _ in range(self.calls):
            synchronize(self.device)
            start = time.perf_counter()
            call()
            synchronize(self.device)
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.model.lm_head(hidden)

    @torch.no_grad()
    def check(self) -> float:
        """The largest difference of logits, ours to stock's, over the largest logit; ValueError beyond rounding."""
        prompt, rest = self.ids(37), self.ids(3, 5)
        tree = TreeModel(self.model, num_pages=16, page_size=PAGE)
        root = tree.kv.add(None, 37)
        tree.forward({root: 37}, prompt)
        leaves = tree.kv.fork(root, 3)
        tree.kv.append(leaves, 5)
        ours = self.logits(tree.forward(dict.fromkeys(leaves, 5), rest.flatten())).view(3, 5, -1)
        stock = self.model(torch.cat([prompt.expand(3, -1), rest], 1)).logits[:, 37:]
        off = ((ours - stock).abs().max() / stock.abs().max()).item()
        if not off <= (0.05 if self.model.dtype == torch.bfloat16 else 1e-4):
            raise ValueError(f"wrong logits: {off:.2g} of the largest")
        return off

    # --- decode ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def decode(self, n: int, trunk: int, suffix: int) -> dict:
        lengths = [suffix * k // 6 for k in (1, 3, 5)]
        methods = {
            "ours": functools.partial(self.tree_step, n, trunk, True),
            "not shared": functools.partial(self.tree_step, n, trunk, False),
            "stock": functools.partial(self.stock_step, n, trunk),
        }
        entry = {"samples": n, "trunk": trunk, "suffix": suffix, "seconds": {}, "missing": {}}
        for name, step in methods.items():
            tokens = trunk + n * suffix if name != "stock" else n * (trunk + suffix)
            if reason := memory_shortage(tokens * self.token_bytes, self.device.type):
                entry["missing"][name] = reason
                continue
            try:
                steps = [step(length) for length in lengths]
            except Exception as failure:
                synchronize(self.device)
                entry["missing"][name] = last_line(failure)
                continue
            entry["seconds"][name] = suffix * statistics.fmean(steps)
        if "ours" in entry["seconds"]:
            attention = statistics.fmean(self.attention(n, trunk, length) for length in lengths)
            entry["attention_share"] = suffix * attention / entry["seconds"]["ours"]
        entry["prefill_s"] = {"ours": self.prefill(trunk)}
        entry["prefill_s"]["stock"] = n * entry["prefill_s"]["ours"]  # the prompt once for every sample
        return entry

    def leaves_of(self, n: int, trunk: int, length: int) -> tuple[TreeModel, list[int]]:
        steps = self.calls + 2
        pages = -(-trunk // PAGE) + n * -(-(length + steps + PAGE) // PAGE)
        tree = TreeModel(self.model, num_pages=pages, page_size=PAGE)
        for cache in (*tree.kv.k_cache, *tree.kv.v_cache):
            cache.normal_()
        leaves = tree.kv.fork(tree.kv.add(None, trunk), n)
        tree.kv.append(leaves, length + 1)
        return tree, leaves

    def tree_step(self, n: int, trunk: int, shared: bool, length: int) -> float:
        tree, leaves = self.leaves_of(n, trunk, length)
        rows = dict.fromkeys(leaves, 1)
        plan = tree.kv.plan(rows, reserve=self.calls + 1)
        if not shared:
            plan = unshared(plan, PAGE, self.device)
        state = {"ids": self.ids(n), "first": True}

        def step() -> None:
            if not state["first"]:
                tree.kv.append(leaves)
                plan.advance_()
            state["first"] = False
            state["ids"] = self.logits(tree.forward(rows, state["ids"], plan=plan)).argmax(-1)

        return self.seconds(step)

    def stock_step(self, n: int, trunk: int, length: int) -> float:
        cache, c = DynamicCache(), self.config
        shape = n, c.num_key_value_heads, trunk + length, c.hidden_size // c.num_attention_heads
        for layer in range(c.num_hidden_layers):
            cache.update(*(torch.randn(shape, device=self.device, dtype=self.model.dtype) for _ in "kv"), layer)
        state = {"ids": self.ids(n, 1)}

        def step() -> None:
            out = self.model(state["ids"], past_key_values=cache, use_cache=True)
            state["ids"] = out.logits[:, -1:].argmax(-1)

        return self.seconds(step)

    def attention(self, n: int, trunk: int, length: int) -> float:
        """Of a step of ours: tree_attention alone, in all layers."""
        tree, leaves = self.leaves_of(n, trunk, length)
        c, kv = self.config, tree.kv
        plan = kv.plan(dict.fromkeys(leaves, 1))
        head_dim = c.hidden_size // c.num_attention_heads
        q = torch.randn(n, c.num_attention_heads, head_dim, device=self.device).to(self.model.dtype)

        def attend() -> None:
            for k_cache, v_cache in zip(kv.k_cache, kv.v_cache):
                api.tree_attention(q, k_cache, v_cache, plan)

        return self.seconds(attend)

    def prefill(self, trunk: int) -> float:
        tree = TreeModel(self.model, num_pages=-(-trunk // PAGE), page_size=PAGE)
        ids = self.ids(trunk)

        def once() -> None:
            root = tree.kv.add(None, trunk)
            tree.forward({root: trunk}, ids)
            tree.kv.release(root)

        return self.seconds(once)

    # --- scores ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def score(self, candidates: int, prompt: int, steps: int, tokens: int, batch: int) -> dict:
        """One-shot: all candidates at once. Step by step: after every step, the new step of each; stock encodes prompt
        and all steps anew, `batch` candidates at a time."""
        width, done = prompt + steps * tokens, [steps * k // 6 for k in (1, 3, 5)]
        ours = [self.increment(candidates, prompt, k * tokens, tokens) for k in done]
        stock = [self.encode(candidates, prompt + (k + 1) * tokens, batch) for k in done]
        return {
            "candidates": candidates, "prompt": prompt, "steps": steps, "tokens": tokens,
            "one_shot_s": {
                "ours": self.pack(candidates, prompt, steps * tokens, steps, batch),
                "stock": self.encode(candidates, width, batch),
            },
            "step_wise_s": {"ours": steps * statistics.fmean(ours), "stock": steps * statistics.fmean(stock)},
        }  # fmt: skip

    def scores(self, hidden: torch.Tensor, every: int) -> torch.Tensor:
        """Of the rows that end a step of `every` rows, each a candidate's."""
        positions = torch.arange(every - 1, hidden.shape[0], every, device=self.device)
        offsets = torch.arange(len(positions) + 1, device=self.device)
        return step_scores(hidden, positions, self.head, offsets=offsets).prob

    def increment(self, n: int, prompt: int, history: int, tokens: int) -> float:
        tree, ids = self.candidates(n, prompt, history + tokens), self.ids(n * tokens)
        leaves = tree.kv.fork(tree.kv.add(None, prompt), n)
        tree.kv.append(leaves, history + tokens)
        rows = dict.fromkeys(leaves, tokens)
        return self.seconds(lambda: self.scores(tree.forward(rows, ids), tokens))

    def pack(self, n: int, prompt: int, length: int, steps: int, batch: int) -> float:
        tree, ids = self.candidates(n, prompt, length), self.ids(prompt)
        rest = self.ids(batch * length)

        def once() -> None:
            root = tree.kv.add(None, prompt)
            tree.forward({root: prompt}, ids)
            for first in range(0, n, batch):
                leaves = tree.kv.fork(root, min(batch, n - first))
                tree.kv.append(leaves, length)
                hidden = tree.forward(dict.fromkeys(leaves, length), rest[: len(leaves) * length])
                self.scores(hidden, length // steps)
                tree.kv.release(leaves)
            tree.kv.release(root)

        return self.seconds(once)

    def encode(self, n: int, length: int, batch: int) -> float:
        ids = self.ids(batch, length)

        def once() -> None:
            for _ in range(-(-n // batch)):
                hidden = self.model.model(ids, use_cache=False).last_hidden_state
                self.scores(hidden.flatten(0, 1), length)

        return self.seconds(once)

    def candidates(self, n: int, prompt: int, length: int) -> TreeModel:
        pages = -(-prompt // PAGE) + n * -(-length // PAGE)
        return TreeModel(self.model, num_pages=pages, page_size=PAGE)


def unshared(plan: TreePlan, page_size: int, device: torch.device) -> TreePlan:
    """Every row's path as a root of its own over the same pages; inner nodes fill theirs."""
    nodes, pages = plan.nodes.tolist(), plan.pages.tolist()
    ends = [*sorted(nodes[PAGE_BEGIN])[1:], len(pages)]
    end_of = dict(zip(sorted(nodes[PAGE_BEGIN]), ends))
    lengths, tables = [], []
    for node in plan.rows[1].tolist():
        path = []
        while node >= 0:
            path.insert(0, node)
            node = nodes[PARENT][node]
        lengths.append(sum(nodes[LENGTH][n] for n in path))
        tables.append([page for n in path for page in pages[nodes[PAGE_BEGIN][n] : end_of[nodes[PAGE_BEGIN][n]]]])
    return TreePlan.from_nodes([-1] * len(lengths), lengths, tables, [1] * len(lengths), page_size=page_size,
                               device=device)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.models", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dry", action="store_true")
    given = parser.parse_args()
    settings = DRY if given.dry else FULL
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models, found = Models(settings, device), {"decode": [], "score": []}
    print(f"logits of ours and stock differ by {models.check():.2g} of the largest", flush=True)
    for case in settings["decode"]:
        entry = models.decode(*case)
        found["decode"].append(entry)
        given.out.write_text(json.dumps(found, allow_nan=False))
        times = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in entry["seconds"].items())
        missing = "".join(f", no {name}: {why}" for name, why in entry["missing"].items())
        print("decode N={} over {} + {}: ".format(*case) + times + missing, flush=True)
    entry = models.score(**settings["score"])
    found["score"].append(entry)
    given.out.write_text(json.dumps(found, allow_nan=False))
    for kind in ("one_shot_s", "step_wise_s"):
        times = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in entry[kind].items())
        print(f"{kind.removesuffix('_s')} scores of {entry['candidates']} candidates: {times}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
