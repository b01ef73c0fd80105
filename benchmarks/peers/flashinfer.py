"""FlashInfer: its cascade, as shipped and with its inner wrappers on fa2, and its paged attention without sharing.

As shipped the cascade takes fa3 on Hopper, which neither splits the KV of a node nor packs query heads; fa2 does both.
The kernels are built by `build` (the stage `compile`), never while something is timed. The wrappers are planned once
and outside of FlashInfer's CUDA graph mode, which would make them split more than they have to: nothing changes from
replay to replay.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import torch

from ..machine import ROOT

WORKSPACE_BYTES = 512 << 20
BUILDERS = 4
MOST_LEVELS = 64  # each has tables of 16 MiB
ERRORS = ROOT / "build" / "gpu" / "flashinfer.json"  # what could not be built, and why


class Cascade:
    def __init__(self, backend: str) -> None:
        self.backend = backend
        self.NAME = "flashinfer cascade" + ("" if backend == "auto" else f" {backend}")

    def reason_against(self, case):
        if levels(case.tree) is None:
            return "rows at different depths"
        if len(levels(case.tree)) < 2:
            return "nothing is shared"
        if len(levels(case.tree)) > MOST_LEVELS:
            return f"more than {MOST_LEVELS} levels"
        if reason := reason_without(case, ("cascade",)):
            return reason
        return reason_without(case, (f"{chosen(case) if self.backend == 'auto' else self.backend} d{case.head_dim}",))

    def prepare(self, inputs):
        # One plan for all input sets, which have the same pages.
        wrapper = inputs.once(self.NAME, lambda: self.plan(inputs))
        return lambda: wrapper.run(inputs.q, (inputs.k_cache, inputs.v_cache))

    def plan(self, inputs):
        import flashinfer

        nodes, case, device = levels(inputs.tree), inputs.case, inputs.q.device
        wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(len(nodes), workspace(device), "NHD")
        if self.backend != "auto":
            wrapper._batch_prefill_wrappers = [
                flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace(device), "NHD", backend=self.backend)
                for _ in nodes
            ]
        tables = [tables_of(inputs, [[node] for node in level], served(inputs.tree, level)) for level in nodes]
        wrapper.plan(
            *map(list, zip(*tables)), case.num_q_heads, case.num_kv_heads, case.head_dim, case.page_size,
            causal=case.rows_each > 1, q_data_type=inputs.q.dtype,
        )  # fmt: skip
        return wrapper

    def bytes_read(self, case):
        return case.least_bytes


class Unshared:
    """Every row's path for itself, over the same pages: what an engine without cascade runs, warm L2 included."""

    NAME = "flashinfer unshared"

    def reason_against(self, case):
        if not case.whole_pages:
            return "inner nodes end inside a page"
        return reason_without(case, (f"fa2 d{case.head_dim}",))

    def prepare(self, inputs):
        wrapper, out = inputs.once(self.NAME, lambda: self.plan(inputs)), torch.empty_like(inputs.q)
        # It would make a result of zeros in each call else, which is a launch more.
        return lambda: wrapper.run(inputs.q, (inputs.k_cache, inputs.v_cache), out=out)

    def plan(self, inputs):
        import flashinfer

        tree, case, device = inputs.tree, inputs.case, inputs.q.device
        leaves = [node for node, rows in enumerate(tree.rows) if rows]
        rows, indptr, indices, last = tables_of(inputs, [tree.paths[leaf] for leaf in leaves], tree_rows(tree, leaves))
        heads = case.num_q_heads, case.num_kv_heads, case.head_dim, case.page_size
        if case.rows_each > 1:
            wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace(device), "NHD", backend="fa2")
            wrapper.plan(rows, indptr, indices, last, *heads, causal=True, q_data_type=inputs.q.dtype)
        else:  # on tensor cores: the groups here are 4 and more, some of a size that its other kernel lacks
            wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace(device), "NHD", use_tensor_cores=True)
            wrapper.plan(indptr, indices, last, *heads, q_data_type=inputs.q.dtype)
        return wrapper

    def bytes_read(self, case):
        return case.replicated_kv_bytes + case.row_bytes


