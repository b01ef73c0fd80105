"""The same query three ways, each run once under a clock and modelled as it ran."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tts_kernels.cost import Hardware, ModelShape, QueryCost, Workload, query_cost
from tts_kernels.cost.account import ScoringCall
from tts_kernels.search import Policy, SearchResult, best_of_n, majority
from tts_kernels.stock import StockPolicy, StockVerifier
from tts_kernels.tree.pack import pack
from tts_kernels.tree.plan import LENGTH, PAGE_BEGIN, PARENT, TreePlan
from tts_kernels.verifier import Verifier

from .clock import Clock, joules
from .meter import Meter, replaced
from .work import common_prefix

BATCH = 8  # candidates that stock code scores at a time, as search-and-learn does
WITHIN = 0.02  # of the wall time: how far the sum of the parts may be from it
WAYS = {
    "copies": "stock copies: transformers' generate prefills and reads the prompt for each candidate; its verifier "
    f"encodes {BATCH} padded candidates at a time, LM head on every token",
    "paged": "paged without shared reads: the prompt is stored once and read for each candidate, by the same kernels; "
    "the verifier encodes one candidate at a time, LM head on every token",
    "tree": "ours: the prompt is read once for all candidates, and the verifier encodes each distinct token once",
}


@dataclass
class Query:
    """What is run: models, the question, and how its n candidates are sampled.

    prompt    the policy's token ids of the question
    max_new_tokens, temperature, seed   as in `search.Options`
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    policy: Policy
    verifier: Verifier
    question: str
    prompt: list[int]
    n: int
    max_new_tokens: int
    temperature: float = 1.0
    seed: int = 0

    @classmethod
    def make(
        cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, verifier: Verifier, question: str, n: int,
        max_new_tokens: int, *, page_size: int = 16, backend: str | None = None, **sampling: float,
    ) -> Query:  # fmt: skip
        """With a policy whose tree has room for all of it."""
        prompt = Policy(model, tokenizer, max_tokens=1).prompt(question)
        ids = list(tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt)
        pages = -(-len(ids) // page_size) + n * -(-max_new_tokens // page_size)
        policy = Policy(model, tokenizer, max_tokens=pages * page_size, page_size=page_size, backend=backend,
                        prompt=lambda _: ids)  # fmt: skip
        return cls(model, tokenizer, policy, verifier, question, ids, n, max_new_tokens, **sampling)

    def players(self, way: str) -> tuple[object, object]:
        """Policy and verifier of a way."""
        if way == "tree":
            return self.policy, self.verifier
        if way == "paged":
            return self.policy, StockVerifier(self.verifier, batch_size=1)
        policy = StockPolicy(self.model, self.tokenizer, prompt=lambda _: self.prompt)
        return policy, StockVerifier(self.verifier, batch_size=BATCH)

    def run(self, policy: object, verifier: object, n: int, max_new_tokens: int) -> SearchResult:
        """A single candidate is not verified: there is nothing to choose from."""
        options = {"max_new_tokens": max_new_tokens, "temperature": self.temperature, "seed": self.seed,
                   "progress": False}  # fmt: skip
        if n == 1:
            return majority(policy, self.question, n=1, answer=str, **options)  # all of its text
        return best_of_n(policy, verifier, self.question, n=n, **options)


@dataclass(frozen=True)
class Profile:
    """One way, measured.

    cost           modelled and measured, by part
    flops          counted, by part
    wall_seconds   of the whole query
    joules         of the GPU meanwhile; None where they are not counted
    ids            tokens of the candidates
    """

    way: str
    cost: QueryCost
    flops: dict[str, float]
    wall_seconds: float
    joules: float | None
    result: SearchResult
    ids: tuple[tuple[int, ...], ...]
    verifier_forwards: int


def profile(query: Query, way: str, hardware: Hardware, now: Callable[[], float] = time.perf_counter) -> Profile:
    """Runs the query one way: briefly to warm up, then under a clock that reads `now`.

    Raises RuntimeError where the parts do not sum to the wall time within 2%."""
    policy, verifier = query.players(way)
    clock, n = Clock(policy.device, now), query.n
    forwards = query.max_new_tokens + (0 if n == 1 else -(-n // verifier.batch_size) if way != "tree" else 1)
    with contextlib.ExitStack() as stack:
        if way == "paged":
            stack.enter_context(replaced(policy, "_plan", lambda plan: lambda *args: unshared(plan(*args))))
        query.run(policy, verifier, min(n, 2), min(query.max_new_tokens, 3))
        bar = stack.enter_context(tqdm(total=forwards, desc=f"{way:7s}", unit="forward", disable=None))
        meter = Meter(clock, hardware, query.model, query.verifier, bar.update)
        stack.enter_context(meter.attached(policy))
        before = joules(policy.device)
        with clock("host_gap"):
            result = query.run(policy, verifier, n, query.max_new_tokens)
        wall, after = clock.wall, joules(policy.device)
    meter.finish(n)
    check_sum(meter.seconds, wall)
    cost = modelled(query, way, hardware, result, meter).with_measured(meter.seconds, meter.bytes)
    used = None if None in (before, after) else after - before
    return Profile(way, cost, meter.flops, wall, used, result, tuple(meter.ids), meter.verifier_forwards)


def check_sum(seconds: dict[str, float], wall: float) -> None:
    total = sum(seconds.values())
    if abs(total - wall) > WITHIN * wall:
        raise RuntimeError(f"parts: expected a sum within {WITHIN:.0%} of the wall time {wall:.6g} s, got {total:.6g}")


def modelled(query: Query, way: str, hardware: Hardware, result: SearchResult, meter: Meter) -> QueryCost:
    """The cost of the lengths that came out, and of the verifier's calls for these candidates."""
    lengths = [max(len(ids) - 1, 1) for ids in meter.ids]  # the last token of each is not computed
    if way == "copies":  # rows that ended are computed until all have
        lengths = [max(lengths)] * len(lengths)
    verifier = query.verifier
    model = verifier.models[0]
    kind = {"vocab_rows": "vocab", "mlp": "mlp", "linear": "linear"}[verifier.recipe.head.kind]
    if kind == "vocab" and model.get_output_embeddings() is None:
        kind = "linear"
    workload = Workload(
        query.n, meter.prompt, tuple(lengths), verifier="none" if query.n == 1 else "prm",
        verifier_model=ModelShape.from_config(model.config), verifier_head=kind,
        steps=max((len(c.steps) for c in result.candidates), default=1) or 1, name="profiled",
    )  # fmt: skip
    return query_cost(
        workload, ModelShape.from_config(query.model.config), hardware, sharing=way,
        element_bytes=query.model.dtype.itemsize, scoring=None if query.n == 1 else scoring_calls(query, way, result),
    )  # fmt: skip


def scoring_calls(query: Query, way: str, result: SearchResult) -> list[ScoringCall]:
    """What the verifier has to encode, from its token ids of the candidates: nothing that a run counted."""
    verifier = query.verifier
    sequences = [
        verifier.encode("candidate", query.question, verifier.recipe.split(c.text))[0] for c in result.candidates
    ]
    ids = [sequence.ids for sequence in sequences]
    shared = common_prefix(ids)
    if way == "tree":
        packed, ends, own = pack(ids), [], []
        for parent, tokens in zip(packed.parent, packed.length):
            begin = ends[parent] if parent >= 0 else 0
            ends.append(begin + tokens)
            if ends[-1] > shared:
                own.append((max(begin, shared), ends[-1] - max(begin, shared)))
        return [ScoringCall(own, [shared] if shared else [], 0, sum(len(s.positions) for s in sequences))]
    size, calls = 1 if way == "paged" else BATCH, []
    for i in range(0, len(ids), size):
        batch = ids[i : i + size]
        calls.append(ScoringCall([(shared, max(map(len, batch)) - shared)] * len(batch), [], 0, 0))
    return calls


def unshared(plan: TreePlan) -> TreePlan:
    """The plan in which every row has nodes of its own for its whole path, over the same pages: so its reads are those
    of a kernel that knows nothing of sharing, and its arithmetic, cut where the tree's is, that of the tree."""
    nodes, grows, _ = plan.host_tables()
    parents, lengths, begins = (nodes[i] for i in (PARENT, LENGTH, PAGE_BEGIN))
    ids, (source, owner) = plan.pages.tolist(), plan.rows.tolist()
    parent: list[int] = []
    length: list[int] = []
    pages: list[list[int]] = []
    rows: list[int] = []
    for _, node in sorted(zip(source, owner)):
        path = [node]
        while parents[path[-1]] >= 0:
            path.append(parents[path[-1]])
        for depth, above in enumerate(reversed(path)):
            room = lengths[above] + (plan.capacity if grows[above] else 0)
            parent.append(len(parent) - 1 if depth else -1)
            length.append(lengths[above])
            pages.append(ids[begins[above] : begins[above] - (-room // plan.page_size)])
            rows.append(int(above == node))
    return TreePlan.from_nodes(parent, length, pages, rows, page_size=plan.page_size, device=plan.device)


def differences(profiles: Sequence[Profile]) -> dict[str, bool | float]:
    """How far the ways gave the same answer: tokens equal, choice equal, largest difference of a step's score."""
    first, *others = profiles
    scores = [[s for c in p.result.candidates for s in c.step_scores] for p in profiles]
    pairs = [(a, b) for other in scores[1:] for a, b in zip(scores[0], other)]
    same = all(len(other) == len(scores[0]) for other in scores)
    return {
        "tokens_equal": all(p.ids == first.ids for p in others),
        "choice_equal": all(p.result.choice == first.result.choice for p in others),
        "score_difference": max((abs(a - b) for a, b in pairs), default=0.0) if same else float("inf"),
    }
