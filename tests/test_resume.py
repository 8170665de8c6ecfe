"A run that is killed with SIGKILL and started again with the same command ends as if nothing had happened"
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ENV = os.environ | dict(OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='', PYTHONPATH=str(HERE.parent))

@pytest.fixture(scope='module')
def results(tmp_path_factory):
    "Ten kills: in the middle of saves, in the middle of steps, and at random times; with and without loading processes"
    command = [sys.executable, str(HERE/'resume_points.py'), str(tmp_path_factory.mktemp('runs')), '10', '0']
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)

def test_the_kills_are_real(results):
    assert len(results) == 10 and all(r['status'] == -9 for r in results)
    assert sum(r['inside'] for r in results) >= 3 and {0, 2} == {r['workers'] for r in results}
    assert len({r['before'] for r in results}) >= 3, 'points spread over the run'

def test_every_run_goes_on_by_itself(results): assert all(r['again'] == 0 for r in results)

def test_same_curve_weights_optimiser_and_random_states(results):
    assert [r for r in results if not r['equal']] == []

def test_the_same_command_in_a_fresh_process(tmp_path):
    "No fork, no hooks: two processes one after the other, the first one killed by itself while it loads a picture"
    command = [sys.executable, '-W', 'error', str(HERE/'tiny_run.py'), str(tmp_path/'killed')]
    first = subprocess.run(command, env=ENV | dict(TINY_RUN_DIES_AT='33'), capture_output=True, timeout=300)
    assert first.returncode == -9 and not (tmp_path/'killed'/'run.json').exists()
    second = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=300)
    assert second.returncode == 0, second.stderr
    whole = subprocess.run([*command[:-1], str(tmp_path/'whole')], env=ENV, capture_output=True, text=True, timeout=300)
    assert whole.returncode == 0, whole.stderr
    curves = [[line.rsplit(',', 1)[0] for line in (tmp_path/n/'log.csv').read_text().splitlines()] for n in ('killed', 'whole')]
    assert len(curves[0]) == 25 and curves[0] == curves[1]
    assert (tmp_path/'killed'/'weights.safetensors').read_bytes() == (tmp_path/'whole'/'weights.safetensors').read_bytes()
