"bench/gpu.py without a GPU: it says so and writes nothing; its parts run on the CPU with the backends that are there"
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).resolve().parent.parent/'bench'

@pytest.fixture(scope='module')
def gpu():
    "bench/gpu.py as a module"
    sys.path.insert(0, str(BENCH))
    try:
        spec = importlib.util.spec_from_file_location('bench_gpu', BENCH/'gpu.py')
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally: sys.path.remove(str(BENCH))
    return module

CPU = torch.device('cpu')

@pytest.mark.skipif(torch.cuda.is_available(), reason='a GPU is here')
def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path):
    done = subprocess.run([sys.executable, BENCH/'gpu.py', '--out', tmp_path], capture_output=True, text=True)
    assert done.returncode == 1 and not list(tmp_path.iterdir()) and done.stdout == ''
    assert done.stderr.strip() == 'bench/gpu.py needs a CUDA device and torch sees none: nothing was measured or written.'

def test_names_become_file_names(gpu):
    assert gpu.slug('NVIDIA H200') == 'nvidia-h200' and gpu.slug('Tesla T4/x (16 GB)') == 'tesla-t4-x-16-gb'

def test_a_spent_budget_names_what_it_leaves_out(gpu):
    now = [0.]
    budget = gpu.Budget(10, clock=lambda: now[0])
    assert budget.allows('a', 10) and not budget.skipped
    now[0] = 5.
    assert not budget.allows('b', 6) and budget.allows('c', 5) and budget.skipped == ['b'] and budget.left() == 5

def test_the_drawn_shapes_are_those_of_the_suite(gpu):
    drawn = [gpu.draw(seed) for seed in range(200)]
    assert {x.u.shape[2] for x, _ in drawn} == set(gpu.LENGTHS) and {x.u.shape[0] for x, _ in drawn} == {1, 2, 3}
    assert {x.u.shape[1] for x, _ in drawn} == {1, 2, 3, 4, 5, 6, 17, 33} and {x.A.shape[1] for x, _ in drawn} == set(range(1, 17))
    assert {x.B.ndim for x, _ in drawn} == {x.C.ndim for x, _ in drawn} == {2, 3, 4} and {s for _, s in drawn} == {True, False}
    for i in range(5, 9): assert {x[i] is None for x, _ in drawn} == {True, False}
    assert sum(not x.u.is_contiguous() for x, _ in drawn) > 20
    a, b = gpu.draw(3)[0], gpu.draw(3)[0]
    assert all(p is q or torch.equal(p, q) for p, q in zip(a, b, strict=True))

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_a_right_backend_is_within_tolerance(gpu, dtype):
    found = gpu.checks('chunked', dtype, range(12), gpu.Budget(100), CPU)
    assert found['within'] and found['checked'] == 12 and found['not_taken'] == 0 and 0 < found['values'] < 2e-2

def test_a_wrong_backend_is_not(gpu, monkeypatch):
    right = gpu.selective_scan
    def wrong(*args, **options):
        y, last = right(*args, **options)
        return y*1.001, last
    monkeypatch.setattr(gpu, 'selective_scan', wrong)
    found = gpu.checks('chunked', torch.float32, range(4), gpu.Budget(100), CPU)
    assert not found['within'] and 5e-4 < found['values'] < 2e-3

def test_not_finite_is_not_within(gpu): assert gpu.off(torch.tensor([1., float('nan')]), torch.ones(2)) == float('inf')

def test_no_time_left_means_not_checked_and_not_within(gpu):
    found = gpu.checks('chunked', torch.float32, range(4), gpu.Budget(0), CPU)
    assert found['checked'] == 0 and not found['within']

def test_rows_and_fractions(gpu):
    row = gpu.row((1, 8, 64), 'forward', ['reference', 'chunked'], (1e9, 1e9), CPU, repeats=3)
    assert set(row['ms']) == {'reference', 'chunked'} and row['ms']['chunked']['repeats'] == 3 and row['ms']['reference']['repeats'] == 2
    assert row['shape'] == dict(b=1, d=8, l=64, n=16) and set(row['fraction_of_limit']) == set(row['ms'])
    assert set(gpu.row((1, 8, 64), 'both', ['reference', 'chunked'], (1e9, None), CPU, repeats=2)['ms']) == {'chunked'}
    f = gpu.fractions((1, 512, 4096), 1., 1e12, 1e11)
    assert f['memory'] == pytest.approx((4*(3*512*4096+2*16*4096)+4*256*512*16)/1e12/1e-3)
    assert f['exponentials'] == pytest.approx(512*4096*16/1e11/1e-3) and gpu.fractions((1, 1, 1), 1., 1., None)['exponentials'] is None

def test_the_networks_run(gpu):
    small = dict(base_channels=4, n_stages=2)
    step, volume = gpu.training_step(CPU, size=32, repeats=1, **small), gpu.volume(CPU, size=32, slices=3, batch=2, repeats=1, **small)
    assert step['seconds'] > 0 and volume['seconds'] > 0 and volume['size'] == [32, 32, 3] and step['network']['base_channels'] == 4

def test_the_record_can_be_written_and_read(gpu, monkeypatch):
    monkeypatch.setattr(gpu, 'SHAPES', dict(S0=(1, 4, 32)))
    monkeypatch.setattr(gpu, 'bandwidth', lambda device: 1e9)
    monkeypatch.setattr(gpu, 'checks', lambda *a: dict(within=True, checked=200, not_taken=0))
    for name in ('training_step', 'volume'): monkeypatch.setattr(gpu, name, lambda device: dict(seconds=1.))
    found = gpu.record(gpu.measured(60, CPU), 'NVIDIA H0', (9, 0))
    again = json.loads(json.dumps(found))
    assert {'machine', 'threads', 'versions', 'command', 'date', 'device', 'rows', 'checks', 'backends', 'skipped'} <= set(again)
    assert again['device'] == 'NVIDIA H0' and again['all_within'] and again['rows']['S0 both']['ms']['chunked']['median'] > 0
    assert not gpu.measured(0, CPU)['rows']
