"Mutual information and the shift between two images, on harder cases than the notebook's"
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from scipy.ndimage import shift as moved_by
from skimage.metrics import normalized_mutual_information
from sklearn.metrics import mutual_info_score

from i2i_mamba_nb.core import I2IError, ShapeError, numpy_rng
from i2i_mamba_nb.data.phantom import simulate_subject
from i2i_mamba_nb.measure.alignment import entropy, joint_histogram, looks_like_ct, mutual_information, shift_between
from i2i_mamba_nb.measure.alignment import normalised_mutual_information as nmi

@pytest.fixture(scope='module')
def heads():
    whole = simulate_subject(21, spacing=1.5, contrasts=('T1', 'T2', 'PD', 'FLAIR', 'CT'))
    thick = simulate_subject(22, spacing=(1.2, 1.2, 3.), contrasts=('T1', 'T2', 'PD', 'CT'), site=1)
    brain = simulate_subject(23, spacing=1.5, contrasts=('T1', 'T2', 'PD', 'FLAIR'), whole_head=False)
    return dict(whole=whole, thick=thick, brain=brain)

# ---------------------------------------------------------------- information
@pytest.mark.parametrize('shape', [(5, 7), (5, 7, 3), (11, 1, 4)])
@pytest.mark.parametrize('bins', [2, 7, 64, 100])
def test_equal_to_scikit_image(shape, bins):
    a, b = numpy_rng(0, 'mi').standard_normal((2, *shape))
    assert np.isclose(nmi(a, a+.3*b, bins=bins), normalized_mutual_information(a, a+.3*b, bins=bins), rtol=1e-9)

@pytest.mark.parametrize('kind', ['thirds', 'integers', 'large', 'tiny', 'float32'])
def test_bins_are_those_of_numpy(kind):
    rng = numpy_rng(1, kind)
    a = dict(thirds=np.arange(3001)/3000, integers=rng.integers(-5, 300, 3001), large=1e12+rng.standard_normal(3001),
        tiny=1e-30*rng.standard_normal(3001), float32=rng.random(3001, dtype=np.float32))[kind]
    b = rng.permutation(a)
    for bins in (3, 10, 64): assert (joint_histogram(a, b, bins=bins) == np.histogram2d(a, b, bins)[0]).all()

def test_information_of_labels():
    rng = numpy_rng(2, 'labels')
    a = rng.integers(0, 6, (9, 11, 7))
    b = (a+rng.integers(0, 2, a.shape)) % 6
    assert np.isclose(mutual_information(a, b, bins=6), mutual_info_score(a.ravel(), b.ravel()))
    assert np.isclose(mutual_information(a, a, bins=6), entropy(np.bincount(a.ravel())))

def test_tensors_masks_and_defined_values():
    a, b = numpy_rng(3, 'x').standard_normal((2, 6, 8, 5))
    m = numpy_rng(3, 'm').random(a.shape) < .5
    assert mutual_information(torch.tensor(a), torch.tensor(b), torch.tensor(m)) == mutual_information(a[m], b[m])
    assert mutual_information(a, a*0) == 0 and nmi(a, a*0) == 1 and nmi(a*0, a*0) == 1 and nmi(a, -a) == 2
    assert np.isnan(mutual_information(a, b, m & False)) and np.isnan(nmi(a, b, m & False))
    with pytest.raises(I2IError, match='NaN or infinite'): mutual_information(a, np.full(a.shape, np.nan))
    with pytest.raises(ShapeError): mutual_information(a, b.swapaxes(0, 1))

# ---------------------------------------------------------------- shift
CONTRASTS = dict(whole='T1-T2 T1-PD T2-FLAIR T1-CT CT-T2', thick='T1-T2 PD-T1 T2-CT', brain='T1-T2 T1-FLAIR T2-PD')
PAIRS = [(h, *p.split('-')) for h, pairs in CONTRASTS.items() for p in pairs.split()]

@pytest.mark.parametrize(('name', 'a', 'b'), PAIRS)
def test_known_shifts_between_contrasts(heads, name, a, b):
    images = heads[name].images
    for s in ((0, 0, 0), (1, 0, 0), (0, -1, 0), (-2, 1, 1), (.5, 0, -.5)):
        found = shift_between(images[a], moved_by(images[b], s, mode='nearest'))
        assert np.abs(found-s).max() <= (.25 if all(float(v).is_integer() for v in s) else .3), (s, found)

