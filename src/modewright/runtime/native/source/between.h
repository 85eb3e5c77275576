// SPDX-License-Identifier: Apache-2.0
// What lies between linear layers: RMS norms, gated activations, and what formats leave of
// activations, each in one pass over memory.
// Included into each instruction set, as floats.h is.
#pragma once
#include <cfloat>
#include <cmath>

#if defined(__AVX512F__)
#include "avx512_divide.h"
#endif
#include "common.h"
#include "floats.h"

namespace mw {
namespace {

typedef int32_t Ints __attribute__((vector_size(64)));

// 2^x within 2e-7 of itself, for x from -126 to 127; beyond, what that gives or what is nearer.
MW_INLINE Floats exp2_of(Floats x) {
  const Floats low = Floats{} - 126.0f, high = Floats{} + 127.0f;
#if defined(__AVX512F__)
  x = Floats(_mm512_min_ps(__m512(high), _mm512_max_ps(__m512(low), __m512(x))));  // NaN stays
  const Floats whole = Floats(_mm512_roundscale_ps(__m512(x), _MM_FROUND_TO_NEAREST_INT));
#else
  x = x < low ? low : x > high ? high : x;
  const float magic = 0x1.8p23f;  // adding it rounds to a whole number, in the lowest bits
  const Floats moved = x + magic, whole = moved - magic;
#endif
  const Floats part = x - whole;
  Floats y = part * 1.5403530e-4f + 1.3333558e-3f;
  y = y * part + 9.6181291e-3f;
  y = y * part + 5.5504109e-2f;
  y = y * part + 2.4022651e-1f;
  y = y * part + 6.9314718e-1f;
  y = y * part + 1.0f;
#if defined(__AVX512F__)
  return Floats(_mm512_scalef_ps(__m512(y), __m512(whole)));
#else
  Ints bits, exponent;
  std::memcpy(&bits, &y, sizeof bits);
  std::memcpy(&exponent, &moved, sizeof exponent);
  bits += exponent << 23;  // the other bits of `magic` are shifted out
  std::memcpy(&y, &bits, sizeof y);
  return y;
#endif
}

// y = x / sqrt(mean(x^2) + eps) * weight, for each row of `n`.
template <class X, class W>
void norm_rows(const X* x, const W* weight, X* y, int64_t n, float eps, int64_t first,
               int64_t last) {
  const int64_t whole = n / kAtOnce * kAtOnce;
  for (int64_t r = first; r < last; ++r) {
    const X* from = x + r * n;
    X* to = y + r * n;
    Floats sums[4] = {};
    int64_t i = 0;
    for (; i + 4 * kAtOnce <= n; i += 4 * kAtOnce)
      each<4>(EACH(place) {
        const Floats value = floats_at(from + i + place * kAtOnce);
        sums[place] += value * value;
      });
    for (; i < whole; i += kAtOnce) sums[0] += floats_at(from + i) * floats_at(from + i);
    float total = sum_of(sums[0] + sums[1] + (sums[2] + sums[3]));
    for (; i < n; ++i) total += float_at(from + i) * float_at(from + i);
    const float factor = 1.0f / std::sqrt(total / float(n) + eps);
    for (i = 0; i < whole; i += kAtOnce)
      store_floats(floats_at(from + i) * factor * floats_at(weight + i), to + i);
    for (; i < n; ++i) store_float(float_at(from + i) * factor * float_at(weight + i), to + i);
  }
}

void rms_norm(const void* x, const void* weight, void* y, Dtype dtype, Dtype of_weight, int64_t n,
              float eps, int64_t first, int64_t last) {
  const float *x32 = static_cast<const float*>(x), *w32 = static_cast<const float*>(weight);
  const uint16_t *x16 = static_cast<const uint16_t*>(x), *w16 = static_cast<const uint16_t*>(weight);
  float* y32 = static_cast<float*>(y);
  uint16_t* y16 = static_cast<uint16_t*>(y);
  const bool wide = of_weight == kF32;
  if (dtype == kF32)
    wide ? norm_rows(x32, w32, y32, n, eps, first, last)
         : norm_rows(x32, w16, y32, n, eps, first, last);
  else
    wide ? norm_rows(x16, w32, y16, n, eps, first, last)
         : norm_rows(x16, w16, y16, n, eps, first, last);
}

// gate = gate / (1 + exp(-gate)) * up: a SiLU and a product, in the memory of `gate`.
template <class T>
void gate_numbers(T* gate, const T* up, int64_t first, int64_t last) {
  const float log2e = 1.44269504f;
  int64_t i = first;
  for (; i + kAtOnce <= last; i += kAtOnce) {
    const Floats value = floats_at(gate + i);
    store_floats(value / (exp2_of(value * -log2e) + 1.0f) * floats_at(up + i), gate + i);
  }
  for (; i < last; ++i) {
    const float value = float_at(gate + i);
    store_float(value / (std::exp(-value) + 1.0f) * float_at(up + i), gate + i);
  }
}

void silu_gate(void* gate, const void* up, Dtype dtype, int64_t first, int64_t last) {
  if (dtype == kF32)
    gate_numbers(static_cast<float*>(gate), static_cast<const float*>(up), first, last);
  else
    gate_numbers(static_cast<uint16_t*>(gate), static_cast<const uint16_t*>(up), first, last);
}

// Numbers in units of a scale to the nearest that a format has, ties to even, saturated; in those
// units. What is added and taken away has a last digit as large as the step between its numbers.
struct E4m3 {  // fp8
  static constexpr float kLowest = -448.0f, kHighest = 448.0f;
  static MW_INLINE Floats magic(Floats value) {
    const Floats smallest = Floats{} + 0x1p-6f;  // that has an exponent
    Words bits;
    std::memcpy(&bits, &value, sizeof bits);
    bits &= 0x7f800000u;
    Floats power;
    std::memcpy(&power, &bits, sizeof power);
    power = power < smallest ? smallest : power;
    return power * 0x1.8p20f;
  }
};

struct Int8 {
  static constexpr float kLowest = -128.0f, kHighest = 127.0f;
  static MW_INLINE Floats magic(Floats) { return Floats{} + 0x1.8p23f; }
};

template <class FORMAT>
struct Nearest {
  const float scale;
#if defined(__AVX512F__)
  const Divider divide{scale};
  MW_INLINE Floats units(Floats x) const { return Floats(divide(__m512(x))); }
#else
  MW_INLINE Floats units(Floats x) const { return x / (Floats{} + scale); }
#endif

