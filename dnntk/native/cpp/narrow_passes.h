// Up and down the layers of a narrow network, block of examples by block of examples.

#pragma once

#include <atomic>
#include <memory>
#include <new>

#include "narrow.h"
#include "thread_team.h"

namespace dnntk {
namespace {

constexpr int kChunk = 32;  // layers whose gradients are added up at a time

using Failed = std::atomic<bool>;

// work(block, its number, own, has another thread failed?) for every block of examples. A thread
// that has no work takes the block with the next number. If there is a thread for each block, the
// calling thread, which starts first, has the last and largest block. `own` is the thread's
// Own(problem, largest block).
template <class Own, class T, class Work>
void over_blocks(const Problem<T>& p, Work work) {
  const int64_t count = p.blocks, vectors = parts(p.examples, kLanes<T>);
  const bool one_each = count <= p.threads;
  std::atomic<int64_t> next{0};
  Failed failed{false};
  ThreadTeam::run(std::min<int64_t>(p.threads, count), [&](int64_t thread) {
    try {
      PageCache::thread_number() = thread;
      Own own(p, Block<T>(p, 0, parts(vectors, count)));
      auto at = [&](int64_t k) {
        int64_t first = part(vectors, count, k);
        work(Block<T>(p, first, part(vectors, count, k + 1) - first), k, own, failed);
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
struct NoScratch {
  NoScratch(const Problem<T>&, const Block<T>&) {}
};

template <class T, int SIDE>
void narrow_forward(const Problem<T>& p, T* h_out) {
  over_blocks<NoScratch<T>>(p, [&](const Block<T>& block, int64_t, NoScratch<T>&, const Failed&) {
    NarrowWorker<T, SIDE> worker(p, block);
    Buffer<Vec<T>> h(block.size()), compensation(block.size()), q0(block.size()), q1(block.size());
    load(p, block, p.h0, h.data());
    worker.read(h.data(), q0.data());
    Vec<T>*q = q0.data(), *next = q1.data();
    worker.begin(h.data(), compensation.data());
    for (int64_t layer = 0; layer < p.layers; ++layer, std::swap(q, next))
      worker.forward(layer, h.data(), q, compensation.data(), h.data(), next, false);
    store(p, block, h.data(), h_out);
  });
}

template <class T, int SIDE>
void narrow_tangent(const Problem<T>& p, const T* dk, const T* db, const T* dh0, T* h_out,
                    T* dh_out) {
  over_blocks<NoScratch<T>>(p, [&](const Block<T>& block, int64_t, NoScratch<T>&, const Failed&) {
    using V = Vec<T>;
    NarrowWorker<T, SIDE> worker(p, block);
    const int64_t size = block.size();
    Buffer<V> h(size), dh(size), compensation(size), buffers(4 * size);
    V *q = buffers.data(), *q_next = q + size, *dq = q + 2 * size, *dq_next = q + 3 * size;
    load(p, block, p.h0, h.data());
    load(p, block, dh0, dh.data());
    worker.read(h.data(), q);
    worker.column(dh.data(), dq);
    worker.begin(h.data(), compensation.data());
    for (int64_t layer = 0; layer < p.layers; ++layer) {
      worker.tangent(layer, dk, db, h.data(), q, dh.data(), dq, compensation.data(), h.data(),
                     q_next, dh.data(), dq_next);
      std::swap(q, q_next);
      std::swap(dq, dq_next);
    }
    store(p, block, h.data(), h_out);
    store(p, block, dh.data(), dh_out);
  });
}

// Derivatives of the loss by the state h that the last layer reads; zero in lanes without an
// example.
template <class T>
void top_derivatives(const Problem<T>& p, const Block<T>& b, const Head<T>& head, const Vec<T>* h,
             Vec<T>* g) {
  using V = Vec<T>;
  const int64_t vectors = p.dense() ? b.columns : b.groups, columns = p.dense() ? 1 : b.columns;
  std::fill(g, g + b.size(), V{});
  for (int64_t v = 0; v < vectors; ++v)
    for (int64_t k = 0; k < head.outputs; ++k) {
      const T* a = head.head + k * p.channels * p.positions();
      auto at = [&](int64_t c, int64_t y) { return p.dense() ? b.at(0, 0, c) + v : b.at(v, y, c); };
      V f = {}, slope = {};
      for (int64_t c = 0; c < p.channels; ++c)
        for (int64_t y = 0; y < p.rows; ++y)
          for (int64_t x = 0; x < columns; ++x)
            f += a[c * p.positions() + y * (p.columns + p.padding()) + x] * h[at(c, y) + x];
      for (int64_t lane = 0; lane < kLanes<T>; ++lane) {
        int64_t n = (b.first + v) * kLanes<T> + lane;
        if (n >= p.examples) break;
        T value = f[lane] + head.offset[n * head.outputs + k];
        slope[lane] = head.factor[n] * value + head.shift[n * head.outputs + k];
      }
      for (int64_t c = 0; c < p.channels; ++c)
        for (int64_t y = 0; y < p.rows; ++y)
          for (int64_t x = 0; x < columns; ++x)
            g[at(c, y) + x] += a[c * p.positions() + y * (p.columns + p.padding()) + x] * slope;
    }
}

// A thread's memory for gradients. The padding behind the rows of images stays zero from block to
// block; a smaller block leaves a part unused.
template <class T>
struct Scratch {
  using V = Vec<T>;
  const int64_t size;  // of a state
  Buffer<V> starts, states, buffers;
  Buffer<T> by_kernel, by_bias;

  Scratch(const Problem<T>& p, const Block<T>& largest)
      : size(largest.size()),
        starts(2 * parts(p.layers, p.segment) * size, false),
        states((p.segment + 1) * size, p.padding() > 0),
        buffers(5 * size),
        by_kernel(kChunk * p.weights(), false),
        by_bias(kChunk * p.channels, false) {}
};

// The layers' gradients, `kChunk` layers at a time, summed over the blocks in the order of the
// blocks' numbers, whichever threads compute them.
//
// With rates, `kernel` and `bias` are the parameters themselves. The last block that adds to a
// chunk of layers takes the step there: no block reads the chunk's parameters any more. If every
// block has its own thread, the blocks stay within a few chunks of one another, and only these
// chunks' gradients are stored. Many steps may follow one another: no block begins a step before
// all blocks have ended the previous step.
template <class T>
class GradientSums {
 public:
  GradientSums(const Problem<T>& p, const Rates<T>* rates, T* kernel, T* bias)
      : p_(p),
        rates_(rates),
        results_{kernel, bias},
        a_layer_{p.weights(), p.channels},
        chunks_(parts(p.layers, kChunk)),
        kept_(p.blocks > p.threads ? chunks_ : std::min(chunks_, most_ahead(a_layer_[0]))),
        kernels_(rates ? kept_ * kChunk * a_layer_[0] : 0, false),
        biases_(rates ? kept_ * kChunk * a_layer_[1] : 0, false),
        added_(new std::atomic<int64_t>[chunks_]()) {}

  // Adds block `number`'s gradients of a chunk; false if another thread failed.
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
  // How many chunks one block may be ahead of another: as many as take little memory. On a shared
  // machine a thread may lose its core for milliseconds, and the others would wait for it.
  static int64_t most_ahead(int64_t weights) {
    return std::max<int64_t>(16, (4 << 20) / (kChunk * weights * int64_t(sizeof(T))));
  }

  // Waits until blocks have added to a chunk `times` times, in all steps together.
  bool wait(int64_t chunk, int64_t times, const std::atomic<bool>& failed) {
    for (Backoff backoff; added_[chunk].load(std::memory_order_acquire) != times; backoff.pause())
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

// One block's way up and down again. `top(h, g)` gets the state h that the last layer reads and
// fills in the derivatives g by it. Returns the derivatives by the block's first state, or nullptr
// if another thread failed; `own.states` holds the first state before and after.
//
// Up, a state and its compensation are kept where a segment starts; all states of the last segment
// are kept. Down, segment by segment: recompute its states, then go through its layers backwards.
template <class T, int SIDE>
class BlockGradient {
 public:
  using V = Vec<T>;

  BlockGradient(const Problem<T>& p, NarrowWorker<T, SIDE>& worker, Scratch<T>& own,
                GradientSums<T>& sums, const Failed& failed)
      : p_(p),
        worker_(worker),
        own_(own),
        sums_(sums),
        failed_(failed),
        size_(own.size),
        segments_(parts(p.layers, p.segment)),
        q_(own.buffers.data()),
        q_next_(q_ + size_),
        g_(q_ + 2 * size_),
        g_next_(q_ + 3 * size_),
        compensation_(q_ + 4 * size_) {}

  template <class Top>
  V* operator()(int64_t step, int64_t number, Top top) {
    std::fill(compensation_, compensation_ + size_, V{});
    for (int64_t segment = 0; segment < segments_ - 1; ++segment) {
      std::copy(state(0), state(1), start(segment));
      std::copy(compensation_, compensation_ + size_, start(segment) + size_);
      up(segment, false);
    }
    V* last = up(segments_ - 1, true);
    top(last, g_next_);
    std::fill(g_, g_ + size_, V{});
    worker_.mask(last, g_next_, g_);
    std::fill(g_next_, g_next_ + size_, V{});
    for (int64_t segment = segments_ - 1; segment >= 0; --segment) {
      if (segment < segments_ - 1) {
        std::copy(start(segment), start(segment) + size_, state(0));
        std::copy(start(segment) + size_, start(segment + 1), compensation_);
        up(segment, true);
      }
      if (!down(segment, step, number)) return nullptr;
    }
    return g_;
  }

 private:
  V* state(int64_t k) { return own_.states.data() + k * size_; }
  // The state that a segment starts from, and its compensation.
  V* start(int64_t segment) { return own_.starts.data() + 2 * segment * size_; }
  int64_t first(int64_t segment) const { return segment * p_.segment; }
  int64_t end(int64_t segment) const { return std::min(p_.layers, first(segment) + p_.segment); }

  // From the state in `state(0)` to the one above the segment, which is returned; `keep` all
  // states?
  V* up(int64_t segment, bool keep) {
    worker_.read(state(0), q_);
    worker_.begin(state(0), compensation_);
    int64_t k = 0;
    for (int64_t layer = first(segment); layer < end(segment); ++layer, std::swap(q_, q_next_)) {
      V* h = state(k);
      k += keep;
      worker_.forward(layer, h, q_, compensation_, state(k), q_next_, keep);
    }
    return state(k);
  }

  // False if another thread failed.
  bool down(int64_t segment, int64_t step, int64_t number) {
    T *by_kernel = own_.by_kernel.data(), *by_bias = own_.by_bias.data();
    for (int64_t layer = end(segment) - 1; layer >= first(segment); --layer) {
      const int64_t k = layer % kChunk;
      worker_.backward(layer, state(layer - first(segment)), q_, g_, g_next_,
                       by_kernel + k * p_.weights(), by_bias + k * p_.channels);
      std::swap(g_, g_next_);
      if (k != 0) continue;
      if (!sums_.add(step, number, layer / kChunk, by_kernel, by_bias, failed_)) return false;
    }
    return true;
  }

  const Problem<T>& p_;
  NarrowWorker<T, SIDE>& worker_;
  Scratch<T>& own_;
  GradientSums<T>& sums_;
  const Failed& failed_;
  const int64_t size_, segments_;
  V *q_, *q_next_, *g_, *g_next_, *compensation_;
};

template <class T, int SIDE>
void narrow_gradient(const Problem<T>& p, const Head<T>& head, const Rates<T>* rates, T* h_out,
                     T* dh0, T* dk, T* db) {
  using V = Vec<T>;
  GradientSums<T> sums(p, rates, dk, db);
  over_blocks<Scratch<T>>(p, [&](const Block<T>& block, int64_t number, Scratch<T>& own,
                                 const Failed& failed) {
    NarrowWorker<T, SIDE> worker(p, block);
    load(p, block, p.h0, own.states.data());
    BlockGradient<T, SIDE> gradient(p, worker, own, sums, failed);
    const V* g = gradient(0, number, [&](const V* h, V* g) {
      store(p, block, h, h_out);
      top_derivatives(p, block, head, h, g);
    });
    if (g != nullptr) store(p, block, g, dh0);
  });
}

}  // namespace
}  // namespace dnntk
