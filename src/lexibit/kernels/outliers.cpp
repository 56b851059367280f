#include "outliers.h"

#include <vector>

#include "parallel.h"

namespace lexibit {

bool places(const Outliers& outliers, std::int64_t* row, std::int64_t* column) {
  std::int64_t place = -1;
  for (std::int64_t i = 0; i < outliers.count; ++i) {
    place += outliers.gaps[i] + 1;
    if (place >= outliers.rows * outliers.columns) return false;
    row[i] = place / outliers.columns, column[i] = place % outliers.columns;
  }
  return true;
}

bool add_outliers(const Outliers& outliers, const float* x, std::int64_t tokens, float* out, bool transposed, int threads) {
  const auto count = static_cast<std::size_t>(outliers.count);
  std::vector<std::int64_t> row(count), column(count);
  if (!places(outliers, row.data(), column.data())) return false;
  const std::vector<std::int64_t>&from = transposed ? row : column, &to = transposed ? column : row;
  const std::int64_t in = transposed ? outliers.rows : outliers.columns, width = transposed ? outliers.columns : outliers.rows;
  parallel_for(tokens, threads, [&](std::int64_t token) {
    const float* given = x + token * in;
    float* sums = out + token * width;
    for (std::size_t i = 0; i < count; ++i) sums[to[i]] += outliers.values[i] * given[from[i]];
  });
  return true;
}

}  // namespace lexibit
