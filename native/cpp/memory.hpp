// Large buffers straight from the operating system: zeroed, page by page when first touched, in huge pages where the
// system has them.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <new>
#include <utility>
#include <vector>

namespace medusa {

class Buffer {
 public:
  Buffer() = default;
  // Throws std::bad_alloc. `reserve` only sets addresses aside; memory is taken as it is used.
  explicit Buffer(std::size_t bytes, bool reserve = false) : bytes_(bytes) {
    if (bytes == 0) return;
    int flags = MAP_PRIVATE | MAP_ANONYMOUS;
#ifdef MAP_NORESERVE
    if (reserve) flags |= MAP_NORESERVE;
#endif
    void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    data_ = static_cast<std::byte*>(p);
#ifdef MADV_HUGEPAGE
    madvise(p, bytes, MADV_HUGEPAGE);
#endif
  }
  Buffer(Buffer&& other) noexcept : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~Buffer() {
    if (data_) munmap(data_, bytes_);
  }

  std::byte* data() const { return data_; }
  std::size_t size() const { return bytes_; }
  template <typename T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }

  // Gives memory from byte `from` on back to the system; it reads as zero again.
  void forget(std::size_t from) {
    constexpr std::size_t page = std::size_t(1) << 21;
    from = (from + page - 1) / page * page;
    if (from < bytes_) madvise(data_ + from, bytes_ - from, MADV_DONTNEED);
  }

  // At least `bytes`, contents lost. Only grows.
  void fit(std::size_t bytes) {
    if (bytes > bytes_) *this = Buffer(bytes);
  }

 private:
  std::byte* data_ = nullptr;
  std::size_t bytes_ = 0;
};

// Many pieces of memory in few large buffers. Pieces of a megabyte of their own would get no huge pages, and the
// processor's prefetching stops at the border of each small one: a pass over the weights took half as long again.
class Arena {
 public:
  std::byte* take(std::size_t bytes) {
    bytes = (bytes + 63) / 64 * 64;
    if (bytes > left_) {
      const std::size_t size = bytes > kChunkBytes ? bytes : kChunkBytes;
      chunks_.emplace_back(size + kHugePage, true);
      const auto address = reinterpret_cast<std::uintptr_t>(chunks_.back().data());
      next_ = chunks_.back().data() + (kHugePage - address % kHugePage) % kHugePage;
      left_ = size;
    }
    std::byte* piece = next_;
    next_ += bytes;
    left_ -= bytes;
    return piece;
  }

 private:
  static constexpr std::size_t kHugePage = std::size_t(1) << 21, kChunkBytes = std::size_t(64) << 20;

  std::vector<Buffer> chunks_;
  std::byte* next_ = nullptr;
  std::size_t left_ = 0;
};

}  // namespace medusa
