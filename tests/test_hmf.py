"HMF-MambaINR: scales and gates, the bound, the ensemble against a slow one, any resolution, counts, switches, layers against the text"
import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from i2i_mamba_nb.blocks.cmmamba import PaperStage
from i2i_mamba_nb.blocks.conv import ResidualCNN, activation_checkpointing
from i2i_mamba_nb.blocks.inr import INRB, PixelDecoder, PlainMLP, beside_grid, beside_points, fit_image, pixel_centres, positional_code
from i2i_mamba_nb.blocks.multiscale import MFEB, MFM, MSF, Addition, ConcatConv, ScaleConv, dilated, scale_weights, weight_bounds
from i2i_mamba_nb.core import ConfigError, ShapeError, Spec, network
from i2i_mamba_nb.measure.complexity import multiply_adds
from i2i_mamba_nb.models.adapter import adapted
from i2i_mamba_nb.models.hmf_mambainr import HMFMambaINR, decode, decode_at, decoded_size
from i2i_mamba_nb.models.i2i_mamba import I2IMamba

RECORD = network('hmf_mambainr')
SMALL = dict(base_channels=4, n_stages=3, hidden=[8, 8])

def parameters(m): return sum(p.numel() for p in m.parameters())

def rng(seed=0): return torch.Generator().manual_seed(seed)

def images(*shape, seed=0): return 2*torch.rand(*shape, generator=rng(seed))-1

def made(seed=0, **config):
    "A small network; weights that start at zero shaken, so that nothing is silent"
    torch.manual_seed(seed)
    net = HMFMambaINR(**SMALL | config)
    for m in net.modules():
        if isinstance(m, INRB): nn.init.normal_(m.f[0].weight, std=.2)
    return net

# ---------------------------------------------------------------- MSF, MFEB, MFM
@pytest.mark.parametrize('n', [2, 3, 4, 5, 9])
def test_weights_stay_inside_the_bound_and_reach_it(n):
    low, high = weight_bounds(n)
    assert low == pytest.approx(1/(1+(n-1)*math.e)) and high == pytest.approx(math.e/(math.e+n-1))
    for scale in (.1, 1, 10, 1e4):
        S = scale*torch.randn(50, n, 7, 3, generator=rng(n), dtype=torch.float64)
        w = scale_weights(S)
        torch.testing.assert_close(w.sum(1), torch.ones(50, 7, 3).double())
        assert low-1e-12 <= w.min() and w.max() <= high+1e-12
        if scale <= 1: assert torch.equal(w.argmax(1), S.argmax(1))
    for k in range(n):
        S = torch.full((1, n, 1), -1e3, dtype=torch.float64)
        S[0, k] = 1e3
        assert scale_weights(S)[0, k, 0].item() == pytest.approx(high, abs=1e-12)
        assert scale_weights(-S)[0, k, 0].item() == pytest.approx(low, abs=1e-12)

def test_the_printed_bound_for_four_scales():
    assert [round(v, 3) for v in weight_bounds(4)] == [.109, .475]

@pytest.mark.parametrize('reduction', [1, 2, 4])
@pytest.mark.parametrize('dilations', [(1, 2, 4, 8), (1, 3), (2, 2, 5), (1, 2, 3, 4, 6)])
def test_mfeb_is_the_formula(dilations, reduction):
    torch.manual_seed(0)
    c, n = 32, len(dilations)
    block, f = MFEB(c, 3, dilations=dilations, reduction=reduction).double(), torch.randn(2, 3*c, 9, 6, generator=rng()).double()
    F0 = F.conv2d(f, block.reduce.weight, block.reduce.bias)
    maps = [F.conv2d(F0, s.weight, s.bias, padding=d, dilation=d) for s, d in zip(block.scales, dilations, strict=True)]
    S = torch.stack([g(m.mean((2, 3), True))+g(m.amax((2, 3), True)) for g, m in zip(block.msf.conv, maps, strict=True)])
    a = 1/(1+torch.exp(-S))
    w = a.exp()/a.exp().sum(0)
    torch.testing.assert_close(block(f), (w*torch.stack(maps)).sum(0)+F0)
    inner = max(8, c//reduction)
    gate = c*c+c if reduction == 1 else 2*c*inner+inner+c
    assert parameters(block) == 3*c*c+c+n*(9*c*c+c)+n*gate

@pytest.mark.parametrize('d', [1, 2, 3, 8])
def test_dilation_spreads_nine_taps(d):
    x = torch.zeros(1, 1, 40, 40)
    x[..., 20, 19] = 1
    conv = dilated(1, d)
    nn.init.ones_(conv.weight), nn.init.zeros_(conv.bias)
    hit = conv(x)[0, 0].nonzero()
    assert sorted(map(tuple, hit.tolist())) == [(20+i, 19+k) for i in (-d, 0, d) for k in (-d, 0, d)]

def test_each_scale_and_both_poolings_are_heard():
    torch.manual_seed(1)
    msf, maps = MSF(5, 3).double(), [torch.randn(2, 5, 6, 7, generator=rng(k)).double() for k in range(3)]
    base = msf.weights(maps)
    for k in range(3):
        moved = [m.clone() for m in maps]
        moved[k][0, 2] += .5
        change = (msf.weights(moved)-base).abs()
        assert change[0].amax() > 1e-4 and change[1].max() == 0
    same_mean = [m.clone() for m in maps]
    same_mean[0][:, :, 0, 0] += 9
    same_mean[0][:, :, 0, 1] -= 9
    assert (msf.weights(same_mean)-base).abs().max() > 1e-4
    same_max = [m.clone() for m in maps]
    lowest = same_max[0].flatten(2).argmin(2)
    same_max[0].flatten(2).scatter_add_(2, lowest[..., None], torch.full((2, 5, 1), -20.).double())
    assert (msf.weights(same_max)-base).abs().max() > 1e-4

@pytest.mark.parametrize('options', [{}, dict(keep='xy'), dict(kernel=3), dict(reduction=1), dict(reduction=2), dict(norm='instance'),
    dict(plain=True), dict(plain=True, kernel=3, keep='xy')])
def test_mfm_is_the_formula(options):
    torch.manual_seed(0)
    c = 24
    mfm, (X, Y) = MFM(c, **options).double().eval(), torch.randn(2, 2, c, 5, 6, generator=rng()).double()
    g = X.mean((2, 3))+Y.mean((2, 3))
    layers = [m for m in mfm.mlp.modules() if isinstance(m, nn.Conv2d)]
    for i, m in enumerate(layers):
        g = g @ m.weight[:, :, 0, 0].T+m.bias
        if i+1 < len(layers): g = g.relu()
    a, b = g.view(2, 2, c).softmax(1).unbind(1)
    a, b = a[..., None, None], b[..., None, None]
    parts = [a*X, b*Y, X]+([Y] if options.get('keep') == 'xy' else [])
    conv = next(m for m in mfm.conv if isinstance(m, nn.Conv2d))
    expected = F.conv2d(torch.cat(parts, 1), conv.weight, conv.bias, padding=options.get('kernel', 1)//2)
    assert (conv.bias is None) != options.get('plain', False) and len(mfm.conv) == (1 if options.get('plain') else 3)
    if not options.get('plain'): expected = F.instance_norm(expected).relu()
    torch.testing.assert_close(mfm(X, Y), expected)
    torch.testing.assert_close(mfm.weights(X, Y).sum(1), torch.ones(2, c, 1, 1).double())
    k = options.get('kernel', 1)
    assert conv.weight.shape == (c, len(parts)*c, k, k)

def test_stand_ins_of_the_blocks():
    block = MFEB(6, msf=False)
    assert isinstance(block.msf, ScaleConv) and [tuple(p.shape) for p in block.msf.parameters()] == [(6, 24, 1, 1), (6,)]
    f = torch.randn(1, 18, 8, 8, generator=rng())
    F0 = block.reduce(f)
    torch.testing.assert_close(block(f), block.msf.conv(torch.cat([s(F0) for s in block.scales], 1))+F0)
    plain = ConcatConv(6)
    assert [n for n, _ in plain.named_parameters()] == ['reduce.weight', 'reduce.bias']
    torch.testing.assert_close(plain(f), F.conv2d(f, plain.reduce.weight, plain.reduce.bias))
    assert not list(Addition().parameters())

@pytest.mark.parametrize('make, said', [(lambda: MFEB(3, dilations=[4]), 'two or more'),
    (lambda: MFEB(3, dilations='1248'), 'two or more'), (lambda: MFEB(3, dilations=[1, 2.5]), 'whole number'),
    (lambda: MFEB(0), 'channels of MFEB'), (lambda: MSF(3, reduction=0), 'reduction of MSF'), (lambda: MFM(3, kernel=4), 'odd'),
    (lambda: MFM(3, keep='y'), "'xy'"), (lambda: MFM(3, norm='bach'), "'batch'"), (lambda: INRB(3, hidden=[]), 'a list of widths'),
    (lambda: INRB(3, hidden=64), 'a list of widths'), (lambda: INRB(3, n_frequencies=0), 'n_frequencies'),
    (lambda: INRB(3, code='points'), "Did you mean 'point'")])
def test_blocks_refuse_in_words(make, said):
    with pytest.raises(ConfigError, match=said): make()

def maps(n, *shape): return [torch.randn(*shape, generator=rng(k)) for k in range(n)]

@pytest.mark.parametrize('given, said', [(maps(3, 2, 5, 6, 7), 'given 3 maps, expected 4 maps'),
    (maps(5, 2, 5, 6, 7), 'given 5 maps, expected 4'), ([], 'given 0'),
    (maps(3, 2, 5, 6, 7)+maps(1, 2, 5, 6, 1), r'\(2, 5, 6, 1\)'), (maps(3, 2, 5, 6, 7)+maps(1, 1, 5, 6, 7), r'\(1, 5, 6, 7\)'),
    (maps(4, 0, 5, 6, 7), r'\(0, 5, 6, 7\), .*at least one image'), (maps(4, 2, 5, 0, 7), r'\(2, 5, 0, 7\)'),
    (maps(4, 2, 4, 6, 7), r'\(2, 4, 6, 7\), expected 4 maps \(b, 5, h, w\)'), (maps(4, 5, 6, 7), r'\(5, 6, 7\)'),
    (['a']*4, 'given str'), (None, 'given NoneType')])
def test_gates_refuse_maps_that_do_not_belong_together(given, said):
    for gate in (MSF(5), ScaleConv(5)):
        with pytest.raises(ShapeError, match=f'maps of {type(gate).__name__}: .*{said}'): gate(given)
    with pytest.raises(ShapeError, match=said): MSF(5).weights(given)

@pytest.mark.parametrize('X, Y', [((2, 5, 6, 7), (2, 5, 6, 1)), ((2, 5, 6, 7), (2, 5, 1, 1)), ((2, 5, 6, 7), (1, 5, 6, 7)),
    ((2, 5, 6, 7), (2, 1, 6, 7)),
    ((0, 5, 6, 7), (0, 5, 6, 7)), ((2, 5, 6, 7), (5, 6, 7)), ((2, 5, 0, 7), (2, 5, 0, 7))])
def test_modulation_and_addition_refuse_to_broadcast(X, Y):
    for module in (MFM(5), MFM(5).weights, Addition()):
        for a, b in ((X, Y), (Y, X)):
            with pytest.raises(ShapeError, match='maps of (MFM|Addition): given'): module(torch.zeros(a), torch.zeros(b))

@pytest.mark.parametrize('without', [[], ['rhmb', 'mfeb', 'mfm'], ['msf']])
def test_an_empty_batch_is_refused_in_words(without):
    net = made(without=without)
    for call in (net, net.features, lambda X: decode(net, X, scale=2), lambda X: decode_at(net, X, torch.zeros(0, 3, 2))):
        with pytest.raises(ShapeError, match=r'images for HMFMambaINR: given shape \(0, 2, 16, 16\), expected at least one image'):
            call(torch.zeros(0, 2, 16, 16))

# ---------------------------------------------------------------- positional code, ensemble
@pytest.mark.parametrize('n_frequencies', [1, 2, 10])
def test_code_is_sines_then_cosines_of_octaves(n_frequencies):
    x = torch.rand(3, 5, generator=rng(), dtype=torch.float64)*2-1
    expected = [f(2**k*math.pi*x) for f in (torch.sin, torch.cos) for k in range(n_frequencies)]
    torch.testing.assert_close(positional_code(x, n_frequencies), torch.stack(expected, -1))

@pytest.mark.parametrize('width', [.125, .5, 1/3])
def test_faded_code_is_the_mean_over_the_pixel(width):
    x = torch.linspace(-1, 1, 9, dtype=torch.float64)
    inside = x[:, None]+((torch.arange(20000).double()+.5)/20000-.5)*width
    torch.testing.assert_close(positional_code(inside, 6).mean(1), positional_code(x, 6, width), atol=1e-6, rtol=0)
    halves = sum(positional_code(x+s*width/4, 6, width/2) for s in (-1, 1))/2
    torch.testing.assert_close(halves, positional_code(x, 6, width))

@pytest.mark.parametrize('n', [1, 2, 5, 64, 101])
@pytest.mark.parametrize('N', [1, 3, 7, 64, 96, 200])
def test_neighbours_on_a_grid(N, n):
    near, i = beside_grid(N, n), torch.arange(N).double()
    u = (i+.5)*n/N-.5
    torch.testing.assert_close(near.offset[0], u-torch.floor(u+1e-12), atol=1e-9, rtol=0)
    torch.testing.assert_close(near.offset[0]-1, near.offset[1])
    torch.testing.assert_close(near.weight.sum(0), torch.ones(N).double())
    assert near.index.min() >= 0 and near.index.max() < n and near.offset.abs().max() <= 1
    again = beside_points((2*i+1)/N-1, n)
    value = torch.arange(n).double()
    torch.testing.assert_close((value[near.index]*near.weight).sum(0), (value[again.index]*again.weight).sum(0), atol=1e-9, rtol=0)

def slow(net, z, size):
    "The equation of the paper, one pixel and one neighbour after the other"
    (h, w), (H, W), L, out = z.shape[1:], size, net.sizes[1]//2, []
    width = (h/H, w/W) if net.code == 'area' else (0., 0.)
    for i in range(H):
        for j in range(W):
            at, total = ((i+.5)*h/H-.5, (j+.5)*w/W-.5), 0
            for r in (math.floor(at[0]+1e-12), math.floor(at[0]+1e-12)+1):
                for c in (math.floor(at[1]+1e-12), math.floor(at[1]+1e-12)+1):
                    offsets = [torch.tensor(a-v, dtype=torch.float64) for a, v in zip(at, (r, c), strict=True)]
                    code = [positional_code(o, L, k) for o, k in zip(offsets, width, strict=True)]
                    vector = z[:, min(max(r, 0), h-1), min(max(c, 0), w-1)]
                    total = total+(1-abs(at[0]-r))*(1-abs(at[1]-c))*net.f(torch.cat([vector, *code]))
            out.append(total)
    return torch.stack(out, -1).view(-1, H, W)

def inrb(c=5, o=2, hidden=(9, 6), L=10, code='area'):
    torch.manual_seed(3)
    net = INRB(c, o, hidden=hidden, n_frequencies=L, code=code).double()
    nn.init.normal_(net.f[0].weight, std=.5)
    return net

@pytest.mark.parametrize('code', ['area', 'point'])
@pytest.mark.parametrize('shape, size', [((3, 4), (6, 8)), ((3, 4), (3, 4)), ((4, 6), (6, 9)), ((2, 5), (8, 20)), ((5, 3), (4, 7)),
    ((1, 1), (3, 2))])
def test_fast_equals_slow(shape, size, code):
    net, z = inrb(code=code), torch.randn(2, 5, *shape, generator=rng()).double()
    got = net(z, size)
    for k in range(2): torch.testing.assert_close(got[k], slow(net, z[k], size))
    points = pixel_centres(*size).flatten(0, 1).expand(2, -1, 2)
    torch.testing.assert_close(net.at(z, points, size), got.flatten(2).mT, atol=1e-9, rtol=1e-7)

def test_the_first_layer_is_of_feature_and_code():
    net = INRB(7, 3, hidden=(11, 13), n_frequencies=4)
    assert [tuple(m.weight.shape) for m in net.f if isinstance(m, nn.Linear)] == [(11, 7+16), (13, 11), (3, 13)]
    assert INRB(7).f[0].weight.shape == (256, 47) and len([m for m in INRB(7).f if isinstance(m, nn.ReLU)]) == 4

def test_both_codes_are_one_family_at_x1_and_two_elsewhere():
    "Weights of the printed code rewritten for the averaged one: the same image at twice the features, another at four times"
    point, area, z = inrb(code='point'), inrb(), torch.randn(1, 5, 6, 7, generator=rng()).double()
    W = point.f[0].weight[:, 5:].detach().view(9, 2, 2, 10)     # row and column, sine and cosine, octave
    constant = torch.tensor([0., 0, -1]+[1]*7).double()         # cosines at offsets of a quarter; their sines vanish from the third on
    V = torch.zeros_like(W)
    V[..., :2] = W[..., :2]/torch.sinc(torch.tensor([.25, .5]).double())
    with torch.no_grad():
        area.f[0].weight[:, 5:] = V.view(9, 40)
        area.f[0].bias += (W[:, :, 1]*constant).sum((1, 2))
        torch.testing.assert_close(area(z), point(z), atol=1e-9, rtol=1e-7)
        assert (area(z, (24, 28))-point(z, (24, 28))).abs().max() > .01

def test_x3_shares_its_middle_pixels_with_x1_for_the_point_code():
    net, z = inrb(code='point'), torch.randn(1, 5, 6, 7, generator=rng()).double()
    torch.testing.assert_close(net(z, (36, 42))[..., 1::3, 1::3], net(z, (12, 14)), atol=1e-8, rtol=1e-6)

def test_continuous_across_cells_and_clamped_at_the_border():
    net, z = inrb(L=3), torch.randn(1, 5, 4, 4, generator=rng()).double()
    edge = torch.tensor([-.75, -.25, .25, .75]).double()
    for e in edge:
        for axis in (0, 1):
            p = torch.full((1, 2, 2), .13).double()
            p[0, :, axis] = e+torch.tensor([-1e-9, 1e-9]).double()
            a, b = net.at(z, p)[0]
            torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    corners = torch.tensor([[[-1., -1], [1, 1]]]).double()
    assert net.at(z, corners).isfinite().all()

def test_collapse_at_equal_resolution_and_its_cure():
    for code in ('point', 'area'):
        net, z = inrb(code=code), torch.randn(1, 5, 6, 8, generator=rng()).double().requires_grad_()
        other = z.detach().clone()
        other[..., 3, 4] += 1
        hit = lambda size, net=net, z=z, other=other: int(((net(z, size)-net(other, size)).abs().amax((0, 1)) > 0).sum())
        assert hit((6, 8)) == 1 and hit((12, 16)) == 16 and hit((24, 32)) == 64
        code0 = positional_code(torch.zeros(1).double(), 10, 1. if code == 'area' else 0.)[0].repeat(2)
        pointwise = net.f(torch.cat([z.permute(0, 2, 3, 1), code0.expand(1, 6, 8, 40)], -1)).permute(0, 3, 1, 2)
        torch.testing.assert_close(net(z, (6, 8)), pointwise)

def test_linear_ensemble_doubled_and_pooled_is_itself():
    net = INRB(2, 2, hidden=(4,), n_frequencies=2).double()
    with torch.no_grad():
        for p in net.parameters(): p.zero_()
        for k in range(2): net.f[0].weight[k, k] = net.f[2].weight[k, k] = 1; net.f[0].weight[k+2, k] = net.f[2].weight[k, k+2] = -1
    z = torch.randn(1, 2, 5, 7, generator=rng()).double()
    for k in (2, 4): torch.testing.assert_close(F.avg_pool2d(net(z, (10*k, 14*k)), k), net(z))
    for size in ((10, 14), (15, 21), (7, 33), (4, 3)):
        torch.testing.assert_close(net(z, size), F.interpolate(z, size, mode='bilinear'))

def psnr(a, b): return float(-10*((a-b).square().mean()/4).log10())

def blobs(size):
    "A smooth picture with edges, (1, 1, size, size) in [-1, 1]"
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, size)]*2, indexing='ij')
    return torch.tanh(6*torch.sin(4*x+2*y*y)*torch.cos(3*y-x))[None, None]

