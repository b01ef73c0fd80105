// The arithmetic of an item: scores, online softmax and output of 16, 64 or 128 packed rows.
//
// A packed row's results have the same bits whatever tile it lies in. Each of its scores is one chain of products over
// the head's dimensions; its maximum is exact in any order; each element of its output, and the sum of its weights, is
// one chain of products over all tokens of the chunk, in one order, in one accumulator. The warps that share rows share
// out the tokens of a block for the scores and the columns of the output, so that no chain is cut. Blocks begin at the
// same tokens for every tile, and a block or token that a row does not see adds zeros: it changes nothing. Products of
// warpgroups (tree_hopper.cuh) keep all of this, but for the sum: each of four lanes has that of its own tokens.
#pragma once

#include "tree_stream.cuh"

namespace tts {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kLargest = 3.4028234663852886e38f;

// Stream: where the blocks of KV come from, and whose products are made of them, warps' or warpgroups'.
template <typename T, int kDim, int kRows, typename Stream = TreeStream<kDim>>
class TreeTile {
 public:
  static constexpr int kTileRows = kRows;

  TTS_DEVICE TreeTile(const CudaTreeAttentionParams& p, Stream& stream, unsigned char* memory, const TreeItem& item,
                      const TreeRows& rows)
      : thread_(thread_index_anew()), p_(p), stream_(stream), memory_(memory), item_(item), rows_(rows) {
    const TreeAttentionParams& c = p.call;
    const float scale = c.k_scale == nullptr ? c.scale : c.scale * c.k_scale[item.kv_head];
    // A negative scale goes into the sign of q. A scale of 0 must not turn the -inf of hidden tokens into NaN.
    const bool flip = scale < 0;
    factor_ = flip ? -scale : scale;
    if (factor_ < 1e-30f) factor_ = 1e-30f;  // and not what `max` makes of NaN
    load_queries(flip ? 0x80008000u : 0u);
    if (c.softcap > 0) {
      cap_from_ = factor_ / c.softcap * (2 * kLog2E);
      factor_ = 1;
    } else {
      factor_ *= kLog2E;
    }
  }

  // All blocks of the item; the first one is awaited.
  TTS_DEVICE void attend() {
    if (Stream::kWarpgroups && 64 * int(thread_ / 128) >= item_.count) return skip();
    int start = item_.begin;
    for (int left = item_.blocks;;) {
      stream_.copy();
      stream_.template widen<T>();
      attend_block(start);
      stream_.pop();
      if (--left == 0) break;
      start += kTokens;
      stream_.await();
    }
    if constexpr (Stream::kWarpgroups) gather_sums();
  }

  // What came of it. The row of this thread: `half` 0 or 1.
  static constexpr int kTilesOut = kDim / 8;  // of 8 columns
  TTS_DEVICE int row(int half) const { return 16 * group() + lane() / 4 + 8 * half; }
  TTS_DEVICE float largest(int half) const { return base_[half]; }
  TTS_DEVICE float sum(int half) const { return sum_[2 * half]; }
  // One thread of a row.
  TTS_DEVICE bool speaks() const { return member() == 0 && lane() % 4 == 0; }

  // Calls with (row of the tile, column, four numbers): every element of the output once, four columns of a row to a
  // thread. All lanes call it together.
  template <typename F>
  TTS_DEVICE void for_each_output(F with) const {
    const bool odd = lane() & 1;
    const int row = 16 * group() + lane() / 4 + (odd ? 8 : 0);
#pragma unroll
    for (int i = 0; i < kOut; ++i) {
      const int tile = member() + kMembers * i;
      if (kTilesOut % kMembers != 0 && tile >= kTilesOut) break;
      // Neighbours have two columns each of two rows: they change two of them for two.
      const float a = shuffle_xor(odd ? out_[i][0] : out_[i][2], 1), b = shuffle_xor(odd ? out_[i][1] : out_[i][3], 1);
      const float x[4] = {odd ? a : out_[i][0], odd ? b : out_[i][1], odd ? out_[i][2] : a, odd ? out_[i][3] : b};
      with(row, 8 * tile + lane() % 4 / 2 * 4, x);
    }
  }

 private:
  static constexpr int kTokens = Stream::Layout::kTokens;
  static constexpr int kGroups = kRows / 16;             // of 16 rows
  static constexpr int kMembers = kTreeWarps / kGroups;  // warps that share them
  static constexpr int kTilesIn = kTokens / 8;           // of 8 tokens
  static constexpr int kScores = (kTilesIn + kMembers - 1) / kMembers, kOut = (kTilesOut + kMembers - 1) / kMembers;
  static constexpr int kPairs = (kScores + 1) / 2;
  static constexpr int kDimChunks = kDim / 8, kTokenChunks = kTokens / 8;
  static_assert(kGroups * kMembers == kTreeWarps, "whole groups");

  // A warpgroup that has none of the rows. A loop of its own: as a branch of that of `attend` it cost many moves of
  // registers there.
  TTS_DEVICE void skip() {
    for (int left = item_.blocks;; stream_.await()) {
      stream_.pop();
      if (--left == 0) return;
    }
  }

