// The products of wide layers: tiles of accumulators that stay in registers.

#pragma once

#include "problem.h"
#include "simd.h"

namespace dnntk {
namespace {

// Accumulators of a tile: kTileRows x kTileColumns vectors.
constexpr int kTileRows = kRegisters == 32 ? 4 : 3, kTileColumns = kRegisters == 32 ? 6 : 4;
// A strip of units: whole tiles, and a cache line at least; in vectors and in units.
constexpr int kStrip = kRegisters == 32 ? kInLine : 3;
template <class T>
constexpr int64_t kStripUnits = kStrip * kLanes<T>;
constexpr int64_t kTermsUp = 96, kTermsDown = 800;  // of a product at a time, up and down
constexpr int64_t kPackedRows = 8;                  // of weights that are packed together

// Prefetches the weights of the next product during this one: `rows` of `width` numbers, `stride`
// apart, or the `listed` rows; one cache line every few of this product's `terms`. All lines at
// once would stall the processor, which can fetch about ten at a time.
template <class T>
class Prefetcher {
 public:
  enum Use { kRead, kWrite };

  Prefetcher(Use use, const T* first, int64_t rows, int64_t width, int64_t stride, int64_t terms,
             const int32_t* listed = nullptr)
      : first_(first), listed_(listed), rows_(width > 0 ? rows : 0), width_(width), stride_(stride),
        use_(use) {
    const int64_t lines = rows_ * (parts(width - 1, kStep) + 1);
    every = lines > 0 ? std::max<int64_t>(1, terms / lines) : terms;
  }

  void next() {
    if (rows_ <= 0) return;
    const T* line = first_ + (listed_ ? *listed_ * stride_ : 0) + std::min(done_, width_ - 1);
    if (use_ == kWrite) __builtin_prefetch(line, 1, 2);
    else __builtin_prefetch(line, 0, 2);
    done_ += kStep;
    if (done_ < width_ + kStep - 1) return;
    done_ = 0;
    if (listed_) ++listed_;
    else first_ += stride_;
    --rows_;
  }

  int64_t every;  // terms between two lines

