// Dropout whose mask is a pure function of (seed, head, query, key): nothing is stored, and any part of it can be
// computed again by any thread, in any order. nn/dropout.py has the same function in torch's integers.
//
// Seed, head and query become two keys of 32 bits; a pair of neighbouring keys is mixed with both, and each of the two
// is told by 16 bits of the result. The mixer is "lowbias32" (Wellons, hash-prospector, 2018), the second key
// enters in its middle.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "vectors.h"

namespace octavo {

typedef uint32_t Words __attribute__((vector_size(kVector * 4), may_alias));

constexpr uint32_t kGolden = 0x9e3779b9u, kMix0 = 0x7feb352du, kMix1 = 0x846ca68bu;

inline uint32_t fold(uint32_t key, uint32_t x) {
  x = key + (x + 1u) * kGolden;
  x = (x ^ (x >> 16)) * kMix0;
  x = (x ^ (x >> 15)) * kMix1;
  return x ^ (x >> 16);
}

// 32 bits for the pair of keys x began with: a + pair * kGolden.
inline Words draw(Words x, Words b) {
  x = ((x ^ (x >> 16)) * kMix0) ^ b;
  x = (x ^ (x >> 15)) * kMix1;
  return x ^ (x >> 16);
}

// What one call was told; 16 bits below `least` are dropped, and nothing is where that is 0.
struct Dropout {
  uint32_t least = 0, a = 0, b = 0;
  float factor = 1.f;  // of what is kept

  Dropout(int64_t seed, int least) : least(uint32_t(least)), factor(65536.f / float(65536 - least)) {
    const uint32_t low = uint32_t(seed), high = uint32_t(uint64_t(seed) >> 32);
    a = fold(fold(1, low), high);
    b = fold(fold(2, low), high);
  }
  Dropout of(int64_t x) const {
    Dropout next = *this;
    next.a = fold(a, uint32_t(x));
    next.b = fold(b, uint32_t(x));
    return next;
  }
};

// The same for L queries of a head, side by side.
template <int64_t L> struct Draws {
  alignas(64) uint32_t a[L], b[L];
  uint32_t least = 0;
  float factor = 1.f;

  void queries(const Dropout& head, int64_t q0) {
    least = head.least;
    factor = head.factor;
    for (int64_t i = 0; least && i < L; ++i) a[i] = fold(head.a, uint32_t(q0 + i));
    for (int64_t i = 0; least && i < L; ++i) b[i] = fold(head.b, uint32_t(q0 + i));
  }
  // Zeros in place of what the queries from `lane` on drop of the keys `key`, which is even, and key + 1.
  void drop(int64_t lane, int64_t key, Floats& x, Floats& y) const {
    const Words w = draw(*reinterpret_cast<const Words*>(a + lane) + uint32_t(key / 2) * kGolden,
                         *reinterpret_cast<const Words*>(b + lane));
    const Words limit = Words{} + (least << 16);
    x = (w << 16) >= limit ? x : Floats{};
    y = (w & 0xffff0000u) >= limit ? y : Floats{};
  }
};

// Dropout of a flat array: element i is the key i % kRowOfFlat of the query i / kRowOfFlat of head 0.
constexpr int64_t kRowOfFlat = 4096;
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the lower half of a word tells of the first of two elements");

// N numbers side by side, so that the compiler makes vectors of them
template <int64_t N, class X>
void drop_some(const uint16_t* half, const Dropout& row, const X* from, const X* onto, X* to) {
  float x[N];
  for (int64_t i = 0; i < N; ++i) x[i] = to_float(from[i]) * row.factor;
  for (int64_t i = 0; i < N; ++i) x[i] = half[i] >= row.least ? x[i] : 0.f;
  for (int64_t i = 0; onto != nullptr && i < N; ++i) x[i] += to_float(onto[i]);
  for (int64_t i = 0; i < N; ++i) to[i] = from_float<X>(x[i]);
}

// to = from where it is kept, added to onto if that is there
template <class X> void drop_row(const Dropout& row, const X* from, const X* onto, X* to, int64_t n) {
  constexpr int64_t N = 2 * kVector;
  Words x, b = Words{} + row.b;
  for (int i = 0; i < kVector; ++i) x[i] = row.a + uint32_t(i) * kGolden;
  for (int64_t i = 0; i < n; i += N, x += kVector * kGolden) {
    alignas(64) uint16_t half[N];
    const Words w = draw(x, b);
    std::memcpy(half, &w, sizeof w);
    const int64_t step = n - i >= N ? N : 1;
    for (int64_t j = i; j < std::min(i + N, n); j += step) {
      const X* const sum = onto == nullptr ? nullptr : onto + j;
      if (step == N)
        drop_some<N>(half, row, from + j, sum, to + j);
      else
        drop_some<1>(half + (j - i), row, from + j, sum, to + j);
    }
  }
}

}  // namespace octavo
