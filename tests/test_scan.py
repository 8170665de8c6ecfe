"Every available scan backend against an independent float64 loop: values, gradients, properties, extremes, errors, tracing"
import functools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from i2i_mamba_nb.core import BackendError, ConfigError, ShapeError
from i2i_mamba_nb.ssm import backends, selective_scan
from i2i_mamba_nb.ssm.parallel import chunked, cut, n_borders, plan
from i2i_mamba_nb.ssm.recurrence import ScanInputs, reference

AVAILABLE = [name for name, state in backends().items() if state.available]
DOUBLE = ['reference', 'chunked']  # the other backends refuse or hand on float64
DEVICES = ['cpu', *(['cuda'] if torch.cuda.is_available() else [])]
LENGTHS = [1, 2, 3, 7, 15, 16, 17, 31, 33, 64, 97, 127, 128, 200]
NAMES = ScanInputs._fields
on_each = pytest.mark.parametrize('backend', AVAILABLE)
twohundred = settings(max_examples=200, deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 2**31)

def scan(inputs, softplus=True, backend='auto', **options):
    "y and the last state of a scan whose tensors come in one tuple"
    return selective_scan(*inputs[:8], softplus, True, initial_state=inputs[8], backend=backend, **options)

def loop(inputs, softplus=True):
    "The oracle: float64, one step and one group at a time, nothing taken from the package"
    u, delta, A, B, C, D, z, bias, h = [None if x is None else x.double() for x in inputs]
    b, d, l = u.shape
    dt = delta if bias is None else delta+bias.reshape(1, d, 1)
    if softplus: dt = torch.where(dt > 20, dt, torch.log1p(torch.exp(dt.clamp(max=20))))
    def at(w, t):
        if w.dim() == 2: return w.reshape(1, d, -1)
        if w.dim() == 3: return w[:, None, :, t]
        return torch.cat([w[:, i:i+1, :, t].expand(b, d//w.shape[1], -1) for i in range(w.shape[1])], 1)
    h, ys = torch.zeros(b, d, A.shape[1], dtype=torch.float64, device=u.device) if h is None else h, []
    for t in range(l):
        step = dt[:, :, t:t+1]
        h = torch.exp(step*A)*h+step*at(B, t)*u[:, :, t:t+1]
        ys.append(torch.sum(at(C, t)*h, -1))
    y = torch.stack(ys, -1)
    if D is not None: y = y+u*D.reshape(1, d, 1)
    return (y if z is None else y*z/(1+torch.exp(-z))), h

def draw(seed, *, length=None, plain=False):
    "Inputs of a random form and size, some of them not contiguous; (inputs, softplus)"
    g = torch.Generator().manual_seed(seed)
    pick = lambda options: options[torch.randint(len(options), (), generator=g).item()]
    l, b, d, n = length or pick(LENGTHS), pick([1, 2, 3]), pick([1, 2, 3, 4, 5, 6, 17, 33]), pick(list(range(1, 17)))
    def rand(*shape):
        x = torch.randn(*shape[:-1], shape[-1]*2, generator=g, dtype=torch.float64)
        if plain or pick([0, 1, 2]): return x[..., :shape[-1]].contiguous()
        return x[..., ::2] if pick([0, 1]) else x[..., :shape[-1]].transpose(0, -1).contiguous().transpose(0, -1)
    def weight():
        form = pick(['d n', 'b n l', 'b g n l', 'b g n l'])
        groups = pick([k for k in (1, 2, 3, 17, d) if d % k == 0])
        return {'d n': lambda: rand(d, n), 'b n l': lambda: rand(b, n, l), 'b g n l': lambda: rand(b, groups, n, l)}[form]()
    maybe = lambda *shape: rand(*shape) if pick([0, 1]) else None
    A = -torch.exp(rand(d, n))
    softplus = bool(pick([0, 1]))
    delta = rand(b, d, l) if softplus else rand(b, d, l).abs()*.5
    bias = maybe(d)
    if bias is not None and not softplus: bias = bias.abs()
    return (rand(b, d, l), delta, A, weight(), weight(), maybe(d), maybe(b, d, l), bias, maybe(b, d, n)), softplus

def to(inputs, dtype, device='cpu', grad=False):
    "Inputs in another dtype with their strides kept"
    cast = lambda x: x.detach().to(device, dtype, memory_format=torch.preserve_format).requires_grad_(grad)
    return tuple(None if x is None else cast(x) for x in inputs)

def gradients(function, inputs, weights):
    "Gradients of sum(y w) + sum(last v) for every input that is there"
    out = function(inputs)
    there = [x for x in inputs if x is not None]
    return torch.autograd.grad(out, there, [w.to(o.dtype).to(o.device) for w, o in zip(weights, out, strict=True)])

@functools.cache
def case(seed, dtype=torch.float32):
    "Inputs rounded to `dtype`, what the oracle makes of them, and its gradients"
    inputs, softplus = draw(seed)
    inputs = to(to(inputs, dtype), torch.float64, grad=True)
    out = loop(inputs, softplus)
    g = torch.Generator().manual_seed(seed+1)
    weights = [torch.randn(o.shape, generator=g) for o in out]
    there = [x for x in inputs if x is not None]
    grads = torch.autograd.grad(out, there, [w.double() for w in weights])
    return inputs, softplus, [o.detach() for o in out], weights, grads

def error(got, wanted):
    "Largest error relative to the largest value wanted"
    return ((got.cpu().double()-wanted).abs().max()/wanted.abs().max().clamp(min=1e-30)).item()

# ---------------------------------------------------------------- values and gradients
@on_each
@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype, value, gradient', [(torch.float64, 1e-12, 1e-12), (torch.float32, 1e-5, 1e-4)], ids=['f64', 'f32'])
def test_200_shapes(backend, device, dtype, value, gradient):
    if dtype == torch.float64 and backend not in DOUBLE: pytest.skip(f'{backend} computes in float32')
    for seed in range(200):
        inputs, softplus, wanted, weights, wanted_grads = case(seed)
        mine = to(inputs, dtype, device, grad=True)
        out = scan(mine, softplus, backend)
        assert [o.shape for o in out] == [o.shape for o in wanted] and all(o.dtype == dtype for o in out)
        for o, w in zip(out, wanted, strict=True): assert error(o.detach(), w) < value, (seed, error(o.detach(), w))
        grads = gradients(lambda x, s=softplus: scan(x, s, backend), mine, weights)
        names = [k for k, x in zip(NAMES, inputs, strict=True) if x is not None]
        for k, g, w in zip(names, grads, wanted_grads, strict=True):
            assert g.shape == w.shape and error(g, w) < gradient, (seed, k, error(g, w))

def test_the_200_cover_the_forms():
    drawn = [case(seed)[:2] for seed in range(200)]
    assert {x[0].shape[-1] for x, _ in drawn} == set(LENGTHS)
    assert {x[3].ndim for x, _ in drawn} == {x[4].ndim for x, _ in drawn} == {2, 3, 4}
    assert any(x[3].ndim == x[4].ndim == 4 and x[3].shape[1] != x[4].shape[1] for x, _ in drawn)
    for i in range(5, 9): assert {x[i] is None for x, _ in drawn} == {True, False}
    assert sum(not x[0].is_contiguous() for x, _ in drawn) > 20 and {s for _, s in drawn} == {True, False}

@on_each
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_inputs(backend, dtype):
    for seed in range(300, 340):
        inputs, softplus, wanted, weights, wanted_grads = case(seed, dtype)
        mine = to(inputs, dtype, grad=True)
        y, last = scan(mine, softplus, backend)
        assert y.dtype == dtype and last.dtype == torch.float32
        assert error(y.detach(), wanted[0]) < 2e-2 and error(last.detach(), wanted[1]) < 1e-5
        rounded = [w.to(dtype).float() if i == 0 else w for i, w in enumerate(weights)]
        grads = gradients(lambda x, s=softplus: scan(x, s, backend), mine, rounded)
        for g, w in zip(grads, wanted_grads, strict=True): assert g.dtype == dtype and error(g, w) < 2e-2, seed

@on_each
def test_mixed_dtypes_as_under_autocast(backend):
    inputs, softplus, wanted, _, _ = case(7, torch.bfloat16)
    half, full = torch.bfloat16, torch.float32
    dtypes = [half, full, full, half, half, full, half, full, full]
    mine = tuple(None if x is None else x.detach().to(t) for x, t in zip(inputs, dtypes, strict=True))
    with torch.autocast('cpu', dtype=torch.bfloat16): y, last = scan(mine, softplus, backend)
    assert y.dtype == torch.bfloat16 and last.dtype == torch.float32
    assert error(y, wanted[0]) < 2e-2 and error(last, wanted[1]) < 1e-5

@on_each
def test_autocast_changes_nothing(backend):
    inputs = to(case(11)[0], torch.float32, grad=True)
    def both():
        y, last = scan(inputs, True, backend)
        return y, last, *torch.autograd.grad(y.sum()+last.sum(), [x for x in inputs if x is not None])
    outside = both()
    with torch.autocast('cpu', dtype=torch.bfloat16): inside = both()
    assert all(torch.equal(a, b) for a, b in zip(outside, inside, strict=True))

@on_each
def test_inputs_are_left_alone(backend):
    for seed in (*range(400, 410), *(500+k for k in range(10))):
        inputs, softplus = draw(seed, length=1 if seed >= 500 else None, plain=True)
        mine = to(inputs, torch.float32, grad=True)
        before = [None if x is None else x.detach().clone() for x in mine]
        gradients(lambda x, s=softplus: scan(x, s, backend), mine, [torch.ones(o.shape) for o in scan(mine, softplus, backend)])
        assert all(x is None or torch.equal(x.detach(), b) for x, b in zip(mine, before, strict=True))

# ---------------------------------------------------------------- derivatives by finite differences
def small(seed, b_form, c_form):
    g = torch.Generator().manual_seed(seed)
    r = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64)
    b, d, l, n = 2, 4, 7, 3
    forms = {2: (d, n), 3: (b, n, l), 4: (b, 2, n, l)}
    x = (r(b, d, l), r(b, d, l), -r(d, n).exp(), r(*forms[b_form]), r(*forms[c_form]), r(d), r(b, d, l), r(d), r(b, d, n))
    return tuple(t.requires_grad_() for t in x)

@pytest.mark.parametrize('backend', DOUBLE)
@pytest.mark.parametrize('b_form, c_form', [(2, 4), (3, 3), (4, 2), (4, 3)])
def test_gradcheck(backend, b_form, c_form):
    assert torch.autograd.gradcheck(lambda *x: scan(x, True, backend), small(0, b_form, c_form), fast_mode=True)

@pytest.mark.parametrize('steps, lanes', [(2, 2), (1, 3), (3, 1)])
def test_gradcheck_across_pieces(steps, lanes):
    f = lambda *x: chunked(*x[:8], True, True, initial_state=x[8], steps=steps, lanes=lanes)
    assert torch.autograd.gradcheck(f, small(1, 4, 4))

def test_gradgradcheck_of_the_reference():
    x = tuple(t[..., :3].detach().requires_grad_() if t.ndim == 3 and t.shape[-1] == 7 else t for t in small(2, 3, 3))
    assert torch.autograd.gradgradcheck(lambda *x: scan(x, True, 'reference'), x, fast_mode=True)

def test_a_second_derivative_of_chunked_is_refused():
    x = small(3, 3, 3)
    y, _ = scan(x, True, 'chunked')
    g, = torch.autograd.grad(y.sum(), x[0], create_graph=True)
    with pytest.raises(RuntimeError, match='autograd'): g.sum().backward()

# ---------------------------------------------------------------- properties, 200 examples each
def example(seed, backend='reference', shortest=1, longest=40):
    "A random case of up to `longest` steps, every other one in float64 where the backend computes in it"
    length = torch.randint(shortest, longest+1, (), generator=torch.Generator().manual_seed(seed)).item()
    inputs, softplus = draw(seed, length=length)
    return list(to(inputs, torch.float64 if seed % 2 and backend in DOUBLE else torch.float32)), softplus

def close(a, b, tolerance=None):
    limit = tolerance or (1e-12 if a.dtype == torch.float64 else 1e-5)
    return error(a, b.double()) < limit or (a-b).abs().max() < 1e-30

@on_each
@twohundred
@given(seed=seeds)
def test_linear_in_u(backend, seed):
    x, softplus = example(seed, backend)
    other = torch.randn(x[0].shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(x[0].dtype)
    x[8] = None
    f = lambda u: scan([u, *x[1:]], softplus, backend)[0]
    assert close(f(2*x[0]-3*other), 2*f(x[0])-3*f(other), 1e-10 if x[0].dtype == torch.float64 else 3e-5)

@on_each
@twohundred
@given(seed=seeds)
def test_causal(backend, seed):
    x, softplus = example(seed, backend)
    l = x[0].shape[-1]
    k = seed % l
    y, _ = scan(x, softplus, backend)
    changed = [v if v is None or v.shape[-1] != l or i in (2, 5, 7, 8) or v.ndim < 3 else torch.cat([v[..., :k], v[..., k:]+1], -1)
        for i, v in enumerate(x)]
    after, _ = scan(changed, softplus, backend)
    assert k == 0 or close(after[..., :k], y[..., :k])
    assert not torch.equal(after[..., k:], y[..., k:])

@on_each
@twohundred
@given(seed=seeds)
def test_split_and_carry_is_whole(backend, seed):
    x, softplus = example(seed, backend, shortest=2)
    l = x[0].shape[-1]
    k = 1+seed % (l-1)
    y, last = scan(x, softplus, backend)
    part = lambda s, h: [v if v is None or i in (2, 5, 7, 8) or v.ndim < 3 else v[..., s] for i, v in enumerate(x[:8])]+[h]
    first, h = scan(part(slice(None, k), x[8]), softplus, backend)
    second, h = scan(part(slice(k, None), h), softplus, backend)
    assert close(torch.cat([first, second], -1), y) and close(h, last)

@on_each
@twohundred
@given(seed=seeds)
def test_no_step_gives_the_direct_path(backend, seed):
    x, _ = example(seed, backend)
    x[1], x[7], D = torch.zeros_like(x[1]), None, x[5]
    x[6] = None
    if x[8] is None:
        y, last = scan(x, False, backend)
        assert torch.equal(y, torch.zeros_like(y) if D is None else D[:, None]*x[0]) and not last.any()
    else: assert torch.equal(scan(x, False, backend)[1], x[8])

@on_each
@twohundred
@given(seed=seeds)
def test_reversal(backend, seed):
    "Scanning the sequence turned round, and turning the result, is the sum over later instead of earlier steps"
    x, softplus = example(seed, backend, longest=12)
    x[3:9] = [*(v if v.ndim == 4 else v[:, None] if v.ndim == 3 else v for v in x[3:5]), None, None, None, None]
    turned = [v if v is None or v.ndim < 3 else v.flip(-1) for v in x]
    y = scan(turned, softplus, backend)[0].flip(-1)
    u, delta, A, B, C = (v.double() for v in x[:5])
    b, d, l = u.shape
    full = lambda w: w[None, :, :, None].expand(b, d, -1, l) if w.ndim == 2 else w.repeat_interleave(d//w.shape[1], 1)
    dt = F.softplus(delta) if softplus else delta
    wanted = torch.zeros_like(u)
    for t in range(l):
        for s in range(t, l):
            passed = torch.exp(dt[:, :, t:s].sum(-1)[..., None]*A)
            wanted[..., t] += (full(C)[..., t]*passed*full(B)[..., s]).sum(-1)*dt[..., s]*u[..., s]
    assert close(y, wanted)

@twohundred
@given(seed=seeds, steps=st.integers(1, 50), lanes=st.integers(1, 9))
def test_chunk_size_does_not_matter(seed, steps, lanes):
    x, softplus = example(seed)
    out = chunked(*x[:8], softplus, True, initial_state=x[8], steps=steps, lanes=lanes)
    for a, b in zip(out, scan(x, softplus, 'reference'), strict=True): assert close(a, b)

@twohundred
@given(l=st.integers(1, 3000), steps=st.integers(1, 70), lanes=st.integers(1, 70))
def test_pieces_cover_the_sequence_once(l, steps, lanes):
    pieces = cut(l, steps, lanes)
    ends = [p.start+p.steps*p.lanes for p in pieces]
    assert [p.start for p in pieces] == [0, *ends[:-1]] and ends[-1] == l
    assert len(pieces) <= n_borders(l, steps, lanes)

@twohundred
@given(size=st.integers(1, 10**8), l=st.integers(1, 10**5))
def test_every_plan_fits_its_borders(size, l): assert len(cut(l, *plan(size))) <= n_borders(l, 0, 0)

# ---------------------------------------------------------------- extremes
@on_each
@pytest.mark.parametrize('rate', [-1e-4, -1e3])
@pytest.mark.parametrize('step', [0., 1e-8, 100., -100.])
def test_extremes_stay_finite(backend, rate, step):
    g = torch.Generator().manual_seed(0)
    b, d, l, n = 1, 2, 16384, 2
    r = lambda *s: torch.randn(*s, generator=g)
    x = [r(b, d, l), torch.full((b, d, l), step), torch.full((d, n), rate), r(b, n, l), r(b, n, l), r(d), r(b, d, l), None, None]
    slow = backend == 'reference'
    x = [None if v is None else v.requires_grad_(not slow or step == 100.) for v in x]
    out = scan(x, True, backend)
    assert all(o.isfinite().all() for o in out)
    if out[0].requires_grad:
        assert all(g.isfinite().all() for g in torch.autograd.grad(out[0].sum()+out[1].sum(), [v for v in x if v is not None]))

@on_each
def test_a_long_scan_agrees_with_the_oracle(backend):
    g = torch.Generator().manual_seed(1)
    b, d, l, n = 1, 3, 4099, 4
    r = lambda *s: torch.randn(*s, generator=g)
    x = [r(b, d, l), r(b, d, l), -r(d, n).exp(), r(b, n, l), r(b, n, l), r(d), r(b, d, l), r(d)-3, r(b, d, n)]
    for o, w in zip(scan(x, True, backend), loop(x), strict=True): assert error(o, w) < 1e-5

@pytest.mark.parametrize('backend', DOUBLE)
def test_large_steps_in_float64(backend):
    "Above 20 softplus is the identity, in its slope too"
    inputs = list(to(draw(12, plain=True)[0], torch.float64))
    inputs[1], inputs[2] = 21+inputs[1].abs(), inputs[2]*1e-3
    inputs = to(inputs, torch.float64, grad=True)
    out, wanted = scan(inputs, True, backend), loop(inputs)
    there = [x for x in inputs if x is not None]
    for a, w in zip(torch.autograd.grad(out[0].sum(), there, allow_unused=True), torch.autograd.grad(wanted[0].sum(), there), strict=True):
        assert error(a, w) < 1e-12

# ---------------------------------------------------------------- errors, the same from every backend
def good():
    shapes = (2, 4, 5), (2, 4, 5), (4, 3), (2, 2, 3, 5), (2, 3, 5), (4,), (2, 4, 5), (4,), (2, 4, 3)
    return {k: -torch.ones(s) if k == 'A' else torch.ones(s) for k, s in zip(NAMES, shapes, strict=True)}

BAD = {
    'u: given shape (4, 5), expected (b d l)': dict(u=torch.ones(4, 5)),
    'u and A: given sizes': dict(u=torch.ones(2, 4, 0), delta=torch.ones(2, 4, 0), z=None, B=torch.ones(4, 3), C=torch.ones(4, 3)),
    'delta: given shape (2, 4, 6), expected (b d l) with b=2, d=4, l=5': dict(delta=torch.ones(2, 4, 6)),
    'A: given shape (3, 4), expected (d n) with b=2, d=4, l=5': dict(A=-torch.ones(3, 4)),
    'A: given complex shape (4, 3), expected real values': dict(A=-torch.ones(4, 3)+0j),
    'B: given shape (2, 3, 3, 5), that is 3 groups, expected a number of groups that divides d=4': dict(B=torch.ones(2, 3, 3, 5)),
    'B: given shape (2, 7, 5), expected (d n) or (b n l) or (b g n l) with b=2, d=4, l=5, n=3': dict(B=torch.ones(2, 7, 5)),
    'B: given complex': dict(B=torch.ones(2, 3, 5)*1j),
    'C: given shape (2, 3, 6), expected (d n)': dict(C=torch.ones(2, 3, 6)),
    'C: given shape (2, 3, 3, 5), that is 3 groups': dict(C=torch.ones(2, 3, 3, 5)),
    'C: given shape (5,)': dict(C=torch.ones(5)),
    'D: given shape (5), expected (d) with': dict(D=torch.ones(5)),
    'z: given shape (2, 5, 4)': dict(z=torch.ones(2, 5, 4)),
    'z: given torch.int64, expected a floating-point dtype': dict(z=torch.ones(2, 4, 5, dtype=torch.int64)),
    'delta_bias: given shape (2, 4)': dict(delta_bias=torch.ones(2, 4)),
    'initial_state: given shape (2, 3, 4), expected (b d n)': dict(initial_state=torch.ones(2, 3, 4)),
    'D: given device meta, expected device cpu as u': dict(D=torch.ones(4, device='meta')),
    'A: given list, expected a torch tensor': dict(A=[[1.]]),
    'delta: given NoneType, expected a torch tensor': dict(delta=None),
}

@pytest.mark.parametrize('text', BAD)
def test_errors_are_the_same_everywhere(text):
    text, change = text.replace('(5,)', '(5)'), BAD[text]
    heard = set()
    for backend in ['auto', *backends()]:
        with pytest.raises(ShapeError) as e: scan(tuple({**good(), **change}.values()), True, backend)
        heard.add(str(e.value))
    assert len(heard) == 1 and heard.pop().startswith(text)

def test_direct_calls_check_too():
    for f in (reference, chunked):
        with pytest.raises(ShapeError, match='^D: given'): f(*list({**good(), 'D': torch.ones(5)}.values())[:8])

@pytest.mark.parametrize('name', [k for k, v in backends().items() if not v.available])
def test_an_unavailable_backend_says_why(name):
    why = backends()[name].reason
    with pytest.raises(BackendError) as e: scan(tuple(good().values()), True, name)
    assert repr(name) in str(e.value) and why in str(e.value) and 'auto' in str(e.value)

def test_an_unknown_backend_names_the_nearest():
    with pytest.raises(ConfigError, match="backend: given 'chunkd'.*Did you mean 'chunked'"): scan(tuple(good().values()), True, 'chunkd')

def test_the_names_of_backends(): assert list(backends()) == ['reference', 'chunked', 'cpu', 'triton', 'mamba_ssm']

def test_mamba_ssm_calls_run_unchanged():
    x = good()
    y, last = selective_scan(x['u'], x['delta'], x['A'], x['B'], x['C'], x['D'], x['z'], x['delta_bias'], True, True)
    assert y.shape == (2, 4, 5) and last.shape == (2, 4, 3)
    assert torch.equal(selective_scan(x['u'], x['delta'], x['A'], x['B'], x['C'], D=x['D'], z=x['z'], delta_bias=x['delta_bias'],
        delta_softplus=True), y)

# ---------------------------------------------------------------- tracing
class Scan(torch.nn.Module):
    def __init__(self, backend): super().__init__(); self.backend = backend
    def forward(self, *x): return scan(x, True, self.backend)

@pytest.mark.parametrize('backend', ['auto', *AVAILABLE])
def test_meta_tensors_give_shapes(backend):
    x = tuple(v.to('meta').requires_grad_() for v in good().values())
    y, last = scan(x, True, backend)
    assert y.is_meta and last.is_meta and y.shape == (2, 4, 5) and last.shape == (2, 4, 3)
    assert [g.shape for g in torch.autograd.grad([y.sum(), last.sum()], x)] == [v.shape for v in x]

@pytest.mark.parametrize('backend', ['auto', *AVAILABLE])
def test_export_equals_eager(backend):
    x = to(small(5, 4, 3), torch.float32)
    module = torch.export.export(Scan(backend), x).module()
    for a, b in zip(module(*x), scan(x, True, backend), strict=True): torch.testing.assert_close(a, b)

def test_an_exported_scan_takes_other_lengths_and_batches():
    x = to(small(6, 4, 3), torch.float32)
    b, l = torch.export.Dim('b', min=1, max=64), torch.export.Dim('l', min=2, max=8192)
    dims = ({0: b, 2: l}, {0: b, 2: l}, None, {0: b, 3: l}, {0: b, 2: l}, None, {0: b, 2: l}, None, {0: b})
    module = torch.export.export(Scan('auto'), x, dynamic_shapes=(dims,)).module()
    g = torch.Generator().manual_seed(0)
    for batch, length in ((3, 7), (2, 1500), (5, 33)):
        size = lambda v, d, batch=batch, length=length: [{b: batch, l: length}.get((d or {}).get(i), k) for i, k in enumerate(v.shape)]
        other = tuple(torch.randn(size(v, d), generator=g) for v, d in zip(x, dims, strict=True))
        other = (*other[:2], -other[2].exp(), *other[3:])
        for a, w in zip(module(*other), loop(other), strict=True): assert error(a, w) < 1e-5

@pytest.mark.parametrize('backend', ['auto', *AVAILABLE])
def test_compiled_whole(backend):
    torch._dynamo.reset()
    f = torch.compile(lambda *x: scan(x, True, backend), fullgraph=True, backend='aot_eager')
    for seed in (7, 8):
        x = to(small(seed, 4, 3), torch.float32, grad=True)
        out, wanted = f(*x), loop(x)
        for a, w in zip(out, wanted, strict=True): assert error(a.detach(), w.detach()) < 1e-5
        grads = torch.autograd.grad(sum(o.sum() for o in out), x)
        for a, w in zip(grads, torch.autograd.grad(sum(o.sum() for o in wanted), x), strict=True): assert error(a, w.double()) < 1e-4

@pytest.mark.parametrize('backend', ['auto', 'chunked'])
def test_fakes_tell_the_true_strides(backend):
    "Parameters and the initial state with their axes turned: gradients come contiguous, and the fake says so"
    g = torch.Generator().manual_seed(0)
    r = lambda *s: torch.randn(*s, generator=g)
    x = (r(2, 4, 5), r(2, 4, 5), -r(3, 4).exp().T, r(2, 3, 5), r(3, 4).T, r(4), None, None, r(2, 3, 4).mT)
    x = tuple(v if v is None else v.requires_grad_() for v in x)
    torch.library.opcheck(torch.ops.i2i_mamba_nb.scan.default, (*x, True, backend, True))
    grads = [r(2, 4, 5), r(2, 4, 3), torch.ops.i2i_mamba_nb.scan(*x, True, backend, True)[2].detach()]
    fixed = (v if v is None else v.detach() for v in x)
    torch.library.opcheck(torch.ops.i2i_mamba_nb.scan_backward.default, (*grads, *fixed, True, backend, True))

def test_a_notebooks_operator_is_not_the_packages():
    from i2i_mamba_nb.ssm.dispatch import operator
    def twice(x): return 2*x
    mine = torch.ops.i2i_mamba_nb.scan.default
    twice.__module__ = '__main__'
    made = operator('scan', '(Tensor x) -> Tensor', twice, torch.empty_like)
    assert made.namespace == '__main__' and torch.equal(made(torch.ones(2)), torch.full((2,), 2.))
    assert torch.ops.i2i_mamba_nb.scan.default is mine
    x = to(small(3, 4, 3), torch.float32)
    assert scan(x, True, 'auto')[0].isfinite().all()

def test_compiled_refuses_what_the_named_backend_does_not_take():
    torch._dynamo.reset()
    f = torch.compile(lambda *x: scan(x, True, 'cpu'), backend='aot_eager')
    with pytest.raises(Exception, match='compiled kernel takes float32|is not available'): f(*to(small(7, 4, 3), torch.float64))

def test_exported_without_gradients_refuses_to_go_back():
    "A graph traced for inputs without gradients kept no border states"
    x = to(small(3, 4, 3), torch.float32)
    module = torch.export.export(Scan('auto'), tuple(x)).module()
    y = module(*to(x, torch.float32, grad=True))[0]
    if not y.requires_grad: return
    if backends()['cpu'].available:
        with pytest.raises(RuntimeError, match='told that no gradient would follow'): y.sum().backward()

@pytest.mark.parametrize('l, some, dtype', [(5, True, torch.float32), (40, False, torch.float64), (5, True, torch.bfloat16)])
def test_the_operator_keeps_torchs_contract(l, some, dtype):
    g = torch.Generator().manual_seed(0)
    r = lambda *s: torch.randn(*s, generator=g).to(dtype).requires_grad_()
    optional = (r(4), r(2, 4, l), r(4), r(2, 4, 3)) if some else (None,)*4
    x = (r(2, 4, l), r(2, 4, l), (-torch.rand(4, 3, generator=g)).to(dtype).requires_grad_(), r(2, 2, 3, l), r(4, 3), *optional)
    torch.library.opcheck(torch.ops.i2i_mamba_nb.scan.default, (*x, True, 'auto', True))
