// What csrc/cuda/tensor_map.h promises, with the driver's conditions.
#pragma once

#include <new>

#include "emulation.h"

namespace tts {

inline bool make_tensor_map(const TensorMapRequest& r, TensorMap* made) {
  static_assert(sizeof(emulation::TileMap) <= sizeof(TensorMap), "the map fits");
  if (reinterpret_cast<uintptr_t>(r.address) % 16 != 0 || r.box[0] * 2 > 128) return false;
  emulation::TileMap map = {emulation::TileMap::kMagic, static_cast<const char*>(r.address), {}, {2, 0, 0, 0}, {}};
  for (int i = 0; i < 4; ++i) {
    if (r.extent[i] < 1 || r.extent[i] > int64_t(1) << 32 || r.box[i] < 1 || r.box[i] > 256) return false;
    map.extent[i] = r.extent[i], map.box[i] = r.box[i];
    if (i == 0) continue;
    map.stride[i] = r.extent[i] > 1 ? r.stride[i - 1] : 16;
    if (map.stride[i] < 0 || map.stride[i] >= int64_t(1) << 40 || map.stride[i] % 16 != 0) return false;
  }
  std::memcpy(made->opaque, &map, sizeof map);
  return true;
}

}  // namespace tts
