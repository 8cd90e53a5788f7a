#include "heads.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace medusa {
namespace {

void require(bool good, const std::string& message) {
  if (!good) throw std::invalid_argument("heads: " + message);
}

void check_shape(const Source& source, int rows, int columns, const char* name) {
  require(source.data && source.rows == rows && source.columns == columns, std::string(name) + " has the wrong shape");
}

}  // namespace

Heads::Heads(Engine& engine, const HeadsConfig& config) : engine_(engine), config_(config) {
  require(config.levels >= 1 && config.levels <= 64, "there must be 1 to 64 levels");
  require(config.features >= 1 && config.features <= 64, "there must be 1 to 64 features");
  for (Phase& phase : phases_) phase.shape(engine.pool().threads());
  levels_.resize(config.kind == HeadsKind::recurrent ? 1 : config.levels);
}

void Heads::load_projection(const Source& weight) {
  std::lock_guard lock(engine_.mutex());
  check_shape(weight, hidden_size(), hidden_size() * config_.features, "the projection");
  projection_ = pack(engine_.pool(), arena_, config_.format, rows_of(weight), {}, "heads: the projection");
  projects_ = true;
}

void Heads::load_level(int level, const std::vector<BlockWeights>& layers) {
  std::lock_guard lock(engine_.mutex());
  require(level >= 1 && level <= int(levels_.size()) && !layers.empty(), "there is no such level");
  std::vector<Block> blocks;
  for (std::size_t i = 0; i < layers.size(); i++) {
    const BlockWeights& w = layers[i];
    int inputs = hidden_size();
    if (config_.kind == HeadsKind::recurrent) inputs *= 3;
    else if (config_.kind == HeadsKind::sequential && i == 0) inputs *= 1 + level;
    Block block;
    block.gated = w.gate.data != nullptr;
    require(block.gated ? !w.linear.data && !w.bias.data : !w.up.data && !w.down.data,
            "a block is either gate, up and down, or linear and bias");
    if (block.gated) {
      check_shape(w.gate, w.gate.rows, inputs, "gate");
      check_shape(w.up, w.gate.rows, inputs, "up");
      check_shape(w.down, hidden_size(), w.gate.rows, "down");
      block.first = pack(engine_.pool(), arena_, config_.format, interleaved(w.gate, w.up), {}, "heads: gate or up");
      block.down = pack(engine_.pool(), arena_, config_.format, rows_of(w.down), {}, "heads: down");
    } else {
      check_shape(w.linear, hidden_size(), inputs, "linear");
      block.first = pack(engine_.pool(), arena_, config_.format, rows_of(w.linear), {}, "heads: linear");
      if (w.bias.data) {
        check_shape(w.bias, 1, hidden_size(), "bias");
        block.first.bias = read(w.bias, "heads: bias");
        block.first.bias.resize(block.first.outputs());
      }
    }
    blocks.push_back(std::move(block));
  }
  levels_[level - 1] = std::move(blocks);
}

void Heads::load_tied(const std::vector<std::int32_t>& ids) {
  const Source& lm = engine_.lm_source();
  require(lm.data != nullptr, "the model's weights are not loaded");
  std::vector<std::int32_t> chosen = ids;
  if (chosen.empty())
    for (int i = 0; i < lm.rows; i++) chosen.push_back(i);
  std::vector<OutputRow> rows((chosen.size() + kLanes - 1) / kLanes * kLanes);
  for (std::size_t i = 0; i < chosen.size(); i++) {
    require(chosen[i] >= 0 && chosen[i] < lm.rows, "a draft token is outside the vocabulary");
    rows[i] = {&lm, chosen[i]};
  }
  std::lock_guard lock(engine_.mutex());
  lm_heads_.clear();
  lm_heads_.push_back(pack(engine_.pool(), arena_, config_.format, rows, {}, "heads: the LM head"));
  rows_ = int(chosen.size());
  ids_ = std::move(chosen);
}

void Heads::load_own(const std::vector<Source>& matrices, const std::vector<std::int32_t>& ids) {
  require(int(matrices.size()) == config_.levels, "each level needs an LM head");
  std::lock_guard lock(engine_.mutex());
  std::vector<Linear> packed;
  for (const Source& matrix : matrices) {
    check_shape(matrix, matrices[0].rows, hidden_size(), "an LM head");
    packed.push_back(pack(engine_.pool(), arena_, config_.format, rows_of(matrix), {}, "heads: an LM head"));
  }
  require(ids.empty() || int(ids.size()) == matrices[0].rows, "the draft vocabulary and the LM heads differ in size");
  lm_heads_ = std::move(packed);
  rows_ = matrices[0].rows;
  ids_ = ids;
  for (int i = int(ids_.size()); i < rows_; i++) ids_.push_back(i);
}

