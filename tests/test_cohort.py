"Manifests, splits, leakage, folders"
import json
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from i2i_mamba_nb.core import CohortError, ConfigError, numpy_rng
from i2i_mamba_nb.data.cohort import Cohort, Subject, check_leakage, read_manifest, require, split_hash, split_patients, write_manifest
from i2i_mamba_nb.data.prepare import ALIASES, modality_name, propose_manifest
from samples import GOOD, build, head, put, raw, shifted, voxels

from i2i_mamba_nb.data.volume import (Volume, VolumeError, write_volume)

# ---- cohorts --------------------------------------------------------------------------------------------------------------------
def test_manifest_round_trip(cohort, tmp_path):
    for place in (cohort.root/'manifest.csv', tmp_path/'elsewhere'/'m.csv'):
        again = read_manifest(write_manifest(place, cohort))
        assert again.modalities == cohort.modalities and split_hash(again) == split_hash(cohort)
        assert [(s.patient, s.split) for s in again.subjects] == [(s.patient, s.split) for s in cohort.subjects]
        assert all(s.paths[m].samefile(t.paths[m]) for s, t in zip(cohort.subjects, again.subjects, strict=True) for m in s.paths)
        side = json.loads(place.with_suffix('.json').read_text())
        assert len(side['sha256']) == 9 and side['simulated'] is False
        assert place.read_text().splitlines()[0] == 'patient,split,PD,T1,T2'
        place.unlink(), place.with_suffix('.json').unlink()

def test_manifest_in_a_linked_folder(cohort, tmp_path):
    (tmp_path/'deep'/'er').mkdir(parents=True)
    (tmp_path/'link').symlink_to(tmp_path/'deep'/'er')
    assert len(read_manifest(write_manifest(tmp_path/'link'/'m.csv', cohort)).subjects) == 3

TABLES = {
    'no file': None, 'empty': '', 'binary': b'\xff\xfe\x00\x00', 'no split column': 'patient,T1\np1,a.nii\n',
    'twice a column': 'patient,split,T1,T1\np1,train,a.nii,a.nii\n',
    'unknown split': 'patient,split,T1\np1,training,a.nii\n', 'ragged': 'patient,split,T1\np1,train\n',
    'no such file': 'patient,split,T1\np1,train,b.nii\n',
    'empty name': 'patient,split,T1\n,train,a.nii\n', 'two splits': 'patient,split,session,T1\np1,train,1,a.nii\np1,test,2,c.nii\n',
    'twice a row': 'patient,split,T1\np1,train,a.nii\np1,train,c.nii\n',
    'same content': 'patient,split,T1\np1,train,a.nii\np2,test,copy.nii\n',
    'semicolons': 'patient;split;T1\np1;train;a.nii\n', 'open quote': 'patient,split,T1\np1,train,"a.nii\n',
}

@pytest.mark.parametrize('name', TABLES)
def test_bad_manifests(tmp_path, name):
    put(tmp_path, GOOD, 'a.nii'), put(tmp_path, GOOD, 'copy.nii'), put(tmp_path, raw(voxels(key=1)), 'c.nii')
    if TABLES[name] is not None: (tmp_path/'m.csv').write_bytes(TABLES[name] if isinstance(TABLES[name], bytes) else TABLES[name].encode())
    with pytest.raises(CohortError) as e: read_manifest(tmp_path/'m.csv')
    assert 'm.csv' in str(e.value) or 'p1' in str(e.value)

@pytest.mark.parametrize('side', ['[]', '3', '{"sha256": 3}', '{"modalities": "T1"}', '{broken'])
def test_bad_sidecars(tmp_path, side):
    put(tmp_path, GOOD, 'a.nii')
    (tmp_path/'m.csv').write_text('patient,split,T1\np1,train,a.nii\n'), (tmp_path/'m.json').write_text(side)
    with pytest.raises((CohortError, ConfigError), match='m.json'): read_manifest(tmp_path/'m.csv')

def test_a_bare_table_is_enough(tmp_path):
    put(tmp_path, GOOD, 'a.nii'), put(tmp_path, raw(voxels(key=1)), 'c.nii')
    (tmp_path/'m.csv').write_bytes('\ufeffpatient, split ,T1,lesion\r\np1,train,a.nii,c.nii\r\n\r\np2,test,c.nii,\r\n'.encode())
    c = read_manifest(tmp_path/'m.csv')
    assert c.modalities == ('T1',) and c.patient('p2').paths == {'T1': tmp_path/'c.nii'} and len(c.split('train')) == 1

