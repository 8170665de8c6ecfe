"Registration, resampling, shading, brain and tissues on harder cases than the notebook's"
import subprocess
import sys

import numpy as np
import pytest
from samples import AFFINES, turned
from scipy.ndimage import affine_transform, gaussian_filter
from scipy.spatial.transform import Rotation

from i2i_mamba_nb.core import ConfigError, I2IError, numpy_rng
from i2i_mamba_nb.data.phantom import simulate_subject
from i2i_mamba_nb.data.register import (
    about,
    brain_mask,
    checkerboard,
    coarse,
    from_itk,
    information_gain,
    n4,
    register,
    resample,
    show_registration,
    spacing_of,
    tissue_classes,
    to_itk,
)
from i2i_mamba_nb.data.volume import Volume
from i2i_mamba_nb.measure.alignment import mutual_information

@pytest.fixture(scope='module')
def head():
    return simulate_subject(31, spacing=2., contrasts=('T1', 'T2', 'PD', 'FLAIR', 'CT'))

@pytest.fixture(scope='module')
def low(head):
    "The same head on 3 mm voxels, for what takes several registrations"
    return simulate_subject(31, spacing=3., contrasts=('T1', 'T2', 'PD', 'FLAIR', 'CT'))

@pytest.fixture(scope='module')
def fine(): return simulate_subject(32, spacing=(1.2, 1.2, 1.5), contrasts=('T1', 'T2'), site=1)

@pytest.fixture(scope='module')
def template_fits(): "What the template's fit gave to each image so far"; return {}

@pytest.fixture
def fit_once(template_fits, monkeypatch):
    "The template is fitted once to each extracted brain: finding it again and classifying it need the same matrix"
    import i2i_mamba_nb.data.register as module
    real = module._fit_template
    def fit(v, image):
        key = v.data.tobytes(), v.affine.tobytes(), image.tobytes()
        if key not in template_fits: template_fits[key] = real(v, image)
        return template_fits[key]
    monkeypatch.setattr(module, '_fit_template', fit)

def volume(p, name): return Volume(p.images[name], p.affine)
def points(p): return np.argwhere(p.labels['brain'] > .5)[::20]@p.affine[:3, :3].T+p.affine[:3, 3]
def rotation(*degrees): return Rotation.from_rotvec(degrees, degrees=True).as_matrix()
def error(found, true, at): return np.linalg.norm(at@(found-true)[:3, :3].T+(found-true)[:3, 3], axis=1).mean()
def dice(a, b): return 2*(a & b).sum()/(a.sum()+b.sum())

def moving(v, matrix, affine=None, shape=None):
    "What a scanner would show with the patient moved, on any grid: SciPy, no code of the module"
    affine, shape = v.affine if affine is None else affine, v.shape if shape is None else shape
    B = np.linalg.inv(v.affine)@np.linalg.inv(matrix)@affine
    blur = np.maximum(.4*spacing_of(affine)/spacing_of(v.affine)*(spacing_of(affine) > 1.2*spacing_of(v.affine)), 0)
    data = affine_transform(gaussian_filter(v.data, blur), B[:3, :3], B[:3, 3], shape, order=3, cval=float(v.data.min()))
    return Volume(data.astype(np.float32), affine)

def cut(v, a, b, axis=2):
    "Slices a to b along one axis only"
    affine = v.affine.copy()
    affine[:3, 3] += a*affine[:3, axis]
    return Volume(v.data[(slice(None),)*axis+(slice(a, b),)], affine)
RIGID = about(rotation(6, -5, 8), (0, 0, 0), (8, -9, 7))
AFFINE = about(rotation(-7, 6, 5)@(np.diag([1.05, .96, 1.03])+.02*np.eye(3, k=1)), (0, 0, 0), (-9, 6, -8))
FAR = about(rotation(5, 5, -5), (0, 0, 0), (40, -30, 35))

