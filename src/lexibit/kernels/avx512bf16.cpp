// Products in bfloat16, for AVX-512 with BF16 beside VNNI and VBMI.
//
// Tokens and levels are rounded to bfloat16 once, products of two are added up in float32, for each row of the weight
// in the order of the columns, whatever the number of tokens or threads: the same input gives the same bits.
#if defined(__x86_64__)
#include "avx512vnni.h"

namespace lexibit {
namespace {

using Half = std::uint16_t;  // the upper half of a float

constexpr std::int64_t chunk = 1024;  // columns of a tile: 128 KiB, which stays in a core's second cache

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
  const Half* x;
  std::int64_t stride;  // of the tokens, which are padded with zeros
};

// A tile: of each two columns the rows one after the other, two halves each. Columns behind the last are zero: what
// stands there are no weights.
template <int bits>
void decode_tile(HalfLevels<bits>& levels, std::int64_t first, std::int64_t count, std::int64_t column,
                 std::int64_t columns, Half* tile) {
  const Unpack<bits> unpack;
  for (std::int64_t begin = 0; begin < count; begin += 16) {
    const HalfRows<bits>& rows = levels.rows(first + begin, column, columns);
    for (std::int64_t i = 0; i < columns; i += wide)
      for (int half = 0; half < 2; ++half) {
        const std::int64_t left = columns - i - 32 * half;
        if (left <= 0) break;
        const __mmask32 some = left >= 32 ? ~0u : (1u << left) - 1;
        __m512i level[16];
#pragma GCC unroll 16
        for (int r = 0; r < 16; ++r) {
          const __m512i codes = unpack(rows.codes[r], i);
          const __m256i mine = half ? _mm512_extracti64x4_epi64(codes, 1) : _mm512_castsi512_si256(codes);
          level[r] = _mm512_maskz_mov_epi16(some, halves<bits>(rows.level[r], _mm512_cvtepu8_epi16(mine)));
        }
        transpose(level);
#pragma GCC unroll 16
        for (int c = 0; c < 16; ++c)
          _mm512_store_si512(tile + ((i / 2 + 16 * half + c) * part_rows + begin) * 2, level[c]);
      }
  }
}

// V vectors of rows of a tile with T tokens, added to what stands in `out` unless the tile is a row's first.
template <int V, int T>
void multiply(const HalfProduct& product, const Half* tile, std::int64_t row, std::int64_t count, std::int64_t token,
              std::int64_t column, std::int64_t columns) {
  __m512 total[T][V];
#pragma GCC unroll 6
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v)
      total[t][v] = column ? _mm512_maskz_loadu_ps(first_sixteen(count - 16 * v),
                                                   product.out + (token + t) * product.weight.rows + row + 16 * v)
                           : _mm512_setzero_ps();
  const Half* x = product.x + token * product.stride + column;
  for (std::int64_t i = 0; i < (columns + 1) / 2; ++i) {
    __m512i level[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) level[v] = _mm512_load_si512(tile + (i * part_rows + 16 * v) * 2);
#pragma GCC unroll 6
    for (int t = 0; t < T; ++t) {
      int two;
      std::memcpy(&two, x + t * product.stride + 2 * i, 4);
      const __m512bh all = reinterpret_cast<__m512bh>(_mm512_set1_epi32(two));
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) total[t][v] = _mm512_dpbf16_ps(total[t][v], reinterpret_cast<__m512bh>(level[v]), all);
    }
  }
  const bool last = column + columns == product.weight.columns;
#pragma GCC unroll 6
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const __mmask16 rows = first_sixteen(count - 16 * v);
      __m512 value = total[t][v];
      if (last) {
        if (product.bias) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(rows, product.bias + row + 16 * v));
        value = activate(product.activation, value);
      }
      _mm512_mask_storeu_ps(product.out + (token + t) * product.weight.rows + row + 16 * v, rows, value);
    }
}

template <int V>
void multiply_all(const HalfProduct& product, const Half* tile, std::int64_t row, std::int64_t count,
                  std::int64_t column, std::int64_t columns) {
  in_parts<6>(product.tokens, [&](auto some, std::int64_t token) {
    multiply<V, decltype(some)::get>(product, tile, row, count, token, column, columns);
  });
}

// A tile's rows of the weight with all tokens.
template <int bits>
void rows_of_tile(const HalfProduct& product, std::int64_t part) {
  const Weight& weight = product.weight;
  const std::int64_t first = part * part_rows, count = std::min(weight.rows - first, part_rows);
  const std::int64_t run = std::min(weight.columns, weight.block_columns);
  HalfLevels<bits> levels(weight);
  Buffer<Half> memory((std::min(run, chunk) + wide) * part_rows);
  Half* tile = memory.data();
  for (std::int64_t column = 0, columns; column < weight.columns; column += columns) {
    columns = std::min({chunk, weight.columns - column, run - column % run});
    decode_tile<bits>(levels, first, count, column, columns, tile);
    switch ((count + 15) / 16) {
      case 1: multiply_all<1>(product, tile, first, count, column, columns); break;
      case 2: multiply_all<2>(product, tile, first, count, column, columns); break;
      case 3: multiply_all<3>(product, tile, first, count, column, columns); break;
      case 4: multiply_all<4>(product, tile, first, count, column, columns); break;
    }
  }
}

void linear(const Weight& weight, const float* x, std::int64_t tokens, const float* bias, Activation activation,
            float* out, int threads) {
  if (!tokens) return;
  const std::int64_t stride = stride_of(weight.columns);
  Buffer<Half> numbers(tokens * stride);
  const HalfProduct product{weight, tokens, bias, activation, out, numbers.data(), stride};
  const auto round = [&](std::int64_t token) {
    for (std::int64_t i = 0; i < stride; i += 16) {
      const __m512 value = _mm512_maskz_loadu_ps(first_sixteen(weight.columns - i), x + token * weight.columns + i);
      const __m256bh rounded = _mm512_cvtneps_pbh(value);
      std::memcpy(numbers.data() + token * stride + i, &rounded, sizeof rounded);
    }
  };
  with_constant(weight.bits, [&](auto bits) {
    const auto multiply = [&](std::int64_t part) { rows_of_tile<decltype(bits)::get>(product, part); };
    run_phases({phase(tokens, round), phase((weight.rows + part_rows - 1) / part_rows, multiply)}, threads);
  });
}

}  // namespace

const BFloat16Kernels avx512bf16_kernels = {linear};

}  // namespace lexibit

#endif
