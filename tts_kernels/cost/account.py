"""The accounting of one query: which part computes and moves how much. `query.query_cost` is the door to it.

Written down from the tree, not fitted: W matmul weights, kappa KV bytes per token, a attention FLOPs per query and key.
A decode step of n rows computes 2 W n and reads the weights once; row t of a suffix sees P + t keys, its own included.
Left out: activations between layers, norms, RoPE, communication, page tables, gaps between launches, caches: reads of
one prefix by N candidates are charged to memory N times, though where a layer's prefix stays in a GPU's L2 (50 MB on an
H200: 24,000 tokens of a 7B) some of them come from there. That makes V0 and V1 dearer here than they need be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tts_kernels.errors import fail

from .checks import check_number
from .hardware import Hardware
from .shapes import ModelShape
from .workload import Workload

PARTS = {
    "prefill_prefix": "prompt through the layers; its KV written and read",
    "decode_linear": "weights of the layers read in decode steps, KV of new tokens written",
    "decode_attn_prefix": "decode attention over keys that candidates share: prompt, trunk, kept history of a search",
    "decode_attn_suffix": "decode attention over keys of one candidate",
    "head_sampling": "LM head, fp32 logits written and read once",
    "prm_prefix": "verifier over what candidates share",
    "prm_suffix": "verifier over what one candidate has",
    "prm_head": "score head",
    "host_gap": "device idle between launches: measured only, 0 in the model",
    "straggler_idle": "what linear layers and head cost beyond their price per token while all candidates ran",
}
DECODE = ("decode_linear", "decode_attn_prefix", "decode_attn_suffix", "head_sampling", "straggler_idle")
PREFILL_RATE = ("prefill_prefix", "prm_prefix", "prm_suffix", "prm_head")  # parts that run at the prefill efficiency
LOGITS = 8  # bytes for each logit: fp32, written and read


@dataclass(frozen=True)
class Efficiency:
    """Shares of the ceilings that are reached: of the bandwidth, of bf16 FLOP/s in decode steps, and in prefill and
    verifier passes. All 1: floors. `PLANNED` is what good kernels reach on
    data-center GPUs: a plan, not a measurement."""

    bandwidth: float = 1.0
    compute: float = 1.0
    prefill: float = 1.0

    def __post_init__(self) -> None:
        for name in ("bandwidth", "compute", "prefill"):
            if check_number(name, getattr(self, name), most=1) <= 0:
                fail(name, "more than 0", getattr(self, name))


class ScoringCall(NamedTuple):
    """One forward of a verifier.

    candidates  (tokens before, new tokens) of each
    fresh       the distinct prefixes that a tree has not encoded yet
    past        the distinct tokens whose KV a tree has and reads
    positions   rows that are scored
    """

    candidates: Sequence[tuple[int, int]]
    fresh: Sequence[int]
    past: int
    positions: int


PLANNED = Efficiency(bandwidth=0.8, compute=0.6, prefill=0.5)


class Account:
    """Running sums of one query (or of a batch of them) under one policy of sharing. Not reused."""

    def __init__(
        self,
        workload: Workload,
        model: ModelShape,
        hardware: Hardware,
        sharing: str,
        regime: str,
        rates: Efficiency,
        element: int,
    ) -> None:
        self.workload, self.model, self.sharing, self.element = workload, model, sharing, element
        self.saturated = regime == "saturated"
        self.bandwidth = hardware.bandwidth * rates.bandwidth
        self.compute = hardware.bf16_flops * rates.compute
        self.prefill_rate = hardware.bf16_flops * rates.prefill
        self.flops, self.bytes, self.seconds = (dict.fromkeys(PARTS, 0.0) for _ in range(3))
        self.kv_byte_seconds = self.peak_kv_bytes = self.verifier_kv_bytes = 0.0

    def add(self, part: str, flops: float, moved: float, times: float = 1.0) -> float:
        """So many times the roofline of one op: max(FLOPs / rate, bytes / bandwidth). Returns the seconds of one."""
        rate = self.prefill_rate if part in PREFILL_RATE else self.compute
        seconds = max(flops / rate, moved / self.bandwidth)
        self.flops[part] += flops * times
        self.bytes[part] += moved * times
        self.seconds[part] += seconds * times
        return seconds

    def filled(self, model: ModelShape, tokens: float) -> float:
        """Rows of the pass that so many tokens are part of: they alone, or on a saturated device at least as many as
        take as long to compute as the weights to read."""
        if not self.saturated:
            return tokens
        read = model.body_weights * self.element / self.bandwidth
        return max(tokens, read * self.compute / (2 * model.active_body_weights))

    # --- generation -------------------------------------------------------------------------------------------------

    def generate(self) -> None:
        work = self.workload
        self.prefill()
        prefixes = [prompt + work.trunk for prompt in work.prompts]
        if work.trunk:
            prompts, rows = sum(work.prompts), work.queries
            self.decode(0, work.trunk, rows, rows, prompts, prompts, "decode_attn_prefix")
        if work.search == "best_of_n":
            self.decode_candidates(prefixes)
        else:
            self.decode_search(prefixes)

    def prefill(self) -> None:
        model, work = self.model, self.workload
        copies = work.n if self.sharing == "copies" else 1
        tokens = copies * sum(work.prompts)
        if not tokens:
            return
        attention = model.prefill_flops_per_key * copies * sum(map(triangle, work.prompts))
        moved = self.pass_weights(model, tokens) + 2 * model.kv_bytes(self.element) * tokens
        self.add("prefill_prefix", 2 * model.active_body_weights * tokens + attention, moved)
        rows = copies * work.queries
        self.batched("head_sampling", 2 * model.head_weights, LOGITS * model.vocab_size, self.head, rows, rows, 1)

    def decode_candidates(self, prefixes: list[int]) -> None:
        """In lockstep, without refill: whoever ends leaves."""
        lengths = self.workload.suffixes
        ends = sorted((length, query) for query, of_query in enumerate(lengths) for length in of_query)
        alive = [self.workload.n] * len(prefixes)
        full = rows = len(ends)
        reads, distinct, begin = self.workload.n * sum(prefixes), sum(prefixes), 0
        for end, query in ends:
            if end > begin:
                self.decode(begin, end, rows, full, reads, distinct)
                begin = end
            rows -= 1
            reads -= prefixes[query]
            alive[query] -= 1
            if not alive[query]:
                distinct -= prefixes[query]

    def decode_search(self, prefixes: list[int]) -> None:
        work = self.workload
        rows, each = work.n * work.queries, work.suffix // work.steps
        for step in range(work.steps):
            history = step * each
            reads = work.n * (sum(prefixes) + work.queries * history)
            distinct = sum(prefixes) + work.queries * work.keep * history
            self.decode(0, each, rows, rows, reads, distinct)

    def decode(
        self, begin: int, end: int, rows: int, full: int, reads: int, distinct: int, own: str = "decode_attn_suffix"
    ) -> None:
        """Steps t = begin + 1 .. end, in each of which `rows` rows (of `full` at the start) see t keys of their own and
        `reads` keys of prefixes in all, `distinct` of them different; `own` is the part of their own keys."""
        model, steps = self.model, end - begin
        kappa, a = model.kv_bytes(self.element), model.attention_flops_per_key
        keys, squares = triangle(end) - triangle(begin), pyramid(end) - pyramid(begin)  # sums of t and of t^2
        weights = model.touched_body_weights
        step = self.batched("decode_linear", 2 * model.active_body_weights, kappa, weights, rows, full, steps)
        step += self.batched(
            "head_sampling", 2 * model.head_weights, LOGITS * model.vocab_size, self.head, rows, full, steps
        )
        read = distinct if self.sharing == "tree" else reads
        step += self.add("decode_attn_prefix", a * reads, kappa * read, steps)
        key = self.add(own, a * rows, kappa * rows, keys)
        stored = reads if self.sharing == "copies" else distinct
        # The sum over t of (stored + rows t) tokens that lie there for step + key t seconds.
        self.kv_byte_seconds += kappa * (stored * (step * steps + key * keys) + rows * (step * keys + key * squares))
        self.peak_kv_bytes = max(self.peak_kv_bytes, kappa * (stored + rows * end))

    def head(self, rows: float) -> float:
        return self.model.head_weights

    def batched(
        self,
        part: str,
        flops: float,
        moved: float,
        weights: Callable[[float], float],
        rows: int,
        full: int,
        steps: int,
    ) -> float:
        """Steps in which the weights are read once for all rows, each of which computes `flops` and moves `moved`. The
        part is charged what its rows cost in a full pass; the rest of the step is straggler idle. On a saturated device
        other queries fill the pass, and nothing idles. Returns the seconds of a step."""
        full = self.filled(self.model, full)
        share = rows / full
        read = weights(full) * self.element
        seconds = self.add(part, flops * rows, (read + moved * full) * share, steps)
        if self.saturated or rows == full:
            return seconds
        alone = weights(rows) * self.element
        idle = max(flops * rows / self.compute, (alone + moved * rows) / self.bandwidth) - seconds
        self.bytes["straggler_idle"] += (alone - read * share) * steps
        self.seconds["straggler_idle"] += idle * steps
        return seconds + idle

    def pass_weights(self, model: ModelShape, tokens: int) -> float:
        """Bytes of the layers' weights that a forward over so many tokens is charged."""
        full = self.filled(model, tokens)
        return model.touched_body_weights(full) * self.element * tokens / full

    # --- verification -----------------------------------------------------------------------------------------------

    def verify(self, calls: Sequence[ScoringCall] | None = None) -> None:
        """Copies and paged: every candidate is encoded from its first token on in every scoring call, as in vLLM (with
        ALL pooling prefix-cache reads are skipped, PR #28194), RLHFlow and search-and-learn. Tree: each distinct token
        once, scores kept beside the KV. One call after the generation, or one after each step of a search; or the calls
        given, those of a run."""
        work = self.workload
        if calls is not None:
            for call in calls:
                self.score(*call)
            return
        if work.verifier == "none" or work.n == 1:
            return
        prefixes = [prompt + work.trunk for prompt in work.prompts]
        if work.search == "best_of_n":
            positions = 1 if work.verifier == "orm" else work.steps
            scored = sum(min(positions, length) for lengths in work.suffixes for length in lengths)
            candidates = [(prefix, length) for prefix, of in zip(prefixes, work.suffixes) for length in of]
            self.score(candidates, prefixes, 0, scored)
            return
        each = work.suffix // work.steps
        for step in range(work.steps):
            history = step * each
            candidates = [(prefix + history, each) for prefix in prefixes for _ in range(work.n)]
            past = sum(prefixes) + work.queries * work.keep * history if step else 0
            self.score(candidates, [] if step else prefixes, past, len(candidates))
        if self.sharing == "tree":  # what lies there in the last step, beside the policy's KV
            kappa = (work.verifier_model or self.model).kv_bytes(self.element)
            self.verifier_kv_bytes = kappa * (past or sum(prefixes)) + kappa * work.queries * work.n * each

    def score(self, candidates: Sequence[tuple[int, int]], fresh: Sequence[int], past: int, positions: int) -> None:
        """One scoring call, see ScoringCall."""
        model = self.workload.verifier_model or self.model
        tree, kappa = self.sharing == "tree", model.kv_bytes(self.element)
        prefixes = fresh if tree else [before for before, _ in candidates]
        shared, own = sum(prefixes), sum(new for _, new in candidates)
        weights = self.pass_weights(model, shared + own) / (shared + own)  # for each token
        w, a = 2 * model.active_body_weights, model.prefill_flops_per_key
        moved = (weights + 2 * kappa) * shared + (kappa * past if tree else 0)
        self.add("prm_prefix", w * shared + a * sum(map(triangle, prefixes)), moved)
        keys = sum(before * new + triangle(new) for before, new in candidates)
        self.add("prm_suffix", w * own + a * keys, (weights + 2 * kappa) * own)
        rows = positions if tree else shared + own
        self.add("prm_head", *head_work(self.workload.verifier_head, model, rows, tree, self.element))

    def scaled(self) -> dict[str, tuple[float, float, float]]:
        """(FLOPs, bytes, seconds) of each part, the mean of a query."""
        count = self.workload.queries
        return {part: tuple(sums[part] / count for sums in (self.flops, self.bytes, self.seconds)) for part in PARTS}


def head_work(kind: str, model: ModelShape, rows: int, only_scores: bool, element: int) -> tuple[float, float]:
    """FLOPs and bytes of a score head on so many rows; only_scores: without the logits that nothing reads."""
    hidden, vocab = model.hidden_size, model.vocab_size
    if kind == "vocab" and not only_scores:
        return 2 * hidden * vocab * rows, hidden * vocab * element + rows * (hidden * element + vocab * 4)
    outputs = 1 if kind == "linear" else 2
    weights = hidden * outputs + (hidden * hidden if kind == "mlp" else 0)
    return 2 * weights * rows, weights * element + rows * (hidden * element + outputs * 4)


def triangle(n: int) -> int:
    """1 + 2 + ... + n: keys that n new tokens see among themselves."""
    return n * (n + 1) // 2


def pyramid(n: int) -> int:
    """1 + 4 + ... + n^2."""
    return n * (n + 1) * (2 * n + 1) // 6