  TTS_DEVICE int lane() const { return int(thread_ % 32); }
  TTS_DEVICE int group() const { return int(thread_ / 32 / kMembers); }
  TTS_DEVICE int member() const { return int(thread_ / 32 % kMembers); }

  // The warps that share rows meet.
  TTS_DEVICE void sync_members() {
    if (kMembers == kTreeWarps)
      sync_block();
    else
      sync_part(1 + group(), 32 * kMembers);
  }

  // Rows g and g + 8 of the group as the first operand of the products, straight from global memory.
  TTS_DEVICE void load_queries(uint32_t signs) {
    const TreeAttentionParams& c = p_.call;
    const bool words = (reinterpret_cast<uintptr_t>(c.q) & 3) == 0 && ((c.q_row | c.q_head) & 1) == 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int place = row(half);
      const bool valid = place < item_.count;
      const uint16_t* from = static_cast<const uint16_t*>(c.q);
      if (valid) from += rows_.source[place] * c.q_row + rows_.head[place] * c.q_head;
#pragma unroll
      for (int step = 0; step < kDim / 8; ++step) {  // eight columns
        const int column = 8 * step + lane() % 4 * 2;
        uint32_t pair = 0;
        if (valid && 8 * step < c.head_dim) {
          pair = words ? *reinterpret_cast<const uint32_t*>(from + column)
                       : from[column] | uint32_t(from[column + 1]) << 16;
          pair ^= signs;
        }
        q_[step / 2][2 * (step % 2) + half] = pair;
      }
    }
  }

