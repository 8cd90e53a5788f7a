// Random calls on tiny random engines: medusa_fuzz [sequences=10000] [seed=0 or seed:case] [isa]
//
// A sequence is one draw of Case::sequence: a single call (extend, keep, release, a load), or a short burst of calls
// that belong together (verify, look at the rows, keep a path; the levels of one draft of some heads). A hundred
// sequences make a case: an engine of a random shape, a twin of it with the same weights and another number of threads,
// and heads of each kind. Cases take turns with precisions and instruction sets. Checked are
//   - that calls throw std::invalid_argument exactly where `Shadow` says so, and that nothing is changed then;
//   - that lengths are those of the shadow, and numbers are finite;
//   - that the bits of a token's logits and features depend on its text alone: as a node of any tree, in a batch, alone
//     as a chain, plainly in other chunks, in another slot, with another number of threads;
//   - that a node's guesses by the heads are the same alone and in a batch, in order, and probabilities.
// What it cannot see is a mistake that all these ways share; the Python tests compare with torch for that.
//
// The first failure is printed with the command that replays it, and the exit code is 1.

#include <sys/time.h>

#include <algorithm>
#include <climits>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <memory>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu.hpp"
#include "engine.hpp"
#include "gguf_blocks.hpp"
#include "heads.hpp"
#include "random_model.hpp"

#ifdef MEDUSA_HEAP_BUFFERS
#include <sanitizer/common_interface_defs.h>
#include <sys/mman.h>

// Linked in place of the system's (see CMakeLists.txt): AddressSanitizer guards the ends of what comes from the heap,
// and what is read before it was written is not a number. The chunks of an arena are too large for that.
constexpr std::size_t kLarge = std::size_t(1) << 25;

extern "C" void* __real_mmap(void* at, std::size_t bytes, int protection, int flags, int file, off_t offset);
extern "C" int __real_munmap(void* p, std::size_t bytes);
extern "C" int __real_madvise(void* p, std::size_t bytes, int advice);

extern "C" void* __wrap_mmap(void* at, std::size_t bytes, int protection, int flags, int file, off_t offset) {
  if (bytes >= kLarge) return __real_mmap(at, bytes, protection, flags, file, offset);
  void* p = nullptr;
  if (posix_memalign(&p, 4096, bytes) != 0) return MAP_FAILED;
  return std::memset(p, 0xff, bytes);
}
extern "C" int __wrap_munmap(void* p, std::size_t bytes) {
  if (bytes >= kLarge) return __real_munmap(p, bytes);
  std::free(p);
  return 0;
}
extern "C" int __wrap_madvise(void* p, std::size_t bytes, int advice) {
  if (bytes >= kLarge) return __real_madvise(p, bytes, advice);
  if (advice == MADV_DONTNEED) std::memset(p, 0xff, bytes);
  return 0;
}
#endif

namespace {

using namespace medusa;
using Ids = std::vector<std::int32_t>;

constexpr int kCaseSequences = 100;
constexpr int kPatienceSeconds = 120;  // of processor time for one case, before it counts as hung

// --- what is going on, for the message of a failure -----------------------------------------------------------------

struct {
  unsigned long long seed = 0;
  int number = 0, sequence = 0;  // of the case, within the case
  const char* call = "";
  const char* isa = "";  // as given
  std::string engine;
} where;

struct {
  long long sequences = 0, accepted = 0, refused = 0, copied = 0, compared = 0, across = 0;
} counts;

void say_where() {
  std::fflush(stdout);
  std::fprintf(stderr, "medusa_fuzz: %s\n", where.engine.c_str());
  std::fprintf(stderr, "  seed %llu, case %d, sequence %d, call %s\n", where.seed, where.number, where.sequence,
               where.call);
  std::fprintf(stderr, "  replay: medusa_fuzz %d %llu:%d %s\n", kCaseSequences, where.seed, where.number, where.isa);
}

[[noreturn]] void fail(const std::string& message) {
  std::fprintf(stderr, "medusa_fuzz: FAILED: %s\n", message.c_str());
  say_where();
  std::_Exit(1);
}

void check(bool good, const char* message) {
  if (!good) fail(message);
}

void on_signal(int number) {
  std::fprintf(stderr, "medusa_fuzz: FAILED: %s\n", number == SIGPROF ? "a call does not return" : "crash");
  say_where();
  std::_Exit(1);
}

void watch_for_crashes() {
  std::signal(SIGPROF, on_signal);
#ifdef MEDUSA_HEAP_BUFFERS
  __sanitizer_set_death_callback(say_where);
#else
  for (int number : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT}) std::signal(number, on_signal);
#endif
}

void restart_timer() {
  const itimerval patience{{0, 0}, {kPatienceSeconds, 0}};
  setitimer(ITIMER_PROF, &patience, nullptr);
}

// --- calls and what they must do ------------------------------------------------------------------------------------

template <typename Call>
void accept(const char* name, Call call) {
  where.call = name;
  counts.accepted++;
  try {
    call();
  } catch (const std::exception& error) {
    fail(std::string("a valid call throws: ") + error.what());
  }
}

template <typename Call>
void refuse(const char* name, Call call) {
  where.call = name;
  counts.refused++;
  try {
    call();
  } catch (const std::invalid_argument&) {
    return;
  } catch (const std::exception& error) {
    fail(std::string("an invalid call throws something else: ") + error.what());
  }
  fail("an invalid call does not throw");
}

template <typename T>
void append(std::string& bytes, const T* values, std::size_t count) {
  bytes.append(reinterpret_cast<const char*>(values), count * sizeof(T));
}

