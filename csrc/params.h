// One plain struct per kernel: a shape beside each pointer, strides in elements, everything else by value.
#pragma once

#include <cstdint>

// Always inlined: files compiled for different instruction sets share these without sharing code.
#ifdef __CUDACC__
#define TTS_SHARED __host__ __device__ __forceinline__
#else
#define TTS_SHARED inline __attribute__((always_inline))
#endif

namespace tts {

enum class DType : int32_t { f32 = 0, f16 = 1, bf16 = 2, f8e4m3 = 3 };

TTS_SHARED int64_t dtype_bytes(DType dtype) { return dtype == DType::f32 ? 4 : dtype == DType::f8e4m3 ? 1 : 2; }

struct TreeAttentionParams {
  const void* q;  // [num_rows, num_heads, head_dim], q_dtype
  int64_t q_row, q_head;
  void* out;  // [num_rows, num_heads, head_dim], q_dtype
  int64_t out_row, out_head;
  float* lse;     // [num_rows, num_heads] contiguous, natural log, or null
  const void* k;  // [pages, page_size, num_kv_heads, head_dim], kv_dtype
  int64_t k_page, k_token, k_head;
  const void* v;  // [pages, page_size, num_kv_heads, head_dim], kv_dtype
  int64_t v_page, v_token, v_head;

  const int32_t*
      nodes;  // [7, num_nodes] depth first: parent, length, position, page begin, own rows, own end, rows end
  const int32_t* pages;  // page ids, node by node
  const int32_t* rows;   // [2, num_rows]: the caller's row, the node that owns it

  const float* sinks;    // [num_heads] or null
  const float* k_scale;  // [num_kv_heads] or null
  const float* v_scale;  // [num_kv_heads] or null

  int32_t num_rows, num_heads, num_kv_heads, head_dim;
  int32_t num_nodes, page_size;
  int32_t window;  // a row sees the last window + 1 positions; -1: all
  bool causal;
  float scale, softcap;  // softcap 0: off
  DType q_dtype, kv_dtype;

  TTS_SHARED int32_t group() const { return num_heads / num_kv_heads; }
  TTS_SHARED int32_t parent(int n) const { return nodes[n]; }
  TTS_SHARED int32_t length(int n) const { return nodes[num_nodes + n]; }
  TTS_SHARED int32_t position(int n) const { return nodes[2 * num_nodes + n]; }
  TTS_SHARED int32_t page_begin(int n) const { return nodes[3 * num_nodes + n]; }
  TTS_SHARED int32_t own_begin(int n) const { return nodes[4 * num_nodes + n]; }
  TTS_SHARED int32_t own_end(int n) const { return nodes[5 * num_nodes + n]; }
  TTS_SHARED int32_t rows_end(int n) const { return nodes[6 * num_nodes + n]; }
};

// n / d for 0 <= n < 2^31, by a multiplication: d is known when the kernel is launched, not when it is compiled.
struct Divider {
  uint32_t divisor, multiplier, shift;

