"The README's Python runs as it stands, and its commands exist"
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT/'README.md').read_text(encoding='utf-8')
EXAMPLES = re.findall(r'^```python\n(.*?)^```', README, re.S | re.M)

def test_there_is_an_example(): assert EXAMPLES

@pytest.mark.parametrize('code', EXAMPLES, ids=range(len(EXAMPLES)))
def test_python_example_runs(code, tmp_path):
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True, env=env())
    assert done.returncode == 0, done.stderr

def env():
    "The environment with a drawing back end that needs no screen"
    import os
    return {**os.environ, 'MPLBACKEND': 'agg'}

def test_figures_are_the_recorded_ones():
    record = json.loads((ROOT/'bench'/'results'/'demo.json').read_text(encoding='utf-8'))
    psnr = {r['method']: r['PSNR [dB]'].split()[0] for r in record['results']}
    told = [f'I2I-Mamba {psnr["I2I-Mamba"]} dB',
        f'the twin {psnr["twin without Mamba"]} dB', f'{psnr["pixel MLP"]} dB', f'{psnr["copy T2"]} dB']
    told += [f'twin made {record["runs"]["twin without Mamba"]["steps"]} steps', f'I2I-Mamba {record["runs"]["I2I-Mamba"]["steps"]}.']
    assert not [t for t in told if t not in README]

def test_scan_figures_are_the_recorded_ones():
    rows = json.loads((ROOT/'bench'/'results'/'scan.json').read_text(encoding='utf-8'))['rows']
    forward, both = rows['S1 forward'], rows['S1 both']
    ms, ratio = [r['ms']['cpu avx512']['median'] for r in (forward, both)], [r['faster_than_mambapy'] for r in (forward, both)]
    kept = [r['memory_kept']['faster_than_mambapy']['cpu avx512'] for r in (forward, both)]
    times = [f'{r["cpu avx512"]:.0f} times' for r in ratio]
    told = [f'takes {ms[0]:.1f} ms forward, {times[0]}', f'{ms[1]:.1f} ms forward and backward, {times[1]}',
        f'`chunked` is {ratio[0]["chunked"]:.1f} and {ratio[1]["chunked"]:.1f} times', f'kernel is {kept[0]:.0f} and {kept[1]:.0f} times']
    assert not [t for t in told if t not in README]

@pytest.mark.parametrize('target', sorted(set(re.findall(r'(?:^|`)make (\w+)', README, re.M))))
def test_make_target_exists(target): assert re.search(rf'^{target}:', (ROOT/'Makefile').read_text(), re.M)

@pytest.mark.parametrize('command', sorted(set(re.findall(r'^i2i-mamba (\w+)', README, re.M))))
def test_command_exists(command):
    done = subprocess.run([str(Path(sys.executable).parent/'i2i-mamba'), command, '--help'], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

@pytest.mark.parametrize('link', sorted(set(re.findall(r'\]\((?!https?://|#)([^)#]+)', README))))
def test_link_leads_somewhere(link): assert (ROOT/link).exists()
