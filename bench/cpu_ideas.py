"""Every idea of the compiled scan as a small experiment: with it and without it, taken in turns in one run; stored as JSON for chapter 12.

Times are wall milliseconds, least and median of the repeats; ratios belong to the medians unless a reader says otherwise.
Limits: the copy bandwidth of this machine, and what its cores reach when nothing but arithmetic is left. For the latter a probe is
compiled out of the kernel's own simd.h: (a) independent multiply-adds, (b) the kernel's exponential on numbers that stay in the nearest
cache, (c) the same with a polynomial of degree 5 and no table, (d) a whole step of the recurrence for 16 states, without loads of u and
delta, softplus, stores or loops over blocks. (d) is the limit that the forward pass is compared with. Rates are given for all threads.
"""
import argparse
import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from machine import Others, described
from mambapy.pscan import pscan

from i2i_mamba_nb.core import write_json
from i2i_mamba_nb.ssm.cpu_kernel import (BUILDS, OrderedInputs, Pool, build_path, cpu_backward, cpu_forward, kernel, load_build, new,
    ordered_backward, ordered_forward)
from i2i_mamba_nb.ssm.parallel import chunked_forward
from i2i_mamba_nb.ssm.recurrence import ScanInputs, reference

HERE = Path(__file__).resolve().parent
CSRC = build_path('x').parent
S1 = 1, 512, 4096

# ---------------------------------------------------------------- taking times in turns
def race(variants, repeats=9, least_seconds=.002):
    "Milliseconds of a call of each variant; the variants take turns, short calls are repeated inside a turn"
    count = {}
    for name, f in variants.items():
        f()
        start = time.perf_counter()
        f()
        count[name] = max(1, int(least_seconds/(time.perf_counter()-start)))
    taken = {name: [] for name in variants}
    for _ in range(repeats):
        for name, f in variants.items():
            start = time.perf_counter()
            for _ in range(count[name]): f()
            taken[name].append(1e3*(time.perf_counter()-start)/count[name])
    return {k: dict(least=round(min(v), 5), median=round(median(v), 5), repeats=repeats) for k, v in taken.items()}

def given(shape, n=16):
    "Inputs of a scan like a freshly initialised Mamba's, as ScanInputs"
    (b, d, l), g = shape, torch.Generator().manual_seed(0)
    r = lambda *s: torch.randn(*s, generator=g)
    A = -torch.arange(1., n+1).repeat(d, 1)
    return ScanInputs(r(b, d, l), .5*r(b, d, l), A, r(b, 1, n, l), r(b, 1, n, l), torch.ones(d), None, torch.full((d,), -4.6))

def forward(x, softplus=True, keep=False, **options): return lambda: cpu_forward(x, softplus, keep, **options)

def both(x, softplus=True, **options):
    "Forward and backward, as in training"
    (b, d, _), n = x.u.shape, x.A.shape[1]
    gy, gl = torch.ones_like(x.u), torch.zeros(b, d, n)
    def run():
        borders = cpu_forward(x, softplus, **options)[2]
        return cpu_backward(gy, gl, x, borders, softplus, **options)
    return run

def peer(x):
    "The scan on mambapy's parallel scan, its inputs in its own order of axes: batch, length, channels"
    u, delta, B, C = (t.squeeze(1).mT.contiguous() for t in (x.u, x.delta, x.B, x.C))
    @torch.no_grad()
    def run():
        dt = F.softplus(delta+x.delta_bias)
        states = pscan(torch.exp(dt[..., None]*x.A), (dt*u)[..., None]*B[:, :, None])
        return (states @ C[..., None]).squeeze(-1)+x.D*u
    return run

class Without:
    "A library in which one function is replaced"
    def __init__(self, library, **replaced): self.library, self.replaced = library, replaced
    def __getattr__(self, name): return self.replaced[name] if name in self.replaced else getattr(self.library, name)

def without(build, **replaced): return build._replace(library=Without(build.library, **replaced))

# ---------------------------------------------------------------- the ideas
def builds():
    "The same scan on every build that loads here"
    x, loaded = given(S1), []
    for name in BUILDS:
        try: loaded.append(load_build(name))
        except OSError: continue
    return dict(forward=race({k.name: forward(x, build=k) for k in loaded}), both=race({k.name: both(x, build=k) for k in loaded}))

