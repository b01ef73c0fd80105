"""`tts-kernels tune` for the ops beside tree_attention: which backend is the fastest, and of token_logprobs the tiles
of its Triton kernel. Each way is checked against the reference before it is timed, and one that runs out of resources
is skipped, by its reason."""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tts_kernels import scoring
from tts_kernels.attention import api as attention
from tts_kernels.configs import KEYS, LogprobConfig, logprob_config
from tts_kernels.dispatch import Backends
from tts_kernels.scoring import ScoreHead

from .inputs import DTYPES, Geometry, error, tolerance
from .timing import Call, cache_bytes, capture, interleave, set_count, synchronize

Way = tuple[str, LogprobConfig | None]  # a backend, and what its kernel is launched with, where that can be chosen


@dataclass(frozen=True)
class Width:
    """Of a verifier: the size of its hidden states, its vocabulary, its dtype. str() and `parse`: "d3584 V152064"."""

    dim: int
    vocabulary: int
    dtype: str = "bf16"

    @classmethod
    def parse(cls, text: str) -> Width:
        try:
            dim, vocabulary, *dtype = text.split()
            if dim[0] != "d" or vocabulary[0] != "V" or len(dtype) > 1 or not {*dtype} <= {*DTYPES} - {"fp8"}:
                raise ValueError
            return cls(int(dim[1:]), int(vocabulary[1:]), *dtype)
        except (ValueError, IndexError):
            raise ValueError(f'width: expected text like "d3584 V152064" or "d64 V300 fp32", got {text!r}') from None

    def __str__(self) -> str:
        return f"d{self.dim} V{self.vocabulary}{'' if self.dtype == 'bf16' else ' ' + self.dtype}"


WIDTHS = ("d3584 V152064", "d4096 V128256")


@dataclass(frozen=True)
class Point:
    """Inputs that ways are timed on.

    calls      of a way, one for each of so many input sets; each returns what it computed
    reference  what the first set gives
    off        of a result and the reference; more than `allowed` is wrong
    set_bytes  that a call reads: sets together fill the L2 many times over
    """

    name: str
    set_bytes: int
    calls: Callable[[Way, int], list[Call]]
    reference: Callable[[], Tensor]
    off: Callable[[Tensor, Tensor], float]
    allowed: float


class Inputs:
    """Random tensors of one point: a generator of its own, sets made when they are asked for."""

    def __init__(self, device: torch.device, make: Callable[[Callable], tuple]) -> None:
        self.device, self.make = device, make
        self.sets: list[tuple] = []

    def __getitem__(self, count: int) -> list[tuple]:
        while len(self.sets) < count:
            generator = torch.Generator(self.device).manual_seed(len(self.sets))
            self.sets.append(
                self.make(lambda *shape, g=generator: torch.randn(*shape, generator=g, device=self.device))
            )
        return self.sets[:count]


def most(got: Tensor, wanted: Tensor) -> float:
    """The largest difference; inf where there is a NaN."""
    return (got.float() - wanted.float()).abs().nan_to_num(nan=torch.inf).max().item()


# --- the ops ---------------------------------------------------------------------------------------------------------


