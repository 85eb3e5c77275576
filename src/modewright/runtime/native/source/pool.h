// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <functional>

namespace mw {

// Calls work(first, last) for parts of [0, count) that begin at multiples of `unit`, on up to so
// many threads, the caller's among them. Returns when all is done.
void parallel(int threads, int64_t count, int64_t unit,
              const std::function<void(int64_t, int64_t)>& work);

}  // namespace mw
