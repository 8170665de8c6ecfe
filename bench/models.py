"""Every registered generator at its paper's size, batch 1: forward, training step, peak memory, beside its counts; stores JSON.

Forward is what synthesis does (test mode, no gradients): one image of 256 x 256, one denoising step, one latent step of 64 x 64, as the
record says. A training step is forward, the mean absolute error, backward and one step of Adam of the generator alone. Peak memory is what
the resident set grows by during the first such call in a fresh process, weights and inputs not counted, Adam's state counted. Forward is
judged where freed memory goes back to the system, a training step and the forward pass it is compared with where the allocator keeps it
(`memory_kept`, see machine.py), as `engine.train.fit` has it.
"""
import argparse
import json
import sys
from pathlib import Path

import torch
from machine import ALLOCATORS, RESULTS, Others, bar, described, growth, in_child, interleaved, n_cores, peers, stored, told

from i2i_mamba_nb.core import network, networks
from i2i_mamba_nb.measure.complexity import cost

FORWARD = dict(hmf_mambainr=2., cravim=2., mm2ct=3., cola_diff=1.5)     # seconds, on two cores
STEP = 4.                                                               # times the forward pass
LIKE = dict(hmf_mambainr=('i2i_mamba', 1., 1.5))                        # parameters and multiply-adds, times another's

def entry(name, smoke):
    "(config, (h, w)) of the paper, or the smallest that runs"
    record = network(name)
    if not smoke: return min(record.multiply_adds, key=lambda e: len(e[0]))[:2]
    multiple, smallest = record.inputs.sides(record.smallest)
    side = multiple*-(-smallest//multiple)
    return record.smallest, (side, side)

def built(name, config, size):
    "Network and its inputs"
    torch.manual_seed(0)
    record, rng = network(name), torch.Generator().manual_seed(0)
    further = [f(config, 1, tuple(size), rng) for f in record.inputs.further.values()]
    return record.build(**config), [torch.randn(1, record.inputs.channels(config), *size, generator=rng), *further]

def calls(name, config, size):
    "dict mode -> function without arguments"
    net, inputs = built(name, config, size)
    adam = torch.optim.Adam(net.parameters(), 1e-6)
    def forward():
        with torch.no_grad(): return net.eval()(*inputs)
    def step():
        out = net.train()(*inputs)
        adam.zero_grad()
        (out-.5).abs().mean().backward()
        adam.step()
        return out
    return dict(forward=forward, step=step)

def times(name, config, size, rounds): return interleaved(calls(name, config, size), rounds, turn=0)
def peak(name, config, size, mode): return growth(calls(name, config, size)[mode])

CHILDREN = dict(times=times, peak=peak)

def demands(name, found, ms, kept, smoke):
    "What a generator must reach"
    seconds = ms['forward']['median']/1e3
    bars = [bar('training step / forward, memory kept', kept['step']['median']/kept['forward']['median'], at_most=STEP)]
    if name in FORWARD: bars.insert(0, bar('forward, s', seconds, at_most=FORWARD[name]))
    if name in LIKE and not smoke:
        other, low, high = LIKE[name]
        than = cost(network(other))
        for what in ('parameters', 'multiply_adds'):
            bars.append(bar(f'{what} / those of {other}', getattr(found, what)/getattr(than, what), at_least=low, at_most=high))
    return bars

def measure(name, options):
    "One row"
    others, (config, size) = Others(), entry(name, options.smoke)
    found, job = cost(network(name), config, size), [name, config, size]
    ms, kept = (in_child(__file__, ['times', *job, options.repeats], options.threads, a) for a in ALLOCATORS)
    peaks = {mode: in_child(__file__, ['peak', *job, mode], options.threads) for mode in ('forward', 'step')}
    facts = dict(parameters=found.parameters, multiply_adds=found.multiply_adds, kept_for_backward_bytes=found.activations)
    bars = demands(name, found, ms, kept, options.smoke)
    return dict(config=config, size=size, **facts, ms=ms, memory_kept=dict(ms=kept), peak_bytes=peaks, bars=bars, measured=others.report())

def show(name, row):
    "A row as text"
    peaks = ', '.join(f'{k} {"not known" if v is None else f"{v/1e6:.0f} MB"}' for k, v in row['peak_bytes'].items())
    print(f'{name}: {row["parameters"]:,} parameters, {row["multiply_adds"]/1e9:.1f} GMAC, '
        +', '.join(f'{k} {v["median"]:.0f} ms' for k, v in row['ms'].items())+f'; peak {peaks}')
    print('  memory kept:', ', '.join(f'{k} {v["median"]:.0f}' for k, v in row['memory_kept']['ms'].items()), 'ms')
    for b in row['bars']: print('  bar:', told(b))
    sys.stdout.flush()

def parse():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--rows', default=','.join(networks('generator')))
    p.add_argument('--threads', type=int, default=min(2, n_cores()))
    p.add_argument('--repeats', type=int, default=3)
    p.add_argument('--smoke', action='store_true', help='tiny networks: whether everything runs')
    p.add_argument('--output', type=Path, default=RESULTS/'models.json')
    p.add_argument('--child', help=argparse.SUPPRESS)
    return p.parse_args()

def main():
    options = parse()
    torch.set_num_threads(options.threads)
    if options.child:
        job, *rest = json.loads(options.child)
        return print(json.dumps(CHILDREN[job](*rest)))
    head, rows = described(), {}
    for name in options.rows.split(','):
        rows[name] = measure(name, options)
        show(name, rows[name])
        stored(options.output, dict(head, peers=peers()), rows, what=' '.join(__doc__.split()))

if __name__ == '__main__': sys.exit(main())
