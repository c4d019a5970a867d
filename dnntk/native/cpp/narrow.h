// One thread's way through the layers of a narrow network, in tiles that fit the registers.
//
// A layer is less work than the call of an operation, so one call goes through all of them, with a
// few examples at a time, which stay in the core's own cache.

#pragma once

#include <optional>

#include "narrow_block.h"
#include "narrow_products.h"
#include "narrow_registers.h"

namespace dnntk {
namespace {

template <class T, int SIDE>
class NarrowWorker {
 public:
  using V = Vec<T>;

  NarrowWorker(const Problem<T>& p, const Block<T>& block)
      : p_(p),
        b_(block),
        base_(b_.size()),
        floor_(b_.size()),
        weights_(p.weights()),
        packed_(p.weights()),
        tangents_(p.weights()),
        bias_(p.channels) {
    load(p_, b_, p_.base, base_.data());
    load(p_, b_, p_.floor, floor_.data());
    // Tiles of three channels or, where that divides the channels better, of four.
    const bool by_four = p_.channels % 4 == 0 && p_.channels % 3 != 0;
    channel_parts_ = parts(p_.channels, by_four ? 4 : 3);
    column_parts_ = parts(b_.columns, by_four ? kByFour : kByThree);
    if (RegisterLayers<T>::fit(p_))
      in_registers_.emplace(p_, b_.columns, base_.data(), floor_.data());
  }

  // q = base + column h
  void read(const V* h, V* q) {
    each([&](int64_t i, int64_t c) { q[i] = base_[i] + p_.column[c] * h[i]; });
  }

  // dq = column dh
  void column(const V* dh, V* dq) {
    each([&](int64_t i, int64_t c) { dq[i] = p_.column[c] * dh[i]; });
  }

  // The layer's weights and bias: slope D plus the initial values.
  void prepare(int64_t layer) {
    const int64_t c = p_.channels;
    const T* d = p_.kernel + layer * p_.weights();
    for (int64_t i = 0; i < p_.weights() / c; ++i)
      for (int64_t o = 0; o < c; ++o) weights_[i * c + o] = d[i * c + o] * p_.slope[o];
    for (int64_t o = 0; o < c; ++o) bias_[o] = p_.bias[layer * c + o] * p_.bias_slope[o];
    if (p_.initial == Initial::kMatrices) {
      const T* w = p_.initial_kernel + layer * p_.weights();
      for (int64_t i = 0; i < p_.weights(); ++i) weights_[i] += w[i];
      for (int64_t o = 0; o < c; ++o) bias_[o] += p_.initial_bias[layer * c + o];
    } else if (p_.initial == Initial::kFeatures) {
      const T* u = p_.initial_kernel + layer * SIDE * SIDE * p_.inputs;
      for (int64_t tap = 0; tap < SIDE * SIDE; ++tap)
        for (int64_t i = 0; i < p_.inputs; ++i)
          weights_[(tap * c + i) * c + p_.inputs] += u[tap * p_.inputs + i];
      bias_[p_.inputs] += p_.initial_bias[layer];
    }
  }

  // In the order that `convolve` reads: [part][dy, in][dx][out of the part].
  void pack(const T* weights, bool transposed, T* to) {
    const int64_t c = p_.channels;
    for (int64_t k = 0; k < channel_parts_; ++k) {
      int64_t from = part(c, channel_parts_, k), end = part(c, channel_parts_, k + 1);
      for (int dy = 0; dy < SIDE; ++dy)
        for (int64_t i = 0; i < c; ++i)
          for (int dx = 0; dx < SIDE; ++dx)
            for (int64_t o = from; o < end; ++o)
              *to++ = transposed
                          ? weights[((SIDE - 1 - dy) * SIDE + SIDE - 1 - dx) * c * c + o * c + i]
                          : weights[(dy * SIDE + dx) * c * c + i * c + o];
    }
  }

  // epilogue(index of the corner, first channel, channels, columns, tile) for every tile of W in,
  // or of W in + W2 in2.
  template <class Epilogue>
  void convolve(const V* in, const T* w, const V* in2, const T* w2, Epilogue epilogue) {
    const int64_t c = p_.channels, r = b_.padding;
    for (int64_t g = 0; g < b_.groups; ++g)
      for (int64_t y = 0; y < b_.rows; ++y) {
        int64_t above = std::max<int64_t>(0, r - y);
        int64_t below = std::max<int64_t>(0, y + r + 1 - b_.rows);
        int64_t terms = (SIDE - above - below) * c;
        for (int64_t k = 0; k < channel_parts_; ++k) {
          int64_t o = part(c, channel_parts_, k), m = part(c, channel_parts_, k + 1) - o;
          int64_t skip = o * SIDE * SIDE * c + above * c * SIDE * m;
          for (int64_t j = 0; j < column_parts_; ++j) {
            int64_t x = part(b_.columns, column_parts_, j);
            int64_t n = part(b_.columns, column_parts_, j + 1) - x;
            int64_t corner = b_.at(g, y - r + above, 0) + x - r;
            V tile[std::max(4 * kByFour, 3 * kByThree)] = {};
            Multiply<T> kernel = multiply_for<T, SIDE>(m, n);
            kernel(in + corner, b_.stride(), terms, w + skip, tile);
            if (in2 != nullptr) kernel(in2 + corner, b_.stride(), terms, w2 + skip, tile);
            epilogue(b_.at(g, y, o) + x, o, m, n, tile);
          }
        }
      }
  }

