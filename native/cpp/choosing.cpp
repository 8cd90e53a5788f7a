#include "choosing.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <exception>
#include <functional>
#include <stdexcept>

namespace medusa {
namespace {

constexpr int kStretch = 2048;      // tokens whose noise a thread draws in one go
constexpr double kShared = 300000;  // what takes longer than to start the threads
constexpr const char* kNoNumbers = "the model's numbers are not finite here: its weights or this prompt are at fault";

// --- noise: Philox 4x64-10 (Salmon et al. 2011), as numpy numbers its words ---------------------------------------------

struct Block {
  std::uint64_t words[4];
};

Block philox(std::uint64_t seed, std::uint64_t position, std::uint64_t index) {
  std::uint64_t key0 = seed, key1 = position, c0 = index + 1, c1 = 0, c2 = 0, c3 = 0;  // numpy begins with counter 1
  for (int round = 0; round < 10; round++) {
    const unsigned __int128 a = static_cast<unsigned __int128>(0xD2E7470EE14C6C93ull) * c0;
    const unsigned __int128 b = static_cast<unsigned __int128>(0xCA5A826395121157ull) * c2;
    const std::uint64_t next0 = std::uint64_t(b >> 64) ^ c1 ^ key0, next2 = std::uint64_t(a >> 64) ^ c3 ^ key1;
    c1 = std::uint64_t(b);
    c3 = std::uint64_t(a);
    c0 = next0;
    c2 = next2;
    key0 += 0x9E3779B97F4A7C15ull;
    key1 += 0xBB67AE8584CAA73Bull;
  }
  return {{c0, c1, c2, c3}};
}

double gumbel(std::uint64_t word) {
  const double uniform = (double(word >> 12) + 0.5) * 0x1p-52;
  return -std::log(-std::log(uniform));
}

double noise(const Rule& rule, std::uint64_t position, int token) {
  return gumbel(philox(rule.seed, position, std::uint64_t(token) / 4).words[token % 4]);
}

// From the exponent, and log(m) = 2 artanh((m - 1) / (m + 1)) of the fraction.
inline float rough_log(float x) {
  std::int32_t bits;
  std::memcpy(&bits, &x, 4);
  const std::int32_t part = (bits & 0x7FFFFF) | 0x3F800000;
  float fraction;
  std::memcpy(&fraction, &part, 4);
  const float t = (fraction - 1.0f) / (fraction + 1.0f), s = t * t;
  const float series = 1.0f + s * (float(1.0 / 3) + s * (0.2f + s * float(1.0 / 7)));
  return float((bits >> 23) - 127) * 0.69314718055994530942f + (t + t) * series;
}

// --- one row of logits --------------------------------------------------------------------------------------------------

struct Scratch {
  Pool* pool = nullptr;  // whose threads share the noise out; null where they have rows of their own
  std::vector<float> scores, bounds, logits;
  std::vector<std::int32_t> away, ids;
};

// What may be sampled: all of scores [n], or those of `ids`, ascending.
struct Candidates {
  bool all = true;
  const std::int32_t* ids = nullptr;
  int count = 0;
};

int best_of(const Kernels& kernels, const float* x, int n) {
  const int at = kernels.best(x, n);
  if (at < 0) throw std::invalid_argument(kNoNumbers);
  return at;
}

// The `count` greatest of scores [n] and those equal to the last of them at most, in descending order.
std::vector<float> greatest(const Kernels& kernels, const float* x, int n, int count, Scratch& scratch) {
  std::vector<float> found;
  // Dealt to 4 * count piles: at least `count` numbers reach the count-th highest top of a pile, and not many more do.
  const int piles = std::min(round_up(4 * count, kLanes), n / kLanes * kLanes);
  scratch.ids.resize(n);
  int left = n;
  if (count < piles) {
    found.resize(piles);
    kernels.tops(x, n / piles, piles, found.data());
    std::nth_element(found.begin(), found.begin() + (count - 1), found.end(), std::greater<float>());
    left = kernels.at_least(x, n, found[count - 1], scratch.ids.data());
    found.resize(left);
    for (int i = 0; i < left; i++) found[i] = x[scratch.ids[i]];
  } else {
    found.assign(x, x + n);
  }
  std::partial_sort(found.begin(), found.begin() + std::min(count, left), found.end(), std::greater<float>());
  found.resize(std::min(count, left));
  return found;
}

// scratch.scores = logits / temperature, and which of them may be sampled.
Candidates candidates(const Kernels& kernels, const float* logits, int n, const Rule& rule, Scratch& scratch) {
  scratch.scores.resize(n);
  float* scores = scratch.scores.data();
  kernels.divide(logits, n, rule.temperature, scores);
  if (rule.top_k == 0 && rule.top_p == 1 && rule.min_p == 0) return {};
  const int top = best_of(kernels, scores, n);
  std::vector<float> best;
  int kept = 0;
  for (int count : {512, 4096, n}) {
    if (rule.top_k) count = rule.top_k;
    count = std::min(count, n);
    best = greatest(kernels, scores, n, count, scratch);
    double total = 0, unused, better = 0;
    if (rule.top_p < 1) {
      if (rule.top_k)
        for (float s : best) total += std::exp(double(s) - double(best[0]));
      else
        kernels.weigh(scores, n, scores[top], &total, &unused);
    }
    for (kept = 0; kept < int(best.size()); kept++) {
      const double weight = std::exp(double(best[kept]) - double(best[0]));
      better += weight;  // less this weight: the mass of all better tokens
      if (kept && !(weight >= rule.min_p && (rule.top_p == 1 || better - weight < rule.top_p * total))) break;
    }
    if (kept < int(best.size()) || rule.top_k || count == n) break;  // what is dropped stays dropped further down
  }
  const float lowest = best[kept - 1];
  scratch.ids.resize(n);
  int count = kernels.at_least(scores, n, lowest, scratch.ids.data());
  for (int i = count - 1; count > kept && i >= 0; i--)  // of the equals of the last, the first stay
    if (scores[scratch.ids[i]] == lowest) {
      scratch.ids.erase(scratch.ids.begin() + i);
      count--;
    }
  return {false, scratch.ids.data(), count};
}

// argmax of scores + noise, the first of equals.
int winner(const Kernels& kernels, const Candidates& among, int n, const Rule& rule, std::uint64_t position,
           Scratch& scratch) {
  const float* scores = scratch.scores.data();
  const std::int32_t* ids = among.ids;
  int count = among.count;
  if (among.all) {
    // Of a large vocabulary an upper bound of the noise is enough: only who could win by it is looked at.
    scratch.away.resize(round_up(n, kStretch));
    std::atomic<int> taken{0};
    const auto draw = [&](int) {
      for (int first; (first = taken.fetch_add(kStretch)) < n;)
        for (int i = first; i < first + kStretch; i += 4) {
          const Block block = philox(rule.seed, position, std::uint64_t(i) / 4);
          for (int j = 0; j < 4; j++) scratch.away[i + j] = std::int32_t(~block.words[j] >> 40);
        }
    };
    if (scratch.pool && n > 4 * kStretch) scratch.pool->run(draw);
    else draw(0);
    scratch.bounds.resize(n);
    kernels.noise_bounds(scores, scratch.away.data(), n, scratch.bounds.data());
    const int leader = best_of(kernels, scratch.bounds.data(), n);
    scratch.ids.resize(n);
    count = kernels.at_least(scratch.bounds.data(), n, float(scores[leader] + noise(rule, position, leader)),
                             scratch.ids.data());
    ids = scratch.ids.data();
  }
  int best = ids[0];
  double most = 0;
  for (int i = 0; i < count; i++) {
    const double value = double(scores[ids[i]]) + noise(rule, position, ids[i]);
    if (value != value) throw std::invalid_argument(kNoNumbers);
    if (i == 0 || value > most) {
      most = value;
      best = ids[i];
    }
  }
  return best;
}

int sample(const Kernels& kernels, const float* logits, int n, const Rule& rule, std::uint64_t position,
           Scratch& scratch) {
  const Candidates among = candidates(kernels, logits, n, rule, scratch);
  if (!among.all && among.count == 1) return among.ids[0];
  return winner(kernels, among, n, rule, position, scratch);
}

// --- a tree -------------------------------------------------------------------------------------------------------------

class Chooser {
 public:
  // Row i of logits, `stride` apart, is of node i.
  Chooser(const Kernels& kernels, int vocab, const float* logits, std::size_t stride, const Verified& tree, Pool* pool)
      : kernels_(kernels), vocab_(vocab), logits_(logits), stride_(stride), tree_(tree), rule_(*tree.rule) {
    scratch_.pool = pool;
  }