// The bits of one row of the results: logits, if it has any, then features.
std::string row_of(const Engine& engine, int row) {
  std::string bytes;
  if (row >= engine.skipped())
    append(bytes, engine.logits() + std::size_t(row - engine.skipped()) * engine.logits_stride(),
           engine.config().vocab_size);
  append(bytes, engine.features() + std::size_t(row) * engine.feature_size(), engine.feature_size());
  return bytes;
}

std::string results_of(const Engine& engine) {
  std::string bytes;
  for (int number : {engine.rows(), engine.nodes(), engine.skipped()}) bytes += std::to_string(number) + " ";
  for (int i = 0; i < engine.rows(); i++) bytes += row_of(engine, i);
  return bytes;
}

void check_row(const Engine& engine, int row) {
  const float* logits = engine.logits() + std::size_t(row - engine.skipped()) * engine.logits_stride();
  const float* features = engine.features() + std::size_t(row) * engine.feature_size();
  const int vocab = engine.config().vocab_size;
  check(std::all_of(logits, logits + vocab, [](float v) { return std::isfinite(v); }), "a logit is not finite");
  check(std::all_of(features, features + engine.feature_size(), [](float v) { return std::isfinite(v); }),
        "a feature is not finite");
}

// --- the shadow: what each slot holds, and which calls are valid ----------------------------------------------------

struct Draft {  // arguments of Engine::verify
  std::vector<int> slots, sizes;
  Ids tokens, parents;
};

struct Text {
  Ids tokens;
  Ids tree, parents;  // verified last, until something is kept
};

using Paths = std::vector<std::vector<int>>;

bool all_different(std::vector<int> values) {
  std::sort(values.begin(), values.end());
  return std::adjacent_find(values.begin(), values.end()) == values.end();
}

struct Shadow {
  int vocab, max_length;
  std::vector<Text> slots;

  bool has(int slot) const { return slot >= 0 && slot < int(slots.size()); }
  int room(int slot) const { return max_length - int(slots[slot].tokens.size()); }
  bool known(const Ids& tokens) const {
    return std::all_of(tokens.begin(), tokens.end(), [this](std::int32_t id) { return id >= 0 && id < vocab; });
  }

  bool can_extend(int slot, const Ids& tokens) const {
    return has(slot) && !tokens.empty() && tokens.size() <= kChunk && int(tokens.size()) <= room(slot) && known(tokens);
  }

  bool can_copy(int source, int target, int length) const {
    return has(source) && has(target) && length >= 0 && length <= int(slots[source].tokens.size());
  }

  bool can_verify(const Draft& d) const {
    if (d.slots.empty() || d.slots.size() != d.sizes.size()) return false;
    if (!all_different(d.slots) || !known(d.tokens)) return false;
    std::size_t first = 0;
    for (std::size_t b = 0; b < d.slots.size(); b++) {
      const int slot = d.slots[b], size = d.sizes[b];
      if (!has(slot) || slots[slot].tokens.empty() || size < 1 || size > kMaxNodes) return false;
      if (first + size > d.parents.size()) return false;
      std::vector<int> depth;
      for (int i = 0; i < size; i++) {
        const int parent = d.parents[first + i];
        if (i == 0 ? parent != -1 : parent < 0 || parent >= i) return false;
        depth.push_back(i == 0 ? 1 : depth[parent] + 1);
        if (depth.back() > room(slot)) return false;
      }
      first += size;
    }
    return d.tokens.size() == first && d.parents.size() == first;
  }

  bool can_keep(const std::vector<int>& which, const Paths& paths) const {
    if (which.size() != paths.size() || !all_different(which)) return false;
    for (std::size_t b = 0; b < which.size(); b++) {
      if (!has(which[b])) return false;
      const Ids& parents = slots[which[b]].parents;
      int above = -1;
      for (int node : paths[b]) {
        if (node < 0 || node >= int(parents.size()) || parents[node] != above) return false;
        above = node;
      }
    }
    return true;
  }

  void verify(const Draft& d) {
    auto token = d.tokens.begin(), parent = d.parents.begin();
    for (std::size_t b = 0; b < d.slots.size(); b++) {
      slots[d.slots[b]].tree.assign(token, token + d.sizes[b]);
      slots[d.slots[b]].parents.assign(parent, parent + d.sizes[b]);
      token += d.sizes[b];
      parent += d.sizes[b];
    }
  }

  void keep(const std::vector<int>& which, const Paths& paths) {
    for (std::size_t b = 0; b < which.size(); b++) {
      Text& text = slots[which[b]];
      for (int node : paths[b]) text.tokens.push_back(text.tree[node]);
      text.tree.clear();
      text.parents.clear();
    }
  }
};

// Root first.
std::vector<int> path_to(const Ids& parents, int node) {
  std::vector<int> path;
  for (; node >= 0; node = parents[node]) path.insert(path.begin(), node);
  return path;
}

// Heads with all that is needed to call them rightly, and wrongly.
struct Drafter {
  HeadsKind kind;
  int levels, features;
  bool projects;
  std::set<std::int32_t> ids;  // that they propose
  std::unique_ptr<Heads> heads;
};

std::string name_of(const Config& c, const Engine& engine, int threads, int twin_threads) {
  const char* formats[] = {"float32", "bfloat16", "int8", "int4"};
  std::string text = std::string(engine.kernels().name) + " " + formats[int(c.format)];
  for (auto [name, value] : {std::pair("hidden", c.hidden_size), {"heads", c.heads}, {"kv_heads", c.kv_heads},
                             {"head_dim", c.head_dim}, {"rotary", c.rotary_dim}, {"intermediate", c.intermediate_size},
                             {"vocab", c.vocab_size}, {"max_length", c.max_length}, {"slots", c.slots},
                             {"threads", threads}, {"twin_threads", twin_threads}})
    text += std::string(" ") + name + "=" + std::to_string(value);
  for (const LayerConfig& layer : c.layers)
    text += std::string(layer.rotary ? " rotary" : " plain") + ":" + std::to_string(layer.window);
  return text;
}

