// SPDX-License-Identifier: Apache-2.0
// AVX-512 with VNNI and VBMI: Intel since Ice Lake, AMD since Zen 4.
#include "common.h"
#include "each.h"

#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__)
#include <immintrin.h>

namespace mw {
namespace {

constexpr int64_t kLanes = 16, kBytes = 64;

// How codes come out of 64 bytes: four or two fields of each byte, the byte itself, or codes of 3,
// 5, 6, 7 bits, of which 64 are taken from a stream before (a "raw" register is then 64 codes).
enum Kind { kByte, kNibble, kCrumb, kStream };

template <Kind KIND>
constexpr int fields() { return KIND == kNibble ? 2 : KIND == kCrumb ? 4 : 1; }

// sum += w * x, four products of u8 x s8 in each lane. The intrinsic is the same, but GCC 12 then keeps
// every sum in two registers, and the panel kernel spills them.
inline __attribute__((always_inline)) void accumulate(__m512i& sum, __m512i w, __m512i x) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
}

struct Unpacker {
  __m512i gather, shifts, mask, table;
  int64_t step_bytes;
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
inline void row_scales(const Weight& w, const Plan& p, int64_t n, float* scales, float* shifts) {
  const bool usual =
      w.scale_kind == kFloat16 && p.entry == w.group && (!w.zero_point || w.num_bits == 4);
  if (!usual) return entry_scales(w, p, n, scales, shifts);
  const int64_t groups = (w.k + w.group - 1) / w.group;
  const int64_t row = n / w.rows_per_scale;
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
    _mm512_storeu_ps(shifts + g, _mm512_cvtepi32_ps(_mm512_sub_epi32(codes, _mm512_set1_epi32(w.zero))));
  }
}

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
        _mm_prefetch(reinterpret_cast<const char*>(packed[o] + at + kAhead), _MM_HINT_T0);
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

  static constexpr int64_t kAhead = 8192;
};

struct RowScales {  // of up to four outputs
  float* scales[4];
  float* shifts[4];
  __m512i lane_entry;  // which of a block's entries a lane belongs to
};

// What zero points other than the implied one take off an output.
inline float shift_of(const Job& job, int64_t row, const float* scales, const float* shifts) {
  const int64_t entries = job.plan.entries;
  const int32_t* sums = job.sums + row * entries;
  const float* own = job.scales + row * entries;
  __m512 total = _mm512_setzero_ps();
  for (int64_t e = 0; e < entries; e += kLanes) {
    const __mmask16 mask = first_lanes(entries - e);
    const __m512 sum = _mm512_cvtepi32_ps(_mm512_maskz_loadu_epi32(mask, sums + e));
    const __m512 x = _mm512_mul_ps(sum, _mm512_maskz_loadu_ps(mask, own + e));
    const __m512 weight = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, scales + e),
                                        _mm512_maskz_loadu_ps(mask, shifts + e));
    total = _mm512_fmadd_ps(x, weight, total);
  }
  return _mm512_reduce_add_ps(total);
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
  const int64_t full = dot.bytes / (p.block_steps * u.step_bytes);
  for (int64_t b = 0; b < full; ++b) dot.template block<false>(b);
  for (int64_t b = full; b < p.blocks; ++b) dot.template block<true>(b);
  for (int o = 0; o < OUTS; ++o)
    for (int r = 0; r < ROWS; ++r) {
      float result = _mm512_reduce_add_ps(dot.total[o][r]);
      if (w.zero_point) result -= shift_of(job, row + r, rs.scales[o], rs.shifts[o]);
      job.out[(row + r) * w.n + n + o] = result;
    }
}

