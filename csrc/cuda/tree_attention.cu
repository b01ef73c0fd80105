// Which kernel a call of tree attention takes.
#include "tree_attention.h"

#include <stdexcept>
#include <type_traits>

namespace tts {
namespace {

template <int kDim>
using Dim = std::integral_constant<int, kDim>;

template <typename F>
auto with_dim(int head_dim, F run) {
  if (head_dim <= 64) return run(Dim<64>());
  if (head_dim <= 96) return run(Dim<96>());
  if (head_dim <= 128) return run(Dim<128>());
  if (head_dim <= 192) return run(Dim<192>());
  return run(Dim<256>());
}

}  // namespace

void run_cuda_tree_attention(const CudaTreeAttentionParams& p, uintptr_t stream) {
  const TreeAttentionParams& c = p.call;
  const bool fp8 = c.kv_dtype == DType::f8e4m3;
  if ((c.q_dtype != DType::f16 && c.q_dtype != DType::bf16) || !(fp8 || c.kv_dtype == c.q_dtype) || c.head_dim < 1 ||
      c.head_dim > 256 || c.head_dim % (fp8 ? 16 : 8) != 0 || p.num_stages < 2 || p.num_stages > 4 ||
      int64_t(p.num_items) * c.num_kv_heads > INT32_MAX / 64)
    throw std::runtime_error("tree_attention: no kernel is made for this (" + describe(p) + ")");
  with_dim(c.head_dim, [&](auto dim) { run_tree_attention_dim<decltype(dim)::value>(p, stream); });
}

int64_t cuda_tree_attention_shared_bytes(int head_dim, int num_stages, bool fp8) {
  return with_dim(head_dim,
                  [&](auto dim) { return tree_attention_shared_bytes_dim<decltype(dim)::value>(num_stages, fp8); });
}

}  // namespace tts
