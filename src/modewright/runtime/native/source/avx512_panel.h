// SPDX-License-Identifier: Apache-2.0
// Part of avx512.cpp: the kernel for many rows. Thirty-two outputs are unpacked into panels in which
// a lane is an output, so nothing is added up across lanes; then all rows are multiplied by them.
#pragma once
#include "avx512_result.h"
#include "each.h"

namespace mw {
namespace {

MW_INLINE void transpose(__m512i (&rows)[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    rows[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    rows[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    rows[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    rows[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    rows[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    rows[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    rows[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    rows[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// Sixteen outputs, unpacked: lane i of every register belongs to output i.
struct Panel {
  uint8_t* codes;   // [padded / 4][16][4]
  float* scales;    // [entries][16]
  int32_t* shifts;  // [entries][16], only if there are zero points
};

void transpose_floats(const float* rows, int64_t stride, int64_t entries, float* to) {
  for (int64_t e = 0; e < entries; e += 16) {
    const int64_t count = entries - e < 16 ? entries - e : 16;
    __m512i block[16];
    for (int i = 0; i < 16; ++i)
      block[i] = _mm512_maskz_loadu_epi32(__mmask16((1u << count) - 1), rows + i * stride + e);
    transpose(block);
    for (int i = 0; i < count; ++i) _mm512_storeu_si512(to + (e + i) * kLanes, block[i]);
  }
}

// Outputs whose packed bytes are asked for while others are unpacked.
struct Soon {
  int64_t first, count;
  bool deep;  // see fetch_line()
};

template <Kind KIND, bool TABLE>
void unpack_panel(const Job& job, const Unpacker& u, int64_t n, const Panel& panel, float* work,
                  Soon soon) {
  constexpr int F = fields<KIND>();
  const Weight& w = *job.weight;
  const Plan& p = job.plan;
  const int64_t bytes = row_bytes(w);
  const uint8_t* rows[16];
  const int64_t width = (p.entries + 15) / 16 * 16;
  float* shifts = work + 16 * width;
  for (int i = 0; i < 16; ++i) {
    const int64_t output = n + i < w.n ? n + i : w.n - 1;
    rows[i] = w.packed + output * w.packed_stride;
    row_scales(w, p, u.groups, output, work + i * width, shifts + i * width);
  }
  transpose_floats(work, width, p.entries, panel.scales);
  if (w.zero_point) {
    transpose_floats(shifts, width, p.entries, reinterpret_cast<float*>(panel.shifts));
    for (int64_t e = 0; e < p.entries; ++e) {
      int32_t* at = panel.shifts + e * kLanes;
      _mm512_storeu_si512(at, _mm512_cvtps_epi32(_mm512_loadu_ps(at)));
    }
  }
  uint8_t* to = panel.codes;
  int64_t at = 0;
  const int64_t stride = w.packed_stride;
  const bool whole = n + 16 <= w.n;
  const uint8_t* later = w.packed + soon.first * stride;
  if (soon.first + soon.count > w.n) soon.count = 0;
  for (int64_t s = 0; s < p.blocks * p.block_steps; ++s, at += u.step_bytes) {
    __m512i block[16];
    for (int64_t i = 0; i < soon.count; ++i) fetch_line(later + i * stride + at, soon.deep);
    if (at + u.step_bytes <= bytes && whole)  // no 16 pointers: they do not fit the registers
      for (int i = 0; i < 16; ++i) block[i] = raw_step<KIND, false>(u, rows[0] + at + i * stride, 0);
    else if (at + u.step_bytes <= bytes)
      for (int i = 0; i < 16; ++i) block[i] = raw_step<KIND, false>(u, rows[i] + at, 0);
    else
      for (int i = 0; i < 16; ++i) block[i] = raw_step<KIND, true>(u, rows[i] + at, bytes - at);
    transpose(block);
    for (int i = 0; i < 16; ++i)
      for (int f = 0; f < F; ++f, to += kBytes)
        _mm512_store_si512(to, field<KIND, TABLE>(u, block[i], f));
  }
}

// Two panels by so many rows: sums, totals, and what they are made from fill the 32 registers.
constexpr int64_t kPanelRows = 7;

// Rows are cut into tiles of about the same height.
inline int64_t tile_end(int64_t rows, int64_t tile) {
  const int64_t tiles = (rows + kPanelRows - 1) / kPanelRows;
  return rows * (tile + 1) / tiles;
}

int64_t strips(const Job& job) { return (job.rows + kPanelRows - 1) / kPanelRows; }

// The int8 numbers of some rows as the panel kernel meets them: four of each row at a time.
void interleave(const Job& job, int64_t first, int64_t last) {
  const Plan& p = job.plan;
  const int64_t fields = p.fields, steps = p.padded / p.step;
  for (int64_t tile = first; tile < last; ++tile) {
    const int64_t row = tile_end(job.rows, tile - 1), count = tile_end(job.rows, tile) - row;
    const __mmask16 mask = first_lanes(count);
    const int8_t* from = job.codes + row * p.padded;
    int8_t* to = job.tiles + row * p.padded;
    for (int64_t s = 0; s < steps; ++s, from += fields * kBytes, to += p.step * count)
      for (int64_t f = 0; f < fields; ++f) {
        __m512i block[16];
        for (int64_t r = 0; r < 16; ++r)
          block[r] = r < count ? _mm512_loadu_si512(from + r * p.padded + f * kBytes)
                               : _mm512_setzero_si512();
        transpose(block);
        for (int64_t d = 0; d < 16; ++d)
          _mm512_mask_storeu_epi32(to + (d * fields + f) * count * 4, mask, block[d]);
      }
    for (int64_t e = 0, at = row * p.entries; e < p.entries; ++e)
      for (int64_t r = 0; r < count; ++r, ++at) {
        job.tile_scales[at] = job.scales[(row + r) * p.entries + e];
        job.tile_offsets[at] = -job.weight->zero * job.sums[(row + r) * p.entries + e];
      }
  }
}

// The packed bytes of the next panels, asked for little by little while these are multiplied.
struct Ahead {
  const uint8_t* at;
  int64_t stride;
};

template <int ROWS, int PANELS, bool SHIFTS>
void tile(const Job& job, const Panel (&panels)[PANELS], int64_t row, int64_t n, Ahead& ahead) {
  const Plan& p = job.plan;
  const int8_t* x = job.tiles + row * p.padded;
  const float* own = job.tile_scales + row * p.entries;
  const int32_t* offsets = job.tile_offsets + row * p.entries;
  const int32_t* sums = job.sums + row * p.entries;
  const int64_t fours = p.entry / 4;
  const uint8_t* codes = panels[0].codes;
  const int64_t further = panels[PANELS - 1].codes - codes;  // from one panel to the next
  const uint8_t* next = ahead.at;
  Store stores[PANELS];
  each<PANELS>(EACH(c) { stores[c] = Store(job, n + c * kLanes); });
  __m512 total[ROWS][PANELS];
  each<ROWS>(EACH(r) { each<PANELS>(EACH(c) { total[r][c] = stores[c].start; }); });
  for (int64_t e = 0; e < p.entries; ++e, own += ROWS, offsets += ROWS) {
    __m512i sum[ROWS][PANELS];
    each<ROWS>(EACH(r) {
      each<PANELS>(EACH(c) {
        sum[r][c] = _mm512_set1_epi32(offsets[r]);
        if (SHIFTS) {
          const __m512i shift = _mm512_loadu_si512(panels[c].shifts + e * kLanes);
          const __m512i of_codes = _mm512_set1_epi32(sums[r * p.entries + e]);
          sum[r][c] = _mm512_sub_epi32(sum[r][c], _mm512_mullo_epi32(of_codes, shift));
        }
      });
    });
    const uint8_t* end = codes + fours * kBytes;
    do {
      __m512i w[PANELS];
      each<PANELS>(EACH(c) { w[c] = _mm512_loadu_si512(codes + c * further); });
      each<ROWS>(EACH(r) {
        int32_t four;
        std::memcpy(&four, x + 4 * r, 4);
        const __m512i all = _mm512_set1_epi32(four);
        each<PANELS>(EACH(c) { accumulate(sum[r][c], w[c], all); });
      });
      x += 4 * ROWS;
      codes += kBytes;
      _mm_prefetch(reinterpret_cast<const char*>(next), _MM_HINT_T1);
      next += ahead.stride;
    } while (codes != end);
    __m512 scale[PANELS];
    each<PANELS>(EACH(c) { scale[c] = _mm512_loadu_ps(panels[c].scales + e * kLanes); });
    each<ROWS>(EACH(r) {
      const __m512 of_row = _mm512_set1_ps(own[r]);
      each<PANELS>(EACH(c) {
        const __m512 both = _mm512_mul_ps(scale[c], of_row);
        const __m512 product = _mm512_cvtepi32_ps(sum[r][c]);
        total[r][c] = _mm512_fmadd_ps(product, both, total[r][c]);
      });
    });
  }
  ahead.at = next;
  each<PANELS>(EACH(c) {
    const int64_t at = row * job.weight->n + n + c * kLanes;
    each<ROWS>(EACH(r) { stores[c].put(at + r * job.weight->n, total[r][c]); });
  });
}

template <int PANELS, bool SHIFTS>
void tiles(const Job& job, const Panel (&panels)[PANELS], int64_t n) {
  const int64_t bytes = PANELS * kLanes * job.weight->packed_stride;
  const int64_t turns = (job.rows + kPanelRows - 1) / kPanelRows * (job.plan.padded / 4);
  Ahead ahead{job.weight->packed + n * job.weight->packed_stride + bytes, bytes / turns + 1};
  for (int64_t row = 0, t = 0; row < job.rows; row = tile_end(job.rows, t++)) {
    switch (tile_end(job.rows, t) - row) {
      case 1: tile<1, PANELS, SHIFTS>(job, panels, row, n, ahead); break;
      case 2: tile<2, PANELS, SHIFTS>(job, panels, row, n, ahead); break;
      case 3: tile<3, PANELS, SHIFTS>(job, panels, row, n, ahead); break;
      case 4: tile<4, PANELS, SHIFTS>(job, panels, row, n, ahead); break;
      case 5: tile<5, PANELS, SHIFTS>(job, panels, row, n, ahead); break;
      case 6: tile<6, PANELS, SHIFTS>(job, panels, row, n, ahead); break;
      default: tile<kPanelRows, PANELS, SHIFTS>(job, panels, row, n, ahead);
    }
  }
}

// Panels that lie side by side.
class Panels {
 public:
  Panels(const Plan& p, int64_t count)
      : codes(p.padded * kLanes), numbers(4 * kLanes * ((p.entries + 15) / 16 * 16)),
        memory(static_cast<uint8_t*>(room_of(count * (codes + 2 * numbers)))) {}
  Panels(const Panels&) = delete;
  ~Panels() { std::free(memory); }

  Panel operator[](int64_t i) const {
    uint8_t* at = memory + i * (codes + 2 * numbers);
    return {at, reinterpret_cast<float*>(at + codes),
            reinterpret_cast<int32_t*>(at + codes + numbers)};
  }

 private:
  const int64_t codes, numbers;  // bytes
  uint8_t* const memory;
};

// MULTIPLY: says how many panels are unpacked before all rows are multiplied by them, and what is
// asked for while panel `c` of those at `n` is unpacked; and multiplies, with or without zero points
// of their own.
template <Kind KIND, bool TABLE, class MULTIPLY>
void panel_kind(const Job& job, int64_t first, int64_t last) {
  const Unpacker u(*job.weight);
  const int64_t all = (last - first + kLanes - 1) / kLanes, most = MULTIPLY::panels(job, all);
  const Panels panels(job.plan, most);
  const size_t width = (size_t(job.plan.entries) + 15) / 16 * 16;
  float* work = static_cast<float*>(memory_of(2 * 16 * width * sizeof(float)));
  for (int64_t done = 0; done < all; done += most) {
    const int64_t n = first + done * kLanes, count = all - done < most ? all - done : most;
    for (int64_t c = 0; c < count; ++c)
      unpack_panel<KIND, TABLE>(job, u, n + c * kLanes, panels[c], work,
                                MULTIPLY::soon(n, c, most));
    job.weight->zero_point ? MULTIPLY::template run<true>(job, panels, count, n)
                           : MULTIPLY::template run<false>(job, panels, count, n);
  }
  std::free(work);
}

}  // namespace
}  // namespace mw
