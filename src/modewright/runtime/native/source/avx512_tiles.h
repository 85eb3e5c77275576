// SPDX-License-Identifier: Apache-2.0
// Part of avx512.cpp: products in bfloat16 on CPUs with AMX, for tens of rows and more. x was arranged
// as tiles of 16 rows by 32 inputs before. What is multiplied stays in the second cache: so many
// inputs are taken at a time, and so many rows by one unpacking.
#pragma once
#include "avx512_quantize.h"
#include "avx512_tile_panel.h"
#include "between.h"

#ifdef MW_AMX

namespace mw {
namespace {

struct AsItIs {
  MW_INLINE Floats operator()(Floats x) const { return x; }
};

// Numbers i to i + 32 of a row of x as bfloat16; those beyond `count` are 0.
template <class NEAREST>
MW_TILES MW_INLINE __m512i tile_row(const void* row, Dtype dtype, int64_t i, int64_t count,
                                    const NEAREST& nearest) {
  if (std::is_same<NEAREST, AsItIs>::value && dtype != kF32)
    return _mm512_maskz_loadu_epi16(first_of_tile(count - i), static_cast<const uint16_t*>(row) + i);
  const Floats low = nearest(Floats(load_numbers(row, dtype, i, count)));
  const Floats high = nearest(Floats(load_numbers(row, dtype, i + kLanes, count)));
  return __m512i(_mm512_cvtne2ps_pbh(__m512(high), __m512(low)));
}

// Arranges a row that becomes what `nearest` leaves of it.
template <class NEAREST>
MW_TILES MW_INLINE void arrange_row(const TileJob& job, const TilePlan& plan, int64_t row,
                                    const NEAREST& nearest) {
  const int64_t k = job.weight->k, size = job.dtype == kF32 ? 4 : 2;
  const int64_t place = (row / kTileRows % 2 * kTileRows + row % kTileRows) * kTileInputs;
  const char* from = static_cast<const char*>(job.x) + row * k * size;
  for (int64_t t = 0; t < plan.chunks * plan.tiles; ++t) {
    uint16_t* to = job.tiles + plan.place(t / plan.tiles, row / (2 * kTileRows), t % plan.tiles);
    _mm512_store_si512(to + place, row < job.rows
                                       ? tile_row(from, job.dtype, t * kTileInputs, k, nearest)
                                       : _mm512_setzero_si512());
  }
}

template <class FORMAT>
MW_TILES bool arrange_rounded(const TileJob& job, const TilePlan& plan, int64_t row) {
  const int64_t k = job.weight->k, at = row * k;
  float scale = 1.0f;
  if (row < job.rows)
    scale = job.dtype == kF32
                ? rounding_scale<FORMAT>(static_cast<const float*>(job.x) + at, k, job.scale)
                : rounding_scale<FORMAT>(static_cast<const uint16_t*>(job.x) + at, k, job.scale);
  if (std::isnan(scale)) return false;
  arrange_row(job, plan, row, Nearest<FORMAT>{scale});
  return true;
}

// Arranges blocks `first` to `last` of 32 rows.
MW_TILES bool arrange_tiles(const TileJob& job, int64_t first, int64_t last) {
  const TilePlan plan(job.rows, job.weight->k);
  bool finite = true;
  for (int64_t row = first * 2 * kTileRows; row < last * 2 * kTileRows && finite; ++row) {
    if (job.rounding == kToInt8) finite = arrange_rounded<Int8>(job, plan, row);
    else if (job.rounding == kToE4m3) finite = arrange_rounded<E4m3>(job, plan, row);
    else arrange_row(job, plan, row, AsItIs());
  }
  return finite;
}

using TileSums = float[2 * kTileRows][kPanelOutputs];  // of 32 rows and outputs

// Sums on their way to y, a few rows at each step of the next ones. Little may be done there: what
// is multiplied has to be seen by the processor long before.
struct TileCopy {
  const float* from = nullptr;
  float* to = nullptr;
  int64_t stride = 0, rows = 0;  // floats; rows that are left
  int64_t fetched = 0;           // floats from `to` to what is read soon, or 0
  const float* scale = nullptr;  // of each output, or null
  const float* start = nullptr;  // what scaled sums are added to, or null: to what is there

