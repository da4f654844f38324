// One decoding step of a whole decoder: a token for each of some rows in, their logits out. One call a step, one team
// of threads for all of it, weights read where torch keeps them. What bounds it is reading the weights once.
// Activations are fp32 throughout, for fp32 and bf16 weights.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "vectors.h"

namespace octavo {
namespace {

typedef float LooseFloats __attribute__((vector_size(kVector * 4), aligned(4), may_alias));
typedef uint16_t LooseHalves __attribute__((vector_size(kVector * 2), aligned(2), may_alias));
typedef uint32_t Words __attribute__((vector_size(kVector * 4), may_alias));

inline Floats read(const float* p) { return *reinterpret_cast<const LooseFloats*>(p); }
inline Floats read(const bf16* p) {
  const Words bits = __builtin_convertvector(*reinterpret_cast<const LooseHalves*>(p), Words) << 16;
  Floats x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
using Count = int (*)();
Parallel parallel = nullptr;
Count team_size = nullptr, member = nullptr;

// Everybody waits here for everybody: some thousand tries, then the core is given up.
class Barrier {
 public:
  void size(int n) { n_ = n; }
  void wait() {
    if (n_ == 1) return;
    const uint32_t phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == n_) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      return;
    }
    for (int tries = 0; phase_.load(std::memory_order_acquire) == phase; ++tries) {
      if (tries < 4000) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
      } else {
        std::this_thread::yield();
      }
    }
  }

 private:
  int n_ = 1;
  std::atomic<int> arrived_{0};
  std::atomic<uint32_t> phase_{0};
};

struct Share {
  int64_t begin, end;
};
inline Share share(int64_t n, int64_t grain, int id, int team) {
  const int64_t blocks = (n + grain - 1) / grain, each = blocks / team, more = blocks % team;
  const int64_t first = id * each + std::min<int64_t>(id, more);
  return {std::min(n, first * grain), std::min(n, (first + each + (id < more)) * grain)};
}

// The i-th product of a layer: W (n_out, n_in) row by row, bias (n_out,) or null.
template <class W> struct Product {
  const W* weight;
  const W* bias;
  int64_t n_out;
};

// out[m][o] = x[m] . W[o] + b[o] for M rows of x and the outputs of one share; four outputs at a time.
template <int M, class W, class Put>
void multiply_rows(const Product<W>& p, const float* x, int64_t n_in, int64_t stride, Share part, Put put) {
  constexpr int R = 4;
  const int64_t whole = n_in / kVector * kVector;
  for (int64_t o = part.begin; o < part.end; o += R) {
    const int rows = int(std::min<int64_t>(R, part.end - o));
    const W* w[R];
    for (int r = 0; r < R; ++r) w[r] = p.weight + (o + std::min(r, rows - 1)) * n_in;
    Floats total[R][M] = {};
    for (int64_t i = 0; i < whole; i += kVector) {
      Floats v[M];
      for (int m = 0; m < M; ++m) v[m] = read(x + m * stride + i);
      for (int r = 0; r < R; ++r) {
        __builtin_prefetch(w[r] + R * n_in + i);
        const Floats u = read(w[r] + i);
        for (int m = 0; m < M; ++m) total[r][m] += u * v[m];
      }
    }
    for (int r = 0; r < rows; ++r)
      for (int m = 0; m < M; ++m) {
        float y = sum(total[r][m]);
        for (int64_t i = whole; i < n_in; ++i) y += to_float(w[r][i]) * x[m * stride + i];
        put(m, o + r, p.bias ? y + to_float(p.bias[o + r]) : y);
      }
  }
}

template <class W, class Put>
void multiply(const Product<W>& p, const float* x, int64_t n_in, int64_t stride, int64_t rows, Share part, Put put) {
  for (int64_t m0 = 0; m0 < rows; m0 += 4) {
    const auto shifted = [&](int m, int64_t o, float y) { put(m0 + m, o, y); };
    const float* from = x + m0 * stride;
    switch (std::min<int64_t>(4, rows - m0)) {
      case 1: multiply_rows<1>(p, from, n_in, stride, part, shifted); break;
      case 2: multiply_rows<2>(p, from, n_in, stride, part, shifted); break;
      case 3: multiply_rows<3>(p, from, n_in, stride, part, shifted); break;
      default: multiply_rows<4>(p, from, n_in, stride, part, shifted); break;
    }
  }
}

template <class W> void normalise(const float* x, const W* weight, float eps, int64_t n, float* out) {
  Floats parts = {};
  int64_t i = 0;
  for (; i + kVector <= n; i += kVector) parts += read(x + i) * read(x + i);
  float squares = sum(parts);
  for (; i < n; ++i) squares += x[i] * x[i];
  const float scale = 1.f / std::sqrt(squares / float(n) + eps);
  for (i = 0; i < n; ++i) out[i] = x[i] * scale * to_float(weight[i]);
}

