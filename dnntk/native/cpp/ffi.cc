// The middle layers of a deep narrow network on a CPU: outputs, gradients, tangents.
//
// A layer is h' = max(carry h + W q + b, floor) with q = base + column h (dnntk.layers.Form), W a
// q x q convolution or a matrix. It is so small that everything between two layers would cost more
// than the layer: so one call goes through all of them, with a few images at a time, which stay in
// the core's own cache, and every example sits in a SIMD lane of its own.
//
// Layout of a block of examples: [groups][rows][channels][columns + reach] vectors, the
// lanes of a vector being examples. `reach` = q / 2 zero vectors follow every row of an image, and so
// precede the next one. A dense layer is an image of one row whose columns are vectors of examples.
//
// Vectors and tiles are as the processor's registers are: 32 of 64 bytes, 16 of 32, or 32 of 16.

#include "xla/ffi/api/c_api.h"

#include "wide_passes.h"
#include "problem.h"
#include "thread_team.h"

namespace {

constexpr bool kManyRegisters = kRegisters == 32;
// Columns of the tiles of three and of four channels; they fit the registers, with what they are made
// of.
constexpr int kByThree = kManyRegisters ? 7 : 4, kByFour = kManyRegisters ? 6 : 3;
// Steps of a product's terms that stand side by side: where registers are few, GCC would keep what
// several of them read.
constexpr int kUnrolled = kManyRegisters ? 8 : 1;
constexpr int kChunk = 32;    // layers whose gradients are added up at a time
constexpr int kSettle = 16;   // layers whose terms are added up at a time: dnntk.fused.SETTLED

// The examples that one thread takes through the network at a time.
template <class T>
struct Block {
  int64_t first;    // vector of examples
  int64_t groups;   // images side by side, in vectors
  int64_t columns;  // of an image
  int64_t rows, channels;
  int reach;

  Block(const Problem<T>& p, int64_t first, int64_t count)
      : first(first),
        groups(p.dense() ? 1 : count),
        columns(p.dense() ? count : p.columns),
        rows(p.rows),
        channels(p.channels),
        reach(p.reach()) {}

  int64_t stride() const { return columns + reach; }
  int64_t group() const { return rows * channels * stride() + 2 * reach; }
  int64_t size() const { return groups * group(); }  // vectors of a state
  int64_t at(int64_t g, int64_t y, int64_t c) const {
    return g * group() + reach + (y * channels + c) * stride();
  }
};

// Between a block and an array [channels, positions, examples].
template <class T>
void load(const Problem<T>& p, const Block<T>& b, const T* from, Vec<T>* to) {
  for (int64_t g = 0; g < b.groups; ++g)
    for (int64_t y = 0; y < b.rows; ++y)
      for (int64_t c = 0; c < b.channels; ++c)
        for (int64_t x = 0; x < b.columns; ++x) {
          int64_t vector = b.first + (p.dense() ? x : g);
          int64_t position = p.dense() ? 0 : y * (p.columns + p.reach()) + x;
          int64_t n = vector * kLanes<T>;
          int64_t lanes = std::min<int64_t>(kLanes<T>, p.examples - n);
          const T* source = from + (c * p.positions() + position) * p.examples + n;
          Vec<T> v = {};
          // A copy whose size is known beforehand is one instruction.
          if (lanes == kLanes<T>) std::memcpy(&v, source, sizeof v);
          else std::memcpy(&v, source, lanes * sizeof(T));
          to[b.at(g, y, c) + x] = v;
        }
}

template <class T>
void store(const Problem<T>& p, const Block<T>& b, const Vec<T>* from, T* to) {
  for (int64_t g = 0; g < b.groups; ++g)
    for (int64_t y = 0; y < b.rows; ++y)
      for (int64_t c = 0; c < b.channels; ++c)
        for (int64_t x = 0; x < b.columns + (p.dense() ? 0 : b.reach); ++x) {
          int64_t vector = b.first + (p.dense() ? x : g);
          int64_t position = p.dense() ? 0 : y * (p.columns + p.reach()) + x;
          int64_t n = vector * kLanes<T>;
          int64_t lanes = std::min<int64_t>(kLanes<T>, p.examples - n);
          Vec<T> v = {};
          if (x < b.columns) v = from[b.at(g, y, c) + x];
          T* target = to + (c * p.positions() + position) * p.examples + n;
          if (lanes == kLanes<T>) std::memcpy(target, &v, sizeof v);
          else std::memcpy(target, &v, lanes * sizeof(T));
        }
}

// ---- the two products

// acc[m][v] = sum over `terms` rows of the input, SIDE shifts: w[.., dx, m] in[.., v + dx].
template <class T, int SIDE, int M, int N>
void multiply(const Vec<T>* in, int64_t stride, int64_t terms, const T* w, Vec<T>* tile) {
  Vec<T> acc[M][N];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) acc[m][v] = tile[m * N + v];
  for (int64_t k = 0; k < terms; ++k, in += stride, w += SIDE * M) {
#pragma GCC unroll kUnrolled
    for (int dx = 0; dx < SIDE; ++dx) {
      T factor[M];
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) factor[m] = w[dx * M + m];
#pragma GCC unroll 8
      for (int v = 0; v < N; ++v) {
        Vec<T> value = in[v + dx];
        hold(value);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) acc[m][v] += value * factor[m];
      }
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) tile[m * N + v] = acc[m][v];
}

