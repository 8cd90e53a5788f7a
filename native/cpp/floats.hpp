// Numbers of 16 bits, and what of them a compiler turns into vectors.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace medusa {

inline std::uint32_t bits_of(float v) {
  std::uint32_t u;
  std::memcpy(&u, &v, 4);
  return u;
}

inline float float_of(std::uint32_t u) {
  float v;
  std::memcpy(&v, &u, 4);
  return v;
}

inline float from_bfloat16(std::uint16_t bits) { return float_of(std::uint32_t(bits) << 16); }

inline std::uint16_t to_bfloat16(float v) {
  const std::uint32_t u = bits_of(v);
  return std::uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

// The nearest number that bfloat16 holds.
inline float as_bfloat16(float v) {
  const std::uint32_t u = bits_of(v);
  return float_of((u + 0x7fff + (u >> 16 & 1)) & 0xffff0000u);
}

inline float from_float16(std::uint16_t bits) {
  const std::uint32_t sign = std::uint32_t(bits & 0x8000) << 16, exponent = bits >> 10 & 31, fraction = bits & 1023;
  if (exponent == 0) {
    const float v = std::ldexp(float(fraction), -24);
    return sign ? -v : v;
  }
  return float_of(sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | fraction << 13);
}

// Half to even, for numbers far below 2^22. Unlike std::nearbyint it needs no call, so loops over it become vectors.
inline float round_even(float v) { return (v + 12582912.0f) - 12582912.0f; }

}  // namespace medusa
