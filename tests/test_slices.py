"Slices: geometry, bytes that do not depend on the worker, real volumes"
import errno
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from i2i_mamba_nb.core import CohortError, ConfigError, DiskError, ShapeError, numpy_rng
from i2i_mamba_nb.data.cohort import Cohort, Subject
from i2i_mamba_nb.data.prepare import propose_manifest
from i2i_mamba_nb.data.slices import (SlicePairs, fit_to, from_images, load_subject, restore, tissue_slices, to_image, to_images,
    unfit)
from samples import AFFINES, OBLIQUE, head, shifted, turned

from i2i_mamba_nb.data.volume import (Volume, VolumeError, read_grid, read_volume, to_canonical,
    write_volume)

# ---- slices ---------------------------------------------------------------------------------------------------------------------
def test_load_subject(cohort):
    loaded = load_subject(cohort.patient('p1'), ['T1', 'PD', 'T1'])
    assert set(loaded.images) == {'T1', 'PD'} and loaded.mask.dtype == bool and 0 < loaded.mask.mean() < 1
    for m, image in loaded.images.items():
        assert image.dtype == np.float32 and image.min() == -1 and image.max() == 1
        canonical = to_canonical(read_volume(cohort.patient('p1').paths[m]))[0].data
        window = loaded.windows[m]
        assert np.allclose(image, 2*np.clip((canonical-window.low)/(window.high-window.low), 0, 1)-1, atol=1e-6)
    fixed = load_subject(cohort.patient('p1'), ['T1'], windows=dict(T1=(0, 1000)))
    assert fixed.windows['T1'] == (0, 1000) and fixed.images['T1'].max() < 0
    with pytest.raises(ConfigError, match='low below high'): load_subject(cohort.patient('p1'), ['T1'], windows=dict(T1=(5, 5)))

def test_ct_has_its_fixed_window(tmp_path):
    write_volume(tmp_path/'ct.nii', Volume(np.where(head() > 0, 40, -1000), np.eye(4)))
    assert load_subject(Subject('p', 'test', dict(CT=tmp_path/'ct.nii')), ['CT']).windows['CT'] == (-1024, 3071)

PAIRS = [(shape, affine) for shape, affine in [((24, 28, 12), OBLIQUE), ((28, 24, 13), OBLIQUE), ((12, 14, 13), np.diag([2, 2, 1, 1.])),
    *(((24, 28, 13), shifted(k)) for k in range(6)), *(((24, 28, 13), turned(*a)) for a in AFFINES[1::6]),
    *(((24, 28, 13), OBLIQUE*np.array([s, s, s, 1])) for s in (.9, 1.1, 1.01))]]

@pytest.mark.parametrize('shape,affine', PAIRS)
def test_20_mismatched_pairs_name_both(cohort, tmp_path, shape, affine):
    assert len(PAIRS) >= 20
    path = write_volume(tmp_path/'odd.nii.gz', Volume(head(shape), affine))
    first = cohort.patient('p1').paths['T1']
    with pytest.raises(CohortError) as e: load_subject(Subject('p1', 'train', dict(T1=first, T2=path)), ['T1', 'T2'])
    assert str(first) in str(e.value) and str(path) in str(e.value) and 'Resample' in str(e.value)

def test_an_image_without_contrast_is_named(tmp_path):
    path = write_volume(tmp_path/'flat.nii.gz', Volume(np.full((9, 9, 9), 3.), np.eye(4)))
    with pytest.raises(VolumeError, match='flat.nii.gz'): load_subject(Subject('p', 'test', dict(T1=path)), ['T1'])
    with pytest.raises(CohortError, match='T2 of patient p'): load_subject(Subject('p', 'test', dict(T1=path)), ['T2'])

def test_restore_checks_the_shape(cohort):
    loaded = load_subject(cohort.patient('p1'), ['T1'])
    assert loaded.reference.data.strides == (0, 0, 0)
    with pytest.raises(ShapeError): restore(loaded, np.zeros((3, 4, 5)))

def test_fit_and_unfit_500_sizes():
    rng = numpy_rng(0, 'fit')
    for _ in range(500):
        shape, size, corner = rng.integers(1, 30, 2), rng.integers(1, 30, 2), rng.integers(-40, 40, 2)
        a = rng.standard_normal((3, *shape)).astype(np.float32)
        b, box = fit_to(a, size, -1, corner=None if rng.random() < .5 else corner)
        assert b.shape == (3, *size) and b.dtype == np.float32
        back, seen = unfit(b, box), unfit(np.ones_like(b), box) > 0
        assert np.array_equal(back[seen], a[seen]) and (back[~seen] == -1).all()
        ends = np.array([box.top, box.left])
        if (ends <= 0).all() and (ends+size >= shape).all(): assert seen.all()
    with pytest.raises(ConfigError): fit_to(a, 0)
    with pytest.raises(ConfigError): fit_to(a, (3, 2.5))
    with pytest.raises(ShapeError): unfit(np.zeros((3, 99, 99)), box)

def same(a, b): return all(torch.equal(a[k], b[k]) if torch.is_tensor(a[k]) else a[k] == b[k] for k in a)

@pytest.fixture(scope='module')
def pairs(cohort): return SlicePairs(cohort, 'train', ('T1', 'T2'), 'PD', size=(17, 12), augment=True, seed=3)

def test_pairs_shapes(cohort, pairs):
    x = pairs[0]
    assert x['source'].shape == (2, 17, 12) and x['target'].shape == (1, 17, 12) and x['source'].dtype == torch.float32
    mask = load_subject(cohort.patient('p1'), ['T1', 'T2', 'PD']).mask
    assert x['patient'] == 'p1' and [pairs[k]['z'] for k in range(len(pairs))] == tissue_slices(mask).tolist()
    assert all(x['target'].abs().max() <= 1 for x in pairs)

