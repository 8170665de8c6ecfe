"""All GPU checks and timings of the scan in one run of under five minutes: `python bench/gpu.py`, writes bench/results/gpu-NAME.json.

Checks: values and gradients of every GPU backend against the float64 reference on the shapes of the test suite, as many of 200 as
their share of the time allows (each new form of input is compiled anew; `--budget 3600` reaches all).
Time: milliseconds between two CUDA events, median and least of the repeats, the backends taken in turns.
Memory: growth of the allocator's peak over what was allocated before the call. Limits: bytes of a fused scan over the speed of a
device-to-device copy, exponentials over the speed of a kernel that does nothing else, both measured here.
"""
import argparse
import re
import sys
import time
from pathlib import Path
from statistics import median

import torch
from machine import described, one_step

from i2i_mamba_nb.core import network, recipe, write_json
from i2i_mamba_nb.ssm import backends, selective_scan
from i2i_mamba_nb.ssm.gpu_kernels import constexpr, jit, mamba_ssm_takes, scan_bytes, tl, triton
from i2i_mamba_nb.ssm.parallel import equal_groups
from i2i_mamba_nb.ssm.recurrence import ScanInputs, reference

RESULTS = Path(__file__).resolve().parent/'results'
SHAPES = dict(S1=(1, 512, 4096), S1b=(4, 512, 4096), S2=(1, 64, 65536), S3=(1, 1024, 1024))  # batch, channels, length
STATES, REFERENCE_LIMIT = 16, 1024  # the reference is timed up to this length, forward only
LENGTHS = [1, 2, 3, 7, 15, 16, 17, 31, 33, 64, 97, 127, 128, 200]
TOLERANCE = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (2e-2, 2e-2), torch.float16: (2e-2, 2e-2)}  # values, gradients
CHECKED = ['chunked', 'triton', 'mamba_ssm']

class Budget:
    "Seconds left of a run; what was left out, by name"
    def __init__(self, seconds, clock=time.monotonic): self.end, self.clock, self.skipped = clock()+seconds, clock, []
    def left(self): return self.end-self.clock()
    def allows(self, name, seconds):
        if self.left() >= seconds: return True
        self.skipped.append(name)
        return False

def slug(name): return re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')

# ---------------------------------------------------------------- values and gradients
def draw(seed):
    "(inputs, softplus) of a random form and size in float64, some of them not contiguous"
    g = torch.Generator().manual_seed(seed)
    pick = lambda options: options[torch.randint(len(options), (), generator=g).item()]
    l, b, d, n = LENGTHS[seed % len(LENGTHS)], pick([1, 2, 3]), pick([1, 2, 3, 4, 5, 6, 17, 33]), pick(list(range(1, 17)))
    def rand(*shape):
        x = torch.randn(*shape, generator=g, dtype=torch.float64)
        return x if pick([0, 1, 2]) else x.transpose(0, -1).contiguous().transpose(0, -1)
    groups, softplus = pick([k for k in (1, 2, 3, d) if d % k == 0]), bool(pick([0, 1]))
    def weight(): return pick([lambda: rand(d, n), lambda: rand(b, n, l), lambda: rand(b, groups, n, l), lambda: rand(b, groups, n, l)])()
    maybe = lambda *shape: rand(*shape) if pick([0, 1]) else None
    positive = lambda x: x if softplus or x is None else x.abs()*.4
    return ScanInputs(rand(b, d, l), positive(rand(b, d, l)), -torch.exp(rand(d, n)), weight(), weight(), maybe(d), maybe(b, d, l),
        positive(maybe(d)), maybe(b, d, n)), softplus

def gradients(y, last, inputs, gy, gl):
    "Gradients of sum(y gy) + sum(last gl)"
    return torch.autograd.grad([y, last], [x for x in inputs if x is not None], [gy.to(y), gl.to(last)])

def off(got, exact):
    "Largest error relative to the largest value; infinite where not finite"
    if not torch.isfinite(got).all(): return float('inf')
    return ((got.cpu().double()-exact).abs().max()/exact.abs().max().clamp(min=1e-30)).item()

def check(name, seed, dtype, device):
    "(error of the values, error of the gradients) of one backend on one random scan; None where the backend does not take it"
    drawn, softplus = draw(seed)
    mine = ScanInputs(*(None if x is None else x.to(device, dtype).requires_grad_() for x in drawn))
    if name == 'mamba_ssm' and mamba_ssm_takes(equal_groups(mine)): return None
    exact = [None if x is None else x.detach().cpu().double().requires_grad_() for x in mine]
    y, last = reference(*exact[:8], softplus, True, initial_state=exact[8])
    g = torch.Generator().manual_seed(seed)
    gy, gl = (torch.randn(x.shape, generator=g).to(dtype).double() for x in (y, last))
    wanted = gradients(y, last, exact, gy, gl)
    y_mine, last_mine = selective_scan(*mine[:8], softplus, True, initial_state=mine[8], backend=name)
    found = gradients(y_mine, last_mine, mine, gy, gl)
    values = max(off(y_mine.detach(), y.detach()), off(last_mine.detach(), last.detach()))
    return values, max(off(p, q) for p, q in zip(found, wanted, strict=True))

