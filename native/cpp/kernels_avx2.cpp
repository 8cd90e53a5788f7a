// x86-64 with AVX2 and FMA: a vector of 16 is two registers.
#include "kernels.hpp"

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>

namespace medusa {
namespace {

struct F {
  __m256 a, b;
};
struct I {
  __m256i a, b;
};
struct B {
  __m256i a, b;
};

constexpr int kAccumulators = 6;

inline F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, F x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
inline F set1(float x) {
  __m256 v = _mm256_set1_ps(x);
  return {v, v};
}
inline F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline F add(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline F sub(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline F mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline F div(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline F fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline F max_of(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline F min_of(F x, F y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline std::uint32_t less(F x, F y) {
  return std::uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(x.a, y.a, _CMP_LT_OQ))) |
         std::uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(x.b, y.b, _CMP_LT_OQ))) << 8;
}
inline __m256 keep_lanes(std::uint32_t gone, __m256 v) {
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  __m256i set = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(int(gone)), bit), bit);
  return _mm256_andnot_ps(_mm256_castsi256_ps(set), v);
}
inline F zero_where(std::uint32_t lanes, F x) { return {keep_lanes(lanes & 255, x.a), keep_lanes(lanes >> 8, x.b)}; }
inline F round_even(F x) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.a, mode), _mm256_round_ps(x.b, mode)};
}
inline __m256 power(__m256 n) {
  __m256i e = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(e, 23));
}
inline F power_of_two(F n) { return {power(n.a), power(n.b)}; }
inline float sum_lanes(F x) {
  __m256 eight = _mm256_add_ps(x.a, x.b);
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float max_lanes(F x) {
  __m256 eight = _mm256_max_ps(x.a, x.b);
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
inline void store_bytes(std::byte* p, F x) {
  __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b));  // in the order 0 2 1 3 of fours
  words = _mm256_permute4x64_epi64(words, 0xd8);
  __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}
inline __m256 widen(__m128i v) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16)); }
inline F load_bf16(const std::byte* p) {
  return {widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
          widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p) + 1))};
}
inline __m256i narrow(__m256 v) {  // bfloat16 in the low half of each lane, rounded half to even
  __m256i u = _mm256_castps_si256(v);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  return _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, odd), _mm256_set1_epi32(0x7fff)), 16);
}
inline void store_bf16(std::byte* p, F x) {
  __m256i packed = _mm256_packus_epi32(narrow(x.a), narrow(x.b));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
}
inline B load_bytes(const std::byte* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p) + 1)};
}
inline I int_set1(std::int32_t x) {
  __m256i v = _mm256_set1_epi32(x);
  return {v, v};
}
inline F int_to_float(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }

inline __m256 dot_pair(__m256 acc, __m256i w, __m256 x0, __m256 x1) {
  __m256 even = _mm256_castsi256_ps(_mm256_slli_epi32(w, 16));
  __m256 odd = _mm256_castsi256_ps(_mm256_and_si256(w, _mm256_set1_epi32(int(0xffff0000))));
  return _mm256_fmadd_ps(odd, x1, _mm256_fmadd_ps(even, x0, acc));
}
inline F dot_bf16(F acc, B w, std::uint32_t x) {
  __m256i both = _mm256_set1_epi32(int(x));
  __m256 x0 = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
  __m256 x1 = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(int(0xffff0000))));
  return {dot_pair(acc.a, w.a, x0, x1), dot_pair(acc.b, w.b, x0, x1)};
}
// Bytes 0 and 2, then bytes 1 and 3 of each lane, as pairs of 16-bit numbers: no sum saturates.
inline __m256i dot_four(__m256i acc, __m256i w, __m256i x02, __m256i x13) {
  __m256i w02 = _mm256_and_si256(w, _mm256_set1_epi16(255)), w13 = _mm256_srli_epi16(w, 8);
  return _mm256_add_epi32(acc, _mm256_add_epi32(_mm256_madd_epi16(w02, x02), _mm256_madd_epi16(w13, x13)));
}
inline I dot_bytes(I acc, B w, std::int32_t x) {
  __m256i both = _mm256_set1_epi32(x);
  __m256i x02 = _mm256_srai_epi16(_mm256_slli_epi16(both, 8), 8), x13 = _mm256_srai_epi16(both, 8);
  return {dot_four(acc.a, w.a, x02, x13), dot_four(acc.b, w.b, x02, x13)};
}
inline B low_nibbles(B x) {
  const __m256i m = _mm256_set1_epi8(15);
  return {_mm256_and_si256(x.a, m), _mm256_and_si256(x.b, m)};
}
inline B high_nibbles(B x) { return low_nibbles({_mm256_srli_epi16(x.a, 4), _mm256_srli_epi16(x.b, 4)}); }

#include "kernels_generic.inl"

constexpr Kernels kTable = table("avx2");

}  // namespace

const Kernels* avx2_kernels() { return &kTable; }

}  // namespace medusa
#else
namespace medusa {
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace medusa
#endif