  Choice choose() {
    if (rule_.typical && rule_.temperature > 0) return typical();
    Choice choice{{0}, 0};
    for (;;) {
      const int node = choice.path.back();
      const float* row = of(node);
      // The root is the token at len - 1; what follows a node at depth d is the token at len + d.
      const std::uint64_t position = tree_.text->size() + choice.path.size() - 1;
      choice.next = rule_.temperature > 0 ? sample(kernels_, row, vocab_, rule_, position, scratch_)
                                          : best_of(kernels_, row, vocab_);
      int child = node + 1;
      while (child < tree_.nodes && (tree_.parents[child] != node || tree_.tokens[child] != choice.next)) child++;
      if (child == tree_.nodes) return choice;
      choice.path.push_back(child);
    }
  }

 private:
  // Logits after a node; tokens of the text and of the node's path are penalised.
  const float* of(int node) {
    const float* row = logits_ + stride_ * node;
    if (rule_.penalty == 1) return row;
    scratch_.logits.assign(row, row + vocab_);
    if (seen_.empty()) {
      seen_.assign(vocab_, 0);
      for (std::int32_t token : *tree_.text) seen_[token] = 1;
      for (int i = 0; i < vocab_; i++)
        if (seen_[i]) unique_.push_back(i);
    }
    const auto penalise = [&](std::int32_t token) {
      float& x = scratch_.logits[token];
      x = x < 0 ? x * rule_.penalty : x / rule_.penalty;
    };
    for (std::int32_t token : unique_) penalise(token);
    std::vector<std::int32_t> fresh;
    for (int i = node; i > 0; i = tree_.parents[i])
      if (!seen_[tree_.tokens[i]] && std::find(fresh.begin(), fresh.end(), tree_.tokens[i]) == fresh.end())
        fresh.push_back(tree_.tokens[i]);
    for (std::int32_t token : fresh) penalise(token);
    return scratch_.logits.data();
  }

