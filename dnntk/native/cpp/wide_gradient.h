// One thread's rows of a wide layer's weight gradient, from all threads' examples.

#pragma once

#include <vector>

#include "wide_shared.h"

namespace dnntk {
namespace {

template <class T>
class WeightGradient {
 public:
  using V = Vec<T>;

  // Derivatives by the first `without_gradient` units are zero.
  WeightGradient(const Shared<T>& shared, int64_t number, int64_t without_gradient)
      : s_(shared),
        p_(shared.p),
        number_(number),
        c_(p_.channels),
        without_gradient_(without_gradient),
        sums_(kStripUnits<T> * kTileColumns, false) {
    for (int64_t t = 0; t < s_.threads; ++t)
      over_panels(s_.count(t), [&](int64_t v, int w) {
        stretches_.push_back({nullptr, w * kLanes<T>, 1, w * kLanes<T>});
        starts_.push_back(c_ * (s_.begin(t) + v));
      });
  }

  // Own rows of the gradient by a layer's D, from all examples: put(in, first out, values, their
  // number); and by its bias: put_bias(first out, values, their number). `to` is where `put` stores
  // the values. With `skip_zeros`, zeros are not put.
  template <class Put, class PutBias>
  void operator()(int64_t layer, const V* q, const V* g, const T* to, bool skip_zeros, Put put,
                  PutBias put_bias) {
    s_.list_active(layer, reads_);
    s_.list_active(layer + 1, above_);
    if (!skip_zeros) {
      over_others(reads_, [&](int64_t in) {
        for (int64_t o = 0; o < s_.vectors; ++o) put(in, o * kLanes<T>, V{}, s_.lanes(o));
      });
      over_others(above_, [&](int64_t out) { put_bias(out, V{}, 1); });
    }
    for (size_t k = 0; k < stretches_.size(); ++k)
      stretches_[k].a = reinterpret_cast<const T*>(q + starts_[k]);
    const int64_t in = part(reads_.count(), s_.threads, number_);
    const int64_t ins = part(reads_.count(), s_.threads, number_ + 1) - in;
    const int32_t* rows = reads_.units.data() + in;
    const int64_t vectors = parts(above_.count(), kLanes<T>);
    over_panels(vectors, [&](int64_t o, int n) {
      const int64_t end = set_pieces(o, n), width = end - pieces_[0].first;
      if (end <= without_gradient_) {
        if (skip_zeros) return;
        for (const Piece& piece : pieces_)
          for (int64_t i = 0; i < ins; ++i) put(rows[i], piece.first, V{}, piece.lanes);
        over_own(o, n, [&](int64_t, int64_t out, int64_t) { put_bias(out, V{}, 1); });
        return;
      }
      const V* derivatives = g + s_.examples * o;
      for (int64_t i = 0; i < ins; i += kStripUnits<T>) {
        const int64_t strip = std::min(kStripUnits<T>, ins - i);
        const int64_t next = i + strip < ins ? i + strip : 0;
        Prefetcher<T> prefetcher(Prefetcher<T>::kWrite, to + (next > 0 ? pieces_[0].first : end),
                                 std::min(kStripUnits<T>, ins - next), width, c_,
                                 tiles(strip) * s_.examples, rows + next);
        product<T>(stretches_.data(), stretches_.size(), in + i, in + i + strip, n, derivatives,
                   true, prefetcher, sums_.data());
        for (int64_t k = 0; k < strip; ++k) {
          const V* sums = sums_.data() + k * n;
          if (above_.all) {
            for (int64_t v = 0, out = o * kLanes<T>; v < n; ++v, out += kLanes<T>)
              put(rows[i + k], out, sums[v] * s_.slope[o + v], s_.lanes(o + v));
          } else {
            for (const Piece& piece : pieces_)
              put(rows[i + k], piece.first, piece.among(sums) * piece.slope, piece.lanes);
          }
        }
      }
      Buffer<V> totals(n);
      over_own(o, n, [&](int64_t v, int64_t out, int64_t lane) {
        if (lane == 0)
          for (int64_t e = 0; e < s_.examples; ++e) totals[v] += derivatives[e * n + v];
        put_bias(out, V{} + totals[v][lane] * p_.bias_slope[out], 1);
      });
    });
  }

 private:
  // f(vector, unit, lane) for own units among the n vectors of active units from vector o on.
  template <class F>
  void over_own(int64_t o, int n, F f) const {
    const int64_t vectors = parts(above_.count(), kLanes<T>);
    const int64_t first = part(vectors, s_.threads, number_) - o;
    const int64_t end = part(vectors, s_.threads, number_ + 1) - o;
    for (int64_t v = std::max<int64_t>(first, 0); v < std::min<int64_t>(end, n); ++v)
      for (int64_t lane = 0; lane < kLanes<T>; ++lane) {
        const int64_t k = (o + v) * kLanes<T> + lane;
        if (k < above_.count()) f(v, above_.units[k], lane);
      }
  }

  // f(unit) for own units that are not in a list.
  template <class F>
  void over_others(const UnitList& of, F f) const {
    const int64_t first = part(c_, s_.threads, number_), end = part(c_, s_.threads, number_ + 1);
    auto next = of.units.begin() + of.before(first);
    for (int64_t unit = first; unit < end; ++unit) {
      if (next != of.units.end() && *next == unit) ++next;
      else f(unit);
    }
  }

  // The units of one vector in memory, from `first` on. `mask` marks the active units, whose values
  // start at `from`.
  struct Piece {
    V slope;
    int64_t first, lanes, from;
    uint32_t mask;

    V among(const V* active) const {
      return expand_lanes<T>(reinterpret_cast<const T*>(active) + from, mask);
    }
  };

  // Sets `pieces_` to the units in memory that n vectors of active units span, from vector o on.
  // Returns the end of these units.
  int64_t set_pieces(int64_t o, int n) {
    const std::vector<int32_t>& units = above_.units;
    const int64_t begin = o * kLanes<T>;
    const int64_t last = std::min(begin + n * kLanes<T>, above_.count());
    const int64_t end = last < above_.count() ? units[last] : c_;
    pieces_.clear();
    int64_t k = begin;
    for (int64_t first = begin > 0 ? units[begin] : 0; first < end; first += kLanes<T>) {
      const int64_t lanes = std::min<int64_t>(kLanes<T>, end - first);
      Piece piece{load_lanes<T>(p_.slope + first, lanes), first, lanes, k - begin, 0};
      for (; k < last && units[k] < first + lanes; ++k)
        piece.mask |= uint32_t{1} << (units[k] - first);
      pieces_.push_back(piece);
    }
    return end;
  }

  const Shared<T>& s_;
  const Problem<T>& p_;
  const int64_t number_, c_, without_gradient_;
  Buffer<V> sums_;
  UnitList reads_, above_;           // active units that the layer reads, and of the state above it
  std::vector<Piece> pieces_;
  std::vector<Terms<T>> stretches_;  // all examples, panel by panel
  std::vector<int64_t> starts_;      // where a panel begins among those of all threads
};

}  // namespace
}  // namespace dnntk