# ---------------------------------------------------------------- conventions
@pytest.mark.parametrize('order,flips', AFFINES[::5])
def test_itk_there_and_back_on_any_axes(order, flips):
    base = np.eye(4)
    base[:3, :3], base[:3, 3] = rotation(20, -35, 50)*(.7, 1.3, 2.9), (3, -4, 5)
    v = Volume(numpy_rng(0, 'itk').standard_normal((5, 7, 3)).astype(np.float32), turned(order, flips, base))
    image = to_itk(v)
    for index in ((0, 0, 0), (4, 0, 2), (1, 6, 1)):
        assert np.allclose(np.array(image.TransformIndexToPhysicalPoint(index))*(-1, -1, 1), (v.affine@[*index, 1])[:3], atol=1e-9)
        assert image.GetPixel(index) == v.data[index]
    back = from_itk(image)
    assert np.array_equal(back.data, v.data) and np.allclose(back.affine, v.affine, atol=1e-9)

def test_shear_is_refused_by_itk_and_resampled_right():
    A = np.array([[.9, .3, .05, -3.], [-.12, 1.1, .2, 4.], [.03, -.15, 1.7, 5.], [0, 0, 0, 1.]])
    index = np.moveaxis(np.indices((21, 19, 17)), 0, -1)
    plane = lambda affine, idx: ((idx@affine[:3, :3].T+affine[:3, 3])@[1., 2, -1]).astype(np.float32)
    v = Volume(plane(A, index), A)
    with pytest.raises(I2IError, match='shear'): to_itk(v)
    like = Volume(np.zeros((5, 7, 3), np.float32), np.diag([1., 1, 1, 1]))
    like.affine[:3, 3] = (A@[8, 8, 8, 1])[:3]
    assert np.abs(resample(v, like).data-plane(like.affine, np.moveaxis(np.indices(like.shape), 0, -1))).max() < 1e-4
    assert np.allclose(coarse(v, 1.).affine[:3, :3].T@coarse(v, 1.).affine[:3, :3], np.diag(spacing_of(coarse(v, 1.).affine)**2), atol=1e-9)

def test_resample_keeps_labels_header_and_grid(head):
    labels = Volume(head.labels['lesion'].astype(np.float32), head.affine, 'header')
    like = Volume(np.zeros((31, 37, 29), np.float32), about(rotation(10, 20, 30)@np.diag([3, 2.5, 4]), (0, 0, 0), (-50, -40, -60)), 'other')
    out = resample(labels, like, RIGID, order='nearest')
    assert set(np.unique(out.data)) <= set(np.unique(labels.data)) and out.header == 'other' and np.array_equal(out.affine, like.affine)
    ct = resample(volume(head, 'CT'), like, np.diag([1., 1, 1, 1])+np.eye(4, k=3)*1e4)
    assert (ct.data == np.clip(head.images['CT'].min(), -1024, None)).all()
    for bad in (np.full((4, 4), np.nan), np.eye(3), np.zeros((4, 4))):
        with pytest.raises(ConfigError, match='matrix'): resample(labels, like, bad)

# ---------------------------------------------------------------- registration
MOTIONS = [('T1', 'T2', AFFINE), ('T2', 'PD', RIGID), ('T1', 'FLAIR', AFFINE), ('PD', 'T1', FAR)]

@pytest.mark.parametrize(('a', 'b', 'true'), MOTIONS, ids=['affine', 'rigid', 'affine FLAIR', 'far'])
def test_known_motion(head, a, b, true):
    r = register(volume(head, a), moving(volume(head, b), true))
    assert not r.refused and r.after > r.before and error(r.matrix, true, points(head)) < .5

def test_lost_header(low):
    t2 = moving(volume(low, 'T2'), RIGID)
    lost = about(np.eye(3), (0, 0, 0), (95, -70, 85))
    r = register(volume(low, 'T1'), Volume(t2.data, lost@t2.affine))
    assert not r.refused and error(r.matrix, lost@RIGID, points(low)) < .5

@pytest.mark.parametrize('true', [RIGID, FAR], ids=['rigid', 'far'])
def test_ct_to_mr(low, true):
    a, b = ('CT', 'T1') if true is RIGID else ('T1', 'CT')
    assert error(register(volume(low, a), moving(volume(low, b), true)).matrix, true, points(low)) < .9

