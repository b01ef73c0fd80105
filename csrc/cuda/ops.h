// The CUDA kernels of the small attention ops, on the current device; `stream` is a cudaStream_t.
#pragma once

#include "../params.h"

namespace tts {

void run_cuda_append_kv(const CudaAppendKVParams&, uintptr_t stream);
void run_cuda_merge_states(const CudaMergeStatesParams&, uintptr_t stream);

}  // namespace tts
