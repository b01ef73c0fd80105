// The kernel that makes a tree's work list, on the current device; `stream` is a cudaStream_t.
#pragma once

#include "../params.h"

namespace tts {

void run_cuda_work_list(const WorkListParams&, uintptr_t stream);

}  // namespace tts
