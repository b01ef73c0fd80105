// What other threads see of a thread's stores, and when; copies on their way into shared memory.
#pragma once

#include "machine.h"

namespace tts::emulation {

inline void Machine::order_warp(Warp* warp) {
  for (int lane = 0; lane < kLanes; ++lane) {
    std::vector<uint32_t*>& written = warp->threads[lane].written;
    warp->written.insert(warp->written.end(), written.begin(), written.end());
    written.clear();
  }
}

inline void Machine::publish(Block* block, uint32_t* to) {
  const auto found = block->stores.find(to);
  if (found == block->stores.end()) return;
  *to = found->second;
  block->stores.erase(found);
}

inline void Machine::store_words(void* to, const uint32_t* words, int count) {
  Block* block = current->block;
  uint32_t* target = static_cast<uint32_t*>(to);
  const bool direct = block->in_shared(to) || chance(16);
  if (!block->in_shared(to)) release();
  for (int i = 0; i < count; ++i) {
    if (direct) {
      block->stores.erase(target + i);
      target[i] = words[i];
    } else {
      std::memset(target + i, kPoison, 4);
      block->stores[target + i] = words[i];
      current->written.push_back(target + i);
    }
  }
  if (!block->in_shared(to)) maybe_yield();
}

inline void Machine::load_words(const void* from, uint32_t* words, int count) const {
  const Block* block = current->block;
  uint32_t* source = static_cast<uint32_t*>(const_cast<void*>(from));
  for (int i = 0; i < count; ++i) {
    const auto found = block->stores.empty() ? block->stores.end() : block->stores.find(source + i);
    words[i] = found == block->stores.end() ? source[i] : found->second;
  }
}

inline void Machine::fence() {
  maybe_sleep();
  Thread* self = current;
  for (std::vector<uint32_t*>* words : {&self->written, &self->warp->written})
    self->fenced.insert(self->fenced.end(), words->begin(), words->end());
  self->fenced_of_block = self->block->written.size();
  maybe_yield();
}

inline void Machine::release() {
  Block* block = current->block;
  for (uint32_t* to : current->fenced) publish(block, to);
  current->fenced.clear();
  for (; block->published < current->fenced_of_block; ++block->published)
    publish(block, block->written[block->published]);
}

inline void Machine::land(const Copy& copy) {
  if (copy.from != nullptr) {
    std::memcpy(copy.to, copy.from, 16);
  } else {
    std::memset(copy.to, 0, 16);
  }
  Block* block = current->block;
  if (block->phases.empty()) return;  // nothing of this kernel is asynchronous but such copies
  if (block->unfenced.empty()) block->unfenced.assign(block->shared_bytes / 16, -1);
  const int piece = int((static_cast<char*>(copy.to) - block->shared) / 16);
  block->unfenced[piece] = current->index;
  current->landed.push_back(piece);
}

inline void Machine::copy(const Site& site, void* to, const void* from, bool valid) {
  const Block* block = current->block;
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0 || (valid && reinterpret_cast<uintptr_t>(from) % 16 != 0))
    fail(describe(site) + ": an address is not a multiple of 16");
  if (!block->in_shared(to) || !block->in_shared(static_cast<char*>(to) + 15))
    fail(describe(site) + ": the target is not in the block's shared memory");
  std::memset(to, kPoison, 16);
  const Copy issued = {to, valid ? from : nullptr, current->group};
  if (chance(16)) {
    land(issued);
  } else {
    current->copies.push_back(issued);
  }
}

inline void Machine::commit_copies() {
  ++current->group;
  if (chance(4)) wait_for_copies(0);
}

inline void Machine::wait_for_copies(int groups_left) {
  std::vector<Copy>& copies = current->copies;
  size_t kept = 0;
  for (const Copy& copy : copies) {
    if (copy.group < current->group - groups_left) {
      land(copy);
    } else {
      copies[kept++] = copy;
    }
  }
  copies.resize(kept);
}

}  // namespace tts::emulation
