// Eight consecutive elements of any dtype, as the kernels of the small ops take them: their dtype is a value, not a
// template. First the bits of all operands are asked for, then they are converted, so that loads do not wait for one
// another. Whether 16 bytes come at once or an element at a time depends on the address and changes no bit.
#pragma once

#include "../params.h"
#include "device.cuh"

namespace tts {

constexpr int kElements = 8;

struct Raw8 {
  Bits128 part[2];  // fp32 fills both
};

TTS_DEVICE bool aligned_16(const void* p) { return (reinterpret_cast<uintptr_t>(p) & 15) == 0; }

TTS_DEVICE const char* element_at(const void* data, DType dtype, int64_t index) {
  return static_cast<const char*>(data) + index * (dtype == DType::f32 ? 4 : 2);
}

// Elements [index, index + count) of `data`, count at most 8, zeros behind them. Not of fp8.
TTS_DEVICE Raw8 load_raw_8(const void* data, DType dtype, int64_t index, int count) {
  const char* from = element_at(data, dtype, index);
  Raw8 raw = {};
  if (count == kElements && aligned_16(from)) {
    raw.part[0] = load_16(from);
    if (dtype == DType::f32) raw.part[1] = load_16(from + 16);
    return raw;
  }
#pragma unroll
  for (int i = 0; i < kElements; ++i) {
    if (i >= count) break;
    if (dtype == DType::f32)
      raw.part[i / 4].word[i % 4] = reinterpret_cast<const uint32_t*>(from)[i];
    else
      raw.part[0].word[i / 2] |= uint32_t(reinterpret_cast<const uint16_t*>(from)[i]) << (16 * (i % 2));
  }
  return raw;
}

TTS_DEVICE float widen_bits(uint16_t bits, DType dtype) {
  return dtype == DType::f16 ? widen<F16>(bits) : widen<BF16>(bits);
}

TTS_DEVICE void widen_8(const Raw8& raw, DType dtype, float (&x)[kElements]) {
#pragma unroll
  for (int i = 0; i < kElements; ++i) {
    if (dtype == DType::f32)
      x[i] = float_of(raw.part[i / 4].word[i % 4]);
    else
      x[i] = widen_bits(uint16_t(raw.part[0].word[i / 2] >> (16 * (i % 2))), dtype);
  }
}

TTS_DEVICE void load_8(const void* data, DType dtype, int64_t index, int count, float (&x)[kElements]) {
  widen_8(load_raw_8(data, dtype, index, count), dtype, x);
}

TTS_DEVICE float load_element(const void* data, DType dtype, int64_t index) {
  const char* from = element_at(data, dtype, index);
  if (dtype == DType::f32) return *reinterpret_cast<const float*>(from);
  return widen_bits(*reinterpret_cast<const uint16_t*>(from), dtype);
}

// fp32 to the bits of e4m3, to nearest even, beyond +-448 to +-448, NaN kept. Integer arithmetic, since sm_80 has no
// instruction for it.
TTS_DEVICE uint32_t narrow_e4m3(float x) {
  const uint32_t sign = bits_of(x) >> 24 & 0x80, bits = bits_of(x) & 0x7fffffff;
  const uint32_t magnitude = bits < 0x43e00000 ? bits : 0x43e00000;  // 448.0
  // Normal: 20 bits of the mantissa go, half to even, and the exponent's bias becomes 7.
  uint32_t code = ((magnitude + 0x7ffff + (magnitude >> 20 & 1)) >> 20) - (120 << 3);
  // Below 2^-6: adding 2^14, whose last place is the smallest subnormal 2^-9, rounds to multiples of it.
  if (magnitude < 0x3c800000) code = bits_of(float_of(magnitude) + 16384.0f) - 0x46800000;
  return (bits > 0x7f800000 ? 0x7f : code) | sign;
}

TTS_DEVICE uint32_t narrow_bits(float x, DType dtype) {
  switch (dtype) {
    case DType::f32:
      return bits_of(x);
    case DType::f16:
      return narrow<F16>(x);
    case DType::bf16:
      return narrow<BF16>(x);
    default:
      return narrow_e4m3(x);
  }
}

// The first `count` of x, at most 8, to elements [index, index + count) of `data`.
TTS_DEVICE void store_8(void* data, DType dtype, int64_t index, int count, const float (&x)[kElements]) {
  const int bytes = dtype == DType::f32 ? 4 : dtype == DType::f8e4m3 ? 1 : 2;
  char* to = static_cast<char*>(data) + index * bytes;
  const bool whole = count == kElements && (reinterpret_cast<uintptr_t>(to) & (bytes == 1 ? 7 : 15)) == 0;
  if (!whole) {
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      if (i >= count) break;
      const uint32_t bits = narrow_bits(x[i], dtype);
      if (bytes == 4)
        reinterpret_cast<uint32_t*>(to)[i] = bits;
      else if (bytes == 2)
        reinterpret_cast<uint16_t*>(to)[i] = uint16_t(bits);
      else
        reinterpret_cast<uint8_t*>(to)[i] = uint8_t(bits);
    }
    return;
  }
  Bits128 word[2] = {};
#pragma unroll
  for (int i = 0; i < kElements; ++i) {
    const uint32_t bits = narrow_bits(x[i], dtype);
    if (bytes == 4)
      word[i / 4].word[i % 4] = bits;
    else if (bytes == 2)
      word[0].word[i / 2] |= bits << (16 * (i % 2));
    else
      word[0].word[i / 4] |= bits << (8 * (i % 4));
  }
  if (bytes == 1) {
    *reinterpret_cast<uint64_t*>(to) = uint64_t(word[0].word[1]) << 32 | word[0].word[0];
    return;
  }
  store_16(to, word[0]);
  if (bytes == 4) store_16(to + 16, word[1]);
}

}  // namespace tts
