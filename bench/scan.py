"""Scan backends against mambapy, the step-by-step reference and what torch offers, taken in turns; ratios printed and stored as JSON.

Time: wall milliseconds, median and least of the repeats; ratios are taken from the medians. Every row has a process of its own for each
setting of the allocator. Bars are judged with the default setting. Inputs and the gradient of y are made before.
Memory: what a fresh process's resident set grows by at its highest (VmHWM of /proc, set back before the call) over what it was
with the inputs made and the method called twice on a tiny input; the output and all gradients count.
Limit: the larger of two times that no program for this recurrence can beat here. Bytes: every input read once and every result written
once (backward reads inputs and gradient again) at the speed of a copy within memory. Instructions: vector multiplications, fused or not,
that the formula needs with csrc/simd.h's exponential (see MULTIPLIES), at the rate of the fastest loop on this machine that consists of
them, a convolution or matrix product of torch; builds with narrower vectors get their share of that rate.
"""
import argparse
import json
import sys
from pathlib import Path

import torch
from machine import (
    ALLOCATORS, BUSY, RESULTS, SHAPES, STATES, Others, bar, copy_speed, described, forked, growth, in_child, interleaved, multiply_speed,
    n_cores, peers, ratios, stored, told
)
from peers import builds, difference, left_out, methods, outcome, prepared

MODES, SMOKE = ('forward', 'both'), dict(S1=(1, 16, 64), S3=(2, 8, 32))
SLOW = dict(reference=2, doubling=1, associative_scan=2, cumulative=2)      # runs of methods that take seconds
WRONG = 1e-3        # difference from mambapy from which a method is called wrong
# per state and step: (decay, exponential, states, output; backward runs the states again, then eight more); per step: softplus and the rest
MULTIPLIES = dict(avx512=dict(forward=(8, 16), both=(23, 39)), other=dict(forward=(10, 19), both=(27, 45)))
LANES = dict(avx512=16, avx2=8, sse2=4, neon=4)
SPEED = dict(avx512=dict(forward=dict(mambapy=100, reference=150), both=dict(S1=100, S3=100, mambapy=70)),
    avx2=dict(forward=dict(mambapy=50), both=dict(mambapy=30)), chunked=dict(forward=dict(S2=2, mambapy=4), both=dict(S2=1.5, mambapy=3)))
MEMORY, LINEAR, STRETCH = dict(forward=1.25, both=4., both_gated=5., chunked=.15), 2.3, 5.

# ---------------------------------------------------------------- in processes of their own
def times(shape, mode, rounds):
    "Milliseconds of every method, and its difference from mambapy, which must not be large"
    tried = {k: m for k, m in methods().items() if not left_out(k, shape, mode)}
    wanted = outcome(tried['mambapy'], shape, mode)
    off = {k: difference(outcome(m, shape, mode), wanted) for k, m in tried.items() if k != 'mambapy'}
    del wanted
    return dict(ms=interleaved({k: prepared(m, shape, mode) for k, m in tried.items()}, rounds, most=SLOW), difference_from_mambapy=off)

def lengths(shape, mode, rounds):
    "t(2L)/t(L) of what must be linear"
    chosen = {k: m for k, m in methods().items() if k == 'chunked' or k in builds()}
    b, d, l = shape
    ms = interleaved({(k, n): prepared(m, (b, d, n), mode) for k, m in chosen.items() for n in (l, 2*l)}, rounds)
    return {k: ms[k, 2*l]['median']/ms[k, l]['median'] for k in chosen}

def memory(shape, mode, name, gate, threads):
    "Bytes that one call takes at its highest"
    torch.set_num_threads(threads)
    method = methods()[name]
    for _ in range(2): prepared(method, (1, 4, 40), mode, gate)()
    return growth(prepared(method, shape, mode, gate))

def speeds(threads):
    "What the limits are computed from"
    torch.set_num_threads(threads)
    return dict(bytes_per_second=copy_speed(), multiply_adds_per_second=multiply_speed(), threads=threads)

CHILDREN = dict(times=times, lengths=lengths, speeds=speeds)

# ---------------------------------------------------------------- limits and bars
def moved(shape, mode):
    "Bytes that must come from memory and go there"
    b, d, l = shape
    forward, backward = 3*b*d*l+2*b*STATES*l, 5*b*d*l+4*b*STATES*l
    return 4*(forward if mode == 'forward' else forward+backward)

