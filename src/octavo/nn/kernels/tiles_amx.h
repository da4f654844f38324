// Block products on AMX tiles: bf16 operands, fp32 sums. Compiled for a processor with AMX-BF16, or with
// OCTAVO_EMULATED_TILES for any.
//
// Transposed scores again, for another reason than on vectors: P^T and dS^T come out as the left operands that dV and
// dK want, and the right operands that O^T and dQ^T want are two rows interleaved. No transposes in the inner loops.
//
// Operands are packed once into tiles of 1 KiB (16 rows of 64 bytes): zeros fill odd lengths and widths, and the row
// strides that are powers of two, which fight for the same cache sets, are gone.
#pragma once

#if defined(OCTAVO_EMULATED_TILES)
#include "tiles_emulated.h"
#else
#include <immintrin.h>
#define TILE_CONFIG(p) _tile_loadconfig(p)
#define TILE_RELEASE() _tile_release()
#define TILE_ZERO(t) _tile_zero(t)
#define TILE_LOAD(t, p, stride) _tile_loadd(t, p, stride)
#define TILE_STORE(t, p, stride) _tile_stored(t, p, stride)
#define TILE_DOT(c, a, b) _tile_dpbf16ps(c, a, b)
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#include "halves.h"
#include "tiles_vector.h"

namespace octavo {

// Whether this process may use tiles. Linux grants them on request: ARCH_REQ_XCOMP_PERM for XFEATURE_XTILEDATA.
inline bool tiles_granted() {
#if defined(OCTAVO_EMULATED_TILES)
  return true;
#elif defined(__linux__)
  return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
  return false;
#endif
}

constexpr int64_t kTile = 512;   // bf16 numbers in a tile
constexpr int64_t kSums = 256;   // fp32 numbers in a tile
constexpr int64_t kEdge = 32;    // edge of the block of 2 x 2 tiles that is computed at once
constexpr int kLanes = int(kEdge) / kVector;

// GCC's tile intrinsics do not tell the compiler which memory they read and write.
inline void fence() { asm volatile("" ::: "memory"); }

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {};
  uint8_t rows[16] = {};
  TileConfig() {
    for (int i = 0; i < 8; ++i) bytes_per_row[i] = 64, rows[i] = 16;
  }
};

// Tiles belong to a thread: set up on entry and given back on exit, so that nobody else meets our configuration and
// nothing of 8 KiB is saved at every switch of threads.
struct TileScope {
  TileScope() {
    const TileConfig config;
    fence();
    TILE_CONFIG(&config);
  }
  ~TileScope() { TILE_RELEASE(); }
};

// Tiles 0 .. 3 are 2 x 2 sums, 4 and 5 the left operand, 6 and 7 the right one.
inline void sums_zero() {
  TILE_ZERO(0); TILE_ZERO(1); TILE_ZERO(2); TILE_ZERO(3);
}
inline void sums_load(const float* c00, const float* c01, const float* c10, const float* c11) {
  TILE_LOAD(0, c00, 64); TILE_LOAD(1, c01, 64);
  TILE_LOAD(2, c10, 64); TILE_LOAD(3, c11, 64);
}
inline void sums_store(float* c00, float* c01, float* c10, float* c11, int64_t stride = 64) {
  TILE_STORE(0, c00, stride); TILE_STORE(1, c01, stride);
  TILE_STORE(2, c10, stride); TILE_STORE(3, c11, stride);
}
inline void sums_add(const bf16* a0, const bf16* a1, const bf16* b0, const bf16* b1) {
  TILE_LOAD(4, a0, 64);
  TILE_LOAD(6, b0, 64);
  TILE_LOAD(7, b1, 64);
  TILE_LOAD(5, a1, 64);
  TILE_DOT(0, 4, 6);
  TILE_DOT(1, 4, 7);
  TILE_DOT(2, 5, 6);
  TILE_DOT(3, 5, 7);
}

// out (32 x 32, fp32, rows of `stride`) = two row tiles of a times two column tiles of b, over `chunks` of 32
inline void score_block(const bf16* a, const bf16* b, int64_t chunks, float* out) {
  sums_zero();
  for (int64_t c = 0; c < chunks; ++c)
    sums_add(a + c * kTile, a + (chunks + c) * kTile, b + c * kTile, b + (chunks + c) * kTile);
  sums_store(out, out + 16, out + 16 * kEdge, out + 16 * kEdge + 16, kEdge * 4);
}

// ---------------------------------------------------------------------------------------------------------- packing

