// A SIMT machine on the host: the threads of a block are fibers, several blocks are alive at a time, and which thread goes
// on is drawn from a seed wherever one waits. What a kernel must not lean on is made to show:
//   warp functions   happen when all 32 lanes are there; a lane that ended or stands elsewhere is an error
//   barriers         likewise for the block; where nobody can go on, the error says who waits where
//   shared memory    is NaN in every format until it is written, and ends in red zones
//   cp.async         the target is NaN from the copy's issue until the bytes land: at the wait, or earlier by chance
//   store_state, ..  the target is NaN for everyone but the block, until chance has it, or until a thread has fenced it and
//                    then changed something by an atomic or such a store
// Not modelled: caches (a plain load of what another block wrote is always fresh), the fence of a reader, races of plain
// accesses between two points where a thread may lose its turn. Time is not modelled at all.
//
// TTS_EMULATION_SEED or `seed()`: 0 is plain order, everything late; else launch n of a seed is the same each time.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <sstream>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "fiber.h"

namespace tts::emulation {

constexpr int kLanes = 32;
constexpr int kBarriers = 16;
constexpr uint32_t kAllLanes = 0xffffffffu;
constexpr int kPoison = 0xff;  // every byte: NaN in fp32, fp16, bf16 and e4m3, -1 in integers
constexpr size_t kRedZone = 1024;
constexpr int64_t kMaxSharedBytes = 227 << 10;
constexpr int kSleepsIn = 5000;    // turns
constexpr int kMaxThreads = 2048;  // alive at a time: as many as there are stacks

// Where a kernel called a function of device.cuh.
struct Site {
  const char* name = nullptr;
  const char* file = nullptr;
  int line = 0;
};

struct Block;
struct Warp;

struct Copy {
  void* to;
  const void* from;  // null: zeros
  int group;
};

struct Thread {
  Fiber fiber;
  Block* block = nullptr;
  Warp* warp = nullptr;
  int index = 0;
  Site at;                         // where it waits
  std::vector<Copy> copies;        // under way
  int group = 0;                   // the open one's number
  std::vector<uint32_t*> written;  // by store_state and not yet ordered before the block's other threads
  std::vector<uint32_t*> fenced;   // by this thread; seen by who sees what it writes next
  size_t fenced_of_block = 0;      // likewise: so many of Block::written
};

struct Warp {
  Thread* threads = nullptr;  // of 32
  Block* block = nullptr;
  int index = 0;
  uint32_t ready = 0, arrived = 0, ended = 0;  // lanes; neither: it waits for a barrier
  int place = -1;                              // in Machine::ready
  Site at;                                     // where the arrived lanes wait
  void* operands[kLanes] = {};                 // on the stacks of the arrived lanes
  std::vector<uint32_t*> written;              // ordered before all of the warp
};

struct Barrier {
  int expected = 0, arrived = 0;  // threads
  int count = 0, result = 0;      // of those for which the condition holds
  std::vector<Warp*> waiting;
};

struct Block {
  int index = 0, size = 0, live = 0;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Barrier barriers[kBarriers];
  char* shared = nullptr;
  std::unique_ptr<char[]> memory;
  size_t memory_bytes = 0, shared_bytes = 0;
  std::unordered_map<uint32_t*, uint32_t> stores;  // words that only this block sees
  std::vector<uint32_t*> written;                  // of these, those ordered before the whole block
  size_t published = 0;                            // so many of `written` are not among `stores` any more

  bool in_shared(const void* p) const {
    return static_cast<const char*>(p) >= shared && static_cast<const char*>(p) < shared + shared_bytes;
  }
};

struct Grid {
  int64_t blocks;
  int block_size;
  size_t shared_bytes;
  const char* name;
  void (*run)(const void* state);
  const void* state;
};

inline std::string describe(const Site& site) {
  if (site.name == nullptr) return "nowhere";
  const char* slash = std::strrchr(site.file, '/');
  return std::string(site.name) + " (" + (slash ? slash + 1 : site.file) + ":" + std::to_string(site.line) + ")";
}

// Lanes as "0-3 7".
inline std::string list_lanes(uint32_t lanes) {
  std::string text;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(lanes >> lane & 1u)) continue;
    int last = lane;
    while (last + 1 < kLanes && (lanes >> (last + 1) & 1u)) ++last;
    text += (text.empty() ? "" : " ") + std::to_string(lane) + (last > lane ? "-" + std::to_string(last) : "");
    lane = last;
  }
  return text;
}

class Machine {
 public:
  Thread* current = nullptr;
  int64_t block_count = 0;
  bool shuffled = true;  // is anything left to chance?
  int multiprocessors = 3;
  uint64_t most_turns = 2'000'000'000;  // of all threads in a launch: more is a loop without end. About a minute

  Machine() {
    const char* named = std::getenv("TTS_EMULATION_SEED");
    seed(named ? std::strtoull(named, nullptr, 10) : 1);
  }

  void seed(uint64_t value) { seed_ = value, launches_ = 0; }

  bool chance(int one_in) { return shuffled && draw(uint32_t(one_in)) == 0; }

  void run(const Grid& grid);

  // The current thread's turn ends, perhaps to come again at once.
  void yield() {
    Warp* warp = current->warp;
    set_ready(warp, warp->ready | bit(current));
    next();
  }
  void maybe_yield() {
    if (chance(4)) yield();
  }

