// Attention, written over the vector operations that kernels_generic.inl includes this beside.
//
// A task is one span of positions: scores of the keys, their weights, the weighted sum of the values. `join` makes one of
// the sums of several spans. Within a span places and positions are counted from its first one.

template <typename T>
inline F load_cached(const T* p) {
  if constexpr (sizeof(T) == 2)
    return load_bf16(reinterpret_cast<const std::byte*>(p));
  else
    return load(reinterpret_cast<const float*>(p));
}

// What a query sees of the span: positions [first, end).
struct Seen {
  int first, end;
};

inline Seen seen_of(const AttentionQuery& query, int span) {
  const int end = query.prefix + query.extras;
  return {query.start > span ? query.start : span, end < span + kSpan ? end : span + kSpan};
}

inline int place_of(const AttentionQuery& query, int position) {
  return position < query.prefix ? position : query.extra[position - query.prefix];
}

template <typename T, int Q>
inline void scores_of(const AttentionTask& t, int first_block, int last_block) {
  for (int block = first_block; block < last_block; block++) {
    const T* keys = reinterpret_cast<const T*>(t.cache + block * t.block_stride);
    F acc[Q];
    for (int q = 0; q < Q; q++) acc[q] = zero();
    // The next keys, and the values of these positions, which are wanted soon: short stretches far apart in memory.
    const std::ptrdiff_t next = block + 1 < last_block ? std::ptrdiff_t(t.block_stride) : 0;
    const std::ptrdiff_t values = std::ptrdiff_t(kLanes) * t.dim * std::ptrdiff_t(sizeof(T));
    for (int d = 0; d < t.dim; d++) {
      const std::byte* at = reinterpret_cast<const std::byte*>(keys + std::size_t(d) * kLanes);
      fetch(at, next);
      fetch(at, values);
      F k = load_cached(keys + std::size_t(d) * kLanes);
      for (int q = 0; q < Q; q++) acc[q] = fma(k, set1(t.query[q].query[d]), acc[q]);
    }
    for (int q = 0; q < Q; q++) store(t.scores + q * kSpanPlaces + block * kLanes - t.span, acc[q]);
  }
}

// Scores at places -> weights by position, 0 outside what the query sees; returns the largest score and their sum.
struct Softened {
  float top, sum;
};

inline Softened soften(const AttentionQuery& query, int span, Seen seen, float* s) {
  for (int p = seen.first > query.prefix ? seen.first : query.prefix; p < seen.end; p++)
    s[p - span] = s[query.extra[p - query.prefix] - span];
  const int from = seen.first / kLanes * kLanes - span, to = (seen.end + kLanes - 1) / kLanes * kLanes - span;
  for (int p = from; p < seen.first - span; p++) s[p] = -1e30f;
  for (int p = seen.end - span; p < to; p++) s[p] = -1e30f;
  F most = load(s + from);
  for (int p = from; p < to; p += kLanes) most = max_of(most, load(s + p));
  const float highest = max_lanes(most);
  const F top = set1(highest);
  F sum = zero();
  for (int p = from; p < to; p += kLanes) {
    F e = exponential(sub(load(s + p), top));
    store(s + p, e);
    sum = add(sum, e);
  }
  return {highest, sum_lanes(sum)};
}

template <typename T>
inline const T* values_at(const AttentionTask& t, int place) {
  const std::byte* block = t.cache + std::size_t(place / kLanes) * t.block_stride;
  return reinterpret_cast<const T*>(block) + std::size_t(kLanes) * t.dim + std::size_t(place % kLanes) * t.dim;
}