// cos and sin (R/2,) of this token's position; the channels after R are left alone.
void rotate(float* x, const float* cos, const float* sin, int64_t R, bool interleaved) {
  const int64_t half = R / 2;
  for (int64_t i = 0; i < half; ++i) {
    const int64_t a = interleaved ? 2 * i : i, b = interleaved ? 2 * i + 1 : i + half;
    const float u = x[a], v = x[b];
    x[a] = u * cos[i] - v * sin[i];
    x[b] = v * cos[i] + u * sin[i];
  }
}

inline float activate(int64_t kind, float x) {
  switch (kind) {
    case 0: return x / (1.f + std::exp(-x));                                                              // silu
    case 1: return 0.5f * x * (1.f + std::erf(x * 0.70710678f));                                          // gelu
    case 2: return 0.5f * x * (1.f + std::tanh(0.79788456f * (x + 0.044715f * x * x * x)));               // its tanh form
    default: return std::max(x, 0.f);                                                                     // relu
  }
}

template <class W> struct Layer {
  const W *norm_mixer, *norm_channel, *q_norm, *k_norm;
  Product<W> q, k, v, o, gate, up, down;
  W *keys, *values;  // (rows, entries, G, K)
};

// Asks the system for large pages under n bytes at p, which are read from end to end for every token. Only a wish.
void use_large_pages(const void* p, int64_t n) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t size = uintptr_t(2) << 20;
  constexpr int collapse = 25;  // MADV_COLLAPSE, Linux 6.1: at once, not when the system finds the time
  const uintptr_t begin = reinterpret_cast<uintptr_t>(p) / size * size;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(p) + uintptr_t(n) + size - 1) / size * size;
  for (uintptr_t at = begin; at < end; at += size) {
    madvise(reinterpret_cast<void*>(at), size, MADV_HUGEPAGE);
    madvise(reinterpret_cast<void*>(at), size, collapse);
  }
#endif
}

struct Sizes {
  int64_t D, H, G, K, F, V, n_layers, entries, R, interleaved, activation, rows;
  float eps, head_eps, scale;
};

