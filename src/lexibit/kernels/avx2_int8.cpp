// Products in int8 for AVX2, which multiplies 16-bit numbers best: rounded tokens and levels stand as such.
//
// What is added up are whole numbers: the same input gives the same bits, whatever the number of tokens or threads.
#if defined(__x86_64__)
#include <immintrin.h>

#include "avx2.h"
#include "parallel.h"
#include "rows.h"

namespace lexibit {
namespace {

using Short = std::int16_t;

constexpr std::int64_t shorts = 16;            // in a vector
constexpr std::int64_t tile_shorts = 1 << 16;  // 128 KiB: stays in a core's second cache

struct Product {
  const Weight& weight;
  std::int64_t tokens;
  const float* bias;
  Activation activation;
  float* out;
  std::int64_t run_columns, runs;  // that are multiplied in one go; all but the last are as wide
  std::int64_t stride;             // of the rounded tokens, which are padded with zeros
  Short* x;
  float* scale;       // of each token
  std::int32_t* sum;  // of each token's numbers in each run: [tokens, runs]
  std::int64_t columns_of(std::int64_t run) const { return std::min(run_columns, weight.columns - run * run_columns); }
};

inline __m256 absolute(__m256 x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }

inline __m256 some_of(const float* x, std::int64_t count) { return _mm256_maskload_ps(x, first_lanes(count)); }

// Eight floats, rounded, as they stand in sixteen bytes.
inline __m128i as_shorts(__m256i whole) {
  return _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
}

// One token: its scale, its numbers as multiples of it, and their sums. A token with a number that is not finite has
// the scale NaN.
void round_token(const Product& product, const float* x, std::int64_t token) {
  const std::int64_t columns = product.weight.columns;
  const __m256 infinite = _mm256_set1_ps(__builtin_inff());
  __m256 most = _mm256_set1_ps(0x1p-100f), odd = _mm256_setzero_ps();
  for (std::int64_t i = 0; i < columns; i += lanes) {
    const __m256 value = absolute(some_of(x + i, columns - i));
    odd = _mm256_or_ps(odd, _mm256_cmp_ps(value, infinite, _CMP_NLT_UQ));
    most = _mm256_max_ps(most, value);
  }
  alignas(32) float each[8];
  _mm256_store_ps(each, most);
  const bool finite = _mm256_movemask_ps(odd) == 0;
  const float largest = *std::max_element(each, each + 8);
  product.scale[token] = finite ? largest / 127.0f : __builtin_nanf("");
  const __m256 inverse = _mm256_set1_ps(finite ? 127.0f / largest : 0.0f);
  Short* to = product.x + token * product.stride;
  for (std::int64_t i = 0; i < product.stride; i += lanes) {
    const __m256i whole = _mm256_cvtps_epi32(_mm256_mul_ps(some_of(x + i, columns - i), inverse));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), as_shorts(whole));
  }
  for (std::int64_t run = 0; run < product.runs; ++run) {
    std::int32_t sum = 0;
    const Short* from = to + run * product.run_columns;
    for (std::int64_t i = 0; i < product.columns_of(run); ++i) sum += from[i];
    product.sum[token * product.runs + run] = sum;
  }
}

// A group's levels as whole numbers: level = step * number + middle. They stand in floats, for look_up to find.
template <int bits>
struct RoundedTable {
  static constexpr int size = bits <= 3 ? 8 : 1 << bits;
  std::int64_t group = -1;
  float step = 0.0f, middle = 0.0f;
  alignas(32) float number[size] = {};

  void round(const float* level) {
    const __m256 infinite = _mm256_set1_ps(__builtin_inff());
    __m256 lows = infinite, highs = _mm256_sub_ps(_mm256_setzero_ps(), infinite), odd = _mm256_setzero_ps();
    for (int i = 0; i < size; i += 8) {
      const __m256 value = _mm256_loadu_ps(level + i);
      odd = _mm256_or_ps(odd, _mm256_cmp_ps(absolute(value), infinite, _CMP_NLT_UQ));
      lows = _mm256_min_ps(lows, value), highs = _mm256_max_ps(highs, value);
    }
    alignas(32) float each[2][8];
    _mm256_store_ps(each[0], lows), _mm256_store_ps(each[1], highs);
    const float low = *std::min_element(each[0], each[0] + 8), range = *std::max_element(each[1], each[1] + 8) - low;
    step = _mm256_movemask_ps(odd) ? __builtin_nanf("") : range / level_steps<bits>;
    middle = low + range / level_steps<bits> * 128.0f;
    const __m256 inverse = _mm256_set1_ps(range > 0x1p-100f ? level_steps<bits> / range : 0.0f);
    for (int i = 0; i < size; i += 8) {
      const __m256 above = _mm256_mul_ps(_mm256_sub_ps(_mm256_loadu_ps(level + i), _mm256_set1_ps(low)), inverse);
      const __m256i whole = _mm256_sub_epi32(_mm256_cvtps_epi32(above), _mm256_set1_epi32(128));
      _mm256_store_ps(number + i, _mm256_castsi256_ps(whole));
    }
  }
};

