"Layouts of archives, proposals, the papers' splits, summary and contact sheet"
from collections import Counter
from itertools import product
from pathlib import Path

import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np
import pytest
from samples import AFFINES, GOOD, build, head, put, raw, shifted, turned, voxels

from i2i_mamba_nb.core import CohortError, ConfigError
from i2i_mamba_nb.data.archives import (
    ALIASES,
    LAYOUTS,
    PAPER_SPLITS,
    cohort_summary,
    contact_sheet,
    fields_of,
    find_volumes,
    layout_of,
    modality_name,
    paper_split,
    propose_manifest,
)
from i2i_mamba_nb.data.cohort import SPLITS, Cohort, Subject, check_leakage, hash_path, read_manifest, write_manifest
from i2i_mamba_nb.data.presets import preset
from i2i_mamba_nb.data.volume import Volume, VolumeError, from_canonical, read_grid, read_volume, write_volume

# ---- folders --------------------------------------------------------------------------------------------------------------------
TREES = {
    'sub-{p}/anat/sub-{p}_{m}.nii.gz': ('T1w', 'T2w', 'FLAIR'), 'sub-{p}/anat/sub-{p}_acq-iso_{m}.nii.gz': ('T1w', 'PDw'),
    'sub-{p}/ses-1/anat/sub-{p}_ses-1_{m}.nii.gz': ('T1w', 'T2w'), '{p}/{m}.nii.gz': ('T1', 'T2', 'PD'), '{p}/{m}.nii': ('t1', 'ct'),
    '{p}/{p}_{m}.nii.gz': ('t1', 't1ce', 't2', 'flair', 'seg'), '{p}/{p}-{m}.mha': ('mr', 'ct', 'mask'),
    'BraTS-GLI-{p}-000/BraTS-GLI-{p}-000-{m}.nii.gz': ('t1n', 't1c', 't2w', 't2f', 'seg'),
    'IXI-{m}/IXI{p}-Guys-0828-{m}.nii.gz': ('T1', 'T2', 'PD'), 'IXI{p}-HH-1234-{m}.nii.gz': ('T1', 'T2', 'PD'),
    '{m}/{p}.nii.gz': ('T1', 'FLAIR'), '{p}/{m}.nrrd': ('T1', 'T2'), '{p}/{m}.mgz': ('T1', 'T2'),
    '{p}_{m}.nii.gz': ('T1', 'T1POST'), '{p}/{m}_N4_brain.nii.gz': ('T1', 'T1POST', 'GOLD_STANDARD'),
}

@pytest.mark.parametrize('tree', TREES)
def test_common_layouts(tmp_path, tree):
    names = TREES[tree]
    for k, (p, m) in enumerate(product(('007', '019'), names)):
        write_volume(tmp_path/tree.format(p=p, m=m), Volume(head((6, 7, 5), k), np.eye(4)))
    c = propose_manifest(tmp_path)
    assert len(c.subjects) == 2 and c.info['unmatched'] == [] and all('07' in s.patient or '19' in s.patient for s in c.subjects)
    assert set(c.subjects[0].paths) == {modality_name(m) for m in names} <= set(ALIASES)
    assert not {'lesion', 'segmentation', 'mask'} & set(c.modalities)

