#include "linear.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <stdexcept>

namespace medusa {
namespace {

float from_bfloat16(std::uint16_t bits) {
  std::uint32_t wide = std::uint32_t(bits) << 16;
  float v;
  std::memcpy(&v, &wide, 4);
  return v;
}

std::uint16_t to_bfloat16(float v) {
  std::uint32_t u;
  std::memcpy(&u, &v, 4);
  return std::uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

float from_float16(std::uint16_t bits) {
  const std::uint32_t sign = std::uint32_t(bits & 0x8000) << 16, exponent = bits >> 10 & 31, fraction = bits & 1023;
  if (exponent == 0) {
    float v = std::ldexp(float(fraction), -24);
    return sign ? -v : v;
  }
  std::uint32_t u = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | fraction << 13;
  float v;
  std::memcpy(&v, &u, 4);
  return v;
}

// Half to even, for numbers far below 2^22. Unlike std::nearbyint it needs no call, so loops over it become vectors.
float round_even(float v) { return (v + 12582912.0f) - 12582912.0f; }

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
      float top = 0;
      for (int i = 0; i < kInt8Group; i++) top = std::max(top, std::fabs(x[i]));
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

// Scale and minimum of 32 weights, so that scale * q + minimum, q = 0..15, comes near: from the extremes, then least
// squares for the rounded q, in turn.
struct Fit {
  float scale, minimum;
};

// The nearest of 0..15 for each of 32 weights.
void nearest(const float* x, const Fit& fit, float* q) {
  const float inverse = fit.scale > 1e-30f ? 1 / fit.scale : 0.0f;
  for (int i = 0; i < kInt4Group; i++)
    q[i] = std::min(15.0f, std::max(0.0f, round_even((x[i] - fit.minimum) * inverse)));
}

Fit fit_int4(const float* x) {
  float low = x[0], high = x[0];
  for (int i = 1; i < kInt4Group; i++) {
    low = std::min(low, x[i]);
    high = std::max(high, x[i]);
  }
  Fit fit{(high - low) / 15, low};
  for (int round = 0; round < 5; round++) {
    if (!(fit.scale > 1e-20f)) break;
    float q_sum = 0, x_sum = 0, qq = 0, qx = 0;
    float rounded[kInt4Group];
    nearest(x, fit, rounded);
    for (int i = 0; i < kInt4Group; i++) {
      const float q = rounded[i];
      q_sum += q;
      x_sum += x[i];
      qq += q * q;
      qx += q * x[i];
    }
    const float variance = qq - q_sum * q_sum / kInt4Group;
    if (!(variance > 0)) break;
    const float scale = (qx - q_sum * x_sum / kInt4Group) / variance;
    if (!(scale > 1e-20f)) break;
    fit = {scale, (x_sum - scale * q_sum) / kInt4Group};
  }
  return {from_bfloat16(to_bfloat16(fit.scale)), from_bfloat16(to_bfloat16(fit.minimum))};
}

void pack_int4(const float* w, int inputs, std::byte* out) {
  std::uint8_t* y = reinterpret_cast<std::uint8_t*>(out);
  std::uint16_t* scales = reinterpret_cast<std::uint16_t*>(out + std::size_t(inputs) * kLanes / 2);
  for (int g = 0; g < inputs / kInt4Group; g++)
    for (int o = 0; o < kLanes; o++) {
      const float* x = w + std::size_t(o) * inputs + g * kInt4Group;
      const Fit fit = fit_int4(x);
      scales[g * 2 * kLanes + o] = to_bfloat16(fit.scale);
      scales[(g * 2 + 1) * kLanes + o] = to_bfloat16(fit.minimum);
      float q[kInt4Group];
      nearest(x, fit, q);
      for (int i = 0; i < kInt4Group; i += 8)  // inputs i and i + 4 share a byte
        for (int j = 0; j < 4; j++)
          y[((g * kInt4Group + i) / 8 * kLanes + o) * 4 + j] = std::uint8_t(int(q[i + j]) | int(q[i + j + 4]) << 4);
    }
}

}  // namespace

void Source::row(int index, float* out) const {
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
        std::fill(w, w + plain, 0.0f);
        for (int o = 0; o < kLanes; o++) {
          const OutputRow& row = rows[std::size_t(block) * kLanes + o];
          if (!row.source) continue;
          float* to = w + std::size_t(o) * linear.inputs;
          row.source->row(row.row, columns.empty() ? to : line);
          for (std::size_t i = 0; i < columns.size(); i++) to[i] = columns[i] < 0 ? 0.0f : line[columns[i]];
        }
        float sum = 0;  // times zero: 0, or not a number where a weight is not finite
        for (std::size_t i = 0; i < plain; i++) sum += w[i] * 0.0f;
        if (format == Format::bfloat16)  // which rounds the largest of float32 to infinity
          for (std::size_t i = 0; i < plain; i++) sum += from_bfloat16(to_bfloat16(w[i])) * 0.0f;
        if (sum != 0.0f) finite = false;
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
