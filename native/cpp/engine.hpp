// A decoder-only transformer of the Llama kind with numbered slots: a prompt is extended in chunks, a tree of tokens is
// verified in one pass, and the accepted path is kept.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "kernels.hpp"
#include "linear.hpp"
#include "memory.hpp"
#include "pool.hpp"

namespace medusa {

inline constexpr int kChunk = 256;  // tokens of a prompt in one pass
inline constexpr int kKept = 1024;  // positions whose memory a released slot keeps at hand

struct LayerConfig {
  bool rotary = true;
  int window = 0;  // 0: full attention
};

struct Config {
  int hidden_size = 0;
  int heads = 0;
  int kv_heads = 0;
  int head_dim = 0;
  int rotary_dim = 0;
  int intermediate_size = 0;
  int vocab_size = 0;
  int max_length = 0;
  int slots = 1;
  float epsilon = 1e-5f;
  float attention_scale = 0;
  float rotary_scale = 1;  // of cosines and sines (YaRN)
  std::vector<float> inverse_frequencies;  // [rotary_dim / 2]
  Gate gate = Gate::silu;
  Format format = Format::float32;
  std::vector<LayerConfig> layers;
  std::vector<int> feature_layers;  // hidden states handed out beside the final one; i is the output of layer i

  void check() const;  // throws std::invalid_argument
};

struct LayerWeights {
  Source q, k, v, o, gate, up, down;
  Source q_bias, k_bias, v_bias, o_bias, gate_bias, up_bias, down_bias;  // may be empty
  Source q_norm, k_norm;                                                 // may be empty
  Source input_norm, post_norm;
};

// What a pass made. The memory stays while somebody holds it, but the engine's next pass may write to it.
struct Results {
  std::shared_ptr<Buffer> logits, features;  // [rows - skipped, logits_stride], [rows, feature_size] of float
  int rows = 0, nodes = 0;
  int skipped = 0;  // rows at the front that have features and no logits
};

class Engine {
 public:
  // Throws std::invalid_argument (bad configuration, unknown instruction set) and std::bad_alloc.
  Engine(Config config, int threads, const std::string& isa);

  // Packs the weights of one layer; the sources may go afterwards.
  void load_layer(int layer, const LayerWeights& weights);
  // The embeddings are read at each step, so their memory must outlive the engine.
  void load_ends(const Source& embedding, const Source& final_norm, const Source& lm_head);

  // Adds tokens to the text of a slot. With `last` the logits and features of the last one are made, with `every` the
  // features of all of them.
  Results extend(int slot, const std::vector<std::int32_t>& tokens, bool last, bool every = false);

  // Verifies one tree for each slot; tokens and parents of all trees one after the other. Row b * nodes() + i of the
  // results belongs to node i of tree b.
  Results verify(const std::vector<int>& slots, const std::vector<int>& sizes, const std::vector<std::int32_t>& tokens,
                 const std::vector<std::int32_t>& parents);

  // The nodes of each path, root first, join the text of the slot that was verified last.
  void keep(const std::vector<int>& slots, const std::vector<std::vector<int>>& paths);
  // The first `length` tokens of a slot become the text of another; in place, a text is cut short.
  void copy(int source, int target, int length);
  // Empties a slot. Of its memory that of kKept positions stays, up to the end of a huge page.
  void release(int slot);
  int length(int slot) const;

  // What the last `extend` or `verify` made.
  int rows() const { return results_.rows; }
  int nodes() const { return results_.nodes; }
  int skipped() const { return results_.skipped; }
  const float* logits() const { return results_.logits->as<float>(); }  // [rows - skipped][logits_stride]
  int logits_stride() const { return lm_head_.outputs(); }
  const float* features() const { return results_.features->as<float>(); }  // [rows][feature_size]
  int feature_size() const { return config_.hidden_size * (1 + int(config_.feature_layers.size())); }

