"""Kills a training run with SIGKILL at many points and starts it again; prints what came out as JSON.
One process imports torch and forks every run, so that a point costs tenths of a second."""
import json
import mmap
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

torch.set_num_threads(1)
from tiny_run import Blobs, Deadly, settings, tiny_recipe  # noqa: E402  (threads are set before anything computes)

import i2i_mamba_nb.engine.train as training  # noqa: E402
from i2i_mamba_nb.engine.checkpoint import load  # noqa: E402

saving = mmap.mmap(-1, 1)       # shared with the children: 1 while a checkpoint is written
count = mmap.mmap(-1, 4)        # operations on the disk inside saves so far

def die(): os.kill(os.getpid(), signal.SIGKILL)

def watch_saves(at=None):
    "Mark saves in shared memory and count their operations on the disk; die at number `at`"
    real = training.save
    def save(*args, **kwargs):
        saving[0] = 1
        try: return real(*args, **kwargs)
        finally: saving[0] = 0
    training.save = save
    for name in ('fsync', 'replace', 'mkdir', 'unlink', 'rmdir'): setattr(os, name, counted(getattr(os, name), at))

def counted(real, at):
    "The operation, counted inside saves"
    def call(*args, **kwargs):
        if saving[0]:
            number = int.from_bytes(count[:], 'little')+1
            count[:] = number.to_bytes(4, 'little')
            if number == at: die()
        return real(*args, **kwargs)
    return call

def child(out, workers=0, operation=None, picture=None):
    "The command, in a child process; its id"
    saving[0], count[:] = 0, bytes(4)
    pid = os.fork()
    if pid: return pid
    code = 1
    try:
        watch_saves(operation)
        data = Blobs() if picture is None else Deadly(picture)
        training.fit(settings(validate_every=7, workers=workers), data, out, validation=Blobs(3), build=tiny_recipe, progress=False)
        code = 0
    finally: os._exit(code)

def wait(pid): return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def killed_after(out, delay, workers):
    "Run killed from outside after some seconds; a shorter delay is tried where it was faster"
    while True:
        pid = child(out, workers)
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
        inside, status = bool(saving[0]), wait(pid)
        if status == -signal.SIGKILL: return inside
        for p in sorted(out.rglob('*'), reverse=True): p.rmdir() if p.is_dir() else p.unlink()
        delay *= .6

def outcome(out):
    "All that must be equal: the log without its clock, the weights, and every tensor of the last checkpoint"
    rows = [','.join(v for k, v in enumerate(line.split(',')) if k != clock(out)) for line in (out/'log.csv').read_text().splitlines()]
    last = load(out/'checkpoints')
    tensors = {f'{stem}.{k}': v.numpy().tobytes().hex() for stem, named in last.tensors.items() for k, v in named.items()}
    state = {k: v for k, v in last.state.items() if k not in ('seconds', 'log_bytes', 'settings')}
    return rows, (out/'weights.safetensors').read_bytes().hex(), tensors, state

def clock(out): return (out/'log.csv').read_text().split('\n')[0].split(',').index('seconds')

def main(folder, n=10, seed=0):
    "The reference, then n points: three kinds in turn, workers in some of them"
    dice, results = random.Random(seed), []
    started = time.monotonic()
    reference = folder/'reference'
    assert wait(child(reference)) == 0
    seconds, operations = time.monotonic()-started, int.from_bytes(count[:], 'little')
    for k in range(n):
        out, kind, workers = folder/f'run{k}', ('operation', 'picture', 'operation', 'time', 'operation')[k % 5], 2*(k in (3, 8))
        low, high = dict(operation=(1, operations), picture=(1, 48), time=(.2*seconds, .9*seconds))[kind]
        point = dice.uniform(low, high) if kind == 'time' else dice.randint(low, high)
        if kind == 'time': inside, status = killed_after(out, point, workers), -signal.SIGKILL
        else:
            status = wait(child(out, **{kind: point}))
            inside = bool(saving[0])
        before = load(out/'checkpoints')
        again = wait(child(out, workers))
        results.append(dict(kind=kind, point=point, workers=workers, status=status, inside=inside, again=again,
            before=before and before.step, equal=outcome(out) == outcome(reference)))
    print(json.dumps(results))

if __name__ == '__main__': main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
