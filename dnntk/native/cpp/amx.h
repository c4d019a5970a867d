// Wide dense layers in float32 where the processor multiplies matrices of bfloat16 (AMX).
//
// Its unit multiplies tiles of 16 x 32 and 32 x 16 numbers of 8 bits' precision sixteen times as fast
// as vectors do in float32, and adds up in float32. A float32 is the sum of three such numbers,
// exactly, so a product of two is nine of theirs. The three smallest are below 2^-25 of it and left
// out: what is there has the digits of a product in float32, for 6/16 of its arithmetic. (Henry, Tang
// and Heinecke, "Leveraging the bfloat16 artificial intelligence datatype for higher-precision
// computations", 2019.) The unit takes denormal numbers for zero; so does XLA's own code.
//
// It is the work of `Crew` (wide.h), split among threads in the same way. Examples are rows here, and
// units the lanes of vectors: so the way up, part of which is gone twice, transposes no weights.
//
//   z[n][out]   = sum_in q[n][in] W[in][out]
//   g[n][in]    = sum_out g[n][out] W[in][out]     W transposed
//   D'[in][out] = sum_n q[n][in] g[n][out]         q transposed
//
// The factors lie in tiles as the unit reads them, three for each: on the left [16 rows][32 terms], on
// the right [16 pairs of terms][16 columns][2]. The unit waits for lines on their way from the second
// to the first cache, not for arithmetic, and so does all that vectors do beside it: what counts is
// how many lines a layer touches.

#pragma once

#include "wide.h"

// DNNTK_AMX_EMULATED: the unit's instructions by vectors, so that machines without it test this code.
#if defined(__AVX512BW__) && defined(__linux__) && \
    (defined(DNNTK_AMX_EMULATED) || (defined(__AMX_TILE__) && defined(__AMX_BF16__)))
#define DNNTK_AMX 1

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace {
namespace amx {

using V = Vec<float>;

constexpr int64_t kTile = 16;  // rows of a tile, its columns or pairs of terms, its vectors
constexpr int64_t kStep = 32;  // terms of a tile, or two tiles of rows or columns
constexpr int64_t kParts = 3;  // of a float32
constexpr int64_t kFactor = kParts * kTile;  // vectors of a tile's three parts
constexpr int64_t kSlots = 6;                // of a step of terms, in which vectors may work
constexpr int64_t kSteps = 3;  // of terms at a time: as many as stay in the first cache
constexpr int64_t kColumns = 8;  // steps of columns at a time: their sums stay in the second
constexpr int64_t kLeast = int64_t{1} << 15;  // numbers of a state, or vectors are as fast

// May this process use the unit? The system must be asked.
inline bool allowed() {
  static const bool answer = [] {
    const char* off = std::getenv("DNNTK_AMX");
    if (off != nullptr && std::strcmp(off, "0") == 0) return false;
#ifdef DNNTK_AMX_EMULATED
    return true;
#else
    constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
    return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#endif
  }();
  return answer;
}

// Is there enough to do for it?
inline bool pays(const Problem<float>& p) { return p.channels * p.examples >= kLeast; }

#ifdef DNNTK_AMX_EMULATED

// While it lives, this thread's tiles are full ones.
struct Session {};

inline __m512* tile(int k) {
  alignas(64) static thread_local __m512 tiles[8][kTile];
  return tiles[k];
}

inline const char* row_of(const void* first, int64_t bytes, int64_t row) {
  return static_cast<const char*>(first) + bytes * row;
}

template <int K>
inline void load_tile(const V* from, int64_t stride) {
  for (int64_t m = 0; m < kTile; ++m) tile(K)[m] = _mm512_loadu_ps(row_of(from, stride, m));
}
template <int K>
inline void store_tile(V* to, int64_t stride) {
  for (int64_t m = 0; m < kTile; ++m)
    _mm512_storeu_ps(const_cast<char*>(row_of(to, stride, m)), tile(K)[m]);
}
template <int K>
inline void clear_tile() {
  std::fill_n(tile(K), kTile, _mm512_setzero_ps());
}
// C += A B: first and second terms of the pairs are summed apart, and then added to C. Of a pair the
// first lies in the lower half of its 32 bits.
template <int C, int A, int B>
inline void multiply_tiles() {
  const __m512i upper = _mm512_set1_epi32(0xffff0000);
  const auto first = [](__m512i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(v, 16)); };
  const auto second = [&](__m512i v) { return _mm512_castsi512_ps(_mm512_and_si512(v, upper)); };
  for (int64_t m = 0; m < kTile; ++m) {
    const int32_t* pairs = reinterpret_cast<const int32_t*>(tile(A) + m);
    __m512 sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int64_t k = 0; k < kTile; ++k) {
      const __m512i a = _mm512_set1_epi32(pairs[k]), b = _mm512_castps_si512(tile(B)[k]);
      sums[0] = _mm512_fmadd_ps(first(a), first(b), sums[0]);
      sums[1] = _mm512_fmadd_ps(second(a), second(b), sums[1]);
    }
    tile(C)[m] = _mm512_add_ps(tile(C)[m], _mm512_add_ps(sums[0], sums[1]));
  }
}

#else

