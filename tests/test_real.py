"From what lies on a disk to a network that trains: real volumes beside the repository, and every archive's layout, simulated"
import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from i2i_mamba_nb.app import cli
from i2i_mamba_nb.data.archives import LAYOUTS
from i2i_mamba_nb.data.cohort import read_manifest
from i2i_mamba_nb.data.presets import preset
from i2i_mamba_nb.data.volume import read_volume, same_grid

REAL = Path(__file__).resolve().parent.parent.parent/'shared'/'data'

@pytest.fixture
def run(capsys):
    "Standard output of a command in this process; it must end well"
    def f(*words):
        capsys.readouterr()
        status = cli.main([str(w) for w in words])
        seen = capsys.readouterr()
        assert status == 0, seen.err
        return seen.out
    return f

def trained(run, manifest, sources, target):
    "Two steps of training on a manifest: every loss and every weight a number"
    out = manifest.parent/'run'
    run('train', manifest, '--sources', sources, '--target', target, '--out', out, '--preset', 'smoke', '--steps', 2)
    facts, rows = json.loads((out/'run.json').read_text()), list(csv.DictReader((out/'log.csv').open(newline='')))
    assert facts['steps'] == 2 and [int(r['step']) for r in rows] == [1, 2] and facts['config']['target'] == target
    assert all(np.isfinite(float(r[k])) for r in rows for k in ('pixel', 'adversarial', 'generator', 'discriminator')), rows
    weights = load_file(out/'weights.safetensors')
    assert weights and all(torch.isfinite(w).all() for w in weights.values())
    return facts

def log_of(manifest): return [(r['subject'], r['status']) for r in csv.DictReader((manifest.parent/'log.csv').open(newline=''))]

# ---- real volumes ---------------------------------------------------------------------------------------------------------------
def real(name):
    "A folder of real data; the test is skipped where it is not there"
    if not (REAL/name).is_dir(): pytest.skip(f'no real volumes: {REAL/name} is not there')
    return REAL/name

def test_patients_with_multiple_sclerosis(run, tmp_path):
    before, manifest = {p: p.stat() for p in real('ms').rglob('*')}, tmp_path/'ms'/'manifest.csv'
    said = run('prepare', REAL/'ms', '--test', 'patient19', '--out', manifest)
    cohort = read_manifest(manifest)
    assert cohort.modalities == ('FLAIR', 'T1', 'T1POST', 'T2') and 'next: i2i-mamba train' in said and not cohort.info['simulated']
    assert {s.patient: s.split for s in cohort.subjects} == dict(patient07='train', patient19='test')
    assert all('lesion' in s.paths and s.intensity['T1'].kind == 'window' and not s.notes for s in cohort.subjects)
    assert sorted(log_of(manifest)) == [('patient07', 'unchanged'), ('patient19', 'unchanged')]
    facts = trained(run, manifest, 'T1,T2', 'FLAIR')
    assert not facts['simulated'] and {p: p.stat() for p in REAL.joinpath('ms').rglob('*')}.keys() == before.keys()

def test_one_person_after_a_stroke(run, tmp_path):
    real('cstar'), (tmp_path/'steps.json').write_text('{"size": [128, 160], "slices": 40}')
    run('prepare', REAL/'cstar', '--steps', tmp_path/'steps.json', '--out', tmp_path/'out')
    s, = read_manifest(tmp_path/'out'/'manifest.csv').subjects
    assert s.patient == 'cstar' and s.split == 'train' and not s.notes and log_of(tmp_path/'out'/'x') == [('cstar', 'done')]
    grids = [read_volume(s.paths[m]) for m in ('T1', 'T2', 'FLAIR')]
    assert {v.shape for v in grids} == {(128, 160, 40)} and same_grid(grids[0], grids[2])
    trained(run, tmp_path/'out'/'manifest.csv', 'T1,T2', 'FLAIR')

def test_slices_in_matlab_files(run, tmp_path):
    pytest.importorskip('h5py')
    manifest = tmp_path/'out'/'manifest.csv'
    said = run('prepare', real('ixi_slices'), '--slices-per-patient', 5, '--fractions', .6, .2, .2, '--out', tmp_path/'out')
    cohort = read_manifest(manifest)
    assert len(cohort.subjects) == 5 and {read_volume(p).shape[2] for s in cohort.subjects for p in s.paths.values()} == {5}
    assert sorted(s.split for s in cohort.subjects) == ['test', *['train']*3, 'validation'] and len(log_of(manifest)) == 5
    assert cohort.info['unpaired'] and 'not paired' in said         # T1 and T2 show other slices, and the command says so
    trained(run, manifest, 'T1', 'T2')
    assert not list(REAL.glob('*/manifest*'))

# ---- simulated archives ---------------------------------------------------------------------------------------------------------
BRATS = ('FLAIR', 'T1', 'T1POST', 'T2')
ARCHIVES = {
    'ixi': ('ixi-like', None, (5, 5, 4), ('PD', 'T1', 'T2'), 'T1,T2', 'PD'),
    **{f'brats{e}': ('brats-like', str(e), (6, 6, 6), BRATS, 'T1,T2,T1POST', 'FLAIR') for e in (2018, 2020, 2021, 2023)},
    'gold_atlas': ('pelvis-like', None, (6, 6, 3), ('CT', 'T1', 'T2'), 'T1,T2', 'CT'),
    **{f'synthrad{e}': ('synthrad-like', str(e), (6, 6, 2), ('CT', 'MR'), 'MR', 'CT') for e in (2023, 2025)},
}

@pytest.mark.parametrize('layout', ARCHIVES)
def test_an_archive_becomes_a_cohort_that_trains(run, tmp_path, layout):
    name, edition, coarser, modalities, sources, target = ARCHIVES[layout]
    raw = preset(name, subjects=2, edition=edition, coarser=coarser).write(tmp_path/'raw')
    (tmp_path/'steps.json').write_text('{"slices": 8}')
    steps = [] if layout == 'ixi' else ['--steps', tmp_path/'steps.json']       # grids that differ need no asking
    said = run('prepare', raw, *steps, '--fractions', .5, 0, .5, '--out', tmp_path/'out', '--workers', 1)
    cohort = read_manifest(tmp_path/'out'/'manifest.csv')
    assert cohort.info['layout'] == layout and layout in LAYOUTS and cohort.info['simulated'] and cohort.modalities == modalities
    assert sorted(s.split for s in cohort.subjects) == ['test', 'train'] and 'next: i2i-mamba train' in said
    for s in cohort.subjects:
        volumes = {m: read_volume(p) for m, p in s.paths.items()}
        assert set(modalities) <= set(volumes) and all(same_grid(volumes[modalities[0]], v) for v in volumes.values())
        assert layout == 'ixi' or volumes[modalities[0]].shape[2] == 8
    labels = {n for s in cohort.subjects for n in s.paths}-set(modalities)
    assert labels == ({'segmentation'} if 'brats' in layout else {'mask'} if 'synthrad' in layout else set())
    assert set(cohort.info['registration']) == ({s.key for s in cohort.subjects} if layout == 'ixi' else set())
    page = (tmp_path/'out'/'manifest-page'/'report.html').read_text()
    assert 'SIMULATED DATA' in page and page.count('<img') >= 1+(layout == 'ixi')
    assert trained(run, tmp_path/'out'/'manifest.csv', sources, target)['simulated']
