"The compiled scan without Python (scan_check.cpp): on other processors through an emulator, and under the sanitizers"
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent/'scan_check.cpp'
FLAGS = '-std=c++17 -fopenmp -ffp-contract=fast -fno-math-errno -fno-trapping-math -fno-signed-zeros'.split()
X86 = platform.machine() in ('x86_64', 'AMD64')

def built_and_run(tmp_path, compiler, flags, runner=()):
    "Output of the check, compiled so"
    if not shutil.which(compiler): pytest.skip(f'no {compiler}')
    program = tmp_path/'scan_check'
    made = subprocess.run([compiler, *FLAGS, *flags, str(SOURCE), '-o', str(program)], capture_output=True, text=True)
    if 'cannot find -l' in made.stderr: pytest.skip('the compiler lacks a library')
    assert made.returncode == 0, made.stderr[-2000:]
    run = subprocess.run([*runner, str(program)], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout+run.stderr[-2000:]
    return run.stdout

@pytest.mark.skipif(not X86, reason='flags of x86')
def test_sanitizers_find_nothing(tmp_path):
    sanitizers = ['-O1', '-g', '-fsanitize=address,undefined', '-fno-sanitize-recover=all', '-DW=4']
    assert built_and_run(tmp_path, 'g++', sanitizers).startswith('256 cases')

def test_neon_under_an_emulator(tmp_path):
    if not shutil.which('qemu-aarch64'): pytest.skip('no qemu-aarch64: compiled for NEON elsewhere, never run here')
    out = built_and_run(tmp_path, 'aarch64-linux-gnu-g++', ['-O2', '-static', '-DW=4'], ['qemu-aarch64'])
    assert 'lanes of 4' in out
