// Backward: span by span and chunk by chunk from the end. Inside a chunk the states are run once more from the state that
// forward kept, then the gradient g of the state walks back:  g[t] = C[t] gy[t] + exp(dt[t+1] A) g[t+1].
// Gradients of B and C are sums over channels: lanes are folded at once, blocks add up in a thread's own buffer.
#pragma once
#include "forward.h"

static const int BACK_STATES = 4;       // states that walk back together: what a chunk of them needs stays in the nearest cache
static const int SUPER = 2*SPAN;        // steps after which threads that share a group add up their sums

// What a span of one block needs and gives
struct BackSpan {
  V u[SPAN], dt[SPAN], du[SPAN], slope[SPAN], gy[SPAN];     // slope: of softplus; gy: before the gate
  V y[SPAN], of_du[SPAN], of_decay[SPAN];
  V z[SPAN], raw_gy[SPAN];
  V largest;
  Fetch fetch;
};

// Decays of K states at every step of a chunk and the states before it: what the way back needs of the way there
template<int K> struct Trail { V decay[K], before[K]; };

// Sums over channels of SUPER steps: pieces of K states, each (step, floats of `fold`), from step `at` on
struct Sums {
  static const int64_t PIECE = SUPER*Folded<2*BACK_STATES>::FLOATS;
  float* p;
  int64_t at;
  static int64_t room(int64_t N) { return (N/BACK_STATES + 2)*PIECE; }      // what is left over comes in a piece of two and one of one
  template<int K> float* of(int64_t n) const { return p + (n/BACK_STATES + (n % BACK_STATES > 0))*PIECE + at*Folded<2*K>::FLOATS; }
};

// K states of one chunk, the steps from..to of a span, there and back; `add`: to the sums of other blocks
template<int K, bool SAFE, bool FB, bool FC, bool GATED>
INLINE void walk_back(BackSpan& x, int from, int to, const Weights& w, int64_t n, const float* border, const V* a_of, V* g, V* of_a,
                      const V* fixed_B, const V* fixed_C, V* of_fixed_B, V* of_fixed_C, Trail<K>* trail, float* sums, bool add,
                      int turn, int turns) {
  V h[K], later[K], sum_a[K], a[K];
  for (int i = 0; i < K; i++) h[i] = load(border + (n + i)*W), a[i] = a_of[n + i];
  for (int t = from; t < to; t++) {
    const V dt = x.dt[t], du = x.du[t];
    const float *B = w.B[t] + n, *C = w.C[t] + n;
    Trail<K>& at = trail[t - from];
    V y{};
    x.fetch.step(t, turn, turns);
    #pragma GCC unroll 16
    for (int i = 0; i < K; i++) {
      const V e = exp_scaled<SAFE>(dt, a[i]);
      at.decay[i] = e, at.before[i] = h[i];
      h[i] = h[i]*e + (FB ? du*fixed_B[n + i] : du*B[i]);
      if (GATED) y += FC ? h[i]*fixed_C[n + i] : h[i]*C[i];
    }
    if (GATED) x.y[t] += y;
  }
  for (int i = 0; i < K; i++) later[i] = g[n + i], sum_a[i] = V{};       // sums over time in two levels round less
  for (int t = to - 1; t >= from; t--) {
    const V dt = x.dt[t], du = x.du[t], gy = x.gy[t];
    const float *B = w.B[t] + n, *C = w.C[t] + n;
    const Trail<K>& at = trail[t - from];
    V s1{}, s2{}, of_weights[2*K], folded[2*K];
    #pragma GCC unroll 16
    for (int i = 0; i < K; i++) {
      const V here = later[i] + (FC ? gy*fixed_C[n + i] : gy*C[i]);
      of_weights[i] = here*du, of_weights[K + i] = gy*h[i];
      if (FB) of_fixed_B[n + i] += of_weights[i];
      if (FC) of_fixed_C[n + i] += of_weights[K + i];
      s1 += FB ? here*fixed_B[n + i] : here*B[i];
      later[i] = here*at.decay[i];
      h[i] = at.before[i];
      const V v = later[i]*h[i];
      s2 += v*a[i];
      sum_a[i] += v*dt;
    }
    x.of_du[t] += s1;
    x.of_decay[t] += s2;
    if (FB && FC) continue;
    fold<2*K>(of_weights, folded);
    float* row = sums + t*Folded<2*K>::FLOATS;
    for (int i = 0; i < Folded<2*K>::FLOATS; i += W) store(row + i, add ? folded[i/W] + load(row + i) : folded[i/W]);
  }
  for (int i = 0; i < K; i++) g[n + i] = later[i], of_a[n + i] += sum_a[i];
}

