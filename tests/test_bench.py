"bench/: bars, ratios and limits as arithmetic; stand-ins and peers against the package; every script end to end on a tiny shape"
import contextlib
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from i2i_mamba_nb.core import read_json, write_json
from i2i_mamba_nb.ssm import mixers as package_mixers

ROOT = Path(__file__).resolve().parent.parent
pytest.importorskip('mambapy')

def module(name):
    "A script of bench/ as a module, found as it is when it is run"
    folder = str(ROOT/'bench')
    sys.path.insert(0, folder)
    try: return importlib.import_module(name)
    finally: sys.path.remove(folder)

machine, peers, scan = module('machine'), module('peers'), module('scan')
TIMES = dict(mambapy=dict(median=300.), reference=dict(median=450.), chunked=dict(median=60.), **{'cpu avx512': dict(median=2.)})

# ---------------------------------------------------------------- arithmetic
@pytest.mark.parametrize('got, limits, reached', [(2., dict(at_least=2.), True), (1.99, dict(at_least=2.), False),
    (2., dict(at_most=2.), True), (2.01, dict(at_most=2.), False), (None, dict(at_least=0.), False), (None, dict(at_most=9.), False)])
def test_a_bar_is_met_on_the_bar_and_never_when_not_measured(got, limits, reached):
    made = machine.bar('x', got, **limits)
    assert made['reached'] is reached and made['got'] == got
    assert ('MISSED' in machine.told(made)) is not reached
    json.dumps(made)

def test_ratios_are_of_medians_and_leave_out_the_base():
    assert machine.ratios(TIMES, 'mambapy') == {'reference': 300/450, 'chunked': 5., 'cpu avx512': 150.}
    assert machine.ratios(TIMES, 'absent') == {}

def test_summary_takes_the_median():
    assert machine.summary([9., 1., 2.]) == dict(median=2., least=1., repeats=3)

def test_calls_are_taken_in_turns():
    seen = []
    found = machine.interleaved({k: lambda k=k: seen.append(k) for k in 'abc'}, 3, most=dict(b=2), turn=0)
    assert ''.join(seen) == 'ac'+'abc'+'abc'+'ca'+'ac'
    assert [found[k]['repeats'] for k in 'abc'] == [3, 2, 3]

def test_bytes_of_a_scan_by_hand():
    b, d, l, n = 2, 3, 5, machine.STATES
    u, weights = b*d*l, b*n*l
    assert scan.moved((b, d, l), 'forward') == 4*(2*u+2*weights+u)                              # u, delta, B, C in, y out
    both = 4*(2*u+2*weights+u)+4*(3*u+2*weights+2*u+2*weights)                                 # gradient of y too in, four gradients out
    assert scan.moved((b, d, l), 'both') == both

def test_the_limit_is_the_larger_of_two_and_halves_with_the_vector():
    shape, speed = (1, 512, 4096), dict(bytes_per_second=40e9, multiply_adds_per_second=250e9)
    wide, half = (scan.limit(shape, 'forward', k, speed, 16) for k in ('avx512', 'avx2'))
    assert wide['ms'] == max(wide['bytes'], wide['instructions'])
    assert wide['bytes'] == pytest.approx(.642, abs=.01)
    assert wide['instructions'] == pytest.approx(1e3*512*4096*(8*16+16)/250e9)
    assert half['instructions']/wide['instructions'] == pytest.approx(2*(10*16+19)/(8*16+16))
    assert scan.limit(shape, 'forward', 'avx512', dict(speed, bytes_per_second=1e9), 16)['ms'] > 20

def test_fraction_of_the_limit():
    speed = dict(bytes_per_second=40e9, multiply_adds_per_second=250e9)
    found = scan.limits((1, 512, 4096), 'forward', TIMES, speed)
    assert set(found) == {'cpu avx512'}
    assert found['cpu avx512']['fraction'] == found['cpu avx512']['ms']/2

def row(mode='forward', **changes):
    made = dict(mode=mode, ms=TIMES, faster_than_mambapy=machine.ratios(TIMES, 'mambapy'),
        faster_than_reference=machine.ratios(TIMES, 'reference'), multiple_of_u={'cpu avx512': 1.1},
        multiple_of_u_gated={'cpu avx512': 4.5}, extra_bytes=dict(mambapy=100, chunked=14), twice_the_length={'cpu avx512': 2.2})
    return dict(made, **changes)

def verdicts(name, made): return {b['what']: b['reached'] for b in scan.bars(name, made)}

def test_bars_of_quality():
    "Numbers of the quality document, each on its good and its bad side"
    found = verdicts('S1', row())
    assert found == {'chunked times as fast as mambapy': True, 'cpu avx512 times as fast as mambapy': True,
        'cpu avx512 times as fast as the reference': True, 'cpu avx512 extra memory / bytes(u)': True,
        'cpu avx512 extra memory / bytes(u) with z': False, 'chunked memory / memory of mambapy': True, 'cpu avx512 t(2L)/t(L)': True}
    assert verdicts('S1', row('both'))['cpu avx512 extra memory / bytes(u) with z']
    assert not verdicts('S1', row(extra_bytes=dict(mambapy=100, chunked=16)))['chunked memory / memory of mambapy']
    assert not verdicts('S1', row(twice_the_length={'cpu avx512': 2.31}))['cpu avx512 t(2L)/t(L)']

