// SPDX-License-Identifier: Apache-2.0
// y = x W^T + bias, where W is packed: unsigned codes of 2 to 8 bits, a scale per group of inputs.
//
// How it is computed. Every row of x becomes int8: a scale per group of inputs (or per row, or one
// that is given), so that products are u8 x s8 summed in int32. What was summed is converted to
// float once per group, times both scales. The zero point of the codes costs the sum of the int8
// numbers of the group, which is known before.
//
// K is cut into *steps*, what one vector register holds as packed bytes; several steps that share
// all scales are a *block*; a block has one *entry* (one scale), or several if groups are smaller
// than a step. Inside a step the int8 numbers are permuted as unpacking permutes the codes: first
// those that meet the lowest bits of each byte, and so on.
#pragma once
#include <cstdint>

namespace mw {

// Mirrored by modewright.runtime.native.library.WeightStruct.
struct Weight {
  const uint8_t* packed;      // [n][packed_stride], a dense stream of bits per row
  const void* scale;          // [ceil(n / rows_per_scale)][scale_stride], scale_kind
  const uint8_t* zero_point;  // [..][zero_point_stride], packed like the codes, or null
  const uint8_t* table;       // 64 numbers that codes stand for, or null: the code itself
  int64_t n, k;
  int64_t packed_stride, scale_stride, zero_point_stride;
  int64_t group;              // inputs that share a scale; k or more: all of a row
  int64_t rows_per_scale;
  int32_t num_bits;
  int32_t scale_kind;         // float32, float16, e8m0, e4m3, as in ScaleKind
  int32_t zero;               // the number that stands for 0 (where zero_point is null)
  float multiplier;           // all scales are to be multiplied with it
  // Of floating-point numbers with 8 bits (floats.h) how far their bits are from those of a float:
  int32_t float_shift;
  float float_factor;
  const float* values;        // 64 numbers that codes of up to 6 bits stand for before scales, or null
};

enum ScaleKind { kFloat32 = 0, kFloat16 = 1, kE8M0 = 2, kE4M3 = 3 };
enum Dtype { kF32 = 0, kBF16 = 1, kNone = 2 };
enum Rounding { kAsItIs = 0, kToE4m3 = 1, kToInt8 = 2 };
enum Activation { kGroup = 0, kToken = 1, kTensor = 2 };

struct Plan {
  int64_t fields;       // codes of a byte that are taken apart by shifts: 4, 2 or 1
  int64_t step;         // inputs in a step
  int64_t step_bytes;   // packed bytes of a step
  int64_t block_steps;  // steps in a block
  int64_t blocks;
  int64_t per_block;    // entries in a block
  int64_t entry;        // inputs in an entry
  int64_t entries;
  int64_t padded;       // blocks * block_steps * step
};

// Where results go. Kernels for few rows write float32 without a bias.
struct Result {
  void* y;  // [rows][n]
  Dtype dtype;
  const float* bias;  // or null
};

// All that a kernel reads. "rows" are rows of int8 numbers: two for one of x in high accuracy.
struct Job {
  const Weight* weight;
  Plan plan;
  int64_t rows;
  int8_t* codes;       // [rows][padded]
  float* scales;       // [rows][entries]
  int32_t* sums;       // [rows][entries]: sum of the codes
  int32_t* starts;     // [rows][blocks][lanes]: -zero * the sum of the codes that meet in a lane
  float* lane_scales;  // [rows][blocks][lanes]
  int8_t* tiles;           // codes again, interleaved for the panel kernel, and likewise
  float* tile_scales;      // scales
  int32_t* tile_offsets;   // and -zero * sums
  bool straight;           // whether rows are quantized into `tiles`: then there are no codes
  Result result;
};

constexpr int64_t kTile = 512;       // bfloat16 numbers of a tile
constexpr int64_t kTileInputs = 32;  // that lie side by side in it
constexpr int64_t kTileRows = 16;
constexpr int64_t kPanelOutputs = 32;  // that are unpacked at a time

// How a product in tiles is cut, so that what is multiplied stays in the caches.
struct TilePlan {
  int64_t tiles;   // of inputs in a chunk: 2048 of them at most
  int64_t chunks;
  int64_t blocks;  // of 32 rows
  int64_t taken;   // of them, multiplied by one unpacking: a megabyte of x at most

