"Evaluation against an independent computation; baselines that see training subjects only; runs, volumes and files of prediction"
import csv
import json
import pickle
from dataclasses import asdict

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.ndimage import gaussian_filter
from skimage.metrics import structural_similarity

import i2i_mamba_nb
from i2i_mamba_nb.core import (CheckpointError, CohortError, ConfigError, DiskError, I2IError, Inputs, Network, ShapeError, _records,
    network, numpy_rng, register, write_json)
from i2i_mamba_nb.data.cohort import Cohort, Subject, read_manifest, write_manifest
from i2i_mamba_nb.data.slices import load_subject
from i2i_mamba_nb.data.volume import Volume, VolumeError, read_volume, to_canonical, write_volume
from i2i_mamba_nb.engine import evaluate as module
from i2i_mamba_nb.engine.evaluate import (METRICS, NoPrediction, card, evaluate, fit_copy, fit_mean_image, fit_pixel_mlp, score,
    show_summary, summary, table, truth, write_rows)
from i2i_mamba_nb.engine.predict import Run, fitted_size, load_run, predict_subject, predictor, synthesise
from i2i_mamba_nb.engine.train import TrainConfig
from i2i_mamba_nb.measure.metrics import head_mask

OBLIQUE = np.array([[-1.9, .2, .1, 30], [.2, 2.1, -.1, -40], [.1, .1, 2.4, 5], [0, 0, 0, 1]])
TASK = dict(sources=('T1', 'T2'), target='PD')

def heads(seed, shape, names=('T1', 'T2', 'PD')):
    rng = numpy_rng(seed, 'head')
    g = np.meshgrid(*[np.linspace(-1.25, 1.25, n) for n in shape], indexing='ij')
    field = gaussian_filter(rng.standard_normal(shape), 1.5)
    tissue, inside = np.digitize(field/field.std(), (-.7, .5)), sum(v*v for v in g) < 1
    levels = dict(T1=(250, 600, 900), T2=(950, 600, 400), PD=(900, 750, 400), CT=(-60, 20, 900))
    for n in names:
        x = np.take(levels[n], tissue)+rng.normal(0, 30, shape)
        yield n, np.where(inside, x, -1000 if n == 'CT' else 0).astype(np.float32)

def subject(folder, patient, split, seed, shape=(20, 26, 16), session='', affine=OBLIQUE, names=('T1', 'T2', 'PD')):
    files = {n: write_volume(folder/f'{patient}{session}_{n}.nii.gz', Volume(x, affine)) for n, x in heads(seed, shape, names)}
    return Subject(patient, split, files, session)

@pytest.fixture(scope='module')
def cohort(tmp_path_factory):
    folder = tmp_path_factory.mktemp('cohort')
    subjects = [subject(folder, f'p{k}', s, k) for k, s in enumerate(['train']*4+['validation']+['test']*3)]
    write_manifest(folder/'manifest.csv', Cohort(tuple(subjects), ('T1', 'T2', 'PD'), folder, {'simulated': True}))
    return read_manifest(folder/'manifest.csv')

def blurred(s): return gaussian_filter(truth(s, 'PD').image, .7)+.02

def strict_by_hand(path, fake):
    "The strict protocol once more, with nibabel, numpy and scikit-image alone"
    x = np.asarray(nib.as_closest_canonical(nib.load(path)).dataobj, np.float64)
    m = head_mask(x)
    low, high = np.percentile(x[m], (.5, 99.5))
    t, y = np.clip((x-low)/(high-low), 0, 1), np.clip(fake, 0, 1)
    error = (t-y)[m]
    similar = structural_similarity(t, y, data_range=1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, full=True)[1]
    m[:5], m[-5:], m[:, :5], m[:, -5:], m[..., :5], m[..., -5:] = (False,)*6
    return dict(psnr=-10*np.log10((error**2).mean()), mae=np.abs(error).mean(), nmse=(error**2).sum()/(t[head_mask(x)]**2).sum(),
        ssim=similar[m].mean())

