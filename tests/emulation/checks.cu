// Kernels for the tests of the emulation itself (tests/cuda/test_emulation.py), with their own module.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>

#include "checks_hopper.h"
#include "cuda/device.cuh"
#include "cuda/launch.h"

namespace tts {
namespace {

struct Params {
  const void* in;
  void* out;
  uint32_t* counter;
  int32_t size;
  int32_t omit;  // a kernel is right with 0, and lacks something with each other number
};

// ------------------------------------------------------------------------------------------------------- conversions

struct Convert {
  const float* wide;    // [size]
  uint16_t* narrow;     // [2, size]: f16, bf16
  float* from_16;       // [2, 65536]
  uint16_t* from_e4m3;  // [2, 4, 256]: from each byte of a word
  int32_t size;
};

template <typename T>
__device__ void convert_as(const Convert& p, int which) {
  for (int i = thread_index(); i < p.size; i += block_size()) {
    p.narrow[which * p.size + i] = narrow<T>(p.wide[i]);
    const uint32_t both = pack2<T>(p.wide[i], 1.0f);
    if (uint16_t(both) != narrow<T>(p.wide[i]) || both >> 16 != narrow<T>(1.0f)) p.narrow[which * p.size + i] = 0x1234;
  }
  for (int i = thread_index(); i < 65536; i += block_size()) p.from_16[which * 65536 + i] = widen<T>(uint16_t(i));
  for (int i = thread_index(); i < 256; i += block_size()) {
    for (int at = 0; at < 4; ++at) {
      uint32_t bits = 0, low, high;
      for (int j = 0; j < 4; ++j) bits |= uint32_t(i + j - at & 255) << (8 * j);  // beside what else there is
      widen_e4m3x4<T>(bits, low, high);
      p.from_e4m3[(which * 4 + at) * 256 + i] = uint16_t((at < 2 ? low : high) >> (at % 2 * 16));
    }
  }
}

__global__ void convert(const __grid_constant__ Convert p) {
  convert_as<F16>(p, 0);
  convert_as<BF16>(p, 1);
}

// ---------------------------------------------------------------------------------------------------------- products

struct Product {
  const uint16_t* a;  // [16, 16]
  const uint16_t* b;  // [16, 8]
  float* d;           // [16, 8]
};

// By ldmatrix, as kernels do it: a as it lies, b through the transposing load.
template <typename T>
__global__ void product(const __grid_constant__ Product p) {
  uint16_t* a = shared_memory<uint16_t>();
  uint16_t* b = a + 256;
  for (int i = lane_index(); i < 256; i += 32) a[i] = p.a[i];
  for (int i = lane_index(); i < 128; i += 32) b[i] = p.b[i];
  sync_block();
  const int lane = lane_index(), row = lane % 16, half = lane / 16;
  uint32_t x[4], y[4];
  load_matrix_x4(x, a + 16 * row + 8 * half);
  load_matrix_x4_transposed(y, b + 8 * row);  // matrices 2 and 3 are not used
  float d[4];
  const int g = lane / 4, t = lane % 4;
  for (int i = 0; i < 4; ++i) d[i] = p.d[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
  mma_16816<T>(d, x, y[0], y[1]);
  for (int i = 0; i < 4; ++i) p.d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = d[i];
}

__global__ void transpose(const __grid_constant__ Params p) {
  uint16_t* s = shared_memory<uint16_t>();
  for (int i = lane_index(); i < 256; i += 32) s[i] = static_cast<const uint16_t*>(p.in)[i];
  sync_block();
  uint32_t r[4];
  load_matrix_x4_transposed(r, s + 8 * lane_index());
  // Matrix i, transposed, lands where its fragment says.
  for (int i = 0; i < 4; ++i) {
    uint16_t* out = static_cast<uint16_t*>(p.out) + 64 * i + lane_index() / 4 * 8 + lane_index() % 4 * 2;
    out[0] = uint16_t(r[i]), out[1] = uint16_t(r[i] >> 16);
  }
}

// ------------------------------------------------------------------------------------------------------ warps, blocks

__global__ void exchanges(const __grid_constant__ Params p) {
  float* out = static_cast<float*>(p.out) + thread_index();
  const int lane = lane_index(), n = block_size();
  out[0] = shuffle_xor(float(lane), 5);
  out[n] = float(shuffle(lane, 7));
  out[2 * n] = float(shuffle_down(double(lane), 3));
  out[3 * n] = float(shuffle_up(uint32_t(lane), 3));
  out[4 * n] = float(popcount(ballot(lane % 3 == 0)));
  out[5 * n] = float(any_in_warp(lane == 31) + 2 * all_in_warp(lane >= 0) + 4 * any_in_warp(lane > 31));
  out[6 * n] = float(sync_block_count(thread_index() % 5 == 0));
  out[7 * n] = float(sync_block_any(thread_index() == n - 1) + 2 * sync_block_all(thread_index() > 0));
}

// Sums of a block through shared memory: each round, every thread reads what another warp has written.
__global__ void rounds(const __grid_constant__ Params p) {
  int32_t* s = shared_memory<int32_t>();
  int32_t x = thread_index();
  for (int i = 0; i < p.size; ++i) {
    s[thread_index()] = x;
    if (p.omit != 1) sync_block();
    x = s[(thread_index() + 37) % block_size()] + 1;
    if (p.omit != 2) sync_block();  // before the next round
  }
  static_cast<int32_t*>(p.out)[block_index() * block_size() + thread_index()] = x;
}

// Halves of a block go through different numbers of barriers of their own.
__global__ void halves(const __grid_constant__ Params p) {
  int32_t* s = shared_memory<int32_t>();
  const int half = block_size() / 2, mine = thread_index() / half, i = thread_index() % half;
  int32_t x = i;
  for (int round = 0; round < 3 + 4 * mine; ++round) {
    s[thread_index()] = x;
    sync_part(1 + mine, half);
    x = s[mine * half + (i + 33) % half];
    sync_part(1 + mine, half);
  }
  static_cast<int32_t*>(p.out)[thread_index()] = x;
}

// --------------------------------------------------------------------------------------------------------- pipelines

// out = in through two stages of shared memory, 16 bytes a thread and stage.
__global__ void pipeline(const __grid_constant__ Params p) {
  Bits128* stages = shared_memory<Bits128>();
  const int n = block_size(), count = p.size;
  const Bits128* in = static_cast<const Bits128*>(p.in);
  Bits128* out = static_cast<Bits128*>(p.out);
  const auto issue = [&](int i) {
    if (i < count) copy_async_16(stages + i % 2 * n + thread_index(), in + i * n + thread_index(), i % 3 != 2);
    copy_async_commit();
  };
  issue(0);
  for (int i = 0; i < count; ++i) {
    issue(i + 1);
    if (p.omit != 1) copy_async_wait<1>();
    if (p.omit != 2) sync_block();
    store_16(out + i * n + thread_index(), load_16(stages + i % 2 * n + (thread_index() + 40) % n));
    if (p.omit != 3) sync_block();  // before the stage is filled again
  }
  copy_async_wait<0>();
}

// The last block to arrive sums what all have written.
__global__ void last_arriver(const __grid_constant__ Params p) {
  float* states = const_cast<float*>(static_cast<const float*>(p.in));  // [blocks, threads]
  store_state(states + block_index() * block_size() + thread_index(), float(block_index() + 1));
  if (p.omit != 1) sync_block();
  uint32_t* last = shared_memory<uint32_t>();
  if (thread_index() == 0) {
    if (p.omit != 2) fence();
    *last = atomic_wrap(p.counter, uint32_t(block_count() - (p.omit == 3 ? 2 : 1)));
    fence();
  }
  if (p.omit != 4) sync_block();
  if (int(*last) != block_count() - 1) return;
  float sum = 0;
  for (int b = 0; b < block_count(); ++b) sum += load_fresh(states + b * block_size() + thread_index());
  static_cast<float*>(p.out)[thread_index()] = sum;
}

// ------------------------------------------------------------------------------------------------------------- errors

enum Error {
  kLaneEnds,
  kLanesApart,
  kBarrierInOneWarp,
  kBarrierInHalfAWarp,
  kDeadlock,
  kWrongCount,
  kCopiesLeft,
  kMisalignedCopy,
  kCopyOutside,
  kNoEnd,
  kRedZone
};

__global__ void wrong(const __grid_constant__ Params p) {
  char* s = shared_memory<char>();
  const int lane = lane_index(), warp = warp_index();
  switch (p.size) {
    case kLaneEnds:
      if (lane == 3) return;
      sync_warp();
      break;
    case kLanesApart:
      if (lane < 8) {
        ballot(true);
      } else {
        sync_warp();
      }
      break;
    case kBarrierInOneWarp:
      if (warp == 1) sync_block();
      break;
    case kBarrierInHalfAWarp:
      if (lane < 16) sync_block();
      break;
    case kDeadlock:
      sync_part(1 + warp % 2, block_size());
      break;
    case kWrongCount:
      sync_part(1, warp == 0 ? 32 : block_size());
      break;
    case kCopiesLeft:
      copy_async_16(s, p.in, true);
      copy_async_commit();
      break;
    case kMisalignedCopy:
      copy_async_16(s + 8, p.in, true);
      break;
    case kCopyOutside:
      copy_async_16(s + 1024, p.in, true);
      break;
    case kNoEnd:
      for (;;) sync_warp();
    case kRedZone:
      s[1024 + thread_index()] = 0;
      break;
  }
}

template <typename P>
void run(void (*kernel)(P), const P& p, int64_t grid, int block, int64_t shared_bytes, const char* name) {
  pybind11::gil_scoped_release release;
  launch(kernel, {grid, block, shared_bytes, 0, name}, p);
}

template <typename T>
T* at(int64_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace
}  // namespace tts

PYBIND11_MODULE(checks, m) {
  using namespace tts;
  m.def("seed", &cuda_emulation_seed, pybind11::arg("seed"), pybind11::arg("multiprocessors") = 3,
        pybind11::arg("most_turns") = 1'000'000);
  m.def("convert", [](int64_t wide, int64_t narrow, int64_t from_16, int64_t from_e4m3, int size) {
    run(convert, {at<float>(wide), at<uint16_t>(narrow), at<float>(from_16), at<uint16_t>(from_e4m3), size}, 1, 64, 0,
        "convert");
  });
  m.def("product", [](bool bf16, int64_t a, int64_t b, int64_t d) {
    const Product p = {at<uint16_t>(a), at<uint16_t>(b), at<float>(d)};
    run(bf16 ? product<BF16> : product<F16>, p, 1, 32, 1024, "product");
  });
  m.def("hopper_product", [](bool bf16, bool across, bool copied, int64_t a, int64_t b, int64_t d, int omit) {
    const HopperProduct p = {at<uint16_t>(a), at<uint16_t>(b), at<float>(d), {}, copied, omit};
    pybind11::gil_scoped_release release;
    if (bf16)
      run_hopper_product<BF16>(p, across, DType::bf16);
    else
      run_hopper_product<F16>(p, across, DType::f16);
  });
  m.def("kernel", [](const std::string& name, int64_t grid, int block, int64_t shared_bytes, int64_t in, int64_t out,
                     int64_t counter, int size, int omit) {
    void (*kernel)(Params) = name == "transpose"      ? transpose
                             : name == "exchanges"    ? exchanges
                             : name == "rounds"       ? rounds
                             : name == "halves"       ? halves
                             : name == "pipeline"     ? pipeline
                             : name == "last_arriver" ? last_arriver
                                                      : wrong;
    run(kernel, {at<void>(in), at<void>(out), at<uint32_t>(counter), size, omit}, grid, block, shared_bytes,
        name.c_str());
  });
}
