// Sixty-four codes at a time, for AVX-512 with VBMI: what the files share that are compiled for this and more.
//
// Sixty-four codes of k bits fill 8 k bytes: one permutation brings each eight of them into a quadword, and a
// multishift takes every code to its byte.
#pragma once

#if defined(__GNUC__) && !defined(__clang__)
// of GCC's own headers: what they leave undefined is never looked at
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

#include "rows.h"

namespace lexibit {
namespace {

constexpr std::int64_t wide = 64;       // codes that are decoded at once
constexpr std::int64_t part_rows = 64;  // of the weight, that a thread works on at a time

// How many pieces of a size there are, the last of them smaller.
inline std::int64_t pieces(std::int64_t count, std::int64_t size) { return (count + size - 1) / size; }

inline __mmask16 first_sixteen(std::int64_t count) {
  return static_cast<__mmask16>(count >= 16 ? 0xFFFF : (1 << std::max<std::int64_t>(count, 0)) - 1);
}

// Four vectors, each of four parts of four numbers: the n-th parts of all, the other way round.
inline void transpose_fours(__m512i (&row)[4]) {
  const __m512i a = _mm512_unpacklo_epi32(row[0], row[1]), b = _mm512_unpackhi_epi32(row[0], row[1]);
  const __m512i c = _mm512_unpacklo_epi32(row[2], row[3]), d = _mm512_unpackhi_epi32(row[2], row[3]);
  row[0] = _mm512_unpacklo_epi64(a, c), row[1] = _mm512_unpackhi_epi64(a, c);
  row[2] = _mm512_unpacklo_epi64(b, d), row[3] = _mm512_unpackhi_epi64(b, d);
}

// Sixteen vectors of sixteen numbers, the other way round.
inline void transpose(__m512i (&row)[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(row[i], row[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(row[i], row[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      row[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + 2 + j]);
      row[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + 2 + j]);
    }
#pragma GCC unroll 2
  for (int i = 0; i < 16; i += 8)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      t[i + j] = _mm512_shuffle_i32x4(row[i + j], row[i + 4 + j], 0x88);
      t[i + 4 + j] = _mm512_shuffle_i32x4(row[i + j], row[i + 4 + j], 0xDD);
    }
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) {
    row[j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0x88);
    row[8 + j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0xDD);
  }
}

// Codes to levels. ------------------------------------------------------------------------------------------

// How a vector of codes is taken apart.
template <int bits>
class Unpack {
 public:
  Unpack() {
    alignas(64) std::uint8_t byte[64], bit[64];
    for (int i = 0; i < 64; ++i) {
      byte[i] = static_cast<std::uint8_t>(std::min(i / 8 * bits + i % 8, 63));
      bit[i] = static_cast<std::uint8_t>(i % 8 * bits);
    }
    byte_ = _mm512_load_si512(byte), bit_ = _mm512_load_si512(bit);
  }

  // Where codes begin that begin at a bit of the first byte.
  __m512i from(int shift) const { return _mm512_add_epi8(bit_, _mm512_set1_epi8(static_cast<char>(shift))); }

  // The codes. Bits above a code's own are anything.
  __m512i operator()(__m512i packed, __m512i begin) const {
    if constexpr (bits == 8) return packed;
    return _mm512_multishift_epi64_epi8(begin, _mm512_permutexvar_epi8(byte_, packed));
  }

  // Those from a multiple of 64 columns on.
  __m512i operator()(Place codes, std::int64_t column) const {
    return (*this)(_mm512_loadu_si512(codes.byte + column / 8 * bits), from(codes.shift));
  }

