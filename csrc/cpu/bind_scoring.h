// From the integers that Python passes to the params structs of the scoring ops. A matrix is (address, stride of its
// rows in elements, dtype).
#pragma once

#include <array>

#include "bind.h"
#include "scoring.h"

namespace tts {

using MatrixArgs = std::array<int64_t, 3>;

inline Matrix matrix(const MatrixArgs& m) { return {address(m[0]), m[1], DType(m[2])}; }

// shape: rows, dim, width, columns; vectors: norm weight, b1, b2
inline void cpu_score_logits(int64_t logits, MatrixArgs hidden, int64_t positions, MatrixArgs w1, MatrixArgs w2,
                             std::array<int64_t, 3> vectors, std::array<int64_t, 4> shape, int activation,
                             float norm_eps, int threads) {
  ScoreLogitsParams p;
  p.hidden = matrix(hidden), p.w1 = matrix(w1), p.w2 = matrix(w2);
  p.positions = address<int64_t>(positions);
  p.norm_weight = address<float>(vectors[0]), p.b1 = address<float>(vectors[1]), p.b2 = address<float>(vectors[2]);
  p.norm_eps = norm_eps, p.activation = Activation(activation);
  p.logits = address<float>(logits);
  p.num_rows = shape[0], p.dim = shape[1], p.width = shape[2], p.columns = shape[3];
  run_score_logits(p, threads);
}

// shape: rows, dim, vocab
inline void cpu_token_logprobs(int64_t logprobs, MatrixArgs hidden, MatrixArgs weight, int64_t bias, int64_t targets,
                               std::array<int64_t, 3> shape, int threads) {
  TokenLogprobsParams p;
  p.hidden = matrix(hidden), p.weight = matrix(weight);
  p.bias = address<float>(bias), p.targets = address<int64_t>(targets), p.logprobs = address<float>(logprobs);
  p.num_rows = shape[0], p.dim = shape[1], p.vocab = shape[2];
  run_token_logprobs(p, threads);
}

// out: margin, prob, stats, count; shape: rows, columns, candidates
inline void cpu_reduce_scores(std::array<int64_t, 4> out, int64_t logits, int64_t offsets, std::array<int64_t, 3> shape,
                              int kind, int64_t positive, int threads) {
  ReduceScoresParams p;
  p.margin = address<float>(out[0]), p.prob = address<float>(out[1]);
  p.stats = address<float>(out[2]), p.count = address<int32_t>(out[3]);
  p.logits = address<float>(logits), p.offsets = address<int64_t>(offsets);
  p.num_rows = shape[0], p.columns = shape[1], p.num_candidates = shape[2];
  p.kind = ScoreKind(kind), p.positive = positive;
  run_reduce_scores(p, threads);
}

// shape: groups, k
inline void cpu_select(int64_t indices, int64_t selected, int64_t scores, int64_t groups, int64_t answers,
                       std::array<int64_t, 2> shape, int method) {
  SelectParams p;
  p.indices = address<int64_t>(indices), p.selected = address<float>(selected);
  p.scores = address<float>(scores), p.groups = address<int64_t>(groups), p.answers = address<int64_t>(answers);
  p.num_groups = shape[0], p.k = shape[1], p.method = SelectMethod(method);
  run_select(p);
}

}  // namespace tts
