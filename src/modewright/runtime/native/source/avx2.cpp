// SPDX-License-Identifier: Apache-2.0
// AVX2: Intel since Haswell, AMD since Zen. There is no product of u8 and s8 in int32 here: pairs
// are summed in int16, which 7 bits fit, so the codes of 8 bits are taken apart once more.
#include "every_isa.h"
#include "each.h"

#if defined(__AVX2__) && defined(__BMI2__)
#include <immintrin.h>

namespace mw {
namespace {

constexpr int64_t kLanes = 8, kBytes = 32;

enum Kind { kByte, kNibble, kCrumb, kStream };

template <Kind KIND>
constexpr int fields() { return KIND == kNibble ? 2 : KIND == kCrumb ? 4 : 1; }

struct Unpacker {
  int num_bits;
  int64_t step_bytes;
  __m256i mask;
  __m256i table[4];  // sixteen numbers each, twice

  explicit Unpacker(const Weight& w) : num_bits(w.num_bits) {
    step_bytes = 8 % num_bits == 0 ? kBytes : kBytes / 8 * num_bits;
    mask = _mm256_set1_epi8(char((1 << num_bits) - 1));
    for (int i = 0; i < 4 && w.table; ++i)
      table[i] = _mm256_broadcastsi128_si256(
          _mm_loadu_si128(reinterpret_cast<const __m128i*>(w.table + 16 * i)));
  }
};

// The bytes of one step, of which `left` are inside the row.
template <Kind KIND>
inline __m256i raw_step(const Unpacker& u, const uint8_t* at, int64_t left) {
  alignas(32) uint8_t copy[kBytes + 8];
  const int64_t needed = KIND == kStream ? u.step_bytes + 8 - u.num_bits : kBytes;
  if (left < needed) {
    const int64_t count = left < 0 ? 0 : left;
    std::memset(copy, 0, sizeof copy);
    std::memcpy(copy, at, size_t(count));
    at = copy;
  }
  if (KIND != kStream) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
  uint64_t eights[4];
  const uint64_t places = 0x0101010101010101ull * ((1u << u.num_bits) - 1);
  for (int i = 0; i < 4; ++i) {
    uint64_t stream;
    std::memcpy(&stream, at + i * u.num_bits, 8);
    eights[i] = _pdep_u64(stream, places);
  }
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(eights));
}

template <Kind KIND, bool TABLE>
inline __m256i field(const Unpacker& u, __m256i raw, int place) {
  __m256i codes = raw;
  if (KIND == kNibble)
    codes = _mm256_and_si256(place ? _mm256_srli_epi16(raw, 4) : raw, u.mask);
  if (KIND == kCrumb) codes = _mm256_and_si256(_mm256_srli_epi16(raw, 2 * place), u.mask);
  if (!TABLE) return codes;
  __m256i found = _mm256_shuffle_epi8(u.table[0], codes);
  if (KIND == kNibble) return found;
  const __m256i part = _mm256_and_si256(codes, _mm256_set1_epi8(0x30));
  for (int i = 1; i < 4; ++i) {
    const __m256i here = _mm256_cmpeq_epi8(part, _mm256_set1_epi8(char(i << 4)));
    const __m256i low = _mm256_and_si256(codes, _mm256_set1_epi8(15));
    found = _mm256_blendv_epi8(found, _mm256_shuffle_epi8(u.table[i], low), here);
  }
  return found;
}

// sum += w * x, four products of u8 x s8 in each lane; WIDE: w has more than 7 bits.
template <bool WIDE>
inline __m256i accumulated(__m256i sum, __m256i w, __m256i x) {
  const __m256i ones = _mm256_set1_epi16(1);
  if (!WIDE) return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), ones));
  const __m256i low = _mm256_and_si256(w, _mm256_set1_epi8(1));
  const __m256i high = _mm256_and_si256(_mm256_srli_epi16(w, 1), _mm256_set1_epi8(127));
  const __m256i lows = _mm256_madd_epi16(_mm256_maddubs_epi16(low, x), ones);
  const __m256i highs = _mm256_madd_epi16(_mm256_maddubs_epi16(high, x), _mm256_set1_epi16(2));
  return _mm256_add_epi32(sum, _mm256_add_epi32(lows, highs));
}

