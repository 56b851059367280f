// Loops over several threads, those of torch's own OpenMP pool.
#pragma once

#include <cstdint>

namespace lexibit {

// Whether torch's pool was found: without it everything runs in the calling thread.
bool parallel_available();

// Calls body(context, i) once for every i below count, each by one of the threads. Where memory ends for one of
// them it throws std::bad_alloc when all have stopped.
void parallel_for(std::int64_t count, int threads, void (*body)(void*, std::int64_t), void* context);

template <class Body>
void parallel_for(std::int64_t count, int threads, Body&& body) {
  parallel_for(
      count, threads, [](void* context, std::int64_t i) { (*static_cast<Body*>(context))(i); }, &body);
}

}  // namespace lexibit
