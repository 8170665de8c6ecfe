"Plans of simulated cohorts: counts without voxels, files of a few patients, writes that were disturbed"
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from i2i_mamba_nb.core import CohortError, ConfigError, DiskError, read_json
from i2i_mamba_nb.data import presets as pr
from i2i_mamba_nb.data.archives import LAYOUTS, PAPER_SPLITS, fields_of, layout_of, paper_split, propose_manifest
from i2i_mamba_nb.data.cohort import Cohort, Subject, natural_key
from i2i_mamba_nb.data.phantom import simulate_subject
from i2i_mamba_nb.data.volume import Volume, read_grid, read_volume, same_grid, to_canonical

NAME = {'ixi': 'ixi-like', 'gold_atlas': 'pelvis-like'}
KEYS = list(pr.ARCHIVES)

def of_paper(name): return pr.preset(NAME.get(PAPER_SPLITS[name].archive, 'brats-like'), size='paper', cohort=name)
def plan_of(key, **options): return pr.preset(key[0], edition=key[1] or None, **options)
def tree(root): return {p.relative_to(root).as_posix(): p.read_bytes() for p in Path(root).rglob('*') if p.is_file()}

@pytest.fixture(scope='module')
def written(tmp_path_factory):
    "Two demo patients of every archive: key -> (plan, folder)"
    root, out = tmp_path_factory.mktemp('archives'), {}
    for k, key in enumerate(KEYS):
        plan = plan_of(key, subjects=2)
        out[key] = plan, plan.write(root/str(k))
    return out

# counts, without a voxel

@pytest.mark.parametrize('name, total', [('i2i-mamba-ixi', 53), ('i2i-mamba-pelvis', 15), ('syndiff-ixi', 40), ('syndiff-pelvis', 15),
    ('mm2ct-pelvis', 15), ('hmf-mambainr-brats2020', 240), ('hmf-mambainr-ixi', 60), ('cravim-ixi', 40), ('cravim-brats2018', 40),
    ('cola-diff-brats2018', 285), ('cola-diff-ixi', 200)])
def test_counts_of_the_papers(name, total):
    plan, record = of_paper(name), PAPER_SPLITS[name]
    assert sum(plan.counts) == total == len(plan.patients) and plan.counts == record.counts and plan.layout == record.archive
    assert set(record.modalities) <= {m for m in plan.patients[0].files} | {'T1POST'} and plan.cohort == name

def test_every_paper_split_has_a_plan(): assert all(of_paper(n).counts == r.counts for n, r in PAPER_SPLITS.items())

@pytest.mark.parametrize('name', PAPER_SPLITS)
def test_plan_and_reader_split_alike(name):
    plan = of_paper(name)
    subjects = tuple(Subject(p.patient, 'train', {m: Path(f) for m, f in p.files.items()}) for p in reversed(plan.patients))
    hashes = dict(sha256={f: f for p in plan.patients for f in p.files.values()})
    cohort = paper_split(Cohort(subjects, tuple(PAPER_SPLITS[name].modalities), Path('.'), hashes), name)
    assert {s.patient: s.split for s in cohort.subjects} == plan.splits

@pytest.mark.parametrize('key', KEYS)
def test_names_of_whole_cohorts(key):
    plan = plan_of(key, size='paper')
    files = [f for p in plan.patients for f in p.files.values()]
    assert len(set(files)) == len(files)
    assert len({p.patient for p in plan.patients}) == sum(plan.counts) == len({p.seed for p in plan.patients})
    assert all(fields_of(f, plan.layout)['patient'] == p.patient for p in plan.patients for f in p.files.values())
    assert [p.patient for p in plan.patients] == sorted((p.patient for p in plan.patients), key=natural_key)
    assert plan.layout in LAYOUTS and pr.ARCHIVES[key].layout == plan.layout

def test_no_simulated_patient_has_a_real_ones_name():
    number = lambda p: int(''.join(c for c in p.patient if c.isdigit())[-3:])
    assert all(number(p) > 662 for p in of_paper('cola-diff-ixi').patients)
    assert all(number(p) > 369 for p in of_paper('hmf-mambainr-brats2020').patients)
    assert all(int(p.patient[2:4]) > 8 for p in of_paper('i2i-mamba-pelvis').patients)

def test_grades_hospitals_and_regions():
    big = of_paper('cola-diff-brats2018').patients
    low = [p for p in big if p.group == 'LGG']
    assert 45 < len(low) < 100 and all(p.files['seg'].startswith(p.group) for p in big)
    assert {p.site for p in of_paper('cola-diff-ixi').patients} == {'Guys', 'HH', 'IOP'}
    plan = pr.preset('synthrad-like', size='paper')
    for region in ('brain', 'pelvis'):
        assert [sum(p.group == region and p.split == s for p in plan.patients) for s in pr.SPLITS] == [180, 30, 60]

