// The softmax of one score tile, and the fold of two partial states. Scores stand as [token][row lane], so that every
// reduction over tokens is vertical and no row ever meets another one.
#pragma once

#include "vec.h"

namespace {

// What each row lane of a tile may see: tokens [first, last) of the node.
struct Sight {
  int32_t* first;  // [lanes]
  int32_t* last;   // [lanes]
};

// scores [tokens][kVectors * VW], tokens from `token` of the node on -> probabilities relative to the running maximum.
//   x = scores * factor (base 2 logits; factor > 0); m, l: running state; rescale: what the earlier output is worth now.
// Output: fp32 in place, or (pairs != null) bf16 pairs of tokens, pairs [kVectors][tokens / 2 rounded up][VW].
// meanwhile(): called every 8 vectors, for work of another unit that may overlap.
// The two sums are those of the even and of the odd tokens, whichever a tile begins with: their sum is the same.
template <int kVectors, int kExpDegree, typename Meanwhile>
TTS_INLINE void softmax_tile(float* scores, int count, int token, bool masked, const Sight& sight, float factor,
                             float softcap, float* m, float* l, float* rescale, uint32_t* pairs, int pair_stride,
                             const Meanwhile& meanwhile) {
  constexpr int kLanes = kVectors * VW;
  if (softcap > 0.0f) {
    const vf inner = splat(factor / softcap), outer = splat(softcap * kLog2e);
    for (int t = 0; t < count; ++t)
      for (int v = 0; v < kVectors; ++v) {
        float* s = scores + t * kLanes + v * VW;
        store(s, tanh_(load(s) * inner) * outer);
      }
    factor = 1.0f;
  }
  if (masked) {
    for (int t = 0; t < count; ++t)
      for (int v = 0; v < kVectors; ++v) {
        float* s = scores + t * kLanes + v * VW;
        vi at = splat(int32_t(token + t));
        vi first = (vi)load((const float*)sight.first + v * VW), last = (vi)load((const float*)sight.last + v * VW);
        store(s, select((at >= first) & (at < last), load(s), splat(kMinusInf)));
      }
  }
  const vf scale = splat(factor);
  for (int v = 0; v < kVectors; ++v) {
    const float* s = scores + v * VW;
    vf a = splat(kMinusInf), b = a;
    int t = 0;
    for (; t + 2 <= count; t += 2) {
      a = vmax(a, load(s + t * kLanes));
      b = vmax(b, load(s + (t + 1) * kLanes));
    }
    if (t < count) a = vmax(a, load(s + t * kLanes));
    vf before = load(m + v * VW);
    vf now = vmax(before, vmax(a, b) * scale);
    store(m + v * VW, now);
    vf shift = select(now == splat(kMinusInf), splat(0.0f), now);  // a row that saw nothing yet: every exp2 below is 0
    vf keep = exp2_<6>(before - shift);
    store(rescale + v * VW, keep);

    vf sum0 = splat(0.0f), sum1 = sum0;
    float* p = scores + v * VW;
    uint32_t* out = pairs ? pairs + v * pair_stride : nullptr;
    for (t = 0; t < count; t += 2) {
      vf p0 = exp2_<kExpDegree>(load(p + t * kLanes) * scale - shift);
      vf p1 = splat(0.0f);
      if (t + 1 < count) p1 = exp2_<kExpDegree>(load(p + (t + 1) * kLanes) * scale - shift);
      sum0 += p0;
      sum1 += p1;
      if (out) {
        vu low = ((vu)p0 + 0x8000u) >> 16, high = ((vu)p1 + 0x8000u) & 0xffff0000u;
        *(vu_any*)(out + (t / 2) * VW) = low | high;
      } else {
        store(p + t * kLanes, p0);
        if (t + 1 < count) store(p + (t + 1) * kLanes, p1);
      }
      if ((t & 6) == 6) meanwhile();
    }
    store(l + v * VW, load(l + v * VW) * keep + (sum0 + sum1));
  }
}

// (m, l, o) <- (m, l, o) + (m2, l2, o2). One body for every caller, never inlined, so that folding chunks inside an
// item and folding them later give the same bits. A state with l = 0 saw nothing and its o is not read.
TTS_ONE_BODY void fold_state(float* m, float* l, float* o, float m2, float l2, const float* o2, int count) {
  if (l2 == 0.0f) return;
  if (*l == 0.0f) {
    for (int d = 0; d < count; d += VW) store(o + d, load(o2 + d));
    *m = m2;
    *l = l2;
    return;
  }
  float top = *m > m2 ? *m : m2;
  float a = __builtin_exp2f(*m - top), b = __builtin_exp2f(m2 - top);
  for (int d = 0; d < count; d += VW) store(o + d, load(o + d) * splat(a) + load(o2 + d) * splat(b));
  *m = top;
  *l = *l * a + l2 * b;
}

}  // namespace
