// Items in AMX tiles: bf16 queries over bf16 or fp8 KV; any other dtype takes the FMA items at this vector width.
//
// Both products are computed transposed, so that rows stay in lanes and the softmax is the one of the FMA path:
//   score [tokens][lanes] = K [tokens][dim] * Q^T     K rows are the A operand in the cache, Q^T is packed once
//   o^T [dim][lanes] += V^T [dim][tokens] * P^T       V^T is transposed once per block, for all row tiles
// Scratch of an item; a row tile is 16 or 32 packed rows wide, dim is head_dim padded to 32:
//   q     [lanes / tile][dim / 32][tile / 16][16 pairs of d][16 rows]   bf16 pairs
//   vt    [heads][dim][kAmxBlock]                bf16
//   score [2 stages][kAmxBlock][tile]                    fp32
//   pairs [2 stages][tile / 16][kAmxBlock / 2][16 rows]  bf16 pairs of tokens
//   ot    [lanes / tile][dim][tile]              fp32
#pragma once

#include "amx_products.h"
#include "scoring_path.h"

namespace {

struct AmxBody {
  static constexpr int kBlock = kAmxBlock;

  const TreeAttentionParams& p;
  const WorkItem& item;
  const ItemLanes& lanes;
  Prefetcher ahead;
  const int dim;                              // padded head_dim
  const bool k_in_place, v_in_place;          // tiles of K, rows of V are read straight from the cache
  KTiles k_tiles[tts::kNarrowElements / 32];  // [heads]
  uint32_t *q, *pairs;
  char *vt, *k_copy, *v_copy;
  float *score, *ot, *o;

  AmxBody(const TreeAttentionParams& p_, const WorkItem& item_, const ItemLanes& lanes_, Carver& c)
      : p(p_),
        item(item_),
        lanes(lanes_),
        ahead(p_),
        dim(tts::padded_head_dim(p_.head_dim)),
        k_in_place(p.kv_dtype == DType::bf16 && p.head_dim % 32 == 0 && p.page_size % 16 == 0),
        v_in_place(p.kv_dtype == DType::bf16 && p.head_dim % 32 == 0) {
    const int64_t heads = tts::max_item_heads(p.head_dim, p.num_kv_heads);
    q = c.take<uint32_t>(kScratchLanes * dim / 2);
    pairs = c.take<uint32_t>(2 * 2 * kPairStride);
    vt = c.take<char>(heads * dim * kVtStride);
    k_copy = c.take<char>(k_in_place ? 0 : heads * kBlock * kCopyStride);
    v_copy = c.take<char>(v_in_place ? 0 : 32 * kCopyStride);
    score = c.take<float>(2 * kBlock * kTileLanes);
    ot = c.take<float>(kScratchLanes * dim);
    o = c.take<float>(kTileLanes * dim);
  }

  // Queries of one tile as B operands; lanes without a row are 0. A negative factor goes into the sign, so that the
  // softmax may take the maximum before it scales; a zero factor makes every score 0.
  void pack(int kv_head, int first_row, int rows, int lane) {
    const int group = p.group(), vectors = rows > VW ? 2 : 1;
    const float factor = logit_factor(p, kv_head);
    const uint32_t flip = factor < 0.0f ? 0x80008000u : 0u;
    uint32_t* to = q + int64_t(lane) * dim / 2;
    for (int i = 0; i < vectors * VW; ++i) {
      const uint16_t* row = nullptr;
      if (i < rows && factor != 0.0f) {
        const int64_t caller_row = p.rows[item.row_begin + (first_row + i) / group];
        row = (const uint16_t*)p.q + caller_row * p.q_row + (kv_head * group + (first_row + i) % group) * p.q_head;
      }
      for (int pair = 0; pair < dim / 2; ++pair) {
        uint32_t bits = 0;
        if (row != nullptr) {
          if (2 * pair < p.head_dim) bits = row[2 * pair];
          if (2 * pair + 1 < p.head_dim) bits |= uint32_t(row[2 * pair + 1]) << 16;
          bits ^= flip;
        }
        to[((pair / 16 * vectors + i / 16) * 16 + pair % 16) * 16 + i % 16] = bits;
      }
    }
  }

