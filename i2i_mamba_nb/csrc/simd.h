// Vectors of W channels, and what a scan does with them: exponential, softplus, sigmoid, transposition, sums over lanes.
// The compiler's vector types do the work (GCC, clang); where they have no word for a move, intrinsics do.
#pragma once
#include <cstdint>
#include <cstring>
#ifdef __SSE2__
#include <immintrin.h>
#endif

#define INLINE_MEMBER inline __attribute__((always_inline))
#define INLINE static INLINE_MEMBER

typedef float V __attribute__((vector_size(W*4)));
typedef int32_t VI __attribute__((vector_size(W*4)));
typedef float Unaligned __attribute__((vector_size(W*4), aligned(4)));

INLINE V all(float x) { return x - V{}; }
INLINE V load(const float* p) { return *(const Unaligned*)p; }
INLINE void store(float* p, V v) { *(Unaligned*)p = v; }
// The larger, the smaller of two; b where a lane is not a number, so b is the data and a the limit
#if defined(__AVX512F__)
INLINE V larger(V a, V b) { return (V)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE V smaller(V a, V b) { return (V)_mm512_min_ps((__m512)a, (__m512)b); }
#elif defined(__AVX2__)
INLINE V larger(V a, V b) { return (V)_mm256_max_ps((__m256)a, (__m256)b); }
INLINE V smaller(V a, V b) { return (V)_mm256_min_ps((__m256)a, (__m256)b); }
#elif defined(__SSE2__)
INLINE V larger(V a, V b) { return (V)_mm_max_ps((__m128)a, (__m128)b); }
INLINE V smaller(V a, V b) { return (V)_mm_min_ps((__m128)a, (__m128)b); }
#else
INLINE V larger(V a, V b) { return a > b ? a : b; }
INLINE V smaller(V a, V b) { return a < b ? a : b; }
#endif
INLINE bool any_above(V x, V limit) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)x, (__m512)limit, _CMP_GT_OQ);
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)(x > limit));
#else
  VI over = x > limit;
  int64_t halves[W/2];
  memcpy(halves, &over, sizeof over);
  return halves[0] | halves[1];
#endif
}
INLINE V magnitude(V x) { return (V)((VI)x & 0x7fffffff); }

// A product that must not melt into the additions that follow: those have units of their own, which would stand idle
INLINE V apart(V x) {
#if defined(__AVX512F__)
  asm("" : "+v"(x));
#elif defined(__SSE2__)
  asm("" : "+x"(x));
#endif
  return x;
}

// ---- exp(d a), with `a` multiplied by EXP_SCALE beforehand
// Adding 1.5 2^23 rounds to an integer k and leaves it in the low bits; the remainder |r| <= 1/2 goes through a polynomial.
// AVX-512 counts in 32nds of an octave: 2^(k/32) comes out of a table of 32 floats (one instruction) and degree 3 is enough.
// Without a table to look up in registers the count is in octaves and the degree 6. Both err by little more than one unit in the
// last place; one degree less would do at a glance, but its error keeps its sign from step to step and adds up in slow decays.
static const float ROUND = 12582912.f;
static const int32_t ROUND_BITS = 0x4b400000;
static const float EXP_SAFE = 87.f;     // |d a| up to here needs no clamping
#ifdef __AVX512F__
static const int PER_OCTAVE = 32;
static const float POLYNOMIAL[] = {1.6938536e-6f, 2.3459810e-4f, 2.1660849e-2f, 1.f};     // of r, highest power first
alignas(64) static const uint32_t ROOTS[32] = {     // bits of 2^(j/32), less what k << 18 puts there beside the exponent
  0x3f800000, 0x3f7ecd87, 0x3f7daac3, 0x3f7c980f, 0x3f7b95c2, 0x3f7aa43a, 0x3f79c3d3, 0x3f78f4f0,
  0x3f7837f0, 0x3f778d3a, 0x3f76f532, 0x3f767043, 0x3f75fed7, 0x3f75a15b, 0x3f75583f, 0x3f7523f6,
  0x3f7504f3, 0x3f74fbaf, 0x3f7508a4, 0x3f752c4d, 0x3f75672a, 0x3f75b9be, 0x3f76248c, 0x3f76a81e,
  0x3f7744fd, 0x3f77fbb8, 0x3f78ccdf, 0x3f79b907, 0x3f7ac0c7, 0x3f7be4ba, 0x3f7d257d, 0x3f7e83b3};
