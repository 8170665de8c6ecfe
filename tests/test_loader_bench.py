"bench/loader.py end to end on small slices: every dataset is timed, batches hold what they should, the record says what it must"
import importlib
import sys
from pathlib import Path

import pytest
from test_bench import ROOT

from i2i_mamba_nb.core import read_json

@pytest.fixture
def loader(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT/'bench'))
    module = importlib.import_module('loader')
    small = dict(SHAPE=(30, 26, 9), SIZE=28, PATIENTS=3, SETTINGS=[(0, 4), (2, 4)])
    for name, value in small.items(): monkeypatch.setattr(module, name, value)
    return module

def test_every_dataset_is_timed(loader, tmp_path, monkeypatch, capsys):
    out = tmp_path/'loader.json'
    monkeypatch.setattr(sys, 'argv', ['loader.py', '--items', '60', '--repeats', '1', '--out', str(out)])
    loader.main()
    record = read_json(out)
    assert len(record['rows']) == 7 and all(record[k] for k in ('machine', 'versions', 'date', 'command')) and 'load_average' in record
    for row in record['rows'].values():
        assert [(s['workers'], s['batch']) for s in row['settings']] == loader.SETTINGS
        assert all(s['slices_per_second'] > 0 for s in row['settings']) and row['bars'][0]['at_least'] == 400
    assert capsys.readouterr().out.count('slices per second') == 7

def test_batches_are_those_asked_for(loader, tmp_path):
    for name, data in loader.datasets(tmp_path).items():
        keys = loader.batches(data, 4, 50)
        assert len(keys) == 13 and max(map(len, keys)) == 4, name
        items = [data[k] for k in max(keys, key=len)]
        pictures = [i['images'] if 'images' in i else i['source'] for i in items]
        assert all(p.shape == (3 if 'many' in name else 6 if 'adjacent' in name else 2, 28, 28) for p in pictures)

def test_the_recorded_run_reaches_the_bar():
    record = read_json(Path(ROOT)/'bench'/'results'/'loader.json')
    rows = record['rows']
    assert len(rows) == 7 and {tuple(s[k] for k in ('workers', 'batch')) for s in rows['pairs']['settings']} >= {(2, 4), (2, 1), (0, 4)}
    assert record['bars_reached'] and all(r['bars'][0]['got'] >= 400 for r in rows.values())
