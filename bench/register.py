"""Registration of real volumes with known matrices: error, time, memory, and the same bytes whatever the threads.

`python bench/register.py DATA` expects DATA/ms/{patient07,patient19} (University of Ljubljana 3-D MS data, CC BY: T1, T1 post-contrast,
T2, FLAIR on one grid of 1 mm, brain-extracted, aligned by its authors to some tenths of a millimetre, which is part of the error here).
One image of a pair is moved by a matrix of about 16 mm mean displacement inside the brain, by SciPy's cubic interpolation on a grid of its
own, and register() must find it. Every pair runs in a process of its own. Writes bench/results/register.json.
"""
import argparse
import hashlib
import json
import os
import time
from pathlib import Path

import numpy as np
from machine import RESULTS, Others, bar, described, in_child, resident, told
from scipy.ndimage import affine_transform
from scipy.spatial.transform import Rotation

from i2i_mamba_nb.core import write_json
from i2i_mamba_nb.data.register import about, register
from i2i_mamba_nb.data.volume import Volume, read_volume
from i2i_mamba_nb.measure.metrics import head_mask

PATIENTS, PAIRS = ('patient07', 'patient19'), ('T1-T2', 'T1-FLAIR', 'T2-FLAIR', 'FLAIR-T1', 'T1POST-T1')
# rotation vector (degrees), stretches, shears (share), shift (mm), whether the moving image gets a grid of its own
KNOWN = dict(
    rigid=((6, -5, 8), (1, 1, 1), (0, 0, 0), (8, -9, 7), False),
    rigid_back=((-8, 7, -5), (1, 1, 1), (0, 0, 0), (-9, 6, -8), False),
    affine=((6, -5, 8), (1.05, .96, 1.03), (.02, -.03, .02), (8, -9, 7), False),
    affine_back=((-5, 8, -6), (.95, 1.04, .97), (-.02, .03, -.01), (-8, 8, -9), False),
    affine_other_grid=((4, 9, -6), (1.03, 1.02, .96), (.02, .01, -.03), (9, 7, -8), True),
)

def source(data, patient, name): return read_volume(next(iter(sorted((data/'ms'/patient).glob(f'{name}_N4*.nii.gz')))))

def matrix_of(rotation, stretch, shear, shift, centre):
    linear = np.diag(np.array(stretch, float))
    linear[0, 1], linear[0, 2], linear[1, 2] = shear
    return about(Rotation.from_rotvec(rotation, degrees=True).as_matrix()@linear, centre, shift)

def other_grid(v):
    "Sagittal slices of 1.2 mm, oblique, over the same place"
    affine, middle = np.eye(4), v.affine@[*np.array(v.shape)/2, 1]
    affine[:3, :3] = Rotation.from_rotvec((4, 3, -5), degrees=True).as_matrix()@np.array([[0, 0, 1.2], [.94, 0, 0], [0, .94, 0]])
    affine[:3, 3] = middle[:3]-affine[:3, :3]@[128, 128, 75]
    return affine, (256, 256, 150)

def moved(v, matrix, own_grid):
    "The volume with its content moved: what lay at x lies at matrix x"
    affine, shape = other_grid(v) if own_grid else (v.affine, v.shape)
    B = np.linalg.inv(v.affine)@np.linalg.inv(matrix)@affine
    return Volume(affine_transform(v.data, B[:3, :3], B[:3, 3], shape, order=3).astype(np.float32), affine)

def one(data, patient, pair, name):
    "A row: one pair, one known matrix"
    a, b = pair.split('-')
    fixed = source(data, patient, a)
    inside = np.argwhere(head_mask(fixed.data))[::40]
    points = inside@fixed.affine[:3, :3].T+fixed.affine[:3, 3]
    *parts, own_grid = KNOWN[name]
    true = matrix_of(*parts, points.mean(0))
    moving = moved(source(data, patient, b), true, own_grid)
    start, cpu = time.perf_counter(), time.process_time()
    r = register(fixed, moving)
    seconds, cpu = time.perf_counter()-start, time.process_time()-cpu
    off = lambda m: np.linalg.norm(points@(m-true)[:3, :3].T+(m-true)[:3, 3], axis=1)
    e, bytes_of = off(r.matrix), hashlib.sha256(r.matrix.tobytes()).hexdigest()[:16]
    return dict(patient=patient, pair=pair, known=name, displacement_mm=round(float(off(np.eye(4)).mean()), 2),
        mean_error_mm=round(float(e.mean()), 3), worst_error_mm=round(float(e.max()), 3), seconds=round(seconds, 2),
        cpu_seconds=round(cpu, 2), peak_mb=round(resident('VmHWM')/2**20), mi_before=round(r.before, 4), mi_after=round(r.after, 4),
        refused=r.refused, matrix_sha256=bytes_of)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('data', type=Path, nargs='?')
    p.add_argument('--child')
    p.add_argument('--threads', type=int, default=2)
    a = p.parse_args()
    if a.child:
        job = json.loads(a.child)
        return print(json.dumps(one(Path(job.pop('data')), **job)))
    others, rows = Others(), []
    for patient in PATIENTS:
        for pair in PAIRS:
            for name in KNOWN:
                rows.append(in_child(__file__, dict(data=str(a.data.resolve()), patient=patient, pair=pair, name=name), a.threads))
                print(*rows[-1].values(), flush=True)
    job = dict(data=str(a.data.resolve()), patient=PATIENTS[0], pair=PAIRS[0], name='affine')
    same = len({in_child(__file__, job, n)['matrix_sha256'] for n in (1, 2, 4)} | {rows[2]['matrix_sha256']}) == 1
    worst, slowest = (max(r[k] for r in rows) for k in ('mean_error_mm', 'seconds'))
    bars = [bar('worst mean error, mm', worst, at_most=.5), bar('slowest, s', slowest, at_most=30),
        bar('peak memory, MB', max(r['peak_mb'] for r in rows), at_most=1024),
        bar('same bytes with 1, 2 and 4 threads', int(same), at_least=1), bar('refused', sum(bool(r['refused']) for r in rows), at_most=0)]
    head = dict(described(), load_average_at_the_end=round(os.getloadavg()[0], 2), **others.report())
    write_json(RESULTS/'register.json', dict(what='register() on real brains, known matrices of about 16 mm',
        data='University of Ljubljana 3-D MS data, two patients (CC BY)', **head, known=KNOWN, rows=rows, bars=bars))
    print(*map(told, bars), sep='\n')

if __name__ == '__main__': main()
