"Preparation: same bytes whatever happened on the way, only what depends on a setting redone, failures listed, the way back exact"
import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from samples import AFFINES, turned
from scipy.ndimage import gaussian_filter

from i2i_mamba_nb.core import CohortError, ConfigError, I2IError, ShapeError, numpy_rng
from i2i_mamba_nb.data import prepare
from i2i_mamba_nb.data.archives import propose_manifest
from i2i_mamba_nb.data.cohort import Cohort, Subject, read_manifest, write_manifest
from i2i_mamba_nb.data.prepare import (STEPS, Geometry, Steps, best_slices, choose_reference, content_key, frame_of, into_frame,
    look_at_cohort, needs_work, onto_original, out_of_frame, prepare_cohort, read_steps, run_jobs, worker_count)
from i2i_mamba_nb.data.presets import preset
from i2i_mamba_nb.data.slices import load_subject
from i2i_mamba_nb.data.volume import Volume, read_volume, same_grid, to_canonical, write_volume
from i2i_mamba_nb.measure.alignment import shift_between
from i2i_mamba_nb.measure.metrics import head_mask

def blob(shape=(40, 44, 26), key=0, centre=(0, 0, 0)):
    "A head with structure in every direction, so that registration and shifts have something to hold on to"
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n)-c for n, c in zip(shape, centre, strict=True)), indexing='ij')
    inside = (x/.8)**2+(y/.85)**2+(z/.9)**2 < 1
    waves = np.sin(7*x+key)*np.cos(6*y)+np.sin(5*z+2*x)+.7*np.cos(9*y*z)
    return inside, waves

def image(modality, key=0, shape=(40, 44, 26), centre=(0, 0, 0)):
    inside, waves = blob(shape, key, centre)
    noise = numpy_rng(key, modality).standard_normal(shape)
    value = dict(T1=100+40*waves, T2=180-50*waves+8*waves**2, PD=90+25*np.abs(waves), CT=40+200*(waves > 1))[modality]
    air = -1000 if modality == 'CT' else 0
    return np.where(inside, value+2*noise, air).astype(np.float32)

GRID = np.diag([2., 2., 3., 1.])
GRID[:3, 3] = -40, -44, -39

def study(folder, patients=('a', 'b', 'c'), modalities=('T1', 'T2'), affines=None):
    "Volumes of some patients; `affines` places a modality elsewhere"
    for k, p in enumerate(patients):
        for m in modalities: write_volume(folder/p/f'{m}.nii.gz', Volume(image(m, k), (affines or {}).get(m, GRID)))
    return propose_manifest(folder, splits={p: ('train', 'validation', 'test')[k % 3] for k, p in enumerate(patients)})

def content(folder, *names):
    "Bytes of every file of a prepared cohort but its log"
    return {p.relative_to(folder).as_posix(): p.read_bytes() for n in names or ('volumes', 'records', 'pictures', 'cache')
        for p in sorted((folder/n).rglob('*')) if p.is_file()}

@pytest.fixture(scope='module')
def registrations(): "What `register` found for each pair of images so far"; return {}

@pytest.fixture
def register_once(registrations, monkeypatch):
    "Each pair of images is registered once in this module: for tests of what comes before and after"
    real = prepare.register
    def found(fixed, moving, rigid):
        key = *(x.tobytes() for v in (fixed, moving) for x in (v.data, v.affine)), rigid
        if key not in registrations: registrations[key] = real(fixed, moving, rigid=rigid)
        return registrations[key]
    monkeypatch.setattr(prepare, 'register', found)

moved = GRID.copy()
moved[:3, 3] += 5.3, -3.6, 2.5  # the header of T2 is wrong by some millimetres, not whole voxels
OTHER = dict(T2=moved)

# ---- settings -------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('bad,words', [(dict(register='sum'), 'register'), (dict(brain='yes'), 'brain'), (dict(size=(3,)), 'two whole'),
    (dict(size=(0, 4)), 'two whole'), (dict(slices=-1), 'slices'), (dict(slices=2.5), 'slices'), (dict(slices=True), 'slices'),
    (dict(intensity={'T1': 'minmax'}), 'intensity of T1'), (dict(n4='T1'), 'n4'), (dict(intensity='zscore'), 'intensity'),
    (dict(size=7), 'size')])
def test_impossible_settings(bad, words):
    with pytest.raises(ConfigError, match=words): Steps(**bad)

def test_settings_from_files(tmp_path):
    path = tmp_path/'s.json'
    path.write_text(json.dumps(dict(n4=['T1'], size=[8, 9])))
    assert read_steps(path) == Steps(n4=('T1',), size=(8, 9)) and read_steps('brain') is STEPS['brain']
    with pytest.raises(ConfigError, match='brain'): read_steps('brian')
    path.write_text('{"slice": 3}')
    with pytest.raises(ConfigError, match="'slices'"): read_steps(path)
    for text in ('[3]', '{', ''):
        path.write_text(text)
        with pytest.raises(ConfigError): read_steps(path)

def test_reference(tmp_path):
    cohort = study(tmp_path, modalities=('T2', 'PD', 'T1'))
    assert choose_reference(cohort, Steps()) == 'T1' and choose_reference(cohort, Steps(reference='PD')) == 'PD'
    (tmp_path/'a'/'T1.nii.gz').unlink()
    cohort = propose_manifest(tmp_path)
    assert choose_reference(cohort, Steps()) == 'T2'
    with pytest.raises(ConfigError, match='reference'): choose_reference(cohort, Steps(reference='FLAIR'))

def test_keys_change_with_everything_and_nothing_else():
    base = content_key('n4', ['a', 'b'], dict(x=1, y=2))
    assert base == content_key('n4', ('a', 'b'), dict(y=2, x=1))
    others = [content_key('brain', ['a', 'b'], dict(x=1, y=2)), content_key('n4', ['b', 'a'], dict(x=1, y=2)),
        content_key('n4', ['a', 'b'], dict(x=1, y=3)), content_key('n4', ['ab'], dict(x=1, y=2))]
    assert len({base, *others}) == 5

