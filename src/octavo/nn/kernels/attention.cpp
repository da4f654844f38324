// Causal grouped-query attention, forward and backward, for CPUs.
//
// FlashAttention-2 (Dao 2023, algorithms 1 and 2): the T x T scores never exist; the forward keeps the log of the
// softmax's sum per query, the backward computes the probabilities again, block by block. What a block's products
// are computed with is a policy, the "unit": vector registers (tiles_vector.h) or AMX tiles (tiles_amx.h).
//
// Which keys a query reads is a range, first[t] .. t. Blocks outside it are never computed. Dropout acts on the
// probabilities, after their sum; its mask is computed again in the backward (dropout.h).
//
// Results are the same to the last bit for any number of threads: every output is the sum of the same terms in the
// same order, however the tasks are cut.
//
// A plain C interface on raw pointers: no header of torch, so it builds in seconds and fits any torch.
#include <pthread.h>

#include <atomic>
#include <cstdlib>
#include <memory>
#include <thread>
#include <vector>

#include "tiles_vector.h"
#if defined(OCTAVO_EMULATED_TILES) || (defined(__AMX_TILE__) && defined(__AMX_BF16__))
#define OCTAVO_TILES
#include "tiles_amx.h"
#endif

namespace octavo {
namespace {

// torch's own OpenMP pool, handed over as the runtime's entry point: a second pool would fight it for the cores.
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
std::atomic<Parallel> pool{nullptr};
// A pool's threads do not live on in a forked child.
void forget_pool() { pool = nullptr; }

template <class F> void in_parallel(int threads, F f) {
  if (threads <= 1) return f();
  if (const Parallel run = pool) return run([](void* g) { (*static_cast<F*>(g))(); }, &f, unsigned(threads), 0);
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) {
    try {
      others.emplace_back(f);
    } catch (const std::exception&) {
      break;  // no more threads to be had: the others do the work
    }
  }
  f();
  for (std::thread& thread : others) thread.join();
}

// Memory of the calling thread, kept: a training loop asks for the same sizes at every step.
struct Scratch {
  char* data = nullptr;
  int64_t size = 0;
  char* get(int64_t n) {
    if (n > size) {
      std::free(data);
      data = static_cast<char*>(std::aligned_alloc(4096, size_t(round_up(n, 4096))));
      size = data == nullptr ? 0 : n;
    }
    return data;
  }
  ~Scratch() { std::free(data); }
};
thread_local Scratch scratch;

struct Strides { int64_t b, h, t; };
struct Shape { int64_t B, H, G, T, K; };

template <class X> struct Tensor {
  X* data;
  Strides s;
  Rows<X> head(int64_t b, int64_t h) const { return {data + b * s.b + h * s.h, s.t}; }
};

struct Call {
  Shape n;
  float scale;
  int threads;
  const int32_t* first;  // (B, T), or null: every query reads from 0
  Dropout dropout;
  const int32_t* row(int64_t b) const { return first == nullptr ? nullptr : first + b * n.T; }
  float scale2() const { return scale * 1.44269504088896341f; }  // the softmax is done in powers of 2
};

// Into how many tasks a (row, key head) is cut: one, where there are enough of them to keep all threads busy.
int64_t parts(const Call& call, int64_t most) {
  const int64_t groups = call.n.B * call.n.G;
  const bool enough = groups >= 8 * call.threads || (groups >= call.threads && groups % call.threads == 0);
  return call.threads <= 1 || enough ? 1 : most;
}

// Run f(arena, common, task) for every task, started in ascending order. False: no memory.
template <class Unit, class F> bool run(int threads, int64_t tasks, int64_t bytes, int64_t common, F f) {
  threads = int(std::min<int64_t>(threads, tasks));
  bytes = round_up(bytes, 4096);
  char* memory = scratch.get(bytes * threads + common);
  if (memory == nullptr) return false;
  std::atomic<int64_t> next{0}, slots{0};
  in_parallel(threads, [&, bytes] {
    [[maybe_unused]] const typename Unit::Scope scope;
    char* own = memory + common + bytes * slots++;
    for (int64_t i; (i = next++) < tasks;) {
      Arena arena{own};
      f(arena, memory, i);
    }
  });
  return true;
}

template <class Unit, class X = typename Unit::Element>
bool forward(const Call& call, Tensor<const X> q, Tensor<const X> k, Tensor<const X> v, Tensor<X> o, float* lse) {
  const auto [B, H, G, T, K] = call.n;
  const int64_t D = Unit::padded_width(K), L = Unit::kForwardLanes, KB = Unit::kForwardKeys, grain = Unit::kGrain;
  const int64_t padded = round_up(T, grain), blocks = (T + L - 1) / L, group = H / G;
  const int64_t cut = std::min(parts(call, 4 * call.threads), blocks);
  const int64_t bytes = Ranges::bytes(padded) + Unit::Forward::bytes(D, padded);
  return run<Unit>(call.threads, B * G * cut, bytes, 0, [&](Arena& arena, char*, int64_t task) {
    const int64_t b = task / cut / G, g = task / cut % G, part = task % cut;
    const Ranges ranges(arena, call.row(b), T, padded);
    const int64_t last = blocks - 1 - (blocks - 1 - part) % cut;  // every cut-th block of queries, from part on
    const int64_t start = ranges.begin(part * L, grain), stop = std::min((last + 1) * L, padded);
    typename Unit::Forward f(arena, K, D, start, padded);
    f.keys(ranges, k.head(b, g), v.head(b, g), stop);
    Stripe stripe[Unit::kMaxStripes];
    for (int64_t q0 = part * L; q0 < T; q0 += cut * L)
      for (int64_t h = g * group; h < (g + 1) * group; ++h) {  // the group's heads lie side by side in memory
        const int64_t lanes = std::min(L, padded - q0), end = q0 + lanes;
        f.queries(ranges, q.head(b, h), q0, lanes);
        f.draws.queries(call.dropout.of(b * H + h), q0);
        for (int64_t k0 = ranges.begin(q0, grain); k0 < end; k0 += KB) {
          const int n = stripes(ranges, k0, std::min(k0 + KB, end), q0, lanes, int(grain), stripe);
          if (n) f.block(ranges, stripe, n, k0, q0, lanes, call.scale2());
        }
        f.write(ranges, q0, o.head(b, h), lse + (b * H + h) * T);
      }
  });
}

template <class X> struct Gradients { Tensor<X> q, k, v; };

template <class Unit, class X = typename Unit::Element>
bool backward(const Call& call, Tensor<const X> grad, Tensor<const X> q, Tensor<const X> k, Tensor<const X> v,
              Tensor<const X> o, const float* lse, Gradients<X> to) {
  const auto [B, H, G, T, K] = call.n;
  const int64_t D = Unit::padded_width(K), L = Unit::kBackwardLanes, KB = Unit::kBackwardKeys, grain = Unit::kGrain;
  const int64_t padded = round_up(T, grain), group = H / G;
  const int64_t key_blocks = (T + KB - 1) / KB, query_blocks = (T + L - 1) / L;
  const int64_t cut = parts(call, key_blocks), span = cut == 1 ? key_blocks : 1;  // key blocks of a task
  // The sums of dQ. Where a task does not have all keys, each block of queries has sums in common memory and a count
  // of the key blocks that have been added to them: a task waits for its turn, so that the order of a sum is one.
  const bool split = cut > 1;
  const int64_t sums_bytes = Arena::bytes<float>(D * L), n_sums = split ? B * H * query_blocks : 0;
  const int64_t bytes = Ranges::bytes(padded) + Unit::Backward::bytes(D, std::min(span * KB, padded)) + sums_bytes;
  const std::unique_ptr<std::atomic<int64_t>[]> counts(new std::atomic<int64_t>[size_t(n_sums)]());
  const int64_t tasks = B * G * cut, common_bytes = n_sums * sums_bytes;
  return run<Unit>(call.threads, tasks, bytes, common_bytes, [&](Arena& arena, char* common, int64_t task) {
    const int64_t b = task / cut / G, g = task / cut % G, kb0 = task % cut * span, kb1 = kb0 + span;
    const Ranges ranges(arena, call.row(b), T, padded);
    const int64_t base = kb0 * KB, stop = std::min(kb1 * KB, padded);
    typename Unit::Backward f(arena, K, D, base, stop - base);
    float* const own = arena.take<float>(D * L);
    f.keys(ranges, k.head(b, g), v.head(b, g), stop);
    Stripe stripe[Unit::kMaxStripes];
    for (int64_t qb = base / L; qb < query_blocks; ++qb) {
      const int64_t q0 = qb * L, lanes = std::min(L, padded - q0), end = q0 + lanes;
      const int64_t first_block = ranges.begin(q0, grain) / KB, last_block = (end - 1) / KB;
      if (first_block >= kb1) break;  // nor does any later query read these keys
      for (int64_t h = g * group; h < (g + 1) * group; ++h) {
        const int64_t at = b * H + h, place = at * query_blocks + qb;
        float* const sums = split ? reinterpret_cast<float*>(common + place * sums_bytes) : own;
        f.queries(ranges, q.head(b, h), grad.head(b, h), o.head(b, h), lse + at * T, q0, lanes);
        f.draws.queries(call.dropout.of(at), q0);
        for (int64_t kb = std::max(kb0, first_block); kb < std::min(kb1, last_block + 1); ++kb) {
          const int64_t k0 = kb * KB;
          const int n = stripes(ranges, k0, std::min(k0 + KB, end), q0, lanes, int(grain), stripe);
          if (n) f.block(ranges, stripe, n, k0, q0, call.scale2());
          if (split)
            for (int spin = 0; counts[size_t(place)].load(std::memory_order_acquire) != kb - first_block; ++spin)
              if (spin > 1000) std::this_thread::yield();
          if (kb == first_block) std::memset(sums, 0, size_t(D * L) * sizeof(float));
          if (n) f.query_gradient(stripe, n, k0, sums);
          if (kb == last_block) f.write_queries(ranges, sums, q0, call.scale, to.q.head(b, h));
          if (split) counts[size_t(place)].fetch_add(1, std::memory_order_release);
        }
      }
    }
    f.write_keys(ranges, stop, call.scale, to.k.head(b, g), to.v.head(b, g));
  });
}

template <class X> Tensor<X> tensor(void* data, const int64_t* strides) {
  return {static_cast<X*>(data), {strides[0], strides[1], strides[2]}};
}

template <class Unit> bool forward(const Call& call, const int64_t* s, void* const* p) {
  using X = typename Unit::Element;
  return forward<Unit>(call, tensor<const X>(p[0], s), tensor<const X>(p[1], s + 3), tensor<const X>(p[2], s + 6),
                       tensor<X>(p[3], s + 9), static_cast<float*>(p[4]));
}

template <class Unit> bool backward(const Call& call, const int64_t* s, void* const* p) {
  using X = typename Unit::Element;
  return backward<Unit>(call, tensor<const X>(p[0], s), tensor<const X>(p[1], s + 3), tensor<const X>(p[2], s + 6),
                        tensor<const X>(p[3], s + 9), tensor<const X>(p[4], s + 12), static_cast<float*>(p[5]),
                        {tensor<X>(p[6], s + 15), tensor<X>(p[7], s + 18), tensor<X>(p[8], s + 21)});
}

bool tiles = false;  // whether bf16 runs on them

Call call_of(const int64_t* shape, float scale, int threads, const int32_t* first, Dropout dropout) {
  return {{shape[0], shape[1], shape[2], shape[3], shape[4]}, scale, std::max(threads, 1), first, dropout};
}

template <class X>
void drop(const Dropout& dropout, const void* given, const void* sum, void* result, int64_t n, int threads) {
  const X *from = static_cast<const X*>(given), *onto = static_cast<const X*>(sum);
  X* to = static_cast<X*>(result);
  const int64_t at_once = 16 * kRowOfFlat;
  std::atomic<int64_t> next{0};
  in_parallel(int(std::min<int64_t>(threads, (n + at_once - 1) / at_once)), [&] {
    for (int64_t begin; (begin = at_once * next++) < n;)
      for (int64_t i = begin; i < std::min(begin + at_once, n); i += kRowOfFlat)
        drop_row(dropout.of(i / kRowOfFlat), from + i, onto == nullptr ? nullptr : onto + i, to + i,
                 std::min(kRowOfFlat, n - i));
  });
}

}  // namespace
}  // namespace octavo