// --- one case -------------------------------------------------------------------------------------------------------

class Case {
 public:
  Case(Random random, Format format, const std::string& isa, int threads, int twin_threads)
      : random_(random),
        model_(random_model(random_, format)),
        config_(model_.config),
        engine_(config_, threads, isa),
        twin_(with_slots(config_, 1), twin_threads, isa),
        spare_(config_.slots - 1) {
    where.engine = name_of(config_, engine_, threads, twin_threads);
    shadow_ = {config_.vocab_size, config_.max_length, std::vector<Text>(config_.slots)};
    bad_configuration(isa);
    refuse("extend without weights", [&] { engine_.extend(0, {1}, true); });
    accept("load", [&] { load(engine_, model_); });
    accept("load", [&] { load(twin_, model_); });
    for (HeadsKind kind : {HeadsKind::residual, HeadsKind::sequential, HeadsKind::recurrent}) add_heads(kind);
  }

  void sequence() {
    const int draw = random_.between(1, 100);
    if (draw <= 22) extend();
    else if (draw <= 64) verify();
    else if (draw <= 70) keep_any();
    else if (draw <= 77) release();
    else if (draw <= 83) copy();
    else if (draw <= 95) draft();
    else if (draw <= 98) bad_load();
    else refuse("length", [&] { engine_.length(bad_slot()); });
    for (int i = 0; i < config_.slots; i++)
      check(engine_.length(i) == int(shadow_.slots[i].tokens.size()), "a length is wrong");
  }

 private:
  static Config with_slots(Config config, int slots) {
    config.slots = slots;
    return config;
  }

  int some_slot() { return random_.between(0, spare_ - 1); }
  int bad_slot() { return random_.pick({-1, config_.slots, config_.slots + 1, INT_MAX, INT_MIN}); }
  std::int32_t some_token() { return random_.between(0, config_.vocab_size - 1); }
  std::int32_t bad_token() { return random_.pick({-1, config_.vocab_size, INT_MAX, INT_MIN}); }
  Ids some_tokens(int count) {
    Ids tokens(count);
    for (auto& token : tokens) token = some_token();
    return tokens;
  }

  // A call that leaves the results of the last extend or verify alone: a refused one, or one that computes nothing.
  template <typename Call>
  void quietly(const char* name, bool valid, Call call) {
    const std::string before = results_of(engine_);
    if (valid) accept(name, call);
    else refuse(name, call);
    check(results_of(engine_) == before, "the results of the last call are gone");
  }

  // --- extend, verify, keep, release

  void extend() {
    int slot = some_slot();
    const int room = shadow_.room(slot);
    int count = random_.between(1, std::max(1, std::min(20, room)));
    if (random_.chance(5)) count = random_.pick({0, room, room + 1, kChunk, kChunk + 1});
    const int length = config_.max_length - room, to_border = (length / kSpan + 1) * kSpan - length;
    if (slot < spare_ && to_border < room && random_.chance(50)) count = std::max(1, to_border - random_.between(-2, 9));
    count = std::min(count, kChunk + 1);
    Ids tokens = some_tokens(count);
    if (random_.chance(3)) slot = bad_slot();
    if (random_.chance(3) && count > 0) tokens[random_.between(0, count - 1)] = bad_token();
    const bool last = random_.chance(60), every = random_.chance(30);
    const auto call = [&] { engine_.extend(slot, tokens, last, every); };
    if (!shadow_.can_extend(slot, tokens)) return quietly("extend", false, call);
    accept("extend", call);
    Text& text = shadow_.slots[slot];
    text.tokens.insert(text.tokens.end(), tokens.begin(), tokens.end());
    text.tree.clear();
    text.parents.clear();
    const int rows = every ? count : int(last);
    check(engine_.rows() == rows && engine_.nodes() == rows && engine_.skipped() == rows - last,
          "extend makes a wrong number of rows");
    for (int i = 0; every && i < rows * engine_.feature_size(); i++)
      check(std::isfinite(engine_.features()[i]), "a feature is not a number");
    if (last) check_row(engine_, rows - 1);
    if (rows == 0 || random_.chance(70)) return;
    const int row = random_.chance(50) ? rows - 1 : random_.between(0, rows - 1);
    compare_plainly(Ids(text.tokens.begin(), text.tokens.end() - (rows - 1 - row)), row_of(engine_, row));
  }

  void verify() {
    Draft d = some_draft();
    if (random_.chance(20)) spoil(d);
    const auto call = [&] { engine_.verify(d.slots, d.sizes, d.tokens, d.parents); };
    if (!shadow_.can_verify(d)) return quietly("verify", false, call);
    accept("verify", call);
    shadow_.verify(d);
    const int widest = *std::max_element(d.sizes.begin(), d.sizes.end());
    check(engine_.nodes() == widest, "verify makes a wrong number of nodes");
    check(engine_.rows() == widest * int(d.slots.size()), "verify makes a wrong number of rows");
    std::vector<std::vector<std::string>> rows(d.slots.size());
    for (std::size_t b = 0; b < d.slots.size(); b++)
      for (int i = 0; i < d.sizes[b]; i++) {
        check_row(engine_, int(b) * widest + i);
        rows[b].push_back(row_of(engine_, int(b) * widest + i));
      }
    if (random_.chance(40)) {
      const int b = random_.between(0, int(d.slots.size()) - 1);
      compare_tree(shadow_.slots[d.slots[b]], rows[b]);
    }
    if (random_.chance(75)) keep(d.slots);
  }

