// Products of packed weights for AVX2, where 16 registers of 8 lanes hold 12 sums beside what feeds them.
//
// Activations lie widened, so that a step of the inner loop only broadcasts them: float32 for bfloat16, 16-bit numbers
// for int8 (inputs 0, 2, 1, 3 of each four, as the weights' bytes come out of a mask and a shift), bytes for int4.
// Weights are widened once for all rows of a tile.
//
// Loops over a tile's rows and halves of blocks are unrolled by `each`, before the compiler decides what lives in
// registers: arrays that plain loops go through stay in memory.

constexpr std::size_t kInputBytes[kFormats] = {4, 4, 2, 1};

inline void store_bfloat16_inputs(std::byte* p, F x) {
  store(reinterpret_cast<float*>(p), {_mm256_castsi256_ps(_mm256_slli_epi32(narrow(x.a), 16)),
                                      _mm256_castsi256_ps(_mm256_slli_epi32(narrow(x.b), 16))});
}
inline void store_int8_inputs(std::byte* p, F x) {
  const __m256i order = _mm256_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15,  //
                                         0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_shuffle_epi8(words_of(x), order));
}
inline void store_int4_inputs(std::byte* p, F x) {
  __m256i words = words_of(x);
  __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}

// Weights come from memory in many short streams, one for each block; the processor's own prefetching begins anew with
// each. So what is read asks for what lies at the same place in the panel to come.
inline void fetch(const std::byte* p, std::ptrdiff_t ahead) { __builtin_prefetch(p + ahead, 0, 2); }

#define INLINE __attribute__((always_inline))

template <int I>
struct Index {
  constexpr operator int() const { return I; }
};

// body(Index<0>), body(Index<1>) and so on.
template <int N, int I = 0, typename Body>
INLINE inline void each(Body&& body) {
  if constexpr (I < N) {
    body(Index<I>{});
    each<N, I + 1>(body);
  }
}

// A sum stays in its register: without this, compilers gather the loads of all rows before the first product, and spill.
template <typename V>
INLINE inline void keep(V& sum) {
  asm volatile("" : "+x"(sum));
}

// Some rows, some blocks side by side, and a stretch of their inputs; sums go on in y.
struct Tile {
  const std::byte* weights;  // of the first block
  const std::byte* scales;
  std::size_t block_bytes;
  Activations x;             // of the first row, from the first input and group on
  int inputs;
  float* y;
  std::size_t y_stride;
  std::ptrdiff_t ahead;      // line i of a block asks for the one at i * step from `ahead` on: of a panel that is gone
  std::ptrdiff_t step;       // through several times, a part each time
  std::ptrdiff_t scales_ahead;
};

INLINE inline __m256i load_half(const std::byte* block0, std::size_t block_bytes, int half) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(block0 + half / 2 * block_bytes + half % 2 * 32));
}
INLINE inline __m256i broadcast(const std::byte* p) {
  std::int32_t v;
  __builtin_memcpy(&v, p, 4);
  return _mm256_set1_epi32(v);
}
INLINE inline __m256 broadcast_float(const std::byte* p) { return _mm256_broadcast_ss(reinterpret_cast<const float*>(p)); }
INLINE inline __m256 half_bf16(const std::byte* block0, std::size_t block_bytes, int half) {
  return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(block0 + half / 2 * block_bytes + half % 2 * 16)));
}

template <int M, int H>
INLINE inline void load_sums(const Tile& t, __m256 (&sum)[M][H]) {
  each<M>([&](auto m) INLINE { each<H>([&](auto h) INLINE { sum[m][h] = _mm256_loadu_ps(t.y + m * t.y_stride + 8 * h); }); });
}
template <int M, int H>
INLINE inline void store_sums(const Tile& t, const __m256 (&sum)[M][H]) {
  each<M>([&](auto m) INLINE { each<H>([&](auto h) INLINE { _mm256_storeu_ps(t.y + m * t.y_stride + 8 * h, sum[m][h]); }); });
}

