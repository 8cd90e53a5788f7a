// One pass of the engine: what `extend` and `verify` run over their tokens.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "engine.hpp"

namespace medusa {
namespace {

constexpr int kTilesEach = 4;  // tiles for each thread that make the work of attention even enough

}  // namespace

void Engine::pass(int outputs, int skipped) {
  const int count = int(tokens_.size());
  const Config& c = config_;
  results_.rows = results_.nodes = results_.skipped = 0;
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
    wanted_.reserve(capacity);
    capacity_ = capacity;  // only now: any of these may find no memory
  }
  divide();
  // Whoever still holds smaller results keeps them.
  const auto grow = [](std::shared_ptr<Buffer>& buffer, std::size_t bytes) {
    if (!buffer || buffer->size() < bytes) buffer = std::make_shared<Buffer>(bytes);
  };
  grow(results_.logits, std::size_t(outputs - skipped) * lm_head_.outputs() * sizeof(float));
  grow(results_.features, std::size_t(outputs) * feature_size() * sizeof(float));
  wanted_.clear();
  for (int t = 0; t < count; t++)
    if (output_[t] >= 0) wanted_.push_back(t);
  results_.skipped = skipped;

  for (Phase& phase : phases_) phase.reset();
  pool_.run([this](int thread) { run(thread); });
  results_.rows = outputs;
}

// What a token sees, in spans.
Engine::Spans Engine::spans_of(const Token& token, int window) const {
  return {first_seen(token, window) / kSpan, token.position / kSpan + 1};
}

int Engine::first_seen(const Token& token, int window) const {
  return window ? std::max(0, token.position + 1 - window) : 0;
}

// The work of attention. Queries of one slot and one key-value head are taken a few at a time, as they share the keys and
// values they read: a tile. Where there are few tiles for many threads, each span of a tile is a piece of its own, and the
// parts of a token are joined when all pieces are done.
void Engine::divide() {
  const int count = int(tokens_.size()), group = config_.heads / config_.kv_heads;
  tiles_.clear();
  for (int first = 0, end; first < count; first = end) {
    for (end = first; end < count && tokens_[end].slot == tokens_[first].slot;) end++;
    const int queries = (end - first) * group;
    for (int head = 0; head < config_.kv_heads; head++)  // the tiles of one head after each other: its keys are at hand
      for (int at = 0; at < queries; at += kQueryTile)
        tiles_.push_back({first, at, std::min(kQueryTile, queries - at), head});
  }
  int most = 1;  // spans of a token
  bool apart = false;
  for (Division& division : divisions_) {
    division.split = pool_.threads() > 1 && int(tiles_.size()) < kTilesEach * pool_.threads();
    division.pieces.clear();
    bool longer = false;
    for (int i = 0; i < int(tiles_.size()); i++) {
      const Tile& tile = tiles_[i];
      Spans all{tokens_[tile.token].position / kSpan, 0};
      for (int t = tile.token + tile.first / group; t <= tile.token + (tile.first + tile.count - 1) / group; t++) {
        const Spans spans = spans_of(tokens_[t], division.window);
        all = {std::min(all.first, spans.first), std::max(all.end, spans.end)};
        longer = longer || spans.count() > 1;
        most = std::max(most, spans.count());
      }
      if (!division.split) division.pieces.push_back({i, all});
      for (int span = all.first; division.split && span < all.end; span++)
        division.pieces.push_back({i, {span, span + 1}});
    }
    division.split = division.split && longer;
    apart = apart || division.split;
  }
  if (most == 1) return;
  part_spans_ = round_up(most, 16);
  part_stride_ = std::size_t(dim_) + kLanes;
  const std::size_t rows = std::max(pool_.threads() * kQueryTile, apart ? count * config_.heads : 0);
  parts_.fit(rows * part_spans_ * part_stride_ * sizeof(float));
}

std::vector<int> Engine::attention_pieces() const {
  std::vector<int> pieces;
  for (int division : division_of_) pieces.push_back(int(divisions_[division].pieces.size()));
  return pieces;
}

float* Engine::part_at(int row, int index) const {
  return parts_.as<float>() + (std::size_t(row) * part_spans_ + index) * part_stride_;
}

template <typename Epilogue>
void Engine::product(const Linear& linear, const ActivationBuffer& x, int unit, int thread, Phase& phase,
                     const Linear* next, Epilogue epilogue) {
  const int count = int(&x == &lm_input_ ? wanted_.size() - skipped() : tokens_.size());
  float* panel = panel_.as<float>() + std::size_t(capacity_) * kMaxPanel * kLanes * thread;
  // The gates' blocks come in pairs; where that moves the start of a range by one block, no harm is done.
  const std::byte* then = next ? next->block(phase.first(thread, next->blocks, 1)) : nullptr;
  multiply(kernels_, linear, x.view(), count, unit, thread, phase, panel, then, epilogue);
}

