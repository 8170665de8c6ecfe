"Runs the Triton kernels in Triton's interpreter and prints their errors against float64 as JSON; TRITON_INTERPRET=1 must be set"
import json
import sys
import time

import torch

from i2i_mamba_nb.ssm.gpu_kernels import triton_backward, triton_empty_borders, triton_forward
from i2i_mamba_nb.ssm.recurrence import ScanInputs, reference

# b, d, l, n; form of B, form of C ('d': per channel, a number: groups); what else; tile steps, tiles of a chunk; dtype; softplus
CASES = {
    'everything': (2, 3, 21, 5, '1', '1', 'Dzbh', 8, 1, torch.float32, True),
    'one step': (1, 1, 1, 1, '1', '1', '', 16, 0, torch.float32, True),
    'one chunk': (1, 4, 15, 3, '1', '1', 'Dh', 16, 0, torch.float32, True),
    'one chunk of many tiles': (1, 2, 33, 3, '1', '1', 'Dzbh', 4, 100, torch.float32, True),
    'chunks of two tiles': (1, 3, 33, 5, '1', '1', 'Dzb', 4, 2, torch.float32, True),
    'chunks of three tiles': (1, 2, 31, 16, '1', '1', 'zh', 4, 3, torch.float32, True),
    'more chunks than the carry takes at once': (1, 2, 70, 1, '1', '1', 'Dh', 4, 1, torch.float32, True),
    'groups': (2, 6, 17, 3, '3', '3', 'Dzbh', 8, 1, torch.float32, True),
    'groups of one channel': (1, 4, 9, 2, '4', '4', 'b', 4, 1, torch.float32, True),
    'two blocks of channels': (1, 20, 3, 16, '1', '1', 'D', 4, 1, torch.float32, True),
    'two groups of two blocks': (1, 34, 2, 16, '2', '2', '', 2, 1, torch.float32, True),
    'more states than a block has room for': (1, 2, 3, 200, '1', 'd', '', 2, 1, torch.float32, True),
    'fixed B': (2, 3, 17, 5, 'd', '1', 'Dbh', 8, 1, torch.float32, True),
    'fixed C': (2, 4, 17, 3, '2', 'd', 'zh', 8, 1, torch.float32, True),
    'fixed both': (2, 3, 13, 4, 'd', 'd', 'Dzbh', 4, 2, torch.float32, True),
    'no softplus': (1, 3, 19, 3, '1', '1', 'Dzbh', 8, 1, torch.float32, False),
    'bfloat16': (2, 3, 17, 3, '1', '1', 'Dzbh', 8, 1, torch.bfloat16, True),
    'float16': (1, 4, 18, 3, '2', 'd', 'Dzbh', 8, 1, torch.float16, True),
    'default tiles': (1, 3, 33, 3, '1', '1', 'Dzbh', 16, 0, torch.float32, True),
}

def inputs(case, seed=0, strided=False):
    "Random inputs of a case, rounded to its dtype; `strided`: none of them contiguous"
    b, d, l, n, B, C, others, _, _, dtype, softplus = case
    g = torch.Generator().manual_seed(seed)
    def r(*s):
        x = torch.randn(*s, generator=g).to(dtype)
        return x.transpose(0, -1).contiguous().transpose(0, -1) if strided else x
    def weight(form): return r(d, n) if form == 'd' else r(b, int(form), n, l)
    def maybe(letter, *s): return r(*s) if letter in others else None
    delta, bias = r(b, d, l), maybe('b', d)
    if not softplus: delta, bias = delta.abs()*.4, None if bias is None else bias.abs()*.2
    u, A, h = r(b, d, l), -r(d, n).exp(), maybe('h', b, d, n)
    return ScanInputs(u, delta, A, weight(B), weight(C), maybe('D', d), maybe('z', b, d, l), bias, h)

def wanted(x, gy, gl, softplus):
    "y, last state and gradients in float64"
    wide = [None if k is None else k.double().requires_grad_() for k in x]
    y, last = reference(*wide[:8], softplus, True, initial_state=wide[8])
    there = [k for k in wide if k is not None]
    found = iter(torch.autograd.grad([y, last], there, [gy.double(), gl.double()], allow_unused=True))
    return y.detach(), last.detach(), [None if k is None else next(found) for k in wide]

def off(got, exact):
    "Largest error relative to the largest value"
    if not torch.isfinite(got).all(): return float('inf')
    return ((got.double()-exact).abs().max()/exact.abs().max().clamp(min=1e-30)).item()

def run(case, x, gy, gl):
    "y, last state, gradients by the kernels"
    steps, reach, _, softplus = case[7:]
    y, last, borders = triton_forward(x, softplus, steps=steps, reach=reach)
    if steps == 16: assert (room := triton_empty_borders(x)).shape == borders.shape and room.dtype == borders.dtype
    return y, last, triton_backward(gy, gl, x, borders, softplus, steps=steps, reach=reach)

