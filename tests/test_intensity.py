"Intensity: there and back for any range and dtype, four ways of fitting against definitions written out, hostile settings"
import json

import numpy as np
import pytest
import torch

from i2i_mamba_nb.core import ConfigError, I2IError, ShapeError, numpy_rng
from i2i_mamba_nb.measure.intensity import KINDS, Intensity, fit_intensity, fit_scale, intensity_from
from i2i_mamba_nb.measure.metrics import Window, head_mask, window_of
from samples import head

def ranges(n, seed=0):
    "Ranges of every size and place that float32 volumes have"
    rng = numpy_rng(seed, 'ranges')
    for _ in range(n):
        middle, width = rng.choice([-1, 1])*10.**rng.uniform(-8, 8), 10.**rng.uniform(-6, 10)
        if width > 1e-5*abs(middle): yield float(middle-width/2), float(middle+width/2), rng

# ---- there and back -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('clip', [True, False])
def test_there_and_back_within_a_millionth(clip):
    tried = 0
    for low, high, rng in ranges(600):
        v = (low+(high-low)*rng.random((4, 5))).astype(np.float32)
        i, tried = Intensity(float(v.min())-.0123*(high-low), float(v.max())+.0321*(high-low), clip), tried+1
        for x in (v, v.T, v[::2, ::-1], torch.from_numpy(v), torch.from_numpy(v).T, v.astype(np.float64), torch.from_numpy(v).double()):
            y = i.apply(x)
            back = i.invert(y)
            assert type(back) is type(x) and back.dtype == x.dtype == y.dtype and back.shape == x.shape
            assert abs(y).max() <= 1+1e-6 and abs(back-x).max() <= 1e-6*(i.high-i.low)
    assert tried > 300

def test_values_outside_come_back_where_nothing_is_clipped():
    x = np.array([-700., 0, 100, 5000], np.float32)
    i = Intensity(100., 200., clip=False)
    assert i.apply(x).tolist() == [-17, -3, -1, 97] and np.allclose(i.invert(i.apply(x)), x)
    assert Intensity(100., 200.).apply(x).tolist() == [-1, -1, -1, 1]

@pytest.mark.parametrize('low,high', [(0, 1), (-1024, 3071), (3, 11), (-100, -10), (1e5, 1e5+1)])
def test_float32_agrees_with_float64(low, high):
    x = np.linspace(low-1, high+1, 9999, dtype=np.float32)
    assert abs(Intensity(low, high).apply(x)-Intensity(low, high).apply(x.astype(np.float64))).max() <= 6.7e-7

@pytest.mark.parametrize('x', [np.arange(6).astype(k) for k in (np.uint8, np.int16, np.int64, np.float16, bool)]
    +[torch.arange(6).to(k) for k in (torch.uint8, torch.int32, torch.float16, torch.bfloat16, torch.bool)], ids=lambda x: str(x.dtype))
def test_everything_narrow_or_whole_becomes_float32(x):
    i = Intensity(0., 5., clip=False)
    assert str(i.apply(x).dtype).endswith('float32') and str(i.invert(x).dtype).endswith('float32')
    assert np.allclose(np.asarray(i.apply(x)), 2*np.asarray(x if not torch.is_tensor(x) else x.float()).astype(float)/5-1)

def test_inputs_are_left_alone_and_results_are_their_own():
    for x in (np.ones(4, np.float32), np.ones(4), torch.ones(4), torch.ones(4).double()):
        i = Intensity(0., 2., clip=False)
        for made in (i.apply(x), i.invert(x)):
            made += 7
            assert (x == 1).all()

def test_gradients_pass_and_numbers_and_lists_are_taken():
    x = torch.tensor([.2, .9], requires_grad=True)
    Intensity(0., 4.).apply(x).sum().backward()
    assert x.grad.tolist() == [.5, .5]
    assert float(Intensity(0., 4.).apply(3)) == .5 and Intensity(0., 4.).invert([0, 1]).tolist() == [2, 4]
    assert Intensity(0., 4.).apply(np.zeros((0, 3), np.float32)).shape == (0, 3)

@pytest.mark.parametrize('x', [np.ones(2, complex), torch.ones(2, dtype=torch.complex64), np.array(['a']), np.array([None])])
def test_what_is_no_number_is_refused(x):
    with pytest.raises(ShapeError, match='real numbers'): Intensity(0., 1.).apply(x)
    with pytest.raises(ShapeError, match='real numbers'): Intensity(0., 1.).invert(x)

BAD = [(1, 1), (2, 1), (float('nan'), 1), (0, float('inf')), (-float('inf'), 0), (None, 1), ('0', 1), (True, 2), (-1.7e308, 1.7e308),
    (0, 1, 'yes'), (0, 1, None), (0, 1, 1), (0, 1, True, 'mean'), (0, 1, True, None)]