  // The longest path of children that are likely enough, then the likeliest of them.
  Choice typical() {
    struct Reached {
      int depth = -1;
      double log_p = 0;
    };
    std::vector<Reached> reached(tree_.nodes);
    reached[0].depth = 0;
    for (int node = 0; node < tree_.nodes; node++) {
      if (reached[node].depth < 0) continue;
      if (std::find(tree_.parents + node + 1, tree_.parents + tree_.nodes, node) == tree_.parents + tree_.nodes) continue;
      const Candidates among = candidates(kernels_, of(node), vocab_, rule_, scratch_);
      const float* scores = scratch_.scores.data();
      double total = 0, product = 0, top;
      if (among.all) {
        top = scores[best_of(kernels_, scores, vocab_)];
        kernels_.weigh(scores, vocab_, float(top), &total, &product);
      } else {
        top = scores[among.ids[0]];
        for (int i = 1; i < among.count; i++) top = std::max(top, double(scores[among.ids[i]]));
        for (int i = 0; i < among.count; i++) {
          const double d = double(scores[among.ids[i]]) - top, weight = std::exp(d);
          total += weight;
          if (weight > 0) product += weight * d;
        }
      }
      const double entropy = std::log(total) - product / total;
      const double threshold = std::min(rule_.epsilon, rule_.delta * std::exp(-entropy));
      for (int child = node + 1; child < tree_.nodes; child++) {
        if (tree_.parents[child] != node) continue;
        const std::int32_t token = tree_.tokens[child];
        if (!among.all && !std::binary_search(among.ids, among.ids + among.count, token)) continue;
        const double d = double(scores[token]) - top;
        if (std::exp(d) / total > threshold)
          reached[child] = {reached[node].depth + 1, reached[node].log_p + d - std::log(total)};
      }
    }
    int last = 0;
    for (int node = 1; node < tree_.nodes; node++) {
      const Reached &a = reached[node], &b = reached[last];
      if (a.depth > b.depth || (a.depth == b.depth && a.log_p > b.log_p)) last = node;
    }
    Choice choice;
    for (int node = last; node > 0; node = tree_.parents[node]) choice.path.push_back(node);
    choice.path.push_back(0);
    std::reverse(choice.path.begin(), choice.path.end());
    choice.next = best_of(kernels_, of(last), vocab_);
    return choice;
  }

