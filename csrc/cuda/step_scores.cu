// From hidden states to the chosen candidates in one launch: gather, norm, head, activation, then the sums of each
// candidate, then the selection of each group.
//
// Blocks own tiles of rows, which lie candidate after candidate. Whoever has candidates, or groups, that reach into
// other tiles counts itself in there once its part is written; the last one finds all parts there and goes on with that
// candidate, or group. The counters wrap to zero by themselves, so nothing is cleared between calls. Which block goes
// on changes no bit: it reads what was written and takes it in an order that the candidate alone decides.
#include <algorithm>
#include <cmath>
#include <sstream>

#include "elements.cuh"
#include "launch.h"
#include "scoring.h"
#include "verdict.cuh"

namespace tts {

namespace {

constexpr int kTileRows = 2;     // at most; a weight is loaded once for them
constexpr int kTileColumns = 4;  // whose weights meet a row's elements at a time

struct TileShared {
  uint64_t least[kWarps];
  float sums[kWarps][kTileRows][kTileColumns];
  float squares[kWarps][kTileRows];
  int32_t is_last[2];
  int32_t unused[2];
};
static_assert(sizeof(TileShared) % 16 == 0, "what lies behind it is aligned");

TTS_DEVICE void* behind(TileShared* s) { return s + 1; }

TTS_DEVICE float activate(float x, Activation activation) {
  if (activation == Activation::relu) return x < 0.0f ? 0.0f : x;  // nan stays
  if (activation == Activation::gelu) return x * 0.5f * (1.0f + erff(x * 0.70710678f));
  return x;
}

// Elements [d, d + count) of a row of the hidden layer: the parts of its product, added up, and the activation.
TTS_DEVICE void load_hidden_layer(const StepScoresParams& p, int64_t row, int64_t d, int count, float (&x)[kElements]) {
  const int64_t first = row / p.block_rows * p.num_parts * p.block_rows + row % p.block_rows;
  load_8(p.products, DType::f32, first * p.width + d, count, x);
  for (int64_t part = 1; part < p.num_parts; ++part) {
    float more[kElements];
    load_8(p.products, DType::f32, (first + part * p.block_rows) * p.width + d, count, more);
#pragma unroll
    for (int i = 0; i < kElements; ++i) x[i] += more[i];
  }
  float bias[kElements] = {};
  if (p.b1.data) load_8(p.b1.data, p.b1.dtype, d, count, bias);
#pragma unroll
  for (int i = 0; i < kElements; ++i) x[i] = activate(x[i] + bias[i], p.activation);
}

// logits[r][column] of the tile's rows. Thread t takes elements 8 t .. 8 t + 7 of every kThreads * 8; what it has is
// added up over the lanes of a warp, then over the warps: one order for every row, whatever is beside it.
TTS_DEVICE void tile_logits(const StepScoresParams& p, int64_t first_row, int rows, TileShared& s, float* logits) {
  const int64_t columns = p.reduce.columns;
  const bool gathered = p.rows_of == RowsOf::hidden, norm = gathered && p.norm_weight.data != nullptr;
  int64_t begin[kTileRows] = {};
  if (gathered)
#pragma unroll
    for (int r = 0; r < kTileRows; ++r)
      if (r < rows) begin[r] = p.positions[first_row + r] * p.hidden.row;

  for (int64_t column = 0; column < columns; column += kTileColumns) {
    const int here = int(min<int64_t>(kTileColumns, columns - column));
    float sums[kTileRows][kTileColumns] = {}, squares[kTileRows] = {};
    for (int64_t d = thread_index() * kElements; d < p.width; d += kThreads * kElements) {
      const int count = int(min<int64_t>(kElements, p.width - d));
      Raw8 raw_x[kTileRows], raw_w[kTileColumns], raw_norm = {};
#pragma unroll
      for (int c = 0; c < kTileColumns; ++c)
        if (c < here) raw_w[c] = load_raw_8(p.w2.data, p.w2.dtype, (column + c) * p.w2.row + d, count);
      if (gathered)
#pragma unroll
        for (int r = 0; r < kTileRows; ++r)
          if (r < rows) raw_x[r] = load_raw_8(p.hidden.data, p.hidden.dtype, begin[r] + d, count);
      if (norm) raw_norm = load_raw_8(p.norm_weight.data, p.norm_weight.dtype, d, count);

      float scale[kElements];
      if (norm) widen_8(raw_norm, p.norm_weight.dtype, scale);
#pragma unroll
      for (int r = 0; r < kTileRows; ++r) {
        if (r >= rows) break;
        float x[kElements];
        if (gathered)
          widen_8(raw_x[r], p.hidden.dtype, x);
        else
          load_hidden_layer(p, first_row + r, d, count, x);
#pragma unroll
        for (int i = 0; i < kElements; ++i) {
          if (!norm) break;
          squares[r] = fmaf(x[i], x[i], squares[r]);
          x[i] *= scale[i];
        }
#pragma unroll
        for (int c = 0; c < kTileColumns; ++c) {
          if (c >= here) break;
          float w[kElements];
          widen_8(raw_w[c], p.w2.dtype, w);
#pragma unroll
          for (int i = 0; i < kElements; ++i) sums[r][c] = fmaf(x[i], w[i], sums[r][c]);
        }
      }
    }
    sync_block();  // the columns before have been read
#pragma unroll
    for (int r = 0; r < kTileRows; ++r) {
      if (r >= rows) break;
#pragma unroll
      for (int c = 0; c < kTileColumns; ++c) {
        const float sum = sum_of_warp(sums[r][c]);
        if (lane_index() == 0) s.sums[warp_index()][r][c] = sum;
      }
      const float sum = sum_of_warp(squares[r]);
      if (lane_index() == 0) s.squares[warp_index()][r] = sum;
    }
    sync_block();
    const int r = thread_index() / kTileColumns, c = thread_index() % kTileColumns;
    if (r >= rows || c >= here) continue;
    float logit = 0.0f, square = 0.0f;
    for (int w = 0; w < kWarps; ++w) logit += s.sums[w][r][c], square += s.squares[w][r];
    // The norm's factor is the same for all of a row, so it multiplies the sum.
    if (norm) logit /= sqrtf(square / float(p.width) + p.norm_eps);
    if (p.b2.data) logit += load_element(p.b2.data, p.b2.dtype, column + c);
    logits[r * columns + column + c] = logit;
  }
  sync_block();
}

// The first i in [0, count) for which `holds` is true, where it is true for all that follow; else count. The block's
// threads look at as many places at a time: two rounds for thousands.
template <typename Holds>
TTS_DEVICE int64_t first_that(int64_t count, Holds holds) {
  int64_t begin = 0, end = count;  // it lies in [begin, end]
  while (begin < end) {
    const int64_t piece = (end - begin + kThreads - 1) / kThreads;
    const int64_t last = begin + (thread_index() + 1) * piece - 1;   // of this thread's piece
    const int whole = sync_block_count(last < end && !holds(last));  // pieces before it
    begin += whole * piece;
    end = min(end, begin + piece - 1);  // the next piece's last one is known to be at or behind it
  }
  return begin;
}

struct Range {
  int64_t begin, end;
};

// Of `count` candidates, or groups, those that the block goes on with: they have rows in its tile and in no other, or
// the block is the last one to count itself in. Only the first and the last that have rows here can reach beyond it.
// The search begins with a barrier: what the block's threads wrote before stands behind the counters.
template <typename FirstTile, typename LastTile>
TTS_DEVICE Range finished(int64_t count, int64_t tile, FirstTile first_tile, LastTile last_tile, uint32_t* counters,
                          int32_t (&is_last)[2]) {
  const int64_t begin = first_that(count, [&](int64_t i) { return last_tile(i) >= tile; });
  int64_t end = begin;
  for (int more = kThreads; more == kThreads; end += more) {
    const int64_t i = end + thread_index();
    more = sync_block_count(i < count && first_tile(i) <= tile);
  }
  if (begin == end) return {begin, end};
  const int which = thread_index() / 32;
  if (lane_index() == 0 && which < 2) {
    const int64_t i = which == 0 ? begin : end - 1;
    const int64_t tiles = last_tile(i) - first_tile(i) + 1;
    bool last = true;
    if (tiles > 1 && (which == 0 || begin < end - 1)) {
      fence();
      last = atomic_wrap(counters + i, uint32_t(tiles - 1)) == uint32_t(tiles - 1);
      fence();
    }
    is_last[which] = last;
  }
  sync_block();
  return {begin + !is_last[0], end - !is_last[1]};
}

__global__ void __launch_bounds__(kThreads) step_scores(const __grid_constant__ StepScoresParams p) {
  TileShared& s = *shared_memory<TileShared>();
  const ReduceScoresParams& reduce = p.reduce;
  const int64_t tile = block_index(), first_row = tile << p.tile_shift;
  const int rows = int(min<int64_t>(int64_t(1) << p.tile_shift, reduce.num_rows - first_row));  // 0: only what is empty

  const float* logits = reduce.logits + first_row * reduce.columns;
  if (p.rows_of != RowsOf::logits) {
    float* own = p.logits ? p.logits + first_row * reduce.columns : static_cast<float*>(behind(&s));
    if (rows > 0) tile_logits(p, first_row, rows, s, own);
    logits = own;
  }
  for (int r = warp_index(); r < rows; r += kWarps) score_step(reduce, first_row + r, logits + r * reduce.columns);

  // A candidate without steps belongs to the tile of the row where it would begin, so there is a tile behind the last
  // row. Offsets beyond the rows would leave counters that no block ever brings to zero.
  const auto row_of = [&](int64_t i) { return max<int64_t>(0, min(reduce.offsets[i], reduce.num_rows)); };
  const auto first_tile = [&](int64_t i) { return row_of(i) >> p.tile_shift; };
  const auto last_tile = [&](int64_t i) { return max(row_of(i), row_of(i + 1) - 1) >> p.tile_shift; };
  const Range own = finished(reduce.num_candidates, tile, first_tile, last_tile, p.counters, s.is_last);
  for (int64_t i = own.begin + warp_index(); i < own.end; i += kWarps)
    reduce_candidate(reduce, i, row_of(i), row_of(i + 1));

  const SelectParams& choice = p.select.choice;
  if (choice.num_groups == 0) return;
  const int64_t num_candidates = reduce.num_candidates;
  const auto candidate_of = [&](int64_t g) {
    return choice.groups ? max<int64_t>(0, min(choice.groups[g], num_candidates)) : g * num_candidates;
  };
  const auto group_first = [&](int64_t g) { return first_tile(candidate_of(g)); };
  const auto group_last = [&](int64_t g) {
    const int64_t begin = candidate_of(g), end = candidate_of(g + 1);
    return begin < end ? last_tile(end - 1) : first_tile(begin);
  };
  const Range groups =
      finished(choice.num_groups, tile, group_first, group_last, p.counters + num_candidates, s.is_last);
  for (int64_t g = groups.begin; g < groups.end; ++g) select_in_group(p.select, g, s.least, behind(&s));
}

__global__ void __launch_bounds__(kThreads) select(const __grid_constant__ CudaSelectParams p) {
  TileShared& s = *shared_memory<TileShared>();
  select_in_group(p, block_index(), s.least, behind(&s));
}

// The parts of x in bfloat16, which has 8 of its 24 bits: cut off, not rounded, so that what is left is exact.
TTS_DEVICE void split(float x, float (&parts)[3]) {
#pragma unroll
  for (int j = 0; j < 3; ++j) {
    const bool finite = (bits_of(x) & 0x7f800000u) != 0x7f800000u;
    parts[j] = finite ? float_of(bits_of(x) & 0xffff0000u) : x;
    x = finite ? x - parts[j] : 0.0f;
  }
}

__global__ void __launch_bounds__(kThreads) gather_rows(const __grid_constant__ GatherRowsParams p) {
  float* sums = shared_memory<float>();  // [kWarps]
  const int64_t row = block_index();
  const bool inside = row < p.num_rows;
  const int64_t begin = inside ? p.positions[row] * p.hidden.row : 0;
  float factor = 1.0f;
  if (p.norm_weight.data && inside) {
    float square = 0.0f;
    for (int64_t d = thread_index() * kElements; d < p.dim; d += kThreads * kElements) {
      float x[kElements];
      load_8(p.hidden.data, p.hidden.dtype, begin + d, int(min<int64_t>(kElements, p.dim - d)), x);
#pragma unroll
      for (int i = 0; i < kElements; ++i) square = fmaf(x[i], x[i], square);
    }
    square = sum_of_warp(square);
    if (lane_index() == 0) sums[warp_index()] = square;
    sync_block();
    square = 0.0f;
    for (int w = 0; w < kWarps; ++w) square += sums[w];
    factor = 1.0f / sqrtf(square / float(p.dim) + p.norm_eps);
  }
  const int64_t first = row / p.block_rows * p.num_parts * p.block_rows + row % p.block_rows;
  for (int64_t d = thread_index() * kElements; d < p.dim; d += kThreads * kElements) {
    const int count = int(min<int64_t>(kElements, p.dim - d));
    float x[kElements] = {};
    if (inside) load_8(p.hidden.data, p.hidden.dtype, begin + d, count, x);
    if (inside && p.norm_weight.data) {
      float scale[kElements];
      load_8(p.norm_weight.data, p.norm_weight.dtype, d, count, scale);
#pragma unroll
      for (int i = 0; i < kElements; ++i) x[i] = x[i] * factor * scale[i];
    }
    if (p.num_parts == 1) {
      store_8(p.out, p.out_dtype, first * p.dim + d, count, x);
      continue;
    }
    float parts[3][kElements];
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      float of_one[3];
      split(x[i], of_one);
#pragma unroll
      for (int j = 0; j < 3; ++j) parts[j][i] = of_one[j];
    }
#pragma unroll
    for (int j = 0; j < 3; ++j)
      if (j < p.num_parts) store_8(p.out, p.out_dtype, (first + j * p.block_rows) * p.dim + d, count, parts[j]);
  }
}

}  // namespace