def checks(name, dtype, seeds, budget, device):
    "Worst errors of a backend over many random scans, within the tolerance or not"
    worst, done, refused, where = (0., 0.), 0, 0, (None, None)
    for seed in seeds:
        if budget.left() <= 0: break
        result = check(name, seed, dtype, device)
        refused += result is None
        if result is None: continue
        done += 1
        where = tuple(seed if r > w else k for r, w, k in zip(result, worst, where, strict=True))
        worst = tuple(max(w, r) for w, r in zip(worst, result, strict=True))
    return dict(values=worst[0], gradients=worst[1], worst_seeds=where, checked=done, not_taken=refused, asked=len(seeds),
        within=done > 0 and all(w <= t for w, t in zip(worst, TOLERANCE[dtype], strict=True)))

# ---------------------------------------------------------------- limits of the chip
@jit
def only_exponentials(out, rounds, width: constexpr):
    x = tl.arange(0, width)*1e-3
    for _ in range(rounds): x = tl.exp2(-x)
    tl.store(out+tl.program_id(0)*width+tl.arange(0, width), x)

def milliseconds(function, device, repeats=10):
    "Times of some calls, after one that does not count"
    function()
    taken = []
    for _ in range(repeats):
        if device.type == 'cuda':
            a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            a.record(), function(), b.record()
            torch.cuda.synchronize(device)
            taken.append(a.elapsed_time(b))
        else:
            start = time.perf_counter()
            function()
            taken.append(1e3*(time.perf_counter()-start))
    return taken

def bandwidth(device, size=2**30):
    "Bytes per second of a copy within the device's memory, read and written counted"
    a, b = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    return 2*size/(median(milliseconds(lambda: b.copy_(a), device))/1e3)

def exponential_rate(device, rounds=4096, width=1024):
    "Exponentials per second of a kernel that does nothing else; None without Triton"
    if triton is None or device.type != 'cuda': return None
    programs = 16*torch.cuda.get_device_properties(device).multi_processor_count
    out = torch.empty(programs*width, device=device)
    taken = milliseconds(lambda: only_exponentials[programs,](out, rounds, width, num_warps=4), device)
    return programs*width*rounds/(median(taken)/1e3)

def fractions(shape, ms, speed, rate):
    "Fractions of the two limits that a forward scan reaches"
    (b, d, l), seconds = shape, ms/1e3
    by_memory = scan_bytes(b, d, l, STATES)['fused']/speed/seconds
    return dict(memory=by_memory, exponentials=None if rate is None else b*d*l*STATES/rate/seconds)

# ---------------------------------------------------------------- timings
def inputs(shape, device, seed=0):
    "u, delta, A, B, C, D, z, delta_bias of a scan like a freshly initialised Mamba's"
    g, (b, d, l), n = torch.Generator().manual_seed(seed), shape, STATES
    r = lambda *s: torch.randn(*s, generator=g)
    A = -torch.arange(1., n+1).repeat(d, 1)
    made = [r(b, d, l), .5*r(b, d, l), A, r(b, n, l), r(b, n, l), torch.ones(d), None, torch.full((d,), -4.6)]
    return [None if x is None else x.to(device).requires_grad_() for x in made]

def caller(name, x, mode):
    "A function without arguments: one forward, or one forward and backward"
    def forward():
        with torch.no_grad(): return selective_scan(*x, True, backend=name)
    def both():
        y = selective_scan(*x, True, backend=name)
        return torch.autograd.grad(y, [k for k in x if k is not None], torch.ones_like(y))
    return forward if mode == 'forward' else both

def peak(function, device):
    "Bytes by which the allocator's peak grows during a call"
    if device.type != 'cuda': return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    kept = function()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)-before if kept is not None else 0

def row(shape, mode, names, limits, device, repeats=15):
    "Times, memory and fractions of the limits of all backends at one shape, taken in turns"
    x = inputs(shape, device)
    calls = {k: caller(k, x, mode) for k in names if k != 'reference' or (mode == 'forward' and shape[2] <= REFERENCE_LIMIT)}
    bytes_of, taken = {k: peak(f, device) for k, f in calls.items()}, {k: [] for k in calls}
    for i in range(repeats):
        for k, f in calls.items():
            if k != 'reference' or i < 2: taken[k] += milliseconds(f, device, 1)
    ms = {k: dict(median=median(v), least=min(v), repeats=len(v)) for k, v in taken.items()}
    out = dict(shape=dict(zip('bdl', shape, strict=True), n=STATES), mode=mode, ms=ms, extra_bytes=bytes_of)
    if mode == 'forward': out['fraction_of_limit'] = {k: fractions(shape, v['median'], *limits) for k, v in ms.items()}
    if 'mamba_ssm' in ms: out['times_as_fast_as_mamba_ssm'] = {k: ms['mamba_ssm']['median']/v['median'] for k, v in ms.items()}
    return out

