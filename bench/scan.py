"""Scan backends against mambapy's pscan and the step-by-step reference, interleaved in one run; ratios printed and stored as JSON.

Time: wall milliseconds, median and least of the repeats; ratios are taken from the medians. Every row has a process of its own:
memory that a larger shape left mapped makes mambapy's forward pass at S3 several times faster (its tensors fit), which would be luck.
Memory: what a fresh process's resident set grows by at its highest (VmHWM of /proc, set back before the call) over what it was
with the inputs made and the method called once on a tiny input; the output counts.
"""
import argparse
import json
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import mambapy.pscan
import torch
import torch.nn.functional as F

from i2i_mamba_nb.core import versions, write_json
from i2i_mamba_nb.ssm import backends, selective_scan

HERE = Path(__file__).resolve().parent
SHAPES = dict(S1=(1, 512, 4096), S1b=(4, 512, 4096), S2=(1, 64, 65536), S3=(1, 1024, 1024))  # batch, channels, length
STATES = 16
LIMIT = .5          # load of other processes above which a run is marked as busy
GRAPH_LIMIT = 4096  # steps up to which the reference, one graph node per operation and step, is run backward
BARS = dict(forward=dict(S2=2., other=4.), both=dict(S2=1.5, other=3.), memory=.15)

# ---------------------------------------------------------------- what is compared
def inputs(shape, seed=0):
    "u, delta, A, B, C, D, delta_bias of a scan like a freshly initialised Mamba's"
    g = torch.Generator().manual_seed(seed)
    (b, d, l), n = shape, STATES
    r = lambda *s: torch.randn(*s, generator=g)
    A = -torch.arange(1., n+1).repeat(d, 1)
    return [x.requires_grad_() for x in (r(b, d, l), .5*r(b, d, l), A, r(b, n, l), r(b, n, l), torch.ones(d), torch.full((d,), -4.6))]

def peer_inputs(x):
    "The same in mambapy's order of axes, batch, length, channels, so that no transposition is charged to it"
    u, delta, A, B, C, D, bias = x
    turned = [t.detach().mT.contiguous().requires_grad_() for t in (u, delta, B, C)]
    return [turned[0], turned[1], A, turned[2], turned[3], D, bias]

def peer(u, delta, A, B, C, D, bias):
    "Selective scan on mambapy's parallel scan"
    delta = F.softplus(delta+bias)
    decay = torch.exp(delta[..., None]*A)
    h = mambapy.pscan.pscan(decay, (delta*u)[..., None]*B[:, :, None])
    return (h @ C[..., None]).squeeze(-1)+D*u

def ours(backend):
    def run(u, delta, A, B, C, D, bias): return selective_scan(u, delta, A, B, C, D, None, bias, True, backend=backend)
    return run

def methods():
    "Name -> (function, what turns the common inputs into its own)"
    mine = {name: (ours(name), list) for name, state in backends().items() if state.available}
    return dict(mambapy=(peer, peer_inputs), **mine)

def runs(name, shape, mode): return not (name == 'reference' and mode == 'both' and shape[2] > GRAPH_LIMIT)

def call(function, x, mode):
    "One forward, or one forward and backward"
    if mode == 'forward':
        with torch.no_grad(): return function(*x)
    y = function(*x)
    return torch.autograd.grad(y, x, torch.ones_like(y))

# ---------------------------------------------------------------- time
def times(shape, mode, repeats):
    "Milliseconds of every method, taken in turns"
    made = {k: (f, turn(inputs(shape))) for k, (f, turn) in methods().items() if runs(k, shape, mode)}
    taken = {k: [] for k in made}
    for i in range(repeats+1):
        for k, (f, x) in made.items():
            if k == 'reference' and i > 2: continue
            start = time.perf_counter()
            call(f, x, mode)
            if i: taken[k].append(1e3*(time.perf_counter()-start))
    return {k: dict(median=median(v), least=min(v), repeats=len(v)) for k, v in taken.items()}

def agreement(shape):
    "Largest difference of each method from mambapy, relative to the largest value"
    wanted = call(peer, peer_inputs(inputs(shape)), 'forward').mT
    fast = {k: f for k, (f, _) in methods().items() if k not in ('mambapy', 'reference')}
    return {k: ((call(f, inputs(shape), 'forward')-wanted).abs().max()/wanted.abs().max()).item() for k, f in fast.items()}

# ---------------------------------------------------------------- memory
def resident(key):
    "A line of /proc/self/status in bytes: VmRSS now, VmHWM at its highest"
    return next(int(w.split()[1])*1024 for w in Path('/proc/self/status').read_text().splitlines() if w.startswith(key))

def child_memory(name, shape, mode):
    "In a process of its own: bytes the resident set grows by"
    function, turn = methods()[name]
    call(function, turn(inputs((1, 4, 40))), mode)
    x = turn(inputs(shape))
    Path('/proc/self/clear_refs').write_text('5')
    before = resident('VmRSS')
    kept = call(function, x, mode)
    return resident('VmHWM')-before if kept is not None else 0

def memory(name, shape, mode, threads):
    "Bytes from such a process; None where the system cannot say"
    if not Path('/proc/self/clear_refs').exists(): return None
    command = [sys.executable, __file__, '--child', json.dumps([name, shape, mode]), '--threads', str(threads)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])