def multiplications(shape, mode, build):
    "Multiplications of single numbers that the recurrence needs"
    b, d, l = shape
    per_state, per_step = MULTIPLIES.get(build, MULTIPLIES['other'])[mode]
    return b*d*l*(per_state*STATES+per_step)

def limit(shape, mode, build, speed, widest):
    "Milliseconds that a build cannot beat: by bytes, by instructions, and the larger"
    by_bytes = 1e3*moved(shape, mode)/speed['bytes_per_second']
    by_instructions = 1e3*multiplications(shape, mode, build)/(speed['multiply_adds_per_second']*LANES[build]/widest)
    return dict(bytes=by_bytes, instructions=by_instructions, ms=max(by_bytes, by_instructions))

def limits(shape, mode, ms, speed):
    "Limit of every build in `ms` and the fraction of it that is reached"
    known = [k.split()[1] for k in ms if k.startswith('cpu ')]
    widest = max((LANES[k] for k in known), default=1)
    found = {k: limit(shape, mode, k, speed, widest) for k in known}
    return {f'cpu {k}': dict(v, fraction=v['ms']/ms[f'cpu {k}']['median']) for k, v in found.items()}

def multiples(shape, extra):
    "Extra bytes of each method as multiples of bytes(y) = bytes(u)"
    b, d, l = shape
    return {k: None if v is None else v/(4*b*d*l) for k, v in extra.items()}

def speed_bars(name, row):
    "Demands on the times of a row"
    out, key = [], row['mode']
    for method in row['ms']:
        demand = SPEED.get(method.removeprefix('cpu '), {}).get(key, {})
        if not demand: continue
        out.append(bar(f'{method} times as fast as mambapy', row['faster_than_mambapy'].get(method), demand.get(name, demand['mambapy'])))
        if 'reference' in demand and 'reference' in row['ms']:
            out.append(bar(f'{method} times as fast as the reference', row['faster_than_reference'].get(method), demand['reference']))
    return out

def memory_bars(row):
    "Demands on the memory of a row"
    out, most = [], (row.get('extra_bytes') or {}).get('mambapy')
    for gate, key in ((False, 'multiple_of_u'), (True, 'multiple_of_u_gated')):
        at_most = MEMORY['both_gated' if gate and row['mode'] == 'both' else row['mode']]
        found = {k: v for k, v in row.get(key, {}).items() if k.startswith('cpu ')}
        out += [bar(f'{k} extra memory / bytes(u){" with z" if gate else ""}', v, at_most=at_most) for k, v in found.items()]
    if most: out.append(bar('chunked memory / memory of mambapy', row['extra_bytes']['chunked']/most, at_most=MEMORY['chunked']))
    return out

def bars(name, row):
    "All demands of a row, each met or not"
    linear = [bar(f'{k} t(2L)/t(L)', v, at_most=LINEAR) for k, v in row.get('twice_the_length', {}).items()]
    return speed_bars(name, row)+memory_bars(row)+linear

# ---------------------------------------------------------------- the run
def measured_memory(row, shape, mode, names, options):
    "Add extra bytes to a row"
    of = lambda name, gate: forked(memory, shape, mode, name, gate, options.threads)
    row['extra_bytes'] = {k: of(k, False) for k in names if k != 'reference'}
    row['multiple_of_u'] = multiples(shape, row['extra_bytes'])
    row['multiple_of_u_gated'] = multiples(shape, {k: of(k, True) for k in names if k.startswith('cpu ')})