struct Backward {
  const Block k;
  const int64_t N;
  V bias, D, of_bias, of_D, largest_a;
  Room<V> held;
  V *g, *a, *of_a, *fixed_B, *fixed_C, *of_fixed_B, *of_fixed_C, *weight, *of_weight;

  explicit Backward(const Block& block): k(block), N(k.s.states), bias(k.per_channel(k.s.bias)), D(k.per_channel(k.s.D)),
    of_bias{}, of_D{}, largest_a{}, held(7*N + 2*k.s.rank), g(held.p), a(g + N), of_a(a + N), fixed_B(of_a + N), fixed_C(fixed_B + N),
    of_fixed_B(fixed_C + N), of_fixed_C(of_fixed_B + N), weight(of_fixed_C + N),
    of_weight(weight + k.s.rank) {
    k.per_state(k.of_batch(k.s.grad_last), g);
    k.per_state(k.s.A, a, EXP_SCALE);
    k.per_state(k.s.fixed_B, fixed_B);
    k.per_state(k.s.fixed_C, fixed_C);
    k.columns(k.s.delta_weight, k.s.rank, weight);
    for (int64_t r = 0; r < k.s.rank; r++) of_weight[r] = V{};
    for (int64_t n = 0; n < N; n++) largest_a = larger(magnitude(a[n]), largest_a), of_a[n] = of_fixed_B[n] = of_fixed_C[n] = V{};
  }
  // What the span of this block from `first` on will need
  void fetch(Fetch& f, int64_t first) const {
    for (const View* v: {&k.s.u, &k.s.grad_y, &k.s.z, &k.s.grad_u, &k.s.grad_delta}) k.fetch(f, *v, first);
    if (!k.s.delta_weight) k.fetch(f, k.s.delta, first);
    f.add(k.border(first), SPAN/CHUNK*N*W);
  }
  // Steps first..end, one span: reading ...
  void begin(int64_t first, int64_t end, BackSpan& x) const {
    const Scan& s = k.s;
    k.read(s.u, first, end, x.u);
    k.read_delta(first, end, weight, x.dt);
    k.read(s.grad_y, first, end, x.gy);
    if (s.z.data) k.read(s.z, first, end, x.z);
    x.largest = V{};
    for (int t = 0; t < end - first; t++) {
      const V d = x.dt[t] + bias;
      if (s.softplus) softplus_and_slope(d, x.dt[t], x.slope[t]); else x.dt[t] = d, x.slope[t] = all(1.f);
      x.du[t] = x.dt[t]*x.u[t];
      x.largest = larger(magnitude(x.dt[t]), x.largest);
      x.of_du[t] = x.of_decay[t] = V{};
      if (s.z.data) x.raw_gy[t] = x.gy[t], x.gy[t] *= x.z[t]*sigmoid(x.z[t]), x.y[t] = D*x.u[t];
    }
  }
  // ... all states there and back, chunk by chunk ...
  template<bool SAFE, bool FB, bool FC, bool GATED>
  void walk(int64_t first, int count, BackSpan& x, const Weights& w, void* trail, Sums to, bool add) {
    for (int from = (count - 1)/CHUNK*CHUNK; from >= 0; from -= CHUNK) {
      int turn = 0;
      for_states<BACK_STATES>(0, N, [&](auto K, int64_t n) {
        walk_back<K.value, SAFE, FB, FC, GATED>(x, from, std::min(count, from + CHUNK), w, n, k.border(first + from), a, g, of_a,
          fixed_B, fixed_C, of_fixed_B, of_fixed_C, (Trail<K.value>*)trail, to.of<K.value>(n), add, turn++, pieces<BACK_STATES>(N));
      });
    }
  }
  void run(int64_t first, int count, BackSpan& x, const Weights& w, void* trail, Sums to, bool add) {
    auto go = [&](auto SAFE, auto FB, auto FC) {
      if (k.s.z.data) walk<SAFE.value, FB.value, FC.value, true>(first, count, x, w, trail, to, add);
      else walk<SAFE.value, FB.value, FC.value, false>(first, count, x, w, trail, to, add);
    };
    const std::true_type yes;
    const std::false_type no;
    if (k.s.fixed_B && k.s.fixed_C) go(no, yes, yes);
    else if (k.s.fixed_B) go(no, yes, no);
    else if (k.s.fixed_C) go(no, no, yes);
    else if (any_above(x.largest*largest_a, all(EXP_SAFE*EXP_SCALE))) go(no, no, no);
    else go(yes, no, no);
  }
  // ... and writing every gradient of this block
  void end(int64_t first, int64_t end, BackSpan& x) {
    V sum_D{}, sum_bias{};
    for (int t = 0; t < end - first; t++) {
      const V of_dt = x.u[t]*x.of_du[t] + x.of_decay[t]*(1.f/EXP_SCALE);
      sum_D += x.gy[t]*x.u[t];
      x.of_du[t] = x.dt[t]*x.of_du[t] + D*x.gy[t];      // gradient of u
      x.of_decay[t] = of_dt*x.slope[t];                 // gradient of delta
      sum_bias += x.of_decay[t];
      if (k.s.z.data) { const V q = sigmoid(x.z[t]); x.raw_gy[t] *= x.y[t]*q*(1.f + x.z[t]*(1.f - q)); }
    }
    of_D += sum_D;
    of_bias += sum_bias;
    weights(first, end, x.of_decay);
    k.write(k.s.grad_u, first, end, x.of_du, k.s.merge);
    k.write(k.s.grad_delta, first, end, x.of_decay, false);
    if (k.s.z.data) k.write(k.s.grad_z, first, end, x.raw_gy, false);
  }
  // Gradient of the weights that make the raw step sizes, from that of the step sizes; four sums, so that none waits
  void weights(int64_t first, int64_t end, const V* of_delta) {
    if (!k.s.rank) return;
    const float* row[SPAN];
    for (int64_t t = first; t < end; t++) row[t - first] = k.factors(t);
    for (int64_t r = 0; r < k.s.rank; r++) {
      V sum[4]{};
      int64_t t = 0;
      for (; t + 4 <= end - first; t += 4)
        #pragma GCC unroll 4
        for (int i = 0; i < 4; i++) sum[i] += of_delta[t + i]*row[t + i][r];
      for (; t < end - first; t++) sum[0] += of_delta[t]*row[t][r];
      of_weight[r] += (sum[0] + sum[1]) + (sum[2] + sum[3]);
    }
  }
  void finish(int64_t segment) {
    const Scan& s = k.s;
    if (segment == 0) k.put_per_state(k.of_batch(s.grad_initial), g);
    k.put_per_state(k.part(s.grad_A, segment, N), of_a);
    k.put_per_state(k.part(s.grad_fixed_B, segment, N), of_fixed_B);
    k.put_per_state(k.part(s.grad_fixed_C, segment, N), of_fixed_C);
    k.put_columns(k.part(s.grad_delta_weight, segment, s.rank), s.rank, of_weight);
    k.put_per_channel(k.part(s.grad_D, segment, 1), of_D);
    k.put_per_channel(k.part(s.grad_bias, segment, 1), of_bias);
  }
  // Steps first..end with nothing coming from later ones: the gradient of the state before them, and the sum of step sizes
  void carry(int64_t first, int64_t end, V* out) {
    BackSpan x;
    Weights w(k.s);
    V total{};
    for (int64_t n = 0; n < N; n++) g[n] = V{};
    for (int64_t t0 = first + (end - 1 - first)/SPAN*SPAN; t0 >= first; t0 -= SPAN) {
      const int64_t t1 = std::min(end, t0 + SPAN);
      begin(t0, t1, x);
      w.read(k, t0, t1);
      V sum{};
      for (int t = (int)(t1 - t0) - 1; t >= 0; t--) {
        sum += x.dt[t];
        for (int64_t n = 0; n < N; n++)
          g[n] = exp_scaled<false>(x.dt[t], a[n])*(g[n] + x.gy[t]*(k.s.fixed_C ? fixed_C[n] : all(w.C[t][n])));
      }
      total += sum;
    }
    for (int64_t n = 0; n < N; n++) out[n] = g[n];
    out[N] = total;
  }
  void skip(const V* carried) {
    for (int64_t n = 0; n < N; n++) g[n] = g[n]*exp_scaled<false>(carried[N], a[n]) + carried[n];
  }
};

