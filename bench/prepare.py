"""Preparation of a cohort at paper size: time, cores and memory. `python bench/prepare.py --out FOLDER`

Simulated subjects in IXI's layout (T1 on a grid of its own, T2, PD) are written once, then prepared as `i2i-mamba prepare` does:
registered onto T1, N4 where asked, framed to 256 x 256 x 100. A few of them are also prepared with one process and with two, each from
an empty folder, for the ratio. Memory is that of all processes together, looked at five times a second: `peak_bytes` is the sum of their
proportional sizes (a page of a library that n processes share counts 1/n in each, so that the sum is what the machine really holds);
`peak_resident_bytes` counts shared pages once per process.
"""
import argparse
import contextlib
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import psutil
from machine import RESULTS, Others, bar, described, peers, stored, told

from i2i_mamba_nb.core import read_json, write_json
from i2i_mamba_nb.data.archives import propose_manifest
from i2i_mamba_nb.data.cohort import read_manifest, write_manifest
from i2i_mamba_nb.data.prepare import prepare_cohort, read_steps
from i2i_mamba_nb.data.presets import preset

def work(manifest, out, steps, workers, result):
    "In a process of its own: prepare, and write down what came out"
    done = prepare_cohort(read_manifest(manifest), out, read_steps(steps), workers=workers)
    gains = [f['after']-f['before'] for r in done.records.values() for f in r['registration'].values()]
    shifts = [max(map(abs, s), default=0) for r in done.records.values() for s in r['shifts'].values()]
    write_json(result, dict(subjects=len(done.records), failures=len(done.failures), refused=sum(bool(f['refused'])
        for r in done.records.values() for f in r['registration'].values()), least_gain=min(gains), largest_shift=max(shifts)))

def tree_bytes(process):
    "(proportional, resident) bytes of a process and all below it"
    found = []
    for p in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied): found.append((p.memory_full_info().pss, p.memory_info().rss))
    return tuple(map(sum, zip(*found, strict=True))) if found else (0, 0)

def measured(manifest, out, steps, workers):
    "Row of one preparation from an empty folder"
    shutil.rmtree(out, ignore_errors=True)
    result, others, peak = out.with_suffix('.json'), Others(), (0, 0)
    words = [sys.executable, __file__, '--work', manifest, out, steps, workers, result]
    start = time.perf_counter()
    running = subprocess.Popen(list(map(str, words)))
    process, over = psutil.Process(running.pid), threading.Event()
    def watch():
        nonlocal peak
        while not over.wait(.2):
            try: peak = tuple(map(max, zip(peak, tree_bytes(process), strict=True)))
            except psutil.NoSuchProcess: return
    watcher = threading.Thread(target=watch)
    watcher.start()
    status = running.wait()
    over.set(), watcher.join()
    if status: raise SystemExit(f'preparation ended with status {status}')
    return dict(read_json(result), workers=workers, seconds=round(time.perf_counter()-start, 1), peak_bytes=peak[0],
        peak_resident_bytes=peak[1], measured=others.report())

def subset(cohort, n, path):
    "Manifest of the first n subjects"
    return write_manifest(path, replace(cohort, subjects=cohort.subjects[:n]))

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--work', nargs=5)
    p.add_argument('--out', type=Path, default=Path('out')/'prepare')
    p.add_argument('--subjects', type=int, default=50, help='0: only the ratio; the row of an earlier run stays')
    p.add_argument('--few', type=int, default=6, help='subjects for the ratio of two processes to one')
    p.add_argument('--steps', default='brain')
    a = p.parse_args()
    if a.work: return work(a.work[0], a.work[1], a.work[2], int(a.work[3]), a.work[4])
    head, plan = described(), preset('ixi-like', size='paper')
    folder = plan.write(a.out/'raw', patients=[p.patient for p in plan.patients][:max(a.subjects, a.few)])
    cohort = propose_manifest(folder)
    few = subset(cohort, a.few, a.out/'few.csv')
    rows = {f'{a.few} subjects, {w} processes': measured(few, a.out/f'few-{w}', a.steps, w) for w in (1, 2)}
    one, two = rows.values()
    two['bars'] = [bar('two processes over one', one['seconds']/two['seconds'], at_least=1.6)]
    if a.subjects:
        whole = measured(subset(cohort, a.subjects, a.out/'all.csv'), a.out/'all', a.steps, 2)
        whole['bars'] = [bar('peak GB of all processes', whole['peak_bytes']/1e9, at_most=3)]
        rows[f'{a.subjects} subjects, 2 processes'] = whole
    what = 'preparation of simulated subjects at paper size, IXI layout'
    stored(RESULTS/'prepare.json', head, rows, what=what, steps=asdict(read_steps(a.steps)),
        libraries=peers('SimpleITK', 'scikit-learn', 'nibabel'))
    for b in (b for row in rows.values() for b in row.get('bars', [])): print(told(b))

if __name__ == '__main__': main()
