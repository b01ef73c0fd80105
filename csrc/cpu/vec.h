// Vectors of VW floats for the code path that includes this file, as GCC/Clang vector extensions: one source serves
// every instruction set, and a width that the machine lacks is lowered by the compiler. Everything here has internal
// linkage, so that code compiled for one instruction set is never linked into another's path.
#pragma once

#include <cstdint>
#include <cstring>

#include "../params.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace {

using tts::DType;

constexpr int VW = TTS_VECTOR_WIDTH;
typedef float vf __attribute__((vector_size(VW * 4)));
typedef int32_t vi __attribute__((vector_size(VW * 4)));
typedef uint32_t vu __attribute__((vector_size(VW * 4)));
typedef float vf_any __attribute__((vector_size(VW * 4), aligned(4), may_alias));
typedef uint32_t vu_any __attribute__((vector_size(VW * 4), aligned(4), may_alias));
typedef uint16_t vh __attribute__((vector_size(VW * 2)));
typedef uint16_t vh_any __attribute__((vector_size(VW * 2), aligned(2), may_alias));
typedef uint8_t vb __attribute__((vector_size(VW)));
typedef uint8_t vb_any __attribute__((vector_size(VW), aligned(1), may_alias));

#define TTS_INLINE inline __attribute__((always_inline))
#if defined(__clang__)
#define TTS_ONE_BODY __attribute__((noinline))
#else
#define TTS_ONE_BODY __attribute__((noinline, noclone))
#endif

TTS_INLINE vf splat(float x) { return x - (vf){}; }
TTS_INLINE vi splat(int32_t x) { return x - (vi){}; }
TTS_INLINE vf load(const float* p) { return *(const vf_any*)p; }
TTS_INLINE void store(float* p, vf x) { *(vf_any*)p = x; }
TTS_INLINE vf select(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }
TTS_INLINE vf vmax(vf a, vf b) { return a > b ? a : b; }

constexpr float kMinusInf = -__builtin_inff();
constexpr float kLog2e = 1.4426950408889634f;

// 2**x split as n + f, |f| <= 1/2: the polynomial for 2**f, a minimax fit that is 1 at 0, is exact to fp32 rounding
// (degree 6) or to 3e-6, far below a bf16 ulp (degree 4). x below -126, -inf included, gives exactly 0; nan stays nan.
template <int kDegree>
TTS_INLINE vf exp2_(vf x) {
  const vf magic = splat(12582912.0f);  // 1.5 * 2**23: adding it rounds to the nearest integer
  vf t = x + magic;
  vf f = x - (t - magic);
  vf y;
  if (kDegree == 4) {
    y = splat(9.58285e-3f) * f + splat(5.590643e-2f);
    y = y * f + splat(0.24024099f);
    y = y * f + splat(0.69312419f);
    y = y * f + splat(1.0f);
  } else {
    y = splat(1.53533616e-4f) * f + splat(1.33988745e-3f);
    y = y * f + splat(9.61843736e-3f);
    y = y * f + splat(5.55033247e-2f);
    y = y * f + splat(0.240226479f);
    y = y * f + splat(0.693147203f);
    y = y * f + splat(1.0f);
  }
  vu n = (vu)t << 23;  // the integer sits in the low bits of t; the rest is shifted out
  vu r = ((vu)y + n) & ~(vu)(x < splat(-126.0f));
  if (kDegree == 6) r |= (vu)(x != x);  // scores of bf16 tiles hold no nan but the default one, which survives
  return (vf)r;
}

// tanh without cancellation near 0: with e = exp(2x) - 1, tanh = e / (e + 2); e = 2**n * (2**f - 1) + (2**n - 1).
TTS_INLINE vf tanh_(vf x) {
  const vf magic = splat(12582912.0f);
  vf z = x * splat(2.0f * kLog2e);
  z = z > splat(60.0f) ? splat(60.0f) : z;
  z = z < splat(-60.0f) ? splat(-60.0f) : z;
  vf t = z + magic;
  vf f = z - (t - magic);
  vf y = splat(1.5252734e-5f) * f + splat(1.5403530e-4f);
  y = y * f + splat(1.3333558e-3f);
  y = y * f + splat(9.6181291e-3f);
  y = y * f + splat(5.5504109e-2f);
  y = y * f + splat(2.4022651e-1f);
  y = y * f + splat(6.9314718e-1f);
  y = y * f;
  vf two_n = (vf)(((vu)t << 23) + 0x3f800000u);
  vf e = two_n * y + (two_n - splat(1.0f));
  return e / (e + splat(2.0f));
}

// Zero-extension of 16-bit lanes; GCC 12 builds the conversion from two halves where one instruction would do.
TTS_INLINE vu widen_bits(vh x) {
#if defined(__AVX512F__) && TTS_VECTOR_WIDTH == 16
  return (vu)_mm512_cvtepu16_epi32((__m256i)x);
#elif defined(__AVX2__) && TTS_VECTOR_WIDTH == 8
  return (vu)_mm256_cvtepu16_epi32((__m128i)x);
#else
  return __builtin_convertvector(x, vu);
#endif
}

TTS_INLINE vf widen_bf16(vh x) { return (vf)(widen_bits(x) << 16); }

