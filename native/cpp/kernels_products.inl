// Products of packed weights, written once over a few vector operations.
//
// The including file defines, beside what kernels_generic.inl asks for:
//   B (64 bytes of packed weights), I (32-bit integers), and on them
//   load_bytes, int_set1, int_to_float, store_bytes(F of whole numbers),
//   dot_bf16(F acc, B w, uint32 pair of x), dot_bytes(I acc, B unsigned, int32 four signed of x),
//   low_nibbles, high_nibbles
//   kAccumulators: how many F fit in registers beside the rest, and kIntegerSums: how many I.
// Tiles of integer formats come from kernels_integers.inl or kernels_avx512_integers.inl, included afterwards.

// Bytes of one activation as `matmul` reads it, how 16 of them are stored, and what int4 makes of the scale of a group.
constexpr std::size_t kInputBytes[kFormats] = {4, 2, 1, 1};
inline void store_bfloat16_inputs(std::byte* p, F x) { store_bf16(p, x); }
inline void store_int8_inputs(std::byte* p, F x) { store_bytes(p, x); }
inline void store_int4_inputs(std::byte* p, F x) { store_bytes(p, x); }
inline float int4_scale(float scale) { return scale; }
inline std::int32_t int4_start(float) { return 0; }

// Weights come from memory in many short streams, one for each block; the processor's own prefetching begins anew with
// each. So each line that is read asks for another: one a little further on in the same block or, near its end, one at
// the start of the same block of the panel to come. What is asked for a whole panel ahead, where a row has 8960 inputs,
// has left the cache before it is read: 11 in place of 17 G multiply-adds a second for one token.
constexpr std::size_t kAheadBytes = 4096;
inline void fetch(const std::byte* p, std::ptrdiff_t ahead) { __builtin_prefetch(p + ahead, 0, 2); }

// From the line at `at` of a block whose weights have `bytes` to the one to ask for.
inline std::ptrdiff_t ahead_of(const Panel& w, std::size_t at, std::size_t bytes) {
  if (w.ahead == 0) return 0;
  const std::size_t far = bytes < kAheadBytes ? bytes : kAheadBytes;
  return at + far < bytes ? std::ptrdiff_t(far) : w.ahead + std::ptrdiff_t(far) - std::ptrdiff_t(bytes);
}

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
    const std::ptrdiff_t ahead = ahead_of(w, std::size_t(k) * 64, std::size_t(w.inputs) * 64);
    F wv[NB];
    for (int b = 0; b < NB; b++) {
      const float* at = weights + b * block + std::size_t(k) * kLanes;
      fetch(reinterpret_cast<const std::byte*>(at), ahead);
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
    const std::ptrdiff_t ahead = ahead_of(w, std::size_t(k) * 64, std::size_t(w.inputs) * 32);
    B wv[NB];
    for (int b = 0; b < NB; b++) {
      const std::byte* at = w.data + b * w.block_bytes + std::size_t(k) * 64;
      fetch(at, ahead);
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

// Of kernels_integers.inl, or of kernels_avx512_integers.inl.
template <int M, int NB>
void tile_int8(const Panel& w, const Activations& a, int first, float* y, std::size_t y_stride);
template <int M, int NB>
void tile_int4(const Panel& w, const Activations& a, int first, float* y, std::size_t y_stride);

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

template <Format format>
inline constexpr int kRoom =
    format == Format::int8 || format == Format::int4 ? kIntegerSums : kAccumulators;
template <Format format>
inline constexpr int kMostRows = kRoom<format> < 12 ? kRoom<format> : 12;

template <Format format, int M, int NB>
inline void panel_rows(Panel w, const Activations& a, int first, float* y, std::size_t y_stride) {
  // Blocks of the panel, as many at a time as registers hold beside M rows.
  constexpr int hold = kRoom<format> / M < 1 ? 1 : kRoom<format> / M;
  constexpr bool even = (format == Format::int8 || format == Format::int4) && hold == 3 && NB == 4;
  constexpr int fit = even ? 2 : hold;  // two and two blocks: one alone has too few sums
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