def test_other_grids(fine):
    t1, t2, at = volume(fine, 'T1'), volume(fine, 'T2'), points(fine)
    sagittal = np.zeros((4, 4))
    sagittal[:3, :3] = rotation(8, -4, 6)@np.array([[0, 0, 1.4], [-1.1, 0, 0], [0, 1.1, 0]])
    sagittal[:3, 3], sagittal[3, 3] = -sagittal[:3, :3]@[88, 80, 64], 1
    r = register(t1, moving(t2, AFFINE, sagittal, (176, 160, 128)))
    assert error(r.matrix, AFFINE, at) < .5
    thick = np.diag([.9, .9, 4., 1])
    thick[:3, 3] = -80, -97, -78
    assert error(register(moving(t2, np.eye(4), thick, (178, 216, 40)), moving(t1, RIGID)).matrix, RIGID, at) < .8

def test_cut_fields_of_view(low):
    t1, t2, at = volume(low, 'T1'), moving(volume(low, 'T2'), RIGID), points(low)
    for a, b in ((t1, cut(t2, 27, 54)), (cut(t1, 18, 42), t2), (cut(t1, 0, 38), cut(t2, 15, 54, 0))):
        assert error(register(a, b).matrix, RIGID, at) < .8

def test_brain_to_whole_head(low):
    brain = low.labels['brain'] > .5
    t1, t2 = volume(low, 'T1'), volume(low, 'T2')
    r = register(Volume(t1.data*brain, t1.affine), moving(t2, RIGID))
    assert error(r.matrix, RIGID, points(low)) < .5
    assert error(register(t1, moving(Volume(t2.data*brain, t2.affine), RIGID)).matrix, RIGID, points(low)) < .5

@pytest.mark.parametrize('b', ['T2', 'CT'])
def test_aligned_stays_aligned(low, b):
    r = register(volume(low, 'T1'), volume(low, b))
    assert error(r.matrix, np.eye(4), points(low)) < .3 and r.after >= r.before
    if r.refused: assert np.array_equal(r.matrix, np.eye(4)) and r.after == r.before

def test_rigid_only(low):
    r = register(volume(low, 'T1'), moving(volume(low, 'T2'), AFFINE), rigid=True)
    assert np.allclose(r.matrix[:3, :3].T@r.matrix[:3, :3], np.eye(3), atol=1e-6) and error(r.matrix, AFFINE, points(low)) < 4

# ---------------------------------------------------------------- refusal
def test_noise_and_strangers_are_refused(low):
    rng = numpy_rng(0, 'noise')
    noise = Volume(rng.standard_normal(low.images['T1'].shape).astype(np.float32), low.affine)
    smooth = Volume(gaussian_filter(noise.data, 3), low.affine)
    for n in (noise, smooth):
        r = register(n, volume(low, 'T2'))
        assert r.refused and np.array_equal(r.matrix, np.eye(4)) and r.before == r.after

def test_worse_is_refused(low, monkeypatch):
    import i2i_mamba_nb.data.register as module
    t1, t2 = volume(low, 'T1'), volume(low, 'T2')
    wrong = {'fell from': about(np.eye(3), (0, 0, 0), (2, 0, 0)), 'stretches by 0.50': about(.5*np.eye(3), (0, 0, 0)),
        'quarter of the head': about(np.eye(3), (0, 0, 0), (400, 0, 0)), 'stretches': np.diag([-1., 1, 1, 1])}
    for words, matrix in wrong.items():
        monkeypatch.setattr(module, '_align', lambda *a, m=matrix: m)
        r = module.register(t1, t2)
        assert words in r.refused and np.array_equal(r.matrix, np.eye(4)) and r.after == r.before > 0
    def stuck(*a): raise RuntimeError('ITK\nAll samples map outside moving image buffer.')
    monkeypatch.setattr(module, '_align', stuck)
    assert 'All samples map outside' in module.register(t1, t2).refused

def test_one_evaluator_for_before_and_after(low):
    t1, t2 = volume(low, 'T1'), moving(volume(low, 'T2'), RIGID)
    before, after = information_gain(t1, t2, RIGID)
    assert before == information_gain(t1, t2, np.eye(4))[1] or abs(before-information_gain(t1, t2, np.eye(4))[1]) < .05
    assert np.isclose(*information_gain(t1, t2, np.eye(4))) and after > 1.5*before
    inside = low.labels['brain'] > .5
    gain = [mutual_information(t1.data, resample(t2, t1, m).data, inside) for m in (None, RIGID)]
    assert gain[1] > 1.5*gain[0]
    lost = Volume(t2.data, about(np.eye(3), (0, 0, 0), (900, 0, 0))@t2.affine)
    assert information_gain(t1, lost, about(np.eye(3), (0, 0, 0), (900, 0, 0))@RIGID)[0] == 0

