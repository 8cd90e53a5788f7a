// The engine's threads: started once, they run one function at a time together, and meet at barriers within it.
#pragma once

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

// Hands out ranges of `total` items to whichever thread asks next, in smaller pieces towards the end.
struct alignas(64) Share {
  std::atomic<int> next{0};

  // The start of a piece of 1 to `most` units of `unit` items; its size is in *count. -1 when nothing is left.
  int take(int total, int unit, int most, int threads, int* count) {
    int at = next.load(std::memory_order_relaxed);
    for (;;) {
      int left = (total - at) / unit;
      if (left <= 0) return -1;
      int size = left / (2 * threads);
      size = (size < 1 ? 1 : size > most ? most : size) * unit;
      if (next.compare_exchange_weak(at, at + size, std::memory_order_relaxed)) {
        *count = size;
        return at;
      }
    }
  }
};

}  // namespace medusa
