// The host's side of a launch. Errors are std::runtime_error and name the kernel and the shape.
#pragma once

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

namespace tts {

struct Launch {
  int64_t grid;          // blocks; 0 launches nothing
  int block;             // threads, a multiple of 32
  int64_t shared_bytes;  // of dynamic shared memory
  uintptr_t stream;      // a cudaStream_t
  const char* name;      // of the kernel, with what its instance is made for
};

// Where `std::string describe(const Params&)` exists beside the params, errors say the shape that it returns.
template <typename P, typename = void>
struct HasDescription : std::false_type {};
template <typename P>
struct HasDescription<P, std::void_t<decltype(describe(std::declval<const P&>()))>> : std::true_type {};

template <typename P>
[[noreturn]] void fail_launch(const Launch& at, const P& params, const std::string& reason) {
  std::ostringstream text;
  text << at.name << ": " << reason << " (" << at.grid << " blocks of " << at.block << " threads, " << at.shared_bytes
       << " bytes of shared memory";
  if constexpr (HasDescription<P>::value) text << "; " << describe(params);
  text << ")";
  throw std::runtime_error(text.str());
}

}  // namespace tts

#ifdef TTS_EMULATED
#include "emulated_launch.h"
#else

#include <cuda_runtime.h>

#include <array>
#include <map>
#include <mutex>
#include <tuple>

namespace tts {

inline bool cuda_is_emulated() { return false; }

inline void check_cuda(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // an error that is not sticky would come back from the next launch, whosever it is
  throw std::runtime_error(std::string(call) + ": " + cudaGetErrorString(error));
}

// What the driver knows, and what this module is linked with: 1000 major + 10 minor. 0 where there is no driver.
inline std::array<int, 2> cuda_versions() {
  int driver = 0, runtime = 0;
  check_cuda(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
  check_cuda(cudaRuntimeGetVersion(&runtime), "cudaRuntimeGetVersion");
  return {driver, runtime};
}

inline int current_device() {
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  return device;
}

// Makes `device` the current one for a scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : before_(current_device()), changed_(before_ != device) {
    if (changed_) check_cuda(cudaSetDevice(device), "cudaSetDevice");
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_;
  bool changed_;
};

// What the driver is asked once and tells the same ever after. Key: device, kernel, threads, bytes.
template <typename Ask>
int remembered(std::tuple<int, const void*, int, int64_t> key, Ask ask) {
  static std::mutex mutex;
  static std::map<std::tuple<int, const void*, int, int64_t>, int> known;
  std::lock_guard<std::mutex> lock(mutex);
  auto found = known.find(key);
  if (found == known.end()) found = known.emplace(key, ask()).first;
  return found->second;
}

inline int multiprocessor_count(int device) {
  return remembered({device, nullptr, 0, 0}, [&] {
    int count = 0;
    check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
    return count;
  });
}

constexpr int64_t kSharedBytesByDefault = 48 << 10;  // more must be asked for, for each kernel and device

// cudaFuncSetAttribute sets the limit, whatever it was, and a launch above it fails: here it only rises.
inline cudaError_t allow_shared_bytes(const void* entry, int64_t bytes, int device) {
  if (bytes <= kSharedBytesByDefault) return cudaSuccess;
  static std::mutex mutex;  // not that of `remembered`, which asks for this
  static std::map<std::pair<int, const void*>, int64_t> allowed;
  std::lock_guard<std::mutex> lock(mutex);
  int64_t& most = allowed[{device, entry}];
  if (bytes <= most) return cudaSuccess;
  const cudaError_t error = cudaFuncSetAttribute(entry, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
  if (error == cudaSuccess) most = bytes;
  return error;
}

// How many blocks of the kernel a multiprocessor of the current device holds; 0 where one is too large.
template <typename P>
int blocks_per_multiprocessor(void (*kernel)(P), int block, int64_t shared_bytes) {
  const int device = current_device();
  return remembered({device, reinterpret_cast<const void*>(kernel), block, shared_bytes}, [&] {
    int blocks = 0;
    check_cuda(allow_shared_bytes(reinterpret_cast<const void*>(kernel), shared_bytes, device), "cudaFuncSetAttribute");
    check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, block, size_t(shared_bytes)),
               "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
    return blocks;
  });
}

// On the current device.
template <typename P>
void launch(void (*kernel)(P), const Launch& at, const P& params) {
  if (at.grid == 0) return;
  if (at.grid < 0 || at.grid > INT32_MAX) fail_launch(at, params, "too many blocks");
  const void* entry = reinterpret_cast<const void*>(kernel);
  cudaError_t error = allow_shared_bytes(entry, at.shared_bytes, current_device());
  if (error == cudaSuccess) {
    void* arguments[] = {const_cast<void*>(static_cast<const void*>(&params))};
    error = cudaLaunchKernel(entry, dim3(unsigned(at.grid)), dim3(unsigned(at.block)), arguments,
                             size_t(at.shared_bytes), reinterpret_cast<cudaStream_t>(at.stream));
  }
  if (error == cudaSuccess) return;
  cudaGetLastError();
  fail_launch(at, params, cudaGetErrorString(error));
}

}  // namespace tts
#endif
