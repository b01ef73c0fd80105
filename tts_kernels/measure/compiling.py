"""Compiling Triton kernels ahead of their first launch: from launches recorded with tensors that have no memory, side
by side in processes, into Triton's cache on disk, where the launches of any process find them. Needs no GPU."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from tts_kernels.attention import triton as backend
from tts_kernels.configs import TreeConfig

from .inputs import Geometry

Launch = tuple[JITFunction, tuple, dict]


@contextlib.contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Launches inside are not run but listed, as (kernel, args, kwargs)."""
    launches = []

    def run(self, *args, grid, warmup, **kwargs) -> None:
        launches.append((self, args, kwargs))

    original = JITFunction.run
    JITFunction.run = run
    try:
        yield launches
    finally:
        JITFunction.run = original


@contextlib.contextmanager
def as_device(name: str, arch: str) -> Iterator[None]:
    """The triton backend takes its configs as if tensors were on this device."""
    original = backend.device_kind
    backend.device_kind = lambda device: (name, arch)
    try:
        yield
    finally:
        backend.device_kind = original


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def tree_attention_launches(
    q: Tensor, k_cache: Tensor, config: TreeConfig, *, lse=None, softcap: float = 0.0, window: int = -1, sinks=None,
    k_scale=None, v_scale=None,
) -> list[Launch]:  # fmt: skip
    """Of tree_tiles and of merge_tree, for tensors on the meta device. Numbers of rows, nodes and items are such that
    Triton would specialise for none of them."""
    num_nodes, num_rows, num_items, num_states = 65, q.shape[0], 1000, 1000
    nodes, pages, rows = (meta(*shape, dtype=torch.int32) for shape in ((7, num_nodes), (9999,), (2, num_rows)))
    work = backend.Work(
        config, meta(4 * num_items + num_nodes + num_rows + 1, dtype=torch.int32),
        meta(num_states * q.shape[1] * (q.shape[2] + 2)), num_items, num_states, q.shape[1] // k_cache.shape[2],
    )  # fmt: skip
    with recorded_launches() as launches:
        backend.tree_attention(
            torch.empty_like(q), lse, q, k_cache, k_cache, nodes, pages, rows, k_cache.shape[1], True, 0.1, softcap,
            window, sinks, k_scale, v_scale, (work.table, work.scratch, work.tile),
        )  # fmt: skip
    return launches


def geometry_launches(g: Geometry, device_name: str, arch: str, config: TreeConfig | None = None) -> list[Launch]:
    """Of a plain call with these heads on that device, with its own config or another."""
    q = meta(63, g.num_q_heads, g.head_dim, dtype=g.q_dtype)
    k_cache = meta(65536, g.page_size, g.num_kv_heads, g.head_dim, dtype=g.cache_dtype)
    with as_device(device_name, arch):
        return tree_attention_launches(q, k_cache, config or backend.config_of(q, k_cache))


def target_of(arch: str) -> GPUTarget:
    """As Triton's driver names a device of that architecture."""
    if arch.startswith("sm_"):
        return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    return GPUTarget("hip", arch, 64)


def specialised(launch: Launch, target: GPUTarget) -> tuple[ASTSource, dict]:
    """What a launch would hand to triton.compile, by the functions that a launch calls: 16-byte alignment, divisibility
    and size of arguments, constants, options."""
    kernel, args, kwargs = launch
    gpu = make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, gpu)
    bound, specialization, rest = bind(*args, **kwargs)
    options, signature, constexprs, attrs = kernel._pack_args(gpu, kwargs, bound, specialization, rest)
    return ASTSource(kernel, signature, constexprs, attrs), options.__dict__


_jobs: list[tuple[ASTSource, dict, GPUTarget]] = []  # of compile_ahead: its processes are forks and find them here


def compile_ahead(launches: Iterable[Launch], target: GPUTarget, processes: int) -> tuple[int, list[str]]:
    """The number of different kernels, and what went wrong with some: those are compiled, or fail, at their launch."""
    jobs = {}
    for launch in launches:
        source, options = specialised(launch, target)
        jobs.setdefault(f"{source.hash()} {sorted(options.items(), key=str)}", (source, options, target))
    _jobs[:] = jobs.values()
    errors = []
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(max(min(processes, len(_jobs)), 1), mp_context=context) as pool:
        running = [pool.submit(_compile, i) for i in range(len(_jobs))]
        for done in as_completed(running):
            try:
                error = done.result()
            except BrokenProcessPool as broken:
                return len(_jobs), [*errors, f"a compiler's process ended: {broken}"]
            errors += [error] if error else []
    return len(_jobs), errors


def _compile(index: int) -> str:
    source, options, target = _jobs[index]
    try:
        triton.compile(source, target=target, options=options)
    except Exception as error:
        while error.__cause__:  # Triton wraps an error once for each call in the kernel that it comes through
            error = error.__cause__
        return f"{source.fn.__name__}: {type(error).__name__}: {error}"
    return ""
