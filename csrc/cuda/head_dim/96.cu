#include "../tree_kernel.cuh"

namespace tts {

template void run_tree_attention_dim<96>(const CudaTreeAttentionParams&, uintptr_t);
template int64_t tree_attention_shared_bytes_dim<96>(int, bool);

}  // namespace tts
