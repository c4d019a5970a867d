// Vectors as long as the processor's registers.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#ifdef __AVX__
#include <immintrin.h>
#endif

namespace dnntk {
namespace {

constexpr int kLine = 64;  // bytes of a cache line

// GCC splits vectors longer than a register through memory, a few bytes at a time.
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

// Keeps a vector in a register: otherwise a compiler may load it again for every product.
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

// Hides from GCC what a pointer was computed from: otherwise it keeps values that it expects to
// read again, and spills others from the registers.
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

// `count` numbers, then zeros; by masked loads, since a partial copy through memory stalls.
template <class T>
inline Vec<T> load_lanes(const T* from, int64_t count) {
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
inline void store_lanes(const Vec<T>& v, int64_t count, T* to) {
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

}  // namespace
}  // namespace dnntk
