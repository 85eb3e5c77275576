// SPDX-License-Identifier: Apache-2.0
// Part of avx512.cpp: codes of 8 bits with one scale for a row, by tens of rows, on CPUs with AMX.
// Sixteen outputs by 64 inputs are a tile as they lie in memory, so nothing is unpacked: x is turned
// instead, once, and so are the results.
#pragma once
#include "avx512_amx.h"

#ifdef MW_AMX

namespace mw {
namespace {

constexpr int64_t kByteTile = kAmxRows * kBytes;
constexpr int64_t kByteRows = 2 * kAmxRows;  // of x at a time

// Whether codes can be read like this, and it pays: to turn the results of many rows does not.
inline bool lies_in_tiles(const Job& job) {
  const Weight& w = *job.weight;
  return w.num_bits == 8 && job.plan.entries == 1 && !w.table && !w.zero_point &&
         w.k % kBytes == 0 && w.n % kAmxRows == 0 && job.rows <= kHundreds;
}

// x as tiles, four inputs of 16 rows side by side: of each 32 rows the first and the last 16 in turns.
void turn_rows(const Job& job, int64_t strip) {
  const int64_t k = job.plan.padded, row = strip * kByteRows, end = row + kByteRows;
  int8_t* to = job.tiles + row * k;
  for (int64_t i = 0; i < k; i += kBytes)
    for (int64_t half = row; half < end; half += kAmxRows) {
      __m512i block[16];
      for (int64_t r = 0; r < kAmxRows; ++r)
        block[r] = half + r < job.rows ? _mm512_loadu_si512(job.codes + (half + r) * k + i)
                                       : _mm512_setzero_si512();
      transpose(block);
      for (int64_t r = 0; r < kAmxRows; ++r, to += kBytes) _mm512_storeu_si512(to, block[r]);
    }
  for (int64_t r = row; r < end && r < job.rows; ++r)
    job.tile_offsets[r] = -job.weight->zero * job.sums[r];
}

using ByteSums = int32_t[4][kAmxRows][kLanes];  // of 16 outputs, or 32, by both halves of the rows

// Sums on their way to y, one tile at a time.
struct ByteResults {
  const Job& job;
  float of_outputs[kByteRows] = {};  // scales
  const ByteSums* sums = nullptr;
  int64_t row = 0, n = 0, tile = 0, tiles = 0;

  MW_INLINE void step() {
    if (tile == tiles) return;
    const int64_t first = row + tile % 2 * kAmxRows, left = job.rows - first;
    const int64_t output = n + tile / 2 * kAmxRows;
    const __mmask16 there = left > 0 ? first_lanes(left) : __mmask16(0);
    const __m512i offset = _mm512_maskz_loadu_epi32(there, job.tile_offsets + first);
    const __m512 scale = _mm512_maskz_loadu_ps(there, job.scales + first);
    __m512i block[16];
    for (int64_t o = 0; o < kAmxRows; ++o) {
      const __m512i sum = _mm512_add_epi32(_mm512_load_si512((*sums)[tile][o]), offset);
      const __m512 own = _mm512_set1_ps(of_outputs[output - n + o]);
      block[o] = __m512i(_mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(sum), scale), own));
    }
    transpose(block);
    const Store store(job, output);
    for (int64_t r = 0; r < kAmxRows && r < left; ++r)
      store.put((first + r) * job.weight->n + output, _mm512_add_ps(__m512(block[r]), store.start));
    ++tile;
  }

  MW_INLINE void finish() {
    while (tile < tiles) step();
  }
};

// Tiles 0 to 3: sums; 4, 5: outputs; 6, 7: rows.
template <bool TWO>
MW_AMX MW_INLINE void multiply_bytes(const uint8_t* codes, int64_t k, const int8_t* x, ByteSums& to,
                                     ByteResults& before, TileAhead& ahead) {
  _tile_zero(0);
  _tile_zero(1);
  if (TWO) _tile_zero(2);
  if (TWO) _tile_zero(3);
  for (int64_t i = 0; i < k; i += kBytes, x += 2 * kByteTile) {
    _tile_loadd(4, codes + i, k);
    _tile_loadd(6, x, kBytes);
    _tile_dpbusd(0, 4, 6);
    _tile_loadd(7, x + kByteTile, kBytes);
    _tile_dpbusd(1, 4, 7);
    if (TWO) _tile_loadd(5, codes + kAmxRows * k + i, k);
    if (TWO) _tile_dpbusd(2, 5, 6);
    if (TWO) _tile_dpbusd(3, 5, 7);
    if (i % (4 * kBytes) == 0) before.step();
    ahead.step();
  }
  _tile_stored(0, to[0], kBytes);
  _tile_stored(1, to[1], kBytes);
  if (TWO) _tile_stored(2, to[2], kBytes);
  if (TWO) _tile_stored(3, to[3], kBytes);
}

// Multiplies all rows by outputs `n` to n + 32, or 16.
template <bool TWO>
MW_AMX void multiply_outputs_of_bytes(const Job& job, int64_t n, ByteResults& results,
                                      TileAhead ahead) {
  const Weight& w = *job.weight;
  alignas(64) ByteSums sums[2];
  int turn = 0;
  for (int64_t o = 0; o < (TWO ? 2 : 1) * kAmxRows; ++o) {
    float unused;
    entry_scales(w, job.plan, n + o, results.of_outputs + o, &unused);
  }
  for (int64_t row = 0; row < job.rows; row += kByteRows, turn = 1 - turn) {
    const uint8_t* codes = w.packed + n * w.packed_stride;
    multiply_bytes<TWO>(codes, w.k, job.tiles + row * w.k, sums[turn], results, ahead);
    results.finish();  // few inputs are multiplied in fewer steps than there are tiles
    results.sums = &sums[turn];
    results.row = row;
    results.n = n;
    results.tile = 0;
    results.tiles = TWO ? 4 : 2;
  }
  results.finish();
}

// As panel() of avx512.cpp does it.
MW_AMX void multiply_as_they_lie(const Job& job, int64_t first, int64_t last) {
  const Weight& w = *job.weight;
  TileShapes shapes;
  for (int t = 0; t < 8; ++t) shapes.rows[t] = kAmxRows, shapes.row_bytes[t] = kBytes;
  _tile_loadconfig(&shapes);
  ByteResults results{job};
  const int64_t steps = TilePlan::parts(job.rows, kByteRows) * (w.k / kBytes);
  for (int64_t n = first; n < last; n += kByteRows) {
    const int64_t next = n + kByteRows, bytes = kByteRows * w.k;
    const TileAhead ahead{w.packed + next * w.k, next < last ? bytes / steps + 1 : 0};
    last - n > kAmxRows ? multiply_outputs_of_bytes<true>(job, n, results, ahead)
                        : multiply_outputs_of_bytes<false>(job, n, results, ahead);
  }
  _tile_release();
}

}  // namespace
}  // namespace mw
#endif
