// The tile instructions of amx_tile.h in plain C++, for machines without them.
#pragma once

#include <cstdint>
#include <cstring>

namespace {

thread_local uint32_t soft_tiles[8][16][16];

void tiles_enter() {}
void tiles_leave() {}

inline float soft_bf16(uint32_t bits) {
  bits <<= 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline void soft_tile_load(int tile, const void* address, int64_t row_stride) {
  for (int r = 0; r < 16; ++r) std::memcpy(soft_tiles[tile][r], static_cast<const char*>(address) + r * row_stride, 64);
}

inline void soft_tile_store(int tile, void* address, int64_t row_stride) {
  for (int r = 0; r < 16; ++r) std::memcpy(static_cast<char*>(address) + r * row_stride, soft_tiles[tile][r], 64);
}

inline void soft_tile_dot(int c, int a, int b) {
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 16; ++n) {
      float sum;
      std::memcpy(&sum, &soft_tiles[c][m][n], 4);
      for (int k = 0; k < 16; ++k) {
        const uint32_t x = soft_tiles[a][m][k], y = soft_tiles[b][k][n];
        sum += soft_bf16(x & 0xffffu) * soft_bf16(y & 0xffffu);
        sum += soft_bf16(x >> 16) * soft_bf16(y >> 16);
      }
      std::memcpy(&soft_tiles[c][m][n], &sum, 4);
    }
}

#define TILE_FENCE()
#define TILE_ZERO(tile) std::memset(soft_tiles[tile], 0, sizeof(soft_tiles[tile]))
#define TILE_LOAD(tile, address, row_stride) soft_tile_load(tile, address, row_stride)
#define TILE_STORE(tile, address, row_stride) soft_tile_store(tile, address, row_stride)
#define TILE_DOT(c, a, b) soft_tile_dot(c, a, b)

}  // namespace