  // A valid draft where there are texts with room.
  Draft some_draft() {
    Draft d;
    for (int slot = 0; slot < spare_; slot++)
      if (random_.chance(60) && !shadow_.slots[slot].tokens.empty() && shadow_.room(slot) > 0) d.slots.push_back(slot);
    if (d.slots.empty()) d.slots.push_back(some_slot());
    if (random_.chance(50)) std::reverse(d.slots.begin(), d.slots.end());
    for (int slot : d.slots) {
      int size = random_.chance(25) ? 1 : random_.between(1, 16);
      if (random_.chance(2)) size = random_.between(100, kMaxNodes);
      const Ids parents = some_tree(size, std::max(1, shadow_.room(slot)));
      d.sizes.push_back(int(parents.size()));
      d.parents.insert(d.parents.end(), parents.begin(), parents.end());
    }
    d.tokens = some_tokens(int(d.parents.size()));
    return d;
  }

  // A tree at most `deepest` deep: like a chain, like a star, or anything between.
  Ids some_tree(int size, int deepest) {
    Ids parents = {-1};
    std::vector<int> depth = {1};
    const int straight = random_.pick({0, 30, 90, 100}), flat = random_.pick({0, 0, 50});
    for (int i = 1; i < size && deepest > 1; i++) {
      int parent = random_.chance(straight) ? i - 1 : random_.chance(flat) ? 0 : random_.between(0, i - 1);
      while (depth[parent] >= deepest) parent = parents[parent];
      parents.push_back(parent);
      depth.push_back(depth[parent] + 1);
    }
    return parents;
  }

  // One change that makes most drafts invalid; the shadow knows.
  void spoil(Draft& d) {
    const int b = random_.between(0, int(d.slots.size()) - 1), node = random_.between(0, int(d.tokens.size()) - 1);
    switch (random_.between(0, 11)) {
      case 0: d.slots[b] = bad_slot(); break;
      case 1: d.slots[b] = random_.chance(50) ? spare_ : some_slot(); break;  // an empty one, or one named twice
      case 2: d.slots.push_back(d.slots[b]); break;
      case 3: d.sizes[b] = random_.pick({0, -1, d.sizes[b] + 1, d.sizes[b] - 1, kMaxNodes + 1, INT_MAX}); break;
      case 4: d.sizes.pop_back(); break;
      case 5: random_.chance(50) ? d.tokens.pop_back() : d.tokens.push_back(some_token()); break;
      case 6: random_.chance(50) ? d.parents.pop_back() : d.parents.push_back(0); break;
      case 7: d.tokens[node] = bad_token(); break;
      case 8: d.parents[node] = random_.pick({-1, -2, 0, node, node + 1, INT_MAX, INT_MIN}); break;
      case 9: replace_by_chain(d, random_.between(-1, 2)); break;
      case 10: replace_by_star(d, kMaxNodes + random_.between(0, 2)); break;
      default: d = {}; break;
    }
  }

  void replace_by_chain(Draft& d, int beyond) {  // the context's end
    const int slot = d.slots[0], size = std::max(1, shadow_.room(slot) + beyond);
    d = {{slot}, {size}, some_tokens(size), {}};
    for (int i = 0; i < size; i++) d.parents.push_back(i - 1);
  }

  void replace_by_star(Draft& d, int size) {
    d = {{d.slots[0]}, {size}, some_tokens(size), Ids(size, 0)};
    d.parents[0] = -1;
  }

  // The beginning of a path of the tree verified last in a slot.
  std::vector<int> some_path(int slot) {
    const Ids& parents = shadow_.slots[slot].parents;
    if (parents.empty()) return {};
    std::vector<int> path = path_to(parents, random_.between(0, int(parents.size()) - 1));
    if (random_.chance(20)) path.resize(random_.between(0, int(path.size())));
    return path;
  }

  void keep(const std::vector<int>& slots) {
    std::vector<int> which;
    Paths paths;
    for (int slot : slots)
      if (random_.chance(85)) {
        which.push_back(slot);
        paths.push_back(some_path(slot));
      }
    keep(which, paths);
  }

  void keep(const std::vector<int>& which, const Paths& paths) {
    const bool valid = shadow_.can_keep(which, paths);
    quietly("keep", valid, [&] { engine_.keep(which, paths); });
    if (valid) shadow_.keep(which, paths);
  }

  // Whatever the slots hold: often nothing that could be kept.
  void keep_any() {
    std::vector<int> which;
    Paths paths;
    for (int slot = 0; slot < spare_; slot++)
      if (random_.chance(60)) {
        which.push_back(slot);
        paths.push_back(some_path(slot));
      }
    if (!which.empty() && random_.chance(75)) {
      const int b = random_.between(0, int(which.size()) - 1);
      std::vector<int>& path = paths[b];
      const int node = random_.pick({-1, -2, 0, 1, 2, int(shadow_.slots[which[b]].tree.size()), INT_MAX, INT_MIN});
      switch (random_.between(0, 6)) {
        case 0: which[b] = bad_slot(); break;
        case 1: which.push_back(which[b]), paths.emplace_back(); break;
        case 2: which.pop_back(); break;
        case 3: path.push_back(node); break;
        case 4: path.insert(path.begin(), node); break;
        case 5:
          if (path.size() > 1) path.erase(path.begin() + random_.between(0, int(path.size()) - 2));
          break;
        default:
          if (path.empty()) path.push_back(node);
          path[random_.between(0, int(path.size()) - 1)] = node;
          break;
      }
    }
    keep(which, paths);
  }