TTS_INLINE vf widen_f16(vh x) {
#if defined(__AVX512F__) && TTS_VECTOR_WIDTH == 16
  return (vf)_mm512_cvtph_ps((__m256i)x);
#elif defined(__F16C__) && TTS_VECTOR_WIDTH == 8
  return (vf)_mm256_cvtph_ps((__m128i)x);
#else
  vu h = widen_bits(x);
  vu magnitude = h & 0x7fffu;
  vu normal = (magnitude << 13) + (112u << 23);
  vu special = normal + (112u << 23);                                           // inf and nan
  vf tiny = __builtin_convertvector((vi)magnitude, vf) * splat(5.9604645e-8f);  // subnormal: m * 2**-24
  vf r = select((vi)(magnitude >= 0x7c00u), (vf)special, (vf)normal);
  r = select((vi)(magnitude < 0x400u), tiny, r);
  return (vf)((vu)r | ((h & 0x8000u) << 16));
#endif
}

TTS_INLINE vf widen_f8e4m3(vb x) {
  vu b = __builtin_convertvector(x, vu);
  vu magnitude = b & 0x7fu;
  vf normal = (vf)((magnitude << 20) + (120u << 23));
  vf tiny = __builtin_convertvector((vi)magnitude, vf) * splat(1.0f / 512.0f);  // subnormal: m * 2**-9
  vf r = select((vi)(magnitude < 8u), tiny, normal);
  vu nan = (vu)(magnitude == 0x7fu) & 0x7fc00000u;
  return (vf)((vu)r | nan | ((b & 0x80u) << 24));
}

// VW elements of the named dtype, as floats.
template <DType kType>
TTS_INLINE vf load_as_float(const void* base, int64_t index) {
  if (kType == DType::f32) return load((const float*)base + index);
  if (kType == DType::f16) return widen_f16(*(const vh_any*)((const uint16_t*)base + index));
  if (kType == DType::bf16) return widen_bf16(*(const vh_any*)((const uint16_t*)base + index));
  return widen_f8e4m3(*(const vb_any*)((const uint8_t*)base + index));
}

TTS_INLINE vh narrow_bf16(vf x) {  // round to nearest even, nan stays nan
  vu u = (vu)x;
  vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  vu nan = (u >> 16) | 0x40u;
  return __builtin_convertvector((vu)select((vi)((u & 0x7fffffffu) > 0x7f800000u), (vf)nan, (vf)rounded), vh);
}

TTS_INLINE vh narrow_f16(vf x) {  // round to nearest even
#if defined(__AVX512F__) && TTS_VECTOR_WIDTH == 16
  return (vh)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__) && TTS_VECTOR_WIDTH == 8
  return (vh)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
#else
  vu u = (vu)x;
  vu sign = (u >> 16) & 0x8000u;
  vu a = u & 0x7fffffffu;
  vu normal = (a - (112u << 23) + 0xfffu + ((a >> 13) & 1u)) >> 13;
  vu tiny = (vu)((vf)a + splat(0.5f)) - 0x3f000000u;  // the addition rounds at the subnormals' ulp, 2**-24
  vu special = (vu)select((vi)(a > 0x7f800000u), (vf)((vu){} + 0x7e00u), (vf)((vu){} + 0x7c00u));
  vu r = (vu)select((vi)(a < (113u << 23)), (vf)tiny, (vf)normal);
  r = (vu)select((vi)(a >= 0x47800000u), (vf)special, (vf)r);
  return __builtin_convertvector(r | sign, vh);
#endif
}

TTS_INLINE void store_as(DType dtype, void* base, int64_t index, vf x) {
  if (dtype == DType::f32)
    store((float*)base + index, x);
  else if (dtype == DType::f16)
    *(vh_any*)((uint16_t*)base + index) = narrow_f16(x);
  else
    *(vh_any*)((uint16_t*)base + index) = narrow_bf16(x);
}

// The last elements of a row that is no multiple of VW long go through a small buffer, so nothing outside it is
// touched.
template <DType kType>
TTS_INLINE vf load_tail_as_float(const void* base, int64_t index, int count) {
  unsigned char buffer[VW * 4] = {};
  const int64_t bytes = kType == DType::f32 ? 4 : kType == DType::f8e4m3 ? 1 : 2;
  for (int64_t i = 0; i < count * bytes; ++i) buffer[i] = ((const unsigned char*)base)[index * bytes + i];
  return load_as_float<kType>(buffer, 0);
}

TTS_INLINE void store_tail_as(DType dtype, void* base, int64_t index, vf x, int count) {
  unsigned char buffer[VW * 4];
  store_as(dtype, buffer, 0, x);
  const int64_t bytes = dtype == DType::f32 ? 4 : 2;
  for (int64_t i = 0; i < count * bytes; ++i) ((unsigned char*)base)[index * bytes + i] = buffer[i];
}

// count floats from base[index...] into dst, zero up to the next multiple of VW.
template <DType kType>
TTS_INLINE void widen_row(float* dst, const void* base, int64_t index, int count) {
  int d = 0;
  for (; d + VW <= count; d += VW) store(dst + d, load_as_float<kType>(base, index + d));
  if (d < count) store(dst + d, load_tail_as_float<kType>(base, index + d, count - d));
}

TTS_INLINE void widen_row(DType dtype, float* dst, const void* base, int64_t index, int count) {
  if (dtype == DType::f32) widen_row<DType::f32>(dst, base, index, count);
  if (dtype == DType::f16) widen_row<DType::f16>(dst, base, index, count);
  if (dtype == DType::bf16) widen_row<DType::bf16>(dst, base, index, count);
  if (dtype == DType::f8e4m3) widen_row<DType::f8e4m3>(dst, base, index, count);
}

}  // namespace
