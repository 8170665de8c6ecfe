"Manifests, splits, leakage"
import json
import random
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
from samples import AFFINES, GOOD, put, raw, turned, voxels

from i2i_mamba_nb.core import CohortError, ConfigError, numpy_rng, sha256
from i2i_mamba_nb.data.cohort import (
    Cohort,
    Subject,
    check_leakage,
    content_hash,
    file_hashes,
    hash_path,
    is_blank,
    natural_key,
    read_manifest,
    require,
    split_hash,
    split_patients,
    write_manifest,
)
from i2i_mamba_nb.data.volume import Volume, VolumeError, from_canonical, to_canonical, write_volume
from i2i_mamba_nb.measure.intensity import Intensity

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

@pytest.mark.parametrize('side', ['[]', '3', '{"sha256": 3}', '{"modalities": "T1"}', '{broken', '{"intensity": []}', '{"grids": 3}',
    '{"intensity": {"p1": {"T1": 3}}}', '{"intensity": {"p1": []}}', '{"intensity": {"p1": {"T1": {"low": 2, "high": 1}}}}'])
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

def test_300_random_copies(tmp_path):
    "Files of 2 to 9 patients, one of them a copy of another's in every second cohort: found exactly where the two are in different splits"
    found = 0
    for k in range(300):
        rng = random.Random(k)
        names = [f'p{i}' for i in range(rng.randint(2, 9))]
        split = {n: rng.choice(['train', 'validation', 'test']) for n in names}
        a, b = rng.sample(names, 2)
        hashes = {f'{n}{m}': a+m if n == b and k % 2 else n+m for n in names for m in ('T1', 'T2', 'mask')}
        hashes |= {f'{n}mask': 'empty' for n in names}
        subjects = tuple(Subject(n, split[n], {m: tmp_path/f'{n}{m}' for m in ('T1', 'T2', 'mask')}) for n in names)
        c = Cohort(subjects, ('T1', 'T2'), tmp_path, dict(sha256=hashes))
        if leak := k % 2 and split[a] != split[b]:
            with pytest.raises(CohortError, match='the same content'): check_leakage(c)
        else: check_leakage(c)
        found += bool(leak)
    assert 60 < found < 130

@pytest.mark.parametrize('order, flips', AFFINES[::5])
def test_one_scan_in_two_files(tmp_path, order, flips):
    "Voxels stored in another axis order, type and packing under another name: the files differ, the images do not"
    head = np.round(voxels())
    ras, _ = to_canonical(Volume(head, turned((0, 1, 2), (1, 1, 1))))
    other = Volume(from_canonical(ras.data, nib.io_orientation(turned(order, flips)).astype(int)), turned(order, flips))
    write_volume(tmp_path/'a.nii.gz', Volume(head, turned((0, 1, 2), (1, 1, 1)))), write_volume(tmp_path/'b.nii', other)
    rows = tuple(Subject(p, s, {'T1': tmp_path/f}) for p, s, f in (('ann', 'train', 'a.nii.gz'), ('bob', 'test', 'b.nii')))
    c = Cohort(rows, ('T1',), tmp_path)
    assert content_hash(tmp_path/'a.nii.gz') == content_hash(tmp_path/'b.nii') and check_leakage(c)
    with pytest.raises(CohortError, match='a.nii.gz .ann, train.: given the same content as .*b.nii .bob, test.'):
        check_leakage(c, voxels=True)
    write_volume(tmp_path/'b.nii', other._replace(data=other.data+(np.arange(other.data.size).reshape(other.data.shape) == 5)))
    assert check_leakage(c, voxels=True).subjects == rows
    (tmp_path/'b.nii').write_bytes(b'x'*400)
    with pytest.raises(VolumeError, match='b.nii'): check_leakage(c, voxels=True)

