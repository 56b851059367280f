// Products of 8-bit tokens with 8-bit levels, for AVX-512 with VNNI and VBMI: what the files share that are compiled
// for these.
//
// A permutation of a row's table takes codes to levels. What is added up are whole numbers: the same input gives the
// same bits, whatever the number of tokens or threads.
#pragma once

#include "avx512.h"
#include "parallel.h"

namespace lexibit {
namespace {

constexpr int offset = 128;  // levels stand as unsigned bytes, and mean what is left without this

struct Product {
  const Weight& weight;
  std::int64_t tokens;
  const float* bias;
  Activation activation;
  float* out;
  bool beside;               // whether the product is added to what is there
  std::int64_t run_columns;  // of a run; all runs but the last are as wide
  std::int64_t runs;
  std::int64_t stride;  // of the rounded tokens, whole vectors
  const std::int8_t* x;
  std::int8_t* arranged;       // the same numbers in tiles, for amx.cpp; or null
  const float* scale;          // of each token
  const std::int32_t* sum;     // of each token's numbers in each run: [tokens, runs]
  std::int64_t columns_of(std::int64_t run) const {
    return std::min(run_columns, weight.columns - run * run_columns);
  }
};

// Tokens rounded to bytes. ----------------------------------------------------------------------------------

// One token: its scale, and its numbers as multiples of it, padded with zeros. A token with a number that is not
// finite has the scale NaN.
inline void round_token(const float* x, std::int64_t columns, std::int64_t stride, std::int8_t* out, float& scale) {
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

inline std::int32_t sum_of(const std::int8_t* x, std::int64_t count) {
  __m512i total = _mm512_setzero_si512();
  for (std::int64_t i = 0; i < count; i += wide) {
    const __mmask64 some = count - i >= wide ? ~0ull : (1ull << (count - i)) - 1;
    total = _mm512_dpbusd_epi32(total, _mm512_set1_epi8(1), _mm512_maskz_loadu_epi8(some, x + i));
  }
  return _mm512_reduce_add_epi32(total);
}

// Levels rounded to bytes. ----------------------------------------------------------------------------------

// The sums of sixteen vectors' numbers.
inline __m512i sums_of(const __m512i (&row)[16]) {
  __m512i two[8], four[4];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i)
    two[i] = _mm512_add_epi32(_mm512_unpacklo_epi32(row[2 * i], row[2 * i + 1]),
                              _mm512_unpackhi_epi32(row[2 * i], row[2 * i + 1]));
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
    four[i] = _mm512_add_epi32(_mm512_unpacklo_epi64(two[2 * i], two[2 * i + 1]),
                               _mm512_unpackhi_epi64(two[2 * i], two[2 * i + 1]));
  const __m512i low = _mm512_add_epi32(_mm512_shuffle_i32x4(four[0], four[1], 0x44),
                                       _mm512_shuffle_i32x4(four[0], four[1], 0xEE));
  const __m512i high = _mm512_add_epi32(_mm512_shuffle_i32x4(four[2], four[3], 0x44),
                                        _mm512_shuffle_i32x4(four[2], four[3], 0xEE));
  return _mm512_add_epi32(_mm512_shuffle_i32x4(low, high, 0x88), _mm512_shuffle_i32x4(low, high, 0xDD));
}

// Sixteen rows of a run: where their codes stand, and level = step * (byte - 128) + middle.
template <int bits>
struct Rows {
  static constexpr int size = 1 << bits;               // of a row's table of floats
  static constexpr int bytes = size < 16 ? 16 : size;  // of bytes: few levels stand there again and again
  Place codes[16];
  std::uintptr_t next;  // where what comes behind them begins: as much as these are
  alignas(64) float step[16];
  alignas(64) float middle[16];
  alignas(64) std::uint8_t level[16][bytes];
};

// How many levels of a row are seen at a time.
template <int bits>
constexpr int levels_at_once = bits <= 2 ? 4 : bits == 3 ? 8 : 16;

// Levels of each of sixteen rows, from a place in their tables on: a vector a level; two levels stand there twice.
template <int bits>
inline void levels_of_rows(const float* const (&table)[16], int from, __m512i (&level)[levels_at_once<bits>]) {
  const auto four = [&](int row) {
    if constexpr (bits == 1) {
      const __m128i two = _mm_loadu_si64(table[row]);
      return _mm_unpacklo_epi64(two, two);
    } else {
      return _mm_loadu_si128(reinterpret_cast<const __m128i*>(table[row]));
    }
  };
  const auto eight = [&](int row) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(table[row])); };
  if constexpr (bits <= 2) {
    for (int i = 0; i < 4; ++i)
      level[i] = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_set_m128i(four(i + 4), four(i))),
                                    _mm256_set_m128i(four(i + 12), four(i + 8)), 1);
    transpose_fours(level);
  } else if constexpr (bits == 3) {
    __m512i low[4], high[4];  // levels of rows 0 to 3 and 8 to 11, and of the others
    for (int i = 0; i < 4; ++i) {
      low[i] = _mm512_inserti64x4(_mm512_castsi256_si512(eight(i)), eight(i + 8), 1);
      high[i] = _mm512_inserti64x4(_mm512_castsi256_si512(eight(i + 4)), eight(i + 12), 1);
    }
    transpose_fours(low), transpose_fours(high);
    const __m512i even = _mm512_setr_epi64(0, 1, 8, 9, 4, 5, 12, 13), odd = _mm512_setr_epi64(2, 3, 10, 11, 6, 7, 14, 15);
    for (int i = 0; i < 4; ++i) {
      level[i] = _mm512_permutex2var_epi64(low[i], even, high[i]);
      level[4 + i] = _mm512_permutex2var_epi64(low[i], odd, high[i]);
    }
  } else {
    for (int r = 0; r < 16; ++r) level[r] = _mm512_loadu_si512(table[r] + from);
    transpose(level);
  }
}

