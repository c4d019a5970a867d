// Up and down the layers of a wide dense network.

#pragma once

#include <atomic>
#include <memory>
#include <vector>

#include "packed_states.h"
#include "wide.h"

namespace dnntk {
namespace {

// work(worker, own) on every thread, where `own` is what make(worker) returns: all memory is
// allocated before the first thread starts.
template <class T, class Make, class Work>
void over_workers(Shared<T>& shared, bool down, Make make, Work work) {
  using Own = decltype(make(std::declval<WideWorker<T>&>()));
  std::vector<std::unique_ptr<WideWorker<T>>> workers;
  std::vector<Own> own;
  for (int64_t k = 0; k < shared.threads; ++k) {
    workers.emplace_back(new WideWorker<T>(shared, k, down));
    own.push_back(make(*workers.back()));
  }
  ThreadTeam::run(shared.threads, [&](int64_t k) { work(*workers[k], *own[k]); });
}

template <class T>
void wide_forward(const Problem<T>& p, T* h_out) {
  using V = Vec<T>;
  Shared<T> shared(p, false);
  over_workers(
      shared, false,
      [](WideWorker<T>& worker) {
        return std::make_unique<Buffer<V>>(3 * worker.size());
      },
      [&](WideWorker<T>& worker, Buffer<V>& own) {
        V *h = own.data(), *q = h + worker.size(), *next = q + worker.size();
        worker.arrange(p.h0, h);
        worker.read(0, h, q);
        for (int64_t layer = 0; layer < p.layers; ++layer, std::swap(q, next))
          worker.forward(layer, h, q, h, next);
        worker.store(h, h_out);
      });
}

template <class T>
void wide_tangent(const Problem<T>& p, const T* dk, const T* db, const T* dh0, T* h_out,
                  T* dh_out) {
  using V = Vec<T>;
  Shared<T> shared(p, false);
  over_workers(
      shared, false,
      [](WideWorker<T>& worker) {
        return std::make_unique<Buffer<V>>(6 * worker.size());
      },
      [&](WideWorker<T>& worker, Buffer<V>& own) {
        const int64_t size = worker.size();
        V *h = own.data(), *dh = h + size, *q = dh + size, *q_next = q + size, *dq = q_next + size,
          *dq_next = dq + size;
        worker.arrange(p.h0, h);
        worker.arrange(dh0, dh);
        worker.read(0, h, q);
        worker.column(dh, dq);
        for (int64_t layer = 0; layer < p.layers; ++layer) {
          worker.tangent(layer, dk, db, h, q, dh, dq, h, q_next, dh, dq_next);
          std::swap(q, q_next);
          std::swap(dq, dq_next);
        }
        worker.store(h, h_out);
        worker.store(dh, dh_out);
      });
}

// One thread's part of a gradient, which goes to `kernel` and `bias`; with rates they are the
// parameters themselves, which take a step.
//
//     up      layer 0 ........ first kept ........ top    states are packed (packed_states.h);
//             the start of each segment is kept           the oldest go if the memory is full
//     down    top ........ first kept                     all states are stored
//             then segment by segment, the highest first:
//               up again from its start, storing its states; down through them
//     a group of layers down:
//               every thread: derivatives of its own examples, layer by layer; stores their q and g
//               barrier: all q and g are stored, and no thread reads these layers' weights any more
//               every thread: its own rows of these layers' weight gradients
template <class T>
class WideGradient {
 public:
  using V = Vec<T>;

  // What all threads share.
  struct Call {
    const Problem<T>& p;
    const Head<T>& head;
    const Rates<T>* rates;
    T *h_out, *dh0, *kernel, *bias;
    Shared<T> shared;
    std::atomic<int64_t> kept;  // states that every thread still has of the way up
  };

  WideGradient(Call& call, WideWorker<T>& worker)
      : call_(call),
        p_(call.p),
        shared_(call.shared),
        worker_(worker),
        below_(p_.layers - p_.kept),
        states_(worker.size(), std::max(p_.kept, std::min(p_.segment, below_)), p_.layers),
        starts_(parts(below_, p_.segment) * worker.size(), false),
        scratch_(2 * worker.size()),
        q_(scratch_.data()),
        q_next_(q_ + worker.size()) {}