@pytest.mark.parametrize('name, ratio, reached', [('S1', 99, False), ('S3', 100, True), ('S2', 99, True), ('S1b', 69, False)])
def test_forward_and_backward_asks_for_more_on_s1_and_s3(name, ratio, reached):
    made = row('both', faster_than_mambapy={'chunked': 9, 'cpu avx512': ratio})
    assert verdicts(name, made)['cpu avx512 times as fast as mambapy'] is reached

def test_a_slower_build_has_its_own_bar():
    ms = {'mambapy': dict(median=300.), 'cpu avx2': dict(median=6.), 'cpu sse2': dict(median=20.)}
    made = row(ms=ms, faster_than_mambapy=machine.ratios(ms, 'mambapy'), faster_than_reference={})
    found = [(b['what'], b['at_least'], b['reached']) for b in scan.speed_bars('S1', made)]
    assert found == [('cpu avx2 times as fast as mambapy', 50, True)]

# ---------------------------------------------------------------- files
def test_rows_of_the_same_machine_stay_and_those_of_another_go(tmp_path):
    path, head = tmp_path/'x.json', machine.described()
    machine.stored(path, head, dict(a=dict(bars=[machine.bar('x', 1., at_least=2.)])))
    rows = machine.stored(path, head, dict(b=dict(bars=[])))
    found = read_json(path)
    assert list(rows) == ['a', 'b'] == list(found['rows'])
    assert not found['bars_reached'] and found['bars_missed'] == ['a: x: 1 (>= 2) MISSED']
    write_json(path, dict(found, machine=dict(found['machine'], cpu='another')))
    assert list(machine.stored(path, head, dict(c={}))) == ['c']

def test_memory_counts_what_is_returned_and_what_is_freed_before():
    "Freed memory that was resident already must not hide what a call takes"
    size = 2**24
    found = machine.forked(grown, size)
    if found is None: pytest.skip('no /proc/self/clear_refs')
    assert 2*size <= found < 2.5*size

def grown(size):
    "Growth by a tensor of `size` bytes and its double, after as much was freed in small pieces"
    pieces = [torch.ones(1024) for _ in range(size//1024)]
    del pieces
    return machine.growth(lambda: torch.ones(size//4)*2)

# ---------------------------------------------------------------- peers
RIGHT = [k for k in peers.methods() if k != 'mambapy']

@pytest.mark.parametrize('name', RIGHT)
@pytest.mark.parametrize('gate', [False, True])
def test_every_method_computes_the_same_scan_and_gradients(name, gate):
    "On a length that the cumulative products survive"
    made, shape = peers.methods(), (2, 5, 16)
    off = peers.difference(*(peers.outcome(made[k], shape, 'both', gate) for k in (name, 'mambapy')))
    assert off is not None and off < 1e-4

def test_cumulative_products_are_called_wrong_on_a_long_sequence():
    made = peers.methods()
    off = peers.difference(*(peers.outcome(made[k], (1, 8, 2048), 'forward') for k in ('cumulative', 'mambapy')))
    assert off is None or off > scan.WRONG

def test_difference_sees_what_is_not_finite_or_off():
    a = torch.tensor([1., -4.])
    assert peers.difference([a], [a]) == 0
    assert peers.difference([a+torch.tensor([0., 1.])], [a]) == .25
    assert peers.difference([a, a*float('nan')], [a, a]) is None

@pytest.mark.parametrize('name', ['Mamba', 'BiMamba', 'SS2D', 'ES2D'])
def test_mambapy_inside_a_mixer_equals_the_mixer_and_is_gone_afterwards(name):
    bench = module('mixers')
    off = peers.difference(*(bench.prepared(name, k, 8, 6)() for k in ('mambapy', 'auto')))
    assert off is not None and off < 1e-4
    with contextlib.suppress(RuntimeError), peers.replaced('bare'): raise RuntimeError
    assert package_mixers.selective_scan is not peers.bare_scan and package_mixers.ordered_scan is not peers.bare_ordered

@pytest.mark.parametrize('name', ['Mamba', 'BiMamba', 'SS2D', 'ES2D'])
def test_the_identity_is_the_input_and_keeps_what_is_around_it_alive(name):
    "Same output as y = u alone; gradients for the projections, which y = u alone leaves without"
    bench = module('mixers')
    free, bare = (bench.prepared(name, k, 8, 6)() for k in ('identity', 'bare'))
    assert torch.equal(free[0], bare[0]) and torch.allclose(free[1], bare[1], atol=1e-6)
    assert all(g is not None for g in free) and any(g is None for g in bare)

# ---------------------------------------------------------------- end to end
RUNS = dict(scan=['--shapes', 'S1', '--modes', 'forward', '--allocators', 'default'], mixers=['--mixers', 'Mamba'], auto=[],
    network=['--rows', 'released forward'], models=['--rows', 'resnet6'])

@pytest.mark.parametrize('name', RUNS)
def test_every_script_runs_and_writes_its_fields(name, tmp_path):
    path, options = tmp_path/f'{name}.json', ['--smoke', '--repeats', '1', '--threads', '1', *RUNS[name]]
    words = [sys.executable, str(ROOT/'bench'/f'{name}.py'), *options, '--output', str(path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = read_json(path)
    assert {'machine', 'threads', 'versions', 'load_average', 'date', 'command', 'waiting', 'allocators', 'rows', 'bars_reached',
        'bars_missed', 'busy', 'what'} <= set(found)
    assert found['rows'] and str(tmp_path) not in path.read_text()
    for r in found['rows'].values():
        assert r['bars'] and all(v['median'] > 0 for v in r['ms'].values())
        assert set(r['measured']) >= {'date', 'command', 'threads', 'load_average', 'other_processes_cores', 'busy'}
    assert done.stdout.strip()
