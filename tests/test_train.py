"The training loop: the same curve after every stop, nothing poisoned, nothing silently mixed"
import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_run import Blobs, plain_recipe, settings, tiny_recipe

import i2i_mamba_nb.engine.train as training
from i2i_mamba_nb.core import CheckpointError, CohortError, ConfigError, DiskError, from_dict, numpy_rng, read_json
from i2i_mamba_nb.data.cohort import Cohort, Subject, read_manifest, split_hash, write_manifest
from i2i_mamba_nb.data.slices import load_subject
from i2i_mamba_nb.data.volume import Volume, write_volume
from i2i_mamba_nb.engine.checkpoint import CheckpointWarning, load
from i2i_mamba_nb.engine.train import (DivergedError, Stopped, TrainConfig, batch_keys, build_recipe, fit, preset_config, read_log,
    train)

HERE = Path(__file__).resolve().parent
ENV = os.environ | dict(OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='', PYTHONPATH=str(HERE.parent))

@pytest.fixture(scope='module', autouse=True)
def one_thread():
    "Small networks on many threads only wait for each other"
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

def run(out, data=None, build=tiny_recipe, **change):
    return fit(settings(**change), data or Blobs(), out, validation=Blobs(3), build=build, progress=False)

def outcome(out):
    "Log without its clock, weights, and the tensors of the last checkpoint"
    last = load(out/'checkpoints')
    tensors = {f'{stem}.{k}': v.numpy().tobytes() for stem, named in last.tensors.items() for k, v in named.items()}
    return {k: repr(v) for k, v in read_log(out).items() if k != 'seconds'}, (out/'weights.safetensors').read_bytes(), tensors

def tree(folder): return {p.relative_to(folder): p.read_bytes() for p in Path(folder).rglob('*') if p.is_file()}

def after_step(monkeypatch, step, act):
    "Do something once, when a step is done"
    real = training.train_step
    def train_step(session, batch):
        row = real(session, batch)
        if session.step == step: act(session)
        return row
    monkeypatch.setattr(training, 'train_step', train_step)

@pytest.fixture(scope='module')
def whole(tmp_path_factory): return run(tmp_path_factory.mktemp('whole')/'run', validate_every=6)

@pytest.mark.parametrize('step', [1, 2, 3, 5, 6, 11, 12, 17, 22, 23])
def test_k_steps_and_the_rest_are_one_run(tmp_path, whole, monkeypatch, step):
    "11 slices in batches of 2: every one of these lies inside an epoch"
    after_step(monkeypatch, step, lambda s: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped, match=f'SIGTERM: stopped after step {step}; .*{tmp_path.name}.*Run the same command again to go on'):
        run(tmp_path/'run', validate_every=6)
    monkeypatch.undo()
    assert load(tmp_path/'run'/'checkpoints').step == step and not (tmp_path/'run'/'run.json').exists()
    assert outcome(run(tmp_path/'run', validate_every=6)) == outcome(whole)

def test_loading_processes_change_nothing(tmp_path, whole, monkeypatch):
    after_step(monkeypatch, 9, lambda s: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Stopped, match='SIGINT'): run(tmp_path/'run', validate_every=6, workers=2)
    monkeypatch.undo()
    assert outcome(run(tmp_path/'run', validate_every=6, workers=2)) == outcome(whole)

def test_looking_at_validation_changes_nothing(tmp_path, whole):
    blind = read_log(run(tmp_path/'run'))
    assert 'val_l1' not in blind and all(repr(blind[k]) == repr(read_log(whole)[k]) for k in blind if k != 'seconds')
    looks = [(s, v) for s, v in zip(read_log(whole)['step'], read_log(whole)['val_psnr'], strict=True) if v is not None]
    assert [s for s, _ in looks] == [6, 12, 18, 24] and all(0 < v < 60 for _, v in looks)

def test_a_second_signal_acts_at_once(tmp_path, monkeypatch):
    def twice(session):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    after_step(monkeypatch, 3, twice)
    with pytest.raises(KeyboardInterrupt) as e: run(tmp_path/'run')
    assert e.type is KeyboardInterrupt and signal.getsignal(signal.SIGINT) is signal.default_int_handler

def test_a_finished_run_is_left_alone(whole):
    before = {k: v for k, v in tree(whole).items() if k.name != 'run.json'}
    assert run(whole, validate_every=6) == whole
    assert {k: v for k, v in tree(whole).items() if k.name != 'run.json'} == before