def levels(tree) -> list[list[int]] | None:
    """The nodes of each depth; None unless all rows are at the greatest."""
    depth = max(map(len, tree.paths))
    if any(rows and len(path) < depth for path, rows in zip(tree.paths, tree.rows)):
        return None
    return [[node for node, path in enumerate(tree.paths) if len(path) == d + 1] for d in range(depth)]


def served(tree, nodes: list[int]) -> list[int]:
    return [tree.served[node] for node in nodes]


def tree_rows(tree, nodes: list[int]) -> list[int]:
    return [tree.rows[node] for node in nodes]


def tables_of(inputs, segments: list[list[int]], rows: list[int]) -> tuple[torch.Tensor, ...]:
    """qo_indptr, kv_indptr, kv_indices and last_page_len of segments, each the pages of some nodes: int32, on the CPU,
    where plan() would copy them to."""
    size = inputs.geometry.page_size
    pages = [[page for node in segment for page in inputs.pages[node]] for segment in segments]
    last = [(inputs.tree.length[segment[-1]] - 1) % size + 1 for segment in segments]
    tables = [0, *cumulated(rows)], [0, *cumulated(map(len, pages))], [page for own in pages for page in own], last
    return tuple(torch.tensor(table, dtype=torch.int32) for table in tables)


def cumulated(counts):
    total = 0
    for count in counts:
        total += count
        yield total


def reason_without(case, kernels: tuple[str, ...]) -> str:
    if find_spec("flashinfer") is None:
        return "FlashInfer is not installed"
    if case.geometry.kv_dtype or case.geometry.dtype != "bf16":
        return "its kernels are built for bf16 alone here"
    known = json.loads(ERRORS.read_text()) if ERRORS.exists() else {}
    for name in kernels:
        if name not in known:
            return f"its {name} kernels are not built: make gpu STAGES=compile"
        if known[name]:
            return f"its {name} kernels were not built: {known[name]}"
    return ""


def chosen(case) -> str:
    """The backend that the shipped cascade takes here."""
    from flashinfer.utils import PosEncodingMode, determine_attention_backend

    dtype = case.geometry.q_dtype
    none = PosEncodingMode["NONE"].value
    return determine_attention_backend(torch.device("cuda"), none, False, False, dtype, dtype)


@functools.cache
def workspace(device: torch.device) -> torch.Tensor:
    """For all wrappers: they run one after the other."""
    return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)


def build(head_dims: set[int]) -> None:
    """All kernels that the peers need, side by side, into FlashInfer's cache; why one failed is kept for the cases."""
    if find_spec("flashinfer") is None:
        print("FlashInfer is not installed: its kernels are not built", flush=True)
        return
    names = ["cascade"]
    for dim in sorted(head_dims, key=lambda dim: dim != 128):  # first what most cases need, should the time run out
        names += [f"{backend} d{dim}" for backend in ("fa2", "fa3")]
    known: dict[str, str] = {}
    writing = threading.Lock()
    ERRORS.parent.mkdir(parents=True, exist_ok=True)

    def one(name: str) -> None:
        try:
            spec_of(name).build(verbose=False)
            known[name] = ""
        except Exception as error:  # named beside the cases that lack it
            lines = str(error).splitlines() or [type(error).__name__]
            known[name] = next((line for line in lines if "error:" in line), lines[0])[-200:]
        print(f"FlashInfer {name}: {known[name] or 'built'}", flush=True)
        with writing:  # threads finish side by side
            ERRORS.write_text(json.dumps(dict(known)))

    os.environ.setdefault("MAX_JOBS", str(max((os.cpu_count() or 1) // BUILDERS, 1)))  # compilers of each
    with ThreadPoolExecutor(BUILDERS) as pool:
        list(pool.map(one, names))


def spec_of(name: str):
    """FlashInfer's for "cascade", "fa2 d128", ... It imports packages of its own, which may not be there."""
    from flashinfer.jit import gen_batch_prefill_module
    from flashinfer.jit.cascade import gen_cascade_module

    if name == "cascade":
        return gen_cascade_module()
    backend, _, dim = name.partition(" d")
    types = (torch.bfloat16,) * 3
    return gen_batch_prefill_module(backend, *types, torch.int32, int(dim), int(dim), 0, False, False, False)


if __name__ == "__main__":
    build({int(dim) for dim in sys.argv[1:]})
