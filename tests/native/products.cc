// The products of dnntk/native/cpp against plain loops, for the vectors of one processor level.

#include <cstdio>
#include <vector>

#include "active_units.h"
#include "narrow_products.h"
#include "packed_states.h"
#include "wide_products.h"

namespace {

using namespace dnntk;

int failures = 0;
double random_number() {
  static uint32_t seed = 1;
  seed = seed * 1664525u + 1013904223u;
  return seed / 4294967296.0 - 0.5;
}

template <class T>
void fill(Buffer<T>& all, size_t size) {
  for (size_t i = 0; i < size; ++i) all[i] = random_number();
}
template <class T>
const T* numbers(const Buffer<Vec<T>>& all) {
  return reinterpret_cast<const T*>(all.data());
}
template <class T>
void fill_vectors(Buffer<Vec<T>>& all, size_t size) {
  for (size_t i = 0; i < size * kLanes<T>; ++i) reinterpret_cast<T*>(all.data())[i] = random_number();
}

template <class T>
void expect(const char* what, double found, double expected, double terms) {
  const double most = terms * (sizeof(T) == 4 ? 1e-7 : 1e-15);
  if (found - expected <= most && expected - found <= most) return;
  if (++failures < 20) std::printf("%s: %.17g, expected %.17g\n", what, found, expected);
}

// Every size of tile, with values in the tile before.
template <class T, int SIDE>
void narrow_multiply() {
  const int64_t terms = 5, stride = 12;
  Buffer<Vec<T>> in(terms * stride), tile(32), before(32);
  Buffer<T> w(terms * SIDE * 4);
  fill_vectors<T>(in, terms * stride);
  fill(w, terms * SIDE * 4);
  for (int m = 1; m <= 4; ++m)
    for (int n = 1; n <= (m == 4 ? kByFour : kByThree); ++n) {
      fill_vectors<T>(before, 32);
      std::copy(before.data(), before.data() + 32, tile.data());
      multiply_for<T, SIDE>(m, n)(in.data(), stride, terms, w.data(), tile.data());
      for (int i = 0; i < m; ++i)
        for (int x = 0; x < n * kLanes<T>; ++x) {
          double sum = numbers<T>(before)[i * n * kLanes<T> + x];
          for (int k = 0; k < terms; ++k)
            for (int dx = 0; dx < SIDE; ++dx)
              sum += double(w[(k * SIDE + dx) * m + i]) *
                     numbers<T>(in)[(k * stride + dx) * kLanes<T> + x];
          expect<T>("multiply", numbers<T>(tile)[i * n * kLanes<T> + x], sum, terms * SIDE);
        }
    }
}

template <class T, int SIDE, int I, int M>
void narrow_outer() {
  const int64_t groups = 2, rows = 3, columns = 4, stride = columns + 2 * SIDE;
  const int64_t a_row = 4 * stride, a_group = rows * a_row, size = groups * a_group;
  Buffer<Vec<T>> in(size), out(size), sums(I * SIDE * M);
  fill_vectors<T>(in, size);
  fill_vectors<T>(out, size);
  outer_sums<T, SIDE, I, M>(in.data(), out.data(), groups, a_group, rows, a_row, columns, stride,
                            sums.data());
  for (int i = 0; i < I; ++i)
    for (int dx = 0; dx < SIDE; ++dx)
      for (int m = 0; m < M; ++m) {
        double expected = 0;
        for (int g = 0; g < groups; ++g)
          for (int y = 0; y < rows; ++y)
            for (int x = 0; x < columns; ++x)
              for (int l = 0; l < kLanes<T>; ++l) {
                const int64_t at = g * a_group + y * a_row + x;
                expected += double(numbers<T>(in)[(at + i * stride + dx) * kLanes<T> + l]) *
                            numbers<T>(out)[(at + m * stride) * kLanes<T> + l];
              }
        expect<T>("outer_sums", sum<T>(sums[(i * SIDE + dx) * M + m]), expected, 96 * kLanes<T>);
      }
}

// Rows up to two tiles and a rest; all terms and listed ones.
template <class T>
void wide_product() {
  const int64_t terms = 17, rows = 2 * kTileRows + 3;
  const int32_t some[] = {0, 3, 4, 11, 16};
  Buffer<T> a(rows * terms);
  Buffer<Vec<T>> b(terms * kTileColumns), c(rows * kTileColumns), before(rows * kTileColumns);
  fill(a, rows * terms);
  for (int n = 1; n <= kTileColumns; ++n)
    for (int64_t end = 1; end <= rows; ++end)
      for (bool listed : {false, true})
        for (bool fresh : {false, true}) {
          fill_vectors<T>(b, terms * n);
          fill_vectors<T>(before, end * n);
          std::copy(before.data(), before.data() + end * n, c.data());
          const Terms<T> of{a.data(), terms, 1, listed ? 5 : terms, listed ? some : nullptr};
          Prefetcher<T> prefetcher(Prefetcher<T>::kRead, a.data(), rows, terms, terms, of.count);
          product<T>(&of, 1, 0, end, n, b.data(), fresh, prefetcher, c.data());
          for (int64_t m = 0; m < end; ++m)
            for (int64_t x = 0; x < n * kLanes<T>; ++x) {
              double sum = fresh ? 0 : numbers<T>(before)[m * n * kLanes<T> + x];
              for (int64_t k = 0; k < of.count; ++k) {
                const int64_t term = listed ? some[k] : k;
                sum += double(a[m * terms + term]) * numbers<T>(b)[term * n * kLanes<T> + x];
              }
              expect<T>("product", numbers<T>(c)[m * n * kLanes<T> + x], sum, terms);
            }
        }
}

// What moves numbers must not change them.
template <class T>
void moves() {
  const int64_t size = 40;
  Buffer<Vec<T>> low(size), middle(size), high(size), square(kLanes<T>);
  fill_vectors<T>(square, kLanes<T>);
  std::vector<T> before(numbers<T>(square), numbers<T>(square) + kLanes<T> * kLanes<T>);
  transpose<T>(square.data());
  for (int i = 0; i < kLanes<T>; ++i)
    for (int j = 0; j < kLanes<T>; ++j)
      expect<T>("transpose", square[i][j], before[j * kLanes<T> + i], 0);
  for (int count = 0; count <= kLanes<T>; ++count) {
    const Vec<T> loaded = load_lanes<T>(before.data(), count);
    std::vector<T> stored(kLanes<T>, T(7));
    store_lanes<T>(loaded, count, stored.data());
    const Vec<T> expanded = expand_lanes<T>(before.data(), (uint32_t{1} << count >> 1));
    for (int l = 0; l < kLanes<T>; ++l) {
      expect<T>("load_lanes", loaded[l], l < count ? before[l] : T(0), 0);
      expect<T>("store_lanes", stored[l], l < count ? before[l] : T(7), 0);
      expect<T>("expand_lanes", expanded[l], l == count - 1 ? before[0] : T(0), 0);
    }
  }
  fill_vectors<T>(low, size);
  for (int64_t i = 0; i < size; ++i) {  // from almost alike to nothing alike
    middle[i] = low[i] + low[i] * T(i < 30 ? i * 1e-5 : random_number());
    high[i] = middle[i] + (middle[i] - low[i]) * T(1.1);
  }
  Buffer<char> bytes(Differences<T>::most(size));
  Differences<T>::pack(low.data(), middle.data(), high.data(), size, bytes.data());
  Differences<T>::unpack(bytes.data(), middle.data(), high.data(), size);
  if (std::memcmp(low.data(), high.data(), size * kBytes) != 0) ++failures, std::puts("unpack");
}

template <class T>
void all() {
  narrow_multiply<T, 1>();
  narrow_multiply<T, 3>();
  narrow_outer<T, 1, 4, 3>();
  narrow_outer<T, 3, 1, 4>();
  narrow_outer<T, 5, 1, 2>();
  wide_product<T>();
  moves<T>();
}

}  // namespace

int main() {
  narrow_multiply<float, 5>();
  all<float>();
  all<double>();
  std::printf("%d bytes, %d failures\n", dnntk::kBytes, failures);
  return failures != 0;
}
