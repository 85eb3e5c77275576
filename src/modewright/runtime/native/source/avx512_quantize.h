// SPDX-License-Identifier: Apache-2.0
// Part of avx512.cpp: activations to int8.
#pragma once
#include "avx512_divide.h"
#include "avx512_unpack.h"

namespace mw {
namespace {

constexpr int64_t kStripRows = 32;  // that tiles have side by side

// Sixteen numbers of x, those beyond k as 0.
inline __m512 load_numbers(const void* x, Dtype dtype, int64_t at, int64_t k) {
  const __mmask16 mask = at >= k ? __mmask16(0) : first_lanes(k - at);
  if (dtype == kF32) return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(x) + at);
  const uint16_t* from = static_cast<const uint16_t*>(x) + at;
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

// Sixteen numbers that are all there.
inline __m512 load_sixteen(const void* x, Dtype dtype, int64_t at) {
  if (dtype == kF32) return _mm512_loadu_ps(static_cast<const float*>(x) + at);
  const void* from = static_cast<const uint16_t*>(x) + at;
  const __m256i narrow = _mm256_loadu_si256(static_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16));
}

inline uint32_t magnitude_at(const void* x, Dtype dtype, int64_t first, int64_t last, int64_t k) {
  __m512i largest = _mm512_setzero_si512();
  for (int64_t i = first; i < last; i += kLanes) {
    const __m512i bits = _mm512_castps_si512(load_numbers(x, dtype, i, k));
    largest = _mm512_max_epu32(largest, _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff)));
  }
  return _mm512_reduce_max_epu32(largest);
}

inline __m512i evens(__m512i a, __m512i b, int odd) {
  alignas(64) uint8_t places[64];
  for (int i = 0; i < 64; ++i) places[i] = uint8_t(2 * i + odd);
  return _mm512_permutex2var_epi8(a, _mm512_load_si512(places), b);
}

// One step from natural order into that of unpacked codes.
inline void permuted(int64_t fields, const int8_t* natural, __m512i out[4]) {
  __m512i in[4];
  for (int64_t f = 0; f < fields; ++f) in[f] = _mm512_loadu_si512(natural + f * kBytes);
  if (fields == 1) out[0] = in[0];
  if (fields == 2)
    for (int odd = 0; odd < 2; ++odd) out[odd] = evens(in[0], in[1], odd);
  if (fields == 4)
    for (int odd = 0; odd < 2; ++odd) {
      const __m512i low = evens(in[0], in[1], odd), high = evens(in[2], in[3], odd);
      for (int second = 0; second < 2; ++second) out[odd + 2 * second] = evens(low, high, second);
    }
}

// Writes the int8 numbers of a block, and what is known of it, into the job.
inline void place_block(const Job& job, int64_t row, int64_t b, const int8_t* natural,
                        const float* scales, float factor) {
  const Plan& p = job.plan;
  const int64_t size = p.block_steps * p.step, share = kLanes / p.per_block;
  int8_t* to = job.codes + row * p.padded + b * size;
  __m512i lanes = _mm512_setzero_si512();
  for (int64_t at = 0; at < size; at += p.step) {
    __m512i codes[4];
    permuted(p.fields, natural + at, codes);
    for (int64_t f = 0; f < p.fields; ++f) {
      _mm512_storeu_si512(to + at + f * kBytes, codes[f]);
      lanes = _mm512_dpbusd_epi32(lanes, _mm512_set1_epi8(1), codes[f]);
    }
  }
  alignas(64) int32_t of_lanes[kLanes];
  _mm512_store_si512(of_lanes, lanes);
  const int64_t first = row * p.blocks + b;
  _mm512_storeu_si512(job.starts + first * kLanes,
                      _mm512_mullo_epi32(lanes, _mm512_set1_epi32(-job.weight->zero)));
  for (int64_t e = 0; e < p.per_block; ++e) {
    int32_t sum = 0;
    const float own = scales[e] * factor;
    for (int64_t lane = e * share; lane < (e + 1) * share; ++lane) {
      sum += of_lanes[lane];
      job.lane_scales[first * kLanes + lane] = own;
    }
    job.sums[first * p.per_block + e] = sum;
    job.scales[first * p.per_block + e] = own;
  }
}

// Numbers in units of a scale, as far as they fit int8.
inline __m512 units(const Divider& divide, __m512 value) {
  return Divider::clamp(divide(value), -128, 127);
}

// Four registers of whole numbers as 64 of int8, in their order.
inline __m512i narrowed(const __m512i (&in)[4]) {
  const __m512i low = _mm512_packs_epi32(in[0], in[1]), high = _mm512_packs_epi32(in[2], in[3]);
  const __m512i fours = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_permutexvar_epi32(fours, _mm512_packs_epi16(low, high));
}