  // A text, or its beginning, goes to another slot, or is cut short where it is.
  void copy() {
    int source = some_slot(), target = some_slot();
    for (int i = 0; i < 8 && (shadow_.slots[source].tokens.empty() || source == target); i++)
      source = some_slot(), target = some_slot();
    const int held = int(shadow_.slots[source].tokens.size());
    int length = random_.pick({held, random_.between(0, held), random_.between(0, held)});
    if (random_.chance(5)) source = bad_slot();
    if (random_.chance(5)) target = bad_slot();
    if (random_.chance(5)) length = random_.pick({-1, INT_MIN, held + 1, INT_MAX});
    const bool valid = shadow_.can_copy(source, target, length);
    quietly("copy", valid, [&] { engine_.copy(source, target, length); });
    if (!valid) return;
    const Ids& tokens = shadow_.slots[source].tokens;
    shadow_.slots[target] = {Ids(tokens.begin(), tokens.begin() + length), {}, {}};
    counts.copied += length > 0 && source != target;
  }

  void release() {
    if (random_.chance(15)) return quietly("release", false, [&] { engine_.release(bad_slot()); });
    const int slot = some_slot();
    quietly("release", true, [&] { engine_.release(slot); });
    shadow_.slots[slot] = {};
  }

  // --- the same tokens by another road

  struct Road {
    Engine& engine;
    int slot;
  };

  Road other_road() {
    if (random_.chance(60)) return {twin_, 0};
    shadow_.slots[spare_] = {};
    return {engine_, spare_};
  }

  // The text of the slot becomes `tokens`, in chunks of random sizes.
  void prefill(Road road, const Ids& tokens, bool last) {
    accept("release for comparison", [&] { road.engine.release(road.slot); });
    const int most = int(tokens.size()) > kSpan / 2 ? random_.pick({40, 200, kChunk}) : random_.pick({1, 3, 7, 16, 64});
    for (auto at = tokens.begin(); at != tokens.end();) {
      const auto end = at + std::min<std::ptrdiff_t>(random_.between(1, most), tokens.end() - at);
      const bool makes_row = last && end == tokens.end();
      accept("extend for comparison", [&] { road.engine.extend(road.slot, Ids(at, end), makes_row); });
      at = end;
    }
  }

  void expect(Road road, int row, const std::string& bits) {
    counts.compared++;
    counts.across += road.engine.length(road.slot) >= kSpan;
    std::string others = row_of(road.engine, row);
    const bool whole = others.size() == bits.size();  // else `bits` are features alone
    others.erase(0, others.size() - bits.size());
    if (others == bits) return;
    const std::size_t at = std::mismatch(bits.begin(), bits.end(), others.begin()).first - bits.begin();
    fail(std::string(whole && at < sizeof(float) * config_.vocab_size ? "logits differ" : "features differ") +
         (&road.engine == &twin_ ? " from the twin's" : " from another slot's"));
  }

  void leave(Road road) {
    accept("release after comparison", [&] { road.engine.release(road.slot); });
  }

  void compare_plainly(const Ids& tokens, const std::string& bits) {
    const Road road = other_road();
    prefill(road, tokens, true);
    expect(road, 0, bits);
    leave(road);
  }

  // `rows` of the nodes of the text's tree: each path to a leaf alone as a chain; one path as plain text.
  void compare_tree(const Text& text, const std::vector<std::string>& rows) {
    const Road road = other_road();
    prefill(road, text.tokens, false);
    std::vector<bool> leaf(rows.size(), true);
    for (int parent : text.parents)
      if (parent >= 0) leaf[parent] = false;
    for (int node = 0, chains = 0; node < int(rows.size()) && chains < 12; node++) {
      if (!leaf[node] || (rows.size() > 20 && random_.chance(80))) continue;
      const std::vector<int> path = path_to(text.parents, node);
      Ids chain, parents;
      for (int on_path : path) {
        parents.push_back(int(chain.size()) - 1);
        chain.push_back(text.tree[on_path]);
      }
      accept("verify for comparison", [&] { road.engine.verify({road.slot}, {int(path.size())}, chain, parents); });
      for (std::size_t i = 0; i < path.size(); i++) expect(road, int(i), rows[path[i]]);
      chains++;
    }
    leave(road);
    const int node = random_.between(0, int(rows.size()) - 1);
    Ids tokens = text.tokens;
    for (int on_path : path_to(text.parents, node)) tokens.push_back(text.tree[on_path]);
    compare_plainly(tokens, rows[node]);
  }

  // --- construction and loading

  void bad_configuration(const std::string& isa) {
    Config c = config_;
    const float bad = random_.pick({INFINITY, -INFINITY, std::nanf("")});
    switch (random_.between(0, 16)) {
      case 0: c.hidden_size = random_.pick({0, -1, INT_MIN}); break;
      case 1: c.heads = c.kv_heads + 1 + (c.kv_heads == 1 ? -2 : 0); break;
      case 2: c.kv_heads = 0; break;
      case 3: c.head_dim = -16; break;
      case 4: c.rotary_dim = random_.pick({1, -2, c.head_dim + 2}); break;
      case 5: c.inverse_frequencies.push_back(1); break;
      case 6: c.layers.clear(); break;
      case 7: c.feature_layers.push_back(random_.pick({0, -1, int(c.layers.size())})); break;
      case 8: c.slots = 0; break;
      case 9: c.max_length = INT_MAX; break;
      case 10: c.vocab_size = 0; break;
      case 11: c.layers[random_.between(0, int(c.layers.size()) - 1)].window = random_.pick({-1, INT_MIN}); break;
      case 12: random_.pick({&c.epsilon, &c.attention_scale, &c.rotary_scale})[0] = bad; break;
      case 13: c.rotary_dim = 2, c.inverse_frequencies = {bad}; break;
      case 14: c.heads = c.kv_heads = 1 << 20; break;
      case 15: c.feature_layers.assign(64, 1); break;
      default: c.intermediate_size = 0; break;
    }
    refuse("a bad configuration", [&] { Engine(c, 1, isa); });
    refuse("a bad number of threads", [&] { Engine(config_, random_.pick({0, -1, 5000, INT_MIN, INT_MAX}), isa); });
    refuse("an unknown instruction set", [&] { Engine(config_, 1, "mmx"); });
  }

