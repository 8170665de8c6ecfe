"""The demo, recorded: `python bench/demo.py` runs what `make demo` runs and writes bench/results/demo.json and the packaged weights.

--weights copies the network's weights and card to i2i_mamba_nb/weights/simulated_t1_t2_to_pd, from where the README's example reads them.
"""
import argparse
import csv
import os
import shutil
import time
from pathlib import Path

from machine import described

from i2i_mamba_nb.app.demo import demo
from i2i_mamba_nb.core import read_json, write_json

ROOT = Path(__file__).resolve().parent.parent
PACKAGED = ROOT/'i2i_mamba_nb'/'weights'/'simulated_t1_t2_to_pd'

def rows(path):
    "Rows of a results table of the page, numbers rounded to what is shown"
    with open(path, newline='', encoding='utf-8') as f: return list(csv.DictReader(f))

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--out', type=Path, default=ROOT/'out')
    p.add_argument('--weights', action='store_true')
    a = p.parse_args()
    head, cached, start = described(), (a.out/'cohort'/'manifest.csv').exists(), time.monotonic()
    page = demo(a.out, echo=print)
    seconds, facts = round(time.monotonic()-start, 1), read_json(page.parent/'card.json')
    runs = {name: {k: info[k] for k in ('steps', 'seconds')} for name, info in facts['runs'].items()}
    record = dict(what='make demo: T1, T2 -> PD on simulated subjects, whole test volumes, strict protocol', simulated=True, **head,
        cohort_was_cached=cached, seconds=seconds, seconds_of_stages=facts['seconds_of_stages'], runs=runs, split_hash=facts['split_hash'],
        results=rows(page.parent/'results.csv'), load_average_after=round(os.getloadavg()[0], 2))
    write_json(ROOT/'bench'/'results'/'demo.json', record)
    if a.weights:
        PACKAGED.mkdir(parents=True, exist_ok=True)
        for name in ('weights.safetensors', 'run.json'): shutil.copy(page.parent/'i2i_mamba'/name, PACKAGED/name)

if __name__ == '__main__': main()
