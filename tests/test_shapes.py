"Shapes written in signatures are what runs: jaxtyping and beartype check every call of a forward and backward pass"
import subprocess
import sys

import pytest

CHECKED = '''
import torch
from jaxtyping import TypeCheckError, install_import_hook
with install_import_hook('i2i_mamba_nb', 'beartype.beartype'):
    from i2i_mamba_nb.core import network, networks, recipe
    from i2i_mamba_nb.ssm import selective_scan
    from i2i_mamba_nb.ssm.mixers import SS2D, Mamba
'''
PASSES = dict(
    scan='''
b, d, n, l = 2, 3, 5, 7
u, delta, B, C = torch.randn(b, d, l), torch.randn(b, d, l), torch.randn(b, n, l), torch.randn(b, n, l)
y, last = selective_scan(u, delta, -torch.rand(d, n), B, C, torch.ones(d), torch.randn(b, d, l), torch.zeros(d), True, True)
assert y.shape == (b, d, l) and last.shape == (b, d, n)''',
    mixers='''
assert Mamba(6, d_state=3)(torch.randn(2, 7, 6)).shape == (2, 7, 6)
assert SS2D(6, d_state=3)(torch.randn(2, 6, 3, 5)).shape == (2, 6, 3, 5)''',
    networks='''
for name, record in networks('generator').items():
    for switch in [{}, *record.ablations.values()]:
        net = record.build(**(record.smallest | switch))
        side = 2*max(record.inputs.smallest, record.inputs.multiple)
        assert net(torch.randn(1, record.inputs.channels(record.smallest), side, side)).shape == (1, 1, side, side)''',
    recipe='''
made = recipe('paired_adversarial').build(generator=network('i2i_mamba').build(**network('i2i_mamba').presets['smoke']),
    discriminator=network('patchgan').build(n_channels=3, base_channels=4))
memory, batch = None, dict(source=torch.randn(1, 2, 32, 32), target=torch.randn(1, 1, 32, 32))
for phase in made.phases:
    named, memory = made.losses(phase, batch, memory)
    named['total'].backward()''',
    a_wrong_shape_is_seen='''
from i2i_mamba_nb.ssm import mixers
try: mixers.cross_scan(torch.randn(2, 3, 5))
except TypeCheckError: pass
else: raise AssertionError('three axes passed for four')''')

@pytest.mark.parametrize('name', PASSES)
def test_signatures(name):
    done = subprocess.run([sys.executable, '-c', CHECKED+PASSES[name]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
