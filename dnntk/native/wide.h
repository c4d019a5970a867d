// Wide dense layers on a CPU: outputs, gradients, tangents, steps of gradient descent.
//
// A layer of hundreds of units is three matrix products, so all depends on how near to the peak
// they run. Every product is made of one kernel, a tile of 4 x 6 accumulators over a block of terms
// that stays in the first cache (`block`), and layouts are chosen so that no operand is transposed
// but the derivatives, which are the smallest:
//
//   z[n][out]  = sum_in q[n][in] W[in][out]     vectors along out, W copied panel by panel
//   D'[in][out] = sum_n q[n][in] g[n][out]      vectors along out
//   g[in][n]   = sum_out W[in][out] g[out][n]   vectors along n
//
// Every thread takes its own examples up and down, and its own rows of the weight gradient: the
// threads meet once a layer on the way down. With a rate the gradient is never stored: a layer's
// weights change as soon as no thread needs them any more.
//
// Sums go over the same terms in the same order whatever the number of threads.

#pragma once

#include "problem.h"
#include "team.h"

namespace {

#ifdef __AVX512F__
constexpr int kTall = 4, kBroad = 6;  // rows and vectors of a tile
#else
constexpr int kTall = 3, kBroad = 2;
#endif
constexpr int64_t kTerms = 96;     // of a product at a time
constexpr int64_t kExamples = 128;  // of a weight gradient at a time

// c[m][v] += sum over terms k of a[m row + k column] b[k][v].
template <class T, int M, int N>
void block(const T* a, int64_t row, int64_t column, int64_t terms, const Vec<T>* b, Vec<T>* c,
           int64_t stride) {
  Vec<T> acc[M][N];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) acc[m][v] = c[m * stride + v];
  for (int64_t k = 0; k < terms; ++k, a += column, b += N) {
    T factor[M];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) factor[m] = a[m * row];
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) {
      Vec<T> value = b[v];
      hold(value);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) acc[m][v] += value * factor[m];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) c[m * stride + v] = acc[m][v];
}

template <class T, int M>
void block_of(int n, const T* a, int64_t row, int64_t column, int64_t terms, const Vec<T>* b,
              Vec<T>* c) {
  switch (n) {
    case 1: return block<T, M, 1>(a, row, column, terms, b, c, n);
    case 2: return block<T, M, std::min(2, kBroad)>(a, row, column, terms, b, c, n);
    case 3: return block<T, M, std::min(3, kBroad)>(a, row, column, terms, b, c, n);
    case 4: return block<T, M, std::min(4, kBroad)>(a, row, column, terms, b, c, n);
    case 5: return block<T, M, std::min(5, kBroad)>(a, row, column, terms, b, c, n);
    default: return block<T, M, kBroad>(a, row, column, terms, b, c, n);
  }
}

// The same for any number of rows m: c is [m][n].
template <class T>
void product(int64_t m, int n, const T* a, int64_t row, int64_t column, int64_t terms,
             const Vec<T>* b, Vec<T>* c) {
  for (; m >= kTall; m -= kTall, a += kTall * row, c += kTall * n)
    block_of<T, kTall>(n, a, row, column, terms, b, c);
  for (; m > 0; --m, a += row, c += n) block_of<T, 1>(n, a, row, column, terms, b, c);
}

// `count` numbers, and zeros.
template <class T>
inline Vec<T> copied(const T* from, int64_t count) {
  Vec<T> v = {};
  if (count == kLanes<T>) std::memcpy(&v, from, kBytes);
  else std::memcpy(&v, from, count * sizeof(T));
  return v;
}