def test_rows_equal_the_protocol_by_hand(cohort):
    for row, s in zip(evaluate(blurred, cohort, 'PD'), cohort.split('test'), strict=True):
        hand = strict_by_hand(s.paths['PD'], blurred(s))
        for name, value in hand.items(): assert np.isclose(row[name], value, rtol=1e-4), name
        assert row['patient'] == s.patient and row['unit'] == 'window' and row['reason'] == '' and row['method'] == 'blurred'

def test_split_name_and_order(cohort):
    rows = evaluate(blurred, cohort, 'PD', split='validation', name='mine')
    assert [(r['patient'], r['split'], r['method']) for r in rows] == [('p4', 'validation', 'mine')]
    with pytest.raises(ConfigError, match='split'): evaluate(blurred, cohort, 'PD', split='tset')

def test_what_lies_outside_the_targets_head_does_not_count(cohort):
    def painted(s): return np.where(truth(s, 'PD').mask, blurred(s), numpy_rng(0, 'paint').random(truth(s, 'PD').mask.shape))
    a, b = evaluate(blurred, cohort, 'PD'), evaluate(painted, cohort, 'PD')
    for x, y in zip(a, b, strict=True): assert all(x[m] == y[m] for m in ('psnr', 'mae', 'nmse')) and x['ssim'] != y['ssim']

def test_predictions_are_clipped_and_inf_is_refused(cohort):
    t = truth(cohort.split('test')[0], 'PD')
    assert score(t, 3*t.image-1) == score(t, np.clip(3*t.image-1, 0, 1))
    with pytest.raises(I2IError, match='NaN or infinite'): score(t, np.where(t.mask, np.nan, 0))

@pytest.mark.parametrize('wrong', [lambda x: x[:-1], lambda x: x[None], lambda x: x.transpose(1, 0, 2), lambda x: x[..., 0]])
def test_a_wrong_shape_names_the_patient(cohort, wrong):
    with pytest.raises(ShapeError, match='prediction for patient p5: given shape'): evaluate(lambda s: wrong(blurred(s)), cohort, 'PD')

def test_no_prediction_becomes_a_row(cohort):
    def picky(s):
        if s.patient == 'p6': raise NoPrediction('picky', given=s.patient, expected='another', hint='None.')
        return blurred(s)
    rows = evaluate(picky, cohort, 'PD')
    assert [np.isnan(r['psnr']) for r in rows] == [False, True, False] and 'given p6' in rows[1]['reason']
    line = summary(rows)[0]
    assert (line['n'], line['missing']) == (2, 1) and np.isclose(line['psnr'], np.mean([rows[0]['psnr'], rows[2]['psnr']]))
    def broken(s): raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError): evaluate(broken, cohort, 'PD')

def test_ct_is_scored_in_hu(tmp_path):
    s = subject(tmp_path, 'p', 'test', 3, names=('CT',))
    v = read_volume(s.paths['CT'])
    v.data[10, 13, 8] = 30000
    write_volume(s.paths['CT'], v)
    c = Cohort((s,), ('CT',), tmp_path)
    row = evaluate(lambda s: truth(s, 'CT').image+np.float32(50/4095), c, 'CT')[0]
    assert row['unit'] == 'HU' and np.isclose(row['mae'], 50*(row['voxels']-1)/row['voxels'], rtol=1e-3)
    assert np.isclose(row['psnr'], 20*np.log10(4095/50), atol=.01)
    assert truth(s, 'CT').window == (-1024, 3071) and truth(s, 'CT').image.max() == 1

def test_a_constant_target_names_its_file(tmp_path):
    s = subject(tmp_path, 'p', 'test', 3)
    write_volume(s.paths['PD'], Volume(np.full((20, 26, 16), 7, np.float32), OBLIQUE))
    with pytest.raises(CohortError, match='PD of patient p: given .*p_PD.nii.gz'): evaluate(blurred, Cohort((s,), ('PD',), tmp_path), 'PD')

