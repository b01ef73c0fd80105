// The blocks of KV that a block of threads works through, item after item, copied ahead of the arithmetic. The copies
// run across the borders of items: while one item ends, the first blocks of the next one are on their way.
#pragma once

#include "tree_item.cuh"

namespace tts {

template <int kDim>
class TreeStream {
 public:
  using Layout = TreeLayout<kDim>;

  TTS_DEVICE TreeStream(const CudaTreeAttentionParams& p, unsigned char* memory)
      : p_(p),
        shared_(*reinterpret_cast<TreeShared*>(memory)),
        memory_(memory),
        fp8_(p.call.kv_dtype == DType::f8e4m3),
        work_(block_index()),
        work_end_(min(p.num_items, *p.live_items) * p.call.num_kv_heads) {
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
    if (blocks_ == 0 && work_ < work_end_) enter();
    if (thread_index_anew() == 0) shared_.item_of[fresh_] = blocks_ > 0 ? place_ : -1;
    if (blocks_ > 0) {
      if (fp8_)
        copy_block<Layout::kChunks / 2, 1>();
      else
        copy_block<Layout::kChunks, 2>();
      token_ += Layout::kTokens;
      --blocks_;
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
    const char* k_from = static_cast<const char*>(c.k) + kv_head_ * c.k_head * kBytes;
    const char* v_from = static_cast<const char*>(c.v) + kv_head_ * c.v_head * kBytes;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int i = thread + step * kTreeThreads;
      if (Layout::kTokens * kPieces % kTreeThreads != 0 && i >= Layout::kTokens * kPieces) break;
      const int token = int(uint32_t(i) / kPieces), piece = i - token * kPieces, at = token_ + token;
      const bool valid = at >= seen_begin_ && at < seen_end_ && piece < pieces;
      int64_t k_offset = 0, v_offset = 0;
      if (valid) {
        const int in_pages = p_.by_page_size.divide(at);
        const int64_t page = pages_[in_pages];
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

  // The next item that has tokens and rows becomes the one that is copied. Items whose chunk is not there yet are many
  // where a node may grow far: each lane looks at one.
  TTS_DEVICE void enter() {
    const TreeAttentionParams& c = p_.call;
    const int grid = block_count(), lane = thread_index_anew() & 31;
    int found = work_end_;
    while (work_ < work_end_) {
      const int candidate = work_ + lane * grid;
      bool present = false;
      if (candidate < work_end_) {
        const int32_t* item = p_.items + 4 * (candidate / c.num_kv_heads);
        const int node = item[0], length = c.length(node);
        present = item[2] < ceil_div(length, chunk_tokens(p_, node, length)) &&
                  item[1] < (c.rows_end(node) - c.own_begin(node)) * int(p_.by_group.divisor);
      }
      const uint32_t which = ballot(present);
      found = work_ + trailing_zeros(which) * grid;
      work_ = which ? found + grid : found;
      if (which) break;
    }
    if (found < work_end_) enter(found / c.num_kv_heads, found % c.num_kv_heads);
  }

  TTS_DEVICE void enter(int index, int kv_head) {
    const TreeAttentionParams& c = p_.call;
    const int32_t* words = p_.items + 4 * index;
    const int node = words[0], chunk = words[2], length = c.length(node);
    const int tokens = chunk_tokens(p_, node, length);
    const int chunk_begin = chunk * tokens, chunk_end = min(chunk_begin + tokens, length);
    const int own_begin = c.own_begin(node), own_end = c.own_end(node), group = int(p_.by_group.divisor);
    const int above = p_.path_chunks[node] + chunk;

    TreeItem item;
    item.rows = words[3] == 0 ? 16 : words[3] == 1 ? 64 : 128;
    item.first = words[1];
    item.count = min(item.rows, (c.rows_end(node) - own_begin) * group - item.first);
    item.own_begin = own_begin;
    item.kv_head = kv_head;
    item.state = above;

    // Own row j of c rows sees the first length - c + j + 1 tokens of its node; rows further down see all of it.
    const int unseen = length - own_end + 1;
    const auto stop_of = [&](int row) { return c.causal ? min(length, unseen + row) : length; };
    place_ = (place_ + 1) % kMaxStages;
    TreeRows& rows = shared_.rows[place_];
    int low = INT32_MAX, high = 0;
    const int place = thread_index_anew();
    if (place < item.rows) {
      int first = 0, stop = 0, source = 0, head = 0, state = 0, arrivals = 0;
      if (place < item.count) {
        const int below = p_.by_group.divide(item.first + place), row = own_begin + below;
        const int owner = c.rows[c.num_rows + row];
        source = c.rows[row];
        head = kv_head * group + item.first + place - below * group;
        state = p_.first_state[row] + above;
        arrivals = count_states(p_, owner);
        stop = stop_of(row);
        if (c.window >= 0) {
          // The inner maximum first: positions may be negative, and the window as large as int32 goes.
          const int position = c.position(owner) + c.length(owner) - c.own_end(owner) + row;
          first = max(0, max(position - c.position(node), 0) - c.window);
        }
        low = first, high = first;
      }
      rows.first[place] = first, rows.stop[place] = stop;
      rows.source[place] = source, rows.head[place] = head, rows.state[place] = state, rows.arrivals[place] = arrivals;
    }
    if (c.window >= 0)
      block_extremes(shared_, low, high);
    else
      low = 0;

    const int first_row = own_begin + p_.by_group.divide(item.first);
    const int last_row = own_begin + p_.by_group.divide(item.first + item.count - 1);
    low = min(max(low, chunk_begin), chunk_end);
    seen_begin_ = low;
    seen_end_ = min(chunk_end, stop_of(last_row));
    token_ = chunk_begin + (low - chunk_begin) / Layout::kTokens * Layout::kTokens;
    // The block of an item of which no row sees a token has tokens that there are not.
    if (seen_end_ <= low) token_ = seen_end_ = -Layout::kTokens;
    blocks_ = max(ceil_div(seen_end_ - token_, Layout::kTokens), 1);
    pages_ = c.pages + c.page_begin(node);
    kv_head_ = kv_head;

    item.begin = token_;
    item.blocks = blocks_;
    item.whole_begin = c.window >= 0 ? high : 0;
    item.whole_end = stop_of(first_row);
    if (place == 0) shared_.item[place_] = item;
  }

  const CudaTreeAttentionParams& p_;
  TreeShared& shared_;
  unsigned char* memory_;
  const bool fp8_;
  int work_, work_end_;  // the next (item, KV head) of this block of threads
  int fresh_ = 0, oldest_ = 0;
  // The item that is copied.
  int place_ = 0, blocks_ = 0, token_ = 0, seen_begin_ = 0, seen_end_ = 0;
  int64_t kv_head_ = 0;
  const int32_t* pages_ = nullptr;
};

}  // namespace tts
