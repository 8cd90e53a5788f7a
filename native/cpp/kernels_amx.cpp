// x86-64 with AMX (Sapphire Rapids and later), beside AVX-512 with its bfloat16 and VNNI instructions.
#include "kernels.hpp"

#if defined(__linux__) && defined(__AMX_TILE__) && defined(__AMX_INT8__) && defined(__AMX_BF16__) && \
    defined(__AVX512BF16__) && defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
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

#include "kernels_amx_products.inl"

#include "kernels_generic.inl"

constexpr Kernels with_tiles(Kernels kernels) {
  kernels.matmul[int(Format::bfloat16)] = amx_matmul<Format::bfloat16>;
  kernels.matmul[int(Format::int8)] = amx_matmul<Format::int8>;
  return kernels;
}

constexpr Kernels kTable = with_tiles(table("amx"));

}  // namespace

const Kernels* amx_kernels() { return &kTable; }

}  // namespace medusa
#else
namespace medusa {
const Kernels* amx_kernels() { return nullptr; }
}  // namespace medusa
#endif
