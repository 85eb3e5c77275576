// SPDX-License-Identifier: Apache-2.0
// Part of avx512.cpp: products in bfloat16 on CPUs with AMX, for tens of rows and more. Thirty-two
// outputs are unpacked at a time, scaled, as tiles of 16 outputs by 32 inputs; x was arranged as
// tiles of 32 inputs by 16 rows before. What is multiplied stays in the second cache: so many inputs
// are taken at a time, and so many rows by one unpacking.
#pragma once
#include "avx512_amx.h"
#include "floats.h"

#ifdef MW_AMX
#define MW_TILES __attribute__((target("amx-tile,amx-bf16,avx512bf16")))

namespace mw {
namespace {

inline __mmask32 first_of_tile(int64_t count) {
  return count <= 0 ? 0 : _bzhi_u32(~0u, unsigned(count < kTileInputs ? count : kTileInputs));
}

// Numbers i to i + 32 of a row of x as bfloat16; those beyond `count` are 0.
MW_TILES inline __m512i tile_row(const void* row, Dtype dtype, int64_t i, int64_t count) {
  const __mmask32 mask = first_of_tile(count - i);
  if (dtype != kF32) return _mm512_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(row) + i);
  const float* from = static_cast<const float*>(row) + i;
  const __m512 low = _mm512_maskz_loadu_ps(__mmask16(mask), from);
  const __m512 high = _mm512_maskz_loadu_ps(__mmask16(mask >> 16), from + kLanes);
  return __m512i(_mm512_cvtne2ps_pbh(high, low));
}

// Arranges blocks `first` to `last` of 32 rows: pairs of inputs of 16 rows lie side by side.
MW_TILES void arrange_tiles(const TileJob& job, int64_t first, int64_t last) {
  const TilePlan plan(job.rows, job.weight->k);
  const int64_t k = job.weight->k, size = job.dtype == kF32 ? 4 : 2;
  for (int64_t half = 2 * first; half < 2 * last; ++half)
    for (int64_t t = 0; t < plan.chunks * plan.tiles; ++t) {
      uint16_t* to = job.tiles + plan.place(t / plan.tiles, half / 2, t % plan.tiles);
      to += half % 2 * kTile;
      __m512i rows[kTileRows];
      for (int64_t r = 0; r < kTileRows; ++r) {
        const int64_t row = half * kTileRows + r;
        const char* from = static_cast<const char*>(job.x) + row * k * size;
        rows[r] = row < job.rows ? tile_row(from, job.dtype, t * kTileInputs, k)
                                 : _mm512_setzero_si512();
      }
      transpose(rows);
      for (int64_t r = 0; r < kTileRows; ++r) _mm512_store_si512(to + r * kTileInputs, rows[r]);
    }
}

// How codes become numbers: of up to 6 bits by a table of what a group has, scaled, if groups are
// whole tiles; of 4 bits by two tables for the halves of a tile; whole numbers of 8 bits; fp8.
enum Codes { kLookedUp, kFine, kWhole, kFloating };

// Scaled numbers of one weight as bfloat16, 32 at a time.
template <Codes CODES, int BITS>
struct TileUnpacker {
  alignas(64) float numbers[64] = {};
  const Weight& w;
  __m256i gather, shifts;
  __m128i mantissa;  // how far that of fp8 is from that of float16
  float factor, zero;

  explicit TileUnpacker(const Weight& weight) : w(weight) {
    const bool floats = CODES == kFloating;
    mantissa = _mm_cvtsi32_si128(floats ? w.float_shift - 13 : 0);
    factor = floats ? w.float_factor * 0x1p-112f : 1.0f;
    zero = floats ? 0.0f : float(w.zero);
    if (w.values) std::memcpy(numbers, w.values, sizeof numbers);
    const Unpacker whole(w);
    gather = _mm512_castsi512_si256(whole.gather);
    shifts = _mm512_castsi512_si256(whole.shifts);
  }

