// Which code path runs: TTS_KERNELS_CPU_ISA, else the best one that this machine and this build have.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "code_path.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace tts {

extern const CodePath kPortable;
#if defined(TTS_HAVE_AVX2)
extern const CodePath kAvx2;
#endif
#if defined(TTS_HAVE_AVX512)
extern const CodePath kAvx512;
#endif
#if defined(TTS_HAVE_AMX)
extern const CodePath kAmx;
#endif
extern const CodePath kAmxEmulated;

namespace {

#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
// The CPU has the tiles, and the kernel lets this process use their state.
bool has_amx() {
#if defined(__linux__)
  unsigned a, b, c, d;
  if (!has_avx512() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool tile = d >> 24 & 1, bf16 = d >> 22 & 1;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)
  return tile && bf16 && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

struct Entry {
  const CodePath* path;
  const char* name;
  const char* why_not;  // nullptr: it runs here
};

// Slowest first; the emulated path is never chosen by itself.
const Entry* entries(int* count) {
  static const char* kNoCompiler = "this build's compiler did not have it";
  static const char* kNoCpu = "this CPU does not have it";
  static const char* kNoTiles = "this CPU does not have it, or the system refuses the tiles";
#if defined(__x86_64__)
  static const bool avx2 = has_avx2(), avx512 = has_avx512(), amx = has_amx();
#else
  static const bool avx2 = false, avx512 = false, amx = false;
#endif
  (void)kNoCpu, (void)kNoTiles, (void)kNoCompiler, (void)avx2, (void)avx512, (void)amx;
  static const Entry table[] = {
    {&kAmxEmulated, "amx-emulated", nullptr},
    {&kPortable, "portable", nullptr},
#if defined(TTS_HAVE_AVX2)
    {&kAvx2, "avx2", avx2 ? nullptr : kNoCpu},
#else
    {nullptr, "avx2", kNoCompiler},
#endif
#if defined(TTS_HAVE_AVX512)
    {&kAvx512, "avx512", avx512 ? nullptr : kNoCpu},
#else
    {nullptr, "avx512", kNoCompiler},
#endif
#if defined(TTS_HAVE_AMX)
    {&kAmx, "amx", amx ? nullptr : kNoTiles},
#else
    {nullptr, "amx", kNoCompiler},
#endif
  };
  *count = int(sizeof(table) / sizeof(table[0]));
  return table;
}

}  // namespace

const CodePath& active_code_path() {
  int count;
  const Entry* table = entries(&count);
  const char* wanted = std::getenv("TTS_KERNELS_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') {
    for (int i = count - 1; i > 0; --i)
      if (table[i].why_not == nullptr) return *table[i].path;
  }
  std::string known;
  for (int i = 0; i < count; ++i) {
    if (std::strcmp(table[i].name, wanted) == 0) {
      if (table[i].why_not == nullptr) return *table[i].path;
      throw std::invalid_argument("TTS_KERNELS_CPU_ISA=" + std::string(wanted) + ": " + table[i].why_not);
    }
    known += std::string(i ? ", " : "") + table[i].name;
  }
  throw std::invalid_argument("TTS_KERNELS_CPU_ISA: expected one of " + known + ", got '" + wanted + "'");
}

std::vector<std::pair<std::string, std::string>> code_paths() {
  int count;
  const Entry* table = entries(&count);
  std::vector<std::pair<std::string, std::string>> all;
  for (int i = 0; i < count; ++i) all.emplace_back(table[i].name, table[i].why_not ? table[i].why_not : "");
  return all;
}

std::string active_code_path_name() { return active_code_path().name; }

}  // namespace tts