@pytest.mark.parametrize('axis', [0, 1, 2])
def test_one_mask_for_both_does_not_hide_a_shift(heads, axis):
    p = heads['whole']
    inside, step = p.labels['brain'] > .5, np.eye(3, dtype=int)[axis]
    t1, t2 = p.images['T1']*inside, np.roll(p.images['T2'], 1, axis)
    assert np.abs(shift_between(t1, t2*inside)-step).max() <= .25
    assert np.abs(shift_between(t1, t2*np.roll(inside, 1, axis))-step).max() <= .25

def test_shift_of_slices_and_of_a_contrast_turned_over(heads):
    t1, t2 = (heads['whole'].images[m][:, :, 55] for m in ('T1', 'T2'))
    assert np.abs(shift_between(t1, np.roll(t2, (2, -1), (0, 1)))-(2, -1)).max() <= .3
    assert np.abs(shift_between(t1, np.roll(t1.max()-t1, (0, 3), (0, 1)), reach=4)-(0, 3)).max() <= .3
    assert abs(shift_between(t1, np.roll(t2, 5, 0), reach=3)[0]) == 3

def test_thin_and_small_volumes(heads):
    t1, t2 = (heads['whole'].images[m] for m in ('T1', 'T2'))
    for n in (1, 3, 6):
        found = shift_between(t1[:, :, 50:50+n], np.roll(t2, 1, 0)[:, :, 50:50+n])
        assert np.abs(found[:2]-(1, 0)).max() <= .3 and abs(found[2]) < .5
    small = [v[::4, ::4, ::8] for v in (t1, np.roll(t2, 4, 1))]
    assert abs(shift_between(*small)[1]-1) <= .35
    assert np.isnan(shift_between(np.ones((5, 5, 5)), np.ones((5, 5, 5)))).all()

def test_mask_given(heads):
    t1, t2 = (heads['whole'].images[m] for m in ('T1', 'T2'))
    left = np.arange(t1.shape[0])[:, None, None] < 50
    mixed = np.where(left, t2, np.roll(t2, 2, 1))
    right = np.broadcast_to(~left, t1.shape) & (np.arange(t1.shape[0])[:, None, None] > 55) & (heads['whole'].labels['brain'] > .5)
    assert np.abs(shift_between(t1, mixed, mask=right)-(0, 2, 0)).max() <= .25

def test_ct_is_recognised(heads):
    assert looks_like_ct(heads['whole'].images['CT']) and looks_like_ct(heads['whole'].images['CT'].astype(np.int16))
    assert not any(looks_like_ct(heads['whole'].images[m]) for m in ('T1', 'T2', 'PD', 'FLAIR')) and not looks_like_ct(np.zeros((3, 3)))

PROGRAM = """
import numpy as np
from i2i_mamba_nb.measure.alignment import mutual_information, shift_between
from i2i_mamba_nb.core import numpy_rng
from scipy.ndimage import gaussian_filter
a = gaussian_filter(numpy_rng(0, 'a').standard_normal((40, 44, 36)), 2)
print(shift_between(a, np.roll(a*a, 1, 0)).tobytes().hex(), mutual_information(a, a*a).hex())
"""

def test_same_bytes_whatever_the_threads():
    command, env = [sys.executable, '-c', PROGRAM], dict(PATH='')
    ran = [subprocess.run(command, capture_output=True, text=True, check=True, env=dict(env, OMP_NUM_THREADS=n)) for n in ('1', '2', '5')]
    said = {r.stdout for r in ran}
    assert len(said) == 1 and len(said.pop()) > 50

def test_paper_size_uses_little_time_of_the_processor():
    x = np.moveaxis(np.indices((256, 256, 150), np.float32), 0, -1)-(128, 128, 75)
    r = np.sqrt((x**2).sum(-1))
    a = np.where(r < 70, 100+20*np.sin(x[..., 0]/5)*np.cos(x[..., 1]/6)*np.sin(x[..., 2]/4), 0).astype(np.float32)
    b = np.where(r < 70, 300-a, 0)
    start = time.process_time()
    found = shift_between(a, np.roll(b, 1, 2))
    spent = time.process_time()-start
    assert np.abs(found-(0, 0, 1)).max() <= .25 and spent < 20, 'two seconds on a quiet machine; this only guards against another order'
