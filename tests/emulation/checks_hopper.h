// Kernels for the tests of what the emulation has of sm_90a (tests/cuda/test_emulation_hopper.py).
#pragma once

#include "cuda/device_hopper.cuh"
#include "cuda/launch.h"
#include "cuda/tensor_map.h"

namespace tts {
namespace {

struct HopperProduct {
  const uint16_t* a;  // [64, 64]
  const uint16_t* b;  // [kRows, kColumns] of the kernel
  float* d;           // [64, 128]
  TensorMap map;      // of b, boxes of 64 columns
  int32_t copied;     // by threads, not by boxes
  int32_t omit;       // a kernel is right with 0, and lacks something with each other number
};

// d = a b^T for b [128, 64], across: d = a b for b [64, 128]. The first warpgroup multiplies, another warp copies, twice:
// zeros, then b to the same place.
template <typename T, bool kAcross>
__global__ void hopper_product(const __grid_constant__ HopperProduct p) {
  constexpr int kRows = kAcross ? 64 : 128, kPanels = kAcross ? 2 : 1, kPanel = kRows * kPanelBytes;
  unsigned char* b = shared_memory<unsigned char>();
  uint64_t* full = reinterpret_cast<uint64_t*>(b + kPanels * kPanel);
  uint64_t* empty = full + 1;
  if (thread_index() == 0) {
    barrier_init(full, 32);
    barrier_init(empty, 4);
    if (p.omit != 1) fence_async();
  }
  sync_block();
  if (warp_index() == 4) {
    for (uint32_t turn = 0; turn < 2; ++turn) {
      if (p.omit != 2) barrier_wait(empty, turn & 1u ^ 1u);
      if (p.copied) {
        for (int i = lane_index(); i < kPanels * kRows * 8; i += 32) {
          const int panel = i / (kRows * 8), row = i / 8 % kRows, piece = i % 8;
          copy_async_16(b + panel * kPanel + panel_place(row, piece), p.b + row * 64 * kPanels + panel * 64 + 8 * piece,
                        turn == 1);
        }
        copy_async_commit();
        if (p.omit != 3) copy_async_wait<0>();
        if (p.omit != 4) fence_async();
        if (p.omit == 3) barrier_arrive(full), copy_async_wait<0>();
      } else if (lane_index() == 0) {
        if (p.omit != 5) barrier_expect(full, kPanels * kPanel);
        for (int panel = 0; panel < kPanels; ++panel)  // the first time from beyond the tensor
          copy_tile(b + panel * kPanel, p.map, 64 * panel, 0, turn == 0 ? kRows : 0, 0, full);
      }
      if (p.omit != 3 || !p.copied) barrier_arrive(full);
    }
    return;
  }
  const int warp = warp_index(), g = lane_index() / 4, t = lane_index() % 4;
  uint32_t a[4][4];
  float d[16][4], zero[16][4];
  for (int step = 0; step < 4; ++step)
    for (int i = 0; i < 4; ++i)
      std::memcpy(&a[step][i], p.a + (16 * warp + g + i % 2 * 8) * 64 + 16 * step + 2 * t + i / 2 * 8, 4);
  for (uint32_t turn = 0; turn < 2; ++turn) {
    if (p.omit != 6) barrier_wait(full, p.omit == 7 ? turn ^ 1u : turn);
    float(&to)[16][4] = turn == 0 ? zero : d;
    if (p.omit != 8) wgmma_fence(to, a);
    for (int step = 0; step < 4; ++step) {
      const int offset = kAcross ? 16 * step * kPanelBytes : 32 * step;
      wgmma<T, kAcross>(to, a[step], in_panels(b, offset, p.omit == 9 ? 16 : kPanel), step > 0);
    }
    wgmma_commit();
    if (p.omit == 10) a[2][1] = 0;
    if (p.omit == 11) sync_warp();
    if (p.omit == 11 && lane_index() == 0) barrier_arrive(empty);
    if (p.omit == 12) {
      const float early = to[3][1];
      wgmma_wait<0>(to, a);
      to[3][1] = early;
    }
    if (p.omit == 14) to[3][1] = 0;
    if (p.omit != 12) wgmma_wait<0>(to, a);
    sync_warp();
    if (p.omit != 11 && p.omit != 13 && lane_index() == 0) barrier_arrive(empty);
  }
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 4; ++j) p.d[(16 * warp + g + j / 2 * 8) * 128 + 8 * i + 2 * t + j % 2] = d[i][j] + zero[i][j];
}

template <typename T>
void run_hopper_product(HopperProduct p, bool across, DType dtype) {
  const int64_t rows = across ? 64 : 128, columns = across ? 128 : 64;
  const TensorMapRequest request = {p.b, dtype, {columns, 1, rows, 1}, {0, 2 * columns, 0}, {64, 1, int32_t(rows), 1}};
  if (!make_tensor_map(request, &p.map)) throw std::runtime_error("there is no such map");
  launch(across ? hopper_product<T, true> : hopper_product<T, false>, {1, 160, 16384 + 16, 0, "hopper_product"}, p);
}

}  // namespace
}  // namespace tts