#else
static const int PER_OCTAVE = 1;
static const float POLYNOMIAL[] = {1.5321155e-4f, 1.3390162e-3f, 9.6185263e-3f, 5.5503623e-2f, 2.4022648e-1f, 6.9314718e-1f, 1.f};
#endif
static const float EXP_SCALE = 1.44269504088896341f*PER_OCTAVE;

template<bool SAFE> INLINE V exp_scaled(V d, V a) {
  V t = apart(d*a);
  if (!SAFE) t = smaller(all(130.f*PER_OCTAVE), larger(all(-152.f*PER_OCTAVE), t));
  V k = t + ROUND, r = t - (k - ROUND), p = all(POLYNOMIAL[0]);
  #pragma GCC unroll 6
  for (int i = 1; i < (int)(sizeof POLYNOMIAL/sizeof(float)); i++) p = p*r + POLYNOMIAL[i];
#ifdef __AVX512F__
  VI root = (VI)_mm512_permutex2var_ps(_mm512_load_ps(ROOTS), (__m512i)k, _mm512_load_ps(ROOTS + 16));
  if (SAFE) return (V)(root + ((VI)k << 18))*p;
  VI n = (VI)k - ROUND_BITS;
  p *= (V)(root + ((n & 31) << 18));
  n >>= 5;
#else
  if (SAFE) return (V)((VI)p + ((VI)k << 23));
  VI n = (VI)k - ROUND_BITS;
#endif
  VI half = n >> 1;     // in two factors, so that infinity and numbers below the normal range come out right
  return p*(V)((half + 127) << 23)*(V)((n - half + 127) << 23);
}
INLINE V exp_of_negative(V x) { return exp_scaled<true>(larger(all(-EXP_SAFE), x), all(EXP_SCALE)); }

// log(1 + e^x) = max(x, 0) + log1p(q) with q = e^-|x|, and log1p(q) = 2 atanh(s), s = q/(2 + q): a series in s^2 <= 1/9
INLINE V log1p_of(V s) {
  V w = s*s;
  return 2.f*s*((((((w*(1.f/13) + 1.f/11)*w + 1.f/9)*w + 1.f/7)*w + 1.f/5)*w + 1.f/3)*w + 1.f);
}
INLINE V softplus(V x) {
  V q = exp_of_negative(-magnitude(x));
  return larger(V{}, x) + log1p_of(q/(q + 2.f));
}
// and its derivative, the sigmoid: 1/(1 + q) or q/(1 + q); one division serves both
INLINE void softplus_and_slope(V x, V& value, V& slope) {
  V q = exp_of_negative(-magnitude(x)), a = q + 1.f, b = q + 2.f, r = 1.f/(a*b);
  value = larger(V{}, x) + log1p_of(q*a*r);
  slope = x >= 0 ? b*r : q*b*r;
}
INLINE V sigmoid(V x) {
  V q = exp_of_negative(-magnitude(x)), r = 1.f/(1.f + q);
  return x >= 0 ? r : q*r;
}

