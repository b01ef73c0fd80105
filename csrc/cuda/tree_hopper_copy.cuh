// Shared memory of the Hopper kernel, and its warpgroup that fills it: blocks of KV, item after item, ahead of the two
// that multiply. A place of the ring has two barriers: full, where the copying threads say that a block is there, and
// empty, where the warps that multiply say that they are done with it.
#pragma once

#include "device_hopper.cuh"
#include "tree_walk.cuh"

namespace tts {

constexpr int kCopyThreads = 128, kHopperThreads = kTreeThreads + kCopyThreads;
using Multiplying = Crew<0, kTreeThreads, 1>;
using Copying = Crew<kTreeThreads, kCopyThreads, 2>;

// A block of an item is copied when the block kHopperStages before it is used up. Every item has a block, so all items
// more than kHopperStages before it are finished then, and its place among kMaxStages is free.
constexpr int kHopperStages = kMaxStages - 1;

// K or V of a block: panels of 64 columns, [kTokens][128 bytes] each.
template <int kDim>
struct HopperLayout {
  static_assert(kDim % 64 == 0, "whole panels");
  static constexpr int kTokens = 128, kPanels = kDim / 64;
  static constexpr int kPanel = kTokens * kPanelBytes, kHalf = kPanels * kPanel;
  static constexpr int kBarriers = (int(sizeof(TreeShared)) + 7) / 8 * 8;  // full, then empty ones
  static constexpr int kBlocks = (kBarriers + 2 * kMaxStages * 8 + 1023) / 1024 * 1024;

  static constexpr int64_t bytes(int num_stages) { return kBlocks + int64_t(num_stages) * 2 * kHalf; }

  TTS_DEVICE static uint64_t* full(unsigned char* memory, int stage) {
    return reinterpret_cast<uint64_t*>(memory + kBarriers) + stage;
  }
  TTS_DEVICE static uint64_t* empty(unsigned char* memory, int stage) { return full(memory, kMaxStages + stage); }
  TTS_DEVICE static unsigned char* half(unsigned char* memory, int stage, int which) {
    return memory + kBlocks + (2 * stage + which) * kHalf;
  }
};

// Where in the ring of stages one is, and which phase of the barriers that is.
struct Turn {
  int stage = 0;
  uint32_t parity = 0;
  TTS_DEVICE void next(int num_stages) {
    if (++stage == num_stages) stage = 0, parity ^= 1;
  }
};

template <int kDim>
class HopperCopy {
 public:
  using Layout = HopperLayout<kDim>;

  TTS_DEVICE HopperCopy(const HopperTreeParams& p, unsigned char* memory)
      : p_(p),
        memory_(memory),
        shared_(*reinterpret_cast<TreeShared*>(memory)),
        walk_(p.tree, *reinterpret_cast<TreeShared*>(memory)) {}

  // All blocks, and behind them one that says that there are no more. What threads copied is told of one block later,
  // so that it has time to come; sooner where there is nothing else to do. Boxes tell of themselves by their bytes.
  TTS_DEVICE void run() {
    for (bool more = true; more; turn_.next(p_.tree.num_stages)) {
      if (!barrier_test(Layout::empty(memory_, turn_.stage), turn_.parity ^ 1)) {
        copy_async_wait<0>();
        tell();
        barrier_wait(Layout::empty(memory_, turn_.stage), turn_.parity ^ 1);
      }
      more = walk_.find();
      if (Copying::thread() == 0) shared_.item_of[turn_.stage] = more ? walk_.place() : -1;
      const bool boxes = more && p_.box_tokens > 0 && walk_.all_seen();
      if (boxes)
        copy_boxes();
      else if (more)
        copy_pieces();
      if (more) walk_.pass();
      copy_async_commit();
      copy_async_wait<1>();
      tell();
      if (boxes)
        barrier_arrive(Layout::full(memory_, turn_.stage));
      else
        untold_ = turn_.stage;
    }
    copy_async_wait<0>();
    tell();
  }

 private:
  TTS_DEVICE void tell() {
    if (untold_ < 0) return;
    fence_async();
    barrier_arrive(Layout::full(memory_, untold_));
    untold_ = -1;
  }

  // The copy engine, a box to a thread: tokens of a page, of one panel. A warp asks for one box after the other: as many
  // of them are each warp's.
  TTS_DEVICE void copy_boxes() {
    const TreeAttentionParams& c = p_.tree.call;
    constexpr int kEach = 2 * Layout::kPanels;
    const int thread = Copying::thread(), i = thread % 32 * Copying::kWarps + thread / 32;
    const int box = i / kEach, which = i % kEach / Layout::kPanels, panel = i % Layout::kPanels;
    const int token = box * p_.box_tokens;
    if (token >= Layout::kTokens) return;
    const int at = walk_.token() + token, in_pages = p_.tree.by_page_size.divide(at);
    uint64_t* full = Layout::full(memory_, turn_.stage);
    unsigned char* to = Layout::half(memory_, turn_.stage, which) + panel * Layout::kPanel + token * kPanelBytes;
    barrier_expect(full, p_.box_tokens * kPanelBytes);
    copy_tile(to, which == 0 ? p_.k : p_.v, 64 * panel, int(walk_.kv_head()), at - in_pages * c.page_size,
              walk_.page(in_pages), full);
  }

  // 16 bytes to a thread at a time, the page ids of some steps first, so that they come together. Tokens that no row of
  // the tile sees are not read, nor are their page ids: zeros stand for them.
  TTS_DEVICE void copy_pieces() {
    const TreeAttentionParams& c = p_.tree.call;
    constexpr int kPieces = kDim / 8, kTokensEach = kCopyThreads / kPieces;
    const int thread = Copying::thread(), piece = thread % kPieces, first = thread / kPieces;
    const int panel = piece / 8 * Layout::kPanel;
    const uint16_t* k = static_cast<const uint16_t*>(c.k) + walk_.kv_head() * c.k_head + 8 * piece;
    const uint16_t* v = static_cast<const uint16_t*>(c.v) + walk_.kv_head() * c.v_head + 8 * piece;
    constexpr int kAhead = 4;
#pragma unroll 1
    for (int begin = first; begin < Layout::kTokens; begin += kAhead * kTokensEach) {
      int page[kAhead], slot[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int at = walk_.token() + begin + i * kTokensEach;
        const int in_pages = walk_.seen(at) ? p_.tree.by_page_size.divide(at) : 0;
        page[i] = walk_.seen(at) ? walk_.page(in_pages) : 0;
        slot[i] = walk_.seen(at) ? at - in_pages * c.page_size : 0;
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int token = begin + i * kTokensEach, to = panel + panel_place(token, piece % 8);
        const bool valid = walk_.seen(walk_.token() + token);
        copy_async_16(Layout::half(memory_, turn_.stage, 0) + to, k + page[i] * c.k_page + slot[i] * c.k_token, valid);
        copy_async_16(Layout::half(memory_, turn_.stage, 1) + to, v + page[i] * c.v_page + slot[i] * c.v_token, valid);
      }
    }
  }

  const HopperTreeParams& p_;
  unsigned char* memory_;
  TreeShared& shared_;
  TreeWalk<Layout::kTokens, Copying> walk_;
  Turn turn_;
  int untold_ = -1;  // the place of the block before, until it is told of
};

}  // namespace tts
