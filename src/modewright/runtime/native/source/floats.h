// SPDX-License-Identifier: Apache-2.0
// Weights of small floating-point numbers, and of numbers from a table, as they are: products of few
// rows in float32, and unpacking for those of many. Included into each instruction set, as common.h
// is; vectors of 16 numbers become as many registers as there have to be.
#pragma once

#include "common.h"
#include "each.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace mw {
namespace {

typedef uint8_t Bytes __attribute__((vector_size(16)));
typedef uint16_t Halves __attribute__((vector_size(32)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef float Floats __attribute__((vector_size(64)));

constexpr int64_t kAtOnce = 16;
constexpr int64_t kFloatAhead = 4096;  // bytes that are fetched ahead

MW_INLINE Floats floats_at(const float* from) {
  Floats value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

// Of bfloat16.
MW_INLINE Floats floats_at(const uint16_t* from) {
  Halves halves;
  std::memcpy(&halves, from, sizeof halves);
#if defined(__AVX512F__)
  const Words bits = Words(_mm512_cvtepu16_epi32(__m256i(halves))) << 16;
#else
  const Words bits = __builtin_convertvector(halves, Words) << 16;
#endif
  Floats value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// How far the exponents of fp8 are from those of the numbers that of_bytes() makes of its bits.
MW_INLINE float unit_of_bytes(float factor) {
#if defined(__F16C__)
  return factor * 0x1p-112f;
#else
  return 1.0f;
#endif
}

// 16 fp8 numbers as float32, in units of unit_of_bytes(). Where there is an instruction for it they
// go by way of float16, whose smallest numbers it takes at full speed; many CPUs need a hundred
// cycles for a product with float32's. Otherwise `shift` brings their bits to those of a float32.
MW_INLINE Floats of_bytes(const uint8_t* from, int shift, float factor) {
#if defined(__F16C__)
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  const __m256i wide = _mm256_cvtepu8_epi16(raw);
  const __m256i sign = _mm256_slli_epi16(_mm256_and_si256(wide, _mm256_set1_epi16(0x80)), 8);
  const __m256i rest = _mm256_and_si256(wide, _mm256_set1_epi16(0x7f));
  const __m256i half = _mm256_or_si256(sign, _mm256_sll_epi16(rest, _mm_cvtsi32_si128(shift - 13)));
#if defined(__AVX512F__)
  return Floats(_mm512_cvtph_ps(half));
#else
  const __m256 halves[2] = {_mm256_cvtph_ps(_mm256_castsi256_si128(half)),
                            _mm256_cvtph_ps(_mm256_extracti128_si256(half, 1))};
  Floats value;
  std::memcpy(&value, halves, sizeof value);
  return value;
#endif
#else
  Bytes raw;
  std::memcpy(&raw, from, sizeof raw);
  const Words wide = __builtin_convertvector(raw, Words);
  const Words bits = (wide & 0x80) << 24 | (wide & 0x7f) << shift;
  Floats value;
  std::memcpy(&value, &bits, sizeof value);
  return value * factor;
#endif
}

enum Coded { kFloat8, kTable4 };  // floating-point numbers; codes of four bits that are looked up

// The codes of one weight, 16 at a time.
template <Coded CODED>
struct Numbers {
  static constexpr bool TABLE = CODED == kTable4;
  const uint8_t* row;
  int64_t bytes;
  int shift;
  float factor;
  const float* values;

  // Numbers i to i + 16; those beyond `count` are 0.
  MW_INLINE Floats at(int64_t i, int64_t count) const {
#if defined(__AVX512F__)
    if (TABLE && count >= kAtOnce) {
      const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(row + i / 2));
      const __m512i wide = _mm512_cvtepu8_epi64(eight);  // the upper four bits go one word up
      const __m512i codes = _mm512_or_si512(wide, _mm512_slli_epi64(wide, 28));
      const __m512i low = _mm512_and_si512(codes, _mm512_set1_epi32(15));
      return Floats(_mm512_permutexvar_ps(low, _mm512_loadu_ps(values)));
    }
#endif
    if (TABLE) {
      uint8_t codes[8] = {};
      std::memcpy(codes, row + i / 2, count < kAtOnce ? (count + 1) / 2 : 8);
      float found[kAtOnce];
      for (int64_t l = 0; l < kAtOnce; ++l)
        found[l] = l < count ? values[codes[l / 2] >> (4 * (l & 1)) & 15] : 0.0f;
      return floats_at(found);
    }
    if (count >= kAtOnce) return of_bytes(row + i, shift, factor);
    uint8_t some[kAtOnce] = {};
    std::memcpy(some, row + i, count);
    return of_bytes(some, shift, factor);
  }

  // Numbers i to i + 32.
  MW_INLINE void two_at(int64_t i, Floats (&two)[2]) const {
#if defined(__AVX512F__)
    if (!TABLE) {
      const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + i));
      const __m512i wide = _mm512_cvtepu8_epi16(raw), low = _mm512_set1_epi16(0x7f);
      const __m128i more = _mm_cvtsi32_si128(shift - 13);
      const __m512i rest = _mm512_sll_epi16(_mm512_and_si512(wide, low), more);
      const __m512i sign = _mm512_set1_epi16(int16_t(0x8000));
      const __m512i half = _mm512_ternarylogic_epi64(rest, _mm512_slli_epi16(wide, 8), sign, 0xf8);
      two[0] = Floats(_mm512_cvtph_ps(_mm512_castsi512_si256(half)));
      two[1] = Floats(_mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1)));
      return;
    }
#endif
    two[0] = at(i, kAtOnce);
    two[1] = at(i + kAtOnce, kAtOnce);
  }

