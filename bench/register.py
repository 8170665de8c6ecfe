"""Registration of real volumes with known matrices: error, time, memory, and the same bytes whatever the threads.

`python bench/register.py DATA` expects DATA/ms/{patient07,patient19} (University of Ljubljana 3-D MS data, CC BY: T1, T1 post-contrast,
T2, FLAIR on one grid of 1 mm, brain-extracted). One image of a pair is moved by a matrix of about 16 mm mean displacement inside the
brain, by SciPy's cubic interpolation, some on a grid of its own, and register() must find it. Every row runs in a process of its own.
Writes bench/results/register.json.

The known matrix is not the whole truth: the images of the data set lie some tenths of a millimetre apart before anything is moved. That
offset is the known matrix taken away from what was found; its mean over the five motions of a pair is `offset_mm`, what is left of a row is
`recovery_mm`, and going round T1 -> T2 -> FLAIR -> T1 by the mean offsets must close, if they are the data's and not ours. `edges_z_mm` is
another witness: where the correlation of the images' edges (logarithm of the gradient's length, inside the brain) is largest along z, by a
parabola through shifts of -1, 0 and 1 mm; no code of the package takes part. `mean_error_mm` contains the offset.
"""
import argparse
import hashlib
import json
import os
import time
from pathlib import Path

import numpy as np
from machine import RESULTS, Others, bar, described, in_child, resident, told
from scipy.ndimage import affine_transform, binary_erosion, gaussian_gradient_magnitude
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
        refused=r.refused, matrix_sha256=bytes_of,
        own=(np.linalg.inv(true)@r.matrix).tolist(), centre=points.mean(0).tolist())

def edges(data, patient, pair):
    "mm along z by which the edges of a pair's second image lie above those of the first"
    v = [source(data, patient, name) for name in pair.split('-')]
    inside = binary_erosion(head_mask(v[0].data), iterations=8)
    size = [gaussian_gradient_magnitude(x.data.astype(float), 1.) for x in v]
    a, b = (np.log(g+.3*np.median(g[inside])) for g in size)
    low, middle, high = (np.corrcoef(a[inside], np.roll(b, -s, 2)[inside])[0, 1] for s in (-1, 0, 1))
    return dict(z=round(.5*(low-high)/(low-2*middle+high)*float(np.sign(v[0].affine[2, 2])), 2))

def distance(a, b, centre, radius=60.):
    "Mean distance, mm, between where two matrices take points of a ball like a brain"
    x = np.random.default_rng(0).standard_normal((4000, 3))
    x = centre+radius*x/np.linalg.norm(x, axis=1, keepdims=True)*np.random.default_rng(1).random((4000, 1))**(1/3)
    return float(np.linalg.norm(x@(a-b)[:3, :3].T+(a-b)[:3, 3], axis=1).mean())

def offsets(rows):
    "Adds recovery_mm and offset_mm to the rows; returns what is left after going round three pairs, per patient"
    mean, centre = {}, np.array(rows[0]['centre'])
    for key in dict.fromkeys((r['patient'], r['pair']) for r in rows):
        mine = [r for r in rows if (r['patient'], r['pair']) == key]
        mean[key] = np.mean([r['own'] for r in mine], 0)
        for r in mine:
            r['recovery_mm'] = round(distance(np.array(r['own']), mean[key], centre), 3)
            r['offset_mm'] = round(distance(np.eye(4), mean[key], centre), 3)
    for r in rows: del r['own'], r['centre']
    ring = lambda p: np.linalg.inv(mean[p, 'T1-FLAIR'])@mean[p, 'T2-FLAIR']@mean[p, 'T1-T2']
    return {p: round(distance(np.eye(4), ring(p), centre), 3) for p in PATIENTS}

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('data', type=Path, nargs='?')
    p.add_argument('--child')
    p.add_argument('--threads', type=int, default=2)
    a = p.parse_args()
    if a.child:
        job = json.loads(a.child)
        return print(json.dumps((edges if job.pop('edges', False) else one)(Path(job.pop('data')), **job)))
    others, rows = Others(), []
    for patient in PATIENTS:
        for pair in PAIRS:
            for name in KNOWN:
                rows.append(in_child(__file__, dict(data=str(a.data.resolve()), patient=patient, pair=pair, name=name), a.threads))
                print(*list(rows[-1].values())[:-3], flush=True)
    job = dict(data=str(a.data.resolve()), patient=PATIENTS[0], pair=PAIRS[0], name='affine')
    same = len({in_child(__file__, job, n)['matrix_sha256'] for n in (1, 2, 4)} | {rows[2]['matrix_sha256']}) == 1
    closure = offsets(rows)
    look = lambda p, k: in_child(__file__, dict(data=job['data'], patient=p, pair=k, edges=True), a.threads)['z']
    witness = {f'{p} {k}': look(p, k) for p in PATIENTS for k in PAIRS}
    errors = sorted(r['mean_error_mm'] for r in rows)
    summary = dict(worst=errors[-1], median=errors[len(errors)//2], rows=len(errors), at_most_half_mm=sum(e <= .5 for e in errors))
    bars = [bar('worst mean error, offset of the data taken away, mm', max(r['recovery_mm'] for r in rows), at_most=.5),
        bar('three registrations in a ring, mm', max(closure.values()), at_most=.5),
        bar('slowest, s', max(r['seconds'] for r in rows), at_most=30),
        bar('peak memory, MB', max(r['peak_mb'] for r in rows), at_most=1024),
        bar('same bytes with 1, 2 and 4 threads', int(same), at_least=1), bar('refused', sum(bool(r['refused']) for r in rows), at_most=0)]
    head = dict(described(), load_average_at_the_end=round(os.getloadavg()[0], 2), **others.report())
    write_json(RESULTS/'register.json', dict(what='register() on real brains, known matrices of about 16 mm',
        data='University of Ljubljana 3-D MS data, two patients (CC BY)', **head, known=KNOWN, ring_mm=closure, edges_z_mm=witness,
        mean_error_mm=summary, rows=rows, bars=bars))
    print(summary, *map(told, bars), sep='\n')

if __name__ == '__main__': main()