  // Do all channels of a layer fit the registers? Then `forward` does not write q.
  bool fits_registers() const { return in_registers_.has_value(); }

  // To be called before the first of consecutive layers, whose state is `h`.
  void begin(const V* h, V* compensation) {
    if (fits_registers()) in_registers_->begin(h, compensation);
  }

  // From the state h and q of layer `layer` to those of the next layer. Over millions of layers
  // each adds less than the state's last digit: the rounding error of the sum is kept in
  // `compensation` and added to the next term (two-sum). In layers that fit the registers,
  // `compensation` is all that was added since the last `settle`, and the next state is written
  // only if `write` or if it settles. Meanwhile the state two layers above is prefetched, as
  // `backward` prefetches the state two layers below.
  void forward(int64_t layer, const V* h, const V* q, V* compensation, V* h_next, V* q_next,
               bool write) {
    const int64_t ahead = h_next == h ? 0 : b_.size();
    if (fits_registers()) return in_registers_->forward(layer, compensation, h_next, write);
    prepare(layer);
    pack(weights_.data(), false, packed_.data());
    convolve(q, packed_.data(), nullptr, nullptr,
             [&](int64_t at, int64_t o, int64_t m, int64_t n, const V* tile) {
               for (int64_t i = 0; i < m; ++i)
                 for (int64_t x = 0; x < n; ++x) {
                   int64_t k = at + i * b_.stride() + x;
                   V term = tile[i * n + x] + bias_[o + i];
                   if (k % kInLine == 0) __builtin_prefetch(h_next + k + ahead, 1, 2);
                   h_next[k] = add(o + i, h[k], term, floor_[k], compensation + k);
                   q_next[k] = base_[k] + p_.column[o + i] * h_next[k];
                 }
             });
  }

  // As `forward`, with tangents; dk and db are the tangents of the parameters.
  void tangent(int64_t layer, const T* dk, const T* db, const V* h, const V* q, const V* dh,
               const V* dq, V* compensation, V* h_next, V* q_next, V* dh_next, V* dq_next) {
    const int64_t c = p_.channels;
    forward(layer, h, q, compensation, h_next, q_next, true);
    if (fits_registers()) {
      read(h_next, q_next);
      prepare(layer);
      pack(weights_.data(), false, packed_.data());
    }
    for (int64_t i = 0; i < p_.weights(); ++i)
      weights_[i] = dk[layer * p_.weights() + i] * p_.slope[i % c];
    pack(weights_.data(), false, tangents_.data());
    convolve(dq, packed_.data(), q, tangents_.data(),
             [&](int64_t at, int64_t o, int64_t m, int64_t n, const V* tile) {
               for (int64_t i = 0; i < m; ++i)
                 for (int64_t x = 0; x < n; ++x) {
                   int64_t k = at + i * b_.stride() + x, u = o + i;
                   V dz = tile[i * n + x] + db[layer * c + u] * p_.bias_slope[u] +
                          p_.carry[u] * dh[k];
                   V next = h_next[k] > floor_[k] ? dz : V{};
                   dh_next[k] = next;
                   dq_next[k] = p_.column[u] * next;
                 }
             });
  }

  // gz = g where the state is above its floor, else 0; the padding of gz is zero already.
  void mask(const V* h, const V* g, V* gz) {
    each([&](int64_t i, int64_t) { gz[i] = h[i] > floor_[i] ? g[i] : V{}; });
  }

  // From derivatives gz by a layer's z to those by the z of the layer below, or by the state h for
  // the lowest layer; the gradients by the layer's parameters go to `by_kernel` and `by_bias`.
  void backward(int64_t layer, const V* h, V* q, const V* gz, V* next, T* by_kernel, T* by_bias) {
    read(h, q);
    outer(q, gz, by_kernel, by_bias);
    prepare(layer);
    pack(weights_.data(), true, packed_.data());
    const bool masked = layer > 0;
    convolve(gz, packed_.data(), nullptr, nullptr,
             [&](int64_t at, int64_t o, int64_t m, int64_t n, const V* tile) {
               for (int64_t i = 0; i < m; ++i)
                 for (int64_t x = 0; x < n; ++x) {
                   int64_t k = at + i * b_.stride() + x;
                   if (k % kInLine == 0) __builtin_prefetch(h + k - 2 * b_.size(), 0, 2);
                   V g = p_.column[o + i] * tile[i * n + x] + p_.carry[o + i] * gz[k];
                   next[k] = masked ? (h[k] > floor_[k] ? g : V{}) : g;
                 }
             });
  }

