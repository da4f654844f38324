// Products of packed weights with a few rows of activations. The weights of 16 outputs stand side by side in lines of
// 64 bytes, one number of 32 bits each: a lane of an accumulator is an output, so nothing is summed across lanes, and
// a line is what a dot-product instruction takes (and a row of an AMX tile). A unit is `width` such blocks, line by
// line in turn: one sequential stream with several accumulators in flight.
//
//     fp32        16 outputs x 1 input       int8  16 x 4, codes with zero point 128
//     bf16, fp16  16 outputs x 2 inputs      int4  16 x 8, zero point 8; low halves are the first four inputs
//
// The order of a row's sums never depends on how many rows there are.
//
// Where the processor multiplies fp16 numbers, bf16 weights are packed as such, each output's times a power of two that
// makes its largest 1 to 2: what is left of 8 bits then fits into 11 exactly, but for weights 2^14 times smaller. Rows
// are rounded to 11 bits, again with a power of two for each, and sums are fp16 for 32 products and fp32 from there on.
// That is an error of about one in 2^11, a quarter of what rounding a row to bf16 makes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#include "vectors.h"

namespace octavo {

constexpr int kLanes = 16;
typedef float Lanes __attribute__((vector_size(64), may_alias));
typedef float LooseLanes __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(64), may_alias));
typedef int32_t Wholes __attribute__((vector_size(64), may_alias));
typedef int32_t Four __attribute__((aligned(1), may_alias));  // four numbers of 8 bits
typedef int8_t Bytes __attribute__((vector_size(16), aligned(1), may_alias));
typedef uint16_t Halves __attribute__((vector_size(32), aligned(2), may_alias));

inline Lanes get(const float* p) { return *reinterpret_cast<const LooseLanes*>(p); }
inline void put(float* p, Lanes x) { *reinterpret_cast<LooseLanes*>(p) = x; }
inline Lanes lanes(float x) { return x - Lanes{}; }
template <class To, class From> inline To as(From x) {
  To y;
  static_assert(sizeof x == sizeof y, "");
  std::memcpy(&y, &x, sizeof y);
  return y;
}
// Memory is asked for what will be read, into the second cache: a unit does not fit into the first beside all else.
inline void ask_for(const uint8_t* p) { __builtin_prefetch(p, 0, 2); }

// f(0), ..., f(N - 1), written out before anything else is done with the code: what an array holds then stays in
// registers, which the compiler does not see to where it unrolls loops by itself.
template <class F, int... I> inline __attribute__((always_inline)) void each_of(F& f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>{}), ...);
}
template <int N, class F> inline __attribute__((always_inline)) void each(F&& f) {
  each_of(f, std::make_integer_sequence<int, N>{});
}
inline Lanes get(const bf16* p) {
  return as<Lanes>(__builtin_convertvector(*reinterpret_cast<const Halves*>(p), Words) << 16);
}

// Numbers of 16 bits, none of them infinite or not a number. (The scales of small weights are below the smallest normal
// one; in float arithmetic each such number would cost more than the sums it is for.)
#if defined(__AVX512F__) && !defined(OCTAVO_EMULATED_TILES)
inline Lanes from_fp16(const uint16_t* p) {
  return Lanes(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
}
#else
inline Lanes from_fp16(const uint16_t* p) {
  const Words h = __builtin_convertvector(*reinterpret_cast<const Halves*>(p), Words);
  const Lanes size = as<Lanes>((h & 0x7fffu) << 13) * lanes(0x1p112f);  // the exponent's offset, for small ones too
  return as<Lanes>(as<Words>(size) | ((h & 0x8000u) << 16));
}
#endif

#if defined(__AVX512F__)
inline void to_fp16(Lanes x, uint16_t* to) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(__m512(x), _MM_FROUND_TO_NEAREST_INT));
}
#else
inline void to_fp16(Lanes, uint16_t*) {}  // nothing is packed as fp16
#endif

enum Format : int64_t { kFloat, kBf16, kByte, kNibble, kFp16 };

