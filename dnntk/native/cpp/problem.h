// What the CPU library computes, and vectors and memory to do it in.

#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#ifdef __AVX__
#include <immintrin.h>
#endif

namespace {

constexpr int kLine = 64;  // bytes of a cache line

// A vector fills a register, and no more: a longer one GCC takes to memory and back, a few bytes at a
// time, for every operation.
#if defined(__AVX512F__)
constexpr int kBytes = 64, kRegisters = 32;
#elif defined(__AVX__)
constexpr int kBytes = 32, kRegisters = 16;
#elif defined(__aarch64__)
constexpr int kBytes = 16, kRegisters = 32;
#else
constexpr int kBytes = 16, kRegisters = 16;
#endif
constexpr int kInLine = kLine / kBytes;  // vectors in a cache line

template <class T>
struct Simd;
template <>
struct Simd<float> {
  typedef float Vector __attribute__((vector_size(kBytes)));
  typedef float Part __attribute__((vector_size(16)));
};
template <>
struct Simd<double> {
  typedef double Vector __attribute__((vector_size(kBytes)));
  typedef double Part __attribute__((vector_size(16)));
};

template <class T>
using Vec = typename Simd<T>::Vector;
template <class T>
constexpr int kLanes = kBytes / sizeof(T);

// Keep a vector in a register: a compiler may otherwise load it anew for every product it is in.
template <class V>
inline void hold(V& v) {
#if defined(__AVX512F__)
  __asm__("" : "+v"(v));
#elif defined(__SSE2__)
  __asm__("" : "+x"(v));
#elif defined(__aarch64__)
  __asm__("" : "+w"(v));
#endif
}

// Where a pointer leads is not to be told from where it led before: GCC otherwise keeps what it expects
// to read once more, and pushes the rest out of the registers.
template <class T>
inline void forget(T*& pointer) {
#ifdef __GNUC__
  __asm__("" : "+r"(pointer));
#endif
}

template <class T>
inline T sum(const Vec<T>& v) {
  constexpr int parts = kBytes / 16, lanes = kLanes<T> / parts;
  typename Simd<T>::Part part[parts];
  std::memcpy(part, &v, sizeof v);
#pragma GCC unroll 2
  for (int n = parts / 2; n > 0; n /= 2)
#pragma GCC unroll 2
    for (int i = 0; i < n; ++i) part[i] += part[i + n];
  T total = 0;
  for (int i = 0; i < lanes; ++i) total += part[0][i];
  return total;
}

#if defined(__AVX__) && !defined(__AVX512F__)
// All ones for the first `count` lanes.
template <class T>
inline __m256i first_lanes(int64_t count) {
  alignas(kLine) static const int32_t ones[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
  const auto* start = ones + 8 - count * int64_t(sizeof(T) / 4);
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(start));
}
#endif

// `count` numbers, and zeros; a copy of less than a vector by way of memory would be waited for.
template <class T>
inline Vec<T> copied(const T* from, int64_t count) {
  Vec<T> v = {};
  if (count == kLanes<T>) {
    std::memcpy(&v, from, kBytes);
    return v;
  }
#ifdef __AVX512F__
  const uint32_t mask = (uint32_t{1} << count) - 1;
  if constexpr (sizeof(T) == 4) return reinterpret_cast<Vec<T>>(_mm512_maskz_loadu_ps(mask, from));
  else return reinterpret_cast<Vec<T>>(_mm512_maskz_loadu_pd(mask, from));
#elif defined(__AVX__)
  const __m256i mask = first_lanes<T>(count);
  if constexpr (sizeof(T) == 4) return reinterpret_cast<Vec<T>>(_mm256_maskload_ps(from, mask));
  else return reinterpret_cast<Vec<T>>(_mm256_maskload_pd(from, mask));
#else
  std::memcpy(&v, from, count * sizeof(T));
  return v;
#endif
}

// The first `count` numbers of a vector, to memory.
template <class T>
inline void put(const Vec<T>& v, int64_t count, T* to) {
  if (count == kLanes<T>) {
    std::memcpy(to, &v, kBytes);
    return;
  }
#ifdef __AVX512F__
  const uint32_t mask = (uint32_t{1} << count) - 1;
  if constexpr (sizeof(T) == 4) _mm512_mask_storeu_ps(to, mask, reinterpret_cast<__m512>(v));
  else _mm512_mask_storeu_pd(to, mask, reinterpret_cast<__m512d>(v));
#elif defined(__AVX__)
  const __m256i mask = first_lanes<T>(count);
  if constexpr (sizeof(T) == 4) _mm256_maskstore_ps(to, mask, reinterpret_cast<__m256>(v));
  else _mm256_maskstore_pd(to, mask, reinterpret_cast<__m256d>(v));
#else
  std::memcpy(to, &v, count * sizeof(T));
#endif
}

// Large memory that is kept from one call to the next: what the system hands out page by page, and
// clears, costs more than a layer of work in it. Only what the last calls used stays. All threads
// share it: JAX calls now from one of them, now from another, and each would keep its own. But a
// thread gets what one of its own number in a team had, if there is such: the cache may still hold it.
class Pool {
 public:
  static constexpr size_t kLarge = size_t{1} << 20, kPage = size_t{2} << 20;

