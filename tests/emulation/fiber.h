// Fibers: stacks of their own and a switch between them in user space, on x86-64 and aarch64 Linux.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>

#if defined(__SANITIZE_ADDRESS__)
#define TTS_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define TTS_ASAN 1
#endif
#endif

#ifdef TTS_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// Saves what a callee must keep, notes the stack pointer in *from, and returns on the stack `to`. In a COMDAT section, so
// that every object may hold it.
extern "C" void tts_switch_stack(void** from, void* to);
asm(R"(
  .pushsection .text.tts_switch_stack, "axG", %progbits, tts_switch_stack, comdat
  .weak tts_switch_stack
  .hidden tts_switch_stack
  .type tts_switch_stack, %function
tts_switch_stack:
)"
#if defined(__x86_64__)
    R"(
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)"
#elif defined(__aarch64__)
    R"(
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
)"
#else
#error "fibers are written for x86-64 and aarch64"
#endif
    R"(
  .size tts_switch_stack, . - tts_switch_stack
  .popsection
)");

namespace tts::emulation {

struct Fiber {
  void* sp = nullptr;
  char* stack = nullptr;  // its lowest address
  size_t bytes = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's

  // The next switch to it calls `entry`, which must never return.
  void prepare(void (*entry)()) {
#ifdef TTS_ASAN
    __asan_unpoison_memory_region(stack, bytes);  // what an abandoned run left
#endif
    fake_stack = nullptr;
    void** top = reinterpret_cast<void**>(stack + bytes);
#if defined(__x86_64__)
    *--top = nullptr;  // where backtraces end
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
#else
    for (int i = 0; i < 20; ++i) *--top = nullptr;
    top[11] = reinterpret_cast<void*>(entry);  // x30
#endif
    sp = top;
  }
};

// From the running fiber to another one. Returns when something switches back.
inline void switch_fiber(Fiber& from, Fiber& to) {
#ifdef TTS_ASAN
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.bytes);
#endif
  tts_switch_stack(&from.sp, to.sp);
#ifdef TTS_ASAN
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

// First thing on a fresh fiber; `from` is the fiber that switched to it, whose stack is noted where it was not known.
inline void enter_fiber(Fiber& from) {
#ifdef TTS_ASAN
  const void* stack = nullptr;
  size_t bytes = 0;
  __sanitizer_finish_switch_fiber(nullptr, &stack, &bytes);
  if (from.stack == nullptr) from.stack = static_cast<char*>(const_cast<void*>(stack)), from.bytes = bytes;
#else
  (void)from;
#endif
}

// Stacks in one mapping, kept for ever and touched only as far as they are used. What lies below each faults.
class Stacks {
 public:
  // Stack i, set into `fiber`. Tops are staggered: at equal distances all would fall on the same lines of a cache.
  void take(int i, Fiber* fiber) {
    if (i >= kMax) throw std::runtime_error("emulation: too many threads at a time");
    if (base_ == nullptr) {
      void* memory = mmap(nullptr, kMax * kPitch, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (memory == MAP_FAILED) throw std::runtime_error("emulation: no memory for stacks");
      base_ = static_cast<char*>(memory);
    }
    for (; opened_ <= i; ++opened_)
      if (mprotect(base_ + opened_ * kPitch + kGuard, kBytes, PROT_READ | PROT_WRITE) != 0)
        throw std::runtime_error("emulation: no memory for stacks");
    fiber->stack = base_ + i * kPitch + kGuard;
    fiber->bytes = kBytes - size_t(i) * 192 % 4096;
  }

 private:
#ifdef TTS_ASAN
  static constexpr size_t kBytes = 256 << 10;
#else
  static constexpr size_t kBytes = 64 << 10;
#endif
  static constexpr size_t kGuard = 64 << 10;  // the largest page of the machines at hand
  static constexpr size_t kPitch = kBytes + kGuard;
  static constexpr int kMax = 2048;
  char* base_ = nullptr;
  int opened_ = 0;
};

}  // namespace tts::emulation