  // A source like `good` that must be refused.
  Source bad_source(const Source& good, Store& store) {
    Source bad = good;
    switch (random_.between(0, 3)) {
      case 0: return {};
      case 1: bad.rows += random_.pick({-1, 1}); return bad;
      case 2: bad.columns += random_.pick({-1, 1}); return bad;
      default: return store.infinite(random_, good);
    }
  }

  void bad_load() {
    Store store(Dtype::float32);
    const int index = random_.between(0, int(model_.layers.size()) - 1);
    LayerWeights w = model_.layers[index];
    switch (random_.between(0, 3)) {
      case 0: return accept("load_layer again", [&] { engine_.load_layer(index, w); });
      case 1: {
        const int bad = random_.pick({-1, int(model_.layers.size()), INT_MAX});
        return quietly("load_layer", false, [&] { engine_.load_layer(bad, w); });
      }
      case 2: {
        Source* const parts[] = {&w.q, &w.k, &w.v, &w.o, &w.gate, &w.up, &w.down, &w.input_norm, &w.post_norm};
        Source& part = *parts[random_.between(0, 8)];
        part = bad_source(part, store);
        return quietly("load_layer", false, [&] { engine_.load_layer(index, w); });
      }
      default: {
        Source ends[] = {model_.embedding, model_.final_norm, model_.lm_head};
        Source& end = ends[random_.between(0, 2)];
        end = bad_source(end, store);
        return quietly("load_ends", false, [&] { engine_.load_ends(ends[0], ends[1], ends[2]); });
      }
    }
  }

  // --- heads

  void add_heads(HeadsKind kind) {
    Drafter& d = drafters_.emplace_back();
    d.kind = kind;
    d.levels = random_.between(1, 4);
    d.features = random_.between(1, 3);
    d.projects = d.features > 1 || random_.chance(30);
    const Format format = random_.pick({Format::float32, Format::bfloat16, Format::int8, Format::int4});
    refuse("heads", [&] { Heads(engine_, {kind, random_.pick({0, -1, 65}), d.features, format}); });
    refuse("heads", [&] { Heads(engine_, {kind, d.levels, random_.pick({0, -1, 65}), format}); });
    const HeadsConfig config{kind, d.levels, d.features, format};
    accept("heads", [&] { d.heads = std::make_unique<Heads>(engine_, config); });
    std::vector<float> floats(std::size_t(config_.hidden_size) * 8);
    const std::int32_t zero = 0;
    std::int32_t id;
    refuse("level without weights", [&] {
      d.heads->level(1, floats.data(), floats.data(), 1, &zero, &zero, 1, 1, 1, floats.data(), &id, floats.data());
    });
    load_heads(d);
  }

  void load_heads(Drafter& d) {
    const int size = config_.hidden_size, last = d.kind == HeadsKind::recurrent ? 1 : d.levels;
    Store& store = model_.store;
    if (d.projects) {
      refuse("load_projection", [&] { d.heads->load_projection(store.weight(random_, size, size * d.features + 1)); });
      accept("load_projection", [&] { d.heads->load_projection(store.weight(random_, size, size * d.features)); });
    }
    for (int level = 1; level <= last; level++)
      accept("load_level", [&] { d.heads->load_level(level, some_blocks(d, level)); });
    for (int level : {0, last + 1}) refuse("load_level", [&] { d.heads->load_level(level, some_blocks(d, 1)); });
    refuse("load_level", [&] { d.heads->load_level(1, {}); });
    refuse("load_level", [&] { d.heads->load_level(1, {{}}); });
    std::vector<BlockWeights> mixed = some_blocks(d, 1);
    (mixed[0].gate.data ? mixed[0].bias : mixed[0].up) = store.bias(random_, size);
    refuse("load_level", [&] { d.heads->load_level(1, mixed); });

    Ids ids;
    if (random_.chance(50))
      for (int i = config_.vocab_size - 1; i >= 0; i--)
        if (random_.chance(40) || i == 0) ids.push_back(i);
    const int rows = ids.empty() ? config_.vocab_size : int(ids.size());
    std::vector<Source> matrices;
    for (int level = 0; level < d.levels; level++) matrices.push_back(store.weight(random_, rows, size));
    if (random_.chance(50)) {
      refuse("load_tied", [&] { d.heads->load_tied({0, bad_token()}); });
      accept("load_tied", [&] { d.heads->load_tied(ids); });
    } else {
      refuse("load_own", [&] { d.heads->load_own({}, ids); });
      refuse("load_own", [&] { d.heads->load_own(matrices, Ids(rows + 1, 0)); });
      accept("load_own", [&] { d.heads->load_own(matrices, ids); });
    }
    d.ids.insert(ids.begin(), ids.end());
    for (int i = 0; ids.empty() && i < rows; i++) d.ids.insert(i);
  }

