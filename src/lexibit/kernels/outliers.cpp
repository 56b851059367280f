#include "outliers.h"

#include <vector>

#include "parallel.h"

namespace lexibit {

bool add_outliers(const Outliers& outliers, const float* x, std::int64_t tokens, float* out, bool transposed, int threads) {
  struct Entry {
    std::int64_t from, to;
    float value;
  };
  std::vector<Entry> entries(static_cast<std::size_t>(outliers.count));
  std::int64_t place = -1;
  for (std::int64_t i = 0; i < outliers.count; ++i) {
    place += outliers.gaps[i] + 1;
    if (place >= outliers.rows * outliers.columns) return false;
    const std::int64_t row = place / outliers.columns, column = place % outliers.columns;
    entries[static_cast<std::size_t>(i)] = {transposed ? row : column, transposed ? column : row, outliers.values[i]};
  }
  const std::int64_t in = transposed ? outliers.rows : outliers.columns, width = transposed ? outliers.columns : outliers.rows;
  parallel_for(tokens, threads, [&](std::int64_t token) {
    const float* given = x + token * in;
    float* sums = out + token * width;
    for (const Entry& one : entries) sums[one.to] += one.value * given[one.from];
  });
  return true;
}

}  // namespace lexibit