inline float sum_of(__m256 lanes) {
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

template <Kind KIND, bool TABLE, int ROWS>
void dot_rows(const Job& job, const Unpacker& u, int64_t n, int64_t row, const float* scales,
              const float* shifts, __m256i lane_entry) {
  constexpr int F = fields<KIND>();
  constexpr bool kWide = KIND == kByte;
  const Weight& w = *job.weight;
  const Plan& p = job.plan;
  const uint8_t* packed = w.packed + n * w.packed_stride;
  const int64_t bytes = (w.k * w.num_bits + 7) / 8;
  const int8_t* codes = job.codes + row * p.padded;
  const int32_t* starts = job.starts + row * p.blocks * kLanes;
  const float* lane_scales = job.lane_scales + row * p.blocks * kLanes;
  const int64_t row_lanes = p.blocks * kLanes;
  __m256 total[ROWS];
  each<ROWS>(EACH(r) { total[r] = _mm256_setzero_ps(); });
  int64_t at = 0;
  for (int64_t b = 0; b < p.blocks; ++b) {
    __m256i sum[ROWS];
    each<ROWS>(EACH(r) {
      sum[r] = _mm256_loadu_si256(
          reinterpret_cast<const __m256i*>(starts + r * row_lanes + b * kLanes));
    });
    for (int64_t s = 0; s < p.block_steps; ++s, at += u.step_bytes, codes += F * kBytes) {
      _mm_prefetch(reinterpret_cast<const char*>(packed + at + 4096), _MM_HINT_T0);
      const __m256i raw = raw_step<KIND>(u, packed + at, bytes - at);
      each<F>(EACH(f) {
        const __m256i unpacked = field<KIND, TABLE>(u, raw, f);
        each<ROWS>(EACH(r) {
          const int8_t* x = codes + r * p.padded + f * kBytes;
          sum[r] = accumulated<kWide>(
              sum[r], unpacked, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
        });
      });
    }
    const __m256 scale =
        _mm256_permutevar8x32_ps(_mm256_loadu_ps(scales + b * p.per_block), lane_entry);
    each<ROWS>(EACH(r) {
      const __m256 own = _mm256_loadu_ps(lane_scales + r * row_lanes + b * kLanes);
      total[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[r]), _mm256_mul_ps(scale, own), total[r]);
    });
  }
  for (int r = 0; r < ROWS; ++r) {
    float result = sum_of(total[r]);
    const int32_t* sums = job.sums + (row + r) * p.entries;
    const float* own = job.scales + (row + r) * p.entries;
    for (int64_t e = 0; w.zero_point && e < p.entries; ++e)
      result -= scales[e] * shifts[e] * (float(sums[e]) * own[e]);
    static_cast<float*>(job.result.y)[(row + r) * w.n + n] = result;
  }
}

template <Kind KIND, bool TABLE>
void dot_kind(const Job& job, int64_t first, int64_t last) {
  const Unpacker u(*job.weight);
  const int64_t size = job.plan.entries + kLanes;
  float* scales = static_cast<float*>(memory_of(2 * size * sizeof(float)));
  float* shifts = scales + size;
  alignas(32) int32_t lane_entry[kLanes];
  for (int64_t lane = 0; lane < kLanes; ++lane)
    lane_entry[lane] = int32_t(lane * job.plan.per_block / kLanes);
  const __m256i entry = _mm256_load_si256(reinterpret_cast<const __m256i*>(lane_entry));
  for (int64_t n = first; n < last; ++n) {
    entry_scales(*job.weight, job.plan, n, scales, shifts);
    int64_t row = 0;
    for (; job.rows - row >= 4; row += 4)
      dot_rows<KIND, TABLE, 4>(job, u, n, row, scales, shifts, entry);
    for (; row < job.rows; ++row)
      dot_rows<KIND, TABLE, 1>(job, u, n, row, scales, shifts, entry);
  }
  std::free(scales);
}

void dot(const Job& job, int64_t first, int64_t last) {
  const bool table = job.weight->table != nullptr;
  switch (job.weight->num_bits) {
    case 8: return dot_kind<kByte, false>(job, first, last);
    case 2: return dot_kind<kCrumb, false>(job, first, last);
    case 4:
      return table ? dot_kind<kNibble, true>(job, first, last)
                   : dot_kind<kNibble, false>(job, first, last);
    default:
      return table ? dot_kind<kStream, true>(job, first, last)
                   : dot_kind<kStream, false>(job, first, last);
  }
}

Isa made() {
  Isa isa = every_isa("avx2", kBytes);
  isa.quantize = quantize_row<kBytes>;
  isa.dot = dot;
  return isa;
}

}  // namespace

const Isa* avx2_isa() {
  static const Isa isa = made();
  return &isa;
}

}  // namespace mw

#else

namespace mw {
const Isa* avx2_isa() { return nullptr; }
}  // namespace mw

#endif
