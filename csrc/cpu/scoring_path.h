// Scoring in fp32 fused multiply-adds, for every dtype and every vector width.
//
// Rows are lanes, packed [dim][kRowLanes]; a weight, broadcast, meets a vector of rows. A panel of weights is widened
// to fp32 once for all tiles. A logit is the sum of its chains of kDepth products in the order of d, whatever the tile
// it is computed in; the softmax goes down the columns. So a row's arithmetic does not depend on the rows beside it.
#pragma once

#include "scoring_table.h"
#include "vec.h"

namespace {

using tts::Activation;
using tts::Matrix;

constexpr int kRowLanes = 2 * VW;
constexpr int kDepth = 128;                // of a panel: with a tile's rows it stays in the L1
constexpr int kPanelStride = kDepth + 16;  // not a power of two: panel rows spread over the sets of the L1
constexpr int kColumns2 = VW == 16 ? 12 : 6, kColumns1 = VW == 16 ? 16 : 12;  // columns per register tile

TTS_INLINE float row_scale(const Matrix& from, int64_t begin, int64_t dim, float eps) {
  float squares[VW], buffer[64];
  vf sum = splat(0.0f);
  for (int64_t d = 0; d < dim; d += 64) {
    const int count = int(dim - d < 64 ? dim - d : 64);
    for (int i = 0; i < 64; i += VW) store(buffer + i, splat(0.0f));
    widen_row(from.dtype, buffer, from.data, begin + d, count);
    for (int i = 0; i < 64; i += VW) sum += load(buffer + i) * load(buffer + i);
  }
  store(squares, sum);
  float total = 0.0f;
  for (int i = 0; i < VW; ++i) total += squares[i];
  return 1.0f / __builtin_sqrtf(total / float(dim) + eps);
}

// Row by row within a few cache lines of the tile: they stay in the L1 while lane after lane is filled.
void pack_tile(const Matrix& from, const int64_t* rows, int64_t first, int count, int64_t dim, const float* norm_weight,
               float norm_eps, float* tile) {
  float buffer[64], scale[kRowLanes];
  int64_t begin[kRowLanes];
  for (int i = 0; i < count; ++i) {
    begin[i] = (rows ? rows[i] : first + i) * from.row;
    scale[i] = norm_weight ? row_scale(from, begin[i], dim, norm_eps) : 1.0f;
  }
  for (int64_t d = 0; d < dim; d += 64) {
    const int part = int(dim - d < 64 ? dim - d : 64);
    for (int i = 0; i < kRowLanes; ++i) {
      float* to = tile + d * kRowLanes + i;
      if (i >= count) {
        for (int j = 0; j < part; ++j) to[j * kRowLanes] = 0.0f;
        continue;
      }
      widen_row(from.dtype, buffer, from.data, begin[i] + d, part);
      if (norm_weight)
        for (int j = 0; j < part; ++j) to[j * kRowLanes] = buffer[j] * scale[i] * norm_weight[d + j];
      else
        for (int j = 0; j < part; ++j) to[j * kRowLanes] = buffer[j];
    }
  }
}

// What the next panel is widened from: asked for while the first tile is computed.
struct Ahead {
  const char* weights;      // of the panel's first column; null: nothing is asked for
  int64_t column, element;  // bytes
  TTS_INLINE Ahead from(int c) const { return {weights ? weights + c * column : nullptr, column, element}; }
};

// out[c][lanes] (+)= sum over d of panel[c][d] * x[d][lanes], in the order of d.
template <int kColumns, int kVectors>
TTS_INLINE void multiply(const float* panel, const float* x, int depth, bool first, float* out, const Ahead& ahead) {
  vf acc[kColumns][kVectors] = {};
  for (int d = 0; d < depth; ++d) {
    if (ahead.weights != nullptr && (d & 15) == 0) {
#pragma GCC unroll 16
      for (int c = 0; c < kColumns; ++c) __builtin_prefetch(ahead.weights + c * ahead.column + d * ahead.element, 0, 2);
    }
    vf xv[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) xv[v] = load(x + d * kRowLanes + v * VW);
#pragma GCC unroll 16
    for (int c = 0; c < kColumns; ++c) {
      const vf w = splat(panel[c * kPanelStride + d]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) acc[c][v] += w * xv[v];
    }
  }
#pragma GCC unroll 16
  for (int c = 0; c < kColumns; ++c)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      float* to = out + c * kRowLanes + v * VW;
      store(to, first ? acc[c][v] : load(to) + acc[c][v]);
    }
}

template <int kColumns, int kVectors>
struct MultiplyTail {
  static inline void run(int count, const float* panel, const float* x, int depth, bool first, float* out,
                         const Ahead& ahead) {
    if (count == kColumns) return multiply<kColumns, kVectors>(panel, x, depth, first, out, ahead);
    MultiplyTail<kColumns - 1, kVectors>::run(count, panel, x, depth, first, out, ahead);
  }
};
template <int kVectors>
struct MultiplyTail<0, kVectors> {
  static inline void run(int, const float*, const float*, int, bool, float*, const Ahead&) {}
};

template <int kVectors>
__attribute__((noinline)) void multiply_tile(const float* panel, int count, const float* x, int depth, bool first,
                                             float* out, const Ahead& ahead) {
  constexpr int kColumns = kVectors == 1 ? kColumns1 : kColumns2;
  int c = 0;
  for (; c + kColumns <= count; c += kColumns)
    multiply<kColumns, kVectors>(panel + c * kPanelStride, x, depth, first, out + c * kRowLanes, ahead.from(c));
  MultiplyTail<kColumns - 1, kVectors>::run(count - c, panel + c * kPanelStride, x, depth, first, out + c * kRowLanes,
                                            ahead.from(c));
}

