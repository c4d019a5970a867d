// Memory that is kept from one call to the next.

#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

#include "simd.h"

namespace dnntk {
namespace {

// Large memory, kept for the next call: the system would hand it out page by page and clear it,
// which takes longer than a layer's work on it. Blocks of sizes that calls no longer ask for are
// freed. All threads share one cache: JAX calls from different threads, each of which would keep
// memory of its own. A thread prefers a block that a thread of the same number gave back, since
// its core may still have the block in cache.
class PageCache {
 public:
  static constexpr size_t kLarge = size_t{1} << 20, kPage = size_t{2} << 20;

  // This thread's number in its team.
  static int64_t& thread_number() {
    thread_local int64_t number = 0;
    return number;
  }

  static void* take(size_t bytes) {
    std::lock_guard<std::mutex> lock(mutex());
    auto [found, end] = free().equal_range(bytes);
    if (found != end) {
      for (auto block = found; block != end; ++block)
        if (block->second.number == thread_number()) found = block;
      void* data = found->second.data;
      free().erase(found);
      return data;
    }
    for (auto& block : free()) std::free(block.second.data);
    free().clear();
    void* data = std::aligned_alloc(kPage, bytes);
#ifdef MADV_HUGEPAGE
    if (data != nullptr) madvise(data, bytes, MADV_HUGEPAGE);
#endif
    return data;
  }

  static void give(void* data, size_t bytes) {
    try {
      std::lock_guard<std::mutex> lock(mutex());
      free().emplace(bytes, Block{data, thread_number()});
    } catch (...) {
      std::free(data);
    }
  }

 private:
  struct Block {
    void* data;
    int64_t number;
  };

  // Never destroyed: a thread may still run when the process ends.
  static std::multimap<size_t, Block>& free() {
    static auto* blocks = new std::multimap<size_t, Block>;
    return *blocks;
  }
  static std::mutex& mutex() {
    static auto* mutex = new std::mutex;
    return *mutex;
  }
};

// Small memory that a thread keeps for its next call: a dozen allocations a call take as long as
// ten layers of a narrow network.
class ThreadCache {
 public:
  static constexpr size_t kMost = size_t{1} << 20;  // bytes kept

  ~ThreadCache() {
    for (auto& [bytes, data] : kept_) std::free(data);
  }

  static void* take(size_t bytes) {
    ThreadCache& own = mine();
    for (size_t k = own.kept_.size(); k-- > 0;)
      if (own.kept_[k].first == bytes) {
        void* data = own.kept_[k].second;
        own.kept_.erase(own.kept_.begin() + k);
        own.bytes_ -= bytes;
        return data;
      }
    return std::aligned_alloc(kLine, bytes);
  }

  static void give(void* data, size_t bytes) {
    if (bytes > kMost) return std::free(data);
    ThreadCache& own = mine();
    while (own.bytes_ + bytes > kMost) {
      std::free(own.kept_.front().second);
      own.bytes_ -= own.kept_.front().first;
      own.kept_.erase(own.kept_.begin());
    }
    try {
      own.kept_.emplace_back(bytes, data);
      own.bytes_ += bytes;
    } catch (const std::bad_alloc&) {
      std::free(data);
    }
  }

 private:
  static ThreadCache& mine() {
    thread_local ThreadCache cache;
    return cache;
  }

  std::vector<std::pair<size_t, void*>> kept_;
  size_t bytes_ = 0;
};

// Memory aligned to a cache line, set to zero unless `zero` is false: then it must be written
// before it is read.
template <class X>
class Buffer {
 public:
  explicit Buffer(size_t size, bool zero = true) {
    size_t bytes = std::max<size_t>(size, 1) * sizeof(X);
    large_ = bytes >= PageCache::kLarge;
    const size_t unit = large_ ? PageCache::kPage : kLine;
    bytes_ = bytes = (bytes + unit - 1) / unit * unit;
    data_ = static_cast<X*>(large_ ? PageCache::take(bytes) : ThreadCache::take(bytes));
    if (data_ == nullptr) throw std::bad_alloc();
    if (zero) std::memset(static_cast<void*>(data_), 0, bytes);
  }
  ~Buffer() {
    if (large_) PageCache::give(data_, bytes_);
    else ThreadCache::give(data_, bytes_);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  X* data() { return data_; }
  const X* data() const { return data_; }
  X& operator[](size_t i) { return data_[i]; }
  const X& operator[](size_t i) const { return data_[i]; }

 private:
  X* data_;
  size_t bytes_;
  bool large_;
};

// An array for each of the last `layers` layers.
template <class X>
class Ring {
 public:
  Ring(int64_t layers, size_t size) : layers_(layers), size_(size), all_(layers * size) {}
  X* operator[](int64_t layer) { return all_.data() + (layer + layers_) % layers_ * size_; }

 private:
  int64_t layers_;
  size_t size_;
  Buffer<X> all_;
};

}  // namespace
}  // namespace dnntk
