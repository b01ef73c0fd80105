// The kernel of tree attention for sm_90a: one warpgroup copies KV, two multiply, 64 packed rows each, whatever the
// tile. The arithmetic of a row is that of TreeTile with all tokens of a block in one warp. All rows' products are made
// by the same instructions, so their bits do not depend on the tile; they are not those of the other kernel.
#pragma once

#include <algorithm>

#include "launch.h"
#include "tensor_map.h"
#include "tree_attention.h"
#include "tree_hopper_copy.cuh"
#include "tree_merge.cuh"

namespace tts {

// The blocks as those who multiply see them.
template <int kDim>
class HopperStream {
 public:
  using Layout = HopperLayout<kDim>;
  static constexpr bool kWarpgroups = true;

  TTS_DEVICE HopperStream(const CudaTreeAttentionParams& p, unsigned char* memory)
      : num_stages_(p.num_stages), memory_(memory) {}

  TTS_DEVICE TreeShared& shared() const { return *reinterpret_cast<TreeShared*>(memory_); }
  TTS_DEVICE void await() { barrier_wait(Layout::full(memory_, turn_.stage), turn_.parity); }
  TTS_DEVICE int item() const { return shared().item_of[turn_.stage]; }
  TTS_DEVICE void pop() {
    sync_warp();
    if (lane_index() == 0) barrier_arrive(Layout::empty(memory_, turn_.stage));
    turn_.next(num_stages_);
  }
  // Others do it.
  TTS_DEVICE void copy() {}
  template <typename T>
  TTS_DEVICE void widen() {}

  // score = Q K^T, all tokens of the block.
  template <typename T, int kTiles>
  TTS_DEVICE void multiply_keys(float (&score)[kTiles][4], uint32_t (&q)[kDim / 16][4]) {
    const unsigned char* keys = Layout::half(memory_, turn_.stage, 0);
    wgmma_fence(score, q);
#pragma unroll
    for (int step = 0; step < kDim / 16; ++step)
      wgmma<T, false>(score, q[step], in_panels(keys, step / 4 * Layout::kPanel + step % 4 * 32, 0), step > 0);
    wgmma_commit();
    wgmma_wait<0>(score, q);
  }

  // out += P V, all columns.
  template <typename T>
  TTS_DEVICE void begin_values(float (&out)[kDim / 8][4], uint32_t (&weight)[Layout::kTokens / 16][4]) {
    const unsigned char* values = Layout::half(memory_, turn_.stage, 1);
    wgmma_fence(out, weight);
#pragma unroll
    for (int step = 0; step < Layout::kTokens / 16; ++step)
      wgmma<T, true>(out, weight[step], in_panels(values, step * 16 * kPanelBytes, Layout::kPanel), true);
    wgmma_commit();
  }
  TTS_DEVICE void end_values(float (&out)[kDim / 8][4], uint32_t (&weight)[Layout::kTokens / 16][4]) {
    wgmma_wait<0>(out, weight);
  }

 private:
  const int num_stages_;
  unsigned char* memory_;
  Turn turn_;
};

// Items as in tree_attention_kernel.
template <typename T, int kDim>
__global__ void __launch_bounds__(kHopperThreads, 1) tree_hopper_kernel(const __grid_constant__ HopperTreeParams p) {
  using Layout = HopperLayout<kDim>;
  unsigned char* memory = shared_memory<unsigned char>();
  if (thread_index() == 0) {
    for (int stage = 0; stage < p.tree.num_stages; ++stage) {
      barrier_init(Layout::full(memory, stage), kCopyThreads);
      barrier_init(Layout::empty(memory, stage), kTreeWarps);
    }
    fence_async();
  }
  sync_block();
  // 65,536 registers are 512 for a thread of each of the multiprocessor's quarters, which have a warp of every group.
  if (warp_index() >= kTreeWarps) {
    give_registers<56>();
    HopperCopy<kDim>(p, memory).run();
  } else {
    take_registers<224>();
    HopperStream<kDim> stream(p.tree, memory);
    TreeShared& shared = stream.shared();
    for (;;) {
      stream.await();
      const int place = stream.item();
      if (place < 0) break;
      const TreeItem& item = shared.item[place];
      const TreeRows& rows = shared.rows[place];
      TreeTile<T, kDim, kMostTileRows, HopperStream<kDim>> tile(p.tree, stream, memory, item, rows);
      tile.attend();
      finish_item<T, kDim, Multiplying>(p.tree, tile, item, rows, shared);
    }
    finish_launch<T>(p.tree);
  }
}

// The maps of the caches, where boxes of one page's tokens fill a block and lie in whole groups of eight rows.
template <int kDim>
HopperTreeParams with_maps(const CudaTreeAttentionParams& tree) {
  constexpr int kTokens = HopperLayout<kDim>::kTokens;
  const TreeAttentionParams& c = tree.call;
  HopperTreeParams p = {tree, 0, {}, {}};
  if (c.page_size < 8 || (c.page_size & (c.page_size - 1)) != 0) return p;
  const int box = std::min<int>(c.page_size, kTokens);
  const auto map = [&](const void* cache, int64_t page, int64_t token, int64_t head, TensorMap* made) {
    return make_tensor_map({cache,
                            c.q_dtype,
                            {kDim, c.num_kv_heads, c.page_size, tree.num_pages},
                            {2 * head, 2 * token, 2 * page},
                            {64, 1, box, 1}},
                           made);
  };
  if (map(c.k, c.k_page, c.k_token, c.k_head, &p.k) && map(c.v, c.v_page, c.v_token, c.v_head, &p.v))
    p.box_tokens = box;
  return p;
}

inline std::string describe(const HopperTreeParams& p) {
  if (p.box_tokens == 0) return describe(p.tree) + ", pieces";
  return describe(p.tree) + ", boxes of " + std::to_string(p.box_tokens) + " tokens";
}

template <typename T, int kDim>
void launch_tree_hopper(const HopperTreeParams& p, uintptr_t stream, const char* name) {
  const int64_t blocks = multiprocessor_count(current_device());
  launch(
      tree_hopper_kernel<T, kDim>,
      {std::min(tree_work(p.tree), blocks), kHopperThreads, HopperLayout<kDim>::bytes(p.tree.num_stages), stream, name},
      p);
}

template <int kDim>
int run_tree_hopper_dim(const CudaTreeAttentionParams& tree, uintptr_t stream) {
  const HopperTreeParams p = with_maps<kDim>(tree);
  if (tree.call.q_dtype == DType::f16)
    launch_tree_hopper<F16, kDim>(p, stream, "tree_hopper float16");
  else
    launch_tree_hopper<BF16, kDim>(p, stream, "tree_hopper bfloat16");
  return p.box_tokens;
}

template <int kDim>
int64_t tree_hopper_shared_bytes_dim(int num_stages) {
  return HopperLayout<kDim>::bytes(num_stages);
}

}  // namespace tts
