// Products by AMX: a tile of 16 weights' outputs times one of up to 16 tokens is one instruction. The packed form of the
// weights, [K/4][16][4] or [K/2][16][2], is the form of a tile of weights as it is. Included after kernels_products.inl
// and the integers of AVX-512, whose place these products take.
//
// Int8: a group of inputs has a tile of whole sums, which is exact; scales then enter as they do in AVX-512, so the bits
// are the same, and up to 12 tokens go the way of AVX-512. Bfloat16: the instruction rounds otherwise than AVX-512 does, so any
// number of tokens goes this way. What comes out of a row of a tile does not depend on the other rows. Int4 stays with
// AVX-512: its groups fill half a tile, and to take nibbles apart for it costs more than it brings (188 against 210 G
// multiply-adds a second for 256 tokens, 120 against 223 for 8).

constexpr int kTileRows = 16;
constexpr std::size_t kTileBytes = 1024;

// As the processor reads it. Tiles: 0 to 3 sums of as many blocks, 4 activations, 5 weights; 6 is weights too in int8, and
// in bfloat16 6 and 7 are the activations and weights that fill no whole tile.
struct alignas(64) TileShapes {
  std::uint8_t palette = 1, start = 0, reserved[14] = {};
  std::uint16_t bytes[16] = {};
  std::uint8_t rows[16] = {};

  void set(int tile, int of_rows, int of_bytes) {
    rows[tile] = std::uint8_t(of_rows);
    bytes[tile] = std::uint16_t(of_bytes);
  }
};

inline void configure(const TileShapes& shapes) {
  asm volatile("" ::"m"(shapes));  // all of it is read, which the intrinsic does not tell
  _tile_loadconfig(&shapes);
}

inline void fetch_tile(const std::byte* p, std::ptrdiff_t ahead) {
  if (ahead == 0) return;
  for (std::size_t at = 0; at < kTileBytes; at += 64) fetch(p + at, ahead);
}

template <int NB>
void amx_bfloat16(const Panel& w, const Activations& a, int first, int count, float* y, std::size_t y_stride) {
  const int whole = w.inputs / 32, left = w.inputs % 32;  // an even number is left
  TileShapes shapes;
  for (int b = 0; b < NB; b++) shapes.set(b, count, 64);
  shapes.set(4, count, 64);
  shapes.set(5, 16, 64);
  if (left) shapes.set(6, count, 2 * left), shapes.set(7, left / 2, 64);
  configure(shapes);
  _tile_zero(0);
  if constexpr (NB > 1) _tile_zero(1);
  if constexpr (NB > 2) _tile_zero(2);
  if constexpr (NB > 3) _tile_zero(3);
  const std::byte* x = a.data + first * a.stride;
  const std::byte* weights = w.data;
  std::ptrdiff_t ahead = 0;
  const auto add = [&](auto b) {
    const std::byte* at = weights + b * w.block_bytes;
    fetch_tile(at, ahead);
    _tile_loadd(5, at, 64);
    if constexpr (b == 0) _tile_dpbf16ps(0, 4, 5);
    if constexpr (b == 1) _tile_dpbf16ps(1, 4, 5);
    if constexpr (b == 2) _tile_dpbf16ps(2, 4, 5);
    if constexpr (b == 3) _tile_dpbf16ps(3, 4, 5);
  };
  for (int k = 0; k < whole; k++, x += 64, weights += kTileBytes) {
    _tile_loadd(4, x, a.stride);
    ahead = ahead_of(w, std::size_t(k) * kTileBytes, std::size_t(w.inputs) * 2 * kLanes);
    each<NB>(add);
  }
  if (left) {
    _tile_loadd(6, x, a.stride);
    each<NB>([&](auto b) {
      _tile_loadd(7, weights + b * w.block_bytes, 64);
      if constexpr (b == 0) _tile_dpbf16ps(0, 6, 7);
      if constexpr (b == 1) _tile_dpbf16ps(1, 6, 7);
      if constexpr (b == 2) _tile_dpbf16ps(2, 6, 7);
      if constexpr (b == 3) _tile_dpbf16ps(3, 6, 7);
    });
  }
  const std::size_t stride = y_stride * sizeof(float);
  _tile_stored(0, y, stride);
  if constexpr (NB > 1) _tile_stored(1, y + kLanes, stride);
  if constexpr (NB > 2) _tile_stored(2, y + 2 * kLanes, stride);
  if constexpr (NB > 3) _tile_stored(3, y + 3 * kLanes, stride);
  _tile_release();
}

// Whole sums of one group for all blocks and tokens.
template <int NB>
struct alignas(64) GroupSums {
  std::int32_t of[NB][kTileRows][kLanes];
};