BRATS = ('t1', 't1ce', 't2', 'flair', 'seg')
ARCHIVES = {    # layout -> (paths, patients, sessions, notes)
    'ixi': ([f'IXI-{m}/{p}-{m}.nii.gz' for p in ('IXI002-Guys-0828', 'IXI012-HH-1211', 'IXI100-IOP-0999') for m in ('T1', 'T2', 'PD')],
        ['IXI002', 'IXI012', 'IXI100'], [''], ['site Guys', 'site HH', 'site IOP']),
    'brats2018': ([f'{g}/{p}_1/{p}_1_{m}.nii.gz' for g, p in (('HGG', 'Brats18_2013_2'), ('HGG', 'Brats18_CBICA_AAB'),
        ('LGG', 'Brats18_TCIA10_103')) for m in BRATS], ['Brats18_2013_2', 'Brats18_CBICA_AAB', 'Brats18_TCIA10_103'], ['1'], ['']),
    'brats2020': ([f'MICCAI_BraTS2020_TrainingData/{p}/{p}_{m}.nii' for p in ('BraTS20_Training_001', 'BraTS20_Training_355') for m in BRATS
        if (p[-3:], m) != ('355', 'seg')]+['MICCAI_BraTS2020_TrainingData/BraTS20_Training_355/W39_1998.09.19_Segm.nii'],
        ['BraTS20_Training_001', 'BraTS20_Training_355'], [''], ['']),
    'brats2021': ([f'BraTS2021_Training_Data/{p}/{p}_{m}.nii.gz' for p in ('BraTS2021_00000', 'BraTS2021_01666') for m in BRATS],
        ['BraTS2021_00000', 'BraTS2021_01666'], [''], ['']),
    'brats2023': ([f'ASNR-MICCAI-BraTS2023-GLI-Challenge-TrainingData/{p}/{p}-{m}.nii.gz' for p in ('BraTS-GLI-00000-000',
        'BraTS-GLI-00005-000', 'BraTS-GLI-00005-001') for m in ('t1n', 't1c', 't2w', 't2f', 'seg')],
        ['BraTS-GLI-00000', 'BraTS-GLI-00005'], ['000', '001'], ['']),
    'gold_atlas': ([f'{p}/{m}.nii.gz' for p in ('1_01_P', '2_03_P', '3_04_P') for m in ('T1', 'T2', 'CT')], ['1_01_P', '2_03_P', '3_04_P'],
        [''], ['']),
    'synthrad2023': ([f'Task1/{r}/{p}/{m}.nii.gz' for r, p in (('brain', '1BA001'), ('pelvis', '1PC095')) for m in ('mr', 'ct', 'mask')]
        + [f'Task2/brain/2BB012/{m}.nii.gz' for m in ('cbct', 'ct', 'mask')], ['1BA001', '1PC095', '2BB012'], [''], ['']),
    'synthrad2025': ([f'synthRAD2025_Task1_Train/Task1/{p[1:3]}/{p}/{m}.mha' for p in ('1ABA005', '1HND012', '1THB006')
        for m in ('mr', 'ct', 'mask')], ['1ABA005', '1HND012', '1THB006'], [''], ['']),
}

@pytest.mark.parametrize('name', ARCHIVES)
def test_archives_as_unpacked(tmp_path, name):
    paths, patients, sessions, notes = ARCHIVES[name]
    for k, p in enumerate(paths): write_volume(tmp_path/p, Volume(head((6, 7, 5), k), np.eye(4)))
    put(tmp_path, b'a,b', 'survival_info.csv'), put((tmp_path/paths[0]).parent, b'x', 'readme.txt')
    assert layout_of(tmp_path) == name
    c = propose_manifest(tmp_path)
    assert c.info['layout'] == name and list(dict.fromkeys(s.patient for s in c.subjects)) == patients
    assert {s.session for s in c.subjects} == set(sessions) and [s.notes for s in c.subjects][:len(notes)] == notes
    left = {'survival_info.csv', f'{Path(paths[0]).parent}/readme.txt'.removeprefix('./')}
    assert set(c.info['unmatched']) == left and sum(len(s.paths) for s in c.subjects) == len(paths)
    assert all(len({s.split for s in c.subjects if s.patient == p}) == 1 for p in patients)
    again = read_manifest(write_manifest(tmp_path/'manifest.csv', c))
    assert [(s.key, s.split, s.notes) for s in again.subjects] == [(s.key, s.split, s.notes) for s in c.subjects]
    if len(patients) == 3: assert {s.split for s in c.subjects} == set(SPLITS)