struct Matrix {
  int64_t format, units, width, depth, group;  // depth: inputs, padded with zeros; group: inputs of one scale
  const uint8_t* weight;  // of each unit the lines and, for codes, its scales: fp16, (depth / group, width, 16)
  const float* bias;      // (units, width, 16) or null
  const float* powers;    // of fp16: what each output's weights were divided by, (units, width, 16)

  int64_t outputs() const { return width * kLanes; }  // of a unit
  int64_t line() const { return 64 * width; }
  int64_t per_line() const { return format == kFloat ? 1 : format == kByte ? 4 : format == kNibble ? 8 : 2; }
  int64_t line_bytes() const { return depth / per_line() * line(); }
  int64_t unit_bytes() const {
    const int64_t scales = format == kByte || format == kNibble ? depth / group * outputs() * 2 : 0;
    return line_bytes() + (scales + 63) / 64 * 64;
  }
};

// Rows of activations as a product wants them: floats; fp16, with what each row was divided by in `unit`; or 15-bit whole
// numbers in two planes of 8, x = (128 high + low) * unit with one unit for each group of weights. The second plane costs
// one more dot product on a line that is there already, and takes the error of the activations away. zero is what the
// weights' zero point adds to the sums.
struct Rows {
  const float* x = nullptr;
  int64_t stride = 0;
  std::vector<uint16_t> halves;  // (rows, depth)
  std::vector<int8_t> planes;    // (rows, 2, depth)
  std::vector<float> unit;       // (rows, groups)
  std::vector<int32_t> zero;     // (rows, groups)

  // x (n, stride), zeros from the last input to p.depth <= stride.
  void prepare(const Matrix& p, const float* from, int64_t from_stride, int64_t n) {
    x = from, stride = from_stride;
    if (p.format == kFloat || p.format == kBf16) return;
    const auto fit = [](auto& v, int64_t size) {
      if (int64_t(v.size()) < size) v.resize(size_t(size));
    };
    if (p.format == kFp16) {
      fit(halves, n * p.depth), fit(unit, n);
      for (int64_t m = 0; m < n; ++m) halve(x + m * stride, p.depth, &halves[size_t(m * p.depth)], unit[size_t(m)]);
      return;
    }
    const int64_t groups = p.depth / p.group;
    fit(planes, 2 * n * p.depth), fit(unit, n * groups), fit(zero, n * groups);
    for (int64_t m = 0; m < n; ++m)
      for (int64_t i = 0; i < groups; ++i)
        round(x + m * stride + i * p.group, p.group, p.depth, p.format == kByte ? 128 : 8,
              &planes[size_t(2 * m * p.depth + i * p.group)], unit[size_t(m * groups + i)],
              zero[size_t(m * groups + i)]);
  }

  static float largest(const float* x, int64_t n) {
    Lanes found = {};
    for (int64_t k = 0; k < n; k += kLanes) {
      const Lanes v = get(x + k), size = v > -v ? v : -v;
      found = size > found ? size : found;
    }
    float top = 0;
    for (int i = 0; i < kLanes; ++i) top = std::max(top, found[i]);
    return top;
  }

  // The largest becomes 64 to 128: sums of 32 products with weights below 2 stay far below 65504.
  static void halve(const float* x, int64_t n, uint16_t* to, float& unit) {
    const int32_t exponent = std::max(as<int32_t>(largest(x, n)) >> 23, 27);  // of nothing, too, there is one
    unit = as<float>((exponent - 6) << 23);
    const Lanes inverse = lanes(as<float>((260 - exponent) << 23));
    for (int64_t k = 0; k < n; k += kLanes) to_fp16(get(x + k) * inverse, to + k);
  }

