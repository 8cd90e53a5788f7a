// Products of packed weights by themselves, on one thread, beside what the processor's instructions can do:
//     medusa_products [--megabytes N] [--seconds S] [--shape OUTPUTSxINPUTS] ISA [ISA ...]
//
// For each shape, format and number of rows: the shortest of many turns, in G multiply-adds a second, in percent of
// what AVX2 can do (multiply-adds of floats; for int8 pairs of 16-bit numbers, for int4 pairs of bytes; for avx_vnni
// fours of bytes), and as a multiple of the time of one row. The sets of instructions take turns, so what disturbs one disturbs the others. With
// --megabytes there are so many copies of a matrix that each comes from memory (default: from the cache). Best pinned
// to one processor (taskset -c 1).
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "cpu.hpp"
#include "linear.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

using namespace medusa;
using Clock = std::chrono::steady_clock;

const char* const kNames[kFormats] = {"float32", "bfloat16", "int8", "int4"};
constexpr int kRows[] = {1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 256};

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// --- ceilings of AVX2 and AVX-VNNI ---

#if defined(__x86_64__)
#define EIGHT(a) a(0) a(1) a(2) a(3) a(4) a(5) a(6) a(7)
#define TWELVE(a) EIGHT(a) a(8) a(9) a(10) a(11)
#define FMA(i) "vfmadd231ps %%ymm12,%%ymm12,%%ymm" #i "\n"
#define PAIRS(i) "vpmaddwd %%ymm12,%%ymm12,%%ymm13\n vpaddd %%ymm13,%%ymm" #i ",%%ymm" #i "\n"
#define BYTES(i) "vpmaddubsw %%ymm12,%%ymm12,%%ymm13\n vpaddw %%ymm13,%%ymm" #i ",%%ymm" #i "\n"
// A "%" keeps the compiler from taking braces for its own.
#define FOURS(i) "%{vex%} vpdpbusd %%ymm12,%%ymm12,%%ymm" #i "\n"
#define MEASURE(sums)                                                                                      \
  asm volatile("vpxor %%ymm12,%%ymm12,%%ymm12\n"                                                           \
               "1:\n" sums sums "dec %0\n jnz 1b\n vzeroupper\n"                                           \
               : "+r"(turns)::"cc", "ymm0", "ymm1", "ymm2", "ymm3", "ymm4", "ymm5", "ymm6", "ymm7", "ymm8",\
                 "ymm9", "ymm10", "ymm11", "ymm12", "ymm13")
__attribute__((target("avx2,fma"))) double ceiling(int format, bool vnni) {
  constexpr long count = 20000;
  long turns = count;
  int sums = 8, each = 32;  // `each`: multiply-adds of one instruction, or pair of them
  const auto start = Clock::now();
  if (format <= int(Format::bfloat16)) {
    MEASURE(EIGHT(FMA));
    each = 8;
  } else if (vnni) {
    MEASURE(TWELVE(FOURS));
    sums = 12;  // it takes 5 cycles, and two begin in each
  } else if (format == int(Format::int8)) {
    MEASURE(EIGHT(PAIRS));
    each = 16;
  } else {
    MEASURE(EIGHT(BYTES));
  }
  return double(count) * 2 * sums * each / seconds_since(start);
}
#else
double ceiling(int, bool) { return 0; }
#endif

// --- products ---

struct Matrix {
  std::vector<Linear> copies;
};

struct Inputs {
  ActivationBuffer rows;
  Inputs(const Kernels& kernels, Format format, int inputs, int count, const float* x) {
    rows.shape(kernels, format, inputs);
    rows.fit(count);
    for (int row = 0; row < count; row++) rows.set(kernels, row, x, inputs);
  }
};