// A square of vectors, transposed in place.
template <class T>
void transpose(Vec<T>* v) {
  constexpr int lanes = kLanes<T>;
#if defined(__GNUC__) && !defined(__clang__)
  typedef typename std::conditional<sizeof(T) == 4, int32_t, int64_t>::type Integer;
  typedef Integer Index __attribute__((vector_size(kBytes)));
#pragma GCC unroll 4
  for (int s = lanes / 2; s > 0; s /= 2) {
    Index low, high;
#pragma GCC unroll 16
    for (int l = 0; l < lanes; ++l) {
      low[l] = l & s ? lanes + (l ^ s) : l;
      high[l] = l & s ? lanes + l : l ^ s;
    }
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) {
      if (i & s) continue;
      Vec<T> a = v[i], b = v[i + s];
      v[i] = __builtin_shuffle(a, b, low);
      v[i + s] = __builtin_shuffle(a, b, high);
    }
  }
#else
  T* x = reinterpret_cast<T*>(v);
  for (int i = 0; i < lanes; ++i)
    for (int j = 0; j < i; ++j) std::swap(x[i * lanes + j], x[j * lanes + i]);
#endif
}

// What all threads read, and where they leave for each other what a weight gradient needs.
// Arrays [examples][units] have `stride` vectors a row, zero beyond the units.
template <class T>
struct Shared {
  using V = Vec<T>;

  const Problem<T>& p;
  const int64_t vectors, stride, row;  // of units; of a row; of a row in numbers
  const int64_t examples;              // in whole vectors
  const int64_t threads;
  Buffer<V> slope, bias_slope, column, carry, base, floor;
  Buffer<V> q[2], g[3];  // of a layer: it takes turns, so that a slower thread may still read
  Barrier barrier;

  // Rows of an odd number of vectors do not all fall on the same lines of a cache.
  Shared(const Problem<T>& p, bool down)
      : p(p),
        vectors(parts(p.channels, kLanes<T>)),
        stride(vectors | 1),
        row(stride * kLanes<T>),
        examples(p.vectors() * kLanes<T>),
        threads(std::min<int64_t>(p.threads, p.vectors())),
        slope(stride), bias_slope(stride), column(stride), carry(stride),
        base(examples * stride), floor(examples * stride),
        q{Buffer<V>(down ? examples * stride : 1), Buffer<V>(down ? examples * stride : 1)},
        g{Buffer<V>(down ? examples * stride : 1), Buffer<V>(down ? examples * stride : 1),
          Buffer<V>(down ? examples * stride : 1)},
        barrier(threads) {
    const size_t bytes = p.channels * sizeof(T);
    std::memcpy(slope.data(), p.slope, bytes);
    std::memcpy(bias_slope.data(), p.bias_slope, bytes);
    std::memcpy(column.data(), p.column, bytes);
    std::memcpy(carry.data(), p.carry, bytes);
    arrange(p.base, 0, p.examples, base.data());
    arrange(p.floor, 0, p.examples, floor.data());
  }

  // Some examples of [units][examples], as rows.
  void arrange(const T* from, int64_t first, int64_t count, V* to) const {
    T* rows = reinterpret_cast<T*>(to);
    for (int64_t n = 0; n < std::min(count, p.examples - first); ++n)
      for (int64_t c = 0; c < p.channels; ++c) rows[n * row + c] = from[c * p.examples + first + n];
  }
};

// One thread's examples, and its rows of the weight gradient.
template <class T>
class Crew {
 public:
  using V = Vec<T>;
  static constexpr int64_t kWide = kBroad * kLanes<T>;

  Crew(Shared<T>& shared, int64_t number, bool down)
      : s_(shared),
        p_(shared.p),
        first_vector_(part(p_.vectors(), s_.threads, number)),
        own_vectors_(part(p_.vectors(), s_.threads, number + 1) - first_vector_),
        first(first_vector_ * kLanes<T>),
        rows(own_vectors_ * kLanes<T>),
        size(rows * s_.stride),
        in_(part(p_.channels, s_.threads, number)),
        ins_(part(p_.channels, s_.threads, number + 1) - in_),
        out_(part(s_.vectors, s_.threads, number)),
        outs_(part(s_.vectors, s_.threads, number + 1) - out_),
        sums_(std::max(rows, ins_) * kBroad),
        panel_(std::max(kTerms, kExamples) * kBroad),
        weights_(down ? p_.channels * kBroad : 1),
        g_(down ? p_.channels * own_vectors_ : 1),
        g_next_(down ? p_.channels * own_vectors_ : 1) {}

