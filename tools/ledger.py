"Print the ledger: every difference from a paper that the notebooks name, as one Markdown table"
import json
import re
from pathlib import Path

NBS = Path(__file__).resolve().parent.parent/'nbs'
ROW = re.compile(r'^> Paper: (.+?) Ours: (.+?) Why: (.+?) Effect: (.+)$', re.M)

def rows(path):
    "The (paper, ours, why, effect) rows of one notebook"
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    return [r for c in cells if c['cell_type'] == 'markdown' for r in ROW.findall(''.join(c['source']))]

def ledger(folder=NBS):
    "The whole table"
    table = [(p.stem, *r) for p in sorted(folder.rglob('*.ipynb')) if '.ipynb_checkpoints' not in p.parts for r in rows(p)]
    return '\n'.join(['| chapter | paper | ours | why | effect |', '|---|---|---|---|---|', *('| '+' | '.join(r)+' |' for r in table)])

if __name__ == '__main__': print(ledger())