  MW_TILES MW_INLINE void step(int64_t most) {
    for (; most > 0 && rows > 0; --most, --rows, from += kPanelOutputs, to += stride) {
      for (int64_t i = 0; i < kPanelOutputs; i += kLanes) {
        __m512 sum = _mm512_load_ps(from + i);
        const float* added = (start ? start : to) + i;
        if (scale) sum = _mm512_fmadd_ps(sum, _mm512_load_ps(scale + i), _mm512_loadu_ps(added));
        _mm512_storeu_ps(to + i, sum);
      }
      if (!fetched) continue;
      __builtin_prefetch(to + fetched);
      __builtin_prefetch(to + fetched + kLanes);
    }
  }
};

// Adds the products of 32 rows, or 16, and 32 outputs to `from`: tiles 0 to 3; 4, 5: outputs; 6, 7:
// rows, which are read past the first cache, so that the outputs stay in there. `stride`: bytes from
// one row of `from` to the next.
template <bool HIGH>
MW_TILES MW_INLINE void multiply_tiles(const uint16_t* x, const uint16_t* panel,
                                       const uint16_t* second, int64_t tiles, const float* from,
                                       int64_t stride, TileSums& sums, TileCopy& copy,
                                       TileAhead& ahead) {
  const int64_t rows = TilePlan::parts(2 * kTileRows, tiles);
  const float* below = from + stride / 4 * kTileRows;
  _tile_loadd(0, from, stride);
  _tile_loadd(1, from + kLanes, stride);
  if (HIGH) _tile_loadd(2, below, stride);
  if (HIGH) _tile_loadd(3, below + kLanes, stride);
  for (int64_t t = 0; t < tiles; ++t, x += 2 * kTile, panel += kTile, second += kTile) {
    _tile_loadd(4, panel, kBytes);
    _tile_stream_loadd(6, x, kBytes);
    _tile_dpbf16ps(0, 6, 4);
    _tile_loadd(5, second, kBytes);
    _tile_dpbf16ps(1, 6, 5);
    if (HIGH) _tile_stream_loadd(7, x + kTile, kBytes);
    if (HIGH) _tile_dpbf16ps(2, 7, 4);
    if (HIGH) _tile_dpbf16ps(3, 7, 5);
    copy.step(rows);
    ahead.step();
  }
  constexpr int64_t kRow = sizeof sums[0];
  _tile_stored(0, sums[0], kRow);
  _tile_stored(1, sums[0] + kLanes, kRow);
  if (HIGH) _tile_stored(2, sums[kTileRows], kRow);
  if (HIGH) _tile_stored(3, sums[kTileRows] + kLanes, kRow);
}

// What the product of some outputs works in.
struct TileRoom {
  char* memory;
  uint16_t* panel;  // two times 16 outputs
  TileSums* sums;   // two, in turns
  float* start;     // what sums of 32 outputs begin with: the bias, or 0
  float* scale;     // of these outputs, and
  float* added;     // what scaled sums are added to: then sums begin with 0
  float* floats;

  TileRoom(const TilePlan& plan, int64_t count) {
    const size_t codes = 2 * plan.tiles * kTile * sizeof *panel, all = 2 * sizeof *sums;
    const size_t others = (3 * kPanelOutputs + count) * sizeof(float);
    memory = static_cast<char*>(memory_of(codes + all + others));
    panel = reinterpret_cast<uint16_t*>(memory);
    sums = reinterpret_cast<TileSums*>(memory + codes);
    start = reinterpret_cast<float*>(memory + codes + all);
    scale = start + kPanelOutputs;
    added = scale + kPanelOutputs;
    floats = added + kPanelOutputs;
  }
  ~TileRoom() { std::free(memory); }

  void begin_outputs(const TileJob& job, const TilePart& part, bool scaled) const {
    for (int64_t i = 0; i < kPanelOutputs; ++i) {
      const bool has = part.chunk == 0 && job.bias && part.n + i < job.weight->n;
      (scaled ? added : start)[i] = has ? job.bias[part.n + i] : 0.0f;
    }
  }
};

// Writes sums that cannot be copied as they are: to fewer outputs, to what is there, in bfloat16.
MW_TILES void write_sums(const TileJob& job, const TileRoom& room, bool scaled,
                         const TileSums& sums, int64_t row, int64_t n, bool adds, bool last) {
  const int64_t outputs = job.weight->n;
  for (int64_t r = 0; r < 2 * kTileRows && row + r < job.rows; ++r)
    for (int64_t i = 0; i < kPanelOutputs && n + i < outputs; i += kLanes) {
      const int64_t at = (row + r) * outputs + n + i;
      const __mmask16 mask = first_lanes(outputs - n - i);
      __m512 sum = _mm512_load_ps(sums[r] + i);
      const float *scale = room.scale + i, *added = room.added + i;
      if (scaled) sum = _mm512_fmadd_ps(sum, _mm512_load_ps(scale), _mm512_load_ps(added));
      if (adds) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, job.sums + at));
      if (!last || job.dtype == kF32) {
        _mm512_mask_storeu_ps(job.sums + at, mask, sum);
      } else {
        uint16_t* to = static_cast<uint16_t*>(job.y) + at;
        _mm256_mask_storeu_epi16(to, mask, __m256i(_mm512_cvtneps_pbh(sum)));
      }
    }
}