// While it lives, this thread's unit is set to full tiles. Whoever set it before finds it so again.
class Session {
 public:
  Session() {
    Config own = {};
    own.bytes[0] = 1;
    for (int k = 0; k < 8; ++k) {
      own.bytes[16 + 2 * k] = 64;
      own.bytes[48 + k] = kTile;
    }
    __asm__ volatile("sttilecfg %0" : "=m"(before_));
    __asm__ volatile("ldtilecfg %0" : : "m"(own));
  }
  ~Session() { __asm__ volatile("ldtilecfg %0" : : "m"(before_)); }
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

 private:
  struct Config {
    alignas(64) uint8_t bytes[64];
  };
  Config before_;
};

template <int K>
inline void load_tile(const V* from, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(K) : "memory");
}
template <int K>
inline void store_tile(V* to, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(K) : "memory");
}
template <int K>
inline void clear_tile() {
  __asm__ volatile("tilezero %%tmm%c0" : : "i"(K));
}
// C += A B
template <int C, int A, int B>
inline void multiply_tiles() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}

#endif  // DNNTK_AMX_EMULATED

// Work in equal pieces, spread evenly over calls: piece() when it is due.
class Pace {
 public:
  Pace(int64_t pieces, int64_t calls) : pieces_(pieces), calls_(std::max<int64_t>(1, calls)) {}

  template <class Piece>
  void operator()(Piece piece) {
    for (due_ += pieces_; due_ >= calls_; due_ -= calls_) piece();
  }

 private:
  int64_t pieces_, calls_, due_ = 0;
};

// One side of a product: where it begins, and vectors to its next tile and to its next terms.
struct Side {
  const V* first;
  int64_t tile, step;
};

// The product of M tiles of rows and two of columns over so many steps of terms: to `sums`, [16 M][2]
// vectors, or added to what is there. The largest parts come last. The unit takes long enough for
// vectors to do something else: `meanwhile()` is called `kSlots` times a step.
template <int M, class Meanwhile>
inline void product(const Side& left, const Side& right, int64_t steps, bool fresh,
                    Meanwhile& meanwhile, V* sums) {
  constexpr int64_t kRow = 2 * kBytes, kVector = kBytes;
  const V *a = left.first, *b = right.first;
  if (fresh) {
    clear_tile<0>();
    clear_tile<1>();
    if constexpr (M > 1) clear_tile<2>(), clear_tile<3>();
  } else {
    load_tile<0>(sums, kRow);
    load_tile<1>(sums + 1, kRow);
    if constexpr (M > 1) {
      load_tile<2>(sums + 2 * kTile, kRow);
      load_tile<3>(sums + 2 * kTile + 1, kRow);
    }
  }
  auto rows = [&](int64_t part) {
    load_tile<4>(a + part * kTile, kVector);
    if constexpr (M > 1) load_tile<5>(a + left.tile + part * kTile, kVector);
  };
  auto columns = [&](int64_t part) {
    load_tile<6>(b + part * kTile, kVector);
    load_tile<7>(b + right.tile + part * kTile, kVector);
  };
  auto multiply = [&] {
    multiply_tiles<0, 4, 6>();
    multiply_tiles<1, 4, 7>();
    if constexpr (M > 1) multiply_tiles<2, 5, 6>(), multiply_tiles<3, 5, 7>();
    meanwhile();
  };
  for (; steps > 0; --steps, a += left.step, b += right.step) {
    rows(2), columns(0), multiply();
    rows(1), multiply();
    columns(1), multiply();
    rows(0), multiply();
    columns(2), multiply();
    columns(0), multiply();
  }
  store_tile<0>(sums, kRow);
  store_tile<1>(sums + 1, kRow);
  if constexpr (M > 1) {
    store_tile<2>(sums + 2 * kTile, kRow);
    store_tile<3>(sums + 2 * kTile + 1, kRow);
  }
}

// A vector as the sum of three, each of which has its digits in the upper half of every number.
struct Split {
  __m512i part[kParts];

  explicit Split(V v) {
    const __m512i half = _mm512_set1_epi32(0x8000), upper = _mm512_set1_epi32(0xffff0000);
    for (int k = 0; k < kParts - 1; ++k) {
      const __m512i bits = reinterpret_cast<__m512i>(v);
      part[k] = _mm512_and_si512(_mm512_add_epi32(bits, half), upper);
      v -= reinterpret_cast<V>(part[k]);
    }
    part[kParts - 1] = reinterpret_cast<__m512i>(v);  // what is left has no more digits
  }
};

inline void put(__m512i v, V* to) { _mm512_store_si512(reinterpret_cast<__m512i*>(to), v); }

// A row of a tile on the left: 32 terms one after the other.
inline void put_left(const Split& a, const Split& b, V* to) {
  alignas(kBytes) static const uint16_t kUpper[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21,
                                                      23, 25, 27, 29, 31, 33, 35, 37, 39, 41, 43,
                                                      45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  const __m512i upper = _mm512_load_si512(kUpper);
  for (int k = 0; k < kParts; ++k)
    put(_mm512_permutex2var_epi16(a.part[k], upper, b.part[k]), to + k * kTile);
}

// A row of a tile on the right: a pair of terms for each column.
inline void put_right(const Split& a, const Split& b, V* to) {
  for (int k = 0; k < kParts; ++k)
    put(_mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(a.part[k], 16), b.part[k]),
        to + k * kTile);
}