// Whether a row has one scale and its own order, and its length is whole registers.
inline bool is_whole(int64_t k, const Plan& p, int terms) {
  return p.entries == 1 && p.fields == 1 && k == p.padded && terms == 1;
}

// Such a row.
template <bool WITHIN>
void quantize_whole(const Job& job, const void* x, Dtype dtype, int64_t row, float scale) {
  const int64_t k = job.weight->k, size = dtype == kF32 ? 4 : 2;
  const Divider divide(scale);
  const int64_t strip = row / kStripRows * kStripRows, left = job.rows - strip;
  const int64_t stride = job.straight ? (left < kStripRows ? left : kStripRows) * kBytes : kBytes;
  int8_t* to = job.straight ? job.tiles + strip * k + (row - strip) * kBytes : job.codes + row * k;
  __m512i lanes = _mm512_setzero_si512();
  for (int64_t i = 0; i < k; i += kBytes, to += stride) {
    __m512i part[4];
    for (int q = 0; q < 4; ++q) {
      const __m512 value = load_sixteen(x, dtype, i + q * kLanes);
      part[q] = _mm512_cvtps_epi32(WITHIN ? divide.within(value) : units(divide, value));
    }
    const __m512i codes = narrowed(part);
    _mm512_storeu_si512(to, codes);
    lanes = _mm512_dpbusd_epi32(lanes, _mm512_set1_epi8(1), codes);
    for (int64_t q = 0; q < size; ++q)
      _mm_prefetch(static_cast<const char*>(x) + (k + i) * size + q * kBytes, _MM_HINT_T0);
  }
  _mm512_storeu_si512(job.starts + row * kLanes,
                      _mm512_mullo_epi32(lanes, _mm512_set1_epi32(-job.weight->zero)));
  _mm512_storeu_ps(job.lane_scales + row * kLanes, _mm512_set1_ps(scale));
  job.sums[row] = _mm512_reduce_add_epi32(lanes);
  job.scales[row] = scale;
}

void quantize(const Job& job, const void* x, Dtype dtype, int64_t row, Activation activation,
              float given, int terms) {
  const Plan& p = job.plan;
  const int64_t k = job.weight->k, size = p.block_steps * p.step;
  if (p.entry % kLanes) return quantize_row<kBytes>(job, x, dtype, row, activation, given, terms);
  const void* from = static_cast<const char*>(x) + row * k * (dtype == kF32 ? 4 : 2);
  float whole = given;
  if (activation == kToken || (activation == kGroup && p.entries == 1))
    whole = symmetric_scale(magnitude_at(from, dtype, 0, k, k));
  if (activation == kTensor && magnitude_at(from, dtype, 0, k, k) > 0x7f800000u) whole = NAN;
  if (is_whole(k, p, terms)) {
    const bool within = activation != kTensor && !Divider(whole).divides;
    return within ? quantize_whole<true>(job, from, dtype, row, whole)
                  : quantize_whole<false>(job, from, dtype, row, whole);
  }
  int8_t* natural = static_cast<int8_t*>(memory_of(2 * size));
  int8_t* rest = natural + size;
  for (int64_t b = 0; b < p.blocks; ++b) {
    float scales[kLanes];
    for (int64_t e = 0; e < p.per_block; ++e) {
      const int64_t first = b * size + e * p.entry;
      scales[e] = whole;
      if (activation == kGroup)
        scales[e] = symmetric_scale(magnitude_at(from, dtype, first, first + p.entry, k));
      const Divider divide(scales[e]);
      for (int64_t i = 0; i < p.entry; i += kLanes) {
        const __m512 value = units(divide, load_numbers(from, dtype, first + i, k));
        const __m512i codes = _mm512_cvtps_epi32(value);
        const int64_t at = e * p.entry + i;
        _mm_storeu_si128(reinterpret_cast<__m128i*>(natural + at), _mm512_cvtsepi32_epi8(codes));
        if (terms == 1) continue;
        const __m512 left = _mm512_sub_ps(value, _mm512_cvtepi32_ps(codes));
        const __m512i more = _mm512_cvtps_epi32(_mm512_mul_ps(left, _mm512_set1_ps(254)));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(rest + at), _mm512_cvtsepi32_epi8(more));
      }
    }
    place_block(job, row * terms, b, natural, scales, 1.0f);
    if (terms == 2) place_block(job, row * terms + 1, b, rest, scales, 1.0f / 254.0f);
  }
  std::free(natural);
}

}  // namespace
}  // namespace mw
