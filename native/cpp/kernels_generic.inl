// The kernels, written once over a few vector operations; included by each kernels_<set>.cpp inside an unnamed
// namespace, so that no code compiled for one instruction set is ever linked in place of another's.
//
// The including file defines, for 16 lanes:
//   F (floats), B (64 bytes of packed weights), I (32-bit integers), and on them
//   load store zero set1 add sub mul div fma(a, b, c) = a * b + c, max_of, less(a, b) -> bit mask of lanes,
//   min_of, round_even, power_of_two(F of whole numbers), zero_where(lanes, F),
//   sum_lanes (halves added up: 16 to 8 to 4 to 2 to 1), max_lanes,
//   load_bf16 (16 of them), store_bf16, store_bytes(F of whole numbers), load_bytes, int_set1, int_to_float,
//   dot_bf16(F acc, B w, uint32 pair of x), dot_bytes(I acc, B unsigned, int32 four signed of x), low_nibbles, high_nibbles
//   kAccumulators: how many F fit in registers beside the rest.

// Weights come from memory in many short streams, one for each block; the processor's own prefetching begins anew with
// each. So each line that is read asks for the one at the same place in the panel to come.
inline void fetch(const std::byte* p, std::ptrdiff_t ahead) { __builtin_prefetch(p + ahead, 0, 2); }

// --- products ---------------------------------------------------------------------------------------------------

inline std::uint32_t word(const std::byte* p) {
  std::uint32_t v;
  __builtin_memcpy(&v, p, 4);
  return v;
}

template <int M, int NB>
inline void tile_float32(const Panel& w, const std::byte* x, std::size_t stride, float* y, std::size_t y_stride) {
  F acc[NB][M];
  for (int b = 0; b < NB; b++)
    for (int m = 0; m < M; m++) acc[b][m] = zero();
  const float* weights = reinterpret_cast<const float*>(w.data);
  const std::size_t block = w.block_bytes / sizeof(float);
  for (int k = 0; k < w.inputs; k++) {
    F wv[NB];
    for (int b = 0; b < NB; b++) {
      const float* at = weights + b * block + std::size_t(k) * kLanes;
      fetch(reinterpret_cast<const std::byte*>(at), w.ahead);
      wv[b] = load(at);
    }
    for (int m = 0; m < M; m++) {
      F xv = set1(reinterpret_cast<const float*>(x + m * stride)[k]);
      for (int b = 0; b < NB; b++) acc[b][m] = fma(wv[b], xv, acc[b][m]);
    }
  }
  for (int m = 0; m < M; m++)
    for (int b = 0; b < NB; b++) store(y + m * y_stride + b * kLanes, acc[b][m]);
}

template <int M, int NB>
inline void tile_bfloat16(const Panel& w, const std::byte* x, std::size_t stride, float* y, std::size_t y_stride) {
  F acc[NB][M];
  for (int b = 0; b < NB; b++)
    for (int m = 0; m < M; m++) acc[b][m] = zero();
  for (int k = 0; k < w.inputs / 2; k++) {
    B wv[NB];
    for (int b = 0; b < NB; b++) {
      const std::byte* at = w.data + b * w.block_bytes + std::size_t(k) * 64;
      fetch(at, w.ahead);
      wv[b] = load_bytes(at);
    }
    for (int m = 0; m < M; m++) {
      std::uint32_t xv = word(x + m * stride + std::size_t(k) * 4);
      for (int b = 0; b < NB; b++) acc[b][m] = dot_bf16(acc[b][m], wv[b], xv);
    }
  }
  for (int m = 0; m < M; m++)
    for (int b = 0; b < NB; b++) store(y + m * y_stride + b * kLanes, acc[b][m]);
}