@pytest.mark.parametrize('name', ARCHIVES)
def test_archives_flat_or_deeper_or_in_other_suffixes(name):
    for path in ARCHIVES[name][0]:
        for suffix in ('.nii', '.nii.gz', '.mha', '.nrrd', '.NII.GZ'):
            stem = path[:-7] if path.endswith('.nii.gz') else path[:path.rindex('.')]
            assert fields_of(f'disk/{stem}{suffix}', name)['patient'] == fields_of(path, name)['patient']
        first = [n for n in LAYOUTS if fields_of(path, n)][0]
        assert first == name

NEVER = {
    'ixi': ('IXI012-HH-1211-DTI-00.nii.gz', 'IXI012-HH-1211-MRA.nii.gz', 'IXI012-HH-T1.nii.gz', 'XIX012-HH-1211-T1.nii.gz',
        'IXI012-HH-1211-T1.txt'),
    'brats2018': ('BraTS20_Training_001/BraTS20_Training_001_t1.nii.gz', 'Brats18_2013_2_1/Brats18_2013_2_1_pred.nii.gz'),
    'brats2020': ('BraTS20_Training_001/BraTS20_Training_002_t9.nii', 'BraTS20_Training_355/W40_1998.09.19_Segm.nii'),
    'brats2023': ('BraTS-GLI-00000-000/BraTS-GLI-00000-000-t9.nii.gz', 'BraTS-GLI-00000-000-t1c/x.nii.gz'),
    'gold_atlas': ('4_01_P/T1.nii.gz', '1_1_P/T1.nii.gz', '1_01_P/T9.nii.gz'),
    'synthrad2023': ('1XA001/mr.nii.gz', '3BA001/mr.nii.gz', '1BA01/mr.nii.gz', '1BA001/mr_deformed.nii.gz'),
    'synthrad2025': ('1BA001/mr.mha', '1ABA05/mr.mha', '1ABA005/ct_deformed.mha'),
}

@pytest.mark.parametrize('name', NEVER)
def test_what_a_layout_leaves(name):
    for path in NEVER[name]: assert fields_of(path, name) is None, path

def test_words_of_a_name_never_decide_alone():
    "Hospital, number, grade and time point are no modality and no part of the patient"
    assert fields_of('T1/IXI012-HH-1211-T2.nii.gz', 'ixi') == dict(patient='IXI012', site='HH', modality='T2')
    assert fields_of('Brats18_T1_2_7/Brats18_T1_2_7_t2.nii.gz', 'brats2018') == dict(patient='Brats18_T1_2', session='7', modality='t2')
    one, two = (fields_of(f'BraTS-GLI-00005-00{k}/BraTS-GLI-00005-00{k}-t1c.nii.gz', 'brats2023') for k in (0, 1))
    assert one['patient'] == two['patient'] and (one['session'], two['session']) == ('000', '001')

def test_a_pattern_and_what_it_leaves(tmp_path):
    build(tmp_path, ('a', 'b'), ('T1', 'T2'), pattern='{p}/{m}_N4_x_N4_y.nii.gz')
    for name in ('notes.txt', 'a/T1_raw.nii.gz', 'b/scan.dat'): put(tmp_path, GOOD, name)
    (tmp_path/'linked').symlink_to(tmp_path/'a')
    c = propose_manifest(tmp_path, '{patient}/{modality}_N4*.nii.gz', splits=dict(a='train', b='test'))
    assert c.modalities == ('T1', 'T2') and c.info['unmatched'] == ['a/T1_raw.nii.gz', 'b/scan.dat', 'linked', 'notes.txt']
    assert c.info['grids']['a'] == dict(shape=[24, 28, 13], spacing=c.info['grids']['a']['spacing'], orientation='RAS')

def test_known_words_end_a_patients_name(tmp_path):
    build(tmp_path, ('IXI002-Guys-0828', 'IXI012-HH-1211'), ('T1', 'PD'), pattern='{p}-{m}.nii.gz')
    c = propose_manifest(tmp_path, '{patient}-{modality}.nii.gz')
    assert [s.patient for s in c.subjects] == ['IXI002-Guys-0828', 'IXI012-HH-1211'] and c.modalities == ('PD', 'T1')
    assert propose_manifest(tmp_path, '{patient}-Guys-{session}-{modality}.nii.gz').subjects[0].session == '0828'
    assert propose_manifest(tmp_path, '{patient}-{site}-{session}-{modality}').subjects[1].notes == 'site HH'

