#include "parallel.h"

#include <dlfcn.h>
#include <sched.h>
#include <unistd.h>

#include <atomic>
#include <memory>
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

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Which part comes in a turn. As long as threads take turns each has parts that lie beside each other: what it asks memory
// for while it does one, it wants for its next.
std::int64_t part_of(std::int64_t turn, std::int64_t count, std::int64_t threads) {
  const std::int64_t thread = turn % threads, each = count / threads, more = count % threads;
  return thread * each + (thread < more ? thread : more) + turn / threads;
}

}  // namespace

struct Team::State {
  struct Progress {
    alignas(64) std::atomic<std::int64_t> next{0};
    alignas(64) std::atomic<std::int64_t> done{0};
  };

  explicit State(std::int64_t phases) : of_phase(new Progress[static_cast<std::size_t>(phases)]) {}

  std::unique_ptr<Progress[]> of_phase;
  std::atomic<bool> out_of_memory{false};
};

Team::Team(std::int64_t phases) : state_(new State(phases)) {}

Team::~Team() { delete state_; }

// No error may leave a thread of the pool.
void Team::Member::run(const Phase* phases, std::int64_t count) {
  State& state = *team_.state_;
  for (std::int64_t i = 0; i < count; ++i) {
    const Phase& phase = phases[i];
    // behind the last phase the pool waits by itself
    if (at_)
      for (int looks = 0; state.of_phase[at_ - 1].done.load(std::memory_order_acquire) < before_; ++looks)
        looks < patience ? pause() : static_cast<void>(sched_yield());
    auto& [next, done] = state.of_phase[at_++];
    before_ = phase.count;
    for (std::int64_t turn; (turn = next.fetch_add(1, std::memory_order_relaxed)) < phase.count;) {
      try {
        if (!state.out_of_memory.load(std::memory_order_relaxed))
          phase.body(phase.context, part_of(turn, phase.count, team_.threads_));
      } catch (const std::bad_alloc&) {
        state.out_of_memory = true;
      }
      done.fetch_add(1, std::memory_order_release);
    }
  }
}

void Team::start(int threads, void (*body)(const void*, Member&), const void* context) {
  struct Call {
    Team& team;
    void (*body)(const void*, Member&);
    const void* context;
    void run() noexcept {
      Member member(team);
      body(context, member);
    }
  } call{*this, body, context};
  threads_ = threads > 1 && parallel_available() ? threads : 1;
  if (threads_ > 1)
    gomp_parallel([](void* call) { static_cast<Call*>(call)->run(); }, &call, static_cast<unsigned>(threads), 0);
  else
    call.run();
  if (state_->out_of_memory) throw std::bad_alloc();
}

bool parallel_available() { return gomp_parallel && getpid() == home; }

void run_phases(std::initializer_list<Phase> phases, int threads) {
  std::int64_t most = 0;
  for (const Phase& one : phases) most = one.count > most ? one.count : most;
  const auto count = static_cast<std::int64_t>(phases.size());
  Team team(count);
  const auto body = [&](Team::Member& member) { member.run(phases.begin(), count); };
  team.run(most > 1 ? threads : 1, body);
}

}  // namespace lexibit
