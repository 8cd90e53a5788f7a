// 64-bit ARM: a vector of 16 is four registers.
#include "kernels.hpp"

#if defined(__aarch64__) && defined(__ARM_NEON)
#include <arm_neon.h>

namespace medusa {
namespace {

struct F {
  float32x4_t v[4];
};
struct I {
  int32x4_t v[4];
};
struct B {
  uint8x16_t v[4];
};

constexpr int kAccumulators = 6, kIntegerSums = 3;

#define EACH for (int i = 0; i < 4; i++)
#define LANES(expression) \
  F r;                    \
  EACH r.v[i] = expression; \
  return r
inline F load(const float* p) { LANES(vld1q_f32(p + 4 * i)); }
inline void store(float* p, F x) { EACH vst1q_f32(p + 4 * i, x.v[i]); }
inline F set1(float x) { LANES(vdupq_n_f32(x)); }
inline F zero() { return set1(0.0f); }
inline F add(F x, F y) { LANES(vaddq_f32(x.v[i], y.v[i])); }
inline F sub(F x, F y) { LANES(vsubq_f32(x.v[i], y.v[i])); }
inline F mul(F x, F y) { LANES(vmulq_f32(x.v[i], y.v[i])); }
inline F div(F x, F y) { LANES(vdivq_f32(x.v[i], y.v[i])); }
inline F fma(F x, F y, F z) { LANES(vfmaq_f32(z.v[i], x.v[i], y.v[i])); }
inline F max_of(F x, F y) { LANES(vmaxq_f32(x.v[i], y.v[i])); }
inline F min_of(F x, F y) { LANES(vminq_f32(x.v[i], y.v[i])); }
inline std::uint32_t less(F x, F y) {
  const std::uint32_t weights[4] = {1, 2, 4, 8};
  std::uint32_t r = 0;
  EACH r |= vaddvq_u32(vandq_u32(vcltq_f32(x.v[i], y.v[i]), vld1q_u32(weights))) << (4 * i);
  return r;
}
inline F zero_where(std::uint32_t lanes, F x) {
  const std::uint32_t weights[4] = {1, 2, 4, 8};
  LANES(vreinterpretq_f32_u32(
      vbicq_u32(vreinterpretq_u32_f32(x.v[i]), vtstq_u32(vdupq_n_u32(lanes >> (4 * i)), vld1q_u32(weights)))));
}
inline F round_even(F x) { LANES(vrndnq_f32(x.v[i])); }
inline F power_of_two(F n) {
  LANES(vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n.v[i]), vdupq_n_s32(127)), 23)));
}
inline float sum_lanes(F x) {
  float32x4_t four = vaddq_f32(vaddq_f32(x.v[0], x.v[2]), vaddq_f32(x.v[1], x.v[3]));
  float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
  return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}
inline float max_lanes(F x) {
  return vmaxvq_f32(vmaxq_f32(vmaxq_f32(x.v[0], x.v[1]), vmaxq_f32(x.v[2], x.v[3])));
}
inline void store_bytes(std::byte* p, F x) {
  int16x8_t low = vcombine_s16(vmovn_s32(vcvtq_s32_f32(x.v[0])), vmovn_s32(vcvtq_s32_f32(x.v[1])));
  int16x8_t high = vcombine_s16(vmovn_s32(vcvtq_s32_f32(x.v[2])), vmovn_s32(vcvtq_s32_f32(x.v[3])));
  vst1q_s8(reinterpret_cast<std::int8_t*>(p), vcombine_s8(vmovn_s16(low), vmovn_s16(high)));
}
inline F load_bf16(const std::byte* p) {
  LANES(vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(reinterpret_cast<const std::uint16_t*>(p) + 4 * i), 16)));
}
inline void store_bf16(std::byte* p, F x) {  // rounded half to even
  EACH {
    uint32x4_t u = vreinterpretq_u32_f32(x.v[i]);
    uint32x4_t odd = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
    vst1_u16(reinterpret_cast<std::uint16_t*>(p) + 4 * i,
             vshrn_n_u32(vaddq_u32(vaddq_u32(u, odd), vdupq_n_u32(0x7fff)), 16));
  }
}
inline B load_bytes(const std::byte* p) {
  B r;
  EACH r.v[i] = vld1q_u8(reinterpret_cast<const std::uint8_t*>(p) + 16 * i);
  return r;
}
inline I int_set1(std::int32_t x) {
  I r;
  EACH r.v[i] = vdupq_n_s32(x);
  return r;
}
inline F int_to_float(I x) { LANES(vcvtq_f32_s32(x.v[i])); }
inline F dot_bf16(F acc, B w, std::uint32_t x) {
  const float32x4_t x0 = vreinterpretq_f32_u32(vdupq_n_u32(x << 16));
  const float32x4_t x1 = vreinterpretq_f32_u32(vdupq_n_u32(x & 0xffff0000u));
  F r;
  EACH {
    uint32x4_t pair = vreinterpretq_u32_u8(w.v[i]);
    float32x4_t even = vreinterpretq_f32_u32(vshlq_n_u32(pair, 16));
    float32x4_t odd = vreinterpretq_f32_u32(vandq_u32(pair, vdupq_n_u32(0xffff0000u)));
    r.v[i] = vfmaq_f32(vfmaq_f32(acc.v[i], even, x0), odd, x1);
  }
  return r;
}
inline I dot_bytes(I acc, B w, std::int32_t x) {
  const int16x8_t xs = vmovl_s8(vcreate_s8(std::uint64_t(std::uint32_t(x)) << 32 | std::uint32_t(x)));
  EACH {
    int16x8_t low = vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(w.v[i])));
    int16x8_t high = vreinterpretq_s16_u16(vmovl_u8(vget_high_u8(w.v[i])));
    int32x4_t a = vmull_s16(vget_low_s16(low), vget_low_s16(xs)), b = vmull_high_s16(low, xs);
    int32x4_t c = vmull_s16(vget_low_s16(high), vget_low_s16(xs)), d = vmull_high_s16(high, xs);
    acc.v[i] = vaddq_s32(acc.v[i], vpaddq_s32(vpaddq_s32(a, b), vpaddq_s32(c, d)));
  }
  return acc;
}
inline B low_nibbles(B x) {
  EACH x.v[i] = vandq_u8(x.v[i], vdupq_n_u8(15));
  return x;
}
inline B high_nibbles(B x) {
  EACH x.v[i] = vshrq_n_u8(x.v[i], 4);
  return x;
}
#undef LANES
#undef EACH

#include "kernels_products.inl"

#include "kernels_integers.inl"

#include "kernels_generic.inl"

constexpr Kernels kTable = table("neon");

}  // namespace

const Kernels* neon_kernels() { return &kTable; }

}  // namespace medusa
#else
namespace medusa {
const Kernels* neon_kernels() { return nullptr; }
}  // namespace medusa
#endif
