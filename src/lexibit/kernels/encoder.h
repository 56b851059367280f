// Layers of an encoder like BERT in one go, for AVX-512 with VNNI and VBMI: their products in int8, all else in float32.
#pragma once

#include "avx512vnni.h"

namespace lexibit {
namespace {

using Floats = const float*;

inline __m512 at(Floats x, std::int64_t i, std::int64_t count) {
  return _mm512_maskz_loadu_ps(first_sixteen(count - i), x + i);
}

// LayerNorm(a + b), into out.
void add_norm(Floats a, Floats b, const Norm& norm, std::int64_t count, float* out) {
  __m512 sum = _mm512_setzero_ps();
  for (std::int64_t i = 0; i < count; i += 16) {
    const __m512 value = _mm512_add_ps(at(a, i, count), at(b, i, count));
    sum = _mm512_add_ps(sum, value);
    _mm512_mask_storeu_ps(out + i, first_sixteen(count - i), value);
  }
  const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / static_cast<float>(count));
  __m512 squares = _mm512_setzero_ps();
  for (std::int64_t i = 0; i < count; i += 16) {
    const __m512 off = _mm512_maskz_sub_ps(first_sixteen(count - i), at(out, i, count), mean);
    squares = _mm512_fmadd_ps(off, off, squares);
  }
  const float variance = _mm512_reduce_add_ps(squares) / static_cast<float>(count);
  const __m512 inverse =
      _mm512_div_ps(_mm512_set1_ps(1.0f), _mm512_sqrt_ps(_mm512_set1_ps(variance + norm.epsilon)));
  for (std::int64_t i = 0; i < count; i += 16) {
    const __m512 off = _mm512_mul_ps(_mm512_sub_ps(at(out, i, count), mean), inverse);
    const __m512 value = _mm512_fmadd_ps(off, at(norm.weight, i, count), at(norm.bias, i, count));
    _mm512_mask_storeu_ps(out + i, first_sixteen(count - i), value);
  }
}

void add_norms(Floats a, Floats b, const Norm& norm, std::int64_t tokens, std::int64_t columns, float* out, int threads) {
  parallel_for(tokens, threads, [&](std::int64_t t) {
    add_norm(a + t * columns, b + t * columns, norm, columns, out + t * columns);
  });
}

// Attention of one head over one text. ----------------------------------------------------------------------

struct Head {
  const float* query;  // [tokens, stride], of which `width` numbers are the head's
  const float* key;
  const float* value;
  std::int64_t tokens, stride;
  float scaling;
  const float* mask;       // [tokens or 1, tokens], to be added; or null
  std::int64_t mask_rows;
  float* out;  // [tokens, stride]; may be the queries

