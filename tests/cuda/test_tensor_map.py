"""csrc/cuda/tensor_map.h itself, with a driver of a few lines: what it is asked for, and how often."""

from __future__ import annotations

import subprocess

import emulated
import pytest

pytestmark = pytest.mark.skipif(emulated.build.compiler() is None, reason="no C++ compiler")

RUNTIME = r"""
#pragma once
enum cudaError_t { cudaSuccess, cudaErrorUnknown };
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess, cudaDriverEntryPointSymbolNotFound };
enum { cudaEnableDefault };
#if CUDART_VERSION >= 12050
cudaError_t cudaGetDriverEntryPointByVersion(const char*, void**, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult*);
#else
cudaError_t cudaGetDriverEntryPoint(const char*, void**, unsigned long long, cudaDriverEntryPointQueryResult*);
#endif
cudaError_t cudaGetDevice(int*);
cudaError_t cudaSetDevice(int);
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
"""
DRIVER = r"""
#pragma once
#include <cstdint>
typedef uint64_t cuuint64_t;
typedef uint32_t cuuint32_t;
struct alignas(CUDART_VERSION >= 13000 ? 128 : 64) CUtensorMap { uint64_t words[16]; };
enum CUresult { CUDA_SUCCESS, CUDA_ERROR_INVALID_VALUE, CUDA_ERROR_NOT_INITIALIZED, CUDA_ERROR_INVALID_CONTEXT };
enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_FLOAT16 = 6, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 = 9 };
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE };
enum CUtensorMapSwizzle { CU_TENSOR_MAP_SWIZZLE_128B = 3 };
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_L2_256B = 3 };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE };
CUresult cuTensorMapEncodeTiled(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
"""
PROGRAM = r"""
#include "cuda/tensor_map.h"

#include <cstdio>
#include <cstdlib>
#include <string>

int encoded = 0, set = 0;
bool can_bind = false, bound = false;

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* base,
                                const cuuint64_t* extent, const cuuint64_t* stride, const cuuint32_t* box,
                                const cuuint32_t* step, CUtensorMapInterleave, CUtensorMapSwizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  if (!bound) return CUDA_ERROR_INVALID_CONTEXT;
  ++encoded;
  if (rank != 4 || step[0] != 1 || step[3] != 1) std::abort();
  for (int i = 0; i < 3; ++i)
    if (stride[i] % 16 != 0 || stride[i] >> 40) return CUDA_ERROR_INVALID_VALUE;
  *map = {{uint64_t(type), uint64_t(base), extent[0], extent[1], extent[2], extent[3], stride[0], stride[1], stride[2],
           box[0], box[1], box[2], box[3]}};
  return CUDA_SUCCESS;
}
cudaError_t cudaGetDevice(int* device) { return *device = 3, cudaSuccess; }
cudaError_t cudaSetDevice(int device) {
  ++set;
  bound = can_bind && device == 3;
  return bound ? cudaSuccess : cudaErrorUnknown;
}
#if CUDART_VERSION >= 12050
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** found, unsigned version, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  if (version != 12000) std::abort();
#else
cudaError_t cudaGetDriverEntryPoint(const char* name, void** found, unsigned long long,
                                    cudaDriverEntryPointQueryResult* result) {
#endif
  if (std::getenv("NO_DRIVER")) return cudaErrorUnknown;
  if (std::string(name) != "cuTensorMapEncodeTiled") std::abort();
  *found = reinterpret_cast<void*>(&cuTensorMapEncodeTiled);
  *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

#define CHECK(x) if (!(x)) return std::printf("%d: %s\n", __LINE__, #x), 1

int main() {
  using namespace tts;
  alignas(256) static char cache[2][256];
  TensorMapRequest request = {cache[0], DType::bf16, {128, 8, 16, 100}, {256, 2048, 32768}, {64, 1, 16, 1}};
  TensorMap map, again, other;
  const auto word = [](const TensorMap& m, int i) { return reinterpret_cast<const uint64_t*>(m.opaque)[i]; };
  if (std::getenv("NO_DRIVER")) return make_tensor_map(request, &map);
  // A thread that gets no context yet, and gets one later.
  CHECK(!make_tensor_map(request, &map) && set == 1 && !make_tensor_map(request, &map) && set == 2);
  can_bind = true;
  CHECK(make_tensor_map(request, &map) && encoded == 1 && set == 3);
  CHECK(word(map, 0) == 9 && word(map, 1) == uint64_t(cache[0]) && word(map, 5) == 100 && word(map, 8) == 32768);
  CHECK(word(map, 9) == 64 && word(map, 11) == 16);
  CHECK(make_tensor_map(request, &again) && encoded == 1 && std::memcmp(&map, &again, sizeof map) == 0);
  // Another tensor, and the same one with other pages.
  request.address = cache[1];
  CHECK(make_tensor_map(request, &other) && encoded == 2 && word(other, 1) == uint64_t(cache[1]));
  request.extent[3] = 101;
  CHECK(make_tensor_map(request, &other) && encoded == 3 && word(other, 5) == 101);
  // The stride of one head, and that of one page, are any numbers; a wrong one of several is refused, each time.
  request.extent[1] = 1, request.stride[0] = 7;
  CHECK(make_tensor_map(request, &other) && word(other, 6) == 256);
  request.extent[3] = 1, request.stride[2] = -5;
  CHECK(make_tensor_map(request, &other) && word(other, 6) == 256 && word(other, 8) == 2048 * 16);
  request.extent[1] = 2, encoded = 0;
  CHECK(!make_tensor_map(request, &other) && !make_tensor_map(request, &other) && encoded == 1 && set == 3);
  return 0;
}
"""


@pytest.mark.parametrize("version", [12000, 12050, 13000])
def test_maps_are_made_once_and_known_by_all_that_they_say(tmp_path, version):
    (tmp_path / "cuda.h").write_text(DRIVER)
    (tmp_path / "cuda_runtime.h").write_text(RUNTIME)
    (tmp_path / "program.cpp").write_text(PROGRAM)
    command = [*emulated.build.compiler(), "-std=c++17", "-Wall", "-Wno-psabi", f"-DCUDART_VERSION={version}"]
    command += [f"-I{tmp_path}", f"-I{emulated.build.ROOT / 'csrc'}", "program.cpp", "-o", "program"]
    subprocess.run(command, cwd=tmp_path, check=True)
    for environment in ({}, {"NO_DRIVER": "1"}):
        done = subprocess.run([tmp_path / "program"], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout
