"Checkpoints: whole at every instant, guarded to the last bit, and nothing but tensors and JSON"
import errno
import json
import os
import random
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from i2i_mamba_nb.core import CheckpointError, ConfigError, DiskError
from i2i_mamba_nb.engine import checkpoint as ck

def tensors(value): return dict(network=dict(w=torch.full((3, 5), float(value)), n=torch.tensor(7)), empty={})

def saved(folder, *steps):
    for s in steps: ck.save(folder, s, tensors(s), dict(note=f'at {s}'))
    return folder

def quiet_load(folder):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', ck.CheckpointWarning)
        return ck.load(folder)

def leftovers(folder): return [p.name for p in folder.iterdir() if p.name != 'LATEST' and (not p.name.startswith('step_') or p.suffix)]

@pytest.fixture
def operations(monkeypatch):
    "Replace the operations that change a disk: `operations(look)` calls look(name, path) before each"
    def install(look, names=('fsync', 'replace', 'mkdir', 'unlink', 'rmdir')):
        def wrapped(name, real):
            def call(*args, **kwargs):
                if not busy:
                    busy.append(1)
                    try: look(name, args[0])
                    finally: busy.clear()
                return real(*args, **kwargs)
            return call
        busy = []
        for name in names: monkeypatch.setattr(os, name, wrapped(name, getattr(os, name)))
    yield install
    monkeypatch.undo()

def test_a_whole_checkpoint_at_every_instant(tmp_path, operations, monkeypatch):
    "Before each operation the folder is copied, as a kill would leave it, and loaded without a warning"
    saved(tmp_path/'run', 0)
    seen = []
    def look(name, path):
        shutil.copytree(tmp_path/'run', tmp_path/'copy')
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            found = ck.load(tmp_path/'copy')
        assert torch.equal(found.tensors['network']['w'], torch.full((3, 5), float(found.step)))
        assert all(ck.read(tmp_path/'copy'/f'step_{s}') for s in ck.steps(tmp_path/'copy')), 'half of one under the name of a whole one'
        seen.append(found.step)
        shutil.rmtree(tmp_path/'copy')
    operations(look)
    saved(tmp_path/'run', 10, 20, 30, 40)
    monkeypatch.undo()
    assert seen == sorted(seen) and set(seen) == {0, 10, 20, 30, 40} and len(seen) > 60
    assert ck.steps(tmp_path/'run') == [30, 40] and leftovers(tmp_path/'run') == []

def test_what_a_kill_leaves_is_swept(tmp_path, operations, monkeypatch):
    "The tree as it was before each operation is what a kill there would leave"
    saved(tmp_path/'run', 0, 10)
    snapshots = []
    def look(name, path):
        snapshots.append(tmp_path/f'snap{len(snapshots)}')
        shutil.copytree(tmp_path/'run', snapshots[-1])
    operations(look)
    saved(tmp_path/'run', 20)
    monkeypatch.undo()
    for snap in snapshots:
        saved(snap, 30)
        assert leftovers(snap) == [] and ck.load(snap).step == 30 and len(ck.steps(snap)) == 2

def test_latest_is_the_commit(tmp_path):
    "Between the rename and LATEST the old one counts; without LATEST the newest"
    saved(tmp_path, 1, 2)
    (tmp_path/'LATEST').write_text('step_1\n')
    assert ck.load(tmp_path).step == 1
    for text in (None, '', 'step_', '../step_1', 'step_2/../step_1', '\xff'):
        (tmp_path/'LATEST').unlink(missing_ok=True)
        if text is not None: (tmp_path/'LATEST').write_bytes(text.encode('latin1'))
        assert ck.load(tmp_path).step == 2

def test_steps_that_a_fallback_left_behind_go(tmp_path):
    saved(tmp_path, 10, 20, 30)
    shutil.rmtree(tmp_path/'step_30')
    with pytest.warns(ck.CheckpointWarning, match='step_30 is damaged: it is not there. Going on from .*step_20 instead'): ck.load(tmp_path)
    saved(tmp_path, 25)
    assert ck.steps(tmp_path) == [20, 25] and ck.load(tmp_path).step == 25
    (tmp_path/'step_25'/'state.json').unlink()
    with pytest.warns(ck.CheckpointWarning): ck.load(tmp_path)
    saved(tmp_path, 22)
    assert ck.steps(tmp_path) == [20, 22] and ck.load(tmp_path).step == 22