void tile_product(const tts::TileProduct& p, int64_t begin, int64_t end, void* scratch) {
  float* panel = (float*)scratch;  // [kPanelColumns][kPanelStride]
  const int count = int(end - begin);
  const int64_t element = tts::dtype_bytes(p.weight.dtype);
  for (int64_t d = 0; d < p.dim; d += kDepth) {
    const int depth = int(p.dim - d < kDepth ? p.dim - d : kDepth);
    for (int c = 0; c < count; ++c)
      widen_row(p.weight.dtype, panel + c * kPanelStride, p.weight.data, (begin + c) * p.weight.row + d, depth);
    const int64_t next = d + kDepth < p.dim ? begin * p.weight.row + d + kDepth : end * p.weight.row;
    Ahead ahead = {(const char*)p.weight.data + next * element, p.weight.row * element, element};
    for (int64_t row = 0; row < p.rows; row += kRowLanes) {
      if (row > 0) ahead.weights = nullptr;
      const float* x = p.x + row * p.dim + d * kRowLanes;
      float* out = p.out + row / kRowLanes * p.out_tile;
      if (p.rows - row > VW)
        multiply_tile<2>(panel, count, x, depth, d == 0, out, ahead);
      else
        multiply_tile<1>(panel, count, x, depth, d == 0, out, ahead);
    }
  }
}

// Two fits: an odd polynomial up to 1, and beyond it 1 - 2**q(|x|); from 4 on erf is 1 in fp32.
TTS_INLINE vf erf_(vf x) {
  vf s = x * x;
  vf p = splat(7.889267756e-5f) * s - splat(8.020889187e-4f);
  p = p * s + splat(5.189541287e-3f);
  p = p * s - splat(2.685444813e-2f);
  p = p * s + splat(1.128360028e-1f);
  p = p * s - splat(3.761262715e-1f);
  p = p * s + splat(1.128379166f);
  vf a = (vf)((vu)x & 0x7fffffffu);
  vi small = a < splat(1.0f);
  a = a > splat(4.0f) ? splat(4.0f) : a;
  vf q = splat(2.677279782e-4f) * a - splat(4.240969044e-3f);
  q = q * a + splat(3.145847198e-2f);
  q = q * a - splat(1.486515972e-1f);
  q = q * a - splat(9.207649115e-1f);
  q = q * a - splat(1.625975134f);
  q = q * a - splat(5.102941168e-4f);
  vf tail = splat(1.0f) - exp2_<6>(q);
  return select(small, p * x, (vf)((vu)tail | ((vu)x & 0x80000000u)));
}

TTS_ONE_BODY void activate(float* x, int64_t columns, const float* bias, Activation activation) {
  for (int64_t c = 0; c < columns; ++c) {
    const vf b = splat(bias ? bias[c] : 0.0f);
    for (int i = 0; i < kRowLanes; i += VW) {
      vf y = load(x + c * kRowLanes + i) + b;
      if (activation == Activation::relu) y = y < splat(0.0f) ? splat(0.0f) : y;  // nan stays nan
      if (activation == Activation::gelu) y = y * splat(0.5f) * (splat(1.0f) + erf_(y * splat(0.70710678f)));
      store(x + c * kRowLanes + i, y);
    }
  }
}

// One vector of lanes.
TTS_ONE_BODY void fold_vector(const float* x, int columns, const float* bias, float* m, float* l) {
  const vf before = load(m);
  vf top0 = before, top1 = before;
  int c = 0;
  for (; c + 2 <= columns; c += 2) {
    top0 = vmax(load(x + c * kRowLanes) + splat(bias[c]), top0);
    top1 = vmax(load(x + (c + 1) * kRowLanes) + splat(bias[c + 1]), top1);
  }
  if (c < columns) top0 = vmax(load(x + c * kRowLanes) + splat(bias[c]), top0);
  const vf top = vmax(top0, top1);
  store(m, top);
  const vf shift = select(top == splat(kMinusInf), splat(0.0f), top);  // all -inf so far: every exponential is 0
  const vf log2e = splat(kLog2e);
  vf sum0 = load(l) * exp2_<6>((before - shift) * log2e), sum1 = splat(0.0f);
  for (c = 0; c + 2 <= columns; c += 2) {
    sum0 += exp2_<6>((load(x + c * kRowLanes) + splat(bias[c]) - shift) * log2e);
    sum1 += exp2_<6>((load(x + (c + 1) * kRowLanes) + splat(bias[c + 1]) - shift) * log2e);
  }
  if (c < columns) sum0 += exp2_<6>((load(x + c * kRowLanes) + splat(bias[c]) - shift) * log2e);
  store(l, sum0 + sum1);
}

void fold_columns(const float* x, int columns, const float* bias, float* m, float* l) {
  float none[tts::kPanelColumns];
  if (bias == nullptr) {
    for (int c = 0; c < columns; ++c) none[c] = 0.0f;
    bias = none;
  }
  for (int i = 0; i < kRowLanes; i += VW) fold_vector(x + i, columns, bias, m + i, l + i);
}

constexpr tts::ScoringPath scoring_path() {
  return {kRowLanes, int64_t(tts::kPanelColumns) * kPanelStride * 4, pack_tile, tile_product, activate, fold_columns};
}

}  // namespace