void Engine::run(int thread) {
  const Config& c = config_;
  const int count = int(tokens_.size()), size = c.hidden_size, outputs = int(wanted_.size());
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
    const Division& division = divisions_[division_of_[l]];
    (phase++)->run(thread, int(division.pieces.size()), 1, division.split ? 1 : 2, [&](int first, int n) {
      for (int i = first; i < first + n; i++) attend(division.pieces[i], thread, l);
    });
    each_token([&](int t) {
      for (int head = 0; division.split && head < c.heads; head++) join(t, head, t * c.heads + head, division.window);
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
    const int t = wanted_[i];
    float* final = features + std::size_t(output_[t] + 1) * feature_size() - size;
    kernels_.rms_norm(hidden + std::size_t(t) * size, final_norm_.data(), c.epsilon, size, final);
    if (i >= skipped()) lm_input_.set(kernels_, i - skipped(), final, size);
  });
  if (outputs == skipped()) return;
  float* logits = results_.logits->as<float>();
  product(lm_head_, lm_input_, 1, thread, *phase++, &layers_[0].qkv, [=](int i, int first, int n, const float* y) {
    const int row = output_[wanted_[skipped() + i]] - skipped();
    std::memcpy(logits + std::size_t(row) * lm_head_.outputs() + first, y, n * sizeof(float));
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
  const auto convert = [&](const float* from, int n, T* to) {
    if constexpr (sizeof(T) == 4) std::memcpy(to, from, n * sizeof(float));
    else kernels_.to_bfloat16(from, n, reinterpret_cast<std::byte*>(to));
  };
  for (int d = 0; d < dim_; d += kLanes) {
    convert(k + d, kLanes, row);
    for (int i = 0; i < kLanes; i++) keys[(d + i) * kLanes + lane] = row[i];
  }
  convert(v, dim_, keys + std::size_t(kLanes + lane) * dim_);
}

void Engine::attend(const Piece& piece, int thread, int l) {
  const Config& c = config_;
  const Division& division = divisions_[division_of_[l]];
  const Tile& tile = tiles_[piece.tile];
  const int group = c.heads / c.kv_heads, wide = dim_ * (c.heads + 2 * c.kv_heads);
  const auto token_of = [&](int q) { return tile.token + (tile.first + q) / group; };
  const auto head_of = [&](int q) { return tile.head * group + (tile.first + q) % group; };
  const auto row_of = [&](int q) {
    return division.split ? token_of(q) * c.heads + head_of(q) : thread * kQueryTile + q;
  };
  AttentionTask task;
  task.cache = cache_at(slots_[tokens_[tile.token].slot], 0, l, tile.head);
  task.block_stride = block_bytes_;
  task.dim = dim_;
  task.scores = scores_.as<float>() + std::size_t(kSpanPlaces) * kQueryTile * thread;
  for (int span = piece.spans.first; span < piece.spans.end; span++) {
    task.span = span * kSpan;
    task.queries = 0;
    for (int q = 0; q < tile.count; q++) {
      const Token& token = tokens_[token_of(q)];
      const Spans spans = spans_of(token, division.window);
      if (span < spans.first || span >= spans.end) continue;
      AttentionQuery& query = task.query[task.queries++];
      query.query = qkv_.as<float>() + std::size_t(token_of(q)) * wide + head_of(q) * dim_;
      float* part = spans.count() > 1 ? part_at(row_of(q), span - spans.first) : nullptr;
      query.out = part ? part : attended_at(token_of(q), head_of(q));
      query.totals = part ? part + dim_ : nullptr;
      query.start = first_seen(token, division.window);
      query.prefix = token.prefix;
      query.extra = extras_.data() + token.extra;
      query.extras = token.extras;
    }
    if (task.queries == 0) continue;
    if (cache_item_ == 4) kernels_.attend_float32(task);
    else kernels_.attend_bfloat16(task);
  }
  for (int q = 0; !division.split && q < tile.count; q++) join(token_of(q), head_of(q), row_of(q), division.window);
}

// The parts of one token and head, at `row`, become what it takes from the values; a token of one span has it already.
void Engine::join(int token, int head, int row, int window) const {
  const int count = spans_of(tokens_[token], window).count();
  if (count > 1) kernels_.join(part_at(row, 0), part_stride_, count, dim_, attended_at(token, head));
}

float* Engine::attended_at(int token, int head) const {
  return attended_.as<float>() + (std::size_t(token) * config_.heads + head) * dim_;
}

}  // namespace medusa
