// SPDX-License-Identifier: Apache-2.0
// What every instruction set does alike. Included into each of them, so that the compiler makes the
// best of these loops there; everything is local to the file that includes it.
#pragma once
#ifdef __x86_64__
#include <cpuid.h>
#endif

#include <cfloat>
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "kernel.h"

#define MW_INLINE inline __attribute__((always_inline))

namespace mw {
namespace {

// Intel's cores since Sapphire Rapids, which are those with AMX: far from memory, and with a second
// cache that keeps three times as many loads in flight as the first.
inline bool fetches_deep() {
#ifdef __x86_64__
  static const bool found = [] {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d >> 24 & 1) != 0;
  }();
  return found;
#else
  return false;
#endif
}

// Has a line of a weight fetched that is read once: into the second cache, or past it.
MW_INLINE void fetch_line(const void* at, bool deep) {
  if (deep) __builtin_prefetch(at, 0, 2);
  else __builtin_prefetch(at, 0, 0);
}

// Zeroed memory for a moment; there is nobody to tell if there is none.
inline void* room_of(size_t size) {
  void* room = std::aligned_alloc(64, (size + 63) / 64 * 64);
  if (!room) std::abort();
  return room;
}

inline void* memory_of(size_t size) { return std::memset(room_of(size), 0, size); }

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// A float32 or bfloat16 number, and the nearest one to be stored: ties to even, NaN stays.
inline float float_at(const float* from) { return *from; }
inline float float_at(const uint16_t* from) { return float_of(uint32_t(*from) << 16); }

inline void store_float(float value, float* to) { *to = value; }
inline void store_float(float value, uint16_t* to) {
  const uint32_t bits = bits_of(value);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  *to = nan ? uint16_t(bits >> 16 | 0x40u) : uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

inline void add(const float* __restrict from, int64_t count, float* __restrict to) {
  for (int64_t i = 0; i < count; ++i) to[i] += from[i];
}

inline float half_value(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000u) << 16;
  const uint32_t rest = half & 0x7fffu;
  if (rest >= 0x7c00u) return float_of(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  return float_of(sign | bits_of(float_of(rest << 13) * 0x1p112f));
}

inline float e4m3_value(uint8_t code) {
  const uint32_t sign = uint32_t(code & 0x80u) << 24;
  if ((code & 0x7fu) == 0x7fu) return float_of(sign | 0x7fc00000u);
  return float_of(sign | bits_of(float_of(uint32_t(code & 0x7fu) << 20) * 0x1p120f));
}

inline float e8m0_value(uint8_t code) {
  if (code == 255) return NAN;
  return code ? float_of(uint32_t(code) << 23) : 0x1p-127f;
}

// Code `index` of a dense stream of bits that is `bytes` long.
inline uint32_t code_at(const uint8_t* stream, int64_t bytes, int64_t index, int bits) {
  const int64_t bit = index * bits, byte = bit >> 3;
  uint32_t two = stream[byte];
  if (byte + 1 < bytes) two |= uint32_t(stream[byte + 1]) << 8;
  return (two >> (bit & 7)) & ((1u << bits) - 1);
}

// Loops that the compiler can make vectors of: one for each kind of scale.
inline void scale_values(const Weight& w, int64_t at, int64_t count, float* scales) {
  const float multiplier = w.multiplier;
  if (w.scale_kind == kFloat32) {
    const float* from = static_cast<const float*>(w.scale) + at;
    for (int64_t g = 0; g < count; ++g) scales[g] = from[g] * multiplier;
  } else if (w.scale_kind == kFloat16) {
    const uint16_t* from = static_cast<const uint16_t*>(w.scale) + at;
    for (int64_t g = 0; g < count; ++g) scales[g] = half_value(from[g]) * multiplier;
  } else if (w.scale_kind == kE8M0) {
    const uint8_t* from = static_cast<const uint8_t*>(w.scale) + at;
    for (int64_t g = 0; g < count; ++g) scales[g] = e8m0_value(from[g]) * multiplier;
  } else {
    const uint8_t* from = static_cast<const uint8_t*>(w.scale) + at;
    for (int64_t g = 0; g < count; ++g) scales[g] = e4m3_value(from[g]) * multiplier;
  }
}

inline void shift_values(const uint8_t* zeros, int64_t count, int bits, int zero, float* shifts) {
  if (bits == 4) {
    for (int64_t g = 0; g < count; ++g)
      shifts[g] = float(int(zeros[g >> 1] >> (4 * (g & 1)) & 15) - zero);
  } else {
    const int64_t bytes = (count * bits + 7) / 8;
    for (int64_t g = 0; g < count; ++g)
      shifts[g] = float(int(code_at(zeros, bytes, g, bits)) - zero);
  }
}

// Repeats what a group has for all of its entries, in place.
inline void spread(float* values, int64_t count, int64_t repeat, int64_t entries) {
  if (count == 1) {
    const float all = values[0];
    for (int64_t e = 1; e < entries; ++e) values[e] = all;
    return;
  }
  for (int64_t e = entries - 1; e >= count * repeat; --e) values[e] = 0;  // beyond k x is 0
  int64_t e = entries < count * repeat ? entries : count * repeat;
  for (int64_t group = (e - 1) / repeat; group >= 0; --group)
    for (const float value = values[group]; e > group * repeat; --e) values[e - 1] = value;
}

// The scales of output `n` by entry, and how far its zero points lie above `zero` if it has some.
inline void entry_scales(const Weight& w, const Plan& plan, int64_t n, float* scales,
                         float* shifts) {
  const int64_t row = n / w.rows_per_scale;
  const int64_t groups = w.group >= w.k ? 1 : (w.k + w.group - 1) / w.group;
  const int64_t repeat = groups == 1 ? plan.entries : w.group / plan.entry;
  scale_values(w, row * w.scale_stride, groups, scales);
  if (w.zero_point) {
    const uint8_t* zeros = w.zero_point + row * w.zero_point_stride;
    shift_values(zeros, groups, w.num_bits, w.zero, shifts);
  }
  if (repeat == 1 && groups == plan.entries) return;
  spread(scales, groups, repeat, plan.entries);
  if (w.zero_point) spread(shifts, groups, repeat, plan.entries);
}

inline void fetch(const void* from, int64_t bytes) {
  const char* at = static_cast<const char*>(from);
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(at + i, 0, 0);
}

// Has the scales and zero points of some outputs brought into the cache.
inline void fetch_scales(const Weight& w, int64_t n, int64_t count) {
  const int64_t row = n / w.rows_per_scale, rows = count / w.rows_per_scale + 1;
  const int64_t size = w.scale_kind == kFloat32 ? 4 : w.scale_kind == kFloat16 ? 2 : 1;
  fetch(static_cast<const char*>(w.scale) + row * w.scale_stride * size,
        rows * w.scale_stride * size);
  if (w.zero_point) fetch(w.zero_point + row * w.zero_point_stride, rows * w.zero_point_stride);
}

inline void load_row(const void* x, Dtype dtype, int64_t k, int64_t padded, float* row) {
  if (dtype == kF32) {
    std::memcpy(row, x, k * sizeof(float));
  } else {
    const uint16_t* from = static_cast<const uint16_t*>(x);
    for (int64_t i = 0; i < k; ++i) row[i] = float_of(uint32_t(from[i]) << 16);
  }
  for (int64_t i = k; i < padded; ++i) row[i] = 0;
}

// The bits of the largest magnitude: at least 0x7f800000 if one is not finite.
inline uint32_t magnitude(const float* x, int64_t count) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = bits_of(x[i]) & 0x7fffffffu;
    largest = bits > largest ? bits : largest;
  }
  return largest;
}

