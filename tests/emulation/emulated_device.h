// The functions of csrc/cuda/device.cuh on the emulated machine. What they promise stands there.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "emulation.h"
#include "numbers.h"
#include "warp_matrix.h"

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline
#define TTS_DEVICE inline

// A defaulted last argument: where in the kernel the call stands.
#define TTS_SITE(function) ::tts::emulation::Site site = {function, __builtin_FILE(), __builtin_LINE()}

namespace tts {

using emulation::machine;

inline int thread_index() { return machine.current->index; }
inline int block_index() { return machine.current->block->index; }
inline int block_count() { return int(machine.block_count); }
inline int block_size() { return machine.current->block->size; }
inline int lane_index() { return machine.current->index % 32; }
inline int warp_index() { return machine.current->index / 32; }
inline int thread_index_anew() { return thread_index(); }

template <typename T>
T* shared_memory() {
  return reinterpret_cast<T*>(machine.current->block->shared);
}

inline void sync_block(TTS_SITE("sync_block")) { machine.meet_at_barrier(site, 0, block_size(), false); }
inline bool sync_block_any(bool x, TTS_SITE("sync_block_any")) {
  return machine.meet_at_barrier(site, 0, block_size(), x) != 0;
}
inline bool sync_block_all(bool x, TTS_SITE("sync_block_all")) {
  return machine.meet_at_barrier(site, 0, block_size(), x) == block_size();
}
inline int sync_block_count(bool x, TTS_SITE("sync_block_count")) {
  return machine.meet_at_barrier(site, 0, block_size(), x);
}
inline void sync_part(int barrier, int threads, TTS_SITE("sync_part")) {
  if (barrier == 0) machine.fail("sync_part: barrier 0 is the whole block's");
  machine.meet_at_barrier(site, barrier, threads, false);
}
inline bool sync_part_any(int barrier, int threads, bool x, TTS_SITE("sync_part_any")) {
  if (barrier == 0) machine.fail("sync_part_any: barrier 0 is the whole block's");
  return machine.meet_at_barrier(site, barrier, threads, x) != 0;
}

namespace emulation {

struct Nothing {};

template <typename T>
struct Exchange {
  T given, taken;
  int from;
};

template <typename T>
void exchange(Exchange<T>* const* lanes) {
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane]->taken = lanes[lanes[lane]->from]->given;
}

template <typename T>
T take_from(const Site& site, T x, int lane) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "what shfl.sync exchanges");
  Exchange<T> mine = {x, x, lane & (kLanes - 1)};
  machine.meet(site, &mine, &exchange<T>);
  return mine.taken;
}

struct Vote {
  bool given;
  uint32_t taken;
};

inline uint32_t vote(const Site& site, bool x) {
  Vote mine = {x, 0};
  machine.meet<Vote>(site, &mine, [](Vote* const* lanes) {
    uint32_t all = 0;
    for (int lane = 0; lane < kLanes; ++lane) all |= uint32_t(lanes[lane]->given) << lane;
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane]->taken = all;
  });
  return mine.taken;
}

}  // namespace emulation

inline void sync_warp(TTS_SITE("sync_warp")) {
  emulation::Nothing mine;
  machine.meet<emulation::Nothing>(site, &mine,
                                   [](emulation::Nothing* const*) { machine.order_warp(machine.current->warp); });
}

template <typename T>
T shuffle(T x, int lane, TTS_SITE("shuffle")) {
  return emulation::take_from(site, x, lane);
}
template <typename T>
T shuffle_xor(T x, int mask, TTS_SITE("shuffle_xor")) {
  return emulation::take_from(site, x, lane_index() ^ mask);
}
template <typename T>
T shuffle_down(T x, int delta, TTS_SITE("shuffle_down")) {
  return emulation::take_from(site, x, lane_index() + delta < 32 ? lane_index() + delta : lane_index());
}
template <typename T>
T shuffle_up(T x, int delta, TTS_SITE("shuffle_up")) {
  return emulation::take_from(site, x, lane_index() >= delta ? lane_index() - delta : lane_index());
}
inline uint32_t ballot(bool x, TTS_SITE("ballot")) { return emulation::vote(site, x); }
inline bool any_in_warp(bool x, TTS_SITE("any_in_warp")) { return emulation::vote(site, x) != 0; }
inline bool all_in_warp(bool x, TTS_SITE("all_in_warp")) { return emulation::vote(site, x) == emulation::kAllLanes; }