  // q = base + column h, of own examples
  void read(const V* h, V* q) const {
    const V* base = s_.base.data() + first * s_.stride;
    for (int64_t n = 0; n < rows; ++n)
      for (int64_t o = 0; o < s_.vectors; ++o) {
        const int64_t i = n * s_.stride + o;
        q[i] = base[i] + s_.column[o] * h[i];
      }
  }

  void column(const V* dh, V* dq) const {
    for (int64_t n = 0; n < rows; ++n)
      for (int64_t o = 0; o < s_.vectors; ++o)
        dq[n * s_.stride + o] = s_.column[o] * dh[n * s_.stride + o];
  }

  // State and q of layer `layer` to those of the next.
  void forward(int64_t layer, const V* h, const V* q, V* h_next, V* q_next) {
    const V *base = s_.base.data() + first * s_.stride, *floor = s_.floor.data() + first * s_.stride;
    panels([&](int64_t o, int n) {
      std::fill(sums_.data(), sums_.data() + rows * n, V{});
      times_weights(q, p_.kernel, layer, true, o, n);
      V bias[kBroad];
      for (int v = 0; v < n; ++v) bias[v] = biases(p_.bias, layer, true, o + v);
      for (int64_t e = 0; e < rows; ++e)
        for (int v = 0; v < n; ++v) {
          const int64_t i = e * s_.stride + o + v;
          V z = s_.carry[o + v] * h[i] + (sums_[e * n + v] + bias[v]);
          V next = z > floor[i] ? z : floor[i];
          h_next[i] = next;
          q_next[i] = base[i] + s_.column[o + v] * next;
        }
    });
  }

  // The same with tangents: of the parameters dk, db and of the state and q.
  void tangent(int64_t layer, const T* dk, const T* db, const V* h, const V* q, const V* dh,
               const V* dq, V* h_next, V* q_next, V* dh_next, V* dq_next) {
    forward(layer, h, q, h_next, q_next);
    const V* floor = s_.floor.data() + first * s_.stride;
    panels([&](int64_t o, int n) {
      std::fill(sums_.data(), sums_.data() + rows * n, V{});
      times_weights(dq, p_.kernel, layer, true, o, n);
      times_weights(q, dk, layer, false, o, n);
      for (int64_t e = 0; e < rows; ++e)
        for (int v = 0; v < n; ++v) {
          const int64_t i = e * s_.stride + o + v;
          V dz = s_.carry[o + v] * dh[i] + (sums_[e * n + v] + biases(db, layer, false, o + v));
          V next = h_next[i] > floor[i] ? dz : V{};
          dh_next[i] = next;
          dq_next[i] = s_.column[o + v] * next;
        }
    });
  }

  // Derivatives by the state h above the last layer, masked: to `g_` and the shared rows.
  void descend(const Head<T>& head, const V* h, V* g) {
    const V* floor = s_.floor.data() + first * s_.stride;
    for (int64_t e = 0; e < rows; ++e) {
      const T* state = reinterpret_cast<const T*>(h + e * s_.stride);
      const T* low = reinterpret_cast<const T*>(floor + e * s_.stride);
      T* to = reinterpret_cast<T*>(g + (first + e) * s_.stride);
      const int64_t n = first + e;
      std::fill(to, to + p_.channels, T{0});
      if (n < p_.examples)
        for (int64_t k = 0; k < p_.outputs; ++k) {
          const T* a = head.head + k * p_.channels;
          T f = head.offset[n * p_.outputs + k];
          for (int64_t c = 0; c < p_.channels; ++c) f += a[c] * state[c];
          T slope = head.factor[n] * f + head.shift[n * p_.outputs + k];
          for (int64_t c = 0; c < p_.channels; ++c) to[c] += a[c] * slope;
        }
      for (int64_t c = 0; c < p_.channels; ++c) {
        to[c] = state[c] > low[c] ? to[c] : T{0};
        by_unit(c, e) = to[c];
      }
    }
  }

