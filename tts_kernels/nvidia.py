"""What the cuda backends of all op families share: whether the native module's kernels run here, and where a call runs.

Each backend has the module as its own `native`, which tests replace by the emulated one, so it is passed in."""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor


def reasons_of(native: ModuleType | None, function: str, *tensors: Tensor) -> list[str]:
    """Why the native module cannot run the kernel behind `function` on these tensors."""
    if not hasattr(native, function):
        return [f"the native module has no CUDA kernels: {getattr(native, 'no_cuda', 'it was not built')}"]
    if native.cuda_is_emulated():
        wrong = [t for t in tensors if t.device.type != "cpu"]
        return [f"its kernels are emulated, on CPU tensors, got one on {t.device}" for t in wrong[:1]]
    if tensors and tensors[0].device.type != "cuda":
        return [f"it runs on CUDA tensors, got one on {tensors[0].device}"]
    return device_reasons(native, tensors[0].device if tensors else None)


@functools.cache
def device_reasons(native: ModuleType, device: torch.device | None) -> list[str]:
    if torch.version.hip:
        return ["it runs on NVIDIA GPUs, and this torch is for AMD's"]
    if not torch.cuda.is_available():
        return ["torch finds no CUDA device"]
    capability = torch.cuda.get_device_capability(device)
    archs = native.cuda_archs.split()  # what the module was built for: 80, 90a, 100a
    has_code = any(runs(arch, capability) for arch in archs)
    if has_code or has_ptx_for(archs, capability):
        return driver_reasons(*native.cuda_versions(), has_code)
    names = ", ".join(f"sm_{arch}" for arch in archs)
    return [f"it was built for {names}, and the device is of sm_{capability[0]}{capability[1]}"]


def driver_reasons(driver: int, runtime: int, has_code: bool) -> list[str]:
    """Versions are 1000 major + 10 minor. torch brings a runtime of its own, which may be content with an older driver:
    any of the major version will do, and for PTX alone one of the minor version too."""
    enough = runtime // 1000 * 1000 if has_code else runtime
    if driver >= enough:
        return []
    needed, known = (f"{version // 1000}.{version % 1000 // 10}" for version in (enough, driver))
    return [f"it was built with a CUDA that needs a driver for {needed}, and the driver is for {known}"]


def runs(arch: str, capability: tuple[int, int]) -> bool:
    """Whether the device runs code for "80", "90a", ...: that of its generation, an "a" on that very one alone."""
    number = int(arch.rstrip("af"))
    if arch.endswith("a"):
        return divmod(number, 10) == tuple(capability)
    return number // 10 == capability[0] and number % 10 <= capability[1]


def has_ptx_for(archs: list[str], capability: tuple[int, int]) -> bool:
    """The module holds PTX of the oldest architecture, unless that is one whose PTX is for itself alone."""
    oldest = min(archs, key=lambda arch: int(arch.rstrip("af")))
    return oldest.isdigit() and int(oldest) <= 10 * capability[0] + capability[1]


def place(device: torch.device) -> tuple[int, int]:
    """Device and stream, as the native module takes them; of CPU tensors, for the emulated module, none."""
    index = device.index
    if index is None:
        return 0, 0
    return index, torch._C._cuda_getCurrentRawStream(index)


def captures(device: torch.device) -> bool:
    """Whether the stream on which calls with tensors of this device run is being captured into a graph."""
    if device.type != "cuda":
        return False
    if device.index == torch.cuda.current_device():
        return torch.cuda.is_current_stream_capturing()
    with torch.cuda.device(device):  # torch asks for the current device's stream
        return torch.cuda.is_current_stream_capturing()