def random_rows(k):
    "1 to 12 patients in 1 to 3 sessions with files of their own, and whether a patient is in two splits"
    rng = numpy_rng(0, 'rows', k)
    rows = [(f'p{i}', f's{j}', str(rng.choice(['train', 'validation', 'test']))) for i in range(rng.integers(1,
        13)) for j in range(rng.integers(1, 4))]
    if k % 2: split = {p: s for p, _, s in rows}; rows = [(p, j, split[p]) for p, j, _ in rows]
    return rows, any(len({s for q, _, s in rows if q == p}) > 1 for p, _, _ in rows)

def test_1000_random_manifests_and_no_leak(tmp_path):
    found = 0
    for k in range(1000):
        rows, leak = random_rows(k)
        subjects = tuple(Subject(p, s, {'T1': tmp_path/f'{p}{j}'}, j) for p, j, s in rows)
        c = Cohort(subjects, ('T1',), tmp_path, {'sha256': {f'{p}{j}': f'{p}{j}' for p, j, _ in rows}})
        if leak:
            with pytest.raises(CohortError, match='one split'): check_leakage(c)
        else: assert check_leakage(c).subjects == subjects
        found += leak
    assert 300 < found < 500

def test_the_same_file_under_two_names(cohort, tmp_path):
    copy = tmp_path/'other.nii.gz'
    copy.write_bytes(cohort.patient('p1').paths['T2'].read_bytes())
    stranger = Subject('stranger', 'test', {'T1': copy})
    with pytest.raises(CohortError, match='p1.*other.nii.gz.*stranger'): check_leakage(replace(cohort,
        subjects=(*cohort.subjects, stranger)))
    check_leakage(replace(cohort, subjects=(*cohort.subjects, replace(stranger, split='train'))))

def test_300_random_splits():
    for k in range(300):
        rng = numpy_rng(1, 'split', k)
        names, f = [f'p{i}' for i in range(rng.integers(1, 60))], rng.dirichlet([2, 1, 1])
        split = split_patients(names+names[::2], fractions=f, seed=k)
        assert sorted(split) == sorted(names) and split == split_patients(names[::-1], fractions=f, seed=k)
        if len(names) >= 3: assert set(split.values()) == {'train', 'validation', 'test'}
        for s, share in zip(('train', 'validation', 'test'), f,
            strict=True): assert abs(list(split.values()).count(s)-share*len(names)) <= 2
    assert split_patients(['a']) == {'a': 'train'} and split_patients([]) == {}
    assert len({json.dumps(split_patients(map(str, range(20)), seed=k)) for k in range(9)}) > 5
    for bad in ((.5, .5), (.5, .5, .5), (1.5, -.5, 0), (np.nan, .5, .5)):
        with pytest.raises(ConfigError): split_patients(['a'], fractions=bad)

def test_require(cohort):
    short = replace(cohort.subjects[0], paths={'T1': cohort.subjects[0].paths['T1']})
    lacking = replace(cohort, subjects=(short, *cohort.subjects[1:]))
    with pytest.raises(CohortError, match='T2 of patient p1 .*given T1'): require(lacking, ['T1', 'T2'])
    assert require(lacking, ['T1', 'T2'], 'test') == cohort.split('test')
    with pytest.raises(CohortError, match='no subject'): require(replace(cohort, subjects=()), ['T1'], 'train')
    with pytest.raises(ConfigError, match='validation'): cohort.split('valid')
    with pytest.raises(CohortError, match="'p1'"): cohort.patient('p11')

# ---- folders --------------------------------------------------------------------------------------------------------------------
TREES = {
    'sub-{p}/anat/sub-{p}_{m}.nii.gz': ('T1w', 'T2w', 'FLAIR'), 'sub-{p}/anat/sub-{p}_acq-iso_{m}.nii.gz': ('T1w', 'PDw'),
    'sub-{p}/ses-1/anat/sub-{p}_ses-1_{m}.nii.gz': ('T1w', 'T2w'), '{p}/{m}.nii.gz': ('T1', 'T2', 'PD'), '{p}/{m}.nii': ('t1', 'ct'),
    '{p}/{p}_{m}.nii.gz': ('t1', 't1ce', 't2', 'flair', 'seg'),
    'BraTS-GLI-{p}-000/BraTS-GLI-{p}-000-{m}.nii.gz': ('t1n', 't1c', 't2w', 't2f', 'seg'),
    'IXI-{m}/IXI{p}-Guys-0828-{m}.nii.gz': ('T1', 'T2', 'PD'), 'IXI{p}-HH-1234-{m}.nii.gz': ('T1', 'T2', 'PD'),
    '{m}/{p}.nii.gz': ('T1', 'FLAIR'),
    '{p}_{m}.nii.gz': ('T1', 'T1POST'), '{p}/{m}_N4_brain.nii.gz': ('T1', 'T1POST', 'GOLD_STANDARD'),
}