@pytest.mark.parametrize('number', [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_a_disk_that_takes_no_more(tmp_path, operations, monkeypatch, number):
    "From the k-th operation on nothing can be written, for every k"
    k = 0
    while True:
        folder = saved(tmp_path/f'{k}', 1, 2)
        left = iter(range(k))
        def look(name, path, left=left):
            if next(left, None) is None: raise OSError(number, os.strerror(number), str(path))
        operations(look, ('fsync', 'replace', 'mkdir'))
        try: saved(folder, 3)
        except DiskError as e: message = str(e)
        else: break
        finally: monkeypatch.undo()
        assert str(folder) in message and 'bytes free' in message and any(c.isdigit() for c in message)
        assert quiet_load(folder).step in (2, 3) and not [n for n in leftovers(folder) if '.old' not in n]
        k += 1
    assert k > 12
    assert saved(folder, 4) and ck.load(folder).step == 4

def test_a_full_file_system(tmp_path):
    "A real one of a megabyte, where this system lets a user mount one"
    script = tmp_path/'fill.py'
    script.write_text('''
import sys, torch, warnings
from pathlib import Path
from i2i_mamba_nb.core import DiskError
from i2i_mamba_nb.engine.checkpoint import load, save
folder = Path(sys.argv[1])/'checkpoints'
save(folder, 1, dict(network=dict(w=torch.zeros(60000))), {})
try: save(folder, 2, dict(network=dict(w=torch.zeros(60000)), optimiser=dict(m=torch.zeros(200000))), {})
except DiskError as e: print(e)
assert load(folder).step == 1 and sorted(p.name for p in folder.iterdir()) == ['LATEST', 'step_1'], list(folder.iterdir())
''')
    (tmp_path/'disk').mkdir()
    mount = f'mount -t tmpfs -o size=1m none {tmp_path}/disk'
    own = ['unshare', '--mount', '--map-root-user', 'sh', '-c']
    if not shutil.which('unshare') or subprocess.run([*own, mount], capture_output=True).returncode: pytest.skip('no mounts for users here')
    done = subprocess.run([*own, f'{mount} && {sys.executable} {script} {tmp_path}/disk'], capture_output=True, text=True,
        cwd=Path(__file__).resolve().parent.parent, timeout=120)
    assert done.returncode == 0, done.stderr
    assert 'full' in done.stdout or 'No space' in done.stdout

@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid() == 0, reason='root may write anywhere')
def test_no_permission(tmp_path):
    saved(tmp_path, 1)
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(DiskError, match='bytes free'): saved(tmp_path, 2)
        assert ck.load(tmp_path).step == 1
    finally: tmp_path.chmod(0o700)

def test_a_file_in_the_way(tmp_path):
    (tmp_path/'run').write_text('not a folder')
    with pytest.raises(DiskError, match='run'): saved(tmp_path/'run'/'checkpoints', 1)

FILES = ('network.safetensors', 'empty.safetensors', 'state.json', 'manifest.json')
PICKLE = b'\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94\x8c\x01:\x94\x85\x94R\x94.'
DAMAGE = dict(cut=lambda p: p.write_bytes(p.read_bytes()[:-1]), empty=lambda p: p.write_bytes(b''), gone=lambda p: p.unlink(),
    zeros=lambda p: p.write_bytes(bytes(p.stat().st_size)), pickle=lambda p: p.write_bytes(PICKLE),
    folder=lambda p: (p.unlink(), p.mkdir()), longer=lambda p: p.write_bytes(p.read_bytes()+b'{}'), text=lambda p: p.write_text('[]'))

@pytest.mark.parametrize('name', FILES)
@pytest.mark.parametrize('kind', DAMAGE)
def test_damage_falls_back_and_names_both(tmp_path, name, kind):
    saved(tmp_path, 10, 20)
    DAMAGE[kind](tmp_path/'step_20'/name)
    with pytest.warns(ck.CheckpointWarning) as seen: found = ck.load(tmp_path)
    assert found.step == 10 and torch.equal(found.tensors['network']['w'], torch.full((3, 5), 10.))
    assert len(seen) == 1 and str(tmp_path/'step_20') in str(seen[0].message) and str(tmp_path/'step_10') in str(seen[0].message)

def test_every_bit_counts(tmp_path):
    "300 random flips, each refused"
    saved(tmp_path, 5)
    dice = random.Random(0)
    for _ in range(300):
        path = tmp_path/'step_5'/dice.choice(FILES)
        before = path.read_bytes()
        data = bytearray(before)
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
        path.write_bytes(data)
        with pytest.raises(CheckpointError): ck.read(tmp_path/'step_5')
        path.write_bytes(before)
    assert ck.read(tmp_path/'step_5').step == 5

def test_all_damaged_is_an_error(tmp_path):
    saved(tmp_path, 10, 20)
    for s in (10, 20): (tmp_path/f'step_{s}'/'state.json').unlink()
    with pytest.raises(CheckpointError, match='step_20 is damaged.*step_10 is damaged.*delete this one to start again'): ck.load(tmp_path)

def test_a_manifest_cannot_lead_outside(tmp_path):
    saved(tmp_path/'run', 1)
    (tmp_path/'secret').write_text('{}')
    manifest = tmp_path/'run'/'step_1'/'manifest.json'
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {'../../secret': dict(bytes=2, sha256='0')}, indent=1)+'\n')
    with pytest.raises(CheckpointError, match='names a path'): ck.read(tmp_path/'run'/'step_1')