def append_kv_points(g: Geometry, device: torch.device, small: bool) -> Iterator[Point]:
    """A decode step of 64 rows, plain and with RoPE of keys and queries, and a prefill's rows. Keys and values as they
    are: nothing is rounded but by RoPE and by fp8."""
    shape, size = (g.num_kv_heads, g.head_dim), g.page_size
    for rows, rope in ((3, True),) if small else ((64, False), (64, True), (4096, True)):

        def make(randn, rows=rows):
            pages = -(-rows // size) + 3
            cache = torch.zeros(2, pages, size, *shape, device=device).to(g.cache_dtype)
            slots = torch.randperm(pages * size, device=device)[:rows]
            angles = randn(rows, g.head_dim)
            new = (randn(rows, n, g.head_dim).to(g.q_dtype) for n in (g.num_kv_heads, g.num_kv_heads, g.num_q_heads))
            return (*new, cache, slots, angles, torch.arange(rows, device=device))

        def call(inputs: tuple, backend: str, cache: Tensor, rope=rope) -> Tensor:
            k, v, q, _, slots, angles, positions = inputs
            more = {"cos_sin_cache": angles, "positions": positions, "q": q} if rope else {}
            turned = attention.append_kv(k, v, *cache, slots, backend=backend, **more)
            return cache if turned is None else turned

        inputs = Inputs(device, make)

        def off(got: Tensor, wanted: Tensor, inputs=inputs, call=call) -> float:
            """Of the queries, and of both caches."""
            first = inputs[1][0]
            clean = torch.zeros_like(first[3])
            call(first, "reference", clean)
            return max(most(got, wanted), most(first[3], clean))

        def calls(way: Way, count: int, inputs=inputs, call=call) -> list[Call]:
            inputs[1][0][3].zero_()
            return [functools.partial(call, each, way[0], each[3]) for each in inputs[count]]

        def reference(inputs=inputs, call=call) -> Tensor:
            return call(inputs[1][0], "reference", torch.zeros_like(inputs[1][0][3]))

        name = f"R={rows}{' RoPE' if rope else ''}"
        moved = 2 * rows * (g.token_bytes + rope * g.row_bytes)
        rounding = max(torch.finfo(dtype).eps for dtype in (g.q_dtype, g.cache_dtype)) * 8 if rope else 0.0
        yield Point(name, moved, calls, reference, off, rounding)


def merge_states_points(g: Geometry, device: torch.device, small: bool) -> Iterator[Point]:
    for states, rows in ((2, 3),) if small else ((2, 64), (8, 64), (4, 2048)):

        def make(randn, states=states, rows=rows):
            out = randn(states, rows, g.num_q_heads, g.head_dim).to(g.q_dtype)
            return out, randn(states, rows, g.num_q_heads) * 3

        inputs = Inputs(device, make)

        def calls(way: Way, count: int, inputs=inputs) -> list[Call]:
            return [lambda each=each: attention.merge_states(*each, backend=way[0])[0] for each in inputs[count]]

        def reference(inputs=inputs) -> Tensor:
            return attention.merge_states(*inputs[1][0], backend="reference")[0].float()

        yield Point(
            f"S={states} R={rows}", (states + 1) * rows * g.row_bytes, calls, reference, error, tolerance(g.q_dtype)
        )


def step_scores_points(w: Width, device: torch.device, small: bool) -> Iterator[Point]:
    """A head with a hidden layer on a one-shot call's steps and on an increment's, and two rows of an LM head."""
    dtype, d = DTYPES[w.dtype], w.dim
    for kind, steps in (("mlp", 5), ("rows", 5)) if small else (("mlp", 640), ("mlp", 60), ("rows", 60)):

        def make(randn, kind=kind, steps=steps):
            def weight(*shape: int) -> Tensor:
                return (randn(*shape) * 2 * d**-0.5).to(dtype)

            if kind == "mlp":
                head = ScoreHead.mlp(weight(d, d), weight(d), weight(2, d), weight(2))
            else:
                head = ScoreHead.linear(weight(2, d))
            positions = torch.randperm(8 * steps, device=device)[:steps]
            return randn(8 * steps, d).to(dtype), positions, head, torch.arange(0, steps + 1, 5, device=device)

        def call(each: tuple, backend: str) -> Tensor:
            *tensors, offsets = each
            return scoring.step_scores(*tensors, offsets=offsets, backend=backend).prob

        inputs = Inputs(device, make)

        def calls(way: Way, count: int, inputs=inputs, call=call) -> list[Call]:
            return [functools.partial(call, each, way[0]) for each in inputs[count]]

        def reference(inputs=inputs, call=call) -> Tensor:
            return call(inputs[1][0], "reference")

        moved = (steps * d + (d * d if kind == "mlp" else 2 * d)) * dtype.itemsize
        yield Point(f"{kind} M={steps}", moved, calls, reference, most, 1e-2)


def token_logprobs_points(w: Width, device: torch.device, small: bool) -> Iterator[Point]:
    dtype = DTYPES[w.dtype]
    for rows in (7,) if small else (512, 2560):

        def make(randn, rows=rows):
            weight = randn(w.vocabulary, w.dim).mul_(2 * w.dim**-0.5).to(dtype)
            return randn(rows, w.dim).to(dtype), weight, torch.randint(w.vocabulary, (rows,), device=device)

        def call(each: tuple, way: Way) -> Tensor:
            with launched_with(way):
                return scoring.token_logprobs(*each, backend=way[0])

        inputs = Inputs(device, make)

        def calls(way: Way, count: int, inputs=inputs, call=call) -> list[Call]:
            return [functools.partial(call, each, way) for each in inputs[count]]

        def reference(inputs=inputs) -> Tensor:
            return scoring.token_logprobs(*inputs[1][0], backend="reference")

        yield Point(
            f"T={rows}", (w.vocabulary + rows) * w.dim * dtype.itemsize, calls, reference, most, 2e-3
        )  # the bench's: of a logarithm, from fp32 products and sums


class launched_with:
    """The triton backend of token_logprobs takes this config."""

    def __init__(self, way: Way) -> None:
        self.config = way[1]
        self.module = scoring.api.BACKENDS.load("triton") if self.config else None

    def __enter__(self) -> None:
        if self.module:
            self.before, self.module.config_of = self.module.config_of, lambda *_: self.config

    def __exit__(self, *error: object) -> None:
        if self.module:
            self.module.config_of = self.before


LOGPROB_ROUNDS = (
    {"rows": (64, 128), "tokens": (64, 128, 256), "num_warps": (4, 8)},
    {"lanes": (32, 64, 128), "num_stages": (2, 3, 4)},
    {"tile_tokens": (1024, 2048, 4096, 8192)},
)
SMALL_ROUNDS = ({"tokens": (32, 64)}, {"tile_tokens": (64, 128)})


@dataclass(frozen=True)
class Op:
    """An op that has a table.

    key     of a geometry: the numbers of KEYS[name]
    others  backends that are compared beside those with kernels: `reference` waits for the device in some ops, and then
            cannot be captured
    rounds  of the triton kernel's config: values of some fields, all combinations, the others as the best before
    """

    name: str
    family: Backends
    points: Callable[..., Iterator[Point]]
    key: Callable
    others: tuple[str, ...] = ()
    rounds: tuple[dict[str, tuple[int, ...]], ...] = ()
    small_rounds: tuple[dict[str, tuple[int, ...]], ...] = ()

    @property
    def by_width(self) -> bool:
        return self.family is scoring.api.BACKENDS


OPS = {
    op.name: op
    for op in (
        Op("append_kv", attention.BACKENDS, append_kv_points,
           lambda g: (g.num_kv_heads, g.head_dim, g.q_dtype.itemsize, g.cache_dtype.itemsize)),
        Op("merge_states", attention.BACKENDS, merge_states_points,
           lambda g: (g.num_q_heads, g.head_dim, g.q_dtype.itemsize)),
        Op("step_scores", scoring.api.BACKENDS, step_scores_points, lambda w: (w.dim, DTYPES[w.dtype].itemsize)),
        Op("token_logprobs", scoring.api.BACKENDS, token_logprobs_points,
           lambda w: (w.dim, w.vocabulary, DTYPES[w.dtype].itemsize), ("reference",), LOGPROB_ROUNDS, SMALL_ROUNDS),
    )
}  # fmt: skip


# --- the search ------------------------------------------------------------------------------------------------------


def tune(op: Op, geometry: Geometry | Width, device: torch.device, name: str, small: bool, compile_ahead: Callable):
    """(row, wrong): the row of the op's table, without what says when it was measured, and the ways that were wrong.

    compile_ahead  of functions that launch a kernel with tensors of no memory: compiles what they would launch
    """
    trial = Trial(op, list(op.points(geometry, device, small)), device, 2 if small else 9)
    key = dict(zip(KEYS[op.name], op.key(geometry), strict=True))
    config = before = None
    if op.rounds:
        config = before = logprob_config(name, **{"num_bytes" if k == "bytes" else k: v for k, v in key.items()})
        for fields in op.small_rounds if small else op.rounds:
            ways = [("triton", c) for c in dict.fromkeys([config, before, *variants(config, fields)])]
            compile_ahead([functools.partial(no_memory, geometry, way) for way in ways if way not in trial.seconds])
            config = trial.best(ways)[1]
    here = torch.empty(0, device=device)
    names = [n for n in op.family.modules if not op.family.unsupported_reasons(op.name, n, here)]
    names = [n for n in names if n != "reference" or n in op.others]
    best = trial.best([(n, config if n == "triton" else None) for n in names])
    row = key | {
        "config": {k: v for k, v in dataclasses.asdict(config).items() if k != "source"} if config else {},
        "backend": best[0],
        "seconds": trial.seconds["triton", config] if config else trial.seconds[best],
        "backends": {n: trial.mean((n, c)) for n, c in trial.finished() if c is None or c == config},
        "searched": len(trial.seconds),
        "skipped": trial.skipped,
    }
    if before and len(trial.seconds.get(("triton", before), ())) == len(trial.points):
        row |= {"before": trial.seconds["triton", before], "before_source": before.source}
    return row, trial.wrong


def variants(config: LogprobConfig, fields: dict[str, tuple[int, ...]]) -> list[LogprobConfig]:
    """Every valid combination of the values, the other fields as they are."""
    found = [{}]
    for name, values in fields.items():
        found = [one | {name: value} for one in found for value in values]
    configs = []
    for one in found:
        try:
            configs.append(dataclasses.replace(config, **one))
        except ValueError:
            continue
    return configs


def no_memory(w: Width, way: Way) -> None:
    """A call with tensors that have none, of as many rows as Triton specialises for nothing."""
    dtype = DTYPES[w.dtype]
    hidden, weight = (torch.empty(n, w.dim, dtype=dtype, device="meta") for n in (63, w.vocabulary))
    module = scoring.api.BACKENDS.load("triton")
    with launched_with(way):
        module.token_logprobs(hidden, weight, torch.empty(63, dtype=torch.int64, device="meta"), None)


def told(way: Way) -> str:
    name, config = way
    fields = dataclasses.asdict(config) if config else {}
    return " ".join([name, *(f"{k}={v}" for k, v in fields.items() if k != "source")])


class Trial:
    """The measurements of one op and geometry."""

    def __init__(self, op: Op, points: list[Point], device: torch.device, samples: int) -> None:
        self.op, self.points, self.device, self.samples = op, points, device, samples
        self.seconds: dict[Way, dict[str, float]] = {}
        self.skipped: dict[str, str] = {}
        self.wrong: list[str] = []

    def finished(self) -> list[Way]:
        return [way for way, seconds in self.seconds.items() if len(seconds) == len(self.points)]

    def mean(self, way: Way) -> float:
        return statistics.geometric_mean(self.seconds[way].values())

    def best(self, ways: list[Way]) -> Way:
        """The least geometric mean of the times over all points."""
        for point in self.points:
            self.measure(point, ways)
        done = [way for way in self.finished() if way in ways]
        if not done:
            raise RuntimeError(f"{self.op.name}: nothing ran: {self.skipped}")
        return min(done, key=self.mean)

    def measure(self, point: Point, ways: list[Way]) -> None:
        todo = [w for w in ways if point.name not in self.seconds.get(w, ()) and told(w) not in self.skipped]
        if not todo:
            return
        count = min(set_count(point.set_bytes, cache_bytes(self.device)), 16)
        reference = point.reference()
        captured = {}
        for way in todo:
            try:
                calls = point.calls(way, count)
                off = point.off(calls[0](), reference)
                for call in calls[1:]:
                    call()
            except Exception as failure:
                synchronize(self.device)  # raises where the device is lost, and nothing after it would count
                self.skipped[told(way)] = str(failure).partition("\n")[0]
                continue
            if not off <= point.allowed:
                self.skipped[told(way)] = f"wrong result on {point.name}: error {off:.2g}"
                self.wrong.append(f"{told(way)} on {point.name}: error {off:.2g}")
                continue
            captured[way] = capture(calls, self.device)
        for way, times in interleave(captured, self.samples).items() if captured else ():
            self.seconds.setdefault(way, {})[point.name] = times.median
