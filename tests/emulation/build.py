"""Compiles CUDA sources with the host's C++ compiler against the emulation into a Python module.

    python tests/emulation/build.py [--sanitize]      the modules that tests take, in build/emulation

`build` makes the module if anything that it is made of has changed, `load` imports it. With `edits`, a copy of the
sources with some text replaced is built: for tests that show that a planted error is found.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "emulation"
SOURCES = ("csrc/bindings.cpp", "csrc/cuda/**/*.cu")
CHECKS = {"sources": ("tests/emulation/checks.cu",), "name": "checks"}  # the module that tests the emulation

# No contraction and no other liberties: nvcc gets --fmad=false. Kernels pun types through shared memory.
FLAGS = [
    *("-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-strict-aliasing"),
    *("-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized", "-Wno-psabi"),
    "-Wno-unknown-warning-option",
    *("-DTTS_HAVE_CUDA", "-DTTS_ONLY_CUDA", "-DTTS_EMULATED", "-DTTS_HAVE_HOPPER", "-Icsrc", "-Itests/emulation"),
]
OPTIMISED = ["-O1"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
SANITIZED = ["-O1", "-g1", *SANITIZERS]


def compiler() -> list[str] | None:
    named = os.environ.get("CXX")
    for candidate in [named] if named else ["c++", "g++", "clang++"]:
        command = shlex.split(candidate)
        if command and shutil.which(command[0]):
            return command
    return None


def missing() -> str | None:
    """Why nothing can be emulated here."""
    if sys.platform != "linux" or os.uname().machine not in ("x86_64", "aarch64"):
        return "the emulation is written for Linux on x86-64 and aarch64"
    if compiler() is None:
        return "no C++ compiler"
    try:
        import pybind11  # noqa: F401
    except ImportError:
        return "the Python package pybind11 is not installed"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "no Python headers"
    return None


def build(
    edits: Mapping[str, Sequence[tuple[str, str]]] | None = None,
    *,
    sanitize: bool = False,
    sources: Sequence[str] = SOURCES,
    name: str = "_C",
) -> Path:
    """The module's path. edits: for a file, (what stands there, what it becomes), each to be found exactly once.

    sources     glob patterns; of those left out, functions are missing where they are called
    """
    folder = BUILD / ("sanitized" if sanitize else "plain")
    with _locked(folder):
        objects = _compile(ROOT, folder, sources, sanitize)
        if not edits:
            return _link(objects, folder / f"{name}.so", sanitize)
    told = hashlib.sha256(repr((sorted(edits.items()), sanitize)).encode()).hexdigest()[:12]
    copy = BUILD / f"edited-{told}"
    with _locked(copy):
        for part in ("csrc", "tests/emulation"):
            shutil.copytree(ROOT / part, copy / part, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        for file, replacements in edits.items():
            text = (copy / file).read_text()
            for old, new in replacements:
                if text.count(old) != 1:
                    raise ValueError(f"{file} has changed: {old!r} stands {text.count(old)} times in it")
                text = text.replace(old, new)
            (copy / file).write_text(text)
        changed = {(ROOT / file).resolve() for file in edits}
        kept = [made for made in objects if not changed.intersection(_needed(made))]
        again = [str(made.relative_to(folder).with_suffix("")) for made in objects if made not in kept]
        return _link([*kept, *_compile(copy, copy / "objects", again, sanitize)], copy / f"{name}.so", sanitize)


def load(module: Path) -> ModuleType:
    """The module at this path, beside any other of its name."""
    # pybind11 keeps modules by their full name and would hand out the first of this name again.
    spec = spec_from_file_location(f"{module.parent.name}.{module.stem}", module)
    flags = sys.getdlopenflags()
    sys.setdlopenflags(os.RTLD_LAZY)
    try:
        loaded = module_from_spec(spec)
        spec.loader.exec_module(loaded)
    finally:
        sys.setdlopenflags(flags)
    return loaded


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time builds; the others find the work done."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _compile(root: Path, folder: Path, sources: Sequence[str], sanitize: bool) -> list[Path]:
    """The objects of `sources` under `root`: those that are older than what they are made of are made again."""
    import pybind11

    flags = [*FLAGS, *(SANITIZED if sanitize else OPTIMISED)]
    for include in sorted({sysconfig.get_path("include"), sysconfig.get_path("platinclude"), pybind11.get_include()}):
        flags += ["-isystem", include]

    def compiled(source: Path) -> Path:
        target = folder / f"{source.relative_to(root)}.o"
        said = target.with_suffix(".cmd")
        command = [*compiler(), *flags, "-x", "c++", "-MMD", "-MF", str(target.with_suffix(".d"))]
        command += ["-c", str(source), "-o", str(target)]
        if not _is_current(target, said, command):
            target.parent.mkdir(parents=True, exist_ok=True)
            said.unlink(missing_ok=True)
            _run(command, root)
            said.write_text(shlex.join(command))
        return target

    # Largest first; not what an editor keeps beside its files.
    files = {file for pattern in sources for file in root.glob(pattern) if not file.name.startswith(".")}
    files = sorted(files, key=lambda file: (-file.stat().st_size, file))
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or min(2, os.cpu_count() or 1))) as pool:
        return list(pool.map(compiled, files))


def _link(objects: Sequence[Path], module: Path, sanitize: bool) -> Path:
    said = module.with_suffix(".link")
    # Lazy: functions of sources that were left out are missed where they are called.
    command = [*compiler(), "-shared", "-Wl,-z,lazy", *(SANITIZERS if sanitize else []), *map(str, sorted(objects))]
    newest = max(made.stat().st_mtime_ns for made in objects)
    current = said.exists() and said.read_text() == shlex.join(command) and module.exists()
    if not current or module.stat().st_mtime_ns < newest:
        fresh = module.with_name(f".{module.name}.{os.getpid()}")
        _run([*command, "-o", str(fresh)], ROOT)
        fresh.replace(module)
        said.write_text(shlex.join(command))
    return module


def _needed(target: Path) -> list[Path]:
    """The files that an object was made of."""
    text = target.with_suffix(".d").read_text().replace("\\\n", " ")
    return [Path(ROOT, path).resolve() for path in shlex.split(text.partition(":")[2])]


def _is_current(target: Path, said: Path, command: list[str]) -> bool:
    try:
        if said.read_text() != shlex.join(command):
            return False
        made = target.stat().st_mtime_ns
        return all(path.stat().st_mtime_ns <= made for path in _needed(target))
    except OSError:
        return False


def _run(command: list[str], root: Path) -> None:
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stderr}exit status {done.returncode}")
    sys.stderr.write(done.stderr)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sanitize", action="store_true", help="with AddressSanitizer and UndefinedBehaviorSanitizer")
    sanitize = parser.parse_args().sanitize
    for options in ({}, CHECKS):
        began = time.monotonic()
        print(build(sanitize=sanitize, **options), f"{time.monotonic() - began:.1f} s")
