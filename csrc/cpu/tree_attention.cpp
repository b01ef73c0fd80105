// The scheduler: cuts the tree into items, lets the threads take them longest first, then finishes the rows.
#include "ops.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "arena.h"
#include "code_path.h"

namespace tts {
namespace {

// The cost of a token beside its rows' arithmetic: reading and widening its K and V.
constexpr float kTokenCost = 16;
constexpr int kItemsPerThread = 4;    // enough for the longest-first order to even out
constexpr int kMinRowsPerPart = 128;  // packed rows that repay widening the block once more
constexpr float kSerialCost = 20000;  // below, waking threads costs more than it saves

struct Schedule {
  std::vector<WorkItem> items;
  std::vector<NodeStates> nodes;
  int64_t num_states = 0;
  float cost = 0;
};

float item_cost(int64_t tokens, int64_t packed_rows) { return float(tokens) * (kTokenCost + float(packed_rows)); }

void make_schedule(const TreeAttentionParams& p, int threads, Schedule* s) {
  const int group = p.group();
  s->items.clear();
  s->nodes.assign(p.num_nodes, NodeStates{0, 0});
  s->num_states = 0;
  s->cost = 0;
  for (int n = 0; n < p.num_nodes; ++n) {
    const int rows = p.rows_end(n) - p.own_begin(n);
    if (rows > 0) s->cost += p.num_kv_heads * item_cost(p.length(n), int64_t(rows) * group);
  }
  const float share = s->cost / float(threads * kItemsPerThread);
  const int max_rows = std::max(1, kMaxItemLanes / group);

  for (int n = 0; n < p.num_nodes; ++n) {
    const int rows = p.rows_end(n) - p.own_begin(n), length = p.length(n);
    if (rows <= 0 || length <= 0) continue;
    const float cost = item_cost(length, int64_t(rows) * group);  // per KV head
    // Rows first, as far as a part stays wide enough; then chunks, whose states are folded at the end.
    int parts = std::min<int>(int(cost / share) + 1, rows * group / kMinRowsPerPart);
    parts = std::max(parts, (rows + max_rows - 1) / max_rows);
    parts = std::max(parts, 1);
    const int rows_per_part = (rows + parts - 1) / parts;
    const int chunks = num_chunks(length);
    int heads = heads_per_item(p.head_dim, p.num_kv_heads, int64_t(rows_per_part) * group);
    const bool apart = threads > 1 && chunks > 1 && heads * cost / float(parts) > share;
    // Few items: let the heads go to different threads after all.
    const float cost_per_head = cost / float(parts) / float(apart ? chunks : 1);
    if (threads > 1) heads = std::max(1, int(std::min(float(heads), share / cost_per_head)));
    s->nodes[n] = {s->num_states, apart ? chunks : 1};
    s->num_states += int64_t(s->nodes[n].slots) * p.num_kv_heads * rows * group;

    for (int head = 0; head < p.num_kv_heads; head += heads)
      for (int row = p.own_begin(n); row < p.rows_end(n); row += rows_per_part) {
        const int row_end = std::min(row + rows_per_part, int(p.rows_end(n)));
        const int head_end = std::min(head + heads, int(p.num_kv_heads));
        const int64_t packed = int64_t(row_end - row) * group;
        for (int slot = 0; slot < s->nodes[n].slots; ++slot) {
          const int first = apart ? slot : 0, last = apart ? slot + 1 : chunks;
          const int64_t tokens =
              std::min<int64_t>(length, int64_t(last) * chunk_tokens(length)) - int64_t(first) * chunk_tokens(length);
          s->items.push_back(
              {n, head, head_end, row, row_end, first, last, slot, (head_end - head) * item_cost(tokens, packed)});
        }
      }
  }
  std::stable_sort(s->items.begin(), s->items.end(),
                   [](const WorkItem& a, const WorkItem& b) { return a.cost > b.cost; });
}

int threads_worth_waking(const Schedule& s, int threads) { return s.cost < kSerialCost ? 1 : threads; }

}  // namespace

void run_tree_attention(const TreeAttentionParams& p, int threads) {
  if (p.num_rows == 0) return;
  const CodePath& path = active_code_path();
  thread_local Schedule schedule;
  thread_local Arena arena;
  make_schedule(p, std::max(threads, 1), &schedule);
  threads = threads_worth_waking(schedule, threads);

  const int64_t dim = padded_head_dim(p.head_dim), count = schedule.num_states;
  float* base = reinterpret_cast<float*>(arena.at_least((count * (dim + 2) + 64) * int64_t(sizeof(float))));
  const States states = {base, base + count * dim, base + count * (dim + 1), schedule.nodes.data()};
  const std::vector<WorkItem>& items = schedule.items;
  const int64_t scratch_bytes = path.scratch_bytes(p);
  const int num_items = int(items.size());
  std::atomic<int> next_item{0}, next_row{0};
  std::exception_ptr failure;

#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    thread_local Arena scratch_arena;
    char* scratch = nullptr;
    try {
      scratch = scratch_arena.at_least(scratch_bytes);
    } catch (...) {
#pragma omp critical(tts_failure)
      failure = std::current_exception();
    }
    if (scratch != nullptr) {
      path.enter();
      for (int i = next_item.fetch_add(1, std::memory_order_relaxed); i < num_items;) {
        const int then = next_item.fetch_add(1, std::memory_order_relaxed);
        path.run_item(p, states, items[i], then < num_items ? &items[then] : nullptr, scratch);
        i = then;
      }
      path.leave();
    }
#pragma omp barrier
    if (!failure)
      for (int row; (row = next_row.fetch_add(1, std::memory_order_relaxed)) < p.num_rows;)
        path.finish_row(p, states, row, scratch);
  }
  if (failure) std::rethrow_exception(failure);
}

TreeWork count_tree_attention(const TreeAttentionParams& p, int threads) {
  if (p.num_rows == 0) return {1, 0, {}};
  Schedule schedule;
  make_schedule(p, std::max(threads, 1), &schedule);
  TreeWork work = {threads_worth_waking(schedule, std::max(threads, 1)), schedule.num_states, {}};
  for (const WorkItem& item : schedule.items) {
    const int chunk = chunk_tokens(p.length(item.node));
    const int tokens = std::min(p.length(item.node), item.chunk_end * chunk) - item.chunk_begin * chunk;
    work.items.push_back({item.head_end - item.head_begin, (item.row_end - item.row_begin) * p.group(), tokens});
  }
  return work;
}

void run_merge_states(const MergeStatesParams& p, int threads) {
  const CodePath& path = active_code_path();
  const int64_t share = 256, parts = (p.count + share - 1) / share;
#pragma omp parallel for num_threads(threads) if (threads > 1 && parts > 1)
  for (int64_t part = 0; part < parts; ++part)
    path.merge_states(p, part * share, std::min(p.count, (part + 1) * share));
}

}  // namespace tts
