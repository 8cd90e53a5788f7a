#include "pool.hpp"

#include <pthread.h>

#include <chrono>
#include <condition_variable>
#include <new>
#include <stdexcept>
#include <string>
#include <system_error>

namespace medusa {
namespace {

// Between passes the caller is away for a millisecond or so; waking a sleeping thread would cost a tenth of that.
constexpr auto kLinger = std::chrono::milliseconds(2);
constexpr int kMostThreads = 4096;

std::atomic<unsigned> fork_count{0};

void count_forks() {
  static const bool counting = pthread_atfork(nullptr, nullptr, [] { fork_count.fetch_add(1); }) == 0;
  if (!counting) throw std::bad_alloc();
}

}  // namespace

unsigned forks() { return fork_count.load(std::memory_order_relaxed); }

void OwnerMutex::lock() {
  std::uint64_t seen = users_.load();
  const std::uint64_t none = std::uint64_t(forks()) << 32;
  for (;;) {
    const bool ours = seen >= none, others = std::uint32_t(seen) != 0;
    if (!ours && others)
      throw std::invalid_argument(
          "the process was forked while another thread was using the engine: load the model anew in the child");
    if (users_.compare_exchange_weak(seen, (ours ? seen : none) + 1)) break;
  }
  mutex_.lock();
}

class Pool::Crew {
 public:
  explicit Crew(int workers) {
    workers_.reserve(workers);
    try {
      for (int thread = 1; thread <= workers; thread++) workers_.emplace_back([this, thread] { work(thread); });
    } catch (const std::system_error&) {
      dismiss();
      throw std::invalid_argument("the system does not start " + std::to_string(workers + 1) + " threads: take fewer");
    }
  }
  ~Crew() { dismiss(); }

  void run(Job job, void* context) {
    job_ = job;
    context_ = context;
    round_.fetch_add(1);
    if (asleep_.load()) {
      std::lock_guard lock(mutex_);
      wake_.notify_all();
    }
    job(context, 0);
    finish();
  }

 private:
  void dismiss() {
    {
      std::lock_guard lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (auto& worker : workers_) worker.join();
  }

  // Waits until every thread is here.
  void finish() {
    if (workers_.empty()) return;
    const unsigned meeting = meeting_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == int(workers_.size())) {
      arrived_.store(0, std::memory_order_relaxed);
      meeting_.store(meeting + 1, std::memory_order_release);
    } else {
      await([&] { return meeting_.load(std::memory_order_acquire) != meeting; });
    }
  }

  void work(int thread) {
    unsigned seen = 0;
    for (;;) {
      const auto tired = std::chrono::steady_clock::now() + kLinger;
      const auto called = [&] { return round_.load() != seen || stop_.load(); };
      await([&] { return called() || std::chrono::steady_clock::now() > tired; });
      if (!called()) {
        std::unique_lock lock(mutex_);
        asleep_.fetch_add(1);
        wake_.wait(lock, called);
        asleep_.fetch_sub(1);
      }
      if (stop_) return;
      seen++;
      job_(context_, thread);
      finish();
    }
  }

  std::vector<std::thread> workers_;
  Job job_ = nullptr;
  void* context_ = nullptr;
  std::atomic<unsigned> round_{0};  // of `run`
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<unsigned> meeting_{0};  // of `finish`
  std::atomic<bool> stop_{false};
  std::atomic<int> asleep_{0};
  std::mutex mutex_;
  std::condition_variable wake_;
};

Pool::Pool(int threads) : threads_(threads) {
  if (threads < 1 || threads > kMostThreads)
    throw std::invalid_argument("threads must be from 1 to " + std::to_string(kMostThreads) + ", not " +
                                std::to_string(threads));
  count_forks();
  born_ = forks();
  crew_ = std::make_unique<Crew>(threads - 1);
}

Pool::~Pool() {
  if (born_ != forks()) (void)crew_.release();
}

void Pool::start(Job job, void* context) {
  if (born_ != forks()) {
    // Left as it is: there is nobody to join, and the fork may have caught its mutex in any state.
    (void)crew_.release();
    crew_ = std::make_unique<Crew>(threads_ - 1);
    born_ = forks();
  }
  crew_->run(job, context);
}

}  // namespace medusa