def layouts():
    "Channels outside or inside, and strides of two, which no vector load fits"
    x = given(S1)
    turned = x._replace(**{k: getattr(x, k).mT.contiguous().mT for k in ('u', 'delta', 'B', 'C')})
    spread = x._replace(**{k: getattr(x, k).repeat_interleave(2, -1)[..., ::2] for k in ('u', 'delta')})
    return race({'(b d l)': forward(x), '(b l d)': forward(turned), 'every second element': forward(spread)})

def thread_counts():
    "One and two threads"
    x, counts = given(S1), range(1, torch.get_num_threads()+1)
    return {f.__name__: race({str(k): f(x, threads=k) for k in counts}) for f in (forward, both)}

def borders():
    "Keeping the states at chunk borders, and their bytes beside those of all states"
    x, build = given(S1), kernel()
    kept = cpu_forward(x, True)[2]
    (b, d, l), n = S1, x.A.shape[1]
    size = dict(borders=4*kept.numel(), all_states=4*b*d*l*n, u=4*b*d*l)
    return dict(race(dict(kept=forward(x, keep=True), dropped=forward(x))), bytes=size, chunk=build.chunk)

def memory():
    "Writing 64 MiB once: in fresh memory, in fresh memory of large pages, in memory that the pool kept"
    nothing, size = Pool(0), 2**24
    touch = lambda make: lambda: make().fill_(1.)
    return dict(touch=race(dict(kept=touch(lambda: new(shape=size)), large=touch(lambda: new(shape=size, pool=nothing)),
        small=touch(lambda: torch.empty(size)))))

def segments():
    "Few channels and a long sequence: the length is split, or one thread works while the other waits"
    x, build = given((1, 16, 65536)), kernel()
    whole = without(build, scan_segments=lambda *_: 1)
    return dict(forward=race(dict(split=forward(x, build=build), whole=forward(x, build=whole))),
        both=race(dict(split=both(x, build=build), whole=both(x, build=whole))))

def softplus():
    "The step size through softplus or as it comes"
    x = given(S1)
    positive = x._replace(delta=F.softplus(x.delta-4.6), delta_bias=None)
    return race({'with': forward(x), 'without': forward(positive, False)})

def clamping():
    "Exponents known to be in range, or clamped: one state in each block decays so fast that every span takes the careful path"
    x = given(S1)
    A = x.A.clone()
    A[:, 0] = -1e5
    return race(dict(free=forward(x), clamped=forward(x._replace(A=A))))

def states():
    "Milliseconds against the number of states"
    return race({str(n): forward(given(S1, n)) for n in (1, 2, 4, 8, 16, 32, 64)}, 7)

def halves():
    "Inputs of half the bytes"
    x = given(S1)
    small = x._replace(**{k: getattr(x, k).bfloat16() for k in ('u', 'delta', 'B', 'C')})
    return race(dict(float32=forward(x), bfloat16=forward(small)))

def orders():
    "Four directions over an image of 64 x 64: walked where the pixels lie, or copied there and back"
    c, k, n, l = 128, 4, 16, 4096
    g = torch.Generator().manual_seed(0)
    r = lambda *s: torch.randn(*s, generator=g)
    raster = torch.arange(l)
    column = raster.view(64, 64).T.reshape(-1)
    order = torch.stack([raster, raster.flip(0), column, column.flip(0)])
    x = OrderedInputs(r(1, l, c), .5*r(1, k, l, c), -torch.arange(1., n+1).repeat(k*c, 1), r(1, k, l, n), r(1, k, l, n), torch.ones(k*c),
        torch.full((k*c,), -4.6), order)
    place = order.argsort(1)
    def copied():
        u = x.u[:, order].permute(0, 1, 3, 2).reshape(1, k*c, l)
        gather = lambda t: torch.stack([t[:, i, order[i]] for i in range(k)], 1).transpose(2, 3)
        delta = gather(x.delta).reshape(1, k*c, l)
        y = cpu_forward(ScanInputs(u, delta, x.A, gather(x.B), gather(x.C), x.D, None, x.delta_bias), True, keep=False)[0]
        y = y.view(1, k, c, l)
        return sum(y[:, i][..., place[i]] for i in range(k)).transpose(1, 2)
    def there(): return ordered_forward(x, True, keep=False)[0]
    def back(): return ordered_backward(x.u, x, ordered_forward(x, True)[1], True)
    difference = ((there()-copied()).abs().max()/copied().abs().max()).item()
    return dict(race(dict(walked=there, copied=copied)), both=race(dict(walked=back)), difference_below_1e_5=difference < 1e-5)

