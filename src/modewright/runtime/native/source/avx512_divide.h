// SPDX-License-Identifier: Apache-2.0
// Many numbers divided by one, without dividing.
#pragma once
#include <immintrin.h>

namespace mw {
namespace {

// value / unit, as division rounds it (Markstein, "Computation of elementary functions on the IBM RISC
// System/6000 processor", 1990), where that is at most 1024 or more than what is wanted.
struct Divider {
  __m512 unit, inverse;
  bool divides;

  explicit Divider(float by) : unit(_mm512_set1_ps(by)), inverse(_mm512_set1_ps(1.0f / by)) {
    divides = !(by >= 1e-25f && by <= 1e25f);  // what is left over could underflow
  }

  __m512 operator()(__m512 value) const {
    if (divides) return _mm512_div_ps(value, unit);
    return corrected(clamp(_mm512_mul_ps(value, inverse), -1024, 1024), value);
  }

  // Of numbers of which none is larger than 1024 units, where no division is needed.
  __m512 within(__m512 value) const { return corrected(_mm512_mul_ps(value, inverse), value); }

  static __m512 clamp(__m512 value, float low, float high) {
    return _mm512_max_ps(_mm512_min_ps(value, _mm512_set1_ps(high)), _mm512_set1_ps(low));
  }

 private:
  __m512 corrected(__m512 about, __m512 value) const {
    return _mm512_fmadd_ps(_mm512_fnmadd_ps(about, unit, value), inverse, about);
  }
};

}  // namespace
}  // namespace mw
