// From the integers that Python passes to the params of tree attention. A tensor is (address, strides in elements...).
#pragma once

#include <array>

#include "launch.h"
#include "tree_attention.h"

namespace tts {

// at: device, stream. plan: nodes, pages, rows. shape: rows, heads, kv heads, head_dim, nodes, page_size, pages. work:
// table, items that it has places for, scratch, states that it has places for. config: wide rows, min_chunk,
// max_chunks, stages, warpgroups. Returns what run_cuda_tree_attention does.
inline int cuda_tree_attention(std::array<int64_t, 2> at, std::array<int64_t, 3> out, int64_t lse,
                               std::array<int64_t, 3> q, std::array<int64_t, 4> k, std::array<int64_t, 4> v,
                               std::array<int64_t, 3> plan, std::array<int64_t, 7> shape, int64_t sinks,
                               int64_t k_scale, int64_t v_scale, int window, bool causal, float scale, float softcap,
                               int q_dtype, int kv_dtype, std::array<int64_t, 4> work, std::array<int, 5> config) {
  const auto pointer = [](int64_t address) { return reinterpret_cast<void*>(address); };
  const auto ints = [](int64_t address) { return reinterpret_cast<const int32_t*>(address); };
  const auto floats = [](int64_t address) { return reinterpret_cast<float*>(address); };
  CudaTreeAttentionParams p = {};
  TreeAttentionParams& c = p.call;
  c.q = pointer(q[0]), c.q_row = q[1], c.q_head = q[2];
  c.out = pointer(out[0]), c.out_row = out[1], c.out_head = out[2];
  c.lse = floats(lse);
  c.k = pointer(k[0]), c.k_page = k[1], c.k_token = k[2], c.k_head = k[3];
  c.v = pointer(v[0]), c.v_page = v[1], c.v_token = v[2], c.v_head = v[3];
  c.nodes = ints(plan[0]), c.pages = ints(plan[1]), c.rows = ints(plan[2]);
  c.sinks = floats(sinks), c.k_scale = floats(k_scale), c.v_scale = floats(v_scale);
  c.num_rows = int32_t(shape[0]), c.num_heads = int32_t(shape[1]), c.num_kv_heads = int32_t(shape[2]);
  c.head_dim = int32_t(shape[3]), c.num_nodes = int32_t(shape[4]), c.page_size = int32_t(shape[5]);
  c.window = window, c.causal = causal, c.scale = scale, c.softcap = softcap;
  c.q_dtype = DType(q_dtype), c.kv_dtype = DType(kv_dtype);
  p.num_items = int32_t(work[1]);
  p.items = ints(work[0]);
  p.path_chunks = p.items + 4 * work[1];
  p.first_state = p.path_chunks + c.num_nodes;
  p.live_items = p.first_state + c.num_rows;
  p.states = floats(work[2]);
  p.sums = p.states + work[3] * c.num_heads * c.head_dim;
  p.arrivals = reinterpret_cast<uint32_t*>(p.sums + work[3] * c.num_heads * 2);
  p.wide_rows = config[0], p.min_chunk = config[1], p.max_chunks = config[2], p.num_stages = config[3];
  p.num_pages = int32_t(shape[6]), p.warpgroups = config[4] != 0;
  p.by_group = make_divider(c.group()), p.by_page_size = make_divider(c.page_size);
  DeviceGuard device{int(at[0])};
  return run_cuda_tree_attention(p, uintptr_t(at[1]));
}

}  // namespace tts
