// The work list of a tree (tts_kernels/attention/work.py), made from the tree's tables where they are, in one launch:
// the same numbers in the same places as the host's.
//
// A block owns some nodes and looks at all of them. A node's items begin where those of the nodes end that the list has
// before it: a sum over all nodes, as is the sum of the states of the rows before its own. So nothing is sorted, and
// blocks tell one another nothing.
#include <algorithm>
#include <sstream>
#include <string>

#include "chunks.cuh"
#include "launch.h"
#include "work_list.h"

namespace tts {

namespace {

constexpr int kThreads = 256;
constexpr int kShare = 8;                  // threads that add up for a node
constexpr int kOwned = kThreads / kShare;  // nodes of a block

enum Tile { kNarrow = 0, kWide = 1, kTall = 2 };

struct NodeWork {
  int tokens;  // of its longest chunk: where it stands in the list
  int items;
  int states;  // of its own rows
  int chunks;
  int above;  // chunks of its strict ancestors
};

struct OwnedNode {
  int first_item, first_state;
  NodeWork work;
};

struct Shared {
  int tokens[kThreads], items[kThreads], states[kThreads];
  OwnedNode owned[kOwned];
  int live[kThreads / 32];
};

TTS_DEVICE int word(const WorkListParams& p, int row, int node) { return p.nodes[int64_t(row) * p.num_nodes + node]; }
TTS_DEVICE int parent(const WorkListParams& p, int node) { return word(p, 0, node); }
TTS_DEVICE int length(const WorkListParams& p, int node) { return word(p, 1, node); }
TTS_DEVICE int own_begin(const WorkListParams& p, int node) { return word(p, 4, node); }
TTS_DEVICE int own_rows(const WorkListParams& p, int node) { return word(p, 5, node) - own_begin(p, node); }

TTS_DEVICE int packed_rows(const WorkListParams& p, int node) {
  return (word(p, 6, node) - own_begin(p, node)) * p.group;
}

TTS_DEVICE int largest_tile(const WorkListParams& p) { return p.tall_rows ? p.tall_rows : p.wide_rows; }

// Those that the node has, or may come to have while it grows.
TTS_DEVICE int count_chunks(const WorkListParams& p, int node, int most) {
  const int spare = p.grows[node] ? p.spare : 0;
  if (spare > 0) return min(most, ceil_div(length(p, node) + spare, p.min_chunk));
  return ceil_div(length(p, node), chunk_tokens(length(p, node), most, p.min_chunk));
}

TTS_DEVICE int most_of(const WorkListParams& p, int node) {
  return most_chunks(own_rows(p, node), p.group, p.wide_rows, p.max_chunks);
}

TTS_DEVICE NodeWork node_work(const WorkListParams& p, int node) {
  const int most = most_of(p, node);
  NodeWork work;
  work.tokens = min(length(p, node), chunk_tokens(length(p, node), most, p.min_chunk));
  work.chunks = count_chunks(p, node, most);
  work.items = work.chunks * ceil_div(packed_rows(p, node), largest_tile(p));
  work.above = 0;
  for (int up = parent(p, node); up >= 0; up = parent(p, up)) work.above += count_chunks(p, up, most_of(p, up));
  work.states = own_rows(p, node) * (work.above + work.chunks);
  return work;
}

// Which tile takes `left` packed rows, the first of them and those behind.
TTS_DEVICE int tile_for(const WorkListParams& p, int packed, int left) {
  if (!p.tall_rows) return packed > p.narrow_rows ? kWide : kNarrow;
  return left > p.wide_rows ? kTall : left > p.narrow_rows ? kWide : kNarrow;
}

TTS_DEVICE void store_item(const WorkListParams& p, int item, int node, int first, int chunk, int tile) {
  if (item >= p.num_items) return;
  store_16(p.items + int64_t(item) * 4, {{uint32_t(node), uint32_t(first), uint32_t(chunk), uint32_t(tile)}});
}

TTS_DEVICE void write_node(const WorkListParams& p, int node, const OwnedNode& owned) {
  const int thread = thread_index();
  const int packed = packed_rows(p, node), rows = largest_tile(p), tiles = ceil_div(packed, rows);
  for (int i = thread; i < owned.work.items; i += kThreads) {
    const int chunk = i / tiles, first = (i - chunk * tiles) * rows;
    store_item(p, owned.first_item + i, node, first, chunk, tile_for(p, packed, packed - first));
  }
  const int states = owned.work.above + owned.work.chunks;
  for (int j = thread; j < own_rows(p, node); j += kThreads)
    p.first_state[own_begin(p, node) + j] = owned.first_state + j * states;
  if (thread == 0) p.path_chunks[node] = owned.work.above;
}

__global__ void __launch_bounds__(kThreads) work_list(const __grid_constant__ WorkListParams p) {
  Shared& shared = *shared_memory<Shared>();
  const int thread = thread_index(), first_owned = block_index() * kOwned;
  const int mine = thread / kShare, node = first_owned + mine;

  NodeWork work = {};
  if (node < p.num_nodes) work = node_work(p, node);
  int first_item = 0, first_state = 0, live = 0;
  for (int begin = 0; begin < p.num_nodes; begin += kThreads) {
    const int count = min(kThreads, p.num_nodes - begin);
    if (thread < count) {
      const NodeWork other = node_work(p, begin + thread);
      shared.tokens[thread] = other.tokens, shared.items[thread] = other.items, shared.states[thread] = other.states;
      live += other.items;
    }
    sync_block();
    for (int i = thread % kShare; i < count; i += kShare) {
      const bool earlier = begin + i < node;
      const int tokens = shared.tokens[i];
      if (tokens > work.tokens || (tokens == work.tokens && earlier)) first_item += shared.items[i];
      if (earlier) first_state += shared.states[i];
    }
    sync_block();
  }
  for (int mask = 1; mask < kShare; mask *= 2) {
    first_item += shuffle_xor(first_item, mask);
    first_state += shuffle_xor(first_state, mask);
  }
  for (int mask = 1; mask < 32; mask *= 2) live += shuffle_xor(live, mask);
  if (thread % kShare == 0) shared.owned[mine] = {first_item, first_state, work};
  if (lane_index() == 0) shared.live[warp_index()] = live;
  sync_block();

  for (int i = 0; i < kOwned && first_owned + i < p.num_nodes; ++i) write_node(p, first_owned + i, shared.owned[i]);
  live = 0;
  for (int warp = 0; warp < kThreads / 32; ++warp) live += shared.live[warp];
  // The rest names a chunk that no node has.
  for (int item = live + block_index() * kThreads + thread; item < p.num_items; item += block_count() * kThreads)
    store_item(p, item, 0, 0, p.max_chunks, kNarrow);
  if (block_index() == 0 && thread == 0) *p.live_items = min(live, p.num_items);
}

}  // namespace

std::string describe(const WorkListParams& p) {
  std::ostringstream text;
  text << p.num_nodes << " nodes, " << p.num_rows << " rows, " << p.num_items << " items";
  return text.str();
}

void run_cuda_work_list(const WorkListParams& p, uintptr_t stream) {
  const int64_t blocks = std::max((int64_t(p.num_nodes) + kOwned - 1) / kOwned, int64_t(1));
  launch(work_list, {blocks, kThreads, int64_t(sizeof(Shared)), stream, "work_list"}, p);
}

}  // namespace tts
