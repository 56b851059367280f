// Codes to levels with AVX2: what the files share that are compiled for it.
//
// Codes are read as they are stored. Eight codes of k bits fill k whole bytes: they are broadcast to all lanes,
// every lane shifts its own code down, and a permutation of the table gives the levels.
#pragma once

#include <immintrin.h>

#include "rows.h"

namespace lexibit {
namespace {

template <int bits, bool aligned>
inline __m256i codes_at(const std::uint8_t* byte, int shift) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  if constexpr (bits <= 4 && aligned) {
    int word;
    std::memcpy(&word, byte, 4);
    return _mm256_srlv_epi32(_mm256_set1_epi32(word), _mm256_mullo_epi32(lane, _mm256_set1_epi32(bits)));
  } else {
    std::uint64_t word;
    std::memcpy(&word, byte, 8);
    word >>= shift;
    if constexpr (bits <= 4) {
      const __m256i all = _mm256_set1_epi32(static_cast<int>(word));
      return _mm256_srlv_epi32(all, _mm256_mullo_epi32(lane, _mm256_set1_epi32(bits)));
    } else if constexpr (bits == 8) {
      return _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<long long>(word)));
    } else {
      // each lane takes the two bytes that its code may straddle
      alignas(32) static constexpr auto at = [] {
        struct { std::uint8_t byte[32]; std::uint32_t shift[8]; } found{};
        for (int i = 0; i < 8; ++i) {
          const int bit = i * bits;
          found.byte[4 * i] = static_cast<std::uint8_t>(bit / 8);
          found.byte[4 * i + 1] = static_cast<std::uint8_t>(bit / 8 + 1 < 8 ? bit / 8 + 1 : 0x80);
          found.byte[4 * i + 2] = found.byte[4 * i + 3] = 0x80;
          found.shift[i] = static_cast<std::uint32_t>(bit % 8);
        }
        return found;
      }();
      const __m256i bytes = _mm256_shuffle_epi8(_mm256_set1_epi64x(static_cast<long long>(word)),
                                                _mm256_load_si256(reinterpret_cast<const __m256i*>(at.byte)));
      return _mm256_srlv_epi32(bytes, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at.shift)));
    }
  }
}

// The levels of eight codes; bits above a code's own are ignored.
template <int bits>
inline __m256 look_up(const float* table, __m256i code) {
  const auto eight = [&](int part) { return _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8 * part), code); };
  if constexpr (bits <= 3) {
    return eight(0);
  } else if constexpr (bits <= 5) {
    const __m256 third = _mm256_castsi256_ps(_mm256_slli_epi32(code, 28));
    const __m256 low = _mm256_blendv_ps(eight(0), eight(1), third);
    if constexpr (bits == 4) return low;
    const __m256 high = _mm256_blendv_ps(eight(2), eight(3), third);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(code, 27)));
  } else {
    return _mm256_i32gather_ps(table, _mm256_and_si256(code, _mm256_set1_epi32((1 << bits) - 1)), 4);
  }
}

// The first `count` lanes, 0 to 8.
inline __m256i first_lanes(std::int64_t count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)),
                            _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

}  // namespace
}  // namespace lexibit
