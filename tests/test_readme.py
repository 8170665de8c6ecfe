"The README's Python runs as it stands, and its commands exist"
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

@pytest.mark.parametrize('target', sorted(set(re.findall(r'\bmake (\w+)', README))))
def test_make_target_exists(target): assert re.search(rf'^{target}:', (ROOT/'Makefile').read_text(), re.M)

@pytest.mark.parametrize('command', sorted(set(re.findall(r'^i2i-mamba (\w+)', README, re.M))))
def test_command_exists(command):
    done = subprocess.run([str(Path(sys.executable).parent/'i2i-mamba'), command, '--help'], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

@pytest.mark.parametrize('link', sorted(set(re.findall(r'\]\((?!https?://|#)([^)#]+)', README))))
def test_link_leads_somewhere(link): assert (ROOT/link).exists()
