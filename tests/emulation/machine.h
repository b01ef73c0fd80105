// What the machine consists of, and what each part of it keeps. The parts are in scheduler.h, meetings.h, memory.h and
// async.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
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
constexpr size_t kAligned = 1024;  // shared memory begins at a multiple of it
constexpr int kSleepsIn = 5000;    // turns
constexpr int kMaxThreads = 2048;  // alive at a time: as many as there are stacks

// Where a kernel called a function of device.cuh.
struct Site {
  const char* name = nullptr;
  const char* file = nullptr;
  int line = 0;
};

struct Block;
struct Thread;
struct Warp;

struct Copy {
  void* to;
  const void* from;  // null: zeros
  int group;
};

// A barrier in shared memory: its eight bytes mean nothing, this does.
struct PhaseBarrier {
  int expected = 0, pending = 0;  // arrivals
  int64_t bytes = 0;              // that this phase still waits for
  uint32_t phase = 0;             // the one that goes on
  Thread* maker = nullptr;        // until it has fenced: the copy engine does not know of the barrier
  std::vector<Thread*> waiting;
};

// What a TensorMap holds here.
struct TileMap {
  uint32_t magic;
  const char* base;
  int64_t extent[4], stride[4];  // stride in bytes, the first is that of an element
  int32_t box[4];

  static constexpr uint32_t kMagic = 0x71e5a4u;
  int64_t bytes() const { return int64_t(box[0]) * box[1] * box[2] * box[3] * stride[0]; }
};

// A box on its way to shared memory.
struct TileCopy {
  Block* block;
  Site site;
  char* to;
  TileMap map;
  int64_t at[4];
  uint64_t* barrier;
};

// wgmma, for the 128 threads of a warpgroup. It happens at some time between the last warp's call and the wait.
struct Product {
  Site site;
  float (*widen)(uint16_t);
  bool across, add;
  int columns;
  uint64_t b;
  uint32_t issued = 0;                 // warps that were there
  const uint32_t* a[4 * kLanes] = {};  // 4 of each thread, which must not change meanwhile
  uint32_t a_then[4 * kLanes][4];
  float* d[4 * kLanes] = {};  // columns / 2 of each thread: NaN until the wait
};

// What is between the calls and the waits of a warp.
struct Accumulators {
  int64_t last;  // the youngest product that adds to it
  int columns;
  float* d[kLanes];
  std::vector<float> value;  // [lane][columns / 2]
};

struct Warpgroup {
  const Block* block = nullptr;
  std::deque<Product> products;  // from number `done` on
  int64_t done = 0;
  int64_t issued[4] = {};             // by each warp
  std::vector<int64_t> committed[4];  // products before each of its commits
  bool fenced[4] = {};
  std::vector<Accumulators> under_way[4];
  std::vector<Warp*> waiting;
  int64_t waits_for[4] = {};
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
  std::vector<int> landed;         // pieces of shared memory that it copied and has not fenced for the async proxy
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
  uint32_t parked = 0;                         // lanes that wait for a barrier in shared memory
  int registers = 0;                           // of each thread, where the kernel has said it
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
  std::vector<Warpgroup> groups;
  std::unordered_map<uint64_t*, PhaseBarrier> phases;
  std::vector<int> unfenced;  // by piece of 16 bytes: the thread whose copy the async proxy does not see yet; -1: none
  size_t published = 0;       // so many of `written` are not among `stores` any more

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

  // The lanes of a warp meet; the last one runs `complete` on what all brought. Each may change its own operand, which
  // is where it finds its result.
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

  // In async.h.
  void make_barrier(const Site& site, uint64_t* barrier, int arrivals);
  void arrive_at(const Site& site, uint64_t* barrier);
  void expect_bytes(const Site& site, uint64_t* barrier, int bytes);
  bool has_ended(const Site& site, uint64_t* barrier, uint32_t parity);
  void wait_for_phase(const Site& site, uint64_t* barrier, uint32_t parity);
  void fence_async();
  void copy_tile(const Site& site, void* to, const void* map, const int (&at)[4], uint64_t* barrier);
  void fence_products();
  void issue_product(const Product& product, uint32_t* const* a, float* const* d);
  void commit_products();
  void meet_for_products(const Site& site, int groups_left);
  void set_registers(const Site& site, int count, bool more);

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

  PhaseBarrier& barrier_at(const Site& site, uint64_t* barrier);
  void end_phase(PhaseBarrier& barrier);
  void go_on_beside();
  void land_tile(size_t which);
  void multiply(size_t which, bool all);
  void make_product(Warpgroup& group);
  void note(const Block* block, const Site& site, const std::string& what);
  void give_back(Warpgroup& group, Warp* warp);
  std::string left_in_groups(const Block* block) const;
  std::string where() const;

  std::mutex mutex_;
  uint64_t seed_ = 1, launches_ = 0, random_ = 1, turns_ = 0;
  uint32_t stay_in_ = 1;                   // a warp keeps its turn but once in this many
  uint32_t tile_in_ = 1, product_in_ = 1;  // turns: of those under way one happens
  uint32_t wake_in_ = 1;                   // and a thread that sleeps goes on sleeping
  Warp* last_ = nullptr;
  std::vector<Warp*> ready_;
  std::vector<Thread*> sleeping_;
  std::vector<TileCopy> tiles_;          // under way
  std::vector<Warpgroup*> multiplying_;  // that have products which all of their warps have called
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

}  // namespace tts::emulation