// sums[i][dx][m] = sum of in[i][x + dx] out[m][x], over the rows of all groups.
template <class T, int SIDE, int I, int M>
void outer_sums(const Vec<T>* in, const Vec<T>* out, int64_t groups, int64_t a_group, int64_t rows,
                int64_t a_row, int64_t columns, int64_t stride, Vec<T>* sums) {
  Vec<T> acc[I][SIDE][M] = {};
  for (int64_t g = 0; g < groups; ++g, in += a_group, out += a_group)
    for (int64_t y = 0; y < rows; ++y) {
      const Vec<T>*q = in + y * a_row, *gz = out + y * a_row;
      for (int64_t x = 0; x < columns; ++x, ++q, ++gz) {
        forget(q);
        // The fewer ones stay in registers.
        if constexpr (I * SIDE < M) {
          Vec<T> value[I][SIDE];
#pragma GCC unroll 8
          for (int i = 0; i < I; ++i)
#pragma GCC unroll 8
            for (int dx = 0; dx < SIDE; ++dx) {
              value[i][dx] = q[i * stride + dx];
              hold(value[i][dx]);
            }
#pragma GCC unroll 8
          for (int m = 0; m < M; ++m) {
            Vec<T> derivative = gz[m * stride];
            hold(derivative);
#pragma GCC unroll 8
            for (int i = 0; i < I; ++i)
#pragma GCC unroll 8
              for (int dx = 0; dx < SIDE; ++dx) acc[i][dx][m] += value[i][dx] * derivative;
          }
        } else {
          Vec<T> derivative[M];
#pragma GCC unroll 8
          for (int m = 0; m < M; ++m) derivative[m] = gz[m * stride];
#pragma GCC unroll 8
          for (int i = 0; i < I; ++i)
#pragma GCC unroll 8
            for (int dx = 0; dx < SIDE; ++dx) {
              Vec<T> value = q[i * stride + dx];
              hold(value);
#pragma GCC unroll 8
              for (int m = 0; m < M; ++m) acc[i][dx][m] += value * derivative[m];
            }
        }
      }
    }
  std::memcpy(sums, acc, sizeof acc);
}

template <class T>
using Multiply = void (*)(const Vec<T>*, int64_t, int64_t, const T*, Vec<T>*);

template <class T, int SIDE, int M, int MOST = M == 4 ? kByFour : kByThree>
Multiply<T> multiply_for(int n) {
  switch (n) {
    case 1: return multiply<T, SIDE, M, 1>;
    case 2: return multiply<T, SIDE, M, 2>;
    case 3: return multiply<T, SIDE, M, 3>;
    case 4: return multiply<T, SIDE, M, std::min(4, MOST)>;
    case 5: return multiply<T, SIDE, M, std::min(5, MOST)>;
    case 6: return multiply<T, SIDE, M, std::min(6, MOST)>;
    default: return multiply<T, SIDE, M, MOST>;
  }
}

template <class T, int SIDE>
Multiply<T> multiply_for(int m, int n) {
  switch (m) {
    case 1: return multiply_for<T, SIDE, 1>(n);
    case 2: return multiply_for<T, SIDE, 2>(n);
    case 3: return multiply_for<T, SIDE, 3>(n);
    default: return multiply_for<T, SIDE, 4>(n);
  }
}

// ---- one thread's way through the layers

template <class T, int SIDE>
class Worker {
 public:
  using V = Vec<T>;

  Worker(const Problem<T>& p, const Block<T>& block)
      : p_(p),
        b_(block),
        base_(b_.size()),
        floor_(b_.size()),
        origin_(few() ? b_.size() : 0),
        read_(few() ? b_.size() : 0),
        least_(few() ? b_.size() : 0),
        weights_(p.weights()),
        packed_(p.weights()),
        tangents_(p.weights()),
        bias_(p.channels) {
    load(p_, b_, p_.base, base_.data());
    load(p_, b_, p_.floor, floor_.data());
    // Tiles of three channels or, where that divides them better, of four.
    const bool by_four = p_.channels % 4 == 0 && p_.channels % 3 != 0;
    channel_parts_ = parts(p_.channels, by_four ? 4 : 3);
    column_parts_ = parts(b_.columns, by_four ? kByFour : kByThree);
    if (!few()) return;
    const int64_t c = p_.channels;
    for (int64_t i = 0; i < kSettle * c; ++i) std::copy(p_.slope, p_.slope + c, slopes_ + i * c);
    for (int64_t k = 0; k < kSettle; ++k)
      std::copy(p_.bias_slope, p_.bias_slope + c, bias_slopes_ + k * c);
  }

  // q = base + column h
  void read(const V* h, V* q) {
    each([&](int64_t i, int64_t c) { q[i] = base_[i] + p_.column[c] * h[i]; });
  }

  // dq = column dh
  void column(const V* dh, V* dq) {
    each([&](int64_t i, int64_t c) { dq[i] = p_.column[c] * dh[i]; });
  }

