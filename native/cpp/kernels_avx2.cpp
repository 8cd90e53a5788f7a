// x86-64 with AVX2 and FMA.
#include "kernels.hpp"

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>

namespace medusa {
namespace {

#include "kernels_avx2.inl"

// int8: 4 inputs of 8 outputs at a time, as two pairs of 16-bit numbers, so no sum saturates. Activations lie widened,
// in the order 0, 2, 1, 3, as the weights' bytes come out of a mask and a shift.
constexpr int kInt8Parts = 2;
inline void store_int8_inputs(std::byte* p, F x) {
  const __m256i order = _mm256_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15,  //
                                         0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_shuffle_epi8(words_of(x), order));
}
INLINE inline __m256i int8_part(__m256i four, int part) {
  return part == 0 ? _mm256_and_si256(four, _mm256_set1_epi16(255)) : _mm256_srli_epi16(four, 8);
}
INLINE inline void add_int8(__m256i& sum, __m256i w, __m256i x) {
  const __m256i pairs = _mm256_madd_epi16(w, x);
  asm volatile("vpaddd %1, %0, %0" : "+x"(sum) : "x"(pairs));
}

// int4: nibbles times signed bytes, summed in 16 bits. A pair is at most 2 * 15 * 127 = 3,810, and the 8 pairs of a
// group that meet in a lane are at most 30,480.
static_assert(kInt4Group / 4 * 2 * 15 * 127 <= 32767);
INLINE inline __m256i first_int4(__m256i w, __m256i x) { return _mm256_maddubs_epi16(w, x); }
INLINE inline void add_int4(__m256i& sum, __m256i w, __m256i x) {
  const __m256i pairs = _mm256_maddubs_epi16(w, x);
  asm volatile("vpaddw %1, %0, %0" : "+x"(sum) : "x"(pairs));
}
INLINE inline __m256i lifted_int4(__m256i sum) {
  return _mm256_add_epi32(_mm256_madd_epi16(sum, _mm256_set1_epi16(1)), _mm256_set1_epi32(kLiftBits));
}

#include "kernels_avx2_products.inl"

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