def test_sources_on_another_grid_are_refused(tmp_path):
    a = subject(tmp_path, 'p', 'test', 3)
    moved = OBLIQUE.copy()
    moved[0, 3] += 5
    b = subject(tmp_path, 'q', 'test', 3, affine=moved)
    c = Cohort((Subject('p', 'test', a.paths | dict(T2=b.paths['T2'])),), ('T1', 'T2', 'PD'), tmp_path)
    with pytest.raises(CohortError, match=r'q_T2.nii.gz \(patient p\).*p_PD.nii.gz'): evaluate(blurred, c, 'PD', sources=('T1', 'T2'))
    with pytest.raises(CohortError, match='modality FLAIR of patient p'): evaluate(blurred, c, 'PD', sources=('FLAIR',))

def test_each_is_handed_every_pair(cohort):
    seen = []
    rows = evaluate(blurred, cohort, 'PD', each=lambda s, fake, t: seen.append((s.patient, score(t, fake)['psnr'], fake.max() <= 1)))
    assert seen == [(r['patient'], r['psnr'], True) for r in rows]

def made(patients, values):
    return [dict(method='m', patient=p, unit='', **dict.fromkeys(METRICS, v)) for p, v in zip(patients, values, strict=True)]

def test_summary_is_scipys_bootstrap_over_patients():
    from scipy.stats import bootstrap
    values = numpy_rng(0, 'values').normal(30, 3, 17).tolist()
    line = summary(made('abcdefghijklmnopq', values), seed=3)[0]
    draws = dict(n_resamples=4999, method='percentile', random_state=numpy_rng(3, 'bootstrap'))
    want = bootstrap((values,), np.mean, **draws).confidence_interval
    assert (line['psnr_low'], line['psnr_high']) == (want.low, want.high) and line['psnr_std'] == np.std(values, ddof=1)
    assert summary(made('abcdefghijklmnopq', values), seed=3)[0] == line != summary(made('abcdefghijklmnopq', values), seed=4)[0]

@pytest.mark.parametrize('patients, values, want', [
    ('a', [30.], (1, 30, 0, 30, 30)), ('ab', [30., 30.], (2, 30, 0, 30, 30)),
    ('aab', [10., 30., 40.], (2, 30, np.std([20, 40], ddof=1), 20, 40))])
def test_summary_of_few(patients, values, want):
    line = summary(made(patients, values))[0]
    assert np.allclose((line['n'], line['psnr'], line['psnr_std'], line['psnr_low'], line['psnr_high']), want)

def test_summary_of_the_infinite_and_the_absent():
    line = summary(made('ab', [30., np.inf]))[0]
    assert line['psnr'] == np.inf and np.isnan(line['psnr_std']) and np.isnan(line['psnr_low'])
    line = summary(made('ab', [np.nan, np.nan]))[0]
    assert (line['n'], line['missing']) == (0, 2) and np.isnan(line['psnr'])
    show_summary(summary(made('ab', [30., np.inf])+made('ab', [1., 2.])))

def test_rows_and_table_as_files(cohort, tmp_path):
    rows = evaluate(blurred, cohort, 'PD')
    back = list(csv.DictReader(open(write_rows(tmp_path/'out'/'rows.csv', rows))))
    assert [float(r['ssim']) for r in back] == [r['ssim'] for r in rows] and [p.name for p in (tmp_path/'out').iterdir()] == ['rows.csv']
    assert len(table(rows)) == 3 and list(table(summary(rows))['n']) == [3]
    (tmp_path/'file').write_text('')
    with pytest.raises(DiskError, match='rows.csv'): write_rows(tmp_path/'file'/'rows.csv', rows)

