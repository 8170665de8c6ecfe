// Backward: chunk by chunk from the end. Inside a chunk the states are run once more from the state that forward kept, then
// the gradient g of the state walks back:  g[t] = C[t] gy[t] + exp(dt[t+1] A) g[t+1].
// Gradients of B and C are sums over channels: the blocks of a strip add up lane by lane, then the lanes are summed.
#pragma once
#include <cstddef>
#include "forward.h"

static const int BACK_STATES = 4;       // states that walk back together: what a chunk of them needs stays in the nearest cache
static const int SUPER = 16*CHUNK;      // steps after which threads that share a group add up their sums

// What a chunk of one block needs and gives
struct Chunk {
  int count;
  V u[CHUNK], dt[CHUNK], du[CHUNK], slope[CHUNK], gy[CHUNK];        // slope: of softplus; gy: before the gate
  V y[CHUNK], of_du[CHUNK], of_decay[CHUNK];
  V z[CHUNK], raw_gy[CHUNK];
  V largest;
  Fetch fetch;
};

// What a step of K states leaves for the way back, and sums over blocks for the gradients of B and C
template<int K> struct Trail { V decay[K], before[K], of_B[K], of_C[K]; };

// K states of one chunk, there and back; FIRST: the first block of its strip, nothing is summed up yet
template<int K, bool FIRST, bool SAFE, bool FB, bool FC, bool GATED>
INLINE void walk_back(Chunk& x, const Weights& w, int64_t n, const float* border, const V* a_of, V* g, V* of_a,
                      const V* fixed_B, const V* fixed_C, V* of_fixed_B, V* of_fixed_C, Trail<K>* trail) {
  V h[K], later[K], sum_a[K], a[K];
  for (int i = 0; i < K; i++) h[i] = load(border + (n + i)*W), a[i] = a_of[n + i];
  for (int t = 0; t < x.count; t++) {
    const V dt = x.dt[t], du = x.du[t];
    const float *B = w.B[t] + n, *C = w.C[t] + n;
    V y{};
    x.fetch.step();
    #pragma GCC unroll 16
    for (int i = 0; i < K; i++) {
      const V e = exp_scaled<SAFE>(dt, a[i]);
      trail[t].decay[i] = e, trail[t].before[i] = h[i];
      h[i] = h[i]*e + (FB ? du*fixed_B[n + i] : du*B[i]);
      if (GATED) y += FC ? h[i]*fixed_C[n + i] : h[i]*C[i];
    }
    if (GATED) x.y[t] += y;
  }
  for (int i = 0; i < K; i++) later[i] = g[n + i], sum_a[i] = of_a[n + i];
  for (int t = x.count - 1; t >= 0; t--) {
    const V dt = x.dt[t], du = x.du[t], gy = x.gy[t];
    const float *B = w.B[t] + n, *C = w.C[t] + n;
    Trail<K>& at = trail[t];
    V s1{}, s2{};
    #pragma GCC unroll 16
    for (int i = 0; i < K; i++) {
      const V here = later[i] + (FC ? gy*fixed_C[n + i] : gy*C[i]);
      if (FC) of_fixed_C[n + i] += gy*h[i]; else at.of_C[i] = FIRST ? gy*h[i] : at.of_C[i] + gy*h[i];
      if (FB) of_fixed_B[n + i] += here*du; else at.of_B[i] = FIRST ? here*du : at.of_B[i] + here*du;
      s1 += FB ? here*fixed_B[n + i] : here*B[i];
      later[i] = here*at.decay[i];
      h[i] = at.before[i];
      const V v = later[i]*h[i];
      s2 += v*a[i];
      sum_a[i] += v*dt;
    }
    x.of_du[t] += s1;
    x.of_decay[t] += s2;
  }
  for (int i = 0; i < K; i++) g[n + i] = later[i], of_a[n + i] = sum_a[i];
}

