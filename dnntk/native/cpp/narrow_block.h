// The examples that one thread takes through a narrow network at a time.
//
// Layout: [groups][rows][channels][columns + padding] vectors, whose lanes are examples. Every row
// of an image is followed by `padding` = side / 2 zero vectors, which also precede the next row. A
// dense layer is an image of one row whose columns are vectors of examples.

#pragma once

#include "memory.h"
#include "problem.h"
#include "simd.h"

namespace dnntk {
namespace {

template <class T>
struct Block {
  int64_t first;    // vector of examples
  int64_t groups;   // images side by side, in vectors
  int64_t columns;  // of an image
  int64_t rows, channels;
  int padding;

  Block(const Problem<T>& p, int64_t first, int64_t count)
      : first(first),
        groups(p.dense() ? 1 : count),
        columns(p.dense() ? count : p.columns),
        rows(p.rows),
        channels(p.channels),
        padding(p.padding()) {}

  int64_t stride() const { return columns + padding; }
  int64_t group() const { return rows * channels * stride() + 2 * padding; }
  int64_t size() const { return groups * group(); }  // vectors of a state
  int64_t at(int64_t g, int64_t y, int64_t c) const {
    return g * group() + padding + (y * channels + c) * stride();
  }
};

// f(place in the block, place in the array, examples) for every vector of `columns` columns, where
// the array is [channels, positions, examples].
template <class T, class F>
void over_vectors(const Problem<T>& p, const Block<T>& b, int64_t columns, F f) {
  for (int64_t g = 0; g < b.groups; ++g)
    for (int64_t y = 0; y < b.rows; ++y)
      for (int64_t c = 0; c < b.channels; ++c)
        for (int64_t x = 0; x < columns; ++x) {
          const int64_t n = (b.first + (p.dense() ? x : g)) * kLanes<T>;
          const int64_t position = p.dense() ? 0 : y * (p.columns + p.padding()) + x;
          f(b.at(g, y, c) + x, (c * p.positions() + position) * p.examples + n,
            std::min<int64_t>(kLanes<T>, p.examples - n));
        }
}

template <class T>
void load(const Problem<T>& p, const Block<T>& b, const T* from, Vec<T>* to) {
  over_vectors(p, b, b.columns, [&](int64_t at, int64_t place, int64_t lanes) {
    to[at] = load_lanes<T>(from + place, lanes);
  });
}

// The padding of images becomes zero.
template <class T>
void store(const Problem<T>& p, const Block<T>& b, const Vec<T>* from, T* to) {
  const int64_t columns = b.columns + (p.dense() ? 0 : b.padding);
  over_vectors(p, b, columns, [&](int64_t at, int64_t place, int64_t lanes) {
    store_lanes<T>(from[at], lanes, to + place);
  });
}

}  // namespace
}  // namespace dnntk
