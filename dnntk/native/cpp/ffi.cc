// The functions that JAX calls (dnntk/native/ops.py): settings by keyword, arrays of float32 or
// float64.

#include "xla/ffi/api/ffi.h"

#include <exception>
#include <new>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>

#include "problem.h"

namespace ffi = xla::ffi;

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    dnntk::Settings, StructMember<int64_t>("side"), StructMember<int64_t>("rows"),
    StructMember<int64_t>("columns"), StructMember<int64_t>("inputs"),
    StructMember<int64_t>("threads"), StructMember<int64_t>("blocks"),
    StructMember<int64_t>("segment"), StructMember<bool>("wide"), StructMember<int64_t>("kept"),
    StructMember<int64_t>("group"), StructMember<std::string_view>("initial"));

namespace dnntk {
namespace {

using In = ffi::AnyBuffer;
using Out = ffi::Result<ffi::AnyBuffer>;

template <class T>
constexpr ffi::DataType kType = ffi::S32;
template <>
constexpr ffi::DataType kType<float> = ffi::F32;
template <>
constexpr ffi::DataType kType<double> = ffi::F64;

template <class T>
T* data(const In& buffer) {
  if (buffer.element_type() != kType<T>)
    throw std::invalid_argument("dnntk: expected all arrays of one dtype, and int32 steps");
  return static_cast<T*>(buffer.untyped_data());
}
template <class T>
T* data(Out& buffer) {
  return data<T>(*buffer);
}

Initial initial_of(std::string_view name) {
  if (name == "none") return Initial::kNone;
  if (name == "matrices") return Initial::kMatrices;
  if (name == "features") return Initial::kFeatures;
  throw std::invalid_argument("dnntk: initial must be none, matrices or features, got " +
                              std::string(name));
}

template <class T>
Problem<T> problem(const Settings& s, In units, In kernel, In bias, In initial_kernel,
                   In initial_bias, In base, In floor, In h0) {
  Problem<T> p = {};
  static_cast<Settings&>(p) = s;
  p.layers = bias.dimensions()[0];
  p.channels = bias.dimensions()[1];
  p.examples = h0.dimensions()[2];
  p.initial = initial_of(s.initial_name);
  p.slope = data<T>(units);
  p.bias_slope = p.slope + p.channels;
  p.column = p.slope + 2 * p.channels;
  p.carry = p.slope + 3 * p.channels;
  p.kernel = data<T>(kernel);
  p.bias = data<T>(bias);
  p.initial_kernel = data<T>(initial_kernel);
  p.initial_bias = data<T>(initial_bias);
  p.base = data<T>(base);
  p.floor = data<T>(floor);
  p.h0 = data<T>(h0);
  return p;
}

template <class T>
Head<T> head_of(In head, In offset, In factor, In shift) {
  return {head.dimensions()[0], data<T>(head), data<T>(offset), data<T>(factor), data<T>(shift)};
}

struct Forward {
  template <class T>
  static void run(const Problem<T>& p, Out h) {
    forward(p, data<T>(h));
  }
};

struct Tangent {
  template <class T>
  static void run(const Problem<T>& p, In dk, In db, In dh0, Out h, Out dh) {
    tangent<T>(p, data<T>(dk), data<T>(db), data<T>(dh0), data<T>(h), data<T>(dh));
  }
};

struct Gradient {
  template <class T>
  static void run(const Problem<T>& p, In head, In offset, In factor, In shift, Out h, Out dh0,
                  Out dk, Out db) {
    gradient<T>(p, head_of<T>(head, offset, factor, shift), nullptr, data<T>(h), data<T>(dh0),
                data<T>(dk), data<T>(db));
  }
};

// `kernel` and `bias` are operands and results at once.
struct SgdStep {
  template <class T>
  static void run(const Problem<T>& p, In head, In offset, In factor, In shift, In rate_and_keep,
                  Out h, Out dh0, Out kernel, Out bias) {
    const Rates<T> rates{data<T>(rate_and_keep)[0], data<T>(rate_and_keep)[1]};
    gradient<T>(p, head_of<T>(head, offset, factor, shift), &rates, data<T>(h), data<T>(dh0),
                data<T>(kernel), data<T>(bias));
  }
};

// All parameters are operands and results at once.
struct SgdSteps {
  template <class T>
  static void run(const Problem<T>& p, In x, In first_kernel, In first_bias, In first_slopes,
                  In last_kernel, In last_bias, In last_slopes, In head, In offset, In factor,
                  In shift, In rate, In count, Out outputs, Out kernel, Out bias,
                  Out new_first_kernel, Out new_first_bias, Out new_last_kernel,
                  Out new_last_bias) {
    const EndLayers<T> ends = {x.dimensions()[0],
                               data<T>(x),
                               {data<T>(first_kernel), data<T>(first_bias), data<T>(first_slopes)},
                               {data<T>(last_kernel), data<T>(last_bias), data<T>(last_slopes)},
                               head_of<T>(head, offset, factor, shift)};
    const Trained<T> to = {data<T>(kernel),           data<T>(bias),
                           data<T>(new_first_kernel), data<T>(new_first_bias),
                           data<T>(new_last_kernel),  data<T>(new_last_bias)};
    sgd_steps<T>(p, ends, *data<T>(rate), *data<int32_t>(count), data<T>(outputs), to);
  }
};

// A function as JAX calls it: settings, the operands that all functions have, and its own arrays.
template <class Function>
struct Handler {
  template <class... Own>
  ffi::Error operator()(const Settings& settings, In units, In kernel, In bias, In initial_kernel,
                        In initial_bias, In base, In floor, In h0, Own... own) const {
    auto run = [&](auto zero) {
      Function::run(problem<decltype(zero)>(settings, units, kernel, bias, initial_kernel,
                                            initial_bias, base, floor, h0),
                    own...);
    };
    try {
      if (kernel.element_type() == ffi::F64) run(double{});
      else if (kernel.element_type() == ffi::F32) run(float{});
      else throw std::invalid_argument("dnntk: arrays must be float32 or float64");
    } catch (const std::invalid_argument& error) {
      return ffi::Error::InvalidArgument(error.what());
    } catch (const std::bad_alloc&) {
      return {ffi::ErrorCode::kResourceExhausted,
              "dnntk: no memory for the states of a segment of layers"};
    } catch (const std::exception& error) {  // no thread could be started, say
      return {ffi::ErrorCode::kResourceExhausted, error.what()};
    }
    return ffi::Error::Success();
  }
};

// `binding` with kOperands more operands and kResults more results.
template <int kOperands, int kResults, class Binding>
auto extended(Binding&& binding) {
  if constexpr (kOperands > 0)
    return extended<kOperands - 1, kResults>(std::move(binding).template Arg<In>());
  else if constexpr (kResults > 1)
    return extended<0, kResults - 1>(std::move(binding).template Ret<In>());
  else return std::move(binding).template Ret<In>();
}

template <int kOwnOperands, int kResults>
auto binding() {
  return extended<8 + kOwnOperands, kResults>(ffi::Ffi::Bind().Attrs<Settings>());
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(dnntk_forward, Handler<Forward>(), (binding<0, 1>()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(dnntk_tangent, Handler<Tangent>(), (binding<3, 2>()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(dnntk_gradient, Handler<Gradient>(), (binding<4, 4>()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(dnntk_sgd_step, Handler<SgdStep>(), (binding<5, 4>()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(dnntk_sgd_steps, Handler<SgdSteps>(), (binding<13, 7>()));

}  // namespace dnntk