# ---- the frame ------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('order,flips', AFFINES)
def test_the_way_back_is_exact_in_48_orientations(tmp_path, order, flips):
    data = numpy_rng(0, 'frame', *order, *flips).standard_normal((7, 11, 9)).astype(np.float32)
    stored = read_volume(write_volume(tmp_path/'v.nii.gz', Volume(data, turned(order, flips))))
    canonical, _ = to_canonical(stored)
    for start, size in (((0, 0, 0), canonical.shape), ((-3, -2, -1), tuple(n+5 for n in canonical.shape)), ((1, 2, 3), (4, 3, 2)),
        ((-2, 3, 0), (5, 99, 2))):
        g = Geometry(stored.shape, tuple(map(tuple, stored.affine.tolist())), start, size)
        frame = into_frame(canonical, g, fill=-9)
        assert frame.shape == tuple(size)
        back = out_of_frame(frame.data, json.loads(json.dumps(g.__dict__)), fill=-9)
        seen = back.data != -9
        assert np.array_equal(back.affine, stored.affine) and np.array_equal(back.data[seen], data[seen])
        low, high = np.maximum(start, 0), np.minimum(np.add(start, size), canonical.shape)
        assert seen.sum() == np.prod(high-low)
        inner = np.array([*np.maximum(-np.array(start), 0), 1])     # a voxel of the frame that lies in the image
        assert np.allclose(frame.affine@inner, canonical.affine@[*low, 1], atol=1e-6)
    with pytest.raises(ShapeError): out_of_frame(np.zeros((3, 3, 3)), g)

def test_best_slices_against_a_search():
    rng = numpy_rng(0, 'slices')
    for _ in range(200):
        mask = rng.random((4, 5, int(rng.integers(1, 20)))) < .3
        n = int(rng.integers(1, mask.shape[2]+1))
        total = [mask[:, :, k:k+n].sum() for k in range(mask.shape[2]-n+1)]
        assert best_slices(mask, n) == int(np.argmax(total))
    with pytest.raises(CohortError, match='at least 9'): best_slices(np.ones((2, 2, 8), bool), 9)

def test_frame_is_about_the_head():
    mask = np.zeros((30, 40, 20), bool)
    mask[4:11, 20:39, 5:9] = True
    start, size = frame_of(mask, Steps(size=(16, 24), slices=4))
    assert size == (16, 24, 4) and start[2] == 5 and abs(start[0]+8-7.5) <= .5 and abs(start[1]+12-29.5) <= .5
    assert frame_of(mask, Steps()) == ((0, 0, 0), (30, 40, 20))
    with pytest.raises(CohortError, match='head'): frame_of(mask & False, Steps())

# ---- what is touched and what is not --------------------------------------------------------------------------------------------
def test_work_is_needed_only_where_voxels_change(tmp_path):
    same, other = study(tmp_path/'same'), study(tmp_path/'other', affines=OTHER)
    assert not needs_work(same, Steps()) and not needs_work(same, Steps(intensity={'*': 'zscore'})) and needs_work(other, Steps())
    assert needs_work(same, Steps(slices=3)) and needs_work(same, Steps(register='all'))
    write_volume(tmp_path/'same'/'c'/'T2.nii.gz', Volume(image('T2', 2), moved))
    assert needs_work(same, Steps())        # one of three is enough

def test_files_on_the_references_grid_keep_every_bit(tmp_path, register_once):
    cohort = study(tmp_path/'raw', affines=OTHER)
    done = prepare_cohort(cohort, tmp_path/'out', Steps(), workers=1)
    for s in done.cohort.subjects:
        before, after = read_volume(cohort.patient(s.patient).paths['T1']), read_volume(s.paths['T1'])
        assert np.array_equal(before.data, after.data) and np.array_equal(before.affine, after.affine)
        assert read_volume(s.paths['T2']).shape == after.shape and set(load_subject(s, ['T1', 'T2']).images) == {'T1', 'T2'}
    assert not done.failures and done.cohort.modalities == ('T1', 'T2')

def test_registration_undoes_a_wrong_header(tmp_path, register_once):
    cohort = study(tmp_path/'raw', patients=('a',), affines=OTHER)
    done = prepare_cohort(cohort, tmp_path/'out', Steps(), workers=1)
    record = done.records['a']
    fit = record['registration']['T2']
    assert fit['after'] > fit['before']+.05 and not fit['refused'] and np.abs(np.array(fit['matrix'])[:3, 3]-[5.3, -3.6, 2.5]).max() < 1.5
    assert max(map(abs, record['shifts']['T2'])) < prepare.SHIFT and record['notes'] == []
    alone = prepare_cohort(cohort, tmp_path/'none', Steps(register='none'), workers=1)
    shift = alone.records['a']['shifts']['T2']
    assert max(map(abs, shift)) >= 1.5 and any('voxels' in n and 'off T1' in n for n in alone.records['a']['notes'])

def test_a_refused_registration_leaves_the_image_where_its_header_puts_it(tmp_path, monkeypatch):
    cohort = study(tmp_path/'raw', patients=('a',), affines=OTHER)
    monkeypatch.setattr(prepare, 'register', lambda f, m, rigid: prepare.Registration(np.eye(4), .5, .4, 'it fell'))
    done = prepare_cohort(cohort, tmp_path/'out', Steps(), workers=1)
    assert any('refused (it fell)' in n for n in done.records['a']['notes']) and 'refused' in done.cohort.subjects[0].notes
    alone = prepare_cohort(cohort, tmp_path/'none', Steps(register='none'), workers=1)
    assert done.records['a']['files']['T2']['sha256'] == alone.records['a']['files']['T2']['sha256']

def test_a_shift_of_one_voxel_is_reported(tmp_path):
    cohort = study(tmp_path)
    path = tmp_path/'b'/'T2.nii.gz'
    v = read_volume(path)
    write_volume(path, v._replace(data=np.roll(v.data, 1, 1)))
    cohort = propose_manifest(tmp_path)
    looked, failures = look_at_cohort(cohort, workers=1)
    assert not failures and {s.patient: bool(s.notes) for s in looked.subjects} == dict(a=False, b=True, c=False)
    assert 'T2: lies' in looked.patient('b').notes and abs(looked.info['shifts']['b']['T2'][1]-1) < .3
    done = prepare_cohort(cohort, tmp_path/'out', Steps(size=(48, 48)), workers=1)
    assert 'T2: lies' in done.cohort.patient('b').notes and not done.cohort.patient('a').notes

