// SPDX-License-Identifier: Apache-2.0
// Causal attention in tiles, with errors of 1e-5 of the largest value: numbers are cut into bfloat16 ones that add up to
// them, and products of parts are summed in float32 (Henry, Tang, Heinecke, "Leveraging the bfloat16
// artificial intelligence datatype for higher-precision computations", 2019): six of three parts each
// for scores, whose errors exp() would enlarge, three of two parts for values. Thirty-two queries meet
// 256 keys at a time, and what was summed is scaled when a larger score appears (Milakov, Gimelshein,
// "Online normalizer calculation for softmax", 2018).
#pragma once
#include "avx512_attend.h"
#include "avx512_tile_codes.h"

#ifdef MW_AMX

namespace mw {
namespace {

constexpr int64_t kTileQueries = 2 * kTileRows;  // at a time
constexpr int64_t kTileKeys = 256;               // whose scores stay in the first cache
constexpr int64_t kScoreParts = 3, kValueParts = 2;
constexpr float kNone = -3e38f;  // the score of what is not seen

MW_INLINE __m512 widened(__m256i half) {
  return __m512(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// What the next part of numbers is, which it is taken off.
MW_TILES MW_INLINE __m512i next_part(__m512& low, __m512& high) {
  const __m512i part = __m512i(_mm512_cvtne2ps_pbh(high, low));
  low = _mm512_sub_ps(low, widened(_mm512_castsi512_si256(part)));
  high = _mm512_sub_ps(high, widened(_mm512_extracti64x4_epi64(part, 1)));
  return part;
}

// How the tiles of one head of key and value lie.
struct HeadTiles {
  int64_t tokens, features;  // whole tiles
  uint32_t* others;          // whether a number is infinite or none, or nearly: then not in tiles
  uint16_t* keys;            // [16 tokens][32 features][part]
  uint16_t* values;          // [32 tokens][16 features][part]

  HeadTiles(const Attention& a, int64_t group)
      : tokens((a.tokens + 63) / 64 * 64), features((a.features + 31) / 32 * 32) {
    others = reinterpret_cast<uint32_t*>(a.arranged + group * room(a));
    keys = reinterpret_cast<uint16_t*>(others + 16);
    values = keys + tokens * features * kScoreParts;
  }

  // Floats that they take: no fewer than keys do that are arranged otherwise.
  static int64_t room(const Attention& a) {
    const int64_t numbers = (a.tokens + 63) / 64 * 64 * ((a.features + 31) / 32 * 32);
    return 16 + numbers * (kScoreParts + kValueParts) / 2;
  }

  const uint16_t* keys_at(int64_t token) const { return keys + token * features * kScoreParts; }
  const uint16_t* values_at(int64_t token) const { return values + token * features * kValueParts; }
};

// Sixteen features of a token, 0 beyond all.
MW_INLINE __m512 features_of(const float* from, int64_t token, int64_t stride, int64_t f,
                             const Attention& a) {
  const bool there = token < a.tokens && f < a.features;
  return there ? _mm512_loadu_ps(from + token * stride + f) : _mm512_setzero_ps();
}

// The largest magnitude of so many bits is bfloat16's: what is beyond has no parts.
inline void note_magnitude(__m512i& largest, __m512 value) {
  const __m512i bits = _mm512_and_si512(__m512i(value), _mm512_set1_epi32(0x7fffffff));
  largest = _mm512_max_epu32(largest, bits);
}

MW_TILES void arrange_head(const Attention& a, int64_t batch, int64_t head, const HeadTiles& to) {
  const float* keys = static_cast<const float*>(a.key) + batch * a.key_batch + head * a.key_head;
  const float* values =
      static_cast<const float*>(a.value) + batch * a.value_batch + head * a.value_head;
  __m512i largest = _mm512_setzero_si512();
  uint16_t* tile = to.keys;
  for (int64_t token = 0; token < to.tokens; token += kTileRows)
    for (int64_t f = 0; f < to.features; f += kTileInputs, tile += kScoreParts * kTile) {
      __m512i parts[kScoreParts][16];
      for (int64_t t = 0; t < kTileRows; ++t) {
        __m512 low = features_of(keys, token + t, a.key_token, f, a);
        __m512 high = features_of(keys, token + t, a.key_token, f + kLanes, a);
        note_magnitude(largest, low);
        note_magnitude(largest, high);
        for (int64_t p = 0; p < kScoreParts; ++p) parts[p][t] = next_part(low, high);
      }
      for (int64_t p = 0; p < kScoreParts; ++p) {
        transpose(parts[p]);
        for (int64_t r = 0; r < kTileRows; ++r)
          _mm512_store_si512(tile + p * kTile + r * kTileInputs, parts[p][r]);
      }
    }
  tile = to.values;
  const __m512i turns = _mm512_set_epi16(  // of the first and second token's numbers in turns
      31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3,
      18, 2, 17, 1, 16, 0);
  for (int64_t token = 0; token < to.tokens; token += kTileInputs)
    for (int64_t f = 0; f < to.features; f += kLanes, tile += kValueParts * kTile)
      for (int64_t r = 0; r < kTileRows; ++r) {
        __m512 one = features_of(values, token + 2 * r, a.value_token, f, a);
        __m512 other = features_of(values, token + 2 * r + 1, a.value_token, f, a);
        note_magnitude(largest, one);
        note_magnitude(largest, other);
        for (int64_t p = 0; p < kValueParts; ++p)
          _mm512_store_si512(tile + p * kTile + r * kTileInputs,
                             _mm512_permutexvar_epi16(turns, next_part(one, other)));
      }
  *to.others = _mm512_reduce_max_epu32(largest) >= 0x7f7f0000u;
}

// What 32 queries work in.
struct QueryRoom {
  alignas(64) float scores[kTileQueries][kTileKeys];
  // [32 keys][part][query][key]; a row more, so that not all lie in the same lines of the cache
  alignas(64) uint16_t weights[kTileKeys / kTileInputs][kValueParts][kTileQueries + 1][kTileInputs];
  float largest[kTileQueries], sums[kTileQueries];
};

// Scores of 32 queries and 32 keys: tiles 0 to 3; 4, 5: queries; 6, 7: keys.
MW_TILES void score_tiles(const uint16_t* queries, const uint16_t* keys, int64_t features,
                          float* to) {
  const uint16_t* second = keys + features * kTileRows * kScoreParts;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t f = 0; f < features; f += kTileInputs) {
    for (int64_t k = 0; k < kScoreParts; ++k, keys += kTile, second += kTile) {
      _tile_loadd(6, keys, kBytes);
      _tile_loadd(7, second, kBytes);
      for (int64_t q = 0; q + k < kScoreParts; ++q) {
        const uint16_t* part = queries + 2 * q * kTile;
        _tile_loadd(4, part, kBytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, part + kTile, kBytes);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    queries += 2 * kScoreParts * kTile;
  }
  constexpr int64_t kRow = kTileKeys * sizeof(float);
  _tile_stored(0, to, kRow);
  _tile_stored(1, to + kLanes, kRow);
  _tile_stored(2, to + kTileRows * kTileKeys, kRow);
  _tile_stored(3, to + kTileRows * kTileKeys + kLanes, kRow);
}

inline __mmask16 lanes_before(int64_t count) { return count <= 0 ? 0 : first_lanes(count); }

// Turns the first `count` scores of a query into weights, those up to `padded` into 0; ALL: there are
// none of these. Returns what the sums before are to be multiplied with.
template <bool ALL>
MW_TILES MW_INLINE float weigh_tiles(QueryRoom& room, int64_t query, int64_t count, int64_t padded) {
  const float* scores = room.scores[query];
  __m512 most = _mm512_set1_ps(room.largest[query]);
  for (int64_t i = 0; i < count; i += kLanes) {
    const __mmask16 seen = ALL ? __mmask16(0xffff) : lanes_before(count - i);
    most = _mm512_mask_max_ps(most, seen, most, _mm512_load_ps(scores + i));
  }
  const float largest = _mm512_reduce_max_ps(most);
  const __m512 all = _mm512_set1_ps(largest);
  __m512 total = _mm512_setzero_ps();
  for (int64_t i = 0; i < padded; i += kTileInputs) {
    __m512 halves[2];
    for (int64_t h = 0; h < 2; ++h) {
      const int64_t at = i + h * kLanes;
      const __m512 score = _mm512_sub_ps(_mm512_load_ps(scores + at), all);
      halves[h] = __m512(exp2_of(Floats(score)));
      if (!ALL) halves[h] = _mm512_maskz_mov_ps(lanes_before(count - at), halves[h]);
      total = _mm512_add_ps(total, halves[h]);
    }
    for (int64_t p = 0; p < kValueParts; ++p)
      _mm512_store_si512(room.weights[i / kTileInputs][p][query], next_part(halves[0], halves[1]));
  }
  const float factor = std::exp2(room.largest[query] - largest);
  room.sums[query] = room.sums[query] * factor + _mm512_reduce_add_ps(total);
  room.largest[query] = largest;
  return factor;
}

// Adds weighted values of `count` keys to 32 outputs, 32 features at a time: tiles 0 to 3; 4, 5:
// weights; 6, 7: values.
MW_TILES void mix_tiles(const QueryRoom& room, const uint16_t* values, int64_t count,
                        int64_t features, float* out) {
  const int64_t row = features * sizeof(float);
  for (int64_t f = 0; f < features; f += 2 * kLanes) {
    float *first = out + f, *below = first + kTileRows * features;
    _tile_loadd(0, first, row);
    _tile_loadd(1, first + kLanes, row);
    _tile_loadd(2, below, row);
    _tile_loadd(3, below + kLanes, row);
    for (int64_t key = 0; key < count; key += kTileInputs) {
      const auto& weights = room.weights[key / kTileInputs];
      const uint16_t* tile = values + (key * features + f * kTileInputs) * kValueParts;
      for (int64_t v = 0; v < kValueParts; ++v, tile += kTile) {
        _tile_loadd(6, tile, kBytes);
        _tile_loadd(7, tile + kValueParts * kTile, kBytes);
        for (int64_t w = 0; w + v < kValueParts; ++w) {
          _tile_loadd(4, weights[w][0], kBytes);
          _tile_dpbf16ps(0, 4, 6);
          _tile_dpbf16ps(1, 4, 7);
          _tile_loadd(5, weights[w][kTileRows], kBytes);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
      }
    }
    _tile_stored(0, first, row);
    _tile_stored(1, first + kLanes, row);
    _tile_stored(2, below, row);
    _tile_stored(3, below + kLanes, row);
  }
}

// Queries `first` to `first` + 32 of a head, scaled, in parts: [32 features][part][query].
MW_TILES void arrange_queries(const Attention& a, int64_t batch, int64_t head, int64_t first,
                              int64_t features, uint16_t* to) {
  const float* from = a.query + batch * a.query_batch + head * a.query_head;
  const __m512 scaling = _mm512_set1_ps(a.scaling * 1.44269504f);
  for (int64_t f = 0; f < features; f += kTileInputs, to += 2 * kScoreParts * kTile)
    for (int64_t q = 0; q < kTileQueries; ++q) {
      __m512 low = features_of(from, first + q, a.query_token, f, a);
      __m512 high = features_of(from, first + q, a.query_token, f + kLanes, a);
      low = _mm512_mul_ps(low, scaling);
      high = _mm512_mul_ps(high, scaling);
      for (int64_t p = 0; p < kScoreParts; ++p)
        _mm512_store_si512(to + 2 * p * kTile + q * kTileInputs, next_part(low, high));
    }
}

// What threads attend in.
struct AttendRoom {
  QueryRoom* queries;
  uint16_t* parts;  // of queries
  float* out;       // [32][features]

  explicit AttendRoom(int64_t features) {
    const size_t numbers = kTileQueries * features;
    const size_t in_parts = numbers * kScoreParts * sizeof *parts;
    char* memory = static_cast<char*>(
        room_of(sizeof *queries + in_parts + numbers * sizeof *out));
    queries = reinterpret_cast<QueryRoom*>(memory);
    parts = reinterpret_cast<uint16_t*>(memory + sizeof *queries);
    out = reinterpret_cast<float*>(memory + sizeof *queries + in_parts);
  }
  AttendRoom(const AttendRoom&) = delete;
  ~AttendRoom() { std::free(queries); }
};

// Thirty-two queries of one head, from token `first` on.
MW_TILES void attend_tiles(const Attention& a, const HeadTiles& tiles, int64_t batch, int64_t head,
                           int64_t first, const AttendRoom& room) {
  const int64_t features = tiles.features, left = a.tokens - first;
  const int64_t here = left < kTileQueries ? left : kTileQueries;
  QueryRoom& work = *room.queries;
  arrange_queries(a, batch, head, first, features, room.parts);
  std::memset(room.out, 0, kTileQueries * features * sizeof(float));
  for (int64_t q = 0; q < kTileQueries; ++q) work.largest[q] = kNone, work.sums[q] = 0;
  for (int64_t begin = 0; begin < first + here; begin += kTileKeys) {
    const int64_t seen = first + here - begin, most = seen < kTileKeys ? seen : kTileKeys;
    const int64_t padded = (most + kTileInputs - 1) / kTileInputs * kTileInputs;
    for (int64_t k = 0; k < padded; k += kTileInputs)
      score_tiles(room.parts, tiles.keys_at(begin + k), features, work.scores[0] + k);
    for (int64_t q = 0; q < kTileQueries; ++q) {
      const int64_t own = first + (q < here ? q : here - 1) + 1 - begin;
      const float factor = own < padded ? weigh_tiles<false>(work, q, own, padded)
                                        : weigh_tiles<true>(work, q, padded, padded);
      if (begin == 0 || factor == 1.0f) continue;
      float* out = room.out + q * features;
      for (int64_t f = 0; f < features; f += kLanes)
        store_floats(floats_at(out + f) * factor, out + f);
    }
    mix_tiles(work, tiles.values_at(begin), padded, features, room.out);
  }
  for (int64_t q = 0; q < here; ++q) {
    float* to = a.out + ((batch * a.tokens + first + q) * a.heads + head) * a.features;
    for (int64_t f = 0; f < a.features; f += kLanes)
      store_floats(floats_at(room.out + q * features + f) / work.sums[q], to + f);
  }
}

void attend_prepare_tiles(const Attention& a, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; ++i) {
    const HeadTiles tiles(a, i);
    arrange_head(a, i / a.kv_heads, i % a.kv_heads, tiles);
    if (*tiles.others)
      arrange_keys(a, i / a.kv_heads, i % a.kv_heads, reinterpret_cast<float*>(tiles.keys));
  }
}

// Blocks of 32 queries, those of a head one after another; the longest first.
MW_TILES void attend_in_tiles(const Attention& a, int64_t first, int64_t last) {
  const int64_t blocks = (a.tokens + kTileQueries - 1) / kTileQueries;
  TileShapes shapes;
  for (int t = 0; t < 8; ++t) shapes.rows[t] = kTileRows, shapes.row_bytes[t] = kBytes;
  _tile_loadconfig(&shapes);
  const AttendRoom room((a.features + 31) / 32 * 32);
  for (int64_t i = first; i < last; ++i) {
    const int64_t head = i / blocks % a.heads, batch = i / blocks / a.heads;
    const HeadTiles tiles(a, batch * a.kv_heads + head / (a.heads / a.kv_heads));
    const int64_t token = (blocks - 1 - i % blocks) * kTileQueries;
    const int64_t end = token + kTileQueries < a.tokens ? token + kTileQueries : a.tokens;
    if (*tiles.others)
      attend_queries(a, batch, head, token, end, reinterpret_cast<const float*>(tiles.keys));
    else
      attend_tiles(a, tiles, batch, head, token, room);
  }
  _tile_release();
}

}  // namespace
}  // namespace mw
#endif
