// Products in bfloat16, for AMX.
//
// Products are added up in float32, for each token and row of the weight 32 columns after the other, the even ones of these
// and the odd ones apart, whatever the number of tokens or threads: the same input gives the same bits.
#if defined(__x86_64__)
#include "amx.h"
#include "avx512bf16.h"

namespace lexibit {
namespace {

constexpr std::int64_t tile_halves = 32;  // columns of a tile
constexpr std::int64_t chunk = 1024;      // that are decoded at a time: 64 KiB of tiles

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
    for (std::int64_t i = 0; i < columns; i += wide) {
      const __m512i codes = unpack(rows.codes[r], i);
      const auto store = [&](std::int64_t column, __m256i mine) {
        const std::int64_t left = columns - column;
        if (left <= 0) return;
        const __mmask32 some = left >= tile_halves ? ~0u : (1u << left) - 1;
        const __m512i level = halves<bits>(rows.level[r], _mm512_cvtepu8_epi16(mine));
        _mm512_store_si512(out + column / tile_halves * 2 * tile_bytes + 64 * r, _mm512_maskz_mov_epi16(some, level));
      };
      store(i, _mm512_castsi512_si256(codes));
      store(i + tile_halves, _mm512_extracti64x4_epi64(codes, 1));
    }
}

// A part of the weight's rows with all tokens.
template <int bits>
void from_codes_by_tiles(const HalfProduct& product, std::int64_t part) {
  const Weight& weight = product.weight;
  const std::int64_t first = part * tile_rows, count = std::min(weight.rows - first, tile_rows);
  const std::int64_t run = std::min(weight.columns, weight.block_columns);
  HalfLevels<bits> levels(weight);
  Buffer<std::uint8_t> memory(2 * pieces(std::min(run, chunk), tile_halves) * tile_bytes);
  Buffer<Sums> sums(pieces(product.tokens, pair));
  std::memset(sums.data(), 0, sizeof(Sums) * static_cast<std::size_t>(pieces(product.tokens, pair)));
  for (std::int64_t column = 0, columns; column < weight.columns; column += columns) {
    columns = std::min({chunk, weight.columns - column, run - column % run});
    for (std::int64_t row = 0; row < count; row += 16)
      decode_tiles<bits>(levels.rows(first + row, column, columns), columns, memory.data() + row / 16 * tile_bytes);
    const auto* tokens = reinterpret_cast<const std::uint8_t*>(product.x) + column / tile_halves * tile_bytes;
    const TileRegisters registers;
    for (std::int64_t token = 0; token < product.tokens; token += pair)
      add_up<Halves>(memory.data(), count, tokens + token / tile_tokens * product.stride,
                     std::min(product.tokens - token, pair), pieces(columns, tile_halves), product.stride,
                     sums[token / pair]);
  }
  for (std::int64_t token = 0; token < product.tokens; token += pair)
    each_sixteen(sums[token / pair], count, std::min(product.tokens - token, pair),
                 [&](std::int64_t t, std::int64_t row, __m512i sum) {
                   const __mmask16 rows = first_sixteen(count - row);
                   __m512 value = _mm512_castsi512_ps(sum);
                   if (product.bias)
                     value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(rows, product.bias + first + row));
                   value = activate(product.activation, value);
                   _mm512_mask_storeu_ps(product.out + (token + t) * weight.rows + first + row, rows, value);
                 });
}

void linear(const Weight& weight, const float* x, std::int64_t tokens, const float* bias, Activation activation,
            float* out, int threads) {
  if (!tokens) return;
  const std::int64_t stride = stride_of(weight.columns), tiles = pieces(weight.columns, tile_halves);
  Buffer<Half> numbers(tokens * stride), arranged(Arrangement::size(tokens, tiles) / 2);
  const Arrangement arrangement{numbers.data(), 2 * stride, tokens, tiles, arranged.data()};
  const HalfProduct product{weight, tokens, bias, activation, out, arranged.data(), tiles * tile_bytes};
  const auto round = [&](std::int64_t token) {
    round_token(x + token * weight.columns, weight.columns, stride, numbers.data() + token * stride);
  };
  const auto arrange = [&](std::int64_t part) { arrangement.part(part); };
  with_constant(weight.bits, [&](auto bits) {
    const auto multiply = [&](std::int64_t part) { from_codes_by_tiles<decltype(bits)::get>(product, part); };
    run_phases({phase(tokens, round), phase(arrangement.count(), arrange),
                phase(pieces(weight.rows, tile_rows), multiply)},
               threads);
  });
}

}  // namespace

const BFloat16Kernels amx_bf16_kernels = {linear};

}  // namespace lexibit

#endif