// A part of two rows on the left that follow one another, as a row on the right for the first 16
// columns and one for the others.
inline void put_right(const V* rows, V* first, V* second) {
  alignas(kBytes) static const uint16_t kFirst[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,
                                                      37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
                                                      11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i low = _mm512_load_si512(kFirst);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  const __m512i a = _mm512_load_si512(rows), b = _mm512_load_si512(rows + 1);
  put(_mm512_permutex2var_epi16(a, low, b), first);
  put(_mm512_permutex2var_epi16(a, high, b), second);
}

// Rows put together again: the two vectors that one was made of. What is left of a number after
// two parts has no more digits than the third one, so nothing is lost.
inline void taken_left(const V* row, V* both) {
  V part[2][kParts];
  for (int k = 0; k < kParts; ++k) {
    const __m512i all = _mm512_load_si512(row + k * kTile);
    const __m256i half[] = {_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1)};
    for (int v = 0; v < 2; ++v)
      part[v][k] = reinterpret_cast<V>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half[v]), 16));
  }
  for (int v = 0; v < 2; ++v) both[v] = part[v][0] + part[v][1] + part[v][2];
}

// What all threads read, and where they leave for each other what a weight gradient needs: q as
// tiles of units and steps of examples, and derivatives as every thread needs them itself on its way
// down, as tiles of its examples and steps of units; both as factors on the left.
//
// Other arrays are [32 units][16 examples][example][vector of units].
struct Shared {
  const Problem<float>& p;
  const int64_t steps;    // of units, and one more
  const int64_t panels;   // of 32 examples
  const int64_t vectors;  // of units
  const int64_t threads;
  Buffer<V> slope, bias_slope, column, carry;
  const int64_t group;  // layers between two meetings on the way down
  Ring<V> q, g;         // of two groups, so that a slower thread may still read
  Barrier barrier;

  Shared(const Problem<float>& p, bool down)
      : p(p),
        steps(parts(p.channels + 1, kStep)),
        panels(parts(p.examples, kStep)),
        vectors(2 * steps),
        threads(std::min<int64_t>(p.threads, panels)),
        slope(vectors), bias_slope(vectors), column(vectors), carry(vectors),
        group(together(p.layers, factors() * sizeof(V))),
        q(2 * group, down ? factors() : 0),
        g(2 * group + 1, down ? factors() : 0),
        barrier(threads) {
    const float* from[] = {p.slope, p.bias_slope, p.column, p.carry};
    Buffer<V>* to[] = {&slope, &bias_slope, &column, &carry};
    for (int k = 0; k < 4; ++k) std::memcpy(to[k]->data(), from[k], p.channels * sizeof(float));
  }

 private:
  int64_t factors() const { return vectors * panels * kFactor; }
};

class Crew {
 public:
  using Vector = V;
  using Session = amx::Session;
  using Shared = amx::Shared;

  Crew(Shared& shared, int64_t number, bool down)
      : s_(shared),
        p_(shared.p),
        c_(p_.channels),
        steps_(s_.steps),
        begin_(part(s_.panels, s_.threads, number)),
        panels_(part(s_.panels, s_.threads, number + 1) - begin_),
        in_(part(s_.vectors, s_.threads, number)),
        ins_(part(s_.vectors, s_.threads, number + 1) - in_),
        size(2 * panels_ * steps_ * 2 * kTile),
        reading(2 * panels_ * steps_ * kFactor),
        negligible_(p_, kStep, down),
        base_(size),
        floor_(size),
        bias_(s_.vectors),
        right_(2 * 2 * kColumns * kSteps * kFactor),
        sums_(std::max(size, kColumns * std::max(2 * panels_, ins_) * 2 * kTile)),
        head_(down ? p_.outputs * s_.vectors : 1) {
    arrange(p_.base, base_.data());
    arrange(p_.floor, floor_.data());
  }

  // From and to [unit][example].
  void arrange(const float* from, V* to) const {
    squares([&](int64_t n, int64_t c, V* square, int64_t at) {
      const int64_t lanes = lanes_from(n, p_.examples);
      for (int64_t i = 0; i < kTile; ++i) {
        const bool there = c + i < c_ && lanes > 0;
        square[i] = there ? copied<float>(from + (c + i) * p_.examples + n, lanes) : V{};
      }
      transpose<float>(square);
      for (int64_t i = 0; i < kTile; ++i) to[at + 2 * i] = square[i];
    });
  }
  void store(const V* from, float* to) const {
    squares([&](int64_t n, int64_t c, V* square, int64_t at) {
      for (int64_t i = 0; i < kTile; ++i) square[i] = from[at + 2 * i];
      transpose<float>(square);
      const int64_t lanes = lanes_from(n, p_.examples);
      for (int64_t i = 0; i < kTile; ++i)
        if (c + i < c_ && lanes > 0)
          ::put<float>(square[i], lanes, to + (c + i) * p_.examples + n);
    });
  }
  void store_derivatives(float* to) {
    for (int64_t step = 0; step < steps_; ++step)
      for (int64_t t = 0; t < 2 * panels_; ++t)
        for (int64_t i = 0; i < kTile; ++i)
          taken_left(g_ + factor(t, step) + i, &sums_[place(t, step) + 2 * i]);
    store(sums_.data(), to);
  }

