// The engine's threads: started once, they run one function at a time together, and meet at barriers within it.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace medusa {

class Pool {
 public:
  // The thread that calls `run` is one of the `threads`.
  explicit Pool(int threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int threads() const { return int(workers_.size()) + 1; }

  // Calls function(thread) once on each thread, and returns when all are done. The function must not throw.
  template <typename Function>
  void run(Function&& function) {
    start([](void* context, int thread) { (*static_cast<std::remove_reference_t<Function>*>(context))(thread); },
          const_cast<void*>(static_cast<const void*>(&function)));
  }

  // Waits until every thread is here. Only within `run`.
  void barrier();

 private:
  using Job = void (*)(void*, int);

  void start(Job job, void* context);
  void work(int thread);

  std::vector<std::thread> workers_;
  Job job_ = nullptr;
  void* context_ = nullptr;
  std::atomic<unsigned> round_{0};  // of `run`
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<unsigned> meeting_{0};  // of `barrier`
  std::atomic<bool> stop_{false};
  std::atomic<int> asleep_{0};
  std::mutex mutex_;
  std::condition_variable wake_;
};

// Deals `total` items out to the threads: each has a range of its own, in order, and helps the others when it is done.
class Share {
 public:
  void shape(int threads) { lanes_ = std::vector<Lane>(threads); }
  void reset() {
    for (Lane& lane : lanes_) lane.taken.store(0, std::memory_order_relaxed);
  }

  // The first of up to `most` units of `unit` items for this thread to do next; their number of items is in *count.
  // -1 when nothing is left.
  int take(int thread, int total, int unit, int most, int* count) {
    const int threads = int(lanes_.size()), units = total / unit;
    for (int i = 0; i < threads; i++) {
      const int owner = (thread + i) % threads;
      const int begin = units * owner / threads, size = units * (owner + 1) / threads - begin;
      const int wanted = i == 0 ? most : 1;
      if (lanes_[owner].taken.load(std::memory_order_relaxed) >= size) continue;
      const int at = lanes_[owner].taken.fetch_add(wanted, std::memory_order_relaxed);
      if (at >= size) continue;
      *count = std::min(wanted, size - at) * unit;
      return (begin + at) * unit;
    }
    return -1;
  }

  // Where the range of this thread begins.
  int first(int thread, int total, int unit) const { return total / unit * thread / int(lanes_.size()) * unit; }

 private:
  struct alignas(64) Lane {
    std::atomic<int> taken{0};
  };
  std::vector<Lane> lanes_;
};

}  // namespace medusa
