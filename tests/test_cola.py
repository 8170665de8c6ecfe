"CoLa-Diff: conditioning blocks and the latent network, against oracles, hand counts and hostile settings"
import dataclasses
import inspect
import itertools
import json
import math

import pytest
import test_networks as common
import torch
from torch import nn

from i2i_mamba_nb.blocks import conditioning as cond
from i2i_mamba_nb.blocks.wavelet import CooperativeFilter
from i2i_mamba_nb.core import ConfigError, ShapeError, Spec, network
from i2i_mamba_nb.measure.complexity import multiply_adds
from i2i_mamba_nb.models import cola_diff as cola
from i2i_mamba_nb.models.cola_diff import CoLaDiff

TINY = dict(base_channels=8, multipliers=[1, 2], n_blocks=1, attention_at=[2], n_transformers=1, factor=2)

def rng(seed=0): return torch.Generator().manual_seed(seed)
def count(module): return sum(p.numel() for p in module.parameters())

def build(n=2, seed=0, **settings):
    torch.manual_seed(seed)
    return CoLaDiff(n, **TINY | settings)

def given(net, size=(16, 24), b=2, seed=1):
    "Inputs of a network whose conditions come beside x"
    c, g = net.config, rng(seed)
    return (torch.randn(b, c['n_noise'], *size, generator=g), torch.randint(0, 1000, (b,), generator=g),
        torch.rand(b, sum(net.groups), *(c['factor']*n for n in size), generator=g)*2-1)

# time ---------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('shift', [0, 1])
@pytest.mark.parametrize('width, period', [(2, 1e4), (6, 1e4), (128, 1e4), (10, 50.)])
def test_time_code_equals_diffusers(width, period, shift):
    embeddings = pytest.importorskip('diffusers.models.embeddings', reason='diffusers is the oracle')
    t = torch.tensor([0, 1, 17, 500, 999])
    if width == 2 and shift: pytest.skip('diffusers divides by zero here; ours has the one frequency 1')
    expected = embeddings.get_timestep_embedding(t, width, flip_sin_to_cos=False, downscale_freq_shift=shift, max_period=period)
    torch.testing.assert_close(cond.sinusoidal(t, width, max_period=period, shift=shift), expected, atol=2e-4, rtol=0)

@pytest.mark.parametrize('shift', [0, 1])
def test_slowest_clock(shift):
    for K in (2, 5, 64):
        sine, cosine = cond.sinusoidal(torch.tensor([100]), 2*K, shift=shift)[0].view(2, K)[:, -1].tolist()
        assert math.atan2(sine, cosine) == pytest.approx(100*1e4**(-(K-1)/(K-shift)), rel=1e-3)
    assert cond.sinusoidal(torch.tensor([3]), 2, shift=1)[0].tolist() == pytest.approx([math.sin(3), math.cos(3)])
    for bad in (2, -1, None):
        with pytest.raises(ConfigError, match='shift of the time code.*0 or 1'): cond.sinusoidal(torch.tensor([3]), 6, shift=bad)

def test_time_embedding_passes_its_shift_on():
    e, t = cond.TimeEmbedding(6, 7, shift=1), torch.tensor([3, 900])
    assert torch.equal(e(t), e.second(torch.nn.functional.silu(e.first(cond.sinusoidal(t, 6, shift=1)))))
    e.shift = 0
    assert torch.equal(e(t), e.second(torch.nn.functional.silu(e.first(cond.sinusoidal(t, 6)))))

def test_time_embedding_layers_and_dtypes():
    e = cond.TimeEmbedding(4, 7)
    t = torch.tensor([3, 900])
    by_hand = e.second(torch.nn.functional.silu(e.first(cond.sinusoidal(t, 4))))
    assert torch.equal(e(t), by_hand) and count(e) == 5*7+8*7 and torch.equal(e(t), e(t.float()))
    assert e.double()(t).dtype == torch.float64
    for bad in (0, 3, -2, 2.5):
        with pytest.raises(ConfigError, match='even number'): cond.sinusoidal(t, bad)

# automatic weights --------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('activation, start', [('sigmoid', 1.5), ('tanh', 1.)])
@pytest.mark.parametrize('shape', [(1, 1, 1, 1), (2, 3, 5, 7), (3, 160, 4, 9)])
def test_gate_at_the_start(activation, start, shape):
    y = 1e3*torch.randn(shape, generator=rng())
    gate = cond.AutoWeight(shape[1], activation=activation)
    assert torch.equal(gate.gate(y), torch.full((*shape[:2], 1, 1), start)) and torch.equal(gate(y), start*y)
    assert [p.shape for p in gate.parameters()] == [(shape[1],)]*3

@pytest.mark.parametrize('activation, S', [('sigmoid', lambda v: 1/(1+math.exp(-v))), ('tanh', math.tanh)])
@pytest.mark.parametrize('eps', [1e-5, .3])
def test_gate_equals_the_equations_with_loops(activation, S, eps):
    y = torch.randn(2, 4, 3, 5, generator=rng(), dtype=torch.float64)
    mu, nu, o = torch.randn(3, 4, generator=rng(1), dtype=torch.float64)
    gate = cond.auto_weight(y, mu, nu, o, activation=activation, eps=eps)
    for b in range(2):
        G = [mu[c]*math.sqrt(sum(float(v)**2 for v in y[b, c].flatten())+eps) for c in range(4)]
        norm = math.sqrt(sum(float(g)**2 for g in G)+eps)
        for c in range(4): assert abs(float(gate[b, c])-1-S(float(nu[c]*math.sqrt(4)*G[c]/norm+o[c]))) < 1e-12

def test_gate_competes_and_does_not_see_the_scale():
    y = torch.randn(2, 5, 6, 7, generator=rng(), dtype=torch.float64)
    mu, nu, o = torch.rand(3, 5, generator=rng(1), dtype=torch.float64)+.1
    gate = cond.auto_weight(y, mu, nu, o)
    torch.testing.assert_close(cond.auto_weight(1e3*y, mu, nu, o), gate, atol=1e-6, rtol=0)
    torch.testing.assert_close(cond.auto_weight(y.flip(3), mu, nu, o), gate)
    louder = y*torch.tensor([1., 1, 9, 1, 1], dtype=torch.float64).view(5, 1, 1)
    change = (cond.auto_weight(louder, mu, nu, o)-gate)[..., 0, 0]
    assert (change[:, 2] > 0).all() and (change[:, [0, 1, 3, 4]] < 0).all()
    assert torch.equal(cond.auto_weight(torch.cat([y, 5*y]), mu, nu, o)[:2], gate)

