// x86-64 with AVX-512, without its bfloat16 and VNNI instructions.
#include "kernels.hpp"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include <immintrin.h>

namespace medusa {
namespace {

#include "kernels_avx512.inl"

inline F dot_bf16(F acc, B w, std::uint32_t x) {
  const __m512i high = _mm512_set1_epi32(int(0xffff0000)), both = _mm512_set1_epi32(int(x));
  F x0 = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16)), x1 = _mm512_castsi512_ps(_mm512_and_si512(both, high));
  F w0 = _mm512_castsi512_ps(_mm512_slli_epi32(w, 16)), w1 = _mm512_castsi512_ps(_mm512_and_si512(w, high));
  return _mm512_fmadd_ps(w1, x1, _mm512_fmadd_ps(w0, x0, acc));
}
// Bytes 0 and 2, then bytes 1 and 3 of each lane, as pairs of 16-bit numbers: no sum saturates.
inline I dot_bytes(I acc, B w, std::int32_t x) {
  __m512i both = _mm512_set1_epi32(x);
  __m512i x02 = _mm512_srai_epi16(_mm512_slli_epi16(both, 8), 8), x13 = _mm512_srai_epi16(both, 8);
  __m512i w02 = _mm512_and_si512(w, _mm512_set1_epi16(255)), w13 = _mm512_srli_epi16(w, 8);
  return _mm512_add_epi32(acc, _mm512_add_epi32(_mm512_madd_epi16(w02, x02), _mm512_madd_epi16(w13, x13)));
}

#include "kernels_products.inl"

#include "kernels_avx512_integers.inl"

#include "kernels_generic.inl"

constexpr Kernels kTable = table("avx512");

}  // namespace

const Kernels* avx512_kernels() { return &kTable; }

}  // namespace medusa
#else
namespace medusa {
const Kernels* avx512_kernels() { return nullptr; }
}  // namespace medusa
#endif