def test_card_says_what_was_decided(cohort):
    note = card(cohort, 'PD', **{'sources': ('T1', 'T2')}, seed=5, extra=1)
    assert json.loads(json.dumps(note, allow_nan=False)) == note and note['seed'] == 5 and note['extra'] == 1 and note['simulated']
    assert note['patients'] == ['p5', 'p6', 'p7'] and {'scikit-image', 'torch', 'i2i_mamba_nb'} <= set(note['versions'])
    other = Cohort(cohort.subjects[1:], cohort.modalities, cohort.root)
    assert card(other, 'PD')['split_hash'] != note['split_hash'] and not card(other, 'PD')['simulated']
    assert 'HU' in card(cohort, 'CT')['window'] and 'percentiles' in note['window']

@pytest.mark.parametrize('fit', [fit_copy, fit_mean_image, fit_pixel_mlp])
def test_baselines_read_training_subjects_only(cohort, fit, monkeypatch):
    seen = set()
    def spy(f): return lambda s, *a, **k: seen.add(s.split) or f(s, *a, **k)
    monkeypatch.setattr(module, 'load_subject', spy(load_subject))
    monkeypatch.setattr(module, 'truth', spy(truth))
    rest = tuple(Subject(s.patient, s.split, s.paths if s.split == 'train' else {}) for s in cohort.subjects)
    baseline = fit(Cohort(rest, cohort.modalities, cohort.root), **TASK)
    assert seen == {'train'}
    guess = baseline(cohort.split('test')[0])
    assert guess.shape == truth(cohort.split('test')[0], 'PD').image.shape and guess.dtype == np.float32
    assert 0 <= guess.min() < guess.max() <= 1

def rewritten(cohort, folder, target_of):
    out = []
    for s in cohort.subjects:
        t1, t2 = (read_volume(s.paths[m]) for m in ('T1', 'T2'))
        path = write_volume(folder/f'{s.patient}.nii.gz', target_of(t1.data, t2.data).astype(np.float32), like=t1)
        out.append(Subject(s.patient, s.split, s.paths | dict(PD=path)))
    return Cohort(tuple(out), cohort.modalities, cohort.root)

@pytest.mark.parametrize('name, line', [('T1', lambda a, b: 3*a), ('T2', lambda a, b: .1*b),
    ('T1', lambda a, b: np.where(a > 0, 2000-a, 0))])
def test_copy_finds_source_slope_and_intercept(cohort, tmp_path, name, line):
    c = rewritten(cohort, tmp_path, line)
    b = fit_copy(c, **TASK)
    falling = line(1000, 1000) == 1000 and name == 'T1'
    assert b.name == f'copy {name}' and np.isclose(b.info['slope'], -1 if falling else 1, atol=.02)
    assert min(r['psnr'] for r in evaluate(b, c, 'PD')) > 35

def test_copy_equals_least_squares(cohort):
    b = fit_copy(cohort, **TASK)
    pairs = []
    for s in cohort.split('train'):
        images, m = load_subject(s, ['T1', 'T2', 'PD']).images, truth(s, 'PD').mask
        pairs.append([(images[n][m].astype(float)+1)/2 for n in ('T1', 'T2', 'PD')])
    t1, t2, y = (np.concatenate(v) for v in zip(*pairs, strict=True))
    fits = {n: np.polyfit(x, y, 1) for n, x in (('T1', t1), ('T2', t2))}
    best = min(fits, key=lambda n: ((np.polyval(fits[n], dict(T1=t1, T2=t2)[n])-y)**2).mean())
    assert b.info['source'] == best and np.allclose((b.info['slope'], b.info['intercept']), fits[best], atol=1e-5)

