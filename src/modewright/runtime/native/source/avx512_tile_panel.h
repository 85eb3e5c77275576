// SPDX-License-Identifier: Apache-2.0
// Part of avx512.cpp: the weight of 32 outputs as tiles of 32 inputs by 16 outputs.
#pragma once
#include "avx512_tile_codes.h"

#ifdef MW_AMX
namespace mw {
namespace {

// Some inputs of 32 outputs: a panel, and the first of the blocks of rows that it is multiplied by.
struct TilePart {
  int64_t chunk, block, n;

  int64_t blocks(const TilePlan& plan) const {
    return plan.blocks - block < plan.taken ? plan.blocks - block : plan.taken;
  }

  // The part that follows; its chunk is beyond all where there is none.
  TilePart next(const TilePlan& plan, int64_t first, int64_t last) const {
    if (n + kPanelOutputs < last) return {chunk, block, n + kPanelOutputs};
    if (block + plan.taken < plan.blocks) return {chunk, block + plan.taken, first};
    return {chunk + 1, 0, first};
  }
};

// Puts pairs of inputs of 16 outputs side by side, in place.
inline void turn_tile(uint16_t* tile) {
  __m512i rows[kTileRows];
  for (int64_t r = 0; r < kTileRows; ++r) rows[r] = _mm512_load_si512(tile + r * kTileInputs);
  transpose(rows);
  for (int64_t r = 0; r < kTileRows; ++r) _mm512_store_si512(tile + r * kTileInputs, rows[r]);
}

// Unpacks panels of a weight.
template <Codes CODES, int BITS>
class PanelFiller {
 public:
  PanelFiller(const Weight& weight, const TilePlan& tile_plan, float* room)
      : w(weight), plan(tile_plan), unpacker(weight), groups(groups_of(weight)),
        group(groups == 1 ? INT64_MAX / 2 : w.group), stride(groups + 1), scales(room),
        zeros(room + kPanelOutputs * stride) {}

  // Floats that it works in.
  static int64_t room(const Weight& w) { return 2 * kPanelOutputs * (groups_of(w) + 1); }

  // Fills a panel; `fetches`: while the codes of the next outputs are asked for.
  MW_TILES void fill(const TilePart& part, uint16_t* panel, bool fetches) const {
    const int64_t next = fetches ? kPanelOutputs * w.packed_stride : 0;
    read_all_scales(part);
    const int64_t begin = part.chunk * plan.tiles * kTileInputs;
    const int64_t all = begin + plan.tiles * kTileInputs, end = all < w.k ? all : w.k;
    for (int64_t half = 0; half < kPanelOutputs; half += kTileRows) {
      uint16_t* tile = panel + half / kTileRows * plan.tiles * kTile;
      for (int64_t i = begin; i < end;) {
        const int64_t g = i / group;
        int64_t stop = i + kTiles * kTileInputs < end ? i + kTiles * kTileInputs : end;
        if (CODES == kLookedUp && stop > (g + 1) * group) stop = (g + 1) * group;
        unpack(part.n + half, half, g, i, stop, tile, next);
        for (; i < stop; i += kTileInputs, tile += kTile) turn_tile(tile);
      }
      const uint16_t* stop = panel + (half / kTileRows + 1) * plan.tiles * kTile;
      std::memset(tile, 0, (stop - tile) * sizeof *tile);
    }
  }

  // What results are to be multiplied with, if numbers are unpacked without scales.
  void scales_of_outputs(float* to) const {
    for (int64_t r = 0; r < kPanelOutputs; ++r) to[r] = scales[r * stride];
  }

 private:
  static constexpr int64_t kTiles = CODES == kLookedUp || is_plain(CODES) ? 2 : 1;  // at a time

  int64_t there(int64_t n) const { return n < w.n ? n : w.n - 1; }

  // Inputs i to `stop` of 16 outputs, which begin in group g. What is to be fetched meanwhile is
  // `next_codes` further, if that is not 0.
  MW_TILES void unpack(int64_t n, int64_t row, int64_t g, int64_t i, int64_t stop, uint16_t* to,
                       int64_t next_codes) const {
    const float *scale = scales + row * stride + g, *zero = zeros + row * stride + g;
    const int64_t count = stop - i;
    const bool all = count == 2 * kTileInputs, next = i + 16 >= (g + 1) * group;
    for (int64_t r = 0; r < kTileRows; ++r, scale += stride, zero += stride, to += kTileInputs) {
      const uint8_t* codes = w.packed + there(n + r) * w.packed_stride + i * BITS / 8;
      if (next_codes && i * BITS / 8 % kBytes < kTiles * 4 * BITS)  // once for each line
        fetch_line(codes + next_codes, true);
      if (is_plain(CODES)) {
        all ? unpacker.template plain<true>(codes, count, to)
            : unpacker.template plain<false>(codes, count, to);
      } else if (CODES != kLookedUp) {
        const float both[2] = {*scale, scale[next]}, shift[2] = {*zero, zero[next]};
        unpacker.convert(codes, count, both, shift, to);
      } else if (all) {
        unpacker.template look_up<true>(codes, count, *scale, *zero, to);
      } else {
        unpacker.template look_up<false>(codes, count, *scale, *zero, to);
      }
    }
  }

  void read_all_scales(const TilePart& part) const {
    for (int64_t r = 0; r < kPanelOutputs; ++r) {
      const int64_t row = there(part.n + r) / w.rows_per_scale;
      read_scales(w, row * w.scale_stride, groups, scales + r * stride);
      if (w.zero_point)
        shift_values(w.zero_point + row * w.zero_point_stride, groups, w.num_bits, w.zero,
                     zeros + r * stride);
    }
    if (part.n + 2 * kPanelOutputs <= w.n) fetch_scales(w, part.n + kPanelOutputs, kPanelOutputs);
  }

  const Weight& w;
  const TilePlan& plan;
  const TileUnpacker<CODES, BITS> unpacker;
  const int64_t groups, group, stride;
  float *scales, *zeros;  // of 32 outputs: one more than there are may be read
};

}  // namespace
}  // namespace mw
#endif