  TilePlan(int64_t rows, int64_t k) {
    constexpr int64_t kMostTiles = 64, kMostOfX = 1024;
    const int64_t all = parts(k, kTileInputs);
    chunks = parts(all, kMostTiles);
    tiles = parts(all, chunks);
    blocks = parts(rows, 2 * kTileRows);
    taken = parts(blocks, parts(2 * blocks * tiles, kMostOfX));
  }
  // Where x is: 16 rows and the 16 after them in turns, tile by tile.
  int64_t place(int64_t chunk, int64_t block, int64_t tile) const {
    return ((chunk * blocks + block) * tiles + tile) * 2 * kTile;
  }
  static int64_t parts(int64_t value, int64_t unit) { return (value + unit - 1) / unit; }
};

// A product in bfloat16 on CPUs with tiles.
struct TileJob {
  const Weight* weight;
  const void* x;      // [rows][k], float32 or bfloat16, as y
  void* y;            // [rows][n]
  float* sums;        // [rows][n]: y itself if that is float32
  const float* bias;  // or null
  uint16_t* tiles;    // room for x in tiles
  int64_t rows;
  Dtype dtype;
  Rounding rounding;  // of x before it is multiplied,
  float scale;        // in this scale, or 0: each row in its own
};

// A search of scales. Mirrored by modewright.runtime.native.scales.SearchStruct.
struct ScaleSearch {
  const float* values;      // [rows][groups][size]
  const float* counts;      // what squared errors count: [groups][size], of rows too, or null
  float* scale;             // [rows][groups]: those to begin with, and then the best
  float* zero;              // the same of zero points, or null
  int64_t rows, groups, size;
  float low, high;          // the codes' range
  float shrink, highest;    // parts of the first scale that are tried
  int32_t steps;
  int32_t has_zero;
  int32_t counts_of_rows;
};

// Causal attention, float32. Mirrored by modewright.runtime.native.between.AttentionStruct.
struct Attention {
  const float* query;       // [batch][head][token][features]: features lie side by side, the others
  const void *key, *value;  // are so many numbers apart
  float* out;               // [batch][token][head][..]
  float* arranged;                   // room for the keys, or the scores of the next token
  int64_t batches, heads, kv_heads, tokens, features;
  int64_t query_batch, query_head, query_token;
  int64_t key_batch, key_head, key_token;
  int64_t value_batch, value_head, value_token;
  float scaling;
  int32_t dtype;  // Dtype of keys and values; only float32 but for the next token
};

// One instruction set. What is null it does not have.
struct Isa {
  const char* name = nullptr;
  int64_t vector_bytes = 0;
  int64_t dot_rows = INT64_MAX;  // up to so many rows the dot kernel is the faster one
  void (*quantize)(const Job&, const void* x, Dtype, int64_t row, Activation, float scale,
                   int terms) = nullptr;
  void (*dot)(const Job&, int64_t first, int64_t last) = nullptr;
  int64_t (*strips)(const Job&) = nullptr;  // into which the panel kernel cuts rows
  void (*interleave)(const Job&, int64_t first, int64_t last) = nullptr;  // strips
  bool (*straight)(const Job&, int terms) = nullptr;  // whether quantizing can do that
  void (*panel)(const Job&, int64_t first, int64_t last) = nullptr;
  void (*search)(const ScaleSearch&, int64_t first, int64_t last) = nullptr;  // of rows
  void (*float_dot)(const Weight&, const float* x, int64_t x_stride, int64_t rows, float* out,
                    int64_t first, int64_t last) = nullptr;
  void (*float_unpack)(const Weight&, void* to, Dtype, int64_t first, int64_t last) = nullptr;
  void (*rms_norm)(const void* x, const void* weight, void* y, Dtype, Dtype of_weight, int64_t n,
                   float eps, int64_t first, int64_t last) = nullptr;
  void (*silu_gate)(void* gate, const void* up, Dtype, int64_t first, int64_t last) = nullptr;
  bool (*round)(const void* x, void* y, Dtype, Rounding, int64_t n, float scale, int64_t first,
                int64_t last) = nullptr;
  void (*rotate)(float* x, const float* cos, const float* sin, int64_t heads,
                 int64_t features) = nullptr;
  void (*attend_next)(const Attention&, int64_t first, int64_t last) = nullptr;
  int64_t (*attend_room)(const Attention&) = nullptr;  // floats for each head of the keys
  int64_t attend_tokens = 0;                           // that are taken together
  void (*attend_prepare)(const Attention&, int64_t first, int64_t last) = nullptr;
  void (*attend)(const Attention&, int64_t first, int64_t last) = nullptr;
  // False: numbers that are to be rounded are infinite or none.
  bool (*tiles_arrange)(const TileJob&, int64_t first, int64_t last) = nullptr;
  void (*tiles_multiply)(const TileJob&, int64_t first, int64_t last) = nullptr;
};

const Isa* scalar_isa();
const Isa* avx2_isa();    // null where the compiler does not know it
const Isa* avx512_isa();

}  // namespace mw