  // From derivatives by a layer's z (in `g_`) to those by the state h that it read: masked, and as
  // rows in `g`, unless it is the lowest.
  void backward(int64_t layer, const V* h, V* g) {
    const int64_t c = p_.channels;
    std::fill(g_next_.data(), g_next_.data() + c * own_vectors_, V{});
    const int64_t blocks = parts(c, kWide);
    for (int64_t k = 0; k < blocks; ++k) {
      const int64_t o = k * kBroad, end = std::min<int64_t>(c, (k + 1) * kWide);
      const int n = std::min<int64_t>(kBroad, s_.vectors - o);
      weights(p_.kernel, layer, true, 0, c, o, n, weights_.data());
      over(own_vectors_, [&](int64_t v, int w) {
        product<T>(c, w, reinterpret_cast<const T*>(weights_.data()), n * kLanes<T>, 1,
                   end - o * kLanes<T>, g_.data() + c * v + o * kLanes<T> * w,
                   g_next_.data() + c * v);
      });
    }
    finish(h, g, layer > 0);
    std::swap_ranges(g_.data(), g_.data() + c * own_vectors_, g_next_.data());
  }

  // Own rows of a layer's gradient from all examples: for every row and panel,
  // finish(in, first vector of out, vectors, sums), which goes to `to`. Then its bias:
  // finish_bias(out vector, sum).
  template <class Finish, class FinishBias>
  void outer(const V* q, const V* g, const T* to, Finish finish, FinishBias finish_bias) {
    const int64_t blocks = parts(s_.examples, kExamples);
    panels([&](int64_t o, int n) {
      std::fill(sums_.data(), sums_.data() + ins_ * n, V{});
      for (int64_t e = 0; e < s_.examples; e += kExamples) {
        const int64_t count = std::min(kExamples, s_.examples - e), block = e / kExamples;
        for (int64_t i = part(ins_, blocks, block); i < part(ins_, blocks, block + 1); ++i)
          for (int v = 0; v < n; ++v)
            __builtin_prefetch(to + (in_ + i) * p_.channels + (o + v) * kLanes<T>, 1, 2);
        for (int64_t k = 0; k < count; ++k)
          for (int v = 0; v < n; ++v) panel_[k * n + v] = g[(e + k) * s_.stride + o + v];
        product<T>(ins_, n, reinterpret_cast<const T*>(q) + e * s_.row + in_, 1, s_.row, count,
                   panel_.data(), sums_.data());
      }
      for (int64_t i = 0; i < ins_; ++i) finish(in_ + i, o, n, sums_.data() + i * n);
    });
    for (int64_t o = out_; o < out_ + outs_; ++o) {
      V total = {};
      for (int64_t e = 0; e < s_.examples; ++e) total += g[e * s_.stride + o];
      finish_bias(o, total);
    }
  }

  // Own examples of [examples][units], and of the derivatives, to [units][examples].
  void store(const V* h, T* to) const {
    const T* from = reinterpret_cast<const T*>(h);
    for (int64_t c = 0; c < p_.channels; ++c)
      for (int64_t e = 0; e < std::min(rows, p_.examples - first); ++e)
        to[c * p_.examples + first + e] = from[e * s_.row + c];
  }
  void store_derivatives(T* to) {
    for (int64_t c = 0; c < p_.channels; ++c)
      for (int64_t e = 0; e < std::min(rows, p_.examples - first); ++e)
        to[c * p_.examples + first + e] = by_unit(c, e);
  }