@pytest.mark.parametrize('seed', [0, 1])
def test_trained_at_x1_it_agrees_with_itself_at_x2_and_the_point_code_less(seed):
    agreement = {}
    for code in ('area', 'point'):
        torch.manual_seed(seed)
        net = INRB(16, hidden=(24, 24, 24), code=code)
        z = fit_image(blobs(32), net, steps=80, seed=seed)
        with torch.no_grad(): x1, x2 = net(z), net(z, (64, 64))
        assert psnr(x1, blobs(32)) > 14
        agreement[code] = psnr(F.avg_pool2d(x2, 2), x1)
    assert agreement['area'] > 32 and agreement['area'] > agreement['point']+3

def test_frequencies_a_pixel_cannot_show_are_not_taught():
    torch.manual_seed(0)
    net = INRB(16, hidden=(8, 8))
    fit_image(blobs(16), net, steps=5)
    taught = net.f[0].weight[:, 16:].view(8, 4, 10).abs().amax((0, 1))
    assert taught[:2].min() > 1e-4 and taught[2:].max() < 1e-6

@pytest.mark.parametrize('points', [torch.zeros(2, 3, 3), torch.zeros(3, 2), torch.zeros(1, 3, 2), torch.zeros(2, 3, 2).long(),
    torch.full((2, 3, 2), 1.01), torch.full((2, 3, 2), math.nan), 'here'])
