// SPDX-License-Identifier: Apache-2.0
// One block of a language model for the next token of each text: one call where the cache has room for
// the new key and value, or two, between which it takes them. They do what the entry points of
// linear.cpp do, one after the other.
#include "block.h"

#include <cstdlib>
#include <cstring>

#include "common.h"

namespace mw {
namespace {

int multiply(const Block& b, BlockWeight which, const float* x, int64_t texts, float* y,
             int options) {
  const void* bias = b.biases[which];
  options |= b.acts[which] << 4 | (bias ? b.dtype : kNone) << 2;
  return mw_linear(b.weights[which], x, texts, bias, y, b.act_scales[which], options);
}

void norm(const Block& b, int which, const float* x, int64_t texts, float* y, int options) {
  options |= b.dtype << 2;
  mw_rms_norm(x, b.norms[which], y, texts, b.width, b.eps[which], options);
}

// Floats for a moment, if there is memory.
struct Room {
  float *at, *next;
  explicit Room(int64_t count)
      : at(static_cast<float*>(std::malloc(size_t(count) * sizeof(float)))), next(at) {}
  ~Room() { std::free(at); }
  float* take(int64_t count) {
    float* taken = next;
    next += count;
    return taken;
  }
};

// Numbers that come from outside, as float32.
const float* widened(const void* from, int dtype, int64_t count, float* room) {
  if (dtype == kF32) return static_cast<const float*>(from);
  for (int64_t i = 0; i < count; ++i) room[i] = float_at(static_cast<const uint16_t*>(from) + i);
  return room;
}

// Where numbers are made that go outside, and their way there.
float* made(void* to, int dtype, float* room) { return dtype == kF32 ? static_cast<float*>(to) : room; }

void narrow(const float* from, int64_t count, void* to, int dtype) {
  if (dtype == kF32) return;  // they were made there
  for (int64_t i = 0; i < count; ++i) store_float(from[i], static_cast<uint16_t*>(to) + i);
}

}  // namespace
}  // namespace mw

using namespace mw;

extern "C" {

// Query, key and value of x, turned: x: [texts][width]; cos and sin: [features], `stride` numbers
// further for the next text. The query is float32 always. options: instruction set << 7 |
// threads << 9. Returns what mw_linear does.
MW_EXPORT int mw_block_begin(const Block* block, const void* x, int64_t texts, const void* cos,
                             const void* sin, int64_t stride, float* query, void* key, void* value,
                             int options) {
  const Block& b = *block;
  const int64_t size = texts * b.width, turns = texts * b.features, keys = turns * b.kv_heads;
  Room room(2 * size + 2 * turns + 2 * keys);
  if (!room.at) return 2;
  float* normed = room.take(size);
  const float* from = widened(x, b.dtype, size, room.take(size));
  const int64_t turned = stride ? turns : b.features;
  const float* cosines = widened(cos, b.dtype, turned, room.take(turns));
  const float* sines = widened(sin, b.dtype, turned, room.take(turns));
  float* own_key = made(key, b.dtype, room.take(keys));
  float* own_value = made(value, b.dtype, room.take(keys));
  norm(b, 0, from, texts, normed, options);
  if (const int failed = multiply(b, kQuery, normed, texts, query, options)) return failed;
  if (const int failed = multiply(b, kKey, normed, texts, own_key, options)) return failed;
  if (const int failed = multiply(b, kValue, normed, texts, own_value, options)) return failed;
  mw_rotate(query, own_key, cosines, sines, texts, b.heads, b.kv_heads, b.features, stride,
            options >> 7 & 3);
  narrow(own_key, keys, key, b.dtype);
  narrow(own_value, keys, value, b.dtype);
  return 0;
}

// What the block makes of x, [texts][width], when all keys and values are there.
MW_EXPORT int mw_block_end(const Block* block, const void* x, Attention* attention, void* y,
                           int options) {
  const Block& b = *block;
  const int64_t texts = attention->batches, size = texts * b.width, inner = texts * b.inner;
  const int64_t seen_size = texts * b.heads * b.features;
  Room room(4 * size + 2 * inner + seen_size);
  if (!room.at) return 2;
  float *hidden = room.take(size), *normed = room.take(size);
  float *gate = room.take(inner), *up = room.take(inner);
  float* seen = attention->out = room.take(seen_size);
  const float* from = widened(x, b.dtype, size, room.take(size));
  float* result = made(y, b.dtype, room.take(size));
  if (const int failed = mw_attend_next(attention, options >> 7 & 3, options >> 9)) return failed;
  if (const int failed = multiply(b, kOutput, seen, texts, hidden, options)) return failed;
  add(from, size, hidden);
  norm(b, 1, hidden, texts, normed, options);
  if (const int failed = multiply(b, kGate, normed, texts, gate, options)) return failed;
  if (const int failed = multiply(b, kUp, normed, texts, up, options)) return failed;
  mw_silu_gate(gate, up, inner, options);
  if (const int failed = multiply(b, kDown, gate, texts, result, options)) return failed;
  add(hidden, size, result);
  narrow(result, size, y, b.dtype);
  return 0;
}

// Both, with keys and values that have room: [texts][kv_heads][room][features]. The new ones are
// written where the last of `tokens` belong.
MW_EXPORT int mw_block_next(const Block* block, const void* x, int64_t texts, const void* cos,
                            const void* sin, int64_t stride, void* keys, void* values,
                            int64_t tokens, int64_t room, void* y, int options) {
  const Block& b = *block;
  const int64_t f = b.features, heads = texts * b.kv_heads, row = b.heads * f;
  const size_t bytes = size_t(f) * (b.dtype == kF32 ? 4 : 2);
  Room here(texts * row + 2 * heads * f);
  if (!here.at) return 2;
  float* query = here.take(texts * row);
  void *key = here.take(heads * f), *value = here.take(heads * f);
  const int failed = mw_block_begin(block, x, texts, cos, sin, stride, query, key, value, options);
  if (failed) return failed;
  for (int64_t h = 0; h < heads; ++h) {
    const size_t from = h * bytes, to = (h * room + tokens - 1) * bytes;
    std::memcpy(static_cast<char*>(keys) + to, static_cast<char*>(key) + from, bytes);
    std::memcpy(static_cast<char*>(values) + to, static_cast<char*>(value) + from, bytes);
  }
  const int64_t head = room * f, text = b.kv_heads * head;
  Attention attention = {query, keys, values, nullptr, nullptr, texts, b.heads, b.kv_heads, tokens,
                         f, row, f, f, text, head, f, text, head, f, b.scaling, b.dtype};
  return mw_block_end(block, x, &attention, y, options);
}

}  // extern "C"
