// SPDX-License-Identifier: Apache-2.0
// One block of a language model for the next token of each text: two calls, between which the cache
// takes the new key and value. Each does what the entry points of linear.cpp do, one after the other.
#include "block.h"

#include <cstdlib>
#include <cstring>

namespace mw {
namespace {

constexpr int kNoBias = kNone << 2;

int multiply(const Block& b, BlockWeight which, const float* x, int64_t texts, float* y,
             int options) {
  const float* bias = b.biases[which];
  options |= b.acts[which] << 4 | (bias ? 0 : kNoBias);
  return mw_linear(b.weights[which], x, texts, bias, y, b.act_scales[which], options);
}

void add(const float* x, int64_t count, float* y) {
  for (int64_t i = 0; i < count; ++i) y[i] += x[i];
}

// Floats for a moment, or null.
struct Room {
  float* at;
  explicit Room(int64_t count)
      : at(static_cast<float*>(std::malloc(size_t(count) * sizeof(float)))) {}
  ~Room() { std::free(at); }
};

}  // namespace
}  // namespace mw

using namespace mw;

extern "C" {

// Query, key and value of x, turned: x: [texts][width]; cos and sin: [features], `stride` floats
// further for the next text. Returns what mw_linear does.
MW_EXPORT int mw_block_begin(const Block* block, const float* x, int64_t texts, const float* cos,
                             const float* sin, int64_t stride, float* query, float* key,
                             float* value, int place, int threads) {
  const Block& b = *block;
  const int options = place << 7 | threads << 9;
  const Room normed(texts * b.width);
  if (!normed.at) return 2;
  mw_rms_norm(x, b.norms[0], normed.at, texts, b.width, b.eps[0], place, threads);
  if (const int failed = multiply(b, kQuery, normed.at, texts, query, options)) return failed;
  if (const int failed = multiply(b, kKey, normed.at, texts, key, options)) return failed;
  if (const int failed = multiply(b, kValue, normed.at, texts, value, options)) return failed;
  mw_rotate(query, key, cos, sin, texts, b.heads, b.kv_heads, b.features, stride, place);
  return 0;
}

// What the block makes of x, [texts][width], when all keys and values are there.
MW_EXPORT int mw_block_end(const Block* block, const float* x, Attention* attention, float* y,
                           int place, int threads) {
  const Block& b = *block;
  const int64_t texts = attention->batches;
  const int options = place << 7 | threads << 9;
  const int64_t size = texts * b.width, inner = texts * b.inner;
  const int64_t seen_size = texts * b.heads * b.features;
  const Room room(2 * size + 2 * inner + seen_size);
  if (!room.at) return 2;
  float *hidden = room.at, *normed = hidden + size, *gate = normed + size, *up = gate + inner;
  float* seen = up + inner;
  attention->out = seen;
  if (const int failed = mw_attend_next(attention, place, threads)) return failed;
  if (const int failed = multiply(b, kOutput, seen, texts, hidden, options)) return failed;
  add(x, size, hidden);
  mw_rms_norm(hidden, b.norms[1], normed, texts, b.width, b.eps[1], place, threads);
  if (const int failed = multiply(b, kGate, normed, texts, gate, options)) return failed;
  if (const int failed = multiply(b, kUp, normed, texts, up, options)) return failed;
  mw_silu_gate(gate, up, inner, place, threads);
  if (const int failed = multiply(b, kDown, gate, texts, y, options)) return failed;
  add(hidden, size, y);
  return 0;
}

}  // extern "C"