  // q = base + column h, as the factor on the left.
  void read(int64_t, const V* h, V* q) const {
    rows([&](int64_t step, int64_t at, V* left) {
      left_row(base_[at] + s_.column[2 * step] * h[at],
               base_[at + 1] + s_.column[2 * step + 1] * h[at + 1], left);
    }, q);
  }
  void column(const V* dh, V* dq) const {
    rows([&](int64_t step, int64_t at, V* left) {
      left_row(s_.column[2 * step] * dh[at], s_.column[2 * step + 1] * dh[at + 1], left);
    }, dq);
  }

  // State and q of layer `layer` to those of the next.
  void forward(int64_t layer, const V* h, const V* q, V* h_next, V* q_next) {
    for (int64_t o = 0; o < s_.vectors; ++o) bias_[o] = bias(layer, o);
    const int64_t first = negligible_.up(layer) / kStep;
    if (h_next != h) std::copy(h, h + place(0, first), h_next);
    std::copy(q, q + factor(0, first), q_next);
    auto finish = [&](int64_t step, int64_t at, const V* sums, V* left) {
      V reads[2];
      for (int v = 0; v < 2; ++v) {
        const int64_t o = 2 * step + v, i = at + v;
        const V z = s_.carry[o] * h[i] + (sums[v] + bias_[o]);
        const V next = z > floor_[i] ? z : floor_[i];
        h_next[i] = next;
        reads[v] = base_[i] + s_.column[o] * next;
      }
      left_row(reads[0], reads[1], left);
    };
    times_weights({{q, p_.kernel, true}}, layer, first, finish, q_next);
  }

  // The same with tangents: of the parameters dk, db and of the state and q.
  void tangent(int64_t layer, const float* dk, const float* db, const V* h, const V* q, const V* dh,
               const V* dq, V* h_next, V* q_next, V* dh_next, V* dq_next) {
    forward(layer, h, q, h_next, q_next);
    for (int64_t o = 0; o < s_.vectors; ++o)
      bias_[o] = units(db + layer * c_, o) * s_.bias_slope[o];
    auto finish = [&](int64_t step, int64_t at, const V* sums, V* left) {
      V reads[2];
      for (int v = 0; v < 2; ++v) {
        const int64_t o = 2 * step + v, i = at + v;
        const V dz = s_.carry[o] * dh[i] + (sums[v] + bias_[o]);
        const V next = h_next[i] > floor_[i] ? dz : V{};
        dh_next[i] = next;
        reads[v] = s_.column[o] * next;
      }
      left_row(reads[0], reads[1], left);
    };
    times_weights({{dq, p_.kernel, true}, {q, dk, false}}, layer, 0, finish, dq_next);
  }

  // Derivatives by the state h above the last layer, masked, to `g`.
  void descend(const Head<float>& head, const V* h, V* g) {
    for (int64_t k = 0; k < p_.outputs; ++k)
      std::memcpy(head_.data() + k * s_.vectors, head.head + k * c_, c_ * sizeof(float));
    V* sums = sums_.data();  // of one example
    g_ = own(g);
    for (int64_t e = 0; e < panels_ * kStep; ++e) {
      const int64_t n = begin_ * kStep + e, t = e / kTile, i = e % kTile;
      auto at = [&](int64_t o) { return place(t, o / 2) + 2 * i + o % 2; };
      std::fill(sums, sums + s_.vectors, V{});
      for (int64_t k = 0; k < p_.outputs && n < p_.examples; ++k) {
        const V* a = head_.data() + k * s_.vectors;
        V products = {};
        for (int64_t o = 0; o < s_.vectors; ++o) products += a[o] * h[at(o)];
        const float f = head.factor[n] * (head.offset[n * p_.outputs + k] + sum<float>(products)) +
                        head.shift[n * p_.outputs + k];
        for (int64_t o = 0; o < s_.vectors; ++o) sums[o] += a[o] * f;
      }
      for (int64_t o = 0; o < s_.vectors; ++o) sums[o] = h[at(o)] > floor_[at(o)] ? sums[o] : V{};
      for (int64_t step = 0; step < steps_; ++step)
        left_row(sums[2 * step], sums[2 * step + 1], g_ + factor(t, step) + i);
    }
  }