def test_refusals_of_propose(tmp_path):
    build(tmp_path, ('a', 'b'), ('T1', 'T2'))
    for pattern, word in (('{patient}/x.nii.gz', 'modality'), ('{modality}.nii.gz', 'patient'),
        ('{patiant}/{modality}.nii.gz', "'patient'")):
        with pytest.raises(ConfigError, match=word): propose_manifest(tmp_path, pattern)
    with pytest.raises(CohortError, match='a/T1.nii.gz'): propose_manifest(tmp_path, 'q/{patient}/{modality}.nii.gz')
    with pytest.raises(CohortError, match='no files'): propose_manifest(tmp_path/'nothing')
    with pytest.raises(CohortError, match='none for b'): propose_manifest(tmp_path, splits=dict(a='train'))
    with pytest.raises(ConfigError, match='validation'): propose_manifest(tmp_path, splits=dict(a='train', b='valid'))
    with pytest.raises(ConfigError, match='both'): propose_manifest(tmp_path, '{patient}/{modality}', layout='ixi')
    with pytest.raises(ConfigError, match="Did you mean 'brats2018'"): propose_manifest(tmp_path, layout='brats18')
    with pytest.raises(CohortError, match='the layout brats2018'): propose_manifest(tmp_path, layout='brats2018')
    put(tmp_path, raw(voxels(key=5)), 'a/t1w.nii.gz')
    with pytest.raises(CohortError, match='(?s)T1.nii.gz.*t1w.nii.gz'): propose_manifest(tmp_path)

def test_propose_reports_grids_and_gaps(tmp_path):
    build(tmp_path, ('a', 'b'), ('T1', 'T2'))
    write_volume(tmp_path/'a'/'T2.nii.gz', Volume(head(key=77), shifted(0)))
    (tmp_path/'b'/'T2.nii.gz').unlink()
    info = propose_manifest(tmp_path).info
    assert info['mismatched'] == {'a': ['a/T1.nii.gz', 'a/T2.nii.gz']} and info['missing'] == {'b': ['T2']}
    assert list(info['grids']['a']['other']) == ['T2'] and 'other' not in info['grids']['b']
    put(tmp_path, b'', 'b/T1.nii.gz')
    with pytest.raises(VolumeError, match='T1.nii.gz'): propose_manifest(tmp_path)

def test_pairs_count_once(tmp_path):
    for p, m in product('ab', ('T1', 'T2')): nib.save(nib.Nifti1Pair(head((6, 7, 5), len(p+m)), np.eye(4)), tmp_path/f'{p}_{m}.hdr')
    nib.save(nib.Nifti1Pair(head((6, 7, 5), 9), np.eye(4)), tmp_path/'c_T1.img')
    assert find_volumes(tmp_path)[0] == ['a_T1.hdr', 'a_T2.hdr', 'b_T1.hdr', 'b_T2.hdr', 'c_T1.hdr'] and find_volumes(tmp_path)[1] == []

def test_one_person_in_a_folder(tmp_path):
    build(tmp_path/'cstar', ('',), ('T1', 'T2', 'FLAIR'), pattern='{m}.nii.gz')
    put(tmp_path/'cstar', b'MIT', 'LICENSE')
    c = propose_manifest(tmp_path/'cstar')
    assert [(s.patient, sorted(s.paths)) for s in c.subjects] == [('cstar', ['FLAIR', 'T1', 'T2'])] and c.info['unmatched'] == ['LICENSE']
    assert layout_of(tmp_path/'cstar') == 'folders' == propose_manifest(tmp_path/'cstar', layout='folders').info['layout']
    assert [s.patient for s in propose_manifest(tmp_path).subjects] == ['cstar']

