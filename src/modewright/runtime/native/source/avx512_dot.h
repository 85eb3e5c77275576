// SPDX-License-Identifier: Apache-2.0
// Part of avx512.cpp: the kernel for few rows.
#pragma once
#include "avx512_unpack.h"
#include "each.h"

namespace mw {
namespace {

// Few rows: a register holds codes of one output; lanes are added up at the end of the row. OUTS
// outputs at a time share what is read of x.
template <Kind KIND, bool TABLE, int ROWS, int OUTS>
struct Dot {
  static constexpr int F = fields<KIND>();
  const Unpacker& u;
  const uint8_t* packed[OUTS];
  const float* scales[OUTS];
  const int8_t* codes;
  const int32_t* starts;
  const float* lane_scales;
  int64_t bytes, steps, per_block, row_codes, row_lanes;
  __m512i lane_entry;
  __m512 total[OUTS][ROWS];

  template <bool TAIL>
  inline __attribute__((always_inline)) void block(int64_t b) {
    __m512i sum[OUTS][ROWS];
    each<OUTS>(EACH(o) {
      each<ROWS>(EACH(r) { sum[o][r] = _mm512_loadu_si512(starts + r * row_lanes + b * kLanes); });
    });
    int64_t at = b * steps * u.step_bytes;
    const int8_t* from = codes + b * steps * F * kBytes;
    const int8_t* end = from + steps * F * kBytes;
    do {
      each<OUTS>(EACH(o) {
        fetch_line(packed[o] + at + ahead, deep);
        const __m512i raw = raw_step<KIND, TAIL>(u, packed[o] + at, bytes - at);
        each<F>(EACH(f) {
          const __m512i unpacked = field<KIND, TABLE>(u, raw, f);
          each<ROWS>(EACH(r) {
            const __m512i x = _mm512_loadu_si512(from + r * row_codes + f * kBytes);
            accumulate(sum[o][r], unpacked, x);
          });
        });
      });
      at += u.step_bytes;
      from += F * kBytes;
    } while (from != end);
    each<OUTS>(EACH(o) {
      const __m512 scale =
          _mm512_permutexvar_ps(lane_entry, _mm512_loadu_ps(scales[o] + b * per_block));
      each<ROWS>(EACH(r) {
        const __m512 own = _mm512_loadu_ps(lane_scales + r * row_lanes + b * kLanes);
        total[o][r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[o][r]), _mm512_mul_ps(scale, own),
                                      total[o][r]);
      });
    });
  }

  const bool deep = fetches_deep();
  const int64_t ahead = deep ? 12288 : 8192;
};

struct RowScales {  // of up to four outputs
  float* scales[4];
  float* shifts[4];
  __m512i lane_entry;   // which of a block's entries a lane belongs to
  int64_t full_blocks;  // those without bytes beyond the row
};

// Takes off the lanes of a row's totals what zero points other than the implied one add to outputs.
template <int OUTS>
inline void take_shifts(const Job& job, int64_t row, const RowScales& rs, __m512 totals[OUTS]) {
  const int64_t entries = job.plan.entries;
  const int32_t* sums = job.sums + row * entries;
  const float* own = job.scales + row * entries;
  for (int64_t e = 0; e < entries; e += kLanes) {
    const __mmask16 mask = first_lanes(entries - e);
    const __m512 sum = _mm512_cvtepi32_ps(_mm512_maskz_loadu_epi32(mask, sums + e));
    const __m512 x = _mm512_mul_ps(sum, _mm512_maskz_loadu_ps(mask, own + e));
    each<OUTS>(EACH(o) {
      const __m512 weight = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, rs.scales[o] + e),
                                          _mm512_maskz_loadu_ps(mask, rs.shifts[o] + e));
      totals[o] = _mm512_fnmadd_ps(x, weight, totals[o]);
    });
  }
}

constexpr int64_t kScalesAhead = 96;  // outputs

// Adds up the lanes of totals, and writes the sums side by side.
inline void store_sums(const __m512 (&totals)[1], float* to) {
  to[0] = _mm512_reduce_add_ps(totals[0]);
}

inline __m256 halved(__m512 value) {
  const __m256 high = _mm512_extractf32x8_ps(value, 1);
  return _mm256_add_ps(_mm512_castps512_ps256(value), high);
}

inline void store_sums(const __m512 (&totals)[2], float* to) {
  const __m256 both = _mm256_hadd_ps(halved(totals[0]), halved(totals[1]));
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
  four = _mm_hadd_ps(four, four);
  _mm_storel_pi(reinterpret_cast<__m64*>(to), four);
}