  // From derivatives by a layer's z to those by the state h that it read, in `g`: masked, unless it is
  // the lowest. Own q of it goes to `q`, for a weight gradient.
  void backward(int64_t layer, const V* h, V* q, V* g) {
    V* below = own(g);
    auto finish = [&](int64_t t, int64_t step, int64_t i, const V* sums) {
      const int64_t at = place(t, step) + 2 * i, tile = factor(t, step) + i;
      V next[2];
      taken_left(g_ + tile, next);
      for (int64_t v = 0; v < 2; ++v) {
        const int64_t o = 2 * step + v;
        next[v] = s_.column[o] * sums[v] + s_.carry[o] * next[v];
        if (layer > 0) next[v] = h[at + v] > floor_[at + v] ? next[v] : V{};
      }
      left_row(next[0], next[1], below + tile);
    };
    const Weights all(*this, p_.kernel, layer, true);
    Leaving leaving(*this, h, q);
    Nothing nothing;
    auto down = [&](Range terms, Range columns, auto& beside) {
      multiply({2 * panels_, terms, columns}, 1, [&](int64_t) { return on_left(g_); },
               [&](int64_t, const Block& block, V* to) { return Transposed(all, block, to); }, beside,
               finish);
    };
    const int64_t left_out = negligible_.down(layer) / kStep;
    down({0, steps_}, {left_out, steps_}, leaving);
    if (left_out > 0) down({left_out, steps_}, {0, left_out}, nothing);
    g_ = below;
  }

  // Own rows of the gradient by a layer's D from all examples: for every row and two vectors of units,
  // put(in, first of out, values, how many), which goes to `to`. Then its bias, of which one thread
  // has all: put_bias(first of out, values, how many).
  template <class Put, class PutBias>
  void outer(int64_t, const V* q, const V* g, const float* to, bool, Put put, PutBias put_bias) {
    const int64_t tile = s_.panels * kFactor;
    auto finish_row = [&](int64_t t, int64_t step, int64_t i, const V* sums) {
      const int64_t row = (in_ + t) * kTile + i;
      for (int64_t v = 0, out = step * kStep; v < 2; ++v, out += kTile) {
        const int64_t o = 2 * step + v;
        if (row < c_) put(row, out, sums[v] * s_.slope[o], lanes(o));
        if (row == c_) put_bias(out, sums[v] * s_.bias_slope[o], lanes(o));
      }
      // What comes after the next tiles, on its way from memory.
      const bool down = t + 2 < ins_;
      const int64_t then = std::min(down ? row + kStep : row % kStep + in_ * kTile, c_ - 1);
      const float* at = to + then * c_ + std::min((step + !down) * kStep, c_ - 1);
      for (int64_t line = 0; line < 3; ++line) __builtin_prefetch(at + line * kTile, 1, 2);
    };
    Nothing nothing;
    const int64_t without = negligible_.without_gradient() / kStep;
    const V none[2] = {};
    for (int64_t step = 0; step < without; ++step)
      for (int64_t i = 0; i < ins_ * kTile; ++i) finish_row(i / kTile, step, i % kTile, none);
    multiply({ins_, {0, s_.panels}, {without, steps_}}, 1,
             [&](int64_t) { return Side{q + in_ * tile, tile, kFactor}; },
             [&](int64_t, const Block& block, V* to) { return Columns(s_, g, block, to); }, nothing,
             finish_row);
  }

  // How many numbers of vector `o` of the units are there.
  int64_t lanes(int64_t o) const { return lanes_from(o * kTile, c_); }

 private:
  Shared& s_;
  const Problem<float>& p_;
  const int64_t c_, steps_;
  const int64_t begin_, panels_;  // of examples
  const int64_t in_, ins_;

 public:
  const int64_t size;     // vectors of a state
  const int64_t reading;  // and of its q

 private:
  Negligible<float> negligible_;
  Buffer<V> base_, floor_, bias_, right_, sums_, head_;
  V* g_ = nullptr;  // derivatives by a layer's z, as factors

  static int64_t lanes_from(int64_t first, int64_t end) {
    return std::max<int64_t>(0, std::min<int64_t>(kLanes<float>, end - first));
  }

  // The first vector of 16 own examples and 32 units: in a state, and as a factor on the left.
  int64_t place(int64_t t, int64_t step) const { return (step * 2 * panels_ + t) * 2 * kTile; }
  int64_t factor(int64_t t, int64_t step) const { return (step * 2 * panels_ + t) * kFactor; }
  Side on_left(const V* of) const { return {of, kFactor, 2 * panels_ * kFactor}; }

  // A layer's weights, or what is to be added to D alone.
  class Weights {
   public:
    Weights(const Crew& crew, const float* kernel, int64_t layer, bool whole)
        : c_(crew.c_),
          slope_(crew.s_.slope.data()),
          kernel_(kernel + layer * crew.p_.weights()) {
      const Problem<float>& p = crew.p_;
      if (whole && p.initial == kMatrices) initial_ = p.initial_kernel + layer * p.weights();
      if (whole && p.initial == kFeatures) {
        features_ = p.initial_kernel + layer * p.inputs;
        inputs_ = p.inputs;
      }
    }

    const float* row(int64_t in) const { return kernel_ + in * c_; }

    // Vector `o` of row `in`, zero beyond the units.
    V vector(int64_t in, int64_t o) const {
      const int64_t lanes = lanes_from(o * kTile, c_);
      if (in >= c_ || lanes == 0) return V{};
      V value = copied<float>(row(in) + o * kTile, lanes) * slope_[o];
      if (initial_ != nullptr) value += copied<float>(initial_ + in * c_ + o * kTile, lanes);
      if (in < inputs_ && o == inputs_ / kTile) value[inputs_ % kTile] += features_[in];
      return value;
    }

