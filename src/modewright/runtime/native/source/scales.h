// SPDX-License-Identifier: Apache-2.0
// Scales of least squared error for integers, group by group: the search of
// modewright.quantization.algorithms.mse, which says why these ranges are tried. Included into each
// instruction set, as common.h is.
#pragma once
#include "common.h"

namespace mw {
namespace {

constexpr int64_t kWide = 16;  // numbers that loops take at a time: sums do not depend on the set
constexpr int kUpdates = 2;
constexpr float kShifts[] = {0, 1, -1, 0};

inline float within(float value, float low, float high) {
  value = value < low ? low : value;
  return value > high ? high : value;
}

// Halves of the lanes meet, again and again, so that no sum waits for all before it.
inline float total_of(float* lanes) {
  for (int64_t half = kWide / 2; half > 0; half /= 2)
    for (int64_t l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  return lanes[0];
}

inline float least_of(const float* lanes) {
  float least = lanes[0];
  for (int64_t l = 1; l < kWide; ++l) least = lanes[l] < least ? lanes[l] : least;
  return least;
}

inline void lower(float& least, float value) { least = value < least ? value : least; }

inline float sound(float scale) { return scale < FLT_MIN ? 1.0f : scale; }

// What is left of NaN, and of numbers beyond [low, 1].
inline float part_of(float value, float low) { return value != value ? 1.0f : within(value, low, 1); }

// One group: its values, padded with zeros that count nothing, and the best scale so far.
struct GroupSearch {
  const ScaleSearch& s;
  const float* values;
  const float* counts;  // what the squared error of each counts
  int64_t padded;
  float scale, zero, error;

  float error_of(float width, float point) const {
    float lanes[kWide] = {};
    const float inverse = 1.0f / width;
    for (int64_t i = 0; i < padded; i += kWide)
      for (int64_t l = 0; l < kWide; ++l) {
        const float code = within(std::rint(values[i + l] * inverse) + point, s.low, s.high);
        const float change = (code - point) * width - values[i + l];
        lanes[l] += change * change * counts[i + l];
      }
    return total_of(lanes);
  }

  void offer(float width, float point) {
    width = sound(width);
    const float cost = error_of(width, point);
    if (!(cost < error)) return;
    scale = width;
    zero = point;
    error = cost;
  }

  void offer_range(float low, float high) {
    low = low < 0 ? low : 0;
    high = high > 0 ? high : 0;
    const float steps = s.high - s.low;
    const float width = sound(high / steps - low / steps);
    offer(width, within(std::rint(s.low - low / width), s.low, s.high));
  }

  // Offers the scale that is best for the codes, at a zero point nearby.
  void offer_fit(float shift) {
    const float point = s.has_zero ? within(zero + shift, s.low, s.high) : 0;
    const float inverse = 1.0f / scale;
    float above[kWide] = {}, below[kWide] = {};
    for (int64_t i = 0; i < padded; i += kWide)
      for (int64_t l = 0; l < kWide; ++l) {
        const float code = within(std::rint(values[i + l] * inverse) + point, s.low, s.high) - point;
        above[l] += code * counts[i + l] * values[i + l];
        below[l] += code * counts[i + l] * code;
      }
    offer(total_of(above) / total_of(below), point);
  }

  // By how much a value may change before it alone costs more than all do now.
  float tolerance(int64_t i) const { return std::sqrt(error / counts[i]); }

  void search_symmetric() {
    const float base = scale, extent = (s.high > -s.low ? s.high : -s.low) / s.high;
    float ends[kWide];  // how far values must reach, negated
    for (float& end : ends) end = INFINITY;
    for (int64_t i = 0; i < padded; i += kWide)
      for (int64_t l = 0; l < kWide; ++l)
        lower(ends[l], tolerance(i + l) - std::fabs(values[i + l]));
    float needed = -least_of(ends);
    needed /= base * s.high * extent;
    const float lowest = needed != needed ? s.shrink : within(needed, s.shrink, 1);
    const int places = 2 * s.steps;
    const float width = (s.highest - lowest) / places;
    offer(base / extent, 0);
    for (int place = 0; place < places; ++place) offer(base * (lowest + width * place), 0);
    const float centre = scale;
    for (int place = 1; place <= places; ++place)
      offer(centre + base * width * (2.0f * place / (places + 1) - 1), 0);
    for (int update = 0; update < kUpdates; ++update) offer_fit(0);
  }

  void search_range() {
    float lows[kWide] = {}, highs[kWide] = {}, low_ends[kWide], high_ends[kWide];
    for (int64_t l = 0; l < kWide; ++l) low_ends[l] = high_ends[l] = INFINITY;
    for (int64_t i = 0; i < padded; i += kWide)
      for (int64_t l = 0; l < kWide; ++l) {
        const float value = values[i + l], free = tolerance(i + l);
        lower(lows[l], value);
        lower(highs[l], -value);
        lower(low_ends[l], value + free);
        lower(high_ends[l], free - value);
      }
    const float low = least_of(lows), high = -least_of(highs);
    const float low_needed = least_of(low_ends), high_needed = -least_of(high_ends);
    const float low_part = part_of(low_needed / low, s.shrink);
    const float high_part = part_of(high_needed / high, s.shrink);
    const auto part = [this](float from, int place) {
      return from + (1 - from) * (float(place) / float(s.steps));
    };
    for (int place = 0; place < s.steps; ++place)
      offer_range(low * part(low_part, place), high * part(high_part, place));
    const float from = (s.low - zero) * scale;
    for (int place = 0; place < s.steps; ++place)
      offer_range(from, high * part(high_part, place));
    const float to = (s.high - zero) * scale;
    for (int place = 0; place < s.steps; ++place)
      offer_range(low * part(low_part, place), to);
    for (const float shift : kShifts) offer_fit(shift);
  }
};

// Rows `first` to `last`, each of `groups` groups of `size` values. The scales that are there are
// those to begin with.
inline void search_rows(const ScaleSearch& s, int64_t first, int64_t last) {
  const int64_t padded = (s.size + kWide - 1) / kWide * kWide;
  float* values = static_cast<float*>(memory_of(2 * size_t(padded) * sizeof(float)));
  float* counts = values + padded;
  for (int64_t at = first * s.groups; at < last * s.groups; ++at) {
    std::memcpy(values, s.values + at * s.size, s.size * sizeof(float));
    const int64_t place = s.counts_of_rows ? at : at % s.groups;
    for (int64_t i = 0; i < s.size; ++i) counts[i] = s.counts ? s.counts[place * s.size + i] : 1.0f;
    GroupSearch group{s, values, counts, padded, s.scale[at], s.has_zero ? s.zero[at] : 0, 0};
    group.error = group.error_of(group.scale, group.zero);
    s.has_zero ? group.search_range() : group.search_symmetric();
    s.scale[at] = group.scale;
    if (s.has_zero) s.zero[at] = group.zero;
  }
  std::free(values);
}

}  // namespace
}  // namespace mw