  std::int64_t padded() const { return (tokens + 63) / 64 * 64; }
};

// R queries from `row` on; `keys` are [width, padded], the other way round, and scores [R, padded].
template <int W, int R>
void attend_rows(const Head& head, const float* keys, float* scores, std::int64_t row) {
  const std::int64_t padded = head.padded();
  const float* query = head.query + row * head.stride;
  for (std::int64_t j = 0; j < padded; j += 64) {
    __m512 total[R][4];
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) total[r][v] = _mm512_setzero_ps();
    for (std::int64_t c = 0; c < 16 * W; ++c) {
      __m512 key[4];
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) key[v] = _mm512_loadu_ps(keys + c * padded + j + 16 * v);
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        const __m512 one = _mm512_set1_ps(query[r * head.stride + c]);
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) total[r][v] = _mm512_fmadd_ps(one, key[v], total[r][v]);
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) _mm512_storeu_ps(scores + r * padded + j + 16 * v, total[r][v]);
  }
  float inverse[R];
  for (int r = 0; r < R; ++r) {
    float* score = scores + r * padded;
    const float* mask = head.mask ? head.mask + (head.mask_rows > 1 ? row + r : 0) * head.tokens : nullptr;
    __m512 most = _mm512_set1_ps(-__builtin_inff());
    for (std::int64_t j = 0; j < head.tokens; j += 16) {
      const __mmask16 some = first_sixteen(head.tokens - j);
      __m512 value = _mm512_mul_ps(_mm512_loadu_ps(score + j), _mm512_set1_ps(head.scaling));
      if (mask) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(some, mask + j));
      most = _mm512_mask_max_ps(most, some, most, value);
      _mm512_storeu_ps(score + j, value);
    }
    const float highest = _mm512_reduce_max_ps(most);
    const __m512 top = _mm512_set1_ps(highest);
    __m512 sum = _mm512_setzero_ps();
    for (std::int64_t j = 0; j < head.tokens; j += 16) {
      const __m512 below = _mm512_sub_ps(_mm512_loadu_ps(score + j), top);
      // what is masked counts for exactly nothing
      const __mmask16 some = first_sixteen(head.tokens - j) & _mm512_cmp_ps_mask(below, _mm512_set1_ps(-87.0f), _CMP_NLT_UQ);
      const __m512 power = _mm512_maskz_mov_ps(some, exp_below(below));
      sum = _mm512_add_ps(sum, power);
      _mm512_storeu_ps(score + j, power);
    }
    // where everything is masked nothing is looked at, as in PyTorch
    inverse[r] = highest == -__builtin_inff() ? 0.0f : 1.0f / _mm512_reduce_add_ps(sum);
  }
  __m512 total[R][W];
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) total[r][w] = _mm512_setzero_ps();
  for (std::int64_t j = 0; j < head.tokens; ++j) {
    __m512 value[W];
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) value[w] = _mm512_loadu_ps(head.value + j * head.stride + 16 * w);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const __m512 one = _mm512_set1_ps(scores[r * padded + j]);
#pragma GCC unroll 4
      for (int w = 0; w < W; ++w) total[r][w] = _mm512_fmadd_ps(one, value[w], total[r][w]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w)
      _mm512_storeu_ps(head.out + (row + r) * head.stride + 16 * w, _mm512_mul_ps(total[r][w], _mm512_set1_ps(inverse[r])));
}

template <int W>
void attend(const Head& head) {
  const std::int64_t padded = head.padded();
  Buffer<float> keys(16 * W * padded), scores(4 * padded);
  for (std::int64_t j = 0; j < padded; j += 16)
    for (int w = 0; w < W; ++w) {
      __m512i block[16];
      for (int r = 0; r < 16; ++r)
        block[r] = j + r < head.tokens ? _mm512_loadu_si512(head.key + (j + r) * head.stride + 16 * w) : _mm512_setzero_si512();
      transpose(block);
      for (int c = 0; c < 16; ++c) _mm512_storeu_si512(keys.data() + (16 * w + c) * padded + j, block[c]);
    }
  std::int64_t row = 0;
  for (; row + 4 <= head.tokens; row += 4) attend_rows<W, 4>(head, keys.data(), scores.data(), row);
  for (; row < head.tokens; ++row) attend_rows<W, 1>(head, keys.data(), scores.data(), row);
}

// Where a weight's outliers lie, for one token after the other.
struct Beside {
  Outliers outliers;
  std::int64_t *row, *column;

  // A token's product with the outliers alone, which that with the codes is added to; if there are any.
  void begin(Floats x, float* out) const {
    if (!outliers.count) return;
    std::memset(out, 0, sizeof(float) * static_cast<std::size_t>(outliers.rows));
    for (std::int64_t i = 0; i < outliers.count; ++i) out[row[i]] += outliers.values[i] * x[column[i]];
  }
};

// A layer's linear ones, in the order in which they run.
struct Linears {
  const Linear* one[6];
  explicit Linears(const EncoderLayer& layer)
      : one{&layer.query, &layer.key, &layer.value, &layer.output, &layer.up, &layer.down} {}
};

// The arrays that a layer needs beside its input and output, in one piece of memory.
template <class Many>
struct Workspace {
  float *query, *key, *value, *sum, *middle, *between, *scale;
  std::int8_t *numbers, *arranged;
  std::int32_t* sums;
  std::int64_t used = 0;  // bytes

