"Imports point down only: architecture's floors, read from the exported code by ast"
import ast
from pathlib import Path

import pytest

LIB = Path(__file__).resolve().parent.parent/'i2i_mamba_nb'
MAY = dict(core=set(), ssm={'core'}, measure={'core'}, blocks={'core', 'ssm'}, data={'core', 'measure'}, models={'core', 'ssm', 'blocks'},
    learn={'core'}, engine={'core', 'data', 'measure', 'learn'},
    app={'core', 'ssm', 'measure', 'blocks', 'data', 'models', 'learn', 'engine'})
OUTSIDE_CORE = {'torch', 'numpy', 'matplotlib'}  # what core may import besides the standard library

def imports(path, lib=LIB):
    "Absolute dotted names that a module imports, relative ones resolved by their level"
    package = ('i2i_mamba_nb', *path.relative_to(lib).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import): yield from (a.name for a in node.names)
        if isinstance(node, ast.ImportFrom):
            base = package[:len(package)-node.level+1] if node.level else ()
            stem = '.'.join([*base, *filter(None, [node.module])])
            yield from ([f'{stem}.{a.name}' for a in node.names] if stem == 'i2i_mamba_nb' else [stem])

def floor(path, lib=LIB): return path.relative_to(lib).parts[0].removesuffix('.py')

def arrows(path, lib=LIB):
    "Subpackages of ours that a module imports, its own left out; the bare version counts as none"
    names = (n.split('.') for n in imports(path, lib))
    return {n[1] for n in names if n[0] == 'i2i_mamba_nb' and len(n) > 1} - {floor(path, lib), '__version__'}

MODULES = sorted(p for p in LIB.rglob('*.py') if p.parent != LIB or p.stem == 'core')

@pytest.mark.parametrize('path', MODULES, ids=lambda p: str(p.relative_to(LIB)))
def test_imports_point_down(path): assert arrows(path) <= MAY[floor(path)]

def test_every_floor_is_there(): assert {floor(p) for p in MODULES} == set(MAY)

def test_core_leans_on_torch_and_numpy_only():
    import sys
    outside = {n.split('.')[0] for n in imports(LIB/'core.py')} - set(sys.stdlib_module_names) - {'i2i_mamba_nb'}
    assert outside <= OUTSIDE_CORE

@pytest.mark.parametrize('line', ['from ..data.volume import read_volume', 'from .. import data', 'import i2i_mamba_nb.data.volume',
    'from i2i_mamba_nb.data import volume', 'def f():\n    from ..data.slices import x'])
def test_an_arrow_upward_is_seen(tmp_path, line):
    (tmp_path/'blocks').mkdir()
    (tmp_path/'blocks'/'x.py').write_text(line)
    assert arrows(tmp_path/'blocks'/'x.py', tmp_path) == {'data'}