template <int NB>
inline void group_sums(const Panel& w, const std::byte* x, std::size_t stride, int g, GroupSums<NB>& out) {
  _tile_loadd(4, x, stride);
  each<NB>([&](auto b) {
    const std::byte* at = w.data + b * w.block_bytes + g * kTileBytes;
    // A tile is named by a number in the text of an instruction, which no template can put there.
#define SUMS(i, weights)                        \
  if constexpr (b == i) {                       \
    _tile_zero(i);                              \
    _tile_loadd(weights, at, 64);               \
    _tile_dpbsud(i, 4, weights);                \
    _tile_stored(i, out.of[i < NB ? i : 0], 64); \
  }
    SUMS(0, 5) SUMS(1, 6) SUMS(2, 5) SUMS(3, 6)
#undef SUMS
  });
}

template <int NB>
void amx_int8(const Panel& w, const Activations& a, int first, int count, float* y, std::size_t y_stride) {
  TileShapes shapes;
  for (int b = 0; b < NB; b++) shapes.set(b, count, 64);
  shapes.set(4, count, kInt8Group);
  shapes.set(5, kInt8Group / 4, 64);
  shapes.set(6, kInt8Group / 4, 64);
  configure(shapes);
  const int groups = w.inputs / kInt8Group;
  const std::byte* x = a.data + first * a.stride;
  const std::byte* scales = w.data + std::size_t(w.inputs) * kLanes;
  alignas(64) float acc[kTileRows][NB][kLanes] = {};
  GroupSums<NB> sums[2];  // while tiles of one group are multiplied, the sums of the one before are added
  for (int g = 0; g <= groups; g++) {
    if (g < groups) group_sums<NB>(w, x + std::size_t(g) * kInt8Group, a.stride, g, sums[g % 2]);
    if (g == 0) continue;
    const GroupSums<NB>& known = sums[(g - 1) % 2];
    const std::size_t at = std::size_t(first) * a.groups + g - 1;
    F scale[NB];
    for (int b = 0; b < NB; b++) scale[b] = load_bf16(scales + b * w.block_bytes + std::size_t(g - 1) * 2 * kLanes);
    // Lines are asked for between the tokens. All at once, they hold up the tiles that are loaded after them: 148 in place
    // of 211 G multiply-adds a second for 16 tokens, weights from memory.
    const std::size_t tile = std::size_t(g - 1) * kTileBytes;
    const std::ptrdiff_t ahead = ahead_of(w, tile, std::size_t(w.inputs) * kLanes);
    const int lines = ahead ? kTileRows : 0;
    for (int m = 0; m < count; m++) {
      for (int line = m; line < lines; line += count)
        for (int b = 0; b < NB; b++) fetch(w.data + b * w.block_bytes + tile + line * 64, ahead);
      const I start = int_set1(a.start[at + m * a.groups]);
      const F xs = set1(a.scales[at + m * a.groups]);
      for (int b = 0; b < NB; b++) {
        const I sum = _mm512_add_epi32(_mm512_load_si512(known.of[b][m]), start);
        store(acc[m][b], fma(mul(int_to_float(sum), xs), scale[b], load(acc[m][b])));
      }
    }
  }
  _tile_release();
  for (int m = 0; m < count; m++)
    for (int b = 0; b < NB; b++) store(y + m * y_stride + b * kLanes, load(acc[m][b]));
}

template <Format format, int NB>
inline void amx(const Panel& w, const Activations& a, int first, int count, float* y, std::size_t y_stride) {
  if constexpr (format == Format::bfloat16)
    amx_bfloat16<NB>(w, a, first, count, y, y_stride);
  else
    amx_int8<NB>(w, a, first, count, y, y_stride);
}

// Tokens from which int8 goes by tiles: as many as AVX-512 does not take in one go. With fewer it waits for memory, where
// AVX-512 reads in smaller steps and is quicker (12 tokens, weights from memory: 156 against 122 G multiply-adds a second).
template <Format format>
inline constexpr int kLeastTokens = format == Format::bfloat16 ? 1 : kMostRows<Format::int8> + 1;

template <Format format>
void amx_matmul(const Panel& panel, const Activations& a, int tokens, float* y, std::size_t y_stride) {
  if (tokens < kLeastTokens<format>) return matmul<format>(panel, a, tokens, y, y_stride);
  Panel w = panel;
  const int passes = (tokens + kTileRows - 1) / kTileRows;
  for (int pass = 0, first = 0; pass < passes; pass++) {
    const int count = (tokens - first + passes - pass - 1) / (passes - pass);  // even shares
    float* to = y + first * y_stride;
    switch (w.blocks) {
      case 1: amx<format, 1>(w, a, first, count, to, y_stride); break;
      case 2: amx<format, 2>(w, a, first, count, to, y_stride); break;
      case 3: amx<format, 3>(w, a, first, count, to, y_stride); break;
      default: amx<format, 4>(w, a, first, count, to, y_stride); break;
    }
    first += count;
    w.ahead = 0;  // once is enough
  }
}
