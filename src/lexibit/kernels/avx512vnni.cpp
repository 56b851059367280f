// Products of 8-bit tokens with 8-bit levels, for AVX-512 with VNNI and VBMI.
//
// Sixty-four codes of k bits fill 8 k bytes: one permutation brings each eight of them into a quadword, a
// multishift takes every code to its byte, and a permutation of the table gives the levels. What is added up are
// whole numbers: the same input gives the same bits, whatever the number of tokens or threads.
#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
// of GCC's own headers: what they leave undefined is never looked at
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

#include "parallel.h"
#include "rows.h"

namespace lexibit {
namespace {

constexpr std::int64_t wide = 64;  // codes that are decoded at once
constexpr int offset = 128;        // levels stand as unsigned bytes, and mean what is left without this

// A run of columns that is multiplied in one go: sums of fewer than 65,536 products of a byte with a byte fit 31 bits.
constexpr std::int64_t longest = 1 << 16;

struct Product {
  const Weight& weight;
  std::int64_t tokens;
  const float* bias;
  Activation activation;
  float* out;
  std::int64_t run_columns;  // of a run; all runs but the last are as wide
  std::int64_t runs;
  std::int64_t stride;  // of the rounded tokens, whole vectors
  const std::int8_t* x;
  const float* scale;          // of each token
  const std::int32_t* sum;     // of each token's numbers in each run: [tokens, runs]
  std::int64_t columns_of(std::int64_t run) const {
    return std::min(run_columns, weight.columns - run * run_columns);
  }
};

// Tokens rounded to bytes. ----------------------------------------------------------------------------------

inline __mmask16 first_sixteen(std::int64_t count) {
  return static_cast<__mmask16>(count >= 16 ? 0xFFFF : (1 << std::max<std::int64_t>(count, 0)) - 1);
}

// One token: its scale, and its numbers as multiples of it, padded with zeros. A token with a number that is not
// finite has the scale NaN.
void round_token(const float* x, std::int64_t columns, std::int64_t stride, std::int8_t* out, float& scale) {
  __m512 most = _mm512_set1_ps(0x1p-100f);  // or the inverse of a very small one would be infinite
  __mmask16 odd = 0;
  for (std::int64_t i = 0; i < columns; i += 16) {
    const __m512 value = _mm512_abs_ps(_mm512_maskz_loadu_ps(first_sixteen(columns - i), x + i));
    odd |= _mm512_cmp_ps_mask(value, _mm512_set1_ps(__builtin_inff()), _CMP_NLT_UQ);
    most = _mm512_max_ps(most, value);
  }
  const float largest = _mm512_reduce_max_ps(most);
  scale = odd ? __builtin_nanf("") : largest / 127.0f;
  const __m512 inverse = _mm512_set1_ps(odd ? 0.0f : 127.0f / largest);
  for (std::int64_t i = 0; i < stride; i += 16) {
    const __m512 value = _mm512_maskz_loadu_ps(first_sixteen(columns - i), x + i);
    const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(value, inverse));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), _mm512_cvtepi32_epi8(whole));
  }
}

std::int32_t sum_of(const std::int8_t* x, std::int64_t count) {
  __m512i total = _mm512_setzero_si512();
  for (std::int64_t i = 0; i < count; i += wide) {
    const __mmask64 some = count - i >= wide ? ~0ull : (1ull << (count - i)) - 1;
    total = _mm512_dpbusd_epi32(total, _mm512_set1_epi8(1), _mm512_maskz_loadu_epi8(some, x + i));
  }
  return _mm512_reduce_add_epi32(total);
}

// Levels rounded to bytes. ----------------------------------------------------------------------------------

// level = step * (byte - 128) + middle.
struct Scale {
  float step, middle;
};

template <int bits>
struct Bytes {
  static constexpr int tables = bits <= 6 ? 1 : 1 << (bits - 6);
  __m512i table[tables];
};

