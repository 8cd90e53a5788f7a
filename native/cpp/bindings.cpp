// Python's view of the engine: thin, and without the interpreter's lock while anything is computed.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <climits>
#include <map>
#include <memory>
#include <optional>
#include <stdexcept>

#include "bindings.hpp"
#include "cpu.hpp"
#include "engine.hpp"
#include "gguf_blocks.hpp"
#include "heads.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using medusa::Source;
using Tensor = nb::ndarray<nb::ro, nb::device::cpu, nb::c_contig>;
using Floats = nb::ndarray<nb::numpy, float>;
using FloatsIn = nb::ndarray<const float, nb::device::cpu, nb::c_contig>;
using RowIn = nb::ndarray<const float, nb::ndim<1>, nb::device::cpu, nb::c_contig>;
using IdsIn = nb::ndarray<const std::int32_t, nb::ndim<2>, nb::device::cpu, nb::c_contig>;
using Without = nb::call_guard<nb::gil_scoped_release>;

Source source_of(const Tensor& tensor) {
  Source source;
  source.data = static_cast<const std::byte*>(tensor.data());
  const auto type = tensor.dtype();
  if (type == nb::dtype<float>()) source.dtype = medusa::Dtype::float32;
  else if (type.code == std::uint8_t(nb::dlpack::dtype_code::Bfloat) && type.bits == 16) source.dtype = medusa::Dtype::bfloat16;
  else if (type.code == std::uint8_t(nb::dlpack::dtype_code::Float) && type.bits == 16) source.dtype = medusa::Dtype::float16;
  else throw std::invalid_argument("a weight must be float32, bfloat16 or float16");
  if (tensor.ndim() < 1 || tensor.ndim() > 2) throw std::invalid_argument("a weight has one or two dimensions");
  for (std::size_t i = 0; i < tensor.ndim(); i++)
    if (tensor.shape(i) > std::size_t(INT_MAX)) throw std::invalid_argument("a weight is too large");
  source.rows = tensor.ndim() == 2 ? int(tensor.shape(0)) : 1;
  source.columns = int(tensor.shape(tensor.ndim() - 1));
  return source;
}

// A matrix as it lies in a GGUF file.
struct Packed {
  Tensor bytes;  // [rows, bytes of a row]
  Source source;

  Packed(const Tensor& of, const std::string& kind, int columns) : bytes(of) {
    source.dtype = medusa::gguf_dtype(kind);
    if (of.dtype() != nb::dtype<std::uint8_t>() || of.ndim() != 2 || of.shape(0) > std::size_t(INT_MAX) || columns < 1 ||
        columns % medusa::gguf_block(source.dtype) != 0 ||
        of.shape(1) != medusa::gguf_row_bytes(source.dtype, columns))
      throw std::invalid_argument("packed bytes and the shape of their weights do not fit together");
    source.data = static_cast<const std::byte*>(of.data());
    source.rows = int(of.shape(0));
    source.columns = columns;
  }
};

// Sources of tensors and of packed bytes, which must live as long as these.
struct Sources {
  std::vector<Tensor> kept;

  Source of(const nb::handle& value) {
    if (nb::isinstance<Packed>(value)) return nb::cast<const Packed&>(value).source;
    kept.push_back(nb::cast<Tensor>(value));
    return source_of(kept.back());
  }

  // Of what is read as long as the engine lives: not of a copy, which a tensor with gaps would be brought into.
  Source lasting(const nb::handle& value) {
    Tensor tensor;
    if (!nb::isinstance<Packed>(value) && !nb::try_cast(value, tensor, false))
      throw std::invalid_argument("embeddings and LM head must lie in memory row by row, without gaps");
    return of(value);
  }
};

template <typename Choice>
Choice choose(const char* what, const std::string& name, const std::map<std::string, Choice>& choices) {
  const auto found = choices.find(name);
  if (found == choices.end()) throw std::invalid_argument("unknown " + std::string(what) + " " + name);
  return found->second;
}

medusa::Format format_of(const std::string& name) {
  return choose<medusa::Format>("precision", name,
                                {{"float32", medusa::Format::float32},
                                 {"bfloat16", medusa::Format::bfloat16},
                                 {"int8", medusa::Format::int8},
                                 {"int4", medusa::Format::int4}});
}