inline void store_sums(const __m512 (&totals)[4], float* to) {
  const __m256 low = _mm256_hadd_ps(halved(totals[0]), halved(totals[1]));
  const __m256 high = _mm256_hadd_ps(halved(totals[2]), halved(totals[3]));
  const __m256 all = _mm256_hadd_ps(low, high);
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
}

template <Kind KIND, bool TABLE, int ROWS, int OUTS>
void dot_rows(const Job& job, const Unpacker& u, int64_t n, int64_t row, const RowScales& rs) {
  const Weight& w = *job.weight;
  const Plan& p = job.plan;
  Dot<KIND, TABLE, ROWS, OUTS> dot{u};
  for (int o = 0; o < OUTS; ++o) {
    dot.packed[o] = w.packed + (n + o) * w.packed_stride;
    dot.scales[o] = rs.scales[o];
    for (int r = 0; r < ROWS; ++r) dot.total[o][r] = _mm512_setzero_ps();
  }
  dot.codes = job.codes + row * p.padded;
  dot.starts = job.starts + row * p.blocks * kLanes;
  dot.lane_scales = job.lane_scales + row * p.blocks * kLanes;
  dot.bytes = row_bytes(w);
  dot.steps = p.block_steps;
  dot.per_block = p.per_block;
  dot.row_codes = p.padded;
  dot.row_lanes = p.blocks * kLanes;
  dot.lane_entry = rs.lane_entry;
  const int64_t full = rs.full_blocks;
  for (int64_t b = 0; b < full; ++b) dot.template block<false>(b);
  for (int64_t b = full; b < p.blocks; ++b) dot.template block<true>(b);
  each<ROWS>(EACH(r) {
    __m512 totals[OUTS];
    each<OUTS>(EACH(o) { totals[o] = dot.total[o][r]; });
    if (w.zero_point) take_shifts<OUTS>(job, row + r, rs, totals);
    store_sums(totals, static_cast<float*>(job.result.y) + (row + r) * w.n + n);
  });
}

template <Kind KIND, bool TABLE, int OUTS>
void dot_outputs(const Job& job, const Unpacker& u, int64_t n, const RowScales& rs) {
  fetch_scales(*job.weight, n + kScalesAhead, OUTS);
  for (int o = 0; o < OUTS; ++o)
    row_scales(*job.weight, job.plan, u.groups, n + o, rs.scales[o], rs.shifts[o]);
  constexpr int kHalf = OUTS > 1 ? OUTS / 2 : 1;
  int64_t row = 0;
  for (; job.rows - row >= 4; row += 4)
    for (int o = 0; o < OUTS; o += kHalf) {
      RowScales part = rs;
      for (int i = 0; i < kHalf; ++i) {
        part.scales[i] = rs.scales[o + i];
        part.shifts[i] = rs.shifts[o + i];
      }
      dot_rows<KIND, TABLE, 4, kHalf>(job, u, n + o, row, part);
    }
  if (job.rows - row >= 2) {
    dot_rows<KIND, TABLE, 2, OUTS>(job, u, n, row, rs);
    row += 2;
  }
  if (job.rows - row >= 1) dot_rows<KIND, TABLE, 1, OUTS>(job, u, n, row, rs);
}

// Outputs are read side by side, which shares what is read of x, where their rows are short. Long
// ones keep memory busier one after the other.
constexpr int64_t kShortRow = 1024;  // bytes

template <Kind KIND, bool TABLE>
void dot_kind(const Job& job, int64_t first, int64_t last) {
  constexpr int kOuts = 4;
  const Plan& p = job.plan;
  const Unpacker u(*job.weight);
  const int64_t size = (p.entries + 31) / 16 * 16;
  float* memory = static_cast<float*>(memory_of(2 * kOuts * size * sizeof(float)));
  RowScales rs;
  for (int o = 0; o < kOuts; ++o) {
    rs.scales[o] = memory + 2 * o * size;
    rs.shifts[o] = memory + (2 * o + 1) * size;
  }
  alignas(64) int32_t lane_entry[kLanes];
  for (int64_t lane = 0; lane < kLanes; ++lane)
    lane_entry[lane] = int32_t(lane * p.per_block / kLanes);
  rs.lane_entry = _mm512_load_si512(lane_entry);
  rs.full_blocks = row_bytes(*job.weight) / (p.block_steps * u.step_bytes);
  int64_t n = first;
  if (job.weight->packed_stride <= kShortRow)
    for (; n + kOuts <= last; n += kOuts) dot_outputs<KIND, TABLE, kOuts>(job, u, n, rs);
  for (; n < last; ++n) dot_outputs<KIND, TABLE, 1>(job, u, n, rs);
  std::free(memory);
}

}  // namespace
}  // namespace mw