def test_global_random_generators_are_left_alone(tmp_path):
    torch.manual_seed(3)
    expected = torch.randn(3)
    torch.manual_seed(3)
    run(tmp_path/'run', max_steps=3)
    assert torch.equal(torch.randn(3), expected)

def test_the_folder(whole):
    assert sorted(p.name for p in whole.iterdir()) == ['checkpoints', 'config.json', 'log.csv', 'run.json', 'weights.safetensors']
    card = read_json(whole/'run.json')
    assert from_dict(TrainConfig, card['config']) == settings(validate_every=6) == from_dict(TrainConfig, read_json(whole/'config.json'))
    assert card['steps'] == 24 and card['skipped'] == 0 and {'versions', 'seconds', 'date'} <= card.keys()
    rows = list(csv.DictReader((whole/'log.csv').open()))
    assert len(rows) == 24 and {'step', 'pixel', 'generator', 'discriminator', 'lr', 'seconds', 'val_l1', 'val_psnr'} <= rows[0].keys()
    net = tiny_recipe(settings()).networks['generator']
    net.load_state_dict(load_file(whole/'weights.safetensors'))

@pytest.mark.parametrize('change, text', [(dict(seed=6), 'given seed=6, expected the settings it was started with, seed=5'),
    (dict(batch_size=1, target='T3'), "batch_size=1, target='T3', expected .*batch_size=2, target='PD'"), (dict(max_steps=25), 'max_steps'),
    (dict(recipe_args=dict(lambda_pix=10.)), r'recipe_args.lambda_pix=10.0, expected .*recipe_args.lambda_pix=None')])
def test_other_settings_are_refused(whole, change, text):
    before = tree(whole)
    with pytest.raises(CheckpointError, match=text) as e: run(whole, **(dict(validate_every=6) | change))
    assert 'choose another folder' in str(e.value) and tree(whole) == before

def test_other_data_is_refused(whole):
    with pytest.raises(CheckpointError, match='number_of_slices=12'): run(whole, Blobs(12), validate_every=6)
    with pytest.raises(CheckpointError, match='split_hash'):
        fit(settings(validate_every=6), Blobs(), whole, build=tiny_recipe, progress=False, info=dict(split_hash='0'))

def test_settings_that_do_not_touch_the_result_may_change(whole):
    assert run(whole, validate_every=6, workers=1, keep=3, checkpoint_every=9, checkpoint_seconds=1e6) == whole

def test_a_damaged_checkpoint_costs_time_only(tmp_path, whole, monkeypatch):
    after_step(monkeypatch, 10, lambda s: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped): run(tmp_path/'run', validate_every=6)
    monkeypatch.undo()
    victim = tmp_path/'run'/'checkpoints'/'step_10'/'network_generator.safetensors'
    victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.warns(CheckpointWarning, match='step_10 is damaged.*Going on from .*step_8 instead'): run(tmp_path/'run', validate_every=6)
    assert outcome(tmp_path/'run') == outcome(whole)

def test_a_full_disk_ends_the_run_and_not_its_past(tmp_path, whole, monkeypatch):
    def full(session):
        def write(*args, **kwargs): raise OSError(28, 'No space left on device')
        monkeypatch.setattr(os, 'fsync', write)
    after_step(monkeypatch, 8, full)
    with pytest.raises(DiskError, match='bytes free'): run(tmp_path/'run', validate_every=6)
    monkeypatch.undo()
    assert load(tmp_path/'run'/'checkpoints').step == 4
    assert outcome(run(tmp_path/'run', validate_every=6)) == outcome(whole)

@pytest.mark.parametrize('rows', [None, 0, 1, 5])
def test_a_lost_log_is_said(tmp_path, monkeypatch, rows):
    "Gone, or cut in the middle of a row"
    after_step(monkeypatch, 10, lambda s: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped): run(tmp_path/'run')
    monkeypatch.undo()
    log = tmp_path/'run'/'log.csv'
    if rows is None: log.unlink()
    else:
        lines = log.read_bytes().splitlines(keepends=True)
        log.write_bytes(b''.join(lines[:rows+1])+lines[rows+1][:7])
    with pytest.warns(CheckpointWarning, match='rows are missing'): run(tmp_path/'run')
    found = read_log(tmp_path/'run')['step']
    assert found[-14:] == list(range(11, 25)) and found[:-14] == list(range(1, (rows or 0)+1))