template <int M, int NB>
inline void tile_int8(const Panel& w, const Activations& a, int first, float* y, std::size_t y_stride) {
  constexpr int steps = kInt8Group / 4;
  F acc[NB][M];
  for (int b = 0; b < NB; b++)
    for (int m = 0; m < M; m++) acc[b][m] = zero();
  const std::byte* x = a.data + first * a.stride;
  const int groups = w.inputs / kInt8Group;
  const std::byte* scales = w.data + std::size_t(w.inputs) * kLanes;
  for (int g = 0; g < groups; g++) {
    I sum[NB][M];
    for (int m = 0; m < M; m++) {
      I start = int_set1(a.start[(first + m) * a.groups + g]);
      for (int b = 0; b < NB; b++) sum[b][m] = start;
    }
    for (int k = g * steps; k < (g + 1) * steps; k++) {
      B wv[NB];
      for (int b = 0; b < NB; b++) {
      const std::byte* at = w.data + b * w.block_bytes + std::size_t(k) * 64;
      fetch(at, w.ahead);
      wv[b] = load_bytes(at);
    }
      for (int m = 0; m < M; m++) {
        std::int32_t xv = std::int32_t(word(x + m * a.stride + std::size_t(k) * 4));
        for (int b = 0; b < NB; b++) sum[b][m] = dot_bytes(sum[b][m], wv[b], xv);
      }
    }
    F scale[NB];
    for (int b = 0; b < NB; b++) {
      const std::byte* at = scales + b * w.block_bytes + std::size_t(g) * 2 * kLanes;
      fetch(at, w.ahead);
      scale[b] = load_bf16(at);
    }
    for (int m = 0; m < M; m++) {
      F xs = set1(a.scales[(first + m) * a.groups + g]);
      for (int b = 0; b < NB; b++) acc[b][m] = fma(mul(int_to_float(sum[b][m]), xs), scale[b], acc[b][m]);
    }
  }
  for (int m = 0; m < M; m++)
    for (int b = 0; b < NB; b++) store(y + m * y_stride + b * kLanes, acc[b][m]);
}

template <int M, int NB>
inline void tile_int4(const Panel& w, const Activations& a, int first, float* y, std::size_t y_stride) {
  constexpr int steps = kInt4Group / 8;
  F acc[NB][M];
  for (int b = 0; b < NB; b++)
    for (int m = 0; m < M; m++) acc[b][m] = zero();
  const std::byte* x = a.data + first * a.stride;
  const int groups = w.inputs / kInt4Group;
  const std::byte* scales = w.data + std::size_t(w.inputs) * kLanes / 2;
  for (int g = 0; g < groups; g++) {
    I sum[NB][M];
    for (int b = 0; b < NB; b++)
      for (int m = 0; m < M; m++) sum[b][m] = int_set1(0);
    for (int k = g * steps; k < (g + 1) * steps; k++) {
      B low[NB], high[NB];
      for (int b = 0; b < NB; b++) {
        const std::byte* at = w.data + b * w.block_bytes + std::size_t(k) * 64;
        fetch(at, w.ahead);
        B both = load_bytes(at);
        low[b] = low_nibbles(both);
        high[b] = high_nibbles(both);
      }
      for (int m = 0; m < M; m++) {
        std::int32_t x0 = std::int32_t(word(x + m * a.stride + std::size_t(k) * 8));
        std::int32_t x1 = std::int32_t(word(x + m * a.stride + std::size_t(k) * 8 + 4));
        for (int b = 0; b < NB; b++) sum[b][m] = dot_bytes(dot_bytes(sum[b][m], low[b], x0), high[b], x1);
      }
    }
    F scale[NB], minimum[NB];
    for (int b = 0; b < NB; b++) {
      const std::byte* at = scales + b * w.block_bytes + std::size_t(g) * 4 * kLanes;
      fetch(at, w.ahead);
      scale[b] = load_bf16(at);
      minimum[b] = load_bf16(at + 2 * kLanes);
    }
    for (int m = 0; m < M; m++) {
      F xs = set1(a.scales[(first + m) * a.groups + g]);
      F total = set1(a.sums[(first + m) * a.groups + g]);
      for (int b = 0; b < NB; b++) {
        acc[b][m] = fma(minimum[b], total, acc[b][m]);
        acc[b][m] = fma(mul(int_to_float(sum[b][m]), xs), scale[b], acc[b][m]);
      }
    }
  }
  for (int m = 0; m < M; m++)
    for (int b = 0; b < NB; b++) store(y + m * y_stride + b * kLanes, acc[b][m]);
}

template <Format format, int M, int NB>
inline void tile(const Panel& w, const Activations& a, int first, float* y, std::size_t y_stride) {
  if constexpr (format == Format::float32)
    tile_float32<M, NB>(w, a.data + first * a.stride, a.stride, y, y_stride);
  else if constexpr (format == Format::bfloat16)
    tile_bfloat16<M, NB>(w, a.data + first * a.stride, a.stride, y, y_stride);
  else if constexpr (format == Format::int8)
    tile_int8<M, NB>(w, a, first, y, y_stride);
  else
    tile_int4<M, NB>(w, a, first, y, y_stride);
}

