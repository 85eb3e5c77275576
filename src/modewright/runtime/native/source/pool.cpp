// SPDX-License-Identifier: Apache-2.0
#include "pool.h"
namespace mw {
void parallel(int threads, int64_t count, int64_t unit,
              const std::function<void(int64_t, int64_t)>& work) {
  work(0, count);
}
}  // namespace mw