// Sums over the lanes of a trail, in its own order, (step, B or C, K): stored for the first strip, added for the others
template<int K> INLINE void put_sums(const Trail<K>* trail, int count, float* to, bool add) {
  static_assert(offsetof(Trail<K>, of_C) == offsetof(Trail<K>, of_B) + K*sizeof(V), "of_B and of_C are one array below");
  for (int i = 0; i < count*2*K; i += W) {
    V v[W];
    #pragma GCC unroll 16
    for (int j = 0; j < W; j++) v[j] = ((const V*)&trail[(i + j)/(2*K)].of_B)[(i + j) % (2*K)];
    store(to + i, add ? load(to + i) + sums(v) : sums(v));
  }
}

struct Backward {
  const Block k;
  const int64_t N;
  V bias, D, of_bias, of_D, largest_a;
  Room<V> held;
  V *g, *a, *of_a, *fixed_B, *fixed_C, *of_fixed_B, *of_fixed_C;

  explicit Backward(const Block& block): k(block), N(k.s.states), bias(k.per_channel(k.s.bias)), D(k.per_channel(k.s.D)),
    of_bias{}, of_D{}, largest_a{}, held(7*N), g(held.p), a(g + N), of_a(a + N), fixed_B(of_a + N), fixed_C(fixed_B + N),
    of_fixed_B(fixed_C + N), of_fixed_C(of_fixed_B + N) {
    k.per_state(k.of_batch(k.s.grad_last), g);
    k.per_state(k.s.A, a, EXP_SCALE);
    k.per_state(k.s.fixed_B, fixed_B);
    k.per_state(k.s.fixed_C, fixed_C);
    for (int64_t n = 0; n < N; n++) largest_a = larger(magnitude(a[n]), largest_a), of_a[n] = of_fixed_B[n] = of_fixed_C[n] = V{};
  }
  // One tile, as the steps from `at` on
  void read(const Steps& steps, int at, Chunk& x) const {
    read_tile(k.s.u, k.base(k.s.u), steps, k.n_channels, x.u + at);
    read_tile(k.s.delta, k.base(k.s.delta), steps, k.n_channels, x.dt + at);
    read_tile(k.s.grad_y, k.base(k.s.grad_y), steps, k.n_channels, x.gy + at);
    if (k.s.z.data) read_tile(k.s.z, k.base(k.s.z), steps, k.n_channels, x.z + at);
    for (int t = at; t < at + TILE; t++) {
      const V d = x.dt[t] + bias;
      if (k.s.softplus) softplus_and_slope(d, x.dt[t], x.slope[t]); else x.dt[t] = d, x.slope[t] = all(1.f);
      x.du[t] = x.dt[t]*x.u[t];
      x.largest = larger(magnitude(x.dt[t]), x.largest);
      x.of_du[t] = x.of_decay[t] = V{};
      if (k.s.z.data) x.raw_gy[t] = x.gy[t], x.gy[t] *= x.z[t]*sigmoid(x.z[t]), x.y[t] = D*x.u[t];
    }
  }
  // Steps first..end, one chunk: reading ...
  void begin(int64_t first, int64_t end, Chunk& x) const {
    x.largest = V{};
    x.count = (int)(end - first);
    x.fetch.n = x.fetch.at = 0;
    if (first >= CHUNK) {
      for (const View* v: {&k.s.u, &k.s.delta, &k.s.grad_y, &k.s.z, &k.s.grad_u, &k.s.grad_delta}) k.fetch(x.fetch, *v, first - CHUNK, CHUNK);
      for (int64_t i = 0; i < N*W; i += 16) x.fetch.add((const char*)(k.border(first - CHUNK) + i));
      x.fetch.spread(CHUNK*up(N, BACK_STATES));
    }
    for (int64_t t = first; t < end; t += TILE) read(k.tile(t, end), (int)(t - first), x);
  }
  bool safe(const Chunk& x) const { return !any_above(x.largest*largest_a, all(EXP_SAFE*EXP_SCALE)); }
  // ... K states there and back ...
  template<int K, bool FIRST, bool SAFE, bool FB, bool FC, bool GATED>
  inline __attribute__((always_inline)) void walk(int64_t n, int64_t start, Chunk& x, const Weights& w, Trail<K>* trail) {
    walk_back<K, FIRST, SAFE, FB, FC, GATED>(x, w, n, k.border(start), a, g, of_a, fixed_B, fixed_C, of_fixed_B, of_fixed_C, trail);
  }
  // ... and writing every gradient of this block
  void end(int64_t first, int64_t end, Chunk& x) {
    for (int t = 0; t < x.count; t++) {
      const V of_dt = x.u[t]*x.of_du[t] + x.of_decay[t]*(1.f/EXP_SCALE);
      of_D += x.gy[t]*x.u[t];
      x.of_du[t] = x.dt[t]*x.of_du[t] + D*x.gy[t];      // gradient of u
      x.of_decay[t] = of_dt*x.slope[t];                 // gradient of delta
      of_bias += x.of_decay[t];
      if (k.s.z.data) { const V q = sigmoid(x.z[t]); x.raw_gy[t] *= x.y[t]*q*(1.f + x.z[t]*(1.f - q)); }
    }
    for (int64_t t = first; t < end; t += TILE) {
      const Steps steps = k.tile(t, end);
      const int at = (int)(t - first);
      write_tile(k.s.grad_u, k.base(k.s.grad_u), steps, k.n_channels, x.of_du + at, k.s.merge);
      write_tile(k.s.grad_delta, k.base(k.s.grad_delta), steps, k.n_channels, x.of_decay + at, false);
      if (k.s.z.data) write_tile(k.s.grad_z, k.base(k.s.grad_z), steps, k.n_channels, x.raw_gy + at, false);
    }
  }
  void finish(int64_t segment) {
    const Scan& s = k.s;
    if (segment == 0) k.put_per_state(k.of_batch(s.grad_initial), g);
    k.put_per_state(k.part(s.grad_A, segment, N), of_a);
    k.put_per_state(k.part(s.grad_fixed_B, segment, N), of_fixed_B);
    k.put_per_state(k.part(s.grad_fixed_C, segment, N), of_fixed_C);
    k.put_per_channel(k.part(s.grad_D, segment, 1), of_D);
    k.put_per_channel(k.part(s.grad_bias, segment, 1), of_bias);
  }
  // Steps first..end with nothing coming from later ones: the gradient of the state before them, and the sum of step sizes
  void carry(int64_t first, int64_t end, V* out) {
    Chunk x;
    Weights w(k.s);
    V total{};
    for (int64_t n = 0; n < N; n++) g[n] = V{};
    for (int64_t t0 = first + (end - 1 - first)/TILE*TILE; t0 >= first; t0 -= TILE) {
      const Steps steps = k.tile(t0, end);
      read(steps, 0, x);
      w.read(k.b, k.g, steps, 0);
      for (int t = steps.count - 1; t >= 0; t--) {
        total += x.dt[t];
        for (int64_t n = 0; n < N; n++)
          g[n] = exp_scaled<false>(x.dt[t], a[n])*(g[n] + x.gy[t]*(k.s.fixed_C ? fixed_C[n] : all(w.C[t][n])));
      }
    }
    for (int64_t n = 0; n < N; n++) out[n] = g[n];
    out[N] = total;
  }
  void skip(const V* carried) {
    for (int64_t n = 0; n < N; n++) g[n] = g[n]*exp_scaled<false>(carried[N], a[n]) + carried[n];
  }
};