  std::vector<BlockWeights> some_blocks(const Drafter& d, int level) {
    const int size = config_.hidden_size;
    const bool recurrent = d.kind == HeadsKind::recurrent;  // has one layer
    std::vector<BlockWeights> blocks(recurrent ? 1 : random_.between(1, 2));
    for (std::size_t i = 0; i < blocks.size(); i++) {
      int inputs = recurrent ? 3 * size : size;
      if (d.kind == HeadsKind::sequential && i == 0) inputs = size * (1 + level);
      BlockWeights& w = blocks[i];
      if (random_.chance(50)) {
        const int inner = random_.between(20, 70);
        w.gate = model_.store.weight(random_, inner, inputs);
        w.up = model_.store.weight(random_, inner, inputs);
        w.down = model_.store.weight(random_, size, inner);
      } else {
        w.linear = model_.store.weight(random_, size, inputs);
        if (random_.chance(50)) w.bias = model_.store.bias(random_, size);
      }
    }
    return blocks;
  }

  struct Guesses {
    std::vector<float> log_p, next;
    Ids ids;
  };

  struct Question {  // arguments of Heads::level
    int level, above, batch, width, count;
    std::vector<float> base, nodes;
    Ids parents, tokens;
  };

  Guesses ask(const Drafter& d, const Question& q) {
    const std::size_t rows = std::size_t(q.batch) * (d.kind == HeadsKind::residual ? 1 : q.width);
    const std::size_t count = rows * std::clamp(q.count, 0, 100);
    Guesses g{std::vector<float>(count), std::vector<float>(rows * d.heads->node_size(q.level)), Ids(count)};
    d.heads->level(q.level, q.base.data(), q.nodes.data(), q.above, q.parents.data(), q.tokens.data(), q.batch, q.width,
                   q.count, g.log_p.data(), g.ids.data(), g.next.data());
    return g;
  }

  // One draft: a base for each text, then level after level.
  void draft() {
    const Drafter& d = drafters_[random_.between(0, int(drafters_.size()) - 1)];
    const std::vector<float> base = begin(d);
    Question q{1, 1, int(base.size()) / config_.hidden_size, 1, 1, base, base, {}, {}};
    for (; q.level <= d.levels; q.level++) {
      q.width = random_.between(1, 4);
      q.count = random_.chance(20) ? int(d.ids.size()) : random_.between(1, std::min(8, int(d.ids.size())));
      q.tokens = some_tokens(q.batch * q.width);
      q.parents.assign(q.batch * q.width, 0);
      for (auto& parent : q.parents) parent = random_.between(0, q.above - 1);
      if (random_.chance(8)) return bad_question(d, q);
      Guesses g;
      accept("level", [&] { g = ask(d, q); });
      check_guesses(d, q, g);
      if (random_.chance(40)) compare_alone(d, q, g);
      q.nodes = g.next;
      q.above = q.width;
    }
  }

  std::vector<float> begin(const Drafter& d) {
    const int size = config_.hidden_size, wide = d.heads->feature_size(), batch = random_.between(1, 4);
    std::vector<float> features(std::size_t(batch) * wide), base(std::size_t(batch) * size), alone(size);
    for (float& v : features) v = random_.real(-2, 2);
    // Only the first row is sure to belong to a node.
    if (engine_.feature_size() == wide && engine_.rows() > 0) std::copy_n(engine_.features(), wide, features.data());
    accept("begin", [&] { d.heads->begin(features.data(), batch, base.data()); });
    const int b = random_.between(0, batch - 1);
    const std::vector<float> one(features.begin() + b * wide, features.begin() + (b + 1) * wide);
    accept("begin", [&] { d.heads->begin(one.data(), 1, alone.data()); });
    check(std::memcmp(alone.data(), base.data() + b * size, size * sizeof(float)) == 0, "a base depends on its batch");
    return base;
  }

  void bad_question(const Drafter& d, Question q) {
    const bool looks_at_nodes = d.kind != HeadsKind::residual;
    const int node = random_.between(0, int(q.tokens.size()) - 1);
    switch (random_.between(0, looks_at_nodes ? 3 : 1)) {
      case 0: q.count = random_.pick({0, -1, int(d.ids.size()) + 1, INT_MAX}); break;
      case 1: q.level = random_.pick({0, -1, d.levels + 1, INT_MAX}); break;
      case 2: q.parents[node] = random_.pick({-1, q.above, INT_MAX}); break;
      default: q.tokens[node] = bad_token(); break;
    }
    const int level = q.level;
    const std::size_t room = std::size_t(q.batch) * q.width * (d.ids.size() + 1 + config_.hidden_size * 8);
    quietly("level", false, [&] {
      std::vector<float> floats(room);
      Ids ids(room);
      d.heads->level(level, q.base.data(), q.nodes.data(), q.above, q.parents.data(), q.tokens.data(), q.batch, q.width,
                     q.count, floats.data(), ids.data(), floats.data());
    });
  }

  void check_guesses(const Drafter& d, const Question& q, const Guesses& g) {
    for (std::size_t first = 0; first < g.ids.size(); first += q.count) {
      double sum = 0;
      std::set<std::int32_t> seen;
      for (int i = 0; i < q.count; i++) {
        const float log_p = g.log_p[first + i];
        check(std::isfinite(log_p) && log_p < 1e-3f, "a guess is no probability");
        check(i == 0 || log_p <= g.log_p[first + i - 1], "the guesses are not in order");
        check(d.ids.count(g.ids[first + i]) == 1, "a guess is not in the draft vocabulary");
        check(seen.insert(g.ids[first + i]).second, "a guess is there twice");
        sum += std::exp(double(log_p));
      }
      check(sum < 1.001 && (q.count < int(d.ids.size()) || sum > 0.999), "the guesses do not sum to one");
    }
    check(std::all_of(g.next.begin(), g.next.end(), [](float v) { return std::isfinite(v); }), "a node is not finite");
  }