// Sixteen floats, or eight and zeros.
template <int size>
inline __m512 levels_at(const float* level) {
  if constexpr (size == 8) return _mm512_zextps256_ps512(_mm256_loadu_ps(level));
  return _mm512_loadu_ps(level);
}

// The levels of a group, at least eight of them: as bytes, each as often as the table is longer.
template <int bits>
inline Scale round_levels(const float* level, Bytes<bits>& out) {
  constexpr int size = bits <= 3 ? 8 : 1 << bits;
  constexpr __mmask16 all = size == 8 ? 0xFF : 0xFFFF;
  const __m512 infinite = _mm512_set1_ps(__builtin_inff());
  __m512 least = infinite, most = _mm512_sub_ps(_mm512_setzero_ps(), infinite);
  __mmask16 odd = 0;
  for (int i = 0; i < size; i += 16) {
    const __m512 value = levels_at<size>(level + i);
    odd |= _mm512_cmp_ps_mask(_mm512_abs_ps(value), infinite, _CMP_NLT_UQ);
    least = _mm512_mask_min_ps(least, all, least, value);
    most = _mm512_mask_max_ps(most, all, most, value);
  }
  float low, high;
  if constexpr (size == 8) {
    // the least and, with the other sign, the greatest: one way down for both
    const __m512 both = _mm512_insertf32x8(least, _mm256_sub_ps(_mm256_setzero_ps(), _mm512_castps512_ps256(most)), 1);
    __m512 one = _mm512_min_ps(both, _mm512_shuffle_f32x4(both, both, 0xB1));
    one = _mm512_min_ps(one, _mm512_permute_ps(one, 0x4E));
    one = _mm512_min_ps(one, _mm512_permute_ps(one, 0xB1));
    low = _mm512_cvtss_f32(one), high = -_mm256_cvtss_f32(_mm512_extractf32x8_ps(one, 1));
  } else {
    low = _mm512_reduce_min_ps(least), high = _mm512_reduce_max_ps(most);
  }
  const float range = high - low;
  const float step = odd ? __builtin_nanf("") : range / 255.0f;
  const __m512 inverse = _mm512_set1_ps(range > 0x1p-100f ? 255.0f / range : 0.0f);
  const auto sixteen = [&](int i) {
    const __m512 above = _mm512_sub_ps(levels_at<size>(level + i), _mm512_set1_ps(low));
    return _mm512_cvtusepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(above, inverse)));
  };
  if constexpr (size == 8) {
    out.table[0] = _mm512_broadcastq_epi64(sixteen(0));
  } else if constexpr (size == 16) {
    out.table[0] = _mm512_broadcast_i32x4(sixteen(0));
  } else if constexpr (size == 32) {
    out.table[0] = _mm512_broadcast_i64x4(_mm256_set_m128i(sixteen(16), sixteen(0)));
  } else {
    for (int i = 0; i < Bytes<bits>::tables; ++i)
      out.table[i] = _mm512_inserti64x4(
          _mm512_castsi256_si512(_mm256_set_m128i(sixteen(64 * i + 16), sixteen(64 * i))),
          _mm256_set_m128i(sixteen(64 * i + 48), sixteen(64 * i + 32)), 1);
  }
  return {step, low + step * offset};
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

  // The codes that begin at a bit of the first byte. Bits above a code's own are anything.
  __m512i operator()(__m512i packed, int shift) const {
    if constexpr (bits == 8) return packed;
    const __m512i bit = shift ? _mm512_add_epi8(bit_, _mm512_set1_epi8(static_cast<char>(shift))) : bit_;
    return _mm512_multishift_epi64_epi8(bit, _mm512_permutexvar_epi8(byte_, packed));
  }

 private:
  __m512i byte_, bit_;
};

template <int bits>
inline __m512i look_up(const Bytes<bits>& levels, __m512i code) {
  if constexpr (bits <= 6) {
    return _mm512_permutexvar_epi8(code, levels.table[0]);
  } else {
    const __m512i low = _mm512_permutex2var_epi8(levels.table[0], code, levels.table[1]);
    if constexpr (bits == 7) return low;
    const __m512i high = _mm512_permutex2var_epi8(levels.table[2 % Bytes<bits>::tables], code,
                                                  levels.table[3 % Bytes<bits>::tables]);
    return _mm512_mask_blend_epi8(_mm512_movepi8_mask(code), low, high);
  }
}

