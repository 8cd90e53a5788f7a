#include "linear.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "floats.hpp"
#include "gguf_blocks.hpp"

namespace medusa {
namespace {

constexpr int group_of(Format format) {
  switch (format) {
    case Format::float32: return 1;
    case Format::bfloat16: return 2;
    case Format::int8: return kInt8Group;
    default: return kInt4Group;
  }
}

std::size_t bytes_of_block(Format format, int inputs) {
  const std::size_t weights = std::size_t(inputs) * kLanes;
  switch (format) {
    case Format::float32: return weights * 4;
    case Format::bfloat16: return weights * 2;
    case Format::int8: return weights + std::size_t(inputs / kInt8Group) * kLanes * 2;
    default: return weights / 2 + std::size_t(inputs / kInt4Group) * kLanes * 4;
  }
}

// The bits of floats as integers in the same order, and back: sums and comparisons of integers may become vectors.
std::int32_t ordered(float v) {
  const auto u = std::int32_t(bits_of(v));
  return u ^ (u >> 31 & 0x7fffffff);
}
float unordered(std::int32_t u) { return float_of(std::uint32_t(u ^ (u >> 31 & 0x7fffffff))); }

// With `rounded`, also after rounding to bfloat16, which makes the largest of float32 infinite.
bool all_finite(const float* w, std::size_t n, bool rounded) {
  const std::uint32_t more = rounded ? 0x8000u : 0;
  std::uint32_t infinite = 0;  // the exponent is all ones just where adding one to it carries over
  for (std::size_t i = 0; i < n; i++) {
    infinite |= ((bits_of(w[i]) & 0x7fffffffu) + more) + 0x00800000u;
  }
  return (infinite & 0x80000000u) == 0;
}

void pack_float32(const float* w, int inputs, std::byte* out) {
  float* y = reinterpret_cast<float*>(out);
  for (int k = 0; k < inputs; k++)
    for (int o = 0; o < kLanes; o++) y[k * kLanes + o] = w[std::size_t(o) * inputs + k];
}

void pack_bfloat16(const float* w, int inputs, std::byte* out) {
  std::uint16_t* y = reinterpret_cast<std::uint16_t*>(out);
  for (int o = 0; o < kLanes; o++)
    for (int k = 0; k < inputs; k += 2)
      for (int i = 0; i < 2; i++) y[(k / 2 * kLanes + o) * 2 + i] = to_bfloat16(w[std::size_t(o) * inputs + k + i]);
}

// 16 rows that are bfloat16 already, or zeros: as they are, two inputs at a time. False where one is not a finite number.
bool copy_bfloat16(const OutputRow* rows, int inputs, const std::byte* zeros, std::byte* out) {
  const std::byte* from[kLanes];
  for (int o = 0; o < kLanes; o++)
    from[o] = rows[o].source ? rows[o].source->data + std::size_t(rows[o].row) * inputs * 2 : zeros;
  std::uint32_t* y = reinterpret_cast<std::uint32_t*>(out);
  std::uint32_t infinite = 0;
  for (int k = 0; k < inputs / 2; k++)
    for (int o = 0; o < kLanes; o++) {
      std::uint32_t pair;
      std::memcpy(&pair, from[o] + 4 * std::size_t(k), 4);
      // The exponent is all ones just where adding one to it carries over.
      infinite |= ((pair & 0x7f807f80u) + 0x00800080u) & 0x80008000u;
      y[k * kLanes + o] = pair;
    }
  return infinite == 0;
}

void pack_int8(const float* w, int inputs, std::byte* out) {
  std::uint8_t* y = reinterpret_cast<std::uint8_t*>(out);
  std::uint16_t* scales = reinterpret_cast<std::uint16_t*>(out + std::size_t(inputs) * kLanes);
  for (int g = 0; g < inputs / kInt8Group; g++)
    for (int o = 0; o < kLanes; o++) {
      const float* x = w + std::size_t(o) * inputs + g * kInt8Group;
      std::int32_t most = 0;  // of floats without their signs, which are in the order of their bits
      for (int i = 0; i < kInt8Group; i++) most = std::max(most, std::int32_t(bits_of(x[i]) & 0x7fffffffu));
      const float top = float_of(std::uint32_t(most));
      const std::uint16_t bits = to_bfloat16(top / 127);
      const float scale = from_bfloat16(bits);
      scales[g * kLanes + o] = bits;
      const float inverse = scale > 1e-30f ? 1 / scale : 0.0f;
      std::uint8_t bytes[kInt8Group];
      for (int i = 0; i < kInt8Group; i++)
        bytes[i] = std::uint8_t(128 + int(std::min(127.0f, std::max(-127.0f, round_even(x[i] * inverse)))));
      for (int i = 0; i < kInt8Group; i += 4)
        std::memcpy(y + ((g * kInt8Group + i) / 4 * kLanes + o) * 4, bytes + i, 4);
    }
}

// Scale and minimum of 32 weights, so that scale * q + minimum, q = 0..15, comes near.
struct Fit {
  float scale, minimum;
};

// Sums over 32 weights in eight lanes, in an order of their own, so that a compiler can make vectors of them.
struct Lanes {
  float lane[8] = {};