def test_gate_derivatives():
    y = torch.randn(1, 3, 2, 3, generator=rng(), dtype=torch.float64, requires_grad=True)
    mu, nu, o = (v.detach().clone().requires_grad_() for v in torch.randn(3, 3, generator=rng(1), dtype=torch.float64))
    for activation in ('sigmoid', 'tanh'):
        assert torch.autograd.gradcheck(lambda *v, a=activation: cond.auto_weight(*v, activation=a)*v[0], (y, mu, nu, o))
    silent = torch.zeros(1, 3, 2, 3, requires_grad=True)
    gate = cond.AutoWeight(3)
    with torch.no_grad(): gate.nu += 1
    gate(silent).sum().backward()
    assert silent.grad.isfinite().all() and all(p.grad.isfinite().all() for p in gate.parameters())

def test_gate_in_half_precision_and_wrong_names():
    y = 300*torch.randn(1, 3, 64, 64, generator=rng())
    mu, nu, o = torch.ones(3), torch.full((3,), .5), torch.zeros(3)
    torch.testing.assert_close(cond.auto_weight(y.half(), mu, nu, o), cond.auto_weight(y, mu, nu, o), atol=1e-3, rtol=0)
    with pytest.raises(ConfigError, match="Did you mean 'tanh'"): cond.AutoWeight(3, activation='than')

# attentional feature fusion -----------------------------------------------------------------------------------------------------------

def test_fusion_is_the_weighted_mean_of_its_branches():
    torch.manual_seed(0)
    fuse = cond.AttentionalFusion(12)
    X, Y = torch.randn(2, 3, 12, 5, 7).unbind(0)
    M = fuse.weights(X+Y)
    assert M.shape == X.shape and (M > 0).all() and (M < 1).all()
    torch.testing.assert_close(fuse(X, Y), M*X+(1-M)*Y)
    torch.testing.assert_close(fuse(X, Y)+fuse(Y, X), X+Y)
    torch.testing.assert_close(fuse(X, X), X)
    local, whole = fuse.weights.local_view(X), fuse.weights.global_view(X.mean((2, 3), keepdim=True))
    torch.testing.assert_close(fuse.weights(X), torch.sigmoid(local+whole))
    assert whole.shape == (3, 12, 1, 1)

def test_fusion_sees_one_image_at_a_time_and_its_whole():
    torch.manual_seed(0)
    fuse, f = cond.AttentionalFusion(8).train(), torch.randn(3, 8, 6, 5)
    torch.testing.assert_close(fuse.weights(f)[1:2], fuse.weights(f[1:2]))
    g = f.clone()
    g[:, :, 0, 0] += 20
    assert (fuse.weights(g)-fuse.weights(f))[..., -1, -1].abs().max() > 1e-4
    assert fuse(torch.randn(1, 8, 1, 1), torch.randn(1, 8, 1, 1)).isfinite().all()

