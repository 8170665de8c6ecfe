"""Scans to compare with: mambapy's parallel scan and what else torch offers, and stand-ins for the scan inside the package's mixers.

A method is called with the eight tensors of selective_scan, u, delta, A, B, C, D, z (or None), delta_bias, softplus applied to the steps.
Methods whose natural order is batch, length, channels are given their tensors in that order, so that no transposition is charged to them.
"""
import contextlib
import math
from collections.abc import Callable
from typing import NamedTuple
from unittest.mock import patch

import mambapy.pscan
import torch
import torch.nn.functional as F
from machine import STATES, available

from i2i_mamba_nb.ssm import mixers, selective_scan
from i2i_mamba_nb.ssm.cpu_kernel import BUILDS, cpu_backward, cpu_forward, kernel, load_build
from i2i_mamba_nb.ssm.parallel import equal_groups
from i2i_mamba_nb.ssm.recurrence import ScanInputs
from i2i_mamba_nb.ssm.scan_orders import gather_each, gather_paths, scatter_paths

ROOM = 6*2**30      # bytes that a method may take; what would need more is left out and the row says so
TURNED = 0, 1, 3, 4, 6      # u, delta, B, C, z: what has a time axis

class Method(NamedTuple):
    "A way to compute the scan"
    run: Callable       # eight tensors -> y
    turned: bool        # whether tensors come as batch, length, channels

def inputs(shape, gate=False, seed=0):
    "u, delta, A, B, C, D, z, delta_bias of a scan like a freshly initialised Mamba's"
    g, (b, d, l), n = torch.Generator().manual_seed(seed), shape, STATES
    r = lambda *s: torch.randn(*s, generator=g)
    made = [r(b, d, l), .5*r(b, d, l), -torch.arange(1., n+1).repeat(d, 1), r(b, n, l), r(b, n, l), torch.ones(d),
        r(b, d, l) if gate else None, torch.full((d,), -4.6)]
    return [None if x is None else x.requires_grad_() for x in made]

def turn(tensors):
    "The same with batch, length, channels"
    return [x.detach().mT.contiguous().requires_grad_() if x is not None and i in TURNED else x for i, x in enumerate(tensors)]

# ---------------------------------------------------------------- methods
def on_states(recurrence):
    "A scan on top of a function (decay, input) -> states, all (b l d n)"
    def run(u, delta, A, B, C, D, z, bias):
        delta = F.softplus(delta+bias)
        h = recurrence(torch.exp(delta[..., None]*A), (delta*u)[..., None]*B[:, :, None])
        y = (h @ C[..., None]).squeeze(-1)+D*u
        return y if z is None else y*F.silu(z)
    return run

def doubling(a, x):
    "Hillis and Steele: after step k every position knows the 2^k before it"
    step = 1
    while step < a.shape[1]:
        x = torch.cat([x[:, :step], torch.addcmul(x[:, step:], a[:, step:], x[:, :-step])], 1)
        a = torch.cat([a[:, :step], a[:, step:]*a[:, :-step]], 1)
        step *= 2
    return x

def combine(p, q): "Two stretches as one, (decay, input) each"; return p[0]*q[0], torch.addcmul(q[1], q[0], p[1])

def associative(a, x):
    "torch's own prototype of a parallel scan"
    from torch._higher_order_ops.associative_scan import associative_scan
    return associative_scan(combine, (a, x), 1, combine_mode='generic')[1]

def cumulative(a, x):
    "The formula with cumulative products, which runs out of numbers: shown because it is often written"
    through = a.cumprod(1)
    return through*(x/through).cumsum(1)

def by_name(backend):
    "selective_scan on one backend"
    def run(u, delta, A, B, C, D, z, bias): return selective_scan(u, delta, A, B, C, D, z, bias, True, backend=backend)
    return run

class OfBuild(torch.autograd.Function):
    "The compiled scan of a build other than the one this process loads by itself"
    @staticmethod
    def forward(ctx, build, keep, *tensors):
        y, last, borders = cpu_forward(ScanInputs(*tensors, None), True, keep, build=build)
        ctx.build, ctx.last = build, last.shape
        ctx.save_for_backward(borders, *tensors)
        return y

    @staticmethod
    def backward(ctx, grad_y):
        borders, *tensors = ctx.saved_tensors
        found = cpu_backward(grad_y, grad_y.new_zeros(ctx.last), ScanInputs(*tensors, None), borders, True, build=ctx.build)
        return None, None, *found[:8]

def by_build(name):
    "The compiled scan of a build by name"
    build = load_build(name)
    def run(*tensors): return OfBuild.apply(build, torch.is_grad_enabled(), *equal_groups(ScanInputs(*tensors, None))[:8])
    return run

def builds():
    "Name -> method of every build of the compiled scan that runs here: selective_scan itself for the one in use"
    found, used = {}, kernel()
    for name in BUILDS:
        if used and name == used.name: found[f'cpu {name}'] = by_name('cpu')
        else:
            with contextlib.suppress(OSError): found[f'cpu {name}'] = by_build(name)
    return found

def methods():
    "Name -> Method, mambapy first"
    torch_ones = dict(doubling=doubling, associative_scan=associative, cumulative=cumulative)
    mine = dict(reference=by_name('reference'), chunked=by_name('chunked'), **builds())
    mine.update({k: by_name(k) for k in available() if k not in ('reference', 'chunked', 'cpu')})
    return dict(mambapy=Method(on_states(mambapy.pscan.pscan), True), **{k: Method(on_states(f), True) for k, f in torch_ones.items()},
        **{k: Method(f, False) for k, f in mine.items()})

