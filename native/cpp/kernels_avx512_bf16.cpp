// x86-64 with AVX-512 and its bfloat16 and VNNI instructions (Zen 4, Cooper Lake, Sapphire Rapids and later).
#include "kernels.hpp"

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>

namespace medusa {
namespace {

#include "kernels_avx512.inl"

inline F dot_bf16(F acc, B w, std::uint32_t x) {
  return _mm512_dpbf16_ps(acc, (__m512bh)w, (__m512bh)_mm512_set1_epi32(int(x)));
}
inline I dot_bytes(I acc, B w, std::int32_t x) { return _mm512_dpbusd_epi32(acc, w, _mm512_set1_epi32(x)); }

#include "kernels_products.inl"

#include "kernels_avx512_integers.inl"

#include "kernels_generic.inl"

constexpr Kernels kTable = table("avx512_bf16");

}  // namespace

const Kernels* avx512_bf16_kernels() { return &kTable; }

}  // namespace medusa
#else
namespace medusa {
const Kernels* avx512_bf16_kernels() { return nullptr; }
}  // namespace medusa
#endif
