"What a recorded figure needs to be read later: machine, threads, versions, load, command, date"
import datetime
import os
import platform
import sys
from pathlib import Path

import torch

from i2i_mamba_nb.core import versions

def cpu_model():
    "Name of the processor"
    info = Path('/proc/cpuinfo')
    names = [w.split(':', 1)[1].strip() for w in info.read_text().splitlines() if w.startswith('model name')] if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()

def cpu_flags():
    "Instruction sets that matter here"
    info = Path('/proc/cpuinfo')
    words = set(info.read_text().split()) if info.exists() else set()
    return [f for f in ('sse2', 'avx2', 'fma', 'avx512f', 'avx512_bf16') if f in words]

def described():
    "dict for the head of a results file"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    words = [Path(w).name if Path(w).is_absolute() else w for w in sys.argv[1:]]
    machine = dict(cpu=cpu_model(), cores=cores, flags=cpu_flags(), system=platform.system())
    command = ' '.join(['python', f'bench/{Path(sys.argv[0]).name}', *words])
    return dict(machine=machine, threads=torch.get_num_threads(), versions=versions(), load_average=round(os.getloadavg()[0], 2),
        command=command, date=datetime.date.today().isoformat())
