// The engine's threads: started once (and once in each forked child), they run one function at a time together. Within it, work is divided by phases:
// a phase is over when its work is done, whoever did it, so nobody waits for a thread that the system has put aside.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

namespace medusa {

// Waits while `done()` is false: busily at first, as what is awaited within a pass comes after microseconds; then it
// leaves the core to whoever wants it.
template <typename Done>
void await(Done done) {
  for (;;) {
    for (int i = 0; i < 2000; i++) {
      if (done()) return;
#if defined(__x86_64__)
      __builtin_ia32_pause();
#elif defined(__aarch64__)
      asm volatile("yield");
#endif
    }
    std::this_thread::yield();
  }
}

// How often this process and those it comes from have forked. The threads of a parent are not in its child, and what
// they held stays held there.
unsigned forks();

// A mutex of one owner at a time, like std::mutex. In the child of a process that forked while a thread held it or waited
// for it, `lock` throws std::invalid_argument: that thread is not there to go on, and what it changed is half changed.
class OwnerMutex {
 public:
  void lock();
  void unlock() {
    mutex_.unlock();
    users_.fetch_sub(1);
  }

 private:
  std::mutex mutex_;
  std::atomic<std::uint64_t> users_{0};  // forks() << 32 | threads that hold it or wait for it
};

class Pool {
 public:
  // The thread that calls `run` is one of the `threads`. Throws std::invalid_argument where the system gives no more.
  explicit Pool(int threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int threads() const { return threads_; }

  // Calls function(thread) once on each thread, and returns when all are done. The function must not throw. In the child
  // of a fork the threads are started anew, which throws as the constructor does.
  template <typename Function>
  void run(Function&& function) {
    start([](void* context, int thread) { (*static_cast<std::remove_reference_t<Function>*>(context))(thread); },
          const_cast<void*>(static_cast<const void*>(&function)));
  }

 private:
  using Job = void (*)(void*, int);
  class Crew;  // the threads, and all by which they understand each other

  void start(Job job, void* context);

  const int threads_;
  unsigned born_;  // forks() when the crew was
  std::unique_ptr<Crew> crew_;
};

// A piece of work of `total` items. Each thread has a range of its own, goes through it in order, and helps the others
// when it is done.
class Phase {
 public:
  void shape(int threads) { lanes_ = std::vector<Lane>(threads); }
  void reset() {
    for (Lane& lane : lanes_) lane.taken.store(0, std::memory_order_relaxed);
    done_.store(0, std::memory_order_relaxed);
  }

  // Calls work(first, count) for some of the items, up to `most` units of `unit` items at a time, and returns when all
  // items are done. Each thread of a run calls it with the same numbers; `total` is a multiple of `unit`.
  template <typename Work>
  void run(int thread, int total, int unit, int most, Work work) {
    int count;
    for (int first; (first = take(thread, total / unit, unit, most, &count)) >= 0;) {
      work(first, count);
      done_.fetch_add(count, std::memory_order_acq_rel);
    }
    await([&] { return done_.load(std::memory_order_acquire) >= total; });
  }

  // Where the range of this thread begins.
  int first(int thread, int total, int unit) const { return begin(thread, total / unit) * unit; }

 private:
  struct alignas(64) Lane {
    std::atomic<int> taken{0};
  };

  int begin(int thread, int units) const { return int(std::int64_t(units) * thread / int(lanes_.size())); }

  int take(int thread, int units, int unit, int most, int* count) {
    const int threads = int(lanes_.size());
    for (int i = 0; i < threads; i++) {
      const int owner = (thread + i) % threads, size = begin(owner + 1, units) - begin(owner, units);
      const int wanted = i == 0 ? most : 1;
      if (lanes_[owner].taken.load(std::memory_order_relaxed) >= size) continue;
      const int at = lanes_[owner].taken.fetch_add(wanted, std::memory_order_relaxed);
      if (at >= size) continue;
      *count = std::min(wanted, size - at) * unit;
      return (begin(owner, units) + at) * unit;
    }
    return -1;
  }

  std::vector<Lane> lanes_;
  alignas(64) std::atomic<int> done_{0};
};

}  // namespace medusa