// What is left of the codes at an address, a vector of it; nothing is read behind the end.
inline __m512i packed_at(const std::uint8_t* at, const std::uint8_t* end) {
  const std::int64_t left = end - at;
  if (left >= 64) return _mm512_loadu_si512(at);
  return left <= 0 ? _mm512_setzero_si512() : _mm512_maskz_loadu_epi8((1ull << left) - 1, at);
}

// A thread's means to decode rows of one weight; rows of a group share their table.
template <int bits>
class Levels {
 public:
  explicit Levels(const Weight& weight) : weight_(weight), table_(weight) {}

  struct Row {
    const std::uint8_t* at;
    int shift;
    Scale scale;
  };

  Row row(std::int64_t row, std::int64_t run_columns, std::int64_t run, Bytes<bits>& bytes) {
    const std::int64_t group = weight_.group(row, run * run_columns / weight_.block_columns);
    if (group != group_) scale_ = round_levels<bits>(table_.of(group_ = group), bytes_);
    bytes = bytes_;
    const std::int64_t bit = (row * weight_.columns + run * run_columns) * bits;
    return {weight_.codes + bit / 8, static_cast<int>(bit % 8), scale_};
  }

  const std::uint8_t* end() const { return weight_.codes + weight_.code_bytes; }

 private:
  const Weight& weight_;
  Table table_;
  std::int64_t group_ = -1;
  Bytes<bits> bytes_;
  Scale scale_;
};

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
      return _mm512_mask_mov_ps(_mm512_sub_ps(x, tail), negative, tail);
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

// Up to 16 rows of a token: adds what a run gives to what is there, and finishes after the last one.
inline void finish(const Product& product, std::int64_t token, std::int64_t row, __mmask16 rows, std::int64_t run,
                   __m512i total, __m512 step, __m512 middle) {
  const std::int32_t sum = product.sum[token * product.runs + run];
  total = _mm512_sub_epi32(total, _mm512_set1_epi32(offset * sum));
  const __m512 in_levels = _mm512_fmadd_ps(step, _mm512_cvtepi32_ps(total),
                                           _mm512_mul_ps(middle, _mm512_set1_ps(static_cast<float>(sum))));
  float* out = product.out + token * product.weight.rows + row;
  __m512 value = _mm512_mul_ps(in_levels, _mm512_set1_ps(product.scale[token]));
  if (run) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(rows, out));
  if (run + 1 == product.runs) {
    if (product.bias) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(rows, product.bias + row));
    value = activate(product.activation, value);
  }
  _mm512_mask_storeu_ps(out, rows, value);
}

// Few tokens: every row is decoded and used at once. --------------------------------------------------------

constexpr std::int64_t few_tokens = 8;

template <int bits, int T>
void from_codes(const Product& product, int threads) {
  constexpr std::int64_t height = 16;
  const Weight& weight = product.weight;
  parallel_for((weight.rows + height - 1) / height, threads, [&](std::int64_t part) {
    Levels<bits> levels(weight);
    const Unpack<bits> unpack;
    const std::int64_t first = part * height, count = std::min(weight.rows - first, height);
    for (std::int64_t run = 0; run < product.runs; ++run) {
      alignas(64) std::int32_t total[T][height] = {};
      alignas(64) float step[height] = {}, middle[height] = {};
      const std::int64_t columns = product.columns_of(run);
      for (std::int64_t r = 0; r < count; ++r) {
        Bytes<bits> bytes;
        const auto row = levels.row(first + r, product.run_columns, run, bytes);
        step[r] = row.scale.step, middle[r] = row.scale.middle;
        const std::int8_t* x = product.x + run * product.run_columns;
        __m512i sum[T];
        for (auto& one : sum) one = _mm512_setzero_si512();
        for (std::int64_t i = 0; i < columns; i += wide) {
          const __m512i code = unpack(packed_at(row.at + i / 8 * bits, levels.end()), row.shift);
          const __m512i level = look_up<bits>(bytes, code);
          for (int t = 0; t < T; ++t)
            sum[t] = _mm512_dpbusd_epi32(sum[t], level, _mm512_loadu_si512(x + t * product.stride + i));
        }
        for (int t = 0; t < T; ++t) total[t][r] = _mm512_reduce_add_epi32(sum[t]);
      }
      for (int t = 0; t < T; ++t)
        finish(product, t, first, first_sixteen(count), run, _mm512_load_si512(total[t]), _mm512_load_ps(step),
               _mm512_load_ps(middle));
    }
  });
}

