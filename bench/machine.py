"""What the scripts of this folder share: what a recorded figure needs to be read later, taking times in turns, memory, limits of the chip.

Time is wall time in milliseconds. Two settings of glibc's allocator are measured, each in a process of its own: `default` gives large
tensors back to the system when they are freed, so that the next one is paid for in page faults; `kept` keeps them. Results of the
compiled scan from 8 MiB on come out of a pool of its own in both.
"""
import contextlib
import ctypes
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import torch

from i2i_mamba_nb.core import read_json, versions, write_json
from i2i_mamba_nb.ssm import backends

RESULTS = Path(__file__).resolve().parent/'results'
SHAPES = dict(S1=(1, 512, 4096), S1b=(4, 512, 4096), S2=(1, 64, 65536), S3=(1, 1024, 1024))  # batch, channels, length
STATES, BUSY = 16, .5       # BUSY: cores kept busy by other processes above which a run is marked
ALLOCATORS = dict(default={}, kept=dict(MALLOC_TRIM_THRESHOLD_='4000000000', MALLOC_MMAP_THRESHOLD_='4000000000'))

# ---------------------------------------------------------------- the machine
def cpu_model():
    "Name of the processor"
    info = Path('/proc/cpuinfo')
    names = [w.split(':', 1)[1].strip() for w in info.read_text().splitlines() if w.startswith('model name')] if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()

def cpu_flags():
    "Instruction sets that matter here"
    info = Path('/proc/cpuinfo')
    words = set(info.read_text().split()) if info.exists() else set()
    return [f for f in ('sse2', 'avx2', 'fma', 'avx512f', 'avx512_bf16') if f in words]

def n_cores(): "Cores this process may use"; return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()

def described():
    "dict for the head of a results file"
    words = [Path(w).name if Path(w).is_absolute() else w for w in sys.argv[1:]]
    machine = dict(cpu=cpu_model(), cores=n_cores(), flags=cpu_flags(), system=platform.system())
    command = ' '.join(['python', f'bench/{Path(sys.argv[0]).name}', *words])
    return dict(machine=machine, threads=torch.get_num_threads(), versions=versions(), load_average=round(os.getloadavg()[0], 2),
        command=command, date=datetime.date.today().isoformat())

def peers(*names):
    "Versions of what is compared with; None where not installed"
    def of(name):
        try: return version(name)
        except PackageNotFoundError: return None
    return {name: of(name) for name in names}

def available(): "Names of the scan backends that work here"; return [k for k, v in backends().items() if v.available]

# ---------------------------------------------------------------- what else runs
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
        return round(max(0., (everything-own)/max(time.perf_counter()-self.at, 1e-9)), 2)
    def report(self):
        "For a row: what others used, and whether that is too much"
        cores = self.cores()
        return dict(other_processes_cores=cores, busy=(cores or 0) > BUSY)

# ---------------------------------------------------------------- processes of their own
def in_child(script, job, threads, allocator='default'):
    "What `script --child JOB` prints as JSON: what was allocated for one measurement must not speed up the next"
    command = [sys.executable, str(script), '--child', json.dumps(job), '--threads', str(threads)]
    env = {k: v for k, v in os.environ.items() if k not in ALLOCATORS['kept']} | ALLOCATORS[allocator] | dict(OMP_NUM_THREADS=str(threads))
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode: raise RuntimeError(f'{Path(script).name} --child {json.dumps(job)} failed:\n{done.stderr[-2000:]}')
    return json.loads(done.stdout.splitlines()[-1])

def forked(function, *args):
    "What a function returns in a process forked from one that has only imported what the script imports"
    with ProcessPoolExecutor(1, mp_context=get_context('forkserver')) as pool: return pool.submit(function, *args).result()