template <int bits>
void round_levels(const float* const (&table)[16], Rows<bits>& out) {
  const __m512 infinite = _mm512_set1_ps(__builtin_inff());
  __m512 low = infinite, high = _mm512_sub_ps(_mm512_setzero_ps(), infinite);
  __mmask16 odd = 0;
  constexpr int at_once = levels_at_once<bits>;
  __m512i level[at_once];
  for (int from = 0; from < Rows<bits>::bytes; from += 16) {
    levels_of_rows<bits>(table, from, level);
    for (const __m512i& one : level) {
      const __m512 value = _mm512_castsi512_ps(one);
      odd |= _mm512_cmp_ps_mask(_mm512_abs_ps(value), infinite, _CMP_NLT_UQ);
      low = _mm512_min_ps(low, value), high = _mm512_max_ps(high, value);
    }
  }
  const __m512 range = _mm512_sub_ps(high, low);
  const __m512 step = _mm512_div_ps(range, _mm512_set1_ps(level_steps<bits>));
  const __mmask16 wide_enough = _mm512_cmp_ps_mask(range, _mm512_set1_ps(0x1p-100f), _CMP_GT_OQ);
  const __m512 inverse = _mm512_maskz_div_ps(wide_enough, _mm512_set1_ps(level_steps<bits>), range);
  _mm512_store_ps(out.step, _mm512_mask_mov_ps(step, odd, _mm512_set1_ps(__builtin_nanf(""))));
  _mm512_store_ps(out.middle, _mm512_add_ps(low, _mm512_mul_ps(step, _mm512_set1_ps(offset))));
  for (int from = 0; from < Rows<bits>::bytes; from += 16) {
    if (Rows<bits>::bytes > 16) levels_of_rows<bits>(table, from, level);
    __m512i four[4];  // levels of each row
    for (int i = 0; i < at_once; ++i) {
      const __m512 above = _mm512_mul_ps(_mm512_sub_ps(_mm512_castsi512_ps(level[i]), low), inverse);
      const __m512i byte = _mm512_slli_epi32(_mm512_cvtps_epi32(above), 8 * (i % 4));
      four[i / 4] = i % 4 ? _mm512_or_si512(four[i / 4], byte) : byte;
    }
    for (int i = at_once / 4; i < 4; ++i) four[i] = four[i - at_once / 4];
    transpose_fours(four);
    for (int i = 0; i < 4; ++i) {
      const auto store = [&](int row, __m128i value) {
        _mm_store_si128(reinterpret_cast<__m128i*>(out.level[row] + from), value);
      };
      store(i, _mm512_castsi512_si128(four[i]));
      store(4 + i, _mm512_extracti32x4_epi32(four[i], 1));
      store(8 + i, _mm512_extracti32x4_epi32(four[i], 2));
      store(12 + i, _mm512_extracti32x4_epi32(four[i], 3));
    }
  }
}

// Codes to levels. ------------------------------------------------------------------------------------------

