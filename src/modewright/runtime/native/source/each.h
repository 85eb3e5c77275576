// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <type_traits>
#include <utility>

namespace mw {
namespace {

// Calls f(0), f(1) ... f(COUNT - 1) with constants. Loops are unrolled after the compiler has
// decided what lives in registers: arrays of registers would stay in memory.
template <class F, int... I>
inline __attribute__((always_inline)) void each_of(std::integer_sequence<int, I...>, F&& f) {
  (f(std::integral_constant<int, I>{}), ...);
}
template <int COUNT, class F>
inline __attribute__((always_inline)) void each(F&& f) {
  each_of(std::make_integer_sequence<int, COUNT>{}, f);
}
#define EACH(place) [&](auto place) __attribute__((always_inline))

}  // namespace
}  // namespace mw
