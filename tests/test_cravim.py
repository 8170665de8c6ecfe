"CRAViM: layers, counts and names against the published network, the mixture, numbers of images, sizes, switches"
import itertools

import pytest
import torch
import torch.nn.functional as F

from i2i_mamba_nb.blocks.evss import (
    GATES,
    MIXERS,
    PHASES,
    AttentionDecoder,
    EVSSBlock,
    Mixture,
    PhaseScan,
    PlainResidual,
    from_phases,
    partner_images,
    partners,
    phases,
    weigh,
)
from i2i_mamba_nb.core import CheckpointError, ConfigError, ShapeError, Spec, network, torch_rng
from i2i_mamba_nb.measure.complexity import multiply_adds
from i2i_mamba_nb.models.cravim import DECODERS, GATE_OF, VARIANTS, CRAViM, fits, load_released, stages, translated
from i2i_mamba_nb.ssm import selective_scan
from i2i_mamba_nb.ssm.mixers import ES2D, SS2D, trace
from i2i_mamba_nb.ssm.scan_orders import skip_orders

SMALL = dict(base_channels=4, n_blocks=1)

def count(module): return sum(p.numel() for p in module.parameters())
def rand(*shape, seed=0): return torch.randn(*shape, generator=torch_rng(seed, *shape))

