// Which keys a query may read, and the rectangles of a block of scores in which anything is read.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "vectors.h"

namespace octavo {

constexpr int64_t kAlign = 64;
inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }
inline int64_t round_down(int64_t x, int64_t to) { return x / to * to; }

// Memory for one task, cut off piece by piece.
struct Arena {
  char* at;
  template <class X> X* take(int64_t n) {
    X* p = reinterpret_cast<X*>(at);
    at += bytes<X>(n);
    return p;
  }
  template <class X> static int64_t bytes(int64_t n) { return round_up(n * int64_t(sizeof(X)), kAlign); }
};

// Query t reads the keys first[t] .. t; a negative first says that t is padding: it reads nothing, nothing reads it.
struct Ranges {
  static constexpr int32_t kNothing = std::numeric_limits<int32_t>::max();
  int64_t T;
  int32_t* first;   // (padded) kNothing where nothing is read
  int32_t* low;     // the least key that this query or any later one reads, at most T
  int32_t* end;     // 1 + the last query that may read this key; at most T
  int32_t* hidden;  // how many padding keys come before this one

  static int64_t bytes(int64_t padded) { return 4 * Arena::bytes<int32_t>(padded + 1); }

  Ranges(Arena& arena, const int32_t* given, int64_t T, int64_t padded) : T(T) {
    first = arena.take<int32_t>(padded + 1);
    low = arena.take<int32_t>(padded + 1);
    end = arena.take<int32_t>(padded + 1);
    hidden = arena.take<int32_t>(padded + 1);
    int32_t padding = 0;
    for (int64_t t = 0; t <= padded; ++t) {
      hidden[t] = padding;
      first[t] = t >= T ? kNothing : given == nullptr ? 0 : given[t] < 0 ? kNothing : given[t];
      padding += t < T && first[t] == kNothing;
    }
    int32_t least = int32_t(T);
    for (int64_t t = padded; t >= 0; --t) low[t] = least = std::min(least, first[t]);
    int64_t q = 0;
    for (int64_t t = 0; t <= padded; ++t) {
      while (q < T && low[q] <= t) ++q;
      end[t] = int32_t(q);
    }
  }
  bool padding(int64_t t) const { return hidden[t + 1] != hidden[t]; }

  // The first key of queries q0 .. , a multiple of grain; never after q0, so that every query meets its own block.
  int64_t begin(int64_t q0, int64_t grain) const { return round_down(std::min<int64_t>(low[q0], q0), grain); }
};

// Keys row0 .. row1 are read by some of the lanes lane0 .. lane1 (queries counted from the block's first one).
struct Stripe { int32_t row0, row1, lane0, lane1; };

// Stripes of the keys k0 .. k1 for `lanes` queries from q0; all bounds are multiples of grain. Returns how many.
inline int stripes(const Ranges& ranges, int64_t k0, int64_t k1, int64_t q0, int64_t lanes, int grain, Stripe* out) {
  int n = 0;
  for (int64_t k = k0; k < k1; k += grain) {
    const int64_t last = std::min(k + grain, ranges.T) - 1;
    if (last < k) break;
    const int32_t a = int32_t(std::max<int64_t>(0, round_down(k - q0, grain)));
    const int32_t b = int32_t(std::min(lanes, round_up(std::max<int64_t>(0, ranges.end[last] - q0), grain)));
    if (b <= a) continue;
    const int32_t row = int32_t(k - k0);
    if (n && out[n - 1].row1 == row && out[n - 1].lane0 == a && out[n - 1].lane1 == b)
      out[n - 1].row1 = row + grain;
    else
      out[n++] = {row, row + grain, a, b};
  }
  return n;
}

// Set the scores (row stride `stride`) of a stripe to -infinity where the lane's query may not read the row's key.
inline void mask(const Ranges& ranges, const Stripe& s, int64_t k0, int64_t q0, float* scores, int64_t stride) {
  const Floats never = spread(-std::numeric_limits<float>::infinity());
  Ints count;
  for (int i = 0; i < kVector; ++i) count[i] = i;
  const bool hidden = ranges.hidden[k0 + s.row1] != ranges.hidden[k0 + s.row0];
  for (int64_t lane = s.lane0; lane < s.lane1; lane += kVector) {
    const int64_t q = q0 + lane;
    int32_t latest = 0;
    for (int i = 0; i < kVector; ++i) latest = std::max(latest, ranges.first[q + i]);
    if (k0 + s.row1 - 1 <= q && k0 + s.row0 >= latest && !hidden) continue;
    Ints first;
    std::memcpy(&first, ranges.first + q, sizeof first);
    const Ints self = count + int32_t(q);
    for (int64_t row = s.row0; row < s.row1; ++row) {
      const int64_t k = k0 + row;
      float* at = scores + row * stride + lane;
      const Ints key = spread(k < ranges.T && ranges.padding(k) ? -1 : int32_t(k));
      const Ints readable = (first <= key) & (key <= self);
      store(at, readable ? load(at) : never);
    }
  }
}

}  // namespace octavo