template <Kind KIND, bool TABLE, int OUTS>
void dot_outputs(const Job& job, const Unpacker& u, int64_t n, const RowScales& rs) {
  for (int o = 0; o < OUTS; ++o)
    row_scales(*job.weight, job.plan, n + o, rs.scales[o], rs.shifts[o]);
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

template <Kind KIND, bool TABLE>
void dot_kind(const Job& job, int64_t first, int64_t last) {
  constexpr int kOuts = 1;
  const Unpacker u(*job.weight);
  const int64_t size = (job.plan.entries + 31) / 16 * 16;
  float* memory = static_cast<float*>(std::calloc(2 * kOuts * size, sizeof(float)));
  RowScales rs;
  for (int o = 0; o < kOuts; ++o) {
    rs.scales[o] = memory + 2 * o * size;
    rs.shifts[o] = memory + (2 * o + 1) * size;
  }
  alignas(64) int32_t lane_entry[kLanes];
  for (int64_t lane = 0; lane < kLanes; ++lane)
    lane_entry[lane] = int32_t(lane * job.plan.per_block / kLanes);
  rs.lane_entry = _mm512_load_si512(lane_entry);
  int64_t n = first;
  for (; n + kOuts <= last; n += kOuts) dot_outputs<KIND, TABLE, kOuts>(job, u, n, rs);
  for (; n < last; ++n) dot_outputs<KIND, TABLE, 1>(job, u, n, rs);
  std::free(memory);
}

inline void transpose(__m512i rows[16]) {
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

template <Kind KIND, bool TABLE>
void unpack_panel(const Job& job, const Unpacker& u, int64_t n, const Panel& panel, float* work) {
  constexpr int F = fields<KIND>();
  const Weight& w = *job.weight;
  const Plan& p = job.plan;
  const int64_t bytes = row_bytes(w);
  const uint8_t* rows[16];
  const int64_t stride = (p.entries + 15) / 16 * 16;
  float* shifts = work + 16 * stride;
  for (int i = 0; i < 16; ++i) {
    const int64_t output = n + i < w.n ? n + i : w.n - 1;
    rows[i] = w.packed + output * w.packed_stride;
    row_scales(w, p, output, work + i * stride, shifts + i * stride);
  }
  transpose_floats(work, stride, p.entries, panel.scales);
  if (w.zero_point) {
    transpose_floats(shifts, stride, p.entries, reinterpret_cast<float*>(panel.shifts));
    for (int64_t e = 0; e < p.entries; ++e) {
      int32_t* at = panel.shifts + e * kLanes;
      _mm512_storeu_si512(at, _mm512_cvtps_epi32(_mm512_loadu_ps(at)));
    }
  }
  uint8_t* to = panel.codes;
  int64_t at = 0;
  const int64_t ahead = n + 32 <= w.n ? 16 * w.packed_stride : 0;
  for (int64_t s = 0; s < p.blocks * p.block_steps; ++s, at += u.step_bytes) {
    __m512i block[16];
    for (int i = 0; i < 16; ++i)
      _mm_prefetch(reinterpret_cast<const char*>(rows[i] + ahead + at), _MM_HINT_T0);
    if (at + u.step_bytes <= bytes)
      for (int i = 0; i < 16; ++i) block[i] = raw_step<KIND, false>(u, rows[i] + at, 0);
    else
      for (int i = 0; i < 16; ++i) block[i] = raw_step<KIND, true>(u, rows[i] + at, bytes - at);
    transpose(block);
    for (int i = 0; i < 16; ++i)
      for (int f = 0; f < F; ++f, to += kBytes)
        _mm512_storeu_si512(to, field<KIND, TABLE>(u, block[i], f));
  }
}

constexpr int64_t kTileRows = 12;

// Rows are cut into tiles of about the same height.
inline int64_t tile_end(int64_t rows, int64_t tile) {
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  return rows * (tile + 1) / tiles;
}

// The int8 numbers of some rows as the panel kernel meets them: four of each row at a time.
void interleave(const Job& job) {
  const Plan& p = job.plan;
  const int64_t fields = p.fields, steps = p.padded / p.step;
  for (int64_t row = 0, tile = 0; row < job.rows; row = tile_end(job.rows, tile++)) {
    const int64_t count = tile_end(job.rows, tile) - row;
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
  }
}

template <int ROWS, int PANELS, bool SHIFTS>
void tile(const Job& job, const Panel* panels, int64_t row, int64_t n) {
  const Plan& p = job.plan;
  const int8_t* x = job.tiles + row * p.padded;
  const int64_t fours = p.entry / 4;
  const int64_t width = p.padded * kLanes;  // of a panel
  const uint8_t* codes = panels[0].codes;
  alignas(64) float total[ROWS][PANELS][kLanes];
  std::memset(total, 0, sizeof total);
  for (int64_t e = 0; e < p.entries; ++e) {
    __m512i sum[ROWS][PANELS];
    const int32_t* sums = job.sums + row * p.entries + e;
    each<ROWS>(EACH(r) {
      const int32_t of_codes = sums[r * p.entries];
      each<PANELS>(EACH(c) {
        sum[r][c] = _mm512_set1_epi32(-job.weight->zero * of_codes);
        if (SHIFTS) {
          const __m512i shift = _mm512_loadu_si512(panels[c].shifts + e * kLanes);
          const __m512i more = _mm512_mullo_epi32(_mm512_set1_epi32(of_codes), shift);
          sum[r][c] = _mm512_sub_epi32(sum[r][c], more);
        }
      });
    });
    const uint8_t* end = codes + fours * kBytes;
    do {
      __m512i w[PANELS];
      each<PANELS>(EACH(c) { w[c] = _mm512_loadu_si512(codes + c * width); });
      each<ROWS>(EACH(r) {
        int32_t four;
        std::memcpy(&four, x + 4 * r, 4);
        const __m512i all = _mm512_set1_epi32(four);
        each<PANELS>(EACH(c) { accumulate(sum[r][c], w[c], all); });
      });
      x += 4 * ROWS;
      codes += kBytes;
    } while (codes != end);
    const float* own = job.scales + row * p.entries + e;
    each<PANELS>(EACH(c) {
      const __m512 scale = _mm512_loadu_ps(panels[c].scales + e * kLanes);
      each<ROWS>(EACH(r) {
        const __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(own[r * p.entries]));
        const __m512 before = _mm512_load_ps(total[r][c]);
        _mm512_store_ps(total[r][c], _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[r][c]), both, before));
      });
    });
  }
  for (int c = 0; c < PANELS; ++c) {
    const __mmask16 mask = first_lanes(job.weight->n - n - c * kLanes);
    for (int r = 0; r < ROWS; ++r)
      _mm512_mask_storeu_ps(job.out + (row + r) * job.weight->n + n + c * kLanes, mask,
                            _mm512_load_ps(total[r][c]));
  }
}

