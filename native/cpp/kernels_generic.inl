// The kernels, written once over a few vector operations; included by each kernels_<set>.cpp inside an unnamed
// namespace, so that no code compiled for one instruction set is ever linked in place of another's.
//
// The including file defines, for 16 lanes:
//   F (floats), fetch of kernels_products.inl, and
//   load store zero set1 add sub mul div fma(a, b, c) = a * b + c, max_of, less(a, b) -> bit mask of lanes,
//   min_of, round_even, power_of_two(F of whole numbers), zero_where(lanes, F),
//   sum_lanes (halves added up: 16 to 8 to 4 to 2 to 1), max_lanes,
//   load_bf16 (16 of them), store_bf16
// and the products of packed weights, with the form in which they read activations: kernels_products.inl or its like.

// --- rows -------------------------------------------------------------------------------------------------------

// The first n lanes of p, the others `fill`.
inline F load_part(const float* p, int n, float fill) {
  alignas(64) float a[kLanes];
  for (int i = 0; i < kLanes; i++) a[i] = i < n ? p[i] : fill;
  return load(a);
}

inline void store_part(float* p, F v, int n) {
  alignas(64) float a[kLanes];
  store(a, v);
  for (int i = 0; i < n; i++) p[i] = a[i];
}

inline F load_upto(const float* p, int n, float fill) { return n >= kLanes ? load(p) : load_part(p, n, fill); }
inline void store_upto(float* p, F v, int n) { n >= kLanes ? store(p, v) : store_part(p, v, n); }

void rms_norm(const float* x, const float* weight, float epsilon, int n, float* y) {
  F squares = zero();
  for (int i = 0; i < n; i += kLanes) {
    F v = load_upto(x + i, n - i, 0.0f);
    squares = fma(v, v, squares);
  }
  F scale = set1(1.0f / __builtin_sqrtf(sum_lanes(squares) / float(n) + epsilon));
  for (int i = 0; i < n; i += kLanes) {
    F v = mul(load_upto(x + i, n - i, 0.0f), scale);
    if (weight) v = mul(v, load_upto(weight + i, n - i, 0.0f));
    store_upto(y + i, v, n - i);
  }
}

void quantise_float32(const float* x, int n, int padded, std::byte* out, float*, std::int32_t*, float*) {
  float* y = reinterpret_cast<float*>(out);
  for (int i = 0; i < padded; i += kLanes) store_upto(y + i, load_upto(x + i, n - i, 0.0f), padded - i);
}

void quantise_bfloat16(const float* x, int n, int padded, std::byte* out, float*, std::int32_t*, float*) {
  constexpr int bytes = int(kInputBytes[int(Format::bfloat16)]);
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) store_bfloat16_inputs(out + bytes * i, load(x + i));
  if (i < padded) {
    alignas(64) std::byte last[bytes * kLanes];
    for (; i < padded; i += kLanes) {
      store_bfloat16_inputs(last, load_part(x + i, n - i, 0.0f));
      __builtin_memcpy(out + bytes * i, last, std::size_t(bytes) * (padded - i < kLanes ? padded - i : kLanes));
    }
  }
}

void to_bfloat16(const float* x, int n, std::byte* out) {
  for (int i = 0; i < n; i += kLanes) store_bf16(out + 2 * i, load(x + i));
}

template <Format format, int group>
inline void quantise_bytes(const float* x, int n, int padded, std::byte* out, float* scales, std::int32_t* start,
                           float* sums) {
  constexpr std::size_t bytes = kInputBytes[int(format)];
  for (int g = 0; g < padded / group; g++) {
    F v[group / kLanes];
    F most = zero();
    for (int i = 0; i < group / kLanes; i++) {
      int at = g * group + i * kLanes;
      v[i] = load_upto(x + at, n - at, 0.0f);
      most = max_of(most, max_of(v[i], sub(zero(), v[i])));
    }
    float top = max_lanes(most);
    float scale = top / 127.0f;
    F inverse = set1(top > 1e-30f ? 127.0f / top : 0.0f);
    F total = zero();
    for (int i = 0; i < group / kLanes; i++) {
      F q = round_even(mul(v[i], inverse));
      total = add(total, q);  // whole numbers: exact
      std::byte* to = out + bytes * (g * group + i * kLanes);
      if (format == Format::int8) store_int8_inputs(to, q);
      else store_int4_inputs(to, q);
    }
    float sum = sum_lanes(total);
    if (sum != sum) {  // a number is none, which must show in what comes out
      scales[g] = sum;
      start[g] = 0;
      if (format != Format::int8) sums[g] = sum;
    } else if (format == Format::int8) {
      scales[g] = scale;
      start[g] = -128 * std::int32_t(sum);
    } else {
      scales[g] = int4_scale(scale);
      start[g] = int4_start(scales[g]);
      sums[g] = scales[g] * sum;
    }
  }
}