  const Kernels& kernels_;
  const int vocab_;
  const float* const logits_;
  const std::size_t stride_;
  const Verified& tree_;
  const Rule& rule_;
  Scratch scratch_;
  std::vector<char> seen_;
  std::vector<std::int32_t> unique_;
};

void check(const Verified& tree, int nodes, int vocab) {
  const auto require = [](bool good) {
    if (!good) throw std::invalid_argument("a choice does not fit what was verified last");
  };
  require(tree.nodes >= 1 && tree.nodes <= nodes && tree.text && !tree.text->empty() && tree.parents[0] == -1);
  for (int i = 0; i < tree.nodes; i++) {
    require(tree.tokens[i] >= 0 && tree.tokens[i] < vocab);
    require(i == 0 || (tree.parents[i] >= 0 && tree.parents[i] < i));
  }
  if (tree.rule->penalty != 1)
    for (std::int32_t token : *tree.text) require(token >= 0 && token < vocab);
}

}  // namespace

void rough_noise(const Rule& rule, std::uint64_t position, const std::vector<std::int32_t>& tokens, float scale,
                 float* out) {
  std::vector<std::int32_t> away(tokens.size());
  Block block{};
  std::uint64_t at = ~std::uint64_t(0);
  for (std::size_t i = 0; i < tokens.size(); i++) {
    const std::uint64_t wanted = std::uint64_t(tokens[i]) / 4;
    if (wanted != at) block = philox(rule.seed, position, at = wanted);
    away[i] = std::int32_t(~block.words[tokens[i] % 4] >> 40);
  }
  for (std::size_t i = 0; i < tokens.size(); i++) {
    const float a = (float(away[i]) + 0.5f) * 0x1p-24f;  // 1 - u
    const float near = a + a * a * 0.5f, far = -rough_log(1.0f - a);
    out[i] = scale * -rough_log(a < 0x1p-6f ? near : far);
  }
}

int sample(Engine& engine, const float* logits, int n, const Rule& rule, std::uint64_t position) {
  std::lock_guard lock(engine.mutex());
  Scratch scratch;
  scratch.pool = &engine.pool();
  return sample(engine.kernels(), logits, n, rule, position, scratch);
}

std::vector<Choice> choose(Engine& engine, const std::vector<Verified>& trees) {
  std::lock_guard lock(engine.mutex());
  const int nodes = engine.nodes(), vocab = engine.config().vocab_size;
  if (engine.skipped() || engine.rows() != nodes * int(trees.size()))
    throw std::invalid_argument("a choice does not fit what was verified last");
  for (const Verified& tree : trees)
    if (tree.rule) check(tree, nodes, vocab);
  std::vector<Choice> choices(trees.size());
  std::vector<std::exception_ptr> errors(trees.size());
  const std::size_t stride = engine.logits_stride();
  double effort = 0;  // numbers looked at; noise is work for a dozen of them
  for (const Verified& tree : trees)
    if (tree.rule) effort += tree.rule->temperature > 0 ? 12.0 * vocab : vocab;
  const bool shared = trees.size() > 1 && effort > kShared;
  std::atomic<int> taken{0};
  const auto work = [&](int) {
    for (int b; (b = taken.fetch_add(1)) < int(trees.size());) {
      if (!trees[b].rule) continue;
      try {
        choices[b] = Chooser(engine.kernels(), vocab, engine.logits() + stride * nodes * b, stride, trees[b],
                             shared ? nullptr : &engine.pool())
                         .choose();
      } catch (...) {  // also a lack of memory: nothing may leave a thread of the pool
        errors[b] = std::current_exception();
      }
    }
  };
  if (shared) engine.pool().run(work);
  else work(0);
  for (const std::exception_ptr& error : errors)
    if (error) std::rethrow_exception(error);
  return choices;
}

}  // namespace medusa
