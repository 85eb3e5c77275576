// SPDX-License-Identifier: Apache-2.0
// AVX-512 with VNNI and VBMI: Intel since Ice Lake, AMD since Zen 4.
#include "kernel.h"

#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__)
#include "avx512_amx_attend.h"
#include "avx512_amx_bytes.h"
#include "avx512_attend.h"
#include "avx512_dot.h"
#include "avx512_panel.h"
#include "avx512_quantize.h"
#include "avx512_tiles.h"
#include "every_isa.h"

namespace mw {
namespace {

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

template <class MULTIPLY>
void panel(const Job& job, int64_t first, int64_t last) {
  const bool table = job.weight->table != nullptr;
  switch (kind_of(*job.weight)) {
    case kByte: return panel_kind<kByte, false, MULTIPLY>(job, first, last);
    case kCrumb: return panel_kind<kCrumb, false, MULTIPLY>(job, first, last);
    case kNibble:
      return table ? panel_kind<kNibble, true, MULTIPLY>(job, first, last)
                   : panel_kind<kNibble, false, MULTIPLY>(job, first, last);
    default:
      return table ? panel_kind<kStream, true, MULTIPLY>(job, first, last)
                   : panel_kind<kStream, false, MULTIPLY>(job, first, last);
  }
}

struct InRegisters {
  static int64_t panels(const Job&, int64_t) { return 2; }
  static Soon soon(int64_t n, int64_t c, int64_t) { return {n + (c + 1) * kLanes, kLanes, false}; }
  template <bool SHIFTS>
  static void run(const Job& job, const Panels& panels, int64_t count, int64_t n) {
    if (count == 2) tiles<2, SHIFTS>(job, {panels[0], panels[1]}, n);
    else tiles<1, SHIFTS>(job, {panels[0]}, n);
  }
};

#ifdef MW_AMX
struct InTiles {
  static int64_t panels(const Job& job, int64_t all) { return panels_at_once(job, all); }
  static Soon soon(int64_t n, int64_t c, int64_t most) {
    if (most > 2) return {n + (c + 1) * kLanes, kLanes, true};
    return {n + 2 * kLanes + c * kAmxSoon, kAmxSoon, true};
  }
  template <bool SHIFTS>
  static void run(const Job& job, const Panels& panels, int64_t count, int64_t n) {
    in_tiles<SHIFTS>(job, panels, count, n);
  }
};

int64_t strips_either(const Job& job) {
  return fills_tiles(job.plan) ? TilePlan::parts(job.rows, 2 * kAmxRows) : strips(job);
}

void interleave_either(const Job& job, int64_t first, int64_t last) {
  if (!fills_tiles(job.plan)) return interleave(job, first, last);
  for (int64_t strip = first; strip < last; ++strip)
    lies_in_tiles(job) ? turn_rows(job, strip) : interleave_rows(job, strip);
}

bool straight(const Job& job, int terms) {
  return is_whole(job.weight->k, job.plan, terms) && fills_tiles(job.plan) && !lies_in_tiles(job);
}

void panel_either(const Job& job, int64_t first, int64_t last) {
  if (lies_in_tiles(job)) multiply_as_they_lie(job, first, last);
  else fills_tiles(job.plan) ? panel<InTiles>(job, first, last)
                             : panel<InRegisters>(job, first, last);
}

// What is done otherwise where there are tiles.
void use_tiles(Isa& isa) {
  if (!amx_usable()) return;
  isa.strips = strips_either;
  isa.interleave = interleave_either;
  isa.straight = straight;
  isa.panel = panel_either;
  if (!amx_bf16_usable()) return;
  isa.tiles_arrange = arrange_tiles;
  isa.tiles_multiply = multiply_tiled;
  isa.attend_room = HeadTiles::room;
  isa.attend_tokens = kTileQueries;
  isa.attend_prepare = attend_prepare_tiles;
  isa.attend = attend_in_tiles;
}
#else
void use_tiles(Isa&) {}
#endif

Isa made() {
  Isa isa = every_isa("avx512", kBytes);
  isa.dot_rows = 2;
  isa.quantize = quantize;
  isa.dot = dot;
  isa.strips = strips;
  isa.interleave = interleave;
  isa.panel = panel<InRegisters>;
  isa.attend_room = arranged_floats;
  isa.attend_tokens = kBlockQueries;
  isa.attend_prepare = attend_prepare;
  isa.attend = attend;
  use_tiles(isa);
  return isa;
}

}  // namespace

const Isa* avx512_isa() {
  static const Isa isa = made();
  return &isa;
}

}  // namespace mw

#else

namespace mw {
const Isa* avx512_isa() { return nullptr; }
}  // namespace mw

#endif
