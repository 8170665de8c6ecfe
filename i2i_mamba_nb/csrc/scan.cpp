// The compiled selective scan behind a plain C interface: no torch headers, tensors come as addresses and strides.
// Every function is reentrant: all memory belongs to the call or to the caller. Same inputs and threads, same bits.
#include "forward.h"
#include "backward.h"

extern "C" {
// The caller's description of Scan must be as large as ours
int64_t scan_interface() { return (int64_t)sizeof(Scan); }
int64_t scan_width() { return W; }
int64_t scan_chunk() { return CHUNK; }

// Whether this machine knows the instructions this file was built with
int64_t scan_runs_here() {
#if defined(__AVX512F__)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw")
      && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma");
#elif defined(__AVX2__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return 1;
#endif
}

// Stretches to cut the length into: enough to give every thread one, none but the last shorter than 8 chunks
int64_t scan_segments(const Scan* s) {
  const int64_t units = s->batch*(s->merge ? 1 : s->groups)*blocks_of(*s);
  if (s->merge || s->lengths || units == 0 || s->threads < 2*units) return 1;
  const int64_t chunks = up(s->length, CHUNK), most = std::max<int64_t>(1, std::min(s->threads/units, chunks/8));
  return up(chunks, up(chunks, most));
}

void scan_forward(const Scan* s) { forward(*s); }
void scan_backward(const Scan* s) { backward(*s); }
}
