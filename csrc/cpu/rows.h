// What both kinds of item share: which tokens each packed row sees, where a token lies in the cache, the prefetch of
// what comes next, and the end of a row: folding its states root to leaf and writing the result.
#pragma once

#include "online_softmax.h"
#include "work.h"

namespace {

using tts::States;
using tts::TreeAttentionParams;
using tts::WorkItem;

TTS_INLINE int round_up(int x, int to) { return (x + to - 1) / to * to; }
TTS_INLINE int min_(int a, int b) { return a < b ? a : b; }
TTS_INLINE int max_(int a, int b) { return a > b ? a : b; }

// Tokens [first, last) of `node` that depth-first row `row` sees.
TTS_INLINE void visible(const TreeAttentionParams& p, int node, int row, int32_t* first, int32_t* last) {
  const int owner = p.rows[p.num_rows + row];
  const int own = p.own_end(owner) - p.own_begin(owner);
  const int end_in_owner = p.length(owner) - own + (row - p.own_begin(owner)) + 1;
  const int length = p.length(node);
  *last = owner == node && p.causal ? max_(0, min_(end_in_owner, length)) : length;
  const int64_t position = int64_t(p.position(owner)) + end_in_owner - 1;
  const int64_t oldest = position - p.window - p.position(node);
  *first = p.window < 0 || oldest < 0 ? 0 : oldest > length ? length : int32_t(oldest);
  if (*first > *last) *first = *last;
}

struct Sights {  // of all packed rows of an item
  int32_t* first;
  int32_t* last;
  int32_t widest_first, widest_last;
};

// Fills first/last for packed rows [0, count); lanes up to `padded` see nothing.
TTS_INLINE void fill_sights(const TreeAttentionParams& p, const WorkItem& item, int padded, Sights* s) {
  const int group = p.group();
  int at = 0;
  s->widest_first = p.length(item.node);
  s->widest_last = 0;
  for (int row = item.row_begin; row < item.row_end; ++row) {
    int32_t first, last;
    visible(p, item.node, row, &first, &last);
    if (first < last) {
      s->widest_first = min_(s->widest_first, first);
      s->widest_last = max_(s->widest_last, last);
    }
    for (int g = 0; g < group; ++g, ++at) {
      s->first[at] = first;
      s->last[at] = last;
    }
  }
  for (; at < padded; ++at) s->first[at] = s->last[at] = 0;
}

struct TileSight {
  int first, last;          // tokens that some lane sees
  int all_first, all_last;  // tokens that every lane in use sees
};

TTS_INLINE TileSight tile_sight(const Sights& s, int lane, int count) {
  TileSight t = {0x7fffffff, 0, 0, 0x7fffffff};
  for (int i = lane; i < lane + count; ++i) {
    if (s.first[i] < s.last[i]) {
      t.first = min_(t.first, s.first[i]);
      t.last = max_(t.last, s.last[i]);
    }
    t.all_first = max_(t.all_first, s.first[i]);
    t.all_last = min_(t.all_last, s.last[i]);
  }
  return t;
}

// Where a node's tokens lie in one cache, token by token, without a division per token. Element indices, of KV head 0.
struct Cursor {
  const int32_t* page;
  int32_t offset, page_size;
  int64_t page_stride, token_stride;

  TTS_INLINE int64_t element() const { return int64_t(*page) * page_stride + offset * token_stride; }
  TTS_INLINE void next() {
    if (++offset == page_size) {
      offset = 0;
      ++page;
    }
  }
};

TTS_INLINE Cursor k_cursor(const TreeAttentionParams& p, int node, int token) {
  return {p.pages + p.page_begin(node) + token / p.page_size, token % p.page_size, p.page_size, p.k_page, p.k_token};
}

TTS_INLINE Cursor v_cursor(const TreeAttentionParams& p, int node, int token) {
  return {p.pages + p.page_begin(node) + token / p.page_size, token % p.page_size, p.page_size, p.v_page, p.v_token};
}

// Asks for the cache lines of the tokens that come next, a row of one head at a time, in the order of memory, so that
// reading the next block overlaps with computing this one.
struct Prefetcher {
  const char *k_base, *v_base;
  int64_t element_bytes, row_bytes, k_head, v_head;
  Cursor k, v;
  int tokens, heads, head;

  TTS_INLINE explicit Prefetcher(const TreeAttentionParams& p)
      : element_bytes(tts::dtype_bytes(p.kv_dtype)),
        row_bytes(element_bytes * p.head_dim),
        k_head(p.k_head * element_bytes),
        v_head(p.v_head * element_bytes),
        k(),
        v(),
        tokens(0),
        heads(0),
        head(0) {}

