"""Which backend would run a tree_attention call, why, what it would read and compute, and the least that takes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tts_kernels import dispatch
from tts_kernels.ceilings import measured
from tts_kernels.tree.plan import LENGTH, OWN_BEGIN, ROWS_END, TreePlan

from . import checks, tables
from .api import BACKENDS


@dataclass(frozen=True)
class Explanation:
    """Of one tree_attention call, at the lengths that the plan had when it was asked for. str() prints it.

    Window and causal masks are not regarded: a row counts with every token of every node on its path, its own node's
    later tokens and those before a window included. L is the length of a node, R the rows in or below it; sums are over
    nodes; a token's KV is 2 * Hkv * D elements of the caches' dtype. lse, scales, sinks and the plan's tables are left
    out of all bytes.

    backend, why      the one that would run the call, and what made it that
    refused           the backends that come before it on this device, each with the reasons why it cannot
    config            the code path, threads, tile sizes that it would take
    num_rows, num_nodes, num_tokens   of the plan; tokens that no row sees included
    work_items, launches, issued_flops   see WorkCounts in counts.py
    kv_bytes_loaded   KV that is loaded, every load counted, whichever cache answers it
    state_bytes       partial states: D + 2 fp32 numbers each, written once and read once
    bytes_read        what memory has to deliver if a token's KV comes from it once and repeated loads hit a cache:
                      the KV that some row sees, q, and the states (half of state_bytes)
    least_bytes       that KV once, q once, out once; no states: what any kernel that shares has to move
    replicated_bytes  the same where every row reads the KV of its path for itself: L * R tokens in place of L
    flops             4 * Hq * D * sum(L * R): two products, a multiplication and an addition each
    bandwidth, flop_rate             the ceilings: bytes and FLOP per second
    bandwidth_from, flop_rate_from   "given", or "measured here" (tts_kernels.ceilings.measured)
    floor_seconds     max(least_bytes / bandwidth, flops / flop_rate): about the least that a call can take whose KV
                      comes from memory and whose masks hide little
    bound             which of the two that is: "memory" or "compute"
    """

    backend: str
    why: str
    refused: dict[str, list[str]]
    config: str
    num_rows: int
    num_nodes: int
    num_tokens: int
    work_items: int
    launches: int | None
    kv_bytes_loaded: int
    state_bytes: int
    bytes_read: int
    least_bytes: int
    replicated_bytes: int
    flops: int
    issued_flops: int
    bandwidth: float
    bandwidth_from: str
    flop_rate: float
    flop_rate_from: str
    floor_seconds: float
    bound: str

    def __str__(self) -> str:
        launches = "" if self.launches is None else f", {plural(self.launches, 'launch', 'launches')}"
        saved = self.replicated_bytes / self.least_bytes if self.least_bytes else 1.0
        lines = [
            ("config", self.config),
            ("tree", f"{plural(self.num_rows, 'row')}, {plural(self.num_nodes, 'node')}, "
                     f"{plural(self.num_tokens, 'token')}"),
            ("work", f"{plural(self.work_items, 'item')}{launches}"),
            ("reads", f"{size(self.bytes_read)}; the least is {size(self.least_bytes)}, "
                      f"one read per row {size(self.replicated_bytes)} ({saved:.2f}x the least)"),
            ("loads", f"{size(self.kv_bytes_loaded)} of KV, repeated ones counted"),
            ("states", f"{size(self.state_bytes)}, written and read"),
            ("FLOPs", f"{self.flops:.4g}, issued {self.issued_flops:.4g}"),
            ("floor", f"{self.floor_seconds * 1e3:.4g} ms, bound by {self.bound}: "
                      f"{self.bandwidth / 1e9:.4g} GB/s ({self.bandwidth_from}), "
                      f"{self.flop_rate / 1e9:.4g} GFLOP/s ({self.flop_rate_from})"),
        ]  # fmt: skip
        lines += [("refused", f"{name}: {'; '.join(reasons)}") for name, reasons in self.refused.items()]
        return "\n".join([f"{self.backend}: {self.why}", *(f"  {name:<8}{what}" for name, what in lines)])


def explain(
    plan: TreePlan,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor | None = None,
    *,
    backend: str | None = None,
    bandwidth: float | None = None,
    flops: float | None = None,
) -> Explanation:
    """What tree_attention(q, k_cache, v_cache, plan, backend=backend) would do. Runs none of it, changes nothing and
    reads no values of q and of the caches. It copies the plan's lengths from their device, which waits for that device:
    not for a captured graph.

    Args:
        plan, q, k_cache, v_cache, backend: as in `tree_attention`; v_cache, if left out, is taken to be like k_cache.
        bandwidth: bytes per second that the device reads. Default: measured (see `tts_kernels.ceilings.measured`). If
            one of the two is not given, the first call for a device and dtype takes a second or two.
        flops: FLOP per second of its matrix products in q's dtype. Default: measured.

    Raises:
        TypeError, ValueError: a wrong argument, by its name, with what was expected and what came; ceilings that are
            not given on a device where they cannot be measured (neither CPU nor CUDA).
        RuntimeError: an explicit `backend` cannot run this call; lists every reason.
    """
    caches = (k_cache, k_cache if v_cache is None else v_cache)
    checks.check_attention(q, *caches, plan)
    given = [check_rate("bandwidth", bandwidth), check_rate("flops", flops)]
    name, why, refused = choice(backend, q, *caches)

    nodes = plan.nodes.tolist()
    counts = BACKENDS.load(name).count_work(plan, q, k_cache, nodes)
    num_rows, num_q_heads, head_dim = q.shape
    token_bytes = 2 * k_cache.shape[2] * head_dim * k_cache.element_size()
    served = [(length, end - begin) for length, begin, end in zip(nodes[LENGTH], nodes[OWN_BEGIN], nodes[ROWS_END])]
    seen_bytes = token_bytes * sum(length for length, rows in served if rows)
    tokens_over_rows = sum(length * rows for length, rows in served)
    q_bytes = q.numel() * q.element_size()
    state_bytes = 2 * 4 * (head_dim + 2) * counts.states

    rates = list(given)
    if None in given:
        ceilings = measured(q.device, q.dtype)
        (rate,) = ceilings.flops.values()
        rates = [g or m for g, m in zip(given, (ceilings.bandwidth, rate))]
    bandwidth_from, flop_rate_from = ("measured here" if g is None else "given" for g in given)
    least_bytes = seen_bytes + 2 * q_bytes
    useful_flops = 4 * num_q_heads * head_dim * tokens_over_rows
    read_seconds, product_seconds = least_bytes / rates[0], useful_flops / rates[1]
    return Explanation(
        backend=name,
        why=why,
        refused=refused,
        config=counts.config,
        num_rows=num_rows,
        num_nodes=plan.num_nodes,
        num_tokens=sum(nodes[LENGTH]),
        work_items=counts.work_items,
        launches=counts.launches,
        kv_bytes_loaded=token_bytes // k_cache.shape[2] * counts.kv_loads,
        state_bytes=state_bytes,
        bytes_read=seen_bytes + q_bytes + state_bytes // 2,
        least_bytes=least_bytes,
        replicated_bytes=token_bytes * tokens_over_rows + 2 * q_bytes,
        flops=useful_flops,
        issued_flops=counts.flops,
        bandwidth=rates[0],
        bandwidth_from=bandwidth_from,
        flop_rate=rates[1],
        flop_rate_from=flop_rate_from,
        floor_seconds=max(read_seconds, product_seconds),
        bound="memory" if read_seconds >= product_seconds else "compute",
    )


def choice(backend: str | None, *tensors: Tensor) -> tuple[str, str, dict[str, list[str]]]:
    """Name, why, refused: what the default would choose for tree_attention."""
    row = tables.row(*tensors[:2])
    name, why, refused = dispatch.choice(BACKENDS, "tree_attention", row, backend, *tensors)
    return name, f"{why[:-1]}; {sharing(row)})" if why.startswith("measured") else why, refused


def sharing(row: dict) -> str:
    least = row["least_saving"]
    return f"block tables: runs that save less than {least:,} tokens are not shared" if least else "all runs are shared"


def check_rate(name: str, value: float | None) -> float | None:
    if value is None:
        return None
    rate = checks.check_number(name, value)
    if rate <= 0:
        checks.fail(name, "None (measure it) or a positive number per second", value)
    return rate


def plural(count: int, one: str, many: str | None = None) -> str:
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def size(count: int) -> str:
    return f"{count:,} B" if count < 10_000 else f"{count / 1e6:.4g} MB"