int Heads::node_size(int level) const {
  switch (config_.kind) {
    case HeadsKind::residual: return 0;
    case HeadsKind::recurrent: return hidden_size();
    default: return hidden_size() * level;
  }
}

void Heads::fit(int rows, std::size_t widest) {
  std::size_t inner = 0, lm = std::size_t(rows_) + kLanes;
  for (const auto& blocks : levels_)
    for (const Block& block : blocks) {
      inner = std::max(inner, std::size_t(block.first.outputs()));
      widest = std::max(widest, std::size_t(block.first.inputs));
    }
  const std::size_t room = sizeof(float) * rows;
  input_.fit(room * widest);
  hidden_.fit(room * hidden_size());
  inner_.fit(room * inner);
  logits_.fit(room * lm);
  panel_.fit(room * kMaxPanel * kLanes * engine_.pool().threads());
}

template <typename Work>
void Heads::run(Work work) {
  for (Phase& phase : phases_) phase.reset();
  engine_.pool().run(work);
}

void Heads::apply(const Block& block, const float* x, int width, int count, float* hidden) {
  const Kernels& kernels = engine_.kernels();
  const int size = hidden_size(), inner = block.first.outputs() / 2;
  activation_.shape(kernels, block.first.format, block.first.inputs);
  activation_.fit(count);
  if (block.gated) {
    between_.shape(kernels, block.down.format, block.down.inputs);
    between_.fit(count);
  }
  run([&](int thread) {
    float* panel = panel_.as<float>() + std::size_t(count) * kMaxPanel * kLanes * thread;
    phases_[0].run(thread, count, 1, 1,
                   [&](int t, int) { activation_.set(kernels, t, x + std::size_t(t) * width, width); });
    const auto add = added_to(hidden, size);
    if (!block.gated) {
      multiply(kernels, block.first, activation_.view(), count, 1, thread, phases_[1], panel, nullptr,
               [&](int t, int first, int n, float* y) {
                 kernels.silu(y, n, y);
                 add(t, first, n, y);
               });
      return;
    }
    float* between = inner_.as<float>();
    multiply(kernels, block.first, activation_.view(), count, 2, thread, phases_[1], panel, nullptr,
             gated_to(kernels, Gate::silu, between, inner));
    phases_[2].run(thread, count, 1, 1, [&](int t, int) {
      between_.set(kernels, t, between + std::size_t(t) * inner, std::min(inner, block.down.inputs));
    });
    multiply(kernels, block.down, between_.view(), count, 1, thread, phases_[3], panel, nullptr, add);
  });
}

void Heads::begin(const float* features, int batch, float* base) {
  std::lock_guard lock(engine_.mutex());
  const int size = hidden_size(), wide = size * config_.features;
  if (!projects_) {
    for (int b = 0; b < batch; b++)  // the final hidden state
      std::memcpy(base + std::size_t(b) * size, features + std::size_t(b + 1) * wide - size, size * sizeof(float));
    return;
  }
  fit(batch, std::size_t(wide));
  const Kernels& kernels = engine_.kernels();
  float* input = input_.as<float>();
  for (int b = 0; b < batch; b++)
    for (int f = 0; f < config_.features; f++) {
      const float* x = features + std::size_t(b) * wide + f * size;
      float* y = input + std::size_t(b) * wide + f * size;
      // The final hidden state is normalised by the model already.
      if (f + 1 < config_.features) kernels.rms_norm(x, nullptr, 1.1920929e-7f, size, y);
      else std::memcpy(y, x, size * sizeof(float));
    }
  activation_.shape(kernels, projection_.format, projection_.inputs);
  activation_.fit(batch);
  for (int b = 0; b < batch; b++) activation_.set(kernels, b, input + std::size_t(b) * wide, wide);
  run([&](int thread) {
    float* panel = panel_.as<float>() + std::size_t(batch) * kMaxPanel * kLanes * thread;
    multiply(kernels, projection_, activation_.view(), batch, 1, thread, phases_[0], panel, nullptr,
             copied_to(base, size));
  });
}

void Heads::check(int level, int count) const {
  require(level >= 1 && level <= config_.levels, "there is no such level");
  require(!lm_heads_.empty() && !levels_[std::min(level, int(levels_.size())) - 1].empty() && engine_.embedding().data,
          "weights are missing");
  require(count >= 1 && count <= rows_, "more guesses are wanted than there are");
}

