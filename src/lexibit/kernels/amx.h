// Products by tiles, for AMX beside AVX-512: what the files share that are compiled for these.
//
// A tile is sixteen rows of 64 bytes. One instruction multiplies a tile of levels, which are sixteen rows of the weight
// as they stand, with a tile of sixteen tokens, of which each row holds the next four bytes of every token, and adds the
// 256 sums up in a third.
#pragma once

#include <algorithm>

#include "avx512.h"

namespace lexibit {
namespace {

constexpr std::int64_t tile_bytes = 1024;
constexpr std::int64_t tile_tokens = 16;
constexpr std::int64_t pair = 2 * tile_tokens;  // tokens that are multiplied at a time
constexpr std::int64_t tile_rows = 32;  // of the weight, that a thread works on at a time: two tiles

// A thread's tile registers: whole tiles while this lives, and free for others afterwards. No library is called meanwhile:
// nobody keeps them for their caller.
class TileRegisters {
 public:
  TileRegisters() { _tile_loadconfig(&whole); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
  ~TileRegisters() { _tile_release(); }

 private:
  struct alignas(64) Configuration {
    std::uint8_t palette, start, reserved[14];
    std::uint16_t row_bytes[16];
    std::uint8_t rows[16];
  };
  static constexpr Configuration whole = {1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
};

// What brings rounded tokens into tiles: sixteen tokens after the other, of each the tiles that its columns fill.
struct Arrangement {
  static constexpr std::int64_t at_once = 4;  // tiles
  const void* x;
  std::int64_t stride;  // bytes from token to token, whose last tiles are filled up with zeros
  std::int64_t tokens;
  std::int64_t tiles;  // of a token
  void* out;

  static std::int64_t size(std::int64_t tokens, std::int64_t tiles) {
    return pieces(tokens, tile_tokens) * tiles * tile_bytes;
  }
  std::int64_t count() const { return pieces(tokens, tile_tokens) * pieces(tiles, at_once); }

  void part(std::int64_t part) const {
    const std::int64_t group = part / pieces(tiles, at_once), first = part % pieces(tiles, at_once) * at_once;
    const std::int64_t count = std::min(tokens - group * tile_tokens, tile_tokens);
    const std::uint8_t* from = static_cast<const std::uint8_t*>(x) + group * tile_tokens * stride;
    std::uint8_t* to = static_cast<std::uint8_t*>(out) + group * tiles * tile_bytes;
    for (std::int64_t tile = first; tile < std::min(tiles, first + at_once); ++tile) {
      __m512i four[16];
      for (int t = 0; t < tile_tokens; ++t)
        four[t] = t < count ? _mm512_loadu_si512(from + t * stride + 64 * tile) : _mm512_setzero_si512();
      transpose(four);
      for (int i = 0; i < 16; ++i) _mm512_store_si512(to + tile * tile_bytes + 64 * i, four[i]);
    }
  }
};

// The sums of up to 32 rows of the weight with up to 32 tokens: of each two tiles, [rows, tokens] in four bytes.
struct alignas(64) Sums {
  std::uint8_t of[2][2][tile_bytes];
};

// Adds A tiles of rows with B of tokens, as Kind multiplies them, to the sums. The levels are the two tiles of rows after
// each other for every 64 bytes of columns. Wants TileRegisters.
template <class Kind, int A, int B>
void add_tiles(const std::uint8_t* levels, const std::uint8_t* tokens, std::int64_t tiles, std::int64_t stride,
               Sums& sums) {
  asm volatile("" ::: "memory");  // what loads tiles does not tell GCC that it reads memory
  _tile_loadd(0, sums.of[0][0], 64);
  if constexpr (B == 2) _tile_loadd(1, sums.of[0][1], 64);
  if constexpr (A == 2) _tile_loadd(2, sums.of[1][0], 64);
  if constexpr (A == 2 && B == 2) _tile_loadd(3, sums.of[1][1], 64);
  for (std::int64_t i = 0; i < tiles; ++i) {
    _tile_loadd(4, levels + 2 * i * tile_bytes, 64);
    if constexpr (A == 2) _tile_loadd(5, levels + (2 * i + 1) * tile_bytes, 64);
    _tile_loadd(6, tokens + i * tile_bytes, 64);
    if constexpr (B == 2) _tile_loadd(7, tokens + stride + i * tile_bytes, 64);
    Kind::template multiply<A, B>();
  }
  _tile_stored(0, sums.of[0][0], 64);
  if constexpr (B == 2) _tile_stored(1, sums.of[0][1], 64);
  if constexpr (A == 2) _tile_stored(2, sums.of[1][0], 64);
  if constexpr (A == 2 && B == 2) _tile_stored(3, sums.of[1][1], 64);
}

// The same with as many rows and tokens as there are, 32 of each at most.
template <class Kind>
void add_up(const std::uint8_t* levels, std::int64_t rows, const std::uint8_t* tokens, std::int64_t count,
            std::int64_t tiles, std::int64_t stride, Sums& sums) {
  if (rows > 16)
    count > tile_tokens ? add_tiles<Kind, 2, 2>(levels, tokens, tiles, stride, sums)
                        : add_tiles<Kind, 2, 1>(levels, tokens, tiles, stride, sums);
  else
    count > tile_tokens ? add_tiles<Kind, 1, 2>(levels, tokens, tiles, stride, sums)
                        : add_tiles<Kind, 1, 1>(levels, tokens, tiles, stride, sums);
}

// Calls use(token, row, sums) for each sixteen rows of each of some tokens, 32 at most.
template <class Use>
void each_sixteen(const Sums& sums, std::int64_t rows, std::int64_t tokens, Use&& use) {
  for (std::int64_t row = 0; row < rows; row += 16)
    for (std::int64_t token = 0; token < tokens; token += tile_tokens) {
      const std::uint8_t* sum = sums.of[row / 16][token / tile_tokens];
      __m512i of[16];
      for (int r = 0; r < 16; ++r) of[r] = _mm512_load_si512(sum + 64 * r);
      transpose(of);
      for (std::int64_t t = 0; t < std::min(tokens - token, tile_tokens); ++t) use(token + t, row, of[t]);
    }
}

}  // namespace
}  // namespace lexibit
