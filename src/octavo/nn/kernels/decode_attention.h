// Attention of one token's query heads that share a key head, over keys and values in blocks of a pool. A vector of
// scores is some entries by N heads: its lanes are filled by one sum across lanes of sixteen accumulators, and each key
// is read and widened once for all N.
#pragma once

#include <cmath>

#include "decode_product.h"

namespace octavo {

// The pool's entry that holds a slot.
inline int64_t entry_of(const int32_t* blocks, int64_t block_size, int64_t slot) {
  return blocks[slot / block_size] * block_size + slot % block_size;
}

// What is read that many entries later is asked for now: they lie in no order that the processor would guess.
constexpr int64_t kEarly = 24;

// The entries of n slots from `first` on; then the last one again, as often as the reader looks ahead.
inline void list_entries(const int32_t* blocks, int64_t block_size, int64_t first, int64_t n, int64_t* out) {
  for (int64_t slot = first; slot < first + n;) {
    const int64_t start = entry_of(blocks, block_size, slot);
    const int64_t end = std::min(first + n, slot / block_size * block_size + block_size);
    for (int64_t i = 0; i < end - slot; ++i) out[i] = start + i;
    out += end - slot, slot = end;
  }
  std::fill_n(out, kEarly, out[-1]);
}

// The same of a ring of `length` entries from `base` on, which holds slot s at s % length.
inline void list_ring(int64_t base, int64_t length, int64_t first, int64_t n, int64_t* out) {
  for (int64_t i = 0, at = first % length; i < n; ++i, at = at + 1 < length ? at + 1 : 0) out[i] = base + at;
  std::fill_n(out + n, kEarly, out[n - 1]);
}

// n channels, or W * 32 of them where that is known: this is done for each entry, so a loop would be felt.
template <int W = 0, class C> inline void fetch(const C* p, int64_t n) {
  constexpr int64_t kLine = 64 / sizeof(C);
  if (W) {
#pragma GCC unroll 8
    for (int64_t i = 0; i < W * 32; i += kLine) __builtin_prefetch(p + i);
  } else {
    for (int64_t i = 0; i < n; i += kLine) __builtin_prefetch(p + i);
  }
}

// 32 channels as two vectors: of floats, the first half and the second; of bf16, those at even places and those at odd
// ones, which a shift and a mask take apart. place_of says where a channel then stands.
constexpr int64_t kChannels = 2 * kLanes;
inline void widen32(const float* p, Lanes& a, Lanes& b) { a = get(p), b = get(p + kLanes); }
inline void widen32(const bf16* p, Lanes& a, Lanes& b) {
  Words bits;
  std::memcpy(&bits, p, sizeof bits);
  a = as<Lanes>(bits << 16), b = as<Lanes>(bits & 0xffff0000u);
}
template <class C> inline void widen(const C* p, int64_t left, Lanes& a, Lanes& b) {
  if (left >= kChannels) return widen32(p, a, b);
  C padded[kChannels] = {};
  std::copy_n(p, left, padded);
  widen32(padded, a, b);
}
template <class C> inline int64_t place_of(int64_t i) {
  if (sizeof(C) == sizeof(float)) return i;
  return i / kChannels * kChannels + i % 2 * kLanes + i % kChannels / 2;
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

// cap * tanh(x / cap).
inline Lanes capped(Lanes x, float cap) {
  const Lanes y = x * lanes(1.f / cap), e = exponential(lanes(-2.f) * (y > -y ? y : -y));  // no overflow: e <= 1
  const Lanes size = lanes(cap) * (lanes(1.f) - e) / (lanes(1.f) + e);
  return y > Lanes{} ? size : -size;
}

// One layer's keys and values of one key head: entries of K channels, `step` apart.
template <class C> struct Pool {
  C *keys, *values;
  int64_t step, K;
};

// V times 32 channels of N heads' sums over the values of n entries.
template <int N, int V, class C>
void weigh(const Pool<C>& pool, const int64_t* entries, int64_t n, const float* scores, int64_t channel,
           const float* mass, float* out) {
  constexpr int P = kLanes / N;
  Lanes total[N][2 * V] = {};
  const C* values = pool.values + channel;
  const int64_t left = pool.K - channel;
  for (int64_t start = 0; start < n; start += P, scores += kLanes)
    for (int64_t p = 0; p < std::min<int64_t>(P, n - start); ++p) {
      fetch<V>(values + entries[start + p + kEarly] * pool.step, left);
      const C* value = values + entries[start + p] * pool.step;
      Lanes v[2 * V];
      for (int i = 0; i < V; ++i) widen(value + i * kChannels, V > 1 ? kChannels : left, v[2 * i], v[2 * i + 1]);
      for (int h = 0; h < N; ++h) {
        const Lanes weight = lanes(scores[p * N + h]);
        for (int i = 0; i < 2 * V; ++i) total[h][i] += weight * v[i];
      }
    }
  for (int h = 0; h < N; ++h)
    for (int i = 0; i < V; ++i) {
      float wide[kChannels];
      put(wide, total[h][2 * i] / lanes(mass[h])), put(wide + kLanes, total[h][2 * i + 1] / lanes(mass[h]));
      float* to = out + h * pool.K + channel + i * kChannels;
      for (int64_t c = 0; c < std::min(kChannels, left - i * kChannels); ++c) to[c] = wide[place_of<C>(c)];
    }
}

// Queries q (N, width) of N heads, scaled, their channels where place_of says and zeros between, over n entries
// (list_entries); W is width / 32 where that is known. cap: the bound of scores, 0 for none. scratch: 16 floats for each
// kLanes / N entries begun.
template <int N, int W, class C>
void attend(const Pool<C>& pool, const int64_t* entries, int64_t n, const float* q, int64_t width, float cap,
            float* scratch, float* out) {
  constexpr int P = kLanes / N;
  if (W) width = W * kChannels;
  const Wholes lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  for (int64_t j = 0; j < std::min(n, kEarly); ++j) fetch<W>(pool.keys + entries[j] * pool.step, pool.K);
  Lanes most = lanes(-INFINITY);
  float* scores = scratch;
  for (int64_t start = 0; start < n; start += P, scores += kLanes) {
    Lanes total[kLanes] = {};
    for (int p = 0; p < P; ++p) {
      fetch<W>(pool.keys + entries[start + p + kEarly - P] * pool.step, pool.K);
      const C* key = pool.keys + entries[start + p] * pool.step;  // past the last: computed, and thrown away
      for (int64_t i = 0; i < width; i += kChannels) {
        Lanes a, b;
        widen(key + i, W ? kChannels : pool.K - i, a, b);
        for (int h = 0; h < N; ++h) total[p * N + h] += a * get(q + h * width + i);
        for (int h = 0; h < N; ++h) total[p * N + h] += b * get(q + h * width + i + kLanes);
      }
    }
    const Lanes sum = cap > 0 ? capped(sums(total), cap) : sums(total);
    const Lanes score = lane < int32_t(std::min<int64_t>(P, n - start) * N) ? sum : lanes(-INFINITY);
    put(scores, score);
    most = most > score ? most : score;
  }
  const int64_t length = scores - scratch;
  for (int64_t j = 0; j < std::min(n, kEarly); ++j) fetch<W>(pool.values + entries[j] * pool.step, pool.K);
  Lanes top = {}, total = {};
  for (int h = 0; h < N; ++h) {
    float highest = most[h];
    for (int p = 1; p < P; ++p) highest = std::max(highest, most[p * N + h]);
    for (int p = 0; p < P; ++p) top[p * N + h] = highest;
  }
  for (int64_t j = 0; j < length; j += kLanes) {
    const Lanes e = exponential(get(scratch + j) - top);
    put(scratch + j, e);
    total += e;
  }
  float mass[N];
  for (int h = 0; h < N; ++h) {
    mass[h] = total[h];
    for (int p = 1; p < P; ++p) mass[h] += total[p * N + h];
  }
  int64_t channel = 0;
  for (; channel + 2 * kChannels <= pool.K; channel += 2 * kChannels)
    weigh<N, 2>(pool, entries, n, scratch, channel, mass, out);
  for (; channel < pool.K; channel += kChannels) weigh<N, 1>(pool, entries, n, scratch, channel, mass, out);
}

}  // namespace octavo
