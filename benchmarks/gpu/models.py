"""`python -m benchmarks.gpu.models`: a model of a 7B model's shapes, seeded random weights made on the device, as a
whole: decoding over a shared trunk, and a verifier's scores of candidates, in one shot and step by step. Ours, ours
over the same pages without shared reads ("not shared"), and stock transformers; eager, and under CUDA graphs where that
can be; and of each the seconds of its parts.

Decoding S tokens is timed at three lengths of the suffix, in the middle of its thirds, and its seconds are S times the
mean; keys and values that would have come before are random numbers. The same for a search's steps of candidates. A
step's time is that of a loop that waits for nothing in between. Nothing is timed before its result was seen to be
right: ours against transformers on a short prompt, a kept plan against a new one, a replayed graph against the eager
step.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from tts_kernels.integrations.transformers_tree import TreeModel
from tts_kernels.measure.timing import synchronize
from tts_kernels.scoring import ScoreHead

from ..machine import memory_shortage
from .bench import last_line
from .loops import PAGE, Replayed, StaticDecode, StockDecode, StockScores, TreeDecode, TreeScores, random_ids
from .parts import PARTS, parts_of

OURS, NOT_SHARED, STOCK = "ours", "not shared", "stock"
FULL = {
    "config": {"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
               "intermediate_size": 18944, "vocab_size": 152064, "max_position_embeddings": 65536,
               # With transformers' own 0.02, roundings of bf16 grow from layer to layer at this width.
               "initializer_range": 0.01},
    "decode": [[64, 9216, 1024], [64, 32768, 512], [64, 256, 4096]],  # samples, trunk, suffix
    "score": {"candidates": 64, "prompt": 512, "steps": 20, "tokens": 48, "batch": 8},
    "calls": 5, "rounds": 3,  # of a step of decoding; scores take a second, and are called one at a time
}  # fmt: skip
DRY = {
    "config": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
               "intermediate_size": 64, "vocab_size": 128, "max_position_embeddings": 512},
    "decode": [[3, 32, 18]],
    "score": {"candidates": 4, "prompt": 16, "steps": 3, "tokens": 16, "batch": 2},
    "calls": 1, "rounds": 2,
}  # fmt: skip
CHECKED = 3  # steps that are compared before a loop is timed
NO_GRAPHS = "a CPU has no CUDA graphs: the step was run over the same tensors, and not timed"
TOO_LONG = "not captured: its forwards keep the device busy for longer than the host takes to issue them"
STOCK_WAITS = "a forward without a cache reads from the device whether sequences are packed"


class Wrong(Exception):
    """Logits or scores that differ by more than rounding."""


class Models:
    """One model, on the device, and what is measured on it."""

    def __init__(self, settings: dict, device: torch.device) -> None:
        self.device, self.calls, self.rounds = device, settings["calls"], settings["rounds"]
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
        # Roundings of tens of layers add up, and each is of bfloat16 there.
        self.allowed = 0.05 if dtype == torch.bfloat16 else 1e-4

    @property
    def token_bytes(self) -> int:
        """K and V of all layers."""
        c = self.config
        head_dim = c.hidden_size // c.num_attention_heads
        return 2 * c.num_hidden_layers * c.num_key_value_heads * head_dim * self.model.dtype.itemsize

    @property
    def steps(self) -> int:
        """That a loop may be taken on: timed ones, eager and under a graph, those before them, and compared ones."""
        return 2 * (1 + self.calls * self.rounds + CHECKED) + 4

    def seconds(self, call: Callable[[], object], calls: int, rounds: int) -> float:
        """Of a call: the median over the rounds, each so many calls until the device is done, after one call."""
        call()
        times = []
        for _ in range(rounds):
            synchronize(self.device)
            start = time.perf_counter()
            for _ in range(calls):
                call()
            synchronize(self.device)
            times.append((time.perf_counter() - start) / calls)
        return statistics.median(times)

    def compare(self, what: str, got: Tensor, wanted: Tensor) -> float:
        """The largest difference over the largest number."""
        off = ((got.float() - wanted.float()).abs().max() / wanted.float().abs().max()).item()
        if not off <= self.allowed:
            raise Wrong(f"{what}: off by {off:.2g} of the largest, allowed {self.allowed:.2g}")
        return off

    @torch.no_grad()
    def check(self) -> float:
        """Ours, and transformers' static cache, against transformers: logits of three samples under a prompt."""
        prompt, rest = random_ids(self.model, 37), random_ids(self.model, 3, 5)
        tree = TreeModel(self.model, num_pages=16, page_size=PAGE)
        root = tree.kv.add(None, 37)
        tree.forward({root: 37}, prompt)
        leaves = tree.kv.fork(root, 3)
        tree.kv.append(leaves, 5)
        ours = self.model.lm_head(tree.forward(dict.fromkeys(leaves, 5), rest.flatten())).view(3, 5, -1)
        whole = torch.cat([prompt.expand(3, -1), rest], 1)
        stock = self.model(whole).logits
        off = self.compare("ours", ours, stock[:, 37:])
        static = StaticDecode(self.model, 3, 0, 48)
        last = [self.model(ids, past_key_values=static.cache, use_cache=True).logits[:, -1]
                for ids in (whole[:, :41], whole[:, 41:])]  # fmt: skip
        self.compare("the static cache", torch.stack(last, 1), stock[:, 40:])
        return off

    # --- a method ----------------------------------------------------------------------------------------------------

    def attempt(self, entry: dict, name: str, tokens: int, measure: Callable[[], dict]) -> None:
        """measure() as the entry's method of that name, or why there is none."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if reason := memory_shortage(tokens * self.token_bytes, self.device.type):
            entry["missing"][name] = reason
            return
        try:
            found = measure()
        except Exception as failure:
            synchronize(self.device)  # raises, and ends the process, where the device is lost
            entry["missing"][name] = last_line(failure)
            if isinstance(failure, Wrong):
                entry["wrong"].append(name)
            return
        if "missing_graph" in found:
            entry["missing"][f"{name}, graph"] = found.pop("missing_graph")
        entry["methods"][name] = entry["methods"].get(name, {}) | found

    def captured(self, loop, step_seconds: Callable[[Callable], float]) -> dict:
        """graph_s and graph_error of the loop's step, or why they are missing."""
        ids = loop.ids.clone() if hasattr(loop, "ids") else None
        eager = loop.step().clone()
        replayed = Replayed(loop.step, self.device)
        if ids is not None:
            loop.ids.copy_(ids)
            loop.restart()
        error = self.compare("the graph", replayed().clone(), eager)
        if isinstance(loop, TreeDecode):
            loop.grow()
            error = max(error, self.follows(loop, replayed))
        if self.device.type != "cuda":
            return {"missing_graph": NO_GRAPHS}
        return {"graph_s": step_seconds(replayed), "graph_error": error}

    def graph_of(self, loop, step_seconds: Callable[[Callable], float]) -> dict:
        """As `captured`; a capture that fails leaves the rest of the method."""
        try:
            return self.captured(loop, step_seconds)
        except Wrong:
            raise
        except Exception as failure:
            synchronize(self.device)
            return {"missing_graph": last_line(failure)}

    # --- decode ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def decode(self, n: int, trunk: int, suffix: int) -> dict:
        entry = {"samples": n, "trunk": trunk, "suffix": suffix, "methods": {}, "missing": {}, "wrong": []}
        for name in (OURS, NOT_SHARED):
            make = functools.partial(TreeDecode, self.model, n, trunk, steps=self.steps, shared=name == OURS)
            self.attempt(entry, name, trunk + n * (suffix + self.steps), lambda make=make: self.loops(make, suffix))
        stock, whole = functools.partial(self.stock_decode, n, trunk), n * (trunk + suffix)
        self.attempt(entry, STOCK, whole, lambda: self.loops(stock, suffix, graph=False))
        self.attempt(entry, STOCK, whole, lambda: self.static(n, trunk, suffix))
        entry["prefill_s"] = self.prefill(trunk)
        return entry

    def stock_decode(self, n: int, trunk: int, length: int) -> StockDecode:
        return StockDecode(self.model, n, trunk + length)

    def loops(self, make: Callable, suffix: int, graph: bool = True) -> dict:
        """`make`: the loop at a length of the suffix."""
        found: dict[str, list] = {}
        for third in (1, 3, 5):
            loop = make(length=suffix * third // 6)
            if isinstance(loop, TreeDecode):
                found.setdefault("error", []).append(self.follows(loop, loop.step))
            seconds = functools.partial(self.step_seconds, loop)
            one = {"eager_s": seconds(loop.step)}
            one["parts"] = self.parts(lambda loop=loop: (loop.grow(), loop.step()), one["eager_s"])
            one |= self.graph_of(loop, seconds) if graph else {}
            for name, value in one.items():
                found.setdefault(name, []).append(value)
            del loop, seconds
        return summed(found, suffix)

    def parts(self, call: Callable, whole: float) -> dict[str, float]:
        return parts_of(call, self.model, self.device, whole)

    def step_seconds(self, loop, step: Callable) -> float:
        def once() -> None:
            loop.grow()
            step()

        return self.seconds(once, self.calls, self.rounds)

    def follows(self, loop: TreeDecode, step: Callable[[], Tensor]) -> float:
        """The step with the loop's kept plan and tensors, again and again, against a plan that is made for each."""
        worst = 0.0
        for _ in range(CHECKED):
            ids = loop.ids.clone()
            got = step().clone()
            worst = max(worst, self.compare("the advanced plan", got, loop.anew(ids)))
            loop.grow()
        return worst

    def static(self, n: int, trunk: int, suffix: int) -> dict:
        """transformers under a graph. Every step reads all places of its cache, however full: one length will do."""
        most = -(-(trunk + suffix) // 8) * 8
        loop = StaticDecode(self.model, n, trunk + suffix // 2, most)
        found = self.graph_of(loop, functools.partial(self.step_seconds, loop))
        return found | ({"graph_s": suffix * found["graph_s"]} if "graph_s" in found else {})

    def prefill(self, trunk: int) -> float:
        """Of the trunk, once."""
        tree = TreeModel(self.model, num_pages=-(-trunk // PAGE), page_size=PAGE)
        ids = random_ids(self.model, trunk)

        def once() -> None:
            root = tree.kv.add(None, trunk)
            tree.forward({root: trunk}, ids)
            tree.kv.release(root)

        return self.seconds(once, 1, 2)

    # --- scores ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def score(self, candidates: int, prompt: int, steps: int, tokens: int, batch: int) -> dict:
        """One-shot: all candidates at once. Step by step: after every step, the new step of each; stock encodes prompt
        and all steps anew, `batch` candidates at a time."""
        begin = random_ids(self.model, prompt)
        rest = random_ids(self.model, candidates, steps * tokens)
        whole = torch.cat([begin.expand(candidates, -1), rest], 1)
        entry = {"candidates": candidates, "prompt": prompt, "steps": steps, "tokens": tokens}

        def one_shot(name: str) -> object:
            if name == STOCK:
                return StockScores(self.model, self.head, whole, prompt, batch, tokens)
            shared = name == OURS
            return TreeScores.one_shot(self.model, self.head, begin, rest, batch, tokens, shared)

        def step_wise(name: str, step: int) -> object:
            end = (step + 1) * tokens
            if name == STOCK:
                return StockScores(self.model, self.head, whole[:, : prompt + end], prompt, batch, end)
            ids = rest[:, step * tokens : end]
            torch.manual_seed(step)  # the KV before it: the same for both
            return TreeScores.increment(self.model, self.head, candidates, prompt, step * tokens, ids, name == OURS)

        kept = prompt + candidates * steps * tokens
        entry["one_shot"] = self.scores([one_shot], 1, kept, TOO_LONG, (OURS, NOT_SHARED, STOCK))
        done = [functools.partial(step_wise, step=steps * third // 6) for third in (1, 3, 5)]
        entry["step_wise"] = self.scores(done, steps, kept, "", (OURS, NOT_SHARED))
        return entry

    def scores(self, makes: list[Callable], times: int, tokens: int, no_graph: str, alike: tuple[str, ...]) -> dict:
        """`makes`: the call of a method, by its name. So many `times` the mean over them are its seconds. The methods
        in `alike` give the same scores."""
        entry: dict = {"methods": {}, "missing": {}, "wrong": []}
        known: list[Tensor] = []  # of each call, the first method's

        def measure(name: str) -> dict:
            found: dict[str, list] = {}
            without = no_graph or (STOCK_WAITS if name == STOCK else "")
            for i, make in enumerate(makes):
                call = make(name)
                got = call.step().clone()
                one: dict = {}
                if name in alike:
                    if len(known) <= i:
                        known.append(got)
                    one["error"] = self.compare(name, got, known[i])
                one["eager_s"] = self.seconds(call.step, 1, 2)
                one["parts"] = self.parts(call.step, one["eager_s"])
                if without:
                    one["missing_graph"] = without
                else:
                    one |= self.graph_of(call, lambda step: self.seconds(step, 1, 2))
                for key, value in one.items():
                    found.setdefault(key, []).append(value)
                del call
            return summed(found, times)

        for name in (OURS, NOT_SHARED, STOCK):
            self.attempt(entry, name, tokens if name != STOCK else 0, functools.partial(measure, name))
        return entry


def summed(found: dict[str, list], times: int) -> dict:
    """A method's entry, from what was found at each length: so many times the means; the largest errors."""
    result: dict = {name: max(values) for name, values in found.items() if name.endswith("error")}
    for name in ("eager_s", "graph_s"):
        if len(found.get(name, ())) == len(found["eager_s"]):
            result[name] = times * statistics.fmean(found[name])
    names = [name for name in PARTS if any(name in parts for parts in found["parts"])]
    result["parts"] = {
        name: times * statistics.fmean(parts.get(name, 0.0) for parts in found["parts"]) for name in names
    }
    if "missing_graph" in found:
        result["missing_graph"] = found["missing_graph"][0]
    return result


def told(what: str, entry: dict) -> str:
    """A line of the table."""
    modes = (("eager_s", "eager"), ("graph_s", "graph"))
    texts = [
        f"{name} " + ", ".join(f"{run[key]:.2f} s {mode}" for key, mode in modes if key in run)
        for name, run in entry["methods"].items()
        if "eager_s" in run or "graph_s" in run
    ]
    return f"{what}: " + "; ".join(texts + [f"no {name}" for name in entry["missing"] if "graph" not in name])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.models", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dry", action="store_true")
    given = parser.parse_args()
    settings = DRY if given.dry else FULL
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models, found = Models(settings, device), {"decode": [], "score": []}
    print(f"logits of ours and stock differ by {models.check():.2g} of the largest", flush=True)
    wrong = []

    def keep(kind: str, entry: dict, *lines: tuple[str, dict]) -> None:
        found[kind].append(entry)
        given.out.write_text(json.dumps(found, allow_nan=False))
        for what, runs in lines:
            print(told(what, runs), flush=True)
            wrong.extend(f"wrong: {name} of {what}: {runs['missing'][name]}" for name in runs["wrong"])

    for case in settings["decode"]:
        entry = models.decode(*case)
        keep("decode", entry, ("decode N={} over {} + {}".format(*case), entry))
    entry = models.score(**settings["score"])
    keep(
        "score",
        entry,
        *((f"{kind} scores of {entry['candidates']}", entry[kind]) for kind in ("one_shot", "step_wise")),
    )
    for text in wrong:
        print(text)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
