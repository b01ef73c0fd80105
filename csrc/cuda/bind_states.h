// From the integers that Python passes to the params structs of append_kv and merge_states. A tensor is (address, strides
// in elements of all dimensions but the last). They run on the device named first and its stream.
#pragma once

#include <array>

#include "launch.h"
#include "ops.h"

namespace tts {

// at: device, stream. shape: rows, kv heads, page_size, head_dim, bytes of an element of the cache; dtypes: of k and v,
// of the caches. Rope: cos_sin (address, stride, dtype), positions, rotary_dim, is_neox; q and q_out, query heads.
inline void cuda_append_kv(std::array<int64_t, 2> at, std::array<int64_t, 3> k, std::array<int64_t, 3> v,
                           std::array<int64_t, 4> k_cache, std::array<int64_t, 4> v_cache, int64_t slots,
                           std::array<int64_t, 5> shape, std::array<int, 2> dtypes, std::array<int64_t, 3> cos_sin,
                           int64_t positions, int64_t rotary_dim, bool is_neox, std::array<int64_t, 3> q,
                           std::array<int64_t, 3> q_out, int64_t num_heads) {
  const auto pointer = [](int64_t address) { return reinterpret_cast<void*>(address); };
  CudaAppendKVParams p = {};
  AppendKVParams& rows = p.rows;
  rows.k = pointer(k[0]), rows.k_row = k[1], rows.k_head = k[2];
  rows.v = pointer(v[0]), rows.v_row = v[1], rows.v_head = v[2];
  rows.k_cache = pointer(k_cache[0]), rows.k_page = k_cache[1], rows.k_token = k_cache[2];
  rows.k_cache_head = k_cache[3];
  rows.v_cache = pointer(v_cache[0]), rows.v_page = v_cache[1], rows.v_token = v_cache[2];
  rows.v_cache_head = v_cache[3];
  rows.slots = static_cast<const int64_t*>(pointer(slots));
  rows.num_rows = shape[0], rows.num_kv_heads = shape[1], rows.page_size = shape[2];
  rows.row_bytes = shape[3] * shape[4], rows.element_bytes = shape[4];
  p.dtype = DType(dtypes[0]), p.cache_dtype = DType(dtypes[1]);
  p.rope.cos_sin = {pointer(cos_sin[0]), cos_sin[1], DType(cos_sin[2])};
  p.rope.positions = static_cast<const int64_t*>(pointer(positions));
  p.rope.rotary_dim = rotary_dim, p.rope.is_neox = is_neox;
  p.rope.q = pointer(q[0]), p.rope.q_row = q[1], p.rope.q_head = q[2];
  p.rope.q_out = pointer(q_out[0]), p.rope.q_out_row = q_out[1], p.rope.q_out_head = q_out[2];
  p.rope.num_heads = num_heads;
  DeviceGuard device{int(at[0])};
  run_cuda_append_kv(p, uintptr_t(at[1]));
}

// at: device, stream. out: address, strides of states, rows and heads; lse likewise. shape: states, rows, heads,
// head_dim.
inline void cuda_merge_states(std::array<int64_t, 2> at, int64_t merged_out, int64_t merged_lse,
                              std::array<int64_t, 4> out, std::array<int64_t, 4> lse, std::array<int64_t, 4> shape,
                              int dtype) {
  CudaMergeStatesParams p = {};
  MergeStatesParams& states = p.states;
  states.out = reinterpret_cast<void*>(out[0]), p.out_state = out[1], p.out_row = out[2], p.out_head = out[3];
  states.lse = reinterpret_cast<float*>(lse[0]), p.lse_state = lse[1], p.lse_row = lse[2], p.lse_head = lse[3];
  states.merged_out = reinterpret_cast<void*>(merged_out);
  states.merged_lse = reinterpret_cast<float*>(merged_lse);
  states.num_states = shape[0], states.count = shape[1] * shape[2], states.head_dim = shape[3];
  states.dtype = DType(dtype), p.num_heads = shape[2];
  DeviceGuard device{int(at[0])};
  run_cuda_merge_states(p, uintptr_t(at[1]));
}

}  // namespace tts
