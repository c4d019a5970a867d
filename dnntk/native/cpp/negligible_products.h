// Which products of a wide dense layer are too small to change a result, and are skipped.
//
// In the theorems' regime C is large. The input units have q = x + alpha / C, and a layer adds
// terms of size 1 / C to alpha: C^2 is beyond the digits of x. On the way down, such a layer
// likewise passes on the derivatives by alpha unchanged. Only the rows and columns of the d_out +
// 1 remaining units still have to be multiplied.
//
// This is decided layer by layer from the present parameters, not from C: by the Frobenius norm of
// the weights, against a budget that all layers share. Up: what is skipped may change no unit's
// input by more than half its last digit, in the mean over examples, and may make none zero. So
// every input must be positive, as in the thesis: at zero a ReLU depends on the sign of alpha,
// however small. Down: what is skipped may change the derivatives by alpha, as one vector for each
// example, by at most half their last digit. Both are bounds for the worst case; the change itself
// is some hundred times smaller.
//
// All threads decide from all examples, so results do not depend on the number of threads.

#pragma once

#include <cmath>
#include <limits>

#include "memory.h"
#include "problem.h"
#include "simd.h"

namespace dnntk {
namespace {

template <class T>
class NegligibleProducts {
 public:
  using V = Vec<T>;

  // Units are skipped in multiples of `granule`; `way_down`: are derivatives computed, too?
  NegligibleProducts(const Problem<T>& p, int64_t granule, bool way_down) : p_(p) {
    const int64_t units = p.inputs / granule * granule;
    if (units == 0 || p.initial == Initial::kMatrices || !eligible(units)) return;
    column_ = p.column[0];
    if (column_ == 0) {
      units_ = units;
      return;
    }
    T smallest = std::numeric_limits<T>::infinity(), least = smallest;
    Buffer<T> square(p.examples);
    for (int64_t c = 0; c < units; ++c) {
      T total = 0;
      for (int64_t n = 0; n < p.examples; ++n) {
        const T q = p.base[c * p.examples + n] + column_ * p.h0[c * p.examples + n];
        smallest = std::min(smallest, q);
        square[n] += q * q;
        total += q * q;
      }
      least = std::min(least, std::sqrt(total / p.examples));
    }
    limit_ = std::min(smallest / 2, kBudget * least);
    unchanged_ = limit_ > 0;
    if (!unchanged_ && !way_down) return;
    units_ = units;
    for (int64_t n = 0; n < p.examples; ++n) squares_ = std::max(squares_, square[n]);
    for (int64_t c = units; c < p.channels; ++c) {
      RemainingUnit unit = {};
      for (int64_t n = 0; n < p.examples; ++n) {
        unit.base = std::max(unit.base, std::abs(p.base[c * p.examples + n]));
        unit.state = std::max(unit.state, std::abs(p.h0[c * p.examples + n]));
      }
      remaining_.push_back(unit);
    }
    norm_ = largest_norm();
  }

  // The number of units, from the first on, that a layer does not change. The first calls must ask
  // for the layers in order.
  int64_t up(int64_t layer) {
    if (units_ == 0) return 0;
    if (column_ == 0) return units_;
    if (layer == static_cast<int64_t>(layers_.size())) measure(layer);
    return layers_[layer].up ? units_ : 0;
  }

  // The number of units whose derivatives a layer passes on, so that only the other units'
  // derivatives are multiplied; after the way up.
  int64_t down(int64_t layer) {
    if (units_ == 0 || column_ == 0) return units_;
    if (lowest_ < 0) {
      T spent = 0;
      for (lowest_ = p_.layers; lowest_ > 0; --lowest_) {
        spent += layers_[lowest_ - 1].down;
        if (!(spent <= kBudget)) break;
      }
    }
    return layer >= lowest_ ? units_ : 0;
  }

  // Units whose weights have gradient zero: those with q = x, since C is infinite.
  int64_t without_gradient() const { return column_ == 0 ? units_ : 0; }