def test_empty_and_tiny_images():
    flat = Volume(np.ones((20, 22, 24), np.float32), np.eye(4))
    x = np.zeros((24, 28, 13), np.float32)
    x[5:19, 6:22, 2:11] = 100+20*numpy_rng(0, 'x').standard_normal((14, 16, 9))
    with pytest.raises(I2IError, match='fixed image: given 0 voxels'): register(flat, Volume(x, np.eye(4)))
    with pytest.raises(I2IError, match='moving image: given 0 voxels'): register(Volume(x, np.eye(4)), flat)
    one = register(Volume(x[:, :, 6:7], np.eye(4)), Volume(x[:, :, 6:7], np.eye(4)))
    assert one.after >= one.before and (one.refused or error(one.matrix, np.eye(4), np.argwhere(x[:, :, 6:7] > 0)) < .5)
    small = register(Volume(x, np.eye(4)), Volume(np.roll(gaussian_filter(x, .5), 2, 0), np.eye(4)))
    assert small.refused or error(small.matrix, about(np.eye(3), (0, 0, 0), (2, 0, 0)), np.argwhere(x > 0)) < .7

PROGRAM = """
import sys
import numpy as np, SimpleITK as sitk
from i2i_mamba_nb.data.phantom import simulate_subject
from i2i_mamba_nb.data.register import about, n4, register, resample
from i2i_mamba_nb.data.volume import Volume
sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(int(sys.argv[1]))
p = simulate_subject(5, spacing=5., contrasts=('T1', 'T2'))
a, b = (Volume(p.images[m], p.affine) for m in ('T1', 'T2'))
b = Volume(b.data, about(np.eye(3), (0, 0, 0), (6, -5, 4))@b.affine)
r = register(a, b)
print(r.refused, r.matrix.tobytes().hex(), r.after.hex(), float(np.abs(r.matrix[:3, 3]-(6, -5, 4)).max()) < 1)
print(hash(resample(b, a, r.matrix, order='bspline').data.tobytes()), hash(n4(a, level=8., iterations=(8, 8)).log_field.tobytes()))
print(sitk.ProcessObject.GetGlobalDefaultNumberOfThreads() == int(sys.argv[1]))
"""

def test_same_bytes_whatever_the_threads():
    said = set()
    for n in ('1', '3'):
        env = dict(OMP_NUM_THREADS=n, OPENBLAS_NUM_THREADS=n, ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS=n, PYTHONHASHSEED='0', PATH='')
        said.add(subprocess.run([sys.executable, '-c', PROGRAM, n], capture_output=True, text=True, check=True, env=env).stdout)
    assert len(said) == 1
    text = said.pop()
    assert text.count('True') == 2 and text.startswith(' ')

# ---------------------------------------------------------------- shading
def test_n4_finds_a_field_and_keeps_the_grid(fine):
    t1, inside = volume(fine, 'T1'), fine.labels['brain'] > .5
    g = np.meshgrid(*[np.linspace(-1, 1, n) for n in t1.shape], indexing='ij')
    bias = .35*np.sin(2*g[1]+.5)*np.cos(g[0])+.2*g[2]
    shaded = Volume((t1.data*np.exp(bias)).astype(np.float32), t1.affine, 'header')
    found = n4(shaded, inside, level=6.)
    extra = (found.log_field-n4(t1, inside, level=6.).log_field)[inside]
    assert np.corrcoef(extra, bias[inside])[0, 1] > .98 and (extra-bias[inside]).std() < .25*bias[inside].std()
    assert found.volume.header == 'header' and found.volume.affine is shaded.affine and found.log_field.shape == t1.shape
    assert abs(found.log_field[inside].mean()) < 1e-3 and np.isfinite(found.volume.data).all() and found.log_field.dtype == np.float32
    white = fine.labels['wm'] > .95
    assert found.volume.data[white].std()/found.volume.data[white].mean() < .6*shaded.data[white].std()/shaded.data[white].mean()