  float sum() const {
    return ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]));
  }
};

template <typename Term>
float sum_of(Term term) {
  Lanes lanes;
  for (int i = 0; i < kInt4Group; i += 8)
    for (int j = 0; j < 8; j++) lanes.lane[j] += term(i + j);
  return lanes.sum();
}

// The nearest of 0..15 for each of 32 weights.
void nearest(const float* x, const Fit& fit, float* q) {
  const float inverse = fit.scale > 1e-30f ? 1 / fit.scale : 0.0f;
  for (int i = 0; i < kInt4Group; i++)
    q[i] = std::min(15.0f, std::max(0.0f, round_even((x[i] - fit.minimum) * inverse)));
}

// The least squares for the q that are nearest to `fit`; where there are none, as it was.
Fit refined(const float* x, float x_sum, const Fit& fit) {
  float q[kInt4Group];
  nearest(x, fit, q);
  const float q_sum = sum_of([&](int i) { return q[i]; }), qq = sum_of([&](int i) { return q[i] * q[i]; });
  const float qx = sum_of([&](int i) { return q[i] * x[i]; });
  const float variance = qq - q_sum * q_sum / kInt4Group;
  if (!(variance > 0)) return fit;
  const float scale = (qx - q_sum * x_sum / kInt4Group) / variance;
  if (!(scale > 1e-20f)) return fit;
  return {scale, (x_sum - scale * q_sum) / kInt4Group};
}

// From the extremes, then least squares for the rounded q, in turn. The minimum makes up for the rounding of the scale to
// bfloat16. Writes the q.
Fit fit_int4(const float* x, float* q) {
  std::int32_t least = ordered(x[0]), most = least;
  for (int i = 1; i < kInt4Group; i++) {
    least = std::min(least, ordered(x[i]));
    most = std::max(most, ordered(x[i]));
  }
  const float low = unordered(least), x_sum = sum_of([&](int i) { return x[i]; });
  Fit fit{(unordered(most) - low) / 15, low};
  for (int round = 0; round < 5 && fit.scale > 1e-20f; round++) fit = refined(x, x_sum, fit);
  fit.scale = as_bfloat16(fit.scale);
  nearest(x, fit, q);
  fit.minimum = as_bfloat16((x_sum - fit.scale * sum_of([&](int i) { return q[i]; })) / kInt4Group);
  return fit;
}

// Of a group that has scale, minimum and q = 0..15 already: the same q.
Fit taken_int4(const FourBits& group, float* q) {
  for (int i = 0; i < kInt4Group; i++) q[i] = group.q[i];
  const float q_sum = sum_of([&](int i) { return q[i]; });
  const float scale = as_bfloat16(group.scale);
  return {scale, as_bfloat16(group.minimum + (group.scale - scale) * q_sum / kInt4Group)};
}

// Line `o` of a block of int4: group g.
void put_int4(const Fit& fit, const float* q, int inputs, int g, int o, std::byte* out) {
  std::uint8_t* y = reinterpret_cast<std::uint8_t*>(out) + (std::size_t(g) * kInt4Group / 8 * kLanes + o) * 4;
  auto* scales = reinterpret_cast<std::uint16_t*>(out + std::size_t(inputs) * kLanes / 2) + g * 2 * kLanes + o;
  scales[0] = to_bfloat16(fit.scale);
  scales[kLanes] = to_bfloat16(fit.minimum);
  for (int i = 0; i < kInt4Group; i += 8, y += 4 * kLanes)  // inputs i and i + 4 share a byte
    for (int j = 0; j < 4; j++) y[j] = std::uint8_t(int(q[i + j]) | int(q[i + j + 4]) << 4);
}