    // The other way about: row tile `i` as columns, and four columns of vector `o`, from `first` on, as
    // two pairs of terms. A pair stays together, as 64 bits of a row.
    void transposed(int64_t i, int64_t o, int64_t first, V* to) const {
      const bool whole = (i + 1) * kTile <= c_ && (o + 1) * kTile <= c_ && initial_ == nullptr;
      V rows[kTile];
      const float *from = row(i * kTile) + o * kTile + first,
                  *slope = reinterpret_cast<const float*>(slope_ + o) + first;
      int64_t stride = c_;
      V factor[2];
      for (int k = 0; k < 2; ++k) {
        double pair;
        std::memcpy(&pair, slope + 2 * k, sizeof pair);
        factor[k] = reinterpret_cast<V>(_mm512_set1_pd(pair));
      }
      if (!whole || (inputs_ > 0 && o == inputs_ / kTile)) {
        for (int64_t m = 0; m < kTile; ++m) rows[m] = vector(i * kTile + m, o);
        from = reinterpret_cast<const float*>(rows) + first;
        stride = kTile;
        factor[0] = factor[1] = V{} + 1.0f;
      }
      V low[2], high[2];  // of columns, for eight rows
      for (int k = 0; k < 2; ++k) {
        __m512 every[2];
        for (int odd = 0; odd < 2; ++odd) {
          const float* at = from + (8 * k + odd) * stride;
          __m512 four = _mm512_zextps128_ps512(_mm_loadu_ps(at));
          four = _mm512_mask_broadcast_f32x4(four, 0x00f0, _mm_loadu_ps(at + 2 * stride));
          four = _mm512_mask_broadcast_f32x4(four, 0x0f00, _mm_loadu_ps(at + 4 * stride));
          every[odd] = _mm512_mask_broadcast_f32x4(four, 0xf000, _mm_loadu_ps(at + 6 * stride));
        }
        const __m512d a = _mm512_castps_pd(every[0]), b = _mm512_castps_pd(every[1]);
        low[k] = reinterpret_cast<V>(_mm512_unpacklo_pd(a, b)) * factor[0];
        high[k] = reinterpret_cast<V>(_mm512_unpackhi_pd(a, b)) * factor[1];
      }
      put_left(Split(low[0]), Split(low[1]), to);
      put_left(Split(high[0]), Split(high[1]), to + 1);
    }

   private:
    const int64_t c_;
    const V* slope_;
    const float *kernel_, *initial_ = nullptr, *features_ = nullptr;
    int64_t inputs_ = 0;
  };

  // What is multiplied by a layer's weights.
  struct Factors {
    const V* q;
    const float* kernel;
    bool whole;
  };

  // The sum of products: for every example and 32 units, from step `first` of the units on,
  // finish(step, place of the first of two vectors, sums, where they come to lie as a factor on the left
  // in `to`).
  template <class Finish>
  void times_weights(std::initializer_list<Factors> products, int64_t layer, int64_t first,
                     Finish finish, V* to) {
    auto source = [&](int64_t k, const Block& block, V* ready) {
      const Factors& of = products.begin()[k];
      return Straight(Weights(*this, of.kernel, layer, of.whole), block, ready);
    };
    auto finish_row = [&](int64_t t, int64_t step, int64_t i, const V* sums) {
      finish(step, place(t, step) + 2 * i, sums, to + factor(t, step) + i);
    };
    Nothing nothing;
    multiply({2 * panels_, {0, steps_}, {first, steps_}}, products.size(),
             [&](int64_t k) { return on_left(products.begin()[k].q); }, source, nothing, finish_row);
  }

  struct Range {
    int64_t first, end;

    int64_t count() const { return end - first; }
    // Part `k` of `many`.
    int64_t begin(int64_t many, int64_t k) const { return first + part(count(), many, k); }
  };

  // Tiles of rows, steps of terms and of columns.
  struct Extent {
    int64_t rows;
    Range terms, columns;
  };

  // Steps of terms and of columns.
  struct Block {
    int64_t from, end, first, last;

    int64_t terms() const { return end - from; }
    int64_t columns() const { return last - first; }
  };