  // The layer's weights and bias, from what is trained and what was there before.
  void prepare(int64_t layer) {
    const int64_t c = p_.channels;
    const T* d = p_.kernel + layer * p_.weights();
    for (int64_t i = 0; i < p_.weights() / c; ++i)
      for (int64_t o = 0; o < c; ++o) weights_[i * c + o] = d[i * c + o] * p_.slope[o];
    for (int64_t o = 0; o < c; ++o) bias_[o] = p_.bias[layer * c + o] * p_.bias_slope[o];
    if (p_.initial == kMatrices) {
      const T* w = p_.initial_kernel + layer * p_.weights();
      for (int64_t i = 0; i < p_.weights(); ++i) weights_[i] += w[i];
      for (int64_t o = 0; o < c; ++o) bias_[o] += p_.initial_bias[layer * c + o];
    } else if (p_.initial == kFeatures) {
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

  // For every tile of the result: finish(index of its corner, first channel, channels, columns,
  // tile), where the tile is W in (+ W2 in2).
  template <class Finish>
  void convolve(const V* in, const T* w, const V* in2, const T* w2, Finish finish) {
    const int64_t c = p_.channels, r = b_.reach;
    for (int64_t g = 0; g < b_.groups; ++g)
      for (int64_t y = 0; y < b_.rows; ++y) {
        int64_t above = std::max<int64_t>(0, r - y), below = std::max<int64_t>(0, y + r + 1 - b_.rows);
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
            finish(b_.at(g, y, o) + x, o, m, n, tile);
          }
        }
      }
  }

  // Is a layer so narrow that `forward` takes all channels at once? Then it leaves q alone.
  bool few() const { return p_.dense() && p_.channels >= 3 && p_.channels <= 6; }

  // Before the first of some layers, whose state is `h`.
  void begin(const V* h, V* lost) {
    if (!few()) return;
    each([&](int64_t k, int64_t c) {
      const bool carried = p_.carry[c] != 0;
      origin_[k] = carried ? h[k] : V{};
      if (!carried) lost[k] = h[k];
      read_[k] = base_[k] + p_.column[c] * origin_[k];
      least_[k] = floor_[k] - origin_[k];
    });
  }

  // State and q of layer `layer` to those of the next. Millions of layers each add less to the state
  // than its last digit: what the sum has lost is kept in `lost`, and added to the next term. Where
  // there are `few` channels, `lost` is all that was added since the state was `origin_`, and where the
  // next state is not to be `seen`, `lost` alone tells it until it settles: every `kSettle` layers,
  // where segments end, and behind the last one.
  // A state that is kept is written to memory that no cache may hold: the next one's is fetched
  // meanwhile, as `backward` fetches the state two layers below.
  void forward(int64_t layer, const V* h, const V* q, V* lost, V* h_next, V* q_next, bool seen) {
    const int64_t ahead = h_next == h ? 0 : b_.size();
    if (few()) {
      V* next = seen ? h_next : nullptr;
      switch (p_.channels) {
        case 3: forward_few<3>(layer, lost, next); break;
        case 4: forward_few<4>(layer, lost, next); break;
        case 5: forward_few<5>(layer, lost, next); break;
        default: forward_few<6>(layer, lost, next);
      }
      if ((layer + 1) % kSettle == 0 || layer + 1 == p_.layers) settle(h_next, lost);
      return;
    }
    prepare(layer);
    pack(weights_.data(), false, packed_.data());
    convolve(q, packed_.data(), nullptr, nullptr,
             [&](int64_t at, int64_t o, int64_t m, int64_t n, const V* tile) {
               for (int64_t i = 0; i < m; ++i)
                 for (int64_t x = 0; x < n; ++x) {
                   int64_t k = at + i * b_.stride() + x;
                   V term = tile[i * n + x] + bias_[o + i];
                   if (k % kInLine == 0) __builtin_prefetch(h_next + k + ahead, 1, 2);
                   h_next[k] = add(o + i, h[k], term, floor_[k], lost + k);
                   q_next[k] = base_[k] + p_.column[o + i] * h_next[k];
                 }
             });
  }

