// What one call of the scan is given, how its work is cut, and what forward and backward share.
//   h[t] = exp(dt[t] A) h[t-1] + dt[t] u[t] B[t],   y[t] = (C[t] h[t] + D u[t]) silu(z[t]),   dt = softplus(delta + bias)
// Lanes are channels: W neighbouring channels of one group go through time side by side, their states held in registers.
#pragma once
#include <cstdlib>
#include <type_traits>
#include <omp.h>
#include "tile.h"

static const int CHUNK = 32;        // steps between the states that forward keeps for backward; a multiple of TILE
static const int SPAN = 4*CHUNK;    // steps that a block reads and writes at a time: rows lie in pages of their own, and a visit costs

struct Scan {
  int64_t batch, groups, channels, states, length;      // channels of one group
  int64_t softplus, threads;
  int64_t merge;            // 1: the groups share u, and add up in y and in the gradient of u
  int64_t rank;             // of delta's factors, 0 where delta is given as it is
  View u, delta, z, B, C, y;                            // data is null where absent
  const float *A, *D, *bias, *initial;                  // (g c n), (g c), (g c), (b g c n)
  const float* delta_weight;                            // (g c rank): delta is made from `rank` factors, floats side by side
  const float *fixed_B, *fixed_C;                       // (g c n): weights that stay the same over time, in place of B or C
  const int64_t *order, *lengths;                       // (g length) places in the order visited, (g) how many; or null
  float *last, *borders;                                // (b g c n); (b g block chunk n W), null where no backward will follow
  View grad_y, grad_u, grad_delta, grad_z, grad_B, grad_C;
  const float* grad_last;                               // (b g c n)
  float *grad_initial;                                  // (b g c n)
  float *grad_A, *grad_D, *grad_bias, *grad_delta_weight, *grad_fixed_B, *grad_fixed_C;     // with (b segment) in front, to be summed
  int64_t segments;         // stretches the length is cut into, when there are more threads than blocks of channels
};

template<class T> struct Room {      // aligned memory that frees itself
  T* p;
  explicit Room(int64_t count): p((T*)aligned_alloc(64, (count*sizeof(T)/64 + 1)*64)) {}
  Room(Room&& other): p(other.p) { other.p = nullptr; }
  ~Room() { free(p); }
};

INLINE int64_t up(int64_t a, int64_t b) { return (a + b - 1)/b; }
INLINE int64_t blocks_of(const Scan& s) { return up(s.channels, W); }

// W channels of one group and batch entry: where their tensors start, and parameters as vectors
struct Block {
  const Scan& s;
  int64_t b, g, index, channel, steps;      // `channel`: the first one, counted over all groups
  const int64_t* order;
  int n_channels;

  Block(const Scan& s, int64_t b, int64_t g, int64_t index): s(s), b(b), g(g), index(index), channel(g*s.channels + index*W),
    steps(s.lengths ? s.lengths[g] : s.length), order(s.order ? s.order + g*s.length : nullptr),
    n_channels((int)std::min<int64_t>(W, s.channels - index*W)) {}