  // Where it matters most, the current thread may fall asleep.
  void maybe_sleep() {
    if (!chance(3)) return;
    sleeping_.push_back(current);
    next();
  }

  // The lanes of a warp meet; the last one runs `complete` on what all brought. Each may change its own operand, which is
  // where it finds its result.
  template <typename T>
  void meet(const Site& site, T* operand, void (*complete)(T* const*)) {
    if (arrive(site, operand)) {
      complete(reinterpret_cast<T* const*>(current->warp->operands));
      release(current->warp);
    } else {
      next();
    }
  }

  // Warps meet at a barrier: how many of the threads there said true. It orders memory among them.
  int meet_at_barrier(const Site& site, int number, int threads, bool condition);

  void order_warp(Warp* warp);

  // Memory that other blocks read.
  void store_words(void* to, const uint32_t* words, int count);
  void load_words(const void* from, uint32_t* words, int count) const;
  void fence();
  void release();  // before a thread writes what others may see: all that it has fenced is seen too

  void copy(const Site& site, void* to, const void* from, bool valid);
  void commit_copies();
  void wait_for_copies(int groups_left);

  [[noreturn]] void fail(const std::string& what);

 private:
  static uint32_t bit(const Thread* thread) { return 1u << (thread->index % kLanes); }

  uint32_t draw(uint32_t bound) {  // xorshift64*
    random_ ^= random_ >> 12, random_ ^= random_ << 25, random_ ^= random_ >> 27;
    return uint32_t((random_ * 0x2545f4914f6cdd1dull >> 32) * bound >> 32);
  }

  bool arrive(const Site& site, void* operand);
  void release(Warp* warp) {
    warp->arrived = 0;
    set_ready(warp, kAllLanes & ~bit(current));  // the current one just goes on
  }
  void set_ready(Warp* warp, uint32_t lanes);
  Thread* pick();
  void next();
  void begin_block(Block* block, int slot, const Grid& grid, int index);
  void end_block(Block* block);
  static void publish(Block* block, uint32_t* to);
  void land(const Copy& copy);
  static void thread_main();
  std::string where() const;

  std::mutex mutex_;
  uint64_t seed_ = 1, launches_ = 0, random_ = 1, turns_ = 0;
  uint32_t stay_in_ = 1;  // a warp keeps its turn but once in this many
  uint32_t wake_in_ = 1;  // and a thread that sleeps goes on sleeping
  Warp* last_ = nullptr;
  std::vector<Warp*> ready_;
  std::vector<Thread*> sleeping_;
  std::vector<std::unique_ptr<Block>> blocks_;
  std::vector<std::pair<uint32_t*, uint32_t>> left_over_;  // stores of ended blocks that nobody sees yet
  Fiber host_;
  Fiber* leaving_ = nullptr;  // the fiber that the running one was reached from
  Stacks stacks_;
  const Grid* grid_ = nullptr;
  bool failed_ = false;
  std::string failure_;
};

inline Machine machine;

// ---------------------------------------------------------------------------------------------------- the scheduler

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

// One of the threads that can go on, null if there is none. By chance, but with runs of turns in one warp whose length
// differs by launch, from even progress of all warps to one that is far ahead; and now and then one falls asleep, for
// a time that differs by launch too, up to when nobody else can go on.
inline Thread* Machine::pick() {
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
  const size_t bytes = (grid.shared_bytes + 127) / 128 * 128 + 2 * kRedZone + 128;
#ifdef TTS_ASAN
  if (block->memory) __asan_unpoison_memory_region(block->memory.get(), block->memory_bytes);
#endif
  if (block->memory_bytes != bytes) block->memory.reset(new char[bytes]), block->memory_bytes = bytes;
  std::memset(block->memory.get(), kPoison, bytes);
  const uintptr_t first = reinterpret_cast<uintptr_t>(block->memory.get()) + kRedZone;
  block->shared = reinterpret_cast<char*>((first + 127) / 128 * 128);
  block->shared_bytes = grid.shared_bytes;
#ifdef TTS_ASAN
  __asan_poison_memory_region(block->memory.get(), bytes);
  __asan_unpoison_memory_region(block->shared, grid.shared_bytes);
#endif
  for (Barrier& barrier : block->barriers) barrier = Barrier();
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
      thread.copies.clear(), thread.written.clear(), thread.fenced.clear();
      thread.group = 0, thread.fenced_of_block = 0;
      stacks_.take(slot * grid.block_size + thread.index, &thread.fiber);
      thread.fiber.prepare(&thread_main);
    }
    set_ready(&warp, kAllLanes);
  }
}

inline void Machine::end_block(Block* block) {
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
    if (current == nullptr) failed_ = true, failure_ = "no thread can go on:" + where();
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

// ----------------------------------------------------------------------------------------------- meetings and errors

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
      if (warp.ready) text << " lanes " << list_lanes(warp.ready) << " could go on";
    }
    for (int i = 0; i < kBarriers; ++i)
      if (block->barriers[i].arrived > 0)
        text << "\n    barrier " << i << ": " << block->barriers[i].arrived << " of " << block->barriers[i].expected
             << " threads";
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

// ------------------------------------------------------------------------------------------------------------ memory

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
