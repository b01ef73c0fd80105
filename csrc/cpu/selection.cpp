// From logits to scores of steps and candidates, and from scores to the candidates chosen.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "scoring.h"

namespace tts {

namespace {

constexpr int64_t kSerialRows = 4096;  // rows below which waking other threads costs more than it saves
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// As torch.minimum and torch.maximum: nan where one of the two is.
float minimum(float a, float b) { return std::isnan(a) || a < b ? a : b; }
float maximum(float a, float b) { return std::isnan(a) || a > b ? a : b; }

float log_sum_exp_of_others(const float* logits, int64_t columns, int64_t except) {
  float top = -std::numeric_limits<float>::infinity(), sum = 0.0f;
  for (int64_t c = 0; c < columns; ++c)
    if (c != except) top = maximum(top, logits[c]);
  if (std::isinf(top) || std::isnan(top)) return top;
  for (int64_t c = 0; c < columns; ++c)
    if (c != except) sum += std::exp(logits[c] - top);
  return top + std::log(sum);
}

float margin_of(const ReduceScoresParams& p, const float* logits) {
  if (p.kind != ScoreKind::softmax) return logits[p.positive];
  return logits[p.positive] - log_sum_exp_of_others(logits, p.columns, p.positive);
}

float sigmoid(float margin) {
  const float e = std::exp(-std::fabs(margin));
  return (margin < 0.0f ? e : 1.0f) / (1.0f + e);
}

// log(sigmoid(margin)) = -log(1 + exp(-margin)), without overflow.
float log_sigmoid(float margin) { return std::min(margin, 0.0f) - std::log1p(std::exp(-std::fabs(margin))); }

void reduce_candidate(const ReduceScoresParams& p, int64_t i) {
  const int64_t begin = p.offsets[i], end = p.offsets[i + 1], count = std::max<int64_t>(0, end - begin);
  float last = kNan, least = std::numeric_limits<float>::infinity(), most = -least;
  // Sums and products in double: their order then hardly matters, and a product does not underflow on the way.
  double product = 1.0, sum = 0.0, log_sum = 0.0;
  for (int64_t r = begin; r < end; ++r) {
    last = p.prob[r];
    least = minimum(least, last);
    most = maximum(most, last);
    product *= last;
    sum += last;
    log_sum += p.kind == ScoreKind::identity ? std::log(last) : log_sigmoid(p.margin[r]);
  }
  const float values[6] = {last, least, float(product), float(sum / double(count)), most, float(log_sum)};
  for (int s = 0; s < 6; ++s) p.stats[s * p.num_candidates + i] = count ? values[s] : kNan;
  p.count[i] = int32_t(count);
}

struct Choice {
  float score;
  int64_t order;  // decides between equal scores: the lower one goes first
  int64_t index;
};

// The candidates that have a score, with their answers where these matter.
struct Voter {
  int64_t answer, index;
};

void choices_of_votes(const SelectParams& p, int64_t begin, int64_t end, std::vector<Voter>* voters,
                      std::vector<Choice>* choices) {
  voters->clear();
  for (int64_t i = begin; i < end; ++i)
    if (p.answers[i] != -1 && !std::isnan(p.scores[i])) voters->push_back({p.answers[i], i});
  std::sort(voters->begin(), voters->end(), [](const Voter& a, const Voter& b) {
    return a.answer != b.answer ? a.answer < b.answer : a.index < b.index;
  });
  for (size_t v = 0; v < voters->size();) {
    const Voter first = (*voters)[v];
    Choice choice = {0.0f, first.index, first.index};
    for (; v < voters->size() && (*voters)[v].answer == first.answer; ++v) {
      const int64_t i = (*voters)[v].index;
      choice.score += p.method == SelectMethod::majority ? 1.0f : p.scores[i];
      if (p.scores[i] > p.scores[choice.index]) choice.index = i;
    }
    if (!std::isnan(choice.score)) choices->push_back(choice);  // inf - inf is no score
  }
}

void select_in_group(const SelectParams& p, int64_t group, std::vector<Voter>* voters, std::vector<Choice>* choices) {
  const int64_t begin = p.groups[group], end = p.groups[group + 1];
  choices->clear();
  if (p.method == SelectMethod::top_k) {
    for (int64_t i = begin; i < end; ++i)
      if (!std::isnan(p.scores[i])) choices->push_back({p.scores[i], i, i});
  } else {
    choices_of_votes(p, begin, end, voters, choices);
  }
  const int64_t found = std::min<int64_t>(p.k, int64_t(choices->size()));
  std::partial_sort(choices->begin(), choices->begin() + found, choices->end(), [](const Choice& a, const Choice& b) {
    return a.score != b.score ? a.score > b.score : a.order < b.order;
  });
  for (int64_t i = 0; i < p.k; ++i) {
    p.indices[group * p.k + i] = i < found ? (*choices)[i].index : -1;
    p.selected[group * p.k + i] = i < found ? (*choices)[i].score : kNan;
  }
}

}  // namespace

void run_reduce_scores(const ReduceScoresParams& p, int threads) {
#pragma omp parallel num_threads(std::max(threads, 1)) if (threads > 1 && p.num_rows >= kSerialRows)
  {
#pragma omp for schedule(static)
    for (int64_t r = 0; r < p.num_rows; ++r) {
      p.margin[r] = margin_of(p, p.logits + r * p.columns);
      p.prob[r] = p.kind == ScoreKind::identity ? p.margin[r] : sigmoid(p.margin[r]);
    }
#pragma omp for schedule(dynamic, 16)
    for (int64_t i = 0; i < p.num_candidates; ++i) reduce_candidate(p, i);
  }
}

void run_select(const SelectParams& p) {
  std::vector<Voter> voters;
  std::vector<Choice> choices;
  for (int64_t group = 0; group < p.num_groups; ++group) select_in_group(p, group, &voters, &choices);
}

}  // namespace tts
