// Kernels for AVX2 with FMA.
//
// Products are added up lane by lane in the order of the columns, whatever the number of tokens or threads: the same
// input gives the same bits.
#if defined(__x86_64__)
#include "avx2.h"
#include "parallel.h"
#include "rows.h"

namespace lexibit {
namespace {

inline float sum(__m256 value) {
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps(value, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_shuffle_ps(four, four, 1)));
}

template <int bits, bool aligned>
inline void decode_run(Place place, const float* table, std::int64_t count, float* out) {
  for (std::int64_t i = 0; i < count; i += lanes, place.byte += bits)
    _mm256_storeu_ps(out + i, look_up<bits>(table, codes_at<bits, aligned>(place.byte, place.shift)));
}

// One thread's means to decode rows of a weight.
template <int bits>
class Decoder {
 public:
  Decoder(const Weight& weight, const ExtraRows& extra)
      : weight_(weight), extra_(extra), table_(weight), codes_(weight) {}

  // The weight's own columns from `begin` to `end` of a row. Writes up to 7 floats more.
  void row(std::int64_t row, std::int64_t begin, std::int64_t end, float* out) {
    own(row, begin, end, out);
    extra_.of(row, [&](std::int64_t other) {
      const float* more = more_.reserve(end - begin + lanes);
      own(other, begin, end, more_.data());
      for (std::int64_t i = 0; i < end - begin; ++i) out[i] += more[i];
    });
    if (weight_.mask) apply_mask(weight_, row, begin, end, out);
  }

 private:
  void own(std::int64_t row, std::int64_t begin, std::int64_t end, float* out) {
    stored(row, begin, end, out);
    if (!weight_.extra_columns) return;
    columns_.reserve(weight_.extra_columns + lanes);
    stored(row, weight_.own_columns(), weight_.columns, columns_.data());
    for (std::int64_t i = 0; i < weight_.extra_columns; ++i) {
      const std::int64_t origin = weight_.origins[i];
      if (begin <= origin && origin < end) out[origin - begin] += columns_[i];
    }
  }

  void stored(std::int64_t row, std::int64_t begin, std::int64_t end, float* out) {
    while (begin < end) {
      const std::int64_t run = begin / weight_.block_columns;
      const std::int64_t count = std::min(end, (run + 1) * weight_.block_columns) - begin;
      const float* table = table_.of(weight_.group(row, run));
      const Place place = codes_.of(row, begin, count);
      place.shift ? decode_run<bits, false>(place, table, count, out)
                  : decode_run<bits, true>(place, table, count, out);
      begin += count, out += count;
    }
  }

  const Weight& weight_;
  const ExtraRows& extra_;
  Table table_;
  Codes codes_;
  Buffer<float> more_, columns_;
};

// What a product is made of.
struct Product {
  const Weight& weight;
  const float* x;
  std::int64_t tokens;
  const float* bias;
  float* out;
  bool transposed;
  std::int64_t inside() const { return transposed ? weight.own_rows() : weight.own_columns(); }
  std::int64_t outside() const { return transposed ? weight.own_columns() : weight.own_rows(); }
};

// Straight from the codes, for few tokens. ------------------------------------------------------------------

// A thread's tables and codes of rows that are worked on at once.
struct Slots {
  explicit Slots(const Weight& weight)
      : table{Table(weight), Table(weight), Table(weight), Table(weight)},
        codes{Codes(weight), Codes(weight), Codes(weight), Codes(weight)} {}
  Table table[4];
  Codes codes[4];
};

// R rows of the weight with T tokens, all there are.
template <int bits, bool aligned, int R, int T>
inline void rows_by_tokens(const Product& product, std::int64_t first, Slots& slots) {
  const Weight& weight = product.weight;
  const std::int64_t columns = weight.columns;
  __m256 total[R][T];
  for (auto& row : total)
    for (auto& one : row) one = _mm256_setzero_ps();
  Place place[R];
  for (int r = 0; r < R; ++r) place[r] = slots.codes[r].of(first + r, 0, columns);
  for (std::int64_t run = 0, column = 0; column < columns; ++run) {
    const std::int64_t end = std::min(columns, (run + 1) * weight.block_columns);
    const float* table[R];
    for (int r = 0; r < R; ++r) table[r] = slots.table[r].of(weight.group(first + r, run));
    // what stands behind the last column are no weights
    const auto step = [&](auto load, auto some) {
      __m256 x[T];
      for (int t = 0; t < T; ++t) x[t] = load(product.x + t * columns + column);
      for (int r = 0; r < R; ++r) {
        const __m256 w = some(look_up<bits>(table[r], codes_at<bits, aligned>(place[r].byte, place[r].shift)));
        for (int t = 0; t < T; ++t) total[r][t] = _mm256_fmadd_ps(w, x[t], total[r][t]);
        place[r].byte += bits;
      }
    };
    for (; column + lanes <= end; column += lanes)
      step([](const float* at) { return _mm256_loadu_ps(at); }, [](__m256 w) { return w; });
    if (column < end) {
      const __m256i some = first_lanes(end - column);
      step([&](const float* at) { return _mm256_maskload_ps(at, some); },
           [&](__m256 w) { return _mm256_and_ps(w, _mm256_castsi256_ps(some)); });
      column = end;
    }
  }
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < T; ++t)
      product.out[t * weight.rows + first + r] =
          sum(total[r][t]) + (product.bias ? product.bias[first + r] : 0.0f);
}

