// What becomes of an item's results: a row with one partial state is written out; else the state is stored, and whoever
// brings the last state of a row folds them all, in one order, and writes the row.
#pragma once

#include "tree_tile.cuh"

namespace tts {

struct TreeResult {
  float factor;  // from the weighted sum to the output
  float lse;     // natural logarithm
};

// Of a row and head whose weights 2^(score - largest) have this sum. The sink joins the denominator once, and not lse.
TTS_DEVICE TreeResult finish_row(const TreeAttentionParams& c, int head, int kv_head, float largest, float sum) {
  // No score: 0 and -inf. None but NaN, which no maximum keeps: NaN, by the sum.
  if (largest == -kInfinity) return {sum, logf(sum)};
  float weight = 1, denominator = sum;
  if (c.sinks != nullptr) {
    const float sink = min(c.sinks[head] * kLog2E, kLargest);  // a finite sink stays finite in base 2
    const float base = max(largest, sink);
    weight = exp2_fast(largest - base);
    denominator = fmaf(sum, weight, exp2_fast(sink - base));
  }
  const float factor = weight / denominator;
  return {c.v_scale == nullptr ? factor : factor * c.v_scale[kv_head], fmaf(largest, kLn2, logf(sum))};
}

template <typename T>
TTS_DEVICE void store_out(const TreeAttentionParams& c, int source, int head, int column, const float (&x)[4],
                          float factor) {
  if (column >= c.head_dim) return;
  uint16_t* to = static_cast<uint16_t*>(c.out) + source * c.out_row + head * c.out_head + column;
  const uint32_t low = pack2<T>(x[0] * factor, x[1] * factor), high = pack2<T>(x[2] * factor, x[3] * factor);
  if ((reinterpret_cast<uintptr_t>(to) & 7) == 0) {
    *reinterpret_cast<uint64_t*>(to) = low | uint64_t(high) << 32;
  } else {
    to[0] = uint16_t(low), to[1] = uint16_t(low >> 16);
    to[2] = uint16_t(high), to[3] = uint16_t(high >> 16);
  }
}

// One warp folds the states of a packed row: the largest score of all first, then the sums, from the root down.
template <typename T, int kDim>
TTS_DEVICE void merge_row(const CudaTreeAttentionParams& p, const TreeItem& item, const TreeRows& rows, int place) {
  const TreeAttentionParams& c = p.call;
  constexpr int kPieces = (kDim + 127) / 128;  // four columns each, 128 columns apart
  const int head = rows.head[place], count = rows.arrivals[place], lane = thread_index_anew() & 31;
  const int64_t begin = int64_t(rows.state[place] - item.state) * c.num_heads + head;
  const auto place_of = [&](int i) { return begin + int64_t(i) * c.num_heads; };

  float largest = -kInfinity;
  for (int i = lane; i < count; i += 32) largest = max(largest, load_fresh(p.sums + 2 * place_of(i)));
  for (int mask = 16; mask > 0; mask >>= 1) largest = max(largest, shuffle_xor(largest, mask));

  const float subtract = largest == -kInfinity ? 0 : largest;
  float sum = 0, out[kPieces][4] = {};
  for (int begin = 0; begin < count; begin += 32) {
    float my_weight = 0, my_sum = 0;
    if (begin + lane < count) {
      my_weight = exp2_fast(load_fresh(p.sums + 2 * place_of(begin + lane)) - subtract);
      my_sum = load_fresh(p.sums + 2 * place_of(begin + lane) + 1);
    }
    constexpr int kAhead = 4;  // states that are loaded together
    for (int i = 0; i < min(count - begin, 32); i += kAhead) {
      float weight[kAhead];
      Bits128 state[kAhead][kPieces];
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        weight[j] = shuffle(my_weight, i + j);
        sum = fmaf(shuffle(my_sum, i + j), weight[j], sum);
#pragma unroll
        for (int k = 0; k < kPieces; ++k) {
          const int column = 4 * lane + 128 * k;
          // A state that weighs nothing may not have been written.
          if (weight[j] != 0 && column < c.head_dim)
            state[j][k] = load_fresh_16(p.states + place_of(begin + i + j) * c.head_dim + column);
          else
            state[j][k] = {};
        }
      }
#pragma unroll
      for (int j = 0; j < kAhead; ++j)
#pragma unroll
        for (int k = 0; k < kPieces; ++k)
#pragma unroll
          for (int l = 0; l < 4; ++l) out[k][l] = fmaf(float_of(state[j][k].word[l]), weight[j], out[k][l]);
    }
  }
  const TreeResult result = finish_row(c, head, item.kv_head, largest, sum);
  const int source = rows.source[place];
#pragma unroll
  for (int k = 0; k < kPieces; ++k) store_out<T>(c, source, head, 4 * lane + 128 * k, out[k], result.factor);
  if (c.lse != nullptr && lane == 0) c.lse[int64_t(source) * c.num_heads + head] = result.lse;
}