def test_blank_images_show_nobody(tmp_path, monkeypatch):
    from i2i_mamba_nb.data import cohort as module
    reads, real = [], module.read_volume
    monkeypatch.setattr(module, 'read_volume', lambda p: reads.append(p.name) or real(p))
    def put_volume(name, data, affine=None): return write_volume(tmp_path/name, Volume(data, np.eye(4) if affine is None else affine))
    for k, fill in (('z', 0), ('o', -1024)):
        for p in 'abc': put_volume(f'{k}{p}.nii', np.full((6, 5, 4), fill, np.float32))
    for p, key in zip('abc', (1, 2, 1), strict=True): put_volume(f'{p}.nii', voxels((6, 5, 4), key))
    def c(*names): return Cohort(tuple(Subject(p, s, {f'M{k}': tmp_path/n.format(p) for k, n in enumerate(names)})
        for p, s in zip('abc', ('train', 'train', 'test'), strict=True)), ('M0', 'M1'), tmp_path)
    assert check_leakage(c('z{}.nii', 'o{}.nii')) and sorted(reads) == ['oc.nii', 'zc.nii']     # one look per content, on collision only
    reads.clear()
    with pytest.raises(CohortError, match='the same content as .*c.nii'): check_leakage(c('z{}.nii', '{}.nii'))
    assert sorted(reads) == ['c.nii', 'zc.nii']
    put_volume('zc.nii', np.zeros((6, 5, 4), np.float32), np.diag([-1., 1, 1, 1]))         # other bytes, equal voxels
    two = Cohort(tuple(Subject(p, s, {'M0': tmp_path/f'z{p}.nii'}) for p, s in (('a', 'train'), ('c', 'test'))), ('M0',), tmp_path)
    assert check_leakage(two, voxels=True)
    (tmp_path/'za.nii').write_bytes(b'no volume'), (tmp_path/'zc.nii').write_bytes(b'no volume')
    with pytest.raises(CohortError, match='the same content'): check_leakage(two)               # what cannot be read is not blank
    almost = np.zeros((6, 5, 4), np.float32)
    almost[5, 4, 3] = 1e-6
    assert is_blank(tmp_path/'ob.nii') and not is_blank(put_volume('almost.nii', almost)) and not is_blank(tmp_path/'none.nii')

def test_hash_of_a_folder(tmp_path):
    for name, texts in dict(a='xy', b='yx', c='xx', d='x').items():
        (tmp_path/name).mkdir()
        for k, text in enumerate(texts): (tmp_path/name/f'{name}{k}').write_text(text)
    h = {n: hash_path(tmp_path/n) for n in 'abcd'}
    assert h['a'] == h['b'] and len(set(h.values())) == 3 and hash_path(tmp_path/'a'/'a0') == sha256(tmp_path/'a'/'a0')
    rows = (Subject('ann', 'train', {'CT': tmp_path/'a'}), Subject('bob', 'test', {'CT': tmp_path/'b'}))
    with pytest.raises(CohortError, match='the same content'): check_leakage(Cohort(rows, ('CT',), tmp_path))
    for f in (tmp_path/'b').iterdir(): f.unlink()
    with pytest.raises(CohortError, match='CT of patient bob.*empty folder'): file_hashes(Cohort(rows, ('CT',), tmp_path))

def test_folders_notes_sessions_and_intensity_survive(tmp_path):
    (tmp_path/'series').mkdir(), put(tmp_path/'series', GOOD, '1.dcm'), put(tmp_path, raw(voxels(key=1)), 'c.nii')
    maps = {'T1': Intensity(-3.5, 812.25), 'CT': Intensity(-1024., 3071., True, 'hounsfield')}
    rows = (Subject('ann', 'train', {'T1': tmp_path/'c.nii', 'CT': tmp_path/'series'}, 'v 1', maps, 'moved; site "A", ä'),
        Subject('bob', 'test', {'T1': tmp_path/'c.nii'}))
    info = dict(grids={'ann v 1': {}}, geometry=[1, {'a': None}])
    c = Cohort((rows[0], replace(rows[1], split='train')), ('CT', 'T1'), tmp_path, info)
    again = read_manifest(write_manifest(tmp_path/'sub'/'m.csv', c))
    assert again.info['geometry'] == [1, {'a': None}] and again.info['grids'] == {'ann v 1': {}}
    assert again.subjects[0].intensity == maps and again.subjects[0].notes == rows[0].notes and again.subjects[0].key == 'ann v 1'
    assert again.subjects[1].intensity == {} and again.subjects[1].notes == '' and again.subjects[0].paths['CT'].is_dir()
    text = (tmp_path/'sub'/'m.csv').read_bytes(), (tmp_path/'sub'/'m.json').read_bytes()
    write_manifest(tmp_path/'sub'/'m.csv', again)
    assert text == ((tmp_path/'sub'/'m.csv').read_bytes(), (tmp_path/'sub'/'m.json').read_bytes())
    bare = replace(again, subjects=tuple(replace(s, intensity={}) for s in again.subjects))
    assert 'intensity' not in read_manifest(write_manifest(tmp_path/'sub'/'m.csv', bare)).info

def test_natural_order():
    names = [f'p{k}' for k in range(1, 30)]+['P5b', 'p', 'p05', 'IXI012', 'IXI2', 'é', '']
    want = sorted(names, key=natural_key)
    for k in range(20): assert sorted(random.Random(k).sample(names, len(names)), key=natural_key) == want
    assert [n for n in want if n in ('p1', 'p2', 'p10', 'p29')] == ['p1', 'p2', 'p10', 'p29'] and want.index('IXI2') < want.index('IXI012')

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
