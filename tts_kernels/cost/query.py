"""What a query costs: ten parts that sum to the whole, modelled, and measured where measurements were given."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tts_kernels.errors import check_int, fail

from .account import DECODE, PARTS, PREFILL_RATE, Account, Efficiency, ScoringCall
from .checks import check_choice, check_number, fail_unknown
from .hardware import Hardware, as_hardware
from .shapes import BF16, ModelShape, as_model
from .workload import Workload

SHARINGS = {
    "copies": "V0: the prompt is prefilled, stored and read once per candidate (stock transformers)",
    "paged": "V1: stored once, read once per candidate and step; verifiers encode it anew (vLLM, SGLang)",
    "tree": "V2: stored once, read once per step; verifiers encode each distinct token once (these kernels)",
}
REGIMES = {
    "isolated": "this query alone on the device: every step reads the weights for its candidates only",
    "saturated": "other queries fill the batch: a query pays its share of the weights, and nothing idles",
}
SYMBOLS = {"$": "USD", "€": "EUR", "£": "GBP", "¥": "JPY"}
# Commas between thousands only: "2,5 EUR" is neither 2.5 nor 25.
AMOUNT = r"(?:\d{1,3}(?:,\d{3})+|[\d_]*\d)(?:\.\d*)?(?:e[+-]?\d+)?|\.\d+"


@dataclass(frozen=True)
class Price:
    """Of an hour of one GPU, in a currency: Price(2.0, "USD"). Never baked in: prices change by the month."""

    amount: float
    currency: str

    def __post_init__(self) -> None:
        check_number("price", self.amount, least=0)
        if not isinstance(self.currency, str) or not re.fullmatch("[A-Z]{3}", self.currency):
            fail("price: currency", "three capital letters, such as 'USD'", repr(self.currency))

    @classmethod
    def parse(cls, price: Price | str | tuple[float, str], name: str = "price") -> Price:
        """From "2 USD", "2.5 EUR/h", "$2" or (2.0, "USD"). A bare number is refused: of what?"""
        if isinstance(price, Price):
            return price
        if isinstance(price, (tuple, list)) and len(price) == 2:
            return cls(check_number(name, price[0], least=0), price[1])
        if not isinstance(price, str):
            fail(name, "an amount with its currency, such as '2 USD'", repr(price), TypeError)
        text = re.sub(r"/\s*(gpu[- ]?)?h(our)?$", "", price.strip(), flags=re.IGNORECASE).strip()
        match = re.fullmatch(rf"([$€£¥]?)\s*({AMOUNT})\s*([A-Za-z]{{3}})?", text)
        symbol, amount, code = match.groups() if match else ("", "", "")
        of_symbol, code = SYMBOLS.get(symbol, ""), (code or "").upper()
        if not (of_symbol or code) or (of_symbol and code not in ("", of_symbol)):
            fail(name, "an amount with its currency, such as '2 USD'", repr(price))
        return cls(float(amount.replace(",", "").replace("_", "")), code or of_symbol)


@dataclass(frozen=True)
class Part:
    """One of the ten parts of a query.

    flops, bytes       modelled
    ceiling_seconds    the least they take at the ceilings and efficiencies given: max(FLOPs / rate, bytes / bandwidth),
                       op by op
    measured_seconds, measured_bytes   of a run, where there was one
    """

    flops: float
    bytes: float
    ceiling_seconds: float
    measured_seconds: float | None = None
    measured_bytes: float | None = None

    @property
    def seconds(self) -> float:
        """Measured where it was measured, else modelled."""
        return self.ceiling_seconds if self.measured_seconds is None else self.measured_seconds


@dataclass(frozen=True)
class QueryCost:
    """What one query costs; with several queries in the workload, the mean of them. Made by `query_cost`.

    parts            a Part for each name in PARTS; they sum to the whole
    kv_byte_seconds  KV bytes held, times the modelled seconds of decode that they are held for; a saturated device
                     shares its seconds, so there it is a lower bound
    peak_kv_bytes    the most KV held at once, of the whole batch of queries; candidates that ended release theirs
    watts            mean power while the query runs; None: no joules
    verifier_kv_bytes   KV that a verifier keeps between the steps of a search: of a tree alone, others encode again
    scoring          calls of the verifier that were given; C(n) of m, marginal cost and fit have those that the
                     workload implies, for every n
    """

    workload: Workload
    model: ModelShape
    hardware: Hardware
    sharing: str
    regime: str
    efficiency: Efficiency
    price: Price | None
    watts: float | None
    element_bytes: int
    parts: Mapping[str, Part]
    kv_byte_seconds: float
    peak_kv_bytes: float
    verifier_kv_bytes: float = 0.0
    scoring: Sequence[ScoringCall] | None = None

    # --- totals -----------------------------------------------------------------------------------------------------

    @property
    def seconds(self) -> float:
        """GPU seconds: the sum of the parts, each measured where it was measured, else modelled."""
        return sum(part.seconds for part in self.parts.values())

    @property
    def flops(self) -> float:
        return sum(part.flops for part in self.parts.values())

    @property
    def bytes(self) -> float:
        return sum(part.bytes for part in self.parts.values())

    @property
    def ceiling_seconds(self) -> float:
        """All parts modelled: op by op the larger of compute and memory, ops one after another."""
        return sum(part.ceiling_seconds for part in self.parts.values())

    @property
    def overlapped_seconds(self) -> float:
        """The same with perfect overlap: the larger of all compute and all memory (as llm-analysis has it)."""
        return max(self._compute_seconds, self._memory_seconds)

    @property
    def additive_seconds(self) -> float:
        """The same without any overlap: all compute plus all memory (as Kinetics has it, arXiv 2506.05333)."""
        return self._compute_seconds + self._memory_seconds

    @property
    def decode_seconds(self) -> float:
        """Of the decode steps alone: linear layers, attention, head, straggler idle. (The head's row of the prefill is
        among them.)"""
        return sum(self.parts[name].seconds for name in DECODE)

    @property
    def kv_read_bytes(self) -> float:
        """KV that decode attention reads: parts decode_attn_prefix and decode_attn_suffix."""
        return self.parts["decode_attn_prefix"].bytes + self.parts["decode_attn_suffix"].bytes

    @property
    def kv_gb_seconds(self) -> float:
        """KV GB s, 1 GB = 1e9 bytes; see kv_byte_seconds."""
        return self.kv_byte_seconds / 1e9

    @property
    def memory_bytes(self) -> float:
        """What has to fit: weights of the policy, of a verifier of its own shape or another, the most KV, and what a
        verifier keeps of it. (After the last step KV is let go of, and a verifier needs it for a candidate at least.)
        """
        weights = self.model.num_parameters
        if self.workload.verifier != "none":
            weights += (self.workload.verifier_model or self.model).num_parameters
        return weights * self.element_bytes + self.peak_kv_bytes + self.verifier_kv_bytes

    @property
    def fits(self) -> bool | None:
        """Whether that fits one device; None where its memory is not known."""
        return None if self.hardware.memory is None else self.memory_bytes <= self.hardware.memory

    @property
    def money(self) -> float | None:
        """GPU seconds times the price of an hour / 3600, in the price's currency; None without a price."""
        return None if self.price is None else self.seconds * self.price.amount / 3600

    @property
    def dollars(self) -> float | None:
        """`money` where the price is in USD; None without a price. Raises ValueError in another currency."""
        if self.price is not None and self.price.currency != "USD":
            fail("price", "US dollars; see money for other currencies", self.price.currency)
        return self.money

    @property
    def joules(self) -> float | None:
        """GPU seconds times watts; None without watts."""
        return None if self.watts is None else self.seconds * self.watts

    @property
    def figures(self) -> str:
        """Where the seconds are from: "model", "measured" (every part that takes time), or "model and measured"."""
        measured = [part.measured_seconds is not None for part in self.parts.values() if part.seconds]
        return "measured" if measured and all(measured) else "model and measured" if any(measured) else "model"

    # --- the N-th candidate -----------------------------------------------------------------------------------------

    def ceiling_of(self, n: int) -> float:
        """Modelled seconds of the same query with n of its candidates: the mean over groups of n that use them once."""
        kept = self._kept
        if n not in kept:
            groups = self.workload.groups(n)
            costs = [_modelled(group, self).ceiling_seconds for group in groups]
            kept[n] = sum(costs) / len(costs)
        return kept[n]

    @property
    def m(self) -> float:
        """m(N) = C(N) / C(1), modelled: so many times as dear as one of its candidates alone, unverified."""
        return self.ceiling_of(self.workload.n) / self.ceiling_of(1)

    @property
    def marginal_seconds(self) -> float:
        """Modelled: what a candidate of the second half adds, (C(N) - C(N/2)) / (N/2). With N = 1, C(1)."""
        n, half = self.workload.n, self.workload.n // 2
        return (self.ceiling_of(n) - self.ceiling_of(half)) / (n - half) if half else self.ceiling_of(n)

    @property
    def fit(self) -> tuple[float, float]:
        """Modelled (fixed, per candidate) seconds: the least-squares line through C(n), n = 2, 4, 8 .. N, which have a
        verifier if any has; through C(1) and C(N) where there are fewer than two of these."""
        n = self.workload.n
        counts = sorted({2**i for i in range(1, n.bit_length()) if 2**i <= n} | {n})
        if len(counts) < 2:
            counts = sorted({1, n})
        costs = [self.ceiling_of(count) for count in counts]
        if len(counts) == 1:
            return 0.0, costs[0]
        x, y = sum(counts) / len(counts), sum(costs) / len(costs)
        slope = sum((c - x) * (s - y) for c, s in zip(counts, costs)) / sum((c - x) ** 2 for c in counts)
        return y - slope * x, slope

    # --- measurements -----------------------------------------------------------------------------------------------

    def with_measured(self, seconds: Mapping[str, float], bytes: Mapping[str, float] | None = None) -> QueryCost:
        """The same with measured seconds, and bytes as the ops counted them, of the parts named."""
        for name, measured in (("seconds", seconds), ("bytes", bytes or {})):
            for part, value in measured.items():
                if part not in PARTS:
                    fail_unknown(name, part, PARTS)
                check_number(f"{name}[{part!r}]", value, least=0)
        parts = {
            name: dataclasses.replace(
                part,
                measured_seconds=seconds.get(name, part.measured_seconds),
                measured_bytes=(bytes or {}).get(name, part.measured_bytes),
            )
            for name, part in self.parts.items()
        }
        return dataclasses.replace(self, parts=parts)

    def to_dict(self) -> dict:
        """Plain data, for JSON."""
        return {
            "workload": self.workload.name,
            "n": self.workload.n,
            "model": self.model.name,
            "hardware": self.hardware.name,
            "hardware_source": self.hardware.source,
            "sharing": self.sharing,
            "regime": self.regime,
            "efficiency": dataclasses.asdict(self.efficiency),
            "element_bytes": self.element_bytes,
            "figures": self.figures,
            "seconds": self.seconds,
            "decode_seconds": self.decode_seconds,
            "flops": self.flops,
            "bytes": self.bytes,
            "kv_read_bytes": self.kv_read_bytes,
            "kv_gb_seconds": self.kv_gb_seconds,
            "memory_bytes": self.memory_bytes,
            "fits": self.fits,
            "m": self.m,
            "marginal_seconds": self.marginal_seconds,
            "fixed_and_per_candidate_seconds": list(self.fit),
            "price": None if self.price is None else dataclasses.asdict(self.price),
            "money": self.money,
            "joules": self.joules,
            "parts": {name: dataclasses.asdict(part) for name, part in self.parts.items()},
        }

    @functools.cached_property
    def _kept(self) -> dict[int, float]:
        return {} if self.scoring is not None else {self.workload.n: self.ceiling_seconds}

    @property
    def _compute_seconds(self) -> float:
        rate, share = self.hardware.bf16_flops, self.efficiency
        return sum(
            part.flops / (rate * (share.prefill if name in PREFILL_RATE else share.compute))
            for name, part in self.parts.items()
        )

    @property
    def _memory_seconds(self) -> float:
        return self.bytes / (self.hardware.bandwidth * self.efficiency.bandwidth)


