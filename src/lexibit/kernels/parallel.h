// Loops over several threads, those of torch's own OpenMP pool.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <type_traits>

namespace lexibit {

// Whether torch's pool was found: without it everything runs in the calling thread.
bool parallel_available();

// Work that is cut into parts, which may be done in any order.
struct Phase {
  std::int64_t count;
  void (*body)(void*, std::int64_t);
  void* context;
};

// What calls body(i) once for every i below count.
template <class Body>
Phase phase(std::int64_t count, Body& body) {
  using Plain = std::remove_const_t<Body>;
  return {count, [](void* context, std::int64_t i) { (*static_cast<Plain*>(context))(i); },
          const_cast<Plain*>(&body)};
}

constexpr int most_phases = 16;

// Does one phase after the other, each by all threads; none begins before the one in front of it is done. Where memory
// ends for one of the threads it throws std::bad_alloc when all have stopped.
void run_phases(std::initializer_list<Phase> phases, int threads);

template <class Body>
void parallel_for(std::int64_t count, int threads, Body&& body) {
  run_phases({phase(count, body)}, threads);
}

}  // namespace lexibit
