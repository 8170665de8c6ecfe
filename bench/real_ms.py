"""The main job on real volumes, recorded: train T1, T2 -> FLAIR on one patient, synthesise it for two others, score it where it is known.

`python bench/real_ms.py DATA --seconds 900` expects DATA/ms/{patient07,patient19} (University of Ljubljana 3-D MS data, CC BY) and
DATA/cstar (T1, T2, FLAIR of one person). It runs the commands a user would type and writes bench/results/real-ms-flair.json and
nbs/images/real-ms-flair.png; the volumes themselves stay in --out.
"""
import argparse
import csv
import shlex
import subprocess
import sys
from pathlib import Path

from machine import described

from i2i_mamba_nb.core import atomic_path, read_json, write_json
from i2i_mamba_nb.data.cohort import read_manifest
from i2i_mamba_nb.data.slices import load_subject, to_image
from i2i_mamba_nb.data.volume import read_volume, to_canonical
from i2i_mamba_nb.measure.metrics import Window

ROOT = Path(__file__).resolve().parent.parent
NAME, MS = 'real-ms-flair', '{patient}/{modality}_N4*.nii.gz'

def i2i(*words):
    "Run one command of the command line; its words, paths shortened, for the record"
    subprocess.run([str(Path(sys.executable).parent/'i2i-mamba'), *map(str, words)], check=True)
    return shlex.join(['i2i-mamba', *(str(w) if not isinstance(w, Path) else w.name for w in words)])

def commands(data, out, seconds):
    "Every step of the job; returns the commands as typed"
    ms, stroke = out/'ms.csv', out/'cstar.csv'
    files = [w for m in ('T1', 'T2') for w in ('--source', f'{m}={data/"cstar"/m}.nii.gz')]
    return [
        i2i('prepare', data/'ms', '--pattern', MS, '--train', 'patient07', '--test', 'patient19', '--out', ms),
        i2i('train', ms, '--sources', 'T1,T2', '--target', 'FLAIR', '--out', out/'run', '--seconds', seconds, '--steps', 10**6),
        i2i('evaluate', out/'run', ms, '--out', out/'patient19'),
        i2i('predict', out/'run', ms, '--split', 'test', '--out', out/'volumes'),
        i2i('predict', out/'run', *files, '--out', out/'volumes'/'cstar_FLAIR.nii.gz').replace(str(data), 'DATA'),
        i2i('prepare', data, '--pattern', '{patient}/{modality}.nii.gz', '--test', 'cstar', '--out', stroke),
        i2i('evaluate', out/'run', stroke, '--out', out/'cstar'),
    ]

def results(folder):
    "Rows of an evaluation with numbers as numbers"
    def number(v):
        try: return round(float(v), 5)
        except ValueError: return v
    with open(folder/'results-all.csv', newline='', encoding='utf-8') as f:
        return [{k: number(v) for k, v in r.items()} for r in csv.DictReader(f)]

def shown(subject, fake_path, window):
    "Sources, target, synthetic image and absolute error of one slice, each in its window, 0 to 1"
    loaded = load_subject(subject, ['T1', 'T2', 'FLAIR'])
    fake = to_canonical(read_volume(fake_path))[0].data
    z = int(fake.shape[2]*.55)
    images = [to_image((loaded.images[m]+1)/2, z) for m in ('T1', 'T2', 'FLAIR')]+[to_image(window.normalise(fake), z)]
    return [*images, abs(images[3]-images[2])]

def picture(out, window, path):
    "Both subjects, one slice each, drawn from the files that the commands wrote"
    import matplotlib
    matplotlib.use('agg')
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(2, 5, figsize=(11, 4.9), layout='constrained')
    for ax, name, fake in zip(axes, ('ms', 'cstar'), ('patient19*', 'cstar_FLAIR.nii.gz'), strict=True):
        subject = read_manifest(out/f'{name}.csv').split('test')[0]
        for k, (a, image) in enumerate(zip(ax, shown(subject, next((out/'volumes').glob(fake)), window), strict=True)):
            drawn = a.imshow(image, cmap='inferno' if k == 4 else 'gray', vmin=0, vmax=.25 if k == 4 else 1, interpolation='nearest')
            a.set_xticks([]), a.set_yticks([])
        ax[0].set_ylabel(subject.patient)
    titles = ['T1', 'T2', 'FLAIR, real', 'FLAIR, synthetic', 'absolute error']
    for ax, title in zip(axes[0], titles, strict=True): ax.set_title(title, fontsize=10)
    fig.colorbar(drawn, ax=axes[:, -1], fraction=.05, label='share of the window')
    with atomic_path(path) as part: fig.savefig(part, dpi=80, metadata={'Software': None})

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('data', type=Path)
    p.add_argument('--out', type=Path, default=ROOT/'out'/'real')
    p.add_argument('--seconds', type=int, default=900)
    a = p.parse_args()
    typed = commands(a.data, a.out, a.seconds)
    info = read_json(a.out/'run'/'run.json')
    record = dict(what='T1, T2 -> FLAIR, trained on patient07, whole volumes, strict protocol', data='real: University of Ljubljana 3-D MS '
        'data (CC BY) and one stroke patient (MIT)', **described(), commands=typed, steps=info['steps'], seconds=round(info['seconds'], 1),
        config=info['config'], patient19=results(a.out/'patient19'), cstar=results(a.out/'cstar'))
    write_json(ROOT/'bench'/'results'/f'{NAME}.json', record)
    picture(a.out, Window(*info['window']['FLAIR']), ROOT/'nbs'/'images'/f'{NAME}.png')

if __name__ == '__main__': main()