extern "C" {

// `parallel` is the entry point GOMP_parallel of the OpenMP runtime that torch has loaded, or null.
void attention_init(void* parallel) {
  octavo::pool = reinterpret_cast<octavo::Parallel>(parallel);
  pthread_atfork(nullptr, nullptr, octavo::forget_pool);
#if defined(OCTAVO_TILES)
  octavo::tiles = octavo::tiles_granted();
#endif
}

// Whether bf16 is computed on AMX tiles, real or emulated.
int attention_tiles() { return octavo::tiles; }

// shape = {B, H, G, T, K}. strides: three (batch, head, time) per tensor in the order of the pointers, in elements,
// lse left out, which is contiguous (B, H, T); the last axis of every tensor is contiguous. bits: 32 for fp32, 16 for
// bf16. Of 65536 probabilities about `least` are dropped. Returns 0, or 1 where there was no memory.
// pointers of the forward: q, k, v, o, lse.
int attention_forward(const int64_t* shape, const int64_t* strides, float scale, int threads, int bits,
                      const int32_t* first, int64_t seed, int least, void* const* pointers) {
  using namespace octavo;
  const Call call = call_of(shape, scale, threads, first, Dropout(seed, least));
#if defined(OCTAVO_TILES)
  if (bits == 16 && tiles) return !forward<AmxUnit>(call, strides, pointers);
#endif
  return bits == 32 ? !forward<VectorUnit<float>>(call, strides, pointers)
                    : !forward<VectorUnit<bf16>>(call, strides, pointers);
}

// pointers of the backward: dO, q, k, v, o, lse, dq, dk, dv.
int attention_backward(const int64_t* shape, const int64_t* strides, float scale, int threads, int bits,
                       const int32_t* first, int64_t seed, int least, void* const* pointers) {
  using namespace octavo;
  const Call call = call_of(shape, scale, threads, first, Dropout(seed, least));
#if defined(OCTAVO_TILES)
  if (bits == 16 && tiles) return !backward<AmxUnit>(call, strides, pointers);
#endif
  return bits == 32 ? !backward<VectorUnit<float>>(call, strides, pointers)
                    : !backward<VectorUnit<bf16>>(call, strides, pointers);
}

// to = from where it is kept, times 65536 / (65536 - least), plus onto, which may be null; n contiguous numbers.
void dropout(const void* from, const void* onto, void* to, int64_t n, int bits, int64_t seed, int least, int threads) {
  using namespace octavo;
  const Dropout how = Dropout(seed, least).of(0);
  bits == 32 ? drop<float>(how, from, onto, to, n, threads) : drop<bf16>(how, from, onto, to, n, threads);
}

#if defined(OCTAVO_EMULATED_TILES)
// c (16 x 16, fp32) += a (16 x 32, bf16) b (16 x 16 pairs of bf16), on the emulated unit, for its own test.
void attention_tile_dot(const octavo::bf16* a, const octavo::bf16* b, float* c) {
  const octavo::TileScope scope;
  TILE_LOAD(0, c, 64);
  TILE_LOAD(1, a, 64);
  TILE_LOAD(2, b, 64);
  TILE_DOT(0, 1, 2);
  TILE_STORE(0, c, 64);
}
#endif
}
