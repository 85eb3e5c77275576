// SPDX-License-Identifier: Apache-2.0
// Part of avx512.cpp: the kernel for many rows on CPUs with AMX. Panels are what a tile of weights
// is: 16 outputs by 64 inputs. 32 rows and 32 outputs at a time are multiplied in tiles.
#pragma once
#include "avx512_panel.h"
#include "floats.h"

// Compilers that know AMX; it takes Linux to be allowed to use it.
#if defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#include <sys/syscall.h>
#include <unistd.h>

#define MW_AMX __attribute__((target("amx-tile,amx-int8")))

namespace mw {
namespace {

constexpr int64_t kAmxRows = 16;  // of a tile

constexpr int64_t kHundreds = 192;  // rows, up to which a weight is better read than kept

// Whether the CPU has tiles, and the system lets this process use them.
inline bool amx_usable() {
  unsigned a, b, c, d;
  const bool there = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 24 & 3) == 3;
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM of Linux
  return there && syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}

// Whether there are also those for bfloat16, and AVX-512 for it.
inline bool amx_bf16_usable() {
  unsigned a, b, c, d, a1, other;
  const bool there = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1) &&
                     __get_cpuid_count(7, 1, &a1, &other, &other, &other) && (a1 >> 5 & 1);
  return there && amx_usable();
}

struct alignas(64) TileShapes {
  uint8_t palette = 1, start = 0, unused[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Short entries leave tiles half empty: registers are faster then.
inline bool fills_tiles(const Plan& p) { return p.entry % kBytes == 0; }

// Tiles 0 to 3: sums of both halves of the rows by both panels; 4, 5: rows; 6, 7: panels.
MW_AMX inline void shape_tiles(int64_t rows) {
  TileShapes shapes;
  const int64_t low = rows < kAmxRows ? rows : kAmxRows, high = rows - low;
  for (int t = 0; t < 6; ++t) {
    shapes.rows[t] = uint8_t(t & 1 ? high : low);
    shapes.row_bytes[t] = uint16_t(shapes.rows[t] ? kBytes : 0);
  }
  for (int t = 6; t < 8; ++t) {
    shapes.rows[t] = kBytes / 4;
    shapes.row_bytes[t] = kBytes;
  }
  _tile_loadconfig(&shapes);
}

// Registers a and b in turns, 32 bits at a time.
inline void in_turns(__m512i& a, __m512i& b) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i both = _mm512_permutex2var_epi32(a, low, b);
  b = _mm512_permutex2var_epi32(a, _mm512_add_epi32(low, _mm512_set1_epi32(8)), b);
  a = both;
}

// Where the tiles of 64 inputs lie of a block of up to 32 rows: these are kBytes apart, so that both
// tiles are one run of memory, and rows of 4096 numbers do not meet in one line of the cache.
inline int64_t tile_at(int64_t row, int64_t rows, int64_t chunk, int64_t padded) {
  return row * padded + chunk * rows * kBytes;
}

// The int8 numbers of a strip of 32 rows as tiles, in the order in which panels have their inputs.
inline void interleave_rows(const Job& job, int64_t strip) {
  const Plan& p = job.plan;
  const int64_t fields = p.fields, steps = p.padded / p.step, row = strip * 2 * kAmxRows;
  const int64_t left = job.rows - row, rows = left < 2 * kAmxRows ? left : 2 * kAmxRows;
  for (int64_t i = row * p.entries; i < (row + rows) * p.entries; ++i)
    job.tile_offsets[i] = -job.weight->zero * job.sums[i];
  if (job.straight) return;
  for (int64_t r = 0; r < rows; ++r) {
    const int8_t* from = job.codes + (row + r) * p.padded;
    int8_t* to = job.tiles + tile_at(row, rows, 0, p.padded) + r * kBytes;
    for (int64_t s = 0; s < steps; ++s) {
      __m512i part[4];
      for (int64_t f = 0; f < fields; ++f, from += kBytes) part[f] = _mm512_loadu_si512(from);
      if (fields == 4) {
        in_turns(part[0], part[2]);
        in_turns(part[1], part[3]);
        in_turns(part[0], part[1]);
        in_turns(part[2], part[3]);
      } else if (fields == 2) {
        in_turns(part[0], part[1]);
      }
      for (int64_t f = 0; f < fields; ++f, to += rows * kBytes) _mm512_storeu_si512(to, part[f]);
    }
  }
}

// Of the next outputs' codes most are asked for while these are unpacked: of 16, so many. Tiles are
// kept waiting by more than a few.
constexpr int64_t kAmxSoon = 12;

// The others, little by little while these are multiplied.
struct TileAhead {
  const uint8_t* at = nullptr;
  int64_t bytes = 0;                       // at a step
  int64_t length = INT64_MAX, stride = 0;  // of what lies side by side, and from one to the next
  int64_t place = 0;

