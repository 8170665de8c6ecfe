"Wavelets against PyWavelets, block matching and collaborative filtering against loops, gradients, bounded memory, gain on noise"
import itertools
import math

import numpy as np
import pytest
import pywt
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import i2i_mamba_nb.blocks.wavelet as module
from i2i_mamba_nb.blocks.conv import brain_slice, check_images
from i2i_mamba_nb.blocks.wavelet import (
    MODES,
    WAVELETS,
    CooperativeFilter,
    Thresholds,
    block_layout,
    continued,
    cooperative_filter,
    daubechies,
    dwt,
    filter_bank,
    filter_groups,
    haar_matrix,
    idwt,
    join,
    match_blocks,
    noise_thresholds,
    soft,
    split,
    visits,
)
from i2i_mamba_nb.core import ConfigError, ShapeError, torch_rng

SIZES = [(1, 1), (1, 9), (2, 3), (5, 5), (8, 8), (13, 31), (64, 48), (127, 65)]

def random(*shape, seed=0, dtype=torch.double): return torch.randn(*shape, dtype=dtype, generator=torch_rng(seed, 'wavelet'))
def psnr(a, b): return float(-10*((a-b).detach().square().mean()/4).log10())

@pytest.mark.parametrize('wavelet', WAVELETS)
def test_filters_equal_pywavelets(wavelet):
    np.testing.assert_allclose(filter_bank(wavelet), pywt.Wavelet(wavelet).filter_bank, atol=1e-12)
    bank = filter_bank(wavelet)
    for shift in range(0, len(bank.dec_lo), 2):
        product = np.dot(np.roll(np.pad(bank.rec_lo, len(bank.rec_lo)), shift), np.pad(bank.dec_lo[::-1], len(bank.rec_lo)))
        assert product == pytest.approx(float(shift == 0), abs=1e-10)

def test_daubechies_is_orthonormal_and_blind_to_polynomials():
    for n in range(1, 11):
        h = np.array(daubechies(n))
        assert np.allclose([h[2*k:]@h[:2*n-2*k] for k in range(n)], np.eye(n)[0], atol=1e-10)
        moments = [(h*(-1.)**np.arange(2*n))@np.linspace(-1, 1, 2*n)**k for k in range(n+1)]
        assert np.allclose(moments[:n], 0, atol=1e-7) and abs(moments[n]) > 1e-7

@pytest.mark.filterwarnings('ignore:Level value')
@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('wavelet', WAVELETS)
def test_coefficients_equal_pywavelets(wavelet, mode):
    for size, levels in itertools.product(SIZES, (1, 2, 4)):
        x = random(2, 3, *size)
        bands = dwt(x, wavelet, levels, mode=mode)
        if mode == 'reflect' and 1 in sum(bands.sizes, ()): continue     # one value has no neighbour to reflect: PyWavelets refuses
        A, *details = pywt.wavedec2(x.numpy(), wavelet, mode, levels, axes=(-2, -1))
        np.testing.assert_allclose(bands.A, A, atol=1e-9)
        for theirs, *ours in zip(details[::-1], bands.H, bands.V, bands.D, strict=True):
            for one, other in zip(ours, theirs, strict=True): np.testing.assert_allclose(one, other, atol=1e-9)

@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('wavelet', WAVELETS)
def test_perfect_reconstruction(wavelet, mode):
    for size, levels in itertools.product(SIZES, (1, 2, 3, 5)):
        x = random(1, 2, *size)
        assert (idwt(dwt(x, wavelet, levels, mode=mode))-x).abs().max() < 1e-9
        x = x.float().clamp(-1, 1)
        assert (idwt(dwt(x, wavelet, levels, mode=mode))-x).abs().max() < 1e-6, (size, levels)

@pytest.mark.parametrize('wavelet', WAVELETS)
def test_reconstruction_to_1e_6_in_float32(wavelet):
    for size in [(64, 64), (63, 65), (255, 129), (96, 256)]:
        x = torch.rand(2, 2, *size, generator=torch_rng(0, 'float'))*2-1
        for levels in (1, 2, 4): assert (idwt(dwt(x, wavelet, levels))-x).abs().max() < 1e-6, (size, levels)