def test_labels_follow_the_image_they_were_drawn_on(tmp_path, register_once):
    for k, p in enumerate('a'):
        for m in ('T1', 'T2'): write_volume(tmp_path/p/f'{m}.nii.gz', Volume(image(m, k), OTHER.get(m, GRID)))
        marks = (image('T2', k) > 230).astype(np.float32)*3
        write_volume(tmp_path/p/'lesion.nii.gz', Volume(marks, moved))
    done = prepare_cohort(propose_manifest(tmp_path), tmp_path/'out', Steps(), workers=1)
    s = done.cohort.subjects[0]
    label, t2 = (read_volume(s.paths[n]).data for n in ('lesion', 'T2'))
    assert set(np.unique(label)) == {0, 3} and 'lesion' not in done.cohort.modalities
    assert t2[label == 3].mean() > t2[(label == 0) & (t2 > 50)].mean()+30

def test_ct_stays_in_hounsfield_units(tmp_path):
    for k, p in enumerate('abc'):
        for m in ('T2', 'CT'): write_volume(tmp_path/p/f'{m}.nii.gz', Volume(image(m, k), GRID))
    done = prepare_cohort(propose_manifest(tmp_path), tmp_path/'out', Steps(size=(64, 64), n4=('*',), brain='keep'), workers=1)
    s = done.cohort.subjects[0]
    ct = read_volume(s.paths['CT']).data
    assert ct.min() == -1024 and (ct[12:52, 10:54][image('CT') > -900] == image('CT')[image('CT') > -900]).mean() > .99
    assert s.intensity['CT'][:2] == (-1024, 3071) and s.intensity['T2'].kind == 'window'
    for intensity, kind in (({'*': 'zscore'}, 'hounsfield'), ({'*': 'zscore', 'CT': 'window'}, 'window')):
        s = look_at_cohort(propose_manifest(tmp_path), Steps(intensity=intensity), workers=1)[0].subjects[0]
        assert s.intensity['CT'].kind == kind and s.intensity['T2'].kind == 'zscore'

def test_a_label_moves_with_the_image_it_lies_on(tmp_path):
    for k, p in enumerate('a'):
        off = np.roll(image('PD', k), 4, 0)         # PD shares the grid, not the place
        for m, v in dict(T1=image('T1', k), T2=image('T2', k), PD=off, lesion=np.float32(image('T1', k) > 130)).items():
            write_volume(tmp_path/p/f'{m}.nii.gz', Volume(v, GRID))
    done = prepare_cohort(propose_manifest(tmp_path), tmp_path/'out', Steps(register='all'), workers=1)
    s = done.cohort.subjects[0]
    assert np.array_equal(read_volume(s.paths['lesion']).data, read_volume(tmp_path/'a'/'lesion.nii.gz').data)
    assert abs(np.array(done.records['a']['registration']['PD']['matrix'])[0, 3]-8) < 1.5

def test_a_cropped_label_moves_with_its_image(tmp_path, register_once):
    for k, p in enumerate('a'):
        for m in ('T1', 'T2'): write_volume(tmp_path/p/f'{m}.nii.gz', Volume(image(m, k), OTHER.get(m, GRID)))
        corner = moved@np.array([[1, 0, 0, 4], [0, 1, 0, 5], [0, 0, 1, 2], [0, 0, 0, 1.]])
        write_volume(tmp_path/p/'lesion.nii.gz', Volume(np.float32(image('T2', k) > 230)[4:36, 5:40, 2:24], corner))
    done = prepare_cohort(propose_manifest(tmp_path), tmp_path/'out', Steps(), workers=1)
    label, t2 = (read_volume(done.cohort.subjects[0].paths[n]).data for n in ('lesion', 'T2'))
    inner = np.zeros(label.shape, bool)
    inner[6:34, 7:38, 4:22] = True
    bright = (t2 > 230) & inner
    assert 2*(bright & (label > 0)).sum()/(bright.sum()+((label > 0) & inner).sum()) > .7 and not done.records['a']['notes']

def test_a_lost_label_is_noted(tmp_path, register_once):
    for k, p in enumerate('a'):
        for m in ('T1', 'T2'): write_volume(tmp_path/p/f'{m}.nii.gz', Volume(image(m, k), OTHER.get(m, GRID)))
        write_volume(tmp_path/p/'lesion.nii.gz', Volume(np.ones((9, 9, 9), np.float32), np.diag([3, 3, 5, 1.])))
    done = prepare_cohort(propose_manifest(tmp_path), tmp_path/'out', Steps(), workers=1)
    assert "lesion: placed by its header, on no image's grid" in done.cohort.subjects[0].notes

def brains(folder):
    "T1, T2 and CT of three people on one grid; the second brings a mask of her own"
    cohort = study(folder, modalities=('T1', 'T2', 'CT'))
    own = np.zeros((40, 44, 26), np.float32)
    own[10:30, 12:30, 5:20] = 1
    write_volume(folder/'b'/'mask.nii.gz', Volume(own, GRID))
    return propose_manifest(folder, splits={s.patient: s.split for s in cohort.subjects}), own

@pytest.fixture
def stand_ins(monkeypatch):
    "Stand-ins for the mask and the classes, whose results show what they were given; the list of their calls"
    calls = []
    def mask(volume):
        calls.append(('brain', float(volume.data.max())))
        return volume.data > 90
    def classes(images, inside):
        calls.append(('tissue', tuple(images)))
        return (np.stack([v.data for v in images.values()]).argmax(0)+1)*inside, None
    monkeypatch.setattr(prepare, 'brain_mask', mask), monkeypatch.setattr(prepare, 'tissue_classes', classes)
    return calls

def test_brains_are_stripped_and_classified(tmp_path, stand_ins):
    cohort, own = brains(tmp_path/'raw')
    done = prepare_cohort(cohort, tmp_path/'out', Steps(brain='strip', tissue=('T2', 'T1')), workers=1)
    assert not done.failures and [n for n, _ in stand_ins] == ['brain', 'tissue', 'tissue', 'brain', 'tissue']
    for s in done.cohort.subjects:
        raw = {m: read_volume(cohort.patient(s.patient).paths[m]).data for m in ('T1', 'T2', 'CT')}
        got = {m: read_volume(p).data for m, p in s.paths.items()}
        inside = own > 0 if s.patient == 'b' else raw['T1'] > 90
        assert np.array_equal(got['mask'], inside) and np.array_equal(got['CT'], raw['CT'])
        assert all(np.array_equal(got[m], raw[m]*inside) for m in ('T1', 'T2')) and not got['T1'][~inside].any()
        assert np.array_equal(got['tissue'], np.where(raw['T2'] > raw['T1'], 2, 1)*inside)
    assert stand_ins[1][1] == ('T1', 'T2') and done.cohort.modalities == ('CT', 'T1', 'T2')
    stand_ins.clear()
    masked = prepare_cohort(cohort, tmp_path/'out', Steps(brain='mask'), workers=1).cohort
    before, after = (read_volume(c.subjects[0].paths['T2']).data for c in (cohort, masked))
    assert not stand_ins and np.array_equal(before, after)
    assert 'tissue' not in masked.subjects[0].paths and 'mask' in masked.subjects[0].paths

