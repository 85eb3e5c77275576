// SPDX-License-Identifier: Apache-2.0
// What the next token of a text needs between linear layers: its query and key are turned by where
// it stands, and it attends to itself and all before it. Included into each instruction set, as
// floats.h is.
#pragma once
#include <algorithm>

#include "between.h"

namespace mw {
namespace {

// x = x * cos + (-second half, first half) * sin, for some heads of a token.
void rotate(float* x, const float* cos, const float* sin, int64_t heads, int64_t features) {
  const int64_t half = features / 2;
  for (int64_t h = 0; h < heads; ++h, x += features)
    for (int64_t i = 0; i < half; ++i) {
      const float first = x[i], second = x[i + half];
      x[i] = first * cos[i] - second * sin[i];
      x[i + half] = second * cos[i + half] + first * sin[i + half];
    }
}

// Scores to weights that add up to 1.
inline void softmax(float* scores, int64_t count) {
  const float log2e = 1.44269504f;
  const float largest = *std::max_element(scores, scores + count);
  Floats sums = {};
  int64_t t = 0;
  for (; t + kAtOnce <= count; t += kAtOnce) {
    const Floats value = exp2_of((floats_at(scores + t) - largest) * log2e);
    store_floats(value, scores + t);
    sums += value;
  }
  float sum = sum_of(sums);
  for (; t < count; ++t) sum += scores[t] = std::exp(scores[t] - largest);
  const float factor = 1.0f / sum;
  for (t = 0; t < count; ++t) scores[t] *= factor;
}

constexpr int64_t kTokensAhead = 32;  // whose keys and values are fetched, and weighed at a time

template <class T>
MW_INLINE void fetch_numbers(const T* at, int64_t count, bool deep) {
  for (int64_t i = 0; i < count; i += 64 / int64_t(sizeof(T))) fetch_line(at + i, deep);
}

// QUERIES heads of one token, which share their keys and values.
template <int QUERIES, class T>
void attend_shared(const Attention& a, const float* query, const T* key, const T* value,
                   float* scores, float* out) {
  const bool deep = fetches_deep();
  for (int64_t t = 0; t < a.tokens; ++t) {
    Floats sum[QUERIES] = {};
    if (t + kTokensAhead < a.tokens)
      fetch_numbers(key + (t + kTokensAhead) * a.key_token, a.features, deep);
    for (int64_t i = 0; i < a.features; i += kAtOnce) {
      const Floats part = floats_at(key + t * a.key_token + i);
      each<QUERIES>(EACH(q) { sum[q] += part * floats_at(query + q * a.query_head + i); });
    }
    each<QUERIES>(EACH(q) { scores[q * a.tokens + t] = sum_of(sum[q]) * a.scaling; });
  }
  for (int q = 0; q < QUERIES; ++q) softmax(scores + q * a.tokens, a.tokens);
  std::memset(out, 0, QUERIES * a.features * sizeof(float));
  for (int64_t begin = 0; begin < a.tokens; begin += kTokensAhead) {
    const int64_t end = begin + kTokensAhead < a.tokens ? begin + kTokensAhead : a.tokens;
    for (int64_t t = end; t < end + kTokensAhead && t < a.tokens; ++t)
      fetch_numbers(value + t * a.value_token, a.features, deep);
    for (int64_t i = 0; i < a.features; i += kAtOnce) {
      Floats sum[QUERIES];
      each<QUERIES>(EACH(q) { sum[q] = floats_at(out + q * a.features + i); });
      for (int64_t t = begin; t < end; ++t) {
        const Floats part = floats_at(value + t * a.value_token + i);
        each<QUERIES>(EACH(q) { sum[q] += part * scores[q * a.tokens + t]; });
      }
      each<QUERIES>(EACH(q) { store_floats(sum[q], out + q * a.features + i); });
    }
  }
}

template <class T>
void attend_groups(const Attention& a, int64_t first, int64_t last) {
  const int64_t shared = a.heads / a.kv_heads;
  for (int64_t g = first; g < last; ++g) {
    const int64_t batch = g / a.kv_heads, head = g % a.kv_heads;
    const T* key = static_cast<const T*>(a.key) + batch * a.key_batch + head * a.key_head;
    const T* value = static_cast<const T*>(a.value) + batch * a.value_batch + head * a.value_head;
    for (int64_t q = 0; q < shared;) {
      const int64_t own = head * shared + q, left = shared - q;
      const float* query = a.query + batch * a.query_batch + own * a.query_head;
      float* out = a.out + (batch * a.heads + own) * a.features;
      float* scores = a.arranged + (batch * a.heads + own) * a.tokens;
      if (left >= 4) attend_shared<4>(a, query, key, value, scores, out), q += 4;
      else if (left == 3) attend_shared<3>(a, query, key, value, scores, out), q += 3;
      else if (left == 2) attend_shared<2>(a, query, key, value, scores, out), q += 2;
      else attend_shared<1>(a, query, key, value, scores, out), q += 1;
    }
  }
}

// One query of each head to all tokens: groups `first` to `last` of heads that share a key.
void attend_next(const Attention& a, int64_t first, int64_t last) {
  a.dtype == kF32 ? attend_groups<float>(a, first, last) : attend_groups<uint16_t>(a, first, last);
}

}  // namespace
}  // namespace mw
