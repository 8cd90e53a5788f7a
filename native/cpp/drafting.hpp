// Drafting for all rows of a step in one call: heads, n-grams, their union, and how many nodes pay. What is computed is
// described with its twin in Python, which is the reference: `medusa.decoding.heads_drafter`, `draft` and `budget`.
#pragma once

#include <cstdint>
#include <limits>
#include <unordered_map>
#include <vector>

#include "choosing.hpp"
#include "heads.hpp"

namespace medusa {

enum class Proposer : std::uint8_t { model, heads, ngram };

// A tree of tokens, the root first, parents before children.
struct Draft {
  std::vector<std::int32_t> tokens, parents;
  std::vector<double> probabilities;  // that the whole path to a node is right
  std::vector<Proposer> proposers;

  explicit Draft(std::int32_t root) { add(root, -1, 1.0, Proposer::model); }
  int size() const { return int(tokens.size()); }
  void add(std::int32_t token, int parent, double probability, Proposer proposer);
  int child(int node, std::int32_t token) const;  // or -1
};

Draft merge(const Draft& first, const Draft& second);
// The best `nodes` nodes no deeper than `depth`.
Draft pruned(Draft draft, int nodes, int depth);

// See `medusa.decoding.times.PassTimes`.
struct Times {
  std::vector<double> seconds;
  double draft = 0, more = 0;  // of a draft for one row, and for one more
  int context = 0;
  double row = 0, node = 0;
  int most = 0;

  double at(int tokens) const;
  double draft_of(int rows) const { return draft + (rows - 1) * more; }
};

struct DraftingConfig {
  double heads_weight = 0, heads_fade = 0;
  float sureness = 0;  // of guesses by noise, see `HeadsDrafter`
  int chain = 0;                           // tokens of the n-gram drafter; 0: there is none
  std::vector<std::vector<double>> prior;  // of n = 1, 2, 3: how often a copied token is right, by its place
  double ngram_weight = 0, ngram_fade = 0;
  double highest_bar = 0, usual_tokens = 0;
};

// One text, and what drafting knows of it.
class Text {
 public:
  void extend(const std::vector<std::int32_t>& tokens) { tokens_.insert(tokens_.end(), tokens.begin(), tokens.end()); }
  const std::vector<std::int32_t>& tokens() const { return tokens_; }
  int size() const { return int(tokens_.size()); }
  // Of the last accepted token: what heads draft by.
  void see(const float* features, std::size_t size) { features_.assign(features, features + size); }

 private:
  friend class Drafting;

  static constexpr int kOrders = 3;
  struct Key {
    std::int32_t tokens[kOrders];
    bool operator==(const Key& other) const {
      return tokens[0] == other.tokens[0] && tokens[1] == other.tokens[1] && tokens[2] == other.tokens[2];
    }
  };
  struct Hash {
    std::size_t operator()(const Key& key) const;
  };
  struct Asking {  // whether heads are worth asking, see `budget.Asking`
    double gain = 0.5;
    int pause = 0, waiting = 0;

    bool due();
    void learn(double gained);
  };

  std::vector<std::int32_t> tokens_;
  std::vector<float> features_;
  // n-grams
  std::unordered_map<Key, int, Hash> last_;  // n-gram -> index of the token after it
  int indexed_ = 0, chain_start_ = 0, order_ = 0;
  std::vector<std::int32_t> chain_;
  std::vector<double> right_[kOrders], tried_[kOrders];  // of n - 1, by place
  // heads
  std::vector<Draft> drafted_;  // the last draft, if it has not been compared yet
  int drafted_start_ = 0;
  double ratio_ = 1, heads_right_ = 0, heads_expected_ = 0;
  Asking alone_, beside_;
  struct Noise {
    int position;
    std::vector<float> values;  // of the tokens that heads propose
  };
  std::vector<Noise> noise_;  // of positions that come next
};

class Drafting {
 public:
  // `heads` may be null and must outlive this. Throws std::invalid_argument for a configuration that does not fit.
  Drafting(Heads* heads, DraftingConfig config);

  struct Row {
    Text* text;
    const Rule* rule;  // by which it will be chosen: exact sampling is drafted for with its noise
    int room;  // how deep a draft may be
  };
  struct Proposed {
    std::vector<Draft> drafts;
    int asked = 0;  // rows for which heads drafted
  };
  // Without `times`, trees of at most `nodes`; with them as many nodes as pay, shared over the rows.
  Proposed propose(const std::vector<Row>& rows, int nodes, const Times* times);

 private:
  std::vector<Draft> grow(const std::vector<Row>& rows, int nodes, double floor);
  const float* noise(Text& text, const Rule& rule, int position) const;
  void learn(Text& text) const;
  Draft chain(Text& text, int length) const;
  void learn_chain(Text& text) const;
  double estimate(const Text& text, int order, int place) const;
  Draft joined(const Row& row, Draft of_heads, const Draft& of_ngrams, int nodes) const;

  Heads* heads_;
  DraftingConfig config_;
  std::vector<float> features_, base_, nodes_, next_, log_p_;
  std::vector<std::int32_t> ids_, parents_, tokens_;
};

}  // namespace medusa
