// The kernel of tree attention. The files in head_dim/ make it for one size of heads each, so that they compile in
// parallel; a head of another size takes the next larger one, whose further columns are zeros.
#pragma once

#include "tree_attention.h"

#include <algorithm>

#include "launch.h"
#include "tree_merge.cuh"

namespace tts {

template <typename T, int kDim, int kRows>
TTS_DEVICE void run_item(const CudaTreeAttentionParams& p, TreeStream<kDim>& stream, unsigned char* memory,
                         const TreeItem& item, const TreeRows& rows) {
  TreeTile<T, kDim, kRows> tile(p, stream, memory, item, rows);
  tile.attend();
  finish_item<T, kDim, WholeBlock>(p, tile, item, rows, stream.shared());
}

// A block of threads takes every block_count()-th (item, KV head) of the list, longest first; KV heads vary fastest,
// since in an NHD cache they are neighbours.
template <typename T, int kDim>
__global__ void __launch_bounds__(kTreeThreads, 1)
    tree_attention_kernel(const __grid_constant__ CudaTreeAttentionParams p) {
  unsigned char* memory = shared_memory<unsigned char>();
  TreeStream<kDim> stream(p, memory);
  TreeShared& shared = stream.shared();
  for (;;) {
    stream.await();
    const int place = stream.item();
    if (place < 0) break;
    const TreeItem& item = shared.item[place];
    const TreeRows& rows = shared.rows[place];
    if (item.rows == 16)
      run_item<T, kDim, 16>(p, stream, memory, item, rows);
    else if (item.rows == 64)
      run_item<T, kDim, 64>(p, stream, memory, item, rows);
    else if (kDim <= 128)
      run_item<T, kDim, 128>(p, stream, memory, item, rows);
  }
  finish_launch<T>(p);
}

template <typename T, int kDim>
void launch_tree_attention(const CudaTreeAttentionParams& p, uintptr_t stream, const char* name) {
  const auto kernel = tree_attention_kernel<T, kDim>;
  const int64_t shared_bytes = TreeLayout<kDim>::bytes(p.num_stages, p.call.kv_dtype == DType::f8e4m3);
  const int64_t blocks = int64_t(multiprocessor_count(current_device())) *
                         std::max(blocks_per_multiprocessor(kernel, kTreeThreads, shared_bytes), 1);
  launch(kernel, {std::min(tree_work(p), blocks), kTreeThreads, shared_bytes, stream, name}, p);
}

template <int kDim>
void run_tree_attention_dim(const CudaTreeAttentionParams& p, uintptr_t stream) {
  if (p.call.q_dtype == DType::f16)
    launch_tree_attention<F16, kDim>(p, stream, "tree_attention float16");
  else
    launch_tree_attention<BF16, kDim>(p, stream, "tree_attention bfloat16");
}

template <int kDim>
int64_t tree_attention_shared_bytes_dim(int num_stages, bool fp8) {
  return TreeLayout<kDim>::bytes(num_stages, fp8);
}

}  // namespace tts
