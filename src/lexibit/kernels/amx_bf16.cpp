// Products in bfloat16, for AMX.
//
// Of every token and row of the weight the products are added up in float32 in the order of the columns, whatever the
// number of tokens or threads: the same input gives the same bits.
#if defined(__x86_64__)
#include "amx.h"
#include "avx512bf16.h"

namespace lexibit {
namespace {

constexpr std::int64_t tile_halves = 32;  // columns of a tile

struct Halves {
  template <int A, int B>
  static void multiply() {
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (B == 2) _tile_dpbf16ps(1, 4, 7);
    if constexpr (A == 2) _tile_dpbf16ps(2, 5, 6);
    if constexpr (A == 2 && B == 2) _tile_dpbf16ps(3, 5, 7);
  }
};

// Some columns of sixteen rows as tiles: every second one of what is written to. Columns behind the last are zero: what
// stands there are no weights.
template <int bits>
void decode_tiles(const HalfRows<bits>& rows, std::int64_t columns, std::uint8_t* out) {
  const Unpack<bits> unpack;
  for (int r = 0; r < 16; ++r)
    for (std::int64_t i = 0; i < columns; i += tile_halves) {
      const std::int64_t left = columns - i;
      const __mmask32 some = left >= tile_halves ? ~0u : (1u << left) - 1;
      const __m512i codes = unpack(rows.codes[r], i / wide * wide);
      const __m256i mine = i % wide ? _mm512_extracti64x4_epi64(codes, 1) : _mm512_castsi512_si256(codes);
      const __m512i level = halves<bits>(rows.level[r], _mm512_cvtepu8_epi16(mine));
      _mm512_store_si512(out + i / tile_halves * 2 * tile_bytes + 64 * r, _mm512_maskz_mov_epi16(some, level));
    }
}

// A part of the weight's rows with all tokens, whose numbers are arranged.
template <int bits>
void from_codes_by_tiles(const HalfProduct& product, const std::uint8_t* arranged, std::int64_t part) {
  const Weight& weight = product.weight;
  const std::int64_t first = part * tile_rows, count = std::min(weight.rows - first, tile_rows);
  const std::int64_t run = std::min(weight.columns, weight.block_columns), tiles = pieces(weight.columns, tile_halves);
  HalfLevels<bits> levels(weight);
  Buffer<std::uint8_t> memory(2 * tiles * tile_bytes);
  for (std::int64_t row = 0; row < count; row += 16)
    for (std::int64_t column = 0; column < weight.columns; column += run) {
      const std::int64_t columns = std::min(run, weight.columns - column);
      decode_tiles<bits>(levels.rows(first + row, column, columns), columns,
                         memory.data() + (2 * column / tile_halves + row / 16) * tile_bytes);
    }
  const TileRegisters registers;
  multiply_tiles<Halves>(memory.data(), count, arranged, product.tokens, tiles, tiles * tile_bytes,
                         [&](std::int64_t token, std::int64_t row, __m512i sums) {
                           const __mmask16 rows = first_sixteen(count - row);
                           __m512 value = _mm512_castsi512_ps(sums);
                           if (product.bias)
                             value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(rows, product.bias + first + row));
                           value = activate(product.activation, value);
                           _mm512_mask_storeu_ps(product.out + token * weight.rows + first + row, rows, value);
                         });
}

void linear(const Weight& weight, const float* x, std::int64_t tokens, const float* bias, Activation activation,
            float* out, int threads) {
  const std::int64_t stride = stride_of(weight.columns), tiles = pieces(weight.columns, tile_halves);
  Buffer<Half> numbers(tokens * stride);
  Buffer<std::uint8_t> arranged(Arrangement::size(tokens, tiles));
  const HalfProduct product{weight, tokens, bias, activation, out, numbers.data(), stride};
  const Arrangement arrangement{numbers.data(), stride * static_cast<std::int64_t>(sizeof(Half)), tokens, tiles,
                                arranged.data()};
  const auto round = [&](std::int64_t token) {
    round_token(x + token * weight.columns, weight.columns, stride, numbers.data() + token * stride);
  };
  const auto arrange = [&](std::int64_t part) { arrangement.part(part); };
  with_constant(weight.bits, [&](auto bits) {
    const auto multiply = [&](std::int64_t part) {
      from_codes_by_tiles<decltype(bits)::get>(product, arranged.data(), part);
    };
    run_phases({phase(tokens, round), phase(arrangement.count(), arrange),
                phase(tokens ? pieces(weight.rows, tile_rows) : 0, multiply)},
               threads);
  });
}

}  // namespace

const BFloat16Kernels amx_bf16_kernels = {linear};

}  // namespace lexibit

#endif