 private:
  static constexpr T kBudget = std::numeric_limits<T>::epsilon() / 2;
  struct Layer {
    bool up;
    T down;  // its share of the budget
  };
  struct RemainingUnit {
    T base, state;  // bounds on their sizes
  };

  // Are all of these units carried alike, with so little of their change in q?
  bool eligible(int64_t units) const {
    for (int64_t c = 0; c < units; ++c)
      if (p_.carry[c] != 1 || p_.column[c] != p_.column[0] || p_.slope[c] != p_.slope[0])
        return false;
    return p_.column[0] * p_.column[0] <= std::numeric_limits<T>::epsilon();
  }

  // A bound on the norm of an example's q.
  T largest_norm() const {
    T total = squares_;
    const T* column = p_.column + units_;
    for (size_t k = 0; k < remaining_.size(); ++k) {
      const T q = remaining_[k].base + column[k] * remaining_[k].state;
      total += q * q;
    }
    return std::sqrt(total) * (1 + T(1e-3));  // a margin for rounding in the sums
  }

  void measure(int64_t layer) {
    const int64_t c = p_.channels, vectors = units_ / kLanes<T>;
    const int64_t rest = parts(c - units_, kLanes<T>);
    const T *d = p_.kernel + layer * p_.weights(), *bias = p_.bias + layer * c;
    constexpr int kSums = 4;
    V sums[kSums] = {};
    Buffer<V> other(rest);
    for (int64_t k = 0; k < c; ++k, d += c) {
      int64_t o = 0;
      for (; o + kSums <= vectors; o += kSums)
#pragma GCC unroll 4
        for (int s = 0; s < kSums; ++s) {
          const V value = load_lanes<T>(d + (o + s) * kLanes<T>, kLanes<T>);
          sums[s] += value * value;
        }
      for (; o < vectors; ++o) {
        const V value = load_lanes<T>(d + o * kLanes<T>, kLanes<T>);
        sums[0] += value * value;
      }
      for (int64_t v = 0; v < rest; ++v) {
        const int64_t at = units_ + v * kLanes<T>;
        const V value = load_lanes<T>(d + at, std::min<int64_t>(kLanes<T>, c - at));
        other[v] += value * value;
      }
    }
    T constant = 0, features = 0;
    for (int64_t o = 0; o < units_; ++o) {
      const T value = bias[o] * p_.bias_slope[o];
      constant += value * value;
    }
    if (p_.initial == Initial::kFeatures)
      for (int64_t k = 0; k < p_.inputs; ++k) {
        const T u = p_.initial_kernel[layer * p_.inputs + k];
        features += u * u;
      }
    const T squares = sum<T>(sums[0] + sums[1] + (sums[2] + sums[3]));
    const T norm = std::abs(p_.slope[0]) * std::sqrt(squares);
    spent_ += column_ * (norm * norm_ + std::sqrt(constant));
    unchanged_ = unchanged_ && spent_ <= limit_;
    layers_.push_back({unchanged_, column_ * norm});
    if (!unchanged_) return;
    const T* by_unit = reinterpret_cast<const T*>(other.data());
    for (int64_t o = units_; o < c; ++o) {
      T weight = std::abs(p_.slope[o]) * std::sqrt(by_unit[o - units_]);
      T start = std::abs(bias[o] * p_.bias_slope[o]);
      if (p_.initial == Initial::kFeatures && o == p_.inputs) {
        weight += std::sqrt(features);
        start += std::abs(p_.initial_bias[layer]);
      }
      T& state = remaining_[o - units_].state;
      state = p_.carry[o] * state + weight * norm_ + start;
    }
    norm_ = largest_norm();
  }

  const Problem<T>& p_;
  int64_t units_ = 0, lowest_ = -1;
  bool unchanged_ = false;      // has no layer changed the units so far?
  T column_ = 1;
  T spent_ = 0, limit_ = 0;     // bound on the change of the units' q so far, and its limit
  T squares_ = 0;               // the largest sum of squares over an example's units
  T norm_ = 0;                  // a bound on the norm of an example's q
  std::vector<RemainingUnit> remaining_;
  std::vector<Layer> layers_;  // as far as they are measured
};

}  // namespace
}  // namespace dnntk
