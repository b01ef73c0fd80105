// The part of a code path that computes scores: products with a weight matrix and an online softmax over its rows.
// Rows of a call are cut into tiles of `lanes` rows, stored [dim][lanes], so that a row has a lane of its own.
#pragma once

#include "../params.h"

namespace tts {

constexpr int kPanelColumns = 96;  // rows of a weight matrix (columns of the product) that are widened at a time

struct TileProduct {
  const float* x;  // [tiles][dim][lanes]
  int64_t rows, dim;
  Matrix weight;  // [>= end, dim]
  float* out;     // tile t, column c, lane i at out[t * out_tile + (c - begin) * lanes + i]
  int64_t out_tile;
};

struct ScoringPath {
  int lanes;
  int64_t panel_bytes;  // scratch of a product, 64-byte aligned
  // Rows rows[0..count) of `from` (rows null: from first on), as fp32, normalised where norm_weight is not null.
  void (*pack_tile)(const Matrix& from, const int64_t* rows, int64_t first, int count, int64_t dim,
                    const float* norm_weight, float norm_eps, float* tile);
  // Columns [begin, end), at most kPanelColumns, for all rows.
  void (*product)(const TileProduct&, int64_t begin, int64_t end, void* panel);
  // x[c][lanes] <- activation(x[c][lanes] + bias[c]); bias may be null.
  void (*activate)(float* x, int64_t columns, const float* bias, Activation);
  // Folds exp(x[c][i] + bias[c]) into each lane's running maximum m and sum of exponentials l.
  void (*fold_columns)(const float* x, int columns, const float* bias, float* m, float* l);
};

}  // namespace tts
