// Copies the new rows' K and V into their slots, rotated and rounded on the way where that is asked for, and rotates
// the queries of the same rows. A block takes a row; a thread takes pieces of 8 elements, or of 16 in fp8.
#include <sstream>

#include "elements.cuh"
#include "launch.h"
#include "ops.h"

namespace tts {

namespace {

constexpr int kAppendThreads = 256;

// x cos -+ its partner's x sin for dimensions [first, first + count) of a head, of which those from rotary_dim
// on stay; products and sum are rounded one by one, as plain torch does.
TTS_DEVICE void rotate(const RopeParams& p, const void* head, DType dtype, int64_t at, int64_t position, int first,
                       int count, float (&x)[kElements]) {
  const int half = int(p.rotary_dim / 2), end = int(p.rotary_dim);
  if (first >= end) return;
  const int64_t cosines = position * p.cos_sin.row, sines = cosines + half;
  float partner[kElements], cosine[kElements], sine[kElements];
  const bool within = first + count <= end && count == kElements;
  if (p.is_neox && within && (first + count <= half || first >= half)) {
    const int other = first < half ? first + half : first - half, angle = first < half ? first : first - half;
    const Raw8 raw = load_raw_8(head, dtype, at + other, count);
    const Raw8 raw_cosine = load_raw_8(p.cos_sin.data, p.cos_sin.dtype, cosines + angle, count);
    const Raw8 raw_sine = load_raw_8(p.cos_sin.data, p.cos_sin.dtype, sines + angle, count);
    widen_8(raw, dtype, partner);
    widen_8(raw_cosine, p.cos_sin.dtype, cosine);
    widen_8(raw_sine, p.cos_sin.dtype, sine);
  } else {
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      const int d = first + i;
      partner[i] = 0.0f, cosine[i] = 1.0f, sine[i] = 0.0f;
      if (i >= count || d >= end) continue;
      const int angle = !p.is_neox ? d / 2 : d < half ? d : d - half;
      partner[i] = p.is_neox ? load_element(head, dtype, at + (d < half ? d + half : d - half)) : x[i ^ 1];
      cosine[i] = load_element(p.cos_sin.data, p.cos_sin.dtype, cosines + angle);
      sine[i] = load_element(p.cos_sin.data, p.cos_sin.dtype, sines + angle);
    }
  }
#pragma unroll
  for (int i = 0; i < kElements; ++i) {
    const int d = first + i;
    const bool lower = p.is_neox ? d < half : d % 2 == 0;
    const float turned = partner[i] * sine[i];
    if (d < end) x[i] = lower ? x[i] * cosine[i] - turned : x[i] * cosine[i] + turned;
  }
}

// Dimensions [first, first + count) of a head at element `at` of `from`, to element `to` of a tensor of another dtype.
TTS_DEVICE void convert(const RopeParams* rope, const void* from, DType dtype, int64_t at, int64_t position,
                        void* target, DType target_dtype, int64_t to, int first, int count) {
  float x[kElements];
  load_8(from, dtype, at + first, count, x);
  if (rope != nullptr) rotate(*rope, from, dtype, at, position, first, count, x);
  store_8(target, target_dtype, to + first, count, x);
}

// 16 bytes, or the `count` that are left.
TTS_DEVICE void copy_bytes(char* to, const char* from, int count) {
  if (count == 16 && aligned_16(to) && aligned_16(from)) {
    store_16(to, load_16_once(from));
    return;
  }
  if (((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from) | uintptr_t(count)) & 3) == 0) {
    for (int i = 0; i < count / 4; ++i) reinterpret_cast<uint32_t*>(to)[i] = reinterpret_cast<const uint32_t*>(from)[i];
    return;
  }
  for (int i = 0; i < count; ++i) to[i] = from[i];
}

__global__ void __launch_bounds__(kAppendThreads, 2) append_kv(const __grid_constant__ CudaAppendKVParams p) {
  const AppendKVParams& rows = p.rows;
  const int64_t row = block_index(), slot = rows.slots[row];
  const int num_kv_heads = int(rows.num_kv_heads), head_dim = int(rows.row_bytes >> (rows.element_bytes / 2));
  const RopeParams* rope = p.rope.cos_sin.data ? &p.rope : nullptr;
  const int64_t position = rope && (slot >= 0 || p.rope.q) ? rope->positions[row] : 0;
  if (slot >= 0) {
    const int64_t page = slot / rows.page_size, offset = slot % rows.page_size;
    const bool copied = p.dtype == p.cache_dtype;
    const int unit = copied && rows.element_bytes == 1 ? 16 : kElements;  // elements that a thread takes
    const int units = (head_dim + unit - 1) / unit;
    for (int i = thread_index(); i < 2 * num_kv_heads * units; i += kAppendThreads) {
      const int head = i / units, first = i % units * unit, count = min(unit, head_dim - first);
      const bool is_v = head >= num_kv_heads;
      const int64_t h = is_v ? head - num_kv_heads : head;
      const void* from = is_v ? rows.v : rows.k;
      const int64_t at = is_v ? row * rows.v_row + h * rows.v_head : row * rows.k_row + h * rows.k_head;
      void* cache = is_v ? rows.v_cache : rows.k_cache;
      const int64_t to = is_v ? page * rows.v_page + offset * rows.v_token + h * rows.v_cache_head
                              : page * rows.k_page + offset * rows.k_token + h * rows.k_cache_head;
      if (copied && (is_v || rope == nullptr)) {
        char* target = static_cast<char*>(cache) + (to + first) * rows.element_bytes;
        const char* source = static_cast<const char*>(from) + (at + first) * rows.element_bytes;
        const int bytes = count * int(rows.element_bytes);
        for (int b = 0; b < bytes; b += 16) copy_bytes(target + b, source + b, min(16, bytes - b));
      } else {
        convert(is_v ? nullptr : rope, from, p.dtype, at, position, cache, p.cache_dtype, to, first, count);
      }
    }
  }
  if (p.rope.q == nullptr) return;
  const int units = (head_dim + kElements - 1) / kElements;
  for (int i = thread_index(); i < int(p.rope.num_heads) * units; i += kAppendThreads) {
    const int64_t head = i / units;
    const int first = i % units * kElements, count = min(kElements, head_dim - first);
    convert(rope, p.rope.q, p.dtype, row * p.rope.q_row + head * p.rope.q_head, position, p.rope.q_out, p.dtype,
            row * p.rope.q_out_row + head * p.rope.q_out_head, first, count);
  }
}

}  // namespace

std::string describe(const CudaAppendKVParams& p) {
  std::ostringstream text;
  text << p.rows.num_rows << " rows, " << p.rows.num_kv_heads << " KV heads of "
       << p.rows.row_bytes / p.rows.element_bytes;
  return text.str();
}

void run_cuda_append_kv(const CudaAppendKVParams& p, uintptr_t stream) {
  launch(append_kv, {p.rows.num_rows, kAppendThreads, 0, stream, "append_kv"}, p);
}

}  // namespace tts
