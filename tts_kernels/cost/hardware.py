"""What a device does at most: data sheets, always the dense figures, or measured here."""

from __future__ import annotations

import datetime
import json
import os
from dataclasses import dataclass
from importlib import resources

from tts_kernels.errors import fail

from .checks import check_choice, check_number, fail_unknown

DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Hardware:
    """One device.

    bf16_flops  FLOP per second of dense bf16 matrix products (never with sparsity, which data sheets like to print)
    bandwidth   bytes per second from its memory
    memory      bytes; None where it is not known
    fp8_flops   the same as bf16_flops for fp8; None where there is none
    source, date   where the figures are from, and when they were taken
    """

    name: str
    bf16_flops: float
    bandwidth: float
    memory: float | None = None
    fp8_flops: float | None = None
    source: str = "given"
    date: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            fail("name", "a name", repr(self.name), TypeError)
        for field in ("bf16_flops", "bandwidth", "memory", "fp8_flops"):
            value = getattr(self, field)
            if value is not None or field in ("bf16_flops", "bandwidth"):
                check_number(f"{self.name}: {field}", value, least=1)

    @property
    def ridge(self) -> float:
        """FLOP per byte from which on bf16 products are bound by arithmetic (Williams et al. 2009, Roofline)."""
        return self.bf16_flops / self.bandwidth

    @classmethod
    def preset(cls, name: str) -> Hardware:
        """A row of hardware.json: "a100", "h100", "h200", "b200", "mi300x". Raises ValueError that names the nearest
        for another."""
        if not isinstance(name, str):
            fail("hardware", "the name of a preset", repr(name), TypeError)
        known = hardware_table()
        if name.lower() not in known:
            fail_unknown("hardware", name, known)
        row = known[name.lower()]
        return cls(
            row["title"],
            row["bf16_flops"],
            row["bandwidth"],
            row["memory"],
            row["fp8_flops"],
            row["source"],
            row["date"],
        )

    @classmethod
    def measured(cls, device: str | None = None, dtype: str = "bfloat16") -> Hardware:
        """The ceilings of this machine, by `tts_kernels.ceilings`: matrix products, and reads (CPU) or copies (GPU).
        Takes seconds once per process and wants an idle device.

        device  as torch names it; default: the GPU if there is one, else the CPU
        dtype   of the products, as torch names it: the rate stands in bf16_flops, whatever the dtype
        """
        import torch

        from tts_kernels import ceilings, doctor

        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        found = ceilings.measured(device, getattr(torch, check_choice("dtype", dtype, DTYPES)))
        if device.type == "cuda":
            name, memory = torch.cuda.get_device_name(device), torch.cuda.get_device_properties(device).total_memory
        else:
            name, memory = f"{doctor.cpu_name()}, {torch.get_num_threads()} threads", None
            if hasattr(os, "sysconf"):
                memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        date = datetime.date.today().isoformat()
        source = "measured here" if dtype == "bfloat16" else f"measured here, {dtype}"
        return cls(name, found.flops[dtype], found.bandwidth, memory, None, source, date)


def hardware_table() -> dict[str, dict]:
    """hardware.json. Figures with sparsity stand beside the dense ones to be told apart, and are never used."""
    return json.loads(resources.files(__package__).joinpath("hardware.json").read_text(encoding="utf-8"))


def as_hardware(hardware: Hardware | str) -> Hardware:
    """The name "measured" is this machine; any other name is a preset."""
    if isinstance(hardware, str):
        return Hardware.measured() if hardware == "measured" else Hardware.preset(hardware)
    if not isinstance(hardware, Hardware):
        fail("hardware", "a Hardware or the name of a preset", type(hardware).__name__, TypeError)
    return hardware