// Multiplies a part by its blocks of rows; `copy` is what is left to be copied.
template <bool SCALED>
MW_TILES void multiply_part(const TileJob& job, const TilePlan& plan, const TilePart& part,
                            const TileRoom& room, TileCopy& copy, TileAhead& ahead) {
  const int64_t outputs = job.weight->n;
  const bool first = part.chunk == 0, last = part.chunk + 1 == plan.chunks;
  const bool fills = part.n + kPanelOutputs <= outputs && (!last || job.dtype == kF32);
  const uint16_t *panel = room.panel, *second = panel + plan.tiles * kTile;
  for (int64_t b = 0; b < part.blocks(plan); ++b) {
    const int64_t block = part.block + b, row = 2 * block * kTileRows, left = job.rows - row;
    const int64_t rows = left < 2 * kTileRows ? left : 2 * kTileRows;
    const bool copies = fills && (first || rows == 2 * kTileRows);
    const uint16_t* x = job.tiles + plan.place(part.chunk, block, 0);
    TileSums& sums = room.sums[b % 2];
    float* to = job.sums + row * outputs + part.n;
    const bool adds = copies && !first && !SCALED;
    const float* from = adds ? to : room.start;
    const int64_t stride = adds ? outputs * 4 : 0;
    if (left > kTileRows)
      multiply_tiles<true>(x, panel, second, plan.tiles, from, stride, sums, copy, ahead);
    else
      multiply_tiles<false>(x, panel, second, plan.tiles, from, stride, sums, copy, ahead);
    if (copies) {
      copy = {sums[0], to, outputs, rows, first ? 0 : 4 * kTileRows * outputs};
      if (SCALED) copy.scale = room.scale, copy.start = first ? room.added : nullptr;
    } else {
      write_sums(job, room, SCALED, sums, row, part.n, !first, last);
    }
  }
}

// Blocks of rows, up to which the next outputs' codes are asked for while others are unpacked. For
// more there is time while they are multiplied.
constexpr int64_t kFewBlocks = 2;

template <Codes CODES, int BITS>
MW_TILES void multiply_outputs(const TileJob& job, int64_t first, int64_t last) {
  using Filler = PanelFiller<CODES, BITS>;
  const Weight& w = *job.weight;
  const TilePlan plan(job.rows, w.k);
  const TileRoom room(plan, Filler::room(w));
  const Filler filler(w, plan, room.floats);
  TileShapes shapes;
  for (int t = 0; t < 8; ++t) shapes.rows[t] = kTileRows, shapes.row_bytes[t] = kBytes;
  _tile_loadconfig(&shapes);
  TileCopy copy;
  TileAhead ahead;
  for (TilePart part{0, 0, first}; part.chunk < plan.chunks; part = part.next(plan, first, last)) {
    const int64_t n = part.n + kPanelOutputs, length = plan.tiles * kTileInputs * BITS / 8;
    const int64_t steps = part.blocks(plan) * plan.tiles, all = kPanelOutputs * length;
    const bool early = part.blocks(plan) <= kFewBlocks;  // what is next is asked for
    const bool later = !early && n + kPanelOutputs <= last;
    const uint8_t* next = w.packed + n * w.packed_stride + part.chunk * length;
    ahead = {next, later ? all / steps + 1 : 0, length, w.packed_stride};
    filler.fill(part, room.panel, early);
    // What is left may be what is added to, or needs the scales of its outputs.
    if (is_plain(CODES) || part.chunk) copy.step(copy.rows);
    if (is_plain(CODES)) filler.scales_of_outputs(room.scale);
    room.begin_outputs(job, part, is_plain(CODES));
    multiply_part<is_plain(CODES)>(job, plan, part, room, copy, ahead);
  }
  copy.step(copy.rows);
  _tile_release();
}

void multiply_tiled(const TileJob& job, int64_t first, int64_t last) {
  const Weight& w = *job.weight;
  const bool fine = groups_of(w) > 1 && w.group % kTileInputs;
  switch (w.num_bits) {
    case 2: return multiply_outputs<kLookedUp, 2>(job, first, last);
    case 3: return multiply_outputs<kLookedUp, 3>(job, first, last);
    case 4:
      return fine ? multiply_outputs<kFine, 4>(job, first, last)
                  : multiply_outputs<kLookedUp, 4>(job, first, last);
    case 5: return multiply_outputs<kLookedUp, 5>(job, first, last);
    case 6: return multiply_outputs<kLookedUp, 6>(job, first, last);
    default:
      if (groups_of(w) == 1 && !w.zero_point)
        return w.float_shift ? multiply_outputs<kPlainFloating, 8>(job, first, last)
                             : multiply_outputs<kPlainWhole, 8>(job, first, last);
      return w.float_shift ? multiply_outputs<kFloating, 8>(job, first, last)
                           : multiply_outputs<kWhole, 8>(job, first, last);
  }
}

}  // namespace
}  // namespace mw
#endif