void load_layer(medusa::Engine& engine, int layer, const nb::dict& tensors) {
  medusa::LayerWeights w;
  const std::map<std::string, Source*> places = {
      {"q", &w.q},           {"k", &w.k},           {"v", &w.v},           {"o", &w.o},
      {"gate", &w.gate},     {"up", &w.up},         {"down", &w.down},     {"q_bias", &w.q_bias},
      {"k_bias", &w.k_bias}, {"v_bias", &w.v_bias}, {"o_bias", &w.o_bias}, {"gate_bias", &w.gate_bias},
      {"up_bias", &w.up_bias}, {"down_bias", &w.down_bias}, {"q_norm", &w.q_norm}, {"k_norm", &w.k_norm},
      {"input_norm", &w.input_norm}, {"post_norm", &w.post_norm}};
  Sources sources;
  for (auto [key, value] : tensors) *choose<Source*>("weight", nb::cast<std::string>(key), places) = sources.of(value);
  nb::gil_scoped_release release;
  engine.load_layer(layer, w);
}

template <typename T>
nb::ndarray<nb::numpy, T> made(std::unique_ptr<T[]> data, std::vector<std::size_t> shape) {
  T* raw = data.release();
  nb::capsule owner(raw, [](void* p) noexcept { delete[] static_cast<T*>(p); });
  return nb::ndarray<nb::numpy, T>(raw, shape.size(), shape.data(), owner);
}

// A view of one table of the results, which keeps the memory, whatever becomes of the engine.
Floats view(const std::shared_ptr<medusa::Buffer>& buffer, const medusa::Results& results, int skipped, int columns,
            int stride) {
  const std::size_t nodes = results.nodes - skipped, trees = results.nodes ? results.rows / results.nodes : 0;
  nb::capsule owner(new std::shared_ptr<medusa::Buffer>(buffer),
                    [](void* p) noexcept { delete static_cast<std::shared_ptr<medusa::Buffer>*>(p); });
  return Floats(buffer->as<float>(), {trees, nodes, std::size_t(columns)}, owner,
                {std::int64_t(nodes) * stride, stride, 1});
}

nb::tuple arrays(const medusa::Engine& engine, const medusa::Results& results) {
  const int vocab = engine.config().vocab_size, size = engine.feature_size();
  return nb::make_tuple(view(results.logits, results, results.skipped, vocab, engine.logits_stride()),
                        view(results.features, results, 0, size, size));
}

nb::tuple level(medusa::Heads& heads, int level, const FloatsIn& base, const FloatsIn& nodes, const IdsIn& parents,
                const IdsIn& tokens, int count, const std::optional<RowIn>& factors, const std::optional<FloatsIn>& noise) {
  heads.check(level, count);
  const std::size_t batch = tokens.shape(0), width = tokens.shape(1);
  const std::size_t above = batch && nodes.ndim() == 3 ? nodes.shape(1) : 0;
  const bool residual = heads.kind() == medusa::HeadsKind::residual;
  const int first = heads.kind() == medusa::HeadsKind::recurrent ? heads.hidden_size() : 0;
  const std::size_t carried = level > 1 ? std::size_t(heads.node_size(level - 1)) : std::size_t(first);
  if (batch == 0 || width == 0 || base.size() != batch * heads.hidden_size() ||
      parents.shape(0) != batch || parents.shape(1) != width || (!residual && nodes.size() != batch * above * carried))
    throw std::invalid_argument("heads: the arrays do not fit together");
  const std::size_t rows = residual ? 1 : width, size = heads.node_size(level);
  std::vector<medusa::Heads::Tilt> tilt(batch);
  if (factors.has_value() != noise.has_value() ||
      (factors && (factors->size() != batch || noise->size() != batch * std::size_t(heads.rows()))))
    throw std::invalid_argument("heads: the arrays do not fit together");
  for (std::size_t b = 0; factors && b < batch; b++)
    tilt[b] = {factors->data()[b], noise->data() + b * std::size_t(heads.rows())};
  std::unique_ptr<float[]> log_p(new float[batch * rows * count]), next(new float[batch * rows * size]);
  std::unique_ptr<std::int32_t[]> ids(new std::int32_t[batch * rows * count]);
  {
    nb::gil_scoped_release release;
    heads.level(level, base.data(), nodes.data(), int(above), parents.data(), tokens.data(), int(batch), int(width),
                count, log_p.get(), ids.get(), next.get(), tilt.data());
  }
  return nb::make_tuple(made(std::move(log_p), {batch, rows, std::size_t(count)}),
                        made(std::move(ids), {batch, rows, std::size_t(count)}),
                        made(std::move(next), {batch, rows, size}));
}

}  // namespace