void pack_int4(const float* w, int inputs, std::byte* out) {
  float q[kInt4Group];
  for (int g = 0; g < inputs / kInt4Group; g++)
    for (int o = 0; o < kLanes; o++) {
      const Fit fit = fit_int4(w + std::size_t(o) * inputs + g * kInt4Group, q);
      put_int4(fit, q, inputs, g, o, out);
    }
}

// 16 rows whose groups have scale, minimum and q already, or zeros. False where one is not a finite number.
bool take_int4(const OutputRow* rows, int inputs, std::byte* out) {
  bool finite = true;
  for (int o = 0; o < kLanes; o++) {
    const Source* source = rows[o].source;
    const std::byte* row = source ? source->data + gguf_row_bytes(source->dtype, inputs) * rows[o].row : nullptr;
    for (int g = 0; g < inputs / kInt4Group; g++) {
      FourBits group{};
      if (row) gguf_group(source->dtype, row, g, group);
      finite = finite && std::isfinite(group.scale) && std::isfinite(group.minimum);
      float q[kInt4Group];
      const Fit fit = taken_int4(group, q);
      put_int4(fit, q, inputs, g, o, out);
    }
  }
  return finite;
}

}  // namespace

void Source::row(int index, float* out) const {
  if (is_packed(dtype)) {
    gguf_unpack(dtype, data + gguf_row_bytes(dtype, columns) * index, columns, out);
    return;
  }
  if (dtype == Dtype::float32) {
    std::memcpy(out, data + std::size_t(index) * columns * 4, std::size_t(columns) * 4);
    return;
  }
  const std::byte* from = data + std::size_t(index) * columns * 2;
  const auto widened = [&](auto widen) {
    for (int i = 0; i < columns; i++) {
      std::uint16_t bits;
      std::memcpy(&bits, from + 2 * std::size_t(i), 2);
      out[i] = widen(bits);
    }
  };
  if (dtype == Dtype::bfloat16) widened(from_bfloat16);
  else widened(from_float16);
}

std::vector<float> read(const Source& source, const std::string& name) {
  std::vector<float> values(std::size_t(source.rows) * source.columns);
  for (int row = 0; row < source.rows; row++) source.row(row, values.data() + std::size_t(row) * source.columns);
  for (float v : values)
    if (!std::isfinite(v)) throw std::invalid_argument(name + " has a weight that is not a finite number");
  return values;
}

bool all_finite(Pool& pool, const Source& source) {
  std::atomic<bool> finite{true};
  Phase phase;
  phase.shape(pool.threads());
  pool.run([&](int thread) {
    std::vector<float> row(source.columns);
    phase.run(thread, source.rows, 1, 64, [&](int first, int count) {
      for (int i = first; i < first + count; i++) {
        source.row(i, row.data());
        if (!all_finite(row.data(), row.size(), false)) finite = false;
      }
    });
  });
  return finite;
}

int padded_inputs(Format format, int inputs) {
  return round_up(inputs, group_of(format));
}

std::vector<OutputRow> rows_of(const Source& source) {
  std::vector<OutputRow> rows(round_up(source.rows, kLanes));
  for (int i = 0; i < source.rows; i++) rows[i] = {&source, i};
  return rows;
}

std::vector<OutputRow> interleaved(const Source& gate, const Source& up) {
  std::vector<OutputRow> rows;
  for (int first = 0; first < gate.rows; first += kLanes)
    for (const Source* source : {&gate, &up})
      for (int i = first; i < first + kLanes; i++) rows.push_back(i < gate.rows ? OutputRow{source, i} : OutputRow{});
  return rows;
}