def test_two_visits_never_meet_in_two_splits(tmp_path):
    for k, (p, v) in enumerate(product(range(12), range(3))):
        name = f'BraTS-GLI-{p:05}-{v:03}'
        for j, m in enumerate(('t1n', 't2w')): write_volume(tmp_path/name/f'{name}-{m}.nii.gz', Volume(head((4, 5, 3), 2*k+j), np.eye(4)))
    for seed in range(5):
        c = propose_manifest(tmp_path, seed=seed)
        assert len(c.subjects) == 36
        assert all(len({x.split for x in c.subjects if x.patient == p.patient}) == 1 for p in c.subjects)

# ---- simulated archives ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('name, edition, size', [('ixi-like', None, 'paper'), ('brats-like', '2018', 'paper'),
    ('brats-like', '2020', 'paper'), ('brats-like', '2021', 'demo'), ('brats-like', '2023', 'paper'), ('pelvis-like', None, 'paper'),
    ('synthrad-like', '2023', 'demo'),
    ('synthrad-like', '2025', 'paper')])
def test_every_file_of_a_preset_is_read_by_its_layout(name, edition, size):
    plan = preset(name, size=size, **({'edition': edition} if edition else {}))
    for person in plan.patients:
        for m, path in person.files.items():
            found = fields_of(path, plan.layout)
            assert (found['patient'], modality_name(found['modality'])) == (person.patient, dict(seg='segmentation').get(m, m)), path
            assert next(n for n in LAYOUTS if fields_of(path, n)) == plan.layout

def test_a_simulated_archive_says_so(tmp_path):
    plan = preset('synthrad-like', edition='2025')
    plan.write(tmp_path, [p.patient for p in plan.patients[:2]])
    c = propose_manifest(tmp_path)
    assert c.info['simulated'] is True and c.info['layout'] == 'synthrad2025' and c.modalities == ('CT', 'MR')
    assert read_manifest(write_manifest(tmp_path/'m.csv', c)).info['simulated'] is True
    for s in c.subjects: write_volume(s.paths['CT'], Volume(read_volume(s.paths['CT']).data, np.eye(4)))
    for s in c.subjects: s.paths['MR'].unlink(), s.paths['mask'].unlink()
    assert propose_manifest(tmp_path).info['simulated'] is False

# ---- DICOM ----------------------------------------------------------------------------------------------------------------------
def dicom(folder, description, modality='MR', n=3, key=0, first=1):
    "A series of n slices of 6 x 5 pixels, written by pydicom"
    pydicom = pytest.importorskip('pydicom')
    folder.mkdir(parents=True, exist_ok=True)
    data, uid = np.random.default_rng(key).integers(0, 3000, (n, 6, 5)).astype('u2'), f'1.2.{key+1}'
    for k in range(n):
        ds = pydicom.dataset.Dataset()
        ds.file_meta = pydicom.dataset.FileMetaDataset()
        ds.file_meta.TransferSyntaxUID, ds.file_meta.MediaStorageSOPClassUID = '1.2.840.10008.1.2.1', pydicom.uid.MRImageStorage
        ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = f'{uid}.{k+1}'
        ds.SOPClassUID, ds.SeriesInstanceUID, ds.Modality, ds.SeriesDescription = pydicom.uid.MRImageStorage, uid, modality, description
        ds.ImagePositionPatient, ds.ImageOrientationPatient, ds.PixelSpacing = [0, 0, 2.5*k], [1, 0, 0, 0, 1, 0], [.9, 1.1]
        ds.Rows, ds.Columns, ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 6, 5, 16, 12, 11, 0
        ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelData = 1, 'MONOCHROME2', data[k].tobytes()
        ds.save_as(folder/f'{first+n-1-k:04}.dcm', enforce_file_format=True)
    return data

