// Step after step of gradient descent on a whole narrow dense network, in one call.
//
// Between two calls lies as much as twenty layers of a narrow network take: its first and last layer
// as operations of their own, and threads that have to be found again. Here every thread keeps its
// block of examples, and a first and a last layer of its own, which change alike in all of them; they
// meet once a step.

#pragma once

// Included behind what it is made of, the workers and sums of middle.cc.

namespace {

// The first or the last layer: what is trained, [in, out] and [out], and [2, out] derivatives of its
// weights and of its biases by that.
template <class T>
struct End {
  const T *kernel, *bias, *slopes;
};

template <class T>
struct Ends {
  int64_t inputs;
  const T* x;  // [inputs, 1, n]
  End<T> first, last;
  Head<T> untrained;  // the last layer without what is trained of it
};

// Both ends as one thread has them: parameters of its own, and its block's examples.
template <class T>
class OwnEnds {
 public:
  using V = Vec<T>;

  OwnEnds(const Problem<T>& p, const Ends<T>& ends, const Block<T>& block)
      : p_(p),
        ends_(ends),
        block_(block),
        columns_(block.columns),
        x_(ends.inputs * columns_),
        start_(block.size()),
        base_(block.size()),
        floor_(block.size()),
        offset_(p.outputs * columns_),
        factor_(columns_),
        shift_(p.outputs * columns_),
        slope_(columns_),
        own_(size(p, ends)) {
    const int64_t c = p.channels, k = p.outputs;
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
    take(ends.x, ends.inputs, p.examples, 1, x_.data());
    take(ends.untrained.offset, k, 1, k, offset_.data());
    take(ends.untrained.shift, k, 1, k, shift_.data());
    take(ends.untrained.factor, 1, 0, 1, factor_.data());
  }

  // How many parameters both have: first kernel and bias, last kernel and bias.
  static int64_t size(const Problem<T>& p, const Ends<T>& ends) {
    return (ends.inputs + 1) * p.channels + (p.channels + 1) * p.outputs;
  }

  // The state above the first layer.
  void enter(V* h) const {
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
  // of `sums`, and, where they are asked for, the outputs [n, k].
  void leave(const V* h, V* g, T* sums, T* outputs) {
    const int64_t channels = p_.channels, many = p_.outputs;
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
        if (outputs == nullptr) continue;
        const int64_t n = (block_.first + v) * kLanes<T>;
        for (int64_t lane = 0; lane < kLanes<T> && n + lane < p_.examples; ++lane)
          outputs[(n + lane) * many + k] = f[lane];
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
  void below(const V* h, const V* g, T* sums) const {
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

  // A step against the sum of all blocks' `sums`, in their order.
  void descend(T rate, const T* sums, int64_t blocks) {
    const int64_t size = this->size(p_, ends_);
    for (int64_t i = 0; i < size; ++i) {
      T total = sums[i];
      for (int64_t block = 1; block < blocks; ++block) total += sums[block * size + i];
      first_[i] -= rate * total;
    }
  }

  // First kernel and bias, last kernel and bias.
  void give(T* const results[4]) const {
    std::copy(first_, first_bias_, results[0]);
    std::copy(first_bias_, last_, results[1]);
    std::copy(last_, last_bias_, results[2]);
    std::copy(last_bias_, last_bias_ + p_.outputs, results[3]);
  }

 private:
  V q(const V* h, int64_t c, int64_t v) const {
    const int64_t at = c * columns_ + v;
    return base_[at] + h[at] * p_.column[c];
  }

  // The block's examples of `rows` rows of an array; where there is no example there is zero.
  void take(const T* from, int64_t rows, int64_t a_row, int64_t an_example, V* to) const {
    T* lanes = reinterpret_cast<T*>(to);
    const int64_t first = block_.first * kLanes<T>;
    const int64_t count = std::min<int64_t>(columns_ * kLanes<T>, p_.examples - first);
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t n = 0; n < count; ++n)
        lanes[row * columns_ * kLanes<T> + n] = from[row * a_row + (first + n) * an_example];
  }

  const Problem<T>& p_;
  const Ends<T>& ends_;
  const Block<T> block_;
  const int64_t columns_;
  Buffer<V> x_, start_, base_, floor_, offset_, factor_, shift_, slope_;
  Buffer<T> own_;
  T *first_, *first_bias_, *last_, *last_bias_;
};

// `count` steps; results: outputs before the last one, middle kernel and bias, which are the
// problem's own, and what `OwnEnds::give` gives.
template <class T>
void steps(const Problem<T>& p, const Ends<T>& ends, const T* rate, int64_t count,
           T* const results[7]) {
  if (!p.dense() || p.blocks > p.threads)
    throw std::invalid_argument("dnntk: steps at once are for dense layers and a thread a block");
  const int64_t size = OwnEnds<T>::size(p, ends);
  const Rates<T> rates{*rate, 1};
  Sums<T> sums(p, &rates, results[1], results[2]);
  // One step's are still read where another thread has begun the next.
  Buffer<T> at_ends(2 * p.blocks * size);
  Barrier barrier(p.blocks);
  over_blocks<Scratch<T>>(p, [&](const Block<T>& block, int64_t number, Scratch<T>& own,
                                 const Failed& failed) {
    Worker<T, 1> worker(p, block);
    OwnEnds<T> own_ends(p, ends, block);
    Vec<T>* h0 = own.states.data();
    for (int64_t step = 0; step < count; ++step) {
      T* all = at_ends.data() + step % 2 * p.blocks * size;
      T *mine = all + number * size, *outputs = step == count - 1 ? results[0] : nullptr;
      own_ends.enter(h0);
      auto top = [&](const Vec<T>* h, Vec<T>* g) { own_ends.leave(h, g, mine, outputs); };
      const Vec<T>* g = up_and_down(p, worker, own, sums, step, number, failed, top);
      if (g == nullptr) return;
      own_ends.below(h0, g, mine);
      if (!barrier.wait(&failed)) return;
      own_ends.descend(*rate, all, p.blocks);
    }
    if (number == 0) own_ends.give(results + 3);
  });
}

}  // namespace
