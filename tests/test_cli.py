"The command line: the whole path in a process of its own, and one sentence for every mistake of the issue"
import csv
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from i2i_mamba_nb.app import cli
from i2i_mamba_nb.data.cohort import read_manifest
from i2i_mamba_nb.data.presets import preset
from i2i_mamba_nb.data.volume import Volume, read_volume, write_volume

MODALITIES = ('T1', 'T2', 'FLAIR')
AFFINE = np.array([[-2., 0, 0, 20], [0, 2, 0, -30], [0, 0, 4, -7], [0, 0, 0, 1]])
ENV = dict(os.environ, OMP_NUM_THREADS=str(torch.get_num_threads()), COLUMNS='120')  # bits depend on the number of threads

def head(seed, modality, shape=(22, 26, 9)):
    "A blob whose FLAIR depends on T1 and T2"
    rng = np.random.default_rng(seed)
    axes = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing='ij')
    t1, t2 = (1+.4*np.sin(3*a+rng.random()) for a in axes[:2])
    image = dict(T1=t1, T2=t2, FLAIR=t1*t2)[modality]*(sum(a**2 for a in axes) < .8)
    return Volume((100*image).astype(np.float32), AFFINE, None)

def make_folder(folder, patients=('p1', 'p2', 'p3', 'p4')):
    for k, p in enumerate(patients):
        (folder/p).mkdir(parents=True, exist_ok=True)
        for m in MODALITIES: write_volume(folder/p/f'{m}.nii.gz', head(k, m))
    return folder

def i2i(*words, **options):
    "The command in a process of its own"
    options = dict(capture_output=True, text=True, env=ENV, timeout=300) | options
    return subprocess.run([sys.executable, '-m', 'i2i_mamba_nb.app.cli', *map(str, words)], **options)

@pytest.fixture
def say(capsys):
    "Status, stdout and stderr of a command in this process"
    def f(*words):
        capsys.readouterr()
        status = cli.main([str(w) for w in words])
        seen = capsys.readouterr()
        return status, seen.out, seen.err
    return f

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "A folder with a manifest and a finished run; not to be changed"
    folder = make_folder(tmp_path_factory.mktemp('made')/'data')
    for words in (['prepare', folder, '--validation', 'p3', '--test', 'p4'], train_words(folder, folder.parent/'run')):
        assert cli.main([str(w) for w in words]) == 0
    return folder

def train_words(folder, run, *more):
    return ['train', folder/'manifest.csv', '--sources', 'T1,T2', '--target', 'FLAIR', '--out', run, '--preset', 'smoke', *more]

def snapshot(folder): return {p.relative_to(folder): p.stat().st_mtime_ns for p in Path(folder).rglob('*')}

def one_sentence(status, err, *pieces):
    "Expected status, one line, all pieces in it, no trace"
    assert status == 2, err
    lines = [w for w in err.splitlines() if w.startswith('i2i-mamba: ')]
    assert len(lines) == 1 and 'Traceback' not in err, err
    for p in (*pieces, 'given', 'expected'): assert str(p) in lines[0], (p, lines[0])

# the whole path

def test_from_a_folder_to_a_page(tmp_path):
    data, run = make_folder(tmp_path/'data'), tmp_path/'run'
    steps = [('prepare', data, '--pattern', '{patient}/{modality}.nii.gz', '--validation', 'p3', '--test', 'p4'), train_words(data, run),
        ('predict', run, data/'manifest.csv', '--out', tmp_path/'volumes'), ('evaluate', run, data/'manifest.csv')]
    shown = [i2i(*words) for words in steps]
    assert [p.returncode for p in shown] == [0]*4, [p.stderr[-2000:] for p in shown]
    fake = read_volume(next((tmp_path/'volumes').iterdir()))
    assert fake.data.shape == (22, 26, 9) and np.abs(fake.affine-AFFINE).max() < 1e-5 and fake.data.std() > 0
    rows = list(csv.DictReader((run/'evaluation-test'/'results-all.csv').open()))
    assert {r['patient'] for r in rows} == {'p4'} and len(rows) == 4 and all(float(r['psnr']) > 0 for r in rows if r['psnr'] != 'nan')
    card = json.loads((run/'evaluation-test'/'card.json').read_text())
    assert card['protocol'] == 'strict' and card['sources'] == ['T1', 'T2'] and card['patients'] == ['p4']
    assert 'i2i_mamba' in shown[3].stdout and 'PSNR [dB]' in shown[3].stdout and 'report.html' in shown[3].stdout