void Heads::level(int level, const float* base, const float* nodes, int above, const std::int32_t* parents,
                  const std::int32_t* tokens, int batch, int width, int count, float* log_p, std::int32_t* ids,
                  float* next, const Tilt* tilt) {
  std::lock_guard lock(engine_.mutex());
  check(level, count);
  const HeadsKind kind = config_.kind;
  const int size = hidden_size(), per_text = kind == HeadsKind::residual ? 1 : width, rows = batch * per_text;
  const int before = level == 1 && kind == HeadsKind::recurrent ? size : node_size(level - 1), after = node_size(level);
  for (int i = 0; kind != HeadsKind::residual && i < batch * width; i++) {
    require(parents[i] >= 0 && parents[i] < above, "a node has a parent that is not there");
    require(tokens[i] >= 0 && tokens[i] < engine_.config().vocab_size, "a token is outside the vocabulary");
  }
  fit(rows, std::size_t(size) * (2 + level));
  float* input = input_.as<float>();
  float* hidden = hidden_.as<float>();
  int wide = size;
  for (int r = 0; r < rows; r++) {
    const int b = r / per_text;
    const float* start = base + std::size_t(b) * size;
    if (kind == HeadsKind::residual) {
      std::memcpy(hidden + std::size_t(r) * size, start, size * sizeof(float));
      std::memcpy(input + std::size_t(r) * size, start, size * sizeof(float));
      continue;
    }
    const float* from = nodes + (std::size_t(b) * above + parents[r]) * before;
    if (kind == HeadsKind::recurrent) {
      wide = 3 * size;
      float* x = input + std::size_t(r) * wide;
      std::memcpy(x, from, size * sizeof(float));
      std::memcpy(x + size, start, size * sizeof(float));
      engine_.embedding().row(tokens[r], x + 2 * size);
      std::memcpy(hidden + std::size_t(r) * size, from, size * sizeof(float));
    } else {
      wide = (1 + level) * size;
      float* x = input + std::size_t(r) * wide;
      std::memcpy(x, start, size * sizeof(float));
      if (before) std::memcpy(x + size, from, before * sizeof(float));  // at level 1 there may be no table
      engine_.embedding().row(tokens[r], x + size + before);
      std::memcpy(next + std::size_t(r) * after, x + size, after * sizeof(float));
      std::memcpy(hidden + std::size_t(r) * size, start, size * sizeof(float));
    }
  }
  const auto& blocks = levels_[std::min(level, int(levels_.size())) - 1];
  for (std::size_t i = 0; i < blocks.size(); i++) {
    if (i) std::memcpy(input, hidden, sizeof(float) * size * rows);
    apply(blocks[i], input, i ? size : wide, rows, hidden);
  }
  if (kind == HeadsKind::recurrent) std::memcpy(next, hidden, sizeof(float) * size * rows);

  const Linear& lm = lm_heads_.size() == 1 ? lm_heads_[0] : lm_heads_[level - 1];
  const Kernels& kernels = engine_.kernels();
  activation_.shape(kernels, lm.format, lm.inputs);
  activation_.fit(rows);
  float* logits = logits_.as<float>();
  const std::size_t stride = lm.outputs();
  run([&](int thread) {
    float* panel = panel_.as<float>() + std::size_t(rows) * kMaxPanel * kLanes * thread;
    phases_[0].run(thread, rows, 1, 1,
                   [&](int r, int) { activation_.set(kernels, r, hidden + std::size_t(r) * size, size); });
    multiply(kernels, lm, activation_.view(), rows, 1, thread, phases_[1], panel, nullptr,
             copied_to(logits, int(stride)));
    phases_[2].run(thread, rows, 1, 1, [&](int r, int) {
      float total;
      float* row_log_p = log_p + std::size_t(r) * count;
      std::int32_t* row_ids = ids + std::size_t(r) * count;
      if (tilt && tilt[r / per_text].noise) {
        const auto [factor, noise] = tilt[r / per_text];
        float* row = logits + r * stride;
        for (int i = 0; i < rows_; i++) row[i] = row[i] * factor + noise[i];
      }
      kernels.top_k(logits + r * stride, rows_, count, row_log_p, row_ids, &total);
      for (int i = 0; i < count; i++) {
        row_log_p[i] -= total;
        row_ids[i] = ids_[row_ids[i]];
      }
    });
  });
}

}  // namespace medusa
