"Fixtures that several suites share, and the counts of the fuzz suites at the end of a run"
import signal

import pytest
from samples import build

from i2i_mamba_nb.data.archives import propose_manifest

# a shell that starts the tests in the background has them ignore Ctrl-C, and so would every process that they start
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN: signal.signal(signal.SIGINT, signal.default_int_handler)

COLUMNS = ('malformed', 'mutations', 'flips', 'truncations', 'bombs', 'refused', 'unchanged', 'silent changes')
TALLY, EXTREMES = {}, {}

class Tally:
    "Counts per format that the fuzz suites add to; printed when all tests are done"
    def add(self, kind, **counts):
        row = TALLY.setdefault(kind, dict.fromkeys(COLUMNS, 0))
        for name, n in counts.items(): row[name.replace('_', ' ')] += int(n)

    def most(self, what, value):
        "Keep the largest value of `what`, for instance seconds or megabytes"
        EXTREMES[what] = max(value, EXTREMES.get(what, value))

@pytest.fixture(scope='session')
def tally(): return Tally()

def pytest_terminal_summary(terminalreporter):
    "A table of what was damaged and what came of it"
    if not TALLY: return
    write = terminalreporter.write_line
    terminalreporter.section('damaged volumes')
    write(f'{"format":<14}'+''.join(f'{c:>15}' for c in COLUMNS))
    for kind, row in TALLY.items(): write(f'{kind:<14}'+''.join(f'{row[c]:>15}' for c in COLUMNS))
    write(f'{"together":<14}'+''.join(f'{sum(r[c] for r in TALLY.values()):>15}' for c in COLUMNS))
    for what, value in EXTREMES.items(): write(f'{what}: {value:.3g}')

@pytest.fixture(scope='module')
def cohort(tmp_path_factory):
    folder = build(tmp_path_factory.mktemp('cohort'))
    return propose_manifest(folder, splits=dict(p1='train', p2='validation', p3='test'))
