// What the engine asks of an instruction set: one table of functions for each, filled in kernels_<set>.cpp.
//
// The promise that all of them keep: what is computed for one token depends on that token alone. Every sum runs over
// its terms in one fixed order, however many tokens, threads or other rows are in the pass. So the bits of a token's
// logits are the same when it is decoded plainly, as a node of any tree, alone or in a batch.
//
// Vectors are 16 floats wide everywhere (one register, or two, or four), so memory layouts are the same for all sets.
#pragma once

#include <cstddef>
#include <cstdint>

namespace medusa {

inline constexpr int kLanes = 16;         // outputs in a block of packed weights; positions in a block of the cache
inline constexpr int kMaxPanel = 4;       // most blocks that one call of `matmul` takes
inline constexpr int kInt8Group = 64;     // inputs that share a scale in int8
inline constexpr int kInt4Group = 32;     // and in int4
inline constexpr int kQueryTile = 6;      // queries that attention takes in one go
inline constexpr int kSpan = 256;         // positions whose sums attention makes in one go
inline constexpr int kMaxNodes = 256;     // of one tree
// The place of a node is less than kMaxNodes past its position.
inline constexpr int kSpanPlaces = kSpan + kMaxNodes;

enum class Format : std::uint8_t { float32, bfloat16, int8, int4 };
inline constexpr int kFormats = 4;

// Activations of some tokens as a linear layer reads them. Integer formats carry one scale and one correction for
// each group of inputs: int8 weights are stored with 128 added, so the product starts at -128 * sum(x); int4 weights
// have a minimum of their own, which meets scale * sum(x).
struct Activations {
  const std::byte* data;      // [tokens][stride]
  std::size_t stride;         // bytes
  const float* scales;        // [tokens][groups]
  const std::int32_t* start;  // [tokens][groups], int8; in int4 what the instruction set wants
  const float* sums;          // [tokens][groups], int4
  std::size_t groups;
};

// Weights of 16 outputs each ("block"), packed so that one vector load brings the next inputs of all 16:
//   float32  [K][16]            bfloat16 [K/2][16][2]
//   int8     [K/4][16][4] unsigned with 128 added, then a bfloat16 scale [K/64][16]
//   int4     [K/8][16][4] pairs of nibbles (inputs i and i + 4), then bfloat16 (scale, minimum) [K/32][2][16]
struct Panel {
  const std::byte* data;
  std::size_t block_bytes;
  int blocks;              // 1 to kMaxPanel
  int inputs;              // K, padded to what the format needs
  std::ptrdiff_t ahead;    // from these weights to those that this thread reads next: they are fetched meanwhile
};

// Attention of up to kQueryTile queries to one span of one key-value head of one slot. A token at position p sees
// positions 0..p; those below `prefix` lie at the place of their number, the others (its ancestors in the tree) at
// `extra`.
//
// The sums of the softmax and of the values run within spans of kSpan positions, and then over the spans. A span begins at
// a multiple of kSpan, wherever its positions lie, so a token's spans are those of its text alone; and one token's spans
// can be left to several threads.
struct AttentionQuery {
  const float* query;         // [dim], already scaled
  float* out;                 // [dim]
  float* totals;              // [2] or null, see Kernels::attend_float32
  int start;                  // first position seen (sliding window)
  int prefix;
  const std::int32_t* extra;  // increasing places, each at least its position
  int extras;
};
struct AttentionTask {
  const std::byte* cache;    // block 0 of this layer and head: keys [dim][16], then values [16][dim]
  std::size_t block_stride;  // bytes from one block of 16 positions to the next
  int dim;                   // a multiple of 16
  int span;                  // its first position; each query sees some of it
  int queries;
  AttentionQuery query[kQueryTile];
  float* scores;  // room for queries * kSpanPlaces floats
};

enum class Gate : std::uint8_t { silu, gelu_tanh, gelu };

struct Kernels {
  const char* name;

  // y[t][0 .. 16 * blocks) for all tokens t.
  void (*matmul[kFormats])(const Panel&, const Activations&, int tokens, float* y, std::size_t y_stride);

  // One row of n floats -> the row that `matmul` reads, of `input_bytes` for each input, padded with zeros to `padded`.
  std::size_t input_bytes[kFormats];
  void (*quantise[kFormats])(const float* x, int n, int padded, std::byte* out, float* scales, std::int32_t* start,
                             float* sums);
  // n floats, a multiple of 16, as the cache holds them.
  void (*to_bfloat16)(const float* x, int n, std::byte* out);

  // `out` is the mean of the values that a query sees in the span. With `totals` it is their weighted sum, and `totals`
  // are the largest score and the sum of the weights: one part of `join`.
  void (*attend_float32)(const AttentionTask&);
  void (*attend_bfloat16)(const AttentionTask&);
  // The mean [dim] over `count` spans, in order: part i, [dim] and its totals, is at parts + i * stride. Overwrites totals.
  void (*join)(float* parts, std::size_t stride, int count, int dim, float* out);

  void (*rms_norm)(const float* x, const float* weight, float epsilon, int n, float* y);
  // y[i] = gate(g[i]) * u[i] for one vector of 16: what follows the fused gate and up projections.
  void (*gated)(Gate, const float* g, const float* u, float* y);
  void (*silu)(const float* x, int n, float* y);

  // The k best of x[0..n), best first (the first one among equals), and log(sum(exp(x))).
  void (*top_k)(const float* x, int n, int k, float* values, std::int32_t* ids, float* log_sum_exp);

  // Of acceptance, see kernels_choosing.inl.
  int (*best)(const float* x, int n);
  int (*at_least)(const float* x, int n, float floor, std::int32_t* ids);
  void (*tops)(const float* x, int rows, int piles, float* out);
  void (*weigh)(const float* x, int n, float top, double* sum, double* product);
  void (*divide)(const float* x, int n, float by, float* y);
  void (*noise_bounds)(const float* x, const std::int32_t* away, int n, float* y);
};

// Null where this build or this machine lacks the set.
const Kernels* portable_kernels();
const Kernels* avx2_kernels();
const Kernels* avx_vnni_kernels();
const Kernels* avx512_kernels();
const Kernels* avx512_bf16_kernels();
const Kernels* amx_kernels();
const Kernels* neon_kernels();

}  // namespace medusa