def query_cost(
    workload: Workload,
    model: ModelShape | str,
    hardware: Hardware | str,
    *,
    sharing: str = "tree",
    regime: str = "isolated",
    price: Price | str | tuple[float, str] | None = None,
    watts: float | None = None,
    efficiency: Efficiency | None = None,
    element_bytes: int = BF16,
    scoring: Sequence[ScoringCall] | None = None,
) -> QueryCost:
    """The modelled cost of a query on one device, part by part (the accounting of account.py; the formulas are
    those of Hydragen, arXiv 2402.05099, for KV, the roofline for time).

    workload    N candidates, their lengths, search and verifier
    model       the policy: a ModelShape or the name of a preset
    hardware    a Hardware, the name of a preset, or "measured" for this machine
    sharing     "copies" (V0), "paged" (V1) or "tree" (V2): SHARINGS says what each does
    regime      "isolated" or "saturated": REGIMES
    price       of a GPU hour, with its currency: Price(2.0, "USD"), "2 USD"
    watts       mean power, for joules
    efficiency  shares of the ceilings that are reached; default all 1, so that seconds are floors
    element_bytes   of weights and KV: 2, bf16; 4 for a run in fp32, on a Hardware whose rate is that of fp32

    scoring     calls of the verifier as a run made them, in place of those that the workload implies

    Sharing a prefix of P tokens between N samples of S tokens divides kv_read_bytes by `kv_saving(N, P, S)` at most:
    by about 1 for a short prompt and a long chain of thought. Raises ValueError for a context beyond the model's limit.
    """
    if not isinstance(workload, Workload):
        fail("workload", "a Workload", type(workload).__name__, TypeError)
    model, hardware = as_model(model), as_hardware(hardware)
    check_choice("sharing", sharing, SHARINGS)
    check_choice("regime", regime, REGIMES)
    if efficiency is None:
        efficiency = Efficiency()
    elif not isinstance(efficiency, Efficiency):
        fail("efficiency", "an Efficiency", type(efficiency).__name__, TypeError)
    if watts is not None:
        check_number("watts", watts, least=0)
    price = None if price is None else Price.parse(price)
    element_bytes = check_int("element_bytes", element_bytes, 1)
    workload.check_context(model)
    account = Account(workload, model, hardware, sharing, regime, efficiency, element_bytes)
    account.generate()
    account.verify(scoring)
    parts = {name: Part(*sums) for name, sums in account.scaled().items()}
    return QueryCost(
        workload, model, hardware, sharing, regime, efficiency, price, watts, element_bytes, parts,
        account.kv_byte_seconds / workload.queries, account.peak_kv_bytes, account.verifier_kv_bytes, scoring,
    )  # fmt: skip


def _modelled(workload: Workload, like: QueryCost) -> QueryCost:
    return query_cost(
        workload,
        like.model,
        like.hardware,
        sharing=like.sharing,
        regime=like.regime,
        efficiency=like.efficiency,
        element_bytes=like.element_bytes,
    )
