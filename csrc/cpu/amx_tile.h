// AMX tiles: eight of 16 rows x 64 bytes. tile_dot: C [16][16] fp32 += A [16][32] bf16 * B [16 pairs][16][2] bf16.
// The compiler sees the tile instructions as opaque: TILE_FENCE keeps ordinary loads and stores on their side of them.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

#define TILE_FENCE() __asm__ volatile("" ::: "memory")

// In memory for good: GCC's intrinsic tells the compiler of the first 8 bytes only, so a local would be half built.
const TileConfig kTileConfig;

void tiles_enter() {
  TILE_FENCE();
  _tile_loadconfig(&kTileConfig);
}
void tiles_leave() { _tile_release(); }

#define TILE_ZERO(tile) _tile_zero(tile)
#define TILE_LOAD(tile, address, row_stride) _tile_loadd(tile, address, row_stride)
#define TILE_STORE(tile, address, row_stride) _tile_stored(tile, address, row_stride)
#define TILE_DOT(c, a, b) _tile_dpbf16ps(c, a, b)

}  // namespace
