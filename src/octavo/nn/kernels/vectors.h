// Vectors of floats in the widest registers the target has, written with the compiler's vector extension: GCC
// and Clang, any instruction set.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace octavo {

using bf16 = uint16_t;

#if defined(__AVX512F__)
constexpr int kVector = 16;
#elif defined(__AVX__)
constexpr int kVector = 8;
#else
constexpr int kVector = 4;
#endif
typedef float Floats __attribute__((vector_size(kVector * 4), may_alias));
typedef int32_t Ints __attribute__((vector_size(kVector * 4), may_alias));

inline Floats load(const float* p) { return *reinterpret_cast<const Floats*>(p); }
inline void store(float* p, Floats x) { *reinterpret_cast<Floats*>(p) = x; }
inline Ints load(const int32_t* p) { return *reinterpret_cast<const Ints*>(p); }
inline Floats spread(float x) { return x - Floats{}; }  // x - 0 is x for every x, and folds to a broadcast
inline Ints spread(int32_t x) { return x - Ints{}; }

inline float sum(Floats x) {
  float total = 0.f;
  for (int i = 0; i < kVector; ++i) total += x[i];
  return total;
}

// 2^x for x < 128, at most 1 ulp from the true value; exactly 0 below 2^-126. NaN stays NaN, -infinity gives 0.
// Cody-Waite: x = n + f with |f| <= 1/2, a minimax polynomial for 2^f, n put into the exponent's bits.
inline Floats exp2(Floats x) {
  const Floats lowest = spread(-127.f), magic = spread(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
  x = lowest > x ? lowest : x;
  const Floats shifted = x + magic, f = x - (shifted - magic);
  Floats p = spread(0x1.41fbbcp-13f);
  p = p * f + spread(0x1.5f3e54p-10f);
  p = p * f + spread(0x1.3b2d4cp-7f);
  p = p * f + spread(0x1.c6aee8p-5f);
  p = p * f + spread(0x1.ebfbdcp-3f);
  p = p * f + spread(0x1.62e430p-1f);
  p = p * f + spread(1.f);
  Ints n;
  std::memcpy(&n, &shifted, sizeof n);
  n = (n - (0x4b400000 - 127)) << 23;
  Floats power;
  std::memcpy(&power, &n, sizeof power);
  return p * power;
}

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
  const uint32_t bits = uint32_t(x) << 16;
  float y;
  std::memcpy(&y, &bits, sizeof y);
  return y;
}

template <class X> X from_float(float x);
template <> inline float from_float<float>(float x) { return x; }
template <> inline bf16 from_float<bf16>(float x) {  // to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return bf16(x == x ? rounded : 0x7fc0);
}

// 16 x 16 words of 32 bits: out[j][i] = in[i][j]; strides in words.
#if defined(__AVX512F__)
inline void transpose16(__m512i* r) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}
inline void transpose16(const void* in, int64_t in_stride, void* out, int64_t out_stride) {
  __m512i r[16];
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(static_cast<const int32_t*>(in) + i * in_stride);
  transpose16(r);
  for (int i = 0; i < 16; ++i) _mm512_storeu_si512(static_cast<int32_t*>(out) + i * out_stride, r[i]);
}
#else
inline void transpose16(const void* in, int64_t in_stride, void* out, int64_t out_stride) {
  const char* from = static_cast<const char*>(in);
  char* to = static_cast<char*>(out);
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) std::memcpy(to + (j * out_stride + i) * 4, from + (i * in_stride + j) * 4, 4);
}
#endif

}  // namespace octavo