@pytest.mark.parametrize('tree', TREES)
def test_common_layouts(tmp_path, tree):
    names = TREES[tree]
    for k, (p, m) in enumerate(product(('007', '019'), names)): write_volume(tmp_path/tree.format(p=p, m=m),
        Volume(head((6, 7, 5), k), np.eye(4)))
    c = propose_manifest(tmp_path)
    assert len(c.subjects) == 2 and c.info['unmatched'] == [] and all('07' in s.patient or '19' in s.patient for s in c.subjects)
    assert set(c.subjects[0].paths) == {modality_name(m) for m in names} <= set(ALIASES) and not {'lesion',
        'segmentation'} & set(c.modalities)

def test_a_pattern_and_what_it_leaves(tmp_path):
    build(tmp_path, ('a', 'b'), ('T1', 'T2'), pattern='{p}/{m}_N4_x_N4_y.nii.gz')
    for name in ('notes.txt', 'a/T1_raw.nii.gz', 'b/scan.dcm'): put(tmp_path, GOOD, name)
    (tmp_path/'linked').symlink_to(tmp_path/'a')
    c = propose_manifest(tmp_path, '{patient}/{modality}_N4*.nii.gz', splits=dict(a='train', b='test'))
    assert c.modalities == ('T1', 'T2') and c.info['unmatched'] == ['a/T1_raw.nii.gz', 'b/scan.dcm', 'linked', 'notes.txt']
    assert c.info['grids']['a'] == dict(shape=[24, 28, 13], spacing=c.info['grids']['a']['spacing'], orientation='RAS')

def test_known_words_end_a_patients_name(tmp_path):
    build(tmp_path, ('IXI002-Guys-0828', 'IXI012-HH-1211'), ('T1', 'PD'), pattern='{p}-{m}.nii.gz')
    c = propose_manifest(tmp_path, '{patient}-{modality}.nii.gz')
    assert [s.patient for s in c.subjects] == ['IXI002-Guys-0828', 'IXI012-HH-1211'] and c.modalities == ('PD', 'T1')
    assert propose_manifest(tmp_path, '{patient}-Guys-{session}-{modality}.nii.gz').subjects[0].session == '0828'

def test_refusals_of_prepare(tmp_path):
    build(tmp_path, ('a', 'b'), ('T1', 'T2'))
    for pattern, word in (('{patient}/x.nii.gz', 'modality'), ('{modality}.nii.gz', 'patient'),
        ('{patiant}/{modality}.nii.gz', "'patient'")):
        with pytest.raises(ConfigError, match=word): propose_manifest(tmp_path, pattern)
    with pytest.raises(CohortError, match='a/T1.nii.gz'): propose_manifest(tmp_path, 'q/{patient}/{modality}.nii.gz')
    with pytest.raises(CohortError, match='no files'): propose_manifest(tmp_path/'nothing')
    with pytest.raises(CohortError, match='none for b'): propose_manifest(tmp_path, splits=dict(a='train'))
    with pytest.raises(ConfigError, match='validation'): propose_manifest(tmp_path, splits=dict(a='train', b='valid'))
    put(tmp_path, raw(voxels(key=5)), 'a/t1w.nii.gz')
    with pytest.raises(CohortError, match='(?s)T1.nii.gz.*t1w.nii.gz'): propose_manifest(tmp_path)

def test_prepare_reports_grids_and_gaps(tmp_path):
    build(tmp_path, ('a', 'b'), ('T1', 'T2'))
    write_volume(tmp_path/'a'/'T2.nii.gz', Volume(head(key=77), shifted(0)))
    (tmp_path/'b'/'T2.nii.gz').unlink()
    info = propose_manifest(tmp_path).info
    assert list(info['mismatched']) == ['a'] and info['mismatched']['a'][1].endswith('T2.nii.gz') and info['missing'] == {'b': ['T2']}
    put(tmp_path, b'', 'b/T1.nii.gz')
    with pytest.raises(VolumeError, match='T1.nii.gz'): propose_manifest(tmp_path)