// A row's levels in registers, repeated until they fill them.
template <int bits>
class LookUp {
 public:
  LookUp() = default;
  explicit LookUp(const std::uint8_t* level) {
    if constexpr (bits <= 4)
      table_[0] = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(level)));
    else if constexpr (bits == 5)
      table_[0] = _mm512_broadcast_i64x4(_mm256_load_si256(reinterpret_cast<const __m256i*>(level)));
    else
      for (int i = 0; i < count; ++i) table_[i] = _mm512_load_si512(level + 64 * i);
  }

  // Bits above a code's own are ignored.
  __m512i operator()(__m512i code) const {
    if constexpr (bits <= 6) {
      return _mm512_permutexvar_epi8(code, table_[0]);
    } else {
      const __m512i low = _mm512_permutex2var_epi8(table_[0], code, table_[1]);
      if constexpr (bits == 7) return low;
      const __m512i high = _mm512_permutex2var_epi8(table_[2 % count], code, table_[3 % count]);
      return _mm512_mask_blend_epi8(_mm512_movepi8_mask(code), low, high);
    }
  }

 private:
  static constexpr int count = bits <= 6 ? 1 : 1 << (bits - 6);
  __m512i table_[count];
};

// A thread's means to decode rows of one weight.
template <int bits>
class Levels {
 public:
  explicit Levels(const Weight& weight) : weight_(weight), table_(weight) {}

  // Sixteen rows of a run from `first` on; those behind the last, which may be all, are the last one again. What comes
  // behind them is the next sixteen rows, of which each run has its share.
  const Rows<bits>& rows(std::int64_t first, const Product& product, std::int64_t run) {
    constexpr int size = Rows<bits>::size;
    const std::int64_t column = run * product.run_columns, block = column / weight_.block_columns;
    const std::int64_t columns = product.columns_of(run);
    rows_.next = reinterpret_cast<std::uintptr_t>(weight_.codes) +
                 static_cast<std::uintptr_t>(((first + 16) * weight_.columns + 16 * column) * bits / 8);
    const float* table[16];
    std::int64_t group[16];
    const std::int64_t last = weight_.rows - 1;
    std::int64_t own = weight_.group(std::min(first, last), block), in_group = std::min(first, last) % weight_.block_rows;
    for (int r = 0; r < 16; ++r) {
      const std::int64_t row = std::min(first + r, last);
      rows_.codes[r] = vectors_.of(weight_, row, column, columns, r);
      group[r] = own;
      // a division for each row would take as long as all else that is done for it
      if (row < last && ++in_group == weight_.block_rows) in_group = 0, own += weight_.runs;
    }
    if (group[0] == group_ && group[15] == group_) return rows_;
    group_ = group[0] == group[15] ? group[0] : -1;
    for (int r = 0; r < 16; ++r) {
      if (r && group[r] == group[r - 1]) {
        table[r] = table[r - 1];
      } else {
        if (weight_.form == Form::table) {
          table[r] = weight_.levels + (group[r] << bits);
          continue;
        }
        table[r] = table_.of(group[r]);
        float* kept = expanded_.reserve(16 * size) + r * size;
        table[r] = static_cast<const float*>(std::memcpy(kept, table[r], sizeof(float) * size));
      }
    }
    round_levels<bits>(table, rows_);
    return rows_;
  }

 private:
  const Weight& weight_;
  Table table_;
  Buffer<float> expanded_;
  Vectors<bits> vectors_;
  std::int64_t group_ = -1;  // of all rows, or -1
  Rows<bits> rows_;
};

// Up to 16 rows of a token: adds what a run gives to what is there, and finishes after the last one.
inline void finish(const Product& product, std::int64_t token, std::int64_t row, __mmask16 rows, std::int64_t run,
                   __m512i total, __m512 step, __m512 middle) {
  const std::int32_t sum = product.sum[token * product.runs + run];
  total = _mm512_sub_epi32(total, _mm512_set1_epi32(offset * sum));
  const __m512 in_levels = _mm512_fmadd_ps(step, _mm512_cvtepi32_ps(total),
                                           _mm512_mul_ps(middle, _mm512_set1_ps(static_cast<float>(sum))));
  float* out = product.out + token * product.weight.rows + row;
  __m512 value = _mm512_mul_ps(in_levels, _mm512_set1_ps(product.scale[token]));
  if (run || product.beside) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(rows, out));
  if (run + 1 == product.runs) {
    if (product.bias) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(rows, product.bias + row));
    value = activate(product.activation, value);
  }
  _mm512_mask_storeu_ps(out, rows, value);
}

