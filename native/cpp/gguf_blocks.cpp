#include "gguf_blocks.hpp"

#include <cmath>
#include <cstring>
#include <stdexcept>

#include "floats.hpp"

// Each product and sum in the order of the `gguf` package's dequantisation: the values are the same bits.
namespace medusa {
namespace {

using Byte = std::uint8_t;

struct Kind {
  const char* name;
  Dtype dtype;
  int block, bytes;
};

constexpr Kind kKinds[] = {
    {"Q4_0", Dtype::q4_0, 32, 18},   {"Q4_1", Dtype::q4_1, 32, 20},   {"Q5_0", Dtype::q5_0, 32, 22},
    {"Q5_1", Dtype::q5_1, 32, 24},   {"Q8_0", Dtype::q8_0, 32, 34},   {"Q2_K", Dtype::q2_k, 256, 84},
    {"Q3_K", Dtype::q3_k, 256, 110}, {"Q4_K", Dtype::q4_k, 256, 144}, {"Q5_K", Dtype::q5_k, 256, 176},
    {"Q6_K", Dtype::q6_k, 256, 210},
};

const Kind& kind_of(Dtype dtype) { return kKinds[int(dtype) - int(Dtype::q4_0)]; }

float half(const Byte* at) {
  std::uint16_t bits;
  std::memcpy(&bits, at, 2);
  // Nor is what is made of infinity a finite number; rounding some of those that are no numbers would make one of them.
  return (bits & 0x7c00) == 0x7c00 ? INFINITY : from_float16(bits);
}

std::uint32_t word(const Byte* at) {
  std::uint32_t bits;
  std::memcpy(&bits, at, 4);
  return bits;
}

// n weights scale * q, and scale * q + minimum.
template <int n, typename Q>
void scaled(float scale, const Q* q, float* out) {
  for (int i = 0; i < n; i++) out[i] = as_bfloat16(scale * float(q[i]));
}
template <int n>
void shifted(float scale, const Byte* q, float minimum, float* out) {
  for (int i = 0; i < n; i++) out[i] = as_bfloat16(scale * float(q[i]) + minimum);
}

// The 16 low halves of bytes, then the 16 high ones.
void nibbles(const Byte* x, Byte* q) {
  for (int i = 0; i < 16; i++) q[i] = x[i] & 15;
  for (int i = 0; i < 16; i++) q[16 + i] = x[i] >> 4;
}

void five(const Byte* x, std::uint32_t high, Byte* q) {
  nibbles(x, q);
  for (int i = 0; i < 32; i++) q[i] |= (high >> i & 1) << 4;
}

// Scale and minimum j = 0..7 of Q4_K and Q5_K, six bits each in twelve bytes.
void scale_and_minimum(const Byte* x, int j, int& scale, int& minimum) {
  if (j < 4) {
    scale = x[j] & 63;
    minimum = x[j + 4] & 63;
  } else {
    scale = (x[j + 4] & 15) | (x[j - 4] >> 6) << 4;
    minimum = (x[j + 4] >> 4) | (x[j] >> 6) << 4;
  }
}

void unpack_q2_k(const Byte* x, float* out) {
  const float d = half(x + 80), least = half(x + 82);
  for (int g = 0; g < 16; g++) {
    Byte q[16];
    for (int i = 0; i < 16; i++) q[i] = x[16 + g / 8 * 32 + g % 2 * 16 + i] >> (g / 2 % 4 * 2) & 3;
    shifted<16>(d * float(x[g] & 15), q, -(least * float(x[g] >> 4)), out + 16 * g);
  }
}

void unpack_q3_k(const Byte* x, float* out) {
  const Byte* scales = x + 96;
  const float d = half(x + 108);
  for (int g = 0; g < 16; g++) {
    const int scale = ((scales[g % 8] >> (g / 8 * 4) & 15) | (scales[8 + g % 4] >> (g / 4 * 2) & 3) << 4) - 32;
    std::int8_t q[16];
    for (int i = 0; i < 16; i++) {
      const int low = x[32 + g / 8 * 32 + g % 2 * 16 + i] >> (g / 2 % 4 * 2) & 3;
      q[i] = std::int8_t(low - (x[g % 2 * 16 + i] >> (g / 2) & 1 ? 0 : 4));  // a clear bit takes 4 away
    }
    scaled<16>(d * float(scale), q, out + 16 * g);
  }
}

void unpack_k(const Byte* x, const Byte* low, const Byte* high, float* out) {
  const float d = half(x), least = half(x + 2);
  for (int g = 0; g < 8; g++) {
    int scale, minimum;
    scale_and_minimum(x + 4, g, scale, minimum);
    Byte q[32];
    for (int i = 0; i < 32; i++) q[i] = low[g / 2 * 32 + i] >> (g % 2 * 4) & 15;
    if (high)
      for (int i = 0; i < 32; i++) q[i] |= (high[i] >> g & 1) << 4;
    shifted<32>(d * float(scale), q, -(least * float(minimum)), out + 32 * g);
  }
}

void unpack_q6_k(const Byte* x, float* out) {
  const Byte* high = x + 128;
  const auto* scales = reinterpret_cast<const std::int8_t*>(x + 192);
  const float d = half(x + 208);
  for (int g = 0; g < 8; g++) {
    std::int8_t q[32];
    for (int i = 0; i < 32; i++) {
      const int low = x[g / 4 * 64 + g % 2 * 32 + i] >> (g / 2 % 2 * 4) & 15;
      q[i] = std::int8_t((low | (high[g / 4 * 32 + i] >> (g % 4 * 2) & 3) << 4) - 32);
    }
    scaled<16>(d * float(scales[2 * g]), q, out + 32 * g);
    scaled<16>(d * float(scales[2 * g + 1]), q + 16, out + 32 * g + 16);
  }
}

}  // namespace

Dtype gguf_dtype(const std::string& name) {
  for (const Kind& kind : kKinds)
    if (name == kind.name) return kind.dtype;
  throw std::invalid_argument("unknown packed format " + name);
}

std::vector<std::string> gguf_names() {
  std::vector<std::string> names;
  for (const Kind& kind : kKinds) names.push_back(kind.name);
  return names;
}

int gguf_block(Dtype dtype) { return kind_of(dtype).block; }

std::size_t gguf_row_bytes(Dtype dtype, int columns) {
  const Kind& kind = kind_of(dtype);
  return std::size_t(columns) / kind.block * kind.bytes;
}

void gguf_unpack(Dtype dtype, const std::byte* row, int columns, float* out) {
  const Kind& kind = kind_of(dtype);
  const Byte* x = reinterpret_cast<const Byte*>(row);
  for (int i = 0; i < columns; i += kind.block, x += kind.bytes, out += kind.block) {
    Byte q[32];
    switch (dtype) {
      case Dtype::q4_0: {
        nibbles(x + 2, q);
        std::int8_t around[32];
        for (int j = 0; j < 32; j++) around[j] = std::int8_t(q[j] - 8);
        scaled<32>(half(x), around, out);
        break;
      }
      case Dtype::q4_1:
        nibbles(x + 4, q);
        shifted<32>(half(x), q, half(x + 2), out);
        break;
      case Dtype::q5_0: {
        five(x + 6, word(x + 2), q);
        std::int8_t around[32];
        for (int j = 0; j < 32; j++) around[j] = std::int8_t(q[j] - 16);
        scaled<32>(half(x), around, out);
        break;
      }
      case Dtype::q5_1:
        five(x + 8, word(x + 4), q);
        shifted<32>(half(x), q, half(x + 2), out);
        break;
      case Dtype::q8_0: scaled<32>(half(x), reinterpret_cast<const std::int8_t*>(x + 2), out); break;
      case Dtype::q2_k: unpack_q2_k(x, out); break;
      case Dtype::q3_k: unpack_q3_k(x, out); break;
      case Dtype::q4_k: unpack_k(x, x + 16, nullptr, out); break;
      case Dtype::q5_k: unpack_k(x, x + 48, x + 16, out); break;
      default: unpack_q6_k(x, out);
    }
  }
}

bool gguf_has_four_bits(Dtype dtype) { return dtype == Dtype::q4_0 || dtype == Dtype::q4_1 || dtype == Dtype::q4_k; }

void gguf_group(Dtype dtype, const std::byte* row, int group, FourBits& out) {
  const Kind& kind = kind_of(dtype);
  const int groups = kind.block / kInt4Group;
  const Byte* x = reinterpret_cast<const Byte*>(row) + std::size_t(group / groups) * kind.bytes;
  if (dtype == Dtype::q4_k) {
    const int g = group % groups;
    int scale, minimum;
    scale_and_minimum(x + 4, g, scale, minimum);
    out.scale = half(x) * float(scale);
    out.minimum = -(half(x + 2) * float(minimum));
    for (int i = 0; i < 32; i++) out.q[i] = x[16 + g / 2 * 32 + i] >> (g % 2 * 4) & 15;
    return;
  }
  out.scale = half(x);
  out.minimum = dtype == Dtype::q4_1 ? half(x + 2) : -8 * out.scale;
  nibbles(x + (dtype == Dtype::q4_1 ? 4 : 2), out.q);
}

}  // namespace medusa
