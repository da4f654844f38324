// Rows of 32 numbers in bf16: one register of 64 bytes where there are such.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "vectors.h"

namespace octavo {

// Columns column .. column + 32 of a row; zeros where it ends and where there is none.
inline void fetch(const bf16* row, int64_t width, int64_t column, bf16* to) {
  const int64_t n = row == nullptr ? 0 : std::max<int64_t>(0, std::min<int64_t>(width - column, 32));
#if defined(__AVX512BW__)
  _mm512_storeu_si512(to, n ? _mm512_maskz_loadu_epi16(__mmask32(0xffffffffull >> (32 - n)), row + column)
                            : _mm512_setzero_si512());
#else
  std::memset(to, 0, 64);
  if (n) std::memcpy(to, row + column, size_t(n) * 2);
#endif
}

// 32 numbers to bf16
inline void round_row(const Floats* x, bf16* to) {
#if defined(__AVX512BF16__)
  _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh((__m512)x[1], (__m512)x[0]));
#else
  for (int i = 0; i < 32; ++i) to[i] = from_float<bf16>(x[i / kVector][i % kVector]);
#endif
}

// Two rows become pairs, the form of right operands: columns 0 .. 15 to low, 16 .. 31 to high.
inline void interleave(const bf16* row0, const bf16* row1, bf16* low, bf16* high) {
#if defined(__AVX512BW__)
  alignas(64) static constexpr uint16_t from_low[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                        8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i a = _mm512_loadu_si512(row0), b = _mm512_loadu_si512(row1), index = _mm512_load_si512(from_low);
  _mm512_storeu_si512(low, _mm512_permutex2var_epi16(a, index, b));
  _mm512_storeu_si512(high, _mm512_permutex2var_epi16(a, _mm512_add_epi16(index, _mm512_set1_epi16(16)), b));
#else
  for (int i = 0; i < 16; ++i) {
    low[2 * i] = row0[i], low[2 * i + 1] = row1[i];
    high[2 * i] = row0[16 + i], high[2 * i + 1] = row1[16 + i];
  }
#endif
}

inline float dot(const bf16* a, const bf16* b, int64_t n) {
  float total = 0.f;
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
  __m512 sums = _mm512_setzero_ps();
  for (int64_t i = 0; i < n; i += 32) {
    const __mmask32 some = __mmask32(0xffffffffull >> (32 - std::min<int64_t>(32, n - i)));
    sums = _mm512_dpbf16_ps(sums, (__m512bh)_mm512_maskz_loadu_epi16(some, a + i),
                            (__m512bh)_mm512_maskz_loadu_epi16(some, b + i));
  }
  total = _mm512_reduce_add_ps(sums);
#else
  for (int64_t i = 0; i < n; ++i) total += to_float(a[i]) * to_float(b[i]);
#endif
  return total;
}

}  // namespace octavo
