#include "assign.h"

#include <algorithm>

#include "parallel.h"

namespace lexibit {

namespace {

constexpr std::int64_t rows_together = 16;  // that one thread works on before it asks for more
constexpr int searched = 32;                // levels from which halving is faster than looking at all

// How many limits a number is above.
int above(const float* limits, int count, float number) {
  if (count < searched) {
    int found = 0;
    for (int i = 0; i < count; ++i) found += number > limits[i];
    return found;
  }
  return static_cast<int>(std::lower_bound(limits, limits + count, number) - limits);
}

}  // namespace

void assign(const Ladders& ladders, const std::int32_t* of_row, const std::int32_t* of_column, std::int64_t rows,
            std::int64_t columns, const float* coupling, const float* values, float* target, std::uint8_t* codes,
            float* change, int threads) {
  const std::int64_t count = ladders.count;
  const auto one_row = [&](std::int64_t row) {
    float* aims = target + row * columns;
    for (std::int64_t i = 0; i < columns; ++i) {
      const std::int64_t group = of_row[row] + of_column[i], at = row * columns + i;
      const int step = above(ladders.limits + group * (count - 1), ladders.count - 1, aims[i]);
      const float level = ladders.levels[group * count + step];
      codes[at] = ladders.names[group * count + step];
      const float moved = values ? level - values[at] : aims[i] - level;
      change[at] = moved;
      const float* pull = coupling + i * columns;
      for (std::int64_t j = i + 1; j < columns; ++j) aims[j] -= moved * pull[j];
    }
  };
  const std::int64_t parts = (rows + rows_together - 1) / rows_together;
  parallel_for(parts, threads, [&](std::int64_t part) {
    const std::int64_t end = std::min(rows, (part + 1) * rows_together);
    for (std::int64_t row = part * rows_together; row < end; ++row) one_row(row);
  });
}

}  // namespace lexibit