template <int PANELS, bool SHIFTS>
void tiles(const Job& job, const Panel* panels, int64_t n) {
  for (int64_t row = 0, t = 0; row < job.rows; row = tile_end(job.rows, t++)) {
    switch (tile_end(job.rows, t) - row) {
      case 1: tile<1, PANELS, SHIFTS>(job, panels, row, n); break;
      case 2: tile<2, PANELS, SHIFTS>(job, panels, row, n); break;
      case 3: tile<3, PANELS, SHIFTS>(job, panels, row, n); break;
      case 4: tile<4, PANELS, SHIFTS>(job, panels, row, n); break;
      case 5: tile<5, PANELS, SHIFTS>(job, panels, row, n); break;
      case 6: tile<6, PANELS, SHIFTS>(job, panels, row, n); break;
      case 7: tile<7, PANELS, SHIFTS>(job, panels, row, n); break;
      case 8: tile<8, PANELS, SHIFTS>(job, panels, row, n); break;
      case 9: tile<9, PANELS, SHIFTS>(job, panels, row, n); break;
      case 10: tile<10, PANELS, SHIFTS>(job, panels, row, n); break;
      case 11: tile<11, PANELS, SHIFTS>(job, panels, row, n); break;
      default: tile<kTileRows, PANELS, SHIFTS>(job, panels, row, n);
    }
  }
}

template <Kind KIND, bool TABLE>
void panel_kind(const Job& job, int64_t first, int64_t last) {
  const Unpacker u(*job.weight);
  const Plan& p = job.plan;
  const size_t codes = size_t(p.padded) * kLanes, numbers = (size_t(p.entries) + 15) / 16 * 16 * kLanes * 4;
  const size_t size = (2 * (codes + 2 * numbers) + 2 * numbers + 127) / 64 * 64;
  uint8_t* memory = static_cast<uint8_t*>(std::aligned_alloc(64, size));
  std::memset(memory + 2 * codes, 0, size - 2 * codes);
  Panel panels[2];
  for (int c = 0; c < 2; ++c) {
    panels[c].codes = memory + c * codes;
    panels[c].scales = reinterpret_cast<float*>(memory + 2 * codes + c * 2 * numbers);
    panels[c].shifts = reinterpret_cast<int32_t*>(memory + 2 * codes + (c * 2 + 1) * numbers);
  }
  float* work = reinterpret_cast<float*>(memory + 2 * codes + 4 * numbers);
  for (int64_t n = first; n < last; n += 2 * kLanes) {
    const bool two = last - n > kLanes;
    for (int c = 0; c < 1 + two; ++c) unpack_panel<KIND, TABLE>(job, u, n + c * kLanes, panels[c], work);
    if (job.weight->zero_point) two ? tiles<2, true>(job, panels, n) : tiles<1, true>(job, panels, n);
    else two ? tiles<2, false>(job, panels, n) : tiles<1, false>(job, panels, n);
  }
  std::free(memory);
}