def released_shapes(n_in=2, n_out=2, c=64, n_blocks=7, n_att=5):
    "Names and shapes of the public generator's tensors, written down from its layers"
    e, d, r, few = 4*c, 8*c, -(-4*c//16), 4*c//8
    shapes = {'conv1': (c, n_in, 7, 7), 'conv2': (2*c, c, 3, 3), 'conv3': (e, 2*c, 3, 3)}
    for i, k in itertools.product(range(n_blocks), (1, 2)): shapes[f'resnet_blocks.{i}.conv{k}'] = (e, e, 3, 3)
    for head, last in (('content', (n_att*n_out, c, 7, 7)), ('attention', (n_att, c, 1, 1))):
        shapes |= {f'deconv1_{head}': (e, 2*c, 3, 3), f'deconv2_{head}': (2*c, c, 3, 3), f'deconv3_{head}': last}
    full = {}
    for name, shape in shapes.items():
        offset = shape[1] if name.startswith(('deconv1', 'deconv2')) else shape[0]
        full |= {f'{name}.weight': shape, f'{name}.bias': (offset,)}
    for k in (1, 2):
        op = {'x_proj_weight': (4, r+32, d), 'dt_projs_weight': (4, d, r), 'dt_projs_bias': (4, d), 'A_logs': (4*d, 16), 'Ds': (4*d,),
            'out_norm.weight': (d,), 'out_norm.bias': (d,), 'in_proj.weight': (2*d, e), 'conv2d.weight': (d, 1, 3, 3), 'conv2d.bias': (d,),
            'out_proj.weight': (e, d)}
        near = {'0.weight': (e, 1, 3, 3), '0.bias': (e,), '1.weight': (e,), '1.bias': (e,), '1.running_mean': (e,), '1.running_var': (e,),
            '1.num_batches_tracked': (), '3.weight': (e, e, 1, 1), '3.bias': (e,)}
        se = {'norm.weight': (e,), 'norm.bias': (e,), 'global_reduce.weight': (few, e), 'global_reduce.bias': (few,),
            'channel_select.weight': (e, few), 'channel_select.bias': (e,)}
        mlp = {'fc1.weight': (4*e, e), 'fc1.bias': (4*e,), 'fc2.weight': (e, 4*e), 'fc2.bias': (e,)}
        block = {f'{n}.{k}': (e,) for n in ('norm', 'norm2') for k in ('weight', 'bias')}
        for part, own in dict(op=op, conv_branch=near, se=se, mlp=mlp).items(): block |= {f'{part}.{n}': s for n, s in own.items()}
        full |= {f'VSS{k}.1.{n}': s for n, s in block.items()}
    return full

# --- counts and names

def test_counts_of_the_paper():
    with torch.device('meta'):
        for variant in ('paper', 'released'):
            net = CRAViM(variant=variant)
            assert count(net) == 11_765_711 and count(net.trunk.evss_1) == count(net.trunk.evss_2) == 1_179_936
        assert count(EVSSBlock(256)) == 1_179_936 and count(PhaseScan(256)) == 567_296
    assert f'{4*11_765_711/2**20:.2f}' == '44.88'

def test_every_released_name_has_a_partner_of_its_shape_at_full_size():
    with torch.device('meta'): net = CRAViM(variant='released')
    given = {translated(n): s for n, s in released_shapes().items()}
    assert given == {k: tuple(v.shape) for k, v in net.state_dict().items()}
    learnt = [s for n, s in released_shapes().items() if 'running' not in n and 'batches' not in n]
    assert sum(torch.Size(s).numel() for s in learnt) == 11_765_711

@pytest.mark.parametrize('n_in, n_out, c, n_blocks', [(1, 1, 64, 7), (5, 3, 16, 2)])
def test_counts_by_hand_for_other_settings(n_in, n_out, c, n_blocks):
    config = dict(n_sources=n_in, n_noise=0, n_targets=n_out, base_channels=c, n_blocks=n_blocks)
    with torch.device('meta'): net = CRAViM(variant='released', **config)
    given = {translated(n): s for n, s in released_shapes(n_in, n_out, c, n_blocks).items()}
    assert given == {k: tuple(v.shape) for k, v in net.state_dict().items()}

def test_multiply_adds_of_the_whole_by_hand():
    L, c, d = 64*64, 256, 512
    far = (c*2*d+9*d+(16+32)*d+16*d+d*c)*L+L*d*(9*16+2)//2
    evss = far+(9*c+c*c)*L+2*c*32+2*4*c*c*L
    heads = 2*9*(256*128*L+128*64*4*L)+(49*64*10+64*5)*16*L
    whole = 49*2*64*16*L+9*64*128*4*L+9*128*256*L+7*2*9*256*256*L+2*evss+heads
    with torch.device('meta'):
        assert multiply_adds(EVSSBlock(256), torch.empty(1, 256, 64, 64)) == evss
        assert multiply_adds(CRAViM(), torch.empty(1, 2, 256, 256)) == whole
        assert multiply_adds(CRAViM(), torch.empty(3, 2, 64, 96)) == multiply_adds(CRAViM(), torch.empty(1, 2, 64, 96))*3
    assert round(whole/1e9) == 52

# --- the phase scan

def test_phases_are_those_of_the_design_text():
    order = skip_orders(64, 64, 2, PHASES)
    row, column = order//64, order % 64
    assert order.shape == (4, 1024)
    corners = [(int(r[0]), int(c[0])) for r, c in zip(row, column, strict=True)]
    assert corners == [(0, 0), (1, 0), (0, 1), (1, 1)]
    for k in (0, 2): assert torch.equal(order[k], (row[k]*64+column[k]).sort().values)
    for k in (1, 3): assert torch.equal(column[k]*64+row[k], (column[k]*64+row[k]).sort().values)
    block = EVSSBlock(8)
    assert block.scan.directions == ('raster', 'column', 'raster', 'column') and torch.equal(block.scan.paths(64, 64, 'cpu'), order)

@pytest.mark.parametrize('h, w', [(8, 8), (6, 10), (5, 7), (1, 6), (7, 1)])
def test_phase_scan_is_four_ordinary_scans_over_strided_views(h, w):
    torch.manual_seed(1)
    m, x = PhaseScan(6, d_state=5).double(), rand(2, 6, h, w).double()
    v, z = (F.linear(x.permute(0, 2, 3, 1), m.in_proj.weight)).chunk(2, -1)
    u, out = F.silu(m.conv2d(v.permute(0, 3, 1, 2))), torch.zeros(2, 12, h, w).double()
    for k, (i, j, turned) in enumerate([(0, 0, False), (1, 0, True), (0, 1, False), (1, 1, True)]):
        part = u[:, :, i::2, j::2]
        if part.numel() == 0: continue
        seq = (part.transpose(2, 3) if turned else part).flatten(2)
        dt, B, C = (m.x_proj_weight[k] @ seq).split([1, 5, 5], 1)
        own = slice(12*k, 12*k+12)
        y = selective_scan(seq, m.dt_projs_weight[k] @ dt, -m.A_logs[own].exp(), B, C, m.Ds[own], delta_bias=m.dt_projs_bias[k],
            delta_softplus=True, backend='reference')
        p, q = part.shape[2:]
        out[:, :, i::2, j::2] = y.unflatten(2, (q, p)).transpose(2, 3) if turned else y.unflatten(2, (p, q))
    y = F.layer_norm(out.permute(0, 2, 3, 1), (12,), m.out_norm.weight, m.out_norm.bias)*F.silu(z)
    torch.testing.assert_close(m(x), F.linear(y, m.out_proj.weight).permute(0, 3, 1, 2), atol=1e-12, rtol=1e-9)

@pytest.mark.parametrize('step', [1, 2, 3])
@pytest.mark.parametrize('backend', ['auto', 'chunked', 'reference'])
def test_phase_scan_equals_es2d(step, backend):
    torch.manual_seed(2)
    slow = ES2D(8, step=step, directions=('raster', 'column', 'reverse'), d_state=4, backend='reference').double()
    fast = PhaseScan(8, step=step, directions=('raster', 'column', 'reverse'), d_state=4, backend=backend).double()
    fast.load_state_dict(slow.state_dict())
    for size in ((7, 9), (6, 4)):
        x = rand(2, 8, *size).double().requires_grad_()
        both = [torch.autograd.grad((m(x)**2).sum(), [x, *m.parameters()])+(m(x),) for m in (slow, fast)]
        for a, b in zip(*both, strict=True): torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-8)
    assert trace(fast, x.float().double()).delta.shape[1] == step*step