def test_points_are_refused_in_words(points):
    z = torch.zeros(2, 5, 3, 4)
    for net in (INRB(5, hidden=[4]), PlainMLP(5, 1, 100)):
        with pytest.raises(ShapeError, match=r'points: given .*expected a floating tensor \(2, n, 2\)'): net.at(z, points)

@pytest.mark.parametrize('size', [7, (7,), (7, 0), (7, 2.5), 'big', (1, 2, 3), 0, (), [], False, '', 0., torch.Size([])])
def test_sizes_are_refused_in_words(size):
    z, points = torch.zeros(1, 5, 3, 4), torch.zeros(1, 2, 2)
    for net in (INRB(5, hidden=[4]), PlainMLP(5, 1, 100), PixelDecoder(5, 1, 100)):
        with pytest.raises(ConfigError, match=f'of {type(net).__name__}: given'): net(z, size)
        with pytest.raises(ConfigError, match=f'of {type(net).__name__}: given'): net.at(z, points, size)
    with pytest.raises(ConfigError, match='of INRB: given'): decode(made(), images(1, 2, 12, 20), size=size)

@pytest.mark.parametrize('z, said', [(torch.zeros(0, 5, 3, 4), r'given shape \(0, 5, 3, 4\)'), (torch.zeros(1, 5, 0, 4), 'at least one'),
    (torch.zeros(5, 3, 4), r'b, 5, h, w'), (torch.zeros(1, 4, 3, 4), 'b, 5, h, w'), ('z', 'given str')])
def test_features_are_refused_in_words(z, said):
    for net in (INRB(5, hidden=[4]), PlainMLP(5, 1, 100), PixelDecoder(5, 1, 100)):
        with pytest.raises(ShapeError, match=f'features of {type(net).__name__}: .*{said}'): net(z)
        if not isinstance(net, PixelDecoder):
            with pytest.raises(ShapeError, match=f'features of {type(net).__name__}: .*{said}'): net.at(z, torch.zeros(1, 2, 2))

