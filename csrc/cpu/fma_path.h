// Items in fp32 fused multiply-adds, for every dtype and every vector width.
//
// K and V of a block are widened to fp32 once, for all row tiles of a head; where there is one tile of at most VW rows,
// V is only copied (rows of a cache lie a power of two apart and collide in the L1) and widened in registers. A row tile
// is one or two vectors of packed rows in lanes, queries transposed and scaled once per item:
//   k, v   [kBlock][kStride]          fp32, of one head; kStride a constant so that one pointer reaches every token
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

// The same for a lone tile of kRows rows, one vector of lanes wide, from V in the dtype of the cache: v [tokens][kStride].
template <DType kKV, int kRows>
TTS_INLINE void output_lone(const float* p, const void* v, int count, int columns, bool fresh, const float* rescale,
                            float* o, int o_stride, Prefetcher* ahead) {
  for (int d = 0; d < columns; d += VW) {
    vf acc[kRows];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) acc[r] = fresh ? splat(0.0f) : load(o + r * o_stride + d) * splat(rescale[r]);
    for (int t = 0; t < count; ++t) {
      const vf vv = load_as_float<kKV>(v, t * kStride + d);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) acc[r] += splat(p[t * VW + r]) * vv;
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) store(o + r * o_stride + d, acc[r]);
    ahead->step(4);
  }
}

template <DType kKV, int kRows>
struct OutputLone {
  static inline void run(int rows, const float* p, const void* v, int count, int columns, bool fresh,
                         const float* rescale, float* o, int o_stride, Prefetcher* ahead) {
    if (rows == kRows) return output_lone<kKV, kRows>(p, v, count, columns, fresh, rescale, o, o_stride, ahead);
    OutputLone<kKV, kRows - 1>::run(rows, p, v, count, columns, fresh, rescale, o, o_stride, ahead);
  }
};
template <DType kKV>
struct OutputLone<kKV, 0> {
  static inline void run(int, const float*, const void*, int, int, bool, const float*, float*, int, Prefetcher*) {}
};

template <DType kKV>
struct FmaBody {
  static constexpr int kBlock = kFmaBlock;

  const TreeAttentionParams& p;
  const WorkItem& item;
  const ItemLanes& lanes;
  Prefetcher ahead;
  const bool lone;  // one tile of at most VW rows
  float *k, *v, *q, *score, *o, *rescale;
  int64_t *k_at, *v_at;  // [kBlock] element index of each token loaded, without its head
  int widened = -1;      // head of the block that is in k and v

  FmaBody(const TreeAttentionParams& p_, const WorkItem& item_, const ItemLanes& lanes_, Carver& c)
      : p(p_),
        item(item_),
        lanes(lanes_),
        ahead(p_),
        lone((item.row_end - item.row_begin) * p.group() <= VW && p.head_dim % VW == 0) {
    const int64_t dim = tts::padded_head_dim(p.head_dim);
    k = c.take<float>(kBlock * kStride);
    v = c.take<float>(kBlock * kStride);
    k_at = c.take<int64_t>(kBlock);
    v_at = c.take<int64_t>(kBlock);
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

  void load_block(int, int begin, int end) {
    Cursor from_k = k_cursor(p, item.node, begin), from_v = v_cursor(p, item.node, begin);
    for (int t = 0;;) {
      k_at[t] = from_k.element();
      v_at[t] = from_v.element();
      if (begin + ++t == end) break;
      from_k.next();
      from_v.next();
    }
    widened = -1;
  }

  void widen(const TileTask& t) {
    if (t.head == widened) return;
    widened = t.head;
    const int64_t bytes = tts::dtype_bytes(kKV);
    const int64_t k_head = (item.head_begin + t.head) * p.k_head, v_head = (item.head_begin + t.head) * p.v_head;
    for (int i = 0; i < t.end - t.begin; ++i) {
      widen_row<kKV>(k + i * kStride, p.k, k_at[i] + k_head, p.head_dim);
      if (lone)
        __builtin_memcpy((char*)v + i * kStride * bytes, (const char*)p.v + (v_at[i] + v_head) * bytes,
                         p.head_dim * bytes);
      else
        widen_row<kKV>(v + i * kStride, p.v, v_at[i] + v_head, p.head_dim);
    }
  }

  template <int kVectors>
  void tile_of(const TileTask& t) {
    const int dim = tts::padded_head_dim(p.head_dim), columns = round_up(p.head_dim, VW), count = t.last - t.first;
    const int skipped = t.first - t.begin;
    const Sight sight = {lanes.first + t.first_row, lanes.last + t.first_row};
    float* tile_o = o + int64_t(t.lane) * dim;
    widen(t);
    score_tile<kVectors>(k + skipped * kStride, q + int64_t(t.lane) * p.head_dim, p.head_dim, count, score, &ahead);
    softmax_tile<kVectors, 6>(score, count, t.first, t.masked, sight, 1.0f, p.softcap, lanes.m + t.lane,
                              lanes.l + t.lane, rescale, nullptr, 0, [] {});
    if (lone)
      OutputLone<kKV, VW>::run(t.rows, score, (const char*)v + skipped * kStride * tts::dtype_bytes(kKV), count,
                               columns, t.fresh, rescale, tile_o, dim, &ahead);
    else
      output_tile(score, kVectors * VW, t.rows, v + skipped * kStride, count, columns, t.fresh, rescale, tile_o, dim,
                  &ahead);
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

template <DType kKV>
void run_fma_item(const TreeAttentionParams& p, const States& states, const WorkItem& item, const WorkItem* next,
                  void* scratch) {
  Carver carver = {(char*)scratch};
  const ItemLanes lanes = take_lanes(carver);
  FmaBody<kKV> body(p, item, lanes, carver);
  run_item(body, p, states, item, next, lanes);
}

void run_fma(const TreeAttentionParams& p, const States& states, const WorkItem& item, const WorkItem* next,
             void* scratch) {
  if (p.kv_dtype == DType::f32) run_fma_item<DType::f32>(p, states, item, next, scratch);
  if (p.kv_dtype == DType::f16) run_fma_item<DType::f16>(p, states, item, next, scratch);
  if (p.kv_dtype == DType::bf16) run_fma_item<DType::bf16>(p, states, item, next, scratch);
  if (p.kv_dtype == DType::f8e4m3) run_fma_item<DType::f8e4m3>(p, states, item, next, scratch);
}

int64_t fma_item_bytes(const TreeAttentionParams& p) {
  Carver carver = {nullptr};
  const WorkItem item = {};
  const ItemLanes lanes = take_lanes(carver);
  const FmaBody<DType::f32> body(p, item, lanes, carver);
  return carver.used;
}

}  // namespace
