#include "drafting.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <stdexcept>

namespace medusa {
namespace {

struct Share {
  std::vector<int> nodes;
  std::vector<double> tokens;
  double seconds = 0, rate = 0;
};

// What a pass over so many tokens takes after texts of these lengths, see `PassTimes.after`.
class Clock {
 public:
  Clock(const Times& times, const std::vector<Drafting::Row>& rows) : times_(times) {
    double total = 0;
    for (const auto& row : rows) total += row.text->size() - 1;
    fixed_ = times.row * std::max(0.0, total - times.context);
    each_ = times.node * std::max(0.0, total / double(rows.size()) - times.context);
  }
  double operator()(int tokens) const { return times_.at(tokens) + fixed_ + each_ * tokens; }

 private:
  const Times& times_;
  double fixed_, each_;
};

struct Candidate {  // a node that could come in next
  double probability;
  int row, node;
};
// Of a heap whose top is the likeliest, and of equals the first.
bool later(const Candidate& a, const Candidate& b) {
  if (a.probability != b.probability) return a.probability < b.probability;
  return a.row != b.row ? a.row > b.row : a.node > b.node;
}

// Nodes of drafts, likeliest first, parents before children. visit(row, node) says whether there should be more.
template <typename Visit>
void by_worth(const Draft* drafts, int count, int first, Visit visit) {
  std::vector<Candidate> heap;
  const auto push_children = [&](int row, int node) {
    const Draft& draft = drafts[row];
    for (int i = node + 1; i < draft.size(); i++)
      if (draft.parents[i] == node) {
        heap.push_back({draft.probabilities[i], row, i});
        std::push_heap(heap.begin(), heap.end(), later);
      }
  };
  for (int row = 0; row < count; row++)
    if (first == 0) heap.push_back({drafts[row].probabilities[0], row, 0});
    else push_children(row, 0);
  while (!heap.empty()) {
    std::pop_heap(heap.begin(), heap.end(), later);
    const Candidate next = heap.back();
    heap.pop_back();
    if (!visit(next.row, next.node)) return;
    push_children(next.row, next.node);
  }
}

Share share(const std::vector<Draft>& drafts, double draft_seconds, const Clock& clock) {
  const int rows = int(drafts.size());
  Share best{std::vector<int>(rows, 1), std::vector<double>(rows, 1.0), clock(rows) + draft_seconds, 0};
  std::vector<int> counts = best.nodes;
  std::vector<double> tokens = best.tokens;
  int total = rows;
  double expected = rows;
  best.rate = expected / best.seconds;
  by_worth(drafts.data(), rows, 1, [&](int row, int node) {
    const double p = drafts[row].probabilities[node];
    counts[row]++;
    tokens[row] += p;
    expected += p;
    const double seconds = clock(++total) + draft_seconds;
    if (expected > best.rate * seconds) best = {counts, tokens, seconds, expected / seconds};
    return true;
  });
  return best;
}

// The rate of a share as `budget.Share` has it: by its own sums.
double rate_of(const Share& share) {
  double tokens = 0;
  for (double t : share.tokens) tokens += t;
  return tokens / share.seconds;
}

}  // namespace

void Draft::add(std::int32_t token, int parent, double probability, Proposer proposer) {
  tokens.push_back(token);
  parents.push_back(parent);
  probabilities.push_back(probability);
  proposers.push_back(proposer);
}

int Draft::child(int node, std::int32_t token) const {
  for (int i = node + 1; i < size(); i++)
    if (parents[i] == node && tokens[i] == token) return i;
  return -1;
}

Draft merge(const Draft& first, const Draft& second) {
  Draft all(first.tokens[0]);
  std::vector<double> best{1.0};  // of whoever is surest
  for (const Draft* draft : {&first, &second}) {
    std::vector<int> place(draft->size(), 0);
    for (int node = 1; node < draft->size(); node++) {
      const int parent = place[draft->parents[node]];
      const double p = draft->probabilities[node];
      int at = all.child(parent, draft->tokens[node]);
      if (at < 0) {
        at = all.size();
        all.add(draft->tokens[node], parent, p, draft->proposers[node]);
        best.push_back(p);
      } else {
        all.probabilities[at] += p * (1 - all.probabilities[at]);
        if (p > best[at]) {
          best[at] = p;
          all.proposers[at] = draft->proposers[node];
        }
      }
      place[node] = at;
    }
  }
  return all;
}

Draft pruned(Draft draft, int nodes, int depth) {
  std::vector<int> depths(draft.size(), 0);
  for (int i = 1; i < draft.size(); i++) depths[i] = depths[draft.parents[i]] + 1;
  if (draft.size() <= nodes && *std::max_element(depths.begin(), depths.end()) <= depth) return draft;
  Draft shallow = draft;
  for (int i = 0; i < draft.size(); i++)
    if (depths[i] > depth) shallow.probabilities[i] = -1;
  std::vector<int> kept;
  if (nodes > 0)
    by_worth(&shallow, 1, 0, [&](int, int node) {
      kept.push_back(node);
      return int(kept.size()) < nodes;
    });
  std::sort(kept.begin(), kept.end());
  Draft found(draft.tokens[0]);
  std::vector<int> place(draft.size(), 0);
  for (int node : kept)
    if (node > 0 && depths[node] <= depth) {
      place[node] = found.size();
      found.add(draft.tokens[node], place[draft.parents[node]], draft.probabilities[node], draft.proposers[node]);
    }
  return found;
}

double Times::at(int tokens) const {
  const int known = int(seconds.size());
  if (tokens <= known) return seconds[tokens - 1];
  const double last = seconds[known - 1], before = seconds[known - 2];
  return last + (tokens - known) * (last - before);
}

std::size_t Text::Hash::operator()(const Key& key) const {
  std::uint64_t h = 0;
  for (std::int32_t token : key.tokens) h = (h ^ std::uint32_t(token)) * 0x9e3779b97f4a7c15ull, h ^= h >> 29;
  return std::size_t(h);
}

bool Text::Asking::due() {
  if (waiting) {
    waiting--;
    return false;
  }
  return true;
}

void Text::Asking::learn(double gained) {
  gain = std::max(0.9 * gain + gained, -1.0);
  if (gain >= 0) pause = 0;
  else pause = gained > 0 ? 4 : std::min(pause ? 2 * pause : 4, 32);
  waiting = pause;
}

Drafting::Drafting(Heads* heads, DraftingConfig config) : heads_(heads), config_(std::move(config)) {
  const bool sound = config_.chain == 0 || (config_.chain > 0 && config_.prior.size() == Text::kOrders);
  if (!sound) throw std::invalid_argument("drafting: the configuration does not fit");
  for (const auto& places : config_.prior)
    if (places.empty()) throw std::invalid_argument("drafting: a prior is empty");
}

// --- n-grams ----------------------------------------------------------------------------------------------------------

double Drafting::estimate(const Text& text, int order, int place) const {
  const auto& prior = config_.prior[order - 1];
  const int cell = std::min(place, int(prior.size()) - 1);
  const auto at = [cell](const std::vector<double>& counts) { return cell < int(counts.size()) ? counts[cell] : 0.0; };
  const double right = at(text.right_[order - 1]) + config_.ngram_weight * prior[cell];
  return right / (at(text.tried_[order - 1]) + config_.ngram_weight);
}

void Drafting::learn_chain(Text& text) const {
  if (!text.chain_.empty()) {
    auto& right = text.right_[text.order_ - 1];
    auto& tried = text.tried_[text.order_ - 1];
    const int cells = int(config_.prior[text.order_ - 1].size());
    right.resize(cells, 0.0);
    tried.resize(cells, 0.0);
    for (int i = 0; i < int(text.chain_.size()) && text.chain_start_ + i < text.size(); i++) {
      const int cell = std::min(i, cells - 1);
      const bool hit = text.chain_[i] == text.tokens_[text.chain_start_ + i];
      tried[cell] = config_.ngram_fade * tried[cell] + 1.0;
      right[cell] = config_.ngram_fade * right[cell] + double(hit);
      if (!hit) break;
    }
  }
  text.chain_.clear();
}

Draft Drafting::chain(Text& text, int length) const {
  learn_chain(text);
  const auto& tokens = text.tokens_;
  const int size = text.size();
  const auto key = [&](int end, int n) {  // the n tokens before `end`
    Text::Key found{{-1, -1, -1}};
    for (int i = 0; i < n; i++) found.tokens[i] = tokens[end - n + i];
    return found;
  };
  for (int end = std::max(1, text.indexed_); end < size; end++)
    for (int n = Text::kOrders; n >= 1; n--)
      if (end >= n) text.last_[key(end, n)] = end;
  text.indexed_ = size;
  Draft draft(tokens.back());
  for (int n = Text::kOrders; n >= 1; n--) {
    if (size <= n) continue;
    const auto found = text.last_.find(key(size, n));
    if (found == text.last_.end()) continue;
    // Past the end of the text the chain goes on with itself.
    const int at = found->second;
    double sure = 1;
    for (int i = 0; i < length; i++) {
      text.chain_.push_back(at + i < size ? tokens[at + i] : text.chain_[at + i - size]);
      sure *= estimate(text, n, i);
      draft.add(text.chain_.back(), i, sure, Proposer::ngram);
    }
    text.chain_start_ = size;
    text.order_ = n;
    break;
  }
  return draft;
}

// --- heads ------------------------------------------------------------------------------------------------------------

void Drafting::learn(Text& text) const {
  if (!text.drafted_.empty()) {
    const Draft& draft = text.drafted_[0];
    int node = 0;
    for (int i = text.drafted_start_; i < text.size(); i++) {
      double mass = 0;
      for (int j = node + 1; j < draft.size(); j++)
        if (draft.parents[j] == node) mass += draft.probabilities[j];
      if (!(draft.probabilities[node] > 0) || !(mass > 0)) break;
      text.heads_right_ *= config_.heads_fade;
      text.heads_expected_ = config_.heads_fade * text.heads_expected_ + mass / draft.probabilities[node] / text.ratio_;
      const int child = draft.child(node, text.tokens_[i]);
      if (child < 0) break;
      text.heads_right_ += 1;
      node = child;
    }
  }
  text.drafted_.clear();
  text.drafted_start_ = text.size();
  text.ratio_ = (text.heads_right_ + config_.heads_weight) / (text.heads_expected_ + config_.heads_weight);
}

const float* Drafting::noise(Text& text, const Rule& rule, int position) const {
  auto& kept = text.noise_;
  const auto passed = [&](const Text::Noise& n) { return n.position < text.size(); };
  kept.erase(std::remove_if(kept.begin(), kept.end(), passed), kept.end());
  for (const Text::Noise& n : kept)
    if (n.position == position) return n.values.data();
  kept.push_back({position, std::vector<float>(heads_->ids().size())});
  rough_noise(rule, position, heads_->ids(), config_.sureness, kept.back().values.data());
  return kept.back().values.data();
}

std::vector<Draft> Drafting::grow(const std::vector<Row>& rows, int nodes, double floor) {
  const int batch = int(rows.size()), size = heads_->hidden_size(), wide = heads_->feature_size();
  const int branch = std::min({nodes - 1, 10, heads_->rows()});
  const std::size_t beam = std::max(2, std::min(16, (nodes + 2) / 4));
  const bool recurrent = heads_->kind() == HeadsKind::recurrent, residual = heads_->kind() == HeadsKind::residual;
  struct Growing {
    double shift;
    std::vector<std::int32_t> tokens;
    std::vector<int> parents, tips, places;
    std::vector<double> scores;
  };
  std::vector<Growing> trees;
  const double lowest = floor > 0 ? std::log(floor) : -std::numeric_limits<double>::infinity();
  features_.resize(std::size_t(batch) * wide);
  for (int b = 0; b < batch; b++) {
    Text& text = *rows[b].text;
    learn(text);
    trees.push_back({std::log(text.ratio_), {text.tokens_.back()}, {-1}, {0}, {0}, {0.0}});
    std::memcpy(features_.data() + std::size_t(b) * wide, text.features_.data(), sizeof(float) * wide);
  }
  base_.resize(std::size_t(batch) * size);
  heads_->begin(features_.data(), batch, base_.data());
  nodes_ = recurrent ? base_ : std::vector<float>();
  int above = 1;
  std::vector<double> ranked;
  std::vector<int> order;
  for (int level = 1; level <= heads_->levels(); level++) {
    const int width = int(trees[0].tips.size()), lists = residual ? 1 : width;
    parents_.clear();
    tokens_.clear();
    for (const Growing& tree : trees) {
      parents_.insert(parents_.end(), tree.places.begin(), tree.places.end());
      for (int tip : tree.tips) tokens_.push_back(tree.tokens[tip]);
    }
    log_p_.resize(std::size_t(batch) * lists * branch);
    ids_.resize(log_p_.size());
    next_.resize(std::size_t(batch) * width * heads_->node_size(level));
    std::vector<Heads::Tilt> tilt(batch);
    for (int b = 0; b < batch; b++) {
      const Rule* rule = rows[b].rule;
      if (rule->temperature > 0 && !rule->typical)
        tilt[b] = {config_.sureness / rule->temperature, noise(*rows[b].text, *rule, rows[b].text->size() + level - 1)};
    }
    heads_->level(level, base_.data(), nodes_.data(), above, parents_.data(), tokens_.data(), batch, width, branch,
                  log_p_.data(), ids_.data(), next_.data(), tilt.data());
    bool settled = true;
    for (int b = 0; b < batch; b++) {
      Growing& tree = trees[b];
      const int first = int(tree.tokens.size());
      for (int i = 0; i < width; i++) {
        const std::size_t list = (std::size_t(b) * lists + (residual ? 0 : i)) * branch;
        const double score = tree.scores[tree.tips[i]];
        for (int j = 0; j < branch; j++) {
          tree.tokens.push_back(ids_[list + j]);
          tree.parents.push_back(tree.tips[i]);
          tree.scores.push_back(score + std::min(double(log_p_[list + j]) + tree.shift, 0.0));
        }
      }
      order.resize(tree.tokens.size() - first);
      for (std::size_t i = 0; i < order.size(); i++) order[i] = first + int(i);
      const std::size_t count = std::min(beam, order.size());
      const auto better = [&](int i, int j) {
        return tree.scores[i] != tree.scores[j] ? tree.scores[i] > tree.scores[j] : i < j;
      };
      std::partial_sort(order.begin(), order.begin() + count, order.end(), better);
      tree.tips.assign(order.begin(), order.begin() + count);
      tree.places.clear();
      for (int tip : tree.tips) tree.places.push_back((tip - first) / branch);
      // No deeper node is worth a level: none can be among the best, or every tip is too unlikely.
      const double best = tree.scores[tree.tips[0]];
      if (best < lowest) continue;
      bool full = int(tree.scores.size()) >= nodes;
      if (full) {
        ranked = tree.scores;
        std::nth_element(ranked.begin(), ranked.begin() + (nodes - 1), ranked.end(), std::greater<double>());
        full = ranked[nodes - 1] > best;
      }
      settled = settled && full;
    }
    if (settled) break;
    std::swap(nodes_, next_);
    above = width;
  }
  std::vector<Draft> drafts;
  for (int b = 0; b < batch; b++) {
    const Growing& tree = trees[b];
    Draft draft(tree.tokens[0]);
    for (std::size_t i = 1; i < tree.tokens.size(); i++)
      draft.add(tree.tokens[i], tree.parents[i], std::exp(tree.scores[i]), Proposer::heads);
    const int all = draft.size();
    drafts.push_back(pruned(std::move(draft), nodes, all));
    rows[b].text->drafted_.assign(1, drafts.back());
  }
  return drafts;
}

// --- both -------------------------------------------------------------------------------------------------------------

Draft Drafting::joined(const Row& row, Draft of_heads, const Draft& of_ngrams, int nodes) const {
  if (config_.chain) of_heads = heads_ ? pruned(merge(of_heads, of_ngrams), nodes, nodes) : of_ngrams;
  return pruned(std::move(of_heads), nodes, row.room);
}

Drafting::Proposed Drafting::propose(const std::vector<Row>& rows, int nodes, const Times* times) {
  Proposed found;
  if (rows.empty()) return found;
  for (const Row& row : rows) {
    if (!row.text || !row.rule || row.text->tokens_.empty() || row.room < 0)
      throw std::invalid_argument("drafting: a row has no text, no rule or no room");
    if (heads_ && row.text->features_.size() != std::size_t(heads_->feature_size()))
      throw std::invalid_argument("drafting: the features have the wrong shape");
    found.drafts.emplace_back(row.text->tokens_.back());
  }
  static const Times none;
  const Clock clock(times ? *times : none, rows);
  const int batch = int(rows.size());
  if (times) {
    nodes = times->most;
    if (batch * (clock(batch + 1) - clock(batch)) / clock(batch) > config_.highest_bar) return found;
  }
  if (nodes < 1) throw std::invalid_argument("drafting: a tree has at least one node");
  std::vector<Draft> chains;
  for (const Row& row : rows)
    chains.push_back(config_.chain ? chain(*row.text, std::min(config_.chain, nodes - 1))
                                   : Draft(row.text->tokens_.back()));
  const auto ask = [&](const std::vector<int>& asked, const std::vector<Row>& those, double floor) {
    std::vector<Draft> grown = grow(those, nodes, floor);
    for (std::size_t i = 0; i < asked.size(); i++) {
      const int b = asked[i];
      found.drafts[b] = joined(rows[b], std::move(grown[i]), chains[b], nodes);
    }
  };
  for (int b = 0; b < batch; b++) found.drafts[b] = joined(rows[b], std::move(found.drafts[b]), chains[b], nodes);
  if (!times || !heads_ || !times->draft) {
    if (heads_ && nodes >= 2) {
      std::vector<int> everyone(batch);
      for (int b = 0; b < batch; b++) everyone[b] = b;
      ask(everyone, rows, 0.0);
    }
    if (times) {
      const Share all = share(found.drafts, 0.0, clock);
      for (int b = 0; b < batch; b++)
        found.drafts[b] = pruned(std::move(found.drafts[b]), all.nodes[b], all.nodes[b]);
    }
    return found;
  }
  Share all = share(found.drafts, 0.0, clock);
  std::vector<int> asked;
  std::vector<Text::Asking*> askings;
  for (int b = 0; b < batch; b++) {
    Text& text = *rows[b].text;
    Text::Asking& asking = found.drafts[b].size() > 1 ? text.beside_ : text.alone_;
    if (rows[b].room <= 0 || !asking.due()) continue;
    asked.push_back(b);
    askings.push_back(&asking);
  }
  if (!asked.empty()) {
    const Share without = all;
    found.asked = int(asked.size());
    std::vector<Row> those;
    for (int b : asked) those.push_back(rows[b]);
    const double cost = times->draft_of(found.asked), plain = Clock(*times, those)(found.asked);
    // Of the tokens after a node the next level guesses half or so; it must be worth its share of the draft.
    const double floor = 2 * (config_.usual_tokens * cost / plain) / heads_->levels();
    if (nodes >= 2) ask(asked, those, floor);
    all = share(found.drafts, cost, clock);
    const double price = rate_of(without) * (all.seconds - without.seconds) / double(asked.size());
    for (std::size_t i = 0; i < asked.size(); i++)
      askings[i]->learn(all.tokens[asked[i]] - without.tokens[asked[i]] - price);
  }
  for (int b = 0; b < batch; b++) found.drafts[b] = pruned(std::move(found.drafts[b]), all.nodes[b], all.nodes[b]);
  return found;
}

}  // namespace medusa
