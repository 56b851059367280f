// What a few weights have beside what their codes say.
#pragma once

#include <cstdint>

namespace lexibit {

struct Outliers {
  const float* values;
  const std::uint16_t* gaps;  // how many weights lie in front of each, behind the one before it
  std::int64_t count;
  std::int64_t rows, columns;  // of the weight
};

// Where each lies; false if they do not all lie in the weight.
bool places(const Outliers& outliers, std::int64_t* row, std::int64_t* column);

// Adds to out [tokens, rows] what x [tokens, columns] gives with them; transposed, rows and columns change places.
// False if they do not all lie in the weight: then nothing was added. Each number of out gets its sums in the outliers'
// order, whatever the number of threads.
bool add_outliers(const Outliers& outliers, const float* x, std::int64_t tokens, float* out, bool transposed, int threads);

}  // namespace lexibit