def test_gold_atlas_as_unpacked(tmp_path):
    "All series of a patient mixed in one folder: named by their descriptions, the deformed CT taken, the rest listed"
    for j, p in enumerate(('1_01_P', '2_03_P', '3_03_P')):
        for k, (text, kind) in enumerate((('t1_tse_tra', 'MR'), ('T2 frFSE', 'MR'), ('CT planning', 'CT'), ('CTtoMR', 'CT'))):
            dicom(tmp_path/p, text, kind, key=10*j+k, first=10*k)
    c = propose_manifest(tmp_path)
    assert c.info['layout'] == 'gold_atlas' and c.modalities == ('CT', 'T1', 'T2') and len(c.subjects) == 3
    assert c.info['unmatched'] == [f"{p}: series 'CT planning' (CT, 3 images)" for p in ('1_01_P', '2_03_P', '3_03_P')]
    again = read_manifest(write_manifest(tmp_path/'m.csv', c))
    first, last = again.patient('1_01_P').paths['T1'], tmp_path/'1_01_P'/'0002.dcm'
    before = hash_path(first)
    last.write_bytes(last.read_bytes()[:-2]+b'\x07\x07')
    assert first.name == '0000.dcm' and hash_path(first) != before
    assert hash_path(again.patient('1_01_P').paths['T2']) in c.info['sha256'].values()
    want = np.random.default_rng(13).integers(0, 3000, (3, 6, 5))
    v = read_volume(again.patient('2_03_P').paths['CT'])
    assert v.shape == (5, 6, 3) and np.array_equal(np.sort(v.data.ravel()), np.sort(want.ravel()))
    assert cohort_summary(c)['splits'][0]['volumes'] == 3*len(c.split('train')) and len(contact_sheet(c, n=3).axes) == 9
    plt.close('all')

def test_a_folder_per_series(tmp_path):
    for j, p in enumerate(('p1', 'p2')):
        for k, (d, text) in enumerate(dict(T1='anything', SER0002='t2_tse', scout='loc').items()): dicom(tmp_path/p/d, text, key=10*j+k)
    c = propose_manifest(tmp_path)
    assert c.info['layout'] == 'folders' and [sorted(s.paths) for s in c.subjects] == [['T1', 'T2']]*2
    assert c.subjects[0].paths['T2'] == tmp_path/'p1'/'SER0002' and c.info['unmatched'] == ["p1/scout: series 'loc' (MR, 3 images)",
        "p2/scout: series 'loc' (MR, 3 images)"]
    assert read_grid(c.subjects[0].paths['T1']).shape == (5, 6, 3) and len(c.info['sha256']) == 4
    assert read_manifest(write_manifest(tmp_path/'m.csv', c)).subjects[1].paths['T1'].samefile(tmp_path/'p2'/'T1')

def test_series_are_never_guessed(tmp_path):
    dicom(tmp_path/'p1'/'T2', 'a', key=1), dicom(tmp_path/'p1'/'T2', 'b', key=2, first=20)
    with pytest.raises(VolumeError, match='(?s)1.2.2 .a, MR, 3 images.*1.2.3 .b, MR'): propose_manifest(tmp_path)
    for k, text in enumerate(('t2 one', 't2 two', 't1'), 3): dicom(tmp_path/'q'/'p1', text, key=k, first=20*k)
    c = propose_manifest(tmp_path/'q')
    assert sorted(c.subjects[0].paths) == ['T1'] and [u[:9] for u in c.info['unmatched']] == ['p1: serie']*2

def test_a_copied_series_is_a_leak(tmp_path):
    for p in ('p1', 'p2'): dicom(tmp_path/p/'T1', 'x', key=1, first=len(p)+int(p[1]))
    c = propose_manifest(tmp_path, splits=dict(p1='train', p2='train'))
    with pytest.raises(CohortError, match='the same content'):
        check_leakage(Cohort((c.subjects[0], Subject('p2', 'test', c.subjects[1].paths)), ('T1',), tmp_path))

