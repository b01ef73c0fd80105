"""csrc/cuda/launch.h itself, with a CUDA runtime of a few lines. In it a kernel's limit of shared memory is, as in the
real one, what was set last, and a launch above it fails."""

from __future__ import annotations

import subprocess

import emulated
import pytest

pytestmark = pytest.mark.skipif(emulated.build.compiler() is None, reason="no C++ compiler")

RUNTIME = r"""
#pragma once
#include <cstddef>
#include <cstdint>
#include <map>
#include <utility>

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
using cudaStream_t = struct Stream*;
struct dim3 {
  dim3(unsigned n) : x(n) {}
  unsigned x;
};

struct Runtime {
  int device = 0, launches = 0, attributes = 0;
  int64_t most = 227 << 10;  // that a device has
  std::map<std::pair<int, const void*>, int64_t> limits;
  int64_t limit(const void* kernel) {
    auto found = limits.find({device, kernel});
    return found == limits.end() ? 48 << 10 : found->second;
  }
};
inline Runtime runtime;

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "invalid argument"; }
inline cudaError_t cudaGetDevice(int* device) { return *device = runtime.device, cudaSuccess; }
inline cudaError_t cudaSetDevice(int device) { return runtime.device = device, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* count, cudaDeviceAttr, int) { return *count = 3, cudaSuccess; }
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  ++runtime.attributes;
  if (bytes > runtime.most) return cudaErrorInvalidValue;
  return runtime.limits[{runtime.device, kernel}] = bytes, cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel kernel, int, size_t bytes) {
  *blocks = int64_t(bytes) > runtime.limit(reinterpret_cast<const void*>(kernel)) ? 0 : int(runtime.most / (bytes + 1));
  return cudaSuccess;
}
inline cudaError_t cudaLaunchKernel(const void* kernel, dim3, dim3, void**, size_t bytes, cudaStream_t) {
  if (int64_t(bytes) > runtime.limit(kernel)) return cudaErrorInvalidValue;
  return ++runtime.launches, cudaSuccess;
}
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = 12080, cudaSuccess; }
inline cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 13000, cudaSuccess; }
"""

PROGRAM = r"""
#include "cuda/launch.h"

#include <cstdio>

struct Params { int x; };
void one(Params) {}
void other(Params) { std::puts(""); }

bool launches(void (*kernel)(Params), int64_t bytes) {
  try {
    tts::launch(kernel, {1, 32, bytes, 0, "kernel"}, Params{});
  } catch (const std::runtime_error& error) {
    return std::printf("%s\n", error.what()), false;
  }
  return true;
}

#define CHECK(x) if (!(x)) return std::printf("%d: %s\n", __LINE__, #x), 1

int main() {
  for (int64_t bytes : {150000, 118000, 150000, 0, 49152, 118000, 150000}) CHECK(launches(one, bytes));
  CHECK(runtime.attributes == 1);  // and nothing is asked for again
  CHECK(!launches(other, 300 << 10));  // more than there is, which changes nothing
  CHECK(launches(other, 118000) && launches(other, 150000) && launches(other, 118000));
  // Each device has limits of its own.
  {
    tts::DeviceGuard device(1);
    CHECK(launches(one, 118000) && launches(one, 150000) && launches(one, 118000));
    CHECK(runtime.limits.size() == 3);
  }
  // How many blocks fit is asked with the bytes of that question.
  CHECK(tts::blocks_per_multiprocessor(one, 32, 200000) == 1 && tts::blocks_per_multiprocessor(one, 32, 100000) == 2);
  CHECK(launches(one, 200000));
  CHECK((tts::cuda_versions() == std::array<int, 2>{12080, 13000}));
}
"""


def test_launches_with_more_and_with_less_shared_memory(tmp_path):
    (tmp_path / "cuda_runtime.h").write_text(RUNTIME)
    (tmp_path / "main.cpp").write_text(PROGRAM)
    command = [
        *emulated.build.compiler(),
        "-std=c++17",
        "-Icsrc",
        f"-I{tmp_path}",
        str(tmp_path / "main.cpp"),
        "-pthread",
    ]
    subprocess.run([*command, "-o", str(tmp_path / "main")], cwd=emulated.build.ROOT, check=True)
    done = subprocess.run([str(tmp_path / "main")], stdout=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 0, done.stdout
