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

// The int8 numbers of rows as tiles, in the order in which panels have their inputs.
inline void interleave_rows(const Job& job) {
  const Plan& p = job.plan;
  const int64_t fields = p.fields, steps = p.padded / p.step;
  for (int64_t row = 0; row < job.rows; row += 2 * kAmxRows) {
    const int64_t left = job.rows - row, rows = left < 2 * kAmxRows ? left : 2 * kAmxRows;
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
  for (int64_t i = 0; i < job.rows * p.entries; ++i)
    job.tile_offsets[i] = -job.weight->zero * job.sums[i];
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

  const EntrySums* sums = nullptr;
  EntryTotals* totals = nullptr;
  const float* of_rows = nullptr;  // scales
  const int32_t *offsets = nullptr, *of_codes = nullptr;
  int64_t row = 0, rows = 0, entries = 0, outputs = 0, at = 0;  // `at`: in y
  bool adds = false, ends = false;
  Store stores[kPanels];
  __m512 scale[kPanels] = {};
  __m512i shift[kPanels] = {};

  MW_INLINE void begin(const Job& job, const Panel* panels, int64_t first, int64_t count, int64_t n,
                       int64_t e, const EntrySums& from) {
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
      stores[c] = Store(job, n + c * kLanes);
      scale[c] = _mm512_loadu_ps(panels[c].scales + e * kLanes);
      if (SHIFTS) shift[c] = _mm512_loadu_si512(panels[c].shifts + e * kLanes);
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
        const __m512 total = adds ? _mm512_load_ps((*totals)[c][row]) : stores[c].start;
        const __m512 result = _mm512_fmadd_ps(product, scale[c], total);
        if (ends) stores[c].put(at + c * kLanes, result);
        else _mm512_store_ps((*totals)[c][row], result);
      }
      of_rows += entries;
      offsets += entries;
      of_codes += entries;
      at += outputs;
    }
  }
};

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
    _tile_loadd(6, first, kBytes);
    _tile_dpbsud(0, 4, 6);
    if (HIGH) _tile_loadd(5, x + kAmxRows * kBytes, kBytes);
    if (HIGH) _tile_dpbsud(1, 5, 6);
    if (TWO) _tile_loadd(7, second, kBytes);
    if (TWO) _tile_dpbsud(2, 4, 7);
    if (HIGH && TWO) _tile_dpbsud(3, 5, 7);
    first += kBytes * kLanes;
    second += kBytes * kLanes;
    if (LATER) before.step(share);
    ahead.step();
  }
  _tile_stored(0, to[0], kBytes);
  if (HIGH) _tile_stored(1, to[0][kAmxRows], kBytes);
  if (TWO) _tile_stored(2, to[1], kBytes);
  if (HIGH && TWO) _tile_stored(3, to[1][kAmxRows], kBytes);
}

constexpr int64_t kMostLater = 2;  // rows at a step

// LATER: sums become numbers while the next entry is multiplied, some rows at each step. More than a
// few would keep the processor from seeing in time what is multiplied: those of short entries do so
// at once.
template <bool TWO, bool SHIFTS, bool LATER>
MW_AMX void amx_tiles(const Job& job, const Panel* panels, int64_t n, TileAhead ahead) {
  const Plan& p = job.plan;
  const int64_t chunks = p.entry / kBytes, share = TilePlan::parts(2 * kAmxRows, chunks);
  alignas(64) EntrySums sums[2];
  alignas(64) EntryTotals totals;
  EntryResults<TWO, SHIFTS> results;
  results.totals = &totals;
  int64_t shaped = 0;
  int turn = 0;
  for (int64_t row = 0; row < job.rows; row += 2 * kAmxRows) {
    const int64_t left = job.rows - row, rows = left < 2 * kAmxRows ? left : 2 * kAmxRows;
    if (rows != shaped) shape_tiles(rows);
    shaped = rows;
    for (int64_t e = 0; e < p.entries; ++e) {
      const int8_t* x = job.tiles + tile_at(row, rows, e * chunks, p.padded);
      const uint8_t* first = panels[0].codes + e * p.entry * kLanes;
      const uint8_t* second = panels[TWO].codes + e * p.entry * kLanes;
      EntrySums& to = sums[turn];
      if (rows > kAmxRows)
        multiply_entry<true, TWO, LATER>(x, rows, first, second, chunks, to, results, share,
                                          ahead);
      else
        multiply_entry<false, TWO, LATER>(x, rows, first, second, chunks, to, results, share,
                                          ahead);
      results.begin(job, panels, row, rows, n, e, to);
      if (LATER) turn = 1 - turn;
      else results.step(2 * kAmxRows);
    }
  }
  results.step(2 * kAmxRows);
}

// As tiles() of avx512_panel.h does it.
template <int PANELS, bool SHIFTS>
MW_AMX void in_tiles(const Job& job, const Panel* panels, int64_t n) {
  const Weight& w = *job.weight;
  const int64_t next = n + 2 * kLanes + 2 * kAmxSoon, outputs = n + 4 * kLanes - next;
  const int64_t steps = TilePlan::parts(job.rows, 2 * kAmxRows) * (job.plan.padded / kBytes);
  const TileAhead ahead{w.packed + next * w.packed_stride,
                        next + outputs <= w.n ? outputs * w.packed_stride / steps + 1 : 0};
  const bool later = TilePlan::parts(2 * kAmxRows, job.plan.entry / kBytes) <= kMostLater;
  later ? amx_tiles<PANELS == 2, SHIFTS, true>(job, panels, n, ahead)
        : amx_tiles<PANELS == 2, SHIFTS, false>(job, panels, n, ahead);
  _tile_release();
}

}  // namespace
}  // namespace mw
#endif
