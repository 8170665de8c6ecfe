"""Mixers with their scan against the same mixers on mambapy's scan and with a scan that costs nothing; stores JSON.

Forward and backward, d_model 256, 64 x 64 tokens, gradients of the input and of every parameter, methods taken in turns in a process of
their own. `identity` puts y = u, summed over directions, in place of the scan and hands a gradient of zero to all that drives it, so that
everything around the scan still runs; `bare` is y = u alone: torch then leaves out the backward pass of the projections that make the
steps, B and C, which no real scan can. `mambapy` gathers each direction, scans it with mambapy and scatters it back. Gates stay.
"""
import argparse
import json
import sys
from pathlib import Path

import torch
from machine import ALLOCATORS, RESULTS, Others, bar, described, in_child, interleaved, n_cores, peers, ratios, stored, told
from peers import STAND_INS, difference, replaced

from i2i_mamba_nb.ssm.mixers import ES2D, SS2D, BiMamba, Mamba, set_backend

MIXERS = dict(Mamba=Mamba, BiMamba=BiMamba, SS2D=SS2D, ES2D=ES2D)
METHODS = ('auto', 'chunked', 'identity', 'bare', 'mambapy')
FASTER, IDENTITY = dict(Mamba=10., SS2D=20.), 1.3       # times as fast as on mambapy; times the time of the identity

def made(name, d_model, side):
    "(mixer, input, gradient of the output); tokens for sequence mixers, an image for the others"
    torch.manual_seed(0)
    mixer = MIXERS[name](d_model)
    x = torch.randn(1, d_model, side, side) if name.endswith('2D') else torch.randn(1, side*side, d_model)
    return mixer, x.requires_grad_(), torch.randn_like(x)

def prepared(name, method, d_model, side):
    "A function without arguments: one forward and backward with the method in place of the scan"
    mixer, x, grad_y = made(name, d_model, side)
    if method not in STAND_INS: set_backend(mixer, method)
    def both():
        with replaced(method):
            y = mixer(x)
            return [y, *torch.autograd.grad(y, [x, *mixer.parameters()], grad_y, allow_unused=True)]
    return both

def times(name, d_model, side, rounds):
    "Milliseconds of all methods, and how far the scans are from each other"
    calls = {k: prepared(name, k, d_model, side) for k in METHODS}
    outcome = {k: [t.detach() for t in calls[k]()] for k in METHODS if k not in ('identity', 'bare')}
    off = {k: difference(v, outcome['mambapy']) for k, v in outcome.items() if k != 'mambapy'}
    del outcome
    return dict(ms=interleaved(calls, rounds, most=dict(mambapy=min(rounds, 4))), difference_from_mambapy=off)

def bars(name, row):
    "What a mixer must reach"
    ms, auto = row['ms'], row['ms']['auto']['median']
    out = [bar('times as fast as on mambapy', row['faster_than_mambapy']['auto'], FASTER[name])] if name in FASTER else []
    return [*out, bar('time / time with identity', auto/ms['identity']['median'], at_most=IDENTITY)]

def measure(name, threads, options):
    "One row: a mixer at a number of threads"
    others, size = Others(), (8, 6) if options.smoke else (256, 64)
    job = [name, *size, options.repeats]
    first, kept = (in_child(__file__, job, threads, a) for a in ALLOCATORS)
    row = dict(d_model=size[0], side=size[1], **first, faster_than_mambapy=ratios(first['ms'], 'mambapy'),
        time_by_bare=first['ms']['auto']['median']/first['ms']['bare']['median'],
        memory_kept=dict(ms=kept['ms'], faster_than_mambapy=ratios(kept['ms'], 'mambapy')))
    row['memory_kept']['bars'] = bars(name, row['memory_kept'])
    return dict(row, bars=bars(name, row), measured=dict(others.report(), threads=threads))

def show(key, row):
    "A row as text"
    for title, part in (('', row), (', memory kept', row['memory_kept'])):
        times = ', '.join(f'{k} {v["median"]:.1f}' for k, v in part['ms'].items())
        print(f'{key}{title}: {times} ms |', '; '.join(map(told, part['bars'])))
    print(f'  time / time with y = u alone: {row["time_by_bare"]:.2f}', flush=True)

def parse():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--mixers', default=','.join(MIXERS))
    p.add_argument('--threads', default=','.join(str(k) for k in (1, 2) if k <= n_cores()), help='numbers of threads, one after the other')
    p.add_argument('--repeats', type=int, default=8, help='rounds; mambapy four runs')
    p.add_argument('--smoke', action='store_true', help='tiny sizes: whether everything runs')
    p.add_argument('--output', type=Path, default=RESULTS/'mixers.json')
    p.add_argument('--child', help=argparse.SUPPRESS)
    return p.parse_args()

def main():
    options = parse()
    if options.child:
        torch.set_num_threads(int(options.threads))
        return print(json.dumps(times(*json.loads(options.child))))
    head, rows = described(), {}
    for name in options.mixers.split(','):
        for threads in map(int, options.threads.split(',')):
            key = f'{name}, {threads} threads'
            rows[key] = measure(name, threads, options)
            show(key, rows[key])
            stored(options.output, dict(head, peers=peers('mambapy')), rows, what=' '.join(__doc__.split()))

if __name__ == '__main__': sys.exit(main())