template <int M, int H>
struct Float32 {
  __attribute__((noinline)) static void run(const Tile& t) {
    __m256 sum[M][H];
    load_sums(t, sum);
    const std::byte* w = t.weights;
    const std::byte* x = t.x.data;
    const std::byte* next = w + t.ahead;
    for (const std::byte* end = w + t.inputs * 64; w < end; w += 64, x += 4, next += t.step) {
      each<(H + 1) / 2>([&](auto b) INLINE { fetch(next, b * t.block_bytes); });
      each<M>([&](auto m) INLINE {
        const __m256 xs = broadcast_float(x + m * t.x.stride);
        each<H>([&](auto h) INLINE {
          sum[m][h] = _mm256_fmadd_ps(_mm256_castsi256_ps(load_half(w, t.block_bytes, h)), xs, sum[m][h]);
        });
      });
    }
    store_sums(t, sum);
  }
};

template <int M, int H>
struct Bfloat16 {
  __attribute__((noinline)) static void run(const Tile& t) {
    __m256 sum[M][H];
    load_sums(t, sum);
    const __m256i odd = _mm256_set1_epi32(int(0xffff0000));
    const std::byte* w = t.weights;
    const std::byte* x = t.x.data;
    const std::byte* next = w + t.ahead;
    for (const std::byte* end = w + t.inputs * 32; w < end; w += 64, x += 8, next += t.step) {
      each<(H + 1) / 2>([&](auto b) INLINE { fetch(next, b * t.block_bytes); });
      if constexpr (M == 1) {
        const __m256 x0 = broadcast_float(x), x1 = broadcast_float(x + 4);
        each<H>([&](auto h) INLINE {
          const __m256i both = load_half(w, t.block_bytes, h);
          sum[0][h] = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_slli_epi32(both, 16)), x0, sum[0][h]);
          keep(sum[0][h] = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_and_si256(both, odd)), x1, sum[0][h]));
        });
      } else {
        __m256 wide[H];
        each<H>([&](auto h) INLINE { wide[h] = _mm256_castsi256_ps(_mm256_slli_epi32(load_half(w, t.block_bytes, h), 16)); });
        each<M>([&](auto m) INLINE {
          const __m256 xs = broadcast_float(x + m * t.x.stride);
          each<H>([&](auto h) INLINE { keep(sum[m][h] = _mm256_fmadd_ps(wide[h], xs, sum[m][h])); });
        });
        each<H>([&](auto h) INLINE { wide[h] = _mm256_castsi256_ps(_mm256_and_si256(load_half(w, t.block_bytes, h), odd)); });
        each<M>([&](auto m) INLINE {
          const __m256 xs = broadcast_float(x + m * t.x.stride + 4);
          each<H>([&](auto h) INLINE { keep(sum[m][h] = _mm256_fmadd_ps(wide[h], xs, sum[m][h])); });
        });
      }
    }
    store_sums(t, sum);
  }
};

