// Medusa heads on the engine's threads and packed linear layers. What they compute is described with their torch twin,
// `medusa.heads.module.Heads`; they only guess, so their numbers need not be the same to the last bit.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "engine.hpp"
#include "linear.hpp"

namespace medusa {

enum class HeadsKind : std::uint8_t { residual, sequential, recurrent };

struct HeadsConfig {
  HeadsKind kind = HeadsKind::residual;
  int levels = 1;
  int features = 1;  // hidden states read, the final one included
  Format format = Format::bfloat16;
};

// One block: a gated MLP (gate, up, down) or a single layer with SiLU (linear, bias).
struct BlockWeights {
  Source gate, up, down, linear, bias;
};

class Heads {
 public:
  // `engine` must outlive the heads.
  Heads(Engine& engine, const HeadsConfig& config);

  void load_projection(const Source& weight);  // [H, features * H]
  // The layers of one head; a recurrent block is loaded once, as level 1.
  void load_level(int level, const std::vector<BlockWeights>& layers);
  // The rows that the heads propose from: those of the model's LM head (all if `ids` is empty), or a matrix for each
  // level.
  void load_tied(const std::vector<std::int32_t>& ids);
  void load_own(const std::vector<Source>& matrices, const std::vector<std::int32_t>& ids);

  int hidden_size() const { return engine_.config().hidden_size; }
  int feature_size() const { return hidden_size() * config_.features; }
  int rows() const { return rows_; }
  const std::vector<std::int32_t>& ids() const { return ids_; }  // [rows] the token of each row
  HeadsKind kind() const { return config_.kind; }
  int levels() const { return config_.levels; }
  // Floats that a node of `level` carries for its children.
  int node_size(int level) const;

  // Throws std::invalid_argument unless `level` can be asked for `count` tokens.
  void check(int level, int count) const;

  // features [batch, features * H] -> base [batch, H]
  void begin(const float* features, int batch, float* base);

  // The `count` likeliest tokens after each of `width` nodes a text, by the head of `level` (from 1).
  //   base [batch, H]; nodes [batch, above, node_size(level - 1)] of the level above, at level 1 the base itself
  //   parents [batch, width] among the level above; tokens [batch, width]
  //   -> log_p, ids [batch, width (residual: 1), count] and next [batch, width, node_size(level)]
  // With `tilt`, text b's logits are multiplied by tilt[b].factor and tilt[b].noise [rows] is added, if it is not null.
  struct Tilt {
    float factor = 1;
    const float* noise = nullptr;
  };
  void level(int level, const float* base, const float* nodes, int above, const std::int32_t* parents,
             const std::int32_t* tokens, int batch, int width, int count, float* log_p, std::int32_t* ids, float* next,
             const Tilt* tilt = nullptr);

 private:
  struct Block {
    bool gated = false;
    Linear first, down;
  };

  void apply(const Block& block, const float* x, int width, int count, float* hidden);  // hidden += block(x)
  void fit(int rows, std::size_t widest);
  template <typename Work>
  void run(Work work);  // work(thread) on every thread, all phases being new

  Engine& engine_;
  HeadsConfig config_;
  Arena arena_;  // of the packed weights
  Linear projection_;
  bool projects_ = false;
  std::vector<std::vector<Block>> levels_;
  std::vector<Linear> lm_heads_;  // one, or one for each level
  std::vector<std::int32_t> ids_;
  int rows_ = 0;

  Phase phases_[4];
  ActivationBuffer activation_, between_;
  Buffer input_, hidden_, inner_, logits_, panel_;
};

}  // namespace medusa
