"""The architectures and what one of their multiprocessors holds.

NVIDIA: CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability"; tuning guides of Ampere,
Hopper and Blackwell (1 KiB of shared memory is reserved for each block); units of allocation from cuda_occupancy.h;
512 columns of tensor memory: PTX ISA, "Tensor Memory".
AMD: LLVM, AMDGPUBaseInfo.cpp (IsaInfo, for gfx90a and later): 512 vector registers of each lane, VGPRs and AGPRs
together, in units of 8; 8 waves per SIMD; 16 barriers, which only groups of several waves take; LDS in units of 128
dwords. 64 KiB of LDS: ROCm, "Accelerator and GPU hardware specifications".
"""

from __future__ import annotations

from dataclasses import dataclass

from triton.backends.compiler import GPUTarget

PARTITIONS = 4  # of an SM, SIMDs of a CU: each has its own registers and warps
LANE_REGISTERS = 512  # of 32 bits, for all warps of a partition: 16,384 / 32 on NVIDIA
REGISTER_UNIT = 8  # 256 for a warp of 32


@dataclass(frozen=True)
class Arch:
    """Bytes, and counts per multiprocessor (SM, CU)."""

    name: str
    target: GPUTarget
    max_warps: int
    max_blocks: int
    shared: int
    shared_per_block: int  # the most that a launch may ask for
    shared_reserved: int  # per block, beyond what it asks for
    shared_unit: int
    tensor_memory: int = 0  # columns

    def blocks(self, registers: int, shared: int, num_warps: int, tensor_memory: int = 0) -> int:
        """Blocks (work groups) of `num_warps` warps that a multiprocessor holds at a time. AMD's SGPRs are not counted:
        they leave room for 7 of 8 waves at least."""
        if shared > self.shared_per_block or tensor_memory > self.tensor_memory:
            return 0
        registers = round_up(max(registers, 1), REGISTER_UNIT)
        # A block's warps are spread evenly over the partitions.
        if round_up(num_warps, PARTITIONS) // PARTITIONS * registers > LANE_REGISTERS:
            return 0
        limits = [
            min(PARTITIONS * (LANE_REGISTERS // registers), self.max_warps) // num_warps,
            self.shared // max(round_up(shared + self.shared_reserved, self.shared_unit), 1),
        ]
        if self.target.backend == "cuda" or num_warps > 1:
            limits.append(self.max_blocks)
        if tensor_memory:
            limits.append(self.tensor_memory // tensor_memory)
        return min(limits)


def round_up(x: int, unit: int) -> int:
    return -(-x // unit) * unit


def nvidia(capability: int, shared_kib: int, tensor_memory: int = 0) -> Arch:
    return Arch(
        f"sm_{capability}", GPUTarget("cuda", capability, 32), max_warps=64, max_blocks=32, shared=shared_kib << 10,
        shared_per_block=(shared_kib - 1) << 10, shared_reserved=1 << 10, shared_unit=128, tensor_memory=tensor_memory,
    )  # fmt: skip


ARCHS = {
    arch.name: arch
    for arch in (
        nvidia(80, 164),
        nvidia(90, 228),
        nvidia(100, 228, tensor_memory=512),
        Arch("gfx942", GPUTarget("hip", "gfx942", 64), 32, 16, 64 << 10, 64 << 10, 0, 512),
    )
}
