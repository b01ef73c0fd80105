#include "../tree_kernel.cuh"

namespace tts {

template void run_tree_attention_dim<256>(const CudaTreeAttentionParams&, uintptr_t);
template int64_t tree_attention_shared_bytes_dim<256>(int, bool);

}  // namespace tts