# ---------------------------------------------------------------- the machine
def cpu_model():
    "Processor by name"
    lines = Path('/proc/cpuinfo').read_text().splitlines() if Path('/proc/cpuinfo').exists() else []
    return next((w.split(':')[1].strip() for w in lines if w.startswith('model name')), platform.processor())

def cpu_seconds():
    "CPU seconds all processes of this machine have used, and those of this one and its children; None where not known"
    if not Path('/proc/stat').exists(): return None
    ticks = [int(k) for k in Path('/proc/stat').read_text().split('\n')[0].split()[1:9]]
    t = os.times()
    return (sum(ticks)-ticks[3]-ticks[4])/os.sysconf('SC_CLK_TCK'), t.user+t.system+t.children_user+t.children_system

class Others:
    "How many cores other processes keep busy while this one runs"
    def __init__(self): self.start, self.at = cpu_seconds(), time.perf_counter()
    def cores(self):
        if self.start is None: return None
        everything, own = (b-a for a, b in zip(self.start, cpu_seconds(), strict=True))
        return max(0., (everything-own)/max(time.perf_counter()-self.at, 1e-9))

# ---------------------------------------------------------------- the run
def measure(shape, mode, options):
    "One row: times, ratios to mambapy, memory"
    torch.set_num_threads(options.threads)
    row = dict(shape=dict(zip('bdl', shape, strict=True), n=STATES), mode=mode, ms=times(shape, mode, options.repeats))
    base = row['ms']['mambapy']['median']
    row['faster_than_mambapy'] = {k: base/v['median'] for k, v in row['ms'].items() if k != 'mambapy'}
    if not options.no_memory:
        row['extra_bytes'] = {k: memory(k, shape, mode, options.threads) for k in row['ms'] if k != 'reference'}
        most = row['extra_bytes']['mambapy']
        if most: row['memory_of_mambapy'] = {k: v/most for k, v in row['extra_bytes'].items() if k != 'mambapy'}
    return row

def fresh(f, *args):
    "What f returns in a process of its own: what was allocated for one shape must not speed up the next"
    with ProcessPoolExecutor(1, mp_context=get_context('spawn')) as pool: return pool.submit(f, *args).result()

def verdict(name, row):
    "Whether the pure PyTorch scan reaches its bars on this row"
    bar = BARS[row['mode']].get(name, BARS[row['mode']]['other'])
    ok = row['faster_than_mambapy']['chunked'] >= bar and row.get('memory_of_mambapy', {}).get('chunked', 0) <= BARS['memory']
    return dict(faster_at_least=bar, memory_at_most=BARS['memory'], reached=ok)

def show(name, row):
    "A row as one line of text"
    parts = [f'{name:4s} {row["mode"]:8s}']
    for k, v in row['ms'].items():
        text = f'{k} {v["median"]:8.1f} ms (least {v["least"]:.1f})'
        if k in row['faster_than_mambapy']: text += f' = {row["faster_than_mambapy"][k]:.1f}x mambapy'
        if row.get('extra_bytes', {}).get(k): text += f', {row["extra_bytes"][k]/2**20:.0f} MiB'
        parts.append(text)
    print(' | '.join(parts), '| bars', 'reached' if row['bars']['reached'] else 'MISSED', flush=True)

def parse():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--shapes', default=','.join(SHAPES), help='which of '+', '.join(SHAPES))
    p.add_argument('--repeats', type=int, default=5)
    p.add_argument('--threads', type=int, default=min(2, os.cpu_count()))
    p.add_argument('--no-memory', action='store_true', help='leave out the memory figures')
    p.add_argument('--refuse-busy', action='store_true', help=f'do not start when the load average is above {LIMIT}')
    p.add_argument('--output', type=Path, default=HERE/'results'/'scan.json')
    p.add_argument('--child', help=argparse.SUPPRESS)
    return p.parse_args()

def main():
    options = parse()
    torch.set_num_threads(options.threads)
    if options.child: return print(child_memory(*json.loads(options.child)))
    load, others = os.getloadavg(), Others()
    if options.refuse_busy and load[0] > LIMIT: sys.exit(f'load average {load[0]:.2f} > {LIMIT}: not measured. Try again when idle.')
    rows = {}
    for name in options.shapes.split(','):
        for mode in ('forward', 'both'):
            row = rows[f'{name} {mode}'] = fresh(measure, SHAPES[name], mode, options)
            row['bars'] = verdict(name, row)
            show(name, row)
    cores = others.cores()
    busy = load[0] > LIMIT or (cores or 0) > LIMIT
    result = dict(rows=rows, difference_from_mambapy=agreement(SHAPES['S3']), bars_reached=all(r['bars']['reached'] for r in rows.values()),
        busy=busy, load_average_before=load, other_processes_cores=cores, cpu=cpu_model(), cores=os.cpu_count(), threads=options.threads,
        waiting={k: os.environ.get(k, 'not set') for k in ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT')},
        versions={**versions(), 'mambapy': version('mambapy')}, command=' '.join(['python', 'bench/scan.py', *sys.argv[1:]]),
        date=datetime.now(UTC).isoformat(timespec='seconds'), memory_method=' '.join(__doc__.split('Memory: ')[1].split()))
    write_json(options.output, result)
    print(f'largest difference from mambapy: {result["difference_from_mambapy"]}')
    if busy: print(f'BUSY: load average {load[0]:.2f} before, other processes used {cores or 0:.2f} cores: ratios may be off')
    print(f'all bars reached: {result["bars_reached"]}; written to {options.output}')

if __name__ == '__main__': main()
