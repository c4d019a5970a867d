// Many steps of gradient descent on a whole narrow dense network in one call.
//
// Returning to JAX between two steps takes as long as twenty layers of a narrow network: its first
// and last layer would be operations of their own, and the threads would have to be woken again.
// Here every thread keeps its block of examples and its own copy of the first and the last layer;
// all threads change their copies alike. There is one barrier a step.

#pragma once

#include "narrow_passes.h"

namespace dnntk {
namespace {

// The first and the last layer for one thread: its copy of the parameters, and its block of
// examples.
template <class T>
class ThreadEnds {
 public:
  using V = Vec<T>;

  ThreadEnds(const Problem<T>& p, const EndLayers<T>& ends, const Block<T>& block)
      : p_(p),
        ends_(ends),
        block_(block),
        columns_(block.columns),
        x_(ends.inputs * columns_),
        start_(block.size()),
        base_(block.size()),
        floor_(block.size()),
        offset_(ends.untrained.outputs * columns_),
        factor_(columns_),
        shift_(ends.untrained.outputs * columns_),
        slope_(columns_),
        own_(size(p, ends)) {
    const int64_t c = p.channels, k = ends.untrained.outputs;
    first_ = own_.data();
    first_bias_ = first_ + ends.inputs * c;
    last_ = first_bias_ + c;
    last_bias_ = last_ + c * k;
    std::copy(ends.first.kernel, ends.first.kernel + ends.inputs * c, first_);
    std::copy(ends.first.bias, ends.first.bias + c, first_bias_);
    std::copy(ends.last.kernel, ends.last.kernel + c * k, last_);
    std::copy(ends.last.bias, ends.last.bias + k, last_bias_);
    load(p, block, p.h0, start_.data());
    load(p, block, p.base, base_.data());
    load(p, block, p.floor, floor_.data());
    load_examples(ends.x, ends.inputs, p.examples, 1, x_.data());
    load_examples(ends.untrained.offset, k, 1, k, offset_.data());
    load_examples(ends.untrained.shift, k, 1, k, shift_.data());
    load_examples(ends.untrained.factor, 1, 0, 1, factor_.data());
  }

  // The number of parameters: first kernel and bias, last kernel and bias.
  static int64_t size(const Problem<T>& p, const EndLayers<T>& ends) {
    return (ends.inputs + 1) * p.channels + (p.channels + 1) * ends.untrained.outputs;
  }

  // The first layer's state to `h`.
  void first_layer(V* h) const {
    const int64_t channels = p_.channels;
    const T *slope = ends_.first.slopes, *bias_slope = slope + channels;
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t v = 0; v < columns_; ++v) {
        const int64_t at = c * columns_ + v;
        V z = start_[at] + first_bias_[c] * bias_slope[c];
        for (int64_t i = 0; i < ends_.inputs; ++i)
          z += x_[i * columns_ + v] * (first_[i * channels + c] * slope[c]);
        h[at] = z > floor_[at] ? z : floor_[at];
      }
  }

  // Derivatives by the state `h` below the last layer to `g`, the last layer's gradient to its part
  // of `sums`, and the outputs [n, k] to `to` unless that is nullptr.
  void last_layer(const V* h, V* g, T* sums, T* to) {
    const int64_t channels = p_.channels, many = outputs();
    const T *slope = ends_.last.slopes, *bias_slope = slope + many;
    T *by_kernel = sums + (last_ - first_), *by_bias = sums + (last_bias_ - first_);
    std::fill(g, g + block_.size(), V{});
    for (int64_t k = 0; k < many; ++k) {
      const T* head = ends_.untrained.head + k * channels;
      V total = {};
      for (int64_t v = 0; v < columns_; ++v) {
        V f = offset_[k * columns_ + v] + last_bias_[k] * bias_slope[k];
        for (int64_t c = 0; c < channels; ++c)
          f += h[c * columns_ + v] * head[c] + q(h, c, v) * (last_[c * many + k] * slope[k]);
        slope_[v] = factor_[v] * f + shift_[k * columns_ + v];
        total += slope_[v];
        if (to == nullptr) continue;
        const int64_t n = (block_.first + v) * kLanes<T>;
        for (int64_t lane = 0; lane < kLanes<T> && n + lane < p_.examples; ++lane)
          to[(n + lane) * many + k] = f[lane];
      }
      by_bias[k] = sum<T>(total) * bias_slope[k];
      for (int64_t c = 0; c < channels; ++c) {
        const T weight = head[c] + p_.column[c] * last_[c * many + k] * slope[k];
        V products = {};
        for (int64_t v = 0; v < columns_; ++v) {
          g[c * columns_ + v] += slope_[v] * weight;
          products += q(h, c, v) * slope_[v];
        }
        by_kernel[c * many + k] = sum<T>(products) * slope[k];
      }
    }
  }