// Many tokens: tiles of rows are decoded once. --------------------------------------------------------------

constexpr std::int64_t tile_rows = 64;

// Sixteen vectors of sixteen numbers, the other way round.
inline void transpose(__m512i (&row)[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(row[i], row[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(row[i], row[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      row[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + 2 + j]);
      row[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + 2 + j]);
    }
  for (int i = 0; i < 16; i += 8)
    for (int j = 0; j < 4; ++j) {
      t[i + j] = _mm512_shuffle_i32x4(row[i + j], row[i + 4 + j], 0x88);
      t[i + 4 + j] = _mm512_shuffle_i32x4(row[i + j], row[i + 4 + j], 0xDD);
    }
  for (int j = 0; j < 8; ++j) {
    row[j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0x88);
    row[8 + j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0xDD);
  }
}

// A tile: of each four columns the rows one after the other, four bytes each.
template <int bits>
void decode_tile(const Product& product, Levels<bits>& levels, std::int64_t first, std::int64_t count, std::int64_t run,
                 std::uint8_t* tile, float* step, float* middle) {
  const std::int64_t columns = product.columns_of(run);
  for (std::int64_t begin = 0; begin < count; begin += 16) {
    const std::int64_t rows = std::min<std::int64_t>(count - begin, 16);
    Bytes<bits> bytes[16];
    typename Levels<bits>::Row row[16];
    for (std::int64_t r = 0; r < 16; ++r) {
      // rows that are not there are the last one again: nobody looks at what they give
      row[r] = levels.row(first + begin + std::min(r, rows - 1), product.run_columns, run, bytes[r]);
      step[begin + r] = row[r].scale.step, middle[begin + r] = row[r].scale.middle;
    }
    const Unpack<bits> unpack;
    for (std::int64_t i = 0; i < columns; i += wide) {
      __m512i level[16];
      for (int r = 0; r < 16; ++r) {
        const __m512i packed = packed_at(row[r].at + i / 8 * bits, levels.end());
        level[r] = look_up<bits>(bytes[r], unpack(packed, row[r].shift));
      }
      transpose(level);
      for (int c = 0; c < 16; ++c)
        _mm512_storeu_si512(tile + ((i / 4 + c) * tile_rows + begin) * 4, level[c]);
    }
  }
}

// V vectors of rows of a tile with T tokens. All loops over their sums are unrolled, and short enough for
// a compiler to do it: else it keeps the sums in memory all the time.
template <int V, int T>
void multiply(const Product& product, const std::uint8_t* tile, std::int64_t row, std::int64_t count, std::int64_t token,
              std::int64_t run, const float* step, const float* middle) {
  __m512i total[T][V];
#pragma GCC unroll 6
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) total[t][v] = _mm512_setzero_si512();
  const std::int64_t quads = (product.columns_of(run) + 3) / 4;
  const std::int8_t* x = product.x + token * product.stride + run * product.run_columns;
  for (std::int64_t i = 0; i < quads; ++i) {
    __m512i level[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) level[v] = _mm512_loadu_si512(tile + (i * tile_rows + 16 * v) * 4);
#pragma GCC unroll 6
    for (int t = 0; t < T; ++t) {
      int four;
      std::memcpy(&four, x + t * product.stride + 4 * i, 4);
      const __m512i all = _mm512_set1_epi32(four);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) total[t][v] = _mm512_dpbusd_epi32(total[t][v], level[v], all);
    }
  }
  __m512i sum[T][V];
#pragma GCC unroll 6
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) _mm512_store_si512(&sum[t][v], total[t][v]);
  for (int v = 0; v < V; ++v)
    for (int t = 0; t < T; ++t)
      finish(product, token + t, row + 16 * v, first_sixteen(count - 16 * v), run, _mm512_load_si512(&sum[t][v]),
             _mm512_loadu_ps(step + 16 * v), _mm512_loadu_ps(middle + 16 * v));
}