  static void round(const float* x, int64_t n, int64_t depth, int32_t zero_point, int8_t* plane, float& unit,
                    int32_t& zero) {
    constexpr float kTop = 127 * 128;
    const float top = largest(x, n);
    const float inverse = top > 0 ? kTop / top : 0.f;
    constexpr float kMagic = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
    Wholes sums = {};
    for (int64_t k = 0; k < n; k += kLanes) {
      const Wholes v = as<Wholes>(get(x + k) * lanes(inverse) + lanes(kMagic)) - 0x4b400000;
      const Wholes high = (v + 64) >> 7;
      sums += v;
      *reinterpret_cast<Bytes*>(plane + k) = __builtin_convertvector(high, Bytes);
      *reinterpret_cast<Bytes*>(plane + depth + k) = __builtin_convertvector(v - (high << 7), Bytes);
    }
    int32_t sum = 0;
    for (int i = 0; i < kLanes; ++i) sum += sums[i];
    unit = top / kTop;
    zero = -zero_point * sum;
  }
};

// What memory is asked for while a unit is read: the place, and how far it moves with every line (or two, of floats).
struct Ahead {
  const uint8_t* at;
  int64_t step;
};

// M rows by B of a unit's blocks. Accumulators are emptied into the result after every kPanel inputs.
template <int M, int B, bool kNarrow>
void multiply_floats(const uint8_t* w, int64_t line, const float* x, int64_t stride, int64_t depth, float* y,
                     int64_t y_stride, Ahead ahead) {
  constexpr int64_t kPanel = 512;
  for (int64_t start = 0; start < depth; start += kPanel) {
    Lanes total[M][B] = {};
    const int64_t end = std::min(depth, start + kPanel);
    for (int64_t k = start; k < end; k += 2, ahead.at += ahead.step) {
      Lanes even[B], odd[B];
      each<B>([&](auto b) {
        ask_for(ahead.at + 64 * b);
        const Words bits = *reinterpret_cast<const Words*>(w + 64 * b);
        if (kNarrow) {
          even[b] = as<Lanes>(bits << 16), odd[b] = as<Lanes>(bits & 0xffff0000u);
        } else {
          ask_for(ahead.at + line + 64 * b);
          even[b] = as<Lanes>(bits), odd[b] = *reinterpret_cast<const Lanes*>(w + line + 64 * b);
        }
      });
      w += kNarrow ? line : 2 * line;
      each<M>([&](auto m) {
        const Lanes first = lanes(x[m * stride + k]), second = lanes(x[m * stride + k + 1]);
        each<B>([&](auto b) { total[m][b] += even[b] * first; });
        each<B>([&](auto b) { total[m][b] += odd[b] * second; });
      });
    }
    each<M>([&](auto m) {
      each<B>([&](auto b) {
        float* to = y + m * y_stride + b * kLanes;
        put(to, start ? get(to) + total[m][b] : total[m][b]);
      });
    });
  }
}

#if defined(__AVX512F__) && defined(__AVX512VNNI__) && !defined(OCTAVO_EMULATED_TILES)
inline Wholes dot(Wholes sum, Words codes, int32_t four) {
  return Wholes(_mm512_dpbusd_epi32(__m512i(sum), __m512i(codes), _mm512_set1_epi32(four)));
}
#else
inline Wholes dot(Wholes sum, Words codes, int32_t four) {
  for (int j = 0; j < 4; ++j) sum += as<Wholes>((codes >> (8 * j)) & 255u) * int32_t(int8_t(four >> (8 * j)));
  return sum;
}
#endif

