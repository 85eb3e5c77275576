// SPDX-License-Identifier: Apache-2.0
// The entry points: choose the instruction set, cut the work, run it, write the result.
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "block.h"
#include "common.h"
#include "kernel.h"
#include "pool.h"

namespace mw {
namespace {

const Isa* isa_at(int place) {  // best first; 3 is "the best there is"
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2") &&
                    __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512vnni") &&
                      __builtin_cpu_supports("avx512vbmi") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
#else
  const bool avx2 = false, avx512 = false;
#endif
  switch (place) {
    case 0: return scalar_isa();
    case 1: return avx2 ? avx2_isa() : nullptr;
    case 2: return avx512 ? avx512_isa() : nullptr;
    default: return nullptr;
  }
}

const Isa* best_isa() {
  for (int place = 2; place > 0; --place)
    if (const Isa* isa = isa_at(place)) return isa;
  return scalar_isa();
}

const Isa* isa_named(int place) {
  static const Isa* best = best_isa();
  return place == 3 ? best : isa_at(place);
}

int64_t gcd(int64_t a, int64_t b) { return b ? gcd(b, a % b) : a; }

int64_t up(int64_t value, int64_t unit) { return (value + unit - 1) / unit; }

constexpr int64_t kFetched = 8192;      // bytes of a weight, before it is multiplied
constexpr int64_t kScalesFetched = 96;  // outputs, likewise
constexpr int64_t kRowsQuantized = 8;   // at least, by a thread
constexpr int64_t kLargestEntry = 128;  // inputs that share a scale of x

// False where groups are too small or too odd for the registers.
bool make_plan(const Weight& w, const Isa& isa, Activation activation, Plan* plan) {
  const int64_t bytes = isa.vector_bytes, lanes = bytes / 4;
  Plan& p = *plan;
  const bool whole = 8 % w.num_bits == 0;
  p.fields = whole && bytes > 4 ? 8 / w.num_bits : 1;
  p.step = bytes > 4 ? bytes * p.fields : 1;
  p.step_bytes = whole ? bytes : p.step * w.num_bits / 8;
  const int64_t group = w.group >= w.k ? 0 : w.group;  // 0: one scale in a row
  const int64_t shared = gcd(group, p.step);
  if (p.step > 1 && shared % (p.step / lanes)) return false;
  p.per_block = p.step / shared;
  p.block_steps = 1;
  if (p.per_block == 1) {
    const int64_t steps = group ? group / p.step : up(w.k, p.step);
    p.block_steps = steps;
    if (activation == kGroup) {
      p.block_steps = kLargestEntry / p.step < 1 ? 1 : kLargestEntry / p.step;
      if (group) p.block_steps = gcd(steps, p.block_steps);
    }
  }
  if (p.block_steps < 1) p.block_steps = 1;
  p.blocks = up(up(w.k, p.step), p.block_steps);
  p.entry = p.block_steps * p.step / p.per_block;
  p.entries = p.blocks * p.per_block;
  p.padded = p.blocks * p.block_steps * p.step;
  return true;
}

struct Output {
  void* y;
  Dtype dtype, bias_dtype;
  const void* bias;
  int terms;
};

// The bias as float32: as it is, or in the room that is given; null if there is none.
const float* bias_of(const Output& out, int64_t n, float* room) {
  if (out.bias_dtype == kNone) return nullptr;
  if (out.bias_dtype == kF32) return static_cast<const float*>(out.bias);
  const uint16_t* from = static_cast<const uint16_t*>(out.bias);
  for (int64_t i = 0; i < n; ++i) room[i] = float_at(from + i);
  return room;
}

// What kernels for few rows, or of two terms, leave to be done with columns `first` to `last` of
// their results.
void finish(const Job& job, const Output& out, const float* bias, int64_t rows, int64_t first,
            int64_t last) {
  const int64_t n = job.weight->n, count = last - first;
  for (int64_t r = 0; r < rows; ++r) {
    float* __restrict from = static_cast<float*>(job.result.y) + r * out.terms * n + first;
    if (out.terms == 2) add(from + n, count, from);
    if (bias) add(bias + first, count, from);
    if (out.dtype == kBF16) {
      uint16_t* __restrict to = static_cast<uint16_t*>(out.y) + r * n + first;
      for (int64_t i = 0; i < count; ++i) store_float(from[i], to + i);
    } else if (out.terms == 2) {
      std::memcpy(static_cast<float*>(out.y) + r * n + first, from, count * sizeof(float));
    }
  }
}

struct Arena {
  char* memory;
  size_t used = 0;
  explicit Arena(size_t size) {
    memory = static_cast<char*>(std::aligned_alloc(64, up(size, 64) * 64));
  }
  ~Arena() { std::free(memory); }
  template <class T>
  T* take(size_t count) {
    T* at = reinterpret_cast<T*>(memory + used);
    used += up(count * sizeof(T), 64) * 64;
    return at;
  }
};

// Rows of so many int8 numbers that are multiplied by one unpacking of the weight. Tiles are fast
// enough to be kept waiting by rows that do not fit the second cache.
int64_t rows_at_once(const Isa& isa, int64_t numbers) {
  constexpr int64_t kMost = 1024, kFewest = 128, kCached = 1 << 20;
  if (!isa.tiles_multiply) return kMost;
  const int64_t rows = kCached / numbers / 32 * 32;
  return rows < kFewest ? kFewest : rows < kMost ? rows : kMost;
}

// One call for so many rows of x that all they need fits the caches of a core or nearly so.
bool run(const Weight& w, const Isa& isa, const Plan& plan, const void* x, int64_t rows,
         Activation activation, float scale, const Output& out, int threads) {
  fetch(w.packed, kFetched);  // arrives while x is quantized
  fetch_scales(w, 0, kScalesFetched);
  const int64_t lanes = isa.vector_bytes / 4, all = rows * out.terms;
  const bool many = isa.panel && all > isa.dot_rows, finished = many && out.terms == 1;
  const bool direct = finished || (out.terms == 1 && out.dtype == kF32);
  const int64_t of_row = 4 * plan.entries + 2 * plan.blocks * lanes + (direct ? 0 : w.n);
  const size_t floats = size_t(all) * of_row + w.n;
  const int64_t tiled = many ? up(all, 32) * 32 : 0;  // rows of whole tiles
  Arena arena(size_t(all + tiled) * plan.padded + 4 * floats + 11 * 64);
  if (!arena.memory) return false;
  Job job{&w, plan, all};
  job.codes = arena.take<int8_t>(all * plan.padded);
  job.tiles = arena.take<int8_t>(tiled * plan.padded);
  job.scales = arena.take<float>(all * plan.entries);
  job.sums = arena.take<int32_t>(all * plan.entries);
  job.tile_scales = arena.take<float>(all * plan.entries);
  job.tile_offsets = arena.take<int32_t>(all * plan.entries);
  job.starts = arena.take<int32_t>(all * plan.blocks * lanes);
  job.lane_scales = arena.take<float>(all * plan.blocks * lanes);
  const float* bias = bias_of(out, w.n, arena.take<float>(w.n));
  if (finished) job.result = {out.y, out.dtype, bias};
  else job.result = {direct ? out.y : arena.take<float>(all * w.n), kF32, nullptr};
  job.straight = many && isa.straight && isa.straight(job, out.terms);
  parallel(threads, rows, kRowsQuantized, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r)
      isa.quantize(job, x, out.dtype, r, activation, scale, out.terms);
  });
  if (many)
    parallel(threads, isa.strips(job), 1,
             [&](int64_t first, int64_t last) { isa.interleave(job, first, last); });
  parallel(threads, w.n, 32, [&](int64_t first, int64_t last) {
    many ? isa.panel(job, first, last) : isa.dot(job, first, last);
    if (!finished && (!direct || bias)) finish(job, out, bias, rows, first, last);
  });
  return true;
}

}  // namespace
}  // namespace mw

