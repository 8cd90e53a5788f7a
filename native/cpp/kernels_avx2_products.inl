// Products of packed weights for AVX2, where 16 registers of 8 lanes hold 12 sums beside what feeds them.
//
// The including file defines, beside the vector operations of kernels_avx2.inl, how bytes are multiplied:
//   kInt8Parts: in how many parts the 4 inputs of 8 outputs go, and for one of them
//     store_int8_inputs(F of whole numbers), int8_part(4 inputs of weights), add_int8(32-bit sum, weights, inputs)
//   first_int4(weights, inputs), add_int4(sum, weights, inputs) for 4 inputs as bytes,
//   lifted_int4(sum of a group): the bits of kLift plus the sum
//
// Activations lie as the products read them, so that a step of the inner loop only broadcasts them: float32 for
// bfloat16, 16-bit numbers or bytes for int8, bytes for int4. Weights are widened once for all rows of a tile.
//
// Loops over a tile's rows and halves of blocks are unrolled by `each`, see kernels_each.inl.

constexpr std::size_t kInputBytes[kFormats] = {4, 4, kInt8Parts, 1};

inline void store_bfloat16_inputs(std::byte* p, F x) {
  store(reinterpret_cast<float*>(p), {_mm256_castsi256_ps(_mm256_slli_epi32(narrow(x.a), 16)),
                                      _mm256_castsi256_ps(_mm256_slli_epi32(narrow(x.b), 16))});
}
inline void store_int4_inputs(std::byte* p, F x) { store_bytes(p, x); }

// What kLift asks for.
inline float int4_scale(float scale) {
  std::uint32_t bits;
  __builtin_memcpy(&bits, &scale, 4);
  bits &= ~3u;
  __builtin_memcpy(&scale, &bits, 4);
  return scale;
}
inline std::int32_t int4_start(float scale) {
  const float lifted = -kLift * scale;
  std::int32_t bits;
  __builtin_memcpy(&bits, &lifted, 4);
  return bits;
}

// Weights come from memory in many short streams, one for each block; the processor's own prefetching begins anew with
// each. So what is read asks for what lies one stretch further on, or at the start of the panel to come.
inline void fetch(const std::byte* p, std::ptrdiff_t ahead) { __builtin_prefetch(p + ahead, 0, 2); }

// Sums that stay in their registers, in the order written. Left to themselves, compilers gather the loads of all rows
// before the first product and spill.
INLINE inline void add_product(__m256& sum, __m256 a, __m256 b) {
  asm volatile("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
}
// The mask stays in memory: all registers have their use.
alignas(32) constexpr std::uint32_t kOddHalves[8] = {0xffff0000, 0xffff0000, 0xffff0000, 0xffff0000,
                                                     0xffff0000, 0xffff0000, 0xffff0000, 0xffff0000};
INLINE inline __m256i odd_halves(__m256i x) {
  asm volatile("vpand %1, %0, %0" : "+x"(x) : "m"(kOddHalves));
  return x;
}

// What a tile works on: a stretch of inputs, of halves of blocks side by side, for some rows. Its sums go on in y.
struct Tile {
  const std::byte* weights;     // of the first block
  const std::byte* scales;
  std::size_t block_bytes;
  Activations x;                // of the first row, from the first input and group on
  int inputs;
  float* y;
  std::size_t y_stride;
  const std::byte* next;        // fetched meanwhile, `step` bytes on each time; tiles of other rows fetch the rest
  std::ptrdiff_t step;
  std::ptrdiff_t scales_ahead;
  float* sums;                  // room for those of the tile
};

INLINE inline __m256i load_half(const std::byte* block0, std::size_t block_bytes, int half) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(block0 + half / 2 * block_bytes + half % 2 * 32));
}
INLINE inline __m256i broadcast(const std::byte* p) {
  std::int32_t v;
  __builtin_memcpy(&v, p, 4);
  return _mm256_set1_epi32(v);
}
INLINE inline __m256 broadcast_float(const std::byte* p) {
  __m256 v;
  asm volatile("vbroadcastss %1, %0" : "=x"(v) : "m"(*reinterpret_cast<const float*>(p)));
  return v;
}
INLINE inline __m256 half_bf16(const std::byte* block0, std::size_t block_bytes, int half) {
  return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(block0 + half / 2 * block_bytes + half % 2 * 16)));
}