// 32 rows of X, from row t on, as one of its operands; `at` says where a row of the tensor begins, or null.
//   left: X itself, [tile of 16 rows][chunk of 32 columns]; right_transposed: X^T, its words of 32 bits transposed
//   right: X, [chunk of 32 rows][tile of 16 columns], rows in pairs; left_transposed: X^T, its words transposed
template <class At> void pack_left(At at, int64_t width, int64_t D, bf16* left) {
  for (int64_t i = 0; i < kEdge; ++i)
    for (int64_t c = 0; c < D / 32; ++c)
      fetch(at(i), width, 32 * c, left + (i / 16 * (D / 32) + c) * kTile + i % 16 * 32);
}
template <class At> void pack_right_transposed(At at, int64_t width, int64_t D, bf16* to) {
  alignas(64) bf16 rows[kTile];
  for (int64_t i = 0; i < kEdge; i += 16)
    for (int64_t c = 0; c < D / 32; ++c) {
      for (int64_t j = 0; j < 16; ++j) fetch(at(i + j), width, 32 * c, rows + j * 32);
      transpose16(rows, 16, to + (i / 16 * (D / 32) + c) * kTile, 16);
    }
}
template <bool Transposed, class At> void pack_pairs(At at, int64_t width, int64_t D, bf16* to) {
  alignas(64) bf16 low[kTile], high[kTile], row0[32], row1[32];
  for (int64_t c = 0; c < D / 32; ++c) {
    bf16* out = to + 2 * c * kTile;
    for (int64_t i = 0; i < 16; ++i) {
      fetch(at(2 * i), width, 32 * c, row0);
      fetch(at(2 * i + 1), width, 32 * c, row1);
      interleave(row0, row1, (Transposed ? low : out) + i * 32, (Transposed ? high : out + kTile) + i * 32);
    }
    if (Transposed) {
      transpose16(low, 16, out, 16);
      transpose16(high, 16, out + kTile, 16);
    }
  }
}

// Tiles of sums that hold X^T (rows: columns of X, lanes: tokens) to 16 tokens' rows, each times its factor.
inline void write_transposed(const float* tiles, int64_t D, const float* factor, int64_t t0, int64_t t1, int64_t width,
                             Rows<bf16> out, float* scratch) {
  for (int64_t c = 0; c < D / 16; ++c) transpose16(tiles + c * kSums, 16, scratch + c * 16, D);
  for (int64_t t = t0; t < std::min(t0 + 16, t1); ++t)
    write_row(scratch + (t - t0) * D, factor[t - t0], out.at(t), width);
}

struct AmxUnit {
  using Element = bf16;
  static constexpr int kGrain = int(kEdge), kMaxStripes = 8;
  static constexpr int64_t kForwardLanes = kEdge, kForwardKeys = 256, kBackwardLanes = 256, kBackwardKeys = 128;
  static int64_t padded_width(int64_t K) { return round_up(K, 32); }
  using Scope = TileScope;
  using In = Rows<const bf16>;

  struct Forward {
    static constexpr int64_t KB = kForwardKeys;
    const int64_t width, D, base;
    bf16 *k, *v, *q, *p;
    float *scores, *sums, *scratch;
    alignas(64) float highest[kEdge], total[kEdge];
    Draws<kEdge> draws;

