// The host's side of tree attention on CUDA.
#pragma once

#include <cstdint>
#include <sstream>
#include <string>

#include "../params.h"

namespace tts {

// On the current device. Throws std::runtime_error for what no kernel is made for, and where the launch fails. Returns
// how many tokens of KV the copy engine brings at a time, 0 where threads copy.
int run_cuda_tree_attention(const CudaTreeAttentionParams& p, uintptr_t stream);

// Of shared memory that a block of threads takes.
int64_t cuda_tree_attention_shared_bytes(int head_dim, int num_stages, bool fp8);
// Likewise of the kernel of warpgroups; 0 where there is none for such heads, or none in this module.
int64_t cuda_tree_hopper_shared_bytes(int head_dim, int num_stages);

// Defined in head_dim/ for 64, 96, 128, 192 and 256: heads of up to so many dimensions.
template <int kDim>
void run_tree_attention_dim(const CudaTreeAttentionParams& p, uintptr_t stream);
template <int kDim>
int64_t tree_attention_shared_bytes_dim(int num_stages, bool fp8);

// Defined in hopper/ for 64 and 128, which is compiled for sm_90a alone: the same with products of warpgroups, for
// 16-bit KV of heads of just so many dimensions, of 2 to 3 stages.
template <int kDim>
int run_tree_hopper_dim(const CudaTreeAttentionParams& p, uintptr_t stream);
template <int kDim>
int64_t tree_hopper_shared_bytes_dim(int num_stages);

// Blocks of threads that would find something to do: one for each (item, KV head), and for rows without any.
inline int64_t tree_work(const CudaTreeAttentionParams& p) {
  return int64_t(p.num_items) * p.call.num_kv_heads + (p.call.num_rows + 255) / 256;
}

inline std::string describe(const CudaTreeAttentionParams& p) {
  const TreeAttentionParams& c = p.call;
  std::ostringstream text;
  text << c.num_rows << " rows of " << c.num_heads << " heads, " << c.num_kv_heads << " KV heads of " << c.head_dim
       << ", " << c.num_nodes << " nodes, page_size " << c.page_size << ", " << p.num_items << " items, "
       << p.num_stages << (p.warpgroups ? " stages, warpgroups" : " stages");
  return text.str();
}

}  // namespace tts
