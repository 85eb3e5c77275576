// SPDX-License-Identifier: Apache-2.0
#include "common.h"
namespace mw {
const Isa* avx2_isa() { return nullptr; }
}  // namespace mw
