"Slices: geometry, bytes that do not depend on the worker, true pairs kept and kept out, slices on disk, real volumes"
import errno
import json
import os
import shutil
from collections import Counter
from dataclasses import replace
from itertools import product
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from samples import AFFINES, OBLIQUE, build, head, shifted, turned
from torch.utils.data import DataLoader

from i2i_mamba_nb.core import CohortError, ConfigError, DiskError, ShapeError, numpy_rng
from i2i_mamba_nb.data import slices
from i2i_mamba_nb.data.archives import propose_manifest
from i2i_mamba_nb.data.cohort import Cohort, Subject
from i2i_mamba_nb.data.slices import (ManyToMany, SlicePairs, UnpairedBatches, UnpairedSlices, draw_subset, fit_to, from_images,
    load_subject, restore, tissue_slices, to_image, to_images, unfit, unpaired_batches)
from i2i_mamba_nb.data.volume import (Volume, VolumeError, crop, read_grid, read_volume, to_canonical,
    uncrop, write_volume)
from i2i_mamba_nb.measure.intensity import Intensity, fit_intensity

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
    assert fixed.windows['T1'] == (0, 1000, True, 'window') and fixed.images['T1'].max() < 0
    with pytest.raises(ConfigError, match='low below high'): load_subject(cohort.patient('p1'), ['T1'], windows=dict(T1=(5, 5)))

def test_ct_has_its_fixed_window(tmp_path):
    write_volume(tmp_path/'ct.nii', Volume(np.where(head() > 0, 40, -1000), np.eye(4)))
    assert load_subject(Subject('p', 'test', dict(CT=tmp_path/'ct.nii')), ['CT']).windows['CT'] == (-1024, 3071, True, 'hounsfield')

def test_a_saved_intensity_takes_the_place_of_the_window(cohort):
    s, names = cohort.patient('p1'), ['T1', 'T2', 'PD']
    plain = load_subject(s, names)
    saved = dict(T1=Intensity(50., 900., False, 'zscore'), T2=Intensity(10., 500.))
    loaded = load_subject(replace(s, intensity=saved), names)
    assert loaded.windows == {**saved, 'PD': plain.windows['PD']} and np.array_equal(loaded.mask, plain.mask)
    for m in names:
        data = to_canonical(read_volume(s.paths[m]))[0].data
        assert np.array_equal(loaded.images[m], loaded.windows[m].apply(data)) and loaded.images[m].dtype == np.float32
    assert load_subject(replace(s, intensity=saved), ['T1'], windows=dict(T1=(1, 2))).windows['T1'][:2] == (1, 2)
    again = load_subject(replace(s, intensity=plain.windows), names)
    assert all(again.images[m].tobytes() == plain.images[m].tobytes() for m in names)

@pytest.mark.parametrize('offset,scale', [(0, 1), (0, 1e-4), (1e6, .5), (-5000, 1), (3e5, 1e4)])
def test_intensities_come_back_from_the_file(tmp_path, offset, scale):
    data = (offset+scale*head()).astype(np.float32)
    s = Subject('p', 'test', dict(T1=write_volume(tmp_path/'v.nii.gz', Volume(data, OBLIQUE))))
    for kind in ('window', 'zscore', None):
        loaded = load_subject(s if kind is None else replace(s, intensity=dict(T1=fit_intensity(data, kind))), ['T1'])
        i, back = loaded.windows['T1'], restore(loaded, loaded.windows['T1'].invert(loaded.images['T1']))
        kept = (data >= i.low) & (data <= i.high) if i.clip else np.ones(data.shape, bool)
        assert kept.mean() > .2 and abs(back.data.astype(float)-data)[kept].max() <= 1e-6*(data.max()-data.min())

# ---- there and back on any grid -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('order,flips', AFFINES)
def test_48_orientations_through_load_and_restore(tmp_path, order, flips):
    data = head((9, 12, 7), key=3)
    volume = Volume(data, turned(order, flips))
    write_volume(tmp_path/'v.nii.gz', volume)
    loaded, whole = load_subject(Subject('p', 'test', dict(T1=tmp_path/'v.nii.gz')), ['T1']), to_canonical(volume)[0].data
    stack = to_images(whole)
    assert stack.shape[0] == loaded.mask.shape[2] and all(np.array_equal(stack[z], to_image(whole, z)) for z in range(len(stack)))
    back = restore(loaded, from_images(stack, loaded.mask.shape))
    write_volume(tmp_path/'w.nii.gz', back)
    again = read_volume(tmp_path/'w.nii.gz')
    assert again.data.tobytes('F') == data.tobytes('F') and abs(again.affine-volume.affine).max() <= 1e-6
    i = loaded.windows['T1']
    assert loaded.images['T1'].tobytes() == i.apply(whole).tobytes()