  void run() {
    up_through_all();
    const int64_t top = p_.layers;
    int64_t end = top - states_kept_by_all();
    states_.pop();
    down(end, top);
    for (int64_t segment = parts(end, p_.segment) - 1; segment >= 0; --segment) {
      const int64_t from = segment * p_.segment;
      std::copy(start(segment), start(segment) + worker_.size(), states_.top());
      worker_.read(from, states_.top(), q_);
      states_.restart();
      up(from, end - 1);
      down(from, end);
      end = from;
    }
    worker_.store_derivatives(call_.dh0);
  }

 private:
  V* start(int64_t segment) { return starts_.data() + segment * worker_.size(); }

  void up_through_all() {
    worker_.arrange(p_.h0, states_.top());
    worker_.read(0, states_.top(), q_);
    states_.restart();
    for (int64_t segment = 0, from = 0; from < below_; ++segment, from += p_.segment) {
      std::copy(states_.top(), states_.top() + worker_.size(), start(segment));
      up(from, std::min(below_, from + p_.segment));
    }
    up(below_, p_.layers);
    worker_.store(states_.top(), call_.h_out);
    worker_.top_derivatives(call_.head, states_.top(), shared_.g[p_.layers - 1]);
  }

  // The smallest number of states that a thread still has below the top one. All threads use it, so
  // that they recompute the same layers.
  int64_t states_kept_by_all() {
    const int64_t own = states_.below();
    int64_t least = call_.kept;
    while (own < least && !call_.kept.compare_exchange_weak(least, own)) {}
    shared_.barrier.wait();
    return call_.kept;
  }

  // From the state in `top` on.
  void up(int64_t from, int64_t end) {
    for (int64_t layer = from; layer < end; ++layer, std::swap(q_, q_next_)) {
      worker_.forward(layer, states_.top(), q_, states_.next(), q_next_);
      states_.push();
    }
  }

  // With the state that layer `end - 1` reads in `top`.
  void down(int64_t from, int64_t end) {
    for (int64_t above = end; above > from; above -= shared_.group) {
      const int64_t lowest = std::max(from, above - shared_.group);
      for (int64_t layer = above - 1; layer >= lowest; --layer) {
        worker_.backward(layer, states_.top(), shared_.q[layer], shared_.g[layer - 1]);
        if (layer > from) states_.pop();
      }
      shared_.barrier.wait();
      for (int64_t layer = above - 1; layer >= lowest; --layer) weight_gradient(layer);
    }
  }

  void weight_gradient(int64_t layer) {
    const Rates<T>* rates = call_.rates;
    T *kernel = call_.kernel + layer * p_.weights(), *bias = call_.bias + layer * p_.channels;
    auto store = [&](V value, T* at, int64_t lanes) {
      if (rates) value = rates->keep * load_lanes<T>(at, lanes) - rates->rate * value;
      store_lanes<T>(value, lanes, at);
    };
    worker_.weight_gradient()(
        layer, shared_.q[layer], shared_.g[layer], kernel, rates && rates->keep == 1,
        [&](int64_t in, int64_t out, V value, int64_t lanes) {
          store(value, kernel + in * p_.channels + out, lanes);
        },
        [&](int64_t out, V value, int64_t lanes) { store(value, bias + out, lanes); });
  }

  Call& call_;
  const Problem<T>& p_;
  Shared<T>& shared_;
  WideWorker<T>& worker_;
  const int64_t below_;  // layers below those whose states are kept
  PackedStates<T> states_;
  Buffer<V> starts_, scratch_;
  V *q_, *q_next_;
};

template <class T>
void wide_gradient(const Problem<T>& p, const Head<T>& head, const Rates<T>* rates, T* h_out,
                   T* dh0, T* kernel, T* bias) {
  typename WideGradient<T>::Call call{p,      head, rates,    h_out,  dh0,
                                      kernel, bias, {p, true}, {p.layers}};
  over_workers(
      call.shared, true,
      [&](WideWorker<T>& worker) { return std::make_unique<WideGradient<T>>(call, worker); },
      [](WideWorker<T>&, WideGradient<T>& gradient) { gradient.run(); });
}

}  // namespace
}  // namespace dnntk
