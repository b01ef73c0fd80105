// The functions of csrc/cuda/device_hopper.cuh on the emulated machine. What they promise stands there.
#pragma once

#include "emulated_device.h"

namespace tts {

inline uint32_t shared_address(const void* shared) {
  return emulation::address_in_shared(machine.current->block, shared);
}

inline void barrier_init(uint64_t* barrier, int arrivals, TTS_SITE("barrier_init")) {
  machine.make_barrier(site, barrier, arrivals);
}
inline void barrier_arrive(uint64_t* barrier, TTS_SITE("barrier_arrive")) { machine.arrive_at(site, barrier); }
inline void barrier_expect(uint64_t* barrier, int bytes, TTS_SITE("barrier_expect")) {
  machine.expect_bytes(site, barrier, bytes);
}
inline bool barrier_test(uint64_t* barrier, uint32_t parity, TTS_SITE("barrier_test")) {
  return machine.has_ended(site, barrier, parity);
}
inline void barrier_wait(uint64_t* barrier, uint32_t parity, TTS_SITE("barrier_wait")) {
  machine.wait_for_phase(site, barrier, parity);
}
inline void fence_async() { machine.fence_async(); }
inline void copy_tile(void* shared, const TensorMap& map, int x0, int x1, int x2, int x3, uint64_t* barrier,
                      TTS_SITE("copy_tile")) {
  machine.copy_tile(site, shared, &map, {x0, x1, x2, x3}, barrier);
}

template <int kRegisters>
void take_registers(TTS_SITE("take_registers")) {
  machine.set_registers(site, kRegisters, true);
}
template <int kRegisters>
void give_registers(TTS_SITE("give_registers")) {
  machine.set_registers(site, kRegisters, false);
}

template <int kTiles>
void pin_registers(float (&)[kTiles][4]) {}
template <int kTiles>
void pin_registers(uint32_t (&)[kTiles][4]) {}

template <int kTiles, int kSteps>
void wgmma_fence(float (&)[kTiles][4], uint32_t (&)[kSteps][4], TTS_SITE("wgmma_fence")) {
  emulation::Nothing mine;
  machine.meet<emulation::Nothing>(site, &mine, [](emulation::Nothing* const*) { machine.fence_products(); });
}
inline void wgmma_commit(TTS_SITE("wgmma_commit")) {
  emulation::Nothing mine;
  machine.meet<emulation::Nothing>(site, &mine, [](emulation::Nothing* const*) { machine.commit_products(); });
}
template <int N, int kTiles, int kSteps>
void wgmma_wait(float (&)[kTiles][4], uint32_t (&)[kSteps][4], TTS_SITE("wgmma_wait")) {
  machine.meet_for_products(site, N);
}

namespace emulation {

struct ProductOfLane {
  Product product;
  uint32_t* a;
  float* d;
};

inline void issue(ProductOfLane* const* lanes) {
  uint32_t* a[kLanes];
  float* d[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    a[lane] = lanes[lane]->a, d[lane] = lanes[lane]->d;
    if (lanes[lane]->product.b != lanes[0]->product.b || lanes[lane]->product.add != lanes[0]->product.add)
      machine.fail(describe(lanes[0]->product.site) + ": lanes name different products");
  }
  machine.issue_product(lanes[0]->product, a, d);
}

}  // namespace emulation

template <typename T, bool kAcross, int kTiles>
void wgmma(float (&d)[kTiles][4], const uint32_t (&a)[4], uint64_t b, bool add, TTS_SITE("wgmma")) {
  emulation::ProductOfLane mine = {};
  mine.product.site = site;
  mine.product.widen = emulation::widening<T>;
  mine.product.across = kAcross, mine.product.add = add;
  mine.product.columns = 8 * kTiles;
  mine.product.b = b;
  mine.a = const_cast<uint32_t*>(a), mine.d = d[0];
  machine.meet(site, &mine, &emulation::issue);
}

}  // namespace tts
