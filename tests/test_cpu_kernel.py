"The compiled scan, every build that loads here, against a float64 loop; properties, extremes, threads, damaged files"
import ctypes
import functools
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
import torch.nn.functional as F

from i2i_mamba_nb.ssm import cpu_kernel
from i2i_mamba_nb.ssm.cpu_kernel import (
    LARGE,
    BUILDS,
    OrderedInputs,
    Pool,
    Scan,
    border_size,
    build_path,
    build_reasons,
    cpu_backward,
    cpu_forward,
    cpu_takes,
    find_kernel,
    kernel,
    load_build,
    n_threads,
    new,
    ordered_backward,
    ordered_forward,
)
from i2i_mamba_nb.ssm.parallel import equal_groups
from i2i_mamba_nb.ssm.recurrence import ScanInputs

ROOT = Path(__file__).resolve().parent.parent
LENGTHS = [1, 2, 3, 7, 15, 16, 17, 31, 33, 64, 97, 127, 128, 200]
NAMES = ScanInputs._fields
on_seeds = pytest.mark.parametrize('half', [0, 1], ids=['seeds 0-99', 'seeds 100-199'])

def loaded(name):
    "A build, or a skip with the reason it is not to be had here"
    try: return load_build(name)
    except OSError as e: return pytest.skip(f'{name}: {e}')

@pytest.fixture(params=BUILDS)
def build(request): return loaded(request.param)

@pytest.fixture
def best(): return kernel() or pytest.skip(f'no build: {build_reasons()}')

