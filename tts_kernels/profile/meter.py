"""Which part each second of a running query belongs to, and what its ops move and compute.

Nothing in the models, the search or the verifiers knows of this: for the time of a run the functions in `places` and
transformers' attention function are replaced by ones that call them inside of a range of the clock.

Counted are the operands of the calls, in the units of cost/account.py: matrices of the layers once per forward; KV,
written once per new token and read as often as the call's plan or key tensor says; logits of the policy written and
read in fp32. So they can be compared to the model to the byte. Not counted are activations and what a library copies on
its way: transformers concatenates its cache in every step and repeats KV heads, whose time is that of attention.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tts_kernels import stock
from tts_kernels.cost import PARTS, Hardware
from tts_kernels.cost.account import LOGITS
from tts_kernels.integrations import transformers_attention
from tts_kernels.scoring import ScoreHead
from tts_kernels.search import policy as policy_module
from tts_kernels.tree.checks import fail
from tts_kernels.verifier import Verifier
from tts_kernels.verifier import verifier as verifier_module

from .clock import Clock
from .work import Forward, common_prefix, matrices


class Meter:
    """Seconds, bytes and FLOPs of the ten parts of one query.

    Two parts that run in one launch (keys of the prefix and of the suffix in decode, both halves of a verifier's
    forward) share its seconds in the ratio of what they take at the ceilings of `hardware`.
    """

    def __init__(self, clock: Clock, hardware: Hardware, policy: PreTrainedModel, verifier: Verifier,
                 progress: Callable[[], None] = lambda: None):  # fmt: skip
        self.clock, self.hardware, self.progress = clock, hardware, progress
        self.policy, self.verifier = policy, verifier
        self.seconds, self.bytes, self.flops = (dict.fromkeys(PARTS, 0.0) for _ in range(3))
        self.prompt = 0  # tokens; known when it is prefilled
        self.shared = 0  # tokens with which all candidates begin, as the verifier reads them
        self.verifier_forwards = 0
        self.ids: list[tuple[int, ...]] = []  # of the candidates
        self._forward: Forward | None = None
        self._decode = False
        self._steps: list[tuple[int, float]] = []  # (rows, seconds) of the decode steps' layers
        self._heads: list[tuple[int, float]] = []  # and of their LM heads; the first is the prefill's

    # --- where ranges begin and end ---------------------------------------------------------------------------------

    def places(self, policy: object) -> Iterator[tuple[object, str, Callable]]:
        """(owner, name of the function, from that to what is called in its place)."""
        model = self.verifier.models[0]
        yield self.policy.get_decoder(), "forward", self._policy_forward
        yield self.policy.get_output_embeddings(), "forward", self._policy_head
        yield policy_module, "sampler", self._sampler
        yield stock.Draw, "__call__", functools.partial(self._timed, "head_sampling")
        yield DynamicLayer, "update", self._cache
        yield policy, "sample_steps", self._sampled
        yield model.get_decoder() if hasattr(model, "get_decoder") else model, "forward", self._verifier_forward
        if (head := model.get_output_embeddings()) is not None:
            yield head, "forward", self._verifier_logits
        yield stock, "head_logits", functools.partial(self._score_head, lambda head, x: (head, x[..., 0].numel()))
        yield verifier_module, "step_scores", functools.partial(
            self._score_head, lambda hidden, positions, head, **_: (head, len(positions))
        )  # fmt: skip
        yield stock.StockVerifier, "_probabilities", functools.partial(self._timed, "prm_head")
        yield stock.StockVerifier, "score_sequences", self._sequences
        yield Verifier, "_steps", self._sequences

    @contextlib.contextmanager
    def attached(self, policy: object) -> Iterator[None]:
        """`policy`: the Policy or StockPolicy that samples."""
        with contextlib.ExitStack() as stack:
            for name in {transformers_attention.NAME, *map(implementation, (self.policy, self.verifier.models[0]))}:
                stack.enter_context(replaced_item(ALL_ATTENTION_FUNCTIONS, name, self._attention))
            for owner, name, wrap in self.places(policy):
                stack.enter_context(replaced(owner, name, wrap))
            yield

    def _timed(self, part: str, inner: Callable) -> Callable:
        @functools.wraps(inner)
        def run(*args, **kwargs):
            with self.clock(part) as span:
                out = inner(*args, **kwargs)
            self._add(part, span.seconds, 0, 0)
            return out

        return run

    def _attention(self, inner: Callable) -> Callable:
        @functools.wraps(inner)
        def run(module, query, key, value, *args, **kwargs):
            self._forward.see(query, key, value)
            with self._attending():
                return inner(module, query, key, value, *args, **kwargs)

        return run

    def _cache(self, inner: Callable) -> Callable:
        @functools.wraps(inner)
        def run(*args, **kwargs):
            with self._attending():
                return inner(*args, **kwargs)

        return run

    @contextlib.contextmanager
    def _attending(self) -> Iterator[None]:
        """A range of its own in decode alone; elsewhere attention belongs to the part of its forward."""
        if not self._decode:
            yield
            return
        with self.clock("decode_attn") as span:
            yield
        self._forward.attention_seconds += span.seconds

    def _sampler(self, inner: Callable) -> Callable:
        return functools.wraps(inner)(lambda *args: self._timed("head_sampling", inner(*args)))

    def _sampled(self, inner: Callable) -> Callable:
        @functools.wraps(inner)
        def run(*args, **kwargs):
            steps = inner(*args, **kwargs)
            self.ids = [step.ids for step in steps]
            return steps

        return run

    def _sequences(self, inner: Callable) -> Callable:
        @functools.wraps(inner)
        def run(verifier, sequences, *args):
            self.shared = common_prefix([sequence.ids for sequence in sequences])
            return inner(verifier, sequences, *args)

        return run

    # --- the policy -------------------------------------------------------------------------------------------------

    def _policy_forward(self, inner: Callable) -> Callable:
        weights = matrices(self.policy.get_decoder())

        @functools.wraps(inner)
        def run(*args, **kwargs):
            self._forward, self._decode = Forward(), self.prompt > 0
            with self.clock("decode_linear" if self._decode else "prefill_prefix") as span:
                out = inner(*args, **kwargs)
            (self._count_decode if self._decode else self._count_prefill)(self._forward, span.seconds, *weights)
            self._forward, self._decode = None, False
            self.progress()
            return out

        return run

    def _count_prefill(self, seen: Forward, seconds: float, elements: int, size: int) -> None:
        work = seen.work
        self.prompt = work.rows[0][1]
        moved = size + (work.num_rows + work.tokens_read) * seen.kappa
        self._add("prefill_prefix", seconds, moved, 2 * elements * work.num_rows + seen.flops * work.pairs)

    def _count_decode(self, seen: Forward, seconds: float, elements: int, size: int) -> None:
        """Keys of the prompt are the prefix, whoever's rows see them."""
        work = seen.work
        rows, shared = work.num_rows, work.below(self.prompt).tokens_read
        self._steps.append((rows, seconds))
        self._add("decode_linear", seconds, size + rows * seen.kappa, 2 * elements * rows)
        self._split(
            seen.attention_seconds,
            ("decode_attn_prefix", shared * seen.kappa, seen.flops * self.prompt * rows),
            ("decode_attn_suffix", (work.tokens_read - shared) * seen.kappa,
             seen.flops * (work.pairs - self.prompt * rows)),
        )  # fmt: skip

    def _policy_head(self, inner: Callable) -> Callable:
        weight = self.policy.get_output_embeddings().weight

        @functools.wraps(inner)
        def run(hidden):
            with self.clock("head_sampling") as span:
                out = inner(hidden)
            rows = out[..., 0].numel()
            self._heads.append((rows, span.seconds))
            self._add("head_sampling", span.seconds, weight.nbytes + LOGITS * out.numel(), 2 * weight.numel() * rows)
            return out

        return run

    def finish(self, n: int) -> None:
        """The outermost range, host_gap, has ended. Moves to straggler_idle what layers and head cost, in steps of
        fewer than n rows, beyond the share of these rows."""
        self.seconds["host_gap"] = self.clock.seconds["host_gap"]
        layers, head = matrices(self.policy.get_decoder())[1], self.policy.get_output_embeddings().weight.nbytes
        for part, steps, size in (("decode_linear", self._steps, layers), ("head_sampling", self._heads[1:], head)):
            most = max((rows for rows, _ in steps), default=0)
            full = [seconds for rows, seconds in steps if rows == most]
            for rows, seconds in steps:
                if rows < n:
                    price = min(seconds, rows * sum(full) / len(full) / most)
                    self._add("straggler_idle", seconds - price, size * (n - rows) / n, 0)
                    self._add(part, price - seconds, -size * (n - rows) / n, 0)

    # --- the verifier -----------------------------------------------------------------------------------------------

    def _verifier_forward(self, inner: Callable) -> Callable:
        model = self.verifier.models[0]
        elements, size = matrices(model.get_decoder() if hasattr(model, "get_decoder") else model)

        @functools.wraps(inner)
        def run(*args, **kwargs):
            self._forward = Forward()
            with self.clock("prm") as span:
                out = inner(*args, **kwargs)
            seen, self._forward = self._forward, None
            self.verifier_forwards += 1
            work = seen.work
            parts = []
            total, below = work.num_rows, work.below(self.shared)
            for part, rows, reads, pairs in (
                ("prm_prefix", below.num_rows, below.tokens_read, below.pairs),
                ("prm_suffix", total - below.num_rows, work.tokens_read - below.tokens_read, work.pairs - below.pairs),
            ):
                parts.append((part, size * rows / total + (rows + reads) * seen.kappa,
                              2 * elements * rows + seen.flops * pairs))  # fmt: skip
            self._split(span.seconds, *parts)
            self.progress()
            return out

        return run

    def _verifier_logits(self, inner: Callable) -> Callable:
        weight = self.verifier.models[0].get_output_embeddings().weight

        @functools.wraps(inner)
        def run(hidden):
            with self.clock("prm_head") as span:
                out = inner(hidden)
            rows = out[..., 0].numel()
            self._add("prm_head", span.seconds, weight.nbytes + hidden.nbytes + 4 * out.numel(),
                      2 * weight.numel() * rows)  # fmt: skip
            return out

        return run

    def _score_head(self, read: Callable[..., tuple[ScoreHead, int]], inner: Callable) -> Callable:
        """`read`: the head and the number of rows among the arguments of `inner`."""

        @functools.wraps(inner)
        def run(*args, **kwargs):
            with self.clock("prm_head") as span:
                out = inner(*args, **kwargs)
            head, rows = read(*args, **kwargs)
            layers = [layer for layer in (head.w1, head.w2) if layer is not None]
            moved = sum(layer.nbytes for layer in layers)
            moved += rows * (head.dim * layers[0].element_size() + 4 * len(head.w2))
            self._add("prm_head", span.seconds, moved, 2 * rows * sum(layer.numel() for layer in layers))
            return out

        return run

    # --- sums -------------------------------------------------------------------------------------------------------

    def _add(self, part: str, seconds: float, moved: float, flops: float) -> None:
        self.seconds[part] += seconds
        self.bytes[part] += moved
        self.flops[part] += flops

    def _split(self, seconds: float, *parts: tuple[str, float, float]) -> None:
        """Of one launch: (part, bytes, FLOPs)."""
        least = [max(moved / self.hardware.bandwidth, flops / self.hardware.bf16_flops) for _, moved, flops in parts]
        for (part, moved, flops), ceiling in zip(parts, least):
            self._add(part, seconds * ceiling / sum(least), moved, flops)


@contextlib.contextmanager
def replaced(owner: Any, name: str, wrap: Callable[[Callable], Callable]) -> Iterator[None]:
    """The function `name` of a module, class or object is wrap(that function), until the end."""
    own, before = name in vars(owner), getattr(owner, name)
    setattr(owner, name, wrap(before))
    try:
        yield
    finally:
        setattr(owner, name, before) if own else delattr(owner, name)


@contextlib.contextmanager
def replaced_item(mapping: MutableMapping, key: str, wrap: Callable[[Callable], Callable]) -> Iterator[None]:
    """The same of transformers' attention functions, in the mapping that models look into."""
    mapping[key] = wrap(mapping[key])
    try:
        yield
    finally:
        del mapping[key]  # what is registered for all mappings is seen again


def implementation(model: PreTrainedModel) -> str:
    name = model.config.get_text_config(decoder=True)._attn_implementation
    if name not in ALL_ATTENTION_FUNCTIONS:
        fail("model", "an attention implementation that can be timed, such as sdpa", name)
    return name