    static int64_t bytes(int64_t D, int64_t n) {
      return 2 * Arena::bytes<bf16>(n * D) + Arena::bytes<bf16>(kEdge * D) + Arena::bytes<bf16>(KB * kEdge) +
             Arena::bytes<float>(KB * kEdge) + Arena::bytes<float>(kEdge * D) + Arena::bytes<float>(16 * D);
    }
    Forward(Arena& arena, int64_t width, int64_t D, int64_t base, int64_t n) : width(width), D(D), base(base) {
      k = arena.take<bf16>(n * D);
      v = arena.take<bf16>(n * D);
      q = arena.take<bf16>(kEdge * D);
      p = arena.take<bf16>(KB * kEdge);
      scores = arena.take<float>(KB * kEdge);
      sums = arena.take<float>(kEdge * D);
      scratch = arena.take<float>(16 * D);
    }
    void keys(const Ranges& r, In from_k, In from_v, int64_t end) {
      for (int64_t t = base; t < end; t += kEdge) {
        pack_left([&](int64_t i) { return from_k.at(t + i, r); }, width, D, k + (t - base) * D);
        pack_pairs<true>([&](int64_t i) { return from_v.at(t + i, r); }, width, D, v + (t - base) * D);
      }
    }
    void queries(const Ranges& r, In from, int64_t q0, int64_t) {
      pack_right_transposed([&](int64_t i) { return from.at(q0 + i, r); }, width, D, q);
      std::memset(sums, 0, size_t(kEdge * D) * sizeof(float));
      for (int64_t t = 0; t < kEdge; ++t) highest[t] = -1e30f, total[t] = 0.f;
    }
    void block(const Ranges& r, const Stripe* stripe, int n, int64_t k0, int64_t q0, int64_t, float scale2) {
      const Floats low = spread(-std::numeric_limits<float>::infinity());
      Floats top[kLanes], shrink[kLanes], now[kLanes], sum[kLanes];
      for (int v = 0; v < kLanes; ++v) top[v] = low, sum[v] = Floats{};
      for (const Stripe* s = stripe; s < stripe + n; ++s) {
        for (int64_t row = s->row0; row < s->row1; row += kEdge)
          score_block(k + (k0 - base + row) * D, q, D / 32, scores + row * kEdge);
        fence();
        mask(r, *s, k0, q0, scores, kEdge);
        for (int64_t row = s->row0; row < s->row1; ++row)
          for (int v = 0; v < kLanes; ++v) {
            const Floats x = load(scores + row * kEdge + v * kVector);
            top[v] = top[v] > x ? top[v] : x;
          }
      }
      bool same = true;
      for (int v = 0; v < kLanes; ++v) {
        const Floats before = load(highest + v * kVector), found = top[v] * scale2;
        now[v] = before > found ? before : found;
        shrink[v] = exp2(before - now[v]);
        store(highest + v * kVector, now[v]);
        for (int i = 0; i < kVector; ++i) same &= shrink[v][i] == 1.f;
      }
      for (const Stripe* s = stripe; s < stripe + n; ++s)
        for (int64_t row = s->row0; row < s->row1; row += 2) {
          alignas(64) bf16 rounded[2][32];
          Floats x[2][kLanes];
          for (int v = 0; v < kLanes; ++v) {
            for (int i = 0; i < 2; ++i) {
              x[i][v] = exp2(load(scores + (row + i) * kEdge + v * kVector) * scale2 - now[v]);
              sum[v] += x[i][v];
            }
            if (draws.least) draws.drop(v * kVector, k0 + row, x[0][v], x[1][v]);
          }
          for (int i = 0; i < 2; ++i) round_row(x[i], rounded[i]);
          bf16* to = p + row / 32 * 2 * kTile + row % 32 * 16;
          interleave(rounded[0], rounded[1], to, to + kTile);
        }
      for (int v = 0; v < kLanes; ++v) {
        store(total + v * kVector, load(total + v * kVector) * shrink[v] + sum[v]);
        if (same) continue;
        float* half = sums + v * kVector / 16 * 16 * D + v * kVector % 16;  // two halves of 16 lanes
        for (int64_t d = 0; d < D; ++d) store(half + d * 16, load(half + d * 16) * shrink[v]);
      }
      fence();
      for (int64_t d = 0; d < D / 16; d += 2) {  // O^T += V^T P^T
        float *c0 = sums + d * kSums, *c1 = sums + (D / 16 + d) * kSums;
        sums_load(c0, c1, c0 + kSums, c1 + kSums);
        for (const Stripe* s = stripe; s < stripe + n; ++s)
          for (int64_t row = s->row0; row < s->row1; row += kEdge) {
            const bf16 *a = v + (k0 - base + row) * D + d * kTile, *b = p + row / 32 * 2 * kTile;
            sums_add(a, a + kTile, b, b + kTile);
          }
        sums_store(c0, c1, c0 + kSums, c1 + kSums);
      }
      fence();
    }
    void write(const Ranges& r, int64_t q0, Rows<bf16> out, float* lse) {
      float factor[kEdge] = {};
      for (int64_t t = 0; t < std::min(kEdge, r.T - q0); ++t) {
        const bool empty = total[t] == 0.f;
        factor[t] = empty ? 0.f : draws.factor / total[t];
        lse[q0 + t] = empty ? std::numeric_limits<float>::infinity() : highest[t] + std::log2(total[t]);
      }
      for (int64_t t = 0; t < kEdge; t += 16)
        write_transposed(sums + t * D, D, factor + t, q0 + t, r.T, width, out, scratch);
    }
  };

  struct Backward {
    static constexpr int64_t KB = kBackwardKeys, L = kBackwardLanes;
    const int64_t width, D, base;
    bf16 *k, *kt, *v, *qt, *q, *gradt, *grad, *p, *ds, *ds_right;
    float *dk, *dv, *st, *dp, *lse, *delta, *scratch;
    Draws<L> draws;

