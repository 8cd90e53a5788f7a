#include "engine.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <stdexcept>

#include "cpu.hpp"

namespace medusa {
namespace {

int round_up(int n, int unit) { return (n + unit - 1) / unit * unit; }

void require(bool good, const std::string& message) {
  if (!good) throw std::invalid_argument(message);
}

void check_shape(const Source& source, int rows, int columns, const std::string& name) {
  require(source.data != nullptr, name + " is missing");
  require(source.rows == rows && source.columns == columns,
          name + " is [" + std::to_string(source.rows) + ", " + std::to_string(source.columns) + "], expected [" +
              std::to_string(rows) + ", " + std::to_string(columns) + "]");
}

std::vector<float> vector_of(const Source& source, int size, const std::string& name) {
  check_shape(source, 1, size, name);
  return read(source, name);
}

}  // namespace

void Config::check() const {
  const int most = 1 << 20;
  for (auto [name, value] : {std::pair("hidden_size", hidden_size), {"heads", heads}, {"kv_heads", kv_heads},
                             {"head_dim", head_dim}, {"intermediate_size", intermediate_size},
                             {"vocab_size", vocab_size}, {"max_length", max_length}, {"slots", slots}})
    require(value > 0 && value <= most * 16, std::string(name) + " is out of range");
  require(heads % kv_heads == 0, "heads must be a multiple of kv_heads");
  require(rotary_dim >= 0 && rotary_dim <= head_dim && rotary_dim % 2 == 0, "rotary_dim must be even, at most head_dim");
  require(int(inverse_frequencies.size()) == rotary_dim / 2, "inverse_frequencies must have rotary_dim / 2 values");
  require(!layers.empty(), "there must be a layer");
  for (int layer : feature_layers)
    require(layer >= 1 && layer < int(layers.size()), "feature_layers must be from 1 to the number of layers - 1");
}

Engine::Engine(Config config, int threads, const std::string& isa)
    : config_((config.check(), std::move(config))), kernels_(kernels_for(isa)), pool_(threads) {
  dim_ = round_up(config_.head_dim, kLanes);
  cache_item_ = config_.format == Format::float32 ? 4 : 2;
  head_bytes_ = std::size_t(2) * kLanes * dim_ * cache_item_;
  block_bytes_ = head_bytes_ * config_.kv_heads * config_.layers.size();
  // Four bits for the LM head cost more quality than they save time.
  lm_format_ = config_.format == Format::int4 ? Format::int8 : config_.format;
  layers_.resize(config_.layers.size());
  slots_.resize(config_.slots);
  const std::size_t places = round_up(config_.max_length + kMaxNodes, kLanes);
  for (Slot& slot : slots_) {
    slot.cache = Buffer(places / kLanes * block_bytes_, true);
    slot.parents.reserve(kMaxNodes);
  }
  score_stride_ = places;
  scores_ = Buffer(score_stride_ * kQueryTile * sizeof(float) * pool_.threads(), true);
  phases_ = std::vector<Phase>(layers_.size() * 10 + 3);
  for (Phase& phase : phases_) phase.shape(pool_.threads());
  const Format f = config_.format;
  input_.shape(f, padded_inputs(f, config_.hidden_size));
  attention_out_.shape(f, padded_inputs(f, config_.heads * dim_));
  mlp_.shape(f, padded_inputs(f, round_up(config_.intermediate_size, kLanes)));
  lm_input_.shape(lm_format_, padded_inputs(lm_format_, config_.hidden_size));
}

void Engine::load_layer(int index, const LayerWeights& w) {
  std::lock_guard lock(mutex_);
  require(index >= 0 && index < int(layers_.size()), "there is no layer " + std::to_string(index));
  const Config& c = config_;
  const std::string name = "layer " + std::to_string(index) + ": ";
  const int hidden = c.hidden_size, head = c.head_dim;
  check_shape(w.q, c.heads * head, hidden, name + "q");
  check_shape(w.k, c.kv_heads * head, hidden, name + "k");
  check_shape(w.v, c.kv_heads * head, hidden, name + "v");
  check_shape(w.o, hidden, c.heads * head, name + "o");
  check_shape(w.gate, c.intermediate_size, hidden, name + "gate");
  check_shape(w.up, c.intermediate_size, hidden, name + "up");
  check_shape(w.down, hidden, c.intermediate_size, name + "down");

  Layer layer;
  const auto bias_of = [&](const Source& source, int size, const char* what) {
    return source.data ? vector_of(source, size, name + what) : std::vector<float>();
  };
  // Each head of q, k and v is padded to a multiple of 16 outputs.
  std::vector<OutputRow> rows;
  std::vector<float> qkv_bias;
  bool biased = false;
  for (auto [source, bias, count, what] : {std::tuple(&w.q, &w.q_bias, c.heads, "q bias"),
                                           {&w.k, &w.k_bias, c.kv_heads, "k bias"},
                                           {&w.v, &w.v_bias, c.kv_heads, "v bias"}}) {
    const std::vector<float> values = bias_of(*bias, count * head, what);
    biased = biased || !values.empty();
    for (int h = 0; h < count; h++)
      for (int i = 0; i < dim_; i++) {
        rows.push_back(i < head ? OutputRow{source, h * head + i} : OutputRow{});
        qkv_bias.push_back(i < head && !values.empty() ? values[h * head + i] : 0.0f);
      }
  }
  layer.qkv = pack(pool_, arena_, c.format, rows, {}, name + "q, k or v");
  if (biased) layer.qkv.bias = std::move(qkv_bias);

  std::vector<int> columns;  // where heads are padded, the inputs of `o` are, too
  for (int h = 0; dim_ != head && h < c.heads; h++)
    for (int i = 0; i < dim_; i++) columns.push_back(i < head ? h * head + i : -1);
  const auto plain = [&](const Source& source, const Source& bias, const std::vector<int>& inputs, const char* what) {
    Linear linear = pack(pool_, arena_, c.format, rows_of(source), inputs, name + what);
    linear.bias = bias_of(bias, source.rows, what);
    if (!linear.bias.empty()) linear.bias.resize(linear.outputs());
    return linear;
  };
  layer.o = plain(w.o, w.o_bias, columns, "o");
  layer.down = plain(w.down, w.down_bias, {}, "down");

  layer.gate_up = pack(pool_, arena_, c.format, interleaved(w.gate, w.up), {}, name + "gate or up");
  const std::vector<float> gate_bias = bias_of(w.gate_bias, c.intermediate_size, "gate bias");
  const std::vector<float> up_bias = bias_of(w.up_bias, c.intermediate_size, "up bias");
  if (!gate_bias.empty() || !up_bias.empty()) {
    layer.gate_up.bias.resize(layer.gate_up.outputs());
    for (int i = 0; i < c.intermediate_size; i++) {
      float* block = layer.gate_up.bias.data() + i / kLanes * 2 * kLanes + i % kLanes;
      if (!gate_bias.empty()) block[0] = gate_bias[i];
      if (!up_bias.empty()) block[kLanes] = up_bias[i];
    }
  }

  layer.input_norm = vector_of(w.input_norm, hidden, name + "input norm");
  layer.post_norm = vector_of(w.post_norm, hidden, name + "post norm");
  layer.q_norm = bias_of(w.q_norm, head, "q norm");
  layer.k_norm = bias_of(w.k_norm, head, "k norm");
  layer.loaded = true;
  layers_[index] = std::move(layer);
}

void Engine::load_ends(const Source& embedding, const Source& final_norm, const Source& lm_head) {
  std::lock_guard lock(mutex_);
  check_shape(embedding, config_.vocab_size, config_.hidden_size, "the embeddings");
  check_shape(lm_head, config_.vocab_size, config_.hidden_size, "the LM head");
  final_norm_ = vector_of(final_norm, config_.hidden_size, "the final norm");
  lm_head_ = pack(pool_, arena_, lm_format_, rows_of(lm_head), {}, "the LM head");
  // Tied embeddings have just been looked through.
  if (embedding.data != lm_head.data) {
    std::vector<float> row(config_.hidden_size);
    for (int i = 0; i < embedding.rows; i++) {
      embedding.row(i, row.data());
      for (float v : row) require(std::isfinite(v), "the embeddings have a weight that is not a finite number");
    }
  }
  embedding_ = embedding;
  lm_source_ = lm_head;
}

std::size_t Engine::weight_bytes() const {
  std::size_t bytes = lm_head_.bytes();
  for (const Layer& layer : layers_)
    bytes += layer.qkv.bytes() + layer.o.bytes() + layer.gate_up.bytes() + layer.down.bytes();
  return bytes;
}

// --- slots ----------------------------------------------------------------------------------------------------------

Engine::Slot& Engine::slot_at(int slot) {
  require(slot >= 0 && slot < int(slots_.size()), "there is no slot " + std::to_string(slot));
  return slots_[slot];
}

int Engine::length(int slot) const { return slot_at(slot).length; }

void Engine::need_weights() const {
  require(embedding_.data != nullptr, "the embeddings and the LM head are not loaded");
  for (const Layer& layer : layers_) require(layer.loaded, "a layer is not loaded");
}

void Engine::check_token(std::int32_t token) const {
  require(token >= 0 && token < config_.vocab_size,
          "token " + std::to_string(token) + " is outside the vocabulary of " + std::to_string(config_.vocab_size));
}

std::byte* Engine::cache_at(const Slot& slot, int place, int layer, int head) const {
  return slot.cache.data() + std::size_t(place / kLanes) * block_bytes_ +
         (std::size_t(layer) * config_.kv_heads + head) * head_bytes_;
}

void Engine::release(int index) {
  std::lock_guard lock(mutex_);
  Slot& slot = slot_at(index);
  slot.length = 0;
  slot.parents.clear();
  slot.cache.forget(block_bytes_ * (1024 / kLanes));  // what a short text needs stays at hand
}

Results Engine::extend(int index, const std::vector<std::int32_t>& ids, bool last) {
  return append(index, ids, last ? Wanted::last : Wanted::nothing);
}

Results Engine::read(int index, const std::vector<std::int32_t>& ids) { return append(index, ids, Wanted::features); }

Results Engine::append(int index, const std::vector<std::int32_t>& ids, Wanted wanted) {
  std::lock_guard lock(mutex_);
  Slot& slot = slot_at(index);
  need_weights();
  require(!ids.empty(), "there must be a token");
  require(int(ids.size()) <= kChunk, "a chunk has at most " + std::to_string(kChunk) + " tokens");
  require(slot.length + int(ids.size()) <= config_.max_length, "the prompt is longer than the context");
  for (std::int32_t id : ids) check_token(id);
  slot.parents.clear();
  tokens_.clear();
  output_.assign(ids.size(), -1);
  extras_.clear();
  for (int i = 0; i < int(ids.size()); i++) {
    const int at = slot.length + i;
    tokens_.push_back({ids[i], index, at, at, at + 1, 0, 0});
  }
  if (wanted == Wanted::last) output_.back() = 0;
  if (wanted == Wanted::features) std::iota(output_.begin(), output_.end(), 0);
  pass(wanted == Wanted::features ? int(ids.size()) : wanted == Wanted::last, wanted != Wanted::features);
  results_.nodes = results_.rows;
  slot.length += int(ids.size());
  return results_;
}

Results Engine::verify(const std::vector<int>& slots, const std::vector<int>& sizes,
                       const std::vector<std::int32_t>& ids, const std::vector<std::int32_t>& parents) {
  std::lock_guard lock(mutex_);
  need_weights();
  require(!slots.empty() && slots.size() == sizes.size(), "each slot needs a tree");
  std::size_t total = 0;
  int widest = 0;
  for (int size : sizes) {
    require(size >= 1 && size <= kMaxNodes, "a draft has 1 to " + std::to_string(kMaxNodes) + " nodes");
    total += size;
    widest = std::max(widest, size);
  }
  require(ids.size() == total && parents.size() == total, "each node needs a token and a parent");
  for (std::size_t b = 0; b < slots.size(); b++) {
    require(slot_at(slots[b]).length > 0, "slot " + std::to_string(slots[b]) + " is empty: prefill it first");
    for (std::size_t other = 0; other < b; other++) require(slots[other] != slots[b], "a slot is named twice");
  }
  tokens_.clear();
  output_.clear();
  extras_.clear();
  std::size_t at = 0;
  int path[kMaxNodes];
  for (std::size_t b = 0; b < slots.size(); b++) {
    const int length = slot_at(slots[b]).length;
    const std::size_t first = at;
    for (int i = 0; i < sizes[b]; i++, at++) {
      check_token(ids[at]);
      require(i == 0 ? parents[at] == -1 : parents[at] >= 0 && parents[at] < i, "every parent must come before its child");
      int depth = 0;
      for (int node = i; node >= 0; node = parents[first + node]) path[depth++] = node;
      require(length + depth <= config_.max_length, "the draft reaches past the context");
      std::reverse(path, path + depth);
      int straight = 0;  // ancestors that lie where a plain text would have them
      while (straight < depth && path[straight] == straight) straight++;
      Token token{ids[at], slots[b], length + depth - 1, length + i, length + straight, int(extras_.size()), depth - straight};
      for (int j = straight; j < depth; j++) extras_.push_back(length + path[j]);
      tokens_.push_back(token);
      output_.push_back(int(b) * widest + i);
    }
  }
  for (int slot : slots) slots_[slot].parents.clear();
  pass(widest * int(slots.size()), true);
  results_.nodes = widest;
  at = 0;
  for (std::size_t b = 0; b < slots.size(); b++) {
    slots_[slots[b]].parents.assign(parents.begin() + at, parents.begin() + at + sizes[b]);
    at += sizes[b];
  }
  return results_;
}

template <typename T>
void Engine::move_place(Slot& slot, int from, int to) const {
  for (int layer = 0; layer < int(layers_.size()); layer++)
    for (int head = 0; head < config_.kv_heads; head++) {
      const T* source = reinterpret_cast<const T*>(cache_at(slot, from, layer, head));
      T* target = reinterpret_cast<T*>(cache_at(slot, to, layer, head));
      for (int d = 0; d < dim_; d++) target[d * kLanes + to % kLanes] = source[d * kLanes + from % kLanes];
      std::memcpy(target + (kLanes + to % kLanes) * dim_, source + (kLanes + from % kLanes) * dim_, dim_ * sizeof(T));
    }
}

void Engine::keep(const std::vector<int>& slots, const std::vector<std::vector<int>>& paths) {
  std::lock_guard lock(mutex_);
  require(slots.size() == paths.size(), "each slot needs a path");
  for (std::size_t b = 0; b < slots.size(); b++) {
    const Slot& slot = slot_at(slots[b]);
    for (std::size_t other = 0; other < b; other++) require(slots[other] != slots[b], "a slot is named twice");
    for (std::size_t i = 0; i < paths[b].size(); i++) {
      const int node = paths[b][i];
      require(node >= 0 && node < int(slot.parents.size()), "a path holds a node that was not verified");
      require(slot.parents[node] == (i ? paths[b][i - 1] : -1), "a path goes from the root from parent to child");
    }
  }
  for (std::size_t b = 0; b < slots.size(); b++) {
    Slot& slot = slots_[slots[b]];
    for (std::size_t i = 0; i < paths[b].size(); i++) {
      const int from = slot.length + paths[b][i], to = slot.length + int(i);
      if (from == to) continue;
      if (cache_item_ == 4) move_place<float>(slot, from, to);
      else move_place<std::uint16_t>(slot, from, to);
    }
    slot.length += int(paths[b].size());
    slot.parents.clear();
  }
}

// --- one pass -------------------------------------------------------------------------------------------------------

void Engine::pass(int outputs, bool with_logits) {
  const int count = int(tokens_.size());
  with_logits_ = with_logits;
  const Config& c = config_;
  results_.rows = results_.nodes = 0;
  if (count > capacity_) {
    const int capacity = round_up(count, 16);
    const std::size_t room = sizeof(float) * capacity;
    hidden_.fit(room * c.hidden_size);
    normed_.fit(room * c.hidden_size);
    qkv_.fit(room * dim_ * (c.heads + 2 * c.kv_heads));
    attended_.fit(room * dim_ * c.heads);
    gated_.fit(room * round_up(c.intermediate_size, kLanes));
    rotary_.fit(room * std::max(1, c.rotary_dim));
    panel_.fit(room * kMaxPanel * kLanes * pool_.threads());
    input_.fit(capacity);
    attention_out_.fit(capacity);
    mlp_.fit(capacity);
    lm_input_.fit(capacity);
    lm_tokens_.reserve(capacity);
    capacity_ = capacity;  // only now: any of these may find no memory
  }
  // Whoever still holds smaller results keeps them.
  const auto grow = [](std::shared_ptr<Buffer>& buffer, std::size_t bytes) {
    if (!buffer || buffer->size() < bytes) buffer = std::make_shared<Buffer>(bytes);
  };
  grow(results_.logits, std::size_t(with_logits ? outputs : 0) * lm_head_.outputs() * sizeof(float));
  grow(results_.features, std::size_t(outputs) * feature_size() * sizeof(float));
  results_.rows = outputs;
  lm_tokens_.clear();
  for (int t = 0; t < count; t++)
    if (output_[t] >= 0) lm_tokens_.push_back(t);

  // Queries of one slot and one key-value head, a few at a time: they share the keys and values they read.
  const int group = c.heads / c.kv_heads;
  tiles_.clear();
  for (int first = 0, end; first < count; first = end) {
    for (end = first; end < count && tokens_[end].slot == tokens_[first].slot;) end++;
    const int queries = (end - first) * group;
    for (int head = 0; head < c.kv_heads; head++)  // the tiles of one head after each other: its keys are at hand
      for (int at = 0; at < queries; at += kQueryTile)
        tiles_.push_back({first, at, std::min(kQueryTile, queries - at), head});
  }
  for (Phase& phase : phases_) phase.reset();
  pool_.run([this](int thread) { run(thread); });
}

template <typename Epilogue>
void Engine::product(const Linear& linear, const ActivationBuffer& x, int unit, int thread, Phase& phase,
                     const Linear* next, Epilogue epilogue) {
  const int count = int(&x == &lm_input_ ? lm_tokens_.size() : tokens_.size());
  float* panel = panel_.as<float>() + std::size_t(capacity_) * kMaxPanel * kLanes * thread;
  // The gates' blocks come in pairs; where that moves the start of a range by one block, no harm is done.
  const std::byte* then = next ? next->block(phase.first(thread, next->blocks, 1)) : nullptr;
  multiply(kernels_, linear, x.view(), count, unit, thread, phase, panel, then, epilogue);
}

void Engine::run(int thread) {
  const Config& c = config_;
  const int count = int(tokens_.size()), size = c.hidden_size, outputs = int(lm_tokens_.size());
  const int wide = dim_ * (c.heads + 2 * c.kv_heads), inner = round_up(c.intermediate_size, kLanes);
  float* hidden = hidden_.as<float>();
  float* normed = normed_.as<float>();
  float* qkv = qkv_.as<float>();
  float* gated = gated_.as<float>();
  float* features = results_.features->as<float>();
  Phase* phase = phases_.data();
  const auto each_token = [&](auto work) {
    (phase++)->run(thread, count, 1, 4, [&](int first, int n) {
      for (int t = first; t < first + n; t++) work(t);
    });
  };

  each_token([&](int t) { embed(t); });
  for (int l = 0; l < int(layers_.size()); l++) {
    const Layer& layer = layers_[l];
    each_token([&](int t) {
      const float* row = hidden + std::size_t(t) * size;
      for (std::size_t i = 0; output_[t] >= 0 && i < c.feature_layers.size(); i++)
        if (c.feature_layers[i] == l)
          std::memcpy(features + std::size_t(output_[t]) * feature_size() + i * size, row, size * sizeof(float));
      kernels_.rms_norm(row, layer.input_norm.data(), c.epsilon, size, normed + std::size_t(t) * size);
      input_.set(kernels_, t, normed + std::size_t(t) * size, size);
    });
    product(layer.qkv, input_, 1, thread, *phase++, &layer.o, copied_to(qkv, wide));
    each_token([&](int t) { rotate(t, l); });
    (phase++)->run(thread, int(tiles_.size()), 1, 2, [&](int first, int n) {
      for (int i = first; i < first + n; i++) attend(tiles_[i], thread, l);
    });
    each_token([&](int t) {
      attention_out_.set(kernels_, t, attended_.as<float>() + std::size_t(t) * dim_ * c.heads, dim_ * c.heads);
    });
    product(layer.o, attention_out_, 1, thread, *phase++, &layer.gate_up, added_to(hidden, size));
    each_token([&](int t) {
      kernels_.rms_norm(hidden + std::size_t(t) * size, layer.post_norm.data(), c.epsilon, size,
                        normed + std::size_t(t) * size);
      input_.set(kernels_, t, normed + std::size_t(t) * size, size);
    });
    product(layer.gate_up, input_, 2, thread, *phase++, &layer.down, gated_to(kernels_, c.gate, gated, inner));
    each_token([&](int t) { mlp_.set(kernels_, t, gated + std::size_t(t) * inner, inner); });
    const Linear* next = l + 1 < int(layers_.size()) ? &layers_[l + 1].qkv : &lm_head_;
    product(layer.down, mlp_, 1, thread, *phase++, next, added_to(hidden, size));
  }
  if (outputs == 0) return;
  (phase++)->run(thread, outputs, 1, 1, [&](int i, int) {
    const int t = lm_tokens_[i];
    float* final = features + std::size_t(output_[t] + 1) * feature_size() - size;
    kernels_.rms_norm(hidden + std::size_t(t) * size, final_norm_.data(), c.epsilon, size, final);
    lm_input_.set(kernels_, i, final, size);
  });
  if (!with_logits_) return;
  float* logits = results_.logits->as<float>();
  product(lm_head_, lm_input_, 1, thread, *phase++, &layers_[0].qkv, [=](int i, int first, int n, const float* y) {
    std::memcpy(logits + std::size_t(output_[lm_tokens_[i]]) * lm_head_.outputs() + first, y, n * sizeof(float));
  });
}

// The token's embedding, and the cosines and sines of its position.
void Engine::embed(int t) {
  const Config& c = config_;
  const int half = c.rotary_dim / 2;
  embedding_.row(tokens_[t].id, hidden_.as<float>() + std::size_t(t) * c.hidden_size);
  float* turn = rotary_.as<float>() + std::size_t(t) * c.rotary_dim;  // cosines, then sines
  for (int i = 0; i < half; i++) {
    const double angle = float(tokens_[t].position) * c.inverse_frequencies[i];  // in single precision, as trained
    turn[i] = float(std::cos(angle)) * c.rotary_scale;
    turn[half + i] = float(std::sin(angle)) * c.rotary_scale;
  }
}

// Norm, rotation and scale of the queries; norm and rotation of the keys, which go to the cache with the values.
void Engine::rotate(int t, int l) {
  const Config& c = config_;
  const Layer& layer = layers_[l];
  const int half = c.rotary_dim / 2, wide = dim_ * (c.heads + 2 * c.kv_heads);
  const auto turn = [&](float* x, const float* turns, const std::vector<float>& norm) {
    if (!norm.empty()) kernels_.rms_norm(x, norm.data(), c.epsilon, c.head_dim, x);
    if (!c.layers[l].rotary) return;
    for (int i = 0; i < half; i++) {
      const float a = x[i], b = x[half + i];
      x[i] = a * turns[i] - b * turns[half + i];
      x[half + i] = b * turns[i] + a * turns[half + i];
    }
  };
  const Token& token = tokens_[t];
  float* q = qkv_.as<float>() + std::size_t(t) * wide;
  float* k = q + dim_ * c.heads;
  float* v = k + dim_ * c.kv_heads;
  const float* turns = rotary_.as<float>() + std::size_t(t) * c.rotary_dim;
  for (int h = 0; h < c.heads; h++, q += dim_) {
    turn(q, turns, layer.q_norm);
    for (int i = 0; i < dim_; i++) q[i] *= c.attention_scale;
  }
  for (int h = 0; h < c.kv_heads; h++, k += dim_, v += dim_) {
    turn(k, turns, layer.k_norm);
    std::byte* block = cache_at(slots_[token.slot], token.place, l, h);
    if (cache_item_ == 4) write_cache<float>(block, token.place % kLanes, k, v);
    else write_cache<std::uint16_t>(block, token.place % kLanes, k, v);
  }
}

template <typename T>
void Engine::write_cache(std::byte* block, int lane, const float* k, const float* v) const {
  T* keys = reinterpret_cast<T*>(block);
  alignas(64) T row[kLanes];
  const Format format = sizeof(T) == 4 ? Format::float32 : Format::bfloat16;
  for (int d = 0; d < dim_; d += kLanes) {
    kernels_.quantise[int(format)](k + d, kLanes, kLanes, reinterpret_cast<std::byte*>(row), nullptr, nullptr, nullptr);
    for (int i = 0; i < kLanes; i++) keys[(d + i) * kLanes + lane] = row[i];
  }
  T* values = keys + std::size_t(kLanes + lane) * dim_;
  kernels_.quantise[int(format)](v, dim_, dim_, reinterpret_cast<std::byte*>(values), nullptr, nullptr, nullptr);
}

void Engine::attend(const Tile& tile, int thread, int l) {
  const Config& c = config_;
  const int group = c.heads / c.kv_heads, wide = dim_ * (c.heads + 2 * c.kv_heads);
  AttentionTask task;
  task.cache = cache_at(slots_[tokens_[tile.token].slot], 0, l, tile.head);
  task.block_stride = block_bytes_;
  task.dim = dim_;
  task.queries = tile.count;
  task.scores = scores_.as<float>() + score_stride_ * kQueryTile * thread;
  task.score_stride = score_stride_;
  for (int q = 0; q < tile.count; q++) {
    const int t = tile.token + (tile.first + q) / group, head = tile.head * group + (tile.first + q) % group;
    const Token& token = tokens_[t];
    AttentionQuery& query = task.query[q];
    query.query = qkv_.as<float>() + std::size_t(t) * wide + head * dim_;
    query.out = attended_.as<float>() + (std::size_t(t) * c.heads + head) * dim_;
    const int window = c.layers[l].window;
    query.start = window ? std::max(0, token.position + 1 - window) : 0;
    query.prefix = token.prefix;
    query.extra = extras_.data() + token.extra;
    query.extras = token.extras;
  }
  if (cache_item_ == 4) kernels_.attend_float32(task);
  else kernels_.attend_bfloat16(task);
}

}  // namespace medusa
