// Block products on vector registers, in fp32 whatever the tensors hold.
//
// Scores are kept transposed, keys down the rows and queries across the lanes: the softmax is then vertical, and of
// the operands only Q^T and dO^T have to be transposed; all others are the packed rows themselves.
#pragma once

#include <cmath>

#include "dropout.h"
#include "ranges.h"

namespace octavo {

// The register tile: kRows x kColumns vectors of accumulators leave room for a row of b and one spread value of a.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRows = 8, kColumns = 3;
#else
constexpr int kRows = 4, kColumns = 3;
#endif

// c (kRows x V vectors) = [c +] a b over n steps. Transposed: a is read column by column, a(m, k) = a[k * lda + m].
template <int V, bool Transposed, bool Add>
inline __attribute__((always_inline)) void tile(const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                                                int64_t ldc, int64_t n) {
  Floats sums[kRows][V];
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sums[m][v] = Add ? load(c + m * ldc + v * kVector) : Floats{};
  for (int64_t k = 0; k < n; ++k) {
    Floats row[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) row[v] = load(b + v * kVector);
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
      const float x = Transposed ? a[m] : a[m * lda];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sums[m][v] += row[v] * x;
    }
    a += Transposed ? lda : 1;
    b += ldb;
  }
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(c + m * ldc + v * kVector, sums[m][v]);
}

template <int V, bool Transposed, bool Add>
__attribute__((noinline)) void tile_column(const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                                           int64_t ldc, int64_t rows, int64_t n) {
  for (int64_t m = 0; m < rows; m += kRows)
    tile<V, Transposed, Add>(Transposed ? a + m : a + m * lda, lda, b, ldb, c + m * ldc, ldc, n);
}

// c (rows x columns) = [c +] a b; rows a multiple of 8, columns of 16. The sum over n runs in one order for every tile
// shape, so how the work is cut never changes a bit.
template <bool Transposed, bool Add>
void product(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t rows,
             int64_t columns, int64_t n) {
  for (int64_t left = columns / kVector; left > 0;) {
    const int width = left == 4 ? 2 : int(std::min<int64_t>(left, kColumns));
    if (width == 3) tile_column<3, Transposed, Add>(a, lda, b, ldb, c, ldc, rows, n);
    if (width == 2) tile_column<2, Transposed, Add>(a, lda, b, ldb, c, ldc, rows, n);
    if (width == 1) tile_column<1, Transposed, Add>(a, lda, b, ldb, c, ldc, rows, n);
    left -= width;
    b += width * kVector;
    c += width * kVector;
  }
}

template <class X> void read_row(const X* from, int64_t n, float* to, int64_t padded) {
  if (from == nullptr) n = 0;
  for (int64_t i = 0; i < n; ++i) to[i] = to_float(from[i]);
  for (int64_t i = n; i < padded; ++i) to[i] = 0.f;
}

template <class X> void write_row(const float* from, float scale, X* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = from_float<X>(from[i] * scale);
}

// One head of a tensor: row t begins at data + t * stride. Rows outside 0 .. T and rows of padding read as zeros.
template <class X> struct Rows {
  X* data;
  int64_t stride;
  X* at(int64_t t) const { return data + t * stride; }
  X* at(int64_t t, const Ranges& r) const { return t < r.T && !r.padding(t) ? data + t * stride : nullptr; }
};

// rows (lanes x D, row stride D) to panel (D x lanes, row stride `stride`)
inline void transpose_panel(const float* rows, int64_t D, int64_t lanes, float* panel, int64_t stride) {
  for (int64_t t = 0; t < lanes; t += 16)
    for (int64_t d = 0; d < D; d += 16) transpose16(rows + t * D + d, D, panel + d * stride + t, stride);
}

// panel (D x lanes) to rows of the tensor, lane t times factor[t]
template <class X>
void write_panel(const float* panel, int64_t stride, int64_t D, const float* factor, int64_t t0, int64_t t1,
                 int64_t width, Rows<X> out, float* scratch) {
  for (int64_t t = t0; t < t1; t += 16) {
    for (int64_t d = 0; d < D; d += 16) transpose16(panel + d * stride + (t - t0), stride, scratch + d, D);
    for (int64_t i = t; i < std::min(t + 16, t1); ++i)
      write_row(scratch + (i - t) * D, factor[i - t0], out.at(i), width);
  }
}

