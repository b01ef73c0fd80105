// The items that a block of threads takes, one after the other, and the blocks of KV of each.
#pragma once

#include "tree_item.cuh"

namespace tts {

// For all threads of a crew, who fill what is said of each item in shared memory.
template <int kTokens, typename Crew>
class TreeWalk {
 public:
  TTS_DEVICE TreeWalk(const CudaTreeAttentionParams& p, TreeShared& shared)
      : p_(p),
        shared_(shared),
        work_(block_index()),
        work_end_(min(p.num_items, *p.live_items) * p.call.num_kv_heads) {}

  // Whether there is a block; the first one of an item begins the item.
  TTS_DEVICE bool find() {
    if (blocks_ == 0 && work_ < work_end_) enter();
    return blocks_ > 0;
  }
  TTS_DEVICE void pass() {
    token_ += kTokens;
    --blocks_;
  }

  // Of the block: its item's place in shared memory, its first token.
  TTS_DEVICE int place() const { return place_; }
  TTS_DEVICE int token() const { return token_; }
  TTS_DEVICE int64_t kv_head() const { return kv_head_; }
  // Whether any row of the tile sees the token; pages are known of those alone.
  TTS_DEVICE bool seen(int token) const { return token >= seen_begin_ && token < seen_end_; }
  TTS_DEVICE bool all_seen() const { return token_ >= seen_begin_ && token_ + kTokens <= seen_end_; }
  TTS_DEVICE int page(int in_pages) const { return pages_[in_pages]; }

 private:
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
    const int place = Crew::thread();
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
      crew_extremes<Crew>(shared_, low, high);
    else
      low = 0;

    const int first_row = own_begin + p_.by_group.divide(item.first);
    const int last_row = own_begin + p_.by_group.divide(item.first + item.count - 1);
    low = min(max(low, chunk_begin), chunk_end);
    seen_begin_ = low;
    seen_end_ = min(chunk_end, stop_of(last_row));
    token_ = chunk_begin + (low - chunk_begin) / kTokens * kTokens;
    // The block of an item of which no row sees a token has tokens that there are not.
    if (seen_end_ <= low) token_ = seen_end_ = -kTokens;
    blocks_ = max(ceil_div(seen_end_ - token_, kTokens), 1);
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
  int work_, work_end_;  // the next (item, KV head) of this block of threads
  // The item whose blocks these are.
  int place_ = 0, blocks_ = 0, token_ = 0, seen_begin_ = 0, seen_end_ = 0;
  int64_t kv_head_ = 0;
  const int32_t* pages_ = nullptr;
};

}  // namespace tts