  // What all these numbers are to be multiplied with.
  MW_INLINE float unit() const { return TABLE ? 1.0f : unit_of_bytes(factor); }
};

template <Coded CODED>
MW_INLINE Numbers<CODED> numbers_of(const Weight& w, int64_t n) {
  const int64_t bytes = (w.k * w.num_bits + 7) / 8;
  return {w.packed + n * w.packed_stride, bytes, w.float_shift, w.float_factor, w.values};
}

inline float sum_of(Floats lanes) {
  float parts[kAtOnce];
  std::memcpy(parts, &lanes, sizeof parts);
  for (int64_t half = kAtOnce / 2; half > 0; half /= 2)
    for (int64_t l = 0; l < half; ++l) parts[l] += parts[l + half];
  return parts[0];
}

inline int64_t groups_of(const Weight& w) {
  return w.group >= w.k ? 1 : (w.k + w.group - 1) / w.group;
}

// OUTS outputs of ROWS rows of x, each `x_stride` floats from the last: they share what is read of
// x. Sums of few are kept in several parts, so that no addition waits for the one before it.
template <Coded CODED, int ROWS, int OUTS>
MW_INLINE void float_block(const Weight& w, int64_t n, const float* x, int64_t x_stride,
                           const float* scales, int64_t groups, float* out) {
  constexpr int kParts = ROWS * OUTS == 1 ? 4 : ROWS * OUTS == 2 ? 2 : 1;
  constexpr int kPairs = kParts > 2 ? kParts / 2 : 1, kOther = kParts > 1 ? 1 : 0;
  constexpr int64_t kPair = 2 * kAtOnce, kStep = kPairs * kPair;
  const bool deep = fetches_deep();
  Numbers<CODED> numbers[OUTS];
  each<OUTS>(EACH(o) { numbers[o] = numbers_of<CODED>(w, n + o); });
  const int64_t group = groups == 1 ? w.k : w.group;
  Floats total[OUTS][ROWS] = {};
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t end = (g + 1) * group < w.k ? (g + 1) * group : w.k;
    Floats sum[kParts][OUTS][ROWS] = {};
    int64_t i = g * group;
    for (; i + kStep <= end; i += kStep)
      each<kPairs>(EACH(p) {
        const int64_t at = i + p * kPair;
        each<OUTS>(EACH(o) {
          fetch_line(numbers[o].row + at * w.num_bits / 8 + kFloatAhead, deep);
          Floats two[2];
          numbers[o].two_at(at, two);
          each<ROWS>(EACH(r) {
            const float* from = x + at + r * x_stride;
            sum[2 * p][o][r] += two[0] * floats_at(from);
            sum[2 * p + kOther][o][r] += two[1] * floats_at(from + kAtOnce);
          });
        });
      });
    for (; i < end; i += kAtOnce)
      each<OUTS>(EACH(o) {
        const Floats value = numbers[o].at(i, end - i);
        each<ROWS>(EACH(r) { sum[0][o][r] += value * floats_at(x + i + r * x_stride); });
      });
    each<OUTS>(EACH(o) {
      each<ROWS>(EACH(r) {
        for (int p = 1; p < kParts; ++p) sum[0][o][r] += sum[p][o][r];
        total[o][r] += sum[0][o][r] * scales[o * groups + g];
      });
    });
  }
  each<OUTS>(EACH(o) { each<ROWS>(EACH(r) { out[r * w.n + o] = sum_of(total[o][r]); }); });
}