  // K as A operands: in place if 16 tokens lie in one page and a row is a whole number of tile columns, else copied.
  // Tokens outside [begin, end) give scores that nobody reads.
  void load_block(int block, int begin, int end) {
    const int heads = item.head_end - item.head_begin;
    for (int head = 0; head < heads; ++head) k_tiles[head].stride = k_in_place ? p.k_token * 2 : kCopyStride;
    if (k_in_place) {
      for (int t = begin & ~15; t < end; t += 16) {
        const int64_t element = k_cursor(p, item.node, t).element();
        for (int head = 0; head < heads; ++head)
          k_tiles[head].at[(t - block) / 16] = (const char*)p.k + (element + (item.head_begin + head) * p.k_head) * 2;
      }
    } else {
      Cursor from = k_cursor(p, item.node, begin);
      for (int t = begin;;) {
        for (int head = 0; head < heads; ++head)
          copy_row_bf16(p, p.k, from.element() + (item.head_begin + head) * p.k_head,
                        k_copy + int64_t(head * kBlock + t - block) * kCopyStride);
        if (++t == end) break;
        from.next();
      }
      for (int head = 0; head < heads; ++head)
        for (int t = begin & ~15; t < end; t += 16)
          k_tiles[head].at[(t - block) / 16] = k_copy + int64_t(head * kBlock + t - block) * kCopyStride;
    }
    for (int group = begin & ~31; group < end; group += 32) transpose_v(block, group, begin, end);
  }

  // V of 32 tokens, transposed for every head: vt[d][token - block], 0 outside [begin, end).
  void transpose_v(int block, int group, int begin, int end) {
    typedef uint16_t v32h __attribute__((vector_size(64)));
    const int heads = item.head_end - item.head_begin;
    int64_t element[32];
    const int from = max_(group, begin), to = min_(group + 32, end);
    Cursor at = v_cursor(p, item.node, from);
    for (int t = from;;) {
      element[t - group] = at.element();
      if (++t == to) break;
      at.next();
    }
    for (int head = 0; head < heads; ++head) {
      const char* row[32];
      for (int i = 0; i < 32; ++i) {
        row[i] = nullptr;
        if (group + i < from || group + i >= to) continue;
        const int64_t e = element[i] + (item.head_begin + head) * p.v_head;
        row[i] = v_in_place ? (const char*)p.v + e * 2 : v_copy + i * kCopyStride;
        if (!v_in_place) copy_row_bf16(p, p.v, e, v_copy + i * kCopyStride);
      }
      for (int d = 0; d < dim; d += 32) {
        vi low[16], high[16];  // pairs of tokens; d = 0-3, 8-11, 16-19, 24-27 of the 32, and the others
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) {
          const v32h a = (v32h)(row[2 * i] ? load_bits(row[2 * i] + d * 2) : (vi){});
          const v32h b = (v32h)(row[2 * i + 1] ? load_bits(row[2 * i + 1] + d * 2) : (vi){});
          low[i] = (vi)__builtin_shufflevector(a, b, 0, 32, 1, 33, 2, 34, 3, 35, 8, 40, 9, 41, 10, 42, 11, 43, 16, 48,
                                               17, 49, 18, 50, 19, 51, 24, 56, 25, 57, 26, 58, 27, 59);
          high[i] = (vi)__builtin_shufflevector(a, b, 4, 36, 5, 37, 6, 38, 7, 39, 12, 44, 13, 45, 14, 46, 15, 47, 20,
                                                52, 21, 53, 22, 54, 23, 55, 28, 60, 29, 61, 30, 62, 31, 63);
        }
        transpose_16x16(low);
        transpose_16x16(high);
        char* out = vt + int64_t(head * dim + d) * kVtStride + (group - block) * 2;
#pragma GCC unroll 16
        for (int j = 0; j < 16; ++j) {
          store_bits(out + (j / 4 * 8 + j % 4) * kVtStride, low[j]);
          store_bits(out + (j / 4 * 8 + 4 + j % 4) * kVtStride, high[j]);
        }
      }
    }
  }

  // The tile unit and the vector units work on different tiles at a time: while the softmax of one tile runs, the tile
  // unit takes the output of the tile before it and the scores of the one after it, a few products every few vectors.
  // A stage is a tile on its way; vectors = 0: none.
  struct Stage {
    TileTask task;
    int vectors = 0;
    int slot = 0;  // which of the two score, pairs and rescale buffers
  };
  Stage scored, weighed;  // waits for its softmax; for its output
  ScoreWork score_work;
  OutputWork output_work;
  int next_slot = 0;

  TTS_INLINE float* score_of(const Stage& s) const { return score + s.slot * kBlock * kTileLanes; }
  TTS_INLINE uint32_t* pairs_of(const Stage& s) const { return pairs + s.slot * 2 * kPairStride; }
  TTS_INLINE static int even_first(const TileTask& t) { return (t.first - t.block) & ~1; }  // tokens go in pairs

  void tile(const TileTask& t) {
    Stage arriving;
    arriving.task = t;
    arriving.vectors = t.rows > VW ? 2 : 1;
    arriving.slot = next_slot;
    next_slot ^= 1;
    advance(arriving);
  }

  void finish_block() {
    advance(Stage());
    advance(Stage());
  }

