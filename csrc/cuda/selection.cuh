// The candidates that a group of them selects, by one block. What comes first is the least of 64-bit keys, the score
// (its order as an integer, upside down) above the index, so ties go to the lower index. A few are found by passes over
// the keys; votes, and long lists, are sorted.
#pragma once

#include "../params.h"
#include "device.cuh"

namespace tts {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr uint64_t kNoKey = ~uint64_t(0);  // behind every other
constexpr int64_t kMostPasses = 8;         // longer lists are sorted
constexpr float kNan = __builtin_nanf("");

TTS_DEVICE uint64_t key_of(float score, int64_t index) {
  if (score != score) return kNoKey;
  const uint32_t bits = bits_of(score + 0.0f);  // -0 is 0
  const uint32_t ascending = bits >> 31 ? ~bits : bits | 0x80000000u;
  return uint64_t(~ascending) << 32 | uint32_t(index);
}

TTS_DEVICE float score_of(uint64_t key) {
  const uint32_t ascending = ~uint32_t(key >> 32);
  return float_of(ascending >> 31 ? ascending & 0x7fffffffu : ~ascending);
}

// The least of all threads' keys, for all of them. `least` [kWarps] is the block's shared memory.
TTS_DEVICE uint64_t least_of_block(uint64_t key, uint64_t* least) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) key = min(key, uint64_t(shuffle_xor(int64_t(key), mask)));
  sync_block();  // the one before has been read
  if (lane_index() == 0) least[warp_index()] = key;
  sync_block();
  for (int w = 0; w < kWarps; ++w) key = min(key, least[w]);
  return key;
}

// Sorts by (key, id), which are all different. A bitonic sort in which each step puts the lesser one first, so that
// what a power of two has beyond `count` may be thought of as infinite and left alone.
TTS_DEVICE void sort_block(uint64_t* key, int32_t* id, int64_t count) {
  const auto order = [&](int64_t a, int64_t b) {
    if (b >= count) return;
    const uint64_t key_a = key[a], key_b = key[b];
    const int32_t id_a = id[a], id_b = id[b];
    if (key_a < key_b || (key_a == key_b && id_a < id_b)) return;
    key[a] = key_b, key[b] = key_a;
    id[a] = id_b, id[b] = id_a;
  };
  for (int64_t size = 2; size < 2 * count; size *= 2) {
    const int64_t half = size / 2, pairs = ((count + size - 1) & -size) / 2;
    for (int64_t i = thread_index(); i < pairs; i += kThreads) {
      const int64_t begin = 2 * (i & -half), offset = i & (half - 1);
      order(begin + offset, begin + size - 1 - offset);
    }
    sync_block();
    for (int64_t stride = half / 2; stride > 0; stride /= 2) {
      for (int64_t i = thread_index(); i < pairs; i += kThreads) {
        const int64_t a = 2 * (i & -stride) + (i & (stride - 1));
        order(a, a + stride);
      }
      sync_block();
    }
  }
}

// What a group is sorted in: for each candidate a key and an id, twice.
struct SortSpace {
  uint64_t *keys, *choice_keys;
  int32_t *ids, *nominees;
};

TTS_DEVICE SortSpace sort_space(void* memory, int64_t capacity, int64_t begin) {
  uint64_t* keys = static_cast<uint64_t*>(memory);
  int32_t* ids = reinterpret_cast<int32_t*>(keys + 2 * capacity);
  return {keys + begin, keys + capacity + begin, ids + begin, ids + capacity + begin};
}

// Answers and who stands for them: at an answer's first voter its total and index, kNoKey elsewhere. The sum of an
// answer is taken by one thread, in the order of indices.
TTS_DEVICE void count_votes(const SelectParams& p, const SortSpace& at, int64_t begin, int64_t count) {
  for (int64_t i = thread_index(); i < count; i += kThreads) {
    const float score = load_fresh(p.scores + begin + i);
    const int64_t answer = p.answers[begin + i];
    at.keys[i] = answer < 0 || score != score ? kNoKey : uint64_t(answer);
    at.ids[i] = int32_t(i);
  }
  sync_block();
  sort_block(at.keys, at.ids, count);
  for (int64_t i = thread_index(); i < count; i += kThreads) {
    const uint64_t answer = at.keys[i];
    uint64_t choice = kNoKey;
    int32_t nominee = 0;
    if (answer != kNoKey && (i == 0 || at.keys[i - 1] != answer)) {
      const int32_t first = at.ids[i];
      float total = 0.0f, best = -kInfinity;
      nominee = first;
      for (int64_t v = i; v < count && at.keys[v] == answer; ++v) {
        const float score = load_fresh(p.scores + begin + at.ids[v]);
        total += p.method == SelectMethod::majority ? 1.0f : score;
        if (score > best) nominee = at.ids[v], best = score;
      }
      choice = key_of(total, first);  // inf - inf is no score
    }
    at.choice_keys[i] = choice;
    at.nominees[i] = nominee;
  }
  sync_block();
}

// `memory` is shared memory behind `least`, for groups that fit into it.
TTS_DEVICE void select_in_group(const CudaSelectParams& p, int64_t group, uint64_t* least, void* memory) {
  const SelectParams& choice = p.choice;
  const int64_t begin = choice.groups ? choice.groups[group] : 0;
  const int64_t count = (choice.groups ? choice.groups[group + 1] : p.num_candidates) - begin;
  const bool vote = choice.method != SelectMethod::top_k, sorted = choice.k > kMostPasses;
  const bool shared = count <= p.shared_candidates;
  SortSpace at = {};
  if (vote || sorted) at = shared ? sort_space(memory, count, 0) : sort_space(p.scratch, p.num_candidates, begin);
  if (vote) {
    count_votes(choice, at, begin, count);
  } else if (sorted) {
    for (int64_t i = thread_index(); i < count; i += kThreads) {
      at.choice_keys[i] = key_of(load_fresh(choice.scores + begin + i), i);
      at.nominees[i] = int32_t(i);
    }
    sync_block();
  }
  if (sorted) sort_block(at.choice_keys, at.nominees, count);

  int64_t* indices = choice.indices + group * choice.k;
  float* selected = choice.selected + group * choice.k;
  const auto write = [&](int64_t rank, uint64_t key, int64_t nominee) {
    const bool found = key != kNoKey;
    indices[rank] = found ? begin + nominee : -1;
    selected[rank] = !found ? kNan : vote ? score_of(key) : load_fresh(choice.scores + begin + nominee);
  };
  if (sorted) {
    for (int64_t rank = thread_index(); rank < choice.k; rank += kThreads)
      if (rank < count)
        write(rank, at.choice_keys[rank], at.nominees[rank]);
      else
        write(rank, kNoKey, 0);
  } else {
    uint64_t before = 0;  // no key is 0: that would be the score of a NaN
    for (int64_t rank = 0; rank < choice.k; ++rank) {
      uint64_t key = kNoKey;
      int64_t place = 0;
      for (int64_t i = thread_index(); i < count; i += kThreads) {
        const uint64_t other = vote ? at.choice_keys[i] : key_of(load_fresh(choice.scores + begin + i), i);
        if (other > before && other < key) key = other, place = i;
      }
      const uint64_t first = least_of_block(key, least);
      if (first == kNoKey ? thread_index() == 0 : first == key)
        write(rank, first, vote && first != kNoKey ? at.nominees[place] : place);
      before = first;
    }
  }
  sync_block();  // the memory is another group's next
}

}  // namespace tts
