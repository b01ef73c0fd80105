// What csrc/cuda/launch.h promises, on the emulated machine.
#pragma once

#include "emulation.h"

namespace tts {

inline bool cuda_is_emulated() { return true; }
inline void cuda_emulation_seed(uint64_t seed, int multiprocessors, uint64_t most_turns) {
  emulation::machine.seed(seed);
  emulation::machine.multiprocessors = multiprocessors;
  emulation::machine.most_turns = most_turns;
}

inline int current_device() { return 0; }

class DeviceGuard {
 public:
  explicit DeviceGuard(int) {}
};

inline int multiprocessor_count(int) { return emulation::machine.multiprocessors; }

template <typename P>
int blocks_per_multiprocessor(void (*)(P), int block, int64_t shared_bytes) {
  return int(std::min<int64_t>(2048 / block, emulation::kMaxSharedBytes / std::max<int64_t>(shared_bytes + 1024, 1)));
}

template <typename P>
void launch(void (*kernel)(P), const Launch& at, const P& params) {
  if (at.grid == 0) return;
  if (at.grid < 0 || at.grid > INT32_MAX) fail_launch(at, params, "too many blocks");
  if (at.block <= 0 || at.block > 1024 || at.block % emulation::kLanes != 0)
    fail_launch(at, params, "a block is 1 to 32 whole warps");
  if (at.shared_bytes < 0 || at.shared_bytes > emulation::kMaxSharedBytes)
    fail_launch(at, params, "too much shared memory");
  struct State {
    void (*kernel)(P);
    const P* params;
  } state = {kernel, &params};
  const auto run = [](const void* state) {
    const State& s = *static_cast<const State*>(state);
    s.kernel(*s.params);
  };
  try {
    emulation::machine.run({at.grid, at.block, size_t(at.shared_bytes), at.name, run, &state});
  } catch (const std::runtime_error& error) {
    fail_launch(at, params, error.what());
  }
}

}  // namespace tts
