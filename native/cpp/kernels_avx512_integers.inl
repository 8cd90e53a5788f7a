// Tiles of integer formats for AVX-512: its 32 registers hold 24 sums of integers beside what feeds them. Float sums
// lie in memory meanwhile, where each group of inputs adds to them. Loops are unrolled by `each`, see kernels_each.inl.

// A sum that stays in its register, in the order written: left to themselves, compilers gather the loads of all rows.
INLINE inline void add_dot(I& sum, B w, std::int32_t x) {
  sum = dot_bytes(sum, w, x);
  asm volatile("" : "+v"(sum));
}

template <int M, int NB>
inline void tile_int8(const Panel& w, const Activations& a, int first, float* y, std::size_t y_stride) {
  constexpr int steps = kInt8Group / 4;
  alignas(64) float acc[M][NB][kLanes] = {};
  const std::byte* x = a.data + first * a.stride;
  const int groups = w.inputs / kInt8Group;
  const std::byte* scales = w.data + std::size_t(w.inputs) * kLanes;
  const std::byte* weights = w.data;
  for (int g = 0; g < groups; g++) {
    asm volatile("" ::: "memory");  // float sums are not to be kept in registers from group to group
    I sum[M][NB];
    each<M>([&](auto m) INLINE {
      const I start = int_set1(a.start[(first + m) * a.groups + g]);
      each<NB>([&](auto b) INLINE { sum[m][b] = start; });
    });
    const std::ptrdiff_t ahead = ahead_of(w, std::size_t(g) * steps * 64, std::size_t(groups) * steps * 64);
    for (int k = 0; k < steps; k++, weights += 64, x += 4) {
      B wv[NB];
      each<NB>([&](auto b) INLINE {
        const std::byte* at = weights + b * w.block_bytes;
        fetch(at, ahead);
        wv[b] = load_bytes(at);
      });
      each<M>([&](auto m) INLINE {
        const std::int32_t xv = std::int32_t(word(x + m * a.stride));
        each<NB>([&](auto b) INLINE { add_dot(sum[m][b], wv[b], xv); });
      });
    }
    each<NB>([&](auto b) INLINE {
      const std::byte* at = scales + b * w.block_bytes + std::size_t(g) * 2 * kLanes;
      fetch(at, w.ahead);
      const F scale = load_bf16(at);
      each<M>([&](auto m) INLINE {
        const F xs = set1(a.scales[(first + m) * a.groups + g]);
        store(acc[m][b], fma(mul(int_to_float(sum[m][b]), xs), scale, load(acc[m][b])));
      });
    });
  }
  for (int m = 0; m < M; m++)
    for (int b = 0; b < NB; b++) store(y + m * y_stride + b * kLanes, load(acc[m][b]));
}

template <int M, int NB>
inline void tile_int4(const Panel& w, const Activations& a, int first, float* y, std::size_t y_stride) {
  constexpr int steps = kInt4Group / 8;
  alignas(64) float acc[M][NB][kLanes] = {};
  const std::byte* x = a.data + first * a.stride;
  const int groups = w.inputs / kInt4Group;
  const std::byte* scales = w.data + std::size_t(w.inputs) * kLanes / 2;
  const std::byte* weights = w.data;
  for (int g = 0; g < groups; g++) {
    asm volatile("" ::: "memory");
    I sum[M][NB];
    each<M>([&](auto m) INLINE { each<NB>([&](auto b) INLINE { sum[m][b] = int_set1(0); }); });
    const std::ptrdiff_t ahead = ahead_of(w, std::size_t(g) * steps * 64, std::size_t(groups) * steps * 64);
    for (int k = 0; k < steps; k++, weights += 64, x += 8) {
      each<2>([&](auto part) INLINE {
        B wv[NB];
        each<NB>([&](auto b) INLINE {
          const std::byte* at = weights + b * w.block_bytes;
          if (part == 0) fetch(at, ahead);
          wv[b] = part == 0 ? low_nibbles(load_bytes(at)) : high_nibbles(load_bytes(at));
        });
        each<M>([&](auto m) INLINE {
          const std::int32_t xv = std::int32_t(word(x + m * a.stride + 4 * part));
          each<NB>([&](auto b) INLINE { add_dot(sum[m][b], wv[b], xv); });
        });
      });
    }
    each<NB>([&](auto b) INLINE {
      const std::byte* at = scales + b * w.block_bytes + std::size_t(g) * 4 * kLanes;
      fetch(at, w.ahead);
      const F scale = load_bf16(at), minimum = load_bf16(at + 2 * kLanes);
      each<M>([&](auto m) INLINE {
        const F xs = set1(a.scales[(first + m) * a.groups + g]), total = set1(a.sums[(first + m) * a.groups + g]);
        const F raised = fma(minimum, total, load(acc[m][b]));
        store(acc[m][b], fma(mul(int_to_float(sum[m][b]), xs), scale, raised));
      });
    });
  }
  for (int m = 0; m < M; m++)
    for (int b = 0; b < NB; b++) store(y + m * y_stride + b * kLanes, load(acc[m][b]));
}
#undef INLINE