  // The same with tangents: of the parameters dk, db and of the state and q.
  void tangent(int64_t layer, const T* dk, const T* db, const V* h, const V* q, const V* dh,
               const V* dq, V* lost, V* h_next, V* q_next, V* dh_next, V* dq_next) {
    const int64_t c = p_.channels;
    forward(layer, h, q, lost, h_next, q_next, true);
    if (few()) {
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
                   V dz = tile[i * n + x] + db[layer * c + u] * p_.bias_slope[u] + p_.carry[u] * dh[k];
                   V next = h_next[k] > floor_[k] ? dz : V{};
                   dh_next[k] = next;
                   dq_next[k] = p_.column[u] * next;
                 }
             });
  }

  // g where the state is above its floor, in an array whose padding is zero.
  void mask(const V* h, const V* g, V* gz) {
    each([&](int64_t i, int64_t) { gz[i] = h[i] > floor_[i] ? g[i] : V{}; });
  }

  // From derivatives by a layer's z to those by the state h that it read, masked unless it is the
  // lowest; the gradients by the layer's parameters go to `by_kernel` and `by_bias`.
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

  // Of `few` channels: the state to `h`, what the sum of all layers so far has lost to `lost`.
  void settle(V* h, V* lost) {
    const V *base = base_.data(), *floors = floor_.data();
    V *origin = origin_.data(), *read = read_.data(), *least = least_.data();
    for (int64_t c = 0, k = 0; c < p_.channels; ++c) {
      const T column = p_.column[c];
      const bool carried = p_.carry[c] != 0;
      for (const int64_t end = k + b_.columns; k < end; ++k) {
        const V z = origin[k] + lost[k], floor = floors[k];
        // Where the sum was cut off at its least, z may be a digit beside the floor.
        const V state = lost[k] > least[k] && z > floor ? z : floor;
        h[k] = state;
        if (!carried) continue;
        lost[k] -= state - origin[k];
        origin[k] = state;
        read[k] = base[k] + column * state;
        least[k] = floor - state;
      }
    }
  }

  // The state of channel `o` above `h`, to whose z the layer adds `term`, and what the sum loses.
  V add(int64_t o, const V& h, V term, const V& floor, V* lost) {
    V old = p_.carry[o] * h;
    term += *lost;
    V z = old + term, added = z - old;
    *lost = z > floor ? (old - (z - added)) + (term - added) : V{};
    return z > floor ? z : floor;
  }

  // Weights and biases of layer `from` and those behind it up to the next `settle`, all in one: so many
  // layers do not wait for one another, as a layer's own product would for them.
  template <int C>
  void prepare_few(int64_t from) {
    const int64_t layers = std::min<int64_t>(kSettle, p_.layers - from), inputs = p_.inputs;
    const T *d = p_.kernel + from * C * C, *b = p_.bias + from * C;
    T *weights = ready_, *biases = ready_bias_;
#pragma GCC ivdep
    for (int64_t i = 0; i < layers * C * C; ++i) weights[i] = d[i] * slopes_[i];
#pragma GCC ivdep
    for (int64_t i = 0; i < layers * C; ++i) biases[i] = b[i] * bias_slopes_[i];
    if (p_.initial == kMatrices) {
      const T *w = p_.initial_kernel + from * C * C, *v = p_.initial_bias + from * C;
      for (int64_t i = 0; i < layers * C * C; ++i) weights[i] += w[i];
      for (int64_t i = 0; i < layers * C; ++i) biases[i] += v[i];
    } else if (p_.initial == kFeatures) {
      const T *u = p_.initial_kernel + from * inputs, *v = p_.initial_bias + from;
      for (int64_t k = 0; k < layers; ++k) {
        for (int64_t i = 0; i < inputs; ++i) weights[(k * C + i) * C + inputs] += u[k * inputs + i];
        biases[k * C + inputs] += v[k];
      }
    }
  }

  // A number for all lanes: up to 4 channels leave it in its register.
  template <int C>
  static V held(T value) {
    V all = value - V{};
    if (C <= 4) hold(all);
    return all;
  }

  // `forward` of a dense layer of `C` channels, all of which are in registers at once. It neither
  // reads nor writes q. A unit that carries nothing has zero for its origin.
  template <int C>
  void forward_few(int64_t layer, V* lost, V* h_next) {
    if (layer % kSettle == 0) prepare_few<C>(layer);
    return h_next != nullptr ? forward_few<C, true>(layer, lost, h_next)
                             : forward_few<C, false>(layer, lost, h_next);
  }

  template <int C, bool SEEN>
  void forward_few(int64_t layer, V* lost, [[maybe_unused]] V* h_next) {
    const T *own = ready_ + layer % kSettle * C * C, *bias = ready_bias_ + layer % kSettle * C;
    // Loads are what this loop takes its time for: up to 4 channels, all that is the same for every
    // example stays in registers.
    V weights[C][C], biases[C], column[C];
    bool carried[C];
#pragma GCC unroll 8
    for (int i = 0; i < C; ++i) {
#pragma GCC unroll 8
      for (int o = 0; o < C; ++o) weights[i][o] = held<C>(own[i * C + o]);
      biases[i] = held<C>(bias[i]);
      column[i] = held<C>(p_.column[i]);
      carried[i] = p_.carry[i] != 0;
    }
    const V *reads = read_.data(), *leasts = least_.data();
    [[maybe_unused]] const V *floors = floor_.data(), *origins = origin_.data();
    for (int64_t x = 0; x < b_.columns; ++x) {
      V term[C];
#pragma GCC unroll 8
      for (int o = 0; o < C; ++o) term[o] = biases[o];
#pragma GCC unroll 8
      for (int i = 0; i < C; ++i) {
        const int64_t k = i * b_.columns + x;
        V q = reads[k] + column[i] * lost[k];
#pragma GCC unroll 8
        for (int o = 0; o < C; ++o) term[o] += q * weights[i][o];
      }
#pragma GCC unroll 8
      for (int o = 0; o < C; ++o) {
        const int64_t k = o * b_.columns + x;
        const V added = carried[o] ? lost[k] + term[o] : term[o], least = leasts[k];
        lost[k] = added > least ? added : least;
        if constexpr (SEEN) {
          const V floor = floors[k];
          const V z = origins[k] + added;
          h_next[k] = z > floor ? z : floor;
        }
      }
    }
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
    const int64_t c = p_.channels, r = b_.reach;
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
  // Of `few` channels: a state, q of it, and what brings it down to the floor.
  Buffer<V> origin_, read_, least_;
  Buffer<T> weights_, packed_, tangents_, bias_;
  // Weights and biases of `kSettle` layers of `few` channels, and their slopes once for each layer.
  T ready_[kSettle * 6 * 6], ready_bias_[kSettle * 6];
  T slopes_[kSettle * 6 * 6], bias_slopes_[kSettle * 6];
  int64_t channel_parts_, column_parts_;
};