void quantise_int8(const float* x, int n, int padded, std::byte* out, float* scales, std::int32_t* start, float* sums) {
  quantise_bytes<Format::int8, kInt8Group>(x, n, padded, out, scales, start, sums);
}

void quantise_int4(const float* x, int n, int padded, std::byte* out, float* scales, std::int32_t* start, float* sums) {
  quantise_bytes<Format::int4, kInt4Group>(x, n, padded, out, scales, start, sums);
}

// exp(x) to about 2 units in the last place; 0 below -87.
inline F exponential(F x) {
  const F low = set1(-87.0f);
  x = max_of(x, set1(-88.0f));
  F n = round_even(mul(x, set1(1.44269504088896341f)));
  F r = fma(n, set1(-0.693359375f), x);
  r = fma(n, set1(2.12194440e-4f), r);
  F p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = fma(p, mul(r, r), add(r, set1(1.0f)));
  return zero_where(less(x, low), mul(p, power_of_two(n)));
}

inline F clamp_low(F x) { return min_of(x, set1(87.0f)); }  // exp() of it is finite

inline F silu_of(F x) { return div(x, add(set1(1.0f), exponential(clamp_low(sub(zero(), x))))); }

void gated(Gate gate, const float* g, const float* u, float* y) {
  F x = load(g);
  if (gate == Gate::silu) {
    store(y, mul(silu_of(x), load(u)));
  } else if (gate == Gate::gelu_tanh) {
    // 0.5 x (1 + tanh(z)) = x / (1 + exp(-2 z)), z = sqrt(2 / pi) (x + 0.044715 x^3)
    F cube = mul(mul(x, x), x);
    F z2 = mul(set1(-1.5957691216057308f), fma(set1(0.044715f), cube, x));
    store(y, mul(div(x, add(set1(1.0f), exponential(clamp_low(z2)))), load(u)));
  } else {
    for (int i = 0; i < kLanes; i++) y[i] = 0.5f * g[i] * (1.0f + __builtin_erff(g[i] * 0.70710678118654752f)) * u[i];
  }
}

void silu(const float* x, int n, float* y) {
  for (int i = 0; i < n; i += kLanes) store_upto(y + i, silu_of(load_upto(x + i, n - i, 0.0f)), n - i);
}

void top_k(const float* x, int n, int k, float* values, std::int32_t* ids, float* log_sum_exp) {
  int found = 0;
  auto offer = [&](float v, int i) {
    int at = found;
    if (found < k) found++;
    else if (!(v > values[k - 1])) return;
    else at = k - 1;
    while (at > 0 && v > values[at - 1]) {
      values[at] = values[at - 1];
      ids[at] = ids[at - 1];
      at--;
    }
    values[at] = v;
    ids[at] = i;
  };
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    std::uint32_t better = found < k ? 0xffffu : less(set1(values[k - 1]), load(x + i));
    while (better) {
      int lane = __builtin_ctz(better);
      better &= better - 1;
      offer(x[i + lane], i + lane);
    }
  }
  for (; i < n; i++) offer(x[i], i);
  F top = set1(values[0]), sum = zero();
  for (i = 0; i < n; i += kLanes) sum = add(sum, exponential(sub(load_upto(x + i, n - i, -1e30f), top)));
  *log_sum_exp = values[0] + __builtin_logf(sum_lanes(sum));
}

#include "kernels_attention.inl"
#include "kernels_choosing.inl"

constexpr Kernels table(const char* name) {
  return Kernels{name,
                 {matmul<Format::float32>, matmul<Format::bfloat16>, matmul<Format::int8>, matmul<Format::int4>},
                 {kInputBytes[0], kInputBytes[1], kInputBytes[2], kInputBytes[3]},
                 {quantise_float32, quantise_bfloat16, quantise_int8, quantise_int4},
                 to_bfloat16,
                 attend<float>,
                 attend<std::uint16_t>,
                 join,
                 rms_norm,
                 gated,
                 silu,
                 top_k,
                 best,
                 at_least,
                 tops,
                 weigh,
                 divide,
                 noise_bounds};
}
