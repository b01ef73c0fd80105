// What kernels use of sm_90a alone: barriers in shared memory that count arrivals and bytes, copies of tiles by tensor
// maps, products of warpgroups, registers handed from one warpgroup to another. As in device.cuh each function names
// the PTX instruction that it is, and with TTS_EMULATED the same names come from tests/emulation.
//
// A warpgroup is four warps, the first of which has a number that 4 divides. Its functions must be reached by all of
// its threads. Products and tile copies work in the async proxy: shared memory that threads wrote themselves (stores,
// cp.async) is theirs to read only behind fence_async by the writer, and a barrier.
#pragma once

#include <type_traits>

#include "../params.h"
#include "device.cuh"

#ifdef TTS_EMULATED
#include "emulated_hopper.h"
#else

namespace tts {

// A barrier in shared memory, 8 bytes. A phase of it ends when so many have arrived, and all bytes that were expected
// are there; then the next one begins. mbarrier.init, by one thread; fence_async and a barrier of threads behind it.
TTS_DEVICE void barrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// What the thread did before is seen by who waits for the phase: mbarrier.arrive.
TTS_DEVICE void barrier_arrive(uint64_t* barrier) {
  asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared::cta.b64 state, [%0];\n}" ::"r"(shared_address(barrier))
               : "memory");
}
// So many bytes more before the phase ends, without arriving: mbarrier.expect_tx.
TTS_DEVICE void barrier_expect(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
// Whether the phase of this parity has ended, said at once: mbarrier.test_wait.parity. Phase 0 is the first; the one
// before it has ended from the start.
TTS_DEVICE bool barrier_test(uint64_t* barrier, uint32_t parity) {
  uint32_t done;
  asm volatile("{\n.reg .pred p;\nmbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
               : "=r"(done)
               : "r"(shared_address(barrier)), "r"(parity)
               : "memory");
  return done != 0;
}
// Until it has: mbarrier.try_wait.parity, which may let the thread sleep before it says no, over and over.
TTS_DEVICE void barrier_wait(uint64_t* barrier, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                 : "=r"(done)
                 : "r"(shared_address(barrier)), "r"(parity)
                 : "memory");
  } while (done == 0);
}

// What this thread wrote into shared memory, before what the async proxy reads or writes next: fence.proxy.async.
TTS_DEVICE void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// The box of the map that begins at (x0, x1, x2, x3), x0 along the dense dimension, to shared memory, a multiple of 128
// bytes; zeros for what lies beyond the tensor. The barrier gets the box's bytes: cp.async.bulk.tensor.
TTS_DEVICE void copy_tile(void* shared, const TensorMap& map, int x0, int x1, int x2, int x3, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(shared_address(shared)),
      "l"(&map), "r"(x0), "r"(x1), "r"(x2), "r"(x3), "r"(shared_address(barrier))
      : "memory");
}

// The registers of each thread of the warpgroup from here on, a multiple of 8: setmaxnreg.
template <int kRegisters>
TTS_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
TTS_DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Not an instruction: what is computed before is computed before, and what is read behind is read behind.
template <int kTiles>
TTS_DEVICE void pin_registers(float (&x)[kTiles][4]) {
#pragma unroll
  for (int i = 0; i < kTiles; ++i)
    asm volatile("" : "+f"(x[i][0]), "+f"(x[i][1]), "+f"(x[i][2]), "+f"(x[i][3])::"memory");
}
template <int kTiles>
TTS_DEVICE void pin_registers(uint32_t (&x)[kTiles][4]) {
#pragma unroll
  for (int i = 0; i < kTiles; ++i)
    asm volatile("" : "+r"(x[i][0]), "+r"(x[i][1]), "+r"(x[i][2]), "+r"(x[i][3])::"memory");
}