  MW_INLINE void step() {
    for (int64_t i = 0; i < bytes; i += kBytes) fetch_line(at + place + i, true);
    place += bytes;
    if (place < length) return;
    place -= length;
    at += stride;
  }
};

using EntrySums = int32_t[2][2 * kAmxRows][kLanes];  // of two panels by 32 rows
using EntryTotals = float[2][2 * kAmxRows][kLanes];

// The sums of an entry on their way to the totals, as numbers, and from the last entry to the
// output.
template <bool TWO, bool SHIFTS>
struct EntryResults {
  static constexpr int kPanels = 1 + TWO;

  EntryTotals& totals;
  const EntrySums* sums = nullptr;
  const float* of_rows = nullptr;  // scales
  const int32_t *offsets = nullptr, *of_codes = nullptr;
  int64_t row = 0, rows = 0, entries = 0, outputs = 0, at = 0;  // `at`: in y
  bool adds = false, ends = false;
  Store stores[kPanels];
  __m512 scale[kPanels] = {};
  __m512i shift[kPanels] = {};

  explicit EntryResults(EntryTotals& room) : totals(room) {}

  MW_INLINE void begin(const Job& job, const Panel& one, const Panel& other, int64_t first,
                       int64_t count, int64_t n, int64_t e, const EntrySums& from) {
    entries = job.plan.entries;
    outputs = job.weight->n;
    sums = &from;
    at = first * outputs + n;
    of_rows = job.scales + first * entries + e;
    offsets = job.tile_offsets + first * entries + e;
    of_codes = job.sums + first * entries + e;
    row = 0;
    rows = count;
    adds = e > 0;
    ends = e + 1 == entries;
    for (int c = 0; c < kPanels; ++c) {
      const Panel& panel = c ? other : one;
      stores[c] = Store(job, n + c * kLanes);
      scale[c] = _mm512_loadu_ps(panel.scales + e * kLanes);
      if (SHIFTS) shift[c] = _mm512_loadu_si512(panel.shifts + e * kLanes);
    }
  }

  MW_INLINE void step(int64_t most) {
    for (const int64_t stop = row + most < rows ? row + most : rows; row < stop; ++row) {
      const __m512 of_row = _mm512_set1_ps(*of_rows);
      const __m512i zeros = _mm512_set1_epi32(*offsets);
      for (int c = 0; c < kPanels; ++c) {
        __m512i sum = _mm512_add_epi32(_mm512_load_si512((*sums)[c][row]), zeros);
        if (SHIFTS) {
          const __m512i codes = _mm512_set1_epi32(*of_codes);
          sum = _mm512_sub_epi32(sum, _mm512_mullo_epi32(codes, shift[c]));
        }
        const __m512 product = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), of_row);
        const __m512 total = adds ? _mm512_load_ps(totals[c][row]) : stores[c].start;
        const __m512 result = _mm512_fmadd_ps(product, scale[c], total);
        if (ends) stores[c].put(at + c * kLanes, result);
        else _mm512_store_ps(totals[c][row], result);
      }
      of_rows += entries;
      offsets += entries;
      of_codes += entries;
      at += outputs;
    }
  }
};