def errors(case, strided=False):
    "{name: error} of one case, after checks of shapes and dtypes"
    x, g = inputs(case, strided=strided), torch.Generator().manual_seed(1)
    gy, gl = torch.randn(x.u.shape, generator=g).to(x.u.dtype), torch.randn(len(x.u), *x.A.shape, generator=g)
    if strided: gy, gl = gy.mT.contiguous().mT, gl.mT.contiguous().mT
    before = [None if k is None else k.clone() for k in x]
    y, last, grads = run(case, x, gy, gl)
    assert all(k is None or torch.equal(k, v) for k, v in zip(x, before, strict=True)), 'an input was changed'
    assert y.shape == x.u.shape and y.dtype == x.u.dtype and last.dtype == torch.float32 and y.is_contiguous() and last.is_contiguous()
    for k, v in zip(grads, x, strict=True):
        assert (k is None) == (v is None)
        assert v is None or (k.shape == v.shape and k.dtype == v.dtype and k.is_contiguous())
    exact_y, exact_last, exact = wanted(x, gy, gl, case[10])
    names = [k for k, v in zip(ScanInputs._fields, x, strict=True) if v is not None]
    pairs = [(k, v) for k, v in zip(grads, exact, strict=True) if k is not None]
    return dict(y=off(y, exact_y), last=off(last, exact_last), **{k: off(*p) for k, p in zip(names, pairs, strict=True)})

def whole_and_split():
    "Two halves with a carried state against the whole; and one chunk length against another"
    case = CASES['chunks of two tiles']
    x = inputs(case)
    y, last, _ = triton_forward(x, True, steps=4, reach=2)
    cut = lambda a, e: x._replace(**{k: getattr(x, k)[..., a:e] for k in ('u', 'delta', 'B', 'C', 'z')})
    y1, h, _ = triton_forward(cut(0, 13), True, steps=4, reach=2)
    y2, end, _ = triton_forward(cut(13, 33)._replace(initial_state=h), True, steps=4, reach=2)
    others = [triton_forward(x, True, steps=s, reach=r)[:2] for s, r in ((4, 1), (8, 1), (16, 2), (2, 3))]
    return dict(split=max(off(torch.cat([y1, y2], -1), y.double()), off(end, last.double())),
        lengths=max(max(off(p, y.double()), off(q, last.double())) for p, q in others))

def extremes():
    "Whether values and gradients stay finite: steps of 0, 1e-8, +-100 before the softplus, rates of -1e-4 and -1e3"
    case = (1, 3, 12, 2, '1', '1', 'D', 4, 1, torch.float32, True)
    x = inputs(case)
    out = {}
    for delta in (0., 1e-8, 100., -100.):
        for rate in (-1e-4, -1e3):
            k = x._replace(delta=torch.full_like(x.delta, delta), A=torch.full_like(x.A, rate))
            y, last, grads = run(case, k, torch.ones_like(k.u), torch.ones(1, 3, 2))
            out[f'{delta} {rate}'] = all(torch.isfinite(v).all().item() for v in (y, last, *grads) if v is not None)
    return out

def properties():
    "Linear in u, causal, delta = 0 gives D u, no gradient of the last state is a zero one, repeatable bits"
    case = CASES['chunks of two tiles'][:6]+('Dh', 4, 2, torch.float32, False)
    x = inputs(case)._replace(initial_state=None)
    y = lambda k: triton_forward(k, False, steps=4, reach=2)[0]
    later = x._replace(u=torch.cat([x.u[..., :14], x.u[..., 14:]+5], -1))
    still = x._replace(delta=torch.zeros_like(x.delta), delta_bias=None)
    _, last, borders = triton_forward(x, False, steps=4, reach=2)
    back = lambda gl: triton_backward(torch.ones_like(x.u), gl, x, borders, False, steps=4, reach=2)
    same = lambda p, q: all(k is v or torch.equal(k, v) for k, v in zip(p, q, strict=True))
    return dict(linear=off(y(x._replace(u=3*x.u)), 3*y(x).double()) < 1e-5, causal=torch.equal(y(later)[..., :14], y(x)[..., :14]),
        changed=not torch.equal(y(later)[..., 14:], y(x)[..., 14:]), still=torch.allclose(y(still), x.D[:, None]*x.u),
        none=same(back(None), back(torch.zeros_like(last))), repeatable=same(back(last), back(last)))

if __name__ == '__main__':
    start = time.perf_counter()
    chosen = {k: CASES[k] for k in sys.argv[1:]} or CASES
    table = {k: errors(c) for k, c in chosen.items()}
    if not sys.argv[1:]:
        table['strided'] = errors(CASES['groups'], strided=True)
        table['strided, fixed'] = errors(CASES['fixed both'], strided=True)
        print(json.dumps(dict(errors=table, **whole_and_split(), extremes=extremes(), properties=properties())))
    else: print(json.dumps(table, indent=1))
    print(round(time.perf_counter()-start, 1), 's', file=sys.stderr)
