// Wide dense layers on a CPU; `wide_passes.h` goes up and down through all of them.
//
// A layer of hundreds of units is three matrix products, so its time depends on how near to the
// processor's peak they run. Every product is made of one kernel, a tile of accumulators over a
// block of terms that stays in the first cache (`block` of wide_products.h). Examples are the lanes
// of every vector but those of a weight gradient, so of all operands only the derivatives are
// transposed:
//
//   z[out][n]   = sum_in W[in][out] q[in][n]    vectors along n
//   g[in][n]    = sum_out W[in][out] g[out][n]  vectors along n
//   D'[in][out] = sum_n q[in][n] g[n][out]      vectors along out
//
// Weights are packed a few rows at a time, [terms] x [units], while the next ones are fetched from
// memory. The epilogue of a product (bias, ReLU, ...) runs on each strip of units while it is in
// cache.
//
// Every thread has its own examples, up and down, and its own rows of the weight gradient. On the
// way down there is one barrier for a group of layers whose q and g fit a part of a cache: with
// one for every layer, a thread that loses its core would stop the others most of the time if
// layers are short. With rates the gradient is never stored: a layer's weights change as soon as
// no thread reads them any more.
//
// Units that are zero in all examples are skipped (active_units.h), as are products too small to
// change a result (negligible_products.h).
//
// Sums go over the same terms in the same order for any number of threads.

#pragma once

#include "negligible_products.h"
#include "wide_gradient.h"
#include "wide_shared.h"

namespace dnntk {
namespace {

// One thread's examples.
template <class T>
class WideWorker {
 public:
  using V = Vec<T>;

  WideWorker(Shared<T>& shared, int64_t number, bool down)
      : s_(shared),
        p_(shared.p),
        number_(number),
        c_(p_.channels),
        begin_(s_.begin(number)),
        count_(s_.count(number)),
        negligible_(p_, kStripUnits<T>, down),
        sums_(std::max(c_ * count_, kStripUnits<T> * kTileColumns), false),
        weights_(std::max<int64_t>(kTermsUp * s_.vectors, kStrip * kTermsDown), false),
        derivatives_(down ? 2 * c_ * count_ : 1, false),
        g_(derivatives_.data()),
        g_next_(derivatives_.data() + (down ? c_ * count_ : 0)),
        weight_gradient_(shared, number, negligible_.without_gradient()) {}

  int64_t size() const { return c_ * count_; }  // vectors of a state

  // Own rows of all weight gradients.
  WeightGradient<T>& weight_gradient() { return weight_gradient_; }

  // Own examples in an array of all threads' examples.
  template <class Pointer>
  Pointer own(Pointer all) const { return all + c_ * begin_; }

  void arrange(const T* from, V* to) const { s_.arrange(from, number_, to); }
  void store(const V* from, T* to) const { s_.store(from, number_, to); }
  void store_derivatives(T* to) const { store(g_, to); }

  // q = base + column h, where h is the state that layer `layer` reads.
  void read(int64_t layer, const V* h, V* q) {
    const V *base = own(s_.base.data()), *floor = own(s_.floor.data());
    ActivityRecorder<T> activity(s_.active, number_, layer, recorded_);
    units([&](int64_t c, int64_t at, int w) {
      for (int64_t i = at; i < at + w; ++i) q[i] = base[i] + p_.column[c] * h[i];
      activity.record(c, w, h + at, floor + at, q + at);
    });
  }
  void column(const V* dh, V* dq) const {
    units([&](int64_t c, int64_t at, int w) {
      for (int64_t i = at; i < at + w; ++i) dq[i] = p_.column[c] * dh[i];
    });
  }

  // From the state h and q of layer `layer` to those of the next layer.
  void forward(int64_t layer, const V* h, const V* q, V* h_next, V* q_next) {
    const V *base = own(s_.base.data()), *floor = own(s_.floor.data());
    const int64_t first = negligible_.up(layer);
    ActivityRecorder<T> activity(s_.active, number_, layer + 1, recorded_);
    if (first > 0) copy_units(first, h, q, h_next, q_next, activity);
    auto epilogue = [&](int64_t c, int64_t at, int w, const V* sums) {
      const T bias = this->bias(p_.bias, layer, true, c);
      for (int64_t i = at; i < at + w; ++i) {
        V z = p_.carry[c] * h[i] + (*sums++ + bias);
        V next = z > floor[i] ? z : floor[i];
        h_next[i] = next;
        q_next[i] = base[i] + p_.column[c] * next;
      }
      activity.record(c, w, h_next + at, floor + at, q_next + at);
    };
    s_.active.list(number_, number_ + 1, layer, reads_);
    times_weights({{q, p_.kernel, true}}, layer, first, epilogue);
  }

