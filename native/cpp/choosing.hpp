// Acceptance: which path of a verified tree is kept, and which token comes after it, by the logits of the engine's last
// pass. The rules are described with their twin in Python, which is the reference: `medusa.decoding.accept` and
// `sampling`.
#pragma once

#include <cstdint>
#include <vector>

#include "engine.hpp"

namespace medusa {

struct Rule {
  bool typical = false;   // else exact
  float temperature = 0;  // 0: greedy
  int top_k = 0;          // 0: all
  double top_p = 1, min_p = 0;
  std::uint64_t seed = 0;
  double epsilon = 0, delta = 0;
  float penalty = 1;  // of repetition
};

struct Choice {
  std::vector<std::int32_t> path;  // accepted nodes, the root first
  std::int32_t next = 0;
};

struct Verified {  // one tree of the last `verify`
  const std::vector<std::int32_t>* text;  // the root is its last token
  const Rule* rule;
  const std::int32_t *tokens, *parents;
  int nodes;
};

// Row b of the last pass belongs to trees[b]; where `rule` is null, the choice is left empty. Rows are shared out among
// the engine's threads where that pays.
// Throws std::invalid_argument where a tree is not one, or logits that are looked at are no numbers.
std::vector<Choice> choose(Engine& engine, const std::vector<Verified>& trees);

// The noise of exact sampling for tokens, to a few thousandths, times `scale`: `medusa.decoding.sampling.rough_noise`.
void rough_noise(const Rule& rule, std::uint64_t position, const std::vector<std::int32_t>& tokens, float scale,
                 float* out);

// One token from scores [n] by the rule (not typical), as `medusa.decoding.sampling.sample` draws it.
int sample(Engine& engine, const float* logits, int n, const Rule& rule, std::uint64_t position);

}  // namespace medusa