  static __m256i load(const uint8_t* from, int64_t count) {
    const int64_t bytes = count < kTileInputs ? (count * BITS + 7) / 8 : 4 * BITS;
    return _mm256_maskz_loadu_epi8(_bzhi_u32(~0u, unsigned(bytes)), from);
  }

  // Codes of 16 bits.
  __m512i codes(const uint8_t* from, int64_t count) const {
    const __m256i bytes = load(from, count);
    if (BITS == 4) {
      const __m512i wide = _mm512_cvtepu8_epi32(_mm256_castsi256_si128(bytes));
      const __m512i both = _mm512_or_si512(wide, _mm512_slli_epi32(wide, 12));
      return _mm512_and_si512(both, _mm512_set1_epi16(15));
    }
    const __m256i lanes = _mm256_permutexvar_epi8(gather, bytes);
    const __m256i mixed = _mm256_multishift_epi64_epi8(shifts, lanes);
    return _mm512_cvtepu8_epi16(_mm256_and_si256(mixed, _mm256_set1_epi8((1 << BITS) - 1)));
  }

  // Numbers `from` to `from` + 16 of the table, scaled.
  MW_TILES __m256i table(int from, __m512 scale, __m512 zero) const {
    const __m512 number = _mm512_sub_ps(_mm512_load_ps(numbers + from), zero);
    return __m256i(_mm512_cvtneps_pbh(_mm512_mul_ps(number, scale)));
  }

  MW_TILES __m512i table_of_32(int from, __m512 scale, __m512 zero) const {
    const __m512i low = _mm512_castsi256_si512(table(from, scale, zero));
    return BITS > 4 ? _mm512_inserti64x4(low, table(from + 16, scale, zero), 1) : low;
  }

  // Up to 64 numbers of a row, which share a scale, into a row of one or two tiles.
  MW_TILES void look_up(const uint8_t* from, int64_t count, float scale, float zero,
                        uint16_t* to) const {
    const __m512 s = _mm512_set1_ps(scale), z = _mm512_set1_ps(zero);
    const __m512i first = table_of_32(0, s, z);
    const __m512i second = BITS > 5 ? table_of_32(32, s, z) : first;
    for (; count > 0; count -= kTileInputs, from += 4 * BITS, to += kTile) {
      const __m512i at = codes(from, count);
      __m512i found = BITS > 5 ? _mm512_permutex2var_epi16(first, at, second)
                               : _mm512_permutexvar_epi16(at, first);
      if (count < kTileInputs) found = _mm512_maskz_mov_epi16(first_of_tile(count), found);
      _mm512_store_si512(to, found);
    }
  }

  // Up to 32 numbers of a row, whose halves have scales of their own, into a row of a tile.
  MW_TILES void convert(const uint8_t* from, int64_t count, const float scales[2],
                        const float zeros[2], uint16_t* to) const {
    __m512i found;
    if (CODES == kFine) {
      __m256i tables[2];
      for (int h = 0; h < 2; ++h)
        tables[h] = table(0, _mm512_set1_ps(scales[h]), _mm512_set1_ps(zeros[h]));
      const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(tables[0]), tables[1], 1);
      const __m512i second = _mm512_maskz_set1_epi16(0xffff0000u, 16);
      found = _mm512_permutexvar_epi16(_mm512_or_si512(codes(from, count), second), both);
    } else {
      const __m256i raw = load(from, count);
      __m512 halves[2];
      if (CODES == kFloating) {
        const __m512i wide = _mm512_cvtepu8_epi16(raw), low = _mm512_set1_epi16(0x7f);
        const __m512i rest = _mm512_sll_epi16(_mm512_and_si512(wide, low), mantissa);
        const __m512i sign = _mm512_slli_epi16(_mm512_andnot_si512(low, wide), 8);
        const __m512i bits = _mm512_or_si512(sign, rest);
        halves[0] = _mm512_cvtph_ps(_mm512_castsi512_si256(bits));
        halves[1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(bits, 1));
      } else {
        halves[0] = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm256_castsi256_si128(raw)));
        halves[1] = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm256_extracti128_si256(raw, 1)));
      }
      for (int h = 0; h < 2; ++h) {
        const float scale = scales[h] * factor;
        const __m512 offset = _mm512_set1_ps(-(zeros[h] + zero) * scale);
        halves[h] = _mm512_fmadd_ps(halves[h], _mm512_set1_ps(scale), offset);
      }
      found = __m512i(_mm512_cvtne2ps_pbh(halves[1], halves[0]));
    }
    if (count < kTileInputs) found = _mm512_maskz_mov_epi16(first_of_tile(count), found);
    _mm512_store_si512(to, found);
  }
};