  TTS_INLINE void aim(const TreeAttentionParams& p, const WorkItem& item, int begin, int end) {
    tokens = end > begin ? end - begin : 0;
    if (tokens == 0) return;
    k_base = (const char*)p.k + item.head_begin * k_head;
    v_base = (const char*)p.v + item.head_begin * v_head;
    heads = item.head_end - item.head_begin;
    head = 0;
    k = k_cursor(p, item.node, begin);
    v = v_cursor(p, item.node, begin);
  }
  TTS_INLINE void step(int rows) {
    for (; rows > 0 && tokens > 0; --rows) {
      const char* k_row = k_base + k.element() * element_bytes + head * k_head;
      const char* v_row = v_base + v.element() * element_bytes + head * v_head;
      for (int64_t b = 0; b < row_bytes; b += 64) __builtin_prefetch(k_row + b, 0, 2);
      for (int64_t b = 0; b < row_bytes; b += 64) __builtin_prefetch(v_row + b, 0, 2);
      if (++head < heads) continue;
      head = 0;
      if (--tokens > 0) {
        k.next();
        v.next();
      }
    }
  }
};

// Scale from dot products to logits. With a softcap the base stays e until the cap is applied.
TTS_INLINE float logit_factor(const TreeAttentionParams& p, int kv_head) {
  float factor = p.scale * (p.k_scale ? p.k_scale[kv_head] : 1.0f);
  return p.softcap > 0.0f ? factor : factor * kLog2e;
}

// The end of a row: fold the states of its chain, root first, chunk by chunk; let the sink in once; divide; write.
void finish_row(const TreeAttentionParams& p, const States& states, int row, void* scratch) {
  const int dim = tts::padded_head_dim(p.head_dim), columns = round_up(p.head_dim, VW), group = p.group();
  float* chain_o = (float*)scratch;
  float* node_o = chain_o + dim;
  int32_t* chain = (int32_t*)(node_o + dim);  // [num_nodes]
  int depth = 0;
  for (int node = p.rows[p.num_rows + row]; node >= 0; node = p.parent(node)) chain[depth++] = node;
  const int64_t caller_row = p.rows[row];
  for (int head = 0; head < p.num_heads; ++head) {
    const int kv_head = head / group;
    float m = kMinusInf, l = 0.0f;
    for (int i = depth - 1; i >= 0; --i) {
      const int node = chain[i], slots = states.nodes[node].slots;
      if (slots == 0) continue;
      int64_t at = tts::state_index(p, states, node, 0, kv_head, row) + head % group;
      if (slots == 1) {
        fold_state(&m, &l, chain_o, states.m[at], states.l[at], states.o + at * dim, columns);
        continue;
      }
      float node_m = kMinusInf, node_l = 0.0f;
      for (int slot = 0; slot < slots; ++slot) {
        at = tts::state_index(p, states, node, slot, kv_head, row) + head % group;
        fold_state(&node_m, &node_l, node_o, states.m[at], states.l[at], states.o + at * dim, columns);
      }
      fold_state(&m, &l, chain_o, node_m, node_l, node_o, columns);
    }
    const bool empty = l == 0.0f;
    if (p.lse) p.lse[caller_row * p.num_heads + head] = empty ? kMinusInf : (m + __builtin_log2f(l)) / kLog2e;
    float weight = 0.0f;
    if (!empty) {
      float top = m, total = l;
      if (p.sinks) {
        const float scaled = p.sinks[head] * kLog2e, largest = 3.4028235e38f;
        const float sink = scaled > largest && p.sinks[head] <= largest ? largest : scaled;  // finite stays finite
        top = m > sink ? m : sink;
        total = l * __builtin_exp2f(m - top) + __builtin_exp2f(sink - top);
      }
      weight = __builtin_exp2f(m - top) / total * (p.v_scale ? p.v_scale[kv_head] : 1.0f);
    }
    const int64_t out = caller_row * p.out_row + head * p.out_head;
    int d = 0;
    for (; d + VW <= p.head_dim; d += VW)
      store_as(p.q_dtype, p.out, out + d, empty ? splat(0.0f) : load(chain_o + d) * splat(weight));
    if (d < p.head_dim)
      store_tail_as(p.q_dtype, p.out, out + d, empty ? splat(0.0f) : load(chain_o + d) * splat(weight), p.head_dim - d);
  }
}

// Entries [begin, end) of the flattened [rows * heads]: softmax-weighted mean over the states, in the order given.
void merge_states(const tts::MergeStatesParams& p, int64_t begin, int64_t end) {
  float o[tts::kMaxHeadDim] __attribute__((aligned(64)));
  float row[tts::kMaxHeadDim] __attribute__((aligned(64)));
  const int dim = int(p.head_dim), padded = round_up(dim, VW);
  for (int64_t i = begin; i < end; ++i) {
    float m = kMinusInf, l = 0.0f;
    for (int64_t s = 0; s < p.num_states; ++s) {
      const float lse = p.lse[s * p.count + i] * kLog2e;
      if (lse == kMinusInf) continue;
      widen_row(p.dtype, row, p.out, (s * p.count + i) * dim, dim);
      fold_state(&m, &l, o, lse, 1.0f, row, padded);
    }
    p.merged_lse[i] = l == 0.0f ? kMinusInf : (m + __builtin_log2f(l)) / kLog2e;
    int d = 0;
    for (; d + VW <= dim; d += VW)
      store_as(p.dtype, p.merged_out, i * dim + d, l == 0.0f ? splat(0.0f) : load(o + d) * splat(1.0f / l));
    if (d < dim)
      store_tail_as(p.dtype, p.merged_out, i * dim + d, l == 0.0f ? splat(0.0f) : load(o + d) * splat(1.0f / l),
                    dim - d);
  }
}

}  // namespace