def test_predict_from_files_uses_their_own_grid(made, tmp_path, say):
    for m in ('T1', 'T2'): write_volume(tmp_path/f'{m}.nii', head(7, m, (31, 19, 6)))
    words = ['--source', f'T1={tmp_path}/T1.nii', '--source', f't2w={tmp_path}/T2.nii', '--out', tmp_path/'fake.nii.gz']
    assert say('predict', made.parent/'run', *words)[0] == 0
    fake = read_volume(tmp_path/'fake.nii.gz')
    assert fake.data.shape == (31, 19, 6) and np.abs(fake.affine-AFFINE).max() < 1e-5

def test_same_command_goes_on_after_sigkill(tmp_path):
    data, words = make_folder(tmp_path/'data'), None
    assert i2i('prepare', data, '--validation', 'p3', '--test', 'p4').returncode == 0
    words = ('--set', 'max_steps=40', '--set', 'checkpoint_every=5')
    whole = i2i(*train_words(data, tmp_path/'whole', *words))
    assert whole.returncode == 0, whole.stderr
    run, log = tmp_path/'run', tmp_path/'run'/'log.csv'
    command = [sys.executable, '-m', 'i2i_mamba_nb.app.cli', *map(str, train_words(data, run, *words))]
    process = subprocess.Popen(command, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (log.exists() and log.read_text().count('\n') > 12): time.sleep(.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (run/'run.json').exists()
    again = i2i('resume', run)
    assert again.returncode == 0, again.stderr
    assert (run/'weights.safetensors').read_bytes() == (tmp_path/'whole'/'weights.safetensors').read_bytes()

def test_help_is_quick_and_complete():
    code = 'import sys; from i2i_mamba_nb.app.cli import main; main(["--help"]); print("torch" in sys.modules or "numpy" in sys.modules)'
    shown = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=ENV, check=True).stdout
    assert shown.strip().endswith('False')
    names = [c.name or c.callback.__name__ for c in cli.app.registered_commands]
    assert sorted(names) == ['demo', 'doctor', 'evaluate', 'predict', 'prepare', 'resume', 'train']
    for name in names:
        text = CliRunner().invoke(cli.app, [name, '--help']).output
        assert f'i2i-mamba {name}' in text and 'Example' in text and name in shown

def test_waiting_threads_spin_shortly_unless_told_otherwise():
    "Threads that spin for long beside another program make a training step several times slower"
    code = 'import os, sys; from i2i_mamba_nb.app.cli import main; main(["doctor"]); print(os.environ.get("GOMP_SPINCOUNT"))'
    for given, expected in (({}, '1000'), ({'GOMP_SPINCOUNT': '7'}, '7'), ({'OMP_WAIT_POLICY': 'ACTIVE'}, 'None')):
        env = {k: v for k, v in ENV.items() if k not in ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT')} | given
        shown = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=env, check=True).stdout
        assert shown.split()[-1] == expected

def test_entry_point_is_declared():
    assert 'console_scripts = i2i-mamba=i2i_mamba_nb.app.cli:main' in (Path(__file__).parent.parent/'settings.ini').read_text()

# one sentence for each mistake

def test_missing_modality(made, tmp_path, say):
    lines = (made/'manifest.csv').read_text().splitlines()
    column = lines[0].split(',').index('T2')
    cells = [w.split(',') for w in lines]
    cells[1][column] = ''
    data = tmp_path/'data'
    shutil.copytree(made, data)
    (data/'manifest.csv').write_text('\n'.join(','.join(c) for c in cells)+'\n')
    status, _, err = say(*train_words(data, tmp_path/'run'))
    one_sentence(status, err, 'modality T2', 'p1', 'FLAIR, T1')
    assert not (tmp_path/'run').exists()
    status, _, err = say('predict', made.parent/'run', '--source', f'T1={made}/p1/T1.nii.gz', '--out', tmp_path/'fake.nii.gz')
    one_sentence(status, err, 'T1, T2', '--source T2=')
    assert not (tmp_path/'fake.nii.gz').exists()

def spoilt(made, tmp_path, spoil, patient='p1', modality='T1'):
    "A copy of the folder with one volume spoilt; its manifest made after the deed, or before where it cannot be made"
    data = tmp_path/'data'
    shutil.copytree(made, data)
    spoil(data/patient/f'{modality}.nii.gz')
    text = json.loads((data/'manifest.json').read_text())
    text['sha256'] = {}
    (data/'manifest.json').write_text(json.dumps(text))
    return data

def other_grid(path): write_volume(path, head(0, 'T1', (22, 26, 8)))
def truncate(path): path.write_bytes(path.read_bytes()[:len(path.read_bytes())//2])
def not_a_number(path):
    import gzip
    raw = bytearray(gzip.decompress(path.read_bytes()))
    raw[-4000:-3996] = np.float32(np.nan).tobytes()
    path.write_bytes(gzip.compress(bytes(raw)))

@pytest.mark.parametrize('spoil', [other_grid, truncate, not_a_number])
def test_bad_volume(made, tmp_path, say, spoil):
    data = spoilt(made, tmp_path, spoil)
    bad = data/'p1'/'T1.nii.gz'
    status, _, err = say(*train_words(data, tmp_path/'run'))
    one_sentence(status, err, 'p1')
    assert not (tmp_path/'run').exists()
    before = snapshot(tmp_path)
    files = ['--source', f'T1={bad}', '--source', f'T2={data}/p1/T2.nii.gz']
    status, _, err = say('predict', made.parent/'run', *files, '--out', tmp_path/'x.nii.gz')
    one_sentence(status, err, 'T1.nii.gz')
    assert snapshot(tmp_path) == before

@pytest.mark.parametrize('spoil', [other_grid, truncate, not_a_number])
def test_bad_test_volume_leaves_no_page(made, tmp_path, say, spoil):
    data = spoilt(made, tmp_path, spoil, 'p4', 'T2')
    status, _, err = say('evaluate', made.parent/'run', data/'manifest.csv', '--out', tmp_path/'page', '--no-baselines')
    one_sentence(status, err, 'p4')
    assert not (tmp_path/'page').exists()

@pytest.mark.parametrize('pair, piece', [('batchsize=2', "Did you mean 'batch_size'"), ('batch_size=two', 'expected int'),
    ('network_args.base_chanels=4', "Did you mean 'base_channels'"), ('recipe_args.learning_rate=1', 'recipe'), ('batch_size', 'key=value'),
    ('max_steps=0', 'max_steps'), ('size=30', 'multiples of 4')])
def test_unknown_setting(made, tmp_path, say, pair, piece):
    status, _, err = say(*train_words(made, tmp_path/'run', '--set', pair))
    if piece == 'recipe': piece = 'paired_adversarial'
    one_sentence(status, err, piece)
    assert not (tmp_path/'run').exists()

def test_settings_are_checked_before_any_file(tmp_path, say):
    status, _, err = say(*train_words(tmp_path/'none', tmp_path/'run', '--set', 'network_args.base_chanels=4'))
    one_sentence(status, err, "Did you mean 'base_channels'")

@pytest.mark.parametrize('words, piece', [(('--network', 'i2i_mambo'), "'i2i_mamba'"), (('--preset', 'labtop'), "'laptop'"),
    (('--ablation', 'no_mama'), "'no_mamba'"), (('--network', 'patchgan'), 'a generator'), (('--target', 'T1'), 'not a source')])
def test_unknown_name(made, tmp_path, say, words, piece):
    status, _, err = say(*train_words(made, tmp_path/'run', *words))
    one_sentence(status, err, piece)

@pytest.mark.parametrize('words, piece', [(('prepare', 'nowhere'), 'no such folder'), (('evaluate', 'nowhere', 'none.csv'), 'nowhere'),
    (('resume', 'nowhere'), 'config.json'), (('train', 'none.csv', '--sources', 'T1', '--target', 'T2', '--out', 'r'), 'none.csv'),
    (('predict', 'nowhere', '--source', 'T1=a', '--out', 'b.nii'), 'nowhere'), (('predict', 'run'), 'neither')])
def test_paths_that_are_not_there(tmp_path, say, monkeypatch, words, piece):
    monkeypatch.chdir(tmp_path)
    status, _, err = say(*words)
    one_sentence(status, err, piece)
    assert not list(tmp_path.iterdir())

def test_steps_from_a_file_go_on_and_redo_only_what_depends(made, tmp_path, say):
    (tmp_path/'steps.json').write_text('{"size": [16, 20], "slices": 5}')
    words = ['prepare', made/'manifest.csv', '--steps', tmp_path/'steps.json', '--out', tmp_path/'out', '--workers', 1]
    status, out, err = say(*words)
    assert status == 0, err
    assert {read_volume(p).shape for p in (tmp_path/'out'/'volumes').glob('p1-*/*.nii.gz')} == {(16, 20, 5)}
    before = {p: p.read_bytes() for p in (tmp_path/'out').rglob('*') if p.is_file() and p.name != 'log.csv'}
    assert say(*words)[0] == 0 and all(p.read_bytes() == b for p, b in before.items())
    rows = list(csv.DictReader((tmp_path/'out'/'log.csv').open(newline='')))
    assert [r['status'] for r in rows] == ['done']*4+['unchanged']*4
    splits = {s.patient: s.split for s in read_manifest(tmp_path/'out'/'manifest.csv').subjects}
    assert splits == dict(p1='train', p2='train', p3='validation', p4='test')

def test_failed_subjects_are_listed_at_the_end(tmp_path, say):
    folder = make_folder(tmp_path/'data')
    assert say('prepare', folder)[0] == 0
    (folder/'p2'/'T2.nii.gz').write_bytes(b'')
    status, out, err = say('prepare', folder/'manifest.csv', '--steps', 'grid', '--out', tmp_path/'out')
    one_sentence(status, err, 'p2: ', 'T2.nii.gz', '0 bytes', 'All others are in')
    rows = list(csv.DictReader((tmp_path/'out'/'log.csv').open(newline='')))
    assert {r['subject']: r['status'] for r in rows} == {p: 'failed' if p == 'p2' else 'unchanged' for p in ('p1', 'p2', 'p3', 'p4')}
    (tmp_path/'s.json').write_text('{"slices": 4}')
    status, out, err = say('prepare', folder/'manifest.csv', '--steps', tmp_path/'s.json', '--out', tmp_path/'out')
    one_sentence(status, err, 'p2: ', 'All others are in')
    assert [s.patient for s in read_manifest(tmp_path/'out'/'manifest.csv').subjects] == ['p1', 'p3', 'p4']
    status, out, err = say('prepare', folder, '--steps', tmp_path/'s.json', '--out', tmp_path/'direct', '--workers', 1)
    one_sentence(status, err, 'p2: ', 'T2.nii.gz', 'All others are in')       # found damaged when the folder was read

def test_private_stacks_become_a_cohort(tmp_path, say):
    for m in ('T1', 'T2'):
        data = np.stack([head(k, m).data[:, :, 4].T for k in range(12)]).astype(np.float32)
        (tmp_path/'stacks').mkdir(exist_ok=True)
        np.save(tmp_path/'stacks'/f'{m}.npy', data)
    status, out, err = say('prepare', tmp_path/'stacks', '--slices-per-patient', 3, '--fractions', .5, .25, .25)
    assert status == 0, err
    cohort = read_manifest(tmp_path/'stacks-prepared'/'manifest.csv')
    assert len(cohort.subjects) == 4 and read_volume(cohort.subjects[0].paths['T1']).shape == (22, 26, 3)
    assert sorted(s.split for s in cohort.subjects) == ['test', 'train', 'train', 'validation']
    one_sentence(*say('prepare', tmp_path/'stacks-prepared'/'manifest.csv', '--seed', 3)[::2], '--seed', 'a folder to read')

def test_a_prepared_folder_inside_the_data_is_not_read_as_data(tmp_path, say):
    raw = preset('pelvis-like', subjects=3).write(tmp_path/'raw')
    for _ in range(2): assert say('prepare', raw, '--steps', write_steps(tmp_path), '--out', raw/'prep'/'mine.csv')[0] == 0
    assert len(read_manifest(raw/'prep'/'mine.csv').subjects) == 3

def write_steps(folder):
    (folder/'s.json').write_text('{"slices": 6}')
    return folder/'s.json'

def test_splits_of_a_manifest_stay_unless_named(made, tmp_path, say):
    assert say('prepare', made/'manifest.csv', '--test', 'p1', '--out', tmp_path/'m.csv')[0] == 0
    splits = {s.patient: s.split for s in read_manifest(tmp_path/'m.csv').subjects}
    assert splits == dict(p1='test', p2='train', p3='validation', p4='test')

def test_a_papers_split(tmp_path, say):
    raw = preset('pelvis-like', subjects=2).write(tmp_path/'raw')
    status, out, err = say('prepare', raw, '--paper-split', 'i2i-mamba-pelvis')
    one_sentence(status, err, '15 (9, 2, 4)')
    one_sentence(*say('prepare', raw, '--paper-split', 'i2i-mamba-ixy')[::2], 'i2i-mamba-ixi')

def test_splits_by_name(made, tmp_path, say):
    words = 'prepare', made, '--out', tmp_path/'m.csv'
    for more, piece in ((('--train', 'p1', '--test', 'p1'), 'two splits'), (('--test', 'p9'), 'p9'),
            (('--train', 'p1', '--test', 'p2'), 'p3, p4'),
            (('--fractions', .5, .1, .1), 'add up to 1'), (('--pattern', '{patient}.nii'), 'modality')):
        status, _, err = say(*words, *more)
        one_sentence(status, err, piece)
        assert not list(tmp_path.iterdir())

def limited(kb):
    "In the child: no file may grow beyond kb kB, which is how a full disk answers"
    def f(): signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.setrlimit(resource.RLIMIT_FSIZE, (kb*1024, kb*1024))
    return f

def test_full_disk_while_predicting(made, tmp_path):
    out = tmp_path/'fake.nii.gz'
    words = ['--source', f'T1={made}/p1/T1.nii.gz', '--source', f'T2={made}/p1/T2.nii.gz', '--out', out]
    shown = i2i('predict', made.parent/'run', *words, preexec_fn=limited(1))
    one_sentence(shown.returncode, shown.stderr, out, 'bytes free', 'Free space')
    assert not list(tmp_path.iterdir())

def test_full_disk_while_training_keeps_the_old_checkpoint(made, tmp_path):
    run = tmp_path/'run'
    shutil.copytree(made.parent/'run', run)
    (run/'run.json').unlink(), (run/'weights.safetensors').unlink()
    shutil.rmtree(run/'checkpoints'/'step_8')
    before = snapshot(run/'checkpoints')
    shown = i2i('resume', run, preexec_fn=limited(4))
    one_sentence(shown.returncode, shown.stderr, 'writing', 'bytes free')
    assert not (run/'run.json').exists() and before.items() <= snapshot(run/'checkpoints').items()
    assert i2i('resume', run).returncode == 0
    assert (run/'weights.safetensors').read_bytes() == (made.parent/'run'/'weights.safetensors').read_bytes()

def test_no_permission(made, tmp_path):
    if os.geteuid() == 0: pytest.skip('the superuser may write everywhere')
    tmp_path.chmod(0o500)
    shown = i2i('prepare', made, '--out', tmp_path/'m.csv')
    one_sentence(shown.returncode, shown.stderr, 'no permission')

def test_defects_are_not_hidden(say, monkeypatch):
    def broken(*a, **k): raise RuntimeError('a defect of ours')
    monkeypatch.setattr(cli, 'found_cohort', broken)
    with pytest.raises(RuntimeError, match='a defect of ours'): cli.main(['prepare', 'x'])

def test_debug_shows_the_trace(tmp_path):
    quiet, loud = i2i('prepare', tmp_path/'none'), i2i('prepare', tmp_path/'none', '--debug')
    assert 'Traceback' not in quiet.stderr and quiet.returncode == 2
    assert 'Traceback' in loud.stderr and 'no such folder' in loud.stderr

def test_ctrl_c_saves_and_says_how_to_go_on(made, tmp_path):
    run, log = tmp_path/'run', tmp_path/'run'/'log.csv'
    command = [sys.executable, '-m', 'i2i_mamba_nb.app.cli', *map(str, train_words(made, run, '--steps', '100000'))]
    process = subprocess.Popen(command, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (log.exists() and log.read_text().count('\n') > 3): time.sleep(.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and 'same command' in err and 'Traceback' not in err