// Few tokens: rows are decoded and used at once. ------------------------------------------------------------

// How many codes of so many bits fill a byte; one where they do not.
template <int bits>
constexpr int in_byte = bits == 1 || bits == 2 || bits == 4 ? 8 / bits : 1;

// Whether all rows' codes begin with a byte and come several in one: a vector of bytes is a vector of first codes, and
// shifted one of second ones, which saves most of what takes codes apart. They meet tokens whose numbers stand so.
template <int bits>
bool in_bytes(const Weight& weight) {
  return in_byte<bits> > 1 && weight.columns * bits % 8 == 0;
}

// A run of a token for codes in bytes: of each `wide` bytes of codes the numbers of first codes, then of second ones, and
// so on. What does not fill these stays in the order of the columns.
template <int bits>
void to_bytes(const std::int8_t* x, std::int64_t columns, std::int8_t* out) {
  constexpr int C = in_byte<bits>;
  std::int64_t i = 0;
  for (; i + C * wide <= columns; i += C * wide)
    for (int part = 0; part < C; ++part) {
      const __m512i numbers = _mm512_loadu_si512(x + i + part * wide);
      for (int c = 0; c < C; ++c) {
        std::int8_t* to = out + i + c * wide + part * wide / C;
        if constexpr (C == 2)
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi16_epi8(_mm512_srli_epi16(numbers, 8 * c)));
        else if constexpr (C == 4)
          _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(_mm512_srli_epi32(numbers, 8 * c)));
        else
          _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm512_cvtepi64_epi8(_mm512_srli_epi64(numbers, 8 * c)));
      }
    }
  for (; i < columns; i += wide) _mm512_storeu_si512(out + i, _mm512_loadu_si512(x + i));
}

// How many rows are worked on together with T tokens: their sums, tables and places in a vector fit the registers.
template <int bits, int T>
constexpr int rows_together = bits >= 7 || T >= 5 ? 2 : 4;

// Up to sixteen rows of a run with T tokens, whose numbers are for codes in bytes or as they come.
template <int bits, int T>
void multiply_few(const Product& product, const Rows<bits>& rows, const Unpack<bits>& unpack, const std::int8_t* tokens,
                  bool for_bytes, std::int64_t first, std::int64_t count, std::int64_t token, std::int64_t run) {
  constexpr int R = rows_together<bits, T>, C = in_byte<bits>;
  const std::int64_t columns = product.columns_of(run);
  std::uintptr_t next = rows.next;
  const std::int8_t* x = tokens + token * product.stride + run * product.run_columns;
  __m512i sum[T][16];
  if (count < 16) std::memset(sum, 0, sizeof sum);
  for (int some = 0; some < count; some += R) {
    const std::uint8_t* at[R];
    __m512i total[R][T], from[R];
    LookUp<bits> look_up[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      at[r] = rows.codes[some + r].byte, from[r] = unpack.from(rows.codes[some + r].shift);
      look_up[r] = LookUp<bits>(rows.level[some + r]);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) total[r][t] = _mm512_setzero_si512();
    }
    const auto add = [&](const __m512i (&level)[R], std::int64_t column) {
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        __m512i one = _mm512_loadu_si512(x + t * product.stride + column);
        asm("" : "+v"(one));  // loaded once, and not again for each row
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) total[r][t] = _mm512_dpbusd_epi32(total[r][t], level[r], one);
      }
    };
    std::int64_t i = 0;
    if (C > 1 && for_bytes)
      for (; i + C * wide <= columns; i += C * wide) {
        __m512i packed[R], level[R];
        fetch<8 * R>(next);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) packed[r] = _mm512_loadu_si512(at[r] + i / C);
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) {
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) level[r] = look_up[r](_mm512_srli_epi16(packed[r], c * bits));
          add(level, i + c * wide);
        }
      }
    for (; i < columns; i += wide) {
      __m512i level[R];
      fetch<R * bits>(next);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r)
        level[r] = look_up[r](unpack(_mm512_loadu_si512(at[r] + i / 8 * bits), from[r]));
      add(level, i);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) _mm512_store_si512(&sum[t][some + r], total[r][t]);
  }
  for (int t = 0; t < T; ++t)
    finish(product, token + t, first, first_sixteen(count), run, sums_of(sum[t]), _mm512_load_ps(rows.step),
           _mm512_load_ps(rows.middle));
}