@pytest.mark.parametrize('c_in, c_out, hidden',
    [(384, 1, [64]*4), (96, 1, [16]*4), (384, 2, [64]*4), (384, 1, [128]*4), (200, 3, [40]*3)])
def test_stand_ins_have_inrbs_number_of_parameters(c_in, c_out, hidden):
    with torch.device('meta'):
        n = parameters(INRB(c_in, c_out, hidden=hidden))
        mlp, pixel = PlainMLP(c_in, c_out, n, depth=len(hidden)), PixelDecoder(c_in, c_out, n)
    width, m = mlp.mlp[0].out_features, pixel.up[0].out_channels
    assert abs(parameters(mlp)-n) <= (c_in+2*len(hidden)*width+c_out+1) and abs(parameters(pixel)-n) <= 9*c_in+2+49*c_out
    assert max(abs(parameters(mlp)/n-1), abs(parameters(pixel)/n-1)) < (.04 if n > 30_000 else .12) and m >= 1
    assert len([f for f in mlp.mlp if isinstance(f, nn.ReLU)]) == len(hidden)

def test_the_plain_mlp_knows_no_coordinates():
    net, z = PlainMLP(5, 2, 300, depth=2).double(), torch.ones(1, 5, 6, 7).double()
    assert (net(z, (12, 14))-net(z, (12, 14))[..., :1, :1]).abs().max() < 1e-12
    shaken = inrb()
    assert (shaken(z, (12, 14))-shaken(z, (12, 14))[..., :1, :1]).abs().max() > 1e-3
    points = images(1, 20, 2).double()
    assert net.at(z, points).shape == (1, 20, 2)

# ---------------------------------------------------------------- the network
@pytest.mark.parametrize('without', [[], ['mfm', 'msf'], ['rhmb', 'mfeb']])
@pytest.mark.parametrize('n_sources, size', [(1, (64, 64)), (2, (68, 100)), (3, (92, 76)), (4, (8, 8)), (2, (12, 140)), (1, (256, 180))])
def test_sizes_and_sources(n_sources, size, without):
    net = made(n_sources=n_sources, without=without).eval()
    with torch.no_grad(): y = net(images(2, n_sources, *size))
    assert y.shape == (2, 1, *size) and y.abs().max() < 1 and y.isfinite().all()

@pytest.mark.parametrize('patch_size, good, bad', [(2, [(16, 16), (16, 24), (72, 40)], [(12, 16), (16, 20), (10, 16), (8, 16)]),
    (3, [(24, 24), (24, 36)], [(8, 8), (28, 28), (24, 40), (12, 24)]), (5, [(40, 60)], [(16, 16), (40, 44), (20, 40)])])
def test_patches_cover_the_bottleneck_or_the_size_is_refused(patch_size, good, bad):
    net = made(patch_size=patch_size).eval()
    with torch.no_grad():
        for size in good: assert net(images(1, 2, *size)).shape == (1, 1, *size)
        for size in bad:
            for call in (net, net.features, lambda X: decode(net, X, scale=1)):
                said = f'patch_size={patch_size}.*divisible by {4*patch_size} and at least {8*patch_size}'
                with pytest.raises(ShapeError, match=said): call(images(1, 2, *size))

def test_the_records_multiple_holds_for_all_it_registers():
    configs = [RECORD.smallest, *RECORD.presets.values(), *(RECORD.smallest | a for a in RECORD.ablations.values())]
    for config in configs:
        if config == {}: continue       # paper size: patch_size is 1
        net, m = RECORD.build(**config).eval(), RECORD.inputs.sides(config)[0]
        with torch.no_grad(): assert net(images(1, 2, 3*m, 5*m)).shape == (1, 1, 3*m, 5*m)

@pytest.mark.parametrize('n_stages, rhmbs', [(1, {1}), (2, {1, 2}), (3, {1, 2, 3}), (4, {1, 2, 4}), (9, {1, 5, 9})])
def test_rhmb_first_middle_last_and_all_reach_mfeb(n_stages, rhmbs):
    net = HMFMambaINR(1, base_channels=4, n_stages=n_stages)
    kinds = {j: type(net.get_submodule(f'bottleneck_{j}')) for j in range(1, n_stages+1)}
    assert {j for j, k in kinds.items() if k is PaperStage} == rhmbs and {k for j, k in kinds.items() if j not in rhmbs} <= {ResidualCNN}
    seen, handles = {}, []
    for j in rhmbs: handles.append(net.get_submodule(f'bottleneck_{j}').register_forward_hook(lambda m, a, o, j=j: seen.__setitem__(j, o)))
    net.mfeb.register_forward_pre_hook(lambda m, a: seen.__setitem__('in', a[0]))
    net(images(1, 1, 16, 16))
    assert torch.equal(seen['in'], torch.cat([seen[j] for j in sorted(rhmbs)], 1))

def test_skips_are_concatenated_and_every_mfm_gets_its_side_map():
    net, seen = made(), {}
    def record(name): return lambda m, a, o: seen.__setitem__(name, (a, o))
    for n, m in net.named_children(): m.register_forward_hook(record(n))
    net(images(1, 2, 16, 24))
    M = seen['mfeb'][1]
    assert torch.equal(seen['decoder_1'][0][0], torch.cat([M, seen['encoder_3'][1]], 1))
    assert torch.equal(seen['decoder_3'][0][0], torch.cat([seen['mfm_2'][1], seen['encoder_2'][1]], 1))
    assert torch.equal(seen['decoder_2'][0][0], seen['mfm_1'][1])
    for k in (1, 2, 3):
        assert torch.equal(seen[f'side_{k}'][0][0], M)
        assert torch.equal(seen[f'mfm_{k}'][0][0], seen[f'side_{k}'][1]) and torch.equal(seen[f'mfm_{k}'][0][1], seen[f'decoder_{k}'][1])
    z = seen['image'][0][0]
    assert torch.equal(z, torch.cat([seen['mfm_3'][1], F.pixel_unshuffle(seen['encoder_1'][1], 2)], 1)) and z.shape == (1, 24, 8, 12)
    assert [tuple(seen[f'mfm_{k}'][1].shape[2:]) for k in (1, 2, 3)] == [(4, 6), (8, 12), (8, 12)]

