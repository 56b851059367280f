// Codes for a run of columns, one column after the other, each choice moving what the later ones aim at.
#pragma once

#include <cstdint>

namespace lexibit {

// Levels of groups, ascending, and where one ends and the next begins.
struct Ladders {
  const float* levels;         // [groups, count]
  const float* limits;         // [groups, count - 1]
  const std::uint8_t* names;   // [groups, count], the code of each level
  int count;
};

// target [rows, columns] is what each weight aims at, and is overwritten; coupling [columns, columns]. A weight's group
// is of_row[row] + of_column[column]. Each weight takes the level nearest to its target, and moves the targets of the
// columns behind it, in its row, by -change * coupling. With values [rows, columns], what the weights are now, change is
// from these to the levels; without, it is from the levels to the targets.
void assign(const Ladders& ladders, const std::int32_t* of_row, const std::int32_t* of_column, std::int64_t rows,
            std::int64_t columns, const float* coupling, const float* values, float* target, std::uint8_t* codes,
            float* change, int threads);

}  // namespace lexibit
