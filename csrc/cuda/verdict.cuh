// From a step's logits to its margin and probability, and from a candidate's to its aggregates: a warp each. Sums and
// products are in double, as on the CPU: their order then hardly matters, and a product does not underflow on the way.
#pragma once

#include <cmath>

#include "../params.h"
#include "device.cuh"
#include "selection.cuh"

namespace tts {

template <typename T>
TTS_DEVICE T sum_of_warp(T x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}

// nan where one of the logits is.
TTS_DEVICE float log_sum_exp_of_others(const float* logits, int64_t columns, int64_t except) {
  float top = -kInfinity, sum = 0.0f;
  bool is_nan = false;
  for (int64_t c = lane_index(); c < columns; c += 32) {
    if (c == except) continue;
    is_nan |= logits[c] != logits[c];
    top = max(top, logits[c]);
  }
  if (any_in_warp(is_nan)) return kNan;
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) top = max(top, shuffle_xor(top, mask));
  if (top == kInfinity || top == -kInfinity) return top;
  for (int64_t c = lane_index(); c < columns; c += 32)
    if (c != except) sum += expf(logits[c] - top);
  return top + logf(sum_of_warp(sum));
}

TTS_DEVICE float sigmoid(float margin) {
  const float e = expf(-fabsf(margin));
  return (margin < 0.0f ? e : 1.0f) / (1.0f + e);
}

// log(sigmoid(margin)) = -log(1 + exp(-margin)), without overflow.
TTS_DEVICE float log_sigmoid(float margin) { return (margin > 0.0f ? 0.0f : margin) - log1pf(expf(-fabsf(margin))); }

TTS_DEVICE void score_step(const ReduceScoresParams& p, int64_t row, const float* logits) {
  float margin = logits[p.positive];
  if (p.kind == ScoreKind::softmax) margin -= log_sum_exp_of_others(logits, p.columns, p.positive);
  if (lane_index() != 0) return;
  store_state(p.margin + row, margin);
  store_state(p.prob + row, p.kind == ScoreKind::identity ? margin : sigmoid(margin));
}

// Of the steps [begin, end); lane l takes begin + l, begin + l + 32, ...
TTS_DEVICE void reduce_candidate(const ReduceScoresParams& p, int64_t candidate, int64_t begin, int64_t end) {
  float least = kInfinity, most = -kInfinity;
  bool is_nan = begin == end;
  double product = 1.0, sum = 0.0, log_sum = 0.0;
  for (int64_t row = begin + lane_index(); row < end; row += 32) {
    const float prob = load_fresh(p.prob + row);
    is_nan |= prob != prob;
    least = min(least, prob);
    most = max(most, prob);
    product *= double(prob);
    sum += double(prob);
    log_sum += double(p.kind == ScoreKind::identity ? logf(prob) : log_sigmoid(load_fresh(p.margin + row)));
  }
  is_nan = any_in_warp(is_nan);
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    least = min(least, shuffle_xor(least, mask));
    most = max(most, shuffle_xor(most, mask));
    product *= shuffle_xor(product, mask);
  }
  sum = sum_of_warp(sum), log_sum = sum_of_warp(log_sum);
  if (lane_index() != 0) return;
  const bool none = begin == end;
  const float last = none ? kNan : load_fresh(p.prob + end - 1);
  const float values[6] = {last, least, float(product), float(sum / double(end - begin)), most, float(log_sum)};
#pragma unroll
  for (int s = 0; s < 6; ++s)
    store_state(p.stats + s * p.num_candidates + candidate, none || (is_nan && (s == 1 || s == 4)) ? kNan : values[s]);
  p.count[candidate] = int32_t(end - begin);
}

}  // namespace tts
