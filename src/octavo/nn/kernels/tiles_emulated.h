// A tile unit made of plain loops, for testing tiles_amx.h on machines without one: slow, and exact where Intel
// documents the arithmetic (Software Developer's Manual, volume 2: LDTILECFG, TILELOADD, TILESTORED, TILEZERO,
// TDPBF16PS). Each tile row sums even and odd pairs apart with fused steps, then adds the two, then adds that to the
// destination; round to nearest even; denormals are zeros, read and written.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "vectors.h"

namespace octavo {

struct EmulatedTile {
  int rows, bytes;
  alignas(64) unsigned char data[16][64];
};
inline thread_local EmulatedTile emulated[8];

inline float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.f, x) : x; }

inline void emulate_config(const void* config) {
  const auto* bytes = static_cast<const unsigned char*>(config);
  for (int i = 0; i < 8; ++i) {
    uint16_t width;
    std::memcpy(&width, bytes + 16 + 2 * i, 2);
    emulated[i] = {bytes[48 + i], width, {}};
  }
}
inline void emulate_release() { std::memset(emulated, 0, sizeof emulated); }
inline void emulate_zero(int tile) { std::memset(emulated[tile].data, 0, sizeof emulated[tile].data); }
inline void emulate_load(int tile, const void* from, int64_t stride) {
  emulate_zero(tile);
  EmulatedTile& t = emulated[tile];
  for (int i = 0; i < t.rows; ++i) std::memcpy(t.data[i], static_cast<const char*>(from) + i * stride, size_t(t.bytes));
}
inline void emulate_store(int tile, void* to, int64_t stride) {
  const EmulatedTile& t = emulated[tile];
  for (int i = 0; i < t.rows; ++i) std::memcpy(static_cast<char*>(to) + i * stride, t.data[i], size_t(t.bytes));
}
inline void emulate_dot(int to, int left, int right) {
  EmulatedTile &c = emulated[to], &a = emulated[left], &b = emulated[right];
  const int columns = c.bytes / 4;
  for (int m = 0; m < c.rows; ++m) {
    float even[16] = {}, odd[16] = {}, row[16];
    for (int k = 0; k < a.bytes / 4; ++k) {
      bf16 pair[2], line[32];
      std::memcpy(pair, a.data[m] + 4 * k, sizeof pair);
      std::memcpy(line, b.data[k], sizeof line);
      const float x = flushed(to_float(pair[0])), y = flushed(to_float(pair[1]));
      for (int n = 0; n < columns; ++n) {
        even[n] = flushed(std::fma(x, flushed(to_float(line[2 * n])), even[n]));
        odd[n] = flushed(std::fma(y, flushed(to_float(line[2 * n + 1])), odd[n]));
      }
    }
    std::memcpy(row, c.data[m], sizeof row);
    for (int n = 0; n < columns; ++n) row[n] = flushed(flushed(row[n]) + flushed(even[n] + odd[n]));
    std::memcpy(c.data[m], row, size_t(c.bytes));
  }
}

}  // namespace octavo

#define TILE_CONFIG(p) ::octavo::emulate_config(p)
#define TILE_RELEASE() ::octavo::emulate_release()
#define TILE_ZERO(t) ::octavo::emulate_zero(t)
#define TILE_LOAD(t, p, stride) ::octavo::emulate_load(t, p, stride)
#define TILE_STORE(t, p, stride) ::octavo::emulate_store(t, p, stride)
#define TILE_DOT(c, a, b) ::octavo::emulate_dot(c, a, b)