// One group of int8: 4 inputs of 8 outputs at a time, as pairs of 16-bit numbers, so no sum saturates.
template <int M, int H>
struct Int8 {
  __attribute__((noinline)) static void run(const Tile& t) {
    constexpr int steps = kInt8Group / 4;
    const __m256i low = _mm256_set1_epi16(255);
    alignas(32) float sums[M][8 * H];
    each<M>([&](auto m) INLINE { __builtin_memcpy(sums[m], t.y + m * t.y_stride, sizeof sums[m]); });
    const std::byte* w = t.weights;
    const std::byte* x = t.x.data;
    const std::byte* next = w + t.ahead;
    for (int g = 0; g < t.inputs / kInt8Group; g++) {
      __m256i sum[M][H];
      each<M>([&](auto m) INLINE {
        const __m256i start = _mm256_set1_epi32(t.x.start[m * t.x.groups + g]);
        each<H>([&](auto h) INLINE { sum[m][h] = start; });
      });
      for (int k = 0; k < steps; k++, w += 64, x += 8, next += t.step) {
        each<(H + 1) / 2>([&](auto b) INLINE { fetch(next, b * t.block_bytes); });
        each<2>([&](auto part) INLINE {
          __m256i wide[H];
          each<H>([&](auto h) INLINE {
            const __m256i four = load_half(w, t.block_bytes, h);
            wide[h] = part == 0 ? _mm256_and_si256(four, low) : _mm256_srli_epi16(four, 8);
          });
          each<M>([&](auto m) INLINE {
            const __m256i pair = broadcast(x + m * t.x.stride + 4 * part);
            each<H>([&](auto h) INLINE { keep(sum[m][h] = _mm256_add_epi32(sum[m][h], _mm256_madd_epi16(wide[h], pair))); });
          });
        });
      }
      const std::byte* at = t.scales + std::size_t(g) * 2 * kLanes;
      each<(H + 1) / 2>([&](auto b) INLINE { fetch(at + b * t.block_bytes, t.scales_ahead); });
      each<H>([&](auto h) INLINE {
        const __m256 scale = half_bf16(at, t.block_bytes, h);
        each<M>([&](auto m) INLINE {
          const __m256 product = _mm256_mul_ps(_mm256_cvtepi32_ps(sum[m][h]), _mm256_set1_ps(t.x.scales[m * t.x.groups + g]));
          float* to = sums[m] + 8 * h;
          _mm256_store_ps(to, _mm256_fmadd_ps(product, scale, _mm256_load_ps(to)));
        });
      });
    }
    each<M>([&](auto m) INLINE { __builtin_memcpy(t.y + m * t.y_stride, sums[m], sizeof sums[m]); });
  }
};