// The float sums of integer formats, for which there is no register left, lie side by side meanwhile.
template <int M, int H>
INLINE inline void give_sums(const Tile& t) {
  for (int m = 0; m < M; m++) __builtin_memcpy(t.sums + m * H * 8, t.y + m * t.y_stride, H * 32);
}
template <int M, int H>
INLINE inline void take_sums(const Tile& t) {
  for (int m = 0; m < M; m++) __builtin_memcpy(t.y + m * t.y_stride, t.sums + m * H * 8, H * 32);
}

template <int M, int H, int S, typename Step>
INLINE inline void float_tile(const Tile& t, int steps, Step step) {
  __m256 sum[M][H];
  each<M>([&](auto m) INLINE {
    each<H>([&](auto h) INLINE { sum[m][h] = _mm256_loadu_ps(t.y + m * t.y_stride + 8 * h); });
  });
  const std::byte* next = t.next;
  for (int k = 0; k < steps; k++, next += t.step) {
    each<(H + 1 - S) / 2>([&](auto b) INLINE { fetch(next, (b + S) * t.block_bytes); });
    step(k, sum);
  }
  each<M>([&](auto m) INLINE {
    each<H>([&](auto h) INLINE { _mm256_storeu_ps(t.y + m * t.y_stride + 8 * h, sum[m][h]); });
  });
}

// float32: 16 outputs of one input at a time. `S` is 1 where the first half is the second one of its block.
template <int M, int H, int S>
__attribute__((noinline)) void tile_float32(Tile t) {
  float_tile<M, H, S>(t, t.inputs, [&](int k, __m256 (&sum)[M][H]) INLINE {
    const std::byte* w = t.weights + std::size_t(k) * 64;
    const std::byte* x = t.x.data + std::size_t(k) * 4;
    each<M>([&](auto m) INLINE {
      const __m256 xs = broadcast_float(x + m * t.x.stride);
      each<H>([&](auto h) INLINE {
        add_product(sum[m][h], _mm256_castsi256_ps(load_half(w, t.block_bytes, h + S)), xs);
      });
    });
  });
}

template <int M, int H, int S>
__attribute__((noinline)) void tile_bfloat16(Tile t) {
  float_tile<M, H, S>(t, t.inputs / 2, [&](int k, __m256 (&sum)[M][H]) INLINE {
    const std::byte* w = t.weights + std::size_t(k) * 64;
    const std::byte* x = t.x.data + std::size_t(k) * 8;
    constexpr int width = M == 1 ? 1 : 2;  // halves that are widened at a time: as many as leave room for the sums
    each<(H + width - 1) / width>([&](auto group) INLINE {
      constexpr int first = group * width, halves = H - first < width ? H - first : width;
      each<2>([&](auto part) INLINE {
        __m256 wide[halves];
        each<halves>([&](auto h) INLINE {
          const __m256i pair = load_half(w, t.block_bytes, first + h + S);
          wide[h] = _mm256_castsi256_ps(part == 0 ? _mm256_slli_epi32(pair, 16) : odd_halves(pair));
        });
        each<M>([&](auto m) INLINE {
          const __m256 xs = broadcast_float(x + m * t.x.stride + 4 * part);
          each<halves>([&](auto h) INLINE { add_product(sum[m][first + h], wide[h], xs); });
        });
      });
    });
  });
}