# ---- splits of the papers -------------------------------------------------------------------------------------------------------
def crowd(n, modalities, lacking=(), sessions=1):
    paths = lambda k, v: {m: Path(f'p{k}-{v}-{m}') for m in modalities if (k, m) not in lacking}
    visits = [(k, v) for k in range(n, 0, -1) for v in range(sessions, 0, -1)]
    rows = tuple(Subject(f'p{k}', 'test', paths(k, v), str(v) if sessions > 1 else '') for k, v in visits)
    return Cohort(rows, tuple(modalities), Path('.'), dict(sha256={str(p): str(p) for s in rows for p in s.paths.values()}))

COUNTS = {'i2i-mamba-ixi': (25, 10, 18), 'i2i-mamba-pelvis': (9, 2, 4), 'syndiff-ixi': (25, 5, 10), 'syndiff-pelvis': (9, 2, 4),
    'mm2ct-pelvis': (9, 2, 4), 'hmf-mambainr-brats2020': (168, 24, 48), 'hmf-mambainr-ixi': (42, 6, 12), 'cravim-ixi': (25, 5, 10),
    'cravim-brats2018': (25, 5, 10), 'cola-diff-brats2018': (190, 40, 55), 'cola-diff-ixi': (140, 25, 35)}

@pytest.mark.parametrize('name', COUNTS)
def test_paper_splits(name):
    record, total = PAPER_SPLITS[name], sum(COUNTS[name])
    lacking = {(k, record.modalities[0]) for k in (2, 11)} | {(5, record.modalities[-1])}
    everything = crowd(total+3+7, (*record.modalities, 'extra'), lacking)
    c = paper_split(everything, name)
    assert tuple(len(c.split(s)) for s in SPLITS) == COUNTS[name] and c.modalities == (*record.modalities, 'extra')
    order = [int(s.patient[1:]) for s in c.subjects]
    assert order == [k for k in range(1, total+4) if k not in (2, 5, 11)]
    assert c.info['paper_split'] == dict(name=name, left_out=10, **record._asdict()) and record.source and record.archive in LAYOUTS
    with pytest.raises(CohortError, match=f'given {total-1} of {total+2} with .*expected {total} '):
        paper_split(crowd(total+2, record.modalities, lacking), name)

def test_paper_splits_take_one_visit_of_each():
    c = paper_split(crowd(15, ('T1', 'T2', 'CT'), sessions=3), 'mm2ct-pelvis')
    assert len(c.subjects) == 15 and {s.session for s in c.subjects} == {'1'} and c.info['paper_split']['left_out'] == 0
    with pytest.raises(ConfigError, match="Did you mean 'mm2ct-pelvis'"): paper_split(c, 'mm2ct')

def test_paper_splits_forget_who_is_left_out():
    c = crowd(17, ('T1', 'T2', 'CT'), {(4, 'T2')})
    moved = {'p17': ['a', 'b'], 'p1': ['c', 'd']}
    c.info.update(grids={s.key: {} for s in c.subjects}, missing={'p4': ['T2']}, mismatched=moved, layout='x')
    info = paper_split(c, 'mm2ct-pelvis').info
    assert set(info['grids']) == {f'p{k}' for k in range(1, 17) if k != 4} and len(info['sha256']) == 45
    assert info['missing'] == {} and info['mismatched'] == {'p1': ['c', 'd']} and info['layout'] == 'x'

def test_every_paper_has_its_splits():
    assert {r.paper for r in PAPER_SPLITS.values()} == {'I2I-Mamba', 'SynDiff', 'MM2CT', 'HMF-MambaINR', 'CRAViM', 'CoLa-Diff'}
    slices = {n: r.slices for n, r in PAPER_SPLITS.items() if r.slices}
    assert set(PAPER_SPLITS) == set(COUNTS) and slices == {'i2i-mamba-ixi': 100, 'i2i-mamba-pelvis': 90, 'syndiff-ixi': 100,
        'syndiff-pelvis': 90, 'mm2ct-pelvis': 90, 'hmf-mambainr-brats2020': 60, 'hmf-mambainr-ixi': 100}