def measure(name, shape, mode, speed, options):
    "One row: times with both settings of the allocator, ratios, limits, memory, bars"
    others = Others()
    settings = {a: in_child(__file__, ['times', shape, mode, options.repeats], options.threads, a) for a in options.allocators.split(',')}
    first = settings.pop('default')
    row = dict(shape=dict(zip('bdl', shape, strict=True), n=STATES), mode=mode, **first,
        faster_than_mambapy=ratios(first['ms'], 'mambapy'), faster_than_reference=ratios(first['ms'], 'reference'))
    row['memory_kept'] = {k: dict(ms=v['ms'], faster_than_mambapy=ratios(v['ms'], 'mambapy'),
        faster_than_reference=ratios(v['ms'], 'reference')) for k, v in settings.items()}.get('kept')
    row['wrong'] = {k: 'not finite' if v is None else v for k, v in first['difference_from_mambapy'].items() if v is None or v > WRONG}
    row['left_out'] = {k: why for k in methods() if (why := left_out(k, shape, mode))}
    row['limit'] = limits(shape, mode, first['ms'], speed)
    row['twice_the_length'] = in_child(__file__, ['lengths', shape, mode, options.repeats], options.threads)
    if not options.no_memory: measured_memory(row, shape, mode, first['ms'], options)
    if (name, mode) == ('S1', 'both'): row['stretch_5_ms'] = {k: v['median'] <= STRETCH for k, v in first['ms'].items()}
    return dict(row, bars=bars(name, row), measured=others.report())

def line(row, name):
    "One method of a row as text"
    ms, parts = row['ms'][name], [f'  {name:17s} {row["ms"][name]["median"]:9.2f} ms, least {row["ms"][name]["least"]:9.2f}']
    if name in row['faster_than_mambapy']: parts.append(f'{row["faster_than_mambapy"][name]:7.2f}x mambapy')
    if name in row['faster_than_reference']: parts.append(f'{row["faster_than_reference"][name]:7.2f}x reference')
    if row['memory_kept']:
        kept = row['memory_kept']
        parts.append(f'memory kept {kept["ms"][name]["median"]:9.2f} ms'
            +(f' {kept["faster_than_mambapy"][name]:7.2f}x' if name in kept['faster_than_mambapy'] else ' '*9))
    if (m := row.get('multiple_of_u', {}).get(name)) is not None: parts.append(f'memory {m:6.2f} u')
    if (m := row.get('multiple_of_u_gated', {}).get(name)) is not None: parts.append(f'with z {m:.2f} u')
    if name in row['limit']: parts.append(f'{100*row["limit"][name]["fraction"]:.0f} % of the limit of {row["limit"][name]["ms"]:.2f} ms')
    if name in row['wrong']: parts.append(f'WRONG: {row["wrong"][name]}')
    return ', '.join(parts) if ms else ''

def show(name, row):
    "A row as text"
    print(f'{name} {row["mode"]} {row["shape"]}, n: medians; ratios with the default allocator, then with memory kept')
    for k in row['ms']: print(line(row, k))
    for k, why in row['left_out'].items(): print(f'  {k:17s} left out: {why}')
    for b in row['bars']: print(f'  bar: {told(b)}')
    print(flush=True)

def parse():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--shapes', help='which of '+', '.join(SHAPES))
    p.add_argument('--modes', default=','.join(MODES))
    p.add_argument('--repeats', type=int, default=5, help='rounds; the slowest methods get two')
    p.add_argument('--threads', type=int, default=min(2, n_cores()))
    p.add_argument('--allocators', default=','.join(ALLOCATORS), help='default must be among them')
    p.add_argument('--no-memory', action='store_true', help='leave out the memory figures')
    p.add_argument('--smoke', action='store_true', help='tiny shapes: whether everything runs')
    p.add_argument('--output', type=Path, default=RESULTS/'scan.json')
    p.add_argument('--child', help=argparse.SUPPRESS)
    return p.parse_args()

def main():
    options = parse()
    torch.set_num_threads(options.threads)
    if options.child:
        job, *rest = json.loads(options.child)
        return print(json.dumps(CHILDREN[job](*rest)))
    head, shapes = described(), SMOKE if options.smoke else SHAPES
    speed = in_child(__file__, ['speeds', options.threads], options.threads)
    rows = {}
    for name in (options.shapes or ','.join(shapes)).split(','):
        for mode in options.modes.split(','):
            row = rows[f'{name} {mode}'] = measure(name, shapes[name], mode, speed, options)
            show(name, row)
            stored(options.output, dict(head, peers=peers('mambapy')), rows, what=' '.join(__doc__.split()), speeds=speed)
    missed = [f'{k}: {told(b)}' for k, r in rows.items() for b in r['bars'] if not b['reached']]
    print(f'{len(missed)} bars missed; written to {options.output.name}')
    if any(r['measured']['busy'] for r in rows.values()): print(f'BUSY: other processes used more than {BUSY} cores: ratios may be off')

if __name__ == '__main__': sys.exit(main())
