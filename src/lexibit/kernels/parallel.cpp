#include "parallel.h"

#include <dlfcn.h>
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

struct Loop {
  std::atomic<std::int64_t> next{0};
  std::atomic<bool> out_of_memory{false};
  std::int64_t count;
  void (*body)(void*, std::int64_t);
  void* context;

  // No error may leave a thread of the pool.
  void run() noexcept {
    try {
      for (std::int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) body(context, i);
    } catch (const std::bad_alloc&) {
      out_of_memory = true;
      next = count;
    }
  }
};

}  // namespace

bool parallel_available() { return gomp_parallel && getpid() == home; }

void parallel_for(std::int64_t count, int threads, void (*body)(void*, std::int64_t), void* context) {
  Loop loop;
  loop.count = count, loop.body = body, loop.context = context;
  if (threads > 1 && count > 1 && parallel_available())
    gomp_parallel([](void* loop) { static_cast<Loop*>(loop)->run(); }, &loop, static_cast<unsigned>(threads), 0);
  else
    loop.run();
  if (loop.out_of_memory) throw std::bad_alloc();
}

}  // namespace lexibit
