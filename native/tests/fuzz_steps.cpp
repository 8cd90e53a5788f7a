// Random steps on tiny random engines: medusa_fuzz_steps [steps=3000] [seed=0 or seed:case] [isa]
//
// A case is an engine with heads and a twin of it. Texts in several slots are drafted for by heads, n-grams or both,
// verified in one pass, chosen from and kept, each by a rule of its own, until they are long enough. Checked are
//   - that a draft is a tree of tokens with falling probabilities, within its nodes and its room;
//   - that a text is the one that the twin decodes plainly, token by token, with another number of threads, whatever was
//     drafted (greedy and exact rules);
//   - that choices which do not fit what was verified are refused.
//
// The first failure is printed with the command that replays it, and the exit code is 1.

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>

#include "choosing.hpp"
#include "cpu.hpp"
#include "drafting.hpp"
#include "random_model.hpp"

namespace {

using Ids = std::vector<std::int32_t>;

unsigned long long seed = 0;
int case_number = 0;
std::string isa;

[[noreturn]] void fail(const std::string& message) {
  std::fprintf(stderr, "medusa_fuzz_steps: FAILED: %s\n  replay: medusa_fuzz_steps 1 %llu:%d %s\n", message.c_str(), seed,
               case_number, isa.c_str());
  std::_Exit(1);
}

void check(bool good, const char* message) {
  if (!good) fail(message);
}

void refuse(const std::function<void()>& call) {
  try {
    call();
  } catch (const std::invalid_argument&) {
    return;
  }
  fail("an invalid call does not throw");
}

class Case {
 public:
  Case(Random random, Format format)
      : random_(random),
        model_(random_model(random_, format)),
        engine_(model_.config, random_.between(1, 3), isa),
        twin_(model_.config, random_.between(1, 3), isa) {
    load(engine_, model_);
    load(twin_, model_);
    if (random_.chance(80)) make_heads();
    DraftingConfig config;
    config.heads_weight = 4;
    config.heads_fade = 0.95;
    config.sureness = 0.8f;
    config.chain = !heads_ || random_.chance(60) ? random_.between(1, 8) : 0;
    config.prior = {{0.2, 0.5}, {0.5, 0.6, 0.7}, {0.7}};
    config.ngram_weight = 4;
    config.ngram_fade = 0.98;
    config.highest_bar = 0.5;
    config.usual_tokens = 2;
    drafting_ = std::make_unique<Drafting>(heads_.get(), config);
    times_.seconds = {1.0, 1.1, 1.2, 1.3, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0};
    times_.draft = random_.pick({0.0, 0.1, 0.5});
    times_.more = times_.draft * random_.pick({0.2, 1.0});
    times_.row = times_.node = 0.001;
    times_.most = random_.between(2, 24);
  }

  int run() {
    std::vector<int> slots;
    for (int slot = 0; slot < model_.config.slots; slot++) {
      const int room = model_.config.max_length - 2, wanted = random_.between(1, 30);
      Row& row = rows_.emplace_back();
      row.slot = slot;
      row.rule = some_rule();
      const int length = std::min(random_.between(2, 20), room - 1);
      for (int i = 0; i < length; i++) row.tokens.push_back(random_.between(0, model_.config.vocab_size - 1));
      row.prompt = length;
      row.most = std::min(length + wanted, room);
      row.text.extend(row.tokens);
      engine_.extend(slot, Ids(row.tokens.begin(), row.tokens.end() - 1), true);
      row.text.see(engine_.features(), std::size_t(engine_.feature_size()));
    }
    int steps = 0;
    for (;;) {
      std::vector<Row*> running;
      for (Row& row : rows_)
        if (int(row.tokens.size()) < row.most) running.push_back(&row);
      if (running.empty()) break;
      step(running);
      steps++;
    }
    for (Row& row : rows_) {
      engine_.release(row.slot);
      if (!row.rule.typical) compare_plainly(row);
    }
    return steps;
  }

 private:
  struct Row {
    int slot = 0, prompt = 0, most = 0;
    Rule rule;
    Ids tokens;
    Text text;
  };