def test_rows_are_continued_as_in_pywavelets():
    for n, mode in itertools.product((1, 2, 5), MODES):
        x = random(2, n)
        np.testing.assert_array_equal(continued(x, 13, 7, mode), pywt.pad(x.numpy(), [(0, 0), (13, 7)], mode))

def test_split_and_join_are_inverse_along_one_axis():
    for wavelet, n in itertools.product(WAVELETS, (1, 2, 3, 17)):
        x, bank = random(3, n), filter_bank(wavelet)
        low, high = split(x, bank)
        assert low.shape == high.shape == (3, (n+len(bank.dec_lo)-1)//2)
        torch.testing.assert_close(join(low, high, bank, n), x, atol=1e-9, rtol=0)

def test_strided_views_and_half_precision_go_through():
    x = random(2, 6, 20, 14)
    view = x[:, ::2].transpose(2, 3)
    for a, b in zip(dwt(view, 'db2')[1], dwt(view.contiguous(), 'db2')[1], strict=True): assert torch.equal(a, b)
    assert dwt(x.bfloat16()).A.dtype == torch.bfloat16

def test_bands_keep_what_the_inverse_needs():
    bands = dwt(random(1, 1, 9, 14), 'db3', 2, mode='zero')
    assert bands.sizes == [(9, 14), (7, 9)] and bands.wavelet == 'db3' and bands.mode == 'zero'
    assert idwt(bands._replace(A=0*bands.A)).shape == (1, 1, 9, 14)

def test_transform_is_differentiable():
    x = random(1, 2, 5, 7).requires_grad_()
    for wavelet, mode in [('haar', 'symmetric'), ('db2', 'reflect'), ('bior2.2', 'zero')]:
        def coefficients(x, wavelet=wavelet, mode=mode):
            bands = dwt(x, wavelet, 2, mode=mode)
            return bands.A, *bands.H, *bands.V, *bands.D
        assert torch.autograd.gradcheck(coefficients, x)

def test_orthogonal_wavelets_keep_energy():
    x = random(1, 1, 64, 32)
    for wavelet in ('haar', 'db2', 'db5', 'db10'):
        bands = dwt(x, wavelet, 1, mode='periodic')
        n = [(v.shape[-2]-32, v.shape[-1]-16) for v in (bands.A,)][0]
        parts = [v[..., :v.shape[-2]-n[0], :v.shape[-1]-n[1]] for v in (bands.A, *bands.H, *bands.V, *bands.D)]
        assert sum(p.square().sum() for p in parts) == pytest.approx(float(x.square().sum()))

def test_soft_threshold():
    v = random(4, 5)
    torch.testing.assert_close(soft(v, torch.tensor(.4, dtype=v.dtype)), torch.nn.functional.softshrink(v, .4))
    np.testing.assert_allclose(soft(v, torch.tensor(.4, dtype=v.dtype)), pywt.threshold(v.numpy(), .4, 'soft'), atol=1e-12)

def near(x, y, z, sides, radius):
    "Distances of the reference at (y, z) to every patch of its window, with loops: {(row, column): distance}"
    places = [n-p+1 for n, p in zip(x.shape[-2:], sides, strict=True)]
    cut = lambda r, c: x[:, r:r+sides[0], c:c+sides[1]]
    return {(r, c): float((cut(r, c)-cut(y, z)).square().sum()) for r in range(places[0]) for c in range(places[1])
        if abs(r-y) <= radius and abs(c-z) <= radius}

SETTINGS = [dict(), dict(patch=3, window=7, n_similar=4, stride=2), dict(patch=2, window=3, n_similar=4, stride=1),
    dict(patch=5, n_similar=16), dict(patch=1, window=5, n_similar=2), dict(n_similar=1), dict(window=1, n_similar=1),
    dict(patch=8, window=21, n_similar=32, stride=3)]

@pytest.mark.parametrize('settings', SETTINGS, ids=str)
def test_matching_equals_loops(settings):
    for size, channels in [((9, 21), 3), ((16, 8), 1), ((3, 7), 2), ((1, 6), 2)]:
        x, layout = random(2, channels, *size), block_layout(size, **settings)
        groups, columns = match_blocks(x, **settings), size[1]-layout.patch[1]+1
        corners = list(itertools.product(layout.rows, layout.columns))
        assert groups.index.shape == (2, len(corners), layout.n_similar) and groups.patch == layout.patch
        for b, (p, corner) in itertools.product(range(2), enumerate(corners)):
            slow = near(x[b], *corner, layout.patch, settings.get('window', 11)//2)
            best = [r*columns+c for r, c in sorted(slow, key=slow.get)[:layout.n_similar]]
            assert groups.index[b, p].tolist() == best and best[0] == corner[0]*columns+corner[1]

def loops(x, index, sides, tau, keep_mean):
    "Collaborative filtering of one image with loops"
    total, count, W = torch.zeros_like(x), torch.zeros_like(x), haar_matrix(index.shape[-1], x)
    for group in index.tolist():
        corners = [divmod(q, x.shape[2]-sides[1]+1) for q in group]
        stack = torch.tensordot(W, torch.stack([x[:, y:y+sides[0], z:z+sides[1]] for y, z in corners]), 1)
        shrunk = soft(stack, tau.view(-1, 1, 1))
        if keep_mean: shrunk[0] = stack[0]
        for (y, z), patch in zip(corners, torch.tensordot(W.T, shrunk, 1), strict=True):
            total[:, y:y+sides[0], z:z+sides[1]] += patch
            count[:, y:y+sides[0], z:z+sides[1]] += 1
    return total/count, count

@pytest.mark.parametrize('keep_mean', [True, False])
@pytest.mark.parametrize('settings', SETTINGS, ids=str)
def test_collaborative_filtering_equals_loops(settings, keep_mean):
    for size in [(9, 21), (12, 12), (3, 5), (1, 1)]:
        x, tau = random(2, 3, *size), torch.tensor([.2, .6, 1.3], dtype=torch.double)
        groups = match_blocks(x, **settings)
        slow = [loops(x[b], groups.index[b], groups.patch, tau, keep_mean) for b in range(2)]
        torch.testing.assert_close(filter_groups(x, groups, tau, keep_mean=keep_mean), torch.stack([s[0] for s in slow]))
        torch.testing.assert_close(visits(groups, size, x), torch.stack([s[1][:1] for s in slow]))

@pytest.mark.parametrize('size', [(h, w) for h in range(1, 10) for w in (1, 2, 4, 7, 9)])
def test_every_pixel_of_every_small_size_is_covered(size):
    layout = block_layout(size)
    assert all(p <= math.ceil(n/2) for p, n in zip(layout.patch, size, strict=True)) and layout.n_similar in (1, 2, 4, 8)
    x = random(2, 3, *size)
    groups = match_blocks(x)
    assert visits(groups, size, x).min() >= 1 and len(groups.index[0].unique(dim=0)) == len(groups.index[0])
    assert all(len(set(g)) == layout.n_similar for g in groups.index[0].tolist())
    torch.testing.assert_close(filter_groups(x, groups, torch.zeros(3)), x)
    assert CooperativeFilter(3, levels=2).double()(x).shape == x.shape

def test_group_filter_gradients():
    tau = torch.tensor([.3, .8], dtype=torch.double, requires_grad=True)
    for keep_mean, settings in itertools.product([True, False], [dict(patch=2, window=5, n_similar=4), dict(patch=3, window=7, stride=2)]):
        x = random(1, 2, 6, 7).requires_grad_()
        groups = match_blocks(x, **settings)
        assert torch.autograd.gradcheck(lambda x, t, g=groups, k=keep_mean: filter_groups(x, g, t, keep_mean=k), (x, tau))

SWITCHED = [{}, dict(levels=2, wavelet='db2'), dict(per_channel=False), dict(matching=False), dict(patch=2)]

@pytest.mark.parametrize('settings', SWITCHED, ids=str)
def test_filter_gradients_reach_features_and_thresholds(settings):
    block = CooperativeFilter(2, threshold=.4, **settings).double()
    names, x = [n for n, _ in block.named_parameters()], random(1, 2, 7, 10).requires_grad_()
    def called(x, *raw): return torch.func.functional_call(block, dict(zip(names, raw, strict=True)), x)
    assert torch.autograd.gradcheck(called, (x, *block.parameters()))
    block(x).square().sum().backward()
    assert all((p.grad != 0).all() for p in block.parameters()) and (x.grad != 0).all()

def test_second_derivative_is_refused_and_not_wrong():
    x = random(1, 1, 8, 8).requires_grad_()
    first, = torch.autograd.grad(CooperativeFilter(1).double()(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='once_differentiable'): first.sum().backward()

def test_portions_do_not_matter(monkeypatch):
    x, tau = random(2, 5, 9, 13).requires_grad_(), torch.linspace(.1, .9, 5, dtype=torch.double).requires_grad_()
    results = []
    for workspace in (1, 10_000, 2**20):
        monkeypatch.setattr(module, 'WORKSPACE', workspace)
        y = filter_groups(x, match_blocks(x), tau)
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, tau))))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True): torch.testing.assert_close(a, b)