def test_n4_survives_negative_values_shear_and_zeros(head):
    x = head.images['T1']*(head.labels['brain'] > .5)-1.
    sheared = head.affine.copy()
    sheared[:3, 0] += .2*sheared[:3, 1]
    assert np.isfinite(n4(Volume(x, sheared), level=8., iterations=(5,)).volume.data).all()
    with pytest.raises(I2IError, match='voxels of signal'): n4(Volume(0*x, head.affine))

# ---------------------------------------------------------------- brain and tissue
@pytest.mark.parametrize('name', ['T1', 'T2', 'PD', 'FLAIR'])
def test_brain_of_a_whole_head(head, name):
    assert dice(brain_mask(volume(head, name)), head.labels['brain'] > .5) > .92

def test_brain_of_thick_and_moved_slices(fine):
    thick = np.diag([1.1, 1.1, 4., 1])
    thick[:3, 3] = -90, -110, -78
    v = moving(volume(fine, 'T1'), FAR@np.diag([1., 1, 1, 1]), FAR@thick, (164, 200, 40))
    truth = moving(Volume((fine.labels['brain'] > .5).astype(np.float32), fine.affine), FAR, FAR@thick, (164, 200, 40)).data > .5
    assert dice(brain_mask(v), truth) > .92

@pytest.mark.parametrize('name', ['T1', 'T2', 'FLAIR'])
def test_extracted_brain_comes_back(head, name, fit_once):
    brain = head.labels['brain'] > .5
    assert dice(brain_mask(Volume(head.images[name]*brain, head.affine)), brain) > .98

LEAST = {('T1',): (.75, .87, .85), ('T2',): (.65, .82, .82), ('PD',): (.25, .84, .82), ('FLAIR',): (.65, .72, .62),
    ('T1', 'T2', 'PD'): (.65, .86, .9)}

@pytest.mark.parametrize('names', LEAST, ids='+'.join)
def test_tissues(head, names, fit_once):
    brain = head.labels['brain'] > .5
    codes, p = tissue_classes({m: volume(head, m) for m in names}, brain)
    real = np.where(brain, np.stack([head.labels[k] for k in ('csf', 'gm', 'wm')]).argmax(0)+1, 0)
    healthy = brain & (head.labels['lesion'] == 0)
    scores = [dice((codes == k) & healthy, (real == k) & healthy) for k in (1, 2, 3)]
    assert all(s > least for s, least in zip(scores, LEAST[names], strict=True)), scores
    assert (codes[~brain] == 0).all() and (p[:, ~brain] == 0).all() and np.allclose(p.sum(0)[brain], 1, atol=1e-3)
    assert codes.dtype == np.uint8 and p.shape == (3, *brain.shape) and (p.argmax(0)[brain]+1 == codes[brain]).all()

def test_tissues_are_the_same_twice(head, fit_once, monkeypatch):
    brain = head.labels['brain'] > .5
    one = tissue_classes(dict(T2=volume(head, 'T2')), brain)
    monkeypatch.undo()          # the second time everything is computed
    two = tissue_classes(dict(T2=volume(head, 'T2')), brain, matrix=None)
    assert np.array_equal(one[0], two[0]) and np.array_equal(one[1], two[1])

# ---------------------------------------------------------------- pictures
def test_pictures(head):
    import matplotlib.pyplot as plt
    t1, t2 = volume(head, 'T1'), volume(head, 'T2')
    order, flips = AFFINES[13]
    other = Volume(np.ascontiguousarray(t1.data.transpose(order)), t1.affine[:, [*order, 3]])
    fig = show_registration(other, resample(t2, other), resample(t2, other))
    assert len(fig.axes) == 8
    plt.close(fig)
    a, b = np.zeros((8, 8)), np.ones((8, 8))
    a[0, 0], b[0, 0] = 1, 0
    tiles = checkerboard(a, b, 4)
    assert tiles[1, 1] == 0 and tiles[0, 2] == 1 and tiles[2, 0] == 1 and tiles[3, 3] == 0
