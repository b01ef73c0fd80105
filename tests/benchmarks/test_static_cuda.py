"""benchmarks.static of csrc/cuda: what it reads in nvcc's objects, and that a kernel which breaks a rule or limit is
named. The kernels are small ones made for this; what the shipped ones compile to is checked by `make static` alone."""

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NVCC = shutil.which("nvcc", path="/usr/local/cuda/bin") or shutil.which("nvcc")

pytest.importorskip("triton")
sys.path.insert(0, str(ROOT))  # plain `pytest` does not have it
from benchmarks.static import cuda  # noqa: E402
from benchmarks.static.archs import ARCHS  # noqa: E402

if NVCC is None or not cuda.tool_path("cuobjdump").exists() or not shutil.which("c++filt"):
    pytest.skip("needs nvcc, c++filt and triton's cuobjdump", allow_module_level=True)

KERNELS = """
#include <cstdint>
namespace tts {
struct BF16 {};
struct Params { const float* in; float* out; };

// Copies and multiplies as the prefix tile has to.
template <typename T, int kDim>
__global__ void __launch_bounds__(256, 1) tree_attention_kernel(Params p) {
  extern __shared__ float shared[];
  uint32_t to = uint32_t(__cvta_generic_to_shared(shared + 4 * threadIdx.x));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(p.in + 4 * threadIdx.x));
  if (kDim == 64) asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(to), "l"(p.in + 2 * threadIdx.x));
  asm volatile("cp.async.wait_all;");
  __syncthreads();
  float d[4] = {};
  uint32_t a = __float_as_uint(shared[threadIdx.x]), b = __float_as_uint(shared[threadIdx.x ^ 1]);
  if (kDim < 256)
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %4, %5}, {%4, %5}, "
        "{%0, %1, %2, %3};" : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a), "r"(b));
  p.out[threadIdx.x] = d[0] + d[1] + d[2] + d[3];
}
template __global__ void tree_attention_kernel<BF16, 64>(Params);
template __global__ void tree_attention_kernel<BF16, 128>(Params);
template __global__ void tree_attention_kernel<BF16, 256>(Params);

namespace {
__global__ void __launch_bounds__(1024, 2) spilling(Params p) {  // 32 registers for 64 numbers
  float x[64];
#pragma unroll
  for (int i = 0; i < 64; ++i) x[i] = p.in[threadIdx.x + 999 * i];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 64; ++i) p.out[threadIdx.x + 777 * i] = x[i] * x[63 - i];
}
}
void run(Params p) { spilling<<<1, 1024>>>(p); }
}
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("objects")
    made = folder / "cuda" / "head_dim" / "all.o"
    made.parent.mkdir(parents=True)
    source = folder / "all.cu"
    source.write_text(KERNELS)
    command = [NVCC, "-std=c++17", "-Xptxas", "-v", "-gencode", "arch=compute_80,code=sm_80", "-gencode",
               "arch=compute_90a,code=sm_90a", "-c", str(source), "-o", str(made)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    made.with_suffix(".log").write_text(done.stderr)
    made.with_suffix(".cmd").write_text(" ".join(command))
    assert cuda.compiler(folder).count(".") == 2
    return cuda.kernels(folder, lambda name, arch: arch.shared_per_block if "128" in name else 4096)


def test_figures(found):
    assert {code for code, _ in found} == {"sm_80", "sm_90a"}
    names = {name for _, name in found}
    assert names == {"spilling", *(f"tree_attention_kernel<BF16, {dim}>" for dim in (64, 128, 256))}
    for (code, name), kernel in found.items():
        arch = ARCHS[code.rstrip("a")]
        assert kernel.threads == (1024 if name == "spilling" else 256)
        if name == "spilling":
            assert kernel.registers <= 32 and kernel.blocks(arch) == 2
        elif "128" in name:
            assert kernel.mma == 1 and kernel.copies == {16: 1} and kernel.blocks(arch) == 1
        elif "64" in name:
            assert kernel.copies == {16: 1, 8: 1} and kernel.blocks(arch) > 1


def test_broken_rules(found):
    for (code, name), kernel in found.items():
        broken = cuda.broken_rules(name, ARCHS[code.rstrip("a")], kernel)
        if name == "spilling":
            assert broken and all(text.startswith("spills: ") for text in broken)
        elif "256" in name:
            assert broken == ["no tensor core instruction (HMMA, HGMMA)"]
        elif "64" in name:
            assert broken == ["copies of KV: expected all of 16 bytes (LDGSTS.128), got {16: 1, 8: 1}"]
        else:
            assert not broken


# As ptxas writes it, in a line of "ptxas info".
SERIALIZED = (
    "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to "
    "insufficient register resources for the wgmma pipeline in the function '_Z1f'\n"
)


def test_kernels_of_warpgroups(found):
    kernel = next(kernel for (_, name), kernel in found.items() if "128" in name)
    (said,) = cuda.COMPLAINT.findall(SERIALIZED)
    assert said.startswith("(C7510) Potential") and said.endswith("'_Z1f'")
    none = "products of warpgroups and tile copies: expected HGMMA and UTMALDG, got none"
    arch = ARCHS["sm_90"]
    assert cuda.broken_rules("tree_hopper_kernel<BF16, 128>", arch, kernel) == [none]
    good = dataclasses.replace(kernel, instructions=kernel.instructions | {"HGMMA.64x64x16.F32": 4, "UTMALDG.4D": 1})
    assert cuda.broken_rules("tree_hopper_kernel<BF16, 128>", arch, good) == []
    slow = dataclasses.replace(good, complaints=(said,))
    assert cuda.broken_rules("tree_hopper_kernel<BF16, 128>", arch, slow) == [f"ptxas: {said}"]


def test_limits(found, tmp_path):
    path = tmp_path / "limits.json"
    good = {key: kernel for key, kernel in found.items() if "128" in key[1]}
    (sm_80, name), *_ = good
    assert f"{sm_80} {name}: no limits" in cuda.violations(good, {"nvcc": "1.2.3", "limits": {}}, "1.2.3")[0]
    cuda.update(path, good, "1.2.3")
    limits = cuda.read(path)
    assert cuda.violations(good, limits, "1.2.3") == []
    entry = limits["limits"][sm_80][name]
    limits["limits"][sm_80] = {name: {"registers": entry["registers"] - 1, "shared": entry["shared"] - 1,
                                      "blocks": entry["blocks"] + 1}, "gone": entry}  # fmt: skip
    broken = cuda.violations(good, limits, "1.2.3")
    assert [text.partition(": ")[2].partition(":")[0] for text in broken] == [
        "registers", "shared", "blocks", "has limits, but there is no such kernel",
    ]  # fmt: skip
    # Another compiler: the rules alone, and what there is.
    assert len(cuda.violations(good, limits, "1.2.4")) == 1
    assert "HMMA" in cuda.table(found) and name in cuda.table(found)
