// Loops that are unrolled before the compiler decides what lives in registers: arrays that plain loops go through stay
// in memory.
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