  void make_heads() {
    const Config& c = model_.config;
    HeadsConfig config;
    config.kind = random_.pick({HeadsKind::residual, HeadsKind::sequential, HeadsKind::recurrent});
    config.levels = random_.between(1, 4);
    config.features = 1 + int(c.feature_layers.size());
    config.format = random_.pick({Format::float32, Format::bfloat16, Format::int8, Format::int4});
    heads_ = std::make_unique<Heads>(engine_, config);
    if (config.features > 1)
      heads_->load_projection(model_.store.weight(random_, c.hidden_size, c.hidden_size * config.features));
    for (int level = 1; level <= (config.kind == HeadsKind::recurrent ? 1 : config.levels); level++) {
      int inputs = c.hidden_size;
      if (config.kind == HeadsKind::recurrent) inputs *= 3;
      if (config.kind == HeadsKind::sequential) inputs *= 1 + level;
      BlockWeights w;
      w.linear = model_.store.weight(random_, c.hidden_size, inputs);
      heads_->load_level(level, {w});
    }
    Ids ids;
    for (int i = 0; i < c.vocab_size; i++)
      if (random_.chance(60) || i == 0) ids.push_back(i);
    heads_->load_tied(ids);
  }

  Rule some_rule() {
    Rule rule;
    if (random_.chance(40)) rule.temperature = random_.pick({0.3f, 0.8f, 1.5f});
    rule.typical = rule.temperature > 0 && random_.chance(25);
    if (random_.chance(30)) rule.top_k = random_.between(1, model_.config.vocab_size + 3);
    if (random_.chance(30)) rule.top_p = random_.pick({0.01, 0.5, 0.9});
    if (random_.chance(20)) rule.min_p = random_.pick({0.05, 0.5});
    if (random_.chance(30)) rule.penalty = random_.pick({0.8f, 1.3f});
    rule.seed = random_.next();
    rule.epsilon = 0.1;
    rule.delta = 0.3;
    return rule;
  }

  void step(const std::vector<Row*>& running) {
    std::vector<Drafting::Row> asked;
    for (Row* row : running) asked.push_back({&row->text, &row->rule, row->most - int(row->tokens.size()) - 1});
    const int nodes = random_.pick({1, 2, 5, 16, 40});
    const bool budgeted = random_.chance(50);
    const Drafting::Proposed found = drafting_->propose(asked, nodes, budgeted ? &times_ : nullptr);
    check(found.drafts.size() == running.size(), "there are not as many drafts as texts");
    std::vector<int> slots, sizes;
    Ids tokens, parents;
    for (std::size_t b = 0; b < running.size(); b++) {
      check_draft(found.drafts[b], *running[b], asked[b].room, budgeted ? times_.most : nodes);
      slots.push_back(running[b]->slot);
      sizes.push_back(found.drafts[b].size());
      tokens.insert(tokens.end(), found.drafts[b].tokens.begin(), found.drafts[b].tokens.end());
      parents.insert(parents.end(), found.drafts[b].parents.begin(), found.drafts[b].parents.end());
    }
    engine_.verify(slots, sizes, tokens, parents);
    std::vector<Verified> trees;
    for (std::size_t b = 0; b < running.size(); b++) {
      const Draft& draft = found.drafts[b];
      trees.push_back(
          {&running[b]->text.tokens(), &running[b]->rule, draft.tokens.data(), draft.parents.data(), draft.size()});
    }
    if (random_.chance(10)) spoil(trees);
    const std::vector<Choice> choices = choose(engine_, trees);
    std::vector<std::vector<int>> paths;
    for (std::size_t b = 0; b < running.size(); b++) {
      const Choice& choice = choices[b];
      const Draft& draft = found.drafts[b];
      Row& row = *running[b];
      check(!choice.path.empty() && choice.path[0] == 0, "a path does not begin at the root");
      Ids added;
      for (std::size_t i = 1; i < choice.path.size(); i++) {
        check(draft.parents[choice.path[i]] == choice.path[i - 1], "a path leaves the tree");
        added.push_back(draft.tokens[choice.path[i]]);
      }
      added.push_back(choice.next);
      check(choice.next >= 0 && choice.next < model_.config.vocab_size, "a token is outside the vocabulary");
      row.tokens.insert(row.tokens.end(), added.begin(), added.end());
      row.text.extend(added);
      row.text.see(engine_.features() + std::size_t(engine_.feature_size()) * (engine_.nodes() * b + choice.path.back()),
                   std::size_t(engine_.feature_size()));
      paths.emplace_back(choice.path.begin(), choice.path.end());
    }
    engine_.keep(slots, paths);
    for (std::size_t b = 0; b < running.size(); b++)
      check(engine_.length(slots[b]) == int(running[b]->tokens.size()) - 1, "a slot does not hold its text");
  }