def test_mean_image_is_the_mean_or_says_why_not(cohort, tmp_path):
    b = fit_mean_image(cohort, **TASK)
    assert np.allclose(b(cohort.split('test')[0]), np.mean([truth(s, 'PD').image for s in cohort.split('train')], 0), atol=1e-6)
    odd = subject(tmp_path, 'odd', 'test', 5, shape=(22, 26, 16))
    mixed = Cohort((*cohort.subjects, odd), cohort.modalities, cohort.root)
    rows = evaluate(fit_mean_image(mixed, **TASK), mixed, **TASK)
    assert [np.isnan(r['psnr']) for r in rows] == [False]*3+[True] and '(22, 26, 16) of odd' in rows[-1]['reason']
    stray = Cohort((*cohort.subjects, Subject('stray', 'train', odd.paths)), cohort.modalities, cohort.root)
    rows = evaluate(fit_mean_image(stray, **TASK), stray, **TASK)
    assert all(np.isnan(r['psnr']) and 'stray' in r['reason'] for r in rows) and len(rows) == 3

def test_pixel_mlp_learns_a_product_and_repeats(cohort, tmp_path):
    c = rewritten(cohort, tmp_path, lambda a, b: a*b/1000)
    a, b = fit_pixel_mlp(c, **TASK, n=8000), fit_pixel_mlp(c, **TASK, n=8000)
    s = c.split('test')[0]
    assert np.array_equal(a(s), b(s)) and not np.array_equal(a(s), fit_pixel_mlp(c, **TASK, n=8000, seed=1)(s))
    assert summary(evaluate(a, c, **TASK))[0]['psnr'] > summary(evaluate(fit_copy(c, **TASK), c, **TASK))[0]['psnr']+5

class Mixer(torch.nn.Module):
    def __init__(self, n_sources=2):
        super().__init__()
        self.weight, self.bias = torch.nn.Parameter(torch.ones(n_sources)/n_sources), torch.nn.Parameter(torch.zeros(1))

    def forward(self, x):
        assert x.shape[-1] % 8 == x.shape[-2] % 8 == 0
        return (x*self.weight[:, None, None]).sum(1, keepdim=True)+self.bias

@pytest.fixture
def mixer():
    record = register(Network('mixer_for_tests', 'none', Mixer, {}, Inputs(lambda c: c.get('n_sources', 2), multiple=8)))
    yield record.name
    del _records[Network][record.name]

def write_run(folder, name, tensors=None, **more):
    folder.mkdir(exist_ok=True)
    target = more.pop('target', 'PD')
    config = asdict(TrainConfig(sources=('T1', 'T2'), target=target, network=name, size=16, max_steps=1))
    save_file(tensors or {'weight': torch.tensor([.25, .75]), 'bias': torch.zeros(1)}, folder/'weights.safetensors')
    write_json(folder/'run.json', dict(config=config, window={target: [100., 500.]}, simulated=True) | more)
    return folder

def images_of(s): return load_subject(s, ['T1', 'T2']).images

def tensors(folder, **values): save_file({k: torch.tensor(v) for k, v in values.items()}, folder/'weights.safetensors')

class Bomb:
    def __init__(self, path): self.path = path
    def __reduce__(self): return open, (str(self.path), 'w')

def test_load_run_and_back(mixer, tmp_path):
    run = load_run(write_run(tmp_path/'run', mixer, steps=7))
    assert run.config.target == 'PD' and run.info['steps'] == 7 and run.info['simulated'] is True and 'config' not in run.info
    assert not run.network.training and not any(p.requires_grad for p in run.network.parameters())
    assert load_run(str(tmp_path/'run')).network.weight.tolist() == [.25, .75]

def test_pickles_are_refused_unopened(mixer, tmp_path):
    folder = write_run(tmp_path/'run', mixer)
    (folder/'weights.safetensors').unlink()
    for name in ('weights.pt', 'model.bin', 'x.pkl'):
        (folder/name).write_bytes(pickle.dumps(Bomb(tmp_path/'boom')))
        with pytest.raises(I2IError, match='pickle'): load_run(folder)
        with pytest.raises(I2IError, match='refused|never opened'): load_run(folder/name)
        (folder/name).rename(folder/'weights.safetensors')
        with pytest.raises(CheckpointError, match='damaged'): load_run(folder)
        (folder/'weights.safetensors').unlink()
    assert not (tmp_path/'boom').exists()

