// Forward: span by span through time, a few blocks of channels side by side so that they share the rows of B and C
#pragma once
#include <vector>
#include "scan.h"

static const int STRIP = 4;     // blocks that go through time together
#if W == 16
static const int FORWARD_STATES = 16;
#else
static const int FORWARD_STATES = 4;
#endif

// What the recurrence needs of a span of one block
struct Span {
  V u[SPAN], dt[SPAN], du[SPAN];
  V largest;            // largest |dt| of each lane
  Fetch fetch;
};

// K states of one block through the steps from..to of a span. `a` is multiplied by EXP_SCALE; FB, FC: B, C are vectors that stay the
// same over time.
template<int K, bool SAFE, bool FB, bool FC, bool OUT>
INLINE void advance(const Span& x, int from, int to, const Weights& w, V* state, const V* a, int64_t n,
                    const V* fixed_B, const V* fixed_C, V* y, int turn, int turns) {
  V h[K];
  for (int i = 0; i < K; i++) h[i] = state[n + i];
  for (int t = from; t < to; t++) {
    const V dt = x.dt[t], du = x.du[t];
    const float *B = w.B[t] + n, *C = w.C[t] + n;
    V even{}, odd{};
    x.fetch.step(t, turn, turns);
    #pragma GCC unroll 16
    for (int i = 0; i < K; i++) {
      h[i] = h[i]*exp_scaled<SAFE>(dt, a[n + i]) + (FB ? du*fixed_B[n + i] : du*B[i]);
      if (OUT) (i % 2 ? odd : even) += FC ? h[i]*fixed_C[n + i] : h[i]*C[i];
    }
    if (OUT) y[t] += even + odd;
  }
  for (int i = 0; i < K; i++) state[n + i] = h[i];
}

struct Forward {
  const Block k;
  const int64_t N;
  V bias, D, largest_a;
  Room<V> held;
  V *state, *a, *fixed_B, *fixed_C, *weight;

  explicit Forward(const Block& block): k(block), N(k.s.states), bias(k.per_channel(k.s.bias)), D(k.per_channel(k.s.D)), largest_a{},
    held(4*N + k.s.rank), state(held.p), a(state + N), fixed_B(a + N), fixed_C(fixed_B + N), weight(fixed_C + N) {
    k.per_state(k.of_batch(k.s.initial), state);
    k.per_state(k.s.A, a, EXP_SCALE);
    k.per_state(k.s.fixed_B, fixed_B);
    k.per_state(k.s.fixed_C, fixed_C);
    k.columns(k.s.delta_weight, k.s.rank, weight);
    for (int64_t n = 0; n < N; n++) largest_a = larger(magnitude(a[n]), largest_a);
  }
  void read(int64_t first, int64_t end, Span& x) const {
    k.read(k.s.u, first, end, x.u);
    k.read_delta(first, end, weight, x.dt);
    x.largest = V{};
    for (int t = 0; t < end - first; t++) {
      V d = x.dt[t] + bias;
      x.dt[t] = d = k.s.softplus ? softplus(d) : d;
      x.du[t] = d*x.u[t];
      x.largest = larger(magnitude(d), x.largest);
    }
  }
  // What the span of this block from `first` on will need
  void fetch(Fetch& f, int64_t first) const {
    for (const View* v: {&k.s.u, &k.s.z, &k.s.y}) k.fetch(f, *v, first);
    if (!k.s.delta_weight) k.fetch(f, k.s.delta, first);
    if (k.s.borders) f.add(k.border(first), SPAN/CHUNK*N*W);
  }
  template<bool OUT> void run(const Span& x, int from, int to, const Weights& w, V* y) {
    auto go = [&](auto MOST, auto SAFE, auto FB, auto FC) {
      int turn = 0;
      for_states<MOST.value>(0, N, [&](auto K, int64_t n) {
        advance<K.value, SAFE.value, FB.value, FC.value, OUT>(x, from, to, w, state, a, n, fixed_B, fixed_C, y, turn++,
          pieces<MOST.value>(N));
      });
    };
    const std::true_type yes;
    const std::false_type no;
    const std::integral_constant<int, 4> few;
    if (k.s.fixed_B && k.s.fixed_C) go(few, no, yes, yes);
    else if (k.s.fixed_B) go(few, no, yes, no);
    else if (k.s.fixed_C) go(few, no, no, yes);
    else if (any_above(x.largest*largest_a, all(EXP_SAFE*EXP_SCALE))) go(few, no, no, no);
    else go(std::integral_constant<int, FORWARD_STATES>(), yes, no, no);        // no exponent of this span needs clamping
  }
  void outputs(int64_t first, int64_t end, const Weights& w, Span& x) {
    const int count = (int)(end - first);
    V y[SPAN], z[SPAN];
    read(first, end, x);
    for (int t = 0; t < count; t++) y[t] = D*x.u[t];
    for (int from = 0; from < count; from += CHUNK) {
      if (k.s.borders) for (int64_t n = 0; n < N; n++) store(k.border(first + from) + n*W, state[n]);
      run<true>(x, from, std::min(count, from + CHUNK), w, y);
    }
    if (k.s.z.data) {
      k.read(k.s.z, first, end, z);
      for (int t = 0; t < count; t++) y[t] *= z[t]*sigmoid(z[t]);
    }
    k.write(k.s.y, first, end, y, k.s.merge);
  }
  // Steps first..end from the state zero: the state they end in, and the sum of their step sizes
  void carry(int64_t first, int64_t end, V* out) {
    Span x;
    Weights w(k.s);
    V total{};
    for (int64_t n = 0; n < N; n++) state[n] = V{};
    for (int64_t t0 = first; t0 < end; t0 += SPAN) {
      const int64_t t1 = std::min(end, t0 + SPAN);
      read(t0, t1, x);
      w.read(k, t0, t1);
      run<false>(x, 0, (int)(t1 - t0), w, nullptr);
      V sum{};       // a long sum in two levels: it becomes an exponent, where its rounding errors would count
      for (int t = 0; t < t1 - t0; t++) sum += x.dt[t];
      total += sum;
    }
    for (int64_t n = 0; n < N; n++) out[n] = state[n];
    out[N] = total;
  }
  // A stretch summed up by `carry`, passed in one go: its decays multiply to exp(A times the sum of dt)
  void skip(const V* carried) {
    for (int64_t n = 0; n < N; n++) state[n] = state[n]*exp_scaled<false>(carried[N], a[n]) + carried[n];
  }
};

