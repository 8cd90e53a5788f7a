// Python's view of drafting and acceptance, see bindings.hpp.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>

#include "bindings.hpp"
#include "choosing.hpp"
#include "drafting.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using Ids = std::vector<std::int32_t>;
using Features = nb::ndarray<const float, nb::ndim<1>, nb::device::cpu, nb::c_contig>;

template <typename Make>
nb::tuple tuple_of(std::size_t size, Make make) {
  nb::object made = nb::steal(PyTuple_New(Py_ssize_t(size)));
  if (!made.is_valid()) throw nb::python_error();
  for (std::size_t i = 0; i < size; i++) PyTuple_SET_ITEM(made.ptr(), Py_ssize_t(i), make(i).release().ptr());
  return nb::cast<nb::tuple>(made);
}

// (tokens, parents, probabilities, sources) of each tree, and for how many rows heads drafted.
nb::tuple propose(medusa::Drafting& drafting, const std::vector<medusa::Text*>& texts,
                  const std::vector<medusa::Rule*>& rules, const std::vector<int>& rooms, int nodes, const medusa::Times* times, const nb::tuple& names) {
  if (texts.size() != rooms.size() || texts.size() != rules.size() || names.size() != 3)
    throw std::invalid_argument("drafting: the lists do not fit together");
  std::vector<medusa::Drafting::Row> rows;
  for (std::size_t b = 0; b < texts.size(); b++) rows.push_back({texts[b], rules[b], rooms[b]});
  medusa::Drafting::Proposed found;
  {
    nb::gil_scoped_release release;
    found = drafting.propose(rows, nodes, times);
  }
  const nb::tuple drafts = tuple_of(found.drafts.size(), [&](std::size_t b) {
    const medusa::Draft& draft = found.drafts[b];
    const std::size_t size = std::size_t(draft.size());
    return nb::make_tuple(
        tuple_of(size, [&](std::size_t i) { return nb::int_(draft.tokens[i]); }),
        tuple_of(size, [&](std::size_t i) { return nb::int_(draft.parents[i]); }),
        tuple_of(size, [&](std::size_t i) { return nb::float_(draft.probabilities[i]); }),
        tuple_of(size, [&](std::size_t i) { return nb::borrow(names[std::size_t(draft.proposers[i])]); }));
  });
  return nb::make_tuple(drafts, found.asked);
}

void see(medusa::Engine& engine, medusa::Text& text, int row, int node) {
  const std::size_t size = std::size_t(engine.feature_size());
  text.see(engine.features() + (std::size_t(row) * engine.nodes() + node) * size, size);
}

// The rows of the last pass go on where they were accepted: their features are those of the last node of the path.
nb::list choose(medusa::Engine& engine, const std::vector<medusa::Text*>& texts,
                const std::vector<medusa::Rule*>& rules, const std::vector<Ids>& tokens,
                const std::vector<Ids>& parents) {
  if (texts.size() != rules.size() || texts.size() != tokens.size() || texts.size() != parents.size())
    throw std::invalid_argument("a choice: the lists do not fit together");
  std::vector<medusa::Verified> trees;
  for (std::size_t b = 0; b < texts.size(); b++) {
    if (!texts[b] || tokens[b].size() != parents[b].size())
      throw std::invalid_argument("a choice: the lists do not fit together");
    trees.push_back({&texts[b]->tokens(), rules[b], tokens[b].data(), parents[b].data(), int(tokens[b].size())});
  }
  std::vector<medusa::Choice> choices;
  {
    nb::gil_scoped_release release;
    choices = medusa::choose(engine, trees);
    for (std::size_t b = 0; b < choices.size(); b++)
      if (trees[b].rule) see(engine, *texts[b], int(b), choices[b].path.back());
  }
  nb::list found;
  for (std::size_t b = 0; b < choices.size(); b++) {
    const medusa::Choice& choice = choices[b];
    if (!trees[b].rule) found.append(nb::none());
    else
      found.append(nb::make_tuple(
          tuple_of(choice.path.size(), [&](std::size_t i) { return nb::int_(choice.path[i]); }), choice.next));
  }
  return found;
}

}  // namespace

void bind_step(nb::module_& m) {
  nb::class_<medusa::Text>(m, "Text")
      .def(nb::init<>())
      .def("extend", &medusa::Text::extend, "tokens"_a)
      .def(
          "see", [](medusa::Text& text, const Features& features) { text.see(features.data(), features.size()); },
          "features"_a)
      .def("__len__", &medusa::Text::size);

  nb::class_<medusa::Times>(m, "Times")
      .def(
          "__init__",
          [](medusa::Times* self, std::vector<double> seconds, double draft, double more, int context, double row, double node,
             int most) {
            if (seconds.size() < 2 || most < 1) throw std::invalid_argument("times: two at least, and a node");
            new (self) medusa::Times{std::move(seconds), draft, more, context, row, node, most};
          },
          "seconds"_a, nb::kw_only(), "draft"_a, "more"_a, "context"_a, "row"_a, "node"_a, "most"_a);

  nb::class_<medusa::Rule>(m, "Rule").def(
      "__init__",
      [](medusa::Rule* self, bool typical, double temperature, int top_k, double top_p, double min_p,
         std::uint64_t seed, double epsilon, double delta, double penalty) {
        if (!(temperature >= 0) || top_k < 0 || !(penalty > 0)) throw std::invalid_argument("a rule has no such value");
        new (self) medusa::Rule{typical, float(temperature), top_k, top_p, min_p, seed, epsilon, delta, float(penalty)};
      },
      nb::kw_only(), "typical"_a, "temperature"_a, "top_k"_a, "top_p"_a, "min_p"_a, "seed"_a, "epsilon"_a, "delta"_a,
      "penalty"_a);

  nb::class_<medusa::Drafting>(m, "Drafting")
      .def(
          "__init__",
          [](medusa::Drafting* self, medusa::Heads* heads, double heads_weight, double heads_fade, double sureness, int chain,
             std::vector<std::vector<double>> prior, double ngram_weight, double ngram_fade, double highest_bar,
             double usual_tokens) {
            medusa::DraftingConfig config;
            config.heads_weight = heads_weight;
            config.heads_fade = heads_fade;
            config.sureness = float(sureness);
            config.chain = chain;
            config.prior = std::move(prior);
            config.ngram_weight = ngram_weight;
            config.ngram_fade = ngram_fade;
            config.highest_bar = highest_bar;
            config.usual_tokens = usual_tokens;
            new (self) medusa::Drafting(heads, std::move(config));
          },
          nb::kw_only(), "heads"_a.none(), "heads_weight"_a, "heads_fade"_a, "sureness"_a, "chain"_a, "prior"_a, "ngram_weight"_a,
          "ngram_fade"_a, "highest_bar"_a, "usual_tokens"_a, nb::keep_alive<1, 2>())
      .def("propose", &propose, "texts"_a, "rules"_a, "rooms"_a, "nodes"_a, "times"_a.none(), "names"_a);

  m.def("choose", &choose, "engine"_a, "texts"_a, "rules"_a, "tokens"_a, "parents"_a,
        "(path, next token) of each tree of the engine's last pass; None where there is no rule.");
  m.def(
      "sample",
      [](medusa::Engine& engine, const nb::ndarray<const float, nb::ndim<1>, nb::device::cpu, nb::c_contig>& logits,
         const medusa::Rule& rule, std::uint64_t position) {
        return medusa::sample(engine, logits.data(), int(logits.size()), rule, position);
      },
      "engine"_a, "logits"_a, "rule"_a, "position"_a);
}
