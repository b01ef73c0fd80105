// The CUDA kernels of the scoring ops, on the current device; `stream` is a cudaStream_t.
#pragma once

#include "../params.h"

namespace tts {

void run_cuda_gather_rows(const GatherRowsParams&, uintptr_t stream);
void run_cuda_step_scores(const StepScoresParams&, uintptr_t stream);
void run_cuda_select(const CudaSelectParams&, uintptr_t stream);

}  // namespace tts
