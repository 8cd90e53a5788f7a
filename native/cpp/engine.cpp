#include "engine.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <stdexcept>

#include "cpu.hpp"

namespace medusa {
namespace {

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
  constexpr int most = 1 << 24;  // so that sums of a few stay within 32 bits
  for (auto [name, value] : {std::pair("hidden_size", hidden_size), {"heads", heads}, {"kv_heads", kv_heads},
                             {"head_dim", head_dim}, {"intermediate_size", intermediate_size},
                             {"vocab_size", vocab_size}, {"max_length", max_length}, {"slots", slots}})
    require(value > 0 && value <= most, std::string(name) + " is out of range");
  require(heads % kv_heads == 0, "heads must be a multiple of kv_heads");
  require(std::int64_t(heads + 2 * std::int64_t(kv_heads)) * (head_dim + kLanes) <= most, "there are too many heads");
  require(rotary_dim >= 0 && rotary_dim <= head_dim && rotary_dim % 2 == 0, "rotary_dim must be even, at most head_dim");
  require(int(inverse_frequencies.size()) == rotary_dim / 2, "inverse_frequencies must have rotary_dim / 2 values");
  for (float frequency : inverse_frequencies)
    require(std::isfinite(frequency), "a rotary frequency is not a finite number");
  for (auto [name, value] : {std::pair("epsilon", epsilon), {"attention_scale", attention_scale},
                             {"rotary_scale", rotary_scale}})
    require(std::isfinite(value), std::string(name) + " is not a finite number");
  require(epsilon >= 0, "epsilon must not be negative");
  require(!layers.empty() && layers.size() <= 4096, "there must be 1 to 4096 layers");
  for (const LayerConfig& layer : layers) require(layer.window >= 0, "a window must not be negative");
  require(feature_layers.size() < 64, "there must be fewer than 64 feature_layers");
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
  scores_ = Buffer(sizeof(float) * kSpanPlaces * kQueryTile * pool_.threads());
  for (const LayerConfig& layer : config_.layers) {
    const auto same = [&](const Division& division) { return division.window == layer.window; };
    const auto found = std::find_if(divisions_.begin(), divisions_.end(), same);
    division_of_.push_back(int(found - divisions_.begin()));
    if (found == divisions_.end()) divisions_.push_back({layer.window, false, {}});
  }
  phases_ = std::vector<Phase>(layers_.size() * 10 + 3);
  for (Phase& phase : phases_) phase.shape(pool_.threads());
  const Format f = config_.format;
  input_.shape(kernels_, f, padded_inputs(f, config_.hidden_size));
  attention_out_.shape(kernels_, f, padded_inputs(f, config_.heads * dim_));
  mlp_.shape(kernels_, f, padded_inputs(f, round_up(config_.intermediate_size, kLanes)));
  lm_input_.shape(kernels_, lm_format_, padded_inputs(lm_format_, config_.hidden_size));
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
    require(all_finite(pool_, embedding), "the embeddings have a weight that is not a finite number");
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
  slot.cache.forget(block_bytes_ * (kKept / kLanes));  // what a short text needs stays at hand
}

void Engine::copy(int source, int target, int length) {
  std::lock_guard lock(mutex_);
  const Slot& from = slot_at(source);
  Slot& to = slot_at(target);
  require(length >= 0 && length <= from.length, "slot " + std::to_string(source) + " holds " +
                                                    std::to_string(from.length) + " tokens: " + std::to_string(length) +
                                                    " of them cannot be copied");
  // Whole blocks: what lies in the last one past the length is written over, or never looked at.
  if (&from != &to)
    std::memcpy(to.cache.data(), from.cache.data(), std::size_t(round_up(length, kLanes) / kLanes) * block_bytes_);
  to.length = length;
  to.parents.clear();
}

Results Engine::extend(int index, const std::vector<std::int32_t>& ids, bool last, bool every) {
  std::lock_guard lock(mutex_);
  Slot& slot = slot_at(index);
  need_weights();
  require(!ids.empty(), "there must be a token");
  require(int(ids.size()) <= kChunk, "a chunk has at most " + std::to_string(kChunk) + " tokens");
  require(slot.length + int(ids.size()) <= config_.max_length, "the text is longer than the context");
  for (std::int32_t id : ids) check_token(id);
  slot.parents.clear();
  tokens_.clear();
  output_.assign(ids.size(), -1);
  extras_.clear();
  for (int i = 0; i < int(ids.size()); i++) {
    const int at = slot.length + i;
    tokens_.push_back({ids[i], index, at, at, at + 1, 0, 0});
  }
  if (every) std::iota(output_.begin(), output_.end(), 0);
  else if (last) output_.back() = 0;
  const int outputs = every ? int(ids.size()) : last;
  pass(outputs, outputs - last);
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
    require(slot_at(slots[b]).length > 0, "slot " + std::to_string(slots[b]) + " is empty: extend it first");
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
  pass(widest * int(slots.size()), 0);
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

}  // namespace medusa
