"The package as a whole: light to import, no way to run foreign bytes, documented names"
import ast
import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import i2i_mamba_nb

LIB = Path(i2i_mamba_nb.__file__).parent
MODULES = sorted(m.name for m in pkgutil.walk_packages([str(LIB)], 'i2i_mamba_nb.') if not m.name.endswith('_modidx'))
HEAVY = ['matplotlib', 'sklearn', 'skimage', 'SimpleITK', 'pandas', 'nilearn', 'nibabel', 'accelerate', 'scipy', 'IPython', 'ipywidgets']
FORBIDDEN_CALLS = {'eval', 'exec', 'torch.load', 'yaml.load', 'np.load', 'numpy.load', 'joblib.load', '__import__'}
FORBIDDEN_MODULES = {'pickle', 'cPickle', 'dill', 'joblib', 'shelve', 'marshal', 'cloudpickle', 'fastcore', 'nbdev'}
FORBIDDEN_WORDS = {'allow_pickle', 'extractall'}

def test_importing_everything_leaves_heavy_libraries_alone():
    code = f'import sys, importlib\n[importlib.import_module(m) for m in {MODULES}]\nprint(*[m for m in {HEAVY} if m in sys.modules])'
    base = subprocess.run([sys.executable, '-c', f'import sys, torch\nprint(*[m for m in {HEAVY} if m in sys.modules])'],
        capture_output=True, text=True, check=True)
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) <= set(base.stdout.split())

def dotted(node):
    "Name of a called function, as written"
    if isinstance(node, ast.Attribute): return f'{dotted(node.value)}.{node.attr}'
    return node.id if isinstance(node, ast.Name) else ''

def dangers(tree):
    "Ways to run foreign bytes, and development tools, in a module"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and dotted(node.func) in FORBIDDEN_CALLS: yield dotted(node.func)
        if isinstance(node, ast.Import): yield from (a.name for a in node.names if a.name.split('.')[0] in FORBIDDEN_MODULES)
        if isinstance(node, ast.ImportFrom) and (node.module or '').split('.')[0] in FORBIDDEN_MODULES and not node.level: yield node.module
        if isinstance(node, ast.keyword) and node.arg in FORBIDDEN_WORDS: yield node.arg
        if isinstance(node, ast.Attribute) and node.attr in FORBIDDEN_WORDS: yield node.attr

@pytest.mark.parametrize('path', sorted(LIB.rglob('*.py')), ids=lambda p: str(p.relative_to(LIB)))
def test_no_way_to_run_foreign_bytes(path): assert not list(dangers(ast.parse(path.read_text(encoding='utf-8'))))

@pytest.mark.parametrize('line', ['import pickle', 'from joblib import load', 'torch.load("x")', 'eval("1")', 'tar.extractall()',
    'np.fromfile("x", allow_pickle=True)'])
def test_a_danger_is_seen(line): assert list(dangers(ast.parse(line)))

def public(module):
    "Functions and classes a module defines under public names"
    return [(n, o) for n, o in vars(module).items() if not n.startswith('_') and getattr(o, '__module__', '') == module.__name__
        and (inspect.isfunction(o) or inspect.isclass(o))]

@pytest.mark.parametrize('name', MODULES)
def test_every_public_name_has_a_docstring(name):
    assert not [n for n, o in public(importlib.import_module(name)) if not (o.__doc__ or '').strip()]

def test_no_global_state_is_changed_by_import():
    code = (f'import importlib, random, numpy as np, torch\nbefore = random.getstate(), np.random.get_state()[1].tolist(), '
        f'torch.random.get_rng_state().tolist(), torch.get_num_threads(), torch.get_default_dtype()\n'
        f'[importlib.import_module(m) for m in {MODULES}]\nassert before == (random.getstate(), np.random.get_state()[1].tolist(), '
        f'torch.random.get_rng_state().tolist(), torch.get_num_threads(), torch.get_default_dtype())')
    subprocess.run([sys.executable, '-c', code], check=True)