// A row of a run as whole numbers; up to 7 more are written, which mean nothing.
template <int bits>
inline void decode_row(Place place, const float* table, std::int64_t count, Short* out) {
  const auto eight = [&] {
    const __m256 found = look_up<bits>(table, codes_at<bits, false>(place.byte, place.shift));
    place.byte += bits;
    return as_shorts(_mm256_castps_si256(found));
  };
  for (std::int64_t i = 0; i < count; i += lanes) _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), eight());
}

// R decoded rows with T tokens; three of each leave registers for what is multiplied.
template <int R, int T>
inline void dot(const Product& product, const Short* w, std::int64_t stride, std::int64_t row, std::int64_t token,
                std::int64_t run, const float* step, const float* middle) {
  const Short* x = product.x + token * product.stride + run * product.run_columns;
  const std::int64_t columns = product.columns_of(run), apart = product.stride;
  __m256i total[R][T];
#pragma GCC unroll 3
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
    for (int t = 0; t < T; ++t) total[r][t] = _mm256_setzero_si256();
  for (std::int64_t i = 0; i < columns; i += shorts) {
    __m256i level[R];
#pragma GCC unroll 3
    for (int r = 0; r < R; ++r) level[r] = _mm256_load_si256(reinterpret_cast<const __m256i*>(w + r * stride + i));
#pragma GCC unroll 3
    for (int t = 0; t < T; ++t) {
      const __m256i numbers = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + t * apart + i));
#pragma GCC unroll 3
      for (int r = 0; r < R; ++r)
        total[r][t] = _mm256_add_epi32(total[r][t], _mm256_madd_epi16(level[r], numbers));
    }
  }
  // where they may be asked for by number: so they stay in registers until now
  __m256i sums[R][T];
#pragma GCC unroll 3
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
    for (int t = 0; t < T; ++t) _mm256_store_si256(&sums[r][t], total[r][t]);
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < T; ++t) {
      const __m256i all = _mm256_load_si256(&sums[r][t]);
      __m128i four = _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
      four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4E));
      const std::int32_t whole = _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xB1)));
      const float sum = static_cast<float>(product.sum[(token + t) * product.runs + run]);
      const float in_levels = step[r] * static_cast<float>(whole) + middle[r] * sum;
      float* out = product.out + (token + t) * product.weight.rows + row + r;
      *out = in_levels * product.scale[token + t] + (run ? *out : 0.0f);
    }
}

template <int T>
void dot_rows(const Product& product, const Short* w, std::int64_t stride, std::int64_t row, std::int64_t end,
              std::int64_t token, std::int64_t run, const float* step, const float* middle) {
  for (; row + 3 <= end; row += 3, w += 3 * stride, step += 3, middle += 3)
    dot<3, T>(product, w, stride, row, token, run, step, middle);
  for (; row < end; ++row, w += stride) dot<1, T>(product, w, stride, row, token, run, step++, middle++);
}

constexpr std::int64_t most_rows = 48;

// Some rows of the weight with all tokens.
template <int bits>
void multiply(const Product& product, std::int64_t first, std::int64_t end) {
  const Weight& weight = product.weight;
  const std::int64_t stride = (product.columns_of(0) + shorts - 1) / shorts * shorts;
  Table table(weight);
  Codes codes(weight);
  RoundedTable<bits> rounded;
  Buffer<Short> memory(stride * (end - first));
  Short* tile = memory.data();
  float step[most_rows], middle[most_rows];
  for (std::int64_t run = 0; run < product.runs; ++run) {
    const std::int64_t column = run * product.run_columns, columns = product.columns_of(run);
    for (std::int64_t row = first; row < end; ++row) {
      const std::int64_t group = weight.group(row, column / weight.block_columns);
      if (group != rounded.group) rounded.round(table.of(rounded.group = group));
      Short* to = tile + (row - first) * stride;
      decode_row<bits>(codes.of(row, column, columns), rounded.number, columns, to);
      step[row - first] = rounded.step, middle[row - first] = rounded.middle;
    }
    std::int64_t token = 0;
    for (; token + 3 <= product.tokens; token += 3)
      dot_rows<3>(product, tile, stride, first, end, token, run, step, middle);
    for (; token < product.tokens; ++token) dot_rows<1>(product, tile, stride, first, end, token, run, step, middle);
  }
}

