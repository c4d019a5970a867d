// What the threads of a wide network share.

#pragma once

#include "active_units.h"
#include "memory.h"
#include "thread_team.h"
#include "wide_products.h"

namespace dnntk {
namespace {

// The constants that all threads read, and the q and g of all examples, for weight gradients.
//
// Arrays by unit are [thread][panel of its examples][unit][vectors of the panel]; derivatives are
// also stored by example, [panel of units][example][vectors of the panel], zero beyond the units.
// On the way down `q` and `g` hold only units that are active in some thread's examples.
template <class T>
struct Shared {
  using V = Vec<T>;

  const Problem<T>& p;
  const int64_t vectors;   // of units
  const int64_t example_vectors, examples;  // in whole vectors
  const int64_t threads;
  Buffer<V> slope, bias_slope, base, floor;
  const int64_t group;  // layers between two barriers on the way down
  Ring<V> q, g;         // of two groups, so that a slower thread may still read
  ActiveUnits active;
  Barrier barrier;

  Shared(const Problem<T>& p, bool down)
      : p(p),
        vectors(parts(p.channels, kLanes<T>)),
        example_vectors(parts(p.examples, kLanes<T>)),
        examples(example_vectors * kLanes<T>),
        threads(std::min<int64_t>(p.threads, example_vectors)),
        slope(vectors), bias_slope(vectors), base(by_unit()), floor(by_unit()),
        group(p.group),
        q(2 * group, down ? by_unit() : 0),
        g(2 * group + 1, down ? examples * vectors : 0),
        active(threads, down ? p.layers + 1 : 2, p.channels),
        barrier(threads) {
    std::memcpy(slope.data(), p.slope, p.channels * sizeof(T));
    std::memcpy(bias_slope.data(), p.bias_slope, p.channels * sizeof(T));
    for (int64_t t = 0; t < threads; ++t) {
      arrange(p.base, t, base.data() + p.channels * begin(t));
      arrange(p.floor, t, floor.data() + p.channels * begin(t));
    }
  }

  // The first vector of a thread's examples, and how many it has.
  int64_t begin(int64_t thread) const { return part(example_vectors, threads, thread); }
  int64_t count(int64_t thread) const { return begin(thread + 1) - begin(thread); }

  // A thread's examples of [unit][example].
  void arrange(const T* from, int64_t thread, V* to) const {
    over(thread, [&](int64_t n, int64_t lanes, int64_t c, int64_t at) {
      to[at] = load_lanes<T>(from + c * p.examples + n, lanes);
    });
  }
  void store(const V* from, int64_t thread, T* to) const {
    over(thread, [&](int64_t n, int64_t lanes, int64_t c, int64_t at) {
      store_lanes<T>(from[at], lanes, to + c * p.examples + n);
    });
  }

  // The units that are active in any thread's examples, of the state that layer `state` reads. In
  // the last state all units count as active.
  void list_active(int64_t state, UnitList& to) const {
    if (state == p.layers) active.list_all(to);
    else active.list(0, threads, state, to);
  }

  // The number of units in vector `o` of the units.
  int64_t lanes(int64_t o) const {
    return std::max<int64_t>(0, std::min<int64_t>(kLanes<T>, p.channels - o * kLanes<T>));
  }

 private:
  int64_t by_unit() const { return p.channels * example_vectors; }

  // f(first example, number of examples, unit, place) for every vector of a thread's examples.
  template <class F>
  void over(int64_t thread, F f) const {
    over_panels(count(thread), [&](int64_t v, int w) {
      for (int64_t c = 0; c < p.channels; ++c)
        for (int x = 0; x < w; ++x) {
          const int64_t n = (begin(thread) + v + x) * kLanes<T>;
          const int64_t lanes = std::min<int64_t>(kLanes<T>, p.examples - n);
          f(n, lanes, c, p.channels * v + c * w + x);
        }
    });
  }
};

}  // namespace
}  // namespace dnntk