template <class X> struct VectorUnit {
  using Element = X;
  static constexpr int kGrain = 16, kMaxStripes = 16;
  static constexpr int64_t kForwardLanes = 48, kForwardKeys = 96, kBackwardLanes = 96, kBackwardKeys = 96;
  static int64_t padded_width(int64_t K) { return round_up(K, 16); }
  struct Scope {};  // nothing to set up per thread

  struct Forward {
    static constexpr int64_t L = kForwardLanes;
    const int64_t width, D, base;
    float *k, *v, *rows, *q, *scores, *sums, *highest, *total;
    Draws<L> draws;

    // base: the first key that will be read; n: how many keys there are from there, padding included
    static int64_t bytes(int64_t D, int64_t n) {
      return 2 * Arena::bytes<float>(n * D) + 3 * Arena::bytes<float>(L * D) + Arena::bytes<float>(kForwardKeys * L) +
             2 * Arena::bytes<float>(L);
    }
    Forward(Arena& arena, int64_t width, int64_t D, int64_t base, int64_t n) : width(width), D(D), base(base) {
      k = arena.take<float>(n * D);
      v = arena.take<float>(n * D);
      rows = arena.take<float>(L * D);
      q = arena.take<float>(L * D);
      sums = arena.take<float>(L * D);
      scores = arena.take<float>(kForwardKeys * L);
      highest = arena.take<float>(L);
      total = arena.take<float>(L);
    }
    void keys(const Ranges& r, Rows<const X> from_k, Rows<const X> from_v, int64_t end) {
      for (int64_t t = base; t < end; ++t) {
        read_row(from_k.at(t, r), width, k + (t - base) * D, D);
        read_row(from_v.at(t, r), width, v + (t - base) * D, D);
      }
    }
    void queries(const Ranges& r, Rows<const X> from, int64_t q0, int64_t lanes) {
      for (int64_t t = 0; t < lanes; ++t) read_row(from.at(q0 + t, r), width, rows + t * D, D);
      transpose_panel(rows, D, lanes, q, L);
      std::memset(sums, 0, L * D * sizeof(float));
      for (int64_t t = 0; t < L; ++t) highest[t] = -1e30f, total[t] = 0.f;
    }
    // One block of keys: scores, the running softmax, and sums^T += V^T P^T.
    void block(const Ranges& r, const Stripe* stripe, int n, int64_t k0, int64_t q0, int64_t lanes, float scale2) {
      for (const Stripe* s = stripe; s < stripe + n; ++s) {
        float* c = scores + s->row0 * L + s->lane0;
        product<false, false>(k + (k0 - base + s->row0) * D, D, q + s->lane0, L, c, L, s->row1 - s->row0,
                              s->lane1 - s->lane0, D);
        mask(r, *s, k0, q0, scores, L);
      }
      for (int64_t lane = 0; lane < lanes; lane += kVector) softmax(stripe, n, k0, lane, scale2);
      for (const Stripe* s = stripe; s < stripe + n; ++s)
        product<true, true>(v + (k0 - base + s->row0) * D, D, scores + s->row0 * L + s->lane0, L, sums + s->lane0, L,
                            D, s->lane1 - s->lane0, s->row1 - s->row0);
    }
    void softmax(const Stripe* stripe, int n, int64_t k0, int64_t lane, float scale2) {
      const auto inside = [&](const Stripe* s) { return s->lane0 <= lane && lane < s->lane1; };
      const Floats before = load(highest + lane);
      Floats top = spread(-std::numeric_limits<float>::infinity()), other = top;
      for (const Stripe* s = stripe; s < stripe + n; ++s)
        if (inside(s))
          for (int64_t row = s->row0; row < s->row1; row += 2) {
            const Floats x = load(scores + row * L + lane), y = load(scores + (row + 1) * L + lane);
            top = top > x ? top : x;
            other = other > y ? other : y;
          }
      top = (top > other ? top : other) * scale2;
      const Floats now = before > top ? before : top, shrink = exp2(before - now);
      Floats sum0 = Floats{}, sum1 = Floats{};
      for (const Stripe* s = stripe; s < stripe + n; ++s)
        if (inside(s))
          for (int64_t row = s->row0; row < s->row1; row += 2) {
            float* at = scores + row * L + lane;
            Floats p0 = exp2(load(at) * scale2 - now), p1 = exp2(load(at + L) * scale2 - now);
            sum0 += p0;
            sum1 += p1;
            if (draws.least) draws.drop(lane, k0 + row, p0, p1);
            store(at, p0);
            store(at + L, p1);
          }
      store(highest + lane, now);
      store(total + lane, load(total + lane) * shrink + (sum0 + sum1));
      bool same = true;
      for (int i = 0; i < kVector; ++i) same &= shrink[i] == 1.f;
      if (!same)
        for (int64_t d = 0; d < D; ++d) store(sums + d * L + lane, load(sums + d * L + lane) * shrink);
    }
    // lse: log2 of the sum of 2^(scale2 score); +infinity where nothing was read, so that the backward sees zeros
    void write(const Ranges& r, int64_t q0, Rows<X> out, float* lse) {
      const int64_t n = std::min(L, r.T - q0);
      float factor[L];
      for (int64_t t = 0; t < n; ++t) {
        const bool empty = total[t] == 0.f;
        factor[t] = empty ? 0.f : draws.factor / total[t];
        lse[q0 + t] = empty ? std::numeric_limits<float>::infinity() : highest[t] + std::log2(total[t]);
      }
      write_panel(sums, L, D, factor, q0, q0 + n, width, out, rows);
    }
  };

  struct Backward {
    static constexpr int64_t L = kBackwardLanes;
    const int64_t width, D, base;
    float *k, *v, *dk, *dv, *q, *grad, *qt, *gradt, *p, *ds, *lse, *delta, *scratch;
    Draws<L> draws;

    // n keys from base on, padding included
    static int64_t bytes(int64_t D, int64_t n) {
      return 4 * Arena::bytes<float>(n * D) + 4 * Arena::bytes<float>(L * D) +
             2 * Arena::bytes<float>(kBackwardKeys * L) + 2 * Arena::bytes<float>(L) + Arena::bytes<float>(16 * D);
    }
    Backward(Arena& arena, int64_t width, int64_t D, int64_t base, int64_t n) : width(width), D(D), base(base) {
      k = arena.take<float>(n * D);
      v = arena.take<float>(n * D);
      dk = arena.take<float>(n * D);
      dv = arena.take<float>(n * D);
      q = arena.take<float>(L * D);
      grad = arena.take<float>(L * D);
      qt = arena.take<float>(L * D);
      gradt = arena.take<float>(L * D);
      p = arena.take<float>(kBackwardKeys * L);
      ds = arena.take<float>(kBackwardKeys * L);
      lse = arena.take<float>(L);
      delta = arena.take<float>(L);
      scratch = arena.take<float>(16 * D);
    }
    void keys(const Ranges& r, Rows<const X> from_k, Rows<const X> from_v, int64_t end) {
      for (int64_t t = base; t < end; ++t) {
        read_row(from_k.at(t, r), width, k + (t - base) * D, D);
        read_row(from_v.at(t, r), width, v + (t - base) * D, D);
      }
      std::memset(dk, 0, (end - base) * D * sizeof(float));
      std::memset(dv, 0, (end - base) * D * sizeof(float));
    }
    // One head's block of queries; delta = rowsum(dO * O).
    void queries(const Ranges& r, Rows<const X> from, Rows<const X> from_grad, Rows<const X> from_out,
                 const float* given_lse, int64_t q0, int64_t lanes) {
      for (int64_t i = 0; i < lanes; ++i) {
        const int64_t t = q0 + i;
        read_row(from.at(t, r), width, q + i * D, D);
        read_row(from_grad.at(t, r), width, grad + i * D, D);
        read_row(from_out.at(t, r), width, scratch, D);
        Floats dot = Floats{};
        for (int64_t d = 0; d < D; d += kVector) dot += load(grad + i * D + d) * load(scratch + d);
        delta[i] = sum(dot);
        lse[i] = t < r.T ? given_lse[t] : std::numeric_limits<float>::infinity();
      }
      transpose_panel(q, D, lanes, qt, L);
      transpose_panel(grad, D, lanes, gradt, L);
    }
    // One block of probabilities and of their gradients, dV += P^T dO and dK += dS^T Q. With dropout P is what was kept
    // of it in the first product, and so is its gradient; delta is the same sum.
    void block(const Ranges& r, const Stripe* stripe, int n, int64_t k0, int64_t q0, float scale2) {
      const int64_t at_k = (k0 - base) * D;
      for (const Stripe* s = stripe; s < stripe + n; ++s) {
        const int64_t rows = s->row1 - s->row0, columns = s->lane1 - s->lane0, at = s->row0 * L + s->lane0;
        product<false, false>(k + at_k + s->row0 * D, D, qt + s->lane0, L, p + at, L, rows, columns, D);
        product<false, false>(v + at_k + s->row0 * D, D, gradt + s->lane0, L, ds + at, L, rows, columns, D);
        mask(r, *s, k0, q0, p, L);
        for (int64_t lane = s->lane0; lane < s->lane1; lane += kVector) {
          const Floats l = load(lse + lane), e = load(delta + lane);
          for (int64_t row = s->row0; row < s->row1; row += 2) {
            float *to_p = p + row * L + lane, *to_ds = ds + row * L + lane;
            const Floats x0 = exp2(load(to_p) * scale2 - l), x1 = exp2(load(to_p + L) * scale2 - l);
            Floats kept0 = x0, kept1 = x1, slope0 = load(to_ds), slope1 = load(to_ds + L);
            if (draws.least) {
              Floats m0 = spread(draws.factor), m1 = m0;
              draws.drop(lane, k0 + row, m0, m1);
              kept0 *= m0, kept1 *= m1, slope0 *= m0, slope1 *= m1;
            }
            store(to_p, kept0);
            store(to_p + L, kept1);
            store(to_ds, x0 * (slope0 - e));
            store(to_ds + L, x1 * (slope1 - e));
          }
        }
      }
      for (const Stripe* s = stripe; s < stripe + n; ++s) {
        const int64_t rows = s->row1 - s->row0, lanes = s->lane1 - s->lane0, at = s->row0 * L + s->lane0;
        const int64_t to = at_k + s->row0 * D, from = s->lane0 * D;
        product<false, true>(p + at, L, grad + from, D, dv + to, D, rows, D, lanes);
        product<false, true>(ds + at, L, q + from, D, dk + to, D, rows, D, lanes);
      }
    }
    // sums^T (D x L) += K^T dS^T of the block just computed
    void query_gradient(const Stripe* stripe, int n, int64_t k0, float* sums) {
      for (const Stripe* s = stripe; s < stripe + n; ++s)
        product<true, true>(k + (k0 - base + s->row0) * D, D, ds + s->row0 * L + s->lane0, L, sums + s->lane0, L, D,
                            s->lane1 - s->lane0, s->row1 - s->row0);
    }
    void write_queries(const Ranges& r, const float* sums, int64_t q0, float scale, Rows<X> out) {
      float factor[L];
      std::fill_n(factor, L, scale);
      write_panel(sums, L, D, factor, q0, std::min(q0 + L, r.T), width, out, scratch);
    }
    void write_keys(const Ranges& r, int64_t end, float scale, Rows<X> out_k, Rows<X> out_v) {
      for (int64_t t = base; t < std::min(end, r.T); ++t) {
        write_row(dk + (t - base) * D, scale, out_k.at(t), width);
        write_row(dv + (t - base) * D, 1.f, out_v.at(t), width);
      }
    }
  };
};

}  // namespace octavo
