// Attention of one token's query heads that share a key head, over keys and values in blocks of a pool. Keys are taken
// sixteen at a time from the first readable one on, whatever blocks they lie in.
#pragma once

#include <cmath>

#include "decode_product.h"

namespace octavo {

// The entries of a pool that hold a sequence's slots, one after the other.
struct Walk {
  const int32_t* table;
  int64_t block_size, offset;
  Walk(const int32_t* blocks, int64_t size, int64_t slot)
      : table(blocks + slot / size), block_size(size), offset(slot % size) {}
  int64_t next() {
    const int64_t entry = *table * block_size + offset;
    if (++offset == block_size) offset = 0, ++table;
    return entry;
  }
};

// What is read some entries later: they lie in no order that the processor would guess.
template <class C> inline void fetch(const C* p, int64_t n) {
  for (int64_t i = 0; i < n; i += int64_t(64 / sizeof(C))) __builtin_prefetch(p + i);
}

template <class C> inline Lanes some(const C* p, int64_t n) {  // n of 16, then zeros
  if (n >= kLanes) return get(p);
  Lanes x = {};
  for (int64_t i = 0; i < n; ++i) x[i] = to_float(p[i]);
  return x;
}

// Lane j: the sum over all lanes of x[j].
#if defined(__AVX512F__)
template <int kLow, int kHigh> inline Lanes fold_quads(Lanes a, Lanes b) {
  return Lanes(_mm512_shuffle_f32x4(__m512(a), __m512(b), kLow)) +
         Lanes(_mm512_shuffle_f32x4(__m512(a), __m512(b), kHigh));
}
template <int kLow, int kHigh> inline Lanes fold_lanes(Lanes a, Lanes b) {
  return Lanes(_mm512_shuffle_ps(__m512(a), __m512(b), kLow)) + Lanes(_mm512_shuffle_ps(__m512(a), __m512(b), kHigh));
}
inline Lanes sums(const Lanes* x) {
  Lanes row[4];
  for (int i = 0; i < 4; ++i)
    row[i] = fold_quads<0x88, 0xdd>(fold_quads<0x44, 0xee>(x[i], x[i + 4]), fold_quads<0x44, 0xee>(x[i + 8], x[i + 12]));
  return fold_lanes<0x88, 0xdd>(fold_lanes<0x44, 0xee>(row[0], row[1]), fold_lanes<0x44, 0xee>(row[2], row[3]));
}
#else
inline Lanes sums(const Lanes* x) {
  Lanes turned[kLanes];
  transpose16(x, kLanes, turned, kLanes);
  Lanes total = turned[0];
  for (int i = 1; i < kLanes; ++i) total += turned[i];
  return total;
}
#endif

// e^x for x <= 0.
inline Lanes exponential(Lanes x) {
  Lanes y;
  for (int i = 0; i < kLanes; i += kVector) {
    Floats part;
    std::memcpy(&part, reinterpret_cast<const float*>(&x) + i, sizeof part);
    part = exp2(part * spread(1.44269504f));
    std::memcpy(reinterpret_cast<float*>(&y) + i, &part, sizeof part);
  }
  return y;
}

// One layer's keys and values of one key head: entries of K channels, `step` apart.
template <class C> struct Pool {
  C *keys, *values;
  int64_t step, K;
};

// V vectors of channels (whole ones if V > 1) of N heads' sums over n values, weighted by scores (N, stride).
template <int N, int V, class C>
void weigh(const Pool<C>& pool, Walk walk, int64_t n, const float* scores, int64_t stride, int64_t channel,
           const float* mass, float* out, int64_t out_stride) {
  Lanes total[N][V] = {};
  const int64_t left = pool.K - channel;
  Walk later = walk;
  for (int64_t j = 0; j < std::min<int64_t>(n, kLanes); ++j) later.next();
  for (int64_t j = 0; j < n; ++j) {
    if (j + kLanes < n) fetch(pool.values + later.next() * pool.step + channel, std::min<int64_t>(left, V * kLanes));
    const C* value = pool.values + walk.next() * pool.step + channel;
    Lanes v[V];
    for (int i = 0; i < V; ++i) v[i] = V > 1 ? get(value + i * kLanes) : some(value, left);
    for (int h = 0; h < N; ++h) {
      const Lanes p = lanes(scores[h * stride + j]);
      for (int i = 0; i < V; ++i) total[h][i] += p * v[i];
    }
  }
  for (int h = 0; h < N; ++h)
    for (int i = 0; i < V; ++i) {
      const Lanes y = total[h][i] / lanes(mass[h]);
      for (int64_t c = 0; c < std::min<int64_t>(kLanes, left - i * kLanes); ++c)
        out[h * out_stride + channel + i * kLanes + c] = y[c];
    }
}

// N heads' queries q (N, q_stride), scaled, padded with zeros to whole vectors, over the n entries that walk gives.
// scratch: N * stride + 16 * q_stride floats, with stride >= n rounded up to whole vectors.
template <int N, class C>
void attend(const Pool<C>& pool, Walk walk, int64_t n, const float* q, int64_t q_stride, float* scratch, float* out) {
  const int64_t K = pool.K, stride = (n + kLanes - 1) / kLanes * kLanes;
  float *scores = scratch, *wide = scratch + N * stride;
  const Wholes order = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const bool direct = sizeof(C) == sizeof(float) && K % kLanes == 0;
  float mass[N];
  Lanes most[N];
  for (int h = 0; h < N; ++h) most[h] = lanes(-INFINITY);
  Walk keys = walk, later = walk, values = walk;
  for (int64_t j = 0; j < std::min<int64_t>(n, kLanes); ++j) {
    fetch(pool.keys + later.next() * pool.step, K);
    fetch(pool.values + values.next() * pool.step, K);
  }
  for (int64_t start = 0; start < n; start += kLanes) {
    for (int64_t j = start + kLanes; j < std::min(n, start + 2 * kLanes); ++j)
      fetch(pool.keys + later.next() * pool.step, K);
    const int64_t here = std::min<int64_t>(kLanes, n - start);
    const float* key[kLanes];
    for (int64_t j = 0; j < kLanes; ++j) {
      if (j >= here) {
        key[j] = key[0];
        continue;
      }
      const C* from = pool.keys + keys.next() * pool.step;
      key[j] = direct ? reinterpret_cast<const float*>(from) : wide + j * q_stride;
      if (!direct)
        for (int64_t i = 0; i < K; i += kLanes) put(wide + j * q_stride + i, some(from + i, K - i));
    }
    for (int h = 0; h < N; ++h) {
      Lanes total[kLanes] = {};
      for (int64_t i = 0; i < K; i += kLanes) {
        const Lanes query = get(q + h * q_stride + i);
        for (int j = 0; j < kLanes; ++j) total[j] += query * get(key[j] + i);
      }
      const Lanes score = order < int32_t(here) ? sums(total) : lanes(-INFINITY);
      put(scores + h * stride + start, score);
      most[h] = most[h] > score ? most[h] : score;
    }
  }
  for (int h = 0; h < N; ++h) {
    float top = most[h][0];
    for (int j = 1; j < kLanes; ++j) top = std::max(top, most[h][j]);
    Lanes total = {};
    for (int64_t j = 0; j < stride; j += kLanes) {
      const Lanes p = exponential(get(scores + h * stride + j) - lanes(top));
      put(scores + h * stride + j, p);
      total += p;
    }
    mass[h] = 0;
    for (int j = 0; j < kLanes; ++j) mass[h] += total[j];
  }
  int64_t channel = 0;
  for (; channel + 4 * kLanes <= K; channel += 4 * kLanes)
    weigh<N, 4>(pool, walk, n, scores, stride, channel, mass, out, K);
  for (; channel < K; channel += kLanes) weigh<N, 1>(pool, walk, n, scores, stride, channel, mass, out, K);
}

}  // namespace octavo
