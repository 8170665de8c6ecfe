"Metrics against scikit-image and against their definitions; masks and windows on heads of known outline"
import numpy as np
import pytest
import torch
from skimage import metrics as oracle

from i2i_mamba_nb.core import ConfigError, I2IError, ShapeError, numpy_rng
from i2i_mamba_nb.measure.metrics import Window, head_mask, mae, mse, nmse, psnr, ssim, ssim_slices, window_of

WANG = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
SHAPES = [(11, 13), (12, 31), (64, 15), (11, 12, 13), (17, 11, 23)]
ALL = dict(mse=mse, mae=mae, nmse=nmse, psnr=lambda *a, **k: psnr(*a, data_range=1, **k), ssim=lambda *a, **k: ssim(*a, data_range=1, **k))

def pair(shape, seed=0):
    rng = numpy_rng(seed, 'pair', *shape)
    x = rng.random(shape)
    return x, x+.1*rng.standard_normal(shape)

def dice(a, b): return 2*(a & b).sum()/(a.sum()+b.sum())

def radius(shape):
    g = np.meshgrid(*[np.linspace(-1.25, 1.25, n) for n in shape], indexing='ij')
    return np.sqrt(sum((v/s)**2 for v, s in zip(g, (.8, .95, .85), strict=False)))

def head(r, levels=(600, 200, 20, 900)): return np.select([r < .8, r < .85, r < .93, r < 1], levels, 0.)

def rician(x, sigma, seed=0):
    rng = numpy_rng(seed, 'noise')
    return np.hypot(x+sigma*rng.standard_normal(x.shape), sigma*rng.standard_normal(x.shape))

@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('scale', [1, 255, 4095])
def test_equals_scikit_image(shape, scale):
    x, y = (scale*v for v in pair(shape))
    assert np.isclose(mse(x, y), oracle.mean_squared_error(x, y), rtol=1e-12)
    assert np.isclose(nmse(x, y), oracle.normalized_root_mse(x, y)**2, rtol=1e-12)
    assert np.isclose(psnr(x, y, data_range=scale), oracle.peak_signal_noise_ratio(x, y, data_range=scale), rtol=1e-12)
    assert np.isclose(ssim(x, y, data_range=scale), oracle.structural_similarity(x, y, data_range=scale, **WANG), rtol=1e-10)
    assert np.isclose(ssim(x, y, data_range=scale, gaussian=False), oracle.structural_similarity(x, y, data_range=scale), rtol=1e-10)

def test_equals_torchmetrics():
    metrics = pytest.importorskip('torchmetrics.functional')
    x, y = pair((23, 31))
    a, b = (torch.tensor(v)[None, None] for v in (x, y))
    assert np.isclose(psnr(x, y, data_range=1), metrics.image.peak_signal_noise_ratio(b, a, data_range=1.).item(), rtol=1e-6)

@pytest.mark.parametrize('shape', SHAPES)
def test_masked_ssim_is_the_map_inside_the_mask(shape):
    x, y = pair(shape)
    similar = oracle.structural_similarity(x, y, data_range=1, full=True, **WANG)[1]
    m = numpy_rng(3, *shape).random(shape) > .4
    inner = np.zeros(shape, bool)
    inner[tuple(slice(5, n-5) for n in shape)] = True
    assert np.isclose(ssim(x, y, data_range=1, mask=m), similar[m & inner].mean(), rtol=1e-10)
    assert ssim(x, y, data_range=1, mask=np.ones(shape)) == ssim(x, y, data_range=1)

@pytest.mark.parametrize('corner', ['low', 'high'])
def test_ssim_crop_changes_nothing(corner):
    x, y = pair((40, 37, 35))
    m = np.zeros(x.shape, bool)
    m[(slice(0, 9),)*3 if corner == 'low' else (slice(-9, None),)*3] = True
    similar = oracle.structural_similarity(x, y, data_range=1, full=True, **WANG)[1]
    inner = m & np.pad(np.ones((30, 27, 25), bool), 5)
    assert inner.any() and np.isclose(ssim(x, y, data_range=1, mask=m), similar[inner].mean(), rtol=1e-10)

@pytest.mark.parametrize('name', ['mse', 'mae', 'nmse', 'psnr'])
def test_voxels_outside_the_mask_do_not_count(name):
    x, y = pair((9, 7, 5))
    m = x > .3
    assert ALL[name](x, y, mask=m) == ALL[name](np.where(m, x, 7), np.where(m, y, -3), mask=m)
    assert ALL[name](x, y, mask=m) == ALL[name](x, y, mask=torch.tensor(m)) != ALL[name](x, y)

@pytest.mark.parametrize('name', ALL)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16, torch.uint8])
def test_tensors_equal_arrays(name, dtype):
    x, y = (torch.tensor(200*np.clip(v, 0, 1)).to(dtype) for v in pair((12, 14)))
    assert ALL[name](x, y) == ALL[name](x.double().numpy(), y.double().numpy())

def test_unsigned_and_gradients_are_no_trap():
    a, b = np.full((3, 5), 3, np.uint8), np.full((3, 5), 5, np.uint8)
    assert mse(a, b) == 4 and mae(a, b) == 2
    assert mse(torch.zeros(2, 3, requires_grad=True), torch.ones(2, 3)) == 1