def test_a_checkpoint_under_another_name(tmp_path):
    saved(tmp_path, 1)
    (tmp_path/'step_1').rename(tmp_path/'step_9')
    with pytest.raises(CheckpointError, match='state.json is of step 1'): ck.read(tmp_path/'step_9')

def test_an_unfinished_one_is_not_seen(tmp_path):
    saved(tmp_path, 1)
    shutil.copytree(tmp_path/'step_1', tmp_path/'step_2.tmp')
    shutil.copytree(tmp_path/'step_1', tmp_path/'step_3.old')
    assert ck.steps(tmp_path) == [1] and ck.load(tmp_path).step == 1

def test_two_are_kept_at_least(tmp_path):
    with pytest.raises(ConfigError, match='given 1, expected 2 or more'): ck.save(tmp_path, 1, tensors(1), {}, keep=1)
    for s in range(6): ck.save(tmp_path, s, tensors(s), {}, keep=3)
    assert ck.steps(tmp_path) == [3, 4, 5]

def test_state_must_be_json(tmp_path):
    saved(tmp_path, 1)
    for bad in (dict(x=float('nan')), dict(x={1, 2})):
        with pytest.raises((ValueError, TypeError)): ck.save(tmp_path, 2, tensors(2), bad)
        assert ck.load(tmp_path).step == 1 and leftovers(tmp_path) == []

@pytest.mark.parametrize('kind, options', [(torch.optim.Adam, dict(betas=(.5, .999))), (torch.optim.AdamW, dict(amsgrad=True)),
    (torch.optim.SGD, dict(lr=.1, momentum=.9)), (torch.optim.RMSprop, dict(centered=True)), (torch.optim.Adagrad, {}),
    (torch.optim.NAdam, {})])
def test_optimisers_go_on_bit_for_bit(tmp_path, kind, options):
    def play(weights, optimiser, n):
        for _ in range(n):
            optimiser.zero_grad()
            sum((w**2).sum()*(k+1) for k, w in enumerate(weights)).backward()
            optimiser.step()
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.rand(s)) for s in ((2,), (3, 5), ())]
    optimiser = kind([dict(params=weights[:1]), dict(params=weights[1:], weight_decay=.1)], **options)
    play(weights, optimiser, 3)
    packed = ck.pack_optimiser(optimiser.state_dict())
    ck.save(tmp_path, 3, dict(o=packed.tensors, w={str(k): w for k, w in enumerate(weights)}), dict(o=packed.rest))
    found = ck.load(tmp_path)
    twins = [torch.nn.Parameter(found.tensors['w'][str(k)]) for k in range(3)]
    twin = kind([dict(params=twins[:1]), dict(params=twins[1:])], **options)
    twin.load_state_dict(ck.unpack_optimiser(ck.Packed(found.tensors['o'], found.state['o'])))
    play(weights, optimiser, 4), play(twins, twin, 4)
    assert all(torch.equal(a, b) for a, b in zip(weights, twins, strict=True))

def test_random_generators_go_on(tmp_path):
    def draw(): return [random.random(), random.gauss(0, 1), float(np.random.rand()), float(np.random.randn()), *torch.randn(3).tolist()]
    with ck.kept_rng():
        draw()
        packed = ck.rng_states()
        ck.save(tmp_path, 0, dict(rng=packed.tensors), dict(rng=packed.rest))
        first = draw()
        found = ck.load(tmp_path)
        ck.set_rng_states(ck.Packed(found.tensors['rng'], found.state['rng']))
        assert draw() == first

def test_tensors_of_all_kinds(tmp_path):
    base = torch.arange(15.).reshape(3, 5)
    kinds = dict(view=base[1:, ::2], turned=base.T, twin=base, expanded=base[:1].expand(4, 5), half=base.bfloat16(), bits=base > 3,
        none=torch.zeros(0, 3), scalar=torch.tensor(2), leaf=torch.nn.Parameter(base))
    ck.save(tmp_path, 1, dict(t=kinds), {})
    found = ck.load(tmp_path).tensors['t']
    assert all(torch.equal(found[k], v) and found[k].dtype == v.dtype for k, v in kinds.items())