// As modewright.formats.scaling has it; NaN for what is not finite, so that the output is NaN.
inline float symmetric_scale(uint32_t largest) {
  if (largest >= 0x7f800000u) return NAN;
  const float scale = float_of(largest) / 127.0f;
  return scale < FLT_MIN ? 1.0f : scale;
}

inline float clamped(float value) {
  value = value < -128.0f ? -128.0f : value;
  return value > 127.0f ? 127.0f : value;
}

// Numbers of x in units of `scale` to int8, ties to even; `rest` gets what was rounded away.
inline void round_codes(const float* x, int64_t count, float scale, int8_t* codes, float* rest) {
  const float unit = scale == scale ? scale : 1.0f;
  for (int64_t i = 0; i < count; ++i) {
    float value = clamped(x[i] / unit);
    value = value == value ? value : 0.0f;
    const float whole = std::rint(value);
    codes[i] = int8_t(int32_t(whole));
    rest[i] = value - whole;
  }
}

inline void round_rest(const float* rest, int64_t count, int8_t* codes) {
  for (int64_t i = 0; i < count; ++i) codes[i] = int8_t(int32_t(std::rint(rest[i] * 254.0f)));
}

// The order in which codes leave a register of packed bytes.
template <int FIELDS>
inline void permute_step(const int8_t* from, int64_t bytes, int8_t* to) {
  for (int64_t i = 0; i < bytes; ++i)
    for (int f = 0; f < FIELDS; ++f) to[f * bytes + i] = from[i * FIELDS + f];
}

