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

// hopper/ is compiled where sm_90a is.
#ifdef TTS_HAVE_HOPPER
constexpr bool kHaveHopper = true;
#else
constexpr bool kHaveHopper = false;
#endif

bool takes_hopper(int head_dim) { return kHaveHopper && (head_dim == 64 || head_dim == 128); }

[[noreturn]] void refuse(const CudaTreeAttentionParams& p) {
  throw std::runtime_error("tree_attention: no kernel is made for this (" + describe(p) + ")");
}

int run_hopper(const CudaTreeAttentionParams& p, uintptr_t stream) {
  const TreeAttentionParams& c = p.call;
  if (!takes_hopper(c.head_dim) || c.kv_dtype != c.q_dtype || p.num_stages > 3 || p.min_chunk % 128 != 0) refuse(p);
#ifdef TTS_HAVE_HOPPER
  return c.head_dim == 64 ? run_tree_hopper_dim<64>(p, stream) : run_tree_hopper_dim<128>(p, stream);
#else
  static_cast<void>(stream);
  return 0;
#endif
}

}  // namespace

int run_cuda_tree_attention(const CudaTreeAttentionParams& p, uintptr_t stream) {
  const TreeAttentionParams& c = p.call;
  const bool fp8 = c.kv_dtype == DType::f8e4m3;
  if ((c.q_dtype != DType::f16 && c.q_dtype != DType::bf16) || !(fp8 || c.kv_dtype == c.q_dtype) || c.head_dim < 1 ||
      c.head_dim > 256 || c.head_dim % (fp8 ? 16 : 8) != 0 || p.num_stages < 2 || p.num_stages > 4 ||
      int64_t(p.num_items) * c.num_kv_heads > INT32_MAX / 64)
    refuse(p);
  if (p.warpgroups) return run_hopper(p, stream);
  with_dim(c.head_dim, [&](auto dim) { run_tree_attention_dim<decltype(dim)::value>(p, stream); });
  return 0;
}

int64_t cuda_tree_attention_shared_bytes(int head_dim, int num_stages, bool fp8) {
  return with_dim(head_dim,
                  [&](auto dim) { return tree_attention_shared_bytes_dim<decltype(dim)::value>(num_stages, fp8); });
}

int64_t cuda_tree_hopper_shared_bytes(int head_dim, int num_stages) {
  if (!takes_hopper(head_dim)) return 0;
#ifdef TTS_HAVE_HOPPER
  return head_dim == 64 ? tree_hopper_shared_bytes_dim<64>(num_stages) : tree_hopper_shared_bytes_dim<128>(num_stages);
#else
  return num_stages;
#endif
}

}  // namespace tts