using namespace mw;

extern "C" {

// The name of instruction set `place` (0 scalar, 1 AVX2, 2 AVX-512), null where it is missing.
MW_EXPORT const char* mw_isa(int place) {
  const Isa* isa = isa_at(place);
  return isa ? isa->name : nullptr;
}

// 1 if the weight can be multiplied by that instruction set, 0 if its groups do not fit.
MW_EXPORT int mw_fits(const Weight* weight, int place, int activation) {
  const Isa* isa = isa_at(place);
  Plan plan;
  return isa && make_plan(*weight, *isa, Activation(activation), &plan);
}

// x: [rows][k], y: [rows][n]. options: dtype of x and y | dtype of bias << 2 | activation << 4 |
// (terms - 1) << 6 | (instruction set, 3 for the best) << 7 | threads << 9.
// Returns 0, 1 if groups do not fit, 2 if memory ran out.
MW_EXPORT int mw_linear(const Weight* weight, const void* x, int64_t rows, const void* bias,
                        void* y, float scale, int options) {
  const Isa* isa = isa_named(options >> 7 & 3);
  const Activation activation = Activation(options >> 4 & 3);
  Output out{y, Dtype(options & 3), Dtype(options >> 2 & 3), bias, 1 + (options >> 6 & 1)};
  Plan plan;
  if (!isa || !make_plan(*weight, *isa, activation, &plan)) return 1;
  const int64_t kRows = rows_at_once(*isa, plan.padded * out.terms);
  const int64_t size = out.dtype == kF32 ? 4 : 2;
  for (int64_t r = 0; r < rows; r += kRows) {
    const int64_t count = rows - r < kRows ? rows - r : kRows;
    const char* from = static_cast<const char*>(x) + r * weight->k * size;
    Output part = out;
    part.y = static_cast<char*>(y) + r * weight->n * size;
    if (!run(*weight, *isa, plan, from, count, activation, scale, part, options >> 9)) return 2;
  }
  return 0;
}

// y = x W^T for weights of floating-point numbers or with a table of values; x, y: float32, each row
// of x followed by 16 floats that may be read. Bias: float32 or null.
MW_EXPORT void mw_float_linear(const Weight* weight, const float* x, int64_t x_stride, int64_t rows,
                               const float* bias, float* y, int place, int threads) {
  const Isa* isa = isa_named(place);
  parallel(threads, weight->n, 16, [=](int64_t first, int64_t last) {
    isa->float_dot(*weight, x, x_stride, rows, y, first, last);
    if (!bias) return;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t n = first; n < last; ++n) y[r * weight->n + n] += bias[n];
  });
}

