// Tiles: TILE time steps of W channels, one vector per step, from and to tensors of any strides in three dtypes.
#pragma once
#include <algorithm>
#include "simd.h"

static const int TILE = 16;
enum { FLOAT32, BFLOAT16, FLOAT16 };

// A tensor (batch, groups, channels, steps): where it starts and its strides in elements. For B and C, "channels" are states.
struct View { char* data; int64_t batch, group, channel, step, dtype; };

INLINE int bytes_of(const View& v) { return v.dtype == FLOAT32 ? 4 : 2; }

// ---- W neighbouring elements; `n` of them exist, the rest reads as zero and is not written
typedef uint16_t Halves __attribute__((vector_size(W*2)));
typedef uint32_t VU __attribute__((vector_size(W*4)));

INLINE V widen(Halves h, int64_t dtype) {
  const VU x = __builtin_convertvector(h, VU);
  if (dtype == BFLOAT16) return (V)(x << 16);
  const VU size = x & 0x7fff, value = (VU)((V)(size << 13)*0x1p112f);      // moves the exponent; right below the normal range too
  return (V)((size >= 0x7c00 ? (size << 13) | 0x7f800000 : value) | (x & 0x8000) << 16);
}
INLINE Halves narrow(V v, int64_t dtype) {          // to nearest, ties to even
  const VU x = (VU)v, size = x & 0x7fffffff;
  VU out;
  if (dtype == BFLOAT16) out = (size > 0x7f800000 ? x | 0x400000 : x + 0x7fff + ((x >> 16) & 1)) >> 16;
  else {
    const VU normal = (size + 0xfff + ((size >> 13) & 1) - 0x38000000) >> 13, small = (VU)((V)size + .5f) - 0x3f000000;
    out = size < 0x38800000 ? small : size < 0x47800000 ? normal : size > 0x7f800000 ? (VU{} + 0x7e00) : (VU{} + 0x7c00);
    out |= x >> 16 & 0x8000;
  }
  return __builtin_convertvector(out, Halves);
}
INLINE V read_row(const char* p, int64_t dtype, int n) {
  if (dtype == FLOAT32) {
    if (n == W) return load((const float*)p);
    V v{};
    memcpy(&v, p, 4*n);
    return v;
  }
  Halves h{};
  memcpy(&h, p, n == W ? 2*W : 2*n);
  return widen(h, dtype);
}
INLINE void write_row(char* p, int64_t dtype, int n, V v) {
  if (dtype == FLOAT32) { if (n == W) store((float*)p, v); else memcpy(p, &v, 4*n); return; }
  Halves h = narrow(v, dtype);
  memcpy(p, &h, n == W ? 2*W : 2*n);
}

// ---- where the steps of a tile lie: one after the other, or at the pixels an order visits
struct Steps {
  const int64_t* order;     // null: step t is element t
  int64_t first;
  int count;
};
INLINE int64_t place(const Steps& s, int t) { return s.order ? s.order[s.first + t] : s.first + t; }

// `base`: the first channel's first step. Three layouts: channels side by side (a row per step, nothing to turn),
// steps side by side (W x W squares are turned), anything else (element by element).
// Whole tiles of floats, the usual case, take the short way.