def zeros_scanned(m, u):
    "The released scan of (b, d, h, w): zeros to the right and below up to even sides, four phases, cut back"
    h, w = u.shape[2:]
    u = F.pad(u, (0, w % 2, 0, h % 2))
    out = torch.zeros_like(u)
    r, n, d = m.dt_rank, m.d_state, u.shape[1]
    for k, (i, j) in enumerate([(0, 0), (1, 0), (0, 1), (1, 1)]):
        part = u[:, :, i::2, j::2]
        part = part.transpose(2, 3) if k % 2 else part
        seq, own = part.flatten(2), slice(d*k, d*k+d)
        dt, B, C = (m.x_proj_weight[k] @ seq).split([r, n, n], 1)
        y = selective_scan(seq, m.dt_projs_weight[k] @ dt, -m.A_logs[own].exp(), B, C, m.Ds[own], delta_bias=m.dt_projs_bias[k],
            delta_softplus=True, backend='reference').unflatten(2, part.shape[2:])
        out[:, :, i::2, j::2] = y.transpose(2, 3) if k % 2 else y
    return out[:, :, :h, :w]

def mixed_by(m, x, scan):
    "A phase scan's layers around a scan of (b, d, h, w)"
    v, z = F.linear(x.permute(0, 2, 3, 1), m.in_proj.weight).chunk(2, -1)
    y = scan(m, F.silu(m.conv2d(v.permute(0, 3, 1, 2)))).permute(0, 2, 3, 1)
    y = F.layer_norm(y, y.shape[-1:], m.out_norm.weight, m.out_norm.bias)*F.silu(z)
    return F.linear(y, m.out_proj.weight).permute(0, 3, 1, 2)