// Writes one row of int8 numbers in natural order, and its scales by entry, into the job.
inline void place_row(const Job& job, int64_t row, const int8_t* natural, const float* scales,
                      float factor, int64_t vector_bytes) {
  const Plan& p = job.plan;
  const int64_t lanes = vector_bytes / 4, block = p.block_steps * p.step;
  int8_t* codes = job.codes + row * p.padded;
  for (int64_t at = 0; at < p.padded; at += p.step) {
    if (p.fields == 4) permute_step<4>(natural + at, vector_bytes, codes + at);
    else if (p.fields == 2) permute_step<2>(natural + at, vector_bytes, codes + at);
    else std::memcpy(codes + at, natural + at, p.step);
  }
  for (int64_t e = 0; e < p.entries; ++e) {
    int32_t sum = 0;
    for (int64_t i = 0; i < p.entry; ++i) sum += natural[e * p.entry + i];
    job.sums[row * p.entries + e] = sum;
    job.scales[row * p.entries + e] = scales[e] * factor;
  }
  for (int64_t b = 0; b < p.blocks; ++b) {
    int32_t* starts = job.starts + (row * p.blocks + b) * lanes;
    float* lane_scales = job.lane_scales + (row * p.blocks + b) * lanes;
    for (int64_t lane = 0; lane < lanes; ++lane) {
      lane_scales[lane] = scales[b * p.per_block + lane * p.per_block / lanes] * factor;
      starts[lane] = 0;
    }
    for (int64_t at = 0; at < block; at += vector_bytes) {
      const int8_t* from = codes + b * block + at;
      for (int64_t lane = 0; lane < lanes; ++lane)
        for (int64_t i = 4 * lane; i < 4 * lane + 4; ++i) starts[lane] += from[i];
    }
    for (int64_t lane = 0; lane < lanes; ++lane) starts[lane] *= -job.weight->zero;
  }
}

template <int64_t VECTOR_BYTES>
void quantize_row(const Job& job, const void* x, Dtype dtype, int64_t row, Activation activation,
                  float given, int terms) {
  const Plan& p = job.plan;
  const int64_t k = job.weight->k;
  const size_t size = size_t(p.padded) * (2 * sizeof(float) + 1) + p.entries * sizeof(float);
  float* values = static_cast<float*>(memory_of(size));
  float *rest = values + p.padded, *scales = rest + p.padded;
  int8_t* natural = reinterpret_cast<int8_t*>(scales + p.entries);
  const char* at = static_cast<const char*>(x) + row * k * (dtype == kF32 ? 4 : 2);
  load_row(at, dtype, k, p.padded, values);
  float whole = given;
  if (activation == kToken) whole = symmetric_scale(magnitude(values, k));
  if (activation == kTensor && magnitude(values, k) > 0x7f800000u) whole = NAN;
  for (int64_t e = 0; e < p.entries; ++e) {
    const float* from = values + e * p.entry;
    scales[e] = activation == kGroup ? symmetric_scale(magnitude(from, p.entry)) : whole;
    const float unit = activation == kTensor ? given : scales[e];
    round_codes(from, p.entry, unit, natural + e * p.entry, rest + e * p.entry);
  }
  place_row(job, row * terms, natural, scales, 1.0f, VECTOR_BYTES);
  if (terms == 2) {
    round_rest(rest, p.padded, natural);
    place_row(job, row * terms + 1, natural, scales, 1.0f / 254.0f, VECTOR_BYTES);
  }
  std::free(values);
}

}  // namespace
}  // namespace mw