@pytest.mark.parametrize('where', range(10))
def test_ten_injections_of_nan(tmp_path, monkeypatch, where):
    "In the picture, in a loss, in a gradient; nothing of it stays in weights, buffers or moments"
    step = 2*where+1
    class Sick(Blobs):
        def __getitem__(self, key):
            item = super().__getitem__(key)
            if where % 3 == 0 and key in batch_keys(step-1, 11, 2, 5): item['source'][0, 3, 4] = float('inf' if where == 6 else 'nan')
            return item
    if where % 3:
        real = training._update
        def update(session, phase, total, mean):
            if session.step == step-1 and phase == ('discriminator', 'generator')[where % 2]:
                weight = next(session.recipe.networks[phase].parameters())
                if where % 3 == 1: return real(session, phase, total*float('nan'), float('nan'))
                weight.register_hook(lambda g: g*float('inf'))
            return real(session, phase, total, mean)
        monkeypatch.setattr(training, '_update', update)
        after_step(monkeypatch, step, lambda s: [p._backward_hooks and p._backward_hooks.clear()
            for n in s.recipe.networks.values() for p in n.parameters()])
    out = run(tmp_path/'run', Sick())
    assert read_json(out/'run.json')['skipped'] == 1
    assert all(torch.isfinite(v).all() for named in load(out/'checkpoints').tensors.values() for v in named.values())
    log = read_log(out)
    assert len(log['step']) == 24 and sum(not math.isfinite(v) for v in log['generator']) == (where % 3 == 0)

def test_ten_in_a_row_stop_with_something_to_look_at(tmp_path):
    with pytest.raises(DivergedError, match=r'10 times in a row, last for p\d+/\d+, p\d+/\d+.*kept with the weights in'):
        run(tmp_path/'run', Blobs(broken=range(11)))
    folder = tmp_path/'run'/'repro_step_10'
    card, batch = read_json(folder/'repro.json'), load_file(folder/'batch.safetensors')
    again = [Blobs(broken=range(11))[tuple(k)] for k in card['keys']]
    assert card['step'] == 10 and card['ids'] == [f'p{i}/{i}' for i, _ in card['keys']]
    assert torch.equal(batch['source'], torch.stack([a['source'] for a in again])) and batch['target'].isnan().all()
    recipe = tiny_recipe(settings())
    for name, net in recipe.networks.items(): net.load_state_dict(load_file(folder/f'network_{name}.safetensors'))
    assert recipe.losses('discriminator', batch)[0]['total'].isnan()
    with pytest.raises(DivergedError): run(tmp_path/'run', Blobs(broken=range(11)))

def test_nine_in_a_row_do_not(tmp_path):
    "Nor do eighteen with a good one between"
    class Spell(Blobs):
        def __getitem__(self, key):
            item = super().__getitem__(key)
            sick = any(key in batch_keys(s, 11, 2, 5) for s in range(2, 21) if s != 11)
            return item | dict(target=item['target']*float('nan')) if sick else item
    assert read_json(run(tmp_path/'run', Spell())/'run.json')['skipped'] == 18

class Clock:
    "A clock that runs by one second whenever it is read"
    def __init__(self): self.now = 100.
    def __call__(self): self.now += 1; return self.now

def test_seconds_are_a_limit_and_survive_a_stop(tmp_path, monkeypatch):
    monkeypatch.setattr(training.time, 'monotonic', Clock())
    after_step(monkeypatch, 20, lambda s: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped): run(tmp_path/'run', max_steps=None, max_seconds=50)
    monkeypatch.setattr(training.time, 'monotonic', Clock())
    out = run(tmp_path/'run', max_steps=None, max_seconds=50)
    log = read_log(out)
    assert 45 <= len(log['step']) <= 50 and log['seconds'] == sorted(log['seconds']) and 49 <= read_json(out/'run.json')['seconds'] <= 52
    assert log['lr'][0] == log['lr'][20] == 2e-4 > log['lr'][30] > log['lr'][-1] > 0

