// Products in int8, for AVX-512 with VNNI and VBMI.
#if defined(__x86_64__)
#include "avx512vnni.h"

namespace lexibit {
namespace {

void linear(const Weight& weight, const float* x, std::int64_t tokens, const float* bias, Activation activation,
            float* out, int threads) {
  const std::int64_t runs = Rounded::runs_of(weight);
  Buffer<std::int8_t> numbers(tokens * stride_of(weight.columns));
  Buffer<float> scale(tokens);
  Buffer<std::int32_t> sum(tokens * runs);
  const Rounded rounded(weight, numbers.data(), scale.data(), sum.data());
  const Product product = rounded.with(weight, tokens, bias, activation, out);
  const Parts parts = parts_of(product);
  const auto round = [&](std::int64_t token) { rounded.round(token, x + token * weight.columns); };
  const auto multiply = [&](std::int64_t part) { parts.part(product, part); };
  run_phases({phase(tokens, round), phase(parts.count, multiply)}, threads);
}

}  // namespace

const Int8Kernels avx512vnni_kernels = {linear, avx512vnni_encoder_layer};

}  // namespace lexibit

#endif
