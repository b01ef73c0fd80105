// The bricks of the AMX items: transposes in registers, copies to scratch, and both matrix products cut into steps of
// four tile products, so that other work can run between them. See amx_path.h for the layouts.
#pragma once

#include "fma_code_path.h"

namespace {

static_assert(VW == 16, "tiles are 16 lanes wide");

constexpr int kAmxBlock = 128;
constexpr int kVtStride = kAmxBlock * 2 + 64;           // bytes: rows spread over the sets of the L1
constexpr int kCopyStride = tts::kMaxHeadDim * 2 + 64;  // bytes, of K and V rows copied to scratch
constexpr int kPairStride = kAmxBlock / 2 * 16;         // uint32_t per vector of lanes

// In place: x[i][j] <-> x[j][i].
TTS_INLINE void transpose_16x16(vi x[16]) {
  vi y[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {
    y[i] = __builtin_shufflevector(x[i], x[i + 1], 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
    y[i + 1] = __builtin_shufflevector(x[i], x[i + 1], 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      x[i + 2 * j] =
          __builtin_shufflevector(y[i + j], y[i + j + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
      x[i + 2 * j + 1] =
          __builtin_shufflevector(y[i + j], y[i + j + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    }
    // x[4 * q + c]: in 128-bit lane b, rows 4q..4q+3 of column 4b + c.
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    y[c] = __builtin_shufflevector(x[c], x[4 + c], 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
    y[4 + c] = __builtin_shufflevector(x[c], x[4 + c], 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    y[8 + c] = __builtin_shufflevector(x[8 + c], x[12 + c], 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
    y[12 + c] =
        __builtin_shufflevector(x[8 + c], x[12 + c], 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  }
  // y[c], y[8 + c]: columns c and 8 + c; y[4 + c], y[12 + c]: columns 4 + c and 12 + c; lanes are (lo rows, hi column)
  // pairs.
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    x[c] = __builtin_shufflevector(y[c], y[8 + c], 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
    x[8 + c] = __builtin_shufflevector(y[c], y[8 + c], 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    x[4 + c] = __builtin_shufflevector(y[4 + c], y[12 + c], 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
    x[12 + c] =
        __builtin_shufflevector(y[4 + c], y[12 + c], 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  }
}

TTS_INLINE vi load_bits(const void* p) { return (vi)load((const float*)p); }
TTS_INLINE void store_bits(void* p, vi x) { store((float*)p, (vf)x); }

// One cache row as bf16 in scratch, zero from head_dim up to the padded dim.
TTS_INLINE void copy_row_bf16(const TreeAttentionParams& p, const void* cache, int64_t element, char* to) {
  uint16_t* row = (uint16_t*)to;
  const int dim = tts::padded_head_dim(p.head_dim);
  int d = 0;
  if (p.kv_dtype == DType::bf16) {
    for (; d + VW <= p.head_dim; d += VW) *(vh_any*)(row + d) = *(const vh_any*)((const uint16_t*)cache + element + d);
    for (; d < p.head_dim; ++d) row[d] = ((const uint16_t*)cache)[element + d];
  } else {
    for (; d + VW <= p.head_dim; d += VW)
      *(vh_any*)(row + d) = __builtin_convertvector((vu)load_as_float<DType::f8e4m3>(cache, element + d) >> 16, vh);
    if (d < p.head_dim) {
      const vh tail =
          __builtin_convertvector((vu)load_tail_as_float<DType::f8e4m3>(cache, element + d, p.head_dim - d) >> 16, vh);
      for (int i = 0; d < p.head_dim; ++d, ++i) row[d] = tail[i];
    }
  }
  for (; d < dim; ++d) row[d] = 0;
}

// Where the A operand of each 16 tokens of K starts, and its row stride in bytes.
struct KTiles {
  const char* at[kAmxBlock / 16];
  int64_t stride;
};

// score [tokens][tile] = K * Q^T for the 16-token groups [group, last) of a block, in steps of four tile products.
struct ScoreWork {
  const KTiles* k;
  const uint32_t* q;
  float* score;
  int group, last, dim, d;

  // Two groups against two vectors of rows. Tiles: 0-3 the products, 4-5 K, 6-7 Q.
  void step2() {
    const bool both = group + 1 < last;
    const char *k0 = k->at[group] + d * 2, *k1 = k->at[both ? group + 1 : group] + d * 2;
    const uint32_t* q0 = q + d / 32 * 512;
    if (d == 0) {
      TILE_ZERO(0);
      TILE_ZERO(1);
      TILE_ZERO(2);
      TILE_ZERO(3);
    }
    TILE_LOAD(6, q0, 64);
    TILE_LOAD(4, k0, k->stride);
    TILE_DOT(0, 4, 6);
    TILE_LOAD(7, q0 + 256, 64);
    TILE_DOT(1, 4, 7);
    TILE_LOAD(5, k1, k->stride);
    TILE_DOT(2, 5, 6);
    TILE_DOT(3, 5, 7);
    if ((d += 32) < dim) return;
    float* c = score + group * 16 * 32;
    TILE_STORE(0, c, 128);
    TILE_STORE(1, c + 16, 128);
    if (both) {
      TILE_STORE(2, c + 16 * 32, 128);
      TILE_STORE(3, c + 16 * 32 + 16, 128);
    }
    d = 0;
    group += 2;
  }

  // Four groups against one vector of rows. Tiles: 0-3 the products, 4-5 K, 6 Q.
  void step1() {
    const int count = min_(4, last - group);
    const uint32_t* q0 = q + d / 32 * 256;
    if (d == 0) {
      TILE_ZERO(0);
      TILE_ZERO(1);
      TILE_ZERO(2);
      TILE_ZERO(3);
    }
    TILE_LOAD(6, q0, 64);
    TILE_LOAD(4, k->at[group] + d * 2, k->stride);
    TILE_DOT(0, 4, 6);
    if (count > 1) {
      TILE_LOAD(5, k->at[group + 1] + d * 2, k->stride);
      TILE_DOT(1, 5, 6);
    }
    if (count > 2) {
      TILE_LOAD(4, k->at[group + 2] + d * 2, k->stride);
      TILE_DOT(2, 4, 6);
    }
    if (count > 3) {
      TILE_LOAD(5, k->at[group + 3] + d * 2, k->stride);
      TILE_DOT(3, 5, 6);
    }
    if ((d += 32) < dim) return;
    float* c = score + group * 16 * 16;
    TILE_STORE(0, c, 64);
    if (count > 1) TILE_STORE(1, c + 256, 64);
    if (count > 2) TILE_STORE(2, c + 512, 64);
    if (count > 3) TILE_STORE(3, c + 768, 64);
    d = 0;
    group += 4;
  }

  int steps(int vectors) const {
    return vectors == 0 ? 0 : (last - group + 5 - 2 * vectors) / (6 - 2 * vectors) * (dim / 32);
  }
};

// ot [dim][tile] += V^T * P^T over the 32-token groups [first, last) of a block, in steps of four tile products.
struct OutputWork {
  const char* vt;
  const uint32_t* pairs;
  float* ot;
  int first, last, dim, d, group;
  bool fresh;

  // 32 of dim against two vectors of rows. Tiles: 0-3 the sums, 4-5 V^T, 6-7 P^T.
  void step2() {
    float* c = ot + d * 32;
    if (group == first) {
      if (fresh) {
        TILE_ZERO(0);
        TILE_ZERO(1);
        TILE_ZERO(2);
        TILE_ZERO(3);
      } else {
        TILE_LOAD(0, c, 128);
        TILE_LOAD(1, c + 16, 128);
        TILE_LOAD(2, c + 16 * 32, 128);
        TILE_LOAD(3, c + 16 * 32 + 16, 128);
      }
    }
    const char* a = vt + int64_t(d) * kVtStride + group * 64;
    TILE_LOAD(6, pairs + group * 256, 64);
    TILE_LOAD(4, a, kVtStride);
    TILE_DOT(0, 4, 6);
    TILE_LOAD(7, pairs + kPairStride + group * 256, 64);
    TILE_DOT(1, 4, 7);
    TILE_LOAD(5, a + 16 * kVtStride, kVtStride);
    TILE_DOT(2, 5, 6);
    TILE_DOT(3, 5, 7);
    if (++group < last) return;
    TILE_STORE(0, c, 128);
    TILE_STORE(1, c + 16, 128);
    TILE_STORE(2, c + 16 * 32, 128);
    TILE_STORE(3, c + 16 * 32 + 16, 128);
    group = first;
    d += 32;
  }

  // 32 of dim against one vector of rows. Tiles: 0-1 the sums, 4-5 V^T, 6 P^T.
  void step1() {
    float* c = ot + d * 16;
    if (group == first) {
      if (fresh) {
        TILE_ZERO(0);
        TILE_ZERO(1);
      } else {
        TILE_LOAD(0, c, 64);
        TILE_LOAD(1, c + 256, 64);
      }
    }
    const char* a = vt + int64_t(d) * kVtStride + group * 64;
    TILE_LOAD(6, pairs + group * 256, 64);
    TILE_LOAD(4, a, kVtStride);
    TILE_DOT(0, 4, 6);
    TILE_LOAD(5, a + 16 * kVtStride, kVtStride);
    TILE_DOT(1, 5, 6);
    if (++group < last) return;
    TILE_STORE(0, c, 64);
    TILE_STORE(1, c + 256, 64);
    group = first;
    d += 32;
  }

  int steps(int vectors) const { return vectors == 0 ? 0 : (dim - d) / 32 * (last - first); }
};

// ot *= rescale, unless that is all ones.
template <int kVectors>
void rescale_output(const float* rescale, int dim, float* ot) {
  vf by[kVectors];
  bool needed = false;
  for (int i = 0; i < kVectors * VW; ++i) needed |= rescale[i] != 1.0f;
  if (!needed) return;
  for (int v = 0; v < kVectors; ++v) by[v] = load(rescale + v * VW);
  for (int d = 0; d < dim; ++d)
    for (int v = 0; v < kVectors; ++v) {
      float* at = ot + (d * kVectors + v) * VW;
      store(at, load(at) * by[v]);
    }
}

}  // namespace