// ---- blocks over threads

using Failed = std::atomic<bool>;

// work(block, its number, own, has another failed?) for every block, in the order of their numbers
// as threads come free; where there is a thread for each, the calling one, which begins first, has
// the last block, which is the largest. `own` is the thread's Own(problem, its largest block).
template <class Own, class T, class Work>
void over_blocks(const Problem<T>& p, Work work) {
  const int64_t count = p.blocks;
  const bool one_each = count <= p.threads;
  std::atomic<int64_t> next{0};
  Failed failed{false};
  Team::run(std::min<int64_t>(p.threads, count), [&](int64_t thread) {
    try {
      Pool::number() = thread;
      Own own(p, Block<T>(p, 0, parts(p.vectors(), count)));
      auto at = [&](int64_t k) {
        int64_t first = part(p.vectors(), count, k);
        work(Block<T>(p, first, part(p.vectors(), count, k + 1) - first), k, own, failed);
      };
      if (one_each) return at(count - 1 - thread);
      for (int64_t k; (k = next++) < count;) at(k);
    } catch (const std::bad_alloc&) {
      failed = true;
    }
  });
  if (failed) throw std::bad_alloc();
}

template <class T>
struct Nothing {
  Nothing(const Problem<T>&, const Block<T>&) {}
};

template <class T, int SIDE>
void forward(const Problem<T>& p, T* h_out) {
  over_blocks<Nothing<T>>(p, [&](const Block<T>& block, int64_t, Nothing<T>&, const Failed&) {
    Worker<T, SIDE> worker(p, block);
    Buffer<Vec<T>> h(block.size()), lost(block.size()), q0(block.size()), q1(block.size());
    load(p, block, p.h0, h.data());
    worker.read(h.data(), q0.data());
    Vec<T>*q = q0.data(), *next = q1.data();
    worker.begin(h.data(), lost.data());
    for (int64_t layer = 0; layer < p.layers; ++layer, std::swap(q, next))
      worker.forward(layer, h.data(), q, lost.data(), h.data(), next, false);
    store(p, block, h.data(), h_out);
  });
}

template <class T, int SIDE>
void tangent(const Problem<T>& p, const T* dk, const T* db, const T* dh0, T* h_out, T* dh_out) {
  over_blocks<Nothing<T>>(p, [&](const Block<T>& block, int64_t, Nothing<T>&, const Failed&) {
    using V = Vec<T>;
    Worker<T, SIDE> worker(p, block);
    const int64_t size = block.size();
    Buffer<V> h(size), dh(size), lost(size), buffers(4 * size);
    V *q = buffers.data(), *q_next = q + size, *dq = q + 2 * size, *dq_next = q + 3 * size;
    load(p, block, p.h0, h.data());
    load(p, block, dh0, dh.data());
    worker.read(h.data(), q);
    worker.column(dh.data(), dq);
    worker.begin(h.data(), lost.data());
    for (int64_t layer = 0; layer < p.layers; ++layer) {
      worker.tangent(layer, dk, db, h.data(), q, dh.data(), dq, lost.data(), h.data(), q_next,
                     dh.data(), dq_next);
      std::swap(q, q_next);
      std::swap(dq, dq_next);
    }
    store(p, block, h.data(), h_out);
    store(p, block, dh.data(), dh_out);
  });
}


// Derivatives [state] by the state h above the last layer, zero for the lanes without an example.
template <class T>
void descend(const Problem<T>& p, const Block<T>& b, const Head<T>& head, const Vec<T>* h,
             Vec<T>* g) {
  using V = Vec<T>;
  const int64_t vectors = p.dense() ? b.columns : b.groups, columns = p.dense() ? 1 : b.columns;
  std::fill(g, g + b.size(), V{});
  for (int64_t v = 0; v < vectors; ++v)
    for (int64_t k = 0; k < p.outputs; ++k) {
      const T* a = head.head + k * p.channels * p.positions();
      auto at = [&](int64_t c, int64_t y) { return p.dense() ? b.at(0, 0, c) + v : b.at(v, y, c); };
      V f = {}, slope = {};
      for (int64_t c = 0; c < p.channels; ++c)
        for (int64_t y = 0; y < p.rows; ++y)
          for (int64_t x = 0; x < columns; ++x)
            f += a[c * p.positions() + y * (p.columns + p.reach()) + x] * h[at(c, y) + x];
      for (int64_t lane = 0; lane < kLanes<T>; ++lane) {
        int64_t n = (b.first + v) * kLanes<T> + lane;
        if (n >= p.examples) break;
        T value = f[lane] + head.offset[n * p.outputs + k];
        slope[lane] = head.factor[n] * value + head.shift[n * p.outputs + k];
      }
      for (int64_t c = 0; c < p.channels; ++c)
        for (int64_t y = 0; y < p.rows; ++y)
          for (int64_t x = 0; x < columns; ++x)
            g[at(c, y) + x] += a[c * p.positions() + y * (p.columns + p.reach()) + x] * slope;
    }
}

// A thread's memory on the way to a gradient. What follows the rows of an image stays zero in it
// from block to block; a smaller block leaves some of it unused.
template <class T>
struct Scratch {
  using V = Vec<T>;
  const int64_t size;  // of a state
  Buffer<V> starts, states, buffers;
  Buffer<T> by_kernel, by_bias;