@pytest.mark.parametrize('change, error, text', [
    (lambda f: (f/'run.json').unlink(), ConfigError, 'no run.json'),
    (lambda f: ((f/'weights.safetensors').unlink(), (f/'checkpoints').mkdir()), ConfigError, 'Let the training end'),
    (lambda f: (f/'run.json').write_text('{"config": 3}'), CheckpointError, 'run.json'),
    (lambda f: (f/'run.json').write_text('{"conf'), ConfigError, 'run.json'),
    (lambda f: tensors(f, weight=[float('nan'), 1], bias=[0.]), CheckpointError, 'NaN'),
    (lambda f: tensors(f, weight=[1., 1, 1], bias=[0.]), CheckpointError, r'weight \(3,\) for \(2,\)'),
    (lambda f: tensors(f, weight=[1., 1]), CheckpointError, '1 missing: bias'),
    (lambda f: tensors(f, weight=[1., 1], bias=[0.], x=[1.]), CheckpointError, 'unknown: x'),
    (lambda f: (f/'weights.safetensors').write_bytes(b'version https://git-lfs.github.com/spec/v1\n'), CheckpointError, 'damaged'),
    (lambda f: (f/'weights.safetensors').write_bytes(b''), CheckpointError, 'damaged')])
def test_a_damaged_run_is_one_clear_error(mixer, tmp_path, change, error, text):
    folder = write_run(tmp_path/'run', mixer)
    change(folder)
    with pytest.raises(error, match=text): load_run(folder)

@pytest.mark.parametrize('window', [None, {}, {'T1': [0, 1]}, {'PD': [3, 3]}, {'PD': [5, 1]}, {'PD': [1]}, {'PD': 'ab'}, {'PD': [None, 1]}])
def test_a_run_without_its_window_is_refused(mixer, tmp_path, window):
    with pytest.raises(CheckpointError, match='window of PD'): load_run(write_run(tmp_path/'run', mixer, window=window))

def test_unknown_settings_and_networks_name_the_nearest(mixer, tmp_path):
    folder = write_run(tmp_path/'run', mixer)
    found = json.loads((folder/'run.json').read_text())
    write_json(folder/'run.json', found | dict(config=found['config'] | dict(tarqet='x')))
    with pytest.raises(ConfigError, match="Did you mean 'target'"): load_run(folder)
    write_json(folder/'run.json', found | dict(config=found['config'] | dict(network='mixer_for_test')))
    with pytest.raises(ConfigError, match="Did you mean 'mixer_for_tests'"): load_run(folder)

def test_packaged_runs_by_name(mixer, tmp_path, monkeypatch):
    (tmp_path/'weights').mkdir()
    write_run(tmp_path/'weights'/'t1t2-pd', mixer)
    monkeypatch.setattr(i2i_mamba_nb, '__file__', str(tmp_path/'__init__.py'))
    assert load_run('t1t2-pd').config.target == 'PD'
    with pytest.raises(ConfigError, match="Did you mean 't1t2-pd'"): load_run('t1t2-pdd')
    with pytest.raises(ConfigError, match='does not exist'): load_run('no/such/t1t2-pd')
    with pytest.raises(ConfigError, match='does not exist'): load_run('../weights/t1t2-pd')