def test_parameters_and_work_are_one_to_one_and_a_half_times_i2i_mamba():
    with torch.device('meta'):
        for n in (1, 2, 3, 4):
            hmf, i2i = HMFMambaINR(n), I2IMamba(n)
            assert 1 < parameters(hmf)/parameters(i2i) < 1.5
            X = torch.empty(1, n, *((256, 256) if n == 2 else (64, 80)))
            assert 1 < multiply_adds(hmf, X)/multiply_adds(i2i, X) < 1.5
        assert parameters(I2IMamba()) == 17_187_073 and parameters(HMFMambaINR()) == 22_587_777
        assert multiply_adds(HMFMambaINR(), torch.empty(1, 2, 256, 256)) == 102_181_408_768

def test_counts_by_hand():
    c, enc = 256, 49*2*64+128+9*64*128+256+9*128*256+512
    cm = (17_187_073-enc-9*1_180_672-(9*512*128+256+9*256*64+128+49*128+1))
    mfeb = 768*c+c+4*(9*c*c+c)+4*(c*c+c)
    side = 9*c*c+c+2*(9*c*128+128)
    blocks = 9*512*c+2*c+9*c*128+256+9*c*128+256
    mfm = (c*32+32+32*512+512+3*c*c+2*c)+2*(128*16+16+16*256+256+3*128*128+256)
    inr = (384+40+1)*64+3*65*64+65
    with torch.device('meta'): assert parameters(HMFMambaINR()) == enc+9*1_180_672+cm+mfeb+side+blocks+mfm+inr

def test_layers_of_the_paper_network_one_by_one():
    with torch.device('meta'): net = HMFMambaINR()
    assert [tuple(s.weight.shape) for s in net.mfeb.scales] == [(256, 256, 3, 3)]*4
    assert [s.dilation for s in net.mfeb.scales] == [(d, d) for d in (1, 2, 4, 8)]
    assert net.mfeb.reduce.weight.shape == (256, 768, 1, 1) and [tuple(m.weight.shape) for m in net.mfeb.msf.conv] == [(256, 256, 1, 1)]*4
    assert [tuple(getattr(net, f'side_{k}')[0].weight.shape) for k in (1, 2, 3)] == [(256, 256, 3, 3), (128, 256, 3, 3), (128, 256, 3, 3)]
    last = [tuple(getattr(net, f'mfm_{k}').conv[0].weight.shape) for k in (1, 2, 3)]
    assert last == [(256, 768, 1, 1), (128, 384, 1, 1), (128, 384, 1, 1)]
    assert [tuple(m.weight.shape) for m in net.mfm_1.mlp if isinstance(m, nn.Conv2d)] == [(32, 256, 1, 1), (512, 32, 1, 1)]
    assert net.decoder_1[1].weight.shape == (256, 512, 3, 3) and isinstance(net.decoder_2[0], nn.ConvTranspose2d)
    assert net.decoder_3[1].weight.shape == (128, 256, 3, 3)
    assert [tuple(m.weight.shape) for m in net.image.f if isinstance(m, nn.Linear)] == [(64, 424), (64, 64), (64, 64), (64, 64), (1, 64)]

@pytest.mark.parametrize('name', RECORD.ablations)
def test_each_switch_changes_names_and_output(name):
    torch.manual_seed(0)
    base, X = RECORD.build(**RECORD.smallest), images(1, 2, 16, 24)
    torch.manual_seed(0)
    other = RECORD.build(**RECORD.smallest | RECORD.ablations[name])
    names = [{n for n, _ in m.named_parameters()} for m in (base, other)]
    assert names[0] != names[1]
    for a, b in ((base, other), (other, base)):
        with pytest.raises(RuntimeError, match='(Missing|Unexpected) key'): a.load_state_dict(b.state_dict())
    with torch.no_grad(): assert (base(X)-other(X)).abs().max() > 1e-3

def test_ablations_are_the_papers_stand_ins():
    with torch.device('meta'):
        nets = {n: RECORD.build(**c) for n, c in {'': {}, **RECORD.ablations}.items()}
    n = {k: parameters(m) for k, m in nets.items()}
    for k in ('no_rhmb', 'no_msf', 'no_inr', 'pixel_decoder'): assert abs(n[k]/n['']-1) < 1e-3, k
    assert [abs(parameters(nets[k].image)/39_745-1) < .04 for k in ('no_inr', 'pixel_decoder')] == [True, True]
    assert not any('mamba' in name or 'mixer' in name for name, _ in nets['no_rhmb'].named_modules())
    assert {type(getattr(nets['no_mfm'], f'mfm_{k}')) for k in (1, 2, 3)} == {Addition} and isinstance(nets['no_mfeb'].mfeb, ConcatConv)
    assert isinstance(nets['no_msf'].mfeb.msf, ScaleConv)
    assert isinstance(nets['no_inr'].image, PlainMLP) and isinstance(nets['pixel_decoder'].image, PixelDecoder)
    for k in range(1, 10):
        a, b = (parameters(nets[name].get_submodule(f'bottleneck_{k}')) for name in ('no_rhmb', ''))
        assert a/b == pytest.approx(1, abs=1e-3)

def test_no_two_ways_to_the_image_share_their_names():
    "Weights of one decoder do not load into another, even where every shape fits"
    names = {}
    for d in ('inr', 'inr_point', 'mlp', 'pixel', 'inr_full'):
        with torch.device('meta'): names[d] = {n for n, _ in HMFMambaINR(decoder=d).named_parameters()}
    for a in names:
        for b in names: assert a == b or (names[a]-names[b] and names[b]-names[a]), (a, b)
    image = {d: {n for n in v if n.startswith('image.')} for d, v in names.items()}
    for a, b in (('inr', 'inr_point'), ('inr', 'mlp'), ('inr_point', 'mlp'), ('inr', 'pixel')): assert not image[a] & image[b]
    assert RECORD.ablations['inr_point'] == dict(decoder='inr_point')

