"Fixtures that several suites share"
import pytest
from samples import build

from i2i_mamba_nb.data.prepare import propose_manifest

@pytest.fixture(scope='module')
def cohort(tmp_path_factory):
    folder = build(tmp_path_factory.mktemp('cohort'))
    return propose_manifest(folder, splits=dict(p1='train', p2='validation', p3='test'))
