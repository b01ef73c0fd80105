// Merges attention over disjoint sets of keys. A thread owns eight dimensions of a row's head; the states' weights, which
// are few, each thread computes for itself, so that none waits for another.
#include <cmath>
#include <sstream>

#include "elements.cuh"
#include "launch.h"
#include "ops.h"

namespace tts {

namespace {

constexpr int kMergeThreads = 128;

__global__ void __launch_bounds__(kMergeThreads) merge_states(const __grid_constant__ CudaMergeStatesParams p) {
  const MergeStatesParams& states = p.states;
  const int units = int((states.head_dim + kElements - 1) / kElements);
  const int64_t i = int64_t(block_index()) * kMergeThreads + thread_index();
  if (i >= states.count * units) return;
  const int64_t pair = i / units, row = pair / p.num_heads, head = pair % p.num_heads;
  const int first = int(i % units) * kElements, count = int(min<int64_t>(kElements, states.head_dim - first));
  const float* lse = states.lse + row * p.lse_row + head * p.lse_head;
  const int64_t out = row * p.out_row + head * p.out_head + first;

  float largest = -kInfinity;
  for (int64_t s = 0; s < states.num_states; ++s) largest = max(largest, lse[s * p.lse_state]);
  if (largest == -kInfinity) largest = 0.0f;

  float total = 0.0f, sum[kElements] = {};
  for (int64_t s = 0; s < states.num_states; ++s) {
    const float weight = expf(lse[s * p.lse_state] - largest);
    if (weight == 0.0f) continue;  // counts for nothing, whatever its `out` holds
    float x[kElements];
    load_8(states.out, states.dtype, s * p.out_state + out, count, x);
    total += weight;
#pragma unroll
    for (int e = 0; e < kElements; ++e) sum[e] = fmaf(x[e], weight, sum[e]);
  }
#pragma unroll
  for (int e = 0; e < kElements; ++e) sum[e] /= total == 0.0f ? 1.0f : total;
  store_8(states.merged_out, states.dtype, pair * states.head_dim + first, count, sum);
  if (first == 0) states.merged_lse[pair] = largest + logf(total);
}

}  // namespace

std::string describe(const CudaMergeStatesParams& p) {
  std::ostringstream text;
  text << p.states.num_states << " states of " << p.states.count << " rows and heads of " << p.states.head_dim;
  return text.str();
}

void run_cuda_merge_states(const CudaMergeStatesParams& p, uintptr_t stream) {
  const int64_t units = (p.states.head_dim + kElements - 1) / kElements;
  const int64_t blocks = (p.states.count * units + kMergeThreads - 1) / kMergeThreads;
  launch(merge_states, {blocks, kMergeThreads, 0, stream, "merge_states"}, p);
}

}  // namespace tts