  // This thread's number in the team that it works in.
  static int64_t& number() {
    thread_local int64_t one = 0;
    return one;
  }

  static void* take(size_t bytes) {
    std::lock_guard<std::mutex> lock(mutex());
    auto [found, end] = free().equal_range(bytes);
    if (found != end) {
      for (auto block = found; block != end; ++block)
        if (block->second.number == number()) found = block;
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
      free().emplace(bytes, Block{data, number()});
    } catch (...) {
      std::free(data);
    }
  }

 private:
  struct Block {
    void* data;
    int64_t number;
  };

  // Never destroyed: a thread may still be at work when the process ends.
  static std::multimap<size_t, Block>& free() {
    static auto* blocks = new std::multimap<size_t, Block>;
    return *blocks;
  }
  static std::mutex& mutex() {
    static auto* one = new std::mutex;
    return *one;
  }
};

// Small memory that a thread keeps for its next call, in which it needs the same once more: to ask
// for it anew, a dozen times a call, takes as long as ten layers of a narrow network.
class Shelf {
 public:
  static constexpr size_t kMost = size_t{1} << 20;  // bytes kept

  ~Shelf() {
    for (auto& [bytes, data] : kept_) std::free(data);
  }

  static void* take(size_t bytes) {
    Shelf& own = mine();
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
    Shelf& own = mine();
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
  static Shelf& mine() {
    thread_local Shelf one;
    return one;
  }

  std::vector<std::pair<size_t, void*>> kept_;
  size_t bytes_ = 0;
};

// Memory aligned to a cache line, set to zero unless it is to be written before it is read.
template <class X>
class Buffer {
 public:
  explicit Buffer(size_t size, bool zero = true) {
    size_t bytes = std::max<size_t>(size, 1) * sizeof(X);
    large_ = bytes >= Pool::kLarge;
    const size_t unit = large_ ? Pool::kPage : kLine;
    bytes_ = bytes = (bytes + unit - 1) / unit * unit;
    data_ = static_cast<X*>(large_ ? Pool::take(bytes) : Shelf::take(bytes));
    if (data_ == nullptr) throw std::bad_alloc();
    if (zero) std::memset(static_cast<void*>(data_), 0, bytes);
  }
  ~Buffer() {
    if (large_) Pool::give(data_, bytes_);
    else Shelf::give(data_, bytes_);
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

// An array a layer, of the last so many layers gone through.
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

// Where the initial values of the weights come from, beside the trained D.
enum Initial { kNone = 0, kMatrices = 1, kFeatures = 2 };

// What a call is about, as JAX hands it over.
template <class T>
struct Problem {
  int64_t layers, channels, inputs, rows, columns, examples, outputs;
  int side, initial, threads;
  int64_t blocks, segment;  // into which examples and layers are split
  int64_t wide, kept;       // through `wide.h`? how many last layers keep their states there?
  const T *kernel, *bias;                        // [layers, side, side, in, out], [layers, out]
  const T *initial_kernel, *initial_bias;        // as above, or features, or nothing
  const T *slope, *bias_slope, *column, *carry;  // [channels]
  const T *base, *floor, *h0;                    // [channels, positions, examples]

  int reach() const { return side / 2; }
  bool dense() const { return side == 1 && rows == 1 && columns == 1; }
  int64_t positions() const { return rows * (columns + reach()); }
  int64_t weights() const { return int64_t{side} * side * channels * channels; }
  // Examples in vectors.
  int64_t vectors() const { return (examples + kLanes<T> - 1) / kLanes<T>; }
};

// A step of gradient descent: parameters become keep * parameters - rate * gradient. One of several
// devices keeps the parameters, and all add up what they have made.
template <class T>
struct Rates {
  T rate, keep;
};

// How `size` splits into parts of at most `most`, as even as can be: where part `k` begins.
inline int64_t parts(int64_t size, int64_t most) { return (size + most - 1) / most; }
inline int64_t part(int64_t size, int64_t count, int64_t k) { return size * k / count; }

// Outputs are f = head h + offset, and the derivatives that go down are f * factor + shift: the
// loss's, or any that are given. A block goes up and down before the next one begins.
template <class T>
struct Head {
  const T *head, *offset, *factor, *shift;  // [k, channels, positions], [n, k], [n], [n, k]
};

}  // namespace