def test_paper_grids_without_voxels():
    sizes = {n: [pr._grid_of(i, (1, 1, 1)) for i in pr.preset(n, size='paper').patients[0].image_sets] for n in pr.PRESETS}
    assert sizes['ixi-like'] == [((1.2, .9375, .9375), (150, 256, 256)), ((.9375, .9375, 1.25), (256, 256, 130))]
    assert sizes['brats-like'] == [((1., 1., 1.), (240, 240, 155))] and sizes['pelvis-like'] == [((.875, .875, 2.5), (512, 512, 90))]

def test_subjects_and_seeds():
    assert [sum(pr.preset('ixi-like', subjects=n).counts) for n in range(1, 60)] == list(range(1, 60))
    assert pr.preset('ixi-like', size='paper', subjects=53).counts == (25, 10, 18)
    a, b, c = (pr.preset('brats-like', seed=s) for s in (3, 3, 4))
    assert a == b and a.patients[0].seed != c.patients[0].seed
    assert pr.preset('brats-like', subjects=3).patients[0].seed == pr.preset('brats-like', size='paper').patients[0].seed

@pytest.mark.parametrize('bad, text', [(dict(name='ixi'), 'preset'), (dict(size='big'), 'size'), (dict(edition='2023'), 'edition'),
    (dict(cohort='x'), 'paper split'), (dict(cohort='cola-diff-brats2018'), 'brats2018'), (dict(subjects=0), 'subjects'),
    (dict(subjects=2.5), 'subjects'), (dict(subjects=10**6), 'subjects'), (dict(coarser=(1, 2)), 'coarser'),
    (dict(coarser=(0, 1, 1)), 'coarser'), (dict(coarser=(1., 1, 1)), 'coarser'), (dict(coarser=(9, 9, 1)), 'coarser')])
def test_illegal_plans(bad, text):
    with pytest.raises(ConfigError, match=text): pr.preset(**{'name': 'ixi-like', **bad})

# voxels

@pytest.mark.parametrize('key', KEYS)
def test_readers_take_what_is_written(written, key):
    plan, folder = written[key]
    assert layout_of(folder) == plan.layout
    cohort = propose_manifest(folder, splits=plan.splits)
    assert {s.patient: s.split for s in cohort.subjects} == plan.splits and not cohort.info['missing']
    assert set(cohort.info['unmatched']) <= {'truth.json'}
    for s in cohort.subjects:
        assert len(s.paths) == len(plan.patients[0].files)
        volumes = {m: read_volume(p) for m, p in s.paths.items()}
        for m, v in volumes.items():
            assert 'SIMULATED' in str(v.header['descrip']), m
            if m not in ('mask', 'segmentation'): assert v.data.std() > 0
            kind = v.header['dtype'] if isinstance(v.header, dict) else v.header.get_data_dtype().str
            assert np.dtype(kind) == (np.uint8 if m in ('mask', 'segmentation') else np.int16)
        if plan.name != 'ixi-like': assert all(same_grid(v, next(iter(volumes.values()))) for v in volumes.values())

def test_ixi_grids_and_orientations(written):
    plan, folder = written['ixi-like', '']
    v = {n: read_grid(folder/f) for n, f in plan.patients[0].files.items()}
    assert {n: ''.join(nib.aff2axcodes(g.affine)) for n, g in v.items()} == dict(T1='PSR', T2='LPS', PD='LPS')
    assert same_grid(v['T2'], v['PD']) and not same_grid(v['T1'], v['T2'])
    assert np.allclose(v['T1'].header.get_zooms(), (3.75, 3.75, 3.6)) and np.allclose(v['T2'].header.get_zooms(), (3.75, 3.75, 3.75))

def test_motion_is_exact(written):
    "T1 with its motion undone is, voxel for voxel, the person who was not moved"
    plan, folder = written['ixi-like', '']
    truth = read_json(folder/'truth.json')['patients']
    for p in plan.patients:
        to = np.array(truth[p.patient]['truth']['fixed_to_moving'])
        assert np.allclose(to[:3, :3]@to[:3, :3].T, np.eye(3)) and .5 < np.linalg.norm(to[:3, 3]) < 15
        v = read_volume(folder/p.files['T1'])
        still = to_canonical(Volume(v.data, to@v.affine))[0]
        spacing, shape = pr._grid_of(p.image_sets[0], plan.coarser)
        again = simulate_subject(p.seed, site=p.scanner, spacing=spacing, contrasts=('T1',), pathology='none', shape=shape)
        assert np.array_equal(still.data, np.rint(again.images['T1'])) and np.abs(still.affine-again.affine).max() < 1e-4

