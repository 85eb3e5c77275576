// SPDX-License-Identifier: Apache-2.0
// Part of avx512.cpp: results of many rows, on their way to where they belong.
#pragma once
#include "avx512_unpack.h"

namespace mw {
namespace {

// Numbers rounded to bfloat16: to the nearest, ties to even; NaN stays.
inline __m256i to_bfloat16(__m512 value) {
  const __m512i bits = _mm512_castps_si512(value), one = _mm512_set1_epi32(1);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
  const __m512i half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, half), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0)));
}

// Results of 16 outputs on their way to y, and the biases that they begin with.
struct Store {
  void* y;
  bool narrow;
  __m512 start = _mm512_setzero_ps();
  __mmask16 there;  // outputs

  Store() = default;
  MW_INLINE Store(const Job& job, int64_t n) : y(job.result.y), narrow(job.result.dtype == kBF16) {
    const int64_t left = job.weight->n - n;
    there = left > 0 ? first_lanes(left) : __mmask16(0);
    if (job.result.bias) start = _mm512_maskz_loadu_ps(there, job.result.bias + n);
  }
  inline void put(int64_t at, __m512 value) const {
    if (narrow) _mm256_mask_storeu_epi16(static_cast<uint16_t*>(y) + at, there, to_bfloat16(value));
    else _mm512_mask_storeu_ps(static_cast<float*>(y) + at, there, value);
  }
};

}  // namespace
}  // namespace mw