// The sums of whole rows by two whole panels on their way to y.
template <bool NARROW>
struct RowResults {
  const int32_t (*sums)[kLanes] = nullptr;
  const float* of_rows = nullptr;  // scales
  const int32_t* offsets = nullptr;
  char* to = nullptr;
  int64_t stride = 0, rows = 0;  // bytes of a row of y; rows that are left
  __m512 scale[2] = {}, start[2] = {};

  explicit RowResults(EntryTotals&) {}

  // Whether there is no more to be done than that.
  static bool fit(const Job& job) {
    return job.plan.entries == 1 && NARROW == (job.result.dtype == kBF16) && !job.weight->zero_point;
  }

  MW_INLINE void begin(const Job& job, const Panel& one, const Panel& other, int64_t first,
                       int64_t count, int64_t n, int64_t, const EntrySums& from) {
    const int64_t size = NARROW ? 2 : 4;
    sums = from[0];
    of_rows = job.scales + first;
    offsets = job.tile_offsets + first;
    stride = job.weight->n * size;
    to = static_cast<char*>(job.result.y) + first * stride + n * size;
    rows = count;
    for (int c = 0; c < 2; ++c) {
      scale[c] = _mm512_loadu_ps((c ? other : one).scales);
      start[c] = Store(job, n + c * kLanes).start;
    }
  }

  MW_INLINE void step(int64_t most) {
    for (; most > 0 && rows > 0; --most, --rows, ++sums, ++of_rows, ++offsets, to += stride) {
      const __m512 of_row = _mm512_set1_ps(*of_rows);
      const __m512i zeros = _mm512_set1_epi32(*offsets);
      __m512 result[2];
      for (int c = 0; c < 2; ++c) {
        const __m512i sum = _mm512_add_epi32(_mm512_load_si512(sums[c * 2 * kAmxRows]), zeros);
        const __m512 product = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), of_row);
        result[c] = _mm512_fmadd_ps(product, scale[c], start[c]);
      }
      if (NARROW) {
        const __m512i low = _mm512_castsi256_si512(to_bfloat16(result[0]));
        _mm512_storeu_si512(to, _mm512_inserti64x4(low, to_bfloat16(result[1]), 1));
      } else {
        _mm512_storeu_ps(to, result[0]);
        _mm512_storeu_ps(to + kBytes, result[1]);
      }
    }
  }
};

// Panels are read past the first cache, where the rows stay.
template <bool HIGH, bool TWO, bool LATER, class RESULTS>
MW_AMX MW_INLINE void multiply_entry(const int8_t* x, int64_t rows, const uint8_t* first,
                                     const uint8_t* second, int64_t chunks,
                                     EntrySums& to, RESULTS& before, int64_t share,
                                     TileAhead& ahead) {
  _tile_zero(0);
  if (HIGH) _tile_zero(1);
  if (TWO) _tile_zero(2);
  if (HIGH && TWO) _tile_zero(3);
  for (int64_t c = 0; c < chunks; ++c, x += rows * kBytes) {
    _tile_loadd(4, x, kBytes);
    _tile_stream_loadd(6, first, kBytes);
    _tile_dpbsud(0, 4, 6);
    if (LATER) before.step((share + 3) / 4);
    if (HIGH) _tile_loadd(5, x + kAmxRows * kBytes, kBytes);
    if (HIGH) _tile_dpbsud(1, 5, 6);
    if (LATER) before.step((share + 2) / 4);
    if (TWO) _tile_stream_loadd(7, second, kBytes);
    if (TWO) _tile_dpbsud(2, 4, 7);
    if (LATER) before.step((share + 1) / 4);
    if (HIGH && TWO) _tile_dpbsud(3, 5, 7);
    if (LATER) before.step(share / 4);
    first += kBytes * kLanes;
    second += kBytes * kLanes;
    ahead.step();
  }
  _tile_stored(0, to[0], kBytes);
  if (HIGH) _tile_stored(1, to[0][kAmxRows], kBytes);
  if (TWO) _tile_stored(2, to[1], kBytes);
  if (HIGH && TWO) _tile_stored(3, to[1][kAmxRows], kBytes);
}

