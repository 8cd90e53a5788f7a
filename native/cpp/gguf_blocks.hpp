// The packed formats of GGUF files, as their rows lie in the file: blocks of 32 or 256 weights.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "linear.hpp"

namespace medusa {

// Throws std::invalid_argument: the name is not that of a format known here.
Dtype gguf_dtype(const std::string& name);
std::vector<std::string> gguf_names();
int gguf_block(Dtype dtype);  // weights in a block
std::size_t gguf_row_bytes(Dtype dtype, int columns);

// A row of weights, each rounded to bfloat16: what a conversion of the file to a checkpoint holds.
void gguf_unpack(Dtype dtype, const std::byte* row, int columns, float* out);

// Formats whose groups of 32 weights are scale * q + minimum with q = 0..15, as those of int4 are.
bool gguf_has_four_bits(Dtype dtype);
struct FourBits {
  float scale, minimum;
  std::uint8_t q[kInt4Group];
};
void gguf_group(Dtype dtype, const std::byte* row, int group, FourBits& out);

}  // namespace medusa
