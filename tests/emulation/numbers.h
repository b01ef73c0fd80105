// 16-bit floating-point numbers as bits, by their formats. Which format: the tags of device.cuh.
#pragma once

#include <cstdint>
#include <cstring>

namespace tts::emulation {

inline uint32_t to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// binary16: 5 bits of exponent, bias 15. Moved to where fp32 has its exponent it is 2^-112 times the number, subnormal
// or not; only infinity and NaN have to be told apart.
inline float widen_f16(uint16_t x) {
  const uint32_t magnitude = x & 0x7fffu, sign = uint32_t(x & 0x8000u) << 16;
  if (magnitude >= 0x7c00u) return from_bits(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  return from_bits(sign | to_bits(from_bits(magnitude << 13) * 0x1p112f));
}
inline float widen_bf16(uint16_t x) { return from_bits(uint32_t(x) << 16); }

// To nearest even. NaN becomes 0x7fff, as cvt.rn makes it.
inline uint16_t narrow_f16(float x) {
  const uint32_t bits = to_bits(x), magnitude = bits & 0x7fffffffu;
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000u);
  if (magnitude > 0x7f800000u) return 0x7fff;
  if (magnitude >= 0x477ff000u) return sign | 0x7c00;  // 65520 and beyond round to infinity
  if (magnitude < 0x38800000u) {                       // below 2^-14: units of 2^-24, where 0.5 has its last bit
    return uint16_t(sign | (to_bits(from_bits(magnitude) + 0.5f) - to_bits(0.5f)));
  }
  const uint32_t odd = magnitude >> 13 & 1u;
  return uint16_t(sign | ((magnitude - 0x38000000u + 0xfffu + odd) >> 13));
}
inline uint16_t narrow_bf16(float x) {
  const uint32_t bits = to_bits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

}  // namespace tts::emulation
