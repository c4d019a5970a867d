// The library's functions in one precision: compiled with DNNTK_REAL=float and with
// DNNTK_REAL=double.

#include <stdexcept>
#include <string>

#include "narrow_steps.h"
#include "wide_passes.h"

namespace dnntk {
namespace {

// f(side of the filter, as a constant).
template <class F>
void with_side(int64_t side, F f) {
  switch (side) {
    case 1: return f(std::integral_constant<int, 1>());
    case 3: return f(std::integral_constant<int, 3>());
    case 5: return f(std::integral_constant<int, 5>());
  }
  throw std::invalid_argument("dnntk: side must be 1, 3 or 5, got " + std::to_string(side));
}

}  // namespace

template <class T>
void forward(const Problem<T>& p, T* h) {
  if (p.wide) return wide_forward(p, h);
  with_side(p.side, [&](auto side) { narrow_forward<T, side>(p, h); });
}

template <class T>
void tangent(const Problem<T>& p, const T* dk, const T* db, const T* dh0, T* h, T* dh) {
  if (p.wide) return wide_tangent(p, dk, db, dh0, h, dh);
  with_side(p.side, [&](auto side) { narrow_tangent<T, side>(p, dk, db, dh0, h, dh); });
}

template <class T>
void gradient(const Problem<T>& p, const Head<T>& head, const Rates<T>* rates, T* h, T* dh0,
              T* kernel, T* bias) {
  if (p.wide) return wide_gradient(p, head, rates, h, dh0, kernel, bias);
  with_side(p.side, [&](auto side) {
    narrow_gradient<T, side>(p, head, rates, h, dh0, kernel, bias);
  });
}

template <class T>
void sgd_steps(const Problem<T>& p, const EndLayers<T>& ends, T rate, int64_t count, T* outputs,
           const Trained<T>& to) {
  if (!p.dense() || p.blocks > p.threads)
    throw std::invalid_argument("dnntk: steps need dense layers and a thread for every block");
  narrow_sgd_steps(p, ends, rate, count, outputs, to);
}

using Real = DNNTK_REAL;
template void forward(const Problem<Real>&, Real*);
template void tangent(const Problem<Real>&, const Real*, const Real*, const Real*, Real*, Real*);
template void gradient(const Problem<Real>&, const Head<Real>&, const Rates<Real>*, Real*, Real*,
                       Real*, Real*);
template void sgd_steps(const Problem<Real>&, const EndLayers<Real>&, Real, int64_t, Real*,
                    const Trained<Real>&);

}  // namespace dnntk