template <class W> class Decoder {
 public:
  Decoder(const Sizes& s, const void* const* p) : s_(s) {
    use_large_pages(p[2], s.V * s.D * int64_t(sizeof(W)));
    embed_ = static_cast<const W*>(*p++);
    norm_ = static_cast<const W*>(*p++);
    head_ = {static_cast<const W*>(p[0]), static_cast<const W*>(p[1]), s.V};
    p += 2;
    const int64_t wide[7] = {s.H * s.K, s.G * s.K, s.G * s.K, s.D, s.F, s.F, s.D};
    for (int64_t i = 0; i < s.n_layers; ++i) {
      Layer<W> l;
      const W** norms[4] = {&l.norm_mixer, &l.norm_channel, &l.q_norm, &l.k_norm};
      for (const W** norm : norms) *norm = static_cast<const W*>(*p++);
      Product<W>* products[7] = {&l.q, &l.k, &l.v, &l.o, &l.gate, &l.up, &l.down};
      const int64_t deep[7] = {s.D, s.D, s.D, s.H * s.K, s.D, s.D, s.F};
      for (int j = 0; j < 7; ++j, p += 2) {
        *products[j] = {static_cast<const W*>(p[0]), static_cast<const W*>(p[1]), wide[j]};
        if (p[0]) use_large_pages(p[0], wide[j] * deep[j] * int64_t(sizeof(W)));
      }
      layers_.push_back(l);
    }
  }

  // keys, values: of each layer. M tokens; rows[m] is whose, slots[m] where in the cache, starts[m] the first entry it
  // may read. cos, sin (M, R/2). logits (M, V).
  void step(int64_t M, const int64_t* tokens, const int64_t* rows, const int64_t* slots, const int64_t* starts,
            const float* cos, const float* sin, void* const* caches, float* logits, int threads) {
    for (int64_t i = 0; i < s_.n_layers; ++i) {
      layers_[size_t(i)].keys = static_cast<W*>(caches[2 * i]);
      layers_[size_t(i)].values = static_cast<W*>(caches[2 * i + 1]);
    }
    M_ = M, tokens_ = tokens, rows_ = rows, slots_ = slots, starts_ = starts, cos_ = cos, sin_ = sin, logits_ = logits;
    const int64_t inner = s_.H * s_.K, kv = s_.G * s_.K;
    reserve(x_, M * s_.D), reserve(q_, M * inner), reserve(k_, M * kv), reserve(v_, M * kv);
    reserve(mixed_, M * inner), reserve(hidden_, M * s_.F);
    const int team = parallel && team_size && member ? std::max(threads, 1) : 1;
    own_.resize(size_t(team));
    if (team == 1) {
      barrier_.size(1);
      work(0, 1);
    } else {
      parallel([](void* self) { static_cast<Decoder*>(self)->joined(); }, this, unsigned(team), 0);
    }
  }

 private:
  void joined() {
    const int n = team_size();  // the runtime may give fewer threads than were asked for
    if (member() == 0) {
      barrier_.size(n);
      ready_.store(n, std::memory_order_release);
    }
    while (ready_.load(std::memory_order_acquire) == 0) std::this_thread::yield();
    work(member(), n);
    barrier_.wait();
    if (member() == 0) ready_.store(0, std::memory_order_release);
  }

  static void reserve(std::vector<float>& x, int64_t n) {
    if (int64_t(x.size()) < n) x.resize(size_t(n));
  }

  void normalised(const W* weight, std::vector<float>& out) {
    for (int64_t m = 0; m < M_; ++m) normalise(&x_[size_t(m * s_.D)], weight, s_.eps, s_.D, &out[size_t(m * s_.D)]);
  }

  void work(int id, int team) {
    const int64_t D = s_.D, inner = s_.H * s_.K, kv = s_.G * s_.K;
    std::vector<float>& own = own_[size_t(id)];
    reserve(own, std::max(M_ * D, s_.entries + 3 * s_.K));
    if (id == 0)
      for (int64_t m = 0; m < M_; ++m)
        for (int64_t i = 0; i < D; ++i) x_[size_t(m * D + i)] = to_float(embed_[tokens_[m] * D + i]);
    barrier_.wait();
    const auto into = [](std::vector<float>& y, int64_t width) {
      return [&y, width](int64_t m, int64_t o, float value) { y[size_t(m * width + o)] = value; };
    };
    const auto add = [&](int64_t m, int64_t o, float value) { x_[size_t(m * D + o)] += value; };
    for (const Layer<W>& l : layers_) {
      normalised(l.norm_mixer, own);
      multiply(l.q, own.data(), D, D, M_, share(inner, 4, id, team), into(q_, inner));
      multiply(l.k, own.data(), D, D, M_, share(kv, 4, id, team), into(k_, kv));
      multiply(l.v, own.data(), D, D, M_, share(kv, 4, team - 1 - id, team), into(v_, kv));
      barrier_.wait();
      const Share heads = share(M_ * s_.H, 1, id, team);
      for (int64_t task = heads.begin; task < heads.end; ++task) attend(l, task / s_.H, task % s_.H, own.data());
      barrier_.wait();
      multiply(l.o, mixed_.data(), inner, inner, M_, share(D, 4, id, team), add);
      barrier_.wait();
      normalised(l.norm_channel, own);
      const Share wide = share(s_.F, 4, id, team);
      if (l.gate.weight) multiply(l.gate, own.data(), D, D, M_, wide, into(hidden_, s_.F));
      multiply(l.up, own.data(), D, D, M_, wide, [&](int64_t m, int64_t o, float value) {
        float& h = hidden_[size_t(m * s_.F + o)];
        h = l.gate.weight ? activate(s_.activation, h) * value : activate(s_.activation, value);
      });
      barrier_.wait();
      multiply(l.down, hidden_.data(), s_.F, s_.F, M_, share(D, 4, id, team), add);
      barrier_.wait();
    }
    normalised(norm_, own);
    multiply(head_, own.data(), D, D, M_, share(s_.V, 4, id, team),
             [&](int64_t m, int64_t o, float value) { logits_[m * s_.V + o] = value; });
  }

  // One head of one token: turns its query and key, keeps the key and value (the group's first head does), reads.
  void attend(const Layer<W>& l, int64_t m, int64_t h, float* scratch) {
    const int64_t K = s_.K, g = h / (s_.H / s_.G), step = s_.G * K, slot = slots_[m], start = starts_[m];
    float *q = scratch, *k = q + K, *out = k + K, *p = out + K;
    const float *cos = cos_ + m * (s_.R / 2), *sin = sin_ + m * (s_.R / 2);
    const float* v = &v_[size_t(m * step + g * K)];
    std::copy_n(&q_[size_t((m * s_.H + h) * K)], K, q);
    std::copy_n(&k_[size_t(m * step + g * K)], K, k);
    if (l.q_norm) normalise(q, l.q_norm, s_.head_eps, K, q);
    if (l.k_norm) normalise(k, l.k_norm, s_.head_eps, K, k);
    rotate(q, cos, sin, s_.R, s_.interleaved);
    rotate(k, cos, sin, s_.R, s_.interleaved);
    W* const keys = l.keys + rows_[m] * s_.entries * step + g * K;
    W* const values = l.values + rows_[m] * s_.entries * step + g * K;
    if (h % (s_.H / s_.G) == 0)
      for (int64_t i = 0; i < K; ++i) {
        keys[slot * step + i] = from_float<W>(k[i]);
        values[slot * step + i] = from_float<W>(v[i]);
      }
    const int64_t n = slot - start, whole = K / kVector * kVector;
    float most = dot(q, k, K) * s_.scale;
    p[n] = most;
    for (int64_t t = 0; t < n; ++t) {
      const W* key = keys + (start + t) * step;
      Floats total = {};
      for (int64_t i = 0; i < whole; i += kVector) total += read(q + i) * read(key + i);
      float score = sum(total);
      for (int64_t i = whole; i < K; ++i) score += q[i] * to_float(key[i]);
      p[t] = score * s_.scale;
      most = std::max(most, p[t]);
    }
    float mass = 0;
    int64_t t = 0;
    for (; t + kVector <= n + 1; t += kVector) {
      const Floats e = exp2((read(p + t) - spread(most)) * spread(1.44269504f));
      *reinterpret_cast<LooseFloats*>(p + t) = e;
      mass += sum(e);
    }
    for (; t <= n; ++t) mass += p[t] = std::exp(p[t] - most);
    for (int64_t i = 0; i < K; ++i) out[i] = p[n] * v[i];
    for (int64_t j = 0; j < n; ++j) {
      const W* value = values + (start + j) * step;
      const Floats weight = spread(p[j]);
      for (int64_t i = 0; i < whole; i += kVector)
        *reinterpret_cast<LooseFloats*>(out + i) = read(out + i) + weight * read(value + i);
      for (int64_t i = whole; i < K; ++i) out[i] += p[j] * to_float(value[i]);
    }
    for (int64_t i = 0; i < K; ++i) mixed_[size_t((m * s_.H + h) * K + i)] = out[i] / mass;
  }

  static float dot(const float* a, const float* b, int64_t n) {
    float total = 0;
    for (int64_t i = 0; i < n; ++i) total += a[i] * b[i];
    return total;
  }

  Sizes s_;
  const W *embed_, *norm_;
  Product<W> head_;
  std::vector<Layer<W>> layers_;
  std::vector<float> x_, q_, k_, v_, mixed_, hidden_;
  std::vector<std::vector<float>> own_;
  Barrier barrier_;
  std::atomic<int> ready_{0};
  int64_t M_ = 0;
  const int64_t *tokens_ = nullptr, *rows_ = nullptr, *slots_ = nullptr, *starts_ = nullptr;
  const float *cos_ = nullptr, *sin_ = nullptr;
  float* logits_ = nullptr;
};

