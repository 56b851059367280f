// What all instruction sets share: where a row's codes stand, what a group's levels are, what corrects a row.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

#include "weight.h"

// Nothing here has a name that other files see, and of the standard library only what is compiled in place: of a
// function that several files have the linker would keep one, for whatever instructions.
namespace lexibit {
namespace {

template <int value>
struct Constant {
  static constexpr int get = value;
};

// Calls use with a number as a constant if it is one from 1 to `most`; those of bits go to 8.
template <int most = 8, class Use>
void with_constant(int number, Use&& use) {
  if constexpr (most > 0) {
    if (number == most) return use(Constant<most>());
    with_constant<most - 1>(number, use);
  }
}

// Memory of one thread, which begins where a vector may, kept from use to use. What it holds is lost when it grows.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(std::int64_t size) { reserve(size); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }

  T* reserve(std::int64_t size) {
    if (size > size_) {
      std::free(data_);
      const std::size_t bytes = sizeof(T) * static_cast<std::size_t>(size);
      data_ = static_cast<T*>(std::aligned_alloc(vector, (bytes + vector - 1) / vector * vector));
      size_ = data_ ? size : 0;
      if (!data_) throw std::bad_alloc();
    }
    return data_;
  }

  void release() { std::free(data_), data_ = nullptr, size_ = 0; }

  T* data() { return data_; }
  T& operator[](std::int64_t i) { return data_[i]; }
  const T& operator[](std::int64_t i) const { return data_[i]; }

 private:
  static constexpr std::size_t vector = 64;  // bytes: a load that crosses the lines of a cache is two
  T* data_ = nullptr;
  std::int64_t size_ = 0;
};

// How many steps there are from a group's least level to its greatest when they become bytes: 255, or somewhat fewer, so
// that an even grid of all levels lies on whole ones.
template <int bits>
constexpr float level_steps = 255 / ((1 << bits) - 1) * ((1 << bits) - 1);

constexpr std::int64_t lanes = 8;  // codes that are decoded at once; they take `bits` whole bytes

// The levels of a group as a table, repeated until it has as many entries as there are lanes.
class Table {
 public:
  explicit Table(const Weight& weight) : weight_(weight) {}

  // Whether a table stays where it is when the next one is asked for.
  bool lasts() const { return weight_.form == Form::table && weight_.bits >= 3; }

  const float* of(std::int64_t group) {
    if (lasts()) return weight_.levels + (group << weight_.bits);
    if (group != group_) expand(group_ = group);
    return levels_;
  }

 private:
  // The same operations in the same order as LevelForm.expand: the same bits.
  void expand(std::int64_t group) {
    const int size = 1 << weight_.bits, half = size / 2;
    const float* level = weight_.levels;
    switch (weight_.form) {
      case Form::table:
        std::memcpy(levels_, level + group * size, sizeof(float) * size);
        break;
      case Form::symmetric:
        for (int code = 0; code < size; ++code) levels_[code] = level[group] * static_cast<float>(code - half);
        break;
      case Form::affine:
        for (int code = 0; code < size; ++code) {
          const float step = level[2 * group] * static_cast<float>(code - half);
          levels_[code] = step + level[2 * group + 1];
        }
        break;
      case Form::uniform:
        for (int code = 0; code < size; ++code)
          levels_[code] = level[2 * group] * (static_cast<float>(code) + level[2 * group + 1]);
        break;
      case Form::binary:
        level += group * weight_.bits;
        levels_[0] = -level[0], levels_[1] = level[0];
        for (int plane = 1; plane < weight_.bits; ++plane)
          for (int code = 0; code < 1 << plane; ++code) {
            levels_[code + (1 << plane)] = levels_[code] + level[plane];
            levels_[code] = levels_[code] - level[plane];
          }
        break;
    }
    for (int code = size; code < lanes; ++code) levels_[code] = levels_[code - size];
  }

  const Weight& weight_;
  std::int64_t group_ = -1;
  alignas(32) float levels_[256];
};

// Where codes stand: a byte, and the bit in it.
struct Place {
  const std::uint8_t* byte;
  int shift;
};

// Codes that may be read eight bytes at a time, the last of them too.
class Codes {
 public:
  explicit Codes(const Weight& weight) : weight_(weight) {}

  Place of(std::int64_t row, std::int64_t column, std::int64_t count) {
    const std::int64_t bit = (row * weight_.columns + column) * weight_.bits;
    const std::int64_t first = bit / 8, end = (bit + count * weight_.bits + 7) / 8;
    const int shift = static_cast<int>(bit % 8);
    if (end + slack <= weight_.code_bytes) return {weight_.codes + first, shift};
    std::uint8_t* copy = copy_.reserve(end - first + slack);
    std::copy_n(weight_.codes + first, end - first, copy);
    std::memset(copy + (end - first), 0, slack);
    return {copy, shift};
  }

 private:
  // the codes of the last lanes, and what is read behind them
  static constexpr std::int64_t slack = 2 * lanes;
  const Weight& weight_;
  Buffer<std::uint8_t> copy_;
};

// Which extra rows are added to a row, by the rows' numbers.
class ExtraRows {
 public:
  explicit ExtraRows(const Weight& weight) : count_(weight.extra_rows), own_(weight.own_rows()) {
    if (!count_) return;
    // first_[row] is where a row's extra ones begin in row_; counted one place late, it says at last where they end
    first_.reserve(own_ + 2);
    row_.reserve(count_);
    std::fill_n(first_.data(), own_ + 2, std::int64_t{0});
    for (std::int64_t i = 0; i < count_; ++i) ++first_[weight.origins[i] + 2];
    for (std::int64_t row = 2; row < own_ + 2; ++row) first_[row] += first_[row - 1];
    for (std::int64_t i = 0; i < count_; ++i) row_[first_[weight.origins[i] + 1]++] = own_ + i;
  }

  template <class Use>
  void of(std::int64_t row, Use&& use) const {
    if (!count_) return;
    for (std::int64_t i = first_[row]; i < first_[row + 1]; ++i) use(row_[i]);
  }

 private:
  std::int64_t count_, own_;
  Buffer<std::int64_t> first_, row_;
};

// How wide a run of columns is that is multiplied in int8 in one go, with the same levels: sums of fewer than 65,536
// products of a byte with a byte fit 31 bits.
inline std::int64_t columns_at_once(const Weight& weight) {
  return std::min({weight.columns, weight.block_columns, std::int64_t{1} << 16});
}

// Sets to zero what a mask says, in the columns from `begin` to `end` of a row.
inline void apply_mask(const Weight& weight, std::int64_t row, std::int64_t begin, std::int64_t end, float* out) {
  for (std::int64_t column = begin; column < end; ++column) {
    const std::int64_t bit = row * weight.own_columns() + column;
    if (weight.mask[bit / 8] >> (bit % 8) & 1) out[column - begin] = 0.0f;
  }
}

}  // namespace
}  // namespace lexibit