// Integer products keep a sum of integers and one of floats for each output, so half as many fit.
template <Format format>
inline constexpr int kRoom = (format == Format::int8 || format == Format::int4) ? kAccumulators / 2 : kAccumulators;
template <Format format>
inline constexpr int kMostRows = kRoom<format> < 12 ? kRoom<format> : 12;

template <Format format, int M, int NB>
inline void panel_rows(Panel w, const Activations& a, int first, float* y, std::size_t y_stride) {
  // Blocks of the panel, as many at a time as registers hold beside M rows.
  constexpr int fit = kRoom<format> / M < 1 ? 1 : kRoom<format> / M;
  if constexpr (NB > fit) {
    panel_rows<format, M, fit>(w, a, first, y, y_stride);
    Panel rest = w;
    rest.data += fit * w.block_bytes;
    panel_rows<format, M, NB - fit>(rest, a, first, y + fit * kLanes, y_stride);
  } else {
    tile<format, M, NB>(w, a, first, y, y_stride);
  }
}

template <Format format, int M>
inline void rows_of(const Panel& w, const Activations& a, int first, float* y, std::size_t y_stride) {
  switch (w.blocks) {
    case 1: panel_rows<format, M, 1>(w, a, first, y, y_stride); break;
    case 2: panel_rows<format, M, 2>(w, a, first, y, y_stride); break;
    case 3: panel_rows<format, M, 3>(w, a, first, y, y_stride); break;
    default: panel_rows<format, M, 4>(w, a, first, y, y_stride); break;
  }
}

template <Format format, int M>
inline void dispatch_rows(int count, const Panel& w, const Activations& a, int first, float* y, std::size_t stride) {
  if constexpr (M > 1) {
    if (count < M) return dispatch_rows<format, M - 1>(count, w, a, first, y, stride);
  }
  rows_of<format, M>(w, a, first, y, stride);
}

template <Format format>
void matmul(const Panel& panel, const Activations& a, int tokens, float* y, std::size_t y_stride) {
  constexpr int most = kMostRows<format>;
  Panel w = panel;
  // Even shares: 16 rows are 8 and 8, not 12 and 4.
  const int passes = (tokens + most - 1) / most;
  for (int pass = 0, first = 0; pass < passes; pass++) {
    int count = (tokens - first + passes - pass - 1) / (passes - pass);
    dispatch_rows<format, most>(count, w, a, first, y + first * y_stride, y_stride);
    first += count;
    w.ahead = 0;  // once is enough
  }
}

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
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) store_bf16(out + 2 * i, load(x + i));
  if (i < padded) {
    alignas(64) std::byte last[2 * kLanes];
    for (; i < padded; i += kLanes) {
      store_bf16(last, load_part(x + i, n - i, 0.0f));
      __builtin_memcpy(out + 2 * i, last, std::size_t(2) * (padded - i < kLanes ? padded - i : kLanes));
    }
  }
}

template <int group, bool offset>
inline void quantise_bytes(const float* x, int n, int padded, std::byte* out, float* scales, std::int32_t* start,
                           float* sums) {
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
      store_bytes(out + g * group + i * kLanes, q);
    }
    scales[g] = scale;
    if (offset)
      start[g] = -128 * std::int32_t(sum_lanes(total));
    else
      sums[g] = scale * sum_lanes(total);
  }
}

void quantise_int8(const float* x, int n, int padded, std::byte* out, float* scales, std::int32_t* start, float* sums) {
  quantise_bytes<kInt8Group, true>(x, n, padded, out, scales, start, sums);
}

void quantise_int4(const float* x, int n, int padded, std::byte* out, float* scales, std::int32_t* start, float* sums) {
  quantise_bytes<kInt4Group, false>(x, n, padded, out, scales, start, sums);
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

constexpr Kernels table(const char* name) {
  return Kernels{name,
                 {matmul<Format::float32>, matmul<Format::bfloat16>, matmul<Format::int8>, matmul<Format::int4>},
                 {quantise_float32, quantise_bfloat16, quantise_int8, quantise_int4},
                 attend<float>,
                 attend<std::uint16_t>,
                 join,
                 rms_norm,
                 gated,
                 silu,
                 top_k};
}