@pytest.mark.parametrize('four', BAD)
def test_bad_numbers_are_refused_wherever_they_come_in(four):
    with pytest.raises(ConfigError): Intensity(*four).apply(np.ones(2))
    with pytest.raises(ConfigError): Intensity(*four).invert(np.ones(2))
    with pytest.raises(ConfigError): intensity_from(dict(zip(Intensity._fields, four, strict=False)))

# ---- kept as JSON ---------------------------------------------------------------------------------------------------------------
def test_json_keeps_every_bit():
    for n, (low, high, _) in enumerate(ranges(500, seed=1)):
        i = Intensity(np.float32(low) if n % 2 else low, high, bool(n % 3), KINDS[n % 4])
        if not i.low < i.high: continue
        back = intensity_from(json.loads(json.dumps(i.to_dict(), allow_nan=False)))
        assert back == i and all(type(a) is t for a, t in zip(back, (float, float, bool, str), strict=True))

def test_an_intensity_is_a_window_where_two_numbers_are_wanted():
    i = Intensity(*Window(3., 8.))
    assert i == (3, 8, True, 'window') and Window(*i[:2]) == (3, 8) and i[0] == 3 and i[1] == 8

@pytest.mark.parametrize('d', [{}, dict(low=1), dict(high=1), dict(low=0, high=1, hight=2), None, 'low', [0, 1], 3, dict(low=[0], high=1)])
def test_hostile_settings(d):
    with pytest.raises(ConfigError): intensity_from(d)

# ---- the four kinds -------------------------------------------------------------------------------------------------------------
def test_window_is_that_of_the_metrics():
    x = head()
    assert fit_intensity(x)[:2] == window_of(x) and fit_intensity(x) == fit_intensity(torch.from_numpy(x)) and fit_intensity(x).clip
    assert fit_intensity(x, percentiles=(5, 95))[:2] == window_of(x, percentiles=(5, 95))
    mask = numpy_rng(0, 'mask').random(x.shape) > .5
    assert fit_intensity(x, mask=mask)[:2] == tuple(np.percentile(x[mask].astype(float), (.5, 99.5)))

def test_zscore_by_hand():
    x = head().astype(np.float64)
    inside = head_mask(x)
    i = fit_intensity(x, 'zscore')
    assert np.allclose(i.apply(x), (x-x[inside].mean())/x[inside].std(), atol=1e-9) and not i.clip and i.kind == 'zscore'

def test_mean_max_is_what_syndiff_does():
    train = [head(key=k).astype(np.float64)*(1+k) for k in range(4)]
    means = [x/x.mean() for x in train]
    wanted = [2*m/max(m.max() for m in means)-1 for m in means]
    scale = fit_scale(train)
    for x, w in zip(train, wanted, strict=True): assert np.allclose(fit_intensity(x, 'mean_max', scale=scale).apply(x), w, atol=1e-9)
    test = train[0]**2
    assert fit_intensity(test, 'mean_max', scale=scale).apply(test).max() > 1
    assert np.isclose(fit_intensity(test, 'mean_max').apply(test).max(), 1)

def test_scale_takes_an_iterable_once_and_masks():
    train = [head(key=k) for k in range(3)]
    masks = [head_mask(x) for x in train]
    assert fit_scale(x for x in train) == fit_scale(train) > fit_scale(train, masks) > 1
    with pytest.raises(ValueError): fit_scale(train, masks[:2])

def test_hounsfield_looks_at_no_voxel():
    i = fit_intensity(np.full((3, 3, 3), -1000.), 'hounsfield')
    assert i == (-1024, 3071, True, 'hounsfield') and i.apply(np.array([-3000., -1024, 3071, 9999])).tolist() == [-1, -1, 1, 1]

@pytest.mark.parametrize('kind', KINDS[:3])
@pytest.mark.parametrize('x,mask', [(np.full((5, 5, 5), 3.), None), (np.zeros((5, 5)), None), (head(), np.zeros(head().shape, bool)),
    (head(), head() == head().max()), (np.where(head() > 0, np.nan, 0), None), (np.zeros((0, 4)), None), (head()[None], None)])
def test_images_without_a_scale(kind, x, mask):
    with pytest.raises(I2IError): fit_intensity(x, kind, mask=mask)

@pytest.mark.parametrize('scale', [0, -1, float('nan'), float('inf'), True, '3', [2]])
def test_scales_that_are_none(scale):
    with pytest.raises(ConfigError, match='scale'): fit_intensity(head(), 'mean_max', scale=scale)

def test_words_of_the_refusals():
    with pytest.raises(ConfigError, match="Did you mean 'zscore'"): fit_intensity(head(), 'z-score')
    with pytest.raises(ConfigError, match='Only mean_max'): fit_intensity(head(), 'window', scale=2.)
    with pytest.raises(I2IError, match='magnitude images'): fit_intensity(head()-500, 'mean_max')
    with pytest.raises(I2IError, match='training subject'): fit_scale(iter([]))