  // As `forward`, with tangents; dk and db are the tangents of the parameters.
  void tangent(int64_t layer, const T* dk, const T* db, const V* h, const V* q, const V* dh,
               const V* dq, V* h_next, V* q_next, V* dh_next, V* dq_next) {
    forward(layer, h, q, h_next, q_next);
    const V* floor = own(s_.floor.data());
    auto epilogue = [&](int64_t c, int64_t at, int w, const V* sums) {
      const T bias = this->bias(db, layer, false, c);
      for (int64_t i = at; i < at + w; ++i) {
        V dz = p_.carry[c] * dh[i] + (*sums++ + bias);
        V next = h_next[i] > floor[i] ? dz : V{};
        dh_next[i] = next;
        dq_next[i] = p_.column[c] * next;
      }
    };
    s_.active.list_all(reads_);
    times_weights({{dq, p_.kernel, true}, {q, dk, false}}, layer, 0, epilogue);
  }

  // Derivatives of the loss by the z whose state h the last layer reads: to `g_`, and by example
  // to `g`.
  void top_derivatives(const Head<T>& head, const V* h, V* g) {
    const V* floor = own(s_.floor.data());
    s_.list_active(p_.layers, above_);
    over_panels(count_, [&](int64_t v, int w) {
      const int64_t first = c_ * v;
      std::fill(g_ + first, g_ + first + c_ * w, V{});
      for (int64_t k = 0; k < head.outputs; ++k) {
        const T* a = head.head + k * c_;
        for (int x = 0; x < w; ++x) {
          const int64_t n = (begin_ + v + x) * kLanes<T>;
          V f = {}, factor = {}, shift = {};
          for (int64_t l = 0; l < std::min<int64_t>(kLanes<T>, p_.examples - n); ++l) {
            f[l] = head.offset[(n + l) * head.outputs + k];
            shift[l] = head.shift[(n + l) * head.outputs + k];
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

  // `g_` becomes the derivatives by the z of the layer below, which are also stored by example in
  // `g`; of the lowest layer, the derivatives by its state h, in `g_` alone. Own q goes to `q`,
  // for the weight gradient.
  void backward(int64_t layer, const V* h, V* q, V* g) {
    s_.list_active(layer, reads_);
    s_.list_active(layer + 1, above_);
    if (layer > 0) s_.list_active(layer, computed_);
    else s_.active.list_all(computed_);
    const V* base = own(s_.base.data());
    over_panels(count_, [&](int64_t v, int w) {
      V* to = own(q) + c_ * v;
      for (int64_t c : reads_.units) {
        const int64_t at = c_ * v + c * w;
        for (int64_t i = at; i < at + w; ++i) *to++ = base[i] + p_.column[c] * h[i];
      }
    });
    if (!computed_.all) std::fill(g_next_, g_next_ + size(), V{});
    if (const int64_t units = negligible_.down(layer)) {
      down(layer, h, g, 0, units, units / kLanes<T>);
      down(layer, h, g, units, c_, 0);
    } else {
      down(layer, h, g, 0, c_, 0);
    }
    std::swap(g_, g_next_);
  }

 private:
  // f(unit, place of its first vector, number of vectors) for all units, panel by panel.
  template <class F>
  void units(F f) const {
    over_panels(count_, [&](int64_t v, int w) {
      for (int64_t c = 0; c < c_; ++c) f(c, c_ * v + c * w, w);
    });
  }

  // Copies the units before `end`, which the layer does not change.
  void copy_units(int64_t end, const V* h, const V* q, V* h_next, V* q_next,
                  ActivityRecorder<T>& activity) const {
    const V* floor = own(s_.floor.data());
    over_panels(count_, [&](int64_t v, int w) {
      const int64_t at = c_ * v, beyond = at + end * w;
      if (h_next != h) std::copy(h + at, h + beyond, h_next + at);
      std::copy(q + at, q + beyond, q_next + at);
      for (int64_t c = 0, i = at; c < end; ++c, i += w)
        activity.record(c, w, h_next + i, floor + i, q_next + i);
    });
  }

  // The part of `backward` that computes units [first, last) from the derivatives of the units
  // from vector `lowest` on.
  void down(int64_t layer, const V* h, V* g, int64_t first, int64_t last, int64_t lowest) {
    const V* floor = own(s_.floor.data());
    const int64_t blocks = parts(s_.vectors - lowest, kTermsDown / kLanes<T>);
    const int64_t begin = computed_.before(first), end = computed_.before(last);
    auto start = [&](int64_t block) { return lowest + part(s_.vectors - lowest, blocks, block); };
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t o = start(block), from = o * kLanes<T>;
      const int n = start(block + 1) - o;
      const ActiveTerms of(above_, from, std::min(c_, from + n * kLanes<T>));
      for (int64_t k = begin; k < end; k += kStripUnits<T>) {
        const int64_t strip = std::min(kStripUnits<T>, end - k);
        const int32_t* ins = computed_.units.data() + k;
        pack(p_.kernel, layer, true, ins, strip, kInOrder, o, n, weights_.data());
        const int64_t next = k + strip < end ? k + strip : begin;
        const int64_t next_rows = std::min(kStripUnits<T>, end - next);
        const int64_t column = next > begin ? from : from + n * kLanes<T>;
        const T* next_weights = p_.kernel + layer * p_.weights() + column;
        over_panels(count_, [&](int64_t v, int w) {
          const int64_t ahead_from = part(next_rows, count_, v);
          const int64_t ahead_end = part(next_rows, count_, v + w);
          Prefetcher<T> prefetcher(Prefetcher<T>::kRead, next_weights, ahead_end - ahead_from,
                                   n * kLanes<T>, c_, tiles(strip) * of.count,
                                   computed_.units.data() + next + ahead_from);
          const T* packed = reinterpret_cast<const T*>(weights_.data());
          const Terms<T> terms{packed - of.shift, n * kLanes<T>, 1, of.count, of.listed};
          // Sums over several blocks are kept until the last block.
          V* sums = sums_.data() + (blocks > 1 ? c_ * v + (k - begin) * w : 0);
          product<T>(&terms, 1, 0, strip, w, g_ + c_ * v + (from - of.shift) * w, block == 0,
                     prefetcher, sums);
          if (block < blocks - 1) return;
          for (int64_t i = 0; i < strip; ++i) {
            const int64_t c = ins[i], at = c_ * v + c * w;
            for (int64_t x = at; x < at + w; ++x) {
              V value = p_.column[c] * *sums++ + p_.carry[c] * g_[x];
              g_next_[x] = layer == 0 || h[x] > floor[x] ? value : V{};
            }
          }
          if (layer == 0) return;
          const int64_t done = k + strip;  // to be stored by whole vectors, and the rest at the end
          const bool last = done >= computed_.count();
          const int64_t whole = last ? parts(done, kLanes<T>) : done / kLanes<T>;
          for (int64_t x = k / kLanes<T>; x < whole; ++x)
            by_example(g_next_, computed_, x, v, w, g);
        });
      }
    }
  }

  // The active units in [from, end) as the product's terms; with a list, indices are absolute and
  // `shift` is subtracted.
  struct ActiveTerms {
    ActiveTerms(const UnitList& units, int64_t from, int64_t end)
        : first(units.before(from)),
          count(units.before(end) - first),
          listed(units.all ? nullptr : units.units.data() + first),
          shift(units.all ? 0 : from) {}
    const int64_t first, count;
    const int32_t* const listed;
    const int64_t shift;
  };

  // One product: the `whole` weights that belong to `kernel`, or slope kernel alone, times q.
  struct Factors {
    const V* q;
    const T* kernel;
    bool whole;
  };

  // The sum of products, for units from `first` on: epilogue(unit, place of its first vector,
  // vectors, sums) for every panel of examples.
  template <class Epilogue>
  void times_weights(std::initializer_list<Factors> products, int64_t layer, int64_t first,
                     Epilogue epilogue) {
    const int64_t blocks = parts(c_, kTermsUp), passes = products.size() * blocks;
    const int64_t lowest = first / kLanes<T>;
    int64_t pass = 0;
    for (const Factors& of : products)
      for (int64_t block = 0; block < blocks; ++block, ++pass) {
        const int64_t from = part(c_, blocks, block), end = part(c_, blocks, block + 1);
        const int64_t terms = end - from;
        const ActiveTerms read(reads_, from, end);
        for (int64_t k = 0; k < read.count; k += kPackedRows)
          for (int64_t o = lowest; o < s_.vectors; o += kStrip) {
            const int n = std::min<int64_t>(kStrip, s_.vectors - o);
            pack(of.kernel, layer, of.whole, reads_.units.data() + read.first + k,
                 std::min(kPackedRows, read.count - k), from, o, n, weights_.data() + o * terms);
          }
        // Meanwhile the rows of the next block are prefetched.
        const int64_t next = first > 0 ? 0 : part(c_, blocks, std::min(block + 2, blocks)) - end;
        const T* rows = of.kernel + layer * p_.weights() + end * c_;
        over_panels(count_, [&](int64_t v, int w) {
          for (int64_t o = lowest; o < s_.vectors; o += kStrip) {
            const int n = std::min<int64_t>(kStrip, s_.vectors - o);
            const int64_t c = o * kLanes<T>, strip = std::min(kStripUnits<T>, c_ - c);
            const int64_t at = c_ * v + c * w;
            const T* packed = reinterpret_cast<const T*>(weights_.data() + o * terms);
            const int64_t place = v * s_.vectors + w * o, places = count_ * s_.vectors;
            const int64_t begin = part(next * c_, places, place);
            const int64_t width = part(next * c_, places, place + w * n) - begin;
            Prefetcher<T> prefetcher(Prefetcher<T>::kRead, rows + begin, 1, width, 0,
                                     tiles(strip) * read.count);
            V* sums = sums_.data() + at;
            const int64_t step = n * kLanes<T>;
            const Terms<T> all{packed - read.shift * step, 1, step, read.count, read.listed};
            product<T>(&all, 1, 0, strip, w, of.q + c_ * v + (from - read.shift) * w, pass == 0,
                       prefetcher, sums);
            if (pass == passes - 1)
              for (int64_t k = 0; k < strip; ++k) epilogue(c + k, at + k * w, w, sums + k * w);
          }
        });
      }
  }

  // Packs `count` rows of a layer's weights, vectors [o, o + n), with zeros beyond the units: in
  // order (from = kInOrder), or row r at r - from.
  static constexpr int64_t kInOrder = -1;
  void pack(const T* kernel, int64_t layer, bool whole, const int32_t* rows, int64_t count,
            int64_t from, int64_t o, int n, V* to) const {
    const bool matrices = whole && p_.initial == Initial::kMatrices;
    auto place = [&](int64_t k) { return to + (from == kInOrder ? k : rows[k] - from) * n; };
    const int64_t last = s_.lanes(o + n - 1);
    for (int64_t k = 0; k < count; ++k) {
      const int64_t row = layer * p_.weights() + rows[k] * c_ + o * kLanes<T>;
      const T *d = kernel + row, *w = p_.initial_kernel + row;
      V* at = place(k);
      for (int v = 0; v < n; ++v) {
        const int64_t lane = v * kLanes<T>, count = v == n - 1 ? last : kLanes<T>;
        V value = load_lanes<T>(d + lane, count), start = {};
        if (matrices) start = load_lanes<T>(w + lane, count);
        *at++ = value * s_.slope[o + v] + start;
      }
    }
    const int64_t random = p_.inputs - o * kLanes<T>;
    if (whole && p_.initial == Initial::kFeatures && random >= 0 && random < n * kLanes<T>) {
      const T* u = p_.initial_kernel + layer * p_.inputs;
      for (int64_t k = 0; k < count && rows[k] < p_.inputs; ++k)
        reinterpret_cast<T*>(place(k))[random] += u[rows[k]];
    }
  }

  T bias(const T* bias, int64_t layer, bool whole, int64_t c) const {
    T value = bias[layer * c_ + c] * p_.bias_slope[c];
    if (whole && p_.initial == Initial::kMatrices) value += p_.initial_bias[layer * c_ + c];
    if (whole && p_.initial == Initial::kFeatures && c == p_.inputs)
      value += p_.initial_bias[layer];
    return value;
  }

  // Transposes vector `o` of the listed units, own examples [v, v + w), from [unit] to [example].
  void by_example(const V* from, const UnitList& of, int64_t o, int64_t v, int w, V* to) const {
    constexpr int kSquare = kLanes<T>;
    const int32_t* units = of.units.data() + o * kSquare;
    const int64_t count = std::min<int64_t>(kSquare, of.count() - o * kSquare);
    const int64_t vectors = parts(of.count(), kSquare), panels = parts(vectors, kTileColumns);
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

  Shared<T>& s_;
  const Problem<T>& p_;
  const int64_t number_, c_, begin_, count_;
  NegligibleProducts<T> negligible_;
  Buffer<V> sums_, weights_, derivatives_;
  V *g_, *g_next_;                     // by a layer's z, and by that of the layer below
  UnitList reads_, above_, computed_;  // active units: read, of the state above, of the derivatives
  int64_t recorded_ = -1;              // the last state whose active units are known
  WeightGradient<T> weight_gradient_;
};

}  // namespace
}  // namespace dnntk
