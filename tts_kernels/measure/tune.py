"""`tts-kernels tune`: for each op that has a table and each geometry, what is the fastest on this device: written to
tables that tts_kernels/configs reads. Here is the search of tree_attention: its configs among explicit ones for each
backend that has some, which backend is the fastest, and from where on sharing pays. The other ops' is in tune_ops."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
import triton

from tts_kernels import configs
from tts_kernels._version import __version__
from tts_kernels.attention import api, work
from tts_kernels.attention import triton as backend
from tts_kernels.attention.device_work import make_device_work
from tts_kernels.ceilings import best_time
from tts_kernels.configs import TreeConfig
from tts_kernels.tree.plan import TreePlan

from . import tune_ops
from .inputs import Geometry, Inputs, Tree, error, lone, star, tolerance
from .timing import cache_bytes, capture, interleave, set_count, synchronize

OP = "tree_attention"
GEOMETRIES = ("28/4 d128", "32/8 d128", "40/8 d128", "64/8 d128", "16/1 d128", "32/8 d64", "16/8 d256")


@dataclass(frozen=True)
class Search:
    """What is tried, and on what.

    trees   the config is the best over all of them: wide and narrow tiles, few chunks and many, bound by memory and by
            arithmetic
    rounds  of the triton kernels: values of some fields: all combinations, the other fields as in the best of the
            round before
    cuda_rounds  the same of the cuda kernels, whose tiles are what they were compiled for. A round with `warpgroups` is
            for where there are such kernels
    sharing (n, prefix) pairs, each once shared and once not: from how many saved tokens on sharing pays
    """

    trees: dict[str, Tree]
    rounds: tuple[dict[str, tuple[int, ...]], ...]
    cuda_rounds: tuple[dict[str, tuple[int, ...]], ...]
    sharing: tuple[tuple[int, int], ...]
    suffix: int  # of the sharing pairs
    samples: int


FULL = Search(
    {
        "N=64 P=16384 S=64": star(64, 16384, 64),
        "N=64 P=8192 S=1024": star(64, 8192, 1024),
        "N=16 P=4096 S=2048": star(16, 4096, 2048),
        "N=4 P=2048 S=256": star(4, 2048, 256),
        "N=64 alone, 4096": lone(64, 4096),
    },
    (
        {"wide_rows": (64, 128), "wide_tokens": (32, 64, 128), "num_warps": (4, 8), "num_stages": (2, 3, 4)},
        {"narrow_tokens": (32, 64, 128), "num_stages": (2, 3, 4)},
        {"min_chunk": (128, 256, 512, 1024), "max_chunks": (8, 16, 32, 64)},
    ),
    (
        {"min_chunk": (128, 256, 512, 1024), "max_chunks": (8, 16, 32, 64)},
        {"num_stages": (2, 3, 4)},
        {"warpgroups": (0, 1), "min_chunk": (256, 512, 1024), "num_stages": (2, 3, 4)},
    ),
    tuple((n, prefix) for n in (2, 4, 8) for prefix in (128, 256, 512, 1024)),
    256,
    9,
)  # fmt: skip
SMALL = Search(
    {"N=2 P=64 S=8": star(2, 64, 8)},
    ({"narrow_tokens": (16, 32)}, {"min_chunk": (64, 128)}),
    ({"num_stages": (2, 3)}, {"warpgroups": (0, 1), "min_chunk": (128,)}),
    ((2, 32),),
    8,
    2,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--op", action="append", choices=(OP, *tune_ops.OPS), help="several times for several (default: all)"
    )
    parser.add_argument(
        "--geometry", action="append", type=Geometry.parse, metavar="HEADS",
        help=f'query and KV heads, head_dim and dtypes: "32/8 d128", "32/8 d128 bf16+fp8"; several times for several '
        f"(default: {', '.join(GEOMETRIES)})",
    )  # fmt: skip
    parser.add_argument(
        "--width", action="append", type=tune_ops.Width.parse, metavar="SIZES",
        help=f'of verifiers: hidden states and vocabulary: "d64 V300 fp32" (default: {", ".join(tune_ops.WIDTHS)})',
    )  # fmt: skip
    parser.add_argument(
        "--seconds", type=float, help="start nothing that may take longer than what is left of them (default: no limit)"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the table (default: the package's own)")
    parser.add_argument("--small", action="store_true", help="a few configs on small trees: whether it works")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilers at a time (default: %(default)s)")


def main(args: argparse.Namespace) -> int:
    if not backend.INTERPRETED and not torch.cuda.is_available():
        raise RuntimeError("there is no GPU here to tune for")
    device = torch.device("cpu") if backend.INTERPRETED else torch.device("cuda", torch.cuda.current_device())
    name, _ = backend.device_kind(device)
    folder, wrong, written = args.out or Path(configs.__file__).parent, [], []
    begin, longest = time.perf_counter(), {}
    for op, geometry in todo(args):
        start = time.perf_counter()
        left = args.seconds - (start - begin) if args.seconds else math.inf
        if longest.get(op, 0.0) > left:
            print(f"{op}, {geometry}: not searched, {left:.0f} s are left", flush=True)
            continue
        if op == OP:
            row, failed = tune(geometry, SMALL if args.small else FULL, device, args.jobs)
        else:
            ahead = functools.partial(compiled_ahead, device=device, jobs=args.jobs or 1)
            row, failed = tune_ops.tune(tune_ops.OPS[op], geometry, device, name, args.small, ahead)
        path = folder / configs.table_name(op, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, op, name, row | {"measured": now()})  # after each: an interrupted search has done something
        written += [path] if path not in written else []
        taken = time.perf_counter() - start
        longest[op] = max(longest.get(op, 0.0), taken)
        print(f"{op}, {geometry}: {summary(row)}, {taken:.0f} s", flush=True)
        wrong += [f"{op}, {geometry}: wrong result of {text}" for text in failed]
    for text in wrong:
        print(text, file=sys.stderr)
    for path in written:
        print(f"wrote {path}")
    return int(bool(wrong))


def todo(args: argparse.Namespace) -> list[tuple[str, Geometry | tune_ops.Width]]:
    """First what is quick, so that a time limit leaves something of each op."""
    heads = args.geometry or [Geometry.parse(text) for text in GEOMETRIES]
    widths = args.width or [tune_ops.Width.parse(text) for text in tune_ops.WIDTHS]
    ops = args.op or [*tune_ops.OPS, OP]
    return [(op, g) for op in ops for g in (widths if op in tune_ops.OPS and tune_ops.OPS[op].by_width else heads)]


def summary(row: dict) -> str:
    parts = []
    if "before" in row:
        # Both are triton's, whichever backend is the fastest.
        gain = statistics.geometric_mean(row["before"][point] / row["seconds"][point] for point in row["seconds"])
        parts.append(f"{gain:.2f}x over {row['before_source']}")
    parts.append(f"backend {row['backend']}")
    if "least_saving" in row:
        parts.append(f"sharing from {row['least_saving']} tokens saved")
    return f"{'; '.join(parts)}; {row['searched']} configs, {len(row['skipped'])} skipped"


def now() -> dict[str, str]:
    versions = {"tts_kernels": __version__, "torch": torch.__version__, "triton": triton.__version__}
    return {"date": time.strftime("%Y-%m-%d")} | versions


def compiled_ahead(calls: list[Callable[[], None]], device: torch.device, jobs: int) -> None:
    """What the calls would launch, side by side, before the first launch; what fails here says why at its launch."""
    if backend.INTERPRETED or not calls:
        return
    from .compiling import compile_ahead, recorded_launches, target_of

    with recorded_launches() as launches:
        for call in calls:
            call()
    compile_ahead(launches, target_of(backend.device_kind(device)[1]), jobs)


def tune(geometry: Geometry, search: Search, device: torch.device, jobs: int | None) -> tuple[dict, list[str]]:
    """The geometry's row of the table, and the configs whose result was wrong."""
    trial = Trial("triton", geometry, search, device, jobs or 1)
    before, best = trial.find(search.rounds)
    trials, configs_of = {"triton": trial}, {"triton": best}
    cuda = Trial("cuda", geometry, search, device, jobs or 1)
    if not cuda.missing():
        rounds = [
            fields for fields in search.cuda_rounds if "warpgroups" not in fields or has_warpgroups(geometry, device)
        ]
        trials["cuda"], configs_of["cuda"] = cuda, cuda.find(rounds)[1]
    backends = trial.other_backends(trials)
    for name, of in trials.items():
        backends[name] = statistics.geometric_mean(of.seconds[configs_of[name]].values())
    fastest = min(backends, key=backends.get)
    deciding = fastest if fastest in trials else "triton"
    row = {
        "num_q_heads": geometry.num_q_heads,
        "num_kv_heads": geometry.num_kv_heads,
        "block_dim": configs.block_dim(geometry.head_dim),
        "q_bytes": geometry.q_dtype.itemsize,
        "kv_bytes": geometry.cache_dtype.itemsize,
        "config": {k: v for k, v in dataclasses.asdict(best).items() if k != "source"},
        "backend": fastest,
        "least_saving": trials[deciding].least_saving(configs_of[deciding]),
        "seconds": trial.seconds[best],
        "before": trial.seconds[before],
        "before_source": before.source,
        "backends": backends,
        "searched": sum(len(of.seconds) for of in trials.values()),
        "skipped": {text: why for of in trials.values() for text, why in of.skipped.items()},
    }
    if "cuda" in trials:
        row["cuda"] = {name: getattr(configs_of["cuda"], name) for fields in FULL.cuda_rounds for name in fields}
        row["cuda_seconds"] = cuda.seconds[configs_of["cuda"]]
    return row, [text for of in trials.values() for text in of.wrong]


