// An item of the work list as a block of threads sees it: which tokens, which packed rows, who sees what.
#pragma once

#include "../params.h"
#include "chunks.cuh"
#include "device.cuh"

namespace tts {

constexpr int kTreeThreads = 256, kTreeWarps = kTreeThreads / 32;
constexpr int kMaxStages = 4;       // blocks of KV in shared memory; as many items can be begun at a time
constexpr int kMostTileRows = 128;  // of the three tiles: 16, 64 and 128 packed rows

// Tokens of a block of KV. The same for every tile, since a row's rounding depends on it.
constexpr int block_tokens(int dim) { return dim <= 128 ? 64 : 32; }

// Of a node.
TTS_DEVICE int chunk_tokens(const CudaTreeAttentionParams& p, int node, int length) {
  const int own_rows = p.call.own_end(node) - p.call.own_begin(node);
  return chunk_tokens(length, most_chunks(own_rows, int(p.by_group.divisor), p.wide_rows, p.max_chunks), p.min_chunk);
}

// The partial states of a row: those of its path.
TTS_DEVICE int count_states(const CudaTreeAttentionParams& p, int owner) {
  const int length = p.call.length(owner);
  return p.path_chunks[owner] + ceil_div(length, chunk_tokens(p, owner, length));
}

// What is true of all of an item. In shared memory, for those who compute; the copying runs ahead.
struct TreeItem {
  int rows;       // packed rows of the tile: 16, 64, 128
  int count;      // of them that there are
  int first;      // packed row
  int own_begin;  // row that packed row 0 belongs to
  int kv_head;
  int state;                   // chunks before this one on the path
  int begin;                   // first token of the first block
  int blocks;                  // at least 1; the lone block of an item of which no row sees a token is empty
  int whole_begin, whole_end;  // every row sees all of these tokens
};

// What is true of a packed row of the item.
struct TreeRows {
  int first[kMostTileRows], stop[kMostTileRows];   // tokens of the node that it sees
  int source[kMostTileRows], head[kMostTileRows];  // where it lies in q and out
  int state[kMostTileRows];                        // its partial state of this item
  int arrivals[kMostTileRows];                     // partial states that it has in all; 0: there is no such row
};

struct TreeShared {
  TreeItem item[kMaxStages];
  TreeRows rows[kMaxStages];
  int item_of[kMaxStages];  // by place of a block: its item's place in those two; -1: there is no block
  int extremes[2][kTreeWarps];
  float largest[128];        // [warps that share rows][rows]
  bool last[kMostTileRows];  // this block is the last arriver of the row
};

// Places in the rest of the dynamic shared memory, behind TreeShared.
//   16-bit KV: num_stages times K and V of a block.   e4m3: K and V of one block in T, then num_stages of the bytes.
template <int kDim>
struct TreeLayout {
  static constexpr int kTokens = block_tokens(kDim);
  static constexpr int kHalf = kTokens * kDim * 2;                              // bytes of K or V of a block in T
  static constexpr int kChunks = kDim / 8;                                      // of 16 bytes in a row of it
  static constexpr int kWeights = (int(sizeof(TreeShared)) + 127) / 128 * 128;  // P, [64][kTokens]
  static constexpr int kBlocks = kWeights + 64 * kTokens * 2;

  static constexpr int64_t bytes(int num_stages, bool fp8) {
    return kBlocks + int64_t(fp8 ? 2 + num_stages : 2 * num_stages) * kHalf;
  }
};

// Where the 16-byte piece `chunk` of a row of kChunks pieces lies, so that eight rows of one column, which ldmatrix
// reads at a time, lie in different banks. The piece chunk + more is meant, for two numbers that share no bit: of a
// `more` that the compiler knows little is left to compute, and to keep.
template <int kChunks>
TTS_DEVICE int swizzled(int row, int chunk, int more = 0) {
  static_assert(kChunks % 4 == 0, "rows of whole groups of pieces");
  if (kChunks % 8 == 0) return ((row * kChunks + (chunk ^ (row & 7))) ^ (more & 7)) + (more & ~7);
  return ((row * kChunks + (chunk ^ ((row >> 1) & 3))) ^ (more & 3)) + (more & ~3);
}

// Threads that work together: those of the block from kFirst on, who meet at a barrier of theirs; 0: the whole block.
template <int kFirst, int kCount, int kBarrier>
struct Crew {
  static constexpr int kThreads = kCount, kWarps = kCount / 32;
  TTS_DEVICE static int thread() { return thread_index_anew() - kFirst; }
  TTS_DEVICE static void sync() {
    if constexpr (kBarrier == 0)
      sync_block();
    else
      sync_part(kBarrier, kCount);
  }
  TTS_DEVICE static bool sync_any(bool x) {
    if constexpr (kBarrier == 0)
      return sync_block_any(x);
    else
      return sync_part_any(kBarrier, kCount, x);
  }
};
using WholeBlock = Crew<0, kTreeThreads, 0>;

// The smallest `low` and the largest `high` of all threads of the crew, in every one.
template <typename Crew>
TTS_DEVICE void crew_extremes(TreeShared& shared, int& low, int& high) {
  for (int mask = 16; mask > 0; mask >>= 1) {
    low = min(low, shuffle_xor(low, mask));
    high = max(high, shuffle_xor(high, mask));
  }
  const uint32_t thread = Crew::thread();
  if (thread % 32 == 0) shared.extremes[0][thread / 32] = low, shared.extremes[1][thread / 32] = high;
  Crew::sync();
  for (int warp = 0; warp < Crew::kWarps; ++warp) {
    low = min(low, shared.extremes[0][warp]);
    high = max(high, shared.extremes[1][warp]);
  }
  Crew::sync();
}

}  // namespace tts
