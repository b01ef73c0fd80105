// The CPU ops: each runs on the calling thread and `threads - 1` more of the OpenMP pool.
#pragma once

#include <array>
#include <vector>

#include "../params.h"

namespace tts {

// What run_tree_attention would do with these threads. Of p it reads nodes and the numbers of rows, heads and head_dim.
struct TreeWork {
  int threads;  // that would work
  int64_t num_states;
  std::vector<std::array<int, 3>> items;  // KV heads, packed rows of each, tokens
};
TreeWork count_tree_attention(const TreeAttentionParams& p, int threads);

void run_tree_attention(const TreeAttentionParams& p, int threads);
void run_merge_states(const MergeStatesParams& p, int threads);
void run_append_kv(const AppendKVParams& p);

}  // namespace tts
