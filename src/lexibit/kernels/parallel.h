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

// Threads that do phases together.
class Team {
 public:
  // One of the threads. All go through the same phases.
  class Member {
   public:
    explicit Member(Team& team) : team_(team) {}

    // Does one phase after the other, each with all members; none begins before the one in front of it is done.
    void run(const Phase* phases, std::int64_t count);

   private:
    Team& team_;
    int at_ = 0;
    std::int64_t before_ = 0;  // how many parts the phase before has
  };

  // For so many phases at most.
  explicit Team(std::int64_t phases);
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;
  ~Team();

  // Calls body(member) in each of some threads; it may not throw but in a phase. Where memory ends in one it throws
  // std::bad_alloc when all have stopped.
  template <class Body>
  void run(int threads, const Body& body) {
    start(threads, [](const void* body, Member& member) { (*static_cast<const Body*>(body))(member); }, &body);
  }

 private:
  struct State;

  void start(int threads, void (*body)(const void*, Member&), const void* context);

  int threads_ = 1;
  State* state_;
};

// Does phases by some threads.
void run_phases(std::initializer_list<Phase> phases, int threads);

template <class Body>
void parallel_for(std::int64_t count, int threads, Body&& body) {
  run_phases({phase(count, body)}, threads);
}

}  // namespace lexibit