 private:
  static constexpr int64_t kStep = kLine / sizeof(T);
  const T* first_;
  const int32_t* listed_;
  int64_t rows_, width_, stride_, done_ = 0;
  Use use_;
};

// Terms of a sum: a[m row + k column] for the rows m of a tile; k = 0, 1, ..., or the listed ones.
template <class T>
struct Terms {
  const T* a;
  int64_t row, column, count;
  const int32_t* listed = nullptr;
};

// c[m][v] = (if fresh) or += the sum over terms k of a[m row + k column] b[k][v]; `many` stretches
// of terms, or one that is listed.
template <class T, bool kListed, int M, int N>
void block(const Terms<T>* terms, int64_t many, int64_t first, const Vec<T>* b, bool fresh,
           Prefetcher<T>& prefetcher, Vec<T>* c) {
  Vec<T> acc[M][N];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) acc[m][v] = fresh ? Vec<T>{} : c[m * N + v];
  for (int64_t s = 0; s < many; ++s) {
    const int64_t row = terms[s].row, column = terms[s].column;
    const T* a = terms[s].a + first * row;
    const int32_t* listed = terms[s].listed;
    for (int64_t left = terms[s].count; left > 0; left -= prefetcher.every) {
      prefetcher.next();
      for (int64_t k = std::min(left, prefetcher.every); k > 0; --k) {
        const T* at = kListed ? a + *listed * column : a;
        const Vec<T>* with = kListed ? b + *listed * N : b;
        T factor[M];
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) factor[m] = at[m * row];
#pragma GCC unroll 8
        for (int v = 0; v < N; ++v) {
          Vec<T> value = with[v];
          hold(value);
#pragma GCC unroll 8
          for (int m = 0; m < M; ++m) acc[m][v] += value * factor[m];
        }
        if (kListed) {
          ++listed;
        } else {
          a += column;
          b += N;
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) c[m * N + v] = acc[m][v];
}

// The same for the rows [first, end); c is [m][N] from row `first` on.
template <class T, bool kListed, int N>
void rows_of(const Terms<T>* terms, int64_t many, int64_t first, int64_t end, const Vec<T>* b,
             bool fresh, Prefetcher<T>& prefetcher, Vec<T>* c) {
  auto rows = [&](auto m) {
    block<T, kListed, std::min<int>(m, kTileRows), N>(terms, many, first, b, fresh, prefetcher, c);
  };
  for (; end - first >= kTileRows; first += kTileRows, c += kTileRows * N)
    rows(std::integral_constant<int, kTileRows>());
  switch (end - first) {
    case 3: return rows(std::integral_constant<int, 3>());
    case 2: return rows(std::integral_constant<int, 2>());
    case 1: return rows(std::integral_constant<int, 1>());
  }
}

// The same for any number of vectors n <= kTileColumns.
template <class T, bool kListed>
void product_of(const Terms<T>* terms, int64_t many, int64_t first, int64_t end, int n,
                const Vec<T>* b, bool fresh, Prefetcher<T>& prefetcher, Vec<T>* c) {
  auto vectors = [&](auto most) {
    constexpr int kColumns = std::min<int>(decltype(most)::value, kTileColumns);
    rows_of<T, kListed, kColumns>(terms, many, first, end, b, fresh, prefetcher, c);
  };
  switch (n) {
    case 1: return vectors(std::integral_constant<int, 1>());
    case 2: return vectors(std::integral_constant<int, 2>());
    case 3: return vectors(std::integral_constant<int, 3>());
    case 4: return vectors(std::integral_constant<int, 4>());
    case 5: return vectors(std::integral_constant<int, 5>());
    default: return vectors(std::integral_constant<int, kTileColumns>());
  }
}
template <class T>
void product(const Terms<T>* terms, int64_t many, int64_t first, int64_t end, int n,
             const Vec<T>* b, bool fresh, Prefetcher<T>& prefetcher, Vec<T>* c) {
  if (terms->listed) product_of<T, true>(terms, many, first, end, n, b, fresh, prefetcher, c);
  else product_of<T, false>(terms, many, first, end, n, b, fresh, prefetcher, c);
}

inline int64_t tiles(int64_t rows) { return parts(rows, kTileRows); }

// f(first, number) for panels of `vectors`, at most kTileColumns each.
template <class F>
inline void over_panels(int64_t vectors, F f) {
  const int64_t count = parts(vectors, kTileColumns);
  for (int64_t k = 0; k < count; ++k) {
    const int64_t v = part(vectors, count, k);
    f(v, static_cast<int>(part(vectors, count, k + 1) - v));
  }
}

// A square of vectors, transposed in place.
template <class T>
void transpose(Vec<T>* v) {
  constexpr int lanes = kLanes<T>;
#if defined(__GNUC__) && !defined(__clang__)
  typedef typename std::conditional<sizeof(T) == 4, int32_t, int64_t>::type Integer;
  typedef Integer Index __attribute__((vector_size(kBytes)));
#pragma GCC unroll 4
  for (int s = lanes / 2; s > 0; s /= 2) {
    Index low, high;
#pragma GCC unroll 16
    for (int l = 0; l < lanes; ++l) {
      low[l] = l & s ? lanes + (l ^ s) : l;
      high[l] = l & s ? lanes + l : l ^ s;
    }
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) {
      if (i & s) continue;
      Vec<T> a = v[i], b = v[i + s];
      v[i] = __builtin_shuffle(a, b, low);
      v[i + s] = __builtin_shuffle(a, b, high);
    }
  }
#else
  T* x = reinterpret_cast<T*>(v);
  for (int i = 0; i < lanes; ++i)
    for (int j = 0; j < i; ++j) std::swap(x[i * lanes + j], x[j * lanes + i]);
#endif
}

}  // namespace
}  // namespace dnntk