  Scratch(const Problem<T>& p, const Block<T>& largest)
      : size(largest.size()),
        starts(2 * parts(p.layers, p.segment) * size, false),
        states((p.segment + 1) * size, p.reach() > 0),
        buffers(5 * size),
        by_kernel(kChunk * p.weights(), false),
        by_bias(kChunk * p.channels, false) {}
};

// The layers' gradients, `kChunk` layers at a time, added up over the blocks in the order of their
// numbers, whichever thread has them.
//
// Given rates, the last block takes a step of gradient descent in `kernel` and `bias` instead, which
// are the problem's own: nobody reads a chunk's any more once all blocks have added to it. Where all
// blocks are at work at once, they then stay within a few chunks of one another, and no more than
// those chunks' gradients exist. There may be step after step, none of which a block begins before
// all have ended the last one.
template <class T>
class Sums {
 public:
  Sums(const Problem<T>& p, const Rates<T>* rates, T* kernel, T* bias)
      : p_(p),
        rates_(rates),
        results_{kernel, bias},
        a_layer_{p.weights(), p.channels},
        chunks_(parts(p.layers, kChunk)),
        kept_(p.blocks > p.threads ? chunks_ : std::min(chunks_, ahead(a_layer_[0]))),
        kernels_(rates ? kept_ * kChunk * a_layer_[0] : 0, false),
        biases_(rates ? kept_ * kChunk * a_layer_[1] : 0, false),
        added_(new std::atomic<int64_t>[chunks_]()) {}

  // Add block `number`'s gradients of a chunk; false where another block has failed.
  bool add(int64_t step, int64_t number, int64_t chunk, const T* by_kernel, const T* by_bias,
           const std::atomic<bool>& failed) {
    const int64_t before = step * p_.blocks;
    if (!wait(chunk, before + number, failed)) return false;
    const bool taken = rates_ != nullptr && chunk + kept_ < chunks_;
    if (number == 0 && taken && !wait(chunk + kept_, before + p_.blocks, failed)) return false;
    const T* own[] = {by_kernel, by_bias};
    T* stored[] = {kernels_.data(), biases_.data()};
    const int64_t from = chunk * kChunk, layers = std::min<int64_t>(kChunk, p_.layers - from);
    for (int k = 0; k < 2; ++k) {
      const int64_t n = layers * a_layer_[k];
      T* result = results_[k] + from * a_layer_[k];
      T* sum = rates_ ? stored[k] + chunk % kept_ * kChunk * a_layer_[k] : result;
      if (number == 0) std::copy(own[k], own[k] + n, sum);
      else for (int64_t i = 0; i < n; ++i) sum[i] += own[k][i];
      if (rates_ && number == p_.blocks - 1)
        for (int64_t i = 0; i < n; ++i)
          result[i] = rates_->keep * result[i] - rates_->rate * sum[i];
    }
    added_[chunk].store(before + number + 1, std::memory_order_release);
    return true;
  }

 private:
  // Chunks by which one block may be ahead of another: as many as take little memory, since on a
  // shared machine a thread may be gone for milliseconds, and the others then wait for it.
  static int64_t ahead(int64_t weights) {
    return std::max<int64_t>(16, (4 << 20) / (kChunk * weights * int64_t(sizeof(T))));
  }

  // Until a chunk has been added to so many times.
  bool wait(int64_t chunk, int64_t times, const std::atomic<bool>& failed) {
    for (Waiting waiting; added_[chunk].load(std::memory_order_acquire) != times; waiting.pause())
      if (failed) return false;
    return true;
  }

  const Problem<T>& p_;
  const Rates<T>* rates_;
  T* results_[2];
  int64_t a_layer_[2], chunks_, kept_;
  Buffer<T> kernels_, biases_;
  std::unique_ptr<std::atomic<int64_t>[]> added_;
};

// One block's way up from `own`'s first state and down again: top(state above the last layer, g) is
// to fill in the derivatives by that state. They are told by the first state, which is there again;
// nullptr where another block has failed.
template <class T, int SIDE, class Top>
Vec<T>* up_and_down(const Problem<T>& p, Worker<T, SIDE>& worker, Scratch<T>& own, Sums<T>& sums,
                    int64_t step, int64_t number, const std::atomic<bool>& failed, Top top) {
  using V = Vec<T>;
  const int64_t a_layer = p.weights(), c = p.channels;
  const int64_t size = own.size, length = p.segment, segments = parts(p.layers, length);
  Buffer<V>&starts = own.starts, &states = own.states, &buffers = own.buffers;
  Buffer<T>&by_kernel = own.by_kernel, &by_bias = own.by_bias;
  V *q = buffers.data(), *q_next = q + size, *gz = q + 2 * size, *gz_next = q + 3 * size,
    *lost = q + 4 * size;
  std::fill(lost, lost + size, V{});
  auto state = [&](int64_t k) { return states.data() + k * size; };
  auto run = [&](int64_t segment, bool keep) {
    const int64_t from = segment * length, end = std::min(p.layers, from + length);
    worker.read(state(0), q);
    worker.begin(state(0), lost);
    for (int64_t layer = from; layer < end; ++layer, std::swap(q, q_next))
      worker.forward(layer, state(keep ? layer - from : 0), q,
                     lost, state(keep ? layer - from + 1 : 0), q_next, keep);
    return end - from;
  };
  // A segment starts from its state and what that has lost.
  auto start = [&](int64_t segment) { return starts.data() + 2 * segment * size; };
  for (int64_t segment = 0; segment < segments - 1; ++segment) {
    std::copy(state(0), state(1), start(segment));
    std::copy(lost, lost + size, start(segment) + size);
    run(segment, false);
  }
  int64_t layers = run(segments - 1, true);
  top(state(layers), gz_next);
  std::fill(gz, gz + size, V{});
  worker.mask(state(layers), gz_next, gz);
  std::fill(gz_next, gz_next + size, V{});
  for (int64_t segment = segments - 1; segment >= 0; --segment) {
    if (segment < segments - 1) {
      std::copy(start(segment), start(segment) + size, state(0));
      std::copy(start(segment) + size, start(segment + 1), lost);
      layers = run(segment, true);
    }
    for (int64_t layer = segment * length + layers - 1; layer >= segment * length; --layer) {
      const int64_t k = layer % kChunk;
      worker.backward(layer, state(layer - segment * length), q, gz, gz_next,
                      by_kernel.data() + k * a_layer, by_bias.data() + k * c);
      std::swap(gz, gz_next);
      if (k != 0) continue;
      const int64_t chunk = layer / kChunk;
      if (!sums.add(step, number, chunk, by_kernel.data(), by_bias.data(), failed)) return nullptr;
    }
  }
  return gz;
}

