// All that kernels use beyond plain C++: special registers, barriers, warp exchanges, asynchronous copies, matrix
// products, conversions, fences. Each function names the PTX instruction that it is. Kernels hold no assembly, no CUDA
// header types and no `extern __shared__` of their own, so these functions and launch.h are all that an emulation
// replaces: with TTS_EMULATED the same names come from tests/emulation. What is made of them stands at the end.
//
// 16-bit floating-point values are bits, uint16_t or two in a uint32_t (the lower index in the low half); the tags F16
// and BF16 pick their meaning. Functions of a warp must be reached by all of its 32 lanes together.
#pragma once

#include <cstdint>
#include <cstring>

namespace tts {

struct F16 {};
struct BF16 {};

struct alignas(16) Bits128 {
  uint32_t word[4];
};

constexpr float kInfinity = __builtin_huge_valf();

}  // namespace tts

#ifdef TTS_EMULATED
#include "emulated_device.h"
#else

#define TTS_DEVICE __device__ __forceinline__

namespace tts {

// The place of a thread. Grids and blocks have one dimension; blocks are whole warps.
TTS_DEVICE int thread_index() { return int(threadIdx.x); }
TTS_DEVICE int block_index() { return int(blockIdx.x); }
TTS_DEVICE int block_count() { return int(gridDim.x); }
TTS_DEVICE int block_size() { return int(blockDim.x); }
TTS_DEVICE int lane_index() { return int(threadIdx.x) & 31; }
TTS_DEVICE int warp_index() { return int(threadIdx.x) >> 5; }
// thread_index, read anew: what is computed from it is computed again where it is used, and takes no register meanwhile.
TTS_DEVICE int thread_index_anew() {
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}

extern __shared__ __align__(1024) unsigned char dynamic_shared_memory[];

// The block's dynamic shared memory, 1,024-byte aligned; its first contents mean nothing.
template <typename T>
TTS_DEVICE T* shared_memory() {
  return reinterpret_cast<T*>(dynamic_shared_memory);
}

// Barriers order memory accesses, shared and global, among the threads that meet.
TTS_DEVICE void sync_block() { __syncthreads(); }  // bar.sync 0
TTS_DEVICE void sync_warp() { __syncwarp(); }      // bar.warp.sync, all lanes
// bar.sync `barrier` (1 to 15) of `threads` threads, a multiple of 32: whole warps that share a part of the work.
TTS_DEVICE void sync_part(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// shfl.sync and vote.sync. T: int32_t, uint32_t, int64_t, float, double.
template <typename T>
TTS_DEVICE T shuffle_xor(T x, int mask) {
  return __shfl_xor_sync(0xffffffffu, x, mask);
}
template <typename T>
TTS_DEVICE T shuffle(T x, int lane) {
  return __shfl_sync(0xffffffffu, x, lane);
}
// From lane + delta; lanes beyond the warp keep their own.
template <typename T>
TTS_DEVICE T shuffle_down(T x, int delta) {
  return __shfl_down_sync(0xffffffffu, x, delta);
}
// From lane - delta; lanes before the warp keep their own.
template <typename T>
TTS_DEVICE T shuffle_up(T x, int delta) {
  return __shfl_up_sync(0xffffffffu, x, delta);
}
TTS_DEVICE uint32_t ballot(bool x) { return __ballot_sync(0xffffffffu, x); }
TTS_DEVICE bool any_in_warp(bool x) { return __any_sync(0xffffffffu, x) != 0; }
TTS_DEVICE bool all_in_warp(bool x) { return __all_sync(0xffffffffu, x) != 0; }
// As sync_block, and every thread gets whether x holds for any (all) of the block's: barrier.red.
TTS_DEVICE bool sync_block_any(bool x) { return __syncthreads_or(x) != 0; }
TTS_DEVICE bool sync_block_all(bool x) { return __syncthreads_and(x) != 0; }
TTS_DEVICE int sync_block_count(bool x) { return __syncthreads_count(x); }
// As sync_part, and every thread gets whether x holds for any of them.
TTS_DEVICE bool sync_part_any(int barrier, int threads, bool x) {
  uint32_t any;
  asm volatile("{\n.reg .pred p, q;\nsetp.ne.u32 p, %3, 0;\nbar.red.or.pred q, %1, %2, p;\nselp.u32 %0, 1, 0, q;\n}"
               : "=r"(any)
               : "r"(barrier), "r"(threads), "r"(uint32_t(x))
               : "memory");
  return any != 0;
}

TTS_DEVICE uint32_t shared_address(const void* shared) { return uint32_t(__cvta_generic_to_shared(shared)); }

// 16 bytes, both addresses 16-byte aligned, past L1; zeros where !valid, and `global` is then not read: cp.async.cg.
TTS_DEVICE void copy_async_16(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}
// Closes the thread's group of copies: cp.async.commit_group.
TTS_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most N of the thread's youngest groups are under way: cp.async.wait_group. The bytes are the thread's own to
// read then; others see them behind a barrier.
template <int N>
TTS_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Four 8x8 matrices of 16-bit values: ldmatrix.x4. Lane l gives the address of row l % 8 of matrix l / 8, 16-byte
// aligned; r[i] becomes the values (l / 4, 2 (l % 4)) and (l / 4, 2 (l % 4) + 1) of matrix i, of its transpose below.
TTS_DEVICE void load_matrix_x4(uint32_t (&r)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared_row))
               : "memory");
}
TTS_DEVICE void load_matrix_x4_transposed(uint32_t (&r)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared_row))
               : "memory");
}