def stored(path, head, rows, **facts):
    "Write rows under their head; rows of an earlier run on the same machine and versions stay. Returns all rows"
    same = ('machine', 'versions')
    old = read_json(path) if Path(path).exists() else {}
    kept = old.get('rows', {}) if all(old.get(k) == head[k] for k in same) else {}
    stamp = {k: head[k] for k in ('date', 'command', 'threads', 'load_average')}
    rows = {**kept, **{k: dict(v, measured={**stamp, **v.get('measured', {})}) for k, v in rows.items()}}
    bars = [bar for row in rows.values() for bar in row.get('bars', [])]
    waiting = {k: os.environ.get(k, 'not set') for k in ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT')}
    write_json(path, dict(head, **facts, waiting=waiting, allocators=ALLOCATORS, rows=rows, bars_reached=all(b['reached'] for b in bars),
        bars_missed=[f'{k}: {told(b)}' for k, row in rows.items() for b in row.get('bars', []) if not b['reached']],
        busy=any(r['measured'].get('busy', False) for r in rows.values())))
    return rows

# ---------------------------------------------------------------- time
def milliseconds(call):
    start = time.perf_counter()
    call()
    return 1e3*(time.perf_counter()-start)

def interleaved(calls, rounds, *, most=None, turn=.3):
    """Milliseconds of calls taken in turns; every round gives each at least one run and up to `turn` seconds. The first two do not
    count; every second round goes backwards.

    most: name -> number of runs, for calls so slow that fewer do; their first one counts, so let them run once before.
    """
    few = most or {}
    for k, f in calls.items():
        if k not in few: f()        # what a first call brings with it must not decide how many runs fit into a turn
    first = {k: milliseconds(f) for k, f in calls.items()}
    runs = {k: max(1, min(200, int(1e3*turn/max(v, 1e-3)))) for k, v in first.items()}
    taken = {k: [first[k]] if k in few else [] for k in calls}
    for i in range(rounds):
        for k, f in list(calls.items())[::-1 if i % 2 else 1]:      # there and back: nobody always follows the same neighbour
            wanted = min(runs[k], few[k]-len(taken[k])) if k in few else runs[k]
            taken[k] += [milliseconds(f) for _ in range(wanted)]
    return {k: summary(v) for k, v in taken.items()}

def summary(taken): "Median, least and number of some times"; return dict(median=median(taken), least=min(taken), repeats=len(taken))

def ratios(ms, base):
    "name -> how many times as fast as `base`, from the medians"
    return {k: ms[base]['median']/v['median'] for k, v in ms.items() if k != base} if base in ms else {}

# ---------------------------------------------------------------- what several scripts time
def one_step(made, batch):
    "A function without arguments: one step of a recipe, all its phases"
    optimisers = made.optimisers()
    def step():
        memory = None
        for phase in made.phases:
            named, memory = made.losses(phase, batch, memory)
            optimisers[phase].zero_grad()
            named['total'].backward()
            optimisers[phase].step()
    return step

# ---------------------------------------------------------------- bars
def bar(what, got, at_least=None, at_most=None):
    "A demand and whether it is met; what was not measured does not meet it"
    ok = got is not None and (at_least is None or got >= at_least) and (at_most is None or got <= at_most)
    limits = {k: v for k, v in dict(at_least=at_least, at_most=at_most).items() if v is not None}
    return dict(what=what, **limits, got=got, reached=bool(ok))

def told(b):
    "A bar as text"
    wanted = f'>= {b["at_least"]:g}' if 'at_least' in b else f'<= {b["at_most"]:g}'
    got = 'not measured' if b['got'] is None else f'{b["got"]:.3g}'
    return f'{b["what"]}: {got} ({wanted}){"" if b["reached"] else " MISSED"}'

# ---------------------------------------------------------------- memory
def resident(key):
    "A line of /proc/self/status in bytes: VmRSS now, VmHWM at its highest"
    return next(int(w.split()[1])*1024 for w in Path('/proc/self/status').read_text().splitlines() if w.startswith(key))

def trim():
    "Give freed memory back to the system, so that it cannot be used again uncounted"
    with contextlib.suppress(OSError, AttributeError): ctypes.CDLL(None).malloc_trim(0)

def growth(call):
    "Bytes by which the resident set grows at its highest during a call, what it returns included; None where the system cannot say"
    mark = Path('/proc/self/clear_refs')
    if not mark.exists(): return None
    trim()
    mark.write_text('5')
    before = resident('VmRSS')
    kept = call()
    return resident('VmHWM')-before if kept is not None else 0

# ---------------------------------------------------------------- limits of the chip
def copy_speed(numbers=2**26):
    "Bytes per second of a copy of 256 MiB within memory, read and written counted"
    a, b = torch.empty(numbers), torch.ones(numbers)
    least = min(milliseconds(lambda: a.copy_(b)) for _ in range(6))
    return 2*4*numbers/(least/1e3)

def multiply_speed(size=1024):
    "Multiply-adds per second, the best of a matrix product and of a convolution, which are libraries' fastest loops"
    a = torch.randn(size, size)
    x, w = torch.randn(1, 256, size//16, size//16), torch.randn(256, 256, 3, 3)
    works = {lambda: a @ a: size**3, lambda: torch.conv2d(x, w): (size//16-2)**2*9*256**2}
    with torch.no_grad(): return max(n/(min(milliseconds(f) for _ in range(10))/1e3) for f, n in works.items())