// Sums over channels of SUPER steps: pieces of K states, each (step, B or C, K), from step `at` on
struct Sums {
  float* p;
  int64_t at;
  float* of(int64_t n, int K) const { return p + 2*SUPER*n + at*2*K; }
};

// A chunk of a strip: K states at a time, all blocks of the strip for each, so that their sums stay in the nearest cache
struct Walk {
  Weights w;
  Room<Chunk> chunks;
  Room<Trail<BACK_STATES>> trails;
  explicit Walk(const Scan& s): w(s), chunks(STRIP), trails(CHUNK + W) {}

  template<bool SAFE, bool FB, bool FC, bool GATED> void states(std::vector<Backward>& strip, int64_t first, int count, Sums to, bool add) {
    for_states<BACK_STATES>(0, w.s.states, [&](auto K, int64_t n) {
      auto trail = (Trail<K.value>*)trails.p;
      strip[0].walk<K.value, true, SAFE, FB, FC, GATED>(n, first, chunks.p[0], w, trail);
      for (size_t i = 1; i < strip.size(); i++) strip[i].walk<K.value, false, SAFE, FB, FC, GATED>(n, first, chunks.p[i], w, trail);
      if (!FB || !FC) put_sums<K.value>(trail, count, to.of(n, K.value), add);
    });
  }
  void run(std::vector<Backward>& strip, int64_t first, int64_t end, Sums to, bool add) {
    const Scan& s = w.s;
    const Block& k = strip[0].k;
    const int count = (int)(end - first);
    for (int64_t t = first; t < end; t += TILE) w.read(k.b, k.g, k.tile(t, end), (int)(t - first));
    bool safe = true;
    for (size_t i = 0; i < strip.size(); i++) strip[i].begin(first, end, chunks.p[i]), safe = safe && strip[i].safe(chunks.p[i]);
    auto go = [&](auto SAFE, auto FB, auto FC) {
      if (s.z.data) states<SAFE.value, FB.value, FC.value, true>(strip, first, count, to, add);
      else states<SAFE.value, FB.value, FC.value, false>(strip, first, count, to, add);
    };
    const std::true_type yes;
    const std::false_type no;
    if (s.fixed_B && s.fixed_C) go(no, yes, yes);
    else if (s.fixed_B) go(no, yes, no);
    else if (s.fixed_C) go(no, no, yes);
    else if (safe) go(yes, no, no);
    else go(no, no, no);
    for (size_t i = 0; i < strip.size(); i++) strip[i].end(first, end, chunks.p[i]);
  }
};