// ---- lanes against rows: W x W transposition, and sums over the lanes of several vectors.
// Both go pairs, quads, then across quads: shuffles inside a quarter are the cheap ones.
#ifdef __SSE2__
#if W == 16
#define X86(name) _mm512_##name
typedef __m512 F; typedef __m512d D;
#elif W == 8
#define X86(name) _mm256_##name
typedef __m256 F; typedef __m256d D;
#else
#define X86(name) _mm_##name
typedef __m128 F; typedef __m128d D;
#endif
INLINE V pairs_low(V a, V b) { return (V)X86(unpacklo_ps)((F)a, (F)b); }        // a0 b0 a1 b1 in every quarter
INLINE V pairs_high(V a, V b) { return (V)X86(unpackhi_ps)((F)a, (F)b); }       // a2 b2 a3 b3
INLINE V quads_low(V a, V b) { return (V)X86(unpacklo_pd)((D)a, (D)b); }        // a0 a1 b0 b1
INLINE V quads_high(V a, V b) { return (V)X86(unpackhi_pd)((D)a, (D)b); }       // a2 a3 b2 b3
#if W == 16     // of the four quarters of a, then of b: the even, the odd ones
INLINE V across_low(V a, V b) { return (V)_mm512_shuffle_f32x4((F)a, (F)b, 0x88); }
INLINE V across_high(V a, V b) { return (V)_mm512_shuffle_f32x4((F)a, (F)b, 0xdd); }
#elif W == 8    // the lower, the upper halves
INLINE V across_low(V a, V b) { return (V)_mm256_permute2f128_ps((F)a, (F)b, 0x20); }
INLINE V across_high(V a, V b) { return (V)_mm256_permute2f128_ps((F)a, (F)b, 0x31); }
#endif
#else           // other machines have quarters only
INLINE V pairs_low(V a, V b) { return V{a[0], b[0], a[1], b[1]}; }
INLINE V pairs_high(V a, V b) { return V{a[2], b[2], a[3], b[3]}; }
INLINE V quads_low(V a, V b) { return V{a[0], a[1], b[0], b[1]}; }
INLINE V quads_high(V a, V b) { return V{a[2], a[3], b[2], b[3]}; }
#endif

INLINE void transpose(V* r) {
  V s[W];
  #pragma GCC unroll 8
  for (int i = 0; i < W; i += 2) s[i] = pairs_low(r[i], r[i + 1]), s[i + 1] = pairs_high(r[i], r[i + 1]);
  #pragma GCC unroll 4
  for (int i = 0; i < W; i += 4)
    #pragma GCC unroll 2
    for (int j = 0; j < 2; j++) r[i + 2*j] = quads_low(s[i + j], s[i + j + 2]), r[i + 2*j + 1] = quads_high(s[i + j], s[i + j + 2]);
#if W == 16
  #pragma GCC unroll 2
  for (int i = 0; i < 16; i += 8)
    #pragma GCC unroll 4
    for (int j = 0; j < 4; j++) s[i + j] = across_low(r[i + j], r[i + j + 4]), s[i + j + 4] = across_high(r[i + j], r[i + j + 4]);
  #pragma GCC unroll 8
  for (int i = 0; i < 8; i++) r[i] = across_low(s[i], s[i + 8]), r[i + 8] = across_high(s[i], s[i + 8]);
#elif W == 8
  #pragma GCC unroll 4
  for (int i = 0; i < 4; i++) s[i] = across_low(r[i], r[i + 4]), s[i + 4] = across_high(r[i], r[i + 4]);
  #pragma GCC unroll 8
  for (int i = 0; i < 8; i++) r[i] = s[i];
#endif
}
// Sums over lanes of M = 2, 4 or 8 vectors at once, as far as sharing a register goes: FLOATS numbers, in which the sum of vector i is
// that of COPIES numbers from first(i) on, STRIDE apart
template<int M> struct Folded {
  static const int FLOATS = M > W ? M : W, STRIDE = M < 4 ? M : 4, COPIES = FLOATS/M;
  static int first(int i) { return M == 8 ? i/4*(FLOATS/2) + i%4 : i; }
};
template<int M> INLINE void fold(const V* v, V* out) {
  V s[M];
  #pragma GCC unroll 4
  for (int i = 0; i < M/2; i++) s[i] = pairs_low(v[2*i], v[2*i + 1]) + pairs_high(v[2*i], v[2*i + 1]);
  #pragma GCC unroll 2
  for (int i = 0; i < M/4; i++) s[i] = quads_low(s[2*i], s[2*i + 1]) + quads_high(s[2*i], s[2*i + 1]);
#if W > 4
  if (M == 8) s[0] = across_low(s[0], s[1]) + across_high(s[0], s[1]);
#endif
  #pragma GCC unroll 2
  for (int i = 0; i < Folded<M>::FLOATS/W; i++) out[i] = s[i];
}