static void forward(const Scan& s) {
  const int64_t blocks = blocks_of(s), items = s.batch*(s.merge ? 1 : s.groups), inner = s.merge ? s.groups : 1;
  // strips as long as every thread still gets one
  const int64_t width = std::max<int64_t>(1, std::min<int64_t>(STRIP, items*blocks/s.threads)), strips = up(blocks, width);
  const int64_t units = items*strips*s.segments, size = s.states + 1;
  Room<V> carried(s.segments > 1 ? items*blocks*s.segments*size : 0);
  auto block = [&](int64_t item, int64_t i, int64_t g) {
    return s.merge ? Block(s, item, g, i) : Block(s, item/s.groups, item % s.groups, i);
  };
  auto summary = [&](int64_t item, int64_t i, int64_t segment) { return carried.p + ((item*blocks + i)*s.segments + segment)*size; };
  #pragma omp parallel num_threads((int)s.threads) if(s.threads > 1)
  {
    if (s.segments > 1) {       // the state at the end of each stretch, had it begun at zero
      #pragma omp for schedule(static)
      for (int64_t j = 0; j < items*blocks*(s.segments - 1); j++) {
        const int64_t segment = j % (s.segments - 1), i = j/(s.segments - 1) % blocks, item = j/(s.segments - 1)/blocks;
        const Block k = block(item, i, 0);
        Forward(k).carry(segment_start(k, segment), segment_start(k, segment + 1), summary(item, i, segment));
      }
    }
    #pragma omp for schedule(dynamic, 1)
    for (int64_t unit = 0; unit < units; unit++) {
      const int64_t segment = unit % s.segments, strip = unit/s.segments % strips, item = unit/s.segments/strips;
      for (int64_t g = 0; g < inner; g++) {
        std::vector<Forward> strip_of;
        strip_of.reserve(width);
        for (int64_t i = strip*width; i < std::min(blocks, (strip + 1)*width); i++) {
          strip_of.emplace_back(block(item, i, g));
          for (int64_t j = 0; j < segment; j++) strip_of.back().skip(summary(item, i, j));
        }
        const Block& k = strip_of[0].k;
        Weights w(s);
        Span x;
        const int64_t end = segment_start(k, segment + 1);
        for (int64_t t = segment_start(k, segment); t < end; t += SPAN) {
          w.read(k, t, std::min(end, t + SPAN));
          for (size_t i = 0; i < strip_of.size(); i++) {
            x.fetch.n = 0;
            if (i + 1 < strip_of.size()) strip_of[i + 1].fetch(x.fetch, t);
            else if (t + SPAN < end) strip_of[0].fetch(x.fetch, t + SPAN);
            strip_of[i].outputs(t, std::min(end, t + SPAN), w, x);
          }
        }
        if (segment + 1 == s.segments) for (Forward& f: strip_of) f.k.put_per_state(f.k.of_batch(s.last), f.state);
      }
    }
  }
}
