// Vector operations of AVX-512 (F, BW, DQ, VL): a vector of 16 is one register. Included by the two AVX-512 files,
// which add dot_bf16 and dot_bytes.

using F = __m512;
using I = __m512i;
using B = __m512i;

#include "kernels_each.inl"

constexpr int kAccumulators = 24, kIntegerSums = 24;

inline F load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, F x) { _mm512_storeu_ps(p, x); }
inline F set1(float x) { return _mm512_set1_ps(x); }
inline F zero() { return _mm512_setzero_ps(); }
inline F add(F x, F y) { return _mm512_add_ps(x, y); }
inline F sub(F x, F y) { return _mm512_sub_ps(x, y); }
inline F mul(F x, F y) { return _mm512_mul_ps(x, y); }
inline F div(F x, F y) { return _mm512_div_ps(x, y); }
inline F fma(F x, F y, F z) { return _mm512_fmadd_ps(x, y, z); }
inline F max_of(F x, F y) { return _mm512_max_ps(x, y); }
inline F min_of(F x, F y) { return _mm512_min_ps(x, y); }
inline std::uint32_t less(F x, F y) { return _mm512_cmp_ps_mask(x, y, _CMP_LT_OQ); }
inline F zero_where(std::uint32_t lanes, F x) { return _mm512_maskz_mov_ps(__mmask16(~lanes), x); }
inline F round_even(F x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline F power_of_two(F n) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
}
inline float sum_lanes(F x) {
  __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float max_lanes(F x) { return _mm512_reduce_max_ps(x); }
inline void store_bytes(std::byte* p, F x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x)));
}
inline F load_bf16(const std::byte* p) {
  __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
}
inline void store_bf16(std::byte* p, F x) {  // rounded half to even
  __m512i u = _mm512_castps_si512(x);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  u = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(u, odd), _mm512_set1_epi32(0x7fff)), 16);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(u));
}
inline B load_bytes(const std::byte* p) { return _mm512_loadu_si512(p); }
inline I int_set1(std::int32_t x) { return _mm512_set1_epi32(x); }
inline F int_to_float(I x) { return _mm512_cvtepi32_ps(x); }
inline B low_nibbles(B x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
inline B high_nibbles(B x) { return low_nibbles(_mm512_srli_epi16(x, 4)); }
