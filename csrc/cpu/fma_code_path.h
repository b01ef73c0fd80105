// The bodies of a path that has nothing but the FMA items.
#pragma once

#include "fma_path.h"
#include "scoring_path.h"

namespace {

void nothing() {}

int64_t row_scratch_bytes(const TreeAttentionParams& p) {
  return int64_t(tts::padded_head_dim(p.head_dim)) * 8 + int64_t(p.num_nodes) * 4;
}

int64_t fma_scratch_bytes(const TreeAttentionParams& p) {
  const int64_t item = fma_item_bytes(p), row = row_scratch_bytes(p);
  return item > row ? item : row;
}

constexpr tts::CodePath fma_code_path(const char* name) {
  return {name, fma_scratch_bytes, nothing, nothing, run_fma, finish_row, merge_states, scoring_path()};
}

}  // namespace