Linear pack(Pool& pool, Arena& arena, Format format, const std::vector<OutputRow>& rows, const std::vector<int>& columns,
            const std::string& name) {
  int width = int(columns.size());
  for (const OutputRow& row : rows)
    if (columns.empty() && row.source) width = std::max(width, row.source->columns);
  Linear linear;
  linear.format = format;
  linear.inputs = padded_inputs(format, width);
  linear.blocks = int(rows.size()) / kLanes;
  linear.block_bytes = bytes_of_block(format, linear.inputs);
  linear.weights = arena.take(linear.bytes());

  int widest = width;
  for (const OutputRow& row : rows)
    if (row.source) widest = std::max(widest, row.source->columns);
  bool as_is = format == Format::bfloat16 && columns.empty() && linear.inputs == width;
  for (const OutputRow& row : rows)
    if (row.source) as_is = as_is && row.source->dtype == Dtype::bfloat16 && row.source->columns == width;
  const bool four_bits = format == Format::int4 && columns.empty() && linear.inputs == width;
  const auto is_taken = [&](const OutputRow& row) {
    return !row.source || (gguf_has_four_bits(row.source->dtype) && row.source->columns == width);
  };
  const std::size_t plain = std::size_t(kLanes) * linear.inputs;
  const std::size_t scratch = plain + widest;
  Buffer room(scratch * sizeof(float) * pool.threads());
  std::atomic<bool> finite{true};
  Phase phase;
  phase.shape(pool.threads());
  pool.run([&](int thread) {
    float* w = room.as<float>() + scratch * thread;
    float* line = w + plain;
    std::fill(w, w + plain, 0.0f);
    phase.run(thread, linear.blocks, 1, 8, [&](int first, int count) {
      for (int block = first; block < first + count; block++) {
        if (as_is) {
          if (!copy_bfloat16(&rows[std::size_t(block) * kLanes], width, reinterpret_cast<const std::byte*>(w),
                             linear.weights + block * linear.block_bytes))
            finite = false;
          continue;
        }
        const OutputRow* first_row = &rows[std::size_t(block) * kLanes];
        if (four_bits && std::all_of(first_row, first_row + kLanes, is_taken)) {
          if (!take_int4(first_row, width, linear.weights + block * linear.block_bytes)) finite = false;
          continue;
        }
        std::fill(w, w + plain, 0.0f);
        for (int o = 0; o < kLanes; o++) {
          const OutputRow& row = rows[std::size_t(block) * kLanes + o];
          if (!row.source) continue;
          float* to = w + std::size_t(o) * linear.inputs;
          row.source->row(row.row, columns.empty() ? to : line);
          for (std::size_t i = 0; i < columns.size(); i++) to[i] = columns[i] < 0 ? 0.0f : line[columns[i]];
        }
        if (!all_finite(w, plain, format == Format::bfloat16)) finite = false;
        std::byte* out = linear.weights + block * linear.block_bytes;
        switch (format) {
          case Format::float32: pack_float32(w, linear.inputs, out); break;
          case Format::bfloat16: pack_bfloat16(w, linear.inputs, out); break;
          case Format::int8: pack_int8(w, linear.inputs, out); break;
          default: pack_int4(w, linear.inputs, out);
        }
      }
    });
  });
  if (!finite) throw std::invalid_argument(name + " has a weight that is not a finite number");
  return linear;
}

void ActivationBuffer::shape(const Kernels& kernels, Format of, int padded) {
  format = of;
  inputs = padded;
  // An odd number of lines: rows that lie a power of two apart would crowd into few places of the nearest cache.
  stride = (kernels.input_bytes[int(of)] * padded + 63) / 64 * 64 | 64;
  groups = of == Format::int8 ? padded / kInt8Group : of == Format::int4 ? padded / kInt4Group : 0;
}

void ActivationBuffer::fit(int tokens) {
  data.fit(stride * tokens);
  scales.fit(groups * tokens * sizeof(float));
  start.fit(groups * tokens * sizeof(std::int32_t));
  sums.fit(groups * tokens * sizeof(float));
}

Activations ActivationBuffer::view() const {
  return {data.data(), stride, scales.as<float>(), start.as<std::int32_t>(), sums.as<float>(), groups};
}

void ActivationBuffer::set(const Kernels& kernels, int token, const float* x, int n) {
  const std::size_t at = groups * token;
  kernels.quantise[int(format)](x, n, inputs, data.data() + stride * token, scales.as<float>() + at,
                                start.as<std::int32_t>() + at, sums.as<float>() + at);
}

}  // namespace medusa