@pytest.mark.parametrize('order,flips', AFFINES)
def test_48_orientations_of_cropped_volumes(tmp_path, order, flips):
    volume = Volume(head((9, 12, 7), key=4), turned(order, flips))
    rng = numpy_rng(0, 'crops', *order, *flips)
    start, size = rng.integers(-3, 2, 3), rng.integers(8, 14, 3)
    part = crop(volume, start, size)
    write_volume(tmp_path/'v.nii.gz', part)
    loaded = load_subject(Subject('p', 'test', dict(T1=tmp_path/'v.nii.gz')), ['T1'])
    stack = to_images(to_canonical(part)[0].data)
    fitted = [fit_to(image, (11, 6), 0.) for image in stack]
    seen = np.stack([unfit(np.ones_like(f), box) for f, box in fitted])
    back = restore(loaded, from_images(np.stack([unfit(f, box) for f, box in fitted]), loaded.mask.shape))
    inside = restore(loaded, from_images(seen)).data > 0
    assert np.array_equal(back.data[inside], part.data[inside]) and np.allclose(back.affine, part.affine, atol=1e-6)
    whole, where = uncrop(back.data, start, volume.shape), uncrop(inside.astype(np.float32), start, volume.shape) > 0
    assert where.any() and np.array_equal(whole[where], volume.data[where])

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

# ---- turning and zooming ---------------------------------------------------------------------------------------------------------
def test_turned_pictures_stay_aligned_and_agree_with_scipy(cohort):
    from scipy.ndimage import map_coordinates
    d = SlicePairs(cohort, 'train', ('T1', 'T2'), 'T1', size=(21, 18), augment=True, rotate=40, zoom=.3, seed=1)
    for i, draw in product(range(0, len(d), 3), range(4)):
        x = d[i, draw]
        assert torch.equal(x['source'][:1], x['target']) and x['target'].abs().max() <= 1+1e-6 and x['target'].max() > -1
    planes = [d.blocks[0][4, c] for c in range(2)]
    (n, m), corner, angle, factor = (21, 18), (3, -2), .4, 1.2
    r, c = np.meshgrid(np.arange(n)-(n-1)/2, (np.arange(m)-(m-1)/2)*-1, indexing='ij')
    at = (np.cos(angle)*r-np.sin(angle)*c)/factor+corner[0]+(n-1)/2, (np.sin(angle)*r+np.cos(angle)*c)/factor+corner[1]+(m-1)/2
    ours = slices._turned(planes, (n, m), corner, True, angle, factor)
    for a, p in zip(ours, planes, strict=True):
        padded = map_coordinates(np.pad(p, 8, constant_values=-1), [k+8 for k in at], order=1, mode='constant', cval=-1)
        assert abs(a.numpy()-padded).max() < 1e-4

def test_turns_are_as_large_as_asked_and_leave_the_crop_alone(cohort):
    free, angles = dict(size=(17, 12), augment=True, seed=2), []
    plain, turned_ = SlicePairs(cohort, 'train', ('T1',), 'T2', **free), SlicePairs(cohort, 'train', ('T1',), 'T2', **free, rotate=30)
    original = slices._turned
    def spy(planes, size, corner, flip, angle, factor):
        angles.append((angle, factor))
        return slices._copied(planes, size, corner, flip)
    slices._turned = spy
    try: assert all(same(plain[k], turned_[k]) for k in product(range(len(plain)), range(9)))
    finally: slices._turned = original
    found = np.degrees([a for a, _ in angles])
    assert -30 <= found.min() < -25 and 25 < found.max() <= 30 and {f for _, f in angles} == {1.}

@pytest.mark.parametrize('bad', [dict(rotate=5), dict(zoom=.1), dict(augment=True, rotate=-1), dict(augment=True, rotate=181),
    dict(augment=True, zoom=-.1), dict(augment=True, zoom=float('nan')), dict(size=0), dict(size=(3,)), dict(size=(4, 2.5)),
    dict(size=(1, 2, 3))])
def test_bad_options(cohort, bad):
    with pytest.raises(ConfigError): SlicePairs(cohort, 'train', ('T1',), 'T2', **{'size': 8, **bad})