template <int V>
void multiply_all(const Product& product, const std::uint8_t* tile, std::int64_t row, std::int64_t count,
                  std::int64_t run, const float* step, const float* middle) {
  std::int64_t token = 0;
  for (; token + 6 <= product.tokens; token += 6) multiply<V, 6>(product, tile, row, count, token, run, step, middle);
  for (; token + 2 <= product.tokens; token += 2) multiply<V, 2>(product, tile, row, count, token, run, step, middle);
  if (token < product.tokens) multiply<V, 1>(product, tile, row, count, token, run, step, middle);
}

template <int bits>
void from_tiles(const Product& product, int threads) {
  const Weight& weight = product.weight;
  const std::int64_t columns = (product.columns_of(0) + wide - 1) / wide * wide;
  parallel_for((weight.rows + tile_rows - 1) / tile_rows, threads, [&](std::int64_t part) {
    const std::int64_t first = part * tile_rows, count = std::min(weight.rows - first, tile_rows);
    Levels<bits> levels(weight);
    Buffer<std::uint8_t> memory(columns * tile_rows + 64);
    std::uint8_t* tile = memory.data() + 63 - (reinterpret_cast<std::uintptr_t>(memory.data()) + 63) % 64;
    float step[tile_rows], middle[tile_rows];
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
  });
}

template <int bits>
void with_tokens(const Product& product, int threads) {
  switch (product.tokens) {
    case 0: return;
    case 1: return from_codes<bits, 1>(product, threads);
    case 2: return from_codes<bits, 2>(product, threads);
    case 3: return from_codes<bits, 3>(product, threads);
    case 4: return from_codes<bits, 4>(product, threads);
    case 5: return from_codes<bits, 5>(product, threads);
    case 6: return from_codes<bits, 6>(product, threads);
    case 7: return from_codes<bits, 7>(product, threads);
    case 8: return from_codes<bits, 8>(product, threads);
    default: return from_tiles<bits>(product, threads);
  }
}

void linear(const Weight& weight, const float* x, std::int64_t tokens, const float* bias, Activation activation,
            float* out, int threads) {
  const std::int64_t run_columns = std::min({weight.columns, weight.block_columns, longest});
  const std::int64_t runs = run_columns ? (weight.columns + run_columns - 1) / run_columns : 1;
  const std::int64_t stride = (weight.columns + wide - 1) / wide * wide + wide;
  Buffer<std::int8_t> rounded(tokens * stride);
  Buffer<float> scale(tokens);
  Buffer<std::int32_t> sum(tokens * runs);
  const Product product{weight, tokens, bias, activation, out, run_columns, runs,
                        stride, rounded.data(), scale.data(), sum.data()};
  parallel_for(tokens, tokens * weight.columns < (1 << 15) ? 1 : threads, [&](std::int64_t token) {
    std::int8_t* to = rounded.data() + token * stride;
    round_token(x + token * weight.columns, weight.columns, stride, to, scale[token]);
    for (std::int64_t run = 0; run < runs; ++run)
      sum[token * runs + run] = sum_of(to + run * run_columns, product.columns_of(run));
  });
  with_bits(weight.bits, [&](auto bits) { with_tokens<decltype(bits)::get>(product, threads); });
}

}  // namespace

const Int8Kernels avx512vnni_kernels = {linear};

}  // namespace lexibit

#endif