// Sixteen numbers of x, those beyond k as 0.
inline __m512 load_numbers(const void* x, Dtype dtype, int64_t at, int64_t k) {
  const __mmask16 mask = at >= k ? __mmask16(0) : first_lanes(k - at);
  if (dtype == kF32) return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(x) + at);
  const uint16_t* from = static_cast<const uint16_t*>(x) + at;
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
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

void quantize(const Job& job, const void* x, Dtype dtype, int64_t row, Activation activation,
              float given, int terms) {
  const Plan& p = job.plan;
  const int64_t k = job.weight->k, size = p.block_steps * p.step;
  if (p.entry % kLanes) return quantize_row<kBytes>(job, x, dtype, row, activation, given, terms);
  const void* from = static_cast<const char*>(x) + row * k * (dtype == kF32 ? 4 : 2);
  float whole = given;
  if (activation == kToken) whole = symmetric_scale(magnitude_at(from, dtype, 0, k, k));
  if (activation == kTensor && magnitude_at(from, dtype, 0, k, k) > 0x7f800000u) whole = NAN;
  int8_t* natural = static_cast<int8_t*>(std::malloc(2 * size));
  int8_t* rest = natural + size;
  for (int64_t b = 0; b < p.blocks; ++b) {
    float scales[kLanes];
    for (int64_t e = 0; e < p.per_block; ++e) {
      const int64_t first = b * size + e * p.entry;
      scales[e] = whole;
      if (activation == kGroup)
        scales[e] = symmetric_scale(magnitude_at(from, dtype, first, first + p.entry, k));
      const __m512 unit = _mm512_set1_ps(scales[e]);
      for (int64_t i = 0; i < p.entry; i += kLanes) {
        __m512 value = _mm512_div_ps(load_numbers(from, dtype, first + i, k), unit);
        value = _mm512_max_ps(_mm512_min_ps(value, _mm512_set1_ps(127)), _mm512_set1_ps(-128));
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

Kind kind_of(const Weight& w) {
  return w.num_bits == 8 ? kByte : w.num_bits == 4 ? kNibble : w.num_bits == 2 ? kCrumb : kStream;
}

void dot(const Job& job, int64_t first, int64_t last) {
  const bool table = job.weight->table != nullptr;
  switch (kind_of(*job.weight)) {
    case kByte: return dot_kind<kByte, false>(job, first, last);
    case kCrumb: return dot_kind<kCrumb, false>(job, first, last);
    case kNibble:
      return table ? dot_kind<kNibble, true>(job, first, last)
                   : dot_kind<kNibble, false>(job, first, last);
    default:
      return table ? dot_kind<kStream, true>(job, first, last)
                   : dot_kind<kStream, false>(job, first, last);
  }
}

void panel(const Job& job, int64_t first, int64_t last) {
  const bool table = job.weight->table != nullptr;
  switch (kind_of(*job.weight)) {
    case kByte: return panel_kind<kByte, false>(job, first, last);
    case kCrumb: return panel_kind<kCrumb, false>(job, first, last);
    case kNibble:
      return table ? panel_kind<kNibble, true>(job, first, last)
                   : panel_kind<kNibble, false>(job, first, last);
    default:
      return table ? panel_kind<kStream, true>(job, first, last)
                   : panel_kind<kStream, false>(job, first, last);
  }
}

const Isa kIsa = {"avx512", kBytes, 2, quantize, dot, interleave, panel};

}  // namespace

const Isa* avx512_isa() { return &kIsa; }

}  // namespace mw

#else

namespace mw {
const Isa* avx512_isa() { return nullptr; }
}  // namespace mw

#endif