// A span of a strip of blocks, which share the rows of B and C
struct Walk {
  Weights w;
  Room<BackSpan> span;
  Room<Trail<BACK_STATES>> trail;
  explicit Walk(const Scan& s): w(s), span(1), trail(CHUNK) {}

  // `start`: where the stretch begins
  void run(std::vector<Backward>& strip, int64_t start, int64_t first, int64_t end, Sums to, bool add) {
    BackSpan& x = *span.p;
    w.read(strip[0].k, first, end);
    for (size_t i = 0; i < strip.size(); i++, add = true) {
      x.fetch.n = 0;
      if (i + 1 < strip.size()) strip[i + 1].fetch(x.fetch, first);
      else if (first > start) strip[0].fetch(x.fetch, first - SPAN);
      strip[i].begin(first, end, x);
      strip[i].run(first, (int)(end - first), x, w, trail.p, to, add);
      strip[i].end(first, end, x);
    }
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
      typedef Folded<2*K.value> F;
      const float* p = from.of<K.value>(n) + F::first(which*K.value);
      for (int t = 0; t < steps.count; t++, p += F::FLOATS)
        for (int i = 0; i < K.value; i++) {
          float sum = p[i];
          for (int j = 1; j < F::COPIES; j++) sum += p[i + j*F::STRIDE];
          rows.p[t*padded + n + i] = sum;
        }
    });
    for (int64_t n = 0; n < s.states; n += W) {
      for (int t = 0; t < steps.count; t++) tile[t] = load(rows.p + t*padded + n);
      char* base = v.data + (k.b*v.batch + k.g*v.group + n*v.channel)*bytes_of(v);
      write_tile(v, base, steps, (int)std::min<int64_t>(W, s.states - n), tile, false);
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
  Room<float> sums_of(s.threads*2*Sums::room(N));       // two per thread, in turns
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
    auto sums_at = [&](int64_t thread, int64_t turn) { return sums_of.p + (thread*2 + turn % 2)*Sums::room(N); };
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
            for (int64_t c = first + (steps - 1)/SPAN*SPAN; c >= first; c -= SPAN)
              walk.run(strips[q], start, c, std::min(last, c + SPAN), {sums_at(thread, turn), c - first}, q > 0);
        if (plan.members > 1) {
          #pragma omp barrier
        }
        if (steps <= 0) continue;
        const int64_t share = up(up(steps, TILE), plan.members)*TILE, t0 = std::min(steps, member*share), t1 = std::min(steps, t0 + share);
        const Sums total{sums_at(thread - member, turn), t0};
        for (int64_t m = 1; m < plan.members && !(s.fixed_B && s.fixed_C); m++)
          for_states<BACK_STATES>(0, N, [&](auto K, int64_t n) {
            const Sums other{sums_at(thread - member + m, turn), t0};
            float *p = total.of<K.value>(n), *q = other.of<K.value>(n);
            for (int64_t i = 0; i < (t1 - t0)*Folded<2*K.value>::FLOATS; i++) p[i] += q[i];
          });
        for (int which = 0; which < 2; which++) put_gradient(s, strips[0][0].k, which, first + t0, first + t1, total);
      }
      for (auto& strip: strips) for (Backward& b: strip) b.finish(segment);
    }
  }
}
