"""I2I-Mamba at full size, 256 x 256, batch 1: forward and training step, with the scan as it is, on mambapy, and for nothing; stores JSON.

Forward is what synthesis does (test mode, no gradients). A training step is both phases with both optimisers and the patch discriminator.
`identity`, `bare` and `mambapy` stand in for the scan as in bench/mixers.py. The released code needs mamba-ssm's CUDA operator and cannot
run on a CPU; compared with is what comes closest: the released variant, which is that network layer for layer, on mambapy's scan.
`formats` compares memory formats, numbers of threads and bfloat16 autocast, all with backend='auto'.
"""
import argparse
import contextlib
import json
import sys
from pathlib import Path

import torch
from machine import (
    ALLOCATORS, RESULTS, Others, bar, cpu_flags, described, in_child, interleaved, n_cores, one_step, peers, ratios, stored, told
)
from peers import replaced

from i2i_mamba_nb.core import network, recipe

METHODS, MODES, VARIANTS = ('auto', 'identity', 'bare', 'mambapy'), ('forward', 'step'), ('released', 'paper')
FORWARD, STEP, IDENTITY = 1.7, 2., 1.1      # times as fast as on mambapy; times the time of the identity
SMOKE = dict(base_channels=4, n_stages=2)

def built(variant, size, config):
    "(recipe with both networks, a batch)"
    torch.manual_seed(0)
    generator = network('i2i_mamba').build(n_sources=2, variant=variant, **config)
    judge = network('patchgan').build(n_channels=3)
    batch = dict(source=torch.randn(1, 2, size, size), target=torch.randn(1, 1, size, size))
    return recipe('paired_adversarial').build(generator=generator, discriminator=judge), batch

def stepper(made, batch, mode):
    "A function without arguments: a forward pass, or a training step"
    return one_step(made, batch) if mode == 'step' else lambda: made.synthesise(batch['source'])

def under(context, function, *args):
    "The function, called within a context made by context(*args)"
    def run():
        with context(*args): return function()
    return run

def times(variant, mode, size, config, rounds):
    "Milliseconds with each stand-in for the scan; one network for all, so that all have the same weights and memory"
    run = stepper(*built(variant, size, config), mode)
    return interleaved({k: under(replaced, run, k) for k in METHODS}, rounds, turn=0)

def formatted(variant, size, config, layout):
    "Recipe and batch in a memory format"
    made, batch = built(variant, size, config)
    for net in made.networks.values(): net.to(memory_format=layout)
    return made, {k: v.contiguous(memory_format=layout) for k, v in batch.items()}

def threads_of(n):
    @contextlib.contextmanager
    def context():
        before = torch.get_num_threads()
        torch.set_num_threads(n)
        try: yield
        finally: torch.set_num_threads(before)
    return context

def formats(variant, mode, size, config, rounds, threads):
    "Milliseconds of each memory format, with bfloat16 and with one thread"
    layouts = dict(contiguous=torch.contiguous_format, channels_last=torch.channels_last)
    runs = {k: stepper(*formatted(variant, size, config, v), mode) for k, v in layouts.items()}
    calls = dict(runs)
    if threads > 1: calls.update({f'{k}, 1 thread': under(threads_of(1), f) for k, f in runs.items()})
    if 'avx512_bf16' in cpu_flags():
        calls.update({f'{k}, bfloat16': under(torch.autocast, f, 'cpu', torch.bfloat16) for k, f in runs.items()})
    return interleaved(calls, rounds, turn=0)

CHILDREN = dict(times=times, formats=formats)

def judged(mode, ms):
    "Times with their ratios and what the whole network must reach"
    faster, demand = ratios(ms, 'mambapy'), FORWARD if mode == 'forward' else STEP
    by = {k: ms['auto']['median']/ms[k]['median'] for k in ('identity', 'bare')}
    bars = [bar('times as fast as on mambapy', faster['auto'], demand), bar('time / time with identity', by['identity'], at_most=IDENTITY)]
    return dict(ms=ms, faster_than_mambapy=faster, time_by_bare=by['bare'], bars=bars)

def measure(variant, mode, options):
    "One row with stand-ins"
    others, size, config = Others(), 32 if options.smoke else 256, SMOKE if options.smoke else {}
    job = ['times', variant, mode, size, config, options.repeats]
    first, kept = (judged(mode, in_child(__file__, job, options.threads, a)) for a in ALLOCATORS)
    return dict(variant=variant, mode=mode, size=size, **first, memory_kept=kept, measured=others.report())

def measure_formats(variant, mode, options):
    "One row that compares formats"
    others, size, config = Others(), 32 if options.smoke else 256, SMOKE if options.smoke else {}
    job = ['formats', variant, mode, size, config, options.repeats, options.threads]
    ms = in_child(__file__, job, options.threads)
    return dict(variant=variant, mode=mode, size=size, ms=ms, best=min(ms, key=lambda k: ms[k]['median']), measured=others.report())

def show(key, row):
    "A row as text"
    print(f'{key}:', ', '.join(f'{k} {v["median"]:.0f}' for k, v in row['ms'].items()), 'ms')
    if 'memory_kept' in row:
        print('  memory kept:', ', '.join(f'{k} {v["median"]:.0f}' for k, v in row['memory_kept']['ms'].items()), 'ms')
    for b in row.get('bars', []): print('  bar:', told(b))
    sys.stdout.flush()

def parse():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--rows', default=','.join([f'{v} {m}' for v in VARIANTS for m in MODES]+[f'formats {m}' for m in MODES]))
    p.add_argument('--threads', type=int, default=min(2, n_cores()))
    p.add_argument('--repeats', type=int, default=3)
    p.add_argument('--smoke', action='store_true', help='a tiny network: whether everything runs')
    p.add_argument('--output', type=Path, default=RESULTS/'network.json')
    p.add_argument('--child', help=argparse.SUPPRESS)
    return p.parse_args()

def main():
    options = parse()
    torch.set_num_threads(options.threads)
    if options.child:
        job, *rest = json.loads(options.child)
        return print(json.dumps(CHILDREN[job](*rest)))
    head, rows = described(), {}
    for key in options.rows.split(','):
        kind, mode = key.split()
        rows[key] = measure_formats('released', mode, options) if kind == 'formats' else measure(kind, mode, options)
        show(key, rows[key])
        stored(options.output, dict(head, peers=peers('mambapy')), rows, what=' '.join(__doc__.split()))

if __name__ == '__main__': sys.exit(main())
