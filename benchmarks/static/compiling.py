"""A case, and what its kernel compiles to."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import multiprocessing
import os
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path

import triton
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction

from tts_kernels.measure.compiling import specialised

from . import assembly
from .archs import Arch


@dataclass(frozen=True)
class StaticCase:
    """One launch of one kernel: `kernel[grid](*args, **kwargs)`.

    args, kwargs  as in the launch, num_warps and num_stages among them; tensors on the meta device, whose dtypes, sizes
                  and offsets decide what Triton assumes of a pointer, as those of real ones would
    wide          words: every load in a statement of the source that holds one of them takes `load_bytes`, and there is
                  one
    mma           the tensor core instructions that there have to be: wgmma, mma.sync, tcgen05 or mfma
    """

    name: str
    kernel: JITFunction
    args: tuple = ()
    kwargs: dict = field(default_factory=dict)
    wide: tuple[str, ...] = ()
    load_bytes: int = assembly.WIDE
    mma: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.kernel, JITFunction):
            raise TypeError(f"kernel: expected a kernel of triton.jit without TRITON_INTERPRET, got {self.kernel!r}")


@dataclass(frozen=True)
class Figures:
    registers: int  # of a thread
    spills: dict[str, int]  # as the compiler counts them; registers or bytes of a thread
    shared: int  # bytes of a block, static and dynamic
    tensor_memory: int  # columns of a block
    num_warps: int
    instructions: dict[str, int]  # assembly.instructions
    loads: list[tuple[str, int, int]]  # assembly.loads
    seconds: float

    @property
    def mma(self) -> dict[str, int]:
        return assembly.mma_kinds(self.instructions)

    @property
    def wide_share(self) -> float:
        """Of the bytes that a thread's global loads bring, counting each instruction once: the part in loads of 16."""
        total = sum(width * count for _, width, count in self.loads)
        return sum(width * count for _, width, count in self.loads if width >= assembly.WIDE) / total if total else 1.0

    def blocks(self, arch: Arch) -> int:
        return arch.blocks(self.registers, self.shared, self.num_warps, self.tensor_memory)


def specialised_case(case: StaticCase, arch: Arch) -> tuple[ASTSource, dict]:
    return specialised((case.kernel, case.args, case.kwargs), arch.target)


def compile_case(case: StaticCase, arch: Arch, keep: Path | None = None) -> Figures:
    """In this process. `keep`: a folder for everything from Triton's IR to the assembly."""
    source, options = specialised_case(case, arch)
    log = io.StringIO()
    with (
        tempfile.TemporaryDirectory() as folder,
        triton.knobs.cache.scope(),
        triton.knobs.nvidia.scope(),
        contextlib.redirect_stdout(log),
    ):
        triton.knobs.cache.dir = folder
        triton.knobs.nvidia.dump_ptxas_log = True
        start = time.perf_counter()
        try:
            compiled = triton.compile(source, target=arch.target, options=options)
        except Exception as error:
            while error.__cause__:  # Triton wraps an error once for each call in the kernel that it comes through
                error = error.__cause__
            raise RuntimeError(f"{type(error).__name__}: {error}\n{log.getvalue()}".strip()) from error
        seconds = time.perf_counter() - start
    if keep:
        for stage, text in compiled.asm.items():
            path = keep / f"{arch.name} {case.name}.{stage}".replace("/", "-")
            path.write_bytes(text) if isinstance(text, bytes) else path.write_text(text)
    nvidia = arch.target.backend == "cuda"
    text = compiled.asm["ptx" if nvidia else "amdgcn"]
    resources = assembly.ptxas_resources(log.getvalue()) if nvidia else assembly.amd_resources(text)
    return Figures(
        registers=resources["registers"],
        spills=resources["spills"],
        shared=resources["shared"] + compiled.metadata.shared,
        tensor_memory=getattr(compiled.metadata, "tmem_size", 0) or 0,
        num_warps=compiled.metadata.num_warps,
        instructions=assembly.instructions(text),
        loads=assembly.loads(text),
        seconds=seconds,
    )


def key(case: StaticCase, arch: Arch) -> str:
    """Of everything that the figures depend on: kernel and what it calls, arguments, options, compilers, this code."""
    source, options = specialised_case(case, arch)
    here = [Path(module).read_text() for module in (__file__, assembly.__file__)]
    parts = [
        source.hash(),
        make_backend(arch.target).hash(),
        sorted(options.items(), key=str),
        triton.__version__,
        here,
    ]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


Job = tuple[Arch, StaticCase]


def compile_all(
    jobs: list[Job], processes: int, cache: Path, keep: Path | None
) -> Iterator[tuple[Job, Figures | str, bool]]:
    """(job, its figures or why there are none, whether it was compiled now), in no order. Figures are kept in `cache`:
    what has not changed is not compiled again, except for `keep`. A process per kernel: a compiler that crashes takes
    nothing else along."""
    context = multiprocessing.get_context("fork")
    waiting = deque()
    for arch, case in jobs:
        path = cache / f"{key(case, arch)}.json"
        if not keep and path.exists():
            yield (arch, case), load(path), False
        else:
            waiting.append(((arch, case), path))
    running: dict[Connection, tuple] = {}
    while waiting or running:
        while waiting and len(running) < processes:
            job, path = waiting.popleft()
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=child, args=(job, keep, sender))
            process.start()
            sender.close()
            running[receiver] = job, path, process
        for receiver in wait(list(running)):
            job, path, process = running.pop(receiver)
            try:
                result = receiver.recv()
            except EOFError:
                process.join()
                result = f"the compiler's process ended with {process.exitcode}"
            process.join()
            if isinstance(result, Figures):
                save(path, result)
            yield job, result, True


def child(job: Job, keep: Path | None, sender: Connection) -> None:
    arch, case = job
    try:
        result = compile_case(case, arch, keep)
    except Exception as error:
        result = str(error)
    sender.send(result)


def load(path: Path) -> Figures:
    values = json.loads(path.read_text())
    return Figures(**values | {"loads": [tuple(load) for load in values["loads"]]})


def save(path: Path, figures: Figures) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(dataclasses.asdict(figures)))
    partial.replace(path)