  // The first layer's gradient to its part of `sums`, from derivatives by the state `h` above it.
  void first_gradient(const V* h, const V* g, T* sums) const {
    const int64_t channels = p_.channels;
    const T *slope = ends_.first.slopes, *bias_slope = slope + channels;
    T* by_bias = sums + (first_bias_ - first_);
    for (int64_t c = 0; c < channels; ++c) {
      auto z = [&](int64_t v) {
        const int64_t at = c * columns_ + v;
        return h[at] > floor_[at] ? g[at] : V{};
      };
      V total = {};
      for (int64_t v = 0; v < columns_; ++v) total += z(v);
      by_bias[c] = sum<T>(total) * bias_slope[c];
      for (int64_t i = 0; i < ends_.inputs; ++i) {
        V products = {};
        for (int64_t v = 0; v < columns_; ++v) products += x_[i * columns_ + v] * z(v);
        sums[i * channels + c] = sum<T>(products) * slope[c];
      }
    }
  }

  // A step of gradient descent by all blocks' `sums`, added up in the order of the blocks.
  void take_step(T rate, const T* sums, int64_t blocks) {
    const int64_t size = this->size(p_, ends_);
    for (int64_t i = 0; i < size; ++i) {
      T total = sums[i];
      for (int64_t block = 1; block < blocks; ++block) total += sums[block * size + i];
      first_[i] -= rate * total;
    }
  }

  void store_parameters(const Trained<T>& to) const {
    std::copy(first_, first_bias_, to.first_kernel);
    std::copy(first_bias_, last_, to.first_bias);
    std::copy(last_, last_bias_, to.last_kernel);
    std::copy(last_bias_, last_bias_ + outputs(), to.last_bias);
  }

 private:
  int64_t outputs() const { return ends_.untrained.outputs; }

  V q(const V* h, int64_t c, int64_t v) const {
    const int64_t at = c * columns_ + v;
    return base_[at] + h[at] * p_.column[c];
  }

  // The block's examples of `rows` rows of an array, zero in lanes without an example.
  void load_examples(const T* from, int64_t rows, int64_t a_row, int64_t an_example, V* to) const {
    T* lanes = reinterpret_cast<T*>(to);
    const int64_t first = block_.first * kLanes<T>;
    const int64_t count = std::min<int64_t>(columns_ * kLanes<T>, p_.examples - first);
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t n = 0; n < count; ++n)
        lanes[row * columns_ * kLanes<T> + n] = from[row * a_row + (first + n) * an_example];
  }

  const Problem<T>& p_;
  const EndLayers<T>& ends_;
  const Block<T> block_;
  const int64_t columns_;
  Buffer<V> x_, start_, base_, floor_, offset_, factor_, shift_, slope_;
  Buffer<T> own_;
  T *first_, *first_bias_, *last_, *last_bias_;
};

template <class T>
void narrow_sgd_steps(const Problem<T>& p, const EndLayers<T>& ends, T rate, int64_t count,
                      T* outputs, const Trained<T>& to) {
  const int64_t size = ThreadEnds<T>::size(p, ends);
  const Rates<T> rates{rate, 1};
  GradientSums<T> sums(p, &rates, to.kernel, to.bias);
  // Twice: a thread may begin a step while another still reads the sums of the previous step.
  Buffer<T> at_ends(2 * p.blocks * size);
  Barrier barrier(p.blocks);
  over_blocks<Scratch<T>>(p, [&](const Block<T>& block, int64_t number, Scratch<T>& own,
                                 const Failed& failed) {
    NarrowWorker<T, 1> worker(p, block);
    ThreadEnds<T> own_ends(p, ends, block);
    BlockGradient<T, 1> gradient(p, worker, own, sums, failed);
    Vec<T>* h0 = own.states.data();
    for (int64_t step = 0; step < count; ++step) {
      T* all = at_ends.data() + step % 2 * p.blocks * size;
      T *mine = all + number * size, *f = step == count - 1 ? outputs : nullptr;
      own_ends.first_layer(h0);
      auto top = [&](const Vec<T>* h, Vec<T>* g) { own_ends.last_layer(h, g, mine, f); };
      const Vec<T>* g = gradient(step, number, top);
      if (g == nullptr) return;
      own_ends.first_gradient(h0, g, mine);
      if (!barrier.wait(&failed)) return;
      own_ends.take_step(rate, all, p.blocks);
    }
    if (number == 0) own_ends.store_parameters(to);
  });
}

}  // namespace
}  // namespace dnntk