template <int M, int B, bool kFour>
void multiply_codes(const uint8_t* w, int64_t line, const uint16_t* scales, int64_t width, const Rows& rows,
                    int64_t first, int64_t depth, int64_t group, float* y, int64_t y_stride, Ahead ahead) {
  constexpr int64_t kInputs = kFour ? 8 : 4;
  const int64_t groups = depth / group;
  const int8_t* planes = &rows.planes[size_t(2 * first * depth)];
  Lanes total[M][B] = {};
  for (int64_t i = 0; i < groups; ++i) {
    Wholes sum[M][2][B] = {};
    for (int64_t k = i * group; k < (i + 1) * group; k += kInputs, w += line, ahead.at += ahead.step) {
      Words low[B], high[B];
      each<B>([&](auto b) {
        ask_for(ahead.at + 64 * b);
        low[b] = *reinterpret_cast<const Words*>(w + 64 * b);
        if (kFour) high[b] = (low[b] >> 4) & 0x0f0f0f0fu, low[b] &= 0x0f0f0f0fu;
      });
      each<2 * M>([&](auto row) {
        const int8_t* x = planes + row * depth + k;
        Wholes* to = sum[row / 2][row % 2];
        each<B>([&](auto b) { to[b] = dot(to[b], low[b], *reinterpret_cast<const Four*>(x)); });
        if (kFour) each<B>([&](auto b) { to[b] = dot(to[b], high[b], *reinterpret_cast<const Four*>(x + 4)); });
      });
    }
    each<B>([&](auto b) {
      const Lanes scale = from_fp16(scales + (i * width + b) * kLanes);
      each<M>([&](auto m) {
        const int64_t at = (first + m) * groups + i;
        const Wholes whole = (sum[m][0][b] << 7) + sum[m][1][b] + rows.zero[size_t(at)];
        total[m][b] += __builtin_convertvector(whole, Lanes) * (scale * lanes(rows.unit[size_t(at)]));
      });
    });
  }
  each<M>([&](auto m) { each<B>([&](auto b) { put(y + m * y_stride + b * kLanes, total[m][b]); }); });
}

#if defined(__AVX512FP16__) && !defined(OCTAVO_EMULATED_TILES)
constexpr bool kMultipliesFp16 = true;

// Sums of pairs stay apart until the end: of a block, first those of 8 outputs and then those of the others.
template <int M, int B>
void multiply_fp16(const uint8_t* w, int64_t line, const Rows& rows, int64_t first, const float* powers, int64_t depth,
                   float* y, int64_t y_stride, Ahead ahead) {
  constexpr int64_t kChain = 64;  // inputs, of which 32 go to a lane
  const uint16_t* x = &rows.halves[size_t(first * depth)];
  alignas(64) float sums[M][B][2][kLanes];
  for (int64_t start = 0; start < depth; start += kChain) {
    __m512h total[M][B] = {};
    for (int64_t k = start; k < start + kChain; k += 2, w += line, ahead.at += ahead.step) {
      __m512h weight[B];
      each<B>([&](auto b) {
        ask_for(ahead.at + 64 * b);
        weight[b] = _mm512_castsi512_ph(_mm512_load_si512(w + 64 * b));
      });
      each<M>([&](auto m) {
        const __m512h pair = _mm512_castsi512_ph(_mm512_set1_epi32(*reinterpret_cast<const Four*>(x + m * depth + k)));
        each<B>([&](auto b) { total[m][b] = _mm512_fmadd_ph(weight[b], pair, total[m][b]); });
      });
    }
    each<M>([&](auto m) {
      each<B>([&](auto b) {
        const __m512i bits = _mm512_castph_si512(total[m][b]);
        const Lanes low = Lanes(_mm512_cvtph_ps(_mm512_castsi512_si256(bits)));
        const Lanes high = Lanes(_mm512_cvtph_ps(_mm512_extracti64x4_epi64(bits, 1)));
        float(&to)[2][kLanes] = sums[m][b];
        put(to[0], start ? get(to[0]) + low : low), put(to[1], start ? get(to[1]) + high : high);
      });
    });
  }
  const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512i odd = even | _mm512_set1_epi32(1);
  each<M>([&](auto m) {
    const Lanes unit = lanes(rows.unit[size_t(first + m)]);
    each<B>([&](auto b) {
      const __m512 low = _mm512_load_ps(sums[m][b][0]), high = _mm512_load_ps(sums[m][b][1]);
      const __m512 sum = _mm512_permutex2var_ps(low, even, high) + _mm512_permutex2var_ps(low, odd, high);
      put(y + m * y_stride + b * kLanes, Lanes(sum) * (get(powers + b * kLanes) * unit));
    });
  });
}
#else
constexpr bool kMultipliesFp16 = false;
template <int M, int B>
void multiply_fp16(const uint8_t*, int64_t, const Rows&, int64_t, const float*, int64_t, float*, int64_t, Ahead) {}
#endif

