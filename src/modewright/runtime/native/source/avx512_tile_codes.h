// SPDX-License-Identifier: Apache-2.0
// Part of avx512.cpp: packed codes become scaled numbers in bfloat16, as rows of tiles.
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

// How codes become numbers: of up to 6 bits by a table of what a group has, scaled, if groups are
// whole tiles; of 4 bits by two tables for the halves of a tile; whole numbers of 8 bits; fp8; and
// both of these without scales, if a row has only one: results are scaled then.
enum Codes { kLookedUp, kFine, kWhole, kFloating, kPlainWhole, kPlainFloating };

constexpr bool is_plain(Codes codes) { return codes == kPlainWhole || codes == kPlainFloating; }

// Scaled numbers of one weight as bfloat16, 32 at a time.
template <Codes CODES, int BITS>
struct TileUnpacker {
  alignas(64) float numbers[64] = {};
  const Weight& w;
  __m256i gather, shifts;
  __m128i mantissa;  // how far that of fp8 is from that of float16, or without scales of bfloat16
  float factor, zero;
  __m512i exponent, smallest, below;  // see plain()

  explicit TileUnpacker(const Weight& weight) : w(weight) {
    const bool floats = CODES == kFloating;
    mantissa = _mm_cvtsi32_si128(floats ? w.float_shift - 13 : 0);
    factor = floats ? w.float_factor * 0x1p-112f : 1.0f;
    zero = floats ? 0.0f : float(w.zero);
    if (CODES == kPlainFloating) {
      mantissa = _mm_cvtsi32_si128(w.float_shift - 16);
      exponent = _mm512_set1_epi16(int16_t(bits_of(w.float_factor) - bits_of(1.0f) >> 16));
      below = _mm512_set1_epi16(int16_t(0x80 - (1 << (23 - w.float_shift))));
      alignas(64) uint16_t values[kTileInputs];
      for (uint32_t code = 0; code < kTileInputs; ++code)
        values[code] = uint16_t(bits_of(float_of(code << w.float_shift) * w.float_factor) >> 16);
      smallest = _mm512_load_si512(values);
    }
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

  // Numbers of a row, which share a scale, into a row of one or two tiles: 64, or up to 64.
  template <bool ALL>
  MW_TILES void look_up(const uint8_t* from, int64_t count, float scale, float zero,
                        uint16_t* to) const {
    const __m512 s = _mm512_set1_ps(scale), z = _mm512_set1_ps(zero);
    const __m512i first = table_of_32(0, s, z);
    const __m512i second = BITS > 5 ? table_of_32(32, s, z) : first;
    for (int tile = 0; tile < 2; ++tile, from += 4 * BITS, count -= kTileInputs) {
      if (!ALL && count <= 0) return;
      const __m512i at = codes(from, ALL ? kTileInputs : count);
      __m512i found = BITS > 5 ? _mm512_permutex2var_epi16(first, at, second)
                               : _mm512_permutexvar_epi16(at, first);
      if (!ALL) found = _mm512_maskz_mov_epi16(first_of_tile(count), found);
      _mm512_store_si512(to + tile * kTile, found);
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

  // Numbers of a row without their scale, which bfloat16 holds exactly, into a row of one or two
  // tiles: 64, or up to 64.
  template <bool ALL>
  MW_TILES void plain(const uint8_t* from, int64_t count, uint16_t* to) const {
    for (int tile = 0; tile < 2; ++tile, from += kTileInputs, count -= kTileInputs) {
      if (!ALL && count <= 0) return;
      const __m256i raw = ALL ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))
                              : load(from, count);
      __m512i found = CODES == kPlainFloating ? plain_floats(raw) : plain_whole(raw);
      if (!ALL) found = _mm512_maskz_mov_epi16(first_of_tile(count), found);
      _mm512_store_si512(to + tile * kTile, found);
    }
  }

  // By their bits; the smallest ones, which have no exponent, from a table.
  MW_TILES __m512i plain_floats(__m256i codes) const {
    const __m512i wide = _mm512_cvtepu8_epi16(codes), low = _mm512_set1_epi16(0x7f);
    const __m512i rest = _mm512_sll_epi16(_mm512_and_si512(wide, low), mantissa);
    const __m512i usual = _mm512_add_epi16(rest, exponent);
    const __mmask32 small = _mm512_testn_epi16_mask(wide, below);
    const __m512i size = _mm512_mask_permutexvar_epi16(usual, small, wide, smallest);
    const __m512i sign = _mm512_set1_epi16(int16_t(0x8000));
    return _mm512_ternarylogic_epi64(size, _mm512_slli_epi16(wide, 8), sign, 0xf8);
  }

  MW_TILES __m512i plain_whole(__m256i codes) const {
    const __m512i less = _mm512_set1_epi32(w.zero);
    const __m512i low = _mm512_cvtepu8_epi32(_mm256_castsi256_si128(codes));
    const __m512i high = _mm512_cvtepu8_epi32(_mm256_extracti128_si256(codes, 1));
    return __m512i(_mm512_cvtne2ps_pbh(_mm512_cvtepi32_ps(_mm512_sub_epi32(high, less)),
                                       _mm512_cvtepi32_ps(_mm512_sub_epi32(low, less))));
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

}  // namespace
}  // namespace mw
#endif