  char* base(const View& v) const { return v.data + (b*v.batch + g*v.group + index*W*v.channel)*bytes_of(v); }
  // Steps first..end, at most SPAN, from or to vectors, tile by tile
  void read(const View& v, int64_t first, int64_t end, V* out) const {
    for (int64_t t = first; t < end; t += TILE) read_tile(v, base(v), tile(t, end), n_channels, out + (t - first));
  }
  void write(const View& v, int64_t first, int64_t end, V* in, bool add) const {
    for (int64_t t = first; t < end; t += TILE) write_tile(v, base(v), tile(t, end), n_channels, in + (t - first), add);
  }
  const float* factors(int64_t step) const {
    return (const float*)s.delta.data + b*s.delta.batch + g*s.delta.group + place({order, step, 0}, 0)*s.delta.step;
  }
  // Raw step sizes: as they are, or made from their factors, four steps side by side so that the sums do not wait for one another
  void read_delta(int64_t first, int64_t end, const V* weight, V* out) const {
    if (!s.delta_weight) return read(s.delta, first, end, out);
    for (int64_t t = first; t < end; t += 4) {
      const float* row[4];
      V sum[4]{};
      for (int i = 0; i < 4; i++) row[i] = factors(std::min(t + i, end - 1));
      for (int64_t r = 0; r < s.rank; r++) {
        const V w = weight[r];
        #pragma GCC unroll 4
        for (int i = 0; i < 4; i++) sum[i] += row[i][r]*w;
      }
      for (int i = 0; i < 4; i++) out[t - first + i] = sum[i];
    }
  }
  Steps tile(int64_t first, int64_t end) const { return {order, first, (int)std::min<int64_t>(TILE, end - first)}; }
  void fetch(Fetch& f, const View& v, int64_t first) const {
    if (v.data) f.add(v, base(v), first, order, (int)std::min<int64_t>(SPAN, steps - first));
  }
  float* border(int64_t step) const {
    return s.borders + (((b*s.groups + g)*blocks_of(s) + index)*up(s.length, CHUNK) + step/CHUNK)*s.states*W;
  }
  V per_channel(const float* p) const {
    V v{};
    if (p) memcpy(&v, p + channel, 4*n_channels);
    return v;
  }
  void put_per_channel(float* p, V v) const { if (p) memcpy(p + channel, &v, 4*n_channels); }
  void per_state(const float* p, V* out, float scale = 1.f) const { columns(p, s.states, out, scale); }
  void columns(const float* p, int64_t width, V* out, float scale = 1.f) const {     // of `width` numbers for every channel
    for (int64_t n = 0; n < width; n++) {
      out[n] = V{};
      if (p) for (int i = 0; i < n_channels; i++) out[n][i] = p[(channel + i)*width + n]*scale;
    }
  }
  void put_per_state(float* p, const V* in) const { put_columns(p, s.states, in); }
  void put_columns(float* p, int64_t width, const V* in) const {
    if (p) for (int64_t n = 0; n < width; n++) for (int i = 0; i < n_channels; i++) p[(channel + i)*width + n] = in[n][i];
  }
  const float* of_batch(const float* p) const { return p ? p + b*s.groups*s.channels*s.states : p; }
  float* of_batch(float* p) const { return p ? p + b*s.groups*s.channels*s.states : p; }
  // gradient of a parameter: one copy per batch entry and segment, `size` numbers for each channel
  float* part(float* p, int64_t segment, int64_t size) const {
    return p ? p + (b*s.segments + segment)*s.groups*s.channels*size : p;
  }
};

// B and C over a span: a row of states per step, where it lies if states are side by side, else in a copy.
// All blocks of a group share them.
struct Weights {
  const Scan& s;
  const int64_t padded;
  const float *B[SPAN], *C[SPAN];
  Room<float> copies;

  explicit Weights(const Scan& s): s(s), padded(up(s.states, W)*W), copies(2*SPAN*padded) {}
  void rows(const View& v, const Block& k, int64_t first, int64_t end, float* copy, const float** row) {
    const char* base = v.data + (k.b*v.batch + k.g*v.group)*bytes_of(v);
    const bool direct = v.channel == 1 && v.dtype == FLOAT32;
    for (int64_t t = 0; t < end - first; t++)
      row[t] = direct ? (const float*)base + place({k.order, first, 0}, (int)t)*v.step : copy + t*padded;
    if (direct || !v.data) return;
    V tile[TILE];
    for (int64_t n = 0; n < s.states; n += W) for (int64_t t0 = first; t0 < end; t0 += TILE) {
      const Steps steps = k.tile(t0, end);
      read_tile(v, base + n*v.channel*bytes_of(v), steps, (int)std::min<int64_t>(W, s.states - n), tile);
      for (int t = 0; t < steps.count; t++) store(copy + (t0 - first + t)*padded + n, tile[t]);
    }
  }
  void read(const Block& k, int64_t first, int64_t end) {
    rows(s.B, k, first, end, copies.p, B);
    rows(s.C, k, first, end, copies.p + SPAN*padded, C);
  }
};

// Calls f(K, n) for pieces of K states, K a compile-time number: as many at a time as the registers hold. There are pieces<MOST>(N).
template<int K, class F> INLINE void for_states(int64_t n, int64_t N, F f) {
  for (; n + K <= N; n += K) f(std::integral_constant<int, K>(), n);
  if constexpr (K > 1) for_states<K/2>(n, N, f);
}
template<int MOST> INLINE int pieces(int64_t N) { return (int)(N/MOST + __builtin_popcountll(N % MOST)); }

// Stretches of the length, cut at chunk borders
INLINE int64_t segment_start(const Block& k, int64_t i) {
  return std::min(k.steps, up(up(k.steps, CHUNK), k.s.segments)*CHUNK*i);
}