def test_truth_points_from_t1_to_t2(written):
    plan, folder = written['ixi-like', '']
    p = plan.patients[1]
    to = np.array(read_json(folder/'truth.json')['patients'][p.patient]['truth']['fixed_to_moving'])
    head = {}
    for n in ('T1', 'PD'):
        v = read_volume(folder/p.files[n])
        at = np.argwhere(v.data > np.percentile(v.data, 99)/3)
        head[n] = (v.affine@np.c_[at, np.ones(len(at))].T)[:3].mean(1)
    far = [np.linalg.norm((m@[*head['T1'], 1])[:3]-head['PD']) for m in (to, np.eye(4), np.linalg.inv(to))]
    assert far[0] < 2 and far[0] < far[1] < far[2]

@pytest.mark.parametrize('year', ['2018', '2020', '2021', '2023'])
def test_brats_volumes(written, year):
    plan, folder = written['brats-like', year]
    for p in plan.patients:
        v = {n: read_volume(folder/f) for n, f in p.files.items()}
        affine = np.diag([-4., -4, 3, 1])
        affine[1, 3] = 239
        assert all(np.allclose(x.affine, affine) and x.shape == (60, 60, 52) for x in v.values())
        brain = v['T1'].data != 0
        assert all(((x.data != 0) == brain).all() for n, x in v.items() if n != 'seg') and .05 < brain.mean() < .5
        assert not v['seg'].data[~brain].any()
        codes, enhancing = set(np.unique(v['seg'].data).astype(int)), 3 if year == '2023' else 4
        assert codes == ({0, 1, 2, enhancing} if p.group == 'HGG' else {0, 1, 2})

def test_what_enhances(written):
    plan = pr.preset('brats-like', size='paper')
    high = next(p for p in plan.patients if p.group == 'HGG')
    v = pr.simulate_planned(plan._replace(coarser=(3, 3, 3)), high)[0]
    ratio = [v[n].data[v['seg'].data == 4].mean()/np.median(v[n].data[v['T1'].data > 0]) for n in ('T1', 'T1POST')]
    assert ratio[1] > 1.15*ratio[0]
    assert v['FLAIR'].data[v['seg'].data == 2].mean() > 1.1*np.median(v['FLAIR'].data[v['T1'].data > 0])

@pytest.mark.parametrize('edition', ['2023', '2025'])
def test_synthrad_volumes(written, edition):
    plan, folder = written['synthrad-like', edition]
    assert {p.group for p in plan.patients} == ({'brain', 'pelvis'} if edition == '2023' else {'HN', 'AB'})
    for p in plan.patients:
        v = {n: read_volume(folder/f) for n, f in p.files.items()}
        mask = v['mask'].data > 0
        assert set(np.unique(v['mask'].data)) == {0, 1} and .1 < mask.mean() < .9
        assert (v['CT'].data[~mask] < -100).all() and v['CT'].data[mask].max() > 700 and v['CT'].data.min() >= -1024
        assert all(f.endswith('.mha' if edition == '2025' else '.nii.gz') for f in p.files.values())

def test_no_negative_zero_keeps_integers_small():
    plan = pr.preset('pelvis-like')
    ct = pr.simulate_planned(plan, plan.patients[0])[0]['CT'].data
    assert not np.signbit(ct[ct == 0]).any() and (ct == 0).any()

# writing

@pytest.fixture(scope='module')
def pelvis(tmp_path_factory):
    "An undisturbed write of three patients: (plan, folder)"
    plan = pr.preset('pelvis-like', subjects=3, coarser=(8, 8, 3))
    return plan, plan.write(tmp_path_factory.mktemp('pelvis')/'whole')

def test_only_the_patients_asked_for(pelvis, tmp_path):
    plan, whole = pelvis
    steps, name = [], plan.patients[2].patient
    assert plan.write(tmp_path/'p', [name, name], progress=lambda *a: steps.append(a)) == tmp_path/'p'
    assert steps == [(1, 1)] and {f.split('/')[0] for f in tree(tmp_path/'p')} == {pr.RECORDS, name, 'truth.json'}
    assert all(tree(tmp_path/'p')[f] == b for f, b in tree(whole).items() if f.startswith(name))
    assert list(read_json(tmp_path/'p'/'truth.json')['patients']) == [name]

def test_any_order_gives_the_same_folder(pelvis, tmp_path):
    plan, whole = pelvis
    for p in reversed(plan.patients): plan.write(tmp_path, p.patient)
    assert tree(tmp_path) == tree(whole)

