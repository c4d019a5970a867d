// Dense layers of 3 to 6 channels on their way up: all channels of a layer fit the registers.
//
// `compensation` sums what the layers have added to a state since the last `settle`. This sum is
// far smaller than the state, so it loses no digit that matters, and most layers need not write
// the state.

#pragma once

#include "memory.h"
#include "problem.h"
#include "simd.h"

namespace dnntk {
namespace {

// Layers whose terms are added up before they go into a state. Every segment is a multiple of it:
// so where segments begin changes no bit.
constexpr int kSettleLayers = DNNTK_SETTLE_LAYERS;

template <class T>
class RegisterLayers {
 public:
  using V = Vec<T>;

  static bool fit(const Problem<T>& p) {
    return p.dense() && p.channels >= 3 && p.channels <= kChannels;
  }

  // `base` and `floor` are [channels][columns].
  RegisterLayers(const Problem<T>& p, int64_t columns, const V* base, const V* floor)
      : p_(p),
        columns_(columns),
        base_(base),
        floor_(floor),
        origin_(p.channels * columns),
        read_(p.channels * columns),
        least_(p.channels * columns) {
    const int64_t c = p_.channels;
    for (int64_t i = 0; i < kSettleLayers * c; ++i)
      std::copy(p_.slope, p_.slope + c, slopes_ + i * c);
    for (int64_t k = 0; k < kSettleLayers; ++k)
      std::copy(p_.bias_slope, p_.bias_slope + c, bias_slopes_ + k * c);
  }

  // To be called before the first of consecutive layers, whose state is `h`.
  void begin(const V* h, V* compensation) {
    for (int64_t c = 0, k = 0; c < p_.channels; ++c) {
      const bool carried = p_.carry[c] != 0;
      for (const int64_t end = k + columns_; k < end; ++k) {
        origin_[k] = carried ? h[k] : V{};
        if (!carried) compensation[k] = h[k];
        read_[k] = base_[k] + p_.column[c] * origin_[k];
        least_[k] = floor_[k] - origin_[k];
      }
    }
  }

  // One layer, whose state goes to `h_next` if `write` says so or if the layer settles.
  void forward(int64_t layer, V* compensation, V* h_next, bool write) {
    V* next = write ? h_next : nullptr;
    switch (p_.channels) {
      case 3: layer_of<3>(layer, compensation, next); break;
      case 4: layer_of<4>(layer, compensation, next); break;
      case 5: layer_of<5>(layer, compensation, next); break;
      default: layer_of<6>(layer, compensation, next);
    }
    if ((layer + 1) % kSettleLayers == 0 || layer + 1 == p_.layers) settle(h_next, compensation);
  }

 private:
  static constexpr int kChannels = 6;  // at most

  // The state to `h`, and what it lost in rounding to `compensation`.
  void settle(V* h, V* compensation) {
    V *origin = origin_.data(), *read = read_.data(), *least = least_.data();
    for (int64_t c = 0, k = 0; c < p_.channels; ++c) {
      const T column = p_.column[c];
      const bool carried = p_.carry[c] != 0;
      for (const int64_t end = k + columns_; k < end; ++k) {
        const V z = origin[k] + compensation[k], floor = floor_[k];
        // Where the sum was cut off at its least, z may differ from the floor by a digit.
        const V state = compensation[k] > least[k] && z > floor ? z : floor;
        h[k] = state;
        if (!carried) continue;
        compensation[k] -= state - origin[k];
        origin[k] = state;
        read[k] = base_[k] + column * state;
        least[k] = floor - state;
      }
    }
  }

  // Weights and biases of the layers from `from` up to the next `settle`, in one loop: prepared
  // layer by layer, every product would wait for its own weights.
  template <int C>
  void prepare(int64_t from) {
    const int64_t layers = std::min<int64_t>(kSettleLayers, p_.layers - from), inputs = p_.inputs;
    const T *d = p_.kernel + from * C * C, *b = p_.bias + from * C;
    T *weights = weights_, *biases = biases_;
#pragma GCC ivdep
    for (int64_t i = 0; i < layers * C * C; ++i) weights[i] = d[i] * slopes_[i];
#pragma GCC ivdep
    for (int64_t i = 0; i < layers * C; ++i) biases[i] = b[i] * bias_slopes_[i];
    if (p_.initial == Initial::kMatrices) {
      const T *w = p_.initial_kernel + from * C * C, *v = p_.initial_bias + from * C;
      for (int64_t i = 0; i < layers * C * C; ++i) weights[i] += w[i];
      for (int64_t i = 0; i < layers * C; ++i) biases[i] += v[i];
    } else if (p_.initial == Initial::kFeatures) {
      const T *u = p_.initial_kernel + from * inputs, *v = p_.initial_bias + from;
      for (int64_t k = 0; k < layers; ++k) {
        for (int64_t i = 0; i < inputs; ++i) weights[(k * C + i) * C + inputs] += u[k * inputs + i];
        biases[k * C + inputs] += v[k];
      }
    }
  }

  // A number in all lanes, which stays in a register if there are at most 4 channels.
  template <int C>
  static V held(T value) {
    V all = value - V{};
    if (C <= 4) hold(all);
    return all;
  }

  template <int C>
  void layer_of(int64_t layer, V* compensation, V* h_next) {
    if (layer % kSettleLayers == 0) prepare<C>(layer);
    return h_next != nullptr ? layer_of<C, true>(layer, compensation, h_next)
                             : layer_of<C, false>(layer, compensation, h_next);
  }

  // A unit that is not carried has zero for its origin.
  template <int C, bool WRITE>
  void layer_of(int64_t layer, V* compensation, [[maybe_unused]] V* h_next) {
    const int64_t place = layer % kSettleLayers;
    const T *own = weights_ + place * C * C, *bias = biases_ + place * C;
    // This loop is bound by its loads: up to 4 channels, all that is the same for every example
    // stays in registers.
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
    [[maybe_unused]] const V *floors = floor_, *origins = origin_.data();
    for (int64_t x = 0; x < columns_; ++x) {
      V term[C];
#pragma GCC unroll 8
      for (int o = 0; o < C; ++o) term[o] = biases[o];
#pragma GCC unroll 8
      for (int i = 0; i < C; ++i) {
        const int64_t k = i * columns_ + x;
        V q = reads[k] + column[i] * compensation[k];
#pragma GCC unroll 8
        for (int o = 0; o < C; ++o) term[o] += q * weights[i][o];
      }
#pragma GCC unroll 8
      for (int o = 0; o < C; ++o) {
        const int64_t k = o * columns_ + x;
        const V added = carried[o] ? compensation[k] + term[o] : term[o], least = leasts[k];
        compensation[k] = added > least ? added : least;
        if constexpr (WRITE) {
          const V floor = floors[k];
          const V z = origins[k] + added;
          h_next[k] = z > floor ? z : floor;
        }
      }
    }
  }

  const Problem<T>& p_;
  const int64_t columns_;
  const V *base_, *floor_;
  Buffer<V> origin_, read_, least_;  // the state at the last `settle`, q of it, and floor - state
  // Of the layers since the last `settle`, prepared.
  T weights_[kSettleLayers * kChannels * kChannels], biases_[kSettleLayers * kChannels];
  T slopes_[kSettleLayers * kChannels * kChannels], bias_slopes_[kSettleLayers * kChannels];
};

}  // namespace
}  // namespace dnntk
