// The blocks of KV that a block of threads works through, item after item, copied ahead of the arithmetic. The copies
// run across the borders of items: while one item ends, the first blocks of the next one are on their way.
#pragma once

#include "tree_walk.cuh"

namespace tts {

template <int kDim>
class TreeStream {
 public:
  using Layout = TreeLayout<kDim>;
  static constexpr bool kWarpgroups = false;  // products are those of warps

  TTS_DEVICE TreeStream(const CudaTreeAttentionParams& p, unsigned char* memory)
      : p_(p),
        shared_(*reinterpret_cast<TreeShared*>(memory)),
        memory_(memory),
        fp8_(p.call.kv_dtype == DType::f8e4m3),
        walk_(p, shared_) {
    for (int i = 1; i < p_.num_stages; ++i) copy();
  }

  TTS_DEVICE TreeShared& shared() const { return shared_; }

  // Until the oldest block that was copied is there, and every thread is done with those before it.
  TTS_DEVICE void await() {
    if (p_.num_stages == 2)
      copy_async_wait<0>();
    else if (p_.num_stages == 3)
      copy_async_wait<1>();
    else
      copy_async_wait<2>();
    sync_block();
  }

  // Where in shared() the oldest block's item is; -1: there are no more blocks.
  TTS_DEVICE int item() const { return shared_.item_of[oldest_]; }

  // K (0) or V (1) of the oldest block, in T.
  TTS_DEVICE const unsigned char* block(int which) const {
    return memory_ + Layout::kBlocks + (fp8_ ? which : 2 * oldest_ + which) * Layout::kHalf;
  }

  // e4m3: the oldest block as T, where `block` says.
  template <typename T>
  TTS_DEVICE void widen() {
    if (!fp8_) return;
    constexpr int kPieces = Layout::kTokens * Layout::kChunks;  // of 8 numbers
    for (int which = 0; which < 2; ++which) {
      const unsigned char* from = stage(oldest_, which);
      unsigned char* to = memory_ + Layout::kBlocks + which * Layout::kHalf;
#pragma unroll 2
      for (int i = thread_index_anew(); i < kPieces; i += kTreeThreads) {
        const uint32_t* bytes = reinterpret_cast<const uint32_t*>(from) + 2 * i;
        Bits128 wide;
        widen_e4m3x4<T>(bytes[0], wide.word[0], wide.word[1]);
        widen_e4m3x4<T>(bytes[1], wide.word[2], wide.word[3]);
        const int token = int(uint32_t(i) / Layout::kChunks);
        store_16(to + 16 * swizzled<Layout::kChunks>(token, i - token * Layout::kChunks), wide);
      }
    }
    sync_block();
  }

  // The oldest block is used up.
  TTS_DEVICE void pop() { oldest_ = oldest_ + 1 == p_.num_stages ? 0 : oldest_ + 1; }

  // Begins the copies of the next block, and closes the group: an empty one where there is no block left.
  TTS_DEVICE void copy() {
    const bool more = walk_.find();
    if (thread_index_anew() == 0) shared_.item_of[fresh_] = more ? walk_.place() : -1;
    if (more) {
      if (fp8_)
        copy_block<Layout::kChunks / 2, 1>();
      else
        copy_block<Layout::kChunks, 2>();
      walk_.pass();
    }
    fresh_ = fresh_ + 1 == p_.num_stages ? 0 : fresh_ + 1;
    copy_async_commit();
  }

 private:
  // K or V of a block as it is in the cache.
  TTS_DEVICE unsigned char* stage(int place, int which) const {
    const int half = fp8_ ? Layout::kHalf / 2 : Layout::kHalf;
    return memory_ + Layout::kBlocks + (fp8_ ? 2 * Layout::kHalf : 0) + (2 * place + which) * half;
  }

  // Tokens that no row of the tile sees are not read, nor are their page ids: zeros stand for them.
  template <int kPieces, int kBytes>
  TTS_DEVICE void copy_block() {
    const TreeAttentionParams& c = p_.call;
    constexpr int kSteps = (Layout::kTokens * kPieces + kTreeThreads - 1) / kTreeThreads;
    const int pieces = c.head_dim * kBytes / 16;
    const int thread = thread_index_anew();
    unsigned char *k_to = stage(fresh_, 0), *v_to = stage(fresh_, 1);
    const char* k_from = static_cast<const char*>(c.k) + walk_.kv_head() * c.k_head * kBytes;
    const char* v_from = static_cast<const char*>(c.v) + walk_.kv_head() * c.v_head * kBytes;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int i = thread + step * kTreeThreads;
      if (Layout::kTokens * kPieces % kTreeThreads != 0 && i >= Layout::kTokens * kPieces) break;
      const int token = int(uint32_t(i) / kPieces), piece = i - token * kPieces, at = walk_.token() + token;
      const bool valid = piece < pieces && walk_.seen(at);
      int64_t k_offset = 0, v_offset = 0;
      if (valid) {
        const int in_pages = p_.by_page_size.divide(at);
        const int64_t page = walk_.page(in_pages);
        const int64_t slot = at - in_pages * c.page_size;
        k_offset = (page * c.k_page + slot * c.k_token) * kBytes + piece * 16;
        v_offset = (page * c.v_page + slot * c.v_token) * kBytes + piece * 16;
      }
      int to = 16 * i;
      if constexpr (kBytes == 2) to = 16 * swizzled<kPieces>(token, piece);
      copy_async_16(k_to + to, k_from + k_offset, valid);
      copy_async_16(v_to + to, v_from + v_offset, valid);
    }
  }

  const CudaTreeAttentionParams& p_;
  TreeShared& shared_;
  unsigned char* memory_;
  const bool fp8_;
  TreeWalk<Layout::kTokens, WholeBlock> walk_;  // of the block that is copied next
  int fresh_ = 0, oldest_ = 0;
};

}  // namespace tts