def test_two_octaves_are_used_at_the_trained_size_and_more_at_others():
    "2,048 of INRB's 39,745 weights have no gradient at x1; at another size, or as printed, they have"
    idle = {}
    with torch.device('meta'): wide = parameters(HMFMambaINR().image)
    assert wide == 39_745 and 8*4*64 == 2_048
    for name, decoder, size in (('x1', 'inr', (16, 24)), ('x1.5', 'inr', (24, 36)), ('x2', 'inr', (32, 48)),
            ('point', 'inr_point', (16, 24))):
        net = made(decoder=decoder).double()
        z = net.features(images(1, 2, 16, 24).double()).detach()
        net.image(z, size).square().sum().backward()
        g = net.image.f[0].weight.grad[:, 24:].view(8, 4, 10).abs().amax((0, 1))
        idle[name] = int((g < 1e-12*g.max()).sum())
    assert idle['x1'] == 8 and idle['x2'] <= 7 and idle['x1.5'] == 0 and idle['point'] == 0

def test_the_printed_code_can_be_had():
    assert made(decoder='inr_point').image.code == 'point' and made().image.code == 'area' and INRB(3).code == 'area'
    fresh = HMFMambaINR(1, **SMALL)
    assert fresh.image.f[0].weight[:, 24:].abs().max() == 0 < fresh.image.f[0].weight[:, :24].abs().min()

def test_parts_can_be_left_out_together():
    net = made(without=['rhmb', 'mfm', 'rhmb'], decoder='mlp')
    assert net.config['without'] == ['rhmb', 'mfm'] and net(images(1, 2, 16, 16)).shape == (1, 1, 16, 16)
    assert not RECORD.scans(net.config) and RECORD.scans({}) and RECORD.scans(dict(decoder='mlp'))

@pytest.mark.parametrize('decoder', ['inr', 'inr_point', 'inr_full', 'mlp'])
@pytest.mark.parametrize('scale', [.5, 1, 1.5, 2, 4])
def test_decodes_at_any_resolution_from_one_set_of_weights(decoder, scale):
    net, X = made(decoder=decoder, n_targets=2).eval(), images(2, 2, 12, 20)
    before = copy.deepcopy(net.state_dict())
    with torch.no_grad():
        y = decode(net, X, scale=scale)
        assert y.shape == (2, 2, round(12*scale), round(20*scale)) and torch.equal(y, decode(net, X, size=tuple(y.shape[2:])))
        if scale == 1: assert torch.equal(y, net(X))
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in before.items())

def test_x2_is_asked_of_the_function_not_enlarged():
    net, X = made().eval(), images(1, 2, 12, 20)
    with torch.no_grad():
        y, z = decode(net, X, scale=2), net.features(X)
        expected = torch.tanh(slow(copy.deepcopy(net.image).double(), z[0].double(), (24, 40)))
        torch.testing.assert_close(y[0], expected.float(), atol=1e-5, rtol=1e-4)
        for mode in ('nearest', 'bilinear', 'bicubic'): assert (y-F.interpolate(net(X), (24, 40), mode=mode)).abs().max() > 1e-3

@pytest.mark.parametrize('code', ['area', 'point'])
def test_any_point_by_the_formula(code):
    net, z, points = inrb(code=code, L=4), torch.randn(1, 5, 4, 6, generator=rng()).double(), images(1, 30, 2).double()
    for got, (y, x) in zip(net.at(z, points)[0], points[0].tolist(), strict=True):
        at, total = ((y+1)*2-.5, (x+1)*3-.5), 0
        for r in (math.floor(at[0]), math.floor(at[0])+1):
            for c in (math.floor(at[1]), math.floor(at[1])+1):
                area = abs(at[0]-(2*math.floor(at[0])+1-r))*abs(at[1]-(2*math.floor(at[1])+1-c))
                offsets = torch.tensor([at[0]-r, at[1]-c], dtype=torch.float64)
                code_of = positional_code(offsets, 4, .5 if code == 'area' else 0.)
                total = total+area*net.f(torch.cat([z[0, :, min(max(r, 0), 3), min(max(c, 0), 5)], *code_of]))
        torch.testing.assert_close(got, total)

@pytest.mark.parametrize('decoder', ['inr', 'inr_full', 'mlp'])
def test_points_at_pixel_centres_are_the_image(decoder):
    net, X = made(decoder=decoder).eval(), images(2, 2, 12, 20)
    points = pixel_centres(12, 20).flatten(0, 1).expand(2, -1, 2)
    with torch.no_grad(): torch.testing.assert_close(decode_at(net, X, points), net(X).flatten(2).mT, atol=1e-5, rtol=1e-4)

def test_the_pixel_decoder_has_one_resolution():
    net, X = made(decoder='pixel'), images(1, 2, 12, 20)
    assert torch.equal(decode(net.eval(), X, scale=1), net(X))
    with pytest.raises(ConfigError, match='Only INRB and PlainMLP'): decode(net, X, scale=2)
    with pytest.raises(ConfigError, match='Only INRB and PlainMLP'): decode_at(net, X, torch.zeros(1, 3, 2))

@pytest.mark.parametrize('given', [dict(scale=1.1), dict(scale=0), dict(scale=-2), dict(scale='2'), dict(scale=True),
    dict(scale=math.nan), dict(scale=math.inf), dict(scale=-math.inf), dict(scale=0.), dict(scale=1e-9), dict(scale=()), dict(),
    dict(scale=2, size=(24, 40)), dict(scale=2, size=()), dict(size=24), dict(size=(24, 0))])
def test_impossible_resolutions_are_refused(given):
    said = '^(scale: given|resolution: given|size of INRB: given|height of INRB|width of INRB)'
    with pytest.raises(ConfigError, match=said): decode(made(), images(1, 2, 12, 20), **given)
    assert decoded_size((12, 20), 1.25) == (15, 25)

