"Mixers: who hears whom along every path, carried state, oracles written out, odd sizes, gradients, tracing"
import copy

import pytest
import torch
import torch.nn.functional as F

from i2i_mamba_nb.core import BackendError, ConfigError, ShapeError
from i2i_mamba_nb.ssm import backends
from i2i_mamba_nb.ssm.mixers import ES2D, SS2D, BiMamba, Mamba, causal_conv, put_back, run, set_backend, trace
from i2i_mamba_nb.ssm.parallel import chunked
from i2i_mamba_nb.ssm.recurrence import reference
from i2i_mamba_nb.ssm.scan_orders import DIRECTIONS, ORDERS, orders, scan_order, skip_orders

AVAILABLE = ['auto', *(name for name, state in backends().items() if state.available)]
on_each = pytest.mark.parametrize('backend', AVAILABLE)
SIZES = [(1, 1), (1, 9), (9, 1), (2, 2), (3, 5), (8, 8), (7, 4)]

def made(cls, *args, seed=0, **options):
    "A mixer with seeded parameters, the fixed initial ones shaken too"
    torch.manual_seed(seed)
    m = cls(*args, **options)
    with torch.no_grad():
        for name, p in m.named_parameters():
            if name.startswith(('A', 'D')): p.add_(.3*torch.randn_like(p))
    return m

def bare(cls, **options):
    "An image mixer without convolution and norm, so that only the scan mixes; float64"
    return made(cls, 4, d_state=3, d_conv=1, norm=False, **options).double()

def changed(m, x, pixel):
    "Pixels of the output that change when one pixel of the input does"
    other = x.clone()
    other.flatten(2)[:, :, pixel] += 1.
    with torch.no_grad(): return set((m(other)-m(x)).abs().sum((0, 1)).flatten().nonzero().flatten().tolist())

def after(path, pixel):
    "The pixel and all that a path visits later; none where it never comes"
    return set(path[path.index(pixel):]) if pixel in path else set()

