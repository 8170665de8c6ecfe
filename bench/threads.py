"""How threads should wait: training steps of the laptop preset in ten seconds, on a quiet machine and beside a busy program.

`python bench/threads.py` starts one process per setting, since OpenMP reads it once, and writes bench/results/threads.json.
"""
import os
import subprocess
import sys
import time
from pathlib import Path

from machine import described, one_step

from i2i_mamba_nb.core import write_json

ROOT, SECONDS = Path(__file__).resolve().parent.parent, 10
SETTINGS = {'default': {}, 'sleep at once': dict(OMP_WAIT_POLICY='passive'), 'short spin (ours)': dict(GOMP_SPINCOUNT='1000'),
    'long spin': dict(GOMP_SPINCOUNT='50000')}

def steps():
    "Training steps of the laptop preset within SECONDS"
    import torch

    from i2i_mamba_nb.core import network, recipe
    torch.manual_seed(0)
    generator = network('i2i_mamba').build(n_sources=2, **network('i2i_mamba').presets['laptop'])
    judge = network('patchgan').build(n_channels=3, **network('patchgan').presets['laptop'])
    made = recipe('paired_adversarial').build(generator=generator, discriminator=judge)
    step = one_step(made, dict(source=torch.randn(2, 2, 128, 128), target=torch.randn(2, 1, 128, 128)))
    done, start = 0, time.perf_counter()
    while time.perf_counter()-start < SECONDS:
        step()
        done += 1
    return done

def counted(setting):
    "Steps of a process of its own under a setting"
    env = {k: v for k, v in os.environ.items() if k not in ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT')} | setting
    return int(subprocess.run([sys.executable, __file__, 'steps'], env=env, capture_output=True, text=True, check=True).stdout)

def main():
    head = described()
    quiet = {name: counted(s) for name, s in SETTINGS.items()}
    with subprocess.Popen([sys.executable, '-c', 'while True: pass']) as other:
        busy = {name: counted(s) for name, s in SETTINGS.items()}
        other.kill()
    record = dict(what=f'training steps of the laptop preset in {SECONDS} s', **head, quiet=quiet, beside_a_busy_program=busy)
    write_json(ROOT/'bench'/'results'/'threads.json', record)
    print(*(f'{name:20} quiet {quiet[name]:4}   busy {busy[name]:4}' for name in SETTINGS), sep='\n')

if __name__ == '__main__':
    if sys.argv[1:] == ['steps']: print(steps())
    else: main()