  TTS_SHARED int32_t divide(int32_t n) const {
    return int32_t(uint32_t((uint64_t(uint32_t(n)) * multiplier) >> 31) >> shift);
  }
};

inline Divider make_divider(int32_t d) {
  uint32_t shift = 0;
  while ((int64_t(1) << shift) < d) ++shift;
  return {uint32_t(d), uint32_t(((uint64_t(1) << (31 + shift)) + uint32_t(d) - 1) / uint32_t(d)), shift};
}

// The tree kernel of csrc/cuda. The tables and their lengths: tts_kernels/attention/work.py.
struct CudaTreeAttentionParams {
  TreeAttentionParams call;
  const int32_t* items;        // [num_items, 4]: node, first packed row, chunk, tile
  const int32_t* path_chunks;  // [call.num_nodes]
  const int32_t* first_state;  // [call.num_rows]
  const int32_t* live_items;   // [1] items that mean something; num_items is how many there is room for
  float* states;               // [states, num_heads, head_dim], not divided
  float* sums;                 // [states, num_heads, 2]: largest score in base 2, sum of weights
  uint32_t* arrivals;          // [call.num_rows, num_heads], zero between launches
  int32_t num_items;
  int32_t wide_rows, min_chunk, max_chunks;  // the rule of chunks
  int32_t num_stages;                        // blocks of KV in shared memory, 2 to 4
  int32_t num_pages;                         // of the caches
  bool warpgroups;                           // the kernel of csrc/cuda/hopper
  Divider by_group, by_page_size;
};

// How the copy engine of sm_90 reads a tensor: cuTensorMapEncodeTiled makes it, csrc/cuda/tensor_map.h asks for it.
struct alignas(128) TensorMap {
  unsigned char opaque[128];
};

// The tree kernel of csrc/cuda/hopper. Boxes are [1 page, box_tokens, 1 KV head, 64 elements].
struct HopperTreeParams {
  CudaTreeAttentionParams tree;
  int32_t box_tokens;  // 0: there are no maps, threads copy
  TensorMap k, v;      // [pages, page_size, num_kv_heads, head_dim]
};

// The work list of a tree, made on the device. Its parts lie one behind the other: tts_kernels/attention/work.py.
struct WorkListParams {
  const int32_t* nodes;  // [7, num_nodes]
  const int32_t* grows;  // [num_nodes]
  int32_t* items;        // [num_items, 4], 16-byte aligned
  int32_t* path_chunks;  // [num_nodes]
  int32_t* first_state;  // [num_rows]
  int32_t* live_items;   // [1]
  int32_t num_nodes, num_rows, num_items;
  int32_t group;
  int32_t spare;  // tokens by which growing nodes may come to be longer
  int32_t wide_rows, narrow_rows, tall_rows, min_chunk, max_chunks;  // configs.TreeConfig
};

struct AppendKVParams {
  const void* k;  // [num_rows, num_kv_heads, head_dim]
  int64_t k_row, k_head;
  const void* v;  // [num_rows, num_kv_heads, head_dim]
  int64_t v_row, v_head;
  void* k_cache;  // [pages, page_size, num_kv_heads, head_dim]
  int64_t k_page, k_token, k_cache_head;
  void* v_cache;  // [pages, page_size, num_kv_heads, head_dim]
  int64_t v_page, v_token, v_cache_head;
  const int64_t* slots;  // [num_rows] page * page_size + offset; -1 skips the row
  int64_t num_rows, num_kv_heads, page_size;
  int64_t row_bytes;  // head_dim * element size
  int64_t element_bytes;
};

struct MergeStatesParams {
  const void* out;    // [num_states, count, head_dim] contiguous, dtype; count = rows * heads
  const float* lse;   // [num_states, count] contiguous, natural log
  void* merged_out;   // [count, head_dim] contiguous, dtype
  float* merged_lse;  // [count]
  int64_t num_states, count, head_dim;
  DType dtype;
};

struct Matrix {  // [rows, columns] with dense rows
  const void* data;
  int64_t row;
  DType dtype;
};

enum class Activation : int32_t { none = 0, relu = 1, gelu = 2 };

struct ScoreLogitsParams {
  Matrix hidden;             // [tokens, dim]
  const int64_t* positions;  // [num_rows] rows of hidden
  const float* norm_weight;  // [dim], or null: no norm
  float norm_eps;
  Matrix w1;        // [width, dim]; data null: no hidden layer, and width = dim
  const float* b1;  // [width] or null
  Activation activation;
  Matrix w2;        // [columns, width]
  const float* b2;  // [columns] or null
  float* logits;    // [num_rows, columns] contiguous
  int64_t num_rows, dim, width, columns;
};

struct TokenLogprobsParams {
  Matrix hidden;           // [num_rows, dim]
  Matrix weight;           // [vocab, dim]
  const float* bias;       // [vocab] or null
  const int64_t* targets;  // [num_rows]
  float* logprobs;         // [num_rows]
  int64_t num_rows, dim, vocab;
};

enum class ScoreKind : int32_t { softmax = 0, sigmoid = 1, identity = 2 };

struct ReduceScoresParams {
  const float* logits;     // [num_rows, columns] contiguous
  const int64_t* offsets;  // [num_candidates + 1] into the rows
  float* margin;           // [num_rows]
  float* prob;             // [num_rows]
  float* stats;            // [6, num_candidates]: last, min, prod, mean, max, log_prod
  int32_t* count;          // [num_candidates]
  int64_t num_rows, columns, num_candidates, positive;
  ScoreKind kind;
};

enum class SelectMethod : int32_t { top_k = 0, weighted_vote = 1, majority = 2 };

struct SelectParams {
  const float* scores;     // [num_candidates]
  const int64_t* groups;   // [num_groups + 1] into the candidates
  const int64_t* answers;  // [num_candidates], -1: none; or null
  int64_t* indices;        // [num_groups, k]
  float* selected;         // [num_groups, k]
  int64_t num_groups, k;
  SelectMethod method;
};

// What the CUDA kernels of the scoring ops take besides.

struct Vector {      // dense
  const void* data;  // null: none
  DType dtype;
};

// Rows for the product of a head's first layer, made by torch in blocks of `block_rows` rows: hidden[positions[r]],
// normalised where norm_weight is not null, as fp32 or half precision; as bfloat16 in up to three parts whose sum it is.
// Block b, part j, row i lies at out[((b * num_parts + j) * block_rows + i) * dim]; rows from num_rows on are zeros.
struct GatherRowsParams {
  Matrix hidden;             // [tokens, dim]
  const int64_t* positions;  // [num_rows]
  Vector norm_weight;        // [dim]
  float norm_eps;
  void* out;  // [blocks, num_parts, block_rows, dim] contiguous, out_dtype
  DType out_dtype;
  int64_t num_rows, dim, block_rows, num_parts;
};

// What the head's last layer multiplies, or where the logits are there already.
enum class RowsOf : int32_t { hidden = 0, products = 1, logits = 2 };

struct CudaSelectParams {
  SelectParams choice;  // groups null: all candidates are one group
  int64_t num_candidates;
  int64_t shared_candidates;  // groups of up to so many are sorted in shared memory
  void* scratch;              // 24 * num_candidates bytes, 16-byte aligned, or null: no group is larger than that
};

// One launch from rows to the chosen candidates. A block owns 1 << tile_shift rows of all candidates' in their order.
struct StepScoresParams {
  RowsOf rows_of;
  Matrix hidden;             // hidden: [tokens, width]
  const int64_t* positions;  // hidden: [num_rows]
  Vector norm_weight;        // hidden: [width]
  float norm_eps;
  const float* products;  // products: [blocks, num_parts, block_rows, width] contiguous, parts to be added up
  int64_t num_parts, block_rows;
  Vector b1;  // products: [width]
  Activation activation;
  Matrix w2;  // [columns, width]
  Vector b2;  // [columns]
  int64_t width;
  float* logits;  // [num_rows, columns] scratch, or null: a tile's fit into shared memory
  ReduceScoresParams reduce;
  CudaSelectParams select;  // num_groups 0: nothing is selected
  int32_t tile_shift;
  uint32_t* counters;  // [num_candidates + num_groups], zero before and after
};

// A rotation of the first rotary_dim dimensions of keys and queries by their positions.
struct RopeParams {
  Matrix cos_sin;            // [max_position, rotary_dim]: cosines, then sines; data null: none
  const int64_t* positions;  // [num_rows]
  int64_t rotary_dim;
  bool is_neox;   // pairs (i, i + rotary_dim / 2), else (2 i, 2 i + 1)
  const void* q;  // [num_rows, num_heads, head_dim], dtype of k; or null
  int64_t q_row, q_head;
  void* q_out;  // [num_rows, num_heads, head_dim], dtype of k
  int64_t q_out_row, q_out_head;
  int64_t num_heads;
};

struct CudaAppendKVParams {
  AppendKVParams rows;  // row_bytes and element_bytes are the cache's
  DType dtype, cache_dtype;
  RopeParams rope;
};

struct CudaMergeStatesParams {
  MergeStatesParams states;  // out and lse with the strides below
  int64_t out_state, out_row, out_head;
  int64_t lse_state, lse_row, lse_head;
  int64_t num_heads;
};

}  // namespace tts