std::string describe(const GatherRowsParams& p) {
  std::ostringstream text;
  text << p.num_rows << " rows of " << p.dim << ", " << p.num_parts << " parts";
  return text.str();
}

std::string describe(const StepScoresParams& p) {
  std::ostringstream text;
  text << p.reduce.num_rows << " rows, head " << p.reduce.columns << " x " << p.width << ", " << p.reduce.num_candidates
       << " candidates, " << p.select.choice.num_groups << " groups";
  return text.str();
}

std::string describe(const CudaSelectParams& p) {
  std::ostringstream text;
  text << p.num_candidates << " candidates, " << p.choice.num_groups << " groups, k " << p.choice.k;
  return text.str();
}

void run_cuda_gather_rows(const GatherRowsParams& p, uintptr_t stream) {
  const int64_t blocks = (p.num_rows + p.block_rows - 1) / p.block_rows;
  launch(gather_rows, {blocks * p.block_rows, kThreads, kWarps * int64_t(sizeof(float)), stream, "gather_rows"}, p);
}

int64_t sort_bytes(const CudaSelectParams& p) { return 24 * p.shared_candidates; }

void run_cuda_step_scores(const StepScoresParams& given, uintptr_t stream) {
  StepScoresParams p = given;
  // Few rows are spread over the GPU, of many a block takes several.
  p.tile_shift = p.reduce.num_rows >= 1024;
  const int64_t columns = p.rows_of == RowsOf::logits || p.logits ? 0 : p.reduce.columns;
  const int64_t logits_bytes = (int64_t(sizeof(float)) << p.tile_shift) * columns;
  const int64_t shared = int64_t(sizeof(TileShared)) + std::max(logits_bytes, sort_bytes(p.select));
  launch(step_scores, {(p.reduce.num_rows >> p.tile_shift) + 1, kThreads, shared, stream, "step_scores"}, p);
}

void run_cuda_select(const CudaSelectParams& p, uintptr_t stream) {
  launch(select, {p.choice.num_groups, kThreads, int64_t(sizeof(TileShared)) + sort_bytes(p), stream, "select"}, p);
}

}  // namespace tts