def test_synthesise_is_the_network_on_every_voxel_of_the_head(cohort, mixer, tmp_path):
    run, images = load_run(write_run(tmp_path/'run', mixer)), images_of(cohort.split('test')[0])
    known = np.clip((.25*images['T1']+.75*images['T2']+1)/2, 0, 1)
    mask = head_mask(images['T1']+1) | head_mask(images['T2']+1)
    fake = synthesise(run, images)
    assert fake.dtype == np.float32 and np.allclose(fake, np.where(mask, known, 0), atol=1e-6) and fake.max() > .5
    for batch in (1, 2, 7, 1000): assert np.array_equal(synthesise(run, images, batch=batch), fake)
    assert np.array_equal(synthesise(run, dict(PD=images['T1'], T2=images['T2'], T1=images['T1'])), fake)
    some = np.zeros(fake.shape, bool)
    some[4:9, 5:20, 3] = True
    assert np.array_equal(synthesise(run, images, mask=some), np.where(some, known.astype(np.float32), 0))

@pytest.mark.parametrize('shape', [(60, 37, 9), (9, 14, 70), (33, 33, 13), (16, 16, 16)])
def test_any_size_comes_back_whole(mixer, tmp_path, shape):
    run = load_run(write_run(tmp_path/'run', mixer))
    rng = numpy_rng(0, *shape)
    images = {m: np.pad(rng.uniform(-.5, 1, [n-2 for n in shape]).astype(np.float32), 1, constant_values=-1) for m in ('T1', 'T2')}
    fake = synthesise(run, images)
    inner = (slice(1, -1),)*3
    assert fake.shape == shape and fake[inner].min() > 0
    assert np.allclose(fake[inner], (.25*images['T1']+.75*images['T2']+1)[inner]/2, atol=1e-6)

@pytest.mark.parametrize('bad', [0, -1, 1.5, 'two'])
def test_batch_must_be_a_number(cohort, mixer, tmp_path, bad):
    run = load_run(write_run(tmp_path/'run', mixer))
    with pytest.raises(ConfigError, match='batch'): synthesise(run, images_of(cohort.subjects[0]), batch=bad)

def test_images_no_network_should_see(cohort, mixer, tmp_path):
    run, images = load_run(write_run(tmp_path/'run', mixer)), images_of(cohort.subjects[0])
    for wrong, error, text in (({'T1': images['T1']}, ConfigError, 'Give T2 too'),
            (images | {'T2': images['T2'][..., 0]}, ShapeError, 'one shape'),
            (images | {'T2': images['T2']*np.nan}, I2IError, 'image of T2'), (images | {'T1': images['T1']*4}, I2IError, 'image of T1'),
            ({m: v*0-1 for m, v in images.items()}, I2IError, 'no head')):
        with pytest.raises(error, match=text): synthesise(run, wrong)
    nan = Run(Mixer().requires_grad_(False), run.config, run.info)
    nan.network.bias.fill_(float('nan'))
    with pytest.raises(CheckpointError, match='finite'): synthesise(nan, images)

def test_the_real_network_in_batches_and_in_an_empty_frame(cohort):
    record = network('i2i_mamba')
    torch.manual_seed(0)
    net = record.build(**record.smallest).eval()
    run = Run(net, TrainConfig(sources=('T1', 'T2'), target='PD', size=16, max_steps=1), {})
    images = images_of(cohort.split('test')[0])
    fake = synthesise(run, images)
    assert np.allclose(synthesise(run, images, batch=1), synthesise(run, images, batch=5), atol=1e-5) and fake.std() > 0
    padded = synthesise(run, {m: np.pad(v, ((5, 0), (0, 9), (2, 1)), constant_values=-1) for m, v in images.items()})
    assert np.allclose(padded[5:, :-9, 2:-1], fake, atol=1e-5) and not net.training

def test_fitted_size_never_cuts():
    rng = numpy_rng(0, 'fit')
    for _ in range(200):
        shape = rng.integers(3, 70, 3)
        mask = np.zeros(shape, bool)
        mask[tuple(rng.integers(0, shape, (4, 3)).T)] = True
        size, multiple = int(8*rng.integers(1, 6)), int(rng.choice([1, 2, 4, 8]))
        (h, w), (top, left) = fitted_size(mask, size, multiple)
        rows, columns = np.flatnonzero(mask.any((0, 2))[::-1]), np.flatnonzero(mask.any((1, 2)))
        assert top <= rows[0] and rows[-1] < top+h and left <= columns[0] and columns[-1] < left+w
        assert h % multiple == w % multiple == 0 and min(h, w) >= size

