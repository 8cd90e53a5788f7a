#include "cpu.hpp"

#include <algorithm>
#include <chrono>
#include <stdexcept>

#include "memory.hpp"
#include "pool.hpp"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace medusa {
namespace {

struct Choice {
  const Kernels* kernels;
  bool runs;
};

#if defined(__x86_64__)
// Not all compilers know the name.
bool has_avx_vnni() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || a < 1) return false;  // a: the last of the leaf's parts
  __cpuid_count(7, 1, a, b, c, d);
  return a >> 4 & 1;
}

// Tiles have 8 KB of state, which a process must ask the system for; once asked for, all of its threads have them.
bool may_use_amx() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool bf16 = d >> 22 & 1, tiles = d >> 24 & 1, int8 = d >> 25 & 1;
  constexpr long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM
  return bf16 && tiles && int8 && syscall(SYS_arch_prctl, request, tile_data) == 0;
#else
  return false;
#endif
}
#endif

std::vector<const Kernels*> usable() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");  // asks the system, too
  const bool vnni = avx2 && has_avx_vnni();
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
  static const bool amx = bf16 && may_use_amx();
#else
  const bool avx2 = false, vnni = false, avx512 = false, bf16 = false, amx = false;
#endif
  const Choice all[] = {{amx_kernels(), amx},
                        {avx512_bf16_kernels(), bf16},
                        {avx512_kernels(), avx512},
                        {avx_vnni_kernels(), vnni},
                        {avx2_kernels(), avx2},
                        {neon_kernels(), true},
                        {portable_kernels(), true}};
  std::vector<const Kernels*> found;
  for (const Choice& choice : all)
    if (choice.kernels && choice.runs) found.push_back(choice.kernels);
  return found;
}

}  // namespace

std::vector<std::string> usable_isas() {
  std::vector<std::string> names;
  for (const Kernels* kernels : usable()) names.emplace_back(kernels->name);
  return names;
}

const Kernels& kernels_for(const std::string& isa) {
  const auto all = usable();
  if (isa.empty()) return *all.front();
  std::string known;
  for (const Kernels* kernels : all) {
    if (isa == kernels->name) return *kernels;
    known += (known.empty() ? "" : ", ") + std::string(kernels->name);
  }
  throw std::invalid_argument("instruction set '" + isa + "' cannot be used here; usable: " + known);
}

double read_bandwidth(int threads) {
  constexpr std::size_t bytes = std::size_t(256) << 20;
  Pool pool(threads);
  Buffer memory(bytes);
  std::uint64_t* words = memory.as<std::uint64_t>();
  for (std::size_t i = 0; i < bytes / 8; i += 512) words[i] = i;  // every page is there
  std::vector<std::uint64_t> sums(std::size_t(threads) * 8);
  double best = 1e9;
  for (int pass = 0; pass < 9; pass++) {
    const auto start = std::chrono::steady_clock::now();
    pool.run([&](int thread) {
      const std::size_t count = bytes / 8 / threads / 32 * 32;
      const std::uint64_t* p = words + count * thread;
      std::uint64_t lanes[32] = {};
      for (std::size_t i = 0; i < count; i += 32)
        for (int j = 0; j < 32; j++) lanes[j] += p[i + j];
      for (std::uint64_t lane : lanes) sums[std::size_t(thread) * 8] += lane;
    });
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  volatile std::uint64_t kept = sums[0];
  (void)kept;
  return double(bytes) / best;
}

}  // namespace medusa