def has_warpgroups(geometry: Geometry, device: torch.device) -> bool:
    """Whether csrc/cuda/hopper has kernels for it that run here."""
    cuda = api.BACKENDS.load("cuda")
    if geometry.cache_dtype.itemsize != 2 or not cuda.runs_warpgroups(device):
        return False
    return cuda.native.cuda_tree_hopper_shared_bytes(geometry.head_dim, 2) > 0


def present_config(module: ModuleType, geometry: Geometry, device: torch.device) -> TreeConfig:
    return module.config_of(*sample(geometry, device))


def sample(geometry: Geometry, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """q and a cache."""
    q = torch.empty(1, geometry.num_q_heads, geometry.head_dim, dtype=geometry.q_dtype, device=device)
    cache = torch.empty(1, 16, geometry.num_kv_heads, geometry.head_dim, dtype=geometry.cache_dtype, device=device)
    return q, cache


def variants(config: TreeConfig, fields: dict[str, tuple[int, ...]]) -> list[TreeConfig]:
    """Every valid combination of the values, the other fields as they are."""
    found = [config]
    for name, values in fields.items():
        found = [(c, name, value) for c in found for value in values]
        found = [c for c in (replaced(*change) for change in found) if c]
    return found


def replaced(config: TreeConfig, name: str, value: int) -> TreeConfig | None:
    try:
        return dataclasses.replace(config, **{name: value})
    except ValueError:
        return None


class Trial:
    """The measurements of one geometry with one backend. Every config is checked against the reference before it is
    timed."""

    def __init__(self, name: str, geometry: Geometry, search: Search, device: torch.device, jobs: int) -> None:
        self.name, self.geometry, self.search, self.device, self.jobs = name, geometry, search, device, jobs
        self.seconds: dict[TreeConfig, dict[str, float]] = {}
        self.skipped: dict[str, str] = {}
        self.wrong: list[str] = []

    def missing(self) -> list[str]:
        q, cache = sample(self.geometry, self.device)
        return api.BACKENDS.unsupported_reasons(OP, self.name, q, cache, cache)

    def find(self, rounds: Sequence[dict]) -> tuple[TreeConfig, TreeConfig]:
        """The config that is taken now, and the best."""
        best = before = present_config(api.BACKENDS.load(self.name), self.geometry, self.device)
        for fields in rounds:
            best = self.best([best, before, *variants(best, fields)])
        return before, best

    def best(self, candidates: Iterable[TreeConfig]) -> TreeConfig:
        """The least geometric mean of the times over all trees."""
        candidates = list(dict.fromkeys(candidates))
        self.compile([c for c in candidates if c not in self.seconds])
        for name, tree in self.search.trees.items():
            self.measure(name, tree, candidates)
        done = [c for c in candidates if len(self.seconds.get(c, ())) == len(self.search.trees)]
        if not done:
            raise RuntimeError(f"{self.geometry}: no config ran: {self.skipped}")
        return min(done, key=lambda c: statistics.geometric_mean(self.seconds[c].values()))

    def compile(self, candidates: list[TreeConfig]) -> None:
        """Side by side, before the first launch; what fails here says why at its launch."""
        if self.name != "triton" or backend.INTERPRETED or not candidates:
            return
        from .compiling import compile_ahead, geometry_launches, target_of

        name, arch = backend.device_kind(self.device)
        launches = [launch for c in candidates for launch in geometry_launches(self.geometry, name, arch, c)]
        compile_ahead(launches, target_of(arch), self.jobs)

    def measure(self, name: str, tree: Tree, candidates: list[TreeConfig]) -> None:
        sets = set_count(Inputs.set_bytes(tree, self.geometry), cache_bytes(self.device))
        inputs = Inputs(tree, self.geometry, self.device, sets)
        reference = api.tree_attention(
            inputs.q[0], inputs.k_cache[0], inputs.v_cache[0], inputs.plan(), backend="reference"
        )
        captured = {}
        for config in candidates:
            text = f"{self.name} {describe(config)}"
            if name in self.seconds.get(config, ()) or text in self.skipped:
                continue
            calls = self.calls(inputs, inputs.plan(), config)
            try:
                out = calls[0]()
                off = error(out, reference.float())
            except Exception as failure:
                synchronize(self.device)  # raises where the device is lost, and nothing after it would count
                self.skipped[text] = str(failure).partition("\n")[0]
                continue
            if not off <= tolerance(self.geometry.q_dtype):
                self.skipped[text] = f"wrong result on {name}: error {off:.2g}"
                self.wrong.append(f"{text} on {name}: error {off:.2g}")
                continue
            captured[config] = capture(calls, self.device)
        for config, times in interleave(captured, self.search.samples).items():
            self.seconds.setdefault(config, {})[name] = times.median

    def calls(self, inputs: Inputs, plan: TreePlan, config: TreeConfig) -> list:
        """One for each set, all with this config and one output."""
        g = self.geometry
        shape = g.num_q_heads, g.num_kv_heads, g.head_dim, config
        if self.name == "cuda":
            made = make_device_work(plan, *shape, api.BACKENDS.load("cuda").native)
        else:
            made = work.make_work(plan, *shape)
        plan.works[work.key_of(inputs.q[0], inputs.k_cache[0], self.name)] = made
        out = torch.empty_like(inputs.q[0])

        def call(i: int):
            return lambda: api.tree_attention(
                inputs.q[i], inputs.k_cache[i], inputs.v_cache[i], plan, out=out, backend=self.name
            )

        return [call(i) for i in range(inputs.num_sets)]

    def other_backends(self, but: Iterable[str]) -> dict[str, float]:
        """Seconds of an eager call, the geometric mean over the trees, of every other backend that can run it here.
        Those that were searched were timed as graphs, as a decode loop runs: these have nothing to capture."""
        taken: dict[str, list[float]] = {}
        for tree in self.search.trees.values():
            inputs = Inputs(tree, self.geometry, self.device)
            plan = inputs.plan()
            tensors = inputs.q[0], inputs.k_cache[0], inputs.v_cache[0]
            for name in api.BACKENDS.modules:
                if name in but or api.BACKENDS.unsupported_reasons(OP, name, *tensors):
                    continue

                def attend(name=name, tensors=tensors, plan=plan):
                    return api.tree_attention(*tensors, plan, backend=name)

                taken.setdefault(name, []).append(best_time(attend, 0.02, 3, self.device))
        return {name: statistics.geometric_mean(times) for name, times in taken.items()}

    def least_saving(self, config: TreeConfig) -> int:
        points = []
        for n, prefix in self.search.sharing:
            tree = star(n, prefix, self.search.suffix)
            sets = set_count(Inputs.set_bytes(tree, self.geometry), cache_bytes(self.device))
            inputs = Inputs(tree, self.geometry, self.device, sets)
            trunk, *leaves = inputs.pages
            alone = TreePlan.from_nodes(
                [-1] * n, [prefix + self.search.suffix] * n, [trunk + own for own in leaves], [1] * n,
                page_size=self.geometry.page_size, device=self.device,
            )  # fmt: skip
            captured = {}
            for name, plan in (("shared", inputs.plan()), ("alone", alone)):
                calls = self.calls(inputs, plan, config)
                calls[0]()
                captured[name] = capture(calls, self.device)
            times = interleave(captured, self.search.samples)
            points.append((prefix * (n - 1), times["shared"].median / times["alone"].median))
        return saving_from(points)


def saving_from(points: list[tuple[int, float]], slack: float = 0.02) -> int:
    """The least number of saved tokens from which on sharing never took longer: points are (tokens saved, time shared /
    time not shared). 0 where it never did; one more than any point where it did even at the largest."""
    losing = [saved for saved, ratio in points if ratio > 1 + slack]
    if not losing:
        return 0
    return min((saved for saved, _ in points if saved > max(losing)), default=max(losing) + 1)


def describe(config: TreeConfig) -> str:
    return " ".join(f"{name}={value}" for name, value in dataclasses.asdict(config).items() if name != "source")


def write(path: Path, op: str, device_name: str, row: dict) -> None:
    """The row in place of an older one of its geometry; whole or not at all."""
    table = json.loads(path.read_text()) if path.exists() else {"op": op, "device": device_name, "rows": []}
    key = configs.KEYS[op]
    rows = [old for old in table["rows"] if any(old[k] != row[k] for k in key)]
    table["rows"] = sorted([*rows, row], key=lambda r: [r[k] for k in key])
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(table, indent=1, allow_nan=False) + "\n")
    part.replace(path)