# ---------------------------------------------------------------- who hears whom
@pytest.mark.parametrize('name', [*ORDERS, 'hilbert_reverse', 'window:3', 'skip:3_reverse'])
@pytest.mark.parametrize('h, w', [(5, 7), (4, 3), (1, 6)])
def test_an_impulse_reaches_exactly_what_comes_later(name, h, w):
    m, x = bare(SS2D, directions=(name,)), torch.randn(1, 4, h, w).double()
    path = scan_order(name, h, w).tolist()
    for pixel in {0, h*w-1, path[0], path[-1], path[h*w//2], path[h*w//3]}: assert changed(m, x, pixel) == after(path, pixel)

@pytest.mark.parametrize('names', [DIRECTIONS, ('spiral_in', 'hilbert', 'raster'), DIRECTIONS[::-1]])
@pytest.mark.parametrize('h, w', [(5, 7), (6, 6)])
def test_each_of_several_directions_is_put_back(names, h, w):
    for k, name in enumerate(names):
        m, x = bare(SS2D, directions=names), torch.randn(1, 4, h, w).double()
        with torch.no_grad():
            for other in set(range(len(names)))-{k}: m.x_proj_weight[other, -3:] = 0     # C of the others: their states are not heard
        path = scan_order(name, h, w).tolist()
        for pixel in (0, h*w-1, 2*w+3, w): assert changed(m, x, pixel) == after(path, pixel), (name, pixel)

def test_four_directions_hear_everything():
    m, x = bare(SS2D), torch.randn(1, 4, 5, 7).double()
    assert all(changed(m, x, p) == set(range(35)) for p in (0, 17, 34))

@pytest.mark.parametrize('step', [1, 2, 3, 4, 9])
@pytest.mark.parametrize('h, w', [(5, 7), (6, 6), (1, 9)])
def test_sub_grids_do_not_mix(step, h, w):
    m, x = bare(ES2D, step=step), torch.randn(1, 4, h, w).double()
    rows = [[p for p in row if p >= 0] for row in skip_orders(h, w, step).tolist()]
    for pixel in (0, h*w//2, h*w-1):
        reached = changed(m, x, pixel)
        assert reached == set().union(*(after(row, pixel) for row in rows))
        assert all((p//w-pixel//w) % step == 0 and (p % w-pixel % w) % step == 0 for p in reached)

def test_a_bidirectional_mixer_hears_both_sides():
    m, one = made(BiMamba, 4, d_state=3).double(), made(Mamba, 4, d_state=3).double()
    x = torch.randn(2, 11, 4).double().requires_grad_()
    for t in (0, 5, 10):
        heard, = torch.autograd.grad(m(x)[:, t].square().sum(), x)
        assert (heard.abs().sum((0, 2)) > 0).all()
        heard, = torch.autograd.grad(one(x)[:, t].square().sum(), x)
        assert (heard.abs().sum((0, 2)) > 0).tolist() == [s <= t for s in range(11)]

def test_each_half_of_a_bidirectional_mixer_looks_one_way():
    for suffix, ahead in (('', False), ('_b', True)):
        m = made(BiMamba, 4, d_state=3).double()
        other = '_b' if not suffix else ''
        with torch.no_grad():
            for name in (f'x_proj{other}.weight', f'D{other}'): m.get_parameter(name).zero_()
        x = torch.randn(1, 11, 4).double().requires_grad_()
        heard, = torch.autograd.grad(m(x)[:, 5].square().sum(), x)
        assert (heard.abs().sum((0, 2)) > 0).tolist() == [(t >= 5 if ahead else t <= 5) for t in range(11)]

# ---------------------------------------------------------------- oracles
def old_ss2d(m, x, scan):
    "SS2D with the default directions written out: four copies by transposing and flipping, one flat scan, merge"
    b, _, h, w = x.shape
    d, r, n = m.Ds.shape[0]//4, m.dt_projs_weight.shape[2], m.A_logs.shape[1]
    inner, z = (x.flatten(2).mT @ m.in_proj.weight.mT).chunk(2, -1)
    v = F.silu(m.conv2d(inner.mT.reshape(b, d, h, w)))
    forward = torch.stack([v.flatten(2), v.mT.flatten(2)], 1)
    u = torch.cat([forward, forward.flip(-1)], 1)
    dt, B, C = torch.einsum('ked,bkdl->bkel', m.x_proj_weight, u).split([r, n, n], 2)
    delta = torch.einsum('kdr,bkrl->bkdl', m.dt_projs_weight, dt)
    y = scan(u.flatten(1, 2), delta.flatten(1, 2), -torch.exp(m.A_logs), B, C, m.Ds, None, m.dt_projs_bias.flatten(), True)
    y = y.unflatten(1, (4, d))
    both = y[:, :2]+y[:, 2:].flip(-1)
    y = both[:, 0]+both[:, 1].unflatten(2, (w, h)).mT.flatten(2)
    return ((m.out_norm(y.mT)*F.silu(z)) @ m.out_proj.weight.mT).mT.unflatten(2, (h, w))

@on_each
@pytest.mark.parametrize('h, w', SIZES)
def test_ss2d_is_the_written_out_one(backend, h, w):
    m, x = made(SS2D, 6, d_state=5, backend=backend), torch.randn(2, 6, h, w)
    torch.testing.assert_close(m(x), old_ss2d(m, x, chunked), atol=1e-6, rtol=1e-5)
    if backend == 'cpu': return         # no float64 there
    torch.testing.assert_close(copy.deepcopy(m).double()(x.double()), old_ss2d(m.double(), x.double(), reference), atol=1e-12, rtol=1e-12)

def test_gradients_of_ss2d_are_those_of_the_written_out_one():
    m, x = made(SS2D, 6, d_state=5).double(), torch.randn(2, 6, 5, 7, requires_grad=True, dtype=torch.float64)
    weight = torch.randn(2, 6, 5, 7).double()
    ours, theirs = (torch.autograd.grad((f(x)*weight).sum(), [x, *m.parameters()]) for f in (m, lambda x: old_ss2d(m, x, reference)))
    for a, b in zip(ours, theirs, strict=True): torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-10)

def test_parameters_keep_vmambas_names_and_shapes():
    wanted = {'in_proj.weight': (24, 6), 'conv2d.weight': (12, 1, 3, 3), 'conv2d.bias': (12,), 'x_proj_weight': (4, 11, 12),
        'dt_projs_weight': (4, 12, 1), 'dt_projs_bias': (4, 12), 'A_logs': (48, 5), 'Ds': (48,), 'out_norm.weight': (12,),
        'out_norm.bias': (12,), 'out_proj.weight': (6, 12)}
    for m in (SS2D(6, d_state=5), ES2D(6, d_state=5)): assert {k: tuple(v.shape) for k, v in m.state_dict().items()} == wanted
    assert ES2D(6, step=3).A_logs.shape == (108, 16) and SS2D(6, directions='hilbert').A_logs.shape == (12, 16)

def test_parameters_of_the_bidirectional_mixer_have_vision_mambas_names():
    own = {'conv1d.weight', 'conv1d.bias', 'x_proj.weight', 'dt_proj.weight', 'dt_proj.bias', 'A_log', 'D'}
    back = {'conv1d_b.weight', 'conv1d_b.bias', 'x_proj_b.weight', 'dt_proj_b.weight', 'dt_proj_b.bias', 'A_b_log', 'D_b'}
    assert set(BiMamba(6).state_dict()) == own | back | {'in_proj.weight', 'out_proj.weight'}
    assert set(Mamba(6).state_dict()) == own | {'in_proj.weight', 'out_proj.weight'}

@on_each
def test_permuted_directions_with_permuted_parameters_are_the_same(backend):
    names, swap = ('raster', 'hilbert', 'column_reverse', 'spiral_in'), [2, 0, 3, 1]
    m, x = made(SS2D, 6, d_state=5, directions=names, backend=backend), torch.randn(2, 6, 5, 7)
    other = made(SS2D, 6, d_state=5, directions=[names[i] for i in swap], backend=backend)
    state = m.state_dict()
    for name in ('x_proj_weight', 'dt_projs_weight', 'dt_projs_bias', 'A_logs', 'Ds'):
        state[name] = state[name].unflatten(0, (4, -1))[swap].reshape(state[name].shape)
    other.load_state_dict(state)
    torch.testing.assert_close(other(x), m(x), atol=1e-6, rtol=1e-5)
    other.directions = names
    assert not torch.allclose(other(x), m(x), atol=1e-3)

def test_a_direction_given_twice_counts_twice():
    m, x = bare(SS2D, directions=('snake', 'snake')), torch.randn(1, 4, 3, 5).double()
    one = bare(SS2D, directions=('snake',))
    with torch.no_grad():
        for p, q in zip(m.parameters(), one.parameters(), strict=True): p.copy_(q if p.shape == q.shape else torch.cat([q, q]))
    torch.testing.assert_close(m(x), 2*one(x))

@on_each
@pytest.mark.parametrize('h, w, step', [(5, 7, 2), (6, 8, 2), (1, 5, 2), (5, 7, 3), (3, 2, 4)])
def test_es2d_is_one_scan_for_every_sub_grid(backend, h, w, step):
    m = made(ES2D, 6, d_state=5, step=step, backend=backend)
    g = m.drive(torch.randn(2, h*w, 12), (h, w))
    wanted = torch.zeros(2, h*w, 12)
    for k, row in enumerate(skip_orders(h, w, step).tolist()):
        row = [p for p in row if p >= 0]
        if not row: continue
        own, u = slice(12*k, 12*k+12), g.u[:, row].mT
        dt, B, C = (m.x_proj_weight[k] @ u).split([1, 5, 5], 1)
        y = reference(u, m.dt_projs_weight[k] @ dt, -m.A_logs[own].exp(), B, C, m.Ds[own], None, m.dt_projs_bias[k], True)
        wanted[:, row] = y.mT
    torch.testing.assert_close(run(g, m.backend), wanted, atol=1e-5, rtol=1e-4)

@on_each
@pytest.mark.parametrize('order', ['raster', 'snake', 'hilbert_reverse', 'window:3'])
def test_a_sequence_mixer_walks_its_order(backend, order):
    x, path = torch.randn(2, 35, 6), scan_order(order, 5, 7)
    for cls in (Mamba, BiMamba):
        m, plain = made(cls, 6, d_state=5, order=order, backend=backend), made(cls, 6, d_state=5, backend=backend)
        wanted = torch.zeros(2, 35, 6)
        wanted[:, path] = plain(x[:, path])
        torch.testing.assert_close(m(x, size=(5, 7)), wanted, atol=1e-6, rtol=1e-5)

def half(m, suffix):
    "A Mamba with the parameters of one direction of a BiMamba"
    one = Mamba(6, d_state=5)
    for name in ('conv1d', 'x_proj', 'dt_proj'): getattr(one, name).load_state_dict(getattr(m, name+suffix).state_dict())
    one.in_proj, one.out_proj, one.A_log, one.D = m.in_proj, m.out_proj, getattr(m, f'A{suffix}_log'), getattr(m, f'D{suffix}')
    return one

@on_each
@pytest.mark.parametrize('length', [1, 2, 3, 4, 17])
def test_bidirectional_is_two_mambas(backend, length):
    m, x = made(BiMamba, 6, d_state=5, backend=backend), torch.randn(2, length, 6)
    wanted = half(m, '')(x)+half(m, '_b')(x.flip(1)).flip(1)
    torch.testing.assert_close(m(x), wanted, atol=1e-6, rtol=1e-5)

# ---------------------------------------------------------------- carried state
def stepped(m, x, n_prefix):
    "A prefix in one call, the rest token by token"
    y, state = m(x[:, :n_prefix], return_state=True) if n_prefix else (x[:, :0], m.start(len(x)))
    ys = [y]
    for token in x[:, n_prefix:].unbind(1):
        y, state = m.step(token, state)
        ys.append(y[:, None])
    return torch.cat(ys, 1), state

@pytest.mark.parametrize('dtype, bound', [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=['f64', 'f32'])
@pytest.mark.parametrize('d_conv', [1, 2, 4, 7])
@pytest.mark.parametrize('n_prefix', [0, 1, 2, 5, 20, 21])
def test_step_by_step_is_the_whole(dtype, bound, d_conv, n_prefix):
    for backend in (k for k in AVAILABLE if dtype == torch.float32 or k in ('reference', 'chunked')):
        m, x = made(Mamba, 6, d_state=5, d_conv=d_conv, backend=backend).to(dtype), torch.randn(2, 21, 6).to(dtype)
        whole, end = m(x, return_state=True)
        y, state = stepped(m, x, n_prefix)
        assert torch.equal(whole, m(x)) and (y-whole).abs().max() < bound*max(1, whole.abs().max())
        torch.testing.assert_close(state.h, end.h, atol=bound, rtol=bound)
        torch.testing.assert_close(state.window, end.window, atol=bound, rtol=bound)
        assert state.h.shape == (2, 12, 5) and state.window.shape == (2, d_conv-1, 12)

@on_each
def test_parts_of_any_length_are_the_whole(backend):
    m, x = made(Mamba, 6, d_state=5, backend=backend), torch.randn(2, 40, 6)
    ys, state = [], None
    for part in x.split([1, 2, 3, 17, 1, 16], 1):
        y, state = m(part, state=state, return_state=True)
        ys.append(y)
    torch.testing.assert_close(torch.cat(ys, 1), m(x), atol=1e-6, rtol=1e-5)

def test_a_state_can_be_kept_and_continued_twice():
    m, x = made(Mamba, 6, d_state=5), torch.randn(2, 9, 6)
    _, state = m(x[:, :5], return_state=True)
    before = [s.clone() for s in state]
    first, second = m.step(x[:, 5], state), m.step(x[:, 5], state)
    m.step(x[:, 6], first[1])
    assert all(torch.equal(a, b) for a, b in zip(before, state, strict=True)) and torch.equal(first[0], second[0])

def test_a_state_carries_gradients():
    m, x = made(Mamba, 6, d_state=5).double(), torch.randn(1, 9, 6, dtype=torch.float64, requires_grad=True)
    whole, = torch.autograd.grad(m(x)[:, -1].sum(), x)
    _, state = m(x[:, :4], return_state=True)
    parts, = torch.autograd.grad(m(x[:, 4:], state=state)[:, -1].sum(), x)
    torch.testing.assert_close(parts, whole)
    assert whole[:, 0].abs().sum() > 0

def test_the_state_stays_wide_in_half_precision():
    m, x = made(Mamba, 6, d_state=5).bfloat16(), torch.randn(2, 12, 6).bfloat16()
    y, state = stepped(m, x, 3)
    assert state.h.dtype == torch.float32 and state.window.dtype == y.dtype == torch.bfloat16
    assert m.start(2).h.dtype == torch.float32
    assert Mamba(6).double().start(2).h.dtype == torch.float64
    torch.testing.assert_close(y.float(), m(x).float(), atol=2e-2, rtol=2e-2)

def test_a_mixer_with_an_order_is_stepped_along_its_path():
    m, x, path = made(Mamba, 6, d_state=5, order='hilbert').double(), torch.randn(2, 15, 6).double(), scan_order('hilbert', 3, 5)
    state, y = m.start(2), torch.zeros_like(x)
    for p in path: y[:, p], state = m.step(x[:, p], state)
    torch.testing.assert_close(y, m(x, size=(3, 5)))
    following, _ = m.step(x[:, path[0]], state)
    torch.testing.assert_close(m(x, size=(3, 5), state=state)[:, path[0]], following)

# ---------------------------------------------------------------- sizes, gradients, dtypes
@on_each
@pytest.mark.parametrize('h, w', SIZES)
def test_every_mixer_on_odd_sizes(backend, h, w):
    for m in (made(SS2D, 6, directions=tuple(ORDERS)), made(ES2D, 6), made(ES2D, 6, step=3, directions=('hilbert', 'snake_reverse'))):
        y = set_backend(m, backend)(torch.randn(2, 6, h, w))
        assert y.shape == (2, 6, h, w) and y.isfinite().all() and y.is_contiguous()
    for m in (made(Mamba, 6, order='spiral_in'), made(BiMamba, 6, order='zigzag')):
        y = set_backend(m, backend)(torch.randn(2, h*w, 6), size=(h, w))
        assert y.shape == (2, h*w, 6) and y.isfinite().all()

@on_each
def test_gradients_reach_every_parameter(backend):
    image, tokens = torch.randn(2, 8, 6, 7), torch.randn(2, 19, 8)
    cases = [(made(SS2D, 8, directions=('hilbert', 'snake', 'raster')), image), (made(ES2D, 8), image)]
    cases += [(made(Mamba, 8), tokens), (made(BiMamba, 8), tokens)]
    for m, x in cases:
        set_backend(m, backend)(x).square().sum().backward()
        for name, p in m.named_parameters(): assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0, name
        if isinstance(m, SS2D):
            for name in ('x_proj_weight', 'dt_projs_weight', 'dt_projs_bias'):
                assert (m.get_parameter(name).grad.flatten(1).abs().sum(1) > 0).all(), name

def test_gradcheck():
    for m in (bare(SS2D, directions=('hilbert', 'zigzag')), bare(ES2D)):
        assert torch.autograd.gradcheck(m, torch.randn(1, 4, 3, 3, dtype=torch.float64, requires_grad=True), fast_mode=True)
    for m in (made(Mamba, 4, d_state=3).double(), made(BiMamba, 4, d_state=3).double()):
        assert torch.autograd.gradcheck(m, torch.randn(1, 5, 4, dtype=torch.float64, requires_grad=True), fast_mode=True)

def test_half_precision_and_autocast():
    image, tokens = torch.randn(2, 6, 5, 7), torch.randn(2, 9, 6)
    for cls, x in ((SS2D, image), (ES2D, image), (Mamba, tokens), (BiMamba, tokens)):
        m = made(cls, 6)
        wanted = m(x)
        with torch.autocast('cpu', dtype=torch.bfloat16): assert (m(x).float()-wanted).abs().max() < .03*wanted.abs().max()+.02
        y = m.bfloat16()(x.bfloat16())
        assert y.dtype == torch.bfloat16 and (y.float()-wanted).abs().max() < .05*wanted.abs().max()+.02

def test_inputs_that_are_not_contiguous():
    x = torch.randn(2, 7, 5, 6)
    for m in (made(SS2D, 6), made(ES2D, 6)): torch.testing.assert_close(m(x.permute(0, 3, 1, 2)), m(x.permute(0, 3, 1, 2).contiguous()))
    for m in (made(Mamba, 6), made(BiMamba, 6)):
        torch.testing.assert_close(m(x[:, :, 0].mT.contiguous().mT), m(x[:, :, 0].contiguous()))

# ---------------------------------------------------------------- settings and errors
@pytest.mark.parametrize('make, error, said', [
    (lambda: SS2D(6, directions=('raster', 'colum')), ConfigError, "Did you mean 'column'"),
    (lambda: SS2D(6, directions=()), ConfigError, 'given none'),
    (lambda: ES2D(6, step=0), ConfigError, 'positive integer'), (lambda: ES2D(6, directions='hilbrt'), ConfigError, "'hilbert'"),
    (lambda: Mamba(6, order='spral_in'), ConfigError, "'spiral_in'"), (lambda: BiMamba(6, order='x'), ConfigError, 'scan order'),
    (lambda: BiMamba(6, dt_rank=0), ConfigError, 'dt_rank'), (lambda: BiMamba(6, backend='chunkd'), ConfigError, "'chunked'"),
    (lambda: Mamba(6, order='snake')(torch.randn(1, 15, 6)), ShapeError, 'size: given none'),
    (lambda: Mamba(6)(torch.randn(1, 15, 6), size=(4, 4)), ShapeError, r'\(4, 4\) for 15 tokens'),
    (lambda: BiMamba(6, order='snake')(torch.randn(1, 15, 6), size=(15,)), ShapeError, r'\(15,\) for 15 tokens'),
    (lambda: BiMamba(6)(torch.randn(1, 5, 6), state=Mamba(6).start(1)), TypeError, 'state')])
def test_what_is_wrong_is_said(make, error, said):
    with pytest.raises(error, match=said): make()

def test_one_switch_sets_all():
    net = torch.nn.ModuleDict(dict(a=SS2D(6), b=torch.nn.Sequential(ES2D(6), torch.nn.Linear(2, 2)), c=Mamba(6), d=BiMamba(6)))
    mixers = [net['a'], net['b'][0], net['c'], net['d']]
    for name in AVAILABLE:
        assert set_backend(net, name) is net and [m.backend for m in mixers] == [name]*4
    with pytest.raises(ConfigError): set_backend(net, 'fastest')
    for name in (k for k, v in backends().items() if not v.available):
        with pytest.raises(BackendError): set_backend(net, name)
    assert [m.backend for m in mixers] == [AVAILABLE[-1]]*4

def test_the_backend_that_is_set_is_the_one_that_runs(monkeypatch):
    from i2i_mamba_nb.ssm import dispatch
    called = []
    monkeypatch.setattr(dispatch, 'reference', lambda *args, **options: (called.append(1), reference(*args, **options))[1])
    image, tokens = torch.randn(1, 6, 3, 5), torch.randn(1, 5, 6)
    for m, x in ((SS2D(6), image), (ES2D(6), image), (Mamba(6), tokens), (BiMamba(6), tokens)):
        called.clear(), set_backend(m, 'chunked')(x)
        assert not called
        set_backend(m, 'reference')(x)
        assert called, type(m).__name__

# ---------------------------------------------------------------- trace
def test_a_trace_is_the_scan_step_by_step():
    m, x = made(ES2D, 4, d_state=3, directions=('hilbert', 'snake')).double(), torch.randn(2, 4, 5, 3).double()
    t, (g,) = trace(m, x), m.drives(x)[0]
    assert t.delta.shape == (2, 4, 8, 6) and t.decay.shape == t.state.shape == (2, 4, 8, 3, 6) and not t.state.requires_grad
    assert torch.equal(t.order, skip_orders(5, 3, 2, ('hilbert', 'snake')))
    for k, row in enumerate(t.order.tolist()):
        h, own = torch.zeros(2, 8, 3).double(), slice(8*k, 8*k+8)
        for i, p in enumerate(row):
            if p < 0:
                assert not t.delta[:, k, :, i].any() and torch.equal(t.state[:, k, ..., i], t.state[:, k, ..., i-1])
                continue
            step = F.softplus(g.delta[:, k, p]+g.delta_bias[own])
            h = torch.exp(step[..., None]*g.A[own])*h+(step*g.u[:, p])[..., None]*g.B[:, k, p, None]
            torch.testing.assert_close(t.delta[:, k, :, i], step)
            torch.testing.assert_close(t.state[:, k, ..., i], h)
            torch.testing.assert_close(t.decay[:, k, ..., i], torch.exp(step[..., None]*g.A[own]))

def test_a_trace_ends_in_the_carried_state():
    m, x = made(Mamba, 4, d_state=3, order='spiral_in').double(), torch.randn(2, 15, 4).double()
    t, (_, end) = trace(m, x, size=(3, 5)), m(x, size=(3, 5), return_state=True)
    torch.testing.assert_close(t.state[:, 0, ..., -1], end.h)
    assert t.order.tolist() == [scan_order('spiral_in', 3, 5).tolist()]

def test_a_trace_of_both_directions():
    m, x = made(BiMamba, 4, d_state=3, order='column').double(), torch.randn(2, 15, 4).double()
    t = trace(m, x, size=(3, 5))
    assert t.order.tolist() == [scan_order('column', 3, 5).tolist(), scan_order('column_reverse', 3, 5).tolist()]
    back = trace(half4(m), x[:, t.order[1]])
    torch.testing.assert_close(t.state[:, 1], back.state[:, 0])

def half4(m):
    "The backward direction of a BiMamba(4, d_state=3) as a Mamba"
    one = Mamba(4, d_state=3).double()
    for name in ('conv1d', 'x_proj', 'dt_proj'): getattr(one, name).load_state_dict(getattr(m, name+'_b').state_dict())
    one.in_proj, one.A_log, one.D = m.in_proj, m.A_b_log, m.D_b
    return one

# ---------------------------------------------------------------- small parts, tracing
@pytest.mark.parametrize('k', [1, 2, 4])
def test_convolution_backwards_is_the_turned_one(k):
    conv, x = torch.nn.Conv1d(3, 3, k, groups=3, padding=k-1).double(), torch.randn(2, 9, 3).double()
    torch.testing.assert_close(causal_conv(x, conv), conv(x.mT)[..., :9].mT)
    torch.testing.assert_close(causal_conv(x, conv, backwards=True), conv(x.flip(1).mT)[..., :9].mT.flip(1))

def test_put_back_is_the_inverse():
    path, x = scan_order('hilbert', 3, 5), torch.randn(2, 15, 4)
    assert torch.equal(put_back(x[:, path], path), x)

@pytest.mark.parametrize('make', [lambda: SS2D(6, directions=('hilbert', 'snake_reverse')), lambda: ES2D(6), lambda: SS2D(6)])
def test_image_mixers_are_exported_with_open_sizes(make):
    torch.manual_seed(0)
    m, x = make().eval(), torch.randn(1, 6, 5, 7)
    torch.testing.assert_close(torch.compile(m, fullgraph=True, backend='aot_eager')(x), m(x))
    side = {2: torch.export.Dim('h', min=2, max=100), 3: torch.export.Dim('w', min=2, max=100)}
    program = torch.export.export(m, (x,), dynamic_shapes=(side,)).module()
    for size in ((5, 7), (8, 3)):
        x = torch.randn(1, 6, *size)
        torch.testing.assert_close(program(x), m(x), atol=1e-6, rtol=1e-5)

@pytest.mark.parametrize('cls', [Mamba, BiMamba])
def test_sequence_mixers_are_exported_with_open_lengths(cls):
    torch.manual_seed(0)
    m, x = cls(6).eval(), torch.randn(1, 9, 6)
    torch.testing.assert_close(torch.compile(m, fullgraph=True, backend='aot_eager')(x), m(x))
    program = torch.export.export(m, (x,), dynamic_shapes=({1: torch.export.Dim('l', min=2, max=1000)},)).module()
    for length in (9, 40):
        x = torch.randn(1, length, 6)
        torch.testing.assert_close(program(x), m(x), atol=1e-6, rtol=1e-5)

def test_meta_tensors_give_shapes():
    with torch.device('meta'): net = SS2D(6), ES2D(6), Mamba(6, order='hilbert'), BiMamba(6)
    image, tokens = torch.empty(2, 6, 5, 7, device='meta'), torch.empty(2, 35, 6, device='meta')
    assert net[0](image).shape == net[1](image).shape == (2, 6, 5, 7)
    assert net[2](tokens, size=(5, 7)).shape == net[3](tokens).shape == (2, 35, 6)

def test_default_orders_are_those_of_the_matrix():
    m = SS2D(6)
    assert m.directions == DIRECTIONS and torch.equal(m.paths(5, 7, 'cpu'), orders(DIRECTIONS, 5, 7))