def test_predict_subject_on_the_files_own_grid(cohort, mixer, tmp_path):
    run, s = load_run(write_run(tmp_path/'run', mixer)), cohort.split('test')[0]
    made_ = predict_subject(run, {m: s.paths[m] for m in ('T2', 'T1')}, tmp_path/'new'/'fake.nii.gz')
    file, source = nib.load(tmp_path/'new'/'fake.nii.gz'), nib.load(s.paths['T1'])
    assert file.shape == source.shape and np.array_equal(file.affine, source.affine) and file.get_data_dtype() == np.float32
    assert bytes(file.header['descrip']).startswith(b'synthetic PD by mixer_for_tests, simulated training')
    fake = synthesise(run, images_of(s))
    canonical = to_canonical(Volume(np.asarray(file.dataobj, np.float32), file.affine))[0].data
    assert np.allclose(canonical, np.where(fake > 0, 100+400*fake, canonical), atol=1e-2)
    assert np.array_equal(made_.data, np.asarray(file.dataobj))
    assert (canonical[0] == 0).all() and [p.name for p in (tmp_path/'new').iterdir()] == ['fake.nii.gz']
    rows = evaluate(predictor(run), cohort, **TASK)
    assert rows[0]['method'] == 'mixer_for_tests' and np.isclose(rows[0]['psnr'], score(truth(s, 'PD'), fake)['psnr'])

def test_ct_air_is_air(cohort, mixer, tmp_path):
    run = load_run(write_run(tmp_path/'run', mixer, target='CT', window={'CT': [-1024., 3071.]}, simulated=False))
    s = cohort.split('test')[0]
    volume = predict_subject(run, {m: s.paths[m] for m in ('T1', 'T2')}, tmp_path/'ct.nii')
    assert volume.data.min() == -1024 and volume.data[0, 0, 0] == -1024
    assert b'simulated' not in bytes(read_volume(tmp_path/'ct.nii').header['descrip'])

def test_bad_requests_write_nothing(cohort, mixer, tmp_path):
    run, s = load_run(write_run(tmp_path/'run', mixer)), cohort.split('test')[0]
    good, out = {m: s.paths[m] for m in ('T1', 'T2')}, tmp_path/'out'
    other = subject(tmp_path, 'other', 'test', 3, shape=(20, 26, 18))
    before = {p: p.read_bytes() for p in good.values()}
    cut = tmp_path/'cut.nii.gz'
    cut.write_bytes(s.paths['T1'].read_bytes()[:-500])
    for paths, name, error, text in ((dict(T1=good['T1']), 'a.nii', ConfigError, 'given T1 .without T2.'),
            ({}, 'a.nii', ConfigError, 'T1, T2'),
            (good | dict(PD=s.paths['PD']), 'a.nii', ConfigError, 'PD besides'), (good, 'a.mha', ConfigError, '.nii or .nii.gz'),
            (good | dict(T2=other.paths['T2']), 'a.nii', CohortError, 'other_T2.*p5_T1'),
            (good | dict(T2=tmp_path/'no.nii'), 'a.nii', I2IError, 'no.nii'),
            (good | dict(T1=cut), 'a.nii', VolumeError, 'cut.nii.gz'), (good, good['T2'], ConfigError, 'which is a source')):
        with pytest.raises(error, match=text): predict_subject(run, paths, out/name)
    assert not out.exists() and {p: p.read_bytes() for p in good.values()} == before
    (tmp_path/'file').write_text('')
    with pytest.raises(DiskError, match='a.nii'): predict_subject(run, good, tmp_path/'file'/'a.nii')
