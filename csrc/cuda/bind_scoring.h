// From the integers that Python passes to the params structs of the CUDA scoring ops. A matrix is (address, stride of
// its rows in elements, dtype), a vector (address, dtype). All run on the device named first and its stream.
#pragma once

#include <array>

#include "launch.h"
#include "scoring.h"

namespace tts {

namespace cuda_scoring {

using MatrixArgs = std::array<int64_t, 3>;
using VectorArgs = std::array<int64_t, 2>;

template <typename T = void>
T* pointer(int64_t address) {
  return reinterpret_cast<T*>(address);
}

inline Matrix as_matrix(const MatrixArgs& m) { return {pointer(m[0]), m[1], DType(m[2])}; }
inline Vector as_vector(const VectorArgs& v) { return {pointer(v[0]), DType(v[1])}; }

// Where choices go to and what they are made from: indices, selected, scores, groups, answers, scratch; shape:
// candidates, groups, k, candidates that are sorted in shared memory.
using ChoiceArgs = std::array<int64_t, 6>;
using ChoiceShape = std::array<int64_t, 4>;

inline CudaSelectParams choice(const ChoiceArgs& of, const ChoiceShape& shape, int method) {
  CudaSelectParams p = {};
  p.choice.indices = pointer<int64_t>(of[0]), p.choice.selected = pointer<float>(of[1]);
  p.choice.scores = pointer<float>(of[2]), p.choice.groups = pointer<int64_t>(of[3]);
  p.choice.answers = pointer<int64_t>(of[4]), p.scratch = pointer(of[5]);
  p.num_candidates = shape[0], p.choice.num_groups = shape[1], p.choice.k = shape[2], p.shared_candidates = shape[3];
  p.choice.method = SelectMethod(method);
  return p;
}

}  // namespace cuda_scoring

// at: device, stream; shape: rows, dim, rows of a block, parts
inline void cuda_gather_rows(std::array<int64_t, 2> at, int64_t out, int out_dtype, cuda_scoring::MatrixArgs hidden,
                             int64_t positions, cuda_scoring::VectorArgs norm_weight, float norm_eps,
                             std::array<int64_t, 4> shape) {
  using namespace cuda_scoring;
  GatherRowsParams p;
  p.hidden = as_matrix(hidden), p.positions = pointer<int64_t>(positions);
  p.norm_weight = as_vector(norm_weight), p.norm_eps = norm_eps;
  p.out = pointer(out), p.out_dtype = DType(out_dtype);
  p.num_rows = shape[0], p.dim = shape[1], p.block_rows = shape[2], p.num_parts = shape[3];
  DeviceGuard device{int(at[0])};
  run_cuda_gather_rows(p, uintptr_t(at[1]));
}

// at: device, stream. rows: which of RowsOf. Of hidden: hidden, positions, norm_weight, norm_eps; of products: products
// (address, parts, rows of a block), b1, activation. w2, b2, logits (scratch) of both; of logits: they are there.
// out: margin, prob, stats, count, counters; shape: rows, width, columns, candidates.
inline void cuda_step_scores(std::array<int64_t, 2> at, int rows, cuda_scoring::MatrixArgs hidden, int64_t positions,
                             cuda_scoring::VectorArgs norm_weight, float norm_eps, std::array<int64_t, 3> products,
                             cuda_scoring::VectorArgs b1, int activation, cuda_scoring::MatrixArgs w2,
                             cuda_scoring::VectorArgs b2, int64_t logits, std::array<int64_t, 5> out, int64_t offsets,
                             std::array<int64_t, 4> shape, int kind, int64_t positive,
                             cuda_scoring::ChoiceArgs choice_of, cuda_scoring::ChoiceShape choice_shape, int method) {
  using namespace cuda_scoring;
  StepScoresParams p = {};
  p.rows_of = RowsOf(rows);
  p.hidden = as_matrix(hidden), p.positions = pointer<int64_t>(positions);
  p.norm_weight = as_vector(norm_weight), p.norm_eps = norm_eps;
  p.products = pointer<float>(products[0]), p.num_parts = products[1], p.block_rows = products[2];
  p.b1 = as_vector(b1), p.activation = Activation(activation);
  p.w2 = as_matrix(w2), p.b2 = as_vector(b2), p.logits = pointer<float>(logits);
  p.reduce.logits = p.logits, p.reduce.offsets = pointer<int64_t>(offsets);
  p.reduce.margin = pointer<float>(out[0]), p.reduce.prob = pointer<float>(out[1]);
  p.reduce.stats = pointer<float>(out[2]), p.reduce.count = pointer<int32_t>(out[3]);
  p.counters = pointer<uint32_t>(out[4]);
  p.reduce.num_rows = shape[0], p.width = shape[1], p.reduce.columns = shape[2], p.reduce.num_candidates = shape[3];
  p.reduce.kind = ScoreKind(kind), p.reduce.positive = positive;
  p.select = choice(choice_of, choice_shape, method);
  DeviceGuard device{int(at[0])};
  run_cuda_step_scores(p, uintptr_t(at[1]));
}

// at: device, stream
inline void cuda_select(std::array<int64_t, 2> at, cuda_scoring::ChoiceArgs choice_of,
                        cuda_scoring::ChoiceShape choice_shape, int method) {
  DeviceGuard device{int(at[0])};
  run_cuda_select(cuda_scoring::choice(choice_of, choice_shape, method), uintptr_t(at[1]));
}

}  // namespace tts