  void check_draft(const Draft& draft, const Row& row, int room, int nodes) {
    check(draft.size() >= 1 && draft.size() <= std::max(1, nodes), "a draft has too many nodes");
    check(draft.tokens[0] == row.tokens.back() && draft.parents[0] == -1, "a draft has another root");
    std::vector<int> depths(draft.size(), 0);
    for (int i = 1; i < draft.size(); i++) {
      const int parent = draft.parents[i];
      check(parent >= 0 && parent < i, "a draft is no tree");
      depths[i] = depths[parent] + 1;
      check(depths[i] <= room, "a draft is deeper than its room");
      check(draft.tokens[i] >= 0 && draft.tokens[i] < model_.config.vocab_size, "a token is outside the vocabulary");
      check(draft.child(parent, draft.tokens[i]) == i, "two children hold one token");
      check(draft.probabilities[i] >= 0 && draft.probabilities[i] <= draft.probabilities[parent] + 1e-9,
            "a probability rises along its path");
      check(draft.proposers[i] != Proposer::model, "the model has drafted");
    }
  }

  void spoil(const std::vector<Verified>& trees) {
    std::vector<Verified> wrong = trees;
    Ids spoilt;
    switch (random_.between(0, 3)) {
      case 0: wrong.pop_back(); break;
      case 1: wrong.push_back(wrong[0]); break;
      case 2: wrong[0].nodes = engine_.nodes() + 1; break;
      default:
        spoilt.assign(wrong[0].tokens, wrong[0].tokens + wrong[0].nodes);
        spoilt[random_.between(0, wrong[0].nodes - 1)] = random_.pick({-1, model_.config.vocab_size});
        wrong[0].tokens = spoilt.data();
    }
    refuse([&] { choose(engine_, wrong); });
  }

  void compare_plainly(const Row& row) {
    Text text;
    Ids tokens(row.tokens.begin(), row.tokens.begin() + row.prompt);
    text.extend(tokens);
    twin_.extend(0, Ids(tokens.begin(), tokens.end() - 1), false);
    while (tokens.size() < row.tokens.size()) {
      const std::int32_t root = tokens.back(), none = -1;
      twin_.verify({0}, {1}, {root}, {none});
      const Choice choice = choose(twin_, {{&text.tokens(), &row.rule, &root, &none, 1}})[0];
      twin_.keep({0}, {{0}});
      tokens.push_back(choice.next);
      text.extend({choice.next});
    }
    twin_.release(0);
    check(tokens == row.tokens, "a text is not that of plain decoding");
  }

  Random random_;
  Model model_;
  Engine engine_, twin_;
  std::unique_ptr<Heads> heads_;
  std::unique_ptr<Drafting> drafting_;
  Times times_;
  std::deque<Row> rows_;
};

}  // namespace

int main(int argc, char** argv) {
  const int steps = argc > 1 ? std::atoi(argv[1]) : 3000;
  char* colon = nullptr;
  seed = argc > 2 ? std::strtoull(argv[2], &colon, 10) : 0;
  case_number = colon && *colon == ':' ? std::atoi(colon + 1) : 0;
  const std::vector<std::string> isas = argc > 3 ? std::vector<std::string>{argv[3]} : usable_isas();
  int done = 0;
  for (; done < steps; case_number++) {
    isa = isas[case_number / kFormats % isas.size()];
    try {
      done += Case(Random(seed * 0x10001 + std::uint64_t(case_number) * 0x9e3779b9), Format(case_number % kFormats)).run();
    } catch (const std::exception& error) {
      fail(std::string("a valid call throws: ") + error.what());
    }
  }
  std::printf("%d steps: every text is that of plain decoding\n", done);
  return 0;
}