  TTS_DEVICE void attend_block(int start) {
    float score[kScores][4];
    if constexpr (Stream::kWarpgroups)
      stream_.template multiply_keys<T>(score, q_);
    else
      multiply_keys(score);
    if (p_.call.softcap > 0) cap(score);
    if (start < item_.whole_begin || start + kTokens > item_.whole_end) hide(score, start);
    float rescale[2];
    find_largest(score, rescale);
    if (any_in_warp(rescale[0] != 1 || rescale[1] != 1)) {
#pragma unroll
      for (int i = 0; i < kOut; ++i) {
        out_[i][0] *= rescale[0], out_[i][1] *= rescale[0];
        out_[i][2] *= rescale[1], out_[i][3] *= rescale[1];
      }
      sum_[0] *= rescale[0], sum_[1] *= rescale[0];
      sum_[2] *= rescale[1], sum_[3] *= rescale[1];
    }
    // Weights, rounded to T: to registers where a warp has all tokens of its rows, else by way of shared memory.
    uint32_t weight[kPairs][4];  // of two tiles: the first operand of a product, whose layout is that of results
#pragma unroll
    for (int i = 0; i < kScores; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        weight[i / 2][2 * (i % 2) + half] =
            pack2<T>(exp2_fast(fmaf(score[i][2 * half], factor_, -subtract_[half])),
                     exp2_fast(fmaf(score[i][2 * half + 1], factor_, -subtract_[half])));
    if constexpr (kMembers > 1) {
#pragma unroll
      for (int i = 0; i < kScores; ++i) {
        const int tile = member() + kMembers * i;
        if (kTilesIn % kMembers != 0 && tile >= kTilesIn) break;
#pragma unroll
        for (int half = 0; half < 2; ++half)
          weights()[4 * swizzled<kTokenChunks>(row(half), member(), kMembers * i) + lane() % 4] =
              weight[i / 2][2 * (i % 2) + half];
      }
      sync_members();
    }
    if constexpr (Stream::kWarpgroups) {
      sum_up(weight);  // before: until it is waited for, nobody may read what the product reads
      stream_.template begin_values<T>(out_, weight);
      stream_.end_values(out_, weight);
    } else {
      multiply_values(weight);
    }
  }

  // Tiles of 8 tokens: member, member + kMembers, ...
  TTS_DEVICE void multiply_keys(float (&score)[kScores][4]) {
    const unsigned char* keys = stream_.block(0);
#pragma unroll
    for (int i = 0; i < kScores; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) score[i][j] = 0;
#pragma unroll
    for (int step = 0; step < kDim / 32; ++step) {
#pragma unroll
      for (int i = 0; i < kScores; ++i) {
        const int tile = member() + kMembers * i;
        if (kTilesIn % kMembers != 0 && tile >= kTilesIn) break;
        uint32_t b[4];
        load_matrix_x4(b, keys + 16 * swizzled<kDimChunks>(8 * tile + lane() % 8, lane() / 8, 4 * step));
        mma_16816<T>(score[i], q_[2 * step], b[0], b[1]);
        mma_16816<T>(score[i], q_[2 * step + 1], b[2], b[3]);
      }
    }
  }

  // Tiles of 8 columns: member, member + kMembers, ... Every warp that shares rows sums up their weights, by a product
  // with ones, so that the sum is one chain too, and of the weights as they are multiplied.
  TTS_DEVICE void multiply_values(uint32_t (&weight)[kPairs][4]) {
    const unsigned char* values = stream_.block(1);
    const uint32_t ones = pack2<T>(1, 1);
#pragma unroll
    for (int step = 0; step < kTokens / 32; ++step) {
      uint32_t loaded[2][4];
      if constexpr (kMembers > 1) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int place = swizzled<kTokenChunks>(16 * group() + lane() % 16, lane() / 16, 2 * (2 * step + j));
          load_matrix_x4(loaded[j], weights() + 4 * place);
        }
      }
      const uint32_t(*a)[4] = loaded;
      if constexpr (kMembers == 1) a = weight + 2 * step;
      mma_16816<T>(sum_, a[0], ones, ones);
      mma_16816<T>(sum_, a[1], ones, ones);
#pragma unroll
      for (int i = 0; i < kOut; ++i) {
        const int tile = member() + kMembers * i;
        if (kTilesOut % kMembers != 0 && tile >= kTilesOut) break;
        uint32_t b[4];
        load_matrix_x4_transposed(b, values + 16 * swizzled<kDimChunks>(32 * step + lane(), member(), kMembers * i));
        mma_16816<T>(out_[i], a[0], b[0], b[1]);
        mma_16816<T>(out_[i], a[1], b[2], b[3]);
      }
    }
  }

  // Warpgroups: each lane sums up the weights of its own tokens, as they are multiplied, always the same of a row's.
  TTS_DEVICE void sum_up(const uint32_t (&weight)[kPairs][4]) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        sum_[j % 2 * 2] += widen<T>(uint16_t(weight[i][j]));
        sum_[j % 2 * 2 + 1] += widen<T>(uint16_t(weight[i][j] >> 16));
      }
  }
  // Those of the four lanes of a row.
  TTS_DEVICE void gather_sums() {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = sum_[2 * half] + sum_[2 * half + 1];
      sum += shuffle_xor(sum, 1);
      sum += shuffle_xor(sum, 2);
      sum_[2 * half] = sum;
    }
  }

  // To base 2: softcap * tanh(score / softcap), where tanh(x) = 1 - 2 / (exp(2x) + 1), right at both infinities.
  TTS_DEVICE void cap(float (&score)[kScores][4]) {
    const float to = p_.call.softcap * kLog2E;
#pragma unroll
    for (int i = 0; i < kScores; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        score[i][j] = to * fmaf(-2, reciprocal_fast(exp2_fast(score[i][j] * cap_from_) + 1), 1);
  }

  TTS_DEVICE void hide(float (&score)[kScores][4], int start) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int first = rows_.first[row(half)], stop = rows_.stop[row(half)];
#pragma unroll
      for (int i = 0; i < kScores; ++i)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int token = start + 8 * (member() + kMembers * i) + lane() % 4 * 2 + j;
          if (token < first || token >= stop) score[i][2 * half + j] = -kInfinity;
        }
    }
  }

  // The largest score of each row so far, and by how much what was summed before has to shrink.
  TTS_DEVICE void find_largest(const float (&score)[kScores][4], float (&rescale)[2]) {
    float* shared = stream_.shared().largest;  // [kMembers][kRows]
    float found[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      found[half] = -kInfinity;
#pragma unroll
      for (int i = 0; i < kScores; ++i) {
        const int tile = member() + kMembers * i;
        if (kTilesIn % kMembers != 0 && tile >= kTilesIn) break;
        found[half] = max(found[half], max(score[i][2 * half], score[i][2 * half + 1]));
      }
      found[half] = max(found[half], shuffle_xor(found[half], 1));
      found[half] = max(found[half], shuffle_xor(found[half], 2));
      if (kMembers > 1 && lane() % 4 == 0) shared[member() * kRows + row(half)] = found[half];
    }
    if (kMembers > 1) sync_members();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (kMembers > 1) {
#pragma unroll
        for (int other = 0; other < kMembers; ++other)
          found[half] = max(found[half], shared[other * kRows + row(half)]);
      }
      // exp2 of a difference of equal numbers is exactly 1. A row that has seen no token: -inf - 0 stays -inf.
      const float base = max(base_[half], found[half] * factor_);
      subtract_[half] = base == -kInfinity ? 0 : base;
      rescale[half] = exp2_fast(base_[half] - subtract_[half]);
      if (base == base_[half]) rescale[half] = 1;
      base_[half] = base;
    }
  }

  TTS_DEVICE uint32_t* weights() const { return reinterpret_cast<uint32_t*>(memory_ + Stream::Layout::kWeights); }

  const uint32_t thread_;
  const CudaTreeAttentionParams& p_;
  Stream& stream_;
  unsigned char* memory_;
  const TreeItem& item_;
  const TreeRows& rows_;
  float factor_, cap_from_ = 0;  // from products to scores in base 2; with a softcap, to twice its argument in base 2
  uint32_t q_[kDim / 16][4];
  float out_[kOut][4] = {};
  float sum_[4] = {};  // [0] and [1] of row g, [2] and [3] of row g + 8: equal, or to be added up in the end
  float base_[2] = {-kInfinity, -kInfinity}, subtract_[2] = {0, 0};
};

}  // namespace tts