def test_same_bytes_from_any_worker_and_order(pairs, cohort):
    keys = [(i, d) for d in range(3) for i in range(len(pairs))]
    twin = SlicePairs(cohort, 'train', ('T1', 'T2'), 'PD', size=(17, 12), augment=True, seed=3, max_bytes=0)
    expected = [pairs[k] for k in keys]
    assert all(same(a, twin[k]) for a, k in zip(expected[::-1], keys[::-1], strict=True)) and isinstance(twin.blocks[0], np.memmap)
    for workers in (0, 2):
        loader = torch.utils.data.DataLoader(pairs, batch_size=None, sampler=keys, num_workers=workers)
        assert all(same(a, b) for a, b in zip(expected, loader, strict=True))
    assert not same(pairs[3, 0], pairs[3, 1])
    assert not all(same(pairs[k], SlicePairs(cohort, 'train', ('T1', 'T2'), 'PD', size=(17, 12), augment=True, seed=4)[k]) for k in keys)

def test_source_and_target_stay_aligned(cohort):
    d = SlicePairs(cohort, 'train', ('T1',), 'T1', size=11, augment=True)
    for k in range(len(d)):
        for draw in range(5): assert torch.equal(d[k, draw]['source'], d[k, draw]['target']) and d[k, draw]['target'].max() > -1

def test_without_augmentation_slices_are_the_volume(cohort):
    d = SlicePairs(cohort, 'test', ('T1',), 'T2', size=(28, 24))
    loaded = load_subject(cohort.patient('p3'), ['T1', 'T2'])
    for k, x in enumerate(d):
        assert np.array_equal(x['target'][0].numpy(), to_image(loaded.images['T2'], x['z'])) and same(x, d[k, 9])
    wide, box = fit_to(to_image(loaded.images['T1'], d[0]['z']), 40)
    assert np.array_equal(SlicePairs(cohort, 'test', ('T1',), 'T2', size=40)[0]['source'][0].numpy(), wide) and box.top < 0

def test_without_augmentation_all_slices_are_cut_at_one_place(tmp_path):
    leaning = np.stack([np.roll(head()[..., k], (k-6)//2, 0) for k in range(13)], 2)
    for m in ('T1', 'T2'): write_volume(tmp_path/f'{m}.nii', Volume(leaning, np.eye(4)))
    c = Cohort((Subject('p', 'test', {m: tmp_path/f'{m}.nii' for m in ('T1', 'T2')}),), ('T1', 'T2'), tmp_path)
    d, image = SlicePairs(c, 'test', ('T1',), 'T2', size=14), load_subject(c.subjects[0], ['T1', 'T2']).images['T2']
    def corners(x): return {k for k in np.ndindex(15, 11) if np.array_equal(fit_to(to_image(image, x['z']), 14, corner=k)[0],
        x['target'][0])}
    assert len(set.intersection(*map(corners, d))) == 1 and len(d) > 5

def test_limit_and_missing(cohort):
    d = SlicePairs(cohort, 'train', ('T1',), 'T2', size=8, limit=3)
    full = SlicePairs(cohort, 'train', ('T1',), 'T2', size=8)
    assert len(d) == 3 and d[0]['z'] == full[0]['z'] and d[2]['z'] == full[len(full)-1]['z']
    with pytest.raises(CohortError, match='FLAIR of patient p1'): SlicePairs(cohort, 'train', ('T1',), 'FLAIR', size=8)
    with pytest.raises(ConfigError): SlicePairs(cohort, 'train', ('T1',), 'T2', size=8, limit=0)

def test_flips_happen_and_only_when_augmenting(cohort):
    d = SlicePairs(cohort, 'train', ('T1',), 'T2', size=(28, 24), augment=True)
    plain, flipped = d.blocks[0][0], d.blocks[0][0][..., ::-1]
    seen = {(np.array_equal(x['source'][0], plain[0]), np.array_equal(x['source'][0], flipped[0])) for x in (d[0, k] for k in range(20))}
    assert seen == {(True, False), (False, True)}

def test_a_full_disk_while_slices_are_spooled(cohort, tmp_path, monkeypatch):
    def full(*a, **k): raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr('tempfile.TemporaryFile', full)
    with pytest.raises(DiskError, match='bytes free'): SlicePairs(cohort, 'train', ('T1',), 'T2', size=8, max_bytes=0)

# ---- real volumes ---------------------------------------------------------------------------------------------------------------
REAL = Path(__file__).resolve().parent.parent.parent/'shared'/'data'

@pytest.mark.skipif(not REAL.exists(), reason='the real volumes are not here')
def test_real_folders(tmp_path):
    c = propose_manifest(REAL/'ms', '{patient}/{modality}_N4*.nii.gz', splits=dict(patient07='train', patient19='test'))
    assert c.modalities == ('FLAIR', 'T1', 'T1POST', 'T2') and c.info['unmatched'] == [] and 'lesion' in c.subjects[0].paths
    assert propose_manifest(REAL/'ms').modalities == c.modalities
    assert [s.patient for s in propose_manifest(REAL, '{patient}/{modality}.nii.gz').subjects] == ['cstar']
    path = REAL/'cstar'/'T2.nii.gz'
    v, theirs = read_volume(path), nib.load(path)
    assert np.array_equal(v.data, theirs.get_fdata(dtype=np.float32)) and np.array_equal(v.affine, theirs.affine)
    assert read_grid(path).shape == v.shape
    back = restore(v, from_images(to_images(to_canonical(v)[0].data)))
    again = nib.load(write_volume(tmp_path/'t2.nii.gz', back))
    assert np.array_equal(again.get_fdata(dtype=np.float32), v.data) and np.array_equal(again.affine, v.affine)