INLINE bool whole_tile(const View& v, const Steps& s, int n_channels) {
  return v.dtype == FLOAT32 && n_channels == W && s.count == TILE;
}
static void read_tile(const View& v, const char* base, const Steps& s, int n_channels, V* out) {
  const int size = bytes_of(v);
  if (v.channel == 1) {
    if (whole_tile(v, s, n_channels)) {
      const float* p = (const float*)base;
      #pragma GCC unroll 16
      for (int t = 0; t < TILE; t++) out[t] = load(p + place(s, t)*v.step);
      return;
    }
    for (int t = 0; t < s.count; t++) out[t] = read_row(base + place(s, t)*v.step*size, v.dtype, n_channels);
    for (int t = s.count; t < TILE; t++) out[t] = V{};
  } else if (v.step == 1 && !s.order) {
    for (int t0 = 0; t0 < TILE; t0 += W) {
      const char* p = base + (s.first + t0)*size;
      if (whole_tile(v, s, n_channels)) {
        #pragma GCC unroll 16
        for (int i = 0; i < W; i++) out[t0 + i] = load((const float*)p + i*v.channel);
      } else {
        const int n = std::max(0, std::min(W, s.count - t0));
        for (int i = 0; i < W; i++) out[t0 + i] = i < n_channels ? read_row(p + i*v.channel*size, v.dtype, n) : V{};
      }
      transpose(out + t0);
    }
  } else
    for (int t = 0; t < TILE; t++) {
      V row{};
      if (t < s.count) for (int i = 0; i < n_channels; i++)
        row[i] = read_row(base + (i*v.channel + place(s, t)*v.step)*size, v.dtype, 1)[0];
      out[t] = row;
    }
}
// `add`: what is there already stays in the sum (directions that share pixels)
static void write_tile(const View& v, char* base, const Steps& s, int n_channels, V* in, bool add) {
  const int size = bytes_of(v);
  if (v.channel == 1) {
    if (whole_tile(v, s, n_channels)) {
      float* p = (float*)base;
      #pragma GCC unroll 16
      for (int t = 0; t < TILE; t++) { float* q = p + place(s, t)*v.step; store(q, add ? in[t] + load(q) : in[t]); }
      return;
    }
    for (int t = 0; t < s.count; t++) {
      char* p = base + place(s, t)*v.step*size;
      write_row(p, v.dtype, n_channels, add ? in[t] + read_row(p, v.dtype, n_channels) : in[t]);
    }
  } else if (v.step == 1 && !s.order) {
    for (int t0 = 0; t0 < s.count; t0 += W) {
      V square[W];
      for (int i = 0; i < W; i++) square[i] = in[t0 + i];
      transpose(square);
      char* p = base + (s.first + t0)*size;
      if (whole_tile(v, s, n_channels) && !add) {
        #pragma GCC unroll 16
        for (int i = 0; i < W; i++) store((float*)p + i*v.channel, square[i]);
        continue;
      }
      const int n = std::min(W, s.count - t0);
      for (int i = 0; i < n_channels; i++) {
        char* q = p + i*v.channel*size;
        write_row(q, v.dtype, n, add ? square[i] + read_row(q, v.dtype, n) : square[i]);
      }
    }
  } else
    for (int t = 0; t < s.count; t++) for (int i = 0; i < n_channels; i++) {
      char* p = base + (i*v.channel + place(s, t)*v.step)*size;
      write_row(p, v.dtype, 1, all(in[t][i] + (add ? read_row(p, v.dtype, 1)[0] : 0.f)));
    }
}

// What will be needed soon is asked for line by line between the steps of the recurrence: memory works while the lanes
// compute. All at once, the requests would queue up and the lanes would wait for them.
struct Fetch {
  struct Stream { const char* base; int64_t row; const int64_t* order; int lines, shift; };
  Stream streams[8];
  int n = 0;

  // `steps` steps of W channels: a line for every step where channels lie side by side, else a few for every channel
  void add(const View& v, const char* base, int64_t first, const int64_t* order, int steps) {
    const int64_t size = bytes_of(v), row = v.step*size;
    if (order) { streams[n++] = {base, row, order + first, steps, 0}; return; }
    if (v.channel == 1) { streams[n++] = {base + first*row, row, nullptr, steps, 0}; return; }
    int shift = 0;      // 1 << shift lines for every channel
    while (64 << shift < steps*size) shift++;
    streams[n++] = {base + first*row, v.channel*size, nullptr, W << shift, shift};
  }
  void add(const float* p, int64_t count) { streams[n++] = {(const char*)p, 64, nullptr, (int)(count/16), 0}; }
  // Step t of one of `turns` passes over the same steps
  INLINE_MEMBER void step(int t, int turn, int turns) const {
    for (int i = turn; i < n; i += turns) {
      const Stream& s = streams[i];
      if (t < s.lines) __builtin_prefetch(s.base + (s.order ? s.order[t] : t >> s.shift)*s.row + (t & ((1 << s.shift) - 1))*64, 0, 2);
    }
  }
};
