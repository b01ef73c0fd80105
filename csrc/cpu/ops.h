// The CPU ops: each runs on the calling thread and `threads - 1` more of the OpenMP pool.
#pragma once

#include "../params.h"

namespace tts {

void run_tree_attention(const TreeAttentionParams& p, int threads);
void run_merge_states(const MergeStatesParams& p, int threads);
void run_append_kv(const AppendKVParams& p);

}  // namespace tts