// Writes what rows `first` to `last` of such a weight stand for: [last - first][k], float32 or
// bfloat16.
MW_EXPORT void mw_float_unpack(const Weight* weight, void* to, int dtype, int64_t first,
                               int64_t last, int place, int threads) {
  const Isa* isa = isa_named(place);
  const int64_t row = weight->k * (dtype == kF32 ? 4 : 2);
  parallel(threads, last - first, 16, [=](int64_t begin, int64_t end) {
    char* at = static_cast<char*>(to) + begin * row;
    isa->float_unpack(*weight, at, Dtype(dtype), first + begin, first + end);
  });
}

// Whether an instruction set multiplies in tiles.
MW_EXPORT int mw_has_tiles(int place) { return isa_named(place)->tiles_multiply != nullptr; }

// y = x W^T + bias in bfloat16, summed in float32; x is rounded to a format first, in a scale that is
// given or, if that is 0, in one for each row. Bias: float32 or null. options: dtype of x and y |
// format << 2 | instruction set << 7 | threads << 9. Returns 0, 2 if memory ran out, or 1 if numbers
// that are to be rounded are infinite or none: then nothing is said of y.
MW_EXPORT int mw_tiles_linear(const Weight* weight, const void* x, int64_t rows, const float* bias,
                              void* y, float scale, int options) {
  const Isa* isa = isa_named(options >> 7 & 3);
  const Dtype dtype = Dtype(options & 3);
  const int threads = options >> 9;
  std::atomic<bool> finite{true};
  const int64_t n = weight->n, size = dtype == kF32 ? 4 : 2;
  constexpr int64_t kRows = 1024;
  for (int64_t r = 0; r < rows; r += kRows) {
    const int64_t count = rows - r < kRows ? rows - r : kRows;
    const TilePlan plan(count, weight->k);
    const size_t sums = dtype == kF32 ? 0 : size_t(count) * n * sizeof(float);
    Arena arena(plan.place(plan.chunks, 0, 0) * sizeof(uint16_t) + sums + 2 * 64);
    if (!arena.memory) return 2;
    TileJob job{weight, static_cast<const char*>(x) + r * weight->k * size,
                static_cast<char*>(y) + r * n * size};
    job.tiles = arena.take<uint16_t>(plan.place(plan.chunks, 0, 0));
    job.sums = dtype == kF32 ? static_cast<float*>(job.y) : arena.take<float>(count * n);
    job.bias = bias;
    job.rows = count;
    job.dtype = dtype;
    job.rounding = Rounding(options >> 2 & 3);
    job.scale = scale;
    parallel(threads, plan.blocks, 1, [&](int64_t first, int64_t last) {
      if (!isa->tiles_arrange(job, first, last)) finite = false;
    });
    if (!finite) return 1;
    parallel(threads, n, 32, [&](int64_t first, int64_t last) {
      isa->tiles_multiply(job, first, last);
    });
  }
  return 0;
}