// Sums over channels into the gradient of B (which = 0) or C (1)
static void put_gradient(const Scan& s, const Block& k, int which, int64_t first, int64_t end, Sums from) {
  const View& v = which ? s.grad_C : s.grad_B;
  if (!v.data) return;
  const int64_t padded = up(s.states, W)*W;
  Room<float> rows(TILE*padded);
  V tile[TILE];
  for (int64_t t0 = first; t0 < end; t0 += TILE, from.at += TILE) {
    const Steps steps = k.tile(t0, end);
    for_states<BACK_STATES>(0, s.states, [&](auto K, int64_t n) {
      const float* p = from.of(n, K.value) + which*K.value;
      for (int t = 0; t < steps.count; t++) memcpy(rows.p + t*padded + n, p + t*2*K.value, 4*K.value);
    });
    for (int64_t n = 0; n < s.states; n += W) {
      for (int t = 0; t < steps.count; t++) tile[t] = load(rows.p + t*padded + n);
      write_tile(v, v.data + (k.b*v.batch + k.g*v.group + n*v.channel)*bytes_of(v), steps, (int)std::min<int64_t>(W, s.states - n), tile, false);
    }
  }
}

// How threads share the work: `teams` at a time, each with one item (batch entry and group); in a team, `members` share the
// channel blocks, and what is left of its threads shares the segments
struct Plan {
  int64_t teams, size, members;
  Plan(const Scan& s, int64_t threads, int64_t items, int64_t blocks): teams(1), size(threads), members(1) {
    int64_t best = INT64_MAX;
    for (int64_t q = 1; q <= std::min(threads, items); q++) {
      const int64_t cost = up(items, q)*up(blocks*s.segments, std::min(threads/q, blocks*s.segments));
      if (cost <= best) best = cost, teams = q, size = threads/q;
    }
    members = std::min(size, blocks);
  }
};

