// SPDX-License-Identifier: Apache-2.0
// Part of avx512.cpp: from packed bytes to registers of codes.
#pragma once
#include <immintrin.h>

#include "common.h"

namespace mw {
namespace {

constexpr int64_t kLanes = 16, kBytes = 64;

// How codes come out of 64 bytes: four or two fields of each byte, the byte itself, or codes of 3,
// 5, 6, 7 bits, of which 64 are taken from a stream before (a "raw" register is then 64 codes).
enum Kind { kByte, kNibble, kCrumb, kStream };

template <Kind KIND>
constexpr int fields() { return KIND == kNibble ? 2 : KIND == kCrumb ? 4 : 1; }

// sum += w * x, four products of u8 x s8 in each lane. The intrinsic does the same, but with it
// GCC 12 keeps every sum in two registers, and the panel kernel spills them.
inline __attribute__((always_inline)) void accumulate(__m512i& sum, __m512i w, __m512i x) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
}

struct Unpacker {
  __m512i gather, shifts, mask, table;
  int64_t step_bytes, groups;
  __mmask64 step_mask;

  explicit Unpacker(const Weight& w) {
    alignas(64) uint8_t places[64], offsets[64];
    for (int i = 0; i < 64; ++i) {
      places[i] = uint8_t(i / 8 * w.num_bits + i % 8);
      offsets[i] = uint8_t(i % 8 * w.num_bits);
    }
    gather = _mm512_load_si512(places);
    shifts = _mm512_load_si512(offsets);
    mask = _mm512_set1_epi8(char((1 << w.num_bits) - 1));
    table = w.table ? _mm512_loadu_si512(w.table) : _mm512_setzero_si512();
    step_bytes = 64 / 8 * w.num_bits;
    if (8 % w.num_bits == 0) step_bytes = 64;
    step_mask = _bzhi_u64(~0ull, unsigned(step_bytes));
    groups = (w.k + w.group - 1) / w.group;
  }
};

// The bytes of one step; in the last steps of a row (TAIL) only `left` are inside it.
template <Kind KIND, bool TAIL>
inline __m512i raw_step(const Unpacker& u, const uint8_t* at, int64_t left) {
  __m512i bytes;
  if (TAIL) {
    const int64_t count = left < 0 ? 0 : left < u.step_bytes ? left : u.step_bytes;
    bytes = _mm512_maskz_loadu_epi8(_bzhi_u64(~0ull, unsigned(count)), at);
  } else if (KIND == kStream) {
    bytes = _mm512_maskz_loadu_epi8(u.step_mask, at);
  } else {
    bytes = _mm512_loadu_si512(at);
  }
  if (KIND != kStream) return bytes;
  const __m512i lanes = _mm512_permutexvar_epi8(u.gather, bytes);
  return _mm512_and_si512(_mm512_multishift_epi64_epi8(u.shifts, lanes), u.mask);
}

template <Kind KIND, bool TABLE>
inline __m512i field(const Unpacker& u, __m512i raw, int place) {
  __m512i codes = raw;
  if (KIND == kNibble)
    codes = _mm512_and_si512(place ? _mm512_srli_epi16(raw, 4) : raw, u.mask);
  if (KIND == kCrumb) codes = _mm512_and_si512(_mm512_srli_epi16(raw, 2 * place), u.mask);
  return TABLE ? _mm512_permutexvar_epi8(codes, u.table) : codes;
}

inline int64_t row_bytes(const Weight& w) { return (w.k * w.num_bits + 7) / 8; }

inline __mmask16 first_lanes(int64_t count) {
  return count >= kLanes ? __mmask16(0xffff) : __mmask16((1u << count) - 1);
}

// What entry_scales does, for the usual case: float16, one group in an entry.
inline void row_scales(const Weight& w, const Plan& p, int64_t groups, int64_t n, float* scales,
                       float* shifts) {
  const bool usual =
      w.scale_kind == kFloat16 && p.entry == w.group && (!w.zero_point || w.num_bits == 4);
  if (!usual) return entry_scales(w, p, n, scales, shifts);
  const int64_t row = w.rows_per_scale == 1 ? n : n / w.rows_per_scale;
  const uint16_t* from = static_cast<const uint16_t*>(w.scale) + row * w.scale_stride;
  const __m512 multiplier = _mm512_set1_ps(w.multiplier);
  for (int64_t g = 0; g < groups; g += kLanes) {
    const __m256i halves = _mm256_maskz_loadu_epi16(first_lanes(groups - g), from + g);
    _mm512_storeu_ps(scales + g, _mm512_mul_ps(_mm512_cvtph_ps(halves), multiplier));
  }
  if (!w.zero_point) return;
  const uint8_t* zeros = w.zero_point + row * w.zero_point_stride;
  const int64_t bytes = (groups + 1) / 2;
  for (int64_t g = 0; g < groups; g += kLanes) {
    const __m128i eight = _mm_maskz_loadu_epi8(first_lanes(bytes - g / 2) & 0xff, zeros + g / 2);
    const __m512i wide = _mm512_cvtepu8_epi64(eight);
    const __m512i both = _mm512_or_si512(wide, _mm512_slli_epi64(wide, 28));
    const __m512i codes = _mm512_and_si512(both, _mm512_set1_epi32(15));
    const __m512i above = _mm512_sub_epi32(codes, _mm512_set1_epi32(w.zero));
    _mm512_storeu_ps(shifts + g, _mm512_cvtepi32_ps(above));
  }
}

}  // namespace
}  // namespace mw