// wgmma.fence, before the first of some products: d and a, which they add to and read, are as the thread left them.
// Until they are waited for nothing else may touch those.
template <int kTiles, int kSteps>
TTS_DEVICE void wgmma_fence(float (&d)[kTiles][4], uint32_t (&a)[kSteps][4]) {
  pin_registers(d);
  pin_registers(a);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
TTS_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most N of the youngest committed groups are under way: wgmma.wait_group.
template <int N, int kTiles, int kSteps>
TTS_DEVICE void wgmma_wait(float (&d)[kTiles][4], uint32_t (&a)[kSteps][4]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
  pin_registers(d);
  pin_registers(a);
}

// d = a b, with `add` d += a b: a [64, 16] in registers, b [16, kN] in shared memory, d [64, kN] in fp32, where 16 rows
// of a and d are each warp's, laid out in it as those of mma_16816, tiles of 8 columns side by side in d:
// wgmma.mma_async.
//   !kAcross   the 16 numbers of a column of b lie side by side, columns are rows of shared memory
//   kAcross    the columns lie side by side, the 16 are rows of shared memory
#define TTS_PLACES_4(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define TTS_PLACES_32(i)                                                                               \
  TTS_PLACES_4(i), TTS_PLACES_4(i + 1), TTS_PLACES_4(i + 2), TTS_PLACES_4(i + 3), TTS_PLACES_4(i + 4), \
      TTS_PLACES_4(i + 5), TTS_PLACES_4(i + 6), TTS_PLACES_4(i + 7)
#define TTS_OPERANDS "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(uint32_t(add)), "n"(int(kAcross))
#define TTS_NAMES_32                                                                           \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, " \
  "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define TTS_NAMES_64                                                              \
  TTS_NAMES_32                                                                    \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, " \
  "%47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define TTS_WGMMA_64(type)                                                          \
  asm volatile(                                                                     \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"                                  \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " {" TTS_NAMES_32 \
      "}, "                                                                         \
      "{%32, %33, %34, %35}, %36, p, 1, 1, %38;\n}"                                 \
      : TTS_PLACES_32(0)                                                            \
      : TTS_OPERANDS)
#define TTS_WGMMA_128(type)                                                          \
  asm volatile(                                                                      \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"                                   \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {" TTS_NAMES_64 \
      "}, "                                                                          \
      "{%64, %65, %66, %67}, %68, p, 1, 1, %70;\n}"                                  \
      : TTS_PLACES_32(0), TTS_PLACES_32(8)                                           \
      : TTS_OPERANDS)
template <typename T, bool kAcross, int kTiles>
TTS_DEVICE void wgmma(float (&d)[kTiles][4], const uint32_t (&a)[4], uint64_t b, bool add) {
  static_assert(kTiles == 8 || kTiles == 16, "64 or 128 columns");
  constexpr bool kHalf = std::is_same<T, F16>::value;
  if constexpr (kTiles == 8 && kHalf) TTS_WGMMA_64("f16");
  if constexpr (kTiles == 8 && !kHalf) TTS_WGMMA_64("bf16");
  if constexpr (kTiles == 16 && kHalf) TTS_WGMMA_128("f16");
  if constexpr (kTiles == 16 && !kHalf) TTS_WGMMA_128("bf16");
}
#undef TTS_PLACES_4
#undef TTS_PLACES_32
#undef TTS_OPERANDS
#undef TTS_NAMES_32
#undef TTS_NAMES_64
#undef TTS_WGMMA_64
#undef TTS_WGMMA_128

}  // namespace tts
#endif

namespace tts {

constexpr int kPanelBytes = 128;  // a row of a panel: 64 numbers of 16 bits, 8 pieces of 16 bytes

// Where the 16-byte piece of a row of a panel lies in it, in bytes: what TMA and wgmma call a swizzle of 128 bytes.
// Panels begin at multiples of 1,024.
TTS_DEVICE int panel_place(int row, int piece) { return row * kPanelBytes + 16 * (piece ^ (row & 7)); }

// How wgmma finds b, `offset` bytes into panels: the address, the bytes from eight rows to the next eight, the swizzle,
// all in units of 16 bytes. kAcross: also the bytes from one panel to the next, which has the next 64 columns.
TTS_DEVICE uint64_t in_panels(const void* shared, int offset, int panel_bytes) {
  const uint32_t low = (shared_address(shared) >> 4) + uint32_t(offset >> 4 | panel_bytes >> 4 << 16);
  return low | uint64_t(8 * kPanelBytes >> 4 | 1 << 30) << 32;
}

}  // namespace tts
