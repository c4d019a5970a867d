// States of a wide network, kept on the way up for the way down: in few bytes, but to the last bit.
//
// A state hardly changes from layer to layer, nor does its change: some 20 of a number's 32 bits
// follow from the two states above it. What is kept is the difference of the bit patterns of a
// number and of its prediction, in whole quarters of a number for every vector.

#pragma once

#include "memory.h"
#include "problem.h"
#include "simd.h"

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace dnntk {
namespace {

// Vectors as differences from a prediction by two others.
//
// A vector's differences are sorted by weight: the lowest quarters of all lanes first. Only
// quarters up to the highest that is not zero are kept; the number of quarters of each vector, a
// byte, comes before all of them.
template <class T>
class Differences {
 public:
  using V = Vec<T>;

  // The most bytes that `size` vectors take.
  static size_t most(int64_t size) { return counts(size) + size * sizeof(V) + kLine; }

  // Packs the state `low`, predicted from the two above it. Returns the end of its bytes.
  static char* pack(const V* low, const V* middle, const V* high, int64_t size, char* to) {
    auto* count = reinterpret_cast<uint8_t*>(to);
    to += counts(size);
    for (int64_t i = 0; i < size; ++i) {
      const Bits change = bits(low[i]) - bits(expected(middle[i], high[i]));
      // The sign goes to the lowest bit, so that what is small has zeros above.
      const Bits folded = (change << 1) ^ (Bits{} - (change >> (kWidth - 1)));
      const int quarters = quarters_of(any(folded));
      const Bits sorted = by_weight(folded);
      std::memcpy(to, &sorted, sizeof sorted);  // the next vector overwrites zero quarters
      to += quarters * kQuarter;
      count[i] = quarters;
    }
    return to + kBytes;
  }

  // Restores `low`, in place of `high`.
  static void unpack(const char* from, const V* middle, V* high, int64_t size) {
    const auto* count = reinterpret_cast<const uint8_t*>(from);
    from += counts(size);
    for (int64_t i = 0; i < size; ++i) {
      const int bytes = count[i] * kQuarter;
      Bits sorted, kept;
      std::memcpy(&sorted, from, sizeof sorted);
      std::memcpy(&kept, kOnes.bytes + kBytes - bytes, sizeof kept);
      from += bytes;
      const Bits folded = by_lane(sorted & kept);
      const Bits change = (folded >> 1) ^ (Bits{} - (folded & 1));
      const Bits low = bits(expected(middle[i], high[i])) + change;
      std::memcpy(&high[i], &low, sizeof low);
    }
  }

 private:
  typedef typename std::conditional<sizeof(T) == 4, uint32_t, uint64_t>::type Whole;
  typedef Whole Bits __attribute__((vector_size(kBytes)));
  typedef uint8_t Bytes __attribute__((vector_size(kBytes)));
  typedef uint32_t Words __attribute__((vector_size(kBytes)));
  static constexpr int kWidth = 8 * sizeof(T), kQuarter = kBytes / 4, kWords = kBytes / 4;

  struct Ones {
    alignas(kLine) uint8_t bytes[2 * kBytes];
    constexpr Ones() : bytes() {
      for (int i = 0; i < kBytes; ++i) bytes[i] = 255;
    }
  };
  static constexpr Ones kOnes{};

  static size_t counts(int64_t size) { return (size + kLine - 1) / kLine * kLine; }

  static V expected(const V& middle, const V& high) { return middle + (middle - high); }

  static Bits bits(const V& v) { return (Bits)v; }

  // The OR of all lanes.
  static Whole any(const Bits& v) {
#ifdef __AVX512F__
    if constexpr (sizeof(T) == 4) return _mm512_reduce_or_epi32(reinterpret_cast<__m512i>(v));
    else return _mm512_reduce_or_epi64(reinterpret_cast<__m512i>(v));
#else
    uint64_t words[kBytes / 8], all = 0;
    std::memcpy(words, &v, sizeof words);
    for (uint64_t word : words) all |= word;
    return sizeof(T) == 8 ? all : all | all >> 32;
#endif
  }

  static int quarters_of(Whole bits) {
    const int used = bits == 0 ? 0 : 64 - __builtin_clzll(bits);
    return (used + kWidth / 4 - 1) / (kWidth / 4);
  }

  // Groups the bytes of equal weight, in every 16 bytes and then in the whole vector; and back.
  static Bits by_weight(const Bits& v) {
    Bytes within;
    Words across;
#pragma GCC unroll 64
    for (int i = 0; i < kBytes; ++i) within[i] = i / 16 * 16 + place(i % 16);
#pragma GCC unroll 16
    for (int i = 0; i < kWords; ++i) across[i] = i % kQuarterWords * 4 + i / kQuarterWords;
    return (Bits)shuffled((Words)shuffled((Bytes)v, within), across);
  }
  static Bits by_lane(const Bits& v) {
    Bytes within;
    Words across;
#pragma GCC unroll 64
    for (int i = 0; i < kBytes; ++i) within[i / 16 * 16 + place(i % 16)] = i;
#pragma GCC unroll 16
    for (int i = 0; i < kWords; ++i) across[i % kQuarterWords * 4 + i / kQuarterWords] = i;
    return (Bits)shuffled((Bytes)shuffled((Words)v, across), within);
  }
  static constexpr int kQuarterWords = kWords / 4;

  // The source of byte `i` of 16: [quarter][number][byte] from [number][quarter][byte].
  static constexpr int place(int i) {
    constexpr int bytes = sizeof(T) / 4;
    return i % 4 / bytes * sizeof(T) + i / 4 * bytes + i % bytes;
  }

  template <class X>
  static X shuffled(const X& v, const X& from) {
#if defined(__GNUC__) && !defined(__clang__)
    return __builtin_shuffle(v, from);
#else
    X to;
    constexpr int many = sizeof(X) / sizeof(v[0]);
#pragma clang loop unroll(full)
    for (int i = 0; i < many; ++i) to[i] = v[from[i]];
    return to;
#endif
  }
};

// A thread's last state, and as many states below it as fit the memory.
template <class T>
class PackedStates {
 public:
  using V = Vec<T>;

  // For up to `layers` layers, with the memory of `capacity` unpacked states of `size` vectors
  // below the last state.
  PackedStates(int64_t size, int64_t capacity, int64_t layers)
      : size_(size),
        bytes_(std::max<int64_t>(capacity, 1) * Differences<T>::most(size)),
        unpacked_(3 * size),
        packed_(bytes_, false),
        top_(unpacked_.data()),
        second_(top_ + size),
        next_(second_ + size) {
    starts_.reserve(layers);
  }

  V* top() { return top_; }
  const V* top() const { return top_; }

  // Where the next state is written, before `push`.
  V* next() { return next_; }

  // Forgets all states but `top`.
  void restart() {
    below_ = 0;
    end_ = 0;
    starts_.clear();
  }

  void push() {
    if (below_ > 0) {
      // Contiguous; it overwrites the oldest states if the memory is full.
      const size_t left = bytes_ - end_ % bytes_;
      if (left < Differences<T>::most(size_)) end_ += left;
      starts_.push_back(end_);
      char* to = packed_.data() + end_ % bytes_;
      const int64_t written = Differences<T>::pack(second_, top_, next_, size_, to) - to;
      end_ += parts(written, kLine) * kLine;
    }
    ++below_;
    V* free = second_;
    second_ = top_;
    top_ = next_;
    next_ = free;
  }

  // The number of states below `top` that are still stored.
  int64_t below() const {
    if (below_ == 0) return 0;
    return 1 + std::count_if(starts_.begin(), starts_.end(), [&](size_t s) { return stored(s); });
  }

  // The state below `top` becomes `top`; at most `below()` times.
  void pop() {
    if (!starts_.empty()) {
      const size_t start = starts_.back();
      starts_.pop_back();
      const char* from = packed_.data() + start % bytes_;
      if (stored(start)) Differences<T>::unpack(from, second_, top_, size_);
    }
    --below_;
    std::swap(top_, second_);
  }

 private:
  // Are the bytes from `start` on not overwritten?
  bool stored(size_t start) const { return end_ - start <= bytes_; }

  const int64_t size_;
  const size_t bytes_;
  Buffer<V> unpacked_;
  Buffer<char> packed_;
  V *top_, *second_, *next_;
  std::vector<size_t> starts_;  // of packed states, the lowest first, as if none were overwritten
  size_t end_ = 0;
  int64_t below_ = 0;
};

}  // namespace
}  // namespace dnntk