NB_MODULE(_engine, m) {
  nb::set_leak_warnings(false);  // engines that live until the interpreter ends are no leak
  m.doc() = "The CPU engine of Medusa.";
  m.attr("MAX_NODES") = medusa::kMaxNodes;
  m.attr("CHUNK") = medusa::kChunk;
  m.attr("KEPT") = medusa::kKept;
  m.attr("SPAN") = medusa::kSpan;
  m.def("usable_isas", &medusa::usable_isas, "Instruction sets that this build and this machine have, best first.");
  m.def("read_bandwidth", &medusa::read_bandwidth, "threads"_a, Without(), "Bytes per second read from memory.");

  nb::class_<Packed>(m, "Packed", "A matrix in a packed format of GGUF files, where it lies; the engine reads it row by row.")
      .def(nb::init<const Tensor&, const std::string&, int>(), "bytes"_a, "kind"_a, "columns"_a)
      .def_prop_ro("shape", [](const Packed& packed) { return std::pair(packed.source.rows, packed.source.columns); })
      .def(
          "unpack",
          [](const Packed& packed, int first, int count) {
            const Source& source = packed.source;
            if (first < 0 || count < 0 || first > source.rows - count) throw std::invalid_argument("there is no such row");
            std::unique_ptr<float[]> out(new float[std::size_t(count) * source.columns]);
            {
              nb::gil_scoped_release release;
              for (int i = 0; i < count; i++) source.row(first + i, out.get() + std::size_t(i) * source.columns);
            }
            return made(std::move(out), {std::size_t(count), std::size_t(source.columns)});
          },
          "first"_a, "count"_a, "Rows as float32 [count, columns], each weight rounded to bfloat16.");
  m.attr("PACKED_KINDS") = medusa::gguf_names();

  nb::class_<medusa::Engine>(m, "Engine")
      .def(
          "__init__",
          [](medusa::Engine* self, int hidden_size, int heads, int kv_heads, int head_dim, int rotary_dim,
             int intermediate_size, int vocab_size, int max_length, int slots, float epsilon, float attention_scale,
             float rotary_scale, std::vector<float> inverse_frequencies, const std::string& gate,
             const std::string& precision, const std::vector<std::pair<bool, int>>& layers,
             std::vector<int> feature_layers, int threads, const std::string& isa) {
            medusa::Config c;
            c.hidden_size = hidden_size;
            c.heads = heads;
            c.kv_heads = kv_heads;
            c.head_dim = head_dim;
            c.rotary_dim = rotary_dim;
            c.intermediate_size = intermediate_size;
            c.vocab_size = vocab_size;
            c.max_length = max_length;
            c.slots = slots;
            c.epsilon = epsilon;
            c.attention_scale = attention_scale;
            c.rotary_scale = rotary_scale;
            c.inverse_frequencies = std::move(inverse_frequencies);
            c.gate = choose<medusa::Gate>("activation", gate,
                                          {{"silu", medusa::Gate::silu},
                                           {"gelu_tanh", medusa::Gate::gelu_tanh},
                                           {"gelu", medusa::Gate::gelu}});
            c.format = format_of(precision);
            for (auto [rotary, window] : layers) c.layers.push_back({rotary, window});
            c.feature_layers = std::move(feature_layers);
            new (self) medusa::Engine(std::move(c), threads, isa);
          },
          nb::kw_only(), "hidden_size"_a, "heads"_a, "kv_heads"_a, "head_dim"_a, "rotary_dim"_a, "intermediate_size"_a,
          "vocab_size"_a, "max_length"_a, "slots"_a, "epsilon"_a, "attention_scale"_a, "rotary_scale"_a,
          "inverse_frequencies"_a, "gate"_a, "precision"_a, "layers"_a, "feature_layers"_a, "threads"_a, "isa"_a)
      .def("load_layer", &load_layer, "layer"_a, "tensors"_a)
      .def(
          "load_ends",
          [](medusa::Engine& engine, const nb::object& embedding, const nb::object& final_norm, const nb::object& lm_head) {
            Sources sources;
            const Source e = sources.lasting(embedding), n = sources.of(final_norm), l = sources.lasting(lm_head);
            nb::gil_scoped_release release;
            engine.load_ends(e, n, l);
          },
          "embedding"_a, "final_norm"_a, "lm_head"_a, nb::keep_alive<1, 2>(), nb::keep_alive<1, 4>())
      .def(
          "extend",
          [](medusa::Engine& engine, int slot, const std::vector<std::int32_t>& tokens, bool last, bool every) {
            medusa::Results results;
            {
              nb::gil_scoped_release release;
              results = engine.extend(slot, tokens, last, every);
            }
            return arrays(engine, results);
          },
          "slot"_a, "tokens"_a, "last"_a, "every"_a = false,
          "As verify: with `last` logits and features of the last token, with `every` the features of all of them.")
      .def(
          "verify",
          [](medusa::Engine& engine, const std::vector<int>& slots, const std::vector<int>& sizes,
             const std::vector<std::int32_t>& tokens, const std::vector<std::int32_t>& parents) {
            medusa::Results results;
            {
              nb::gil_scoped_release release;
              results = engine.verify(slots, sizes, tokens, parents);
            }
            return arrays(engine, results);
          },
          "slots"_a, "sizes"_a, "tokens"_a, "parents"_a,
          "Logits [trees, nodes, vocabulary] and features [trees, nodes, size]: views that the next call overwrites.")
      .def("keep", &medusa::Engine::keep, "slots"_a, "paths"_a, Without())
      .def("copy", &medusa::Engine::copy, "source"_a, "target"_a, "length"_a, Without())
      .def("release", &medusa::Engine::release, "slot"_a, Without())
      .def("length", &medusa::Engine::length, "slot"_a)
      .def_prop_ro("isa", [](const medusa::Engine& engine) { return std::string(engine.kernels().name); })
      .def_prop_ro("threads", [](medusa::Engine& engine) { return engine.pool().threads(); })
      .def_prop_ro("weight_bytes", &medusa::Engine::weight_bytes)
      .def_prop_ro("attention_pieces", &medusa::Engine::attention_pieces,
                   "Pieces into which the last pass divided the attention of each layer.");

  nb::class_<medusa::Heads>(m, "Heads")
      .def(
          "__init__",
          [](medusa::Heads* self, medusa::Engine& engine, const std::string& kind, int levels, int features,
             const std::string& precision) {
            medusa::HeadsConfig config;
            config.kind = choose<medusa::HeadsKind>("kind", kind,
                                                    {{"residual", medusa::HeadsKind::residual},
                                                     {"sequential", medusa::HeadsKind::sequential},
                                                     {"recurrent", medusa::HeadsKind::recurrent}});
            config.levels = levels;
            config.features = features;
            config.format = format_of(precision);
            new (self) medusa::Heads(engine, config);
          },
          "engine"_a, nb::kw_only(), "kind"_a, "levels"_a, "features"_a, "precision"_a, nb::keep_alive<1, 2>())
      .def("load_projection",
           [](medusa::Heads& heads, const Tensor& weight) { heads.load_projection(source_of(weight)); }, "weight"_a)
      .def(
          "load_level",
          [](medusa::Heads& heads, int level, const std::vector<nb::dict>& layers) {
            std::vector<medusa::BlockWeights> blocks;
            std::vector<Tensor> kept;
            for (const nb::dict& layer : layers) {
              medusa::BlockWeights w;
              const std::map<std::string, Source*> places = {
                  {"gate", &w.gate}, {"up", &w.up}, {"down", &w.down}, {"linear", &w.linear}, {"bias", &w.bias}};
              for (auto [key, value] : layer) {
                kept.push_back(nb::cast<Tensor>(value));
                *choose<Source*>("weight", nb::cast<std::string>(key), places) = source_of(kept.back());
              }
              blocks.push_back(w);
            }
            heads.load_level(level, blocks);
          },
          "level"_a, "layers"_a)
      .def("load_tied", &medusa::Heads::load_tied, "ids"_a)
      .def(
          "load_own",
          [](medusa::Heads& heads, const std::vector<Tensor>& matrices, const std::vector<std::int32_t>& ids) {
            std::vector<Source> sources;
            for (const Tensor& matrix : matrices) sources.push_back(source_of(matrix));
            heads.load_own(sources, ids);
          },
          "matrices"_a, "ids"_a)
      .def(
          "begin",
          [](medusa::Heads& heads, const FloatsIn& features) {
            if (features.ndim() != 2 || features.shape(1) != std::size_t(heads.feature_size()))
              throw std::invalid_argument("heads: the features have the wrong shape");
            const std::size_t batch = features.shape(0), size = heads.hidden_size();
            std::unique_ptr<float[]> base(new float[batch * size]);
            {
              nb::gil_scoped_release release;
              heads.begin(features.data(), int(batch), base.get());
            }
            return made(std::move(base), {batch, std::size_t(1), size});
          },
          "features"_a)
      .def("level", &level, "level"_a, "base"_a, "nodes"_a, "parents"_a, "tokens"_a, "count"_a,
           "factors"_a = nb::none(), "noise"_a = nb::none());
  bind_step(m);
}