// The end of an item, for all threads of the crew.
template <typename T, int kDim, typename Crew, typename Tile>
TTS_DEVICE void finish_item(const CudaTreeAttentionParams& p, const Tile& tile, const TreeItem& item,
                            const TreeRows& rows, TreeShared& shared) {
  const TreeAttentionParams& c = p.call;
  const auto head_of = [&](int place) { return rows.head[place]; };

  float factor[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int place = tile.row(half);
    factor[half] = 0;
    if (place >= item.count) continue;
    const int head = head_of(place);
    if (rows.arrivals[place] == 1) {
      const TreeResult result = finish_row(c, head, item.kv_head, tile.largest(half), tile.sum(half));
      factor[half] = result.factor;
      if (c.lse != nullptr && tile.speaks()) c.lse[int64_t(rows.source[place]) * c.num_heads + head] = result.lse;
    } else if (tile.speaks()) {
      float* to = p.sums + 2 * (int64_t(rows.state[place]) * c.num_heads + head);
      store_state(to, tile.largest(half));
      store_state(to + 1, tile.sum(half));
    }
  }
  const bool odd = thread_index_anew() & 1;
  const float scale = odd ? factor[1] : factor[0];
  const float seen = odd ? tile.largest(1) : tile.largest(0);
  tile.for_each_output([&](int place, int column, const float(&x)[4]) {
    if (place >= item.count) return;
    const int head = head_of(place);
    if (rows.arrivals[place] == 1) {
      store_out<T>(c, rows.source[place], head, column, x, scale);
    } else if (column < c.head_dim && seen != -kInfinity) {
      const int64_t at = int64_t(rows.state[place]) * c.num_heads + head;
      store_state_16(p.states + at * c.head_dim + column,
                     {{bits_of(x[0]), bits_of(x[1]), bits_of(x[2]), bits_of(x[3])}});
    }
  });

  const int place = thread_index_anew();
  const bool waits = place < item.count && rows.arrivals[place] > 1;
  if (!Crew::sync_any(waits)) return;
  if (place < Tile::kTileRows) {
    bool last = false;
    if (waits) {
      const int row = item.own_begin + p.by_group.divide(item.first + place);
      const uint32_t others = uint32_t(rows.arrivals[place] - 1);
      fence();
      last = atomic_wrap(p.arrivals + int64_t(row) * c.num_heads + head_of(place), others) == others;
      fence();
    }
    shared.last[place] = last;
  }
  Crew::sync();
  for (int place = thread_index_anew() >> 5; place < item.count; place += kTreeWarps)
    if (shared.last[place]) merge_row<T, kDim>(p, item, rows, place);
}

// Rows whose path has no tokens see nothing.
template <typename T>
TTS_DEVICE void finish_empty_rows(const CudaTreeAttentionParams& p, int first_row) {
  const TreeAttentionParams& c = p.call;
  const int row = first_row + thread_index();
  if (row >= c.num_rows) return;
  const int owner = c.rows[c.num_rows + row], source = c.rows[row];
  if (source < 0 || (owner >= 0 && count_states(p, owner) > 0)) return;
  const float nothing[4] = {};
  for (int head = 0; head < c.num_heads; ++head) {
    for (int column = 0; column < c.head_dim; column += 4) store_out<T>(c, source, head, column, nothing, 0);
    if (c.lse != nullptr) c.lse[int64_t(source) * c.num_heads + head] = -kInfinity;
  }
}

// What is left of the launch after the items, for kTreeThreads threads of each block: blocks of threads that have the
// fewest items take it.
template <typename T>
TTS_DEVICE void finish_launch(const CudaTreeAttentionParams& p) {
  const int items = min(p.num_items, *p.live_items) * p.call.num_kv_heads, grid = block_count();
  const int parts = ceil_div(p.call.num_rows, kTreeThreads);
  for (int part = (block_index() - items % grid + grid) % grid; part < parts; part += grid)
    finish_empty_rows<T>(p, part * kTreeThreads);
}

}  // namespace tts
