"The style guide's numbers, checked on every notebook; `python tests/test_lint.py [NB ...]` prints a line each"
import ast
import json
import re
import sys
from pathlib import Path
from statistics import mean

import pytest

ROOT = Path(__file__).resolve().parent.parent
# index.ipynb is the README, not a chapter
NOTEBOOKS = sorted(p for p in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in str(p) and p.stem != 'index')
TEST = re.compile(r'\bassert\b|\btest_(eq|ne|fail|close|is)\b|allclose|assert_close|gradcheck|\bcheck\(|^check_\w+\(|\braises\(', re.M)
LEDGER = re.compile(r'> Paper: .+ Ours: .+ Why: .+ Effect: .+')
MAMBA_SSM_SIGNATURE = {"ordered_scan", 'selective_scan', 'reference', 'chunked'}  # keep mamba-ssm's argument list, see the style guide

def source(cell): return ''.join(cell['source'])
def lines(text): return [w for w in text.splitlines() if w.strip() and not w.strip().startswith('#|')]
def exported(cell): return bool(re.search(r'^#\| ?export', source(cell), re.M))
def pictures(cell): return [o for o in cell.get('outputs', []) if 'image/png' in o.get('data', {})]
def cells_of(path): return json.loads(Path(path).read_text(encoding='utf-8'))['cells']

def functions(cells):
    "Every function definition of the notebook's code cells"
    for cell in cells:
        if cell['cell_type'] != 'code': continue
        text = '\n'.join('' if w.lstrip().startswith(('%', '!')) else w for w in source(cell).splitlines())
        yield from (n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef))

def body_lines(node):
    "Lines of a function without its signature, docstring, comments and blank lines"
    body = node.body[1:] if ast.get_docstring(node) else node.body
    return sum(s.end_lineno-s.lineno+1 for s in body)

def arguments(node):
    "Arguments of a function without self, cls and ctx"
    return len([a for a in node.args.posonlyargs+node.args.args+node.args.kwonlyargs if a.arg not in ('self', 'cls', 'ctx')])

def most_arguments(node):
    "8; a network's switches are the papers' ablations: up to 14 where all but 4 are keyword-only"
    positional = arguments(node)-len(node.args.kwonlyargs)
    return 14 if node.name == '__init__' and positional <= 4 else 8

def first_minute(cells):
    "Words and code lines before the first H2"
    upto = next((i for i, c in enumerate(cells) if c['cell_type'] == 'markdown' and re.search(r'^## ', source(c), re.M)), len(cells))
    head = cells[:upto]
    shown = [c for c in head if c['cell_type'] == 'code' and not re.search(r'^#\| ?(hide|default_exp|export)', source(c), re.M)]
    return sum(len(source(c).split()) for c in head if c['cell_type'] == 'markdown'), sum(len(lines(source(c))) for c in shown)

def structure(cells):
    "Findings on cells, pictures, words"
    code = [c for c in cells if c['cell_type'] == 'code' and source(c).strip()]
    prose = [c for c in cells if c['cell_type'] == 'markdown']
    sizes, words = [len(lines(source(c))) for c in code], sum(len(source(c).split()) for c in prose)
    exports = [len(lines(source(c))) for c in code if exported(c)]
    h2 = sum(len(re.findall(r'^## ', source(c), re.M)) for c in prose)
    tests, drawn = sum(bool(TEST.search(source(c))) for c in code), sum(bool(pictures(c)) for c in code)
    comments = sum(bool(re.match(r'\s*#(?!\|)', w)) for c in code for w in source(c).splitlines())
    yield mean(sizes) <= 8, f'mean code cell {mean(sizes):.1f} lines > 8'
    yield max(sizes) <= 40, f'longest code cell {max(sizes)} lines > 40'
    yield not exports or mean(exports) <= 15, f'mean exported cell {mean(exports or [0]):.1f} lines > 15'
    yield not exports or tests/len(code) >= .30, f'{tests} of {len(code)} code cells test: {100*tests/len(code):.0f} % < 30 %'
    yield drawn >= h2, f'{drawn} pictures < {h2} sections'
    yield not exports or 3 <= words/sum(sizes) <= 6, f'{words/sum(sizes):.1f} words per line of code, not 3 to 6'
    odd = [c for c in cells if re.search(r'[\x00-\x09\x0b-\x1f]', source(c))]
    yield not odd, f'{len(odd)} cells with control characters (a backslash that was eaten, as in a formula)'
    rows = [w for c in prose for w in source(c).splitlines() if w.startswith('> Paper:')]
    yield all(LEDGER.match(r) for r in rows), 'a ledger row not in the form > Paper: ... Ours: ... Why: ... Effect: ...'
    yield comments <= .1*sum(sizes), f'{comments} comment lines in {sum(sizes)} > 10 %'
    yield not any(o.get('output_type') == 'error' for c in code for o in c.get('outputs', [])), 'a stored error'

def style(cells):
    "Findings on the first minute and on functions"
    words, code = first_minute(cells)
    yield words <= 120, f'first minute has {words} words > 120'
    yield code <= 15, f'first minute has {code} lines of code > 15'
    nodes = list(functions(cells))
    size = [body_lines(n) for n in nodes]
    yield not size or mean(size) <= 10, f'mean function {mean(size or [0]):.1f} lines > 10'
    for n, k in zip(nodes, size, strict=True):
        yield k <= 40, f'function {n.name} has {k} lines > 40'
        most = most_arguments(n)
        yield arguments(n) <= most or n.name in MAMBA_SSM_SIGNATURE, f'function {n.name} has {arguments(n)} arguments > {most}'

def findings(path):
    "What a notebook misses, as text"
    cells = cells_of(path)
    bad = [text for ok, text in [*structure(cells), *style(cells)] if not ok]
    if Path(path).stat().st_size > 500_000: bad.append(f'{Path(path).stat().st_size//1000} kB > 500')
    return bad

@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_style(path): assert not findings(path)

def test_a_bad_notebook_is_found(tmp_path):
    long = '\n'.join(f'x{i} = {i}' for i in range(50))
    cells = [dict(cell_type='markdown', source='# t\n'+'word '*130), dict(cell_type='code', source='#| export\n'+long, outputs=[]),
        dict(cell_type='markdown', source='## section')]
    (tmp_path/'x.ipynb').write_text(json.dumps(dict(cells=cells)))
    text = ' '.join(findings(tmp_path/'x.ipynb'))
    for piece in ('mean code cell', 'longest', 'code cells test', 'pictures', 'first minute'): assert piece in text

if __name__ == '__main__':
    for name in sys.argv[1:] or NOTEBOOKS: print(name, findings(name) or 'ok', sep='\n  ')
