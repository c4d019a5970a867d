// Wide dense layers on a CPU; `wide_passes.h` goes up and down through all of them.
//
// A layer of hundreds of units is three matrix products, so all depends on how near to the peak
// they run. Every product is made of one kernel, a tile of 4 x 6 (or 3 x 4) accumulators over a block of terms
// that stays in the first cache (`block`). Examples are the lanes of every vector but those of a
// weight gradient, so of all operands only the derivatives are transposed:
//
//   z[out][n]   = sum_in W[in][out] q[in][n]    vectors along n
//   g[in][n]    = sum_out W[in][out] g[out][n]  vectors along n
//   D'[in][out] = sum_n q[in][n] g[n][out]      vectors along out
//
// Weights are made ready a few at a time, [terms] x [units], while those that come next are on
// their way from memory; whatever is done to a result is done to each few units of it at once.
//
// Every thread takes its own examples up and down, and its own rows of the weight gradient: on the
// way down the threads meet once in a few layers, as many as fit a part of a cache. Whoever is taken
// off its core stops the others there; where a layer is short, that would be most of the time. With
// rates the gradient is never stored: layers' weights change as soon as no thread needs them any
// more.
//
// Units that are at zero in all examples take no part (`active.h`).
//
// Sums go over the same terms in the same order whatever the number of threads.

#pragma once

#include "active_units.h"
#include "negligible_products.h"
#include "problem.h"
#include "thread_team.h"

namespace {

constexpr int kTall = kRegisters == 32 ? 4 : 3, kBroad = kRegisters == 32 ? 6 : 4;  // of a tile
// Vectors of units that are gone through together: whole tiles, and a cache line at least.
constexpr int kFew = kRegisters == 32 ? kInLine : 3;
constexpr int64_t kTerms = 96, kTermsDown = 800;  // of a product at a time, on the way up and down
constexpr int64_t kRows = 8;                      // of weights that are made ready together
constexpr int64_t kTogether = 64, kTogetherBytes = 1 << 20;  // between two meetings, at most

// How many layers are gone down before the threads meet, if one's q takes so many bytes.
inline int64_t together(int64_t layers, size_t bytes) {
  const int64_t fit = kTogetherBytes / std::max<size_t>(bytes, 1);
  return std::max<int64_t>(1, std::min({fit, kTogether, layers}));
}

// What is needed next, on its way from memory while something else is multiplied: `rows` of `width`
// numbers, `stride` apart, or those `listed`, a line every few of so many terms. All at once would hold
// up the processor, which waits as soon as some ten are under way.
template <class T>
class Ahead {
 public:
  enum Use { kRead, kWrite };

  Ahead(Use use, const T* first, int64_t rows, int64_t width, int64_t stride, int64_t terms,
        const int32_t* listed = nullptr)
      : first_(first), listed_(listed), rows_(width > 0 ? rows : 0), width_(width), stride_(stride),
        use_(use) {
    const int64_t lines = rows_ * (parts(width - 1, kStep) + 1);
    every = lines > 0 ? std::max<int64_t>(1, terms / lines) : terms;
  }

  void next() {
    if (rows_ <= 0) return;
    const T* line = first_ + (listed_ ? *listed_ * stride_ : 0) + std::min(done_, width_ - 1);
    if (use_ == kWrite) __builtin_prefetch(line, 1, 2);
    else __builtin_prefetch(line, 0, 2);
    done_ += kStep;
    if (done_ < width_ + kStep - 1) return;
    done_ = 0;
    if (listed_) ++listed_;
    else first_ += stride_;
    --rows_;
  }

  int64_t every;  // terms from line to line