double sweep(const Kernels& kernels, const Matrix& matrix, const Inputs& inputs, int rows, float* y) {
  const auto start = Clock::now();
  for (std::size_t i = 0; i < matrix.copies.size(); i++) {
    const Linear& linear = matrix.copies[i];
    const std::byte* next = matrix.copies[(i + 1) % matrix.copies.size()].weights;
    for (int block = 0; block < linear.blocks; block += kMaxPanel) {
      const int blocks = std::min(kMaxPanel, linear.blocks - block);
      const std::byte* at = linear.block(block);
      const std::byte* then = block + blocks < linear.blocks ? linear.block(block + blocks) : next;
      kernels.matmul[int(linear.format)]({at, linear.block_bytes, blocks, linear.inputs, then - at}, inputs.rows.view(),
                                         rows, y, std::size_t(blocks) * kLanes);
    }
  }
  return seconds_since(start) / double(matrix.copies.size());
}

void measure(int outputs, int inputs, const std::vector<const Kernels*>& sets, double megabytes, double seconds) {
  constexpr int most = 256;
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<float> weights(std::size_t(outputs) * inputs), x(inputs);
  for (float& w : weights) w = 0.05f * normal(random);
  for (float& v : x) v = normal(random);
  const Source source{reinterpret_cast<const std::byte*>(weights.data()), Dtype::float32, outputs, inputs};
  Pool pool(1);
  Arena arena;
  std::vector<float> y(std::size_t(most) * kMaxPanel * kLanes);
  for (int format = 1; format < kFormats; format++) {
    Matrix matrix;
    do matrix.copies.push_back(pack(pool, arena, Format(format), rows_of(source), {}, "weights"));
    while (double(matrix.copies.back().bytes()) * double(matrix.copies.size()) < megabytes * 1e6);
    std::vector<Inputs> rows;
    for (const Kernels* kernels : sets)
      rows.emplace_back(*kernels, Format(format), padded_inputs(Format(format), inputs), most, x.data());
    std::map<std::pair<int, int>, double> best;
    std::vector<double> limits(sets.size());
    const auto start = Clock::now();
    for (int turn = 0; turn < 3 || seconds_since(start) < seconds; turn++) {
      for (std::size_t set = 0; set < sets.size(); set++)
        limits[set] = std::max(limits[set], ceiling(format, std::strcmp(sets[set]->name, "avx_vnni") == 0));
      for (int count : kRows)
        for (int set = 0; set < int(sets.size()); set++) {
          const double took = sweep(*sets[set], matrix, rows[set], count, y.data());
          double& least = best.try_emplace({set, count}, took).first->second;
          least = std::min(least, took);
        }
    }
    std::printf("%d x %d %s\n", outputs, inputs, kNames[format]);
    for (int set = 0; set < int(sets.size()); set++) {
      std::printf("  %-12s (can do %.1f G)", sets[set]->name, limits[set] / 1e9);
      for (int count : kRows) {
        const double rate = double(outputs) * inputs * count / best[{set, count}];
        const double of_one = best[{set, count}] / best[{set, 1}];
        std::printf(" %d: %.1f %.0f%% %.2fx", count, rate / 1e9, 100 * rate / limits[set], of_one);
      }
      std::printf("\n");
    }
    std::fflush(stdout);
  }
}

}  // namespace

int main(int count, char** arguments) {
  double megabytes = 0, seconds = 2;
  std::vector<std::pair<int, int>> shapes;
  std::vector<const Kernels*> sets;
  for (int i = 1; i < count; i++) {
    const std::string argument = arguments[i];
    int outputs, inputs;
    if (argument == "--megabytes" && i + 1 < count) megabytes = std::atof(arguments[++i]);
    else if (argument == "--seconds" && i + 1 < count) seconds = std::atof(arguments[++i]);
    else if (argument == "--shape" && i + 1 < count && std::sscanf(arguments[++i], "%dx%d", &outputs, &inputs) == 2)
      shapes.emplace_back(outputs, inputs);
    else sets.push_back(&kernels_for(argument));
  }
  if (sets.empty()) sets.push_back(&kernels_for(""));
  if (shapes.empty()) shapes = {{576, 576}, {3072, 576}, {576, 1536}, {49152, 576}, {9728, 896}, {896, 4864}};
  for (const auto& [outputs, inputs] : shapes) measure(outputs, inputs, sets, megabytes, seconds);
}