  // How many numbers of vector `o` of the units are there.
  int64_t lanes(int64_t o) const {
    return std::max<int64_t>(0, std::min<int64_t>(kLanes<T>, p_.channels - o * kLanes<T>));
  }

 private:
  Shared<T>& s_;
  const Problem<T>& p_;
  int64_t first_vector_, own_vectors_;

 public:
  const int64_t first, rows, size;  // examples, and vectors of a state

 private:
  const int64_t in_, ins_, out_, outs_;
  Buffer<V> sums_, panel_, weights_, g_, g_next_;

  template <class F>
  static void over(int64_t vectors, F f) {
    const int64_t count = parts(vectors, kBroad);
    for (int64_t k = 0; k < count; ++k) {
      const int64_t v = part(vectors, count, k);
      f(v, static_cast<int>(part(vectors, count, k + 1) - v));
    }
  }
  template <class F>
  void panels(F f) const {
    over(s_.vectors, f);
  }

  // [panel of examples][unit][vectors of the panel]
  T& by_unit(int64_t c, int64_t e) {
    T* at = nullptr;
    over(own_vectors_, [&](int64_t v, int w) {
      if (e / kLanes<T> >= v && e / kLanes<T> < v + w)
        at = reinterpret_cast<T*>(g_.data() + p_.channels * v + c * w) + (e - v * kLanes<T>);
    });
    return *at;
  }

  // sums[example][panel] += q times the panel's columns of a layer's weights, or of what is to be
  // added to D alone.
  void times_weights(const V* q, const T* kernel, int64_t layer, bool whole, int64_t o, int n) {
    for (int64_t k = 0; k < p_.channels; k += kTerms) {
      const int64_t end = std::min(k + kTerms, p_.channels);
      weights(kernel, layer, whole, k, end, o, n, panel_.data());
      product<T>(rows, n, reinterpret_cast<const T*>(q) + k, s_.row, 1, end - k, panel_.data(),
                 sums_.data());
    }
  }

  // Rows [from, end) of the vectors o ... o + n of a layer's weights, zero beyond the units.
  void weights(const T* kernel, int64_t layer, bool whole, int64_t from, int64_t end, int64_t o,
               int n, V* to) const {
    const int64_t c = p_.channels;
    const bool matrices = whole && p_.initial == kMatrices;
    const T* d = kernel + layer * p_.weights() + from * c + o * kLanes<T>;
    const T* w = p_.initial_kernel + layer * p_.weights() + from * c + o * kLanes<T>;
    const int64_t last = lanes(o + n - 1);
    for (int64_t k = from; k < end; ++k, d += c, w += c)
      for (int v = 0; v < n; ++v) {
        const int64_t at = v * kLanes<T>, count = v == n - 1 ? last : kLanes<T>;
        V value = copied<T>(d + at, count), start = {};
        __builtin_prefetch(d + at + kTerms * c, 0, 2);
        if (matrices) start = copied<T>(w + at, count);
        *to++ = value * s_.slope[o + v] + start;
      }
    const int64_t random = p_.inputs - o * kLanes<T>;
    if (whole && p_.initial == kFeatures && random >= 0 && random < n * kLanes<T>) {
      T* start = reinterpret_cast<T*>(to - (end - from) * n) + random;
      const T* u = p_.initial_kernel + layer * p_.inputs;
      for (int64_t k = from; k < std::min(end, p_.inputs); ++k)
        start[(k - from) * n * kLanes<T>] += u[k];
    }
  }

  V biases(const T* bias, int64_t layer, bool whole, int64_t o) const {
    const int64_t at = layer * p_.channels + o * kLanes<T>;
    V value = copied<T>(bias + at, lanes(o)), start = {};
    if (whole && p_.initial == kMatrices) start = copied<T>(p_.initial_bias + at, lanes(o));
    const int64_t random = p_.inputs - o * kLanes<T>;
    if (whole && p_.initial == kFeatures && random >= 0 && random < kLanes<T>)
      start[random] = p_.initial_bias[layer];
    return value * s_.bias_slope[o] + start;
  }

