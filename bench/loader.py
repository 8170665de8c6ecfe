"""How many slices a second the datasets deliver through PyTorch's DataLoader: 256 x 256 float32, two sources and one target.

`python bench/loader.py` writes simulated volumes (six patients, 272 x 240 x 32, three modalities) to a temporary folder, so that every
picture is cropped along one axis and padded along the other, and writes bench/results/loader.json. The bar is 400 slices a second with
two workers, batch 4 and augmentation. Nothing is done with the batches: a training step comes on top.
"""
import argparse
import itertools
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
from machine import Others, bar, described, stored, told
from torch.utils.data import DataLoader

from i2i_mamba_nb.core import numpy_rng
from i2i_mamba_nb.data.cohort import Cohort, Subject
from i2i_mamba_nb.data.slices import ManyToMany, SlicePairs, UnpairedBatches, UnpairedSlices
from i2i_mamba_nb.data.volume import Volume, write_volume

ROOT = Path(__file__).resolve().parent.parent
SHAPE, PATIENTS, MODALITIES, SIZE = (240, 272, 32), 6, ('T1', 'T2', 'PD'), 256
SETTINGS = [(2, 4), (2, 1), (2, 16), (1, 4), (0, 4)]    # workers, batch

def cohort(folder):
    "A head of noise per patient and modality"
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in SHAPE), indexing='ij')
    inside, subjects = (x/.9)**2+(y/.9)**2+(z/2)**2 < 1, []
    for k in range(PATIENTS):
        paths = {m: folder/f'p{k}_{m}.nii' for m in MODALITIES}
        for m, path in paths.items():
            noise = numpy_rng(0, 'loader', k, m).standard_normal(SHAPE, np.float32)
            write_volume(path, Volume(np.where(inside, 500+60*noise, 0).astype(np.float32), np.eye(4)))
        subjects.append(Subject(f'p{k}', 'train', paths))
    return Cohort(tuple(subjects), MODALITIES, folder)

def datasets(folder):
    "name -> dataset; slices are kept in a folder but for the first"
    c, pair = cohort(folder), (('T1', 'T2'), 'PD')
    common = dict(size=SIZE, augment=True)
    kept = dict(common, folder=folder/'slices')
    def pairs(**options): return SlicePairs(c, 'train', *pair, **options)
    return {'pairs': pairs(**common), 'pairs, from a folder': pairs(**kept), 'pairs, centred': pairs(**{**kept, 'augment': False}),
        'pairs, three adjacent': pairs(adjacent=3, **kept), 'pairs, turned': pairs(rotate=5, zoom=.05, **kept),
        'unpaired': UnpairedSlices(c, 'train', *pair, **kept), 'many to many': ManyToMany(c, 'train', MODALITIES, **kept)}

def batches(data, batch, items):
    "Lists of keys, epoch after epoch, about `items` in all"
    if isinstance(data, UnpairedSlices): epochs = (UnpairedBatches(data, batch, e) for e in itertools.count())
    else:
        keys = ([(int(i), e) for i in numpy_rng(0, 'order', e).permutation(len(data))] for e in itertools.count())
        epochs = ([k[j:j+batch] for j in range(0, len(k), batch)] for k in keys)
    return list(itertools.islice(itertools.chain.from_iterable(epochs), -(-items//batch)))

def rate(data, keys, workers, skip=4):
    "Slices per second once the workers run: the first batches do not count"
    n, others = 0, Others()
    for k, batch in enumerate(DataLoader(data, batch_sampler=keys, num_workers=workers)):
        if k == skip: start, n = time.perf_counter(), -len(batch['z'])
        n += len(batch['z'])
    return n/(time.perf_counter()-start), others.cores()

def measured(data, workers, batch, items, repeats):
    "A row: median and least of some runs"
    runs = [rate(data, batches(data, batch, items), workers) for _ in range(repeats)]
    speeds, busy = [r for r, _ in runs], max(b or 0 for _, b in runs)
    return dict(workers=workers, batch=batch, slices_per_second=round(median(speeds)), least=round(min(speeds)), most=round(max(speeds)),
        repeats=repeats, other_processes_cores=busy, busy=busy > .5)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--items', type=int, default=1600, help='slices per run')
    p.add_argument('--repeats', type=int, default=5)
    p.add_argument('--only', default='', help='names of datasets that contain this')
    p.add_argument('--out', type=Path, default=ROOT/'bench'/'results'/'loader.json')
    a = p.parse_args()
    head, rows = described(), {}
    with tempfile.TemporaryDirectory() as place:
        for name, data in datasets(Path(place)).items():
            if a.only not in name: continue
            taken = [measured(data, w, b, a.items, a.repeats) for w, b in SETTINGS]
            bars = [bar('slices per second, two workers, batch 4', taken[0]['slices_per_second'], at_least=400)]
            rows[name] = dict(settings=taken, bars=bars, measured=dict(busy=any(r['busy'] for r in taken)))
            print(f'{name:24}', *(f'{r["workers"]}w b{r["batch"]}: {r["slices_per_second"]:5}' for r in taken), told(bars[0]), sep='  ')
    stored(a.out, head, rows, what='slices per second through a DataLoader, 256 x 256 float32, two sources and '
        'one target (seven channels with three adjacent slices), nothing done with the batches', volumes=list(SHAPE), patients=PATIENTS)

if __name__ == '__main__': main()