struct Any {
  int64_t bits;
  std::unique_ptr<Decoder<float>> wide;
  std::unique_ptr<Decoder<bf16>> narrow;
};

}  // namespace
}  // namespace octavo

extern "C" {

// The entry points GOMP_parallel, omp_get_num_threads and omp_get_thread_num of torch's OpenMP runtime, or nulls.
void decode_init(void* parallel, void* team_size, void* member) {
  octavo::parallel = reinterpret_cast<octavo::Parallel>(parallel);
  octavo::team_size = reinterpret_cast<octavo::Count>(team_size);
  octavo::member = reinterpret_cast<octavo::Count>(member);
}

// sizes: D H G K F V n_layers entries R interleaved activation rows. floats: eps, head_eps, scale. pointers: embed,
// norm, head and its bias, then of each layer norm_mixer, norm_channel, q_norm, k_norm and weight, bias of q k v o gate
// up down; null where there is none. bits: 32 or 16 (bf16).
void* decode_new(const int64_t* n, const float* f, int bits, const void* const* pointers) {
  using namespace octavo;
  const Sizes s = {n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9], n[10], n[11], f[0], f[1], f[2]};
  auto made = std::make_unique<Any>();
  made->bits = bits;
  if (bits == 32)
    made->wide = std::make_unique<Decoder<float>>(s, pointers);
  else
    made->narrow = std::make_unique<Decoder<bf16>>(s, pointers);
  return made.release();
}

void decode_free(void* decoder) { delete static_cast<octavo::Any*>(decoder); }

// numbers: tokens, rows, slots, starts, M each. caches: keys and values of each layer.
void decode_step(void* decoder, int64_t M, const int64_t* numbers, const float* cos, const float* sin,
                 void* const* caches, float* logits, int threads) {
  auto* any = static_cast<octavo::Any*>(decoder);
  const int64_t *tokens = numbers, *rows = tokens + M, *slots = rows + M, *starts = slots + M;
  if (any->wide)
    any->wide->step(M, tokens, rows, slots, starts, cos, sin, caches, logits, threads);
  else
    any->narrow->step(M, tokens, rows, slots, starts, cos, sin, caches, logits, threads);
}
}