// What scale_values does, for the usual case with vectors.
inline void read_scales(const Weight& w, int64_t at, int64_t count, float* scales) {
  if (w.scale_kind != kFloat16) return scale_values(w, at, count, scales);
  const uint16_t* from = static_cast<const uint16_t*>(w.scale) + at;
  const __m512 multiplier = _mm512_set1_ps(w.multiplier);
  for (int64_t g = 0; g < count; g += kLanes) {
    const __mmask16 there = first_lanes(count - g);
    const __m512 some = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(there, from + g));
    _mm512_mask_storeu_ps(scales + g, there, _mm512_mul_ps(some, multiplier));
  }
}

// Scales and shifts of the 16 outputs of a tile; one more than there are may be read.
struct TileScales {
  float *scales, *zeros;
  int64_t stride;

  void read(const Weight& w, int64_t n) const {
    const int64_t groups = groups_of(w);
    for (int64_t r = 0; r < kTileRows; ++r) {
      const int64_t row = (n + r < w.n ? n + r : w.n - 1) / w.rows_per_scale;
      read_scales(w, row * w.scale_stride, groups, scales + r * stride);
      if (w.zero_point)
        shift_values(w.zero_point + row * w.zero_point_stride, groups, w.num_bits, w.zero,
                     zeros + r * stride);
    }
  }
};

// Unpacks inputs `begin` to `end` of 16 outputs into tiles, one or two at a time.
template <Codes CODES, int BITS>
MW_TILES void unpack_tiles(const TileUnpacker<CODES, BITS>& unpacker, int64_t n, int64_t begin,
                           int64_t end, const TileScales& at, uint16_t* to) {
  const Weight& w = unpacker.w;
  const int64_t group = groups_of(w) == 1 ? INT64_MAX / 2 : w.group;
  const int64_t step = CODES == kLookedUp ? 2 * kTileInputs : kTileInputs;
  for (int64_t i = begin; i < end;) {
    const int64_t g = i / group, next = (i + 16) / group - g;
    int64_t stop = i + step < end ? i + step : end;
    if (CODES == kLookedUp && stop > (g + 1) * group) stop = (g + 1) * group;
    for (int64_t r = 0; r < kTileRows; ++r) {
      const int64_t output = n + r < w.n ? n + r : w.n - 1;
      const uint8_t* from = w.packed + output * w.packed_stride + i * BITS / 8;
      const float *scale = at.scales + r * at.stride + g, *zero = at.zeros + r * at.stride + g;
      uint16_t* own = to + r * kTileInputs;
      if (CODES == kLookedUp) {
        unpacker.look_up(from, stop - i, *scale, *zero, own);
      } else {
        const float scales[2] = {*scale, scale[next]}, zeros[2] = {*zero, zero[next]};
        unpacker.convert(from, stop - i, scales, zeros, own);
      }
    }
    to += (stop - i + kTileInputs - 1) / kTileInputs * kTile;
    i = stop;
  }
}

// Where 32 rows of results will be written: fetched little by little before.
struct Target {
  const float* at;
  int64_t stride, rows;

  void fetch(int64_t first) const {
    for (int64_t r = first; r < first + 2 && r < rows; ++r) {
      __builtin_prefetch(at + r * stride, 1);
      __builtin_prefetch(at + r * stride + kLanes, 1);
    }
  }
};

