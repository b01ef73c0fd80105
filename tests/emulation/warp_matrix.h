// ldmatrix and mma.sync.m16n8k16 for the 32 lanes of a warp. Which lane holds which entries follows the fragment layouts
// of the PTX ISA: a lane is (g, t), g = lane / 4 and t = lane % 4, and holds pairs of neighbours.
#pragma once

#include <cstdint>
#include <cstring>

#include "numbers.h"

namespace tts::emulation {

// Lane l brings the address of row l % 8 of matrix l / 8 (8 rows of 8 values of 16 bits).
struct MatrixLoad {
  const void* row;
  uint32_t* result;  // 4
};

// result[i] of lane (g, t): entries (g, 2t) and (g, 2t + 1) of matrix i, or of its transpose.
template <bool kTransposed>
void load_matrices(MatrixLoad* const* lanes) {
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t entry[8][8];
    for (int row = 0; row < 8; ++row) std::memcpy(entry[row], lanes[8 * matrix + row]->row, 16);
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      const uint16_t low = kTransposed ? entry[2 * t][g] : entry[g][2 * t];
      const uint16_t high = kTransposed ? entry[2 * t + 1][g] : entry[g][2 * t + 1];
      lanes[lane]->result[matrix] = uint32_t(low) | uint32_t(high) << 16;
    }
  }
}

struct MatrixProduct {
  float* d;           // 4
  const uint32_t* a;  // 4
  uint32_t b[2];
};

// d[16][8] += a[16][16] b[16][8]. Products are exact in fp32; the sum goes up in k and rounds each time, where hardware
// adds several products before it rounds: the error is of the same size.
template <float (*kWiden)(uint16_t)>
void multiply(MatrixProduct* const* lanes) {
  float a[16][16], b[16][8], d[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    const MatrixProduct& mine = *lanes[lane];
    for (int i = 0; i < 4; ++i) {
      const int row = g + i % 2 * 8, column = 2 * t + i / 2 * 8;
      a[row][column] = kWiden(uint16_t(mine.a[i]));
      a[row][column + 1] = kWiden(uint16_t(mine.a[i] >> 16));
      d[g + i / 2 * 8][2 * t + i % 2] = mine.d[i];
    }
    for (int i = 0; i < 2; ++i) {
      b[2 * t + i * 8][g] = kWiden(uint16_t(mine.b[i]));
      b[2 * t + i * 8 + 1][g] = kWiden(uint16_t(mine.b[i] >> 16));
    }
  }
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < 16; ++k)
      for (int column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) lanes[lane]->d[i] = d[lane / 4 + i / 2 * 8][2 * (lane % 4) + i % 2];
}

}  // namespace tts::emulation