  // The sum of products of left(k) by what source(k, block, to) makes ready, piece by piece: for every
  // row and 32 columns finish(tile of rows, step of columns, row, sums). A block of columns takes all
  // terms, some at a time, before the next one: its sums, what it reads on the left and two blocks of
  // what it reads on the right are all that the second cache must hold. The pieces of `beside` are
  // done on the way.
  template <class Left, class Source, class Beside, class Finish>
  void multiply(const Extent& all, int64_t products, Left left, Source source, Beside& beside,
                Finish& finish) {
    const int64_t blocks = parts(all.terms.count(), kSteps), passes = products * blocks;
    const int64_t many = parts(all.columns.count(), kColumns), pairs = parts(all.rows, 2);
    auto block = [&](int64_t pass) {
      const int64_t k = pass % blocks, column = pass / passes;
      return Block{all.terms.begin(blocks, k), all.terms.begin(blocks, k + 1),
                   all.columns.begin(many, column), all.columns.begin(many, column + 1)};
    };
    V* ready[] = {right_.data(), right_.data() + 2 * kColumns * kSteps * kFactor};
    auto prepared = [&](int64_t pass, V* to) {
      return source(pass % passes / blocks, block(pass), to);
    };
    auto first = prepared(0, ready[0]);
    for (int64_t k = 0; k < first.pieces; ++k) first.piece();
    Finishing behind(finish);
    Pace besides(beside.pieces, products * all.columns.count() * pairs * all.terms.count() * kSlots);
    for (int64_t pass = 0; pass < passes * many; ++pass) {
      const bool last = pass + 1 == passes * many, whole = pass % passes + 1 == passes;
      const Block now = block(pass);
      auto next = prepared(last ? pass : pass + 1, ready[1]);
      Pace preparing(last ? 0 : next.pieces, now.columns() * pairs * now.terms() * kSlots);
      const Side from = left(pass % passes / blocks);
      const int64_t a_tile = now.terms() * kFactor;
      for (int64_t step = now.first; step < now.last; ++step)
        for (int64_t t = 0; t < all.rows; t += 2) {
          Pace finishing(behind.pieces(), now.terms() * kSlots);
          auto meanwhile = [&] {
            preparing([&] { next.piece(); });
            finishing([&] { behind.piece(); });
            besides([&] { beside.piece(); });
          };
          const Side rows{from.first + t * from.tile + now.from * from.step, from.tile, from.step};
          const Side columns{ready[0] + 2 * (step - now.first) * a_tile, a_tile, kFactor};
          V* sums = sums_.data() + ((step - now.first) * all.rows + t) * 2 * kTile;
          const bool fresh = pass % passes == 0, two = t + 1 < all.rows;
          if (two) product<2>(rows, columns, now.terms(), fresh, meanwhile, sums);
          else product<1>(rows, columns, now.terms(), fresh, meanwhile, sums);
          if (whole) behind.next(t, step, two ? 2 : 1, sums);
        }
      if (whole) behind.rest();  // or the next block's sums come to lie over them
      std::swap(ready[0], ready[1]);
    }
  }

  struct Nothing {
    int64_t pieces = 0;
    void piece() {}
  };

  // A block of weights as the factor on the right, a pair of rows' vector at a time.
  class Straight {
   public:
    Straight(const Weights& all, const Block& block, V* to)
        : pieces(block.terms() * kTile * 2 * block.columns()),
          all_(all), first_(2 * block.first), last_(2 * block.last),
          a_tile_(block.terms() * kFactor), in_(block.from * kStep), o_(first_), to_(to) {}

    const int64_t pieces;

    void piece() {
      for (int64_t k = 2; k < 4; ++k) __builtin_prefetch(all_.row(in_ + k) + o_ * kTile, 0, 2);
      put_right(Split(all_.vector(in_, o_)), Split(all_.vector(in_ + 1, o_)),
                to_ + (o_ - first_) * a_tile_);
      if (++o_ < last_) return;
      o_ = first_;
      in_ += 2;
      to_ += in_ % kStep == 0 ? kFactor - kTile + 1 : 1;
    }

   private:
    const Weights all_;
    const int64_t first_, last_, a_tile_;
    int64_t in_, o_;
    V* to_;
  };

  // A block of weights, transposed, as the factor on the right: four terms of a tile at a time.
  class Transposed {
   public:
    Transposed(const Weights& all, const Block& block, V* to)
        : pieces(2 * block.columns() * block.terms() * 8),
          all_(all), from_(2 * block.from), end_(2 * block.end), i_(2 * block.first), o_(from_),
          to_(to) {}

    const int64_t pieces;

    void piece() {
      // The rows' next numbers, or those of the next rows.
      const bool within = o_ + 2 < end_;
      const int64_t i = i_ + !within, o = within ? o_ + 2 : from_ + o_ % 2;
      for (int64_t k = 0; k < 4; ++k)
        __builtin_prefetch(all_.row(i * kTile + 4 * four_ + k) + o * kTile, 0, 3);
      all_.transposed(i_, o_, 4 * four_, to_ + o_ % 2 * kTile / 2 + 2 * four_);
      if (++four_ < 4) return;
      four_ = 0;
      if (++o_ % 2 == 0) to_ += kFactor;
      if (o_ < end_) return;
      o_ = from_;
      ++i_;
    }

   private:
    const Weights all_;
    const int64_t from_, end_;
    int64_t i_, o_, four_ = 0;
    V* to_;
  };

  // The sums of the product before this one, which are finished while this one is made, row by row:
  // finish(tile of rows, step, row, sums).
  template <class Finish>
  class Finishing {
   public:
    explicit Finishing(Finish& finish) : finish_(finish) {}

    int64_t pieces() const { return rows_ - done_; }

    void piece() {
      finish_(t_ + done_ / kTile, step_, done_ % kTile, sums_ + 2 * done_);
      ++done_;
    }
    void rest() {
      while (done_ < rows_) piece();
    }
    void next(int64_t t, int64_t step, int64_t tiles, const V* sums) {
      rest();
      t_ = t;
      step_ = step;
      rows_ = tiles * kTile;
      done_ = 0;
      sums_ = sums;
    }

