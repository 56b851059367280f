// Products in bfloat16, for AVX-512 with BF16 beside VNNI and VBMI.
//
// Tokens and levels are rounded to bfloat16 once, products of two are added up in float32, for each row of the weight
// in the order of the columns, whatever the number of tokens or threads: the same input gives the same bits.
#if defined(__x86_64__)
#include "avx512bf16.h"

namespace lexibit {
namespace {

constexpr std::int64_t chunk = 1024;  // columns of a tile: 128 KiB, which stays in a core's second cache

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
    round_token(x + token * weight.columns, weight.columns, stride, numbers.data() + token * stride);
  };
  with_constant(weight.bits, [&](auto bits) {
    const auto multiply = [&](std::int64_t part) { rows_of_tile<decltype(bits)::get>(product, part); };
    run_phases({phase(tokens, round), phase(pieces(weight.rows, part_rows), multiply)}, threads);
  });
}

}  // namespace

const BFloat16Kernels avx512bf16_kernels = {linear};

}  // namespace lexibit

#endif