# ---------------------------------------------------------------- the whole network
def training_step(device, size=256, repeats=5, **config):
    "Seconds of a full-scale I2I-Mamba training step, batch 1, both phases"
    torch.manual_seed(0)
    generator = network('i2i_mamba').build(**config)
    judge = network('patchgan').build(n_channels=generator.config['n_sources']+1)
    made = recipe('paired_adversarial').build(generator=generator.to(device), discriminator=judge.to(device))
    batch = dict(source=torch.randn(1, generator.config['n_sources'], size, size, device=device),
        target=torch.randn(1, 1, size, size, device=device))
    return dict(seconds=median(milliseconds(one_step(made, batch), device, repeats))/1e3, size=size, batch=1, network=generator.config)

def volume(device, size=256, slices=100, batch=10, repeats=3, **config):
    "Seconds for all slices of a volume through the network, from and to the host's memory"
    torch.manual_seed(0)
    generator = network('i2i_mamba').build(**config).to(device).eval()
    pictures = torch.randn(slices, generator.config['n_sources'], size, size)
    @torch.no_grad()
    def through(): return torch.cat([generator(p.to(device)).cpu() for p in pictures.split(batch)])
    seconds = median(milliseconds(through, device, repeats))/1e3
    return dict(seconds=seconds, size=[size, size, slices], batch=batch, network=generator.config)

# ---------------------------------------------------------------- the run
def all_checks(budget, share, device):
    "Checks of every backend and dtype, each with an equal part of the share"
    names = [k for k in CHECKED if backends()[k].available]
    plan = [(k, t, n) for k in names for t, n in ((torch.float32, 200), (torch.bfloat16, 40), (torch.float16, 40))]
    out = {}
    for i, (name, dtype, count) in enumerate(plan):
        part = Budget(min(share/(len(plan)-i), budget.left()))
        key, start = f'{name} {str(dtype).removeprefix("torch.")}', part.left()
        out[key] = checks(name, dtype, range(count), part, device)
        share -= start-part.left()
        if out[key]['checked']+out[key]['not_taken'] < count: budget.skipped.append(f'{key}: checks after {out[key]["checked"]}')
        print(key, out[key], flush=True)
    return out

def all_rows(budget, limits, device):
    "Every shape, forward and with backward"
    names, out = [k for k in ['reference', *CHECKED] if backends()[k].available], {}
    for shape in SHAPES:
        for mode in ('forward', 'both'):
            key = f'{shape} {mode}'
            if not budget.allows(key, 10): continue
            out[key] = row(SHAPES[shape], mode, names, limits, device)
            print(key, {k: round(v['median'], 3) for k, v in out[key]['ms'].items()}, 'ms', flush=True)
    return out

def measured(seconds, device):
    "Everything, within so many seconds"
    budget = Budget(seconds)
    limits = bandwidth(device), exponential_rate(device)
    print(f'{limits[0]/1e9:.0f} GB/s, {"no rate" if limits[1] is None else f"{limits[1]/1e9:.0f} G exponentials/s"}', flush=True)
    found = dict(rows=all_rows(budget, limits, device), bandwidth=limits[0], exponential_rate=limits[1])
    for name, measure in dict(training_step=training_step, volume=volume).items():
        if budget.allows(name, 25): found[name] = measure(device)
    found['checks'] = all_checks(budget, max(0., budget.left()-10), device)
    ok = all(c['within'] for c in found['checks'].values())
    return dict(found, skipped=budget.skipped, all_within=ok, budget_seconds=seconds, seconds=seconds-budget.left())

def record(found, name, capability):
    "What is written: figures under the machine they were taken on"
    availability = {k: v._asdict() for k, v in backends().items()}
    return dict(described(), device=name, capability=list(capability), cuda=torch.version.cuda, backends=availability, **found)

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--budget', type=float, default=280, help='seconds for the whole run')
    p.add_argument('--out', type=Path, default=RESULTS, help='folder for the results')
    options = p.parse_args()
    if not torch.cuda.is_available(): sys.exit('bench/gpu.py needs a CUDA device and torch sees none: nothing was measured or written.')
    device, name = torch.device('cuda'), torch.cuda.get_device_name()
    found = record(measured(options.budget, device), name, torch.cuda.get_device_capability())
    path = options.out/f'gpu-{slug(name)}.json'
    write_json(path, found)
    print(f'{path} written; all within tolerance: {found["all_within"]}; left out: {found["skipped"] or "nothing"}')
    if not found['all_within']: sys.exit(1)

if __name__ == '__main__': main()
