// SPDX-License-Identifier: Apache-2.0
// AVX-512 with VNNI and VBMI: Intel since Ice Lake, AMD since Zen 4.
#include "kernel.h"

#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__)
#include "avx512_amx_bytes.h"
#include "avx512_attend.h"
#include "avx512_dot.h"
#include "avx512_panel.h"
#include "avx512_quantize.h"
#include "avx512_tiles.h"
#include "floats.h"
#include "next_token.h"
#include "scales.h"

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
  static Soon soon(int64_t n, int c) { return {n + (c + 1) * kLanes, kLanes, false}; }
  template <int PANELS, bool SHIFTS>
  static void run(const Job& job, const Panel* panels, int64_t n) {
    tiles<PANELS, SHIFTS>(job, panels, n);
  }
};

#ifdef MW_AMX
struct InTiles {
  static Soon soon(int64_t n, int c) {
    return {n + 2 * kLanes + c * kAmxSoon, kAmxSoon, true};
  }
  template <int PANELS, bool SHIFTS>
  static void run(const Job& job, const Panel* panels, int64_t n) {
    in_tiles<PANELS, SHIFTS>(job, panels, n);
  }
};

void interleave_either(const Job& job) {
  if (lies_in_tiles(job)) turn_rows(job);
  else fills_tiles(job.plan) ? interleave_rows(job) : interleave(job);
}

void panel_either(const Job& job, int64_t first, int64_t last) {
  if (lies_in_tiles(job)) multiply_as_they_lie(job, first, last);
  else fills_tiles(job.plan) ? panel<InTiles>(job, first, last)
                             : panel<InRegisters>(job, first, last);
}

const Isa kAmx = {"avx512", kBytes, 2, quantize, dot, interleave_either, panel_either,
                  search_rows, float_dot, float_unpack,
                  rms_norm, silu_gate, round_fp8, rotate, attend_next, attend_prepare, attend,
                  arrange_tiles, multiply_tiled};
#endif

const Isa kIsa = {"avx512", kBytes, 2, quantize, dot, interleave, panel<InRegisters>,
                  search_rows, float_dot, float_unpack,
                  rms_norm, silu_gate, round_fp8, rotate, attend_next, attend_prepare, attend, nullptr, nullptr};

}  // namespace

const Isa* avx512_isa() {
#ifdef MW_AMX
  static const Isa found = [] {
    Isa isa = amx_usable() ? kAmx : kIsa;
    if (!amx_bf16_usable()) isa.tiles_arrange = isa.tiles_multiply = nullptr;
    return isa;
  }();
  return &found;
#else
  return &kIsa;
#endif
}

}  // namespace mw

#else

namespace mw {
const Isa* avx512_isa() { return nullptr; }
}  // namespace mw

#endif