inline void copy_async_16(void* shared, const void* global, bool valid, TTS_SITE("copy_async_16")) {
  machine.copy(site, shared, global, valid);
}
inline void copy_async_commit() { machine.commit_copies(); }
template <int N>
void copy_async_wait() {
  machine.wait_for_copies(N);
}

namespace emulation {

template <bool kTransposed>
void load_matrix_x4(const Site& site, uint32_t (&r)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) machine.fail(describe(site) + ": a row is not 16-byte aligned");
  if (!machine.current->block->in_shared(row) || !machine.current->block->in_shared(static_cast<const char*>(row) + 15))
    machine.fail(describe(site) + ": a row is not in the block's shared memory");
  MatrixLoad mine = {row, r};
  machine.meet(site, &mine, &load_matrices<kTransposed>);
}

template <typename T>
constexpr auto widening = nullptr;
template <>
inline constexpr auto widening<F16> = &widen_f16;
template <>
inline constexpr auto widening<BF16> = &widen_bf16;

}  // namespace emulation

inline void load_matrix_x4(uint32_t (&r)[4], const void* shared_row, TTS_SITE("load_matrix_x4")) {
  emulation::load_matrix_x4<false>(site, r, shared_row);
}
inline void load_matrix_x4_transposed(uint32_t (&r)[4], const void* shared_row, TTS_SITE("load_matrix_x4_transposed")) {
  emulation::load_matrix_x4<true>(site, r, shared_row);
}

template <typename T>
void mma_16816(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, TTS_SITE("mma_16816")) {
  emulation::MatrixProduct mine = {d, a, {b0, b1}};
  machine.meet(site, &mine, &emulation::multiply<emulation::widening<T>>);
}

inline uint32_t bits_of(float x) { return emulation::to_bits(x); }
inline float float_of(uint32_t bits) { return emulation::from_bits(bits); }

template <typename T>
float widen(uint16_t x) {
  return emulation::widening<T>(x);
}
template <typename T>
uint16_t narrow(float x);
template <>
inline uint16_t narrow<F16>(float x) {
  return emulation::narrow_f16(x);
}
template <>
inline uint16_t narrow<BF16>(float x) {
  return emulation::narrow_bf16(x);
}
template <typename T>
uint32_t pack2(float low, float high) {
  return uint32_t(narrow<T>(low)) | uint32_t(narrow<T>(high)) << 16;
}
inline uint32_t byte_permute(uint32_t x, uint32_t select) {
  uint32_t y = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t digit = select >> (4 * i) & 15u, from = digit & 7u;
    uint32_t byte = from < 4 ? x >> (8 * from) & 255u : 0u;
    if (digit & 8u) byte = byte & 128u ? 255u : 0u;
    y |= byte << (8 * i);
  }
  return y;
}
inline uint32_t multiply_f16x2(uint32_t a, uint32_t b) {
  return pack2<F16>(widen<F16>(uint16_t(a)) * widen<F16>(uint16_t(b)),
                    widen<F16>(uint16_t(a >> 16)) * widen<F16>(uint16_t(b >> 16)));
}
// Rounded twice where fp32 does not hold the result.
inline uint32_t multiply_add_bf16x2(uint32_t a, uint32_t b, uint32_t c) {
  const auto half = [=](int shift) {
    return std::fma(widen<BF16>(uint16_t(a >> shift)), widen<BF16>(uint16_t(b >> shift)),
                    widen<BF16>(uint16_t(c >> shift)));
  };
  return pack2<BF16>(half(0), half(16));
}