# ---- neighbours -----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('adjacent', [1, 3, 5, 31])
@pytest.mark.parametrize('min_tissue', [0., .2, .9])
def test_neighbours_are_those_of_the_volume(cohort, adjacent, min_tissue):
    d = SlicePairs(cohort, 'train', ('T2', 'PD'), 'T1', size=(28, 24), adjacent=adjacent, min_tissue=min_tissue)
    one = SlicePairs(cohort, 'train', ('T2', 'PD'), 'T1', size=(28, 24), min_tissue=min_tissue)
    images, n = load_subject(cohort.patient('p1'), ['T2', 'PD', 'T1']).images, 13
    assert len(d) == len(one)
    for x, y in zip(d, one, strict=True):
        assert x['source'].shape == (2*adjacent, 28, 24) and x['z'] == y['z'] and torch.equal(x['target'], y['target'])
        for k, (m, step) in enumerate(product(('T2', 'PD'), range(-(adjacent//2), adjacent//2+1))):
            assert np.array_equal(x['source'][k], to_image(images[m], min(max(x['z']+step, 0), n-1)))

def test_neighbours_take_the_same_crop_as_the_slice(cohort):
    free = dict(size=(17, 12), augment=True, seed=5)
    three, one = (SlicePairs(cohort, 'train', ('T1', 'T2'), 'PD', adjacent=k, **free) for k in (3, 1))
    for key in product(range(len(one)), range(3)):
        assert torch.equal(three[key]['source'][1::3], one[key]['source']) and torch.equal(three[key]['target'], one[key]['target'])

# ---- unpaired -------------------------------------------------------------------------------------------------------------------
def people(counts): return [f'p{k}' for k, n in enumerate(counts) for _ in range(n)]

def check_epoch(sources, targets, batches, size):
    "No patient on both sides of a batch; batches whole but for a few. Returns how often each slice came"
    for b in batches:
        assert 0 < len(b) <= size and not {sources[i] for i, _ in b} & {targets[j] for _, j in b}
    return (np.bincount([k[side] for b in batches for k in b], minlength=n) for side, n in enumerate((len(sources), len(targets))))

@pytest.mark.parametrize('n', [2, 3, 4, 5, 8, 13, 40])
@pytest.mark.parametrize('size', [1, 2, 3, 4, 7, 16, 64])
def test_never_a_pair_and_every_slice_once(n, size):
    for trial in range(6):
        counts = numpy_rng(trial, 'counts', n, size).integers(20, 30, n) if n > 2 else [23, 23]
        who = people(counts)
        for epoch in range(4):
            batches = unpaired_batches(who, who, size, seed=trial, epoch=epoch)
            for times in check_epoch(who, who, batches, size): assert (times == 1).all()
            assert len(batches) <= -(-len(who)//size)+(5 if n > 3 else n)

def test_counts_that_differ_wildly():
    checked = 0
    for trial in range(150):
        rng = numpy_rng(trial, 'wild')
        n = int(rng.integers(2, 10))
        s, t = rng.integers(0, 12, n), rng.integers(0, 40, n)*(rng.random(n) < .8)
        if trial % 3 == 0: t = s
        sources, targets, size = people(s), people(t), int(rng.integers(1, 9))
        alone = [k for k in range(n) if s[k] and t.sum() == t[k] or t[k] and s.sum() == s[k]]
        if alone or not len(sources)*len(targets):
            with pytest.raises(CohortError): unpaired_batches(sources, targets, size)
            continue
        total, checked = max(s.sum(), t.sum(), (s+t).max()), checked+1
        sums = [0, 0]
        for epoch in range(12):
            times = check_epoch(sources, targets, unpaired_batches(sources, targets, size, seed=trial, epoch=epoch), size)
            sums = [a+b for a, b in zip(sums, times, strict=True)]
            assert sums[0].sum() == sums[1].sum() == total*(epoch+1) and min(map(min, sums)) >= epoch+1
        for side, many in zip((s, t), sums, strict=True):       # the slices of one patient come equally often
            ends = np.cumsum([0, *side])
            assert all(np.ptp(many[a:b]) <= 1 for a, b in zip(ends, ends[1:], strict=False) if a < b)
    assert checked > 60

@pytest.mark.parametrize('s,t', [((10, 4), (10, 4)), ((30, 3, 4, 5), (30, 3, 4, 5)), ((9, 9), (9, 9)), ((0, 8), (5, 0)),
    ((6, 6, 0), (0, 6, 20))])
def test_repeats_are_level_over_epochs(s, t):
    sources, targets = people(s), people(t)
    total, biggest = max(sum(s), sum(t), max(a+b for a, b in zip(s, t, strict=True))), np.argmax(np.add(s, t))
    sums = [0, 0]
    for epoch in range(40):
        times = check_epoch(sources, targets, unpaired_batches(sources, targets, 4, epoch=epoch), 4)
        sums = [a+b for a, b in zip(sums, times, strict=True)]
        for who, many in zip((sources, targets), sums, strict=True):
            others = many[[w != f'p{biggest}' for w in who]] if total > max(sum(s), sum(t)) else many
            assert np.ptp(others) <= 1

def test_longest_alternate_time_first_never_idles():
    for trial in range(1500):
        rng = numpy_rng(trial, 'open shop')
        n = int(rng.integers(2, 7))
        s, t = rng.integers(0, 9, n), rng.integers(0, 9, n)
        k = int(rng.integers(n))
        s[k] += max(0, t.sum()-s.sum())
        t[(k+1) % n] += max(0, s.sum()-t.sum())
        if (s+t).max() > s.sum(): continue
        need = np.stack([s, t])
        rows = slices._scheduled(need, need[::-1])
        assert rows is not None and (rows[0] != rows[1]).all()
        assert all((np.bincount(r, minlength=n) == c).all() for r, c in zip(rows, need, strict=True))

def test_partners_change_and_the_seed_decides():
    who = people([5]*6)
    def met(seed, epoch): return {(who[i], who[j]) for b in unpaired_batches(who, who, 4, seed=seed, epoch=epoch) for i, j in b}
    assert len(set.union(*(met(0, e) for e in range(40)))) == 30
    assert unpaired_batches(who, who, 4, seed=1) == unpaired_batches(who, who, 4, seed=1) != unpaired_batches(who, who, 4, seed=2)
    assert unpaired_batches(who, who, 4, epoch=1) != unpaired_batches(who, who, 4, epoch=2)
    names = ['x y', '7', 'Zoe', 'äö', '', 'p0'][:6]
    assert unpaired_batches([names[int(w[1])] for w in who], [names[int(w[1])] for w in who], 4)

@pytest.mark.parametrize('s,t', [((5,), (5,)), ((5, 0), (3, 0)), ((), ()), ((5, 3), (4, 0)), ((0, 0), (1, 2))])
def test_too_few_patients(s, t):
    with pytest.raises(CohortError, match='another patient on the other side'): unpaired_batches(people(s), people(t), 2)

@pytest.fixture(scope='module')
def crowd(tmp_path_factory):
    "Six patients of unequal depth, one with two sessions, T1 and T2 on one grid, CT on another"
    folder, subjects = tmp_path_factory.mktemp('crowd'), []
    for k, (patient, session) in enumerate([('a', '1'), ('a', '2'), *((p, '') for p in 'bcdef')]):
        shape, paths = (14, 16, 7+k), {m: folder/f'{patient}{session}_{m}.nii' for m in ('T1', 'T2', 'CT')}
        for j, m in enumerate(('T1', 'T2')): write_volume(paths[m], Volume(head(shape, key=(k, j)), OBLIQUE))
        write_volume(paths['CT'], Volume(np.where(head((12, 15, 9+k)) > 0, 40+head((12, 15, 9+k), key=k)/9, -1000), np.eye(4)))
        subjects.append(Subject(patient, 'train', paths, session))
    return Cohort(tuple(subjects), ('T1', 'T2', 'CT'), folder)

@pytest.mark.parametrize('workers,context', [(0, None), (1, 'fork'), (2, 'fork'), (2, 'spawn')])
def test_unpaired_loader(crowd, workers, context):
    d = UnpairedSlices(crowd, 'train', ('T1', 'T2'), 'CT', size=(17, 12), augment=True, seed=3)
    order, seen = UnpairedBatches(d, 4), Counter()
    loader = DataLoader(d, batch_sampler=order, num_workers=workers, multiprocessing_context=context)
    for epoch in range(1 if context == 'spawn' else 4):
        order.set_epoch(epoch)
        expected = [[d[k] for k in keys] for keys in order]
        for batch, items in zip(loader, expected, strict=True):
            assert not set(batch['patient']) & set(batch['target_patient'])
            for k in ('source', 'target'): assert torch.equal(batch[k], torch.stack([i[k] for i in items]))
            seen.update(zip(batch['patient'], batch['z'].tolist(), strict=True))
        assert len(loader) == len(expected)

def test_sources_of_an_item_are_one_subject(crowd):
    d = UnpairedSlices(crowd, 'train', ('T1', 'T2'), 'CT', size=(16, 14))
    found = {(s.patient, s.session): load_subject(s, ['T1', 'T2']).images for s in crowd.subjects}
    targets = {(s.patient, s.session): load_subject(s, ['CT']).images['CT'] for s in crowd.subjects}
    for k in range(len(d)):
        x = d[k]
        wanted = [tuple(fit_to(to_image(i[m], x['z']), (16, 14))[0].tobytes() for m in ('T1', 'T2')) for (p, _), i in found.items()
            if p == x['patient'] and i['T1'].shape[2] > x['z']]
        assert tuple(c.numpy().tobytes() for c in x['source']) in wanted
        assert x['patient'] != x['target_patient'] and any(np.array_equal(fit_to(to_image(t, x['target_z']), (16, 14))[0], x['target'][0])
            for (p, _), t in targets.items() if p == x['target_patient'] and t.shape[2] > x['target_z'])

def test_no_loader_slips_a_pair_in(crowd):
    d = UnpairedSlices(crowd, 'train', ('T1',), 'T2', size=8)
    with pytest.raises(CohortError, match='batch_sampler=UnpairedBatches'): list(DataLoader(d, batch_size=len(d)))
    i, j = 0, next(k for k, p in enumerate(d.sides[1]) if p.patient == d.sides[0][0].patient)
    with pytest.raises(CohortError, match='a as source and as target'): d[i, j, 0]
    for batch in DataLoader(d, batch_size=1): assert batch['patient'] != batch['target_patient']
    with pytest.raises(IndexError): d[len(d)]
    assert len([*d]) == len(d)

def test_a_picture_does_not_depend_on_its_partner(crowd):
    d = UnpairedSlices(crowd, 'train', ('T1',), 'T2', size=(9, 8), augment=True)
    i, j = ([k for k, p in enumerate(side) if p.patient == name] for side, name in zip(d.sides, 'ef', strict=True))
    assert len({d[k, j[0], 3]['target'].numpy().tobytes() for k in i}) == len({d[i[0], k, 3]['source'].numpy().tobytes() for k in j}) == 1
    assert len({d[i[0], j[0], e]['target'].numpy().tobytes() for e in range(9)}) > 3
    assert len({d[k, j[0], 3]['source'].numpy().tobytes() for k in i}) > 3

def test_sessions_of_one_patient_are_one_person(crowd):
    only = Cohort(crowd.subjects[:2], crowd.modalities, crowd.root)
    with pytest.raises(CohortError, match='no partner for a'): UnpairedSlices(only, 'train', ('T1',), 'T2', size=8)

def test_patients_with_one_side_only(crowd):
    def having(k, *names): return replace(crowd.subjects[k], paths={m: crowd.subjects[k].paths[m] for m in names})
    some = having(2, 'T1', 'T2'), having(3, 'CT'), having(4, 'T1', 'T2', 'CT'), having(5, 'T1', 'CT')
    apart = Cohort(some, crowd.modalities, crowd.root)
    d = UnpairedSlices(apart, 'train', ('T1', 'T2'), 'CT', size=8, limit=20)
    assert {x['patient'] for x in d} == {'b', 'd'} and {x['target_patient'] for x in d} == {'c', 'd', 'e'}
    assert len({(x['patient'], x['z']) for x in d}) == min(20, len(d.sides[0]))
    with pytest.raises(CohortError, match='modality T2 of patient b'):
        UnpairedSlices(Cohort((having(2, 'T1'), having(3, 'CT')), crowd.modalities, crowd.root), 'train', ('T1', 'T2'), 'CT', size=8)

def test_unpaired_neighbours(crowd):
    d, one = (UnpairedSlices(crowd, 'train', ('T1', 'T2'), 'CT', size=(16, 14), adjacent=k) for k in (3, 1))
    assert all(torch.equal(d[k]['source'][1::3], one[k]['source']) and torch.equal(d[k]['target'], one[k]['target']) for k in range(len(d)))

# ---- any from any ---------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def patchy(crowd):
    "Patients that lack a modality"
    lacking = ((), ('PD',), ('T1',), (), ('T2',))
    def of(s, gone):
        paths = dict(T1=s.paths['T1'], T2=s.paths['T2'], PD=s.paths['T1'])
        return replace(s, paths={m: p for m, p in paths.items() if m not in gone})
    return Cohort(tuple(of(s, g) for s, g in zip(crowd.subjects, lacking, strict=False)), ('T1', 'T2', 'PD'), crowd.root)

@pytest.mark.parametrize('one_target', [False, True])
def test_subsets_of_what_is_there(patchy, one_target):
    d, names = ManyToMany(patchy, 'train', ('T1', 'T2', 'PD'), size=(16, 14), one_target=one_target), ('T1', 'T2', 'PD')
    has = [[m in s.paths for m in names] for s in patchy.subjects]
    assert all(len({tuple(d[i, draw]['sources'].tolist()) for draw in range(30)}) > 1 for i in (0, 9, len(d)-1))
    for i, draw in product(range(len(d)), range(8)):
        x = d[i, draw]
        s, t, present = (x[k].tolist() for k in ('sources', 'targets', 'present'))
        assert present == has[d.places[i].block] and any(s) and any(t) and not any(a and b for a, b in zip(s, t, strict=True))
        assert all(p or not (a or b) for a, b, p in zip(s, t, present, strict=True))
        assert sum(t) == 1 if one_target else [a or b for a, b in zip(s, t, strict=True)] == present
        there = [m for m, p in zip(names, present, strict=True) if p]
        images = load_subject(patchy.subjects[d.places[i].block], there).images if draw == i % 8 == 0 else {}
        for m, image in images.items(): assert np.array_equal(x['images'][names.index(m)], fit_to(to_image(image, x['z']), (16, 14))[0])
        assert all((c == -1).all() for c, p in zip(x['images'], present, strict=True) if not p)

@pytest.mark.parametrize('present', [(1, 1), (1, 0, 1, 1), (1, 1, 1, 1)])
@pytest.mark.parametrize('one_target', [False, True])
def test_subset_frequencies(present, one_target):
    from scipy.stats import chisquare
    present, seen = np.array(present, bool), Counter()
    for k in range(4000):
        s, t = draw_subset(present, numpy_rng(0, 'frequencies', k), one_target)
        seen[tuple(s), tuple(t) if one_target else ()] += 1
    sources = Counter()
    for (s, _), c in seen.items(): sources[s] += c
    assert len(sources) == 2**present.sum()-2 and chisquare(list(sources.values())).pvalue > 1e-3
    for s in sources:
        counts = [c for (a, _), c in seen.items() if a == s]
        assert not one_target or len(counts) == present.sum()-sum(s) and (len(counts) == 1 or chisquare(counts).pvalue > 1e-4)

def test_numbers_of_any_kind_are_the_same_item(four):
    for kind in ('pairs', 'unpaired', 'many'):
        d = made(kind, four)
        assert all(same(d[3], d[k]) for k in (np.int64(3), torch.tensor(3), (3, 0), (np.int32(3), torch.tensor(0))))
        assert not same(d[3], d[3, 1])

def test_batch_sizes_that_are_none():
    for bad in (0, -1, 2.5, None, '4'):
        with pytest.raises(ConfigError, match='batch_size'): unpaired_batches(['a', 'b'], ['a', 'b'], bad)

def test_a_patient_with_one_modality_is_named(patchy):
    with pytest.raises(CohortError, match='patient a.*two or more of T1, FLAIR'): ManyToMany(patchy, 'train', ('T1', 'FLAIR'), size=8)

# ---- the same bytes from any worker ---------------------------------------------------------------------------------------------
def made(kind, cohort, folder=None, **options):
    common = dict(size=(17, 12), augment=True, seed=3, folder=folder, **options)
    if kind == 'pairs': return SlicePairs(cohort, 'train', ('T1', 'T2'), 'CT', **common, adjacent=3)
    if kind == 'turned': return SlicePairs(cohort, 'train', ('T1',), 'T2', **common, rotate=9, zoom=.1)
    if kind == 'unpaired': return UnpairedSlices(cohort, 'train', ('T1', 'T2'), 'CT', **common)
    return ManyToMany(cohort, 'train', ('T1', 'T2', 'PD'), **common)

@pytest.fixture(scope='module')
def four(tmp_path_factory):
    folder = build(tmp_path_factory.mktemp('four'), patients='abcd', modalities=('T1', 'T2', 'PD'))
    c = propose_manifest(folder, splits=dict.fromkeys('abcd', 'train'))
    return Cohort(tuple(replace(s, paths=s.paths | dict(CT=s.paths['PD'])) for s in c.subjects), c.modalities, c.root)

@pytest.mark.parametrize('kind,workers,context', [*product(['pairs', 'turned', 'unpaired', 'many'], [0], [None]),
    *product(['pairs', 'turned', 'unpaired', 'many'], [1, 2], ['fork']), ('pairs', 2, 'spawn'), ('many', 2, 'spawn')])
def test_any_number_of_workers(four, tmp_path_factory, kind, workers, context):
    folder = tmp_path_factory.getbasetemp()/'shared slices' if context else None
    d = made(kind, four, folder)
    keys = [(i, draw) for draw in range(2) for i in range(0, len(d), 3)]
    expected = [d[k] for k in keys]
    torch.manual_seed(workers)      # neither the global generators nor the order of work may matter
    np.random.seed(workers)
    loader = DataLoader(d, batch_size=None, sampler=keys, num_workers=workers, multiprocessing_context=context)
    assert all(same(a, b) for a, b in zip(expected, loader, strict=True))
    reference = made(kind, four, max_bytes=0)
    assert all(same(a, reference[k]) for a, k in zip(expected[::-1], keys[::-1], strict=True))

# ---- slices on disk -------------------------------------------------------------------------------------------------------------
def loads(monkeypatch):
    "List that grows by a patient whenever one is read"
    seen = []
    def spy(subject, *a, **k):
        seen.append(subject.patient)
        return load_subject(subject, *a, **k)
    monkeypatch.setattr(slices, 'load_subject', spy)
    return seen

@pytest.mark.parametrize('kind', ['pairs', 'unpaired', 'many'])
def test_a_folder_is_read_once(four, tmp_path, monkeypatch, kind):
    seen, plain = loads(monkeypatch), made(kind, four)
    first = made(kind, four, tmp_path/'s')
    count = len(seen)
    again = made(kind, four, str(tmp_path/'s'))
    assert len(seen) == count and all(isinstance(b, np.memmap) and not b.flags.writeable for b in again.blocks)
    assert all(same(a[k], b[k]) for a, b in ((plain, first), (plain, again)) for k in range(0, len(plain), 2))
    assert not [p for p in (tmp_path/'s').iterdir() if p.name.startswith('.')]

def damages(path, twin):
    "Ways to spoil a pair of files in a folder"
    data, facts = path.read_bytes(), json.loads(twin.read_text())
    yield 'cut', lambda: path.write_bytes(data[:-1])
    yield 'empty', lambda: path.write_bytes(b'')
    yield 'flip at the end', lambda: path.write_bytes(data[:-1]+bytes([data[-1] ^ 1]))
    yield 'flip in the header', lambda: path.write_bytes(data[:20]+bytes([data[20] ^ 4])+data[21:])
    yield 'longer', lambda: path.write_bytes(data+b'0')
    yield 'foreign', lambda: np.save(path, np.zeros((3, 4)))
    yield 'gone', path.unlink
    yield 'no facts', twin.unlink
    yield 'facts cut', lambda: twin.write_text(json.dumps(facts)[:40])
    yield 'facts empty', lambda: twin.write_text('')
    yield 'facts of another kind', lambda: twin.write_text('[1, 2]')
    yield 'null', lambda: twin.write_text('null')
    moved = [[*p[:1], p[1]+1, *p[2:]] for p in facts['places']], [[*p[:3], [0, 1, 0, 1]] for p in facts['places']]
    yield 'another slice number', lambda: twin.write_text(json.dumps({**facts, 'places': moved[0]}))
    yield 'another box', lambda: twin.write_text(json.dumps({**facts, 'places': moved[1]}))
    yield 'places of another form', lambda: twin.write_text(json.dumps({**facts, 'places': [1, 2]}))
    yield 'no check', lambda: twin.write_text(json.dumps(dict(places=facts['places'])))
    yield 'binary', lambda: twin.write_bytes(b'\xff\xfe\x00')

def test_damaged_files_are_made_again(four, tmp_path, monkeypatch):
    plain, seen = made('pairs', four), loads(monkeypatch)
    made('pairs', four, tmp_path)
    path = sorted(tmp_path.glob('*.npy'))[1]
    good, names = {p: p.read_bytes() for p in tmp_path.iterdir()}, []
    for name, damage in damages(path, path.with_suffix('.json')):
        del seen[:]
        damage()
        d = made('pairs', four, tmp_path)
        assert len(seen) == 1, name
        assert all(same(plain[k], d[k]) for k in range(0, len(d), 3)), name
        assert {p: p.read_bytes() for p in tmp_path.iterdir()} == good, name
        names.append(name)
    assert len(names) == 17

def test_other_settings_and_other_files_are_other_slices(four, tmp_path, monkeypatch):
    seen, work = loads(monkeypatch), tmp_path/'copy'
    shutil.copytree(four.root, work)
    def there(s): return replace(s, paths={m: work/p.relative_to(four.root) for m, p in s.paths.items()})
    c = Cohort(tuple(map(there, four.subjects)), four.modalities, work)
    def count(cohort=c, sources=('T1',), target='T2', **options):
        before = len(seen)
        d = SlicePairs(cohort, 'train', sources, target, size=8, folder=tmp_path/'s', **options)
        assert all(same(a, b) for a, b in zip(d, SlicePairs(cohort, 'train', sources, target, size=8, **options), strict=True))
        return len(seen)-before-4
    assert count() == 4 and count() == 0 and count(seed=3, limit=5, augment=True) == 0
    assert count(min_tissue=.5) == 4 and count(adjacent=3) == 4 and count(target='PD') == 4 and count(sources=('T2',), target='T1') == 4
    mapped = replace(c.subjects[0], intensity=dict(T1=Intensity(0., 300.)))
    assert count(replace(c, subjects=(mapped, *c.subjects[1:]))) == 1
    path = c.subjects[2].paths['T2']
    os.utime(path)
    assert count() == 0
    write_volume(path, Volume(head(key=99), OBLIQUE))
    assert count() == 1 and count() == 0

def test_both_halves_of_a_pair_count(tmp_path, monkeypatch):
    seen = loads(monkeypatch)
    for m in ('T1', 'T2'): write_volume(tmp_path/'v'/f'{m}.nii', Volume(head(), np.eye(4)))
    nib.save(nib.Nifti1Pair(head(), np.eye(4)), tmp_path/'v'/'T1.img')
    s = Subject('p', 'train', dict(T1=tmp_path/'v'/'T1.hdr', T2=tmp_path/'v'/'T2.nii'))
    def build_it(): return SlicePairs(Cohort((s,), ('T1', 'T2'), tmp_path), 'train', ('T1',), 'T2', size=30, folder=tmp_path/'s')
    first, again = build_it()[3], build_it()[3]
    assert len(seen) == 1 and same(first, again)
    nib.save(nib.Nifti1Pair(head(key=5), np.eye(4)), tmp_path/'v'/'T1.img')
    assert not same(build_it()[3], first) and len(seen) == 2

def test_a_missing_volume_is_told_by_the_reader(four, tmp_path):
    s = replace(four.subjects[0], paths=dict(T1=four.subjects[0].paths['T1'], T2=tmp_path/'gone.nii.gz'))
    c = Cohort((s,), ('T1', 'T2'), tmp_path)
    with pytest.raises(VolumeError, match='gone.nii.gz'): SlicePairs(c, 'train', ('T1',), 'T2', size=8, folder=tmp_path/'s')

def test_a_folder_that_cannot_be_written(four, tmp_path):
    (tmp_path/'s').write_text('a file')
    with pytest.raises(DiskError, match='bytes free'): made('pairs', four, tmp_path/'s')

def test_a_kill_while_writing_leaves_nothing_half(four, tmp_path, monkeypatch):
    plain, real = made('pairs', four), np.save
    def dies(f, block):
        real(f, block[:1])
        raise KeyboardInterrupt
    monkeypatch.setattr(np, 'save', dies)
    with pytest.raises(KeyboardInterrupt): made('pairs', four, tmp_path/'s')
    assert not list((tmp_path/'s').iterdir())
    monkeypatch.setattr(np, 'save', real)
    d = made('pairs', four, tmp_path/'s')
    assert all(same(plain[k], d[k]) for k in range(len(d)))

def test_several_processes_fill_one_folder(four, tmp_path):
    from multiprocessing import get_context
    plain, fork = made('pairs', four), get_context('fork')
    started = [fork.Process(target=made, args=('pairs', four, tmp_path)) for _ in range(3)]
    for p in started: p.start()
    mine = made('pairs', four, tmp_path)
    for p in started: p.join(60)
    assert [p.exitcode for p in started] == [0, 0, 0] and len(list(tmp_path.iterdir())) == 8
    assert all(same(plain[k], d[k]) for d in (mine, made('pairs', four, tmp_path)) for k in range(len(d)))

def test_slices_in_a_folder_travel_as_names(four, tmp_path):
    d = made('many', four, tmp_path, progress=lambda it: it)
    message, whole = len(ForkingPickler.dumps(d)), sum(b.nbytes for b in d.blocks)
    plain = len(ForkingPickler.dumps(made('many', four)))
    assert message < 20_000 < whole < plain

class Weighed(SlicePairs):
    "Reads all slices, then tells in kB what memory its process shares with none, and what is backed by no file"
    def __getitem__(self, key):
        total = float(sum(np.asarray(b).sum() for b in self.blocks))
        facts = dict(w.split(':') for w in Path('/proc/self/smaps_rollup').read_text().splitlines()[1:])
        return dict(sum=total, **{k: int(facts[k].split()[0]) for k in ('Private_Dirty', 'Anonymous')})

@pytest.mark.skipif(not Path('/proc/self/smaps_rollup').exists(), reason='the system does not say what memory is shared')
@pytest.mark.parametrize('folder', [False, True])
def test_two_workers_hold_no_copy(four, tmp_path, folder):
    d = Weighed(four, 'train', ('T1',), 'T2', size=8, folder=tmp_path if folder else None)
    what = 'Anonymous' if folder else 'Private_Dirty'       # pages of a file just written are dirty, and no copy
    small = [x[what] for x in DataLoader(d, batch_size=None, sampler=[0]*4, num_workers=2)]
    big = numpy_rng(0, 'big').random((32, 2, 512, 512), np.float32)
    if folder:
        np.save(tmp_path/'big.npy', big)
        big = np.load(tmp_path/'big.npy', mmap_mode='r')
    d.blocks = [big]
    found = list(DataLoader(d, batch_size=None, sampler=[0]*4, num_workers=2))
    assert max(x[what] for x in found)-min(small) < big.nbytes/1024/4 and len({x['sum'] for x in found}) == 1

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
