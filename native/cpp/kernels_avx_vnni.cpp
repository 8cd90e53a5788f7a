// x86-64 with AVX2, FMA and AVX-VNNI (Alder Lake, Zen 5 and later): AVX2 but for its products of bytes. Same bits.
#include "kernels.hpp"

#if defined(__AVX2__) && defined(__FMA__) && defined(__AVXVNNI__)
#include <immintrin.h>

namespace medusa {
namespace {

#include "kernels_avx2.inl"

// One instruction multiplies 4 unsigned bytes of weights, as they lie, with 4 signed ones and adds all to a sum of 32
// bits.
INLINE inline __m256i dot_bytes(__m256i sum, __m256i w, __m256i x) { return _mm256_dpbusd_avx_epi32(sum, w, x); }

constexpr int kInt8Parts = 1;
inline void store_int8_inputs(std::byte* p, F x) { store_bytes(p, x); }
INLINE inline __m256i int8_part(__m256i four, int) { return four; }
INLINE inline void add_int8(__m256i& sum, __m256i w, __m256i x) {
  sum = dot_bytes(sum, w, x);
  asm volatile("" : "+x"(sum));
}

INLINE inline __m256i first_int4(__m256i w, __m256i x) { return dot_bytes(_mm256_set1_epi32(kLiftBits), w, x); }
INLINE inline void add_int4(__m256i& sum, __m256i w, __m256i x) { add_int8(sum, w, x); }
INLINE inline __m256i lifted_int4(__m256i sum) { return sum; }

#include "kernels_avx2_products.inl"

#include "kernels_generic.inl"

constexpr Kernels kTable = table("avx_vnni");

}  // namespace

const Kernels* avx_vnni_kernels() { return &kTable; }

}  // namespace medusa
#else
namespace medusa {
const Kernels* avx_vnni_kernels() { return nullptr; }
}  // namespace medusa
#endif
