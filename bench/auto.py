"""backend='auto' against every backend by name on ten shapes, forward and with backward, taken in turns; stores JSON.

The reference is timed up to 1024 steps (it keeps a graph of several nodes per step and is never the fastest beyond a few). The ratio is
that of the medians; many short turns keep it steady.
"""
import argparse
import json
import sys
from pathlib import Path

import torch
from machine import RESULTS, Others, available, bar, described, in_child, interleaved, n_cores, stored, told
from peers import Method, by_name, prepared

SHAPES = [(1, 16, 64), (1, 64, 256), (2, 64, 64), (1, 17, 1000), (4, 32, 512), (1, 256, 1024), (2, 512, 512), (1, 64, 16384),
    (1, 1024, 2048), (4, 512, 4096)]
REFERENCE_LIMIT, MOST = 1024, 1.1       # MOST: auto may take this many times what the best single backend takes

def times(shape, mode, rounds):
    "Milliseconds of auto and of each backend"
    names = ['auto', *(k for k in available() if k != 'reference' or shape[2] <= REFERENCE_LIMIT)]
    calls = {k: prepared(Method(by_name(k), False), shape, mode) for k in names}
    few = dict(reference=5, chunked=10) if 'cpu' in names else dict(reference=5)
    return interleaved(calls, rounds, most=few, turn=.02)

def best(ms):
    "(name, milliseconds) of the fastest backend by name"
    return min(((k, v['median']) for k, v in ms.items() if k != 'auto'), key=lambda kv: kv[1])

def measure(shape, mode, options):
    "One row"
    others, ms = Others(), in_child(__file__, [shape, mode, options.repeats], options.threads)
    name, least = best(ms)
    ratio = ms['auto']['median']/least
    return dict(shape=dict(zip('bdl', shape, strict=True)), mode=mode, ms=ms, best=name, auto_by_best=ratio,
        bars=[bar('time of auto / time of the best backend by name', ratio, at_most=MOST)], measured=others.report())

def parse():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--threads', type=int, default=min(2, n_cores()))
    p.add_argument('--repeats', type=int, default=30, help='rounds')
    p.add_argument('--smoke', action='store_true', help='the smallest shape only, few rounds')
    p.add_argument('--output', type=Path, default=RESULTS/'auto.json')
    p.add_argument('--child', help=argparse.SUPPRESS)
    return p.parse_args()

def main():
    options = parse()
    torch.set_num_threads(options.threads)
    if options.child: return print(json.dumps(times(*json.loads(options.child))))
    head, rows = described(), {}
    for shape in SHAPES[:1] if options.smoke else SHAPES:
        for mode in ('forward', 'both'):
            key = f'{shape} {mode}'
            row = rows[key] = measure(shape, mode, options)
            text = ', '.join(f'{k} {v["median"]:.3f}' for k, v in row['ms'].items())
            print(f'{key:26s} {text} ms | best {row["best"]} | {told(row["bars"][0])}', flush=True)
    stored(options.output, head, rows, what=' '.join(__doc__.split()))

if __name__ == '__main__': sys.exit(main())