  const Config& config() const { return config_; }
  const Kernels& kernels() const { return kernels_; }
  Pool& pool() { return pool_; }
  OwnerMutex& mutex() { return mutex_; }
  const Source& embedding() const { return embedding_; }
  const Source& lm_source() const { return lm_source_; }
  std::size_t weight_bytes() const;  // read by a pass over one token
  std::vector<int> attention_pieces() const;  // into which the last pass divided the attention of each layer

 private:
  struct Layer {
    Linear qkv, o, gate_up, down;
    std::vector<float> input_norm, post_norm, q_norm, k_norm;
    bool loaded = false;
  };
  struct Slot {
    int length = 0;
    Buffer cache;
    std::vector<std::int32_t> parents;  // of the tree verified last, until something is kept
  };
  struct Token {
    std::int32_t id = 0;
    int slot = 0;
    int position = 0;
    int place = 0;
    int prefix = 0;
    int extra = 0;  // index into extras_
    int extras = 0;
  };
  struct Tile {  // queries of one slot, numbered (token, head in the group) from `first` on
    int token = 0;
    int first = 0;
    int count = 0;
    int head = 0;  // key-value head
  };
  struct Spans {  // of kSpan positions
    int first, end;
    int count() const { return end - first; }
  };
  struct Piece {  // of the work of attention, for one thread
    int tile;
    Spans spans;
  };
  struct Division {  // of the attention of the layers with one window
    int window;
    bool split;  // a token's spans lie in several pieces
    std::vector<Piece> pieces;
  };

  Slot& slot_at(int slot);
  const Slot& slot_at(int slot) const { return const_cast<Engine*>(this)->slot_at(slot); }
  void need_weights() const;
  void check_token(std::int32_t token) const;
  // Over tokens_: those with output_ >= 0 get features and, but for the first `skipped` rows, logits.
  void pass(int outputs, int skipped);
  void run(int thread);
  void embed(int token);
  void divide();
  int first_seen(const Token& token, int window) const;
  Spans spans_of(const Token& token, int window) const;
  void attend(const Piece& piece, int thread, int layer);
  void join(int token, int head, int row, int window) const;
  float* attended_at(int token, int head) const;
  float* part_at(int row, int index) const;
  void rotate(int token, int layer);
  template <typename Epilogue>
  void product(const Linear& linear, const ActivationBuffer& x, int unit, int thread, Phase& phase, const Linear* next,
               Epilogue epilogue);
  template <typename T>
  void write_cache(std::byte* block, int lane, const float* k, const float* v) const;
  template <typename T>
  void move_place(Slot& slot, int from, int to) const;
  std::byte* cache_at(const Slot& slot, int place, int layer, int head) const;

  Config config_;
  const Kernels& kernels_;
  Pool pool_;
  OwnerMutex mutex_;
  int dim_ = 0;         // head_dim, padded to 16
  int cache_item_ = 0;  // bytes of a cached number
  std::size_t head_bytes_ = 0;
  std::size_t block_bytes_ = 0;
  Format lm_format_ = Format::float32;
  Arena arena_;  // of the packed weights
  std::vector<Layer> layers_;
  std::vector<Slot> slots_;
  Source embedding_, lm_source_;
  std::vector<float> final_norm_;
  Linear lm_head_;

  // one pass
  std::vector<Token> tokens_;
  std::vector<int> output_;  // [tokens] row of the results, or -1
  std::vector<std::int32_t> extras_;
  std::vector<Tile> tiles_;
  std::vector<Division> divisions_;
  std::vector<int> division_of_;  // layer -> index
  std::vector<int> wanted_;  // tokens with an output; the LM head reads those after the first skipped()
  std::vector<Phase> phases_;
  int capacity_ = 0;  // tokens for which there is room
  Buffer hidden_, qkv_, attended_, gated_, rotary_, panel_, scores_, normed_, parts_;
  int part_spans_ = 0;  // parts [rows][part_spans_][part_stride_] of float: a row for each token and head of the pass
  std::size_t part_stride_ = 0;  // where they are split, else for each query of a thread's tile
  ActivationBuffer input_, attention_out_, mlp_, lm_input_;

  Results results_;
};

}  // namespace medusa