// One group of int4: nibbles times signed bytes, summed in 16 bits. A pair is at most 2 * 15 * 127 = 3,810, and 8 pairs
// meet in a lane: 30,480.
template <int M, int H>
struct Int4 {
  __attribute__((noinline)) static void run(const Tile& t) {
    static_assert(kInt4Group / 4 * 2 * 15 * 127 <= 32767);
    constexpr int steps = kInt4Group / 8;
    const __m256i low = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    alignas(32) float sums[M][8 * H];
    each<M>([&](auto m) INLINE { __builtin_memcpy(sums[m], t.y + m * t.y_stride, sizeof sums[m]); });
    const std::byte* w = t.weights;
    const std::byte* x = t.x.data;
    const std::byte* next = w + t.ahead;
    for (int g = 0; g < t.inputs / kInt4Group; g++) {
      __m256i sum[M][H];
      each<steps>([&](auto k) INLINE {
        each<(H + 1) / 2>([&](auto b) INLINE { fetch(next + k * t.step, b * t.block_bytes); });
        each<2>([&](auto part) INLINE {
          __m256i bytes[H];
          each<H>([&](auto h) INLINE {
            const __m256i both = load_half(w + 64 * k, t.block_bytes, h);
            bytes[h] = _mm256_and_si256(part == 0 ? both : _mm256_srli_epi16(both, 4), low);
          });
          each<M>([&](auto m) INLINE {
            const __m256i four = broadcast(x + m * t.x.stride + 8 * k + 4 * part);
            each<H>([&](auto h) INLINE {
              const __m256i pairs = _mm256_maddubs_epi16(bytes[h], four);
              keep(sum[m][h] = k == 0 && part == 0 ? pairs : _mm256_add_epi16(sum[m][h], pairs));
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
          const __m256 product = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_madd_epi16(sum[m][h], ones)),
                                               _mm256_set1_ps(t.x.scales[group]));
          float* to = sums[m] + 8 * h;
          const __m256 raised = _mm256_fmadd_ps(minimum, _mm256_set1_ps(t.x.sums[group]), _mm256_load_ps(to));
          _mm256_store_ps(to, _mm256_fmadd_ps(product, scale, raised));
        });
      });
    }
    each<M>([&](auto m) INLINE { __builtin_memcpy(t.y + m * t.y_stride, sums[m], sizeof sums[m]); });
  }
};

// What a format asks of `matmul`: its tiles, how many rows one holds, and how a stretch of inputs lies in memory.
template <Format>
struct Shape;
template <>
struct Shape<Format::float32> {
  template <int M, int H>
  using Kernel = Float32<M, H>;
  static constexpr int rows = 6, stretch = 128, input_bits = 32, group = 1, scale_bytes = 0;
};
template <>
struct Shape<Format::bfloat16> {
  template <int M, int H>
  using Kernel = Bfloat16<M, H>;
  static constexpr int rows = 6, stretch = 256, input_bits = 16, group = 2, scale_bytes = 0;
};
template <>
struct Shape<Format::int8> {
  template <int M, int H>
  using Kernel = Int8<M, H>;
  static constexpr int rows = 6, stretch = 512, input_bits = 8, group = kInt8Group, scale_bytes = 2 * kLanes;
};
template <>
struct Shape<Format::int4> {
  template <int M, int H>
  using Kernel = Int4<M, H>;
  static constexpr int rows = 6, stretch = 512, input_bits = 4, group = kInt4Group, scale_bytes = 4 * kLanes;
};

// Few rows leave room for several blocks.
constexpr int blocks_beside(int rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }

template <Format format, int M>
void tile_of(int rows, int blocks, const Tile& t) {
  if constexpr (M > 1)
    if (rows < M) return tile_of<format, M - 1>(rows, blocks, t);
  each<blocks_beside(M)>([&](auto b) INLINE {
    if (blocks == b + 1) Shape<format>::template Kernel<M, 2 * (b + 1)>::run(t);
  });
}

template <Format format>
void matmul(const Panel& w, const Activations& a, int tokens, float* y, std::size_t y_stride) {
  using S = Shape<format>;
  for (int row = 0; row < tokens; row++)
    for (int i = 0; i < w.blocks; i++) store(y + row * y_stride + i * kLanes, zero());
  // Even shares: 8 rows are 4 and 4, not 6 and 2. They go through a stretch of a block while it is at hand.
  const int passes = (tokens + S::rows - 1) / S::rows;
  const int beside = passes == 1 ? blocks_beside(tokens) : 1;
  Tile t;
  t.block_bytes = w.block_bytes;
  t.y_stride = y_stride;
  t.scales_ahead = w.ahead;
  t.step = 64 / passes;
  for (int from = 0; from < w.inputs; from += S::stretch) {
    t.inputs = w.inputs - from < S::stretch ? w.inputs - from : S::stretch;
    for (int block = 0; block < w.blocks; block += beside) {
      const std::byte* data = w.data + block * w.block_bytes;
      t.weights = data + std::size_t(from) * kLanes * S::input_bits / 8;
      t.scales = data + std::size_t(w.inputs) * kLanes * S::input_bits / 8 + std::size_t(from / S::group) * S::scale_bytes;
      for (int pass = 0, row = 0, rows; pass < passes; pass++, row += rows) {
        rows = (tokens - row + passes - pass - 1) / (passes - pass);
        const std::size_t group = row * a.groups + from / S::group;
        t.x = {a.data + row * a.stride + std::size_t(from) * kInputBytes[int(format)], a.stride, a.scales + group,
               a.start + group, a.sums + group, a.groups};
        t.y = y + row * y_stride + block * kLanes;
        t.ahead = w.ahead + std::ptrdiff_t(t.inputs) * kLanes * S::input_bits / 8 * pass / passes;
        tile_of<format, S::rows>(rows, w.blocks - block < beside ? w.blocks - block : beside, t);
      }
    }
  }
}
#undef INLINE
