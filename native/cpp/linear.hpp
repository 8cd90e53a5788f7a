// Linear layers in packed form. Layouts: see kernels.hpp.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "kernels.hpp"
#include "memory.hpp"
#include "pool.hpp"

namespace medusa {

inline int round_up(int n, int unit) { return (n + unit - 1) / unit * unit; }

enum class Dtype : std::uint8_t {
  float32, bfloat16, float16,
  q4_0, q4_1, q5_0, q5_1, q8_0, q2_k, q3_k, q4_k, q5_k, q6_k  // packed, of GGUF files; see gguf_blocks.hpp
};
inline bool is_packed(Dtype dtype) { return dtype >= Dtype::q4_0; }

// A matrix [rows, columns] or a vector [1, columns] as it lies in a checkpoint; not owned. Empty: data is null.
struct Source {
  const std::byte* data = nullptr;
  Dtype dtype = Dtype::float32;
  int rows = 0;
  int columns = 0;

  void row(int index, float* out) const;
};

// All values; throws std::invalid_argument naming `name` where one is not a finite number.
std::vector<float> read(const Source& source, const std::string& name);

// Whether each value is a finite number.
bool all_finite(Pool& pool, const Source& source);

int padded_inputs(Format format, int inputs);

struct Linear {
  Format format = Format::float32;
  int inputs = 0;  // padded
  int blocks = 0;  // of 16 outputs
  std::size_t block_bytes = 0;
  std::byte* weights = nullptr;  // in an arena that outlives the layer
  std::vector<float> bias;  // [16 * blocks] or empty

  int outputs() const { return blocks * kLanes; }
  std::size_t bytes() const { return block_bytes * blocks; }
  const std::byte* block(int index) const { return weights + index * block_bytes; }
};

// One output of a linear layer: a row of a source, or zeros.
struct OutputRow {
  const Source* source = nullptr;
  int row = 0;
};

// Packs `rows` (a multiple of 16) into `arena`. Input i comes from column `columns[i]`, or is zero where that is -1; no columns
// means all, in order. Throws std::invalid_argument naming `name` where a weight is not a finite number, and
// std::bad_alloc.
Linear pack(Pool& pool, Arena& arena, Format format, const std::vector<OutputRow>& rows, const std::vector<int>& columns,
            const std::string& name);

// The rows of one source, padded to a multiple of 16.
std::vector<OutputRow> rows_of(const Source& source);

// A block of 16 gates, then the block of the 16 ups beside it, and so on: one thread has both for `Kernels::gated`.
std::vector<OutputRow> interleaved(const Source& gate, const Source& up);

// A table of activations in a format: one row for each token.
struct ActivationBuffer {
  Buffer data, scales, start, sums;
  Format format = Format::float32;
  int inputs = 0;
  std::size_t stride = 0;
  std::size_t groups = 0;

  void shape(const Kernels& kernels, Format format, int inputs);  // `inputs` are padded
  void fit(int tokens);
  Activations view() const;
  void set(const Kernels& kernels, int token, const float* x, int n);
};

// Multiplies `count` tokens by all blocks and hands each row of what came out (bias added) to epilogue(token, first
// output, number of outputs, y), together with the other threads of the phase. `unit`: blocks that must stay together.
// `panel`: room for count * kMaxPanel * kLanes floats of this thread. `next`: the weights that this thread will read
// afterwards.
template <typename Epilogue>
void multiply(const Kernels& kernels, const Linear& linear, const Activations& x, int count, int unit, int thread,
              Phase& phase, float* panel, const std::byte* next, Epilogue epilogue) {
  const int end = phase.first(thread + 1, linear.blocks, unit);
  phase.run(thread, linear.blocks, unit, kMaxPanel / unit, [&](int first, int blocks) {
    const std::size_t width = std::size_t(blocks) * kLanes;
    const std::byte* weights = linear.block(first);
    const std::byte* then = first + blocks < end ? linear.block(first + blocks) : next ? next : weights;
    kernels.matmul[int(linear.format)]({weights, linear.block_bytes, blocks, linear.inputs, then - weights}, x, count,
                                       panel, width);
    for (int t = 0; t < count; t++) {
      float* y = panel + t * width;
      if (!linear.bias.empty())
        for (std::size_t i = 0; i < width; i++) y[i] += linear.bias[first * kLanes + i];
      epilogue(t, first * kLanes, int(width), y);
    }
  });
}

// What `multiply` does with a row: copied to, or added to, rows of `size` floats; outputs past them only fill a block.
inline auto copied_to(float* rows, int size) {
  return [=](int t, int first, int n, const float* y) {
    std::memcpy(rows + std::size_t(t) * size + first, y, std::min(n, size - first) * sizeof(float));
  };
}
inline auto added_to(float* rows, int size) {
  return [=](int t, int first, int n, const float* y) {
    float* row = rows + std::size_t(t) * size + first;
    n = std::min(n, size - first);
    for (int i = 0; i < n; i++) row[i] += y[i];
  };
}
// Of `interleaved` outputs: gate(g) * u goes to rows of `size` floats, a multiple of 16.
inline auto gated_to(const Kernels& kernels, Gate gate, float* rows, int size) {
  return [=, &kernels](int t, int first, int n, const float* y) {
    for (int i = 0; i < n; i += 2 * kLanes)
      kernels.gated(gate, y + i, y + i + kLanes, rows + std::size_t(t) * size + (first + i) / 2);
  };
}

}  // namespace medusa
