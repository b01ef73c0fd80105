// What the scheduler (tree_attention.cpp) and the code paths (isa/*.cpp) agree on.
#pragma once

#include "../params.h"

namespace tts {

// Chunk borders depend on the node's length alone, never on how many rows it serves: a row's result does not change,
// bit for bit, when siblings come or go. Long nodes get longer chunks, so that partial states stay few.
constexpr int kMinChunk = 512, kMaxChunk = 4096;
TTS_SHARED int chunk_tokens(int length) {
  int eighth = (length / 8 + 127) / 128 * 128;
  return eighth < kMinChunk ? kMinChunk : eighth > kMaxChunk ? kMaxChunk : eighth;
}
TTS_SHARED int num_chunks(int length) { return (length + chunk_tokens(length) - 1) / chunk_tokens(length); }

constexpr int kMaxHeadDim = 256;
TTS_SHARED int padded_head_dim(int head_dim) { return (head_dim + 31) / 32 * 32; }
constexpr int kMaxItemLanes = 512;  // packed rows (rows * group) times KV heads of one item: bounds a thread's scratch
constexpr int kNarrow = 64;  // up to so many packed rows, reading KV is the cost, and an item takes several KV heads:
constexpr int kNarrowElements = 512;  // in an NHD cache their rows are one long run of memory

// The most KV heads that an item takes.
TTS_SHARED int max_item_heads(int head_dim, int num_kv_heads) {
  const int heads = kNarrowElements / padded_head_dim(head_dim);  // 2 to 16
  return heads < num_kv_heads ? heads : num_kv_heads;
}

// KV heads of one item that has so many packed rows per head.
TTS_SHARED int heads_per_item(int head_dim, int num_kv_heads, int64_t packed_rows) {
  if (packed_rows > kNarrow) return 1;
  const int heads = max_item_heads(head_dim, num_kv_heads);
  const int fit = int(kMaxItemLanes / ((packed_rows + 31) / 32 * 32));
  return heads < fit ? heads : fit;
}

// The states of one node: softmax partials (o, m, l) of each packed row = row * group + head in group, o not yet
// divided by l, m in base 2. `slots` is the number of chunks kept apart, or 1 where one item folds all chunks itself.
struct NodeStates {
  int64_t first;  // index of the node's first state
  int32_t slots;
};

struct States {
  float* o;                 // [num_states, padded_head_dim]
  float* m;                 // [num_states]
  float* l;                 // [num_states]
  const NodeStates* nodes;  // [num_nodes]
};

TTS_SHARED int64_t state_index(const TreeAttentionParams& p, const States& s, int node, int slot, int kv_head,
                               int row) {
  int64_t rows = p.rows_end(node) - p.own_begin(node);
  return s.nodes[node].first +
         ((int64_t(slot) * p.num_kv_heads + kv_head) * rows + (row - p.own_begin(node))) * p.group();
}

// One item of work: some rows of one node against some of its chunks, for some KV heads with all their query heads.
struct WorkItem {
  int32_t node;
  int32_t head_begin, head_end;    // KV heads
  int32_t row_begin, row_end;      // depth-first rows
  int32_t chunk_begin, chunk_end;  // folded in order into slot `slot`
  int32_t slot;
  float cost;
};

}  // namespace tts