  Workspace(const EncoderLayer& layer, std::int64_t tokens, std::uint8_t* base) : base_(base) {
    const std::int64_t hidden = layer.query.weight.columns, all = layer.query.weight.rows, inner = layer.up.weight.rows;
    const std::int64_t widest = std::max({hidden, all, inner});
    std::int64_t runs = 1;
    for (const Linear* linear : Linears(layer).one) runs = std::max(runs, Rounded::runs_of(linear->weight));
    place(query, tokens * all), place(key, tokens * all), place(value, tokens * all);
    place(sum, tokens * hidden), place(middle, tokens * hidden), place(between, tokens * inner);
    place(scale, tokens), place(sums, tokens * runs), place(numbers, tokens * stride_of(widest));
    place(arranged, Many::arranged_size(widest, tokens));
  }

 private:
  std::uint8_t* base_;

  template <class T>
  void place(T*& array, std::int64_t count) {
    array = reinterpret_cast<T*>(base_ + used);
    used += (static_cast<std::int64_t>(sizeof(T)) * count + 63) / 64 * 64;
  }
};

// Some texts of the same length.
struct Texts {
  std::int64_t count, length;
  const float* mask;  // as Int8Kernels has it
  std::int64_t mask_rows;
  std::int64_t tokens() const { return count * length; }
};

constexpr std::int64_t layer_phases = 14;

// What one member of a team does of a layer; out may be the input.
template <class Many>
void encoder_layer(const EncoderLayer& layer, const Beside (&beside)[6], std::uint8_t* memory, const float* x,
                   const Texts& texts, float* out, Team::Member& member) {
  const std::int64_t tokens = texts.tokens(), hidden = layer.query.weight.columns, inner = layer.up.weight.rows;
  const std::int64_t all = layer.query.weight.rows, width = all / layer.heads;
  const Workspace<Many> space(layer, tokens, memory);
  const Beside &of_query = beside[0], &of_key = beside[1], &of_value = beside[2], &of_output = beside[3],
               &of_up = beside[4], &of_down = beside[5];
  const auto rounded_for = [&](const Linear& linear) {
    return Rounded(linear.weight, space.numbers, space.arranged, space.scale, space.sums);
  };
  const auto product = [&](const Linear& linear, Activation activation, float* to) {
    return rounded_for(linear).with(linear.weight, tokens, linear.bias, activation, to, linear.outliers.count > 0);
  };
  const Product heads[] = {product(layer.query, Activation::none, space.query),
                           product(layer.key, Activation::none, space.key),
                           product(layer.value, Activation::none, space.value)};
  const Product output = product(layer.output, Activation::none, space.sum),
                up = product(layer.up, layer.activation, space.between),
                down = product(layer.down, Activation::none, space.sum);
  const Parts head_parts = parts_of<Many>(heads[0]), output_parts = parts_of<Many>(output), up_parts = parts_of<Many>(up),
              down_parts = parts_of<Many>(down);
  // query, key and value have the same shape, not always the same width of codes
  const Parts key_parts = parts_of<Many>(heads[1]), value_parts = parts_of<Many>(heads[2]);

  const Parts arrange_heads = Many::arrange(heads[0]), arrange_output = Many::arrange(output),
              arrange_up = Many::arrange(up), arrange_down = Many::arrange(down);

  const auto round_input = [&](std::int64_t t) {
    rounded_for(layer.query).round(t, x + t * hidden);
    of_query.begin(x + t * hidden, space.query + t * all);
    of_key.begin(x + t * hidden, space.key + t * all);
    of_value.begin(x + t * hidden, space.value + t * all);
  };
  const auto arrange_input = [&](std::int64_t i) { arrange_heads.part(heads[0], i); };
  const auto project = [&](std::int64_t i) {
    const std::int64_t part = i % head_parts.count;
    switch (i / head_parts.count) {
      case 0: return head_parts.part(heads[0], part);
      case 1: return key_parts.part(heads[1], part);
      default: return value_parts.part(heads[2], part);
    }
  };
  const auto attention = [&](std::int64_t i) {
    const std::int64_t text = i / layer.heads, from = text * texts.length * all + i % layer.heads * width;
    const Head head{space.query + from, space.key + from, space.value + from, texts.length, all, layer.scaling,
                    texts.mask ? texts.mask + text * texts.mask_rows * texts.length : nullptr, texts.mask_rows,
                    space.query + from};
    switch (width / 16) {
      case 1: return attend<1>(head);
      case 2: return attend<2>(head);
      case 3: return attend<3>(head);
      case 4: return attend<4>(head);
    }
  };
  const auto round_context = [&](std::int64_t t) {
    rounded_for(layer.output).round(t, space.query + t * all);
    of_output.begin(space.query + t * all, space.sum + t * hidden);
  };
  const auto arrange_context = [&](std::int64_t i) { arrange_output.part(output, i); };
  const auto combine = [&](std::int64_t i) { output_parts.part(output, i); };
  const auto first_norm = [&](std::int64_t t) {
    float* const middle = space.middle + t * hidden;
    add_norm(space.sum + t * hidden, x + t * hidden, layer.attention_norm, hidden, middle);
    rounded_for(layer.up).round(t, middle);
    of_up.begin(middle, space.between + t * inner);
  };
  const auto arrange_middle = [&](std::int64_t i) { arrange_up.part(up, i); };
  const auto widen = [&](std::int64_t i) { up_parts.part(up, i); };
  const auto round_inner = [&](std::int64_t t) {
    rounded_for(layer.down).round(t, space.between + t * inner);
    of_down.begin(space.between + t * inner, space.sum + t * hidden);
  };
  const auto arrange_inner = [&](std::int64_t i) { arrange_down.part(down, i); };
  const auto narrow = [&](std::int64_t i) { down_parts.part(down, i); };
  const auto last_norm = [&](std::int64_t t) {
    add_norm(space.sum + t * hidden, space.middle + t * hidden, layer.norm, hidden, out + t * hidden);
  };
  const Phase phases[] = {
      phase(tokens, round_input), phase(arrange_heads.count, arrange_input), phase(3 * head_parts.count, project),
      phase(texts.count * layer.heads, attention), phase(tokens, round_context),
      phase(arrange_output.count, arrange_context), phase(output_parts.count, combine), phase(tokens, first_norm),
      phase(arrange_up.count, arrange_middle), phase(up_parts.count, widen), phase(tokens, round_inner),
      phase(arrange_down.count, arrange_inner), phase(down_parts.count, narrow), phase(tokens, last_norm)};
  static_assert(sizeof phases == layer_phases * sizeof *phases);
  member.run(phases, layer_phases);
}