 private:
  __m512i byte_, bit_;
};

// Brings what will be wanted next, eight times so many bytes, into the second cache, and goes on behind it. What lies
// behind the end of a weight does no harm.
template <int eights>
inline void fetch(std::uintptr_t& next) {
  for (int byte = 0; byte < 8 * eights; byte += 64)
    _mm_prefetch(reinterpret_cast<const char*>(next + byte), _MM_HINT_T1);
  next += 8 * eights;
}

// Codes that may be read a vector at a time, to the end of the vector that the last one begins in.
template <int bits>
class Vectors {
 public:
  // Those of some columns of a row: where they stand, or near the end of the weight a copy. `which` is the row's number of
  // sixteen that are used at once; all sixteen are asked for as many columns.
  Place of(const Weight& weight, std::int64_t row, std::int64_t column, std::int64_t columns, int which) {
    const std::int64_t bit = (row * weight.columns + column) * bits, left = weight.code_bytes - bit / 8;
    const std::int64_t size = (columns - 1) / wide * 8 * bits + 64;
    const std::uint8_t* codes = weight.codes + bit / 8;
    if (left < size) {
      std::uint8_t* copy = copies_.reserve(16 * size) + which * size;
      std::memcpy(copy, codes, static_cast<std::size_t>(left));
      std::memset(copy + left, 0, static_cast<std::size_t>(size - left));
      codes = copy;
    }
    return {codes, static_cast<int>(bit % 8)};
  }

 private:
  Buffer<std::uint8_t> copies_;
};

// Calls use with all tokens, `most` at a time at most and in parts of like size: how many as a constant, and the first.
template <int most, class Use>
void in_parts(std::int64_t tokens, Use&& use) {
  const std::int64_t parts = pieces(tokens, most);
  for (std::int64_t part = 0, token = 0; part < parts; ++part) {
    const std::int64_t some = (tokens - token + parts - part - 1) / (parts - part);
    with_constant<most>(static_cast<int>(some), [&](auto constant) { use(constant, token); });
    token += some;
  }
}

// What is done with a finished sum. -------------------------------------------------------------------------

// exp(x) for x <= 0, to 1e-7 of it.
inline __m512 exp_below(__m512 x) {
  x = _mm512_max_ps(x, _mm512_set1_ps(-87.0f));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.442695041f)), 0);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693145752f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(1.42860677e-6f), r);
  __m512 p = _mm512_set1_ps(1.0f / 720);
  for (const float c : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
  return _mm512_scalef_ps(p, n);
}

inline __m512 activate(Activation activation, __m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f);
  switch (activation) {
    case Activation::none:
      return x;
    case Activation::gelu: {
      // x/2 (1 + erf(x / sqrt 2)); erf by Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26
      const __m512 z = _mm512_mul_ps(_mm512_abs_ps(x), _mm512_set1_ps(0.7071067812f));
      const __m512 t = _mm512_div_ps(one, _mm512_fmadd_ps(z, _mm512_set1_ps(0.3275911f), one));
      __m512 p = _mm512_set1_ps(1.061405429f);
      for (const float c : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f, 0.0f})
        p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(c));
      const __m512 rest = _mm512_mul_ps(p, exp_below(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_mul_ps(z, z))));
      // of the smaller tail: nothing cancels
      const __m512 tail = _mm512_mul_ps(_mm512_mul_ps(x, _mm512_set1_ps(0.5f)), rest);
      const __mmask16 negative = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
      const __mmask16 infinite = _mm512_cmp_ps_mask(x, _mm512_set1_ps(__builtin_inff()), _CMP_EQ_OQ);
      return _mm512_mask_mov_ps(_mm512_mask_mov_ps(_mm512_sub_ps(x, tail), negative, tail), infinite, x);
    }
    case Activation::gelu_tanh: {
      // x/2 (1 + tanh u) = x / (1 + exp(-2 u))
      const __m512 cube = _mm512_fmadd_ps(_mm512_mul_ps(x, x), _mm512_set1_ps(0.044715f), one);
      const __m512 two_u = _mm512_mul_ps(_mm512_mul_ps(x, cube), _mm512_set1_ps(1.5957691216f));
      const __m512 power = exp_below(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_abs_ps(two_u)));
      const __mmask16 negative = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
      const __m512 above = _mm512_mask_mov_ps(one, negative, power);
      return _mm512_div_ps(_mm512_mul_ps(x, above), _mm512_add_ps(one, power));
    }
  }
  return x;
}

// How far rounded tokens stand apart: whole vectors, and one more, or many of them would share a set of the caches.
inline std::int64_t stride_of(std::int64_t columns) { return pieces(columns, wide) * wide + wide; }

}  // namespace
}  // namespace lexibit