  // Between the fences, vector code must touch no buffer that the tile products use: the compiler does not see these.
  // Every tile moves one stage on; `arriving` gets its scores.
  void advance(const Stage& arriving) {
    if (weighed.vectors) {
      const TileTask& t = weighed.task;
      const int first = even_first(t) / 32, last = (t.last - t.block + 31) / 32;
      output_work = {vt + int64_t(t.head) * dim * kVtStride,
                     pairs_of(weighed),
                     ot + int64_t(t.lane) * dim,
                     first,
                     last,
                     dim,
                     0,
                     first,
                     t.fresh};
    }
    if (arriving.vectors) {
      const TileTask& t = arriving.task;
      score_work = {&k_tiles[t.head],
                    q + int64_t(t.lane) * dim / 2,
                    score_of(arriving),
                    even_first(t) / 16,
                    (t.last - t.block + 15) / 16,
                    dim,
                    0};
      ahead.step(t.last - t.first);
    }
    int outputs = output_work.steps(weighed.vectors), scores = score_work.steps(arriving.vectors);
    const auto step = [&]() __attribute__((always_inline)) {
      if (outputs > 0) {
        --outputs;
        weighed.vectors == 2 ? output_work.step2() : output_work.step1();
      } else if (scores > 0) {
        --scores;
        arriving.vectors == 2 ? score_work.step2() : score_work.step1();
      }
    };
    TILE_FENCE();
    if (scored.vectors) {
      const int tokens = scored.task.last - scored.task.block - even_first(scored.task);
      const int calls = max_(1, scored.vectors * (tokens / 8)), each = (outputs + scores + calls - 1) / calls;
      const auto meanwhile = [&]() {
        for (int i = 0; i < each; ++i) step();
      };
      if (scored.vectors == 2)
        weigh<2>(scored, meanwhile);
      else
        weigh<1>(scored, meanwhile);
    }
    while (outputs + scores > 0) step();
    TILE_FENCE();
    weighed = scored;
    scored = arriving;
  }

  template <int kVectors, typename Meanwhile>
  void weigh(const Stage& stage, const Meanwhile& meanwhile) {
    constexpr int kTile = kVectors * VW;
    const TileTask& t = stage.task;
    const int from = even_first(t), to = t.last - t.block;
    const Sight sight = {lanes.first + t.first_row, lanes.last + t.first_row};
    const float factor = logit_factor(p, item.head_begin + t.head);
    uint32_t* to_pairs = pairs_of(stage);
    float rescale[kTile] __attribute__((aligned(64)));
    softmax_tile<kVectors, 4>(score_of(stage) + from * kTile, to - from, t.block + from,
                              t.masked || t.block + from < t.first, sight,
                              factor == 0.0f ? 1.0f : __builtin_fabsf(factor), p.softcap, lanes.m + t.lane,
                              lanes.l + t.lane, rescale, to_pairs + from / 2 * VW, kPairStride, meanwhile);
    for (int v = 0; v < kVectors; ++v) {  // the rest of the first and last 32 tokens has no weight
      uint32_t* row = to_pairs + v * kPairStride;
      for (int i = from / 32 * 16; i < from / 2; ++i) store_bits(row + i * VW, (vi){});
      for (int i = (to + 1) / 2; i < (to + 31) / 32 * 16; ++i) store_bits(row + i * VW, (vi){});
    }
    if (!t.fresh) rescale_output<kVectors>(rescale, dim, ot + int64_t(t.lane) * dim);
  }

  // ot[dim][tile] -> rows.
  const float* collect(int lane, int rows, int columns, float* to) {
    if (to == nullptr) to = o;
    const int tile = rows > VW ? kTileLanes : VW;
    const float* from = ot + int64_t(lane) * dim;
    for (int row = 0; row < rows; row += 16)
      for (int d = 0; d < columns; d += 16) {
        vi x[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) x[i] = load_bits(from + (d + i) * tile + row);
        transpose_16x16(x);
        for (int i = 0; i < 16 && row + i < rows; ++i) store_bits(to + int64_t(row + i) * dim + d, x[i]);
      }
    return to;
  }
};

void run_amx(const TreeAttentionParams& p, const States& states, const WorkItem& item, const WorkItem* next,
             void* scratch) {
  const bool tiles = p.q_dtype == DType::bf16 && (p.kv_dtype == DType::bf16 || p.kv_dtype == DType::f8e4m3);
  if (!tiles) return run_fma(p, states, item, next, scratch);
  Carver carver = {(char*)scratch};
  const ItemLanes lanes = take_lanes(carver);
  AmxBody body(p, item, lanes, carver);
  run_item(body, p, states, item, next, lanes);
}

int64_t amx_scratch_bytes(const TreeAttentionParams& p) {
  Carver carver = {nullptr};
  const WorkItem item = {};
  const ItemLanes lanes = take_lanes(carver);
  const AmxBody body(p, item, lanes, carver);
  const int64_t fma = fma_scratch_bytes(p);
  return carver.used > fma ? carver.used : fma;
}

constexpr tts::CodePath amx_code_path(const char* name) {
  return {name, amx_scratch_bytes, tiles_enter, tiles_leave, run_amx, finish_row, merge_states, scoring_path()};
}

}  // namespace