class Watched(TorchDispatchMode):
    "Counts operations and remembers the largest tensor made"
    def __init__(self):
        super().__init__()
        self.operations, self.largest = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        self.operations += 1
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor): self.largest = max(self.largest, t.untyped_storage().nbytes())
        return out

def watched(shape, **settings):
    block, x = CooperativeFilter(shape[1], **settings), torch.randn(shape, generator=torch_rng(0, 'watched')).requires_grad_()
    with Watched() as seen: block(x).sum().backward()
    return seen

def test_no_loop_over_pixels_or_patches():
    small, large = watched((1, 2, 16, 16)).operations, watched((2, 2, 64, 80)).operations
    assert abs(large-small) < 10 and large < 700

def test_memory_is_bounded_at_full_size():
    wide, large = watched((1, 512, 64, 64)), watched((1, 1, 256, 256))
    assert wide.largest <= 16e6 and large.largest <= 32e6       # the input is 8.4 MB and 0.26 MB
    assert watched((1, 1, 128, 256)).largest <= .55*large.largest

def test_little_is_kept_for_the_backward_pass():
    kept, x = {}, torch.randn(1, 128, 64, 64, requires_grad=True)
    remember = lambda t: kept.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()}) or t
    with torch.autograd.graph.saved_tensors_hooks(remember, lambda t: t): CooperativeFilter(128)(x)
    assert sum(kept.values()) <= 2*4*x.numel()