  void compare_alone(const Drafter& d, const Question& q, const Guesses& g) {
    const int b = random_.between(0, q.batch - 1), at = random_.between(0, q.width - 1), size = config_.hidden_size;
    const int row = d.kind == HeadsKind::residual ? b : b * q.width + at, node = b * q.width + at;
    const int carried = int(q.nodes.size()) / (q.batch * q.above), next = d.heads->node_size(q.level);
    Question one{q.level, 1, 1, 1, q.count, {}, {}, {0}, {q.tokens[node]}};
    one.base.assign(q.base.begin() + b * size, q.base.begin() + (b + 1) * size);
    const auto from = q.nodes.begin() + std::ptrdiff_t(b * q.above + q.parents[node]) * carried;
    one.nodes.assign(from, from + carried);
    Guesses alone;
    accept("level", [&] { alone = ask(d, one); });
    counts.compared++;
    check(std::memcmp(alone.log_p.data(), g.log_p.data() + row * q.count, q.count * sizeof(float)) == 0 &&
              std::equal(alone.ids.begin(), alone.ids.end(), g.ids.begin() + row * q.count) &&
              std::equal(alone.next.begin(), alone.next.end(), g.next.begin() + row * next),
          "a node's guesses depend on its batch");
  }

  Random random_;
  Model model_;
  const Config& config_;
  Engine engine_, twin_;
  int spare_;
  Shadow shadow_;
  std::vector<Drafter> drafters_;
};

// Packed rows of GGUF files, of random bytes: nothing past them is read, each value is a number of bfloat16 or none, and
// what is packed of them is what is packed of their values.
void packed_rows(Random& random, Pool& pool) {
  const std::vector<std::string> names = gguf_names();
  const Dtype dtype = gguf_dtype(names[random.between(0, int(names.size()) - 1)]);
  const int rows = random.between(1, 40), columns = gguf_block(dtype) * random.between(1, gguf_block(dtype) > 32 ? 2 : 5);
  std::vector<std::byte> bytes(gguf_row_bytes(dtype, columns) * rows);
  const bool wild = random.chance(30);
  for (std::byte& byte : bytes) byte = std::byte(random.next() & (wild ? 0xff : 0x3b));  // no scale of all ones
  const Source source{bytes.data(), dtype, rows, columns};
  std::vector<float> values(std::size_t(rows) * columns);
  bool finite = true;
  for (int row = 0; row < rows; row++) source.row(row, values.data() + std::size_t(row) * columns);
  for (float v : values) {
    std::uint32_t bits;
    std::memcpy(&bits, &v, 4);
    finite = finite && std::isfinite(v);
    check(!std::isfinite(v) || (bits & 0xffff) == 0, "an unpacked weight is no number of bfloat16");
  }
  check(wild || finite, "an unpacked weight is not finite");
  check(all_finite(pool, source) == finite, "all_finite is wrong");
  const Source plain{reinterpret_cast<const std::byte*>(values.data()), Dtype::float32, rows, columns};
  for (Format format : {Format::float32, Format::bfloat16, Format::int8, Format::int4}) {
    Arena arena;
    try {
      const Linear one = pack(pool, arena, format, rows_of(source), {}, "packed");
      check(finite, "a weight that is not finite is packed");
      const Linear other = pack(pool, arena, format, rows_of(plain), {}, "plain");
      check(format == Format::int4 || std::memcmp(one.weights, other.weights, one.bytes()) == 0,
            "packed rows and their values are packed differently");
    } catch (const std::invalid_argument&) {
      check(!finite, "finite packed rows are refused");
    }
  }
}

void run(int sequences, unsigned long long seed, int first_case, const std::string& isa) {
  const std::vector<std::string> isas = isa.empty() ? usable_isas() : std::vector<std::string>{isa};
  constexpr int threads[][2] = {{1, 1}, {1, 2}, {2, 1}, {1, 3}, {3, 1}, {3, 2}};  // of the engine and of its twin
  while (counts.sequences < sequences) {
    const int number = first_case + int(counts.sequences / kCaseSequences);
    where.number = number;
    where.sequence = 0;
    where.engine = "an engine in the making";
    restart_timer();
    Random random(seed * 0x10001 + std::uint64_t(number) * 0x9e3779b9);
    const auto& [own, others] = threads[random.between(0, 5)];
    Case one(Random(random.next()), Format(number % kFormats), isas[number / kFormats % isas.size()], own, others);
    Pool pool(own);
    for (int i = 0; i < 4; i++) packed_rows(random, pool);
    for (; where.sequence < kCaseSequences && counts.sequences < sequences; where.sequence++, counts.sequences++)
      one.sequence();
  }
}

}  // namespace

#ifdef MEDUSA_HEAP_BUFFERS
extern "C" void __ubsan_on_report() { say_where(); }  // UndefinedBehaviorSanitizer calls it, having no death callback
#endif

int main(int argc, char** argv) {
  const int sequences = argc > 1 ? std::atoi(argv[1]) : 10000;
  char* colon = nullptr;
  where.seed = argc > 2 ? std::strtoull(argv[2], &colon, 10) : 0;
  const int first_case = colon && *colon == ':' ? std::atoi(colon + 1) : 0;
  where.isa = argc > 3 ? argv[3] : "";
  try {
    kernels_for(where.isa);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "medusa_fuzz: %s\n", error.what());
    return 2;
  }
  watch_for_crashes();
  run(sequences, where.seed, first_case, where.isa);
  std::printf("%lld sequences: %lld calls accepted, %lld refused, %lld texts copied, %lld rows compared bit for bit, "
              "%lld of them over several spans\n",
              counts.sequences, counts.accepted, counts.refused, counts.copied, counts.compared, counts.across);
  return 0;
}
