// SPDX-License-Identifier: Apache-2.0
// The same arithmetic without vector instructions: right everywhere, and what others are tested by.
#include <vector>

#include "every_isa.h"

namespace mw {
namespace {

void dot(const Job& job, int64_t first, int64_t last) {
  const Weight& w = *job.weight;
  const Plan& p = job.plan;
  std::vector<float> scales(p.entries), shifts(p.entries, 0.0f);
  std::vector<uint8_t> numbers(p.padded, 0);
  for (int64_t n = first; n < last; ++n) {
    const uint8_t* packed = w.packed + n * w.packed_stride;
    const int64_t bytes = (w.k * w.num_bits + 7) / 8;
    entry_scales(w, p, n, scales.data(), shifts.data());
    for (int64_t i = 0; i < w.k; ++i) {
      const uint32_t code = code_at(packed, bytes, i, w.num_bits);
      numbers[i] = w.table ? w.table[code] : uint8_t(code);
    }
    for (int64_t r = 0; r < job.rows; ++r) {
      const int8_t* codes = job.codes + r * p.padded;
      const int32_t* sums = job.sums + r * p.entries;
      const float* own = job.scales + r * p.entries;
      float total = 0;
      for (int64_t e = 0; e < p.entries; ++e) {
        int32_t sum = -w.zero * sums[e];
        for (int64_t i = e * p.entry; i < (e + 1) * p.entry; ++i) sum += numbers[i] * codes[i];
        total += (float(sum) - shifts[e] * float(sums[e])) * (scales[e] * own[e]);
      }
      static_cast<float*>(job.result.y)[r * w.n + n] = total;
    }
  }
}

Isa made() {
  Isa isa = every_isa("scalar", 4);
  isa.quantize = quantize_row<4>;
  isa.dot = dot;
  return isa;
}

}  // namespace

const Isa* scalar_isa() {
  static const Isa isa = made();
  return &isa;
}

}  // namespace mw