def test_symmetries():
    x, tau = random(1, 2, 24, 40), noise_thresholds(.5)
    y = cooperative_filter(x, tau)
    torch.testing.assert_close(cooperative_filter(x.flip(-1), tau), y.flip(-1))
    torch.testing.assert_close(cooperative_filter(x.mT, tau), y.mT)
    torch.testing.assert_close(cooperative_filter(3*x, noise_thresholds(1.5)), 3*y, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(cooperative_filter(x.flip(1), tau), y.flip(1))

def test_horizontal_and_vertical_thresholds_are_not_swapped():
    rows = torch.arange(16.)[:, None].expand(16, 16).remainder(2)[None, None]
    bands = dwt(rows, 'haar')
    assert bands.H[0].abs().min() > .9 and bands.V[0].abs().max() == bands.D[0].abs().max() == 0
    big, none = torch.full((1, 1), 9.), torch.zeros(1, 1)
    kept = cooperative_filter(rows, Thresholds(none[0], none, big, none))
    gone = cooperative_filter(rows, Thresholds(none[0], big, none, none))
    torch.testing.assert_close(kept, rows), torch.testing.assert_close(gone, torch.full_like(rows, .5))

def test_levels_have_thresholds_of_their_own():
    x, zero = random(1, 1, 32, 32), torch.zeros(2, 1)
    for level in (0, 1):
        for band in 'HVD':
            tau = zero.clone()
            tau[level] = 1e9
            got = dwt(cooperative_filter(x, Thresholds(zero[0], zero, zero, zero)._replace(**{band: tau})), 'haar', 2)
            before = dwt(x, 'haar', 2)
            for name, k in itertools.product('HVD', (0, 1)):
                expected = getattr(before, name)[k]*(0 if (name, k) == (band, level) else 1)
                torch.testing.assert_close(getattr(got, name)[k], expected, atol=1e-6, rtol=0)

def test_the_mean_of_a_group_is_kept_in_A_and_shrunk_in_D():
    x = torch.full((1, 1, 16, 16), .7)
    tau = noise_thresholds(1.)
    torch.testing.assert_close(cooperative_filter(x, tau), x)
    checks = torch.ones(1, 1, 16, 16)
    checks[..., ::2, 1::2] = checks[..., 1::2, ::2] = -1
    assert cooperative_filter(checks, tau._replace(D=torch.full((1, 1), 1e9))).abs().max() < 1e-5

@pytest.mark.parametrize('sigma, least', [(.1, .3), (.2, .7), (.4, 1.2)])
def test_gain_over_the_best_plain_thresholding(sigma, least):
    "Simulated noise; factors found on slice 45, gain on other slices and other noise"
    clean = {z: brain_slice(96, z) for z in (45, 35, 55)}
    noisy = {z: v+sigma*torch.randn(v.shape, generator=torch_rng(1, 'noise', z)) for z, v in clean.items()}
    def plain(z, levels, k): return cooperative_filter(noisy[z], noise_thresholds(sigma, levels=levels, H=k, V=k, D=k), matching=False)
    def ours(z, a, k, d): return cooperative_filter(noisy[z], noise_thresholds(sigma, A=a, H=k, V=k, D=d))
    tried = {plain: itertools.product((1, 2, 3), (.75, 1, 1.25, 1.5, 2)), ours: itertools.product((.5, 1, 1.5), (1, 1.5, 2), (1, 2, 3))}
    best = {m: max(factors, key=lambda f, m=m: psnr(m(45, *f), clean[45])) for m, factors in tried.items()}
    for z in (35, 55):
        gain = psnr(ours(z, *best[ours]), clean[z])-psnr(plain(z, *best[plain]), clean[z])
        assert gain > least and psnr(plain(z, *best[plain]), clean[z]) > psnr(noisy[z], clean[z])+1

def test_thresholds_can_be_learned():
    clean = brain_slice(64)
    noisy = clean+.2*torch.randn(clean.shape, generator=torch_rng(0, 'learn'))
    block = CooperativeFilter(1)
    adam, first = torch.optim.Adam(block.parameters(), .1), psnr(block(noisy), clean)
    for _ in range(60): adam.zero_grad(), (block(noisy)-clean).square().mean().backward(), adam.step()
    assert psnr(block(noisy), clean) > first+1
    assert all((t > 0).all() for t in block.thresholds()) and block.thresholds().D.mean() > .2

def test_images_of_a_batch_are_independent_and_autocast_changes_nothing():
    block, x = CooperativeFilter(4, levels=2), torch.randn(3, 4, 33, 18, generator=torch_rng(0, 'batch'))
    torch.testing.assert_close(block(x), torch.cat([block(v) for v in x.split(1)]))
    with torch.autocast('cpu', torch.bfloat16): low = block(x)
    assert torch.equal(block(x), low) and block(x.bfloat16()).dtype == torch.bfloat16

def test_export_and_meta():
    for settings in (dict(), dict(levels=2, wavelet='db2', mode='reflect'), dict(matching=False)):
        block, x = CooperativeFilter(3, **settings), torch.randn(1, 3, 20, 14)
        torch.testing.assert_close(torch.export.export(block, (x,)).module()(x), block(x))
    assert CooperativeFilter(3).to('meta')(torch.empty(2, 3, 64, 64, device='meta')).shape == (2, 3, 64, 64)

def test_extreme_values():
    block, x = CooperativeFilter(2), torch.randn(1, 2, 16, 16)
    for extreme in (torch.zeros_like(x), torch.ones_like(x), 1e4*x, 1e-8*x): assert block(extreme).isfinite().all()

def test_a_nan_stays_in_its_image():
    "A broken pixel makes its own image's result not finite; others come out as without it, and the groups stay in the image"
    block, x = CooperativeFilter(2), torch.randn(3, 2, 16, 16, generator=torch_rng(0, 'nan'))
    whole = block(x)
    x[1, 0, 3, 3] = float('nan')
    y = block(x)
    assert torch.equal(y[[0, 2]], whole[[0, 2]]) and y[1, 0, 3, 3].isnan()
    index = match_blocks(dwt(x).A).index
    assert index.min() >= 0 and index.max() < 25 and torch.equal(index[[0, 2]], match_blocks(dwt(x[[0, 2]]).A).index)
    assert torch.equal(index[1, :, 0], index[0, :, 0])

def test_large_thresholds_do_not_overflow():
    for first in (1e-6, .1, 20., 100., 1000., 1e30):
        for tau in CooperativeFilter(3, threshold=first).thresholds(): torch.testing.assert_close(tau, torch.full_like(tau, first))

def test_a_group_never_shrinks_in_silence():
    for window, most in [(1, 1), (3, 4), (5, 8), (7, 16), (11, 32), (21, 64)]:
        assert block_layout((64, 64), window=window, n_similar=most).n_similar == most
        with pytest.raises(ConfigError, match=f'n_similar.*at most {most}'): CooperativeFilter(2, window=window, n_similar=2*most)

@pytest.mark.parametrize('side, alive', [(16, 'AHVD'), (8, 'AHVD'), (4, 'AHVD'), (3, 'AHVD'), (2, 'HVD'), (1, '')])
def test_thresholds_that_learn_on_small_features(side, alive):
    block, x = CooperativeFilter(2, threshold=.05), torch.randn(4, 2, side, side, generator=torch_rng(0, 'alive', side))
    y = block(x)
    y.square().sum().backward()
    assert y.isfinite().all()
    assert {n[-1]: bool((p.grad != 0).all()) for n, p in block.named_parameters()} == {b: b in alive for b in 'AHVD'}

def test_parameters_and_switches():
    shapes = lambda **settings: {n: tuple(p.shape) for n, p in CooperativeFilter(5, **settings).named_parameters()}
    assert shapes(levels=3) == {'raw_A': (5,), 'raw_H': (3, 5), 'raw_V': (3, 5), 'raw_D': (3, 5)}
    assert shapes(per_channel=False) == {'raw_A': (1,), 'raw_H': (1, 1), 'raw_V': (1, 1), 'raw_D': (1, 1)}
    assert set(shapes(matching=False)) == {'raw_H', 'raw_V', 'raw_D'}
    for tau in CooperativeFilter(5, threshold=.25).thresholds(): torch.testing.assert_close(tau, torch.full_like(tau, .25))
    x = random(1, 5, 16, 16, dtype=torch.float32)
    switches = dict(matching=False, levels=2, wavelet='db2', patch=2, window=5, n_similar=4, stride=2)
    out = [CooperativeFilter(5, threshold=.5, **s)(x) for s in ({}, *({k: v} for k, v in switches.items()))]
    assert all(not torch.allclose(a, b, atol=1e-4) for a, b in itertools.combinations(out, 2))

def test_errors_say_what_to_do():
    for wrong, said in [(dict(channels=0), 'channels of CooperativeFilter'), (dict(levels=0), 'at least 1'),
            (dict(levels=1.5), 'whole number'), (dict(n_similar=6), 'power of two. Use 4'), (dict(window=10), 'odd width. Use 11'),
            (dict(stride=5), 'at most the patch'), (dict(wavelet='db11'), 'Did you mean'),
            (dict(mode='symetric'), "'symmetric'"), (dict(threshold=-1), 'above 0'), (dict(patch=0), 'patch of block matching'),
            (dict(stride=0), 'stride of block matching.*at least 1'), (dict(window=3), 'at most 4'), (dict(threshold='a'), 'above 0'),
            (dict(threshold=True), 'above 0'), (dict(threshold=math.nan), 'above 0'), (dict(threshold=math.inf), 'above 0'),
            (dict(threshold=None), 'above 0'), (dict(matching='off'), "matching.*'off'.*True or False"),
            (dict(per_channel='no'), 'per_channel'), (dict(per_channel=1), 'per_channel'), (dict(matching=None), 'matching')]:
        with pytest.raises(ConfigError, match=said): CooperativeFilter(**{'channels': 3} | wrong)
    for wrong, said in [(torch.zeros(1, 2, 8, 8), 'expected 3 channels'), (torch.zeros(3, 8, 8), 'batch axis'),
            (torch.zeros(1, 3, 8, 8).long(), 'floating'), (torch.zeros(0, 3, 8, 8), 'expected at least one image')]:
        with pytest.raises(ShapeError, match=said): CooperativeFilter(3)(wrong)
    with pytest.raises(ShapeError, match='images for dwt'): dwt(torch.zeros(1, 1, 4, 4).long())
    with pytest.raises(ShapeError, match='images for dwt'): dwt(torch.zeros(1, 1, 0, 4))
    with pytest.raises(ConfigError, match='levels of dwt'): dwt(torch.zeros(1, 1, 4, 4), levels=0)
    assert check_images(torch.zeros(1, 3, 1, 1), 3, multiple=1, smallest=1) is None
