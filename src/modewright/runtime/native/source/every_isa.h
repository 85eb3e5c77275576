// SPDX-License-Identifier: Apache-2.0
// What every instruction set has: loops that its compiler makes vectors of. Included into each.
#pragma once
#include "between.h"
#include "floats.h"
#include "next_token.h"
#include "scales.h"

namespace mw {
namespace {

inline Isa every_isa(const char* name, int64_t vector_bytes) {
  Isa isa;
  isa.name = name;
  isa.vector_bytes = vector_bytes;
  isa.search = search_rows;
  isa.float_dot = float_dot;
  isa.float_unpack = float_unpack;
  isa.rms_norm = rms_norm;
  isa.silu_gate = silu_gate;
  isa.round = round_numbers;
  isa.rotate = rotate;
  isa.attend_next = attend_next;
  return isa;
}

}  // namespace
}  // namespace mw
