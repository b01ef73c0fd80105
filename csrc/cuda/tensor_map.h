// Tensor maps, made on the host: they are data that the kernel's params carry.
#pragma once

#include <cstdint>
#include <cstring>

#include "../params.h"

namespace tts {

// Of a tensor of four dimensions, the dense one first, whose boxes come to shared memory with their 16-byte pieces
// swizzled (device_hopper.cuh).
struct TensorMapRequest {
  const void* address;
  DType dtype;  // f16 or bf16
  int64_t extent[4];
  int64_t stride[3];  // bytes, of all but the first
  int32_t box[4];
};

}  // namespace tts

#ifdef TTS_EMULATED
#include "emulated_tensor_map.h"
#else

#include <cuda.h>
#include <cuda_runtime.h>

#include <atomic>

namespace tts {

// The driver's function, which is not linked with: the module can be imported where there is no driver. Null: it has
// none, or none yet.
inline auto tensor_map_encoder() {
  using Encoder = decltype(&cuTensorMapEncodeTiled);
  static std::atomic<Encoder> known{nullptr};
  if (const Encoder encode = known) return encode;
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
  const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
  if (error != cudaSuccess) cudaGetLastError();
  if (error != cudaSuccess || result != cudaDriverEntryPointSuccess) found = nullptr;
  return known = reinterpret_cast<Encoder>(found);
}

// Makes the context of the current device the thread's. Streams may be under capture.
inline void bind_context() {
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || cudaSetDevice(device) != cudaSuccess) cudaGetLastError();
}

inline CUresult encode_tensor_map(const TensorMapRequest& r, TensorMap* made) {
  static_assert(sizeof(TensorMap) == sizeof(CUtensorMap) && alignof(TensorMap) >= alignof(CUtensorMap), "the driver's");
  const auto encode = tensor_map_encoder();
  if (encode == nullptr) return CUDA_ERROR_NOT_INITIALIZED;
  cuuint64_t extent[4], stride[3];
  cuuint32_t box[4];
  const cuuint32_t step[4] = {1, 1, 1, 1};
  for (int i = 0; i < 4; ++i) extent[i] = cuuint64_t(r.extent[i]), box[i] = cuuint32_t(r.box[i]);
  for (int i = 0; i < 3; ++i) stride[i] = cuuint64_t(r.stride[i]);
  return encode(reinterpret_cast<CUtensorMap*>(made),
                r.dtype == DType::f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4,
                const_cast<void*>(r.address), extent, stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
                CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

// Whether there can be such a map. The last ones are remembered: a model's caches stay where they are. So is what the
// request lacks, and nothing that only the thread lacks: one that has no context yet may have one later.
inline bool make_tensor_map(const TensorMapRequest& request, TensorMap* made) {
  struct Known {
    TensorMapRequest request;
    TensorMap map;
    bool good;
  };
  constexpr int kKnown = 128;
  thread_local Known known[kKnown];
  TensorMapRequest r;
  std::memset(static_cast<void*>(&r), 0, sizeof r);  // padding too: requests are compared as bytes
  r.address = request.address, r.dtype = request.dtype;
  for (int i = 0; i < 4; ++i) r.extent[i] = request.extent[i], r.box[i] = request.box[i];
  // Nothing is at a stride of a dimension of one, whatever the tensor says: the driver gets that of a dense one.
  for (int i = 0; i < 3; ++i) {
    const int64_t dense = i == 0 ? 2 * r.extent[0] : r.stride[i - 1] * r.extent[i];
    r.stride[i] = r.extent[i + 1] > 1 ? request.stride[i] : (dense + 15) / 16 * 16;
  }
  Known& place = known[(reinterpret_cast<uintptr_t>(r.address) >> 8) * 0x9e3779b97f4a7c15ull >> 57];
  static_assert(kKnown == 1 << (64 - 57), "the highest bits of the product");
  if (std::memcmp(&place.request, &r, sizeof r) != 0) {
    std::memset(static_cast<void*>(&place.request), 0, sizeof r);
    const auto lasts = [](CUresult result) { return result == CUDA_SUCCESS || result == CUDA_ERROR_INVALID_VALUE; };
    CUresult result = encode_tensor_map(r, &place.map);
    if (!lasts(result)) {
      bind_context();
      result = encode_tensor_map(r, &place.map);
    }
    if (!lasts(result)) return false;
    place.good = result == CUDA_SUCCESS;
    std::memcpy(static_cast<void*>(&place.request), &r, sizeof r);
  }
  *made = place.map;
  return place.good;
}

}  // namespace tts
#endif
