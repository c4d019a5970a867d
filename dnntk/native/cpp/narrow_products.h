// The products of narrow layers: tiles whose accumulators stay in registers.

#pragma once

#include "simd.h"

namespace dnntk {
namespace {

constexpr bool kManyRegisters = kRegisters == 32;
// Columns of the tiles of three and of four channels: accumulators and factors fit the registers.
constexpr int kByThree = kManyRegisters ? 7 : 4, kByFour = kManyRegisters ? 6 : 3;
// Unrolled steps of a product's terms: with few registers, GCC would keep what several of them
// read.
constexpr int kUnrolled = kManyRegisters ? 8 : 1;

// acc[m][v] = sum over `terms` rows of the input, SIDE shifts: w[.., dx, m] in[.., v + dx].
template <class T, int SIDE, int M, int N>
void multiply(const Vec<T>* in, int64_t stride, int64_t terms, const T* w, Vec<T>* tile) {
  Vec<T> acc[M][N];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) acc[m][v] = tile[m * N + v];
  for (int64_t k = 0; k < terms; ++k, in += stride, w += SIDE * M) {
#pragma GCC unroll kUnrolled
    for (int dx = 0; dx < SIDE; ++dx) {
      T factor[M];
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) factor[m] = w[dx * M + m];
#pragma GCC unroll 8
      for (int v = 0; v < N; ++v) {
        Vec<T> value = in[v + dx];
        hold(value);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) acc[m][v] += value * factor[m];
      }
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) tile[m * N + v] = acc[m][v];
}

// sums[i][dx][m] = sum of in[i][x + dx] out[m][x], over the rows of all groups.
template <class T, int SIDE, int I, int M>
void outer_sums(const Vec<T>* in, const Vec<T>* out, int64_t groups, int64_t a_group, int64_t rows,
                int64_t a_row, int64_t columns, int64_t stride, Vec<T>* sums) {
  Vec<T> acc[I][SIDE][M] = {};
  for (int64_t g = 0; g < groups; ++g, in += a_group, out += a_group)
    for (int64_t y = 0; y < rows; ++y) {
      const Vec<T>*q = in + y * a_row, *gz = out + y * a_row;
      for (int64_t x = 0; x < columns; ++x, ++q, ++gz) {
        forget(q);
        // The side with fewer vectors stays in registers.
        if constexpr (I * SIDE < M) {
          Vec<T> value[I][SIDE];
#pragma GCC unroll 8
          for (int i = 0; i < I; ++i)
#pragma GCC unroll 8
            for (int dx = 0; dx < SIDE; ++dx) {
              value[i][dx] = q[i * stride + dx];
              hold(value[i][dx]);
            }
#pragma GCC unroll 8
          for (int m = 0; m < M; ++m) {
            Vec<T> derivative = gz[m * stride];
            hold(derivative);
#pragma GCC unroll 8
            for (int i = 0; i < I; ++i)
#pragma GCC unroll 8
              for (int dx = 0; dx < SIDE; ++dx) acc[i][dx][m] += value[i][dx] * derivative;
          }
        } else {
          Vec<T> derivative[M];
#pragma GCC unroll 8
          for (int m = 0; m < M; ++m) derivative[m] = gz[m * stride];
#pragma GCC unroll 8
          for (int i = 0; i < I; ++i)
#pragma GCC unroll 8
            for (int dx = 0; dx < SIDE; ++dx) {
              Vec<T> value = q[i * stride + dx];
              hold(value);
#pragma GCC unroll 8
              for (int m = 0; m < M; ++m) acc[i][dx][m] += value * derivative[m];
            }
        }
      }
    }
  std::memcpy(sums, acc, sizeof acc);
}

template <class T>
using Multiply = void (*)(const Vec<T>*, int64_t, int64_t, const T*, Vec<T>*);

template <class T, int SIDE, int M, int MOST = M == 4 ? kByFour : kByThree>
Multiply<T> multiply_for(int n) {
  switch (n) {
    case 1: return multiply<T, SIDE, M, 1>;
    case 2: return multiply<T, SIDE, M, 2>;
    case 3: return multiply<T, SIDE, M, 3>;
    case 4: return multiply<T, SIDE, M, std::min(4, MOST)>;
    case 5: return multiply<T, SIDE, M, std::min(5, MOST)>;
    case 6: return multiply<T, SIDE, M, std::min(6, MOST)>;
    default: return multiply<T, SIDE, M, MOST>;
  }
}

template <class T, int SIDE>
Multiply<T> multiply_for(int m, int n) {
  switch (m) {
    case 1: return multiply_for<T, SIDE, 1>(n);
    case 2: return multiply_for<T, SIDE, 2>(n);
    case 3: return multiply_for<T, SIDE, 3>(n);
    default: return multiply_for<T, SIDE, 4>(n);
  }
}

}  // namespace
}  // namespace dnntk
