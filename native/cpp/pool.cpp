#include "pool.hpp"

#include <chrono>

namespace medusa {
namespace {

// Between passes the caller is away for a millisecond or so; waking a sleeping thread would cost a tenth of that.
constexpr auto kLinger = std::chrono::milliseconds(2);

}  // namespace

Pool::Pool(int threads) {
  for (int thread = 1; thread < threads; thread++) workers_.emplace_back([this, thread] { work(thread); });
}

Pool::~Pool() {
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  for (auto& worker : workers_) worker.join();
}

void Pool::start(Job job, void* context) {
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

void Pool::finish() {
  if (workers_.empty()) return;
  const unsigned meeting = meeting_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == threads() - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    meeting_.store(meeting + 1, std::memory_order_release);
  } else {
    await([&] { return meeting_.load(std::memory_order_acquire) != meeting; });
  }
}

void Pool::work(int thread) {
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

}  // namespace medusa
