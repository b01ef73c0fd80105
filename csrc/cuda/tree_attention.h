// The host's side of tree attention on CUDA.
#pragma once

#include <cstdint>
#include <sstream>
#include <string>

#include "../params.h"

namespace tts {

// On the current device: at most `blocks` blocks of threads. Defined for 64, 96, 128, 192 and 256.
template <int kDim>
void run_tree_attention_dim(const CudaTreeAttentionParams& p, uintptr_t stream, int blocks);

inline std::string describe(const CudaTreeAttentionParams& p) {
  const TreeAttentionParams& c = p.call;
  std::ostringstream text;
  text << "rows " << c.num_rows << ", heads " << c.num_heads << "/" << c.num_kv_heads << ", head_dim " << c.head_dim
       << ", nodes " << c.num_nodes << ", page_size " << c.page_size << ", items " << p.num_items << ", stages "
       << p.num_stages;
  return text.str();
}

}  // namespace tts
