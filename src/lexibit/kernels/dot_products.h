// Products of many tokens by dot products, for AVX-512 with VNNI and VBMI: tiles of rows are decoded once.
//
// A tile has of each four columns some vectors, of sixteen rows each: four bytes of one row after the other.
#pragma once

#include "avx512vnni.h"

namespace lexibit {
namespace {

// What V vectors of rows add up to with T tokens: adds what a run gives to what is there.
template <int V, int T>
inline void finish_all(const Product& product, const __m512i (&total)[T][V], std::int64_t token, std::int64_t row,
                       std::int64_t count, std::int64_t run, const float* step, const float* middle) {
  __m512i sum[T][V];
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) _mm512_store_si512(&sum[t][v], total[t][v]);
  for (int v = 0; v < V; ++v)
    for (int t = 0; t < T; ++t)
      finish(product, token + t, row + 16 * v, first_sixteen(count - 16 * v), run, _mm512_load_si512(&sum[t][v]),
             _mm512_loadu_ps(step + 16 * v), _mm512_loadu_ps(middle + 16 * v));
}

// V vectors of rows of a tile with T tokens. All loops over their sums are unrolled, and short enough for
// a compiler to do it: else it keeps the sums in memory all the time.
template <int V, int T>
void multiply(const Product& product, const std::uint8_t* tile, std::int64_t row, std::int64_t count, std::int64_t token,
              std::int64_t run, const float* step, const float* middle) {
  __m512i total[T][V];
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) total[t][v] = _mm512_setzero_si512();
  const std::int64_t quads = (product.columns_of(run) + 3) / 4;
  const std::int8_t* x = product.x + token * product.stride + run * product.run_columns;
  for (std::int64_t i = 0; i < quads; ++i) {
    __m512i level[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) level[v] = _mm512_load_si512(tile + (i * V + v) * 64);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      int four;
      std::memcpy(&four, x + t * product.stride + 4 * i, 4);
      const __m512i all = _mm512_set1_epi32(four);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) total[t][v] = _mm512_dpbusd_epi32(total[t][v], level[v], all);
    }
  }
  finish_all<V, T>(product, total, token, row, count, run, step, middle);
}

// Some more than a few tokens: thirty-two rows at a time, decoded while the first tokens use them. -----------

// Sixteen rows, decoded so that they come to stand in a tile's order with little done between: each code of up to four
// bits shares a quadword with the fifteen behind it, and levels are looked up in the four parts of a vector.
template <int bits>
class Quads {
 public:
  static_assert(bits <= 4);

  explicit Quads(const Rows<bits>& rows) {
    alignas(64) std::uint8_t begin[64];
    for (int i = 0; i < 64; ++i) begin[i] = static_cast<std::uint8_t>(i % 16 * bits);
    begin_ = _mm512_load_si512(begin);
    for (int r = 0; r < 16; ++r) codes_[r] = rows.codes[r].byte;
    for (int i = 0; i < 4; ++i) {
      const auto level = [&](int part) {
        return _mm_load_si128(reinterpret_cast<const __m128i*>(rows.level[4 * part + i]));
      };
      level_[i] = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_set_m128i(level(1), level(0))),
                                     _mm256_set_m128i(level(3), level(2)), 1);
    }
  }

  // Vectors of four columns each, from a multiple of sixteen columns on.
  void decode(std::int64_t column, __m512i (&level)[4]) const {
    const std::int64_t byte = column / 8 * bits;
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const auto packed = [&](int part) { return _mm_loadu_si64(codes_[4 * part + i] + byte); };
      __m512i all = _mm512_broadcastq_epi64(packed(0));
      all = _mm512_mask_broadcastq_epi64(all, 0x0c, packed(1));
      all = _mm512_mask_broadcastq_epi64(all, 0x30, packed(2));
      all = _mm512_mask_broadcastq_epi64(all, 0xc0, packed(3));
      const __m512i code = _mm512_and_si512(_mm512_multishift_epi64_epi8(begin_, all), _mm512_set1_epi8(15));
      level[i] = _mm512_shuffle_epi8(level_[i], code);
    }
    transpose_fours(level);
  }

 private:
  const std::uint8_t* codes_[16];
  __m512i begin_, level_[4];
};

// Whether thirty-two rows are best read so: they begin with a byte, and do not all meet in a few sets of the first cache.
template <int bits>
bool in_quads(const Weight& weight) {
  return bits <= 4 && weight.columns * bits % 8 == 0 && weight.columns * bits / 8 % 1024 != 0;
}

// The first tokens, for which the tile is made on the way.
template <int bits, int T>
void multiply_decoding(const Product& product, const Quads<bits>& low, const Quads<bits>& high, std::uintptr_t next,
                       std::uint8_t* tile, std::int64_t row, std::int64_t count, std::int64_t run, const float* step,
                       const float* middle) {
  __m512i total[T][2];
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) total[t][0] = total[t][1] = _mm512_setzero_si512();
  const std::int64_t columns = product.columns_of(run);
  const std::int8_t* x = product.x + run * product.run_columns;
  for (std::int64_t i = 0; i < columns; i += 16) {
    __m512i level[2][4];
    fetch<8 * bits>(next);
    low.decode(i, level[0]), high.decode(i, level[1]);
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
      _mm512_store_si512(tile + (i / 4 + q) * 128, level[0][q]);
      _mm512_store_si512(tile + (i / 4 + q) * 128 + 64, level[1][q]);
    }
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q)
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        int four;
        std::memcpy(&four, x + t * product.stride + i + 4 * q, 4);
        const __m512i all = _mm512_set1_epi32(four);
        total[t][0] = _mm512_dpbusd_epi32(total[t][0], level[0][q], all);
        total[t][1] = _mm512_dpbusd_epi32(total[t][1], level[1][q], all);
      }
  }
  finish_all<2, T>(product, total, 0, row, count, run, step, middle);
}