 private:
  static constexpr int64_t kStep = kLine / sizeof(T);
  const T* first_;
  const int32_t* listed_;
  int64_t rows_, width_, stride_, done_ = 0;
  Use use_;
};

// Some terms of a sum: a[m row + k column] for the rows m of a tile, of k from 0 on or as listed.
template <class T>
struct Terms {
  const T* a;
  int64_t row, column, count;
  const int32_t* listed = nullptr;
};

// c[m][v] = or += sum over terms k of a[m row + k column] b[k][v], of `many` stretches of them, or one
// that is listed.
template <class T, bool kListed, int M, int N>
void block(const Terms<T>* terms, int64_t many, int64_t first, const Vec<T>* b, bool fresh,
           Ahead<T>& ahead, Vec<T>* c) {
  Vec<T> acc[M][N];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) acc[m][v] = fresh ? Vec<T>{} : c[m * N + v];
  for (int64_t s = 0; s < many; ++s) {
    const int64_t row = terms[s].row, column = terms[s].column;
    const T* a = terms[s].a + first * row;
    const int32_t* listed = terms[s].listed;
    for (int64_t left = terms[s].count; left > 0; left -= ahead.every) {
      ahead.next();
      for (int64_t k = std::min(left, ahead.every); k > 0; --k) {
        const T* at = kListed ? a + *listed * column : a;
        const Vec<T>* with = kListed ? b + *listed * N : b;
        T factor[M];
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) factor[m] = at[m * row];
#pragma GCC unroll 8
        for (int v = 0; v < N; ++v) {
          Vec<T> value = with[v];
          hold(value);
#pragma GCC unroll 8
          for (int m = 0; m < M; ++m) acc[m][v] += value * factor[m];
        }
        if (kListed) {
          ++listed;
        } else {
          a += column;
          b += N;
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) c[m * N + v] = acc[m][v];
}

// The same for rows first ... end: c is [m][N], from the first on.
template <class T, bool kListed, int N>
void rows_of(const Terms<T>* terms, int64_t many, int64_t first, int64_t end, const Vec<T>* b,
             bool fresh, Ahead<T>& ahead, Vec<T>* c) {
  auto rows = [&](auto m) {
    block<T, kListed, std::min<int>(m, kTall), N>(terms, many, first, b, fresh, ahead, c);
  };
  for (; end - first >= kTall; first += kTall, c += kTall * N)
    rows(std::integral_constant<int, kTall>());
  switch (end - first) {
    case 3: return rows(std::integral_constant<int, 3>());
    case 2: return rows(std::integral_constant<int, 2>());
    case 1: return rows(std::integral_constant<int, 1>());
  }
}

// And for any number of vectors n <= kBroad.
template <class T, bool kListed>
void product_of(const Terms<T>* terms, int64_t many, int64_t first, int64_t end, int n,
                const Vec<T>* b, bool fresh, Ahead<T>& ahead, Vec<T>* c) {
  auto vectors = [&](auto most) {
    rows_of<T, kListed, std::min<int>(most, kBroad)>(terms, many, first, end, b, fresh, ahead, c);
  };
  switch (n) {
    case 1: return vectors(std::integral_constant<int, 1>());
    case 2: return vectors(std::integral_constant<int, 2>());
    case 3: return vectors(std::integral_constant<int, 3>());
    case 4: return vectors(std::integral_constant<int, 4>());
    case 5: return vectors(std::integral_constant<int, 5>());
    default: return vectors(std::integral_constant<int, kBroad>());
  }
}
template <class T>
void product(const Terms<T>* terms, int64_t many, int64_t first, int64_t end, int n,
             const Vec<T>* b, bool fresh, Ahead<T>& ahead, Vec<T>* c) {
  if (terms->listed) product_of<T, true>(terms, many, first, end, n, b, fresh, ahead, c);
  else product_of<T, false>(terms, many, first, end, n, b, fresh, ahead, c);
}

// f(first, how many) for panels of `vectors`, at most kBroad each.
template <class F>
inline void over_panels(int64_t vectors, F f) {
  const int64_t count = parts(vectors, kBroad);
  for (int64_t k = 0; k < count; ++k) {
    const int64_t v = part(vectors, count, k);
    f(v, static_cast<int>(part(vectors, count, k + 1) - v));
  }
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
//
// Arrays by unit are [thread][panel of its examples][unit][vectors of the panel]; derivatives are
// also there by example, [panel of units][example][vectors of the panel], zero beyond the units. On the
// way down `q` and `g` are of active units alone, those of all threads.
template <class T>
struct Shared {
  using V = Vec<T>;

  const Problem<T>& p;
  const int64_t vectors;   // of units
  const int64_t examples;  // in whole vectors
  const int64_t threads;
  Buffer<V> slope, bias_slope, base, floor;
  const int64_t group;  // layers between two meetings on the way down
  Ring<V> q, g;         // of two groups, so that a slower thread may still read
  Active active;
  Barrier barrier;

  Shared(const Problem<T>& p, bool down)
      : p(p),
        vectors(parts(p.channels, kLanes<T>)),
        examples(p.vectors() * kLanes<T>),
        threads(std::min<int64_t>(p.threads, p.vectors())),
        slope(vectors), bias_slope(vectors), base(by_unit()), floor(by_unit()),
        group(together(p.layers, by_unit() * sizeof(V))),
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
  int64_t begin(int64_t thread) const { return part(p.vectors(), threads, thread); }
  int64_t count(int64_t thread) const { return begin(thread + 1) - begin(thread); }

  // A thread's examples of [unit][example].
  void arrange(const T* from, int64_t thread, V* to) const {
    over(thread, [&](int64_t n, int64_t lanes, int64_t c, int64_t at) {
      to[at] = copied<T>(from + c * p.examples + n, lanes);
    });
  }
  void store(const V* from, int64_t thread, T* to) const {
    over(thread, [&](int64_t n, int64_t lanes, int64_t c, int64_t at) {
      put<T>(from[at], lanes, to + c * p.examples + n);
    });
  }

 private:
  int64_t by_unit() const { return p.channels * p.vectors(); }

  // f(first example, how many there are, unit, place) of every vector of a thread's examples.
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

// One thread's examples, and its rows of the weight gradient.
template <class T>
class Crew {
 public:
  using V = Vec<T>;

  Crew(Shared<T>& shared, int64_t number, bool down)
      : s_(shared),
        p_(shared.p),
        number_(number),
        c_(p_.channels),
        begin_(s_.begin(number)),
        count_(s_.count(number)),
        negligible_(p_, kFewUnits, down),
        sums_(std::max(c_ * count_, kFewUnits * kBroad), false),
        weights_(std::max<int64_t>(kTerms * s_.vectors, kFew * kTermsDown), false),
        derivatives_(down ? 2 * c_ * count_ : 1, false),
        g_(derivatives_.data()),
        g_next_(derivatives_.data() + (down ? c_ * count_ : 0)),
        size(c_ * count_),
        reading(size) {
    for (int64_t t = 0; t < s_.threads; ++t)
      over_panels(s_.count(t), [&](int64_t v, int w) {
        stretches_.push_back({nullptr, w * kLanes<T>, 1, w * kLanes<T>});
        starts_.push_back(c_ * (s_.begin(t) + v));
      });
  }

  // Own examples of all that the threads leave for each other.
  template <class Pointer>
  Pointer own(Pointer all) const { return all + c_ * begin_; }

  void arrange(const T* from, V* to) const { s_.arrange(from, number_, to); }
  void store(const V* from, T* to) const { s_.store(from, number_, to); }
  void store_derivatives(T* to) const { store(g_, to); }

  // q = base + column h, of state `layer`
  void read(int64_t layer, const V* h, V* q) {
    const V *base = own(s_.base.data()), *floor = own(s_.floor.data());
    Notes notes(*this, layer);
    units([&](int64_t c, int64_t at, int w) {
      for (int64_t i = at; i < at + w; ++i) q[i] = base[i] + p_.column[c] * h[i];
      notes.take(c, w, h + at, floor + at, q + at);
    });
  }
  void column(const V* dh, V* dq) const {
    units([&](int64_t c, int64_t at, int w) {
      for (int64_t i = at; i < at + w; ++i) dq[i] = p_.column[c] * dh[i];
    });
  }

  // State and q of layer `layer` to those of the next.
  void forward(int64_t layer, const V* h, const V* q, V* h_next, V* q_next) {
    const V *base = own(s_.base.data()), *floor = own(s_.floor.data());
    const int64_t first = negligible_.up(layer);
    Notes notes(*this, layer + 1);
    if (first > 0) pass_on(first, h, q, h_next, q_next, notes);
    auto finish = [&](int64_t c, int64_t at, int w, const V* sums) {
      const T bias = this->bias(p_.bias, layer, true, c);
      for (int64_t i = at; i < at + w; ++i) {
        V z = p_.carry[c] * h[i] + (*sums++ + bias);
        V next = z > floor[i] ? z : floor[i];
        h_next[i] = next;
        q_next[i] = base[i] + p_.column[c] * next;
      }
      notes.take(c, w, h_next + at, floor + at, q_next + at);
    };
    s_.active.list(number_, number_ + 1, layer, reads_);
    times_weights({{q, p_.kernel, true}}, layer, first, finish);
  }

  // The same with tangents: of the parameters dk, db and of the state and q.
  void tangent(int64_t layer, const T* dk, const T* db, const V* h, const V* q, const V* dh,
               const V* dq, V* h_next, V* q_next, V* dh_next, V* dq_next) {
    forward(layer, h, q, h_next, q_next);
    const V* floor = own(s_.floor.data());
    auto finish = [&](int64_t c, int64_t at, int w, const V* sums) {
      const T bias = this->bias(db, layer, false, c);
      for (int64_t i = at; i < at + w; ++i) {
        V dz = p_.carry[c] * dh[i] + (*sums++ + bias);
        V next = h_next[i] > floor[i] ? dz : V{};
        dh_next[i] = next;
        dq_next[i] = p_.column[c] * next;
      }
    };
    s_.active.list_all(reads_);
    times_weights({{dq, p_.kernel, true}, {q, dk, false}}, layer, 0, finish);
  }

  // Derivatives by the state h above the last layer, masked: to `g_`, and by example to `g`.
  void descend(const Head<T>& head, const V* h, V* g) {
    const V* floor = own(s_.floor.data());
    list(p_.layers, above_);
    over_panels(count_, [&](int64_t v, int w) {
      const int64_t first = c_ * v;
      std::fill(g_ + first, g_ + first + c_ * w, V{});
      for (int64_t k = 0; k < p_.outputs; ++k) {
        const T* a = head.head + k * c_;
        for (int x = 0; x < w; ++x) {
          const int64_t n = (begin_ + v + x) * kLanes<T>;
          V f = {}, factor = {}, shift = {};
          for (int64_t l = 0; l < std::min<int64_t>(kLanes<T>, p_.examples - n); ++l) {
            f[l] = head.offset[(n + l) * p_.outputs + k];
            shift[l] = head.shift[(n + l) * p_.outputs + k];
            factor[l] = head.factor[n + l];
          }
          for (int64_t c = 0; c < c_; ++c) f += a[c] * h[first + c * w + x];
          f = factor * f + shift;
          for (int64_t c = 0; c < c_; ++c) g_[first + c * w + x] += a[c] * f;
        }
      }
      for (int64_t i = first; i < first + c_ * w; ++i) g_[i] = h[i] > floor[i] ? g_[i] : V{};
      for (int64_t o = 0; o < s_.vectors; ++o) by_example(g_, above_, o, v, w, g);
    });
  }

  // From derivatives by a layer's z (in `g_`) to those by the state h that it read: masked, and by
  // example in `g`, unless it is the lowest. Own q of it goes to `q`, for a weight gradient.
  void backward(int64_t layer, const V* h, V* q, V* g) {
    list(layer, reads_);
    list(layer + 1, above_);
    if (layer > 0) list(layer, makes_);
    else s_.active.list_all(makes_);
    const V* base = own(s_.base.data());
    over_panels(count_, [&](int64_t v, int w) {
      V* to = own(q) + c_ * v;
      for (int64_t c : reads_.units) {
        const int64_t at = c_ * v + c * w;
        for (int64_t i = at; i < at + w; ++i) *to++ = base[i] + p_.column[c] * h[i];
      }
    });
    if (!makes_.all) std::fill(g_next_, g_next_ + size, V{});
    if (const int64_t units = negligible_.down(layer)) {
      down(layer, h, g, 0, units, units / kLanes<T>);
      down(layer, h, g, units, c_, 0);
    } else {
      down(layer, h, g, 0, c_, 0);
    }
    std::swap(g_, g_next_);
  }

  // Own rows of the gradient by a layer's D from all examples: put(in, first of out, values, how many),
  // which goes to `to`; then its bias, put_bias(first of out, values, how many). Zeros may be left out
  // where they change nothing.
  template <class Put, class PutBias>
  void outer(int64_t layer, const V* q, const V* g, const T* to, bool leave_zeros, Put put,
             PutBias put_bias) {
    list(layer, reads_);
    list(layer + 1, above_);
    if (!leave_zeros) {
      over_others(reads_, [&](int64_t in) {
        for (int64_t o = 0; o < s_.vectors; ++o) put(in, o * kLanes<T>, V{}, lanes(o));
      });
      over_others(above_, [&](int64_t out) { put_bias(out, V{}, 1); });
    }
    for (size_t k = 0; k < stretches_.size(); ++k)
      stretches_[k].a = reinterpret_cast<const T*>(q + starts_[k]);
    const int64_t in = part(reads_.count(), s_.threads, number_);
    const int64_t ins = part(reads_.count(), s_.threads, number_ + 1) - in;
    const int32_t* rows = reads_.units.data() + in;
    const int64_t vectors = parts(above_.count(), kLanes<T>);
    // f(vector, unit, lane) of own ones among n vectors of units.
    auto over_own = [&](int64_t o, int n, auto f) {
      const int64_t first = part(vectors, s_.threads, number_), end = part(vectors, s_.threads, number_ + 1);
      for (int64_t v = std::max<int64_t>(first - o, 0); v < std::min<int64_t>(end - o, n); ++v)
        for (int64_t lane = 0, k = (o + v) * kLanes<T>; lane < kLanes<T> && k < above_.count(); ++lane, ++k)
          f(v, above_.units[k], lane);
    };
    over_panels(vectors, [&](int64_t o, int n) {
      const int64_t end = set_pieces(o, n), width = end - pieces_[0].first;
      if (end <= negligible_.without_gradient()) {
        if (leave_zeros) return;
        for (const Piece& piece : pieces_)
          for (int64_t i = 0; i < ins; ++i) put(rows[i], piece.first, V{}, piece.lanes);
        over_own(o, n, [&](int64_t, int64_t out, int64_t) { put_bias(out, V{}, 1); });
        return;
      }
      const V* derivatives = g + s_.examples * o;
      for (int64_t i = 0; i < ins; i += kFewUnits) {
        const int64_t few = std::min(kFewUnits, ins - i);
        const int64_t next = i + few < ins ? i + few : 0;
        Ahead<T> ahead(Ahead<T>::kWrite, to + (next > 0 ? pieces_[0].first : end),
                       std::min(kFewUnits, ins - next), width, c_, tiles(few) * s_.examples,
                       rows + next);
        product<T>(stretches_.data(), stretches_.size(), in + i, in + i + few, n, derivatives,
                   true, ahead, sums_.data());
        for (int64_t k = 0; k < few; ++k) {
          const V* sums = sums_.data() + k * n;
          if (above_.all) {
            for (int64_t v = 0, out = o * kLanes<T>; v < n; ++v, out += kLanes<T>)
              put(rows[i + k], out, sums[v] * s_.slope[o + v], lanes(o + v));
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

  // How many numbers of vector `o` of the units are there.
  int64_t lanes(int64_t o) const {
    return std::max<int64_t>(0, std::min<int64_t>(kLanes<T>, c_ - o * kLanes<T>));
  }

 private:
  static constexpr int64_t kFewUnits = kFew * kLanes<T>;

  Shared<T>& s_;
  const Problem<T>& p_;
  const int64_t number_, c_, begin_, count_;
  Negligible<T> negligible_;
  Buffer<V> sums_, weights_, derivatives_;
  V *g_, *g_next_;  // by a layer's z, and by that of the layer below
  Listing reads_, above_, makes_;  // a layer's units: read, of the state above, and with derivatives to be made
  int64_t noted_ = -1;             // the last state whose active units are known
  std::vector<Terms<T>> stretches_;  // of all examples: panel by panel
  std::vector<int64_t> starts_;      // where a panel begins among all threads'

 public:
  const int64_t size;     // vectors of a state
  const int64_t reading;  // and of its q

 private:
  static int64_t tiles(int64_t rows) { return parts(rows, kTall); }

  // Notes which units of a state are active in own examples, unless that is known.
  class Notes {
   public:
    Notes(Crew& crew, int64_t state)
        : active_(state > crew.noted_ ? &crew.s_.active : nullptr), number_(crew.number_), state_(state) {
      if (!active_) return;
      active_->clear(number_, state);
      crew.noted_ = state;
    }

    void take(int64_t unit, int w, const V* h, const V* floor, const V* q) {
      if (!active_ || active_->has(number_, state_, unit)) return;
      for (int x = 0; x < w; ++x)
        if (active<T>(h[x], floor[x], q[x])) return active_->note(number_, state_, unit);
    }

   private:
    Active* active_;
    const int64_t number_, state_;
  };

  // Active units of the state that layer `state` reads; those that the last one leaves are taken to be all.
  void list(int64_t state, Listing& to) const {
    if (state == p_.layers) s_.active.list_all(to);
    else s_.active.list(0, s_.threads, state, to);
  }

  // f(unit) of own units that are not in a list.
  template <class F>
  void over_others(const Listing& of, F f) const {
    const int64_t first = part(c_, s_.threads, number_), end = part(c_, s_.threads, number_ + 1);
    auto next = of.units.begin() + of.before(first);
    for (int64_t unit = first; unit < end; ++unit) {
      if (next != of.units.end() && *next == unit) ++next;
      else f(unit);
    }
  }

  // Units from `first` on, and where the numbers of those that are active begin.
  struct Piece {
    V slope;
    int64_t first, lanes, from;
    uint32_t mask;

    V among(const V* active) const { return spread<T>(reinterpret_cast<const T*>(active) + from, mask); }
  };
  std::vector<Piece> pieces_;

  // Sets `pieces_` to what lies between n vectors of active units, from the o-th on. Returns its end.
  int64_t set_pieces(int64_t o, int n) {
    const std::vector<int32_t>& units = above_.units;
    const int64_t begin = o * kLanes<T>;
    const int64_t last = std::min(begin + n * kLanes<T>, above_.count());
    const int64_t end = last < above_.count() ? units[last] : c_;
    pieces_.clear();
    int64_t k = begin;
    for (int64_t first = begin > 0 ? units[begin] : 0; first < end; first += kLanes<T>) {
      const int64_t lanes = std::min<int64_t>(kLanes<T>, end - first);
      Piece piece{copied<T>(p_.slope + first, lanes), first, lanes, k - begin, 0};
      for (; k < last && units[k] < first + lanes; ++k)
        piece.mask |= uint32_t{1} << (units[k] - first);
      pieces_.push_back(piece);
    }
    return end;
  }

  // f(unit, place of its first vector, vectors) of all units, panel by panel.
  template <class F>
  void units(F f) const {
    over_panels(count_, [&](int64_t v, int w) {
      for (int64_t c = 0; c < c_; ++c) f(c, c_ * v + c * w, w);
    });
  }

  // The units before `end`, which a layer leaves as they are.
  void pass_on(int64_t end, const V* h, const V* q, V* h_next, V* q_next, Notes& notes) const {
    const V* floor = own(s_.floor.data());
    over_panels(count_, [&](int64_t v, int w) {
      const int64_t at = c_ * v, beyond = at + end * w;
      if (h_next != h) std::copy(h + at, h + beyond, h_next + at);
      std::copy(q + at, q + beyond, q_next + at);
      for (int64_t c = 0, i = at; c < end; ++c, i += w) notes.take(c, w, h_next + i, floor + i, q_next + i);
    });
  }

  // Of `backward` the units from `first` to `last`, from derivatives of the vectors of units from
  // `lowest` on.
  void down(int64_t layer, const V* h, V* g, int64_t first, int64_t last, int64_t lowest) {
    const V* floor = own(s_.floor.data());
    const int64_t blocks = parts(s_.vectors - lowest, kTermsDown / kLanes<T>);
    const int64_t begin = makes_.before(first), end = makes_.before(last);
    auto start = [&](int64_t block) { return lowest + part(s_.vectors - lowest, blocks, block); };
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t o = start(block), from = o * kLanes<T>;
      const int n = start(block + 1) - o;
      Product of(above_, from, std::min(c_, from + n * kLanes<T>));
      for (int64_t k = begin; k < end; k += kFewUnits) {
        const int64_t few = std::min(kFewUnits, end - k);
        const int32_t* ins = makes_.units.data() + k;
        weights(p_.kernel, layer, true, ins, few, kPacked, o, n, weights_.data());
        const int64_t next = k + few < end ? k + few : begin;
        const int64_t there = std::min(kFewUnits, end - next);
        const T* then = p_.kernel + layer * p_.weights() + (next > begin ? from : from + n * kLanes<T>);
        over_panels(count_, [&](int64_t v, int w) {
          const int64_t ahead_from = part(there, count_, v), ahead_end = part(there, count_, v + w);
          Ahead<T> ahead(Ahead<T>::kRead, then, ahead_end - ahead_from, n * kLanes<T>, c_,
                         tiles(few) * of.count, makes_.units.data() + next + ahead_from);
          const T* ready = reinterpret_cast<const T*>(weights_.data());
          const Terms<T> terms{ready - of.shift, n * kLanes<T>, 1, of.count, of.listed};
          // What is not all yet stays until the last block.
          V* sums = sums_.data() + (blocks > 1 ? c_ * v + (k - begin) * w : 0);
          product<T>(&terms, 1, 0, few, w, g_ + c_ * v + (from - of.shift) * w, block == 0, ahead,
                     sums);
          if (block < blocks - 1) return;
          for (int64_t i = 0; i < few; ++i) {
            const int64_t c = ins[i], at = c_ * v + c * w;
            for (int64_t x = at; x < at + w; ++x) {
              V value = p_.column[c] * *sums++ + p_.carry[c] * g_[x];
              g_next_[x] = layer == 0 || h[x] > floor[x] ? value : V{};
            }
          }
          if (layer == 0) return;
          const int64_t done = k + few;  // whole vectors of them, or what is left
          const int64_t whole = done < makes_.count() ? done / kLanes<T> : parts(done, kLanes<T>);
          for (int64_t x = k / kLanes<T>; x < whole; ++x) by_example(g_next_, makes_, x, v, w, g);
        });
      }
    }
  }

  // The active ones of units `from` to `end` as terms of a product, counted from `from` on where
  // nothing is listed, and from `shift` before it otherwise.
  struct Product {
    Product(const Listing& units, int64_t from, int64_t end)
        : first(units.before(from)),
          count(units.before(end) - first),
          listed(units.all ? nullptr : units.units.data() + first),
          shift(units.all ? 0 : from) {}
    const int64_t first, count;
    const int32_t* const listed;
    const int64_t shift;
  };

  // A layer's weights, or what is to be added to D alone, and what they are multiplied by.
  struct Factors {
    const V* q;
    const T* kernel;
    bool whole;
  };

  // The sum of products, for units from `first` on; as soon as a unit's are there,
  // finish(unit, place of its first vector, vectors, sums).
  template <class Finish>
  void times_weights(std::initializer_list<Factors> products, int64_t layer, int64_t first,
                     Finish finish) {
    const int64_t blocks = parts(c_, kTerms), passes = products.size() * blocks;
    const int64_t lowest = first / kLanes<T>;
    int64_t pass = 0;
    for (const Factors& of : products)
      for (int64_t block = 0; block < blocks; ++block, ++pass) {
        const int64_t from = part(c_, blocks, block), end = part(c_, blocks, block + 1);
        const int64_t terms = end - from;
        const Product read(reads_, from, end);
        for (int64_t k = 0; k < read.count; k += kRows)
          for (int64_t o = lowest; o < s_.vectors; o += kFew) {
            const int n = std::min<int64_t>(kFew, s_.vectors - o);
            weights(of.kernel, layer, of.whole, reads_.units.data() + read.first + k,
                    std::min(kRows, read.count - k), from, o, n, weights_.data() + o * terms);
          }
        // The next block's rows follow.
        const int64_t next = first > 0 ? 0 : part(c_, blocks, std::min(block + 2, blocks)) - end;
        const T* rows = of.kernel + layer * p_.weights() + end * c_;
        over_panels(count_, [&](int64_t v, int w) {
          for (int64_t o = lowest; o < s_.vectors; o += kFew) {
            const int n = std::min<int64_t>(kFew, s_.vectors - o);
            const int64_t c = o * kLanes<T>, few = std::min(kFewUnits, c_ - c);
            const int64_t at = c_ * v + c * w;
            const T* ready = reinterpret_cast<const T*>(weights_.data() + o * terms);
            const int64_t place = v * s_.vectors + w * o, places = count_ * s_.vectors;
            const int64_t begin = part(next * c_, places, place);
            const int64_t width = part(next * c_, places, place + w * n) - begin;
            Ahead<T> ahead(Ahead<T>::kRead, rows + begin, 1, width, 0, tiles(few) * read.count);
            V* sums = sums_.data() + at;
            const int64_t step = n * kLanes<T>;
            const Terms<T> all{ready - read.shift * step, 1, step, read.count, read.listed};
            product<T>(&all, 1, 0, few, w, of.q + c_ * v + (from - read.shift) * w, pass == 0, ahead,
                       sums);
            if (pass == passes - 1)
              for (int64_t k = 0; k < few; ++k) finish(c + k, at + k * w, w, sums + k * w);
          }
        });
      }
  }

  // `count` rows of the vectors o ... o + n of a layer's weights, zero beyond the units: one after the
  // other, or each where it is from row `from` on.
  static constexpr int64_t kPacked = -1;
  void weights(const T* kernel, int64_t layer, bool whole, const int32_t* rows, int64_t count,
               int64_t from, int64_t o, int n, V* to) const {
    const bool matrices = whole && p_.initial == kMatrices;
    auto place = [&](int64_t k) { return to + (from == kPacked ? k : rows[k] - from) * n; };
    const int64_t last = lanes(o + n - 1);
    for (int64_t k = 0; k < count; ++k) {
      const int64_t row = layer * p_.weights() + rows[k] * c_ + o * kLanes<T>;
      const T *d = kernel + row, *w = p_.initial_kernel + row;
      V* at = place(k);
      for (int v = 0; v < n; ++v) {
        const int64_t lane = v * kLanes<T>, count = v == n - 1 ? last : kLanes<T>;
        V value = copied<T>(d + lane, count), start = {};
        if (matrices) start = copied<T>(w + lane, count);
        *at++ = value * s_.slope[o + v] + start;
      }
    }
    const int64_t random = p_.inputs - o * kLanes<T>;
    if (whole && p_.initial == kFeatures && random >= 0 && random < n * kLanes<T>) {
      const T* u = p_.initial_kernel + layer * p_.inputs;
      for (int64_t k = 0; k < count && rows[k] < p_.inputs; ++k)
        reinterpret_cast<T*>(place(k))[random] += u[rows[k]];
    }
  }

  T bias(const T* bias, int64_t layer, bool whole, int64_t c) const {
    T value = bias[layer * c_ + c] * p_.bias_slope[c];
    if (whole && p_.initial == kMatrices) value += p_.initial_bias[layer * c_ + c];
    if (whole && p_.initial == kFeatures && c == p_.inputs) value += p_.initial_bias[layer];
    return value;
  }

  // Vector `o` of the listed units of own examples v ... v + w, from [unit] to [example].
  void by_example(const V* from, const Listing& of, int64_t o, int64_t v, int w, V* to) const {
    constexpr int kSquare = kLanes<T>;
    const int32_t* units = of.units.data() + o * kSquare;
    const int64_t count = std::min<int64_t>(kSquare, of.count() - o * kSquare);
    const int64_t vectors = parts(of.count(), kSquare), panels = parts(vectors, kBroad);
    int64_t panel = o * panels / vectors;
    while (part(vectors, panels, panel + 1) <= o) ++panel;
    const int64_t first = part(vectors, panels, panel);
    const int64_t n = part(vectors, panels, panel + 1) - first;
    for (int x = 0; x < w; ++x) {
      V square[kSquare];
      const V* next = from + c_ * v + x;
#pragma GCC unroll 16
      for (int i = 0; i < kSquare; ++i) square[i] = i < count ? next[units[i] * w] : V{};
      transpose<T>(square);
      V* rows = to + s_.examples * first + (begin_ + v + x) * kSquare * n + o - first;
#pragma GCC unroll 16
      for (int i = 0; i < kSquare; ++i) rows[i * n] = square[i];
    }
  }
};

}  // namespace
