// Items in fp32 fused multiply-adds, for every dtype and every vector width.
//
// K and V of a block are widened to fp32 once, for all row tiles; a row tile is one or two vectors of packed rows in
// lanes, queries transposed and scaled once per item:
//   k, v   [heads][kBlock][kStride]   fp32, kStride a constant so that one pointer reaches every token
//   q      [lanes / tile][head_dim][tile]
//   score  [kBlock][tile]             one K element, broadcast, meets a vector of rows
//   o      [lanes][padded dim]        one probability, broadcast, meets a vector of V
// So no reduction ever crosses lanes, and a row's arithmetic does not depend on the rows beside it.
#pragma once

#include "item.h"

namespace {

constexpr int kFmaBlock = 64;
constexpr int kStride = tts::kMaxHeadDim + 16;  // not a power of two: token rows spread over the sets of the L1
constexpr int kTokens2 = VW == 16 ? 12 : 6, kTokens1 = VW == 16 ? 16 : 12;  // tokens per register tile
constexpr int kRowsPV = VW == 16 ? 8 : 6;                                   // output rows per register tile

// score[t][lanes] = sum over d of k[t][d] * q[d][lanes], in the order of d.
template <int kTokens, int kVectors>
TTS_INLINE void score_tokens(const float* k, const float* q, int dim, float* score) {
  vf acc[kTokens][kVectors] = {};
  for (int d = 0; d < dim; ++d) {
    if ((d & 15) == 0) {
#pragma GCC unroll 16
      for (int t = 0; t < kTokens; ++t) __builtin_prefetch(k + (t + kTokens) * kStride + d, 0, 3);
    }
    vf qv[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) qv[v] = load(q + (d * kVectors + v) * VW);
#pragma GCC unroll 16
    for (int t = 0; t < kTokens; ++t) {
      const vf kv = splat(k[t * kStride + d]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) acc[t][v] += kv * qv[v];
    }
  }
#pragma GCC unroll 16
  for (int t = 0; t < kTokens; ++t)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(score + (t * kVectors + v) * VW, acc[t][v]);
}

template <int kTokens, int kVectors>
struct ScoreTail {
  static inline void run(int count, const float* k, const float* q, int dim, float* score) {
    if (count == kTokens) return score_tokens<kTokens, kVectors>(k, q, dim, score);
    ScoreTail<kTokens - 1, kVectors>::run(count, k, q, dim, score);
  }
};
template <int kVectors>
struct ScoreTail<0, kVectors> {
  static inline void run(int, const float*, const float*, int, float*) {}
};

template <int kVectors>
__attribute__((noinline)) void score_tile(const float* k, const float* q, int dim, int count, float* score,
                                          Prefetcher* ahead) {
  constexpr int kTokens = kVectors == 1 ? kTokens1 : kTokens2;
  int t = 0;
  for (; t + kTokens <= count; t += kTokens) {
    score_tokens<kTokens, kVectors>(k + t * kStride, q, dim, score + t * kVectors * VW);
    ahead->step(kTokens);
  }
  ScoreTail<kTokens - 1, kVectors>::run(count - t, k + t * kStride, q, dim, score + t * kVectors * VW);
}

// o[row][d] = o[row][d] * rescale[row] + sum over t of p[t][row] * v[t][d], in the order of t.
template <int kRows, int kWide>
TTS_INLINE void output_rows(const float* p, int lanes, const float* v, int count, bool fresh, const float* rescale,
                            float* o, int o_stride) {
  vf acc[kRows][kWide];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int w = 0; w < kWide; ++w)
      acc[r][w] = fresh ? splat(0.0f) : load(o + r * o_stride + w * VW) * splat(rescale[r]);
  for (int t = 0; t < count; ++t) {
    vf vv[kWide];
#pragma GCC unroll 4
    for (int w = 0; w < kWide; ++w) vv[w] = load(v + t * kStride + w * VW);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const vf pv = splat(p[t * lanes + r]);
#pragma GCC unroll 4
      for (int w = 0; w < kWide; ++w) acc[r][w] += pv * vv[w];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int w = 0; w < kWide; ++w) store(o + r * o_stride + w * VW, acc[r][w]);
}

template <int kRows, int kWide>
struct OutputTail {
  static inline void run(int rows, const float* p, int lanes, const float* v, int count, bool fresh,
                         const float* rescale, float* o, int o_stride) {
    if (rows == kRows) return output_rows<kRows, kWide>(p, lanes, v, count, fresh, rescale, o, o_stride);
    OutputTail<kRows - 1, kWide>::run(rows, p, lanes, v, count, fresh, rescale, o, o_stride);
  }
};
template <int kWide>
struct OutputTail<0, kWide> {
  static inline void run(int, const float*, int, const float*, int, bool, const float*, float*, int) {}
};

template <int kWide>
__attribute__((noinline)) void output_columns(const float* p, int lanes, int rows, const float* v, int count,
                                              bool fresh, const float* rescale, float* o, int o_stride) {
  // Even shares: 7 rows are 4 + 3 rather than 6 + 1.
  const int parts = (rows + kRowsPV - 1) / kRowsPV;
  for (int part = 0, r = 0; part < parts; ++part) {
    const int share = (rows - r + (parts - part) - 1) / (parts - part);
    OutputTail<kRowsPV, kWide>::run(share, p + r, lanes, v, count, fresh, rescale + r, o + int64_t(r) * o_stride,
                                    o_stride);
    r += share;
  }
}

void output_tile(const float* p, int lanes, int rows, const float* v, int count, int dim, bool fresh,
                 const float* rescale, float* o, int o_stride, Prefetcher* ahead) {
  int d = 0;
  for (; d + 2 * VW <= dim; d += 2 * VW) {
    output_columns<2>(p, lanes, rows, v + d, count, fresh, rescale, o + d, o_stride);
    ahead->step(8);
  }
  if (d < dim) output_columns<1>(p, lanes, rows, v + d, count, fresh, rescale, o + d, o_stride);
}

