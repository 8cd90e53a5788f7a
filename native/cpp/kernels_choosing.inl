// Kernels of acceptance, over a row of logits. Sums of exponentials are in double precision: what they decide (top-p,
// thresholds) must not depend on who computes it.

// The first index of the greatest number; -1 if one of them is no number.
int best(const float* x, int n) {
  const F huge = set1(__builtin_huge_valf());
  F top = set1(-__builtin_huge_valf());
  std::uint32_t sound = 0xffffu;
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const F v = load(x + i);
    top = max_of(top, v);
    sound &= less(v, huge);
  }
  float most = max_lanes(top);
  for (; i < n; i++) most = x[i] > most ? x[i] : most;
  if (sound != 0xffffu || n % kLanes)
    for (i = sound == 0xffffu ? n / kLanes * kLanes : 0; i < n; i++) {
      if (x[i] != x[i]) return -1;
      most = x[i] > most ? x[i] : most;
    }
  const F limit = set1(most);
  for (i = 0; i + kLanes <= n; i += kLanes)
    if (const std::uint32_t under = less(load(x + i), limit); under != 0xffffu) return i + __builtin_ctz(~under);
  for (; x[i] < most; i++) {
  }
  return i;
}

// The indices, ascending, of all numbers that are not below `floor`; returns how many.
int at_least(const float* x, int n, float floor, std::int32_t* ids) {
  const F limit = set1(floor);
  int found = 0, i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (std::uint32_t some = ~less(load(x + i), limit) & 0xffffu; some; some &= some - 1)
      ids[found++] = i + __builtin_ctz(some);
  for (; i < n; i++)
    if (!(x[i] < floor)) ids[found++] = i;
  return found;
}

// tops[j] is the greatest of x[j], x[j + piles], x[j + 2 * piles] and so on, `rows` of them; piles is a multiple of 16.
void tops(const float* x, int rows, int piles, float* out) {
  for (int j = 0; j < piles; j += kLanes) {
    F top = load(x + j);
    for (int r = 1; r < rows; r++) top = max_of(top, load(x + std::size_t(r) * piles + j));
    store(out + j, top);
  }
}

// e^x for x <= 0, to the last bits but one or two: in a form that compilers turn into vectors.
inline double exponential_of(double x) {
  constexpr double kShift = 6755399441055744.0;  // 1.5 * 2^52: what is added to it is rounded to a whole number
  x = x < -700.0 ? -700.0 : x;
  const double shifted = x * 1.4426950408889634 + kShift;
  const double n = shifted - kShift;
  const double r = (x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
  double p = 1.0 / 479001600;
  p = p * r + 1.0 / 39916800;
  p = p * r + 1.0 / 3628800;
  p = p * r + 1.0 / 362880;
  p = p * r + 1.0 / 40320;
  p = p * r + 1.0 / 5040;
  p = p * r + 1.0 / 720;
  p = p * r + 1.0 / 120;
  p = p * r + 1.0 / 24;
  p = p * r + 1.0 / 6;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  std::uint64_t bits, power;
  __builtin_memcpy(&bits, &shifted, 8);
  __builtin_memcpy(&power, &p, 8);
  power += bits << 52;
  __builtin_memcpy(&p, &power, 8);
  return x < -690.0 ? 0.0 : p;
}

// sum of e^(x - top), and of that times (x - top), which counts nothing where e^(x - top) is 0.
void weigh(const float* x, int n, float top, double* sum, double* product) {
  constexpr int kWide = 8;
  double sums[kWide] = {}, products[kWide] = {};
  int i = 0;
  for (; i + kWide <= n; i += kWide)
    for (int j = 0; j < kWide; j++) {
      double d = double(x[i + j]) - double(top);
      d = d < -700.0 ? -700.0 : d;
      const double w = exponential_of(d);
      sums[j] += w;
      products[j] += w * d;
    }
  for (; i < n; i++) {
    double d = double(x[i]) - double(top);
    d = d < -700.0 ? -700.0 : d;
    const double w = exponential_of(d);
    sums[0] += w;
    products[0] += w * d;
  }
  *sum = *product = 0;
  for (int j = 0; j < kWide; j++) {
    *sum += sums[j];
    *product += products[j];
  }
}

void divide(const float* x, int n, float by, float* y) {
  for (int i = 0; i < n; i++) y[i] = x[i] / by;
}

// An upper bound of x + Gumbel noise -log(-log(u)), close where u is near 1: -log(u) >= 1 - u, and of 1 - u `away` holds
// the upper 24 bits. The logarithm is taken from the exponent and, in a straight line, from the fraction of a float.
void noise_bounds(const float* x, const std::int32_t* away, int n, float* y) {
  constexpr float kLog2 = 0.69314718f;
  constexpr float kStart = (24 + 127) * kLog2 + 1e-3f;  // with more than what rounding may take
  for (int i = 0; i < n; i++) {
    const float a = float(away[i]);
    std::int32_t bits;
    __builtin_memcpy(&bits, &a, 4);
    y[i] = x[i] + (kStart - float(bits) * (kLog2 / 8388608.0f));
  }
}