static void backward(const Scan& s) {
  const int64_t blocks = blocks_of(s), items = s.batch*(s.merge ? 1 : s.groups), inner = s.merge ? s.groups : 1;
  const int64_t N = s.states, size = N + 1;
  Room<V> carried(s.segments > 1 ? items*blocks*s.segments*size : 0);
  Room<float> sums_of(s.threads*2*SUPER*2*N);       // per thread, in turns: sums for B, for C
  auto block = [&](int64_t item, int64_t i, int64_t g) {
    return s.merge ? Block(s, item, g, i) : Block(s, item/s.groups, item % s.groups, i);
  };
  auto summary = [&](int64_t item, int64_t i, int64_t segment) { return carried.p + ((item*blocks + i)*s.segments + segment)*size; };

  #pragma omp parallel num_threads((int)s.threads) if(s.threads > 1)
  {
    if (s.segments > 1) {       // the gradient at the start of each stretch, had nothing come from later ones
      #pragma omp for schedule(static)
      for (int64_t j = 0; j < items*blocks*(s.segments - 1); j++) {
        const int64_t segment = 1 + j % (s.segments - 1), i = j/(s.segments - 1) % blocks, item = j/(s.segments - 1)/blocks;
        const Block k = block(item, i, 0);
        Backward(k).carry(segment_start(k, segment), segment_start(k, segment + 1), summary(item, i, segment));
      }
    }
    const Plan plan(s, omp_get_num_threads(), items, blocks);
    const int64_t thread = omp_get_thread_num(), team = thread/plan.size, place = thread % plan.size;
    const int64_t member = place % plan.members, lane = place/plan.members, lanes = plan.size/plan.members;
    const int64_t from = blocks*member/plan.members, to = blocks*(member + 1)/plan.members;
    const int64_t supers = up(up(up(s.length, CHUNK), s.segments)*CHUNK, SUPER);
    auto sums_at = [&](int64_t thread, int64_t turn) { return sums_of.p + (thread*2 + turn % 2)*SUPER*2*N; };
    Walk walk(s);
    int64_t turn = 0;
    // every thread goes through the same loops, with or without work, and so meets the others at every barrier
    for (int64_t i = 0; i < up(items, plan.teams)*inner*up(s.segments, lanes); i++) {
      const int64_t item = i/inner/up(s.segments, lanes)*plan.teams + team, g = i/up(s.segments, lanes) % inner;
      const int64_t segment = i % up(s.segments, lanes)*lanes + lane;
      const bool active = team < plan.teams && item < items && lane < lanes && segment < s.segments;
      std::vector<std::vector<Backward>> strips;
      int64_t start = 0, end = 0;
      if (active) {
        for (int64_t j = from; j < to; j++) {
          if ((j - from) % STRIP == 0) strips.emplace_back(), strips.back().reserve(STRIP);
          strips.back().emplace_back(block(item, j, g));
          for (int64_t later = s.segments - 1; later > segment; later--) strips.back().back().skip(summary(item, j, later));
        }
        const Block& k = strips[0][0].k;
        start = segment_start(k, segment), end = segment_start(k, segment + 1);
      }
      for (int64_t j = supers - 1; j >= 0; j--, turn++) {
        const int64_t first = std::min(end, start + j*SUPER), last = std::min(end, first + SUPER), steps = last - first;
        if (steps > 0)
          for (size_t q = 0; q < strips.size(); q++)
            for (int64_t c = first + (steps - 1)/CHUNK*CHUNK; c >= first; c -= CHUNK)
              walk.run(strips[q], c, std::min(last, c + CHUNK), {sums_at(thread, turn), c - first}, q > 0);
        if (plan.members > 1) {
          #pragma omp barrier
        }
        if (steps <= 0) continue;
        const int64_t share = up(up(steps, TILE), plan.members)*TILE, t0 = std::min(steps, member*share), t1 = std::min(steps, t0 + share);
        const Sums total{sums_at(thread - member, turn), t0};
        for (int64_t m = 1; m < plan.members; m++)
          for_states<BACK_STATES>(0, N, [&](auto K, int64_t n) {
            const Sums other{sums_at(thread - member + m, turn), t0};
            for (int64_t q = 0; q < (t1 - t0)*2*K.value; q++) total.of(n, K.value)[q] += other.of(n, K.value)[q];
          });
        for (int which = 0; which < 2; which++) put_gradient(s, strips[0][0].k, which, first + t0, first + t1, total);
      }
      for (auto& strip: strips) for (Backward& b: strip) b.finish(segment);
    }
  }
}
