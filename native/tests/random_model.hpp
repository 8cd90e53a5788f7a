// Random models and their weights, for the fuzz programs: the same on every machine.
#pragma once

#include <cmath>
#include <cstring>
#include <deque>
#include <initializer_list>
#include <utility>
#include <vector>

#include "engine.hpp"

namespace {

using namespace medusa;

// --- random numbers: the same ones on every machine -----------------------------------------------------------------

class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}

  std::uint64_t next() {  // splitmix64
    std::uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
  }
  int between(int low, int high) { return low + int(next() % std::uint64_t(high - low + 1)); }
  bool chance(int percent) { return between(1, 100) <= percent; }
  float real(float low, float high) { return low + (high - low) * (float(next() >> 40) / float(1 << 24)); }
  template <typename T>
  T pick(std::initializer_list<T> choices) {
    return choices.begin()[between(0, int(choices.size()) - 1)];
  }

 private:
  std::uint64_t state_;
};

// --- weights --------------------------------------------------------------------------------------------------------

inline std::uint16_t to_float16(float v) {  // cut off; what is too small becomes the smallest subnormal number, else infinite
  std::uint32_t bits;
  std::memcpy(&bits, &v, 4);
  const int exponent = int(bits >> 23 & 255) - 112;
  const std::uint32_t sign = bits >> 16 & 0x8000;
  if (exponent <= 0) return std::uint16_t(sign | 1);
  if (exponent >= 31) return std::uint16_t(sign | 31 << 10);
  return std::uint16_t(sign | std::uint32_t(exponent) << 10 | (bits >> 13 & 1023));
}

struct Matrix {
  Dtype dtype;
  int rows, columns;
  std::vector<std::byte> bytes;

  Matrix(Dtype type, int height, int width)
      : dtype(type), rows(height), columns(width), bytes(std::size_t(height) * width * item()) {}

  std::size_t item() const { return dtype == Dtype::float32 ? 4 : 2; }
  Source source() const { return {bytes.data(), dtype, rows, columns}; }
  void set(int row, int column, float v) {
    std::byte* at = bytes.data() + (std::size_t(row) * columns + column) * item();
    std::uint16_t half = to_float16(v);
    if (dtype == Dtype::bfloat16) std::memcpy(&half, reinterpret_cast<const char*>(&v) + 2, 2);  // little-endian
    if (dtype == Dtype::float32) std::memcpy(at, &v, 4);
    else std::memcpy(at, &half, 2);
  }
};

Dtype random_dtype(Random& random) { return random.pick({Dtype::float32, Dtype::bfloat16, Dtype::float16}); }

// Owns the matrices whose sources it hands out; most are of one type.
class Store {
 public:
  explicit Store(Dtype dtype) : dtype_(dtype) {}

  Source uniform(Random& random, int rows, int columns, float middle, float spread) {
    Matrix& m = kept_.emplace_back(random.chance(80) ? dtype_ : random_dtype(random), rows, columns);
    for (int r = 0; r < rows; r++)
      for (int c = 0; c < columns; c++) m.set(r, c, middle + random.real(-spread, spread));
    return m.source();
  }
  Source weight(Random& random, int rows, int columns) {  // keeps the variance of its inputs
    return uniform(random, rows, columns, 0, std::sqrt(3.0f / float(columns)));
  }
  Source norm(Random& random, int size) { return uniform(random, 1, size, 1, 0.3f); }
  Source bias(Random& random, int size) { return uniform(random, 1, size, 0, 0.3f); }

  // The same but for one number, which is not finite.
  Source infinite(Random& random, const Source& source) {
    Matrix& m = kept_.emplace_back(source.dtype, source.rows, source.columns);
    std::memcpy(m.bytes.data(), source.data, m.bytes.size());
    const int row = random.between(0, m.rows - 1), column = random.between(0, m.columns - 1);
    m.set(row, column, random.pick({INFINITY, -INFINITY, std::nanf("")}));
    return m.source();
  }

 private:
  Dtype dtype_;
  std::deque<Matrix> kept_;
};

