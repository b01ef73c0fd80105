// Scratch that a thread keeps between calls: it grows to the largest call and is freed with the thread.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

namespace tts {

class Arena {
 public:
  ~Arena() { std::free(base_); }
  char* at_least(int64_t bytes) {
    if (bytes > size_) {
      std::free(base_);
      size_ = (bytes + bytes / 4 + 4095) / 4096 * 4096;
      base_ = static_cast<char*>(std::aligned_alloc(4096, size_));
      if (base_ == nullptr) {
        size_ = 0;
        throw std::bad_alloc();
      }
    }
    return base_;
  }

 private:
  char* base_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace tts