// y = x / sqrt(mean(x^2) + eps) * weight; x, y: [rows][n]. options: dtype of x and y | dtype of the
// weight << 2 | instruction set << 7 | threads << 9, as those of mw_linear; so in what follows.
MW_EXPORT void mw_rms_norm(const void* x, const void* weight, void* y, int64_t rows, int64_t n,
                           float eps, int options) {
  const Isa* isa = isa_named(options >> 7 & 3);
  const Dtype dtype = Dtype(options & 3), of_weight = Dtype(options >> 2 & 3);
  parallel(options >> 9, rows, 64, [=](int64_t first, int64_t last) {
    isa->rms_norm(x, weight, y, dtype, of_weight, n, eps, first, last);
  });
}

// gate = silu(gate) * up, of so many numbers.
MW_EXPORT void mw_silu_gate(void* gate, const void* up, int64_t count, int options) {
  const Isa* isa = isa_named(options >> 7 & 3);
  const Dtype dtype = Dtype(options & 3);
  parallel(options >> 9, count, 1 << 15, [=](int64_t first, int64_t last) {
    isa->silu_gate(gate, up, dtype, first, last);
  });
}

// What a format leaves of x, in a scale for each row or one that is given. Returns 0, or 1 if a
// number is infinite or none: then nothing is said of y. options: as those of mw_silu_gate, and the
// format << 2.
MW_EXPORT int mw_round(const void* x, void* y, int64_t rows, int64_t n, float scale, int options) {
  const Isa* isa = isa_named(options >> 7 & 3);
  const Dtype dtype = Dtype(options & 3);
  const Rounding to = Rounding(options >> 2 & 3);
  std::atomic<bool> fine{true};
  parallel(options >> 9, rows, 64, [&](int64_t first, int64_t last) {
    if (!isa->round(x, y, dtype, to, n, scale, first, last)) fine = false;
  });
  return fine ? 0 : 1;
}

// Turns the query and the key of one token of each text by where it stands: [texts][heads][features];
// cos and sin: [features], `stride` floats further for the next text.
MW_EXPORT void mw_rotate(float* query, float* key, const float* cos, const float* sin, int64_t texts,
                         int64_t heads, int64_t kv_heads, int64_t features, int64_t stride,
                         int place) {
  const Isa* isa = isa_named(place);
  for (int64_t t = 0; t < texts; ++t, cos += stride, sin += stride) {
    isa->rotate(query + t * heads * features, cos, sin, heads, features);
    isa->rotate(key + t * kv_heads * features, cos, sin, kv_heads, features);
  }
}

// One token of each text to all of its tokens. Returns 0, or 2 if memory ran out.
MW_EXPORT int mw_attend_next(Attention* attention, int place, int threads) {
  const Isa* isa = isa_named(place);
  Attention& a = *attention;
  Arena arena(sizeof(float) * size_t(a.batches * a.heads) * a.tokens + 64);
  if (!arena.memory) return 2;
  a.arranged = reinterpret_cast<float*>(arena.memory);
  const int64_t few = up(1 << 16, a.tokens * a.features);  // what is too little for two threads
  parallel(threads, a.batches * a.kv_heads, few, [&](int64_t first, int64_t last) {
    isa->attend_next(a, first, last);
  });
  return 0;
}

// Whether an instruction set has a kernel for attention.
MW_EXPORT int mw_attends(int place) { return isa_named(place)->attend != nullptr; }

// Returns 0, or 2 if memory ran out.
MW_EXPORT int mw_attend(Attention* attention, int place, int threads) {
  const Isa* isa = isa_named(place);
  Attention& a = *attention;
  const int64_t groups = a.batches * a.kv_heads;
  Arena arena(sizeof(float) * size_t(groups) * isa->attend_room(a));
  if (!arena.memory) return 2;
  a.arranged = reinterpret_cast<float*>(arena.memory);
  parallel(threads, groups, 1, [&](int64_t first, int64_t last) {
    isa->attend_prepare(a, first, last);
  });
  const int64_t blocks = a.batches * a.heads * up(a.tokens, isa->attend_tokens);
  parallel(threads, blocks, 1, [&](int64_t first, int64_t last) { isa->attend(a, first, last); });
  return 0;
}

// Searches the scales of all groups, by instruction set `place` (3 for the best), on so many
// threads.
MW_EXPORT void mw_search_scales(const ScaleSearch* search, int place, int threads) {
  const Isa* isa = isa_named(place);
  parallel(threads, search->rows, 1, [=](int64_t first, int64_t last) {
    isa->search(*search, first, last);
  });
}

}  // extern "C"