template <int bits, bool aligned, int T>
void from_codes(const Product& product, int threads) {
  constexpr int R = T <= 2 ? 4 : 2;
  constexpr std::int64_t height = 32;
  const Weight& weight = product.weight;
  parallel_for((weight.rows + height - 1) / height, threads, [&](std::int64_t part) {
    Slots slots(weight);
    std::int64_t row = part * height;
    const std::int64_t end = std::min(weight.rows, row + height);
    for (; row + R <= end; row += R) rows_by_tokens<bits, aligned, R, T>(product, row, slots);
    for (; row < end; ++row) rows_by_tokens<bits, aligned, 1, T>(product, row, slots);
  });
}

constexpr std::int64_t few_tokens = 4;

// Whether the weight is what its codes say and no more, and its runs are whole lanes.
bool plain(const Weight& weight) {
  return !weight.mask && !weight.extra_rows && !weight.extra_columns &&
         (weight.runs <= 1 || weight.block_columns % lanes == 0);
}

template <int bits>
void from_codes(const Product& product, int threads) {
  const auto with = [&](auto tokens) {
    constexpr int T = decltype(tokens)::get;
    product.weight.columns * bits % 8 ? from_codes<bits, false, T>(product, threads)
                                      : from_codes<bits, true, T>(product, threads);
  };
  switch (product.tokens) {
    case 1: return with(Constant<1>());
    case 2: return with(Constant<2>());
    case 3: return with(Constant<3>());
    case 4: return with(Constant<4>());
  }
}

// From tiles that are decoded once, for many tokens. --------------------------------------------------------

constexpr std::int64_t tile_floats = 1 << 15;  // 128 KiB: stays in a core's second cache

// R decoded rows, `stride` apart and padded to whole lanes, with T tokens.
template <int R, int T>
inline void dot(const Product& product, const float* w, std::int64_t stride, std::int64_t row, std::int64_t token) {
  const std::int64_t columns = product.inside();
  const float* x = product.x + token * columns;
  __m256 total[R][T];
  for (auto& one : total)
    for (auto& value : one) value = _mm256_setzero_ps();
  std::int64_t column = 0;
  const auto step = [&](auto load) {
    __m256 part[T];
    for (int t = 0; t < T; ++t) part[t] = load(x + t * columns + column);
    for (int r = 0; r < R; ++r) {
      const __m256 one = _mm256_loadu_ps(w + r * stride + column);
      for (int t = 0; t < T; ++t) total[r][t] = _mm256_fmadd_ps(one, part[t], total[r][t]);
    }
  };
  for (; column + lanes <= columns; column += lanes) step([](const float* at) { return _mm256_loadu_ps(at); });
  if (column < columns) {
    const __m256i some = first_lanes(columns - column);
    step([&](const float* at) { return _mm256_maskload_ps(at, some); });
  }
  const std::int64_t outside = product.outside();
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < T; ++t)
      product.out[(token + t) * outside + row + r] =
          sum(total[r][t]) + (product.bias ? product.bias[row + r] : 0.0f);
}

template <int T>
void dot_rows(const Product& product, const float* w, std::int64_t stride, std::int64_t row, std::int64_t end,
              std::int64_t token) {
  for (; row + 3 <= end; row += 3, w += 3 * stride) dot<3, T>(product, w, stride, row, token);
  for (; row < end; ++row, w += stride) dot<1, T>(product, w, stride, row, token);
}

template <int bits>
void from_tiles(const Product& product, int threads) {
  const Weight& weight = product.weight;
  const ExtraRows extra(weight);
  const std::int64_t stride = (product.inside() + 2 * lanes - 1) / lanes * lanes;
  const std::int64_t height = std::clamp<std::int64_t>(tile_floats / stride / 3 * 3, 3, 48);
  parallel_for((product.outside() + height - 1) / height, threads, [&](std::int64_t part) {
    const std::int64_t first = part * height, end = std::min(product.outside(), first + height);
    Decoder<bits> decoder(weight, extra);
    Buffer<float> tile(stride * (end - first));
    for (std::int64_t row = first; row < end; ++row) {
      float* at = tile.data() + (row - first) * stride;
      decoder.row(row, 0, product.inside(), at);
      std::fill(at + product.inside(), at + stride, 0.0f);
    }
    std::int64_t token = 0;
    for (; token + 4 <= product.tokens; token += 4) dot_rows<4>(product, tile.data(), stride, first, end, token);
    for (; token < product.tokens; ++token) dot_rows<1>(product, tile.data(), stride, first, end, token);
  });
}

// Transposed: a token's numbers each take a row of the weight. ----------------------------------------------