# ---- summary and contact sheet --------------------------------------------------------------------------------------------------
def test_summary_counts_everything(tmp_path):
    build(tmp_path, ('a', 'b', 'c', 'd'), ('T1', 'T2', 'seg'))
    (tmp_path/'b'/'T2.nii.gz').unlink(), (tmp_path/'c'/'seg.nii.gz').unlink()
    write_volume(tmp_path/'d'/'T2.nii.gz', Volume(head((9, 8, 7)), np.diag([2., 2, 3, 1])))
    c = propose_manifest(tmp_path, splits=dict(a='train', b='train', c='validation', d='test'))
    for cohort in (c, Cohort(c.subjects, c.modalities, c.root)):
        s = cohort_summary(cohort)
        rows = (('train', 2, 2, 5), ('validation', 1, 1, 2), ('test', 1, 1, 3))
        assert s['splits'] == [dict(zip(('split', 'patients', 'subjects', 'volumes'), r, strict=True)) for r in rows]
        assert s['modalities'] == [dict(modality='T1', kind='image', train=2, validation=1, test=1, missing=0),
            dict(modality='T2', kind='image', train=1, validation=1, test=1, missing=1),
            dict(modality='segmentation', kind='label', train=2, validation=0, test=1, missing=1)]
        assert s['missing'] == [dict(patient='b', session='', split='train', missing='T2')]
        assert [(g['shape'], g['subjects']) for g in s['grids']] == [('24 x 28 x 13', 4), ('9 x 8 x 7', 1)]

@pytest.mark.parametrize('order, flips', AFFINES[::7])
def test_the_sheet_is_the_right_way_up(tmp_path, order, flips):
    "A bright front and a half-bright left, stored in any axis order: front up, left on the left"
    ras = np.full((8, 10, 6), 10., np.float32)
    ras[:, 5:], ras[:2, :5] = 100, 60
    affine = turned(order, flips, np.diag([2., 1, 3, 1]))
    write_volume(tmp_path/'a'/'T1.nii.gz', Volume(from_canonical(ras, nib.io_orientation(affine).astype(int)), affine))
    fig = contact_sheet(propose_manifest(tmp_path, splits=dict(a='train')))
    shown = np.asarray(fig.axes[0].images[0].get_array())
    assert shown.shape == (10, 8) and (shown[:5] == 100).all() and (shown[5:, :2] == 60).all() and (shown[5:, 2:] == 10).all()
    assert fig.axes[0].get_aspect() == .5 and fig.axes[0].get_ylabel() == 'a\ntrain' and fig.axes[0].get_title() == 'T1'
    plt.close(fig)

def test_the_sheet_says_what_is_missing_and_damaged(tmp_path):
    build(tmp_path, [f'p{k}' for k in range(12)], ('T1', 'T2'))
    (tmp_path/'p0'/'T1.nii.gz').unlink()
    c = propose_manifest(tmp_path, splits={f'p{k}': SPLITS[k//4] for k in range(12)})
    path = c.patient('p11').paths['T2']
    path.write_bytes(path.read_bytes()[:-30])
    fig = contact_sheet(c, n=4)
    assert [a.get_ylabel() for a in fig.axes[::2]] == ['p0\ntrain', 'p4\nvalidation', 'p7\nvalidation', 'p11\ntest']
    assert [t.get_text() for a in fig.axes for t in a.texts] == ['no T1', 'T2 cannot be read:\ngzip stream']
    assert Counter(len(a.images) for a in fig.axes) == {1: 6, 0: 2} and [a.get_title() for a in fig.axes[:2]] == ['T1', 'T2']
    with pytest.raises(CohortError, match='no subject'): contact_sheet(Cohort((), ('T1',), tmp_path))
    assert [a.get_title() for a in contact_sheet(c, n=1, modalities=['T2']).axes] == ['T2']
    plt.close('all')

def test_constant_images_are_shown(tmp_path):
    write_volume(tmp_path/'a'/'T1.nii.gz', Volume(np.zeros((4, 5, 3), np.float32), np.eye(4)))
    fig = contact_sheet(propose_manifest(tmp_path))
    assert fig.axes[0].images[0].get_clim() == (0, 1)
    plt.close(fig)