@pytest.mark.parametrize('h, w', [(6, 8), (5, 8), (6, 7), (5, 7), (17, 17), (1, 6), (3, 1)])
def test_odd_maps_are_filled_up_as_released(h, w):
    torch.manual_seed(14)
    plain, padded = PhaseScan(6, d_state=5).double(), PhaseScan(6, d_state=5, padded=True).double()
    padded.load_state_dict(plain.state_dict())
    x = rand(2, 6, h, w).double().requires_grad_()
    wanted = mixed_by(padded, x, zeros_scanned)
    torch.testing.assert_close(padded(x), wanted, atol=1e-12, rtol=1e-9)
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), [x, *padded.parameters()]) for y in (padded(x), wanted)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-8)
    if h % 2 == w % 2 == 0: assert torch.equal(padded(x), plain(x))
    elif h > 3: assert (padded(x)-plain(x)).abs().max() > 1e-5
    order = trace(padded, x.float().double()).order
    assert order.shape == (4, -(-h//2)*-(-w//2)) and (order >= 0).all()

def test_only_the_released_variant_fills_up():
    for variant in ('paper', 'released'):
        net = CRAViM(1, variant, **SMALL)
        assert [b.scan.padded for b in (net.trunk.evss_1, net.trunk.evss_2)] == [variant == 'released']*2

def test_phases_and_back_on_many_sizes():
    for h, w, step in itertools.product(range(1, 8), range(1, 8), (1, 2, 3)):
        order, x = skip_orders(h, w, step, PHASES), rand(1, h*w, 2, seed=h*10+w)
        assert torch.equal(from_phases(phases(x, order), order, h*w), x)

def test_everything_runs_forward():
    "No pixel hears one that lies to its right and below it by more than the convolution's one pixel"
    torch.manual_seed(0)
    m, x = PhaseScan(4, d_state=4), rand(1, 4, 10, 12).requires_grad_()
    for i, j in itertools.product(range(0, 10, 3), range(0, 12, 3)):
        g, = torch.autograd.grad(m(x)[0, :, i, j].square().sum(), x)
        assert not g[0, :, i+2:, j+2:].any()
        assert g[0, :, :max(i-1, 1), :max(j-1, 1)].any()

# --- the EVSS block

def evss_by_hand(m, x):
    "The block in plain tensor operations, gate of the input or of the branches"
    ln = lambda v, norm: F.layer_norm(v.permute(0, 2, 3, 1), (v.shape[1],), norm.weight, norm.bias, norm.eps).permute(0, 3, 1, 2)
    def gate(v):
        g = F.gelu(ln(v, m.gate.norm).mean((2, 3)) @ m.gate.reduce.weight.T+m.gate.reduce.bias)
        return torch.sigmoid(g @ m.gate.select.weight.T+m.gate.select.bias)[:, :, None, None]
    x1 = ln(x, m.norm)
    b = m.conv_branch
    near = F.conv2d(x1, b[0].weight, b[0].bias, padding=1, groups=x.shape[1])
    near = F.batch_norm(near, b[1].running_mean, b[1].running_var, b[1].weight, b[1].bias)
    near = F.conv2d(F.gelu(near), b[3].weight, b[3].bias)
    far = mixed_by(m.scan, x1, zeros_scanned) if m.scan.padded else ES2D.forward(m.scan, x1)
    x2 = x+(gate(x1)*(far+near) if m.listens == 'input' else gate(far)*far+gate(near)*near)
    t = ln(x2, m.norm_mlp).permute(0, 2, 3, 1)
    return x2+F.linear(F.gelu(F.linear(t, m.mlp[0].weight, m.mlp[0].bias)), m.mlp[2].weight, m.mlp[2].bias).permute(0, 3, 1, 2)

@pytest.mark.parametrize('gate', ['input', 'branches'])
@pytest.mark.parametrize('size', [(6, 8), (5, 7)])
def test_evss_block_by_hand(gate, size):
    torch.manual_seed(3)
    m = EVSSBlock(16, gate=gate).double()
    for p in m.parameters(): p.data += .1*rand(*p.shape).double()
    m.conv_branch[1].running_mean += .3
    m.conv_branch[1].running_var *= 2
    x = rand(2, 16, *size).double()
    torch.testing.assert_close(m.eval()(x), evss_by_hand(m, x), atol=1e-10, rtol=1e-8)

def test_evss_block_has_the_layers_of_the_design_text():
    with torch.device('meta'): m = EVSSBlock(256)
    assert m.norm.eps == m.norm_mlp.eps == 1e-6 and m.gate.norm.eps == m.scan.out_norm.eps == 1e-5
    assert isinstance(m.scan, ES2D) and m.scan.d_state == m.scan.dt_rank == 16 and m.scan.step_size == 2
    assert m.scan.in_proj.weight.shape == (1024, 256) and m.scan.in_proj.bias is None and m.scan.x_proj_weight.shape == (4, 48, 512)
    assert [type(v).__name__ for v in m.conv_branch] == ['Conv2d', 'BatchNorm', 'GELU', 'Conv2d'] and m.conv_branch[0].groups == 256
    assert m.gate.reduce.weight.shape == (32, 256) and [tuple(v.weight.shape) for v in (m.mlp[0], m.mlp[2])] == [(1024, 256), (256, 1024)]

def test_both_branches_and_the_gate_matter():
    torch.manual_seed(4)
    m, x = EVSSBlock(8).eval(), rand(1, 8, 6, 6)
    before = m(x)
    for part in (m.scan.out_proj.weight, m.conv_branch[3].weight, m.gate.select.bias, m.mlp[2].weight):
        kept = part.data.clone()
        part.data += .5
        assert (m(x)-before).abs().max() > 1e-3
        part.data = kept
    assert torch.equal(m(x), before)

# --- the decoder

@pytest.mark.parametrize('weights, n_images, n_maps, n_spare',
    [('sigmoid', 2, 5, 1), ('softmax', 2, 5, 1), ('softmax', 1, 10, 0), ('sigmoid', 3, 2, 2)])
def test_mixture_by_hand(weights, n_images, n_maps, n_spare):
    torch.manual_seed(5)
    m = AttentionDecoder(16, n_images, n_maps=n_maps, n_spare=n_spare, weights=weights)
    f, x = rand(2, 16, 3, 5), rand(2, n_images, 12, 20)
    contents, scores = m.content(f).tanh(), m.attention[weights](f)
    a = torch.sigmoid(scores) if weights == 'sigmoid' else scores.exp()/scores.exp().sum(1, keepdim=True)
    assert contents.shape[1] == (n_maps-1+n_spare)*n_images and a.shape[1] == n_maps
    want = a[:, -1:]*x
    for i in range(n_maps-1): want = want+a[:, i:i+1]*contents[:, i*n_images:(i+1)*n_images]
    torch.testing.assert_close(m(f, x), want)
    mixture = m.mixture(f, x)
    torch.testing.assert_close(mixture.maps, a), torch.testing.assert_close(mixture.terms.sum(1), want)

def test_softmax_is_convex_and_sigmoid_is_not():
    scores, pictures = 6+rand(1, 5, 8, 8), torch.ones(1, 5, 1, 8, 8)
    images = {w: Mixture(weigh(scores, w), weigh(scores, w)[:, :, None]*pictures).image for w in ('sigmoid', 'softmax')}
    torch.testing.assert_close(images['softmax'], torch.ones(1, 1, 8, 8))
    assert images['sigmoid'].min() > 4

def test_outputs_and_inputs_that_belong_together():
    for s, n, t in itertools.product(range(1, 5), range(4), range(1, 5)):
        found = partners(s, n, t)
        assert len(found) == t and all(0 <= k < s+n for p in found for k in p)
        if s+n == t: assert found == tuple((k,) for k in range(t))
        if n >= t: assert found == tuple((s+n-t+k,) for k in range(t))
        if n == 0 and s != t: assert found == (tuple(range(s)),)*t
    assert partners(1, 1, 2) == ((0,), (1,)) and partners(3, 1, 2) == ((0,), (3,)) and partners(1, 1, 3) == ((0,), (0,), (2-1,))
    x = rand(1, 4, 4, 4)
    torch.testing.assert_close(partner_images(x, ((0, 1, 2), (3,))), torch.stack([x[:, :3].mean(1), x[:, 3]], 1))
    assert partner_images(x, partners(3, 1, 4)) is x

def test_channels_that_are_no_images_are_not_mixed():
    for s, e, n, t in itertools.product(range(1, 5), range(5), range(4), range(1, 5)):
        if e > s-(n == 0):
            with pytest.raises(ConfigError, match='n_extra'): partners(s, n, t, e)
            continue
        found = partners(s, n, t, e)
        assert len(found) == t and not {k for p in found for k in p} & set(range(s-e, s)) and all(found)
        if e < s: assert found == tuple(tuple(k+e*(k >= s-e) for k in p) for p in partners(s-e, n, t))
    for wrong in (-1, .5, True, None):
        with pytest.raises(ConfigError, match='n_extra'): partners(2, 1, 1, wrong)

@pytest.mark.parametrize('spec', [Spec(s, n, t, steps=k)
    for s, n, t, k in itertools.product((0, 1, 2, 3), (0, 1, 2, 4), (1, 2, 3), (0, 4)) if s+n], ids=str)
def test_no_time_map_stands_as_an_image_under_any_recipe(spec):
    torch.manual_seed(15)
    net = CRAViM(**fits(spec), **SMALL).eval()
    n = net.config['n_sources']
    x = rand(1, n+spec.noise, 8, 12)
    x[:, spec.sources:n] = 1e3
    m = net.mixture(x)
    assert m.terms.shape[2] == spec.targets and n-spec.sources == max(1-spec.sources, bool(spec.steps))
    assert (m.terms[:, -1]/m.maps[:, -1:]).abs().max() < 10

def test_a_map_of_the_time_that_varies_is_heard_and_a_flat_one_is_not():
    torch.manual_seed(16)
    net, x = CRAViM(**fits(Spec(1, 0, 1, steps=4)), **SMALL).eval(), rand(1, 1, 16, 24)
    flat, ramp = torch.ones_like(x), torch.linspace(-1, 1, 24).expand_as(x)
    a, b, c, d = (net(torch.cat([x, m], 1)) for m in (flat, -flat, ramp, -ramp))
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert (c-d).abs().max() > 1e-2

@pytest.mark.parametrize('build, said', [
    (lambda: AttentionDecoder(6), 'divisible by 4'), (lambda: AttentionDecoder(2), 'at least 4'),
    (lambda: AttentionDecoder(16, n_spare=-1), 'n_spare'),
    (lambda: AttentionDecoder(16, input_term='no'), 'True or False'), (lambda: AttentionDecoder(16, n_maps='5'), 'n_maps'),
    (lambda: AttentionDecoder(16, 0), 'n_images'), (lambda: EVSSBlock(8, d_state=0), 'd_state'),
    (lambda: EVSSBlock(8, d_state=1.5), 'd_state'),
    (lambda: EVSSBlock(8, step=0), 'step'), (lambda: EVSSBlock(8, mixer='none', d_state=0), 'd_state'), (lambda: EVSSBlock(0), 'channels'),
    (lambda: EVSSBlock(8, gate=None), 'gate'), (lambda: PhaseScan(8, d_state=0), 'd_state'), (lambda: PhaseScan(0), 'd_model'),
    (lambda: CRAViM(n_extra=2), 'n_extra'), (lambda: CRAViM(n_extra=-1), 'n_extra'), (lambda: CRAViM(n_noise=0, n_extra=1), 'n_extra')])
def test_settings_are_refused_in_words(build, said):
    with pytest.raises(ConfigError, match=said): build()

def test_empty_batches_are_refused_in_words():
    for switch in ({}, dict(mixer='none'), dict(trunk='residual', decoder='plain')):
        with pytest.raises(ShapeError, match='empty batch'): CRAViM(**SMALL, **switch)(torch.zeros(0, 2, 16, 16))

def test_wrong_images_are_refused():
    m, f = AttentionDecoder(16), rand(1, 16, 3, 5)
    for shape in ((1, 1, 12, 20), (1, 2, 12, 16), (2, 2, 12, 20)):
        with pytest.raises(ShapeError, match='images of the attention decoder'): m(f, torch.zeros(shape))
    with pytest.raises(ConfigError, match='n_maps'): AttentionDecoder(16, n_maps=1)
    with pytest.raises(ConfigError, match="Did you mean 'softmax'"): AttentionDecoder(16, weights='soft')

def test_weights_of_one_variant_do_not_load_into_the_other():
    with pytest.raises(RuntimeError, match='softmax'): CRAViM(1, 'released', **SMALL).load_state_dict(CRAViM(**SMALL).state_dict())
    gates, plain = [CRAViM(**SMALL, gate=g) for g in GATES], dict(decoder='plain', **SMALL)
    with pytest.raises(RuntimeError, match='gate_branches'): gates[1].load_state_dict(gates[0].state_dict())
    with pytest.raises(RuntimeError, match='gate_released'): CRAViM(1, 'released', **plain).load_state_dict(CRAViM(**plain).state_dict())

KINDS = [dict(variant=v, gate=g, decoder=d) for v in VARIANTS for g in (None, *GATES) for d in DECODERS]

@pytest.mark.parametrize('trunk, mixer', [('evss', 'es2d'), ('evss', 'none'), ('residual', 'es2d')])
def test_same_names_are_the_same_network(trunk, mixer):
    "Of any two by variant, gate and decoder: weights that load give the same bits, on maps with odd sides too"
    torch.manual_seed(18)
    nets, x = [CRAViM(**SMALL, **k, trunk=trunk, mixer=mixer).eval() for k in KINDS], rand(1, 2, 20, 28)
    alike = 0
    for a, b in itertools.permutations(nets, 2):
        if a.state_dict().keys() != b.state_dict().keys(): continue
        b.load_state_dict(a.state_dict())
        with torch.no_grad(): assert torch.equal(a(x), b(x)), (a.config, b.config)
        alike += 1
    assert alike == (6*2 if trunk == 'evss' else 4*6+6*5), 'a gate left out is the variant\'s own; without a gate only the maps tell'

@pytest.mark.parametrize('variant', VARIANTS)
def test_the_variants_own_gate_keeps_its_name(variant):
    own, other = GATE_OF[variant], next(g for g in GATES if g != GATE_OF[variant])
    def names(**k): return {n.split('.')[2] for n in CRAViM(1, variant, **SMALL, **k).state_dict() if n.startswith('trunk.evss')}
    rest = {'norm', 'norm_mlp', 'scan', 'conv_branch', 'mlp'}
    assert names() == names(gate=own) == names(decoder='contents') == rest|{'gate'} and names(gate=other) == rest|{f'gate_{other}'}
    by = '' if variant == 'paper' else '_released'
    assert names(decoder='plain') == rest|{f'gate{by}'} and names(decoder='plain', gate=other) == rest|{f'gate_{other}{by}'}

def test_a_gate_of_another_name_computes_the_same():
    torch.manual_seed(19)
    for gate in GATES:
        a, b = EVSSBlock(16, gate=gate).eval(), EVSSBlock(16, gate=gate, gate_name='gate_own').eval()
        b.load_state_dict({k.replace('gate.', 'gate_own.'): v for k, v in a.state_dict().items()})
        x = rand(1, 16, 5, 7)
        assert torch.equal(a(x), b(x))
    for wrong in ('scan', 'forward', 'gate.own', '', 3):
        with pytest.raises(ConfigError, match='gate_name'): EVSSBlock(16, gate_name=wrong)

# --- the network

def by_hand(net, x):
    "The published forward pass on a network's own weights"
    def block(m, v):
        for i in (1, 5):
            v = F.conv2d(F.pad(v, (1, 1, 1, 1), 'reflect'), m.conv_block[i].weight, m.conv_block[i].bias)
            v = F.instance_norm(v) if i == 5 else F.relu(F.instance_norm(v))
        return v
    def up(m, v):
        for i in (0, 3):
            v = F.relu(F.instance_norm(F.conv_transpose2d(v, m[i].weight, m[i].bias, 2, 1, 1)))
        return v
    e, d = net.encoder_1[1], net.decoder
    f = F.relu(F.instance_norm(F.conv2d(F.pad(x, (3, 3, 3, 3), 'reflect'), e.weight, e.bias)))
    for m in (net.encoder_2[0], net.encoder_3[0]): f = F.relu(F.instance_norm(F.conv2d(f, m.weight, m.bias, 2, 1)))
    f = evss_by_hand(net.trunk.evss_1, f)
    for j in range(1, net.config['n_blocks']+1): f = f+block(getattr(net.trunk, f'residual_{j}'), f)
    f = evss_by_hand(net.trunk.evss_2, f)
    kind = 'sigmoid' if net.config['variant'] == 'paper' else 'softmax'
    head = d.attention[kind]
    contents = F.conv2d(F.pad(up(d.content, f), (3, 3, 3, 3), 'reflect'), d.content[7].weight, d.content[7].bias).tanh()
    scores = F.conv2d(up(head, f), head[6].weight, head[6].bias)
    a = scores.sigmoid() if kind == 'sigmoid' else scores.softmax(1)
    return sum(a[:, i:i+1]*contents[:, 2*i:2*i+2] for i in range(4))+a[:, 4:]*x

@pytest.mark.parametrize('variant', ['paper', 'released'])
@pytest.mark.parametrize('size', [(16, 16), (20, 28), (8, 44), (68, 68)])
def test_the_whole_by_hand(variant, size):
    torch.manual_seed(6)
    net = CRAViM(1, variant, base_channels=4, n_blocks=2).double().eval()
    x = rand(2, 2, *size).double()
    torch.testing.assert_close(net(x), by_hand(net, x), atol=1e-9, rtol=1e-7)

def test_residual_blocks_start_as_released():
    torch.manual_seed(7)
    for m in (PlainResidual(64), CRAViM(base_channels=16, n_blocks=1).trunk.residual_1):
        for i in (1, 5): assert abs(m.conv_block[i].weight.std()-.02) < 1e-3 and not m.conv_block[i].bias.any()

@pytest.mark.parametrize('size', [(64, 64), (64, 100), (76, 68), (128, 64), (192, 68), (256, 256), (8, 8), (12, 8)])
def test_sizes(size):
    torch.manual_seed(8)
    for switch in ({}, dict(trunk='residual', decoder='plain')):
        net = CRAViM(**SMALL, **switch).eval()
        with torch.no_grad(): assert net(rand(1, 2, *size)).shape == (1, 2, *size)

@pytest.mark.parametrize('sources, noise, targets', [*itertools.product((1, 2, 3, 4), (0, 1, 2), (1, 2, 4))])
def test_numbers_of_images(sources, noise, targets):
    torch.manual_seed(9)
    net = CRAViM(sources, n_noise=noise, n_targets=targets, **SMALL).eval()
    x = rand(2, sources+noise, 12, 20).requires_grad_()
    y = net(x)
    assert y.shape == (2, targets, 12, 20)
    g, = torch.autograd.grad(y.square().sum(), x)
    assert (g.abs().amax((0, 2, 3)) > 0).all()
    direct = net.mixture(x).terms[:, -1]/net.mixture(x).maps[:, -1:]
    torch.testing.assert_close(direct, partner_images(x, partners(sources, noise, targets)), atol=1e-5, rtol=1e-4)

def test_two_plain_images_are_the_papers_case():
    torch.manual_seed(10)
    a, b = CRAViM(**SMALL).eval(), CRAViM(2, n_noise=0, n_targets=2, **SMALL).eval()
    b.load_state_dict(a.state_dict())
    x = rand(1, 2, 16, 16)
    assert torch.equal(a(x), b(x))

def test_illegal_input():
    net = CRAViM(**SMALL)
    for shape, said in [((1, 1, 16, 16), '2 channels'), ((1, 2, 18, 16), 'divisible by 4'), ((1, 2, 4, 16), 'at least 8'),
            ((2, 16, 16), 'batch axis')]:
        with pytest.raises(ShapeError, match=said): net(torch.zeros(shape))
    build = network('cravim').build
    for config, said in [(dict(varient='paper'), "Did you mean 'variant'"), (dict(gate='both'), 'expected'),
            (dict(n_noise=True), 'at least 0'), (dict(n_sources=0), 'at least 1'), (dict(input_term='yes'), 'setting of CRAViM'),
            (dict(decoder='content'), "Did you mean 'contents'"),
            (dict(variant='release'), "Did you mean 'released'")]:
        with pytest.raises(ConfigError, match=said): build(**config)

# --- switches

def test_every_switch_changes_names_and_the_output():
    record, x = network('cravim'), rand(1, 2, 16, 24)
    seen = {}
    for name, switch in {'as printed': {}, **record.ablations}.items():
        torch.manual_seed(11)
        net = record.build(**record.smallest | switch).eval()
        seen[name] = ({k for k, _ in net.named_parameters()}, net(x).detach())
    assert {'released', 'resnet', 'attention_gan', 'no_evss', 'no_maps', 'no_input', 'no_scan', 'matched'} <= set(seen)
    for (a, (names, out)), (b, (others, other)) in itertools.combinations(seen.items(), 2):
        assert names != others and not torch.equal(out, other), (a, b)

def test_stand_ins_are_what_their_names_say():
    record = network('cravim')
    with torch.device('meta'): nets = {n: record.build(**s) for n, s in record.ablations.items()}
    kinds = {n: {type(m).__name__ for m in net.modules()} for n, net in nets.items()}
    for n in ('resnet', 'attention_gan', 'no_evss'):
        assert 'EVSSBlock' not in kinds[n] and len(nets[n].trunk) == 9 and all(isinstance(m, PlainResidual) for m in nets[n].trunk)
    assert 'AttentionDecoder' not in kinds['resnet']|kinds['no_maps'] and 'EVSSBlock' in kinds['no_maps']
    assert count(nets['resnet']) == 49*2*64+64+9*64*128+128+9*128*256+256+18*(9*256*256+256)+294_912+128+73_728+64+49*64*2+2
    gan = nets['attention_gan'].decoder
    assert gan.content[7].weight.shape == (18, 64, 7, 7) and gan.attention.softmax[6].weight.shape == (10, 64, 1, 1)
    assert nets['no_scan'].trunk.evss_1.scan is None and not any(isinstance(m, SS2D) for m in nets['matched'].modules())
    assert abs(count(nets['matched'])/11_765_711-1) < 1e-3 and nets['no_input'].decoder.attention.sigmoid_contents[6].weight.shape[0] == 4

@pytest.mark.parametrize('mixer', MIXERS)
def test_record_says_whether_a_scan_is_inside(mixer):
    for trunk in ('evss', 'residual'):
        config = dict(**SMALL, mixer=mixer, trunk=trunk)
        inside = any(isinstance(m, SS2D) for m in CRAViM(**config).modules())
        assert network('cravim').scans(config) == inside

def test_gate_is_the_variants_unless_given():
    assert CRAViM(**SMALL).trunk.evss_1.listens == 'input' and CRAViM(1, 'released', **SMALL).trunk.evss_2.listens == 'branches'
    assert CRAViM(1, 'released', gate='input', **SMALL).trunk.evss_1.listens == 'input'

@pytest.mark.parametrize('spec', [Spec(s) for s in (1, 2, 3, 4)]+[Spec(1, 1, 2), Spec(1, 1, 2, steps=4), Spec(1, 1, 1, steps=4, latent=64),
    Spec(2, 1, 1, steps=4, latent=64), Spec(1, 0, 1, steps=4), Spec(0, 4, 4, steps=1000), Spec(0, 4, 8, steps=1000)], ids=str)
def test_fits_every_recipe(spec):
    config = fits(spec)
    n_in = config['n_sources']+config['n_noise']
    assert n_in == spec.sources+spec.noise+bool(spec.steps) == network('cravim').inputs.channels(config)
    assert CRAViM(**config, **SMALL)(rand(1, n_in, 8, 12)).shape == (1, spec.targets, 8, 12)

def test_running_averages_are_used_at_test_unless_asked():
    torch.manual_seed(12)
    x = rand(3, 2, 16, 16)
    nets = {a: CRAViM(**SMALL, norm_at_test=a) for a in ('running', 'batch_statistics')}
    nets['batch_statistics'].load_state_dict(nets['running'].state_dict())
    outs = [n.eval()(x) for n in nets.values()]
    assert CRAViM(**SMALL).config['norm_at_test'] == 'running' and not torch.allclose(*outs, atol=1e-4)

def test_stages_in_the_order_of_the_figure():
    seen = stages(CRAViM(base_channels=4, n_blocks=2), rand(1, 2, 16, 24))
    assert list(seen) == ['encoder_1', 'encoder_2', 'encoder_3', 'evss_1', 'residual_1', 'residual_2', 'evss_2', 'output']
    assert seen['evss_2'].shape == (1, 16, 4, 6) and seen['output'].shape == (1, 2, 16, 24)
    torch.manual_seed(17)
    net, x = CRAViM(**SMALL).eval(), rand(2, 2, 16, 24)
    seen = stages(net, x)
    assert torch.equal(seen['evss_2'], net.encoded(x)) and torch.equal(seen['output'], net(x))

# --- released weights

def test_released_weights_load_and_give_the_published_output(tmp_path):
    torch.manual_seed(13)
    shapes = released_shapes(c=4, n_blocks=2)
    file = {n: .1*rand(*s, seed=len(n)) if s else torch.tensor(3) for n, s in shapes.items()}
    file |= {n: v.abs()+.5 for n, v in file.items() if n.endswith('running_var')}
    net = CRAViM(1, 'released', base_channels=4, n_blocks=2).eval()
    did = load_released(net, {f'module.{k}': v for k, v in file.items()})
    assert set(did.loaded) == set(net.state_dict()) and did.kept == did.dropped == ()
    assert torch.equal(net.trunk.evss_2.scan.A_logs, file['VSS2.1.op.A_logs'])
    assert torch.equal(net.trunk.residual_2.conv_block[5].weight, file['resnet_blocks.1.conv2.weight'])
    assert torch.equal(net.decoder.attention.softmax[3].bias, file['deconv2_attention.bias'])
    x = rand(1, 2, 16, 20).double()
    torch.testing.assert_close(net.double()(x), by_hand(net, x), atol=1e-9, rtol=1e-7)

def test_wrong_files_change_nothing():
    file = {n: torch.zeros(s) for n, s in released_shapes(c=4, n_blocks=1).items()}
    net = CRAViM(1, 'released', **SMALL)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    bad = [file | {'extra.weight': torch.zeros(3)}, {k: v for k, v in file.items() if 'VSS1' not in k},
        file | {'conv1.bias': torch.full((4,), torch.nan)}, file | {'conv2.weight': torch.zeros(8, 4, 5, 5)}, [1, 2]]
    for wrong in bad:
        with pytest.raises(CheckpointError, match='released weights'): load_released(net, wrong)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())

UNPUBLISHED = [dict(variant='paper'), dict(n_spare=0), dict(mixer='ss2d'), dict(gate='input'), dict(decoder='plain'),
    dict(decoder='contents'), dict(trunk='residual'), dict(n_maps=6, n_spare=0), dict(n_maps=4), dict(n_extra=1),
    dict(norm_at_test='batch_statistics'), dict(n_sources=2), dict(n_sources=3, n_noise=0), dict(n_targets=1)]

@pytest.mark.parametrize('config', UNPUBLISHED, ids=str)
def test_released_weights_go_into_the_released_network_only(config):
    file = {n: torch.zeros(s) for n, s in released_shapes(c=4, n_blocks=1).items()}
    with pytest.raises(ConfigError, match='network for released weights') as said:
        load_released(CRAViM(**SMALL | dict(variant='released') | config), file)
    assert next(iter(config)) in str(said.value) or 'n_targets' in str(said.value)

@pytest.mark.parametrize('config', [dict(), dict(gate='branches'), dict(n_sources=2, n_noise=0)], ids=str)
def test_what_is_the_released_network_takes_them(config):
    "However it is written; all of them give the same output"
    file = {n: .1*rand(*s, seed=len(n)).abs() if s else torch.tensor(3) for n, s in released_shapes(c=4, n_blocks=1).items()}
    nets, x = [CRAViM(**SMALL | dict(variant='released') | c).eval() for c in ({}, config)], rand(1, 2, 20, 28)
    for net in nets: load_released(net, file)
    with torch.no_grad(): assert torch.equal(nets[0](x), nets[1](x))