constexpr std::int64_t span = 64;      // columns of a tile
constexpr std::int64_t tile_rows = 128;
constexpr std::int64_t tile_tokens = 256;  // whose sums are at hand; for each so many the tiles are decoded again

// T tokens with V vectors of columns of decoded rows; adds to what is in `out`.
template <int T, int V>
inline void weigh_rows(const float* w, std::int64_t rows, const float* x, std::int64_t inside, float* out) {
  __m256 total[T][V];
  for (int t = 0; t < T; ++t)
    for (int v = 0; v < V; ++v) total[t][v] = _mm256_loadu_ps(out + t * span + v * lanes);
  for (std::int64_t row = 0; row < rows; ++row, w += span + lanes) {
    __m256 part[V];
    for (int v = 0; v < V; ++v) part[v] = _mm256_loadu_ps(w + v * lanes);
    for (int t = 0; t < T; ++t) {
      const __m256 one = _mm256_set1_ps(x[t * inside + row]);
      for (int v = 0; v < V; ++v) total[t][v] = _mm256_fmadd_ps(part[v], one, total[t][v]);
    }
  }
  for (int t = 0; t < T; ++t)
    for (int v = 0; v < V; ++v) _mm256_storeu_ps(out + t * span + v * lanes, total[t][v]);
}

template <int bits>
void transposed(const Product& product, int threads) {
  const Weight& weight = product.weight;
  const ExtraRows extra(weight);
  const std::int64_t inside = product.inside(), outside = product.outside();
  parallel_for((outside + span - 1) / span, threads, [&](std::int64_t part) {
    const std::int64_t first = part * span, count = std::min(span, outside - first);
    Decoder<bits> decoder(weight, extra);
    Buffer<float> tile(tile_rows * (span + lanes));
    Buffer<float> out(std::min(tile_tokens, product.tokens) * span);
    for (std::int64_t begin = 0; begin < product.tokens; begin += tile_tokens) {
      const std::int64_t tokens = std::min(tile_tokens, product.tokens - begin);
      std::fill_n(out.data(), tokens * span, 0.0f);
      for (std::int64_t row = 0; row < inside; row += tile_rows) {
        const std::int64_t rows = std::min(tile_rows, inside - row);
        for (std::int64_t r = 0; r < rows; ++r)
          decoder.row(row + r, first, first + count, tile.data() + r * (span + lanes));
        const float* x = product.x + begin * inside + row;
        std::int64_t token = 0;
        for (; token + 4 <= tokens; token += 4)
          for (std::int64_t column = 0; column < count; column += 2 * lanes)
            weigh_rows<4, 2>(tile.data() + column, rows, x + token * inside, inside, &out[token * span + column]);
        for (; token < tokens; ++token)
          weigh_rows<1, 8>(tile.data(), rows, x + token * inside, inside, &out[token * span]);
      }
      for (std::int64_t token = 0; token < tokens; ++token)
        for (std::int64_t i = 0; i < count; ++i)
          product.out[(begin + token) * outside + first + i] =
              out[token * span + i] + (product.bias ? product.bias[first + i] : 0.0f);
    }
  });
}

// The three things one does with a weight. ------------------------------------------------------------------

// Rows one after the other; row_of gives the number of the i-th.
template <class RowOf>
void decode_rows(const Weight& weight, std::int64_t count, RowOf&& row_of, float* out, int threads) {
  const ExtraRows extra(weight);
  const std::int64_t columns = weight.own_columns();
  constexpr std::int64_t height = 16;
  with_constant(weight.bits, [&](auto bits) {
    parallel_for((count + height - 1) / height, threads, [&](std::int64_t part) {
      Decoder<decltype(bits)::get> decoder(weight, extra);
      Buffer<float> last(columns + lanes);
      const std::int64_t end = std::min(count, (part + 1) * height);
      for (std::int64_t i = part * height; i < end; ++i) {
        // what is decoded behind a row must not meet the next one, which another thread may have written
        decoder.row(row_of(i), 0, columns, last.data());
        std::copy_n(last.data(), columns, out + i * columns);
      }
    });
  });
}

void decode(const Weight& weight, float* out, int threads) {
  decode_rows(weight, weight.own_rows(), [](std::int64_t i) { return i; }, out, threads);
}

void embedding(const Weight& weight, const std::int64_t* ids, std::int64_t count, float* out, int threads) {
  decode_rows(weight, count, [ids](std::int64_t i) { return ids[i]; }, out, threads);
}

void linear(const Weight& weight, const float* x, std::int64_t tokens, const float* bias, float* out,
            bool is_transposed, int threads) {
  const Product product{weight, x, tokens, bias, out, is_transposed};
  with_constant(weight.bits, [&](auto bits) {
    constexpr int k = decltype(bits)::get;
    if (is_transposed)
      transposed<k>(product, threads);
    else if (tokens <= few_tokens && plain(weight))
      from_codes<k>(product, threads);
    else
      from_tiles<k>(product, threads);
  });
}

}  // namespace

const Float32Kernels avx2_kernels = {decode, embedding, linear};

}  // namespace lexibit

#endif
