"""`tts-kernels doctor`: what this machine can run, and every reason why it cannot run the rest."""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
from importlib import metadata
from pathlib import Path

import torch

from ._version import __version__
from .attention.api import BACKENDS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """It has none."""


def main(args: argparse.Namespace) -> int:
    print("versions")
    for name, version in versions().items():
        print(f"  {name:14}{version or 'not installed'}")
    print("machine")
    print(f"  cpu           {cpu_name()}, {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads")
    print(f"  gpu           {', '.join(gpu_names()) or 'none that torch sees'}")
    print(f"  c++ compiler  {shutil.which(os.environ.get('CXX', 'c++')) or 'none'}")
    print(f"  cuda kernels  {cuda_build()}")
    print("attention backends")
    for backend in BACKENDS.modules:
        reasons = [reason for op in BACKENDS.ops for reason in BACKENDS.unsupported_reasons(op, backend)]
        print_line(backend, dict.fromkeys(reasons))
    module = BACKENDS.load("cpu")
    if not isinstance(module, str):
        print("code paths of the cpu backend (TTS_KERNELS_CPU_ISA forces one)")
        for name, reason in module.isa_report().items():
            print_line(name, [reason] if reason else [])
        print("                (amx-emulated is for tests: slow, never picked by itself)")
        print(f"  in use        {active_code_path(module)}")
    return 0


def cuda_build() -> str:
    """What the native module's CUDA kernels were built for, whether or not there is a GPU here."""
    module = BACKENDS.load("cuda")
    if isinstance(module, str) or module.native is None:
        return "none: the native module is not built"
    archs = getattr(module.native, "cuda_archs", "").split()
    if not archs:
        return f"none: {getattr(module.native, 'no_cuda', 'not asked for')}"
    return f"built for {', '.join(f'sm_{arch}' for arch in archs)}"


def print_line(name: str, reasons) -> None:
    print(f"  {name:14}{'no: ' + '; '.join(reasons) if reasons else 'yes'}")


def active_code_path(module) -> str:
    try:
        return module.active_isa()
    except ValueError as error:
        return f"none: {error}"


def versions() -> dict[str, str | None]:
    """Of this package and of those it works with; None where one is missing."""
    found = {"tts-kernels": __version__, "python": platform.python_version()}
    for name in ("torch", "triton", "transformers"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return match[1] if match else platform.processor() or platform.machine()


def gpu_names() -> list[str]:
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