// Adds the products of 32 outputs and 32 rows, or 16, to their sums: tiles 0 to 3; 4, 5: outputs; 6,
// 7: rows, which are read past the first cache, so that the outputs stay in there.
template <bool HIGH>
MW_TILES void multiply_tiles(const uint16_t* panel, const uint16_t* second, const uint16_t* x,
                             int64_t tiles, bool adds, float sums[4][16][16],
                             const Target& target) {
  if (adds) {
    _tile_loadd(0, sums[0], kBytes);
    _tile_loadd(1, sums[1], kBytes);
    if (HIGH) _tile_loadd(2, sums[2], kBytes);
    if (HIGH) _tile_loadd(3, sums[3], kBytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if (HIGH) _tile_zero(2);
    if (HIGH) _tile_zero(3);
  }
  int64_t row = 0;
  for (int64_t at = 0; at < tiles * kTile; at += kTile, x += 2 * kTile, row += 2) {
    target.fetch(row);
    _tile_loadd(4, panel + at, kBytes);
    _tile_stream_loadd(6, x, kBytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, second + at, kBytes);
    _tile_dpbf16ps(1, 5, 6);
    if (HIGH) _tile_stream_loadd(7, x + kTile, kBytes);
    if (HIGH) _tile_dpbf16ps(2, 4, 7);
    if (HIGH) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums[0], kBytes);
  _tile_stored(1, sums[1], kBytes);
  if (HIGH) _tile_stored(2, sums[2], kBytes);
  if (HIGH) _tile_stored(3, sums[3], kBytes);
}

// Writes the sums of 16 rows from `row` on, outputs n to n + 16; adds what is there, and the bias.
MW_TILES void store_sums(const TileJob& job, float sums[16][16], int64_t row, int64_t n, bool adds,
                         bool last) {
  const int64_t outputs = job.weight->n;
  if (n >= outputs) return;
  const __mmask16 mask = first_lanes(outputs - n);
  __m512i rows[16];
  for (int i = 0; i < 16; ++i) rows[i] = _mm512_load_si512(sums[i]);
  transpose(rows);
  const int64_t count = job.rows - row < kTileRows ? job.rows - row : kTileRows;
  float* partial = job.sums + row * outputs + n;
  if (adds)
    for (int64_t r = 0; r < count; ++r) {
      const __m512 before = _mm512_maskz_loadu_ps(mask, partial + r * outputs);
      rows[r] = __m512i(_mm512_add_ps(__m512(rows[r]), before));
    }
  if (last && job.bias) {
    const __m512 bias = _mm512_maskz_loadu_ps(mask, job.bias + n);
    for (__m512i& sums : rows) sums = __m512i(_mm512_add_ps(__m512(sums), bias));
  }
  if (!last || job.dtype == kF32) {
    for (int64_t r = 0; r < count; ++r)
      _mm512_mask_storeu_ps(partial + r * outputs, mask, __m512(rows[r]));
  } else {
    uint16_t* to = static_cast<uint16_t*>(job.y) + row * outputs + n;
    for (int64_t r = 0; r < count; ++r)
      _mm256_mask_storeu_epi16(to + r * outputs, mask, __m256i(_mm512_cvtneps_pbh(__m512(rows[r]))));
  }
}

// What the product of some outputs works in.
struct TileRoom {
  char* memory;
  uint16_t* panel;           // two times 16 outputs
  float (*sums)[4][16][16];  // of blocks of rows
  TileScales scales[2];

  TileRoom(const Weight& w, const TilePlan& plan) {
    const int64_t stride = groups_of(w) + 1;
    const size_t panels = 2 * plan.part * kTile * sizeof(uint16_t);
    const size_t all = plan.taken * sizeof *sums;
    memory = static_cast<char*>(memory_of(panels + all + 4 * kTileRows * stride * sizeof(float)));
    panel = reinterpret_cast<uint16_t*>(memory);
    sums = reinterpret_cast<float (*)[4][16][16]>(memory + panels);
    float* at = reinterpret_cast<float*>(memory + panels + all);
    for (TileScales& own : scales) {
      own = {at, at + kTileRows * stride, stride};
      at += 2 * kTileRows * stride;
    }
  }
  ~TileRoom() { std::free(memory); }
};

// Has rows of packed codes brought near: inputs `begin` to `end`.
inline void fetch_rows(const Weight& w, int64_t n, int64_t last, int64_t begin, int64_t end) {
  for (; n < last && n < w.n; ++n) {
    const uint8_t* row = w.packed + n * w.packed_stride;
    for (int64_t at = begin * w.num_bits / 8; at < end * w.num_bits / 8; at += 64)
      fetch_line(row + at, true);
  }
}

// 32 outputs by the blocks of rows from `block` on, over the inputs of one chunk.
template <Codes CODES, int BITS>
MW_TILES void multiply_panel(const TileJob& job, const TilePlan& plan,
                             const TileUnpacker<CODES, BITS>& unpacker, const TileRoom& room,
                             int64_t n, int64_t chunk, int64_t block) {
  const Weight& w = *job.weight;
  const int64_t end = block + plan.taken < plan.blocks ? block + plan.taken : plan.blocks;
  const int64_t begin = chunk * plan.tiles * kTileInputs;
  uint16_t* second = room.panel + plan.part * kTile;
  for (int half = 0; half < 2; ++half) room.scales[half].read(w, n + half * kTileRows);
  for (int64_t tile = 0; tile < plan.tiles; tile += plan.part) {
    const int64_t left = plan.tiles - tile, tiles = left < plan.part ? left : plan.part;
    const int64_t from = begin + tile * kTileInputs, all = from + tiles * kTileInputs;
    const int64_t to = all < w.k ? all : w.k;
    if (to < all) std::memset(room.panel, 0, 2 * plan.part * kTile * sizeof(uint16_t));
    unpack_tiles(unpacker, n, from, to, room.scales[0], room.panel);
    unpack_tiles(unpacker, n + kTileRows, from, to, room.scales[1], second);
    const bool ends = left <= plan.part;
    for (int64_t b = block; b < end; ++b) {
      const int64_t row = b * 2 * kTileRows;
      const bool high = row + kTileRows < job.rows;
      float(*sums)[16][16] = room.sums[b - block];
      auto* multiply = high ? multiply_tiles<true> : multiply_tiles<false>;
      multiply(room.panel, second, job.tiles + plan.place(chunk, b, tile), tiles, tile > 0, sums,
               {job.sums + row * w.n + n, w.n, ends ? job.rows - row : 0});
      for (int at = 0; ends && at < 2 + 2 * high; ++at)
        store_sums(job, sums[at], row + at / 2 * kTileRows, n + at % 2 * kTileRows, chunk > 0,
                   chunk + 1 == plan.chunks);
      const int64_t first = (b - block) * 32 / (end - block);  // of what is unpacked next
      const int64_t last = (b + 1 - block) * 32 / (end - block);
      const int64_t next = ends ? n + 32 : n, start = ends ? begin : all;
      fetch_rows(w, next + first, next + last, start, start + plan.part * kTileInputs);
    }
  }
}

template <Codes CODES, int BITS>
MW_AMX void multiply_outputs(const TileJob& job, int64_t first, int64_t last) {
  const TilePlan plan(job.rows, job.weight->k);
  const TileUnpacker<CODES, BITS> unpacker(*job.weight);
  const TileRoom room(*job.weight, plan);
  TileShapes shapes;
  for (int t = 0; t < 8; ++t) shapes.rows[t] = kTileRows, shapes.row_bytes[t] = kBytes;
  _tile_loadconfig(&shapes);
  for (int64_t chunk = 0; chunk < plan.chunks; ++chunk)
    for (int64_t block = 0; block < plan.blocks; block += plan.taken)
      for (int64_t n = first; n < last; n += 2 * kTileRows)
        multiply_panel(job, plan, unpacker, room, n, chunk, block);
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
      return w.float_shift ? multiply_outputs<kFloating, 8>(job, first, last)
                           : multiply_outputs<kWhole, 8>(job, first, last);
  }
}

}  // namespace
}  // namespace mw
#endif
