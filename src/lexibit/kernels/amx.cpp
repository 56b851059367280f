// Products in int8, for AMX: of few tokens as without it, of more by tiles. Both add up the same whole numbers.
#if defined(__x86_64__)
#include "amx.h"

#include "encoder.h"

namespace lexibit {
namespace {

struct Bytes {
  template <int A, int B>
  static void multiply() {
    _tile_dpbusd(0, 4, 6);
    if constexpr (B == 2) _tile_dpbusd(1, 4, 7);
    if constexpr (A == 2) _tile_dpbusd(2, 5, 6);
    if constexpr (A == 2 && B == 2) _tile_dpbusd(3, 5, 7);
  }
};

// Sixteen rows of a run as tiles: every second one of what is written to.
template <int bits>
void decode_tiles(const Rows<bits>& rows, std::int64_t columns, std::uint8_t* out) {
  constexpr int R = 4;  // rows at a time
  const Unpack<bits> unpack;
  std::uintptr_t next = rows.next;
  for (int some = 0; some < 16; some += R) {
    __m512i from[R];
    LookUp<bits> look_up[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
      from[r] = unpack.from(rows.codes[some + r].shift), look_up[r] = LookUp<bits>(rows.level[some + r]);
    for (std::int64_t i = 0; i < columns; i += wide) {
      fetch<R * bits>(next);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const __m512i packed = _mm512_loadu_si512(rows.codes[some + r].byte + i / 8 * bits);
        _mm512_store_si512(out + i / wide * 2 * tile_bytes + 64 * (some + r), look_up[r](unpack(packed, from[r])));
      }
    }
  }
}

// A part of the weight's rows with all tokens.
template <int bits>
void from_codes_by_tiles(const Product& product, std::int64_t part) {
  const Weight& weight = product.weight;
  const std::int64_t first = part * tile_rows, count = std::min(weight.rows - first, tile_rows);
  Levels<bits> levels(weight);
  Buffer<std::uint8_t> memory(2 * pieces(product.columns_of(0), wide) * tile_bytes);
  alignas(64) float step[tile_rows], middle[tile_rows];
  for (std::int64_t run = 0; run < product.runs; ++run) {
    const std::int64_t columns = product.columns_of(run);
    for (std::int64_t row = 0; row < count; row += 16) {
      const Rows<bits>& rows = levels.rows(first + row, product, run);
      std::memcpy(step + row, rows.step, sizeof rows.step);
      std::memcpy(middle + row, rows.middle, sizeof rows.middle);
      decode_tiles<bits>(rows, columns, memory.data() + row / 16 * tile_bytes);
    }
    const std::int64_t stride = pieces(weight.columns, wide) * tile_bytes;
    const auto* tokens = reinterpret_cast<const std::uint8_t*>(product.arranged) + run * product.run_columns / wide * tile_bytes;
    const TileRegisters registers;
    for (std::int64_t token = 0; token < product.tokens; token += pair) {
      const std::int64_t some = std::min(product.tokens - token, pair);
      Sums sums = {};
      add_up<Bytes>(memory.data(), count, tokens + token / tile_tokens * stride, some, pieces(columns, wide), stride, sums);
      each_sixteen(sums, count, some, [&](std::int64_t t, std::int64_t row, __m512i sum) {
        finish(product, token + t, first + row, first_sixteen(count - row), run, sum, _mm512_load_ps(step + row),
               _mm512_load_ps(middle + row));
      });
    }
  }
}

Arrangement arrangement_of(const Product& product) {
  return {product.x, product.stride, product.tokens, pieces(product.weight.columns, wide), product.arranged};
}

struct Tiles {
  // At least: eight tokens take about as long either way, by the instructions' numbers and not by a clock.
  static constexpr std::int64_t few = 8;

  static std::int64_t arranged_size(std::int64_t columns, std::int64_t tokens) {
    return tokens <= few ? 0 : Arrangement::size(tokens, pieces(columns, wide));
  }

  static Parts arrange(const Product& product) {
    if (product.tokens <= few) return {0, nullptr};
    return {arrangement_of(product).count(),
            [](const Product& one, std::int64_t part) { arrangement_of(one).part(part); }};
  }

  template <int bits>
  static Parts multiply(const Product& product) {
    return {pieces(product.weight.rows, tile_rows), from_codes_by_tiles<bits>};
  }
};

}  // namespace

const Int8Kernels amx_kernels = {linear<Tiles>, encoder<Tiles>, add_norms};

}  // namespace lexibit

#endif