// d += a b, a [16, 16], b [16, 8], d [16, 8] in fp32: mma.sync.m16n8k16. With g = lane / 4 and t = lane % 4:
//   a[0]: (g, 2t), (g, 2t + 1)   a[1]: row g + 8   a[2]: columns + 8   a[3]: both
//   b0: (2t, g), (2t + 1, g)     b1: rows + 8
//   d[0]: (g, 2t)   d[1]: (g, 2t + 1)   d[2], d[3]: row g + 8
template <typename T>
TTS_DEVICE void mma_16816(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
TTS_DEVICE void mma_16816<F16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
TTS_DEVICE void mma_16816<BF16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

TTS_DEVICE uint32_t bits_of(float x) { return __float_as_uint(x); }
TTS_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }

// To 16 bits, to nearest even: cvt.rn. NaN becomes 0x7fff; numbers beyond the range become infinities.
template <typename T>
TTS_DEVICE uint16_t narrow(float x);
template <>
TTS_DEVICE uint16_t narrow<F16>(float x) {
  uint16_t y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return y;
}
template <>
TTS_DEVICE uint16_t narrow<BF16>(float x) {
  uint16_t y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return y;
}

template <typename T>
TTS_DEVICE uint32_t pack2(float low, float high);
template <>
TTS_DEVICE uint32_t pack2<F16>(float low, float high) {
  uint32_t y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
template <>
TTS_DEVICE uint32_t pack2<BF16>(float low, float high) {
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}

// Exact: cvt.f32.f16; a shift.
template <typename T>
TTS_DEVICE float widen(uint16_t x);
template <>
TTS_DEVICE float widen<F16>(uint16_t x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
  return y;
}
template <>
TTS_DEVICE float widen<BF16>(uint16_t x) {
  return float_of(uint32_t(x) << 16);
}

// prmt: byte i of the result is the byte of x that digit i of `select` names (0 to 3), 0 where the digit is 4 to 7; 8 to
// 11 name bytes 0 to 3 too, and take their sign eight times. __byte_perm knows digits 0 to 7 alone.
TTS_DEVICE uint32_t byte_permute(uint32_t x, uint32_t select) {
  uint32_t y;
  asm("prmt.b32 %0, %1, 0, %2;" : "=r"(y) : "r"(x), "r"(select));
  return y;
}
// Of pairs, rounded once, subnormal numbers as they are: mul.rn.f16x2; fma.rn.bf16x2.
TTS_DEVICE uint32_t multiply_f16x2(uint32_t a, uint32_t b) {
  uint32_t y;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
  return y;
}
TTS_DEVICE uint32_t multiply_add_bf16x2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t y;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(c));
  return y;
}

// Approximations in one instruction. Subnormal arguments and results are zero. exp2_fast(0) = 1, exp2_fast(-inf) = 0,
// log2_fast(1) = 0, log2_fast(0) = -inf. Exact functions (expf, logf, tanhf, erff, sqrtf, fmaf) are CUDA's own.
TTS_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
TTS_DEVICE float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
TTS_DEVICE float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
TTS_DEVICE float rsqrt_fast(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

TTS_DEVICE int popcount(uint32_t x) { return __popc(x); }
TTS_DEVICE int leading_zeros(uint32_t x) { return __clz(int(x)); }                // 32 for 0
TTS_DEVICE int trailing_zeros(uint32_t x) { return x ? __ffs(int(x)) - 1 : 32; }  // 32 for 0
template <typename T>
TTS_DEVICE T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
TTS_DEVICE T max(T a, T b) {
  return a < b ? b : a;
}
// -0 is less than 0. Of NaN and a number the number, whichever comes first: max.f32.
template <>
TTS_DEVICE float max<float>(float a, float b) {
  return fmaxf(a, b);
}

// 16 bytes, 16-byte aligned, in any memory.
TTS_DEVICE Bits128 load_16(const void* p) {
  const uint4 x = *static_cast<const uint4*>(p);
  return {{x.x, x.y, x.z, x.w}};
}
TTS_DEVICE void store_16(void* p, const Bits128& x) {
  *static_cast<uint4*>(p) = make_uint4(x.word[0], x.word[1], x.word[2], x.word[3]);
}
// Of global memory that nobody writes during the launch and that is read once: ld.global.nc.L1::no_allocate.
TTS_DEVICE Bits128 load_16_once(const void* p) {
  Bits128 x;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.word[0]), "=r"(x.word[1]), "=r"(x.word[2]), "=r"(x.word[3])
               : "l"(p));
  return x;
}