  // `g_next_` holds W g: what the carry adds, the masks, and the same as rows.
  void finish(const V* h, V* g, bool masked) {
    constexpr int kSquare = kLanes<T>;
    const int64_t c = p_.channels;
    const V* floor = s_.floor.data() + first * s_.stride;
    over(own_vectors_, [&](int64_t v, int w) {
      V *next = g_next_.data() + c * v, *old = g_.data() + c * v;
      for (int64_t o = 0; o < s_.vectors; ++o)
        for (int x = 0; x < w; ++x) {
          V square[kSquare] = {};
          const int64_t units = lanes(o);
          for (int64_t i = 0; i < units; ++i) {
            const int64_t at = (o * kSquare + i) * w + x;
            square[i] = s_.column[o][i] * next[at] + s_.carry[o][i] * old[at];
          }
          if (masked) {
            transpose<T>(square);
            const int64_t e = (v + x) * kSquare;
            for (int i = 0; i < kSquare; ++i) {
              const int64_t at = (e + i) * s_.stride + o;
              square[i] = h[at] > floor[at] ? square[i] : V{};
              g[first * s_.stride + at] = square[i];
            }
            transpose<T>(square);
          }
          for (int64_t i = 0; i < units; ++i) next[(o * kSquare + i) * w + x] = square[i];
        }
    });
  }
};

// work(crew of a thread) on every thread; `make` gets their memory before the first one starts.
template <class T, class Make, class Work>
void over_crews(Shared<T>& shared, bool down, Make make, Work work) {
  using Own = decltype(make(std::declval<Crew<T>&>()));
  std::vector<std::unique_ptr<Crew<T>>> crews;
  std::vector<Own> own;
  for (int64_t k = 0; k < shared.threads; ++k) {
    crews.emplace_back(new Crew<T>(shared, k, down));
    own.push_back(make(*crews.back()));
  }
  Team::run(shared.threads, [&](int64_t k) { work(*crews[k], *own[k]); });
}

template <class T>
void wide_forward(const Problem<T>& p, T* h_out) {
  using V = Vec<T>;
  Shared<T> shared(p, false);
  over_crews<T>(
      shared, false,
      [](Crew<T>& crew) { return std::unique_ptr<Buffer<V>>(new Buffer<V>(3 * crew.size)); },
      [&](Crew<T>& crew, Buffer<V>& own) {
        V *h = own.data(), *q = h + crew.size, *next = q + crew.size;
        shared.arrange(p.h0, crew.first, crew.rows, h);
        crew.read(h, q);
        for (int64_t layer = 0; layer < p.layers; ++layer, std::swap(q, next))
          crew.forward(layer, h, q, h, next);
        crew.store(h, h_out);
      });
}

template <class T>
void wide_tangent(const Problem<T>& p, const T* dk, const T* db, const T* dh0, T* h_out,
                  T* dh_out) {
  using V = Vec<T>;
  Shared<T> shared(p, false);
  over_crews<T>(
      shared, false,
      [](Crew<T>& crew) { return std::unique_ptr<Buffer<V>>(new Buffer<V>(6 * crew.size)); },
      [&](Crew<T>& crew, Buffer<V>& own) {
        const int64_t size = crew.size;
        V *h = own.data(), *dh = h + size, *q = dh + size, *q_next = q + size, *dq = q + 2 * size,
          *dq_next = q + 3 * size;
        shared.arrange(p.h0, crew.first, crew.rows, h);
        shared.arrange(dh0, crew.first, crew.rows, dh);
        crew.read(h, q);
        crew.column(dh, dq);
        for (int64_t layer = 0; layer < p.layers; ++layer) {
          crew.tangent(layer, dk, db, h, q, dh, dq, h, q_next, dh, dq_next);
          std::swap(q, q_next);
          std::swap(dq, dq_next);
        }
        crew.store(h, h_out);
        crew.store(dh, dh_out);
      });
}

