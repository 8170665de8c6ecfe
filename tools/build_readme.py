"Write README.md and its pictures (nbs/images) from nbs/index.ipynb: `python tools/build_readme.py nbs/index.ipynb README.md`"
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

HIDDEN = {'hide', 'export', 'exporti', 'exports', 'default_exp'}

def directives(cell):
    "Words after `#|` in a code cell"
    return {w.removeprefix('#|').split()[0] for w in cell.source.splitlines() if w.startswith('#|')} if cell.cell_type == 'code' else set()

def visible(nb):
    "The notebook without hidden cells and without directive lines"
    nb.cells = [c for c in nb.cells if not directives(c) & HIDDEN]
    for c in nb.cells:
        if c.cell_type == 'code': c.source = '\n'.join(w for w in c.source.splitlines() if not w.startswith('#|'))
    nb.metadata['language_info'] = {'name': 'python'}  # nbdev_clean drops it; without it the fence has no language
    return nb

def build(source, target):
    "Markdown of notebook `source` at `target`, its pictures beside it under nbs/images"
    nb = visible(nbformat.read(source, as_version=4))
    body, made = MarkdownExporter().from_notebook_node(nb, resources={'output_files_dir': 'nbs/images', 'unique_key': source.stem})
    body = body.replace('![png](', '![picture drawn by the code above](')
    body = body.replace('](images/', '](nbs/images/').replace('src="images/', 'src="nbs/images/')
    target.write_text(body.strip()+'\n', encoding='utf-8')
    for name, data in made['outputs'].items():
        picture = target.parent/name
        picture.parent.mkdir(parents=True, exist_ok=True)
        picture.write_bytes(data)

if __name__ == '__main__': build(Path(sys.argv[1]), Path(sys.argv[2]))
