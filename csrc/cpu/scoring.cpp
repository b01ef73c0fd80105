// Logits of scoring heads and token log-probabilities. Rows are taken in blocks; in a block the threads first pack its
// tiles, then share out the panels of the weights, then what is left to do for each row.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "arena.h"
#include "code_path.h"
#include "scoring.h"

namespace tts {

namespace {

// Rows at a time: a panel of weights is read and widened once for all of them, and their logits of a panel stay in L2.
constexpr int64_t kRowBlock = 512;
// Products below which waking other threads costs more than it saves.
constexpr int64_t kSerialProducts = 1 << 18;

int64_t parts(int64_t count, int64_t size) { return (count + size - 1) / size; }

// Panels whose exponentials one item sums. It depends on the vocabulary alone, as the order of a row's sums must.
int64_t panels_per_chunk(int64_t vocab) { return std::max<int64_t>(4, parts(vocab, 512 * kPanelColumns)); }

// Pieces of a thread's arena, in whole cache lines; without a base it only counts.
struct Floats {
  char* base;
  int64_t used = 0;
  float* take(int64_t count) {
    float* at = reinterpret_cast<float*>(base + used);
    used += parts(count * int64_t(sizeof(float)), 64) * 64;
    return at;
  }
};

template <typename Scratch, typename... Sizes>
Scratch make_scratch(const Sizes&... sizes) {
  thread_local Arena arena;
  Floats counted = {nullptr};
  Scratch::carve(&counted, sizes...);
  Floats taken = {arena.at_least(counted.used)};
  return Scratch::carve(&taken, sizes...);
}

int64_t padded_block(int64_t num_rows, const ScoringPath& path) {
  return parts(std::min(num_rows, kRowBlock), path.lanes) * path.lanes;
}

struct LogitsScratch {
  float* x;             // [tiles][dim][lanes]
  float* hidden_layer;  // [tiles][width][lanes]
  float* own;           // of each thread: a panel, then the logits of a tile [kPanelColumns][lanes]
  int64_t own_floats, panel_floats;

  static LogitsScratch carve(Floats* from, const ScoreLogitsParams& p, const ScoringPath& path, int threads) {
    const int64_t rows = padded_block(p.num_rows, path);
    LogitsScratch s;
    s.panel_floats = path.panel_bytes / int64_t(sizeof(float));
    s.own_floats = s.panel_floats + kPanelColumns * path.lanes;
    s.x = from->take(rows * p.dim);
    s.hidden_layer = p.w1.data ? from->take(rows * p.width) : s.x;
    s.own = from->take(threads * s.own_floats);
    return s;
  }
};

struct LogprobsScratch {
  float* x;        // [tiles][dim][lanes]
  float *m, *l;    // [chunks][rows] partial softmax states
  float* targets;  // [rows] logits
  float* own;      // of each thread: a panel, then the logits of a panel [tiles][kPanelColumns][lanes]
  int64_t rows, own_floats, panel_floats;

  static LogprobsScratch carve(Floats* from, const TokenLogprobsParams& p, const ScoringPath& path, int64_t chunks,
                               int threads) {
    LogprobsScratch s;
    s.rows = padded_block(p.num_rows, path);
    s.panel_floats = path.panel_bytes / int64_t(sizeof(float));
    s.own_floats = s.panel_floats + s.rows * kPanelColumns;
    s.x = from->take(s.rows * p.dim);
    s.m = from->take(chunks * s.rows);
    s.l = from->take(chunks * s.rows);
    s.targets = from->take(s.rows);
    s.own = from->take(threads * s.own_floats);
    return s;
  }
};

// Logits of some rows for the columns of one chunk: their softmax state, and the logits that are targets.
void fold_chunk(const TokenLogprobsParams& p, const ScoringPath& path, const LogprobsScratch& s, int64_t first_row,
                int64_t rows, int64_t chunk, int64_t begin, int64_t end) {
  float* panel = s.own + omp_get_thread_num() * s.own_floats;
  float* logits = panel + s.panel_floats;
  float *m = s.m + chunk * s.rows, *l = s.l + chunk * s.rows;
  std::fill(m, m + s.rows, -std::numeric_limits<float>::infinity());
  std::fill(l, l + s.rows, 0.0f);
  const TileProduct product = {s.x, rows, p.dim, p.weight, logits, kPanelColumns * path.lanes};
  for (int64_t column = begin; column < end; column += kPanelColumns) {
    const int64_t columns = std::min<int64_t>(kPanelColumns, end - column);
    const float* bias = p.bias ? p.bias + column : nullptr;
    path.product(product, column, column + columns, panel);
    for (int64_t row = 0; row < rows; row += path.lanes)
      path.fold_columns(logits + row * kPanelColumns, int(columns), bias, m + row, l + row);
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t target = p.targets[first_row + row] - column;
      if (target < 0 || target >= columns) continue;
      const int64_t tile = row / path.lanes * path.lanes;
      const float logit = logits[tile * kPanelColumns + target * path.lanes + (row - tile)];
      s.targets[row] = bias ? logit + bias[target] : logit;
    }
  }
}

float finish_logprob(const LogprobsScratch& s, int64_t chunks, int64_t row) {
  float m = -std::numeric_limits<float>::infinity(), l = 0.0f;
  for (int64_t c = 0; c < chunks; ++c) m = std::max(m, s.m[c * s.rows + row]);
  for (int64_t c = 0; c < chunks; ++c) {
    const float of_chunk = s.m[c * s.rows + row];
    const float keep = of_chunk == m ? 1.0f : std::exp(of_chunk - m);
    l += s.l[c * s.rows + row] * keep;
  }
  return (s.targets[row] - m) - std::log(l);
}

}  // namespace