def lengths():
    "Every backend against the length, 64 channels; the reference on short sequences only"
    found = {}
    for l in [2**k for k in range(8, 17, 2)]:
        x = given((1, 64, l))
        variants = dict(cpu=forward(x), chunked=lambda x=x: chunked_forward(x, True), mambapy=peer(x))
        if l <= 4096: variants['reference'] = lambda x=x: reference(*x[:8], True)
        found[str(l)] = race(variants, 3)
    return found

# ---------------------------------------------------------------- ideas that need a compiler: the kernel with a line changed
CHANGES = {'as it is': [],
    'no fetching ahead': [('tile.h', 'if (t < s.lines) __builtin_prefetch', 'if (t < 0) __builtin_prefetch')],
    'a span of 32 steps': [('scan.h', 'SPAN = 4*CHUNK;', 'SPAN = CHUNK;')],
    'one block at a time': [('forward.h', 'STRIP = 4;', 'STRIP = 1;')],
    'four states at a time': [('forward.h', 'FORWARD_STATES = 16;', 'FORWARD_STATES = 4;')]}

def flags(name):
    "Compiler flags out of setup.py"
    text = (HERE.parent/'setup.py').read_text()
    return (re.search(r"FLAGS = '(.+)'", text)[1]+' '+re.search(rf"\b{name}='(.+?)'", text)[1]).split()

def compile_to(target, source, name):
    subprocess.run(['g++', *flags(name), '-fPIC', '-shared', '-o', str(target), str(source)], check=True)

def changed(name, folder, changes):
    "The kernel compiled with lines of its source exchanged"
    for f in CSRC.iterdir():
        if f.suffix in ('.h', '.cpp'): shutil.copy(f, folder)
    for file, old, line in changes:
        text = (folder/file).read_text()
        if old not in text: raise ValueError(f'{file} has no {old!r} any more')
        (folder/file).write_text(text.replace(old, line))
    path = folder/f'scan_{name}.so'
    compile_to(path, folder/'scan.cpp', name)
    data = path.read_bytes()
    path.write_bytes(data+hashlib.sha256(data).digest())
    return load_build(name, folder)

def variants(folder):
    "Builds with one idea taken out each; None without a compiler"
    name = kernel().name
    def make(item):
        place = folder/item[0].replace(' ', '_')
        place.mkdir()
        return item[0], changed(name, place, item[1])
    with ThreadPoolExecutor(2) as pool: return dict(pool.map(make, CHANGES.items()))

def taken_out(made):
    x, long = given(S1), given((1, 512, 16384))
    return dict(forward=race({k: forward(x, build=v) for k, v in made.items()}), both=race({k: both(x, build=v) for k, v in made.items()}),
        forward_16384=race({k: forward(long, build=v) for k, v in made.items()}, 7))