# ---------------------------------------------------------------- the oracle
def loop(inputs, softplus=True):
    "y and last state, one step at a time in the dtype of the inputs; nothing taken from the package"
    u, delta, A, B, C, D, z, bias, h = inputs
    b, d, l = u.shape
    dt = delta if bias is None else delta+bias[:, None]
    if softplus: dt = torch.where(dt > 20, dt, torch.log1p(torch.exp(dt.clamp(max=20))))
    def rows(w):
        "(b d n l)"
        if w.ndim == 2: return w[None, :, :, None].expand(b, d, -1, l)
        w = w if w.ndim == 4 else w[:, None]
        return w.repeat_interleave(d//w.shape[1], 1)
    decay, gain, C = torch.exp(dt[:, :, None]*A[:, :, None]), (dt*u)[:, :, None]*rows(B), rows(C)
    h, states = torch.zeros_like(gain[..., 0]) if h is None else h, []
    for a, x in zip(decay.unbind(-1), gain.unbind(-1), strict=True):
        h = a*h+x
        states.append(h)
    y = (torch.stack(states, -1)*C).sum(2)
    if D is not None: y = y+D[:, None]*u
    return (y if z is None else y*z*torch.sigmoid(z)), h

def draw(seed, length=None, sizes=None):
    "Inputs of a random form and size, in random layouts; (ScanInputs of float32, softplus)"
    g = torch.Generator().manual_seed(seed)
    pick = lambda options: options[torch.randint(len(options), (), generator=g).item()]
    l = length or (LENGTHS[seed % len(LENGTHS)])
    b, d, n = sizes or (pick([1, 2, 3]), pick([1, 2, 3, 4, 5, 6, 17, 33]), pick([*range(1, 17), *range(1, 17), 20, 33, 64]))
    def rand(*shape):
        x = torch.randn(*shape, generator=g)
        kind = pick(['plain', 'plain', 'every second', 'channels last', 'time first'])
        if kind == 'plain': return x
        if kind == 'every second': return x.repeat_interleave(2, -1)[..., ::2]
        return x.mT.contiguous().mT if kind == 'channels last' and x.ndim > 1 else x.transpose(0, -1).contiguous().transpose(0, -1)
    def weight():
        form, k = pick(['d n', 'b n l', 'b g n l', 'b g n l']), pick([k for k in (1, 2, 3, 17, d) if d % k == 0])
        return rand(d, n) if form == 'd n' else rand(b, n, l) if form == 'b n l' else rand(b, k, n, l)
    maybe = lambda *shape: rand(*shape) if pick([0, 1]) else None
    softplus = bool(pick([0, 1]))
    delta, bias = rand(b, d, l), maybe(d)
    if not softplus: delta, bias = .5*delta.abs(), None if bias is None else bias.abs()
    return ScanInputs(rand(b, d, l), delta, -rand(d, n).exp(), weight(), weight(), maybe(d), maybe(b, d, l), bias, maybe(b, d, n)), softplus

def to(inputs, dtype, grad=False):
    "In another dtype, strides kept"
    return type(inputs)(*(x if x is None or not x.is_floating_point() else
        x.detach().to(dtype, memory_format=torch.preserve_format).requires_grad_(grad) for x in inputs))

def differentiated(inputs, softplus, weights, function=loop):
    "(y, last, gradients of the inputs that are there) of the loop"
    out = function(inputs, softplus)
    there = [x for x in inputs if x is not None]
    return [o.detach() for o in out], torch.autograd.grad(out, there, [w.to(o.dtype) for w, o in zip(weights, out, strict=True)])

def error(got, wanted):
    "Largest error relative to the largest value wanted"
    return ((got.double()-wanted.double()).abs().max()/wanted.double().abs().max().clamp(min=1e-25)).item()

@functools.cache
def case(seed):
    "Inputs, gradient weights, results in float64 and what a plain float32 loop makes of the same inputs"
    inputs, softplus = draw(seed)
    g = torch.Generator().manual_seed(seed+1)
    weights = [torch.randn(o.shape, generator=g) for o in loop(inputs, softplus)]
    exact = differentiated(to(inputs, torch.float64, True), softplus, weights)
    return inputs, softplus, weights, exact, differentiated(to(inputs, torch.float32, True), softplus, weights)

def both(inputs, softplus, weights, build, threads=0):
    "y, last state and gradients of the compiled scan; B and C with the groups that were given"
    equal = equal_groups(inputs)
    y, last, borders = cpu_forward(equal, softplus, threads=threads, build=build)
    grads = cpu_backward(weights[0].to(y.dtype), weights[1], equal, borders, softplus, threads=threads, build=build)
    def fold(name, x, g):
        "Gradient of a weight whose groups were repeated to make them equal"
        if x is None or name not in 'BC' or x.ndim == 2: return g
        k = 1 if x.ndim == 3 else x.shape[1]
        return g.float().unflatten(1, (k, -1)).sum(2).reshape(x.shape).to(x.dtype)
    return [y, last], [fold(*p) for p in zip(NAMES, inputs, grads, strict=True)]

def worst(got, wanted): return max(error(g, w) for g, w in zip(got, wanted, strict=True))

def output_gradients(b, d, n, l):
    "Gradients of y and the last state, the same at every call"
    g = torch.Generator().manual_seed(b*d*n*l)
    return [torch.randn(b, d, l, generator=g), torch.randn(b, d, n, generator=g)]

def within(got, wanted, plain, floor):
    "Whether the error is at most four times the one that a float32 loop makes on the same inputs, or below `floor`"
    return worst(got, wanted) <= max(4*worst(plain, wanted), floor)

# ---------------------------------------------------------------- values and gradients
@on_seeds
def test_200_shapes(build, half):
    for seed in range(100*half, 100*half+100):
        inputs, softplus, weights, exact, plain = case(seed)
        out, grads = both(inputs, softplus, weights, build)
        assert all(o.shape == e.shape and o.dtype == torch.float32 for o, e in zip(out, exact[0], strict=True))
        assert within(out, exact[0], plain[0], 5e-7), (seed, worst(out, exact[0]), worst(plain[0], exact[0]))
        assert [g is None for g in grads] == [x is None for x in inputs]
        there = [g for g in grads if g is not None]
        for x, g in zip([x for x in inputs if x is not None], there, strict=True): assert g.shape == x.shape and g.dtype == x.dtype
        assert within(there, exact[1], plain[1], 2e-6), (seed, worst(there, exact[1]), worst(plain[1], exact[1]))

def test_the_200_cover_the_forms():
    drawn = [case(seed)[:2] for seed in range(200)]
    assert {x.u.shape[-1] for x, _ in drawn} == set(LENGTHS) and {x.u.shape[1] for x, _ in drawn} == {1, 2, 3, 4, 5, 6, 17, 33}
    assert {x.A.shape[1] for x, _ in drawn} >= {*range(1, 17), 20, 33, 64} and {x.u.shape[0] for x, _ in drawn} == {1, 2, 3}
    assert {(x.B.ndim, x.C.ndim) for x, _ in drawn} == {(i, j) for i in (2, 3, 4) for j in (2, 3, 4)}
    assert any(x.B.ndim == x.C.ndim == 4 and x.B.shape[1] != x.C.shape[1] for x, _ in drawn)
    for i in range(5, 9): assert {x[i] is None for x, _ in drawn} == {True, False}
    assert {s for _, s in drawn} == {True, False} and sum(x.u.stride(1) == 1 and x.u.shape[1] > 1 for x, _ in drawn) > 20
    assert sum(x.u.stride(-1) == 2 for x, _ in drawn) > 20

def half_case(seed, dtype):
    inputs, softplus = draw(seed)
    return to(inputs, dtype), softplus

@pytest.mark.parametrize('dtype, tolerance', [(torch.bfloat16, 4e-3), (torch.float16, 6e-4)], ids=['bf16', 'f16'])
def test_inputs_of_half_the_bytes(build, dtype, tolerance):
    for seed in range(40):
        inputs, softplus = half_case(seed, dtype)
        (b, d, l), n = inputs.u.shape, inputs.A.shape[1]
        g = torch.Generator().manual_seed(seed)
        weights = [torch.randn(b, d, l, generator=g).to(dtype).float(), torch.randn(b, d, n, generator=g)]
        exact = differentiated(to(inputs, torch.float64, True), softplus, weights)
        (y, last), grads = both(inputs, softplus, weights, build)
        assert y.dtype == dtype and last.dtype == torch.float32 and error(last, exact[0][1]) < 2e-6
        assert error(y, exact[0][0]) < tolerance, (seed, error(y, exact[0][0]))
        there = [(k, x, g) for k, x, g in zip(NAMES, inputs, grads, strict=True) if x is not None]
        for (k, x, g), e in zip(there, exact[1], strict=True):
            folded = 2 if k in 'BC' else 1      # sums over repeated groups are rounded twice
            assert g.dtype == x.dtype and error(g, e) < folded*tolerance, (seed, k, error(g, e))

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=['bf16', 'f16'])
@pytest.mark.parametrize('scale', [1., .37, 1.7e-3, 91.])
def test_every_half_is_widened_and_rounded_as_torch_does(build, dtype, scale):
    "All 65536 bit patterns through y = D u, in three layouts"
    u = torch.arange(-2**15, 2**15).to(torch.int16).view(dtype).view(1, 32, 2048)
    zero, still = torch.zeros(32, 1), torch.zeros(1, 32, 2048)
    D = torch.full((32,), scale)
    wanted = (u.float()*scale).to(dtype)
    for way in (u, u.mT.contiguous().mT, u.repeat_interleave(2, -1)[..., ::2]):
        y = cpu_forward(ScanInputs(way, still, zero, zero, zero, D), False, False, build=build)[0]
        assert torch.equal(y[u.isfinite()], wanted[u.isfinite()])
        assert y[~u.isfinite()].isnan().all()       # what is infinite meets a step of zero

def test_layouts_give_the_same_bits(build):
    "Where a tensor's elements lie does not change what is computed"
    inputs, softplus = draw(3, length=77, sizes=(2, 34, 5))
    plain = ScanInputs(*(None if x is None else x.contiguous() for x in inputs))
    ways = [lambda x: x.mT.contiguous().mT if x.ndim > 2 else x, lambda x: x.repeat_interleave(3, -1)[..., ::3],
        lambda x: torch.cat([x, x])[len(x):],
        lambda x: x.transpose(0, -1).contiguous().transpose(0, -1)]
    weights = output_gradients(2, 34, 5, 77)
    out, grads = both(plain, softplus, weights, build, threads=1)
    for way in ways:
        turned = ScanInputs(*(None if x is None else way(x) for x in plain))
        out2, grads2 = both(turned, softplus, [way(w) for w in weights], build, threads=1)
        for i, j in zip([*out, *grads], [*out2, *grads2], strict=True): assert (i is None and j is None) or torch.equal(i, j)