@pytest.mark.parametrize('c_in, c_out, stride, time_width', [(8, 8, 2, 0), (8, 12, 1, 5), (33, 70, 2, 3), (1, 1, 1, 0), (128, 128, 2, 0)])
def test_bottleneck_layers(c_in, c_out, stride, time_width):
    torch.manual_seed(0)
    block, m = cond.WideBottleneck(c_in, c_out, stride=stride, time_width=time_width), max(c_out//4, 4)
    shapes = {tuple(p.shape) for p in block.parameters() if p.ndim == 4}
    assert {(m, c_in, 1, 1), (m, m, 3, 3), (m, m, 5, 5), (m, m, 7, 7), (c_out, m, 1, 1)} <= shapes
    assert [c.stride for c in (block.conv_3, block.conv_5, block.conv_7)] == [(stride, stride)]*3
    f, e = torch.randn(2, c_in, 10, 6), torch.randn(2, time_width) if time_width else None
    more = () if e is None else (e,)
    h = block.reduce(f)
    if time_width: h = h+block.time(torch.nn.functional.silu(e))[..., None, None]
    h = block.norm(h)
    join = block.join(torch.nn.functional.avg_pool2d(f, 2) if stride == 2 else f)
    expected = join+block.expand(block.conv_3(h)+block.fusion(block.conv_5(h), block.conv_7(h)))
    torch.testing.assert_close(block(f, *more), expected)
    assert block(f, *more).shape == (2, c_out, 10//stride, 6//stride)

def test_bottleneck_keeps_its_input_through_the_join():
    torch.manual_seed(0)
    block, f = cond.WideBottleneck(8, 8, stride=2), torch.randn(1, 8, 6, 8)
    for p in block.expand.parameters(): nn.init.zeros_(p)
    torch.testing.assert_close(block(f), torch.nn.functional.avg_pool2d(f, 2))

# structural guidance ------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('dtype', [torch.uint8, torch.int16, torch.int64, torch.float32, torch.bool])
def test_masks_are_white_grey_fluid_and_exclude_each_other(dtype):
    codes = torch.randint(0, 2 if dtype is torch.bool else 4, (3, 1, 6, 7), generator=rng()).to(dtype)
    masks = cond.tissue_masks(codes)
    assert masks.dtype == torch.float32 and masks.shape == (3, 3, 6, 7)
    for k, code in enumerate((3, 2, 1)): assert torch.equal(masks[:, k], (codes[:, 0].long() == code).float())
    assert torch.equal(masks.sum(1, keepdim=True), (codes != 0).float())

def test_a_tumour_takes_its_pixels_from_the_others():
    codes, tumour = torch.randint(0, 4, (2, 1, 9, 5), generator=rng()), torch.randint(0, 2, (2, 1, 9, 5), generator=rng(1))
    masks = cond.tissue_masks(codes, tumour)
    assert masks.shape[1] == 4 and torch.equal(masks[:, 3:], tumour.float())
    assert torch.equal(masks.sum(1, keepdim=True), ((codes > 0) | (tumour > 0)).float())
    assert 'tumour' in inspect.signature(cond.structural_guidance).parameters
    assert inspect.signature(cond.structural_guidance).parameters['tumour'].default is None

@pytest.mark.parametrize('bad', [torch.full((1, 1, 3, 3), 4), torch.full((1, 1, 3, 3), -1), torch.full((1, 1, 3, 3), 1.5),
    torch.full((1, 1, 3, 3), math.nan), torch.zeros(1, 2, 3, 3), torch.zeros(1, 3, 3)])
def test_labels_that_are_none_are_refused(bad):
    with pytest.raises(ShapeError, match='tissue codes.*whole numbers 0 to 3'): cond.tissue_masks(bad)

def test_density_against_loops():
    x, region = torch.rand(2, 2, 4, 5, generator=rng(), dtype=torch.float64)*2-1, torch.randint(0, 2, (2, 1, 4, 5), generator=rng(1))
    bins, width = 16, .8
    kernel = [math.exp(-.5*(k/width)**2) for k in range(-3, 4)]
    curves, maps = cond.density_curve(x, region, bins=bins, width=width), cond.intensity_density(x, region, bins=bins, width=width)
    for b, s in itertools.product(range(2), range(2)):
        counts = [0.]*bins
        for i, j in itertools.product(range(4), range(5)):
            place = (float(x[b, s, i, j])+1)/2*(bins-1)
            low = min(int(place), bins-2)
            if region[b, 0, i, j]: counts[low] += 1-(place-low); counts[low+1] += place-low
        smooth = [sum(kernel[k+3]*counts[v+k] for k in range(-3, 4) if 0 <= v+k < bins) for v in range(bins)]
        density = [v/sum(smooth)*(bins-1)/2 for v in smooth]
        torch.testing.assert_close(curves[b, s], torch.tensor(density, dtype=torch.float64))
        for i, j in itertools.product(range(4), range(5)):
            place = (float(x[b, s, i, j])+1)/2*(bins-1)
            low = min(int(place), bins-2)
            value = (density[low]*(1-place+low)+density[low+1]*(place-low))/max(density)
            assert abs(float(maps[b, s, i, j])-value*int(region[b, 0, i, j])) < 1e-9

def test_density_is_one_image_at_a_time_inside_the_region_only():
    x, region = torch.rand(3, 2, 12, 10, generator=rng())*2-1, torch.randint(0, 4, (3, 1, 12, 10), generator=rng(1))
    d = cond.intensity_density(x, region)
    assert d.min() >= 0 and d.max() <= 1 and (d*(region == 0)).abs().max() == 0 and (d.amax((2, 3)) > .5).all()
    torch.testing.assert_close(cond.intensity_density(x[1:2], region[1:2]), d[1:2])
    outside = torch.where(region == 0, torch.ones(()), x)
    assert torch.equal(cond.intensity_density(outside, region), d)
    assert cond.intensity_density(x, 0*region).abs().max() == 0
    torch.testing.assert_close(cond.intensity_density(1.005*x.sign(), region), cond.intensity_density(x.sign(), region))
    torch.testing.assert_close(cond.density_curve(x, region).sum(2)*2/63, torch.ones(3, 2))

@pytest.mark.parametrize('low', [torch.bfloat16, torch.float16])
def test_density_is_computed_in_full_precision(low):
    x, region = (torch.rand(1, 2, 96, 96, generator=rng())*2-1).to(low), torch.randint(0, 4, (1, 1, 96, 96), generator=rng(1))
    curve, d = cond.density_curve(x, region), cond.intensity_density(x, region)
    assert curve.dtype == d.dtype == torch.float32
    torch.testing.assert_close(curve, cond.density_curve(x.float(), region))
    torch.testing.assert_close(d, cond.intensity_density(x.float(), region))
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(cond.density_curve(x.float(), region), curve) and torch.equal(cond.intensity_density(x.float(), region), d)
        assert cond.structural_guidance(x, region).dtype == low
    assert cond.density_curve(x.double(), region).dtype == torch.float64

def test_density_refuses_what_it_cannot_count():
    x, region = torch.rand(1, 1, 6, 5, generator=rng())*2-1, torch.ones(1, 1, 6, 5)
    for bad in (math.nan, math.inf, -math.inf, 1.02, -1.02):
        y = x.clone()
        y[0, 0, 2, 3] = bad
        for call in (cond.density_curve, cond.intensity_density, cond.structural_guidance):
            with pytest.raises(ShapeError, match=r'sources of the density.*floating values in \[-1, 1\]'): call(y, region)
    with pytest.raises(ShapeError, match='floating'): cond.density_curve((x > 0).long(), region)
    for bad, said in [(dict(bins=1), 'bins of the density.*at least 2'), (dict(bins=8.), 'bins'), (dict(bins=True), 'bins'),
            (dict(width=0), 'width of the density.*above 0'), (dict(width=-1.), 'width'), (dict(width=math.nan), 'width'),
            (dict(width=math.inf), 'width'), (dict(width='1'), 'width')]:
        with pytest.raises(ConfigError, match=said): cond.density_curve(x, region, **bad)

def test_masks_of_two_sizes_are_refused():
    tissue = torch.ones(2, 1, 6, 5)
    for bad in (tissue[:1], tissue[..., :4], tissue[:, :, :1], tissue[:, 0]):
        with pytest.raises(ShapeError, match='tumour mask.*that of the tissue codes'): cond.tissue_masks(tissue, bad)

def test_wide_bottleneck_knows_two_strides():
    for bad in (0, 3, 4, 1.5, None):
        with pytest.raises(ConfigError, match='stride of WideBottleneck.*1 or 2'): cond.WideBottleneck(8, 8, stride=bad)

@pytest.mark.parametrize('least, expected', [(4, {1: 1, 7: 1, 8: 2, 12: 3, 32: 8, 48: 12, 64: 16, 128: 32, 160: 32, 512: 32}),
    (1, {1: 1, 7: 7, 32: 32, 48: 24, 64: 32, 96: 32, 128: 32})])
def test_groups_of_a_normalisation(least, expected):
    assert {c: cond.norm_groups(c, least) for c in expected} == expected
    for c in range(1, 300):
        g = cond.norm_groups(c, least)
        assert c % g == 0 and g <= 32 and (c//g >= least or g == 1)
        assert not any(c % n == 0 and c//n >= least for n in range(g+1, 33))

def test_guidance_order_and_where_it_comes_from():
    sources, tissue = torch.rand(2, 3, 8, 6, generator=rng())*2-1, torch.randint(0, 4, (2, 1, 8, 6), generator=rng(1))
    y = cond.structural_guidance(sources, tissue)
    assert y.shape == (2, 9, 8, 6) and torch.equal(y[:, :3], sources) and torch.equal(y[:, 3:6], cond.tissue_masks(tissue))
    assert torch.equal(y[:, 6:], cond.intensity_density(sources, tissue))
    with_tumour = cond.structural_guidance(sources, tissue, tumour=tissue*0+1)
    assert with_tumour.shape[1] == 10 and with_tumour[:, 3:6].abs().max() == 0 and with_tumour[:, 6].min() == 1
    assert not {'target', 'fake', 'y'} & set(inspect.signature(cola.conditions).parameters)
    for bad in (tissue[:1], tissue[..., :5]):
        with pytest.raises(ShapeError, match='grid of the sources'): cond.structural_guidance(sources, bad)

@pytest.mark.parametrize('guidance', ['none', 'tissue', 'tumour'])
def test_conditions_of_a_network(guidance):
    sources, codes = torch.rand(2, 2, 16, 24, generator=rng())*2-1, torch.randint(0, 4, (2, 1, 16, 24), generator=rng(1))
    labels = dict(tissue=codes, tumour=(codes == 2).long())
    wanted = dict(none=[], tissue=['tissue'], tumour=['tissue', 'tumour'])[guidance]
    net = build(guidance=guidance)
    b = cola.conditions(net, sources, **{k: labels[k] for k in wanted})
    assert b.shape[1] == sum(net.groups) and net.encode(b).shape == (2, net.encoder.channels, 8, 12)
    expected = cond.structural_guidance(sources, **{k: labels[k] for k in wanted}) if wanted else sources
    assert torch.equal(b, expected) and torch.equal(net.conditions(sources, **{k: labels[k] for k in wanted}), expected)
    for other in ([], ['tissue'], ['tissue', 'tumour']):
        if other == wanted: continue
        with pytest.raises(ConfigError, match='labels'): cola.conditions(net, sources, **{k: labels[k] for k in other})
    with pytest.raises(ShapeError, match='2 channels'): cola.conditions(net, sources[:, :1], **{k: labels[k] for k in wanted})

# encoder of conditions ----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('factor, token_size, n_blocks', [(1, 1, 1), (2, 1, 0), (4, 1, 2), (8, 1, 1), (1, 4, 1), (2, 2, 2), (4, 3, 0)])
def test_encoder_reaches_the_latent_grid(factor, token_size, n_blocks):
    torch.manual_seed(0)
    net = cond.ConditionEncoder((1, 3, 2), width=6, factor=factor, n_blocks=n_blocks, token_size=token_size)
    h, w = 3*token_size*factor, 5*token_size*factor
    assert net(torch.randn(2, 6, h, w)).shape == (2, 18, 3*token_size, 5*token_size)
    assert sum(isinstance(m, nn.Conv2d) and m.stride == (2, 2) for s in net.stems for m in s) == 3*round(math.log2(factor))
    assert len(net.blocks) == n_blocks and all(p.grad is None for p in net.parameters())

def test_encoder_stems_are_their_own():
    torch.manual_seed(0)
    net = cond.ConditionEncoder((1, 1, 3), width=4, n_blocks=0, gate='none')
    b = torch.randn(1, 5, 16, 16)
    for k, channels in enumerate(((0,), (1,), (2, 3, 4))):
        other = b.clone()
        other[:, channels] += 1
        moved = (net(other)-net(b)).abs().amax((0, 2, 3)).view(3, 4).amax(1) > 0
        assert moved.tolist() == [i == k for i in range(3)]
    swapped = net(b[:, [1, 0, 2, 3, 4]])
    assert (swapped[:, :4]-net(b)[:, 4:8]).abs().max() > 1e-3

def test_encoder_attention_is_global_and_knows_places():
    torch.manual_seed(0)
    net = cond.ConditionEncoder((2,), width=8, factor=1, n_blocks=1, gate='none').double()
    y = torch.randn(1, 8, 6, 9).double()
    far = y.clone()
    far[:, 0, -1, -1] += 1
    assert (net.mix(far)-net.mix(y)).abs().amax((0, 1)).min() > 0
    assert (net.mix(y.flip(3)).flip(3)-net.mix(y)).abs().max() > 1e-4
    with torch.no_grad(): net.places.zero_()
    torch.testing.assert_close(net.mix(y.flip(3)).flip(3), net.mix(y))

def test_places_inform_the_blocks_but_do_not_come_out():
    net, y = cond.ConditionEncoder((2,), width=8, factor=1, n_blocks=2, gate='none'), torch.randn(1, 8, 4, 5, generator=rng())
    for block in net.blocks:
        for p in (*block.out.parameters(), *block.mlp[2].parameters()): nn.init.zeros_(p)
    torch.testing.assert_close(net.mix(y), y, atol=1e-6, rtol=0)

def test_transformer_block_equals_torch():
    torch.manual_seed(0)
    mine = cond.TransformerBlock(96).eval()
    theirs = nn.TransformerEncoderLayer(96, 3, 384, 0., 'gelu', batch_first=True, norm_first=True).eval()
    for a, b in [(theirs.norm1, mine.norm), (theirs.norm2, mine.norm_mlp), (theirs.linear1, mine.mlp[0]), (theirs.linear2, mine.mlp[2]),
            (theirs.self_attn.out_proj, mine.out)]: a.load_state_dict(b.state_dict())
    theirs.self_attn.load_state_dict(dict(in_proj_weight=mine.qkv.weight, in_proj_bias=mine.qkv.bias), strict=False)
    y = torch.randn(2, 11, 96)
    torch.testing.assert_close(mine(y), theirs(y), atol=1e-5, rtol=1e-5)

@pytest.mark.parametrize('bad, said', [(dict(groups=()), 'conditions'), (dict(groups=(1, 0)), 'channels'),
    (dict(groups=(1,), factor=6), 'power of 2'), (dict(groups=(1,), width=0), 'width'), (dict(groups=(1,), gate='tan'), "'tanh'"),
    (dict(groups=(1,), token_size=0), 'token_size'),
    (dict(groups=(1,), n_blocks=-1), 'blocks of ConditionEncoder')])
def test_encoder_refuses(bad, said):
    with pytest.raises(ConfigError, match=said): cond.ConditionEncoder(**bad)

# the network --------------------------------------------------------------------------------------------------------------------------

def copy_plain(ours, theirs):
    "Weights of a plain LatentUNet into diffusers' UNet2DModel, layer by layer"
    def layer(a, b): b.load_state_dict({k: v.view_as(b.state_dict()[k]) for k, v in a.state_dict().items()})
    def residual(a, b):
        for x, y in [(a.first[0][0], b.norm1), (a.first[1], b.conv1), (a.time, b.time_emb_proj), (a.second[0][0], b.norm2),
                (a.second[1], b.conv2)]:
            layer(x, y)
        assert (b.conv_shortcut is None) == isinstance(a.join, nn.Identity)
        if b.conv_shortcut is not None: layer(a.join, b.conv_shortcut)
    def attention(a, b):
        layer(a.norm, b.group_norm), layer(a.out, b.to_out[0])
        for n, w, bias in zip((b.to_q, b.to_k, b.to_v), a.qkv.weight.chunk(3), a.qkv.bias.chunk(3), strict=True):
            n.load_state_dict(dict(weight=w[..., 0], bias=bias))
    def step(a, res, att):
        residual(a.residual, res)
        assert (a.attention is None) == (att is None)
        if att is not None: attention(a.attention, att)
    layer(ours.time.first, theirs.time_embedding.linear_1), layer(ours.time.second, theirs.time_embedding.linear_2)
    layer(ours.enter, theirs.conv_in), layer(ours.leave[0][0], theirs.conv_norm_out), layer(ours.leave[1], theirs.conv_out)
    down, up = iter(ours.down), iter(ours.up)
    for block in theirs.down_blocks:
        for k, res in enumerate(block.resnets): step(next(down), res, block.attentions[k] if hasattr(block, 'attentions') else None)
        if block.downsamplers: layer(next(down).halve, block.downsamplers[0].conv)
    residual(ours.middle_1.residual, theirs.mid_block.resnets[0]), residual(ours.middle_2.residual, theirs.mid_block.resnets[1])
    attention(ours.middle_1.attention, theirs.mid_block.attentions[0])
    for block in theirs.up_blocks:
        for k, res in enumerate(block.resnets):
            a = next(up)
            step(a, res, block.attentions[k] if hasattr(block, 'attentions') else None)
            assert (a.up is not None) == bool(block.upsamplers and k == len(block.resnets)-1)
            if a.up is not None: layer(a.up, block.upsamplers[0].conv)
    assert next(down, None) is None and next(up, None) is None

def plain_twin(c_in, multipliers, n_blocks, attention_at, n_out):
    "A plain LatentUNet and diffusers' network of the same plan"
    diffusers = pytest.importorskip('diffusers', reason='diffusers is the oracle')
    config = dict(base_channels=128, multipliers=multipliers, n_blocks=n_blocks, attention_at=attention_at, latent_blocks='plain',
        filtering=False, n_targets=n_out)
    kinds = [2**k in attention_at for k in range(len(multipliers))]
    theirs = diffusers.UNet2DModel(in_channels=c_in, out_channels=n_out, layers_per_block=n_blocks, attention_head_dim=32,
        block_out_channels=tuple(128*m for m in multipliers), norm_num_groups=32, norm_eps=1e-5, flip_sin_to_cos=False, freq_shift=0,
        down_block_types=tuple('AttnDownBlock2D' if k else 'DownBlock2D' for k in kinds),
        up_block_types=tuple('AttnUpBlock2D' if k else 'UpBlock2D' for k in kinds[::-1]))
    return cola.LatentUNet(c_in, config), theirs

def test_plain_network_equals_diffusers_in_every_number():
    torch.manual_seed(0)
    ours, theirs = plain_twin(5, (1, 2), 1, (2,), 3)
    assert count(ours) == count(theirs)
    copy_plain(ours, theirs)
    x, t = torch.randn(2, 5, 8, 12), torch.tensor([0, 731])
    with torch.no_grad(): torch.testing.assert_close(ours(x, t), theirs(x, t).sample, atol=2e-4, rtol=1e-4)

def test_plain_paper_size_counts_as_diffusers():
    with torch.device('meta'):
        ours, theirs = plain_twin(100, (1, 2, 2, 4), 2, (2, 4, 8), 8)
        assert count(ours) == count(theirs)
        assert count(CoLaDiff(**cola.PLAIN)) == count(theirs)+3*(9*32+32+2*(9*32*32+32))

def hand_count(n_sources=3, guidance=True):
    "Parameters at paper size from the layer list alone"
    def conv(i, o, k): return k*k*i*o+o
    def res(i, o): return 2*i+conv(i, o, 3)+513*o+2*o+conv(o, o, 3)+(conv(i, o, 1) if i != o else 0)
    def att(c): return 2*c+4*(c*c+c)
    def wide(c):
        m, r = c//4, max(c//16, 4)
        fusion = 2*(conv(m, r, 1)+2*r+conv(r, m, 1)+2*m)
        return 2*c+conv(c, m, 1)+2*m+sum(conv(m, m, k) for k in (3, 5, 7))+fusion+2*m+conv(m, c, 1)
    k = n_sources+2*guidance
    c = 32*k
    stems = n_sources*conv(1, 32, 3)+guidance*(conv(3, 32, 3)+conv(n_sources, 32, 3))+k*2*conv(32, 32, 3)
    encoder = stems+2*(12*c*c+13*c)+1+3*c
    down = 2*res(128, 128)+wide(128)+res(128, 256)+res(256, 256)+2*att(256)+wide(256)+2*(res(256, 256)+att(256))+wide(256)
    down += res(256, 512)+res(512, 512)+2*att(512)
    middle = 2*res(512, 512)+att(512)
    up = 2*res(1024, 512)+res(768, 512)+3*att(512)+conv(512, 512, 3)
    up += res(768, 256)+2*res(512, 256)+3*att(256)+conv(256, 256, 3)
    up += 2*res(512, 256)+res(384, 256)+3*att(256)+conv(256, 256, 3)+res(384, 128)+2*res(256, 128)
    filters = 4*(4*128+6*256+2*512)
    return encoder+(129*512+513*512)+conv(4+c, 128, 3)+down+filters+middle+up+2*128+conv(128, 8, 3)

@pytest.mark.parametrize('n', [1, 2, 3, 4])
@pytest.mark.parametrize('guidance', ['tissue', 'none'])
def test_paper_size_by_hand(n, guidance):
    with torch.device('meta'): assert count(CoLaDiff(n, guidance=guidance)) == hand_count(n, guidance == 'tissue')

def test_paper_defaults_word_for_word():
    with torch.device('meta'): net = CoLaDiff()
    assert net.config == dict(n_sources=3, n_targets=8, n_noise=4, factor=4, base_channels=128, multipliers=[1, 2, 2, 4], n_blocks=2,
        attention_at=[2, 4, 8], latent_blocks='down', guidance='tissue', gate='sigmoid', filtering=True,
        conditioning='concat', n_transformers=2)
    assert net.unet.enter.weight.shape == (128, 4+160, 3, 3) and net.unet.leave[1].weight.shape == (8, 128, 3, 3)
    assert isinstance(net.encoder.weigh, cond.AutoWeight) and net.encoder.weigh.activation == 'sigmoid' and len(net.encoder.blocks) == 2
    assert [isinstance(s.halve, cond.WideBottleneck) for s in net.unet.down if isinstance(s, cola.Down)] == [True]*3
    f = net.unet.filters[0]
    assert len(net.unet.filters) == 12 and isinstance(f, CooperativeFilter)
    assert f.blocks | dict(stride=None) == dict(patch=4, window=11, n_similar=8, stride=None)
    assert f.raw_H.shape == (1, 128)

def test_latent_step_by_hand():
    n, c = 64*64, 160
    encoder = 9*32*9*256**2+5*9*32*32*(128**2+64**2)+2*(12*c*c*n+2*n*n*c)
    with torch.device('meta'):
        net = CoLaDiff()
        assert multiply_adds(net.encoder, torch.empty(1, 9, 256, 256)) == encoder
        step = net.unet.up[3]
        res = (9*768*256+512*256/256+9*256*256+768*256)*256
        assert multiply_adds(step, torch.empty(1, 768, 16, 16), torch.empty(1, 512)) == res+4*256*256*256+2*256*256*256

def test_attention_stands_at_32_16_and_8():
    net = CoLaDiff(1, base_channels=8, guidance='none').eval()
    seen = cola.features(net, torch.zeros(1, 4, 64, 64), torch.tensor([1]), torch.zeros(1, 1, 256, 256))
    at = {n: m.shape[2] for n, m in seen.items() if n.endswith('attention')}
    assert sorted(at.values()) == [8]*6+[16]*5+[32]*5 and at['unet.middle_1.attention'] == 8

@pytest.mark.parametrize('n, guidance, conditioning', [(1, 'tissue', 'concat'), (2, 'none', 'concat'), (3, 'tumour', 'cross'),
    (4, 'tissue', 'concat'), (1, 'none', 'cross')])
@pytest.mark.parametrize('size', [(8, 8), (8, 24), (40, 16), (56, 24)])
def test_sizes_and_sources(n, guidance, conditioning, size):
    net = build(n, guidance=guidance, conditioning=conditioning, multipliers=[1, 2, 1, 2], attention_at=[4, 8])
    out = net(*given(net, size))
    assert out.shape == (2, 8, *size) and out.isfinite().all()

@pytest.mark.parametrize('factor', [1, 2, 4, 8])
def test_factors(factor):
    net = build(factor=factor)
    assert net(*given(net, (8, 24))).shape == (2, 8, 8, 24)

def test_image_sizes_64_to_256_at_paper_factor():
    net = build(1, factor=4, filtering=dict(n_similar=4)).eval()
    for h, w in ((64, 64), (96, 160), (224, 224), (256, 64)):
        with torch.no_grad(): assert net(*given(net, (h//4, w//4), b=1)).shape == (1, 8, h//4, w//4)

def test_everything_given_is_used():
    net = build(3).double().eval()
    x, t, b = (v.double() if v.is_floating_point() else v for v in given(net))
    with torch.no_grad():
        out = net(x, t, b)
        for k in range(b.shape[1]):
            other = b.clone()
            other[:, k] += .3
            assert (net(x, t, other)-out).abs().max() > 1e-5, k
        for k in range(4):
            other = x.clone()
            other[:, k] += .3
            assert (net(other, t, b)-out).abs().max() > 1e-3, k
        assert ((net(x, t+100, b)-out).abs().amax((1, 2, 3)) > 1e-4).all()
        both = net(x, torch.stack([t[0], t[1]+7]), b)
        assert torch.equal(both[0], out[0]) and (both[1]-out[1]).abs().max() > 1e-6

def test_conditions_are_encoded_once_for_all_times():
    net = build().eval()
    x, t, b = given(net)
    with torch.no_grad():
        y = net.encode(b)
        for shift in (0, 5, 400): assert torch.equal(net.denoise(x, t+shift, y), net(x, t+shift, b))
    assert 't' not in inspect.signature(net.encode).parameters

def test_every_skip_is_filtered_on_its_way():
    net = build(1, multipliers=[1, 2, 2], n_blocks=2, attention_at=[4]).eval()
    calls = []
    for k, phi in enumerate(net.unet.filters): phi.register_forward_hook(lambda m, i, o, k=k: calls.append((k, i[0].shape, o)))
    seen = {}
    for k, step in enumerate(net.unet.up): step.register_forward_hook(lambda m, i, o, k=k: seen.__setitem__(k, i[0]))
    with torch.no_grad(): net(*given(net))
    assert [k for k, *_ in calls] == list(range(len(net.unet.down)+1)) and len(net.unet.up) == len(calls)
    for k, (_, shape, filtered) in enumerate(calls):
        handed = seen[len(calls)-1-k]
        assert torch.equal(handed[:, -shape[1]:], filtered)

def test_filter_options_reach_the_filters():
    net = build(filtering=dict(levels=2, n_similar=4, wavelet='db2'))
    assert all(f.raw_H.shape[0] == 2 and f.blocks['n_similar'] == 4 and f.options['wavelet'] == 'db2' for f in net.unet.filters)
    assert net(*given(net)).shape == (2, 8, 16, 24)
    with pytest.raises(ConfigError, match="Did you mean 'levels'"): build(filtering=dict(levls=2))
    assert list(build(filtering={}).state_dict()) == list(build().state_dict())

def place_by_hand(at, width):
    "Code of one place (row, column), with loops"
    half = width//4*2
    code = [wave(n*1e4**(-k/(half//2))) for n in at for wave in (math.sin, math.cos) for k in range(half//2)]
    return code+[0.]*(width-2*half)

@pytest.mark.parametrize('context', [0, 6])
def test_grid_attention_by_its_equations(context):
    torch.manual_seed(0)
    look, f, y = cola.GridAttention(64, context), torch.randn(2, 64, 3, 5), torch.randn(2, 6, 12, 20)
    def attend(q, k, v):
        parts = [(q[:, s].mT@k[:, s]/math.sqrt(32)).softmax(-1)@v[:, s].mT for s in (slice(32), slice(32, 64))]
        return torch.cat(parts, 2).mT
    z = f.flatten(2)
    z = z+look.out(attend(*look.qkv(look.norm(z)).chunk(3, 1)))
    if context:
        with torch.no_grad(): look.cross_places.copy_(torch.tensor([.7, .4]))
        asking = torch.tensor([place_by_hand((4*i+1.5, 4*j+1.5), 64) for i, j in itertools.product(range(3), range(5))]).T
        asked = torch.tensor([place_by_hand(at, 6) for at in itertools.product(range(12), range(20))]).T
        k, v = look.cross_kv(y.flatten(2)+.4*asked).chunk(2, 1)
        z = z+look.cross_out(attend(look.cross_q(look.cross_norm(z)+.7*asking), k, v))
    torch.testing.assert_close(look(f, y) if context else look(f), z.view_as(f), atol=1e-5, rtol=1e-5)

@pytest.mark.parametrize('n_transformers', [0, 1])
def test_cross_attention_knows_where_the_condition_lies(n_transformers):
    net = build(conditioning='cross', n_transformers=n_transformers).double().eval()
    x, t, b = (v.double() if v.is_floating_point() else v for v in given(net))
    with torch.no_grad():
        y = net.encode(b)
        out = net.denoise(x, t, y)
        for other in (y.flip(3), y.flip(2), y.roll(1, 3)): assert (net.denoise(x, t, other)-out).abs().max() > 1e-6
        for m in net.modules():
            if isinstance(m, cola.GridAttention): m.cross_places.zero_()
        torch.testing.assert_close(net.denoise(x, t, y.flip(3)), net.denoise(x, t, y))

def test_cross_places_learn():
    net = build(conditioning='cross')
    net(*given(net)).square().sum().backward()
    grads = [m.cross_places.grad for m in net.modules() if isinstance(m, cola.GridAttention)]
    assert len(grads) == 4 and all((g != 0).all() for g in grads)

@pytest.mark.parametrize('side, at_rest', [(64, {'A': 2}), (128, {})])
def test_four_levels_on_small_images(side, at_rest):
    "At 64 pixels the deepest skips are 2 x 2: the thresholds of A rest there, all others learn, the output is finite"
    net = build(1, multipliers=[1, 2, 2, 4], attention_at=[2, 4, 8], factor=4, base_channels=4, filtering=dict(threshold=.01))
    out = net(*given(net, (side//4, side//4)))
    out.square().sum().backward()
    resting = [(k, band) for k, f in enumerate(net.unet.filters) for band in 'AHVD' if (getattr(f, f'raw_{band}').grad == 0).any()]
    assert out.isfinite().all() and all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())
    n = len(net.unet.filters)
    assert resting == [(n-k, band) for band, count in at_rest.items() for k in range(count, 0, -1)]
    assert all((net.unet.filters[k].raw_A.grad == 0).all() for k, _ in resting)

def test_denoise_and_encode_say_what_lacks():
    net = build()
    x, t, b = given(net)
    y = net.encode(b)
    for bad in (None, y[:1], y[:, 1:], y[..., :-1], b):
        with pytest.raises(ShapeError, match='encoded condition for CoLaDiff'): net.denoise(x, t, bad)
    with pytest.raises(ShapeError, match='time for CoLaDiff'): net.denoise(x, None, y)
    for call in (lambda: net.denoise(x.long(), t, y), lambda: net(x.long(), t, b)):
        with pytest.raises(ShapeError, match='images for CoLaDiff.*floating'): call()
    alone = CoLaDiff(**TINY | dict(n_sources=0, conditioning='in_x', factor=1, guidance='none'))
    assert alone.denoise(x, t).shape == alone(x, t).shape == (2, 8, 16, 24)
    with pytest.raises(ConfigError, match='no sources'): alone.encode(b)

# switches -----------------------------------------------------------------------------------------------------------------------------

MODIFIED = cond.WideBottleneck | CooperativeFilter | cond.AutoWeight | cond.TransformerBlock
def halving(net): return [m.halve for m in net.unet.down if isinstance(m, cola.Down)]
STAND_INS = dict(
    no_latent_modifications=lambda net: all(isinstance(m, nn.Conv2d) and m.stride == (2, 2) for m in halving(net)),
    no_guidance=lambda net: net.groups == (1, 1),
    no_auto_weight=lambda net: isinstance(net.encoder.weigh, nn.Identity),
    no_filtering=lambda net: len(net.unet.filters) == 0,
    plain=lambda net: not any(isinstance(m, MODIFIED) for m in net.modules()) and net.groups == (1, 1),
    cross_attention=lambda net: net.unet.enter.weight.shape[1] == 4 and net.unet.middle_1.attention.context == net.encoder.channels)

def test_every_switch_has_its_stand_in():
    assert set(STAND_INS) == set(network('cola_diff').ablations)
    assert not any(check(build()) for check in STAND_INS.values())

@pytest.mark.parametrize('name', STAND_INS)
def test_switches(name):
    switch = network('cola_diff').ablations[name]
    net, full = build(**switch), build()
    shapes = [{k: tuple(v.shape) for k, v in m.state_dict().items()} for m in (net, full)]
    assert shapes[0].keys() != shapes[1].keys() and STAND_INS[name](net)
    for m in (net, full):
        with torch.no_grad(): [p.copy_(.01*(1+torch.arange(p.numel()).view_as(p) % 7)) for p in m.parameters()]
    x, t, b = given(full)
    with torch.no_grad(): assert (net(x, t, b[:, :sum(net.groups)])-full(x, t, b)).abs().max() > 1e-6

def test_tanh_gate_starts_with_the_condition_as_it_is():
    tanh, none, sigmoid = build(gate='tanh').eval(), build(gate='none').eval(), build().eval()
    inputs = given(tanh)
    with torch.no_grad():
        torch.testing.assert_close(tanh(*inputs), none(*inputs))
        torch.testing.assert_close(sigmoid.encode(inputs[2]), 1.5*none.encode(inputs[2]))

def test_section_puts_the_wide_block_everywhere_on_the_way_down():
    net = build(latent_blocks='section', multipliers=[1, 2, 2], n_blocks=2)
    assert all(isinstance(getattr(s, 'residual', getattr(s, 'halve', None)), cond.WideBottleneck) for s in net.unet.down)
    assert all(isinstance(s.residual, cola.TimeResidual) for s in net.unet.up)
    x, t, b = given(net)
    assert (net(x, t, b)-net(x, t+300, b)).abs().max() > 1e-5

@pytest.mark.parametrize('wrong, said', [(dict(guidance='tisue'), "'tissue'"), (dict(gate='sigmoyd'), "'sigmoid'"),
    (dict(latent_blocks='planes'), "'plain'"),
    (dict(conditioning='concart'), "'concat'"), (dict(attention_at=[3]), r'some of \[1, 2\]'), (dict(factor=6), 'power of 2'),
    (dict(factor=0), 'factor'),
    (dict(n_targets=0), 'n_targets'), (dict(n_noise=0), 'n_noise'), (dict(n_sources=0), 'n_sources'), (dict(n_blocks=0), 'n_blocks'),
    (dict(multipliers=[]), 'levels'), (dict(multipliers=[1, 0], attention_at=[]), 'multiplier 2'),
    (dict(n_transformers=-1), 'n_transformers'),
    (dict(filtering='on'), 'filtering'), (dict(filtering=dict(channels=3)), "'channels' among its options"),
    (dict(attention_at=2), 'a list'),
    (dict(multipliers=2), 'a list'), (dict(multipliers='12'), 'a list'), (dict(attention_at='24'), 'a list'),
    (dict(attention_at=[[2]]), r'some of \[1, 2\]'), (dict(multipliers=[1, 1, 1, 1, 1]), 'at most four levels'),
    (dict(filtering=dict(stride=0)), 'stride of block matching'), (dict(filtering=dict(matching='off')), 'True or False'),
    (dict(conditioning='in_x'), 'factor=1'), (dict(base_channels=2.5), 'base_channels'),
    (dict(n_sources=True), 'n_sources'),
    (dict(conditioning='in_x', factor=1, n_sources=0, n_noise=0), 'at least one channel')])
def test_impossible_settings(wrong, said):
    with pytest.raises(ConfigError, match=said): CoLaDiff(**dict(n_sources=2) | TINY | wrong)

def test_unknown_setting_names_the_nearest():
    with pytest.raises(ConfigError, match="Did you mean 'filtering'"): network('cola_diff').build(filterin=True)

def test_illegal_conditions():
    net = build()
    x, t, b = given(net)
    for bad in (b[:1], b[:, :-1], b[..., :-2], torch.nn.functional.avg_pool2d(b, 2), None, 'text'):
        with pytest.raises(ShapeError, match='condition for CoLaDiff'): net(x, t, bad)
    for bad in (t[:1], t[:, None], 5, None):
        with pytest.raises(ShapeError, match='time for CoLaDiff'): net(x, bad, b)

# any recipe ---------------------------------------------------------------------------------------------------------------------------

SPECS = [Spec(n) for n in (1, 2, 3, 4)]+[Spec(1, 1, 2), Spec(1, 1, 2, 4), Spec(1, 1, 1, 4, 64),
    Spec(2, 1, 1, 4, 64), Spec(2, 4, 4, 1000), Spec(1, 4, 8, 1000), Spec(0, 4, 4, 1000)]

@pytest.mark.parametrize('spec', SPECS, ids=str)
def test_serves_every_recipe_in_pixels(spec):
    net = CoLaDiff(**dict(base_channels=8, n_blocks=1) | network('cola_diff').fits(spec))
    x, t = torch.randn(2, spec.sources+spec.noise, 16, 24, generator=rng()), torch.tensor([0, 3])
    out = net(x, t)
    assert out.shape == (2, spec.targets, 16, 24)
    for k in range(x.shape[1]):
        other = x.clone()
        other[:, k] += 1
        assert (net(other, t)-out).abs().max() > 1e-6, k
    with pytest.raises(ShapeError, match='channels'): net(x[:, 1:], t)
    with pytest.raises(ShapeError, match='Put it in x'): net(x, t, x)

def test_conditions_inside_x_are_the_conditions_beside_it():
    settings = dict(factor=1, n_transformers=0, guidance='none')
    beside, inside = build(**settings).eval(), build(conditioning='in_x', **settings).eval()
    assert list(beside.state_dict()) == list(inside.state_dict())
    x, t, b = given(beside)
    with torch.no_grad(): assert torch.equal(inside(torch.cat([b, x], 1), t), beside(x, t, b))

SMALL_PIXEL = {**TINY, **network('cola_diff').fits(Spec(2, 1, 1, 4)), 'attention_at': [2]}
PIXEL = dataclasses.replace(network('cola_diff'), smallest=SMALL_PIXEL)

@pytest.mark.parametrize('spec', SPECS, ids=str)
def test_record_describes_every_configuration_it_gives(spec):
    record = network('cola_diff')
    config = dict(base_channels=8, n_blocks=1, n_transformers=1) | record.fits(spec)
    net = record.build(**config)
    assert record.inputs.channels(config) == spec.sources+spec.noise and record.inputs.channels(net.config) == spec.sources+spec.noise
    x = torch.randn(2, record.inputs.channels(config), 16, 24, generator=rng())
    more = [make(config, 2, (16, 24), rng()) for make in record.inputs.further.values()]
    assert net(x, *more).shape == (2, *record.inputs.shape(config, (16, 24))) and torch.equal(net(x, *more), net(x, more[0]))

@pytest.mark.parametrize('conditioning, guidance', [('concat', 'tissue'), ('cross', 'tumour'), ('in_x', 'tissue'), ('in_x', 'none')])
def test_record_follows_the_switches(conditioning, guidance):
    record, config = network('cola_diff'), TINY | dict(n_sources=2, conditioning=conditioning, guidance=guidance, factor=1, n_noise=3)
    more = [make(config, 2, (16, 24), rng()) for make in record.inputs.further.values()]
    x = torch.randn(2, record.inputs.channels(config), 16, 24, generator=rng())
    assert record.build(**config)(x, *more).shape == (2, 8, 16, 24)

@pytest.mark.parametrize('check', ['test_02_right_shape_and_dtype_on_two_odd_sizes', 'test_04_every_parameter_learns',
    'test_05_overfits_one_pair', 'test_08_config_json_round_trip', 'test_10_bf16_and_recomputed_activations_agree',
    'test_12_torch_export_equals_eager'])
def test_common_checks_in_pixels(check): getattr(common, check)(PIXEL, PIXEL.smallest)

def test_illegal_input_in_pixels():
    "Without the condition, which may be left out here and so is legal as None"
    further = {k: v for k, v in PIXEL.inputs.further.items() if k == 'time'}
    record = dataclasses.replace(PIXEL, inputs=dataclasses.replace(PIXEL.inputs, further=further))
    common.test_11_illegal_input_is_refused_in_words(record, record.smallest)
    net, (x, t, nothing) = common.build(PIXEL, SMALL_PIXEL), common.inputs(PIXEL, SMALL_PIXEL)
    assert nothing.shape[1] == 0
    for bad in (torch.cat([nothing, nothing]), nothing[..., 1:], x, 'text', 0):
        with pytest.raises(ShapeError, match='condition for CoLaDiff'): net(x, t, bad)

def test_batch_and_repetition_in_pixels():
    common.test_06_deterministic_and_independent_of_the_batch(PIXEL, PIXEL.smallest, 'batch_statistics')
    a, b = (common.build(PIXEL, PIXEL.smallest) for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))

def test_record():
    record = network('cola_diff')
    assert record.kind == 'generator' and not record.scans({}) and list(record.inputs.further) == ['time', 'condition']
    assert record.inputs.channels({}) == 4 and record.inputs.shape({}, (64, 64)) == (8, 64, 64)
    b = record.inputs.further['condition']({}, 2, (8, 16), rng())
    assert b.shape == (2, 9, 32, 64) and b.min() >= -1 and b.max() <= 1
    json.dumps([record.smallest, record.presets, record.ablations])
    for preset in record.presets.values():
        with torch.device('meta'):
            net = record.build(**preset)
            assert net(*(v.to('meta') for v in given(net, (64, 64), 1))).shape == (1, 8, 64, 64)

def test_effective_fields_see_everything():
    latent, conditions = cola.latent_fields(build(1), size=16, n=1)
    assert latent.shape == (16, 16) and conditions.shape == (32, 32)
    assert latent.min() > 0 and conditions.min() > 0 and latent.argmax() in [16*8+8+k for k in (-17, -16, -15, -1, 0, 1, 15, 16, 17)]
