// Warp functions and barriers, where threads wait for one another; errors, which say who waits where.
#pragma once

#include "machine.h"

namespace tts::emulation {

inline bool Machine::arrive(const Site& site, void* operand) {
  Warp* warp = current->warp;
  current->at = site;
  if (warp->ended != 0)
    fail(describe(site) + " needs all lanes, but lanes " + list_lanes(warp->ended) + " of the warp have ended");
  if (warp->arrived == 0) {
    warp->at = site;
  } else if (warp->at.line != site.line || std::strcmp(warp->at.name, site.name) != 0 ||
             std::strcmp(warp->at.file, site.file) != 0) {
    fail("the thread is at " + describe(site) + " while lanes " + list_lanes(warp->arrived) + " of its warp are at " +
         describe(warp->at));
  }
  warp->arrived |= bit(current);
  warp->operands[current->index % kLanes] = operand;
  return warp->arrived == kAllLanes;
}

inline int Machine::meet_at_barrier(const Site& site, int number, int threads, bool condition) {
  struct Arrival {
    int number, threads;
    bool condition;
  } mine = {number, threads, condition};
  if (!arrive(site, &mine)) {
    next();
    return current->block->barriers[number].result;
  }
  Warp* warp = current->warp;
  Block* block = current->block;
  if (number < 0 || number >= kBarriers || threads <= 0 || threads > block->size || threads % kLanes != 0)
    fail(describe(site) + ": no such barrier: number " + std::to_string(number) + ", " + std::to_string(threads) +
         " threads");
  Barrier& barrier = block->barriers[number];
  for (void* operand : warp->operands) {
    const Arrival& lane = *static_cast<Arrival*>(operand);
    if (lane.number != number || lane.threads != threads) fail(describe(site) + ": lanes name different barriers");
    barrier.count += lane.condition;
  }
  if (barrier.arrived > 0 && barrier.expected != threads)
    fail(describe(site) + ": other warps wait there for " + std::to_string(barrier.expected) + " threads");
  barrier.expected = threads;
  barrier.arrived += kLanes;
  barrier.waiting.push_back(warp);
  if (barrier.arrived < barrier.expected) {
    next();
    return block->barriers[number].result;
  }
  barrier.result = barrier.count;
  for (Warp* other : barrier.waiting) {
    order_warp(other);
    block->written.insert(block->written.end(), other->written.begin(), other->written.end());
    other->written.clear();
    if (other == warp) continue;
    other->arrived = 0;
    set_ready(other, kAllLanes);
  }
  barrier.waiting.clear();
  barrier.arrived = barrier.count = 0;
  release(warp);
  return barrier.result;
}

inline std::string Machine::where() const {
  std::ostringstream text;
  for (auto& block : blocks_) {
    if (block->size == 0) continue;
    text << "\n  block " << block->index << ":";
    for (const Warp& warp : block->warps) {
      text << "\n    warp " << warp.index << ":";
      if (warp.ended) text << " lanes " << list_lanes(warp.ended) << " ended";
      if (warp.arrived) text << " lanes " << list_lanes(warp.arrived) << " at " << describe(warp.at);
      if (warp.parked) {
        const Thread& first = warp.threads[__builtin_ctz(warp.parked)];
        text << " lanes " << list_lanes(warp.parked) << " at " << describe(first.at);
      }
      if (warp.ready) text << " lanes " << list_lanes(warp.ready) << " could go on";
    }
    for (int i = 0; i < kBarriers; ++i)
      if (block->barriers[i].arrived > 0)
        text << "\n    barrier " << i << ": " << block->barriers[i].arrived << " of " << block->barriers[i].expected
             << " threads";
    for (const auto& [at, barrier] : block->phases)
      if (!barrier.waiting.empty())
        text << "\n    barrier at byte " << reinterpret_cast<char*>(at) - block->shared << ", phase " << barrier.phase
             << ": waits for " << barrier.pending << " arrivals, " << barrier.bytes << " bytes";
  }
  return text.str();
}

// Ends the launch: the host throws, and what the fibers were doing is given up.
inline void Machine::fail(const std::string& what) {
  failed_ = true;
  failure_ =
      "block " + std::to_string(current->block->index) + ", thread " + std::to_string(current->index) + ": " + what;
  leaving_ = &current->fiber;
  switch_fiber(current->fiber, host_);
  std::abort();
}

}  // namespace tts::emulation