struct FmaBody {
  static constexpr int kBlock = kFmaBlock;

  const TreeAttentionParams& p;
  const WorkItem& item;
  const ItemLanes& lanes;
  Prefetcher ahead;
  float *k, *v, *q, *score, *o, *rescale;

  FmaBody(const TreeAttentionParams& p_, const WorkItem& item_, const ItemLanes& lanes_, Carver& c)
      : p(p_), item(item_), lanes(lanes_), ahead(p_) {
    const int64_t dim = tts::padded_head_dim(p.head_dim);
    const int heads = tts::max_item_heads(p.head_dim, p.num_kv_heads);
    k = c.take<float>(heads * kBlock * kStride);
    v = c.take<float>(heads * kBlock * kStride);
    q = c.take<float>(kScratchLanes * dim);
    o = c.take<float>(kScratchLanes * dim);
    score = c.take<float>(kBlock * kTileLanes);
    rescale = c.take<float>(kTileLanes);
  }

  // Queries of one tile, transposed to [head_dim][tile] and scaled; lanes without a row are 0.
  void pack(int kv_head, int first_row, int rows, int lane) {
    float row[tts::kMaxHeadDim];
    const int group = p.group(), width = rows > VW ? kTileLanes : VW;
    const float factor = logit_factor(p, kv_head);
    float* to = q + int64_t(lane) * p.head_dim;
    for (int i = 0; i < width; ++i) {
      if (i < rows) {
        const int64_t caller_row = p.rows[item.row_begin + (first_row + i) / group];
        const int head = kv_head * group + (first_row + i) % group;
        widen_row(p.q_dtype, row, p.q, caller_row * p.q_row + head * p.q_head, p.head_dim);
      }
      for (int d = 0; d < p.head_dim; ++d) to[d * width + i] = i < rows ? row[d] * factor : 0.0f;
    }
  }

  template <DType kKV>
  void widen(const void* cache, Cursor from, int64_t head_stride, bool tokens_first, int count, float* to) {
    const int heads = item.head_end - item.head_begin;
    // In the order of memory: NHD token by token, HND head by head.
    for (int outer = 0; outer < (tokens_first ? 1 : heads); ++outer) {
      Cursor at = from;
      for (int t = 0;;) {
        const int begin = tokens_first ? 0 : outer, end = tokens_first ? heads : outer + 1;
        for (int head = begin; head < end; ++head)
          widen_row<kKV>(to + (head * kBlock + t) * kStride, cache,
                         at.element() + (item.head_begin + head) * head_stride, p.head_dim);
        if (++t == count) break;
        at.next();
      }
    }
  }

  template <DType kKV>
  void load_as(int begin, int end) {
    widen<kKV>(p.k, k_cursor(p, item.node, begin), p.k_head, p.k_token >= p.k_head, end - begin, k);
    widen<kKV>(p.v, v_cursor(p, item.node, begin), p.v_head, p.v_token >= p.v_head, end - begin, v);
  }

  void load_block(int, int begin, int end) {
    if (p.kv_dtype == DType::f32) load_as<DType::f32>(begin, end);
    if (p.kv_dtype == DType::f16) load_as<DType::f16>(begin, end);
    if (p.kv_dtype == DType::bf16) load_as<DType::bf16>(begin, end);
    if (p.kv_dtype == DType::f8e4m3) load_as<DType::f8e4m3>(begin, end);
  }

  template <int kVectors>
  void tile_of(const TileTask& t) {
    const int dim = tts::padded_head_dim(p.head_dim), count = t.last - t.first;
    const int64_t at = int64_t(t.head * kBlock + t.first - t.begin) * kStride;
    const Sight sight = {lanes.first + t.first_row, lanes.last + t.first_row};
    score_tile<kVectors>(k + at, q + int64_t(t.lane) * p.head_dim, p.head_dim, count, score, &ahead);
    softmax_tile<kVectors, 6>(score, count, t.first, t.masked, sight, 1.0f, p.softcap, lanes.m + t.lane,
                              lanes.l + t.lane, rescale, nullptr, 0, [] {});
    output_tile(score, kVectors * VW, t.rows, v + at, count, round_up(p.head_dim, VW), t.fresh, rescale,
                o + int64_t(t.lane) * dim, dim, &ahead);
  }

  void tile(const TileTask& t) {
    if (t.rows > VW)
      tile_of<2>(t);
    else
      tile_of<1>(t);
  }

  void finish_block() {}

  const float* collect(int lane, int rows, int columns, float* to) {
    const int dim = tts::padded_head_dim(p.head_dim);
    const float* from = o + int64_t(lane) * dim;
    if (to == nullptr) return from;
    for (int r = 0; r < rows; ++r)
      for (int d = 0; d < columns; d += VW) store(to + int64_t(r) * dim + d, load(from + int64_t(r) * dim + d));
    return to;
  }
};

void run_fma(const TreeAttentionParams& p, const States& states, const WorkItem& item, const WorkItem* next,
             void* scratch) {
  Carver carver = {(char*)scratch};
  const ItemLanes lanes = take_lanes(carver);
  FmaBody body(p, item, lanes, carver);
  run_item(body, p, states, item, next, lanes);
}

int64_t fma_item_bytes(const TreeAttentionParams& p) {
  Carver carver = {nullptr};
  const WorkItem item = {};
  const ItemLanes lanes = take_lanes(carver);
  const FmaBody body(p, item, lanes, carver);
  return carver.used;
}

}  // namespace