// What a thread's last encoder needed is kept for its next one, unless it is much.
thread_local Buffer<std::uint8_t> workspace;
constexpr std::int64_t kept = 64 << 20;

template <class Many>
bool encoder(const EncoderLayer* layers, std::int64_t count, const float* x, std::int64_t texts, std::int64_t length,
             const float* mask, std::int64_t mask_rows, float* out, int threads) {
  // all that takes memory, or can fail, comes before there are threads
  const Texts given{texts, length, mask, mask_rows};
  std::int64_t most = 0, outliers = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    most = std::max(most, Workspace<Many>(layers[i], given.tokens(), nullptr).used);
    for (const Linear* linear : Linears(layers[i]).one) outliers += linear->outliers.count;
  }
  std::uint8_t* const memory = workspace.reserve(most);
  Buffer<Beside[6]> beside(count);
  Buffer<std::int64_t> where(2 * outliers);
  std::int64_t* next = where.data();
  for (std::int64_t i = 0; i < count; ++i)
    for (int j = 0; j < 6; ++j) {
      const Outliers& some = Linears(layers[i]).one[j]->outliers;
      beside[i][j] = {some, next, next + some.count};
      next += 2 * some.count;
      if (!places(some, beside[i][j].row, beside[i][j].column)) return false;
    }
  Team team(count * layer_phases);
  team.run(threads, [&](Team::Member& member) {
    for (std::int64_t i = 0; i < count; ++i)
      encoder_layer<Many>(layers[i], beside[i], memory, i ? out : x, given, out, member);
  });
  if (most > kept) workspace.release();
  return true;
}

}  // namespace
}  // namespace lexibit