template <int bits>
void from_quads(const Product& product, std::int64_t part) {
  constexpr int most = 8;  // tokens at once, fewer than there are
  const Weight& weight = product.weight;
  Levels<bits> low_levels(weight), high_levels(weight);
  Buffer<std::uint8_t> tile(pieces(product.columns_of(0), 16) * 16 * 32);
  alignas(64) float step[32], middle[32];
  const std::int64_t end = std::min(weight.rows, (part + 1) * part_rows);
  for (std::int64_t first = part * part_rows; first < end; first += 32) {
    const std::int64_t count = std::min<std::int64_t>(end - first, 32);
    for (std::int64_t run = 0; run < product.runs; ++run) {
      const Rows<bits>& low_rows = low_levels.rows(first, product, run);
      const Rows<bits>& high_rows = high_levels.rows(first + 16, product, run);
      std::memcpy(step, low_rows.step, 64), std::memcpy(step + 16, high_rows.step, 64);
      std::memcpy(middle, low_rows.middle, 64), std::memcpy(middle + 16, high_rows.middle, 64);
      const Quads<bits> low(low_rows), high(high_rows);
      // the next thirty-two rows, of which each run has its share
      const std::int64_t behind = ((first + 32) * weight.columns + 32 * run * product.run_columns) * bits / 8;
      const std::uintptr_t next = reinterpret_cast<std::uintptr_t>(weight.codes) + static_cast<std::uintptr_t>(behind);
      in_parts<most>(product.tokens, [&](auto some, std::int64_t token) {
        constexpr int T = decltype(some)::get;
        if (token)
          multiply<2, T>(product, tile.data(), first, count, token, run, step, middle);
        else
          multiply_decoding<bits, T>(product, low, high, next, tile.data(), first, count, run, step, middle);
      });
    }
  }
}

// Many tokens: sixty-four rows at a time. -------------------------------------------------------------------

template <int bits>
void decode_tile(const Product& product, Levels<bits>& levels, std::int64_t first, std::int64_t count, std::int64_t run,
                 std::uint8_t* tile, float* step, float* middle) {
  const std::int64_t columns = product.columns_of(run), vectors = pieces(count, 16);
  const Unpack<bits> unpack;
  for (std::int64_t begin = 0; begin < count; begin += 16) {
    const Rows<bits>& rows = levels.rows(first + begin, product, run);
    std::memcpy(step + begin, rows.step, sizeof rows.step);
    std::memcpy(middle + begin, rows.middle, sizeof rows.middle);
    std::uintptr_t next = rows.next;
    for (std::int64_t i = 0; i < columns; i += wide) {
      fetch<16 * bits>(next);
      __m512i level[16];
#pragma GCC unroll 16
      for (int r = 0; r < 16; ++r) level[r] = LookUp<bits>(rows.level[r])(unpack(rows.codes[r], i));
      transpose(level);
#pragma GCC unroll 16
      for (int c = 0; c < 16; ++c)
        _mm512_store_si512(tile + ((i / 4 + c) * vectors + begin / 16) * 64, level[c]);
    }
  }
}

template <int V>
void multiply_all(const Product& product, const std::uint8_t* tile, std::int64_t row, std::int64_t count,
                  std::int64_t run, const float* step, const float* middle) {
  in_parts<6>(product.tokens, [&](auto some, std::int64_t token) {
    multiply<V, decltype(some)::get>(product, tile, row, count, token, run, step, middle);
  });
}

// A tile's rows of the weight with all tokens.
template <int bits>
void from_tiles(const Product& product, std::int64_t part) {
  const Weight& weight = product.weight;
  const std::int64_t columns = (product.columns_of(0) + wide - 1) / wide * wide;
  const std::int64_t first = part * part_rows, count = std::min(weight.rows - first, part_rows);
  Levels<bits> levels(weight);
  Buffer<std::uint8_t> memory(columns * part_rows);
  std::uint8_t* tile = memory.data();
  alignas(64) float step[part_rows], middle[part_rows];
  for (std::int64_t run = 0; run < product.runs; ++run) {
    decode_tile<bits>(product, levels, first, count, run, tile, step, middle);
    const auto with = [&](auto use) { use(product, tile, first, count, run, step, middle); };
    switch ((count + 15) / 16) {
      case 1: with(multiply_all<1>); break;
      case 2: with(multiply_all<2>); break;
      case 3: with(multiply_all<3>); break;
      case 4: with(multiply_all<4>); break;
    }
  }
}

struct DotProducts {
  static constexpr std::int64_t few = 12;   // tokens at most, for which rows are decoded and used at once
  static constexpr std::int64_t some = 48;  // and for which they are so that it takes little to decode them

  // Nothing brings the tokens into another order.
  static std::int64_t arranged_size(std::int64_t, std::int64_t) { return 0; }
  static Parts arrange(const Product&) { return {0, nullptr}; }

  template <int bits>
  static Parts multiply(const Product& product) {
    const std::int64_t count = pieces(product.weight.rows, part_rows);
    if constexpr (bits <= 4)
      if (product.tokens <= some && in_quads<bits>(product.weight)) return {count, from_quads<bits>};
    return {count, from_tiles<bits>};
  }
};

}  // namespace
}  // namespace lexibit