// The gradient goes to `kernel` and `bias`; with a rate they are the parameters themselves, which
// make a step.
template <class T>
void wide_gradient(const Problem<T>& p, const Head<T>& head, const T* rate, T* h_out, T* dh0,
                   T* kernel, T* bias) {
  using V = Vec<T>;
  Shared<T> shared(p, true);
  const int64_t below = p.layers - p.kept, segments = parts(below, p.segment), c = p.channels;
  struct Own {
    Own(int64_t size, int64_t starts, int64_t states)
        : states(states * size, false), starts(starts * size, false), scratch(2 * size) {
      std::fill(this->states.data(), this->states.data() + size, V{});
    }
    Buffer<V> states, starts, scratch;
  };
  over_crews<T>(
      shared, true,
      [&](Crew<T>& crew) {
        const int64_t most = std::max(p.kept, std::min(p.segment, below));
        return std::unique_ptr<Own>(new Own(crew.size, segments, most + 1));
      },
      [&](Crew<T>& crew, Own& own) {
        const int64_t size = crew.size;
        V *q = own.scratch.data(), *q_next = q + size;
        auto state = [&](int64_t k) { return own.states.data() + k * size; };
        auto start = [&](int64_t k) { return own.starts.data() + k * size; };
        auto run = [&](int64_t from, int64_t end, bool keep) {
          crew.read(state(0), q);
          for (int64_t layer = from; layer < end; ++layer, std::swap(q, q_next)) {
            const int64_t k = keep ? layer - from : 0;
            crew.forward(layer, state(k), q, state(keep ? k + 1 : 0), q_next);
          }
        };
        auto down = [&](int64_t from, int64_t end) {
          for (int64_t layer = end - 1; layer >= from; --layer) {
            V *all_q = shared.q[layer % 2].data(), *g = shared.g[layer % 3].data();
            const V* h = state(layer - from);
            crew.read(h, all_q + crew.first * shared.stride);
            crew.backward(layer, h, shared.g[(layer + 2) % 3].data());
            // All have left their examples here, and read the weights.
            shared.barrier.wait();
            T *k = kernel + layer * p.weights(), *b = bias + layer * c;
            auto put = [&](V value, V slope, int64_t o, T* at) {
              const int64_t lanes = crew.lanes(o);
              value *= slope;
              if (rate != nullptr) value = copied<T>(at, lanes) - *rate * value;
              if (lanes == kLanes<T>) std::memcpy(at, &value, kBytes);
              else std::memcpy(at, &value, lanes * sizeof(T));
            };
            crew.outer(
                all_q, g, k,
                [&](int64_t in, int64_t o, int n, const V* sums) {
                  for (int v = 0; v < n; ++v)
                    put(sums[v], shared.slope[o + v], o + v, k + in * c + (o + v) * kLanes<T>);
                },
                [&](int64_t o, V sum) { put(sum, shared.bias_slope[o], o, b + o * kLanes<T>); });
          }
        };
        shared.arrange(p.h0, crew.first, crew.rows, state(0));
        for (int64_t k = 0; k < segments; ++k) {
          std::copy(state(0), state(1), start(k));
          run(k * p.segment, std::min(below, (k + 1) * p.segment), false);
        }
        run(below, p.layers, true);
        crew.store(state(p.kept), h_out);
        crew.descend(head, state(p.kept), shared.g[(p.layers - 1) % 3].data());
        down(below, p.layers);
        for (int64_t k = segments - 1; k >= 0; --k) {
          const int64_t from = k * p.segment, end = std::min(below, from + p.segment);
          std::copy(start(k), start(k) + size, state(0));
          run(from, end, true);
          down(from, end);
        }
        crew.store_derivatives(dh0);
      });
}

}  // namespace