 private:
  template <class F>
  void each(F f) {
    for (int64_t g = 0; g < b_.groups; ++g)
      for (int64_t y = 0; y < b_.rows; ++y)
        for (int64_t c = 0; c < b_.channels; ++c) {
          int64_t i = b_.at(g, y, c);
          for (int64_t x = 0; x < b_.columns; ++x) f(i + x, c);
        }
  }

  // The state of channel `o` above `h`, where the layer adds `term` to z; updates the compensation.
  V add(int64_t o, const V& h, V term, const V& floor, V* compensation) {
    V old = p_.carry[o] * h;
    term += *compensation;
    V z = old + term, added = z - old;
    *compensation = z > floor ? (old - (z - added)) + (term - added) : V{};
    return z > floor ? z : floor;
  }

  void outer(const V* q, const V* gz, T* by_kernel, T* by_bias) {
    constexpr int kIn = kManyRegisters ? (SIDE == 1 ? 6 : SIDE == 3 ? 3 : 1) : SIDE == 1 ? 4 : 1;
    constexpr int kOut = kManyRegisters ? (SIDE == 3 ? 3 : 4) : SIDE == 1 ? 3 : SIDE == 3 ? 4 : 2;
    const int64_t c = p_.channels, in_parts = parts(c, kIn), out_parts = parts(c, kOut);
    for (int dy = 0; dy < SIDE; ++dy)
      for (int64_t j = 0; j < in_parts; ++j)
        for (int64_t k = 0; k < out_parts; ++k) {
          int64_t i = part(c, in_parts, j), ins = part(c, in_parts, j + 1) - i;
          int64_t o = part(c, out_parts, k), outs = part(c, out_parts, k + 1) - o;
          T* to = by_kernel + (dy * SIDE * c + i) * c + o;
          switch (ins) {
            case 1: outer_in<1, kOut>(q, gz, dy, i, o, outs, to); break;
            case 2: outer_in<std::min(2, kIn), kOut>(q, gz, dy, i, o, outs, to); break;
            case 3: outer_in<std::min(3, kIn), kOut>(q, gz, dy, i, o, outs, to); break;
            case 4: outer_in<std::min(4, kIn), kOut>(q, gz, dy, i, o, outs, to); break;
            case 5: outer_in<std::min(5, kIn), kOut>(q, gz, dy, i, o, outs, to); break;
            default: outer_in<kIn, kOut>(q, gz, dy, i, o, outs, to);
          }
        }
    for (int64_t o = 0; o < c; ++o) {
      V total = {};
      for (int64_t g = 0; g < b_.groups; ++g)
        for (int64_t y = 0; y < b_.rows; ++y)
          for (int64_t x = 0; x < b_.columns; ++x) total += gz[b_.at(g, y, o) + x];
      by_bias[o] = sum<T>(total) * p_.bias_slope[o];
    }
  }

  template <int I, int OUT>
  void outer_in(const V* q, const V* gz, int dy, int64_t i, int64_t o, int64_t outs, T* to) {
    switch (outs) {
      case 1: return outer_block<I, 1>(q, gz, dy, i, o, to);
      case 2: return outer_block<I, 2>(q, gz, dy, i, o, to);
      case 3: return outer_block<I, 3>(q, gz, dy, i, o, to);
      default: return outer_block<I, OUT>(q, gz, dy, i, o, to);
    }
  }

  template <int I, int M>
  void outer_block(const V* q, const V* gz, int dy, int64_t i, int64_t o, T* to) {
    const int64_t c = p_.channels, r = b_.padding;
    V sums[I][SIDE][M];
    const int64_t y = std::max<int64_t>(0, r - dy), end = std::min(b_.rows, b_.rows + r - dy);
    outer_sums<T, SIDE, I, M>(q + b_.at(0, y + dy - r, i) - r, gz + b_.at(0, y, o), b_.groups,
                              b_.group(), end - y, c * b_.stride(), b_.columns, b_.stride(),
                              &sums[0][0][0]);
    for (int k = 0; k < I; ++k)
      for (int dx = 0; dx < SIDE; ++dx)
        for (int m = 0; m < M; ++m)
          to[(dx * c + k) * c + m] = sum<T>(sums[k][dx][m]) * p_.slope[o + m];
  }

  const Problem<T>& p_;
  Block<T> b_;
  Buffer<V> base_, floor_;
  Buffer<T> weights_, packed_, tangents_, bias_;
  std::optional<RegisterLayers<T>> in_registers_;
  int64_t channel_parts_, column_parts_;
};

}  // namespace
}  // namespace dnntk
