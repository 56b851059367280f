#include "parallel.h"

#include <dlfcn.h>
#include <sched.h>
#include <unistd.h>

#include <atomic>
#include <new>

namespace lexibit {
namespace {

using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

// GNU OpenMP if it is in the process already, as torch brings it. Nothing is linked or loaded: a second
// runtime would have a second pool, whose threads spin beside torch's.
Parallel find() {
  void* library = dlopen("libgomp.so.1", RTLD_LAZY | RTLD_NOLOAD);
  return library ? reinterpret_cast<Parallel>(dlsym(library, "GOMP_parallel")) : nullptr;
}

const Parallel gomp_parallel = find();
// A child made by fork has none of the pool's threads, and the pool does not know it.
const pid_t home = getpid();

constexpr int patience = 4096;  // looks at what the others do before the core is offered to them

struct Loop {
  const Phase* phases;
  int count;
  std::atomic<bool> out_of_memory{false};
  struct {
    alignas(64) std::atomic<std::int64_t> next{0};
    alignas(64) std::atomic<std::int64_t> done{0};
  } state[most_phases];

  // No error may leave a thread of the pool.
  void run() noexcept {
    for (int at = 0; at < count; ++at) {
      const Phase& phase = phases[at];
      auto& [next, done] = state[at];
      for (std::int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < phase.count;) {
        try {
          if (!out_of_memory.load(std::memory_order_relaxed)) phase.body(phase.context, i);
        } catch (const std::bad_alloc&) {
          out_of_memory = true;
        }
        done.fetch_add(1, std::memory_order_release);
      }
      // behind the last phase the pool waits by itself
      for (int looks = 0; at + 1 < count && done.load(std::memory_order_acquire) < phase.count; ++looks)
        looks < patience ? pause() : static_cast<void>(sched_yield());
    }
  }

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
};

}  // namespace

bool parallel_available() { return gomp_parallel && getpid() == home; }

void run_phases(std::initializer_list<Phase> phases, int threads) {
  Loop loop;
  loop.phases = phases.begin(), loop.count = static_cast<int>(phases.size());
  std::int64_t most = 0;
  for (const Phase& one : phases) most = one.count > most ? one.count : most;
  if (threads > 1 && most > 1 && parallel_available())
    gomp_parallel([](void* loop) { static_cast<Loop*>(loop)->run(); }, &loop, static_cast<unsigned>(threads), 0);
  else
    loop.run();
  if (loop.out_of_memory) throw std::bad_alloc();
}

}  // namespace lexibit