template <int M, int H, int S>
__attribute__((noinline)) void tile_int8(Tile t) {
  constexpr int steps = kInt8Group / 4, unrolled = 4;
  give_sums<M, H>(t);
  const std::byte* w = t.weights;
  const std::byte* x = t.x.data;
  const std::byte* next = t.next;
  for (int g = 0; g < t.inputs / kInt8Group; g++) {
    asm volatile("" ::: "memory");  // float sums are not to be kept in registers from group to group
    __m256i sum[M][H];
    each<M>([&](auto m) INLINE {
      const __m256i start = _mm256_set1_epi32(t.x.start[m * t.x.groups + g]);
      each<H>([&](auto h) INLINE { sum[m][h] = start; });
    });
    for (int k = 0; k < steps; k += unrolled) {
      each<unrolled>([&](auto u) INLINE {
        each<(H + 1 - S) / 2>([&](auto b) INLINE { fetch(next, (b + S) * t.block_bytes); });
        next += t.step;
        each<kInt8Parts>([&](auto part) INLINE {
          __m256i wide[H];
          each<H>([&](auto h) INLINE { wide[h] = int8_part(load_half(w + 64 * u, t.block_bytes, h + S), part); });
          each<M>([&](auto m) INLINE {
            const __m256i xs = broadcast(x + m * t.x.stride + 4 * (kInt8Parts * u + part));
            each<H>([&](auto h) INLINE { add_int8(sum[m][h], wide[h], xs); });
          });
        });
      });
      w += 64 * unrolled, x += 4 * kInt8Parts * unrolled;
    }
    const std::byte* at = t.scales + std::size_t(g) * 2 * kLanes;
    each<(H + 1 - S) / 2>([&](auto b) INLINE { fetch(at + (b + S) * t.block_bytes, t.scales_ahead); });
    each<H>([&](auto h) INLINE {
      const __m256 scale = half_bf16(at, t.block_bytes, h + S);
      each<M>([&](auto m) INLINE {
        const __m256 x_scale = _mm256_set1_ps(t.x.scales[m * t.x.groups + g]);
        const __m256 product = _mm256_mul_ps(_mm256_cvtepi32_ps(sum[m][h]), x_scale);
        float* to = t.sums + (m * H + h) * 8;
        _mm256_store_ps(to, _mm256_fmadd_ps(product, scale, _mm256_load_ps(to)));
      });
    });
  }
  take_sums<M, H>(t);
}

INLINE inline __m256i int4_part(__m256i both, int part) {
  return _mm256_and_si256(part == 0 ? both : _mm256_srli_epi16(both, 4), _mm256_set1_epi8(15));
}

template <int M, int H>
__attribute__((noinline)) void tile_int4(Tile t) {
  constexpr int steps = kInt4Group / 8;
  give_sums<M, H>(t);
  const std::byte* w = t.weights;
  const std::byte* x = t.x.data;
  const std::byte* next = t.next;
  for (int g = 0; g < t.inputs / kInt4Group; g++) {
    asm volatile("" ::: "memory");
    __m256i sum[M][H];
    each<steps>([&](auto k) INLINE {
      each<(H + 1) / 2>([&](auto b) INLINE { fetch(next + k * t.step, b * t.block_bytes); });
      each<2>([&](auto part) INLINE {
        __m256i bytes[H];
        each<H>([&](auto h) INLINE { bytes[h] = int4_part(load_half(w + 64 * k, t.block_bytes, h), part); });
        each<M>([&](auto m) INLINE {
          const __m256i four = broadcast(x + m * t.x.stride + 8 * k + 4 * part);
          each<H>([&](auto h) INLINE {
            if (k == 0 && part == 0) sum[m][h] = first_int4(bytes[h], four);
            else add_int4(sum[m][h], bytes[h], four);
          });
        });
      });
    });
    w += 64 * steps, x += 8 * steps, next += t.step * steps;
    const std::byte* at = t.scales + std::size_t(g) * 4 * kLanes;
    each<(H + 1) / 2>([&](auto b) INLINE { fetch(at + b * t.block_bytes, t.scales_ahead); });
    each<H>([&](auto h) INLINE {
      const __m256 scale = half_bf16(at, t.block_bytes, h), minimum = half_bf16(at + 2 * kLanes, t.block_bytes, h);
      each<M>([&](auto m) INLINE {
        const std::size_t group = m * t.x.groups + g;
        const __m256 product = _mm256_fmadd_ps(_mm256_castsi256_ps(lifted_int4(sum[m][h])),
                                               _mm256_set1_ps(t.x.scales[group]),
                                               _mm256_castsi256_ps(_mm256_set1_epi32(t.x.start[group])));
        float* to = t.sums + (m * H + h) * 8;
        const __m256 raised = _mm256_fmadd_ps(minimum, _mm256_set1_ps(t.x.sums[group]), _mm256_load_ps(to));
        _mm256_store_ps(to, _mm256_fmadd_ps(product, scale, raised));
      });
    });
  }
  take_sums<M, H>(t);
}

constexpr int kTileRows = 6;
constexpr int kStretchBytes = 8192;  // of weights of a block

// Halves of blocks that a tile of some rows takes side by side: 12 sums hide how long a multiply-add of floats, or of
// fours of bytes, takes. Where weights are widened for it, there is room for 8.
constexpr int halves_beside(Format format, int rows) {
  if (rows == 1) return 8;
  if (rows == 2) return 4;
  const bool threes = format == Format::int8 ? kInt8Parts == 1 : format != Format::int4;
  if (threes) return rows == 3 ? 4 : rows == 4 ? 3 : 2;
  return 2;
}