def test_sums_are_in_double():
    x = np.full((300, 300, 100), 1e4, np.float32)
    y = x.copy()
    y[0, 0, 0] += 1
    assert np.isclose(mse(x, y), 1/x.size, rtol=1e-9) and np.isclose(nmse(x, y), 1/(x.size*1e8), rtol=1e-9)

@pytest.mark.parametrize('shape', [(11, 12), (11, 12, 13)])
@pytest.mark.parametrize('value', [0., 1., -3., 1e-20])
def test_constant_images_are_defined(shape, value):
    x = np.full(shape, value)
    assert mse(x, x) == mae(x, x) == nmse(x, x) == 0 and psnr(x, x, data_range=1) == float('inf') and ssim(x, x, data_range=1) == 1
    assert np.isclose(psnr(x, x+.5, data_range=1), 20*np.log10(2)) and 0 < ssim(np.abs(x), np.abs(x)+.5, data_range=1) < 1

def test_zero_target_has_an_infinite_relative_error():
    assert nmse(np.zeros((2, 3)), np.ones((2, 3))) == float('inf') and nmse(np.zeros((2, 3)), np.zeros((2, 3))) == 0

@pytest.mark.parametrize('name', ALL)
def test_empty_mask_is_nan_also_for_equal_images(name):
    x, y = pair((12, 13))
    for a, b in ((x, y), (x, x), (0*x, 0*x)): assert np.isnan(ALL[name](a, b, mask=np.zeros(x.shape, bool)))

def test_mask_on_the_border_only_is_empty_for_ssim():
    x, y = pair((14, 15))
    m = np.zeros(x.shape, bool)
    m[0] = True
    assert np.isnan(ssim(x, y, data_range=1, mask=m)) and np.isfinite(psnr(x, y, data_range=1, mask=m))

@pytest.mark.parametrize('name', ALL)
@pytest.mark.parametrize('bad, text', [
    (lambda x: x[None], 'shape'), (lambda x: x[:, :-1], 'shape'), (lambda x: x.T, 'shape'), (lambda x: x+1j, 'complex'),
    (lambda x: np.where(x == x.max(), np.inf, x), '1 of 182 values NaN or infinite'), (lambda x: x[:0], 'shape'),
    (lambda x: np.full(x.shape, 'a'), 'dtype')])
def test_bad_images_are_refused_on_either_side(name, bad, text):
    x, y = pair((14, 13))
    for a, b in ((x, bad(y)), (bad(x), y)):
        with pytest.raises(I2IError, match=text): ALL[name](a, b)

@pytest.mark.parametrize('name', ALL)
def test_bad_masks_and_ranks_are_refused(name):
    x, y = pair((14, 13))
    with pytest.raises(ShapeError, match=r'mask: given shape \(14, 12\)'): ALL[name](x, y, mask=np.ones((14, 12)))
    for shape in ((14,), (1, 1, 12, 12), ()):
        with pytest.raises(ShapeError, match='2-D image or 3-D volume'): ALL[name](np.zeros(shape), np.zeros(shape))

@pytest.mark.parametrize('bad', [0, -1, float('nan'), float('inf'), None, '1', [1]])
def test_range_is_never_guessed(bad):
    x, y = pair((14, 13))
    for f in (psnr, ssim):
        with pytest.raises(ConfigError, match='data_range'): f(x, y, data_range=bad)
        with pytest.raises(TypeError): f(x, y)

def test_ssim_of_a_thin_volume_says_what_to_do():
    x, y = pair((30, 30, 5))
    with pytest.raises(ShapeError, match='ssim_slices'): ssim(x, y, data_range=1)
    assert np.isclose(ssim_slices(x, y, data_range=1), np.mean([ssim(x[..., k], y[..., k], data_range=1) for k in range(5)]))

@pytest.mark.parametrize('axis', [0, 1, 2])
def test_slices_are_taken_across_the_axis_named(axis):
    x, y = pair((15, 17, 19))
    m = numpy_rng(1, 'm').random(x.shape) > .5
    take = lambda v, k: np.moveaxis(v, axis, 0)[k]
    want = [ssim(take(x, k), take(y, k), data_range=1, mask=take(m, k)) for k in range(x.shape[axis])]
    assert np.isclose(ssim_slices(x, y, data_range=1, mask=m, axis=axis), np.mean(want))
    assert np.isnan(ssim_slices(x, y, data_range=1, mask=np.zeros(x.shape)))

@pytest.mark.parametrize('shape', [(48, 61, 53), (96, 80, 31), (70, 90)])
@pytest.mark.parametrize('noise', [1, 10, 30, 60, 100])
@pytest.mark.parametrize('frame', [0, 7])
def test_whole_head_in_noise(shape, noise, frame):
    r = radius(shape)
    x, truth = np.pad(rician(head(r), noise), frame), np.pad(r, frame, constant_values=9) < 1
    for scale in (1., 1e-4, 1e4): assert dice(head_mask(scale*x), truth) > .96