// exp(x) for x <= 0, to 1e-7 of it.
inline __m256 exp_below(__m256 x) {
  x = _mm256_max_ps(x, _mm256_set1_ps(-87.0f));
  const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.442695041f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693145752f), x);
  r = _mm256_fnmadd_ps(n, _mm256_set1_ps(1.42860677e-6f), r);
  __m256 p = _mm256_set1_ps(1.0f / 720);
  for (const float c : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(c));
  const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return _mm256_mul_ps(p, _mm256_castsi256_ps(power));
}

// As the kernels for AVX-512 do it, eight at a time.
inline __m256 activate(Activation activation, __m256 x) {
  const __m256 one = _mm256_set1_ps(1.0f), zero = _mm256_setzero_ps();
  if (activation == Activation::gelu) {
    // x/2 (1 + erf(x / sqrt 2)); erf by Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26
    const __m256 z = _mm256_mul_ps(absolute(x), _mm256_set1_ps(0.7071067812f));
    const __m256 t = _mm256_div_ps(one, _mm256_fmadd_ps(z, _mm256_set1_ps(0.3275911f), one));
    __m256 p = _mm256_set1_ps(1.061405429f);
    for (const float c : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f, 0.0f})
      p = _mm256_fmadd_ps(p, t, _mm256_set1_ps(c));
    const __m256 rest = _mm256_mul_ps(p, exp_below(_mm256_sub_ps(zero, _mm256_mul_ps(z, z))));
    // of the smaller tail: nothing cancels
    const __m256 tail = _mm256_mul_ps(_mm256_mul_ps(x, _mm256_set1_ps(0.5f)), rest);
    const __m256 infinite = _mm256_cmp_ps(x, _mm256_set1_ps(__builtin_inff()), _CMP_EQ_OQ);
    const __m256 found = _mm256_blendv_ps(_mm256_sub_ps(x, tail), tail, _mm256_cmp_ps(x, zero, _CMP_LT_OQ));
    return _mm256_blendv_ps(found, x, infinite);
  }
  // x/2 (1 + tanh u) = x / (1 + exp(-2 u)), by the power of what is not above zero
  const __m256 cube = _mm256_fmadd_ps(_mm256_mul_ps(x, x), _mm256_set1_ps(0.044715f), one);
  const __m256 twice = _mm256_mul_ps(_mm256_mul_ps(x, cube), _mm256_set1_ps(1.5957691216f));
  const __m256 power = exp_below(_mm256_sub_ps(zero, absolute(twice)));
  const __m256 negative = _mm256_cmp_ps(x, zero, _CMP_LT_OQ);
  return _mm256_div_ps(_mm256_mul_ps(x, _mm256_blendv_ps(one, power, negative)), _mm256_add_ps(one, power));
}

// A token's sums, from `first` on: bias and activation.
void finish(const Product& product, std::int64_t token, std::int64_t first, std::int64_t end) {
  float* out = product.out + token * product.weight.rows;
  for (std::int64_t i = first; i < end; i += lanes) {
    __m256 value = some_of(out + i, end - i);
    if (product.bias) value = _mm256_add_ps(value, some_of(product.bias + i, end - i));
    if (product.activation != Activation::none) value = activate(product.activation, value);
    _mm256_maskstore_ps(out + i, first_lanes(end - i), value);
  }
}

void linear(const Weight& weight, const float* x, std::int64_t tokens, const float* bias, Activation activation,
            float* out, int threads) {
  if (!tokens) return;
  const std::int64_t run = columns_at_once(weight);
  const std::int64_t runs = (weight.columns + run - 1) / run, stride = (weight.columns + shorts - 1) / shorts * shorts + shorts;
  Buffer<Short> numbers(tokens * stride);
  Buffer<float> scale(tokens);
  Buffer<std::int32_t> sum(tokens * runs);
  const Product product{weight, tokens, bias, activation, out, run, runs, stride, numbers.data(), scale.data(), sum.data()};
  const std::int64_t height = std::clamp<std::int64_t>(tile_shorts / (run + shorts) / 3 * 3, 3, most_rows);
  const auto round = [&](std::int64_t token) { round_token(product, x + token * weight.columns, token); };
  with_constant(weight.bits, [&](auto bits) {
    const auto part = [&](std::int64_t i) {
      const std::int64_t first = i * height, end = std::min(weight.rows, first + height);
      multiply<decltype(bits)::get>(product, first, end);
      for (std::int64_t token = 0; token < tokens; ++token) finish(product, token, first, end);
    };
    run_phases({phase(tokens, round), phase((weight.rows + height - 1) / height, part)}, threads);
  });
}

}  // namespace

const Int8Kernels avx2_int8_kernels = {linear, nullptr, nullptr};

}  // namespace lexibit

#endif