void run_score_logits(const ScoreLogitsParams& p, int threads) {
  if (p.num_rows == 0) return;
  const ScoringPath& path = active_code_path().scoring;
  const int64_t products = p.num_rows * p.width * ((p.w1.data ? p.dim : 0) + p.columns);
  if (products < kSerialProducts || threads < 1) threads = 1;
  const LogitsScratch s = make_scratch<LogitsScratch>(p, path, threads);
  const int64_t lanes = path.lanes;

#pragma omp parallel num_threads(threads) if (threads > 1)
  for (int64_t first = 0; first < p.num_rows; first += kRowBlock) {
    const int64_t rows = std::min(kRowBlock, p.num_rows - first), tiles = parts(rows, lanes);
    float* panel = s.own + omp_get_thread_num() * s.own_floats;
    float* logits = panel + s.panel_floats;
#pragma omp for schedule(dynamic)
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int count = int(std::min(lanes, rows - tile * lanes));
      path.pack_tile(p.hidden, p.positions + first + tile * lanes, 0, count, p.dim, p.norm_weight, p.norm_eps,
                     s.x + tile * lanes * p.dim);
    }
    if (p.w1.data) {
#pragma omp for schedule(dynamic)
      for (int64_t part = 0; part < parts(p.width, kPanelColumns); ++part) {
        const int64_t begin = part * kPanelColumns, end = std::min(p.width, begin + kPanelColumns);
        const int64_t tile_floats = p.width * lanes;
        float* out = s.hidden_layer + begin * lanes;
        path.product({s.x, rows, p.dim, p.w1, out, tile_floats}, begin, end, panel);
        for (int64_t tile = 0; tile < tiles; ++tile)
          path.activate(out + tile * tile_floats, end - begin, p.b1 ? p.b1 + begin : nullptr, p.activation);
      }
    }
    const int64_t column_parts = parts(p.columns, kPanelColumns);
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < tiles * column_parts; ++item) {
      const int64_t tile = item / column_parts, begin = item % column_parts * kPanelColumns;
      const int64_t end = std::min(p.columns, begin + kPanelColumns), count = std::min(lanes, rows - tile * lanes);
      path.product({s.hidden_layer + tile * lanes * p.width, count, p.width, p.w2, logits, 0}, begin, end, panel);
      path.activate(logits, end - begin, p.b2 ? p.b2 + begin : nullptr, Activation::none);
      for (int64_t i = 0; i < count; ++i)
        for (int64_t c = begin; c < end; ++c)
          p.logits[(first + tile * lanes + i) * p.columns + c] = logits[(c - begin) * lanes + i];
    }
  }
}

void run_token_logprobs(const TokenLogprobsParams& p, int threads) {
  if (p.num_rows == 0) return;
  const ScoringPath& path = active_code_path().scoring;
  if (p.num_rows * p.vocab * p.dim < kSerialProducts || threads < 1) threads = 1;
  const int64_t chunk_columns = panels_per_chunk(p.vocab) * kPanelColumns, chunks = parts(p.vocab, chunk_columns);
  const LogprobsScratch s = make_scratch<LogprobsScratch>(p, path, chunks, threads);
  const int64_t lanes = path.lanes;

#pragma omp parallel num_threads(threads) if (threads > 1)
  for (int64_t first = 0; first < p.num_rows; first += kRowBlock) {
    const int64_t rows = std::min(kRowBlock, p.num_rows - first);
#pragma omp for schedule(dynamic)
    for (int64_t tile = 0; tile < parts(rows, lanes); ++tile) {
      const int64_t count = std::min(lanes, rows - tile * lanes);
      path.pack_tile(p.hidden, nullptr, first + tile * lanes, int(count), p.dim, nullptr, 0.0f,
                     s.x + tile * lanes * p.dim);
      std::fill_n(s.targets + tile * lanes, count, std::numeric_limits<float>::quiet_NaN());
    }
#pragma omp for schedule(dynamic)
    for (int64_t chunk = 0; chunk < chunks; ++chunk)
      fold_chunk(p, path, s, first, rows, chunk, chunk * chunk_columns, std::min(p.vocab, (chunk + 1) * chunk_columns));
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; ++row) p.logprobs[first + row] = finish_logprob(s, chunks, row);
  }
}

}  // namespace tts