@pytest.mark.parametrize('levels', [(600, 200, 20, 900), (400, 1200, 20, 500), (700, 60, 20, 300)], ids=['T1', 'T2', 'FLAIR'])
def test_whole_head_contrasts(levels):
    r = radius((60, 71, 53))
    assert dice(head_mask(rician(head(r, levels), 20)), r < 1) > .96

@pytest.mark.parametrize('background', [0, -1, 37.5])
@pytest.mark.parametrize('csf', [100, 1200])
def test_brain_extracted_keeps_dark_fluid(background, csf):
    r = radius((48, 61, 53))
    texture = numpy_rng(0, 'x').normal(600, 40, r.shape)
    x = np.where(r < .8, np.where((r < .3) | (r > .74), csf, texture), 0.)+background
    assert dice(head_mask(x), r < .8) > .995

def test_brain_extracted_with_ringing_and_specks():
    from scipy.ndimage import zoom
    r = radius((32, 41, 35))
    x = zoom(np.where(r < .8, numpy_rng(0, 'x').normal(600, 60, r.shape), 0.), 1.5, order=3)
    assert (x < -1).any()
    x[1, 1, 1] = 500
    m = head_mask(x)
    assert not m[1, 1, 1] and dice(m, zoom((r < .8)*1., 1.5, order=1) > .5) > .95

@pytest.mark.parametrize('tissue', [lambda r, n: np.full(n, 5.), lambda r, n: r.uniform(.2, 1, n), lambda r, n: r.normal(100, 20, n)])
def test_a_box_of_tissue_is_kept_whole(tissue):
    x = np.zeros((20, 24, 18))
    x[3:17, 4:20, 2:16] = tissue(numpy_rng(0, 'box'), (14, 16, 14))
    assert np.array_equal(head_mask(x), np.pad(np.ones((14, 16, 14), bool), ((3, 3), (4, 4), (2, 2))))

def test_signed_tissue_on_a_zero_background():
    r = radius((40, 41, 35))
    x = np.where(r < .8, numpy_rng(0, 'z').standard_normal(r.shape), 0.)
    assert dice(head_mask(x), r < .8) > .99

def test_negative_background_of_a_whole_head():
    r = radius((48, 61, 53))
    assert dice(head_mask(rician(head(r), 20)-500), r < 1) > .96

def test_ct_with_a_table():
    r = radius((60, 71, 53))
    x = head(r, (35, 10, 1000, -60))
    x[r >= 1] = -1000
    x[:, 1:3] = 100
    x = x+numpy_rng(0, 'ct').normal(0, 15, x.shape)
    m = head_mask(x, kind='ct')
    assert dice(m, r < 1) > .97 and not m[:, :3].any()
    assert not head_mask(np.full((9, 9, 9), -1000.), kind='ct').any()
    assert not head_mask(np.where(r < .1, -900., -1000.), kind='ct').any()

@pytest.mark.parametrize('value', [0, 5., -1])
def test_a_constant_image_has_no_head_and_no_window(value):
    x = np.full((7, 9, 5), value)
    assert head_mask(x).shape == x.shape and not head_mask(x).any()
    with pytest.raises(I2IError, match='constant or its mask is empty'): window_of(x)

def test_mask_and_window_refuse_what_metrics_refuse():
    for f in (head_mask, window_of):
        with pytest.raises(I2IError, match='NaN'): f(np.full((4, 4), np.nan))
        with pytest.raises(ShapeError): f(np.zeros((2, 3, 4, 5)))
        with pytest.raises(ConfigError, match='mri'): f(np.eye(4), kind='mr')

def test_window_is_percentiles_inside_the_mask():
    x = numpy_rng(0, 'w').gamma(3, 100, (20, 21, 22))
    m = x > 150
    assert np.allclose(window_of(x, m), np.percentile(x[m], (.5, 99.5)), rtol=1e-12)
    assert np.allclose(window_of(x, m, percentiles=(5, 80)), np.percentile(x[m], (5, 80)))
    assert window_of(torch.tensor(x), torch.tensor(m)) == window_of(x, m)
    with pytest.raises(I2IError, match='two different intensities'): window_of(np.where(m, 4., x), m)
    with pytest.raises(ShapeError, match='mask'): window_of(x, m[:-1])

def test_ct_window_is_fixed(): assert window_of(np.zeros((3, 4)), kind='ct') == Window(-1024, 3071)

def test_window_round_trip_and_clipping():
    w = Window(-50., 150.)
    x = np.array([-100, -50, 0, 150, 9e9], np.float32)
    assert w.normalise(x).tolist() == [0, 0, .25, 1, 1] and w.normalise(x).dtype == np.float32
    assert w.restore(w.normalise(x)).tolist() == [-50, -50, 0, 150, 150]
    assert torch.equal(w.normalise(torch.tensor(x)), torch.tensor([0, 0, .25, 1, 1]))

def test_inputs_are_not_changed():
    x, y = pair((15, 16, 17))
    before = x.copy(), y.copy()
    for f in ALL.values(): f(x, y, mask=x > .5)
    head_mask(x), window_of(x)
    assert np.array_equal(before[0], x) and np.array_equal(before[1], y)
