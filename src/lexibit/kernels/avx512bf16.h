// Levels and tokens rounded to bfloat16, for AVX-512 with BF16 beside VBMI: what the files share that are compiled for
// these.
#pragma once

#include "avx512.h"
#include "parallel.h"

namespace lexibit {
namespace {

using Half = std::uint16_t;  // the upper half of a float

// Sixteen rows from a column on: where their codes stand, and what these mean.
template <int bits>
struct HalfRows {
  static constexpr int size = bits <= 3 ? 8 : 1 << bits;
  Place codes[16];
  alignas(64) Half level[16][size];
};

// A thread's means to decode rows of one weight.
template <int bits>
class HalfLevels {
 public:
  explicit HalfLevels(const Weight& weight) : weight_(weight), table_(weight) {}

  // Some columns of sixteen rows from `first` on; those behind the last are the last one again.
  const HalfRows<bits>& rows(std::int64_t first, std::int64_t column, std::int64_t columns) {
    const std::int64_t run = column / weight_.block_columns;
    for (int r = 0; r < 16; ++r) {
      const std::int64_t row = std::min(first + r, weight_.rows - 1);
      rows_.codes[r] = vectors_.of(weight_, row, column, columns, r);
      const std::int64_t group = weight_.group(row, run);
      if (group == group_[r]) continue;
      group_[r] = group;
      if (r && group == group_[r - 1])
        std::memcpy(rows_.level[r], rows_.level[r - 1], sizeof rows_.level[r]);
      else
        round(table_.of(group), rows_.level[r]);
    }
    return rows_;
  }

 private:
  static void round(const float* table, Half* out) {
    for (int i = 0; i < HalfRows<bits>::size; i += 8) {
      const __m128bh eight = _mm256_cvtneps_pbh(_mm256_loadu_ps(table + i));
      std::memcpy(out + i, &eight, sizeof eight);
    }
  }

  const Weight& weight_;
  Table table_;
  Vectors<bits> vectors_;
  std::int64_t group_[16] = {-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1};
  HalfRows<bits> rows_;
};

// The levels of 32 codes, one in each lane; bits above a code's own are ignored.
template <int bits>
inline __m512i halves(const Half* level, __m512i code) {
  const auto at = [&](int part) { return _mm512_loadu_si512(level + 32 * part); };
  if constexpr (bits <= 3) {
    const __m128i table = _mm_loadu_si128(reinterpret_cast<const __m128i*>(level));
    return _mm512_permutexvar_epi16(code, _mm512_broadcast_i32x4(table));
  } else if constexpr (bits == 4) {
    const __m256i table = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(level));
    return _mm512_permutexvar_epi16(code, _mm512_broadcast_i64x4(table));
  } else if constexpr (bits == 5) {
    return _mm512_permutexvar_epi16(code, at(0));
  } else {
    const auto sixty_four = [&](int part) { return _mm512_permutex2var_epi16(at(part), code, at(part + 1)); };
    if constexpr (bits == 6) return sixty_four(0);
    const __mmask32 second = _mm512_test_epi16_mask(code, _mm512_set1_epi16(64));
    const __m512i low = _mm512_mask_blend_epi16(second, sixty_four(0), sixty_four(2));
    if constexpr (bits == 7) return low;
    const __m512i high = _mm512_mask_blend_epi16(second, sixty_four(4 % (1 << (bits - 5))), sixty_four(6 % (1 << (bits - 5))));
    return _mm512_mask_blend_epi16(_mm512_test_epi16_mask(code, _mm512_set1_epi16(128)), low, high);
  }
}

struct HalfProduct {
  const Weight& weight;
  std::int64_t tokens;
  const float* bias;
  Activation activation;
  float* out;
  const Half* x;        // the tokens, padded with zeros: one after the other, or for amx_bf16.cpp in tiles
  std::int64_t stride;  // from one to the next, or in bytes from sixteen to the next
};

// A token's numbers, padded with zeros.
inline void round_token(const float* x, std::int64_t columns, std::int64_t stride, Half* out) {
  for (std::int64_t i = 0; i < stride; i += 16) {
    const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(first_sixteen(columns - i), x + i));
    std::memcpy(out + i, &rounded, sizeof rounded);
  }
}

}  // namespace
}  // namespace lexibit
