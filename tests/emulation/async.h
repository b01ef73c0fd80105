// What goes on beside the threads on sm_90a: barriers in shared memory, copies of boxes, products of warpgroups.
#pragma once

#include "machine.h"
#include "numbers.h"

namespace tts::emulation {

// Of 128 bytes: which 16-byte piece of its 128 an address means, by its bits 7 to 9.
inline uint32_t swizzle_128(uint32_t address) { return address ^ (address >> 7 & 7u) << 4; }

// Shared memory as its own address space, which does not begin at 0.
inline uint32_t address_in_shared(const Block* block, const void* p) {
  return uint32_t(static_cast<const char*>(p) - block->shared) + uint32_t(kAligned);
}

inline PhaseBarrier& Machine::barrier_at(const Site& site, uint64_t* barrier) {
  const auto found = current->block->phases.find(barrier);
  if (found == current->block->phases.end()) fail(describe(site) + ": there is no barrier");
  return found->second;
}

inline void Machine::make_barrier(const Site& site, uint64_t* barrier, int arrivals) {
  Block* block = current->block;
  if (!block->in_shared(barrier) || reinterpret_cast<uintptr_t>(barrier) % 8 != 0)
    fail(describe(site) + ": a barrier is 8 bytes of shared memory");
  if (block->phases.count(barrier)) fail(describe(site) + ": there is a barrier already");
  PhaseBarrier& made = block->phases[barrier];
  made.expected = made.pending = arrivals;
  made.maker = current;
}

inline void Machine::end_phase(PhaseBarrier& barrier) {
  if (barrier.pending > 0 || barrier.bytes != 0) return;
  ++barrier.phase;
  barrier.pending = barrier.expected;
  for (Thread* thread : barrier.waiting) {
    const uint32_t lane = 1u << (thread->index % kLanes);
    thread->warp->parked &= ~lane;
    set_ready(thread->warp, thread->warp->ready | lane);
  }
  barrier.waiting.clear();
}

inline void Machine::arrive_at(const Site& site, uint64_t* barrier) {
  maybe_yield();
  PhaseBarrier& found = barrier_at(site, barrier);
  if (found.pending == 0) fail(describe(site) + ": more arrivals than the barrier has");
  const bool last = --found.pending == 0;
  end_phase(found);
  if (last) maybe_sleep();  // who waits finds out whether what this thread has done is there
  maybe_yield();
}

inline void Machine::expect_bytes(const Site& site, uint64_t* barrier, int bytes) {
  barrier_at(site, barrier).bytes += bytes;
}

inline bool Machine::has_ended(const Site& site, uint64_t* barrier, uint32_t parity) {
  maybe_yield();
  return (barrier_at(site, barrier).phase & 1u) != parity;
}

inline void Machine::wait_for_phase(const Site& site, uint64_t* barrier, uint32_t parity) {
  while (!has_ended(site, barrier, parity)) {
    current->at = site;
    current->warp->parked |= bit(current);
    barrier_at(site, barrier).waiting.push_back(current);
    next();
  }
}

inline void Machine::fence_async() {
  Block* block = current->block;
  for (int piece : current->landed)
    if (block->unfenced[piece] == current->index) block->unfenced[piece] = -1;
  current->landed.clear();
  for (auto& [at, barrier] : block->phases)
    if (barrier.maker == current) barrier.maker = nullptr;
  maybe_yield();
}

inline void Machine::copy_tile(const Site& site, void* to, const void* map, const int (&at)[4], uint64_t* barrier) {
  Block* block = current->block;
  if (barrier_at(site, barrier).maker != nullptr)
    fail(describe(site) + ": the barrier was not fenced for the async proxy");
  const TileMap* tile = static_cast<const TileMap*>(map);
  if (reinterpret_cast<uintptr_t>(map) % 64 != 0 || tile->magic != TileMap::kMagic)
    fail(describe(site) + ": there is no tensor map at this address");
  TileCopy copy = {block, site, static_cast<char*>(to), *tile, {at[0], at[1], at[2], at[3]}, barrier};
  if (address_in_shared(block, to) % 128 != 0) fail(describe(site) + ": the target is not a multiple of 128");
  if (!block->in_shared(to) || !block->in_shared(copy.to + tile->bytes() - 1))
    fail(describe(site) + ": the target is not in the block's shared memory");
  std::memset(to, kPoison, size_t(tile->bytes()));
  tiles_.push_back(copy);
  maybe_yield();
}

// The box comes: rows of box[0] elements one behind the other, zeros for what the tensor has not.
inline void Machine::land_tile(size_t which) {
  const TileCopy copy = tiles_[which];
  tiles_[which] = tiles_.back();
  tiles_.pop_back();
  const TileMap& map = copy.map;
  const uint32_t first = address_in_shared(copy.block, copy.to);
  const int64_t element = map.stride[0];
  uint32_t offset = 0;
  for (int l = 0; l < map.box[3]; ++l)
    for (int k = 0; k < map.box[2]; ++k)
      for (int j = 0; j < map.box[1]; ++j)
        for (int i = 0; i < map.box[0]; i += int(16 / element), offset += 16) {
          const int64_t at[4] = {copy.at[0] + i, copy.at[1] + j, copy.at[2] + k, copy.at[3] + l};
          const char* from = map.base;
          bool inside = true;
          for (int d = 0; d < 4; ++d) {
            inside = inside && at[d] >= 0 && at[d] < map.extent[d];
            from += at[d] * map.stride[d];
          }
          char* to = copy.block->shared + (swizzle_128(first + offset) - uint32_t(kAligned));
          if (inside) {
            std::memcpy(to, from, 16);
          } else {
            std::memset(to, 0, 16);
          }
          if (!copy.block->unfenced.empty()) copy.block->unfenced[(to - copy.block->shared) / 16] = -1;
        }
  PhaseBarrier& barrier = copy.block->phases[copy.barrier];
  barrier.bytes -= map.bytes();
  end_phase(barrier);
}

// ---------------------------------------------------------------------------------------------- products of warpgroups

inline void Machine::fence_products() {
  const Warp* warp = current->warp;
  warp->block->groups[warp->index / 4].fenced[warp->index % 4] = true;
}

// A warp is there: a and d of its lanes. The last lane calls it.
inline void Machine::issue_product(const Product& product, uint32_t* const* a, float* const* d) {
  Block* block = current->block;
  const int warp = current->warp->index % 4;
  if (current->warp->index / 4 >= int(block->groups.size()))
    fail(describe(product.site) + ": the warp is of no whole warpgroup");
  Warpgroup& group = block->groups[current->warp->index / 4];
  if (!group.fenced[warp]) fail(describe(product.site) + ": no wgmma_fence since the registers were the thread's");
  const int64_t number = group.issued[warp]++;
  if (number - group.done == int64_t(group.products.size())) group.products.push_back(product);
  Product& mine = group.products[number - group.done];
  if (mine.b != product.b || mine.columns != product.columns || mine.across != product.across ||
      mine.add != product.add || mine.widen != product.widen || mine.site.line != product.site.line)
    fail(describe(product.site) + ": the warps of the group are not at the same product");
  std::vector<Accumulators>& under_way = group.under_way[warp];
  auto found = std::find_if(under_way.begin(), under_way.end(), [&](const auto& x) { return x.d[0] == d[0]; });
  const int each = product.columns / 2;
  if (found == under_way.end()) {
    Accumulators fresh = {number, product.columns, {}, {}};
    for (int lane = 0; lane < kLanes; ++lane) {
      fresh.d[lane] = d[lane];
      fresh.value.insert(fresh.value.end(), d[lane], d[lane] + each);
      std::memset(d[lane], kPoison, size_t(each) * 4);
    }
    under_way.push_back(std::move(fresh));
  } else {
    found->last = number;
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    mine.a[warp * kLanes + lane] = a[lane];
    mine.d[warp * kLanes + lane] = d[lane];
    std::memcpy(mine.a_then[warp * kLanes + lane], a[lane], 16);
  }
  mine.issued |= 1u << warp;
  if (mine.issued == 15u && std::find(multiplying_.begin(), multiplying_.end(), &group) == multiplying_.end())
    multiplying_.push_back(&group);
}

// Some products of a group happen; all that its warps have called, where `all`. Who waited for no more goes on.
inline void Machine::multiply(size_t which, bool all) {
  Warpgroup& group = *multiplying_[which];
  do {
    make_product(group);
    group.products.pop_front();
    ++group.done;
  } while (!group.products.empty() && group.products.front().issued == 15u && (all || !chance(4)));
  if (group.products.empty() || group.products.front().issued != 15u) {
    multiplying_[which] = multiplying_.back();
    multiplying_.pop_back();
  }
  const std::vector<Warp*> waiting = group.waiting;
  for (Warp* warp : waiting) {
    if (group.waits_for[warp->index % 4] > group.done) continue;
    give_back(group, warp);
    group.waiting.erase(std::find(group.waiting.begin(), group.waiting.end(), warp));
    warp->arrived = 0;
    set_ready(warp, kAllLanes);
  }
}

inline void Machine::make_product(Warpgroup& group) {
  const Block* block = group.block;
  const Product& p = group.products.front();
  const uint32_t start = uint32_t(p.b & 0x3fff) << 4, leading = uint32_t(p.b >> 16 & 0x3fff) << 4,
                 stride = uint32_t(p.b >> 32 & 0x3fff) << 4;
  if (p.b >> 62 != 1 || (p.b >> 49 & 7u) != 0)
    return note(block, p.site, "only a swizzle of 128 bytes from a multiple of 1,024 is modelled");
  static float b[16][256];
  for (int k = 0; k < 16; ++k)
    for (int column = 0; column < p.columns; ++column) {
      // The canonical layouts of the PTX ISA: eight rows of 128 bytes, the next eight `stride` further; across, the
      // next 64 columns `leading` further.
      const uint32_t at =
          swizzle_128(start + (p.across ? uint32_t(column / 64) * leading + uint32_t(column % 64 * 2) +
                                              uint32_t(k / 8) * stride + uint32_t(k % 8 * 128)
                                        : uint32_t(column / 8) * stride + uint32_t(column % 8 * 128 + k * 2)));
      const size_t offset = at - kAligned;
      if (at < kAligned || offset + 2 > block->shared_bytes)
        return note(block, p.site, "b is not in the block's shared memory");
      uint16_t bits;
      std::memcpy(&bits, block->shared + offset, 2);
      if (!block->unfenced.empty() && block->unfenced[offset / 16] >= 0) bits = 0xffff;
      b[k][column] = p.widen(bits);
    }
  for (int warp = 0; warp < 4; ++warp) {
    Accumulators* sum = nullptr;
    for (Accumulators& other : group.under_way[warp])
      if (other.d[0] == p.d[warp * kLanes]) sum = &other;
    const int each = p.columns / 2;
    for (int row = 0; row < 16; ++row) {
      float d[256], a[16];
      for (int k = 0; k < 16; ++k) {
        const int lane = row % 8 * 4 + k % 8 / 2, word = row / 8 + k / 8 * 2, thread = warp * kLanes + lane;
        if (k % 2 == 0 && p.a[thread][word] != p.a_then[thread][word])
          return note(block, p.site, "a has changed before the product was made");
        a[k] = p.widen(uint16_t(p.a_then[thread][word] >> k % 2 * 16));
      }
      const auto place = [&](int column) -> float& {
        const int lane = row % 8 * 4 + column % 8 / 2;
        return sum->value[size_t(lane * each + column / 8 * 4 + row / 8 * 2 + column % 2)];
      };
      for (int column = 0; column < p.columns; ++column) d[column] = p.add ? place(column) : 0.0f;
      for (int k = 0; k < 16; ++k)
        for (int column = 0; column < p.columns; ++column) d[column] += a[k] * b[k][column];
      for (int column = 0; column < p.columns; ++column) place(column) = d[column];
    }
  }
}

inline void Machine::commit_products() {
  const Warp* warp = current->warp;
  Warpgroup& group = warp->block->groups[warp->index / 4];
  group.committed[warp->index % 4].push_back(group.issued[warp->index % 4]);
}

// What the warp waits for is there: its registers are its own again.
inline void Machine::give_back(Warpgroup& group, Warp* warp) {
  const int index = warp->index % 4;
  std::vector<Accumulators>& under_way = group.under_way[index];
  for (size_t i = 0; i < under_way.size();) {
    const Accumulators& sum = under_way[i];
    if (sum.last >= group.waits_for[index]) {
      ++i;
      continue;
    }
    const size_t each = size_t(sum.columns / 2);
    for (int lane = 0; lane < kLanes; ++lane) {
      for (size_t j = 0; j < each; ++j)
        if (to_bits(sum.d[lane][j]) != 0xffffffffu)
          note(warp->block, warp->at, "d of a product was written before it was waited for");
      std::memcpy(sum.d[lane], sum.value.data() + size_t(lane) * each, each * 4);
    }
    under_way.erase(under_way.begin() + int(i));
  }
  group.fenced[index] = false;
}

// The lanes of a warp wait together.
inline void Machine::meet_for_products(const Site& site, int groups_left) {
  Warp* warp = current->warp;
  if (!arrive(site, nullptr)) return next();
  Warpgroup& group = warp->block->groups[warp->index / 4];
  const std::vector<int64_t>& committed = group.committed[warp->index % 4];
  const int which = int(committed.size()) - 1 - groups_left;
  const int64_t until = which < 0 ? 0 : committed[size_t(which)];
  group.waits_for[warp->index % 4] = until;
  if (group.done < until) {
    group.waiting.push_back(warp);
    next();
    return;
  }
  give_back(group, warp);
  release(warp);
}

// An error of what goes on beside the threads; the launch ends when the next one is looked for.
inline void Machine::note(const Block* block, const Site& site, const std::string& what) {
  if (failed_) return;
  failed_ = true;
  failure_ = "block " + std::to_string(block->index) + ": " + describe(site) + ": " + what;
}

inline std::string Machine::left_in_groups(const Block* block) const {
  int registers = 0;
  for (const Warp& warp : block->warps) {
    registers += warp.registers;
    if (warp.registers != block->warps[size_t(warp.index / 4 * 4)].registers) return "warps of one group apart";
  }
  if (registers * kLanes > 65536) return "more registers than a multiprocessor has";
  for (const Warpgroup& group : block->groups)
    for (int warp = 0; warp < 4; ++warp)
      if (group.issued[warp] != group.issued[0] || !group.under_way[warp].empty())
        return "products that nobody waited for";
  for (const TileCopy& copy : tiles_)
    if (copy.block == block) return "a tile under way to it";
  return "";
}

inline void Machine::set_registers(const Site& site, int count, bool more) {
  if (count < 24 || count > 256 || count % 8 != 0) fail(describe(site) + ": no such number of registers");
  const int before = std::min(65536 / current->block->size / 8 * 8, 255);
  if (more ? count < before : count > before) fail(describe(site) + ": the other way");
  current->warp->registers = count;
}

}  // namespace tts::emulation
