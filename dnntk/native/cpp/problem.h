// What a call of the CPU library computes: its arrays, how they are split, and its five functions.
//
// A layer is h' = max(carry h + W q + b, floor) with q = base + column h (Form in
// dnntk/networks/layers.py). W is a convolution or a matrix, and W = initial W + slope D where D is
// trained.

#pragma once

#include <cstdint>
#include <string_view>

namespace dnntk {

// What W holds beside the trained D: nothing, a matrix a layer, or the random unit's weights.
enum class Initial { kNone, kMatrices, kFeatures };

// The keyword arguments of every function.
struct Settings {
  int64_t side, rows, columns, inputs, threads;
  int64_t blocks, segment;  // blocks of examples; layers that are recomputed together
  bool wide;                // as matrix products (wide.h)?
  int64_t kept, group;      // last layers whose states are kept; layers between barriers
  std::string_view initial_name;
};

// The settings and operands that every function has, as JAX hands them over.
template <class T>
struct Problem : Settings {
  int64_t layers, channels, examples;
  Initial initial;
  const T *kernel, *bias;                        // [layers, side, side, in, out], [layers, out]
  const T *initial_kernel, *initial_bias;        // as above, or features, or nothing
  const T *slope, *bias_slope, *column, *carry;  // [channels]
  const T *base, *floor, *h0;                    // [channels, positions, examples]

  int64_t padding() const { return side / 2; }
  bool dense() const { return side == 1 && rows == 1 && columns == 1; }
  int64_t positions() const { return rows * (columns + padding()); }
  int64_t weights() const { return side * side * channels * channels; }
};

// The last layer: outputs are f = head h + offset, and the derivatives by them f * factor + shift.
template <class T>
struct Head {
  int64_t outputs;
  const T *head, *offset, *factor, *shift;  // [k, channels, positions], [n, k], [n], [n, k]
};

// A step of gradient descent: parameters become keep * parameters - rate * gradient. If several
// devices share the batch, keep is 1 on the first and 0 on the others: their results add up to the
// step.
template <class T>
struct Rates {
  T rate, keep;
};

// The first or the last layer: what is trained, [in, out] and [out], and the derivatives of its
// weights and of its biases by that, [2, out].
template <class T>
struct EndLayer {
  const T *kernel, *bias, *slopes;
};

template <class T>
struct EndLayers {
  int64_t inputs;
  const T* x;  // [inputs, 1, n]
  EndLayer<T> first, last;
  Head<T> untrained;  // the last layer without what is trained of it
};

// Parameters of a whole network.
template <class T>
struct Trained {
  T *kernel, *bias, *first_kernel, *first_bias, *last_kernel, *last_bias;
};

// `size` split into parts of at most `most`, as even as possible: the number of parts, and where
// part `k` begins.
inline int64_t parts(int64_t size, int64_t most) { return (size + most - 1) / most; }
inline int64_t part(int64_t size, int64_t count, int64_t k) { return size * k / count; }

// ---- layers.cc, in float and double

template <class T>
void forward(const Problem<T>& p, T* h);

// Along dk, db and dh0.
template <class T>
void tangent(const Problem<T>& p, const T* dk, const T* db, const T* dh0, T* h, T* dh);

// With `rates`, `kernel` and `bias` are the parameters, which take a step; otherwise they become
// the gradient.
template <class T>
void gradient(const Problem<T>& p, const Head<T>& head, const Rates<T>* rates, T* h, T* dh0,
              T* kernel, T* bias);

// `count` steps of gradient descent of a narrow dense network in place. p.h0 is the first layer's z
// without its trained parameters; `outputs` are those before the last step.
template <class T>
void sgd_steps(const Problem<T>& p, const EndLayers<T>& ends, T rate, int64_t count, T* outputs,
           const Trained<T>& to);

}  // namespace dnntk
