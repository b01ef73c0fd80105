// From the integers that Python passes to the params structs. A tensor is (address, strides in elements...).
#pragma once

#include <array>
#include <tuple>
#include <utility>
#include <vector>

#include "ops.h"

namespace tts {

using Tensor2 = std::array<int64_t, 3>;  // address and two strides; the last dimension has stride 1
using Tensor3 = std::array<int64_t, 4>;  // address and three strides

inline void* address(int64_t x) { return reinterpret_cast<void*>(x); }
template <typename T>
T* address(int64_t x) {
  return reinterpret_cast<T*>(x);
}

// shape: rows, heads, kv heads, head_dim, nodes, page_size
inline void cpu_tree_attention(Tensor2 out, int64_t lse, Tensor2 q, Tensor3 k, Tensor3 v, std::array<int64_t, 3> plan,
                               std::array<int64_t, 6> shape, int64_t sinks, int64_t k_scale, int64_t v_scale,
                               int window, bool causal, float scale, float softcap, int q_dtype, int kv_dtype,
                               int threads) {
  TreeAttentionParams p;
  p.q = address(q[0]), p.q_row = q[1], p.q_head = q[2];
  p.out = address(out[0]), p.out_row = out[1], p.out_head = out[2];
  p.lse = address<float>(lse);
  p.k = address(k[0]), p.k_page = k[1], p.k_token = k[2], p.k_head = k[3];
  p.v = address(v[0]), p.v_page = v[1], p.v_token = v[2], p.v_head = v[3];
  p.nodes = address<int32_t>(plan[0]);
  p.pages = address<int32_t>(plan[1]);
  p.rows = address<int32_t>(plan[2]);
  p.sinks = address<float>(sinks);
  p.k_scale = address<float>(k_scale);
  p.v_scale = address<float>(v_scale);
  p.num_rows = int32_t(shape[0]), p.num_heads = int32_t(shape[1]), p.num_kv_heads = int32_t(shape[2]);
  p.head_dim = int32_t(shape[3]), p.num_nodes = int32_t(shape[4]), p.page_size = int32_t(shape[5]);
  p.window = window, p.causal = causal, p.scale = scale, p.softcap = softcap;
  p.q_dtype = DType(q_dtype), p.kv_dtype = DType(kv_dtype);
  run_tree_attention(p, threads);
}

// shape: rows, heads, kv heads, head_dim, nodes. Returns threads, states, items (see TreeWork).
inline std::tuple<int, int64_t, std::vector<std::array<int, 3>>> cpu_count_work(int64_t nodes,
                                                                                std::array<int64_t, 5> shape,
                                                                                int threads) {
  TreeAttentionParams p = {};
  p.nodes = address<int32_t>(nodes);
  p.num_rows = int32_t(shape[0]), p.num_heads = int32_t(shape[1]), p.num_kv_heads = int32_t(shape[2]);
  p.head_dim = int32_t(shape[3]), p.num_nodes = int32_t(shape[4]);
  TreeWork work = count_tree_attention(p, threads);
  return {work.threads, work.num_states, std::move(work.items)};
}

// shape: rows, kv heads, page_size, bytes of a row, bytes of an element
inline void cpu_append_kv(Tensor2 k, Tensor2 v, Tensor3 k_cache, Tensor3 v_cache, int64_t slots,
                          std::array<int64_t, 5> shape) {
  AppendKVParams p;
  p.k = address(k[0]), p.k_row = k[1], p.k_head = k[2];
  p.v = address(v[0]), p.v_row = v[1], p.v_head = v[2];
  p.k_cache = address(k_cache[0]), p.k_page = k_cache[1], p.k_token = k_cache[2], p.k_cache_head = k_cache[3];
  p.v_cache = address(v_cache[0]), p.v_page = v_cache[1], p.v_token = v_cache[2], p.v_cache_head = v_cache[3];
  p.slots = address<int64_t>(slots);
  p.num_rows = shape[0], p.num_kv_heads = shape[1], p.page_size = shape[2];
  p.row_bytes = shape[3], p.element_bytes = shape[4];
  run_append_kv(p);
}

// shape: states, rows * heads, head_dim
inline void cpu_merge_states(int64_t merged_out, int64_t merged_lse, int64_t out, int64_t lse,
                             std::array<int64_t, 3> shape, int dtype, int threads) {
  MergeStatesParams p;
  p.out = address(out), p.lse = address<float>(lse);
  p.merged_out = address(merged_out), p.merged_lse = address<float>(merged_lse);
  p.num_states = shape[0], p.count = shape[1], p.head_dim = shape[2];
  p.dtype = DType(dtype);
  run_merge_states(p, threads);
}

}  // namespace tts
