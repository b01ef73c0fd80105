// Who goes on when one waits; blocks from their first thread to their last.
#pragma once

#include "machine.h"

namespace tts::emulation {

inline void Machine::set_ready(Warp* warp, uint32_t lanes) {
  warp->ready = lanes;
  if (lanes != 0 && warp->place < 0) {
    warp->place = int(ready_.size());
    ready_.push_back(warp);
  } else if (lanes == 0 && warp->place >= 0) {
    ready_[warp->place] = ready_.back();
    ready_[warp->place]->place = warp->place;
    ready_.pop_back();
    warp->place = -1;
  }
}

// Some of what goes on beside the threads happens: by chance, and where there is nobody else to go on.
inline void Machine::go_on_beside() {
  if (!tiles_.empty() && chance(int(tile_in_))) land_tile(draw(uint32_t(tiles_.size())));
  if (!multiplying_.empty() && chance(int(product_in_))) multiply(draw(uint32_t(multiplying_.size())), chance(2));
  while (ready_.empty() && sleeping_.empty() && !failed_ && !(tiles_.empty() && multiplying_.empty())) {
    if (!tiles_.empty() && (multiplying_.empty() || chance(2)))
      land_tile(draw(uint32_t(tiles_.size())));
    else
      multiply(draw(uint32_t(multiplying_.size())), chance(2));
  }
}

// One of the threads that can go on, null if there is none. By chance, but with runs of turns in one warp whose length
// differs by launch, from even progress of all warps to one that is far ahead; and now and then one falls asleep, for
// a time that differs by launch too, up to when nobody else can go on.
inline Thread* Machine::pick() {
  if (!tiles_.empty() || !multiplying_.empty()) go_on_beside();
  if (failed_) return nullptr;
  while (!sleeping_.empty() && (ready_.empty() || draw(wake_in_) == 0)) {
    std::swap(sleeping_[draw(uint32_t(sleeping_.size()))], sleeping_.back());
    Thread* thread = sleeping_.back();
    sleeping_.pop_back();
    set_ready(thread->warp, thread->warp->ready | bit(thread));
  }
  if (ready_.empty()) return nullptr;
  Warp* warp = last_;
  int lane;
  if (shuffled) {
    if (warp == nullptr || warp->place < 0 || draw(stay_in_) == 0) warp = ready_[draw(uint32_t(ready_.size()))];
    const uint32_t turn = draw(kLanes);
    const uint32_t turned = turn == 0 ? warp->ready : warp->ready >> turn | warp->ready << (kLanes - turn);
    lane = int(uint32_t(__builtin_ctz(turned)) + turn) % kLanes;
  } else {
    if (warp == nullptr || warp->place < 0) {
      warp = ready_[0];
      for (Warp* other : ready_)
        if (other->block->index < warp->block->index || (other->block == warp->block && other->index < warp->index))
          warp = other;
    }
    lane = __builtin_ctz(warp->ready);
  }
  last_ = warp;
  set_ready(warp, warp->ready & ~(1u << lane));
  if (!chance(kSleepsIn) || ready_.empty()) return warp->threads + lane;
  sleeping_.push_back(warp->threads + lane);
  return pick();
}

// The current thread waits, or gives up its turn: on to another one.
inline void Machine::next() {
  if (++turns_ > most_turns) fail("the launch goes on without end");
  Thread* self = current;
  Thread* other = pick();
  if (other == self) return;
  leaving_ = &self->fiber;
  current = other;
  switch_fiber(self->fiber, other != nullptr ? other->fiber : host_);
}

inline void Machine::thread_main() {
  Machine& m = machine;
  enter_fiber(*m.leaving_);
  Thread* self = m.current;
  std::string thrown;  // reported behind the handler, which must not be left by a switch
  try {
    m.grid_->run(m.grid_->state);
  } catch (const std::exception& error) {
    thrown = error.what();
  }
  if (!thrown.empty()) m.fail(thrown);
  if (!self->copies.empty()) m.fail("the thread ends with copies under way that it has not waited for");
  if (self->warp->arrived != 0)
    m.fail("the thread ends while lanes " + list_lanes(self->warp->arrived) + " of its warp wait for it at " +
           describe(self->warp->at));
  self->warp->ended |= bit(self);
  if (--self->block->live == 0) {
    m.leaving_ = &self->fiber;
    switch_fiber(self->fiber, m.host_);
  }
  m.next();
  std::abort();  // an ended thread has no turn
}

inline void Machine::begin_block(Block* block, int slot, const Grid& grid, int index) {
  block->index = index;
  block->size = block->live = grid.block_size;
  const size_t bytes = (grid.shared_bytes + 127) / 128 * 128 + 2 * kRedZone + kAligned;
#ifdef TTS_ASAN
  if (block->memory) __asan_unpoison_memory_region(block->memory.get(), block->memory_bytes);
#endif
  if (block->memory_bytes != bytes) block->memory.reset(new char[bytes]), block->memory_bytes = bytes;
  std::memset(block->memory.get(), kPoison, bytes);
  const uintptr_t first = reinterpret_cast<uintptr_t>(block->memory.get()) + kRedZone;
  block->shared = reinterpret_cast<char*>((first + kAligned - 1) / kAligned * kAligned);
  block->shared_bytes = grid.shared_bytes;
#ifdef TTS_ASAN
  __asan_poison_memory_region(block->memory.get(), bytes);
  __asan_unpoison_memory_region(block->shared, grid.shared_bytes);
#endif
  for (Barrier& barrier : block->barriers) barrier = Barrier();
  block->phases.clear(), block->unfenced.clear();
  block->groups.assign(grid.block_size / (4 * kLanes), Warpgroup());
  for (Warpgroup& group : block->groups) group.block = block;
  block->stores.clear(), block->written.clear();
  block->published = 0;
  block->threads.resize(grid.block_size);
  block->warps.assign(grid.block_size / kLanes, Warp());
  for (int w = 0; w < int(block->warps.size()); ++w) {
    Warp& warp = block->warps[w];
    warp.threads = &block->threads[w * kLanes];
    warp.block = block, warp.index = w;
    for (int lane = 0; lane < kLanes; ++lane) {
      Thread& thread = warp.threads[lane];
      thread.block = block, thread.warp = &warp, thread.index = w * kLanes + lane;
      thread.copies.clear(), thread.written.clear(), thread.fenced.clear(), thread.landed.clear();
      thread.group = 0, thread.fenced_of_block = 0;
      stacks_.take(slot * grid.block_size + thread.index, &thread.fiber);
      thread.fiber.prepare(&thread_main);
    }
    set_ready(&warp, kAllLanes);
  }
}

inline void Machine::end_block(Block* block) {
  const std::string left = left_in_groups(block);
  if (!left.empty()) failed_ = true, failure_ = "block " + std::to_string(block->index) + " ends with " + left;
#ifndef TTS_ASAN
  const auto untouched = [](const char* begin, const char* end) {
    for (; begin < end; ++begin)
      if (*begin != char(kPoison)) return false;
    return true;
  };
  const char* memory = block->memory.get();
  if (!untouched(memory, block->shared) ||
      !untouched(block->shared + block->shared_bytes, memory + block->memory_bytes)) {
    failed_ = true;
    failure_ = "block " + std::to_string(block->index) + " wrote outside of its shared memory";
  }
#endif
  if (chance(2)) {
    for (auto& [to, word] : block->stores) *to = word;
  } else {
    left_over_.insert(left_over_.end(), block->stores.begin(), block->stores.end());
  }
  block->stores.clear();
}

inline void Machine::run(const Grid& grid) {
  std::lock_guard<std::mutex> lock(mutex_);
  ++launches_;
  random_ = (seed_ * 0x9e3779b97f4a7c15ull + launches_) * 0xbf58476d1ce4e5b9ull | 1;
  for (int i = 0; i < 8; ++i) draw(2);
  shuffled = seed_ != 0;
  const uint32_t stays[] = {1, 4, 64, 1024}, wakes[] = {100, 10'000, 1'000'000};
  stay_in_ = stays[draw(4)], wake_in_ = wakes[draw(3)];
  tile_in_ = wakes[draw(3)], product_in_ = wakes[draw(3)];
  const int fit = std::max(1, kMaxThreads / grid.block_size);
  const int slots = int(std::min<int64_t>({grid.blocks, fit, shuffled ? 1 + draw(6) : 2}));
  grid_ = &grid;
  host_ = Fiber();  // launches may come from any thread of the host
  block_count = grid.blocks;
  failed_ = false;
  turns_ = 0;
  last_ = nullptr;
  ready_.clear();
  sleeping_.clear();
  tiles_.clear(), multiplying_.clear();
  left_over_.clear();
  while (int(blocks_.size()) < slots) blocks_.push_back(std::make_unique<Block>());

  // Blocks come in any order.
  std::vector<int> order(size_t(grid.blocks));
  for (size_t i = 0; i < order.size(); ++i) {
    order[i] = int(i);
    if (shuffled) std::swap(order[i], order[draw(uint32_t(i + 1))]);
  }
  size_t begun = 0;
  int alive = 0;
  for (; alive < slots; ++alive) begin_block(blocks_[alive].get(), alive, grid, order[begun++]);

  while (alive > 0) {
    leaving_ = &host_;
    current = pick();
    if (current == nullptr && !failed_) failed_ = true, failure_ = "no thread can go on:" + where();
    if (!failed_) switch_fiber(host_, current->fiber);
    if (failed_) break;
    for (int slot = 0; slot < slots; ++slot) {
      Block* block = blocks_[slot].get();
      if (block->size == 0 || block->live > 0) continue;
      end_block(block);
      block->size = 0;
      if (begun < order.size()) {
        begin_block(block, slot, grid, order[begun++]);
      } else {
        --alive;
      }
    }
    if (failed_) break;
  }
  for (auto& [to, word] : left_over_) *to = word;
  current = nullptr;
  grid_ = nullptr;
  if (failed_) {
    for (auto& block : blocks_) block->size = 0;
    std::ostringstream text;
    text << failure_ << " (emulation, seed " << seed_ << ", launch " << launches_ << ")";
    throw std::runtime_error(text.str());
  }
}

}  // namespace tts::emulation