template <Format format, int M, int H>
INLINE inline void tile(const Tile& t, bool second) {
  constexpr int S = H == 3;  // only threes begin in the middle of a block
  if constexpr (format == Format::int8) S && second ? tile_int8<M, H, S>(t) : tile_int8<M, H, 0>(t);
  else if constexpr (format == Format::int4) tile_int4<M, H>(t);
  else if constexpr (format == Format::float32) S && second ? tile_float32<M, H, S>(t) : tile_float32<M, H, 0>(t);
  else S && second ? tile_bfloat16<M, H, S>(t) : tile_bfloat16<M, H, 0>(t);
}

// Some rows and all halves of `blocks`, from the one that t begins at.
template <Format format, int M>
void tiles_of(int rows, int blocks, Tile t) {
  if constexpr (M > 1)
    if (rows < M) return tiles_of<format, M - 1>(rows, blocks, t);
  constexpr int most = halves_beside(format, M);
  const std::byte* weights = t.weights;
  const std::byte* scales = t.scales;
  const std::byte* next = t.next;
  float* y = t.y;
  for (int half = 0, halves; half < 2 * blocks; half += halves) {
    const int left = 2 * blocks - half;
    halves = most == 3 ? (left == 2 || left == 4 ? 2 : 3) : left < most ? left : most;  // no half alone
    const std::size_t skip = half / 2 * t.block_bytes;
    t.weights = weights + skip;
    t.scales = scales + skip;
    t.next = next + skip;
    t.y = y + half * 8;
    each<most - 1>([&](auto less) INLINE {
      constexpr int h = most - less;
      if constexpr (h % 2 == 0 || most == 3)
        if (halves == h) tile<format, M, h>(t, half % 2);
    });
  }
}

template <Format format>
void matmul(const Panel& w, const Activations& a, int tokens, float* y, std::size_t y_stride) {
  constexpr int all_bits[kFormats] = {32, 16, 8, 4}, bits = all_bits[int(format)];
  constexpr int group = format == Format::int8 ? kInt8Group : format == Format::int4 ? kInt4Group : 1;
  constexpr int scale_bytes = format == Format::int8 ? 2 * kLanes : format == Format::int4 ? 4 * kLanes : 0;
  constexpr int step_inputs = 64 * 8 / bits / kLanes;  // of 16 outputs in a line
  constexpr int most = kStretchBytes / 64 * step_inputs;
  alignas(64) float sums[kTileRows * 16];
  for (int row = 0; row < tokens; row++)
    for (int i = 0; i < w.blocks; i++) store(y + row * y_stride + i * kLanes, zero());
  // Even shares: 8 rows are 4 and 4, not 6 and 2. All go through a stretch of the weights while it is at hand.
  const int tiles = (tokens + kTileRows - 1) / kTileRows;
  Tile t;
  t.block_bytes = w.block_bytes;
  t.y_stride = y_stride;
  t.scales_ahead = w.ahead;
  t.step = 64 / tiles;
  t.sums = sums;
  // Stretches as long as each other, so that each asks for all of the one to come.
  constexpr int least = group > step_inputs ? group : step_inputs;
  const int stretches = (w.inputs + most - 1) / most;
  const int stretch = (w.inputs + stretches * least - 1) / (stretches * least) * least;
  for (int from = 0; from < w.inputs; from += stretch) {
    t.inputs = w.inputs - from < stretch ? w.inputs - from : stretch;
    const int steps = t.inputs / step_inputs;
    t.scales = w.data + std::size_t(w.inputs) * kLanes * bits / 8 + std::size_t(from / group) * scale_bytes;
    t.weights = w.data + std::size_t(from / step_inputs) * 64;
    const std::byte* next = from + t.inputs < w.inputs ? t.weights + std::size_t(steps) * 64 : w.data + w.ahead;
    for (int i = 0, row = 0, rows; i < tiles; i++, row += rows) {
      rows = (tokens - row + tiles - i - 1) / (tiles - i);
      const std::size_t first = row * a.groups + from / group;
      t.x = {a.data + row * a.stride + std::size_t(from) * kInputBytes[int(format)], a.stride, a.scales + first,
             a.start + first, a.sums + first, a.groups};
      t.y = y + row * y_stride;
      t.next = next + std::size_t(steps) * 64 * i / tiles;
      tiles_of<format, kTileRows>(rows, w.blocks, t);
    }
  }
}
#undef INLINE
