"Execute notebooks in place with a kernel, drop what changes from run to run, keep figures; then nbdev_clean each"
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbdev.clean import nbdev_clean

LIVE = 'application/vnd.jupyter.widget-view+json'

def stored(output):
    "Whether an output is kept: no widgets and nothing from stderr (progress bars, warnings with paths)"
    return LIVE not in output.get('data', {}) and output.get('name') != 'stderr'

def merged(outputs):
    "Consecutive stdout pieces as one, since a kernel may split a stream anywhere"
    kept = []
    for o in outputs:
        if kept and o.output_type == 'stream' and kept[-1].output_type == 'stream': kept[-1].text += o.text
        else: kept.append(o)
    return kept

def run(path):
    "Execute the notebook at `path` in its own folder and write it back"
    nb = nbformat.read(path, 4)
    place = {'metadata': {'path': str(path.parent)}}
    NotebookClient(nb, timeout=900, kernel_name='python3', resources=place, record_timing=False).execute()
    for cell in nb.cells:
        if cell.cell_type == 'code': cell.outputs = merged([o for o in cell.outputs if stored(o)])
    nb.metadata.pop('widgets', None)
    nbformat.write(nb, path)
    nbdev_clean(str(path))

if __name__ == '__main__':
    for name in sys.argv[1:]: run(Path(name).resolve())
