// SPDX-License-Identifier: Apache-2.0
// Causal attention in float32: every token attends to itself and those before it, and nothing that
// lies behind is computed. Six queries are in registers at a time, against 64 keys, then against
// 64 features of the values.
#pragma once
#include <vector>

#include "between.h"
#include "each.h"

namespace mw {
namespace {

constexpr int kQueries = 6, kVectors = 4;
constexpr int64_t kKeys = kVectors * kAtOnce;  // in a tile

// Keys of one head, [tiles][features][64]: a feature of neighbouring keys is one run of memory.
void arrange_keys(const Attention& a, int64_t batch, int64_t head, float* to) {
  const float* keys = static_cast<const float*>(a.key) + batch * a.key_batch + head * a.key_head;
  for (int64_t tile = 0; tile * kKeys < a.tokens; ++tile, to += a.features * kKeys)
    for (int64_t at = 0; at < kKeys; ++at) {
      const int64_t token = tile * kKeys + at;
      const float* from = keys + token * a.key_token;
      for (int64_t f = 0; f < a.features; ++f) to[f * kKeys + at] = token < a.tokens ? from[f] : 0;
    }
}

// Scores of six queries and the keys of a tile.
MW_INLINE void score_tile(const float* queries, const float* keys, int64_t features, float* scores,
                          int64_t stride) {
  Floats sums[kQueries][kVectors] = {};
  for (int64_t f = 0; f < features; ++f, keys += kKeys) {
    Floats row[kVectors];
    each<kVectors>(EACH(v) { row[v] = floats_at(keys + v * kAtOnce); });
    each<kQueries>(EACH(q) {
      const Floats value = Floats{} + queries[q * features + f];
      each<kVectors>(EACH(v) { sums[q][v] += value * row[v]; });
    });
  }
  each<kQueries>(EACH(q) {
    each<kVectors>(EACH(v) { store_floats(sums[q][v], scores + q * stride + v * kAtOnce); });
  });
}

// Turns the scores of a query into weights, of which those from `count` to `padded` are 0; returns
// their sum.
MW_INLINE float weigh(float* scores, int64_t count, int64_t padded) {
  for (int64_t i = count; i < padded; ++i) scores[i] = -3e38f;
  Floats most = floats_at(scores);
  for (int64_t i = kAtOnce; i < padded; i += kAtOnce) {
    const Floats value = floats_at(scores + i);
    most = value > most ? value : most;
  }
  float largest = most[0];
  for (int lane = 1; lane < kAtOnce; ++lane) largest = most[lane] > largest ? most[lane] : largest;
  Floats total = {};
  for (int64_t i = 0; i < padded; i += kAtOnce) {
    const Floats value = exp2_of(floats_at(scores + i) - largest);
    store_floats(value, scores + i);
    total += value;
  }
  for (int64_t i = count; i < padded; ++i) scores[i] = 0;
  return sum_of(total);
}

// Some features of six outputs: VECTORS * 16 of them. All queries see the tokens before `first`,
// and each one more than the query before it.
template <int VECTORS>
MW_INLINE void mix_values(const float* weights, int64_t stride, const float* values,
                          int64_t value_token, int64_t first, const float* sums, float* out,
                          int64_t out_token, int64_t queries) {
  Floats mixed[kQueries][VECTORS] = {};
  const auto add = [&](int64_t token, int64_t unseen) __attribute__((always_inline)) {
    Floats row[VECTORS];
    each<VECTORS>(EACH(v) { row[v] = floats_at(values + token * value_token + v * kAtOnce); });
    each<kQueries>(EACH(q) {
      if (q < unseen) return;
      const Floats weight = Floats{} + weights[q * stride + token];
      each<VECTORS>(EACH(v) { mixed[q][v] += weight * row[v]; });
    });
  };
  for (int64_t token = 0; token < first; ++token) add(token, 0);
  for (int64_t q = 0; q < queries; ++q) add(first + q, q);  // what is no number stays unseen, too
  each<kQueries>(EACH(q) {
    if (q < queries)
      each<VECTORS>(EACH(v) {
        store_floats(mixed[q][v] / sums[q], out + q * out_token + v * kAtOnce);
      });
  });
}

// Six queries of one head, from token `first` on.
void attend_block(const Attention& a, int64_t batch, int64_t head, int64_t first,
                  const float* keys, float* queries, float* scores, int64_t stride) {
  const int64_t group = head / (a.heads / a.kv_heads);
  const int64_t here = a.tokens - first < kQueries ? a.tokens - first : kQueries;
  const float* from = a.query + batch * a.query_batch + head * a.query_head;
  for (int64_t q = 0; q < kQueries; ++q)
    for (int64_t f = 0; f < a.features; ++f)
      queries[q * a.features + f] =
          q < here ? from[(first + q) * a.query_token + f] * a.scaling * 1.44269504f : 0;
  const int64_t seen = first + here;
  const int64_t padded = (seen + kKeys - 1) / kKeys * kKeys;
  for (int64_t k = 0; k < padded; k += kKeys)
    score_tile(queries, keys + k * a.features, a.features, scores + k, stride);
  float sums[kQueries];
  for (int64_t q = 0; q < kQueries; ++q)
    sums[q] = weigh(scores + q * stride, q < here ? first + q + 1 : seen, padded);
  const float* values =
      static_cast<const float*>(a.value) + batch * a.value_batch + group * a.value_head;
  float* out = a.out + ((batch * a.tokens + first) * a.heads + head) * a.features;
  const int64_t out_token = a.heads * a.features;
  int64_t f = 0;
  for (; f + kKeys <= a.features; f += kKeys)
    mix_values<kVectors>(scores, stride, values + f, a.value_token, first, sums, out + f, out_token,
                         here);
  for (; f < a.features; f += kAtOnce)
    mix_values<1>(scores, stride, values + f, a.value_token, first, sums, out + f, out_token, here);
}

// Queries of the tokens `first` to `last` of one head.
void attend_queries(const Attention& a, int64_t batch, int64_t head, int64_t first, int64_t last,
                    const float* keys) {
  const int64_t stride = (a.tokens + kKeys - 1) / kKeys * kKeys + kAtOnce;
  std::vector<float> room(kQueries * (stride + a.features));
  for (; first < last; first += kQueries)
    attend_block(a, batch, head, first, keys, room.data() + kQueries * stride, room.data(), stride);
}

int64_t arranged_floats(const Attention& a) {
  return (a.tokens + kKeys - 1) / kKeys * kKeys * a.features;
}

// Keys of the heads `first` to `last` of all batches, of key and value.
void attend_prepare(const Attention& a, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; ++i)
    arrange_keys(a, i / a.kv_heads, i % a.kv_heads, a.arranged + i * arranged_floats(a));
}

constexpr int64_t kBlockQueries = 8 * kQueries;

// Blocks of queries, those of a head one after another; the longest first.
void attend(const Attention& a, int64_t first, int64_t last) {
  const int64_t blocks = (a.tokens + kBlockQueries - 1) / kBlockQueries;
  for (int64_t i = first; i < last; ++i) {
    const int64_t head = i / blocks % a.heads, batch = i / blocks / a.heads;
    const int64_t group = batch * a.kv_heads + head / (a.heads / a.kv_heads);
    const int64_t token = (blocks - 1 - i % blocks) * kBlockQueries;
    const int64_t end = token + kBlockQueries < a.tokens ? token + kBlockQueries : a.tokens;
    attend_queries(a, batch, head, token, end, a.arranged + group * arranged_floats(a));
  }
}

}  // namespace
}  // namespace mw
