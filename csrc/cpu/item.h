// The walk of one item, the same for every code path: chunks, in them blocks of tokens, in them heads and row tiles.
//
// Lanes of an item: KV head after head, each with its packed rows (row * group + head in group), padded to whole tiles.
#pragma once

#include "code_path_table.h"
#include "rows.h"

namespace {

constexpr int kTileLanes = 2 * VW;  // packed rows of a full row tile; a tile of at most VW rows is one vector wide

// Scratch that the walk itself needs, [lanes] each.
struct ItemLanes {
  float *m, *l;
  int32_t *first, *last;
};

// One row tile against one block of tokens.
struct TileTask {
  int head;               // of the item, from 0
  int lane, rows;         // first lane among all lanes of the item, packed rows
  int first_row;          // first packed row of the tile
  int block, begin, end;  // the block's first token; the tokens of it that are loaded
  int first, last;        // the tokens that some row of the tile sees
  bool masked;            // not every row sees all of them
  bool fresh;             // no row of the tile has an output yet
};

// Takes memory off a thread's scratch, 64-byte aligned; with a null base it only counts.
struct Carver {
  char* base;
  int64_t used = 0;
  template <typename T>
  TTS_INLINE T* take(int64_t count) {
    T* at = (T*)(base + used);
    used += (count * int64_t(sizeof(T)) + 63) / 64 * 64;
    return at;
  }
};

constexpr int kScratchLanes = tts::kMaxItemLanes + kTileLanes;

TTS_INLINE ItemLanes take_lanes(Carver& c) {
  ItemLanes s;
  s.m = c.take<float>(kScratchLanes);
  s.l = c.take<float>(kScratchLanes);
  s.first = c.take<int32_t>(kScratchLanes);
  s.last = c.take<int32_t>(kScratchLanes);
  return s;
}

// What a code path brings along:
//   kBlock, ahead                         tokens of a block; the prefetcher, which it steps while it computes
//   pack(kv_head, first_row, rows, lane)  the queries of one tile
//   load_block(block, begin, end)         tokens [begin, end) of the block that starts at `block`, for all heads
//   tile(task), finish_block()            scores, softmax and output of a tile, at the latest when the block is finished
//   collect(lane, rows, columns, o)       a tile's output as rows of padded_head_dim floats: at o, or (o null) where it says
template <typename Body>
TTS_INLINE void run_item(Body& body, const TreeAttentionParams& p, const States& states, const WorkItem& item,
                         const WorkItem* next, const ItemLanes& lanes) {
  const int dim = tts::padded_head_dim(p.head_dim), columns = round_up(p.head_dim, VW);
  const int packed = (item.row_end - item.row_begin) * p.group(), heads = item.head_end - item.head_begin;
  const int head_lanes = round_up(packed, kTileLanes);
  const int length = p.length(item.node), chunk_size = tts::chunk_tokens(length);
  Sights sights = {lanes.first, lanes.last, 0, 0};
  fill_sights(p, item, head_lanes, &sights);
  for (int head = 0; head < heads; ++head)
    for (int row = 0; row < packed; row += kTileLanes)
      body.pack(item.head_begin + head, row, min_(kTileLanes, packed - row), head * head_lanes + row);

  for (int chunk = item.chunk_begin; chunk < item.chunk_end; ++chunk) {
    const int chunk_end = min_(length, (chunk + 1) * chunk_size);
    for (int i = 0; i < heads * head_lanes; ++i) lanes.m[i] = kMinusInf, lanes.l[i] = 0.0f;

    for (int block = chunk * chunk_size; block < chunk_end; block += Body::kBlock) {
      const int begin = max_(block, sights.widest_first);
      const int end = min_(min_(block + Body::kBlock, chunk_end), sights.widest_last);
      if (begin >= end) continue;
      const int rest = min_(item.chunk_end * chunk_size, sights.widest_last);  // where this item's tokens end
      if (end < rest)
        body.ahead.aim(p, item, end, min_(end + Body::kBlock, rest));
      else if (next != nullptr)
        body.ahead.aim(
            p, *next, next->chunk_begin * tts::chunk_tokens(p.length(next->node)),
            min_(p.length(next->node), next->chunk_begin * tts::chunk_tokens(p.length(next->node)) + Body::kBlock));
      body.load_block(block, begin, end);
      for (int head = 0; head < heads; ++head)
        for (int row = 0; row < packed; row += kTileLanes) {
          TileTask task;
          task.head = head;
          task.first_row = row;
          task.lane = head * head_lanes + row;
          task.rows = min_(kTileLanes, packed - row);
          const TileSight sight = tile_sight(sights, row, task.rows);
          task.block = block, task.begin = begin, task.end = end;
          task.first = max_(begin, sight.first), task.last = min_(end, sight.last);
          if (task.first >= task.last) continue;
          task.masked = task.first < sight.all_first || task.last > sight.all_last;
          task.fresh = true;
          for (int i = task.lane; i < task.lane + task.rows; ++i) task.fresh &= lanes.l[i] == 0.0f;
          body.tile(task);
        }
      body.finish_block();
      body.ahead.step(Body::kBlock * heads);
    }

    // The first chunk is the state; later ones are folded into it, in order.
    for (int head = 0; head < heads; ++head) {
      const int64_t state = tts::state_index(p, states, item.node, item.slot, item.head_begin + head, item.row_begin);
      for (int row = 0; row < packed; row += kTileLanes) {
        const int rows = min_(kTileLanes, packed - row), lane = head * head_lanes + row;
        float* state_o = states.o + (state + row) * dim;
        float* state_m = states.m + state + row;
        float* state_l = states.l + state + row;
        bool seen = false;
        for (int i = 0; i < rows; ++i) seen |= lanes.l[lane + i] != 0.0f;
        if (chunk == item.chunk_begin) {
          if (seen) body.collect(lane, rows, columns, state_o);
          for (int i = 0; i < rows; ++i) state_m[i] = lanes.m[lane + i], state_l[i] = lanes.l[lane + i];
        } else if (seen) {
          const float* o = body.collect(lane, rows, columns, nullptr);
          for (int i = 0; i < rows; ++i)
            fold_state(state_m + i, state_l + i, state_o + int64_t(i) * dim, lanes.m[lane + i], lanes.l[lane + i],
                       o + int64_t(i) * dim, columns);
        }
      }
    }
  }
}

}  // namespace