// What blocks tell one another in global memory. The writer: store_state by any threads, a barrier, then fence() and the
// atomic, both by the thread that tells. The reader: the atomic, fence(), a barrier, load_fresh, which never comes from
// L1.
TTS_DEVICE void store_state(float* p, float x) {
  asm volatile("st.relaxed.gpu.global.f32 [%0], %1;" ::"l"(p), "f"(x) : "memory");
}
TTS_DEVICE void store_state(int32_t* p, int32_t x) {
  asm volatile("st.relaxed.gpu.global.s32 [%0], %1;" ::"l"(p), "r"(x) : "memory");
}
TTS_DEVICE void store_state_16(void* p, const Bits128& x) {
  asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(x.word[0]), "r"(x.word[1]),
               "r"(x.word[2]), "r"(x.word[3])
               : "memory");
}
TTS_DEVICE float load_fresh(const float* p) {
  float x;
  asm volatile("ld.relaxed.gpu.global.f32 %0, [%1];" : "=f"(x) : "l"(p) : "memory");
  return x;
}
TTS_DEVICE int32_t load_fresh(const int32_t* p) {
  int32_t x;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
  return x;
}
TTS_DEVICE Bits128 load_fresh_16(const void* p) {
  Bits128 x;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.word[0]), "=r"(x.word[1]), "=r"(x.word[2]), "=r"(x.word[3])
               : "l"(p)
               : "memory");
  return x;
}
// What this thread wrote, and what it was told of behind a barrier, is seen before what it writes next; and it sees what
// was before what it has read: fence.acq_rel.gpu. __threadfence would also put all fences in one order.
TTS_DEVICE void fence() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

// Relaxed atomics on global or shared memory; they return what was there.
TTS_DEVICE uint32_t atomic_wrap(uint32_t* p, uint32_t last) { return atomicInc(p, last); }  // old >= last ? 0 : old + 1
TTS_DEVICE int32_t atomic_add(int32_t* p, int32_t x) { return atomicAdd(p, x); }
TTS_DEVICE uint32_t atomic_add(uint32_t* p, uint32_t x) { return atomicAdd(p, x); }
TTS_DEVICE int32_t atomic_min(int32_t* p, int32_t x) { return atomicMin(p, x); }
TTS_DEVICE int32_t atomic_max(int32_t* p, int32_t x) { return atomicMax(p, x); }

}  // namespace tts
#endif

// What is made of the functions above, on the emulated machine too.
namespace tts {

// Four e4m3 numbers to two pairs of T, exact. The seven bits below the sign, moved to where T has its exponent, are the
// number times 2^-8 (F16) or 2^-120 (BF16), subnormal ones too: one exact product. From sm_89 on F16 has an instruction.
template <typename T>
TTS_DEVICE void widen_e4m3x4(uint32_t bits, uint32_t& low2, uint32_t& high2);

// Bytes 2 pair and 2 pair + 1 of four, as the high bytes of the halves of a word.
TTS_DEVICE uint32_t e4m3_pair(uint32_t bits, int pair) { return byte_permute(bits, pair == 0 ? 0x1404 : 0x3424); }
// NaN in each half whose byte is that, else 0.
TTS_DEVICE uint32_t e4m3_nan(uint32_t bits, int pair) {
  const uint32_t is_nan = (bits & 0x7f7f7f7fu) + 0x01010101u;  // the sign of each byte
  return byte_permute(is_nan, pair == 0 ? 0x9988 : 0xbbaa) & 0x7fff7fffu;
}

template <>
TTS_DEVICE void widen_e4m3x4<F16>(uint32_t bits, uint32_t& low2, uint32_t& high2) {
#if __CUDA_ARCH__ >= 890
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(low2) : "h"(uint16_t(bits)));
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(high2) : "h"(uint16_t(bits >> 16)));
#else
  uint32_t wide[2];
  for (int i = 0; i < 2; ++i) {
    const uint32_t pair = e4m3_pair(bits, i), scaled = (pair & 0x80008000u) | ((pair & 0x7f007f00u) >> 1);
    wide[i] = multiply_f16x2(scaled, 0x5c005c00u) | e4m3_nan(bits, i);  // times 2^8
  }
  low2 = wide[0], high2 = wide[1];
#endif
}
template <>
TTS_DEVICE void widen_e4m3x4<BF16>(uint32_t bits, uint32_t& low2, uint32_t& high2) {
  uint32_t wide[2];
  for (int i = 0; i < 2; ++i) {
    const uint32_t pair = e4m3_pair(bits, i), scaled = (pair & 0x80008000u) | ((pair & 0x7f007f00u) >> 4);
    // Times 2^120, and -0 to it; bf16 has no product of its own on sm_80.
    wide[i] = multiply_add_bf16x2(scaled, 0x7b807b80u, 0x80008000u) | e4m3_nan(bits, i);
  }
  low2 = wide[0], high2 = wide[1];
}

}  // namespace tts
