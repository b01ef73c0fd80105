#include "../tree_hopper.cuh"

namespace tts {

template int run_tree_hopper_dim<128>(const CudaTreeAttentionParams&, uintptr_t);
template int64_t tree_hopper_shared_bytes_dim<128>(int);

}  // namespace tts