// A part of the weight's rows with all tokens.
template <int bits>
void from_codes(const Product& product, std::int64_t part) {
  const Weight& weight = product.weight;
  Levels<bits> levels(weight);
  const Unpack<bits> unpack;
  // memory is what one or two tokens wait for with four bits: it comes sooner, for whatever reason, without this
  const bool for_bytes = in_bytes<bits>(weight) && (bits <= 2 || product.tokens > 2);
  Buffer<std::int8_t> memory;
  const std::int8_t* tokens = product.x;
  if (for_bytes) {
    tokens = memory.reserve(product.tokens * product.stride);
    for (std::int64_t token = 0; token < product.tokens; ++token)
      for (std::int64_t run = 0; run < product.runs; ++run) {
        const std::int64_t from = token * product.stride + run * product.run_columns;
        to_bytes<bits>(product.x + from, product.columns_of(run), memory.data() + from);
      }
  }
  const std::int64_t end = std::min(weight.rows, (part + 1) * part_rows);
  for (std::int64_t first = part * part_rows; first < end; first += 16) {
    const std::int64_t count = std::min<std::int64_t>(end - first, 16);
    for (std::int64_t run = 0; run < product.runs; ++run) {
      const Rows<bits>& rows = levels.rows(first, product, run);
      in_parts<8>(product.tokens, [&](auto some, std::int64_t token) {
        multiply_few<bits, decltype(some)::get>(product, rows, unpack, tokens, for_bytes, first, count, token, run);
      });
    }
  }
}

// A product, cut into parts that may be done in any order. --------------------------------------------------

struct Parts {
  std::int64_t count;
  void (*part)(const Product&, std::int64_t);
};

// `Many` is how more than a few tokens are multiplied: DotProducts or Tiles.
template <class Many>
Parts parts_of(const Product& product) {
  Parts found{0, nullptr};
  if (product.tokens)
    with_constant(product.weight.bits, [&](auto constant) {
      constexpr int bits = decltype(constant)::get;
      found = product.tokens <= Many::few ? Parts{pieces(product.weight.rows, part_rows), from_codes<bits>}
                                          : Many::template multiply<bits>(product);
    });
  return found;
}

// Tokens as a product takes them. ---------------------------------------------------------------------------

struct Rounded {
  std::int64_t columns, run_columns, runs, stride;
  std::int8_t* x;
  std::int8_t* arranged;
  float* scale;
  std::int32_t* sum;

  Rounded(const Weight& weight, std::int8_t* x, std::int8_t* arranged, float* scale, std::int32_t* sum)
      : columns(weight.columns), run_columns(columns_at_once(weight)), runs(runs_of(weight)),
        stride(stride_of(weight.columns)), x(x), arranged(arranged), scale(scale), sum(sum) {}

  static std::int64_t runs_of(const Weight& weight) { return pieces(weight.columns, columns_at_once(weight)); }

  void round(std::int64_t token, const float* from) const {
    std::int8_t* to = x + token * stride;
    round_token(from, columns, stride, to, scale[token]);
    for (std::int64_t run = 0; run < runs; ++run)
      sum[token * runs + run] = sum_of(to + run * run_columns, std::min(run_columns, columns - run * run_columns));
  }

  Product with(const Weight& weight, std::int64_t tokens, const float* bias, Activation activation, float* out,
               bool beside = false) const {
    return {weight, tokens, bias, activation, out, beside, run_columns, runs, stride, x, arranged, scale, sum};
  }
};

template <class Many>
void linear(const Weight& weight, const float* x, std::int64_t tokens, const float* bias, Activation activation,
            float* out, int threads) {
  Buffer<std::int8_t> numbers(tokens * stride_of(weight.columns)), arranged(Many::arranged_size(weight.columns, tokens));
  Buffer<float> scale(tokens);
  Buffer<std::int32_t> sum(tokens * Rounded::runs_of(weight));
  const Rounded rounded(weight, numbers.data(), arranged.data(), scale.data(), sum.data());
  const Product product = rounded.with(weight, tokens, bias, activation, out);
  const Parts arrangement = Many::arrange(product), parts = parts_of<Many>(product);
  const auto round = [&](std::int64_t token) { rounded.round(token, x + token * weight.columns); };
  const auto arrange = [&](std::int64_t part) { arrangement.part(product, part); };
  const auto multiply = [&](std::int64_t part) { parts.part(product, part); };
  run_phases({phase(tokens, round), phase(arrangement.count, arrange), phase(parts.count, multiply)}, threads);
}

}  // namespace
}  // namespace lexibit