def test_results_have_the_layout_of_the_input(build):
    inputs, _ = draw(3, length=64, sizes=(2, 32, 5))
    last = ScanInputs(*(None if x is None else x.mT.contiguous().mT if x.ndim == 3 else x.contiguous() for x in inputs))
    assert cpu_forward(equal_groups(last), True, build=build)[0].stride() == last.u.stride()

def test_backward_needs_no_border_of_its_own(build):
    "keep=False gives the same output and keeps nothing; border_size says how much is kept otherwise"
    inputs, softplus = draw(5, length=97)
    inputs = equal_groups(inputs)
    y, last, borders = cpu_forward(inputs, softplus, build=build)
    y2, last2, none = cpu_forward(inputs, softplus, False, build=build)
    assert torch.equal(y, y2) and torch.equal(last, last2) and none.numel() == 0
    assert borders.numel() == border_size(inputs, build.width, build.chunk)

# ---------------------------------------------------------------- properties, 200 examples each
def small(seed, **change):
    "A small scan on one thread"
    g = torch.Generator().manual_seed(1000+seed)
    length = torch.randint(2, 70, (), generator=g).item()
    inputs, softplus = draw(seed, length, (1+seed % 2, [1, 3, 6, 17][seed//2 % 4], 1+seed % 9))
    return equal_groups(inputs)._replace(**change), softplus, g

def run(inputs, softplus, build): return cpu_forward(inputs, softplus, False, build=build, threads=1)[:2]
def part(inputs, first, end, **change):
    "Steps first..end of a scan"
    flowing = {k: x for k, x in inputs._asdict().items() if x is not None and (k in ('u', 'delta', 'z') or k in 'BC' and x.ndim == 4)}
    return inputs._replace(**{k: x[..., first:end] for k, x in flowing.items()}, **change)

def test_linear_in_u(build):
    for seed in range(200):
        x, softplus, g = small(seed, initial_state=None)
        v, s = torch.randn(x.u.shape, generator=g), torch.randn((), generator=g)
        one, two, sum_ = (run(x._replace(u=u), softplus, build)[0] for u in (x.u, v, x.u+s*v))
        assert (sum_-(one+s*two)).abs().max() <= 1e-5*max(one.abs().max(), two.abs().max(), 1e-6), seed

def test_causal(build):
    for seed in range(200):
        x, softplus, g = small(seed)
        at = torch.randint(1, x.u.shape[-1], (), generator=g).item()
        change = {}
        for k in ('u', 'delta', 'z', 'B', 'C'):
            t = getattr(x, k)
            if t is None or t.ndim == 2: continue
            change[k] = t.clone()
            change[k][..., at:] += 1
        before, after = run(x, softplus, build)[0], run(x._replace(**change), softplus, build)[0]
        assert torch.equal(before[..., :at], after[..., :at]) and not torch.equal(before, after), seed

def test_split_and_carry_is_the_whole(build):
    for seed in range(200):
        x, softplus, g = small(seed)
        at = torch.randint(1, x.u.shape[-1], (), generator=g).item()
        y, last = run(x, softplus, build)
        y1, h = run(part(x, 0, at), softplus, build)
        y2, h = run(part(x, at, None, initial_state=h), softplus, build)
        assert error(torch.cat([y1, y2], -1), y) < 1e-6 and error(h, last) < 1e-6, seed

def test_without_steps_the_direct_path_is_left(build):
    for seed in range(200):
        x, _, g = small(seed, delta_bias=None, initial_state=None, z=None)
        D = torch.randn(x.u.shape[1], generator=g)
        y, last = run(x._replace(delta=torch.zeros_like(x.u), D=D), False, build)
        assert torch.equal(y, D[:, None]*x.u) and not last.any(), seed

def test_reversal(build):
    "Turned round, scanned and turned back: the sum over later steps, which is the transposed matrix with B and C exchanged"
    for seed in range(200):
        x, softplus, _ = small(seed, D=None, z=None, delta_bias=None, initial_state=None)
        x = part(x, 0, 12)
        turned = ScanInputs(*(v if v is None or v.ndim < 3 else v.flip(-1) for v in x))
        y = run(turned, softplus, build)[0].flip(-1)
        steps = F.softplus(x.delta.double()) if softplus else x.delta.double()
        before = steps.cumsum(-1)-steps     # sum of the steps before each
        passed = before[:, :, None]-before[..., None]       # [t, s]: of the steps t ... s-1
        full = lambda w, d=x.u.shape[1]: (w[None, :, :, None] if w.ndim == 2 else w.repeat_interleave(d//w.shape[1], 1)).double()
        M = torch.exp((passed[:, :, None]*x.A.double()[..., None, None]).clamp(max=0))*full(x.C)[..., None]*full(x.B)[..., None, :]
        wanted = (M.sum(2).triu()*(steps*x.u.double())[:, :, None]).sum(-1)
        assert error(y, wanted) < 1e-5, seed

# ---------------------------------------------------------------- extremes
def extreme(rate, step, l=16384, **change):
    g = torch.Generator().manual_seed(0)
    r = lambda *s: torch.randn(*s, generator=g)
    delta, A = torch.full((1, 2, l), step), torch.full((2, 3), rate)
    return ScanInputs(r(1, 2, l), delta, A, r(1, 1, 3, l), r(1, 1, 3, l), r(2), r(1, 2, l))._replace(**change)

@pytest.mark.parametrize('rate', [-1e-4, -1e3])
@pytest.mark.parametrize('step', [0., 1e-8, 100., -100.])
def test_extremes_stay_finite_and_right(build, rate, step):
    x = extreme(rate, step)
    weights = output_gradients(1, 2, 3, x.u.shape[-1])
    out, grads = both(x, True, weights, build)
    assert all(v.isfinite().all() for v in [*out, *(g for g in grads if g is not None)])
    short = extreme(rate, step, 300)
    assert within(run(short, True, build), loop(to(short, torch.float64)), loop(short), 5e-7)

@pytest.mark.parametrize('rate', [-1e-5, -1e-4, -3e-4, -1e-3, -2.3e-3, -7e-3])
def test_slow_decays_keep_their_rate(build, rate):
    "A constant step: an exponential that errs a little in one direction would add up over the memory"
    x = extreme(rate, 100., 4000)
    assert within(run(x, True, build), loop(to(x, torch.float64)), loop(x), 1e-6)

def test_softplus_over_its_whole_range(build):
    "Through a scan that lets the step size out: A = 0, B = C = u = 1, one step each"
    raw = torch.cat([torch.linspace(-104, 120, 40001), torch.tensor([0., -1e-8, 1e-8, 1e4, -1e4, 3e38, -3e38])])
    one = torch.ones(len(raw), 1, 1)
    got = run(ScanInputs(one, raw.view(-1, 1, 1), torch.zeros(1, 1), one[:, None], one[:, None]), True, build)[0].ravel()
    wanted = F.softplus(raw.double(), threshold=1e9)
    tolerance = (3e-7+1.3e-7*raw.clamp(-90, 0).abs())*wanted+2e-38
    assert got.isfinite().all() and ((got-wanted).abs() <= tolerance).all()

def decays(exponent, build):
    "exp of many numbers as the kernel sees it: h = exp(1 A) h0 and nothing added"
    exponent = exponent.view(-1, 1)
    d = len(exponent)
    one = torch.ones(1, d, 1)
    zero = torch.zeros(1, 1, 1, 1)
    return run(ScanInputs(one, one, exponent, zero, zero, initial_state=torch.ones(1, d, 1)), False, build)[1].ravel()

@pytest.mark.parametrize('low, high', [(-86.9, 0.), (-86.9, 86.9), (-120., 100.)], ids=['free', 'growing', 'clamped'])
def test_exponential(build, low, high):
    "Rounding d a to float32 alone moves the result by |d a| units in the last place; nothing beyond that is lost"
    x = torch.linspace(low, high, 60000)
    got, wanted = decays(x, build).double(), x.double().exp().float().double()
    normal = (wanted > 1.2e-38) & wanted.isfinite()
    assert ((got-wanted).abs()[normal] <= ((2.5+1.05*x.abs())*2**-23*wanted)[normal]).all()
    assert (got[wanted == 0] == 0).all() and (got[wanted.isinf()] == torch.inf).all()
    tiny = (wanted <= 1.2e-38) & (wanted > 0)
    assert ((got-wanted).abs() <= 3e-45+(2.5+1.05*x.abs())*2**-23*wanted)[tiny].all()

def test_overflow_is_as_in_the_loop(build):
    x = extreme(.5, 100., 40, D=None, z=None)
    got, wanted = run(x, True, build), loop(x)
    for o, w in zip(got, wanted, strict=True):
        assert torch.equal(o.isfinite(), w.isfinite()) and torch.equal(o.isnan(), w.isnan())
        assert torch.equal(o[w.isinf()], w[w.isinf()])
    assert got[1].isinf().any()

@pytest.mark.parametrize('value', [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize('name', ['u', 'delta', 'A', 'B', 'C', 'D', 'z', 'delta_bias', 'initial_state'])
def test_what_is_not_a_number_stays_visible(build, name, value):
    g = torch.Generator().manual_seed(2)
    r = lambda *s: torch.randn(*s, generator=g)
    x = ScanInputs(r(1, 18, 40), r(1, 18, 40), -r(18, 3).exp(), r(1, 1, 3, 40), r(1, 1, 3, 40), r(18), r(1, 18, 40), r(18), r(1, 18, 3))
    at = (0,)*(getattr(x, name).ndim-1)+(getattr(x, name).shape[-1]//2,)
    getattr(x, name)[at] = value
    got, wanted = run(x, True, build), loop(x)
    for o, w in zip(got, wanted, strict=True):
        if value != value: assert torch.equal(o.isnan(), w.isnan())
        else: assert (o.isfinite() | ~w.isfinite()).all() and (o[~w.isfinite()].isfinite().sum() == 0)

# ---------------------------------------------------------------- threads
def flat(results): return [x for part in results for x in part if x is not None]

@pytest.mark.parametrize('threads', [1, 2, 3, 8])
def test_same_bits_every_time(build, threads):
    for seed, sizes, length in [(1, (2, 70, 5), 130), (2, (1, 5, 4), 3000), (3, (3, 34, 16), 65), (8, (1, 200, 3), 97)]:
        inputs, softplus = draw(seed, length, sizes)
        weights = output_gradients(*sizes, length)
        first = flat(both(inputs, softplus, weights, build, threads))
        for _ in range(5):
            for i, j in zip(first, flat(both(inputs, softplus, weights, build, threads)), strict=True): assert torch.equal(i, j), seed

def test_thread_counts_agree(build):
    for seed in range(12):
        sizes, length = [((1, 3, 4), 1500), ((2, 40, 5), 120), ((3, 20, 2), 600), ((1, 90, 7), 90)][seed % 4]
        inputs, softplus = draw(seed, length, sizes)
        weights = output_gradients(*sizes, length)
        alone = flat(both(inputs, softplus, weights, build, 1))
        for threads in (2, 3, 8):
            got = flat(both(inputs, softplus, weights, build, threads))
            assert worst(got, alone) < 5e-5, (seed, threads)

class Counted:
    "The library, with the number of stretches it chose written down"
    def __init__(self, library): self.library, self.seen = library, []
    def __getattr__(self, name): return getattr(self.library, name)
    def scan_segments(self, job):
        self.seen.append(self.library.scan_segments(job))
        return self.seen[-1]

@pytest.mark.parametrize('threads', [2, 4, 8])
@pytest.mark.parametrize('channels', [1, 3, 4, 8, 16])
def test_the_length_split_over_threads_gives_the_same(build, channels, threads):
    counted = build._replace(library=Counted(build.library))
    inputs, softplus = draw(channels+threads, 2500, (1, channels, 6))
    weights = output_gradients(1, channels, 6, 2500)
    exact = differentiated(to(inputs, torch.float64, True), softplus, weights)
    got = both(inputs, softplus, weights, counted, threads)
    groups = cpu_kernel.n_groups(*equal_groups(inputs)[3:5])
    units = groups*-(-channels//groups//build.width)
    assert max(counted.library.seen) > 1 or threads < 2*units, counted.library.seen
    alone = both(inputs, softplus, weights, build, 1)
    assert worst(flat(got), flat(alone)) < 5e-5
    for o, e in zip(got[0], exact[0], strict=True): assert error(o, e) < 5e-6

@pytest.mark.parametrize('threads', [2, 8, 16])
def test_slow_decays_pass_from_stretch_to_stretch(build, threads):
    "What a stretch passes on is still there at the end of the sequence, and so are the rounding errors of its summed step sizes"
    g, l = torch.Generator().manual_seed(threads), 4097
    r = lambda *s: torch.randn(*s, generator=g)
    inputs = ScanInputs(r(1, 2, l), .5*r(1, 2, l).abs(), -2e-4*r(2, 6).exp(), r(1, 1, 6, l), r(1, 1, 6, l), r(2), None, None, r(1, 2, 6))
    weights = output_gradients(1, 2, 6, l)
    exact, plain = (differentiated(to(inputs, t, True), False, weights) for t in (torch.float64, torch.float32))
    got = both(inputs, False, weights, build, threads)
    for i in range(2):
        for o, e, p in zip([x for x in got[i] if x is not None], exact[i], plain[i], strict=True): assert within(o, e, p, 2e-6)

@pytest.mark.parametrize('length', [129, 257, 513, 700])
def test_gradients_beyond_one_span(build, length):
    inputs, softplus = draw(length, length, (2, 21, 9))
    weights = output_gradients(2, 21, 9, length)
    exact, plain = (differentiated(to(inputs, t, True), softplus, weights) for t in (torch.float64, torch.float32))
    got = both(inputs, softplus, weights, build)
    for i in range(2):
        for o, e, p in zip([x for x in got[i] if x is not None], exact[i], plain[i], strict=True): assert within(o, e, p, 2e-6)

@pytest.mark.parametrize('fast', [0, 5])
@pytest.mark.parametrize('at', [0, 40, 199])
def test_one_fast_state_and_one_large_step_are_noticed(build, fast, at):
    "Both decide whether exponents of a span must be clamped, wherever they stand"
    g = torch.Generator().manual_seed(7)
    r = lambda *s: torch.randn(*s, generator=g)
    A, delta = -1e-3*torch.ones(3, 6), .1*r(1, 3, 200).abs()
    A[1, fast], delta[0, 1, at] = -1e4, 50.
    inputs = ScanInputs(r(1, 3, 200), delta, A, r(1, 1, 6, 200), r(1, 1, 6, 200), *[None]*4)
    weights = output_gradients(1, 3, 6, 200)
    exact, plain = (differentiated(to(inputs, t, True), False, weights) for t in (torch.float64, torch.float32))
    got = both(inputs, False, weights, build)
    for i in range(2):
        for o, e, p in zip([x for x in got[i] if x is not None], exact[i], plain[i], strict=True): assert within(o, e, p, 2e-6)

def test_every_number_of_a_result_is_written(build, monkeypatch):
    "Fresh memory is often zero, which would hide a number that was forgotten"
    plain = cpu_kernel.new
    def spoiled(*x, zero=False, **how): return plain(*x, zero=True, **how) if zero else plain(*x, **how).fill_(torch.nan)
    monkeypatch.setattr(cpu_kernel, 'new', spoiled)
    for seed in range(30):
        inputs, softplus, weights, _, _ = case(seed)
        assert all(x.isfinite().all() for x in flat(both(inputs, softplus, weights, build)))
    for kind in KINDS:
        x, softplus = image_case(3, kind)
        y, borders = ordered_forward(x, softplus, build=build)
        grads = ordered_backward(y, x, borders, softplus, build=build)
        assert y.isfinite().all() and all(v.isfinite().all() for v in grads if v is not None)

def test_the_split_path_is_taken(best):
    "One block of channels, 8 threads: 8 stretches"
    counted = best._replace(library=Counted(best.library))
    one = torch.ones(1, 2, 2500)
    weight = torch.ones(1, 1, 6, 2500)
    cpu_forward(ScanInputs(one, one, -torch.ones(2, 6), weight, weight), True, threads=8, build=counted)
    assert counted.library.seen == [8]

def test_little_work_runs_on_one_thread():
    assert n_threads(1000) == 1 and n_threads(10**6) == torch.get_num_threads()

def test_two_python_threads_at_once(build):
    jobs = [draw(seed, 700, (2, 40, 7)) for seed in (11, 12)]
    weights = output_gradients(2, 40, 7, 700)
    wanted = [flat(both(*job, weights, build, 2)) for job in jobs]
    wrong = []
    def work(i):
        for _ in range(20):
            got = flat(both(*jobs[i], weights, build, 2))
            if not all(torch.equal(a, b) for a, b in zip(got, wanted[i], strict=True)): wrong.append(i)
    crew = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for t in crew: t.start()
    for t in crew: t.join()
    assert not wrong

class Scans(torch.utils.data.Dataset):
    "Each item is scanned where it is asked for"
    def __len__(self): return 6
    def __getitem__(self, i):
        inputs, softplus = draw(20+i, 300, (2, 40, 7))
        return torch.cat([x.ravel() for x in flat(both(inputs, softplus, [torch.ones(2, 40, 300), torch.ones(2, 40, 7)], kernel()))])

def test_inside_a_data_loader(best):
    "A forked worker, after this process has used its threads"
    here = [Scans()[i] for i in range(6)]
    there = list(torch.utils.data.DataLoader(Scans(), batch_size=None, num_workers=2, multiprocessing_context='fork', timeout=60))
    for a, b in zip(here, there, strict=True): assert error(b, a) < 1e-5

def test_no_memory_is_lost(build):
    inputs, softplus = draw(4, 33, (1, 17, 5))
    inputs, weights = equal_groups(inputs), [torch.ones(1, 17, 33), torch.ones(1, 17, 5)]
    def once():
        y, last, borders = cpu_forward(inputs, softplus, build=build)
        cpu_backward(*weights, inputs, borders, softplus, build=build)
    resident = psutil.Process().memory_info
    for _ in range(500): once()
    before = resident().rss
    for _ in range(10_000): once()
    assert resident().rss-before < 8*2**20

# ---------------------------------------------------------------- directions over an image
def ordered_loop(x, softplus):
    "Each direction gathered, scanned by the loop, written back to its pixels and added"
    c, y = x.u.shape[-1], torch.zeros_like(x.u)
    delta = x.delta if x.delta_weight is None else torch.einsum('bklr,kcr->bklc', x.delta, x.delta_weight)
    for i, row in enumerate(x.order):
        at = row[row >= 0]
        if not len(at): continue
        own = slice(i*c, (i+1)*c)
        there = lambda t, at=at: t[:, at].mT
        bias, D = (None if v is None else v[own] for v in (x.delta_bias, x.D))
        out = loop(ScanInputs(there(x.u), there(delta[:, i]), x.A[own], there(x.B[:, i]), there(x.C[:, i]), D, None, bias), softplus)[0]
        y = y.index_add(1, at, out.mT)
    return y

def orders(kind, l, k, g):
    "k orders of l pixels"
    rows = torch.stack([torch.randperm(l, generator=g) for _ in range(k)])
    if kind == 'raster': rows = torch.arange(l).expand(k, -1)
    if kind == 'reverse': rows = torch.arange(l).flip(0).expand(k, -1)
    if kind == 'mixed': rows[0], rows[-1] = torch.arange(l), torch.arange(l).flip(0)
    if kind == 'shorter':
        for i in range(k): rows[i, max(0, l-1-3*i):] = -1
    if kind == 'skip': rows = rows[:, :max(1, l//2)]
    if kind == 'empty row': rows[k//2] = -1
    if kind == 'empty': rows = torch.full_like(rows, -1)
    return rows

KINDS = 'raster', 'reverse', 'random', 'mixed', 'shorter', 'skip', 'empty row', 'empty'

def image_case(seed, kind):
    "Inputs of an ordered scan in float32, with layouts that vary"
    g = torch.Generator().manual_seed(seed)
    pick = lambda options: options[torch.randint(len(options), (), generator=g).item()]
    b, k, l, c, n = pick([1, 2, 3]), pick([1, 2, 4]), pick([1, 5, 16, 33, 70, 129, 260]), pick([1, 3, 16, 17, 33]), pick([1, 4, 5, 16, 20])
    def r(*s):
        x = torch.randn(*s, generator=g)
        return x if pick([0, 1]) or x.ndim < 3 else x.mT.contiguous().mT if pick([0, 1]) else x.repeat_interleave(2, -1)[..., ::2]
    D, bias = (r(k*c) if pick([0, 1]) else None for _ in 'Db')
    softplus = bool(pick([0, 1]))
    delta = r(b, k, l, c) if softplus else .3*r(b, k, l, c).abs()
    if not softplus and bias is not None: bias = bias.abs()
    x = OrderedInputs(r(b, l, c), delta, -r(k*c, n).exp(), r(b, k, l, n), r(b, k, l, n), D, bias, orders(kind, l, k, g))
    rank = pick([0, 1, 2, 5, 16])
    if not rank: return x, softplus
    factors, weight = r(b, k, l, rank), r(k, c, rank)/rank**.5
    return x._replace(delta=factors if softplus else factors.abs(), delta_weight=weight if softplus else .3*weight.abs()), softplus

def floats(inputs): "The inputs that have gradients"; return [v for v in inputs if v is not None and v.is_floating_point()]

@functools.cache
def image_oracle(seed, kind):
    "Inputs, gradient of y, and (y, gradients) in float64 and float32"
    x, softplus = image_case(seed, kind)
    weight, results = torch.randn(x.u.shape, generator=torch.Generator().manual_seed(seed)), []
    for dtype in (torch.float64, torch.float32):
        given = to(x, dtype, True)
        out, there = ordered_loop(given, softplus), floats(given)
        of = torch.autograd.grad(out, there, weight.to(dtype), allow_unused=True) if out.requires_grad else [None]*len(there)
        results.append((out.detach(), [torch.zeros_like(v) if o is None else o for o, v in zip(of, there, strict=True)]))
    return x, softplus, weight, *results

@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('threads', [1, 3])
def test_directions_of_an_image(build, kind, threads):
    for seed in range(12):
        x, softplus, weight, (exact, of_exact), (plain, of_plain) = image_oracle(seed, kind)
        y, borders = ordered_forward(x, softplus, threads=threads, build=build)
        grads = ordered_backward(weight, x, borders, softplus, threads=threads, build=build)
        assert y.shape == x.u.shape and within([y], [exact], [plain], 1e-6), (seed, error(y, exact))
        assert [g is None for g in grads] == [v is None or v is x.order for v in x]
        found = [g for g in grads if g is not None]
        assert all(g.shape == e.shape and g.isfinite().all() for g, e in zip(found, of_exact, strict=True))
        assert within(found, of_exact, of_plain, 3e-6), (seed, [error(g, e) for g, e in zip(found, of_exact, strict=True)])

def test_directions_in_half_the_bytes(build):
    for seed in range(8):
        x, softplus = image_case(seed, 'mixed')
        x = to(x, torch.bfloat16)
        y, borders = ordered_forward(x, softplus, build=build)
        grads = ordered_backward(torch.ones_like(y), x, borders, softplus, build=build)
        wide = to(x, torch.float64, True)
        out = ordered_loop(wide, softplus)
        exact = torch.autograd.grad(out.sum(), floats(wide))
        assert y.dtype == torch.bfloat16 and error(y, out.detach()) < 4e-3
        for g, e in zip([g for g in grads if g is not None], exact, strict=True): assert g.dtype == torch.bfloat16 and error(g, e) < 4e-3

@pytest.mark.parametrize('l, c', [(0, 3), (5, 0)])
@pytest.mark.parametrize('rank', [0, 2])
def test_gradients_of_nothing_are_zero(build, l, c, rank):
    k, n = 2, 4
    new(shape=(2, 2**20)).fill_(torch.nan), torch.full((2**16,), torch.nan)
    x = OrderedInputs(torch.ones(2, l, c), torch.ones(2, k, l, rank or c), -torch.ones(k*c, n), torch.ones(2, k, l, n),
        torch.ones(2, k, l, n), torch.ones(k*c), torch.ones(k*c), torch.arange(l).expand(k, l), torch.ones(k, c, rank) if rank else None)
    y, borders = ordered_forward(x, True, build=build)
    for g in ordered_backward(y, x, borders, True, build=build): assert g is None or not g.any()

def test_pixels_no_direction_visits_get_nothing(build):
    x, softplus = image_case(7, 'random')
    order = x.order.clone()
    order[:, 3:] = -1
    visited = order[:, :3].unique()
    y, borders = ordered_forward(x._replace(order=order), softplus, build=build)
    of_u, of_delta, *_ = ordered_backward(torch.ones_like(y), x._replace(order=order), borders, softplus, build=build)
    rest = torch.ones(x.u.shape[1], dtype=torch.bool)
    rest[visited] = False
    assert rest.any() and not y[:, rest].any() and not of_u[:, rest].any() and not of_delta[:, :, rest].any() and y[:, visited].any()

# ---------------------------------------------------------------- what the kernel refuses
def test_what_it_takes():
    x = equal_groups(draw(0)[0])
    assert cpu_takes(x) is None and cpu_takes(to(x, torch.bfloat16)) is None and cpu_takes(to(x, torch.float16)) is None
    assert cpu_takes(x._replace(A=x.A.double())) == 'A has dtype torch.float64, the compiled kernel takes float32, bfloat16 and float16'
    elsewhere = SimpleNamespace(device=torch.device('cuda', 0))
    assert cpu_takes(x._replace(u=elsewhere)) == 'u is on device cuda:0, the compiled kernel runs on the CPU'

@pytest.mark.parametrize('shape', [(3,), (9, 2**18)])
def test_results_share_no_memory_while_they_live(shape):
    results = [new(shape=shape).fill_(i) for i in range(3)]
    assert [x.unique().tolist() for x in results] == [[0.], [1.], [2.]] and not new(shape=shape, zero=True).any()
    assert all(x.shape == shape and x.is_contiguous() and x.untyped_storage().nbytes() == 4*x.numel() for x in results)

def test_results_look_like_their_model():
    for like in (torch.ones(4, 3, 5).mT, torch.ones(8, 900, 700, dtype=torch.float16).mT):
        assert new(like).stride() == like.stride() and new(like).dtype == like.dtype and new(like).shape == like.shape

def test_pool_keeps_memory_of_its_size_up_to_its_limit():
    pool, page = Pool(most=9*LARGE), LARGE//4
    x = new(shape=(4*page,), pool=pool)
    place, view = x.data_ptr(), x[3:]
    del x
    assert new(shape=(4*page,), pool=pool).data_ptr() != place, 'a view still needs it'
    del view
    assert {new(shape=(4*page,), pool=pool).data_ptr() for _ in range(4)} == {place}
    for pages in (5, 10, 6): new(shape=(pages*page,), pool=pool)
    assert sum(k*len(v) for k, v in pool.free.items()) <= pool.most and 10*LARGE not in pool.free

def test_zeros_are_zeros_in_used_memory():
    new(shape=(5, 2**19)).fill_(torch.nan)
    assert not new(shape=(5, 2**19), zero=True).any()

def test_pool_lets_go_of_sizes_out_of_use():
    pool, page = Pool(most=20*LARGE), LARGE//4
    for pages in (4, 6, 8): new(shape=(pages*page,), pool=pool)
    new(shape=(4*page,), pool=pool)         # in use again
    new(shape=(5*page,), pool=pool)
    assert {k//LARGE for k, v in pool.free.items() if v} == {8, 4, 5}, 'six was not given for longest'

def test_pool_does_not_grow(best):
    inputs = ScanInputs(*[torch.ones(1, 16, 2**17)]*2, -torch.ones(16, 1), *[torch.ones(1, 1, 1, 2**17)]*2, *[None]*4)
    memory = psutil.Process().memory_info
    for i in range(60):
        y, _, borders = cpu_forward(inputs, True)
        cpu_backward(y, torch.zeros(1, 16, 1), inputs, borders, True)
        if i == 5: before = memory().rss
    assert memory().rss-before < 2**24

def test_without_memory_or_system_calls_torch_allocates(monkeypatch):
    class Empty(Pool):
        def take(self, size): raise OSError(12, 'Cannot allocate memory')
    assert new(shape=(2**22,), pool=Empty()).shape == (2**22,)

def test_exits_cleanly_with_results_alive():
    assert python("""
import torch
from i2i_mamba_nb.ssm.cpu_kernel import new
kept = [new(shape=(2**22,)).fill_(1.) for _ in range(3)]
view = kept[0][5:]
print('done')
""").strip().endswith('done')

def test_borders_that_were_not_kept_are_refused(best):
    inputs, softplus, weights, _, _ = case(0)
    equal = equal_groups(inputs)
    borders = cpu_forward(equal, softplus, keep=False)[2]
    with pytest.raises(RuntimeError, match='told that no gradient would follow'):
        cpu_backward(weights[0], weights[1], equal, borders, softplus)

def test_pool_serves_threads():
    pool, wrong = Pool(), []
    def use(i):
        for _ in range(60):
            x = new(shape=(2**21+2**20*(i % 2),), pool=pool).fill_(i)
            if x.min() != i or x.max() != i: wrong.append(i)
    threads = [threading.Thread(target=use, args=(i,)) for i in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert not wrong

# ---------------------------------------------------------------- files
def test_interface(build):
    assert build.library.scan_interface() == ctypes.sizeof(Scan)
    assert build.width in (4, 8, 16) and build.chunk == 32 and build.library.scan_runs_here() == 1

def test_fields_are_those_of_the_source():
    "Name for name and in order: equal size alone would not notice two fields exchanged"
    text = re.search(r'struct Scan \{(.+?)\n\};', (ROOT/'i2i_mamba_nb'/'csrc'/'scan.h').read_text(), re.S)[1]
    text = re.sub(r'//.*', '', text)
    lines = re.findall(r'(?:const )?(\w+)([^;]+);', text)
    found = [(kind, name.strip(' *\n')) for kind, names in lines for name in names.split(',')]
    pointers = re.findall(r'\*\s*(\w+)', text)
    assert [n for _, n in found] == [n for n, _ in Scan._fields_]
    for (kind, name), (_, mine) in zip(found, Scan._fields_, strict=True):
        assert mine is (cpu_kernel.View if kind == 'View' else ctypes.c_void_p if name in pointers else ctypes.c_int64), name
    view = re.search(r'struct View \{(.+?)\}', (ROOT/'i2i_mamba_nb'/'csrc'/'tile.h').read_text())[1]
    assert re.findall(r'(\w+)[,;]', view) == [n for n, _ in cpu_kernel.View._fields_]

@pytest.fixture
def folder(tmp_path, best):
    "Copies of all builds that load here"
    for name in BUILDS:
        try: load_build(name)
        except OSError: continue
        shutil.copy(build_path(name), tmp_path)
    return tmp_path

def damage(path, how):
    data = path.read_bytes()
    if how == 'missing': path.unlink()
    if how == 'empty': path.write_bytes(b'')
    if how == 'text': path.write_text('version https://git-lfs.github.com/spec/v1\n')
    if how == 'truncated': path.write_bytes(data[:len(data)//2])
    if how == 'one byte': path.write_bytes(data[:5000]+bytes([data[5000] ^ 1])+data[5001:])
    if how == 'digest': path.write_bytes(data[:-1]+bytes([data[-1] ^ 1]))
    if how == 'longer': path.write_bytes(data+b'\0')

DAMAGES = 'missing', 'empty', 'text', 'truncated', 'one byte', 'digest', 'longer'

@pytest.mark.parametrize('how', DAMAGES)
def test_damaged_files_are_not_loaded(folder, best, how):
    damage(folder/f'scan_{best.name}.so', how)
    with pytest.raises(OSError, match='was not built' if how == 'missing' else 'damaged'): load_build(best.name, folder)
    found, reasons = find_kernel(folder)
    assert found is None or found.name != best.name
    others = [name for name in BUILDS if name != best.name and (folder/f'scan_{name}.so').exists()]
    assert (found.name if found else None) == (others[0] if others else None) and best.name in reasons

def test_without_any_file(tmp_path):
    found, reasons = find_kernel(tmp_path)
    assert found is None and set(reasons) == set(BUILDS) and all('C++ compiler' in v for v in reasons.values())

def test_a_build_of_another_version(best, monkeypatch):
    class Longer(ctypes.Structure): _fields_ = [('all', Scan), ('more', ctypes.c_int64)]
    monkeypatch.setattr(cpu_kernel, 'Scan', Longer)
    with pytest.raises(OSError, match='another version'): load_build(best.name)

def test_a_processor_without_the_instructions(best, monkeypatch):
    class Answer:
        def __init__(self, value): self.value = value
        def __call__(self): return self.value
    answers = dict(interface=ctypes.sizeof(Scan), runs_here=0, width=4, chunk=32, segments=1)
    library = type('Library', (), {f'scan_{k}': Answer(v) for k, v in answers.items()})()
    monkeypatch.setattr(cpu_kernel.ctypes, 'CDLL', lambda path: library)
    with pytest.raises(OSError, match='does not know its instructions'): load_build(best.name)

def python(code, **env):
    "What a fresh process prints"
    full = {**os.environ, 'OMP_NUM_THREADS': '2', **env}
    if not env.get('I2I_MAMBA_SCAN'): full.pop('I2I_MAMBA_SCAN', None)
    done = subprocess.run([sys.executable, '-c', code], env=full, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()

WARN = """
import sys, warnings
from pathlib import Path
from i2i_mamba_nb.ssm import cpu_kernel
if {folder!r}: cpu_kernel.build_path = lambda name: Path({folder!r})/f'scan_{{name}}.so'
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter('always')
    found = [cpu_kernel.kernel() for _ in range(3)]
print(found[0].name if found[0] else None, len(seen), *(w.message for w in seen))
"""

def test_one_warning_where_a_file_is_damaged(folder, best):
    damage(folder/f'scan_{best.name}.so', 'one byte')
    name, count, text = python(WARN.format(folder=str(folder))).split(' ', 2)
    assert count == '1' and name != best.name and f'{best.name}: the file is damaged' in text
    assert ('chunked' in text) == (name == 'None') and 'compiler' in text

def test_one_warning_where_nothing_is_built(tmp_path):
    name, count, text = python(WARN.format(folder=str(tmp_path))).split(' ', 2)
    assert (name, count) == ('None', '1') and "backend 'chunked'" in text and 'C++ compiler' in text

def test_no_warning_where_all_is_well(best): assert python(WARN.format(folder='')) == f'{best.name} 0'

def test_the_environment_picks_a_build(build):
    assert python(WARN.format(folder=''), I2I_MAMBA_SCAN=build.name) == f'{build.name} 0'

def test_the_environment_names_no_build():
    name, count, text = python(WARN.format(folder=''), I2I_MAMBA_SCAN='mmx').split(' ', 2)
    assert (name, count) == ('None', '1') and 'mmx' in text

RUNTIMES = """
import torch
from i2i_mamba_nb.ssm.cpu_kernel import load_build, cpu_forward, ScanInputs
build, one = load_build({name!r}), torch.ones(2, 40, 999)
cpu_forward(ScanInputs(one, one, -torch.ones(40, 4), torch.ones(2, 1, 4, 999), torch.ones(2, 1, 4, 999)), True, threads=2, build=build)
torch.nn.functional.conv1d(one, torch.ones(40, 40, 3))
print(len({{l.split()[-1] for l in open('/proc/self/maps') if 'gomp' in l or 'libomp' in l or 'iomp' in l}}))
"""

@pytest.mark.skipif(not Path('/proc/self/maps').exists(), reason='needs /proc/self/maps')
def test_one_openmp_runtime(build): assert python(RUNTIMES.format(name=build.name)) == '1'