   private:
    Finish& finish_;
    const V* sums_ = nullptr;
    int64_t t_ = 0, step_ = 0, rows_ = 0, done_ = 0;
  };
  static void left_row(V a, V b, V* to) { put_left(Split(a), Split(b), to); }

  // Vector `o` of what is there for every unit.
  V units(const float* from, int64_t o) const {
    const int64_t lanes = lanes_from(o * kTile, c_);
    return lanes > 0 ? copied<float>(from + o * kTile, lanes) : V{};
  }

  V bias(int64_t layer, int64_t o) const {
    const int64_t unit = p_.inputs - o * kTile;
    V value = units(p_.bias + layer * c_, o) * s_.bias_slope[o];
    if (p_.initial == kMatrices) value += units(p_.initial_bias + layer * c_, o);
    if (p_.initial == kFeatures && unit >= 0 && unit < kTile) value[unit] += p_.initial_bias[layer];
    return value;
  }

  // f(step, place of the first of two vectors, where they lie as a factor).
  template <class F>
  void rows(F f, V* to) const {
    for (int64_t step = 0; step < steps_; ++step)
      for (int64_t t = 0; t < 2 * panels_; ++t)
        for (int64_t i = 0; i < kTile; ++i)
          f(step, place(t, step) + 2 * i, to + factor(t, step) + i);
  }

  // f(first example, first unit, a square, place of its first vector; the others are two apart).
  template <class F>
  void squares(F f) const {
    for (int64_t t = 0; t < 2 * panels_; ++t)
      for (int64_t o = 0; o < s_.vectors; ++o) {
        V square[kTile];
        f((2 * begin_ + t) * kTile, o * kTile, square, place(t, o / 2) + o % 2);
      }
  }

  // A block of all examples' derivatives, factors on the left, as the factor on the right: pair of
  // examples by pair of examples.
  class Columns {
   public:
    Columns(const Shared& s, const V* g, const Block& block, V* to)
        : pieces(block.terms() * block.columns() * kTile),
          s_(s), g_(g), begin_(block.from), end_(block.end), a_tile_(block.terms() * kFactor),
          step_(block.first), panel_(block.from), to_(to) {
      enter();
    }

    const int64_t pieces;

    void piece() {
      for (int64_t k = 0; k < kParts; ++k)
        put_right(from_ + k * kTile, to_ + pair_ + k * kTile, to_ + a_tile_ + pair_ + k * kTile);
      from_ += 2;
      if (++pair_ % (kTile / 2) == 0) from_ += kFactor - kTile;
      if (pair_ < kTile) return;
      pair_ = 0;
      to_ += kFactor;
      if (++panel_ == end_) {
        panel_ = begin_;
        ++step_;
        to_ += a_tile_;
      } else if (panel_ < leaves_) {
        return;
      }
      enter();
    }

   private:
    // The examples of the thread that has this panel.
    void enter() {
      int64_t thread = panel_ * s_.threads / s_.panels;
      while (part(s_.panels, s_.threads, thread) > panel_) --thread;
      while (part(s_.panels, s_.threads, thread + 1) <= panel_) ++thread;
      const int64_t first = part(s_.panels, s_.threads, thread);
      leaves_ = part(s_.panels, s_.threads, thread + 1);
      const int64_t own = leaves_ - first;
      from_ = g_ + 2 * (first * s_.steps + step_ * own + panel_ - first) * kFactor;
    }

    const Shared& s_;
    const V *g_, *from_ = nullptr;
    const int64_t begin_, end_, a_tile_;
    int64_t step_, panel_, leaves_ = 0, pair_ = 0;
    V* to_;
  };

  // Own q of a state h for a weight gradient, a vector of units and a panel of examples at a time; and
  // one unit more, of ones, whose row of the gradient is that by the bias.
  class Leaving {
   public:
    Leaving(const Crew& crew, const V* h, V* all)
        : pieces(crew.s_.vectors * crew.panels_), crew_(crew), h_(h), all_(all) {}

    const int64_t pieces;

    void piece() {
      const int64_t c = crew_.c_ - o_ * kTile;
      V squares[2][kTile];
      for (int64_t half = 0; half < 2; ++half) {
        const int64_t at = crew_.place(2 * panel_ + half, o_ / 2) + o_ % 2;
        for (int64_t i = 0; i < kTile; ++i)
          squares[half][i] = crew_.base_[at + 2 * i] + crew_.s_.column[o_] * h_[at + 2 * i];
        transpose<float>(squares[half]);
        if (c >= 0 && c < kTile) squares[half][c] = V{} + 1.0f;
      }
      V* to = all_ + (o_ * crew_.s_.panels + crew_.begin_ + panel_) * kFactor;
      for (int64_t i = 0; i < kTile; ++i) left_row(squares[0][i], squares[1][i], to + i);
      if (++panel_ < crew_.panels_) return;
      panel_ = 0;
      ++o_;
    }

   private:
    const Crew& crew_;
    const V* h_;
    V* all_;
    int64_t o_ = 0, panel_ = 0;
  };

  // Own examples of all that the threads leave for each other.
  V* own(V* g) const { return g + 2 * begin_ * steps_ * kFactor; }
};

}  // namespace amx
}  // namespace

#endif