def left_out(name, shape, mode):
    "Why a method is not run at a shape, or None"
    (b, d, l), both = shape, mode == 'both'
    times = dict(doubling=3*math.ceil(math.log2(l)) if both else 5, associative_scan=14 if both else 6, reference=6)
    need = times.get(name, 0)*4*b*d*l*STATES
    if name == 'reference' and mode == 'both' and l > 4096: return 'a graph of several nodes per time step'
    if need > ROOM: return f'needs about {need/2**30:.0f} GiB'

def call(method, x, mode, grad_y=None):
    "One forward, or one forward and backward from a given gradient of y"
    if mode == 'forward':
        with torch.no_grad(): return [method.run(*x)]
    y = method.run(*x)
    return [y, *torch.autograd.grad(y, [k for k in x if k is not None], grad_y)]

def prepared(method, shape, mode, gate=False):
    "A function without arguments that runs the method; inputs and the gradient of y are made before"
    x = inputs(shape, gate)
    x = turn(x) if method.turned else x
    grad_y = torch.ones_like(x[0]) if mode == 'both' else None
    return lambda: call(method, x, mode, grad_y)

def outcome(method, shape, mode, gate=False):
    "y, and the gradients, in the common order of axes"
    out = [x.detach() for x in prepared(method, shape, mode, gate)()]
    return [x.mT if method.turned and x.ndim == 3 else x for x in out]

def difference(got, wanted):
    "Largest difference relative to the largest value, over all tensors; None where not finite"
    if not all(torch.isfinite(x).all() for x in got): return None
    return max(((p-q).abs().max()/q.abs().max().clamp(min=1e-30)).item() for p, q in zip(got, wanted, strict=True))

# ---------------------------------------------------------------- stand-ins inside mixers
class Free(torch.autograd.Function):
    "y = u, summed over directions: a scan that costs nothing but hands a gradient to everything that drives it"
    @staticmethod
    def forward(ctx, times, u, *rest):
        ctx.times, ctx.like = times, [None if x is None else (x.shape, x.dtype) for x in rest]
        return u*times if times != 1 else u.view_as(u)

    @staticmethod
    def backward(ctx, grad_y):
        nothing = grad_y.new_zeros(())
        return None, grad_y*ctx.times, *(None if s is None else nothing.to(s[1]).expand(s[0]) for s in ctx.like)

def gated(y, z): return y if z is None else y*F.silu(z)
def no_state(u, A): return u.new_zeros(len(u), *A.shape)

def free_scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False, **_):
    y = gated(Free.apply(1, u, delta, A, B, C, D, delta_bias), z)
    return (y, no_state(u, A)) if return_last_state else y

def steps(delta, weight):
    "Steps from their factors, as a projection in front of a scan makes them: it stays where the scan goes"
    return delta if weight is None else delta @ weight.mT

def free_ordered(u, delta, A, B, C, D=None, delta_bias=None, delta_softplus=False, *, order, delta_weight=None, backend=None):
    delta = steps(delta, delta_weight)
    return Free.apply(order.numel()/u.shape[1], u, delta, A, B, C, D, delta_bias)

def bare_scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False, **_):
    return (gated(u, z), no_state(u, A)) if return_last_state else gated(u, z)

def bare_ordered(u, *_, order, **__): return u*(order.numel()/u.shape[1])

def mambapy_scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False, **_):
    "mambapy's scan where a mixer of the package calls its own; B and C (b n l)"
    turned = turn_views(u, delta, B, C, z)
    y = on_states(mambapy.pscan.pscan)(turned[0], turned[1], A, turned[2], turned[3], D, turned[4], delta_bias).mT
    return (y, no_state(u, A)) if return_last_state else y

def turn_views(*tensors): return [None if x is None else x.mT for x in tensors]

def mambapy_ordered(u, delta, A, B, C, D=None, delta_bias=None, delta_softplus=False, *, order, delta_weight=None, backend=None):
    "Directions gathered one after the other, scanned by mambapy, scattered and summed: what cross-scan costs without a kernel for it"
    k, c = len(order), u.shape[2]
    v = gather_paths(u.mT, order)                                           # b k c m
    delta, B, C = (gather_each(x, order) for x in (steps(delta, delta_weight), B, C))   # b k c m, b k n m
    parts = [mambapy_scan(v[:, i], delta[:, i], A[i*c:(i+1)*c], B[:, i], C[:, i], D[i*c:(i+1)*c], None, delta_bias[i*c:(i+1)*c])
        for i in range(k)]
    return scatter_paths(torch.stack(parts, 1), order, u.shape[1]).mT

STAND_INS = dict(identity=(free_scan, free_ordered), bare=(bare_scan, bare_ordered), mambapy=(mambapy_scan, mambapy_ordered))

@contextlib.contextmanager
def replaced(name):
    "Mixers with a stand-in for the scan; any other name leaves them as they are"
    if name not in STAND_INS:
        yield
        return
    plain, ordered = STAND_INS[name]
    with patch.object(mixers, 'selective_scan', plain), patch.object(mixers, 'ordered_scan', ordered): yield