def test_the_nearer_limit_rules(tmp_path, monkeypatch):
    monkeypatch.setattr(training.time, 'monotonic', Clock())
    assert len(read_log(run(tmp_path/'a', max_steps=10, max_seconds=1000))['step']) == 10
    assert len(read_log(run(tmp_path/'b', max_steps=1000, max_seconds=10))['step']) in (9, 10)
    assert len(read_log(run(tmp_path/'c', max_steps=None, epochs=1.5))['step']) == math.ceil(1.5*11/2)

def test_checkpoints_by_the_clock(tmp_path, monkeypatch):
    monkeypatch.setattr(training.time, 'monotonic', Clock())
    real, steps = training.save, []
    monkeypatch.setattr(training, 'save', lambda folder, step, *a, **k: (steps.append(step), real(folder, step, *a, **k)))
    run(tmp_path/'run', checkpoint_every=1000, checkpoint_seconds=7)
    assert steps[0] == 0 and steps[-1] == 24 and len(steps) >= 4

def test_every_epoch_sees_every_slice_once():
    for n, batch in ((11, 2), (7, 5), (3, 8), (1, 1)):
        keys = [k for s in range(4*n) for k in batch_keys(s, n, batch, 9)]
        for epoch in range(4): assert sorted(i for i, e in keys if e == epoch) == list(range(n))
    assert batch_keys(5, 11, 2, 1) != batch_keys(5, 11, 2, 2)

def launch(command, out, *words, env=None):
    words = [*command, str(HERE/'tiny_run.py'), str(out), *words]
    return subprocess.run(words, env=ENV | (env or {}), capture_output=True, text=True, timeout=300)

TWO = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node', '2', '--master_port', '29517']

def test_two_processes_are_one_with_twice_the_batch(tmp_path):
    "gloo; killed on the way and started again by the same command"
    one = run(tmp_path/'one', build=plain_recipe, batch_size=4, max_steps=12)
    words, cpu = ('plain=true', 'batch_size=2', 'max_steps=12'), dict(ACCELERATE_USE_CPU='true')
    assert launch(TWO, tmp_path/'two', *words, env=cpu | dict(TINY_RUN_DIES_AT='15')).returncode != 0
    assert load(tmp_path/'two'/'checkpoints').step == 4
    done = launch(TWO, tmp_path/'two', *words, env=cpu)
    assert done.returncode == 0, done.stderr
    assert 'Warning' not in done.stderr, done.stderr
    a, b = read_log(one), read_log(tmp_path/'two')
    assert a['step'] == b['step'] == list(range(1, 13))
    for k in ('pixel', 'adversarial', 'real', 'fake', 'generator', 'discriminator'): assert b[k] == pytest.approx(a[k], rel=1e-4), k
    weights = [load_file(o/'weights.safetensors') for o in (one, tmp_path/'two')]
    for k, v in weights[0].items(): torch.testing.assert_close(weights[1][k], v, rtol=1e-3, atol=1e-5)
    with pytest.raises(CheckpointError, match='processes=1, expected .*processes=2'):
        run(tmp_path/'two', build=plain_recipe, max_steps=12)

def test_under_accelerate_launch(tmp_path):
    "The same command; accelerate starts one process for `--cpu` unless MPI is there"
    done = launch([sys.executable, '-m', 'accelerate.commands.launch', '--num_processes', '2', '--cpu'], tmp_path/'run', 'max_steps=6')
    assert done.returncode == 0, done.stderr
    assert read_log(tmp_path/'run')['pixel'] == read_log(run(tmp_path/'same', max_steps=6))['pixel']

def ball_cohort(folder):
    "Two training patients and one for validation: balls of smooth tissue, 32 x 28 x 10 voxels"
    subjects = []
    for patient, split in (('a', 'train'), ('b', 'train'), ('c', 'validation')):
        noise = numpy_rng(0, patient).standard_normal((3, 32, 28, 10)).cumsum(1)
        inside = sum(g**2 for g in np.meshgrid(*(np.linspace(-1, 1, n) for n in noise.shape[1:]), indexing='ij')) < .8
        volumes = {m: np.where(inside, 100+8*v, 0).astype(np.float32) for m, v in zip(('T1', 'T2', 'PD'), noise, strict=True)}
        paths = {m: write_volume(folder/f'{patient}_{m}.nii.gz', Volume(v, np.diag([4., 4., 8., 1.]))) for m, v in volumes.items()}
        subjects.append(Subject(patient, split, paths))
    return read_manifest(write_manifest(folder/'manifest.csv', Cohort(tuple(subjects), ('T1', 'T2', 'PD'), folder, dict(simulated=True))))