    static int64_t bytes(int64_t D, int64_t n) {
      return 3 * Arena::bytes<bf16>(n * D) + 4 * Arena::bytes<bf16>(L * D) + 3 * Arena::bytes<bf16>(KB * L) +
             2 * Arena::bytes<float>(n * D) + 2 * Arena::bytes<float>(kEdge * kEdge) + 2 * Arena::bytes<float>(L) +
             Arena::bytes<float>(16 * D);
    }
    Backward(Arena& arena, int64_t width, int64_t D, int64_t base, int64_t n) : width(width), D(D), base(base) {
      k = arena.take<bf16>(n * D);
      kt = arena.take<bf16>(n * D);
      v = arena.take<bf16>(n * D);
      qt = arena.take<bf16>(L * D);
      q = arena.take<bf16>(L * D);
      gradt = arena.take<bf16>(L * D);
      grad = arena.take<bf16>(L * D);
      p = arena.take<bf16>(KB * L);         // left:  [key tile][query chunk]
      ds = arena.take<bf16>(KB * L);        // left
      ds_right = arena.take<bf16>(KB * L);  // right: [key chunk][query tile]
      dk = arena.take<float>(n * D);        // [key tile][tile of columns]
      dv = arena.take<float>(n * D);
      st = arena.take<float>(kEdge * kEdge);
      dp = arena.take<float>(kEdge * kEdge);
      lse = arena.take<float>(L);
      delta = arena.take<float>(L);
      scratch = arena.take<float>(16 * D);
    }
    void keys(const Ranges& r, In from_k, In from_v, int64_t end) {
      for (int64_t t = base; t < end; t += kEdge) {
        const int64_t at = (t - base) * D;
        pack_left([&](int64_t i) { return from_k.at(t + i, r); }, width, D, k + at);
        pack_pairs<true>([&](int64_t i) { return from_k.at(t + i, r); }, width, D, kt + at);
        pack_left([&](int64_t i) { return from_v.at(t + i, r); }, width, D, v + at);
      }
      std::memset(dk, 0, size_t((end - base) * D) * sizeof(float));
      std::memset(dv, 0, size_t((end - base) * D) * sizeof(float));
    }
    void queries(const Ranges& r, In from, In from_grad, In from_out, const float* given_lse, int64_t q0,
                 int64_t lanes) {
      for (int64_t i = 0; i < lanes; i += kEdge) {
        const auto row = [&](int64_t j) { return from.at(q0 + i + j, r); };
        const auto row_grad = [&](int64_t j) { return from_grad.at(q0 + i + j, r); };
        pack_right_transposed(row, width, D, qt + i * D);
        pack_pairs<false>(row, width, D, q + i * D);
        pack_right_transposed(row_grad, width, D, gradt + i * D);
        pack_pairs<false>(row_grad, width, D, grad + i * D);
        for (int64_t t = q0 + i; t < q0 + i + kEdge; ++t) {
          const bf16 *g = from_grad.at(t, r), *o = from_out.at(t, r);
          delta[t - q0] = g == nullptr ? 0.f : dot(g, o, width);
          lse[t - q0] = t < r.T ? given_lse[t] : std::numeric_limits<float>::infinity();
        }
      }
    }
    void block(const Ranges& r, const Stripe* stripe, int n, int64_t k0, int64_t q0, float scale2) {
      for (const Stripe* s = stripe; s < stripe + n; ++s)
        for (int64_t i = s->lane0; i < s->lane1; i += kEdge)
          for (int64_t j = s->row0; j < s->row1; j += kEdge) probabilities(r, k0, q0, j, i, scale2);
      fence();
      for (const Stripe* s = stripe; s < stripe + n; ++s)
        for (int64_t j = s->row0; j < s->row1; j += kEdge) {
          accumulate(p, grad, dv + (k0 - base + j) * D, j, *s);  // dV += P^T dO
          accumulate(ds, q, dk + (k0 - base + j) * D, j, *s);    // dK += dS^T Q
        }
      fence();
    }
    void probabilities(const Ranges& r, int64_t k0, int64_t q0, int64_t j, int64_t i, float scale2) {
      score_block(k + (k0 - base + j) * D, qt + i * D, D / 32, st);
      score_block(v + (k0 - base + j) * D, gradt + i * D, D / 32, dp);
      fence();
      mask(r, Stripe{0, int32_t(kEdge), 0, int32_t(kEdge)}, k0 + j, q0 + i, st, kEdge);
      bf16* left = p + (j / 16 * (L / 32) + i / 32) * kTile;
      bf16* left_ds = ds + (j / 16 * (L / 32) + i / 32) * kTile;
      bf16* right_ds = ds_right + (j / 32 * (L / 16) + i / 16) * kTile;
      for (int64_t row = 0; row < kEdge; row += 2) {
        const int64_t at = row / 16 * (L / 32) * kTile + row % 16 * 32;
        Floats kept[2][kLanes], x[kLanes], y[kLanes];
        for (int v = 0; v < kLanes; ++v) {
          kept[0][v] = kept[1][v] = spread(draws.factor);
          if (draws.least) draws.drop(i + v * kVector, k0 + j + row, kept[0][v], kept[1][v]);
        }
        for (int64_t e = 0; e < 2; ++e) {
          for (int v = 0; v < kLanes; ++v) {
            const int64_t from = (row + e) * kEdge + v * kVector;
            const Floats p = exp2(load(st + from) * scale2 - load(lse + i + v * kVector));
            x[v] = p * kept[e][v];
            y[v] = p * (load(dp + from) * kept[e][v] - load(delta + i + v * kVector));
          }
          round_row(x, left + at + e * 32);
          round_row(y, left_ds + at + e * 32);
        }
        interleave(left_ds + at, left_ds + at + 32, right_ds + row * 16, right_ds + kTile + row * 16);
      }
      fence();
    }
    // Two tiles of keys, all columns: sums += left (keys x queries) right (queries x columns)
    void accumulate(const bf16* left, const bf16* right, float* to, int64_t j, const Stripe& s) {
      for (int64_t d = 0; d < D / 16; d += 2) {
        float *c0 = to + d * kSums, *c1 = to + (D / 16 + d) * kSums;
        sums_load(c0, c0 + kSums, c1, c1 + kSums);
        for (int64_t i = s.lane0 / 32; i < s.lane1 / 32; ++i) {
          const bf16 *a = left + (j / 16 * (L / 32) + i) * kTile, *b = right + (i * (D / 16) + d) * kTile;
          sums_add(a, a + (L / 32) * kTile, b, b + kTile);
        }
        sums_store(c0, c0 + kSums, c1, c1 + kSums);
      }
    }
    // sums: dQ^T, [query tile][tile of columns]
    void query_gradient(const Stripe* stripe, int n, int64_t k0, float* sums) {
      for (int64_t i = 0; i < L; i += kEdge) {
        const auto inside = [&](const Stripe& s) { return s.lane0 <= i && i < s.lane1; };
        if (std::none_of(stripe, stripe + n, inside)) continue;
        for (int64_t d = 0; d < D / 16; d += 2) {
          float *c0 = sums + (i / 16 * (D / 16) + d) * kSums, *c1 = c0 + D / 16 * kSums;
          sums_load(c0, c1, c0 + kSums, c1 + kSums);
          for (const Stripe* s = stripe; s < stripe + n; ++s)
            if (inside(*s))
              for (int64_t j = s->row0; j < s->row1; j += kEdge) {
                const bf16* a = kt + (k0 - base + j) * D + d * kTile;
                const bf16* b = ds_right + (j / 32 * (L / 16) + i / 16) * kTile;
                sums_add(a, a + kTile, b, b + kTile);
              }
          sums_store(c0, c1, c0 + kSums, c1 + kSums);
        }
      }
      fence();
    }
    void write_queries(const Ranges& r, const float* sums, int64_t q0, float scale, Rows<bf16> out) {
      float factor[16];
      std::fill_n(factor, 16, scale);
      for (int64_t t = 0; t < std::min(L, r.T - q0); t += 16)
        write_transposed(sums + t * D, D, factor, q0 + t, r.T, width, out, scratch);
    }
    void write_keys(const Ranges& r, int64_t end, float scale, Rows<bf16> out_k, Rows<bf16> out_v) {
      for (int64_t t = base; t < std::min(end, r.T); ++t) {
        write_tile_row(dk, t - base, scale, out_k.at(t));
        write_tile_row(dv, t - base, 1.f, out_v.at(t));
      }
    }
    void write_tile_row(const float* tiles, int64_t t, float scale, bf16* to) {
      for (int64_t c = 0; c < D / 16; ++c)
        std::memcpy(scratch + c * 16, tiles + (t / 16 * (D / 16) + c) * kSums + t % 16 * 16, 64);
      write_row(scratch, scale, to, width);
    }
  };
};

}  // namespace octavo
