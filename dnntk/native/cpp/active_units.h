// Which units of a wide network are not zero.
//
// A pixel that is zero in all examples (a fifth of the pixels of digits) leaves its unit at zero
// until a layer changes the unit. If a unit's q is zero in every example, its weights multiply
// zeros and have no gradient; if its state is at the floor, no derivative passes. Products skip
// such units, among their terms and, on the way down, among their results. This changes no bit:
// what is skipped is zero.
//
// On the way up every thread records the active units of its own examples; the way down uses the
// units that are active in any thread's examples, so that results do not depend on the number of
// threads.

#pragma once

#include "memory.h"
#include "problem.h"
#include "simd.h"

namespace dnntk {
namespace {

// Some of a layer's units, ascending.
struct UnitList {
  std::vector<int32_t> units;
  bool all = true;

  int64_t count() const { return units.size(); }

  // The number of listed units below `unit`.
  int64_t before(int64_t unit) const {
    return std::lower_bound(units.begin(), units.end(), unit) - units.begin();
  }
};

// A bit for every thread, state and unit; state `layers` is the last one.
class ActiveUnits {
 public:
  // Keeps the last `states` states.
  ActiveUnits(int64_t threads, int64_t states, int64_t units)
      : states_(states),
        units_(units),
        words_(parts(units, kBits)),
        bits_(threads * states * words_) {}

  bool has(int64_t thread, int64_t state, int64_t unit) const {
    return row(thread, state)[unit / kBits] >> unit % kBits & 1;
  }
  void set(int64_t thread, int64_t state, int64_t unit) {
    row(thread, state)[unit / kBits] |= uint64_t{1} << unit % kBits;
  }
  void clear(int64_t thread, int64_t state) {
    std::fill_n(row(thread, state), words_, uint64_t{0});
  }

  // Units that are active for any of the threads [first, end).
  void list(int64_t first, int64_t end, int64_t state, UnitList& to) const {
    auto word = [&](int64_t w) {
      uint64_t any = 0;
      for (int64_t t = first; t < end; ++t) any |= row(t, state)[w];
      return any;
    };
    int64_t count = 0;
    for (int64_t w = 0; w < words_; ++w) count += __builtin_popcountll(word(w));
    if (count > units_ - units_ / kWorthwhile) return list_all(to);
    to.all = false;
    to.units.clear();
    for (int64_t w = 0; w < words_; ++w)
      for (uint64_t left = word(w); left != 0; left &= left - 1)
        to.units.push_back(w * kBits + __builtin_ctzll(left));
  }
  void list_all(UnitList& to) const {
    if (to.all && to.count() == units_) return;
    to.all = true;
    to.units.resize(units_);
    for (int64_t k = 0; k < units_; ++k) to.units[k] = k;
  }

 private:
  static constexpr int64_t kBits = 64;
  static constexpr int64_t kWorthwhile = 32;  // a list pays if one unit in 32 is inactive

  uint64_t* row(int64_t thread, int64_t state) {
    return bits_.data() + (thread * states_ + state % states_) * words_;
  }
  const uint64_t* row(int64_t thread, int64_t state) const {
    return bits_.data() + (thread * states_ + state % states_) * words_;
  }

  const int64_t states_, units_, words_;
  Buffer<uint64_t> bits_;
};

// Is a unit active in any of these examples?
template <class T>
inline bool is_active(const Vec<T>& h, const Vec<T>& floor, const Vec<T>& q) {
#ifdef __AVX512F__
  if constexpr (sizeof(T) == 4) {
    const auto a = reinterpret_cast<__m512>(h), b = reinterpret_cast<__m512>(floor);
    const auto c = reinterpret_cast<__m512>(q);
    return (_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) |
            _mm512_cmp_ps_mask(c, _mm512_setzero_ps(), _CMP_NEQ_UQ)) != 0;
  }
#endif
  const auto lanes = (h > floor) | (q != Vec<T>{});
  uint64_t words[kBytes / 8], any = 0;
  std::memcpy(words, &lanes, sizeof words);
  for (uint64_t word : words) any |= word;
  return any != 0;
}

// Records which units of a state are active in a thread's own examples, unless they are recorded
// already: `last` is the last state recorded.
template <class T>
class ActivityRecorder {
 public:
  using V = Vec<T>;

  ActivityRecorder(ActiveUnits& units, int64_t thread, int64_t state, int64_t& last)
      : units_(state > last ? &units : nullptr), thread_(thread), state_(state) {
    if (!units_) return;
    units_->clear(thread, state);
    last = state;
  }

  // `count` vectors of a unit's examples.
  void record(int64_t unit, int count, const V* h, const V* floor, const V* q) {
    if (!units_ || units_->has(thread_, state_, unit)) return;
    for (int x = 0; x < count; ++x)
      if (is_active<T>(h[x], floor[x], q[x])) return units_->set(thread_, state_, unit);
  }

 private:
  ActiveUnits* units_;
  const int64_t thread_, state_;
};

// Consecutive numbers into the lanes of `mask`, zeros into the others.
template <class T>
inline Vec<T> expand_lanes(const T* from, uint32_t mask) {
#ifdef __AVX512F__
  if constexpr (sizeof(T) == 4)
    return reinterpret_cast<Vec<T>>(_mm512_maskz_expandloadu_ps(mask, from));
  else return reinterpret_cast<Vec<T>>(_mm512_maskz_expandloadu_pd(mask, from));
#else
  T lanes[kLanes<T>];
  for (int l = 0; l < kLanes<T>; ++l) {
    lanes[l] = mask >> l & 1 ? *from : T(0);
    from += mask >> l & 1;
  }
  Vec<T> v;
  std::memcpy(&v, lanes, sizeof v);
  return v;
#endif
}

}  // namespace
}  // namespace dnntk