  MW_INLINE Floats operator()(Floats x) const {
    const Floats low = Floats{} + FORMAT::kLowest, high = Floats{} + FORMAT::kHighest;
    Floats value = units(x);
    value = value > high ? high : value < low ? low : value;
    const Floats magic = FORMAT::magic(value);
    return ((value + magic) - magic) * scale;
  }
};

// The scale of `n` numbers: a given one, or their own; NaN if a number is infinite or none.
template <class FORMAT, class T>
MW_INLINE float rounding_scale(const T* from, int64_t n, float given) {
  const int64_t whole = n / kAtOnce * kAtOnce;
  T rest[kAtOnce] = {};
  std::memcpy(rest, from + whole, (n - whole) * sizeof(T));
  Words most = {};
  for (int64_t i = 0; i <= whole; i += kAtOnce) {
    const Floats value = floats_at(i < whole ? from + i : rest);
    Words bits;
    std::memcpy(&bits, &value, sizeof bits);
    bits &= 0x7fffffffu;
    most = bits > most ? bits : most;
  }
  uint32_t largest = 0;
  for (int64_t l = 0; l < kAtOnce; ++l) largest = most[l] > largest ? most[l] : largest;
  if (largest >= 0x7f800000u) return NAN;
  const float own = float_of(largest) / FORMAT::kHighest;
  return given > 0.0f ? given : own < FLT_MIN ? 1.0f : own;
}

// What a format leaves of rows of `n` numbers, in their own scales or a given one; false where it is
// not said what that is: a number is infinite or none.
template <class FORMAT, class T>
bool round_rows(const T* x, T* y, int64_t n, float given, int64_t first, int64_t last) {
  const int64_t whole = n / kAtOnce * kAtOnce;
  for (int64_t r = first; r < last; ++r) {
    const T* from = x + r * n;
    T* to = y + r * n;
    const float scale = rounding_scale<FORMAT>(from, n, given);
    if (std::isnan(scale)) return false;
    const Nearest<FORMAT> nearest{scale};
    for (int64_t i = 0; i < whole; i += kAtOnce) store_floats(nearest(floats_at(from + i)), to + i);
    T rest[kAtOnce] = {};
    std::memcpy(rest, from + whole, (n - whole) * sizeof(T));
    store_floats(nearest(floats_at(rest)), rest);
    std::memcpy(to + whole, rest, (n - whole) * sizeof(T));
  }
  return true;
}

template <class FORMAT>
bool round_to(const void* x, void* y, Dtype dtype, int64_t n, float scale, int64_t first,
              int64_t last) {
  if (dtype == kF32)
    return round_rows<FORMAT>(static_cast<const float*>(x), static_cast<float*>(y), n, scale, first,
                              last);
  const uint16_t* from = static_cast<const uint16_t*>(x);
  return round_rows<FORMAT>(from, static_cast<uint16_t*>(y), n, scale, first, last);
}

bool round_numbers(const void* x, void* y, Dtype dtype, Rounding to, int64_t n, float scale,
                   int64_t first, int64_t last) {
  return to == kToInt8 ? round_to<Int8>(x, y, dtype, n, scale, first, last)
                       : round_to<E4m3>(x, y, dtype, n, scale, first, last);
}

}  // namespace
}  // namespace mw
