// Up and down the layers of a wide dense network, and what multiplies their matrices.

#pragma once

#include "packed_states.h"
#include "wide.h"

namespace {

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
  over_crews(
      shared, false,
      [](Crew<T>& crew) {
        return std::unique_ptr<Buffer<V>>(new Buffer<V>(crew.size + 2 * crew.reading));
      },
      [&](Crew<T>& crew, Buffer<V>& own) {
        V *h = own.data(), *q = h + crew.size, *next = q + crew.reading;
        crew.arrange(p.h0, h);
        crew.read(0, h, q);
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
  over_crews(
      shared, false,
      [](Crew<T>& crew) {
        return std::unique_ptr<Buffer<V>>(new Buffer<V>(2 * crew.size + 4 * crew.reading));
      },
      [&](Crew<T>& crew, Buffer<V>& own) {
        const int64_t size = crew.size, reading = crew.reading;
        V *h = own.data(), *dh = h + size, *q = dh + size, *q_next = q + reading,
          *dq = q_next + reading, *dq_next = dq + reading;
        crew.arrange(p.h0, h);
        crew.arrange(dh0, dh);
        crew.read(0, h, q);
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

// The gradient goes to `kernel` and `bias`; with rates they are the parameters themselves, which
// make a step.
template <class T>
void wide_gradient(const Problem<T>& p, const Head<T>& head, const Rates<T>* rates, T* h_out, T* dh0,
                   T* kernel, T* bias) {
  using V = Vec<T>;
  Shared<T> shared(p, true);
  const int64_t below = p.layers - p.kept, segments = parts(below, p.segment), c = p.channels;
  struct Own {
    Own(int64_t size, int64_t reading, int64_t starts, int64_t kept, int64_t layers)
        : states(size, kept, layers), starts(starts * size, false), scratch(2 * reading) {}
    States<T> states;
    Buffer<V> starts, scratch;
  };
  // All threads begin to go through layers once more where the first of them has none left.
  std::atomic<int64_t> kept{p.layers};
  over_crews(
      shared, true,
      [&](Crew<T>& crew) {
        const int64_t most = std::max(p.kept, std::min(p.segment, below));
        return std::unique_ptr<Own>(new Own(crew.size, crew.reading, segments, most, p.layers));
      },
      [&](Crew<T>& crew, Own& own) {
        States<T>& states = own.states;
        V *q = own.scratch.data(), *q_next = q + crew.reading;
        auto start = [&](int64_t k) { return own.starts.data() + k * crew.size; };
        // From the state in `top` on.
        auto run = [&](int64_t from, int64_t end) {
          for (int64_t layer = from; layer < end; ++layer, std::swap(q, q_next)) {
            crew.forward(layer, states.top(), q, states.next(), q_next);
            states.push();
          }
        };
        // Own rows of a layer's gradient, from what all threads have left.
        auto change = [&](int64_t layer) {
          T *k = kernel + layer * p.weights(), *b = bias + layer * c;
          auto put_changed = [&](V value, T* at, int64_t lanes) {
            if (rates) value = rates->keep * copied<T>(at, lanes) - rates->rate * value;
            put<T>(value, lanes, at);
          };
          crew.outer(
              layer, shared.q[layer], shared.g[layer], k, rates && rates->keep == 1,
              [&](int64_t in, int64_t out, V value, int64_t lanes) {
                put_changed(value, k + in * c + out, lanes);
              },
              [&](int64_t out, V value, int64_t lanes) { put_changed(value, b + out, lanes); });
        };
        // With the state below layer `end - 1` in `top`.
        auto down = [&](int64_t from, int64_t end) {
          for (int64_t above = end; above > from; above -= shared.group) {
            const int64_t lowest = std::max(from, above - shared.group);
            for (int64_t layer = above - 1; layer >= lowest; --layer) {
              crew.backward(layer, states.top(), shared.q[layer], shared.g[layer - 1]);
              if (layer > from) states.pop();
            }
            // All have left their examples of these layers, and read their weights.
            shared.barrier.wait();
            for (int64_t layer = above - 1; layer >= lowest; --layer) change(layer);
          }
        };
        crew.arrange(p.h0, states.top());
        crew.read(0, states.top(), q);
        states.restart();
        for (int64_t k = 0; k < segments; ++k) {
          std::copy(states.top(), states.top() + crew.size, start(k));
          run(k * p.segment, std::min(below, (k + 1) * p.segment));
        }
        run(below, p.layers);
        crew.store(states.top(), h_out);
        crew.descend(head, states.top(), shared.g[p.layers - 1]);
        int64_t own_kept = states.below(), least = kept;
        while (own_kept < least && !kept.compare_exchange_weak(least, own_kept)) {}
        shared.barrier.wait();
        int64_t end = p.layers - kept;
        states.pop();
        down(end, p.layers);
        for (int64_t k = parts(end, p.segment) - 1; k >= 0; --k) {
          const int64_t from = k * p.segment;
          std::copy(start(k), start(k) + crew.size, states.top());
          crew.read(from, states.top(), q);
          states.restart();
          run(from, end - 1);
          down(from, end);
          end = from;
        }
        crew.store_derivatives(dh0);
      });
}

}  // namespace
