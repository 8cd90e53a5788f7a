// Tiles of integer formats, where registers hold a sum of integers and one of floats for each output.

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
    const std::ptrdiff_t ahead = ahead_of(w, std::size_t(g) * steps * 64, std::size_t(groups) * steps * 64);
    for (int k = g * steps; k < (g + 1) * steps; k++) {
      B wv[NB];
      for (int b = 0; b < NB; b++) {
        const std::byte* at = w.data + b * w.block_bytes + std::size_t(k) * 64;
        fetch(at, ahead);
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
    const std::ptrdiff_t ahead = ahead_of(w, std::size_t(g) * steps * 64, std::size_t(groups) * steps * 64);
    for (int k = g * steps; k < (g + 1) * steps; k++) {
      B low[NB], high[NB];
      for (int b = 0; b < NB; b++) {
        const std::byte* at = w.data + b * w.block_bytes + std::size_t(k) * 64;
        fetch(at, ahead);
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
