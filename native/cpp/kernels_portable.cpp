// Plain C++, for any processor; the reference of the tests.
#include "kernels.hpp"

namespace medusa {
namespace {

struct F {
  float v[kLanes];
};
struct I {
  std::int32_t v[kLanes];
};
struct B {
  std::uint8_t v[64];
};

constexpr int kAccumulators = 4, kIntegerSums = 2;

#define EACH for (int i = 0; i < kLanes; i++)
inline F load(const float* p) {
  F r;
  EACH r.v[i] = p[i];
  return r;
}
inline void store(float* p, const F& a) { EACH p[i] = a.v[i]; }
inline F set1(float x) {
  F r;
  EACH r.v[i] = x;
  return r;
}
inline F zero() { return set1(0.0f); }
inline F add(const F& a, const F& b) {
  F r;
  EACH r.v[i] = a.v[i] + b.v[i];
  return r;
}
inline F sub(const F& a, const F& b) {
  F r;
  EACH r.v[i] = a.v[i] - b.v[i];
  return r;
}
inline F mul(const F& a, const F& b) {
  F r;
  EACH r.v[i] = a.v[i] * b.v[i];
  return r;
}
inline F div(const F& a, const F& b) {
  F r;
  EACH r.v[i] = a.v[i] / b.v[i];
  return r;
}
inline F fma(const F& a, const F& b, const F& c) {
  F r;
  EACH r.v[i] = a.v[i] * b.v[i] + c.v[i];
  return r;
}
inline F max_of(const F& a, const F& b) {
  F r;
  EACH r.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
  return r;
}
inline F min_of(const F& a, const F& b) {
  F r;
  EACH r.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i];
  return r;
}
inline std::uint32_t less(const F& a, const F& b) {
  std::uint32_t r = 0;
  EACH r |= std::uint32_t(a.v[i] < b.v[i]) << i;
  return r;
}
inline F zero_where(std::uint32_t lanes, F a) {
  EACH if (lanes >> i & 1) a.v[i] = 0.0f;
  return a;
}
// Adding and taking away 1.5 * 2^23 leaves a whole number, rounded half to even.
inline F round_even(const F& a) {
  F r;
  EACH {
    float big = a.v[i] + 12582912.0f;
    r.v[i] = big - 12582912.0f;
  }
  return r;
}
inline F power_of_two(const F& n) {
  F r;
  EACH {
    std::uint32_t bits = std::uint32_t(std::int32_t(n.v[i]) + 127) << 23;
    __builtin_memcpy(&r.v[i], &bits, 4);
  }
  return r;
}
inline float sum_lanes(F a) {
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) a.v[i] += a.v[i + half];
  return a.v[0];
}
inline float max_lanes(const F& a) {
  float best = a.v[0];
  EACH best = a.v[i] > best ? a.v[i] : best;
  return best;
}
inline void store_bytes(std::byte* p, const F& a) { EACH p[i] = std::byte(std::int8_t(a.v[i])); }
inline float widen(std::uint32_t bits) {
  bits <<= 16;
  float v;
  __builtin_memcpy(&v, &bits, 4);
  return v;
}
inline F load_bf16(const std::byte* p) {
  std::uint16_t bits[kLanes];
  __builtin_memcpy(bits, p, sizeof bits);
  F r;
  EACH r.v[i] = widen(bits[i]);
  return r;
}
inline void store_bf16(std::byte* p, const F& a) {
  std::uint16_t bits[kLanes];
  EACH {
    std::uint32_t u;
    __builtin_memcpy(&u, &a.v[i], 4);
    bits[i] = std::uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
  }
  __builtin_memcpy(p, bits, sizeof bits);
}
inline B load_bytes(const std::byte* p) {
  B r;
  __builtin_memcpy(r.v, p, 64);
  return r;
}
inline I int_set1(std::int32_t x) {
  I r;
  EACH r.v[i] = x;
  return r;
}
inline F int_to_float(const I& a) {
  F r;
  EACH r.v[i] = float(a.v[i]);
  return r;
}
inline F dot_bf16(F acc, const B& w, std::uint32_t x) {
  const float x0 = widen(x & 0xffff), x1 = widen(x >> 16);
  std::uint32_t pair[kLanes];
  __builtin_memcpy(pair, w.v, 64);
  EACH acc.v[i] = acc.v[i] + widen(pair[i] & 0xffff) * x0 + widen(pair[i] >> 16) * x1;
  return acc;
}
inline I dot_bytes(I acc, const B& w, std::int32_t x) {
  std::int8_t s[4];
  __builtin_memcpy(s, &x, 4);
  EACH for (int j = 0; j < 4; j++) acc.v[i] += int(w.v[4 * i + j]) * int(s[j]);
  return acc;
}
inline B low_nibbles(B a) {
  for (auto& v : a.v) v &= 15;
  return a;
}
inline B high_nibbles(B a) {
  for (auto& v : a.v) v >>= 4;
  return a;
}
#undef EACH

#include "kernels_products.inl"

#include "kernels_integers.inl"

#include "kernels_generic.inl"

constexpr Kernels kTable = table("portable");

}  // namespace

const Kernels* portable_kernels() { return &kTable; }

}  // namespace medusa
