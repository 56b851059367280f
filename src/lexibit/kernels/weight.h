// A weight in codes, as the kernels see it: docs/format.md has the stored form.
#pragma once

#include <cstdint>

#include "outliers.h"

namespace lexibit {

// As lexibit.levels.LevelForm names them.
enum class Form : int { table, symmetric, affine, uniform, binary };

struct Weight {
  const std::uint8_t* codes;  // one stream of bits, least significant first
  std::int64_t code_bytes;
  const float* levels;  // [groups, width of the form]
  Form form;
  int bits;
  std::int64_t rows, columns;              // of the stored matrix, extra ones included
  std::int64_t block_rows, block_columns;  // of a group
  std::int64_t runs;                       // of columns: groups beside each other
  const std::int32_t* origins;             // of extra rows or columns; one of the two counts is zero
  std::int64_t extra_rows, extra_columns;
  const std::uint8_t* mask;  // bits of the own matrix, 1 for a weight that is zero; or null

  std::int64_t own_rows() const { return rows - extra_rows; }
  std::int64_t own_columns() const { return columns - extra_columns; }
  std::int64_t group(std::int64_t row, std::int64_t run) const { return row / block_rows * runs + run; }
};

// What one instruction set can do in float32. Rows and columns are the weight's own; all is row after row.
struct Float32Kernels {
  // The weight.
  void (*decode)(const Weight&, float* out, int threads);
  // Some rows of it.
  void (*embedding)(const Weight&, const std::int64_t* ids, std::int64_t count, float* out, int threads);
  // x @ W.T + bias, or x @ W + bias if transposed; bias may be null.
  void (*linear)(const Weight&, const float* x, std::int64_t tokens, const float* bias, float* out,
                 bool transposed, int threads);
};

// What follows a product.
enum class Activation : int { none, gelu, gelu_tanh };

struct Linear {
  Weight weight;
  const float* bias;  // or null
  Outliers outliers;  // their count may be 0
};

struct Norm {
  const float* weight;
  const float* bias;
  float epsilon;
};

// A layer of an encoder that norms after it adds: BERT's, RoBERTa's, DistilBERT's, ALBERT's.
struct EncoderLayer {
  Linear query, key, value, output, up, down;
  Norm attention_norm, norm;
  std::int64_t heads;  // each 16, 32, 48 or 64 wide
  float scaling;       // of the scores
  Activation activation;
};

// activation(x @ W.T + bias) with tokens and levels rounded; bias may be null, x and out are float32.
using RoundedLinear = void (*)(const Weight&, const float* x, std::int64_t tokens, const float* bias, Activation,
                               float* out, int threads);

// What one instruction set can do with tokens and levels rounded to bfloat16, of weights as below.
struct BFloat16Kernels {
  RoundedLinear linear;
};

// What one instruction set can do with tokens and levels rounded to 8 bits, of weights that are what their codes say
// and no more: without extra rows or columns and without a mask, their runs of columns multiples of 64 or whole rows.
struct Int8Kernels {
  RoundedLinear linear;
  // Some layers, one behind the other. x and out are [texts, length, columns]; the mask is [texts, mask_rows, length],
  // added to the scores, or null. False if outliers do not lie in their weights: then nothing was done. May be null.
  bool (*encoder)(const EncoderLayer* layers, std::int64_t count, const float* x, std::int64_t texts, std::int64_t length,
                  const float* mask, std::int64_t mask_rows, float* out, int threads);
  // LayerNorm of a sum, both [tokens, columns]; out may be a part of the sum. May be null.
  void (*add_norm)(const float* a, const float* b, const Norm&, std::int64_t tokens, std::int64_t columns, float* out,
                   int threads);
};

extern const Float32Kernels avx2_kernels;
extern const Int8Kernels avx2_int8_kernels;
extern const Int8Kernels avx512vnni_kernels;
extern const BFloat16Kernels avx512bf16_kernels;
extern const Int8Kernels amx_kernels;
extern const BFloat16Kernels amx_bf16_kernels;

}  // namespace lexibit
