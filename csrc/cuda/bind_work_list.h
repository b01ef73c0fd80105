// From the integers that Python passes to the params of the kernel that makes work lists.
#pragma once

#include <array>

#include "launch.h"
#include "work_list.h"

namespace tts {

// at: device, stream. tree: nodes, grows. shape: nodes, rows, items that the table has places for. group: query heads
// per KV head; spare: tokens by which growing nodes may come to be longer. config: wide, narrow and tall rows, min_chunk,
// max_chunks.
inline void cuda_work_list(std::array<int64_t, 2> at, int64_t table, std::array<int64_t, 2> tree,
                           std::array<int64_t, 3> shape, int group, int spare, std::array<int64_t, 5> config) {
  WorkListParams p;
  p.nodes = reinterpret_cast<const int32_t*>(tree[0]);
  p.grows = reinterpret_cast<const int32_t*>(tree[1]);
  p.num_nodes = int32_t(shape[0]), p.num_rows = int32_t(shape[1]), p.num_items = int32_t(shape[2]);
  p.items = reinterpret_cast<int32_t*>(table);
  p.path_chunks = p.items + 4 * shape[2];
  p.first_state = p.path_chunks + p.num_nodes;
  p.live_items = p.first_state + p.num_rows;
  p.group = group, p.spare = spare;
  p.wide_rows = int32_t(config[0]), p.narrow_rows = int32_t(config[1]), p.tall_rows = int32_t(config[2]);
  p.min_chunk = int32_t(config[3]), p.max_chunks = int32_t(config[4]);
  DeviceGuard device{int(at[0])};
  run_cuda_work_list(p, uintptr_t(at[1]));
}

}  // namespace tts