# ---------------------------------------------------------------- limits of this machine
PROBE = r"""
#include "simd.h"
INLINE V polynomial(V d, V a) {
  V t = apart(d*a), k = t + ROUND, r = t - (k - ROUND);
  V p = ((((r*1.3400433e-3f + 9.6703602e-3f)*r + 5.5502813e-2f)*r + 2.4022107e-1f)*r + 6.9314719e-1f)*r + 1.f;
  return (V)((VI)p + ((VI)k << 23));
}
// 0: 16 multiply-adds a round, 1: 16 exponentials, 2: 16 exponentials without the table, 3: one step of 16 states
template<int kind> static float run(long rounds, int threads, const float* numbers) {
  float total = 0;
  #pragma omp parallel num_threads(threads)
  {
    V h[16], a[16], y{};
    for (int i = 0; i < 16; i++) h[i] = all(0.1f*i), a[i] = all(-1.4427f*PER_OCTAVE*(i + 1));
    for (long t = 0; t < rounds; t++) {
      const float* p = numbers + 64*(t % 32);
      V dt = all(p[0]), du = all(p[1]), even{}, odd{};
      #pragma GCC unroll 16
      for (int i = 0; i < 16; i++) {
        if constexpr (kind == 0) h[i] = h[i]*dt + du;
        else if constexpr (kind == 1) h[i] += exp_scaled<true>(dt, a[i]);
        else if constexpr (kind == 2) h[i] += polynomial(dt, a[i]);
        else { h[i] = h[i]*exp_scaled<true>(dt, a[i]) + du*p[2 + i]; (i % 2 ? odd : even) += h[i]*p[18 + i]; }
      }
      y += even + odd;
    }
    for (int i = 0; i < 16; i++) y += h[i];
    #pragma omp critical
    total += y[0] + y[W - 1];
  }
  return total;
}
extern "C" float probe(int kind, long rounds, int threads, const float* numbers) {
  return kind == 0 ? run<0>(rounds, threads, numbers) : kind == 1 ? run<1>(rounds, threads, numbers)
       : kind == 2 ? run<2>(rounds, threads, numbers) : run<3>(rounds, threads, numbers);
}
"""

def limits(folder):
    "Rates of all threads together: bytes, multiply-adds, exponentials, steps x states a second"
    name, found = kernel().name, {}
    a, b = torch.zeros(2**26), torch.zeros(2**26)
    found['copy_bytes_per_second'] = 2*4*2**26/(1e-3*race(dict(copy=lambda: b.copy_(a)))['copy']['least'])
    (folder/'probe.cpp').write_text(PROBE)
    shutil.copy(CSRC/'simd.h', folder)
    compile_to(folder/'probe.so', folder/'probe.cpp', name)
    probe = ctypes.CDLL(str(folder/'probe.so')).probe
    probe.restype = ctypes.c_float
    numbers = (torch.rand(2048)*.01).numpy()
    many, at = torch.get_num_threads(), ctypes.c_void_p(numbers.ctypes.data)
    kinds = dict(multiply_adds=0, exponentials=1, exponentials_by_polynomial=2, steps_of_a_state=3)
    rounds = 200_000
    taken = race({k: lambda v=v: probe(v, ctypes.c_long(rounds), many, at) for k, v in kinds.items()})
    for k, v in taken.items(): found[f'{k}_per_second'] = many*rounds*16*kernel().width/(1e-3*v['least'])
    return found

def counts():
    "What a scan at S1 asks for: bytes, exponentials, multiply-adds"
    (b, d, l), n = S1, 16
    return dict(b=b, d=d, l=l, n=n, bytes=4*(3*b*d*l+2*b*n*l), exponentials=b*d*l*n, multiply_adds=3*b*d*l*n)

# ---------------------------------------------------------------- the run
def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--threads', type=int, default=min(2, os.cpu_count()))
    p.add_argument('--output', type=Path, default=HERE/'results'/'cpu_ideas.json')
    options = p.parse_args()
    torch.set_num_threads(options.threads)
    if kernel() is None: sys.exit('The compiled scan is missing: install a C++ compiler and the package again.')
    result, started = dict(described(), build=kernel().name, counts=counts(), how=' '.join(__doc__.split('\n\n')[1].split())), time.time()
    with tempfile.TemporaryDirectory() as folder:
        made = variants(Path(folder)) if shutil.which('g++') else None
        others = Others()
        result['limits'] = limits(Path(folder)) if made else None
        result['taken_out'] = taken_out(made) if made else None
        for f in (builds, layouts, thread_counts, borders, memory, segments, softplus, clamping, states, halves, orders, lengths):
            result[f.__name__] = f()
            print(f'{f.__name__}: {result[f.__name__]}', flush=True)
    cores = others.cores()
    result.update(other_processes_cores=cores, busy=bool(cores and cores > .5))
    write_json(options.output, result)
    for key in ('limits', 'taken_out'): print(f'{key}: {result[key]}')
    print(f'{time.time()-started:.0f} s, others used {cores or 0:.2f} cores; written to {options.output.name}')

if __name__ == '__main__': main()