template <Coded CODED, int OUTS>
MW_INLINE void float_rows(const Weight& w, int64_t n, const float* x, int64_t x_stride, int64_t rows,
                          float* scales, int64_t groups, float* out) {
  for (int o = 0; o < OUTS; ++o)
    scale_values(w, (n + o) / w.rows_per_scale * w.scale_stride, groups, scales + o * groups);
  const float unit = numbers_of<CODED>(w, n).unit();
  for (int64_t i = 0; i < OUTS * groups; ++i) scales[i] *= unit;
  int64_t r = 0;
  for (; rows - r >= 4; r += 4)
    float_block<CODED, 4, OUTS>(w, n, x + r * x_stride, x_stride, scales, groups, out + r * w.n + n);
  for (; rows - r >= 2; r += 2)
    float_block<CODED, 2, OUTS>(w, n, x + r * x_stride, x_stride, scales, groups, out + r * w.n + n);
  if (r < rows)
    float_block<CODED, 1, OUTS>(w, n, x + r * x_stride, x_stride, scales, groups, out + r * w.n + n);
}

template <Coded CODED>
void float_outputs(const Weight& w, const float* x, int64_t x_stride, int64_t rows, float* out,
                   int64_t first, int64_t last) {
  constexpr int kOuts = 4;
  const int64_t groups = groups_of(w);
  float* scales = static_cast<float*>(memory_of(size_t(kOuts * groups) * sizeof(float)));
  int64_t n = first;
  if (rows > 1)
    for (; n + kOuts <= last; n += kOuts)
      float_rows<CODED, kOuts>(w, n, x, x_stride, rows, scales, groups, out);
  for (; n < last; ++n) float_rows<CODED, 1>(w, n, x, x_stride, rows, scales, groups, out);
  std::free(scales);
}

MW_INLINE void store_floats(Floats value, float* to) { std::memcpy(to, &value, sizeof value); }

MW_INLINE void store_floats(Floats value, uint16_t* to) {
  Words bits;
  std::memcpy(&bits, &value, sizeof bits);
  bits = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // to the nearest, ties to even
#if defined(__AVX512F__)
  const Halves low = Halves(_mm512_cvtepi32_epi16(__m512i(bits)));
#else
  const Halves low = __builtin_convertvector(bits, Halves);
#endif
  std::memcpy(to, &low, sizeof low);
}

// Writes what rows `first` to `last` of a weight stand for: [last - first][k].
template <Coded CODED, class Out>
void unpack_rows(const Weight& w, Out* to, int64_t first, int64_t last) {
  const int64_t groups = groups_of(w), group = groups == 1 ? w.k : w.group;
  float* scales = static_cast<float*>(memory_of(size_t(groups) * sizeof(float)));
  const bool deep = fetches_deep();
  for (int64_t n = first; n < last; ++n) {
    const Numbers<CODED> numbers = numbers_of<CODED>(w, n);
    scale_values(w, n / w.rows_per_scale * w.scale_stride, groups, scales);
    Out* row = to + (n - first) * w.k;
    for (int64_t g = 0; g < groups; ++g) {
      const float scale = scales[g] * numbers.unit();
      const int64_t end = (g + 1) * group < w.k ? (g + 1) * group : w.k;
      int64_t i = g * group;
      for (; i + kAtOnce <= end; i += kAtOnce) {
        fetch_line(numbers.row + i * w.num_bits / 8 + kFloatAhead, deep);
        store_floats(numbers.at(i, kAtOnce) * scale, row + i);
      }
      if (i >= end) continue;
      Out rest[kAtOnce];
      store_floats(numbers.at(i, end - i) * scale, rest);
      std::memcpy(row + i, rest, (end - i) * sizeof(Out));
    }
  }
  std::free(scales);
}

template <class Out>
void unpack_as(const Weight& w, Out* to, int64_t first, int64_t last) {
  if (w.values) unpack_rows<kTable4>(w, to, first, last);
  else unpack_rows<kFloat8>(w, to, first, last);
}

inline void float_dot(const Weight& w, const float* x, int64_t x_stride, int64_t rows, float* out,
                      int64_t first, int64_t last) {
  if (w.values) float_outputs<kTable4>(w, x, x_stride, rows, out, first, last);
  else float_outputs<kFloat8>(w, x, x_stride, rows, out, first, last);
}

inline void float_unpack(const Weight& w, void* to, Dtype dtype, int64_t first, int64_t last) {
  if (dtype == kF32) unpack_as(w, static_cast<float*>(to), first, last);
  else unpack_as(w, static_cast<uint16_t*>(to), first, last);
}

}  // namespace
}  // namespace mw