def test_the_mask_is_made_after_the_bias_is_removed(tmp_path, stand_ins, monkeypatch):
    class Half:
        def __init__(self, v): self.volume = v._replace(data=v.data/2)
    monkeypatch.setattr(prepare, 'n4', Half)
    cohort = study(tmp_path/'raw', modalities=('T1', 'T2', 'CT'))
    done = prepare_cohort(cohort, tmp_path/'out', Steps(n4=('*',), brain='mask'), workers=1).cohort
    raw, got = ({m: read_volume(c.subjects[0].paths[m]).data for m in ('T1', 'T2', 'CT')} for c in (cohort, done))
    assert all(np.array_equal(got[m], raw[m]/2) for m in ('T1', 'T2')) and np.array_equal(got['CT'], raw['CT'])
    assert stand_ins[0][1] == raw['T1'].max()/2

def test_a_mask_needs_an_mri(tmp_path, stand_ins):
    cohort = study(tmp_path, modalities=('CT',))
    with pytest.raises(CohortError, match='given no MRI'): prepare_cohort(cohort, tmp_path/'out', Steps(brain='mask'), workers=1)

def test_a_corrected_image_is_that_of_its_own_place(tmp_path, register_once):
    cohort = study(tmp_path/'raw', patients=('a',), affines=OTHER)
    made = {}
    for folder, kinds in (('both', ('different', 'none')), ('alone', ('none',))):
        for kind in kinds:
            done = prepare_cohort(cohort, tmp_path/folder, Steps(register=kind, n4=('T2',)), workers=1)
            made[folder, kind] = read_volume(done.cohort.subjects[0].paths['T2']).data
    registered, placed = made['both', 'different'], made['both', 'none']
    assert np.array_equal(placed, made['alone', 'none']) and not np.array_equal(placed, registered)

