"The page of a run: what goes in comes out as text, nothing is fetched, the file is whole or absent"
import csv
import io
import resource
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from i2i_mamba_nb.app.report import Picture, Table, comparison, csv_text, page, read_log, save_figure, tag, write_report
from i2i_mamba_nb.core import ConfigError, DiskError, show_images

TEXT = st.text(st.characters(blacklist_categories=('Cs', 'Cc')), max_size=40)

class Reader(HTMLParser):
    "Tags, text, attributes"
    def __init__(self): super().__init__(convert_charrefs=True); self.tags, self.text, self.attributes = [], '', []
    def handle_starttag(self, tag, attrs): self.tags.append(tag); self.attributes += attrs
    def handle_data(self, data): self.text += data

def read(text):
    reader = Reader()
    reader.feed(text)
    reader.close()
    return reader

def a_picture(): return Picture('Pictures', save_figure(show_images([np.eye(5)])), 'a diagonal', 'Five by five')

@settings(max_examples=200, deadline=None)
@given(TEXT, TEXT)
def test_any_text_stays_text(inside, attribute):
    back = read(tag('p', inside, tag('img', alt=attribute)))
    assert (back.text, back.tags, back.attributes) == (inside, ['p', 'img'], [('alt', attribute)])

HOSTILE = '</style></script><script>x</script><img src=http://a.b onerror=x>"\''

def test_hostile_names_everywhere(tmp_path):
    figure = comparison(HOSTILE, {HOSTILE: np.eye(4)}, (HOSTILE, np.eye(4)), (HOSTILE, np.zeros((4, 4))), note=HOSTILE)
    path = write_report(tmp_path, title=HOSTILE, tables=[Table(HOSTILE, [{HOSTILE: HOSTILE, 'x': HOSTILE}], HOSTILE)], figures=[figure],
        card={HOSTILE: HOSTILE}, notes=[HOSTILE], files={HOSTILE: HOSTILE}, simulated=True)
    back = read(path.read_text())
    assert 'script' not in back.tags and back.tags.count('img') == 1 and back.tags.count('style') == 1
    assert not [v for k, v in back.attributes if k.startswith('on') or k == 'src' and not v.startswith('data:image/png;base64,')]
    assert not [v for k, v in back.attributes if k == 'href' and ':' in v]

def test_page_is_for_everybody():
    text = page('t', {'A': [tag('p', 'x')]}, simulated=True)
    back = dict(read(text).attributes)
    assert back['lang'] == 'en' and back['charset'] == 'utf-8' and 'prefers-color-scheme:dark' in text
    assert 'SIMULATED' in text and 'No clinical use' in page('t', {}, simulated=False) and 'SIMULATED' not in page('t', {})
    with pytest.raises(ConfigError, match='alternative text'): write_report('unused', title='t', figures=[Picture('P', b'', '')])

def test_no_alternative_text_writes_nothing(tmp_path):
    mute = Picture('P', b'', '')
    with pytest.raises(ConfigError): write_report(tmp_path/'new', title='t', tables=[Table('T', [dict(a=1)])], figures=[mute])
    assert not (tmp_path/'new').exists()

VALUE = TEXT | st.floats(allow_nan=False) | st.none()

@settings(max_examples=200, deadline=None)
@given(st.lists(st.fixed_dictionaries(dict(method=TEXT.map('m'.__add__), value=VALUE)), min_size=1))
def test_csv_keeps_every_cell(rows):
    back = list(csv.DictReader(io.StringIO(csv_text(rows))))
    assert [r['method'] for r in back] == [r['method'] for r in rows]
    for r, b in zip(rows, back, strict=True):
        if isinstance(r['value'], float): assert float(b['value']) == r['value']
        else: assert b['value'].removeprefix("'") == (r['value'] or '').removeprefix("'")
        assert b['value'][:1] not in ('=', '@')

PROGRAM = """
import numpy as np
from i2i_mamba_nb.app.report import *
from i2i_mamba_nb.core import *
import hashlib, sys
fig = comparison('s', {'T1': np.eye(9)}, ('PD', np.eye(9)), ('net', .5*np.eye(9)))
made = write_report(sys.argv[1], title='t', tables=[Table('T', [dict(a=1., b=2)])], figures=[fig], card=dict(seed=0), simulated=True)
print(hashlib.sha256(made.read_bytes()).hexdigest())
"""

def test_same_bytes_in_another_process(tmp_path):
    runs = [subprocess.run([sys.executable, '-c', PROGRAM, tmp_path/k], capture_output=True, text=True, check=True).stdout for k in 'ab']
    assert runs[0] == runs[1] and len(runs[0]) == 65

def test_full_disk_keeps_the_old_page(tmp_path):
    path = write_report(tmp_path, title='old', figures=[a_picture()])
    before, picture = path.read_bytes(), a_picture()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
    try:
        with pytest.raises(DiskError, match='report.html.*bytes free'): write_report(tmp_path, title='new', figures=[picture])
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ['report.html']

def test_damaged_log(tmp_path):
    (tmp_path/'log.csv').write_text('step,loss\n1,0.5\n2,nan\nx,3\n3')
    assert read_log(tmp_path/'log.csv')['loss'][1][0] == .5
    assert list(read_log(tmp_path/'log.csv')['loss'][0])[:1] == [1.]