struct Model {
  Config config;
  std::vector<LayerWeights> layers;
  Source embedding, final_norm, lm_head;
  Store store;

  explicit Model(Dtype dtype) : store(dtype) {}
};

Config random_config(Random& random, Format format) {
  Config c;
  c.format = format;
  c.hidden_size = random.between(24, 80);
  c.kv_heads = random.between(1, 2);
  c.heads = c.kv_heads * random.pick({1, 2, 3, 7});
  c.head_dim = c.heads > 6 ? random.pick({6, 9, 16}) : random.pick({6, 9, 16, 20, 24, 70});
  c.rotary_dim = random.pick({0, 1, 2, 2}) * (c.head_dim / 4) * 2;
  if (c.rotary_dim > c.head_dim) c.rotary_dim = c.head_dim / 2 * 2;
  for (int i = 0; i < c.rotary_dim / 2; i++)
    c.inverse_frequencies.push_back(std::pow(1000.0f, -2.0f * float(i) / float(c.rotary_dim)));
  c.intermediate_size = random.between(20, 90);
  c.vocab_size = random.between(50, 90);
  // Now and then several spans of attention; texts are then about their borders.
  c.max_length = random.chance(8) ? random.between(1, 2) * kSpan + random.between(4, 60) : random.between(48, 64);
  c.slots = random.between(2, 4);  // the last one is for comparisons
  c.attention_scale = 1.0f / std::sqrt(float(c.head_dim));
  c.rotary_scale = random.pick({1.0f, 1.1f});
  c.gate = random.pick({Gate::silu, Gate::gelu_tanh, Gate::gelu});
  const int layers = random.between(2, 3);
  for (int i = 0; i < layers; i++) c.layers.push_back({!random.chance(25), random.pick({0, 0, 1, 5, 17, kSpan + 9})});
  for (int i = layers - 1; i > 0; i--)
    if (random.chance(50)) c.feature_layers.push_back(i);
  return c;
}

LayerWeights random_layer(Random& random, const Config& c, Store& store) {
  const int queries = c.heads * c.head_dim, keys = c.kv_heads * c.head_dim;
  LayerWeights w;
  w.q = store.weight(random, queries, c.hidden_size);
  w.k = store.weight(random, keys, c.hidden_size);
  w.v = store.weight(random, keys, c.hidden_size);
  w.o = store.weight(random, c.hidden_size, queries);
  w.gate = store.weight(random, c.intermediate_size, c.hidden_size);
  w.up = store.weight(random, c.intermediate_size, c.hidden_size);
  w.down = store.weight(random, c.hidden_size, c.intermediate_size);
  w.input_norm = store.norm(random, c.hidden_size);
  w.post_norm = store.norm(random, c.hidden_size);
  for (auto [place, size] : {std::pair(&w.q_bias, queries), {&w.k_bias, keys}, {&w.v_bias, keys},
                             {&w.o_bias, c.hidden_size}, {&w.gate_bias, c.intermediate_size},
                             {&w.up_bias, c.intermediate_size}, {&w.down_bias, c.hidden_size}})
    if (random.chance(40)) *place = store.bias(random, size);
  if (random.chance(50)) w.q_norm = store.norm(random, c.head_dim);
  if (random.chance(50)) w.k_norm = store.norm(random, c.head_dim);
  return w;
}

Model random_model(Random& random, Format format) {
  Model m(random_dtype(random));
  m.config = random_config(random, format);
  const Config& c = m.config;
  for (std::size_t i = 0; i < c.layers.size(); i++) m.layers.push_back(random_layer(random, c, m.store));
  m.embedding = m.store.uniform(random, c.vocab_size, c.hidden_size, 0, 1.7f);
  m.lm_head = random.chance(25) ? m.embedding : m.store.weight(random, c.vocab_size, c.hidden_size);
  m.final_norm = m.store.norm(random, c.hidden_size);
  return m;
}

void load(Engine& engine, const Model& model) {
  for (int i = 0; i < int(model.layers.size()); i++) engine.load_layer(i, model.layers[i]);
  engine.load_ends(model.embedding, model.final_norm, model.lm_head);
}

}  // namespace