def test_the_real_network_on_a_cohort(tmp_path, monkeypatch):
    "I2I-Mamba at the scale smoke; stopped, gone on with, and loaded again"
    cohort = ball_cohort(tmp_path)
    config = preset_config('smoke', sources=['T1', 'T2'], target='PD')
    one = train(config, cohort, tmp_path/'one', progress=False)
    after_step(monkeypatch, 3, lambda s: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped): train(config, cohort, tmp_path/'two', progress=False)
    monkeypatch.undo()
    two = train(replace(config, workers=2), cohort, tmp_path/'two', progress=False)
    assert outcome(one) == outcome(two)
    card = read_json(one/'run.json')
    assert card['simulated'] is True and card['split_hash'] == split_hash(cohort) and card['steps'] == 8
    windows = [load_subject(s, ['PD']).windows['PD'] for s in cohort.split('train')]
    assert card['window'] == {'PD': [float(np.median([w[k] for w in windows])) for k in (0, 1)]}
    generator = build_recipe(from_dict(TrainConfig, card['config'])).networks['generator']
    generator.load_state_dict(load_file(one/'weights.safetensors'))
    with pytest.raises(CohortError, match='FLAIR'): train(replace(config, target='FLAIR'), cohort, tmp_path/'three', progress=False)
    assert not (tmp_path/'three').exists()
    moved = Cohort(tuple(replace(s, split='train') for s in cohort.subjects), cohort.modalities, cohort.root, cohort.info)
    with pytest.raises(CheckpointError, match='split_hash'): train(config, moved, one, progress=False)

WRONG = [dict(batch_size=0), dict(batch_size=2.), dict(batch_size='2'), dict(batch_size=True), dict(max_steps=None), dict(max_steps=-1),
    dict(target='T1'), dict(sources=[]), dict(sources=['T1', 'T1']), dict(size=0), dict(size=[8, 8, 8]), dict(size='128'), dict(epochs=0),
    dict(max_seconds=float('inf')), dict(seed=-1), dict(seed=None), dict(keep=1), dict(constant=1.5), dict(preset='labtop'),
    dict(network_args=[]), dict(recipe_args=None), dict(workers=-1), dict(validate_every=0), dict(slices=0)]

@pytest.mark.parametrize('change', WRONG, ids=str)
def test_wrong_settings(change):
    with pytest.raises(ConfigError) as e: settings(**change)
    assert next(iter(change)) in str(e.value) or 'max_steps' in str(e.value)

@pytest.mark.parametrize('wrong', [0, -1, 2., '2', None])
@pytest.mark.parametrize('name', ['i2i_mamba', 'hmf_mambainr'])
def test_wrong_patches_are_named(name, wrong):
    args = dict(base_channels=4, n_stages=2, patch_size=wrong)
    with pytest.raises(ConfigError, match=f'patch_size.*given {wrong!r}'):
        build_recipe(settings(network=name, network_args=args, size=32))

def test_sizes_that_patches_do_not_divide_are_refused_before_training():
    args = dict(base_channels=4, n_stages=2, patch_size=2)
    with pytest.raises(ConfigError, match='multiples of 8, 16 or more'):
        build_recipe(settings(network='i2i_mamba', network_args=args, size=36))

def test_unknown_settings_name_the_nearest():
    for wrong, near in (('batchsize', 'batch_size'), ('network_arg', 'network_args'), ('max_step', 'max_steps')):
        with pytest.raises(ConfigError, match=f"'{wrong}'.*Did you mean '{near}'"): from_dict(TrainConfig, asdict(settings()) | {wrong: 1})
    with pytest.raises(ConfigError, match="Did you mean 'laptop'"): preset_config('labtop', sources=['T1'], target='PD')

def test_settings_survive_json():
    config = settings(size=[12, 20], recipe_args=dict(betas=[.5, .9]), max_seconds=3.5)
    assert from_dict(TrainConfig, json.loads(json.dumps(asdict(config)))) == config and hash(config.sources)
    assert replace(config, seed=1) != config

def test_it_ends_soon_after_the_limit_with_a_real_clock(tmp_path):
    started = time.monotonic()
    run(tmp_path/'run', max_steps=None, max_seconds=.5)
    assert read_json(tmp_path/'run'/'run.json')['seconds'] >= .5 and time.monotonic()-started < 60