template <class T, int SIDE>
void gradient(const Problem<T>& p, const Head<T>& head, const Rates<T>* rates, T* h_out, T* dh0,
              T* dk, T* db) {
  using V = Vec<T>;
  Sums<T> sums(p, rates, dk, db);
  over_blocks<Scratch<T>>(p, [&](const Block<T>& block, int64_t number, Scratch<T>& own,
                                 const Failed& failed) {
    Worker<T, SIDE> worker(p, block);
    load(p, block, p.h0, own.states.data());
    const V* g = up_and_down(p, worker, own, sums, 0, number, failed, [&](const V* h, V* g) {
      store(p, block, h, h_out);
      descend(p, block, head, h, g);
    });
    if (g != nullptr) store(p, block, g, dh0);
  });
}

}  // namespace

#include "narrow_steps.h"

namespace {

// ---- what JAX calls

struct Call {
  XLA_FFI_CallFrame* frame;
  XLA_FFI_Buffer& in(int i) const { return *static_cast<XLA_FFI_Buffer*>(frame->args.args[i]); }
  template <class T>
  T* arg(int i) const { return static_cast<T*>(in(i).data); }
  template <class T>
  T* result(int i) const {
    return static_cast<T*>(static_cast<XLA_FFI_Buffer*>(frame->rets.rets[i])->data);
  }
};

// The operands that all calls begin with: settings, units, kernel, bias, initial kernel and bias,
// base, floor, h0.
constexpr int kOperands = 9;

template <class T>
Problem<T> problem(const Call& call) {
  const int32_t* settings = call.arg<int32_t>(0);
  Problem<T> p = {};
  p.side = settings[0];
  p.initial = settings[1];
  p.rows = settings[2];
  p.columns = settings[3];
  p.inputs = settings[4];
  p.threads = settings[5];
  p.blocks = settings[6];
  p.segment = settings[7];
  p.wide = settings[8];
  p.kept = settings[9];
  p.layers = call.in(3).dims[0];
  p.channels = call.in(3).dims[1];
  p.examples = call.in(8).dims[2];
  const T* units = call.arg<T>(1);
  p.slope = units;
  p.bias_slope = units + p.channels;
  p.column = units + 2 * p.channels;
  p.carry = units + 3 * p.channels;
  p.kernel = call.arg<T>(2);
  p.bias = call.arg<T>(3);
  p.initial_kernel = call.arg<T>(4);
  p.initial_bias = call.arg<T>(5);
  p.base = call.arg<T>(6);
  p.floor = call.arg<T>(7);
  p.h0 = call.arg<T>(8);
  return p;
}

struct Forward {
  template <class T, int SIDE>
  static void run(const Call& call) {
    Problem<T> p = problem<T>(call);
    if (p.wide) return wide_forward<T>(p, call.result<T>(0));
    forward<T, SIDE>(p, call.result<T>(0));
  }
};

struct Tangent {
  template <class T, int SIDE>
  static void run(const Call& call) {
    const int k = kOperands;
    Problem<T> p = problem<T>(call);
    const T *dk = call.arg<T>(k), *db = call.arg<T>(k + 1), *dh0 = call.arg<T>(k + 2);
    T *h = call.result<T>(0), *dh = call.result<T>(1);
    if (p.wide) return wide_tangent<T>(p, dk, db, dh0, h, dh);
    tangent<T, SIDE>(p, dk, db, dh0, h, dh);
  }
};

struct Gradient {
  template <class T, int SIDE>
  static void run(const Call& call) {
    const int k = kOperands;
    Problem<T> p = problem<T>(call);
    p.outputs = call.in(k).dims[0];
    Head<T> head{call.arg<T>(k), call.arg<T>(k + 1), call.arg<T>(k + 2), call.arg<T>(k + 3)};
    T *h = call.result<T>(0), *dh0 = call.result<T>(1), *dk = call.result<T>(2),
      *db = call.result<T>(3);
    if (p.wide) return wide_gradient<T>(p, head, nullptr, h, dh0, dk, db);
    gradient<T, SIDE>(p, head, nullptr, h, dh0, dk, db);
  }
};

// A step of gradient descent on the middle layers: kernel and bias are operands and results at once.
struct Descent {
  template <class T, int SIDE>
  static void run(const Call& call) {
    const int k = kOperands;
    Problem<T> p = problem<T>(call);
    p.outputs = call.in(k).dims[0];
    Head<T> head{call.arg<T>(k), call.arg<T>(k + 1), call.arg<T>(k + 2), call.arg<T>(k + 3)};
    const Rates<T> rates{call.arg<T>(k + 4)[0], call.arg<T>(k + 4)[1]};
    T *h = call.result<T>(0), *dh0 = call.result<T>(1), *kernel = call.result<T>(2),
      *bias = call.result<T>(3);
    if (p.wide) return wide_gradient<T>(p, head, &rates, h, dh0, kernel, bias);
    gradient<T, SIDE>(p, head, &rates, h, dh0, kernel, bias);
  }
};

// Many steps of gradient descent on a dense network. Operands: those of all calls, with what the
// first layer's z is without its trained parameters for h0; `Ends`; rate and the number of steps.
// Results: outputs before the last step, and the parameters, which are operands and results at once.
struct Steps {
  template <class T, int SIDE>
  static void run(const Call& call) {
    const int k = kOperands;
    Problem<T> p = problem<T>(call);
    p.outputs = call.in(k + 5).dims[0];
    Ends<T> ends = {
        call.in(k).dims[0],
        call.arg<T>(k),
        {call.arg<T>(k + 1), call.arg<T>(k + 2), call.arg<T>(k + 3)},
        {call.arg<T>(k + 4), call.arg<T>(k + 5), call.arg<T>(k + 6)},
        {call.arg<T>(k + 7), call.arg<T>(k + 8), call.arg<T>(k + 9), call.arg<T>(k + 10)},
    };
    T* results[7];
    for (int i = 0; i < 7; ++i) results[i] = call.result<T>(i);
    steps<T>(p, ends, call.arg<T>(k + 11), *call.arg<int32_t>(k + 12), results);
  }
};

// The code is compiled twice, at the same time: for float, and with DNNTK_DOUBLE for what that part
// hands over.
#ifdef DNNTK_DOUBLE
using Real = double;
#else
using Real = float;
#endif

template <class Function, class T>
void run_side(const Call& call) {
  switch (call.arg<int32_t>(0)[0]) {
    case 1: return Function::template run<T, 1>(call);
    case 3: return Function::template run<T, 3>(call);
    case 5: return Function::template run<T, 5>(call);
  }
}

XLA_FFI_Error* error(XLA_FFI_CallFrame* frame, const char* message) {
  XLA_FFI_Error_Create_Args args = {};
  args.struct_size = XLA_FFI_Error_Create_Args_STRUCT_SIZE;
  args.message = message;
  args.errc = XLA_FFI_Error_Code_RESOURCE_EXHAUSTED;
  return frame->api->XLA_FFI_Error_Create(&args);
}

// Is this call only to tell the version?
bool asked(XLA_FFI_CallFrame* frame) {
  return frame->extension_start != nullptr &&
         frame->extension_start->type == XLA_FFI_Extension_Metadata;
}

template <class Function>
XLA_FFI_Error* handle(XLA_FFI_CallFrame* frame) {
  if (asked(frame)) {
    auto* metadata = reinterpret_cast<XLA_FFI_Metadata_Extension*>(frame->extension_start)->metadata;
    metadata->api_version.major_version = XLA_FFI_API_MAJOR;
    metadata->api_version.minor_version = XLA_FFI_API_MINOR;
    return nullptr;
  }
  if (frame->stage != XLA_FFI_ExecutionStage_EXECUTE) return nullptr;
  Call call{frame};
  try {
    run_side<Function, Real>(call);
  } catch (const std::bad_alloc&) {
    return error(frame, "dnntk: no memory for the states of a segment of layers");
  } catch (const std::exception& problem) {  // no thread could be started, say
    return error(frame, problem.what());
  }
  return nullptr;
}

}  // namespace

#ifdef DNNTK_DOUBLE
#define DNNTK_FUNCTION(name, Function) \
  extern "C" XLA_FFI_Error* dnntk_##name##_double(XLA_FFI_CallFrame* frame) { \
    return handle<Function>(frame); \
  }
#else
#define DNNTK_FUNCTION(name, Function) \
  extern "C" XLA_FFI_Error* dnntk_##name##_double(XLA_FFI_CallFrame*); \
  extern "C" XLA_FFI_Error* dnntk_##name(XLA_FFI_CallFrame* frame) { \
    const bool told = frame->stage == XLA_FFI_ExecutionStage_EXECUTE && !asked(frame); \
    const bool double_precision = told && Call{frame}.in(2).dtype == XLA_FFI_DataType_F64; \
    return double_precision ? dnntk_##name##_double(frame) : handle<Function>(frame); \
  }
#endif

DNNTK_FUNCTION(forward, Forward)
DNNTK_FUNCTION(tangent, Tangent)
DNNTK_FUNCTION(gradient, Gradient)
DNNTK_FUNCTION(descent, Descent)
DNNTK_FUNCTION(steps, Steps)