// Rows at a step whose sums would become numbers while others are multiplied. More than a few keep
// the processor from seeing in time what is multiplied: those of short entries do so at once.
inline int64_t rows_later(const Job& job) {
  return TilePlan::parts(2 * kAmxRows, job.plan.entry / kBytes);
}

// Multiplies all rows, 32 at a time, by panels `from` to `to`, one or two at a time. LATER: sums
// become numbers while others are multiplied, some rows at each step.
template <bool TWO, bool LATER, class RESULTS>
MW_AMX void multiply_panels(const Job& job, const Panels& panels, int64_t from, int64_t to,
                            int64_t n, TileAhead ahead) {
  const Plan& p = job.plan;
  const int64_t chunks = p.entry / kBytes, share = rows_later(job);
  alignas(64) EntrySums sums[2];
  alignas(64) EntryTotals totals;
  RESULTS results(totals);
  int64_t shaped = 0;
  int turn = 0;
  for (int64_t row = 0; row < job.rows; row += 2 * kAmxRows) {
    const int64_t left = job.rows - row, rows = left < 2 * kAmxRows ? left : 2 * kAmxRows;
    if (rows != shaped) shape_tiles(rows);
    shaped = rows;
    for (int64_t c = from; c < to; c += 1 + TWO) {
      const Panel one = panels[c], other = panels[c + TWO];
      for (int64_t e = 0; e < p.entries; ++e) {
        const int8_t* x = job.tiles + tile_at(row, rows, e * chunks, p.padded);
        const uint8_t* first = one.codes + e * p.entry * kLanes;
        const uint8_t* second = other.codes + e * p.entry * kLanes;
        EntrySums& at = sums[turn];
        if (rows > kAmxRows)
          multiply_entry<true, TWO, LATER>(x, rows, first, second, chunks, at, results, share,
                                           ahead);
        else
          multiply_entry<false, TWO, LATER>(x, rows, first, second, chunks, at, results, share,
                                            ahead);
        results.begin(job, one, other, row, rows, n + c * kLanes, e, at);
        if (LATER) turn = 1 - turn;
        else results.step(2 * kAmxRows);
      }
    }
  }
  results.step(2 * kAmxRows);
}

// Panels that are unpacked before rows are multiplied: for many rows all, if they stay in the second
// cache. Then a row's results are written one after the other. If not, two, which stay in the first
// one, and what comes next is fetched meanwhile.
inline int64_t panels_at_once(const Job& job, int64_t all) {
  constexpr int64_t kCached = 1 << 20;
  return job.rows > kHundreds && all * kLanes * job.plan.padded <= kCached ? all : 2;
}

// As InRegisters of avx512.cpp does it.
template <bool SHIFTS>
MW_AMX void in_tiles(const Job& job, const Panels& panels, int64_t count, int64_t n) {
  const Weight& w = *job.weight;
  const int64_t pairs = count / 2 * 2;
  TileAhead ahead;
  if (count == 2) {
    const int64_t next = n + 2 * kLanes + 2 * kAmxSoon, outputs = n + 4 * kLanes - next;
    const int64_t steps = TilePlan::parts(job.rows, 2 * kAmxRows) * (job.plan.padded / kBytes);
    ahead.at = w.packed + next * w.packed_stride;
    ahead.bytes = next + outputs <= w.n ? outputs * w.packed_stride / steps + 1 : 0;
  }
  const bool whole = rows_later(job) <= (count > 2 ? 4 : 2) && n + pairs * kLanes <= w.n;
  if (whole && RowResults<false>::fit(job))
    multiply_panels<true, true, RowResults<false>>(job, panels, 0, pairs, n, ahead);
  else if (whole && RowResults<true>::fit(job))
    multiply_panels<true, true, RowResults<true>>(job, panels, 0, pairs, n, ahead);
  else
    multiply_panels<true, false, EntryResults<true, SHIFTS>>(job, panels, 0, pairs, n, ahead);
  if (pairs < count)
    multiply_panels<false, false, EntryResults<false, SHIFTS>>(job, panels, pairs, count, n, ahead);
  _tile_release();
}

}  // namespace
}  // namespace mw
#endif