def test_nothing_is_written_twice(pelvis, monkeypatch):
    plan, whole = pelvis
    times = {p: p.stat().st_mtime_ns for p in whole.rglob('*') if p.is_file()}
    monkeypatch.setattr(pr, 'simulate_planned', lambda *a: pytest.fail('simulated again'))
    steps = []
    plan.write(whole, progress=lambda *a: steps.append(a))
    assert steps == [(1, 3), (2, 3), (3, 3)] and times == {p: p.stat().st_mtime_ns for p in whole.rglob('*') if p.is_file()}

DAMAGE = dict(cut=lambda f, r: f.write_bytes(f.read_bytes()[:-7]),
    flipped=lambda f, r: f.write_bytes(f.read_bytes()[:-20]+b'\0'+f.read_bytes()[-19:]),
    gone=lambda f, r: f.unlink(), folder=lambda f, r: shutil.rmtree(f.parent), record=lambda f, r: r.write_text('{"sha'),
    unfinished=lambda f, r: r.write_text(json.dumps({**json.loads(r.read_text()), 'sha256': None})), list=lambda f, r: r.write_text('[1]'),
    settings=lambda f, r: r.write_text(r.read_text().replace('"settings": "', '"settings": "0')))

@pytest.mark.parametrize('damage', DAMAGE)
def test_damage_is_mended(pelvis, tmp_path, damage):
    plan, whole = pelvis
    folder = Path(shutil.copytree(whole, tmp_path/'p'))
    person = plan.patients[1]
    DAMAGE[damage](folder/person.files['T2'], folder/pr.RECORDS/f'{person.patient}.json')
    plan.write(folder)
    assert tree(folder) == tree(whole)

def test_other_tables_replace_the_patients(pelvis, tmp_path, monkeypatch):
    plan, whole = pelvis
    before = pr._settings(plan, plan.patients[0])
    monkeypatch.setitem(pr.pelvis.HOUNSFIELD, 'fat', -90.)
    assert pr._settings(plan, plan.patients[0]) != before and not pr._whole(whole, plan, plan.patients[0])

def test_other_settings_replace_the_patient(pelvis, tmp_path):
    plan, whole = pelvis
    folder = Path(shutil.copytree(whole, tmp_path/'p'))
    other = pr.preset('pelvis-like', subjects=3, coarser=(8, 8, 3), seed=1)
    other.write(folder, other.patients[0].patient)
    old, new = tree(whole), tree(folder)
    changed = {f for f in old if old[f] != new[f]}
    assert changed == {*plan.patients[0].files.values(), f'{pr.RECORDS}/{plan.patients[0].patient}.json', 'truth.json'}

def test_somebody_elses_file_is_left_alone(pelvis, tmp_path):
    plan, _ = pelvis
    mine = tmp_path/plan.patients[1].files['CT']
    mine.parent.mkdir(parents=True)
    mine.write_text('mine')
    with pytest.raises(CohortError, match='no plan wrote'): plan.write(tmp_path)
    assert tree(tmp_path) == {plan.patients[1].files['CT']: b'mine'}
    plan.write(tmp_path, plan.patients[0].patient)

def test_unknown_patient_and_unusable_folder(pelvis, tmp_path):
    plan, _ = pelvis
    with pytest.raises(ConfigError, match='Did you mean'): plan.write(tmp_path/'p', ['1_5_P'])
    assert not (tmp_path/'p').exists()
    (tmp_path/'f').write_text('')
    with pytest.raises(DiskError): plan.write(tmp_path/'f')

KILLED = """
import sys
from i2i_mamba_nb.data.presets import preset
print('ready', flush=True)
preset('pelvis-like', subjects=3, coarser=(8, 8, 3)).write(sys.argv[1])
"""

@pytest.mark.parametrize('moment', ['record', 'volume'])
def test_a_killed_write_goes_on(pelvis, tmp_path, moment):
    plan, whole = pelvis
    folder, person = tmp_path/'p', plan.patients[1]
    seen = folder/pr.RECORDS/f'{person.patient}.json' if moment == 'record' else folder/person.files['T1']
    job = subprocess.Popen([sys.executable, '-c', KILLED, str(folder)], stdout=subprocess.PIPE, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    end = time.monotonic()+120
    while not seen.exists() and job.poll() is None and time.monotonic() < end: time.sleep(.002)
    os.kill(job.pid, signal.SIGKILL)
    job.wait()
    assert seen.exists()
    plan.write(folder)
    left = tree(folder)
    assert {f: b for f, b in left.items() if not Path(f).name.startswith('.')} == {f: b for f, b in tree(whole).items()}