// DV vectors of the values from dimension d on; each query's sum runs over its positions in order.
template <typename T, int Q, int DV>
inline void values_of(const AttentionTask& t, int d, int from, int shared, const Seen* seen, const float* scales) {
  F acc[Q][DV];
  for (int q = 0; q < Q; q++)
    for (int v = 0; v < DV; v++) acc[q][v] = zero();
  for (int p = from; p < shared; p++) {
    const T* values = values_at<T>(t, p) + d;
    F x[DV];
    for (int v = 0; v < DV; v++) x[v] = load_cached(values + v * kLanes);
    for (int q = 0; q < Q; q++) {
      F weight = set1(t.scores[q * kSpanPlaces + p - t.span]);
      for (int v = 0; v < DV; v++) acc[q][v] = fma(x[v], weight, acc[q][v]);
    }
  }
  for (int q = 0; q < Q; q++) {
    const AttentionQuery& query = t.query[q];
    const float* weights = t.scores + q * kSpanPlaces;
    for (int p = shared; p < seen[q].end; p++) {
      const T* values = values_at<T>(t, place_of(query, p)) + d;
      F weight = set1(weights[p - t.span]);
      for (int v = 0; v < DV; v++) acc[q][v] = fma(load_cached(values + v * kLanes), weight, acc[q][v]);
    }
    F scale = set1(scales[q]);
    for (int v = 0; v < DV; v++) store(query.out + d + v * kLanes, mul(acc[q][v], scale));
  }
}

template <typename T, int Q>
inline void attend_tile(const AttentionTask& t) {
  Seen seen[Q];
  int start = t.span + kSpan, shared = t.span + kSpan, first_place = start + kSpanPlaces, last_place = 0;
  for (int q = 0; q < Q; q++) {
    const AttentionQuery& query = t.query[q];
    seen[q] = seen_of(query, t.span);
    start = seen[q].first < start ? seen[q].first : start;
    shared = query.prefix < shared ? query.prefix : shared;
    const int first = place_of(query, seen[q].first), last = place_of(query, seen[q].end - 1);
    first_place = first < first_place ? first : first_place;
    last_place = last > last_place ? last : last_place;
  }
  shared = shared > start ? shared : start;
  scores_of<T, Q>(t, first_place / kLanes, last_place / kLanes + 1);
  float scales[Q];
  for (int q = 0; q < Q; q++) {
    float* s = t.scores + q * kSpanPlaces;
    const Softened made = soften(t.query[q], t.span, seen[q], s);
    float* totals = t.query[q].totals;
    scales[q] = totals ? 1.0f : 1.0f / made.sum;
    if (totals) totals[0] = made.top, totals[1] = made.sum;
    // Where this query's window begins later than another's of the tile, its weights there are 0.
    for (int p = start; p < seen[q].first; p++) s[p - t.span] = 0.0f;
  }
  int d = 0;
  for (; d + 4 * kLanes <= t.dim; d += 4 * kLanes) values_of<T, Q, 4>(t, d, start, shared, seen, scales);
  for (; d < t.dim; d += kLanes) values_of<T, Q, 1>(t, d, start, shared, seen, scales);
}

template <typename T>
void attend(const AttentionTask& t) {
  switch (t.queries) {
    case 1: attend_tile<T, 1>(t); break;
    case 2: attend_tile<T, 2>(t); break;
    case 3: attend_tile<T, 3>(t); break;
    case 4: attend_tile<T, 4>(t); break;
    case 5: attend_tile<T, 5>(t); break;
    default: attend_tile<T, 6>(t); break;
  }
}

void join(float* parts, std::size_t stride, int count, int dim, float* out) {
  float top = parts[dim];
  for (int i = 1; i < count; i++) top = parts[i * stride + dim] > top ? parts[i * stride + dim] : top;
  float sum = 0;
  for (int i = 0; i < count; i++) {
    float* totals = parts + i * stride + dim;
    alignas(64) float weight[kLanes];
    store(weight, exponential(sub(set1(totals[0]), set1(top))));
    totals[0] = weight[0];
    sum += weight[0] * totals[1];
  }
  const F inverse = set1(1.0f / sum);
  for (int d = 0; d < dim; d += kLanes) {
    F acc = zero();
    for (int i = 0; i < count; i++) acc = fma(load(parts + i * stride + d), set1(parts[i * stride + dim]), acc);
    store(out + d, mul(acc, inverse));
  }
}