def test_ct_is_registered_rigidly(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(prepare, 'register', lambda f, m, rigid: asked.append(rigid) or prepare.Registration(np.eye(4), .4, .5, ''))
    cohort = study(tmp_path/'raw', patients=('a',), modalities=('T1', 'T2', 'CT'), affines=dict(OTHER, CT=moved))
    prepare_cohort(cohort, tmp_path/'one', Steps(reference='T1'), workers=1)
    assert asked == [True, False]       # CT, T2
    prepare_cohort(cohort, tmp_path/'two', Steps(reference='CT', register='all'), workers=1)
    assert asked[2:] == [True, True]

def test_unpaired_slices_have_no_shift(tmp_path):
    cohort = study(tmp_path)
    v = read_volume(tmp_path/'a'/'T2.nii.gz')
    write_volume(tmp_path/'a'/'T2.nii.gz', v._replace(data=np.roll(v.data, 2, 1)))
    for unpaired in (False, True):
        c = replace(cohort, info=dict(cohort.info, unpaired=unpaired))
        looked, done = look_at_cohort(c, workers=1)[0], prepare_cohort(c, tmp_path/f'out{unpaired}', Steps(slices=20), workers=1).cohort
        for found in (looked, done):
            assert bool(found.patient('a').notes) != unpaired and bool(found.info['shifts'].get('a')) != unpaired

def test_a_frame_that_cuts_the_head_is_noted(tmp_path):
    cohort = study(tmp_path, patients=('a',))
    notes = {n: prepare_cohort(cohort, tmp_path/'out', Steps(size=(n, 44)), workers=1).cohort.subjects[0].notes for n in (22, 38)}
    head = head_mask(read_volume(cohort.subjects[0].paths['T1']).data)
    assert notes == {38: '', 22: f'the frame cuts off {100*(1-head[9:31].sum()/head.sum()):.1f} % of the head in its slices'}

# ---- leakage --------------------------------------------------------------------------------------------------------------------
def test_originals_are_checked_for_leakage_even_where_voxels_change(tmp_path):
    cohort = study(tmp_path, patients='abc', affines=OTHER)
    (tmp_path/'c'/'T1.nii.gz').write_bytes((tmp_path/'a'/'T1.nii.gz').read_bytes())       # after the manifest was made
    with pytest.raises(CohortError, match='same content'): prepare_cohort(cohort, tmp_path/'out', Steps(), workers=1)
    with pytest.raises(CohortError, match='same content'): look_at_cohort(cohort, workers=1)

def test_one_scan_in_two_formats_is_a_leak(tmp_path):
    cohort = study(tmp_path, patients='abc')
    v = read_volume(tmp_path/'a'/'T1.nii.gz')
    flipped = Volume(v.data[::-1], v.affine@np.diag([-1, 1, 1, 1.])+np.array([[0, 0, 0, 2*39], *[[0]*4]*3]))
    write_volume(tmp_path/'c'/'T1.nii.gz', flipped)
    for f in (lambda: look_at_cohort(cohort, workers=1), lambda: prepare_cohort(cohort, tmp_path/'out', Steps(slices=9), workers=1)):
        with pytest.raises(CohortError, match='the voxels of a'): f()

def test_blank_images_of_two_people_are_no_leak(tmp_path):
    study(tmp_path, patients='abc', modalities=('T1', 'T2', 'CT'))
    lost = np.full((40, 44, 26), -1024, np.float32)
    for p, flip in (('a', 1), ('c', -1)):       # other bytes for equal voxels: found by content, not by file
        write_volume(tmp_path/p/'CT.nii.gz', Volume(lost, GRID@np.diag([flip, 1, 1, 1.])+np.eye(4, k=3)*(78 if flip < 0 else 0)))
    cohort = propose_manifest(tmp_path, splits=dict(a='train', b='train', c='test'))
    looked, failures = look_at_cohort(cohort, workers=1)
    assert not failures and len(looked.subjects) == 3
    done = prepare_cohort(cohort, tmp_path/'out', Steps(slices=9), workers=1)
    assert not done.failures and done.records['a']['content']['CT'] == done.records['c']['content']['CT']
    write_volume(tmp_path/'c'/'T2.nii.gz', read_volume(tmp_path/'a'/'T2.nii.gz'))
    with pytest.raises(CohortError, match='same content'): look_at_cohort(cohort, workers=1)

def test_two_settings_in_one_folder_leave_each_other_alone(tmp_path):
    cohort = study(tmp_path/'raw')
    first = prepare_cohort(cohort, tmp_path/'out', Steps(slices=9), workers=1)
    write_manifest(tmp_path/'out'/'first.csv', first.cohort)
    prepare_cohort(cohort, tmp_path/'out', Steps(slices=5), workers=1)
    again = read_manifest(tmp_path/'out'/'first.csv')
    assert all(read_volume(p).shape[2] == 9 for s in again.subjects for p in s.paths.values())

def test_the_way_back_through_two_preparations(tmp_path):
    cohort = study(tmp_path/'raw', patients=('a',))
    one = prepare_cohort(cohort, tmp_path/'one', Steps(size=(36, 36)), workers=1)
    again = read_manifest(write_manifest(tmp_path/'one'/'m.csv', one.cohort))
    two = prepare_cohort(again, tmp_path/'two', Steps(slices=9), workers=1)
    prepared = read_volume(two.cohort.subjects[0].paths['T1'])
    first = read_volume(tmp_path/'raw'/'a'/'T1.nii.gz')
    back = out_of_frame(prepared.data, two.cohort.info['geometry']['a'], like=first)
    assert back.shape == first.shape and np.array_equal(back.affine, first.affine) and back.header is first.header
    seen = back.data != 0
    assert prepared.shape == (36, 36, 9) and np.array_equal(back.data[seen], first.data[seen]) and seen.sum() > 3000

def test_a_registered_modality_comes_back_to_its_own_scan(tmp_path):
    raw = preset('ixi-like', subjects=1).write(tmp_path/'raw')
    next(raw.glob('IXI-PD/*')).unlink()
    cohort = propose_manifest(raw, fractions=(1, 0, 0))
    done = prepare_cohort(cohort, tmp_path/'out', Steps(reference='T1'), workers=1).cohort
    again = read_manifest(write_manifest(tmp_path/'out'/'m.csv', done))
    s, first = again.subjects[0], read_volume(cohort.subjects[0].paths['T2'])
    words = read_volume(s.paths['T2']).data, again.info['geometry'][s.key], first, again.info['registration'][s.key]['T2']['matrix']
    head = head_mask(first.data)
    for order, least in (('linear', .94), ('bspline', .96)):      # the scan's own noise is averaged by two interpolations
        back = onto_original(*words, order=order)
        assert same_grid(back, first) and back.header is first.header
        assert np.corrcoef(back.data[head], first.data[head])[0, 1] > least
        assert np.corrcoef(*(gaussian_filter(v.data, .7)[head] for v in (back, first)))[0, 1] > .98
        assert np.abs(shift_between(first.data, back.data)).max() < .1
    assert np.abs(shift_between(first.data, onto_original(*words[:3]).data)).max() > 1        # the patient had moved

def test_the_way_back_undoes_two_preparations_and_their_registrations(tmp_path, register_once):
    cohort = study(tmp_path/'raw', patients=('a',), affines=OTHER)
    one = prepare_cohort(cohort, tmp_path/'one', Steps(size=(44, 48)), workers=1)
    again = read_manifest(write_manifest(tmp_path/'one'/'m.csv', one.cohort))
    two = prepare_cohort(again, tmp_path/'two', Steps(slices=20), workers=1).cohort
    first, fits = read_volume(tmp_path/'raw'/'a'/'T2.nii.gz'), two.info['registration']['a']
    assert fits == one.cohort.info['registration']['a'] and fits['T2']['matrix'] != np.eye(4).tolist()
    back = onto_original(read_volume(two.subjects[0].paths['T2']).data, two.info['geometry']['a'], first, fits['T2']['matrix'])
    head = (first.data > 0) & (back.data > 0)
    assert head.sum() > 10000 and np.abs(shift_between(first.data, back.data, mask=head)).max() < .1
    assert np.corrcoef(gaussian_filter(first.data, 1)[head], gaussian_filter(back.data, 1)[head])[0, 1] > .98

def test_the_way_back_without_a_movement_is_exact(tmp_path):
    cohort = study(tmp_path/'raw', patients=('a',), modalities=('T2', 'CT'))
    done = prepare_cohort(cohort, tmp_path/'out', Steps(size=(30, 34), slices=15), workers=1).cohort
    first, g = read_volume(tmp_path/'raw'/'a'/'CT.nii.gz'), done.info['geometry']['a']
    data = read_volume(done.subjects[0].paths['CT']).data
    back = onto_original(data, g, first, fill=-7)
    seen = back.data != -7
    assert np.array_equal(back.data[seen], first.data[seen]) and seen.sum() == 30*34*15
    moved_back = onto_original((data > 200)*5, g, Volume(first.data[1:], first.affine), np.eye(4), order='nearest', fill=-7)
    assert set(np.unique(moved_back.data)) == {-7, 0, 5} and moved_back.shape == (39, 44, 26)
    for bad in (np.zeros((4, 4)), np.eye(3), np.full((4, 4), np.nan)):
        with pytest.raises(ConfigError, match='matrix'): onto_original(data, g, first, bad)
    with pytest.raises(ShapeError): onto_original(data[1:], g, first)

def test_notes_of_earlier_looks_are_replaced(tmp_path):
    cohort = study(tmp_path, patients=('a',))
    v = read_volume(tmp_path/'a'/'T2.nii.gz')
    write_volume(tmp_path/'a'/'T2.nii.gz', v._replace(data=np.roll(v.data, 1, 1)))
    noted = replace(cohort.subjects[0], notes='tall; T2: lies (9, 9, 9) voxels off T1')
    once = look_at_cohort(replace(cohort, subjects=(noted,)), workers=1)[0]
    twice = look_at_cohort(once, workers=1)[0]
    found = once.subjects[0].notes
    assert found == twice.subjects[0].notes and found.startswith('tall; T2: lies (') and '(9, 9, 9)' not in found

def test_a_look_leaves_out_what_cannot_be_read_and_saves_intensities(tmp_path):
    cohort = study(tmp_path)
    path = tmp_path/'b'/'T2.nii.gz'
    data = bytearray(path.read_bytes())
    data[len(data)//2] ^= 1
    path.write_bytes(bytes(data))
    looked, failures = look_at_cohort(cohort, Steps(intensity={'T1': 'zscore'}), workers=1)
    assert [s.patient for s in looked.subjects] == ['a', 'c'] and list(failures) == ['b'] and list(looked.info['failed']) == ['b']
    assert looked.subjects[0].intensity['T1'].kind == 'zscore' and looked.subjects[0].intensity['T2'].kind == 'window'

def test_a_look_writes_a_log(tmp_path):
    cohort = study(tmp_path/'raw', patients='abc')
    (tmp_path/'raw'/'b'/'T2.nii.gz').write_bytes(b'no volume')
    log = tmp_path/'new'/'log.csv'
    found = replace(cohort, info=dict(cohort.info, failed={'z': 'its header is damaged'}))
    for runs in (1, 2):
        look_at_cohort(found, workers=1, log=log)
        rows = list(csv.DictReader(log.open(newline='')))
        assert [(r['subject'], r['status']) for r in rows] == [*zip('zabc', ('failed', 'unchanged')*2, strict=True)]*runs
    assert 'T2.nii.gz' in rows[2]['notes'] and rows[0]['notes'] == 'its header is damaged'
    look_at_cohort(cohort, workers=1)
    assert len(log.read_text().splitlines()) == 9 and not list((tmp_path/'raw').glob('log*'))

def test_steps_that_name_nothing_are_refused(tmp_path):
    cohort = study(tmp_path)
    for steps in (Steps(n4=('T9',)), Steps(tissue=('T9',)), Steps(intensity={'T9': 'zscore'}, slices=3)):
        with pytest.raises(ConfigError, match="'T9'"): prepare_cohort(cohort, tmp_path/'out', steps, workers=1)
    with pytest.raises(ConfigError, match="'T9'"): look_at_cohort(cohort, Steps(intensity={'T9': 'zscore'}))

def test_a_new_library_redoes_its_steps(tmp_path, monkeypatch):
    cohort, out = study(tmp_path/'raw', patients=('a',)), tmp_path/'out'
    prepare_cohort(cohort, out, Steps(n4=('T1',)), workers=1)
    import importlib.metadata as metadata
    real = metadata.version
    monkeypatch.setattr(metadata, 'version', lambda n: '99' if n == 'SimpleITK' else real(n))
    prepare_cohort(cohort, out, Steps(n4=('T1',)), workers=1)
    assert computed(out)['a'].startswith('n4x1')

def test_thin_volumes_are_one_sentence(tmp_path):
    for p in 'ab': write_volume(tmp_path/p/'T1.nii.gz', Volume(image('T1', ord(p))[:, :, 12:13], GRID))
    cohort = propose_manifest(tmp_path, fractions=(1, 0, 0))
    assert not look_at_cohort(cohort, workers=1)[1]
    with pytest.raises(CohortError, match='4 or more'): prepare_cohort(cohort, tmp_path/'out', Steps(n4=('T1',)), workers=1)

# ---- intensities ----------------------------------------------------------------------------------------------------------------
def test_mean_max_takes_its_scale_from_training_subjects(tmp_path):
    for k, p in enumerate('abc'):
        data = image('T1', k)
        data[20, 20, 13] = (1000, 500, 9000)[k]      # the test subject's own maximum must not count
        write_volume(tmp_path/p/'T1.nii.gz', Volume(data, GRID)), write_volume(tmp_path/p/'T2.nii.gz', Volume(image('T2', k), GRID))
    cohort = propose_manifest(tmp_path, splits=dict(a='train', b='train', c='test'))
    done = prepare_cohort(cohort, tmp_path/'out', Steps(size=(48, 50), intensity={'*': 'mean_max'}), workers=1)
    data = [read_volume(s.paths['T1']).data for s in done.cohort.subjects]
    means, tops = [v.mean(dtype=float) for v in data], [v.max() for v in data]
    scale = max(t/m for t, m in zip(tops[:2], means, strict=False))
    for s, m in zip(done.cohort.subjects, means, strict=True):
        assert s.intensity['T1'].low == 0 and np.isclose(s.intensity['T1'].high, m*scale, rtol=1e-5)

def test_intensities_come_back_with_the_manifest(tmp_path):
    cohort = study(tmp_path/'raw')
    done = prepare_cohort(cohort, tmp_path/'out', Steps(size=(32, 36), intensity={'*': 'window', 'T2': 'zscore'}), workers=1)
    again = read_manifest(write_manifest(tmp_path/'out'/'manifest.csv', done.cohort))
    s = again.patient('a')
    assert s.intensity['T2'].kind == 'zscore' and s.intensity == done.cohort.patient('a').intensity
    loaded = load_subject(s, ['T1', 'T2'])
    assert loaded.windows['T2'] == s.intensity['T2']
    for m in ('T1', 'T2'):
        original = to_canonical(read_volume(s.paths[m]))[0].data
        back, i = s.intensity[m].invert(loaded.images[m]), s.intensity[m]
        inside = (original >= i.low) & (original <= i.high) | (not i.clip)
        assert np.abs(back-original)[inside].max() <= 1e-6*(i.high-i.low)*8
    geometry = again.info['geometry']['a']
    whole = out_of_frame(read_volume(s.paths['T1']).data, geometry)
    first = read_volume(cohort.patient('a').paths['T1'])
    assert np.array_equal(whole.affine, first.affine) and whole.shape == first.shape
    assert np.array_equal(whole.data[whole.data != 0], first.data[whole.data != 0])

# ---- the same bytes -------------------------------------------------------------------------------------------------------------
def test_two_processes_write_what_one_writes(tmp_path):
    cohort = study(tmp_path/'raw', affines=OTHER)
    one = prepare_cohort(cohort, tmp_path/'one', Steps(n4=('T1',)), workers=1)
    two = prepare_cohort(cohort, tmp_path/'two', Steps(n4=('T1',)), workers=2)
    assert content(tmp_path/'one') == content(tmp_path/'two') and one.records == two.records

def computed(folder):
    "What the last run's log says was computed, subject by subject"
    return {r['subject']: r['computed'] for r in csv.DictReader((folder/'log.csv').open(newline=''))}

def test_only_what_depends_on_a_setting_is_redone(tmp_path, register_once):
    cohort, out = study(tmp_path/'raw', patients=('a', 'b'), affines=OTHER), tmp_path/'out'
    first = prepare_cohort(cohort, out, Steps(n4=('T1',)), workers=1)
    assert computed(out)['a'] == 'registerx1 n4x1 shiftx1 volumesx1 intensityx2'
    before = content(out)
    assert prepare_cohort(cohort, out, Steps(n4=('T1',)), workers=1).records == first.records
    assert computed(out) == dict(a='nothing', b='nothing') and content(out) == before
    prepare_cohort(cohort, out, Steps(n4=('T1',), size=(30, 30)), workers=1)
    assert computed(out)['a'] == 'volumesx1 intensityx2'
    prepare_cohort(cohort, out, Steps(n4=('T1', 'T2'), size=(30, 30)), workers=1)
    assert computed(out)['a'] == 'n4x1 shiftx1 volumesx1 intensityx1'
    prepare_cohort(cohort, out, Steps(n4=('T1', 'T2'), size=(30, 30), intensity={'T1': 'zscore'}), workers=1)
    assert computed(out)['a'] == 'intensityx1'
    write_volume(tmp_path/'raw'/'b'/'T1.nii.gz', Volume(image('T1', 7), GRID))
    prepare_cohort(cohort, out, Steps(n4=('T1', 'T2'), size=(30, 30), intensity={'T1': 'zscore'}), workers=1)
    assert computed(out)['a'] == 'nothing' and computed(out)['b'].startswith('registerx1 n4x2')

def test_damaged_results_are_made_again(tmp_path):
    cohort, out = study(tmp_path/'raw', patients=('a', 'b'), affines=OTHER), tmp_path/'out'
    prepare_cohort(cohort, out, Steps(n4=('T1',)), workers=1)
    before = content(out)
    places = ('cache/*', 'records/a-*.json', 'volumes/b-*/T2.nii.gz')
    for path in [p for pattern in places for p in out.glob(pattern)]:
        path.write_bytes(path.read_bytes()[:-9])
    prepare_cohort(cohort, out, Steps(n4=('T1',)), workers=1)
    assert content(out) == before

KILLED = """
import sys
from pathlib import Path
from i2i_mamba_nb.data.cohort import read_manifest
from i2i_mamba_nb.data.prepare import Steps, prepare_cohort
if __name__ == '__main__':
    prepare_cohort(read_manifest(sys.argv[1]), sys.argv[2], Steps(n4=('*',), size=(36, 40)), workers=int(sys.argv[3]),
        progress=lambda done, *_: print(done, flush=True))
"""

@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "(manifest, bytes of a preparation that nobody interrupted)"
    folder = tmp_path_factory.mktemp('whole')
    manifest = write_manifest(folder/'raw'/'m.csv', study(folder/'raw', affines=OTHER))
    prepare_cohort(read_manifest(manifest), folder/'out', Steps(n4=('*',), size=(36, 40)), workers=1)
    return manifest, content(folder/'out')

@pytest.mark.parametrize('workers,after', [(1, 1), (2, 0), (2, 1)])
def test_a_killed_run_goes_on_with_identical_bytes(whole, tmp_path, workers, after):
    (tmp_path/'run.py').write_text(KILLED)
    words = [sys.executable, str(tmp_path/'run.py'), str(whole[0]), str(tmp_path/'out'), str(workers)]
    running = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True)
    for _ in range(after): running.stdout.readline()
    while not after and not list((tmp_path/'out').glob('cache/register-*')): time.sleep(.05)
    time.sleep(.3)
    running.kill()
    running.wait()
    for _ in range(60):         # workers notice that their parent is gone
        if not alive(running.pid): break
        time.sleep(.25)
    assert not alive(running.pid) and content(tmp_path/'out') != whole[1]
    prepare_cohort(read_manifest(whole[0]), tmp_path/'out', Steps(n4=('*',), size=(36, 40)), workers=1)
    assert content(tmp_path/'out') == whole[1]

def test_ctrl_c_ends_all_processes_at_once_and_the_next_run_completes(whole, tmp_path):
    (tmp_path/'steps.json').write_text('{"n4": ["*"], "size": [36, 40]}')
    words = ['prepare', whole[0], '--steps', tmp_path/'steps.json', '--out', tmp_path/'out', '--workers', '2']
    command = [sys.executable, '-m', 'i2i_mamba_nb.app.cli', *map(str, words)]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while running.poll() is None and not list((tmp_path/'out').glob('cache/register-*')): time.sleep(.05)
    running.send_signal(signal.SIGINT)      # to the main process only: its workers hear of it from nobody else
    said = running.communicate(timeout=20)[1]
    assert running.returncode == 130 and 'same command goes on' in said and 'Traceback' not in said, said
    ended = time.perf_counter()
    while alive(running.pid) and time.perf_counter()-ended < 8: time.sleep(.1)
    assert not alive(running.pid) and content(tmp_path/'out') != whole[1]
    again = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0 and content(tmp_path/'out') == whole[1], again.stderr

@pytest.mark.parametrize('stop', [KeyboardInterrupt, RuntimeError])
def test_workers_end_with_whoever_waits_for_them(stop):
    from multiprocessing import Process, active_children
    other = Process(target=time.sleep, args=(30,))
    other.start()
    def consume():
        for _ in run_jobs(wait_then_long, [0, 1, 2], workers=2): raise stop
    start = time.perf_counter()
    with pytest.raises(stop): consume()
    while len(active_children()) > 1 and time.perf_counter()-start < 40: time.sleep(.1)
    assert active_children() == [other] and other.is_alive()
    other.terminate()

def wait_then_long(job):
    "The first job ends, the others would take a minute"
    if job: time.sleep(60)

def test_parts_of_dead_processes_are_removed(tmp_path):
    cohort, out = study(tmp_path/'raw', patients=('a',)), tmp_path/'out'
    gone = subprocess.Popen(['true'])
    gone.wait()
    other = subprocess.Popen(['sleep', '60'])
    places = [out/n for n in ('cache', 'records', 'pictures', 'volumes/a-12345678')]+[out]
    for p in (*places, tmp_path/'raw'): p.mkdir(parents=True, exist_ok=True)
    dead = [p/f'.part-{gone.pid}-x.nii.gz' for p in places]
    kept = [places[k]/n for k, n in enumerate((f'.part-{os.getpid()}-x.json', f'.part-{other.pid}-x.json', '.part-x', f'part-{gone.pid}-x',
        f'.part-{gone.pid}'))]+[tmp_path/'raw'/f'.part-{gone.pid}-x.nii.gz']
    for p in (*dead, *kept): p.write_bytes(b'half')
    try: prepare_cohort(cohort, out, Steps(slices=9), workers=1)
    finally: other.kill()
    assert not any(p.exists() for p in dead) and all(p.exists() for p in kept)

def alive(group):
    "Whether any process of a session is left"
    try: os.killpg(group, 0)
    except (ProcessLookupError, PermissionError): return False
    return any(int(p.name) != group and _group(p) == group for p in Path('/proc').glob('[0-9]*'))

def _group(process):
    try: return int((process/'stat').read_text().rsplit(')', 1)[1].split()[2])
    except (OSError, IndexError): return 0

# ---- failures -------------------------------------------------------------------------------------------------------------------
def test_failures_are_listed_and_the_others_go_on(tmp_path, register_once):
    cohort = study(tmp_path/'raw', patients='abcd', affines=OTHER)
    (tmp_path/'raw'/'b'/'T2.nii.gz').write_bytes(b'no volume')
    write_volume(tmp_path/'raw'/'c'/'T1.nii.gz', Volume(np.zeros((40, 44, 26)), GRID))
    done = prepare_cohort(cohort, tmp_path/'out', Steps(), workers=1)
    assert set(done.failures) == {'b', 'c'} and 'b/T2.nii.gz' in done.failures['b']
    assert [s.patient for s in done.cohort.subjects] == ['a', 'd']
    assert done.cohort.info['failed'] == done.failures and 'failed' in (tmp_path/'out'/'log.csv').read_text()
    assert len((tmp_path/'out'/'log.csv').read_text().splitlines()) == 5
    for p in 'ad': (tmp_path/'raw'/p/'T1.nii.gz').write_bytes(b'')
    with pytest.raises(I2IError): prepare_cohort(replace(cohort, info={}), tmp_path/'nobody', Steps(), workers=1)

def test_those_who_failed_before_stay_listed(tmp_path):
    cohort, early = study(tmp_path/'raw', patients=('a',)), {'z': 'its header is damaged'}
    done = prepare_cohort(replace(cohort, info=dict(cohort.info, failed=early)), tmp_path/'out', Steps(slices=9), workers=1)
    assert done.cohort.info['failed'] == early and not done.failures
    rows = list(csv.DictReader((tmp_path/'out'/'log.csv').open(newline='')))
    assert [(r['subject'], r['status'], r['notes']) for r in rows] == [('z', 'failed', early['z']), ('a', 'done', '')]

def test_a_missing_reference_is_a_failure_of_that_subject(tmp_path):
    study(tmp_path/'raw')
    (tmp_path/'raw'/'b'/'T1.nii.gz').unlink()
    done = prepare_cohort(propose_manifest(tmp_path/'raw'), tmp_path/'out', Steps(reference='T1', size=(32, 32)), workers=1)
    assert list(done.failures) == ['b'] and 'expected T1' in done.failures['b']

def end_here(job):
    "A job whose process dies"
    if job == 1: os.kill(os.getpid(), signal.SIGKILL)
    return job

def test_a_process_that_dies_costs_its_own_job_only():
    ended = dict(run_jobs(end_here, list(range(6)), workers=2))
    assert 'ended before the work' in ended.pop(1)['error']
    assert {k: e['result'] for k, e in ended.items()} == {k: k for k in (0, 2, 3, 4, 5)}

def test_names_that_would_share_a_folder_are_refused(tmp_path):
    write_volume(tmp_path/'x.nii', Volume(image('T1'), GRID)), write_volume(tmp_path/'y.nii', Volume(image('T2'), GRID))
    subjects = tuple(Subject(p, 'train', dict(T1=tmp_path/f)) for p, f in (('a b', 'x.nii'), ('a_b', 'y.nii')))
    same = tuple(Subject(p, 'train', dict(T1=tmp_path/f), s) for p, s, f in (('a', 'b', 'x.nii'), ('a b', '', 'y.nii')))
    with pytest.raises(CohortError, match='a b and a b'): prepare_cohort(Cohort(same, ('T1',), tmp_path), tmp_path/'o', Steps())
    twice = (Subject('a', 'train', {'T1': tmp_path/'x.nii', 'T1*': tmp_path/'y.nii'}),)
    with pytest.raises(CohortError, match='T1 and T1'): prepare_cohort(Cohort(twice, ('T1', 'T1*'), tmp_path), tmp_path/'o', Steps())
    with pytest.raises(CohortError, match='a b and a_b'): prepare_cohort(Cohort(subjects, ('T1',), tmp_path), tmp_path/'o', Steps())

def test_workers():
    assert worker_count(10**6, 1) == 1 and 1 <= worker_count(10**6) <= os.cpu_count() and worker_count(10**13) == 1
    for bad in (0, -1, 2.5):
        with pytest.raises(ConfigError, match='workers'): worker_count(1, bad)

# ---- real volumes ---------------------------------------------------------------------------------------------------------------
REAL = Path(__file__).resolve().parent.parent.parent/'shared'/'data'

@pytest.mark.skipif(not REAL.exists(), reason='the real volumes are not here')
def test_a_real_patient_is_framed_and_comes_back(tmp_path):
    cohort = propose_manifest(REAL, '{patient}/{modality}.nii.gz')
    done = prepare_cohort(cohort, tmp_path, Steps(size=(128, 160), slices=90), workers=1)
    s = done.cohort.subjects[0]
    assert read_volume(s.paths['T1']).shape == (128, 160, 90) and not done.failures
    whole, first = out_of_frame(read_volume(s.paths['T2']).data, done.cohort.info['geometry']['cstar']), nib.load(REAL/'cstar'/'T2.nii.gz')
    seen = whole.data != 0
    assert np.array_equal(whole.affine, first.affine) and np.array_equal(whole.data[seen], first.get_fdata(dtype=np.float32)[seen])
