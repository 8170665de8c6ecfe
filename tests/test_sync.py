"The package holds exactly what the notebooks export, the notebooks are clean, and README.md is what index.ipynb says"
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIB = 'i2i_mamba_nb'

def python_files(root): return {p.relative_to(root/LIB): p.read_text(encoding='utf-8') for p in (root/LIB).rglob('*.py')}

def copied(tmp_path, *names):
    "The named files and folders in a folder of their own"
    for name in names:
        if (ROOT/name).is_dir(): shutil.copytree(ROOT/name, tmp_path/name)
        else: shutil.copy(ROOT/name, tmp_path/name)
    return tmp_path

def tool(name): return str(Path(sys.executable).parent/name)

def test_package_is_what_the_notebooks_export(tmp_path):
    copied(tmp_path, 'nbs', 'settings.ini', 'README.md')
    subprocess.run([tool('nbdev_export')], cwd=tmp_path, check=True)
    ours, fresh = python_files(ROOT), python_files(tmp_path)
    assert ours.keys() == fresh.keys(), ours.keys() ^ fresh.keys()
    assert not [k for k in ours if ours[k] != fresh[k]]

def test_notebooks_are_clean(tmp_path):
    copied(tmp_path, 'nbs', 'settings.ini')
    subprocess.run([tool('nbdev_clean')], cwd=tmp_path, check=True)
    notebooks = (p.relative_to(ROOT) for p in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
    assert not [p for p in notebooks if (ROOT/p).read_bytes() != (tmp_path/p).read_bytes()]

def test_readme_is_what_index_says(tmp_path):
    copied(tmp_path, 'nbs', 'tools')
    subprocess.run([sys.executable, 'tools/build_readme.py', 'nbs/index.ipynb', 'README.md'], cwd=tmp_path, check=True)
    assert (ROOT/'README.md').read_text(encoding='utf-8') == (tmp_path/'README.md').read_text(encoding='utf-8')