def test_a_trained_network_agrees_with_itself_at_x2():
    torch.manual_seed(0)
    net, X = HMFMambaINR(1, base_channels=6, n_stages=2), blobs(32)
    target, adam = -X.abs(), torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(60): adam.zero_grad(), (net(X)-target).abs().mean().backward(), adam.step()
    with torch.no_grad(): x1, x2, x4 = (decode(net.eval(), X, scale=s) for s in (1, 2, 4))
    assert psnr(x1, target) > 17
    assert psnr(F.avg_pool2d(x2, 2), x1) > psnr(x1, target)+6 and psnr(F.avg_pool2d(x4, 4), x1) > psnr(x1, target)+4

@pytest.mark.parametrize('wrong, said', [(dict(without=['mfe']), "'mfeb'"), (dict(without='rhmb'), 'expected a list'),
    (dict(without=['msf', 'mfeb']), 'inside MFEB'),
    (dict(decoder='pixl'), "'pixel'"), (dict(dilations=[1]), 'two or more'), (dict(reduction=[1]), 'two numbers'),
    (dict(reduction=[0, 8]), 'reduction of'),
    (dict(hidden=[8, 0]), 'hidden of'), (dict(mfm=dict(keep='yx')), "'x'|'xy'"),
    (dict(mfm=dict(kernel=2)), 'kernel of MFM'), (dict(mfm=dict(kernal=1)), "Did you mean 'kernel'"), (dict(mfm='xy'), 'a dict'),
    (dict(mfm=dict(plain='no')), 'plain of MFM'), (dict(mfm=dict(kernel=0), without=['mfm']), 'kernel of MFM'),
    (dict(mfm=dict(keep='z'), without=['mfm']), 'keep'), (dict(n_targets=0), 'n_targets'),
    (dict(n_frequencies=0), 'n_frequencies'), (dict(patch_size=0), 'patch_size'), (dict(norm='x'), 'norm'),
    (dict(norm_at_test='x'), 'norm_at_test'),
    (dict(dilation=[1, 2]), "Did you mean 'dilations'")])
def test_settings_are_refused_in_words(wrong, said):
    with pytest.raises(ConfigError, match=said): RECORD.build(**SMALL | wrong)

@pytest.mark.parametrize('mfm', [{}, dict(keep='xy'), dict(kernel=3), dict(plain=True), dict(kernel=7, keep='xy', plain=True)])
def test_every_guess_about_mfm_is_an_argument(mfm):
    net = made(mfm=mfm)
    assert net.config['mfm'] == dict(kernel=1, keep='x', plain=False) | mfm
    for k, c in ((1, 16), (2, 8), (3, 8)):
        conv = next(m for m in net.get_submodule(f'mfm_{k}').conv if isinstance(m, nn.Conv2d))
        assert conv.weight.shape == (c, c*(2+len(net.config['mfm']['keep'])), *2*(net.config['mfm']['kernel'],))
        assert any(isinstance(m, nn.ReLU) for m in net.get_submodule(f'mfm_{k}').conv) != net.config['mfm']['plain']
    for size in ((8, 8), (12, 20)): assert net(images(2, 2, *size)).shape == (2, 1, *size)
    again = RECORD.build(**json.loads(json.dumps(net.config)))
    assert again.config == net.config and list(again.state_dict()) == list(net.state_dict())
    if mfm: assert (made()(images(1, 2, 16, 16))-net(images(1, 2, 16, 16))).abs().max() > 1e-4

def test_a_kernel_of_three_costs_what_the_ledger_says():
    X = torch.empty(1, 2, 256, 256, device='meta')
    with torch.device('meta'): wide, both = HMFMambaINR(mfm=dict(kernel=3)), HMFMambaINR(mfm=dict(keep='xy'))
    assert [round((multiply_adds(net, X)-102_181_408_768)/1e8) for net in (wide, both)] == [193, 8]

@pytest.mark.parametrize('other', ['adapted', 'i2i_mamba', 'none'])
def test_only_a_network_with_features_is_decoded(other):
    net = dict(adapted=lambda: adapted('hmf_mambainr', Spec(sources=2), **SMALL), none=lambda: None,
        i2i_mamba=lambda: I2IMamba(2, base_channels=2, n_stages=1))[other]()
    X = images(1, 2, 16, 16)
    with pytest.raises(ConfigError, match='network to decode: given .*expected an HMFMambaINR.*network'): decode(net, X, scale=2)
    with pytest.raises(ConfigError, match='network to decode: given'): decode_at(net, X, torch.zeros(1, 3, 2))
    if other == 'adapted': assert decode(net.network, X, scale=2).shape == (1, 1, 32, 32)

@pytest.mark.parametrize('spec', [Spec(), Spec(sources=4), Spec(sources=1, noise=1, targets=2),
    Spec(sources=2, noise=1, steps=4, latent=64), Spec(sources=4, noise=4, targets=8, steps=1000)])
def test_fits_any_recipe(spec):
    config = RECORD.fits(spec)
    net = RECORD.build(**SMALL | config)
    assert net(images(1, config['n_sources'], 16, 16)).shape == (1, spec.targets, 16, 16)

def test_recomputed_activations_cover_mfeb_and_inrb():
    net, X = made(), images(1, 2, 16, 16)
    assert net.mfeb.recompute is False and activation_checkpointing(net).mfeb.recompute and net.image.recompute
    grads = []
    for on in (False, True):
        twin = activation_checkpointing(copy.deepcopy(net), on)
        twin(X).square().sum().backward()
        grads.append([p.grad for p in twin.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))

def test_no_loop_over_pixels():
    "The number of operators does not depend on the size of the image"
    from torch.utils._python_dispatch import TorchDispatchMode
    class Count(TorchDispatchMode):
        n = 0
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            Count.n += 1
            return func(*args, **(kwargs or {}))
    net, counts = INRB(5, hidden=[8, 8]), []
    for side in (4, 40):
        with Count(), torch.no_grad():
            net(torch.zeros(1, 5, side, side)), net.at(torch.zeros(1, 5, side, side), torch.zeros(1, side, 2))
        counts.append(Count.n)
        Count.n = 0
    assert counts[0] == counts[1]
