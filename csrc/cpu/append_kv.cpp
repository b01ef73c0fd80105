// Copies the new rows' K and V into their slots. Rows are small and few: one thread streams them.
#include <cstring>

#include "ops.h"

namespace tts {

void run_append_kv(const AppendKVParams& p) {
  for (int64_t row = 0; row < p.num_rows; ++row) {
    const int64_t slot = p.slots[row];
    if (slot < 0) continue;
    const int64_t page = slot / p.page_size, offset = slot % p.page_size;
    for (int64_t head = 0; head < p.num_kv_heads; ++head) {
      const auto copy = [&](void* cache, int64_t to, const void* from, int64_t at) {
        std::memcpy(static_cast<char*>(cache) + to * p.element_bytes,
                    static_cast<const char*>(from) + at * p.element_bytes, p.row_bytes);
      };
      copy(p.k_cache, page * p.k_page + offset * p.k_token + head * p.k_cache_head, p.k,
           row * p.k_row + head * p.k_head);
      copy(p.v_cache, page * p.v_page + offset * p.v_token + head * p.v_cache_head, p.v,
           row * p.v_row + head * p.v_head);
    }
  }
}

}  // namespace tts