namespace emulation {
inline float flush(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }
}  // namespace emulation

inline float exp2_fast(float x) { return emulation::flush(::exp2f(emulation::flush(x))); }
inline float log2_fast(float x) { return ::log2f(emulation::flush(x)); }
inline float reciprocal_fast(float x) { return emulation::flush(1.0f / emulation::flush(x)); }
inline float rsqrt_fast(float x) { return 1.0f / ::sqrtf(emulation::flush(x)); }

inline int popcount(uint32_t x) { return __builtin_popcount(x); }
inline int leading_zeros(uint32_t x) { return x ? __builtin_clz(x) : 32; }
inline int trailing_zeros(uint32_t x) { return x ? __builtin_ctz(x) : 32; }
template <typename T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
T max(T a, T b) {
  return a < b ? b : a;
}
template <>
inline float max<float>(float a, float b) {
  if (a != a || b != b) return a != a ? b : a;
  if (a == b) return std::signbit(a) ? b : a;
  return a < b ? b : a;
}

namespace emulation {
inline void check_aligned_16(const Site& site, const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 16 != 0) machine.fail(describe(site) + ": the address is not 16-byte aligned");
}
}  // namespace emulation

inline Bits128 load_16(const void* p, TTS_SITE("load_16")) {
  emulation::check_aligned_16(site, p);
  Bits128 x;
  machine.load_words(p, x.word, 4);
  return x;
}
inline void store_16(void* p, const Bits128& x, TTS_SITE("store_16")) {
  emulation::check_aligned_16(site, p);
  machine.store_words(p, x.word, 4);
}
inline Bits128 load_16_once(const void* p, TTS_SITE("load_16_once")) { return load_16(p, site); }

inline void store_state(float* p, float x) {
  const uint32_t word = bits_of(x);
  machine.store_words(p, &word, 1);
}
inline void store_state(int32_t* p, int32_t x) {
  const uint32_t word = uint32_t(x);
  machine.store_words(p, &word, 1);
}
inline void store_state_16(void* p, const Bits128& x, TTS_SITE("store_state_16")) { store_16(p, x, site); }
inline float load_fresh(const float* p) {
  machine.maybe_yield();
  uint32_t word;
  machine.load_words(p, &word, 1);
  return float_of(word);
}
inline int32_t load_fresh(const int32_t* p) {
  machine.maybe_yield();
  uint32_t word;
  machine.load_words(p, &word, 1);
  return int32_t(word);
}
inline Bits128 load_fresh_16(const void* p, TTS_SITE("load_fresh_16")) {
  machine.maybe_yield();
  return load_16(p, site);
}
inline void fence() { machine.fence(); }

namespace emulation {
// One thread runs at a time.
template <typename T, typename Change>
T change_atomically(T* p, Change change) {
  machine.maybe_yield();
  machine.release();
  const T old = *p;
  *p = change(old);
  machine.maybe_sleep();  // who is told of what this thread has written finds out whether it is there
  return old;
}
}  // namespace emulation

inline uint32_t atomic_wrap(uint32_t* p, uint32_t last) {
  return emulation::change_atomically(p, [=](uint32_t old) { return old >= last ? 0u : old + 1u; });
}
inline int32_t atomic_add(int32_t* p, int32_t x) {
  return emulation::change_atomically(p, [=](int32_t old) { return int32_t(uint32_t(old) + uint32_t(x)); });
}
inline uint32_t atomic_add(uint32_t* p, uint32_t x) {
  return emulation::change_atomically(p, [=](uint32_t old) { return old + x; });
}
inline int32_t atomic_min(int32_t* p, int32_t x) {
  return emulation::change_atomically(p, [=](int32_t old) { return x < old ? x : old; });
}
inline int32_t atomic_max(int32_t* p, int32_t x) {
  return emulation::change_atomically(p, [=](int32_t old) { return x > old ? x : old; });
}

}  // namespace tts