// As many rows at a time as there are registers for: codes need two sums for each.
constexpr int kMostRows = 12, kMostRowsOfCodes = 4;

template <int M, int B>
void multiply_blocks(const Matrix& p, int64_t u, int64_t block, const Rows& rows, int64_t first, float* y,
                     int64_t y_stride, Ahead ahead) {
  const uint8_t* w = p.weight + u * p.unit_bytes() + 64 * block;
  const float* x = rows.x + first * rows.stride;
  const int64_t at = (u * p.width + block) * kLanes;
  y += block * kLanes;
  switch (p.format) {
    case kFloat: return multiply_floats<M, B, false>(w, p.line(), x, rows.stride, p.depth, y, y_stride, ahead);
    case kBf16: return multiply_floats<M, B, true>(w, p.line(), x, rows.stride, p.depth, y, y_stride, ahead);
    case kFp16: return multiply_fp16<M, B>(w, p.line(), rows, first, p.powers + at, p.depth, y, y_stride, ahead);
  }
  if constexpr (M <= kMostRowsOfCodes) {
    const auto* scales = reinterpret_cast<const uint16_t*>(p.weight + u * p.unit_bytes() + p.line_bytes()) + block * kLanes;
    (p.format == kByte ? multiply_codes<M, B, false> : multiply_codes<M, B, true>)(
        w, p.line(), scales, p.width, rows, first, p.depth, p.group, y, y_stride, ahead);
  }
}

template <int M>
void multiply_unit(const Matrix& p, int64_t u, const Rows& rows, int64_t first, float* y, int64_t y_stride,
                   Ahead ahead) {
  int64_t block = 0;
  for (; block + 2 <= p.width; block += 2) multiply_blocks<M, 2>(p, u, block, rows, first, y, y_stride, ahead);
  if (block < p.width) multiply_blocks<M, 1>(p, u, block, rows, first, y, y_stride, ahead);
}

// y (n, y_stride) = rows times the weights of unit u, and the bias. The rows are shared out evenly among as few passes
// over the weights as will do: a pass with one row takes as long as one with four. Meanwhile memory is asked, in equal
// parts in each pass, for as much from `next` on as a unit is.
inline void multiply(const Matrix& p, int64_t u, const Rows& rows, int64_t n, float* y, int64_t y_stride,
                     const uint8_t* next) {
  using Pass = void (*)(const Matrix&, int64_t, const Rows&, int64_t, float*, int64_t, Ahead);
  static constexpr Pass kPasses[kMostRows] = {
      multiply_unit<1>, multiply_unit<2>, multiply_unit<3>, multiply_unit<4>,  multiply_unit<5>,  multiply_unit<6>,
      multiply_unit<7>, multiply_unit<8>, multiply_unit<9>, multiply_unit<10>, multiply_unit<11>, multiply_unit<12>};
  const int64_t most = p.format == kByte || p.format == kNibble ? kMostRowsOfCodes : kMostRows;
  const int64_t all = (n + most - 1) / most, bytes = p.line_bytes() / all, read = p.line() * (p.format == kFloat ? 2 : 1);
  for (int64_t i = p.line_bytes(); i < p.unit_bytes(); i += 64) ask_for(next + i);
  for (int64_t first = 0, pass = 0; first < n; ++pass) {
    const int64_t now = (n - first) / (all - pass);
    kPasses[now - 1](p, u, rows, first, y + first * y_stride, y_stride, {next + pass * bytes, read / all});
    first += now;
  }
  if (p.bias == nullptr) return;
  const float* bias = p.bias + u * p.outputs();
  for (int64_t m = 0; m < n; ++m)
    for (int64_t i = 0; i < p.outputs(); i += kLanes) put(y + m * y_stride + i, get(y + m * y_stride + i) + get(bias + i));
}

}  // namespace octavo
